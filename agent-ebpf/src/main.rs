//! What runs in the kernel: socket hooks that pass on the heads of HTTP messages and count the rest.
#![no_std]
#![no_main]
// Atomic operations that return what was there: the library offers none for this target, its compiler does.
#![feature(core_intrinsics)]
#![allow(internal_features, reason = "see above; one use, in `runs`")]
// Loads from the context at an offset that the compiler leaves alone: see `registers`.
#![feature(asm_experimental_arch)]
#![allow(clippy::cast_possible_truncation, reason = "the target has 64-bit words; narrowing is what the ABI asks for")]

mod body;
mod conn;
mod emit;
mod fexit;
mod go;
mod head;
mod http1;
mod http2;
mod kernel;
mod kprobe;
mod maps;
mod once;
mod registers;
mod runs;
mod rustls;
mod session;
mod socket;
mod storage;
mod tls;
mod whole;

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier would refuse a program that can come here.
    loop {}
}

/// Helpers that read kernel and user memory are for GPL programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
pub static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
