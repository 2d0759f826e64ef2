//! Functions of a Go executable by name, from the table that its runtime needs for stack traces (`pclntab`): it is
//! there in stripped ones too. Layouts of Go 1.16 to 1.26, from `runtime/symtab.go` and `cmd/link`.
//!
//! The table is found by its first bytes (the section that holds it has several names, or none), and what it says is
//! held against the runtime's `moduledata`, which points to it and knows where the code begins: since Go 1.26 nothing
//! else does. Addresses in position-independent files are read as the linker wrote them, or from the relocations
//! where it wrote nothing.
//!
//! Input is any file that any process runs. It is read as hostile: through one window, at most [`MAX_READ`] bytes in
//! all, every offset checked.

use std::{collections::HashMap, fs::File, ops::Range, os::unix::fs::FileExt};

use memchr::memmem;

/// Most bytes that are read for one file. The table of a program of 100 MiB has 25.
pub const MAX_READ: u64 = 1 << 30;
/// Most functions of a program; the largest known have a million.
const MAX_FUNCTIONS: u64 = 4 << 20;
/// Longest function that is believed, bytes.
const MAX_FUNCTION: u64 = 64 << 10;
/// Bytes that are read at once.
const WINDOW: usize = 256 << 10;
/// Places that look like the start of a table, of which one is.
const MAX_CANDIDATES: usize = 16;

/// Bytes of the header in front of its words.
const MAGIC: u64 = 8;
/// `moduledata`: words before `minpc` and `maxpc` (a pointer, six slices, a pointer).
const MINPC: u64 = 8 * (1 + 6 * 3 + 1);

/// Why the functions are not found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unfound {
    /// There is no such table.
    #[error("it has no function table of Go 1.16 or later")]
    NoTable,
    /// The table is there, but not where the code begins.
    #[error("where its code begins is not found")]
    NoText,
    /// Offsets lead nowhere, or the work has no end.
    #[error("its function table is damaged, or larger than is looked through")]
    Damaged,
}

/// A part of the file that is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where it is mapped.
    pub address: u64,
    /// Where it is in the file.
    pub offset: u64,
    /// Its bytes in the file.
    pub size: u64,
    /// It holds code.
    pub is_code: bool,
}

/// What is known of a file's layout.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layout {
    /// Mapped parts.
    pub segments: Vec<Segment>,
    /// Address and bytes of the relocations of the dynamic linker (`DT_RELA`), 0 where there are none.
    pub relocations: (u64, u64),
    /// Bytes of the smallest instruction: 1, or 4 on arm64.
    pub quantum: u8,
}

/// The functions that were found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Functions {
    /// Offset in the file, by name.
    pub by_name: HashMap<&'static str, Range<u64>>,
    /// The table is that of Go 1.16 and 1.17.
    pub is_before_1_18: bool,
}

/// Bytes by their place.
pub trait ReadAt {
    /// Reads into `to` from `offset` on; fewer bytes at the end.
    fn read_at(&self, offset: u64, to: &mut [u8]) -> usize;
}

impl ReadAt for File {
    fn read_at(&self, offset: u64, to: &mut [u8]) -> usize {
        let mut done = 0;
        while done < to.len() {
            match FileExt::read_at(self, &mut to[done..], offset.saturating_add(done as u64)) {
                Ok(0) | Err(_) => break,
                Ok(n) => done += n,
            }
        }
        done
    }
}

impl ReadAt for [u8] {
    fn read_at(&self, offset: u64, to: &mut [u8]) -> usize {
        let rest = usize::try_from(offset).ok().and_then(|at| self.get(at..)).unwrap_or_default();
        let n = rest.len().min(to.len());
        to[..n].copy_from_slice(&rest[..n]);
        n
    }
}

/// Finds the functions with these names; those that were inlined everywhere or left out are absent.
///
/// # Errors
/// [`Unfound`].
pub fn functions<R: ReadAt + ?Sized>(file: &R, layout: &Layout, wanted: &[&'static str]) -> Result<Functions, Unfound> {
    let mut reader = Reader { file, left: MAX_READ };
    let mut reason = Unfound::NoTable;
    for header in reader.headers(layout)? {
        match reader.text(layout, &header) {
            Ok(text) => return reader.named(layout, &header, text, wanted),
            Err(e) => reason = e,
        }
    }
    Err(reason)
}

/// Where in the mapped data (not the code) these bytes are first, as an offset in the file.
#[must_use]
pub fn find<R: ReadAt + ?Sized>(file: &R, layout: &Layout, pattern: &[u8]) -> Option<u64> {
    let mut reader = Reader { file, left: MAX_READ };
    let mut found = None;
    for segment in layout.segments.iter().filter(|s| !s.is_code) {
        let range = (segment.offset, segment.offset.saturating_add(segment.size));
        reader.search(range, pattern, |_, at| found.replace(at).is_none()).ok()?;
        if found.is_some() {
            break;
        }
    }
    found
}

/// The head of a table.
#[derive(Debug, Clone, Copy)]
struct Header {
    /// Where it is in memory.
    address: u64,
    /// End of what may belong to it, in the file.
    end: u64,
    /// Entries are addresses: Go 1.16 and 1.17.
    is_absolute: bool,
    functions: u64,
    /// Where the code begins, 0 where it is not said.
    text: u64,
    /// Names, as offsets in the file.
    names: (u64, u64),
    /// Offset in the table of the names.
    names_at: u64,
    /// Entries, in the file.
    entries: u64,
}

impl Header {
    /// Bytes of an entry's two halves.
    const fn half(&self) -> u64 {
        if self.is_absolute { 8 } else { 4 }
    }
}

struct Reader<'a, R: ?Sized> {
    file: &'a R,
    /// Bytes that may still be read.
    left: u64,
}

/// What was read last.
#[derive(Default)]
struct Window {
    start: u64,
    bytes: Vec<u8>,
}

impl<R: ReadAt + ?Sized> Reader<'_, R> {
    fn load(&mut self, window: &mut Window, offset: u64, most: u64) -> Result<(), Unfound> {
        let n = usize::try_from(most).unwrap_or(WINDOW).min(WINDOW);
        self.left = self.left.checked_sub(n as u64 + 64).ok_or(Unfound::Damaged)?;
        window.start = offset;
        window.bytes.resize(n, 0);
        let read = self.file.read_at(offset, &mut window.bytes);
        window.bytes.truncate(read);
        Ok(())
    }

    /// The bytes at `offset` of the file.
    fn bytes<const N: usize>(&mut self, window: &mut Window, offset: u64) -> Result<[u8; N], Unfound> {
        let held = |window: &Window| {
            let at = usize::try_from(offset.checked_sub(window.start)?).ok()?;
            window.bytes.get(at..at.checked_add(N)?)?.try_into().ok()
        };
        if let Some(bytes) = held(window) {
            return Ok(bytes);
        }
        self.load(window, offset, WINDOW as u64)?;
        held(window).ok_or(Unfound::Damaged)
    }

    fn word(&mut self, window: &mut Window, offset: u64) -> Result<u64, Unfound> {
        self.bytes(window, offset).map(u64::from_le_bytes)
    }

    fn half_word(&mut self, window: &mut Window, offset: u64) -> Result<u64, Unfound> {
        self.bytes(window, offset).map(|b| u32::from_le_bytes(b).into())
    }

    /// Hands the offsets at which `pattern` is in a range of the file to `take`, until that returns true.
    fn search(
        &mut self,
        range: (u64, u64),
        pattern: &[u8],
        mut take: impl FnMut(&mut Self, u64) -> bool,
    ) -> Result<(), Unfound> {
        let finder = memmem::Finder::new(pattern);
        let mut window = Window::default();
        let mut at = range.0;
        while at < range.1 {
            self.load(&mut window, at, range.1 - at)?;
            for found in finder.find_iter(&window.bytes) {
                if take(self, at + found as u64) {
                    return Ok(());
                }
            }
            let n = window.bytes.len();
            if n < WINDOW {
                break;
            }
            // A pattern may lie across the border.
            at += (n - pattern.len() + 1) as u64;
        }
        Ok(())
    }

    /// Places that look like the start of a table.
    fn headers(&mut self, layout: &Layout) -> Result<Vec<Header>, Unfound> {
        let mut found = Vec::new();
        for segment in layout.segments.iter().filter(|s| !s.is_code) {
            let range = (segment.offset, segment.offset.saturating_add(segment.size));
            // The lowest byte in front tells the version; pointers have 8 bytes.
            let pattern = [0xff, 0xff, 0xff, 0, 0, layout.quantum, 8];
            self.search(range, &pattern, |reader, at| {
                if let Some(at) = at.checked_sub(1).filter(|&at| at >= segment.offset)
                    && let Ok(header) = reader.header(segment, at)
                {
                    found.push(header);
                }
                found.len() >= MAX_CANDIDATES
            })?;
        }
        Ok(found)
    }

    fn header(&mut self, segment: &Segment, offset: u64) -> Result<Header, Unfound> {
        let window = &mut Window::default();
        let end = segment.offset.checked_add(segment.size).ok_or(Unfound::Damaged)?;
        self.load(window, offset, MAGIC + 8 * 8)?;
        let start: [u8; 8] = self.bytes(window, offset)?;
        let is_absolute = match start[0] {
            0xfa => true,
            0xf0 | 0xf1 => false,
            _ => return Err(Unfound::NoTable),
        };
        let mut words = [0; 8];
        for (word, i) in words.iter_mut().zip(0..) {
            *word = self.word(window, offset + MAGIC + 8 * i)?;
        }
        let [functions, _, rest @ ..] = words;
        let (text, [names, units, _, _, entries]) = if is_absolute {
            (0, [rest[0], rest[1], rest[2], rest[3], rest[4]])
        } else {
            (rest[0], [rest[1], rest[2], rest[3], rest[4], rest[5]])
        };
        let place = |at: u64| offset.checked_add(at).filter(|&at| at < end).ok_or(Unfound::NoTable);
        let header = Header {
            address: segment.address.checked_add(offset - segment.offset).ok_or(Unfound::NoTable)?,
            end,
            is_absolute,
            functions,
            text,
            names: (place(names)?, place(units)?),
            names_at: names,
            entries: place(entries)?,
        };
        let bytes = (functions + 1).checked_mul(2 * header.half()).and_then(|n| n.checked_add(header.entries));
        if functions == 0
            || functions > MAX_FUNCTIONS
            || header.names.0 > header.names.1
            || bytes.is_none_or(|to| to > end)
        {
            return Err(Unfound::NoTable);
        }
        Ok(header)
    }

    /// First halves of the first entry and of the one behind the last function.
    fn bounds(&mut self, header: &Header) -> Result<(u64, u64), Unfound> {
        let window = &mut Window::default();
        let last = header.entries + header.functions * 2 * header.half();
        if header.is_absolute {
            Ok((self.word(window, header.entries)?, self.word(window, last)?))
        } else {
            Ok((self.half_word(window, header.entries)?, self.half_word(window, last)?))
        }
    }

    /// The address that the entries count from.
    fn text(&mut self, layout: &Layout, header: &Header) -> Result<u64, Unfound> {
        let (first, last) = self.bounds(header)?;
        let mut text = None;
        let hold = |low: u64, high: u64| {
            let matches = if header.is_absolute {
                (low, high) == (first, last)
            } else {
                high.checked_sub(low).is_some_and(|n| last.checked_sub(first) == Some(n))
            };
            matches.then(|| if header.is_absolute { 0 } else { low.wrapping_sub(first) })
        };
        let mut pattern = [0; 16];
        pattern[..8].copy_from_slice(&header.address.to_le_bytes());
        pattern[8..].copy_from_slice(&header.address.wrapping_add(header.names_at).to_le_bytes());
        for segment in layout.segments.iter().filter(|s| !s.is_code) {
            let range = (segment.offset, segment.offset.saturating_add(segment.size));
            self.search(range, &pattern, |reader, at| {
                let window = &mut Window::default();
                if let Ok(low) = reader.word(window, at + MINPC)
                    && let Ok(high) = reader.word(window, at + MINPC + 8)
                {
                    text = hold(low, high);
                }
                text.is_some()
            })?;
            if text.is_some() {
                break;
            }
        }
        if text.is_none() && header.is_absolute {
            // Its entries are relocated too: a rare linker, an old Go.
            return Err(Unfound::NoText);
        }
        if text.is_none()
            && let Some((low, high)) = self.relocated(layout, header)?
        {
            text = hold(low, high);
        }
        text.or(Some(header.text).filter(|&t| t != 0)).ok_or(Unfound::NoText)
    }

    /// `minpc` and `maxpc` from the relocations, of which one makes the pointer to the table.
    fn relocated(&mut self, layout: &Layout, header: &Header) -> Result<Option<(u64, u64)>, Unfound> {
        /// Bytes of an `Elf64_Rela`: place, kind and symbol, value.
        const ENTRY: u64 = 24;
        let (address, size) = layout.relocations;
        let Some(start) = offset_of(layout, address, false) else { return Ok(None) };
        let mut window = Window::default();
        let entries = size / ENTRY;
        let mut module = None;
        // The order is the linker's: first the pointer, then what lies behind it.
        for pass in 0..2 {
            let (mut low, mut high) = (None, None);
            for i in 0..entries {
                let at = start.checked_add(i * ENTRY).ok_or(Unfound::Damaged)?;
                let entry: [u8; 24] = self.bytes(&mut window, at)?;
                let word = |i: usize| u64::from_le_bytes(std::array::from_fn(|k| entry[8 * i + k]));
                let (place, value) = (word(0), word(2));
                if pass == 0 {
                    if value == header.address {
                        module = Some(place);
                        break;
                    }
                } else if let Some(module) = module {
                    if place == module.wrapping_add(MINPC) {
                        low = Some(value);
                    } else if place == module.wrapping_add(MINPC + 8) {
                        high = Some(value);
                    }
                }
            }
            if let (Some(low), Some(high)) = (low, high) {
                return Ok(Some((low, high)));
            }
            if module.is_none() {
                break;
            }
        }
        Ok(None)
    }

    /// Offsets among the names, by which the functions are known.
    fn name(&mut self, header: &Header, name: &str) -> Result<Option<u64>, Unfound> {
        let pattern = [b"\0", name.as_bytes(), b"\0"].concat();
        // The byte in front of the first name is another part's, or the header's.
        let start = header.names.0.saturating_sub(1);
        let mut found = None;
        self.search((start, header.names.1), &pattern, |_, at| {
            found = Some(at + 1 - header.names.0);
            true
        })?;
        Ok(found)
    }

    fn named(
        &mut self,
        layout: &Layout,
        header: &Header,
        text: u64,
        wanted: &[&'static str],
    ) -> Result<Functions, Unfound> {
        let mut places: HashMap<u64, &'static str> = HashMap::new();
        for name in wanted {
            if let Some(at) = self.name(header, name)? {
                places.insert(at, *name);
            }
        }
        let mut found = Functions { is_before_1_18: header.is_absolute, ..Functions::default() };
        let (mut entries, mut details) = (Window::default(), Window::default());
        let half = header.half();
        for i in 0..header.functions {
            if found.by_name.len() == places.len() {
                break;
            }
            let at = header.entries + i * 2 * half;
            let (start, detail, next) = if header.is_absolute {
                let entry: [u8; 24] = self.bytes(&mut entries, at)?;
                let word = |i: usize| u64::from_le_bytes(std::array::from_fn(|k| entry[8 * i + k]));
                (word(0), word(1), word(2))
            } else {
                let entry: [u8; 12] = self.bytes(&mut entries, at)?;
                let word = |i: usize| u64::from(u32::from_le_bytes(std::array::from_fn(|k| entry[4 * i + k])));
                (word(0), word(1), word(2))
            };
            // struct _func: entry, offset of the name.
            let name_at = header.entries.checked_add(detail).and_then(|at| at.checked_add(half));
            let name_at = name_at.filter(|&at| at < header.end).ok_or(Unfound::Damaged)?;
            let Some(name) = places.get(&self.half_word(&mut details, name_at)?) else { continue };
            let size = next.checked_sub(start).filter(|&n| n > 0 && n <= MAX_FUNCTION).ok_or(Unfound::Damaged)?;
            let address = text.checked_add(start).ok_or(Unfound::Damaged)?;
            let offset = offset_of(layout, address, true).ok_or(Unfound::Damaged)?;
            found.by_name.insert(*name, offset..offset + size);
        }
        Ok(found)
    }
}

/// Where an address is in the file.
fn offset_of(layout: &Layout, address: u64, is_code: bool) -> Option<u64> {
    let within = |s: &&Segment| s.is_code == is_code && address.checked_sub(s.address).is_some_and(|at| at < s.size);
    let segment = layout.segments.iter().find(within)?;
    segment.offset.checked_add(address - segment.address)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program with the functions `a` and `f`: table and `moduledata` up to `CODE`, which is mapped at 0x2000.
    struct Program {
        bytes: Vec<u8>,
        layout: Layout,
    }

    const DATA: u64 = 0x1000;
    const TEXT: u64 = 0x2000;

    impl Program {
        /// Of Go 1.17 (0xfa), 1.18 (0xf0) or 1.20 (0xf1).
        fn new(magic: u8) -> Self {
            let is_absolute = magic == 0xfa;
            let mut bytes = vec![magic, 0xff, 0xff, 0xff, 0, 0, 1, 8];
            let words = |bytes: &mut Vec<u8>, words: &[u64]| bytes.extend(words.iter().flat_map(|w| w.to_le_bytes()));
            // Functions, files, start of the code where there is one; names, units, files, counters, functions.
            words(&mut bytes, &[2, 0]);
            let names = if is_absolute { 64 } else { 72 };
            if !is_absolute {
                words(&mut bytes, &[0]);
            }
            words(&mut bytes, &[names, names + 8, names + 8, names + 8, names + 8]);
            bytes.extend(b"a\0f\0\0\0\0\0");
            if is_absolute {
                words(&mut bytes, &[TEXT, 40, TEXT + 16, 56, TEXT + 48]);
                words(&mut bytes, &[TEXT, 0, TEXT + 16, 2]);
            } else {
                let entries: [u32; 10] = [0, 20, 16, 28, 48, 0, 0, 16, 2, 0];
                bytes.extend(entries.iter().flat_map(|w| w.to_le_bytes()));
            }
            bytes.resize(256, 0);
            words(&mut bytes, &[DATA, DATA + names]);
            bytes.resize(256 + MINPC as usize, 0);
            words(&mut bytes, &[TEXT, TEXT + 48]);
            let data = bytes.len() as u64;
            bytes.resize(bytes.len() + 64, 0xc3);
            let segment = |address, offset, size, is_code| Segment { address, offset, size, is_code };
            let segments = vec![segment(DATA, 0, data, false), segment(TEXT, data, 64, true)];
            Self { bytes, layout: Layout { segments, relocations: (0, 0), quantum: 1 } }
        }

        fn functions(&self) -> Result<Functions, Unfound> {
            functions(&*self.bytes, &self.layout, &["f", "g"])
        }

        fn code(&self) -> u64 {
            self.layout.segments[1].offset
        }
    }

    #[test]
    fn a_function_of_each_version() {
        for magic in [0xfa, 0xf0, 0xf1] {
            let program = Program::new(magic);
            let found = program.functions().expect("found");
            let place = program.code() + 16..program.code() + 48;
            assert_eq!(found.by_name, HashMap::from([("f", place)]), "{magic:x}");
            assert_eq!(found.is_before_1_18, magic == 0xfa);
        }
    }

    #[test]
    fn words_that_only_the_relocations_have() {
        let mut program = Program::new(0xf1);
        let module = DATA + 256;
        for at in [0, 8, MINPC, MINPC + 8] {
            program.bytes[256 + at as usize..][..8].fill(0);
        }
        assert_eq!(program.functions(), Err(Unfound::NoText));
        let start = program.bytes.len() as u64;
        for (place, value) in
            [(0x77, 0x88), (module + MINPC + 8, TEXT + 48), (module + MINPC, TEXT), (module, DATA), (1, 2)]
        {
            for word in [place, 8_u64, value] {
                program.bytes.extend(word.to_le_bytes());
            }
        }
        program.layout.segments.push(Segment { address: 0x9000, offset: start, size: 120, is_code: false });
        program.layout.relocations = (0x9000, 120);
        let found = program.functions().expect("found");
        assert_eq!(found.by_name["f"], program.code() + 16..program.code() + 48);
    }

    #[test]
    fn a_table_that_nothing_points_to_is_not_believed() {
        let mut program = Program::new(0xf1);
        // `maxpc` does not fit the last entry.
        program.bytes[256 + MINPC as usize + 8] += 1;
        assert_eq!(program.functions(), Err(Unfound::NoText));
        program.bytes[0] = 0xf7;
        assert_eq!(program.functions(), Err(Unfound::NoTable));
    }

    #[test]
    fn work_has_an_end() {
        // Every function leads to another part of a large file.
        struct Endless(Vec<u8>);
        impl ReadAt for Endless {
            fn read_at(&self, offset: u64, to: &mut [u8]) -> usize {
                to.fill(0);
                self.0.read_at(offset, to);
                if offset > 1 << 20 {
                    to.fill(0x5a);
                }
                to.len()
            }
        }
        let mut program = Program::new(0xfa);
        let count = 1_u64 << 20;
        let entries = 64 + 8;
        program.bytes[8..16].copy_from_slice(&count.to_le_bytes());
        program.bytes.resize(entries, 0);
        for i in 0..8192_u64 {
            program.bytes.extend((TEXT + i).to_le_bytes());
            program.bytes.extend(((i % 2 + 1) << 30).to_le_bytes());
        }
        program.layout.segments = vec![Segment { address: DATA, offset: 0, size: u64::MAX / 2, is_code: false }];
        let mut reader = Reader { file: &Endless(program.bytes), left: MAX_READ };
        let header = reader.header(&program.layout.segments[0], 0).expect("a header");
        assert_eq!(reader.named(&program.layout, &header, 0, &["f"]), Err(Unfound::Damaged));
    }

    proptest::proptest! {
        #[test]
        fn any_damage(
            magic in proptest::sample::select(vec![0xfa_u8, 0xf0, 0xf1]),
            changes in proptest::collection::vec((0_usize..512, proptest::num::u8::ANY), 0..16),
            cut in 0_usize..600,
            relocations in 0_u64..4096,
        ) {
            let mut program = Program::new(magic);
            program.layout.relocations = (DATA, relocations);
            program.bytes.truncate(cut);
            for (at, byte) in changes {
                if let Some(place) = program.bytes.get_mut(at) {
                    *place = byte;
                }
            }
            if let Ok(found) = program.functions() {
                for range in found.by_name.values() {
                    assert!(range.start < range.end && range.end - range.start <= MAX_FUNCTION);
                }
            }
        }
    }
}
