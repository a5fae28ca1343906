//! Where a structure in memory contradicts itself.

/// Ends the caller with what is wrong. To go on would show readers records that no client wrote, or hide those that some did;
/// a write that finds it stops the writer, as after any panic under its lock.
#[cold]
#[track_caller]
#[allow(clippy::panic, reason = "no input leads here, only a fault of this crate or of the machine")]
pub(crate) fn broken(what: &str) -> ! {
    panic!("the index in memory is broken: {what}")
}

/// The text of a packed key.
pub(crate) fn text(key: &[u8]) -> &str {
    str::from_utf8(key).unwrap_or_else(|_| broken("a key is no text"))
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use bytes::Bytes;

    use super::*;
    use crate::Revision;
    use crate::order::Order;
    use crate::packed::Unpacked;
    use crate::slots::Slots;

    fn said(look: impl FnOnce()) -> String {
        let panic = catch_unwind(AssertUnwindSafe(look)).expect_err("nothing was found to be wrong");
        panic.downcast_ref::<String>().cloned().unwrap_or_default()
    }

    // They were empty records, which readers took for records.
    #[test]
    fn what_contradicts_itself_is_no_empty_record_but_says_what_is_wrong() {
        let mut packed = Vec::new();
        let record = Unpacked { key: b"k", value: b"value", is_long: false, revision: Revision::new(1), expiry: None };
        record.pack(&mut packed);
        let mut slots = Slots::default();
        let slot = slots.add(&packed, None);
        let mut order = Order::default();
        order.insert(slot, |_| false);
        let cut = &packed[..packed.len() - 1];
        let mut longer = Vec::new();
        Unpacked { is_long: true, value: b"", ..record }.pack(&mut longer);
        let mut long = Slots::default();
        let of_long = long.add(&longer, Some(Bytes::new()));
        long.remove(of_long);
        for (said, expected) in [
            (said(|| _ = slots.get(slot + 1)), "a record is longer than its place"),
            (said(|| _ = slots.get(slot + 4_096)), "a slot has no record"),
            (said(|| slots.set(slot + 1, &packed, None)), "a slot has no record"),
            (said(|| _ = long.last_like(of_long)), "a slot has no record"),
            (said(|| _ = Unpacked::of(cut)), "a record is longer than its place"),
            (said(|| order.remove(|_| true)), "a key is not in the order"),
            (said(|| order.replace(7, |_| true)), "a key is not in the order"),
            (said(|| _ = text(b"\xff")), "a key is no text"),
        ] {
            assert_eq!(said, format!("the index in memory is broken: {expected}"));
        }
    }
}
