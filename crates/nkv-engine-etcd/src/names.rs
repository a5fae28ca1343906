//! Keys of nkv as keys of etcd: the prefix, a slash, and the key as it is.
//!
//! etcd takes any bytes, so nothing is escaped. What nkv keeps for itself is below `PREFIX/..nkv/`, which is no key of nkv.

use nkv_core::{Key, Pattern};

const OWN: &str = "..nkv/";
const GENERATION: &str = "..nkv/generation";
const LEASE: &str = "..nkv/lease/";
const FENCE: &str = "..nkv/fence";

/// From the first key up to and without the second.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) from: Vec<u8>,
    pub(crate) to: Vec<u8>,
}

/// What a key of etcd below the prefix is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Name {
    Value(Key),
    /// The record that says which lease the value of a key has.
    Lease(Key),
    Generation,
    /// Something else of nkv's own.
    Own,
    /// No key of nkv.
    Foreign,
}

#[derive(Clone, Debug)]
pub(crate) struct Names {
    /// Without the slash.
    prefix: String,
}

impl Names {
    /// `prefix` is not empty and ends with no slash.
    pub(crate) fn new(prefix: &str) -> Self {
        Names { prefix: prefix.to_owned() }
    }

    pub(crate) fn prefix(&self) -> &str {
        &self.prefix
    }

    pub(crate) fn value(&self, key: &Key) -> Vec<u8> {
        self.join(key.as_str(), "")
    }

    pub(crate) fn lease(&self, key: &Key) -> Vec<u8> {
        self.join(LEASE, key.as_str())
    }

    pub(crate) fn generation(&self) -> Vec<u8> {
        self.join(GENERATION, "")
    }

    pub(crate) fn fence(&self) -> Vec<u8> {
        self.join(FENCE, "")
    }

    /// Everything below the prefix.
    pub(crate) fn all(&self) -> Range {
        // The character behind the slash.
        Range { from: self.join("", ""), to: format!("{}0", self.prefix).into_bytes() }
    }

    /// What nkv keeps for itself.
    pub(crate) fn own(&self) -> Range {
        // The character behind the slash.
        Range { from: self.join(OWN, ""), to: self.join(OWN.trim_end_matches('/'), "0") }
    }

    /// Where the keys are that a pattern selects, among others that are no keys of nkv.
    pub(crate) fn selected(&self, pattern: &Pattern) -> Range {
        match pattern {
            Pattern::Key(key) | Pattern::Exact(key) => {
                let from = self.value(key);
                Range { to: behind(&from), from }
            }
            // The character behind the dot.
            Pattern::Below(branch) => {
                Range { from: self.join(branch.as_str(), "."), to: self.join(branch.as_str(), "/") }
            }
            Pattern::All => self.all(),
        }
    }

    pub(crate) fn parse(&self, name: &[u8]) -> Name {
        let below = name.strip_prefix(self.prefix.as_bytes()).and_then(|rest| rest.strip_prefix(b"/"));
        let Some(text) = below.and_then(|below| std::str::from_utf8(below).ok()) else { return Name::Foreign };
        match (text.strip_prefix(OWN), text.strip_prefix(LEASE)) {
            (None, _) => Key::new(text).map_or(Name::Foreign, Name::Value),
            (_, Some(key)) => Key::new(key).map_or(Name::Own, Name::Lease),
            _ if text == GENERATION => Name::Generation,
            _ => Name::Own,
        }
    }

    /// The prefix of another nkv whose generation this key is, if it lies below this one's.
    pub(crate) fn nested<'a>(&self, name: &'a [u8]) -> Option<&'a str> {
        let text = std::str::from_utf8(name).ok()?;
        text.strip_suffix(GENERATION)?.strip_suffix('/').filter(|prefix| *prefix != self.prefix)
    }

    /// The generations of those prefixes below which this one lies.
    pub(crate) fn outer(&self) -> impl Iterator<Item = (&str, Vec<u8>)> {
        let slashes = self.prefix.char_indices().filter(|(at, c)| *c == '/' && *at > 0);
        let prefixes = slashes.filter_map(|(at, _)| self.prefix.get(..at)).filter(|prefix| !prefix.ends_with('/'));
        prefixes.map(|prefix| (prefix, Names::new(prefix).generation()))
    }

    fn join(&self, a: &str, b: &str) -> Vec<u8> {
        format!("{}/{a}{b}", self.prefix).into_bytes()
    }
}

/// The next key of all.
pub(crate) fn behind(name: &[u8]) -> Vec<u8> {
    let mut next = name.to_vec();
    next.push(0);
    next
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key() -> impl Strategy<Value = Key> {
        "[a-c/é%. ~\u{2}]{1,8}".prop_filter_map("a key", |text| Key::new(&text).ok())
    }

    proptest! {
        #[test]
        fn every_key_has_one_name_and_comes_back(key in key(), other in key()) {
            let names = Names::new("/app");
            let name = names.value(&key);
            prop_assert_eq!(names.parse(&name), Name::Value(key.clone()));
            prop_assert_eq!(&name[..5], b"/app/");
            prop_assert_eq!(&name[5..], key.as_str().as_bytes());
            prop_assert_eq!(names.parse(&names.lease(&key)), Name::Lease(key.clone()));
            prop_assert_eq!(names.value(&other) == name, other == key);
        }

        #[test]
        fn a_range_has_the_keys_that_its_pattern_selects(key in key(), branch in key()) {
            let names = Names::new("app");
            let name = names.value(&key);
            for pattern in [Pattern::Below(branch.clone()), Pattern::Key(branch), Pattern::All] {
                let range = names.selected(&pattern);
                prop_assert_eq!(range.from <= name && name < range.to, pattern.selects(&key));
            }
        }
    }

    #[test]
    fn what_is_no_key_below_the_prefix_is_foreign() {
        let names = Names::new("app");
        for name in ["app", "app/", "app2/x", "/app/x", "app/a b", "app/..x", "app/a.", "app/*"] {
            assert_eq!(names.parse(name.as_bytes()), Name::Foreign, "{name}");
        }
        assert_eq!(names.parse(b"app/\xff"), Name::Foreign);
        assert_eq!(names.parse(&names.generation()), Name::Generation);
        assert_eq!((names.parse(&names.fence()), names.parse(b"app/..nkv/lease/a b")), (Name::Own, Name::Own));
        let all = names.all();
        assert!(["app/", "app//", "app/~"].iter().all(|name| all.from <= name.as_bytes().to_vec()));
        assert!(["app0", "app2/x", "app", "app-old/x"].iter().all(|name| {
            let name = name.as_bytes().to_vec();
            name < all.from || name >= all.to
        }));
    }

    #[test]
    fn nested_prefixes_are_found() {
        let names = Names::new("/a/b/c");
        let outer: Vec<&str> = names.outer().map(|(prefix, _)| prefix).collect();
        assert_eq!(outer, ["/a", "/a/b"]);
        let names = Names::new("a");
        assert_eq!(names.nested(&Names::new("a/b").generation()), Some("a/b"));
        assert_eq!(names.nested(&names.generation()), None);
    }
}
