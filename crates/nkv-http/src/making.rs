//! Long answers that are made in parts: counted while they are made, and one after another where they are long.

use nkv_node::Leave;

use crate::body::Unsent;
use crate::route::Ctx;

/// What may be made of an answer before its turn: with it every large request waits.
pub(crate) const FIRST_LEN: usize = 16 << 10;

/// An answer that is being made.
pub(crate) struct Making<'a> {
    ctx: Ctx<'a>,
    held: Unsent,
    has_turn: bool,
    _leave: Option<Leave>,
}

impl<'a> Making<'a> {
    pub(crate) fn new(ctx: Ctx<'a>) -> Self {
        Making { ctx, held: ctx.conn.load.hold(0), has_turn: false, _leave: None }
    }

    /// It has this many bytes by now, and there may be more. Waits for its turn once it is long: those that wait count as nothing,
    /// so that they do not keep each other waiting.
    pub(crate) async fn grow(&mut self, len: usize) {
        let budget = self.ctx.door.handle.budget();
        if len > FIRST_LEN {
            self.turn().await;
        }
        if self.has_turn {
            self.held.set(len);
            budget.check_if_over();
        }
    }

    /// Waits for its turn.
    pub(crate) async fn turn(&mut self) {
        if std::mem::replace(&mut self.has_turn, true) {
            return;
        }
        let (budget, stall_limit) = (self.ctx.door.handle.budget(), self.ctx.door.options.stall_limit);
        let wait = async {
            budget.room(stall_limit).await;
            budget.leave(stall_limit).await
        };
        self._leave = self.ctx.conn.waiting(wait).await;
    }
}
