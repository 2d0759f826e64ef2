//! D17: use at hours of the week that had none.

use super::{Clock, Context, Detector, Findings, Readiness, Rule, Setting, Settings, Severity, Sighting, entry, keep};
use crate::exchange::Side;

/// D17.
pub static RULE: Rule = Rule {
    id: "D17",
    name: "off-hours",
    title: "Used at an hour at which it sleeps",
    owasp: &["API6:2023"],
    attack: &["T1078"],
    signal: "successes of an endpoint by hour of the week",
    algorithm: "after 3 weeks: an hour of the week whose usual is below 2 % of the mean hour and that brings 100 successes, \
        a quarter of the mean hour and 8 standard deviations of a negative binomial; low, medium with ten times the mean",
    source: "negative binomial counts (overdispersed Poisson)",
    memory: "672 bytes an endpoint",
    blind: "endpoints that are used at all hours; the first 3 weeks",
    settings: &[
        Setting { name: "successes", default: 100.0, about: "successes in an hour" },
        Setting { name: "learn_weeks", default: 3.0, about: "weeks before it is judged" },
    ],
};

#[derive(Default, Clone)]
struct Week {
    hour: u64,
    first: u64,
    n: u32,
    usual: Vec<f32>,
}

/// D17.
pub struct OffHours {
    least: f64,
    learn: u64,
    weeks: Vec<Week>,
}

impl OffHours {
    /// With these settings.
    pub fn new(settings: &Settings<'_>) -> Self {
        Self {
            least: settings.get("successes"),
            learn: (settings.get("learn_weeks") * 168.0) as u64,
            weeks: Vec::new(),
        }
    }
}

impl Detector for OffHours {
    fn rule(&self) -> &'static Rule {
        &RULE
    }

    fn observe(&mut self, c: &Context<'_>, out: &mut Findings) {
        if c.endpoint.side != Side::Server || !c.success || c.endpoint.probe {
            return;
        }
        let hour = c.now / 3600;
        let w = entry(&mut self.weeks, c.at);
        if w.usual.is_empty() {
            *w = Week { hour, first: hour, n: 0, usual: vec![0.0; 168] };
        }
        if w.hour != hour {
            // Hours without a request were hours with none.
            for h in w.hour..hour.min(w.hour + 168) {
                let n = if h == w.hour { w.n as f32 } else { 0.0 };
                let usual = &mut w.usual[(h % 168) as usize];
                let weight = if h < w.first + 168 { 1.0 } else { 0.34 };
                *usual += (n - *usual) * weight;
            }
            (w.hour, w.n) = (hour, 0);
        }
        w.n += 1;
        let n = f64::from(w.n);
        if n < self.least || !w.n.is_multiple_of(32) || hour < w.first + self.learn {
            return;
        }
        let mean = w.usual.iter().map(|u| f64::from(*u)).sum::<f64>() / 168.0;
        // Neighbouring hours count too: clocks change, jobs are late.
        let around = [hour - 1, hour, hour + 1].map(|h| f64::from(w.usual[(h % 168) as usize]));
        let usual = around.into_iter().fold(0.0, f64::max);
        let sigma = (usual + 0.5 * usual * usual + 1.0).sqrt();
        if usual >= 0.02 * mean || n < 0.25 * mean || (n - usual) / sigma < 8.0 || !out.wants(&RULE, c.here()) {
            return;
        }
        out.report(
            &RULE,
            c.here(),
            Sighting {
                severity: Some(if n > 10.0 * mean { Severity::Medium } else { Severity::Low }),
                confidence: 0.5,
                observed: n,
                expected: usual,
                unit: "{request}",
                evidence: vec![("mean_hour", mean)],
                explanation: format!(
                    "{} answered {n:.0} requests in an hour of the week in which it gets {usual:.0}.",
                    c.where_()
                ),
                ..Sighting::default()
            },
        );
    }

    fn readiness(&self, at: usize, clock: &Clock<'_>) -> Readiness {
        match self.weeks.get(at).filter(|w| !w.usual.is_empty()) {
            Some(w) => Readiness::after((clock.now / 3600).saturating_sub(w.first) as f64, self.learn as f64),
            None => Readiness::blind("no success yet"),
        }
    }

    fn bytes(&self) -> usize {
        self.weeks.iter().map(|w| w.usual.capacity() * 4 + size_of::<Week>()).sum()
    }

    fn save(&self, at: usize) -> Option<serde_json::Value> {
        self.weeks
            .get(at)
            .filter(|w| !w.usual.is_empty())
            .map(|w| serde_json::json!({ "first": w.first, "hour": w.hour, "n": w.n, "usual": keep::list(&w.usual) }))
    }

    fn load(&mut self, at: usize, learned: &serde_json::Value) {
        let usual: Vec<f32> = keep::unlist(learned.get("usual"), 168);
        let n = learned.get("n").and_then(serde_json::Value::as_u64).and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
        if usual.len() == 168 {
            let (first, hour) = (keep::time(learned.get("first")), keep::time(learned.get("hour")));
            *entry(&mut self.weeks, at) = Week { hour, first, n: n.min(u32::MAX / 2), usual };
        }
    }
}
