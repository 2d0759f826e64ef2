//! D21: a service goes where it never went, or to the metadata address right after a request came in.

use rustc_hash::{FxHashMap, FxHashSet};

use super::{
    About, Clock, Context, Detector, Findings, MAX_SERVICES, Readiness, Rule, Setting, Settings, Severity, Sighting,
    entry,
    keep::{self, Words},
    sketch,
};
use crate::exchange::{Peer, Side};

/// D21.
pub static RULE: Rule = Rule {
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

/// Destinations of services that are remembered.
const MAX_DESTINATIONS: usize = 16_384;

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
        &RULE
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
            if !service.metadata && soon && out.wants(&RULE, c.here()) {
                out.report(
                    &RULE,
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
        if !super::is_public(&c.x.server) || self.destinations.len() >= MAX_DESTINATIONS {
            return;
        }
        let place = super::source(&c.x.server);
        let new = self.destinations.insert(*key ^ place);
        let about = About { actor: Some(place), ..c.here() };
        if new && age >= self.learn && out.wants(&RULE, about) {
            out.report(
                &RULE,
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
        self.destinations.extend(keep::unlist::<u64>(learned.get("destinations"), MAX_DESTINATIONS));
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
