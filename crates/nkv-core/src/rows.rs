//! Databases as storage: [`RowPersist`] keeps the contract of [`PersistValue`] with [rows](Rows), each a name and some bytes,
//! that are changed in transactions.
//!
//! There is one row for each key, with its record, and one more, [`HEAD`], that says what the rows together are: epoch,
//! highest revision, owner, and which commit of the owner it was. A commit writes the rows of a batch and a new head, if the
//! head is still the one that this instance wrote. That one comparison keeps two instances apart, and shows after a lost
//! connection whether the commit happened.

use std::collections::HashSet;
use std::fmt;

use crate::key::KeyRef;
use crate::persist::{Loaded, PersistError, PersistErrorKind, PersistValue, StoredRef};
use crate::record::{Action, Change, Expiry, RecordRef, Timestamp, ValueRef};
use crate::revision::{Epoch, Revision};

/// The name of the row that is no key's.
pub const HEAD: &str = ".head";

/// How often an opening tries to become the owner while others do so too.
const TRIES: usize = 16;

/// Rows of bytes, changed in transactions: what a database does for [`RowPersist`].
///
/// Names are keys, also [reserved](crate::Key::reserved) ones, and [`HEAD`]: up to 1,024 bytes of UTF-8, to be compared byte by byte. `nkv_testkit::persist` and
/// `nkv_testkit::fencing` check a `RowPersist` over them.
pub trait Rows: fmt::Debug + Send + 'static {
    /// Visits every row, all of one moment, in no particular order.
    ///
    /// # Errors
    ///
    /// [`PersistErrorKind::Io`] when they cannot be read.
    fn read(&mut self, visit: &mut dyn FnMut(&str, &[u8])) -> Result<(), PersistError>;

    /// The bytes of [`HEAD`]. A commit of this instance whose outcome is not known has ended by then, either way: where
    /// it may still be under way, the row is read under a lock.
    ///
    /// # Errors
    ///
    /// [`PersistErrorKind::Io`] when it cannot be read.
    fn head(&mut self) -> Result<Option<Vec<u8>>, PersistError>;

    /// In one transaction: if the bytes of [`HEAD`] are `head`, does all of `changes`, durably; else nothing. The names are
    /// different, and [`HEAD`] is one of them.
    ///
    /// # Errors
    ///
    /// Those of [`PersistValue::persist`]. After [`PersistErrorKind::Poisoned`] the rows are not asked again.
    fn commit(&mut self, head: Option<&[u8]>, changes: &[RowChange<'_>]) -> Result<Committed, PersistError>;
}

/// What becomes of one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowChange<'a> {
    /// Which one.
    pub name: &'a str,
    /// Its bytes from now on; `None` removes it.
    pub bytes: Option<Vec<u8>>,
}

/// What became of a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Committed {
    /// It is done.
    Yes,
    /// The head was another; nothing was changed.
    Stale,
    /// The connection was lost: it may be done or not, and [`Rows::head`] will show which.
    Unknown,
}

/// Keeps values in [`Rows`].
///
/// # Examples
///
/// `examples/sqlite.rs` is a backend for SQLite.
#[derive(Debug)]
pub struct RowPersist<R> {
    rows: R,
    random: u128,
    /// The newest head that this instance has written, once it owns the rows.
    head: Option<Head>,
    /// Commits that were tried: no two heads are the same.
    commits: u64,
}

impl<R: Rows> RowPersist<R> {
    /// Storage in `rows`. The number is random and a new one at each opening: it is the name of this owner, and becomes the
    /// epoch of rows that are empty.
    pub fn new(rows: R, random: u128) -> Self {
        RowPersist { rows, random, head: None, commits: 0 }
    }

    /// Becomes the owner; whichever instance was it before stores nothing any more.
    fn take_over(&mut self) -> Result<Head, PersistError> {
        for _ in 0..TRIES {
            let found = self.rows.head()?;
            let known = found.as_deref().map(Head::decode).transpose()?;
            let new = known.unwrap_or(Head { epoch: self.random, ..Head::default() });
            let head = self.next(Head { owner: self.random, ..new });
            match self.commit(found.as_deref(), &head, Vec::new())? {
                Committed::Yes => return Ok(head),
                Committed::Stale | Committed::Unknown => {}
            }
        }
        Err(PersistError::new(PersistErrorKind::InUse, "others open the storage again and again"))
    }

    fn next(&mut self, head: Head) -> Head {
        self.commits = self.commits.saturating_add(1);
        Head { commit: self.commits, ..head }
    }

    /// Stores changes with a head that follows `before`.
    fn store(&mut self, before: Head, head: Head, changes: Vec<RowChange<'_>>) -> Result<(), PersistError> {
        let head = self.next(head);
        match self.commit(Some(&before.encode()), &head, changes)? {
            Committed::Yes => {
                self.head = Some(head);
                Ok(())
            }
            Committed::Stale => {
                Err(PersistError::new(PersistErrorKind::Poisoned, "another instance owns the storage now"))
            }
            Committed::Unknown => {
                Err(PersistError::new(PersistErrorKind::Io, "the connection was lost before the batch was stored"))
            }
        }
    }

    /// `Unknown` if it is known, by now, that nothing was changed.
    fn commit(
        &mut self,
        before: Option<&[u8]>,
        head: &Head,
        mut changes: Vec<RowChange<'_>>,
    ) -> Result<Committed, PersistError> {
        let bytes = head.encode();
        changes.push(RowChange { name: HEAD, bytes: Some(bytes.clone()) });
        match self.rows.commit(before, &changes)? {
            Committed::Unknown => {}
            known => return Ok(known),
        }
        let found = self.rows.head().map_err(|error| {
            let context = "a connection was lost during a commit, and what became of that cannot be found out";
            PersistError::new(PersistErrorKind::Poisoned, context).with_source(error)
        })?;
        Ok(match found {
            Some(found) if found == bytes => Committed::Yes,
            found if found.as_deref() == before => Committed::Unknown,
            _ => Committed::Stale,
        })
    }
}

impl<R: Rows> PersistValue for RowPersist<R> {
    fn load(&mut self, visit: &mut dyn FnMut(StoredRef<'_>)) -> Result<Loaded, PersistError> {
        let head = self.take_over()?;
        let (ours, mut found, mut wrong) = (head.encode(), false, None);
        self.rows.read(&mut |name, bytes| match name {
            HEAD => found = *bytes == *ours,
            name => match decode(name, bytes) {
                Some(stored) => visit(stored),
                None => wrong = Some(name.to_owned()),
            },
        })?;
        if let Some(name) = wrong {
            return Err(PersistError::new(
                PersistErrorKind::Damaged,
                format!("the row {name:?} is no record of a key"),
            ));
        }
        if !found {
            return Err(PersistError::new(PersistErrorKind::InUse, "another instance opened the storage meanwhile"));
        }
        self.head = Some(head);
        Ok(Loaded { epoch: Epoch::new(head.epoch), revision: Revision::new(head.revision) })
    }

    fn persist(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        let (Some(before), Some(last)) = (self.head, batch.last()) else {
            return Err(PersistError::new(
                PersistErrorKind::Rejected,
                "nothing was loaded, or nothing is to be stored",
            ));
        };
        let mut seen = HashSet::new();
        // Of several changes of one key the last counts.
        let newest = batch.iter().rev().filter(|change| seen.insert(&change.key));
        let changes = newest.map(|change| RowChange { name: change.key.as_str(), bytes: encode(change) }).collect();
        self.store(before, Head { revision: last.revision.get(), ..before }, changes)
    }

    fn keeps_meta(&self) -> bool {
        true
    }

    fn begin_epoch(&mut self, epoch: Epoch) -> Result<(), PersistError> {
        let Some(before) = self.head else {
            return Err(PersistError::new(PersistErrorKind::Rejected, "nothing was loaded"));
        };
        let mut names = Vec::new();
        self.rows.read(&mut |name, _| names.push(name.to_owned()))?;
        let names = names.iter().filter(|name| *name != HEAD);
        let changes = names.map(|name| RowChange { name, bytes: None }).collect();
        self.store(before, Head { epoch: epoch.get(), revision: 0, ..before }, changes)
    }
}

/// What the rows together are. No two commits write the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Head {
    epoch: u128,
    revision: u64,
    owner: u128,
    commit: u64,
}

impl Head {
    fn encode(&self) -> Vec<u8> {
        let Head { epoch, revision, owner, commit } = self;
        [&epoch.to_le_bytes()[..], &revision.to_le_bytes(), &owner.to_le_bytes(), &commit.to_le_bytes()].concat()
    }

    fn decode(bytes: &[u8]) -> Result<Head, PersistError> {
        let head = || {
            let (epoch, rest) = bytes.split_first_chunk()?;
            let (revision, rest) = rest.split_first_chunk()?;
            let (owner, rest) = rest.split_first_chunk()?;
            let (epoch, revision) = (u128::from_le_bytes(*epoch), u64::from_le_bytes(*revision));
            let (owner, commit) = (u128::from_le_bytes(*owner), u64::from_le_bytes(rest.try_into().ok()?));
            Some(Head { epoch, revision, owner, commit })
        };
        head().ok_or_else(|| PersistError::new(PersistErrorKind::Damaged, format!("the row {HEAD:?} cannot be read")))
    }
}

/// What the second part of a row says.
const HAS_EXPIRY: u8 = 1;
const HAS_META: u8 = 2;
const IS_TOMBSTONE: u8 = 4;

/// What a change leaves of its key as a row: revision, flags, when and after how long it expires, then, if a flag says so, how
/// long the meta is and the meta itself, and the value. `None` if it leaves nothing.
fn encode(change: &Change) -> Option<Vec<u8>> {
    let meta = change.meta.as_bytes();
    let (value, expiry, kind) = match &change.action {
        Action::Put { value, expiry } => (&value[..], *expiry, 0),
        Action::Delete { .. } if meta.is_some() => (&[][..], None, IS_TOMBSTONE),
        Action::Delete { .. } => return None,
    };
    let flag = |flag, is_set| if is_set { flag } else { 0 };
    let flags = [kind | flag(HAS_EXPIRY, expiry.is_some()) | flag(HAS_META, meta.is_some())];
    let Expiry { at, ttl_ms } = expiry.unwrap_or(Expiry { at: Timestamp::MIN, ttl_ms: 0 });
    let (revision, at, ttl_ms) =
        (change.revision.get().to_le_bytes(), at.as_millis().to_le_bytes(), ttl_ms.to_le_bytes());
    let meta_len = meta.map(|meta| (meta.len() as u32).to_le_bytes());
    let meta_len = meta_len.as_ref().map_or(&[][..], |len| len);
    Some([&revision[..], &flags, &at, &ttl_ms, meta_len, meta.unwrap_or_default(), value].concat())
}

fn decode<'a>(name: &'a str, bytes: &'a [u8]) -> Option<StoredRef<'a>> {
    let (revision, rest) = bytes.split_first_chunk()?;
    let ([flags], rest) = rest.split_first_chunk()?;
    let (at, rest) = rest.split_first_chunk()?;
    let (ttl_ms, mut value) = rest.split_first_chunk()?;
    let mut meta = None;
    if flags & HAS_META != 0 {
        let (len, rest) = value.split_first_chunk()?;
        let (bytes, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
        (meta, value) = (Some(bytes), rest);
    }
    let revision = Revision::new(u64::from_le_bytes(*revision));
    if flags & IS_TOMBSTONE != 0 {
        return Some(StoredRef::Tombstone { key: KeyRef::stored(name).ok()?, revision, meta: meta? });
    }
    let key = KeyRef::new(name).ok()?;
    let expiry = Expiry { at: Timestamp::from_millis(u64::from_le_bytes(*at)), ttl_ms: u64::from_le_bytes(*ttl_ms) };
    let expiry = (flags & HAS_EXPIRY != 0).then_some(expiry);
    Some(StoredRef::Record { record: RecordRef { key, value: ValueRef::Lent(value), revision, expiry }, meta })
}
