//! D8: principals that use one endpoint and nothing else.

use rustc_hash::FxHashMap;

use super::{
    Clock, Context, Detector, Findings, MAX_PRINCIPALS, Readiness, Rule, Setting, Settings, Severity, Sighting, entry,
    keep::{self, Packed, Words},
    name,
};
use crate::exchange::Side;

/// D8.
pub static RULE: Rule = Rule {
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
        &RULE
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
            if s.all > 0 && !out.covers(&RULE, c.endpoint) {
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
        if fires && out.wants(&RULE, c.here()) {
            out.report(
                &RULE,
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
        Some(keep::principals(&self.principals, slots))
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
