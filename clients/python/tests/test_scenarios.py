"""The cases that all languages share, against the real server: each with the asyncio client and with the blocking one."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import functools
import json
import os
import time
import unittest
from typing import Any

from tests.stage import SCENARIOS, Stage

import nkv
import nkv.aio

#: The limit of a wait that names none, and of a request.
WAIT_S = 60.0
#: The limit of what is to return at once.
SOON_S = 10.0
ERRORS: dict[str, type[BaseException]] = {
    "other_epoch": nkv.OtherEpoch, "conflict": nkv.Conflict, "refused": nkv.Refused, "outcome_unknown": nkv.OutcomeUnknown,
    "timeout": nkv.Timeout, "cannot_connect": nkv.CannotConnect, "closed": nkv.Closed, "invalid_key": nkv.InvalidKey,
    "invalid_argument": ValueError, "cancelled": asyncio.CancelledError,
}


class Aio:
    """Drives the asyncio client."""

    Client = nkv.aio.Client

    async def call(self, target: Any, method: str, *args: Any, **options: Any) -> Any:
        return await getattr(target, method)(*args, **options)

    async def get_all(self, client: Any, pattern: str, page: int) -> list[nkv.Entry]:
        return [entry async for entry in client.get_all(pattern, page=page)]

    async def next(self, subscription: Any, seconds: float) -> nkv.Event | None:
        try:
            event: nkv.Event = await asyncio.wait_for(anext(subscription), seconds)
            return event
        except StopAsyncIteration:
            return None

    async def many(self, client: Any, calls: list[tuple[Any, ...]]) -> list[Any]:
        return await asyncio.gather(*(getattr(client, name)(*args) for name, *args in calls), return_exceptions=True)

    async def update(self, client: Any, name: str, change: Any, **options: Any) -> Any:
        return await client.update(name, change, **options)

    async def cancel(self, step: Any, seconds: float) -> None:
        task = asyncio.ensure_future(step(None))
        await asyncio.sleep(seconds)
        task.cancel()
        await task


class Plain:
    """Drives the blocking client from threads."""

    Client = nkv.Client

    def __init__(self) -> None:
        self._threads = concurrent.futures.ThreadPoolExecutor(32)

    async def run(self, function: Any, *args: Any, **options: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(function, *args, **options))

    async def call(self, target: Any, method: str, *args: Any, **options: Any) -> Any:
        return await self.run(getattr(target, method), *args, **options)

    async def get_all(self, client: Any, pattern: str, page: int) -> list[nkv.Entry]:
        entries: list[nkv.Entry] = await self.run(lambda: list(client.get_all(pattern, page=page)))
        return entries

    async def next(self, subscription: Any, seconds: float) -> nkv.Event | None:
        try:
            event: nkv.Event = await self.run(subscription.next, seconds)
            return event
        except nkv.Closed:
            return None

    async def many(self, client: Any, calls: list[tuple[Any, ...]]) -> list[Any]:
        pipeline = client.pipeline()
        for name, *args in calls:
            getattr(pipeline, name)(*args)
        results: list[Any] = await self.run(pipeline.run)
        return results

    async def update(self, client: Any, name: str, change: Any, **options: Any) -> Any:
        loop = asyncio.get_running_loop()

        def blocking(old: nkv.Entry | None) -> Any:
            return asyncio.run_coroutine_threadsafe(change(old), loop).result()

        return await self.run(client.update, name, blocking, **options)

    async def cancel(self, step: Any, seconds: float) -> None:
        await step(seconds)


def data(value: Any) -> bytes:
    if isinstance(value, dict):
        return bytes.fromhex(value["hex"]) if "hex" in value else value["repeat"].encode() * value["times"]
    return str(value).encode()


def key(value: Any) -> str:
    if isinstance(value, dict):
        if "utf16" in value:
            return "".join(map(chr, value["utf16"]))
        return data(value).decode("utf-8", "surrogateescape")
    return str(value)


def as_list(event: nkv.Event) -> tuple[Any, ...]:
    if isinstance(event, nkv.Update):
        return ("update", event.key, event.value)
    return ("gone", event.key, event.reason) if isinstance(event, nkv.Gone) else ("synced",)


def wanted(event: list[Any]) -> tuple[Any, ...]:
    return ("update", event[1], data(event[2])) if event[0] == "update" else tuple(event)


def numbered(number: int, size: int) -> bytes:
    return str(number).encode().ljust(size, b"x")


class Case:
    """Interprets one case."""

    def __init__(self, driver: Any, case: dict[str, Any], stage: Stage) -> None:
        self.driver, self.stage = driver, stage
        self.options = case.get("clients", {"a": {"via": "proxy"}})
        self.clients: dict[str, Any] = {}
        self.revisions: dict[str, nkv.Revision] = {}
        self.open: dict[str, Any] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def run(self, steps: list[dict[str, Any]]) -> None:
        for number, step in enumerate(steps):
            try:
                await self.step(step)
            except BaseException as error:
                raise AssertionError(f"step {number}: {json.dumps(step)[:300]}: {error!r}") from error

    async def close(self) -> None:
        for client in self.clients.values():
            await self.driver.call(client, "close")

    def client(self, step: dict[str, Any]) -> Any:
        name = step.get("on", "a")
        if name not in self.clients:
            options = self.options[name]
            self.clients[name] = self.driver.Client(self.stage.addresses[options["via"]],
                                                    timeout=options.get("timeout_ms", WAIT_S * 1000) / 1000)
        return self.clients[name]

    async def step(self, step: dict[str, Any], timeout: float | None = None) -> None:
        errors = step.get("error", [])
        allowed = [errors] if isinstance(errors, str) else errors
        try:
            await getattr(self, "op_" + step["op"])(step, timeout)
        except tuple(ERRORS[name] for name in allowed if name != "ok") as error:
            if step["op"].endswith("_many"):
                raise
            if "status" in step:
                assert isinstance(error, nkv.Refused) and error.status == step["status"], error
            if "revision" in step and isinstance(error, nkv.Conflict):
                assert error.revision == self.revision(step["revision"]), error.revision
        else:
            assert not allowed or "ok" in allowed or step["op"].endswith("_many"), f"no error, but {allowed} was expected"

    def revision(self, value: Any) -> Any:
        return self.revisions[value[1:]] if isinstance(value, str) else value

    def call_options(self, step: dict[str, Any], timeout: float | None) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if "if_revision" in step:
            options["if_revision"] = self.revision(step["if_revision"])
        if "ttl_ms" in step:
            options["ttl"] = step["ttl_ms"] / 1000
        if timeout is not None:
            options["timeout"] = timeout
        elif "timeout_ms" in step:
            options["timeout"] = step["timeout_ms"] / 1000
        return options

    async def op_put(self, step: dict[str, Any], timeout: float | None) -> None:
        options = self.call_options(step, timeout)
        revision = await self.driver.call(self.client(step), "put", key(step["key"]), data(step["value"]), **options)
        self.revisions[step.get("save", "_")] = revision

    async def op_get(self, step: dict[str, Any], timeout: float | None) -> None:
        limit = time.monotonic() + WAIT_S
        while True:
            entry = await self.driver.call(self.client(step), "get", key(step["key"]), **self.call_options(step, timeout))
            is_so = entry is None if step.get("absent") else entry is not None and entry.value == data(step["value"])
            if is_so or not step.get("becomes") or time.monotonic() > limit:
                break
            await asyncio.sleep(0.02)
        if step.get("absent"):
            assert entry is None, entry
            return
        assert entry is not None and entry.key == key(step["key"]) and entry.value == data(step["value"]), entry
        assert "revision" not in step or entry.revision == self.revision(step["revision"]), entry
        self.revisions[step.get("save", "_")] = entry.revision

    async def op_delete(self, step: dict[str, Any], timeout: float | None) -> None:
        options = self.call_options(step, timeout)
        count = await self.driver.call(self.client(step), "delete", key(step["key"]), **options)
        assert count == step.get("count", count), count

    async def op_update(self, step: dict[str, Any], timeout: float | None) -> None:
        calls = 0

        async def change(old: nkv.Entry | None) -> bytes | None:
            nonlocal calls
            calls += 1
            if calls == 1 or step.get("always"):
                await self.run(step.get("meanwhile", []))
            return None if step.get("keep") else (old.value if old else b"") + step["append"].encode()

        options = self.call_options(step, timeout)
        try:
            revision = await self.driver.update(self.client(step), key(step["key"]), change, **options)
        finally:
            assert calls == step.get("calls", calls), calls
        assert (revision is None) is step.get("absent", False), revision
        assert "revision" not in step or revision == self.revision(step["revision"]), revision
        self.revisions[step.get("save", "_")] = revision

    async def op_update_many(self, step: dict[str, Any], timeout: float | None) -> None:
        async def add(old: nkv.Entry | None) -> str:
            return str(int(old.text if old else 0) + 1)

        clients = [self.client({"on": name}) for name in step["clients"]] * step["count"]
        await asyncio.gather(*(self.driver.update(client, key(step["key"]), add) for client in clients))

    async def op_stats(self, step: dict[str, Any], timeout: float | None) -> None:
        stats = await self.driver.call(self.client(step), "stats")
        for name, value in step["is"].items():
            assert getattr(stats, name) == value, (name, stats)
        assert all(getattr(stats, name) > 0 for name in step.get("above_0", ())) and len(stats.epoch) == 32, stats

    async def op_exists(self, step: dict[str, Any], timeout: float | None) -> None:
        assert await self.driver.call(self.client(step), "exists", key(step["key"])) is step["is"]

    async def op_list(self, step: dict[str, Any], timeout: float | None) -> None:
        options = {name: step[name] for name in ("limit", "after") if name in step}
        page = await self.driver.call(self.client(step), "list", key(step["pattern"]), **options)
        assert [listed.key for listed in page.keys] == step["keys"] and page.more == step["more"], page

    async def op_get_all(self, step: dict[str, Any], timeout: float | None) -> None:
        entries = await self.driver.get_all(self.client(step), key(step["pattern"]), step["page"])
        assert [(entry.key, entry.value) for entry in entries] == [(k, data(v)) for k, v in step["entries"]], entries

    async def op_put_many(self, step: dict[str, Any], timeout: float | None) -> None:
        keys = step.get("keys", step["count"])
        calls = [("put", f"{step['prefix']}.{i % keys}", numbered(i, step.get("size", 0))) for i in range(step["count"])]
        for result in await self.driver.many(self.client(step), calls):
            assert isinstance(result, nkv.Revision), result

    async def op_get_many(self, step: dict[str, Any], timeout: float | None) -> None:
        calls = [("get", f"{step['prefix']}.{i}") for i in range(step["count"])]
        allowed = tuple(ERRORS[name] for name in step.get("error", ()))
        for i, entry in enumerate(await self.driver.many(self.client(step), calls)):
            if not isinstance(entry, allowed):
                assert entry.value == numbered(i, step.get("size", 0)), (i, entry)

    async def op_mix_many(self, step: dict[str, Any], timeout: float | None) -> None:
        calls: list[tuple[Any, ...]] = []
        for i in range(step["count"]):
            calls.append(("put", f"{step['prefix']}.{i}", numbered(i, step["size"])))
            calls.append(("get", f"{step['prefix']}.{i - 1}"))
        for i, result in enumerate(await self.driver.many(self.client(step), calls)):
            if i % 2 == 0:
                assert isinstance(result, nkv.Revision), result
            else:
                assert result is None or result.value == numbered(i // 2 - 1, step["size"]), (i, result)

    async def op_subscribe(self, step: dict[str, Any], timeout: float | None) -> None:
        self.open[step["name"]] = await self.driver.call(
            self.client(step), "subscribe", step["patterns"] if "patterns" in step else key(step["pattern"]), snapshot=step.get("snapshot", True),
            exact=step.get("exact", False))

    async def op_unsubscribe(self, step: dict[str, Any], timeout: float | None) -> None:
        await self.driver.call(self.open[step["name"]], "close")

    op_unwatch = op_unsubscribe

    async def op_events(self, step: dict[str, Any], timeout: float | None) -> None:
        expect = [wanted(event) for event in step["expect"]]
        with_synced = ("synced",) in expect
        until = time.monotonic() + WAIT_S
        got: list[tuple[Any, ...]] = []
        try:
            while len(got) < len(expect):
                event = await self.driver.next(self.open[step["name"]], until - time.monotonic())
                assert event is not None, f"ended after {got}"
                if with_synced or not isinstance(event, nkv.Synced):
                    got.append(as_list(event))
        except (nkv.Timeout, asyncio.TimeoutError):
            raise AssertionError(f"only {got}") from None
        same = got == expect if step.get("ordered") else collections.Counter(got) == collections.Counter(expect)
        assert same, got
        await self.quiet(step, with_synced)

    async def quiet(self, step: dict[str, Any], with_synced: bool) -> None:
        until = time.monotonic() + step.get("quiet_ms", 0) / 1000
        while (left := until - time.monotonic()) > 0:
            try:
                event = await self.driver.next(self.open[step["name"]], left)
            except (nkv.Timeout, asyncio.TimeoutError):
                return
            assert isinstance(event, nkv.Synced) and not with_synced, f"one more: {event}"

    async def op_state(self, step: dict[str, Any], timeout: float | None) -> None:
        entries = {name: data(value) for name, value in step["entries"].items()}
        state: dict[str, bytes] = {}
        while state != entries:
            event = await self.driver.next(self.open[step["name"]], WAIT_S)
            if isinstance(event, nkv.Update):
                state[event.key] = event.value
            elif isinstance(event, nkv.Gone):
                del state[event.key]

    async def op_ended(self, step: dict[str, Any], timeout: float | None) -> None:
        while await self.driver.next(self.open[step["name"]], WAIT_S) is not None:
            pass

    async def op_conflated(self, step: dict[str, Any], timeout: float | None) -> None:
        keys, count = step["keys"], step["count"]
        last = {f"{step['prefix']}.{i % keys}": str(i).encode() for i in range(count - keys, count)}
        state: dict[str, bytes] = {}
        read = changes = 0
        while state != last:
            event = await self.driver.next(self.open[step["name"]], WAIT_S)
            read += 1
            if isinstance(event, nkv.Update):
                state[event.key] = event.value
                changes += 1 + event.skipped
        assert changes == step["changes"], changes
        assert read <= step["at_most"], read

    async def op_poll_cancel(self, step: dict[str, Any], timeout: float | None) -> None:
        async def put() -> None:
            for name, value in step["put_during"]:
                await asyncio.sleep(0.04)
                await self.op_put({"on": "b", "key": name, "value": value}, None)

        puts = asyncio.ensure_future(put())
        got = []
        limit = time.monotonic() + WAIT_S
        times = 0
        while times < step["times"] or (len(got) < len(step["expect"]) and time.monotonic() < limit):
            times += 1
            try:
                got.append(as_list(await self.driver.next(self.open[step["name"]], step["each_ms"] / 1000)))
            except (nkv.Timeout, asyncio.TimeoutError):
                pass
        await puts
        assert got == [wanted(event) for event in step["expect"]], got

    async def op_watch(self, step: dict[str, Any], timeout: float | None) -> None:
        self.open[step["name"]] = await self.driver.call(self.client(step), "watch", key(step["key"]))

    async def op_watch_branch(self, step: dict[str, Any], timeout: float | None) -> None:
        self.open[step["name"]] = await self.driver.call(self.client(step), "watch_branch", key(step["pattern"]))

    async def op_watch_is(self, step: dict[str, Any], timeout: float | None) -> None:
        value = None if step.get("absent") else data(step["value"])
        watch = self.open[step["name"]]
        await self.until(lambda: watch.value == value, lambda: watch.value)

    async def op_branch_is(self, step: dict[str, Any], timeout: float | None) -> None:
        entries = {name: data(value) for name, value in step["entries"].items()}
        watch = self.open[step["name"]]
        await self.until(lambda: dict(watch) == entries, lambda: dict(watch))

    async def op_branch_is_now(self, step: dict[str, Any], timeout: float | None) -> None:
        entries = {name: data(value) for name, value in step["entries"].items()}
        assert dict(self.open[step["name"]]) == entries, dict(self.open[step["name"]])

    async def op_lost(self, step: dict[str, Any], timeout: float | None) -> None:
        watch = self.open[step["name"]]
        await self.until(lambda: not watch.is_live, lambda: "live")

    async def until(self, is_so: Any, present: Any) -> None:
        limit = time.monotonic() + WAIT_S
        while not is_so():
            assert time.monotonic() < limit, f"still {present()}"
            await asyncio.sleep(0.01)

    async def op_cancel(self, step: dict[str, Any], timeout: float | None) -> None:
        seconds = step["after_ms"] / 1000
        began = time.monotonic()
        inner = step["step"]
        await self.driver.cancel(lambda limit: self.step(inner, limit), seconds)
        assert time.monotonic() - began < seconds + SOON_S

    async def op_begin(self, step: dict[str, Any], timeout: float | None) -> None:
        self.client(step["step"])
        self.tasks[step["name"]] = asyncio.ensure_future(self.step(step["step"]))
        await asyncio.sleep(0)

    async def op_join(self, step: dict[str, Any], timeout: float | None) -> None:
        await asyncio.wait_for(self.tasks[step["name"]], step.get("within_ms", WAIT_S * 1000) / 1000)

    async def op_stage(self, step: dict[str, Any], timeout: float | None) -> None:
        limit = time.monotonic() + WAIT_S
        while True:
            answer = await asyncio.to_thread(self.stage.ask, step["command"])
            if answer == step.get("reply", answer):
                break
            assert time.monotonic() < limit, f"still {answer}"
            await asyncio.sleep(0.05)
        if "at_least" in step:
            assert int(answer) >= step["at_least"], answer
        if "at_most" in step:
            assert int(answer) <= step["at_most"], answer

    async def op_sleep(self, step: dict[str, Any], timeout: float | None) -> None:
        await asyncio.sleep(step["ms"] / 1000)

    async def op_close(self, step: dict[str, Any], timeout: float | None) -> None:
        began = time.monotonic()
        await self.driver.call(self.client(step), "close")
        assert time.monotonic() - began < step.get("within_ms", SOON_S * 1000) / 1000

    async def op_within(self, step: dict[str, Any], timeout: float | None) -> None:
        began = time.monotonic()
        await self.run(step["steps"])
        assert time.monotonic() - began < step["ms"] / 1000


@unittest.skipUnless(os.environ.get("NKV_SERVER") or os.environ.get("CI") == "true", "NKV_SERVER is not set")
class Scenarios(unittest.TestCase):
    """One test for each case and client. NKV_CASE chooses those with this text in their name."""


def _add(driver: Any, case: dict[str, Any]) -> None:
    async def run(stage: Stage) -> None:
        played = Case(driver(), case, stage)
        try:
            await played.run(case["steps"])
        finally:
            await played.close()

    def test(self: Scenarios) -> None:
        with Stage() as stage:
            asyncio.run(run(stage))

    name = "".join(c if c.isalnum() else "_" for c in case["name"])
    setattr(Scenarios, f"test_{driver.__name__.lower()}_{name}", test)


with open(os.path.join(SCENARIOS, "cases.json"), encoding="utf-8") as cases:
    for _case in json.load(cases):
        if os.environ.get("NKV_CASE", "") in _case["name"]:
            _add(Aio, _case)
            _add(Plain, _case)
