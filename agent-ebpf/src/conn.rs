//! Connection state, kept in the socket itself.
//!
//! What is decided once for a connection is logged (`apiscope -vv run`). Without that the level is 0, the verifier
//! knows it, and the lines are not in the program at all; on the way of messages nothing is logged ever.

use agent_ebpf::{Count, Flag, Kind};
use aya_log_ebpf::debug;

use aya_ebpf::{
    bindings::BPF_SK_STORAGE_GET_F_CREATE,
    helpers::{bpf_get_smp_processor_id, generated},
};

use crate::{
    body, emit,
    http1::{self, mode},
    http2, kernel,
    maps::{
        BLANK, BY_ADDRESS, CLIENT, CONNECTIONS, Connection, EXCLUDED_PIDS, EXCLUDED_PORTS, FRESH, HTTP2, NEXT, QUIET,
        RULES, SERVER, UNSURE, Work, setting,
    },
};

/// State of a socket that has some. Whether it lives in the socket or in a table is known at load: the
/// verifier sees one of the two only.
#[inline(always)]
pub fn find(sock: u64) -> Option<*mut Connection> {
    if setting!(by_address) != 0 {
        return BY_ADDRESS.get_ptr_mut(&sock);
    }
    // SAFETY: `sock` is a hook's own argument: the verifier knows its type.
    let found = unsafe {
        generated::bpf_sk_storage_get(
            (&raw const CONNECTIONS).cast_mut().cast(),
            sock as *mut _,
            core::ptr::null_mut(),
            0,
        )
    };
    if found.is_null() { None } else { Some(found.cast()) }
}

/// State of a stream socket, made when there is none. New state is zero.
#[inline(always)]
pub fn find_or_new(sock: u64) -> Option<*mut Connection> {
    if let Some(found) = find(sock) {
        return Some(found);
    }
    if !kernel::is_stream(sock) {
        return None;
    }
    let connection = new(sock)?;
    // SAFETY: fresh map memory.
    unsafe { (*connection).directions[0].followed = u32::from(kernel::family(sock) != kernel::AF_UNIX) };
    Some(connection)
}

/// The socket is gone, and its address may be another's soon.
#[inline(always)]
pub fn forget(sock: u64) {
    if setting!(by_address) != 0 {
        // Absent is as good as removed.
        let _ = BY_ADDRESS.remove(&sock);
    }
}

#[inline(always)]
fn place(sock: u64) -> *mut Connection {
    if setting!(by_address) != 0 {
        let Some(blank) = BLANK.get(0) else { return core::ptr::null_mut() };
        if BY_ADDRESS.insert(&sock, blank, 0).is_err() {
            return core::ptr::null_mut();
        }
        return BY_ADDRESS.get_ptr_mut(&sock).unwrap_or(core::ptr::null_mut());
    }
    // SAFETY: as in `find`.
    unsafe {
        generated::bpf_sk_storage_get(
            (&raw const CONNECTIONS).cast_mut().cast(),
            sock as *mut _,
            core::ptr::null_mut(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        )
        .cast()
    }
}

#[inline(always)]
fn new(sock: u64) -> Option<*mut Connection> {
    let connection = place(sock);
    if connection.is_null() {
        emit::count(Count::NO_STATE);
        debug!((), "no state for a connection: the kernel has no memory for it");
        return None;
    }
    // SAFETY: fresh map memory.
    unsafe { (*connection).id = number()? };
    Some(connection)
}

/// The next connection's number: unique without a shared counter, the CPU in the top bits. For the socket
/// hooks, which nothing interrupts.
#[inline(always)]
pub fn number() -> Option<u64> {
    let next = NEXT.get_ptr_mut(0)?;
    // SAFETY: this CPU's slot.
    unsafe {
        *next += 1;
        Some((u64::from(bpf_get_smp_processor_id()) << 48) | *next)
    }
}

/// A TCP connection was established.
#[inline(always)]
pub fn begin(sock: u64, role: u8) {
    // With TCP fast open the first request was sent before: it keeps its number.
    if let Some(connection) = find(sock).or_else(|| new(sock)) {
        // SAFETY: map memory of this socket.
        let connection = unsafe { &mut *connection };
        connection.role = role;
        connection.state |= FRESH;
        let mut i = 0;
        while i < 2 {
            let d = &mut connection.directions[i as usize];
            d.followed = 1;
            if d.sequence == 0 {
                d.sequence = kernel::position(sock, i);
            }
            i += 1;
        }
        if setting!(sides) & u32::from(role) == 0 {
            connection.state |= QUIET;
        }
    }
}

/// Is this connection to be traced? Held against the rules once, and again when they change.
#[inline(always)]
pub fn is_wanted(pid: u32, connection: &mut Connection, ports: impl FnOnce() -> (u16, u16)) -> bool {
    let Some(rules) = RULES.get(0) else { return true };
    let generation = *rules;
    if connection.generation == generation {
        return true;
    }
    connection.generation = generation;
    if pid == setting!(own_pid) {
        return false;
    }
    let (local, remote) = ports();
    if EXCLUDED_PIDS.get_ptr(&pid).is_some()
        || EXCLUDED_PORTS.get_ptr(&local).is_some()
        || EXCLUDED_PORTS.get_ptr(&remote).is_some()
    {
        debug!((), "left out: a connection of process {}, ports {} and {}", pid, local, remote);
        return false;
    }
    true
}

/// The first head shows which end this is. False when that side is not wanted.
#[inline(always)]
pub fn set_role(connection: &mut Connection, direction: u64, response: bool) -> bool {
    // A server receives requests and sends responses.
    let role = if (direction == 0) == response { CLIENT } else { SERVER };
    connection.role = role;
    setting!(sides) & u32::from(role) != 0
}

/// Messages went by unread, so that the two directions may number them differently. A request is about to begin:
/// its answer will have its number, unless answers to earlier ones are still to come (pipelining, which nobody
/// does over calls that are not read).
#[inline(never)]
pub fn realign(connection: &mut Connection, direction: usize) {
    let [received, sent] = [connection.directions[0].index, connection.directions[1].index];
    let (asking, answering) = if direction == 0 { (received, sent) } else { (sent, received) };
    if connection.directions[(direction & 1) ^ 1].mode != mode::START {
        return;
    }
    let next = if asking > answering { asking } else { answering };
    connection.directions[0].index = next;
    connection.directions[1].index = next;
    connection.requests = next;
    connection.state &= !UNSURE;
}

/// As [`realign`], where answers may be what went by: the one that begins is to the last request.
#[inline(always)]
pub fn skip_answers(connection: &mut Connection, direction: usize) {
    let asked = connection.requests;
    let d = &mut connection.directions[direction & 1];
    if d.index < asked {
        d.index = asked - 1;
        connection.state &= !UNSURE;
    }
}

/// A direction carries no more bytes: a body that lasts until then is whole.
#[inline(always)]
pub fn end_direction(work: &mut Work, connection: &mut Connection, direction: usize) {
    let d = &mut connection.directions[direction & 1];
    if d.mode == mode::UNTIL_CLOSE {
        d.mode = mode::START;
        // The message ended with its last byte, not with the silence after it.
        work.now = d.last_ts;
        let dropped = d.bits & http1::DROPPED != 0;
        if !dropped {
            emit::bare(work, connection, Kind::END, Flag::RESPONSE | Flag::UNTIL_CLOSE);
        }
    }
}

/// What was under way when the connection ended. A body that was received until the end is whole only
/// when `both` ends closed.
#[inline(always)]
pub fn close(work: &mut Work, connection: &mut Connection, flags: u16, both: bool) {
    if connection.state & HTTP2 != 0 {
        let [received, sent] = &mut connection.directions;
        let unfinished = [u8::from(http2::under_way(received)), u8::from(http2::under_way(sent))];
        connection.requests = received.index;
        let responses = sent.index;
        return emit::close(work, connection, flags, unfinished, [0; 2], responses);
    }
    // The rest of a body that was received may have gone to a pipe.
    if connection.directions[0].followed != 0 {
        let sock = work.sock;
        body::follow(work, connection, sock, 0);
        let d = &connection.directions[0];
        if d.mode == mode::BODY && d.remaining == 0 {
            http1::finish_message(work, connection);
        }
    }
    let under_way = |d: &crate::maps::Direction| u8::from(d.mode != mode::START && d.mode != mode::TUNNEL);
    let until_close = |d: &crate::maps::Direction| u8::from(d.mode == mode::UNTIL_CLOSE);
    let [received, sent] = &connection.directions;
    let unfinished = [under_way(received), under_way(sent)];
    let endings = [until_close(received) & u8::from(both), until_close(sent)];
    let responses = if connection.role == SERVER { sent.index } else { received.index };
    emit::close(work, connection, flags, unfinished, endings, responses);
}
