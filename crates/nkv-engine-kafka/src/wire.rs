//! One connection to one broker: requests out, answers in, in order.
//!
//! Nothing is repeated or kept for later here. A broker that lets nothing be heard for [`AWAY`] while it owes an answer is away.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use kafka_protocol::error::ResponseError;
use kafka_protocol::messages::api_versions_response::ApiVersionsResponse;
use kafka_protocol::messages::{ApiKey, ApiVersionsRequest, RequestHeader, ResponseHeader};
use kafka_protocol::protocol::{Decodable, Encodable, HeaderVersion, Request, StrBytes};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::error::{Error, Result};
use crate::security::{Security, Stream};

/// How long a broker may be silent while it owes an answer, and how long any step of a connection may take.
pub(crate) const AWAY: Duration = Duration::from_secs(2);

/// Longest answer that is read: several times the longest batch that a broker can be set up for in practice.
const FRAME_LEN_MAX: usize = 256 << 20;

/// How much is read from the socket at once, at least.
const READ_LEN: usize = 64 << 10;

/// Which versions of which requests are spoken: of those that both sides know, the highest. The lowest of each is there since
/// Kafka 3.1.
const SPOKEN: [(ApiKey, i16, i16); 12] = [
    (ApiKey::Produce, 9, 13),
    (ApiKey::Fetch, 13, 16),
    (ApiKey::ListOffsets, 7, 7),
    (ApiKey::Metadata, 12, 12),
    (ApiKey::CreateTopics, 7, 7),
    (ApiKey::DescribeConfigs, 4, 4),
    (ApiKey::FindCoordinator, 4, 4),
    (ApiKey::JoinGroup, 7, 7),
    (ApiKey::SyncGroup, 5, 5),
    (ApiKey::Heartbeat, 4, 4),
    (ApiKey::LeaveGroup, 4, 4),
    (ApiKey::SaslAuthenticate, 2, 2),
];

/// The version that all brokers answer.
const API_VERSIONS: i16 = 3;

/// A connection to a broker, of which its versions are known and which knows who this is.
pub(crate) struct Connection {
    stream: Stream,
    address: String,
    input: BytesMut,
    versions: HashMap<i16, i16>,
    next_id: i32,
    /// How long it may be silent while it owes an answer.
    silence_max: Duration,
}

impl Connection {
    /// Connects, says who this is, and finds out what the broker speaks.
    pub(crate) async fn open(address: &str, security: &Security) -> Result<Self> {
        let opened = timeout(AWAY, TcpStream::connect(address)).await;
        let stream = opened.map_err(|_| silent(address))?.map_err(|error| Error::io("connect", &error).at(address))?;
        stream.set_nodelay(true).map_err(|error| Error::io("set up the connection", &error).at(address))?;
        let secured = timeout(AWAY, security.secure(stream, address)).await;
        let stream = secured.map_err(|_| silent(address))?.map_err(|error| error.at(address))?;
        let address = address.to_owned();
        let (input, versions) = (BytesMut::new(), HashMap::new());
        let mut connection = Connection { stream, address, input, versions, next_id: 0, silence_max: AWAY };
        connection.agree().await?;
        security.authenticate(&mut connection).await?;
        Ok(connection)
    }

    async fn agree(&mut self) -> Result<()> {
        self.versions.insert(ApiKey::ApiVersions as i16, API_VERSIONS);
        let request = ApiVersionsRequest::default()
            .with_client_software_name(StrBytes::from_static_str("nkv"))
            .with_client_software_version(StrBytes::from_static_str(env!("CARGO_PKG_VERSION")));
        let answer: ApiVersionsResponse = self.call(&request).await?;
        check(answer.error_code, "ask for the versions").map_err(|error| error.at(&self.address))?;
        for (key, min, max) in SPOKEN {
            let theirs = answer.api_keys.iter().find(|theirs| theirs.api_key == key as i16);
            let highest = theirs.map(|theirs| (theirs.max_version.min(max), theirs.min_version.max(min)));
            // What a broker without SASL does not have is not asked of it.
            if let Some((highest, _)) = highest.filter(|(highest, lowest)| highest >= lowest) {
                self.versions.insert(key as i16, highest);
            }
        }
        // There is one version of it that all speak.
        self.versions.insert(ApiKey::SaslHandshake as i16, 1);
        Ok(())
    }

    /// The version that a request is sent in.
    pub(crate) fn version(&self, key: i16) -> Result<i16> {
        self.versions.get(&key).copied().ok_or_else(|| {
            let name = ApiKey::try_from(key).map_or_else(|()| key.to_string(), |key| format!("{key:?}"));
            Error::refused(format!("{}: the broker does not speak {name} as Kafka 3.1 does", self.address))
        })
    }

    /// Sends a request, and waits for its answer; nothing else may be under way.
    pub(crate) async fn call<R: Request>(&mut self, request: &R) -> Result<R::Response> {
        let version = self.version(R::KEY)?;
        let id = self.send(request).await?;
        let frame = self.receive(true).await?;
        self.answer::<R>(frame, id, version)
    }

    /// Sends a request, and gives the number that its answer will have.
    pub(crate) async fn send<R: Request>(&mut self, request: &R) -> Result<i32> {
        let (version, id) = (self.version(R::KEY)?, self.next_id);
        self.next_id = self.next_id.wrapping_add(1);
        let header = RequestHeader::default()
            .with_request_api_key(R::KEY)
            .with_request_api_version(version)
            .with_correlation_id(id)
            .with_client_id(Some(StrBytes::from_static_str("nkv")));
        let mut out = BytesMut::new();
        out.put_u32(0);
        header
            .encode(&mut out, R::header_version(version))
            .and_then(|()| request.encode(&mut out, version))
            .map_err(|error| Error::refused(format!("encode a request: {error}")))?;
        let len = u32::try_from(out.len().saturating_sub(4)).unwrap_or(u32::MAX);
        out.get_mut(..4).into_iter().for_each(|head| head.copy_from_slice(&len.to_be_bytes()));
        let written = timeout(AWAY, async {
            self.stream.write_all(&out).await?;
            self.stream.flush().await
        });
        let written = written.await.map_err(|_| silent(&self.address))?;
        written.map_err(|error| Error::io("send", &error).at(&self.address))?;
        Ok(id)
    }

    /// Waits for the next answer, whole but undecoded; for as long as bytes come, if one is owed.
    ///
    /// # Cancel safety
    ///
    /// What was read is kept.
    pub(crate) async fn receive(&mut self, is_owed: bool) -> Result<Bytes> {
        loop {
            if let Some(head) = self.input.first_chunk::<4>() {
                let len = usize::try_from(u32::from_be_bytes(*head)).unwrap_or(usize::MAX);
                if len > FRAME_LEN_MAX {
                    return Err(Error::refused(format!("{}: an answer of {len} bytes is too long", self.address)));
                }
                if self.input.len() >= len.saturating_add(4) {
                    self.input.advance(4);
                    return Ok(self.input.split_to(len).freeze());
                }
                self.input.reserve((len + 4).saturating_sub(self.input.len()).max(READ_LEN));
            } else {
                self.input.reserve(READ_LEN);
            }
            // Bytes that move are life, however long the answer is.
            let read = self.stream.read_buf(&mut self.input);
            let read = match is_owed {
                true => timeout(self.silence_max, read).await.map_err(|_| silent(&self.address))?,
                false => read.await,
            };
            match read {
                Ok(0) => return Err(Error::unavailable(format!("{}: the connection has ended", self.address))),
                Ok(_) => {}
                Err(error) => return Err(Error::io("receive", &error).at(&self.address)),
            }
        }
    }

    /// Decodes an answer to the request with this number.
    pub(crate) fn answer<R: Request>(&self, mut frame: Bytes, id: i32, version: i16) -> Result<R::Response> {
        let broken = |what: String| Error::unavailable(format!("{}: {what}", self.address));
        let header = ResponseHeader::decode(&mut frame, R::Response::header_version(version))
            .map_err(|error| broken(format!("the head of an answer: {error}")))?;
        if header.correlation_id != id {
            return Err(broken(format!("an answer to {} came for {id}", header.correlation_id)));
        }
        R::Response::decode(&mut frame, version).map_err(|error| broken(format!("an answer: {error}")))
    }

    /// Waits longer for answers that take their time.
    pub(crate) fn be_patient(&mut self, silence_max: Duration) {
        self.silence_max = silence_max;
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("address", &self.address).finish_non_exhaustive()
    }
}

/// An address of a broker, as it says it of itself.
pub(crate) fn address(host: &str, port: i32) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

fn silent(address: &str) -> Error {
    Error::unavailable(format!("{address}: no sign of life"))
}

/// What an error code of an answer means for what is not a write.
pub(crate) fn check(code: i16, doing: &str) -> Result<()> {
    let Some(error) = ResponseError::try_from_code(code) else { return Ok(()) };
    let message = format!("{doing}: {error:?} ({code})");
    use ResponseError::{
        ClusterAuthorizationFailed, GroupAuthorizationFailed, InvalidConfig, InvalidReplicationFactor,
        InvalidTopicException, PolicyViolation, SaslAuthenticationFailed, TopicAuthorizationFailed, UnsupportedVersion,
    };
    match error {
        ClusterAuthorizationFailed
        | GroupAuthorizationFailed
        | InvalidConfig
        | InvalidReplicationFactor
        | InvalidTopicException
        | PolicyViolation
        | SaslAuthenticationFailed
        | TopicAuthorizationFailed
        | UnsupportedVersion => Err(Error::refused(message)),
        _ => Err(Error::unavailable(message)),
    }
}
