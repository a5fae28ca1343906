//! The interactive mode of a terminal, with completion and a history.
//!
//! It ends with 0, whatever became of the commands. Subscriptions go on while the next command is typed. Their events
//! are written above the prompt.

use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::time::Duration;

use nkv_client::{Client, Key, PageOptions};
use rustyline::completion::{Completer, Pair, Quote, escape, unescape};
use rustyline::error::ReadlineError;
use rustyline::history::FileHistory;
use rustyline::{Config, Context, Editor, ExternalPrinter, Helper};
use tokio::runtime::{Handle, Runtime};
use tokio::sync::mpsc;

use crate::args::{Command, command_words};
use crate::failure::{Exit, Failure};
use crate::output::{Line, Place, complain, help};
use crate::session::{LINES_MAX, Parsed, Session, Settings};
use crate::{interruptible, script, stdio};

const PROMPT: &str = "nkv> ";
const HISTORY_LEN: usize = 1_000;
/// How long a completion may keep a person waiting, how many keys it shows, and how many it asks for at a time.
const COMPLETION_PATIENCE: Duration = Duration::from_millis(300);
const COMPLETIONS_MAX: usize = 100;
const COMPLETION_PAGE: u64 = 10_000;

/// Reads and runs commands until there are no more.
pub(crate) fn serve(runtime: &Runtime, client: &Client, settings: Settings) -> Result<Exit, Failure> {
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        return script::serve(runtime, client, settings);
    }
    let terminal = |error: ReadlineError| Failure::System(format!("cannot use the terminal: {error}"));
    let config = Config::builder().completion_type(rustyline::CompletionType::List);
    // One more than what is shown says that there are others.
    let config = config.completion_prompt_limit(COMPLETIONS_MAX + 1).bracketed_paste(true);
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
        return script::serve(runtime, client, settings).map(|_| Exit::Ok);
    };
    let (lines, mut written) = mpsc::channel::<Line>(LINES_MAX);
    // A thread of its own: the printer blocks when the prompt is not there to take what it says.
    let writer = runtime.spawn_blocking(move || {
        while let Some(line) = written.blocking_recv() {
            let line = match line {
                Line::Result(line) => String::from_utf8_lossy(&line).into_owned(),
                Line::Note(line) | Line::Error(line) => line,
            };
            if printer.print(line + "\n").is_err() {
                return;
            }
        }
    });
    let mut session = Session::new(client, settings, lines);
    loop {
        match editor.readline(PROMPT) {
            // What was pasted comes as one, with the ends of its lines.
            Ok(lines) => {
                for line in lines.split('\n') {
                    remember(&mut editor, &mut history, line);
                }
                if !run_lines(runtime, &mut session, &lines)? {
                    break;
                }
            }
            Err(ReadlineError::Interrupted) => {}
            Err(ReadlineError::Eof) => break,
            Err(ReadlineError::Io(error)) if error.kind() == io::ErrorKind::InvalidData => {
                // It is not known where in a line what follows begins.
                stdio::drop_typed().map_err(|error| terminal(error.into()))?;
                let what = "not UTF-8: this line is dropped, and what was pasted behind it".to_owned();
                Failure::Usage(what).report(session.output(Place::Prompt), None);
            }
            Err(error) => return Err(terminal(error)),
        }
    }
    drop(editor);
    runtime.block_on(session.end(writer));
    Ok(Exit::Ok)
}

/// Runs lines one by one; false if one of them ends the session.
fn run_lines(runtime: &Runtime, session: &mut Session<'_>, lines: &str) -> Result<bool, Failure> {
    for line in lines.split('\n') {
        match session.parse(line.as_bytes(), Place::Prompt) {
            Ok(Parsed::Nothing) => {}
            Ok(Parsed::Help(text)) => help(&text)?,
            Ok(Parsed::Given(given)) if matches!(given.command, Command::Quit) => return Ok(false),
            Ok(Parsed::Given(given)) => match runtime.block_on(interruptible(session.run(&given))) {
                Ok(_) => {}
                Err(Failure::BrokenPipe) => return Err(Failure::BrokenPipe),
                // The lines behind it were given in one go with it.
                Err(Failure::Interrupted) => return Ok(true),
                Err(failure) => drop(failure.report(given.out, Some(&given.command))),
            },
            Err((out, failure)) => drop(failure.report(out, None)),
        }
    }
    Ok(true)
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
    type Candidate = Pair;

    fn complete(&self, line: &str, pos: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<Pair>)> {
        let before = &line[..pos];
        let start = before.trim_end_matches(|c: char| !c.is_whitespace()).len();
        let word = &before[start..];
        let found = match before[..start].split_whitespace().count() {
            0 => {
                let word = word.to_ascii_lowercase();
                let known = self.words.iter().filter(|known| known.starts_with(&word));
                known.map(|known| Pair { display: known.clone(), replacement: format!("{known} ") }).collect()
            }
            1 => self.keys(&unquoted(word)),
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
    fn keys(&self, word: &str) -> Vec<Pair> {
        let mut known = Known::new(word);
        let asked =
            self.runtime.block_on(async { tokio::time::timeout(COMPLETION_PATIENCE, self.look_up(&mut known)).await });
        // No completion is no reason to disturb a person who types.
        let is_complete = matches!(asked, Ok(Ok(())));
        known.candidates(is_complete)
    }

    async fn look_up(&self, known: &mut Known) -> nkv_client::Result<()> {
        let word = known.word.trim_end_matches('.');
        let mut after = if word.is_empty() { None } else { Some(Key::new(word)?) };
        if after.as_ref().is_some_and(|after| after.as_str() == known.word)
            && let Some((key, _)) = self.client.list(&known.word).await?.first()
        {
            known.add(key.as_str());
        }
        loop {
            let mut options = PageOptions::default().with_limit(COMPLETION_PAGE);
            options.after = after;
            let page = self.client.list_page("*", options).await?;
            if !page.items.iter().all(|(key, _)| known.add(key.as_str())) || !page.more || known.says_all() {
                return Ok(());
            }
            after = page.items.last().map(|(key, _)| key.clone());
        }
    }
}

/// What is known of the keys that begin with a word.
struct Known {
    word: String,
    /// The first of them.
    keys: Vec<String>,
    count: usize,
    /// What all of them begin with.
    common: Option<String>,
}

impl Known {
    fn new(word: &str) -> Self {
        Known { word: word.to_owned(), keys: Vec::new(), count: 0, common: None }
    }

    /// Adds the next key in key order; false if it does not begin with the word: then no other does.
    fn add(&mut self, key: &str) -> bool {
        if !key.starts_with(&self.word) {
            return false;
        }
        self.count += 1;
        if self.keys.len() < COMPLETIONS_MAX {
            self.keys.push(key.to_owned());
        }
        match &mut self.common {
            None => self.common = Some(key.to_owned()),
            Some(common) => {
                let shared = common.chars().zip(key.chars()).take_while(|(a, b)| a == b);
                common.truncate(shared.map(|(c, _)| c.len_utf8()).sum());
            }
        }
        true
    }

    /// Whether no other key could change what is offered.
    fn says_all(&self) -> bool {
        self.count > COMPLETIONS_MAX && self.common.as_ref() == Some(&self.word)
    }

    /// What is offered. If there are more keys than these, what they have in common is offered too, so that no more than
    /// that is put into the line.
    fn candidates(self, is_complete: bool) -> Vec<Pair> {
        let pair = |key: &String| Pair { display: key.clone(), replacement: quoted(key) };
        let mut candidates: Vec<_> = self.keys.iter().map(pair).collect();
        if !candidates.is_empty() && (!is_complete || self.count > COMPLETIONS_MAX) {
            let common = if is_complete { self.common.unwrap_or_default() } else { self.word };
            candidates.push(Pair { display: "...".into(), replacement: quoted(&common) });
        }
        candidates
    }
}

/// What means something else to the parser of lines than itself.
const SPECIAL: [char; 4] = ['\'', '"', '\\', '#'];

fn quoted(key: &str) -> String {
    escape(key.to_owned(), Some('\\'), |c| SPECIAL.contains(&c), Quote::None)
}

/// A word as the parser of lines understands it, if it is quoted with backslashes alone.
fn unquoted(word: &str) -> String {
    unescape(word, Some('\\')).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offered(word: &str, keys: &[String], is_complete: bool) -> Vec<String> {
        let mut known = Known::new(word);
        assert!(keys.iter().all(|key| known.add(key)));
        known.candidates(is_complete).into_iter().map(|pair| pair.replacement).collect()
    }

    // The first hundred keys were taken for all, and what they have in common was put into the line.
    #[test]
    fn what_is_completed_is_common_to_all_keys_however_many() {
        let mut keys: Vec<_> = (0..COMPLETIONS_MAX).map(|n| format!("lamp.a.{n:03}")).collect();
        assert_eq!(offered("la", &keys, true), keys);
        keys.push("lamp.b".into());
        let many = offered("la", &keys, true);
        assert_eq!((many.len(), many.last().unwrap().as_str()), (COMPLETIONS_MAX + 1, "lamp."));
        assert_eq!(rustyline::completion::longest_common_prefix(&many), Some("lamp."));
        // Not all were seen in time.
        let some = offered("la", &keys[..3], false);
        assert_eq!(rustyline::completion::longest_common_prefix(&some), Some("la"));
        assert!(offered("la", &[], false).is_empty());
    }

    #[test]
    fn a_key_is_completed_as_the_parser_of_lines_understands_it() {
        let key = r#"o'clock."x"\#1"#;
        assert_eq!(unquoted(&quoted(key)), key);
        assert_eq!(shlex::split(&quoted(key)).unwrap(), [key]);
        assert_eq!(quoted("lamp.\u{e9}"), "lamp.\u{e9}");
    }
}
