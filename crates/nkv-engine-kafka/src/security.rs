//! How a connection is encrypted, and how it says who it is.

use std::fmt;
use std::path::Path;
#[cfg(feature = "tls")]
use std::sync::{Arc, OnceLock};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use kafka_protocol::ResponseError;
use kafka_protocol::messages::{SaslAuthenticateRequest, SaslHandshakeRequest};
use kafka_protocol::protocol::StrBytes;
use sha2::{Digest, Sha256, Sha512};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
#[cfg(feature = "tls")]
use tokio_rustls::rustls::ClientConfig;

use crate::error::{Error, Result};
use crate::wire::{Connection, check};

/// Fewest and most rounds of hashing that a broker may ask for.
const ROUNDS_MIN: u32 = 4_096;
const ROUNDS_MAX: u32 = 100_000;

/// What the bytes of a connection go through.
pub(crate) type Stream = Box<dyn Duplex>;

pub(crate) trait Duplex: AsyncRead + AsyncWrite + Send + Sync + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Duplex for T {}

/// How connections are made safe.
#[derive(Clone, Default)]
pub(crate) struct Security {
    pub(crate) is_encrypted: bool,
    pub(crate) mechanism: Mechanism,
    pub(crate) user: Option<(String, String)>,
    /// Certificates in PEM: whom to trust, if not whom the system trusts.
    pub(crate) trusted: Option<Vec<u8>>,
    /// A chain and a key in PEM.
    pub(crate) identity: Option<(Vec<u8>, Vec<u8>)>,
    /// What the certificates come to, worked out once for all connections; [`check`](Self::check) begins anew.
    #[cfg(feature = "tls")]
    tls: Arc<OnceLock<Arc<ClientConfig>>>,
}

/// How a user proves to be one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Mechanism {
    Plain,
    Sha256,
    #[default]
    Sha512,
}

impl Mechanism {
    pub(crate) fn parse(name: &str) -> Result<Self> {
        match name {
            "PLAIN" => Ok(Mechanism::Plain),
            "SCRAM-SHA-256" => Ok(Mechanism::Sha256),
            "SCRAM-SHA-512" => Ok(Mechanism::Sha512),
            _ => Err(Error::refused(format!(
                "sasl.mechanism={name} is not known here; PLAIN, SCRAM-SHA-256 and SCRAM-SHA-512 are"
            ))),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Mechanism::Plain => "PLAIN",
            Mechanism::Sha256 => "SCRAM-SHA-256",
            Mechanism::Sha512 => "SCRAM-SHA-512",
        }
    }
}

impl Security {
    pub(crate) async fn secure(&self, stream: TcpStream, address: &str) -> Result<Stream> {
        match self.is_encrypted {
            true => self.encrypt(stream, address).await,
            false => Ok(Box::new(stream)),
        }
    }

    #[cfg(feature = "tls")]
    async fn encrypt(&self, stream: TcpStream, address: &str) -> Result<Stream> {
        use tokio_rustls::TlsConnector;
        use tokio_rustls::rustls::pki_types::ServerName;

        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name =
            ServerName::try_from(host).map_err(|error| Error::refused(format!("the name of the broker: {error}")))?;
        let connector = TlsConnector::from(self.tls()?);
        match connector.connect(name, stream).await {
            Ok(stream) => Ok(Box::new(stream)),
            // A certificate that is not good is not better later.
            Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                Err(Error::refused(format!("TLS: {error}")))
            }
            Err(error) => Err(Error::io("TLS", &error)),
        }
    }

    #[cfg(feature = "tls")]
    fn tls(&self) -> Result<Arc<ClientConfig>> {
        if let Some(known) = self.tls.get() {
            return Ok(Arc::clone(known));
        }
        let config = Arc::new(self.client_config()?);
        Ok(Arc::clone(self.tls.get_or_init(|| config)))
    }

    #[cfg(feature = "tls")]
    fn client_config(&self) -> Result<ClientConfig> {
        use tokio_rustls::rustls::pki_types::pem::PemObject;
        use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
        use tokio_rustls::rustls::{RootCertStore, crypto};

        let bad = |what: &str, error: &dyn fmt::Display| Error::refused(format!("{what}: {error}"));
        let certificates = |pem: &[u8], what: &str| -> Result<Vec<CertificateDer<'static>>> {
            let all = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
            match all.map_err(|error| bad(what, &error))? {
                none if none.is_empty() => Err(bad(what, &"there is no certificate in it")),
                all => Ok(all),
            }
        };
        let mut roots = RootCertStore::empty();
        match &self.trusted {
            Some(pem) => {
                for one in certificates(pem, "the trusted certificates")? {
                    roots.add(one).map_err(|error| bad("the trusted certificates", &error))?;
                }
            }
            None => {
                let found = rustls_native_certs::load_native_certs();
                let (good, _) = roots.add_parsable_certificates(found.certs);
                if good == 0 {
                    let why = found.errors.first().map_or_else(String::new, |error| format!(" ({error})"));
                    let message = format!("this system trusts no certificates{why}; name those of Kafka");
                    return Err(Error::refused(message));
                }
            }
        }
        let builder = ClientConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| bad("TLS", &error))?
            .with_root_certificates(roots);
        match &self.identity {
            None => Ok(builder.with_no_client_auth()),
            Some((chain, key)) => {
                let chain = certificates(chain, "the certificate")?;
                let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| bad("the key", &error))?;
                builder.with_client_auth_cert(chain, key).map_err(|error| bad("the certificate and its key", &error))
            }
        }
    }

    #[cfg(not(feature = "tls"))]
    async fn encrypt(&self, _stream: TcpStream, _address: &str) -> Result<Stream> {
        Err(without_tls())
    }

    /// Whether what was said can be used at all: to be asked whenever certificates were set.
    pub(crate) fn check(&mut self) -> Result<()> {
        #[cfg(feature = "tls")]
        {
            self.tls = Arc::default();
            if self.is_encrypted {
                self.tls()?;
            }
        }
        #[cfg(not(feature = "tls"))]
        if self.is_encrypted {
            return Err(without_tls());
        }
        if !self.is_encrypted && (self.trusted.is_some() || self.identity.is_some()) {
            return Err(Error::refused("certificates are named, and security.protocol is one without TLS"));
        }
        Ok(())
    }

    pub(crate) async fn authenticate(&self, connection: &mut Connection) -> Result<()> {
        let Some((user, password)) = &self.user else { return Ok(()) };
        let mechanism = StrBytes::from_static_str(self.mechanism.name());
        let answer = connection.call(&SaslHandshakeRequest::default().with_mechanism(mechanism)).await?;
        if answer.error_code == ResponseError::UnsupportedSaslMechanism.code() {
            let offered: Vec<&str> = answer.mechanisms.iter().map(|name| &**name).collect();
            let message = format!(
                "the broker does not know sasl.mechanism={}, but {}",
                self.mechanism.name(),
                offered.join(", ")
            );
            return Err(Error::refused(message));
        }
        check(answer.error_code, "begin to authenticate")?;
        match self.mechanism {
            Mechanism::Plain => {
                let proof = format!("\0{user}\0{password}");
                exchange(connection, proof.into_bytes()).await.map(drop)
            }
            Mechanism::Sha256 => scram::<Sha256Scram>(connection, user, password).await,
            Mechanism::Sha512 => scram::<Sha512Scram>(connection, user, password).await,
        }
    }
}

impl fmt::Debug for Security {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let user = self.user.as_ref().map(|(user, _)| user);
        f.debug_struct("Security")
            .field("is_encrypted", &self.is_encrypted)
            .field("user", &user)
            .finish_non_exhaustive()
    }
}

#[cfg(not(feature = "tls"))]
fn without_tls() -> Error {
    Error::refused("TLS is wanted, and this program was built without the feature `tls` of nkv-engine-kafka")
}

/// Reads a file that a setting names.
pub(crate) fn read(what: &str, path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|error| Error::refused(format!("{what} '{}': {error}", path.display())))
}

async fn exchange(connection: &mut Connection, bytes: Vec<u8>) -> Result<Bytes> {
    let request = SaslAuthenticateRequest::default().with_auth_bytes(bytes.into());
    let answer = connection.call(&request).await?;
    match ResponseError::try_from_code(answer.error_code) {
        None => Ok(answer.auth_bytes),
        Some(_) => {
            let reason = answer.error_message.as_deref().unwrap_or("no reason given");
            check(answer.error_code, &format!("authenticate ({reason})")).map(|()| Bytes::new())
        }
    }
}

/// One of the hashes that SCRAM is made of.
trait Scram: 'static {
    /// The HMAC with this key of what it is given.
    fn keyed(key: &[u8]) -> impl Fn(&[&[u8]]) -> Vec<u8>;

    fn hmac(key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
        Self::keyed(key)(parts)
    }

    fn hash(bytes: &[u8]) -> Vec<u8>;
}

struct Sha256Scram;
struct Sha512Scram;

macro_rules! scram_with {
    ($name:ident, $hash:ident) => {
        impl Scram for $name {
            fn keyed(key: &[u8]) -> impl Fn(&[&[u8]]) -> Vec<u8> {
                let keyed = Hmac::<$hash>::new_from_slice(key);
                move |parts| {
                    // A key of any length is one.
                    let Ok(mut mac) = keyed.clone() else { return Vec::new() };
                    parts.iter().for_each(|part| mac.update(part));
                    mac.finalize().into_bytes().to_vec()
                }
            }

            fn hash(bytes: &[u8]) -> Vec<u8> {
                $hash::digest(bytes).to_vec()
            }
        }
    };
}

scram_with!(Sha256Scram, Sha256);
scram_with!(Sha512Scram, Sha512);

/// Proves to know the password, and has the broker prove that it does (RFC 5802).
async fn scram<S: Scram>(connection: &mut Connection, user: &str, password: &str) -> Result<()> {
    let mut random = [0; 24];
    getrandom::fill(&mut random).map_err(|error| Error::unavailable(format!("randomness: {error}")))?;
    let dialogue = Dialogue::begin(user, &BASE64.encode(random));
    let challenge = exchange(connection, dialogue.first().into_bytes()).await?;
    let (password, challenge) = (password.to_owned(), text(&challenge)?);
    // As many rounds as the broker says, which has proven nothing yet: not on a thread that serves clients.
    let answer = tokio::task::spawn_blocking(move || dialogue.answer::<S>(&password, &challenge)).await;
    let (last, expected) = answer.map_err(|error| Error::unavailable(format!("authenticate: {error}")))??;
    let verdict = exchange(connection, last.into_bytes()).await?;
    match text(&verdict)?.split(',').find_map(|part| part.strip_prefix("v=")) {
        Some(theirs) if theirs == expected => Ok(()),
        _ => Err(Error::refused("the broker does not know the password that it asked for")),
    }
}

fn text(bytes: &[u8]) -> Result<String> {
    String::from_utf8(bytes.to_vec()).map_err(|_| not_understood())
}

fn not_understood() -> Error {
    Error::refused("the broker's part of authentication is not understood")
}

/// What both sides have said.
struct Dialogue {
    nonce: String,
    first: String,
}

impl Dialogue {
    fn begin(user: &str, nonce: &str) -> Self {
        let user = user.replace('=', "=3D").replace(',', "=2C");
        Dialogue { nonce: nonce.to_owned(), first: format!("n={user},r={nonce}") }
    }

    fn first(&self) -> String {
        format!("n,,{}", self.first)
    }

    /// The proof, and what the broker's own proof has to be.
    fn answer<S: Scram>(&self, password: &str, challenge: &str) -> Result<(String, String)> {
        let part =
            |name: &str| challenge.split(',').find_map(|part| part.strip_prefix(name)).ok_or_else(not_understood);
        let (nonce, salt, rounds) = (part("r=")?, part("s=")?, part("i=")?);
        let salt = BASE64.decode(salt).map_err(|_| not_understood())?;
        let rounds: u32 = rounds.parse().map_err(|_| not_understood())?;
        if !nonce.starts_with(&self.nonce)
            || nonce.len() == self.nonce.len()
            || !(ROUNDS_MIN..=ROUNDS_MAX).contains(&rounds)
        {
            return Err(not_understood());
        }
        let salted = salted::<S>(password.as_bytes(), &salt, rounds);
        let bare = format!("c=biws,r={nonce}");
        let said = format!("{},{challenge},{bare}", self.first);
        let client = S::hmac(&salted, &[b"Client Key"]);
        let signature = S::hmac(&S::hash(&client), &[said.as_bytes()]);
        let proof: Vec<u8> = client.iter().zip(&signature).map(|(a, b)| a ^ b).collect();
        let server = S::hmac(&S::hmac(&salted, &[b"Server Key"]), &[said.as_bytes()]);
        Ok((format!("{bare},p={}", BASE64.encode(proof)), BASE64.encode(server)))
    }
}

/// The password, hashed again and again: what RFC 5802 calls Hi.
fn salted<S: Scram>(password: &[u8], salt: &[u8], rounds: u32) -> Vec<u8> {
    let hmac = S::keyed(password);
    let mut last = hmac(&[salt, &1_u32.to_be_bytes()]);
    let mut all = last.clone();
    for _ in 1..rounds {
        last = hmac(&[&last]);
        all.iter_mut().zip(&last).for_each(|(all, last)| *all ^= last);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    // The example of RFC 7677.
    #[test]
    fn the_published_dialogue_is_spoken() {
        let dialogue = Dialogue::begin("user", "rOprNGfwEbeRWgbNEkqO");
        assert_eq!(dialogue.first(), "n,,n=user,r=rOprNGfwEbeRWgbNEkqO");
        let challenge = "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
        let (last, expected) = dialogue.answer::<Sha256Scram>("pencil", challenge).unwrap();
        let proof = "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
                     p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";
        assert_eq!((last.as_str(), expected.as_str()), (proof, "6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="));
    }

    #[test]
    fn a_challenge_that_is_weak_or_of_another_dialogue_is_refused() {
        let dialogue = Dialogue::begin("a=b,c", "mine");
        assert_eq!(dialogue.first(), "n,,n=a=3Db=2Cc,r=mine");
        for bad in [
            "",
            "r=mine,s=AAAA,i=4096",
            "r=other,s=AAAA,i=4096",
            "r=mine1,s=AAAA,i=4095",
            "r=mine1,s=!,i=4096",
            "r=mine1,s=AAAA,i=100001",
            "r=mine1,s=AAAA,i=99999999",
            "r=mine1,s=AAAA",
        ] {
            assert!(dialogue.answer::<Sha512Scram>("p", bad).is_err(), "{bad}");
        }
        for good in ["r=mine1,s=AAAA,i=4096", "r=mine1,s=AAAA,i=100000"] {
            assert!(dialogue.answer::<Sha512Scram>("p", good).is_ok(), "{good}");
        }
    }

    #[cfg(feature = "tls")]
    #[test]
    fn certificates_are_worked_out_once_until_others_are_named() {
        let one = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
        let (chain, key) = (one.cert.pem().into_bytes(), one.signing_key.serialize_pem().into_bytes());
        let mut security = Security { is_encrypted: true, trusted: Some(chain.clone()), ..Security::default() };
        security.check().unwrap();
        let first = security.tls().unwrap();
        assert!(Arc::ptr_eq(&first, &security.clone().tls().unwrap()), "they are worked out again");
        security.identity = Some((chain, key));
        security.check().unwrap();
        assert!(!Arc::ptr_eq(&first, &security.tls().unwrap()), "the new ones are not used");
    }
}
