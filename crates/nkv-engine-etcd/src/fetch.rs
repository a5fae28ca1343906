//! The whole state at one revision.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use nkv_core::{Action, Change, Key, Meta, Reason, Revision};
use nkv_node::EngineError;

use crate::engine::{Inner, Known};
use crate::fault;
use crate::names::{Name, Range, behind};
use crate::rpc::{KeyValue, RangeRequest};
use crate::session::{Session, nested};

/// The first page may be of long values, and etcd counts keys alone.
const PAGE_KEYS_MIN: i64 = 16;
const PAGE_KEYS_MAX: i64 = 10_000;
/// About as long is a page.
const PAGE_LEN: usize = 4 << 20;
/// How often a fetch begins anew when etcd compacts what it reads.
const TRIES: usize = 5;
/// A value from this length on is copied, so that it does not keep all the answer in memory that it came with.
const VALUE_LEN_LONG: usize = 4_096;

/// What etcd has below the prefix.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) revision: i64,
    pub(crate) changes: Vec<Change>,
    pub(crate) leases: HashMap<Key, i64>,
    pub(crate) large: HashSet<Key>,
    /// How many keys nkv cannot show.
    pub(crate) foreign: u64,
    /// The key with the highest revision.
    pub(crate) last: KeyValue,
}

impl Inner {
    pub(crate) async fn fetch(&self, session: &Session) -> Result<State, EngineError> {
        let mut tries = 0_usize;
        loop {
            match self.fetch_once(session).await? {
                Some(state) => return Ok(state),
                None if tries < TRIES => tries = tries.saturating_add(1),
                None => return Err(EngineError::Unavailable("etcd compacts faster than its state can be read".into())),
            }
        }
    }

    /// `None` if etcd compacts the revision meanwhile.
    async fn fetch_once(&self, session: &Session) -> Result<Option<State>, EngineError> {
        let Range { from, to } = self.names.all();
        let (mut at, to, mut limit) = (Bytes::from(from), Bytes::from(to), PAGE_KEYS_MIN);
        let mut state = State::default();
        loop {
            let request = RangeRequest {
                key: at.clone(),
                range_end: to.clone(),
                limit,
                revision: state.revision,
                // The same member has read up to that revision before.
                serializable: state.revision > 0,
                keys_only: false,
            };
            let page = match session.range(request).await {
                Ok(page) => page,
                Err(status) if fault::is_compacted(&status) => return Ok(None),
                Err(status) if fault::is_too_long(&status) && limit > 1 => {
                    limit = limit.div_euclid(16).max(1);
                    continue;
                }
                Err(status) => return Err(fault::of_request(&status)),
            };
            if state.revision == 0 {
                state.revision = page.header.unwrap_or_default().revision;
            }
            let count = page.kvs.len();
            let next = page.kvs.last().filter(|_| page.more).map(|last| Bytes::from(behind(&last.key)));
            let len = self.take(page.kvs, &mut state)?;
            let Some(next) = next else { return Ok(Some(state)) };
            at = next;
            let fitting = PAGE_LEN.checked_div(len.checked_div(count).unwrap_or(1)).unwrap_or(usize::MAX);
            let fitting = i64::try_from(fitting).unwrap_or(PAGE_KEYS_MAX);
            limit = fitting.min(limit.saturating_mul(8)).clamp(1, PAGE_KEYS_MAX);
        }
    }

    /// Takes a page, and returns how many bytes it had.
    fn take(&self, page: Vec<KeyValue>, state: &mut State) -> Result<usize, EngineError> {
        let mut len = 0_usize;
        let known = self.known();
        for kv in &page {
            len = len.saturating_add(kv.value.len()).saturating_add(kv.key.len());
            if let Some(inner) = self.names.nested(&kv.key) {
                return Err(nested(inner, self.names.prefix()));
            }
            match self.names.parse(&kv.key) {
                Name::Value(key) if kv.value.len() > self.options.value_len_max => {
                    state.large.insert(key);
                    state.foreign = state.foreign.saturating_add(1);
                }
                Name::Value(key) => state.changes.push(put(key, kv, &known)),
                Name::Lease(key) => drop(state.leases.insert(key, kv.lease)),
                Name::Generation | Name::Own => {}
                Name::Foreign => state.foreign = state.foreign.saturating_add(1),
            }
        }
        drop(known);
        let last = page.into_iter().max_by_key(|kv| kv.mod_revision);
        if let Some(last) = last.filter(|last| last.mod_revision > state.last.mod_revision) {
            state.last = own(last);
        }
        Ok(len)
    }
}

/// It, by itself.
pub(crate) fn own(kv: KeyValue) -> KeyValue {
    KeyValue { key: Bytes::copy_from_slice(&kv.key), value: Bytes::copy_from_slice(&kv.value), ..kv }
}

pub(crate) fn put(key: Key, kv: &KeyValue, known: &Known) -> Change {
    let value = match kv.value.len() {
        VALUE_LEN_LONG.. => Bytes::copy_from_slice(&kv.value),
        _ => kv.value.clone(),
    };
    change(key, kv.mod_revision, Action::Put { value, expiry: known.expiry(kv.lease) })
}

pub(crate) fn delete(key: Key, revision: i64, reason: Reason) -> Change {
    change(key, revision, Action::Delete { reason })
}

fn change(key: Key, number: i64, action: Action) -> Change {
    Change { key, revision: revision(number), replaces: Revision::ZERO, action, meta: Meta::NONE }
}

pub(crate) fn revision(number: i64) -> Revision {
    Revision::new(u64::try_from(number).unwrap_or_default())
}

pub(crate) fn number(revision: Revision) -> i64 {
    i64::try_from(revision.get()).unwrap_or(i64::MAX)
}
