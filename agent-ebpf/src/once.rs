//! Functions that the verifier looks at once.
//!
//! It walks into an ordinary function at every call, with all it knows of the arguments: what is called at
//! the end of fifty ways is looked at fifty times. A function with external linkage is looked at once, for
//! any arguments of its types, and a call of it is a check of those types
//! (<https://docs.kernel.org/bpf/verifier.html>). So the parts that many ways lead to are such functions.
//!
//! They must be `extern "C"` with `#[unsafe(no_mangle)]`, take numbers and pointers to sized types, check the
//! pointers for null themselves, and return a number (kernels before 6.8 know no other result). A pointer
//! into the kernel, such as a socket, can not be handed to them as such. What is a callback of `bpf_loop`
//! can not be one.

use core::ptr::read_volatile;

use crate::maps::{Connection, Work};

/// The arguments that nearly all of them take. `None` never comes, but the verifier must see that it is checked.
// SAFETY: callers pass pointers that they made of references, for the time of the call.
#[inline(always)]
pub unsafe fn once<'a>(work: *mut Work, connection: *mut Connection) -> Option<(&'a mut Work, &'a mut Connection)> {
    if work.is_null() || connection.is_null() {
        return None;
    }
    // SAFETY: by the caller.
    Some(unsafe { (&mut *work, &mut *connection) })
}

/// The result of one of them as what a callback returns, 0 or 1: of the range of results the verifier knows
/// nothing, and the compiler knows it and would leave the mask out.
#[inline(always)]
pub fn flag(result: i64) -> i64 {
    // SAFETY: a local.
    (unsafe { read_volatile(&raw const result) }) & 1
}
