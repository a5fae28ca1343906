"""The blocking client. A thread of its own owns the socket; calls from any thread wait for their answers."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

from . import _requests as requests
from ._errors import FORKED, Closed, Conflict, NkvError, Refused, Timeout
from ._queue import EventQueue, State
from ._requests import Batch, Condition, Paging, Request, Value
from ._session import Local, Options, Session
from ._types import Address, Entry, Event, Page, Revision, Stats

T = TypeVar("T")
_READ = 256 * 1024


class _Core:
    """The session, its lock, and the thread that drives it."""

    def __init__(self, address: Address, options: Options) -> None:
        self.address = address
        self.options = options
        self.process = os.getpid()
        self.lock = threading.Lock()
        self.session = Session(options, self._wake, time.monotonic())
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._awake = False
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="nkv", daemon=True)
        _cores.add(self)
        self._thread.start()

    def check_process(self) -> None:
        # Before the lock: another thread may have held it when the process was forked.
        if os.getpid() != self.process:
            raise Closed(FORKED)

    def call(self, request: Request[T], timeout: float | None) -> T:
        self.call_all([request], timeout)
        return request.outcome()

    def call_all(self, batch: list[Request[Any]], timeout: float | None) -> None:
        """Submits requests and waits until each is done, or is given up."""
        self.check_process()
        done = [threading.Event() for _ in batch]
        for request, event in zip(batch, done):
            request.notify = event.set
        until = time.monotonic() + (self.options.timeout if timeout is None else timeout)
        with self.lock:
            for request in batch:
                self.session.submit(request)
        try:
            for event in done:
                if not event.wait(max(0.0, until - time.monotonic())):
                    break
        finally:
            # Also if the wait was interrupted.
            with self.lock:
                for request in batch:
                    if not request.done:
                        self.session.give_up(request)

    def open(self, local: Local, timeout: float | None) -> None:
        """Adds a subscription, with all of its patterns, and waits until it is accepted."""
        self.check_process()
        until = time.monotonic() + (self.options.timeout if timeout is None else timeout)
        done = [threading.Event() for _ in local.group]
        with self.lock:
            for one, event in zip(local.group, done):
                one.ready.notify = event.set
                self.session.subscribe(one)
        is_open = False
        try:
            for one, event in zip(local.group, done):
                if not event.wait(max(0.0, until - time.monotonic())):
                    with self.lock:
                        if not one.ready.done:
                            raise self.session.not_sent()
                one.ready.outcome()
            is_open = True
        finally:
            if not is_open:
                self.drop(local)

    def drop(self, local: Local) -> None:
        if os.getpid() == self.process:
            with self.lock:
                for one in local.group:
                    self.session.unsubscribe(one)

    def close(self) -> None:
        if os.getpid() != self.process:
            return
        with self.lock:
            self.session.close()
            # Wakes the thread out of any wait, also if it was woken before.
            with contextlib.suppress(OSError):
                self._wake_writer.send(b"\0")
        if threading.current_thread() is not self._thread:
            # It is a daemon: one that hangs in the resolution of a name does not keep the program from ending.
            self._thread.join(0.3)

    def forked(self) -> None:
        """In the child: leaves the connection to the parent. Closing our copies of the sockets sends nothing."""
        for end in (self._socket, self._wake_reader, self._wake_writer):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.close()

    # In the thread, and with the lock where the session is used.

    def _wake(self) -> None:
        if not self._awake:
            self._awake = True
            with contextlib.suppress(OSError):
                self._wake_writer.send(b"\0")

    def _run(self) -> None:
        try:
            while not self.session.closed:
                error: Exception | None = None
                try:
                    self._socket = self._connect()
                    self._serve(self._socket)
                except Exception as caught:  # whatever a peer brings about, it must not end the thread
                    error = caught
                finally:
                    if self._socket is not None:
                        self._socket.close()
                        self._socket = None
                with self.lock:
                    pause = self.session.connection_lost(error, time.monotonic())
                self._pause(pause)
        finally:
            self._wake_reader.close()
            self._wake_writer.close()

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self.session.closed and (left := until - time.monotonic()) > 0:
            self._wait([], [], left)

    def _wait(self, readers: list[socket.socket], writers: list[socket.socket], seconds: float) -> tuple[bool, bool]:
        """Waits until a socket is ready, the thread is woken, or the time is over."""
        poll = select.poll()
        poll.register(self._wake_reader, select.POLLIN)
        wanted: dict[int, int] = {}
        for end in readers:
            wanted[end.fileno()] = select.POLLIN
        for end in writers:
            wanted[end.fileno()] = wanted.get(end.fileno(), 0) | select.POLLOUT
        for descriptor, mask in wanted.items():
            poll.register(descriptor, mask)
        readable = writable = False
        for descriptor, mask in poll.poll(max(0.0, seconds) * 1000 + 1):
            if descriptor == self._wake_reader.fileno():
                with contextlib.suppress(BlockingIOError):
                    self._wake_reader.recv(4096)
            else:
                readable = readable or bool(mask & ~select.POLLOUT)
                writable = writable or bool(mask & ~select.POLLIN)
        return readable, writable

    def _connect(self) -> socket.socket:
        until = time.monotonic() + self.options.connect_timeout
        targets: list[tuple[int, Any]]
        if self.address.path is not None:
            targets = [(socket.AF_UNIX, self.address.path)]
        else:
            # Resolved at each attempt: the name may have moved.
            found = socket.getaddrinfo(self.address.host, self.address.port, type=socket.SOCK_STREAM)
            targets = [(family, where) for family, _, _, _, where in found]
        error: OSError = ConnectionError("no address")
        for left, (family, where) in zip(range(len(targets), 0, -1), targets):
            if self.session.closed:
                break
            now = time.monotonic()
            try:
                return self._dial(family, where, now + (until - now) / left)
            except OSError as caught:
                error = caught
        raise error

    def _dial(self, family: int, where: Any, until: float) -> socket.socket:
        end = socket.socket(family, socket.SOCK_STREAM)
        try:
            end.setblocking(False)
            status = end.connect_ex(where)
            if status == errno.EAGAIN:  # the backlog of a Unix socket is full
                raise OSError(status, os.strerror(status))
            if status not in (0, errno.EINPROGRESS):
                raise OSError(status, os.strerror(status))
            is_connected = status == 0
            while not is_connected:
                if self.session.closed or time.monotonic() >= until:
                    raise TimeoutError(f"{where}: no connection in time")
                _, is_connected = self._wait([], [end], until - time.monotonic())
            status = end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if status:
                raise OSError(status, os.strerror(status))
            if family != socket.AF_UNIX:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return end
        except BaseException:
            end.close()
            raise

    def _serve(self, end: socket.socket) -> None:
        with self.lock:
            self.session.connection_made(time.monotonic())
        output = memoryview(b"")
        while True:
            if not output:
                with self.lock:
                    self._awake = False
                    output = memoryview(self.session.take_output(time.monotonic()))
            if self.session.closed:
                return
            if output:
                try:
                    output = output[end.send(output):]
                except BlockingIOError:
                    pass
            with self.lock:
                # Asked for here as well, so that nothing submitted in between waits for the next wake-up.
                limit = 0.0 if not output and self._awake else self.session.next_tick(time.monotonic())
            readable, _ = self._wait([end], [end] if output else [], limit)
            if readable:
                try:
                    data = end.recv(_READ)
                except BlockingIOError:
                    continue
                if not data:
                    return
                with self.lock:
                    self.session.received(data, time.monotonic())
            with self.lock:
                self.session.tick(time.monotonic())


_cores: weakref.WeakSet[_Core] = weakref.WeakSet()


def _after_fork() -> None:
    for core in list(_cores):
        core.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Client:
    """A client for programs with threads. All calls block, and may be made from any thread.

    It connects in the background, and again whenever the connection is lost. A call waits for the connection as long as its
    `timeout` allows (in seconds; that of the client if it has none).
    """

    def __init__(self, address: str = "127.0.0.1:4222", *, timeout: float = 5.0, connect_timeout: float = 5.0,
                 heartbeat: float = 15.0, name: str | None = None) -> None:
        self._core = _Core(Address.parse(address), Options(timeout, connect_timeout, heartbeat, name=name))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<nkv.Client {self._core.address}>"

    def close(self) -> None:
        """Ends the connection, the subscriptions and all waiting calls."""
        self._core.close()

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection now."""
        return self._core.session.is_connected

    @property
    def stale_for(self) -> float | None:
        """For how many seconds the server has not seen its engine, by its own word: reads and watches are of an old state then,
        and writes may be refused. None if it does, or without a connection."""
        since = self._core.session.stale_since
        return None if since is None else time.monotonic() - since

    def ping(self, *, timeout: float | None = None) -> None:
        """Waits for the connection and for an answer. Raises `CannotConnect` or `Timeout`."""
        self._core.call(requests.health(), timeout)

    def put(self, key: str, value: Value, *, if_revision: Condition = None, ttl: float | None = None,
            timeout: float | None = None) -> Revision:
        """Stores a value and returns its revision. A text is stored as UTF-8.

        With `if_revision`, only if the key is at this revision, or absent for 0; else it raises `Conflict`. With `ttl`, the value
        ends by itself after this number of seconds.
        """
        return self._core.call(requests.put(key, value, if_revision, ttl), timeout)

    def get(self, key: str, *, timeout: float | None = None) -> Entry | None:
        """Returns the entry, or `None` if there is no such key."""
        return self._core.call(requests.get(key), timeout)

    def delete(self, pattern: str, *, if_revision: Condition = None, timeout: float | None = None) -> int:
        """Removes a key, or all below a branch (`a.*`). Returns how many there were."""
        return self._core.call(requests.delete(pattern, if_revision), timeout)

    def exists(self, pattern: str, *, timeout: float | None = None) -> bool:
        """Whether the key is present, or any below a branch."""
        return self._core.call(requests.exists(pattern), timeout)

    def list(self, pattern: str, *, limit: int = 1000, after: str = "", timeout: float | None = None) -> Page:
        """Returns a page of the keys that the pattern selects, in key order, those after `after`."""
        return self._core.call(requests.list_page(pattern, limit, after), timeout)

    def get_all(self, pattern: str, *, page: int = 256, timeout: float | None = None) -> Iterator[Entry]:
        """Returns an iterator of all entries that the pattern selects, in key order. It asks for `page` keys at a time.

        Each page is of one moment; others may be of later ones. `timeout` is that of each page.
        """
        return self._pages(Paging(pattern, page), timeout)

    def _pages(self, paging: Paging, timeout: float | None) -> Iterator[Entry]:
        while paging.more:
            try:
                entries, more = self._core.call(paging.request(), timeout)
            except Refused as error:
                if error.status != 413 or not paging.too_large():
                    raise
                continue
            paging.answered(entries, more)
            yield from entries

    def update(self, key: str, change: Callable[[Entry | None], Value | None], *,
               timeout: float | None = None) -> Revision | None:
        """Changes a value that others may change too: reads the key, and puts what `change` makes of the entry if the key is still as it
        was read. If not, all of that is done again, after a random pause of at most 128 ms. `change` returns `None` to write nothing.
        Returns the revision of what the key holds then; `None` if it is absent.

        `timeout` is that of all of it. Raises `Conflict` if others were faster until it was over, and what `change` raises. After an
        `OutcomeUnknown` it is not tried again. What is put has no end of its own.
        """
        until = time.monotonic() + (self._core.options.timeout if timeout is None else timeout)
        for conflicts in itertools.count():
            entry = self.get(key, timeout=until - time.monotonic())
            value = change(entry)
            if value is None:
                break
            left = until - time.monotonic()
            if left <= 0:
                raise Timeout("the change took all of the time")
            try:
                return self.put(key, value, if_revision=entry.revision if entry else 0, timeout=left)
            except Conflict:
                pause = requests.conflict_pause(conflicts)
                if time.monotonic() + pause >= until:
                    raise
            time.sleep(pause)
        return entry.revision if entry else None

    def stats(self, *, timeout: float | None = None) -> Stats:
        """Returns the figures of the server."""
        return self._core.call(requests.stats(), timeout)

    def pipeline(self) -> Pipeline:
        """Returns an empty batch of requests, which are sent at once."""
        return Pipeline(self._core)

    def subscribe(self, pattern: str | Iterable[str], *, snapshot: bool = True, exact: bool = False,
                  timeout: float | None = None) -> Subscription:
        """Returns an iterator of what happens to the keys that the pattern covers: `a` is `a` and all below it.

        With `snapshot`, the present entries come first, then `Synced`. With `exact`, the key alone counts, not what is below it.
        It lasts until it is closed, over lost connections too; what was missed is delivered then.

        Several patterns are one iterator: a change that several cover comes once, and `Synced` comes once all have had their present
        entries. If one of them ends, the subscription does.
        """
        (local, *_), queue = Local.several(pattern, exact, snapshot)
        subscription = Subscription(self._core, local, queue)
        self._core.open(local, timeout)
        return subscription

    def watch(self, key: str, *, timeout: float | None = None) -> Watch:
        """Returns the always-current value of a key."""
        state = State()
        local = Local(key, True, True, state, wait_synced=True)
        watch = Watch(self._core, local, state)
        self._core.open(local, timeout)
        return watch

    def watch_branch(self, pattern: str, *, timeout: float | None = None) -> BranchWatch:
        """Returns an always-current map of the keys that the pattern covers: `a` is `a` and all below it."""
        state = State()
        local = Local(pattern, False, True, state, wait_synced=True)
        watch = BranchWatch(self._core, local, state)
        self._core.open(local, timeout)
        return watch


class Pipeline(Batch):
    """Requests that are sent at once, and answered in order. They are no transaction."""

    def __init__(self, core: _Core) -> None:
        super().__init__()
        self._core = core

    def run(self, *, timeout: float | None = None) -> list[Revision | Entry | int | bool | NkvError | None]:
        """Sends the requests and returns what became of each: what the call would return, or the error."""
        batch = self._take()
        self._core.call_all(batch, timeout)
        return [outcome(request) for request in batch]


def outcome(request: Request[Any]) -> Revision | Entry | int | bool | NkvError | None:
    if request.error is None:
        return cast("Revision | Entry | int | bool | None", request.outcome())
    if isinstance(request.error, NkvError):
        return request.error
    raise request.error


S = TypeVar("S", EventQueue, State)


class _Watching(Generic[S]):
    """What subscriptions and watches have in common."""

    def __init__(self, core: _Core, local: Local, sink: S) -> None:
        self._core, self._local = core, local
        self._sink: S = sink
        self._news = threading.Condition(core.lock)
        # Called by the driver's thread, which has the lock.
        sink.notify = self._news.notify_all

    @property
    def pattern(self) -> str:
        """What it covers; of several patterns, the first."""
        return self._local.pattern

    @property
    def patterns(self) -> tuple[str, ...]:
        """What it covers: the patterns that were asked for, without those that another one includes."""
        return tuple(local.pattern for local in self._local.group)

    def close(self) -> None:
        """Ends it."""
        self._core.drop(self._local)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Subscription(_Watching[EventQueue]):
    """An iterator of events. It waits for the next one, and ends when it is closed."""

    def __enter__(self) -> Subscription:
        return self

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        event = self._next(None)
        if event is None:
            raise StopIteration
        return event

    def next(self, timeout: float | None = None) -> Event:
        """Returns the next event. Raises `Timeout` if none comes in time, `Closed` after the end. No event is lost by that."""
        event = self._next(timeout)
        if event is None:
            raise Closed("the subscription has ended")
        return event

    def _next(self, timeout: float | None) -> Event | None:
        self._core.check_process()
        with self._news:
            until = None if timeout is None else time.monotonic() + timeout
            while (event := self._sink.pop()) is None:
                if self._sink.error is not None:
                    raise self._sink.error
                if self._sink.ended:
                    return None
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise Timeout("no event in time")
                self._news.wait(left)
            return event


class _StateWatching(_Watching[State]):
    def __init__(self, core: _Core, local: Local, sink: State) -> None:
        super().__init__(core, local, sink)
        self._seen: int | None = None

    @property
    def is_live(self) -> bool:
        """Whether the state is whole and current. It is old while the connection is lost."""
        return self._sink.is_live

    def changed(self, timeout: float | None = None) -> None:
        """Waits until something has changed since this returned last. The first call returns at once.

        Raises `Timeout` if nothing changes in time, `Closed` after the end.
        """
        self._core.check_process()
        with self._news:
            until = None if timeout is None else time.monotonic() + timeout
            while self._seen == self._sink.version:
                if self._sink.ended:
                    raise self._sink.error or Closed("the watch has ended")
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise Timeout("no change in time")
                self._news.wait(left)
            self._seen = self._sink.version


class Watch(_StateWatching):
    """The always-current value of a key."""

    def __enter__(self) -> Watch:
        return self

    @property
    def entry(self) -> Entry | None:
        """The key's entry, or `None` if it is absent."""
        self._core.check_process()
        return self._sink.entries.get(self._local.pattern)

    @property
    def value(self) -> bytes | None:
        """The key's value, or `None` if it is absent."""
        entry = self.entry
        return None if entry is None else entry.value


class BranchWatch(_StateWatching, Mapping[str, bytes]):
    """An always-current map from keys to values. Use `entries` for one that stays as it is, with revisions."""

    def __enter__(self) -> BranchWatch:
        return self

    def __getitem__(self, key: str) -> bytes:
        return self._sink.entries[key].value

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries())

    def __len__(self) -> int:
        return len(self._sink.entries)

    def entries(self) -> dict[str, Entry]:
        """Returns a copy of the map as it is now."""
        self._core.check_process()
        with self._core.lock:
            return dict(self._sink.entries)
