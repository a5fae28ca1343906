//! Long reads: a wildcard `Get` or `List`, a part at a time, so that others have their turn in between.

use std::ops::ControlFlow;
use std::vec;

use nkv_core::{Key, Pattern, Record, RecordRef, ValueRef};
use nkv_node::{Error, Handle, Leave};
use nkv_protocol::{Answer, Chunks, Entries, GetEntry, Id, ValueForm};

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
    /// That it may go on although the backlog is long.
    leave: Option<Leave>,
    /// Its answer may come before those of earlier requests.
    pub(crate) is_ahead: bool,
}

/// Why a read is not answered.
#[derive(Debug)]
pub(crate) enum Unread {
    /// The answer would be too long.
    TooLong,
    /// The node refuses it.
    Refused(Error),
}

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
    pub(crate) fn read(&mut self, handle: &Handle) -> Result<bool, Unread> {
        if self.part.len() == 0 && self.more {
            self.take_part(handle)?;
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
            return Err(Unread::TooLong);
        }
        Ok(self.part.len() == 0 && (!self.more || self.left == 0))
    }

    fn take_part(&mut self, handle: &Handle) -> Result<(), Unread> {
        let limit = self.left.min(PART_KEYS);
        let (mut part, mut len) = (Vec::new(), 0_usize);
        let ended = handle.walk(&self.pattern, self.after.as_ref(), |record| {
            if part.len() == limit {
                return ControlFlow::Break(Ok(()));
            }
            let value = if self.is_list { ValueRef::Lent(&[]) } else { record.value };
            len = len.saturating_add(record.key.len()).saturating_add(value.len());
            if len > ANSWER_LEN_MAX {
                return ControlFlow::Break(Err(Unread::TooLong));
            }
            part.push(RecordRef { value, ..record }.to_record());
            ControlFlow::Continue(())
        });
        let more = match ended.map_err(Unread::Refused)? {
            ControlFlow::Continue(()) => false,
            ControlFlow::Break(ended) => ended.map(|()| true)?,
        };
        self.left = self.left.saturating_sub(part.len());
        self.after = part.last().map(|record: &Record| record.key.clone()).or(self.after.take());
        self.part_len = part.iter().map(|record: &Record| record.value.len()).fold(0, usize::saturating_add);
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
    use nkv_node::Node;

    use super::*;

    /// A node with these keys.
    async fn node(keys: impl Iterator<Item = String>, value_len: usize) -> Node {
        let node = Node::builder().start().await.unwrap();
        for key in keys {
            node.handle().put(&Key::new(&key).unwrap(), vec![b'x'; value_len]).await.unwrap();
        }
        node
    }

    /// How many turns it takes to read `count` keys with values of `len` bytes.
    async fn turns(count: usize, value_len: usize) -> usize {
        let node = node((0..count).map(|n| format!("k{n}")), value_len).await;
        let form = Some(ValueForm::Text);
        let mut reading = Reading::new(Id::from_json("1"), Pattern::All, None, usize::MAX, form);
        let mut turns = 1;
        while !reading.read(&node.handle()).unwrap() {
            turns += 1;
        }
        let mut out = Chunks::default();
        reading.finish(&mut out);
        assert!(out.len() > count * value_len);
        turns
    }

    #[tokio::test]
    async fn a_long_read_takes_a_turn_for_each_1024_keys_and_each_64_kib() {
        assert_eq!((turns(10, 10).await, turns(1_025, 0).await, turns(2_500, 1).await), (1, 2, 3));
        assert_eq!(turns(20, 32 << 10).await, 10);
    }

    #[tokio::test]
    async fn a_turn_encodes_no_more_than_others_can_wait_for() {
        let node = node((0..3_000).map(|n| format!("k.{n:04}")), 1_000).await;
        let mut get = Reading::new(Id::default(), Pattern::All, None, usize::MAX, Some(ValueForm::Text));
        let (mut turns, mut before) = (1, 0);
        while !get.read(&node.handle()).unwrap() {
            assert!(get.entries.len() - before <= 2 * TURN_LEN, "{} bytes in one turn", get.entries.len() - before);
            (turns, before) = (turns + 1, get.entries.len());
        }
        assert!(turns >= 3_000_000 / TURN_LEN, "{turns} turns");
    }
}
