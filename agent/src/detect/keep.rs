//! What is kept over a restart, packed: numbers as 32-bit words in base64, so that 50,000 principals are a few
//! megabytes that are quickly written, and nothing in the file is a name or an id that anybody could read.
//!
//! Whoever can write the file could write anything: what does not fit is left out, and nothing here panics.

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD as BASE64};
use serde_json::Value;

/// Highest time, s since the epoch, that is believed (year 6,429): sums of times cannot overflow below it.
const LATEST: u64 = 1 << 47;

/// State of one principal, one window or the like, of a fixed size.
pub trait Packed: Sized {
    /// Words that it takes.
    const WORDS: usize;
    /// Its words.
    fn pack(&self, out: &mut Vec<u32>);
    /// From [`Packed::WORDS`] words.
    fn unpack(words: &mut Words<'_>) -> Self;
}

/// Words to be read one after the other; 0 at the end.
pub struct Words<'a>(std::slice::Iter<'a, u32>);

impl<'a> Words<'a> {
    /// Of this list.
    pub fn new(list: &'a [u32]) -> Self {
        Self(list.iter())
    }

    /// One.
    pub fn word(&mut self) -> u32 {
        self.0.next().copied().unwrap_or(0)
    }

    /// A count, which counting on does not make overflow.
    pub fn count(&mut self) -> u32 {
        self.word().min(u32::MAX / 2)
    }

    /// Two, the lower half first.
    pub fn long(&mut self) -> u64 {
        let low = u64::from(self.word());
        low | u64::from(self.word()) << 32
    }

    /// A time in s since the epoch, which no later sum makes overflow.
    pub fn time(&mut self) -> u64 {
        self.long().min(LATEST)
    }

    /// A number that is neither infinite nor none.
    pub fn float(&mut self) -> f32 {
        let value = f32::from_bits(self.word());
        if value.is_finite() { value } else { 0.0 }
    }

    /// How many are left.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// So many, as they are.
    pub fn take(&mut self, n: usize) -> Option<&'a [u32]> {
        let (head, tail) = self.0.as_slice().split_at_checked(n)?;
        self.0 = tail.iter();
        Some(head)
    }
}

/// Appends a 64-bit number, the lower half first.
pub fn long(out: &mut Vec<u32>, value: u64) {
    out.extend([value as u32, (value >> 32) as u32]);
}

/// Words as text.
#[must_use]
pub fn text(words: &[u32]) -> Value {
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    Value::String(BASE64.encode(bytes))
}

/// What [`text`] gave; nothing when it is something else.
#[must_use]
pub fn words(value: Option<&Value>) -> Vec<u32> {
    let bytes = value.and_then(Value::as_str).and_then(|s| BASE64.decode(s).ok()).unwrap_or_default();
    bytes.as_chunks::<4>().0.iter().map(|w| u32::from_le_bytes(*w)).collect()
}

/// A list as text.
#[must_use]
pub fn list<'a, T: Packed + 'a>(items: impl IntoIterator<Item = &'a T>) -> Value {
    let mut out = Vec::new();
    for item in items {
        item.pack(&mut out);
    }
    text(&out)
}

/// The states of the principals in these slots.
pub fn principals<T: Packed + Default + Clone>(states: &[T], slots: &[usize]) -> Value {
    let none = T::default();
    list(slots.iter().map(|&at| states.get(at).unwrap_or(&none)))
}

/// What [`list`] gave, at most so many.
#[must_use]
pub fn unlist<T: Packed>(value: Option<&Value>, most: usize) -> Vec<T> {
    words(value).chunks_exact(T::WORDS).take(most).map(|chunk| T::unpack(&mut Words::new(chunk))).collect()
}

/// One as text.
#[must_use]
pub fn one<T: Packed>(item: &T) -> Value {
    list([item])
}

/// What [`one`] gave.
#[must_use]
pub fn unone<T: Packed>(value: &Value) -> Option<T> {
    unlist(Some(value), 1).pop()
}

/// A time in s since the epoch, which no later sum makes overflow.
#[must_use]
pub fn time(value: Option<&Value>) -> u64 {
    value.and_then(Value::as_u64).unwrap_or(0).min(LATEST)
}

impl Packed for [f32; 3] {
    const WORDS: usize = 3;
    fn pack(&self, out: &mut Vec<u32>) {
        out.extend(self.map(f32::to_bits));
    }
    fn unpack(words: &mut Words<'_>) -> Self {
        // As they are: these know what "not a number" means.
        [(); 3].map(|()| f32::from_bits(words.word()))
    }
}

impl Packed for f32 {
    const WORDS: usize = 1;
    fn pack(&self, out: &mut Vec<u32>) {
        out.push(self.to_bits());
    }
    fn unpack(words: &mut Words<'_>) -> Self {
        words.float()
    }
}

impl Packed for u64 {
    const WORDS: usize = 2;
    fn pack(&self, out: &mut Vec<u32>) {
        long(out, *self);
    }
    fn unpack(words: &mut Words<'_>) -> Self {
        words.long()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_packed_comes_back_and_nonsense_is_nothing() {
        let rows = [[1.0_f32, f32::NAN, -2.5], [0.0, 3.0, 4.0]];
        let back: Vec<[f32; 3]> = unlist(Some(&list(&rows)), 10);
        assert_eq!(back.len(), 2);
        assert!(back[0][1].is_nan() && back[0][2] == -2.5 && back[1] == rows[1]);
        assert_eq!(unlist::<u64>(Some(&list(&[u64::MAX, 7])), 1), [u64::MAX]);
        for nonsense in [Value::Null, Value::from(3), Value::from("!"), Value::from("AAAA")] {
            assert!(unlist::<u64>(Some(&nonsense), 9).is_empty());
        }
        let mut short = Words::new(&[5]);
        assert_eq!((short.long(), short.word(), short.take(1)), (5, 0, None));
    }
}
