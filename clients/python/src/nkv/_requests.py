"""Requests: what is sent for each call, and what its answer means."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any, Generic, TypeVar, Union

from ._errors import ProtocolError
from ._keys import check_key, check_pattern
from ._types import Entry, Listed, Page, Revision, Stats
from ._wire import Message

T = TypeVar("T")
B = TypeVar("B", bound="Batch")
Value = Union[bytes, bytearray, memoryview, str]
#: A condition: the key is at this revision; 0: it is absent.
Condition = Union[Revision, int, None]

Parse = Callable[[Message, str], T]


class Pending(Generic[T]):
    """Something that is waited for. `notify` is called once, when it is done."""

    def __init__(self) -> None:
        self.done = False
        self.error: Exception | None = None
        self.notify: Callable[[], None] | None = None
        self._result: T | None = None

    def resolve(self, result: T) -> None:
        self._finish(result, None)

    def fail(self, error: Exception) -> None:
        self._finish(None, error)

    def outcome(self) -> T:
        """Returns the result, or raises the error."""
        if self.error is not None:
            raise self.error
        return self._result  # type: ignore[return-value]

    def _finish(self, result: T | None, error: Exception | None) -> None:
        if not self.done:
            self.done, self._result, self.error = True, result, error
            if self.notify is not None:
                self.notify()


class Request(Pending[T]):
    """A request and what becomes of it."""

    def __init__(self, fields: dict[str, object], parse: Parse[T], *, absent: T | None = None, is_write: bool = False,
                 payload: bytes | None = None, condition: Revision | None = None) -> None:
        super().__init__()
        self.fields = fields
        self.payload = payload
        self.parse = parse
        #: The result if the answer is 404.
        self.absent = absent
        #: Whether it may change something, so that it is not to be sent again.
        self.is_write = is_write
        self.condition = condition
        self.id = 0


def number(body: dict[str, Any], field: str) -> int:
    """Returns a field that must be a whole number."""
    value = body.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ProtocolError(f"'{field}' is not a number")
    return value


def text(body: dict[str, Any], field: str) -> str:
    """Returns a field that must be a text."""
    value = body.get(field)
    if not isinstance(value, str):
        raise ProtocolError(f"'{field}' is not a text")
    return value


def value_bytes(message: Message, value: object) -> bytes:
    """Returns a value in whichever form it came."""
    if value is None:
        return message.payload
    try:
        if isinstance(value, list):
            return bytes(value)
        if isinstance(value, str):
            return value.encode("utf-8")
    except (ValueError, TypeError):
        pass
    raise ProtocolError("not a value")


def _add_condition(fields: dict[str, object], if_revision: Condition) -> Revision | None:
    if if_revision is None:
        return None
    if isinstance(if_revision, Revision):
        fields["if_revision"] = if_revision.number
        return if_revision
    if if_revision != 0 or isinstance(if_revision, bool):
        raise ValueError("'if_revision' is a Revision, or 0 for an absent key")
    fields["if_revision"] = 0
    return None


def put(key: str, value: Value, if_revision: Condition, ttl: float | None) -> Request[Revision]:
    data = value.encode("utf-8") if isinstance(value, str) else bytes(memoryview(value))
    fields: dict[str, object] = {"type": "Put", "key": check_key(key), "len": len(data)}
    condition = _add_condition(fields, if_revision)
    if ttl is not None:
        if not 0.001 <= ttl < 1 << 50:
            raise ValueError("'ttl' is in seconds, and at least 0.001")
        fields["ttl_ms"] = round(ttl * 1000)

    def parse(message: Message, epoch: str) -> Revision:
        return Revision(number(message.body, "revision"), epoch)

    return Request(fields, parse, is_write=True, payload=data, condition=condition)


def delete(pattern: str, if_revision: Condition) -> Request[int]:
    fields: dict[str, object] = {"type": "Delete", "key": check_pattern(pattern)}
    if if_revision is not None:
        check_key(pattern)
    condition = _add_condition(fields, if_revision)
    return Request(fields, lambda message, epoch: number(message.body, "count"), absent=0, is_write=True,
                   condition=condition)


def _entries(message: Message, epoch: str) -> tuple[list[Entry], bool]:
    body = message.body
    keys, revisions = body.get("keys"), body.get("revisions")
    if not isinstance(keys, list) or not isinstance(revisions, list):
        raise ProtocolError("a Get without keys")
    values: list[bytes] = []
    if "lens" in body and isinstance(body["lens"], list):
        at = 0
        for length in body["lens"]:
            if not isinstance(length, int) or length < 0:
                raise ProtocolError("'lens' are not numbers")
            values.append(message.payload[at:at + length])
            at += length
        if at != len(message.payload):
            raise ProtocolError("'lens' are not those of the values")
    elif isinstance(body.get("data"), list):
        values = [value_bytes(message, value) for value in body["data"]]
    if not len(keys) == len(revisions) == len(values):
        raise ProtocolError("a Get whose arrays differ in length")
    entries = []
    for key, value, revision in zip(keys, values, revisions):
        if not isinstance(key, str) or not isinstance(revision, int):
            raise ProtocolError("a Get with keys of another type")
        entries.append(Entry(key, value, Revision(revision, epoch)))
    return entries, body.get("more") is True


def get(key: str) -> Request[Entry | None]:
    def parse(message: Message, epoch: str) -> Entry | None:
        entries, _ = _entries(message, epoch)
        if len(entries) != 1 or entries[0].key != key:
            raise ProtocolError("an answer to another request")
        return entries[0]

    return Request({"type": "Get", "key": check_key(key)}, parse)


def get_page(pattern: str, limit: int, after: str) -> Request[tuple[list[Entry], bool]]:
    fields: dict[str, object] = {"type": "Get", "key": check_pattern(pattern), "limit": _limit(limit)}
    if after:
        fields["after"] = check_key(after)
    return Request(fields, _entries, absent=([], False))


def list_page(pattern: str, limit: int, after: str) -> Request[Page]:
    fields: dict[str, object] = {"type": "List", "key": check_pattern(pattern), "limit": _limit(limit)}
    if after:
        fields["after"] = check_key(after)

    def parse(message: Message, epoch: str) -> Page:
        keys, revisions = message.body.get("keys"), message.body.get("revisions")
        if not isinstance(keys, list) or not isinstance(revisions, list) or len(keys) != len(revisions):
            raise ProtocolError("a List without keys")
        listed = tuple(Listed(key, Revision(revision, epoch)) for key, revision in zip(keys, revisions))
        return Page(listed, message.body.get("more") is True)

    return Request(fields, parse)


def _limit(limit: int) -> int:
    if limit < 1:
        raise ValueError("a page has at least one key")
    return min(limit, 10_000)


def exists(pattern: str) -> Request[bool]:
    return Request({"type": "Exists", "key": check_pattern(pattern)}, lambda message, epoch: True, absent=False)


def stats() -> Request[Stats]:
    def parse(message: Message, epoch: str) -> Stats:
        body = message.body
        if message.kind != "Stats":
            raise ProtocolError("an answer to another request")
        names = [field.name for field in dataclasses.fields(Stats)][2:]
        # What a server does not count is 0.
        return Stats(text(body, "epoch"), text(body, "durability"), *(number(body, name) if name in body else 0 for name in names))

    return Request({"type": "Stats"}, parse)


def conflict_pause(conflicts: int) -> float:
    """Returns a random part of a span that doubles with each conflict, so that those who met once do not meet again."""
    return random.uniform(0, min(0.001 * 2.0 ** min(conflicts, 7), 0.128))


def health() -> Request[None]:
    return Request({"type": "Health"}, lambda message, epoch: None)


class Batch:
    """The requests of a pipeline, until they are sent."""

    def __init__(self) -> None:
        self._batch: list[Request[Any]] = []

    def __len__(self) -> int:
        return len(self._batch)

    def put(self: B, key: str, value: Value, *, if_revision: Condition = None, ttl: float | None = None) -> B:
        self._batch.append(put(key, value, if_revision, ttl))
        return self

    def get(self: B, key: str) -> B:
        self._batch.append(get(key))
        return self

    def delete(self: B, pattern: str, *, if_revision: Condition = None) -> B:
        self._batch.append(delete(pattern, if_revision))
        return self

    def exists(self: B, pattern: str) -> B:
        self._batch.append(exists(pattern))
        return self

    def _take(self) -> list[Request[Any]]:
        """Returns the requests, and is empty then."""
        batch, self._batch = self._batch, []
        return batch


class Paging:
    """The state of reading a branch page by page. A page that is too large is asked for again with fewer keys."""

    def __init__(self, pattern: str, page: int) -> None:
        self._pattern, self._page, self._after = check_pattern(pattern), _limit(page), ""
        self.more = True

    def request(self) -> Request[tuple[list[Entry], bool]]:
        return get_page(self._pattern, self._page, self._after)

    def answered(self, entries: list[Entry], more: bool) -> None:
        self.more = more and bool(entries)
        if entries:
            self._after = entries[-1].key

    def too_large(self) -> bool:
        """Whether fewer keys can be asked for."""
        can, self._page = self._page > 1, max(1, self._page // 4)
        return can
