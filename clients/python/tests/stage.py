"""The stage of a test: a server of its own, with a proxy before it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from types import TracebackType

HERE = os.path.dirname(os.path.abspath(__file__))
SCENARIOS = os.environ.get("NKV_SCENARIOS") or os.path.join(HERE, "..", "..", "scenarios")


class Stage:
    """Runs `proxy.py`. Usable by several threads."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, os.path.join(SCENARIOS, "proxy.py")], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None and self._process.stdin is not None
        self._lines, self._commands = self._process.stdout, self._process.stdin
        self._lock = threading.Lock()
        self.addresses: dict[str, str] = json.loads(self._lines.readline())

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._commands.close()
        self._process.wait(30)
        self._lines.close()

    def ask(self, command: str) -> str:
        with self._lock:
            self._commands.write(command + "\n")
            self._commands.flush()
            answer = self._lines.readline().strip()
        word, _, rest = answer.partition(" ")
        if word != "ok":
            raise AssertionError(f"{command}: {answer}")
        return rest
