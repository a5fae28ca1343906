"""One client's side of the protocol, without sockets, threads or clocks.

A driver owns the socket. It reports what happens (`connection_made`, `received`, `connection_lost`, `tick`) with the time,
sends what `take_output` returns, and asks for no more before the socket has taken it. So a request that still waits here has not
been sent, and can be taken back.

Calls are not thread-safe: a driver with threads holds a lock.

Local subscriptions of one pattern share one subscription at the server, because the server knows a subscription by its client and
pattern. A local one that comes later has the server send the present state again. Those that have it already pass over what is not news.
"""

from __future__ import annotations

import random
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from . import _requests as requests
from ._errors import CannotConnect, Closed, Conflict, OtherEpoch, OutcomeUnknown, ProtocolError, Refused, Timeout
from ._keys import check_key, check_pattern, covering, covers, disjoint
from ._queue import EventQueue, Sink
from ._requests import Pending, Request, number, text, value_bytes
from ._types import GoneReason, Revision
from ._wire import Decoder, Message, encode

#: Bytes that are handed to the socket at once.
CHUNK = 64 * 1024
ANSWERS = frozenset(("Base", "Get", "List", "Trace", "Version", "Stats"))
FEATURES = ["reset", "exact", "names", "alive", "stale"]
#: A refused subscription that was accepted before is tried again after this number of seconds, if time may help.
RETRY = 1.0
CURABLE = frozenset((429, 500, 503, 507))


@dataclass
class Options:
    """What a client can be told. Times are in seconds."""

    #: The limit of a request, waiting for the connection included.
    timeout: float = 5.0
    #: The limit of one attempt to connect.
    connect_timeout: float = 5.0
    #: An idle connection is probed after so long. One without a sign of life for twice that counts as lost.
    heartbeat: float = 15.0
    #: The pauses between attempts to connect: the first, the longest.
    backoff_min: float = 0.05
    backoff_max: float = 5.0
    #: A connection that lived so long makes the next pause a short one again.
    lasted: float = 2.0
    #: A label for people, which the server shows.
    name: str | None = None


class Local:
    """A pattern of a subscription of the program."""

    def __init__(self, pattern: str, exact: bool, snapshot: bool, sink: Sink, *, wait_synced: bool) -> None:
        self.pattern = check_key(pattern) if exact else check_pattern(pattern)
        #: Those of the other patterns of its subscription, and itself. They end together.
        self.group = [self]
        self.exact = exact
        self.snapshot = snapshot
        self.sink = sink
        #: Done when the caller may rely on being notified.
        self.ready: Pending[None] = Pending()
        self.wait_synced = wait_synced or not snapshot
        #: The last revision of each key that it was notified of and that is not gone.
        self.known: dict[str, int] = {}
        # It waits for its snapshot; or the snapshot under way is for it.
        self.waiting = True
        self.filling = False

    def update(self, key: str, value: bytes, revision: Revision, skipped: int) -> None:
        if revision.number <= self.known.get(key, 0) or not covers(self.pattern, self.exact, key):
            return
        self.known[key] = revision.number
        if self.snapshot or self.ready.done:
            self.sink.update(key, value, revision, skipped)
        else:
            self.sink.hold(key)

    def gone(self, key: str, revision: Revision, reason: GoneReason, skipped: int) -> None:
        if self.known.pop(key, None) is not None and (self.snapshot or self.ready.done):
            self.sink.gone(key, revision, reason, skipped)

    def synced(self, seen: set[str], revision: Revision) -> None:
        """The snapshot of its pattern is complete: what is not in it is gone."""
        for key in [key for key in self.known if key not in seen]:
            self.gone(key, revision, "missed", 0)
        if self.filling:
            self.filling = False
            self.sink.synced(self.pattern, revision, not (self.snapshot or self.ready.done))
            self.ready.resolve(None)

    def interrupted(self) -> None:
        self.waiting, self.filling = True, False
        self.sink.lost(self.pattern)

    @classmethod
    def several(cls, patterns: str | Iterable[str], exact: bool, snapshot: bool) -> tuple[list[Local], EventQueue]:
        """Returns what subscribes to the patterns, and the one queue that they feed."""
        kept = disjoint(patterns, exact)
        queue = EventQueue(kept)
        group = [cls(pattern, exact, snapshot, queue, wait_synced=False) for pattern in kept]
        for local in group:
            local.group = group
        return group, queue

    def end(self, error: Exception | None) -> None:
        self.ready.fail(error or Closed("the subscription has ended"))
        self.sink.end(error)


@dataclass
class _Wire:
    """A subscription at the server."""

    pattern: str
    locals: list[Local] = field(default_factory=list)
    #: A request that is not answered yet.
    request: _Subscribe | None = None
    #: The server has accepted it on this connection, and its snapshot is complete.
    live: bool = False
    #: Changes up to this revision are in its snapshot.
    floor: int = 0
    seen: set[str] = field(default_factory=set)


class _Subscribe(Request[None]):
    def __init__(self, wire: _Wire, exact: bool) -> None:
        fields: dict[str, object] = {"type": "Subscribe", "key": wire.pattern, "snapshot": True}
        if exact:
            fields["exact"] = True
        super().__init__(fields, lambda message, epoch: None)
        self.wire = wire
        self.exact = exact


class Session:
    """The state of one client."""

    def __init__(self, options: Options, wake: Callable[[], None], now: float) -> None:
        self.options = options
        self.epoch: str | None = None
        # The highest revision that any message of the epoch had. The next server must have it too.
        self._seen: int | None = None
        self.closed = False
        #: Why there is no connection.
        self.last_error: Exception | None = None
        self._wake = wake
        self._client = f"nkv-py-{uuid.uuid4()}"
        self._outbox: deque[Request[Any]] = deque()
        self._given_up = 0
        self._inflight: deque[Request[Any]] = deque()
        self._next_id = 0
        self._wires: dict[str, _Wire] = {}
        self._snapshot: _Wire | None = None
        self._retries: list[tuple[float, _Wire]] = []
        # Of the present connection.
        self._decoder = Decoder()
        self._connected_at: float | None = None
        self._established = False
        self._features: frozenset[str] = frozenset()
        self._value_max: int | None = None
        self._patience = 0.0
        #: Since when what the server shows may be old, by its own word.
        self.stale_since: float | None = None
        self._life_at = now
        self._failures = 0
        self._status_of_peer: Exception | None = None

    @property
    def is_connected(self) -> bool:
        """Whether the server has greeted."""
        return self._established

    # What the program asks for.

    def submit(self, request: Request[Any]) -> None:
        """Takes a request, to be sent in its turn."""
        if self.closed:
            request.fail(Closed("the client is closed"))
            return
        self._outbox.append(request)
        if self._established:
            self._wake()

    def give_up(self, request: Request[Any]) -> Exception:
        """Ends a request that no caller waits for any more, and returns the error that says what is known of it."""
        if request.error is not None:
            return request.error
        error: Exception
        if not request.id:
            # It is still in the outbox, and never leaves it.
            error = self.not_sent()
            self._given_up += 1
        elif request.is_write:
            error = OutcomeUnknown("no answer in time; the request may have been done")
        else:
            error = Timeout("no answer in time")
        request.fail(error)
        request.payload = b""
        if self._given_up > 64 and self._given_up * 2 > len(self._outbox):
            self._outbox = deque(request for request in self._outbox if not request.done)
            self._given_up = 0
        return error

    def not_sent(self) -> Exception:
        """Returns the error of what could not be done in time, and was not begun."""
        if not self._established and self.last_error is not None:
            return CannotConnect(f"no connection in time: {self.last_error}")
        return Timeout("no answer in time")

    def subscribe(self, local: Local) -> None:
        """Adds a subscription. It lives until `unsubscribe`."""
        if self.closed:
            local.end(Closed("the client is closed"))
            return
        wire = self._wires.setdefault(local.pattern, _Wire(local.pattern))
        wire.locals.append(local)
        if self._established:
            self._ask_for(wire, local)

    def unsubscribe(self, local: Local) -> None:
        """Ends a subscription."""
        wire = self._wires.get(local.pattern)
        if wire is not None and local in wire.locals:
            wire.locals.remove(local)
            if not wire.locals:
                del self._wires[local.pattern]
                was_sent = wire.live or wire is self._snapshot or (wire.request is not None and wire.request.id > 0)
                if self._established and was_sent:
                    self._outbox.append(Request({"type": "Unsubscribe", "key": wire.pattern}, lambda message, epoch: None))
                    self._wake()
        local.end(None)

    def close(self) -> None:
        """Ends everything that is waited for."""
        if self.closed:
            return
        self.closed = True
        self._established = False
        self._connected_at = self.stale_since = None
        for request in self._outbox:
            request.fail(Closed("the client was closed; the request was not sent"))
        for request in self._inflight:
            request.fail(OutcomeUnknown("the client was closed; the request may have been done") if request.is_write
                         else Closed("the client was closed"))
        self._outbox.clear()
        self._inflight.clear()
        wires, self._wires = self._wires, {}
        for wire in wires.values():
            for local in wire.locals:
                if local.ready.done:
                    local.sink.end(None)
                else:
                    local.end(Closed("the client was closed"))
        self._wake()

    # What happens to the connection.

    def connection_made(self, now: float) -> None:
        """There is a connection. It is of use once the server has answered the first request."""
        self._decoder = Decoder()
        self._connected_at = self._life_at = now
        self._status_of_peer = None
        fields: dict[str, object] = {"type": "Connect", "client_uuid": self._client, "values": "payload",
                                     "features": FEATURES}
        if self.options.name:
            fields["name"] = self.options.name
        if self.epoch and self._seen is not None:
            fields["seen"] = f"{self.epoch}-{self._seen}"

        def parse(message: Message, epoch: str) -> None:
            self._greeted(message.body)

        self._outbox.appendleft(Request(fields, parse))

    def connection_lost(self, error: Exception | None, now: float) -> float:
        """The connection, or the attempt to make one, is at an end. Returns the pause before the next attempt."""
        self.last_error = self._status_of_peer or error or ConnectionError("the server closed the connection")
        lasted = self._established and self._connected_at is not None and now - self._connected_at >= self.options.lasted
        self._failures = 0 if lasted else self._failures + 1
        if self._connected_at is not None:
            self._forget_connection()
        longest = min(self.options.backoff_max, self.options.backoff_min * 2.0 ** min(self._failures, 32))
        return longest * random.uniform(0.5, 1.0)

    def _forget_connection(self) -> None:
        was_established = self._established
        self._established, self._connected_at, self._snapshot = False, None, None
        self.stale_since = None
        self._retries.clear()
        again: list[Request[Any]] = []
        for request in self._inflight:
            if request.done or isinstance(request, _Subscribe) or request.fields["type"] in ("Connect", "Unsubscribe"):
                continue
            if request.is_write:
                request.fail(OutcomeUnknown(f"the connection was lost ({self.last_error}); the request may have been done"))
            else:
                request.id = 0
                again.append(request)
        self._inflight.clear()
        waiting = [request for request in self._outbox if not isinstance(request, _Subscribe)
                   and request.fields["type"] not in ("Connect", "Unsubscribe")]
        self._outbox = deque(again + waiting)
        for wire in self._wires.values():
            wire.request, wire.live = None, False
            if was_established:
                for local in wire.locals:
                    local.interrupted()

    def take_output(self, now: float) -> bytes:
        """Returns what is to be sent now. All of it counts as sent."""
        if self._connected_at is None:
            return b""
        parts: list[bytes] = []
        length = 0
        while self._outbox and length < CHUNK:
            request = self._outbox[0]
            if not self._established and (request.fields["type"] != "Connect" or parts):
                break
            self._outbox.popleft()
            if request.done:
                self._given_up = max(0, self._given_up - 1)
                continue
            if isinstance(request, _Subscribe) and request.wire.request is not request:
                continue
            if error := self._objection(request):
                request.fail(error)
                continue
            self._next_id += 1
            request.id = self._next_id
            part = encode({**request.fields, "id": request.id}, request.payload)
            if request.is_write:
                request.payload = b""
            if not self._inflight:
                self._life_at = max(self._life_at, now)
            self._inflight.append(request)
            parts.append(part)
            length += len(part)
        return b"".join(parts)

    def _objection(self, request: Request[Any]) -> Exception | None:
        """Why this connection is not asked at all."""
        if request.condition is not None and request.condition.epoch != self.epoch:
            return OtherEpoch()
        if self._value_max is not None and request.payload is not None and len(request.payload) > self._value_max:
            return Refused(413, f"the value has {len(request.payload)} bytes; the limit of the server is {self._value_max}")
        return None

    def received(self, data: bytes, now: float) -> None:
        """Takes bytes of the server. An error means that the connection is to be closed."""
        self._life_at = now
        for message in self._decoder.feed(data):
            self._message(message, now)

    def next_tick(self, now: float) -> float:
        """Returns after how many seconds `tick` is to be called, if nothing else happens."""
        if self._connected_at is None:
            return 60.0
        if not self._established:
            until = self._connected_at + self.options.connect_timeout
        else:
            until = self._life_at + (self._dead_after() if self._inflight else self.options.heartbeat)
        for when, _ in self._retries:
            until = min(until, when)
        return max(0.0, until - now)

    def _dead_after(self) -> float:
        return max(2 * self.options.heartbeat, self._patience or self.options.timeout)

    def tick(self, now: float) -> None:
        """Looks at the time. An error means that the connection is to be closed."""
        if self._connected_at is None:
            return
        if not self._established:
            if now >= self._connected_at + self.options.connect_timeout:
                raise ConnectionError("the server does not answer")
            return
        if self._inflight:
            if now >= self._life_at + self._dead_after():
                raise ConnectionError("no sign of life of the server")
        elif now >= self._life_at + self.options.heartbeat and not self._outbox:
            self.submit(requests.health())
        due = [wire for when, wire in self._retries if when <= now]
        self._retries = [(when, wire) for when, wire in self._retries if when > now]
        for wire in due:
            if self._wires.get(wire.pattern) is wire and wire.request is None and wire.locals:
                self._send_subscribe(wire)

    # What the server says.

    def _greeted(self, body: dict[str, Any]) -> None:
        epoch = text(body, "epoch")
        features = body.get("features")
        self._features = frozenset(f for f in features if isinstance(f, str)) if isinstance(features, list) else frozenset()
        self._value_max = number(body, "max_value") if "max_value" in body else None
        self._patience = number(body, "patience_ms") / 1000 if "patience_ms" in body else 0.0
        if body.get("begins_anew") is True or epoch != self.epoch:
            # Revisions begin again: everything is news.
            self._seen = None
            for wire in self._wires.values():
                for local in wire.locals:
                    local.known = dict.fromkeys(local.known, 0)
        self.epoch = epoch
        self._established = True
        self.last_error = None
        for wire in list(self._wires.values()):
            self._send_subscribe(wire, first=True)
        self._wake()

    def _message(self, message: Message, now: float) -> None:
        kind, body = message.kind, message.body
        self._note_seen(body)
        if kind == "Update":
            self._update(message)
        elif kind in ANSWERS:
            self._answer(message, now)
        elif kind == "Hello":
            request = self._inflight.popleft() if self._inflight else None
            if not isinstance(request, _Subscribe):
                raise ProtocolError("a Hello that was not asked for")
            self._hello(request)
        elif kind == "Close":
            reason = body.get("reason")
            if reason == "deleted" or reason == "expired":
                self._gone(message, reason)
            elif reason == "unsubscribed" or reason == "replaced":
                self._ended(text(body, "key"))
        elif kind == "Stale":
            self.stale_since = now - number(body, "since_ms") / 1000 if "since_ms" in body else None
        elif kind == "Synced":
            self._synced(text(body, "key"), number(body, "revision"))
        elif kind == "Reset":
            wire = self._wires.get(text(body, "key"))
            if wire is not None and (wire.live or wire is self._snapshot):
                for local in wire.locals:
                    if not local.waiting:
                        local.filling = True
                        local.sink.lost(local.pattern)
                self._begin_snapshot(wire)
            else:
                self._begin_snapshot(_Wire(text(body, "key")))

    def _note_seen(self, body: dict[str, Any]) -> None:
        revisions = body.get("revisions")
        for revision in (body.get("revision"), *(revisions if isinstance(revisions, list) else ())):
            if isinstance(revision, int) and not isinstance(revision, bool) and revision >= (self._seen or 0):
                self._seen = revision

    def _answer(self, message: Message, now: float) -> None:
        body = message.body
        status = number(body, "status")
        words = text(body, "message")
        if not self._inflight or body.get("id") != self._inflight[0].id:
            if body.get("id") == "" and status >= 400:
                # It is about the connection, which is closed next.
                self._status_of_peer = Refused(status, words)
                raise ConnectionError(f"{status}: {words}")
            raise ProtocolError("an answer to no request")
        request = self._inflight.popleft()
        if isinstance(request, _Subscribe):
            self._subscribe_refused(request, Refused(status, words), now)
        elif status == 200:
            # Also of one that was given up, so that a peer that talks nonsense is found out.
            result = request.parse(message, self.epoch or "")
            request.resolve(result)
        elif request.fields["type"] == "Connect":
            self._status_of_peer = Refused(status, words)
            raise ConnectionError(f"{status}: {words}")
        elif status == 404:
            request.resolve(request.absent)
        elif status == 409:
            revision = number(body, "revision") if "revision" in body else 0
            request.fail(Conflict(Revision(revision, self.epoch or "") if revision else None))
        else:
            request.fail(Refused(status, words))

    def _revision(self, body: dict[str, Any]) -> Revision:
        return Revision(number(body, "revision"), self.epoch or "")

    def _told(self, key: str, revision: int) -> list[Local]:
        """The subscriptions that a change is news to, outside a snapshot."""
        found: list[Local] = []
        for pattern in covering(key):
            wire = self._wires.get(pattern)
            if wire is not None and wire.live and revision > wire.floor:
                found += (local for local in wire.locals if not local.waiting)
        return found

    def _update(self, message: Message) -> None:
        body = message.body
        key, revision = text(body, "key"), self._revision(body)
        value = value_bytes(message, body.get("value"))
        skipped = number(body, "skipped") if "skipped" in body else 0
        wire = self._snapshot
        if wire is None:
            told = self._told(key, revision.number)
        else:
            wire.seen.add(key)
            told = [local for local in wire.locals if not local.waiting]
        for local in told:
            local.update(key, value, revision, skipped)

    def _gone(self, message: Message, reason: GoneReason) -> None:
        body = message.body
        key, revision = text(body, "key"), self._revision(body)
        skipped = number(body, "skipped") if "skipped" in body else 0
        for local in self._told(key, revision.number):
            local.gone(key, revision, reason, skipped)

    # Subscriptions at the server.

    def _ask_for(self, wire: _Wire, local: Local) -> None:
        request = wire.request
        if request is not None and (local.exact or not request.exact):
            return  # the answer is to come, and a snapshot with it
        self._send_subscribe(wire)

    def _send_subscribe(self, wire: _Wire, first: bool = False) -> None:
        exact = all(local.exact for local in wire.locals) and "exact" in self._features
        wire.request = _Subscribe(wire, exact)
        if first:
            self._outbox.appendleft(wire.request)
        else:
            self._outbox.append(wire.request)
            self._wake()

    def _begin_snapshot(self, wire: _Wire) -> None:
        wire.live, wire.floor, wire.seen = False, 0, set()
        self._snapshot = wire

    def _hello(self, request: _Subscribe) -> None:
        wire = request.wire
        if wire.request is request:
            wire.request = None
        self._begin_snapshot(wire)
        for local in wire.locals:
            if local.waiting and (local.exact or not request.exact):
                local.waiting, local.filling = False, True
                if not local.wait_synced:
                    local.ready.resolve(None)

    def _synced(self, pattern: str, revision: int) -> None:
        wire = self._snapshot
        if wire is None or wire.pattern != pattern:
            raise ProtocolError("a Synced without a snapshot")
        self._snapshot = None
        wire.live, wire.floor = True, revision
        seen, wire.seen = wire.seen, set()
        for local in wire.locals:
            if not local.waiting:
                local.synced(seen, Revision(revision, self.epoch or ""))

    def _ended(self, pattern: str) -> None:
        """The subscription at the server has ended: because we replaced or ended it, or another client did."""
        if self._snapshot is not None and self._snapshot.pattern == pattern:
            self._snapshot.seen = set()
            self._snapshot = None
        for request in self._inflight:
            if request.fields.get("key") == pattern and request.fields["type"] in ("Subscribe", "Unsubscribe"):
                return
        if wire := self._wires.pop(pattern, None):
            for local in wire.locals:
                self._end(local, Closed("another client ended the subscription"))

    def _end(self, local: Local, error: Exception) -> None:
        """Ends a subscription that was taken from its wire, with its other patterns."""
        local.end(error)
        for other in local.group:
            if other is not local:
                other.ready.fail(error)
                self.unsubscribe(other)

    def _subscribe_refused(self, request: _Subscribe, error: Refused, now: float) -> None:
        wire = request.wire
        if wire.request is not request:
            return
        wire.request = None
        for local in list(wire.locals):
            if not local.ready.done or error.status not in CURABLE:
                wire.locals.remove(local)
                self._end(local, error)
        if wire.locals:
            self._retries.append((now + RETRY, wire))
        elif self._wires.get(wire.pattern) is wire:
            del self._wires[wire.pattern]

