//! D6, D8, D16 and D19: what one principal does that it never did: fetch much, use one endpoint only, come
//! from elsewhere, be in many places at once.

use std::net::IpAddr;

use rustc_hash::FxHashMap;

use super::{
    Clock, Context, Detector, Findings, MAX_PRINCIPALS, Readiness, Rule, Setting, Settings, Severity, Sighting, entry,
    keep::{self, Packed, Words},
    name, sketch,
};
use crate::exchange::{Peer, Side};

/// D6.
pub static EXTRACTION: Rule = Rule {
    id: "D6",
    name: "fast-extraction",
    title: "One principal fetches far more bytes than usual",
    owasp: &["API4:2023", "API6:2023"],
    attack: &["T1530", "T1048"],
    signal: "response bytes of a principal in an hour",
    algorithm: "above 100 MB, four times the principal's own highest hour and four times the 99.9th percentile of all \
        principals' hours",
    source: "quantiles of a histogram with four buckets for each power of two",
    memory: "24 bytes a principal (50,000)",
    blind: "what stays below 100 MB an hour; principals new in the first day",
    settings: &[
        Setting { name: "megabytes", default: 100.0, about: "megabytes in an hour" },
        Setting { name: "factor", default: 4.0, about: "times the usual of oneself and of all" },
        Setting { name: "learn_hours", default: 24.0, about: "hours before it is judged" },
    ],
};

/// D8.
pub static SINGLE: Rule = Rule {
    id: "D8",
    name: "single-purpose-principals",
    title: "More principals than usual use one endpoint and nothing else",
    owasp: &["API6:2023"],
    attack: &["T1078"],
    signal: "principals with at least 10 requests in a day to one endpoint with objects and to no other, of all with 10",
    algorithm: "at least 20 of them in a day, and a share above 0.2 and three times the usual; machine clients are usual \
        after a week",
    source: "a proportion against its decayed maximum",
    memory: "12 bytes a principal (50,000), 24 an endpoint",
    blind: "principals below 10 requests a day, or that mix in other requests",
    settings: &[
        Setting { name: "principals", default: 20.0, about: "principals in a day" },
        Setting { name: "learn_days", default: 7.0, about: "days before it is judged" },
    ],
};

/// D16.
pub static NETWORK: Rule = Rule {
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

/// D19.
pub static SHARING: Rule = Rule {
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

/// The states of the principals in these slots, packed.
fn principals<T: Packed + Default + Clone>(states: &[T], slots: &[usize]) -> serde_json::Value {
    let none = T::default();
    keep::list(slots.iter().map(|&at| states.get(at).unwrap_or(&none)))
}

#[derive(Default, Clone, Copy)]
struct Volume {
    hour: u32,
    bytes: u64,
    usual: f32,
}

/// D6.
pub struct Extraction {
    floor: f64,
    factor: f64,
    learn: u64,
    volumes: Vec<Volume>,
    /// Principals' hours by bytes, four buckets a power of two.
    histogram: Vec<f32>,
    limit: f64,
    first: u64,
    decayed: u64,
}

impl Extraction {
    /// With these settings.
    pub fn new(settings: &Settings<'_>) -> Self {
        Self {
            floor: settings.get("megabytes") * 1e6,
            factor: settings.get("factor"),
            learn: (settings.get("learn_hours") * 3600.0) as u64,
            volumes: Vec::new(),
            histogram: vec![0.0; 192],
            limit: 0.0,
            first: 0,
            decayed: 0,
        }
    }

    fn quantile(&self) -> f64 {
        let all: f32 = self.histogram.iter().sum();
        let mut left = all * 0.001;
        for (i, n) in self.histogram.iter().enumerate().rev() {
            left -= n;
            if left < 0.0 {
                return 2f64.powf((i + 1) as f64 / 4.0);
            }
        }
        0.0
    }
}

impl Packed for Volume {
    const WORDS: usize = 4;
    fn pack(&self, out: &mut Vec<u32>) {
        out.push(self.hour);
        keep::long(out, self.bytes);
        out.push(self.usual.to_bits());
    }
    fn unpack(w: &mut Words<'_>) -> Self {
        Self { hour: w.word(), bytes: w.long() / 2, usual: w.float() }
    }
}

impl Detector for Extraction {
    fn rule(&self) -> &'static Rule {
        &EXTRACTION
    }

    fn observe(&mut self, c: &Context<'_>, out: &mut Findings) {
        if !c.success || c.endpoint.side != Side::Server {
            return;
        }
        let hour = u32::try_from(c.now / 3600).unwrap_or(0);
        if self.first == 0 {
            self.first = c.now;
        }
        let v = entry(&mut self.volumes, c.principal.index);
        if c.principal.fresh {
            *v = Volume { hour, ..Volume::default() };
        }
        if v.hour != hour {
            let at = ((v.bytes.max(1) as f64).log2() * 4.0) as usize;
            self.histogram[at.min(191)] += 1.0;
            // What a finding was about is not usual.
            if self.limit == 0.0 || (v.bytes as f64) <= self.limit.max(f64::from(v.usual) * self.factor) {
                v.usual = (v.usual * 0.99).max(v.bytes as f32);
            }
            (v.hour, v.bytes) = (hour, 0);
        }
        v.bytes += c.x.response_bytes;
        let bytes = v.bytes as f64;
        if bytes < self.floor || self.limit == 0.0 || bytes < self.limit || c.now < self.first + self.learn {
            return;
        }
        let limit = self.limit.max(f64::from(v.usual) * self.factor);
        if bytes <= limit || !out.wants(&EXTRACTION, c.actor_anywhere()) {
            return;
        }
        out.report(
            &EXTRACTION,
            c.actor_anywhere(),
            Sighting {
                severity: Some(if bytes > 10.0 * limit { Severity::High } else { Severity::Medium }),
                confidence: 0.7,
                observed: bytes,
                expected: limit,
                unit: "By",
                evidence: vec![("usual", f64::from(v.usual)), ("window_s", 3600.0)],
                explanation: format!(
                    "{} fetched {:.0} MB from {} within this hour, where at most {:.0} MB would be usual: somebody may be taking data away.",
                    c.who(),
                    bytes / 1e6,
                    c.endpoint.service,
                    limit / 1e6
                ),
                ..Sighting::default()
            },
        );
    }

    fn minute(&mut self, clock: &Clock<'_>, _: &mut Findings) {
        self.limit = self.floor.max(self.factor * self.quantile());
        if clock.now / 86_400 > self.decayed {
            self.decayed = clock.now / 86_400;
            self.histogram.iter_mut().for_each(|n| *n *= 0.95);
        }
    }

    fn readiness(&self, _: usize, clock: &Clock<'_>) -> Readiness {
        Readiness::after(clock.now.saturating_sub(self.first) as f64, self.learn as f64)
    }

    fn save_node(&self) -> Option<serde_json::Value> {
        Some(serde_json::json!({ "hours": keep::list(&self.histogram), "first": self.first, "decayed": self.decayed }))
    }

    fn load_node(&mut self, learned: &serde_json::Value) {
        let histogram = keep::unlist(learned.get("hours"), self.histogram.len());
        if histogram.len() == self.histogram.len() {
            self.histogram = histogram;
            (self.first, self.decayed) = (keep::time(learned.get("first")), keep::time(learned.get("decayed")));
            self.limit = self.floor.max(self.factor * self.quantile());
        }
    }

    fn save_principals(&self, slots: &[usize]) -> Option<serde_json::Value> {
        Some(principals(&self.volumes, slots))
    }

    fn load_principals(&mut self, learned: &serde_json::Value) {
        self.volumes = keep::unlist(Some(learned), MAX_PRINCIPALS);
    }

    fn bytes(&self) -> usize {
        self.volumes.capacity() * size_of::<Volume>() + 768
    }
}

#[derive(Default, Clone, Copy)]
struct Only {
    day: u16,
    requests: u16,
    /// Half of the endpoint's hash.
    endpoint: u32,
    others: bool,
    counted: bool,
    /// It was counted as one that uses nothing else.
    only: bool,
}

#[derive(Default, Clone, Copy)]
struct Share {
    day: u16,
    only: u32,
    all: u32,
    usual: f32,
    days: u16,
}

/// D8.
pub struct SinglePurpose {
    least: f64,
    learn: f64,
    principals: Vec<Only>,
    shares: Vec<Share>,
    /// Numbers of endpoints by half of their hash.
    index: FxHashMap<u32, usize>,
}

/// Requests after which a principal counts.
const COUNTS: u16 = 10;

impl SinglePurpose {
    /// With these settings.
    pub fn new(settings: &Settings<'_>) -> Self {
        Self {
            least: settings.get("principals"),
            learn: settings.get("learn_days"),
            principals: Vec::new(),
            shares: Vec::new(),
            index: FxHashMap::default(),
        }
    }
}

impl Packed for Only {
    const WORDS: usize = 3;
    fn pack(&self, out: &mut Vec<u32>) {
        let flags = u32::from(self.others) | u32::from(self.counted) << 1 | u32::from(self.only) << 2;
        out.extend([u32::from(self.day) << 16 | u32::from(self.requests), self.endpoint, flags]);
    }
    fn unpack(w: &mut Words<'_>) -> Self {
        let (times, endpoint, flags) = (w.word(), w.word(), w.word());
        Self {
            day: (times >> 16) as u16,
            requests: times as u16,
            endpoint,
            others: flags & 1 != 0,
            counted: flags & 2 != 0,
            only: flags & 4 != 0,
        }
    }
}

impl Packed for Share {
    const WORDS: usize = 4;
    fn pack(&self, out: &mut Vec<u32>) {
        out.extend([u32::from(self.day) << 16 | u32::from(self.days), self.only, self.all, self.usual.to_bits()]);
    }
    fn unpack(w: &mut Words<'_>) -> Self {
        let days = w.word();
        let (day, days) = ((days >> 16) as u16, (days as u16).min(u16::MAX / 2));
        Self { day, only: w.count(), all: w.count(), usual: w.float(), days }
    }
}

impl Detector for SinglePurpose {
    fn rule(&self) -> &'static Rule {
        &SINGLE
    }

    fn observe(&mut self, c: &Context<'_>, out: &mut Findings) {
        if !c.named || c.endpoint.side != Side::Server || c.x.caller.is_some() {
            return;
        }
        let day = (c.now / 86_400) as u16;
        let p = entry(&mut self.principals, c.principal.index);
        let at = (c.endpoint.hash >> 32) as u32;
        if c.principal.fresh || p.day != day {
            *p = Only { day, endpoint: at, ..Only::default() };
        }
        p.requests = p.requests.saturating_add(1);
        p.others |= p.endpoint != at;
        if p.counted {
            // Who goes elsewhere later in the day was counted too early.
            if p.only && p.others {
                p.only = false;
                let there = self.index.get(&p.endpoint).and_then(|at| self.shares.get_mut(*at));
                if let Some(s) = there.filter(|s| s.day == day) {
                    s.only = s.only.saturating_sub(1);
                }
            }
            return;
        }
        if p.requests < COUNTS {
            return;
        }
        p.counted = true;
        let only = !p.others && c.endpoint.has_object;
        p.only = only;
        self.index.insert(at, c.at);
        let s = entry(&mut self.shares, c.at);
        if s.day != day {
            let share = s.only as f32 / s.all.max(1) as f32;
            if s.all > 0 && !out.covers(&SINGLE, c.endpoint) {
                s.usual = (s.usual * 0.97).max(share);
                s.days = s.days.saturating_add(1);
            }
            (s.day, s.only, s.all) = (day, 0, 0);
        }
        s.all += 1;
        s.only += u32::from(only);
        let share = f64::from(s.only) / f64::from(s.all);
        let usual = f64::from(s.usual);
        let fires = only
            && f64::from(s.days) >= self.learn
            && f64::from(s.only) >= self.least
            && share > (3.0 * usual).max(0.2);
        if fires && out.wants(&SINGLE, c.here()) {
            out.report(
                &SINGLE,
                c.here(),
                Sighting {
                    severity: Some(Severity::Medium),
                    confidence: 0.6,
                    observed: share,
                    expected: usual,
                    unit: "1",
                    evidence: vec![("principals", f64::from(s.only))],
                    explanation: format!(
                        "{} principals used {} today and nothing else, {:.0} % of all where {:.0} % are usual: these may be no people.",
                        s.only,
                        name(c.endpoint),
                        100.0 * share,
                        100.0 * usual
                    ),
                    ..Sighting::default()
                },
            );
        }
    }

    fn readiness(&self, at: usize, _: &Clock<'_>) -> Readiness {
        Readiness::after(self.shares.get(at).map_or(0.0, |s| f64::from(s.days)), self.learn)
    }

    fn save(&self, at: usize) -> Option<serde_json::Value> {
        self.shares.get(at).filter(|s| s.all > 0 || s.days > 0).map(keep::one)
    }

    fn load(&mut self, at: usize, learned: &serde_json::Value) {
        if let Some(share) = keep::unone(learned) {
            *entry(&mut self.shares, at) = share;
        }
    }

    fn save_principals(&self, slots: &[usize]) -> Option<serde_json::Value> {
        Some(principals(&self.principals, slots))
    }

    fn load_principals(&mut self, learned: &serde_json::Value) {
        self.principals = keep::unlist(Some(learned), MAX_PRINCIPALS);
    }

    fn bytes(&self) -> usize {
        self.index.capacity() * 13
            + self.principals.capacity() * size_of::<Only>()
            + self.shares.capacity() * size_of::<Share>()
    }
}

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
        &NETWORK
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
        if known && out.wants(&NETWORK, c.actor_anywhere()) {
            out.report(
                &NETWORK,
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
        Some(principals(&self.zones, slots))
    }

    fn load_principals(&mut self, learned: &serde_json::Value) {
        self.zones = keep::unlist(Some(learned), MAX_PRINCIPALS);
    }

    fn bytes(&self) -> usize {
        self.zones.capacity() * size_of::<Zone>()
    }
}

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

fn counted(mask: u64) -> f64 {
    let used = f64::from(mask.count_ones());
    if used >= 64.0 { 266.0 } else { -64.0 * (1.0 - used / 64.0).ln() }
}

impl Detector for Sharing {
    fn rule(&self) -> &'static Rule {
        &SHARING
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
        let (networks, agents) = (counted(p.networks), counted(p.agents));
        let limit = self.networks.max(3.0 * f64::from(p.usual));
        if networks >= limit && agents >= self.agents && out.wants(&SHARING, c.actor_anywhere()) {
            out.report(
                &SHARING,
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
        Some(principals(&self.places, slots))
    }

    fn load_principals(&mut self, learned: &serde_json::Value) {
        self.places = keep::unlist(Some(learned), MAX_PRINCIPALS);
    }

    fn bytes(&self) -> usize {
        self.places.capacity() * size_of::<Places>()
    }
}
