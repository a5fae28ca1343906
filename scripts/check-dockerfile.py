#!/usr/bin/env python3
"""Checks packaging/Dockerfile with hadolint, which parses it and the shell in it, and that it keeps what it promises.

Nothing is built: that takes a container engine. `.ci/run` builds the programs, and this checks that the variables are those of
nkv-server.

hadolint is in the venv of check-openapi.py. Without a package registry this says so and passes, except in CI (CI=true).
"""

import pathlib
import re
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent / "http"))
import door  # noqa: E402

DOCKERFILE = door.ROOT / "packaging/Dockerfile"
ARGUMENTS = door.ROOT / "crates/nkv-server/src/bin/nkv-server/args.rs"


def promises(text, variables):
    last = text.rsplit("\nFROM ", 1)[1]
    for instruction in ("VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"):
        if not re.search(rf"^{instruction} ", last, re.M):
            yield f"the last stage has no {instruction}"
    user = re.search(r"^USER (\S+)", last, re.M)
    if not user or user[1] in ("root", "0"):
        yield "the last stage runs as root"
    if text.count("\nFROM ") < 2:
        yield "it is one stage, and so as large as what builds it"
    yield from (f"nkv-server has no {name}" for name in re.findall(r"\b(NKV_\w+)=", last) if name not in variables)


def main():
    variables = re.findall(r'env = "(\w+)"', ARGUMENTS.read_text(encoding="utf-8"))
    wrong = list(promises(DOCKERFILE.read_text(encoding="utf-8"), variables))
    print("\n".join(wrong) or "packaging/Dockerfile: as promised")
    programs = door.venv()
    # Base images without a digest: they are to bring their repairs along.
    lint = programs and subprocess.run([programs / "hadolint", "--ignore", "DL3006", DOCKERFILE])
    return 1 if wrong or lint and lint.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
