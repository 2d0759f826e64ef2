//! A small operator with three services: a shop for customers, billing for workloads, media for files. The
//! background of the scenarios and of the run without attacks.

use std::sync::Arc;

use super::{random::Random, world::season};
use crate::{
    config,
    detect::{Engine, sketch::mix},
    exchange::{Auth, End, Exchange, Method, Peer, Protocol, Scheme, TlsVersion},
    params::{ParamHasher, Params},
};

/// Endpoints of the town by their numbers.
#[expect(missing_docs, reason = "the routes are below")]
pub mod at {
    pub const CUSTOMER: usize = 0;
    pub const ORDER: usize = 1;
    pub const LOGIN: usize = 2;
    pub const PRODUCTS: usize = 3;
    pub const BUY: usize = 4;
    pub const INVOICE: usize = 5;
    pub const CHARGE: usize = 6;
    pub const FILE: usize = 7;
    pub const HEALTH: usize = 8;
}

/// Programs of customers.
const AGENTS: [&str; 5] =
    ["shop-ios/5.1", "shop-android/5.3", "Mozilla/5.0 (Windows)", "Mozilla/5.0 (Macintosh)", "okhttp/4.9"];
/// Customers at the start.
pub const CUSTOMERS: u64 = 4_000_000;
const PRINCIPAL: u64 = 0x7007_0001;

struct Place {
    service: Arc<str>,
    method: Method,
    route: Arc<str>,
    auth: Auth,
    bytes: u64,
}

/// The town at work.
pub struct Town {
    /// What watches it.
    pub engine: Engine,
    /// Seconds since the epoch.
    pub now: f64,
    /// Factor of the number of customers.
    pub crowd: f64,
    /// Share of server errors, and factor of durations.
    pub trouble: (f64, u64),
    /// Requests that a customer makes where one made 2 before.
    pub chatty: u32,
    /// Share of customers who are new.
    pub new: f64,
    /// The highest customer id.
    pub newest: u64,
    /// Exchanges so far.
    pub exchanges: u64,
    /// For what scenarios decide.
    pub random: Random,
    rate: f64,
    places: Vec<Place>,
    sessions: Vec<(u64, u32)>,
    hasher: ParamHasher,
    exchange: Exchange,
}

/// A token of a user.
#[must_use]
pub fn token(user: u64) -> String {
    format!("{:016x}", mix(user ^ PRINCIPAL))
}

/// Where a user is.
#[must_use]
pub fn address(user: u64) -> Peer {
    let [a, b, c, ..] = mix(user ^ 0xadd).to_be_bytes();
    Peer::Ip(([81, a, b, c], 40_000).into())
}

impl Town {
    /// With this many requests a second on average.
    ///
    /// # Errors
    /// The configuration of the detectors is wrong.
    pub fn new(rate: f64, seed: u64, start: u64, config: &config::Detect) -> anyhow::Result<Self> {
        let mut town = Self {
            engine: Engine::new(config)?,
            now: start as f64,
            crowd: 1.0,
            trouble: (0.002, 1),
            chatty: 2,
            new: 0.01,
            newest: CUSTOMERS,
            exchanges: 0,
            random: Random::new(seed, 3),
            rate,
            places: Vec::new(),
            sessions: Vec::new(),
            hasher: ParamHasher::new([9; 16]),
            exchange: Exchange {
                duration_ns: 1,
                protocol: Protocol::Http11,
                end: End::Complete,
                ..Exchange::default()
            },
        };
        for (service, method, route, auth, bytes) in [
            ("shop", Method::Get, "/v1/customers/{int}", Auth::Bearer, 1_400),
            ("shop", Method::Get, "/v1/orders/{int}", Auth::Bearer, 900),
            ("shop", Method::Post, "/v1/login", Auth::None, 300),
            ("shop", Method::Get, "/v1/products/{int}", Auth::None, 2_500),
            ("shop", Method::Post, "/v1/orders", Auth::Bearer, 200),
            ("billing", Method::Get, "/invoices/{int}", Auth::ApiKey, 700),
            ("billing", Method::Post, "/charges", Auth::ApiKey, 120),
            ("media", Method::Get, "/files/{uuid}", Auth::Cookie, 180_000),
            ("shop", Method::Get, "/healthz", Auth::None, 2),
        ] {
            town.place(service, method, route, auth, bytes);
        }
        Ok(town)
    }

    /// Makes an endpoint.
    pub fn place(&mut self, service: &str, method: Method, route: &str, auth: Auth, bytes: u64) -> usize {
        self.places.push(Place { service: service.into(), method, route: route.into(), auth, bytes });
        self.places.len() - 1
    }

    /// One exchange, now. `change` says what is unusual about it.
    pub fn send(&mut self, at: usize, user: u64, object: Option<u64>, change: impl FnOnce(&mut Exchange)) {
        let Some(place) = self.places.get(at) else { return };
        let noise = self.random.draw();
        let mut x = self.exchange.clone();
        x.ts = (self.now * 1e9) as u64;
        x.service = place.service.clone();
        x.method = place.method.clone();
        x.auth = place.auth;
        x.status = if (noise >> 40) as f64 / (1u64 << 24) as f64 > self.trouble.0 { 200 } else { 503 };
        x.response_bytes = place.bytes + noise % (place.bytes / 4 + 1);
        x.duration_ns = (5_000_000 + noise % 4_000_000) * self.trouble.1;
        x.scheme = Scheme::Https;
        x.tls_version = Some(TlsVersion::Tls13);
        x.principal = (place.auth != Auth::None).then(|| token(user).into());
        x.client = address(user);
        x.user_agent = Some(AGENTS[(mix(user) % 5) as usize].into());
        if &*place.service == "billing" {
            let workload = user % 3;
            x.client = Peer::Ip(([10, 1, 0, workload as u8 + 10], 30_000).into());
            x.caller = Some(
                ["shop/deployment/web", "shop/deployment/jobs", "finance/cronjob/close"][workload as usize].into(),
            );
        }
        change(&mut x);
        let params = object.map_or_else(Params::default, |o| {
            let params = self.hasher.number(o);
            if at == at::FILE { params.opaque() } else { params }
        });
        let route = place.route.clone();
        self.exchanges += 1;
        self.engine.observe(&x, at, &route, &params);
    }

    /// The agent ends, keeps what it learned as text, and comes back.
    ///
    /// # Errors
    /// It does not understand what it wrote.
    pub fn restart(&mut self, config: &config::Detect) -> anyhow::Result<()> {
        let text = self.engine.save().to_string();
        let events: Vec<_> = self.engine.findings().drain().collect();
        self.engine = Engine::new(config)?;
        self.engine.load(serde_json::from_str(&text)?)?;
        self.engine.findings().put_back(events);
        Ok(())
    }

    /// Everybody goes about their business until then. Time goes on.
    pub fn run(&mut self, until: f64) {
        loop {
            let rate = self.rate * season(self.now) * self.crowd;
            let gap = self.random.gap(rate);
            if self.now + gap >= until {
                self.now = self.now.max(until);
                self.engine.tick(self.now as u64);
                return;
            }
            self.now += gap;
            self.step(rate);
        }
    }

    fn step(&mut self, rate: f64) {
        match self.random.below(1_000) {
            0..20 => return self.send(at::HEALTH, 1, None, |x| x.client = Peer::Ip(([10, 0, 0, 1], 4_000).into())),
            20..120 => {
                let invoice = 1 + self.random.below(3 * self.newest);
                let workload = self.random.below(2);
                let place = if self.random.chance(0.7) { at::INVOICE } else { at::CHARGE };
                return self.send(place, 9_000_000_000 + workload, (place == at::INVOICE).then_some(invoice), |_| {});
            }
            _ => {}
        }
        let wanted = ((rate * 20.0) as usize).max(3);
        if self.sessions.len() < wanted {
            self.sessions.push((0, 0));
        } else if self.sessions.len() > wanted + 4 {
            let at = self.random.below(self.sessions.len() as u64) as usize;
            self.sessions.swap_remove(at);
        }
        let at = self.random.below(self.sessions.len() as u64) as usize;
        if self.sessions[at].1 == 0 {
            let user = if self.random.chance(self.new) {
                self.newest += 1;
                self.newest
            } else {
                1 + self.random.below(self.newest)
            };
            self.sessions[at] = (user, 2 + self.random.below(10) as u32);
            let wrong = self.random.chance(0.06);
            return self.send(at::LOGIN, user, None, |x| x.status = if wrong { 401 } else { 200 });
        }
        self.sessions[at].1 -= 1;
        let user = self.sessions[at].0;
        let draw = self.random.below(100);
        match draw {
            0..40 => {
                for _ in 0..self.chatty.div_ceil(2) {
                    self.send(at::CUSTOMER, user, Some(user), |_| {});
                }
            }
            40..60 => self.send(at::ORDER, user, Some(user * 2 + draw % 2), |_| {}),
            60..85 => {
                let product = 1 + self.random.below(30_000);
                self.send(at::PRODUCTS, user, Some(product), |_| {});
            }
            85..90 => self.send(at::BUY, user, None, |_| {}),
            _ => {
                let file = 1 + self.random.below(200_000);
                self.send(at::FILE, user, Some(file), |_| {});
            }
        }
    }
}
