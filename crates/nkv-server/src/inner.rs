//! What the connections of a door share.

use nkv_node::Handle;

use crate::options::Options;
use crate::slots::Slots;

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) handle: Handle,
    pub(crate) options: Options,
    pub(crate) slots: Slots,
}
