//! The socket door: one run per message, in the caller's context, after the copy.
//!
//! Hooks: `tp_btf/sock_send_length`, `tp_btf/sock_recv_length` (kernel 6.3+); on older kernels `fexit` or
//! `kprobe` call the same [`sent`] and [`received`]. The system call's own arguments come from
//! `bpf_task_pt_regs`. What TCP connections go through comes from tracepoints that all of them have.

use agent_ebpf::{Count, Flag, Kind};
use aya_ebpf::{
    helpers::{bpf_get_current_pid_tgid, bpf_ktime_get_ns, generated},
    macros::btf_tracepoint,
    programs::BtfTracePointContext,
};

use crate::{
    body, conn, emit,
    http1::{self, mode},
    kernel::{self, Buffer},
    maps::{CLOSED, Connection, FRESH, OPENED, QUIET, RESET, UNSURE, WORK},
    rustls, tls,
};

const MSG_OOB: i32 = 1;
const MSG_PEEK: i32 = 2;
const MSG_TRUNC: i32 = 0x20;
const MSG_ERRQUEUE: i32 = 0x2000;

/// After each send: `(struct sock *sk, int ret, int flags)`.
#[btf_tracepoint(function = "sock_send_length")]
pub fn sock_send(ctx: BtfTracePointContext) -> i32 {
    let flags: i32 = ctx.arg(2);
    let ret: i32 = ctx.arg(1);
    if ret > 0 {
        transfer(ctx.arg(0), ret as u64, 1, READABLE | if flags & MSG_OOB != 0 { URGENT } else { 0 });
    }
    0
}

/// After each receive: `(struct sock *sk, int ret, int flags)`.
#[btf_tracepoint(function = "sock_recv_length")]
pub fn sock_recv(ctx: BtfTracePointContext) -> i32 {
    received(ctx.arg(0), ctx.arg(1), ctx.arg(2));
    0
}

/// A send returned `ret`. Every door calls this.
#[inline(always)]
pub fn sent(sock: u64, ret: i32) {
    if ret > 0 {
        transfer(sock, ret as u64, 1, READABLE);
    } else if rustls::is_used() {
        rustls::waits();
    }
}

/// A receive with `flags` returned `ret`. Every door calls this.
#[inline(always)]
pub fn received(sock: u64, ret: i32, flags: i32) {
    // An urgent byte is no part of the stream.
    if flags & (MSG_OOB | MSG_PEEK | MSG_ERRQUEUE) != 0 {
        return;
    }
    if ret > 0 {
        transfer(sock, ret as u64, 0, if flags & MSG_TRUNC == 0 { READABLE } else { 0 });
    } else if ret == 0 {
        end_of_file(sock);
    }
}

/// Bits about a call: its bytes are in the application's memory.
const READABLE: u64 = 1;
/// The last one is urgent: no part of the stream, but it has a number there.
const URGENT: u64 = 2;

/// `bytes` went over `sock`; `how` is of the bits above. One copy for all doors: inlined into each program it made
/// the object twice as large.
#[inline(never)]
fn transfer(sock: u64, bytes: u64, direction: u64, how: u64) {
    let readable = how & READABLE != 0;
    let Some(connection) = conn::find_or_new(sock) else { return };
    // SAFETY: map memory of this socket; a second writer would need a second call on the same
    // direction of the same socket at the same time, which HTTP applications exclude by themselves.
    let connection = unsafe { &mut *connection };
    if connection.state & (QUIET | CLOSED) != 0 {
        return;
    }
    // SAFETY: no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    let mut is_tls = connection.tls != 0;
    if is_tls {
        tls_carries(connection, bytes, direction, readable, now);
    } else if connection.state & OPENED == 0 || connection.directions[0].mode == mode::TUNNEL {
        is_tls = tls_begins(sock, connection, bytes, direction << 1 | u64::from(readable), now);
    }
    if is_tls {
        // Called from here, since the longest chain of calls has no room for one more.
        if rustls_carries(connection.tls, bytes, direction << 1 | u64::from(readable), now)
            && let (Some(work), Some(plaintext)) = (WORK.get_ptr_mut(1), tls::plaintext(connection.tls))
        {
            // SAFETY: this CPU's own slot.
            http1::feed(unsafe { &mut *work }, plaintext, 1);
        }
        return;
    }
    let Some(work) = WORK.get_ptr_mut(direction as u32) else { return };
    // SAFETY: this CPU's own slot; send and receive have one each.
    let work = unsafe { &mut *work };
    work.pid = bpf_get_current_pid_tgid() >> 32;
    if !conn::is_wanted(work.pid as u32, connection, || kernel::ports(sock)) {
        connection.state |= QUIET;
        return;
    }
    work.now = now;
    work.began = now;
    work.sock = sock;
    work.tls = 0;
    work.direction = direction;
    if connection.directions[0].followed != 0 {
        body::follow(work, connection, sock, bytes);
    }
    let bytes = bytes - u64::from(how & URGENT != 0);
    work.left = bytes;
    work.filled = 0;
    work.vectors = 0;
    // Two stores: the compiler would call a byte-wise memset for the pair.
    http1::set(&raw mut work.length, 0);
    http1::set(&raw mut work.skip, 0);
    work.readable = 1;
    work.copied = 0;
    if readable {
        match kernel::buffer() {
            Buffer::Flat(pointer) => {
                work.pointer = pointer;
                work.length = bytes;
            }
            Buffer::Vector(vector, vectors) => {
                work.vector = vector;
                work.vectors = vectors;
            }
            Buffer::Message(message) => {
                // struct msghdr: name, namelen, iov, iovlen (16 and 24 on 64 bits).
                // Into `vector` and `vectors`.
                // SAFETY: 16 bytes of this CPU's slot; the helper checks the address.
                let failed = unsafe {
                    generated::bpf_probe_read_user((&raw mut work.vector).cast(), 16, (message + 16) as *const _)
                };
                if failed != 0 {
                    emit::count(Count::UNREADABLE);
                    work.vectors = 0;
                    work.readable = 0;
                }
            }
            Buffer::None => {
                unseen_start(connection, direction);
                work.readable = 0;
            }
            Buffer::Uring => {
                emit::count(Count::IO_URING);
                connection.state |= UNSURE;
                work.readable = 0;
            }
            Buffer::Compat => {
                emit::count(Count::COMPAT);
                connection.state |= QUIET;
                return;
            }
            Buffer::Kernel => {
                emit::count(Count::KERNEL);
                connection.state |= QUIET;
                return;
            }
            Buffer::Other => {
                emit::count(Count::SYSCALL);
                connection.state |= UNSURE;
                work.readable = 0;
            }
        }
    } else {
        unseen_start(connection, direction);
        work.readable = 0;
    }
    http1::feed(work, connection, direction);
    connection.directions[usize::from(direction != 0)].last_ts = now;
}

/// [`tls::carry`], with a stack of its own: all stacks of a chain of calls together may have 512 bytes.
#[inline(never)]
fn tls_carries(connection: &mut Connection, bytes: u64, direction: u64, readable: bool, now: u64) {
    tls::carry(connection, bytes, direction, readable, now);
}

/// [`tls::begins`], with a stack of its own, and five arguments.
#[inline(never)]
fn tls_begins(sock: u64, connection: &mut Connection, bytes: u64, how: u64, now: u64) -> bool {
    tls::begins(sock, connection, bytes, how >> 1, how & 1 != 0, now)
}

/// [`rustls::carried`]: true when what waited for it is to be read, with a stack of its own.
#[inline(never)]
fn rustls_carries(id: u64, bytes: u64, how: u64, now: u64) -> bool {
    rustls::is_used() && rustls::carried(id, bytes, how) && rustls::prepare(id, now)
}

/// A call without a buffer moved bytes: a message that begins with them cannot be seen.
#[inline(always)]
fn unseen_start(connection: &mut Connection, direction: u64) {
    if connection.directions[usize::from(direction != 0)].mode == mode::START {
        emit::count(Count::SYSCALL);
        connection.state |= UNSURE;
    }
}

/// The other end sends no more.
#[inline(always)]
fn end_of_file(sock: u64) {
    let Some(connection) = conn::find(sock) else { return };
    // SAFETY: as in `transfer`.
    let connection = unsafe { &mut *connection };
    if connection.tls != 0 {
        tls::end_of_file(connection.tls);
        return;
    }
    if connection.state & (QUIET | CLOSED) != 0 || connection.state & OPENED == 0 {
        return;
    }
    let Some(work) = WORK.get_ptr_mut(0) else { return };
    // SAFETY: as in `transfer`.
    let work = unsafe { &mut *work };
    work.sock = sock;
    work.pid = bpf_get_current_pid_tgid() >> 32;
    // SAFETY: no preconditions.
    work.now = unsafe { bpf_ktime_get_ns() };
    work.direction = 0;
    conn::end_direction(work, connection, 0);
    if kernel::family(sock) == kernel::AF_UNIX {
        emit::bare(work, connection, Kind::EOF, 0);
    }
}

const TCP_ESTABLISHED: i32 = 1;
const TCP_SYN_SENT: i32 = 2;
const TCP_SYN_RECV: i32 = 3;
const TCP_FIN_WAIT1: i32 = 4;
const TCP_CLOSE: i32 = 7;
const TCP_CLOSE_WAIT: i32 = 8;
const TCP_LAST_ACK: i32 = 9;

/// `(const struct sock *sk, const int oldstate, const int newstate)`.
#[btf_tracepoint(function = "inet_sock_set_state")]
pub fn tcp_state(ctx: BtfTracePointContext) -> i32 {
    let (sock, old, new): (u64, i32, i32) = (ctx.arg(0), ctx.arg(1), ctx.arg(2));
    match new {
        TCP_ESTABLISHED => match old {
            TCP_SYN_SENT => conn::begin(sock, crate::maps::CLIENT),
            TCP_SYN_RECV => conn::begin(sock, crate::maps::SERVER),
            _ => {}
        },
        TCP_FIN_WAIT1 => over(sock, false, false),
        TCP_LAST_ACK => over(sock, false, true),
        TCP_CLOSE if old == TCP_ESTABLISHED || old == TCP_CLOSE_WAIT => over(sock, true, false),
        _ => {}
    }
    0
}

/// The last moment of a TCP socket: `(struct sock *sk)`.
#[btf_tracepoint(function = "tcp_destroy_sock")]
pub fn tcp_destroy(ctx: BtfTracePointContext) -> i32 {
    let sock: u64 = ctx.arg(0);
    if let Some(connection) = conn::find(sock) {
        // SAFETY: as in `transfer`.
        let connection = unsafe { &mut *connection };
        let reset = kernel::error(sock) != 0;
        if connection.tls != 0 {
            if let Some(plaintext) = tls::plaintext(connection.tls) {
                finish(sock, plaintext, reset, false);
            }
            tls::forget(connection);
        }
        finish(sock, connection, reset, false);
        conn::forget(sock);
    }
    0
}

/// This end sends no more (`reset`: nobody does; `both`: the other end had closed before, and all it
/// sent was received).
#[inline(always)]
fn over(sock: u64, reset: bool, both: bool) {
    let Some(connection) = conn::find(sock) else { return };
    // SAFETY: as in `transfer`.
    let connection = unsafe { &mut *connection };
    if connection.tls != 0
        && let Some(plaintext) = tls::plaintext(connection.tls)
    {
        if reset && tls::writing(connection.tls).is_some_and(|writing| *writing != 0) {
            // What was written counts first; the rest is done when the socket goes.
            plaintext.state |= RESET;
        } else {
            over_one(sock, plaintext, reset, both);
        }
    }
    over_one(sock, connection, reset, both);
}

#[inline(always)]
fn over_one(sock: u64, connection: &mut Connection, reset: bool, both: bool) {
    if reset {
        connection.state |= RESET;
    }
    // close() sets both bits before it changes the state; shutdown(SHUT_WR) only the second. A reset
    // that came from outside sets them later: data may still wait for the application.
    if kernel::shutdown(sock) == 3 {
        finish(sock, connection, reset, both);
    } else if !reset && connection.state & (QUIET | CLOSED) == 0 && connection.state & OPENED != 0 {
        if let Some(work) = WORK.get_ptr_mut(2) {
            // SAFETY: as in `transfer`; slot 2 is for these hooks.
            let work = unsafe { &mut *work };
            // SAFETY: no preconditions.
            work.now = unsafe { bpf_ktime_get_ns() };
            work.pid = 0;
            work.direction = 1;
            conn::end_direction(work, connection, 1);
        }
    }
}

/// The application closed: the last record of the connection.
#[inline(always)]
fn finish(sock: u64, connection: &mut Connection, reset: bool, both: bool) {
    if connection.state & CLOSED != 0 {
        return;
    }
    connection.state |= CLOSED;
    // One that became quiet later is still in the agent's table.
    if connection.state & OPENED == 0 {
        return;
    }
    let Some(work) = WORK.get_ptr_mut(2) else { return };
    // SAFETY: as above.
    let work = unsafe { &mut *work };
    work.sock = sock;
    // SAFETY: no preconditions.
    work.now = unsafe { bpf_ktime_get_ns() };
    work.pid = 0;
    work.direction = 0;
    let reset = reset || connection.state & RESET != 0;
    let flags = if reset { Flag::RESET } else { 0 } | if connection.state & FRESH == 0 { Flag::LATE } else { 0 };
    conn::close(work, connection, flags, both);
}
