//! Values of a program's own types, over the network and in the process.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeMap;
use std::error::Error as _;
use std::time::Duration;

use bytes::Bytes;
use common::{server, within};
use nkv_client::codec::{BytesCodec, Codec, CodecError, JsonCodec, StringCodec, Typed, TypedError};
use nkv_client::{Client, ErrorKind, PutOptions, Revision, Store};

/// Puts, reads, lists and deletes two values.
async fn goes_around<C: Codec>(store: impl Store, codec: C, values: [C::Value; 2])
where
    C::Value: Clone + PartialEq + std::fmt::Debug,
{
    let typed = Typed::new(store, codec);
    assert_eq!(typed.get("t.a").await.unwrap(), None);
    let [first, second] = values;
    let revision = typed.put("t.a", &first).await.unwrap();
    typed.put("t.b", second.clone()).await.unwrap();
    assert_eq!(typed.get("t.a").await.unwrap(), Some(first.clone()));
    assert!(typed.exists("t.a").await.unwrap() && !typed.exists("t.c").await.unwrap());
    assert!(!typed.exists("t").await.unwrap(), "a key alone, not what is below it");
    let all = typed.list("t.*").await.unwrap();
    let all: Vec<_> = all.into_iter().map(|(key, value)| (key.as_str().to_owned(), value)).collect();
    assert_eq!(all, [("t.a".to_owned(), first.clone()), ("t.b".to_owned(), second)]);
    let stale = PutOptions::default().with_if_revision(Revision::ZERO);
    let error = typed.put_with("t.a", &first, stale).await.unwrap_err();
    assert!(
        matches!(&error, TypedError::Store(error) if matches!(error.kind(), ErrorKind::Conflict { .. })),
        "{error}"
    );
    typed.put_with("t.a", &first, PutOptions::default().with_if_revision(revision)).await.unwrap();
    assert_eq!(typed.delete("t.a").await.unwrap().count, 1);
    assert_eq!(typed.delete("t.a").await.unwrap().count, 0);
    assert_eq!(typed.delete("t").await.unwrap().count, 0, "a key alone");
    assert_eq!(typed.delete("t.b").await.unwrap().count, 1);
}

#[tokio::test]
async fn values_go_around_in_every_form() {
    let (server, addr) = server().await;
    let client = Client::connect(&addr).await.unwrap();
    goes_around(client.clone(), BytesCodec, [Bytes::from_static(b"\0\xff"), Bytes::new()]).await;
    goes_around(client.clone(), StringCodec, ["ü\n".into(), String::new()]).await;
    let map = BTreeMap::from([("on".to_owned(), 80_u8)]);
    goes_around(client.clone(), JsonCodec::new(), [map.clone(), BTreeMap::new()]).await;
    goes_around(client.clone(), Tally, [3, 0]).await;
    // The same in the process.
    goes_around(server.handle(), JsonCodec::new(), [map, BTreeMap::new()]).await;
    // JSON is what `put_as` writes.
    Typed::new(client.clone(), JsonCodec::<u8>::new()).put("level", 80).await.unwrap();
    assert_eq!(client.get_as::<u8>("level").await.unwrap(), Some(80));
}

#[cfg(feature = "protobuf")]
#[tokio::test]
async fn values_go_around_as_protobuf() {
    use nkv_client::codec::ProtobufCodec;

    #[derive(Clone, PartialEq, prost::Message)]
    struct Lamp {
        #[prost(string, tag = "1")]
        name: String,
        #[prost(uint32, tag = "2")]
        level: u32,
    }

    let (_server, addr) = server().await;
    let client = Client::connect(&addr).await.unwrap();
    let lamp = Lamp { name: "hall".into(), level: 80 };
    goes_around(client.clone(), ProtobufCodec::new(), [lamp.clone(), Lamp::default()]).await;
    let lamps = Typed::new(client.clone(), ProtobufCodec::<Lamp>::new());
    lamps.put("lamp", lamp).await.unwrap();
    assert_eq!(client.get("lamp").await.unwrap().unwrap().value, b"\x0a\x04hall\x10\x50".as_slice());
    client.put("lamp", b"\x0a\x04ha".as_slice()).await.unwrap();
    assert!(matches!(lamps.get("lamp").await.unwrap_err(), TypedError::Decode { .. }));
}

#[tokio::test]
async fn what_has_no_such_form_is_named_with_its_key() {
    let (_server, addr) = server().await;
    let client = Client::connect(&addr).await.unwrap();
    client.put("t.a", "good").await.unwrap();
    client.put("t.b", vec![0xff]).await.unwrap();
    let texts = Typed::new(client.clone(), StringCodec);
    assert_eq!(texts.get("t.a").await.unwrap().as_deref(), Some("good"));
    for error in [texts.get("t.b").await.map(drop).unwrap_err(), texts.list("t.*").await.map(drop).unwrap_err()] {
        assert_eq!(error.to_string(), "the value of 't.b' is not as expected");
        assert!(error.source().unwrap().to_string().contains("utf-8"), "{error:?}");
    }
    let error = Typed::new(client.clone(), JsonCodec::<u8>::new()).get("t.a").await.unwrap_err();
    assert!(matches!(error, TypedError::Decode { ref key, .. } if key == "t.a"), "{error}");
    let error = Typed::new(client.clone(), Tally).put("t.a", 1_000).await.unwrap_err();
    assert_eq!(error.to_string(), "the value for 't.a' cannot be encoded");
    assert_eq!(client.get("t.a").await.unwrap().unwrap().value, "good", "nothing was changed");
    let error = texts.get("t.*").await.unwrap_err();
    assert!(matches!(&error, TypedError::Store(error) if *error.kind() == ErrorKind::InvalidKey), "{error}");
    assert!(
        texts.delete("t.*").await.is_err() && client.exists("t.a").await.unwrap(),
        "no key, and nothing is deleted"
    );
}

#[tokio::test]
async fn a_value_may_live_for_a_time() {
    let (_server, addr) = server().await;
    let texts = Typed::new(Client::connect(&addr).await.unwrap(), StringCodec);
    let options = PutOptions::default().with_ttl(Duration::from_millis(200));
    texts.put_with("t", "soon gone".to_owned(), options).await.unwrap();
    within(async {
        while texts.exists("t").await.unwrap() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// A number as this number of strokes, and at most a hundred.
#[derive(Debug)]
struct Tally;

impl Codec for Tally {
    type Value = usize;

    fn encode(&self, value: &usize) -> Result<Bytes, CodecError> {
        if *value > 100 { Err("too many strokes".into()) } else { Ok("|".repeat(*value).into()) }
    }

    fn decode(&self, bytes: Bytes) -> Result<usize, CodecError> {
        if bytes.iter().all(|byte| *byte == b'|') { Ok(bytes.len()) } else { Err("no stroke".into()) }
    }
}
