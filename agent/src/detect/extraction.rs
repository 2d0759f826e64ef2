//! D6: a principal that fetches much more than it and others do.

use super::{
    Clock, Context, Detector, Findings, MAX_PRINCIPALS, Readiness, Rule, Setting, Settings, Severity, Sighting, entry,
    keep::{self, Packed, Words},
};
use crate::exchange::Side;

/// D6.
pub static RULE: Rule = Rule {
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
        &RULE
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
        if bytes <= limit || !out.wants(&RULE, c.actor_anywhere()) {
            return;
        }
        out.report(
            &RULE,
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
        Some(keep::principals(&self.volumes, slots))
    }

    fn load_principals(&mut self, learned: &serde_json::Value) {
        self.volumes = keep::unlist(Some(learned), MAX_PRINCIPALS);
    }

    fn bytes(&self) -> usize {
        self.volumes.capacity() * size_of::<Volume>() + 768
    }
}
