//! HTTP/1 framing (RFC 9112) in the kernel: where does a head begin and end, how long is the body?
//! Only heads are copied; bodies are counted. The parser is a machine of small steps, run by
//! `bpf_loop`; all its state is map memory, so that the verifier looks at each step once.
//!
//! A line that is split over system calls is carried over by its first 48 and last 16 bytes: enough
//! for the field names and values that frame a message, whatever lies between.

use core::ptr::{read_volatile, write_volatile};

use agent_ebpf::{CARRY, Count, DATA_LIMIT, Flag, HEAD_LIMIT, Kind, PIPELINE, STEPS, WINDOW};
use aya_ebpf::helpers::generated::{bpf_loop, bpf_probe_read_user};

use crate::{
    body, conn, emit, http2,
    maps::{Connection, Direction, FRESH, HITS, HTTP2, OPENED, QUIET, SERVER, SYNCED, UNSURE, WORDS, Work},
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
mod other {
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
const REJECTED: u8 = 1 << 3;
/// The end of the message was announced with its head.
const ENDED: u8 = 1 << 4;
/// The head (or its request) found the ring full: nothing more of the message is passed on.
pub const DROPPED: u8 = 1 << 5;
/// Head bytes were passed on.
const PASSED: u8 = 1 << 6;
/// The connection goes on in HTTP/2: the preface of its client, or `Upgrade: h2c`.
const TO_HTTP2: u8 = 1 << 7;

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
const HTTP_2_0: u64 = u64::from_le_bytes(*b"HTTP/2.0");
/// How the preface of an HTTP/2 client begins, and how long its first line is (RFC 9113 section 3.4).
const PREFACE: u64 = u64::from_le_bytes(*b"PRI * HT");
const PREFACE_LINE: u64 = 16;
pub const SEVEN: u64 = 0x00ff_ffff_ffff_ffff;
/// A word of line feeds.
pub const FEEDS: u64 = 0x0a0a_0a0a_0a0a_0a0a;
pub const LOWER: u64 = 0x2020_2020_2020_2020;
pub const LINE_FEED: u8 = b'\n';
/// Bounds an offset into `Work::data` for the verifier: DATA_LIMIT + WINDOW is below 8192.
const MASK: u64 = 0x1fff;
/// Offsets of words at which a window can begin.
const BASE: u64 = DATA_LIMIT as u64 - 8;
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

/// A bit at the top of each zero byte of `x` (exact, unlike the shorter classic).
#[inline(always)]
fn zero_bytes(x: u64) -> u64 {
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    !(((x & LOW) + LOW) | x | LOW)
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
    /// 0 receive, 1 send.
    pub direction: u64,
}

/// Takes apart what one system call moved: `work` says where the bytes are and how many. Whatever door
/// they came through, and whatever kind of map `connection` lives in.
#[inline(always)]
pub fn feed(work: &mut Work, connection: &mut Connection, direction: u64) {
    set(&raw mut work.other, other::NONE);
    if connection.state & HTTP2 == 0 && whole::feed(work, connection, direction) {
        return;
    }
    // HTTP/2 passes through here for a single step: another way around the loop would double what the
    // verifier has to look at.
    let mut context = Context { connection, work, direction };
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
            other::NONE => return,
            other::PREFACE => http2::preface(work, connection),
            _ => {
                if !http2::join(work, connection) {
                    strike(work, connection);
                }
            }
        }
    }
    if connection.state & (HTTP2 | QUIET) == HTTP2 && work.left != 0 {
        http2::feed(work, connection, &raw mut context);
    }
}

/// One step over the bytes of a system call. Returns 1 when there is nothing left to do.
// SAFETY: called by `bpf_loop` alone, with the context that `transfer` gave it.
pub unsafe extern "C" fn step(_step: u32, context: *mut Context) -> i64 {
    // SAFETY: `feed` passes the address of its local.
    let (connection, work) = unsafe { (&mut *(*context).connection, &mut *(*context).work) };
    i64::from(!one(work, connection, context))
}

/// As [`step`]; true to go on.
#[inline(always)]
fn one(work: &mut Work, connection: &mut Connection, context: *mut Context) -> bool {
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
        mode::START | mode::HEAD => head(work, connection, context),
        _ => body::chunk(work, connection),
    }
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
    // SAFETY: 16 bytes of this CPU's slot; the helper checks the address.
    if unsafe { bpf_probe_read_user((&raw mut work.pointer).cast(), 16, work.vector as *const _) } != 0 {
        emit::count(Count::UNREADABLE);
        work.length = 0;
        work.readable = 0;
        return true;
    }
    work.vector += 16;
    work.vectors -= 1;
    true
}

/// Reads the next window of a head and takes it apart.
#[inline(always)]
fn head(work: &mut Work, connection: &mut Connection, context: *mut Context) -> bool {
    let d = &mut connection.directions[usize::from(work.direction != 0)];
    let begins = d.mode == mode::START;
    if begins {
        work.filled = 0;
        work.line = 0;
    } else if work.filled == 0 {
        restore(work, d);
    }
    let mut n = work.length;
    if n > work.left {
        n = work.left;
    }
    if n > WINDOW as u64 {
        n = WINDOW as u64;
    }
    let at = work.filled & MASK;
    if at > DATA_LIMIT as u64 {
        return false;
    }
    // SAFETY: at + n <= DATA_LIMIT + WINDOW; the helper checks the user's address.
    let failed = unsafe {
        bpf_probe_read_user(
            (&raw mut work.data).cast::<u8>().add(at as usize).cast(),
            n as u32,
            work.pointer as *const _,
        )
    };
    if failed != 0 {
        emit::count(Count::UNREADABLE);
        if begins {
            return false;
        }
        lose(work, connection);
        return false;
    }
    if begins {
        // Empty lines before a message are to be ignored (RFC 9112 section 2.2).
        let first = byte(work, 0);
        if first == b'\r' || first == LINE_FEED {
            work.left -= 1;
            return advance(work, 1);
        }
        if !begin(work, connection, n) {
            return false;
        }
    }
    set(&raw mut work.end, 0);
    set(&raw mut work.hits, 0);
    set(&raw mut work.hit, 0);
    set(&raw mut work.found, 0);
    set(&raw mut work.limit, at + n);
    scan(work, at);
    // SAFETY: the callback gets the context that this step got.
    unsafe { bpf_loop(WINDOW as u32 + 8, line_step as *mut _, context.cast(), 0) };
    let end = get(&raw const work.end);
    let d = &mut connection.directions[usize::from(work.direction != 0)];
    if d.bits & TO_HTTP2 != 0 && d.bits & REJECTED != 0 {
        let consumed = get(&raw const work.line).wrapping_sub(at);
        work.left -= consumed;
        advance(work, consumed);
        work.other = other::PREFACE;
        work.limit = http2::PREFACE - PREFACE_LINE;
        d.mode = mode::START;
        return false;
    }
    if d.bits & REJECTED != 0 || (end > at && d.lines == 0) {
        reject(work, connection);
        return false;
    }
    let consumed = if end > at { end - at } else { n };
    d.head += consumed as u32;
    d.message += consumed;
    work.left -= consumed;
    if end > at {
        work.filled = end;
        finish_head(work, connection);
        return advance(work, consumed) && connection.state & QUIET == 0;
    }
    work.filled = at + n;
    if work.filled > (DATA_LIMIT - WINDOW) as u64 {
        flush(work, connection);
    }
    advance(work, consumed)
}

/// The first bytes of a message: can it be one? True to go on.
#[inline(always)]
fn begin(work: &mut Work, connection: &mut Connection, n: u64) -> bool {
    let first = word(work, 0);
    if first == PREFACE && n >= 8 && connection.state & OPENED == 0 {
        work.other = other::PREFACE;
        work.limit = http2::PREFACE;
        return false;
    }
    // As much of "HTTP/1." as is there.
    let known = if n >= 7 { SEVEN } else { (1u64 << ((n & 7) * 8)) - 1 };
    let response = (first ^ HTTP_1_ANY) & known == 0;
    let outgoing = work.direction != 0;
    let fits_role =
        connection.role == 0 || connection.state & OPENED == 0 || ((connection.role == SERVER) == outgoing) == response;
    // A single "H" may begin "HEAD" too: the role decides, else the first line.
    let ambiguous = response && n < 2;
    let plausible = if ambiguous {
        true
    } else if response {
        fits_role
    } else {
        fits_role && is_token(work, n)
    };
    if !plausible {
        work.other = other::ANYTHING;
        work.limit = n;
        return false;
    }
    let d = &mut connection.directions[usize::from(outgoing)];
    d.mode = mode::HEAD;
    d.bits = if response { IS_RESPONSE } else { 0 };
    d.message = 0;
    d.body = 0;
    d.length = 0;
    d.head = 0;
    d.lines = 0;
    d.status = 0;
    d.carry_len = 0;
    d.lost = 0;
    d.method = 0;
    d.first_ts = work.began;
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

/// A head that turned out to be none.
#[inline(always)]
fn reject(work: &mut Work, connection: &mut Connection) {
    let d = &mut connection.directions[usize::from(work.direction != 0)];
    d.mode = mode::START;
    work.filled = 0;
    if d.bits & PASSED != 0 {
        emit::bare(work, connection, Kind::ABORT, 0);
    }
    work.other = other::ANYTHING;
    work.limit = 0;
}

/// Finds the words with line feeds of the window at `from`. What the lines say is looked at afterwards: this loop
/// is the one that runs for every eight bytes.
#[inline(always)]
fn scan(work: &mut Work, from: u64) {
    set(&raw mut work.at, from);
    // Through memory, so that all ways that lead here look the same to the verifier.
    let base = get(&raw const work.at) & BASE;
    let mut i = 0u64;
    while i < WORDS as u64 {
        let at = base + i * 8;
        if at >= get(&raw const work.limit) {
            return;
        }
        if zero_bytes(word(work, at) ^ FEEDS) != 0 {
            let hits = get(&raw const work.hits) & (HITS as u64 - 1);
            // SAFETY: `hits` is below the length of `places`.
            unsafe { write_volatile((&raw mut work.places).cast::<u16>().add(hits as usize), at as u16) };
            set(&raw mut work.hits, hits + 1);
        }
        i += 1;
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

/// Takes one line. Returns 1 when the head is over, or is none.
// SAFETY: as `step`.
unsafe extern "C" fn line_step(_i: u32, context: *mut Context) -> i64 {
    // SAFETY: as in `step`.
    let (connection, work) = unsafe { (&mut *(*context).connection, &mut *(*context).work) };
    // SAFETY: as above.
    let direction = unsafe { (*context).direction };
    let d = &mut connection.directions[usize::from(direction != 0)];
    if get(&raw const work.found) == 0 {
        let hit = get(&raw const work.hit);
        if hit >= get(&raw const work.hits) {
            return 1;
        }
        set(&raw mut work.hit, hit + 1);
        // SAFETY: the index is below the length of `places`.
        let at = unsafe { read_volatile((&raw const work.places).cast::<u16>().add(hit as usize & (HITS - 1))) };
        set(&raw mut work.at, u64::from(at));
        set(&raw mut work.found, zero_bytes(word(work, u64::from(at)) ^ FEEDS));
    }
    let found = get(&raw const work.found);
    set(&raw mut work.found, found & found.wrapping_sub(1));
    // Through memory: the verifier must not tell the positions apart.
    set(&raw mut work.feed, get(&raw const work.at) + lowest_byte(found));
    let feed = get(&raw const work.feed);
    let from = get(&raw const work.filled);
    let limit = get(&raw const work.limit);
    if feed < from {
        return 0;
    }
    if feed >= limit {
        return 1;
    }
    let line = get(&raw const work.line);
    set(&raw mut work.line, feed + 1);
    let length = feed.wrapping_sub(line);
    if length == 0 || (length == 1 && byte(work, line) == b'\r') {
        set(&raw mut work.end, feed + 1);
        return 1;
    }
    if get(&raw const d.lines) == 0 {
        set(&raw mut d.lines, 1);
        if !first_line(work, d, line, feed) {
            d.bits |= REJECTED;
            return 1;
        }
    } else {
        field(work, d, line, feed);
    }
    0
}

/// The request or status line in `line..feed`. False when it is none.
#[inline(always)]
fn first_line(work: &Work, d: &mut Direction, line: u64, feed: u64) -> bool {
    let first = word(work, line);
    let version = first & SEVEN == HTTP_1_ANY & SEVEN;
    if version {
        // "HTTP/1.1 200": the status is behind the ninth byte.
        d.bits |= IS_RESPONSE;
        if feed - line < 12 || byte(work, line + 8) != b' ' {
            return false;
        }
        let digits = word(work, line + 9);
        let (a, b, c) = ((digits & 0xff) as u8, (digits >> 8 & 0xff) as u8, (digits >> 16 & 0xff) as u8);
        if !a.is_ascii_digit() || !b.is_ascii_digit() || !c.is_ascii_digit() {
            return false;
        }
        d.status = u16::from(a - b'0') * 100 + u16::from(b - b'0') * 10 + u16::from(c - b'0');
        return d.status >= 100;
    }
    // "HTTP/", of another version: a method may begin so but for the slash, and be cut there.
    if d.bits & IS_RESPONSE != 0 && feed - line > 4 && (first ^ HTTP_1_ANY) & 0xff_ffff_ffff == 0 {
        return false;
    }
    d.bits &= !IS_RESPONSE;
    if feed - line < 12 {
        return false;
    }
    let cr = u64::from(byte(work, feed - 1) == b'\r');
    let last = word(work, feed - cr - 8);
    if byte(work, feed - cr - 9) != b' ' || (last != HTTP_1_1 && last != HTTP_1_0) {
        if last == HTTP_2_0 && first == PREFACE {
            d.bits |= TO_HTTP2;
        }
        return false;
    }
    const HEAD_: u64 = u64::from_le_bytes(*b"HEAD \0\0\0");
    const CONNECT_: u64 = u64::from_le_bytes(*b"CONNECT ");
    d.method = if first & 0xff_ffff_ffff == HEAD_ {
        METHOD_HEAD
    } else if first == CONNECT_ {
        METHOD_CONNECT
    } else {
        0
    };
    true
}

/// A field line: takes note of Content-Length and Transfer-Encoding.
#[inline(always)]
fn field(work: &mut Work, d: &mut Direction, line: u64, feed: u64) {
    const CONTENT: u64 = u64::from_le_bytes(*b"content-");
    const LENGTH: u64 = u64::from_le_bytes(*b"length:\0");
    const TRANSFER: u64 = u64::from_le_bytes(*b"transfer");
    const ENCODING: u64 = u64::from_le_bytes(*b"-encodin");
    const CHUNKED: u64 = u64::from_le_bytes(*b"\0chunked");
    const UPGRADE: u64 = u64::from_le_bytes(*b"upgrade:");
    const H2C: u64 = u64::from_le_bytes(*b"\0\0\0\0\0h2c");
    let first = word(work, line) | LOWER;
    if first == CONTENT && (word(work, line + 8) | LOWER) & SEVEN == (LENGTH | LOWER) & SEVEN {
        let (value, digits) = (&raw mut work.scratch[2], &raw mut work.scratch[3]);
        set(value, 0);
        set(digits, 0);
        let mut i = 15u64;
        while i < 48 {
            let b = byte(work, line + i);
            let digit = u64::from(b).wrapping_sub(u64::from(b'0'));
            if digit < 10 {
                set(value, get(value).wrapping_mul(10).wrapping_add(digit));
                set(digits, get(digits) + 1);
            } else if (b != b' ' && b != b'\t') || get(digits) != 0 {
                break;
            }
            i += 1;
        }
        let digits = get(digits);
        if digits > 0 && digits < 20 {
            d.length = get(value);
            d.bits |= HAS_LENGTH;
        }
    } else if first == TRANSFER && word(work, line + 8) | LOWER == ENCODING | LOWER {
        let cr = u64::from(byte(work, feed - 1) == b'\r');
        if feed - cr >= line + 26 && (word(work, feed - cr - 8) | LOWER) >> 8 == (CHUNKED | LOWER) >> 8 {
            d.bits |= IS_CHUNKED;
        }
    } else if first == UPGRADE {
        let cr = u64::from(byte(work, feed - 1) == b'\r');
        if feed - cr >= line + 11 && (word(work, feed - cr - 8) | LOWER) >> 40 == (H2C | LOWER) >> 40 {
            d.bits |= TO_HTTP2;
        }
    }
}

/// The head is whole: what follows it?
#[inline(never)]
pub fn finish_head(work: &mut Work, connection: &mut Connection) {
    let direction = usize::from(work.direction != 0);
    let response = connection.directions[direction].bits & IS_RESPONSE != 0;
    connection.strikes = 0;
    if connection.state & OPENED == 0 && !conn::set_role(connection, work.direction, response) {
        connection.state |= QUIET;
        return;
    }
    if connection.state & UNSURE != 0 && !response {
        conn::realign(connection, direction);
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

/// Puts the carried bytes of an unfinished line in front of the data.
#[inline(always)]
fn restore(work: &mut Work, d: &Direction) {
    let data = (&raw mut work.data).cast::<u64>();
    let mut i = 0;
    while i < CARRY / 8 {
        // SAFETY: CARRY is far below the size of `data`, which is 8-aligned.
        unsafe { write_volatile(data.add(i), d.carry[i]) };
        i += 1;
    }
    work.filled = u64::from(d.carry_len);
    // SAFETY: a plain field of this CPU's slot.
    unsafe { write_volatile(&raw mut work.line, 0) };
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
