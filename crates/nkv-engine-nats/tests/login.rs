//! Who may use the bucket, and over what.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use nkeys::KeyPair;
use nkv_engine_nats::{NatsEngine, Options};
use nkv_node::EngineError;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa};
use serde_json::{Value, json};
use support::{Server, node};
use tempfile::TempDir;

async fn works(options: Options) {
    let (_node, nkv) = node(NatsEngine::new(options)).await;
    nkv.put("a", "1").await.unwrap();
    assert_eq!(nkv.get("a").await.unwrap().unwrap().value, "1");
}

async fn refusal(options: Options) -> String {
    match NatsEngine::new(options).check().await {
        Err(error @ (EngineError::Refused { .. } | EngineError::Unavailable(_))) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_logs_in_with_the_password_of_a_file() {
    for is_old in [false, true] {
        let Some(server) = Server::start_with(is_old, "authorization { user: nkv, password: geheim }").await else {
            continue;
        };
        let file = server.dir.path().join("password");
        fs::write(&file, "geheim\n").unwrap();
        works(server.options().with_user("nkv", &file)).await;
        assert!(refusal(server.options()).await.to_lowercase().contains("auth"));
        fs::write(&file, "falsch").unwrap();
        let message = refusal(server.options().with_user("nkv", &file)).await;
        assert!(message.to_lowercase().contains("auth") && !message.contains("falsch"), "{message}");
        let missing = server.dir.path().join("missing");
        assert!(refusal(server.options().with_user("nkv", &missing)).await.contains("missing"));
    }
}

/// A token of NATS: claims with a signature.
fn token(claims: &mut Value, issuer: &KeyPair, subject: &KeyPair) -> String {
    claims["iss"] = json!(issuer.public_key());
    claims["sub"] = json!(subject.public_key());
    claims["iat"] = json!(1_700_000_000);
    claims["jti"] = json!("ID");
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let text = format!("{}.{}", part(&json!({ "typ": "JWT", "alg": "ed25519-nkey" })), part(claims));
    let signature = issuer.sign(text.as_bytes()).unwrap();
    format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_creds_file_logs_in() {
    let (operator, account, user) = (KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_user());
    let of_operator =
        token(&mut json!({ "name": "O", "nats": { "type": "operator", "version": 2 } }), &operator, &operator);
    let limits = json!({
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1, "leaf": -1,
        "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1,
    });
    let claims = &mut json!({ "name": "A", "nats": { "type": "account", "version": 2, "limits": limits } });
    let of_account = token(claims, &operator, &account);
    let system = KeyPair::new_account();
    let claims = &mut json!({ "name": "SYS", "nats": { "type": "account", "version": 2, "limits": { "conn": -1, "subs": -1 } } });
    let of_system = token(claims, &operator, &system);
    let claims =
        json!({ "name": "U", "nats": { "type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1 } });
    let of_user = token(&mut claims.clone(), &account, &user);
    let (account, system) = (account.public_key(), system.public_key());
    let config = format!(
        "operator: {of_operator}\nsystem_account: {system}\nresolver: MEMORY\n\
         resolver_preload {{ {account}: {of_account}, {system}: {of_system} }}\n"
    );
    let Some(server) = Server::start_with(false, &config).await else { return };
    let creds = |name: &str, user: &KeyPair| {
        let file = server.dir.path().join(name);
        let seed = user.seed().unwrap();
        let text = format!(
            "-----BEGIN NATS USER JWT-----\n{of_user}\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        );
        fs::write(&file, text).unwrap();
        file
    };
    works(server.options().with_credentials(creds("good.creds", &user))).await;
    // The right token, signed by one who has another key.
    assert!(
        refusal(server.options().with_credentials(creds("bad.creds", &KeyPair::new_user()))).await.contains("auth")
    );
}

struct Certificates {
    dir: TempDir,
}

impl Certificates {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let key = || rcgen::KeyPair::generate().unwrap();
        for name in ["ca", "other"] {
            let mut params = CertificateParams::new(Vec::new()).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let ca = CertifiedIssuer::self_signed(params, key()).unwrap();
            fs::write(dir.path().join(format!("{name}.pem")), ca.pem()).unwrap();
            let uses = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            for (one, usage) in ["server", "client"].into_iter().zip(uses) {
                let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
                params.extended_key_usages = vec![usage];
                let own = key();
                let certificate = params.signed_by(&own, &ca).unwrap();
                fs::write(dir.path().join(format!("{name}.{one}.pem")), certificate.pem()).unwrap();
                fs::write(dir.path().join(format!("{name}.{one}.key")), own.serialize_pem()).unwrap();
            }
        }
        Certificates { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

fn tls(dir: &Path, verify: bool) -> String {
    let path = |name: &str| dir.join(name).display().to_string();
    format!(
        "tls {{ cert_file: {:?}, key_file: {:?}, ca_file: {:?}, verify: {verify} }}",
        path("ca.server.pem"),
        path("ca.server.key"),
        path("ca.pem")
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_trusts_the_given_authority_alone_and_shows_a_certificate() {
    let certificates = Certificates::new();
    for is_old in [false, true] {
        let Some(server) = Server::start_with(is_old, &tls(certificates.dir.path(), false)).await else { continue };
        works(server.options().with_ca(certificates.path("ca.pem"))).await;
        assert!(!refusal(server.options().with_ca(certificates.path("other.pem"))).await.is_empty());
        let Some(server) = Server::start_with(is_old, &tls(certificates.dir.path(), true)).await else { continue };
        let options = || server.options().with_ca(certificates.path("ca.pem"));
        works(options().with_identity(certificates.path("ca.client.pem"), certificates.path("ca.client.key"))).await;
        let other =
            options().with_identity(certificates.path("other.client.pem"), certificates.path("other.client.key"));
        assert!(!refusal(other).await.is_empty());
        assert!(!refusal(options()).await.is_empty());
    }
    // One that has no TLS is not used without it.
    let Some(plain) = Server::start().await else { return };
    assert!(!refusal(plain.options().with_ca(certificates.path("ca.pem"))).await.is_empty());
}
