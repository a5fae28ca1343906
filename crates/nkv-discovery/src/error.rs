//! What can go wrong.

use std::error::Error as StdError;
use std::fmt;

/// Why no addresses were found. Its message carries that of its cause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoveryError {
    kind: DiscoveryErrorKind,
    message: String,
}

/// What a caller can tell apart. Any of them may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DiscoveryErrorKind {
    /// The source cannot be reached, fails, or does not answer in time.
    Unreachable,
    /// The source refuses: it does not know this node, or does not let it ask. An operator has to act.
    Refused,
    /// Nothing of the answer can be used.
    Unusable,
}

impl DiscoveryError {
    /// An error of this kind. The message is lower case, without full stop.
    #[must_use]
    pub fn new(kind: DiscoveryErrorKind, message: impl Into<String>) -> Self {
        DiscoveryError { kind, message: message.into() }
    }

    /// An error of a source that cannot be reached.
    #[must_use]
    pub fn unreachable(message: impl Into<String>) -> Self {
        Self::new(DiscoveryErrorKind::Unreachable, message)
    }

    /// What went wrong, to be matched on.
    #[must_use]
    pub fn kind(&self) -> DiscoveryErrorKind {
        self.kind
    }
}

impl fmt::Display for DiscoveryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for DiscoveryError {}

/// A description of a provider that cannot be, or that this build has no provider for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError(pub(crate) String);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl StdError for ConfigError {}
