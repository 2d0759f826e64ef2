//! D13: errors, latency or size of an endpoint that left their measure.

use super::{
    About, Clock, Context, Detector, Endpoint, Findings, Readiness, Rule, Setting, Settings, Severity, Sighting, entry,
    keep, name, sketch,
};
use crate::exchange::Side;

/// D13.
pub static RULE: Rule = Rule {
    id: "D13",
    name: "drift",
    title: "Errors, latency or size drift away",
    owasp: &["API4:2023"],
    attack: &["T1499"],
    signal: "share of server errors, mean log duration and mean log response size, by 5 minutes",
    algorithm: "three windows in a row beyond 8 robust standard deviations of the last day's windows, and beyond a \
        difference that matters (5 points of errors, 3 times the duration, 4 times the size). Medium for sizes, which \
        no incident explains; low for the rest",
    source: "median/MAD: Rousseeuw and Croux, JASA 1993",
    memory: "3.4 KB an endpoint with 50 requests in 5 minutes",
    blind: "endpoints below 50 requests in 5 minutes; slow drifts over days",
    settings: &[
        Setting { name: "deviations", default: 8.0, about: "robust standard deviations" },
        Setting { name: "requests", default: 50.0, about: "requests in 5 minutes" },
    ],
};

const WINDOW: u64 = 300;

/// Windows of a day.
const WINDOWS: usize = 288;

/// Windows that must be known.
const LEAST: usize = 144;

#[derive(Default, Clone)]
struct Drifting {
    window: u64,
    n: u32,
    errors: u32,
    duration: f64,
    size: f64,
    history: Vec<[f32; 3]>,
    at: usize,
    row: [u8; 3],
}

/// D13.
pub struct Drift {
    deviations: f64,
    least: f64,
    states: Vec<Drifting>,
}

impl Drift {
    /// With these settings.
    pub fn new(settings: &Settings<'_>) -> Self {
        Self { deviations: settings.get("deviations"), least: settings.get("requests"), states: Vec::new() }
    }

    fn close(&mut self, at: usize, endpoint: &Endpoint, now: u64, out: &mut Findings) {
        let s = &mut self.states[at];
        let n = f64::from(s.n);
        let x = [f64::from(s.errors) / n.max(1.0), s.duration / n.max(1.0), s.size / n.max(1.0)];
        s.window = now / WINDOW;
        (s.n, s.errors, s.duration, s.size) = (0, 0, 0.0, 0.0);
        if n < self.least {
            s.row = [0; 3];
            return;
        }
        let (mut found, mut odd) = (None, false);
        if s.history.len() >= LEAST {
            // Differences that matter: 5 points, and factors in log units.
            for (i, matters) in [0.05, 3f64.ln(), 4f64.ln()].into_iter().enumerate() {
                let mut values: Vec<f64> = s.history.iter().map(|h| f64::from(h[i])).collect();
                let usual = sketch::median(&mut values).unwrap_or(x[i]);
                let sigma = sketch::deviation(&mut values, usual).unwrap_or(0.0).max(0.01);
                let difference = if i == 2 { (x[i] - usual).abs() } else { x[i] - usual };
                if difference > matters && difference > self.deviations * sigma {
                    odd = true;
                    s.row[i] = s.row[i].saturating_add(1);
                    if s.row[i] >= 3 {
                        found = Some((i, x[i], usual, sigma));
                    }
                } else {
                    s.row[i] = 0;
                }
            }
        }
        if !odd || s.row.iter().max().is_some_and(|r| *r > 250) {
            // After most of a day it is usual.
            let v = x.map(|v| v as f32);
            if s.history.len() < WINDOWS {
                s.history.push(v);
            } else {
                s.history[s.at % WINDOWS] = v;
            }
            s.at += 1;
        }
        let about = About { endpoint: Some((at, endpoint)), now, ..About::default() };
        let Some((i, x, usual, sigma)) = found else { return };
        if !out.wants(&RULE, about) {
            return;
        }
        let (observed, expected, unit, what) = match i {
            0 => (x, usual, "1", format!("{:.0} % server errors, where {:.1} % are usual", 100.0 * x, 100.0 * usual)),
            1 => (x.exp() / 1e9, usual.exp() / 1e9, "s", format!("{:.1} times its usual duration", (x - usual).exp())),
            _ => (
                x.exp(),
                usual.exp(),
                "By",
                format!("answers of {:.0} bytes, where {:.0} are usual", x.exp(), usual.exp()),
            ),
        };
        out.report(
            &RULE,
            about,
            Sighting {
                severity: Some(if i == 2 { Severity::Medium } else { Severity::Low }),
                confidence: 0.7,
                observed,
                expected,
                unit,
                evidence: vec![("sigma", sigma), ("windows_in_a_row", 3.0)],
                explanation: format!("{} has {what}, for a quarter of an hour.", name(endpoint)),
                ..Sighting::default()
            },
        );
    }
}

impl Detector for Drift {
    fn rule(&self) -> &'static Rule {
        &RULE
    }

    fn observe(&mut self, c: &Context<'_>, out: &mut Findings) {
        if c.endpoint.side != Side::Server {
            return;
        }
        let window = c.now / WINDOW;
        let s = entry(&mut self.states, c.at);
        if s.window != window {
            if s.window == 0 {
                s.window = window;
            } else {
                self.close(c.at, c.endpoint, c.now, out);
            }
        }
        let s = &mut self.states[c.at];
        s.n += 1;
        s.errors += u32::from(c.x.status >= 500 || c.x.status == 0);
        s.duration += logarithm(c.x.duration_ns);
        s.size += logarithm(c.x.response_bytes);
    }

    fn readiness(&self, at: usize, _: &Clock<'_>) -> Readiness {
        match self.states.get(at) {
            Some(s) if s.at > 0 => Readiness::after(s.history.len() as f64, LEAST as f64),
            _ => Readiness::blind("too few requests in 5 minutes"),
        }
    }

    fn save(&self, at: usize) -> Option<serde_json::Value> {
        let s = self.states.get(at).filter(|s| s.at > 0)?;
        Some(serde_json::json!({ "windows": keep::list(&s.history), "at": s.at % WINDOWS, "row": s.row }))
    }

    fn load(&mut self, at: usize, learned: &serde_json::Value) {
        let history: Vec<[f32; 3]> = keep::unlist(learned.get("windows"), WINDOWS);
        let next = learned.get("at").and_then(serde_json::Value::as_u64).unwrap_or(0) as usize % WINDOWS;
        let row = learned.get("row").and_then(|r| serde_json::from_value(r.clone()).ok()).unwrap_or_default();
        if !history.is_empty() && history.iter().flatten().all(|v| v.is_finite()) {
            // A full turn more: 0 would say that there is nothing yet.
            *entry(&mut self.states, at) = Drifting { history, at: next + WINDOWS, row, ..Drifting::default() };
        }
    }

    fn bytes(&self) -> usize {
        self.states.iter().map(|s| s.history.capacity() * 12 + size_of::<Drifting>()).sum()
    }
}

/// Natural logarithm within 0.06, by the leading bits: it is added up a million times a second.
fn logarithm(value: u64) -> f64 {
    let value = value.max(1);
    let power = value.ilog2();
    let fraction = value as f64 / (1u64 << power) as f64 - 1.0;
    (f64::from(power) + fraction) * std::f64::consts::LN_2
}
