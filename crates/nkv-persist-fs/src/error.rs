//! How failures of files become the errors of the trait.

use std::io;

use nkv_core::{PersistError, PersistErrorKind};

use crate::format::{VERSION, VERSION_MIN};

/// An error of the operating system, while `doing` something to the file `name`.
pub(crate) fn from_io(doing: &str, name: &str, error: io::Error) -> PersistError {
    let kind = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            PersistErrorKind::NoSpace
        }
        _ => PersistErrorKind::Io,
    };
    PersistError::new(kind, format!("cannot {doing} {name}")).with_source(error)
}

/// Data that cannot be trusted, with its place.
pub(crate) fn damaged(name: &str, offset: u64, reason: &str) -> PersistError {
    PersistError::new(PersistErrorKind::Damaged, format!("{name} is damaged at offset {offset}: {reason}"))
}

/// It is not known what the storage holds.
pub(crate) fn poisoned(context: &str) -> PersistError {
    PersistError::new(PersistErrorKind::Poisoned, context)
}

/// Data in a format that this program does not know.
pub(crate) fn other_version(name: &str, version: u32) -> PersistError {
    let context = format!(
        "{name} has format version {version}, and this program reads versions {VERSION_MIN} to {VERSION}: use the program that \
         wrote it"
    );
    PersistError::new(PersistErrorKind::OtherVersion, context)
}
