//! Wire records: any bytes are an event or an error.
#![no_main]

libfuzzer_sys::fuzz_target!(|record: &[u8]| {
    let _ = apiscope::event::parse(record);
});
