//! Several commands, one after another, and the subscriptions that go on beside them.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nkv_client::{Client, Event, Subscription};
use serde_json::json;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::args::{Command, LineParser, in_short};
use crate::failure::{Exit, Failure};
use crate::follow::Follow;
use crate::output::{Line, Output, Place, at, ended};
use crate::run::{check, run};

/// Lines of subscriptions that wait to be written; more wait, conflated, in their subscriptions.
pub(crate) const LINES_MAX: usize = 64;
/// How long the last words of subscriptions are waited for.
const FAREWELL: Duration = Duration::from_secs(1);

/// What all commands of a session have in common, unless they say otherwise.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    pub(crate) out: Output,
    pub(crate) timeout: Option<Duration>,
}

/// A command of a session, with all that it needs.
pub(crate) struct Given {
    pub(crate) client: Client,
    pub(crate) command: Command,
    pub(crate) out: Output,
    /// How long it may take, if that was said.
    pub(crate) timeout: Option<Duration>,
}

/// What a line holds.
pub(crate) enum Parsed {
    /// White space, or a comment.
    Nothing,
    /// The help that it asks for.
    Help(Box<clap::Error>),
    Given(Box<Given>),
}

pub(crate) struct Session<'a> {
    client: &'a Client,
    settings: Settings,
    parser: LineParser,
    /// Where lines of subscriptions go.
    lines: mpsc::Sender<Line>,
    /// By pattern: what ends it when it is dropped, and its end.
    subscriptions: HashMap<String, (oneshot::Sender<()>, JoinHandle<()>)>,
    pub(crate) failures: Failures,
}

/// The first command that failed, by its line.
#[derive(Clone, Debug, Default)]
pub(crate) struct Failures(Arc<Mutex<Option<(u64, Exit)>>>);

impl Failures {
    pub(crate) fn add(&self, place: Place, exit: Exit) {
        let Place::Line(line) = place else { return };
        let mut first = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if exit != Exit::Ok && first.is_none_or(|(known, _)| line < known) {
            *first = Some((line, exit));
        }
    }

    pub(crate) fn first(&self) -> Exit {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).map_or(Exit::Ok, |(_, exit)| exit)
    }
}

impl<'a> Session<'a> {
    pub(crate) fn new(client: &'a Client, settings: Settings, lines: mpsc::Sender<Line>) -> Self {
        let (parser, subscriptions, failures) = (LineParser::new(), HashMap::new(), Failures::default());
        Session { client, settings, parser, lines, subscriptions, failures }
    }

    /// How what is about a line is shown, before it is known what the line asks for.
    pub(crate) fn output(&self, place: Place) -> Output {
        Output { place, ..self.settings.out }
    }

    /// Parses a line; what is wrong with it goes with how to show that.
    pub(crate) fn parse(&mut self, line: &[u8], place: Place) -> Result<Parsed, (Output, Failure)> {
        let mut out = self.output(place);
        let args = match self.parser.parse(line) {
            Ok(args) => args,
            Err(error) if !error.use_stderr() => return Ok(Parsed::Help(Box::new(error))),
            Err(error) => {
                out.json |= line.split(u8::is_ascii_whitespace).any(|word| word == b"--json");
                return Err((out, Failure::Usage(in_short(&error))));
            }
        };
        let Some(command) = args.command else { return Ok(Parsed::Nothing) };
        (out.json, out.quiet) = (out.json || args.json, out.quiet || args.quiet);
        let client = match args.timeout {
            Some(timeout) => self.client.with_request_timeout(timeout),
            None => self.client.clone(),
        };
        let timeout = args.timeout.or(self.settings.timeout);
        Ok(Parsed::Given(Box::new(Given { client, command, out, timeout })))
    }

    /// Runs any command but the one that ends the session.
    pub(crate) async fn run(&mut self, given: &Given) -> Result<Exit, Failure> {
        let Given { client, command, out, timeout } = given;
        check(command)?;
        match command {
            Command::Unsubscribe { key } => self.unsubscribe(key, *out),
            command => match Follow::new(command, *timeout) {
                Some(follow) => self.subscribe(client, follow, *out).await,
                None => run(client, command, *out).await,
            },
        }
    }

    /// Whether a subscription is under way.
    pub(crate) fn is_subscribed(&self) -> bool {
        self.subscriptions.values().any(|(_, printing)| !printing.is_finished())
    }

    async fn subscribe(&mut self, client: &Client, follow: Follow, out: Output) -> Result<Exit, Failure> {
        self.subscriptions.retain(|_, (_, printing)| !printing.is_finished());
        let pattern = follow.pattern.clone();
        if self.subscriptions.contains_key(&pattern) {
            return Err(Failure::Usage(format!("'{pattern}' is subscribed already")));
        }
        let subscription = follow.begin(client).await?;
        answer(out, "subscribe", &pattern)?;
        let (stop, stopped) = oneshot::channel();
        let (lines, failures) = (self.lines.clone(), self.failures.clone());
        let printing = tokio::spawn(async move {
            let Err(failure) = follow.in_time(print(subscription, &follow, out, &lines, stopped)).await else { return };
            let (exit, what) = failure.in_words(out, None);
            failures.add(out.place, exit);
            if let Some(what) = what {
                // Closed means that nothing can be shown any more.
                _ = lines.send(Line::Error(what)).await;
            }
        });
        self.subscriptions.insert(pattern, (stop, printing));
        Ok(Exit::Ok)
    }

    fn unsubscribe(&mut self, pattern: &str, out: Output) -> Result<Exit, Failure> {
        self.subscriptions.retain(|_, (_, printing)| !printing.is_finished());
        match self.subscriptions.remove(pattern) {
            Some(_) => answer(out, "unsubscribe", pattern)?,
            None => return Err(Failure::NotFound),
        }
        Ok(Exit::Ok)
    }

    /// Lets subscriptions print what has already come, such as the changes that this session itself made.
    pub(crate) async fn end(self, writer: JoinHandle<()>) {
        let Session { lines, subscriptions, .. } = self;
        let last_words = async {
            for (stop, printing) in subscriptions.into_values() {
                drop(stop);
                // A task that broke has nothing more to say.
                drop(printing.await);
            }
            drop(lines);
            drop(writer.await);
        };
        // What is not read by then is dropped.
        drop(tokio::time::timeout(FAREWELL, last_words).await);
    }
}

fn answer(out: Output, op: &str, pattern: &str) -> io::Result<()> {
    if out.json { out.object(&json!({"op": op, "key": pattern})) } else { out.note("OK") }
}

/// Writes the events of a subscription until it has delivered the number asked for, or is stopped and none is left.
async fn print(
    mut subscription: Subscription,
    follow: &Follow,
    out: Output,
    lines: &mpsc::Sender<Line>,
    mut stopped: oneshot::Receiver<()>,
) -> Result<(), Failure> {
    let mut delivered = 0;
    while follow.count.is_none_or(|count| delivered < count) {
        let event = tokio::select! {
            biased;
            event = subscription.next() => event,
            _ = &mut stopped => return Ok(()),
        };
        let Some(event) = event else { return Ok(()) };
        let line = match out.event(&follow.pattern, &event) {
            Line::Note(_) if out.quiet => None,
            Line::Note(note) => Some(Line::Note(at(out.place, &note))),
            line => Some(line),
        };
        delivered += u64::from(matches!(event, Event::Update { .. } | Event::Gone { .. }));
        if let Some(line) = line
            && lines.send(line).await.is_err()
        {
            return Ok(());
        }
        if let Event::Ended(reason) = event {
            return Err(Failure::Ended(ended(&reason)));
        }
    }
    Ok(())
}
