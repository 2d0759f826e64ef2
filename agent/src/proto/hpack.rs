//! HPACK (RFC 7541), decoding only, from any point of a connection on.
//!
//! A decoder that begins in the middle does not know the dynamic table. It learns what is inserted from
//! then on: entries are numbered from the newest, so the number of an entry that was seen is right
//! whatever lies behind it. A reference to anything else is [`Seen::Unknown`], never a guess.
//!
//! Fields are interpreted when they are inserted, not when they are referred to: the table holds what an
//! exchange needs of them and no other value, and a block that refers to one large entry thousands of
//! times (a decompression bomb) costs a look each.
//!
//! What is kept of all values of a table lies in one run of bytes, and an entry is [`ENTRY`] bytes that say
//! where: fewer than the [`OVERHEAD`] that the protocol counts for it, so that a table takes hardly more memory
//! than the size that the peers agreed on.
//!
//! Bounds: [`MAX_TABLE`] bytes of memory for a table, whatever size the peers agreed on. Entries beyond
//! it are forgotten, and referring to them is unknown too.

use std::collections::VecDeque;

use zeroize::Zeroize as _;

use super::huffman;

/// Most bytes of the entries of one table: a table of [`DEFAULT_SIZE`] never needs more than that size, one of
/// 64 KiB has room for 400 entries whose values no exchange needs. With the spare room of a table that grows, two of
/// them stay under 13 KiB (`agent/tests/connections.rs`).
pub const MAX_TABLE: usize = 5 * 1024;
/// Size of a table before any update (RFC 9113 section 6.5.2).
const DEFAULT_SIZE: usize = 4096;
/// What an entry adds to the lengths of its name and value (RFC 7541 section 4.1).
const OVERHEAD: usize = 32;
/// Memory of an entry beside what is kept of its value, bytes.
pub const ENTRY: usize = 12;
/// Most that is kept of a value that is inserted, bytes; what has more is unknown when it is referred to.
const MAX_KEPT: usize = DEFAULT_SIZE;
/// Room for text that stays from block to block, bytes.
const MAX_SCRATCH: usize = 16 * 1024;
/// A table grows by this part of itself, and moves its bytes together when it has freed as much: little room is
/// spare, and a byte is moved few times.
const SLACK: usize = 8;

/// What fields mean to whoever reads them.
pub trait Meaning {
    /// A name; a default one stands where a name is not known.
    type Name: Copy + Default;
    /// The field of the static table at this index, from 0: its name and what is kept of its value.
    fn fixed(&self, index: usize) -> Option<(Self::Name, &[u8])>;
    /// Reads a name.
    fn name(&self, name: &[u8]) -> Self::Name;
    /// Appends what is kept of a value: at most as many bytes more than name and value have as [`OVERHEAD`] is
    /// larger than [`ENTRY`], and no secret.
    fn keep(&self, name: Self::Name, value: &[u8], kept: &mut Vec<u8>);
    /// Must the value not outlive its reading?
    fn is_secret(&self, name: Self::Name, value: &[u8]) -> bool;
}

/// One field of a block.
#[derive(Debug)]
pub enum Seen<'a, N> {
    /// A field: its name, and what is kept of its value.
    Field(N, &'a [u8]),
    /// A field whose name or value is older than the decoder.
    Unknown,
}

/// A block that cannot be decoded. The table is forgotten with it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the header block is not valid HPACK")]
pub struct BadBlock;

/// Room that decoders use in turn.
#[derive(Debug, Default)]
pub struct Scratch {
    /// A text that was coded.
    text: Vec<u8>,
    /// What is kept of a value.
    kept: Vec<u8>,
}

/// One direction of a connection.
#[derive(Debug)]
pub struct Decoder<N> {
    /// Newest last.
    entries: VecDeque<Entry<N>>,
    /// What is kept of their values, in the same order, behind what was kept of evicted ones.
    bytes: Vec<u8>,
    /// Bytes of evicted entries at the front of `bytes`.
    dead: usize,
    /// What an entry that begins at the front of `bytes` has for its `start`.
    base: u16,
    /// Every entry of the peers' table is here, but for those that [`MAX_TABLE`] pushed out.
    whole: bool,
    /// Sum of the entries' sizes as the protocol counts them.
    size: usize,
    /// Most of it.
    limit: usize,
}

#[derive(Debug)]
struct Entry<N> {
    /// As the protocol counts.
    size: u32,
    /// Where in the bytes it begins, from [`Decoder::base`] on. It wraps.
    start: u16,
    /// Bytes of it; [`UNKNOWN`] where nothing is known of the field.
    kept: u16,
    /// Of the text. One longer than this can tell is evicted too late at worst: nobody refers to it then.
    name_length: u16,
    name: N,
}

/// See [`Entry::kept`].
const UNKNOWN: u16 = u16::MAX;

impl<N> Entry<N> {
    /// Bytes that are kept of it.
    fn held(&self) -> usize {
        if self.kept == UNKNOWN { 0 } else { usize::from(self.kept) }
    }
}

impl<N: Copy + Default> Decoder<N> {
    /// The decoder of a connection that is seen from its first byte (`whole`), or from any other.
    #[must_use]
    pub fn new(whole: bool) -> Self {
        const { assert!(size_of::<Entry<N>>() == ENTRY, "the bounds count on it") };
        Self { entries: VecDeque::new(), bytes: Vec::new(), dead: 0, base: 0, whole, size: 0, limit: DEFAULT_SIZE }
    }

    /// Bytes were missed: nothing is known of the table any more.
    pub fn forget(&mut self) {
        *self = Self::new(false);
    }

    /// Is every entry of the table known?
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.whole
    }

    /// Bytes of the entries, [`MAX_TABLE`] at most.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.entries.len() * ENTRY + self.bytes.len() - self.dead
    }

    /// Memory of the table with what is spare, bytes.
    #[must_use]
    pub fn allocated(&self) -> usize {
        self.entries.capacity() * ENTRY + self.bytes.capacity()
    }

    /// Decodes a whole header block and hands out its fields in order.
    ///
    /// # Errors
    /// The block is not valid; fields before the fault were handed out, and the table is forgotten.
    pub fn block<M: Meaning<Name = N>>(
        &mut self,
        meaning: &M,
        scratch: &mut Scratch,
        block: &[u8],
        mut take: impl FnMut(Seen<'_, N>),
    ) -> Result<(), BadBlock> {
        let done = self.fields(meaning, block, scratch, &mut take);
        if done.is_none() {
            // It may hold the beginning of a secret.
            scratch.text.zeroize();
            self.forget();
        }
        // One long value must not stay.
        if scratch.text.capacity().max(scratch.kept.capacity()) > MAX_SCRATCH {
            *scratch = Scratch::default();
        }
        done.ok_or(BadBlock)
    }

    fn fields<M: Meaning<Name = N>>(
        &mut self,
        meaning: &M,
        mut block: &[u8],
        scratch: &mut Scratch,
        take: &mut impl FnMut(Seen<'_, N>),
    ) -> Option<()> {
        while let Some(&first) = block.first() {
            match first {
                // Indexed field.
                0x80.. => {
                    let index = integer(&mut block, 7)?;
                    match self.get(meaning, index)? {
                        Some((name, kept)) => take(Seen::Field(name, kept)),
                        None => take(Seen::Unknown),
                    }
                }
                // Dynamic table size update.
                0x20..0x40 => {
                    self.limit = integer(&mut block, 5)?;
                    self.make_room(0);
                    self.shrink();
                    if self.limit == 0 {
                        // A table of no size is known whole, and needs no memory.
                        *self = Self { limit: 0, ..Self::new(true) };
                    }
                }
                // Literals: with incremental indexing, never indexed, without indexing.
                _ => {
                    let Scratch { text, kept } = &mut *scratch;
                    let insert = first & 0x40 != 0;
                    let index = integer(&mut block, if insert { 6 } else { 4 })?;
                    let (name, name_length) = if index == 0 {
                        text.clear();
                        let name = string(&mut block, text)?;
                        (Some(meaning.name(name)), name.len())
                    } else {
                        match self.get(meaning, index)? {
                            Some((name, _)) => (Some(name), self.name_length(index)),
                            None => (None, 0),
                        }
                    };
                    text.clear();
                    let value = string(&mut block, text)?;
                    let size = name_length + value.len() + OVERHEAD;
                    if let Some(name) = name {
                        kept.clear();
                        meaning.keep(name, value, kept);
                        if meaning.is_secret(name, value) {
                            text.as_mut_slice().zeroize();
                        }
                        take(Seen::Field(name, kept));
                    } else {
                        take(Seen::Unknown);
                    }
                    if insert {
                        self.insert(size, name_length, name.map(|name| (name, &kept[..])));
                    }
                }
            }
        }
        Some(())
    }

    /// The entry at this index, from 0.
    fn entry(&self, index: usize) -> Option<&Entry<N>> {
        self.entries.get(self.entries.len().checked_sub(index + 1)?)
    }

    /// `None`: there is no such field. `Some(None)`: it is not known.
    #[expect(clippy::option_option, reason = "two kinds of nothing")]
    fn get<'a, M: Meaning<Name = N>>(&'a self, meaning: &'a M, index: usize) -> Option<Option<(N, &'a [u8])>> {
        let index = index.checked_sub(1)?;
        let Some(index) = index.checked_sub(STATIC.len()) else { return meaning.fixed(index).map(Some) };
        let known = self.entry(index).filter(|e| e.kept != UNKNOWN);
        Some(known.and_then(|e| {
            let start = usize::from(e.start.wrapping_sub(self.base));
            Some((e.name, self.bytes.get(start..start + e.held())?))
        }))
    }

    fn name_length(&self, index: usize) -> usize {
        match index.checked_sub(STATIC.len() + 1) {
            None => STATIC.get(index.wrapping_sub(1)).map_or(0, |(name, _)| name.len()),
            Some(index) => self.entry(index).map_or(0, |e| e.name_length.into()),
        }
    }

    /// Inserts what is kept of a field; `None` where its name is not known.
    fn insert(&mut self, size: usize, name_length: usize, field: Option<(N, &[u8])>) {
        self.make_room(size);
        if size > self.limit {
            // It is no entry, and there is no other (RFC 7541 section 4.4).
            return;
        }
        let (name, kept, length) = match field.filter(|(_, kept)| kept.len() <= MAX_KEPT) {
            Some((name, kept)) => (name, kept, u16::try_from(kept.len()).unwrap_or(UNKNOWN)),
            None => (N::default(), &[][..], UNKNOWN),
        };
        while self.memory() + ENTRY + kept.len() > MAX_TABLE && self.drop_oldest() {}
        if self.entries.len() == self.entries.capacity() {
            self.entries.reserve_exact(self.entries.len() / SLACK + 4);
        }
        let start = self.append(kept);
        self.size += size;
        self.entries.push_back(Entry {
            size: u32::try_from(size).unwrap_or(u32::MAX),
            start,
            kept: length,
            name_length: u16::try_from(name_length).unwrap_or(u16::MAX),
            name,
        });
    }

    /// Appends bytes of a new entry and says where they begin.
    fn append(&mut self, kept: &[u8]) -> u16 {
        if self.bytes.capacity() - self.bytes.len() < kept.len() {
            self.compact();
            let spare = kept.len().max(self.bytes.len() / SLACK);
            if self.bytes.capacity() - self.bytes.len() < spare {
                self.bytes.reserve_exact(kept.len() + self.bytes.len() / SLACK);
            }
        }
        let start = self.base.wrapping_add(self.bytes.len() as u16);
        self.bytes.extend_from_slice(kept);
        start
    }

    /// Drops the oldest entries that the peers drop when one of this size comes.
    fn make_room(&mut self, size: usize) {
        while self.size + size > self.limit && self.drop_oldest() {}
    }

    /// Gives back what is spare.
    fn shrink(&mut self) {
        self.compact();
        self.bytes.shrink_to_fit();
        self.entries.shrink_to_fit();
    }

    /// Moves the bytes together.
    fn compact(&mut self) {
        self.bytes.drain(..self.dead);
        // Bytes are bounded by `MAX_TABLE`: positions fit, and wrap together.
        self.base = self.base.wrapping_add(self.dead as u16);
        self.dead = 0;
    }

    fn drop_oldest(&mut self) -> bool {
        let Some(oldest) = self.entries.pop_front() else { return false };
        self.size = self.size.saturating_sub(oldest.size as usize);
        self.dead += oldest.held();
        true
    }
}

/// An integer with a prefix of `bits` bits (RFC 7541 section 5.1). `None` when it is cut off or does not
/// fit 32 bits.
fn integer(block: &mut &[u8], bits: u32) -> Option<usize> {
    let mask = (1usize << bits) - 1;
    let (&first, mut rest) = block.split_first()?;
    let mut value = usize::from(first) & mask;
    if value == mask {
        let mut shift = 0;
        loop {
            let (&byte, after) = rest.split_first()?;
            rest = after;
            value += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
            shift += 7;
            if shift > 28 {
                return None;
            }
        }
    }
    *block = rest;
    (value <= u32::MAX as usize).then_some(value)
}

/// A string literal (RFC 7541 section 5.2), decoded into `scratch` where it is coded.
fn string<'a: 's, 's>(block: &mut &'a [u8], scratch: &'s mut Vec<u8>) -> Option<&'s [u8]> {
    let coded = block.first()? & 0x80 != 0;
    let length = integer(block, 7)?;
    let (text, rest) = block.split_at_checked(length)?;
    *block = rest;
    if !coded {
        return Some(text);
    }
    // The shortest code has 5 bits. Growing would leave copies of secrets behind.
    scratch.reserve_exact(length * 8 / 5 + 1);
    huffman::decode(text, scratch).then_some(&scratch[..])
}

/// RFC 7541 appendix A.
pub const STATIC: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use proptest::prelude::*;

    use super::*;

    /// Keeps everything; names by number.
    #[derive(Default)]
    struct Text {
        names: RefCell<Vec<Vec<u8>>>,
        scratch: RefCell<Scratch>,
    }

    impl Meaning for Text {
        type Name = u16;
        fn fixed(&self, index: usize) -> Option<(u16, &[u8])> {
            STATIC.get(index).map(|(name, value)| (self.name(name.as_bytes()), value.as_bytes()))
        }
        fn name(&self, name: &[u8]) -> u16 {
            let mut names = self.names.borrow_mut();
            let at = names.iter().position(|n| n == name).unwrap_or_else(|| {
                names.push(name.into());
                names.len() - 1
            });
            u16::try_from(at).expect("few")
        }
        fn keep(&self, _: u16, value: &[u8], kept: &mut Vec<u8>) {
            kept.extend_from_slice(value);
        }
        fn is_secret(&self, _: u16, _: &[u8]) -> bool {
            false
        }
    }

    type Fields = Vec<Option<(Vec<u8>, Vec<u8>)>>;

    /// A decoder and its names.
    struct Whole(Decoder<u16>, Text);

    impl Whole {
        fn new(whole: bool) -> Self {
            Self(Decoder::new(whole), Text::default())
        }
    }

    fn decode(Whole(table, names): &mut Whole, block: &[u8]) -> Result<Fields, BadBlock> {
        let mut out = Vec::new();
        table.block(names, &mut names.scratch.borrow_mut(), block, |seen| {
            out.push(match seen {
                Seen::Field(name, value) => Some((names.names.borrow()[usize::from(name)].clone(), value.into())),
                Seen::Unknown => None,
            });
        })?;
        // An entry takes no more than the protocol counts for it.
        assert!(table.memory() <= table.size && table.size <= table.limit);
        assert!(table.allocated() <= table.limit * 9 / 8 + 128);
        Ok(out)
    }

    fn text(bytes: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
        let colon = bytes.iter().rposition(|&b| b == b'=').expect("name=value");
        Some((bytes[..colon].into(), bytes[colon + 1..].into()))
    }

    #[test]
    fn the_examples_of_the_rfc() {
        // C.6: responses with Huffman coding, a table of 256 bytes.
        let mut table = Whole::new(true);
        let first = b"\x3f\xe1\x01\x48\x82\x64\x02\x58\x85\xae\xc3\x77\x1a\x4b\x61\x96\xd0\x7a\xbe\x94\x10\x54\xd4\x44\xa8\x20\x05\x95\x04\x0b\x81\x66\xe0\x82\xa6\x2d\x1b\xff\x6e\x91\x9d\x29\xad\x17\x18\x63\xc7\x8f\x0b\x97\xc8\xe9\xae\x82\xae\x43\xd3";
        let fields = decode(&mut table, first).expect("valid");
        assert_eq!(fields[0], text(b":status=302"));
        assert_eq!(fields[3], text(b"location=https://www.example.com"));
        let fields = decode(&mut table, b"\x48\x83\x64\x0e\xff\xc1\xc0\xbf").expect("valid");
        assert_eq!(fields[0], text(b":status=307"));
        assert_eq!(fields[3], text(b"location=https://www.example.com"));
        assert_eq!(table.0.size, 222);
    }

    #[test]
    fn a_table_older_than_the_decoder_heals() {
        let mut table = Whole::new(false);
        // Two references beyond what is known, an insertion, and references to it and past it.
        assert_eq!(decode(&mut table, &[0xbe, 0xbf]).expect("valid"), [None, None]);
        assert_eq!(decode(&mut table, b"\x40\x01a\x01b").expect("valid"), [text(b"a=b")]);
        assert_eq!(decode(&mut table, &[0xbe, 0xbf]).expect("valid"), [text(b"a=b"), None]);
        // A literal whose name is unknown is an entry all the same.
        assert_eq!(decode(&mut table, b"\x7f\x00\x01c").expect("valid"), [None]);
        assert_eq!(decode(&mut table, &[0xbe, 0xbf]).expect("valid"), [None, text(b"a=b")]);
        // A table of no size has no secrets.
        assert!(!table.0.is_whole());
        decode(&mut table, &[0x20, 0x3f, 0xe1, 0x1f]).expect("valid");
        assert!(table.0.is_whole());
    }

    #[test]
    fn hostile_blocks() {
        for block in [
            &[0x80][..],
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
            &[0x40, 0x7f, 0xff, 0xff, 0xff, 0x7f],
            &[0x00, 0x81, 0xff],
            &[0x40],
        ] {
            let mut table = Whole::new(true);
            assert_eq!(decode(&mut table, block), Err(BadBlock), "{block:?}");
            assert!(!table.0.is_whole());
        }
        // A bomb: one large entry, and as many references as a block has room for.
        let mut table = Whole::new(true);
        let mut block = b"\x40\x01a\x7f\xa1\x1e".to_vec();
        block.resize(block.len() + 4000, b'x');
        decode(&mut table, &block).expect("valid");
        let mut seen = 0;
        let Whole(table, names) = &mut table;
        table.block(names, &mut Scratch::default(), &vec![0xbe; 100_000], |_| seen += 1).expect("valid");
        assert_eq!(seen, 100_000);
    }

    /// One field as an encoder may write it: representation, index, name, value, Huffman or not.
    fn field() -> impl Strategy<Value = (u8, usize, Vec<u8>, Vec<u8>, usize)> {
        let word = prop::collection::vec(any::<u8>(), 0..20);
        (0u8..6, 1usize..75, word.clone(), word, 0usize..5000)
    }

    fn write((form, index, name, value, size): (u8, usize, Vec<u8>, Vec<u8>, usize), out: &mut Vec<u8>) {
        let mut number = |n: usize, bits: u8, high: u8| {
            let mut bytes = loona_hpack::encoder::encode_integer(n, bits);
            bytes[0] |= high;
            out.append(&mut bytes);
        };
        let (bits, high) = match form {
            0 | 1 => return number(index, 7, 0x80),
            2 | 3 => (6, 0x40),
            4 => (4, if size % 2 == 0 { 0 } else { 0x10 }),
            _ => return number(size, 5, 0x20),
        };
        let named = index % 3 != 0;
        number(if named { index } else { 0 }, bits, high);
        let texts = if named { vec![value] } else { vec![name, value] };
        for text in texts {
            out.extend(loona_hpack::encoder::encode_integer(text.len(), 7));
            out.extend(text);
        }
    }

    proptest! {
        /// What the reference implementation reads of a block is what is read here, whatever was inserted
        /// and evicted before; what it refuses is refused or unknown.
        #[test]
        fn as_the_reference(blocks in prop::collection::vec(prop::collection::vec(field(), 0..20), 0..12)) {
            let mut reference = loona_hpack::Decoder::new();
            let mut ours = Whole::new(true);
            for fields in blocks {
                let mut block = Vec::new();
                // Size updates come first in a block.
                let (updates, rest): (Vec<_>, Vec<_>) = fields.into_iter().partition(|f| f.0 == 5);
                if !rest.is_empty() {
                    updates.into_iter().take(1).chain(rest).for_each(|f| write(f, &mut block));
                }
                let read = decode(&mut ours, &block);
                match reference.decode(&block) {
                    Ok(wanted) => {
                        let wanted: Fields =
                            wanted.into_iter().map(|(n, v)| Some((n.to_vec(), v.to_vec()))).collect();
                        prop_assert_eq!(read.expect("valid"), wanted);
                    }
                    Err(_) => {
                        prop_assert!(read.is_err() || read.is_ok_and(|f| f.contains(&None)));
                        return Ok(());
                    }
                }
            }
        }

        /// A decoder that joins anywhere says the same as one that was there from the start, or that it does
        /// not know.
        #[test]
        fn a_late_one_is_never_wrong(
            blocks in prop::collection::vec(prop::collection::vec(field(), 0..20), 1..12),
            join in 0usize..12,
        ) {
            let (mut whole, mut late) = (Whole::new(true), Whole::new(false));
            for (i, fields) in blocks.into_iter().enumerate() {
                let mut block = Vec::new();
                fields.into_iter().for_each(|f| write(f, &mut block));
                let Ok(right) = decode(&mut whole, &block) else { return Ok(()) };
                if i >= join {
                    let read = decode(&mut late, &block).expect("valid for the other");
                    prop_assert_eq!(read.len(), right.len());
                    for (read, right) in read.into_iter().zip(right) {
                        // A reference beyond the whole table is unknown there; here it may name what the
                        // peers evicted by a size that was agreed on before.
                        prop_assert!(read.is_none() || right.is_none() || read == right);
                    }
                }
            }
        }

        #[test]
        fn any_bytes(blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..10)) {
            let mut table = Whole::new(true);
            for block in blocks {
                let _ = decode(&mut table, &block);
                prop_assert!(table.0.memory() <= MAX_TABLE);
            }
        }
    }
}
