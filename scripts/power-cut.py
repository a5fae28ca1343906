#!/usr/bin/env python3
"""Cuts the power under a running nkv-server, and checks that nothing acknowledged was lost.

    power-cut.py SERVER [--cycles 20] [--fs ext4|xfs] [--durability sync]

The data directory is on a file system of its own in a loop device (root is needed). In each cycle eight clients put
values while the file system is shut down with FS_IOC_GOINGDOWN: nothing more reaches the device, as when the power
goes. Then it is mounted again, which replays its journal, and a new server is asked for all that was acknowledged
before the cut began. With another durability than sync, losing is allowed and counted; a torn value never is.
"""

import argparse
import fcntl
import json
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

GOINGDOWN = 0x8004587D
NO_LOG_FLUSH = struct.pack("I", 2)


class Client:
    def __init__(self, port):
        self.stream = socket.create_connection(("127.0.0.1", port), timeout=20).makefile("rwb")
        self.ask({"type": "Connect", "values": "text"})

    def ask(self, request):
        self.stream.write(json.dumps(request).encode() + b"\n")
        self.stream.flush()
        line = self.stream.readline()
        return next(iter(json.loads(line).values())) if line.endswith(b"\n") else None


def start(server, data, durability):
    child = subprocess.Popen([server, "127.0.0.1:0", "--data-dir", data, "--durability", durability],
                             stderr=subprocess.PIPE, text=True, env=dict(os.environ, NO_COLOR="1"))
    for line in child.stderr:
        if "listening at" in line:
            # Somebody must go on reading, or the server's log would fill the pipe.
            threading.Thread(target=child.stderr.read, daemon=True).start()
            return child, int(line.rsplit(":", 1)[1])
    sys.exit(f"the server ended with {child.wait()}")


def write(port, writer, cycle, cut, acknowledged):
    try:
        client = Client(port)
        for n in range(10**9):
            key, value = f"w{writer}.{n % 7}", f"{cycle * 10**7 + n} " + "x" * (n % 300)
            answer = client.ask({"type": "Put", "key": key, "value": value})
            # What is answered once the cut has begun may be about a device that is gone already.
            if answer is None or answer["status"] != 200 or cut.is_set():
                return
            acknowledged[key] = (cycle * 10**7 + n, answer["revision"])
            acknowledged["count"] = n + 1
    except (OSError, ValueError):
        return


def check(port, acknowledged):
    client = Client(port)
    lost = []
    for key, (number, revision) in acknowledged.items():
        got = client.ask({"type": "Get", "key": key})
        if not got["data"]:
            lost.append(key)
            continue
        value = got["data"][0]
        stored = int(value.split(" ")[0])
        if value != f"{stored} " + "x" * (stored % 10**7 % 300):
            sys.exit(f"{key} is torn: {value!r}")
        if stored < number or got["revisions"][0] < revision:
            lost.append(key)
    return lost


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("server")
    parser.add_argument("--cycles", type=int, default=20)
    parser.add_argument("--fs", default="ext4", choices=["ext4", "xfs"])
    parser.add_argument("--durability", default="sync")
    args = parser.parse_args()
    server = os.path.abspath(args.server)
    os.chdir(tempfile.mkdtemp(prefix="nkv-power-cut-"))
    run = lambda *words: subprocess.run(words, check=True)
    run("truncate", "-s", "320M" if args.fs == "xfs" else "96M", "disk")
    run(f"mkfs.{args.fs}", "-q", "-F" if args.fs == "ext4" else "-f", "disk")
    os.mkdir("mount")
    acknowledged, writes, lost = {}, 0, 0
    for cycle in range(args.cycles + 1):
        run("mount", "-o", "loop", "disk", "mount")
        child = None
        try:
            child, port = start(server, "mount/data", args.durability)
            missing = check(port, acknowledged)
            lost += len(missing)
            for key in missing:
                del acknowledged[key]
            if cycle == args.cycles:
                break
            cut = threading.Event()
            told = [dict() for _ in range(8)]
            writers = [threading.Thread(target=write, args=(port, w, cycle, cut, told[w])) for w in range(8)]
            for writer in writers:
                writer.start()
            time.sleep(0.1 + random.random() * 0.3)
            directory = os.open("mount", os.O_RDONLY)
            cut.set()
            fcntl.ioctl(directory, GOINGDOWN, NO_LOG_FLUSH)
            os.close(directory)
            for writer in writers:
                writer.join()
            for part in told:
                writes += part.pop("count", 0)
                acknowledged.update(part)
        finally:
            if child:
                child.kill()
                child.wait()
            run("umount", "mount")
    print(f"TEST power_cut fs={args.fs} durability={args.durability} cycles={args.cycles} "
          f"acknowledged={writes} lost={lost}")
    sys.exit(1 if lost and args.durability == "sync" else 0)


main()
