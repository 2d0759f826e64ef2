//! Findings from metadata alone: what a principal, an endpoint or a source does that it should not, or
//! never did. Plain functions over exchanges, with time as an argument: the same exchanges give the same
//! findings, live, in a replay and in a simulation.
//!
//! **Invariants**: detectors see exchanges and keyed hashes of path parameters ([`Params`]), never bytes
//! or raw ids. Everything that grows has a bound here or in its detector's file. A baseline learns nothing
//! while a finding covers it.
//!
//! Measured: routes, patterns and all detectors take 5,040 instructions an exchange and miss a cache of 512 KiB 53 times
//! (callgrind, on what the benchmark does), and 275,000 to 342,000 exchanges a second on one virtual core of an AMD EPYC
//! whose speed varies from run to run (95 % interval of `cargo bench -p apiscope --bench detect`): no detector has a tenth
//! of the instructions; the rest is memory that is not in the cache, the state of 20,000 principals in each detector.
//! At 2,000 endpoints and 50,000 principals the detectors hold 41 MB, and no more after 400,000 principals that come
//! once (`cargo test -p apiscope --test flood -- --nocapture`). Weeks without an attack give 0.49 false alarms a service
//! and month (`apiscope simulate benign`, seeds 1 and 2).
//!
//! One file per detector, from D1 in `unauthenticated` to D21 in `egress`; each says in its [`Rule`] what it looks at,
//! how it decides, where that comes from, what it costs and where it is blind. [`rules`] lists them. Only the server's side is judged
//! (a client on the same node would be the same request twice), but for egress.

mod drift;
mod egress;
mod enumeration;
mod extraction;
pub mod finding;
mod keep;
mod method_misuse;
mod new_caller;
mod new_endpoint;
mod new_network;
pub mod ocsf;
mod off_hours;
mod open_endpoint;
mod pollution;
mod scanning;
mod sequence;
mod sharing;
mod single_purpose;
pub mod sketch;
mod slots;
mod slow_leak;
mod stuffing;
mod transport;
mod unauthenticated;
mod walk;
mod zombie;

use std::{cell::Cell, net::IpAddr, sync::Arc};

use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

pub use finding::{About, Change, Event, Finding, Findings, Rule, Setting, Severity, Sighting, State};
use slots::{Slot, Slots};

use crate::{
    config,
    exchange::{Exchange, Method, Peer, Side},
    params::Params,
};

/// Principals that are told apart on a node.
pub const MAX_PRINCIPALS: usize = 50_000;
/// Sources (addresses; of IPv6 the /64) that are told apart on a node: as many as principals, who may each have one.
pub const MAX_SOURCES: usize = MAX_PRINCIPALS;

/// Services that a detector tells apart.
const MAX_SERVICES: usize = 4_096;

/// Words in the routes of endpoints where people log in.
const LOGIN: [&str; 13] = [
    "login", "signin", "token", "oauth", "oauth2", "auth", "session", "sessions", "password", "sso", "otp", "register",
    "signup",
];
/// Words in the routes of endpoints that monitors ask.
const PROBE: [&str; 11] =
    ["health", "healthz", "livez", "readyz", "ready", "live", "ping", "metrics", "status", "favicon.ico", "robots.txt"];

/// Endpoints that are remembered over a restart.
const MAX_REMEMBERED: usize = 10_000;

/// What detectors know of an endpoint.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Service.
    pub service: Arc<str>,
    /// End that was seen.
    pub side: Side,
    /// Method.
    pub method: Method,
    /// Route.
    pub route: Arc<str>,
    /// Hash of these, the same on every node and day.
    pub hash: u64,
    /// Seconds since the epoch.
    pub first_seen: u64,
    /// Seconds since the epoch.
    pub last_seen: u64,
    /// Exchanges.
    pub requests: u64,
    /// Its path names an object.
    pub has_object: bool,
    /// Its name says that people log in here.
    pub login: bool,
    /// Its name says that monitors ask here.
    pub probe: bool,
}

/// One exchange with what was worked out of it.
pub struct Context<'a> {
    /// The exchange.
    pub x: &'a Exchange,
    /// Seconds since the epoch; never goes back.
    pub now: u64,
    /// Number of its endpoint.
    pub at: usize,
    /// Its endpoint.
    pub endpoint: &'a Endpoint,
    /// Its path parameters.
    pub params: &'a Params,
    /// Who: the principal, or else address and user agent. A refused credential names nobody.
    pub actor: u64,
    /// The actor has a credential that was not refused.
    pub named: bool,
    /// Where the state of the actor is.
    pub principal: Slot,
    /// The address it came from (of IPv6 the /64).
    pub source: u64,
    /// Where the state of the source is.
    pub origin: Slot,
    /// Answered below 400.
    pub success: bool,
    /// 401 or 403.
    pub refused: bool,
    /// The actor is known to read many objects here: a batch job, support.
    pub bulk: Cell<bool>,
    /// It is taken for one only because the endpoint is new.
    pub presumed: Cell<bool>,
    /// The actor read more than 20 objects here in this hour.
    pub beyond: Cell<bool>,
}

impl<'a> Context<'a> {
    /// A finding about this endpoint.
    #[must_use]
    pub fn here(&'a self) -> About<'a> {
        About { endpoint: Some((self.at, self.endpoint)), actor: None, context: Some(self), now: self.now }
    }

    /// A finding about this actor at this endpoint.
    #[must_use]
    pub fn actor_here(&'a self) -> About<'a> {
        About { actor: Some(self.actor), ..self.here() }
    }

    /// A finding about this actor, wherever it is.
    #[must_use]
    pub fn actor_anywhere(&'a self) -> About<'a> {
        About { endpoint: None, ..self.actor_here() }
    }

    /// A finding about the source of this exchange, wherever it goes.
    #[must_use]
    pub fn source_anywhere(&'a self) -> About<'a> {
        About { endpoint: None, actor: Some(self.source), ..self.here() }
    }

    /// How a sentence calls the actor.
    #[must_use]
    pub fn who(&self) -> String {
        match &self.x.principal {
            Some(p) => format!("principal {p}"),
            None => format!("the caller at {}", self.x.client.host()),
        }
    }

    /// How a sentence calls the endpoint.
    #[must_use]
    pub fn where_(&self) -> String {
        name(self.endpoint)
    }
}

/// How a sentence calls an endpoint.
#[must_use]
pub fn name(endpoint: &Endpoint) -> String {
    format!("{} {} of {}", endpoint.method, endpoint.route, endpoint.service)
}

/// Time passes.
pub struct Clock<'a> {
    /// Seconds since the epoch.
    pub now: u64,
    /// All endpoints.
    pub endpoints: &'a [Endpoint],
}

/// How far a detector is with an endpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum Readiness {
    /// It would see it.
    Armed {
        /// Smallest leak that it would find, records an hour, where that can be said.
        #[serde(skip_serializing_if = "Option::is_none")]
        minimum_per_hour: Option<f64>,
        /// Within this time, s.
        #[serde(skip_serializing_if = "Option::is_none")]
        within_s: Option<f64>,
    },
    /// It learns.
    Learning {
        /// How far: 0 to 1.
        progress: f64,
    },
    /// It cannot see it.
    Blind {
        /// Why.
        why: String,
    },
}

impl Readiness {
    const ARMED: Self = Self::Armed { minimum_per_hour: None, within_s: None };

    /// Armed once `done` reaches `needed`.
    fn after(done: f64, needed: f64) -> Self {
        if done >= needed {
            Self::ARMED
        } else {
            Self::Learning { progress: (done / needed.max(1e-9)).clamp(0.0, 1.0) }
        }
    }

    fn blind(why: &str) -> Self {
        Self::Blind { why: why.into() }
    }
}

/// One rule at work.
pub trait Detector: Send {
    /// What it is.
    fn rule(&self) -> &'static Rule;
    /// Sees an exchange.
    fn observe(&mut self, context: &Context<'_>, out: &mut Findings);
    /// Called when a minute has passed, once for as many as it were.
    fn minute(&mut self, clock: &Clock<'_>, out: &mut Findings) {
        let _ = (clock, out);
    }
    /// How far it is with an endpoint.
    fn readiness(&self, at: usize, clock: &Clock<'_>) -> Readiness;
    /// Bytes that its state uses, about.
    fn bytes(&self) -> usize;
    /// What it has learned of an endpoint, to be kept over a restart.
    fn save(&self, at: usize) -> Option<serde_json::Value> {
        let _ = at;
        None
    }
    /// Takes what [`Detector::save`] gave.
    fn load(&mut self, at: usize, learned: &serde_json::Value) {
        let _ = (at, learned);
    }
    /// What it has learned of the node as a whole, to be kept over a restart.
    fn save_node(&self) -> Option<serde_json::Value> {
        None
    }
    /// Takes what [`Detector::save_node`] gave.
    fn load_node(&mut self, learned: &serde_json::Value) {
        let _ = learned;
    }
    /// What it has learned of principals, given by their slots, to be kept over a restart.
    fn save_principals(&self, slots: &[usize]) -> Option<serde_json::Value> {
        let _ = slots;
        None
    }
    /// Takes what [`Detector::save_principals`] gave, for the principals in the first slots.
    fn load_principals(&mut self, learned: &serde_json::Value) {
        let _ = learned;
    }
}

/// The settings of one rule.
pub struct Settings<'a>(&'a config::Detect, &'static Rule);

impl Settings<'_> {
    /// A number that was configured, or its default.
    #[must_use]
    pub fn get(&self, name: &str) -> f64 {
        let configured = self.0.thresholds.get(&format!("{}.{name}", self.1.id)).copied();
        configured.or_else(|| self.1.settings.iter().find(|s| s.name == name).map(|s| s.default)).unwrap_or(0.0)
    }
}

/// Every rule, in order.
#[must_use]
pub fn rules() -> Vec<&'static Rule> {
    let mut rules: Vec<_> = detectors(&config::Detect::default()).iter().map(|d| d.rule()).collect();
    rules.sort_by_key(|r| r.id[1..].parse::<u32>().unwrap_or(0));
    rules
}

fn detectors(config: &config::Detect) -> Vec<Box<dyn Detector>> {
    let with = |rule| Settings(config, rule);
    vec![
        // Enumeration first: it tells the others who is known to read much.
        Box::new(enumeration::Enumeration::new(&with(&enumeration::RULE))),
        Box::new(walk::Walk::new(&with(&walk::RULE))),
        Box::new(slow_leak::SlowLeak::new(&with(&slow_leak::RULE))),
        Box::new(unauthenticated::Unauthenticated::new(&with(&unauthenticated::RULE))),
        Box::new(open_endpoint::OpenEndpoint::new(&with(&open_endpoint::RULE))),
        Box::new(stuffing::Stuffing::new(&with(&stuffing::RULE))),
        Box::new(extraction::Extraction::new(&with(&extraction::RULE))),
        Box::new(single_purpose::SinglePurpose::new(&with(&single_purpose::RULE))),
        Box::new(new_endpoint::NewEndpoint::new(&with(&new_endpoint::RULE))),
        Box::new(zombie::Zombie::new(&with(&zombie::RULE))),
        Box::new(new_caller::NewCaller::new(&with(&new_caller::RULE))),
        Box::new(transport::Transport::new(&with(&transport::RULE))),
        Box::new(drift::Drift::new(&with(&drift::RULE))),
        Box::new(scanning::Scanning::new(&with(&scanning::RULE))),
        Box::new(method_misuse::MethodMisuse::new(&with(&method_misuse::RULE))),
        Box::new(new_network::NewNetwork::new(&with(&new_network::RULE))),
        Box::new(off_hours::OffHours::new(&with(&off_hours::RULE))),
        Box::new(sequence::Sequence::new(&with(&sequence::RULE))),
        Box::new(sharing::Sharing::new(&with(&sharing::RULE))),
        Box::new(pollution::Pollution::new(&with(&pollution::RULE))),
        Box::new(egress::Egress::new(&with(&egress::RULE))),
    ]
}

/// Readiness of every detector for one endpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Coverage {
    /// Service.
    pub service: String,
    /// Method.
    pub method: String,
    /// Route.
    pub route: String,
    /// Smallest leak that any armed detector would find, records an hour.
    pub minimum_leak_per_hour: Option<f64>,
    /// By rule.
    pub detectors: std::collections::BTreeMap<String, Readiness>,
}

/// What is kept of an endpoint over a restart.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Remembered {
    hash: u64,
    first_seen: u64,
    requests: u64,
    learned: std::collections::BTreeMap<String, serde_json::Value>,
}

/// Version of what [`Engine::save`] gives.
const VERSION: u64 = 2;

/// What is kept over a restart.
#[derive(Deserialize, Serialize)]
struct File {
    version: u64,
    endpoints: Vec<Remembered>,
    /// By rule.
    node: std::collections::BTreeMap<String, serde_json::Value>,
    /// Who there is, and by rule.
    principals: std::collections::BTreeMap<String, serde_json::Value>,
    findings: serde_json::Value,
}

/// The key under which [`File::principals`] says who there is.
const WHO: &str = "who";

/// All detectors of a node.
pub struct Engine {
    endpoints: Vec<Endpoint>,
    detectors: Vec<Box<dyn Detector>>,
    findings: Findings,
    principals: Slots,
    sources: Slots,
    now: u64,
    minute: u64,
    /// What is known from before, by endpoint, until the endpoint comes.
    remembered: FxHashMap<u64, Remembered>,
}

impl Engine {
    /// With this configuration.
    ///
    /// # Errors
    /// A rule or a threshold has a name that no rule has; the nearest is named.
    pub fn new(config: &config::Detect) -> anyhow::Result<Self> {
        let mut findings = Findings::new(config.clone());
        let all = detectors(config);
        let known = |name: &str| all.iter().map(|d| d.rule()).find(|r| r.id == name || r.name == name);
        for name in &config.disable {
            match known(name) {
                Some(rule) => findings.disable(rule.id),
                None => anyhow::bail!(
                    "detect.disable has `{name}`: there is no such detector; they are listed by `apiscope findings --rules`"
                ),
            }
        }
        for name in config.thresholds.keys() {
            let names =
                || all.iter().flat_map(|d| d.rule().settings.iter().map(|s| format!("{}.{}", d.rule().id, s.name)));
            if !names().any(|n| n == *name) {
                let nearest = names().min_by_key(|n| strsim::damerau_levenshtein(n, name)).unwrap_or_default();
                anyhow::bail!("detect.thresholds has `{name}`: there is no such setting; did you mean `{nearest}`?");
            }
        }
        let detectors = all
            .into_iter()
            .filter(|d| !config.disable.iter().any(|n| n == d.rule().id || n == d.rule().name))
            .collect();
        Ok(Self {
            endpoints: Vec::new(),
            detectors,
            findings,
            principals: Slots::new(MAX_PRINCIPALS),
            sources: Slots::new(MAX_SOURCES),
            now: 0,
            minute: 0,
            remembered: FxHashMap::default(),
        })
    }

    /// Takes an exchange of the `at`th endpoint, whose numbers are given out in order from 0.
    pub fn observe(&mut self, x: &Exchange, at: usize, route: &Arc<str>, params: &Params) {
        let source = source(&x.client);
        let refused = matches!(x.status, 401 | 403);
        let named = x.principal.is_some() && !refused;
        let actor = match &x.principal {
            Some(p) if named => principal(p),
            _ => source ^ x.user_agent.as_deref().map_or(0, sketch::text),
        };
        self.observe_as(x, at, route, params, Identity { actor, source, named });
    }

    /// As [`Engine::observe`], with the identities worked out already.
    pub fn observe_as(&mut self, x: &Exchange, at: usize, route: &Arc<str>, params: &Params, who: Identity) {
        let now = x.ts / 1_000_000_000;
        if now > self.now {
            self.now = now;
            if now / 60 > self.minute {
                self.pass(now);
            }
        }
        // Numbers may come out of order: what is between is described when it comes.
        if self.endpoints.get(at).is_none_or(|e| e.requests == 0) {
            let endpoint = self.describe(x, route);
            self.endpoints.resize_with((at + 1).max(self.endpoints.len()), || endpoint.clone());
            if let Some(known) = self.remembered.remove(&endpoint.hash) {
                for detector in &mut self.detectors {
                    if let Some(learned) = known.learned.get(detector.rule().id) {
                        detector.load(at, learned);
                    }
                }
                self.endpoints[at] =
                    Endpoint { first_seen: known.first_seen.min(self.now), requests: known.requests, ..endpoint };
            } else {
                self.endpoints[at] = endpoint;
            }
        }
        let Some(endpoint) = self.endpoints.get_mut(at) else { return };
        if !Arc::ptr_eq(&endpoint.route, route) {
            // Routes get other names as more is learned.
            endpoint.route = route.clone();
        }
        endpoint.requests += 1;
        endpoint.last_seen = self.now;
        endpoint.has_object |= !params.is_empty();
        let context = Context {
            x,
            now: self.now,
            at,
            endpoint,
            params,
            actor: who.actor,
            named: who.named,
            principal: self.principals.visit(who.actor, self.now),
            source: who.source,
            origin: self.sources.visit(who.source, self.now),
            success: (100..400).contains(&x.status),
            refused: matches!(x.status, 401 | 403),
            bulk: Cell::new(false),
            presumed: Cell::new(false),
            beyond: Cell::new(false),
        };
        for detector in &mut self.detectors {
            detector.observe(&context, &mut self.findings);
        }
    }

    /// Time passes without exchanges.
    pub fn tick(&mut self, now: u64) {
        if now > self.now {
            self.now = now;
            if now / 60 > self.minute {
                self.pass(now);
            }
        }
    }

    fn pass(&mut self, now: u64) {
        self.minute = now / 60;
        let clock = Clock { now, endpoints: &self.endpoints };
        for detector in &mut self.detectors {
            detector.minute(&clock, &mut self.findings);
        }
        self.findings.sweep(now);
    }

    fn describe(&self, x: &Exchange, route: &Arc<str>) -> Endpoint {
        let words = route.to_ascii_lowercase();
        let has = |names: &[&str]| words.split(['/', '-', '_', '.']).any(|w| names.contains(&w));
        let hash = sketch::mix(sketch::text(&x.service))
            ^ sketch::mix(sketch::text(route)).rotate_left(7)
            ^ sketch::mix(sketch::text(x.method.as_str())).rotate_left(13)
            ^ (x.side as u64);
        Endpoint {
            service: x.service.clone(),
            side: x.side,
            method: x.method.clone(),
            route: route.clone(),
            hash,
            first_seen: self.now,
            last_seen: self.now,
            requests: 0,
            has_object: false,
            login: has(&LOGIN),
            probe: has(&PROBE),
        }
    }

    /// What was learned, to be kept over a restart: hashes of names, numbers, and the open findings as they are.
    #[must_use]
    pub fn save(&self) -> serde_json::Value {
        let id = |d: &dyn Detector| d.rule().id.to_owned();
        let of = |(at, e): (usize, &Endpoint)| Remembered {
            hash: e.hash,
            first_seen: e.first_seen,
            requests: e.requests,
            learned: self.detectors.iter().filter_map(|d| Some((id(&**d), d.save(at)?))).collect(),
        };
        let mut endpoints: Vec<_> = self.endpoints.iter().enumerate().filter(|(_, e)| e.requests > 0).map(of).collect();
        endpoints.extend(self.remembered.values().cloned());
        let proven = self.principals.proven();
        let mut principals: std::collections::BTreeMap<_, _> =
            self.detectors.iter().filter_map(|d| Some((id(&**d), d.save_principals(&proven)?))).collect();
        principals.insert(WHO.into(), self.principals.save(&proven));
        let node = self.detectors.iter().filter_map(|d| Some((id(&**d), d.save_node()?))).collect();
        let file = File { version: VERSION, endpoints, node, principals, findings: self.findings.save() };
        serde_json::to_value(file).unwrap_or_default()
    }

    /// Takes what [`Engine::save`] gave, before the first exchange; says how many endpoints it knows now.
    ///
    /// # Errors
    /// It is of another version, or no such thing; nothing is taken then.
    pub fn load(&mut self, learned: serde_json::Value) -> anyhow::Result<usize> {
        let version = learned.get("version").and_then(serde_json::Value::as_u64);
        anyhow::ensure!(
            version == Some(VERSION),
            "they are of version {}, this agent has version {VERSION}",
            version.map_or_else(|| "none".into(), |v| v.to_string())
        );
        let file: File = serde_json::from_value(learned)?;
        self.principals.load(file.principals.get(WHO));
        for detector in &mut self.detectors {
            let id = detector.rule().id;
            file.principals.get(id).into_iter().for_each(|p| detector.load_principals(p));
            file.node.get(id).into_iter().for_each(|n| detector.load_node(n));
        }
        self.findings.load(file.findings, |id| self.detectors.iter().map(|d| d.rule()).find(|r| r.id == id));
        self.remembered = file.endpoints.into_iter().take(MAX_REMEMBERED).map(|e| (e.hash, e)).collect();
        Ok(self.remembered.len())
    }

    /// An endpoint by its number.
    #[must_use]
    pub fn endpoint(&self, at: usize) -> Option<&Endpoint> {
        self.endpoints.get(at)
    }

    /// The findings.
    pub fn findings(&mut self) -> &mut Findings {
        &mut self.findings
    }

    /// Every finding that is kept.
    #[must_use]
    pub fn view(&self) -> Vec<Finding> {
        self.findings.view()
    }

    /// Which detectors are armed, learning or blind at each endpoint of the server's side.
    #[must_use]
    pub fn coverage(&self) -> Vec<Coverage> {
        let clock = Clock { now: self.now, endpoints: &self.endpoints };
        let served = self.endpoints.iter().enumerate().filter(|(_, e)| e.side == Side::Server && e.requests > 0);
        served
            .map(|(at, e)| {
                let detectors: std::collections::BTreeMap<_, _> =
                    self.detectors.iter().map(|d| (d.rule().id.to_owned(), d.readiness(at, &clock))).collect();
                let least = detectors.values().filter_map(|r| match r {
                    Readiness::Armed { minimum_per_hour, .. } => *minimum_per_hour,
                    _ => None,
                });
                Coverage {
                    service: e.service.to_string(),
                    method: e.method.as_str().into(),
                    route: e.route.to_string(),
                    minimum_leak_per_hour: least.min_by(f64::total_cmp),
                    detectors,
                }
            })
            .collect()
    }

    /// Bytes that the detectors' state uses, about, by detector.
    #[must_use]
    pub fn bytes(&self) -> Vec<(&'static str, usize)> {
        let mut bytes: Vec<_> = self.detectors.iter().map(|d| (d.rule().id, d.bytes())).collect();
        bytes.push(("principals", self.principals.len() * 32));
        bytes.push(("sources", self.sources.len() * 32));
        bytes
    }
}

/// Who an exchange comes from, as numbers.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// See [`Context::actor`].
    pub actor: u64,
    /// See [`Context::source`].
    pub source: u64,
    /// See [`Context::named`].
    pub named: bool,
}

/// A principal as a number: its own when it is a keyed hash of ours, else a hash of its text.
#[must_use]
pub fn principal(text: &str) -> u64 {
    hex(text.as_bytes()).unwrap_or_else(|| sketch::mix(sketch::text(text)))
}

/// 16 hexadecimal digits; without a branch for each, for this is asked of every exchange.
fn hex(text: &[u8]) -> Option<u64> {
    let digits: &[u8; 16] = text.try_into().ok()?;
    let (mut value, mut valid) = (0, true);
    for &digit in digits {
        valid &= digit.is_ascii_hexdigit();
        // The low half of a letter is 1 to 6 in either case.
        value = value << 4 | u64::from((digit & 15) + 9 * (digit >> 6));
    }
    valid.then_some(value)
}

/// An address as a number: of IPv6 the /64, which is what one subscriber gets.
#[must_use]
pub fn source(peer: &Peer) -> u64 {
    match peer {
        Peer::Ip(a) => match a.ip() {
            IpAddr::V4(v4) => sketch::mix(u64::from(v4.to_bits())),
            IpAddr::V6(v6) => sketch::mix((v6.to_bits() >> 64) as u64 ^ 6),
        },
        Peer::Unix(_) => 1,
        Peer::Unknown => 0,
    }
}

/// An address of the internet: neither private, shared (RFC 6598), loopback nor link-local.
#[must_use]
pub fn is_public(peer: &Peer) -> bool {
    let Peer::Ip(address) = peer else { return false };
    match address.ip() {
        IpAddr::V4(v4) => {
            let [a, b, ..] = v4.octets();
            !(v4.is_private()
                || v4.is_loopback()
                || v4.is_link_local()
                || v4.is_unspecified()
                || (a == 100 && (64..128).contains(&b)))
        }
        IpAddr::V6(v6) => {
            !(v6.is_loopback() || v6.is_unspecified() || v6.is_unique_local() || v6.is_unicast_link_local())
        }
    }
}

/// The value of a vector at `at`, which grows as needed.
fn entry<T: Default>(list: &mut Vec<T>, at: usize) -> &mut T {
    if at >= list.len() {
        list.resize_with(at + 1, T::default);
    }
    &mut list[at]
}
