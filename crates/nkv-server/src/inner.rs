//! What the connections of a door share.

use nkv_node::{ConnectionLimit, Handle};

use crate::options::Options;

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) handle: Handle,
    pub(crate) options: Options,
    pub(crate) places: ConnectionLimit,
}
