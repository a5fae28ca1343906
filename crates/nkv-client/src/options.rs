//! How a client is to behave.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use nkv_types::{Address, Error, ErrorKind, Result};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};

use crate::client::{Client, Handle};
use crate::link::{Link, LinkOptions};
use crate::task::{Pace, Shared, Task};
use crate::types::ConnectionState;

/// At most this number of requests wait for the connection's task; more wait with their callers.
const WAITING_MAX: usize = 1_024;
/// Shortest pause to begin with: a pause of nothing would never grow.
const BACKOFF_MIN: Duration = Duration::from_millis(1);
/// Longest heartbeat and backoff: sums of them never overflow.
const INTERVAL_MAX: Duration = Duration::from_secs(365 * 86_400);

/// Makes a [`Client`].
///
/// # Examples
///
/// ```no_run
/// use std::time::Duration;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> nkv_client::Result<()> {
/// // Begins before the server does; requests wait for the connection for as long as they may take.
/// let client = nkv_client::Client::builder("db1:4222")
///     .token("secret")
///     .request_timeout(Duration::from_secs(1))
///     .backoff(Duration::from_millis(100), Duration::from_secs(2))
///     .start()?;
/// # drop(client);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[must_use]
pub struct ClientBuilder {
    addr: String,
    client_uuid: Option<String>,
    name: Option<String>,
    token: Option<String>,
    wait_for_server: Duration,
    request_timeout: Duration,
    connect_timeout: Duration,
    message_len_max: usize,
    subscription_len_max: usize,
    pace: Pace,
}

impl ClientBuilder {
    pub(crate) fn new(addr: &str) -> Self {
        ClientBuilder {
            addr: addr.to_owned(),
            client_uuid: None,
            name: None,
            token: None,
            wait_for_server: Duration::ZERO,
            request_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(5),
            message_len_max: 80 << 20,
            subscription_len_max: 1 << 30,
            pace: Pace {
                heartbeat: Duration::from_secs(15),
                backoff_min: Duration::from_millis(50),
                backoff_max: Duration::from_secs(5),
            },
        }
    }

    /// Identifies the client across connections, at most 1,024 bytes. Random if not given; two clients that have the same
    /// take each other's subscriptions away.
    pub fn client_uuid(mut self, uuid: impl Into<String>) -> Self {
        self.client_uuid = Some(uuid.into());
        self
    }

    /// A name for people, which the server shows in its list of clients: at most 256 bytes, without control
    /// characters. It identifies nothing, and any number of clients may share it.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// For how long [`connect`](Self::connect) tries again while no server answers. Not at all if not given: it fails at
    /// once where no server listens.
    pub fn wait_for_server(mut self, patience: Duration) -> Self {
        self.wait_for_server = patience.min(INTERVAL_MAX);
        self
    }

    /// The credential to show to the server.
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.token = Some(token.into());
        self
    }

    /// How long a request may take, waiting for a connection included. 5 s if not given.
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.request_timeout = timeout;
        self
    }

    /// How long an attempt to connect may take, the greeting included. 5 s if not given.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// After this time without a sign of life the server is asked for one, and after twice that the connection counts
    /// as lost. 15 s if not given.
    ///
    /// Bytes that the server takes of a long request are a sign of life. A server that keeps requests waiting gives one every
    /// few seconds, and does not count as lost before the time that it states has passed without any (30 s by
    /// default). Of an older server, which gives none, the
    /// request whose answer is due decides: while its caller still waits, nothing counts as lost.
    ///
    /// On a WebSocket (`ws://`) a ping is sent at each interval, and a server of which no byte came, and which took none that
    /// waited, for two of them counts as lost, whatever is due. Parts of a long message are such bytes.
    pub fn heartbeat(mut self, interval: Duration) -> Self {
        self.pace.heartbeat = interval.clamp(Duration::from_millis(1), INTERVAL_MAX);
        self
    }

    /// How long to wait before connecting again: a random part of a span that doubles from `min`, 1 ms at least, to
    /// `max`. 50 ms and 5 s if not given.
    pub fn backoff(mut self, min: Duration, max: Duration) -> Self {
        self.pace.backoff_min = min.clamp(BACKOFF_MIN, INTERVAL_MAX);
        self.pace.backoff_max = max.clamp(self.pace.backoff_min, INTERVAL_MAX);
        self
    }

    /// Longest message taken from the server, in bytes; a longer one ends the connection. 80 MiB if not given: an
    /// answer holds 64 MiB of keys and values at most. The answer to the greeting is at most 64 KiB anyway.
    pub fn message_len_max(mut self, len_max: usize) -> Self {
        self.message_len_max = len_max;
        self
    }

    /// How many bytes may be kept for a subscription: the keys that it was notified of, and its backlog, with 200
    /// for each besides its own. One that would need more ends with
    /// [`EndReason::TooMuch`](crate::EndReason::TooMuch). 1 GiB if not given.
    pub fn subscription_len_max(mut self, len_max: usize) -> Self {
        self.subscription_len_max = len_max;
        self
    }

    /// Connects.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidAddress`]; [`ErrorKind::CannotConnect`] when no nkv server answers, once
    /// [`wait_for_server`](Self::wait_for_server) is over.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the connection.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// # async fn example() -> nkv_client::Result<()> {
    /// let builder = nkv_client::Client::builder("127.0.0.1:4222").wait_for_server(Duration::from_secs(30));
    /// let client = builder.connect().await?; // the server is there
    /// client.put("lamp.kitchen", "on").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn connect(self) -> Result<Client> {
        let options = self.link_options()?;
        let deadline = Instant::now() + self.wait_for_server;
        let mut failures = 0;
        loop {
            let error = match Link::open(&options).await {
                Ok(link) => return Ok(self.begin(options, Some(link))),
                Err(error) => error,
            };
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return Err(error);
            }
            sleep(self.pace.pause(failures).min(rest)).await;
            failures += 1;
        }
    }

    /// Begins without waiting for a server: requests wait for the connection within their own limits, and subscriptions are
    /// accepted once it is there.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidAddress`].
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example() -> nkv_client::Result<()> {
    /// let client = nkv_client::Client::builder("127.0.0.1:4222").start()?; // the server may be there or not
    /// client.put("lamp.kitchen", "on").await?; // waits for it
    /// # Ok(())
    /// # }
    /// ```
    pub fn start(self) -> Result<Client> {
        let options = self.link_options()?;
        Ok(self.begin(options, None))
    }

    fn link_options(&self) -> Result<LinkOptions> {
        let addr = self.addr.parse::<Address>()?;
        if cfg!(not(feature = "ws")) && matches!(addr, Address::Ws { .. }) {
            let what = format!("address '{addr}': this client was built without the cargo feature 'ws' of nkv-client");
            return Err(Error::new(ErrorKind::InvalidAddress, what));
        }
        Ok(LinkOptions {
            addr,
            client_uuid: self.client_uuid.clone().map_or_else(random_name, Ok)?,
            name: self.name.clone(),
            token: self.token.clone(),
            seen: None,
            connect_timeout: self.connect_timeout,
            heartbeat: self.pace.heartbeat,
            message_len_max: self.message_len_max,
        })
    }

    fn begin(self, options: LinkOptions, link: Option<Link>) -> Client {
        let (asks, asks_rx) = mpsc::channel(WAITING_MAX);
        let (control, control_rx) = mpsc::unbounded_channel();
        let begin = if link.is_some() { ConnectionState::Connected } else { ConnectionState::Reconnecting };
        let (state_tx, state) = watch::channel(begin);
        let shared = Arc::new(Shared::new(link.as_ref().map_or(u64::MAX, |link| link.value_len_max)));
        let client_uuid = options.client_uuid.clone();
        let task = Task::new((options, self.pace), asks_rx, control_rx, state_tx, Arc::clone(&shared));
        tokio::spawn(task.run(link));
        let handle = Handle::new(asks, control, state, shared, client_uuid);
        Client::new(handle, self.request_timeout, self.subscription_len_max)
    }
}

impl fmt::Debug for ClientBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the token.
        f.debug_struct("ClientBuilder").field("addr", &self.addr).finish_non_exhaustive()
    }
}

fn random_name() -> Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|error| Error::new(ErrorKind::CannotConnect, "no randomness for the client's name").because(error))?;
    Ok(format!("{:032x}", u128::from_ne_bytes(bytes)))
}

#[cfg(all(test, not(feature = "ws")))]
mod tests {
    use super::*;

    #[test]
    fn without_the_feature_an_address_of_a_websocket_names_it() {
        let error = ClientBuilder::new("ws://127.0.0.1:8080").link_options().unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::InvalidAddress);
        assert!(error.to_string().contains("feature 'ws'"), "{error}");
    }
}
