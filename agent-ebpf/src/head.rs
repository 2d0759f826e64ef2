//! Heads of HTTP/1 messages, window by window: where does each line end, what does it say of the framing?

use core::ptr::{read_volatile, write_volatile};

use agent_ebpf::{CARRY, Count, DATA_LIMIT, Kind, WINDOW};
use aya_ebpf::helpers::generated::{bpf_loop, bpf_probe_read_user};

use crate::{
    emit,
    http1::{
        Context, FEEDS, HAS_LENGTH, HTTP_1_0, HTTP_1_1, HTTP_1_ANY, IS_CHUNKED, IS_RESPONSE, LINE_FEED, LOWER, MASK,
        METHOD_CONNECT, METHOD_HEAD, PASSED, PREFACE, PREFACE_LINE, REJECTED, SEVEN, TO_HTTP2, advance, byte, get,
        is_token, lose, lowest_byte, mode, other, set, word,
    },
    http2,
    maps::{Connection, Direction, HITS, OPENED, SERVER, WORDS, Work},
    once::{flag, once},
};

const HTTP_2_0: u64 = u64::from_le_bytes(*b"HTTP/2.0");
/// Offsets of words at which a window can begin.
const BASE: u64 = DATA_LIMIT as u64 - 8;

/// What a window of a head is.
pub mod found {
    /// Nothing that can be followed.
    pub const NOTHING: u64 = 0;
    /// A part of the head.
    pub const MORE: u64 = 1;
    /// As `MORE`, and `data` must be passed on before the next.
    pub const FULL: u64 = 2;
    /// Its end, at `Work::end`.
    pub const END: u64 = 3;
}

/// Reads the next window of a head and takes it apart: returns what is [`found`]. See [`crate::once`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn http1_head(work: *mut Work, connection: *mut Connection) -> u64 {
    // SAFETY: `one` passes what it has for itself.
    match unsafe { once(work, connection) } {
        Some((work, connection)) => head(work, connection),
        None => found::NOTHING,
    }
}

#[inline(always)]
fn head(work: &mut Work, connection: &mut Connection) -> u64 {
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
        return found::NOTHING;
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
            return found::NOTHING;
        }
        lose(work, connection);
        return found::NOTHING;
    }
    if begins {
        // Empty lines before a message are to be ignored (RFC 9112 section 2.2).
        let first = byte(work, 0);
        if first == b'\r' || first == LINE_FEED {
            work.left -= 1;
            advance(work, 1);
            return found::MORE;
        }
        if !begin(work, connection, n) {
            return found::NOTHING;
        }
    }
    set(&raw mut work.end, 0);
    set(&raw mut work.hits, 0);
    set(&raw mut work.hit, 0);
    set(&raw mut work.found, 0);
    set(&raw mut work.limit, at + n);
    scan(work, connection, at);
    let mut context = Context { connection, work };
    // SAFETY: the callback gets the address of a local that outlives the call.
    unsafe { bpf_loop(WINDOW as u32 + 8, line_step as *mut _, (&raw mut context).cast(), 0) };
    // SAFETY: the callback has ended, and with it the other use of both.
    let (connection, work) = unsafe { (&mut *context.connection, &mut *context.work) };
    let end = get(&raw const work.end);
    let d = &mut connection.directions[usize::from(work.direction != 0)];
    if d.bits & TO_HTTP2 != 0 && d.bits & REJECTED != 0 {
        let consumed = get(&raw const work.line).wrapping_sub(at);
        work.left -= consumed;
        advance(work, consumed);
        work.other = other::PREFACE;
        work.limit = http2::PREFACE - PREFACE_LINE;
        d.mode = mode::START;
        return found::NOTHING;
    }
    if d.bits & REJECTED != 0 || (end > at && d.lines == 0) {
        reject(work, connection);
        return found::NOTHING;
    }
    let consumed = if end > at { end - at } else { n };
    d.head += consumed as u32;
    d.message += consumed;
    work.left -= consumed;
    advance(work, consumed);
    if end > at {
        return found::END;
    }
    work.filled = at + n;
    if at + n > (DATA_LIMIT - WINDOW) as u64 { found::FULL } else { found::MORE }
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
fn scan(work: &mut Work, connection: &mut Connection, from: u64) {
    set(&raw mut work.at, from);
    http1_scan(work, connection);
}

/// See [`scan`] and [`crate::once`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn http1_scan(work: *mut Work, connection: *mut Connection) -> u32 {
    // SAFETY: `scan` passes what it has for itself.
    if let Some((work, _)) = unsafe { once(work, connection) } {
        find_feeds(work);
    }
    0
}

#[inline(always)]
fn find_feeds(work: &mut Work) {
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

/// A bit at the top of each zero byte of `x` (exact, unlike the shorter classic).
#[inline(always)]
fn zero_bytes(x: u64) -> u64 {
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    !(((x & LOW) + LOW) | x | LOW)
}

/// Takes one line. Returns 1 when the head is over, or is none.
// SAFETY: as `step`.
unsafe extern "C" fn line_step(_i: u32, context: *mut Context) -> i64 {
    // SAFETY: as in `step`.
    flag(unsafe { http1_line((*context).work, (*context).connection) })
}

/// See [`line_step`] and [`crate::once`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn http1_line(work: *mut Work, connection: *mut Connection) -> i64 {
    // SAFETY: `line_step` passes what `head` has for itself.
    match unsafe { once(work, connection) } {
        Some((work, connection)) => line(work, connection),
        None => 1,
    }
}

#[inline(always)]
fn line(work: &mut Work, connection: &mut Connection) -> i64 {
    let d = &mut connection.directions[usize::from(work.direction != 0)];
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
