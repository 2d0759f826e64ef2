//! A mobile operator's day: customers who look at their own records in sessions, with hours and weekdays,
//! new customers, support staff, a nightly export, monitors. The background of simulations.

use std::sync::Arc;

use super::random::Random;
use crate::{
    detect::{Engine, Identity, sketch::mix},
    exchange::{Auth, Exchange, Method, Peer, Scheme, TlsVersion},
    params::{ParamHasher, Params},
};

/// Customers at the start. Ids are given out in order.
pub const CUSTOMERS: u64 = 110_000_000;
/// Monday, 7 November 2022, 00:00 UTC.
pub const MONDAY: u64 = 1_667_779_200;
/// The endpoint that leaks.
pub const TARGET: usize = 0;

/// Seconds between two requests of a session, on average.
const THINK: f64 = 30.0;
/// Support people.
const SUPPORT: u64 = 40;
/// Ids that the nightly export reads, and its rate a second.
const EXPORT: (u64, f64) = (20_000, 8.0);

const ATTACKER: u64 = 0xa77a_c4e7;
const SUPPORT_KEY: u64 = 0x0509_90e7;
const LOGIN_KEY: u64 = 0x0001_0614;

/// An attacker's principal.
#[must_use]
pub fn attacker_id(who: u64) -> u64 {
    mix(who ^ ATTACKER)
}

/// How the agent calls an attacker.
#[must_use]
pub fn attacker(who: u64) -> String {
    format!("{:016x}", attacker_id(who))
}

/// Kinds of ids in paths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ids {
    /// Numbers given out in order.
    Number,
    /// Random UUIDs.
    Uuid,
}

struct Endpoint {
    method: Method,
    route: Arc<str>,
    auth: Auth,
    bytes: u64,
}

struct Session {
    customer: u64,
    left: u32,
}

/// The background: a stream of exchanges in order of time.
pub struct World {
    random: Random,
    hasher: ParamHasher,
    ids: Ids,
    rate: f64,
    sessions: Vec<Session>,
    /// Seconds since the epoch.
    now: f64,
    /// The highest customer id.
    newest: u64,
    export_next: Option<(u64, f64)>,
    endpoints: Vec<Endpoint>,
    exchange: Exchange,
}

/// Customers a second, as a factor of the mean, by hour of the day.
#[must_use]
pub fn season(now: f64) -> f64 {
    const HOURS: [f64; 24] = [
        0.35, 0.22, 0.15, 0.12, 0.14, 0.25, 0.5, 0.85, 1.15, 1.35, 1.4, 1.4, 1.45, 1.4, 1.35, 1.35, 1.4, 1.5, 1.6,
        1.65, 1.6, 1.4, 1.0, 0.6,
    ];
    let hours = now / 3600.0;
    let at = hours as usize;
    let (a, b) = (HOURS[at % 24], HOURS[(at + 1) % 24]);
    let weekday = ((now - MONDAY as f64) / 86_400.0) as u64 % 7;
    (a + (b - a) * hours.fract()) * if weekday >= 5 { 0.8 } else { 1.08 } / 1.006
}

impl World {
    /// With this many requests a second on average.
    #[must_use]
    pub fn new(rate: f64, ids: Ids, seed: u64, start: u64) -> Self {
        let endpoint = |method, route: &str, auth, bytes| Endpoint { method, route: route.into(), auth, bytes };
        Self {
            random: Random::new(seed, 1),
            hasher: ParamHasher::new([7; 16]),
            ids,
            rate,
            sessions: Vec::new(),
            now: start as f64,
            newest: CUSTOMERS,
            export_next: None,
            endpoints: vec![
                endpoint(
                    Method::Get,
                    if ids == Ids::Uuid { "/v1/customers/{uuid}" } else { "/v1/customers/{int}" },
                    Auth::Bearer,
                    1_450,
                ),
                endpoint(Method::Get, "/v1/orders/{int}", Auth::Bearer, 900),
                endpoint(Method::Post, "/v1/login", Auth::None, 640),
                endpoint(Method::Get, "/v1/plans", Auth::Bearer, 5_200),
                endpoint(Method::Get, "/healthz", Auth::None, 15),
            ],
            exchange: Exchange {
                service: "accounts".into(),
                scheme: Scheme::Https,
                tls_version: Some(TlsVersion::Tls13),
                server: Peer::parse("10.0.0.5:443"),
                ..Exchange::default()
            },
        }
    }

    /// The parameters of a customer's path.
    #[must_use]
    pub fn params(&self, customer: u64) -> Params {
        let mut params = self.hasher.number(customer);
        if self.ids == Ids::Uuid {
            params = params.opaque();
        }
        params
    }

    /// From 02:00 on the export reads a stretch of ids; a new one each night.
    fn export(&mut self, engine: &mut Engine) {
        let day = (self.now / 86_400.0) as u64;
        let (next, at) = self.export_next.get_or_insert((0, (day * 86_400 + 7_200) as f64));
        if self.now < *at {
            return;
        }
        let id = 1 + (day * EXPORT.0 + *next) % CUSTOMERS;
        *next += 1;
        *at += 1.0 / EXPORT.1;
        if *next >= EXPORT.0 {
            (*next, *at) = (0, ((day + 1) * 86_400 + 7_200) as f64);
        }
        let params = self.params(id);
        self.send(TARGET, params, 0xba7c_4000, 0x0a00_0002, true, engine);
    }

    fn office(&self) -> bool {
        let (hour, day) = ((self.now / 3600.0) as u64 % 24, ((self.now - MONDAY as f64) / 86_400.0) as u64 % 7);
        (8..18).contains(&hour) && day < 5
    }

    fn send(&mut self, at: usize, params: Params, actor: u64, source: u64, named: bool, engine: &mut Engine) {
        let endpoint = &self.endpoints[at];
        let x = &mut self.exchange;
        x.ts = (self.now * 1e9) as u64;
        if x.method != endpoint.method {
            x.method = endpoint.method.clone();
        }
        x.auth = endpoint.auth;
        let noise = self.random.below(256);
        x.status = if noise == 0 && named { 404 } else { 200 };
        x.response_bytes = endpoint.bytes + noise;
        x.duration_ns = 4_000_000 + noise * 20_000;
        x.client = Peer::Ip(([100, 64, (source >> 8) as u8, source as u8], 40_000).into());
        engine.observe_as(x, at, &endpoint.route, &params, Identity { actor, source: mix(source), named });
    }
}

impl super::Background for World {
    fn step(&mut self, until: f64, engine: &mut Engine) -> bool {
        let rate = self.rate * season(self.now);
        let gap = self.random.gap(rate);
        if self.now + gap >= until {
            // Without memory: what was waited for so far changes nothing.
            self.now = self.now.max(until);
            return false;
        }
        self.now += gap;
        self.export(engine);
        let kind = self.random.below(1_000);
        if kind < 10 {
            self.send(4, Params::default(), 0x5eed_0001, 1, false, engine);
            return true;
        }
        if kind < 14 && self.office() {
            let who = self.random.below(SUPPORT);
            let customer = 1 + self.random.below(self.newest);
            let params = self.params(customer);
            self.send(TARGET, params, mix(who ^ SUPPORT_KEY), 0x0a00_0100 + who, true, engine);
            return true;
        }
        let wanted = ((rate * THINK) as usize).max(4);
        if self.sessions.len() < wanted {
            self.sessions.push(Session { customer: 0, left: 0 });
        } else if self.sessions.len() > wanted + 8 {
            let at = self.random.below(self.sessions.len() as u64) as usize;
            self.sessions.swap_remove(at);
        }
        let at = self.random.below(self.sessions.len() as u64) as usize;
        if self.sessions[at].left == 0 {
            let customer = if self.random.chance(0.01) {
                self.newest += 1;
                self.newest
            } else {
                1 + self.random.below(self.newest)
            };
            // 2 to 14 requests, 8 on average.
            self.sessions[at] = Session { customer, left: 2 + self.random.below(13) as u32 };
            self.send(2, Params::default(), mix(customer ^ LOGIN_KEY), mix(customer), false, engine);
            return true;
        }
        let session = &mut self.sessions[at];
        session.left -= 1;
        let customer = session.customer;
        let (endpoint, params) = match self.random.below(100) {
            0..60 => (TARGET, self.params(customer)),
            60..80 => {
                let order = customer * 3 + self.random.below(3);
                (1, self.hasher.number(order))
            }
            _ => (3, Params::default()),
        };
        self.send(endpoint, params, mix(customer), mix(customer) >> 8, true, engine);
        true
    }

    fn attack(&mut self, now: f64, customer: u64, who: u64, engine: &mut Engine) {
        let params = self.params(customer);
        let actor = mix(who ^ ATTACKER);
        let endpoint = &self.endpoints[TARGET];
        let x = Exchange {
            ts: (now * 1e9) as u64,
            auth: Auth::Bearer,
            status: 200,
            method: endpoint.method.clone(),
            principal: Some(format!("{actor:016x}").into()),
            response_bytes: endpoint.bytes,
            duration_ns: 6_000_000,
            client: Peer::Ip(([203, 0, (who >> 8) as u8, who as u8], 50_000).into()),
            ..self.exchange.clone()
        };
        engine.observe_as(
            &x,
            TARGET,
            &endpoint.route,
            &params,
            Identity { actor, source: mix(who ^ 0xbad), named: true },
        );
    }

    fn now(&self) -> f64 {
        self.now
    }

    fn target(&self) -> usize {
        TARGET
    }

    fn space(&self) -> u64 {
        CUSTOMERS
    }

    fn rate(&self) -> f64 {
        self.rate
    }
}
