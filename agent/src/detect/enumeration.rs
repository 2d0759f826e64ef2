//! D4: one principal reads many different objects of one endpoint.

use super::{
    Clock, Context, Detector, Findings, Readiness, Rule, Setting, Settings, Severity, Sighting,
    keep::{self, Packed, Words},
    sketch,
    sketch::Recent,
    slots::Slots,
};

/// The rule.
pub static RULE: Rule = Rule {
    id: "D4",
    name: "object-enumeration",
    title: "One principal reads many objects",
    owasp: &["API1:2023"],
    attack: &["T1530", "T1213"],
    signal: "distinct path objects that one principal got from one endpoint",
    algorithm: "distinct objects in rings of 5 minutes, 1 hour, 1, 7 and 30 days against fixed limits or three times \
        the principal's own usual peak, whichever is higher; the usual is learned by day and forgotten slowly. Others \
        who do the same in the same ring are counted into the exposed records",
    source: "timestamp vector: Kim and O'Hallaron, Globecom 2003; linear counting: Whang et al., TODS 1990",
    memory: "65,536 (principal, endpoint) pairs of 64 bytes, each with 4 bytes an object up to 64, then 1 KiB for at most \
        16,384 pairs: below 32 MB",
    blind: "principals below 67 objects a day; ids in query values or bodies; who reads much in the first day of an \
        endpoint is taken as usual",
    settings: &[
        Setting { name: "five_minutes", default: 50.0, about: "distinct objects in 5 minutes" },
        Setting { name: "hour", default: 100.0, about: "distinct objects in an hour" },
        Setting { name: "day", default: 300.0, about: "distinct objects in a day" },
        Setting { name: "week", default: 1_000.0, about: "distinct objects in 7 days" },
        Setting { name: "month", default: 2_000.0, about: "distinct objects in 30 days" },
        Setting { name: "usual_factor", default: 3.0, about: "times the principal's own peak that is still usual" },
        Setting {
            name: "learn_hours",
            default: 24.0,
            about: "hours that an endpoint is watched before anything is said",
        },
    ],
};

/// Pairs of principal and endpoint.
const MAX_PAIRS: usize = 65_536;
/// Pairs with the large form of their counter.
const MAX_DENSE: usize = 16_384;
/// Rings, in minutes.
const RINGS: [u16; 5] = [5, 60, 1_440, 10_080, 43_200];
const RING_NAMES: [&str; 5] = ["5 minutes", "an hour", "a day", "7 days", "30 days"];
/// What is older than this is forgotten, minutes.
const FORGET: u16 = 44_640;
/// Distinct objects a day above which a principal is a known bulk reader.
const BULK: f32 = 200.0;
/// Days on which it was one, before it is known: an attack must not become usual overnight.
const BULK_DAYS: u8 = 7;
/// Objects of a principal in an hour beyond which [`Context::beyond`] is set.
const MANY: u16 = 20;
/// Distinct objects in 5 minutes above which a principal counts as one while the endpoint is learned.
const BUSY: f32 = 25.0;

#[derive(Default, Clone)]
struct Pair {
    /// Half of the endpoint's hash.
    endpoint: u32,
    day: u32,
    /// New objects since the rings were looked at.
    unlooked: u8,
    /// Days with more than [`BULK`] objects, or [`BULK_DAYS`] when it was so while the endpoint was learned.
    bulk_days: u8,
    /// Hour, modulo 2^16, and objects in it.
    hour: u16,
    in_hour: u16,
    /// Fingerprint of the last object.
    last: u16,
    /// Highest counts of today for 5 minutes, 1 hour and 1 day.
    peak: [f32; 3],
    /// What is usual: the highest of the days before, forgotten by 2 % a day.
    usual: [f32; 3],
    objects: Recent,
}

/// Half of a hash, which is as good for as many endpoints as there are.
fn half(hash: u64) -> u32 {
    (hash >> 32) as u32
}

/// Words of a pair without its objects.
const PAIR_WORDS: usize = 10;

impl Pair {
    fn pack(&self, out: &mut Vec<u32>) {
        out.extend([
            self.endpoint,
            self.day,
            u32::from(self.bulk_days),
            u32::from(self.hour) << 16 | u32::from(self.in_hour),
        ]);
        self.peak.pack(out);
        self.usual.pack(out);
        self.objects.pack(out);
    }

    fn unpack(w: &mut Words<'_>) -> Option<Self> {
        if w.len() < PAIR_WORDS {
            return None;
        }
        let (endpoint, day, bulk_days, hours) = (w.word(), w.word(), w.word() as u8, w.word());
        let (peak, usual) = ([(); 3].map(|()| w.float()), [(); 3].map(|()| w.float()));
        let (hour, in_hour) = ((hours >> 16) as u16, hours as u16);
        Some(Self {
            endpoint,
            day,
            unlooked: 0,
            bulk_days,
            hour,
            in_hour,
            last: 0,
            peak,
            usual,
            objects: Recent::unpack(w)?,
        })
    }
}

/// The detector.
pub struct Enumeration {
    limits: [f64; 5],
    factor: f64,
    learn: u64,
    slots: Slots,
    pairs: Vec<Pair>,
    dense: usize,
}

impl Enumeration {
    /// With these settings.
    pub fn new(settings: &Settings<'_>) -> Self {
        Self {
            limits: ["five_minutes", "hour", "day", "week", "month"].map(|n| settings.get(n)),
            factor: settings.get("usual_factor"),
            learn: (settings.get("learn_hours") * 3600.0) as u64,
            slots: Slots::new(MAX_PAIRS),
            pairs: Vec::new(),
            dense: 0,
        }
    }

    fn limit(&self, ring: usize, usual: &[f32; 3]) -> f64 {
        let own = match ring {
            0..=2 => f64::from(usual[ring]),
            // Seven busy days are no seven peaks.
            3 => 3.0 * f64::from(usual[2]),
            _ => 10.0 * f64::from(usual[2]),
        };
        self.limits[ring].max(self.factor * own)
    }

    /// Others who do the same at this endpoint, and the objects of all.
    fn accomplices(&self, endpoint: u32, ring: usize, minute: u64) -> (u64, f64) {
        let least = (self.limits[ring] / 5.0).max(10.0);
        let mut sum = (0, 0.0);
        for pair in self.pairs.iter().filter(|p| p.endpoint == endpoint) {
            let n = pair.objects.count(minute, RINGS[ring]);
            if n >= least && n > 2.0 * f64::from(pair.usual[ring.min(2)]) {
                sum = (sum.0 + 1, sum.1 + n);
            }
        }
        sum
    }
}

impl Detector for Enumeration {
    fn rule(&self) -> &'static Rule {
        &RULE
    }

    fn observe(&mut self, c: &Context<'_>, out: &mut Findings) {
        if c.params.is_empty() || !c.success || c.endpoint.side != crate::exchange::Side::Server {
            return;
        }
        let slot = self.slots.visit(sketch::mix(c.actor ^ c.endpoint.hash), c.now);
        if slot.index >= self.pairs.len() {
            self.pairs.resize_with(slot.index + 1, Pair::default);
        }
        let (minute, today) = (c.now / 60, u32::try_from(c.now / 86_400).unwrap_or(0));
        let pair = &mut self.pairs[slot.index];
        if slot.fresh {
            self.dense -= usize::from(pair.objects.is_dense());
            *pair = Pair { endpoint: half(c.endpoint.hash), day: today, ..Pair::default() };
        }
        if pair.day != today {
            // A day is over; a finding kept its peak out of it.
            let days = today.saturating_sub(pair.day);
            let early = c.now < c.endpoint.first_seen + self.learn + 86_400;
            if pair.peak[2] > BULK {
                pair.bulk_days = if early { BULK_DAYS } else { pair.bulk_days.saturating_add(1) };
            }
            for (usual, peak) in pair.usual.iter_mut().zip(&mut pair.peak) {
                *usual = (*usual * 0.98_f32.powi(i32::try_from(days).unwrap_or(i32::MAX))).max(*peak);
                *peak = 0.0;
            }
            pair.day = today;
            pair.objects.forget(minute, FORGET);
        }
        let learning = c.now < c.endpoint.first_seen + self.learn;
        let usual_bulk = pair.bulk_days >= BULK_DAYS && pair.usual[2] > BULK;
        let presumed = learning && pair.peak[0] >= BUSY;
        c.bulk.set(usual_bulk || presumed);
        c.presumed.set(presumed && !usual_bulk);
        let before = pair.objects.is_dense();
        let age = pair.objects.add(c.params.object, minute, before || self.dense < MAX_DENSE);
        self.dense += usize::from(!before && pair.objects.is_dense());
        let hour = (c.now / 3600) as u16;
        if pair.hour != hour {
            (pair.hour, pair.in_hour) = (hour, 0);
        }
        // The large form tells few objects apart: of a job that goes on all day every one was seen in the hour.
        let print = (c.params.object >> 48) as u16;
        let another = std::mem::replace(&mut pair.last, print) != print && pair.objects.is_dense();
        pair.in_hour = pair.in_hour.saturating_add(u16::from(another || age.is_none_or(|a| a >= RINGS[1])));
        c.beyond.set(pair.in_hour > MANY);
        if age.is_some_and(|a| a < RINGS[0]) {
            return;
        }
        pair.unlooked += 1;
        if pair.objects.is_dense() && pair.unlooked < 8 {
            return;
        }
        pair.unlooked = 0;
        let all = pair.objects.count(minute, FORGET);
        self.slots.weigh(slot.index, all.clamp(1.0, 200.0) as u8);
        let mut usual = pair.usual;
        if learning {
            // Nothing is known before: today's peak is the usual.
            for (u, p) in usual.iter_mut().zip(pair.peak) {
                *u = u.max(p);
            }
        }
        // Few objects in all can be many in no ring.
        let mut found = None;
        let rings = if all > 4.0 { &RINGS[..] } else { &[] };
        for (ring, window) in rings.iter().enumerate() {
            let n = self.pairs[slot.index].objects.count(minute, *window);
            let limit = self.limit(ring, &usual);
            if n > limit && !learning {
                if found.is_none() {
                    found = Some((ring, n, limit));
                }
            } else if let Some(peak) = self.pairs[slot.index].peak.get_mut(ring) {
                *peak = peak.max(n as f32);
            }
        }
        let Some((ring, n, limit)) = found else { return };
        if !out.wants(&RULE, c.actor_here()) {
            return;
        }
        let (others, records) = self.accomplices(half(c.endpoint.hash), ring, minute);
        let records = records.max(n);
        let usual = self.pairs[slot.index].usual[ring.min(2)];
        let severity = if n > 10.0 * limit || others > 5 { Severity::Critical } else { Severity::High };
        let others = others.saturating_sub(1);
        let more = if others > 0 { format!(", and {others} other principals do the same") } else { String::new() };
        out.report(
            &RULE,
            c.actor_here(),
            Sighting {
                severity: Some(severity),
                confidence: (0.6 + 0.1 * (n / limit)).min(0.95),
                observed: n,
                expected: limit,
                unit: "{object}",
                records: Some(records),
                evidence: vec![
                    ("window_s", f64::from(RINGS[ring]) * 60.0),
                    ("usual", f64::from(usual)),
                    ("other_principals", others as f64),
                ],
                explanation: format!(
                    "{} read {n:.0} different objects of {} within {}, where at most {limit:.0} is usual{more}: somebody may be walking through other people's records.",
                    c.who(),
                    c.where_(),
                    RING_NAMES[ring],
                ),
            },
        );
    }

    fn readiness(&self, at: usize, clock: &Clock<'_>) -> Readiness {
        let Some(e) = clock.endpoints.get(at) else { return Readiness::blind("not seen") };
        if !e.has_object {
            return Readiness::blind("its path names no object");
        }
        match clock.now.saturating_sub(e.first_seen) {
            age if age < self.learn => Readiness::Learning { progress: age as f64 / self.learn as f64 },
            _ => Readiness::Armed { minimum_per_hour: Some(self.limits[2] / 24.0), within_s: Some(86_400.0) },
        }
    }

    fn save_node(&self) -> Option<serde_json::Value> {
        let kept = self.slots.proven();
        let mut pairs = Vec::new();
        kept.iter().filter_map(|&at| self.pairs.get(at)).for_each(|p| p.pack(&mut pairs));
        Some(serde_json::json!({ "who": self.slots.save(&kept), "pairs": keep::text(&pairs) }))
    }

    fn load_node(&mut self, learned: &serde_json::Value) {
        let words = keep::words(learned.get("pairs"));
        let mut words = Words::new(&words);
        let mut pairs = Vec::new();
        while let Some(pair) = Pair::unpack(&mut words) {
            pairs.push(pair);
        }
        // All or nothing: a pair must not get another's slot.
        let mut slots = Slots::new(MAX_PAIRS);
        if slots.load(learned.get("who")) == pairs.len() {
            self.dense = pairs.iter().filter(|p| p.objects.is_dense()).count();
            (self.slots, self.pairs) = (slots, pairs);
        }
    }

    fn bytes(&self) -> usize {
        let exact = self
            .pairs
            .iter()
            .map(|p| if let Recent::Exact(l) = &p.objects { l.capacity() * 4 } else { 0 })
            .sum::<usize>();
        self.pairs.capacity() * size_of::<Pair>() + exact + self.dense * 1024 + self.slots.len() * 32
    }
}
