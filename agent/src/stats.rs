//! The agent's own counters: what was seen, what was lost and why, what could not be read. Shared by
//! every part as one [`Stats`] behind an `Arc`; written with relaxed atomics, read as a [`Totals`].

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use serde::{Deserialize, Serialize};

use crate::coverage::Coverage;

macro_rules! counters {
    ($(#[$about:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident => $text:literal),+ $(,)? }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$doc])* $variant),+ }
        impl $name {
            /// Every value, in order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];
            /// The name in output and metrics.
            #[must_use]
            pub const fn name(self) -> &'static str { match self { $(Self::$variant => $text),+ } }
        }
    };
}

counters! {
    /// Why an exchange (or a part of one) is missing from the numbers.
    Loss {
        /// A request or response head did not fit into the ring: the agent was too slow.
        RingFull => "ring_full",
        /// The end of a message did not fit into the ring: the exchange is marked `lost`.
        EndRingFull => "end_ring_full",
        /// The application's buffer could not be read.
        Unreadable => "unreadable_buffer",
        /// The kernel refused to keep state for a connection.
        NoState => "connection_state",
        /// More requests were under way on one connection than are kept.
        PipelineFull => "pipeline_full",
        /// The kernel skipped a program because one ran already on that CPU.
        Recursion => "recursion",
        /// kprobe door: the kernel did not tell of a call's end, since too many threads were inside one.
        ReturnMissed => "return_missed",
        /// Plaintext of TLS that found no room on the kernel side.
        TlsBusy => "tls_no_room",
        /// Plaintext of rustls that was gone before its connection was known.
        TlsMissed => "tls_missed",
        /// Records that the agent could not make sense of.
        BadRecord => "bad_record",
        /// The user-side connection table was full.
        ConnectionsFull => "connections_full",
        /// HTTP/2 streams whose frames did not fit into the ring.
        Streams => "http2_streams",
        /// The recording (`--exchanges`) could not keep up.
        Recording => "recording",
    }
}

counters! {
    /// What was seen but not read, in events. Not losses: traffic that the agent does not claim to cover.
    Unread {
        /// Bytes moved by `io_uring`.
        IoUring => "io_uring",
        /// A 32-bit process.
        Compat => "compat_32bit",
        /// A kernel thread.
        Kernel => "kernel_thread",
        /// A system call whose buffer is not understood (`sendmmsg` with several messages and the like), or that has
        /// none where a message begins (`splice` of whole messages).
        Syscall => "unknown_syscall",
        /// Bytes that went by between two messages of a connection: messages that were spliced, or calls that the
        /// kernel skipped a program for (which is a loss: `recursion`, `return_missed`).
        Missed => "missed_bytes",
        /// TLS whose plaintext was not read.
        Tls => "tls",
        /// HTTP/2 exchanges with fields that are older than the agent, or came with records that were lost.
        HeaderTable => "header_table",
        /// A response whose request was sent before the agent came.
        JoinedLate => "joined_late",
        /// Connections that do not speak HTTP.
        NotHttp => "not_http",
        /// A head longer than 32 KiB: cut, the exchange is kept.
        HeadTooLong => "head_too_long",
        /// A request with 64 others under way on its connection: of a HEAD or CONNECT so far back the kernel side has
        /// forgotten that its answer has no body.
        DeepPipeline => "deep_pipeline",
        /// A message whose framing the kernel side and the parser judged differently.
        Framing => "framing",
        /// Connections upgraded to WebSocket.
        WebSocket => "websocket",
        /// Connections upgraded to anything else, CONNECT included.
        Upgraded => "upgraded",
    }
}

counters! {
    /// Why an end of an exchange has no name of a pod, though there should be one.
    Unnamed {
        /// Of a pod's container the API server told nothing in time.
        Pod => "pod",
        /// An address among those of pods belongs to none that is known.
        Peer => "peer",
        /// More exchanges waited for names than may.
        WaitingFull => "waiting_full",
        /// Objects of the API server that did not fit into the table.
        TableFull => "table_full",
    }
}

/// All counters of one agent.
#[derive(Debug)]
pub struct Stats {
    losses: [AtomicU64; Loss::ALL.len()],
    unread: [AtomicU64; Unread::ALL.len()],
    unnamed: [AtomicU64; Unnamed::ALL.len()],
    /// Requests to the Kubernetes API that failed, and answers that were not understood.
    pub kubernetes_failed: AtomicU64,
    /// Pods that are known.
    pub pods: AtomicU64,
    /// Exchanges seen, by side: server, client.
    pub exchanges: [AtomicU64; 2],
    /// Endpoints whose route got another name as more was learned.
    pub routes_moved: AtomicU64,
    /// Connections open now, as far as the agent knows.
    pub connections: AtomicU64,
    /// Streams of HTTP/2 open now.
    pub streams: AtomicU64,
    /// Spans handed to the exporter, and dropped because its queue was full.
    pub spans: AtomicU64,
    /// See `spans`.
    pub spans_dropped: AtomicU64,
    /// Spans that the rate limit left out; those that the sampler leaves out are not counted.
    pub spans_limited: AtomicU64,
    /// Changes of findings, of endpoints and of routes that the exporter's queue had no room for.
    pub findings_dropped: AtomicU64,
    /// Open findings by severity: low, medium, high, critical; acknowledged ones left out.
    pub findings_open: [AtomicU64; 4],
    /// Exports that failed, and that succeeded, in requests to the collector.
    pub exports_failed: AtomicU64,
    /// See `exports_failed`.
    pub exports: AtomicU64,
    /// Nanoseconds of CPU that the eBPF programs used, and how often they ran (only counted while
    /// `kernel.bpf_stats_enabled` is 1).
    pub kernel_ns: AtomicU64,
    /// See `kernel_ns`.
    pub kernel_runs: AtomicU64,
    /// In the order of [`TlsTotals`].
    tls: [AtomicU64; 7],
    /// Whose TLS is read.
    pub coverage: Arc<Mutex<Coverage>>,
    /// Set when every probe is attached.
    pub ready: AtomicBool,
    /// When the capture thread last came to its housekeeping, ms of [`uptime_ms`]; 0 before.
    beat: AtomicU64,
}

/// TLS connections and what became of them, since the start: those recognised are `read`, `unread`, `left_out`, or open
/// with nothing said so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsTotals {
    /// Connections whose first bytes were a TLS record, or one that was carried by a library that is read.
    pub connections: u64,
    /// Of which a library that is read carried the plaintext.
    pub read: u64,
    /// Of which it did not, and which are over.
    pub unread: u64,
    /// Of processes, ports or sides that the rules leave out.
    pub left_out: u64,
    /// Ciphertext of those in `unread`, bytes of both directions.
    pub unread_bytes: u64,
    /// Calls of TLS libraries that were looked at.
    pub calls: u64,
    /// Sessions that were read though their socket was not found; that socket's connection counts as unread.
    pub sessions_without_socket: u64,
}

/// The counters at one moment, for output.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Totals {
    /// Exchanges seen on the server side and on the client side.
    pub exchanges: BTreeMap<String, u64>,
    /// Losses by reason since the start.
    pub losses: BTreeMap<String, u64>,
    /// Unread by reason since the start.
    pub unread: BTreeMap<String, u64>,
    /// TLS connections.
    #[serde(default)]
    pub tls: TlsTotals,
    /// Ends of exchanges without the name of their pod, by reason since the start.
    #[serde(default)]
    pub unnamed: BTreeMap<String, u64>,
    /// Failed requests to the Kubernetes API since the start.
    #[serde(default)]
    pub kubernetes_failed: u64,
    /// Pods that are known now.
    #[serde(default)]
    pub pods: u64,
    /// Endpoints whose route got another name as more was learned.
    #[serde(default)]
    pub routes_moved: u64,
    /// Connections open now.
    pub connections: u64,
    /// Streams of HTTP/2 open now.
    #[serde(default)]
    pub streams: u64,
    /// Spans handed to the exporter.
    pub spans: u64,
    /// Spans dropped because the exporter's queue was full.
    pub spans_dropped: u64,
    /// Spans that the rate limit left out.
    #[serde(default)]
    pub spans_limited: u64,
    /// Requests to the collector that succeeded.
    pub exports: u64,
    /// Requests to the collector that failed.
    pub exports_failed: u64,
}

impl Default for Stats {
    fn default() -> Self {
        Self {
            losses: [const { AtomicU64::new(0) }; Loss::ALL.len()],
            unread: [const { AtomicU64::new(0) }; Unread::ALL.len()],
            unnamed: [const { AtomicU64::new(0) }; Unnamed::ALL.len()],
            kubernetes_failed: AtomicU64::new(0),
            pods: AtomicU64::new(0),
            exchanges: [const { AtomicU64::new(0) }; 2],
            routes_moved: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            streams: AtomicU64::new(0),
            spans: AtomicU64::new(0),
            spans_dropped: AtomicU64::new(0),
            spans_limited: AtomicU64::new(0),
            findings_dropped: AtomicU64::new(0),
            findings_open: [const { AtomicU64::new(0) }; 4],
            exports_failed: AtomicU64::new(0),
            exports: AtomicU64::new(0),
            kernel_ns: AtomicU64::new(0),
            kernel_runs: AtomicU64::new(0),
            tls: [const { AtomicU64::new(0) }; 7],
            coverage: Arc::default(),
            ready: AtomicBool::new(false),
            beat: AtomicU64::new(0),
        }
    }
}

impl Stats {
    /// Counts `n` losses.
    pub fn lose(&self, reason: Loss, n: u64) {
        self.losses[reason as usize].fetch_add(n, Ordering::Relaxed);
    }

    /// Sets a counter that another place (the kernel) adds up.
    pub fn set_loss(&self, reason: Loss, total: u64) {
        self.losses[reason as usize].store(total, Ordering::Relaxed);
    }

    /// Losses of one reason since the start.
    pub fn lost(&self, reason: Loss) -> u64 {
        self.losses[reason as usize].load(Ordering::Relaxed)
    }

    /// Counts `n` unread events.
    pub fn miss(&self, reason: Unread, n: u64) {
        self.unread[reason as usize].fetch_add(n, Ordering::Relaxed);
    }

    /// Sets a counter that another place (the kernel) adds up.
    pub fn set_unread(&self, reason: Unread, total: u64) {
        self.unread[reason as usize].store(total, Ordering::Relaxed);
    }

    /// Unread events of one reason since the start.
    pub fn unread(&self, reason: Unread) -> u64 {
        self.unread[reason as usize].load(Ordering::Relaxed)
    }

    /// Whose TLS is read.
    pub fn coverage(&self) -> MutexGuard<'_, Coverage> {
        self.coverage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets what the kernel side adds up.
    pub fn set_tls(&self, t: TlsTotals) {
        let all = [t.connections, t.read, t.unread, t.left_out, t.unread_bytes, t.calls, t.sessions_without_socket];
        for (counter, n) in self.tls.iter().zip(all) {
            counter.store(n, Ordering::Relaxed);
        }
    }

    /// TLS connections since the start.
    pub fn tls(&self) -> TlsTotals {
        let [connections, read, unread, left_out, unread_bytes, calls, sessions_without_socket] =
            self.tls.each_ref().map(|n| n.load(Ordering::Relaxed));
        TlsTotals { connections, read, unread, left_out, unread_bytes, calls, sessions_without_socket }
    }

    /// The capture thread is at work.
    pub fn beat(&self) {
        self.beat.store(uptime_ms().max(1), Ordering::Relaxed);
    }

    /// Did the capture thread come to its housekeeping within [`STUCK_MS`]?
    pub fn is_alive(&self) -> bool {
        let beat = self.beat.load(Ordering::Relaxed);
        beat != 0 && uptime_ms().saturating_sub(beat) < STUCK_MS
    }

    /// Counts `n` ends without a name.
    pub fn unnamed(&self, reason: Unnamed, n: u64) {
        self.unnamed[reason as usize].fetch_add(n, Ordering::Relaxed);
    }

    /// Ends without a name for one reason since the start.
    pub fn unnamed_by(&self, reason: Unnamed) -> u64 {
        self.unnamed[reason as usize].load(Ordering::Relaxed)
    }

    /// Sets a counter that another place adds up.
    pub fn set_unnamed(&self, reason: Unnamed, total: u64) {
        self.unnamed[reason as usize].store(total, Ordering::Relaxed);
    }

    /// Every counter at this moment. Reasons that never occurred are there, as 0.
    pub fn totals(&self) -> Totals {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        Totals {
            exchanges: [("server", 0), ("client", 1)]
                .map(|(side, i)| (side.to_owned(), get(&self.exchanges[i])))
                .into(),
            losses: Loss::ALL.iter().map(|&r| (r.name().to_owned(), self.lost(r))).collect(),
            unread: Unread::ALL.iter().map(|&r| (r.name().to_owned(), self.unread(r))).collect(),
            tls: self.tls(),
            unnamed: Unnamed::ALL.iter().map(|&r| (r.name().to_owned(), get(&self.unnamed[r as usize]))).collect(),
            kubernetes_failed: get(&self.kubernetes_failed),
            pods: get(&self.pods),
            routes_moved: get(&self.routes_moved),
            connections: get(&self.connections),
            streams: get(&self.streams),
            spans: get(&self.spans),
            spans_dropped: get(&self.spans_dropped),
            spans_limited: get(&self.spans_limited),
            exports: get(&self.exports),
            exports_failed: get(&self.exports_failed),
        }
    }
}

/// A capture thread that does not come to its housekeeping for this long is stuck; it does every 0.2 s.
pub const STUCK_MS: u64 = 10_000;

/// Time since the first call in this process, ms.
fn uptime_ms() -> u64 {
    static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    u64::try_from(START.get_or_init(std::time::Instant::now).elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Gives the system back what the start needed and the rest of the run does not: reading the kernel's types takes
/// some 15 MiB for a moment, which the allocator would keep.
pub fn return_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no preconditions.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// CPU time (s) and resident memory (bytes) of this process.
#[must_use]
pub fn usage() -> (f64, u64) {
    // SAFETY: plain data, filled by the call.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    let resident = std::fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|s| s.split(' ').nth(1)?.parse::<u64>().ok())
        .unwrap_or(0);
    // SAFETY: no preconditions.
    let page = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    (seconds(usage.ru_utime) + seconds(usage.ru_stime), resident * page)
}
