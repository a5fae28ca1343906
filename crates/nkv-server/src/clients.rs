//! The connected clients, for people to look at: what each said of itself, where it is, and what it has.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use nkv_core::SubscriberId;
use nkv_core::mailbox::Backlog;
use nkv_notify_tcp::TcpNotifier;

/// All of them, in the order in which they came.
#[derive(Debug, Default)]
pub(crate) struct Clients(Mutex<All>);

#[derive(Debug, Default)]
struct All {
    next_id: u64,
    by_id: BTreeMap<u64, Arc<Client>>,
}

/// A client, for as long as its connection or one of its subscriptions is there.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) since: Instant,
    from: Option<SocketAddr>,
    notifier: TcpNotifier,
    said: Mutex<Said>,
    subscriptions: AtomicU64,
}

/// What a client said of itself.
#[derive(Clone, Debug, Default)]
pub(crate) struct Said {
    /// Its `client_uuid`, or what was made up for it when one was needed.
    pub(crate) client_uuid: Option<SubscriberId>,
    /// Its name for people.
    pub(crate) name: Option<Arc<str>>,
}

impl Client {
    fn new(from: Option<SocketAddr>, notifier: TcpNotifier) -> Self {
        let (said, subscriptions) = Default::default();
        Client { since: Instant::now(), from, notifier, said, subscriptions }
    }

    /// The address of its peer.
    pub(crate) fn peer(&self) -> String {
        self.from.map_or_else(|| "unix".into(), |from| from.to_string())
    }

    pub(crate) fn said(&self) -> Said {
        self.lock().clone()
    }

    pub(crate) fn says<T>(&self, change: impl FnOnce(&mut Said) -> T) -> T {
        change(&mut self.lock())
    }

    pub(crate) fn subscriptions(&self) -> u64 {
        self.subscriptions.load(Relaxed)
    }

    pub(crate) fn backlog(&self) -> Backlog {
        self.notifier.backlog()
    }

    /// Counts a subscription.
    pub(crate) fn count(self: &Arc<Self>) -> Counted {
        self.subscriptions.fetch_add(1, Relaxed);
        Counted { client: Arc::clone(self), has_ended: AtomicBool::new(false) }
    }

    fn lock(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A subscription of a client, until it ends or is dropped.
#[derive(Debug)]
pub(crate) struct Counted {
    pub(crate) client: Arc<Client>,
    has_ended: AtomicBool,
}

impl Counted {
    pub(crate) fn end(&self) {
        if !self.has_ended.swap(true, Relaxed) {
            self.client.subscriptions.fetch_sub(1, Relaxed);
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.end();
    }
}

/// A place in the list, given up when it is dropped.
#[derive(Debug)]
pub(crate) struct Listed {
    clients: Arc<Clients>,
    id: u64,
    pub(crate) client: Arc<Client>,
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.clients.lock().by_id.remove(&self.id);
    }
}

impl Clients {
    /// Lists a client that has connected.
    pub(crate) fn list(self: &Arc<Self>, from: Option<SocketAddr>, notifier: TcpNotifier) -> Listed {
        let client = Arc::new(Client::new(from, notifier));
        let mut all = self.lock();
        let id = all.next_id;
        all.next_id = id.wrapping_add(1);
        all.by_id.insert(id, Arc::clone(&client));
        drop(all);
        Listed { clients: Arc::clone(self), id, client }
    }

    pub(crate) fn all(&self) -> Vec<Arc<Client>> {
        self.lock().by_id.values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, All> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
