//! What every backend must pass, in each durability.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

use nkv_persist_fs::{Durability, FsOptions, FsPersist};

/// A directory of its own for one test, opened again and again.
fn opener(durability: Durability) -> impl Fn() -> FsPersist {
    let dir = tempfile::tempdir().unwrap();
    let options = FsOptions::default().with_durability(durability).with_segment_bytes(64 << 10);
    move || FsPersist::open(dir.path().join("data"), options.clone()).unwrap()
}

mod sync {
    nkv_testkit::persist_conformance!(super::opener(super::Durability::Sync));
}

mod interval {
    use std::time::Duration;

    nkv_testkit::persist_conformance!(super::opener(super::Durability::Interval(Duration::from_millis(5))));
}

mod os {
    nkv_testkit::persist_conformance!(super::opener(super::Durability::Os));
}
