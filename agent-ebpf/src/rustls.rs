//! rustls 0.23: plaintext from the calls that take the protection off each record and put it on. What they look like,
//! and how that is known: `library.rs` of the agent.
//!
//! # Hooks
//! [`rustls_enter`]: entry of `MessageDecrypter::decrypt`, return of `MessageEncrypter::encrypt`. [`rustls_read`]: return
//! of the former. [`rustls_write`]: entry of the latter. The socket door calls [`carried`], [`prepare`] and [`waits`].
//!
//! # The socket
//! An object has the keys of one direction of one connection. Where it is (process and address) and the number of its
//! record say which connection that is, once it was found: numbers begin with 0 and have no gaps, so that another object
//! at the same address begins anew. It is found by ciphertext, 16 bytes that are a record's tag or as good as random:
//! - To decrypt: its tag is what the thread's last receive of TLS ended with, wherever the record is now; or it is in the
//!   memory that this receive filled, whose last 16 bytes are still there, or were when the first record in there was
//!   decrypted: what is behind a record is moved to its place when it is done.
//! - Encrypted: the thread's next send has the record, at the same place or as its end, with the same tag.
//!
//! So the first records of a key wait for their send ([`Pending`]): where their plaintext is, is kept, and it is read when
//! they are sent. It must be there still: nothing else of rustls went on in this thread meanwhile, no send failed, and
//! the first and last bytes are what they were. Else they are missed, which the parser is told.

use agent_ebpf::{Count, Op, Tier};
use aya_ebpf::{
    btf_maps::Array,
    helpers::{
        bpf_get_current_pid_tgid,
        generated::{self, bpf_probe_read_user},
    },
    macros::{btf_map, uprobe},
    programs::ProbeContext,
};

use crate::{
    emit,
    http1::{self, mode},
    http2,
    kernel::{self, Buffer},
    maps::{FRESH, HTTP2, OPENED, UNSURE, WORK, Work, setting},
    registers::{keep_stack, register, stack},
    storage::TaskStorage,
    tls::{self, Keys, PLAIN, Plain, SESSIONS, Session, Transfer},
};

/// Slices of plaintext that wait, at most. hyper writes a head and the buffers of a body: 2 to 17.
const SLICES: usize = 32;
/// Buffers of a send that are looked at for a record: rustls sends what waits, 64 records at most, and what is looked for
/// has a few in front of it.
const BUFFERS: usize = 16;
/// Bytes of a record's header, and of the end that it is told by.
const HEADER: u64 = 5;
const TAG: u64 = 16;
/// Bytes of a ChangeCipherSpec, which clients of TLS 1.3 may send in front of their last message.
const CHANGE_CIPHER_SPEC: u64 = 6;
/// Most bytes of plaintext in a record (RFC 8446 section 5.1).
const MOST: u64 = 1 << 14;
/// Most bytes that protection adds: a nonce, a type, padding and a tag.
const OVERHEAD: u64 = 64;
/// Most bytes of a nonce in front of what is encrypted.
const NONCE: u64 = 8;
/// Values of `ContentType` in the order of their declaration, and the first one's on the wire.
const ALERT: u8 = 1;
const DATA: u8 = 3;
const ON_WIRE: u64 = 20;
/// Tells objects of rustls from sessions of other libraries, in [`Session::tgid`].
const OBJECT: u64 = 1 << 32;

/// What a thread that uses rustls is at.
#[repr(C)]
pub struct Thread {
    received: Received,
    decrypt: Decrypt,
    pending: Pending,
    transfer: Transfer,
    words: [u64; 6],
    buffers: [[u64; 2]; BUFFERS],
}

/// Its last receive of TLS.
#[repr(C)]
struct Received {
    /// The socket's plaintext.
    id: u64,
    /// Where the bytes are; receives that went on where the one before ended count as one.
    start: u64,
    end: u64,
    /// The last bytes.
    tail: [u64; 2],
    /// Not 0 once a record in there was found to be of this socket.
    is_sure: u64,
}

/// A call of `decrypt` that is under way.
#[repr(C)]
struct Decrypt {
    /// Stack pointer at the entry, 0 when there is none.
    stack: u64,
    result: u64,
    payload: u64,
    length: u64,
    /// Type of the record, from its header.
    kind: u64,
}

/// Records of one key that were encrypted one after the other, and whose connection is not known yet.
#[repr(C)]
struct Pending {
    /// 0 when there are none.
    object: u64,
    first: u64,
    next: u64,
    /// The call of `encrypt` that is under way: stack pointer at the entry (0: none), result, bytes of plaintext.
    stack: u64,
    result: u64,
    length: u64,
    /// The last record, 0 while it is not known.
    record: u64,
    record_len: u64,
    tag: [u64; 2],
    /// Application data in all of them.
    bytes: u64,
    /// Not 0 when that can not be read any more.
    is_gone: u64,
    /// Where the array of slices was, of which the last record took the bytes up to `at`; 0 for one slice.
    array: u64,
    at: u64,
    /// Bytes to pass over at the beginning.
    skip: u64,
    count: u64,
    /// The first and the last bytes.
    ends: [[u64; 2]; 2],
    slices: [[u64; 2]; SLICES],
}

/// By thread.
#[btf_map]
pub static RUSTLS_THREADS: TaskStorage<Thread> = TaskStorage::new();

/// [0]: not 0 once a program with rustls was probed.
#[btf_map]
pub static RUSTLS: Array<u32, 1, 0> = Array::new();

/// Is there anything to do at sockets?
#[inline(always)]
pub fn is_used() -> bool {
    RUSTLS.get(0).is_some_and(|used| *used != 0)
}

#[inline(always)]
fn thread<'a>(create: bool) -> Option<&'a mut Thread> {
    // SAFETY: storage of the current thread.
    RUSTLS_THREADS.get(create).map(|thread| unsafe { &mut *thread })
}

/// Copies `n` bytes from the application.
// SAFETY: callers pass a target with room for them.
#[inline(always)]
unsafe fn read<T>(to: *mut T, n: u64, from: u64) -> bool {
    // SAFETY: by the caller; the helper checks the address.
    unsafe { bpf_probe_read_user(to.cast(), n as u32, from as *const _) == 0 }
}

/// Are the 16 bytes at `from` these?
#[inline(always)]
fn is_same(from: u64, tail: [u64; 2]) -> bool {
    let mut there = [0u64; 2];
    // SAFETY: the target has 16 bytes.
    (unsafe { read(&raw mut there, TAG, from) }) && there == tail
}

/// Result (a hidden first argument; x8 on arm64), object, message and number of the record.
#[inline(always)]
fn arguments(ctx: &ProbeContext) -> [u64; 4] {
    [register::<14, 8>(ctx), register::<13, 0>(ctx), register::<12, 1>(ctx), register::<11, 2>(ctx)]
}

/// Is this the return of the call that began with this stack pointer?
#[inline(always)]
fn is_return(ctx: &ProbeContext, begun: u64) -> bool {
    // The return address was taken from the stack, on x86_64.
    begun != 0 && stack(ctx) == begun + if setting!(arch) == 0 { 8 } else { 0 }
}

/// A socket with the plaintext `id` carried bytes, `how`: sent (2), readable (1). True when the records that wait in this
/// thread are its, and have plaintext.
#[inline(never)]
pub fn carried(id: u64, bytes: u64, how: u64) -> bool {
    if how & 2 == 0 {
        receive(id, bytes, how & 1 != 0);
        return false;
    }
    let Some(thread) = thread(false) else { return false };
    let pending = &mut thread.pending;
    if pending.object == 0 || pending.record == 0 {
        return false;
    }
    let (vector, count) = match kernel::buffer() {
        Buffer::Flat(pointer) => {
            // It may have been copied to where it is sent from.
            let from = if pointer == pending.record { pending.record_len } else { bytes };
            return from >= TAG && is_same(pointer + from - TAG, pending.tag) && found(id, pending);
        }
        Buffer::Vector(vector, count) => (vector, count),
        Buffer::Message(message) => {
            // struct msghdr: iov is at 16, its length at 24.
            // SAFETY: the target has 16 bytes.
            if !unsafe { read(&raw mut thread.words, 16, message + 16) } {
                return false;
            }
            (thread.words[0], thread.words[1])
        }
        _ => return false,
    };
    let count = if count > BUFFERS as u64 { BUFFERS as u64 } else { count };
    // SAFETY: the target has room for BUFFERS pairs.
    if !unsafe { read(&raw mut thread.buffers, count * 16, vector) } {
        return false;
    }
    let mut i = 0;
    while i < BUFFERS {
        let [pointer, length] = thread.buffers[i];
        if (i as u64) < count && pointer == pending.record && length == pending.record_len {
            return is_same(pointer + length - TAG, pending.tag) && found(id, pending);
        }
        i += 1;
    }
    false
}

/// Notes what a receive got.
#[inline(always)]
fn receive(id: u64, bytes: u64, readable: bool) {
    let Some(thread) = thread(true) else { return };
    let received = &mut thread.received;
    let (pointer, length) = if readable { tls::first_buffer(bytes) } else { (0, 0) };
    if received.id != id || received.end != pointer {
        received.start = pointer;
    }
    received.id = id;
    received.is_sure = 0;
    received.end = pointer + length;
    // SAFETY: the target has 16 bytes.
    if length == 0 || !unsafe { read(&raw mut received.tail, TAG, received.end - TAG) } {
        received.id = 0;
    }
}

/// The records that wait belong to the plaintext `id`. True when there is something to read of them.
#[inline(always)]
fn found(id: u64, pending: &mut Pending) -> bool {
    let object = pending.object;
    pending.object = 0;
    bind(id, object, pending.first, pending.next, 1);
    if pending.bytes == 0 {
        return false;
    }
    let is_there = pending.is_gone == 0 && {
        let mut ends = [[0u64; 2]; 2];
        read_ends(pending, &mut ends);
        ends == pending.ends
    };
    if !is_there {
        miss(id);
    }
    is_there
}

/// Records that were sent will not be read.
#[inline(always)]
fn miss(id: u64) {
    emit::count(Count::TLS_MISSED);
    if let Some(plain) = PLAIN.get_ptr_mut(&id) {
        // SAFETY: map memory of this connection.
        unsafe { (*plain).missed[1] = 1 };
    }
}

/// Prepares to read the plaintext that waited and was found to be `id`'s, for the door that sends. True when that is
/// wanted.
#[inline(always)]
pub fn prepare(id: u64, now: u64) -> bool {
    let (Some(thread), Some(plain), Some(work)) = (thread(false), PLAIN.get_ptr_mut(&id), WORK.get_ptr_mut(1)) else {
        return false;
    };
    // SAFETY: map memory of this connection; this CPU's slot for this door.
    let (plain, work) = unsafe { (&mut *plain, &mut *work) };
    let pid = bpf_get_current_pid_tgid() >> 32;
    if !tls::admit(plain, pid) {
        return false;
    }
    tls::fill(work, id, thread.pending.bytes, 1);
    work.pid = pid;
    work.now = now;
    work.began = now;
    work.length = 0;
    work.vector = (&raw const thread.pending.slices) as u64;
    work.vectors = thread.pending.count;
    work.copied = 1;
    work.skip = thread.pending.skip;
    mend(plain, work, 1);
    plain.connection.directions[1].last_ts = now;
    true
}

/// Takes into account that something was missed before what comes.
#[inline(always)]
pub fn mend(plain: &mut Plain, work: &mut Work, direction: usize) {
    if plain.missed[direction & 1] == 0 {
        return;
    }
    plain.missed[direction & 1] = 0;
    let connection = &mut plain.connection;
    let mode = connection.directions[direction & 1].mode;
    if connection.state & HTTP2 != 0 {
        if mode >= mode::PREFACE && mode != mode::SEEK {
            connection.directions[direction & 1].mode = mode::SEEK;
            http2::lose(connection, direction & 1);
        }
        return;
    }
    connection.state |= UNSURE;
    if mode == mode::START {
        if connection.state & OPENED == 0 {
            connection.state &= !FRESH;
        }
    } else if mode != mode::TUNNEL {
        let left = work.left;
        work.left = 0;
        http1::lose(work, connection);
        work.left = left;
    }
}

/// A send failed: what waits for one is sent later, and its plaintext may be gone by then.
#[inline(always)]
pub fn waits() {
    if let Some(thread) = thread(false) {
        thread.pending.is_gone = thread.pending.bytes;
    }
}

/// The plaintext that the keys of an object belong to, for its record `number`, which is counted; 0 when that is not
/// known.
#[inline(always)]
fn known(object: u64, number: u64, direction: usize) -> u64 {
    if number == 0 {
        return 0;
    }
    let session = Session { tgid: bpf_get_current_pid_tgid() >> 32 | OBJECT, address: object };
    // SAFETY: map memory.
    let Some(id) = SESSIONS.get_ptr(&session).map(|id| unsafe { *id }) else { return 0 };
    let Some(plain) = PLAIN.get_ptr_mut(&id) else { return 0 };
    // SAFETY: map memory of this connection.
    let keys = unsafe { &mut (*plain).keys[direction & 1] };
    if keys.object != object || keys.next != number {
        return 0;
    }
    keys.next = number + 1;
    id
}

/// The keys of an object belong to the plaintext `id`: its records `first` to `next` were found on that socket.
#[inline(never)]
fn bind(id: u64, object: u64, first: u64, next: u64, direction: u64) {
    let Some(plain) = PLAIN.get_ptr_mut(&id) else { return };
    // SAFETY: map memory of this connection.
    let plain = unsafe { &mut *plain };
    let session = Session { tgid: bpf_get_current_pid_tgid() >> 32 | OBJECT, address: object };
    let _ = SESSIONS.insert(&session, id, 0);
    plain.tier = Tier::CIPHERTEXT;
    let direction = direction as usize & 1;
    let keys = plain.keys[direction];
    let goes_on = keys.object == object && keys.next == first;
    // Of a connection that is older than the agent nothing is known.
    if first != 0 && !goes_on && (keys.object != 0 || plain.connection.state & FRESH != 0) {
        emit::count(Count::TLS_MISSED);
        plain.missed[direction] = 1;
    }
    plain.keys[direction] = Keys { object, next };
}

/// Entry of `decrypt`, and return of `encrypt`.
#[uprobe]
pub fn rustls_enter(ctx: ProbeContext) -> u32 {
    keep_stack(&ctx);
    // SAFETY: the program's own context.
    let op = unsafe { generated::bpf_get_attach_cookie(ctx.regs.cast()) };
    if op == Op::RUSTLS {
        begin(&ctx)
    } else {
        encrypted(&ctx)
    }
    0
}

/// `fn decrypt<'a>(&mut self, msg: InboundOpaqueMessage<'a>, seq: u64) -> Result<InboundPlainMessage<'a>, Error>` begins.
#[inline(always)]
fn begin(ctx: &ProbeContext) {
    let [result, object, message, number] = arguments(ctx);
    let Some(thread) = thread(true) else {
        emit::count(Count::TLS_BUSY);
        return;
    };
    emit::count(Count::TLS_CALLS);
    thread.decrypt.stack = 0;
    // The thread went on to something else.
    thread.pending.is_gone |= thread.pending.bytes;
    // SAFETY: the target has 16 bytes.
    if !unsafe { read(&raw mut thread.words, 16, message) } {
        emit::count(Count::UNREADABLE);
        return;
    }
    let (payload, length) = (thread.words[0], thread.words[1]);
    // SAFETY: the target has 8 bytes.
    if !unsafe { read(&raw mut thread.words[2], HEADER, payload.wrapping_sub(HEADER)) } {
        return;
    }
    let header = thread.words[2];
    // Type, version, length in the order of the network.
    if header >> 8 & 0xff != 3 || (header >> 16 & 0xff00 | header >> 32 & 0xff) != length || length < TAG {
        return;
    }
    let mut id = known(object, number, 0);
    let received = &mut thread.received;
    if id == 0 && carries(received, payload + length) {
        id = received.id;
        bind(id, object, number, number + 1, 0);
    }
    if id == 0 {
        return;
    }
    if id == received.id && is_within(received, payload + length) {
        // Records that follow in there move to where this one begins.
        received.is_sure = 1;
        if received.start > payload - HEADER {
            received.start = payload - HEADER;
        }
    }
    thread.transfer.plain = id;
    thread.decrypt = Decrypt { stack: stack(ctx), result, payload, length, kind: header & 0xff };
}

/// Is the record that ends at `end` of what was received?
#[inline(always)]
fn carries(received: &Received, end: u64) -> bool {
    if received.id == 0 {
        return false;
    }
    // It ends with it.
    if is_same(end - TAG, received.tail) {
        return true;
    }
    // All is where it was received, or moved to where a ChangeCipherSpec was.
    is_within(received, end)
        && (received.is_sure != 0
            || is_same(received.end - TAG, received.tail)
            || is_same(received.end - TAG - CHANGE_CIPHER_SPEC, received.tail))
}

/// Is the end of a record in the memory that was received to?
#[inline(always)]
fn is_within(received: &Received, end: u64) -> bool {
    received.start < end && end <= received.end
}

/// Return of `decrypt`.
#[uprobe]
pub fn rustls_read(ctx: ProbeContext) -> u32 {
    keep_stack(&ctx);
    let Some(thread) = thread(false) else { return 0 };
    if !is_return(&ctx, thread.decrypt.stack) {
        return 0;
    }
    thread.decrypt.stack = 0;
    let Decrypt { result, payload, length, kind, .. } = thread.decrypt;
    // SAFETY: the target has 32 bytes.
    if !unsafe { read(&raw mut thread.words, 32, result) } {
        emit::count(Count::UNREADABLE);
        return 0;
    }
    let [_, pointer, bytes, rest, ..] = thread.words;
    let before = pointer.wrapping_sub(payload);
    let behind = length.wrapping_sub(before).wrapping_sub(bytes);
    // An error, or what was not looked for.
    if bytes > MOST || before > NONCE || behind < TAG || behind > length {
        return 0;
    }
    let declared = rest as u8;
    if declared == DATA && kind == ON_WIRE + u64::from(DATA) && bytes != 0 {
        thread.transfer.buffer = pointer;
        thread.transfer.layout = 0;
        tls::deliver(&mut thread.transfer, Op::RUSTLS, bytes, 0);
    } else if declared == ALERT && bytes == 2 {
        thread.words[0] = 0;
        // Level and description, which is 0 for close_notify.
        // SAFETY: the target has 8 bytes.
        if unsafe { read(&raw mut thread.words, 2, pointer) } && thread.words[0] >> 8 == 0 {
            tls::end(thread.transfer.plain, Op::RUSTLS, bpf_get_current_pid_tgid() >> 32);
        }
    }
    0
}

/// Entry of `fn encrypt(&mut self, msg: OutboundPlainMessage<'_>, seq: u64) -> Result<OutboundOpaqueMessage, Error>`.
#[uprobe]
pub fn rustls_write(ctx: ProbeContext) -> u32 {
    keep_stack(&ctx);
    let [result, object, message, number] = arguments(&ctx);
    let Some(thread) = thread(true) else {
        emit::count(Count::TLS_BUSY);
        return 0;
    };
    emit::count(Count::TLS_CALLS);
    thread.pending.stack = 0;
    // SAFETY: the target has 40 bytes.
    if !unsafe { read(&raw mut thread.words, 40, message) } {
        emit::count(Count::UNREADABLE);
        return 0;
    }
    // 0, pointer, length; or array, number of slices, start and end.
    let words = &mut thread.words;
    let kind = words[4] as u8;
    if words[0] == 0 {
        words[3] = words[2];
        words[2] = 0;
        words[1] = 1;
        words[5] = message + 8;
    } else {
        words[5] = words[0];
    }
    let bytes = words[3].wrapping_sub(words[2]);
    if bytes > MOST {
        return 0;
    }
    let id = known(object, number, 1);
    if id == 0 {
        wait(thread, result, object, number, u64::from(kind == DATA) << 32 | bytes);
        thread.pending.stack = stack(&ctx);
    } else if kind == DATA && bytes != 0 {
        thread.transfer.plain = id;
        thread.transfer.buffer = thread.words[5];
        thread.transfer.size = thread.words[1];
        thread.transfer.layout = thread.words[2];
        tls::deliver(&mut thread.transfer, Op::RUSTLS, bytes, 1);
    }
    0
}

/// Notes a record that waits for its send: `what` is its bytes, and bit 32 for application data.
#[inline(never)]
fn wait(thread: &mut Thread, result: u64, object: u64, number: u64, what: u64) {
    let (pending, words) = (&mut thread.pending, &thread.words);
    let bytes = what & u64::from(u32::MAX);
    if pending.object != object || pending.next != number || number == 0 {
        pending.object = object;
        pending.first = number;
        pending.bytes = 0;
        pending.is_gone = 0;
        pending.count = 0;
        pending.skip = 0;
        pending.array = 0;
    }
    pending.next = number + 1;
    pending.result = result;
    pending.length = bytes;
    pending.record = 0;
    if what >> 32 == 0 || bytes == 0 {
        return;
    }
    let begins = pending.bytes == 0;
    pending.bytes += bytes;
    let goes_on = !begins && pending.array == words[0] && words[0] != 0 && pending.at == words[2];
    pending.at = words[3];
    if goes_on {
        return;
    }
    // Behind an array comes nothing but the rest of it.
    if pending.array != 0 || (words[0] != 0 && !begins) || words[1] > SLICES as u64 || pending.count >= SLICES as u64 {
        pending.is_gone = 1;
        return;
    }
    let is_read = if begins {
        pending.array = words[0];
        pending.skip = words[2];
        pending.count = words[1];
        // SAFETY: the target has room for SLICES pairs.
        unsafe { read(&raw mut pending.slices, words[1] * 16, words[5]) }
    } else {
        let at = pending.count as usize & (SLICES - 1);
        pending.count += 1;
        // SAFETY: the target has room for a pair.
        unsafe { read(&raw mut pending.slices[at], 16, words[5]) }
    };
    if !is_read {
        pending.is_gone = 1;
        return;
    }
    let mut ends = [[0u64; 2]; 2];
    read_ends(pending, &mut ends);
    pending.ends = ends;
}

/// The first bytes of the first and the last slice.
#[inline(never)]
fn read_ends(pending: &Pending, ends: &mut [[u64; 2]; 2]) {
    let last = (pending.count as usize).wrapping_sub(1) & (SLICES - 1);
    let mut i = 0;
    while i < 2 {
        let [pointer, length] = pending.slices[if i == 0 { 0 } else { last }];
        let n = if length < TAG { length } else { TAG };
        // The end of the last.
        let from = if i == 0 { pointer } else { pointer + length - n };
        // SAFETY: the target has 16 bytes.
        unsafe { read(&raw mut ends[i], n, from) };
        i += 1;
    }
}

/// Return of `encrypt`, of a record that waits.
#[inline(always)]
fn encrypted(ctx: &ProbeContext) {
    let Some(thread) = thread(false) else { return };
    let pending = &mut thread.pending;
    if !is_return(ctx, pending.stack) {
        return;
    }
    pending.stack = 0;
    // The bytes of the record, with room for its header in front.
    // SAFETY: the target has 16 bytes.
    let is_read = unsafe { read(&raw mut thread.words, 16, pending.result + 16) };
    let (record, length) = (thread.words[0], thread.words[1]);
    let overhead = length.wrapping_sub(pending.length).wrapping_sub(HEADER);
    // SAFETY: as above.
    let is_record = is_read
        && (TAG..=OVERHEAD).contains(&overhead)
        && unsafe { read(&raw mut pending.tag, TAG, record + length - TAG) };
    if is_record {
        pending.record = record;
        pending.record_len = length;
    } else {
        pending.object = 0;
    }
}
