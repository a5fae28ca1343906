//! A storage backend of your own: one JSON file for each key, which people can read and `grep`.
//!
//! ```text
//! cargo run -p nkv-examples --example custom_persist [DIR]
//! ```
//!
//! A key is never part of a path: files are numbered, the key stands inside. A batch touches several files, yet it has
//! to survive whole or not at all. So it goes into a journal first, as one file put in place by one rename; that is the
//! moment at which it happened. Then each key's file is brought up to date. Opening the directory applies the
//! journal again, which does no harm if it was done. The journal also holds what no key's file could: the epoch,
//! and the newest revision even when its key was deleted.
//!
//! `tests/custom_persist.rs` has nkv-testkit check the contract. A write costs a few syncs for each key, so this is for
//! state that is small and changes seldom; `nkv-persist-fs` is for the rest.

use std::collections::HashMap;
use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nkv_core::mailbox::Mailbox;
use nkv_core::{
    Action, Change, Epoch, Expiry, Key, Loaded, NotifyKeyValue, Op, Pattern, PersistError, PersistErrorKind,
    PersistValue, PutOptions, Record, Revision, StoredRef, Timestamp,
};
use serde::{Deserialize, Serialize};

/// The last batch, the newest revision and the epoch.
const JOURNAL: &str = "journal.json";
/// What is being written, until it is whole.
const NEXT: &str = "next";

/// Keeps each key in a JSON file of its own.
#[derive(Debug)]
pub(crate) struct JsonFiles {
    dir: PathBuf,
    epoch: Epoch,
    revision: Revision,
    /// The number of each key's file.
    files: HashMap<Key, u64>,
    next_file: u64,
    /// Locked as long as we live.
    _lock: File,
}

/// What a key's file holds, and a line of the journal.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    key: String,
    revision: u64,
    /// None in the journal, when the key was deleted.
    value: Option<Value>,
    /// When it ends, and how long it was to live.
    expiry: Option<(u64, u64)>,
}

/// A text where it is one, so that people can read it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Value {
    Text(String),
    Bytes(Vec<u8>),
}

#[derive(Debug, Serialize, Deserialize)]
struct Journal {
    epoch: String,
    revision: u64,
    batch: Vec<Entry>,
}

impl JsonFiles {
    /// Opens a directory, made if it is not there.
    pub(crate) fn open(dir: impl Into<PathBuf>) -> Result<Self, PersistError> {
        let dir = dir.into();
        let cannot = |error| failed(PersistErrorKind::Io, format!("cannot open {}", dir.display()), error);
        fs::create_dir_all(&dir).map_err(cannot)?;
        let lock = File::create(dir.join("lock")).map_err(cannot)?;
        if lock.try_lock().is_err() {
            return Err(PersistError::new(PersistErrorKind::InUse, format!("{} is in use", dir.display())));
        }
        let (epoch, revision) = (Epoch::default(), Revision::ZERO);
        let mut store = JsonFiles { dir, epoch, revision, files: HashMap::new(), next_file: 0, _lock: lock };
        store.recover().map_err(|error| {
            let kind =
                if error.kind() == io::ErrorKind::InvalidData { PersistErrorKind::Damaged } else { kind(&error) };
            failed(kind, format!("cannot read {}", store.dir.display()), error)
        })?;
        Ok(store)
    }

    /// Finds the files, and does the last batch again, in case it had not been done to its end.
    fn recover(&mut self) -> io::Result<()> {
        for found in fs::read_dir(&self.dir)? {
            let name = found?.file_name();
            let number = name.to_str().and_then(|name| name.strip_suffix(".json")).and_then(|name| name.parse().ok());
            let Some(number) = number else { continue };
            self.files.insert(key(&read::<Entry>(&self.path(number))?.key)?, number);
            self.next_file = self.next_file.max(number + 1);
        }
        let journal: Journal = match read(&self.dir.join(JOURNAL)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.files.is_empty() => self.begin()?,
            journal => journal?,
        };
        self.epoch = journal.epoch.parse().map_err(invalid)?;
        self.revision = Revision::new(journal.revision);
        self.apply(&journal.batch)
    }

    /// The journal of a new directory.
    fn begin(&self) -> io::Result<Journal> {
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(io::Error::other)?;
        let epoch = Epoch::new(u128::from_ne_bytes(random)).to_string();
        let journal = Journal { epoch, revision: 0, batch: Vec::new() };
        self.stage(&journal)?;
        self.place(&self.dir.join(JOURNAL))?;
        sync_dir(self.dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")))?;
        sync_dir(&self.dir)?;
        Ok(journal)
    }

    /// Puts the staged journal in place, for good, and does what it says.
    fn commit(&mut self, journal: &Journal) -> io::Result<()> {
        self.place(&self.dir.join(JOURNAL))?;
        sync_dir(&self.dir)?;
        self.revision = Revision::new(journal.revision);
        self.apply(&journal.batch)
    }

    fn apply(&mut self, batch: &[Entry]) -> io::Result<()> {
        for entry in batch {
            let key = key(&entry.key)?;
            if entry.value.is_some() {
                let number = *self.files.entry(key).or_insert(self.next_file);
                self.next_file = self.next_file.max(number + 1);
                self.stage(entry)?;
                self.place(&self.path(number))?;
            } else if let Some(number) = self.files.remove(&key) {
                fs::remove_file(self.path(number))?;
            }
        }
        sync_dir(&self.dir)
    }

    fn path(&self, number: u64) -> PathBuf {
        self.dir.join(format!("{number}.json"))
    }

    /// Writes a file under a name that no reader uses, and syncs it.
    fn stage(&self, content: &impl Serialize) -> io::Result<()> {
        let mut file = File::create(self.dir.join(NEXT))?;
        file.write_all(&serde_json::to_vec(content)?)?;
        file.sync_all()
    }

    /// Gives the staged file its name: readers find the old content or the new one, nothing between.
    fn place(&self, path: &Path) -> io::Result<()> {
        fs::rename(self.dir.join(NEXT), path)
    }
}

impl PersistValue for JsonFiles {
    fn load(&mut self, visit: &mut dyn FnMut(StoredRef<'_>)) -> Result<Loaded, PersistError> {
        for number in self.files.values() {
            let path = self.path(*number);
            let record = read::<Entry>(&path).and_then(Entry::into_record);
            let damaged = |error| failed(PersistErrorKind::Damaged, format!("in {}", path.display()), error);
            visit(record.map_err(damaged)?.lend().into());
        }
        Ok(Loaded { epoch: self.epoch, revision: self.revision })
    }

    fn persist(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        let revision = batch.last().map_or(self.revision, |change| change.revision).get();
        let batch = batch.iter().map(Entry::from).collect();
        let journal = Journal { epoch: self.epoch.to_string(), revision, batch };
        // Up to here no reader uses the new file: the batch was not stored.
        self.stage(&journal).map_err(|error| failed(kind(&error), "cannot write the journal", error))?;
        // From here on the batch may be there after a restart, which does what is left to do.
        let unknown = |error| failed(PersistErrorKind::Poisoned, "the last batch was written in part", error);
        self.commit(&journal).map_err(unknown)
    }
}

impl Entry {
    fn into_record(self) -> io::Result<Record> {
        let value = match self.value {
            Some(Value::Text(text)) => text.into(),
            Some(Value::Bytes(bytes)) => bytes.into(),
            None => return Err(invalid("a file without a value")),
        };
        let expiry = self.expiry.map(|(at, ttl_ms)| Expiry { at: Timestamp::from_millis(at), ttl_ms });
        Ok(Record { key: key(&self.key)?, value, revision: Revision::new(self.revision), expiry })
    }
}

impl From<&Change> for Entry {
    fn from(change: &Change) -> Self {
        let (value, expiry) = match &change.action {
            Action::Put { value, expiry } => (Some(value), expiry.map(|expiry| (expiry.at.as_millis(), expiry.ttl_ms))),
            Action::Delete { .. } => (None, None),
        };
        let value = value.map(|bytes| match std::str::from_utf8(bytes) {
            Ok(text) => Value::Text(text.to_owned()),
            Err(_) => Value::Bytes(bytes.to_vec()),
        });
        Entry { key: change.key.to_string(), revision: change.revision.get(), value, expiry }
    }
}

fn read<T: for<'a> Deserialize<'a>>(path: &Path) -> io::Result<T> {
    serde_json::from_slice(&fs::read(path)?).map_err(invalid)
}

fn key(text: &str) -> io::Result<Key> {
    Key::new(text).map_err(invalid)
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

fn invalid(error: impl Into<Box<dyn Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

fn kind(error: &io::Error) -> PersistErrorKind {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => PersistErrorKind::NoSpace,
        _ => PersistErrorKind::Io,
    }
}

fn failed(kind: PersistErrorKind, context: impl Into<String>, error: io::Error) -> PersistError {
    PersistError::new(kind, context).with_source(error)
}

type Store = NotifyKeyValue<JsonFiles, Mailbox>;

fn main() -> Result<(), Box<dyn Error>> {
    let temporary = tempfile::tempdir()?;
    let dir = std::env::args_os().nth(1).map_or_else(|| temporary.path().join("state"), PathBuf::from);

    let store: Store = NotifyKeyValue::open(JsonFiles::open(&dir)?)?;
    let put = |key: &str, value: &'static str| -> Result<Op, Box<dyn Error>> {
        Ok(Op::Put { key: Key::new(key)?, value: value.into(), options: PutOptions::default() })
    };
    store.write(&[put("lamp.hall", "on")?, put("lamp.cellar", "off")?, put("/etc/passwd", "just a key")?])?;
    store.put(&Key::new("lamp.attic")?, "on", PutOptions::default())?;
    store.delete(&Pattern::new("lamp.attic")?, None)?;
    let before = store.stats();
    assert!(matches!(JsonFiles::open(&dir), Err(error) if error.kind() == PersistErrorKind::InUse));
    drop(store);

    let mut found: Vec<PathBuf> = fs::read_dir(&dir)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    found.sort();
    for path in &found {
        println!("{}: {}", path.display(), fs::read_to_string(path)?);
    }

    let store: Store = NotifyKeyValue::open(JsonFiles::open(&dir)?)?;
    let after = store.stats();
    assert_eq!((after.epoch, after.revision, after.keys), (before.epoch, before.revision, before.keys));
    assert_eq!(store.get(&Key::new("lamp.hall")?).map(|record| record.value), Some("on".into()));
    assert!(store.get(&Key::new("lamp.attic")?).is_none());
    println!("opened again: {} keys, revision {}, epoch {}", after.keys, after.revision, after.epoch);
    Ok(())
}
