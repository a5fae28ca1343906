//! What each principal may do: one check for all doors.

use std::fmt;

use nkv_core::Pattern;

/// What a principal wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Right {
    /// To read values, and which keys there are.
    Get,
    /// To write values.
    Put,
    /// To delete keys.
    Delete,
    /// To be notified of changes.
    Subscribe,
    /// To see who subscribes, and the figures of the store.
    Admin,
}

impl Right {
    /// The word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Right::Get => "get",
            Right::Put => "put",
            Right::Delete => "delete",
            Right::Subscribe => "subscribe",
            Right::Admin => "admin",
        }
    }
}

/// Decides what principals may do, for every door and every [`Handle`](crate::Handle) that
/// [acts for one](crate::Handle::as_principal). Without it, as by default, all is allowed.
///
/// # Examples
///
/// ```
/// use nkv_node::{Pattern, Right, Rights};
///
/// /// Everybody may read, and the owner may do the rest.
/// #[derive(Debug)]
/// struct Owned(String);
///
/// impl Rights for Owned {
///     fn allows(&self, principal: &str, right: Right, _pattern: &Pattern) -> bool {
///         principal == self.0 || matches!(right, Right::Get | Right::Subscribe)
///     }
/// }
/// ```
pub trait Rights: fmt::Debug + Send + Sync + 'static {
    /// Whether `principal` has `right` on all that `pattern` selects. Asked for each request: at once, and without a call of
    /// the node.
    fn allows(&self, principal: &str, right: Right, pattern: &Pattern) -> bool;
}
