//! `--engine URL`: the truth lies in etcd, NATS or Kafka, and this server is one of many in front of it; and `import`, which
//! moves a data directory there.

use std::path::PathBuf;

use nkv_node::{Chain, Engine, EngineError};
use nkv_server::{Builder, Handle, ServerError};
use tracing::{info, warn};

use crate::usage;

/// The engine, and how to reach it.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct EngineArgs {
    /// What decides and keeps all writes, shared by many servers: etcd://HOST:PORT,…/PREFIX, nats://HOST:PORT,…/BUCKET
    /// or kafka://HOST:PORT,…/TOPIC; there is no data directory then
    #[arg(long, value_name = "URL", env = "NKV_ENGINE")]
    pub(crate) engine: Option<String>,

    /// Make a bucket or topic that is missing
    #[arg(long, value_name = "BOOL", env = "NKV_ENGINE_CREATE", default_value_t = true, action = clap::ArgAction::Set,
          value_parser = crate::args::parse_flag)]
    engine_create: bool,

    /// Certificates of the authorities that the engine's certificate may come from, as PEM; the engine is reached by TLS then
    #[arg(long, value_name = "FILE", env = "NKV_ENGINE_CA")]
    engine_ca: Option<PathBuf>,

    /// The certificate that the engine is shown, as PEM
    #[arg(long, value_name = "FILE", env = "NKV_ENGINE_CERT", requires = "engine_key")]
    engine_cert: Option<PathBuf>,

    /// The key of that certificate, as PEM
    #[arg(long, value_name = "FILE", env = "NKV_ENGINE_KEY", requires = "engine_cert")]
    engine_key: Option<PathBuf>,

    /// The name to log in with
    #[arg(long, value_name = "NAME", env = "NKV_ENGINE_USER", requires = "engine_password_file")]
    engine_user: Option<String>,

    /// A file with the password, and perhaps a newline
    #[arg(long, value_name = "FILE", env = "NKV_ENGINE_PASSWORD_FILE", requires = "engine_user")]
    engine_password_file: Option<PathBuf>,

    /// A file of credentials of NATS (.creds)
    #[arg(long, value_name = "FILE", env = "NKV_ENGINE_CREDS")]
    engine_creds: Option<PathBuf>,

    /// A file of properties of Kafka, one KEY=VALUE a line
    #[arg(long, value_name = "FILE", env = "NKV_ENGINE_CONFIG")]
    engine_config: Option<PathBuf>,

    /// The topic of the first kv-store's log, which is read, and written with each put, beside the topic of the state
    #[arg(long, value_name = "TOPIC", env = "NKV_KAFKA_LOG", requires = "engine")]
    pub(crate) kafka_log: Option<String>,
}

/// What goes on beside the node.
pub(crate) type Beside = Box<dyn FnOnce(Handle) + Send>;

/// The engine that was asked for.
pub(crate) struct Chosen {
    follow: Box<dyn FnOnce(Builder) -> Builder>,
    beside: Option<Beside>,
}

impl Chosen {
    fn new(engine: impl Engine) -> Self {
        Chosen { follow: Box::new(move |builder| builder.node(|node| node.engine(engine))), beside: None }
    }

    /// Has the node follow it.
    pub(crate) fn followed_by(self, builder: Builder) -> (Builder, Option<Beside>) {
        ((self.follow)(builder), self.beside)
    }
}

fn wrong(error: &dyn std::error::Error) -> ServerError {
    usage(format!("--engine: {}", Chain(error)))
}

/// The options of an engine whose options have these methods, as the flags say.
#[cfg(any(feature = "etcd", feature = "nats"))]
macro_rules! as_flags_say {
    ($flags:expr, $options:expr, $value_len_max:expr) => {{
        let mut options = $options.map_err(|error| wrong(&error))?;
        options = options.with_create($flags.engine_create).with_value_len_max($value_len_max);
        if let Some(file) = &$flags.engine_ca {
            options = options.with_ca(file);
        }
        if let (Some(cert), Some(key)) = (&$flags.engine_cert, &$flags.engine_key) {
            options = options.with_identity(cert, key);
        }
        if let (Some(user), Some(file)) = (&$flags.engine_user, &$flags.engine_password_file) {
            options = options.with_user(user, file);
        }
        options
    }};
}

impl EngineArgs {
    /// Reads what the flags say, and looks whether the engine can be had. One that is away is waited for by the node; one whose
    /// settings break a promise is refused now. A value longer than `value_len_max`, which others wrote, is not shown.
    pub(crate) async fn choose(&self, url: &str, value_len_max: usize) -> Result<Chosen, ServerError> {
        let scheme = url.split_once("://").map(|(scheme, _)| scheme);
        for (given, flag, of) in [
            (self.engine_creds.is_some(), "--engine-creds", "nats"),
            (self.engine_config.is_some(), "--engine-config", "kafka"),
            (self.kafka_log.is_some(), "--kafka-log", "kafka"),
        ] {
            if given && scheme != Some(of) {
                return Err(usage(format!("{flag} is for {of}:// alone")));
            }
        }
        match scheme {
            #[cfg(feature = "etcd")]
            Some("etcd") => self.etcd(url, value_len_max).await,
            #[cfg(feature = "nats")]
            Some("nats") => self.nats(url, value_len_max).await,
            #[cfg(feature = "kafka")]
            Some("kafka") => self.kafka(url, value_len_max).await,
            #[allow(unreachable_patterns, reason = "in a build with all of them")]
            Some(scheme @ ("etcd" | "nats" | "kafka")) => {
                Err(usage(format!("this build has no engine {scheme}: build it with --features {scheme}")))
            }
            _ => Err(usage("--engine is etcd://HOST:PORT/PREFIX, nats://HOST:PORT/BUCKET or kafka://HOST:PORT/TOPIC")),
        }
    }

    #[cfg(feature = "etcd")]
    async fn etcd(&self, url: &str, value_len_max: usize) -> Result<Chosen, ServerError> {
        let options = as_flags_say!(self, nkv_engine_etcd::Options::from_url(url), value_len_max);
        let engine = nkv_engine_etcd::EtcdEngine::new(options);
        looked_at(engine.check().await)?;
        Ok(Chosen::new(engine))
    }

    #[cfg(feature = "nats")]
    async fn nats(&self, url: &str, value_len_max: usize) -> Result<Chosen, ServerError> {
        let mut options = as_flags_say!(self, nkv_engine_nats::Options::from_url(url), value_len_max);
        if let Some(file) = &self.engine_creds {
            options = options.with_credentials(file);
        }
        let engine = nkv_engine_nats::NatsEngine::new(options);
        looked_at(engine.check().await)?;
        Ok(Chosen::new(engine))
    }

    #[cfg(feature = "kafka")]
    async fn kafka(&self, url: &str, value_len_max: usize) -> Result<Chosen, ServerError> {
        let read = |file: &std::path::Path| {
            std::fs::read_to_string(file).map_err(|error| usage(format!("--engine: {}: {error}", file.display())))
        };
        let mut options = nkv_engine_kafka::Options::from_url(url).map_err(|error| wrong(&error))?;
        options = options.with_create(self.engine_create).with_value_len_max(value_len_max);
        if let Some(file) = &self.engine_config {
            options = options.with_properties(&read(file)?).map_err(|error| wrong(&error))?;
        }
        if let Some(file) = &self.engine_ca {
            options = options.with_ca_file(file).map_err(|error| wrong(&error))?;
        }
        if let (Some(cert), Some(key)) = (&self.engine_cert, &self.engine_key) {
            options = options.with_certificate_files(cert, key).map_err(|error| wrong(&error))?;
        }
        if let (Some(user), Some(file)) = (&self.engine_user, &self.engine_password_file) {
            options = options.with_user(user, read(file)?.trim_end_matches(['\r', '\n']));
        }
        let log = self.kafka_log.as_deref().map(|topic| nkv_engine_kafka::KafkaLog::new(&options, topic)).transpose();
        let log = log.map_err(|error| wrong(&error))?;
        let engine = nkv_engine_kafka::KafkaEngine::new(options);
        looked_at(engine.check().await.map_err(EngineError::from))?;
        if let Some(log) = &log {
            looked_at(log.check().await.map_err(EngineError::from))?;
        }
        let beside = |log: nkv_engine_kafka::KafkaLog| -> Beside {
            Box::new(move |nkv| drop(tokio::spawn(async move { log.run(nkv).await })))
        };
        Ok(Chosen { beside: log.map(beside), ..Chosen::new(engine) })
    }
}

fn looked_at(checked: Result<(), EngineError>) -> Result<(), ServerError> {
    match checked {
        Ok(()) => info!("the engine is in reach"),
        Err(error @ EngineError::Refused { .. }) => return Err(wrong(&error)),
        Err(error) => warn!("{error}; clients get 503 until it is there"),
    }
    Ok(())
}
