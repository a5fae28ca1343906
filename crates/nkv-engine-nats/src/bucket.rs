//! The bucket: created where it is missing, refused where its settings break a promise.

use futures_util::future::join_all;
use nkv_node::{Abilities, EngineError};
use serde_json::json;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::options::Options;
use crate::wire::{ApiError, CONNECT_LIMIT, Config, Info, Wire};

/// The longest headers of a write, in bytes, with those of a batch: they count in the limits of a message.
pub(crate) const HEADERS_LEN_MAX: usize = 288;
/// At most this many operations are one batch, by the server's default.
pub(crate) const BATCH_OPS_MAX: usize = 1_000;

/// What a bucket can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) abilities: Abilities,
    pub(crate) value_len_max: usize,
    /// Each key has one message: what is overwritten is gone.
    pub(crate) has_no_history: bool,
    pub(crate) purge: Purge,
}

/// How markers of deletes are removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purge {
    /// By their sequence alone.
    BySequence,
    /// By their subject, up to their sequence.
    BySubject,
    Never,
}

/// What every bucket can do.
pub(crate) fn abilities() -> Abilities {
    let mut abilities = Abilities::default();
    (abilities.conditions, abilities.wildcards) = (true, true);
    abilities
}

/// Finds the bucket, or creates it, and checks its settings.
pub(crate) async fn ensure(wire: &Wire, options: &Options) -> Result<(Info, Settings), EngineError> {
    let info = match wire.info().await {
        Err(ApiError::Refused { code: ApiError::STREAM_NOT_FOUND, .. }) => create(wire, options).await?,
        info => info?,
    };
    let settings = settings(wire, &info.config).map_err(|what| {
        let message = format!("the bucket '{}' cannot be used: {what}", options.bucket());
        EngineError::Refused { status: 503, message }
    })?;
    if settings.purge == Purge::Never {
        warn!(
            bucket = options.bucket(),
            "markers of deletes stay for ever: the bucket denies it, or NATS is older than 2.10"
        );
    }
    Ok((info, settings))
}

/// Refuses servers of two systems: those whose bucket was created at another time than that of the one that answered. With
/// `is_other`, this one is not the bucket that was followed before.
pub(crate) async fn check_others(
    wire: &Wire,
    options: &Options,
    info: &Info,
    is_other: bool,
) -> Result<(), EngineError> {
    let refused = |message| Err(EngineError::Refused { status: 503, message });
    let others = options.servers().iter().filter(|server| **server != wire.server);
    let asked = others.map(async |server| {
        let other = timeout(CONNECT_LIMIT, Wire::connect_to(options, server)).await.ok()?.ok()?;
        Some((other.server.clone(), other.info().await.ok()?.created()))
    });
    for other in join_all(asked).await {
        match other {
            Some((server, created)) if created != info.created() => {
                let (here, there) = (info.created(), &wire.server);
                return refused(format!(
                    "{there} and {server} are of two systems: their buckets were created at {here} and {created} ns"
                ));
            }
            Some(_) => {}
            // A server that is no member of a cluster does not stand in for another.
            None if is_other && wire.client.server_info().cluster.is_none() => {
                let server = &wire.server;
                return refused(format!(
                    "the bucket at {server} is not the one that was followed, and others do not answer"
                ));
            }
            None => {}
        }
    }
    Ok(())
}

async fn create(wire: &Wire, options: &Options) -> Result<Info, EngineError> {
    let bucket = options.bucket();
    if !options.create {
        let message = format!("the bucket '{bucket}' does not exist, and is not to be created");
        return Err(EngineError::Refused { status: 503, message });
    }
    let mut config = json!({
        "name": wire.stream,
        "subjects": [format!("{}>", wire.prefix)],
        "max_msgs_per_subject": 1,
        "discard": "new",
        "retention": "limits",
        "storage": "file",
        "num_replicas": options.replicas,
        "max_msgs": -1,
        "max_bytes": -1,
        "max_msg_size": -1,
        "max_consumers": -1,
        "allow_rollup_hdrs": true,
        // See `Purge`.
        "deny_delete": wire.client.is_server_compatible(2, 10, 0),
        "allow_direct": true,
    });
    if let Some(config) = config.as_object_mut() {
        if wire.client.is_server_compatible(2, 11, 0) {
            let age = u64::try_from(options.marker_age.as_nanos()).unwrap_or(u64::MAX).max(1_000_000_000);
            config.insert("allow_msg_ttl".to_owned(), json!(true));
            config.insert("subject_delete_marker_ttl".to_owned(), json!(age));
        }
        if wire.client.is_server_compatible(2, 12, 0) {
            config.insert("allow_atomic".to_owned(), json!(true));
        }
    }
    match wire.api::<Info>(&format!("STREAM.CREATE.{}", wire.stream), &config).await {
        Ok(created) => {
            info!(bucket, "the bucket did not exist and was created");
            Ok(created)
        }
        // Another node was faster.
        Err(ApiError::Refused { code: ApiError::STREAM_NAME_EXIST, .. }) => Ok(wire.info().await?),
        Err(ApiError::Refused { description, .. }) => {
            let message = format!("the bucket '{bucket}' could not be created: {description}");
            Err(EngineError::Refused { status: 503, message })
        }
        Err(error) => Err(error.into()),
    }
}

/// What a stream with these settings can do, or which of them breaks a promise.
pub(crate) fn settings(wire: &Wire, config: &Config) -> Result<Settings, String> {
    let info = wire.client.server_info();
    let is_since = |minor| wire.client.is_server_compatible(2, minor, 0);
    check(config, &wire.prefix)?;
    let mut abilities = abilities();
    // A server that is older takes the headers and ignores them. Without a marker the end of a value is not notified.
    abilities.ttl = is_since(11) && config.allow_msg_ttl && config.subject_delete_marker_ttl > 0;
    abilities.batches = is_since(12) && config.allow_atomic;
    let message_len_max = usize::try_from(config.max_msg_size).ok().filter(|len| *len > 0).unwrap_or(usize::MAX);
    Ok(Settings {
        abilities,
        value_len_max: info.max_payload.min(message_len_max).saturating_sub(HEADERS_LEN_MAX),
        has_no_history: config.max_msgs_per_subject == 1,
        purge: match () {
            () if config.max_msgs_per_subject == 1 && !config.deny_delete => Purge::BySequence,
            // Before 2.9.15 a purge moves consumers past messages of other subjects (nats-server#3838).
            () if !config.deny_purge && is_since(10) => Purge::BySubject,
            () => Purge::Never,
        },
    })
}

/// Which setting breaks a promise, and which one.
fn check(config: &Config, prefix: &str) -> Result<(), String> {
    let has_limit = config.max_bytes > 0 || config.max_msgs > 0;
    let breaks = [
        (config.mirror.is_some(), "mirror: a mirror takes no writes"),
        (config.subjects != [format!("{prefix}>")], "subjects: they are not those of a key-value bucket"),
        (config.subject_transform.is_some(), "subject_transform: a key would not be kept under its name"),
        (config.sealed, "sealed: it takes no writes"),
        (config.no_ack, "no_ack: writes would not be acknowledged"),
        (config.retention != "limits", "retention: what was read would be removed"),
        (config.max_age != 0, "max_age: values would vanish without a notification"),
        (has_limit && config.discard != "new", "discard old with a limit: a full bucket would drop values"),
        (config.max_msgs_per_subject < 1, "max_msgs_per_subject: without one, writes grow the bucket for ever"),
        (config.discard_new_per_subject, "discard_new_per_subject: a key could not be written twice"),
        (config.allow_msg_counter, "allow_msg_counter: values would be counters"),
        (
            config.persist_mode.as_deref().is_some_and(|mode| mode != "default"),
            "persist_mode: writes would be acknowledged before they are kept",
        ),
    ];
    match breaks.into_iter().find(|(is_so, _)| *is_so) {
        Some((_, what)) => Err(what.to_owned()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain() -> Config {
        Config {
            subjects: vec!["$KV.b.>".to_owned()],
            retention: "limits".to_owned(),
            discard: "new".to_owned(),
            max_msgs: -1,
            max_bytes: -1,
            max_msgs_per_subject: 1,
            max_msg_size: -1,
            ..Config::default()
        }
    }

    #[test]
    fn a_plain_bucket_is_fine_and_what_breaks_a_promise_is_named() {
        assert_eq!(check(&plain(), "$KV.b."), Ok(()));
        assert_eq!(check(&Config { max_bytes: 9, ..plain() }, "$KV.b."), Ok(()), "a limit with discard new");
        assert_eq!(check(&Config { discard: "old".to_owned(), ..plain() }, "$KV.b."), Ok(()), "old without a limit");
        let old = || "old".to_owned();
        for (config, name) in [
            (Config { max_age: 1, ..plain() }, "max_age"),
            (Config { max_bytes: 9, discard: old(), ..plain() }, "discard old"),
            (Config { max_msgs: 9, discard: old(), ..plain() }, "discard old"),
            (Config { max_msgs_per_subject: -1, ..plain() }, "max_msgs_per_subject"),
            (Config { retention: "workqueue".to_owned(), ..plain() }, "retention"),
            (Config { subjects: vec!["x.>".to_owned()], ..plain() }, "subjects"),
            (Config { persist_mode: Some("async".to_owned()), ..plain() }, "persist_mode"),
        ] {
            let refusal = check(&config, "$KV.b.").unwrap_err();
            assert!(refusal.starts_with(name), "{refusal}");
        }
    }
}
