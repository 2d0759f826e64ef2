//! D7: an endpoint hands out more different objects for its requests than it does at this hour of the
//! week. Who asks does not matter: a leak spread over thousands of principals moves the ratio all the same.

use super::{
    About, Clock, Context, Detector, Endpoint, Findings, Readiness, Rule, Setting, Settings, Severity, Sighting, entry,
    keep, name,
    sketch::{self, Distinct},
};

/// The rule.
pub static RULE: Rule = Rule {
    id: "D7",
    name: "slow-extraction",
    title: "More different objects than usual",
    owasp: &["API1:2023", "API6:2023"],
    attack: &["T1530", "T1030"],
    signal: "log(distinct objects / requests) and log(distinct objects / distinct principals) of each hour, of each \
        principal the first 20 objects",
    algorithm: "against the median of the same hour of the week (of the day, of the last day until there are weeks), in \
        robust standard deviations, added up by CUSUM (k = 1, h = 8; 16 when only the first ratio moves, and then the objects themselves must be more than usual). Hours under \
        suspicion are not learned. Exposed objects: those that a mixture with the usual ratio does not explain",
    source: "CUSUM: Page, Biometrika 41, 1954; median/MAD: Rousseeuw and Croux, JASA 1993; counting: Ting, KDD 2014",
    memory: "4 weeks of hours (8 KB) and three bitmaps of 128 bytes to 32 KiB, by load, an endpoint with objects in its path",
    blind: "endpoints with fewer than 200 requests an hour, or whose every request is for another object anyway",
    settings: &[
        Setting { name: "h", default: 8.0, about: "decision level of the CUSUM, in standard deviations" },
        Setting { name: "floor", default: 0.02, about: "smallest standard deviation that is believed, in log units" },
        Setting { name: "requests", default: 200.0, about: "requests an hour below which nothing is judged" },
        Setting { name: "learn_hours", default: 48.0, about: "hours with enough requests before anything is said" },
    ],
};

const WEEK: usize = 168;
const HISTORY: usize = 4 * WEEK;
/// What a CUSUM gives away each hour.
const K: f64 = 1.0;
/// A CUSUM above this freezes the baseline.
const SUSPICIOUS: f64 = 4.0;
/// Highest score of one hour.
const MAX_Z: f64 = 12.0;

#[derive(Default, Clone)]
struct State {
    on: bool,
    hour: u64,
    requests: u32,
    objects: Distinct,
    actors: Distinct,
    /// Objects that somebody read who read many in this hour, known jobs left out.
    beyond: Distinct,
    usually_beyond: f64,
    /// By hour modulo four weeks: both ratios and the log of the objects; NaN where unknown.
    history: Vec<[f32; 3]>,
    /// Last prediction errors.
    errors: Vec<[f32; 3]>,
    /// Hours with enough requests.
    known: u32,
    cusum: [f64; 3],
    /// Objects since the first CUSUM left 0, and when it did.
    exposed: f64,
    since: u64,
    requests_per_hour: f64,
    sigma: f64,
    ratio: f64,
}

/// The detector.
pub struct SlowLeak {
    h: f64,
    floor: f64,
    least: f64,
    learn: f64,
    states: Vec<State>,
}

impl SlowLeak {
    /// With these settings.
    pub fn new(settings: &Settings<'_>) -> Self {
        Self {
            h: settings.get("h"),
            floor: settings.get("floor"),
            least: settings.get("requests"),
            learn: settings.get("learn_hours"),
            states: Vec::new(),
        }
    }

    fn hour(&mut self, at: usize, endpoint: &Endpoint, now: u64, out: &mut Findings) {
        let (h, floor, least, learn) = (self.h, self.floor, self.least, self.learn);
        let s = &mut self.states[at];
        let (requests, objects, actors) = (f64::from(s.requests), s.objects.count(), s.actors.count());
        let beyond = s.beyond.count();
        let hour = s.hour;
        s.hour = now / 3600;
        s.requests = 0;
        s.objects.clear();
        s.actors.clear();
        s.beyond.clear();
        s.requests_per_hour += (requests - s.requests_per_hour) * 0.1;
        let at_hour = (hour % HISTORY as u64) as usize;
        if s.history.is_empty() {
            s.history = vec![[f32::NAN; 3]; HISTORY];
        }
        // Hours without traffic, and the one four weeks ago, say nothing.
        for missed in hour..s.hour.min(hour + HISTORY as u64) {
            s.history[(missed % HISTORY as u64) as usize] = [f32::NAN; 3];
        }
        if requests < least || objects < 20.0 {
            return;
        }
        let x = [(objects / requests).ln(), (objects / actors.max(1.0)).ln(), objects.ln()];
        let learned = f64::from(s.known) >= learn;
        s.known = s.known.saturating_add(1);
        let Some(usual) = predict(&s.history, hour) else {
            s.history[at_hour] = x.map(|v| v as f32);
            return;
        };
        let noise = 1.5 / objects.sqrt();
        let mut z = [0.0; 3];
        for i in 0..3 {
            let mut errors: Vec<f64> = s.errors.iter().map(|e| f64::from(e[i])).collect();
            let sigma = sketch::deviation(&mut errors, 0.0).unwrap_or(0.1).max(floor).max(noise);
            z[i] = ((x[i] - usual[i]) / sigma).clamp(-MAX_Z, MAX_Z);
            if i == 0 {
                (s.sigma, s.ratio) = (sigma, usual[0].exp());
            }
        }
        // While it learns, the sums stay 0 and hours are not judged; the last one counts if a leak goes on after it.
        if learned {
            for (sum, z) in s.cusum.iter_mut().zip(z) {
                *sum = (*sum + z - K).clamp(0.0, 4.0 * h);
            }
        }
        // objects = leaked + ratio * (requests - leaked), and what was not counted there. The hour before the sum began to rise counts: the
        // leak seldom begins with an hour.
        let ratio = s.ratio.min(0.99);
        let excess = (objects - ratio * requests) / (1.0 - ratio) + (beyond - s.usually_beyond).max(0.0);
        if s.cusum[0] <= 0.0 {
            (s.exposed, s.since) = (excess, s.hour);
        } else {
            s.exposed += excess;
        }
        let sure = s.cusum[1] > h / 2.0;
        // A release after which programs ask less often moves the ratio too, but brings no more objects.
        let fires = s.cusum[0] > if sure { h } else { 2.0 * h } && (sure || s.cusum[2] > SUSPICIOUS);
        let about = About { endpoint: Some((at, endpoint)), now, ..About::default() };
        if fires {
            let hours = s.hour.saturating_sub(s.since).max(1);
            let (observed, expected, exposed, cusum) = (objects / requests, s.ratio, s.exposed.max(0.0), s.cusum);
            if out.wants(&RULE, about) {
                out.report(
                    &RULE,
                    about,
                    Sighting {
                        severity: Some(if sure { Severity::Critical } else { Severity::High }),
                        confidence: if sure { 0.9 } else { 0.6 },
                        observed,
                        expected,
                        unit: "{object}/{request}",
                        records: Some(exposed),
                        evidence: vec![
                            ("hours", hours as f64),
                            ("cusum", cusum[0]),
                            ("cusum_per_principal", cusum[1]),
                            ("requests", requests),
                            ("objects", objects),
                            ("principals", actors),
                        ],
                        explanation: format!(
                            "{} handed out {:.0} % more different objects than usual at this time for as many requests, for {hours} h: about {exposed:.0} records may have been read that nobody usually reads.",
                            name(endpoint),
                            100.0 * (observed / expected - 1.0),
                        ),
                    },
                );
            }
        }
        let frozen = learned && (s.cusum[0] > SUSPICIOUS || out.covers(&RULE, endpoint));
        let s = &mut self.states[at];
        if !frozen {
            learn_from(s, at_hour, x, usual);
            s.usually_beyond += (beyond - s.usually_beyond) * 0.1;
        }
    }
}

fn learn_from(s: &mut State, at_hour: usize, x: [f64; 3], usual: [f64; 3]) {
    s.history[at_hour] = x.map(|v| v as f32);
    if s.errors.len() >= WEEK {
        s.errors.remove(0);
    }
    s.errors.push([0, 1, 2].map(|i| (x[i] - usual[i]) as f32));
}

/// What is usual at an hour: the median of the same hour of weeks, else of days, else of the last day.
fn predict(history: &[[f32; 3]], hour: u64) -> Option<[f64; 3]> {
    let values = |step: u64, most: u64, least: usize| -> Option<[f64; 3]> {
        let back = (1..=most).filter_map(|n| hour.checked_sub(n * step));
        let known: Vec<_> = back.map(|h| history[(h % HISTORY as u64) as usize]).filter(|v| !v[0].is_nan()).collect();
        if known.len() < least {
            return None;
        }
        let mut columns = [0, 1, 2].map(|i| known.iter().map(|v| f64::from(v[i])).collect::<Vec<_>>());
        // The median of two would be the higher one: what is usual would be too much, and leaks look small.
        if known.len() < 3 {
            return Some(columns.map(|c| c.iter().sum::<f64>() / c.len() as f64));
        }
        let [a, b, c] = &mut columns;
        Some([sketch::median(a)?, sketch::median(b)?, sketch::median(c)?])
    };
    values(WEEK as u64, 3, 3).or_else(|| values(24, 14, 2)).or_else(|| values(1, 24, 3))
}

impl Detector for SlowLeak {
    fn rule(&self) -> &'static Rule {
        &RULE
    }

    fn observe(&mut self, c: &Context<'_>, out: &mut Findings) {
        if c.params.is_empty() || !c.success || c.endpoint.side != crate::exchange::Side::Server {
            return;
        }
        let hour = c.now / 3600;
        let state = entry(&mut self.states, c.at);
        if state.hour != hour {
            if state.on {
                self.hour(c.at, c.endpoint, c.now, out);
            } else {
                (state.on, state.hour) = (true, hour);
            }
        }
        let state = &mut self.states[c.at];
        // A job that reads everything would hide the rest. Known or not, it is left out from its first hour on, or
        // what is usual would change when it becomes known; but what it read counts as exposed.
        if c.beyond.get() {
            if !c.bulk.get() {
                state.beyond.add(c.params.object);
            }
            return;
        }
        state.requests += 1;
        state.objects.add(c.params.object);
        state.actors.add(c.actor);
    }

    fn minute(&mut self, clock: &Clock<'_>, out: &mut Findings) {
        for at in 0..self.states.len() {
            if self.states[at].on
                && clock.now / 3600 > self.states[at].hour
                && let Some(endpoint) = clock.endpoints.get(at)
            {
                self.hour(at, endpoint, clock.now, out);
            }
        }
    }

    fn readiness(&self, at: usize, _: &Clock<'_>) -> Readiness {
        let Some(s) = self.states.get(at).filter(|s| s.on) else {
            return Readiness::blind("its path names no object");
        };
        if s.requests_per_hour < self.least && s.known > 0 {
            return Readiness::blind("too few requests an hour");
        }
        if f64::from(s.known) < self.learn {
            return Readiness::Learning { progress: f64::from(s.known) / self.learn };
        }
        if s.ratio > 0.9 {
            return Readiness::blind("nearly every request is for another object anyway");
        }
        // The leak that moves the ratio by K + h/8 standard deviations: found within 8 hours.
        let rise = ((K + self.h / 8.0) * s.sigma).exp();
        let (r, n) = (s.ratio, s.requests_per_hour);
        let leak = n * r * (rise - 1.0) / (1.0 - r * rise).max(0.01);
        Readiness::Armed { minimum_per_hour: Some(leak), within_s: Some(8.0 * 3600.0) }
    }

    fn bytes(&self) -> usize {
        self.states
            .iter()
            .map(|s| {
                s.objects.bytes()
                    + s.actors.bytes()
                    + s.beyond.bytes()
                    + s.history.capacity() * 12
                    + s.errors.capacity() * 12
                    + size_of::<State>()
            })
            .sum()
    }

    fn save(&self, at: usize) -> Option<serde_json::Value> {
        let s = self.states.get(at).filter(|s| s.on && !s.history.is_empty())?;
        Some(serde_json::json!({
            "history": keep::list(&s.history), "errors": keep::list(&s.errors), "known": s.known,
            "rate": s.requests_per_hour, "ratio": s.ratio, "sigma": s.sigma,
            "cusum": s.cusum, "exposed": s.exposed, "since": s.since, "usually_beyond": s.usually_beyond,
        }))
    }

    fn load(&mut self, at: usize, learned: &serde_json::Value) {
        #[derive(serde::Deserialize)]
        struct Learned {
            known: u32,
            rate: f64,
            ratio: f64,
            sigma: f64,
            cusum: [f64; 3],
            exposed: f64,
            since: u64,
            usually_beyond: f64,
        }
        let history = keep::unlist(learned.get("history"), HISTORY);
        let errors = keep::unlist(learned.get("errors"), WEEK);
        let Ok(learned) = serde_json::from_value::<Learned>(learned.clone()) else { return };
        if history.len() != HISTORY {
            return;
        }
        let state = entry(&mut self.states, at);
        (state.history, state.errors, state.known) = (history, errors, learned.known);
        (state.cusum, state.exposed, state.since) = (learned.cusum, learned.exposed, learned.since);
        state.usually_beyond = learned.usually_beyond;
        (state.requests_per_hour, state.ratio, state.sigma) = (learned.rate, learned.ratio, learned.sigma);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_days_are_averaged_and_three_give_their_median() {
        let mut history = vec![[f32::NAN; 3]; HISTORY];
        let hour = 10 * WEEK as u64;
        let mut set = |days: u64, value: f32| history[((hour - 24 * days) % HISTORY as u64) as usize] = [value; 3];
        set(1, -1.0);
        set(2, -0.5);
        let two = predict(&history, hour).expect("two days are enough");
        assert!(two.iter().all(|v| (v + 0.75).abs() < 1e-6), "{two:?}");
        history[((hour - 72) % HISTORY as u64) as usize] = [5.0; 3];
        let three = predict(&history, hour).expect("three days are enough");
        assert!(three.iter().all(|v| (v + 0.5).abs() < 1e-6), "{three:?}");
    }
}
