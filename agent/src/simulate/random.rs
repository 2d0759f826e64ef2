//! Random numbers that are the same for the same seed on every machine: SplitMix64 (Steele, Lea and
//! Flood, OOPSLA 2014). For simulations; nothing here is secret.

use crate::detect::sketch::mix;

/// A stream of numbers.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From a seed; streams of one seed differ by `stream`.
    #[must_use]
    pub fn new(seed: u64, stream: u64) -> Self {
        Self(mix(seed) ^ mix(stream.wrapping_add(0x5eed)).rotate_left(31))
    }

    /// Any number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Below `n`; 0 when `n` is 0. (Lemire's multiplication; the bias is below 2^-32 here.)
    pub fn below(&mut self, n: u64) -> u64 {
        u64::try_from((u128::from(self.draw()) * u128::from(n)) >> 64).unwrap_or(0)
    }

    /// From 0 to below 1.
    pub fn unit(&mut self) -> f64 {
        (self.draw() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// With this probability.
    pub fn chance(&mut self, p: f64) -> bool {
        self.unit() < p
    }

    /// Time until the next of events that come at `rate` a second, s.
    pub fn gap(&mut self, rate: f64) -> f64 {
        -(1.0 - self.unit()).ln() / rate.max(1e-9)
    }
}
