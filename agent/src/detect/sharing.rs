//! D19: one principal in many places at once.

use std::net::IpAddr;

use super::{
    Clock, Context, Detector, Findings, MAX_PRINCIPALS, Readiness, Rule, Setting, Settings, Severity, Sighting, entry,
    keep::{self, Packed, Words},
    sketch,
};
use crate::exchange::{Peer, Side};

/// D19.
pub static RULE: Rule = Rule {
    id: "D19",
    name: "token-sharing",
    title: "One credential is used from many places",
    owasp: &["API2:2023"],
    attack: &["T1528", "T1539"],
    signal: "distinct public networks (/16, of IPv6 /32) and user agents of a principal in an hour",
    algorithm: "at least 12 networks with 4 user agents, and three times the principal's own highest hour",
    source: "64-bit linear counters (Whang et al. 1990)",
    memory: "24 bytes a principal (50,000)",
    blind: "carriers that spread one phone over less than 12 networks are no finding; proxies hide addresses",
    settings: &[
        Setting { name: "networks", default: 12.0, about: "networks in an hour" },
        Setting { name: "agents", default: 4.0, about: "user agents in an hour" },
    ],
};

#[derive(Default, Clone, Copy)]
struct Places {
    hour: u32,
    usual: u16,
    networks: u64,
    agents: u64,
}

/// D19.
pub struct Sharing {
    networks: f64,
    agents: f64,
    places: Vec<Places>,
}

impl Sharing {
    /// With these settings.
    pub fn new(settings: &Settings<'_>) -> Self {
        Self { networks: settings.get("networks"), agents: settings.get("agents"), places: Vec::new() }
    }
}

impl Packed for Places {
    const WORDS: usize = 6;
    fn pack(&self, out: &mut Vec<u32>) {
        out.extend([self.hour, u32::from(self.usual)]);
        keep::long(out, self.networks);
        keep::long(out, self.agents);
    }
    fn unpack(w: &mut Words<'_>) -> Self {
        Self { hour: w.word(), usual: w.word() as u16, networks: w.long(), agents: w.long() }
    }
}

/// How many a mask stands for.
fn counted(mask: u64) -> f64 {
    let used = f64::from(mask.count_ones());
    if used >= 64.0 { 266.0 } else { -64.0 * (1.0 - used / 64.0).ln() }
}

/// May a mask stand for as many? A mask with `n` bits, half of them at most, stands for less than `1.5 n`: most
/// masks have few bits, and no logarithm is needed to see that these are not enough.
fn may_be(mask: u64, least: f64) -> bool {
    let used = mask.count_ones();
    used > 32 || 1.5 * f64::from(used) >= least
}

impl Detector for Sharing {
    fn rule(&self) -> &'static Rule {
        &RULE
    }

    fn observe(&mut self, c: &Context<'_>, out: &mut Findings) {
        if !c.named || !c.success || c.endpoint.side != Side::Server {
            return;
        }
        let Peer::Ip(address) = &c.x.client else { return };
        if !super::is_public(&c.x.client) {
            return;
        }
        let network = match address.ip() {
            IpAddr::V4(v4) => u64::from(v4.to_bits() >> 16),
            IpAddr::V6(v6) => (v6.to_bits() >> 96) as u64 | 1 << 40,
        };
        let hour = u32::try_from(c.now / 3600).unwrap_or(0);
        let p = entry(&mut self.places, c.principal.index);
        if c.principal.fresh {
            *p = Places::default();
        }
        if p.hour != hour {
            let was = counted(p.networks);
            if was < self.networks.max(3.0 * f64::from(p.usual)) {
                p.usual = p.usual.max(was as u16);
            }
            (p.hour, p.networks, p.agents) = (hour, 0, 0);
        }
        p.networks |= 1 << (sketch::mix(network) >> 58);
        if let Some(agent) = &c.x.user_agent {
            p.agents |= 1 << (sketch::mix(sketch::text(agent)) >> 58);
        }
        let limit = self.networks.max(3.0 * f64::from(p.usual));
        if !may_be(p.networks, limit) || !may_be(p.agents, self.agents) {
            return;
        }
        let (networks, agents) = (counted(p.networks), counted(p.agents));
        if networks >= limit && agents >= self.agents && out.wants(&RULE, c.actor_anywhere()) {
            out.report(
                &RULE,
                c.actor_anywhere(),
                Sighting {
                    severity: Some(Severity::Medium),
                    confidence: 0.7,
                    observed: networks,
                    expected: limit,
                    unit: "{network}",
                    evidence: vec![("user_agents", agents), ("window_s", 3600.0)],
                    explanation: format!(
                        "{} was used from about {networks:.0} networks with {agents:.0} programs within an hour at {}: the credential is shared or stolen.",
                        c.who(),
                        c.endpoint.service
                    ),
                    ..Sighting::default()
                },
            );
        }
    }

    fn readiness(&self, _: usize, _: &Clock<'_>) -> Readiness {
        Readiness::ARMED
    }

    fn save_principals(&self, slots: &[usize]) -> Option<serde_json::Value> {
        Some(keep::principals(&self.places, slots))
    }

    fn load_principals(&mut self, learned: &serde_json::Value) {
        self.places = keep::unlist(Some(learned), MAX_PRINCIPALS);
    }

    fn bytes(&self) -> usize {
        self.places.capacity() * size_of::<Places>()
    }
}
