//! What nodes say to each other, as bytes: frames of a length, a kind and a content.
//!
//! The node that opened a connection says what it wants; the other answers. A connection begins with a hello of each and the
//! first one's `Ready`.

use std::io;
use std::net::SocketAddr;

use bytes::Bytes;
use nkv_core::KEY_LEN_MAX;
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::bytes::{Reader, Writer};
use crate::register::Record;
use crate::replica::{Contact, Entry, Place, Want};
use crate::stamp::{Hlc, Millis, NodeId};
use crate::tree::{CHILDREN, Children, Half, Prefix};

/// Of what nodes say; of another version nothing is understood.
pub(crate) const VERSION: u32 = 1;

/// The first bytes of a hello.
const MAGIC: u32 = 0x6e6b_7663;

/// A hello is no longer than this: before it, nothing is known of a peer.
pub(crate) const HELLO_LEN_MAX: usize = 1_024;

/// A frame of records has about this many bytes, or one record.
pub(crate) const RECORDS_LEN: usize = 256 << 10;

/// What a frame may have beside one value.
const FRAME_ROOM: usize = RECORDS_LEN + KEY_LEN_MAX + 1_024;

/// Prefixes that one frame asks for, and entries that it lists, about.
pub(crate) const PREFIXES_MAX: usize = 512;
pub(crate) const ENTRIES_MAX: usize = 4_096;

/// The longest frame, where values may be this long.
pub(crate) fn frame_len_max(value_len_max: usize) -> usize {
    value_len_max.saturating_add(FRAME_ROOM)
}

/// Who one is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) cluster: String,
    pub(crate) id: NodeId,
    /// Random, of this run of the node.
    pub(crate) run: u64,
    /// How long it runs.
    pub(crate) uptime: Millis,
    pub(crate) wall: Millis,
    /// Where it can be reached.
    pub(crate) address: Option<SocketAddr>,
    /// It has a state.
    pub(crate) has_joined: bool,
    pub(crate) value_len_max: u64,
}

/// How a node's data are, at the beginning of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) wall: Millis,
    pub(crate) place: Place,
    pub(crate) root: u64,
    /// The last with the one it is said to.
    pub(crate) contact: Option<Contact>,
    pub(crate) has_joined: bool,
}

/// What nodes say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    Hello(Hello),
    /// In the place of a hello: why not.
    Refused {
        is_duplicate: bool,
        reason: String,
    },
    /// The one that opened the connection goes on.
    Ready {
        wall: Millis,
    },
    /// New records, to be merged. No answer.
    Push(Vec<Record>),
    /// Begins a session.
    Sync(State),
    /// Answers it.
    SyncAnswer(State),
    /// Answers it too, where the other leads a session itself.
    Busy,
    /// Asks where the peers are that the other is connected to.
    WhoElse,
    Known(Vec<(NodeId, SocketAddr)>),
    /// Asks for half the digests of children.
    Digests(Half, Vec<Prefix>),
    Children(Vec<Children>),
    /// All that there is below some prefixes.
    List(Vec<(Prefix, Vec<Entry>)>),
    /// What answers a list or a want, in parts.
    Records(Vec<Record>),
    /// Ends the answer to a list.
    Wants(Vec<Want>),
    /// Ends the records that were wanted.
    Given,
    /// How many of them were not taken.
    Taken {
        refused: u32,
    },
    /// Ends a session: as seen from the one that began it, at this time, with all that was needed or not.
    End {
        at: Millis,
        is_whole: bool,
    },
    Ended {
        is_whole: bool,
    },
}

impl Message {
    /// The frame.
    pub(crate) fn encode(&self) -> Bytes {
        let mut to = Writer::framed();
        let kind = match self {
            Message::Hello(hello) => {
                hello.write(&mut to);
                1
            }
            Message::Refused { is_duplicate, reason } => {
                to.u8(u8::from(*is_duplicate));
                to.bytes(reason.as_bytes());
                2
            }
            Message::Ready { wall } => {
                to.u64(*wall);
                3
            }
            Message::Push(records) => {
                to.list(records, |to, record| record.write(to));
                4
            }
            Message::Sync(state) => {
                state.write(&mut to);
                5
            }
            Message::SyncAnswer(state) => {
                state.write(&mut to);
                6
            }
            Message::Digests(half, prefixes) => {
                to.u8(u8::from(*half == Half::High));
                to.list(prefixes, |to, prefix| prefix.write(to));
                7
            }
            Message::Children(children) => {
                to.list(children, |to, children| {
                    to.u32(u32::from(children.used));
                    children.digests.iter().for_each(|digest| to.u32(*digest));
                });
                8
            }
            Message::List(lists) => {
                to.list(lists, |to, (prefix, entries)| {
                    prefix.write(to);
                    to.list(entries, |to, entry| {
                        to.u64(entry.key_hash);
                        to.u64(entry.time.0);
                        to.u64(entry.rest);
                    });
                });
                9
            }
            Message::Records(records) => {
                to.list(records, |to, record| record.write(to));
                10
            }
            Message::Wants(wants) => {
                to.list(wants, |to, want| {
                    to.u64(want.key_hash);
                    to.u8(u8::from(want.lacks));
                });
                11
            }
            Message::Given => 12,
            Message::Busy => 16,
            Message::WhoElse => 17,
            Message::Known(known) => {
                to.list(known, |to, (id, address)| {
                    to.u64(id.0);
                    to.bytes(address.to_string().as_bytes());
                });
                18
            }
            Message::Taken { refused } => {
                to.u32(*refused);
                13
            }
            Message::End { at, is_whole } => {
                to.u64(*at);
                to.u8(u8::from(*is_whole));
                14
            }
            Message::Ended { is_whole } => {
                to.u8(u8::from(*is_whole));
                15
            }
        };
        to.into_frame(kind)
    }

    /// What a frame says, without its length; `None` for anything that is not understood to its end.
    pub(crate) fn decode(frame: Bytes) -> Option<Message> {
        let mut from = Reader::new(frame);
        let from = &mut from;
        let message = match from.u8()? {
            1 => Message::Hello(Hello::read(from)?),
            2 => Message::Refused { is_duplicate: from.flag()?, reason: from.text()? },
            3 => Message::Ready { wall: from.u64()? },
            4 => Message::Push(records(from)?),
            5 => Message::Sync(State::read(from)?),
            6 => Message::SyncAnswer(State::read(from)?),
            7 => {
                let half = if from.flag()? { Half::High } else { Half::Low };
                Message::Digests(half, from.list(5, Prefix::read)?)
            }
            8 => Message::Children(from.list(4 + 4 * CHILDREN, |from| {
                let (used, mut digests) = (u16::try_from(from.u32()?).ok()?, [0; CHILDREN]);
                for digest in &mut digests {
                    *digest = from.u32()?;
                }
                Some(Children { used, digests })
            })?),
            9 => Message::List(from.list(9, |from| {
                let entry = |from: &mut Reader| {
                    Some(Entry { key_hash: from.u64()?, time: Hlc(from.u64()?), rest: from.u64()? })
                };
                Some((Prefix::read(from)?, from.list(24, entry)?))
            })?),
            10 => Message::Records(records(from)?),
            11 => Message::Wants(from.list(9, |from| Some(Want { key_hash: from.u64()?, lacks: from.flag()? }))?),
            12 => Message::Given,
            16 => Message::Busy,
            17 => Message::WhoElse,
            18 => Message::Known(from.list(12, |from| Some((NodeId(from.u64()?), from.text()?.parse().ok()?)))?),
            13 => Message::Taken { refused: from.u32()? },
            14 => Message::End { at: from.u64()?, is_whole: from.flag()? },
            15 => Message::Ended { is_whole: from.flag()? },
            _ => return None,
        };
        from.is_at_end().then_some(message)
    }
}

fn records(from: &mut Reader) -> Option<Vec<Record>> {
    from.list(25, Record::read)
}

impl Hello {
    /// The longest frame that the node takes.
    pub(crate) fn frame_len_max(&self) -> usize {
        frame_len_max(usize::try_from(self.value_len_max).unwrap_or(usize::MAX))
    }

    fn write(&self, to: &mut Writer) {
        to.u32(MAGIC);
        to.u32(VERSION);
        to.bytes(self.cluster.as_bytes());
        to.u64(self.id.0);
        to.u64(self.run);
        to.u64(self.uptime);
        to.u64(self.wall);
        to.bytes(self.address.map(|address| address.to_string()).unwrap_or_default().as_bytes());
        to.u8(u8::from(self.has_joined));
        to.u64(self.value_len_max);
    }

    fn read(from: &mut Reader) -> Option<Self> {
        let is_known = from.u32()? == MAGIC && from.u32()? == VERSION;
        is_known.then_some(())?;
        Some(Hello {
            cluster: from.text()?,
            id: NodeId(from.u64()?),
            run: from.u64()?,
            uptime: from.u64()?,
            wall: from.u64()?,
            address: match from.text()?.as_str() {
                "" => None,
                address => Some(address.parse().ok()?),
            },
            has_joined: from.flag()?,
            value_len_max: from.u64()?,
        })
    }
}

impl State {
    fn write(&self, to: &mut Writer) {
        to.u64(self.wall);
        self.place.write(to);
        to.u64(self.root);
        to.u8(u8::from(self.contact.is_some()));
        self.contact.iter().for_each(|contact| contact.write(to));
        to.u8(u8::from(self.has_joined));
    }

    fn read(from: &mut Reader) -> Option<Self> {
        Some(State {
            wall: from.u64()?,
            place: Place::read(from)?,
            root: from.u64()?,
            contact: if from.flag()? { Some(Contact::read(from)?) } else { None },
            has_joined: from.flag()?,
        })
    }
}

impl Prefix {
    fn write(self, to: &mut Writer) {
        to.u8(self.level);
        to.u32(self.index);
    }

    fn read(from: &mut Reader) -> Option<Self> {
        let prefix = Prefix { level: from.u8()?, index: from.u32()? };
        prefix.is_valid().then_some(prefix)
    }
}

/// Reads a frame of at most `len_max` bytes. What has begun to come, but not ended, is an error, as is a longer one: of that
/// no more than its length is read.
pub(crate) async fn read(from: &mut (impl AsyncRead + Unpin), len_max: usize) -> io::Result<Message> {
    let len = from.read_u32().await? as usize;
    if len > len_max {
        return Err(invalid(format!("a frame of {len} bytes, and {len_max} is the limit")));
    }
    // Memory is taken as bytes come, not as they are announced.
    let mut frame = Vec::with_capacity(len.min(64 << 10));
    let mut rest = from.take(len as u64);
    rest.read_to_end(&mut frame).await?;
    if frame.len() < len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let kind = frame.first().copied();
    Message::decode(frame.into()).ok_or_else(|| invalid(format!("a frame of kind {kind:?} is not understood")))
}

pub(crate) fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

/// Records in frames of a length that any peer takes.
pub(crate) fn parts(records: Vec<Record>) -> Vec<Vec<Record>> {
    let (mut parts, mut part, mut len) = (Vec::new(), Vec::new(), 0);
    for record in records {
        if !part.is_empty() && len + record.len() > RECORDS_LEN {
            parts.push(std::mem::take(&mut part));
            len = 0;
        }
        len += record.len();
        part.push(record);
    }
    parts.extend((!part.is_empty()).then_some(part));
    parts
}

#[cfg(test)]
mod tests {
    use nkv_core::{Epoch, Key};
    use proptest::prelude::*;

    use super::*;
    use crate::register::{Content, Register};
    use crate::stamp::Stamp;

    fn examples() -> Vec<Message> {
        let stamp = Stamp { time: Hlc(5), node: NodeId(6) };
        let register = |content| Register::new(stamp, content);
        let record = |content| Record { key: Key::new("a.b").unwrap(), register: register(content) };
        let place = Place { epoch: Epoch::new(3), revision: 4 };
        let records = vec![
            record(Content::Put { value: "v".into(), ttl: Some(5) }),
            record(Content::Put { value: "".into(), ttl: None }),
            record(Content::Deleted { at: 7 }),
            record(Content::Ended { ttl: 7, hash: 8 }),
        ];
        let state = State {
            wall: 1,
            place,
            root: 2,
            contact: Some(Contact { at: 9, own: place, peer: place }),
            has_joined: true,
        };
        let prefix = Prefix::ROOT.child(3);
        let entry = Entry { key_hash: 1, time: Hlc(2), rest: 3 };
        vec![
            Message::Hello(Hello {
                cluster: "c".into(),
                id: NodeId(1),
                run: 2,
                uptime: 3,
                wall: 4,
                address: Some("[::1]:5".parse().unwrap()),
                has_joined: true,
                value_len_max: 6,
            }),
            Message::Refused { is_duplicate: true, reason: "no".into() },
            Message::Ready { wall: 5 },
            Message::Push(records.clone()),
            Message::Sync(state),
            Message::SyncAnswer(State { contact: None, ..state }),
            Message::Digests(Half::High, vec![Prefix::ROOT, prefix]),
            Message::Busy,
            Message::WhoElse,
            Message::Known(vec![(NodeId(1), "10.0.0.1:5".parse().unwrap())]),
            Message::Children(vec![Children { used: 5, digests: [7; CHILDREN] }]),
            Message::List(vec![(prefix, vec![entry, entry]), (Prefix::ROOT, Vec::new())]),
            Message::Records(records),
            Message::Wants(vec![Want { key_hash: 1, lacks: true }]),
            Message::Given,
            Message::Taken { refused: 1 },
            Message::End { at: 1, is_whole: false },
            Message::Ended { is_whole: true },
        ]
    }

    #[tokio::test]
    async fn what_is_said_is_understood_and_no_part_of_it_is() {
        for message in examples() {
            let frame = message.encode();
            assert_eq!(read(&mut &frame[..], frame.len()).await.unwrap(), message);
            assert!(read(&mut &frame[..], frame.len() - 5).await.is_err(), "longer than the limit: {message:?}");
            for len in 0..frame.len() {
                assert!(read(&mut &frame[..len], 1_024).await.is_err(), "{len} bytes of {message:?}");
                if len > 4 {
                    assert_eq!(Message::decode(frame.slice(4..len)), None, "{len} bytes of {message:?}");
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(5_000))]

        #[test]
        fn bytes_of_any_kind_end_nothing(kind in 0_u8..20, bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let mut frame = vec![kind];
            frame.extend(bytes);
            let _ = Message::decode(frame.into());
        }
    }

    #[test]
    fn no_memory_is_taken_for_what_is_only_announced() {
        let mut frame = vec![10];
        frame.extend(u32::MAX.to_be_bytes());
        assert_eq!(Message::decode(frame.into()), None);
    }
}
