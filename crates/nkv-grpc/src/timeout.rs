//! The deadline that a client gives with its call.

use std::time::Duration;

use http::HeaderMap;

/// What is longer is no deadline.
const TIMEOUT_MAX: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// How long the call may take, from the header `grpc-timeout`: at most eight digits and a unit.
///
/// # Errors
///
/// That the header cannot be understood.
pub(crate) fn timeout_of(headers: &HeaderMap) -> Result<Option<Duration>, tonic::Status> {
    let Some(value) = headers.get("grpc-timeout") else { return Ok(None) };
    let malformed =
        || tonic::Status::invalid_argument("'grpc-timeout' is at most eight digits and one of H, M, S, m, u, n");
    let (unit, digits) = value.as_bytes().split_last().ok_or_else(malformed)?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return Err(malformed());
    }
    let number: u64 = std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok()).ok_or_else(malformed)?;
    let timeout = match unit {
        b'H' => Duration::from_secs(number.saturating_mul(3_600)),
        b'M' => Duration::from_secs(number.saturating_mul(60)),
        b'S' => Duration::from_secs(number),
        b'm' => Duration::from_millis(number),
        b'u' => Duration::from_micros(number),
        b'n' => Duration::from_nanos(number),
        _ => return Err(malformed()),
    };
    Ok(Some(timeout).filter(|timeout| *timeout <= TIMEOUT_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeout(text: &str) -> Result<Option<Duration>, tonic::Code> {
        let mut headers = HeaderMap::new();
        headers.insert("grpc-timeout", text.parse().unwrap());
        timeout_of(&headers).map_err(|status| status.code())
    }

    #[test]
    fn a_timeout_is_digits_and_a_unit() {
        assert_eq!(timeout_of(&HeaderMap::new()).unwrap(), None);
        let units = [
            ("H", 3_600_000_000_000),
            ("M", 60_000_000_000),
            ("S", 1_000_000_000),
            ("m", 1_000_000),
            ("u", 1_000),
            ("n", 1),
        ];
        for (unit, nanos) in units {
            assert_eq!(timeout(&format!("7{unit}")), Ok(Some(Duration::from_nanos(7 * nanos))), "{unit}");
        }
        assert_eq!(timeout("99999999H"), Ok(None));
        assert_eq!(timeout("0n"), Ok(Some(Duration::ZERO)));
        for wrong in ["", "1", "S", "-1S", "1.5S", "123456789S", "1s", "1 S"] {
            assert_eq!(timeout(wrong), Err(tonic::Code::InvalidArgument), "{wrong}");
        }
    }
}
