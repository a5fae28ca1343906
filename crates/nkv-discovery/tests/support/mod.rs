//! Programs that tests need.

#![allow(dead_code, reason = "each test uses some of it")]
#![allow(clippy::unwrap_used, reason = "a helper of a test fails like a test")]

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) const OWN: &str = "127.0.0.1:7000";

pub(crate) fn own() -> SocketAddr {
    OWN.parse().unwrap()
}

/// A program: by a variable, in `target/servers`, or on the path. Without it a test is skipped, and in CI fails.
pub(crate) fn program(variable: &str, name: &str) -> Option<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target"), PathBuf::from);
    let mut places: Vec<PathBuf> = std::env::var_os(variable).map(PathBuf::from).into_iter().collect();
    places.extend(["servers", "servers/nats"].map(|dir| target.join(dir).join(name)));
    let path = std::env::var_os("PATH").unwrap_or_default();
    places.extend(std::env::split_paths(&path).map(|dir| dir.join(name)));
    places.extend(["/usr/sbin", "/usr/local/sbin"].map(|dir| Path::new(dir).join(name)));
    let found = places.into_iter().find(|place| place.is_file());
    if found.is_none() {
        assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "CI must have {name}");
        println!("skipped: there is no {name} ({variable}, target/servers, PATH)");
    }
    found
}

/// A port that is free for TCP, and at this moment for UDP.
pub(crate) fn free_port() -> u16 {
    let is_free = |port: &u16| UdpSocket::bind((Ipv4Addr::LOCALHOST, *port)).is_ok();
    std::iter::repeat_with(nkv_testkit::port::free_port).find(is_free).expect("without an end")
}
