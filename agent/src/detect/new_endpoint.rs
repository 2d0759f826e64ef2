//! D9: an endpoint that was not there.

use rustc_hash::FxHashMap;

use super::{
    Clock, Context, Detector, Findings, MAX_SERVICES, Readiness, Rule, Setting, Settings, Severity, Sighting, entry,
    keep::{self, Words},
    sketch,
};
use crate::exchange::{Auth, Side};

/// D9.
pub static RULE: Rule = Rule {
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
        &RULE
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
        if !known || f.answers != self.answers || !out.wants(&RULE, c.here()) {
            return;
        }
        let rollout = service.1 + 900 >= c.now && service.1 > service.0 + self.learn;
        let open = f.open >= self.answers && c.endpoint.has_object && !c.endpoint.login;
        out.report(
            &RULE,
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
