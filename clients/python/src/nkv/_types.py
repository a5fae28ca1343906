"""The values that calls return and subscriptions deliver."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, Union

from ._errors import InvalidAddress


@dataclass(frozen=True)
class Revision:
    """When a key was last changed: a number that grows with each change of the store, and the epoch it belongs to.

    Revisions of two epochs are never equal, and comparing their order raises `ValueError`. `str` and `parse` turn
    one into text and back.
    """

    number: int
    epoch: str

    def _number_beside(self, other: Revision) -> int:
        if self.epoch != other.epoch:
            raise ValueError("revisions of two epochs cannot be compared")
        return other.number

    def __lt__(self, other: Revision) -> bool:
        return self.number < self._number_beside(other)

    def __le__(self, other: Revision) -> bool:
        return self.number <= self._number_beside(other)

    def __gt__(self, other: Revision) -> bool:
        return self.number > self._number_beside(other)

    def __ge__(self, other: Revision) -> bool:
        return self.number >= self._number_beside(other)

    def __str__(self) -> str:
        return f"{self.epoch}:{self.number}"

    @classmethod
    def parse(cls, text: str) -> Revision:
        """Returns the revision that `str` made this text of."""
        epoch, _, number = text.partition(":")
        if not epoch or not (number.isascii() and number.isdigit()):
            raise ValueError(f"not a revision: {text!r}")
        return cls(int(number), epoch)


@dataclass(frozen=True)
class Entry:
    """A key with its value."""

    key: str
    value: bytes
    revision: Revision

    @property
    def text(self) -> str:
        """The value as UTF-8 text."""
        return self.value.decode("utf-8")

    def json(self) -> Any:
        """The value read as JSON."""
        return json.loads(self.value)


@dataclass(frozen=True)
class Listed:
    """A key without its value."""

    key: str
    revision: Revision


@dataclass(frozen=True)
class Page:
    """Some keys of a branch. If `more` is true, others follow after the last one."""

    keys: tuple[Listed, ...]
    more: bool


@dataclass(frozen=True)
class Stats:
    """The figures of a server. Those from `puts` on are counted since its start."""

    #: That of the data.
    epoch: str
    #: What an answer to a write promises: `sync`, `interval:50ms`, `os` or `memory`.
    durability: str
    keys: int
    #: What all values take.
    value_bytes: int
    subscriptions: int
    connections: int
    #: The last revision that was given.
    revision: int
    #: For how many milliseconds the server has run.
    uptime_ms: int
    puts: int
    #: Keys that were deleted.
    deletes: int
    #: Keys whose time to live ended.
    expired: int
    #: Writes to storage.
    batches: int
    failed_batches: int
    #: Notifications.
    notified: int
    #: Changes that were passed over in favour of newer ones.
    conflated: int


GoneReason = Literal["deleted", "expired", "missed"]


@dataclass(frozen=True)
class Update:
    """A key has a new value, or had it when the subscription began."""

    key: str
    value: bytes
    revision: Revision
    #: How many changes of the key since the last one delivered were left out in favour of this one.
    skipped: int = 0

    @property
    def text(self) -> str:
        """The value as UTF-8 text."""
        return self.value.decode("utf-8")


@dataclass(frozen=True)
class Gone:
    """A key is gone: it was deleted, its time ended, or it went while the connection was lost (`missed`)."""

    key: str
    #: The revision of its end; if it was missed, one by which it was gone.
    revision: Revision
    reason: GoneReason
    skipped: int = 0


@dataclass(frozen=True)
class Synced:
    """Everything up to this revision has been delivered: after the present state, and again after each reconnect."""

    revision: Revision


Event = Union[Update, Gone, Synced]


@dataclass(frozen=True)
class Address:
    """Where a server listens: a host and port, or the path of a Unix socket."""

    host: str
    port: int
    path: str | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Understands `host`, `host:port`, `[::1]:port`, `nkv://host:port`, `unix:PATH` and `/PATH`."""
        if text.startswith("unix:") or text.startswith("/"):
            path = text[5:] if text.startswith("unix:") else text
            if not path or "\0" in path:
                raise InvalidAddress(f"not the path of a socket: {text!r}")
            return cls("", 0, path)
        rest = text[6:] if text.startswith("nkv://") else text
        if text.startswith("nkv://"):
            rest = rest.rstrip("/")
        if rest.startswith("["):
            host, bracket, port = rest[1:].partition("]")
            if not bracket or (port and not port.startswith(":")):
                raise InvalidAddress(f"not an address: {text!r}")
            port = port[1:] if port else "4222"
        elif rest.count(":") > 1:
            host, port = rest, "4222"
        else:
            host, colon, port = rest.partition(":")
            port = port if colon else "4222"
        if not host or any(c.isspace() or c in "/@?#" for c in host):
            raise InvalidAddress(f"not an address: {text!r}")
        if not (port.isascii() and port.isdigit()) or not 0 < int(port[:6]) < 65536:
            raise InvalidAddress(f"not a port: {text!r}")
        return cls(host, int(port))

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
