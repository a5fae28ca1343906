//! The words of kv-store's command line, whose place this one takes: `get --all`, `get -k KEY`, `set -k KEY -v VALUE`, `watch` without
//! a key, and `--server-address ADDR`; and `--addr PATH` of the first nkv. They become ours before anything is parsed.

use std::ffi::OsString;

/// Puts our words in the place of kv-store's; the program's name is the first of them, and `first_plain` finds the command.
pub(crate) fn to_our_words(words: &mut Vec<OsString>, first_plain: impl Fn(&[OsString], usize) -> Option<usize>) {
    if let Some(addr) = take_value(words, 1, &["--server-address", "--addr"]) {
        words.insert(1, addr);
    }
    let command = |word: &OsString| word.to_str().map(str::to_ascii_lowercase);
    let is_one = |word: &OsString| matches!(command(word).as_deref(), Some("get" | "set" | "put" | "watch"));
    // An address may stand before it.
    let first = first_plain(words, 1);
    let candidates = [first, first.and_then(|at| first_plain(words, at.saturating_add(1)))];
    let Some(at) = candidates.into_iter().flatten().find(|at| words.get(*at).is_some_and(is_one)) else { return };
    let from = at.saturating_add(1);
    match words.get(at).and_then(command).as_deref() {
        Some("get") => {
            if take(words, from, &["-a", "--all"]) {
                words.push("*".into());
            } else if let Some(key) = take_value(words, from, &["-k", "--key"]) {
                words.extend(["--".into(), key]);
            }
        }
        // The replicated store sets several at once.
        Some("set" | "put") if take(words, from, &["--pairs"]) => {
            if let Some(word) = words.get_mut(at) {
                *word = "put-pairs".into();
            }
        }
        Some("set") => {
            let key = take_value(words, from, &["-k", "--key"]);
            let value = key.is_some().then(|| take_value(words, from, &["-v", "--value"])).flatten();
            match (key, value) {
                (Some(key), Some(value)) => words.extend(["--raw".into(), "--".into(), key, value]),
                // What is missing is said as for any command.
                (key, _) => words.extend(key),
            }
        }
        Some("watch") if first_plain(words, from).is_none() && !words.iter().any(|word| word == "--") => {
            words.push("*".into());
        }
        _ => {}
    }
}

/// Takes out a word that is one of `names`; whether there was one.
fn take(words: &mut Vec<OsString>, from: usize, names: &[&str]) -> bool {
    let found = position(words, from, |word| names.iter().any(|name| word == *name));
    found.inspect(|at| _ = words.remove(*at)).is_some()
}

/// Takes out one of `names`, and the value that follows it.
fn take_value(words: &mut Vec<OsString>, from: usize, names: &[&str]) -> Option<OsString> {
    if let Some(at) = position(words, from, |word| names.iter().any(|name| word == *name))
        && at.saturating_add(1) < words.len()
    {
        let value = words.remove(at.saturating_add(1));
        words.remove(at);
        return Some(value);
    }
    let with_value = |word: &OsString| {
        let text = word.to_str()?;
        let long = names.iter().filter(|name| name.starts_with("--"));
        long.filter_map(|name| text.strip_prefix(*name)?.strip_prefix('=')).next().map(OsString::from)
    };
    let at = position(words, from, |word| with_value(word).is_some())?;
    with_value(&words.remove(at))
}

/// The first word that `is_it`, before the options end.
fn position(words: &[OsString], from: usize, is_it: impl Fn(&OsString) -> bool) -> Option<usize> {
    let end = words.iter().position(|word| word == "--").unwrap_or(words.len());
    (from..end).find(|at| words.get(*at).is_some_and(&is_it))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours(line: &str) -> String {
        let mut words: Vec<OsString> = ["nkv-client"].into_iter().chain(line.split(' ')).map(OsString::from).collect();
        to_our_words(&mut words, |words, from| {
            (from..words.len()).find(|at| words[*at].to_str().is_some_and(|word| !word.starts_with('-')))
        });
        words[1..].join(std::ffi::OsStr::new(" ")).into_string().unwrap()
    }

    #[test]
    fn what_kv_store_says_is_said_our_way() {
        for (theirs, expected) in [
            ("get --all", "get *"),
            ("get -a", "get *"),
            ("get -k Name", "get -- Name"),
            ("get --key=Name", "get -- Name"),
            ("set -k Name -v -5", "set --raw -- Name -5"),
            ("set --value=x --key Name", "set --raw -- Name x"),
            ("set -k Name", "set Name"),
            ("watch", "watch *"),
            ("--server-address 0.0.0.0:23333 get -k a", "0.0.0.0:23333 get -- a"),
            ("get -k a --server-address=h:1", "h:1 get -- a"),
            ("set --pairs a=1 b=2", "put-pairs a=1 b=2"),
            ("--addr /tmp/nkv.sock get a", "/tmp/nkv.sock get a"),
            // Ours stay as they are.
            ("get a.b", "get a.b"),
            ("h:1 get a --json", "h:1 get a --json"),
            ("set a b", "set a b"),
            ("watch a", "watch a"),
            ("put -- -k -v", "put -- -k -v"),
            ("set a -- -k", "set a -- -k"),
        ] {
            assert_eq!(ours(theirs), expected, "{theirs}");
        }
    }
}
