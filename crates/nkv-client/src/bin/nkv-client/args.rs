//! What may be written on the command line, and on a line of the interactive mode: one parser for both.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::time::Duration;

use crate::kv_store;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use nkv_client::{Key, PageOptions, PutOptions, Revision};

const AFTER_HELP: &str = "\
ADDR is HOST[:PORT], nkv://HOST[:PORT], unix:PATH, /PATH or ws://HOST[:PORT][/PATH]; without it NKV_ADDR counts, then
127.0.0.1:4222.
The first word is an ADDR if it has a ':', '/' or '.', is localhost, or stands before a COMMAND. A COMMAND's name never is.
Without a COMMAND, commands are read from the terminal, or line by line from a pipe. An empty variable counts as not set.

Examples:
  nkv-client put lamp.kitchen on
  nkv-client db1:4222 get 'lamp.*' --json
  nkv-client put logo @logo.png --ttl 1h
  backup | nkv-client put backup -
  nkv-client put number -- -5
  nkv-client subscribe lamp --json | jq .

A get of a key writes the value alone to stdout, with a newline only on a terminal. Where several keys are written, each is
a line, KEY = VALUE, in which a backslash is written \\\\, a line end \\n, and a byte that is no text \\xff.
With --json each line is an object: op, key, value (a string, or an array of bytes where it is not UTF-8), revision and
more; an error is an object on stderr, with error and code. docs/cli.md describes all of them.

Exit status: 0 ok, 1 not found, 2 usage, 3 cannot connect, 5 conflict, 6 timeout or outcome unknown, 7 the server or
this machine fails, 130 interrupted. Commands from a pipe are all run; the first that fails gives the status.";

/// Options of all commands that are followed by a value.
const WITH_VALUE: [&str; 3] = ["--timeout", "--wait", "--name"];

const DELETE_HELP: &str = "`delete lamp` removes the key lamp alone; `delete 'lamp.*'` removes what is below it.";

/// Reads, writes and watches the values of an nkv server.
#[derive(Debug, Parser)]
#[command(name = "nkv-client", version, override_usage = "nkv-client [ADDR] [OPTIONS] [COMMAND]")]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Args {
    /// Writes one JSON object per line.
    #[arg(long, global = true)]
    pub(crate) json: bool,

    /// Writes nothing to stderr that is not an error.
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,

    /// How long connecting or a request may take: 500ms, 5s, 2m, 1h; and a subscribe with --once or --count in all.
    #[arg(long, global = true, value_name = "DURATION", value_parser = duration)]
    pub(crate) timeout: Option<Duration>,

    /// How long the server may take to come up. Without it, it is an error at once if no server listens at ADDR.
    #[arg(long, global = true, value_name = "DURATION", value_parser = duration)]
    pub(crate) wait: Option<Duration>,

    /// A name for people, which `trace` shows; without it NKV_NAME counts. It identifies nothing.
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) name: Option<String>,

    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Reads the value of a key, or all values below one with KEY.*
    Get {
        /// A key, KEY.* or *
        key: String,
        /// More of them: each value is a line then
        #[arg(value_name = "KEY", conflicts_with_all = ["limit", "after"])]
        more: Vec<String>,
        #[command(flatten)]
        page: PageArgs,
    },
    /// Writes the value of a key
    #[command(visible_alias = "set")]
    Put {
        /// The key
        key: String,
        /// The value; - reads it from stdin, @FILE from a file
        #[arg(allow_negative_numbers = true)]
        value: OsString,
        /// Takes VALUE as it is, also if it is - or begins with @
        #[arg(long)]
        raw: bool,
        /// Writes only if the key is at this revision; 0: only if it is absent
        #[arg(long, value_name = "N")]
        if_revision: Option<u64>,
        /// Lets the value end by itself after this time
        #[arg(long, value_name = "DURATION", value_parser = duration)]
        ttl: Option<Duration>,
    },
    /// Writes many values, each for itself: `put --pairs KEY=VALUE...`
    #[command(hide = true)]
    PutPairs {
        /// A key, '=' and its value
        #[arg(value_name = "KEY=VALUE", required = true)]
        pairs: Vec<String>,
    },
    /// Removes a key, or all below one with KEY.*
    #[command(visible_aliases = ["del", "rm"], after_help = DELETE_HELP)]
    Delete {
        /// A key, KEY.* or *
        key: String,
        /// Removes only if the key is at this revision
        #[arg(long, value_name = "N")]
        if_revision: Option<u64>,
    },
    /// Prints the changes of a key and all below it, the present values first
    #[command(visible_aliases = ["sub", "watch"])]
    Subscribe {
        /// A key, KEY.* or *
        key: String,
        /// Ends after the first value or change
        #[arg(long, conflicts_with = "count")]
        once: bool,
        /// Ends after this number of values and changes
        #[arg(long, value_name = "N")]
        count: Option<u64>,
        /// Prints changes alone, not the present values
        #[arg(long)]
        no_snapshot: bool,
        /// Subscribes to the key alone, not to what is below it
        #[arg(long)]
        exact: bool,
    },
    /// Ends a subscription of the interactive mode
    #[command(visible_alias = "unsub")]
    Unsubscribe {
        /// The pattern as it was subscribed
        key: String,
    },
    /// Lists keys
    #[command(visible_alias = "ls")]
    List {
        /// A key, KEY.* or *
        #[arg(default_value = "*")]
        key: String,
        /// With their values
        #[arg(long)]
        values: bool,
        #[command(flatten)]
        page: PageArgs,
    },
    /// Shows the keys as a tree
    Tree {
        /// A key, KEY.* or *
        #[arg(default_value = "*")]
        key: String,
    },
    /// Says whether there is such a key
    Exists {
        /// A key, KEY.* or *
        key: String,
    },
    /// Shows the subscriptions that cover a key, or without a key all clients that are connected
    Trace {
        /// The key
        key: Option<String>,
    },
    /// Asks whether the server works
    Health,
    /// Shows the versions of client and server
    Version,
    /// Shows the server's figures
    Stats,
    /// Shows the cluster that the server is a node of, and how it is with the other nodes
    Cluster,
    /// Ends the interactive mode
    #[command(visible_alias = "exit")]
    Quit,
}

#[derive(Debug, Default, clap::Args)]
pub(crate) struct PageArgs {
    /// The highest number of keys
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<u64>,
    /// Only keys after this one
    #[arg(long, value_name = "KEY")]
    pub(crate) after: Option<String>,
}

impl PageArgs {
    pub(crate) fn is_given(&self) -> bool {
        self.limit.is_some() || self.after.is_some()
    }

    pub(crate) fn options(&self) -> nkv_client::Result<PageOptions> {
        let mut options = PageOptions::default();
        (options.limit, options.after) = (self.limit, self.after.as_deref().map(Key::new).transpose()?);
        Ok(options)
    }
}

pub(crate) fn put_options(if_revision: Option<u64>, ttl: Option<Duration>) -> PutOptions {
    let mut options = PutOptions::default();
    (options.if_revision, options.ttl) = (if_revision.map(Revision::new), ttl);
    options
}

impl Command {
    /// Its name, as in JSON.
    pub(crate) fn op(&self) -> &'static str {
        match self {
            Command::Get { .. } => "get",
            Command::Put { .. } | Command::PutPairs { .. } => "put",
            Command::Delete { .. } => "delete",
            Command::Subscribe { .. } => "subscribe",
            Command::Unsubscribe { .. } => "unsubscribe",
            Command::List { .. } | Command::Tree { .. } => "list",
            Command::Exists { .. } => "exists",
            Command::Trace { .. } => "trace",
            Command::Health => "health",
            Command::Version => "version",
            Command::Stats => "stats",
            Command::Cluster => "cluster",
            Command::Quit => "quit",
        }
    }

    /// The key or pattern that it is about.
    pub(crate) fn key(&self) -> Option<&str> {
        match self {
            Command::Get { key, .. }
            | Command::Put { key, .. }
            | Command::Delete { key, .. }
            | Command::Subscribe { key, .. }
            | Command::Unsubscribe { key }
            | Command::List { key, .. }
            | Command::Tree { key }
            | Command::Exists { key } => Some(key),
            Command::Trace { key } => key.as_deref(),
            Command::PutPairs { .. }
            | Command::Health
            | Command::Version
            | Command::Stats
            | Command::Cluster
            | Command::Quit => None,
        }
    }
}

impl Args {
    /// Parses a command line, the program's name first; the address is returned aside.
    pub(crate) fn from_command_line(mut words: Vec<OsString>) -> Result<(Option<String>, Self), clap::Error> {
        let mut addr = None;
        kv_store::to_our_words(&mut words, first_plain);
        if let Some(at) = first_plain(&words, 1)
            && let Some(word) = words[at].to_str()
            && is_addr(word, first_plain(&words, at + 1).and_then(|next| words[next].to_str()))
        {
            addr = Some(word.to_owned());
            words.remove(at);
        }
        lowercase_command(&mut words, 1);
        let word = first_plain(&words, 1).and_then(|at| words[at].to_str()).map(str::to_owned);
        match (Args::try_parse_from(words), word) {
            (Err(mut error), Some(word)) if error.kind() == ErrorKind::InvalidSubcommand && addr.is_none() => {
                let tip = format!("a host of this name is nkv://{word}");
                error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
                Err(error)
            }
            (args, _) => Ok((addr, args?)),
        }
    }
}

/// Parses lines of a script or of the interactive mode.
#[derive(Debug)]
pub(crate) struct LineParser {
    command: clap::Command,
}

impl LineParser {
    pub(crate) fn new() -> Self {
        LineParser { command: Args::command().no_binary_name(true) }
    }

    /// Parses a line, with or without its end.
    ///
    /// Scripts come from other systems too: a byte order mark in front and a carriage return at the end are no part of
    /// the command, and what can only be another encoding or another kind of line end is refused.
    pub(crate) fn parse(&mut self, line: &[u8]) -> Result<Args, clap::Error> {
        let line = line.strip_prefix("\u{feff}".as_bytes()).unwrap_or(line);
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let mut wrong = |what| Err(self.command.error(ErrorKind::InvalidValue, what));
        if line.contains(&0) {
            return wrong("a zero byte: commands are read as UTF-8, and this may be UTF-16");
        }
        if line.contains(&b'\r') {
            return wrong(
                "a carriage return within the line: each command needs a line of its own, a value may be an @FILE",
            );
        }
        let Some(words) = shlex::bytes::split(line) else { return wrong("a quotation mark has no partner") };
        // Only a file may have a name that is no text.
        if words.iter().any(|word| !word.starts_with(b"@") && std::str::from_utf8(word).is_err()) {
            return wrong("not UTF-8");
        }
        let mut words: Vec<_> = words.into_iter().map(OsString::from_vec).collect();
        lowercase_command(&mut words, 0);
        let args = Args::from_arg_matches(&self.command.try_get_matches_from_mut(words)?)?;
        if args.wait.is_some() || args.name.is_some() {
            let what = "--wait and --name are about the connection: they belong to the command line";
            return Err(self.command.error(ErrorKind::ArgumentConflict, what));
        }
        if let Some(Command::Put { raw: true, value, .. }) = &args.command
            && value.to_str().is_none()
        {
            return Err(self.command.error(ErrorKind::InvalidValue, "not UTF-8"));
        }
        Ok(args)
    }
}

/// Whether JSON was asked for, in words that need not make sense.
pub(crate) fn asks_for_json(words: &[OsString]) -> bool {
    words.iter().take_while(|word| *word != "--").any(|word| word == "--json")
}

/// All words that a line may begin with.
pub(crate) fn command_words() -> Vec<String> {
    let command = Args::command();
    let names = command.get_subcommands().flat_map(|sub| sub.get_name_and_visible_aliases());
    names.chain(["help"]).map(str::to_owned).collect()
}

/// Whether the first word of a command line says where the server is; `next` is the word after it.
fn is_addr(word: &str, next: Option<&str>) -> bool {
    let commands = command_words();
    let is_command = |word: &str| commands.iter().any(|command| command.eq_ignore_ascii_case(word));
    let looks_like_one = word.contains([':', '/', '.']) || word.eq_ignore_ascii_case("localhost");
    !is_command(word) && (looks_like_one || next.is_some_and(is_command))
}

/// Where the first word stands that is neither an option nor an option's value.
fn first_plain(words: &[OsString], start: usize) -> Option<usize> {
    let mut at = start;
    loop {
        match words.get(at)?.to_str() {
            Some("--") => return None,
            Some(word) if WITH_VALUE.contains(&word) => at += 2,
            Some(word) if word.starts_with('-') => at += 1,
            _ => return Some(at),
        }
    }
}

fn lowercase_command(words: &mut [OsString], start: usize) {
    if let Some(at) = first_plain(words, start) {
        words[at].make_ascii_lowercase();
    }
}

/// What is wrong, in one line and without the usage.
pub(crate) fn in_short(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let end = ["\n\nUsage:", "\n\nFor more information"].iter().filter_map(|part| text.find(part)).min();
    text[..end.unwrap_or(text.len())].split_whitespace().collect::<Vec<_>>().join(" ")
}

fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let seconds = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3_600.0,
        "d" => 86_400.0,
        _ => return Err("write a number and ms, s, m, h or d, such as 500ms".into()),
    };
    let number: f64 = number.parse().map_err(|_| "it must begin with a number, such as 500ms")?;
    let duration = Duration::try_from_secs_f64(number * seconds).map_err(|error| error.to_string())?;
    if duration.is_zero() { Err("it must be more than nothing".into()) } else { Ok(duration) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command_line(words: &[&str]) -> (Option<String>, Args) {
        let words = ["nkv-client"].iter().chain(words).map(OsString::from).collect();
        Args::from_command_line(words).unwrap()
    }

    #[test]
    fn an_address_is_distinguished_from_a_command_and_stands_only_in_front() {
        for (words, addr) in [
            (&["db1:4222", "get", "a"][..], Some("db1:4222")),
            (&["db1", "get", "a"], Some("db1")),
            (&["-q", "localhost", "Get", "a"], Some("localhost")),
            (&["10.0.0.1", "get", "a"], Some("10.0.0.1")),
            (&["[::1]", "get", "a"], Some("[::1]")),
            (&["get:4222", "get", "a"], Some("get:4222")),
            (&["get", "get"], None),
            (&["get", "list"], None),
            (&["--timeout", "1s", "/run/nkv", "get", "a"], Some("/run/nkv")),
            (&["--json", "unix:x", "GET", "a"], Some("unix:x")),
            (&["get", "a:b"], None),
            (&["GET", "a/b", "--json"], None),
        ] {
            let (found, args) = command_line(words);
            assert_eq!(found.as_deref(), addr, "{words:?}");
            assert!(matches!(args.command, Some(Command::Get { .. })), "{words:?}");
        }
    }

    #[test]
    fn a_line_and_a_command_line_are_read_alike() {
        let mut lines = LineParser::new();
        let args = lines.parse(b"--json PUT 'a b' \"c d\" --ttl 1.5s").unwrap();
        let Some(Command::Put { key, value, ttl, .. }) = args.command else { panic!("no put") };
        assert_eq!((key.as_str(), value.to_str(), ttl), ("a b", Some("c d"), Some(Duration::from_millis(1_500))));
        assert!(args.json);
        for line in ["put a -- --json", "put a -5", "del a", "sub a --once", "ls", "exit", "put a -"] {
            assert!(lines.parse(line.as_bytes()).is_ok_and(|args| !args.json), "{line}");
        }
        for line in ["put a", "get", "put a 'b", "fly", "put a b c", "put a b --ttl 0", "put a b --ttl 1y"] {
            assert!(lines.parse(line.as_bytes()).is_err(), "{line}");
        }
    }

    // A script from another system stored 'one\r', or bytes of Latin-1.
    #[test]
    fn lines_of_other_systems_are_understood_or_refused() {
        let mut lines = LineParser::new();
        for (line, value) in [
            (&b"put a one\r\n"[..], "one"),
            (b"\xef\xbb\xbfput a one\n", "one"),
            (b"put a 'two words'\r", "two words"),
            (b"put a '\xc3\xa9'\n", "\u{e9}"),
        ] {
            let Some(Command::Put { value: found, .. }) = lines.parse(line).unwrap().command else { panic!("no put") };
            assert_eq!(found.to_str(), Some(value), "{line:?}");
        }
        for line in
            [&b"put a caf\xe9\n"[..], b"put a 1\rput b 2\r\n", b"p\0u\0t\0", b"\xff\xfep\0", b"put --raw a @\xff"]
        {
            assert!(lines.parse(line).is_err(), "{line:?}");
        }
        assert!(lines.parse(b"put a @caf\xe9").is_ok(), "the name of a file");
    }

    #[test]
    fn what_is_wrong_is_reported_in_one_line() {
        let error = LineParser::new().parse(b"put a").unwrap_err();
        assert_eq!(in_short(&error), "the following required arguments were not provided: <VALUE>");
        assert_eq!(in_short(&LineParser::new().parse(b"put 'a").unwrap_err()), "a quotation mark has no partner");
    }
}
