//! Bodies: chunk sizes, extensions and trailers (RFC 9112 section 7.1), and bytes that left a socket
//! without passing a receive.

use core::ptr::read_volatile;

use agent_ebpf::Count;
use aya_ebpf::helpers::generated::bpf_probe_read_user;

use crate::{
    emit,
    http1::{LINE_FEED, advance, finish_message, get, lose, mode, set},
    kernel,
    maps::{Connection, Direction, Work},
};

/// TCP: bytes that left the socket between two receives without passing one (splice, zero-copy
/// receive) belong to the message under way.
#[inline(always)]
pub fn skip_spliced(_work: &mut Work, d: &mut Direction, bytes: u64, sock: u64) {
    if d.sequence == 0 || (d.mode != mode::BODY && d.mode != mode::CHUNK_DATA && d.mode != mode::UNTIL_CLOSE) {
        return;
    }
    if kernel::family(sock) == kernel::AF_UNIX {
        return;
    }
    let missed = kernel::copied_sequence(sock).wrapping_sub(bytes as u32).wrapping_sub(d.sequence);
    // A receive that meets the end of the stream moves one further.
    if missed == 0 || missed > i32::MAX as u32 || (missed == 1 && kernel::shutdown(sock) & 1 != 0) {
        return;
    }
    let missed = u64::from(missed);
    // At the stream's end: whether that moved the number one further cannot be seen when bytes are missing too.
    let ended = missed == d.remaining + 1 && kernel::shutdown(sock) & 1 != 0;
    d.message += missed;
    if d.mode == mode::UNTIL_CLOSE {
        d.body += missed;
    } else if d.remaining > missed {
        d.remaining -= missed;
        if d.mode == mode::BODY {
            d.body += missed;
        }
    } else {
        if d.remaining != missed && !ended {
            // More than this message: the next bytes begin another, or cannot be followed.
            d.lost = 1;
        }
        d.message -= missed - d.remaining;
        if d.mode == mode::BODY {
            d.body += d.remaining;
        }
        d.remaining = 0;
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
