//! D2: an endpoint that never asks who is there.

use super::{Clock, Context, Detector, Findings, Readiness, Rule, Setting, Settings, Severity, Sighting, entry};
use crate::exchange::{Auth, Method, Side};

/// D2.
pub static RULE: Rule = Rule {
    id: "D2",
    name: "open-endpoint",
    title: "An endpoint never asks who you are",
    owasp: &["API2:2023", "API8:2023"],
    attack: &["T1190"],
    signal: "successes of an endpoint, and whether one carried a credential or a 401 or 403 was ever given",
    algorithm: "no credential in 500 successes and no refusal; high when the path names an object and the answers are \
        large or the callers come from public addresses. Login, health and static endpoints are left out",
    source: "OWASP API2:2023, API8:2023",
    memory: "32 bytes an endpoint",
    blind: "credentials in bodies or in fields that are not configured (`identity.api_key_headers`)",
    settings: &[Setting { name: "successes", default: 500.0, about: "successes without a credential" }],
};

#[derive(Default, Clone)]
struct State {
    with: u64,
    without: u64,
    external: u64,
    bytes: u64,
}

/// D2.
pub struct OpenEndpoint {
    successes: f64,
    states: Vec<State>,
}

impl OpenEndpoint {
    /// With these settings.
    pub fn new(settings: &Settings<'_>) -> Self {
        Self { successes: settings.get("successes"), states: Vec::new() }
    }
}

impl Detector for OpenEndpoint {
    fn rule(&self) -> &'static Rule {
        &RULE
    }

    fn observe(&mut self, c: &Context<'_>, out: &mut Findings) {
        let x = c.x;
        if c.endpoint.side != Side::Server
            || c.endpoint.login
            || c.endpoint.probe
            || matches!(x.method, Method::Options)
        {
            return;
        }
        let s = entry(&mut self.states, c.at);
        if x.auth != Auth::None || c.refused {
            if s.with == 0 && s.without as f64 >= self.successes {
                out.resolve(&RULE, c.here());
            }
            s.with += 1;
            return;
        }
        if !(200..300).contains(&x.status) || s.with > 0 {
            return;
        }
        s.without += 1;
        s.bytes += x.response_bytes;
        s.external += u64::from(super::is_public(&x.client));
        if (s.without as f64) < self.successes || is_static(c) || !out.wants(&RULE, c.here()) {
            return;
        }
        let mean = s.bytes as f64 / s.without as f64;
        let severity = match (c.endpoint.has_object, s.external > 0 || mean > 4096.0) {
            (true, true) => Severity::High,
            (true, false) => Severity::Medium,
            _ => Severity::Low,
        };
        let what = if c.endpoint.has_object { "objects that are named in its path" } else { "its answers" };
        out.report(
            &RULE,
            c.here(),
            Sighting {
                severity: Some(severity),
                confidence: 0.8,
                observed: s.without as f64,
                expected: 0.0,
                unit: "{request}",
                evidence: vec![("mean_response_bytes", mean), ("from_public_addresses", s.external as f64)],
                explanation: format!(
                    "{} gave {what} to {} requests and never saw a credential nor refused anybody: if it is not meant to be public, everybody can read it.",
                    c.where_(),
                    s.without
                ),
                ..Sighting::default()
            },
        );
    }

    fn readiness(&self, at: usize, clock: &Clock<'_>) -> Readiness {
        let Some(s) = self.states.get(at) else { return Readiness::blind("no success yet") };
        if clock.endpoints.get(at).is_some_and(|e| e.login || e.probe) {
            return Readiness::blind("people log in here, or monitors ask: no credential is expected");
        }
        if s.with > 0 { Readiness::ARMED } else { Readiness::after(s.without as f64, self.successes) }
    }

    fn bytes(&self) -> usize {
        self.states.capacity() * size_of::<State>()
    }

    fn save(&self, at: usize) -> Option<serde_json::Value> {
        self.states.get(at).map(|s| serde_json::json!([s.with, s.without, s.external, s.bytes]))
    }

    fn load(&mut self, at: usize, learned: &serde_json::Value) {
        if let Ok([with, without, external, bytes]) = serde_json::from_value::<[u64; 4]>(learned.clone()) {
            *entry(&mut self.states, at) = State { with, without, external, bytes };
        }
    }
}

/// Files for browsers are public as a rule.
fn is_static(c: &Context<'_>) -> bool {
    let media = c.x.response_type.as_deref().unwrap_or_default();
    ["text/html", "text/css", "text/javascript", "application/javascript", "image/", "font/", "video/"]
        .iter()
        .any(|m| media.starts_with(m))
        || [".js", ".css", ".png", ".svg", ".ico", ".html", ".woff2", ".map", ".txt"]
            .iter()
            .any(|e| c.endpoint.route.ends_with(e))
        || &*c.endpoint.route == "/"
}
