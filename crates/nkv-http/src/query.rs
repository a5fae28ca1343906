//! The parameters of a request: each is one that is known, given once, and text. A misspelt condition or limit is an error, and
//! never left out.

use std::time::Duration;

use percent_encoding::percent_decode_str;

use crate::problem::Problem;

/// The parameters of a request.
#[derive(Debug, Default)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    /// Reads `query`; `known` are the names that may be there, and those that end in `*` more than once.
    pub(crate) fn read(query: Option<&str>, known: &[&str]) -> Result<Self, Problem> {
        let mut all: Vec<(String, String)> = Vec::new();
        for part in query.unwrap_or_default().split('&').filter(|part| !part.is_empty()) {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            let (name, value) = (decode(name)?, decode(value)?);
            let is_repeatable = known.iter().any(|known| known.strip_suffix('*') == Some(&name));
            if !is_repeatable && !known.contains(&name.as_str()) {
                let known: Vec<_> = known.iter().map(|name| name.trim_end_matches('*')).collect();
                let known = if known.is_empty() { "none is".into() } else { known.join(", ") };
                return Err(Problem::bad(format!("there is no parameter '{}' here; known: {known}", cut(&name))));
            }
            if !is_repeatable && all.iter().any(|(given, _)| *given == name) {
                return Err(Problem::bad(format!("the parameter '{name}' is given more than once")));
            }
            all.push((name, value));
        }
        Ok(Query(all))
    }

    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.all(name).next()
    }

    pub(crate) fn all(&self, name: &str) -> impl Iterator<Item = &str> {
        self.0.iter().filter(move |(given, _)| given == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn flag(&self, name: &str, absent: bool) -> Result<bool, Problem> {
        match self.get(name) {
            None => Ok(absent),
            Some("true" | "") => Ok(true),
            Some("false") => Ok(false),
            Some(_) => Err(Problem::bad(format!("'{name}' is true or false"))),
        }
    }

    pub(crate) fn number(&self, name: &str) -> Result<Option<u64>, Problem> {
        self.get(name).map(|text| number(text).ok_or_else(|| not_a_number(name))).transpose()
    }

    pub(crate) fn duration(&self, name: &str) -> Result<Option<Duration>, Problem> {
        let read =
            |text| duration(text).ok_or_else(|| Problem::bad(format!("'{name}' is a time such as 500ms, 30s or 5m")));
        self.get(name).map(read).transpose()
    }
}

fn not_a_number(name: &str) -> Problem {
    Problem::bad(format!("'{name}' is a whole number that is not negative"))
}

/// Digits, and nothing else.
pub(crate) fn number(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

fn duration(text: &str) -> Option<Duration> {
    let at = text.find(|c: char| !c.is_ascii_digit())?;
    let (digits, unit) = text.split_at_checked(at)?;
    let count = number(digits)?;
    match unit {
        "ms" => Some(Duration::from_millis(count)),
        "s" => Some(Duration::from_secs(count)),
        "m" => count.checked_mul(60).map(Duration::from_secs),
        "h" => count.checked_mul(3_600).map(Duration::from_secs),
        _ => None,
    }
}

/// The text that percent-encoding and a form's `+` stand for. What is no text is refused: two names must not become one.
fn decode(part: &str) -> Result<String, Problem> {
    let part = part.replace('+', " ");
    decode_path(&part).map_err(|_| Problem::bad("a parameter is not UTF-8, or '%' is not followed by two digits"))
}

/// The text that percent-encoding stands for, decoded once.
pub(crate) fn decode_path(part: &str) -> Result<String, Problem> {
    let mut rest = part;
    while let Some((_, behind)) = rest.split_once('%') {
        if !behind.as_bytes().get(..2).is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit)) {
            return Err(Problem::bad("'%' is not followed by two digits"));
        }
        rest = behind;
    }
    let text = percent_decode_str(part).decode_utf8();
    text.map(Into::into).map_err(|_| Problem::new("invalid-key", "a key is UTF-8"))
}

/// Of what a peer wrote, no more than that is repeated to it.
pub(crate) fn cut(text: &str) -> String {
    text.chars().take(32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_or_is_given_twice_is_named() {
        let known = ["ttl", "pattern*"];
        let query = Query::read(Some("ttl=30s&pattern=a.%2A&pattern=b+c&"), &known).unwrap();
        assert_eq!(query.all("pattern").collect::<Vec<_>>(), ["a.*", "b c"]);
        assert_eq!(query.duration("ttl").unwrap(), Some(Duration::from_secs(30)));
        for (wrong, named) in [("tll=1s", "'tll'"), ("ttl=1s&ttl=2s", "'ttl'"), ("%ff=1", "UTF-8"), ("a=%4", "digits")]
        {
            let problem = Query::read(Some(wrong), &known).unwrap_err();
            assert!(problem.detail().contains(named), "{wrong}: {problem:?}");
        }
    }

    #[test]
    fn numbers_and_times_are_read_strictly() {
        for wrong in ["", "30", "-1s", "+1s", "1 s", "1.5s", "99999999999999999999s", "1d"] {
            assert_eq!(duration(wrong), None, "{wrong}");
        }
        assert_eq!(duration("500ms"), Some(Duration::from_millis(500)));
        for wrong in ["+1", "-1", "1x", " 1"] {
            assert_eq!(number(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_path_is_decoded_once() {
        assert_eq!(decode_path("a%2525/b").unwrap(), "a%25/b");
        for wrong in ["%", "%2", "%zz", "a%ff"] {
            assert!(decode_path(wrong).is_err(), "{wrong}");
        }
    }
}
