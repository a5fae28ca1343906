#!/bin/sh
# Builds the wheel and the sdist, installs each away from the checkout, checks types, and runs the protocol tests and the example.
# PYTHON is the interpreter. NKV_SERVER is the path of the server; without it the example is not run.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
export W="$work"
server=
trap 'if [ -n "$server" ]; then kill "$server"; fi; rm -rf "$work"' EXIT

"$python" -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet --disable-pip-version-check build mypy
"$work/tools/bin/python" -m build --outdir "$work/dist" "$here" >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }

cat >"$work/user.py" <<'PROGRAM'
import asyncio
from collections.abc import AsyncIterator, Iterator

import nkv
import nkv.aio


def plain(client: nkv.Client) -> bytes | None:
    entry: nkv.Entry | None = client.get("a")
    revision: nkv.Revision = client.put("a", b"x", if_revision=entry.revision if entry else 0, ttl=1.0)
    keys: list[str] = [listed.key for listed in client.list("*").keys]
    entries: Iterator[nkv.Entry] = client.get_all("*")
    for event in client.subscribe("a"):
        if isinstance(event, nkv.Update):
            value: bytes = event.value
        elif isinstance(event, nkv.Gone):
            reason: nkv.GoneReason = event.reason
        else:
            revision = event.revision
    patterns: tuple[str, ...] = client.subscribe(["a", "b.*"], exact=False).patterns
    changed: nkv.Revision | None = client.update("a", lambda old: None if old is None else old.value + b"x")
    stats: nkv.Stats = client.stats()
    branch: nkv.BranchWatch = client.watch_branch("a")
    texts: dict[str, str] = {key: value.decode() for key, value in branch.items()}
    with client.watch("a") as watch:
        return watch.value


async def other(client: nkv.aio.Client) -> int:
    async with await client.watch_branch("a") as branch:
        size: int = len(branch)
    events: AsyncIterator[nkv.Event] = await client.subscribe("a")
    async for event in events:
        reveal: nkv.Update | nkv.Gone | nkv.Synced = event
    entries: AsyncIterator[nkv.Entry] = client.get_all("*")

    async def change(old: nkv.Entry | None) -> str | None:
        return old.text if old else None

    changed: nkv.Revision | None = await client.update("a", change)
    await client.update("a", lambda old: b"x")
    size += (await client.stats()).keys
    return size + await client.delete("a")


async def wrong(client: nkv.aio.Client) -> None:
    await client.put("a", 1)  # type: ignore[arg-type]
    await client.put("a", b"", if_revision="1")  # type: ignore[arg-type]
    await client.update("a", lambda old: 1)  # type: ignore[arg-type,return-value]


if __name__ == "__main__":
    asyncio.run(other(nkv.aio.Client()))
PROGRAM

if [ -n "${NKV_SERVER:-}" ]; then
    "$NKV_SERVER" --listen "unix:$work/nkv.sock" --persist memory >"$work/server.log" 2>&1 &
    server=$!
fi

for artefact in "$work"/dist/*.whl "$work"/dist/*.tar.gz; do
    rm -rf "$work/user" && "$python" -m venv "$work/user"
    "$work/user/bin/pip" install --quiet --disable-pip-version-check "$artefact"
    cd "$work"
    "$work/user/bin/python" -c 'import nkv, os; p = os.path.dirname(nkv.__file__); assert p.startswith(os.environ["W"]), p
assert os.path.exists(os.path.join(p, "py.typed")); print("installed", nkv.__version__)'
    "$work/tools/bin/mypy" --strict --no-error-summary --python-executable "$work/user/bin/python" user.py
    (cd "$here" && NKV_INSTALLED=1 "$work/user/bin/python" -m unittest -q tests.test_protocol)
    if [ -n "$server" ]; then
        "$work/user/bin/python" "$here/examples/live_config.py" --check "unix:$work/nkv.sock"
    fi
    echo "ok: $(basename "$artefact")"
done
