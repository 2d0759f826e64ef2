//! D10: an endpoint that should not be there any more.

use rustc_hash::FxHashMap;

use super::{
    Clock, Context, Detector, Findings, Readiness, Rule, Setting, Settings, Severity, Sighting, entry,
    keep::{self, Words},
    sketch,
};
use crate::exchange::{Marks, Side};

/// D10.
pub static RULE: Rule = Rule {
    id: "D10",
    name: "zombie-endpoint",
    title: "An endpoint that should be gone is used",
    owasp: &["API9:2023"],
    attack: &["T1190"],
    signal: "Deprecation and Sunset fields, versions in routes, and the time between two uses",
    algorithm: "a success of an endpoint that says it is deprecated, that is an older version (/v1/…) of a route that is \
        used too, or that was idle for 30 days",
    source: "RFC 9745, RFC 8594; OWASP API9:2023",
    memory: "16 bytes an endpoint",
    blind: "versions in header fields; documented endpoints that were never seen are listed by the inventory",
    settings: &[Setting { name: "idle_days", default: 30.0, about: "days without use" }],
};

/// D10.
pub struct Zombie {
    idle: u64,
    last: Vec<u64>,
    /// Route without its version -> highest version that answered lately, by hash.
    versions: FxHashMap<u64, (u32, u64)>,
}

/// Routes with versions that are told apart.
const MAX_VERSIONED: usize = 8_192;

impl Zombie {
    /// With these settings.
    pub fn new(settings: &Settings<'_>) -> Self {
        Self { idle: (settings.get("idle_days") * 86_400.0) as u64, last: Vec::new(), versions: FxHashMap::default() }
    }
}

/// The number of the first segment `v2`, and a hash of the route without it.
fn version(c: &Context<'_>) -> Option<(u32, u64)> {
    let mut number = None;
    let mut hash = sketch::text(&c.endpoint.service);
    for segment in c.endpoint.route.split('/') {
        let digits = segment.strip_prefix('v').and_then(|d| d.parse::<u32>().ok());
        if number.is_none() && digits.is_some() {
            number = digits;
        } else {
            hash = sketch::mix(hash ^ sketch::text(segment));
        }
    }
    number.map(|n| (n, sketch::mix(hash ^ sketch::text(c.endpoint.method.as_str()))))
}

impl Detector for Zombie {
    fn rule(&self) -> &'static Rule {
        &RULE
    }

    fn observe(&mut self, c: &Context<'_>, out: &mut Findings) {
        if !c.success || c.endpoint.side != Side::Server {
            return;
        }
        let last = std::mem::replace(entry(&mut self.last, c.at), c.now);
        let idle = last != 0 && c.now > last + self.idle;
        let marked = c.x.marks.has(Marks::DEPRECATED) || c.x.marks.has(Marks::SUNSET);
        // Versions change slowly: look at a few early requests, then at one in 1,024.
        let mut newer = None;
        if (c.endpoint.requests < 8 || c.endpoint.requests.is_multiple_of(1_024))
            && let Some((number, key)) = version(c)
            && (self.versions.len() < MAX_VERSIONED || self.versions.contains_key(&key))
        {
            let known = self.versions.entry(key).or_insert((number, c.now));
            if number >= known.0 {
                *known = (number, c.now);
            } else if known.1 + 7 * 86_400 > c.now && c.endpoint.requests > 1_000 {
                newer = Some((number, known.0));
            }
        }
        if !(idle || marked || newer.is_some()) || !out.wants(&RULE, c.here()) {
            return;
        }
        let days = c.now.saturating_sub(last) as f64 / 86_400.0;
        let (severity, observed, why) = if idle {
            (Severity::Medium, days, format!("was not used for {days:.0} days and is used again"))
        } else if let Some((old, new)) = newer {
            (Severity::Low, f64::from(old), format!("is still used though version {new} is there"))
        } else {
            (Severity::Low, 1.0, "is used though it says that it is deprecated".into())
        };
        out.report(
            &RULE,
            c.here(),
            Sighting {
                severity: Some(severity),
                confidence: 0.7,
                observed,
                unit: if idle { "d" } else { "{request}" },
                explanation: format!("{} {why}: old endpoints often lack newer checks.", c.where_()),
                ..Sighting::default()
            },
        );
    }

    fn readiness(&self, _: usize, _: &Clock<'_>) -> Readiness {
        Readiness::ARMED
    }

    fn bytes(&self) -> usize {
        self.last.capacity() * 8 + self.versions.capacity() * 32
    }

    fn save(&self, at: usize) -> Option<serde_json::Value> {
        self.last.get(at).filter(|l| **l > 0).map(|l| serde_json::json!(l))
    }

    fn load(&mut self, at: usize, learned: &serde_json::Value) {
        *entry(&mut self.last, at) = keep::time(Some(learned));
    }

    fn save_node(&self) -> Option<serde_json::Value> {
        let mut out = Vec::new();
        for (key, (number, seen)) in &self.versions {
            keep::long(&mut out, *key);
            out.push(*number);
            keep::long(&mut out, *seen);
        }
        Some(keep::text(&out))
    }

    fn load_node(&mut self, learned: &serde_json::Value) {
        for chunk in keep::words(Some(learned)).chunks_exact(5).take(MAX_VERSIONED) {
            let mut w = Words::new(chunk);
            self.versions.insert(w.long(), (w.word(), w.time()));
        }
    }
}
