//! Storage in SQLite, and nearly all that a database of yours takes: three short methods. `RowPersist` does the rest.
//! `cargo run -p nkv-examples --example sqlite` runs it, and `tests/sqlite.rs` has nkv-testkit check it.

use std::error::Error;

use nkv_core::rows::{Committed, HEAD, RowChange, RowPersist, Rows};
use nkv_core::{Key, NotifyKeyValue, PersistError, PersistErrorKind, PutOptions, mailbox::Mailbox};
use rusqlite::{Connection, ErrorCode, OptionalExtension, Result as SqlResult, TransactionBehavior};

#[derive(Debug)]
pub(crate) struct Sqlite(Connection);

impl Sqlite {
    pub(crate) fn open(path: &std::path::Path) -> Result<RowPersist<Self>, Box<dyn Error>> {
        let connection = Connection::open(path)?;
        connection.execute_batch(
            "PRAGMA busy_timeout = 5000; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
             CREATE TABLE IF NOT EXISTS rows (name TEXT PRIMARY KEY, bytes BLOB NOT NULL);",
        )?;
        let random = u128::from(getrandom::u64()?) << 64 | u128::from(getrandom::u64()?);
        Ok(RowPersist::new(Sqlite(connection), random))
    }

    fn commit(&mut self, expected: Option<&[u8]>, changes: &[RowChange<'_>]) -> SqlResult<Committed> {
        let transaction = self.0.transaction_with_behavior(TransactionBehavior::Immediate)?;
        if head(&transaction)?.as_deref() != expected {
            return Ok(Committed::Stale); // another program has opened the file since
        }
        for RowChange { name, bytes } in changes {
            match bytes {
                Some(bytes) => transaction.execute("INSERT OR REPLACE INTO rows VALUES (?1, ?2)", (name, bytes))?,
                None => transaction.execute("DELETE FROM rows WHERE name = ?1", [name])?,
            };
        }
        transaction.commit().map(|()| Committed::Yes)
    }
}

impl Rows for Sqlite {
    fn read(&mut self, visit: &mut dyn FnMut(&str, &[u8])) -> Result<(), PersistError> {
        let mut statement = self.0.prepare("SELECT name, bytes FROM rows").map_err(failed)?;
        let rows = statement.query_map([], |row| {
            visit(row.get_ref(0)?.as_str()?, row.get_ref(1)?.as_blob()?);
            Ok(())
        });
        rows.and_then(|mut rows| rows.try_for_each(|row| row)).map_err(failed)
    }

    fn head(&mut self) -> Result<Option<Vec<u8>>, PersistError> {
        head(&self.0).map_err(failed)
    }

    fn commit(&mut self, expected: Option<&[u8]>, changes: &[RowChange<'_>]) -> Result<Committed, PersistError> {
        Sqlite::commit(self, expected, changes).map_err(failed)
    }
}

fn head(connection: &Connection) -> SqlResult<Option<Vec<u8>>> {
    connection.query_row("SELECT bytes FROM rows WHERE name = ?1", [HEAD], |row| row.get(0)).optional()
}

fn failed(error: rusqlite::Error) -> PersistError {
    let kind = match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => PersistErrorKind::NoSpace,
        Some(ErrorCode::DatabaseBusy) => PersistErrorKind::Io,
        _ => PersistErrorKind::Poisoned, // a sync, perhaps: what the disk holds is not known
    };
    PersistError::new(kind, "SQLite failed").with_source(error)
}

fn main() -> Result<(), Box<dyn Error>> {
    let (file, key) = (tempfile::NamedTempFile::new()?, Key::new("lamp.hall")?);
    let store: NotifyKeyValue<_, Mailbox> = NotifyKeyValue::open(Sqlite::open(file.path())?)?;
    store.put(&key, "on", PutOptions::default())?;
    let again: NotifyKeyValue<_, Mailbox> = NotifyKeyValue::open(Sqlite::open(file.path())?)?;
    assert_eq!(again.get(&key).map(|record| record.value), Some("on".into()));
    assert!(store.put(&key, "off", PutOptions::default()).is_err(), "the one that opened the file last owns it");
    println!("{key} is at revision {}", again.put(&key, "dim", PutOptions::default())?);
    Ok(())
}
