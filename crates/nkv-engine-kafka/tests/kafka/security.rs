//! Connections that are encrypted, with a certificate and a user.

use nkv_engine_kafka::{ErrorKind, KafkaEngine, Options, Result};

use crate::support::{ready, shared, value};

#[tokio::test(flavor = "multi_thread")]
async fn a_node_proves_who_it_is_by_certificate_and_password() {
    let Some(shared) = shared() else { return };
    let (broker, topic) = (&shared.broker, shared.topic());
    let path = |name: &str| broker.path(name);
    let options = || Options::new([format!("127.0.0.1:{}", broker.secure)], &topic).unwrap();
    let mutual = |trusted: &str, own: &str| -> Result<Options> {
        let (chain, key) = (format!("{own}.pem"), format!("{own}.key"));
        options().with_ca_file(path(trusted))?.with_certificate_files(path(&chain), path(&key))
    };
    let good = || mutual("broker.pem", "client").unwrap();
    for mechanism in ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] {
        let own = good().with_user("nkv", "secret").with_properties(&format!("sasl.mechanism={mechanism}")).unwrap();
        let (_node, nkv) = ready(KafkaEngine::new(own)).await;
        nkv.put("a", mechanism).await.unwrap();
        assert_eq!(value(&nkv, "a").await.as_deref(), Some(mechanism));
    }
    let both = path("client.both");
    let (both, trusted) = (both.display(), path("broker.pem"));
    let properties = format!(
        "security.protocol=SASL_SSL\nsasl.mechanism=SCRAM-SHA-512\nsasl.username=nkv\nsasl.password=secret\n\
         ssl.truststore.type=PEM\nssl.truststore.location={}\nssl.keystore.type=PEM\nssl.keystore.location={both}\n",
        trusted.display()
    );
    KafkaEngine::new(options().with_properties(&properties).unwrap()).check().await.unwrap();
    // A broker, a user or a node that is not the right one.
    for (wrong, says) in [
        (good().with_user("nkv", "wrong"), "SaslAuthenticationFailed"),
        (good().with_user("other", "secret"), "SaslAuthenticationFailed"),
        (mutual("stranger.pem", "client").unwrap().with_user("nkv", "secret"), "TLS"),
        (mutual("broker.pem", "stranger").unwrap().with_user("nkv", "secret"), ""),
        (options().with_ca_file(path("broker.pem")).unwrap().with_user("nkv", "secret"), ""),
        (options(), ""),
    ] {
        let error = KafkaEngine::new(wrong).check().await.unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
        assert!(says.is_empty() || error.kind() == ErrorKind::Refused, "{error}");
    }
    assert!(options().with_ca_file(path("broker.key")).is_err() && options().with_ca_file(path("nothing")).is_err());
}
