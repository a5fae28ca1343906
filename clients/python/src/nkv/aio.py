"""The client for asyncio. It has the calls of `nkv.Client`, as coroutines.

A client belongs to the event loop in which it is used first, and is not thread-safe. Any call may be cancelled: a request that has
not been sent by then never is.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Generic, TypeVar

from . import _requests as requests
from ._errors import FORKED, Closed, Conflict, NkvError, Refused, Timeout
from ._plain import outcome
from ._queue import EventQueue, State
from ._requests import Batch, Condition, Paging, Pending, Request, Value
from ._session import Local, Options, Session
from ._types import Address, Entry, Event, Page, Revision, Stats

__all__ = ["BranchWatch", "Client", "Pipeline", "Subscription", "Watch"]

T = TypeVar("T")


class _Link(asyncio.Protocol):
    """One connection."""

    def __init__(self, core: _Core) -> None:
        self._core = core
        self._transport: asyncio.Transport | None = None
        self._is_paused = False
        self._error: Exception | None = None
        self.ended: asyncio.Future[Exception | None] = core.loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        # What the socket does not take at once stops the output: the rest can then still be taken back.
        transport.set_write_buffer_limits(high=0)

    def data_received(self, data: bytes) -> None:
        self.guarded(lambda: self._core.session.received(data, self._core.loop.time()))

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        self.write()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(self._error or error)

    def write(self) -> None:
        while not self._is_paused and self._transport is not None and not self._transport.is_closing():
            output = self._core.session.take_output(self._core.loop.time())
            if not output:
                return
            self._transport.write(output)

    def guarded(self, step: Callable[[], None]) -> None:
        """Takes a step of the session; an error ends the connection."""
        if self._error is not None:
            return
        try:
            step()
        except Exception as error:  # whatever a peer brings about must not end the program
            self._error = error
            self.abort()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class _Core:
    """The session, and the task that drives it."""

    def __init__(self, address: Address, options: Options) -> None:
        self.address = address
        self.options = options
        self.process = os.getpid()
        self.loop = asyncio.get_running_loop()
        self.session = Session(options, self._wake, self.loop.time())
        self._link: _Link | None = None
        self._is_scheduled = False
        self._task = self.loop.create_task(self._run())

    def check(self) -> None:
        if os.getpid() != self.process:
            raise Closed(FORKED)
        if asyncio.get_running_loop() is not self.loop:
            raise RuntimeError("the client belongs to another event loop")

    async def wait(self, pending: Pending[Any], seconds: float) -> bool:
        """Waits until it is done. Returns whether it is."""
        if not pending.done:
            future: asyncio.Future[None] = self.loop.create_future()
            pending.notify = lambda: None if future.done() else future.set_result(None)
            timer = self.loop.call_later(max(0.0, seconds), pending.notify)
            try:
                await future
            finally:
                timer.cancel()
        return pending.done

    async def call_all(self, batch: list[Request[Any]], timeout: float | None) -> None:
        self.check()
        until = self.loop.time() + (self.options.timeout if timeout is None else timeout)
        for request in batch:
            self.session.submit(request)
        try:
            for request in batch:
                if not await self.wait(request, until - self.loop.time()):
                    break
        finally:
            # Also if this was cancelled.
            for request in batch:
                if not request.done:
                    self.session.give_up(request)

    async def call(self, request: Request[T], timeout: float | None) -> T:
        await self.call_all([request], timeout)
        return request.outcome()

    async def open(self, local: Local, timeout: float | None) -> None:
        """Adds a subscription, with all of its patterns, and waits until it is accepted."""
        self.check()
        until = self.loop.time() + (self.options.timeout if timeout is None else timeout)
        for one in local.group:
            self.session.subscribe(one)
        is_open = False
        try:
            for one in local.group:
                if not await self.wait(one.ready, until - self.loop.time()):
                    raise self.session.not_sent()
                one.ready.outcome()
            is_open = True
        finally:
            if not is_open:
                self.drop(local)

    def drop(self, local: Local) -> None:
        for one in local.group:
            self.session.unsubscribe(one)

    async def close(self) -> None:
        if os.getpid() != self.process:
            return
        self.session.close()
        self._task.cancel()
        # Bounded: a name that is being resolved does not hold it up.
        await asyncio.wait([self._task], timeout=0.3)

    def _wake(self) -> None:
        # In the next turn of the loop, so that requests made at once leave at once.
        if not self._is_scheduled:
            self._is_scheduled = True
            self.loop.call_soon(self._write)

    def _write(self) -> None:
        self._is_scheduled = False
        if self._link is not None:
            self._link.write()

    async def _run(self) -> None:
        while not self.session.closed:
            error: Exception | None
            try:
                link = await asyncio.wait_for(self._connect(), self.options.connect_timeout)
                error = await self._serve(link)
            except Exception as caught:  # no error that a peer or the system causes may end the task
                is_late = isinstance(caught, asyncio.TimeoutError) and not str(caught)
                error = ConnectionError("no connection in time") if is_late else caught
            pause = self.session.connection_lost(error, self.loop.time())
            await asyncio.sleep(pause)

    async def _connect(self) -> _Link:
        if self.address.path is not None:
            _, link = await self.loop.create_unix_connection(lambda: _Link(self), self.address.path)
            return link
        # Resolved at each attempt: the name may have moved.
        found = await self._resolve()
        until = self.loop.time() + self.options.connect_timeout
        error: OSError = ConnectionError("no address")
        for left, where in zip(range(len(found), 0, -1), found):
            seconds = max(0.0, until - self.loop.time()) / left
            try:
                _, link = await asyncio.wait_for(self.loop.create_connection(lambda: _Link(self), *where), seconds)
                return link
            except (OSError, asyncio.TimeoutError) as caught:
                error = caught if isinstance(caught, OSError) and str(caught) else TimeoutError(f"{where}: no connection in time")
        raise error

    async def _resolve(self) -> list[tuple[str, int]]:
        future: asyncio.Future[list[tuple[str, int]]] = self.loop.create_future()

        def report(found: list[tuple[str, int]], error: OSError | None) -> None:
            if not future.done():
                if error is None:
                    future.set_result(found)
                else:
                    future.set_exception(error)

        def resolve() -> None:
            found: list[tuple[str, int]] = []
            error = None
            try:
                for _, _, _, _, where in socket.getaddrinfo(self.address.host, self.address.port, type=socket.SOCK_STREAM):
                    found.append((str(where[0]), int(where[1])))
            except OSError as caught:
                error = caught
            except UnicodeError as caught:
                error = OSError(str(caught))
            with contextlib.suppress(RuntimeError):  # the loop may have ended
                self.loop.call_soon_threadsafe(report, found, error)

        # A daemon of our own: asyncio waits at its end for the threads that it has for this.
        threading.Thread(target=resolve, name="nkv-resolve", daemon=True).start()
        return await future

    async def _serve(self, link: _Link) -> Exception | None:
        self._link = link
        try:
            self.session.connection_made(self.loop.time())
            link.write()
            while not link.ended.done():
                await asyncio.wait([link.ended], timeout=self.session.next_tick(self.loop.time()) + 0.001)
                link.guarded(lambda: self.session.tick(self.loop.time()))
            return link.ended.result()
        finally:
            self._link = None
            link.abort()


class Client:
    """A client for asyncio.

    It connects in the background, from its first use on, and again whenever the connection is lost. A call waits for the connection as
    long as its `timeout` allows (in seconds; that of the client if it has none).
    """

    def __init__(self, address: str = "127.0.0.1:4222", *, timeout: float = 5.0, connect_timeout: float = 5.0,
                 heartbeat: float = 15.0, name: str | None = None) -> None:
        self._address = Address.parse(address)
        self._options = Options(timeout, connect_timeout, heartbeat, name=name)
        self._opened: _Core | None = None
        self._is_closed = False

    @property
    def _core(self) -> _Core:
        if self._opened is None:
            if self._is_closed:
                raise Closed("the client is closed")
            self._opened = _Core(self._address, self._options)
        return self._opened

    async def __aenter__(self) -> Client:
        self._core.check()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<nkv.aio.Client {self._address}>"

    async def close(self) -> None:
        """Ends the connection, the subscriptions and all waiting calls."""
        self._is_closed = True
        if self._opened is not None:
            await self._opened.close()

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection now."""
        return self._opened is not None and self._opened.session.is_connected

    @property
    def stale_for(self) -> float | None:
        """For how many seconds the server has not seen its engine, by its own word: reads and watches are of an old state then,
        and writes may be refused. None if it does, or without a connection."""
        since = self._opened.session.stale_since if self._opened is not None else None
        return None if since is None else time.monotonic() - since

    async def ping(self, *, timeout: float | None = None) -> None:
        """Waits for the connection and for an answer. Raises `CannotConnect` or `Timeout`."""
        await self._core.call(requests.health(), timeout)

    async def put(self, key: str, value: Value, *, if_revision: Condition = None, ttl: float | None = None,
                  timeout: float | None = None) -> Revision:
        """Stores a value and returns its revision. A text is stored as UTF-8.

        With `if_revision`, only if the key is at this revision, or absent for 0; else it raises `Conflict`. With `ttl`, the value
        ends by itself after this number of seconds.
        """
        return await self._core.call(requests.put(key, value, if_revision, ttl), timeout)

    async def get(self, key: str, *, timeout: float | None = None) -> Entry | None:
        """Returns the entry, or `None` if there is no such key."""
        return await self._core.call(requests.get(key), timeout)

    async def delete(self, pattern: str, *, if_revision: Condition = None, timeout: float | None = None) -> int:
        """Removes a key, or all below a branch (`a.*`). Returns how many there were."""
        return await self._core.call(requests.delete(pattern, if_revision), timeout)

    async def exists(self, pattern: str, *, timeout: float | None = None) -> bool:
        """Whether the key is present, or any below a branch."""
        return await self._core.call(requests.exists(pattern), timeout)

    async def list(self, pattern: str, *, limit: int = 1000, after: str = "", timeout: float | None = None) -> Page:
        """Returns a page of the keys that the pattern selects, in key order, those after `after`."""
        return await self._core.call(requests.list_page(pattern, limit, after), timeout)

    def get_all(self, pattern: str, *, page: int = 256, timeout: float | None = None) -> AsyncIterator[Entry]:
        """Returns an iterator of all entries that the pattern selects, in key order. It asks for `page` keys at a time.

        Each page is of one moment; others may be of later ones. `timeout` is that of each page.
        """
        return self._pages(Paging(pattern, page), timeout)

    async def _pages(self, paging: Paging, timeout: float | None) -> AsyncIterator[Entry]:
        while paging.more:
            try:
                entries, more = await self._core.call(paging.request(), timeout)
            except Refused as error:
                if error.status != 413 or not paging.too_large():
                    raise
                continue
            paging.answered(entries, more)
            for entry in entries:
                yield entry

    async def update(self, key: str, change: Callable[[Entry | None], Value | None | Awaitable[Value | None]], *,
                     timeout: float | None = None) -> Revision | None:
        """Changes a value that others may change too: reads the key, and puts what `change` makes of the entry if the key is still as it
        was read. If not, all of that is done again, after a random pause of at most 128 ms. `change` returns `None` to write nothing,
        and may be a coroutine function.
        Returns the revision of what the key holds then; `None` if it is absent.

        `timeout` is that of all of it. Raises `Conflict` if others were faster until it was over, and what `change` raises. After an
        `OutcomeUnknown` it is not tried again. What is put has no end of its own.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + (self._options.timeout if timeout is None else timeout)
        for conflicts in itertools.count():
            entry = await self.get(key, timeout=until - loop.time())
            made = change(entry)
            value = await made if isinstance(made, Awaitable) else made
            if value is None:
                break
            left = until - loop.time()
            if left <= 0:
                raise Timeout("the change took all of the time")
            try:
                return await self.put(key, value, if_revision=entry.revision if entry else 0, timeout=left)
            except Conflict:
                pause = requests.conflict_pause(conflicts)
                if loop.time() + pause >= until:
                    raise
            await asyncio.sleep(pause)
        return entry.revision if entry else None

    async def stats(self, *, timeout: float | None = None) -> Stats:
        """Returns the figures of the server."""
        return await self._core.call(requests.stats(), timeout)

    def pipeline(self) -> Pipeline:
        """Returns an empty batch of requests, which are sent at once."""
        return Pipeline(self._core)

    async def subscribe(self, pattern: str | Iterable[str], *, snapshot: bool = True, exact: bool = False,
                        timeout: float | None = None) -> Subscription:
        """Returns an iterator of what happens to the keys that the pattern covers: `a` is `a` and all below it.

        With `snapshot`, the present entries come first, then `Synced`. With `exact`, the key alone counts, not what is below it.
        It lasts until it is closed, over lost connections too; what was missed is delivered then.

        Several patterns are one iterator: a change that several cover comes once, and `Synced` comes once all have had their present
        entries. If one of them ends, the subscription does.
        """
        (local, *_), queue = Local.several(pattern, exact, snapshot)
        subscription = Subscription(self._core, local, queue)
        await self._core.open(local, timeout)
        return subscription

    async def watch(self, key: str, *, timeout: float | None = None) -> Watch:
        """Returns the always-current value of a key."""
        state = State()
        local = Local(key, True, True, state, wait_synced=True)
        watch = Watch(self._core, local, state)
        await self._core.open(local, timeout)
        return watch

    async def watch_branch(self, pattern: str, *, timeout: float | None = None) -> BranchWatch:
        """Returns an always-current map of the keys that the pattern covers: `a` is `a` and all below it."""
        state = State()
        local = Local(pattern, False, True, state, wait_synced=True)
        watch = BranchWatch(self._core, local, state)
        await self._core.open(local, timeout)
        return watch


class Pipeline(Batch):
    """Requests that are sent at once, and answered in order. They are no transaction."""

    def __init__(self, core: _Core) -> None:
        super().__init__()
        self._core = core

    async def run(self, *, timeout: float | None = None) -> list[Revision | Entry | int | bool | NkvError | None]:
        """Sends the requests and returns what became of each: what the call would return, or the error."""
        batch = self._take()
        await self._core.call_all(batch, timeout)
        return [outcome(request) for request in batch]


S = TypeVar("S", EventQueue, State)


class _Watching(Generic[S]):
    """What subscriptions and watches have in common."""

    def __init__(self, core: _Core, local: Local, sink: S) -> None:
        self._core, self._local = core, local
        self._sink: S = sink
        self._waiters: list[asyncio.Future[None]] = []
        sink.notify = self._notify

    @property
    def pattern(self) -> str:
        """What it covers; of several patterns, the first."""
        return self._local.pattern

    @property
    def patterns(self) -> tuple[str, ...]:
        """What it covers: the patterns that were asked for, without those that another one includes."""
        return tuple(local.pattern for local in self._local.group)

    async def close(self) -> None:
        """Ends it."""
        if os.getpid() == self._core.process:
            self._core.drop(self._local)

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        await self.close()

    def _notify(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _news(self) -> None:
        """Waits until something may have changed. Nothing is taken here, so nothing is lost if it is cancelled."""
        waiter: asyncio.Future[None] = self._core.loop.create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)


class Subscription(_Watching[EventQueue]):
    """An asynchronous iterator of events, which ends when it is closed.

    The wait for the next event may be cancelled, as by `asyncio.wait_for`: no event is lost, and the iterator goes on.
    """

    async def __aenter__(self) -> Subscription:
        return self

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        self._core.check()
        while (event := self._sink.pop()) is None:
            if self._sink.error is not None:
                raise self._sink.error
            if self._sink.ended:
                raise StopAsyncIteration
            await self._news()
        return event


class _StateWatching(_Watching[State]):
    def __init__(self, core: _Core, local: Local, sink: State) -> None:
        super().__init__(core, local, sink)
        self._seen: int | None = None

    @property
    def is_live(self) -> bool:
        """Whether the state is whole and current. It is old while the connection is lost."""
        return self._sink.is_live

    async def changed(self) -> None:
        """Waits until something has changed since this returned last. The first call returns at once.

        Raises `Closed` after the end.
        """
        self._core.check()
        while self._seen == self._sink.version:
            if self._sink.ended:
                raise self._sink.error or Closed("the watch has ended")
            await self._news()
        self._seen = self._sink.version


class Watch(_StateWatching):
    """The always-current value of a key."""

    async def __aenter__(self) -> Watch:
        return self

    @property
    def entry(self) -> Entry | None:
        """The key's entry, or `None` if it is absent."""
        return self._sink.entries.get(self._local.pattern)

    @property
    def value(self) -> bytes | None:
        """The key's value, or `None` if it is absent."""
        entry = self.entry
        return None if entry is None else entry.value


class BranchWatch(_StateWatching, Mapping[str, bytes]):
    """An always-current map from keys to values. Use `entries` for one that stays as it is, with revisions."""

    async def __aenter__(self) -> BranchWatch:
        return self

    def __getitem__(self, key: str) -> bytes:
        return self._sink.entries[key].value

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries())

    def __len__(self) -> int:
        return len(self._sink.entries)

    def entries(self) -> dict[str, Entry]:
        """Returns a copy of the map as it is now."""
        return dict(self._sink.entries)
