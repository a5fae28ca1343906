//! Long answers that are made in parts: counted while they are made, and one after another where they are long.

use nkv_node::Leave;

use crate::body::{CHUNK_LEN, Unsent};
use crate::route::Ctx;

/// An answer that is being made.
pub(crate) struct Making<'a> {
    ctx: Ctx<'a>,
    held: Unsent,
    /// That a long one may be made, and no other beside it.
    leave: Option<Leave>,
}

impl<'a> Making<'a> {
    pub(crate) fn new(ctx: Ctx<'a>) -> Self {
        Making { ctx, held: ctx.conn.load.hold(0), leave: None }
    }

    /// It has this many bytes by now, and there may be more. Waits for its turn once it is long.
    pub(crate) async fn grow(&mut self, len: usize) {
        self.held.set(len);
        let budget = self.ctx.door.handle.budget();
        if len <= CHUNK_LEN {
            return;
        }
        if self.leave.is_none() {
            let stall_limit = self.ctx.door.options.stall_limit;
            let wait = async {
                budget.room(stall_limit).await;
                budget.leave(stall_limit).await
            };
            self.leave = self.ctx.conn.waiting(wait).await;
        }
        budget.check_if_over();
    }
}
