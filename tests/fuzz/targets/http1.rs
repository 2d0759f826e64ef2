//! Heads of HTTP/1 messages.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| apiscope_tests::fuzz::head(bytes));
