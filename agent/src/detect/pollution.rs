//! D20: the id of the path once more, as a key of the query.

use super::{
    Clock, Context, Detector, Findings, Readiness, Rule, Setting, Settings, Severity, Sighting, entry, sketch,
};
use crate::exchange::Side;

/// D20.
pub static RULE: Rule = Rule {
    id: "D20",
    name: "parameter-pollution",
    title: "An id comes a second time, as a query parameter",
    owasp: &["API1:2023", "API3:2023"],
    attack: &["T1190"],
    signal: "names of query parameters of endpoints with objects in their path",
    algorithm: "a name that looks like an id (id, …_id, …Id, uuid, a word of the path), or one that comes twice, never seen \
        on an endpoint that is known for 3 days and 500 requests; low, medium from the 20th time on",
    source: "HTTP parameter pollution: Balduzzi et al., NDSS 2011",
    memory: "64 bytes an endpoint",
    blind: "parameters in bodies; endpoints that take ids both ways from the start",
    settings: &[Setting { name: "requests", default: 500.0, about: "requests before names are known" }],
};

#[derive(Default, Clone)]
struct Names {
    known: u64,
    more: u64,
    odd: u32,
}

/// D20.
pub struct Pollution {
    requests: u64,
    names: Vec<Names>,
}

impl Pollution {
    /// With these settings.
    pub fn new(settings: &Settings<'_>) -> Self {
        Self { requests: settings.get("requests") as u64, names: Vec::new() }
    }
}

/// Does a name look like one of an id, or of something in the path?
fn is_id(key: &str, route: &str) -> bool {
    let lower = key.to_ascii_lowercase();
    let stem = lower.trim_end_matches("id").trim_end_matches(['_', '-']);
    lower == "id"
        || lower == "uuid"
        || (key.ends_with("_id") || key.ends_with("Id") || key.ends_with("ID") || key.ends_with("-id"))
        || (stem.len() > 2 && route.split('/').any(|s| !s.starts_with('{') && s.trim_end_matches('s') == stem))
}

impl Detector for Pollution {
    fn rule(&self) -> &'static Rule {
        &RULE
    }

    fn observe(&mut self, c: &Context<'_>, out: &mut Findings) {
        let keys = &c.x.query_keys;
        if keys.is_empty() || c.params.is_empty() || !c.success || c.endpoint.side != Side::Server {
            return;
        }
        let n = entry(&mut self.names, c.at);
        let known = c.endpoint.requests > self.requests && c.now > c.endpoint.first_seen + 3 * 86_400;
        for (i, key) in keys.iter().enumerate() {
            let twice = keys[..i].contains(key);
            // Two bits of 128 stand for a name; a name that comes twice has its own.
            let mixed = sketch::mix(sketch::text(key) ^ u64::from(twice));
            let (a, b) = (1_u64 << (mixed & 63), 1_u64 << (mixed >> 58));
            if n.known & a != 0 && n.more & b != 0 {
                continue;
            }
            if !known || !(twice || is_id(key, &c.endpoint.route)) {
                (n.known, n.more) = (n.known | a, n.more | b);
                continue;
            }
            n.odd += 1;
            if out.wants(&RULE, c.here()) {
                let shown: String =
                    key.chars().filter(|k| k.is_ascii_alphanumeric() || "_-.".contains(*k)).take(32).collect();
                out.report(
                    &RULE,
                    c.here(),
                    Sighting {
                        severity: Some(if n.odd >= 20 { Severity::Medium } else { Severity::Low }),
                        confidence: 0.5,
                        observed: f64::from(n.odd),
                        unit: "{request}",
                        explanation: format!(
                            "{} answered a request with the query parameter `{shown}`{}, which it never had: somebody tries which of two ids is checked.",
                            c.where_(),
                            if twice { " twice" } else { "" }
                        ),
                        ..Sighting::default()
                    },
                );
            }
        }
    }

    fn readiness(&self, at: usize, clock: &Clock<'_>) -> Readiness {
        let Some(e) = clock.endpoints.get(at).filter(|e| e.has_object) else {
            return Readiness::blind("its path names no object");
        };
        let age = clock.now.saturating_sub(e.first_seen) as f64 / (3.0 * 86_400.0);
        Readiness::after(age.min(e.requests as f64 / self.requests.max(1) as f64), 1.0)
    }

    fn save(&self, at: usize) -> Option<serde_json::Value> {
        self.names.get(at).filter(|n| n.known != 0).map(|n| serde_json::json!([n.known, n.more, n.odd]))
    }

    fn load(&mut self, at: usize, learned: &serde_json::Value) {
        if let Ok([known, more, odd]) = serde_json::from_value::<[u64; 3]>(learned.clone()) {
            *entry(&mut self.names, at) = Names { known, more, odd: odd.min(1 << 31) as u32 };
        }
    }

    fn bytes(&self) -> usize {
        self.names.capacity() * size_of::<Names>()
    }
}
