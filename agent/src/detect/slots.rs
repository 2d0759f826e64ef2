//! A bounded table of identities that a flood cannot empty. Each identity gets a slot number, so that
//! several detectors can keep state beside it in plain vectors.
//!
//! Two segments after the 2Q cache (Johnson and Shasha, VLDB 1994): who is new stands in a queue on
//! probation and is the first to go; who comes back [`PROVEN`] times, or was given weight, stays, and
//! leaves only when it was sampled as the one longest idle for its weight. A stream of identities that
//! come once churns the queue alone.

use std::collections::VecDeque;

use rustc_hash::FxHashMap;
use serde_json::Value;

use super::keep::{self, Words};

/// Visits after which an identity is no longer on probation.
const PROVEN: u8 = 4;
/// One slot in so many stays on probation.
const PROBATION: usize = 8;

/// Identities with slots.
pub struct Slots {
    index: FxHashMap<u64, u32>,
    ids: Vec<u64>,
    /// Beside each other, so that a visit touches one place.
    state: Vec<State>,
    probation: VecDeque<u32>,
    capacity: usize,
    random: u64,
    /// Identities that had to go.
    pub evicted: u64,
}

#[derive(Clone, Copy)]
struct State {
    /// Second of the last visit.
    last: u32,
    visits: u8,
    /// How much there is to lose.
    weight: u8,
}

/// Where an identity's state is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Below the capacity.
    pub index: usize,
    /// The slot belonged to somebody else, or to nobody, before.
    pub fresh: bool,
}

impl Slots {
    /// For this many identities; at least 64.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        let capacity = capacity.max(64);
        Self {
            index: FxHashMap::default(),
            ids: Vec::new(),
            state: Vec::new(),
            probation: VecDeque::new(),
            capacity,
            random: 0x9e37_79b9_7f4a_7c15,
            evicted: 0,
        }
    }

    /// The slot of an identity, which gets one if it has none.
    #[inline]
    pub fn visit(&mut self, id: u64, now: u64) -> Slot {
        let second = now as u32;
        if let Some(&at) = self.index.get(&id) {
            let state = &mut self.state[at as usize];
            state.visits = state.visits.saturating_add(1);
            state.last = second;
            return Slot { index: at as usize, fresh: false };
        }
        let state = State { last: second, visits: 1, weight: 1 };
        let at = if self.ids.len() < self.capacity {
            self.ids.push(id);
            self.state.push(state);
            self.ids.len() - 1
        } else {
            let at = self.victim(second);
            self.index.remove(&self.ids[at]);
            self.evicted += 1;
            (self.ids[at], self.state[at]) = (id, state);
            at
        };
        let short = u32::try_from(at).unwrap_or(u32::MAX);
        self.index.insert(id, short);
        self.probation.push_back(short);
        Slot { index: at, fresh: true }
    }

    /// The slot of an identity, if it has one.
    #[cfg(test)]
    fn find(&self, id: u64) -> Option<usize> {
        self.index.get(&id).map(|&at| at as usize)
    }

    /// Identities that have slots.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Those that are worth keeping over a restart: who came back, or was given weight.
    #[must_use]
    pub fn proven(&self) -> Vec<usize> {
        (0..self.ids.len()).filter(|&at| self.state[at].visits >= PROVEN || self.state[at].weight > 1).collect()
    }

    /// These, packed.
    #[must_use]
    pub fn save(&self, kept: &[usize]) -> Value {
        let mut out = Vec::with_capacity(kept.len() * 4);
        for &at in kept {
            keep::long(&mut out, self.ids[at]);
            let state = self.state[at];
            out.extend([state.last, u32::from(state.visits) | u32::from(state.weight) << 8]);
        }
        keep::text(&out)
    }

    /// Takes what [`Slots::save`] gave into the first slots of an empty table; says how many there are.
    pub fn load(&mut self, saved: Option<&Value>) -> usize {
        let words = keep::words(saved);
        for chunk in words.chunks_exact(4).take(if self.ids.is_empty() { self.capacity } else { 0 }) {
            let mut words = Words::new(chunk);
            let (id, second, rest) = (words.long(), words.word(), words.word());
            let at = u32::try_from(self.ids.len()).unwrap_or(u32::MAX);
            // A number twice would be two slots of which one is never found: nobody's then.
            self.index.insert(id, at);
            self.ids.push(id);
            self.state.push(State { last: second, visits: rest as u8, weight: ((rest >> 8) as u8).max(1) });
            if (rest as u8) < PROVEN {
                self.probation.push_back(at);
            }
        }
        self.ids.len()
    }

    /// How much there is to lose with an identity: 1 without this.
    pub fn weigh(&mut self, at: usize, weight: u8) {
        if let Some(state) = self.state.get_mut(at) {
            state.weight = weight.max(1);
        }
    }

    fn victim(&mut self, now: u32) -> usize {
        loop {
            if self.probation.len() < self.capacity / PROBATION {
                // The longest idle of eight joins the queue, with a chance to come back.
                let sample = [(); 8].map(|()| self.draw());
                let idle = |at: usize| {
                    let State { last, weight, .. } = self.state[at];
                    u64::from(now.wrapping_sub(last)) * 65_536 / (u64::from(weight) * u64::from(weight))
                };
                let pick = sample.into_iter().max_by_key(|&at| idle(at)).unwrap_or(0);
                self.state[pick].visits = 1;
                self.probation.push_back(u32::try_from(pick).unwrap_or(0));
            }
            let Some(oldest) = self.probation.pop_front() else { continue };
            let State { visits, weight, .. } = self.state[oldest as usize];
            if visits < PROVEN && (visits < 2 || weight < 2) {
                return oldest as usize;
            }
        }
    }

    fn draw(&mut self) -> usize {
        // xorshift64 (Marsaglia 2003): which of equals goes first needs no secrecy, but repeatability.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        usize::try_from(self.random % self.ids.len().max(1) as u64).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_does_not_evict_who_was_there() {
        let mut slots = Slots::new(1_000);
        for _ in 0..10 {
            for id in 0..700_u64 {
                slots.visit(id, 5);
            }
        }
        for id in 1_000_000..2_000_000_u64 {
            slots.visit(id, 5);
        }
        let stayed = (0..700_u64).filter(|&id| slots.find(id).is_some()).count();
        assert!(stayed >= 690, "{stayed}");
        assert_eq!(slots.len(), 1_000);
        assert!(slots.index.len() <= 1_000 && slots.probation.len() <= 1_001);
    }

    #[test]
    fn slots_are_handed_on_as_fresh() {
        let mut slots = Slots::new(64);
        let fresh = (0..1_000_u64).filter(|&id| slots.visit(id, 5).fresh).count();
        assert_eq!(fresh, 1_000);
        assert!(!slots.visit(999, 5).fresh);
        assert_eq!(slots.evicted, 936);
    }
}
