//! A subscription: what is asked of it, and one that is followed to its end.

use std::time::Duration;

use nkv_client::{Client, Event, SubscribeOptions, Subscription};

use crate::args::Command;
use crate::failure::{Exit, Failure};
use crate::output::{Line, Output, ended};
use crate::stdio::reader_has_gone;

/// What is asked of a subscription.
#[derive(Clone, Debug)]
pub(crate) struct Follow {
    pub(crate) pattern: String,
    options: SubscribeOptions,
    /// After how many values and changes it ends.
    pub(crate) count: Option<u64>,
    /// How long these may take.
    pub(crate) timeout: Option<Duration>,
}

impl Follow {
    pub(crate) fn new(command: &Command, timeout: Option<Duration>) -> Option<Self> {
        let Command::Subscribe { key, once, count, no_snapshot, exact } = command else { return None };
        let count = if *once { Some(1) } else { *count };
        let options = SubscribeOptions::default().with_snapshot(!no_snapshot).with_exact(*exact);
        Some(Follow { pattern: key.clone(), options, count, timeout: timeout.filter(|_| count.is_some()) })
    }

    /// Begins it.
    pub(crate) async fn begin(&self, client: &Client) -> nkv_client::Result<Subscription> {
        client.subscribe_with(&self.pattern, self.options).await
    }

    /// Does the work, which ends after `count` values and changes, within the time that it may take.
    pub(crate) async fn in_time<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        let Some(timeout) = self.timeout else { return work.await };
        let count = self.count.unwrap_or(0);
        tokio::time::timeout(timeout, work).await.unwrap_or_else(|_| {
            Err(Failure::Timeout(format!("fewer than {count} values and changes came within {timeout:?}")))
        })
    }
}

/// Says each time that the server answers from an old state from now on.
async fn show_stale(client: &Client, out: Output) {
    let mut state = client.state();
    loop {
        out.stale(*state.borrow_and_update());
        if state.changed().await.is_err() {
            // The end is shown as that of the subscription.
            std::future::pending::<()>().await;
        }
    }
}

/// Writes the events of a subscription, until it ends or has delivered the number asked for.
pub(crate) async fn run(client: &Client, follow: &Follow, out: Output) -> Result<Exit, Failure> {
    let printing = async {
        let Follow { pattern, count, .. } = follow;
        let mut subscription = follow.begin(client).await?;
        let mut delivered = 0;
        while count.is_none_or(|count| delivered < count) {
            let Some(event) = subscription.next().await else { break };
            delivered += u64::from(matches!(event, Event::Update { .. } | Event::Gone { .. }));
            match out.event(pattern, &event) {
                Line::Result(line) => out.line(&line)?,
                Line::Note(note) | Line::Error(note) => out.note(&note)?,
            }
            if let Event::Ended(reason) = event {
                return Err(Failure::Ended(ended(&reason)));
            }
        }
        Ok(Exit::Ok)
    };
    tokio::select! {
        biased;
        exit = follow.in_time(printing) => exit,
        () = show_stale(client, out) => Ok(Exit::Ok),
        // With the next change it would be noticed too, but that may be long in coming.
        () = reader_has_gone() => Err(Failure::BrokenPipe),
    }
}
