//! D1: an endpoint that asks who is there, and then answered somebody without.

use super::{Clock, Context, Detector, Findings, Readiness, Rule, Setting, Settings, Severity, Sighting, entry};
use crate::exchange::{Auth, Method, Side};

/// D1.
pub static RULE: Rule = Rule {
    id: "D1",
    name: "unauthenticated-success",
    title: "Answered without a credential where one is always shown",
    owasp: &["API2:2023"],
    attack: &["T1190", "T1078"],
    signal: "successes of an endpoint with and without a credential",
    algorithm: "at least 99 % of at least 200 successes over a day carried a credential, and then one did not; reported \
        when a second one follows or at once when the endpoint also refuses people (401, 403)",
    source: "a proportion with a floor; OWASP API2:2023",
    memory: "32 bytes an endpoint",
    blind: "client certificates and session schemes that the agent does not see; endpoints below 200 successes",
    settings: &[
        Setting { name: "share", default: 0.99, about: "share of successes with a credential" },
        Setting { name: "successes", default: 200.0, about: "successes before it is judged" },
        Setting { name: "learn_hours", default: 24.0, about: "hours before it is judged" },
    ],
};

#[derive(Default, Clone)]
struct State {
    with: u64,
    without: u64,
    refusals: u64,
    strangers: u64,
}

/// D1.
pub struct Unauthenticated {
    share: f64,
    successes: f64,
    learn: u64,
    states: Vec<State>,
}

impl Unauthenticated {
    /// With these settings.
    pub fn new(settings: &Settings<'_>) -> Self {
        Self {
            share: settings.get("share"),
            successes: settings.get("successes"),
            learn: (settings.get("learn_hours") * 3600.0) as u64,
            states: Vec::new(),
        }
    }
}

impl Detector for Unauthenticated {
    fn rule(&self) -> &'static Rule {
        &RULE
    }

    fn observe(&mut self, c: &Context<'_>, out: &mut Findings) {
        if c.endpoint.side != Side::Server || c.endpoint.login || c.endpoint.probe || c.x.method == Method::Options {
            return;
        }
        let s = entry(&mut self.states, c.at);
        s.refusals += u64::from(c.refused);
        if !(200..300).contains(&c.x.status) {
            return;
        }
        if c.x.auth != Auth::None {
            s.with += 1;
            return;
        }
        let all = (s.with + s.without) as f64;
        let judged = all >= self.successes && c.now >= c.endpoint.first_seen + self.learn;
        if !judged || (s.with as f64) < self.share * all {
            s.without += 1;
            return;
        }
        // Not learned: a hole that is used is not what is usual.
        s.strangers += 1;
        if s.strangers < 2 && s.refusals == 0 {
            return;
        }
        if out.wants(&RULE, c.here()) {
            let share = 100.0 * s.with as f64 / all;
            out.report(
                &RULE,
                c.here(),
                Sighting {
                    severity: Some(if c.endpoint.has_object { Severity::Critical } else { Severity::High }),
                    confidence: if s.refusals > 0 { 0.9 } else { 0.75 },
                    observed: s.strangers as f64,
                    expected: 0.0,
                    unit: "{request}",
                    records: c.endpoint.has_object.then_some(s.strangers as f64),
                    evidence: vec![("share_with_credential", share / 100.0), ("successes", all), ("refusals", s.refusals as f64)],
                    explanation: format!(
                        "{} answered {} requests without any credential, though {share:.1} % of its answers go to callers who show one: a check may be missing or switched off.",
                        c.where_(),
                        s.strangers
                    ),
                },
            );
        }
    }

    fn readiness(&self, at: usize, clock: &Clock<'_>) -> Readiness {
        let (Some(e), Some(s)) = (clock.endpoints.get(at), self.states.get(at)) else {
            return Readiness::blind("no success yet");
        };
        if e.login || e.probe {
            return Readiness::blind("people log in here, or monitors ask: no credential is expected");
        }
        let all = (s.with + s.without) as f64;
        if all >= self.successes && (s.with as f64) < self.share * all {
            return Readiness::blind("it is not always called with a credential");
        }
        let age = clock.now.saturating_sub(e.first_seen) as f64 / self.learn.max(1) as f64;
        Readiness::after(age.min(all / self.successes), 1.0)
    }

    fn bytes(&self) -> usize {
        self.states.capacity() * size_of::<State>()
    }

    fn save(&self, at: usize) -> Option<serde_json::Value> {
        self.states.get(at).map(|s| serde_json::json!([s.with, s.without, s.refusals, s.strangers]))
    }

    fn load(&mut self, at: usize, learned: &serde_json::Value) {
        if let Ok([with, without, refusals, strangers]) = serde_json::from_value::<[u64; 4]>(learned.clone()) {
            *entry(&mut self.states, at) = State { with, without, refusals, strangers };
        }
    }
}
