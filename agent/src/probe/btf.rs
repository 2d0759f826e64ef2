//! Reads the kernel's own type information (BTF) for the offsets of struct members and for the names
//! of tracepoints. A walker of its own because the members in aya's reader are private.
//!
//! Format: <https://docs.kernel.org/bpf/btf.html>. Input is the kernel's file, but it is read as if it
//! were hostile: every access is checked.

use std::collections::HashSet;

use anyhow::{Context as _, bail};

/// Where the kernel publishes its types.
pub const PATH: &str = "/sys/kernel/btf/vmlinux";

const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_TYPEDEF: u32 = 8;
const KIND_FUNCTION: u32 = 12;
const KIND_PROTOTYPE: u32 = 13;
/// Anonymous members may nest; real ones do so two or three deep.
const MAX_DEPTH: usize = 8;

/// The types of a kernel; by default none.
#[derive(Default)]
pub struct Btf {
    bytes: Vec<u8>,
    /// Start of each type in `bytes`; type 0 is void.
    types: Vec<u32>,
    strings: usize,
}

impl Btf {
    /// The running kernel's types.
    ///
    /// # Errors
    /// The file is absent (`CONFIG_DEBUG_INFO_BTF` is off), unreadable, or not BTF.
    pub fn from_kernel() -> anyhow::Result<Self> {
        let bytes = std::fs::read(PATH).with_context(|| {
            format!("the kernel publishes no type information ({PATH}): it needs CONFIG_DEBUG_INFO_BTF")
        })?;
        Self::parse(bytes).with_context(|| format!("the kernel's type information ({PATH}) cannot be read"))
    }

    /// Reads BTF data.
    ///
    /// # Errors
    /// Says what is malformed.
    pub fn parse(bytes: Vec<u8>) -> anyhow::Result<Self> {
        let word = |at: usize| -> anyhow::Result<u32> { read(&bytes, at).context("BTF is cut off") };
        if word(0)? & 0xffff != 0xeb9f {
            bail!("not BTF, or of the other byte order");
        }
        let header = word(4)? as usize;
        let (type_off, type_len) = (word(8)? as usize, word(12)? as usize);
        let strings = header.checked_add(word(16)? as usize).context("BTF header is malformed")?;
        let mut at = header.checked_add(type_off).context("BTF header is malformed")?;
        let end = at.checked_add(type_len).filter(|&end| end <= bytes.len()).context("BTF is cut off")?;
        let mut types = Vec::with_capacity(type_len / 24);
        types.push(0);
        while at < end {
            let info = word(at + 4)?;
            types.push(u32::try_from(at)?);
            let members = (info & 0xffff) as usize;
            at += 12
                + match (info >> 24) & 0x1f {
                    1 | 14 | 17 => 4,
                    3 => 12,
                    KIND_STRUCT | KIND_UNION | 15 | 19 => members * 12,
                    6 | 13 => members * 8,
                    2 | 5..=12 | 16 | 18 => 0,
                    kind => bail!("BTF has a kind of type that is not known here: {kind}"),
                };
        }
        Ok(Self { bytes, types, strings })
    }

    /// Offsets in bytes of `paths`, each `struct.member` or `struct.member.member`. Members of
    /// anonymous structs and unions are found as in C. `None` where there is none, or a bit field.
    pub fn offsets<const N: usize>(&self, paths: [&str; N]) -> [Option<u32>; N] {
        let wanted: HashSet<&str> = paths.iter().filter_map(|p| p.split('.').next()).collect();
        let mut found = std::collections::HashMap::new();
        for at in self.types.iter().skip(1).map(|&at| at as usize) {
            let Some((KIND_STRUCT, members)) = self.kind(at).filter(|k| k.1 > 0) else { continue };
            let _ = members;
            if let Some(name) = self.name(at).filter(|n| wanted.contains(n)) {
                found.entry(name).or_insert(at);
            }
        }
        paths.map(|path| {
            let mut parts = path.split('.');
            let mut at = *found.get(parts.next()?)?;
            let mut offset = 0;
            for part in parts {
                let (bits, kind) = self.member(at, part, 0)?;
                offset += bits;
                at = *self.types.get(kind as usize)? as usize;
            }
            (offset % 8 == 0).then_some(offset / 8)
        })
    }

    /// Names of all tracepoints (published as typedefs `btf_trace_NAME`) and functions.
    #[must_use]
    pub fn names(&self) -> (HashSet<&str>, HashSet<&str>) {
        let (mut tracepoints, mut functions) = (HashSet::new(), HashSet::new());
        for at in self.types.iter().skip(1).map(|&at| at as usize) {
            match self.kind(at) {
                Some((KIND_TYPEDEF, _)) => tracepoints.extend(self.name(at).and_then(|n| n.strip_prefix("btf_trace_"))),
                Some((KIND_FUNCTION, _)) => functions.extend(self.name(at)),
                _ => {}
            }
        }
        (tracepoints, functions)
    }

    /// Which argument of `function`, from 0, is called `parameter`.
    #[must_use]
    pub fn parameter(&self, function: &str, parameter: &str) -> Option<u32> {
        let mut all = self.types.iter().skip(1).map(|&at| at as usize);
        let at = all.find(|&at| {
            matches!(self.kind(at), Some((KIND_FUNCTION, _))) && self.name(at).is_some_and(|n| n == function)
        })?;
        let prototype = *self.types.get(read(&self.bytes, at + 8)? as usize)? as usize;
        let (KIND_PROTOTYPE, parameters) = self.kind(prototype)? else { return None };
        (0..parameters).find(|&i| self.name(prototype + 12 + i as usize * 8).is_some_and(|n| n == parameter))
    }

    /// Does the enumeration `name` have the constant `constant`? `None` where there is no such enumeration.
    #[must_use]
    pub fn has_constant(&self, name: &str, constant: &str) -> Option<bool> {
        self.types.iter().skip(1).map(|&at| at as usize).find_map(|at| {
            let (KIND_ENUM, constants) = self.kind(at)? else { return None };
            let named = self.name(at)? == name && constants > 0;
            named.then(|| (0..constants as usize).any(|i| self.name(at + 12 + i * 8) == Some(constant)))
        })
    }

    /// Bit offset and type of a member.
    fn member(&self, at: usize, wanted: &str, depth: usize) -> Option<(u32, u32)> {
        let (kind, members) = self.kind(at)?;
        if (kind != KIND_STRUCT && kind != KIND_UNION) || depth > MAX_DEPTH {
            return None;
        }
        let wide = read(&self.bytes, at + 4)? >> 31 != 0;
        for i in 0..members as usize {
            let member = at + 12 + i * 12;
            let (kind, mut bits) = (read(&self.bytes, member + 4)?, read(&self.bytes, member + 8)?);
            if wide {
                if bits >> 24 != 0 {
                    continue;
                }
                bits &= 0x00ff_ffff;
            }
            match self.name(member)? {
                name if name == wanted => return Some((bits, kind)),
                "" => {
                    let inner = *self.types.get(kind as usize)? as usize;
                    if let Some((more, kind)) = self.member(inner, wanted, depth + 1) {
                        return Some((bits + more, kind));
                    }
                }
                _ => {}
            }
        }
        None
    }

    fn kind(&self, at: usize) -> Option<(u32, u32)> {
        let info = read(&self.bytes, at + 4)?;
        Some(((info >> 24) & 0x1f, info & 0xffff))
    }

    fn name(&self, at: usize) -> Option<&str> {
        let start = self.strings.checked_add(read(&self.bytes, at)? as usize)?;
        let rest = self.bytes.get(start..)?;
        std::str::from_utf8(&rest[..memchr::memchr(0, rest)?]).ok()
    }
}

fn read(bytes: &[u8], at: usize) -> Option<u32> {
    let end = at.checked_add(4)?;
    bytes.get(at..end)?.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_members_of_this_kernel() {
        let btf = Btf::from_kernel().expect("this kernel has BTF");
        let [family, num, port, absent] = btf.offsets([
            "sock.__sk_common.skc_family",
            "sock.__sk_common.skc_num",
            "sock_common.skc_dport",
            "sock.no_such",
        ]);
        assert_eq!((family, num, port, absent), (Some(16), Some(14), Some(12), None));
        let (tracepoints, functions) = btf.names();
        assert!(tracepoints.contains("inet_sock_set_state") && !tracepoints.contains("no_such"));
        assert!(functions.contains("tcp_sendmsg") && !functions.contains("no_such"));
        assert_eq!(btf.parameter("tcp_sendmsg", "msg"), Some(1));
        assert_eq!(btf.parameter("tcp_sendmsg", "no_such"), None);
        assert_eq!(btf.has_constant("bpf_func_id", "BPF_FUNC_loop"), Some(true));
        assert_eq!(btf.has_constant("bpf_func_id", "BPF_FUNC_no_such"), Some(false));
        assert_eq!(btf.has_constant("no_such", "BPF_FUNC_loop"), None);
    }

    #[test]
    fn any_damage_is_survived() {
        let good = std::fs::read(PATH).expect("this kernel has BTF");
        for cut in [0, 3, 10, 24, 100, 1000, good.len() / 2] {
            if let Ok(btf) = Btf::parse(good[..cut].to_vec()) {
                btf.offsets(["sock.__sk_common.skc_family"]);
            }
        }
        let mut damaged = good[..200_000].to_vec();
        for i in (0..damaged.len()).step_by(97) {
            damaged[i] ^= 0x5a;
        }
        if let Ok(btf) = Btf::parse(damaged) {
            btf.offsets(["sock.__sk_common.skc_family"]);
        }
    }
}
