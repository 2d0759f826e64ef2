//! D9, D10 and D15: an endpoint that was not there, one that should not be there any more, and methods
//! that a route does not have.

use rustc_hash::FxHashMap;

use super::{
    Clock, Context, Detector, Findings, Readiness, Rule, Setting, Settings, Severity, Sighting, entry,
    keep::{self, Words},
    sketch,
};
use crate::exchange::{Auth, Marks, Method, Side};

/// D9.
pub static NEW: Rule = Rule {
    id: "D9",
    name: "new-endpoint",
    title: "An endpoint that was never there before",
    owasp: &["API9:2023"],
    attack: &["T1190"],
    signal: "first answers of an endpoint of a service that is known for days",
    algorithm: "at least 3 answers that are neither 404, 405 nor 400, of an endpoint first seen when its service was known \
        for 3 days. Low; medium when it gives objects without a credential and no other new endpoint came within 15 \
        minutes (which is a rollout)",
    source: "OWASP API9:2023",
    memory: "16 bytes an endpoint, 24 a service",
    blind: "endpoints that were there before the agent: the document's difference shows those (`apiscope inventory`)",
    settings: &[
        Setting { name: "answers", default: 3.0, about: "answers that are neither 404, 405 nor 400" },
        Setting { name: "learn_days", default: 3.0, about: "days that a service is watched before anything is new" },
    ],
};

/// D10.
pub static ZOMBIE: Rule = Rule {
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

/// D15.
pub static METHOD: Rule = Rule {
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
struct Fresh {
    answers: u32,
    open: u32,
}

/// D9.
pub struct NewEndpoint {
    answers: u32,
    learn: u64,
    fresh: Vec<Fresh>,
    /// By service: first seen, and when its last new endpoints came.
    services: FxHashMap<u64, (u64, u64, u64)>,
}

/// Services that are told apart; more than an agent can name.
const MAX_SERVICES: usize = 4_096;

impl NewEndpoint {
    /// With these settings.
    pub fn new(settings: &Settings<'_>) -> Self {
        Self {
            answers: settings.get("answers") as u32,
            learn: (settings.get("learn_days") * 86_400.0) as u64,
            fresh: Vec::new(),
            services: FxHashMap::default(),
        }
    }
}

impl Detector for NewEndpoint {
    fn rule(&self) -> &'static Rule {
        &NEW
    }

    fn observe(&mut self, c: &Context<'_>, out: &mut Findings) {
        // An endpoint that is known costs one look.
        if c.endpoint.requests > 64 || c.endpoint.side != Side::Server {
            return;
        }
        let key = sketch::text(&c.endpoint.service);
        if !self.services.contains_key(&key) && self.services.len() >= MAX_SERVICES {
            return;
        }
        let service = self.services.entry(key).or_insert((c.now, 0, 0));
        let f = entry(&mut self.fresh, c.at);
        if matches!(c.x.status, 0 | 400 | 404 | 405 | 501) {
            return;
        }
        f.answers += 1;
        f.open += u32::from(c.success && c.x.auth == Auth::None);
        if f.answers == 1 {
            (service.1, service.2) = (service.2, c.now);
        }
        let known = c.endpoint.first_seen >= service.0 + self.learn;
        if !known || f.answers != self.answers || !out.wants(&NEW, c.here()) {
            return;
        }
        let rollout = service.1 + 900 >= c.now && service.1 > service.0 + self.learn;
        let open = f.open >= self.answers && c.endpoint.has_object && !c.endpoint.login;
        out.report(
            &NEW,
            c.here(),
            Sighting {
                severity: Some(if open && !rollout { Severity::Medium } else { Severity::Low }),
                confidence: 0.8,
                observed: f64::from(f.answers),
                unit: "{request}",
                evidence: vec![("without_credential", f64::from(f.open)), ("rollout", f64::from(u8::from(rollout)))],
                explanation: format!(
                    "{} answers since today and was never seen before{}: is it meant to be there?",
                    c.where_(),
                    if open { ", without asking for a credential" } else { "" }
                ),
                ..Sighting::default()
            },
        );
    }

    fn readiness(&self, at: usize, clock: &Clock<'_>) -> Readiness {
        let first = clock.endpoints.get(at).and_then(|e| self.services.get(&sketch::text(&e.service)));
        Readiness::after(clock.now.saturating_sub(first.map_or(clock.now, |f| f.0)) as f64, self.learn as f64)
    }

    fn save(&self, at: usize) -> Option<serde_json::Value> {
        self.fresh.get(at).filter(|f| f.answers > 0).map(|f| serde_json::json!([f.answers, f.open]))
    }

    fn load(&mut self, at: usize, learned: &serde_json::Value) {
        if let Ok([answers, open]) = serde_json::from_value::<[u32; 2]>(learned.clone()) {
            *entry(&mut self.fresh, at) = Fresh { answers: answers.min(u32::MAX / 2), open: open.min(u32::MAX / 2) };
        }
    }

    fn save_node(&self) -> Option<serde_json::Value> {
        let mut out = Vec::new();
        for (key, (first, before, last)) in &self.services {
            [*key, *first, *before, *last].into_iter().for_each(|v| keep::long(&mut out, v));
        }
        Some(keep::text(&out))
    }

    fn load_node(&mut self, learned: &serde_json::Value) {
        for chunk in keep::words(Some(learned)).chunks_exact(8).take(MAX_SERVICES) {
            let mut w = Words::new(chunk);
            self.services.insert(w.long(), (w.time(), w.time(), w.time()));
        }
    }

    fn bytes(&self) -> usize {
        self.fresh.capacity() * size_of::<Fresh>() + self.services.capacity() * 40
    }
}

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
        &ZOMBIE
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
        if !(idle || marked || newer.is_some()) || !out.wants(&ZOMBIE, c.here()) {
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
            &ZOMBIE,
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
        &METHOD
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
        if !why.is_empty() && out.wants(&METHOD, c.here()) {
            out.report(
                &METHOD,
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
