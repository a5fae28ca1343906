//! Keys and patterns: dotted paths, parsed once at the edge and trusted from there on.
//!
//! The order of keys is by segments, each by its bytes, so that a branch is contiguous: `a`, `a.b`, `a-b`.
//! It equals the order of bytes with `.` below all others, which is how it is computed.

use std::cmp::Ordering;
use std::fmt;
use std::ops::Deref;
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

/// Longest key or pattern, in bytes.
pub const KEY_LEN_MAX: usize = 1_024;

/// How the text of a reserved key begins.
const RESERVED: &str = "..";

/// A dotted path such as `host.db1.load`: what a value is stored under.
///
/// One or more non-empty segments joined by `.`; any UTF-8 except white space, control characters and `*`.
/// Cloning is a reference count.
///
/// # Examples
///
/// ```
/// use nkv_core::Key;
///
/// let key: Key = "host.db1.load".parse()?;
/// assert_eq!(key.segments().collect::<Vec<_>>(), ["host", "db1", "load"]);
/// assert!("host..load".parse::<Key>().is_err());
/// # Ok::<(), nkv_core::KeyError>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Key(Arc<str>);

impl Key {
    /// Checks `text` and makes a key of it.
    ///
    /// # Errors
    ///
    /// [`KeyError`] names the first thing that is wrong.
    pub fn new(text: &str) -> Result<Self, KeyError> {
        Ok(KeyRef::new(text)?.to_key())
    }

    /// Whether `text` is a key: what [`new`](Self::new) asks, with nothing made.
    ///
    /// # Errors
    ///
    /// [`KeyError`] names the first thing that is wrong.
    pub fn check(text: &str) -> Result<(), KeyError> {
        if text.len() > KEY_LEN_MAX {
            return Err(KeyError::TooLong { len: text.len() });
        }
        if is_plain(text.as_bytes()) { Ok(()) } else { check_chars(text) }
    }

    /// A key that storage keeps and no reader sees: that of a [tombstone](crate::PersistValue) that holds what its owner
    /// wants to know after a restart. Its text is `..` and the name, which [`new`](Self::new) refuses, so that it meets no
    /// key of a client, nor a row that a backend has for itself behind a single dot.
    ///
    /// # Errors
    ///
    /// [`KeyError`] if `name` is no key of printable ASCII, or too long.
    pub fn reserved(name: &str) -> Result<Self, KeyError> {
        Key::check(name)?;
        if let Some((at, character)) = name.char_indices().find(|(_, character)| !character.is_ascii()) {
            return Err(KeyError::Character { character, at });
        }
        let text = format!("{RESERVED}{name}");
        if text.len() > KEY_LEN_MAX { Err(KeyError::TooLong { len: text.len() }) } else { Ok(Key(Arc::from(text))) }
    }

    /// Whether it is a [reserved](Self::reserved) one.
    #[must_use]
    pub fn is_reserved(&self) -> bool {
        self.0.starts_with(RESERVED)
    }

    /// Whether `text` is a key that storage may hold: what [`check`](Self::check) accepts, or a
    /// [reserved](Self::reserved) one.
    ///
    /// # Errors
    ///
    /// [`KeyError`] names the first thing that is wrong.
    pub fn check_stored(text: &str) -> Result<(), KeyError> {
        match text.strip_prefix(RESERVED) {
            Some(name) if text.len() <= KEY_LEN_MAX && is_plain(name.as_bytes()) => Ok(()),
            _ => Key::check(text),
        }
    }

    /// The key, borrowed.
    #[must_use]
    pub fn lend(&self) -> KeyRef<'_> {
        KeyRef(&self.0)
    }

    /// The key as written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The parts between the dots, outermost first.
    pub fn segments(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.0.split('.')
    }

    /// Whether this key lies below `branch`, at any depth; a key is not below itself.
    #[must_use]
    pub fn is_below(&self, branch: &Key) -> bool {
        branch.is_above(&self.0)
    }

    /// Whether `key`, the text of a key, lies below this one.
    pub(crate) fn is_above(&self, key: &str) -> bool {
        key.strip_prefix(&*self.0).is_some_and(|rest| rest.starts_with('.'))
    }
}

impl Ord for Key {
    fn cmp(&self, other: &Self) -> Ordering {
        compare(self.0.as_bytes(), other.0.as_bytes())
    }
}

/// The order of two keys, as bytes.
pub(crate) fn compare(a: &[u8], b: &[u8]) -> Ordering {
    match a.iter().zip(b).find(|(x, y)| x != y) {
        Some((b'.', _)) => Ordering::Less,
        Some((_, b'.')) => Ordering::Greater,
        Some((x, y)) => x.cmp(y),
        None => a.len().cmp(&b.len()),
    }
}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl FromStr for Key {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        Key::new(text)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

/// A key, borrowed from where it is stored: a text that was checked once and needs no other check.
///
/// # Examples
///
/// ```
/// use nkv_core::{Key, KeyRef};
///
/// let key = KeyRef::new("lamp.hall")?;
/// assert_eq!((key.len(), key.to_key()), (9, Key::new("lamp.hall")?));
/// # Ok::<(), nkv_core::KeyError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyRef<'a>(&'a str);

impl<'a> KeyRef<'a> {
    /// The key of this text.
    ///
    /// # Errors
    ///
    /// Those of [`Key::check`].
    pub fn new(text: &'a str) -> Result<Self, KeyError> {
        Key::check(text)?;
        Ok(KeyRef(text))
    }

    /// The key of this text, which storage has kept: a [reserved](Key::reserved) one too.
    ///
    /// # Errors
    ///
    /// Those of [`Key::check_stored`].
    pub fn stored(text: &'a str) -> Result<Self, KeyError> {
        Key::check_stored(text)?;
        Ok(KeyRef(text))
    }

    /// The key of a text that [`Key::check_stored`] has accepted before, as in storage that checks what it reads. Checked again
    /// in debug builds alone.
    #[must_use]
    pub fn checked_before(text: &'a str) -> Self {
        debug_assert_eq!(Key::check_stored(text), Ok(()), "{text:?} was not checked");
        KeyRef(text)
    }

    /// The key of a text that this store has kept in memory.
    pub(crate) const fn in_memory(text: &'a str) -> Self {
        KeyRef(text)
    }

    /// The key as written.
    #[must_use]
    pub fn as_str(self) -> &'a str {
        self.0
    }

    /// A key of its own.
    #[must_use]
    pub fn to_key(self) -> Key {
        Key(Arc::from(self.0))
    }
}

impl Deref for KeyRef<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        self.0
    }
}

impl PartialEq<str> for KeyRef<'_> {
    fn eq(&self, text: &str) -> bool {
        self.0 == text
    }
}

impl PartialEq<&str> for KeyRef<'_> {
    fn eq(&self, text: &&str) -> bool {
        self.0 == *text
    }
}

impl fmt::Display for KeyRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl fmt::Debug for KeyRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.0, f)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which keys a request or a subscription is about.
///
/// | written | as a selection (get, list, delete) | as a subscription |
/// |---|---|---|
/// | `a` | `a` alone | `a` and every key below it |
/// | `a.*` | every key below `a`, not `a` | the same |
/// | `*` | every key | the same |
///
/// A subscription to `a` alone is to [`Exact`](Self::Exact). It takes the place of the same subscriber's subscription to
/// `a` with its branch, and the other way round.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Pattern {
    /// A key, written without a wildcard.
    Key(Key),
    /// A key alone, also where it is subscribed to. No text stands for it; it is displayed as the key.
    Exact(Key),
    /// Everything below a key, written `a.*`.
    Below(Key),
    /// Everything, written `*`.
    All,
}

impl Pattern {
    /// Checks `text` and makes a pattern of it.
    ///
    /// # Errors
    ///
    /// [`KeyError`] names the first thing that is wrong; a `*` is accepted only alone or as the last segment.
    pub fn new(text: &str) -> Result<Self, KeyError> {
        if text == "*" {
            return Ok(Pattern::All);
        }
        match text.strip_suffix(".*") {
            Some(_) if text.len() > KEY_LEN_MAX => Err(KeyError::TooLong { len: text.len() }),
            Some(branch) => Key::new(branch).map(Pattern::Below),
            None => Key::new(text).map(Pattern::Key),
        }
    }

    /// Whether a get, list or delete of this pattern is about `key`.
    #[must_use]
    pub fn selects(&self, key: &Key) -> bool {
        self.selects_text(key.as_str())
    }

    /// The key that it selects, if it is no wildcard.
    pub(crate) fn one_key(&self) -> Option<&Key> {
        match self {
            Pattern::Key(key) | Pattern::Exact(key) => Some(key),
            Pattern::Below(_) | Pattern::All => None,
        }
    }

    pub(crate) fn selects_text(&self, key: &str) -> bool {
        match self {
            Pattern::Key(own) | Pattern::Exact(own) => own.as_str() == key,
            Pattern::Below(branch) => branch.is_above(key),
            Pattern::All => true,
        }
    }

    /// Whether a subscription to this pattern is notified of a change of `key`.
    #[must_use]
    pub fn covers(&self, key: &Key) -> bool {
        self.covers_text(key.as_str())
    }

    /// Whether a subscription to this pattern covers every key that one to `other` covers. Of two patterns one includes the
    /// other, or no key is covered by both.
    #[must_use]
    pub fn includes(&self, other: &Pattern) -> bool {
        let is_in_branch = |branch: &Key, key: &Key| key == branch || key.is_below(branch);
        match (self, other) {
            (Pattern::All, _) => true,
            (_, Pattern::All) => false,
            (Pattern::Key(own), Pattern::Key(key) | Pattern::Exact(key) | Pattern::Below(key))
            | (Pattern::Below(own), Pattern::Below(key)) => is_in_branch(own, key),
            (Pattern::Below(own), Pattern::Key(key) | Pattern::Exact(key)) => key.is_below(own),
            (Pattern::Exact(own), Pattern::Exact(key)) => own == key,
            (Pattern::Exact(_), Pattern::Key(_) | Pattern::Below(_)) => false,
        }
    }

    pub(crate) fn covers_text(&self, key: &str) -> bool {
        self.selects_text(key) || matches!(self, Pattern::Key(branch) if branch.is_above(key))
    }
}

impl From<Key> for Pattern {
    fn from(key: Key) -> Self {
        Pattern::Key(key)
    }
}

impl From<&Key> for Pattern {
    fn from(key: &Key) -> Self {
        Pattern::Key(key.clone())
    }
}

impl FromStr for Pattern {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        Pattern::new(text)
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pattern::Key(key) | Pattern::Exact(key) => write!(f, "{key}"),
            Pattern::Below(branch) => write!(f, "{branch}.*"),
            Pattern::All => f.write_str("*"),
        }
    }
}

/// A number for the first 16 bytes of a key: of two numbers that differ, the lower is that of the lower key.
pub(crate) fn first_bytes(key: &[u8]) -> u128 {
    let mut first = [0; 16];
    // No byte of a key is lower than 2: after the end of one, which is 0, comes the dot.
    first.iter_mut().zip(key).for_each(|(first, byte)| *first = if *byte == b'.' { 1 } else { *byte });
    u128::from_be_bytes(first)
}

/// Why a text is no key, or no pattern.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum KeyError {
    /// There is no text at all.
    #[error("a key must not be empty")]
    Empty,
    /// Two dots in a row, or a dot at either end.
    #[error("empty segment at byte {at}: a key is segments joined by single dots, such as a.b.c")]
    EmptySegment {
        /// Where the empty segment would stand, in bytes.
        at: usize,
    },
    /// White space or a control character.
    #[error("character {character:?} at byte {at}: a key must not hold white space or control characters")]
    Character {
        /// The character.
        character: char,
        /// Where it stands, in bytes.
        at: usize,
    },
    /// A `*` where it means nothing.
    #[error("'*' at byte {at}: a wildcard is '*' alone or the last segment of a pattern, such as a.*")]
    Wildcard {
        /// Where it stands, in bytes.
        at: usize,
    },
    /// More than [`KEY_LEN_MAX`] bytes.
    #[error("key of {len} bytes: the limit is {KEY_LEN_MAX}")]
    TooLong {
        /// Length of the text, in bytes.
        len: usize,
    },
}

/// Whether these bytes are a key of printable ASCII, as nearly all are. One look at each byte; what is not one of these
/// is looked at again, character by character.
fn is_plain(bytes: &[u8]) -> bool {
    let mut after_dot = true;
    for byte in bytes {
        let is_dot = *byte == b'.';
        if !matches!(byte, b'!'..=b'~') || *byte == b'*' || (is_dot && after_dot) {
            return false;
        }
        after_dot = is_dot;
    }
    !after_dot
}

fn check_chars(text: &str) -> Result<(), KeyError> {
    if text.is_empty() {
        return Err(KeyError::Empty);
    }
    let mut segment_start = 0;
    for (at, character) in text.char_indices() {
        match character {
            '.' if at == segment_start => return Err(KeyError::EmptySegment { at }),
            '.' => segment_start = at + 1,
            '*' => return Err(KeyError::Wildcard { at }),
            c if c.is_whitespace() || c.is_control() => return Err(KeyError::Character { character, at }),
            _ => {}
        }
    }
    if segment_start == text.len() {
        return Err(KeyError::EmptySegment { at: segment_start });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> Key {
        Key::new(text).unwrap()
    }

    #[test]
    fn what_a_file_system_or_a_shell_finds_special_is_an_ordinary_key() {
        for text in ["/etc/passwd", "-rf", "a/b", "$(x)", "CON", "é.ü", "\u{202e}x", "a'b\"c"] {
            assert_eq!(key(text).as_str(), text);
        }
    }

    #[test]
    fn what_is_wrong_with_a_key_is_named_with_its_place() {
        let cases = [
            ("", KeyError::Empty),
            (".a", KeyError::EmptySegment { at: 0 }),
            ("a..b", KeyError::EmptySegment { at: 2 }),
            ("a.", KeyError::EmptySegment { at: 2 }),
            ("a b", KeyError::Character { character: ' ', at: 1 }),
            ("a\u{a0}", KeyError::Character { character: '\u{a0}', at: 1 }),
            ("a\u{85}", KeyError::Character { character: '\u{85}', at: 1 }),
            ("a\0", KeyError::Character { character: '\0', at: 1 }),
            ("a.*", KeyError::Wildcard { at: 2 }),
        ];
        for (text, error) in cases {
            assert_eq!(Key::new(text), Err(error), "{text:?}");
        }
    }

    #[test]
    fn every_short_text_is_checked_alike_at_once_and_character_by_character() {
        let all = ["a", ".", "*", " ", "!", "~", "\u{7f}", "\0", "é", "\u{85}", "\u{a0}", ""];
        for text in all.iter().flat_map(|a| all.iter().flat_map(move |b| all.map(|c| format!("{a}{b}{c}")))) {
            assert_eq!(Key::check(&text), check_chars(&text), "{text:?}");
        }
    }

    #[test]
    fn a_reserved_key_is_for_storage_alone() {
        let reserved = Key::reserved("engine.seen").unwrap();
        assert_eq!((reserved.as_str(), reserved.is_reserved()), ("..engine.seen", true));
        assert!(Key::check_stored(reserved.as_str()).is_ok() && Key::new(reserved.as_str()).is_err());
        assert!(Key::check_stored("engine.seen").is_ok() && !key("engine.seen").is_reserved());
        for text in ["", ".a", "...a", "..", "..a..b", "..a b", "..é", "..*"] {
            assert!(Key::check_stored(text).is_err(), "{text}");
        }
        for name in ["", ".a", "a b", "é", "*", &"k".repeat(KEY_LEN_MAX - 1)] {
            assert!(Key::reserved(name).is_err(), "{name}");
        }
        assert!(Key::reserved(&"k".repeat(KEY_LEN_MAX - 2)).is_ok());
    }

    #[test]
    fn the_longest_key_is_accepted_and_one_byte_more_is_not() {
        assert!(Key::new(&"k".repeat(KEY_LEN_MAX)).is_ok());
        assert_eq!(Key::new(&"k".repeat(KEY_LEN_MAX + 1)), Err(KeyError::TooLong { len: KEY_LEN_MAX + 1 }));
        let pattern = format!("{}.*", "k".repeat(KEY_LEN_MAX - 1));
        assert_eq!(Pattern::new(&pattern), Err(KeyError::TooLong { len: KEY_LEN_MAX + 1 }));
    }

    #[test]
    fn keys_sort_by_segments_so_that_a_branch_is_contiguous() {
        let mut keys = ["a-b", "a.b.c", "b", "a", "a!", "a.b", "a.c"].map(key);
        keys.sort();
        assert!(keys.is_sorted_by_key(|key| first_bytes(key.as_str().as_bytes())));
        assert_eq!(keys.map(|k| k.to_string()), ["a", "a.b", "a.b.c", "a.c", "a!", "a-b", "b"]);
    }

    #[test]
    fn a_wildcard_stands_alone_or_last() {
        assert_eq!(Pattern::new("*"), Ok(Pattern::All));
        assert_eq!(Pattern::new("a.b.*"), Ok(Pattern::Below(key("a.b"))));
        for text in ["a.*.c", "*.a", "a*", "a.**", ".*", "**", "*.*"] {
            assert!(Pattern::new(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_subscription_to_a_key_covers_its_branch_and_a_selection_does_not() {
        let cases = [
            ("a", "a", true, true),
            ("a", "a.b.c", false, true),
            ("a", "ab", false, false),
            ("a.*", "a", false, false),
            ("a.*", "a.b.c", true, true),
            ("*", "a", true, true),
        ];
        for (pattern, k, selects, covers) in cases {
            let p = Pattern::new(pattern).unwrap();
            assert_eq!((p.selects(&key(k)), p.covers(&key(k))), (selects, covers), "{pattern} {k}");
        }
        let exact = Pattern::Exact(key("a"));
        for (k, expected) in [("a", true), ("a.b", false), ("ab", false)] {
            assert_eq!((exact.selects(&key(k)), exact.covers(&key(k))), (expected, expected), "{k}");
        }
    }

    #[test]
    fn of_two_patterns_one_includes_the_other_or_they_have_no_key_in_common() {
        let keys = ["a", "a.b", "a.b.c", "a.c", "ab", "b"].map(key);
        let mut patterns = vec![Pattern::All];
        for key in &keys {
            patterns.extend([Pattern::Key(key.clone()), Pattern::Exact(key.clone()), Pattern::Below(key.clone())]);
        }
        // Enough keys to tell any two of these patterns apart.
        let below =
            keys.iter().flat_map(|k| ["", ".b", ".c", ".x", ".b.c", ".b.x"].map(|rest| key(&format!("{k}{rest}"))));
        let below: Vec<Key> = below.chain([key("x")]).collect();
        for (one, other) in patterns.iter().flat_map(|one| patterns.iter().map(move |other| (one, other))) {
            let is_within = below.iter().all(|key| !other.covers(key) || one.covers(key));
            assert_eq!(one.includes(other), is_within, "{one:?} {other:?}");
            let is_apart = below.iter().all(|key| !one.covers(key) || !other.covers(key));
            assert!(is_apart || one.includes(other) || other.includes(one), "{one:?} {other:?}");
        }
    }
}
