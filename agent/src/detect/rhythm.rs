//! D13 and D17: an endpoint does not behave as it did. D13: errors, latency and size drift away. D17: it is
//! used at an hour of the week at which it sleeps.

use super::{
    About, Clock, Context, Detector, Endpoint, Findings, Readiness, Rule, Setting, Settings, Severity, Sighting, entry,
    keep, name, sketch,
};
use crate::exchange::Side;

/// D13.
pub static DRIFT: Rule = Rule {
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

/// D17.
pub static HOURS: Rule = Rule {
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
        if !out.wants(&DRIFT, about) {
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
            &DRIFT,
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
        &DRIFT
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
        &HOURS
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
        if usual >= 0.02 * mean || n < 0.25 * mean || (n - usual) / sigma < 8.0 || !out.wants(&HOURS, c.here()) {
            return;
        }
        out.report(
            &HOURS,
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
