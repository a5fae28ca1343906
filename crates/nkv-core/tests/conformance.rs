//! The backends of this crate, plain, boxed, shared and composed, against the contracts of their traits.
// Under Miri it takes ten minutes and does nothing that the tests of the store do not.
#![cfg(not(any(loom, miri)))]

mod memory {
    use nkv_core::{Epoch, MemoryPersist};

    nkv_testkit::persist_conformance!({
        let disk = MemoryPersist::new(Epoch::new(7));
        move || disk.clone()
    });
}

mod memory_fencing {
    use nkv_core::{Epoch, MemoryPersist};

    nkv_testkit::fencing_conformance!({
        let disk = MemoryPersist::new(Epoch::new(7));
        move || disk.clone()
    });
}

mod boxed_persist {
    use nkv_core::{Epoch, MemoryPersist, PersistValue};

    nkv_testkit::persist_conformance!({
        let disk = MemoryPersist::new(Epoch::new(7));
        move || -> Box<dyn PersistValue> { Box::new(disk.clone()) }
    });
}

mod shared_persist {
    use std::sync::{Arc, Mutex};

    use nkv_core::{Epoch, MemoryPersist, PersistValue};

    nkv_testkit::persist_conformance!({
        let disk = MemoryPersist::new(Epoch::new(7));
        move || -> Arc<Mutex<dyn PersistValue>> { Arc::new(Mutex::new(disk.clone())) }
    });
}

mod routes {
    use nkv_core::{Epoch, Key, MemoryPersist, RoutePersist};

    // Routes that part the keys of nearly every line: below each other, and beside each other.
    nkv_testkit::persist_conformance!({
        let disks: Vec<_> = (1..=4).map(|epoch| MemoryPersist::new(Epoch::new(epoch))).collect();
        move || {
            RoutePersist::new(disks[0].clone())
                .route(Key::new("a").unwrap(), disks[1].clone())
                .route(Key::new("a.b").unwrap(), disks[2].clone())
                .route(Key::new("host").unwrap(), disks[3].clone())
        }
    });
}

mod routes_fencing {
    use nkv_core::{Epoch, Key, MemoryPersist, RoutePersist};

    nkv_testkit::fencing_conformance!({
        let disks: Vec<_> = (1..=2).map(|epoch| MemoryPersist::new(Epoch::new(epoch))).collect();
        move || RoutePersist::new(disks[0].clone()).route(Key::new("a").unwrap(), disks[1].clone())
    });
}

mod scripted_persist {
    use nkv_core::{Epoch, MemoryPersist};
    use nkv_testkit::script::ScriptedPersist;

    nkv_testkit::persist_conformance!({
        let disk = MemoryPersist::new(Epoch::new(7));
        move || ScriptedPersist::new(disk.clone()).0
    });
}

mod mailbox {
    use nkv_core::mailbox::mailbox;
    use nkv_testkit::notifier::InboxReader;

    nkv_testkit::notifier_conformance!(|| {
        let (post, inbox) = mailbox::<()>();
        (post, InboxReader::new(inbox))
    });
}

mod boxed_notifier {
    use nkv_core::Notifier;
    use nkv_core::mailbox::mailbox;
    use nkv_testkit::notifier::InboxReader;

    nkv_testkit::notifier_conformance!(|| -> (Box<dyn Notifier>, _) {
        let (post, inbox) = mailbox::<()>();
        (Box::new(post), InboxReader::new(inbox))
    });
}

mod shared_notifier {
    use std::sync::Arc;

    use nkv_core::Notifier;
    use nkv_core::mailbox::mailbox;
    use nkv_testkit::notifier::InboxReader;

    nkv_testkit::notifier_conformance!(|| -> (Arc<dyn Notifier>, _) {
        let (post, inbox) = mailbox::<()>();
        (Arc::new(post), InboxReader::new(inbox))
    });
}
