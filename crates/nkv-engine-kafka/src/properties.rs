//! Properties as Kafka's own clients have them: those that say how connections are made safe. nkv sets every other property
//! itself, and refuses it here.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::{Error, Result};
use crate::security::{Mechanism, Security, read};

/// The settings of a text in the form of a properties file.
pub(crate) fn parse(text: &str) -> Result<BTreeMap<String, String>> {
    let (mut settings, mut begun) = (BTreeMap::new(), String::new());
    for line in text.lines() {
        let line = line.trim_start();
        if begun.is_empty() && (line.is_empty() || line.starts_with(['#', '!'])) {
            continue;
        }
        if let Some(part) = line.strip_suffix('\\') {
            begun.push_str(part);
            continue;
        }
        let line = std::mem::take(&mut begun) + line;
        let Some((name, value)) = line.split_once(['=', ':']) else {
            return Err(Error::refused(format!("the property '{}' has no value", line.trim())));
        };
        let (name, value) = (name.trim().to_owned(), value.trim().to_owned());
        if settings.insert(name.clone(), value).is_some() {
            return Err(Error::refused(format!("the property '{name}' is there twice")));
        }
    }
    if begun.is_empty() { Ok(settings) } else { Err(Error::refused("the last property does not end")) }
}

/// Does what properties say.
pub(crate) fn apply(security: &mut Security, mut settings: BTreeMap<String, String>) -> Result<()> {
    let mut take = |name: &str| settings.remove(name);
    let mut user = (take("sasl.username"), take("sasl.password"));
    if let Some(jaas) = take("sasl.jaas.config") {
        user = (quoted(&jaas, "username="), quoted(&jaas, "password="));
        if user.0.is_none() || user.1.is_none() {
            return Err(Error::refused("sasl.jaas.config names no username and password"));
        }
    }
    if let Some(name) = take("sasl.mechanism").or(take("sasl.mechanisms")) {
        security.mechanism = Mechanism::parse(&name)?;
    }
    match user {
        (Some(user), Some(password)) => security.user = Some((user, password)),
        (None, None) => {}
        _ => return Err(Error::refused("a user without a password, or a password without a user")),
    }
    for kind in ["ssl.truststore.type", "ssl.keystore.type"] {
        if let Some(other) = take(kind).filter(|name| name != "PEM") {
            return Err(Error::refused(format!("{kind}={other} is not known here; PEM is")));
        }
    }
    if take("ssl.endpoint.identification.algorithm").is_some_and(|name| name != "https") {
        return Err(Error::refused(
            "ssl.endpoint.identification.algorithm is https: the name of the broker is checked",
        ));
    }
    let mut file = |names: &[&'static str]| {
        let found = names.iter().find_map(|name| take(name).map(|path| (*name, path)));
        found.map(|(name, path)| read(name, Path::new(&path))).transpose()
    };
    if let Some(pem) = file(&["ssl.ca.location", "ssl.truststore.location"])? {
        security.trusted = Some(pem);
    }
    // One file may have both the chain and the key.
    let chain = file(&["ssl.certificate.location", "ssl.keystore.location"])?;
    let key = file(&["ssl.key.location"])?;
    match (chain, key) {
        (Some(chain), key) => security.identity = Some((chain.clone(), key.unwrap_or(chain))),
        (None, Some(_)) => return Err(Error::refused("ssl.key.location without ssl.certificate.location")),
        (None, None) => {}
    }
    match settings.remove("security.protocol").as_deref() {
        None => {}
        Some(name @ ("PLAINTEXT" | "SSL")) if security.user.is_some() => {
            return Err(Error::refused(format!("security.protocol={name} is one without a user, and a user is named")));
        }
        Some("PLAINTEXT" | "SASL_PLAINTEXT") => security.is_encrypted = false,
        Some("SSL" | "SASL_SSL") => security.is_encrypted = true,
        Some(name) => return Err(Error::refused(format!("security.protocol={name} is not known"))),
    }
    match settings.keys().next() {
        None => Ok(()),
        Some(name) => {
            let message = format!("the property '{name}' is not one of security: nkv sets every other property itself");
            Err(Error::refused(message))
        }
    }
}

/// What stands between quotes behind a name.
fn quoted(text: &str, name: &str) -> Option<String> {
    let mut value = String::new();
    let mut rest = text.split_once(name)?.1.strip_prefix('"')?.chars();
    loop {
        match rest.next()? {
            '"' => return Some(value),
            '\\' => value.push(rest.next()?),
            character => value.push(character),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(text: &str) -> Result<Security> {
        let mut security = Security::default();
        apply(&mut security, parse(text)?)?;
        Ok(security)
    }

    #[test]
    fn properties_of_both_clients_say_how_connections_are_made_safe() {
        let java = "# of a team\nsecurity.protocol = SASL_SSL\nsasl.mechanism=PLAIN\nsasl.jaas.config=some.Module required \\\n   \
                    username=\"me\" \\\n  password=\"a \\\"b\\\"=c\";\n";
        let security = applied(java).unwrap();
        assert_eq!(security.user, Some(("me".to_owned(), "a \"b\"=c".to_owned())));
        assert_eq!((security.is_encrypted, security.mechanism), (true, Mechanism::Plain));
        let c = "security.protocol=SASL_PLAINTEXT\nsasl.mechanisms=SCRAM-SHA-256\nsasl.username=me\nsasl.password=x\n";
        let security = applied(c).unwrap();
        assert_eq!((security.is_encrypted, security.mechanism), (false, Mechanism::Sha256));
        assert!(!format!("{security:?}").contains('x'), "a password is shown");
    }

    #[test]
    fn what_nkv_decides_by_itself_and_what_it_does_not_know_is_refused_by_name() {
        for (text, says) in [
            ("group.id=x", "group.id"),
            ("enable.auto.commit=true", "enable.auto.commit"),
            ("auto.offset.reset=latest", "auto.offset.reset"),
            ("acks=0", "acks"),
            ("security.protocl=SSL", "security.protocl"),
            ("security.protocol=ssl", "security.protocol=ssl"),
            ("sasl.mechanism=GSSAPI", "GSSAPI"),
            ("sasl.username=me", "without a password"),
            ("security.protocol=SSL\nsasl.username=me\nsasl.password=x", "security.protocol=SSL"),
            ("sasl.jaas.config=some.Module required;", "sasl.jaas.config"),
            ("ssl.truststore.type=JKS", "JKS"),
            ("ssl.endpoint.identification.algorithm=", "ssl.endpoint"),
            ("ssl.ca.location=/nowhere/ca.pem", "/nowhere/ca.pem"),
            ("ssl.key.location=/dev/null", "ssl.certificate.location"),
            ("ssl.certificate.location=/dev/null\n=/dev/null", "the property ''"),
            ("nothing", "nothing"),
            ("acks=all\nacks=all", "twice"),
            ("acks=\\", "does not end"),
        ] {
            let error = applied(text).expect_err(text).to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
