#!/usr/bin/env python3
"""Runs schemathesis against the HTTP door: check-openapi.py NKV_SERVER [--seconds N] [--seed N]

Starts the server with values in memory, takes the document that it serves at /v1/openapi.json, and tries every operation with
what the document allows and with what it does not. Whatever the document does not say is an error: a status, a content type, a
body, a 5xx. Left out are the WebSocket, and streams without an end: each watch gets a short `wait`.

schemathesis is installed into a venv of its own (NKV_VENV, or target/http-venv). Without a package registry this says so and
passes, except in CI (CI=true).
"""

import argparse
import os
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent / "http"))
import door  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description="Runs schemathesis against the HTTP door.")
    parser.add_argument("server", help="an nkv-server with the HTTP door")
    parser.add_argument("--seconds", type=int, default=110, help="no longer than that")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-examples", type=int, default=60, help="for each operation")
    args = parser.parse_args()
    venv = door.venv()
    if venv is None:
        return 0
    here = pathlib.Path(__file__).parent / "http"
    with door.Server(args.server) as server:
        command = [
            venv / "schemathesis", "--config-file", here / "schemathesis.toml", "--no-color", "run",
            f"{server.url}/v1/openapi.json", "--exclude-path", "/v1/ws", "--seed", str(args.seed),
            "--max-examples", str(args.max_examples), "--request-timeout", "10", "--warnings", "off",
        ]  # fmt: skip
        env = {**os.environ, "SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(here)}
        try:
            status = subprocess.run(command, env=env, timeout=args.seconds, cwd=server.dir).returncode
        except subprocess.TimeoutExpired:
            print(f"not done after {args.seconds} s")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
