#!/usr/bin/env python3
"""Live configuration: a program that always has its present settings, and acts when they change.

    python3 live_config.py [ADDRESS]          127.0.0.1:4222 if absent
    python3 live_config.py --check [ADDRESS]  changes the settings itself, and checks what it sees
"""

from __future__ import annotations

import sys

import nkv

DEFAULTS = {"app.config.greeting": "hello", "app.config.workers": "4"}


class Config:
    """The settings below `app.config`: those of the store, else the defaults."""

    def __init__(self, branch: nkv.BranchWatch) -> None:
        self._branch = branch

    def text(self, name: str) -> str:
        value = self._branch.get(f"app.config.{name}")
        return DEFAULTS[f"app.config.{name}"] if value is None else value.decode()

    def number(self, name: str) -> int:
        try:
            return int(self.text(name))
        except ValueError:
            return int(DEFAULTS[f"app.config.{name}"])


def run(address: str) -> None:
    with nkv.Client(address, name="live_config.py") as client, client.watch_branch("app.config") as branch:
        config = Config(branch)
        while True:
            branch.changed()
            old = "" if branch.is_live else "  (the connection is lost: these may be old)"
            print(f"greeting={config.text('greeting')!r} workers={config.number('workers')}{old}", flush=True)


def check(address: str) -> None:
    with nkv.Client(address) as client, client.watch_branch("app.config") as branch:
        client.delete("app.config.*")
        config = Config(branch)
        assert (config.text("greeting"), config.number("workers")) == ("hello", 4)
        client.put("app.config.greeting", "good morning")
        client.put("app.config.workers", "not a number")
        # A watch is never older than a put of the same client that is done.
        assert (config.text("greeting"), config.number("workers")) == ("good morning", 4)
        client.put("app.config.workers", "8")
        assert config.number("workers") == 8
        client.delete("app.config.greeting")
        assert config.text("greeting") == "hello"
        client.delete("app.config.*")
    print("ok")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    is_check = arguments[:1] == ["--check"]
    where = (arguments[is_check:] or ["127.0.0.1:4222"])[0]
    try:
        check(where) if is_check else run(where)
    except KeyboardInterrupt:
        pass
    except nkv.NkvError as error:
        sys.exit(f"live_config.py: {error}")
