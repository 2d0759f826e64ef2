//! Bodies: chunk sizes, extensions and trailers (RFC 9112 section 7.1), and bytes that went over a socket
//! unseen.

use core::ptr::read_volatile;

use agent_ebpf::Count;
use aya_ebpf::helpers::generated::bpf_probe_read_user;

use crate::{
    emit,
    http1::{LINE_FEED, advance, finish_message, get, lose, mode, set},
    http2, kernel,
    maps::{Connection, FRESH, HTTP2, OPENED, UNSURE, Work},
};

/// TCP: takes what went over a direction unseen, between the last bytes that were seen and the `bytes` that a call
/// has just moved. Bytes leave a socket without a receive by splice and zero-copy receive; and the kernel skips
/// programs: on one CPU one that is under way keeps the same from running in another thread (where programs can be
/// preempted), and returns of kprobes are limited. Every byte has its number all the same (RFC 9293 section 3.4),
/// so that no answer is paired with another's request.
///
/// One more number than bytes is the end of the stream, where the other end has closed.
#[inline(never)]
pub fn follow(work: &mut Work, connection: &mut Connection, sock: u64, bytes: u64) {
    let direction = work.direction;
    let position = kernel::position(sock, direction);
    let d = &mut connection.directions[usize::from(direction != 0)];
    let missed = position.wrapping_sub(bytes as u32).wrapping_sub(d.sequence);
    let known = d.sequence != 0;
    d.sequence = position;
    // Behind it: another thread was quicker, or the bytes go another way (sockmap).
    if !known || missed == 0 || missed > i32::MAX as u32 {
        return;
    }
    let over = kernel::shutdown(sock) & if direction == 0 { 1 } else { 2 } != 0;
    if !(over && missed == 1) {
        missing(work, connection, u64::from(missed), over);
    }
}

/// `missed` bytes of a direction went by unseen; `over` when one of them may be the end of the stream.
#[inline(always)]
fn missing(work: &mut Work, connection: &mut Connection, missed: u64, over: bool) {
    if connection.state & HTTP2 != 0 {
        return http2::missing(work, connection, missed);
    }
    let d = &mut connection.directions[usize::from(work.direction != 0)];
    match d.mode {
        mode::TUNNEL => d.message += missed,
        mode::UNTIL_CLOSE => {
            d.message += missed;
            d.body += missed;
        }
        mode::BODY | mode::CHUNK_DATA => {
            let more = missed > d.remaining && !(over && missed == d.remaining + 1);
            if more {
                // Another message began. Of chunks that is not known.
                emit::count(Count::MISSED);
                connection.state |= UNSURE;
                d.lost = 1;
                if d.mode == mode::CHUNK_DATA {
                    work.left = 0;
                    return lose(work, connection);
                }
            }
            let n = if missed < d.remaining { missed } else { d.remaining };
            d.message += n;
            d.remaining -= n;
            if d.mode == mode::BODY {
                d.body += n;
            }
        }
        mode::START => {
            if connection.state & OPENED == 0 {
                connection.state &= !FRESH;
            }
            emit::count(Count::MISSED);
            connection.state |= UNSURE;
        }
        _ => {
            work.left = 0;
            lose(work, connection);
            connection.state |= UNSURE;
        }
    }
}

/// Chunk sizes, extensions and trailers.
#[inline(always)]
pub fn chunk(work: &mut Work, connection: &mut Connection) -> bool {
    let d = &mut connection.directions[usize::from(work.direction != 0)];
    let mut n = work.length;
    if n > work.left {
        n = work.left;
    }
    if n > 16 {
        n = 16;
    }
    // SAFETY: 16 bytes fit; the helper checks the user's address.
    let failed = unsafe { bpf_probe_read_user((&raw mut work.scratch).cast(), n as u32, work.pointer as *const _) };
    if failed != 0 {
        emit::count(Count::UNREADABLE);
        lose(work, connection);
        return false;
    }
    let bytes = (&raw const work.scratch).cast::<u8>();
    let mut over = false;
    let mut i = 0u64;
    while i < 16 {
        if i >= n {
            break;
        }
        // SAFETY: within `scratch`.
        let b = unsafe { read_volatile(bytes.add(i as usize)) };
        i += 1;
        let now = get(&raw const d.mode);
        match now {
            mode::CHUNK_SIZE | mode::CHUNK_EXTENSION => {
                if b == LINE_FEED {
                    if get(&raw const d.remaining) == 0 {
                        set(&raw mut d.mode, mode::TRAILER);
                    } else {
                        d.body += d.remaining;
                        // The line end behind the data.
                        d.remaining += 2;
                        set(&raw mut d.mode, mode::CHUNK_DATA);
                        break;
                    }
                } else if now == mode::CHUNK_SIZE {
                    let low = b | 0x20;
                    if b.is_ascii_digit() {
                        d.remaining = (get(&raw const d.remaining) << 4) | u64::from(b - b'0');
                    } else if low >= b'a' && low <= b'f' {
                        d.remaining = (get(&raw const d.remaining) << 4) | u64::from(low - b'a' + 10);
                    } else {
                        set(&raw mut d.mode, mode::CHUNK_EXTENSION);
                    }
                }
            }
            mode::TRAILER => {
                if b == LINE_FEED {
                    over = true;
                    break;
                }
                if b != b'\r' {
                    set(&raw mut d.mode, mode::TRAILER_LINE);
                }
            }
            _ => {
                if b == LINE_FEED {
                    set(&raw mut d.mode, mode::TRAILER);
                }
            }
        }
    }
    d.message += i;
    work.left -= i;
    if over {
        finish_message(work, connection);
    }
    advance(work, i)
}
