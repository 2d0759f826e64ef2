//! Wire records, and the connection table that takes them.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| apiscope_tests::fuzz::records(bytes));
