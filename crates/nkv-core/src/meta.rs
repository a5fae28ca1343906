//! What a caller has storage keep beside a record or a delete: opaque here.

use std::fmt;
use std::sync::Arc;

/// Longest meta, in bytes.
pub const META_LEN_MAX: usize = 65_535;

/// Opaque bytes of the caller, kept by storage beside a record, or in the place of a deleted one. The store never reads
/// them, and neither readers nor subscribers see them.
///
/// Absent by default; a present one may be empty. Cloning is a reference count.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Meta(Option<Arc<[u8]>>);

impl Meta {
    /// None at all.
    pub const NONE: Meta = Meta(None);

    /// These bytes, at most [`META_LEN_MAX`]: storage is given no more.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Self {
        Meta(Some(Arc::from(bytes)))
    }

    /// The bytes, if there are any to keep.
    #[must_use]
    pub fn as_bytes(&self) -> Option<&[u8]> {
        self.0.as_deref()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.0.is_none()
    }
}

impl From<Option<&[u8]>> for Meta {
    fn from(bytes: Option<&[u8]>) -> Self {
        Meta(bytes.map(Arc::from))
    }
}

impl fmt::Debug for Meta {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.as_bytes() {
            Some(bytes) => write!(f, "Meta({:?})", bytes.escape_ascii().to_string()),
            None => f.write_str("Meta(none)"),
        }
    }
}

const _: () = assert!(size_of::<Meta>() == 16, "it costs little where it is absent");
