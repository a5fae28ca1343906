//! What names keys and patterns: a text, or what was parsed already.

use std::borrow::Cow;

use nkv_core::{Key, Pattern};

use crate::error::{Error, ErrorKind, Result};

/// What names a key: a text, which is checked, or a [`Key`], which is not checked again.
///
/// # Examples
///
/// ```
/// use nkv_types::{AsKey, Key};
///
/// fn depth(key: impl AsKey) -> nkv_types::Result<usize> {
///     Ok(key.as_key()?.segments().count())
/// }
///
/// let key = Key::new("host.db1.load")?;
/// assert_eq!((depth(&key)?, depth("host.db1")?), (3, 2));
/// assert!(depth("host..db1").is_err());
/// # Ok::<(), nkv_types::Error>(())
/// ```
pub trait AsKey: Send + Sync {
    /// The key: borrowed if it is there, made of the text if not.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidKey`](crate::ErrorKind::InvalidKey).
    fn as_key(&self) -> Result<Cow<'_, Key>>;

    /// The text of the key, for code that sends it: checked, with nothing made.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidKey`](crate::ErrorKind::InvalidKey).
    fn key_text(&self) -> Result<&str>;
}

impl AsKey for Key {
    fn as_key(&self) -> Result<Cow<'_, Key>> {
        Ok(Cow::Borrowed(self))
    }

    fn key_text(&self) -> Result<&str> {
        Ok(self.as_str())
    }
}

impl AsKey for str {
    fn as_key(&self) -> Result<Cow<'_, Key>> {
        Ok(Cow::Owned(Key::new(self)?))
    }

    fn key_text(&self) -> Result<&str> {
        Key::check(self)?;
        Ok(self)
    }
}

impl AsKey for String {
    fn as_key(&self) -> Result<Cow<'_, Key>> {
        self.as_str().as_key()
    }

    fn key_text(&self) -> Result<&str> {
        self.as_str().key_text()
    }
}

impl<K: AsKey + ?Sized> AsKey for &K {
    fn as_key(&self) -> Result<Cow<'_, Key>> {
        (**self).as_key()
    }

    fn key_text(&self) -> Result<&str> {
        (**self).key_text()
    }
}

/// What names a pattern: a text, which is checked, or a [`Pattern`] or [`Key`], which is not checked again.
pub trait AsPattern: Send + Sync {
    /// The pattern: borrowed if it is there, made of the text or key if not.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidKey`](crate::ErrorKind::InvalidKey).
    fn as_pattern(&self) -> Result<Cow<'_, Pattern>>;

    /// The text of the pattern, for code that sends it. That of [`Pattern::Exact`] is its key.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidKey`](crate::ErrorKind::InvalidKey).
    fn pattern_text(&self) -> Result<Cow<'_, str>>;
}

impl AsPattern for Pattern {
    fn as_pattern(&self) -> Result<Cow<'_, Pattern>> {
        Ok(Cow::Borrowed(self))
    }

    fn pattern_text(&self) -> Result<Cow<'_, str>> {
        Ok(match self {
            Pattern::Key(key) | Pattern::Exact(key) => key.as_str().into(),
            Pattern::All => "*".into(),
            Pattern::Below(_) => self.to_string().into(),
        })
    }
}

impl AsPattern for Key {
    fn as_pattern(&self) -> Result<Cow<'_, Pattern>> {
        Ok(Cow::Owned(Pattern::Key(self.clone())))
    }

    fn pattern_text(&self) -> Result<Cow<'_, str>> {
        Ok(self.as_str().into())
    }
}

impl AsPattern for str {
    fn as_pattern(&self) -> Result<Cow<'_, Pattern>> {
        Ok(Cow::Owned(Pattern::new(self)?))
    }

    fn pattern_text(&self) -> Result<Cow<'_, str>> {
        Pattern::new(self)?;
        Ok(self.into())
    }
}

impl AsPattern for String {
    fn as_pattern(&self) -> Result<Cow<'_, Pattern>> {
        self.as_str().as_pattern()
    }

    fn pattern_text(&self) -> Result<Cow<'_, str>> {
        self.as_str().pattern_text()
    }
}

impl<P: AsPattern + ?Sized> AsPattern for &P {
    fn as_pattern(&self) -> Result<Cow<'_, Pattern>> {
        (**self).as_pattern()
    }

    fn pattern_text(&self) -> Result<Cow<'_, str>> {
        (**self).pattern_text()
    }
}

/// What names one pattern or several: anything that is [`AsPattern`], and arrays, slices and vectors of such.
pub trait AsPatterns: Send + Sync {
    /// All of them.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidKey`](crate::ErrorKind::InvalidKey).
    fn to_patterns(&self) -> Result<Vec<Pattern>>;
}

impl<P: AsPattern> AsPatterns for P {
    fn to_patterns(&self) -> Result<Vec<Pattern>> {
        Ok(vec![self.as_pattern()?.into_owned()])
    }
}

impl<P: AsPattern> AsPatterns for [P] {
    fn to_patterns(&self) -> Result<Vec<Pattern>> {
        self.iter().map(|pattern| Ok(pattern.as_pattern()?.into_owned())).collect()
    }
}

impl<P: AsPattern> AsPatterns for &[P] {
    fn to_patterns(&self) -> Result<Vec<Pattern>> {
        (**self).to_patterns()
    }
}

impl<P: AsPattern> AsPatterns for Vec<P> {
    fn to_patterns(&self) -> Result<Vec<Pattern>> {
        self.as_slice().to_patterns()
    }
}

impl<P: AsPattern> AsPatterns for &Vec<P> {
    fn to_patterns(&self) -> Result<Vec<Pattern>> {
        self.as_slice().to_patterns()
    }
}

impl<P: AsPattern, const N: usize> AsPatterns for [P; N] {
    fn to_patterns(&self) -> Result<Vec<Pattern>> {
        self.as_slice().to_patterns()
    }
}

impl<P: AsPattern, const N: usize> AsPatterns for &[P; N] {
    fn to_patterns(&self) -> Result<Vec<Pattern>> {
        self.as_slice().to_patterns()
    }
}

/// Those of the patterns that no other includes, in their order, so that no key is covered twice. With `exact`, each is a key
/// that stands for itself alone.
///
/// # Errors
///
/// [`ErrorKind::InvalidKey`] where a text is no pattern, a wildcard is to stand for itself alone, or there is no pattern at all.
///
/// # Examples
///
/// ```
/// let patterns = nkv_types::disjoint(["lamp", "lamp.kitchen", "door.*"], false)?;
/// assert_eq!(patterns.iter().map(ToString::to_string).collect::<Vec<_>>(), ["lamp", "door.*"]);
/// # Ok::<(), nkv_types::Error>(())
/// ```
pub fn disjoint(patterns: impl AsPatterns, exact: bool) -> Result<Vec<Pattern>> {
    let mut kept: Vec<Pattern> = Vec::new();
    for pattern in patterns.to_patterns()? {
        let pattern = if exact { alone(pattern)? } else { pattern };
        if !kept.iter().any(|other| other.includes(&pattern)) {
            kept.retain(|other| !pattern.includes(other));
            kept.push(pattern);
        }
    }
    if kept.is_empty() {
        return Err(Error::new(ErrorKind::InvalidKey, "no pattern is given"));
    }
    Ok(kept)
}

fn alone(pattern: Pattern) -> Result<Pattern> {
    match pattern {
        Pattern::Key(key) | Pattern::Exact(key) => Ok(Pattern::Exact(key)),
        wildcard => Ok(Pattern::Exact(Key::new(&wildcard.to_string())?)),
    }
}
