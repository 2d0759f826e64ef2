//! Loads and attaches the eBPF programs.

use std::os::fd::AsFd as _;

use agent_ebpf::{Count, Settings};
use anyhow::{Context as _, bail};
use aya::{
    Btf as KernelBtf, Ebpf, EbpfLoader,
    maps::{Array, HashMap, MapData, PerCpuArray, RingBuf},
    programs::BtfTracePoint,
};
use aya_log::EbpfLogger;

use super::{btf::Btf, ring::Reader};
use crate::stats::{Loss, Stats, Unread};

/// The object that `cargo xtask build --ebpf` makes of `agent-ebpf`.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../agent-ebpf/apiscope.bpf.o");

/// Programs of the socket door: name in the object and tracepoint.
const SOCKET_DOOR: [(&str, &str); 4] = [
    ("sock_send", "sock_send_length"),
    ("sock_recv", "sock_recv_length"),
    ("tcp_state", "inet_sock_set_state"),
    ("tcp_destroy", "tcp_destroy_sock"),
];

/// `aya_log_ebpf`'s level of debug lines; 0 takes all lines out of the programs.
const LOG_DEBUG: u8 = 4;
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
}

/// The loaded and attached kernel side. Everything is detached when it is dropped, and by the kernel
/// when the process ends in any way.
pub struct Kernel {
    ebpf: Ebpf,
    excluded: HashMap<MapData, u32, u8>,
    ports: HashMap<MapData, u16, u8>,
    rules: Array<MapData, u32>,
    counts: PerCpuArray<MapData, u64>,
    generation: u32,
    programs: Vec<String>,
    /// Log lines of the programs, at debug level only.
    logger: Option<EbpfLogger<&'static dyn log::Log>>,
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
        "unix_sock.addr",
        "unix_sock.peer",
        "unix_address.len",
        "unix_address.name",
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
        unix_addr: offset(12),
        unix_peer: offset(13),
        unix_len: offset(14),
        unix_name: offset(15),
    })
}

impl Kernel {
    /// Loads and attaches everything. The second value is the reader of the records.
    ///
    /// # Errors
    /// Names what the kernel or the privileges lack.
    pub fn start(wanted: Wanted) -> anyhow::Result<(Self, Reader)> {
        let types = Btf::from_kernel()?;
        let present = types.has_tracepoints(SOCKET_DOOR.map(|(_, tracepoint)| tracepoint));
        if let Some(((_, name), _)) = SOCKET_DOOR.iter().zip(present).find(|(_, present)| !present) {
            bail!(
                "this kernel has no tracepoint {name} (Linux 6.3 and later have it): run a newer kernel; `apiscope doctor` shows what else was looked at"
            );
        }
        let settings = settings(&types, wanted)?;
        drop(types);
        let btf = KernelBtf::from_sys_fs().context("failed to read the kernel's types")?;
        let logs = log::log_enabled!(target: "apiscope", log::Level::Debug);
        let level: u8 = if logs { LOG_DEBUG } else { 0 };
        let mut ebpf = EbpfLoader::new()
            .btf(Some(&btf))
            .override_global("AYA_LOG_LEVEL", &level, true)
            .map_max_entries("AYA_LOGS", if logs { LOG_BYTES } else { 4096 })
            .override_global("SETTINGS", &settings, true)
            .map_max_entries("RECORDS", wanted.ring_bytes)
            .load(OBJECT)
            .map_err(|e| refusal("the eBPF maps", &anyhow::Error::from(e).root_cause().to_string()))?;
        let take = |ebpf: &mut Ebpf, name: &str| {
            ebpf.take_map(name).with_context(|| format!("the eBPF object has no map {name}"))
        };
        let ring = RingBuf::try_from(take(&mut ebpf, "RECORDS")?)?;
        let mut kernel = Self {
            excluded: HashMap::try_from(take(&mut ebpf, "EXCLUDED_PIDS")?)?,
            ports: HashMap::try_from(take(&mut ebpf, "EXCLUDED_PORTS")?)?,
            rules: Array::try_from(take(&mut ebpf, "RULES")?)?,
            counts: PerCpuArray::try_from(take(&mut ebpf, "COUNTS")?)?,
            ebpf,
            generation: 1,
            programs: Vec::new(),
            logger: None,
        };
        kernel.rules.set(0, 1, 0)?;
        if logs {
            kernel.logger = Some(EbpfLogger::init(&mut kernel.ebpf).context("failed to read the programs' log lines")?);
        }
        for (program, tracepoint) in SOCKET_DOOR {
            let p: &mut BtfTracePoint =
                kernel.ebpf.program_mut(program).with_context(|| format!("no program {program}"))?.try_into()?;
            p.load(tracepoint, &btf).map_err(|e| refusal(&format!("the eBPF program {program}"), &first_lines(&e)))?;
            kernel.programs.push(program.to_owned());
        }
        for (program, _) in SOCKET_DOOR {
            let p: &mut BtfTracePoint =
                kernel.ebpf.program_mut(program).with_context(|| format!("no program {program}"))?.try_into()?;
            p.attach().with_context(|| format!("failed to attach {program}"))?;
        }
        Ok((kernel, Reader::new(ring)))
    }

    /// Hands the programs' log lines to the logger.
    pub fn log(&mut self) {
        if let Some(logger) = &mut self.logger {
            logger.flush();
        }
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
        ] {
            stats.set_loss(reason, total);
        }
        for (reason, total) in [
            (Unread::IoUring, of(Count::IO_URING)),
            (Unread::Compat, of(Count::COMPAT)),
            (Unread::Kernel, of(Count::KERNEL)),
            (Unread::Syscall, of(Count::SYSCALL) + of(Count::STEPS)),
            (Unread::NotHttp, of(Count::NOT_HTTP)),
            (Unread::JoinedLate, of(Count::JOINED_LATE)),
            (Unread::Tls, of(Count::TLS)),
            (Unread::DeepPipeline, of(Count::PIPELINE_FULL)),
        ] {
            stats.set_unread(reason, total);
        }
    }

    /// Runs and run time (ns, while `kernel.bpf_stats_enabled` is 1) and runs skipped by recursion, by
    /// program.
    pub fn costs(&self) -> Vec<(String, u64, u64)> {
        self.programs
            .iter()
            .filter_map(|name| {
                let p: &BtfTracePoint = self.ebpf.program(name)?.try_into().ok()?;
                let info = p.info().ok()?;
                Some((name.clone(), info.run_count(), u64::try_from(info.run_time().as_nanos()).unwrap_or(u64::MAX)))
            })
            .collect()
    }

    /// Sends and receives that the kernel skipped because the same program ran on that CPU already. (Of
    /// the other hooks none loses an exchange: what one misses of a connection's end the next one sees.)
    fn missed(&self) -> u64 {
        self.programs
            .iter()
            .filter(|name| name.starts_with("sock_"))
            .filter_map(|name| {
                let p: &BtfTracePoint = self.ebpf.program(name)?.try_into().ok()?;
                super::info::recursion_misses(p.fd().ok()?.as_fd())
            })
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

    fn recheck(&mut self) {
        self.generation = self.generation.wrapping_add(1).max(1);
        if let Err(e) = self.rules.set(0, self.generation, 0) {
            log::warn!("the exclusion rules do not reach open connections: {e}");
        }
    }
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
