//! Heads of HTTP/1 messages: any bytes are read without a panic, and no query value comes through.
#![no_main]

use apiscope::proto::http1;

libfuzzer_sys::fuzz_target!(|head: &[u8]| {
    if let Some(request) = http1::request(head) {
        assert!(!request.path.contains('?') || request.path.starts_with("http"));
        assert!(request.query_keys.len() <= apiscope::exchange::MAX_QUERY_KEYS);
    }
    let _ = http1::response(head);
});
