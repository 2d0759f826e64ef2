//! D11 and D21: who calls whom. D11: a workload that never called this endpoint does. D21: a service goes
//! where it never went, or to the metadata address right after a request came in. Both learn the graph
//! that authorization drafts are made of.

use rustc_hash::{FxHashMap, FxHashSet};

use super::{
    About, Clock, Context, Detector, Findings, Readiness, Rule, Setting, Settings, Severity, Sighting, entry,
    keep::{self, Words},
    sketch,
};
use crate::exchange::{Peer, Side};

/// D11.
pub static CALLER: Rule = Rule {
    id: "D11",
    name: "new-caller",
    title: "A workload calls an endpoint that it never called",
    owasp: &["API5:2023"],
    attack: &["T1078", "T1210"],
    signal: "workload of the caller and endpoint of each success",
    algorithm: "the first success of a (workload, endpoint) after the service was watched for 7 days: medium when the \
        workload never called the service at all, low when it did",
    source: "first-seen sets",
    memory: "16 bytes an edge (16,384)",
    blind: "callers whose workload is not known; edges beyond the bound are taken as known",
    settings: &[Setting {
        name: "learn_days",
        default: 7.0,
        about: "days that a service is watched before anything is said",
    }],
};

/// D21.
pub static EGRESS: Rule = Rule {
    id: "D21",
    name: "unusual-egress",
    title: "A service goes where it never went",
    owasp: &["API7:2023", "API10:2023"],
    attack: &["T1552.005", "T1190", "T1071.001"],
    signal: "destinations of requests that a service sends, and requests that it got just before",
    algorithm: "the metadata address (169.254.169.254, fd00:ec2::254) within 2 s of a request that came in, when the \
        service did not ask it in its first 3 days: high. A public destination that is new after 7 days: low",
    source: "OWASP API7:2023 (server-side request forgery)",
    memory: "16 bytes a destination (16,384), 40 a service",
    blind: "destinations inside TLS of which only a proxy's address is seen",
    settings: &[Setting {
        name: "learn_days",
        default: 7.0,
        about: "days that a service is watched before a destination is new",
    }],
};

/// Edges that are kept.
const MAX_EDGES: usize = 16_384;
/// Services that are told apart.
const MAX_SERVICES: usize = 4_096;

/// D11.
pub struct NewCaller {
    learn: u64,
    edges: FxHashSet<u64>,
    /// By hash of the name: when it was first seen.
    services: FxHashMap<u64, u64>,
}

impl NewCaller {
    /// With these settings.
    pub fn new(settings: &Settings<'_>) -> Self {
        Self {
            learn: (settings.get("learn_days") * 86_400.0) as u64,
            edges: FxHashSet::default(),
            services: FxHashMap::default(),
        }
    }
}

impl Detector for NewCaller {
    fn rule(&self) -> &'static Rule {
        &CALLER
    }

    fn observe(&mut self, c: &Context<'_>, out: &mut Findings) {
        if c.endpoint.side != Side::Server || !c.success || c.endpoint.probe {
            return;
        }
        let Some(caller) = &c.x.caller else { return };
        let who = sketch::mix(sketch::text(caller));
        let edge = who ^ c.endpoint.hash;
        if self.edges.contains(&edge) || self.edges.len() + 2 > MAX_EDGES {
            return;
        }
        let service = sketch::text(&c.endpoint.service);
        if self.services.len() >= MAX_SERVICES && !self.services.contains_key(&service) {
            return;
        }
        let first = *self.services.entry(service).or_insert(c.now);
        self.edges.insert(edge);
        let stranger = self.edges.insert(who ^ sketch::mix(service).rotate_left(3));
        let known = c.now >= first + self.learn;
        let about = About { actor: Some(who), ..c.here() };
        if known && out.wants(&CALLER, about) {
            out.report(
                &CALLER,
                about,
                Sighting {
                    severity: Some(if stranger { Severity::Medium } else { Severity::Low }),
                    confidence: 0.6,
                    observed: 1.0,
                    unit: "{request}",
                    explanation: format!(
                        "{caller} called {} with success and never did before{}.",
                        c.where_(),
                        if stranger { ", nor anything else of this service" } else { "" }
                    ),
                    ..Sighting::default()
                },
            );
        }
    }

    fn readiness(&self, at: usize, clock: &Clock<'_>) -> Readiness {
        match clock.endpoints.get(at).and_then(|e| self.services.get(&sketch::text(&e.service))) {
            Some(first) => Readiness::after(clock.now.saturating_sub(*first) as f64, self.learn as f64),
            None => Readiness::blind("its callers' workloads are not known"),
        }
    }

    fn save_node(&self) -> Option<serde_json::Value> {
        let services: Vec<u64> = self.services.iter().flat_map(|(key, first)| [*key, *first]).collect();
        Some(serde_json::json!({ "edges": keep::list(&self.edges), "services": keep::list(&services) }))
    }

    fn load_node(&mut self, learned: &serde_json::Value) {
        self.edges.extend(keep::unlist::<u64>(learned.get("edges"), MAX_EDGES));
        for service in keep::words(learned.get("services")).chunks_exact(4).take(MAX_SERVICES) {
            let mut w = Words::new(service);
            self.services.insert(w.long(), w.time());
        }
    }

    fn bytes(&self) -> usize {
        self.edges.capacity() * 9 + self.services.capacity() * 17
    }
}

#[derive(Default, Clone, Copy)]
struct Service {
    first: u64,
    /// When a request came in last, ns.
    inbound: u64,
    metadata: bool,
}

/// D21.
pub struct Egress {
    learn: u64,
    services: FxHashMap<u64, Service>,
    destinations: FxHashSet<u64>,
    /// Key of the service of each endpoint.
    keys: Vec<u64>,
}

impl Egress {
    /// With these settings.
    pub fn new(settings: &Settings<'_>) -> Self {
        Self {
            learn: (settings.get("learn_days") * 86_400.0) as u64,
            services: FxHashMap::default(),
            destinations: FxHashSet::default(),
            keys: Vec::new(),
        }
    }
}

fn is_metadata(peer: &Peer) -> bool {
    match peer {
        Peer::Ip(a) => matches!(a.ip().to_string().as_str(), "169.254.169.254" | "fd00:ec2::254"),
        _ => false,
    }
}

impl Detector for Egress {
    fn rule(&self) -> &'static Rule {
        &EGRESS
    }

    fn observe(&mut self, c: &Context<'_>, out: &mut Findings) {
        let key = entry(&mut self.keys, c.at);
        if *key == 0 {
            *key = sketch::mix(sketch::text(&c.endpoint.service)) | 1;
        }
        if self.services.len() >= MAX_SERVICES && !self.services.contains_key(key) {
            return;
        }
        let service = self.services.entry(*key).or_insert(Service { first: c.now, ..Service::default() });
        if c.endpoint.side == Side::Server {
            service.inbound = c.x.ts;
            return;
        }
        let age = c.now.saturating_sub(service.first);
        let link_local = match &c.x.server {
            Peer::Ip(a) => matches!(a.ip(), std::net::IpAddr::V4(v4) if v4.is_link_local()) || a.ip().is_ipv6(),
            _ => return,
        };
        if link_local && is_metadata(&c.x.server) {
            if age < 3 * 86_400 {
                service.metadata = true;
            }
            let soon = c.x.ts.saturating_sub(service.inbound) < 2_000_000_000 && service.inbound > 0;
            if !service.metadata && soon && out.wants(&EGRESS, c.here()) {
                out.report(
                    &EGRESS,
                    c.here(),
                    Sighting {
                        severity: Some(Severity::High),
                        confidence: 0.8,
                        observed: 1.0,
                        unit: "{request}",
                        explanation: format!(
                            "{} asked the cloud's metadata address {:.1} s after a request came in and never did before: a caller may be making it fetch credentials.",
                            c.endpoint.service,
                            c.x.ts.saturating_sub(service.inbound) as f64 / 1e9
                        ),
                        ..Sighting::default()
                    },
                );
            }
            return;
        }
        if !super::is_public(&c.x.server) || self.destinations.len() >= MAX_EDGES {
            return;
        }
        let place = super::source(&c.x.server);
        let new = self.destinations.insert(*key ^ place);
        let about = About { actor: Some(place), ..c.here() };
        if new && age >= self.learn && out.wants(&EGRESS, about) {
            out.report(
                &EGRESS,
                about,
                Sighting {
                    severity: Some(Severity::Low),
                    confidence: 0.4,
                    observed: 1.0,
                    unit: "{request}",
                    explanation: format!(
                        "{} sent a request to {} and never did before.",
                        c.endpoint.service,
                        c.x.server.host()
                    ),
                    ..Sighting::default()
                },
            );
        }
    }

    fn readiness(&self, at: usize, clock: &Clock<'_>) -> Readiness {
        let first = self.keys.get(at).and_then(|k| self.services.get(k)).map_or(clock.now, |s| s.first);
        Readiness::after(clock.now.saturating_sub(first) as f64, self.learn as f64)
    }

    fn save_node(&self) -> Option<serde_json::Value> {
        let of = |(key, s): (&u64, &Service)| [*key, s.first, s.inbound, u64::from(s.metadata)];
        let services: Vec<u64> = self.services.iter().flat_map(of).collect();
        Some(serde_json::json!({ "destinations": keep::list(&self.destinations), "services": keep::list(&services) }))
    }

    fn load_node(&mut self, learned: &serde_json::Value) {
        self.destinations.extend(keep::unlist::<u64>(learned.get("destinations"), MAX_EDGES));
        for service in keep::words(learned.get("services")).chunks_exact(8).take(MAX_SERVICES) {
            let mut w = Words::new(service);
            let (key, first, inbound, metadata) = (w.long(), w.time(), w.long(), w.long() != 0);
            self.services.insert(key, Service { first, inbound, metadata });
        }
    }

    fn bytes(&self) -> usize {
        self.destinations.capacity() * 9 + self.services.capacity() * 40 + self.keys.capacity() * 8
    }
}
