#!/usr/bin/env python3
"""Partitions, kills and stops the nodes of a real cluster under load, and checks that they agree afterwards and lost nothing.

    cluster-partition.py SERVER [--seconds 60] [--nodes 5] [--seed N] [--fast] [--durability WHEN] [--mesh]
    cluster-partition.py SERVER --figures    only what is measured without faults, beside its goals
    cluster-partition.py --check             only whether network namespaces can be made here

Each node is a process of its own in a network namespace of its own, all on one bridge, with its data on disk. SERVER needs the
feature `cluster`. With --mesh the nodes are servers of a mesh, each other's --peer, and find each other by that: SERVER needs `grpc`
too, and no figures are measured. Root and `ip` (iproute2) are needed; without, the test is passed over, unless NKV_FAULTS=1. The
clients are outside, and reach each node over Unix sockets whatever the network does.

Two writers a node put, put with a TTL, delete keys, and delete branches. A key has one writer, which may change it at another node
than before once that one shows the state that was acknowledged last: so each change is later than the one before, and what must be
there at the end is known. A write without an answer may have been done or not, until a later one of the key is acknowledged. Some
keys belong to all writers. Each node has a subscriber to everything. Meanwhile, by the seed:

    alone, split, ring, oneway   what some nodes send to others is lost: one node is cut off, the nodes are parted in two, each
                                 reaches its two neighbours alone, or one is not heard by others that it hears
    kill, stop, rolling          one node or two are killed with SIGKILL, one stands still, or each in turn is stopped with SIGTERM;
                                 then they are started again

Then the network is healed and all nodes run. Each takes writes within WRITE_LIMIT_S. Within AGREE_LIMIT_S all have the same digest,
and the same keys and values: no acknowledged write is lost, nothing deleted is back, nothing is there that was not written. Each
subscriber has that too, each read of a node showed what it had acknowledged, and none was taken for a second one of its id. Last,
without faults, figures are measured and printed beside their goals; none of them is a condition.

On a fault the exit status is 1, and logs and data are kept. All that was started ends with the script, also after Ctrl-C.
"""
import argparse
import collections
import contextlib
import datetime
import http.client
import json
import multiprocessing
import os
import random
import re
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

WRITERS_A_NODE = 2
BRANCHES, KEYS_A_BRANCH, SHARED_KEYS = 4, 8, 10
PAUSE_S = 0.02
TTL_MS, FAST_TTL_MS = (200, 3000), (200, 1200)
# How long each may take at most, on a machine that is busy with other things.
START_LIMIT_S, STOP_LIMIT_S, ANSWER_LIMIT_S, AGREE_LIMIT_S, READ_LIMIT_S, WRITE_LIMIT_S = 60, 60, 90, 60, 30, 5
# What ended by its TTL is gone everywhere after this.
TTL_SLACK_S = 2.0
NETWORK, PROCESSES = ("alone", "split", "ring", "oneway"), ("kill", "stop", "rolling")
# What a packet that is to be lost is sent to: no interface has it.
NOWHERE = "02:00:00:00:ff:ff"
STAMP_LEN = 16
# Of all nodes together; and how many of them may be without an answer on one connection.
PUTS_A_SECOND, UNANSWERED_MAX = 1000, 500
# What is measured, its unit, and what it is to be at most; for five nodes on a machine with nothing else to do.
GOALS = [
    ("seen_p50_ms", "ms", 20, "a put is seen at all nodes, p50"),
    ("seen_p99_ms", "ms", 200, "the same, p99"),
    ("idle_bytes_per_s", "B/s", 2000, "an idle node sends"),
    ("away_level_ms", "ms", 1000, "a node that was away during 1,000 changes is level after its data are loaded"),
    ("away_bytes_ratio", "x", 3, "what it sends and receives for that, by what keys, values and stamps take"),
    ("joined_ms", "ms", 5000, "a new node has all keys, after its start"),
    ("put_p99_ratio", "x", 2, "the puts at the others meanwhile, p99, by that of before"),
]


class Broken(Exception):
    """A promise was not kept, or the test could not be done."""


class Gone(Exception):
    """The node has ended the connection, or is not there."""


def run(*words, given=None):
    # In a session of its own, as Ctrl-C in the terminal is not for it.
    done = subprocess.run(words, input=given, capture_output=True, text=True, start_new_session=True)
    if done.returncode:
        raise Broken(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Net:
    """A network namespace for each node, and one with the bridge between them."""

    def __init__(self, nodes):
        self.nodes, self.made = range(1, nodes + 1), []
        self.bridge = f"nkv{os.getpid()}-bridge"

    def name(self, node):
        return f"nkv{os.getpid()}-{node}"

    @staticmethod
    def address(node):
        # Of the range that is kept for benchmarks. There is no route out.
        return f"198.18.77.{node}"

    @staticmethod
    def hardware(node):
        return f"02:00:00:00:00:{node:02x}"

    def __enter__(self):
        try:
            self.add(self.bridge)
            run("ip", "-n", self.bridge, "link", "add", "br0", "type", "bridge")
            run("ip", "-n", self.bridge, "link", "set", "br0", "up")
            for node in self.nodes:
                name = self.name(node)
                self.add(name)
                run("ip", "link", "add", "v0", "netns", name, "type", "veth", "peer", "name", f"b{node}", "netns", self.bridge)
                run("ip", "-n", self.bridge, "link", "set", f"b{node}", "master", "br0", "up")
                run("ip", "-n", name, "link", "set", "v0", "address", self.hardware(node))
                run("ip", "-n", name, "address", "add", f"{self.address(node)}/24", "dev", "v0")
                run("ip", "-n", name, "link", "set", "v0", "up")
                run("ip", "-n", name, "link", "set", "lo", "up")
            self.cut(set())
        except BaseException:
            self.__exit__()
            raise
        return self

    def add(self, name):
        run("ip", "netns", "add", name)
        self.made.append(name)

    def __exit__(self, *_):
        for name in self.made:
            try:
                run("ip", "netns", "del", name)
            except Broken as broken:
                print(broken, flush=True)
        self.made = []

    def cut(self, pairs):
        """From now on what the first of each pair sends to the second is lost, silently, and nothing else."""
        for node in self.nodes:
            lines = [f"neigh replace {self.address(other)} lladdr {NOWHERE if (node, other) in pairs else self.hardware(other)}"
                     " nud permanent dev v0" for other in self.nodes if other != node]
            run("ip", "-n", self.name(node), "-batch", "-", given="\n".join(lines) + "\n")

    def sent(self, node):
        """Bytes that a node has sent and received so far."""
        link = json.loads(run("ip", "-n", self.name(node), "-s", "-j", "link", "show", "v0"))[0]["stats64"]
        return link["tx"]["bytes"], link["rx"]["bytes"]


class Node:
    def __init__(self, options, net, number, directory):
        self.binary, self.durability, self.is_mesh = options.server, options.durability, options.mesh
        self.net, self.number = net, number
        self.data, self.log = os.path.join(directory, f"n{number}"), os.path.join(directory, f"log{number}")
        self.lines, self.http = os.path.join(directory, f"l{number}"), os.path.join(directory, f"h{number}")
        self.child, self.is_alone = None, False

    def start(self):
        self.look()
        own = f"{self.net.address(self.number)}:7400"
        peers = ",".join(f"{self.net.address(node)}:7400" for node in self.net.nodes)
        words = [self.binary, f"unix:{self.lines}", "--http", f"unix:{self.http}", "--data-dir", self.data,
                 "--durability", self.durability, "--insecure"]
        if self.is_alone:
            pass
        elif self.is_mesh:
            words += ["--grpc", own, "--peer", peers]
        else:
            words += ["--cluster", "partition", "--gossip", own, "--discover", f"static:{peers}"]
        with open(self.log, "a", encoding="utf-8") as log:
            self.child = subprocess.Popen(["ip", "netns", "exec", self.net.name(self.number), *words], stderr=log,
                                          stdin=subprocess.DEVNULL, env=dict(os.environ, NO_COLOR="1"), start_new_session=True)

    def look(self):
        """It must not have ended by itself."""
        if self.child and self.child.poll() is not None:
            raise Broken(f"node {self.number} ended by itself, with {self.child.returncode}")

    def wait_until_ready(self):
        until(START_LIMIT_S, lambda: self.look() or self.is_ready(), f"node {self.number} is not ready")

    def is_ready(self):
        try:
            self.stats()
            return self.ask("/readyz")[0] == 200
        except (Gone, Broken):
            return False

    def signal(self, number):
        self.look()
        self.child.send_signal(number)

    def kill(self):
        self.signal(signal.SIGKILL)
        self.child.wait()
        self.child = None

    def terminate(self):
        self.signal(signal.SIGTERM)
        try:
            status = self.child.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise Broken(f"node {self.number} does not stop within {STOP_LIMIT_S} s") from None
        self.child = None
        if status:
            raise Broken(f"node {self.number} ended with {status} after SIGTERM")

    def end(self):
        if self.child:
            with contextlib.suppress(OSError):
                self.child.kill()
            self.child.wait()

    def ask(self, path, method="GET", body=None):
        connection = http.client.HTTPConnection("localhost", timeout=ANSWER_LIMIT_S)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(ANSWER_LIMIT_S)
        try:
            connection.sock.connect(self.http)
            connection.request(method, path, body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise Gone(repr(error)) from error
        finally:
            connection.close()

    def stats(self):
        status, body = self.ask("/v1/stats")
        if status != 200:
            raise Broken(f"node {self.number}: stats: {status} {body!r}")
        return json.loads(body)

    def digest(self):
        return self.stats()["digest"]

    def memory(self):
        """Bytes of memory that it has now."""
        with open(f"/proc/{self.child.pid}/status", encoding="utf-8") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))

    def entries(self):
        status, body = self.ask("/v1/kv?format=ndjson")
        if status != 200:
            raise Broken(f"node {self.number}: list: {status} {body!r}")
        return {entry["key"]: entry["value"] for entry in map(json.loads, body.splitlines())}


class Line:
    """A connection with the JSON-lines protocol."""

    def __init__(self, node):
        self.socket, self.received = socket.socket(socket.AF_UNIX), b""
        self.socket.settimeout(ANSWER_LIMIT_S)
        try:
            self.socket.connect(node.lines)
        except OSError as error:
            self.socket.close()
            raise Gone(repr(error)) from error
        self.ask({"type": "Connect", "values": "text", "features": ["reset"]})

    def send(self, request):
        try:
            self.socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise Gone(repr(error)) from error

    def read(self):
        """The next message; nothing if there is none within the socket's limit."""
        while b"\n" not in self.received:
            try:
                received = self.socket.recv(1 << 16)
            except TimeoutError:
                return None
            except OSError as error:
                raise Gone(repr(error)) from error
            if not received:
                raise Gone("closed")
            self.received += received
        line, self.received = self.received.split(b"\n", 1)
        return json.loads(line)

    def ask(self, request):
        self.send(request)
        answer = self.read()
        if answer is None:
            raise Broken(f"no answer within {ANSWER_LIMIT_S} s to {request}")
        return next(iter(answer.values())) if isinstance(answer, dict) else answer


# What a key may be: its value, or None, and until when, if it ends by itself.
State = collections.namedtuple("State", "value until")
ABSENT = State(None, None)


class Key:
    """What is known of a key: at which node it was changed last, what was acknowledged last, and what may be instead."""

    def __init__(self, name):
        self.name, self.at, self.acknowledged, self.maybe = name, None, ABSENT, []

    def follows_at(self, node, shown):
        """Whether a change at this node, which shows this value, comes after all that was done to the key."""
        certain = self.acknowledged.value is not None and self.acknowledged.until is None and not self.maybe
        return self.at in (None, node) or certain and shown == self.acknowledged.value

    def note(self, node, state, is_acknowledged):
        self.at = node
        if is_acknowledged:
            self.acknowledged, self.maybe = state, []
        else:
            self.maybe.append(state)

    def may_be(self):
        """What it may be once all that ends by itself has ended."""
        return {None if state.until else state.value for state in [self.acknowledged, *self.maybe]}


class Writer(threading.Thread):
    def __init__(self, test, number, rng):
        super().__init__(daemon=True)
        self.test, self.name_, self.rng = test, f"w{number}", rng
        self.favourite = number % len(test.nodes) + 1
        self.branches = [[Key(f"{self.name_}.b{branch}.k{key}") for key in range(KEYS_A_BRANCH)] for branch in range(BRANCHES)]
        self.lines, self.count, self.counts = {}, 0, collections.Counter()
        self.refusals = collections.Counter()
        self.shared = collections.defaultdict(set)

    def run(self):
        try:
            while not self.test.writers_end.is_set():
                try:
                    self.step()
                except Gone:
                    self.counts["gone"] += 1
                time.sleep(self.rng.uniform(0, 2 * PAUSE_S))
        except Exception as error:  # also what is a fault of this script
            self.test.note(f"{self.name_}: {error if isinstance(error, Broken) else repr(error)}")

    def line(self, node):
        if node not in self.lines:
            self.lines[node] = Line(self.test.nodes[node])
        return self.lines[node]

    def ask(self, node, request):
        try:
            return self.line(node).ask(request)
        except Gone:
            line = self.lines.pop(node, None)
            if line:
                line.socket.close()
            raise

    def shown(self, node, pattern):
        """The keys that a node shows; nothing if it does not say."""
        answer = self.ask(node, {"type": "Get", "key": pattern})
        if answer["status"] not in (200, 404):
            self.note_refused(answer)
            return None
        return dict(zip(answer.get("keys", []), answer.get("data", [])))

    def value(self):
        self.count += 1
        return f"{self.name_}-{self.count} " + "x" * self.rng.choice([0, 10, 100, 100, 1000, 20_000])

    def step(self):
        kind = self.rng.choices(["put", "ttl", "delete", "branch", "shared"], [50, 12, 15, 3, 20])[0]
        if kind == "shared":
            self.change_shared(self.rng.choice(list(self.test.nodes)))
            return
        branch = self.rng.choice(self.branches)
        key = self.rng.choice(branch)
        elsewhere = self.rng.random() < 0.3
        node = self.rng.choice(list(self.test.nodes)) if elsewhere else key.at or self.favourite
        if kind == "branch":
            self.delete_branch(node, branch)
        elif key.at in (None, node) or key.follows_at(node, (self.shown(node, key.name) or {}).get(key.name)):
            self.counts["elsewhere"] += key.at not in (None, node)
            self.change(node, key, kind)

    def write(self, node, keys, state, request):
        """Asks for a change of these keys; says what was answered."""
        before = [key.acknowledged for key in keys]
        is_certain = [key.at is None or not key.maybe for key in keys]
        try:
            answer = self.ask(node, request)
        except Gone:
            # Whatever was done is done by now: the process has ended.
            for key in keys:
                key.note(node, later(state), False)
            self.counts["unknown"] += 1
            raise
        is_done = answer["status"] in (200, 404)
        for key in keys:
            key.note(node, later(state), is_done)
        self.note_answer(answer)
        if answer["status"] == 404 and any(
                certain and was.value is not None and was.until is None for certain, was in zip(is_certain, before)):
            raise Broken(f"node {node} does not know {request['key']!r} any more, which it showed: {before}")
        return answer

    def change(self, node, key, kind):
        if kind == "delete":
            self.write(node, [key], ABSENT, {"type": "Delete", "key": key.name})
            value = None
            self.counts["deletes"] += 1
        else:
            value = self.value()
            ttl_ms = self.rng.randint(*(FAST_TTL_MS if self.test.options.fast else TTL_MS)) if kind == "ttl" else None
            request = {"type": "Put", "key": key.name, "value": value, **({"ttl_ms": ttl_ms} if ttl_ms else {})}
            self.write(node, [key], State(value, ttl_ms and ttl_ms / 1000), request)
        if kind != "ttl" and not key.maybe and self.rng.random() < 0.3:
            shown = self.shown(node, key.name)
            self.counts["own_reads"] += shown is not None
            if shown is not None and shown.get(key.name) != value:
                raise Broken(f"node {node} acknowledged {text(value)} for {key.name}, and shows {text(shown.get(key.name))}")

    def delete_branch(self, node, branch):
        pattern = branch[0].name.rsplit(".", 1)[0] + ".*"
        shown = self.shown(node, pattern)
        if shown is None or not all(key.follows_at(node, shown.get(key.name)) for key in branch):
            return
        if any(key.at is not None for key in branch):
            self.write(node, branch, ABSENT, {"type": "Delete", "key": pattern})
            self.counts["branches"] += 1

    def change_shared(self, node):
        key = f"shared.k{self.rng.randrange(SHARED_KEYS)}"
        if self.rng.random() < 0.2:
            request = {"type": "Delete", "key": key}
        else:
            value = self.value()
            self.shared[key].add(value)
            request = {"type": "Put", "key": key, "value": value}
        self.note_answer(self.ask(node, request))

    def note_answer(self, answer):
        if answer["status"] in (200, 404):
            self.counts["acknowledged"] += 1
        else:
            self.note_refused(answer)

    def note_refused(self, answer):
        if " living nodes " in answer["message"] or " lives " in answer["message"]:
            raise Broken(f"a node is taken for a second one of its id: {answer['message']}")
        self.counts["refused"] += 1
        self.refusals[f"{answer['status']} {re.sub('[0-9a-f]{16}', 'ID', answer['message'])}"] += 1


def later(state):
    """A state whose TTL began by now."""
    return state._replace(until=time.monotonic() + state.until) if state.until else state


def text(value):
    return "nothing" if value is None else repr(value[:40])


class Subscriber(threading.Thread):
    """Keeps what a node notifies of everything; connects again when it has gone."""

    def __init__(self, test, node):
        super().__init__(daemon=True)
        self.test, self.node, self.view, self.is_synced, self.events = test, node, {}, False, 0
        self.lock = threading.Lock()

    def run(self):
        try:
            while not self.test.subscribers_end.is_set():
                try:
                    self.follow()
                except Gone:
                    time.sleep(0.05)
        except Exception as error:
            self.test.note(f"the subscriber of node {self.node.number}: {error!r}")

    def follow(self):
        line = Line(self.node)
        line.send({"type": "Subscribe", "key": "*", "snapshot": True})
        line.socket.settimeout(0.2)
        self.begin()
        try:
            while not self.test.subscribers_end.is_set():
                message = line.read()
                if isinstance(message, dict):
                    self.take(*next(iter(message.items())))
        finally:
            line.socket.close()

    def begin(self):
        with self.lock:
            self.view, self.is_synced = {}, False

    def take(self, kind, fields):
        if kind == "Reset":
            self.begin()
        elif kind == "Synced":
            self.is_synced = True
        elif kind in ("Update", "Close"):
            if kind == "Close" and fields["reason"] not in ("deleted", "expired"):
                raise Broken(f"ended: {fields}")
            with self.lock:
                before = self.view.get(fields["key"])
                if before and before[1] >= fields["revision"]:
                    raise Broken(f"{fields['key']} goes from revision {before[1]} to {fields['revision']}")
                self.view[fields["key"]] = (fields.get("value"), fields["revision"])
            self.events += 1
        elif kind == "Base" and fields["status"] != 200:
            raise Gone("no state yet")

    def shows(self, entries):
        with self.lock:
            return self.is_synced and {key: value for key, (value, _) in self.view.items() if value is not None} == entries


def until(limit_s, holds, what):
    """Waits until something holds; gives what it gave."""
    end = time.monotonic() + limit_s
    while True:
        if result := holds():
            return result
        if time.monotonic() > end:
            raise Broken(f"{what} within {limit_s} s")
        time.sleep(0.02)


def lost_pairs(rng, shape, nodes):
    """Pairs of a sender and a receiver between whom all is lost, and what people read of it."""
    order = rng.sample(list(nodes), len(nodes))
    if shape == "ring":
        near = {(a, b) for a, b in zip(order, order[1:] + order[:1])}
        near |= {(b, a) for a, b in near}
        return {(a, b) for a in order for b in order if a != b} - near, "-".join(map(str, order))
    if shape == "oneway":
        deaf = sorted(order[1:1 + rng.randint(1, len(order) - 1)])
        return {(order[0], other) for other in deaf}, f"{order[0]} to {','.join(map(str, deaf))}"
    size = 1 if shape == "alone" else len(order) // 2
    one, other = sorted(order[:size]), sorted(order[size:])
    both = {(a, b) for a in one for b in other}
    return both | {(b, a) for a, b in both}, f"{','.join(map(str, one))} | {','.join(map(str, other))}"


def schedule(rng, kinds, nodes, seconds, scale):
    """What happens when, for how long: (begin, duration, kind, of what, text). Each kind comes before one comes again."""
    plan, at, turn = [], rng.uniform(0.5, 1.5) * scale, []
    while True:
        turn = turn or rng.sample(kinds, len(kinds))
        kind = turn.pop()
        if kind in NETWORK:
            of, words = lost_pairs(rng, kind, nodes)
            duration = rng.uniform(1, 9) * scale
        elif kind == "rolling":
            of = rng.sample(list(nodes), len(nodes))
            words, duration = ",".join(map(str, of)), rng.uniform(1, 3) * scale
        else:
            of = rng.sample(list(nodes), 1 if kind == "stop" else rng.choice([1, 1, 2]))
            words, duration = ",".join(map(str, of)), rng.uniform(0.2, 7) * scale
        if at + duration > seconds:
            return plan
        plan.append((at, duration, kind, of, f"{kind} {words}"))
        at += duration + rng.uniform(0.3, 2) * scale


class Test:
    def __init__(self, options, net, directory):
        self.options, self.net, self.directory = options, net, directory
        self.rng = random.Random(options.seed)
        self.faults, self.counts = [], collections.Counter()
        self.nodes, self.writers_end, self.subscribers_end = {}, threading.Event(), threading.Event()
        self.began = 0.0

    def note(self, fault):
        self.faults.append(fault)

    def start_nodes(self, name):
        directory = os.path.join(self.directory, name)
        os.mkdir(directory)
        self.nodes = {number: Node(self.options, self.net, number, directory)
                      for number in self.net.nodes}
        for node in self.nodes.values():
            node.start()
        for node in self.nodes.values():
            node.wait_until_ready()

    def end_nodes(self):
        for node in self.nodes.values():
            node.end()

    def faults_and_checks(self):
        self.start_nodes("faults")
        scale = 0.25 if self.options.fast else 1.0
        lanes = [(kinds, schedule(self.rng, kinds, self.net.nodes, self.options.seconds, scale)) for kinds in (NETWORK, PROCESSES)]
        for begin, duration, _, _, words in sorted(event for _, plan in lanes for event in plan):
            print(f"at {begin:.1f} s for {duration:.1f} s: {words}", flush=True)
        writers = [Writer(self, number, random.Random(self.rng.random())) for number in range(WRITERS_A_NODE * len(self.nodes))]
        subscribers = [Subscriber(self, node) for node in self.nodes.values()]
        self.began = time.monotonic()
        events = [threading.Thread(target=self.lane, args=[plan], daemon=True) for _, plan in lanes]
        for thread in [*subscribers, *writers, *events]:
            thread.start()
        self.pause(self.options.seconds)
        for thread in events:
            self.join(thread, "an event")
        self.raise_faults()
        self.writers_end.set()
        for writer in writers:
            self.join(writer, f"the last write of {writer.name_}")
        self.raise_faults()
        agreed_ms = self.check_agreement(writers, subscribers)
        self.subscribers_end.set()
        for thread in subscribers:
            self.join(thread, "a subscriber")
        self.raise_faults()
        counts = sum((writer.counts for writer in writers), collections.Counter())
        for words, count in sum((writer.refusals for writer in writers), collections.Counter()).most_common(8):
            print(f"refused {count} times: {words}", flush=True)
        figures = {"seed": self.options.seed, "seconds": self.options.seconds, "nodes": len(self.nodes),
                   "writes": counts["acknowledged"], "deletes": counts["deletes"], "branches": counts["branches"],
                   "elsewhere": counts["elsewhere"], "own_reads": counts["own_reads"], "unknown": counts["unknown"],
                   "refused": counts["refused"], "events": sum(subscriber.events for subscriber in subscribers),
                   "partitions": sum(self.counts[kind] for kind in NETWORK), "kills": self.counts["kill"],
                   "stops": self.counts["stop"], "restarts": self.counts["rolling"], "lost": 0, "back": 0, "agreed_ms": agreed_ms}
        kind = "mesh" if self.options.mesh else "cluster"
        print(f"TEST {kind}_partition " + " ".join(f"{name}={figure}" for name, figure in figures.items()), flush=True)
        if not all(figures[name] for name in ("writes", "deletes", "branches", "elsewhere", "own_reads", "partitions")):
            raise Broken("the test did not do what it is for: a figure is 0")

    def join(self, thread, what):
        thread.join(ANSWER_LIMIT_S)
        if thread.is_alive():
            raise Broken(f"{what} does not end within {ANSWER_LIMIT_S} s{''.join('; ' + fault for fault in self.faults)}")

    def raise_faults(self):
        for node in self.nodes.values():
            node.look()
            with open(node.log, encoding="utf-8") as log:
                if panic := next((line for line in log if "panicked" in line), None):
                    self.note(f"node {node.number}: {panic.strip()}")
        if self.faults:
            raise Broken("; ".join(self.faults[:5]))

    def pause(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.faults:
            time.sleep(0.1)

    def lane(self, plan):
        try:
            for begin, duration, kind, of, _ in plan:
                time.sleep(max(0.0, self.began + begin - time.monotonic()))
                if self.faults:
                    return
                self.event(kind, of, duration)
        except Exception as error:
            self.note(str(error) if isinstance(error, Broken) else repr(error))

    def event(self, kind, of, duration):
        if kind in NETWORK:
            self.net.cut(of)
            time.sleep(duration)
            self.net.cut(set())
        elif kind == "stop":
            self.nodes[of[0]].signal(signal.SIGSTOP)
            time.sleep(duration)
            self.nodes[of[0]].signal(signal.SIGCONT)
        elif kind == "kill":
            for number in of:
                self.nodes[number].kill()
            time.sleep(duration)
            for number in of:
                self.nodes[number].start()
            for number in of:
                self.nodes[number].wait_until_ready()
        else:
            for number in of:
                self.nodes[number].terminate()
                time.sleep(duration / len(of))
                self.nodes[number].start()
                self.nodes[number].wait_until_ready()
        self.counts[kind] += len(of) if kind in PROCESSES else 1

    def digests(self):
        return {number: node.digest() for number, node in self.nodes.items()}

    def wait_until_level(self):
        """Waits until all nodes have the same digest; gives how long that took, in milliseconds."""
        began = time.monotonic()
        seen = []
        try:
            until(AGREE_LIMIT_S, lambda: seen.append(self.digests()) or len(set(seen[-1].values())) == 1, "the nodes do not agree")
        except Broken as broken:
            raise Broken(f"{broken}: digests {seen[-1]}; {self.difference()}") from None
        return round((time.monotonic() - began) * 1000)

    def difference(self):
        lists = {number: node.entries() for number, node in self.nodes.items()}
        keys = sorted({key for entries in lists.values() for key in entries})
        differ = [key for key in keys if len({entries.get(key) for entries in lists.values()}) > 1]
        shown = [f"{key}: " + ", ".join(f"{number}: {text(entries.get(key))}" for number, entries in lists.items())
                 for key in differ[:5]]
        return "; ".join([f"{len(differ)} keys differ", *shown])

    def check_agreement(self, writers, subscribers):
        written = collections.defaultdict(set)
        for number, node in self.nodes.items():
            value = f"the end of {number}"
            written["shared.end"].add(value)
            put = {"type": "Put", "key": "shared.end", "value": value}
            until(WRITE_LIMIT_S, lambda node=node, put=put: Line(node).ask(put)["status"] == 200, f"node {number} takes no write")
        agreed_ms = self.wait_until_level()
        keys = [key for writer in writers for branch in writer.branches for key in branch]
        ends = [state.until for key in keys for state in [key.acknowledged, *key.maybe] if state.until]
        time.sleep(max(0.0, max(ends, default=0.0) + TTL_SLACK_S - time.monotonic()))
        self.wait_until_level()
        lists = {number: node.entries() for number, node in self.nodes.items()}
        entries = lists[1]
        if any(other != entries for other in lists.values()):
            raise Broken(f"the digests are the same, and not what is there: {self.difference()}")
        wrong = [f"{key.name} is {text(entries.get(key.name))}, acknowledged at node {key.at} was {text(key.acknowledged.value)}, "
                 f"possible {[text(value) for value in key.may_be()]}" for key in keys if entries.get(key.name) not in key.may_be()]
        if wrong:
            raise Broken(f"{len(wrong)} keys are not as they were left: {'; '.join(wrong[:10])}")
        for writer in writers:
            for key, values in writer.shared.items():
                written[key] |= values
        owned = {key.name for key in keys}
        for key in entries.keys() - owned:
            if entries[key] not in written[key]:
                raise Broken(f"{key} is {text(entries[key])}, which was never written to it")
        for subscriber in subscribers:
            until(READ_LIMIT_S, lambda subscriber=subscriber: subscriber.shows(entries),
                  f"the subscriber of node {subscriber.node.number} has not the state")
        return agreed_ms

    def measure(self):
        few = self.options.fast
        keys, seconds, idle_s = (2_000, 2, 2) if few else (100_000, 10, 20)
        alone = self.alone(keys)
        self.start_nodes("figures")
        in_cluster = fill(self.nodes[1], keys, self.wait_until_level)
        time.sleep(1 if few else 5)
        before = {number: self.net.sent(number)[0] for number in self.nodes}
        time.sleep(idle_s)
        idle = [(self.net.sent(number)[0] - before[number]) / idle_s for number in self.nodes]
        delays, sent, acknowledged = self.delays(keys, seconds)
        self.wait_until_level()
        level_ms, length, ideal = self.away(keys)
        joined_ms, calm, meanwhile, unanswered = self.joins(keys, seconds)
        figures = {"nodes": len(self.nodes), "keys": keys, "durability": self.options.durability,
                   "puts_per_s": round(acknowledged / seconds), "seen_everywhere": f"{len(delays)}/{sent}",
                   "seen_p50_ms": f"{percentile(delays, 0.5):.1f}", "seen_p99_ms": f"{percentile(delays, 0.99):.1f}",
                   "idle_bytes_per_s": round(max(idle)), "away_changes": min(keys, 1000), "away_level_ms": level_ms,
                   "away_bytes": length, "away_bytes_ratio": f"{length / ideal:.2f}", "joined_ms": joined_ms,
                   "put_p99_before_ms": f"{calm:.1f}", "put_p99_meanwhile_ms": f"{meanwhile:.1f}",
                   "put_p99_ratio": f"{meanwhile / calm:.2f}", "puts_not_done": unanswered,
                   "key_bytes_alone": alone, "key_bytes_in_cluster": in_cluster}
        print("TEST cluster_figures " + " ".join(f"{name}={figure}" for name, figure in figures.items()), flush=True)
        for name, unit, most, words in GOALS:
            is_met = float(figures[name]) <= most
            print(f"{'met   ' if is_met else 'MISSED'}  {figures[name]:>8} {unit:3}  at most {most} {unit}: {words}", flush=True)

    def alone(self, keys):
        """The memory that a key takes in a server that is in no cluster."""
        directory = os.path.join(self.directory, "alone")
        os.mkdir(directory)
        node = Node(self.options, self.net, 1, directory)
        node.is_alone, self.nodes = True, {1: node}
        node.start()
        node.wait_until_ready()
        taken = fill(node, keys, lambda: None)
        node.terminate()
        return taken

    def delays(self, keys, seconds):
        """How long it took until puts were seen at all nodes, in milliseconds, at 1,000 puts each second over all nodes."""
        ours, theirs = multiprocessing.Pipe()
        reader = multiprocessing.get_context("fork").Process(
            target=read_delays, args=[theirs, [node.lines for node in self.nodes.values()], ours], daemon=True)
        reader.start()
        theirs.close()
        if not ours.poll(ANSWER_LIMIT_S):
            raise Broken("the subscribers are not synced")
        ours.recv()
        answered = collections.Counter()
        lines = [Line(node) for node in self.nodes.values()]
        threads = [threading.Thread(target=count_answers, args=[line, answered], daemon=True) for line in lines]
        for thread in threads:
            thread.start()
        began, sent = time.monotonic(), 0
        while (now := time.monotonic()) < began + seconds:
            while sent < (now - began) * PUTS_A_SECOND:
                value = f"{time.monotonic_ns():020d}".ljust(100, "x")
                lines[sent % len(lines)].send({"type": "Put", "key": f"m.k{self.rng.randrange(keys)}", "value": value})
                sent += 1
            time.sleep(0.001)
        until(ANSWER_LIMIT_S, lambda: sum(answered.values()) >= sent, "puts are not answered")
        self.wait_until_level()
        ours.send(None)
        if not ours.poll(ANSWER_LIMIT_S):
            raise Broken("the subscribers do not say what they saw")
        delays = ours.recv()
        reader.join()
        for line in lines:
            line.socket.shutdown(socket.SHUT_RDWR)
        return delays, sent, answered[200]

    def away(self, keys):
        """How long after its data are loaded a node is level that was away during 1,000 changes, in milliseconds, and with how many
        bytes; then what keys, values and stamps take."""
        node, first = self.nodes[len(self.nodes)], self.nodes[1]
        node.terminate()
        changed = self.rng.sample([f"m.k{key}" for key in range(keys)], min(keys, 1000))
        writes = [{"put": {"key": key, "value": "y" * 100}} for key in changed]
        status, body = first.ask("/v1/batch", "POST", json.dumps(writes))
        if status != 200:
            raise Broken(f"a batch: {status} {body[:200]!r}")
        others = [other for other in self.nodes.values() if other is not node]
        until(AGREE_LIMIT_S, lambda: len({other.digest() for other in others}) == 1, "the others do not agree")
        target, before, offset = first.digest(), sum(self.net.sent(node.number)), os.path.getsize(node.log)
        node.start()
        until(AGREE_LIMIT_S, lambda: has_digest(node, target), f"node {node.number} is not level")
        level, length = time.time(), sum(self.net.sent(node.number)) - before
        with open(node.log, encoding="utf-8") as log:
            log.seek(offset)
            loaded = next(line for line in log if "data directory opened" in line).split()[0]
        # It has no contact before.
        loaded = datetime.datetime.fromisoformat(loaded.replace("Z", "+00:00")).timestamp()
        return round((level - loaded) * 1000), length, sum(len(key) + 100 + STAMP_LEN for key in changed)


    def joins(self, keys, seconds):
        """How long after its start a new node has all keys, in milliseconds, while the others take puts; the p99 of these before and
        meanwhile, and how many of them were not done. Each is the median of five joins, or of one with
        --fast: a disk that stands still once for 40 ms is the p99 of 4,000 puts."""
        rounds = [self.one_join(keys, seconds) for _ in range(1 if self.options.fast else 5)]
        joined, before, meanwhile, unanswered = zip(*rounds)
        print("joins: " + ", ".join(f"{round(r[0])} ms (p99 {r[1]:.1f}, {r[2]:.1f} ms)" for r in rounds), flush=True)
        return round(statistics.median(joined)), statistics.median(before), statistics.median(meanwhile), sum(unanswered)

    def one_join(self, keys, seconds):
        node, others = self.nodes[len(self.nodes)], [self.nodes[number] for number in self.net.nodes][:-1]
        node.terminate()
        shutil.rmtree(node.data)
        ours, theirs = multiprocessing.Pipe()
        paths = [other.lines for other in others]
        putter = multiprocessing.get_context("fork").Process(target=put_at_a_pace, args=[theirs, paths, ours, keys], daemon=True)
        putter.start()
        theirs.close()
        time.sleep(seconds)
        began = time.monotonic()
        node.start()
        until(AGREE_LIMIT_S, lambda: has_keys(node, keys), f"node {node.number} has not all keys")
        joined = time.monotonic()
        # What it still does for the node counts as well.
        time.sleep(max(0.0, began + seconds - joined))
        ours.send(None)
        if not ours.poll(ANSWER_LIMIT_S):
            raise Broken("puts are not answered")
        took, unanswered = ours.recv()
        putter.join()
        self.wait_until_level()
        before = [ms for sent, ms in took if began - seconds + 1 <= sent < began]
        meanwhile = [ms for sent, ms in took if began <= sent < max(joined, began + 1)]
        return (joined - began) * 1000, percentile(before, 0.99), percentile(meanwhile, 0.99), unanswered


def fill(node, keys, settle):
    """Puts this number of keys of 100 B; says what memory each has taken, with all that the process needed for it."""
    before = node.memory()
    for begin in range(0, keys, 5_000):
        writes = [{"put": {"key": f"m.k{key}", "value": "x" * 100}} for key in range(begin, min(begin + 5_000, keys))]
        status, body = node.ask("/v1/batch", "POST", json.dumps(writes))
        if status != 200:
            raise Broken(f"a batch: {status} {body[:200]!r}")
    settle()
    return round((node.memory() - before) / keys)


def has_keys(node, count):
    node.look()
    try:
        return node.stats()["keys"] >= count
    except (Gone, Broken, KeyError):
        return False


def put_at_a_pace(pipe, paths, other_end, keys):
    """A process of its own: puts at a fixed pace until it is asked for what it found, which is when each put was due and how long
    after that it was done, in milliseconds; and how many were not."""
    other_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    selector, streams, rng = selectors.DefaultSelector(), [], random.Random(1)
    for path in paths:
        stream = socket.socket(socket.AF_UNIX)
        stream.connect(path)
        stream.sendall(b'{"type":"Connect","values":"text","features":["reset"]}\n')
        streams.append(stream)
        selector.register(stream, selectors.EVENT_READ)
    selector.register(pipe, selectors.EVENT_READ)
    # The answer to Connect is not that of a put.
    left, waiting = dict.fromkeys(streams, b""), {stream: collections.deque([None]) for stream in streams}
    began, sent, took, failed, end = time.monotonic(), 0, [], 0, None
    while end is None or time.monotonic() < end and any(waiting.values()):
        due = began + sent / PUTS_A_SECOND
        while end is None and time.monotonic() >= due:
            stream = streams[sent % len(streams)]
            if len(waiting[stream]) >= UNANSWERED_MAX:
                break  # Its answers have to be read, or it takes no more.
            put = {"type": "Put", "key": f"m.k{rng.randrange(keys)}", "value": "z" * 100}
            stream.sendall(json.dumps(put).encode() + b"\n")
            waiting[stream].append(due)
            sent += 1
            due = began + sent / PUTS_A_SECOND
        for ready, _ in selector.select(min(0.1, max(0.001, due - time.monotonic())) if end is None else 0.1):
            if ready.fileobj is pipe:
                pipe.recv()
                selector.unregister(pipe)
                end = time.monotonic() + ANSWER_LIMIT_S / 2
                continue
            received = ready.fileobj.recv(1 << 18)
            if not received:
                sys.exit("a node has ended a connection")
            now = time.monotonic()
            *lines, left[ready.fileobj] = (left[ready.fileobj] + received).split(b"\n")
            for line in lines:
                of = waiting[ready.fileobj].popleft()
                if of is not None:
                    took.append((of, (now - of) * 1000))
                    failed += b'"status":200' not in line
    pipe.send((took, failed + sum(map(len, waiting.values()))))


def has_digest(node, digest):
    node.look()
    try:
        return node.digest() == digest
    except (Gone, KeyError):
        return False


def percentile(values, part):
    values = sorted(values)
    return values[min(int(len(values) * part), len(values) - 1)] if values else float("nan")


def count_answers(line, answered):
    with contextlib.suppress(Gone):
        while answer := line.read():
            answered[answer["Base"]["status"]] += 1


def read_delays(pipe, paths, other_end):
    """A process of its own: reads what the nodes notify, and notes when each value was seen."""
    other_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    selector, left, seen, is_synced = selectors.DefaultSelector(), {}, {}, 0
    for path in paths:
        stream = socket.socket(socket.AF_UNIX)
        stream.connect(path)
        stream.sendall(b'{"type":"Connect","values":"text","features":["reset"]}\n{"type":"Subscribe","key":"*","snapshot":true}\n')
        selector.register(stream, selectors.EVENT_READ)
        left[stream] = b""
    selector.register(pipe, selectors.EVENT_READ)
    while True:
        for ready, _ in selector.select():
            if ready.fileobj is pipe:
                pipe.send([(max(times) - sent) / 1e6 for sent, times in seen.items() if len(times) == len(paths)])
                return
            received = ready.fileobj.recv(1 << 18)
            if not received:
                sys.exit("a node has ended a subscription")
            now = time.monotonic_ns()
            *lines, left[ready.fileobj] = (left[ready.fileobj] + received).split(b"\n")
            for line in lines:
                if line.startswith(b'{"Synced"'):
                    is_synced += 1
                    if is_synced == len(paths):
                        pipe.send(None)
                elif (at := line.find(b'"value":"')) >= 0 and line[at + 9:at + 29].isdigit():
                    seen.setdefault(int(line[at + 9:at + 29]), []).append(now)


def obstacle():
    """Why network namespaces cannot be made here, or None."""
    if os.geteuid() != 0:
        return "root is needed for network namespaces"
    if not shutil.which("ip"):
        return "there is no ip (iproute2)"
    try:
        with Net(2):
            return None
    except Broken as broken:
        return str(broken)


def on_disk():
    """Where data are to be: not in memory."""
    for directory in (tempfile.gettempdir(), "/var/tmp", os.path.dirname(os.path.abspath(__file__))):
        if os.path.isdir(directory) and run("stat", "-f", "-c", "%T", directory).strip() not in ("tmpfs", "ramfs"):
            return directory
    raise Broken("there is no directory on a disk")


def end(number, _frame):
    # Once: what has to be taken down is.
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", nargs="?")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--seconds", type=float, help="of faults (60)")
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--fast", action="store_true", help="for every change: 7 s, all quicker, and figures with few keys")
    parser.add_argument("--durability", default="sync")
    parser.add_argument("--mesh", action="store_true", help="servers that are each other's --peer, and no figures")
    parser.add_argument("--figures", action="store_true", help="no faults: only what is measured, beside its goals")
    options = parser.parse_args()
    if options.check:
        why = obstacle()
        sys.exit(f"no network namespaces: {why}" if why else 0)
    if not options.server:
        parser.error("which server?")
    if not 3 <= options.nodes <= 100:
        parser.error("--nodes is 3 to 100")
    options.server = os.path.abspath(options.server)
    options.seconds = options.seconds or (7 if options.fast else 60)
    if why := obstacle():
        print(f"SKIPPED: no partitions of a real cluster: {why}", flush=True)
        sys.exit("NKV_FAULTS is set, and none may be skipped" if os.environ.get("NKV_FAULTS") == "1" else 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    directory, is_kept = tempfile.mkdtemp(prefix="nkv-cluster-", dir=on_disk()), False
    try:
        with Net(options.nodes) as net:
            for part in [Test.faults_and_checks] * (not options.figures) + [Test.measure] * (not options.mesh):
                test = Test(options, net, directory)
                try:
                    part(test)
                finally:
                    test.end_nodes()
    except Exception as error:
        is_kept = True
        print(f"FAILED with seed {options.seed}: {error}\nlogs and data: {directory}", flush=True)
        if isinstance(error, Broken):
            sys.exit(1)
        raise
    finally:
        if not is_kept:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
