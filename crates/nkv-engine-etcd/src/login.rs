//! What each request carries: the token of nkv's user, and that a member without a leader is to say so.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nkv_node::EngineError;
use tokio::time::{Instant, timeout};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::transport::Channel;
use tonic::{Request, Status};

use crate::fault;
use crate::rpc::AuthenticateRequest;
use crate::rpc::auth_client::AuthClient;

/// A refused login is tried again after this time.
const PAUSE: Duration = Duration::from_secs(1);
const LIMIT: Duration = Duration::from_millis(1_500);

type Token = MetadataValue<Ascii>;

/// Clones share the token.
#[derive(Clone, Debug)]
pub(crate) struct Login {
    user: Option<(String, PathBuf)>,
    token: Arc<Mutex<Option<Token>>>,
    /// When the last one was refused, and by which words. Held during a login, so that many who want one share it.
    refused: Arc<tokio::sync::Mutex<Option<(Instant, EngineError)>>>,
}

impl Login {
    pub(crate) fn new(user: Option<(String, PathBuf)>) -> Self {
        Login { user, token: Arc::default(), refused: Arc::default() }
    }

    pub(crate) fn token(&self) -> Option<Token> {
        self.token.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Logs in, unless that was done since `before` was the token. Without a user that is nothing.
    pub(crate) async fn renew(&self, channel: &Channel, before: Option<Token>) -> Result<(), EngineError> {
        let Some((user, file)) = &self.user else { return Ok(()) };
        let mut refused = self.refused.lock().await;
        if self.token() != before {
            return Ok(());
        }
        if let Some((at, error)) = &*refused
            && at.elapsed() < PAUSE
        {
            return Err(error.clone());
        }
        let done = authenticate(channel, user, file).await;
        *refused = done.as_ref().err().map(|error| (Instant::now(), error.clone()));
        *self.token.lock().unwrap_or_else(PoisonError::into_inner) = Some(done?);
        Ok(())
    }
}

async fn authenticate(channel: &Channel, user: &str, file: &Path) -> Result<Token, EngineError> {
    let refused = |message: String| EngineError::Refused { status: 503, message };
    let read = tokio::fs::read_to_string(file).await;
    let text = read.map_err(|error| refused(format!("the password file {}: {error}", file.display())))?;
    let password = text.lines().next().unwrap_or_default().to_owned();
    let mut client = AuthClient::new(channel.clone());
    let asked = client.authenticate(AuthenticateRequest { name: user.to_owned(), password });
    let answer = timeout(LIMIT, asked).await.map_err(|_| EngineError::Unavailable("a login took too long".into()))?;
    let token = answer.map_err(|status| fault::of_request(&status))?.into_inner().token;
    token.parse().map_err(|_| refused("the token of the login is no header".into()))
}

impl Interceptor for Login {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
        if let Some(token) = self.token() {
            request.metadata_mut().insert("token", token);
        }
        Ok(request)
    }
}
