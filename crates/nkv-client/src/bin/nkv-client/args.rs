//! What may be written on the command line, and on a line of the interactive mode: one parser for both.

use std::ffi::OsString;
use std::time::Duration;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use nkv_client::{PageOptions, PutOptions, Revision};

const AFTER_HELP: &str = "\
ADDR is HOST:PORT, nkv://HOST:PORT, unix:PATH or /PATH; without it NKV_ADDR counts, then 127.0.0.1:4222.
Without a COMMAND, commands are read from the terminal, or line by line from a pipe.

Examples:
  nkv-client put lamp.kitchen on
  nkv-client db1:4222 get 'lamp.*' --json
  nkv-client put logo @logo.png --ttl 1h
  backup | nkv-client put backup -
  nkv-client put number -- -5
  nkv-client subscribe lamp --json | jq .

A get writes the value alone to stdout, with a newline only on a terminal. With --json each line is an object: op, key,
value (a string, or an array of bytes where it is not UTF-8), revision and more.

Exit status: 0 ok, 1 not found, 2 usage, 3 cannot connect, 5 conflict, 6 timeout or outcome unknown, 7 the server or
this machine fails, 130 interrupted. Commands from a pipe are all run; the first that fails gives the status.";

const DELETE_HELP: &str = "`delete lamp` removes the key lamp alone; `delete 'lamp.*'` removes what is below it.";

/// Reads, writes and watches the values of an nkv server.
#[derive(Debug, Parser)]
#[command(name = "nkv-client", version, override_usage = "nkv-client [ADDR] [OPTIONS] [COMMAND]")]
#[command(after_help = AFTER_HELP, infer_subcommands = false)]
pub(crate) struct Args {
    /// Writes one JSON object per line.
    #[arg(long, global = true)]
    pub(crate) json: bool,

    /// How long connecting or a request may take: 500ms, 5s, 2m, 1h.
    #[arg(long, global = true, value_name = "DURATION", value_parser = duration)]
    pub(crate) timeout: Option<Duration>,

    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Reads the value of a key, or all values below one with KEY.*
    Get {
        /// A key, KEY.* or *
        key: String,
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
    /// Removes a key, or all below one with KEY.*
    #[command(visible_aliases = ["del", "rm"], after_help = DELETE_HELP)]
    Delete {
        /// A key, KEY.* or *
        key: String,
        /// Removes only if the key is at this revision
        #[arg(long, value_name = "N")]
        if_revision: Option<u64>,
    },
    /// Tells the changes of a key and all below it, the present values first
    #[command(visible_aliases = ["sub", "watch"])]
    Subscribe {
        /// A key, KEY.* or *
        key: String,
        /// Ends after the first value or change
        #[arg(long, conflicts_with = "count")]
        once: bool,
        /// Ends after so many values and changes
        #[arg(long, value_name = "N")]
        count: Option<u64>,
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
    /// Says who would be told of a change of a key
    Trace {
        /// The key
        key: String,
    },
    /// Asks whether the server works
    Health,
    /// Shows the versions of client and server
    Version,
    /// Shows the server's figures
    Stats,
    /// Ends the interactive mode
    #[command(visible_alias = "exit")]
    Quit,
}

#[derive(Debug, Default, clap::Args)]
pub(crate) struct PageArgs {
    /// At most so many keys
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

    pub(crate) fn options(&self) -> PageOptions {
        let mut options = PageOptions::default();
        (options.limit, options.after) = (self.limit, self.after.clone());
        options
    }
}

pub(crate) fn put_options(if_revision: Option<u64>, ttl: Option<Duration>) -> PutOptions {
    let mut options = PutOptions::default();
    (options.if_revision, options.ttl) = (if_revision.map(Revision::new), ttl);
    options
}

impl Args {
    /// Parses a command line, the program's name first; the address is returned aside.
    pub(crate) fn from_command_line(mut words: Vec<OsString>) -> Result<(Option<String>, Self), clap::Error> {
        let mut addr = None;
        if let Some(at) = first_plain(&words, 1)
            && let Some(word) = words[at].to_str()
            && word.contains([':', '/'])
        {
            addr = Some(word.to_owned());
            words.remove(at);
        }
        lowercase_command(&mut words, 1);
        Ok((addr, Args::try_parse_from(words)?))
    }

    /// Parses a line of the interactive mode.
    pub(crate) fn from_line(line: &str) -> Result<Self, clap::Error> {
        let mut command = Args::command().no_binary_name(true);
        let Some(words) = shlex::split(line) else {
            return Err(command.error(clap::error::ErrorKind::InvalidValue, "a quotation mark has no partner"));
        };
        let mut words: Vec<_> = words.into_iter().map(OsString::from).collect();
        lowercase_command(&mut words, 0);
        Args::from_arg_matches(&command.try_get_matches_from_mut(words)?)
    }
}

/// All words that a line may begin with.
pub(crate) fn command_words() -> Vec<String> {
    let command = Args::command();
    let names = command.get_subcommands().flat_map(|sub| sub.get_name_and_visible_aliases());
    names.chain(["help"]).map(str::to_owned).collect()
}

/// Where the first word stands that is neither an option nor an option's value.
fn first_plain(words: &[OsString], start: usize) -> Option<usize> {
    let mut at = start;
    loop {
        match words.get(at)?.to_str() {
            Some("--") => return None,
            Some("--timeout") => at += 2,
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
    fn an_address_is_known_by_its_colon_or_slash_and_only_in_front() {
        for (words, addr) in [
            (&["db1:4222", "get", "a"][..], Some("db1:4222")),
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
        let args = Args::from_line("--json PUT 'a b' \"c d\" --ttl 1.5s").unwrap();
        let Some(Command::Put { key, value, ttl, .. }) = args.command else { panic!("no put") };
        assert_eq!((key.as_str(), value.to_str(), ttl), ("a b", Some("c d"), Some(Duration::from_millis(1_500))));
        assert!(args.json);
        for line in ["put a -- --json", "put a -5", "del a", "sub a --once", "ls", "exit", "put a -"] {
            assert!(Args::from_line(line).is_ok_and(|args| !args.json), "{line}");
        }
        for line in ["put a", "get", "put a 'b", "fly", "put a b c", "put a b --ttl 0", "put a b --ttl 1y"] {
            assert!(Args::from_line(line).is_err(), "{line}");
        }
    }
}
