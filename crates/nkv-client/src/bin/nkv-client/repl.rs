//! The interactive mode: commands from a terminal, with completion and a history, or plainly from a pipe.
//!
//! From a terminal it ends with 0, whatever became of the commands; from a pipe, with the first failure among them.
//! Subscriptions go on while the next command is typed. What they tell is written above the prompt.

use std::collections::HashMap;
use std::io::{self, BufRead, IsTerminal};
use std::path::PathBuf;
use std::time::Duration;

use nkv_client::{Client, PageOptions, Subscription};
use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::history::FileHistory;
use rustyline::{Config, Context, Editor, ExternalPrinter, Helper};
use serde_json::json;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::args::{Args, Command, command_words};
use crate::interruptible;
use crate::output::{Line, Output, complain};
use crate::run::{Exit, Failure, not_found, run};

const PROMPT: &str = "nkv> ";
const HISTORY_LEN: usize = 1_000;
/// How long a completion may keep a person waiting, and how many keys it offers.
const COMPLETION_PATIENCE: Duration = Duration::from_millis(300);
const COMPLETIONS_MAX: u64 = 100;
/// How long the last words of subscriptions are waited for.
const FAREWELL: Duration = Duration::from_secs(1);
/// Lines of subscriptions that wait to be written; more wait, conflated, in their subscriptions.
const LINES_MAX: usize = 64;

/// Reads and runs commands until there are no more.
pub(crate) fn serve(runtime: &Runtime, client: &Client, json: bool) -> Result<Exit, Failure> {
    if io::stdin().is_terminal() && io::stdout().is_terminal() {
        from_terminal(runtime, client, json)
    } else {
        from_pipe(runtime, client, json)
    }
}

/// All commands are run, also after one that failed; the end is that of the first that did.
fn from_pipe(runtime: &Runtime, client: &Client, json: bool) -> Result<Exit, Failure> {
    let (lines, mut written) = mpsc::channel::<Vec<u8>>(LINES_MAX);
    let out = Output { terminal: false, ..Output::new(json, true) };
    let writer = runtime.spawn_blocking(move || {
        while let Some(line) = written.blocking_recv() {
            if out.line(&line).is_err() {
                return;
            }
        }
    });
    let mut session = Session { client, json, lines, subscriptions: HashMap::new() };
    // Nothing else could end a program that waits for its stdin; so this listens before the first command is read.
    let (listening, listens) = oneshot::channel();
    runtime.spawn(async {
        let interrupted = interruptible(async {
            // Nobody waits for it if the runtime is shutting down.
            _ = listening.send(());
            std::future::pending::<Result<(), Failure>>().await
        });
        if let Err(Failure::Interrupted) = interrupted.await {
            std::process::exit(i32::from(Exit::Interrupted as u8));
        }
    });
    // An error means that nobody can listen; commands are run all the same.
    _ = runtime.block_on(listens);
    let mut stdin = io::stdin().lock();
    let mut line = Vec::new();
    let mut exit = Exit::Ok;
    loop {
        line.clear();
        match stdin.read_until(b'\n', &mut line) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) => return Err(Failure::System(format!("cannot read stdin: {error}"))),
        }
        let done = match std::str::from_utf8(&line) {
            Ok(text) => session.line(runtime, text)?,
            Err(_) => Some(Failure::Usage("a line that is not UTF-8".into()).report(json)),
        };
        match done {
            Some(done) if exit == Exit::Ok => exit = done,
            Some(_) => {}
            None => break,
        }
    }
    runtime.block_on(session.end(writer));
    Ok(exit)
}

fn from_terminal(runtime: &Runtime, client: &Client, json: bool) -> Result<Exit, Failure> {
    let terminal = |error: ReadlineError| Failure::System(format!("cannot use the terminal: {error}"));
    let config = Config::builder().completion_type(rustyline::CompletionType::List);
    let config = config.max_history_size(HISTORY_LEN).map_err(terminal)?.history_ignore_space(true).build();
    let mut editor = Editor::<Words, FileHistory>::with_config(config).map_err(terminal)?;
    editor.set_helper(Some(Words {
        client: client.clone(),
        runtime: runtime.handle().clone(),
        words: command_words(),
    }));
    let mut history = history_file();
    if let Some(path) = &history
        && path.exists()
        && let Err(error) = editor.load_history(path)
    {
        complain(&format!("nkv-client: cannot read the history {}: {error}", path.display()));
    }
    let Ok(mut printer) = editor.create_external_printer() else {
        // A terminal without a cursor to move, such as TERM=dumb.
        return from_pipe(runtime, client, json).map(|_| Exit::Ok);
    };
    let (lines, mut written) = mpsc::channel::<Vec<u8>>(LINES_MAX);
    // A thread of its own: the printer blocks when the prompt is not there to take what it says.
    let writer = runtime.spawn_blocking(move || {
        while let Some(line) = written.blocking_recv() {
            let line = String::from_utf8_lossy(&line).into_owned();
            if printer.print(line + "\n").is_err() {
                return;
            }
        }
    });
    let mut session = Session { client, json, lines, subscriptions: HashMap::new() };
    loop {
        match editor.readline(PROMPT) {
            Ok(line) => {
                remember(&mut editor, &mut history, &line);
                if session.line(runtime, &line)?.is_none() {
                    break;
                }
            }
            Err(ReadlineError::Interrupted) => {}
            Err(ReadlineError::Eof) => break,
            Err(error) => return Err(terminal(error)),
        }
    }
    drop(editor);
    runtime.block_on(session.end(writer));
    Ok(Exit::Ok)
}

/// Adds a line to the history and its file at once: what is typed next may end the program.
fn remember(editor: &mut Editor<Words, FileHistory>, file: &mut Option<PathBuf>, line: &str) {
    if line.trim().is_empty() {
        return;
    }
    let added = editor.add_history_entry(line);
    let Some(path) = file.as_ref() else { return };
    if let Err(error) = added.and_then(|_| editor.append_history(path)) {
        complain(&format!("nkv-client: cannot write the history {}: {error}", path.display()));
        *file = None;
    }
}

struct Session<'a> {
    client: &'a Client,
    json: bool,
    /// Where lines of subscriptions go.
    lines: mpsc::Sender<Vec<u8>>,
    /// By pattern: what ends it when it is dropped, and its end.
    subscriptions: HashMap<String, (oneshot::Sender<()>, JoinHandle<()>)>,
}

impl Session<'_> {
    /// Runs a line and says how it ended; `None` when it was the last.
    fn line(&mut self, runtime: &Runtime, line: &str) -> Result<Option<Exit>, Failure> {
        if line.trim().is_empty() {
            return Ok(Some(Exit::Ok));
        }
        let args = match Args::from_line(line) {
            Ok(args) => args,
            Err(error) => {
                // What cannot be shown cannot be helped.
                drop(error.print());
                return Ok(Some(if error.use_stderr() { Exit::Usage } else { Exit::Ok }));
            }
        };
        let out = Output::new(self.json || args.json, true);
        let client = match args.timeout {
            Some(timeout) => self.client.with_request_timeout(timeout),
            None => self.client.clone(),
        };
        let done = match &args.command {
            None => Ok(Exit::Ok),
            Some(Command::Quit) => return Ok(None),
            Some(Command::Subscribe { key, once, count }) => {
                let count = if *once { Some(1) } else { *count };
                runtime.block_on(interruptible(self.subscribe(&client, key, count, out)))
            }
            Some(Command::Unsubscribe { key }) => self.unsubscribe(key, out),
            Some(command) => runtime.block_on(interruptible(run(&client, command, out))),
        };
        match done {
            Err(Failure::BrokenPipe) => Err(Failure::BrokenPipe),
            done => Ok(Some(done.unwrap_or_else(|failure| failure.report(out.json)))),
        }
    }

    async fn subscribe(
        &mut self,
        client: &Client,
        pattern: &str,
        count: Option<u64>,
        out: Output,
    ) -> Result<Exit, Failure> {
        self.subscriptions.retain(|_, (_, telling)| !telling.is_finished());
        if self.subscriptions.contains_key(pattern) {
            return Err(Failure::Usage(format!("'{pattern}' is subscribed already")));
        }
        let subscription = client.subscribe(pattern).await?;
        answer(out, "subscribe", pattern)?;
        let (stop, stopped) = oneshot::channel();
        let telling = tokio::spawn(tell(subscription, pattern.to_owned(), count, out, self.lines.clone(), stopped));
        self.subscriptions.insert(pattern.to_owned(), (stop, telling));
        Ok(Exit::Ok)
    }

    fn unsubscribe(&mut self, pattern: &str, out: Output) -> Result<Exit, Failure> {
        self.subscriptions.retain(|_, (_, telling)| !telling.is_finished());
        match self.subscriptions.remove(pattern) {
            Some(_) => answer(out, "unsubscribe", pattern)?,
            None => return not_found("unsubscribe", pattern, out),
        }
        Ok(Exit::Ok)
    }

    /// Lets subscriptions tell what has already come, such as the changes that this session itself made.
    async fn end(self, writer: JoinHandle<()>) {
        let Session { lines, subscriptions, .. } = self;
        let last_words = async {
            for (stop, telling) in subscriptions.into_values() {
                drop(stop);
                // A task that broke has nothing more to say.
                drop(telling.await);
            }
            drop(lines);
            drop(writer.await);
        };
        // Whoever does not read by then does not want to know.
        drop(tokio::time::timeout(FAREWELL, last_words).await);
    }
}

fn answer(out: Output, op: &str, pattern: &str) -> io::Result<()> {
    if out.json { out.object(&json!({"op": op, "key": pattern})) } else { out.note("OK") }
}

/// Writes what a subscription tells until it has told enough, or is stopped and has nothing more to say.
async fn tell(
    mut subscription: Subscription,
    pattern: String,
    count: Option<u64>,
    out: Output,
    lines: mpsc::Sender<Vec<u8>>,
    mut stopped: oneshot::Receiver<()>,
) {
    let mut told = 0;
    while count.is_none_or(|count| told < count) {
        let event = tokio::select! {
            biased;
            event = subscription.next() => event,
            _ = &mut stopped => return,
        };
        let Some(event) = event else { return };
        let line = match out.event(&pattern, &event) {
            Line::Result(line) => line,
            Line::Note(note) => note.into_bytes(),
        };
        told += u64::from(matches!(event, nkv_client::Event::Update { .. } | nkv_client::Event::Gone { .. }));
        if lines.send(line).await.is_err() {
            return;
        }
    }
}

/// `$XDG_STATE_HOME/nkv/history`, if there is a home.
fn history_file() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = absolute("XDG_STATE_HOME").or_else(|| Some(absolute("HOME")?.join(".local/state")))?;
    let dir = state.join("nkv");
    match std::fs::create_dir_all(&dir) {
        Ok(()) => Some(dir.join("history")),
        Err(error) => {
            complain(&format!("nkv-client: no history: {}: {error}", dir.display()));
            None
        }
    }
}

/// Completes commands and keys.
struct Words {
    client: Client,
    runtime: Handle,
    words: Vec<String>,
}

impl Completer for Words {
    type Candidate = String;

    fn complete(&self, line: &str, pos: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<String>)> {
        let before = &line[..pos];
        let start = before
            .rfind(char::is_whitespace)
            .map_or(0, |at| at + before[at..].chars().next().map_or(1, char::len_utf8));
        let word = &before[start..];
        let found = match before[..start].split_whitespace().count() {
            0 => {
                let word = word.to_ascii_lowercase();
                self.words.iter().filter(|known| known.starts_with(&word)).map(|known| format!("{known} ")).collect()
            }
            1 => self.keys(word),
            _ => Vec::new(),
        };
        Ok((start, found))
    }
}

impl rustyline::hint::Hinter for Words {
    type Hint = String;
}

impl rustyline::highlight::Highlighter for Words {}

impl rustyline::validate::Validator for Words {}

impl Helper for Words {}

impl Words {
    /// Keys that begin like this: they follow one another in key order.
    fn keys(&self, word: &str) -> Vec<String> {
        let client = self.client.with_request_timeout(COMPLETION_PATIENCE);
        let after = Some(word.trim_end_matches('.').to_owned()).filter(|after| !after.is_empty());
        let found = self.runtime.block_on(async {
            let mut options = PageOptions::default().with_limit(COMPLETIONS_MAX);
            options.after = after;
            let page = client.list_page("*", options).await?;
            let own = if word.is_empty() || word.ends_with('.') { Vec::new() } else { client.list(word).await? };
            Ok::<_, nkv_client::Error>(own.into_iter().chain(page.items))
        });
        // No completion is no reason to disturb a person who types.
        let keys = found.into_iter().flatten().map(|(key, _)| key.to_string());
        keys.take_while(|key| key.starts_with(word)).collect()
    }
}
