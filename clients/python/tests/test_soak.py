"""Random writes and random cuts: in the end each reader has the state of the server. NKV_SOAK_S is how long; prints its seed on failure."""

from __future__ import annotations

import asyncio
import os
import random
import time
import unittest

from tests.stage import Stage

import nkv
import nkv.aio

SECONDS = float(os.environ.get("NKV_SOAK_S", "5"))


class Reader:
    """What a program makes of the events, and whether they can be true."""

    def __init__(self) -> None:
        self.state: dict[str, bytes] = {}
        self.revisions: dict[str, nkv.Revision] = {}

    def take(self, event: nkv.Event) -> None:
        if isinstance(event, nkv.Synced):
            return
        last = self.revisions.get(event.key)
        if last is not None and last.epoch == event.revision.epoch:
            assert event.revision > last, f"{event} after {last}"
        self.revisions[event.key] = event.revision
        if isinstance(event, nkv.Update):
            self.state[event.key] = event.value
        else:
            assert event.key in self.state, f"{event} of a key that was not there"
            del self.state[event.key]


@unittest.skipUnless(os.environ.get("NKV_SERVER") or os.environ.get("CI") == "true", "NKV_SERVER is not set")
class Soak(unittest.TestCase):
    def test_cuts_and_lost_data(self) -> None:
        seed = int(os.environ.get("NKV_SOAK_SEED") or random.randrange(1 << 32))
        with Stage() as stage:
            try:
                asyncio.run(self.soak(stage, random.Random(seed)))
            except BaseException:
                print("seed", seed)
                raise

    async def soak(self, stage: Stage, chance: random.Random) -> None:
        until = time.monotonic() + SECONDS
        # Pauses stay short, so that much happens.
        async with nkv.aio.Client(stage.addresses["direct"], timeout=60) as writer, nkv.aio.Client(stage.addresses["proxy"], timeout=60) as client:
            for each in (client,):
                each._options.backoff_max = 0.1
            with nkv.Client(stage.addresses["proxy"], timeout=60) as plain:
                plain._core.options.backoff_max = 0.1
                branch = await client.watch_branch("s")
                plain_branch = await asyncio.to_thread(plain.watch_branch, "s.*")
                subscriptions = [await client.subscribe(p) for p in ("s", "s.*", "*", "s", "s.1")]
                readers = [Reader() for _ in subscriptions]

                async def read(subscription: nkv.aio.Subscription, reader: Reader) -> None:
                    async for event in subscription:
                        reader.take(event)
                        if chance.random() < 0.01:
                            await asyncio.sleep(0.05)

                tasks = [asyncio.ensure_future(read(s, r)) for s, r in zip(subscriptions, readers)]
                turns = 0
                while time.monotonic() < until:
                    turns += 1
                    for _ in range(chance.randrange(40)):
                        key = f"s.{chance.randrange(20)}"
                        if chance.random() < 0.3:
                            await writer.delete(key)
                        else:
                            await writer.put(key, str(turns) * chance.choice((1, 1, 2000)))
                    what = chance.random()
                    if what < 0.4:
                        await asyncio.to_thread(stage.ask, "cut")
                    elif what < 0.7:
                        await asyncio.to_thread(stage.ask, f"cut-after-bytes {chance.randrange(20000)}")
                    elif what < 0.72:
                        for command in ("server-kill", "server-wipe", "server-start"):
                            await asyncio.to_thread(stage.ask, command)
                    await asyncio.sleep(chance.random() * 0.1)
                await asyncio.to_thread(stage.ask, "cut")  # ends a cut that is still to come
                await writer.put("s.end", "end")
                truth = {entry.key: entry.value async for entry in writer.get_all("s.*")}
                wanted = [truth, truth, truth, truth, {k: v for k, v in truth.items() if k == "s.1"}]
                limit = time.monotonic() + 60
                while not ([reader.state for reader in readers] == wanted and dict(branch) == truth and dict(plain_branch) == truth):
                    for task in tasks:
                        if task.done():
                            await task
                    assert time.monotonic() < limit, ([len(r.state) for r in readers], len(truth), len(branch), len(plain_branch))
                    await asyncio.sleep(0.05)
                for task in tasks:
                    task.cancel()


if __name__ == "__main__":
    unittest.main()
