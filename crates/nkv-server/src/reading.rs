//! Long reads: a wildcard `Get` or `List`, a part at a time, so that others have their turn in between.

use std::vec;

use nkv_core::{Key, Pattern, Record};
use nkv_protocol::{Answer, Chunks, Entries, GetEntry, Id, ValueForm};

use crate::budget::Leave;
use crate::core::Store;

/// How many keys are taken from the store at a time: they are of one moment.
pub(crate) const PART_KEYS: usize = 1_024;

/// A turn encodes no more bytes of values than these, and one value.
const TURN_LEN: usize = 64 << 10;

/// Longest answer, in bytes.
pub(crate) const ANSWER_LEN_MAX: usize = 64 << 20;

/// A read that is under way.
#[derive(Debug)]
pub(crate) struct Reading {
    /// As JSON.
    id: String,
    pattern: Pattern,
    after: Option<Key>,
    /// How many keys may still be taken.
    left: usize,
    /// Without values.
    is_list: bool,
    /// What was taken and is not encoded yet.
    part: vec::IntoIter<Record>,
    part_len: usize,
    /// Whether there is more behind that.
    more: bool,
    entries: Entries,
    /// That it may go on although much waits.
    leave: Option<Leave>,
    /// Its answer may come before those of earlier requests.
    pub(crate) is_ahead: bool,
}

/// The answer would be too long.
#[derive(Debug)]
pub(crate) struct TooLong;

impl Reading {
    /// A `Get` with values in this form, or a `List`.
    pub(crate) fn new(id: Id<'_>, pattern: Pattern, after: Option<Key>, limit: usize, form: Option<ValueForm>) -> Self {
        let entries = form.map_or_else(Entries::of_list, Entries::of_get);
        let (part, part_len, more) = (Vec::new().into_iter(), 0, true);
        let (id, is_list) = (id.as_json().to_owned(), form.is_none());
        let (leave, is_ahead) = (None, false);
        Reading { id, pattern, after, left: limit, is_list, part, part_len, more, entries, leave, is_ahead }
    }

    pub(crate) fn id(&self) -> Id<'_> {
        Id::from_json(&self.id)
    }

    /// How many bytes it holds.
    pub(crate) fn len(&self) -> usize {
        self.entries.len().saturating_add(self.part_len)
    }

    /// Whether it is to ask for leave before it takes more from the store.
    pub(crate) fn needs_leave(&self) -> bool {
        self.leave.is_none() && self.part.len() == 0
    }

    pub(crate) fn give_leave(&mut self, leave: Option<Leave>) {
        self.leave = leave;
    }

    /// Reads on for a turn; true if there is nothing left to read.
    pub(crate) fn read(&mut self, store: &Store) -> Result<bool, TooLong> {
        if self.part.len() == 0 && self.more {
            self.take_part(store)?;
        }
        let mut len = 0_usize;
        while len < TURN_LEN
            && let Some(Record { key, value, revision, .. }) = self.part.next()
        {
            len = len.saturating_add(value.len());
            self.entries.push(GetEntry::from((key.as_str(), &value, revision.get())));
        }
        self.part_len = self.part_len.saturating_sub(len);
        if self.entries.len() > ANSWER_LEN_MAX {
            return Err(TooLong);
        }
        Ok(self.part.len() == 0 && (!self.more || self.left == 0))
    }

    fn take_part(&mut self, store: &Store) -> Result<(), TooLong> {
        let limit = self.left.min(PART_KEYS);
        let (part, more) = if self.is_list {
            let page = store.list(&self.pattern, self.after.as_ref(), limit);
            let keys = page.entries.into_iter();
            let record = |(key, revision)| Record { key, value: Default::default(), revision, expiry: None };
            (keys.map(record).collect(), page.more)
        } else {
            let page = store.get_page(&self.pattern, self.after.as_ref(), limit, ANSWER_LEN_MAX);
            let page = page.map_err(|_| TooLong)?;
            (page.entries, page.more)
        };
        self.left = self.left.saturating_sub(part.len());
        self.after = part.last().map(|record: &Record| record.key.clone()).or(self.after.take());
        self.part_len = part.iter().map(|record| record.value.len()).fold(0, usize::saturating_add);
        (self.part, self.more) = (part.into_iter(), more);
        Ok(())
    }

    /// Writes the answer.
    pub(crate) fn finish(self, out: &mut Chunks) {
        let Reading { id, entries, more, .. } = self;
        Answer::to(Id::from_json(&id), out).entries(entries, more);
    }
}

#[cfg(test)]
mod tests {
    use nkv_core::{NoPersist, NotifyKeyValue, PersistValue, PutOptions};

    use super::*;

    /// How many turns it takes to read `count` keys with values of `len` bytes.
    fn turns(count: usize, value_len: usize) -> usize {
        let persist: Box<dyn PersistValue> = Box::new(NoPersist::default());
        let store: Store = NotifyKeyValue::open(persist).unwrap();
        for number in 0..count {
            store.put(&Key::new(&format!("k{number}")).unwrap(), vec![b'x'; value_len], PutOptions::default()).unwrap();
        }
        let form = Some(ValueForm::Text);
        let mut reading = Reading::new(Id::from_json("1"), Pattern::All, None, usize::MAX, form);
        let mut turns = 1;
        while !reading.read(&store).unwrap() {
            turns += 1;
        }
        let mut out = Chunks::default();
        reading.finish(&mut out);
        assert!(out.len() > count * value_len);
        turns
    }

    #[test]
    fn a_long_read_takes_a_turn_for_each_1024_keys_and_each_64_kib() {
        assert_eq!((turns(10, 10), turns(1_025, 0), turns(2_500, 1)), (1, 2, 3));
        assert_eq!(turns(20, 32 << 10), 10);
    }

    #[test]
    fn a_turn_encodes_no_more_than_others_can_wait_for() {
        let persist: Box<dyn PersistValue> = Box::new(NoPersist::default());
        let store: Store = NotifyKeyValue::open(persist).unwrap();
        for n in 0..3_000 {
            store.put(&Key::new(&format!("k.{n:04}")).unwrap(), vec![b'v'; 1_000], PutOptions::default()).unwrap();
        }
        let mut get = Reading::new(Id::default(), Pattern::All, None, usize::MAX, Some(ValueForm::Text));
        let (mut turns, mut before) = (1, 0);
        while !get.read(&store).unwrap() {
            assert!(get.entries.len() - before <= 2 * TURN_LEN, "{} bytes in one turn", get.entries.len() - before);
            (turns, before) = (turns + 1, get.entries.len());
        }
        assert!(turns >= 3_000_000 / TURN_LEN, "{turns} turns");
    }
}
