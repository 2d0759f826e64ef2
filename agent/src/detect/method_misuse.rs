//! D15: methods that a route does not have.

use rustc_hash::FxHashMap;

use super::{
    Clock, Context, Detector, Findings, Readiness, Rule, Setting, Settings, Severity, Sighting, entry,
    keep::{self, Words},
    sketch,
};
use crate::exchange::{Auth, Marks, Method, Side};

/// D15.
pub static RULE: Rule = Rule {
    id: "D15",
    name: "method-misuse",
    title: "A method that this route does not have",
    owasp: &["API5:2023", "API8:2023"],
    attack: &["T1190"],
    signal: "methods by route, TRACE and CONNECT, and fields that override the method",
    algorithm: "a success of TRACE, of CONNECT at an origin, of a writing method never seen on a route that is known for 3 \
        days and 200 requests, or of a request with an override field where none was used before",
    source: "OWASP API5:2023; RFC 9110 section 9.3.8",
    memory: "40 bytes a route (8,192)",
    blind: "overrides in bodies or query parameters",
    settings: &[Setting {
        name: "requests",
        default: 200.0,
        about: "requests of a route before its methods are known",
    }],
};

#[derive(Default, Clone, Copy)]
struct Methods {
    requests: u64,
    first: u64,
    known: u16,
    overrides: bool,
}

/// D15.
pub struct MethodMisuse {
    requests: u64,
    routes: FxHashMap<u64, Methods>,
    /// Key of the route of each endpoint, so that it is worked out once.
    keys: Vec<u64>,
}

/// Routes that are told apart.
const MAX_ROUTES: usize = 8_192;

/// Time before methods of a route are known, s.
const LEARN: u64 = 3 * 86_400;

impl MethodMisuse {
    /// With these settings.
    pub fn new(settings: &Settings<'_>) -> Self {
        Self { requests: settings.get("requests") as u64, routes: FxHashMap::default(), keys: Vec::new() }
    }
}

fn bit(method: &Method) -> u16 {
    1 << match method {
        Method::Get => 0,
        Method::Head => 1,
        Method::Post => 2,
        Method::Put => 3,
        Method::Delete => 4,
        Method::Connect => 5,
        Method::Options => 6,
        Method::Trace => 7,
        Method::Patch => 8,
        _ => 9,
    }
}

impl Detector for MethodMisuse {
    fn rule(&self) -> &'static Rule {
        &RULE
    }

    fn observe(&mut self, c: &Context<'_>, out: &mut Findings) {
        if !c.success || c.endpoint.side != Side::Server || c.x.method == Method::Unknown {
            return;
        }
        let key = entry(&mut self.keys, c.at);
        if *key == 0 {
            *key = sketch::mix(sketch::text(&c.endpoint.service)) ^ sketch::text(&c.endpoint.route);
        }
        if self.routes.len() >= MAX_ROUTES && !self.routes.contains_key(key) {
            return;
        }
        let route = self.routes.entry(*key).or_insert(Methods { first: c.now, ..Methods::default() });
        route.requests += 1;
        let known = route.requests > self.requests && c.now > route.first + LEARN;
        let new = route.known & bit(&c.x.method) == 0;
        let overrides = c.x.marks.has(Marks::METHOD_OVERRIDE);
        let (why, severity) = match &c.x.method {
            Method::Trace => ("answers TRACE, which shows a request's secrets to scripts", Severity::Medium),
            Method::Connect if &*c.endpoint.route != "{authority}" => ("answers CONNECT", Severity::Medium),
            _ if overrides && !route.overrides && known => {
                ("took a field that overrides the method, for the first time", Severity::Medium)
            }
            Method::Get | Method::Head | Method::Options | Method::Connect => ("", Severity::Low),
            _ if new && known => (
                "took a writing method for the first time",
                if c.x.auth == Auth::None { Severity::Medium } else { Severity::Low },
            ),
            _ => ("", Severity::Low),
        };
        if !known {
            route.overrides |= overrides;
        }
        route.known |= bit(&c.x.method);
        if !why.is_empty() && out.wants(&RULE, c.here()) {
            out.report(
                &RULE,
                c.here(),
                Sighting {
                    severity: Some(severity),
                    confidence: 0.7,
                    observed: 1.0,
                    unit: "{request}",
                    explanation: format!("{} {why}: is it meant to?", c.where_()),
                    ..Sighting::default()
                },
            );
        }
    }

    fn readiness(&self, at: usize, clock: &Clock<'_>) -> Readiness {
        let route = self.keys.get(at).and_then(|k| self.routes.get(k));
        let Some(route) = route else { return Readiness::Learning { progress: 0.0 } };
        let age = clock.now.saturating_sub(route.first) as f64 / LEARN as f64;
        Readiness::after(age.min(route.requests as f64 / self.requests.max(1) as f64), 1.0)
    }

    fn save_node(&self) -> Option<serde_json::Value> {
        let mut out = Vec::new();
        for (key, m) in &self.routes {
            [*key, m.requests, m.first].into_iter().for_each(|v| keep::long(&mut out, v));
            out.push(u32::from(m.known) | u32::from(m.overrides) << 16);
        }
        Some(keep::text(&out))
    }

    fn load_node(&mut self, learned: &serde_json::Value) {
        for chunk in keep::words(Some(learned)).chunks_exact(7).take(MAX_ROUTES) {
            let mut w = Words::new(chunk);
            let (key, requests, first, rest) = (w.long(), w.long() / 2, w.time(), w.word());
            self.routes.insert(key, Methods { requests, first, known: rest as u16, overrides: rest >> 16 & 1 == 1 });
        }
    }

    fn bytes(&self) -> usize {
        self.keys.capacity() * 8 + self.routes.capacity() * 40
    }
}
