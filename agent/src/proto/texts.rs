//! Texts that came lately: most come again and again, and looking one up costs less than making one, and less memory
//! where many hold it.
//!
//! Direct-mapped, [`SLOTS`] entries of [`MAX`] bytes at most; a new one takes the place of the old. Whoever brings
//! texts that share a place makes others be made anew, and nothing else.

use std::{borrow::Cow, hash::Hasher as _, sync::Arc};

use rustc_hash::FxHasher;

/// Texts that are remembered. A power of two.
const SLOTS: usize = 1024;
/// Longer ones are not remembered, bytes.
const MAX: usize = 256;

/// See the [module](self).
#[derive(Debug, Default)]
pub struct Texts(Vec<Option<Arc<str>>>);

impl Texts {
    /// The text of these bytes; `read` is how those are read that are not UTF-8.
    pub fn get(&mut self, bytes: &[u8], read: fn(&[u8]) -> Cow<'_, str>) -> Arc<str> {
        if bytes.len() > MAX {
            return read(bytes).into();
        }
        if self.0.is_empty() {
            self.0.resize(SLOTS, None);
        }
        let mut hasher = FxHasher::default();
        hasher.write(bytes);
        // The mask keeps it in bounds.
        let slot = &mut self.0[hasher.finish() as usize & (SLOTS - 1)];
        if let Some(known) = slot.as_ref().filter(|k| k.as_bytes() == bytes) {
            return known.clone();
        }
        let text: Arc<str> = read(bytes).into();
        *slot = Some(text.clone());
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_text_is_the_same_one() {
        let mut texts = Texts::default();
        let first = texts.get(b"/a", String::from_utf8_lossy);
        assert!(Arc::ptr_eq(&first, &texts.get(b"/a", String::from_utf8_lossy)));
        for i in 0..10 * SLOTS {
            let text = format!("/{i}");
            assert_eq!(*texts.get(text.as_bytes(), String::from_utf8_lossy), *text);
        }
        assert_eq!(texts.0.len(), SLOTS);
        let long = [b'x'; MAX + 1];
        assert_eq!(texts.get(&long, String::from_utf8_lossy).len(), MAX + 1);
        assert_eq!(&*texts.get(b"\xff", String::from_utf8_lossy), "\u{fffd}");
    }
}
