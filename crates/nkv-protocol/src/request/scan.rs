//! Requests of the usual shape, read without a parser.
//!
//! Programs write most lines, and write them alike: known fields, each once, strings without escapes, plain numbers.
//! [`Head::scan`] knows these and nothing else. Whatever else a line holds, and all that is wrong, is left to
//! `serde_json`, which alone decides what a request may be and what is said of an error.

use std::borrow::Cow;

use super::{Head, Id, Kind, NAME_LEN_MAX};
use crate::ValueForm;
use crate::json::plain_len;

impl<'a> Head<'a> {
    /// Reads a line if it is of the usual shape. If it is not, what was read of it so far is of no use.
    #[must_use]
    pub(super) fn scan(&mut self, line: &'a [u8], value_len_max: usize) -> bool {
        std::str::from_utf8(line).ok().and_then(|line| self.scan_object(line, value_len_max)).is_some()
    }

    fn scan_object(&mut self, line: &'a str, value_len_max: usize) -> Option<()> {
        let mut cursor = Cursor { line, rest: line.as_bytes().strip_prefix(b"{")? };
        loop {
            let bit = 1 << self.scan_field(&mut cursor, value_len_max)?;
            if self.seen & bit != 0 {
                return None;
            }
            self.seen |= bit;
            match cursor.rest {
                [b'}'] => return Some(()),
                [b',', b' ', rest @ ..] | [b',', rest @ ..] => cursor.rest = rest,
                _ => return None,
            }
        }
    }

    /// Reads a field and gives its place in [`FIELDS`](super::FIELDS). The names are tried in turn, as what is expected and
    /// found costs less than finding where a name ends.
    fn scan_field(&mut self, cursor: &mut Cursor<'a>, value_len_max: usize) -> Option<u8> {
        let request = &mut self.request;
        Some(if cursor.name(b"\"type\":") {
            request.kind = cursor.kind()?;
            self.has_kind = true;
            0
        } else if cursor.name(b"\"id\":") {
            request.id = Id(cursor.id().filter(|id| id.len() <= NAME_LEN_MAX)?);
            1
        } else if cursor.name(b"\"key\":") {
            request.key = cursor.string()?.into();
            self.has_key = true;
            2
        } else if cursor.name(b"\"client_uuid\":") {
            request.client_uuid = Some(cursor.string().filter(|name| name.len() <= NAME_LEN_MAX)?.into());
            3
        } else if cursor.name(b"\"value\":") {
            request.value = Some(cursor.value(value_len_max).filter(|value| value.len() <= value_len_max)?);
            4
        } else if cursor.name(b"\"len\":") {
            self.len = Some(cursor.number()?);
            5
        } else if cursor.name(b"\"if_revision\":") {
            request.if_revision = Some(cursor.number()?);
            6
        } else if cursor.name(b"\"ttl_ms\":") {
            request.ttl_ms = Some(cursor.number()?);
            7
        } else if cursor.name(b"\"limit\":") {
            request.limit = Some(cursor.number()?);
            8
        } else if cursor.name(b"\"after\":") {
            request.after = Some(cursor.string()?.into());
            9
        } else if cursor.name(b"\"snapshot\":") {
            request.snapshot = cursor.flag()?;
            10
        } else if cursor.name(b"\"ahead\":") {
            request.ahead = cursor.flag()?;
            14
        } else if cursor.name(b"\"values\":") {
            request.values = Some(ValueForm::from_word(cursor.string()?)?);
            11
        } else if cursor.name(b"\"token\":") {
            request.token = Some(cursor.string()?.into());
            12
        } else {
            return None;
        })
    }
}

/// A place in a line. What a method does not know, it gives `None` for.
struct Cursor<'a> {
    line: &'a str,
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    #[inline(always)]
    fn string(&mut self) -> Option<&'a str> {
        let text = self.rest.strip_prefix(b"\"")?;
        let (text, rest) = text.split_at_checked(plain_len(text))?;
        let start = self.line.len().checked_sub(rest.len())?.checked_sub(text.len())?;
        self.rest = rest.strip_prefix(b"\"")?;
        self.line.get(start..start.checked_add(text.len())?)
    }

    #[inline(always)]
    fn number(&mut self) -> Option<u64> {
        let (mut number, mut rest) = (0_u64, self.rest);
        while let [digit @ b'0'..=b'9', after @ ..] = rest {
            number = number.wrapping_mul(10).wrapping_add(u64::from(digit & 15));
            rest = after;
        }
        let len = self.rest.len().checked_sub(rest.len())?;
        // Of nineteen digits every number fits. A leading zero is no JSON.
        if len == 0 || len > 19 || len > 1 && self.rest.starts_with(b"0") {
            return None;
        }
        self.rest = rest;
        Some(number)
    }

    fn flag(&mut self) -> Option<bool> {
        Some(self.skip(b"true") || !self.skip(b"false").then_some(true)?)
    }

    fn kind(&mut self) -> Option<Kind> {
        let (kind, rest) = Kind::split_from(self.rest)?;
        self.rest = rest;
        Some(kind)
    }

    /// Passes over a name and its colon, if they are next, and over a space behind them.
    #[inline(always)]
    fn name(&mut self, name: &[u8]) -> bool {
        let found = self.skip(name);
        if found {
            self.skip(b" ");
        }
        found
    }

    /// Passes over a text that is known at compile time, if it is next.
    #[inline(always)]
    fn skip(&mut self, text: &[u8]) -> bool {
        let Some(rest) = self.rest.strip_prefix(text) else { return false };
        self.rest = rest;
        true
    }

    /// A string or number, as written.
    fn id(&mut self) -> Option<&'a str> {
        let start = self.line.len().checked_sub(self.rest.len())?;
        if self.rest.starts_with(b"\"") {
            self.string()?;
        } else {
            self.number()?;
        }
        self.line.get(start..self.line.len().checked_sub(self.rest.len())?)
    }

    fn value(&mut self, len_max: usize) -> Option<Cow<'a, [u8]>> {
        match self.rest {
            [b'"', ..] => Some(self.string()?.as_bytes().into()),
            [b'[', b']', rest @ ..] => {
                self.rest = rest;
                Some(Cow::Borrowed(&[]))
            }
            [b'[', ..] => self.bytes(len_max).map(Cow::Owned),
            _ => None,
        }
    }

    /// An array of byte numbers, one at least, and hardly more than `len_max` of them.
    fn bytes(&mut self, len_max: usize) -> Option<Vec<u8>> {
        self.rest = self.rest.strip_prefix(b"[")?;
        // Most numbers have two digits or three, and a comma.
        let mut bytes = Vec::with_capacity(len_max.min(self.rest.len() / 3));
        while bytes.len() <= len_max {
            bytes.push(u8::try_from(self.number()?).ok()?);
            match self.rest {
                [b',', b' ', rest @ ..] | [b',', rest @ ..] => self.rest = rest,
                [b']', rest @ ..] => {
                    self.rest = rest;
                    return Some(bytes);
                }
                _ => return None,
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const VALUE_LEN_MAX: usize = 24;

    /// Whether a line was scanned; then it must have been read as the parser reads it.
    fn scanned(line: &[u8]) -> bool {
        let (mut scanned, mut parsed) = (Head::default(), Head::default());
        if !scanned.scan(line, VALUE_LEN_MAX) {
            return false;
        }
        let shown = String::from_utf8_lossy(line);
        assert_eq!(parsed.parse(line, VALUE_LEN_MAX), Ok(()), "{shown}");
        assert_eq!(scanned, parsed, "{shown}");
        true
    }

    /// Numbers with every count of digits, those too long and those that are none among them.
    fn number() -> BoxedStrategy<String> {
        prop_oneof![
            8 => any::<(u64, u32)>().prop_map(|(number, shift)| (number >> (shift % 64)).to_string()),
            1 => "[0-9]{1,22}",
            // More than any number has, by one digit at most.
            1 => "[2-9][0-9]{19}",
            1 => "-?[0-9]{1,3}(\\.[0-9])?([eE][0-9])?",
        ]
        .boxed()
    }

    fn string(usual: &'static str) -> BoxedStrategy<String> {
        prop_oneof![8 => usual, 1 => "\"[a-zé\u{7f}\u{10ffff} *.]{0,40}\"", 1 => "\"[ -~]{0,9}\"", 1 => "null"].boxed()
    }

    fn value() -> BoxedStrategy<String> {
        let numbers = |max: u16| proptest::collection::vec(0..max, 0..VALUE_LEN_MAX + 3);
        let array = |numbers: Vec<u16>, comma: &str| {
            let numbers: Vec<_> = numbers.iter().map(u16::to_string).collect();
            format!("[{}]", numbers.join(comma))
        };
        prop_oneof![
            (numbers(256), prop_oneof![Just(","), Just(", "), Just(" ,")]).prop_map(move |(n, comma)| array(n, comma)),
            numbers(12).prop_map(move |numbers| array(numbers, ",")),
            numbers(270).prop_map(move |numbers| array(numbers, ",")),
            "\\[([0-9]{1,4}, ?){0,5}[0-9]{1,4},?\\]",
            string("\"[a-z ]{0,26}\""),
        ]
        .boxed()
    }

    fn field() -> impl Strategy<Value = (&'static str, String)> {
        let kinds: Vec<_> = Kind::ALL.iter().map(|kind| format!("\"{}\"", kind.as_str())).collect();
        prop_oneof![
            4 => proptest::sample::select(kinds).prop_map(|kind| ("type", kind)),
            4 => prop_oneof![string("\"[a-z0-9]{0,12}\""), number()].prop_map(|id| ("id", id)),
            4 => string("\"[a-z.*]{1,30}\"").prop_map(|key| ("key", key)),
            2 => string("\"[a-z0-9]{0,36}\"").prop_map(|name| ("client_uuid", name)),
            3 => value().prop_map(|value| ("value", value)),
            3 => number().prop_map(|len| ("len", len)),
            3 => (proptest::sample::select(&["if_revision", "ttl_ms", "limit"][..]), number()),
            2 => (proptest::sample::select(&["after", "token"][..]), string("\"[a-z]{0,12}\"")),
            1 => (proptest::sample::select(&["snapshot", "ahead"][..]), "true|false|null|tru|1"),
            1 => "\"(bytes|text|payload|byte)\"".prop_map(|form| ("values", form)),
            1 => "0|\\{\\}|\"\"".prop_map(|value| ("other", value)),
        ]
    }

    /// Lines of usual fields, in any order and some twice, a few of them broken somewhere.
    fn line() -> impl Strategy<Value = Vec<u8>> {
        let fields = proptest::collection::vec(field(), 1..7);
        let colons = prop_oneof![Just((":", ",")), Just((": ", ", ")), Just((" :", " , "))];
        let breaks = prop_oneof![3 => 0..1_usize, 1 => 1..3_usize];
        let breaks =
            breaks.prop_flat_map(|count| proptest::collection::vec(any::<(prop::sample::Index, u8, u8)>(), count));
        (fields, colons, breaks).prop_map(|(fields, (colon, comma), breaks)| {
            let fields: Vec<_> = fields.iter().map(|(name, value)| format!("\"{name}\"{colon}{value}")).collect();
            let mut line = format!("{{{}}}", fields.join(comma)).into_bytes();
            for (at, how, byte) in breaks {
                let at = at.index(line.len());
                // Half of the bytes are those that mean something.
                let byte = *b"{}[]:,\" \\0123456789tfn\t\x0b\x1f\x80\xc3".get(usize::from(byte)).unwrap_or(&byte);
                match how % 3 {
                    0 => line[at] = byte,
                    1 => line.insert(at, byte),
                    _ => _ = line.remove(at),
                }
            }
            line
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 20 } else { 4_000 }))]

        #[test]
        fn what_is_scanned_is_what_the_parser_reads(line in line()) {
            scanned(&line);
        }

        #[test]
        fn the_usual_shapes_are_scanned(
            key in "[a-zé.]{1,40}",
            id in "\"[a-z0-9]{0,36}\"|[1-9][0-9]{0,18}",
            space in " ?",
            value in proptest::collection::vec(any::<u8>(), 0..=VALUE_LEN_MAX),
        ) {
            let json = |value: &[u8]| format!("{value:?}").replace(' ', &space);
            for rest in [
                "\"type\":\"Get\"".to_owned(),
                format!("\"len\":{space}{},{space}\"type\":\"Put\"", value.len()),
                format!("\"type\":\"Put\",\"value\":{space}{}", json(&value)),
                format!("\"value\":\"{}\",\"ttl_ms\":{space}{},\"if_revision\":0", "x".repeat(value.len()), u64::MAX >> 1),
                "\"type\":\"List\",\"ahead\":true".to_owned(),
                "\"snapshot\":true,\"client_uuid\":\"c12\",\"type\":\"Subscribe\"".to_owned(),
                "\"snapshot\":false,\"values\":\"payload\",\"token\":\"\",\"after\":\"a\",\"limit\":1".to_owned(),
            ] {
                let line = format!("{{\"id\":{space}{id},{space}\"key\":{space}\"{key}\",{space}{rest}}}");
                prop_assert!(scanned(line.as_bytes()), "{}", line);
            }
        }
    }

    #[test]
    fn what_is_unusual_or_wrong_is_left_to_the_parser() {
        let long = "x".repeat(NAME_LEN_MAX + 1);
        for field in [
            "\"key\":\"a\\u0062\"",
            "\"key\":\"b\",\"key\":\"b\"",
            "\"key\":null",
            "\"id\":-1",
            "\"id\":01",
            "\"id\":1.5",
            "\"len\":12345678901234567890",
            "\"value\":[1,2,]",
            "\"value\":[01]",
            "\"value\":[256]",
            "\"value\":[1 ]",
            "\"value\":[1,  2]",
            "\"value\":[00000001]",
            "\"mood\":{\"good\":true}",
            &format!("\"client_uuid\":\"{long}\""),
            &format!("\"id\":\"{long}\""),
            &format!("\"value\":\"{}\"", "x".repeat(VALUE_LEN_MAX + 1)),
            &format!("\"value\":{:?}", [1; VALUE_LEN_MAX + 1]),
        ] {
            let line = format!("{{\"type\":\"Put\",{field}}}");
            assert!(!scanned(line.as_bytes()), "{line}");
        }
        for line in ["", "{", "{}", "[1]", "{\"type\":\"Put\"", "{\"type\":\"Put\"} ", "{\"type\":\"Put\",}"] {
            assert!(!scanned(line.as_bytes()), "{line}");
        }
        assert!(!scanned(b"{\"key\":\"\xff\"}"));
    }
}
