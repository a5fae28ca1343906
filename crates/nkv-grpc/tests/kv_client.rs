//! The service `kv.Client`, byte for byte as the clients of the replicated gRPC store know it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{Server, raw_call};
use tonic::transport::Channel;
use tonic::{Code, Status};

async fn get(channel: &Channel, message: &[u8]) -> Result<Vec<u8>, Status> {
    raw_call(channel, "/kv.Client/Get", message).await
}

async fn set(channel: &Channel, message: &[u8]) -> Result<Vec<u8>, Status> {
    raw_call(channel, "/kv.Client/Set", message).await
}

async fn list(channel: &Channel) -> Result<Vec<u8>, Status> {
    raw_call(channel, "/kv.Client/List", b"").await
}

#[tokio::test]
async fn the_messages_are_those_of_the_original() {
    let server = Server::start().await;
    let channel = server.channel().await;
    // An absent key is no error: all fields have their defaults, and none is sent.
    assert_eq!(get(&channel, b"\x0a\x01k").await.unwrap(), b"");
    // As a client sets (`broadcast` true), and as a peer replicates (false, which is not sent).
    assert_eq!(set(&channel, b"\x0a\x01k\x12\x02v1\x18\x01").await.unwrap(), b"\x0a\x02v1");
    assert_eq!(set(&channel, b"\x0a\x02k2\x12\x02v2").await.unwrap(), b"\x0a\x02v2");
    assert_eq!(get(&channel, b"\x0a\x01k").await.unwrap(), b"\x0a\x02v1\x10\x01");
    // An empty value is a value.
    assert_eq!(set(&channel, b"\x0a\x01e\x18\x01").await.unwrap(), b"");
    assert_eq!(get(&channel, b"\x0a\x01e").await.unwrap(), b"\x10\x01");
    // A map is a field for each pair; the order is of no account, and here that of the keys.
    let store = b"\x0a\x05\x0a\x01e\x12\x00\x0a\x07\x0a\x01k\x12\x02v1\x0a\x08\x0a\x02k2\x12\x02v2";
    let found = list(&channel).await.unwrap();
    // An empty value of a pair may be sent or left out.
    let without = b"\x0a\x03\x0a\x01e\x0a\x07\x0a\x01k\x12\x02v1\x0a\x08\x0a\x02k2\x12\x02v2";
    assert!(found == store || found == without, "{}", found.escape_ascii());
    let registered = raw_call(&channel, "/kv.Client/RegisterWithPeer", b"\x0a\x0e127.0.0.1:4001").await.unwrap();
    assert_eq!(registered, found);
    // Fields of the future are no error.
    assert_eq!(get(&channel, b"\x0a\x01k\x7a\x03new").await.unwrap(), b"\x0a\x02v1\x10\x01");
    assert_eq!(server.handle().get("k").await.unwrap().unwrap().value, "v1");
}

#[tokio::test]
async fn what_has_no_form_there_is_answered_as_such() {
    let server = Server::start().await;
    let (channel, nkv) = (server.channel().await, server.handle());
    nkv.put("text", "t").await.unwrap();
    nkv.put("bytes", b"\xff\xfe").await.unwrap();
    let refused = get(&channel, b"\x0a\x05bytes").await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert_eq!(list(&channel).await.unwrap(), b"\x0a\x09\x0a\x04text\x12\x01t");
    // Keys that this store cannot have.
    for key in [&b""[..], b"a b", b"a..b", b"a*"] {
        let message = [&[0x0a, key.len() as u8], key].concat();
        for answer in [get(&channel, &message).await, set(&channel, &message).await] {
            let refused = answer.unwrap_err();
            assert_eq!(refused.code(), Code::InvalidArgument);
            assert!(refused.message().contains("this store has no such keys"), "{refused}");
        }
    }
    // A key that is not UTF-8, and what is no message.
    assert!(get(&channel, b"\x0a\x01\xff").await.is_err());
    assert!(get(&channel, b"\x0a\x7f").await.is_err());
    let unknown = raw_call(&channel, "/kv.Client/Delete", b"").await.unwrap_err();
    assert_eq!(unknown.code(), Code::Unimplemented);
    let unknown = raw_call(&channel, "/kv.Server/Get", b"").await.unwrap_err();
    assert_eq!(unknown.code(), Code::Unimplemented);
}

#[tokio::test]
async fn an_answer_with_all_values_has_64_mib_at_most() {
    let server = Server::start().await;
    let (channel, nkv) = (server.channel().await, server.handle());
    let value = bytes::Bytes::from(vec![b'x'; 1 << 20]);
    for n in 0..63 {
        nkv.put(format!("k{n:02}"), &value).await.unwrap();
    }
    let answer = list(&channel).await.unwrap();
    assert!(answer.len() > 63 << 20 && answer.len() <= 64 << 20);
    drop(answer);
    nkv.put("k63", &value).await.unwrap();
    assert_eq!(list(&channel).await.unwrap_err().code(), Code::ResourceExhausted);
    let refused = raw_call(&channel, "/kv.Client/RegisterWithPeer", b"\x0a\x0b127.0.0.1:9").await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(get(&channel, b"\x0a\x03k00").await.is_ok());
}
