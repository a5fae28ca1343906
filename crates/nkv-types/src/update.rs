//! To change a value that others change too: read it, decide, write if it is still as it was read, or begin again.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use bytes::Bytes;
use nkv_core::Key;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::entry::{Deleted, Entry};
use crate::error::{Error, ErrorKind, Result};
use crate::options::PutOptions;
use crate::revision::Revision;
use crate::value::{IntoValue, to_json};

/// The pause after the first conflict is a random part of this, that after the next of twice as much, up to `PAUSE_MAX`.
const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(128);

/// What an update makes of a key. A value alone stands for [`Edit::put`].
///
/// # Examples
///
/// ```
/// use nkv_types::Edit;
///
/// let take_one = |left: Option<u32>| match left {
///     None | Some(0) => Edit::Keep,
///     Some(1) => Edit::Delete,
///     Some(left) => Edit::put(left - 1),
/// };
/// assert_eq!(take_one(Some(3)), Edit::put(2));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Edit<V = Bytes> {
    /// The key is to have this value.
    #[non_exhaustive]
    Put {
        /// The value.
        value: V,
        /// How long it lives; forever if not given.
        ttl: Option<Duration>,
    },
    /// There is to be no such key.
    Delete,
    /// It stays as it is, and nothing is written.
    Keep,
}

impl<V> Edit<V> {
    /// The key is to have this value.
    pub fn put(value: V) -> Self {
        Edit::Put { value, ttl: None }
    }

    /// Sets how long the value lives, at least a millisecond.
    #[must_use]
    pub fn with_ttl(self, ttl: Duration) -> Self {
        match self {
            Edit::Put { value, .. } => Edit::Put { value, ttl: Some(ttl) },
            other => other,
        }
    }

    /// The same with another value, or why there is none.
    ///
    /// # Errors
    ///
    /// Those of `f`.
    pub fn try_map<W>(self, f: impl FnOnce(V) -> Result<W>) -> Result<Edit<W>> {
        Ok(match self {
            Edit::Put { value, ttl } => Edit::Put { value: f(value)?, ttl },
            Edit::Delete => Edit::Delete,
            Edit::Keep => Edit::Keep,
        })
    }
}

impl<V> From<V> for Edit<V> {
    fn from(value: V) -> Self {
        Edit::put(value)
    }
}

/// What an update of bytes may give: a value, or an [`Edit`].
pub trait IntoEdit {
    /// The edit.
    fn into_edit(self) -> Edit;
}

impl<V: IntoValue> IntoEdit for V {
    fn into_edit(self) -> Edit {
        Edit::put(self.into_value())
    }
}

impl<V: IntoValue> IntoEdit for Edit<V> {
    fn into_edit(self) -> Edit {
        match self {
            Edit::Put { value, ttl } => Edit::Put { value: value.into_value(), ttl },
            Edit::Delete => Edit::Delete,
            Edit::Keep => Edit::Keep,
        }
    }
}

/// What [`update`] needs of a store.
pub trait UpdateStore {
    /// The value of a key.
    fn read(&self, key: &Key) -> impl Future<Output = Result<Option<Entry>>> + Send;

    /// Writes a value if the key is as [`PutOptions::if_revision`] says.
    fn write(&self, key: &Key, value: Bytes, options: PutOptions) -> impl Future<Output = Result<Revision>> + Send;

    /// Deletes a key if it is at this revision.
    fn delete(&self, key: &Key, if_revision: Revision) -> impl Future<Output = Result<Deleted>> + Send;

    /// Waits before the next attempt. False if there is no time for one: then the update fails with the conflict.
    fn pause(&self, pause: Duration) -> impl Future<Output = bool> + Send;
}

/// Reads a key and writes what `edit` makes of it, if it is still as it was read; if not, it begins again after a random
/// pause. Gives what the key holds then. A write whose outcome is not known is not done again.
///
/// # Errors
///
/// Those of the store and of `edit`; [`ErrorKind::Conflict`] when there is no time left.
pub async fn update<S: UpdateStore>(
    store: &S,
    key: &Key,
    mut edit: impl FnMut(Option<&Entry>) -> Result<Edit>,
) -> Result<Option<Entry>> {
    let mut conflicts = 0;
    loop {
        let old = store.read(key).await?;
        let was = old.as_ref().map_or(Revision::ZERO, |entry| entry.revision);
        let failure = match edit(old.as_ref())? {
            Edit::Keep => return Ok(old),
            Edit::Delete if old.is_none() => return Ok(None),
            Edit::Delete => match store.delete(key, was).await {
                Ok(_) => return Ok(None),
                Err(error) => error,
            },
            Edit::Put { value, ttl } => {
                let mut options = PutOptions::default().with_if_revision(was);
                options.ttl = ttl;
                match store.write(key, value.clone(), options).await {
                    Ok(revision) => return Ok(Some(Entry::new(key.clone(), value, revision))),
                    Err(error) => error,
                }
            }
        };
        if !is_conflict(&failure) {
            return Err(failure);
        }
        conflicts += 1;
        if !store.pause(pause(conflicts)).await {
            return Err(failure.because(format_args!("given up after {conflicts} attempts")));
        }
    }
}

/// [`update`] with values that are JSON.
///
/// # Errors
///
/// Those of [`update`], and [`ErrorKind::Json`] if a value is not the JSON of a `T`, or cannot be made JSON.
pub async fn update_as<S: UpdateStore, T: Serialize + DeserializeOwned, E: Into<Edit<T>>>(
    store: &S,
    key: &Key,
    mut edit: impl FnMut(Option<T>) -> E,
) -> Result<Option<T>> {
    let edit = |old: Option<&Entry>| {
        let edit: Edit<T> = edit(old.map(Entry::json).transpose()?).into();
        edit.try_map(|value| to_json(key.as_str(), &value))
    };
    update(store, key, edit).await?.map(|entry| entry.json()).transpose()
}

/// Whether the key was not as it had been read: that was in an epoch before, perhaps.
fn is_conflict(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Conflict { .. } | ErrorKind::OtherEpoch)
}

/// A random part of a span that doubles with each conflict, so that callers that collided once do not collide again.
fn pause(conflicts: u32) -> Duration {
    let span = PAUSE_MIN.saturating_mul(1 << conflicts.saturating_sub(1).min(16)).min(PAUSE_MAX);
    let part = RandomState::new().hash_one(conflicts) >> 32;
    span.mul_f64(part as f64 / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::task::{Context, Poll, Waker};

    use super::*;

    /// One key, which another client writes between read and write, a number of times.
    #[derive(Debug, Default)]
    struct Contended {
        entry: Mutex<Option<Entry>>,
        others: Mutex<Vec<Option<&'static str>>>,
        failure: Option<ErrorKind>,
        pauses: Mutex<Vec<Duration>>,
        pauses_max: usize,
    }

    impl Contended {
        fn change(&self, value: Option<Bytes>) -> Revision {
            let mut entry = self.entry.lock().unwrap();
            let revision = Revision::new(entry.as_ref().map_or(0, |entry| entry.revision.get()) + 1);
            *entry = value.map(|value| Entry::new(Key::new("a").unwrap(), value, revision));
            revision
        }

        fn check(&self, if_revision: Option<Revision>) -> Result<()> {
            if let Some(other) = self.others.lock().unwrap().pop() {
                self.change(other.map(Bytes::from));
            }
            let revision = self.entry.lock().unwrap().as_ref().map_or(Revision::ZERO, |entry| entry.revision);
            match &self.failure {
                Some(kind) => Err(Error::new(kind.clone(), "as asked")),
                None if if_revision == Some(revision) => Ok(()),
                None => Err(Error::new(ErrorKind::Conflict { revision }, "conflict")),
            }
        }
    }

    impl UpdateStore for Contended {
        async fn read(&self, _: &Key) -> Result<Option<Entry>> {
            Ok(self.entry.lock().unwrap().clone())
        }

        async fn write(&self, _: &Key, value: Bytes, options: PutOptions) -> Result<Revision> {
            self.check(options.if_revision)?;
            Ok(self.change(Some(value)))
        }

        async fn delete(&self, _: &Key, if_revision: Revision) -> Result<Deleted> {
            self.check(Some(if_revision))?;
            Ok(Deleted::new(1, self.change(None)))
        }

        async fn pause(&self, pause: Duration) -> bool {
            let mut pauses = self.pauses.lock().unwrap();
            pauses.push(pause);
            pauses.len() <= self.pauses_max
        }
    }

    fn now<T>(work: impl Future<Output = T>) -> T {
        match std::pin::pin!(work).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(done) => done,
            Poll::Pending => panic!("nothing here waits"),
        }
    }

    fn run(store: &Contended, edit: impl FnMut(Option<&Entry>) -> Result<Edit>) -> Result<Option<Entry>> {
        now(update(store, &Key::new("a").unwrap(), edit))
    }

    fn append(old: Option<&Entry>) -> Result<Edit> {
        let mut text = old.map_or(Vec::new(), |entry| entry.value.to_vec());
        text.push(b'x');
        Ok(text.into_edit())
    }

    #[test]
    fn an_update_is_made_of_what_the_key_holds_when_it_is_written() {
        let others = Mutex::new(vec![Some("b"), None, Some("a")]);
        let store = Contended { others, pauses_max: 9, ..Contended::default() };
        let entry = run(&store, append).unwrap().unwrap();
        assert_eq!((&entry.value[..], store.pauses.lock().unwrap().len()), (&b"bx"[..], 3));
        assert_eq!(*store.entry.lock().unwrap(), Some(entry));
    }

    #[test]
    fn a_key_that_is_to_stay_is_not_written_and_one_that_is_to_go_is_deleted_if_it_is_there() {
        let broken = Contended { failure: Some(ErrorKind::Closed), ..Contended::default() };
        assert_eq!(run(&broken, |_| Ok(Edit::Keep)), Ok(None));
        assert_eq!(run(&broken, |_| Ok(Edit::Delete)), Ok(None));
        let store = Contended::default();
        run(&store, append).unwrap();
        assert_eq!(run(&store, |old| Ok(if old.is_some() { Edit::Delete } else { Edit::Keep })), Ok(None));
        assert_eq!(*store.entry.lock().unwrap(), None);
    }

    #[test]
    fn what_is_no_conflict_is_not_done_again() {
        for kind in [ErrorKind::OutcomeUnknown, ErrorKind::Timeout, ErrorKind::Closed] {
            let store = Contended { failure: Some(kind.clone()), pauses_max: 9, ..Contended::default() };
            assert_eq!(run(&store, append).unwrap_err().kind(), &kind);
            assert_eq!(*store.pauses.lock().unwrap(), []);
        }
        let store = Contended::default();
        let refused = run(&store, |_| Err(Error::new(ErrorKind::Json, "no number"))).unwrap_err();
        assert_eq!(refused.kind(), &ErrorKind::Json);
    }

    #[test]
    fn when_time_is_over_the_conflict_is_the_error_and_pauses_have_grown() {
        let kind = ErrorKind::Conflict { revision: Revision::new(7) };
        let store = Contended { failure: Some(kind.clone()), pauses_max: 40, ..Contended::default() };
        let error = run(&store, append).unwrap_err();
        assert_eq!((error.kind(), error.is_retryable()), (&kind, false));
        assert!(error.to_string().contains("41 attempts"), "{error}");
        let pauses = store.pauses.lock().unwrap();
        assert!(pauses.iter().all(|pause| *pause <= PAUSE_MAX) && pauses[0] <= PAUSE_MIN);
        assert!(pauses[8..].iter().any(|pause| *pause > PAUSE_MIN * 8), "{pauses:?}");
    }
}
