//! Every map and every global of the kernel side.

use agent_ebpf::{CARRY, Count, DATA_LIMIT, MessageKey, PIPELINE, Record, Settings, WINDOW};
use aya_ebpf::{
    btf_maps::{Array, HashMap, PerCpuArray, RingBuf, SkStorage},
    macros::btf_map,
};

/// Bytes of the ring; the agent may set another size before loading.
pub const RING_BYTES: usize = 8 << 20;

/// Records to the agent.
#[btf_map]
pub static RECORDS: RingBuf<u8, RING_BYTES, 0> = RingBuf::new();

/// State of each connection, in its socket: it goes away with the socket and needs no eviction.
#[btf_map]
pub static CONNECTIONS: SkStorage<Connection> = SkStorage::new();

/// State by the socket's address, for doors whose programs may not use the map above: the programs remove
/// it at close. The agent gives it room when such a door is used.
#[btf_map]
pub static BY_ADDRESS: HashMap<u64, Connection, 1, 0> = HashMap::new();

/// What new state in [`BY_ADDRESS`] is a copy of: zeros.
#[btf_map]
pub static BLANK: Array<Connection, 1, 0> = Array::new();

/// Calls under way, by thread and direction, between a kprobe and its kretprobe.
#[btf_map]
pub static CALLS: HashMap<u64, Call, 1, 0> = HashMap::new();

/// Messages of HTTP/2 that are put aside: see `http2`. The agent removes those whose connection is over.
#[btf_map]
pub static MESSAGES: HashMap<MessageKey, crate::http2::Slot, { agent_ebpf::MESSAGES }, 0> = HashMap::new();

/// Working memory of one run of a program: [0] receive, [1] send, [2] the rest of the socket hooks; see
/// `tls` for the others.
#[btf_map]
pub static WORK: PerCpuArray<Work, { 3 + TLS_RUNS as usize }, 0> = PerCpuArray::new();

/// Runs of the TLS programs that may be under way on one CPU: the kernel may put one aside for another.
pub const TLS_RUNS: u32 = 4;

/// Losses and such, by [`Count`].
#[btf_map]
pub static COUNTS: PerCpuArray<u64, { Count::LEN as usize }, 0> = PerCpuArray::new();

/// By CPU: number of the next connection.
#[btf_map]
pub static NEXT: PerCpuArray<u64, 1, 0> = PerCpuArray::new();

/// Processes (thread groups) that are not traced.
#[btf_map]
pub static EXCLUDED_PIDS: HashMap<u32, u8, 4096, 0> = HashMap::new();

/// Ports that are not traced.
#[btf_map]
pub static EXCLUDED_PORTS: HashMap<u16, u8, 1024, 0> = HashMap::new();

/// Connections that the rules leave out, by the last bits of their numbers. The agent writes one that sends it
/// records all the same, and again when another took its place before it was seen here.
#[btf_map]
pub static UNWANTED: Array<u64, { agent_ebpf::UNWANTED }, 0> = Array::new();

/// [0]: generation of the exclusion rules; from 1, so that new state is always checked.
#[btf_map]
pub static RULES: Array<u32, 1, 0> = Array::new();

/// Set once at load.
#[unsafe(no_mangle)]
pub static SETTINGS: Settings = Settings {
    arch: 0,
    sides: 3,
    own_pid: 0,
    wake_bytes: 0,
    family: 0,
    num: 0,
    dport: 0,
    daddr: 0,
    rcv_saddr: 0,
    v6_daddr: 0,
    v6_rcv_saddr: 0,
    sk_type: 0,
    sk_protocol: 0,
    sk_shutdown: 0,
    sk_err: 0,
    copied_seq: 0,
    write_seq: 0,
    unix_addr: 0,
    unix_peer: 0,
    unix_len: 0,
    unix_name: 0,
    socket_sk: 0,
    by_address: 0,
    recv_flags: 0,
};

/// One field of [`SETTINGS`], read so that the compiler cannot fold the zero above into the code.
macro_rules! setting {
    ($field:ident) => {
        // SAFETY: an aligned read of a static.
        unsafe { core::ptr::read_volatile(&raw const $crate::maps::SETTINGS.$field) }
    };
}
pub(crate) use setting;

/// Room for the words that hold line feeds: a power of two above [`WORDS`].
pub const HITS: usize = 128;
/// Words that a window touches at most.
pub const WORDS: usize = WINDOW / 8 + 1;

/// A send or receive that has begun.
#[repr(C)]
pub struct Call {
    /// Address of the `struct sock`.
    pub sock: u64,
    /// Flags of a receive.
    pub flags: u64,
}

/// State of one connection.
#[repr(C)]
pub struct Connection {
    /// Its number; 0 before the first use.
    pub id: u64,
    /// The two directions: [0] received, [1] sent.
    pub directions: [Direction; 2],
    /// Requests whose heads were complete.
    pub requests: u32,
    /// Generation of the exclusion rules that it was held against.
    pub generation: u32,
    /// 0 unknown, [`SERVER`] or [`CLIENT`].
    pub role: u8,
    /// See the constants.
    pub state: u8,
    /// Receives and sends in a row that were no HTTP.
    pub strikes: u16,
    /// A socket that carries TLS: how much of the handshake was looked at, see `tls`.
    pub stage: u32,
    /// A socket that carries TLS: key of its plaintext's state, 0 for any other.
    pub tls: u64,
    /// What each request under way asks of its response's framing, by number.
    pub methods: [u8; PIPELINE],
}

/// This end accepted.
pub const SERVER: u8 = 1;
/// This end connected.
pub const CLIENT: u8 = 2;

/// Bits of [`Connection::state`].
/// OPEN record was passed on.
pub const OPENED: u8 = 1;
/// Seen from its first byte.
pub const FRESH: u8 = 2;
/// Not to be looked at any more.
pub const QUIET: u8 = 4;
/// CLOSE record was passed on.
pub const CLOSED: u8 = 8;
/// A reset was seen.
pub const RESET: u8 = 16;
/// An exchange of it was seen whole: responses can be told from late ones.
pub const SYNCED: u8 = 32;
/// It speaks HTTP/2.
pub const HTTP2: u8 = 64;
/// Bytes went over it unread: how many messages those were is not known.
pub const UNSURE: u8 = 128;

/// One direction of a connection.
#[repr(C)]
pub struct Direction {
    /// Body or chunk bytes still to come.
    pub remaining: u64,
    /// Bytes of the message under way.
    pub message: u64,
    /// Content bytes of it.
    pub body: u64,
    /// First byte of it, ns.
    pub first_ts: u64,
    /// Last byte of the direction, ns.
    pub last_ts: u64,
    /// Content-Length of the head under way.
    pub length: u64,
    /// Messages begun.
    pub index: u32,
    /// TCP sequence number after the last byte seen; 0 before.
    pub sequence: u32,
    /// Bytes of the head under way.
    pub head: u32,
    /// Status of the response under way.
    pub status: u16,
    /// Where the parser is: see `http1::mode`.
    pub mode: u8,
    /// Bits about the head under way: see `http1`.
    pub bits: u8,
    /// Bytes of `carry`.
    pub carry_len: u8,
    /// Lines of the head that are complete (saturating).
    pub lines: u8,
    /// Flags to add to the next record: LOST.
    pub lost: u8,
    /// Method class of the request under way.
    pub method: u8,
    /// 1: bytes are held against `sequence`. The connection is TCP.
    pub followed: u32,
    /// Start and end of the line under way. HTTP/2: `http2::Frames`.
    pub carry: [u64; CARRY / 8],
}

/// Working memory of one run.
#[repr(C)]
pub struct Work {
    /// Records passed on from here.
    pub records: u64,
    pub record: Record,
    /// Head bytes; a window may be read at any offset up to `DATA_LIMIT`.
    pub data: [u8; DATA_LIMIT + WINDOW + 64],
    /// Bytes in `data`.
    pub filled: u64,
    /// Start of the line under way in `data`.
    pub line: u64,
    /// First byte after the head in `data`, 0 while it is not found.
    pub end: u64,
    /// Bytes of the system call still to be looked at.
    pub left: u64,
    /// Current buffer: the layout of `struct iovec`.
    pub pointer: u64,
    pub length: u64,
    /// Bytes to pass over before the next that is looked at.
    pub skip: u64,
    /// Buffers to come, an array of `struct iovec`: the layout of `msg_iov` and `msg_iovlen`.
    pub vector: u64,
    pub vectors: u64,
    /// 1 where that array is a copy in the kernel.
    pub copied: u64,
    /// 1 while the bytes can be read, 0 when only their number is known.
    pub readable: u64,
    /// Time of the last byte, and of the first where the call moved them one after the other.
    pub now: u64,
    pub began: u64,
    pub pid: u64,
    /// Address of the socket.
    pub sock: u64,
    /// Key of the TLS session's plaintext, 0 for plain sockets.
    pub tls: u64,
    /// 0 receive, 1 send.
    pub direction: u64,
    /// What the bytes are when they are no HTTP/1: see `http1`.
    pub other: u64,
    /// End of the bytes read.
    pub limit: u64,
    /// Words of the window that hold line feeds: how many, where, and which is looked at.
    pub hits: u64,
    pub hit: u64,
    /// Offset of that word, the line feeds in it that are still to come, and the present one's offset.
    pub at: u64,
    pub found: u64,
    pub feed: u64,
    /// Where the lines begin that frame the body, 0 where there are none.
    pub content: u64,
    pub coding: u64,
    pub places: [u16; HITS],
    pub scratch: [u64; 4],
}
