#!/usr/bin/env python3
"""Copies the golden transcripts into docs/protocol.md, each into the block under the heading that names its file.

A test of nkv-protocol compares the two; this brings them together again after a transcript was changed on purpose.
"""
import pathlib
import re

root = pathlib.Path(__file__).resolve().parent.parent
document = root / "docs/protocol.md"
text = document.read_text()
for transcript in sorted((root / "crates/nkv-protocol/tests/golden").glob("*.txt")):
    heading = re.escape(f"### {transcript.name}")
    block = re.compile(rf"({heading}\n\n```text\n).*?(^```$)", re.DOTALL | re.MULTILINE)
    text, count = block.subn(lambda found: found[1] + transcript.read_text() + found[2], text)
    if count != 1:
        raise SystemExit(f"{document} has {count} blocks under the heading '### {transcript.name}', not 1")
document.write_text(text)
