//! Live configuration: a struct that a running service always has the newest of.
//!
//! ```text
//! cargo run -p nkv-examples --example watch_config
//! ```
//!
//! The configuration is one key with JSON for its value, so that no reader sees half of a change. `watch_as` holds
//! the newest one, read into the struct; a value that cannot be read is an error beside the last good one, and the service
//! goes on with that.

use std::error::Error;
use std::time::Duration;

use nkv_client::{Client, ErrorKind, PutOptions, Revision, Watch};
use nkv_server::Server;
use serde::{Deserialize, Serialize};

const KEY: &str = "config.thumbnailer";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Config {
    workers: u32,
    quality: u8,
    /// Added later: old configurations do not have it.
    #[serde(default)]
    formats: Vec<String>,
}

/// Something that runs for months and must not be restarted to be configured.
struct Service {
    config: Config,
    watched: Watch<Config>,
}

impl Service {
    async fn start(client: &Client) -> Result<Self, Box<dyn Error>> {
        let mut service = Service {
            config: Config { workers: 1, quality: 80, formats: vec![] },
            watched: client.watch_as(KEY).await?,
        };
        service.take_newest();
        Ok(service)
    }

    /// Waits for a change and takes it.
    async fn reconfigured(&mut self) -> Result<(), Box<dyn Error>> {
        tokio::time::timeout(Duration::from_secs(10), self.watched.changed()).await??;
        self.take_newest();
        Ok(())
    }

    fn take_newest(&mut self) {
        let seen = self.watched.borrow_and_update().clone();
        match (seen.error, seen.value) {
            (Some(error), _) => println!("  {error}: it stays as it is"),
            (None, Some(config)) => self.config = config,
            (None, None) => println!("  there is no configuration: it stays as it is"),
        }
        println!("  running with {:?}", self.config);
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let server = Server::builder().listen("127.0.0.1:0".parse()?).bind().await?;
    let addr = server.addresses()[0].to_string();

    let mut service = Service::start(&Client::connect(&addr).await?).await?;
    assert_eq!(service.config.workers, 1);

    println!("an operator writes a configuration");
    let operator = Client::connect(&addr).await?;
    let mut config = Config { workers: 4, quality: 90, formats: vec!["webp".into()] };
    let revision = operator.put_as(KEY, &config).await?;
    service.reconfigured().await?;
    assert_eq!(service.config, config);

    println!("one with fewer fields, from another program");
    operator.put(KEY, r#"{"workers": 2, "quality": 70}"#).await?;
    service.reconfigured().await?;
    assert_eq!(service.config, Config { workers: 2, quality: 70, formats: vec![] });

    println!("a typo");
    operator.put(KEY, r#"{"workers": "many"}"#).await?;
    service.reconfigured().await?;
    assert_eq!(service.config.workers, 2);

    println!("two operators at once: the one who has not seen the newest is refused");
    config.workers = 8;
    let stale = PutOptions::default().with_if_revision(revision);
    let refused = operator.put_as_with(KEY, &config, stale).await.expect_err("others have written since");
    println!("  {refused:#}");
    let &ErrorKind::Conflict { revision: newest } = refused.kind() else { return Err(refused.into()) };
    assert!(newest > Revision::ZERO && newest > revision);
    let fresh = PutOptions::default().with_if_revision(newest);
    operator.put_as_with(KEY, &config, fresh).await?;
    service.reconfigured().await?;
    assert_eq!(service.config, config);

    println!("the configuration is deleted");
    operator.delete(KEY).await?;
    service.reconfigured().await?;
    assert_eq!(service.config, config);

    drop((service, operator));
    Ok(server.shutdown().await?)
}
