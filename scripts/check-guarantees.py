#!/usr/bin/env python3
"""Checks that every test which docs/guarantees.md names exists, and that every guarantee names one."""
import pathlib
import re

root = pathlib.Path(__file__).resolve().parent.parent
text = (root / "docs/guarantees.md").read_text()
wrong = []
for section in re.split(r"^(?=\| \*\*G\d+\.)", text, flags=re.MULTILINE)[1:]:
    if "::" not in section:
        wrong.append(f"no test: {section.splitlines()[0]}")
named = re.findall(r"`(nkv-[a-z-]+/[\w/]+\.rs)::(\w+)`", text)
for file, test in named:
    path = root / "crates" / file
    if not path.is_file() or not re.search(rf"\bfn {test}\b", path.read_text()):
        wrong.append(f"no such test: {file}::{test}")
if wrong or not named:
    raise SystemExit("docs/guarantees.md: " + "; ".join(wrong or ["no tests found"]))
print(f"{len(named)} tests named, all there")
