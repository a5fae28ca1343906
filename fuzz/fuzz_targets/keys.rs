//! Keys and patterns: see `checks::keys`, which `cargo test -p nkv-core` runs over the corpus too.
#![no_main]

#[path = "../../crates/nkv-core/tests/checks/mod.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|data: &[u8]| checks::keys(data));
