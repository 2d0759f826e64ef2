//! D11: a workload that never called this endpoint does.

use rustc_hash::{FxHashMap, FxHashSet};

use super::{
    About, Clock, Context, Detector, Findings, MAX_SERVICES, Readiness, Rule, Setting, Settings, Severity, Sighting,
    keep::{self, Words},
    sketch,
};
use crate::exchange::Side;

/// D11.
pub static RULE: Rule = Rule {
    id: "D11",
    name: "new-caller",
    title: "A workload calls an endpoint that it never called",
    owasp: &["API5:2023"],
    attack: &["T1078", "T1210"],
    signal: "workload of the caller and endpoint of each success",
    algorithm: "the first success of a (workload, endpoint) after the service was watched for 7 days: medium when the \
        workload never called the service at all, low when it did",
    source: "first-seen sets",
    memory: "16 bytes an edge (16,384)",
    blind: "callers whose workload is not known; edges beyond the bound are taken as known",
    settings: &[Setting {
        name: "learn_days",
        default: 7.0,
        about: "days that a service is watched before anything is said",
    }],
};

/// Edges that are kept.
const MAX_EDGES: usize = 16_384;

/// D11.
pub struct NewCaller {
    learn: u64,
    edges: FxHashSet<u64>,
    /// By hash of the name: when it was first seen.
    services: FxHashMap<u64, u64>,
}

impl NewCaller {
    /// With these settings.
    pub fn new(settings: &Settings<'_>) -> Self {
        Self {
            learn: (settings.get("learn_days") * 86_400.0) as u64,
            edges: FxHashSet::default(),
            services: FxHashMap::default(),
        }
    }
}

impl Detector for NewCaller {
    fn rule(&self) -> &'static Rule {
        &RULE
    }

    fn observe(&mut self, c: &Context<'_>, out: &mut Findings) {
        if c.endpoint.side != Side::Server || !c.success || c.endpoint.probe {
            return;
        }
        let Some(caller) = &c.x.caller else { return };
        let who = sketch::mix(sketch::text(caller));
        let edge = who ^ c.endpoint.hash;
        if self.edges.contains(&edge) || self.edges.len() + 2 > MAX_EDGES {
            return;
        }
        let service = sketch::text(&c.endpoint.service);
        if self.services.len() >= MAX_SERVICES && !self.services.contains_key(&service) {
            return;
        }
        let first = *self.services.entry(service).or_insert(c.now);
        self.edges.insert(edge);
        let stranger = self.edges.insert(who ^ sketch::mix(service).rotate_left(3));
        let known = c.now >= first + self.learn;
        let about = About { actor: Some(who), ..c.here() };
        if known && out.wants(&RULE, about) {
            out.report(
                &RULE,
                about,
                Sighting {
                    severity: Some(if stranger { Severity::Medium } else { Severity::Low }),
                    confidence: 0.6,
                    observed: 1.0,
                    unit: "{request}",
                    explanation: format!(
                        "{caller} called {} with success and never did before{}.",
                        c.where_(),
                        if stranger { ", nor anything else of this service" } else { "" }
                    ),
                    ..Sighting::default()
                },
            );
        }
    }

    fn readiness(&self, at: usize, clock: &Clock<'_>) -> Readiness {
        match clock.endpoints.get(at).and_then(|e| self.services.get(&sketch::text(&e.service))) {
            Some(first) => Readiness::after(clock.now.saturating_sub(*first) as f64, self.learn as f64),
            None => Readiness::blind("its callers' workloads are not known"),
        }
    }

    fn save_node(&self) -> Option<serde_json::Value> {
        let services: Vec<u64> = self.services.iter().flat_map(|(key, first)| [*key, *first]).collect();
        Some(serde_json::json!({ "edges": keep::list(&self.edges), "services": keep::list(&services) }))
    }

    fn load_node(&mut self, learned: &serde_json::Value) {
        self.edges.extend(keep::unlist::<u64>(learned.get("edges"), MAX_EDGES));
        for service in keep::words(learned.get("services")).chunks_exact(4).take(MAX_SERVICES) {
            let mut w = Words::new(service);
            self.services.insert(w.long(), w.time());
        }
    }

    fn bytes(&self) -> usize {
        self.edges.capacity() * 9 + self.services.capacity() * 17
    }
}
