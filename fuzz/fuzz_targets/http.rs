//! What the HTTP door reads of a request: its key, parameters, conditions, where it comes from, and its body.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nkv_http::fuzzing::request(data));
