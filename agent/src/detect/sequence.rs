//! D18: steps that do not follow each other.

use rustc_hash::FxHashMap;

use super::{
    Clock, Context, Detector, Findings, MAX_PRINCIPALS, Readiness, Rule, Setting, Settings, Severity, Sighting, entry,
    keep::{self, Packed, Words},
};
use crate::exchange::Side;

/// D18.
pub static RULE: Rule = Rule {
    id: "D18",
    name: "broken-sequence",
    title: "A principal goes a way that nobody goes",
    owasp: &["API6:2023"],
    attack: &["T1078"],
    signal: "pairs of endpoints that a principal uses one after the other, within half an hour",
    algorithm: "order-1 Markov chain; the mean surprise of at least 40 steps of a principal in a day above 4 nats and 6 \
        standard deviations of what others have after 8 steps; steps of the suspicious are learned one in 16. Low: it \
        supports other findings",
    source: "Markov chain with additive smoothing",
    memory: "13 bytes a pair (16,384), 16 a principal (50,000)",
    blind: "endpoints younger than 7 days or left less than 1,000 times; principals below 40 steps a day; before 200 \
        principals went 8 steps in a day",
    settings: &[
        Setting { name: "steps", default: 40.0, about: "steps of a principal in a day" },
        Setting { name: "nats", default: 4.0, about: "mean surprise of its steps" },
        Setting { name: "learn_days", default: 7.0, about: "days before it is judged" },
    ],
};

/// Pairs of endpoints.
const MAX_PAIRS: usize = 16_384;

/// Steps in a day after which a principal counts into what is usual: the mean of so few varies more than
/// that of the steps that a finding needs, so that deviations of it are on the safe side.
const KNOWN: u16 = 8;

/// Days of principals that must have counted.
const LEAST: f64 = 200.0;

/// Steps farther apart are none, s.
const STEP: u32 = 1_800;

#[derive(Default, Clone, Copy)]
struct Walker {
    last: u32,
    minute: u32,
    day: u16,
    steps: u16,
    surprise: f32,
}

/// D18.
pub struct Sequence {
    steps: f64,
    nats: f64,
    learn: u64,
    /// Uses by (from, to), and by (from, 0) for all that go on from there.
    pairs: FxHashMap<u64, u32>,
    decayed: u64,
    walkers: Vec<Walker>,
    /// Mean and mean square of principals' mean surprise at their [`KNOWN`]th step of a day.
    mean: f64,
    square: f64,
    days: f64,
}

impl Sequence {
    /// With these settings.
    pub fn new(settings: &Settings<'_>) -> Self {
        Self {
            steps: settings.get("steps"),
            nats: settings.get("nats"),
            learn: (settings.get("learn_days") * 86_400.0) as u64,
            pairs: FxHashMap::default(),
            decayed: 0,
            walkers: Vec::new(),
            mean: 2.0,
            square: 5.0,
            days: 0.0,
        }
    }
}

impl Packed for Walker {
    const WORDS: usize = 4;
    fn pack(&self, out: &mut Vec<u32>) {
        let today = u32::from(self.day) << 16 | u32::from(self.steps);
        out.extend([self.last, self.minute, today, self.surprise.to_bits()]);
    }
    fn unpack(w: &mut Words<'_>) -> Self {
        let (last, minute, today) = (w.word(), w.word(), w.word());
        Self { last, minute, day: (today >> 16) as u16, steps: today as u16, surprise: w.float() }
    }
}

impl Sequence {
    /// Adds to a count and gives it, at least 1; nothing when the table is full.
    fn count(&mut self, key: u64, more: u32) -> Option<f64> {
        if let Some(n) = self.pairs.get_mut(&key) {
            *n = n.saturating_add(more);
            return Some(f64::from((*n).max(1)));
        }
        (self.pairs.len() < MAX_PAIRS).then(|| {
            self.pairs.insert(key, 1);
            1.0
        })
    }
}

impl Detector for Sequence {
    fn rule(&self) -> &'static Rule {
        &RULE
    }

    fn observe(&mut self, c: &Context<'_>, out: &mut Findings) {
        if !c.named || c.endpoint.side != Side::Server || c.endpoint.probe {
            return;
        }
        let (minute, day) = ((c.now / 60) as u32, (c.now / 86_400) as u16);
        // Half of the hash: the same over restarts, and 2,000 endpoints are all different at 1,999 of 2,000 nodes.
        let at = (c.endpoint.hash >> 32) as u32 | 1;
        let w = entry(&mut self.walkers, c.principal.index);
        if c.principal.fresh {
            *w = Walker::default();
        }
        if w.day != day {
            (w.day, w.steps, w.surprise) = (day, 0, 0.0);
        }
        let last = std::mem::replace(&mut w.last, at);
        let idle = minute.wrapping_sub(std::mem::replace(&mut w.minute, minute));
        if last == 0 || idle > STEP / 60 {
            return;
        }
        // Who goes odd ways does not make them usual; one step in 16 counts, or a release would stay odd.
        let odd = w.steps >= KNOWN && f64::from(w.surprise) >= self.nats * f64::from(w.steps);
        let counts = u32::from(!odd || w.steps.is_multiple_of(16));
        let (all, way) = (u64::from(last) << 32, u64::from(last) << 32 | u64::from(at));
        let Some(total) = self.count(all, counts) else { return };
        let Some(seen) = self.count(way, counts) else { return };
        let w = &mut self.walkers[c.principal.index];
        // Young endpoints have no ways yet.
        if c.now < c.endpoint.first_seen + self.learn || total < 1_000.0 {
            return;
        }
        w.steps = w.steps.saturating_add(1);
        w.surprise += -(seen / total).ln() as f32;
        let mean = f64::from(w.surprise) / f64::from(w.steps);
        if w.steps == KNOWN {
            // Each principal says once a day what is usual, and no oddity can say more than a finding needs.
            let said = mean.min(self.nats);
            let weight = 1.0 / (self.days + 1.0).min(2_000.0);
            self.mean += (said - self.mean) * weight;
            self.square += (said * said - self.square) * weight;
            self.days += 1.0;
        }
        if f64::from(w.steps) < self.steps || mean < self.nats || self.days < LEAST {
            return;
        }
        let sigma = (self.square - self.mean * self.mean).max(0.04).sqrt();
        if mean > self.mean + 6.0 * sigma && out.wants(&RULE, c.actor_anywhere()) {
            out.report(
                &RULE,
                c.actor_anywhere(),
                Sighting {
                    severity: Some(Severity::Low),
                    confidence: 0.4,
                    observed: mean,
                    expected: self.mean,
                    unit: "nat",
                    evidence: vec![("steps", f64::from(w.steps))],
                    explanation: format!(
                        "{} went {} steps through {} in an order in which hardly anybody goes.",
                        c.who(),
                        w.steps,
                        c.endpoint.service
                    ),
                    ..Sighting::default()
                },
            );
        }
    }

    fn minute(&mut self, clock: &Clock<'_>, _: &mut Findings) {
        if clock.now / 86_400 > self.decayed {
            self.decayed = clock.now / 86_400;
            // An eighth is forgotten each day: ways that nobody goes any more make room.
            self.pairs.retain(|_, n| {
                *n = (u64::from(*n) * 7 / 8) as u32;
                *n > 0
            });
        }
    }

    fn readiness(&self, at: usize, clock: &Clock<'_>) -> Readiness {
        let age = clock.endpoints.get(at).map_or(0, |e| clock.now.saturating_sub(e.first_seen)) as f64
            / self.learn.max(1) as f64;
        Readiness::after(age.min(self.days / LEAST), 1.0)
    }

    fn save_node(&self) -> Option<serde_json::Value> {
        let mut pairs = Vec::new();
        for (key, n) in &self.pairs {
            keep::long(&mut pairs, *key);
            pairs.push(*n);
        }
        let pairs = keep::text(&pairs);
        Some(serde_json::json!({
            "pairs": pairs, "decayed": self.decayed, "mean": self.mean, "square": self.square, "days": self.days,
        }))
    }

    fn load_node(&mut self, learned: &serde_json::Value) {
        let number = |key: &str| learned.get(key).and_then(serde_json::Value::as_f64);
        let (Some(mean), Some(square), Some(days)) = (number("mean"), number("square"), number("days")) else { return };
        (self.mean, self.square, self.days) = (mean, square, days);
        self.decayed = keep::time(learned.get("decayed"));
        for pair in keep::words(learned.get("pairs")).chunks_exact(3).take(MAX_PAIRS) {
            let mut w = Words::new(pair);
            self.pairs.insert(w.long(), w.word());
        }
    }

    fn save_principals(&self, slots: &[usize]) -> Option<serde_json::Value> {
        Some(keep::principals(&self.walkers, slots))
    }

    fn load_principals(&mut self, learned: &serde_json::Value) {
        self.walkers = keep::unlist(Some(learned), MAX_PRINCIPALS);
    }

    fn bytes(&self) -> usize {
        self.pairs.capacity() * 13 + self.walkers.capacity() * size_of::<Walker>()
    }
}
