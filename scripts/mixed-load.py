#!/usr/bin/env python3
"""Runs nkv-server under mixed load for a while, and watches what it remembers and how much memory it takes.

    mixed-load.py SERVER [--seconds 60] [--seed N]

Writers put, delete, and put for a time; readers get and list; connections come, subscribe and go without a word; of the
subscribers of everything, half read on and half hardly read. For the first third of the time the server is killed every
few seconds, and what was acknowledged is asked for at each start. From then on one process runs through, and its resident
memory is noted every second; how fast it grows is told of the second half. In the end all subscribers must hold what the
store holds.
"""
import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time

WRITERS, READERS, FAST, SLOW = 6, 2, 3, 3
KEYS_OF_A_WRITER = 500
LIFE_S = 8
# Memory that one minute may add at most, and that a run may add in all before that counts: allocators keep some.
GROWTH_KIB_MINUTE, GROWTH_KIB = 2048, 16384


class Client:
    def __init__(self, port, **options):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        if options.get("small"):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.stream = self.socket.makefile("rwb")
        self.ask({"type": "Connect", "values": "text"})

    def ask(self, request):
        self.stream.write(json.dumps(request).encode() + b"\n")
        self.stream.flush()
        return next(iter(self.line().values()))

    def line(self):
        line = self.stream.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("closed")
        message = json.loads(line)
        return message if isinstance(message, dict) else {message: {}}


class Load:
    """What runs against one life of a server."""

    def __init__(self, port, seed, known):
        self.port, self.seed, self.known = port, seed, known  # known: key -> (revision, value or None), one owner each
        self.stop, self.broken, self.ops, self.under_way = threading.Event(), [], 0, {}
        self.views = [{} for _ in range(FAST + SLOW)]
        subscribers = [(self.subscribe, (n,)) for n in range(FAST + SLOW)]
        self.subscribers = [self.thread(*work) for work in subscribers]
        self.others = [self.thread(self.write, (n,)) for n in range(WRITERS)]
        self.others += [self.thread(self.read, (n,)) for n in range(READERS)] + [self.thread(self.come_and_go, ())]

    def thread(self, work, arguments):
        def run():
            try:
                work(*arguments)
            except (OSError, ValueError) as error:
                self.broken.append(error)
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def write(self, writer):
        rng, client = random.Random(f"{self.seed} {writer}"), Client(self.port)
        while not self.stop.is_set():
            key = f"w{writer}.{rng.randrange(KEYS_OF_A_WRITER)}"
            self.under_way[writer] = key
            kind, value = rng.random(), f"{rng.randrange(10**9)} " + "x" * rng.randrange(500)
            if kind < 0.1:
                client.ask({"type": "Put", "key": "t." + key, "value": value, "ttl_ms": rng.randrange(1, 2000)})
            elif kind < 0.25:
                answer = client.ask({"type": "Delete", "key": key})
                if answer["status"] == 200:
                    self.known[key] = (answer["revision"], None)
            else:
                answer = client.ask({"type": "Put", "key": key, "value": value})
                if answer["status"] != 200:
                    raise ValueError(answer)
                self.known[key] = (answer["revision"], value)
            self.ops += 1

    def read(self, reader):
        rng, client = random.Random(f"{self.seed} reader {reader}"), Client(self.port)
        while not self.stop.is_set():
            writer = rng.randrange(WRITERS)
            client.ask({"type": "Get", "key": f"w{writer}.{rng.randrange(KEYS_OF_A_WRITER)}"})
            client.ask({"type": "List", "key": f"w{writer}.*", "limit": 50})

    def come_and_go(self):
        while not self.stop.is_set():
            clients = [Client(self.port) for _ in range(10)]
            for client in clients:
                client.stream.write(b'{"type":"Subscribe","key":"w1.*","snapshot":true}\n{"type":"Get","key"')
                client.stream.flush()
            for client in clients:
                client.stream.close()
                client.socket.close()

    def subscribe(self, number):
        slow, view = number >= FAST, self.views[number]
        client = Client(self.port, small=slow)
        client.stream.write(b'{"type":"Subscribe","key":"*","snapshot":true}\n')
        client.stream.flush()
        while True:
            (kind, body), = client.line().items()
            if kind == "Update":
                view[body["key"]] = (body["revision"], body["value"])
            elif kind == "Close":
                view[body["key"]] = (body["revision"], None)
            if body.get("key") == "final" and kind == "Update":
                return
            if slow and not self.stop.is_set():
                self.stop.wait(0.02)

    def end(self):
        """Stops writing, and has every subscriber told so."""
        self.stop.set()
        for thread in self.others:
            thread.join(60)
        Client(self.port).ask({"type": "Put", "key": "final", "value": "x"})
        for thread in self.subscribers:
            thread.join(60)
            if thread.is_alive():
                sys.exit("a subscriber was not told the last change within 60 s")


def start(server, data):
    child = subprocess.Popen([server, "127.0.0.1:0", "--data-dir", data, "--log-level", "info"], stderr=subprocess.PIPE,
                             text=True, env=dict(os.environ, NO_COLOR="1"))
    for line in child.stderr:
        if "listening at" in line:
            threading.Thread(target=child.stderr.read, daemon=True).start()
            return child, int(line.rsplit(":", 1)[1])
    sys.exit(f"the server ended with {child.wait()}")


def state(port):
    answer = Client(port).ask({"type": "Get", "key": "*"})
    found = zip(answer["keys"], answer["revisions"], answer["data"])
    return {key: (revision, value) for key, revision, value in found if key.startswith("w")}


def lost(present, known, under_way):
    """Keys that are older than what was acknowledged, or gone although nobody was about to delete them."""
    for key, (revision, value) in known.items():
        there = present.get(key)
        if there is None and value is not None and key not in under_way:
            yield key
        if there and (there[0] < revision or there[0] == revision and there[1] != value):
            yield key


def rss_kib(pid):
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def slope_kib_minute(samples):
    """By least squares, of samples that are a second apart."""
    middle, mean = (len(samples) - 1) / 2, sum(samples) / len(samples)
    spread = sum((n - middle) ** 2 for n in range(len(samples)))
    return 60 * sum((n - middle) * (kib - mean) for n, kib in enumerate(samples)) / spread if spread else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=int(os.environ.get("NKV_SEED") or random.randrange(10**9)))
    args = parser.parse_args()
    print(f"mixed load: seed {args.seed}")
    known, kills, ops, failed = {}, 0, 0, []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nkv-mixed-") as directory:
        data = os.path.join(directory, "data")
        child, port = start(args.server, data)
        try:
            while time.monotonic() - began < args.seconds / 3:
                load = Load(port, args.seed + kills, known)
                time.sleep(min(LIFE_S, args.seconds / 6))
                child.kill()
                child.wait()
                load.stop.set()
                for thread in load.others:
                    thread.join(60)
                kills, ops = kills + 1, ops + load.ops
                child, port = start(args.server, data)
                present = state(port)
                wrong = list(lost(present, known, load.under_way.values()))
                if wrong:
                    failed.append(f"{len(wrong)} acknowledged writes are lost, {wrong[0]} among them")
                known = present

            load = Load(port, args.seed + kills, known)
            samples, warm = [], time.monotonic()
            while time.monotonic() - began < args.seconds or len(samples) < 10:
                time.sleep(1)
                # The first seconds fill the store and the buffers.
                if time.monotonic() - warm > min(10, args.seconds / 6):
                    samples.append(rss_kib(child.pid))
            load.end()
            ops += load.ops
            if load.broken:
                failed.append(f"a client was cut: {load.broken[0]!r}")
            present = state(port)
            for number, view in enumerate(load.views):
                view = {key: entry for key, entry in view.items() if key.startswith("w") and entry[1] is not None}
                if view != present:
                    failed.append(f"subscriber {number} does not hold what the store holds")
        finally:
            child.kill()
            child.wait()
    # What waits for slow subscribers grows at first, up to the number of keys.
    slope = slope_kib_minute(samples[len(samples) // 2:])
    print(f"TEST soak_mixed seconds={args.seconds} ops={ops} kills={kills} subscribers={FAST + SLOW} "
          f"lost={sum('lost' in text for text in failed)} diverged={sum('subscriber' in text for text in failed)}")
    print(f"TEST soak_rss kib_start={samples[0]} kib_end={samples[-1]} kib_max={max(samples)} "
          f"kib_per_minute={slope:.0f} seconds={len(samples)}")
    if slope > GROWTH_KIB_MINUTE and samples[-1] - samples[0] > GROWTH_KIB:
        failed.append("memory grows")
    if failed:
        sys.exit("FAILED: " + "; ".join(failed))


main()
