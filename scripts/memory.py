#!/usr/bin/env python3
"""Measures what nkv-server holds on behalf of its peers, one case at a time.

    memory.py SERVER slow-subscriber [--seconds 15]   one subscriber of everything reads 120 kB/s while keys come and go
    memory.py SERVER pending-values [--keys 50000]    values of 4,000 bytes change while one subscriber hardly reads, alone
                                                      and beside two that read and ask for other forms of values
    memory.py SERVER slow-storage [--connections 600] each connection puts 1 MiB while one sync takes long (needs strace)
    memory.py SERVER keys [--keys 200000]             bytes that a key takes beyond itself and its value

Each prints one line `TEST memory_... name=figure ...`. Sizes are MiB of resident memory, of the server alone. With
`--limit-mib N` the script fails if the figure that the case is about is larger, or if a client was closed.
"""
import argparse
import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

START_LIMIT_S = 30
SMALL_BUFFER = 4096
MIB = 1 << 20


class Server:
    """A server with a directory of its own; it ends with the `with` block."""

    def __init__(self, program, *arguments):
        self.command = [program, "127.0.0.1:0", "--log-level", "info", *arguments]

    def __enter__(self):
        self.directory = tempfile.TemporaryDirectory(prefix="nkv-memory-")
        data = [] if "memory" in self.command else ["--data-dir", os.path.join(self.directory.name, "data")]
        self.log = open(os.path.join(self.directory.name, "log"), "w+")
        self.child = subprocess.Popen(self.command + data, stderr=self.log, env=dict(os.environ, NO_COLOR="1"))
        limit = time.monotonic() + START_LIMIT_S
        while True:
            with open(self.log.name) as log:
                found = [line for line in log if "listening at" in line]
            if found:
                self.port = int(found[0].rsplit(":", 1)[1])
                break
            if self.child.poll() is not None or time.monotonic() > limit:
                sys.exit(f"the server does not start: {open(self.log.name).read()}")
            time.sleep(0.01)
        self.peak, self.watching = 0.0, True
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()
        return self

    def __exit__(self, *_):
        self.watching = False
        self.watcher.join()
        self.child.kill()
        self.child.wait()
        self.log.close()
        self.directory.cleanup()

    def rss_mib(self):
        with contextlib.suppress(OSError, StopIteration), open(f"/proc/{self.child.pid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024
        return 0.0

    def watch(self):
        while self.watching:
            self.peak = max(self.peak, self.rss_mib())
            time.sleep(0.02)

    def settled_mib(self):
        """Resident memory once it no longer changes, and the peak from then on."""
        before, limit = -1.0, time.monotonic() + 30
        while abs(self.rss_mib() - before) > 0.1 and time.monotonic() < limit:
            before = self.rss_mib()
            time.sleep(0.5)
        self.peak = before
        return before


class Client:
    def __init__(self, server, small=False, values="bytes"):
        self.socket = socket.socket()
        if small:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        self.socket.settimeout(120)
        self.socket.connect(("127.0.0.1", server.port))
        self.rest = b""
        self.ask({"type": "Connect", "values": values})

    def line(self):
        while b"\n" not in self.rest:
            more = self.socket.recv(1 << 16)
            if not more:
                raise ConnectionError("closed")
            self.rest += more
        line, self.rest = self.rest.split(b"\n", 1)
        return json.loads(line)

    def ask(self, request):
        self.socket.sendall(json.dumps(request).encode() + b"\n")
        answer = self.line()
        return next(iter(answer.values())) if isinstance(answer, dict) else answer

    def batch(self, requests, count):
        """Sends requests written one behind another, and waits for as many good answers."""
        # Answers are read beside: both directions have small buffers.
        sending = threading.Thread(target=self.socket.sendall, args=(requests,))
        sending.start()
        got, good = 0, 0
        while got < count:
            more = self.socket.recv(1 << 20)
            if not more:
                raise ConnectionError("closed")
            self.rest += more
            whole, self.rest = self.rest[: self.rest.rfind(b"\n") + 1], self.rest[self.rest.rfind(b"\n") + 1 :]
            got, good = got + whole.count(b"\n"), good + whole.count(b'"status":200')
        sending.join()
        if good != got:
            sys.exit(f"{got - good} of {got} requests were refused")


class Subscriber:
    """Subscribes to everything and reads on a thread of its own: all it can, or `bytes_s` a second."""

    def __init__(self, server, values="bytes", bytes_s=None):
        self.client = Client(server, small=bytes_s is not None, values=values)
        self.client.ask({"type": "Subscribe", "key": "*"})
        self.bytes_s, self.read, self.closed, self.last = bytes_s, 0, False, time.monotonic()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        step = self.bytes_s and self.bytes_s // 10
        with contextlib.suppress(OSError):
            while more := self.client.socket.recv(step or 1 << 20):
                self.read, self.last = self.read + len(more), time.monotonic()
                if step:
                    time.sleep(0.1 * len(more) / step)
        self.closed = True

    def wait_until_quiet(self):
        while not self.closed and time.monotonic() < self.last + 1:
            time.sleep(0.05)


def put(key, value, ttl_ms=None):
    ttl = f',"ttl_ms":{ttl_ms}' if ttl_ms else ""
    return f'{{"type":"Put","key":"{key}","len":{len(value)}{ttl}}}\n'.encode() + value + b"\n"


def put_all(client, keys, value, ttl_ms=None, each=1000):
    for at in range(0, len(keys), each):
        part = keys[at : at + each]
        client.batch(b"".join(put(key, value, ttl_ms) for key in part), len(part))


def slow_subscriber(args):
    """The queue of a subscriber that is slower than the writer, while no key lives for long."""
    with Server(args.server, "--persist", "memory", "--max-queued", "8M") as server:
        writer, slow, other = Client(server), Subscriber(server, bytes_s=120_000), Client(server)
        base, number, begin = server.settled_mib(), 0, time.monotonic()
        while time.monotonic() < begin + args.seconds:
            keys = [f"n.{n}" for n in range(number, number + 1000)]
            pairs = (put(key, b"x") + b'{"type":"Delete","key":"%s"}\n' % key.encode() for key in keys)
            writer.batch(b"".join(pairs), 2 * len(keys))
            number += len(keys)
        traced = other.ask({"type": "Trace", "key": "n.1"})["subscribers"]
        queued, skipped = (traced[0]["queued"], traced[0]["skipped"]) if traced else (0, 0)
        keys = other.ask({"type": "Stats"})["keys"]
        print(f"TEST memory_slow_subscriber seconds={args.seconds} changes={2 * number} keys={keys} "
              f"peak_mib={server.peak:.0f} base_mib={base:.1f} queued={queued} skipped={skipped} "
              f"read_kb={slow.read // 1000} closed={int(slow.closed)}")
        return server.peak, slow.closed


def pending_values(args):
    """Changes of values of 4,000 bytes that wait for one subscriber; what they add to a store that has the values."""
    # Bytes that are no text: as an array they take four times as much as themselves.
    value, keys, grown, closed = b"\xff" * 4000, [f"pending.k{n:08}" for n in range(args.keys)], [], False
    for healthy in ([], ["text", "bytes"]):
        with Server(args.server, "--persist", "memory", "--max-queued", "16M") as server:
            writer = Client(server)
            put_all(writer, keys, value)
            subscribers = [Subscriber(server, values=form) for form in healthy]
            slow = Subscriber(server, values="payload", bytes_s=12_000)
            base = server.settled_mib()
            put_all(writer, keys, value, each=100)
            for subscriber in subscribers:
                subscriber.wait_until_quiet()
            time.sleep(0.5)
            queued = sum(one["queued"] for one in writer.ask({"type": "Trace", "key": keys[0]})["subscribers"])
            grown.append((server.peak - base, server.rss_mib() - base, queued))
            closed |= slow.closed or any(subscriber.closed for subscriber in subscribers)
    (alone, alone_end, queued), (beside, beside_end, queued_beside) = grown
    print(f"TEST memory_pending_values keys={args.keys} values_mib={args.keys * len(value) / MIB:.0f} "
          f"alone_mib={alone:.0f} beside_mib={beside:.0f} alone_end_mib={alone_end:.0f} beside_end_mib={beside_end:.0f} "
          f"queued={queued} queued_beside={queued_beside} closed={int(closed)}")
    return beside, closed


class Put:
    """One connection that puts 1 MiB as its socket has room, and what became of it."""

    def __init__(self, server, number, selector):
        self.socket = socket.create_connection(("127.0.0.1", server.port))
        self.socket.setblocking(False)
        self.out, self.answer, self.end = memoryview(put(f"big.k{number:04}", b"v" * MIB)), b"", None
        self.selector = selector
        selector.register(self.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, self)

    def turn(self, events):
        try:
            if events & selectors.EVENT_WRITE:
                self.out = self.out[self.socket.send(self.out[: 1 << 18]) :]
                if not self.out:
                    self.selector.modify(self.socket, selectors.EVENT_READ, self)
            if events & selectors.EVENT_READ:
                more = self.socket.recv(4096)
                self.answer += more
                if self.answer.endswith(b"\n"):
                    self.end = "good" if b'"status":200' in self.answer else "refused"
                elif not more:
                    self.end = "closed"
        except OSError:
            self.end = "closed"
        if self.end:
            self.selector.unregister(self.socket)
            self.socket.close()


def slow_storage(args):
    """Values that connections have sent while storage takes its time: sent one after another, and all at once."""
    if not shutil.which("strace"):
        sys.exit("strace is not installed")
    found = [puts_during_a_sync(args, name, pace_s) for name, pace_s in (("", 0.02), ("_at_once", 0))]
    return max(peak for peak, _ in found), any(closed for _, closed in found)


def puts_during_a_sync(args, name, pace_s):
    """The next connection begins `pace_s` later: enough time to read one value, if the server reads."""
    with Server(args.server, "--max-queued", "64M") as server:
        other = Client(server)
        other.batch(put("first", b"x"), 1)
        base = server.settled_mib()
        inject = f"inject=fdatasync:delay_enter={args.delay_s * 1_000_000}:when=1"
        tracer = subprocess.Popen(["strace", "-f", "-p", str(server.child.pid), "-e", "trace=fdatasync", "-e", inject,
                                   "-o", "/dev/null"], stderr=subprocess.PIPE, text=True)
        try:
            next(line for line in tracer.stderr if "attached" in line)
            begin = time.monotonic()
            other.socket.sendall(put("second", b"x"))
            time.sleep(0.3)
            selector, puts = selectors.DefaultSelector(), []

            def turn(limit_s):
                for key, events in selector.select(limit_s):
                    key.data.turn(events)

            for number in range(args.connections):
                puts.append(Put(server, number, selector))
                limit = time.monotonic() + pace_s
                while time.monotonic() < limit:
                    turn(limit - time.monotonic())
            sent_s = time.monotonic() - begin
            while time.monotonic() < begin + args.delay_s:
                turn(0.1)
            during = server.peak
            while selector.get_map() and time.monotonic() < begin + args.delay_s + 120:
                turn(0.1)
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.wait()
        good, refused, closed = (sum(one.end == end for one in puts) for end in ("good", "refused", "closed"))
        print(f"TEST memory_slow_storage{name} connections={args.connections} delay_s={args.delay_s} sent_s={sent_s:.1f} "
              f"base_mib={base:.1f} during_mib={during:.0f} peak_mib={server.peak:.0f} good={good} refused={refused} "
              f"closed={closed} unanswered={len(puts) - good - refused - closed}")
        return server.peak, good < len(puts)


def bytes_of_keys(args):
    """Bytes of resident memory that a key takes beyond its own and those of its value."""
    keys, value = [f"bench.k{n:08}" for n in range(args.keys)], b"v" * 100
    found = {}
    for storage, arguments in (("memory", ["--persist", "memory"]), ("log", ["--durability", "os"])):
        for name, ttl_ms in (("plain", None), ("ttl", 3_600_000)):
            with Server(args.server, *arguments) as server:
                client = Client(server)
                base = server.settled_mib()
                put_all(client, keys, value, ttl_ms)
                taken = (server.settled_mib() - base) * MIB / len(keys)
                found[f"{storage}_{name}"] = taken - len(keys[0]) - len(value)
    figures = " ".join(f"{name}_bytes={taken:.0f}" for name, taken in found.items())
    print(f"TEST memory_keys keys={args.keys} {figures}")
    return 0, False


CASES = {
    "slow-subscriber": slow_subscriber,
    "pending-values": pending_values,
    "slow-storage": slow_storage,
    "keys": bytes_of_keys,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--seconds", type=int, default=15)
    parser.add_argument("--keys", type=int)
    parser.add_argument("--connections", type=int, default=600)
    parser.add_argument("--delay-s", type=int, default=20)
    parser.add_argument("--limit-mib", type=float)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args.keys = args.keys or {"pending-values": 50_000}.get(args.case, 200_000)
    figure, closed = CASES[args.case](args)
    if args.limit_mib is not None and (figure > args.limit_mib or closed):
        sys.exit(f"FAILED: {figure:.0f} MiB where {args.limit_mib:.0f} are allowed" + ", and a client was closed" * closed)


if __name__ == "__main__":
    main()
