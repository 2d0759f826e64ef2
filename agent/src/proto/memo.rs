//! What was read from bytes lately: clients send the same credential, and mostly the same head, again and
//! again, and reading costs several times what looking it up does.
//!
//! Entries are named by a SipHash-1-3 of 128 bits under a secret key: the bytes themselves are not kept, two
//! texts have one name with a chance of 2^-128, and nobody without the key can look for such a pair.
//! Source: Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012. Direct-mapped, [`SLOTS`] entries;
//! a new one takes the place of the old.
//!
//! Where looking up does not pay, because every text is new, it pauses: [`PATIENCE`].

use std::{
    cell::{Cell, RefCell},
    hash::Hasher as _,
};

use siphasher::sip128::{Hasher128 as _, SipHasher13};

/// Texts that are remembered. A power of two.
const SLOTS: usize = 1_024;
/// Shorter texts are read as fast as they are looked up, bytes.
const MIN: usize = 8;
/// After this many misses more than hits, [`PAUSE`] texts are read without a look.
const PATIENCE: u16 = 64;
/// See [`PATIENCE`].
const PAUSE: u16 = 1_024;

/// See the [module](self).
#[derive(Clone)]
pub struct Memo<T> {
    hasher: SipHasher13,
    entries: RefCell<Vec<Option<(u128, T)>>>,
    /// Misses beyond hits, and texts still to be read without a look.
    luck: Cell<(u16, u16)>,
}

impl<T: Clone> Memo<T> {
    /// Remembers nothing yet.
    pub fn new(key: &[u8; 16]) -> Self {
        let hasher = SipHasher13::new_with_key(key);
        Self { hasher, entries: RefCell::default(), luck: Cell::default() }
    }

    /// What `text` of a `kind` says: as `read` has it, unless it is known.
    #[inline]
    pub fn find(&self, kind: u8, text: &[u8], read: impl FnOnce() -> T) -> T {
        let (misses, pause) = self.luck.get();
        if text.len() < MIN {
            return read();
        }
        if pause > 0 {
            self.luck.set((misses, pause - 1));
            return read();
        }
        let mut hasher = self.hasher;
        hasher.write_u8(kind);
        hasher.write(text);
        let name = hasher.finish128().as_u128();
        let mut entries = self.entries.borrow_mut();
        if entries.is_empty() {
            entries.resize(SLOTS, None);
        }
        // The mask keeps it in bounds.
        let entry = &mut entries[name as usize & (SLOTS - 1)];
        match entry {
            Some((known, value)) if *known == name => {
                self.luck.set((misses.saturating_sub(1), 0));
                value.clone()
            }
            _ => {
                self.luck.set(if misses < PATIENCE { (misses + 1, 0) } else { (PATIENCE / 2, PAUSE) });
                let value = read();
                *entry = Some((name, value.clone()));
                value
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_text_is_not_read_again() {
        let memo = Memo::new(&[7; 16]);
        assert_eq!(memo.find(0, b"Bearer 0123", || 1), 1);
        assert_eq!(memo.find(0, b"Bearer 0123", || panic!("it is known")), 1);
        assert_eq!(memo.find(0, b"Bearer 0124", || 2), 2);
        assert_eq!(memo.find(1, b"Bearer 0123", || 3), 3);
    }

    #[test]
    fn where_all_is_new_it_pauses_and_tries_again() {
        let memo = Memo::new(&[7; 16]);
        for i in 0..2_000u32 {
            assert_eq!(memo.find(0, format!("/things/{i:010}").as_bytes(), || i), i);
        }
        for i in 0..4 * u32::from(PAUSE) {
            assert!(memo.find(0, b"/always/the/same", || i) <= i);
        }
        assert!(memo.find(0, b"/always/the/same", || u32::MAX) < u32::MAX);
    }
}
