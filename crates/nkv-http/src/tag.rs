//! Entity tags and conditions: `ETag`, `If-Match`, `If-None-Match`. A tag is `"EPOCH-REVISION"`, so that none survives a new
//! epoch. What cannot be understood is an error, and never a request without its condition.

use bytes::Bytes;
use http::header::{IF_MATCH, IF_NONE_MATCH, IF_RANGE, IF_UNMODIFIED_SINCE};
use http::{HeaderMap, HeaderName, HeaderValue};
use nkv_node::{Epoch, Revision};

use crate::entry::write_number;
use crate::problem::Problem;

/// Conditions that a date would decide: an entry has none, and a condition is not to be passed over.
const BY_DATE: [HeaderName; 2] = [IF_UNMODIFIED_SINCE, IF_RANGE];

/// The epoch, the longest revision, and what is around them.
const TAG_LEN_MAX: usize = 32 + 20 + 3;

/// The strong tag of a revision.
pub(crate) fn tag(epoch: Epoch, revision: u64) -> HeaderValue {
    // Each answer has one: written without the machinery of formats.
    let mut text = Vec::with_capacity(TAG_LEN_MAX);
    text.push(b'"');
    text.extend_from_slice(&epoch.digits());
    text.push(b'-');
    write_number(&mut text, revision);
    text.push(b'"');
    // Hexadecimal digits, a hyphen and digits: always a header's value.
    HeaderValue::from_maybe_shared(Bytes::from(text)).unwrap_or_else(|_| HeaderValue::from_static("\"\""))
}

/// What a request asks of the present state before it is done.
#[derive(Debug, Default)]
pub(crate) struct Conditions {
    if_match: Option<Tags>,
    if_none_match: Option<Tags>,
}

#[derive(Debug)]
enum Tags {
    Any,
    Of(Vec<Tag>),
}

#[derive(Debug, PartialEq, Eq)]
struct Tag {
    is_weak: bool,
    text: String,
}

/// What is known of a condition that does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unmet {
    /// `If-Match`; `true` if it would hold but for a weak tag.
    Match(bool),
    /// `If-None-Match`: for a read it is no error.
    NoneMatch,
}

impl Conditions {
    /// `is_write`: for a request that changes something, a condition by date is refused.
    pub(crate) fn read(headers: &HeaderMap, is_write: bool) -> Result<Self, Problem> {
        if let Some(name) = BY_DATE.iter().find(|name| is_write && headers.contains_key(*name)) {
            return Err(Problem::bad(format!("there is no condition '{name}' here: see If-Match")));
        }
        Ok(Conditions { if_match: tags(headers, &IF_MATCH)?, if_none_match: tags(headers, &IF_NONE_MATCH)? })
    }

    pub(crate) fn are_empty(&self) -> bool {
        self.if_match.is_none() && self.if_none_match.is_none()
    }

    /// Whether they hold for a key with this tag, or an absent one.
    pub(crate) fn check(&self, present: Option<(Epoch, Revision)>) -> Result<(), Unmet> {
        if self.are_empty() {
            return Ok(());
        }
        let text = present.map(|(epoch, revision)| format!("{epoch}-{revision}"));
        let is = |tag: &Tag| text.as_ref().is_some_and(|text| tag.text == *text);
        match &self.if_match {
            Some(Tags::Any) if present.is_none() => return Err(Unmet::Match(false)),
            Some(Tags::Of(tags)) if !tags.iter().any(|tag| !tag.is_weak && is(tag)) => {
                return Err(Unmet::Match(tags.iter().any(|tag| tag.is_weak && is(tag))));
            }
            _ => {}
        }
        match &self.if_none_match {
            Some(Tags::Any) if present.is_some() => Err(Unmet::NoneMatch),
            // Also a weak tag matches here.
            Some(Tags::Of(tags)) if tags.iter().any(is) => Err(Unmet::NoneMatch),
            _ => Ok(()),
        }
    }
}

/// The tags of all lines of a header.
fn tags(headers: &HeaderMap, name: &HeaderName) -> Result<Option<Tags>, Problem> {
    let mut found: Option<Tags> = None;
    for line in headers.get_all(name) {
        let read = line.to_str().ok().and_then(read).ok_or_else(|| {
            Problem::bad(format!("{name} is '*' or a list of tags in quotation marks, as ETag gave them"))
        })?;
        found = Some(match (found, read) {
            (None, read) => read,
            (Some(Tags::Of(mut tags)), Tags::Of(more)) => {
                tags.extend(more);
                Tags::Of(tags)
            }
            _ => return Err(Problem::bad(format!("{name} is either '*' or tags"))),
        });
    }
    Ok(found)
}

fn read(text: &str) -> Option<Tags> {
    if text.trim() == "*" {
        return Some(Tags::Any);
    }
    let mut tags = Vec::new();
    let mut rest = text.trim();
    loop {
        let (is_weak, quoted) = match rest.strip_prefix("W/") {
            Some(rest) => (true, rest),
            None => (false, rest),
        };
        let (text, behind) = quoted.strip_prefix('"')?.split_once('"')?;
        tags.push(Tag { is_weak, text: text.to_owned() });
        match behind.trim_start() {
            "" => return Some(Tags::Of(tags)),
            behind => rest = behind.strip_prefix(',')?.trim_start(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPOCH: Epoch = Epoch::new(0xab);
    const TAG: &str = "\"000000000000000000000000000000ab-7\"";

    fn conditions(lines: &[(&str, &str)]) -> Result<Conditions, Problem> {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(HeaderName::try_from(*name).unwrap(), value.parse().unwrap());
        }
        Conditions::read(&headers, true)
    }

    fn holds(lines: &[(&str, &str)], is_there: bool) -> Result<(), Unmet> {
        conditions(lines).unwrap().check(is_there.then_some((EPOCH, Revision::new(7))))
    }

    #[test]
    fn only_the_strong_present_tag_matches() {
        assert_eq!(tag(EPOCH, 7), TAG);
        assert_eq!(holds(&[("if-match", TAG)], true), Ok(()));
        assert_eq!(holds(&[("if-match", &format!("\"x\", {TAG}"))], true), Ok(()));
        assert_eq!(holds(&[("if-match", "\"x\""), ("if-match", TAG)], true), Ok(()));
        assert_eq!(holds(&[("if-match", "*")], true), Ok(()));
        for (tags, unmet) in [("*", Unmet::Match(false)), (TAG, Unmet::Match(false)), ("\"x\"", Unmet::Match(false))] {
            assert_eq!(holds(&[("if-match", tags)], false), Err(unmet), "{tags}, absent");
        }
        assert_eq!(holds(&[("if-match", "\"7\"")], true), Err(Unmet::Match(false)));
        assert_eq!(holds(&[("if-match", &format!("W/{TAG}"))], true), Err(Unmet::Match(true)));
    }

    #[test]
    fn a_tag_that_is_not_to_match_does_so_also_weakly() {
        assert_eq!(holds(&[("if-none-match", "*")], false), Ok(()));
        assert_eq!(holds(&[("if-none-match", "*")], true), Err(Unmet::NoneMatch));
        assert_eq!(holds(&[("if-none-match", &format!("W/{TAG}"))], true), Err(Unmet::NoneMatch));
        assert_eq!(holds(&[("if-none-match", "\"x\"")], true), Ok(()));
        assert_eq!(holds(&[("if-match", TAG), ("if-none-match", TAG)], true), Err(Unmet::NoneMatch));
        assert_eq!(holds(&[("if-match", TAG), ("if-none-match", "\"x\"")], true), Ok(()));
    }

    #[test]
    fn what_cannot_be_understood_is_an_error() {
        for wrong in ["", "7", "abc", "\"a", "\"a\" \"b\"", "w/\"a\"", "\"a\",", ",\"a\"", "*, \"a\""] {
            assert!(conditions(&[("if-match", wrong)]).is_err(), "{wrong:?}");
        }
        assert!(conditions(&[("if-match", "*"), ("if-match", TAG)]).is_err());
        assert!(conditions(&[("if-unmodified-since", "Tue, 01 Dec 2026 00:00:00 GMT")]).is_err());
    }
}
