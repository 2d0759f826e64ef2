//! HTTP/1 framing (RFC 9112) in the kernel: where does a head begin and end, how long is the body?
//! Only heads are copied; bodies are counted. The parser is a machine of small steps, run by
//! `bpf_loop`; all its state is map memory, so that the verifier looks at each step once.
//!
//! A line that is split over system calls is carried over by its first 48 and last 16 bytes: enough
//! for the field names and values that frame a message, whatever lies between.

use core::ptr::{read_volatile, write_volatile};

use agent_ebpf::{CARRY, Count, DATA_LIMIT, Flag, HEAD_LIMIT, Kind, PIPELINE, STEPS, WINDOW};
use aya_ebpf::helpers::generated::{bpf_loop, bpf_probe_read_kernel, bpf_probe_read_user};

use crate::{
    body, conn, emit,
    head::{found, http1_head},
    http2,
    maps::{Connection, FRESH, HTTP2, OPENED, QUIET, SYNCED, UNSURE, Work},
    once::once,
    whole,
};

/// What the next byte of a direction is.
pub mod mode {
    /// The first of a message.
    pub const START: u8 = 0;
    /// Part of a head.
    pub const HEAD: u8 = 1;
    /// One of `remaining` body bytes.
    pub const BODY: u8 = 2;
    /// Part of a chunk size.
    pub const CHUNK_SIZE: u8 = 3;
    /// Behind a chunk size, up to the line's end.
    pub const CHUNK_EXTENSION: u8 = 4;
    /// One of `remaining` bytes of a chunk and its line end.
    pub const CHUNK_DATA: u8 = 5;
    /// The first of a trailer line.
    pub const TRAILER: u8 = 6;
    /// Inside a trailer line.
    pub const TRAILER_LINE: u8 = 7;
    /// Body up to the end of the connection.
    pub const UNTIL_CLOSE: u8 = 8;
    /// No HTTP any more.
    pub const TUNNEL: u8 = 9;
    /// This one and all that follow: HTTP/2. One of `remaining` bytes of the client's preface.
    pub const PREFACE: u8 = 16;
    /// Part of the head of a frame, of which `carry_len` bytes came before.
    pub const FRAME_HEAD: u8 = 17;
    /// One of `remaining` bytes of a payload that is passed on.
    pub const FRAME: u8 = 18;
    /// One of `remaining` bytes of a payload that is not.
    pub const SKIP: u8 = 19;
    /// The length of a DATA frame's padding.
    pub const PADDING: u8 = 20;
    /// One of `remaining` bytes of content (`length`) and padding.
    pub const DATA: u8 = 21;
    /// Unknown: to be found where a system call begins.
    pub const SEEK: u8 = 22;
}

/// What the bytes are when they are no HTTP/1: [`Work::other`]. Looked at once, after the machine.
pub mod other {
    /// They are.
    pub const NONE: u64 = 0;
    /// The preface of an HTTP/2 client, of which `Work::limit` bytes are still to come.
    pub const PREFACE: u64 = 1;
    /// Anything.
    pub const ANYTHING: u64 = 2;
}

/// Bits of `Direction::bits`.
pub const HAS_LENGTH: u8 = 1;
pub const IS_CHUNKED: u8 = 1 << 1;
pub const IS_RESPONSE: u8 = 1 << 2;
/// Not a head after all.
pub const REJECTED: u8 = 1 << 3;
/// The end of the message was announced with its head.
const ENDED: u8 = 1 << 4;
/// The head (or its request) found the ring full: nothing more of the message is passed on.
pub const DROPPED: u8 = 1 << 5;
/// Head bytes were passed on.
pub const PASSED: u8 = 1 << 6;
/// The connection goes on in HTTP/2: the preface of its client, or `Upgrade: h2c`.
pub const TO_HTTP2: u8 = 1 << 7;

/// Method classes, as far as they change the framing of the response.
pub const METHOD_HEAD: u8 = 1;
pub const METHOD_CONNECT: u8 = 2;
/// The request's head was lost.
const METHOD_DROPPED: u8 = 0x80;

/// Runs in a row without HTTP after which a connection is left alone: seen from its first byte, or not.
const STRIKES_FRESH: u16 = 8;
const STRIKES_LATE: u16 = 4096;

pub const HTTP_1_0: u64 = u64::from_le_bytes(*b"HTTP/1.0");
pub const HTTP_1_1: u64 = u64::from_le_bytes(*b"HTTP/1.1");
pub const HTTP_1_ANY: u64 = u64::from_le_bytes(*b"HTTP/1.\0");
/// How the preface of an HTTP/2 client begins, and how long its first line is (RFC 9113 section 3.4).
pub const PREFACE: u64 = u64::from_le_bytes(*b"PRI * HT");
pub const PREFACE_LINE: u64 = 16;
pub const SEVEN: u64 = 0x00ff_ffff_ffff_ffff;
/// A word of line feeds.
pub const FEEDS: u64 = 0x0a0a_0a0a_0a0a_0a0a;
pub const LOWER: u64 = 0x2020_2020_2020_2020;
pub const LINE_FEED: u8 = b'\n';
/// Bounds an offset into `Work::data` for the verifier: DATA_LIMIT + WINDOW is below 8192.
pub const MASK: u64 = 0x1fff;
const LAST_OFFSET: u64 = (DATA_LIMIT + WINDOW) as u64;

/// Eight bytes at any offset of the data; 0 behind its end.
#[inline(always)]
pub fn word(work: &Work, at: u64) -> u64 {
    let at = at & MASK;
    if at > LAST_OFFSET {
        return 0;
    }
    // SAFETY: at + 8 <= size of `data`. The kernel's targets load unaligned words.
    unsafe { read_volatile((&raw const work.data).cast::<u8>().add(at as usize).cast::<u64>()) }
}

#[inline(always)]
pub fn byte(work: &Work, at: u64) -> u8 {
    let at = at & MASK;
    if at > LAST_OFFSET {
        return 0;
    }
    // SAFETY: as above.
    unsafe { read_volatile((&raw const work.data).cast::<u8>().add(at as usize)) }
}

/// Index of the byte of the lowest bit of a mask of top bits. BPF has no count of trailing zeros, and
/// branches would multiply what the verifier has to look at.
#[inline(always)]
pub fn lowest_byte(mask: u64) -> u64 {
    const ONES: u64 = 0x0101_0101_0101_0101;
    let below = (mask & mask.wrapping_neg()).wrapping_sub(1);
    ((below & ONES).wrapping_mul(ONES) >> 56).wrapping_sub(1)
}

/// What `bpf_loop` hands to each [`step`].
#[repr(C)]
pub struct Context {
    pub connection: *mut Connection,
    /// Memory of this run: which of a CPU's it is, is for the door to know.
    pub work: *mut Work,
}

/// Takes apart what one system call moved: `work` says where the bytes are and how many. Whatever door
/// they came through, and whatever kind of map `connection` lives in.
#[inline(always)]
pub fn feed(work: &mut Work, connection: &mut Connection, direction: u64) {
    if connection.state & HTTP2 == 0 {
        http1_feed(work, connection, direction);
    }
    if connection.state & (HTTP2 | QUIET) == HTTP2 && work.left != 0 {
        http2::feed(work, connection);
    }
}

/// See [`feed`] and [`crate::once`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn http1_feed(work: *mut Work, connection: *mut Connection, direction: u64) -> u32 {
    // SAFETY: `feed` passes what it has for itself.
    if let Some((work, connection)) = unsafe { once(work, connection) } {
        take_apart(work, connection, direction);
    }
    0
}

#[inline(always)]
fn take_apart(work: &mut Work, connection: &mut Connection, direction: u64) {
    set(&raw mut work.other, other::NONE);
    if whole::feed(work, connection, direction) {
        return;
    }
    let mut context = Context { connection, work };
    // SAFETY: the callback gets the address of a local that outlives the call.
    let steps = unsafe { bpf_loop(STEPS, step as *mut _, (&raw mut context).cast(), 0) };
    // SAFETY: the callback has ended, and with it the other use of both.
    let (connection, work) = unsafe { (&mut *context.connection, &mut *context.work) };
    if steps >= i64::from(STEPS) {
        emit::count(Count::STEPS);
        lose(work, connection);
    }
    flush(work, connection);
    if connection.state & HTTP2 == 0 {
        match get(&raw const work.other) {
            other::NONE => {}
            other::PREFACE => http2::preface(work, connection),
            _ => {
                if !http2::join(work, connection) {
                    strike(work, connection);
                }
            }
        }
    }
}

/// One step over the bytes of a system call. Returns 1 when there is nothing left to do.
// SAFETY: called by `bpf_loop` alone, with the context that `transfer` gave it.
pub unsafe extern "C" fn step(_step: u32, context: *mut Context) -> i64 {
    // SAFETY: `feed` passes the address of its local.
    let (connection, work) = unsafe { (&mut *(*context).connection, &mut *(*context).work) };
    i64::from(!one(work, connection))
}

/// As [`step`]; true to go on.
#[inline(always)]
fn one(work: &mut Work, connection: &mut Connection) -> bool {
    if work.left == 0 || connection.state & HTTP2 != 0 {
        return false;
    }
    if work.skip != 0 && work.readable != 0 {
        return pass_over(work);
    }
    let d = &mut connection.directions[usize::from(work.direction != 0)];
    match d.mode {
        mode::PREFACE.. => return false,
        mode::TUNNEL => {
            d.message += work.left;
            return false;
        }
        mode::UNTIL_CLOSE => {
            d.message += work.left;
            d.body += work.left;
            return false;
        }
        mode::BODY | mode::CHUNK_DATA => {
            let n = if d.remaining < work.left { d.remaining } else { work.left };
            d.remaining -= n;
            d.message += n;
            work.left -= n;
            if d.mode == mode::BODY {
                d.body += n;
            }
            if d.remaining == 0 {
                if d.mode == mode::BODY {
                    finish_message(work, connection);
                } else {
                    d.mode = mode::CHUNK_SIZE;
                }
            }
            return advance(work, n);
        }
        _ => {}
    }
    if work.readable == 0 {
        if d.mode != mode::START {
            lose(work, connection);
        }
        return false;
    }
    if work.length == 0 {
        return next_buffer(work);
    }
    match d.mode {
        mode::START | mode::HEAD => match http1_head(work, connection) {
            found::MORE => {}
            found::FULL => flush(work, connection),
            found::END => {
                work.filled = get(&raw const work.end);
                finish_head(work, connection);
                if connection.state & QUIET != 0 {
                    return false;
                }
            }
            _ => return false,
        },
        _ => return body::chunk(work, connection),
    }
    true
}

/// Moves on by `n` bytes; what lies in later buffers is skipped by the next steps.
#[inline(always)]
pub fn advance(work: &mut Work, n: u64) -> bool {
    if n <= work.length {
        work.pointer += n;
        work.length -= n;
    } else {
        work.skip = n - work.length;
        work.length = 0;
    }
    true
}

/// Moves on in or to the current buffer by bytes that were counted before.
#[inline(always)]
pub fn pass_over(work: &mut Work) -> bool {
    if work.length == 0 {
        return next_buffer(work);
    }
    let n = if work.skip < work.length { work.skip } else { work.length };
    work.skip -= n;
    work.pointer += n;
    work.length -= n;
    true
}

/// Takes the next `struct iovec`.
#[inline(always)]
pub fn next_buffer(work: &mut Work) -> bool {
    if work.vectors == 0 {
        return false;
    }
    // `pointer` and `length` are a `struct iovec`.
    let (to, from) = ((&raw mut work.pointer).cast(), work.vector as *const _);
    // SAFETY: 16 bytes of this CPU's slot; the helpers check the address, which is the programs' own where it is one of
    // the kernel.
    let failed = unsafe {
        if work.copied != 0 { bpf_probe_read_kernel(to, 16, from) } else { bpf_probe_read_user(to, 16, from) }
    };
    if failed != 0 {
        emit::count(Count::UNREADABLE);
        work.length = 0;
        work.readable = 0;
        return true;
    }
    if work.tls != 0 {
        // Of a library: see `Op::WRITEV_ANY`.
        work.length &= u64::from(u32::MAX);
    }
    work.vector += 16;
    work.vectors -= 1;
    true
}

/// Does the data begin with a token and a space, as far as it goes (RFC 9110 section 5.6.2)?
#[inline(always)]
pub fn is_token(work: &Work, n: u64) -> bool {
    // tchar as two 64-bit sets.
    const LOW: u64 = 0x03ff_6cfa_0000_0000;
    const HIGH: u64 = 0x57ff_ffff_c7ff_fffe;
    let mut i = 0;
    while i < 24 {
        if i >= n {
            return i > 0;
        }
        let b = byte(work, i);
        if b == b' ' {
            return i > 0;
        }
        let set = if b < 64 { LOW } else { HIGH };
        if b >= 128 || (set >> (b & 63)) & 1 == 0 {
            return false;
        }
        i += 1;
    }
    false
}

/// Bytes that are no HTTP: `limit` of them are in `data`.
#[inline(always)]
fn strike(work: &mut Work, connection: &mut Connection) {
    if connection.state & (OPENED | QUIET) != 0 {
        return;
    }
    // A TLS record: handshake, version 3.x.
    let tls = get(&raw const work.limit) >= 2 && word(work, 0) & 0xffff == 0x0316;
    if tls && connection.state & FRESH != 0 {
        emit::count(Count::TLS);
        connection.state |= QUIET;
        return;
    }
    connection.strikes += 1;
    let limit = if connection.state & FRESH != 0 { STRIKES_FRESH } else { STRIKES_LATE };
    if connection.strikes >= limit {
        emit::count(Count::NOT_HTTP);
        connection.state |= QUIET;
    }
}

/// Reads a field that the verifier (and so the compiler) must not know the value of.
#[inline(always)]
pub fn get<T: Copy>(field: *const T) -> T {
    // SAFETY: callers pass addresses of fields they have a reference to.
    unsafe { read_volatile(field) }
}

/// Writes one.
#[inline(always)]
pub fn set<T: Copy>(field: *mut T, value: T) {
    // SAFETY: as in `get`.
    unsafe { write_volatile(field, value) }
}

/// The head is whole: what follows it?
#[inline(always)]
pub fn finish_head(work: &mut Work, connection: &mut Connection) {
    http1_finish_head(work, connection);
}

/// See [`finish_head`] and [`crate::once`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn http1_finish_head(work: *mut Work, connection: *mut Connection) -> u32 {
    // SAFETY: `finish_head` passes what it has for itself.
    if let Some((work, connection)) = unsafe { once(work, connection) } {
        follow(work, connection);
    }
    0
}

#[inline(always)]
fn follow(work: &mut Work, connection: &mut Connection) {
    let direction = usize::from(work.direction != 0);
    let response = connection.directions[direction].bits & IS_RESPONSE != 0;
    connection.strikes = 0;
    if connection.state & OPENED == 0 && !conn::set_role(connection, work.direction, response) {
        connection.state |= QUIET;
        return;
    }
    if connection.state & UNSURE != 0 {
        if response {
            conn::skip_answers(connection, direction);
        } else {
            conn::realign(connection, direction);
        }
    }
    let requests = connection.requests;
    let d = &mut connection.directions[direction];
    let index = d.index;
    let mut flags = 0;
    let mut next = mode::START;
    let mut method = 0;
    if response {
        if index < requests {
            method = connection.methods[index as usize & (PIPELINE - 1)];
            connection.state |= SYNCED;
        } else if connection.state & (FRESH | SYNCED) == 0 {
            emit::count(Count::JOINED_LATE);
            d.mode = mode::START;
            if d.bits & PASSED != 0 {
                emit::bare(work, connection, Kind::ABORT, 0);
            }
            work.filled = 0;
            work.left = 0;
            return;
        }
        flags |= Flag::RESPONSE;
        if method & METHOD_DROPPED != 0 {
            d.bits |= DROPPED;
        }
        let status = d.status;
        let class = method & 0x7f;
        if status == 101 || (class == METHOD_CONNECT && status >= 200 && status < 300) {
            flags |= Flag::UPGRADE;
            next = mode::TUNNEL;
        } else if status < 200 || status == 204 || status == 304 || class == METHOD_HEAD {
        } else if d.bits & IS_CHUNKED != 0 {
            next = mode::CHUNK_SIZE;
        } else if d.bits & HAS_LENGTH != 0 {
            next = mode::BODY;
        } else {
            next = mode::UNTIL_CLOSE;
            flags |= Flag::UNTIL_CLOSE;
        }
        if status < 200 && status != 101 {
            // An interim response: the final one has the same number.
            d.index = index;
        } else {
            d.index = index + 1;
        }
    } else {
        if d.bits & IS_CHUNKED != 0 {
            next = mode::CHUNK_SIZE;
        } else if d.bits & HAS_LENGTH != 0 {
            next = mode::BODY;
        }
        method = d.method;
        d.index = index + 1;
    }
    let interim = d.index == index;
    if next == mode::CHUNK_SIZE {
        flags |= Flag::CHUNKED;
        d.remaining = 0;
    }
    let mut message = d.message;
    let mut body = d.length;
    if next == mode::BODY {
        d.remaining = d.length;
        if d.length <= work.left {
            // The whole body came with it.
            flags |= Flag::DONE;
            message += d.length;
            d.bits |= ENDED;
        }
        if d.length == 0 {
            next = mode::START;
        }
    } else if next == mode::START || next == mode::TUNNEL {
        flags |= Flag::DONE;
        body = 0;
    }
    d.mode = next;
    let dropped = pass(work, connection, flags | Flag::LAST, message, body, index);
    let d = &mut connection.directions[direction];
    if !response {
        connection.methods[index as usize & (PIPELINE - 1)] = method | if dropped { METHOD_DROPPED } else { 0 };
        connection.requests = requests + 1;
        let answered = connection.directions[1 - direction].index;
        if requests.wrapping_sub(answered) as i32 >= PIPELINE as i32 {
            emit::count(Count::PIPELINE_FULL);
        }
    } else if flags & Flag::UPGRADE != 0 && d.status == 101 && d.bits & TO_HTTP2 != 0 {
        http2::upgrade(work, connection);
    } else if flags & Flag::UPGRADE != 0 {
        d.message += work.left;
        connection.directions[0].mode = mode::TUNNEL;
        connection.directions[1].mode = mode::TUNNEL;
        work.left = 0;
    } else if interim {
        d.mode = mode::START;
    }
    work.filled = 0;
}

/// Passes on what is in `data`; true when it (or a part of the head before) was dropped.
#[inline(always)]
fn pass(work: &mut Work, connection: &mut Connection, flags: u16, message: u64, body: u64, index: u32) -> bool {
    let direction = usize::from(work.direction != 0);
    let d = &mut connection.directions[direction];
    if d.bits & DROPPED != 0 {
        return true;
    }
    let mut flags = flags;
    if d.bits & PASSED == 0 {
        flags |= Flag::FIRST;
    }
    let mut len = work.filled;
    // `carry_len` is set while `data` begins with carried bytes.
    let mut skip = d.carry_len;
    if d.head > HEAD_LIMIT {
        flags |= Flag::CUT;
        len = 0;
        skip = 0;
    }
    d.bits |= PASSED;
    // The number of the message under way, whatever comes next.
    let next = d.index;
    d.index = index;
    let passed = emit::head(work, connection, flags, len, skip, message, body);
    let d = &mut connection.directions[direction];
    d.index = next;
    d.carry_len = 0;
    if passed {
        return false;
    }
    d.bits |= DROPPED;
    emit::count(Count::RING_FULL);
    true
}

/// Passes on the part of an unfinished head that is in `data`, and carries its last line over.
#[inline(always)]
pub fn flush(work: &mut Work, connection: &mut Connection) {
    http1_flush(work, connection);
}

/// See [`flush`] and [`crate::once`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn http1_flush(work: *mut Work, connection: *mut Connection) -> u32 {
    // SAFETY: `flush` passes what it has for itself.
    if let Some((work, connection)) = unsafe { once(work, connection) } {
        carry_over(work, connection);
    }
    0
}

#[inline(always)]
fn carry_over(work: &mut Work, connection: &mut Connection) {
    let direction = usize::from(work.direction != 0);
    let d = &mut connection.directions[direction];
    if d.mode != mode::HEAD || work.filled == 0 {
        return;
    }
    let index = d.index;
    let message = d.message;
    if d.head <= HEAD_LIMIT {
        pass(work, connection, 0, message, 0, index);
    }
    let d = &mut connection.directions[direction];
    // SAFETY: a plain field of this CPU's slot.
    let line = unsafe { read_volatile(&raw const work.line) };
    let length = work.filled - line;
    let mut i = 0u64;
    if length <= CARRY as u64 {
        while i < 8 {
            d.carry[i as usize] = word(work, line + i * 8);
            i += 1;
        }
        d.carry_len = length as u8;
    } else {
        while i < 6 {
            d.carry[i as usize] = word(work, line + i * 8);
            i += 1;
        }
        d.carry[6] = word(work, work.filled - 16);
        d.carry[7] = word(work, work.filled - 8);
        d.carry_len = CARRY as u8;
    }
    work.filled = 0;
}

/// The last byte of a message was seen.
#[inline(always)]
pub fn finish_message(work: &mut Work, connection: &mut Connection) {
    let d = &mut connection.directions[usize::from(work.direction != 0)];
    d.mode = mode::START;
    if d.bits & (ENDED | DROPPED) != 0 {
        return;
    }
    let flags = if d.bits & IS_RESPONSE != 0 { Flag::RESPONSE } else { 0 } | if d.lost != 0 { Flag::LOST } else { 0 };
    emit::bare(work, connection, Kind::END, flags);
}

/// Bytes of the message under way were missed: its head or chunks cannot be followed any more.
#[inline(always)]
pub fn lose(work: &mut Work, connection: &mut Connection) {
    let d = &mut connection.directions[usize::from(work.direction != 0)];
    let in_head = d.mode == mode::HEAD;
    d.mode = mode::START;
    d.message += work.left;
    work.left = 0;
    work.filled = 0;
    if d.bits & DROPPED != 0 || d.bits & PASSED == 0 {
        return;
    }
    let flags = Flag::LOST | if d.bits & IS_RESPONSE != 0 { Flag::RESPONSE } else { 0 };
    emit::bare(work, connection, if in_head { Kind::ABORT } else { Kind::END }, flags);
}
