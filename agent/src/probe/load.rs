//! Loads and attaches the eBPF programs.

use std::{
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd},
    sync::{Arc, Mutex},
};

use agent_ebpf::{Count, MessageKey, Settings};
use anyhow::{Context as _, bail};
use aya::{
    Btf as KernelBtf, Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, PerCpuArray, RingBuf},
    programs::{BtfTracePoint, FExit, KProbe},
};
use aya_log::EbpfLogger;

use super::{
    btf::Btf,
    door::{Attachment, Door, Hook, LIFE},
    info::page_size,
    orphans::Orphans,
    perf,
    ring::Reader,
    rustls::Rustls,
    tls::{Programs, Tls},
    uprobe,
};
use crate::{
    config::DoorSetting,
    coverage::Coverage,
    stats::{Loss, Stats, TlsTotals, Unread},
};

/// The object that `cargo xtask build --ebpf` makes of `agent-ebpf`.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../agent-ebpf/apiscope.bpf.o");

/// Connections whose state is kept at once where it is kept by address (kprobe door): 15 MiB. What does
/// not fit is counted and not traced.
const MAX_BY_ADDRESS: u32 = 32_768;
/// Threads that can be inside a send or receive at once (kprobe door).
const MAX_CALLS: u32 = 16_384;

/// `aya_log_ebpf`'s level of debug lines; 0 takes all lines out of the programs.
const LOG_DEBUG: u8 = 4;
/// `ENOTSUPP` of the kernel, which the C library has no name for.
const NOT_SUPPORTED: i32 = 524;
/// Ring of the programs' log lines, while they log.
const LOG_BYTES: u32 = 128 << 10;

/// What the agent wants of the kernel side.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Trace the server side.
    pub server: bool,
    /// Trace the client side.
    pub client: bool,
    /// Bytes of the ring; a power of two.
    pub ring_bytes: u32,
    /// The door, or the best.
    pub door: DoorSetting,
}

/// The loaded and attached kernel side. Everything is detached when it is dropped, and by the kernel
/// when the process ends in any way.
pub struct Kernel {
    ebpf: Ebpf,
    excluded: HashMap<MapData, u32, u8>,
    unwanted: Array<MapData, u64>,
    messages: HashMap<MapData, MessageKey, [u8; 16]>,
    /// Of [`Kernel::messages`]: what belonged to no connection when it was looked at last.
    suspects: Vec<MessageKey>,
    ports: HashMap<MapData, u16, u8>,
    rules: Array<MapData, u32>,
    counts: PerCpuArray<MapData, u64>,
    generation: u32,
    door: Door,
    programs: Vec<Loaded>,
    /// Log lines of the programs, at debug level only.
    logger: Option<EbpfLogger<&'static dyn log::Log>>,
    /// Probes of TLS libraries.
    tls: Option<Tls>,
    /// Their programs.
    tls_programs: Vec<(&'static str, OwnedFd)>,
}

/// Which TLS this kernel lets the agent read, or why not.
#[derive(Debug, Clone)]
pub struct TlsOffer {
    /// That of libraries with C's interface.
    pub libraries: Result<(), String>,
    /// That of Go programs.
    pub go: Result<(), String>,
    /// That of programs with rustls.
    pub rustls: Result<(), String>,
    /// By the probes of kernels before 6.6.
    pub by_perf: bool,
}

/// Programs for the C libraries, for Go, and for rustls.
const LIBRARIES: [&str; 3] = ["tls_enter", "tls_read", "tls_write"];
const GO: [&str; 3] = ["go_enter", "go_read", "go_write"];
const RUSTLS: [&str; 3] = ["rustls_enter", "rustls_read", "rustls_write"];

/// The programs of the C libraries, of Go and of rustls: each may be refused without the others.
struct TlsPrograms {
    way: Option<uprobe::Way>,
    libraries: anyhow::Result<[uprobe::Program; 3]>,
    go: anyhow::Result<[uprobe::Program; 3]>,
    rustls: anyhow::Result<[uprobe::Program; 3]>,
}

/// A program in the kernel.
struct Loaded {
    name: &'static str,
    /// It tells of sends or receives.
    carries: bool,
}

/// Finds the offsets that the programs need.
///
/// # Errors
/// Names the members that this kernel's types lack.
pub fn settings(btf: &Btf, wanted: Wanted) -> anyhow::Result<Settings> {
    let paths = [
        "sock.__sk_common.skc_family",
        "sock.__sk_common.skc_num",
        "sock.__sk_common.skc_dport",
        "sock.__sk_common.skc_daddr",
        "sock.__sk_common.skc_rcv_saddr",
        "sock.__sk_common.skc_v6_daddr",
        "sock.__sk_common.skc_v6_rcv_saddr",
        "sock.sk_type",
        "sock.sk_protocol",
        "sock.sk_shutdown",
        "sock.sk_err",
        "tcp_sock.copied_seq",
        "tcp_sock.write_seq",
        "unix_sock.addr",
        "unix_sock.peer",
        "unix_address.len",
        "unix_address.name",
        "socket.sk",
    ];
    let found = btf.offsets(paths);
    let missing: Vec<_> = paths.iter().zip(&found).filter(|(_, f)| f.is_none()).map(|(p, _)| *p).collect();
    if !missing.is_empty() {
        bail!("this kernel's types lack {}: please report this kernel to the project", missing.join(", "));
    }
    let offset = |i: usize| found[i].unwrap_or_default();
    Ok(Settings {
        arch: if cfg!(target_arch = "aarch64") { 1 } else { 0 },
        sides: u32::from(wanted.server) | u32::from(wanted.client) << 1,
        own_pid: std::process::id(),
        wake_bytes: wanted.ring_bytes / 8,
        family: offset(0),
        num: offset(1),
        dport: offset(2),
        daddr: offset(3),
        rcv_saddr: offset(4),
        v6_daddr: offset(5),
        v6_rcv_saddr: offset(6),
        sk_type: offset(7),
        sk_protocol: offset(8),
        sk_shutdown: offset(9),
        sk_err: offset(10),
        copied_seq: offset(11),
        write_seq: offset(12),
        unix_addr: offset(13),
        unix_peer: offset(14),
        unix_len: offset(15),
        unix_name: offset(16),
        socket_sk: offset(17),
        by_address: 0,
        recv_flags: btf.parameter("tcp_recvmsg", "flags").unwrap_or(3),
    })
}

impl Kernel {
    /// Loads and attaches everything, through the first of the wanted doors that this kernel offers. The
    /// second value is the reader of the records. Whose TLS is read goes to `coverage`.
    ///
    /// # Errors
    /// Names what the kernel or the privileges lack, door by door.
    pub fn start(wanted: Wanted, coverage: &Arc<Mutex<Coverage>>) -> anyhow::Result<(Self, Reader)> {
        let types = Btf::from_kernel()?;
        let settings = settings(&types, wanted)?;
        let mut refusals = Vec::new();
        for door in Door::wanted(wanted.door) {
            let tried = match door.offered(&types) {
                Ok(attachments) => Self::enter(door, &attachments, settings, wanted.ring_bytes, coverage),
                Err(lack) => Err(anyhow::anyhow!(lack)),
            };
            match tried {
                Ok(started) => {
                    log::info!("door {door}: {}", door.hooks());
                    return Ok(started);
                }
                Err(e) => {
                    log::info!("door {door}: {e:#}");
                    refusals.push(format!("{door}: {e:#}"));
                }
            }
        }
        bail!("no way to see sends and receives\n  {}", refusals.join("\n  "))
    }

    /// Loads the programs of one door: what `doctor` judges by. None is attached but, for a moment, one on a trampoline:
    /// kernels that have none for it say so only then.
    ///
    /// # Errors
    /// Names what the kernel or the privileges lack.
    pub fn try_door(door: Door, types: &Btf, wanted: Wanted) -> anyhow::Result<TlsOffer> {
        let attachments = door.offered(types).map_err(anyhow::Error::msg)?;
        let (mut ebpf, _) = Self::load(door, &attachments, settings(types, wanted)?, wanted.ring_bytes)?;
        if let Some(first) = attachments.iter().find(|a| matches!(a.hook, Hook::Exit(_))) {
            attach(&mut ebpf, first)?;
        }
        let TlsPrograms { way, libraries, go, rustls } = tls_programs(&map_fds(&ebpf));
        let why = |e: anyhow::Error| format!("{e:#}");
        Ok(TlsOffer {
            libraries: libraries.map(|_| ()).map_err(why),
            go: go.map(|_| ()).map_err(why),
            rustls: rustls.map(|_| ()).map_err(why),
            by_perf: way == Some(uprobe::Way::Perf),
        })
    }

    fn enter(
        door: Door,
        attachments: &[Attachment],
        settings: Settings,
        ring_bytes: u32,
        coverage: &Arc<Mutex<Coverage>>,
    ) -> anyhow::Result<(Self, Reader)> {
        let (mut ebpf, programs) = Self::load(door, attachments, settings, ring_bytes)?;
        let take = |ebpf: &mut Ebpf, name: &str| {
            ebpf.take_map(name).with_context(|| format!("the eBPF object has no map {name}"))
        };
        let fds = map_fds(&ebpf);
        let ring = RingBuf::try_from(take(&mut ebpf, "RECORDS")?)?;
        let layouts = Array::try_from(take(&mut ebpf, "LAYOUTS")?)?;
        let rustls_used = Array::try_from(take(&mut ebpf, "RUSTLS")?)?;
        let mut kernel = Self {
            excluded: HashMap::try_from(take(&mut ebpf, "EXCLUDED_PIDS")?)?,
            unwanted: Array::try_from(take(&mut ebpf, "UNWANTED")?)?,
            messages: HashMap::try_from(take(&mut ebpf, "MESSAGES")?)?,
            suspects: Vec::new(),
            ports: HashMap::try_from(take(&mut ebpf, "EXCLUDED_PORTS")?)?,
            rules: Array::try_from(take(&mut ebpf, "RULES")?)?,
            counts: PerCpuArray::try_from(take(&mut ebpf, "COUNTS")?)?,
            ebpf,
            generation: 1,
            door,
            programs,
            logger: None,
            tls: None,
            tls_programs: Vec::new(),
        };
        kernel.rules.set(0, 1, 0)?;
        if programs_log() {
            kernel.logger = Some(EbpfLogger::init(&mut kernel.ebpf).context("failed to read the programs' log lines")?);
        }
        for attachment in attachments {
            attach(&mut kernel.ebpf, attachment)?;
        }
        // Without these the agent still sees what is in plaintext.
        let TlsPrograms { way, libraries, go, rustls } = tls_programs(&fds);
        if way == Some(uprobe::Way::Perf) {
            perf::raise_descriptors();
        }
        let loaded = [(&LIBRARIES, &libraries), (&GO, &go), (&RUSTLS, &rustls)]
            .into_iter()
            .filter_map(|(n, p)| Some((n, p.as_ref().ok()?)));
        kernel.tls_programs = loaded
            .flat_map(|(names, programs)| names.iter().zip(programs))
            .filter_map(|(name, program)| Some((*name, program.descriptor().ok()?)))
            .collect();
        let programs = match libraries {
            Ok([enter, read, write]) => {
                let go = go.map_err(|e| log::warn!("TLS of Go programs is not read: {e:#}")).ok();
                let rustls = rustls.map_err(|e| log::warn!("TLS of rustls is not read: {e:#}")).ok();
                let rustls = rustls.map(|programs| Rustls { programs, used: Some(rustls_used) });
                Some(Programs { enter, read, write, go, rustls, layouts: Some(layouts) })
            }
            Err(e) => {
                log::warn!("TLS is not read: {e:#}");
                None
            }
        };
        kernel.tls = Some(Tls::start(programs, orphans(&kernel.ebpf), coverage.clone()));
        Ok((kernel, Reader::new(ring)))
    }

    fn load(
        door: Door,
        attachments: &[Attachment],
        settings: Settings,
        ring_bytes: u32,
    ) -> anyhow::Result<(Ebpf, Vec<Loaded>)> {
        let btf = KernelBtf::from_sys_fs().context("failed to read the kernel's types")?;
        let by_address = door.by_address();
        let settings = Settings { by_address: by_address.into(), ..settings };
        let logs = programs_log();
        let level: u8 = if logs { LOG_DEBUG } else { 0 };
        let mut ebpf = EbpfLoader::new()
            .btf(Some(&btf))
            .override_global("AYA_LOG_LEVEL", &level, true)
            .map_max_entries("AYA_LOGS", if logs { LOG_BYTES } else { u32::try_from(page_size()).unwrap_or(LOG_BYTES) })
            .override_global("SETTINGS", &settings, true)
            // Storage of tasks: used by the programs alone.
            .allow_unsupported_maps()
            .map_max_entries("RECORDS", ring_bytes)
            .map_max_entries("BY_ADDRESS", if by_address { MAX_BY_ADDRESS } else { 1 })
            .map_max_entries("CALLS", if by_address { MAX_CALLS } else { 1 })
            .load(OBJECT)
            .map_err(|e| refusal("the eBPF maps", &anyhow::Error::from(e).root_cause().to_string()))?;
        let mut programs: Vec<Loaded> = Vec::new();
        for Attachment { program, hook, .. } in attachments {
            if programs.iter().any(|p| p.name == *program) {
                continue;
            }
            let p = ebpf.program_mut(program).with_context(|| format!("no program {program}"))?;
            let loaded = match hook {
                Hook::Tracepoint(name) => <&mut BtfTracePoint>::try_from(p)?.load(name, &btf),
                Hook::Exit(name) => <&mut FExit>::try_from(p)?.load(name, &btf),
                Hook::Probe(_) | Hook::ReturnProbe(_) => <&mut KProbe>::try_from(p)?.load(),
            };
            loaded.map_err(|e| refusal(&format!("the eBPF program {program}"), &first_lines(&e)))?;
            let carries = !LIFE.iter().any(|life| life.program == *program);
            programs.push(Loaded { name: program, carries });
        }
        Ok((ebpf, programs))
    }

    /// Hands the programs' log lines to the logger.
    pub fn log(&mut self) {
        if let Some(logger) = &mut self.logger {
            logger.flush();
        }
    }

    /// The door that is used.
    #[must_use]
    pub fn door(&self) -> Door {
        self.door
    }

    /// Takes the kernel side's counters over into the agent's.
    pub fn report(&self, stats: &Stats) {
        let of = |i: u32| self.counts.get(&i, 0).map_or(0, |slots| slots.iter().sum::<u64>());
        for (reason, total) in [
            (Loss::RingFull, of(Count::RING_FULL)),
            (Loss::EndRingFull, of(Count::END_RING_FULL)),
            (Loss::Unreadable, of(Count::UNREADABLE)),
            (Loss::NoState, of(Count::NO_STATE)),
            (Loss::Recursion, self.missed()),
            (Loss::ReturnMissed, of(Count::RETURN_MISSED)),
            (Loss::TlsBusy, of(Count::TLS_BUSY)),
            (Loss::TlsMissed, of(Count::TLS_MISSED)),
        ] {
            stats.set_loss(reason, total);
        }
        for (reason, total) in [
            (Unread::IoUring, of(Count::IO_URING)),
            (Unread::Missed, of(Count::MISSED)),
            (Unread::Compat, of(Count::COMPAT)),
            (Unread::Kernel, of(Count::KERNEL)),
            (Unread::Syscall, of(Count::SYSCALL) + of(Count::STEPS)),
            (Unread::NotHttp, of(Count::NOT_HTTP)),
            (Unread::JoinedLate, of(Count::JOINED_LATE)),
            (Unread::DeepPipeline, of(Count::PIPELINE_FULL)),
            (Unread::Tls, of(Count::TLS_UNREAD)),
        ] {
            stats.set_unread(reason, total);
        }
        stats.set_tls(TlsTotals {
            connections: of(Count::TLS),
            read: of(Count::TLS_READ),
            unread: of(Count::TLS_UNREAD),
            left_out: of(Count::TLS_LEFT_OUT),
            unread_bytes: of(Count::TLS_UNREAD_BYTES),
            calls: of(Count::TLS_CALLS),
            sessions_without_socket: of(Count::TLS_UNBOUND),
        });
    }

    /// By program: its name, its runs and their time (ns; both while `kernel.bpf_stats_enabled` is 1), and
    /// the instructions that the verifier looked at.
    pub fn costs(&self) -> impl Iterator<Item = (String, u64, u64, u64)> {
        let hooks = self.programs.iter().filter_map(|p| Some((p.name, self.ebpf.program(p.name)?.fd().ok()?.as_fd())));
        hooks.chain(self.tls_programs.iter().map(|(name, fd)| (*name, fd.as_fd()))).filter_map(|(name, fd)| {
            let figures = super::info::figures(fd)?;
            Some((name.to_owned(), figures.runs, figures.ns, figures.verified))
        })
    }

    /// Sends and receives that the kernel skipped because the same program ran on that CPU already. (Of
    /// the other hooks none loses an exchange: what one misses of a connection's end the next one sees.)
    fn missed(&self) -> u64 {
        self.programs
            .iter()
            .filter(|p| p.carries)
            .filter_map(|p| super::info::recursion_misses(self.ebpf.program(p.name)?.fd().ok()?.as_fd()))
            .sum()
    }

    /// Leaves a process alone from now on. False when the table is full.
    pub fn exclude_pid(&mut self, pid: u32) -> bool {
        let done = self.excluded.insert(pid, 1, 0).is_ok();
        self.recheck();
        done
    }

    /// Forgets an excluded process that has ended.
    pub fn forget_pid(&mut self, pid: u32) {
        // Absent is as good as removed.
        let _ = self.excluded.remove(&pid);
    }

    /// Leaves a port alone from now on. False when the table is full.
    pub fn exclude_port(&mut self, port: u16) -> bool {
        let done = self.ports.insert(port, 1, 0).is_ok();
        self.recheck();
        done
    }

    /// Leaves a connection alone from its next message on. To be said again when it sends records all the same.
    pub fn exclude_connection(&mut self, id: u64) {
        let place = id as u32 & (agent_ebpf::UNWANTED as u32 - 1);
        if let Err(e) = self.unwanted.set(place, id, 0) {
            log::debug!("a connection that is left out costs more than it should: {e}");
        }
    }

    /// Removes messages of HTTP/2 that were under way when their connection ended. A connection that is not known is
    /// given until the next call: what tells of it may still be in the ring.
    pub fn forget_messages(&mut self, is_known: impl Fn(u64) -> bool) {
        let unknown: Vec<_> = self.messages.keys().flatten().filter(|key| !is_known(key.connection)).collect();
        let (gone, suspects) = unknown.into_iter().partition(|key| self.suspects.contains(key));
        self.suspects = suspects;
        for key in gone {
            // Absent is as good as removed.
            let _ = self.messages.remove(&key);
        }
    }

    fn recheck(&mut self) {
        self.generation = self.generation.wrapping_add(1).max(1);
        if let Err(e) = self.rules.set(0, self.generation, 0) {
            log::warn!("the exclusion rules do not reach open connections: {e}");
        }
    }
}

/// Are the programs' own log lines wanted? The verifier takes them out otherwise.
fn programs_log() -> bool {
    log::log_enabled!(target: "apiscope", log::Level::Debug)
}

fn attach(ebpf: &mut Ebpf, Attachment { program, hook, .. }: &Attachment) -> anyhow::Result<()> {
    let p = ebpf.program_mut(program).with_context(|| format!("no program {program}"))?;
    let attached = match hook {
        Hook::Tracepoint(_) => <&mut BtfTracePoint>::try_from(p)?.attach().map(|_| ()),
        Hook::Exit(_) => <&mut FExit>::try_from(p)?.attach().map(|_| ()),
        Hook::Probe(name) | Hook::ReturnProbe(name) => <&mut KProbe>::try_from(p)?.attach(name, 0).map(|_| ()),
    };
    attached.map_err(|e| {
        let e = anyhow::Error::from(e);
        let code = e.chain().find_map(|e| e.downcast_ref::<std::io::Error>()).and_then(std::io::Error::raw_os_error);
        if code == Some(NOT_SUPPORTED) {
            anyhow::anyhow!("this kernel has no trampolines for {hook} (arm64: Linux 6.4 and later have them)")
        } else {
            e.context(format!("failed to attach {program} to {hook}"))
        }
    })
}

/// Looks after the map of plaintexts.
fn orphans(ebpf: &Ebpf) -> Option<Orphans> {
    let Map::HashMap(data) = ebpf.map("PLAIN")? else { return None };
    Some(Orphans::new(data.fd().as_fd().try_clone_to_owned().ok()?))
}

/// Loads the TLS programs, where they can be attached at all: said once, not for each library that is found.
fn tls_programs(maps: &std::collections::HashMap<String, RawFd>) -> TlsPrograms {
    let way = match uprobe::offered() {
        Ok(way) => way,
        Err(lack) => {
            let lack = || Err(anyhow::anyhow!(lack.clone()));
            return TlsPrograms { way: None, libraries: lack(), go: lack(), rustls: lack() };
        }
    };
    TlsPrograms {
        way: Some(way),
        libraries: uprobe::load(OBJECT, LIBRARIES, maps, way),
        go: uprobe::load(OBJECT, GO, maps, way),
        rustls: uprobe::load(OBJECT, RUSTLS, maps, way),
    }
}

/// Descriptors of the maps, for programs that are loaded without aya.
fn map_fds(ebpf: &Ebpf) -> std::collections::HashMap<String, RawFd> {
    let mut fds = std::collections::HashMap::new();
    for (name, map) in ebpf.maps() {
        let (Map::Array(data)
        | Map::HashMap(data)
        | Map::LruHashMap(data)
        | Map::PerCpuArray(data)
        | Map::PerfEventArray(data)
        | Map::RingBuf(data)
        | Map::SkStorage(data)
        | Map::Unsupported(data)) = map
        else {
            continue;
        };
        fds.insert(name.to_owned(), data.fd().as_fd().as_raw_fd());
    }
    fds
}

/// The end of a verifier log says what is wrong; the whole is thousands of lines.
fn first_lines(error: &aya::programs::ProgramError) -> String {
    let aya::programs::ProgramError::LoadError { io_error, verifier_log } = error else { return error.to_string() };
    let text = verifier_log.to_string();
    if log::log_enabled!(log::Level::Debug) {
        log::debug!("verifier: {text}");
    }
    let tail: Vec<&str> = text.lines().rev().take(12).collect();
    tail.into_iter().rev().fold(io_error.to_string(), |all, line| all + "\n  " + line)
}

/// Why the kernel would not load something, and what to do.
fn refusal(what: &str, error: &str) -> anyhow::Error {
    let missing = super::info::missing_capabilities();
    if missing.is_empty() {
        anyhow::anyhow!("the kernel refused {what}: {error}: `apiscope doctor` shows what this kernel allows")
    } else {
        anyhow::anyhow!(
            "the kernel refused {what}, since this process lacks {}: run it as root (`sudo apiscope run`), or give it CAP_BPF and CAP_PERFMON ({error})",
            missing.join(" and ")
        )
    }
}
