//! User-space probes by perf events, for kernels before 6.6, which have no `uprobe_multi` links: one event and one link
//! (`BPF_LINK_CREATE` with a cookie, Linux 5.15) for each place. Sources: perf_event_open(2) and `perf_uprobe_init` of
//! Linux.
//!
//! Worse than `uprobe_multi` in three things: they ask for CAP_SYS_ADMIN (6.1 does) where BPF and PERFMON are enough
//! for the former; every probe holds a descriptor of its own (a dozen for a library); and each goes by itself, for which
//! the kernel waits.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
};

use super::uprobe::{self, Place};

/// What perf offers uprobes by.
const UNIT: &str = "/sys/bus/event_source/devices/uprobe";
/// `BPF_PERF_EVENT`, how a program is attached to an event.
const PERF_EVENT: u32 = 41;
/// `PERF_FLAG_FD_CLOEXEC`.
const CLOSE_ON_EXEC: libc::c_long = 8;
/// Bytes of `struct perf_event_attr`, version 5.
const SIZE: u64 = 112;

/// Start of `union bpf_attr` for `BPF_LINK_CREATE` of a perf event.
#[repr(C)]
#[derive(Default)]
struct LinkAttributes {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    cookie: u64,
}

/// Lets this process have as many descriptors as it may: the usual 1,024 are enough for eighty libraries.
pub fn raise_descriptors() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a struct that outlives the calls. What cannot be raised stays.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}

/// Attaches `program` at `places` of `file`: at their returns with `at_return`. The descriptors are the probes.
///
/// # Errors
/// The kernel's: `ENOENT` where perf has no uprobes, `EINVAL` where its links know no cookies (before 5.15) or an
/// offset is no instruction, `EACCES` without the privileges.
pub fn attach(program: &OwnedFd, file: &File, places: &[Place], at_return: bool) -> io::Result<Vec<OwnedFd>> {
    let unit = Unit::find()?;
    places.iter().map(|place| unit.attach(program, file, *place, at_return)).collect()
}

/// perf's uprobes: the number of their kind, and the bit that asks for the return.
struct Unit {
    kind: u64,
    at_return: u32,
}

impl Unit {
    fn find() -> io::Result<Self> {
        let read = |name: &str| fs::read_to_string(format!("{UNIT}/{name}"));
        let kind = read("type")?.trim().parse().map_err(io::Error::other)?;
        // `config:0`
        let at_return = read("format/retprobe")?.trim().trim_start_matches("config:").parse().ok();
        let at_return = at_return.filter(|bit| *bit < 32);
        at_return
            .map(|at_return| Self { kind, at_return })
            .ok_or_else(|| io::Error::other("perf's uprobes have no retprobe"))
    }

    fn attach(&self, program: &OwnedFd, file: &File, place: Place, at_return: bool) -> io::Result<OwnedFd> {
        // The name of a descriptor: see `uprobe::attach`.
        let path = format!("/proc/self/fd/{}\0", file.as_raw_fd());
        // struct perf_event_attr: type and size, config, period, …, config1 and config2.
        let mut attributes = [0u64; SIZE as usize / 8];
        attributes[0] = self.kind | SIZE << 32;
        attributes[1] = u64::from(at_return) << self.at_return;
        attributes[2] = 1;
        attributes[7] = path.as_ptr() as u64;
        attributes[8] = place.offset;
        // All processes; which processor is named is no matter, the program runs on each.
        // SAFETY: the struct is as long as it says, and what it points to lives until the end of the call.
        let event = unsafe { libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), -1, 0, -1, CLOSE_ON_EXEC) };
        if event < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nothing else owns.
        let event = unsafe { OwnedFd::from_raw_fd(RawFd::try_from(event).map_err(io::Error::other)?) };
        let number = |fd: &OwnedFd| u32::try_from(fd.as_raw_fd()).map_err(io::Error::other);
        let mut attributes = LinkAttributes {
            program: number(program)?,
            target: number(&event)?,
            attach_type: PERF_EVENT,
            flags: 0,
            cookie: place.cookie,
        };
        // The link holds the event.
        uprobe::call(uprobe::LINK_CREATE, &mut attributes)
    }
}
