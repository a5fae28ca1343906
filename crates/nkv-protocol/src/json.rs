//! Writing JSON without building it first, and reading the two forms of a value.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use bytes::BufMut;
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Error, MapAccess, SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};

use crate::ValueForm;

/// Writes the fields of one object.
pub(crate) struct Object<'a, B> {
    out: &'a mut B,
    first: bool,
}

impl<'a, B: BufMut> Object<'a, B> {
    /// Starts an object.
    pub(crate) fn start(out: &'a mut B) -> Self {
        out.put_u8(b'{');
        Object { out, first: true }
    }

    /// Goes on in an object that has fields.
    pub(crate) fn resume(out: &'a mut B) -> Self {
        Object { out, first: false }
    }

    /// Starts writing `name`, which needs no escapes; its value is to follow.
    pub(crate) fn name(&mut self, name: &str) -> &mut B {
        if !std::mem::take(&mut self.first) {
            self.out.put_u8(b',');
        }
        self.out.put_u8(b'"');
        self.out.put_slice(name.as_bytes());
        self.out.put_slice(b"\":");
        self.out
    }

    pub(crate) fn text(&mut self, name: &str, value: &str) -> &mut Self {
        string(self.name(name), value);
        self
    }

    /// Those of these texts that there are.
    pub(crate) fn texts<const N: usize>(&mut self, texts: [(&str, Option<&str>); N]) -> &mut Self {
        for (name, text) in texts {
            if let Some(text) = text {
                self.text(name, text);
            }
        }
        self
    }

    pub(crate) fn number(&mut self, name: &str, value: u64) -> &mut Self {
        number(self.name(name), value);
        self
    }

    pub(crate) fn flag(&mut self, name: &str, value: bool) -> &mut Self {
        self.name(name).put_slice(if value { b"true" } else { b"false" });
        self
    }

    pub(crate) fn end(&mut self) {
        self.out.put_u8(b'}');
    }
}

/// Writes an array, each item by `write`; `start` ends with its bracket.
#[inline]
pub(crate) fn array<T, B: BufMut>(
    out: &mut B,
    start: &[u8],
    items: impl IntoIterator<Item = T>,
    mut write: impl FnMut(&mut B, T),
) {
    out.put_slice(start);
    for (at, item) in items.into_iter().enumerate() {
        if at > 0 {
            out.put_u8(b',');
        }
        write(out, item);
    }
    out.put_u8(b']');
}

pub(crate) fn number(out: &mut impl BufMut, number: u64) {
    out.put_slice(itoa::Buffer::new().format(number).as_bytes());
}

/// Eight of the same byte.
const fn all(byte: u8) -> u64 {
    u64::from_le_bytes([byte; 8])
}

/// How many bytes at the start need no escape in a string: no quotation marks, backslashes and control characters.
pub(crate) fn plain_len(bytes: &[u8]) -> usize {
    let mut rest = bytes;
    while let Some((word, after)) = rest.split_first_chunk() {
        let word = u64::from_le_bytes(*word);
        // The high bit of a byte is set where it is less than another. Above the lowest such byte a borrow may set more.
        let less = |word: u64, than: u8| word.wrapping_sub(all(than)) & !word & all(0x80);
        let special = less(word, b' ') | less(word ^ all(b'"'), 1) | less(word ^ all(b'\\'), 1);
        if special != 0 {
            return bytes.len().saturating_sub(rest.len()).saturating_add((special.trailing_zeros() / 8) as usize);
        }
        rest = after;
        if bytes.len().saturating_sub(rest.len()) == BLOCK_LEN {
            rest = behind_plain_blocks(rest);
        }
    }
    let plain = rest.iter().take_while(|byte| !is_special(**byte)).count();
    bytes.len().saturating_sub(rest.len()).saturating_add(plain)
}

/// The number of bytes of a long text that are looked at at once.
const BLOCK_LEN: usize = 32;

/// What is left behind the blocks that need no escape: each is looked through to its end, as vector instructions can.
#[inline(never)]
fn behind_plain_blocks(mut rest: &[u8]) -> &[u8] {
    while let Some((block, after)) = rest.split_first_chunk::<BLOCK_LEN>() {
        if block.iter().fold(false, |special, byte| special | is_special(*byte)) {
            break;
        }
        rest = after;
    }
    rest
}

fn is_special(byte: u8) -> bool {
    byte < b' ' || byte == b'"' || byte == b'\\'
}

pub(crate) fn string(out: &mut impl BufMut, text: &str) {
    out.put_u8(b'"');
    let mut rest = text.as_bytes();
    while let Some((plain, [byte, after @ ..])) = rest.split_at_checked(plain_len(rest)) {
        out.put_slice(plain);
        rest = after;
        match byte {
            b'"' | b'\\' => out.put_slice(&[b'\\', *byte]),
            b'\n' => out.put_slice(b"\\n"),
            b'\r' => out.put_slice(b"\\r"),
            b'\t' => out.put_slice(b"\\t"),
            _ => {
                let digit = |nibble: u8| char::from_digit(nibble.into(), 16).map_or(b'0', |digit| digit as u8);
                out.put_slice(&[b'\\', b'u', b'0', b'0', digit(byte >> 4), digit(byte & 15)]);
            }
        }
    }
    out.put_slice(rest);
    out.put_u8(b'"');
}

/// A value within the line: as an array of byte numbers, or as a string when that was asked for and is possible.
pub(crate) fn value(out: &mut Vec<u8>, value: &[u8], form: ValueForm) {
    if form == ValueForm::Text
        && let Ok(text) = std::str::from_utf8(value)
    {
        out.reserve(value.len());
        return string(out, text);
    }
    out.put_u8(b'[');
    // Room for the longest numbers is made and given back: each is written as four characters, of which some are passed.
    let mut at = out.len();
    out.resize(at.saturating_add(value.len().saturating_mul(4)), 0);
    for byte in value {
        let place = out.get_mut(at..).and_then(<[u8]>::first_chunk_mut);
        if let (Some(place), Some(number)) = (place, NUMBERS.get(usize::from(*byte))) {
            *place = *number;
        }
        at = at.saturating_add(digits(*byte)).saturating_add(1);
    }
    // The bracket takes the place of the last comma.
    out.truncate(if value.is_empty() { at } else { at.saturating_sub(1) });
    out.put_u8(b']');
}

/// Each byte as a decimal number and a comma.
#[allow(clippy::indexing_slicing, reason = "it would panic in the compiler")]
static NUMBERS: [[u8; 4]; 256] = {
    let mut numbers = [[0; 4]; 256];
    let mut n = 0;
    while n < 256 {
        let (hundreds, tens, ones) = (b'0' + (n / 100) as u8, b'0' + (n / 10 % 10) as u8, b'0' + (n % 10) as u8);
        numbers[n] = match n {
            0..10 => [ones, b',', 0, 0],
            10..100 => [tens, ones, b',', 0],
            _ => [hundreds, tens, ones, b','],
        };
        n += 1;
    }
    numbers
};

fn digits(byte: u8) -> usize {
    1_usize.saturating_add(usize::from(byte >= 10)).saturating_add(usize::from(byte >= 100))
}

/// How many bytes [`value`] writes.
pub(crate) fn value_len(value: &[u8], form: ValueForm) -> usize {
    if form == ValueForm::Text
        && let Ok(text) = std::str::from_utf8(value)
    {
        let escaped = |byte: u8| match byte {
            b'"' | b'\\' | b'\n' | b'\r' | b'\t' => 2,
            byte if byte < b' ' => 6,
            _ => 1,
        };
        return text.bytes().map(escaped).sum::<usize>().saturating_add(2);
    }
    // A comma stands between two of them, and brackets around all.
    let digits = value.iter().map(|byte| digits(*byte)).sum::<usize>();
    digits.saturating_add(value.len().max(1)).saturating_add(1)
}

/// A value read from within a line: an array of byte numbers, or a string's UTF-8 bytes.
#[derive(Debug, Default)]
pub(crate) struct Value<'a>(pub(crate) Cow<'a, [u8]>);

impl<'de: 'a, 'a> Deserialize<'de> for Value<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor { len_max: usize::MAX }).map(Value)
    }
}

pub(crate) struct ValueVisitor {
    /// Reading stops as soon as an array is longer.
    pub(crate) len_max: usize,
}

impl<'de> serde::de::DeserializeSeed<'de> for ValueVisitor {
    type Value = Cow<'de, [u8]>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Cow<'de, [u8]>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value: a string, or an array of numbers from 0 to 255")
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Cow::Borrowed(text.as_bytes()))
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Cow::Owned(text.as_bytes().to_vec()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut bytes = Vec::new();
        while let Some(Scalar(byte)) = seq.next_element()? {
            if bytes.len() > self.len_max {
                return Err(A::Error::custom("value over the limit"));
            }
            bytes.push(byte);
        }
        Ok(Cow::Owned(bytes))
    }
}

/// A string, borrowed where it holds no escapes.
pub(crate) struct Text<'a>(pub(crate) Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(TextVisitor)
    }
}

/// A number or a flag.
///
/// An error names the type of what is there instead and quotes no text: a text may be as long as the line, and would be
/// longer still when it is escaped.
pub(crate) struct Scalar<T>(pub(crate) T);

/// What a [`Scalar`] may hold.
pub(crate) trait ScalarType: Sized {
    const EXPECTED: &'static str;

    fn from_flag(_: bool) -> Option<Self> {
        None
    }

    fn from_number(_: u64) -> Option<Self> {
        None
    }
}

impl ScalarType for bool {
    const EXPECTED: &'static str = "a boolean";

    fn from_flag(flag: bool) -> Option<Self> {
        Some(flag)
    }
}

impl ScalarType for u8 {
    const EXPECTED: &'static str = "u8";

    fn from_number(number: u64) -> Option<Self> {
        u8::try_from(number).ok()
    }
}

impl ScalarType for u16 {
    const EXPECTED: &'static str = "u16";

    fn from_number(number: u64) -> Option<Self> {
        u16::try_from(number).ok()
    }
}

impl ScalarType for u64 {
    const EXPECTED: &'static str = "u64";

    fn from_number(number: u64) -> Option<Self> {
        Some(number)
    }
}

impl<'de, T: ScalarType> Deserialize<'de> for Scalar<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Of a number that was asked for by its type, the deserializer itself says what is there instead, and quotes it.
        deserializer.deserialize_any(ScalarVisitor(PhantomData))
    }
}

struct ScalarVisitor<T>(PhantomData<T>);

impl<T: ScalarType> Visitor<'_> for ScalarVisitor<T> {
    type Value = Scalar<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::EXPECTED)
    }

    fn visit_bool<E: Error>(self, flag: bool) -> Result<Self::Value, E> {
        T::from_flag(flag).map(Scalar).ok_or_else(|| E::invalid_type(Unexpected::Bool(flag), &self))
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Self::Value, E> {
        T::from_number(number).map(Scalar).ok_or_else(|| E::invalid_value(Unexpected::Unsigned(number), &self))
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<Self::Value, E> {
        Err(unexpected_text(&self))
    }
}

/// Reads a number or a flag into a field of its own type; see [`Scalar`].
pub(crate) fn read_scalar<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: ScalarType,
{
    Scalar::deserialize(deserializer).map(|Scalar(value)| value)
}

/// An object or an array. As with [`Scalar`], an error quotes no text that is there instead.
#[derive(Default)]
pub(crate) struct NoText<T>(pub(crate) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for NoText<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NoTextVisitor(PhantomData)).map(NoText)
    }
}

struct NoTextVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for NoTextVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object or an array")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<T, A::Error> {
        T::deserialize(SeqAccessDeserializer::new(seq))
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<T, E> {
        Err(unexpected_text(&self))
    }
}

/// The error for a text where something else is expected.
pub(crate) fn unexpected_text<'de, E: Error>(expected: &impl Visitor<'de>) -> E {
    E::invalid_type(Unexpected::Other("string"), expected)
}
