//! Where a server listens: Unix sockets, their paths, modes and owners; and what is said of a server that does not start.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;

use nkv_core::{NoPersist, PersistError, PersistErrorKind};
use nkv_server::{Address, Options, Server, ServerError};
use tokio::runtime::{Builder, Runtime};

/// A server at a Unix socket; it ends when dropped.
#[derive(Debug)]
struct Running {
    _server: Server,
    _runtime: Runtime,
}

fn unix_server(path: &Path, options: Options) -> Result<Running, ServerError> {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let server = Server::builder().options(options).listen(Address::Unix { path: path.to_owned() });
    let server = runtime.block_on(server.bind())?;
    Ok(Running { _server: server, _runtime: runtime })
}

#[test]
fn a_unix_socket_may_be_opened_to_a_group_and_is_open_to_no_other_user_at_any_moment() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nkv.sock");
    let group = std::fs::metadata(dir.path()).unwrap().gid();
    // Only the superuser may give it to any group.
    let group = if group == 0 { 12_345 } else { group };
    let mut options = Options::default();
    (options.socket_mode, options.socket_group) = (0o660, Some(group));
    let is_over = AtomicBool::new(false);
    let seen = thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut seen = BTreeSet::new();
            while !is_over.load(Relaxed) {
                if let Ok(found) = std::fs::symlink_metadata(&path) {
                    seen.insert((found.permissions().mode() & 0o777, found.gid()));
                }
            }
            seen
        });
        for _ in 0..500 {
            drop(unix_server(&path, options).unwrap());
        }
        let server = unix_server(&path, options).unwrap();
        let found = std::fs::symlink_metadata(&path).unwrap();
        is_over.store(true, Relaxed);
        assert_eq!((found.permissions().mode() & 0o777, found.gid()), (0o660, group));
        drop(server);
        watcher.join().unwrap()
    });
    let is_too_wide = |(mode, owner): &(u32, u32)| mode & 0o117 != 0 || mode & 0o060 != 0 && *owner != group;
    assert!(!seen.iter().any(is_too_wide), "{seen:?}");
}

/// The name of a helper in the same directory was checked, which was longer than the path that clients dial.
#[test]
fn the_path_of_a_unix_socket_may_have_107_bytes_wherever_it_is_and_a_longer_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let long = |len: usize, name: &str| {
        let missing = len - dir.path().as_os_str().len() - "//".len() - name.len();
        let parent = dir.path().join("d".repeat(missing));
        std::fs::create_dir_all(&parent).unwrap();
        parent.join(name)
    };
    for (len, name) in [(91, "s"), (92, "nkv.sock"), (106, "nkv.sock"), (107, "s"), (107, "nkv.sock")] {
        let path = long(len, name);
        let _server = unix_server(&path, Options::default()).unwrap_or_else(|error| panic!("{len} {name}: {error:?}"));
        UnixStream::connect(&path).unwrap();
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "a helper is left");
    }
    for len in [108, 112] {
        let path = long(len, "nkv.sock");
        let ServerError::Bind { address, source } = unix_server(&path, Options::default()).unwrap_err() else {
            panic!("another error")
        };
        assert!(address.contains(path.to_str().unwrap()) && source.to_string().contains("107"), "{address}: {source}");
        assert!(!path.exists());
    }
}

#[test]
fn a_unix_socket_left_over_is_replaced_and_one_that_is_anothers_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nkv.sock");
    drop(UnixListener::bind(&path).unwrap());
    let server = unix_server(&path, Options::default()).unwrap();
    let refused = unix_server(&path, Options::default()).unwrap_err();
    assert!(refused.to_string().contains("nkv-server listens there"), "{refused}");
    // Another server has put its socket there; it stays when this server ends.
    std::fs::remove_file(&path).unwrap();
    let _theirs = UnixListener::bind(&path).unwrap();
    drop(server);
    UnixStream::connect(&path).unwrap();

    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "no socket").unwrap();
    assert!(unix_server(&path, Options::default()).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"no socket");
}

#[test]
fn a_server_does_not_listen_at_the_address_of_a_websocket() {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let server = Server::builder().listen("ws://127.0.0.1:0".parse().unwrap());
    let error = runtime.block_on(server.bind()).unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(
        error.to_string().contains("ws://127.0.0.1:0") && source.contains("where a client connects"),
        "{error}: {source}"
    );
}

/// The message was the word `storage`.
#[test]
fn an_error_that_keeps_a_server_from_starting_says_what_is_wrong() {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let open =
        || Err::<NoPersist, _>(PersistError::new(PersistErrorKind::Io, "cannot read the tape").with_source("torn"));
    let error = runtime.block_on(Server::builder().persist("sync", open).bind()).unwrap_err();
    assert!(matches!(error, ServerError::Persist(_)));
    assert_eq!(error.to_string(), "cannot read the tape");
    assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "torn");
}
