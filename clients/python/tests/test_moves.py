"""A client that moves from one server to another, over sockets: the blocking one and that for asyncio."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import unittest
from typing import Any

from tests import stage as _  # noqa: F401  (puts the checkout on the path)

import nkv
import nkv.aio

EPOCH = "0" * 32
NEW = [("a.1", "new", 5), ("a.2", "new", 9)]
OLD = [("a.1", "old", 2)]


class Servers:
    """Six servers at one address: the second and third lag, and the engine behind the fifth has lost the newest changes.

    Each but the last serves one snapshot, and ends the connection when it is told to.
    """

    def __init__(self) -> None:
        self.seen: list[str | None] = []
        self.cut = threading.Semaphore(0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(20)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self._listener.close()
        self._thread.join(10)

    def _run(self) -> None:
        for count in range(1, 7):
            connection, _ = self._listener.accept()
            connection.settimeout(20)
            with connection, connection.makefile("rwb") as stream:
                self._serve(count, stream)

    def _serve(self, count: int, stream: Any) -> None:
        def say(value: object) -> None:
            stream.write(json.dumps(value).encode() + b"\n")
            stream.flush()

        connect = json.loads(stream.readline())
        self.seen.append(connect.get("seen"))
        answer = {"id": connect["id"], "status": 200, "message": "No Error", "epoch": EPOCH, "features": ["exact", "reset"]}
        if count in (2, 3):
            say({"Base": {**answer, "status": 503, "message": "it is not as far yet"}})
            return
        say({"Base": {**answer, "begins_anew": True} if count == 5 else answer})
        while json.loads(stream.readline())["type"] != "Subscribe":
            pass
        say("Hello")
        for key, value, revision in NEW if count < 5 else OLD:
            say({"Update": {"key": key, "value": value, "revision": revision, "skipped": 0}})
        say({"Synced": {"key": "a", "revision": 9 if count < 5 else 3, "epoch": EPOCH}})
        assert self.cut.acquire(timeout=60)


class Moves(unittest.TestCase):
    #: What is read between two cuts.
    EXPECTED: list[list[object]] = [
        [("a.1", b"new"), ("a.2", b"new"), "synced 9"],
        ["synced 9"],
        [("a.1", b"old"), ("a.2", "missed"), "synced 3"],
        ["synced 3"],
    ]

    def setUp(self) -> None:
        self.servers = Servers()

    def tearDown(self) -> None:
        self.servers.close()
        self.assertEqual(self.servers.seen, [None] + [f"{EPOCH}-9"] * 4 + [f"{EPOCH}-3"])

    def say(self, event: nkv.Event) -> object:
        if isinstance(event, nkv.Update):
            return event.key, event.value
        return (event.key, event.reason) if isinstance(event, nkv.Gone) else f"synced {event.revision.number}"

    def test_a_blocking_client_sees_nothing_older_or_begins_anew(self) -> None:
        with nkv.Client(self.servers.address) as client, client.subscribe("a") as subscription:
            for expected in self.EXPECTED:
                self.assertEqual([self.say(subscription.next(10)) for _ in expected], expected)
                self.servers.cut.release()

    def test_an_asyncio_client_sees_nothing_older_or_begins_anew(self) -> None:
        async def main() -> None:
            async with nkv.aio.Client(self.servers.address) as client, await client.subscribe("a") as subscription:
                for expected in self.EXPECTED:
                    events = [self.say(await asyncio.wait_for(anext(subscription), 10)) for _ in expected]
                    self.assertEqual(events, expected)
                    self.servers.cut.release()

        asyncio.run(main())


if __name__ == "__main__":
    unittest.main()
