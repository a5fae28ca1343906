//! What the door holds for a peer, as the node counts it.

use std::time::Duration;

use nkv_core::mailbox::Backlog;
use nkv_node::{Held, Holder};
use nkv_notify_tcp::TcpNotifier;

/// The sending side of a connection.
#[derive(Debug)]
pub(crate) struct Connected(pub(crate) TcpNotifier);

impl Holder for Connected {
    fn held(&self) -> Held {
        let Backlog { own_bytes: queue, event_bytes: changes, .. } = self.0.backlog();
        Held { own: self.0.waiting(), queue, changes, gathered: self.0.gathered() }
    }

    fn backlog(&self) -> Backlog {
        self.0.backlog()
    }

    fn busy_for(&self) -> Duration {
        self.0.busy_for()
    }

    fn give_up(&self) {
        self.0.give_up();
    }

    fn wake(&self) {
        self.0.wake();
    }
}

#[cfg(test)]
mod tests {
    use nkv_core::{Action, Change, Delivery, Event, EventKind, Key, Meta, Notifier, Pattern, Revision};
    use nkv_node::{AttachOptions, Node};
    use nkv_notify_tcp::NotifierOptions;
    use nkv_protocol::Features;

    use super::*;

    #[tokio::test]
    async fn a_connection_that_can_begin_anew_gives_up_the_changes_that_wait_for_it() {
        let node = Node::builder().start().await.unwrap();
        let (notifier, _outbox) = TcpNotifier::new(NotifierOptions::default());
        notifier.set_features(Features::RESET);
        let options = AttachOptions::default().with_snapshot(false);
        let _attached = node.handle().attach(Pattern::All, Box::new(notifier.clone()), &options).unwrap();
        for n in 0..100 {
            node.handle().put(format!("k.{n}"), vec![0; 4_000]).await.unwrap();
        }
        let connected = Connected(notifier);
        assert_eq!(connected.backlog().queued, 101);
        assert!(connected.held().changes > 400_000, "{:?}", connected.held());
        connected.give_up();
        // That it began, and that it begins anew.
        assert_eq!(connected.backlog().queued, 2);
    }

    #[test]
    fn changes_that_wait_as_they_came_are_held() {
        let (notifier, _outbox) = TcpNotifier::new(NotifierOptions { slack: 20_000, ..NotifierOptions::default() });
        for revision in 1..=2 {
            let (key, revision) = (Key::new("a").unwrap(), Revision::new(revision));
            let action = Action::Put { value: vec![0; 9_000].into(), expiry: None };
            let change = Change { key, revision, replaces: Revision::ZERO, action, meta: Meta::NONE };
            assert_eq!(notifier.notify(&Event::new(EventKind::Change(change))), Delivery::Queued);
        }
        let held = Connected(notifier).held();
        assert!(held.changes > 18_000, "{held:?}");
    }
}
