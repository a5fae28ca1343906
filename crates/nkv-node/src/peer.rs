//! The peers of doors: what each is called, what it holds, and whether it is to close.

use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use nkv_core::mailbox::Backlog;

use crate::budget::{Account, Said, Share};

/// A peer of a door, for as long as its connection lasts: it is counted, listed and limited by the node. Made by
/// [`Handle::peer`](crate::Handle::peer).
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use nkv_node::{Held, Holder};
/// # #[derive(Debug)]
/// # struct Line;
/// # impl Holder for Line {
/// #     fn held(&self) -> Held { Held::default() }
/// #     fn backlog(&self) -> nkv_core::mailbox::Backlog { Default::default() }
/// #     fn busy_for(&self) -> std::time::Duration { Default::default() }
/// #     fn give_up(&self) {}
/// #     fn wake(&self) {}
/// # }
/// let node = nkv_node::Node::builder().start().await?;
/// let nkv = node.handle();
/// let peer = nkv.peer("192.0.2.1:5000", Box::new(Line)); // see `Holder` for how one is made
/// peer.says(|said| said.name = Some("thermostat".into()));
/// peer.hold(120, false); // 120 bytes of a request have arrived
/// assert_eq!(peer.held(), 120);
/// assert_eq!(nkv.peers()?[0].said.name.as_deref(), Some("thermostat"));
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Peer {
    share: Share,
}

/// A peer, for people to look at.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PeerInfo {
    /// Its address, as its door gave it.
    pub address: String,
    /// What it said of itself.
    pub said: Said,
    /// For how long it has been there.
    pub age: Duration,
    /// Its subscriptions.
    pub subscriptions: u64,
    /// Its backlog.
    pub backlog: Backlog,
}

impl Peer {
    pub(crate) fn new(share: Share) -> Self {
        Peer { share }
    }

    pub(crate) fn account(&self) -> &Arc<Account> {
        &self.share.account
    }

    /// Notes how many bytes the reading side of its connection holds, and whether it has served a request meanwhile.
    pub fn hold(&self, bytes: usize, served: bool) {
        self.share.hold(bytes, served);
    }

    /// The node keeps the peer waiting with what it has sent.
    pub fn begin_waiting(&self) {
        self.share.begin_waiting();
    }

    /// It does so no more. The time that it did is not held against the peer.
    pub fn end_waiting(&self, waited: Duration) {
        self.share.end_waiting(waited);
    }

    /// What it holds, in bytes.
    #[must_use]
    pub fn held(&self) -> usize {
        self.share.held()
    }

    /// Whether the peer is to give up what it holds: its connection ends. Its [`Holder`](crate::Holder) is woken when it is.
    #[must_use]
    pub fn is_evicted(&self) -> bool {
        self.share.is_evicted()
    }

    /// What it held when that was decided, in bytes: for the log, as it may have given it up since.
    #[must_use]
    pub fn evicted_with(&self) -> usize {
        self.share.evicted_with()
    }

    /// Whether the node stops: connections end once what was accepted is answered. Its [`Holder`](crate::Holder) is woken
    /// when it does.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.share.is_stopping()
    }

    /// What it said of itself; `change` may add to it.
    pub fn says<T>(&self, change: impl FnOnce(&mut Said) -> T) -> T {
        change(&mut self.account().said.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Account {
    pub(crate) fn said(&self) -> Said {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn info(&self) -> PeerInfo {
        PeerInfo {
            address: self.address.as_deref().unwrap_or_default().to_owned(),
            said: self.said(),
            age: self.opened.elapsed(),
            subscriptions: self.subscriptions.load(Relaxed),
            backlog: self.source.backlog(),
        }
    }
}

/// A subscription of a peer, until it ends or is dropped.
#[derive(Debug)]
pub(crate) struct Counted {
    pub(crate) account: Arc<Account>,
    has_ended: AtomicBool,
}

impl Counted {
    pub(crate) fn new(account: &Arc<Account>) -> Self {
        account.subscriptions.fetch_add(1, Relaxed);
        Counted { account: Arc::clone(account), has_ended: AtomicBool::new(false) }
    }

    pub(crate) fn end(&self) {
        if !self.has_ended.swap(true, Relaxed) {
            self.account.subscriptions.fetch_sub(1, Relaxed);
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.end();
    }
}
