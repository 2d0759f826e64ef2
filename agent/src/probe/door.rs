//! The doors: the ways by which the kernel tells of sends and receives. Best first, what each consists of,
//! and whether a kernel offers it. All of them end in the same code (`agent-ebpf/src/socket.rs`).
//!
//! | door | kernel | an event costs |
//! | --- | --- | --- |
//! | `tp_btf` | 6.3 | a call |
//! | `fexit` | 5.17, arm64 6.4; not where lockdown or the build forbids trampolines | a call and a frame |
//! | `kprobe` | 5.17 with `CONFIG_KPROBES` | two traps or jumps, two table accesses |
//!
//! The bounds are those of the parser (`bpf_loop`, Linux 5.17) where a hook alone would allow less.
//! What TCP connections go through (`tcp_state`, `tcp_destroy`) comes from tracepoints in every door.

use std::{fmt, path::Path};

use super::btf::Btf;
use crate::config::DoorSetting;

/// A way into the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// Tracepoints behind every send and receive.
    TpBtf,
    /// Trampolines at the return of the protocols' functions.
    Fexit,
    /// Breakpoints at their entry and return.
    Kprobe,
}

/// Where a program is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// A tracepoint, with typed arguments.
    Tracepoint(&'static str),
    /// The return of a function, with typed arguments.
    Exit(&'static str),
    /// The entry of a function.
    Probe(&'static str),
    /// The return of a function.
    ReturnProbe(&'static str),
}

/// One program and one place of it.
#[derive(Debug, Clone, Copy)]
pub struct Attachment {
    /// Name in the object.
    pub program: &'static str,
    /// The place.
    pub hook: Hook,
    /// Kernels lack it when they do not need it.
    pub optional: bool,
}

const fn must(program: &'static str, hook: Hook) -> Attachment {
    Attachment { program, hook, optional: false }
}

const fn may(program: &'static str, hook: Hook) -> Attachment {
    Attachment { program, hook, optional: true }
}

/// Of every door: the life of TCP connections.
pub const LIFE: [Attachment; 2] = [
    must("tcp_state", Hook::Tracepoint("inet_sock_set_state")),
    must("tcp_destroy", Hook::Tracepoint("tcp_destroy_sock")),
];

const TP_BTF: [Attachment; 2] =
    [must("sock_send", Hook::Tracepoint("sock_send_length")), must("sock_recv", Hook::Tracepoint("sock_recv_length"))];

const FEXIT: [Attachment; 6] = [
    must("tcp_send_exit", Hook::Exit("tcp_sendmsg")),
    must("tcp_recv_exit", Hook::Exit("tcp_recvmsg")),
    may("tcp_sendpage_exit", Hook::Exit("tcp_sendpage")),
    must("unix_send_exit", Hook::Exit("unix_stream_sendmsg")),
    must("unix_recv_exit", Hook::Exit("unix_stream_recvmsg")),
    may("unix_sendpage_exit", Hook::Exit("unix_stream_sendpage")),
];

const KPROBE: [Attachment; 13] = [
    // The removal first: no state of a socket may outlive it.
    must("unix_release_enter", Hook::Probe("unix_release")),
    // Returns before entries, so that no entry waits for one in vain.
    must("send_return", Hook::ReturnProbe("tcp_sendmsg")),
    must("send_return", Hook::ReturnProbe("unix_stream_sendmsg")),
    may("send_return", Hook::ReturnProbe("tcp_sendpage")),
    may("send_return", Hook::ReturnProbe("unix_stream_sendpage")),
    must("recv_return", Hook::ReturnProbe("tcp_recvmsg")),
    must("recv_return", Hook::ReturnProbe("unix_stream_recvmsg")),
    must("tcp_send_enter", Hook::Probe("tcp_sendmsg")),
    may("tcp_send_enter", Hook::Probe("tcp_sendpage")),
    must("unix_send_enter", Hook::Probe("unix_stream_sendmsg")),
    may("unix_send_enter", Hook::Probe("unix_stream_sendpage")),
    must("tcp_recv_enter", Hook::Probe("tcp_recvmsg")),
    must("unix_recv_enter", Hook::Probe("unix_stream_recvmsg")),
];

/// What perf offers kprobes by; absent where the kernel has none.
const KPROBE_UNIT: &str = "/sys/bus/event_source/devices/kprobe";

/// What a kernel before 5.17 lacks, whatever the door.
pub const NO_LOOPS: &str = "this kernel has no bpf_loop, which the parser of HTTP needs (Linux 5.17 and later have it)";

/// Has the kernel `bpf_loop`? `None` where its types do not tell.
#[must_use]
pub fn has_loops(types: &Btf) -> Option<bool> {
    types.has_constant("bpf_func_id", "BPF_FUNC_loop")
}

impl Door {
    /// All, in the order in which they are tried.
    pub const ALL: [Self; 3] = [Self::TpBtf, Self::Fexit, Self::Kprobe];

    /// Its name in output and configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::TpBtf => "tp_btf",
            Self::Fexit => "fexit",
            Self::Kprobe => "kprobe",
        }
    }

    /// Its hooks in a few words.
    #[must_use]
    pub const fn hooks(self) -> &'static str {
        match self {
            Self::TpBtf => "sock_send_length, sock_recv_length",
            Self::Fexit | Self::Kprobe => {
                "tcp_sendmsg, tcp_recvmsg, tcp_sendpage, unix_stream_sendmsg, unix_stream_recvmsg, unix_stream_sendpage"
            }
        }
    }

    /// Those to try, best first.
    #[must_use]
    pub fn wanted(setting: DoorSetting) -> Vec<Self> {
        match setting {
            DoorSetting::Auto => Self::ALL.to_vec(),
            DoorSetting::TpBtf => vec![Self::TpBtf],
            DoorSetting::Fexit => vec![Self::Fexit],
            DoorSetting::Kprobe => vec![Self::Kprobe],
        }
    }

    /// Its programs for sends and receives.
    #[must_use]
    pub const fn attachments(self) -> &'static [Attachment] {
        match self {
            Self::TpBtf => &TP_BTF,
            Self::Fexit => &FEXIT,
            Self::Kprobe => &KPROBE,
        }
    }

    /// Connection state is in a table by the socket's address, not in the socket.
    #[must_use]
    pub const fn by_address(self) -> bool {
        matches!(self, Self::Kprobe)
    }

    /// What of it there is in this kernel: its attachments (and those of [`LIFE`]) without the optional
    /// ones that are absent.
    ///
    /// # Errors
    /// Names what is missing and which kernels have it.
    pub fn offered(self, types: &Btf) -> Result<Vec<Attachment>, String> {
        self.offered_by(types, Path::new(KPROBE_UNIT).exists())
    }

    fn offered_by(self, types: &Btf, kprobes: bool) -> Result<Vec<Attachment>, String> {
        if has_loops(types) == Some(false) {
            return Err(NO_LOOPS.into());
        }
        if self == Self::Kprobe && !kprobes {
            return Err("this kernel has no kprobes (CONFIG_KPROBE_EVENTS)".into());
        }
        let all = self.attachments().iter().chain(&LIFE);
        let (tracepoints, functions) = types.names();
        let (present, absent): (Vec<Attachment>, Vec<Attachment>) =
            all.copied().partition(|attachment| match attachment.hook {
                Hook::Tracepoint(name) => tracepoints.contains(name),
                Hook::Exit(name) | Hook::Probe(name) | Hook::ReturnProbe(name) => functions.contains(name),
            });
        let missing: Vec<String> = absent.iter().filter(|a| !a.optional).map(|a| a.hook.to_string()).collect();
        if missing.is_empty() {
            return Ok(present);
        }
        let since = if self == Self::TpBtf { " (Linux 6.3 and later have it)" } else { "" };
        Err(format!("this kernel has no {}{since}", missing.join(", ")))
    }
}

impl fmt::Display for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tracepoint(name) => write!(f, "tracepoint {name}"),
            Self::Exit(name) | Self::Probe(name) | Self::ReturnProbe(name) => write!(f, "function {name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_kernel_offers() {
        let types = Btf::from_kernel().expect("this kernel has BTF");
        let fexit = Door::Fexit.offered_by(&types, false).expect("every kernel has these functions");
        assert!(fexit.len() >= 6 && fexit.iter().any(|a| a.program == "tcp_destroy"));
        let lack = Door::Kprobe.offered_by(&types, false).expect_err("no kprobes");
        assert!(lack.contains("CONFIG_KPROBE"), "{lack}");
        assert!(Door::Kprobe.offered_by(&types, true).is_ok());
    }

    #[test]
    fn a_kernel_without_the_tracepoints_says_so() {
        let lack = Door::TpBtf.offered_by(&Btf::default(), true).expect_err("no types at all");
        assert!(lack.contains("sock_send_length") && lack.contains("6.3"), "{lack}");
    }

    #[test]
    fn the_setting_names_doors() {
        assert_eq!(Door::wanted(DoorSetting::Auto), Door::ALL);
        for door in Door::ALL {
            let setting: DoorSetting =
                serde_json::from_value(door.name().into()).expect("a door's name is its setting");
            assert_eq!(Door::wanted(setting), [door]);
        }
    }
}
