//! The system's allocator, which counts. A program that declares this module has it, and one test alone, since there
//! is one count.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

/// What was asked of it.
pub struct Counting {
    /// Allocations so far.
    pub calls: AtomicUsize,
    /// Bytes held now.
    pub held: AtomicUsize,
    /// Allocations held now.
    pub blocks: AtomicUsize,
}

// SAFETY: everything is handed on as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.held.fetch_add(layout.size(), Ordering::Relaxed);
        self.blocks.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as asked for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        self.held.fetch_sub(layout.size(), Ordering::Relaxed);
        self.blocks.fetch_sub(1, Ordering::Relaxed);
        // SAFETY: it came from `alloc`.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
pub static ALLOCATOR: Counting =
    Counting { calls: AtomicUsize::new(0), held: AtomicUsize::new(0), blocks: AtomicUsize::new(0) };
