//! D16: a principal that comes from elsewhere.

use super::{
    Clock, Context, Detector, Findings, MAX_PRINCIPALS, Readiness, Rule, Setting, Settings, Severity, Sighting, entry,
    keep::{self, Packed, Words},
};
use crate::exchange::{Peer, Side};

/// D16.
pub static RULE: Rule = Rule {
    id: "D16",
    name: "new-network",
    title: "An internal credential is used from outside",
    owasp: &["API2:2023"],
    attack: &["T1078", "T1528"],
    signal: "class of the address of a principal: loopback, private, shared (RFC 6598), public",
    algorithm: "a success from a public address of a principal that was seen for 7 days and 100 requests in private \
        networks only",
    source: "RFC 1918, RFC 6598, RFC 4193",
    memory: "12 bytes a principal (50,000)",
    blind: "moves within the internet: there is no database of networks; proxies that hide addresses",
    settings: &[
        Setting { name: "learn_days", default: 7.0, about: "days that a principal was seen" },
        Setting { name: "requests", default: 100.0, about: "requests of it" },
    ],
};

#[derive(Default, Clone, Copy)]
struct Zone {
    first: u32,
    requests: u32,
    public: bool,
}

/// D16.
pub struct NewNetwork {
    learn: u64,
    requests: u32,
    zones: Vec<Zone>,
}

impl NewNetwork {
    /// With these settings.
    pub fn new(settings: &Settings<'_>) -> Self {
        Self {
            learn: (settings.get("learn_days") * 86_400.0) as u64,
            requests: settings.get("requests") as u32,
            zones: Vec::new(),
        }
    }
}

impl Packed for Zone {
    const WORDS: usize = 3;
    fn pack(&self, out: &mut Vec<u32>) {
        out.extend([self.first, self.requests, u32::from(self.public)]);
    }
    fn unpack(w: &mut Words<'_>) -> Self {
        Self { first: w.word(), requests: w.word(), public: w.word() != 0 }
    }
}

impl Detector for NewNetwork {
    fn rule(&self) -> &'static Rule {
        &RULE
    }

    fn observe(&mut self, c: &Context<'_>, out: &mut Findings) {
        if !c.named || !c.success || c.endpoint.side != Side::Server || c.x.client == Peer::Unknown {
            return;
        }
        let minute = u32::try_from(c.now / 60).unwrap_or(0);
        let z = entry(&mut self.zones, c.principal.index);
        if c.principal.fresh {
            *z = Zone { first: minute, ..Zone::default() };
        }
        z.requests = z.requests.saturating_add(1);
        if z.public || !super::is_public(&c.x.client) {
            return;
        }
        let age = u64::from(minute.saturating_sub(z.first)) * 60;
        let known = z.requests > self.requests && age >= self.learn;
        z.public = true;
        if known && out.wants(&RULE, c.actor_anywhere()) {
            out.report(
                &RULE,
                c.actor_anywhere(),
                Sighting {
                    severity: Some(Severity::High),
                    confidence: 0.7,
                    observed: 1.0,
                    unit: "{request}",
                    evidence: vec![("days_internal", age as f64 / 86_400.0), ("requests_internal", f64::from(z.requests))],
                    explanation: format!(
                        "{} was used from private networks only for {:.0} days and now from {} at {}: an internal credential may have got out.",
                        c.who(),
                        age as f64 / 86_400.0,
                        c.x.client.host(),
                        c.endpoint.service
                    ),
                    ..Sighting::default()
                },
            );
        }
    }

    fn readiness(&self, _: usize, clock: &Clock<'_>) -> Readiness {
        let first = clock.endpoints.iter().map(|e| e.first_seen).min().unwrap_or(clock.now);
        Readiness::after(clock.now.saturating_sub(first) as f64, self.learn as f64)
    }

    fn save_principals(&self, slots: &[usize]) -> Option<serde_json::Value> {
        Some(keep::principals(&self.zones, slots))
    }

    fn load_principals(&mut self, learned: &serde_json::Value) {
        self.zones = keep::unlist(Some(learned), MAX_PRINCIPALS);
    }

    fn bytes(&self) -> usize {
        self.zones.capacity() * size_of::<Zone>()
    }
}
