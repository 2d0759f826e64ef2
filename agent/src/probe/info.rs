//! What aya does not tell: of a loaded program, and of this process's right to load one.

use std::os::fd::{AsRawFd as _, BorrowedFd};

/// `BPF_OBJ_GET_INFO_BY_FD` of bpf(2).
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
/// Words of `struct bpf_prog_info`, a stable ABI: `run_time_ns`, `run_cnt`, `recursion_misses` (Linux 5.12),
/// `verified_insns` (5.16).
const RUN_TIME: usize = 24;
const RUNS: usize = 25;
const RECURSION_MISSES: usize = 26;
const VERIFIED: usize = 27;

/// What a program costs.
#[derive(Debug, Clone, Copy)]
pub struct Figures {
    /// Runs and their time, ns; both while `kernel.bpf_stats_enabled` is 1.
    pub runs: u64,
    /// See `runs`.
    pub ns: u64,
    /// Instructions that the verifier looked at; 0 where the kernel does not say.
    pub verified: u64,
}

/// How often the kernel skipped this program because it ran on that CPU already. `None` where the
/// kernel does not say.
pub fn recursion_misses(program: BorrowedFd<'_>) -> Option<u64> {
    let (info, words) = about(program)?;
    (words > RECURSION_MISSES).then(|| info[RECURSION_MISSES])
}

/// What this program costs. `None` where the kernel does not say.
pub fn figures(program: BorrowedFd<'_>) -> Option<Figures> {
    let (info, words) = about(program)?;
    let verified = if words > VERIFIED { info[VERIFIED] & u64::from(u32::MAX) } else { 0 };
    (words > RUNS).then(|| Figures { runs: info[RUNS], ns: info[RUN_TIME], verified })
}

/// `struct bpf_prog_info`, and how many words of it this kernel fills in.
fn about(program: BorrowedFd<'_>) -> Option<([u64; 40], usize)> {
    #[repr(C)]
    struct Attributes {
        fd: u32,
        len: u32,
        info: u64,
    }
    let mut info = [0u64; 40];
    let mut attributes = Attributes {
        fd: u32::try_from(program.as_raw_fd()).ok()?,
        len: u32::try_from(std::mem::size_of_val(&info)).ok()?,
        info: info.as_mut_ptr() as u64,
    };
    // SAFETY: the kernel writes at most `len` bytes to `info`, which lives until the end of the call.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, OBJ_GET_INFO_BY_FD, &raw mut attributes, std::mem::size_of::<Attributes>())
    };
    (result == 0).then_some((info, attributes.len as usize / 8))
}

/// Bytes of a page: 64 KiB on some kernels of arm64.
pub fn page_size() -> usize {
    // SAFETY: no preconditions.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// Capabilities that loading needs and that this process lacks (capabilities(7)). Empty where the kernel does
/// not say.
pub fn missing_capabilities() -> Vec<&'static str> {
    const NEEDED: [(u32, &str); 2] = [(39, "CAP_BPF"), (38, "CAP_PERFMON")];
    const SYS_ADMIN: u32 = 21;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    let Some(held) = line.and_then(|v| u64::from_str_radix(v.trim(), 16).ok()) else { return Vec::new() };
    let has = |bit: u32| held >> bit & 1 != 0;
    NEEDED.iter().filter(|(bit, _)| !has(*bit) && !has(SYS_ADMIN)).map(|(_, name)| *name).collect()
}
