#!/usr/bin/env python3
"""Has the hosts of two subscribers vanish without a word, and waits for nkv-server to let go of them.

    half-open.py SERVER

The subscribers live in a network namespace (root is needed) whose link is taken down: no FIN, no RST, nothing. One of
them has nothing to be told, so that only keepalive can tell; the other has a change on its way. Both must be gone, and
their subscriptions with them, within 90 s.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

LIMIT_S = 90
NAME = f"nkv{os.getpid() % 100000}"
SUBNET = f"10.{os.getpid() % 200 + 20}.77"

SUBSCRIBE = """
import socket, sys, time
held = []
for key in ("idle", "busy"):
    stream = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10)
    stream.sendall(b'{"type":"Subscribe","key":"%s"}\\n' % key.encode())
    assert stream.recv(100) == b'"Hello"\\n'
    held.append(stream)
print("subscribed", flush=True)
time.sleep(600)
"""


def run(*command):
    subprocess.run(command, check=True)


def ask(stream, request):
    stream.write(json.dumps(request).encode() + b"\n")
    stream.flush()
    return next(iter(json.loads(stream.readline()).values()))


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as data:
        server = client = None
        try:
            run("ip", "netns", "add", NAME)
            run("ip", "link", "add", f"{NAME}a", "type", "veth", "peer", "name", f"{NAME}b", "netns", NAME)
            run("ip", "addr", "add", f"{SUBNET}.1/24", "dev", f"{NAME}a")
            run("ip", "link", "set", f"{NAME}a", "up")
            run("ip", "-n", NAME, "addr", "add", f"{SUBNET}.2/24", "dev", f"{NAME}b")
            run("ip", "-n", NAME, "link", "set", f"{NAME}b", "up")
            server = subprocess.Popen([sys.argv[1], f"{SUBNET}.1:0", "--insecure", "--data-dir", f"{data}/d"],
                                      stderr=subprocess.PIPE, text=True, env=dict(os.environ, NO_COLOR="1"))
            port = next(line.rsplit(":", 1)[1].strip() for line in server.stderr if "listening at" in line)
            threading.Thread(target=server.stderr.read, daemon=True).start()
            client = subprocess.Popen(["ip", "netns", "exec", NAME, sys.executable, "-c", SUBSCRIBE, f"{SUBNET}.1", port],
                                      stdout=subprocess.PIPE, text=True)
            if client.stdout.readline() != "subscribed\n":
                sys.exit("the subscribers did not subscribe")
            stream = socket.create_connection((f"{SUBNET}.1", int(port)), timeout=10).makefile("rwb")
            assert ask(stream, {"type": "Stats"})["subscriptions"] == 2
            run("ip", "-n", NAME, "link", "set", f"{NAME}b", "down")
            start = time.monotonic()
            assert ask(stream, {"type": "Put", "key": "busy", "value": "x"})["status"] == 200
            while (left := ask(stream, {"type": "Stats"}))["subscriptions"] > 0 or left["connections"] > 1:
                if time.monotonic() - start > LIMIT_S:
                    sys.exit(f"TEST half_open FAIL after {LIMIT_S} s: {left}")
                time.sleep(1)
            print(f"TEST half_open peers=2 gone_after_s={time.monotonic() - start:.0f} limit_s={LIMIT_S}")
        finally:
            # It ends anyhow; a second signal must not leave the namespace.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            for child in (client, server):
                if child:
                    child.kill()
                    child.wait()
            # A namespace may outlive its name for as long as a connection in it does, and the link with it.
            if os.path.exists(f"/sys/class/net/{NAME}a"):
                run("ip", "link", "del", f"{NAME}a")
            if os.path.exists(f"/run/netns/{NAME}"):
                run("ip", "netns", "del", NAME)


if __name__ == "__main__":
    main()
