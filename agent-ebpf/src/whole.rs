//! The short way for what nearly every system call carries: one message whose head is whole in one
//! buffer, or nothing but body. [`feed`] takes these without the machine of [`crate::http1`]; whatever
//! is unusual it leaves untouched for the machine, so that it may be strict without being wrong.
//!
//! Why two ways: the machine keeps its place in map memory and runs a callback per step and line, which
//! makes splitting at any byte affordable for the verifier, at a quarter more cost per message.
//!
//! The loop below goes over the head once, eight bytes at a time; at each line's start it looks at eight
//! bytes: the blank line, `content-` and `transfer` are all that matters for framing. It is a callback of
//! `bpf_loop` for the verifier's sake, which looks at it once (a plain loop over 2 KiB with these branches
//! passes the limit of a million instructions); kernels call it directly, so a turn costs 2 ns.

use core::ptr::read_volatile;

use agent_ebpf::DATA_LIMIT;
use aya_ebpf::helpers::generated::{bpf_loop, bpf_probe_read_user};

use crate::{
    http1::{
        FEEDS, HAS_LENGTH, HTTP_1_0, HTTP_1_1, HTTP_1_ANY, IS_CHUNKED, IS_RESPONSE, LOWER, METHOD_CONNECT, METHOD_HEAD,
        SEVEN, advance, byte, finish_head, finish_message, get, is_token, lowest_byte, mode, next_buffer, set, word,
    },
    maps::{Connection, OPENED, QUIET, SERVER, Work},
};

/// Longest head that is taken here, bytes; a power of two.
const LONGEST: u64 = 2048;
/// Words that one turn of the loop looks at, at most.
const STRIDE: u32 = 8;
/// Turns of the loop: one for each line, and more for lines that are longer than a stride. A head with more
/// lines than that goes the other way.
const TURNS: u32 = 160;
/// The shortest message: `GET / HTTP/1.0` and two line feeds.
const SHORTEST: u64 = 16;
/// Most digits of a Content-Length that cannot overflow.
const DIGITS: u64 = 18;

const CONTENT: u64 = u64::from_le_bytes(*b"content-");
const LENGTH: u64 = u64::from_le_bytes(*b"length: ");
const TRANSFER: u64 = u64::from_le_bytes(*b"transfer");
const ENCODING: u64 = u64::from_le_bytes(*b"-encodin");
const G_CHUNKED: u64 = u64::from_le_bytes(*b"g: chunk");
const ED: u64 = u64::from_le_bytes(*b"ed\0\0\0\0\0\0");

/// Takes what one system call moved. True when all of it was taken; else the machine goes on where `work`
/// and the direction's state say.
#[inline(always)]
pub fn feed(work: &mut Work, connection: &mut Connection, direction: u64) -> bool {
    let at = usize::from(direction != 0);
    if connection.directions[at].mode == mode::START {
        if work.readable == 0 || work.skip != 0 || !head(work, connection, at) {
            return false;
        }
        if work.left == 0 || connection.state & QUIET != 0 {
            return true;
        }
    }
    body(work, connection, at)
}

/// What is left is body of the message under way.
#[inline(always)]
fn body(work: &mut Work, connection: &mut Connection, at: usize) -> bool {
    let d = &mut connection.directions[at];
    match d.mode {
        mode::BODY if work.left <= d.remaining => {
            d.remaining -= work.left;
            d.message += work.left;
            d.body += work.left;
            work.left = 0;
            if d.remaining == 0 {
                finish_message(work, connection);
            }
            true
        }
        mode::CHUNK_DATA if work.left < d.remaining => {
            d.remaining -= work.left;
            d.message += work.left;
            true
        }
        mode::UNTIL_CLOSE => {
            d.message += work.left;
            d.body += work.left;
            true
        }
        mode::TUNNEL => {
            d.message += work.left;
            true
        }
        _ => false,
    }
}

/// Takes a head that is whole in the first buffer. False: it is not, and nothing was changed but that the
/// first buffer is known.
#[inline(always)]
fn head(work: &mut Work, connection: &mut Connection, at: usize) -> bool {
    if work.length == 0 && (work.vectors == 0 || !next_buffer(work)) {
        return false;
    }
    let mut n = if work.length < work.left { work.length } else { work.left };
    if n > LONGEST {
        n = LONGEST;
    }
    if n < SHORTEST {
        return false;
    }
    // SAFETY: `data` has more than LONGEST bytes; the helper checks the user's address.
    if unsafe { bpf_probe_read_user((&raw mut work.data).cast(), n as u32, work.pointer as *const _) } != 0 {
        return false;
    }
    let first = word(work, 0);
    let response = first & SEVEN == HTTP_1_ANY;
    let outgoing = at != 0;
    if connection.state & OPENED != 0 && ((connection.role == SERVER) == outgoing) != response {
        return false;
    }
    if !response && !is_method(work, first, n) {
        return false;
    }
    set(&raw mut work.limit, n);
    lines(work);
    set(&raw mut work.scratch[2], 0);
    let end = get(&raw const work.end);
    if end == 0 || end > n {
        return false;
    }
    let (status, method) = if response {
        let Some(status) = status(work) else { return false };
        // What the connection is switched to is in the fields.
        if status == 101 {
            return false;
        }
        (status, 0)
    } else {
        if !is_request_line(work) {
            return false;
        }
        (0, method(first))
    };
    let mut bits = if response { IS_RESPONSE } else { 0 };
    if get(&raw const work.coding) != 0 {
        if !is_chunked(work) {
            return false;
        }
        bits |= IS_CHUNKED;
    }
    if get(&raw const work.content) != 0 {
        if !length(work) {
            return false;
        }
        bits |= HAS_LENGTH;
    }
    let d = &mut connection.directions[at];
    d.mode = mode::HEAD;
    d.bits = bits;
    d.message = end;
    d.body = 0;
    d.length = get(&raw const work.scratch[2]);
    d.head = end as u32;
    d.status = status;
    d.carry_len = 0;
    d.lost = 0;
    d.method = method;
    d.first_ts = work.began;
    work.left -= end;
    work.filled = end;
    finish_head(work, connection);
    advance(work, end)
}

/// The usual methods at once, any other token byte by byte.
#[inline(always)]
fn is_method(work: &Work, first: u64, n: u64) -> bool {
    const GET: u64 = u64::from_le_bytes(*b"GET \0\0\0\0");
    const POST: u64 = u64::from_le_bytes(*b"POST \0\0\0");
    first & 0xffff_ffff == GET || first & 0xff_ffff_ffff == POST || is_token(work, n)
}

/// The method's class, as far as it changes the framing of the response.
#[inline(always)]
fn method(first: u64) -> u8 {
    const HEAD: u64 = u64::from_le_bytes(*b"HEAD \0\0\0");
    const CONNECT: u64 = u64::from_le_bytes(*b"CONNECT ");
    if first & 0xff_ffff_ffff == HEAD {
        METHOD_HEAD
    } else if first == CONNECT {
        METHOD_CONNECT
    } else {
        0
    }
}

/// Goes over the lines of the head up to the blank one. Leaves in `work`: `end`, the first byte behind the
/// head (0 where it is not found); `feed`, the end of the first line; `content` and `coding`, where the lines
/// begin that frame the body (0 where there are none).
#[inline(always)]
fn lines(work: &mut Work) {
    set(&raw mut work.at, 0);
    set(&raw mut work.end, 0);
    set(&raw mut work.feed, 0);
    set(&raw mut work.content, 0);
    set(&raw mut work.coding, 0);
    let mut context: *mut Work = work;
    // SAFETY: the callback gets the address of a local that outlives the call.
    unsafe { bpf_loop(TURNS, line as *mut _, (&raw mut context).cast(), 0) };
}

/// Looks for the next line feed, in [`STRIDE`] words at most, and at what follows it. Returns 1 when the head
/// is over, or goes on behind what was read.
// SAFETY: called by `bpf_loop` alone, with the context that `lines` gave it.
unsafe extern "C" fn line(_turn: u32, context: *mut *mut Work) -> i64 {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const TOPS: u64 = 0x8080_8080_8080_8080;
    // SAFETY: `lines` passes the address of its local.
    let work = unsafe { &mut **context };
    let limit = get(&raw const work.limit);
    let mut at = get(&raw const work.at);
    let mut found = 0;
    let mut i = 0;
    while i < STRIDE {
        let x = near(work, at) ^ FEEDS;
        // The lowest bit that is set is right (the ones above it may not be).
        found = x.wrapping_sub(ONES) & !x & TOPS;
        if found != 0 {
            break;
        }
        at += 8;
        i += 1;
    }
    if found == 0 {
        set(&raw mut work.at, at);
        return i64::from(at >= limit);
    }
    at += lowest_byte(found) + 1;
    if at >= limit {
        return 1;
    }
    set(&raw mut work.at, at);
    if get(&raw const work.feed) == 0 {
        set(&raw mut work.feed, at - 1);
    }
    let start = near(work, at);
    if start & 0xff == 0x0a {
        set(&raw mut work.end, at + 1);
        return 1;
    }
    if start & 0xffff == 0x0a0d {
        set(&raw mut work.end, at + 2);
        return 1;
    }
    let start = start | LOWER;
    if start == CONTENT {
        if (near(work, at + 8) | LOWER) & SEVEN == LENGTH & SEVEN {
            set(&raw mut work.content, at);
        }
    } else if start == TRANSFER {
        set(&raw mut work.coding, at);
    }
    0
}

/// Eight bytes at an offset that is below [`DATA_LIMIT`] by construction: the mask tells the verifier.
#[inline(always)]
fn near(work: &Work, at: u64) -> u64 {
    let at = at & (DATA_LIMIT as u64 - 1);
    // SAFETY: at + 8 <= size of `data`. The kernel's targets load unaligned words.
    unsafe { read_volatile((&raw const work.data).cast::<u8>().add(at as usize).cast::<u64>()) }
}

/// The status of `HTTP/1.1 200`; `None` where it is unusual.
#[inline(always)]
fn status(work: &Work) -> Option<u16> {
    let digits = word(work, 8);
    let digit = |i: u32| ((digits >> (8 * i)) as u8).wrapping_sub(b'0');
    let (a, b, c) = (digit(1), digit(2), digit(3));
    if digits as u8 != b' ' || a > 9 || a == 0 || b > 9 || c > 9 || get(&raw const work.feed) < 12 {
        return None;
    }
    Some(u16::from(a) * 100 + u16::from(b) * 10 + u16::from(c))
}

/// Does the first line end with ` HTTP/1.1` or ` HTTP/1.0`?
#[inline(always)]
fn is_request_line(work: &Work) -> bool {
    let feed = get(&raw const work.feed) & (LONGEST - 1);
    if feed < SHORTEST - 2 {
        return false;
    }
    let end = feed - u64::from(byte(work, feed - 1) == b'\r');
    let version = word(work, end - 8);
    byte(work, end - 9) == b' ' && (version == HTTP_1_1 || version == HTTP_1_0)
}

/// Is the line `Transfer-Encoding: chunked`?
#[inline(always)]
fn is_chunked(work: &Work) -> bool {
    let at = get(&raw const work.coding) & (LONGEST - 1);
    let end = word(work, at + 24);
    word(work, at + 8) | LOWER == ENCODING | LOWER
        && word(work, at + 16) | LOWER == G_CHUNKED | LOWER
        && (end | LOWER) & 0xffff == ED
        && ((end >> 16) & 0xff == 0x0a || (end >> 16) & 0xffff == 0x0a0d)
}

/// The value of `Content-Length: 123`, into `scratch[2]`. False where it is written in another way.
#[inline(always)]
fn length(work: &mut Work) -> bool {
    let at = get(&raw const work.content) & (LONGEST - 1);
    let value = &raw mut work.scratch[2];
    set(value, 0);
    // The byte behind the colon may be anything for `LOWER`: it must be a space.
    if byte(work, at + 15) != b' ' {
        return false;
    }
    let mut i = 0;
    while i <= DIGITS {
        let b = byte(work, at + 16 + i);
        let digit = u64::from(b).wrapping_sub(u64::from(b'0'));
        if digit > 9 {
            return i > 0 && (b == b'\r' || b == b'\n');
        }
        set(value, get(value) * 10 + digit);
        i += 1;
    }
    false
}

const _: () = assert!(LONGEST.is_power_of_two() && LONGEST + 128 <= DATA_LIMIT as u64 && DATA_LIMIT.is_power_of_two());
