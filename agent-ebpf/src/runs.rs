//! Working memory of the uprobes' programs. The kernel may put one aside for another on the same CPU.

use core::intrinsics::{AtomicOrdering, atomic_and, atomic_or};

use agent_ebpf::Count;
use aya_ebpf::{btf_maps::PerCpuArray, macros::btf_map};

use crate::{
    emit,
    maps::{TLS_RUNS, WORK, Work},
};

/// [0]: bits of the runs of this CPU that are under way.
#[btf_map]
pub static RUNS: PerCpuArray<u64, 1, 0> = PerCpuArray::new();

/// Takes memory of this CPU that no run put aside is using.
#[inline(always)]
pub fn claim() -> Option<(*mut Work, u64)> {
    let runs = RUNS.get_ptr_mut(0)?;
    let mut i = 0;
    while i < u64::from(TLS_RUNS) {
        // SAFETY: this CPU's word; runs of this CPU come between each other at any place.
        let before = unsafe { atomic_or::<u64, u64, { AtomicOrdering::SeqCst }>(runs, 1 << i) };
        if before & (1 << i) == 0 {
            return WORK.get_ptr_mut(3 + i as u32).map(|work| (work, i));
        }
        i += 1;
    }
    emit::count(Count::TLS_BUSY);
    None
}

#[inline(always)]
pub fn release(run: u64) {
    if let Some(runs) = RUNS.get_ptr_mut(0) {
        // SAFETY: as in `claim`.
        unsafe { atomic_and::<u64, u64, { AtomicOrdering::SeqCst }>(runs, !(1 << run)) };
    }
}
