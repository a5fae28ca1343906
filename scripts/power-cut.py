#!/usr/bin/env python3
"""Cuts the power under a running nkv-server, and checks that what it promised is there afterwards.

    power-cut.py SERVER [--cycles 60] [--fast] [--fs ext4 --fs xfs] [--scenario NAME]... [--seed N]
    power-cut.py --check    only whether such file systems can be mounted here

The data directory is on a file system of its own in a loop device (root is needed). In each cycle eight clients put
values, and delete some, while the file system is shut down with FS_IOC_GOINGDOWN, with or without its journal written
first: nothing more reaches the device, as when the power goes. Then it is mounted again, which replays the journal, and a
new server is asked for all that was acknowledged before the cut began. What arrives later is ignored: the device may be
gone already.

    sync      durability `sync`, small values: nothing acknowledged may be lost
    compact   the same with large values of few keys, so that segments come and go: nothing may be lost
    start     the cut comes while a server makes its first directory, or soon after: nothing may be lost
    migrate   the server goes on with a directory of storage format 2, until large values have begun segments of format 3, or not
              yet: nothing may be lost, of what was there before either
    interval  `interval:50ms`: nothing may be lost that was acknowledged earlier than the interval, the time of syncs and
              WINDOW_SLACK_MS before the cut
    control   durability `os`: something must be lost, or the cuts prove nothing

In all of them what survives is a prefix, each value is whole, what was deleted does not come back, what one server has
shown stays, nothing is refused before the cut, and the epoch changes where something acknowledged was lost. `--cycles` is
that of `sync`; the others are fewer. A file system that cannot be mounted is passed over, unless NKV_FAULTS=1. After Ctrl-C
or SIGTERM the cycle ends as always, and no other begins.
"""
import argparse
import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

GOINGDOWN = 0x8004587D
# With the journal written first, and without.
LOG_FLUSH, NO_LOG_FLUSH = 1, 2
WRITERS = 8
INTERVAL_MS = 50
# What may be lost with `interval` besides: a sync may be under way when another is due, so twice the longest that was
# measured beside the server, waiting for a processor included; and this for what a busy machine adds. A server that
# never syncs loses all that was written in two seconds or more; but a new segment is synced with any durability, so in
# every second cycle the writers take their time, and one segment does.
WINDOW_SLACK_MS, PACE_S = 1000, 0.01
START_LIMIT_S = 30
# name: durability, sizes of values, keys of a writer, seconds of writing, cycles for each hundred of `sync`
SCENARIOS = {
    "sync": ("sync", (0, 300), 7, (0.05, 0.35), 100),
    "compact": ("sync", (40_000, 120_000), 2, (0.2, 0.8), 40),
    "start": ("sync", (0, 300), 7, (0, 0.1), 60),
    "migrate": ("sync", (40_000, 120_000), 2, (0, 0.8), 40),
    "interval": (f"interval:{INTERVAL_MS}ms", (0, 300), 7, (2, 3), 30),
    "control": ("os", (0, 300), 7, (0.05, 0.35), 20),
}
# Every fifth number of a writer deletes a key, but never its first one, which thus shows all that was lost.
DELETE_EVERY = 5
FAST = {"sync": 12, "compact": 6, "start": 10, "migrate": 6, "interval": 4, "control": 3}
# Those that begin with a directory of their own in each cycle.
AFRESH = ("start", "migrate")
# A directory of format 2, as a server that was killed has left it, and what is in it; the TTL of another key has ended.
FORMAT_2 = os.path.join(os.path.dirname(__file__), "../crates/nkv-persist-fs/tests/data/format-2-killed")
IN_FORMAT_2 = {**{f"host.db{n}.load": "c" * 200 * n for n in (0, 1, 2, 4, 6, 7)},
               "grüße.🔔": "ü", "empty": "", "batch.b": "2", "batch.a": "3"}


class Broken(Exception):
    """A promise was not kept, or the test could not be done."""


class Disk:
    """A file system in a loop device, and the means to cut its power."""

    def __init__(self, directory, kind):
        self.image, self.mount = os.path.join(directory, "disk"), os.path.join(directory, "mount")
        run("truncate", "-s", "320M" if kind == "xfs" else "96M", self.image)
        run(f"mkfs.{kind}", "-q", "-F" if kind == "ext4" else "-f", self.image)
        os.mkdir(self.mount)

    @contextlib.contextmanager
    def mounted(self):
        run("mount", "-o", "loop", self.image, self.mount)
        try:
            yield
        finally:
            # A process that was just killed may hold it for a moment. The loop device goes with the mount.
            for _ in range(50):
                with contextlib.suppress(Broken):
                    run("umount", self.mount)
                    break
                time.sleep(0.1)
            else:
                run("umount", "-l", self.mount)

    def cut(self, how):
        directory = os.open(self.mount, os.O_RDONLY)
        fcntl.ioctl(directory, GOINGDOWN, struct.pack("I", how))
        os.close(directory)


class Server:
    def __init__(self, binary, data, durability):
        self.child = subprocess.Popen([binary, "127.0.0.1:0", "--data-dir", data, "--durability", durability],
                                      stderr=subprocess.PIPE, text=True, env=dict(os.environ, NO_COLOR="1"),
                                      start_new_session=True)
        self.said, self.port, self.listens = [], None, threading.Event()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.child.stderr:
            self.said = self.said[-20:] + [line]
            if "listening at" in line:
                self.port = int(line.rsplit(":", 1)[1])
                self.listens.set()
        self.listens.set()

    def wait_until_it_listens(self):
        if not self.listens.wait(START_LIMIT_S) or not self.port:
            raise Broken(f"the server does not start: {''.join(self.said)}")

    def kill(self):
        self.child.kill()
        self.child.wait()


class Client:
    def __init__(self, port):
        self.stream = socket.create_connection(("127.0.0.1", port), timeout=20).makefile("rwb")
        self.epoch = self.ask({"type": "Connect", "values": "text"})["epoch"]

    def ask(self, request):
        self.stream.write(json.dumps(request).encode() + b"\n")
        self.stream.flush()
        line = self.stream.readline()
        return next(iter(json.loads(line).values())) if line.endswith(b"\n") else None


class Writer(threading.Thread):
    """Puts numbered values and deletes some, one after another, and notes each that was acknowledged before the cut."""

    def __init__(self, port, name, first, sizes, keys, pace, cut):
        super().__init__()
        self.port, self.name, self.first, self.sizes, self.keys = port, f"w{name}", first, sizes, keys
        self.pace, self.cut = pace, cut
        self.acknowledged = []  # (revision, key, number, deleted, time)
        self.under_way = None  # the key of a delete of which nobody knows
        self.refusal = None  # what went wrong before the cut

    def run(self):
        try:
            client = Client(self.port)
            for number in range(self.first, self.first + 10**6):
                nth = number % self.keys
                key = f"{self.name}.{nth}"
                # The key was put `keys` numbers earlier, so that it is there.
                delete = number % DELETE_EVERY == 3 and nth > 0 and number - self.first >= self.keys
                self.under_way = key if delete else None
                answer = client.ask({"type": "Delete", "key": key} if delete else
                                    {"type": "Put", "key": key, "value": value_of(number, self.sizes)})
                now = time.monotonic()
                if self.cut.is_set():
                    return
                if answer is None or answer["status"] != 200:
                    self.refusal = f"{'delete' if delete else 'put'} of {key}: {answer or 'the connection was closed'}"
                    return
                self.acknowledged.append((answer["revision"], key, number, delete, now))
                time.sleep(self.pace)
        except (OSError, ValueError, TypeError) as error:
            if not self.cut.is_set():
                self.refusal = f"{self.name}: {error!r}"  # afterwards the server may end


class Probe(threading.Thread):
    """Does what the server does, on a file of its own: measures how late a sync is done when it is due every 20 ms."""

    def __init__(self, directory, cut):
        super().__init__()
        self.directory, self.cut, self.due, self.longest = directory, cut, None, 0.0

    def run(self):
        file = os.open(os.path.join(self.directory, "probe"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while not self.cut.is_set():
                self.due = time.monotonic() + 0.02
                self.cut.wait(0.02)
                os.write(file, b"x" * 4096)
                os.fdatasync(file)
                self.longest = max(self.longest, time.monotonic() - self.due)
        except OSError:
            pass  # the power is gone
        finally:
            os.close(file)

    def longest_ms(self, now):
        return max(self.longest, now - self.due if self.due else 0) * 1000


def has_format_3(data):
    """Whether the header of some segment names format 3."""
    paths = [os.path.join(data, name) for name in os.listdir(data) if name.endswith(".log")]
    return any(open(path, "rb").read(12)[8:] == struct.pack("<I", 3) for path in paths)


def value_of(number, sizes):
    low, high = sizes
    return f"{number} " + "x" * (low + number * 7919 % (high - low))


def run(*words):
    # In a session of its own, as Ctrl-C in the terminal is not for it.
    done = subprocess.run(words, capture_output=True, text=True, start_new_session=True)
    if done.returncode:
        raise Broken(f"{' '.join(words)}: {done.stderr.strip()}")


class Scenario:
    def __init__(self, binary, kind, name, cycles, rng):
        self.binary, self.kind, self.name, self.cycles, self.rng = binary, kind, name, cycles, rng
        self.durability, self.sizes, self.keys, self.pauses, _ = SCENARIOS[name]
        self.count = self.deleted = self.lost = self.segments = self.early = self.migrated = 0
        self.window_ms = self.excess_ms = self.sync_ms = 0.0
        self.known, self.epoch, self.pending, self.under_way = {}, None, [], set()
        self.cut_at = 0.0

    def run(self):
        with tempfile.TemporaryDirectory(prefix="nkv-power-cut-") as directory:
            disk = Disk(directory, self.kind)
            for cycle in range(self.cycles + 1):
                if stopped:
                    sys.exit(128 + stopped[0])
                with disk.mounted():
                    self.cycle(disk, cycle)
        self.report()

    def cycle(self, disk, cycle):
        if self.name not in AFRESH:
            self.serve(disk, os.path.join(disk.mount, "data"), cycle, cycle < self.cycles)
            return
        # The directory that the last cut left, then a new one.
        if cycle > 0:
            self.serve(disk, os.path.join(disk.mount, f"data{cycle - 1}"), cycle, False)
            shutil.rmtree(os.path.join(disk.mount, f"data{cycle - 1}"))
        if cycle < self.cycles:
            self.known, self.pending, self.under_way, self.epoch = {}, [], set(), None
            data = os.path.join(disk.mount, f"data{cycle}")
            if self.name == "migrate":
                shutil.copytree(FORMAT_2, data)
                os.chmod(data, 0o700)
                os.sync()
            self.serve(disk, data, cycle, True)

    def serve(self, disk, data, cycle, cut):
        """Starts a server, asks it for what has to be there, and cuts the power under it."""
        if os.path.isdir(data):
            segments = (int(name[:16], 16) for name in os.listdir(data) if name.endswith(".log"))
            self.segments = max(self.segments, max(segments, default=0))
            self.migrated += not cut and has_format_3(data)
        server = Server(self.binary, data, self.durability)
        try:
            if self.name == "start" and cut:
                self.cut_at_start(disk, server, cycle)
                return
            server.wait_until_it_listens()
            self.check(server.port)
            if cut:
                self.write_and_cut(disk, server, cycle)
        finally:
            server.kill()

    def cut_at_start(self, disk, server, cycle):
        # A start takes some milliseconds; every second cut comes within.
        if cycle % 2 == 0:
            time.sleep(self.rng.random() * 0.02)
            self.early += not server.listens.is_set()
            disk.cut(self.rng.choice([LOG_FLUSH, NO_LOG_FLUSH]))
            return
        server.wait_until_it_listens()
        self.write_and_cut(disk, server, cycle)

    def write_and_cut(self, disk, server, cycle):
        cut = threading.Event()
        pace = PACE_S if self.name == "interval" and cycle % 2 else 0
        writers = [Writer(server.port, w, cycle * 10**6, self.sizes, self.keys, pace, cut) for w in range(WRITERS)]
        probe = Probe(disk.mount, cut)
        # Where nothing may be lost, a sync of another file must not do what the server has left undone.
        threads = [*writers, probe] if self.name == "interval" else writers
        for thread in threads:
            thread.start()
        try:
            time.sleep(self.rng.uniform(*self.pauses))
            self.cut_at = time.monotonic()
            self.sync_ms = probe.longest_ms(self.cut_at)
            cut.set()
            disk.cut(self.rng.choice([LOG_FLUSH, NO_LOG_FLUSH]))
        finally:
            cut.set()
            if self.durability != "sync":
                server.child.kill()  # it would go on for as long as it need not sync
            for thread in threads:
                thread.join()
        for writer in writers:
            if writer.refusal:
                raise Broken(f"refused before the cut: {writer.refusal}; the server said: {''.join(server.said)}")
        self.pending = [entry for writer in writers for entry in writer.acknowledged]
        self.under_way = {writer.under_way for writer in writers}
        self.count += len(self.pending)
        self.deleted += sum(deleted for _, _, _, deleted, _ in self.pending)

    def check(self, port):
        client = Client(port)
        answer = client.ask({"type": "Get", "key": "*"})
        present, before = {}, dict(IN_FORMAT_2) if self.name == "migrate" else {}
        for key, value, revision in zip(answer["keys"], answer["data"], answer["revisions"]):
            if key in before:
                if value != before.pop(key):
                    raise Broken(f"{key}, of format 2, is {value[:80]!r} now")
                continue
            number = value.split(" ")[0]
            if not number.isdigit() or value != value_of(int(number), self.sizes):
                raise Broken(f"{key} is torn: {value[:80]!r} of {len(value)} characters")
            present[key] = (revision, int(number))
        if before:
            raise Broken(f"of format 2, {sorted(before)} are gone")
        newest = max((revision for revision, _ in present.values()), default=0)
        # The last delete of each key that was acknowledged.
        deletes = {key: revision for revision, key, _, deleted, _ in self.pending if deleted}
        shown = max((revision for revision, _ in self.known.values()), default=0)
        for key, (revision, _) in present.items():
            if key not in self.known and revision <= shown:
                raise Broken(f"{key} was not there when {shown} was shown, and is back at revision {revision}")
        for key, (revision, _) in self.known.items():
            may_be_gone = key in deletes or key in self.under_way
            if present[key][0] < revision if key in present else not may_be_gone:
                raise Broken(f"{key} was shown at revision {revision} and is at {present.get(key)} now")
        lost = 0
        for revision, key, number, deleted, at in self.pending:
            if key not in present:
                kept = key in self.under_way or revision <= deletes.get(key, 0)
            else:
                kept = present[key][0] >= revision and present[key][1] >= number
            if not kept:
                if revision <= newest:
                    what = "delete" if deleted else "put"
                    raise Broken(f"{key}: {what} {revision} is missing, and {newest} survived: no prefix")
                lost += 1
                window_ms = (self.cut_at - at) * 1000
                self.window_ms = max(self.window_ms, window_ms)
                self.excess_ms = max(self.excess_ms, window_ms - INTERVAL_MS - 2 * self.sync_ms)
        if lost and client.epoch == self.epoch:
            raise Broken(f"{lost} acknowledged writes are lost, and the epoch is the same")
        self.lost += lost
        self.known, self.epoch, self.pending, self.under_way = present, client.epoch, [], set()

    def report(self):
        figures = (f"fs={self.kind} durability={self.durability} cycles={self.cycles} acknowledged={self.count} "
                   f"deleted={self.deleted}")
        if self.name == "control":
            print(f"TEST power_cut_control {figures} lost={self.lost} torn=0", flush=True)
            if not self.lost:
                raise Broken("the control lost nothing: these cuts prove nothing")
            return
        more = {"compact": f" segments={self.segments}", "start": f" before_it_listened={self.early}",
                "migrate": f" migrated={self.migrated}",
                "interval": f" window_ms={self.window_ms:.0f} excess_ms={self.excess_ms:.0f}"}.get(self.name, "")
        name = "power_cut" + ("" if self.name in ("sync", "interval") else f"_{self.name}")
        print(f"TEST {name} {figures} lost={self.lost} torn=0{more}", flush=True)
        if self.name == "interval":
            if self.excess_ms > WINDOW_SLACK_MS:
                raise Broken(f"lost what should have been synced {self.excess_ms:.0f} ms before the cut")
        elif self.lost:
            raise Broken(f"{self.lost} acknowledged writes are lost")
        if self.name == "compact" and self.segments < self.cycles:
            raise Broken("segments hardly came and went: compaction was not cut")
        if self.name == "migrate" and self.migrated == 0:
            raise Broken("no directory got as far as format 3")
        if self.count == 0 or self.deleted == 0 and self.name not in AFRESH:
            raise Broken("nothing was acknowledged, or no delete")


def obstacle(kind):
    """Why a file system of this kind cannot be mounted here, or None."""
    if os.geteuid() != 0:
        return "root is needed to mount"
    if not shutil.which(f"mkfs.{kind}"):
        return f"there is no mkfs.{kind}"
    with tempfile.TemporaryDirectory(prefix="nkv-power-cut-") as directory:
        try:
            with Disk(directory, kind).mounted():
                return None
        except Broken as broken:
            return str(broken)


def usable(kinds):
    """Those that can be mounted; says which cannot, and fails if they must."""
    obstacles = {kind: why for kind in kinds if (why := obstacle(kind))}
    for kind, why in obstacles.items():
        print(f"SKIPPED: no power cuts with {kind}: {why}", flush=True)
    if obstacles and os.environ.get("NKV_FAULTS") == "1":
        sys.exit("NKV_FAULTS is set, and none may be skipped")
    return [kind for kind in kinds if kind not in obstacles]


# Signals that asked for the end: nothing is left unfinished, so that nothing stays mounted.
stopped = []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", nargs="?")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--cycles", type=int, default=60)
    parser.add_argument("--fast", action="store_true", help="a few cycles of each, for every change")
    parser.add_argument("--fs", action="append", choices=["ext4", "xfs"])
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS))
    parser.add_argument("--seed", type=int, default=int(os.environ.get("NKV_SEED") or random.randrange(10**9)))
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopped.append(number))
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    wanted = args.fs or ["ext4", "xfs"]
    kinds = usable(wanted)
    if args.check:
        sys.exit(kinds != wanted)
    if not args.server:
        parser.error("which server?")
    server = os.path.abspath(args.server)
    failed, start = [], time.monotonic()
    for kind in kinds:
        for name in args.scenario or SCENARIOS:
            cycles = FAST[name] if args.fast else max(6, args.cycles * SCENARIOS[name][-1] // 100)
            # Times are not repeated with a seed, but how long is waited for and what is flushed are.
            rng = random.Random(f"{args.seed} {kind} {name}")
            try:
                Scenario(server, kind, name, cycles, rng).run()
            except Broken as broken:
                if stopped:
                    sys.exit(128 + stopped[0])  # a command that had just been started took the signal, too
                failed.append(f"{kind} {name}: {broken}")
                print(f"FAILED {failed[-1]}", flush=True)
    print(f"power cuts: seed {args.seed}, {time.monotonic() - start:.0f} s")
    sys.exit(1 if failed else 0)


main()
