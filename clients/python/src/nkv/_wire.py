"""Messages as bytes: one JSON value on a line, and a payload behind it if the value has a length."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ._errors import ProtocolError

#: The longest line or payload that is accepted. A server sends at most 64 MiB of payload.
MESSAGE_LEN_MAX = 68 * 1024 * 1024


class Message(NamedTuple):
    """A message of the server."""

    kind: str
    body: dict[str, Any]
    payload: bytes


def encode(fields: Mapping[str, object], payload: bytes | None) -> bytes:
    """Returns a request as it is sent."""
    line = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    return line + b"\n" if payload is None else b"".join((line, b"\n", payload, b"\n"))


class Decoder:
    """Takes bytes as they come and gives whole messages."""

    def __init__(self, len_max: int = MESSAGE_LEN_MAX) -> None:
        self._len_max = len_max
        self._buffer = bytearray()
        self._searched = 0
        # The message whose payload has not come yet, and the length of that.
        self._head: tuple[str, dict[str, Any], int] | None = None

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yields the messages that are whole with these bytes. Raises `ProtocolError`; then nothing more is to be fed."""
        self._buffer += data
        at = 0
        try:
            while True:
                if self._head is not None:
                    kind, body, length = self._head
                    if len(self._buffer) - at < length + 1:
                        return
                    payload = bytes(memoryview(self._buffer)[at:at + length])
                    if self._buffer[at + length] != 10:
                        raise ProtocolError("no newline after a payload")
                    at += length + 1
                    self._searched = at
                    self._head = None
                    yield Message(kind, body, payload)
                    continue
                end = self._buffer.find(b"\n", max(at, self._searched))
                if end < 0:
                    self._searched = len(self._buffer)
                    if self._searched - at > self._len_max:
                        raise ProtocolError(f"a line of more than {self._len_max} bytes")
                    return
                line = bytes(memoryview(self._buffer)[at:end])
                at = self._searched = end + 1
                if not line.strip():
                    continue
                kind, body = _parse(line)
                announced = body.get("len")
                if isinstance(announced, int) and not isinstance(announced, bool):
                    if not 0 <= announced <= self._len_max:
                        raise ProtocolError(f"a payload of {announced} bytes")
                    self._head = (kind, body, announced)
                else:
                    yield Message(kind, body, b"")
        finally:
            del self._buffer[:at]
            self._searched -= at


def _parse(line: bytes) -> tuple[str, dict[str, Any]]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise ProtocolError(f"not JSON: {line[:40]!r}") from None
    if isinstance(value, str):
        return value, {}
    if isinstance(value, dict) and len(value) == 1:
        kind, body = next(iter(value.items()))
        return kind, body if isinstance(body, dict) else {}
    raise ProtocolError(f"not a message of nkv: {line[:40]!r}")
