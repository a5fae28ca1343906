#!/usr/bin/env python3
"""Counts what many subscribers cost an engine: 10,000 subscriptions over 1,000 connections to two servers are two watches.

    engine-watches.py etcd|nats SERVER [--connections 1000] [--each 10] [--puts 100]

SERVER is nkv-server with the feature of the engine, whose program is found as its tests find it (NKV_ETCD, NKV_NATS_SERVER, or
scripts/servers-etcd.sh and scripts/servers-nats.sh). Then it puts to a key that every connection watches, and says how long it took
until all had each value. The exit status is 1 where there are not two watches, or a value does not come. All that was started ends
with the script.
"""
import argparse
import contextlib
import json
import os
import pathlib
import resource
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

LIMIT_S = 60
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or pathlib.Path(__file__).resolve().parent.parent / "target")


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def program(variable, path):
    found = os.environ.get(variable) or shutil.which(path.name, path=f"{TARGET / path.parent}:{os.environ['PATH']}")
    return found or sys.exit(f"no {path.name}: set {variable}")


def get(url):
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read().decode()


def eventually(what, is_so):
    until = time.monotonic() + LIMIT_S
    while True:
        with contextlib.suppress(OSError):
            if is_so():
                return
        if time.monotonic() > until:
            sys.exit(f"not in {LIMIT_S} s: {what}")
        time.sleep(0.05)


class Etcd:
    def __init__(self, start, path):
        port, peer = free_port(), free_port()
        own, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer}"
        start(program("NKV_ETCD", pathlib.Path("servers/etcd/etcd")), "--data-dir", path, "--log-level", "error", "--listen-client-urls", own,
              "--advertise-client-urls", own, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
              "--initial-cluster", f"default={peer}")
        self.url, self.metrics = f"etcd://127.0.0.1:{port}/watches", own + "/metrics"
        eventually("etcd answers", lambda: get(own + "/health"))

    def watches(self):
        lines = get(self.metrics).splitlines()
        return int(float(next(line.split()[1] for line in lines if line.startswith("etcd_debugging_mvcc_watcher_total "))))


class Nats:
    def __init__(self, start, path):
        port, monitor = free_port(), free_port()
        start(program("NKV_NATS_SERVER", pathlib.Path("servers/nats/nats-server")), "-js", "-sd", path, "-a", "127.0.0.1", "-p", str(port),
              "-m", str(monitor))
        self.url, self.monitor = f"nats://127.0.0.1:{port}/watches", f"http://127.0.0.1:{monitor}"
        eventually("the NATS server answers", lambda: get(self.monitor + "/healthz"))

    def watches(self):
        return json.loads(get(self.monitor + "/jsz"))["consumers"]


class Connection:
    def __init__(self, port):
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.buffer = b""

    def send(self, *requests):
        self.sock.sendall(b"".join(json.dumps(request).encode() + b"\n" for request in requests))

    def lines(self):
        data = self.sock.recv(1 << 16)
        if not data:
            sys.exit("a connection was closed")
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["etcd", "nats"])
    parser.add_argument("server")
    parser.add_argument("--connections", type=int, default=1_000)
    parser.add_argument("--each", type=int, default=10)
    parser.add_argument("--puts", type=int, default=100)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(tempfile.TemporaryDirectory())
        log = stack.enter_context(open(os.path.join(path, "log"), "w"))

        def start(*words):
            child = subprocess.Popen(words, stdout=log, stderr=log)
            stack.callback(lambda: (child.kill(), child.wait()))
            return child

        engine = {"etcd": Etcd, "nats": Nats}[args.engine](start, os.path.join(path, "engine"))
        ports = [free_port(), free_port()]
        for port in ports:
            start(args.server, "--listen", f"127.0.0.1:{port}", "--max-connections", "10000", "--max-connections-per-address", "10000", "--engine", engine.url)
        for port in ports:
            eventually("a server is level", lambda: ask(port, {"type": "Health"})["Base"]["status"] == 200)
        connections = [Connection(ports[n % 2]) for n in range(args.connections)]
        for n, connection in enumerate(connections):
            keys = ["hot"] + [f"k.{(n * args.each + i) % 997}" for i in range(1, args.each)]
            connection.send({"type": "Connect", "values": "text"}, *({"type": "Subscribe", "key": key} for key in keys))
        selector = selectors.DefaultSelector()
        for connection in connections:
            selector.register(connection.sock, selectors.EVENT_READ, connection)
        collect(selector, b'"Hello"', args.connections * args.each)
        watches = engine.watches()
        print(f"TEST {args.engine}: {args.connections * args.each} subscriptions over {args.connections} connections on two servers: "
              f"{watches} watches")
        writer, took = Connection(ports[0]), []
        for number in range(args.puts):
            began = time.monotonic()
            writer.send({"type": "Put", "key": "hot", "value": str(number)})
            collect(selector, b'{"Update":{"key":"hot"', args.connections)
            took.append(time.monotonic() - began)
        took.sort()
        print(f"TEST {args.engine}: a value at all {args.connections} subscribers, as this script reads them, after "
              f"{took[len(took) // 2] * 1e3:.1f} ms (median), {took[-1] * 1e3:.1f} ms (longest)")
        again = engine.watches()
        if (watches, again) != (2, 2):
            sys.exit(f"not two watches: {watches}, {again}")


def ask(port, request):
    connection = Connection(port)
    connection.send(request)
    lines = []
    while not lines:
        lines = connection.lines()
    connection.sock.close()
    return json.loads(lines[0])


def collect(selector, prefix, count):
    until = time.monotonic() + LIMIT_S
    while count > 0:
        for key, _ in selector.select(1):
            count -= sum(line.startswith(prefix) for line in key.data.lines())
        if time.monotonic() > until:
            sys.exit(f"{count} messages do not come: {prefix.decode()}")


main()
