//! D5: numeric ids of one endpoint are walked, by however many principals.

use super::{
    Clock, Context, Detector, Findings, Readiness, Rule, Setting, Settings, Severity, Sighting, entry, sketch,
    sketch::{CountMin, Seen},
};

/// The rule.
pub static RULE: Rule = Rule {
    id: "D5",
    name: "id-walk",
    title: "Neighbouring ids are walked",
    owasp: &["API1:2023"],
    attack: &["T1530", "T1119"],
    signal: "ids not seen in the last 30 s, by neighbourhood of 1,024, whoever asks for them",
    algorithm: "distinct ids per neighbourhood in 30 s; a neighbourhood far above the mean of all (z-score over Poisson \
        noise, twice the highest usual one) is being walked. Left out: the newest ids, where all new customers are, and \
        principals that D4 knows as batch jobs. Who reads much in the first day of an endpoint may be a job that is not \
        known yet: it is counted for itself, and its walk is said as low; of several who walk the same ids as critical",
    source: "count-min sketch: Cormode and Muthukrishnan 2005; blocked Bloom filter: Putze et al. 2007",
    memory: "one Bloom filter of 1 MiB, two sketches of 256 KiB for the node, and 96 bytes an endpoint",
    blind: "ids that are no numbers; endpoints with fewer than 4 neighbourhoods in use; walks below about 1.5 ids a second; \
        walks of the newest ids",
    settings: &[
        Setting { name: "minimum", default: 40.0, about: "distinct ids of a neighbourhood in 30 s" },
        Setting { name: "deviations", default: 10.0, about: "standard deviations above the mean" },
        Setting {
            name: "learn_minutes",
            default: 60.0,
            about: "minutes that an endpoint is watched before anything is said",
        },
    ],
};

/// Length of a window, s.
const WINDOW: u64 = 30;
/// Neighbourhoods that must be in use.
const MIN_ACTIVE: u32 = 4;
/// Neighbourhoods at the upper end that are left out.
const FRONTIER: u64 = 2;

#[derive(Default, Clone)]
struct State {
    numeric: bool,
    first: u64,
    window: u64,
    distinct: u32,
    active: u32,
    last_mean: f32,
    frontier: u64,
    next_frontier: u64,
    /// Highest z-score of the window, and the usual highest.
    top: f32,
    usual: f32,
    windows: u32,
    /// Mean of distinct ids a window.
    rate: f32,
    /// The walk under way: where it was last, and how many ids it took in windows before this one.
    walk: Option<(u64, f64)>,
    /// Who is taken for a job and walked last, and where.
    job: Option<(u64, u64)>,
    suspicious: bool,
}

/// The detector.
pub struct Walk {
    minimum: f64,
    deviations: f64,
    learn: u64,
    window: u64,
    seen: Seen,
    counts: [CountMin; 2],
    states: Vec<State>,
}

impl Walk {
    /// With these settings.
    pub fn new(settings: &Settings<'_>) -> Self {
        Self {
            minimum: settings.get("minimum"),
            deviations: settings.get("deviations"),
            learn: (settings.get("learn_minutes") * 60.0) as u64,
            window: 0,
            seen: Seen::default(),
            counts: [CountMin::default(), CountMin::default()],
            states: Vec::new(),
        }
    }

    fn roll(&mut self, window: u64) {
        let next = window == self.window + 1;
        self.window = window;
        self.seen.clear();
        self.counts.swap(0, 1);
        self.counts[0].clear();
        if !next {
            self.counts[1].clear();
        }
    }

    /// Ids of a neighbourhood and of the next ones to it in this window and the last, above the mean.
    fn walked(&self, place: u64, bucket: u64, means: [f64; 2]) -> f64 {
        let mut sum = 0.0;
        for (counts, mean) in self.counts.iter().zip(means) {
            for b in [bucket.wrapping_sub(1), bucket, bucket + 1] {
                let above = f64::from(counts.get(key(place, b))) - mean;
                // A neighbour counts when it is walked too.
                if b == bucket || above > 4.0 * (mean + 1.0).sqrt() {
                    sum += above.max(0.0);
                }
            }
        }
        sum
    }
}

fn key(place: u64, bucket: u64) -> u64 {
    place ^ sketch::mix(bucket)
}

impl Detector for Walk {
    fn rule(&self) -> &'static Rule {
        &RULE
    }

    fn observe(&mut self, c: &Context<'_>, out: &mut Findings) {
        if c.params.is_empty() || !(c.success || c.x.status == 404) || c.endpoint.side != crate::exchange::Side::Server
        {
            return;
        }
        let window = c.now / WINDOW;
        if window != self.window {
            self.roll(window);
        }
        for (position, param) in c.params.list().iter().enumerate() {
            let Some(bucket) = param.bucket else { continue };
            let place = c.endpoint.hash.rotate_left(position as u32 * 5 + 1);
            let state = entry(&mut self.states, c.at);
            if !state.numeric {
                *state = State { numeric: true, first: c.now, window, ..State::default() };
            }
            if state.window != window {
                state.last_mean =
                    if window == state.window + 1 { state.distinct as f32 / state.active.max(1) as f32 } else { 0.0 };
                if !state.suspicious {
                    state.usual = (state.usual * 0.9995).max(state.top);
                }
                state.rate += (state.distinct as f32 - state.rate) / (state.windows + 1).min(240) as f32;
                state.windows += 1;
                state.frontier = state.frontier.max(state.next_frontier);
                state.suspicious = false;
                (state.window, state.distinct, state.active, state.top) = (window, 0, 0, 0.0);
            }
            if !self.seen.add(param.hash ^ place) {
                continue;
            }
            if c.success {
                state.next_frontier = state.next_frontier.max(bucket);
            }
            if c.bulk.get() && !c.presumed.get() {
                continue;
            }
            // Who is taken for a job is counted apart: its ids must not make others suspicious.
            let own = c.presumed.get().then(|| place ^ sketch::mix(c.actor));
            let n = self.counts[0].add(key(own.unwrap_or(place), bucket));
            if own.is_none() {
                state.distinct += 1;
                state.active += u32::from(n == 1);
            }
            if bucket + FRONTIER > state.frontier || n < 4 {
                continue;
            }
            let others = state.distinct - if own.is_none() { u32::from(n) } else { 0 };
            let mean = f64::from(others) / f64::from(state.active.max(2) - 1);
            let z = (f64::from(n) - mean) / (mean + 1.0).sqrt();
            let limit = self.deviations.max(2.0 * f64::from(state.usual));
            let learned = c.now >= state.first + self.learn && state.active.max(MIN_ACTIVE) == state.active;
            let much = f64::from(n) >= self.minimum && z >= limit;
            if !much && own.is_none() {
                state.top = state.top.max(z as f32);
            }
            if !learned || !much {
                continue;
            }
            let alone =
                own.is_some() && state.job.is_none_or(|(who, near)| who == c.actor || bucket.abs_diff(near) > FRONTIER);
            let about = if alone { c.actor_here() } else { c.here() };
            if own.is_some() {
                state.job = Some((c.actor, bucket));
            } else {
                state.suspicious = true;
            }
            let before = match state.walk {
                Some((last, total)) if bucket.abs_diff(last) <= FRONTIER => total,
                _ => 0.0,
            };
            let means = [mean, f64::from(state.last_mean)];
            if !out.wants(&RULE, about) {
                continue;
            }
            let apart = own.map_or(0.0, |own| self.walked(own, bucket, [0.0; 2]));
            let walked = (self.walked(place, bucket, means) + apart).max(before);
            if let Some(state) = self.states.get_mut(c.at) {
                state.walk = Some((bucket, walked));
            }
            let (who, severity, confidence) = if alone {
                let who = format!(
                    "{} walks through the ids; it may be a job: the endpoint is known for less than a day.",
                    c.who()
                );
                (who, Severity::Low, 0.4)
            } else {
                let who = "somebody walks through the ids, under one name or many.".to_owned();
                (who, Severity::Critical, (0.7 + z / 200.0).min(0.97))
            };
            out.report(
                &RULE,
                about,
                Sighting {
                    severity: Some(severity),
                    confidence,
                    observed: f64::from(n),
                    expected: mean,
                    unit: "{object}",
                    records: Some(walked),
                    evidence: vec![("window_s", WINDOW as f64), ("z", z), ("limit_z", limit)],
                    explanation: format!(
                        "{n} neighbouring ids of {} were asked for within {WINDOW} s, where {mean:.1} are usual: {who}",
                        c.where_(),
                    ),
                },
            );
        }
    }

    fn readiness(&self, at: usize, clock: &Clock<'_>) -> Readiness {
        let Some(s) = self.states.get(at).filter(|s| s.numeric) else {
            return Readiness::blind("its path holds no number");
        };
        if clock.now < s.first + self.learn {
            return Readiness::Learning { progress: (clock.now - s.first) as f64 / self.learn as f64 };
        }
        if s.frontier < FRONTIER + u64::from(MIN_ACTIVE) {
            return Readiness::blind("its ids are too few to have neighbourhoods");
        }
        let mean = f64::from(s.last_mean);
        let needed = self.minimum.max(mean + self.deviations.max(2.0 * f64::from(s.usual)) * (mean + 1.0).sqrt());
        Readiness::Armed {
            minimum_per_hour: Some(needed * 3600.0 / WINDOW as f64),
            within_s: Some(2.0 * WINDOW as f64),
        }
    }

    fn bytes(&self) -> usize {
        (1 << 20) + (2 << 18) + self.states.capacity() * size_of::<State>()
    }

    fn save(&self, at: usize) -> Option<serde_json::Value> {
        let s = self.states.get(at).filter(|s| s.numeric)?;
        Some(
            serde_json::json!({ "first": s.first, "usual": s.usual, "frontier": s.frontier, "rate": s.rate, "windows": s.windows }),
        )
    }

    fn load(&mut self, at: usize, learned: &serde_json::Value) {
        let number = |key: &str| learned.get(key).and_then(serde_json::Value::as_f64).unwrap_or(0.0);
        let state = entry(&mut self.states, at);
        state.numeric = true;
        (state.first, state.frontier) =
            ((number("first") as u64).min(1 << 47), (number("frontier") as u64).min(1 << 60));
        state.next_frontier = state.frontier;
        (state.usual, state.rate, state.windows) =
            (number("usual") as f32, number("rate") as f32, number("windows") as u32);
    }
}
