//! The fexit door, for kernels without the tracepoints of `socket.rs`: one run per message, at the return
//! of the protocol's own function, on a trampoline that costs no trap.
//!
//! Hooks: `tcp_sendmsg`, `tcp_recvmsg`, `unix_stream_sendmsg`, `unix_stream_recvmsg`, and before Linux 6.5
//! `tcp_sendpage` and `unix_stream_sendpage` (sendfile and splice). Minimum kernel: 5.17, for
//! `bpf_get_func_ret` and the `bpf_loop` of the parser; arm64: 6.4 (the trampoline).
//!
//! Not seen here: sockets whose protocol is replaced (sockmap, kernel TLS), which call other functions.

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{bpf_get_func_arg, bpf_get_func_ret},
    macros::fexit,
    programs::FExitContext,
};

use crate::{
    kernel,
    maps::setting,
    socket::{received, sent},
};

/// The value that the function returned.
#[inline(always)]
fn returned(ctx: &FExitContext) -> i32 {
    let mut value = 0u64;
    // SAFETY: the context is the program's own; the target is a local.
    unsafe { bpf_get_func_ret(ctx.as_ptr(), &raw mut value) };
    value as i32
}

/// An argument whose place is known at load only. (A constant one is read directly, which keeps its type.)
#[inline(always)]
fn argument(ctx: &FExitContext, n: u32) -> u64 {
    let mut value = 0u64;
    // SAFETY: as above.
    unsafe { bpf_get_func_arg(ctx.as_ptr(), n, &raw mut value) };
    value
}

/// `int tcp_sendmsg(struct sock *sk, struct msghdr *msg, size_t size)`.
#[fexit(function = "tcp_sendmsg")]
pub fn tcp_send_exit(ctx: FExitContext) -> i32 {
    sent(ctx.arg(0), returned(&ctx));
    0
}

/// `int tcp_recvmsg(struct sock *sk, struct msghdr *msg, size_t len, int flags, int *addr_len)`; before
/// Linux 5.19 with `int nonblock` in front of `flags`.
#[fexit(function = "tcp_recvmsg")]
pub fn tcp_recv_exit(ctx: FExitContext) -> i32 {
    let flags = argument(&ctx, setting!(recv_flags)) as i32;
    received(ctx.arg(0), returned(&ctx), flags);
    0
}

/// `int tcp_sendpage(struct sock *sk, struct page *page, int offset, size_t size, int flags)`.
#[fexit(function = "tcp_sendpage")]
pub fn tcp_sendpage_exit(ctx: FExitContext) -> i32 {
    sent(ctx.arg(0), returned(&ctx));
    0
}

/// `int unix_stream_sendmsg(struct socket *sock, struct msghdr *msg, size_t len)`.
#[fexit(function = "unix_stream_sendmsg")]
pub fn unix_send_exit(ctx: FExitContext) -> i32 {
    let sock = kernel::sock_of_typed(ctx.arg(0));
    if sock != 0 {
        sent(sock, returned(&ctx));
    }
    0
}

/// `int unix_stream_recvmsg(struct socket *sock, struct msghdr *msg, size_t size, int flags)`.
#[fexit(function = "unix_stream_recvmsg")]
pub fn unix_recv_exit(ctx: FExitContext) -> i32 {
    let sock = kernel::sock_of_typed(ctx.arg(0));
    if sock != 0 {
        received(sock, returned(&ctx), ctx.arg(3));
    }
    0
}

/// `ssize_t unix_stream_sendpage(struct socket *socket, struct page *page, int offset, size_t size, int flags)`.
#[fexit(function = "unix_stream_sendpage")]
pub fn unix_sendpage_exit(ctx: FExitContext) -> i32 {
    let sock = kernel::sock_of_typed(ctx.arg(0));
    if sock != 0 {
        sent(sock, returned(&ctx));
    }
    0
}
