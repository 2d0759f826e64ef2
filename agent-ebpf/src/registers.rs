//! What a uprobe finds in the registers: arguments, results, the stack pointer.

use core::arch::asm;

use aya_ebpf::{helpers::generated::bpf_tail_call, programs::ProbeContext};

use crate::maps::setting;

/// Keeps a uprobe's program on the stack of its thread. To be called in its first function.
///
/// From Linux 6.13 on the kernel gives programs of this type a stack for each CPU (`bpf_enable_priv_stack`). Those of
/// kprobes can share it, since no second one runs on the CPU meanwhile; those of uprobes are put aside for other threads,
/// whose runs then write over what the first one had on it: seen on 6.18, where the kernel died of it. A program that
/// has a tail call gets no such stack. This one is never made, and the verifier takes it out.
#[inline(always)]
pub fn keep_stack(ctx: &ProbeContext) {
    if setting!(arch) > 1 {
        // SAFETY: not reached: there are two architectures.
        unsafe { bpf_tail_call(ctx.regs.cast(), core::ptr::null_mut(), 0) };
    }
}

/// A word of the registers, which are a `struct pt_regs`: `X86` or `ARM`, in words.
#[inline(always)]
pub fn register<const X86: usize, const ARM: usize>(ctx: &ProbeContext) -> u64 {
    let value: u64;
    // One instruction each: the verifier wants a constant for the offset, and the compiler would make one load of the
    // two, with either. A helper that reads it costs more than the rest of most programs here.
    // SAFETY: the program's own context; the branch of another architecture is not taken.
    unsafe {
        if setting!(arch) == 0 {
            asm!("{} = *(u64 *)({} + {})", out(reg) value, in(reg) ctx.regs, const 8 * X86, options(pure, readonly, nostack));
        } else {
            asm!("{} = *(u64 *)({} + {})", out(reg) value, in(reg) ctx.regs, const 8 * ARM, options(pure, readonly, nostack));
        }
    }
    value
}

/// Argument `i` of a function (System V ABI: di, si, dx, cx, r8; AAPCS64).
#[inline(always)]
pub fn argument(ctx: &ProbeContext, i: usize) -> u64 {
    match i {
        0 => register::<14, 0>(ctx),
        1 => register::<13, 1>(ctx),
        2 => register::<12, 2>(ctx),
        3 => register::<11, 3>(ctx),
        _ => register::<9, 4>(ctx),
    }
}

/// What a function returned: ax, or x0.
#[inline(always)]
pub fn returned(ctx: &ProbeContext) -> u64 {
    register::<10, 0>(ctx)
}

/// Stack pointer.
#[inline(always)]
pub fn stack(ctx: &ProbeContext) -> u64 {
    register::<19, 31>(ctx)
}
