"""What is Python's own: fork, threads, interrupts, the end of the program. Against the real server."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
import unittest

from tests.stage import Stage

import nkv
import nkv.aio


@unittest.skipUnless(os.environ.get("NKV_SERVER") or os.environ.get("CI") == "true", "NKV_SERVER is not set")
class WithServer(unittest.TestCase):
    def setUp(self) -> None:
        self.stage = self.enterContext(Stage()) if hasattr(self, "enterContext") else self.entered()
        self.address = self.stage.addresses["proxy"]

    def entered(self) -> Stage:
        stage = Stage().__enter__()
        self.addCleanup(stage.__exit__, None, None, None)
        return stage


class Fork(WithServer):
    def test_the_child_gets_a_clear_error_and_the_parent_lives_on(self) -> None:
        with nkv.Client(self.address) as client:
            client.put("k", "1")
            events = client.subscribe("k")
            watch = client.watch("k")
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    failures = 0
                    for call in (lambda: client.get("k"), lambda: client.put("k", "child"), lambda: next(events),
                                 lambda: client.subscribe("k"), lambda: watch.value):
                        try:
                            call()
                        except nkv.Closed as error:
                            failures += "forked" in str(error)
                    client.close()
                    events.close()
                    with nkv.Client(self.address) as own:
                        own.put("own", "child")
                    status = 0 if failures == 5 else failures + 10
                finally:
                    os._exit(status)
            for number in range(200):
                client.put("parent", str(number))
                self.assertEqual(client.get("parent").text, str(number))  # type: ignore[union-attr]
            self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), 0)
            self.assertEqual(client.get("own").text, "child")  # type: ignore[union-attr]
            self.assertEqual([type(events.next(5)) for _ in range(2)], [nkv.Update, nkv.Synced])
            client.put("k", "2")
            self.assertEqual(events.next(5).value, b"2")  # type: ignore[union-attr]
            self.assertEqual(self.stage.ask("connections"), "2")

    def test_fork_while_other_threads_call(self) -> None:
        with nkv.Client(self.address) as client:
            stop = threading.Event()

            def work() -> None:
                while not stop.is_set():
                    client.put("k", "1")

            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            try:
                for _ in range(10):
                    child = os.fork()
                    if child == 0:
                        signal.alarm(5)
                        try:
                            client.get("k")
                        except nkv.Closed:
                            os._exit(0)
                        finally:
                            os._exit(1)
                    self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), 0)
            finally:
                stop.set()
                for thread in threads:
                    thread.join()


class Threads(WithServer):
    def test_calls_of_many_threads_get_their_own_answers(self) -> None:
        failures: list[BaseException] = []

        def work(client: nkv.Client, number: int) -> None:
            try:
                for turn in range(100):
                    revision = client.put(f"t.{number}", f"{number}-{turn}")
                    entry = client.get(f"t.{number}")
                    assert entry is not None and entry.text == f"{number}-{turn}" and entry.revision == revision
            except BaseException as error:
                failures.append(error)

        with nkv.Client(self.address) as client:
            threads = [threading.Thread(target=work, args=(client, number)) for number in range(16)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        self.assertEqual(failures, [])

    def test_updates_of_two_clients_are_all_counted(self) -> None:
        def add(entry: nkv.Entry | None) -> str:
            return str(int(entry.text) + 1 if entry else 1)

        def work() -> None:
            with nkv.Client(self.address) as client:
                for _ in range(50):
                    client.update("counter", add, timeout=30)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with nkv.Client(self.address) as client:
            self.assertEqual(client.get("counter").text, "200")  # type: ignore[union-attr]

    def test_calls_within_a_loop_over_events(self) -> None:
        with nkv.Client(self.address) as client, client.subscribe("a") as events:
            client.put("a.0", "x")
            seen = 0
            for event in events:
                if isinstance(event, nkv.Update):
                    seen += 1
                    if seen == 20:
                        break
                    client.put(f"a.{seen}", "x")
                    self.assertIsNotNone(client.get(event.key))
                    with client.watch(event.key) as watch:
                        self.assertEqual(watch.value, b"x")

    def test_a_watch_is_never_older_than_an_own_put(self) -> None:
        with nkv.Client(self.address) as client, client.watch("k") as watch, client.watch_branch("k") as branch:
            for number in range(300):
                client.put("k", str(number))
                self.assertEqual((watch.value, branch["k"]), (str(number).encode(), str(number).encode()))
            client.delete("k")
            self.assertEqual((watch.value, dict(branch)), (None, {}))

    def test_changed_waits_for_a_change(self) -> None:
        with nkv.Client(self.address) as client, client.watch("k") as watch:
            watch.changed(0)
            with self.assertRaises(nkv.Timeout):
                watch.changed(0.05)
            timer = threading.Timer(0.1, lambda: client.put("k", "1"))
            timer.start()
            watch.changed(5)
            self.assertEqual(watch.value, b"1")
            timer.join()
        with self.assertRaises(nkv.Closed):
            while True:
                watch.changed(5)


class Ends(WithServer):
    def program(self, text: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        path = os.path.dirname(os.path.dirname(os.path.abspath(nkv.__file__)))
        return subprocess.run([sys.executable, "-W", "error::ResourceWarning", "-c", text, self.address], text=True,
                              env={**os.environ, "PYTHONPATH": path}, capture_output=True, timeout=timeout)

    def test_a_program_that_does_not_close_its_client_ends(self) -> None:
        for text in ("import sys, nkv; c = nkv.Client(sys.argv[1]); c.put('a', '1'); s = c.subscribe('a'); next(s)",
                     "import nkv; c = nkv.Client('127.0.0.1:1')",
                     "import sys, nkv, nkv.aio, asyncio\n"
                     "async def main():\n"
                     "    async with nkv.aio.Client(sys.argv[1]) as c:\n"
                     "        await c.put('a', '1')\n"
                     "        s = await c.subscribe('a')\n"
                     "        await anext(s)\n"
                     "asyncio.run(main())",
                     "import nkv.aio, asyncio\n"
                     "async def main():\n"
                     "    async with nkv.aio.Client('127.0.0.1:1') as c:\n"
                     "        await asyncio.sleep(0.1)\n"
                     "asyncio.run(main())"):
            done = self.program(text)
            self.assertEqual((done.returncode, done.stderr), (0, ""), text)

    def test_close_while_a_name_is_being_resolved(self) -> None:
        slow = ("import socket, sys, time, threading, asyncio, nkv, nkv.aio\n"
                "socket.getaddrinfo = lambda *a, **k: time.sleep(120)\n"
                "def left(since):\n"
                "    assert time.monotonic() - since < 20\n")
        for text in ("c = nkv.Client('a.name'); time.sleep(0.1); since = time.monotonic(); c.close(); left(since)",
                     "async def main():\n"
                     "    c = nkv.aio.Client('a.name')\n"
                     "    call = asyncio.ensure_future(c.get('k'))\n"
                     "    await asyncio.sleep(0.1)\n"
                     "    since = time.monotonic()\n"
                     "    await c.close()\n"
                     "    left(since)\n"
                     "    try: await call\n"
                     "    except nkv.Closed: print('closed')\n"
                     "asyncio.run(main())"):
            done = self.program(slow + text)
            self.assertEqual((done.returncode, done.stderr), (0, ""), text)

    def test_an_interrupt_ends_a_call_and_not_the_client(self) -> None:
        # A process that a shell starts in the background ignores it.
        self.addCleanup(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))
        with nkv.Client(self.address) as client:
            client.put("k", "1")
            events = client.subscribe("nothing")
            self.assertIsInstance(next(events), nkv.Synced)
            self.stage.ask("freeze")
            for call in (lambda: client.get("k", timeout=60), lambda: next(events)):
                timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
                timer.start()
                with self.assertRaises(KeyboardInterrupt):
                    call()
                timer.join()
            self.stage.ask("thaw")
            self.assertEqual(client.get("k").text, "1")  # type: ignore[union-attr]
            client.put("nothing", "now")
            self.assertEqual(events.next(60).value, b"now")  # type: ignore[union-attr]

    def test_no_thread_or_descriptor_is_left(self) -> None:
        before = (threading.active_count(), len(os.listdir("/proc/self/fd")))
        for _ in range(20):
            with nkv.Client(self.address) as client:
                client.put("k", "1")
                client.subscribe("k")
        self.assertEqual((threading.active_count(), len(os.listdir("/proc/self/fd"))), before)


class Aio(WithServer):
    def test_cancelled_subscriptions_leave_nothing_at_the_server(self) -> None:
        async def run() -> None:
            async with nkv.aio.Client(self.address) as client:
                await client.put("k", "1")

                async def read() -> None:
                    async with await client.subscribe("k") as events:
                        async for _ in events:
                            pass

                for is_down in (False, True):
                    tasks = [asyncio.ensure_future(read()) for _ in range(250)]
                    await asyncio.sleep(0.3)
                    if is_down:
                        await asyncio.to_thread(self.stage.ask, "down")
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
                    if is_down:
                        await asyncio.to_thread(self.stage.ask, "up")
                    await client.ping()
                    self.assertEqual(self.stage.ask("subscribers k"), "0")
                self.assertLess(len(asyncio.all_tasks()), 4)

        asyncio.run(run())

    def test_a_client_of_another_loop_is_refused(self) -> None:
        async def first() -> nkv.aio.Client:
            client = nkv.aio.Client(self.address)
            await client.put("k", "1")
            await client.close()
            return client

        async def second(client: nkv.aio.Client) -> None:
            with self.assertRaises(RuntimeError):
                await client.get("k")

        asyncio.run(second(asyncio.run(first())))

    def test_a_slow_reader_does_not_slow_calls(self) -> None:
        async def run() -> None:
            # What is read takes far longer than the limit of a call.
            async with nkv.aio.Client(self.address, timeout=60) as client, await client.subscribe("c") as events:
                writer = asyncio.ensure_future(client_writes())
                while not writer.done():
                    await anext(events)
                    await asyncio.sleep(0.05)
                    await client.get("c.1")
                await writer

        async def client_writes() -> None:
            async with nkv.aio.Client(self.stage.addresses["direct"], timeout=60) as client:
                for turn in range(10):
                    await asyncio.gather(*(client.put(f"c.{i % 100}", str(turn)) for i in range(2000)))

        asyncio.run(run())


if __name__ == "__main__":
    unittest.main()
