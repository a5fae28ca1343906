//! Plain writes of several callers share a transaction: what comes while some are under way is gathered for the next.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, MutexGuard, PoisonError};

use futures_util::future::join_all;
use nkv_core::{Epoch, Key, Op};
use nkv_node::{Decided, EngineError};
use tokio::sync::oneshot;

use crate::engine::Inner;
use crate::write::{JOINED_LEN_MAX, JOINED_MAX, plain_key, value_len};

/// Transactions of plain writes under way, at most, before writes are gathered.
const UNDER_WAY_MAX: usize = 4;

/// The writes of one caller, and where it waits for what becomes of them.
#[derive(Debug)]
struct CallerWrites {
    ops: Vec<Op>,
    done: oneshot::Sender<Result<Decided, EngineError>>,
}

/// The transactions under way, and the writes that wait for the end of one.
#[derive(Debug, Default)]
pub(crate) struct Gathering {
    under_way: usize,
    waiting: VecDeque<CallerWrites>,
}

impl Gathering {
    /// Takes what fits into one transaction, with each key once; and what has one of its keys: that goes by itself, as writers of
    /// one key do not wait for each other.
    fn take(&mut self) -> (Vec<CallerWrites>, Vec<CallerWrites>) {
        let (mut shared, mut alone) = (Vec::new(), Vec::new());
        let (mut keys, mut count, mut len) = (HashSet::new(), 0_usize, 0_usize);
        for writes in std::mem::take(&mut self.waiting) {
            let with_count = count.saturating_add(writes.ops.len());
            let with_len = writes.ops.iter().map(value_len).fold(len, usize::saturating_add);
            if with_count > JOINED_MAX || with_len > JOINED_LEN_MAX {
                self.waiting.push_back(writes);
                continue;
            }
            let own: HashSet<Key> = writes.ops.iter().filter_map(plain_key).cloned().collect();
            if own.len() < writes.ops.len() || !keys.is_disjoint(&own) {
                alone.push(writes);
            } else {
                keys.extend(own);
                (count, len) = (with_count, with_len);
                shared.push(writes);
            }
        }
        (shared, alone)
    }
}

/// A transaction under way. When it has ended, what waits goes in the next one.
struct UnderWay(Arc<Inner>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        let (shared, alone) = {
            let mut gathering = self.0.gathering();
            let (shared, alone) = gathering.take();
            if shared.is_empty() {
                gathering.under_way = gathering.under_way.saturating_sub(1);
            }
            (shared, alone)
        };
        for writes in alone {
            let etcd = Arc::clone(&self.0);
            spawn(async move { etcd.decide_alone(writes).await });
        }
        if !shared.is_empty() {
            let next = UnderWay(Arc::clone(&self.0));
            spawn(async move { next.0.decide_together(shared).await });
        }
    }
}

/// Where there is no runtime any more, what was to be done is dropped: callers learn that the node ends.
fn spawn(work: impl Future<Output = ()> + Send + 'static) {
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        drop(runtime.spawn(work));
    }
}

/// A caller that waits: what it gives up while it waits is not sent.
struct Waits<'a> {
    etcd: &'a Inner,
    decided: oneshot::Receiver<Result<Decided, EngineError>>,
}

enum Begun<'a> {
    UnderWay(UnderWay, Vec<Op>),
    Waits(Waits<'a>),
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        if self.decided.is_terminated() {
            return;
        }
        self.decided.close();
        let mut gathering = self.etcd.gathering();
        let place = gathering.waiting.iter().position(|writes| writes.done.is_closed());
        let given_up = place.and_then(|place| gathering.waiting.remove(place));
        drop(gathering);
        drop(given_up);
    }
}

impl Inner {
    /// Has plain writes of a caller done: at once, or where others are under way, together with what came meanwhile.
    pub(crate) async fn gathered(self: &Arc<Self>, ops: Vec<Op>) -> Result<Decided, EngineError> {
        let len = ops.iter().map(value_len).fold(0, usize::saturating_add);
        if ops.len() > JOINED_MAX || len > JOINED_LEN_MAX {
            return self.decide(Epoch::default(), &ops, false).await;
        }
        match self.begin_or_wait(ops) {
            Begun::UnderWay(_under_way, ops) => self.decide(Epoch::default(), &ops, false).await,
            Begun::Waits(mut waits) => {
                let decided = (&mut waits.decided).await;
                decided.unwrap_or_else(|_| Err(EngineError::OutcomeUnknown("the node ends".into())))
            }
        }
    }

    fn begin_or_wait(self: &Arc<Self>, ops: Vec<Op>) -> Begun<'_> {
        let mut gathering = self.gathering();
        if gathering.under_way < UNDER_WAY_MAX {
            gathering.under_way = gathering.under_way.saturating_add(1);
            return Begun::UnderWay(UnderWay(Arc::clone(self)), ops);
        }
        let (done, decided) = oneshot::channel();
        gathering.waiting.push_back(CallerWrites { ops, done });
        Begun::Waits(Waits { etcd: self, decided })
    }

    fn gathering(&self) -> MutexGuard<'_, Gathering> {
        self.gathering.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One transaction for the writes of several callers. There is no condition in them, so no epoch is meant.
    async fn decide_together(&self, callers: Vec<CallerWrites>) {
        let Some(session) = self.session() else {
            return fail(callers, &EngineError::Unavailable("etcd is not followed".into()));
        };
        let ops: Vec<_> = callers.iter().flat_map(|writes| writes.ops.iter().cloned()).collect();
        match self.step(&session, Epoch::default(), &ops).await {
            Ok(outcomes) => {
                let mut outcomes = outcomes.into_iter();
                for CallerWrites { ops, done, .. } in callers {
                    let results = outcomes.by_ref().take(ops.len()).map(Ok).collect();
                    answer(done, Ok(Decided { epoch: session.epoch, results }));
                }
            }
            // One of them is refused: that is for its caller alone.
            Err(EngineError::Refused { .. }) => {
                drop(join_all(callers.into_iter().map(|writes| self.decide_alone(writes))).await);
            }
            Err(error) => {
                fail(callers, &error);
                // What has waited as long as this has, and was not sent, waits no longer.
                let waiting = std::mem::take(&mut self.gathering().waiting);
                fail(waiting, &EngineError::Unavailable(format!("a write before it had no answer: {error}")));
            }
        }
    }

    /// The writes of one caller, for as long as it waits for them.
    async fn decide_alone(&self, writes: CallerWrites) {
        let CallerWrites { ops, mut done, .. } = writes;
        tokio::select! {
            biased;
            () = done.closed() => {}
            decided = self.decide(Epoch::default(), &ops, false) => answer(done, decided),
        }
    }
}

/// A caller that has given up needs no answer.
fn answer(done: oneshot::Sender<Result<Decided, EngineError>>, decided: Result<Decided, EngineError>) {
    drop(done.send(decided));
}

fn fail(callers: impl IntoIterator<Item = CallerWrites>, error: &EngineError) {
    callers.into_iter().for_each(|writes| answer(writes.done, Err(error.clone())));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn puts(keys: &[String], value_len: usize) -> CallerWrites {
        let put = |key: &String| Op::Put {
            key: nkv_core::Key::new(key).unwrap(),
            value: vec![b'x'; value_len].into(),
            options: nkv_core::PutOptions::default(),
        };
        CallerWrites { ops: keys.iter().map(put).collect(), done: oneshot::channel().0 }
    }

    fn first_keys(writes: &[CallerWrites]) -> Vec<&str> {
        writes.iter().map(|writes| plain_key(&writes.ops[0]).unwrap().as_str()).collect()
    }

    #[test]
    fn a_transaction_has_each_key_once_and_no_more_than_fits_and_what_does_not_fit_keeps_others_from_nothing() {
        let mut gathering = Gathering::default();
        let keys = |of: &str, count: usize| (0..count).map(|number| format!("{of}.{number}")).collect::<Vec<_>>();
        gathering.waiting.push_back(puts(&keys("a", 60), 1));
        gathering.waiting.push_back(puts(&keys("b", 10), 1)); // too many with the first
        gathering.waiting.push_back(puts(&keys("a", 1), 1)); // a key of the first
        gathering.waiting.push_back(puts(&keys("c", 1), JOINED_LEN_MAX)); // too long with the first
        gathering.waiting.push_back(puts(&keys("d", 2), 1));
        let (shared, alone) = gathering.take();
        assert_eq!((first_keys(&shared), first_keys(&alone)), (vec!["a.0", "d.0"], vec!["a.0"]));
        assert_eq!((shared[0].ops.len(), alone[0].ops.len()), (60, 1));
        let (shared, alone) = gathering.take();
        assert_eq!((first_keys(&shared), first_keys(&alone)), (vec!["b.0"], vec![]));
        let (shared, alone) = gathering.take();
        assert_eq!((first_keys(&shared), first_keys(&alone)), (vec!["c.0"], vec![]));
        assert!(gathering.waiting.is_empty());
    }
}
