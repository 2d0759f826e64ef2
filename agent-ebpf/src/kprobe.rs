//! The kprobe door, for kernels without the tracepoints and without trampolines (arm64 before 6.4): an
//! entry probe notes the socket and the flags of a call, a return probe has its result.
//!
//! Hooks: as in `fexit.rs`, and `unix_release` for the end of a unix socket. Minimum kernel: 5.17, for
//! `bpf_loop`.
//!
//! Two things are worse here. The kernel knows no types in these programs, so that state cannot live in
//! the socket: it is in a table by the socket's address, with a bound. And it keeps a fixed number of
//! returns per function: when more threads than that sleep in a receive, returns are missed. A thread's
//! next call shows that, and it is counted (`Count::RETURN_MISSED`).

use agent_ebpf::Count;
use aya_ebpf::{
    EbpfContext as _,
    helpers::bpf_get_current_pid_tgid,
    macros::{kprobe, kretprobe},
    programs::{ProbeContext, RetProbeContext},
};

use crate::{
    conn, emit, kernel,
    maps::{CALLS, Call, setting},
    socket::{received, sent},
};

/// Words of `struct pt_regs` that hold the first four arguments of a kernel function, and its result:
/// x86_64, arm64.
const ARGUMENTS: [[usize; 4]; 2] = [[14, 13, 12, 11], [0, 1, 2, 3]];
const RESULT: [usize; 2] = [10, 0];

/// One word of the registers.
#[inline(always)]
fn register(ctx: *mut core::ffi::c_void, x86: usize, arm: usize) -> u64 {
    let registers = ctx as u64;
    // The offset is a constant once the architecture is known, but not one that the compiler may fold: the
    // context can only be read at offsets that are written in the instruction.
    let at = if setting!(arch) == 0 { x86 } else { arm } as u64 * 8;
    kernel::read(registers + at)
}

#[inline(always)]
fn argument(ctx: &ProbeContext, n: usize) -> u64 {
    register(ctx.as_ptr(), ARGUMENTS[0][n], ARGUMENTS[1][n])
}

#[inline(always)]
fn returned(ctx: &RetProbeContext) -> i32 {
    register(ctx.as_ptr(), RESULT[0], RESULT[1]) as i32
}

/// Key of this thread's call: process and thread numbers leave the top bit free.
#[inline(always)]
fn key(direction: u64) -> u64 {
    bpf_get_current_pid_tgid() << 1 | direction
}

/// A call begins.
#[inline(always)]
fn enter(direction: u64, sock: u64, flags: u64) {
    let key = key(direction);
    if CALLS.get_ptr(&key).is_some() {
        emit::count(Count::RETURN_MISSED);
    }
    if CALLS.insert(&key, &Call { sock, flags }, 0).is_err() {
        emit::count(Count::RETURN_MISSED);
    }
}

/// It ends.
#[inline(always)]
fn leave(direction: u64) -> Option<Call> {
    let key = key(direction);
    let call = CALLS.get_ptr(&key)?;
    // SAFETY: map memory; only this thread writes this entry.
    let call = unsafe { Call { sock: (*call).sock, flags: (*call).flags } };
    // Absent is as good as removed.
    let _ = CALLS.remove(&key);
    Some(call)
}

#[inline(always)]
fn end_send(ctx: &RetProbeContext) {
    if let Some(call) = leave(1) {
        sent(call.sock, returned(ctx));
    }
}

/// `int tcp_sendmsg(struct sock *sk, …)`, `int tcp_sendpage(struct sock *sk, …)`.
#[kprobe]
pub fn tcp_send_enter(ctx: ProbeContext) -> u32 {
    enter(1, argument(&ctx, 0), 0);
    0
}

/// `int unix_stream_sendmsg(struct socket *sock, …)`, `ssize_t unix_stream_sendpage(struct socket *sock, …)`.
#[kprobe]
pub fn unix_send_enter(ctx: ProbeContext) -> u32 {
    enter(1, kernel::sock_of(argument(&ctx, 0)), 0);
    0
}

/// The end of a send.
#[kretprobe]
pub fn send_return(ctx: RetProbeContext) -> u32 {
    end_send(&ctx);
    0
}

/// `int tcp_recvmsg(struct sock *sk, struct msghdr *msg, size_t len, int flags, int *addr_len)`; before
/// Linux 5.19 the flags are the fifth argument.
#[kprobe]
pub fn tcp_recv_enter(ctx: ProbeContext) -> u32 {
    // The fifth argument: word 9 on x86_64.
    let flags = if setting!(recv_flags) == 4 { register(ctx.as_ptr(), 9, 4) } else { argument(&ctx, 3) };
    enter(0, argument(&ctx, 0), flags);
    0
}

/// `int unix_stream_recvmsg(struct socket *sock, struct msghdr *msg, size_t size, int flags)`.
#[kprobe]
pub fn unix_recv_enter(ctx: ProbeContext) -> u32 {
    enter(0, kernel::sock_of(argument(&ctx, 0)), argument(&ctx, 3));
    0
}

/// The end of a receive.
#[kretprobe]
pub fn recv_return(ctx: RetProbeContext) -> u32 {
    if let Some(call) = leave(0) {
        received(call.sock, returned(&ctx), call.flags as i32);
    }
    0
}

/// `int unix_release(struct socket *sock)`: the last moment of a unix socket.
#[kprobe]
pub fn unix_release_enter(ctx: ProbeContext) -> u32 {
    conn::forget(kernel::sock_of(argument(&ctx, 0)));
    0
}
