//! The service `kv.Client`, as the replicated gRPC store has it.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use bytes::Bytes;
use nkv_node::{Key, Pattern, PutOptions};
use prost::encoding::encoded_len_varint;
use tonic::{Request, Response, Status};

use crate::kv::client_server::Client;
use crate::kv::{GetKey, GetReply, Ip, SetKey, SetReply, StoreReply, Void};
use crate::line::Line;
use crate::mesh::SYNC;
use crate::node_kv::{ANSWER_LEN_MAX, counted};

/// How many keys are taken from the store at a time, and how many bytes: others have their turn in between.
const PART_KEYS: usize = 1_024;
const PART_LEN: usize = 1 << 20;

/// The service of a connection.
#[derive(Clone, Debug)]
pub(crate) struct KvClientService(pub(crate) Arc<Line>);

fn invalid_key(error: nkv_core::KeyError) -> Status {
    Status::invalid_argument(format!("this store has no such keys: {error}"))
}

#[tonic::async_trait]
impl Client for KvClientService {
    async fn get(&self, request: Request<GetKey>) -> Result<Response<GetReply>, Status> {
        let (line, GetKey { key }) = (&self.0, request.into_inner());
        Key::check(&key).map_err(invalid_key)?;
        line.room_for_answer().await;
        let found = line.handle.look_up(&key, |record| record.value.to_bytes());
        let Some(value) = found.map_err(|error| line.status(&error))? else {
            return Ok(Response::new(GetReply { value: String::new(), defined: false }));
        };
        let not_text = |_| Status::failed_precondition(format!("the value of '{key}' is not UTF-8"));
        let value = std::str::from_utf8(&value).map_err(not_text)?.to_owned();
        let answer = line.answer(value.len());
        Ok(counted(GetReply { value, defined: true }, answer))
    }

    async fn set(&self, request: Request<SetKey>) -> Result<Response<SetReply>, Status> {
        let (line, SetKey { key, value, broadcast }) = (&self.0, request.into_inner());
        let key = Key::new(&key).map_err(invalid_key)?;
        line.room_for_answer().await;
        let answer = line.answer(value.len());
        let written = match broadcast {
            true => line.handle.put(&key, Bytes::copy_from_slice(value.as_bytes())).await,
            // A server sends what was put there: it is not sent on.
            false => line.door.mesh.apply(&line.handle, &key, value.clone(), PutOptions::default()).await,
        };
        written.map_err(|error| line.status(&error))?;
        Ok(counted(SetReply { value }, answer))
    }

    async fn list(&self, _: Request<Void>) -> Result<Response<StoreReply>, Status> {
        whole_store(&self.0).await
    }

    async fn register_with_peer(&self, request: Request<Ip>) -> Result<Response<StoreReply>, Status> {
        let (metadata, ip) = (request.metadata(), &request.get_ref().ip);
        let line = &self.0;
        // Servers of nkv have another way to give each other what they have.
        if let Some(value) = line.door.mesh.register(ip, line.address(), metadata).await? {
            let mut answer = Response::new(StoreReply::default());
            answer.metadata_mut().insert(SYNC, value);
            return Ok(answer);
        }
        whole_store(line).await
    }
}

/// What a pair of a map takes in its message.
fn pair_len(key: &str, value: &[u8]) -> usize {
    let field_len = |len: usize| match len {
        0 => 0,
        len => len.saturating_add(encoded_len_varint(len as u64)).saturating_add(1),
    };
    field_len(field_len(key.len()).saturating_add(field_len(value.len())))
}

/// All values that are texts. Answers of this kind are made one at a time on a connection, and one at a time on all where much
/// waits.
async fn whole_store(line: &Arc<Line>) -> Result<Response<StoreReply>, Status> {
    let _turn = line.long_answers.lock().await;
    line.room_for_answer().await;
    let budget = line.handle.budget();
    let _leave = if budget.is_crowded() { budget.leave(line.door.options.stall_limit).await } else { None };
    let (mut store, mut len, mut after) = (BTreeMap::new(), 0_usize, None);
    let mut answer = line.answer(0);
    loop {
        let before = len;
        let (mut looks, mut last) = (0, None);
        let ended = line.handle.walk(&Pattern::All, after.as_ref(), |record| {
            if looks == PART_KEYS || len.saturating_sub(before) >= PART_LEN || len > ANSWER_LEN_MAX {
                return ControlFlow::Break(());
            }
            looks = looks.saturating_add(1);
            last = Some(record.key.to_key());
            if let Ok(text) = std::str::from_utf8(&record.value) {
                len = len.saturating_add(pair_len(&record.key, &record.value));
                store.insert(record.key.as_str().to_owned(), text.to_owned());
            }
            ControlFlow::Continue(())
        });
        let more = ended.map_err(|error| line.status(&error))?.is_break();
        if len > ANSWER_LEN_MAX {
            let message = format!("all values take more than {ANSWER_LEN_MAX} bytes: use nkv.v1.Kv, which has pages");
            return Err(Status::resource_exhausted(message));
        }
        answer.grow(len.saturating_sub(before));
        if !more {
            return Ok(counted(StoreReply { store }, answer));
        }
        after = last;
        tokio::task::yield_now().await;
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    #[test]
    fn the_length_of_an_answer_is_known_before_it_is_made() {
        let texts = ["", "a", &"b".repeat(127), &"c".repeat(128), &"d".repeat(20_000)];
        for key in texts {
            for value in texts {
                let store = BTreeMap::from([(key.to_owned(), value.to_owned())]);
                // An empty pair is a field of no bytes: its number and a zero.
                let len = pair_len(key, value.as_bytes()).max(2);
                assert_eq!(len, StoreReply { store }.encoded_len(), "{} {}", key.len(), value.len());
            }
        }
    }
}
