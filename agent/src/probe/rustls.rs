//! Where to probe rustls: the functions that protect records, by their symbols. What the probes do:
//! `agent-ebpf/src/rustls.rs`; why there: `library.rs`.

use std::{collections::BTreeSet, fs::File, io};

use agent_ebpf::Op;
use aya::maps::{Array, MapData};

use super::uprobe::{self, Link, Place, Program};
use crate::coverage::Reason;

/// Is it read on this architecture? Elsewhere nobody looked at where the fields are.
pub const IS_READ: bool = cfg!(target_arch = "x86_64");
/// Versions whose fields are where the programs look for them: from 0.23.0 on records to decrypt are borrowed, and 0.24
/// is not out.
const READ: &str = "0.23.";
/// What the names have in common.
const COMMON: [&[u8]; 2] = [b"MessageDecrypter", b"MessageEncrypter"];

/// The loaded programs.
pub struct Rustls {
    /// Entries of `decrypt` and returns of `encrypt`; returns of the former; entries of the latter.
    pub programs: [Program; 3],
    /// Told once there is a file with rustls.
    pub used: Option<Array<MapData, u32>>,
}

impl Rustls {
    /// Probes a file.
    ///
    /// # Errors
    /// The kernel's.
    pub fn attach(&mut self, file: &File, protectors: &Protectors) -> io::Result<Vec<Link>> {
        if let Some(used) = &mut self.used {
            used.set(0, 1, 0).map_err(io::Error::other)?;
        }
        let [enter, read, write] = &self.programs;
        let places = |offsets: &BTreeSet<u64>, cookie| -> Vec<Place> {
            offsets.iter().map(|&offset| Place { offset, cookie }).collect()
        };
        let decrypt = places(&protectors.decrypt, Op::RUSTLS);
        let encrypt = places(&protectors.encrypt, Op::RUSTLS_ENCRYPT);
        // The returns first: a return without its entry is nothing, an entry without its return would wait.
        [(read, &decrypt, true), (enter, &encrypt, true), (enter, &decrypt, false), (write, &encrypt, false)]
            .into_iter()
            .map(|(program, places, at_return)| uprobe::attach(program, file, places, at_return))
            .collect()
    }
}

/// What a function does to records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protects {
    /// `<... as MessageDecrypter>::decrypt`.
    Decrypt,
    /// `<... as MessageEncrypter>::encrypt`.
    Encrypt,
}

/// The functions of a file: their offsets.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Protectors {
    decrypt: BTreeSet<u64>,
    encrypt: BTreeSet<u64>,
}

impl Protectors {
    /// One more.
    pub fn add(&mut self, protects: Protects, offset: u64) {
        // Those that do nothing but fail may be one and the same function.
        let (one, other) = match protects {
            Protects::Decrypt => (&mut self.decrypt, &mut self.encrypt),
            Protects::Encrypt => (&mut self.encrypt, &mut self.decrypt),
        };
        if !other.remove(&offset) {
            one.insert(offset);
        }
    }

    /// Is there nothing to read?
    pub fn is_empty(&self) -> bool {
        self.decrypt.is_empty() || self.encrypt.is_empty()
    }
}

/// May there be such functions among these names?
pub fn are_in(names: &[u8]) -> bool {
    COMMON.iter().all(|common| memchr::memmem::find(names, common).is_some())
}

/// What the function with this symbol does, in either of the two manglings of Rust; its closures and parts of it are
/// others.
pub fn protects(name: &[u8]) -> Option<Protects> {
    let of = |names: [&[u8]; 2]| {
        let end = |name: &[u8], part: &[u8]| Some(name.get(memchr::memmem::find(name, part)? + part.len()..)?.to_vec());
        let [decrypt, encrypt] = names.map(|part| end(name, part));
        decrypt.map(|rest| (Protects::Decrypt, rest)).or(encrypt.map(|rest| (Protects::Encrypt, rest)))
    };
    // The rest may name the unit that the linker made it local to.
    let ends = |rest: &[u8]| rest.is_empty() || rest.starts_with(b".llvm.");
    if name.starts_with(b"_ZN") {
        let (protects, rest) = of([
            b"rustls..crypto..cipher..MessageDecrypter$GT$7decrypt17h",
            b"rustls..crypto..cipher..MessageEncrypter$GT$7encrypt17h",
        ])?;
        let (hash, rest) = rest.split_at_checked(16)?;
        let is_whole = hash.iter().all(u8::is_ascii_hexdigit) && rest.first() == Some(&b'E') && ends(&rest[1..]);
        return is_whole.then_some(protects);
    }
    if name.starts_with(b"_RNvX") && memchr::memmem::find(name, b"6rustls").is_some() {
        let (protects, rest) = of([b"16MessageDecrypter7decrypt", b"16MessageEncrypter7encrypt"])?;
        return ends(&rest).then_some(protects);
    }
    None
}

/// Why a version is not read.
pub fn uncovered(version: Option<&str>) -> Option<Reason> {
    if !IS_READ {
        return Some(Reason::Unsupported);
    }
    (!version.is_some_and(|v| v.starts_with(READ))).then_some(Reason::UnknownVersion)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbols_of_both_manglings() {
        let old = "_ZN105_$LT$rustls..crypto..ring..tls13..Tls13MessageDecrypter$u20$as$u20$\
                   rustls..crypto..cipher..MessageDecrypter$GT$7decrypt17h0123456789abcdefE";
        let new = "_RNvXs6_NtNtNtCs1x_6rustls6crypto4ring5tls13NtB5_21Tls13MessageEncrypterNtNtB9_6cipher\
                   16MessageEncrypter7encrypt";
        let is = |name: &str| protects(name.as_bytes());
        assert_eq!((is(old), is(new)), (Some(Protects::Decrypt), Some(Protects::Encrypt)));
        assert_eq!(is(&format!("{old}.llvm.1234")), Some(Protects::Decrypt));
        assert!(are_in(format!("{old}\0{new}").as_bytes()) && !are_in(old.as_bytes()));
        for other in [
            old.replace("17h", "28_$u7b$$u7b$closure$u7d$$u7d$17h"),
            old.replace("7decrypt17h", "9decrypter17h"),
            old.replace("cdefE", "cdefE.cold"),
            old.replace("cdefE", ""),
            new.replace("7encrypt", "21encrypted_payload_len"),
            new.replace("_RNvX", "_RNCNvX"),
            new.replace("6rustls", "5other"),
        ] {
            assert_eq!(is(&other), None, "{other}");
        }
    }

    #[test]
    fn one_function_for_both_is_none() {
        let mut protectors = Protectors::default();
        protectors.add(Protects::Decrypt, 1);
        protectors.add(Protects::Encrypt, 2);
        protectors.add(Protects::Decrypt, 3);
        protectors.add(Protects::Encrypt, 3);
        assert!(!protectors.is_empty());
        assert_eq!((protectors.decrypt.len(), protectors.encrypt.len()), (1, 1));
    }

    #[test]
    fn versions() {
        let read = (!IS_READ).then_some(Reason::Unsupported);
        assert_eq!(uncovered(Some("0.23.46")), read);
        for other in [Some("0.22.4"), Some("0.230.1"), None] {
            assert!(uncovered(other).is_some());
        }
    }
}
