//! The lists of an answer, in little more memory than the line that contained them: a peer may send millions of elements
//! of three bytes each.

use std::fmt;
use std::mem;

use bytes::Bytes;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::chunks::SHARE_LEN_MIN;
use crate::json::{Scalar, unexpected_text};

/// A list of this length grows by a quarter, not to twice its length.
const GROWS_SLOWLY_LEN: usize = 4_096;

/// Texts, one behind another in one piece of memory.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Texts {
    text: String,
    /// Where each of them ends.
    ends: Vec<u32>,
}

impl Texts {
    /// Returns how many texts there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Returns whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Returns the texts in order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        let mut start = 0;
        self.ends.iter().map(move |end| {
            let end = *end as usize;
            self.text.get(mem::replace(&mut start, end)..end).unwrap_or_default()
        })
    }

    fn push(&mut self, text: &str) -> Result<(), TooLong> {
        if self.text.capacity().saturating_sub(self.text.len()) < text.len() && self.text.len() > GROWS_SLOWLY_LEN {
            self.text.reserve_exact(text.len().max(self.text.len() / 4));
        }
        self.text.push_str(text);
        make_room(&mut self.ends, 1);
        self.ends.push(position(self.text.len())?);
        Ok(())
    }
}

impl fmt::Debug for Texts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// Values, the short ones one behind another in one piece of memory.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Values {
    short: Vec<u8>,
    /// Where each of them ends in `short`. A long one takes nothing there.
    ends: Vec<u32>,
    /// The long ones, each with its place in the list.
    long: Vec<(u32, Bytes)>,
}

impl Values {
    /// Returns how many values there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Returns whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Returns the values in order. A short one is copied, so that it does not keep the memory of the others.
    #[must_use]
    pub fn iter(&self) -> ValuesIter<'_> {
        ValuesIter { values: self, place: 0, start: 0, long: &self.long }
    }

    /// Takes a payload apart; `None` if the lengths are not those of its values.
    pub(crate) fn split(mut payload: &[u8], lens: Numbers<'_>) -> Option<Self> {
        let mut values = Values { ends: Vec::with_capacity(lens.count()), ..Values::default() };
        for len in lens.iter() {
            let (value, rest) = payload.split_at_checked(usize::try_from(len?).ok()?)?;
            values.push(value).ok()?;
            payload = rest;
        }
        payload.is_empty().then_some(values)
    }

    fn push(&mut self, value: &[u8]) -> Result<(), TooLong> {
        if value.len() < SHARE_LEN_MIN {
            make_room(&mut self.short, value.len());
            self.short.extend_from_slice(value);
        } else {
            self.long.push((position(self.len())?, Bytes::copy_from_slice(value)));
        }
        self.end()
    }

    /// Ends a value that was written to `short`, from `start` on.
    fn end_from(&mut self, start: usize) -> Result<(), TooLong> {
        if self.short.len().saturating_sub(start) >= SHARE_LEN_MIN {
            let value = self.short.split_off(start);
            self.long.push((position(self.len())?, value.into()));
        }
        self.end()
    }

    fn end(&mut self) -> Result<(), TooLong> {
        make_room(&mut self.ends, 1);
        self.ends.push(position(self.short.len())?);
        Ok(())
    }
}

impl fmt::Debug for Values {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self).finish()
    }
}

impl<'a> IntoIterator for &'a Values {
    type Item = Bytes;
    type IntoIter = ValuesIter<'a>;

    fn into_iter(self) -> ValuesIter<'a> {
        self.iter()
    }
}

/// The values of a list, in order; see [`Values::iter`].
#[derive(Clone, Debug)]
pub struct ValuesIter<'a> {
    values: &'a Values,
    place: usize,
    start: usize,
    /// The long ones that are still to come.
    long: &'a [(u32, Bytes)],
}

impl Iterator for ValuesIter<'_> {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        let end = *self.values.ends.get(self.place)? as usize;
        let start = mem::replace(&mut self.start, end);
        let place = self.place;
        self.place = place.saturating_add(1);
        if let [(long_place, value), rest @ ..] = self.long
            && *long_place as usize == place
        {
            self.long = rest;
            return Some(value.clone());
        }
        Some(Bytes::copy_from_slice(self.values.short.get(start..end).unwrap_or_default()))
    }
}

/// A list of numbers as it is written: a number takes two bytes there and eight in memory, so it is not read before it is
/// clear how many there may be.
#[derive(Clone, Copy)]
pub(crate) struct Numbers<'a>(&'a str);

impl<'a> Numbers<'a> {
    /// The list; `None` if it is no array.
    pub(crate) fn of(list: Option<&'a RawValue>) -> Option<Self> {
        let Some(list) = list else { return Some(Numbers("")) };
        Some(Numbers(list.get().strip_prefix('[')?.strip_suffix(']')?.trim_ascii()))
    }

    /// The list, if it has as many elements as another one.
    pub(crate) fn exactly(self, count: usize) -> Option<Self> {
        (self.count() == count).then_some(self)
    }

    /// How many numbers there are at most; exactly that, if it holds numbers alone.
    fn count(self) -> usize {
        let commas = memchr::memchr_iter(b',', self.0.as_bytes()).count();
        if self.0.is_empty() { 0 } else { commas.saturating_add(1) }
    }

    /// The numbers, `None` for what is no number.
    fn iter(self) -> impl Iterator<Item = Option<u64>> {
        self.0.split(',').take(self.count()).map(|number| number.trim_ascii().parse().ok())
    }

    /// Reads them; `None` if anything else is among them.
    pub(crate) fn read(self) -> Option<Vec<u64>> {
        let mut numbers = Vec::with_capacity(self.count());
        for number in self.iter() {
            numbers.push(number?);
        }
        Some(numbers)
    }
}

/// A list is over 4 GiB.
#[derive(Debug, thiserror::Error)]
#[error("a list is too long")]
struct TooLong;

fn position(len: usize) -> Result<u32, TooLong> {
    u32::try_from(len).map_err(|_| TooLong)
}

/// Makes room for more, little more than is needed where there are many already.
fn make_room<T>(list: &mut Vec<T>, more: usize) {
    if list.capacity().saturating_sub(list.len()) < more && list.len() > GROWS_SLOWLY_LEN {
        list.reserve_exact(more.max(list.len() / 4));
    }
}

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut texts = Texts::default();
        deserializer.deserialize_any(Elements(&mut texts))?;
        Ok(texts)
    }
}

impl<'de> Deserialize<'de> for Values {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut values = Values::default();
        deserializer.deserialize_any(Elements(&mut values))?;
        Ok(values)
    }
}

/// Reads a list of objects. None may be written as an array of its fields: that would be a fraction of what it takes.
pub(crate) fn objects<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    let mut objects = Vec::new();
    deserializer.deserialize_any(Elements(&mut objects))?;
    Ok(objects)
}

/// Reads the elements of an array into a list.
struct Elements<'a, L>(&'a mut L);

/// Reads one element to the end of a list.
struct Element<'a, L>(&'a mut L);

trait List<'de>: Sized {
    fn read<D: Deserializer<'de>>(&mut self, element: D) -> Result<(), D::Error>;
}

impl<'de> List<'de> for Texts {
    fn read<D: Deserializer<'de>>(&mut self, element: D) -> Result<(), D::Error> {
        element.deserialize_str(Element(self))
    }
}

impl<'de> List<'de> for Values {
    fn read<D: Deserializer<'de>>(&mut self, element: D) -> Result<(), D::Error> {
        element.deserialize_any(Element(self))
    }
}

impl<'de, T: Deserialize<'de>> List<'de> for Vec<T> {
    fn read<D: Deserializer<'de>>(&mut self, element: D) -> Result<(), D::Error> {
        element.deserialize_any(Element(self))
    }
}

impl<'de, L: List<'de>> Visitor<'de> for Elements<'_, L> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(Element(&mut *self.0))?.is_some() {}
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        Err(unexpected_text(&self))
    }
}

impl<'de, L: List<'de>> DeserializeSeed<'de> for Element<'_, L> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        self.0.read(deserializer)
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Element<'_, Vec<T>> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        let object = T::deserialize(MapAccessDeserializer::new(map))?;
        // The shortest takes nearly twice its text, and all of them twice as much again while they are moved.
        if self.0.len() == self.0.capacity() {
            self.0.reserve_exact((self.0.len() / 16).max(4));
        }
        self.0.push(object);
        Ok(())
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        Err(unexpected_text(&self))
    }
}

impl Visitor<'_> for Element<'_, Texts> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        self.0.push(text).map_err(E::custom)
    }
}

impl<'de> Visitor<'de> for Element<'_, Values> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value: a string, or an array of numbers from 0 to 255")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        self.0.push(text.as_bytes()).map_err(E::custom)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let start = self.0.short.len();
        while let Some(Scalar(byte)) = seq.next_element()? {
            make_room(&mut self.0.short, 1);
            self.0.short.push(byte);
        }
        self.0.end_from(start).map_err(A::Error::custom)
    }
}
