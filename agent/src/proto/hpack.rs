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
//! Bounds: [`MAX_TABLE`] bytes of memory for a table, whatever size the peers agreed on. Entries beyond
//! it are forgotten, and referring to them is unknown too.

use std::{collections::VecDeque, mem::size_of};

use zeroize::Zeroize as _;

use super::huffman;

/// Most memory of one table, bytes: what the shortest paths of a table of [`DEFAULT_SIZE`] take (105 entries of 39
/// bytes as the protocol counts). A smaller bound made the paths of a client that has a hundred of them unknown. With what
/// an allocator adds that worst is 23 KiB a connection; one with twenty fields that repeat and twenty paths has 9 KiB
/// (`ten_thousand_connections` in `tests/tests/streams.rs`).
pub const MAX_TABLE: usize = 14 * 1024;
/// Size of a table before any update (RFC 9113 section 6.5.2).
const DEFAULT_SIZE: usize = 4096;
/// What an entry adds to the lengths of its name and value (RFC 7541 section 4.1).
const OVERHEAD: usize = 32;
/// Longest string that is decoded, bytes; a longer one is passed over as a value without content.
const MAX_STRING: usize = 64 * 1024;

/// What fields mean to whoever reads them.
pub trait Meaning {
    /// A name.
    type Name: Clone;
    /// What is kept of a value.
    type Value: Clone;
    /// The field of the static table at this index, from 0.
    fn fixed(&self, index: usize) -> Option<&(Self::Name, Self::Value)>;
    /// Reads a name.
    fn name(&self, name: &[u8]) -> Self::Name;
    /// Reads a value.
    fn value(&self, name: &Self::Name, value: &[u8]) -> Self::Value;
    /// Memory that a value holds beside itself, bytes.
    fn weight(&self, value: &Self::Value) -> usize;
    /// Must the value not outlive its reading?
    fn is_secret(&self, name: &Self::Name, value: &[u8]) -> bool;
}

/// One field of a block.
#[derive(Debug)]
pub enum Seen<'a, N, V> {
    /// A field.
    Field(&'a N, &'a V),
    /// A field whose name or value is older than the decoder.
    Unknown,
}

/// A block that cannot be decoded. The table is forgotten with it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the header block is not valid HPACK")]
pub struct BadBlock;

/// One direction of a connection.
#[derive(Debug)]
pub struct Decoder<N, V> {
    /// Newest first. `None`: inserted with a name that is not known.
    entries: VecDeque<Entry<N, V>>,
    /// Sum of the entries' sizes as the protocol counts them.
    size: usize,
    /// Most of it.
    limit: usize,
    /// Memory of the entries.
    memory: usize,
    /// Every entry of the peers' table is here, but for those that [`MAX_TABLE`] pushed out.
    whole: bool,
    scratch: Vec<u8>,
}

#[derive(Debug)]
struct Entry<N, V> {
    size: u32,
    weight: u32,
    field: Option<(N, V)>,
}

impl<N: Clone, V: Clone> Decoder<N, V> {
    /// The decoder of a connection that is seen from its first byte (`whole`), or from any other.
    #[must_use]
    pub fn new(whole: bool) -> Self {
        Self { entries: VecDeque::new(), size: 0, limit: DEFAULT_SIZE, memory: 0, whole, scratch: Vec::new() }
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

    /// Memory of the table, bytes.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.memory
    }

    /// Decodes a whole header block and hands out its fields in order.
    ///
    /// # Errors
    /// The block is not valid; fields before the fault were handed out, and the table is forgotten.
    pub fn block<M: Meaning<Name = N, Value = V>>(
        &mut self,
        meaning: &M,
        block: &[u8],
        mut take: impl FnMut(Seen<'_, N, V>),
    ) -> Result<(), BadBlock> {
        let mut scratch = std::mem::take(&mut self.scratch);
        let done = self.fields(meaning, block, &mut scratch, &mut take);
        // One long value must not stay with each connection.
        if scratch.capacity() <= 512 {
            scratch.clear();
            self.scratch = scratch;
        }
        if done.is_none() {
            self.forget();
        }
        done.ok_or(BadBlock)
    }

    fn fields<M: Meaning<Name = N, Value = V>>(
        &mut self,
        meaning: &M,
        mut block: &[u8],
        scratch: &mut Vec<u8>,
        take: &mut impl FnMut(Seen<'_, N, V>),
    ) -> Option<()> {
        while let Some(&first) = block.first() {
            match first {
                // Indexed field.
                0x80.. => {
                    let index = integer(&mut block, 7)?;
                    match self.get(meaning, index)? {
                        Some((name, value)) => take(Seen::Field(name, value)),
                        None => take(Seen::Unknown),
                    }
                }
                // Dynamic table size update.
                0x20..0x40 => {
                    self.limit = integer(&mut block, 5)?;
                    self.evict();
                }
                // Literals: with incremental indexing, never indexed, without indexing.
                _ => {
                    let insert = first & 0x40 != 0;
                    let index = integer(&mut block, if insert { 6 } else { 4 })?;
                    let (name, name_length) = if index == 0 {
                        scratch.clear();
                        let name = string(&mut block, scratch)?;
                        (Some(meaning.name(name)), name.len())
                    } else {
                        match self.get(meaning, index)? {
                            Some((name, _)) => (Some(name.clone()), self.name_length(index)),
                            None => (None, 0),
                        }
                    };
                    scratch.clear();
                    let value = string(&mut block, scratch)?;
                    let mut wipe = false;
                    let size = name_length + value.len() + OVERHEAD;
                    let field = name.map(|name| {
                        let kept = meaning.value(&name, value);
                        wipe = meaning.is_secret(&name, value);
                        (name, kept)
                    });
                    if wipe {
                        scratch.as_mut_slice().zeroize();
                    }
                    match &field {
                        Some((name, value)) => take(Seen::Field(name, value)),
                        None => take(Seen::Unknown),
                    }
                    if insert {
                        let weight = size_of::<Entry<N, V>>() + field.as_ref().map_or(0, |(_, v)| meaning.weight(v));
                        self.insert(size, name_length, weight, field);
                    }
                }
            }
        }
        Some(())
    }

    /// `None`: there is no such field. `Some(None)`: it is not known.
    #[expect(clippy::option_option, reason = "two kinds of nothing")]
    fn get<'a, M: Meaning<Name = N, Value = V>>(&'a self, meaning: &'a M, index: usize) -> Option<Option<&'a (N, V)>> {
        let index = index.checked_sub(1)?;
        match index.checked_sub(STATIC.len()) {
            None => meaning.fixed(index).map(Some),
            Some(index) => Some(self.entries.get(index).and_then(|e| e.field.as_ref())),
        }
    }

    fn name_length(&self, index: usize) -> usize {
        match index.checked_sub(STATIC.len() + 1) {
            None => STATIC.get(index.wrapping_sub(1)).map_or(0, |(name, _)| name.len()),
            Some(index) => self.entries.get(index).map_or(0, |e| (e.weight >> NAME_SHIFT) as usize),
        }
    }

    fn insert(&mut self, size: usize, name_length: usize, weight: usize, field: Option<(N, V)>) {
        let kept = weight.min(MAX_WEIGHT);
        self.size += size;
        self.memory += kept;
        let packed = (name_length.min(MAX_NAME) << NAME_SHIFT) | kept;
        self.entries.push_front(Entry {
            size: u32::try_from(size).unwrap_or(u32::MAX),
            weight: u32::try_from(packed).unwrap_or(u32::MAX),
            field,
        });
        self.evict();
    }

    /// Drops the oldest entries: those that the peers dropped, and those that do not fit into memory.
    fn evict(&mut self) {
        while self.size > self.limit || self.memory > MAX_TABLE {
            let Some(oldest) = self.entries.pop_back() else { break };
            self.size = self.size.saturating_sub(oldest.size as usize);
            self.memory -= oldest.weight as usize & MAX_WEIGHT;
        }
        if self.entries.is_empty() {
            self.size = 0;
            if self.limit == 0 {
                // A table of no size is known whole.
                self.whole = true;
            }
        }
    }
}

/// The weight of an entry shares its word with the length of its name.
const NAME_SHIFT: u32 = 16;
const MAX_WEIGHT: usize = 0xffff;
const MAX_NAME: usize = 0xffff;

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
    if !coded || length > MAX_STRING {
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
    use proptest::prelude::*;

    use super::*;

    /// Keeps everything.
    struct Text;

    impl Meaning for Text {
        type Name = Vec<u8>;
        type Value = Vec<u8>;
        fn fixed(&self, index: usize) -> Option<&(Vec<u8>, Vec<u8>)> {
            static FIXED: std::sync::LazyLock<Vec<(Vec<u8>, Vec<u8>)>> =
                std::sync::LazyLock::new(|| STATIC.iter().map(|(n, v)| ((*n).into(), (*v).into())).collect());
            FIXED.get(index)
        }
        fn name(&self, name: &[u8]) -> Vec<u8> {
            name.into()
        }
        fn value(&self, _: &Vec<u8>, value: &[u8]) -> Vec<u8> {
            value.into()
        }
        fn weight(&self, value: &Vec<u8>) -> usize {
            // The table's own bound on memory must not show here.
            let _ = value;
            0
        }
        fn is_secret(&self, _: &Vec<u8>, _: &[u8]) -> bool {
            false
        }
    }

    type Fields = Vec<Option<(Vec<u8>, Vec<u8>)>>;

    fn decode(table: &mut Decoder<Vec<u8>, Vec<u8>>, block: &[u8]) -> Result<Fields, BadBlock> {
        let mut out = Vec::new();
        table.block(&Text, block, |seen| {
            out.push(match seen {
                Seen::Field(name, value) => Some((name.clone(), value.clone())),
                Seen::Unknown => None,
            });
        })?;
        Ok(out)
    }

    fn text(bytes: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
        let colon = bytes.iter().rposition(|&b| b == b'=').expect("name=value");
        Some((bytes[..colon].into(), bytes[colon + 1..].into()))
    }

    #[test]
    fn the_examples_of_the_rfc() {
        // C.6: responses with Huffman coding, a table of 256 bytes.
        let mut table = Decoder::new(true);
        let first = b"\x3f\xe1\x01\x48\x82\x64\x02\x58\x85\xae\xc3\x77\x1a\x4b\x61\x96\xd0\x7a\xbe\x94\x10\x54\xd4\x44\xa8\x20\x05\x95\x04\x0b\x81\x66\xe0\x82\xa6\x2d\x1b\xff\x6e\x91\x9d\x29\xad\x17\x18\x63\xc7\x8f\x0b\x97\xc8\xe9\xae\x82\xae\x43\xd3";
        let fields = decode(&mut table, first).expect("valid");
        assert_eq!(fields[0], text(b":status=302"));
        assert_eq!(fields[3], text(b"location=https://www.example.com"));
        let fields = decode(&mut table, b"\x48\x83\x64\x0e\xff\xc1\xc0\xbf").expect("valid");
        assert_eq!(fields[0], text(b":status=307"));
        assert_eq!(fields[3], text(b"location=https://www.example.com"));
        assert_eq!(table.size, 222);
    }

    #[test]
    fn a_table_older_than_the_decoder_heals() {
        let mut table = Decoder::new(false);
        // Two references beyond what is known, an insertion, and references to it and past it.
        assert_eq!(decode(&mut table, &[0xbe, 0xbf]).expect("valid"), [None, None]);
        assert_eq!(decode(&mut table, b"\x40\x01a\x01b").expect("valid"), [text(b"a=b")]);
        assert_eq!(decode(&mut table, &[0xbe, 0xbf]).expect("valid"), [text(b"a=b"), None]);
        // A literal whose name is unknown is an entry all the same.
        assert_eq!(decode(&mut table, b"\x7f\x00\x01c").expect("valid"), [None]);
        assert_eq!(decode(&mut table, &[0xbe, 0xbf]).expect("valid"), [None, text(b"a=b")]);
        // A table of no size has no secrets.
        assert!(!table.is_whole());
        decode(&mut table, &[0x20, 0x3f, 0xe1, 0x1f]).expect("valid");
        assert!(table.is_whole());
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
            let mut table = Decoder::new(true);
            assert_eq!(decode(&mut table, block), Err(BadBlock), "{block:?}");
            assert!(!table.is_whole());
        }
        // A bomb: one large entry, and as many references as a block has room for.
        let mut table = Decoder::new(true);
        let mut block = b"\x40\x01a\x7f\xa1\x1e".to_vec();
        block.resize(block.len() + 4000, b'x');
        decode(&mut table, &block).expect("valid");
        let mut seen = 0;
        table.block(&Text, &vec![0xbe; 100_000], |_| seen += 1).expect("valid");
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
            let mut ours = Decoder::new(true);
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
            let (mut whole, mut late) = (Decoder::new(true), Decoder::new(false));
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
            let mut table = Decoder::new(true);
            for block in blocks {
                let _ = decode(&mut table, &block);
                prop_assert!(table.memory() <= MAX_TABLE);
            }
        }
    }
}
