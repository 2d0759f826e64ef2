//! TLS: plaintext from the libraries, addresses and times from the socket that carries the ciphertext.
//!
//! # Hooks
//! uprobes at the entry ([`tls_enter`]) and return ([`tls_read`], [`tls_write`]) of a library's read and write functions;
//! the cookie of a probe says which ([`Op`]). The socket door calls [`begins`], [`carry`], [`end_of_file`], [`forget`].
//!
//! # State
//! A socket whose first bytes are a TLS record gets a [`Plain`]: the state of the HTTP machine for what it
//! carries, its addresses, its ServerHello. The plaintext of a session goes to the `Plain` of its socket:
//! - the library sends or receives within the traced call: that socket ([`Tier::NESTED`]);
//! - the program moves the ciphertext itself (memory BIOs): the socket of the same process that carried a
//!   ClientHello with the session's client random ([`Tier::CIPHERTEXT`]);
//! - else to a `Plain` without a socket ([`Tier::NONE`]). The last socket that a thread used is never taken.
//!
//! What has to do with a socket is freed with it, so that only sessions without one can be left behind.

use agent_ebpf::{Count, HELLO, LAYOUTS as LAYOUTS_LEN, Layout, Op, Open, PID_MASK, PID_SHIFT, Tier, WITHOUT_SOCKET};
use aya_ebpf::{
    bindings::BPF_NOEXIST,
    btf_maps::{Array, HashMap, LruHashMap},
    helpers::{
        bpf_get_current_pid_tgid, bpf_get_smp_processor_id, bpf_ktime_get_ns,
        generated::{self, bpf_probe_read_kernel, bpf_probe_read_user},
    },
    macros::{btf_map, uprobe},
    programs::ProbeContext,
};

use crate::{
    conn, emit, go,
    http1::{self, mode},
    kernel::{self, Buffer},
    maps::{CLIENT, CLOSED, Connection, FRESH, OPENED, QUIET, SERVER, WORK, Work, setting},
    registers::{argument, keep_stack, returned, stack},
    runs::{claim, release},
    rustls,
    session::{ask, by_random},
    storage::TaskStorage,
};

/// Most TLS connections at once.
const CONNECTIONS: usize = 65_536;
/// `BPF_F_NO_PREALLOC`: memory for what is there, not for what could be.
const NO_PREALLOC: usize = 1;
/// Sessions that are remembered; one that was forgotten is found again by its next call.
const SESSIONS_LEN: usize = 16_384;

/// The plaintext of a TLS connection.
#[repr(C)]
pub struct Plain {
    pub connection: Connection,
    pub open: Open,
    /// Start of the ServerHello message.
    hello: [u8; HELLO],
    hello_len: u32,
    /// Process that moved the ClientHello.
    tgid: u32,
    key: HelloKey,
    /// Last receive and send on the socket, ns.
    times: [u64; 2],
    /// A [`Tier`]; 0 until a session was found.
    pub tier: u8,
    /// The other end sends no more.
    eof: u8,
    /// What it was counted as: 0 while that is open, [`READ`], [`LEFT_OUT`].
    counted: u8,
    /// A write is under way that counts when it returns.
    writing: u8,
    /// By direction: what came before the next bytes was missed. See `rustls`.
    pub missed: [u8; 2],
    pad: [u8; 2],
    /// The session that it is bound to, where that uses its socket itself.
    owner: Session,
    /// By direction: rustls's object that has the keys.
    pub keys: [Keys; 2],
}

/// An object that protects the records of one direction, and the number of its next one.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Keys {
    pub object: u64,
    pub next: u64,
}

/// Identity of a handshake at one end.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HelloKey {
    /// First half of the client random.
    pub random: [u64; 2],
    pub tgid: u32,
    /// [`SERVER`] or [`CLIENT`].
    pub role: u32,
}

/// A session: process and address of the library's object.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Session {
    pub tgid: u64,
    pub address: u64,
}

/// A call into a library that is under way.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Call {
    /// An [`Op`], 0 when there is none.
    pub op: u64,
    /// Stack pointer at the entry.
    pub stack: u64,
    /// Where the library puts the number of bytes, for the `_EX` and `_INNER` kinds.
    moved: u64,
    pub transfer: Transfer,
}

/// What of a call outlives it: `go_read` has it on its stack, which is short.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Transfer {
    pub layout: u64,
    pub session: u64,
    pub buffer: u64,
    pub size: u64,
    /// The socket's plaintext, 0 while the call has not used one.
    pub plain: u64,
    /// First and last receive and send within the call, ns.
    pub first: [u64; 2],
    pub last: [u64; 2],
}

/// The call that a thread is in.
#[btf_map]
pub static TLS_THREADS: TaskStorage<Call> = TaskStorage::new();

/// Plaintext by key, which is the connection's number.
#[btf_map]
pub static PLAIN: HashMap<u64, Plain, CONNECTIONS, NO_PREALLOC> = HashMap::new();

/// What a new [`Plain`] is a copy of: zeroes.
#[btf_map]
pub static TLS_BLANK: Array<Plain, 1, 0> = Array::new();

/// Key of each session's plaintext.
#[btf_map]
pub static SESSIONS: LruHashMap<Session, u64, SESSIONS_LEN, 0> = LruHashMap::new();

/// Plaintext by handshake.
#[btf_map]
pub static HELLOS: HashMap<HelloKey, u64, CONNECTIONS, NO_PREALLOC> = HashMap::new();

/// By library.
#[btf_map]
pub static LAYOUTS: Array<Layout, LAYOUTS_LEN, 0> = Array::new();

/// [`Connection::stage`]: the header of the ClientHello's record was seen, its body comes.
const CLIENT_BODY: u32 = 1;
/// The ServerHello is to come.
const SERVER_RECORD: u32 = 2;
/// Its record's header was seen.
const SERVER_BODY: u32 = 3;
/// The rest is ciphertext.
const DONE: u32 = 4;
/// Set in addition where the ClientHello was sent, not received.
const SENT: u32 = 8;

/// Set in addition where a library that is read used the socket.
const TRACED: u32 = 16;
/// Bits of the stage that say nothing about the handshake.
const MARKS: u32 = SENT | TRACED;

/// [`Plain::counted`].
const READ: u8 = 1;
const LEFT_OUT: u8 = 2;

/// Bytes of a TLS record's header.
const HEADER: u64 = 5;
/// Offset of the random in a ClientHello message: type, length, version.
const RANDOM: u64 = 6;
/// Tunnelled transfers that are looked at for the start of TLS.
const TUNNEL_LOOKS: u16 = 8;

/// Does TLS begin with these bytes of a socket? Then it is ciphertext from now on.
#[inline(always)]
pub fn begins(sock: u64, connection: &mut Connection, bytes: u64, direction: u64, readable: bool, now: u64) -> bool {
    if connection.state & OPENED != 0 {
        if connection.strikes >= TUNNEL_LOOKS {
            return false;
        }
        connection.strikes += 1;
    }
    let (pointer, length) = if readable { first_buffer(bytes) } else { (0, 0) };
    let mut head = [0u64; 4];
    let n = if length < 32 { length } else { 32 };
    // SAFETY: `head` has 32 bytes; the helper checks the address.
    if n < HEADER || unsafe { bpf_probe_read_user((&raw mut head).cast(), n as u32, pointer as *const _) } != 0 {
        // What cannot be looked at is ciphertext when a library moves it (kTLS).
        return connection.state & (FRESH | OPENED) == 0 && is_nested() && {
            start(sock, connection, direction, bytes, DONE, [0; 2], now)
        };
    }
    let (kind, version, minor) = (head[0] as u8, (head[0] >> 8) as u8, (head[0] >> 16) as u8);
    let record = (20..=23).contains(&kind) && version == 3 && minor <= 4;
    if record && kind == 22 {
        let message = (head[0] >> 40) as u8;
        if bytes == HEADER {
            return start(sock, connection, direction, bytes, CLIENT_BODY, [0; 2], now);
        }
        if message == 1 {
            let mut random = [0u64; 2];
            if length >= HEADER + RANDOM + 32 {
                let from = pointer + HEADER + RANDOM;
                // SAFETY: as above.
                unsafe { bpf_probe_read_user((&raw mut random).cast(), 16, from as *const _) };
            }
            return start(sock, connection, direction, bytes, SERVER_RECORD, random, now);
        }
    }
    if connection.state & (FRESH | OPENED) != 0 {
        return false;
    }
    // A connection from before the agent.
    (record || is_nested()) && start(sock, connection, direction, bytes, DONE, [0; 2], now)
}

/// Makes the state for what the socket carries. The ClientHello went in `direction` (where it was seen).
#[inline(always)]
fn start(
    sock: u64,
    connection: &mut Connection,
    direction: u64,
    bytes: u64,
    stage: u32,
    random: [u64; 2],
    now: u64,
) -> bool {
    let Some(id) = conn::number() else { return false };
    let Some(plain) = make(id) else { return false };
    // SAFETY: map memory of this connection.
    let plain = unsafe { &mut *plain };
    let role = if direction == 0 { SERVER } else { CLIENT };
    if stage != DONE {
        plain.connection.state = FRESH;
        plain.connection.role = role;
        if setting!(sides) & u32::from(role) == 0 {
            plain.connection.state |= QUIET;
        }
    }
    // SAFETY: map memory.
    unsafe { kernel::addresses(sock, &raw mut plain.open) };
    plain.tgid = (bpf_get_current_pid_tgid() >> 32) as u32;
    plain.key = HelloKey { random, tgid: plain.tgid, role: u32::from(role) };
    if random[0] != 0 {
        let _ = HELLOS.insert(&plain.key, id, 0);
    }
    emit::count(Count::TLS);
    connection.tls = id;
    connection.stage = stage | if direction != 0 { SENT } else { 0 };
    connection.directions[usize::from(direction != 0)].message = bytes;
    connection.directions[usize::from(direction == 0)].message = 0;
    plain.times[usize::from(direction != 0)] = now;
    if note(id, direction, now) {
        connection.stage |= TRACED;
    }
    true
}

/// New state without anything in it.
#[inline(always)]
fn make(id: u64) -> Option<*mut Plain> {
    let blank = TLS_BLANK.get_ptr(0)?;
    // SAFETY: key and value are valid for the call; the map copies them.
    let failed = unsafe {
        generated::bpf_map_update_elem(
            (&raw const PLAIN).cast_mut().cast(),
            (&raw const id).cast_mut().cast(),
            blank.cast_mut().cast(),
            u64::from(BPF_NOEXIST),
        )
    };
    if failed != 0 {
        emit::count(Count::TLS_BUSY);
        return None;
    }
    let plain = PLAIN.get_ptr_mut(&id)?;
    // SAFETY: map memory of this connection.
    unsafe { (*plain).connection.id = id };
    Some(plain)
}

/// Ciphertext went over a socket.
#[inline(always)]
pub fn carry(connection: &mut Connection, bytes: u64, direction: u64, readable: bool, now: u64) {
    connection.directions[usize::from(direction != 0)].message += bytes;
    let nested = note(connection.tls, direction, now);
    if nested {
        connection.stage |= TRACED;
    }
    let stage = connection.stage & !MARKS;
    if stage == DONE {
        if !nested && let Some(plain) = PLAIN.get_ptr_mut(&connection.tls) {
            // SAFETY: map memory of this connection.
            unsafe { (*plain).times[usize::from(direction != 0)] = now };
        }
        return;
    }
    let Some(plain) = PLAIN.get_ptr_mut(&connection.tls) else { return };
    // SAFETY: as above.
    let plain = unsafe { &mut *plain };
    plain.times[usize::from(direction != 0)] = now;
    let from_client = (connection.stage & SENT != 0) == (direction != 0);
    let marks = connection.stage & MARKS;
    let (pointer, length) = if readable { first_buffer(bytes) } else { (0, 0) };
    let mut kind = 0u64;
    if length < HEADER {
        connection.stage = DONE | marks;
        return;
    }
    // SAFETY: the helper checks the address.
    unsafe { bpf_probe_read_user((&raw mut kind).cast(), if length < 8 { 5 } else { 8 }, pointer as *const _) };
    if stage == CLIENT_BODY {
        if !from_client {
            return;
        }
        if kind as u8 == 1 && length >= RANDOM + 32 {
            let from = (pointer + RANDOM) as *const _;
            // SAFETY: as above.
            unsafe { bpf_probe_read_user((&raw mut plain.key.random).cast(), 16, from) };
            let key = plain.key;
            let _ = HELLOS.insert(&key, connection.tls, 0);
        }
        connection.stage = SERVER_RECORD | marks;
        return;
    }
    if from_client {
        return;
    }
    if stage == SERVER_RECORD && kind as u8 == 22 && bytes == HEADER {
        connection.stage = SERVER_BODY | marks;
        return;
    }
    let at = if stage == SERVER_BODY { 0 } else { HEADER };
    let message = if stage == SERVER_BODY { kind as u8 } else { (kind >> 40) as u8 };
    if message == 2 && length > at {
        let mut n = length - at;
        if n > HELLO as u64 {
            n = HELLO as u64;
        }
        // SAFETY: as above; `hello` has HELLO bytes.
        if unsafe { bpf_probe_read_user((&raw mut plain.hello).cast(), n as u32, (pointer + at) as *const _) } == 0 {
            plain.hello_len = n as u32;
        }
    }
    connection.stage = DONE | marks;
}

/// The call that this thread (or its goroutine) is in, if any, used this socket. False where there is none.
#[inline(always)]
fn note(id: u64, direction: u64, now: u64) -> bool {
    let Some(call) = under_way() else { return false };
    // SAFETY: storage of the current thread, or of its goroutine.
    let transfer = unsafe { &mut (*call).transfer };
    if transfer.plain != 0 && transfer.plain != id {
        return false;
    }
    transfer.plain = id;
    let i = usize::from(direction != 0);
    if transfer.first[i] == 0 {
        transfer.first[i] = now;
    }
    transfer.last[i] = now;
    true
}

/// Is this thread in a library's call?
#[inline(always)]
fn is_nested() -> bool {
    // SAFETY: storage of the current thread.
    call(false).is_some_and(|call| unsafe { (*call).op != 0 })
}

/// The call that this thread is in, or the goroutine that runs on it.
#[inline(always)]
fn under_way() -> Option<*mut Call> {
    match call(false) {
        // SAFETY: storage of the current thread.
        Some(call) if unsafe { (*call).op } != 0 => Some(call),
        _ => go::call(),
    }
}

/// Storage of the current thread.
#[inline(always)]
fn call(create: bool) -> Option<*mut Call> {
    TLS_THREADS.get(create)
}

/// Address and length of the first buffer of the system call that moved `bytes`.
#[inline(always)]
pub fn first_buffer(bytes: u64) -> (u64, u64) {
    let mut vector = match kernel::buffer() {
        Buffer::Flat(pointer) => return (pointer, bytes),
        Buffer::Vector(vector, _) => vector,
        Buffer::Message(message) => {
            let mut vector = 0u64;
            // SAFETY: the helper checks the address. struct msghdr: iov is at 16.
            unsafe { bpf_probe_read_user((&raw mut vector).cast(), 8, (message + 16) as *const _) };
            vector
        }
        _ => return (0, 0),
    };
    let mut turns = 0;
    // Empty buffers may come first.
    while turns < 4 {
        let mut pair = [0u64; 2];
        // SAFETY: the helper checks the address.
        if unsafe { bpf_probe_read_user((&raw mut pair).cast(), 16, vector as *const _) } != 0 {
            return (0, 0);
        }
        if pair[1] != 0 {
            return (pair[0], if pair[1] < bytes { pair[1] } else { bytes });
        }
        vector += 16;
        turns += 1;
    }
    (0, 0)
}

/// The other end of a TLS connection sends no more: what it sent may still wait in the library.
#[inline(always)]
pub fn end_of_file(id: u64) {
    if let Some(plain) = PLAIN.get_ptr_mut(&id) {
        // SAFETY: map memory of this connection.
        unsafe { (*plain).eof = 1 };
    }
}

/// State of the plaintext that a socket carries.
#[inline(always)]
pub fn plaintext<'a>(id: u64) -> Option<&'a mut Connection> {
    // SAFETY: map memory of this connection.
    PLAIN.get_ptr_mut(&id).map(|plain| unsafe { &mut (*plain).connection })
}

/// Is a write under way that counts when it returns? A peer that has all of it may reset the connection before.
#[inline(always)]
pub fn writing<'a>(id: u64) -> Option<&'a mut u8> {
    // SAFETY: map memory of this connection.
    PLAIN.get_ptr_mut(&id).map(|plain| unsafe { &mut (*plain).writing })
}

/// A call that moved no plaintext used the socket at these times, ns: what it received may be read later.
#[inline(always)]
pub fn used(id: u64, last: [u64; 2]) {
    let Some(plain) = PLAIN.get_ptr_mut(&id) else { return };
    // SAFETY: map memory of this connection.
    let plain = unsafe { &mut *plain };
    if last[0] != 0 {
        plain.times[0] = last[0];
    }
    if last[1] != 0 {
        plain.times[1] = last[1];
    }
}

/// The socket is gone.
#[inline(always)]
pub fn forget(connection: &mut Connection) {
    let id = connection.tls;
    connection.tls = 0;
    let Some(plain) = PLAIN.get_ptr_mut(&id) else { return };
    // SAFETY: map memory of this connection.
    let plain = unsafe { &mut *plain };
    let left_out = plain.counted == 0 && plain.connection.state & QUIET != 0;
    if plain.counted == LEFT_OUT || left_out {
        if left_out {
            emit::count(Count::TLS_LEFT_OUT);
        }
    } else {
        let [received, sent] = &connection.directions;
        // One that never said anything is not unread.
        let found = plain.tier == Tier::CIPHERTEXT || connection.stage & TRACED != 0;
        let read = plain.counted == READ || found;
        if !read {
            emit::count(Count::TLS_UNREAD);
            emit::add(Count::TLS_UNREAD_BYTES, received.message + sent.message);
        } else if plain.counted == 0 {
            emit::count(Count::TLS_READ);
        }
        if let Some(work) = WORK.get_ptr_mut(2) {
            // SAFETY: this CPU's slot for these hooks.
            let work = unsafe { &mut *work };
            // SAFETY: no preconditions.
            work.now = unsafe { bpf_ktime_get_ns() };
            emit::sealed(work, &plain.connection, plain.tgid, read, received.message, sent.message);
        }
    }
    if plain.key.random[0] != 0 {
        let key = plain.key;
        let _ = HELLOS.remove(&key);
    }
    let _ = PLAIN.remove(&id);
}

/// Fills the addresses of the OPEN record of a TLS connection, and the ServerHello behind them. Returns the
/// bytes of the latter.
#[inline(always)]
// SAFETY: callers pass memory with HELLO bytes behind the `Open`.
pub unsafe fn describe(id: u64, open: *mut Open) -> u32 {
    let Some(plain) = PLAIN.get_ptr(&id) else { return 0 };
    // SAFETY: the caller's memory; map memory of this connection.
    unsafe {
        bpf_probe_read_kernel(open.cast(), size_of::<Open>() as u32, (&raw const (*plain).open).cast());
        bpf_probe_read_kernel(open.add(1).cast(), HELLO as u32, (&raw const (*plain).hello).cast());
        (*open).tls = (*plain).tier;
        (*plain).hello_len
    }
}

/// Entry of a library's function.
#[uprobe]
pub fn tls_enter(ctx: ProbeContext) -> u32 {
    keep_stack(&ctx);
    enter(&ctx);
    0
}

#[inline(always)]
fn enter(ctx: &ProbeContext) {
    // SAFETY: the program's own context.
    let cookie = unsafe { generated::bpf_get_attach_cookie(ctx.regs.cast()) };
    let op = cookie & 0xff;
    if op == Op::FREE {
        let session = Session { tgid: bpf_get_current_pid_tgid() >> 32, address: argument(ctx, 0) };
        free(&session);
        return;
    }
    let Some(call) = call(true) else {
        emit::count(Count::TLS_BUSY);
        return;
    };
    // SAFETY: storage of the current thread.
    let call = unsafe { &mut *call };
    let stack = stack(ctx);
    // A call within a call (wrappers, TLS within TLS): the outer one has the message. One that is further
    // out, or at the same place, means that the one before never came back.
    if call.op != 0 && stack < call.stack {
        return;
    }
    emit::count(Count::TLS_CALLS);
    call.op = op;
    call.stack = stack;
    call.moved = if op == Op::WRITE_INNER_FLAGS { argument(ctx, 4) } else { argument(ctx, 3) };
    call.transfer = Transfer {
        layout: cookie >> 8 & 0xffff,
        session: argument(ctx, 0),
        buffer: argument(ctx, 1),
        size: argument(ctx, 2),
        plain: 0,
        first: [0; 2],
        last: [0; 2],
    };
}

/// A session's object is gone; its connection, where it has a socket, goes with that.
#[inline(always)]
pub fn free(session: &Session) {
    let Some(id) = SESSIONS.get_ptr(session) else { return };
    // SAFETY: map memory.
    let id = unsafe { *id };
    let _ = SESSIONS.remove(session);
    let Some(plain) = PLAIN.get_ptr_mut(&id) else { return };
    // SAFETY: map memory of this connection.
    let plain = unsafe { &mut *plain };
    if plain.tier != Tier::NONE {
        return;
    }
    if plain.connection.state & (OPENED | QUIET | CLOSED) == OPENED
        && let Some((work, run)) = claim()
    {
        // SAFETY: claimed.
        let work = unsafe { &mut *work };
        // SAFETY: no preconditions.
        work.now = unsafe { bpf_ktime_get_ns() };
        work.pid = session.tgid;
        work.direction = 0;
        conn::close(work, &mut plain.connection, 0, true);
        release(run);
    }
    let _ = PLAIN.remove(&id);
}

/// Return of a library's function that reads. One program for each direction, as at the socket door: a
/// direction that is a constant spares the verifier half of all ways.
#[uprobe]
pub fn tls_read(ctx: ProbeContext) -> u32 {
    leave(&ctx, 0);
    0
}

/// Return of one that writes.
#[uprobe]
pub fn tls_write(ctx: ProbeContext) -> u32 {
    leave(&ctx, 1);
    0
}

#[inline(always)]
fn leave(ctx: &ProbeContext, direction: u64) {
    keep_stack(ctx);
    let Some(call) = call(false) else { return };
    // SAFETY: storage of the current thread.
    let call = unsafe { &mut *call };
    let op = call.op;
    // The return address was taken from the stack, on x86_64.
    let popped = if setting!(arch) == 0 { 8 } else { 0 };
    if op == 0 || stack(ctx) != call.stack + popped {
        return;
    }
    call.op = 0;
    let result = returned(ctx);
    let narrow = i64::from(result as i32);
    let bytes = match op {
        Op::READ_EX | Op::WRITE_EX | Op::READ_INNER | Op::WRITE_INNER | Op::WRITE_INNER_FLAGS => {
            let mut moved = if op <= Op::WRITE_EX { 0 } else { narrow };
            if narrow == 1 {
                // SAFETY: the helper checks the address.
                unsafe { bpf_probe_read_user((&raw mut moved).cast(), 8, call.moved as *const _) };
            }
            moved
        }
        Op::READ_LONG | Op::WRITE_LONG | Op::SENDFILE => result as i64,
        _ => narrow,
    };
    if bytes > 0 {
        deliver(&mut call.transfer, op, bytes as u64, direction);
    } else if bytes == 0 && direction == 0 {
        ended(&call.transfer, op);
    }
}

/// `bytes` of plaintext were moved by a call.
#[inline(always)]
pub fn deliver(transfer: &mut Transfer, op: u64, bytes: u64, direction: u64) {
    let pid = bpf_get_current_pid_tgid() >> 32;
    // SAFETY: no preconditions.
    let mut now = unsafe { bpf_ktime_get_ns() };
    let mut id = transfer.plain;
    let owner = Session { tgid: pid, address: transfer.session };
    // What nearly every call is needs no look for the session.
    let found = if op == Op::RUSTLS {
        PLAIN.get_ptr_mut(&id)
    } else {
        // SAFETY: map memory.
        PLAIN.get_ptr_mut(&id).filter(|plain| unsafe { (**plain).owner } == owner).or_else(|| {
            id = resolve(transfer, op, direction, pid, now);
            PLAIN.get_ptr_mut(&id)
        })
    };
    let Some(plain) = found else { return };
    // SAFETY: map memory of this connection; see `socket::transfer` on writers.
    let plain = unsafe { &mut *plain };
    if !admit(plain, pid) {
        return;
    }
    let i = usize::from(direction != 0);
    // The time of the system call that moved the bytes, which is earlier than this.
    let mut first = now;
    if transfer.last[i] != 0 {
        first = transfer.first[i];
        now = transfer.last[i];
        plain.times[i] = now;
    } else if direction == 0 && plain.times[0] != 0 {
        now = plain.times[0];
        first = now;
    }
    let Some((work, run)) = claim() else { return };
    // SAFETY: claimed.
    let work = unsafe { &mut *work };
    fill(work, id, bytes, direction);
    work.pid = pid;
    work.now = now;
    work.began = first;
    work.pointer = transfer.buffer;
    work.length = bytes;
    if op == Op::SENDFILE {
        work.length = 0;
        work.readable = 0;
    }
    if op == Op::WRITEV_ANY || (op == Op::RUSTLS && direction != 0) {
        work.length = 0;
        work.vector = transfer.buffer;
        work.vectors = transfer.size & u64::from(u32::MAX);
    }
    if op == Op::RUSTLS {
        work.skip = transfer.layout;
        rustls::mend(plain, work, i);
    }
    http1::feed(work, &mut plain.connection, direction);
    plain.connection.directions[i].last_ts = now;
    release(run);
}

/// Is the plaintext of this connection wanted? What it is counted as is decided once. With a stack of its own.
#[inline(never)]
pub fn admit(plain: &mut Plain, pid: u64) -> bool {
    if plain.connection.state & (QUIET | CLOSED) != 0 {
        return false;
    }
    let open = (plain.open.local_port, plain.open.remote_port);
    let wanted = conn::is_wanted(pid as u32, &mut plain.connection, || open);
    if plain.counted == 0 && plain.tier != Tier::NONE {
        plain.counted = if wanted { READ } else { LEFT_OUT };
        emit::count(if wanted { Count::TLS_READ } else { Count::TLS_LEFT_OUT });
    }
    if !wanted {
        plain.connection.state |= QUIET;
    }
    wanted
}

/// Work on `bytes` of the plaintext `id`, but for where they are, whose and when.
#[inline(always)]
pub fn fill(work: &mut Work, id: u64, bytes: u64, direction: u64) {
    work.sock = 0;
    work.tls = id;
    work.direction = direction;
    work.left = bytes;
    work.filled = 0;
    work.vectors = 0;
    work.copied = 0;
    work.skip = 0;
    work.readable = 1;
}

/// A read found the end.
#[inline(always)]
pub fn ended(transfer: &Transfer, op: u64) {
    let pid = bpf_get_current_pid_tgid() >> 32;
    let session = Session { tgid: pid, address: transfer.session };
    let Some(id) = SESSIONS.get_ptr(&session) else { return };
    // SAFETY: map memory.
    end(unsafe { *id }, op, pid);
}

/// The other end of the plaintext `id` sends no more.
#[inline(always)]
pub fn end(id: u64, op: u64, pid: u64) {
    let Some(plain) = PLAIN.get_ptr_mut(&id) else { return };
    // SAFETY: map memory of this connection.
    let plain = unsafe { &mut *plain };
    // The `_EX` kinds say 0 for "not now" too.
    if op == Op::READ_EX && plain.eof == 0 {
        return;
    }
    if plain.connection.state & (OPENED | QUIET | CLOSED) != OPENED
        || plain.connection.directions[0].mode != mode::UNTIL_CLOSE
    {
        return;
    }
    let Some((work, run)) = claim() else { return };
    // SAFETY: claimed.
    let work = unsafe { &mut *work };
    work.pid = pid;
    work.direction = 0;
    conn::end_direction(work, &mut plain.connection, 0);
    release(run);
}

/// Finds the plaintext's state of the session of a call; 0: none. With a stack of its own, which is short.
#[inline(never)]
fn resolve(transfer: &mut Transfer, op: u64, direction: u64, pid: u64, now: u64) -> u64 {
    let session = Session { tgid: pid, address: transfer.session };
    // SAFETY: map memory.
    let old = SESSIONS.get_ptr(&session).map_or(0, |id| unsafe { *id });
    if transfer.plain != 0 {
        if old != transfer.plain {
            bind(&session, transfer.plain, old, Tier::NESTED);
            ask(transfer, transfer.plain);
        }
        return transfer.plain;
    }
    // SAFETY: map memory.
    let tier = PLAIN.get_ptr(&old).map_or(0, |plain| unsafe { (*plain).tier });
    if tier == Tier::NESTED {
        return old;
    }
    // Memory BIOs. The session's address may be another one's by now: the random tells.
    if let Some(id) = by_random(transfer, direction, pid) {
        if id != old {
            bind(&session, id, old, Tier::CIPHERTEXT);
            ask(transfer, id);
        }
        return id;
    }
    if tier != 0 {
        return old;
    }
    if op == Op::READ_ANY || op == Op::WRITE_ANY || op == Op::WRITEV_ANY {
        return 0;
    }
    // SAFETY: no preconditions.
    let cpu = u64::from(unsafe { bpf_get_smp_processor_id() });
    // The agent finds those of processes that are gone by it.
    let id = WITHOUT_SOCKET | (pid & PID_MASK) << PID_SHIFT | ((now << 7 | cpu & 0x7f) & ((1 << PID_SHIFT) - 1));
    // SAFETY: map memory of this connection.
    unsafe {
        let Some(plain) = make(id) else { return 0 };
        (*plain).tier = Tier::NONE;
        (*plain).tgid = pid as u32;
    }
    emit::count(Count::TLS_UNBOUND);
    let _ = SESSIONS.insert(&session, id, 0);
    ask(transfer, id);
    id
}

/// The session of a call is the one of the socket with the plaintext `id`; until now it had `old`.
#[inline(always)]
pub fn bind(session: &Session, id: u64, old: u64, tier: u8) {
    let _ = SESSIONS.insert(session, id, 0);
    let Some(plain) = PLAIN.get_ptr_mut(&id) else { return };
    // SAFETY: map memory of this connection.
    let plain = unsafe { &mut *plain };
    plain.tier = tier;
    if tier == Tier::NESTED {
        plain.owner = *session;
    }
    if old == 0 {
        return;
    }
    let Some(before) = PLAIN.get_ptr_mut(&old) else { return };
    // SAFETY: as above.
    let before = unsafe { &mut *before };
    if before.tier != Tier::NONE {
        return;
    }
    // What was seen while the socket was not known goes on here, under the number that it had.
    if plain.connection.state & OPENED == 0 && plain.connection.directions[0].mode == mode::START {
        // SAFETY: both are map memory of that size.
        unsafe {
            bpf_probe_read_kernel(
                (&raw mut plain.connection).cast(),
                size_of::<Connection>() as u32,
                (&raw const before.connection).cast(),
            );
        }
        plain.connection.state &= !OPENED;
    }
    let _ = PLAIN.remove(&old);
}

const _: () = assert!(size_of::<HelloKey>() == 24 && size_of::<Session>() == 16 && CLIENT_BODY < SENT);
