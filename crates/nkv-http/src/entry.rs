//! The one object for an entry, everywhere: `key`, `value` or `value_base64`, `revision`, `ttl_ms`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use nkv_core::RecordRef;
use std::time::Duration;

/// Writes what stands between the braces of an object for an entry; a value that is not UTF-8 in base64.
pub(crate) fn write_entry(out: &mut Vec<u8>, key: &str, value: Option<&[u8]>, revision: u64, ttl: Option<Duration>) {
    out.extend_from_slice(b"\"key\":");
    write_text(out, key);
    if let Some(value) = value {
        match std::str::from_utf8(value) {
            Ok(text) => {
                out.extend_from_slice(b",\"value\":");
                write_text(out, text);
            }
            Err(_) => {
                out.extend_from_slice(b",\"value_base64\":\"");
                out.extend_from_slice(STANDARD.encode(value).as_bytes());
                out.push(b'"');
            }
        }
    }
    out.extend_from_slice(b",\"revision\":");
    write_number(out, revision);
    if let Some(ttl) = ttl {
        out.extend_from_slice(b",\"ttl_ms\":");
        write_number(out, millis(ttl));
    }
}

/// The object of a record.
pub(crate) fn write_record(out: &mut Vec<u8>, record: RecordRef<'_>, with_value: bool, ttl: Option<Duration>) {
    out.push(b'{');
    write_entry(out, record.key.as_str(), with_value.then_some(&record.value), record.revision.get(), ttl);
    out.push(b'}');
}

/// A JSON string.
pub(crate) fn write_text(out: &mut Vec<u8>, text: &str) {
    // A vector takes all that is written to it.
    drop(serde_json::to_writer(out, text));
}

pub(crate) fn write_number(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The bytes that base64 stands for.
pub(crate) fn from_base64(text: &str) -> Option<Vec<u8>> {
    STANDARD.decode(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_text_or_base64_and_nothing_is_lost() {
        let object = |value: Option<&[u8]>, ttl| {
            let mut out = Vec::new();
            write_entry(&mut out, "a.\"b", value, 7, ttl);
            String::from_utf8(out).unwrap()
        };
        assert_eq!(object(Some(b"<\n>"), None), r#""key":"a.\"b","value":"<\n>","revision":7"#);
        assert_eq!(object(Some(b"\xff\x00"), None), r#""key":"a.\"b","value_base64":"/wA=","revision":7"#);
        assert_eq!(object(None, Some(Duration::from_secs(2))), r#""key":"a.\"b","revision":7,"ttl_ms":2000"#);
        assert_eq!(from_base64("/wA=").unwrap(), b"\xff\x00");
    }
}
