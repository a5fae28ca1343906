"""The protocol without sockets: bytes in, bytes and events out."""

from __future__ import annotations

import json
import random
import unittest
from typing import Any

from tests import stage as _  # noqa: F401  (puts the checkout on the path)

import nkv
from nkv import _requests as requests
from nkv._keys import check_key, check_pattern, covering, covers
from nkv._queue import EventQueue, State
from nkv._session import Local, Options, Session
from nkv._types import Address
from nkv._wire import Decoder, encode

EPOCH, OTHER = "0" * 32, "1" * 32


def message(kind: str, **body: Any) -> bytes:
    return json.dumps({kind: body}).encode() + b"\n"


def update(key: str, value: bytes, revision: int, skipped: int = 0) -> bytes:
    return message("Update", key=key, len=len(value), revision=revision, skipped=skipped) + value + b"\n"


def gone(key: str, revision: int, reason: str = "deleted") -> bytes:
    return message("Close", key=key, revision=revision, skipped=0, reason=reason)


def synced(pattern: str, revision: int, epoch: str = EPOCH) -> bytes:
    return message("Synced", key=pattern, revision=revision, epoch=epoch)


HELLO = b'"Hello"\n'


class Wire:
    """A session and the server's side of its connection, as bytes."""

    def __init__(self, epoch: str = EPOCH, **options: Any) -> None:
        self.now = 1000.0
        self.session = Session(Options(**options), lambda: None, self.now)
        self.connect(epoch)

    def connect(self, epoch: str = EPOCH, **more: Any) -> str | None:
        """Greets, and returns what the client says that it has seen."""
        self.session.connection_made(self.now)
        (connect,) = self.sent()
        assert connect["type"] == "Connect"
        self.say(message("Base", id=connect["id"], status=200, message="No Error", epoch=epoch, max_value=100,
                         features=["exact", "reset", "alive"], patience_ms=1000, **more))
        return connect.get("seen")

    def reconnect(self, epoch: str = EPOCH, **more: Any) -> str | None:
        self.lose()
        return self.connect(epoch, **more)

    def lose(self) -> float:
        return self.session.connection_lost(None, self.now)

    def say(self, *parts: bytes) -> None:
        for part in parts:
            self.session.received(part, self.now)

    def sent(self) -> list[dict[str, Any]]:
        lines, data = [], self.session.take_output(self.now)
        while data:
            line, _, data = data.partition(b"\n")
            lines.append(json.loads(line))
            if "len" in lines[-1]:
                data = data[lines[-1]["len"] + 1:]
        return lines

    def several(self, *patterns: str, snapshot: bool = True) -> tuple[list[Local], EventQueue]:
        group, queue = Local.several(patterns, False, snapshot)
        for local in group:
            self.session.subscribe(local)
        return group, queue

    def subscribe(self, pattern: str, *, exact: bool = False, snapshot: bool = True) -> tuple[Local, EventQueue]:
        queue = EventQueue()
        local = Local(pattern, exact, snapshot, queue, wait_synced=False)
        self.session.subscribe(local)
        return local, queue


def events(queue: EventQueue) -> list[tuple[Any, ...]]:
    read: list[tuple[Any, ...]] = []
    while (event := queue.pop()) is not None:
        if isinstance(event, nkv.Update):
            read.append((event.key, event.value, event.skipped))
        elif isinstance(event, nkv.Gone):
            read.append((event.key, event.reason))
        else:
            read.append(("synced", event.revision.number))
    return read


class Framing(unittest.TestCase):
    MESSAGES = (HELLO + b"\r\n\n" + update("a", b"\n{}\n", 3) + synced("a", 3)
                + message("Get", id=1, status=200, message="No Error", lens=[0, 2], len=2, keys=["a", "b"], revisions=[1, 2])
                + b"xy\n" + b'"Alive"\n' + message("Later", len=3) + b"}\n{\n")

    def test_messages_come_whole_however_the_bytes_are_cut(self) -> None:
        whole = list(Decoder().feed(self.MESSAGES))
        self.assertEqual([m.kind for m in whole], ["Hello", "Update", "Synced", "Get", "Alive", "Later"])
        self.assertEqual(whole[1].payload, b"\n{}\n")
        for size in (1, 2, 3, 7, 64):
            decoder = Decoder()
            cut: list[Any] = []
            for at in range(0, len(self.MESSAGES), size):
                cut += decoder.feed(self.MESSAGES[at:at + size])
            self.assertEqual(cut, whole)

    def test_nonsense_is_a_protocol_error_and_nothing_else(self) -> None:
        seed = random.randrange(1 << 32)
        chance = random.Random(seed)
        for _ in range(3000):
            data = bytearray(self.MESSAGES)
            for _ in range(chance.randrange(1, 5)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            wire = Wire()
            wire.subscribe("a")
            wire.session.submit(requests.get("a"))
            wire.sent()
            try:
                wire.say(bytes(data))
            except (nkv.ProtocolError, ConnectionError):
                pass
            except Exception as error:
                self.fail(f"seed {seed}: {bytes(data)!r}: {error!r}")

    def test_what_is_too_long_is_refused(self) -> None:
        for data in (b"x" * 101, b'{"Update":{"len":101}}\n', b"[" * 100000 + b"\n", b"1" * 6000 + b"\n", b"{}\n", b"[]\n",
                     b'{"a":{},"b":{}}\n', b'{"Update":{"len":1}}\nxy'):
            with self.assertRaises(nkv.ProtocolError):
                list(Decoder(100 if data[:1] in b'x{' else 1 << 20).feed(data))

    def test_a_request_is_a_line_and_a_payload(self) -> None:
        self.assertEqual(encode({"key": "\u00e9\u2028", "len": 0}, b""), '{"key":"\u00e9\u2028","len":0}\n\n'.encode())
        self.assertEqual(encode({"key": "a"}, None), b'{"key":"a"}\n')


class Keys(unittest.TestCase):
    def test_keys(self) -> None:
        for key in ("a", "a.b", "-rf", "$(x)./", "\u00e9.\U0001f511", "k" * 1024, "\ufffd", "\u200b"):
            self.assertEqual(check_key(key), key)
        wrong: list[Any] = ["", ".", "a.", ".a", "a..b", "a b", "a\u00a0", "a\u3000", "a\x85", "a\x7f", "a\0", "*", "a.*", "k" * 1025,
                    "\u00e9" * 513, "a\ud800", "a\udcff", b"a", None]
        for key in wrong:
            with self.assertRaises(nkv.InvalidKey):
                check_key(key)

    def test_patterns(self) -> None:
        for pattern in ("*", "a.*", "a.b.*", "a"):
            check_pattern(pattern)
        for pattern in ("**", "a*", "*.a", "a.*.b", "*.*", "a.**", ".*"):
            with self.assertRaises(nkv.InvalidKey):
                check_pattern(pattern)

    def test_what_a_pattern_covers(self) -> None:
        keys = ["a", "a.b", "a.b.c", "a-b", "ab", "b"]
        for pattern, exact, covered in (("a", False, ["a", "a.b", "a.b.c"]), ("a", True, ["a"]), ("a.*", False, ["a.b", "a.b.c"]),
                                        ("*", False, keys), ("a.b", False, ["a.b", "a.b.c"])):
            self.assertEqual([key for key in keys if covers(pattern, exact, key)], covered)
            if not exact:
                self.assertEqual([key for key in keys if pattern in covering(key)], covered)

    def test_addresses(self) -> None:
        for text, host, port, path in (("h", "h", 4222, None), ("h:1", "h", 1, None), ("nkv://h:2/", "h", 2, None),
                                       ("[::1]:3", "::1", 3, None), ("[::1]", "::1", 4222, None), ("::1", "::1", 4222, None),
                                       ("unix:x y", "", 0, "x y"), ("/run/nkv", "", 0, "/run/nkv")):
            self.assertEqual(Address.parse(text), Address(host, port, path))
        for text in ("", ":1", "h:", "h:0", "h:65536", "h:x", "http://h", "h/x", "unix:", "[::1", "[::1]x", "h 1"):
            with self.assertRaises(nkv.InvalidAddress):
                Address.parse(text)


class Requests(unittest.TestCase):
    def test_a_request_that_was_given_up_before_it_was_sent_never_is(self) -> None:
        wire = Wire()
        put = requests.put("k", b"1", None, None)
        wire.session.submit(put)
        self.assertIsInstance(wire.session.give_up(put), nkv.Timeout)
        self.assertEqual(wire.sent(), [])

    def test_answers_after_one_that_was_given_up_reach_their_own_callers(self) -> None:
        wire = Wire()
        calls = [requests.exists("a"), requests.exists("b"), requests.exists("c")]
        for call in calls:
            wire.session.submit(call)
        ids = [sent["id"] for sent in wire.sent()]
        self.assertIsInstance(wire.session.give_up(calls[0]), nkv.Timeout)
        for number, status in zip(ids, (404, 200, 404)):
            wire.say(message("Base", id=number, status=status, message="x"))
        self.assertEqual([call.outcome() for call in calls[1:]], [True, False])

    def test_an_answer_to_another_request_ends_the_connection(self) -> None:
        wire = Wire()
        wire.session.submit(requests.exists("a"))
        wire.sent()
        with self.assertRaises(nkv.ProtocolError):
            wire.say(message("Base", id=77, status=200, message="x"))

    def test_reads_are_sent_again_and_writes_are_not(self) -> None:
        wire = Wire()
        get, put, later = requests.get("a"), requests.put("a", b"1", None, None), requests.put("b", b"2", None, None)
        wire.session.submit(get)
        wire.session.submit(put)
        self.assertEqual([sent["type"] for sent in wire.sent()], ["Get", "Put"])
        wire.session.submit(later)
        wire.lose()
        self.assertIsInstance(put.error, nkv.OutcomeUnknown)
        wire.connect()
        self.assertEqual([(sent["type"], sent["key"]) for sent in wire.sent()], [("Get", "a"), ("Put", "b")])

    def test_a_condition_of_another_epoch_is_not_sent(self) -> None:
        wire = Wire()
        put = requests.put("a", b"1", nkv.Revision(3, EPOCH), None)
        wire.lose()
        wire.session.submit(put)
        wire.connect(OTHER)
        self.assertEqual(wire.sent(), [])
        self.assertIsInstance(put.error, nkv.OtherEpoch)

    def test_zero_and_empty_are_sent_as_such(self) -> None:
        wire = Wire()
        wire.session.submit(requests.put("a", b"", 0, None))
        (sent,) = wire.sent()
        self.assertEqual((sent["if_revision"], sent["len"]), (0, 0))
        for wrong in (1, True, -1):
            with self.assertRaises(ValueError):
                requests.put("a", b"", wrong, None)

    def test_a_value_over_the_limit_of_the_server_is_not_sent(self) -> None:
        wire = Wire()
        put = requests.put("a", b"x" * 101, None, None)
        wire.session.submit(put)
        self.assertEqual(wire.sent(), [])
        self.assertEqual(getattr(put.error, "status", 0), 413)

    def test_an_error_about_the_connection_is_its_reason(self) -> None:
        wire = Wire()
        with self.assertRaises(ConnectionError):
            wire.say(message("Base", id="", status=503, message="too many connections"))
        wire.lose()
        get = requests.get("a")
        wire.session.submit(get)
        self.assertIsInstance(wire.session.give_up(get), nkv.CannotConnect)
        self.assertIn("too many connections", str(get.error))

    def test_a_silent_server_is_given_up_and_one_that_works_is_not(self) -> None:
        wire = Wire(heartbeat=1.0)
        wire.now += 1.0
        wire.session.tick(wire.now)
        self.assertEqual(wire.sent()[0]["type"], "Health")
        wire.now += 1.9
        wire.say(b'"Alive"\n')
        wire.now += 1.9
        wire.session.tick(wire.now)
        wire.now += 0.2
        with self.assertRaises(ConnectionError):
            wire.session.tick(wire.now)

    def test_the_client_knows_since_when_its_server_is_stale(self) -> None:
        wire = Wire()
        self.assertIsNone(wire.session.stale_since)
        wire.say(message("Stale", since_ms=1500))
        self.assertEqual(wire.session.stale_since, wire.now - 1.5)
        wire.say(b'{"Stale":{}}\n')
        self.assertIsNone(wire.session.stale_since)
        wire.say(message("Stale", since_ms=0))
        wire.reconnect()
        self.assertIsNone(wire.session.stale_since)

    def test_pauses_grow_until_a_connection_lasted(self) -> None:
        wire = Wire()
        pauses = []
        for _ in range(12):
            pauses.append(wire.lose())
            wire.connect()
        self.assertLess(pauses[0], 0.11)
        self.assertGreater(pauses[-1], 2.4)
        self.assertLessEqual(max(pauses), 5.0)
        wire.now += 2.5
        self.assertLess(wire.lose(), 0.051)

    def test_revisions_know_their_epoch(self) -> None:
        one = nkv.Revision(1, EPOCH)
        self.assertTrue(one < nkv.Revision(2, EPOCH))
        self.assertNotEqual(one, nkv.Revision(1, OTHER))
        self.assertEqual(nkv.Revision.parse(str(one)), one)
        with self.assertRaises(ValueError):
            _ = one < nkv.Revision(2, OTHER)


class Moves(unittest.TestCase):
    def test_the_highest_revision_of_any_message_is_seen(self) -> None:
        def answer(**body: Any) -> bytes:
            return message("Base", **{"id": 2, "status": 200, "message": "No Error", **body})

        for messages in ([answer(revision=9)], [answer(status=409, revision=9)], [answer(revision=3, revisions=[9, 2])],
                         [update("a", b"1", 9), answer(revision=7)], [gone("a", 9, "expired"), answer(revision=7)],
                         [message("Reset", key="a"), synced("a", 9), answer(revision=7)]):
            wire = Wire()
            put = requests.put("a", b"1", None, None)
            wire.session.submit(put)
            wire.sent()
            wire.say(*messages)
            self.assertTrue(put.done)
            self.assertEqual(wire.reconnect(), f"{EPOCH}-9", messages)

    def test_nothing_is_said_of_what_was_not_seen_or_is_of_another_epoch(self) -> None:
        wire = Wire()
        self.assertIsNone(wire.reconnect())
        wire.say(update("a", b"1", 9))
        self.assertEqual(wire.reconnect(OTHER), f"{EPOCH}-9")
        self.assertIsNone(wire.reconnect(OTHER))
        wire.say(update("a", b"1", 1))
        self.assertEqual(wire.reconnect(OTHER, begins_anew=True), f"{OTHER}-1")
        self.assertIsNone(wire.reconnect(OTHER))

    def test_where_the_data_begin_anew_everything_is_delivered_again(self) -> None:
        wire = Wire()
        _, queue = wire.subscribe("a")
        wire.sent()
        wire.say(HELLO, update("a.1", b"new", 5), update("a.2", b"new", 9), synced("a", 9))
        events(queue)
        wire.reconnect(begins_anew=True)
        wire.sent()
        wire.say(HELLO, update("a.1", b"old", 2), synced("a", 3))
        self.assertEqual(events(queue), [("a.1", b"old", 0), ("a.2", "missed"), ("synced", 3)])


class Subscriptions(unittest.TestCase):
    def test_a_snapshot_then_changes(self) -> None:
        wire = Wire()
        local, queue = wire.subscribe("a")
        self.assertEqual(wire.sent()[0]["snapshot"], True)
        self.assertFalse(local.ready.done)
        wire.say(HELLO)
        self.assertTrue(local.ready.done)
        wire.say(update("a", b"1", 5), update("a.b", b"2", 3), synced("a", 5), gone("a", 6), update("a.b", b"3", 7), gone("a.b", 7))
        self.assertEqual(events(queue), [("synced", 5)])

    def test_an_update_then_its_end_is_no_event_for_a_reader_that_had_neither(self) -> None:
        queue = EventQueue()
        queue.update("a", b"1", nkv.Revision(1, EPOCH), 0)
        queue.gone("a", nkv.Revision(2, EPOCH), "deleted", 0)
        self.assertEqual((len(queue), events(queue)), (0, []))

    def test_one_event_of_a_key_waits_and_counts_what_it_replaces(self) -> None:
        wire = Wire()
        _, queue = wire.subscribe("a")
        wire.sent()
        wire.say(HELLO, synced("a", 0))
        for revision in range(1, 101):
            wire.say(update("a.b", b"%d" % revision, revision, skipped=1))
        self.assertEqual(events(queue), [("synced", 0), ("a.b", b"100", 199)])
        wire.say(update("a.b", b"101", 101), gone("a.b", 102))
        self.assertEqual(events(queue), [("a.b", "deleted")])

    def test_what_was_missed_is_delivered_once(self) -> None:
        wire = Wire()
        _, queue = wire.subscribe("a")
        wire.sent()
        wire.say(HELLO, update("a.1", b"1", 1), update("a.2", b"2", 2), update("a.3", b"3", 3), synced("a", 3))
        events(queue)
        wire.lose()
        wire.connect()
        wire.sent()
        wire.say(HELLO, update("a.1", b"1", 1), update("a.3", b"9", 9), synced("a", 9))
        self.assertEqual(events(queue), [("a.3", b"9", 0), ("a.2", "missed"), ("synced", 9)])

    def test_a_snapshot_that_breaks_off_proves_nothing(self) -> None:
        wire = Wire()
        _, queue = wire.subscribe("a")
        wire.sent()
        wire.say(HELLO, update("a.1", b"1", 100), update("a.2", b"2", 99))
        wire.lose()
        wire.connect()
        wire.sent()
        wire.say(HELLO, update("a.1", b"1", 100), update("a.2", b"2", 99), update("a.3", b"3", 1), synced("a", 100))
        self.assertEqual(events(queue), [("a.1", b"1", 0), ("a.2", b"2", 0), ("a.3", b"3", 0), ("synced", 100)])

    def test_another_epoch_delivers_everything_anew(self) -> None:
        wire = Wire()
        _, queue = wire.subscribe("a")
        wire.sent()
        wire.say(HELLO, update("a.1", b"1", 50), update("a.2", b"2", 51), synced("a", 51))
        events(queue)
        wire.lose()
        wire.connect(OTHER)
        wire.sent()
        wire.say(HELLO, update("a.1", b"1", 1), synced("a", 1, OTHER))
        self.assertEqual(events(queue), [("a.1", b"1", 0), ("a.2", "missed"), ("synced", 1)])

    def test_without_snapshot_the_present_state_is_known_but_not_delivered(self) -> None:
        wire = Wire()
        local, queue = wire.subscribe("a", snapshot=False)
        wire.sent()
        wire.say(HELLO, update("a.1", b"1", 1), update("a.2", b"2", 2))
        self.assertFalse(local.ready.done)
        wire.say(synced("a", 2))
        self.assertTrue(local.ready.done)
        self.assertEqual(events(queue), [])
        wire.lose()
        wire.connect()
        wire.sent()
        wire.say(HELLO, update("a.2", b"3", 3), update("a.3", b"4", 4), synced("a", 5))
        self.assertEqual(events(queue), [("a.2", b"3", 0), ("a.3", b"4", 0), ("a.1", "missed"), ("synced", 5)])

    def test_a_second_subscription_of_a_pattern_gets_a_snapshot_of_its_own(self) -> None:
        wire = Wire()
        _, one = wire.subscribe("a")
        wire.sent()
        wire.say(HELLO, update("a", b"1", 1), synced("a", 1))
        events(one)
        _, two = wire.subscribe("a")
        self.assertEqual(wire.sent()[0]["type"], "Subscribe")
        wire.say(update("a.x", b"2", 2), message("Close", key="a", reason="replaced"), HELLO, update("a", b"1", 1),
                 update("a.x", b"2", 2), update("a.y", b"3", 3), synced("a", 3), update("a", b"4", 4))
        self.assertEqual(events(one), [("a.x", b"2", 0), ("a.y", b"3", 0), ("a", b"4", 0)])
        self.assertEqual(events(two), [("a", b"4", 1), ("a.x", b"2", 0), ("a.y", b"3", 0), ("synced", 3)])

    def test_a_branch_joins_an_exact_subscription(self) -> None:
        wire = Wire()
        _, one = wire.subscribe("a", exact=True)
        self.assertEqual(wire.sent()[0]["exact"], True)
        _, two = wire.subscribe("a")
        self.assertNotIn("exact", wire.sent()[0])
        wire.say(HELLO, update("a", b"1", 1), synced("a", 1))
        self.assertEqual(events(one), [("a", b"1", 0), ("synced", 1)])
        self.assertEqual(events(two), [])
        wire.say(message("Close", key="a", reason="replaced"), HELLO, update("a", b"1", 1), update("a.b", b"2", 2), synced("a", 2))
        self.assertEqual(events(one), [])
        self.assertEqual(events(two), [("a", b"1", 0), ("a.b", b"2", 0), ("synced", 2)])

    def test_updates_of_a_snapshot_belong_to_its_pattern(self) -> None:
        wire = Wire()
        _, one = wire.subscribe("a")
        wire.sent()
        wire.say(HELLO, synced("a", 0))
        _, two = wire.subscribe("a.*")
        wire.sent()
        wire.say(HELLO, update("a.b", b"1", 1), synced("a.*", 1), update("a.b", b"1", 1))
        self.assertEqual(events(one), [("synced", 0), ("a.b", b"1", 0)])
        self.assertEqual(events(two), [("a.b", b"1", 0), ("synced", 1)])

    def test_a_change_from_before_a_snapshot_is_no_news(self) -> None:
        wire = Wire()
        _, one = wire.subscribe("a")
        wire.sent()
        wire.say(HELLO, synced("a", 0))
        _, two = wire.subscribe("a.*")
        wire.sent()
        # What the backlog of the first still holds, the snapshot of the second has had.
        wire.say(HELLO, synced("a.*", 2), update("a.b", b"1", 1))
        self.assertEqual(events(one), [("synced", 0), ("a.b", b"1", 0)])
        self.assertEqual(events(two), [("synced", 2)])
        wire.say(gone("a.b", 2), update("a.b", b"3", 3))
        self.assertEqual(events(one), [("a.b", b"3", 1)])
        self.assertEqual(events(two), [("a.b", b"3", 0)])

    def test_a_reset_reports_what_is_gone(self) -> None:
        wire = Wire()
        _, queue = wire.subscribe("a")
        wire.sent()
        wire.say(HELLO, update("a.1", b"1", 1), update("a.2", b"2", 2), synced("a", 2))
        events(queue)
        wire.say(message("Reset", key="a"), update("a.2", b"2", 2), update("a.3", b"3", 3), synced("a", 4))
        self.assertEqual(events(queue), [("a.3", b"3", 0), ("a.1", "missed"), ("synced", 4)])

    def test_dropped_and_subscribed_again_at_once(self) -> None:
        wire = Wire()
        local, _ = wire.subscribe("a")
        wire.sent()
        wire.say(HELLO, update("a", b"old", 1))
        wire.session.unsubscribe(local)
        _, queue = wire.subscribe("a")
        unsubscribe, subscribe = wire.sent()
        self.assertEqual((unsubscribe["type"], subscribe["type"]), ("Unsubscribe", "Subscribe"))
        wire.say(update("a.b", b"old", 2), synced("a", 2), message("Close", key="a", reason="unsubscribed"),
                 message("Base", id=unsubscribe["id"], status=200, message="No Error"))
        self.assertEqual(events(queue), [])
        wire.say(HELLO, update("a", b"new", 3), synced("a", 3))
        self.assertEqual(events(queue), [("a", b"new", 0), ("synced", 3)])

    def test_a_refused_subscription_fails_at_first_and_is_tried_again_later(self) -> None:
        wire = Wire()
        local, _ = wire.subscribe("a")
        refusal = message("Base", id=wire.sent()[0]["id"], status=429, message="too many")
        wire.say(refusal)
        self.assertIsInstance(local.ready.error, nkv.Refused)
        local, queue = wire.subscribe("b")
        wire.sent()
        wire.say(HELLO, synced("b", 1))
        wire.lose()
        wire.connect()
        wire.say(message("Base", id=wire.sent()[0]["id"], status=429, message="too many"))
        self.assertFalse(queue.ended)
        wire.now += wire.session.next_tick(wire.now)
        wire.session.tick(wire.now)
        self.assertEqual(wire.sent()[0]["key"], "b")

    def test_several_patterns_are_synced_once_all_are_and_up_to_the_lowest_revision(self) -> None:
        wire = Wire()
        group, queue = wire.several("a.x", "b.*", "a", "b.y", "c", "a")
        self.assertEqual([local.pattern for local in group], ["b.*", "a", "c"])
        self.assertEqual([request["key"] for request in wire.sent()], ["b.*", "a", "c"])
        wire.say(HELLO, update("b.x", b"1", 5), synced("b.*", 5), HELLO, update("a", b"1", 7), synced("a", 7), HELLO)
        self.assertEqual(events(queue), [("b.x", b"1", 0), ("a", b"1", 0)])
        wire.say(synced("c", 8))
        self.assertEqual(events(queue), [("synced", 5)])
        wire.reconnect()
        for key in (request["key"] for request in wire.sent()):
            # The last part may lack anything.
            self.assertEqual([event for event in events(queue) if event[0] == "synced"], [])
            wire.say(HELLO, update(key[0] + ".x", b"2", 9), synced(key, 9))
        self.assertEqual(events(queue)[-1], ("synced", 9))

    def test_several_patterns_without_a_snapshot_are_synced_after_a_loss(self) -> None:
        wire = Wire()
        group, queue = wire.several("a", "b", snapshot=False)
        wire.sent()
        wire.say(HELLO, update("a", b"1", 1), synced("a", 1))
        self.assertFalse(all(local.ready.done for local in group))
        wire.say(HELLO, update("b", b"1", 2), synced("b", 2))
        self.assertTrue(all(local.ready.done for local in group))
        self.assertEqual(events(queue), [])
        wire.reconnect()
        keys = [request["key"] for request in wire.sent()]
        wire.say(*(part for key in keys for part in (HELLO, synced(key, 3))))
        self.assertEqual(sorted(events(queue)), [("a", "missed"), ("b", "missed"), ("synced", 3)])

    def test_several_patterns_begin_anew(self) -> None:
        wire = Wire()
        _, queue = wire.several("a", "b")
        wire.sent()
        wire.say(*(part for key in "ab" for part in (HELLO, update(key, b"1", 8), update(key + ".y", b"1", 9), synced(key, 9))))
        events(queue)
        wire.reconnect(begins_anew=True)
        for key in (request["key"] for request in wire.sent()):
            wire.say(HELLO, update(key, b"2", 2), synced(key, 3))
        self.assertEqual(sorted(events(queue)), [("a", b"2", 0), ("a.y", "missed"), ("b", b"2", 0), ("b.y", "missed"), ("synced", 3)])
        for key in "ab":
            wire.say(message("Reset", key=key), synced(key, 4))
        self.assertEqual(events(queue), [("a", "missed"), ("b", "missed"), ("synced", 4)])

    def test_with_one_of_several_patterns_the_subscription_ends(self) -> None:
        wire = Wire()
        _, queue = wire.several("a", "b", "c")
        wire.sent()
        wire.say(*(part for key in "abc" for part in (HELLO, synced(key, 1))), message("Close", key="a", reason="replaced"))
        self.assertIsInstance(queue.error, nkv.Closed)
        self.assertEqual([(request["type"], request["key"]) for request in wire.sent()],
                         [("Unsubscribe", "b"), ("Unsubscribe", "c")])

    def test_with_one_of_several_patterns_the_subscription_is_refused(self) -> None:
        wire = Wire()
        group, queue = wire.several("a", "b", "c")
        asked = wire.sent()
        wire.say(HELLO, synced("a", 1), message("Base", id=asked[1]["id"], status=429, message="too many"))
        self.assertEqual([type(local.ready.error) for local in group], [type(None), nkv.Refused, nkv.Refused])
        self.assertIsInstance(queue.error, nkv.Refused)
        self.assertEqual([(request["type"], request["key"]) for request in wire.sent()],
                         [("Unsubscribe", "a"), ("Unsubscribe", "c")])

    def test_several_patterns_are_checked(self) -> None:
        for wrong in ([], ["a", "b..c"], [1], b"a"):
            with self.assertRaises(nkv.InvalidKey):
                Local.several(wrong, False, True)  # type: ignore[arg-type]
        with self.assertRaises(nkv.InvalidKey):
            Local.several(["a", "b.*"], True, True)

    def test_a_watch_keeps_its_state_while_the_connection_is_lost(self) -> None:
        wire = Wire()
        state = State()
        wire.session.subscribe(Local("a", False, True, state, wait_synced=True))
        wire.sent()
        wire.say(HELLO, update("a.1", b"1", 1), update("a.2", b"2", 2), synced("a", 2))
        self.assertTrue(state.is_live)
        wire.lose()
        self.assertEqual((sorted(state.entries), state.is_live), (["a.1", "a.2"], False))
        wire.connect()
        wire.sent()
        wire.say(HELLO, update("a.2", b"3", 3), synced("a", 3))
        self.assertEqual(({k: e.value for k, e in state.entries.items()}, state.is_live), ({"a.2": b"3"}, True))


if __name__ == "__main__":
    unittest.main()
