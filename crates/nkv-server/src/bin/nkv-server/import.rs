//! `import DIR`: puts what a data directory holds into an engine that holds nothing else.

use bytes::Bytes;
use nkv_core::{Change, Key, Loaded, Pattern, PersistError, PersistValue, StoredRef};
use nkv_node::{Error, ErrorKind, Handle, PutOptions};
use nkv_persist_fs::FsPersist;
use tokio::task::JoinSet;

/// Puts that are under way at a time.
const UNDER_WAY: usize = 64;

/// A data directory that is read alone: what ends meanwhile is not written there.
#[derive(Debug)]
pub(crate) struct Kept(pub(crate) FsPersist);

impl PersistValue for Kept {
    fn load(&mut self, visit: &mut dyn FnMut(StoredRef<'_>)) -> Result<Loaded, PersistError> {
        self.0.load(visit)
    }

    fn persist(&mut self, _: &[Change]) -> Result<(), PersistError> {
        Ok(())
    }

    fn keeps_meta(&self) -> bool {
        self.0.keeps_meta()
    }
}

/// Copies all of `from` to `to`, and returns how many keys that were. Nothing is written if `to` holds anything else, or cannot
/// hold what there is. It may be done again after it broke off.
pub(crate) async fn import(from: &Handle, to: &Handle) -> nkv_node::Result<u64> {
    let keys: Vec<Key> = from.list(Pattern::All).await?.into_iter().map(|(key, _)| key).collect();
    check(from, to, &keys).await?;
    let (mut count, mut under_way) = (0_u64, JoinSet::new());
    for key in keys {
        // One that has ended meanwhile is not there any more.
        let Some((value, options)) = record(from, &key)? else { continue };
        if under_way.len() >= UNDER_WAY
            && let Some(put) = under_way.join_next().await
        {
            put.map_err(|error| refused(500, error.to_string()))??;
        }
        let to = to.clone();
        under_way.spawn(async move { to.put_with(&key, value, options).await.map(drop) });
        count = count.saturating_add(1);
    }
    while let Some(put) = under_way.join_next().await {
        put.map_err(|error| refused(500, error.to_string()))??;
    }
    Ok(count)
}

async fn check(from: &Handle, to: &Handle, keys: &[Key]) -> nkv_node::Result<()> {
    for (key, _) in to.list(Pattern::All).await? {
        if from.get(&key).await?.map(|entry| entry.value) != to.get(&key).await?.map(|entry| entry.value) {
            return Err(refused(
                409,
                format!("the engine holds '{key}', which is not of this directory; nothing was written"),
            ));
        }
    }
    let (len_max, can) = (to.limits().value_len_max, to.abilities());
    for key in keys {
        let Some((value, options)) = record(from, key)? else { continue };
        if value.len() > len_max {
            let what = format!(
                "'{key}' has {} bytes, and {len_max} is the limit of the engine; nothing was written",
                value.len()
            );
            return Err(refused(413, what));
        }
        if options.ttl.is_some() && !can.ttl {
            let what = format!("'{key}' has a TTL, and the engine has none; nothing was written");
            return Err(refused(501, what));
        }
    }
    Ok(())
}

/// The value of a key, and how long it lives yet.
fn record(from: &Handle, key: &Key) -> nkv_node::Result<Option<(Bytes, PutOptions)>> {
    from.look_up(key.as_str(), |record| {
        let options = record.expiry.map_or_else(PutOptions::default, |expiry| {
            PutOptions::default().with_ttl(from.time_left(expiry).max(std::time::Duration::from_millis(1)))
        });
        (record.value.to_bytes(), options)
    })
}

fn refused(status: u16, message: String) -> Error {
    Error::new(ErrorKind::Refused { status }, message)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use nkv_node::{Abilities, Node};
    use nkv_testkit::engine::ScriptedEngine;

    use super::*;

    async fn followed(engine: &ScriptedEngine) -> Node {
        let node = Node::builder().engine(engine.clone()).start().await.unwrap();
        while node.handle().health().await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        node
    }

    #[tokio::test]
    async fn all_of_a_directory_is_put_into_an_empty_engine_and_nothing_over_what_is_there() {
        let (from, engine) = (Node::builder().start().await.unwrap(), ScriptedEngine::default());
        let to = followed(&engine).await;
        let (from, to) = (from.handle(), to.handle());
        for n in 0..300 {
            from.put(format!("k.{n}"), n.to_string()).await.unwrap();
        }
        to.put("k.7", "7").await.unwrap();
        to.put("other", "x").await.unwrap();
        let refused = import(&from, &to).await.unwrap_err();
        assert!(refused.to_string().contains("'other'"), "{refused}");
        assert_eq!(to.list("*").await.unwrap().len(), 2);
        to.delete("other").await.unwrap();
        // As after one that broke off.
        assert_eq!(import(&from, &to).await, Ok(300));
        let values =
            |all: Vec<nkv_node::Entry>| all.into_iter().map(|entry| (entry.key, entry.value)).collect::<Vec<_>>();
        assert_eq!(values(to.get_all("*").await.unwrap()), values(from.get_all("*").await.unwrap()));
    }

    #[tokio::test]
    async fn what_an_engine_cannot_hold_is_named_before_anything_is_written() {
        let (from, engine) = (Node::builder().start().await.unwrap(), ScriptedEngine::default());
        let to = followed(&engine).await;
        let (from, to) = (from.handle(), to.handle());
        from.put("a", "1").await.unwrap();
        let options = PutOptions::default().with_ttl(Duration::from_secs(60));
        from.put_with("b", "2", options).await.unwrap();
        engine.set_abilities(Abilities::default());
        let refused = import(&from, &to).await.unwrap_err();
        assert!(refused.to_string().contains("'b' has a TTL"), "{refused}");
        assert!(!to.exists("*").await.unwrap());
        engine.set_abilities(Abilities::ALL);
        assert_eq!(import(&from, &to).await, Ok(2));
    }
}
