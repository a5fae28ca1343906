//! The client's decoder: see `checks::messages`, which `cargo test -p nkv-protocol` runs over the corpus too.
#![no_main]

#[path = "../../crates/nkv-protocol/tests/checks/mod.rs"]
#[allow(dead_code)]
mod checks;

libfuzzer_sys::fuzz_target!(|data: &[u8]| checks::messages(data));
