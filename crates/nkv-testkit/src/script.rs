//! Backends that follow a script: fail, block, crash, close; and record the calls that they got.
//!
//! The backend goes into the store; a handle that can be cloned stays with the test.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nkv_core::{
    Change, Delivery, Epoch, Event, EventKind, FailureHandler, Loaded, Notifier, PersistError, PersistErrorKind,
    PersistValue, Prepared, SnapshotReader, StorageFigures, StoredRef,
};

/// A backend that fails when it is told to, around one that works.
///
/// # Examples
///
/// ```
/// use nkv_core::mailbox::Mailbox;
/// use nkv_core::{Epoch, Key, MemoryPersist, NotifyKeyValue, PersistErrorKind, PutOptions};
/// use nkv_testkit::script::ScriptedPersist;
///
/// let (persist, script) = ScriptedPersist::new(MemoryPersist::default());
/// let store: NotifyKeyValue<_, Mailbox> = NotifyKeyValue::open(persist)?;
///
/// script.fail_next(PersistErrorKind::NoSpace);
/// let key = Key::new("a")?;
/// assert!(store.put(&key, "lost", PutOptions::default()).is_err());
/// assert!(store.put(&key, "kept", PutOptions::default()).is_ok());
/// assert_eq!((script.calls(), script.batches().len()), (2, 1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct ScriptedPersist<P> {
    inner: P,
    script: PersistScript,
}

/// Tells a [`ScriptedPersist`] what to do. Clones tell the same one.
#[derive(Clone, Debug, Default)]
pub struct PersistScript {
    shared: Arc<PersistShared>,
}

/// What becomes of a batch when the backend crashes over it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// It is stored, though the caller does not learn so.
    AfterStoring,
    /// It is not stored.
    BeforeStoring,
}

#[derive(Debug, Default)]
struct PersistShared {
    state: Mutex<PersistState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct PersistState {
    calls: u64,
    /// By number of the call; the first is 1.
    plan: BTreeMap<u64, Step>,
    always: Option<PersistErrorKind>,
    load: Option<PersistErrorKind>,
    prepare: Option<PersistErrorKind>,
    close: Option<PersistErrorKind>,
    closes: u64,
    handler: Option<FailureHandler>,
    blocked: bool,
    waiting: bool,
    crashed: bool,
    batches: Vec<Vec<Change>>,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Fail(PersistErrorKind),
    Crash(Crash),
}

/// How long a blocked backend waits to be released, before it takes the test for dead and panics.
const BLOCKED_MAX: Duration = Duration::from_secs(60);

impl<P: PersistValue> ScriptedPersist<P> {
    /// Does what `inner` does, until told otherwise.
    pub fn new(inner: P) -> (Self, PersistScript) {
        let script = PersistScript::default();
        (ScriptedPersist { inner, script: script.clone() }, script)
    }

    /// The backend, as it is.
    pub fn into_inner(self) -> P {
        self.inner
    }

    fn store(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        self.inner.persist(batch)?;
        self.script.lock().batches.push(batch.to_vec());
        Ok(())
    }
}

#[deny(clippy::missing_trait_methods)]
impl<P: PersistValue> PersistValue for ScriptedPersist<P> {
    fn load(&mut self, visit: &mut dyn FnMut(StoredRef<'_>)) -> Result<Loaded, PersistError> {
        let scripted = self.script.lock().load.take();
        match scripted {
            Some(kind) => Err(failure(kind)),
            None => self.inner.load(visit),
        }
    }

    fn persist(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        match self.script.next_step() {
            Some(Step::Fail(kind)) => Err(failure(kind)),
            Some(Step::Crash(Crash::BeforeStoring)) => Err(failure(PersistErrorKind::Poisoned)),
            Some(Step::Crash(Crash::AfterStoring)) => {
                self.store(batch)?;
                Err(failure(PersistErrorKind::Poisoned))
            }
            None => self.store(batch),
        }
    }

    fn prepare(&mut self, batch: &[Change]) -> Result<Prepared, PersistError> {
        let scripted = self.script.lock().prepare;
        match scripted {
            Some(kind) => Err(failure(kind)),
            None => self.inner.prepare(batch),
        }
    }

    /// The inner backend's failures, and those that the script is to report.
    fn keeps_meta(&self) -> bool {
        self.inner.keeps_meta()
    }

    /// A script may have it wait.
    fn waits(&self) -> bool {
        true
    }

    fn begin_epoch(&mut self, epoch: Epoch) -> Result<(), PersistError> {
        self.inner.begin_epoch(epoch)
    }

    fn on_failure(&mut self, handler: FailureHandler) {
        self.script.lock().handler = Some(handler.clone());
        self.inner.on_failure(handler);
    }

    fn figures(&self) -> Option<Arc<dyn StorageFigures>> {
        self.inner.figures()
    }

    /// A close that fails has closed the inner backend all the same.
    fn close(&mut self) -> Result<(), PersistError> {
        let scripted = self.script.close();
        let closed = self.inner.close();
        match scripted {
            Some(kind) => Err(failure(kind)),
            None => closed,
        }
    }
}

impl PersistScript {
    /// The next `persist` fails with `kind` and stores nothing.
    pub fn fail_next(&self, kind: PersistErrorKind) {
        let mut state = self.lock();
        let next = state.calls + 1;
        state.plan.insert(next, Step::Fail(kind));
    }

    /// The `persist` of that number fails with `kind` and stores nothing. The first one ever is number 1.
    pub fn fail_call(&self, number: u64, kind: PersistErrorKind) {
        self.lock().plan.insert(number, Step::Fail(kind));
    }

    /// Every `persist` fails with `kind`, until [`work`](Self::work).
    pub fn fail_always(&self, kind: PersistErrorKind) {
        self.lock().always = Some(kind);
    }

    /// Forgets all failures that were asked for and have not happened yet.
    pub fn work(&self) {
        let mut state = self.lock();
        state.plan.clear();
        state.always = None;
        state.load = None;
        state.prepare = None;
        state.close = None;
    }

    /// The next `load` fails with `kind`.
    pub fn fail_load(&self, kind: PersistErrorKind) {
        self.lock().load = Some(kind);
    }

    /// Every `prepare` fails with `kind`, until [`work`](Self::work).
    pub fn fail_prepare(&self, kind: PersistErrorKind) {
        self.lock().prepare = Some(kind);
    }

    /// Reports a failure of `kind` now, as a sync in the background would; false if no caller wants to know.
    pub fn report_failure(&self, kind: PersistErrorKind) -> bool {
        let handler = self.lock().handler.clone();
        handler.is_some_and(|handler| {
            handler.report(failure(kind));
            true
        })
    }

    /// `close` fails with `kind`.
    pub fn fail_close(&self, kind: PersistErrorKind) {
        self.lock().close = Some(kind);
    }

    /// The next `persist` crashes: it says [`PersistErrorKind::Poisoned`], having stored the batch or not. A caller
    /// that keeps its contract does not ask again; if it does, that fails in the same way.
    pub fn crash_next(&self, crash: Crash) {
        let mut state = self.lock();
        let next = state.calls + 1;
        state.plan.insert(next, Step::Crash(crash));
    }

    /// The `persist` of that number crashes; see [`crash_next`](Self::crash_next).
    pub fn crash_call(&self, number: u64, crash: Crash) {
        self.lock().plan.insert(number, Step::Crash(crash));
    }

    /// Each `persist` waits, before it does anything, until [`release`](Self::release).
    pub fn block(&self) {
        self.lock().blocked = true;
    }

    /// Lets a blocked `persist`, and those after it, go on.
    pub fn release(&self) {
        self.lock().blocked = false;
        self.shared.changed.notify_all();
    }

    /// Waits until a `persist` is blocked; false if none is after `patience`.
    #[must_use]
    pub fn wait_until_blocked(&self, patience: Duration) -> bool {
        let state = self.lock();
        let waited = self.shared.changed.wait_timeout_while(state, patience, |state| !state.waiting);
        waited.unwrap_or_else(PoisonError::into_inner).0.waiting
    }

    /// How often `persist` was called, with whatever result.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.lock().calls
    }

    /// How often `close` was called.
    #[must_use]
    pub fn closes(&self) -> u64 {
        self.lock().closes
    }

    /// The batches that were stored, in order.
    #[must_use]
    pub fn batches(&self) -> Vec<Vec<Change>> {
        self.lock().batches.clone()
    }

    fn next_step(&self) -> Option<Step> {
        let mut state = self.lock();
        state.calls += 1;
        let deadline = Instant::now() + BLOCKED_MAX;
        while state.blocked {
            state.waiting = true;
            self.shared.changed.notify_all();
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "a blocked backend was never released");
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.waiting = false;
        let number = state.calls;
        let planned = state.plan.remove(&number).or(state.always.map(Step::Fail));
        if state.crashed {
            return Some(Step::Fail(PersistErrorKind::Poisoned));
        }
        state.crashed = matches!(planned, Some(Step::Crash(_)));
        planned
    }

    fn close(&self) -> Option<PersistErrorKind> {
        let mut state = self.lock();
        state.closes += 1;
        state.close
    }

    fn lock(&self) -> MutexGuard<'_, PersistState> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn failure(kind: PersistErrorKind) -> PersistError {
    PersistError::new(kind, format!("failed on purpose, as {kind:?}"))
}

/// A notifier that takes everything and remembers it, until it is closed. Clones are the same one.
///
/// # Examples
///
/// ```
/// use nkv_core::{Epoch, Key, NoPersist, NotifyKeyValue, Pattern, PutOptions};
/// use nkv_testkit::script::ScriptedNotifier;
///
/// let store = NotifyKeyValue::open(NoPersist::default())?;
/// let notifier = ScriptedNotifier::new();
/// store.subscribe(Pattern::All, "me".into(), notifier.clone(), false);
///
/// store.put(&Key::new("a")?, "1", PutOptions::default())?;
/// assert_eq!(notifier.take().len(), 2); // it began, and the change
///
/// notifier.close();
/// store.put(&Key::new("a")?, "2", PutOptions::default())?;
/// assert_eq!(store.stats().subscriptions, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct ScriptedNotifier {
    state: Arc<Mutex<NotifierState>>,
}

#[derive(Debug, Default)]
struct NotifierState {
    calls: u64,
    closed: bool,
    events: Vec<Arc<Event>>,
}

impl ScriptedNotifier {
    /// One that is open and was told nothing.
    #[must_use]
    pub fn new() -> Self {
        ScriptedNotifier::default()
    }

    /// From now on it says [`Delivery::Closed`] and takes nothing.
    pub fn close(&self) {
        self.lock().closed = true;
    }

    /// How often `notify` was called, closed or not.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.lock().calls
    }

    /// What it took since the last such call, in order; snapshots are read now, and stand behind their beginnings.
    #[must_use]
    pub fn take(&self) -> Vec<Arc<Event>> {
        let events = std::mem::take(&mut self.lock().events);
        let mut taken = Vec::with_capacity(events.len());
        for event in events {
            let began = match event.kind() {
                EventKind::Began(began) if began.has_snapshot => Some(began.reader.clone()),
                _ => None,
            };
            taken.push(event);
            while let Some(part) = began.as_ref().and_then(SnapshotReader::next_part) {
                let is_last = part.is_last;
                taken.push(Event::new(EventKind::Snapshot(part)));
                if is_last {
                    break;
                }
            }
        }
        taken
    }

    fn lock(&self) -> MutexGuard<'_, NotifierState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Notifier for ScriptedNotifier {
    fn notify(&self, event: &Arc<Event>) -> Delivery {
        let mut state = self.lock();
        state.calls += 1;
        if state.closed {
            return Delivery::Closed;
        }
        state.events.push(Arc::clone(event));
        Delivery::Queued
    }
}
