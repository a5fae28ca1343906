//! A part of many keys.

/// A part of many keys.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Page<T> {
    /// What was found, in key order.
    pub items: Vec<T>,
    /// Whether there is more after the last one.
    pub more: bool,
}

impl<T> Page<T> {
    /// Makes a page.
    #[must_use]
    pub fn new(items: Vec<T>, more: bool) -> Self {
        Page { items, more }
    }
}
