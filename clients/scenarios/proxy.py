#!/usr/bin/env python3
"""The stage of one case: a server of its own, and a proxy before it that cuts and freezes.

    NKV_SERVER=path/to/nkv-server python3 proxy.py

The first line of stdout is a JSON object with the addresses `proxy`, `direct` and `unix`. Then each line of stdin is a
command, and each is answered by one line: `ok`, `ok TEXT` or `error TEXT`. At the end of stdin the server is stopped and
its data is removed. The commands are listed in README.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time

CHUNK = 16384


def hold_port() -> socket.socket:
    """Keeps a port from all other programs, whose connections may have any that is free, while nothing listens at it. A
    listener that sets SO_REUSEADDR may use it, as the server and asyncio do."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


class Server:
    """The server under test, with a directory of its own."""

    def __init__(self, program: str) -> None:
        self.program = program
        self.directory = tempfile.mkdtemp(prefix="nkv-case-")
        self.unix = os.path.join(self.directory, "nkv.sock")
        self.held = hold_port()
        self.port = self.held.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def data(self) -> str:
        return os.path.join(self.directory, "data")

    def start(self) -> None:
        if self.process is not None:
            raise RuntimeError("the server runs already")
        with open(os.path.join(self.directory, "log"), "ab") as log:
            self.process = subprocess.Popen(
                [self.program, "--listen", f"127.0.0.1:{self.port}", "--listen", f"unix:{self.unix}",
                 "--data-dir", self.data, "--durability", "os"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        limit = time.monotonic() + 20
        while True:
            try:
                self.ask({"type": "Health"})
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > limit:
                    with open(os.path.join(self.directory, "log"), errors="replace") as log:
                        sys.stderr.write(log.read())
                    raise RuntimeError("the server does not start") from None
                time.sleep(0.01)

    def stop(self, kill: bool = False) -> None:
        if self.process is None:
            return
        if kill:
            self.process.kill()
        else:
            self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def wipe(self) -> None:
        if self.process is not None:
            raise RuntimeError("the server runs: stop it first")
        shutil.rmtree(self.data, ignore_errors=True)

    def remove(self) -> None:
        self.stop(kill=True)
        self.held.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def ask(self, request: dict[str, object]) -> dict[str, object]:
        """One request on a connection of its own, past the proxy."""
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            connection.sendall(json.dumps(dict(request, id=1)).encode() + b"\n")
            line = connection.makefile("rb").readline()
        if not line:
            raise OSError("closed")
        answer: dict[str, object] = next(iter(json.loads(line).values()))
        return answer


class Proxy:
    """Copies bytes between clients and the server until it gets another command."""

    def __init__(self, server_port: int) -> None:
        self.server_port = server_port
        self.held = hold_port()
        self.port = self.held.getsockname()[1]
        self.listener: asyncio.base_events.Server | None = None
        self.writers: set[asyncio.StreamWriter] = set()
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.refusing = False
        self.accepted = 0
        self.holds_back = False
        self.buffers = 0
        self.left: dict[str, int | None] = {"down": None, "up": None}

    async def listen(self) -> None:
        if self.listener is None:
            self.listener = await asyncio.start_server(self.serve, "127.0.0.1", self.port, limit=CHUNK)

    async def unlisten(self) -> None:
        if self.listener is not None:
            self.listener.close()
            self.listener = None
        self.cut()

    def cut(self) -> None:
        for writer in list(self.writers):
            writer.transport.abort()
        self.writers.clear()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self.refusing:
            writer.close()
            return
        self.writers.add(writer)
        up = None
        try:
            self.shrink(writer)
            up_reader, up = await asyncio.open_connection("127.0.0.1", self.server_port, limit=CHUNK)
            self.shrink(up)
            self.writers.add(up)
            copies = [asyncio.ensure_future(self.copy("up", reader, up)),
                      asyncio.ensure_future(self.copy("down", up_reader, writer))]
            # The end of one direction is passed on; the end of both, or an error, ends the connection.
            await asyncio.gather(*copies)
        except (OSError, asyncio.CancelledError):
            pass  # cut, or the end of the case
        finally:
            for end in (writer, up):
                if end is not None:
                    end.close()
                    self.writers.discard(end)

    def shrink(self, writer: asyncio.StreamWriter) -> None:
        if self.buffers:
            connection = writer.get_extra_info("socket")
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                connection.setsockopt(socket.SOL_SOCKET, option, self.buffers)
            writer.transport.set_write_buffer_limits(self.buffers)

    async def copy(self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK):
            if way == "up" and not self.flowing.is_set():
                self.holds_back = True
            await self.flowing.wait()
            left = self.left[way]
            if left is not None:
                writer.write(data[:left])
                self.left[way] = left - len(data)
                if left <= len(data):
                    self.left[way] = None
                    await writer.drain()
                    await asyncio.sleep(0.02)  # so that the last bytes leave before the cut
                    self.cut()
                    return
            else:
                writer.write(data)
            await writer.drain()
        await self.flowing.wait()
        if writer.can_write_eof():
            writer.write_eof()


async def obey(words: list[str], server: Server, proxy: Proxy) -> str:
    loop = asyncio.get_running_loop()
    command, arguments = words[0], words[1:]
    if command == "cut":
        proxy.cut()
    elif command == "freeze":
        proxy.flowing.clear()
    elif command == "thaw":
        proxy.flowing.set()
        proxy.holds_back = False
    elif command == "held":
        return "yes" if proxy.holds_back else "no"
    elif command == "cut-after-bytes":
        proxy.left["down"] = int(arguments[0])
    elif command == "cut-after-bytes-up":
        proxy.left["up"] = int(arguments[0])
    elif command == "refuse":
        proxy.refusing = True
        proxy.cut()
    elif command == "accept":
        proxy.refusing = False
    elif command == "down":
        await proxy.unlisten()
    elif command == "up":
        await proxy.listen()
    elif command == "buffers":
        proxy.buffers = int(arguments[0])
    elif command == "connections":
        accepted, proxy.accepted = proxy.accepted, 0
        return str(accepted)
    elif command == "server-stop":
        await loop.run_in_executor(None, server.stop)
    elif command == "server-kill":
        await loop.run_in_executor(None, server.stop, True)
    elif command == "server-start":
        await loop.run_in_executor(None, server.start)
    elif command == "server-wipe":
        server.wipe()
    elif command == "subscribers":
        answer = await loop.run_in_executor(None, server.ask, {"type": "Trace", "key": arguments[0]})
        subscribers = answer.get("subscribers")
        return str(len(subscribers)) if isinstance(subscribers, list) else "?"
    else:
        raise ValueError(f"unknown command '{command}'")
    return ""


async def run(server: Server) -> None:
    proxy = Proxy(server.port)
    await proxy.listen()
    print(json.dumps({"proxy": f"127.0.0.1:{proxy.port}", "direct": f"127.0.0.1:{server.port}",
                      "unix": f"unix:{server.unix}"}), flush=True)
    commands: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def read() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(commands.put_nowait, line)
        loop.call_soon_threadsafe(commands.put_nowait, "")

    threading.Thread(target=read, daemon=True).start()
    while line := await commands.get():
        if not line.strip():
            continue
        try:
            answer = await obey(line.split(), server, proxy)
            print(f"ok {answer}".rstrip(), flush=True)
        except Exception as error:
            print(f"error {error}".splitlines()[0], flush=True)
    proxy.flowing.set()
    await proxy.unlisten()
    proxy.held.close()


def main() -> None:
    program = os.environ.get("NKV_SERVER")
    if not program:
        sys.exit("NKV_SERVER must be the path of the server")
    server = Server(program)
    try:
        server.start()
        asyncio.run(run(server))
    finally:
        server.remove()


if __name__ == "__main__":
    main()
