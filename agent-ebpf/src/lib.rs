//! The ABI between the eBPF programs and the agent: every type and constant that crosses. All types
//! are `repr(C)` with explicit padding; sizes are asserted at compile time.
//!
//! A record is a [`Record`] header followed by `len` bytes of data: head bytes for [`Kind::HEAD`], an
//! [`Open`] for [`Kind::OPEN`], a [`Close`] for [`Kind::CLOSE`].
#![cfg_attr(feature = "kernel", no_std)]

/// Longest message head that is passed on, in bytes; longer ones are cut and flagged.
pub const HEAD_LIMIT: u32 = 32 * 1024;
/// Most head bytes in one record. Longer heads come as several records of one message.
pub const DATA_LIMIT: usize = 4096;
/// Head bytes are read from the application in windows of this size.
pub const WINDOW: usize = 512;
/// Bytes of an unfinished line that are kept between system calls: its first 48 and its last 16.
pub const CARRY: usize = 64;
/// Requests under way on one connection whose method the kernel side remembers.
pub const PIPELINE: usize = 64;
/// Most units (heads, windows, chunks, buffers) that one system call is taken apart into.
pub const STEPS: u32 = 8192;

/// Kinds of [`Record`].
pub struct Kind;
impl Kind {
    /// A connection speaks HTTP: its addresses. Comes before any other record of it.
    pub const OPEN: u8 = 1;
    /// Head bytes of a message.
    pub const HEAD: u8 = 2;
    /// The end of a message whose head came before.
    pub const END: u8 = 3;
    /// The connection is over. HTTP/2: `body` is what `message` is of [`Kind::FRAMES`], of both directions.
    pub const CLOSE: u8 = 4;
    /// The head under way was none: forget it.
    pub const ABORT: u8 = 5;
    /// The other end closed (seen by a receive of 0 bytes).
    pub const EOF: u8 = 6;
    /// Frames of HTTP/2: see `http2.rs` of the kernel side. `index` numbers the records of a direction,
    /// `body` is what is still to come of the payload in which the record begins, `message` the answers that ended
    /// in records that found the ring full, since the last record of this direction.
    pub const FRAMES: u8 = 7;
    /// A TLS connection ended: bytes received in `message`, sent in `body`. With [`Flag::DONE`] a library that is
    /// read carried it.
    pub const SEALED: u8 = 8;
}

/// Flags of [`Record`].
pub struct Flag;
impl Flag {
    /// First bytes of the head.
    pub const FIRST: u16 = 1;
    /// Last bytes of the head: the framing fields are set.
    pub const LAST: u16 = 1 << 1;
    /// The whole message is over with this record: the byte counts are final.
    pub const DONE: u16 = 1 << 2;
    /// The head was longer than [`super::HEAD_LIMIT`] and was cut.
    pub const CUT: u16 = 1 << 3;
    /// The message is a response (else a request).
    pub const RESPONSE: u16 = 1 << 4;
    /// The bytes were sent by this end (else received).
    pub const SENT: u16 = 1 << 5;
    /// Bytes of this message were missed: counts are lower bounds.
    pub const LOST: u16 = 1 << 6;
    /// The connection was reset.
    pub const RESET: u16 = 1 << 7;
    /// The message has a body of chunks.
    pub const CHUNKED: u16 = 1 << 8;
    /// The connection leaves HTTP with this message.
    pub const UPGRADE: u16 = 1 << 9;
    /// The connection was there before the agent.
    pub const LATE: u16 = 1 << 10;
    /// The end of the body is the end of the connection.
    pub const UNTIL_CLOSE: u16 = 1 << 11;
    /// The direction begins with the preface of an HTTP/2 client.
    pub const PREFACE: u16 = 1 << 12;
}

/// Flags about a DATA frame of HTTP/2.
pub struct DataFlag;
impl DataFlag {
    /// Messages that began in it may have been missed.
    pub const INEXACT: u8 = 1;
    /// Its content does not consist of gRPC messages.
    pub const OTHER: u8 = 2;
}

/// A message of HTTP/2 that is put aside while other streams of its connection have messages across frames.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageKey {
    /// Number of the connection.
    pub connection: u64,
    /// Its stream.
    pub stream: u32,
    /// 0 received, 1 sent.
    pub direction: u32,
}

/// Most messages that are put aside at once.
pub const MESSAGES: usize = 8192;

/// How the socket of a TLS session was found: [`Open::tls`].
pub struct Tier;
impl Tier {
    /// The connection is in plaintext.
    pub const PLAINTEXT: u8 = 0;
    /// The library sent or received on the socket within the traced call.
    pub const NESTED: u8 = 1;
    /// The session's client random (RFC 8446 section 4.1.2) was seen on the socket.
    pub const CIPHERTEXT: u8 = 2;
    /// Not at all: the addresses are not known.
    pub const NONE: u8 = 3;
}

/// In the number of a session whose socket was not found: this bit, and its process.
pub const WITHOUT_SOCKET: u64 = 1 << 63;
/// Place of the process in such a number.
pub const PID_SHIFT: u32 = 40;
/// Numbers of processes end here on every architecture (`PID_MAX_LIMIT`).
pub const PID_MASK: u64 = (1 << 22) - 1;

/// Most bytes of a ServerHello that follow an [`Open`].
pub const HELLO: usize = 128;

/// What a probe in a TLS library is at: the low byte of its cookie. The next two bytes number its
/// [`Layout`].
pub struct Op;
impl Op {
    /// `int f(session, buffer, size)`: reads; bytes, or not above 0.
    pub const READ: u64 = 1;
    /// `int f(session, buffer, size, size_t *bytes)`: reads; 1, or not.
    pub const READ_EX: u64 = 2;
    /// As `READ`, writes.
    pub const WRITE: u64 = 3;
    /// As `READ_EX`, writes.
    pub const WRITE_EX: u64 = 4;
    /// `ssize_t f(session, fd, offset, size, flags)`: writes what the library never sees.
    pub const SENDFILE: u64 = 5;
    /// `void f(session)`: the session is gone.
    pub const FREE: u64 = 6;
    /// As `READ`, with a `ssize_t`.
    pub const READ_LONG: u64 = 7;
    /// As `WRITE`, with a `ssize_t`.
    pub const WRITE_LONG: u64 = 8;
    /// As `READ`, on a descriptor that may be no TLS session at all.
    pub const READ_ANY: u64 = 9;
    /// As `WRITE`, on such a descriptor.
    pub const WRITE_ANY: u64 = 10;
    /// Go's `(*tls.Conn).Read`.
    pub const GO_READ: u64 = 11;
    /// Go's `(*tls.Conn).Write`.
    pub const GO_WRITE: u64 = 12;
    /// `int f(session, buffer, size, size_t *bytes)` behind `SSL_read`, `SSL_read_ex` and the library's own BIO: 1, or
    /// what `SSL_read` returns.
    pub const READ_INNER: u64 = 13;
    /// The same behind `SSL_write`.
    pub const WRITE_INNER: u64 = 14;
    /// As `WRITE_INNER`, with flags before the last argument (OpenSSL 3.3).
    pub const WRITE_INNER_FLAGS: u64 = 15;
    /// Go's `(*tls.Conn).clientHandshake` and `serverHandshake`: once for each connection.
    pub const GO_HANDSHAKE: u64 = 16;
    /// Go's `(*tls.Conn).Close`.
    pub const GO_CLOSE: u64 = 17;
    /// A return instruction of one of these functions.
    pub const GO_RETURN: u64 = 18;
    /// A return instruction of `GO_READ` where the arguments are on the stack, as they came.
    pub const GO_SPILLED: u64 = 19;
    /// Within `GO_READ`, where it calls `memmove(to, from, bytes)`. The bytes from the stack pointer to where it was at
    /// the entry take the place of the layout.
    pub const GO_COPY: u64 = 20;
    /// Within `GO_WRITE`, where what does the work of it has returned; the same.
    pub const GO_WRITTEN: u64 = 21;
    /// Within `GO_READ`, where a record was read, or not; the same.
    pub const GO_RECORD: u64 = 22;
    /// As `WRITE_ANY`, with an array of buffers and their number (`PRIOVec`: a pointer and 32 bits of length).
    pub const WRITEV_ANY: u64 = 23;
    /// rustls's `MessageDecrypter::decrypt`.
    pub const RUSTLS: u64 = 24;
    /// rustls's `MessageEncrypter::encrypt`.
    pub const RUSTLS_ENCRYPT: u64 = 25;
}

/// Places for connections that the agent leaves out; a power of two.
pub const UNWANTED: usize = 4096;

/// Layouts of sessions that are kept.
pub const LAYOUTS: usize = 256;

/// Where a library keeps what identifies a session.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// 1 when the client random's place is known.
    pub known: u32,
    /// Offset in the session of the pointer to the struct that holds the random, [`Layout::DIRECT`]
    /// where it is the session itself.
    pub pointer: u32,
    /// Offset of the client random in that struct.
    pub random: u32,
    /// Offset of the length of the protocol that ALPN chose, in the struct of [`Layout::alpn`].
    pub alpn_len: u32,
    /// The pointer to the name of that protocol.
    pub alpn: Place,
    /// The pointer to the certificate of the other end.
    pub certificate: Place,
}

/// Where a session has one of its facts.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// As [`Layout::pointer`]; 0 where the place is not known.
    pub pointer: u32,
    /// Offset in the struct that it leads to.
    pub at: u32,
}

impl Layout {
    /// See [`Layout::pointer`].
    pub const DIRECT: u32 = u32::MAX;
}

/// Header of every record.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Record {
    /// A [`Kind`].
    pub kind: u8,
    /// First bytes of the data that were sent before and are repeated: skip them.
    pub skip: u8,
    /// [`Flag`]s.
    pub flags: u16,
    /// Bytes of data that follow.
    pub len: u32,
    /// Connection.
    pub conn: u64,
    /// Monotonic time of the system call's end, ns.
    pub ts: u64,
    /// Time of the message's first byte, ns.
    pub first_ts: u64,
    /// Number of the message in its direction, from 0.
    pub index: u32,
    /// Process (thread group) that made the call.
    pub pid: u32,
    /// With DONE and END: bytes of the message on the connection. Else: bytes so far.
    pub message: u64,
    /// With DONE and END: content bytes. Else with LAST: Content-Length, where there is one.
    pub body: u64,
}

/// Socket addresses of a connection.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Open {
    /// `AF_INET`, `AF_INET6` or `AF_UNIX`.
    pub family: u16,
    /// Local port, host order.
    pub local_port: u16,
    /// Remote port, host order.
    pub remote_port: u16,
    /// 1: this end accepted; 2: it connected; 0: not known.
    pub role: u8,
    /// A [`Tier`]. Where it is not 0, the start of the ServerHello may follow (without its record's header).
    pub tls: u8,
    /// Address of the kernel's socket: finds the two ends of a unix connection. Never leaves the agent.
    pub sock: u64,
    /// The other end's, for unix sockets.
    pub peer_sock: u64,
    /// Local address, IPv4 in the first 4 bytes.
    pub local: [u8; 16],
    /// Remote address.
    pub remote: [u8; 16],
    /// Name of the process.
    pub comm: [u8; 16],
    /// Path of a unix socket: the one that was connected to. NUL first for an abstract name.
    pub path: [u8; 108],
    /// Bytes of `path`.
    pub path_len: u32,
    /// What the library says of the handshake, where it can be asked.
    pub session: Session,
}

/// What a TLS library keeps of a handshake.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Session {
    /// Start of the name of the protocol that ALPN chose.
    pub alpn: [u8; 12],
    /// Bytes of the name, the rest included; 0: none was chosen.
    pub alpn_len: u16,
    /// 1: `alpn` was read.
    pub alpn_known: u8,
    /// Certificate of the other end: 0 not known, 1 there is none, 2 there is one.
    pub certificate: u8,
}

/// What was under way when a connection ended: index 0 received, 1 sent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Close {
    /// Bytes of the unfinished message of each direction, 0 where none.
    pub message: [u64; 2],
    /// Content bytes of it.
    pub body: [u64; 2],
    /// Time of the last byte of each direction.
    pub last_ts: [u64; 2],
    /// 1 where the message under way ends properly with the connection.
    pub until_close: [u8; 2],
    /// 1 where a message is under way.
    pub unfinished: [u8; 2],
    /// Explicit padding.
    pub pad: [u8; 4],
    /// Requests and final responses whose heads the kernel side saw. HTTP/2: records of frames, received
    /// and sent; `message` and `body` are stream and bytes of the DATA frame under way.
    pub requests: u32,
    /// See `requests`.
    pub responses: u32,
}

/// Counters of the kernel side, one per-CPU slot each.
pub struct Count;
impl Count {
    /// Heads that found the ring full.
    pub const RING_FULL: u32 = 0;
    /// Ends (and closes) that found the ring full.
    pub const END_RING_FULL: u32 = 1;
    /// Application buffers that could not be read.
    pub const UNREADABLE: u32 = 2;
    /// Connections without state.
    pub const NO_STATE: u32 = 3;
    /// Requests beyond [`super::PIPELINE`].
    pub const PIPELINE_FULL: u32 = 4;
    /// Calls through `io_uring`.
    pub const IO_URING: u32 = 5;
    /// Calls of 32-bit processes.
    pub const COMPAT: u32 = 6;
    /// Calls of kernel threads.
    pub const KERNEL: u32 = 7;
    /// System calls whose buffer is not understood.
    pub const SYSCALL: u32 = 8;
    /// Connections found not to speak HTTP.
    pub const NOT_HTTP: u32 = 9;
    /// Responses to requests from before the agent.
    pub const JOINED_LATE: u32 = 10;
    /// Connections that open with TLS: read, unread, left out, or not over and nothing seen yet.
    pub const TLS: u32 = 11;
    /// Connections that speak HTTP/2.
    pub const HTTP2: u32 = 12;
    /// Calls that were taken apart into more than [`super::STEPS`] units.
    pub const STEPS: u32 = 13;
    /// Calls whose kretprobe did not run: the kernel keeps a fixed number of returns.
    pub const RETURN_MISSED: u32 = 14;
    /// Plaintext that found no memory to be looked at, or no room for its connection.
    pub const TLS_BUSY: u32 = 15;
    /// Calls into TLS libraries, to be held against messages.
    pub const TLS_CALLS: u32 = 16;
    /// TLS connections whose plaintext is seen, or that ended without any within calls that are.
    pub const TLS_READ: u32 = 17;
    /// Sessions without a socket.
    pub const TLS_UNBOUND: u32 = 18;
    /// TLS connections that ended and whose plaintext was not seen.
    pub const TLS_UNREAD: u32 = 19;
    /// TLS connections that the rules leave out.
    pub const TLS_LEFT_OUT: u32 = 20;
    /// Bytes of ciphertext of those in `TLS_UNREAD`.
    pub const TLS_UNREAD_BYTES: u32 = 21;
    /// Times that bytes went by unseen between two messages of a connection.
    pub const MISSED: u32 = 22;
    /// Records of rustls whose plaintext was not seen on connections that are read.
    pub const TLS_MISSED: u32 = 23;
    /// Number of counters.
    pub const LEN: u32 = 32;
}

/// Kernel-struct offsets, resolved from BTF at load time, and what the agent wants. One read-only
/// global: the verifier knows its values, and drops the branches that do not apply.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    /// 0: x86_64, 1: arm64 (`pt_regs` and system-call numbers).
    pub arch: u32,
    /// Bit 0: server side wanted, bit 1: client side.
    pub sides: u32,
    /// The agent's own thread group: never traced.
    pub own_pid: u32,
    /// Wake the reader when this many bytes wait in the ring.
    pub wake_bytes: u32,
    /// `sock.__sk_common.skc_family`.
    pub family: u32,
    /// `sock.__sk_common.skc_num`.
    pub num: u32,
    /// `sock.__sk_common.skc_dport`.
    pub dport: u32,
    /// `sock.__sk_common.skc_daddr`.
    pub daddr: u32,
    /// `sock.__sk_common.skc_rcv_saddr`.
    pub rcv_saddr: u32,
    /// `sock.__sk_common.skc_v6_daddr`.
    pub v6_daddr: u32,
    /// `sock.__sk_common.skc_v6_rcv_saddr`.
    pub v6_rcv_saddr: u32,
    /// `sock.sk_type`.
    pub sk_type: u32,
    /// `sock.sk_protocol`.
    pub sk_protocol: u32,
    /// `sock.sk_shutdown`.
    pub sk_shutdown: u32,
    /// `sock.sk_err`.
    pub sk_err: u32,
    /// `tcp_sock.copied_seq`.
    pub copied_seq: u32,
    /// `tcp_sock.write_seq`.
    pub write_seq: u32,
    /// `unix_sock.addr`.
    pub unix_addr: u32,
    /// `unix_sock.peer`.
    pub unix_peer: u32,
    /// `unix_address.len`.
    pub unix_len: u32,
    /// `unix_address.name`.
    pub unix_name: u32,
    /// `socket.sk`.
    pub socket_sk: u32,
    /// 1: connection state is in a table by address, not in the socket.
    pub by_address: u32,
    /// Which argument of `tcp_recvmsg` the flags are: Linux 5.19 took one away in front of them.
    pub recv_flags: u32,
}

const _: () = assert!(size_of::<Record>() == 56);
const _: () = assert!(size_of::<Open>() == 200);
const _: () = assert!(size_of::<Close>() == 64);
const _: () = assert!(size_of::<Settings>() == 96);
const _: () = assert!(size_of::<Layout>() == 32);

#[cfg(feature = "user")]
mod pod {
    // SAFETY: repr(C), integers only, no padding.
    unsafe impl aya::Pod for super::Settings {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Layout {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::MessageKey {}
}
