//! A connection to NATS, and the requests that are made over it.

use std::fmt::Display;
use std::time::Duration;

use async_nats::client::{Request, RequestErrorKind};
use async_nats::{Client, ConnectErrorKind, ConnectOptions, HeaderMap};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use nkv_core::Reason;
use nkv_node::EngineError;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::time::{sleep, timeout};

use crate::options::Options;

/// Without a sign of life for this long a server is away.
pub(crate) const LIFE: Duration = Duration::from_millis(1_800);
/// A write, or what takes its time, is given up after this long, also if the server gives signs of life.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);
/// Each further server of a list is tried this much later: one that stands still delays the others by no more.
const STAGGER: Duration = Duration::from_millis(250);
/// All of them together have this long.
pub(crate) const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// The commands that the client takes before they are sent. One that had to wait for room could be overtaken by a later one, so this
/// is far above the writes that a node has in flight.
const COMMANDS_MAX: usize = 1 << 20;
/// No server listens here, and that is known at once.
const NOWHERE: &str = "nats://127.0.0.1:0";

/// A connection for the life of one `follow`. It is never made again by itself: what waits for it in the client would then be
/// sent later.
#[derive(Clone, Debug)]
pub(crate) struct Wire {
    pub(crate) client: Client,
    /// Its URL.
    pub(crate) server: String,
    /// `KV_` and the name of the bucket.
    pub(crate) stream: String,
    /// `$KV.`, the name of the bucket and a dot.
    pub(crate) prefix: String,
}

/// Why a request of JetStream's API brought nothing.
#[derive(Debug)]
pub(crate) enum ApiError {
    /// No answer, or none that can be read.
    Away(String),
    /// JetStream refused.
    Refused { code: u64, description: String },
}

impl ApiError {
    pub(crate) const STREAM_NOT_FOUND: u64 = 10_059;
    pub(crate) const STREAM_NAME_EXIST: u64 = 10_058;
    const NO_MESSAGE: u64 = 10_037;
}

impl From<ApiError> for EngineError {
    /// Of a request that changes nothing.
    fn from(error: ApiError) -> Self {
        EngineError::Unavailable(match error {
            ApiError::Away(message) => message,
            ApiError::Refused { description, .. } => format!("JetStream refused a request: {description}"),
        })
    }
}

/// What a server answers in JSON.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Answer<T> {
    Failed { error: Failed },
    Ok(T),
}

/// An error of JetStream.
#[derive(Debug, Deserialize)]
pub(crate) struct Failed {
    #[serde(default)]
    pub(crate) err_code: u64,
    #[serde(default)]
    pub(crate) description: String,
}

/// What a stream is and has; only what matters here.
#[derive(Debug, Deserialize)]
pub(crate) struct Info {
    pub(crate) config: Config,
    #[serde(with = "time::serde::rfc3339")]
    created: OffsetDateTime,
    pub(crate) state: State,
}

impl Info {
    /// When the stream was created, in nanoseconds: its identity.
    pub(crate) fn created(&self) -> u64 {
        u64::try_from(self.created.unix_timestamp_nanos()).unwrap_or_default()
    }
}

/// How a stream is set.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default)]
pub(crate) struct Config {
    pub(crate) subjects: Vec<String>,
    pub(crate) retention: String,
    pub(crate) discard: String,
    pub(crate) discard_new_per_subject: bool,
    pub(crate) max_msgs: i64,
    pub(crate) max_bytes: i64,
    pub(crate) max_age: i64,
    pub(crate) max_msgs_per_subject: i64,
    pub(crate) max_msg_size: i64,
    pub(crate) no_ack: bool,
    pub(crate) sealed: bool,
    pub(crate) deny_delete: bool,
    pub(crate) deny_purge: bool,
    pub(crate) mirror: Option<serde_json::Value>,
    pub(crate) subject_transform: Option<serde_json::Value>,
    pub(crate) allow_msg_ttl: bool,
    pub(crate) subject_delete_marker_ttl: i64,
    pub(crate) allow_atomic: bool,
    pub(crate) allow_msg_counter: bool,
    pub(crate) persist_mode: Option<String>,
}

/// What a stream has.
#[derive(Debug, Deserialize)]
pub(crate) struct State {
    pub(crate) last_seq: u64,
    #[serde(default)]
    pub(crate) num_subjects: u64,
    #[serde(default)]
    subjects: std::collections::HashMap<String, u64>,
}

/// A message as it is kept.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) subject: String,
    pub(crate) sequence: u64,
    pub(crate) time_ns: i128,
    pub(crate) marker: Option<Reason>,
    pub(crate) value: Vec<u8>,
}

impl Wire {
    /// Connects to the first server that answers.
    pub(crate) async fn connect(options: &Options) -> Result<Self, EngineError> {
        let mut attempts: FuturesUnordered<_> = (0_u32..)
            .zip(options.servers())
            .map(async |(number, server)| {
                sleep(STAGGER.saturating_mul(number)).await;
                Self::connect_to(options, server).await
            })
            .collect();
        let mut last = EngineError::Unavailable("no server answers".to_owned());
        let first = async {
            while let Some(attempt) = attempts.next().await {
                match attempt {
                    Ok(wire) => return Ok(wire),
                    Err(error) => last = error,
                }
            }
            Err(last)
        };
        let unavailable = |_| EngineError::Unavailable(format!("no server answers within {CONNECT_LIMIT:?}"));
        timeout(CONNECT_LIMIT, first).await.map_err(unavailable)?
    }

    /// Connects to this one.
    pub(crate) async fn connect_to(options: &Options, server: &str) -> Result<Self, EngineError> {
        let client = connect_options(options).await?.connect(server).await.map_err(|error| {
            let message = format!("{server}: {error}");
            match error.kind() {
                ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
                    EngineError::Refused { status: 503, message }
                }
                _ => EngineError::Unavailable(message),
            }
        })?;
        // With nowhere to connect to again, the client ends at the first loss.
        let unavailable = |error| EngineError::Unavailable(format!("{server}: {error}"));
        client.set_server_pool(NOWHERE).await.map_err(unavailable)?;
        let (server, bucket) = (server.to_owned(), options.bucket());
        Ok(Wire { client, server, stream: format!("KV_{bucket}"), prefix: format!("$KV.{bucket}.") })
    }

    /// A small request that is answered in JSON.
    pub(crate) async fn api<T: DeserializeOwned>(&self, verb: &str, body: &impl Serialize) -> Result<T, ApiError> {
        self.api_within(LIFE, verb, body).await
    }

    async fn api_within<T: DeserializeOwned>(
        &self,
        limit: Duration,
        verb: &str,
        body: &impl Serialize,
    ) -> Result<T, ApiError> {
        let away = |error: &dyn Display| ApiError::Away(format!("{verb}: {error}"));
        let payload = serde_json::to_vec(body).map_err(|error| away(&error))?;
        let request = Request::new().payload(payload.into()).timeout(Some(limit));
        let answer =
            self.client.send_request(format!("$JS.API.{verb}"), request).await.map_err(|error| away(&error))?;
        match serde_json::from_slice(&answer.payload).map_err(|error| away(&error))? {
            Answer::Ok(answer) => Ok(answer),
            Answer::Failed { error: Failed { err_code: code, description } } => {
                Err(ApiError::Refused { code, description })
            }
        }
    }

    /// What the stream is and has by now, as its leader says.
    pub(crate) async fn info(&self) -> Result<Info, ApiError> {
        self.api(&format!("STREAM.INFO.{}", self.stream), &serde_json::json!({})).await
    }

    /// All names of the bucket that a subject selects.
    pub(crate) async fn names(&self, filter: &str) -> Result<Vec<String>, ApiError> {
        let mut names = Vec::new();
        loop {
            let body = serde_json::json!({ "subjects_filter": filter, "offset": names.len() });
            let verb = format!("STREAM.INFO.{}", self.stream);
            let info: Info = self.api_within(REQUEST_LIMIT, &verb, &body).await?;
            if info.state.subjects.is_empty() {
                return Ok(names);
            }
            names.extend(info.state.subjects.into_keys());
        }
    }

    /// The last message of a subject, as the leader of the stream has it.
    pub(crate) async fn last_of(&self, subject: &str) -> Result<Option<Kept>, ApiError> {
        self.kept(&serde_json::json!({ "last_by_subj": subject })).await
    }

    /// The message with a sequence.
    pub(crate) async fn at(&self, sequence: u64) -> Result<Option<Kept>, ApiError> {
        self.kept(&serde_json::json!({ "seq": sequence })).await
    }

    async fn kept(&self, which: &serde_json::Value) -> Result<Option<Kept>, ApiError> {
        #[derive(Deserialize)]
        struct Got {
            message: Raw,
        }
        #[derive(Deserialize)]
        struct Raw {
            subject: String,
            seq: u64,
            #[serde(default)]
            data: String,
            #[serde(default)]
            hdrs: String,
            #[serde(with = "time::serde::rfc3339")]
            time: OffsetDateTime,
        }
        let Raw { subject, seq, data, hdrs, time } =
            match self.api::<Got>(&format!("STREAM.MSG.GET.{}", self.stream), which).await {
                Ok(got) => got.message,
                Err(ApiError::Refused { code: ApiError::NO_MESSAGE, .. }) => return Ok(None),
                Err(error) => return Err(error),
            };
        let decoded = |text: &str| STANDARD.decode(text).map_err(|error| ApiError::Away(error.to_string()));
        let headers = decoded(&hdrs)?;
        let headers = String::from_utf8_lossy(&headers);
        let header = |name: &str| {
            let mut fields = headers.lines().filter_map(|line| line.split_once(':'));
            fields.find(|(field, _)| *field == name).map(|(_, text)| text.trim())
        };
        Ok(Some(Kept {
            subject,
            sequence: seq,
            time_ns: time.unix_timestamp_nanos(),
            marker: marker(header),
            value: decoded(&data)?,
        }))
    }
}

/// What a message means that is no value: why its key is gone.
pub(crate) fn marker<'a>(header: impl Fn(&str) -> Option<&'a str>) -> Option<Reason> {
    match (header("Nats-Marker-Reason"), header("KV-Operation")) {
        (Some("MaxAge"), _) => Some(Reason::Expired),
        (Some(_), _) | (None, Some("DEL" | "PURGE")) => Some(Reason::Deleted),
        _ => None,
    }
}

/// A header of a message.
pub(crate) fn header<'a>(headers: Option<&'a HeaderMap>, name: &str) -> Option<&'a str> {
    headers?.get(name).map(async_nats::HeaderValue::as_str)
}

async fn connect_options(options: &Options) -> Result<ConnectOptions, EngineError> {
    let unreadable = |path: &std::path::Path, error: &dyn Display| EngineError::Refused {
        status: 503,
        message: format!("'{}' cannot be used: {error}", path.display()),
    };
    let mut connect = ConnectOptions::new()
        .name("nkv")
        .max_reconnects(1)
        .ignore_discovered_servers()
        .require_tls(options.is_tls)
        .client_capacity(COMMANDS_MAX)
        .connection_timeout(LIFE);
    if let Some(ca) = &options.ca {
        connect = connect.add_root_certificates(ca.clone());
    }
    if let Some((certificate, key)) = &options.identity {
        connect = connect.add_client_certificate(certificate.clone(), key.clone());
    }
    if let Some((user, file)) = &options.user {
        let password = tokio::fs::read_to_string(file).await.map_err(|error| unreadable(file, &error))?;
        connect = connect.user_and_password(user.clone(), password.trim_end_matches(['\r', '\n']).to_owned());
    }
    if let Some(file) = &options.credentials {
        connect = connect.credentials_file(file).await.map_err(|error| unreadable(file, &error))?;
    }
    Ok(connect)
}

/// The text of an answer to a publish.
#[derive(Debug, Deserialize)]
pub(crate) struct PubAck {
    #[serde(default)]
    pub(crate) seq: u64,
    #[serde(default)]
    pub(crate) count: u64,
    #[serde(default)]
    pub(crate) error: Option<Failed>,
}

/// Why a publish was not done.
#[derive(Debug)]
pub(crate) enum NotDone {
    /// The last message of the subject is another one than expected; nothing was changed.
    Conflict,
    Failed(EngineError),
}

impl Wire {
    /// Publishes a message, and returns what the stream says of it.
    pub(crate) async fn publish(
        &self,
        subject: String,
        headers: Option<HeaderMap>,
        value: Bytes,
    ) -> Result<PubAck, NotDone> {
        let mut request = Request::new().payload(value).timeout(Some(REQUEST_LIMIT));
        if let Some(headers) = headers {
            request = request.headers(headers);
        }
        let answer = self.client.send_request(subject, request).await.map_err(|error| {
            let message = error.to_string();
            NotDone::Failed(match error.kind() {
                RequestErrorKind::NoResponders => EngineError::Unavailable("no stream takes the write".to_owned()),
                RequestErrorKind::MaxPayloadExceeded => EngineError::Refused { status: 413, message },
                RequestErrorKind::InvalidSubject => EngineError::Refused { status: 400, message },
                _ => EngineError::OutcomeUnknown(message),
            })
        })?;
        let unknown = |error: serde_json::Error| NotDone::Failed(EngineError::OutcomeUnknown(error.to_string()));
        let ack: PubAck = serde_json::from_slice(&answer.payload).map_err(unknown)?;
        match ack.error {
            Some(error) => Err(not_done(error)),
            None if ack.seq == 0 => {
                Err(NotDone::Failed(EngineError::OutcomeUnknown("the answer has no sequence".to_owned())))
            }
            None => Ok(ack),
        }
    }
}

/// What an error of JetStream says about a write: it was not done.
fn not_done(Failed { err_code, description }: Failed) -> NotDone {
    let status = match err_code {
        10_071 | 10_164 => return NotDone::Conflict,
        // No room: of the stream, of the account, of the server.
        10_077 | 10_047 | 10_028 | 10_023 | 10_002 => 507,
        // Longer than a message or a batch may be.
        10_054 | 10_199 => 413,
        // Not with this stream.
        10_166 | 10_174 => 501,
        _ => 503,
    };
    let message = format!("NATS refused the write: {description} ({err_code})");
    NotDone::Failed(EngineError::Refused { status, message })
}
