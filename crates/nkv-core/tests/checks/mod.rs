//! What must hold for any keys and patterns: of the fuzz target `keys`, of its corpus, and of `matching.rs`.

use nkv_core::{KEY_LEN_MAX, Key, Pattern};

/// What `pattern` selects, and what a subscription to it covers, said once more from the segments.
pub(crate) fn selects_and_covers(pattern: &str, key: &str) -> (bool, bool) {
    let (pattern, key): (Vec<_>, Vec<_>) = (pattern.split('.').collect(), key.split('.').collect());
    match pattern.split_last() {
        Some((&"*", branch)) => {
            let below = key.len() > branch.len() && key.starts_with(branch);
            (below, below)
        }
        _ => (key == pattern, key.starts_with(&pattern)),
    }
}

fn is_key(text: &str) -> bool {
    text.len() <= KEY_LEN_MAX
        && text.split('.').all(|segment| !segment.is_empty())
        && !text.contains(|c: char| c == '*' || c.is_whitespace() || c.is_control())
}

fn is_pattern(text: &str) -> bool {
    text == "*" || text.len() <= KEY_LEN_MAX && is_key(text.strip_suffix(".*").unwrap_or(text))
}

/// Three lines of an input: a pattern and two keys. No key holds a newline.
pub(crate) fn keys(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let texts: Vec<&str> = text.splitn(3, '\n').collect();
    for text in &texts {
        assert_eq!(Key::new(text).ok().map(|key| key.to_string()), is_key(text).then(|| text.to_string()));
        assert_eq!(Pattern::new(text).ok().map(|known| known.to_string()), is_pattern(text).then(|| text.to_string()));
    }
    let [pattern, a, b] = texts[..] else { return };
    let (Ok(a), Ok(b)) = (Key::new(a), Key::new(b)) else { return };
    assert_eq!(a.cmp(&b), a.segments().cmp(b.segments()), "{a} {b}");
    assert_eq!(a.is_below(&b), selects_and_covers(&format!("{b}.*"), a.as_str()).0, "{a} {b}");
    let Ok(parsed) = Pattern::new(pattern) else { return };
    for key in [&a, &b] {
        let seen = (parsed.selects(key), parsed.covers(key));
        assert_eq!(seen, selects_and_covers(pattern, key.as_str()), "{pattern} {key}");
    }
}
