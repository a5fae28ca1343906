//! Replicas that give each other what differs, with no network between them.

use nkv_core::{Expiry, MemoryPersist, PersistValue, PutOptions, Timestamp};

use super::*;

const GRACE: Millis = 100_000;
const TODAY: Millis = SET_FROM + 1_000_000_000;
const TERMS: Terms = Terms { gc_grace: GRACE, offset_max: 1_000 };

/// A replica with its disk.
#[derive(Debug)]
struct One {
    replica: Replica,
    disk: MemoryPersist,
    /// What a store would have.
    store: BTreeMap<Key, (u64, Bytes)>,
    id: NodeId,
    now: Now,
}

fn key(text: &str) -> Key {
    text.parse().unwrap()
}

impl One {
    fn new(id: u64) -> Self {
        let mut disk = MemoryPersist::new(Epoch::new(u128::from(id)));
        disk.load(&mut |_| ()).unwrap();
        let mut one =
            One { replica: Replica::new(TERMS), disk, store: BTreeMap::new(), id: NodeId(id), now: at(TODAY) };
        one.replica.begin(Place { epoch: Epoch::new(u128::from(id)), revision: 0 }, Hlc(0), 0).unwrap();
        let identity = Identity { id: NodeId(id), cluster: "c".into() };
        one.plan(|replica, plan, _| replica.name(plan, identity));
        one
    }

    fn plan<T>(&mut self, work: impl FnOnce(&mut Replica, &mut Plan, Now) -> T) -> T {
        let mut plan = self.replica.plan();
        let done = work(&mut self.replica, &mut plan, self.now);
        if !plan.changes.is_empty() {
            self.disk.persist(&plan.changes).unwrap();
            for Change { key, revision, action, .. } in &plan.changes {
                match action {
                    Action::Put { value, .. } => _ = self.store.insert(key.clone(), (revision.get(), value.clone())),
                    Action::Delete { .. } => _ = self.store.remove(key),
                }
            }
        }
        self.replica.commit(&mut plan);
        done
    }

    fn restart(&mut self) {
        self.replica = Replica::new(TERMS);
        let loaded = {
            let replica = &mut self.replica;
            self.disk.load(&mut |stored| replica.restore(stored)).unwrap()
        };
        let place = Place { epoch: loaded.epoch, revision: loaded.revision.get() };
        self.replica.begin(place, Hlc(0), self.now.steady).unwrap();
        assert_eq!(self.replica.identity().map(|identity| identity.id), Some(self.id));
    }

    fn write(&mut self, op: Op) -> Outcome {
        let epoch = self.replica.epoch();
        let mut results = self.plan(|replica, plan, now| replica.write(plan, epoch, &[op], false, now));
        results.remove(0).unwrap()
    }

    fn put(&mut self, name: &str, value: &'static str) -> Record {
        self.put_for(name, value, None)
    }

    fn put_for(&mut self, name: &str, value: &'static str, ttl: Option<u64>) -> Record {
        let expiry = ttl.map(|ttl_ms| Expiry { at: Timestamp::MIN, ttl_ms });
        let options = PutOptions { if_revision: None, expiry };
        self.write(Op::Put { key: key(name), value: value.into(), options });
        self.record(name)
    }

    fn delete(&mut self, pattern: &str) -> Outcome {
        self.write(Op::Delete { pattern: pattern.parse().unwrap(), if_revision: None })
    }

    fn record(&self, name: &str) -> Record {
        self.whole(&key(name), &self.replica.held[&(key_hash(&key(name)), key(name))])
    }

    fn whole(&self, key: &Key, held: &Held) -> Record {
        let value = || self.values()(key, held.revision);
        Record { key: key.clone(), register: held.register.with(value).unwrap() }
    }

    fn values(&self) -> impl Fn(&Key, u64) -> Option<Bytes> + use<> {
        let store = self.store.clone();
        move |key, revision| store.get(key).filter(|(at, _)| *at == revision).map(|(_, value)| value.clone())
    }

    fn merge(&mut self, record: &Record) -> Merged {
        self.plan(|replica, plan, now| replica.merge(plan, record, now))
    }

    fn value(&self, name: &str) -> Option<String> {
        let held = self.replica.held.get(&(key_hash(&key(name)), key(name)))?;
        match self.whole(&key(name), held).register.content {
            Content::Put { value, .. } => Some(String::from_utf8(value.to_vec()).unwrap()),
            _ => None,
        }
    }

    fn expire(&mut self) {
        self.plan(|replica, plan, now| {
            replica.give_up_ended_early(plan, now);
            replica.expire(plan, now, true, 1_000);
        });
    }

    fn take(&mut self, compared: Compared, from: &One) -> bool {
        let given = compared.give.iter().filter_map(|(slot, _)| Some((slot, from.replica.given(slot, from.now)?)));
        let records: Vec<Record> = given.map(|(slot, held)| from.whole(&slot.1, &held)).collect();
        records.iter().all(|record| self.merge(record) != Merged::Refused)
    }

    fn delete_gone(&mut self, gone: Vec<(Key, Stamp)>) {
        self.plan(|replica, plan, now| {
            gone.iter().for_each(|(key, stamp)| _ = replica.infer_delete(plan, key, *stamp, now));
        });
    }
}

fn at(wall: Millis) -> Now {
    time(wall, wall - TODAY)
}

/// What all agree on.
fn time(wall: Millis, steady: Millis) -> Now {
    Now { wall, latest: wall, is_agreed: true, steady }
}

/// What a session does, led by `a`; `is_broken`: it ends before its end.
fn sync(a: &mut One, b: &mut One, is_broken: bool) {
    let (a_place, b_place) = (a.replica.place(), b.replica.place());
    let a_had = a.replica.long_ago(b.id, b_place, b.replica.contact(a.id), a.now);
    let b_had = b.replica.long_ago(a.id, a_place, a.replica.contact(b.id), b.now);
    let listed = a.replica.entries(Prefix::ROOT);
    let mut of_b = b.replica.compare(Prefix::ROOT.hashes(), &listed, b_had, usize::MAX);
    b.delete_gone(std::mem::take(&mut of_b.gone));
    let wants = std::mem::take(&mut of_b.want);
    let mut is_whole = a.take(of_b, b);
    let mut of_a = a.replica.wanted(&wants, a_had);
    a.delete_gone(std::mem::take(&mut of_a.gone));
    is_whole &= b.take(of_a, a);
    // An inferred delete is pushed.
    let tombstones = |one: &One| -> Vec<Record> {
        let registers = one.replica.registers().into_iter().filter(|(_, register)| !register.is_live());
        registers.map(|(key, head)| Record { key, register: head.with(|| None).unwrap() }).collect()
    };
    let (from_a, from_b) = (tombstones(a), tombstones(b));
    from_a.iter().for_each(|record| _ = b.merge(record));
    from_b.iter().for_each(|record| _ = a.merge(record));
    if is_whole && !is_broken {
        let at = a.now.wall;
        let (a_id, b_id) = (a.id, b.id);
        let contact = Contact { at, own: a_place, peer: b_place };
        a.plan(|replica, plan, _| replica.note_contact(plan, b_id, contact));
        b.plan(|replica, plan, _| replica.note_contact(plan, a_id, contact.mirrored()));
    }
}

fn one_value() -> Content {
    Content::Put { value: "1".into(), ttl: None }
}

fn pass(nodes: &mut [&mut One], millis: Millis) {
    for one in nodes {
        one.now = time(one.now.wall + millis, one.now.steady + millis);
        one.expire();
    }
}

fn two() -> (One, One) {
    (One::new(1), One::new(2))
}

fn assert_level(a: &One, b: &One) {
    assert_eq!(a.replica.registers(), b.replica.registers());
    assert_eq!(a.replica.digest(Prefix::ROOT), b.replica.digest(Prefix::ROOT));
}

#[test]
fn a_write_after_one_that_was_seen_wins_whatever_the_own_clock_shows() {
    let (mut a, mut b) = two();
    let theirs = a.put("k", "a");
    assert_eq!(b.merge(&theirs), Merged::Applied);
    // The clock of the other falls behind.
    b.now.wall -= 3_600_000;
    let own = b.put("k", "b");
    assert_eq!(b.value("k").as_deref(), Some("b"));
    assert_eq!((a.merge(&own), a.value("k").as_deref()), (Merged::Applied, Some("b")));
    assert!(b.put("other", "b").register.stamp > theirs.register.stamp, "of another key too");
    b.delete("k");
    let deleted = b.record("k");
    assert_eq!((a.merge(&deleted), a.value("k")), (Merged::Applied, None));
}

#[test]
fn a_replica_keeps_no_value() {
    let mut a = One::new(1);
    let value = Bytes::from(vec![b'v'; 10_000]);
    let mut plan = a.replica.plan();
    let op = Op::Put { key: key("k"), value: value.clone(), options: PutOptions::default() };
    a.replica.write(&mut plan, a.replica.epoch(), &[op], false, a.now);
    a.replica.commit(&mut plan);
    drop(plan);
    assert!(value.is_unique() && a.replica.registers()[&key("k")].is_live());
    assert!(size_of::<(Slot, Held)>() <= 80, "{} bytes a key", size_of::<(Slot, Held)>());
}

#[test]
fn the_patterns_of_a_batch_delete_a_certain_number_of_keys_at_most() {
    let mut a = One::new(1);
    let epoch = a.replica.epoch();
    let put = |number| Op::Put { key: key(&format!("k.{number}")), value: "1".into(), options: PutOptions::default() };
    let write =
        |a: &mut One, ops: &[Op], together| a.plan(|replica, plan, now| replica.write(plan, epoch, ops, together, now));
    write(&mut a, &(0..=BATCH_DELETES_MAX).map(put).collect::<Vec<_>>(), false);
    let delete = Op::Delete { pattern: Pattern::Below(key("k")), if_revision: None };
    let before = a.replica.revision();
    let results = write(&mut a, &[put(0), delete.clone()], true);
    let is_refused = |result: &Result<_, _>| matches!(result, Err(EngineError::Refused { status: 413, .. }));
    assert!(results.len() == 2 && results.iter().all(is_refused), "{results:?}");
    assert_eq!(a.replica.revision(), before, "a part of it was done");
    a.delete("k.0");
    let results = write(&mut a, &[delete], true);
    let is_whole = matches!(results[..], [Ok(Outcome::Deleted { count, .. })] if count == BATCH_DELETES_MAX as u64);
    assert!(is_whole, "{results:?}");
}

#[test]
fn equal_stamps_are_decided_alike_everywhere() {
    let (mut a, mut b) = two();
    let stamp = Stamp { time: Hlc::at(TODAY), node: NodeId(3) };
    let put = |value: &'static str| Record {
        key: key("k"),
        register: Register::new(stamp, Content::Put { value: value.into(), ttl: None }),
    };
    for one in ["x", "y", "z"].map(put) {
        a.merge(&one);
    }
    for one in ["z", "x", "y"].map(put) {
        b.merge(&one);
    }
    assert_level(&a, &b);
}

#[test]
fn a_stale_put_does_nothing_after_a_wildcard_delete_and_a_concurrent_one_of_another_key_stays() {
    let (mut a, mut b) = two();
    let (stale, unheard) = (b.put("k.a", "1"), b.put("k.b", "1"));
    assert_eq!(a.merge(&stale), Merged::Applied);
    a.now = at(TODAY + 10);
    assert!(matches!(a.delete("k.*"), Outcome::Deleted { count: 1, .. }));
    assert_eq!(a.merge(&stale), Merged::PassedOver);
    assert_eq!(a.merge(&unheard), Merged::Applied);
    assert_eq!((a.value("k.a"), a.value("k.b").as_deref()), (None, Some("1")));
    sync(&mut a, &mut b, false);
    assert_level(&a, &b);
    assert_eq!(b.value("k.a"), None);
}

#[test]
fn a_delete_stays_one_for_absences_shorter_than_its_grace_also_over_a_restart() {
    let (mut a, mut b) = two();
    a.put("k", "1");
    sync(&mut a, &mut b, false);
    b.delete("k");
    b.restart();
    pass(&mut [&mut a, &mut b], GRACE - 1);
    b.restart();
    sync(&mut a, &mut b, false);
    assert_eq!((a.value("k"), b.value("k")), (None, None));
    assert_level(&a, &b);
    // Then it is forgotten, and a peer that still lists it does not bring it back.
    pass(&mut [&mut b], 3_000);
    assert!(b.replica.registers().is_empty());
    sync(&mut a, &mut b, false);
    assert!(b.replica.registers().is_empty());
    pass(&mut [&mut a], 3_000);
    assert_level(&a, &b);
    let mut left = 0;
    b.disk.load(&mut |stored| left += usize::from(!stored.key().starts_with(".."))).unwrap();
    assert_eq!(left, 0, "storage keeps it");
}

#[test]
fn after_a_longer_absence_what_both_had_and_one_lacks_was_deleted_and_what_is_new_is_merged() {
    let (mut a, mut b) = two();
    for name in ["gone.a", "gone.b", "kept", "changed"] {
        a.put(name, "1");
    }
    sync(&mut a, &mut b, false);
    sync(&mut a, &mut b, false);
    a.put("new.a", "1");
    b.put("new.b", "1");
    a.put("changed", "2");
    b.delete("gone.*");
    b.delete("changed");
    pass(&mut [&mut a, &mut b], GRACE * 2);
    b.restart();
    a.restart();
    assert!(!b.replica.registers().contains_key(&key("gone.a")), "the tombstone is still there");
    sync(&mut a, &mut b, false);
    sync(&mut a, &mut b, false);
    assert_level(&a, &b);
    for one in [&a, &b] {
        assert_eq!((one.value("gone.a"), one.value("gone.b")), (None, None), "it came back");
        assert_eq!(one.value("kept").as_deref(), Some("1"));
        assert_eq!(one.value("changed").as_deref(), Some("2"), "a write since the contact is lost");
        assert_eq!((one.value("new.a").as_deref(), one.value("new.b").as_deref()), (Some("1"), Some("1")));
    }
}

#[test]
fn an_inferred_delete_undoes_no_write_that_came_since() {
    let (mut a, mut b) = two();
    a.put("k", "1");
    sync(&mut a, &mut b, false);
    b.delete("k");
    pass(&mut [&mut a, &mut b], GRACE * 2);
    let both_had = a.replica.long_ago(b.id, b.replica.place(), b.replica.contact(a.id), a.now);
    let compared = a.replica.compare(Prefix::ROOT.hashes(), &[], both_had, usize::MAX);
    assert_eq!(compared.gone.len(), 1);
    // While the listing was on its way.
    let newer = a.put("k", "2");
    a.delete_gone(compared.gone.clone());
    assert_eq!(a.value("k").as_deref(), Some("2"));
    // Nor elsewhere, whichever was first: it has the stamp of what it deletes.
    let (mut e, mut f) = (One::new(5), One::new(6));
    (e.now, f.now) = (a.now, a.now);
    e.merge(&Record { key: key("k"), register: Register::new(compared.gone[0].1, one_value()) });
    f.put("k", "2");
    e.now.wall += 10;
    e.delete_gone(compared.gone.clone());
    let inferred = e.record("k");
    assert_eq!((e.value("k"), f.merge(&inferred)), (None, Merged::PassedOver));
    assert_eq!(f.value("k").as_deref(), Some("2"));
    let (mut c, mut d) = (One::new(3), One::new(4));
    (c.now, d.now) = (a.now, a.now);
    let old =
        Record { key: key("k"), register: Register::new(compared.gone[0].1, Content::Deleted { at: a.now.wall }) };
    c.merge(&newer);
    assert_eq!(c.merge(&old), Merged::PassedOver);
    d.merge(&old);
    assert_eq!(d.merge(&newer), Merged::Applied);
    assert_level(&c, &d);
}

#[test]
fn lacking_a_key_proves_nothing_where_the_data_are_not_whole_since_the_contact() {
    for case in ["another epoch", "an older copy", "never met", "a contact that one lacks"] {
        let (mut a, mut b) = two();
        a.put("k", "1");
        sync(&mut a, &mut b, false);
        sync(&mut a, &mut b, false);
        let mut fresh = One::new(2);
        match case {
            "another epoch" => {
                // Its directory was repaired, and lost the key.
                let contact = b.replica.contact(a.id).unwrap();
                fresh.replica.begin(Place { epoch: Epoch::new(77), revision: 50 }, Hlc(0), 0).unwrap();
                fresh.put("mine", "1");
                let a_id = a.id;
                fresh.plan(|replica, plan, _| replica.note_contact(plan, a_id, contact));
            }
            "an older copy" => {
                // Of the same epoch, from before the contact.
                let contact = b.replica.contact(a.id).unwrap();
                let a_id = a.id;
                fresh.plan(|replica, plan, _| replica.note_contact(plan, a_id, contact));
                assert!(fresh.replica.place().revision < contact.own.revision);
            }
            "never met" => {}
            _ => {
                let b_id = b.id;
                a.plan(|_, plan, _| plan.contacts.push((b_id, None)));
                fresh.replica.epoch = b.replica.epoch;
            }
        }
        let mut b = fresh;
        pass(&mut [&mut a, &mut b], GRACE * 2);
        b.now = a.now;
        sync(&mut a, &mut b, false);
        assert_eq!((a.value("k").as_deref(), b.value("k").as_deref()), (Some("1"), Some("1")), "{case}");
    }
}

#[test]
fn the_older_of_both_contacts_counts_and_one_that_broke_off_is_none() {
    let (mut a, mut b) = two();
    a.put("old", "1");
    sync(&mut a, &mut b, false);
    sync(&mut a, &mut b, false);
    // The copy of a directory is put back later.
    let (copy, place) = (b.replica.registers(), b.replica.place());
    let contact = b.replica.contact(a.id).unwrap();
    b.put("mine", "1");
    sync(&mut a, &mut b, false);
    let mut back = One::new(2);
    back.replica.begin(Place { epoch: place.epoch, revision: place.revision - 1 }, Hlc(0), 0).unwrap();
    for (key, register) in copy {
        back.merge(&Record { key, register: register.with(|| Some("1".into())).unwrap() });
    }
    let a_id = a.id;
    back.plan(|replica, plan, _| replica.note_contact(plan, a_id, contact));
    pass(&mut [&mut a, &mut back], GRACE * 2);
    back.now = a.now;
    sync(&mut a, &mut back, false);
    // It did not have what came after its copy: that was not deleted.
    assert_eq!((a.value("mine").as_deref(), back.value("mine").as_deref()), (Some("1"), Some("1")));

    let (mut a, mut b) = two();
    a.put("k", "1");
    sync(&mut a, &mut b, true);
    assert_eq!((a.replica.contact(b.id), b.replica.contact(a.id)), (None, None));
}

#[test]
fn what_is_stamped_ahead_is_not_taken_and_no_contact_is_noted() {
    let (mut a, mut b) = two();
    a.now.wall += 1_001;
    let ahead = a.put("k", "1");
    assert_eq!((b.merge(&ahead), b.replica.digest(Prefix::ROOT)), (Merged::Refused, 0));
    sync(&mut a, &mut b, false);
    assert_eq!(b.replica.contact(a.id), None);
    pass(&mut [&mut b], 1);
    assert_eq!(b.merge(&ahead), Merged::Applied);
}

#[test]
fn what_was_stamped_with_a_clock_that_was_off_is_stamped_anew_if_no_peer_has_it() {
    for wrong in [TODAY + 3_600_000, 5_000] {
        let (mut a, mut b) = two();
        a.put("taken", "1");
        sync(&mut a, &mut b, false);
        let taken = a.record("taken");
        pass(&mut [&mut a, &mut b], 10_000);
        // Alone, with a clock that is off. Its data hold the clock up where it is behind.
        let right = a.now;
        a.now.wall = wrong;
        if wrong < SET_FROM {
            a.replica.clock.reset(Hlc::at(wrong));
        }
        let first = a.put("k", "1").register.stamp;
        a.put("other", "1");
        a.delete("other");
        a.now = time(right.wall + 60_000, right.steady + 60_000);
        b.now = a.now;
        assert!(a.replica.must_mend(a.now));
        let now = a.now;
        let values = a.values();
        assert_eq!(a.plan(|replica, plan, _| replica.restamp(plan, now, &values)), 2);
        assert!(!a.replica.must_mend(a.now));
        let anew = a.record("k").register.stamp;
        assert_ne!(first, anew);
        // When it was written, by the clock that is right.
        assert_eq!(anew.time.millis(), right.wall);
        assert_eq!(a.record("taken"), taken);
        sync(&mut a, &mut b, false);
        assert_level(&a, &b);
        // And what is written now is not ahead.
        let next = a.put("next", "1");
        assert_eq!((next.register.stamp.time.millis(), b.merge(&next)), (now.wall, Merged::Applied));
    }
}

const HOUR: Millis = 3_600_000;

/// Alone, its clock shows this.
fn alone(wall: Millis, steady: Millis) -> Now {
    Now { is_agreed: false, ..time(wall, steady) }
}

fn mend(one: &mut One) -> usize {
    let values = one.values();
    let count = one.plan(|replica, plan, now| {
        let count = replica.restamp(plan, now, &values);
        replica.give_up_ended_early(plan, now);
        count
    });
    assert!(!one.replica.must_mend(one.now));
    count
}

#[test]
fn no_row_of_stamps_leads_ahead_of_the_clock() {
    let mut b = One::new(2);
    for (ahead, merged) in [(900, Merged::Applied), (1_000, Merged::Applied), (1_001, Merged::Refused)] {
        let stamp = Stamp { time: Hlc::at(TODAY + ahead), node: NodeId(1) };
        let record = Record { key: key(&format!("k.{ahead}")), register: Register::new(stamp, one_value()) };
        assert_eq!(b.merge(&record), merged, "{ahead} ms ahead");
    }
    assert_eq!(b.replica.last_time(), Hlc::at(TODAY + 1_000));
}

#[test]
fn what_peers_took_while_clocks_were_ahead_together_keeps_its_stamp_and_holds_up_no_other_key() {
    let (mut a, mut b, mut c) = (One::new(1), One::new(2), One::new(3));
    (a.now, b.now) = (at(TODAY + HOUR), at(TODAY + HOUR));
    let taken = a.put("k", "1");
    assert_eq!(b.merge(&taken), Merged::Applied);
    sync(&mut a, &mut b, false);
    // Both clocks are set right.
    (a.now, b.now, c.now) = (at(TODAY + 10), at(TODAY + 10), at(TODAY + 10));
    for one in [&mut a, &mut b] {
        assert!(!one.replica.must_mend(one.now));
        let other = one.put(&format!("other.{}", one.id), "1");
        assert_eq!(other.register.stamp.time.millis(), TODAY + 10, "it follows a clock that was off");
        assert_eq!(c.merge(&other), Merged::Applied);
    }
    // What is written of that key is above it, where it was taken; it is not shifted below it.
    let next = a.put("k", "2");
    assert!(next.register.is_above(&taken.register) && next.register.stamp.time.millis() == TODAY + HOUR);
    assert!(!a.replica.must_mend(a.now));
    assert_eq!((b.merge(&next), b.value("k").as_deref()), (Merged::Applied, Some("2")));
    assert_eq!((c.merge(&taken), c.merge(&next)), (Merged::Refused, Merged::Refused));
    let last = b.delete("k");
    assert!(matches!(last, Outcome::Deleted { count: 1, .. }));
    let deleted = b.record("k");
    assert_eq!((a.merge(&deleted), a.value("k")), (Merged::Applied, None));
    // Nothing leads further ahead by it.
    let stamp = Stamp { time: Hlc::at(TODAY + HOUR + 100), node: NodeId(2) };
    assert_eq!(a.merge(&Record { key: key("k"), register: Register::new(stamp, one_value()) }), Merged::Refused);
    pass(&mut [&mut a, &mut b, &mut c], HOUR);
    assert_eq!(c.merge(&deleted), Merged::Applied);
}

#[test]
fn a_write_over_one_that_a_peer_took_is_not_stamped_below_it() {
    let (mut a, mut b) = two();
    // Its clock is ahead by less than is refused, the peer's too; then further, and it is alone.
    (a.now, b.now) = (at(TODAY + HOUR), at(TODAY + HOUR));
    a.put("k", "1");
    sync(&mut a, &mut b, false);
    let taken = b.record("k").register;
    a.now = alone(TODAY + 5 * HOUR, a.now.steady + 10);
    a.put("k", "2");
    a.put("k", "3");
    (a.now, b.now) = (time(TODAY + 20, a.now.steady + 10), at(TODAY + 20));
    assert_eq!(mend(&mut a), 1);
    let anew = a.record("k").register;
    assert!(anew.is_above(&taken) && anew.stamp.time.millis() == TODAY + HOUR, "{anew:?}");
    sync(&mut a, &mut b, false);
    assert_eq!(b.value("k").as_deref(), Some("3"));
    assert_level(&a, &b);
}

#[test]
fn a_value_that_ended_is_stamped_anew_too_and_no_older_one_comes_back() {
    let (mut a, mut b) = two();
    a.put("k", "old");
    sync(&mut a, &mut b, false);
    let steady = a.now.steady;
    a.now = alone(TODAY + HOUR, steady + 1_000);
    a.put_for("k", "short", Some(400));
    a.now = alone(TODAY + HOUR + 500, steady + 1_500);
    a.plan(|replica, plan, now| replica.expire(plan, now, false, 1_000));
    assert_eq!(a.value("k"), None);
    (a.now, b.now) = (time(TODAY + 2_000, steady + 2_000), at(TODAY + 2_000));
    assert!(a.replica.must_mend(a.now));
    assert_eq!(mend(&mut a), 1);
    assert_eq!(a.record("k").register.stamp.time.millis(), TODAY + 1_000);
    sync(&mut a, &mut b, false);
    assert_eq!((a.value("k"), b.value("k")), (None, None));
    assert_level(&a, &b);

    // Nor where its stamp is right, and the clock went ahead after it.
    let (mut a, mut b) = two();
    a.put("k", "old");
    sync(&mut a, &mut b, false);
    a.put_for("k", "new", Some(2 * GRACE));
    a.now = alone(TODAY + HOUR, a.now.steady + 10);
    a.plan(|replica, plan, now| replica.expire(plan, now, false, 1_000));
    a.now = time(TODAY + 20, a.now.steady + 10);
    assert_eq!(mend(&mut a), 0);
    sync(&mut a, &mut b, false);
    assert_eq!(a.value("k"), None, "an older write came back");
}

#[test]
fn what_is_written_in_the_batch_that_stamps_anew_is_not_undone_by_it() {
    let (mut a, mut b) = two();
    a.now = alone(TODAY + HOUR, a.now.steady + 10);
    a.put("k", "1");
    a.now = time(TODAY + 20, a.now.steady + 10);
    let epoch = a.replica.epoch();
    let op = Op::Put { key: key("k"), value: "2".into(), options: PutOptions::default() };
    let values = a.values();
    let count = a.plan(|replica, plan, now| {
        replica.write(plan, epoch, &[op], false, now);
        replica.restamp(plan, now, &values)
    });
    assert_eq!((count, a.value("k").as_deref()), (1, Some("2")));
    let anew = a.record("k");
    assert_eq!((anew.register.stamp.time.millis(), b.merge(&anew)), (TODAY + 20, Merged::Applied));
}

#[test]
fn a_value_that_ended_early_by_a_wrong_clock_is_given_again() {
    let (mut a, mut b) = two();
    b.put_for("k", "1", Some(50_000));
    sync(&mut a, &mut b, false);
    assert_eq!(a.value("k").as_deref(), Some("1"));
    let right = b.now;
    b.now.wall += 60_000;
    b.expire();
    assert_eq!(b.value("k"), None);
    assert_level_digests(&a, &b);
    b.now = right;
    // Also after a restart: its end came after the contact, and it did not.
    b.restart();
    // Others do not take its word for it.
    let ended = b.record("k");
    assert_eq!(One::new(3).merge(&ended), Merged::Refused);
    assert!(b.replica.must_mend(b.now));
    b.expire();
    assert!(!b.replica.must_mend(b.now));
    assert_eq!(b.replica.contact(a.id), None);
    sync(&mut a, &mut b, false);
    assert_eq!((a.value("k").as_deref(), b.value("k").as_deref()), (Some("1"), Some("1")));
    pass(&mut [&mut a, &mut b], 50_000);
    assert_eq!((a.value("k"), b.value("k")), (None, None));
    assert_level(&a, &b);
}

fn assert_level_digests(a: &One, b: &One) {
    assert_eq!(a.replica.digest(Prefix::ROOT), b.replica.digest(Prefix::ROOT));
}

#[test]
fn what_a_restart_restores_is_what_was_there() {
    let (mut a, mut b) = two();
    for number in 0..40 {
        a.put_for(&format!("k.{number}"), "1", (number % 3 == 0).then_some(5_000));
    }
    a.delete("k.1");
    sync(&mut a, &mut b, false);
    pass(&mut [&mut a], 6_000);
    let (registers, digest) = (a.replica.registers(), a.replica.digest(Prefix::ROOT));
    let (place, contact, last) = (a.replica.place(), a.replica.contact(b.id), a.replica.last_time());
    a.restart();
    assert_eq!((a.replica.registers(), a.replica.digest(Prefix::ROOT)), (registers, digest));
    assert_eq!((a.replica.contact(b.id), a.replica.last_time()), (contact, last));
    assert_eq!(a.replica.place(), place);
    // Also where a contact came after the last tombstone was forgotten.
    pass(&mut [&mut a, &mut b], GRACE * 2);
    sync(&mut a, &mut b, false);
    let contact = a.replica.contact(b.id).unwrap();
    a.restart();
    assert_eq!(a.replica.contact(b.id), Some(contact));
    assert!(contact.own.leads_to(a.replica.place()));
}

#[test]
fn of_more_contacts_than_are_kept_the_oldest_is_forgotten_also_on_disk() {
    let mut a = One::new(1);
    let own = a.replica.place();
    let noted = |at: Millis| Contact { at: TODAY + at, own, peer: own };
    // Peers are numbered from the one that was met last. Half of them are noted in one batch.
    let half = CONTACTS_MAX as u64 / 2;
    for at in 0..half {
        a.plan(|replica, plan, _| replica.note_contact(plan, NodeId(2_000 - at), noted(at)));
    }
    a.plan(|replica, plan, _| {
        (half..2 * half).for_each(|at| replica.note_contact(plan, NodeId(2_000 - at), noted(at)));
    });
    assert_eq!(a.replica.contacts.len(), CONTACTS_MAX);
    a.plan(|replica, plan, _| {
        (2 * half..2 * half + 2).for_each(|at| replica.note_contact(plan, NodeId(2_000 - at), noted(at)));
        // One that is known already takes no room.
        replica.note_contact(plan, NodeId(1_500), noted(5_000));
    });
    for _ in 0..2 {
        assert_eq!(a.replica.contacts.len(), CONTACTS_MAX);
        assert_eq!((a.replica.contact(NodeId(2_000)), a.replica.contact(NodeId(1_999))), (None, None));
        assert_eq!(a.replica.contact(NodeId(1_998)), Some(noted(2)));
        assert_eq!(a.replica.contact(NodeId(1_500)), Some(noted(5_000)));
        a.restart();
    }
}

#[test]
fn a_comparison_in_pages_finds_what_one_in_whole_finds() {
    let (mut a, mut b) = two();
    for number in 0..200 {
        let record = a.put(&format!("k.{number}"), "1");
        if number % 2 == 0 {
            b.merge(&record);
        }
        if number % 5 == 0 {
            b.put(&format!("k.{number}"), "2");
        }
    }
    let theirs = b.replica.entries(Prefix::ROOT);
    let whole = a.replica.compare(Prefix::ROOT.hashes(), &theirs, None, usize::MAX);
    let (mut give, mut want, mut next) = (Vec::new(), Vec::new(), Some(0));
    while let Some(from) = next {
        let mut part = a.replica.compare((from, u64::MAX), &theirs, None, 7);
        give.append(&mut part.give);
        want.append(&mut part.want);
        next = part.next;
    }
    assert_eq!((give, want), (whole.give, whole.want));
}
