//! Plain writes of several callers share a transaction: what comes while one is under way is gathered for the next.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, MutexGuard, PoisonError};

use nkv_core::{Epoch, Op};
use nkv_node::{Decided, EngineError};
use tokio::sync::oneshot;

use crate::engine::Inner;
use crate::write::{JOINED_LEN_MAX, JOINED_MAX, plain_key, value_len};

type Done = oneshot::Sender<Result<Decided, EngineError>>;
/// The writes of a caller.
type Own = (Vec<Op>, Done);

/// Writes that wait for the transaction under way.
#[derive(Debug, Default)]
pub(crate) struct Gathering {
    is_under_way: bool,
    waiting: VecDeque<Own>,
}

impl Gathering {
    /// Has writes wait. Returns whether none was under way.
    fn add(&mut self, ops: Vec<Op>, done: Done) -> bool {
        self.waiting.push_back((ops, done));
        !std::mem::replace(&mut self.is_under_way, true)
    }

    /// Takes what fits into one transaction, and what cannot share one: it has a key that is in it already, or is too long. Where
    /// nothing waits, none is under way.
    fn take(&mut self) -> Option<[Vec<Own>; 2]> {
        // What the caller has given up was never sent, and must not be sent behind its later writes.
        self.waiting.retain(|(_, done)| !done.is_closed());
        let (mut shared, mut alone) = (Vec::new(), Vec::new());
        let (mut keys, mut count, mut total) = (HashSet::new(), 0_usize, 0_usize);
        while let Some((ops, done)) = self.waiting.pop_front() {
            count = count.saturating_add(ops.len());
            total = ops.iter().map(value_len).fold(total, usize::saturating_add);
            let fits = count <= JOINED_MAX && total <= JOINED_LEN_MAX;
            if !fits && !shared.is_empty() {
                self.waiting.push_front((ops, done));
                break;
            }
            let is_apart = ops.iter().filter_map(plain_key).all(|key| keys.insert(key.clone()));
            let to = if fits && is_apart { &mut shared } else { &mut alone };
            to.push((ops, done));
        }
        self.is_under_way = !shared.is_empty() || !alone.is_empty();
        self.is_under_way.then_some([shared, alone])
    }
}

impl Inner {
    /// Has plain writes of a caller done: at once, or if others are under way, behind them and together with what came meanwhile.
    pub(crate) async fn gathered(self: &Arc<Self>, ops: Vec<Op>) -> Result<Decided, EngineError> {
        let (done, decided) = oneshot::channel();
        if self.gathering().add(ops, done) {
            // By itself: a caller that gives up does not take the others with it.
            tokio::spawn(UnderWay { etcd: Arc::clone(self), has_ended: false }.carry_out());
        }
        decided.await.unwrap_or_else(|_| Err(EngineError::OutcomeUnknown("the node ends".into())))
    }

    fn gathering(&self) -> MutexGuard<'_, Gathering> {
        self.gathering.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn decide_for(&self, writes: Vec<Own>) {
        let (mut ops, mut callers) = (Vec::new(), Vec::with_capacity(writes.len()));
        for (own, done) in writes {
            callers.push((own.len(), done));
            ops.extend(own);
        }
        // There is no condition in them, so no epoch is meant.
        let mut decided = self.decide(Epoch::default(), &ops, false).await;
        for (count, done) in callers {
            let own = match &mut decided {
                Ok(Decided { epoch, results }) => {
                    let own = results.drain(..count.min(results.len())).collect();
                    Ok(Decided { epoch: *epoch, results: own })
                }
                Err(error) => Err(error.clone()),
            };
            // A caller that has given up needs no answer.
            drop(done.send(own));
        }
    }
}

/// While it lives, transactions of gathered writes are under way. Dropped, no write waits for them.
struct UnderWay {
    etcd: Arc<Inner>,
    has_ended: bool,
}

impl UnderWay {
    async fn carry_out(mut self) {
        loop {
            let next = self.etcd.gathering().take();
            self.has_ended = next.is_none();
            let Some([shared, alone]) = next else { return };
            for write in alone {
                let etcd = Arc::clone(&self.etcd);
                tokio::spawn(async move { etcd.decide_for(vec![write]).await });
            }
            if !shared.is_empty() {
                self.etcd.decide_for(shared).await;
            }
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        if !self.has_ended {
            *self.etcd.gathering() = Gathering::default();
        }
    }
}
