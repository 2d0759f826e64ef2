//! Function tables of Go programs.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| apiscope_tests::fuzz::gopclntab(bytes));
