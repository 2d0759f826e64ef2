//! Executables and libraries.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| apiscope_tests::fuzz::elf(bytes));
