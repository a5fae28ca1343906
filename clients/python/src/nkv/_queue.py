"""Where the notifications of one subscription go: a queue that is read, or a state that is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, Union

from ._types import Entry, Event, Gone, GoneReason, Revision, Synced, Update


class Sink(Protocol):
    """Takes what a subscription is notified of. Nothing here waits."""

    notify: Callable[[], None]
    error: Exception | None
    ended: bool

    def hold(self, key: str) -> None: ...
    def update(self, key: str, value: bytes, revision: Revision, skipped: int) -> None: ...
    def gone(self, key: str, revision: Revision, reason: GoneReason, skipped: int) -> None: ...
    def synced(self, pattern: str, revision: Revision, is_silent: bool) -> None: ...
    def lost(self, pattern: str) -> None: ...
    def end(self, error: Exception | None) -> None: ...


def _nothing() -> None:
    return


class EventQueue:
    """Events of some patterns for one reader. At most one of each key waits: a newer one takes its place and counts what it replaces.

    So the queue is never longer than there are keys, present or known to the reader, and one `Synced`.
    """

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        self.notify: Callable[[], None] = _nothing
        self.error: Exception | None = None
        self.ended = False
        # The patterns whose snapshot is to come, and the revisions of those that had theirs.
        self._unsynced = set(patterns)
        self._floors: dict[str, int] = {}
        # In the order in which they are read. The key of `Synced` is `None`.
        self._events: dict[Union[str, None], Event] = {}
        # The keys that the reader takes for present.
        self._held: set[str] = set()

    def __len__(self) -> int:
        return len(self._events)

    def hold(self, key: str) -> None:
        """Notes that the reader takes this key for present, without an event."""
        self._held.add(key)

    def update(self, key: str, value: bytes, revision: Revision, skipped: int) -> None:
        self._put(key, Update(key, value, revision, skipped + self._replaced(key)))

    def gone(self, key: str, revision: Revision, reason: GoneReason, skipped: int) -> None:
        if key in self._held:
            self._put(key, Gone(key, revision, reason, skipped + self._replaced(key)))
        else:
            # It came and went while the reader was away.
            self._events.pop(key, None)

    def synced(self, pattern: str, revision: Revision, is_silent: bool) -> None:
        self._unsynced.discard(pattern)
        self._floors[pattern] = revision.number
        if not self._unsynced and not is_silent:
            # All are synced, up to the lowest of their revisions.
            self._events.pop(None, None)
            self._put(None, Synced(Revision(min(self._floors.values()), revision.epoch)))

    def lost(self, pattern: str) -> None:
        # What was announced is no longer so; another follows once it is.
        self._events.pop(None, None)
        self._unsynced.add(pattern)
        self._floors.pop(pattern, None)

    def end(self, error: Exception | None) -> None:
        if not self.ended:
            self.ended, self.error = True, error
            self.notify()

    def pop(self) -> Event | None:
        """Returns the next event, if there is one."""
        if not self._events:
            return None
        key = next(iter(self._events))
        event = self._events.pop(key)
        if isinstance(event, Update):
            self._held.add(event.key)
        elif isinstance(event, Gone):
            self._held.discard(event.key)
        return event

    def _replaced(self, key: str) -> int:
        waiting = self._events.get(key)
        return 0 if waiting is None or isinstance(waiting, Synced) else waiting.skipped + 1

    def _put(self, key: str | None, event: Event) -> None:
        self._events[key] = event
        self.notify()


class State:
    """The present entries that a pattern covers."""

    def __init__(self) -> None:
        self.notify: Callable[[], None] = _nothing
        self.error: Exception | None = None
        self.ended = False
        self.entries: dict[str, Entry] = {}
        self.is_live = False
        #: Grows with each change.
        self.version = 0

    def hold(self, key: str) -> None:
        return

    def update(self, key: str, value: bytes, revision: Revision, skipped: int) -> None:
        self.entries[key] = Entry(key, value, revision)
        self._changed()

    def gone(self, key: str, revision: Revision, reason: GoneReason, skipped: int) -> None:
        if self.entries.pop(key, None) is not None:
            self._changed()

    def synced(self, pattern: str, revision: Revision, is_silent: bool) -> None:
        self._live(True)

    def lost(self, pattern: str) -> None:
        self._live(False)

    def _live(self, is_live: bool) -> None:
        if self.is_live != is_live:
            self.is_live = is_live
            self._changed()

    def end(self, error: Exception | None) -> None:
        if not self.ended:
            self.ended, self.error, self.is_live = True, error, False
            self._changed()

    def _changed(self) -> None:
        self.version += 1
        self.notify()
