//! TLS of Go programs (`crypto/tls`): plaintext by goroutine.
//!
//! # Hooks
//! uprobes in the executable, never a uretprobe (it writes another return address on the stack, and Go walks
//! and moves its stacks):
//! - [`go_enter`]: entry and returns of `(*tls.Conn).clientHandshake` and `serverHandshake`, entry of `Close`.
//! - [`go_read`]: in `Read`, where it copies what it has to the caller's buffer, and where a record was read, or its
//!   end found.
//! - [`go_write`]: at the entry of `Write`, and where it is done.
//!
//! The entries are behind the stack check. All of them but the handshakes' returns are instructions that the kernel
//! executes itself (`push`, `call`, conditional jumps). Others, a return among them, cost a second trap, which a
//! hypervisor intercepts: 20 us on the machine that this was written on. Where the compiler made other code the
//! functions' return instructions are probed.
//!
//! # What identifies a call
//! The goroutine, not the thread: one that waits for the network goes on on any thread. Its `g` is in R14
//! (amd64, Go 1.17) or R28 (arm64, Go 1.18) at every boundary of a function, and in system calls, which is how
//! the socket door finds the call that it is in. A stack may be moved while a call waits; the distance to its
//! upper end, which is the second word of `g`, is kept.
//!
//! # The socket
//! The one that the goroutine uses within a call: the handshake's first, which every connection that is younger
//! than the agent has. From then on the `tls.Conn` has that socket until its next handshake. A `tls.Conn` that is
//! not on a socket of its own goroutine (`net.Pipe`) stays without one.
//!
//! # When a write counts
//! When it begins: other goroutines read what answers it and close the connection, which must not be seen before it.
//! Its bytes are counted though it may fail half-way, and its time is that of its begin. At a server, where the time
//! of the last byte matters, writes of more than [`PIECE`] bytes count when they return, with the times of their
//! system calls.

use agent_ebpf::{Count, Op, Tier};
use aya_ebpf::{
    btf_maps::{Array, LruHashMap},
    helpers::{
        bpf_get_current_pid_tgid,
        generated::{self, bpf_get_current_task_btf, bpf_probe_read_user, bpf_task_pt_regs},
    },
    macros::{btf_map, uprobe},
    programs::ProbeContext,
};

use crate::{
    emit,
    maps::{CLIENT, setting},
    registers,
    tls::{self, Call, SESSIONS, Session, Transfer},
};

/// Goroutines that are remembered, one in a read for every idle connection. Of one that was forgotten the next
/// message is missed.
const GOROUTINES: usize = 16_384;

/// Most bytes of a write that counts at once at a server: copies go in such pieces (`io.Copy`).
const PIECE: u64 = 32 << 10;

/// A goroutine: process and address of its `g`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Goroutine {
    tgid: u64,
    g: u64,
}

/// What a goroutine is in.
#[repr(C)]
pub struct Calls {
    call: Call,
    /// The call around it: a callback of a handshake talks TLS, or there is TLS within TLS.
    outer: Outer,
    /// 1 when the bytes of the write under way were counted already.
    counted: u64,
    /// Upper end of the stack, where the buffer is on the stack and moves with it; else 0.
    end: u64,
}

/// A call that waits for one within it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Outer {
    op: u64,
    stack: u64,
    session: u64,
    buffer: u64,
    size: u64,
    plain: u64,
    counted: u64,
    end: u64,
}

/// The calls that goroutines are in.
#[btf_map]
pub static GO_CALLS: LruHashMap<Goroutine, Calls, GOROUTINES, 0> = LruHashMap::new();

/// What new [`Calls`] are a copy of: zeroes.
#[btf_map]
pub static GO_BLANK: Array<Calls, 1, 0> = Array::new();

/// The call that the goroutine on this thread is in, which is in a system call.
#[inline(always)]
pub fn call() -> Option<*mut Call> {
    // SAFETY: helpers without preconditions; the task is the current one.
    let regs = unsafe { bpf_task_pt_regs(bpf_get_current_task_btf()) } as *const u64;
    // SAFETY: `regs` is a `struct pt_regs` known to the verifier by its type; the offsets are the ABI's.
    let g = unsafe { core::ptr::read_volatile(regs.add(if setting!(arch) == 0 { 1 } else { 28 })) };
    let key = Goroutine { tgid: bpf_get_current_pid_tgid() >> 32, g };
    let calls = GO_CALLS.get_ptr_mut(&key)?;
    // SAFETY: map memory of this goroutine.
    let call = unsafe { &raw mut (*calls).call };
    // SAFETY: as above.
    if unsafe { (*call).op } == 0 { None } else { Some(call) }
}

/// Entry of `Read`, `Close` and the handshakes, and returns of the latter.
#[uprobe]
pub fn go_enter(ctx: ProbeContext) -> u32 {
    registers::keep_stack(&ctx);
    match op(&ctx) {
        Op::GO_CLOSE => close(&ctx),
        Op::GO_RETURN => {
            if let Some(calls) = current(&ctx) {
                // SAFETY: map memory of this goroutine.
                let calls = unsafe { &mut *calls };
                if calls.call.op == Op::GO_HANDSHAKE && calls.call.transfer.plain != 0 {
                    let session =
                        Session { tgid: bpf_get_current_pid_tgid() >> 32, address: calls.call.transfer.session };
                    tls::bind(&session, calls.call.transfer.plain, 0, Tier::NESTED);
                    // The first request may have come with the client's last message.
                    tls::used(calls.call.transfer.plain, calls.call.transfer.last);
                }
                pop(calls);
            }
        }
        op => {
            if begin(&ctx, op).is_some() && op == Op::GO_HANDSHAKE {
                // The address may have been another connection's.
                let session = Session { tgid: bpf_get_current_pid_tgid() >> 32, address: argument(&ctx, 0) };
                let _ = SESSIONS.remove(&session);
            }
        }
    }
    0
}

/// Within `Read`, or at its returns.
#[uprobe]
pub fn go_read(ctx: ProbeContext) -> u32 {
    registers::keep_stack(&ctx);
    // A copy: what follows is the same for both cases, and looked at once by the verifier.
    let mut transfer = Transfer::default();
    let bytes = moved(&ctx, &mut transfer);
    if bytes > 0 {
        settle(&mut transfer);
        tls::deliver(&mut transfer, Op::GO_READ, bytes as u64, 0);
    } else if bytes == 0 {
        tls::ended(&transfer, Op::GO_READ);
    }
    0
}

/// Fills in what was read: how many bytes, 0 at the end, -1 for nothing to do. With a stack of its own: all stacks
/// of a chain of calls together may have 512 bytes.
#[inline(never)]
fn moved(ctx: &ProbeContext, transfer: &mut Transfer) -> i64 {
    let mut bytes = argument(ctx, 0) as i64;
    let mut error = argument(ctx, 2);
    let op = op(ctx);
    if op == Op::GO_RECORD {
        error = argument(ctx, 1);
        if bytes == 0 || !is_end(error) {
            return -1;
        }
        bytes = 0;
    }
    if op == Op::GO_SPILLED || op == Op::GO_COPY || op == Op::GO_RECORD {
        let mut arguments = [0u64; 2];
        let from = (registers::stack(ctx) + depth(ctx) + 8) as *const _;
        // SAFETY: the helper checks the address; the target has 16 bytes.
        if unsafe { bpf_probe_read_user((&raw mut arguments).cast(), 16, from) } != 0 {
            emit::count(Count::UNREADABLE);
            return -1;
        }
        transfer.session = arguments[0];
        transfer.buffer = arguments[1];
        if op != Op::GO_RECORD {
            emit::count(Count::TLS_CALLS);
        }
        if op == Op::GO_COPY {
            error = 0;
            transfer.buffer = argument(ctx, 1);
            bytes = argument(ctx, 2) as i64;
        }
    } else {
        let Some(calls) = current(ctx) else { return -1 };
        // SAFETY: map memory of this goroutine.
        let calls = unsafe { &mut *calls };
        let is_read = calls.call.op == Op::GO_READ;
        transfer.session = calls.call.transfer.session;
        transfer.buffer = calls.call.transfer.buffer;
        transfer.plain = calls.call.transfer.plain;
        transfer.first[0] = calls.call.transfer.first[0];
        transfer.last[0] = calls.call.transfer.last[0];
        pop(calls);
        if !is_read {
            return -1;
        }
    }
    if bytes > 0 {
        bytes
    } else if is_end(error) {
        0
    } else {
        -1
    }
}

/// Entry and returns of `Write`.
#[uprobe]
pub fn go_write(ctx: ProbeContext) -> u32 {
    registers::keep_stack(&ctx);
    let is_return = op(&ctx) != Op::GO_WRITE;
    let Some(calls) = (if is_return { current(&ctx) } else { begin(&ctx, Op::GO_WRITE) }) else { return 0 };
    // SAFETY: map memory of this goroutine.
    let calls = unsafe { &mut *calls };
    settle(&mut calls.call.transfer);
    let mut bytes = calls.call.transfer.size;
    if is_return {
        // Without an error it is all of it, whatever part the one that returned did.
        if argument(&ctx, 1) != 0 {
            bytes = argument(&ctx, 0);
        }
    } else {
        let early = tls::plaintext(calls.call.transfer.plain).is_some_and(|c| c.role == CLIENT || bytes <= PIECE);
        calls.counted = u64::from(early);
        if !early && let Some(writing) = tls::writing(calls.call.transfer.plain) {
            *writing = 1;
        }
    }
    if is_return != (calls.counted != 0) && calls.call.op == Op::GO_WRITE && bytes as i64 > 0 {
        tls::deliver(&mut calls.call.transfer, Op::GO_WRITE, bytes, 1);
    }
    // Asked again: a flag that is kept would have the verifier look at all of the above twice.
    if op(&ctx) != Op::GO_WRITE {
        if calls.counted == 0
            && let Some(writing) = tls::writing(calls.call.transfer.plain)
        {
            *writing = 0;
        }
        pop(calls);
    }
    0
}

/// Notes a call at its entry. `None` when it is noted already: a function that had to grow its stack begins again.
#[inline(always)]
fn begin(ctx: &ProbeContext, op: u64) -> Option<*mut Calls> {
    let (key, stack, end) = place(ctx)?;
    let calls = match GO_CALLS.get_ptr_mut(&key) {
        Some(calls) => calls,
        None => make(&key)?,
    };
    // SAFETY: map memory of this goroutine.
    let calls = unsafe { &mut *calls };
    let (session, buffer) = (argument(ctx, 0), argument(ctx, 1));
    let call = &mut calls.call;
    if call.op == op && call.stack == stack && call.transfer.session == session && call.transfer.buffer == buffer {
        return None;
    }
    emit::count(Count::TLS_CALLS);
    // A call further in leaves the one around it waiting; any other means that the one before never came back.
    calls.outer.op = 0;
    if call.op != 0 && stack < call.stack {
        calls.outer = Outer {
            op: call.op,
            stack: call.stack,
            session: call.transfer.session,
            buffer: call.transfer.buffer,
            size: call.transfer.size,
            plain: call.transfer.plain,
            counted: calls.counted,
            end: calls.end,
        };
    }
    call.op = op;
    call.stack = stack;
    call.transfer.session = session;
    call.transfer.buffer = buffer;
    call.transfer.size = argument(ctx, 2);
    call.transfer.plain = 0;
    call.transfer.first = [0; 2];
    call.transfer.last = [0; 2];
    calls.counted = 0;
    calls.end = if buffer > registers::stack(ctx) && buffer < end { end } else { 0 };
    Some(calls)
}

#[inline(always)]
fn make(key: &Goroutine) -> Option<*mut Calls> {
    let blank = GO_BLANK.get(0)?;
    if GO_CALLS.insert(key, blank, 0).is_err() {
        emit::count(Count::TLS_BUSY);
        return None;
    }
    GO_CALLS.get_ptr_mut(key)
}

/// The call that returns here, as the first of the goroutine's.
#[inline(always)]
fn current(ctx: &ProbeContext) -> Option<*mut Calls> {
    let (key, stack, end) = place(ctx)?;
    let found = GO_CALLS.get_ptr_mut(&key)?;
    // SAFETY: map memory of this goroutine.
    let calls = unsafe { &mut *found };
    if calls.call.op == 0 || calls.call.stack != stack {
        // One within it that did not come back is forgotten.
        if calls.outer.op == 0 || calls.outer.stack != stack {
            return None;
        }
        pop(calls);
    }
    if calls.end != 0 {
        calls.call.transfer.buffer = calls.call.transfer.buffer.wrapping_add(end.wrapping_sub(calls.end));
        calls.end = end;
    }
    Some(found)
}

/// The call is over: the one around it goes on.
#[inline(always)]
fn pop(calls: &mut Calls) {
    let outer = calls.outer;
    calls.outer.op = 0;
    calls.call.op = outer.op;
    calls.call.stack = outer.stack;
    calls.call.transfer.session = outer.session;
    calls.call.transfer.buffer = outer.buffer;
    calls.call.transfer.size = outer.size;
    calls.call.transfer.plain = outer.plain;
    calls.call.transfer.first = [0; 2];
    calls.call.transfer.last = [0; 2];
    calls.counted = outer.counted;
    calls.end = outer.end;
}

/// A session that has a socket keeps it: only a handshake gives it another.
#[inline(always)]
fn settle(transfer: &mut Transfer) {
    let session = Session { tgid: bpf_get_current_pid_tgid() >> 32, address: transfer.session };
    let Some(id) = SESSIONS.get_ptr(&session) else { return };
    // SAFETY: map memory.
    let id = unsafe { *id };
    if id >> 63 == 0 && tls::plaintext(id).is_some() {
        transfer.plain = id;
    }
}

/// A connection is over; where it has a socket, it ends with that.
#[inline(always)]
fn close(ctx: &ProbeContext) {
    let session = Session { tgid: bpf_get_current_pid_tgid() >> 32, address: argument(ctx, 0) };
    let Some(id) = SESSIONS.get_ptr(&session) else { return };
    // SAFETY: map memory.
    if unsafe { *id } >> 63 != 0 {
        tls::free(&session);
    }
}

/// The goroutine that runs, its stack pointer as a distance from the stack's upper end, and that end.
#[inline(always)]
fn place(ctx: &ProbeContext) -> Option<(Goroutine, u64, u64)> {
    let g = registers::register::<1, 28>(ctx);
    let mut end = 0u64;
    // SAFETY: the helper checks the address. `g` begins with its stack's bounds.
    if unsafe { bpf_probe_read_user((&raw mut end).cast(), 8, g.wrapping_add(8) as *const _) } != 0 {
        emit::count(Count::UNREADABLE);
        return None;
    }
    let key = Goroutine { tgid: bpf_get_current_pid_tgid() >> 32, g };
    Some((key, registers::stack(ctx).wrapping_add(depth(ctx)).wrapping_sub(end), end))
}

/// Is the error with this data pointer `io.EOF`? (`*errors.errorString`: a string.)
#[inline(always)]
fn is_end(error: u64) -> bool {
    let mut string = [0u64; 2];
    let mut text = 0u64;
    // SAFETY: the helper checks the addresses; the targets are locals of the right size.
    unsafe {
        error != 0
            && bpf_probe_read_user((&raw mut string).cast(), 16, error as *const _) == 0
            && string[1] == 3
            && bpf_probe_read_user((&raw mut text).cast(), 3, string[0] as *const _) == 0
            && text == u64::from_le_bytes(*b"EOF\0\0\0\0\0")
    }
}

/// Argument or result `i` of a function (Go's ABIInternal: ax, bx, cx).
#[inline(always)]
fn argument(ctx: &ProbeContext, i: usize) -> u64 {
    match i {
        0 => registers::register::<10, 0>(ctx),
        1 => registers::register::<5, 1>(ctx),
        _ => registers::register::<11, 2>(ctx),
    }
}

/// Bytes from the stack pointer to where it was at the function's entry.
#[inline(always)]
fn depth(ctx: &ProbeContext) -> u64 {
    // SAFETY: the program's own context.
    unsafe { generated::bpf_get_attach_cookie(ctx.regs.cast()) >> 8 & 0xffff }
}

/// What the probe is at.
#[inline(always)]
fn op(ctx: &ProbeContext) -> u64 {
    // SAFETY: the program's own context.
    unsafe { generated::bpf_get_attach_cookie(ctx.regs.cast()) & 0xff }
}

const _: () = assert!(size_of::<Goroutine>() == 16);
