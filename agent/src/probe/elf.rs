//! What the TLS probes need of an ELF file: where its functions are, and a look at their first bytes.
//!
//! Input is any file that any process maps. It is read as hostile: through a cache that reads only what is
//! asked for, within [`MAX_SYMBOL_BYTES`], every offset checked. A file that lies gives an error or a probe
//! at a place that the kernel refuses, never more.

use std::{collections::HashMap, io};

use object::{
    Endianness, ReadCache, ReadCacheOps, ReadRef,
    elf::{FileHeader64, PT_LOAD, SHT_DYNSYM, SHT_SYMTAB},
    read::elf::{FileHeader as _, ProgramHeader as _, SectionHeader as _, Sym as _},
};

use super::rustls::{self, Protectors};

/// Most bytes of a symbol table, and of its names, that are looked through: a browser's are below.
pub const MAX_SYMBOL_BYTES: u64 = 256 << 20;
/// Bytes of a function's start that [`Elf::code`] reads.
pub const CODE_BYTES: usize = 192;

/// Why a file cannot be probed.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// Of another architecture.
    #[error("it is compiled for another architecture")]
    Foreign,
    /// Not an ELF file, or damaged.
    #[error("not an ELF file, or damaged: {0}")]
    Format(#[from] object::read::Error),
    /// Larger than is looked through.
    #[error("its symbol table is larger than {} MiB", MAX_SYMBOL_BYTES >> 20)]
    Large,
    /// Reading failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// A function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Function {
    /// Offset of its first instruction in the file.
    pub offset: u64,
    /// Its bytes, 0 where the file does not say.
    pub size: u64,
}

/// What was found in a file.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Symbols {
    /// By the names that were asked for.
    pub functions: HashMap<&'static str, Function>,
    /// Those of rustls that protect records.
    pub protectors: Protectors,
    /// The file has a symbol table besides the one for dynamic linking.
    pub has_table: bool,
    /// Compiled by Go.
    pub is_go: bool,
}

/// A file that is open for reading.
pub struct Elf<R: ReadCacheOps> {
    cache: ReadCache<R>,
}

impl<R: ReadCacheOps> Elf<R> {
    /// Reads from `file`.
    pub fn new(file: R) -> Self {
        Self { cache: ReadCache::new(file) }
    }

    /// Finds the functions with these names.
    ///
    /// # Errors
    /// [`Unreadable`].
    pub fn symbols(&self, wanted: &[&'static str]) -> Result<Symbols, Unreadable> {
        let data = &self.cache;
        let header = FileHeader64::<Endianness>::parse(data)?;
        let endian = header.endian()?;
        if header.e_machine(endian) != machine() {
            return Err(Unreadable::Foreign);
        }
        let segments: Vec<(u64, u64, u64)> = header
            .program_headers(endian, data)?
            .iter()
            .filter(|p| p.p_type(endian) == PT_LOAD)
            .map(|p| (p.p_vaddr(endian), p.p_filesz(endian), p.p_offset(endian)))
            .collect();
        let offset_of = |address: u64| {
            segments
                .iter()
                .find(|(start, len, _)| address.checked_sub(*start).is_some_and(|at| at < *len))
                .and_then(|(start, _, offset)| offset.checked_add(address - start))
        };
        let sections = header.sections(endian, data)?;
        let mut found = Symbols::default();
        let by_name: HashMap<&[u8], &'static str> = wanted.iter().map(|name| (name.as_bytes(), *name)).collect();
        for section in sections.iter() {
            let kind = section.sh_type(endian);
            let name = sections.section_name(endian, section).unwrap_or_default();
            found.is_go |= name == b".gopclntab" || name == b".data.rel.ro.gopclntab";
            if kind != SHT_SYMTAB && kind != SHT_DYNSYM {
                continue;
            }
            found.has_table |= kind == SHT_SYMTAB;
            let Some(strings) = sections.iter().nth(section.sh_link(endian) as usize) else { continue };
            if section.sh_size(endian) > MAX_SYMBOL_BYTES || strings.sh_size(endian) > MAX_SYMBOL_BYTES {
                return Err(Unreadable::Large);
            }
            let table = section.data_as_array::<object::elf::Sym64<Endianness>, _>(endian, data)?;
            let names = strings.data(endian, data)?;
            let has_rustls = rustls::are_in(names);
            for symbol in table {
                if symbol.st_shndx(endian) == object::elf::SHN_UNDEF {
                    continue;
                }
                let Some(rest) = names.get(symbol.st_name(endian) as usize..) else { continue };
                let Some(end) = memchr::memchr(0, &rest[..rest.len().min(MAX_NAME)]) else { continue };
                let protects = if has_rustls { rustls::protects(&rest[..end]) } else { None };
                let name = by_name.get(&rest[..end]);
                if name.is_none() && protects.is_none() {
                    continue;
                }
                let Some(offset) = offset_of(symbol.st_value(endian)) else { continue };
                if let Some(name) = name {
                    found.functions.entry(name).or_insert(Function { offset, size: symbol.st_size(endian) });
                }
                if let Some(protects) = protects {
                    found.protectors.add(protects, offset);
                }
            }
        }
        Ok(found)
    }

    /// The first bytes of a function, at most [`CODE_BYTES`].
    pub fn code(&self, function: Function) -> &[u8] {
        let most = if function.size == 0 { CODE_BYTES as u64 } else { function.size.min(CODE_BYTES as u64) };
        let left = (&self.cache).len().unwrap_or(0).saturating_sub(function.offset);
        (&self.cache).read_bytes_at(function.offset, most.min(left)).unwrap_or_default()
    }
}

/// Longest name of interest, bytes.
const MAX_NAME: usize = 512;

const fn machine() -> u16 {
    if cfg!(target_arch = "aarch64") { object::elf::EM_AARCH64 } else { object::elf::EM_X86_64 }
}
