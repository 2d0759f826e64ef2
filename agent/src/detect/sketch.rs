//! Counting with little memory: distinct elements of a window, of an hour, and of a bucket. Small enough
//! to be read; each names its source, its error and its size.

use super::keep::Words;

/// Cells of a dense [`Recent`]; standard error about 3 % up to 500 elements, 8 % at 2,000.
const CELLS: usize = 512;
/// Elements that a [`Recent`] keeps exactly before it becomes dense.
const EXACT: usize = 64;
/// Minutes that a [`Recent`] can tell apart; 0 is an empty cell.
const WRAP: u64 = 65_535;

/// Distinct elements in any window of up to 31 days, by the minute: each cell keeps when it was last
/// hit, so one structure answers for all windows at once. 4 bytes an element up to [`EXACT`], then 1 KiB.
/// Source: Kim and O'Hallaron, "Counting network flows in real time" (timestamp vector), Globecom 2003.
#[derive(Debug, Clone, Default)]
pub enum Recent {
    /// Nothing.
    #[default]
    Empty,
    /// Fingerprints and minutes.
    Exact(Vec<(u16, u16)>),
    /// Minutes by cell.
    Dense(Box<[u16; CELLS]>),
}

/// The stamp of a minute.
fn stamp(minute: u64) -> u16 {
    u16::try_from(minute % WRAP + 1).unwrap_or(1)
}

/// Minutes since a stamp.
fn age(now: u16, then: u16) -> u16 {
    if now >= then { now - then } else { now.wrapping_add(u16::MAX).wrapping_sub(then) }
}

impl Recent {
    /// Adds an element; says how many minutes ago it was seen before, as far as cells tell.
    pub fn add(&mut self, hash: u64, minute: u64, may_grow: bool) -> Option<u16> {
        let now = stamp(minute);
        let print = (hash >> 48) as u16;
        match self {
            Self::Empty => *self = Self::Exact(vec![(print, now)]),
            Self::Exact(list) => {
                if let Some(known) = list.iter_mut().find(|(p, _)| *p == print) {
                    return Some(age(now, std::mem::replace(&mut known.1, now)));
                }
                if list.len() < EXACT {
                    list.push((print, now));
                } else if may_grow {
                    let mut cells = Box::new([0; CELLS]);
                    for (print, then) in list.iter() {
                        cells[cell(*print)] = *then;
                    }
                    cells[cell(print)] = now;
                    *self = Self::Dense(cells);
                } else if let Some(oldest) = list.iter_mut().max_by_key(|(_, then)| age(now, *then)) {
                    *oldest = (print, now);
                }
            }
            Self::Dense(cells) => {
                let cell = &mut cells[cell(print)];
                let then = std::mem::replace(cell, now);
                return (then != 0).then(|| age(now, then));
            }
        }
        None
    }

    /// Distinct elements of the last `window` minutes.
    #[must_use]
    pub fn count(&self, minute: u64, window: u16) -> f64 {
        let now = stamp(minute);
        match self {
            Self::Empty => 0.0,
            Self::Exact(list) => list.iter().filter(|(_, then)| age(now, *then) < window).count() as f64,
            Self::Dense(cells) => {
                let used = cells.iter().filter(|&&then| then != 0 && age(now, then) < window).count();
                linear(CELLS, used)
            }
        }
    }

    /// Forgets what is older than `window` minutes: to be called within 45 days, before stamps repeat.
    pub fn forget(&mut self, minute: u64, window: u16) {
        let now = stamp(minute);
        match self {
            Self::Empty => {}
            Self::Exact(list) => list.retain(|(_, then)| age(now, *then) < window),
            Self::Dense(cells) => {
                for then in cells.iter_mut().filter(|then| age(now, **then) >= window) {
                    *then = 0;
                }
            }
        }
    }

    /// As words: how many elements are kept one by one, or a number above that for the large form, and they.
    pub fn pack(&self, out: &mut Vec<u32>) {
        match self {
            Self::Empty => out.push(0),
            Self::Exact(list) => {
                out.push(list.len() as u32);
                out.extend(list.iter().map(|(print, then)| u32::from(*print) << 16 | u32::from(*then)));
            }
            Self::Dense(cells) => {
                out.push(u32::MAX);
                out.extend(cells.as_chunks::<2>().0.iter().map(|[a, b]| u32::from(*a) << 16 | u32::from(*b)));
            }
        }
    }

    /// From words; nothing when there are too few.
    pub fn unpack(words: &mut Words<'_>) -> Option<Self> {
        let halves = |w: &u32| ((w >> 16) as u16, *w as u16);
        match words.word() as usize {
            0 => Some(Self::Empty),
            n if n <= EXACT => words.take(n).map(|list| Self::Exact(list.iter().map(halves).collect())),
            _ => {
                let list = words.take(CELLS / 2)?;
                let mut cells = Box::new([0; CELLS]);
                for (pair, (a, b)) in cells.as_chunks_mut::<2>().0.iter_mut().zip(list.iter().map(halves)) {
                    *pair = [a, b];
                }
                Some(Self::Dense(cells))
            }
        }
    }

    /// It has the large form.
    #[must_use]
    pub fn is_dense(&self) -> bool {
        matches!(self, Self::Dense(_))
    }
}

fn cell(print: u16) -> usize {
    usize::from(print) % CELLS
}

/// Estimate of linear counting. Source: Whang, Vander-Zanden and Taylor, ACM TODS 15 (2), 1990.
fn linear(cells: usize, used: usize) -> f64 {
    let m = cells as f64;
    // A full map says only "many": half a cell stands for what cannot be told apart.
    let free = (cells - used).max(1) as f64 - if used == cells { 0.5 } else { 0.0 };
    m * (m / free).ln()
}

/// Distinct elements between two clearings: a bitmap that follows the load. Each bit that gets set stands for as
/// many elements as it took to find a free one, so that the count stays right while the map grows.
/// `2^10` to `2^18` bits; standard error below 1 % from 20,000 elements on, whatever size it had before.
/// Source: Ting, "Streamed approximate counting of distinct elements", KDD 2014 (martingale estimator).
#[derive(Debug, Clone)]
pub struct Distinct {
    words: Vec<u64>,
    used: usize,
    count: f64,
}

/// Words of the smallest and of the largest [`Distinct`].
const FEWEST_WORDS: usize = 16;
const MOST_WORDS: usize = 4096;
/// A map with more than one element for two bits grows by this factor: rarely, for each time leaves the bits of
/// those who came before doubled all over it.
const GROWTH: usize = 16;

impl Default for Distinct {
    fn default() -> Self {
        Self { words: vec![0; FEWEST_WORDS], used: 0, count: 0.0 }
    }
}

impl Distinct {
    /// Adds a hash.
    #[inline]
    pub fn add(&mut self, hash: u64) {
        // Fibonacci hashing: what comes may be a plain number.
        let at = hash.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16;
        let bits = self.words.len() * 64;
        let at = usize::try_from(at).unwrap_or(0) & (bits - 1);
        let bit = 1 << (at % 64);
        let word = &mut self.words[at / 64];
        if *word & bit == 0 {
            *word |= bit;
            self.count += bits as f64 / (bits - self.used) as f64;
            self.used += 1;
            if self.count > bits as f64 / 2.0 && self.words.len() < MOST_WORDS {
                self.grow();
            }
        }
    }

    /// An element has its bit at one of several places now: all are set, so that it is not counted again.
    #[cold]
    fn grow(&mut self) {
        let (before, after) = (self.words.len(), (self.words.len() * GROWTH).min(MOST_WORDS));
        let map = std::mem::take(&mut self.words);
        self.words = map.repeat(after / before);
        self.used *= after / before;
    }

    /// Estimate.
    #[must_use]
    pub fn count(&self) -> f64 {
        self.count
    }

    /// Clears, and takes the size that this load needs: four bits an element, `2^18` at most.
    pub fn clear(&mut self) {
        let wanted = (self.count * 4.0) as usize;
        let fitting = (wanted / 64).next_power_of_two().clamp(FEWEST_WORDS, MOST_WORDS).max(self.words.len() / 2);
        self.words.clear();
        self.words.resize(fitting, 0);
        self.words.shrink_to(fitting);
        (self.used, self.count) = (0, 0.0);
    }

    /// Bytes that it uses.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.words.capacity() * 8
    }
}

/// Was this seen since the clearing? One hash in a blocked Bloom filter of 2^23 bits (1 MiB).
/// Source: Putze, Sanders and Singler, "Cache-, hash- and space-efficient Bloom filters", 2007.
pub struct Seen {
    words: Vec<u64>,
    /// Where it was touched, as long as these are few: clearing is cheap for who has little traffic.
    touched: Vec<u32>,
    /// Elements added since the clearing.
    pub added: u64,
}

/// Touched places that are remembered one by one.
const FEW: usize = 1_024;
/// Words of a [`Seen`].
const SEEN_WORDS: usize = 1 << 17;

impl Default for Seen {
    fn default() -> Self {
        Self { words: vec![0; SEEN_WORDS], touched: Vec::new(), added: 0 }
    }
}

impl Seen {
    /// Adds a hash; true when it was not there.
    #[inline]
    pub fn add(&mut self, hash: u64) -> bool {
        let mixed = mix(hash);
        let mask = (1 << (mixed & 63))
            | (1 << ((mixed >> 6) & 63))
            | (1 << ((mixed >> 12) & 63))
            | (1 << ((mixed >> 18) & 63));
        let at = usize::try_from(mixed >> 40).unwrap_or(0) % SEEN_WORDS;
        let word = &mut self.words[at];
        let new = *word & mask != mask;
        *word |= mask;
        self.added += u64::from(new);
        if new && self.touched.len() <= FEW {
            self.touched.push(at as u32);
        }
        new
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        if self.touched.len() > FEW {
            self.words.fill(0);
        } else {
            self.touched.iter().for_each(|&at| self.words[at as usize] = 0);
        }
        self.touched.clear();
        self.added = 0;
    }
}

/// Counts by key, never too low: 2 rows of 2^16 counters (256 KiB), conservative update.
/// Source: Cormode and Muthukrishnan, "An improved data stream summary: the count-min sketch", 2005.
pub struct CountMin {
    rows: [Vec<u16>; 2],
    /// As in [`Seen`].
    touched: Vec<(u16, u16)>,
}

impl Default for CountMin {
    fn default() -> Self {
        Self { rows: [vec![0; 1 << 16], vec![0; 1 << 16]], touched: Vec::new() }
    }
}

impl CountMin {
    /// Adds one; returns the count.
    #[inline]
    pub fn add(&mut self, key: u64) -> u16 {
        let (a, b) = Self::places(key);
        if self.touched.len() <= FEW {
            self.touched.push((a as u16, b as u16));
        }
        let [first, second] = &mut self.rows;
        let (x, y) = (&mut first[a], &mut second[b]);
        let now = (*x).min(*y).saturating_add(1);
        *x = (*x).max(now);
        *y = (*y).max(now);
        now
    }

    /// The count.
    #[must_use]
    pub fn get(&self, key: u64) -> u16 {
        let (a, b) = Self::places(key);
        self.rows[0][a].min(self.rows[1][b])
    }

    /// Back to 0.
    pub fn clear(&mut self) {
        if self.touched.len() > FEW {
            self.rows.iter_mut().for_each(|r| r.fill(0));
        } else {
            for &(a, b) in &self.touched {
                (self.rows[0][usize::from(a)], self.rows[1][usize::from(b)]) = (0, 0);
            }
        }
        self.touched.clear();
    }

    fn places(key: u64) -> (usize, usize) {
        let mixed = mix(key);
        ((mixed & 0xffff) as usize, ((mixed >> 32) & 0xffff) as usize)
    }
}

/// Spreads a key over all bits (the finalizer of SplitMix64: Steele, Lea and Flood 2014).
#[inline]
#[must_use]
pub fn mix(key: u64) -> u64 {
    let mut z = key.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Hash of a short text; not secret.
#[must_use]
pub fn text(of: &str) -> u64 {
    of.bytes().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// Median of the values, which are reordered; `None` without any.
pub fn median(values: &mut [f64]) -> Option<f64> {
    let middle = values.len() / 2;
    (!values.is_empty()).then(|| *values.select_nth_unstable_by(middle, f64::total_cmp).1)
}

/// Median absolute deviation from `centre` as a standard deviation (Rousseeuw and Croux 1993).
pub fn deviation(values: &mut [f64], centre: f64) -> Option<f64> {
    values.iter_mut().for_each(|v| *v = (*v - centre).abs());
    median(values).map(|m| 1.4826 * m)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_of_one_structure() {
        let mut recent = Recent::default();
        let mut minute = 1_000_000;
        for i in 0..50 {
            recent.add(mix(i), minute, true);
        }
        assert!((recent.count(minute, 5) - 50.0).abs() < 1.0);
        for i in 0..950 {
            recent.add(mix(1_000 + i), minute + 30, true);
        }
        minute += 30;
        let (short, long) = (recent.count(minute, 5), recent.count(minute, 60));
        assert!((short - 950.0).abs() < 140.0 && (long - 1_000.0).abs() < 150.0, "{short} {long}");
        assert!(recent.count(minute + 4, 5) > 800.0);
        assert!(recent.count(minute + 5, 5) < 1.0);
        recent.forget(minute + 100, 60);
        assert!(recent.count(minute + 100, 40_000) < 1.0);
    }

    #[test]
    fn stamps_wrap() {
        let mut recent = Recent::default();
        let edge = WRAP * 400 - 2;
        recent.add(mix(1), edge, true);
        recent.add(mix(2), edge + 4, true);
        assert!((recent.count(edge + 4, 5) - 2.0).abs() < 0.1);
        assert!((recent.count(edge + 6, 5) - 1.0).abs() < 0.1);
    }

    #[test]
    fn distinct_follows_the_load() {
        let mut distinct = Distinct::default();
        for round in 0..8 {
            distinct.clear();
            for i in 0..140_000_u64 {
                distinct.add(mix(i));
                distinct.add(mix(i));
            }
            if round > 5 {
                assert!((distinct.count() / 140_000.0 - 1.0).abs() < 0.01, "{}", distinct.count());
            }
        }
        assert!(distinct.bytes() <= 1 << 16);
    }

    #[test]
    fn distinct_is_right_when_the_load_jumps() {
        for before in [0, 100, 500, 5_000, 60_000_u64] {
            let mut errors = Vec::new();
            for round in 0..40_u64 {
                let mut distinct = Distinct::default();
                (0..before).for_each(|i| distinct.add(mix(i ^ round << 40)));
                distinct.clear();
                for i in 0..37_000_u64 {
                    let hash = mix(1 << 50 | round << 32 | i);
                    distinct.add(hash);
                    distinct.add(hash);
                }
                errors.push(distinct.count() / 37_000.0 - 1.0);
                assert!(distinct.bytes() <= MOST_WORDS * 8);
            }
            let mean = errors.iter().sum::<f64>() / errors.len() as f64;
            let deviation = (errors.iter().map(|e| e * e).sum::<f64>() / errors.len() as f64).sqrt();
            assert!(mean.abs() < 0.003 && deviation < 0.01, "after {before}: bias {mean}, deviation {deviation}");
        }
    }

    #[test]
    fn sketches_count() {
        let (mut seen, mut counts) = (Seen::default(), CountMin::default());
        let wrong = (0..100_000).filter(|&i| !seen.add(i)).count();
        assert!(wrong < 100, "{wrong}");
        assert!(!seen.add(7));
        for i in 0..1_000 {
            counts.add(i % 10);
        }
        assert_eq!(counts.get(3), 100);
        counts.clear();
        assert_eq!(counts.get(3), 0);
        let mut values = [5.0, 1.0, 100.0, 4.0, 3.0];
        assert_eq!(median(&mut values), Some(4.0));
    }
}
