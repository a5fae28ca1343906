#!/usr/bin/env python3
"""Breaks the code on purpose, one fault at a time, and demands that the test which guards against it turns red.

    mutants.py [--fast] [--share N] [--check] [--list] [NAME...]

The faults are in mutants.toml, each with the guarantee of docs/guarantees.md that it breaks. They are put into a copy of
the tree under the target directory; the checkout is never touched. Each test is seen green on the unchanged copy first.

    --fast    only those marked `fast`, for every change
    --share   only every Nth of them, another Nth for each commit
    --check   only whether each text to be replaced is found exactly once, and each guarantee has a mutant
    --list    name, guarantee and fault of each

A mutant is killed when its test fails, or does not end in time. One that does not compile, or whose text is not found, is
an error. Mutants that need strace and a file system to mount are passed over where these cannot be had, unless
NKV_FAULTS=1.
"""
import argparse
import contextlib
import fcntl
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
try:
    import tomllib
except ImportError:
    sys.exit("mutants.py needs Python 3.11 or newer, for tomllib")

ROOT = pathlib.Path(__file__).resolve().parent.parent
# A test of a mutant that takes longer hangs; on an idle machine the slowest takes a tenth of that.
LIMIT_S = 120


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--share", type=int, default=1)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    mutants = tomllib.loads((ROOT / "scripts/mutants.toml").read_text())["mutant"]
    names = [mutant["name"] for mutant in mutants]
    unknown = set(args.names) - set(names)
    if unknown or len(set(names)) < len(names):
        sys.exit(f"unknown mutants: {unknown}" if unknown else "two mutants have one name")
    if args.names:
        mutants = [mutant for mutant in mutants if mutant["name"] in args.names]
    elif args.fast:
        mutants = [mutant for mutant in mutants if mutant.get("fast")]
    if args.share > 1:
        count = subprocess.run(["git", "rev-list", "--count", "HEAD"], cwd=ROOT, capture_output=True, check=True, text=True)
        mutants = mutants[int(count.stdout) % args.share :: args.share]
    if args.list:
        for mutant in mutants:
            print(f"{mutant['breaks']:4} {'fast' if mutant.get('fast') else '    '} {mutant['name']}")
        return
    if args.check:
        return check(mutants, all_of_them=not args.names and not args.fast and args.share == 1)
    if not mutants_are_killed(mutants):
        sys.exit(1)


def check(mutants, all_of_them):
    wrong = [f"{m['name']}: {reason}" for m in mutants for _, reason in [mutate(ROOT, m)] if reason]
    guarantees = set(re.findall(r"^\| \*\*(G\d+)\.", (ROOT / "docs/guarantees.md").read_text(), flags=re.MULTILINE))
    broken = {mutant["breaks"] for mutant in mutants}
    wrong += [f"there is no guarantee {name}" for name in sorted(broken - guarantees)]
    wrong += [f"no mutant breaks {name}" for name in sorted(guarantees - broken) if all_of_them]
    if wrong:
        sys.exit("scripts/mutants.toml: " + "; ".join(wrong))
    print(f"{len(mutants)} mutants of {len(broken)} guarantees, all texts found once")


def mutants_are_killed(mutants):
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target").resolve() / "mutants"
    target.mkdir(parents=True, exist_ok=True)
    # One run at a time: they share the tree and what was compiled.
    lock = open(target / "lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    tree = target / "tree"
    copy(tree)
    killed, start, green = 0, time.monotonic(), {}
    # What was changed last is compiled again: keep to one file as long as possible.
    mutants = sorted(mutants, key=lambda mutant: (mutant.get("loom", False), mutant["file"]))
    if not can_make_faults():
        passed_over = [mutant["name"] for mutant in mutants if mutant.get("faults")]
        mutants = [mutant for mutant in mutants if not mutant.get("faults")]
        if passed_over:
            print(f"SKIPPED: no strace, or nothing can be mounted, for {', '.join(passed_over)}")
    for mutant in mutants:
        key = (mutant["test"], mutant.get("loom", False))
        if key not in green:
            green[key] = run(tree, target, mutant)
            print(f"unchanged {green[key][0]:6} {green[key][1]:5.1f} s  {mutant['test']}", flush=True)
    for mutant in mutants:
        if green[mutant["test"], mutant.get("loom", False)][0] != "green":
            verdict, took = "ERROR: its test is not green without it", 0
        else:
            verdict, took = judge(tree, target, mutant)
        killed += verdict.startswith("killed")
        print(f"{mutant['breaks']:4} {mutant['name']:52} {took:5.1f} s  {verdict}", flush=True)
    print(f"TEST mutants killed={killed} of={len(mutants)} seconds={time.monotonic() - start:.0f}")
    return killed == len(mutants)


def can_make_faults():
    if os.environ.get("NKV_FAULTS") == "1":
        return True
    works = lambda *words: shutil.which(words[0]) and subprocess.run(words, stderr=subprocess.DEVNULL).returncode == 0
    with tempfile.TemporaryDirectory() as directory:
        return (works("strace", "-f", "-o", "/dev/null", "true")
                and works("mount", "-t", "tmpfs", "-o", "size=1m", "nkv", directory) and works("umount", directory))


def copy(tree):
    """Brings the tree to the state of the checkout; files that are equal keep their times, so that cargo builds little."""
    listed = subprocess.run(["git", "ls-files", "-zco", "--exclude-standard"], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    names = {name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()}
    for path in [path for path in tree.rglob("*") if path.is_file() and str(path.relative_to(tree)) not in names]:
        path.unlink()
    for name in names:
        source, copied = ROOT / name, tree / name
        if not copied.is_file() or copied.read_bytes() != source.read_bytes():
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copied)


def mutate(root, mutant):
    """The changed text, or why there is none."""
    path = root / mutant["file"]
    if not path.is_file():
        return None, f"no file {mutant['file']}"
    text = path.read_text()
    as_list = lambda value: value if isinstance(value, list) else [value]
    for old, new in zip(as_list(mutant["old"]), as_list(mutant["new"]), strict=True):
        count = text.count(old)
        if count != 1:
            return None, f"a text is found {count} times in {mutant['file']}: {old.strip().splitlines()[0]}"
        text = text.replace(old, new)
    return text, None


def judge(tree, target, mutant):
    path = tree / mutant["file"]
    original = path.read_text()
    changed, reason = mutate(tree, mutant)
    if reason:
        return f"ERROR: {reason}", 0
    try:
        path.write_text(changed)
        color, took, detail = run(tree, target, mutant)
    finally:
        path.write_text(original)
    return {"green": "ALIVE", "red": f"killed: {detail}", "hangs": f"killed: not done within {LIMIT_S} s"}.get(
        color, f"ERROR: {detail}"), took


def run(tree, target, mutant):
    """Builds and runs a test: green, red, hangs or error; how long it took; what to say of it."""
    start = time.monotonic()
    words = mutant["test"].split()
    env = dict(os.environ, CARGO_INCREMENTAL="0", CARGO_PROFILE_DEV_DEBUG="0", CARGO_TERM_COLOR="never", NKV_FAULTS="1",
               CARGO_TARGET_DIR=str(target / "build"), RUSTFLAGS="--cap-lints=warn")
    if mutant.get("loom"):
        words.append("--release")
        env.update(CARGO_TARGET_DIR=str(target / "loom"), RUSTFLAGS="--cap-lints=warn --cfg loom", LOOM_MAX_PREEMPTIONS="2")
    command = ["cargo", "test", "-q", "--locked", *words]
    built = subprocess.run([*command[:2], "--no-run", *command[2:]], cwd=tree, env=env, capture_output=True, text=True)
    took = lambda: time.monotonic() - start
    if built.returncode:
        errors = [line for line in built.stderr.splitlines() if line.startswith("error")]
        return "error", took(), f"does not compile: {errors[0] if errors else built.stderr[-300:]}"
    # A group of its own: what the test started ends with it.
    child = subprocess.Popen(command, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             start_new_session=True, errors="replace")
    try:
        said, _ = child.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return "hangs", took(), ""
    finally:
        # Also after the end of the test: one that fails may leave a server behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if child.returncode == 0:
        ran = sum(int(count) for count in re.findall(r"test result: ok\. (\d+) passed", said))
        return ("green", took(), "") if ran else ("error", took(), f"no test is called {mutant['test']}")
    failed = re.findall(r"^    ([\w:]+)$", said, flags=re.MULTILINE)
    return "red", took(), failed[-1] if failed else said.strip().splitlines()[-1]


main()
