#!/usr/bin/env python3
"""Runs the transcripts of docs/http.md and compares what comes with what is shown: check-http-doc.py NKV_SERVER [DOCUMENT]

- `$ nkv-server FLAGS` ends the server there is, and starts one with these flags and a new data directory. Each address of the
  document stands for a free port.
- Any other `$ COMMAND` is run by bash, with one session for the whole document, so that variables live on. Its stdout is compared.
- `<word>` in what is shown stands for one or more characters of a line.
- Where a status line is shown, of the headers only the shown ones are compared, in any order.
- A last line without an end is shown as one with an end.
"""

import difflib
import pathlib
import re
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent / "http"))
import door  # noqa: E402

LIMIT = 30
END = "--- end of a command ---"
ADDRESS = re.compile(r"127\.0\.0\.1:(8080|9090)")


def examples(text):
    """The commands with the lines that are shown for them."""
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.M | re.S):
        shown = None
        for line in block.splitlines():
            if line.startswith("$ "):
                if shown is not None:
                    yield command, shown
                command, shown = line[2:], []
            elif shown is None:
                sys.exit(f"a block begins with no command: {line}")
            else:
                shown.append(line)
        if shown is not None:
            yield command, shown


def is_as_shown(line, shown):
    parts = re.split(r"<\w+>", shown)
    return re.fullmatch(".+".join(re.escape(part) for part in parts), line) is not None


def differs(lines, shown):
    """The lines as they are to be compared, or None where they are as shown."""
    lines = without_other_headers(lines, shown)
    if len(lines) == len(shown) and all(map(is_as_shown, lines, shown)):
        return None
    # What is as shown makes no line of the difference.
    alike = {line: wanted for wanted in shown for line in lines if is_as_shown(line, wanted)}
    return [alike.get(line, line) for line in lines]


def without_other_headers(lines, shown):
    if not (lines and shown and lines[0].startswith("HTTP/") and shown[0].startswith("HTTP/") and "" in lines):
        return lines
    end, shown_end = lines.index(""), shown.index("") if "" in shown else len(shown)
    headers, kept = lines[1:end], []
    for wanted in shown[1:shown_end]:
        found = next((header for header in headers if is_as_shown(header, wanted)), None)
        name = wanted.split(":")[0] + ":"
        kept.append(found or next((header for header in headers if header.startswith(name)), f"(no {name[:-1]})"))
    return [lines[0], *kept, *lines[end:]]


class Shell:
    """One bash for all commands."""

    def __enter__(self):
        self.bash = subprocess.Popen(["bash"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        return self

    def run(self, command):
        self.bash.stdin.write(f"{command}\nprintf '\\n%s\\n' '{END}'\n".encode())
        self.bash.stdin.flush()
        lines = []
        for line in self.bash.stdout:
            line = line.decode(errors="replace").rstrip("\n").rstrip("\r")
            if line == END:
                break
            lines.append(line.rstrip())
        else:
            sys.exit(f"bash ended at: {command}")
        # The newline before the mark: the end of a last line without one, or an empty line too many.
        return lines[:-1] if lines and lines[-1] == "" else lines

    def __exit__(self, *_):
        self.bash.stdin.close()
        self.bash.wait(timeout=LIMIT)


def main():
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    document = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else door.ROOT / "docs/http.md")
    server, count, wrong = None, 0, 0
    try:
        with Shell() as shell:
            for command, shown in examples(document.read_text(encoding="utf-8")):
                if command.startswith("nkv-server "):
                    if server:
                        server.__exit__()
                    flags = command.split()[1:]
                    others = [flag for at, flag in enumerate(flags) if not is_address(flags, at)]
                    server = door.Server(sys.argv[1], *others, on_disk=True)
                    server.__enter__()
                    continue
                ports = {"8080": server.http, "9090": server.metrics}
                back = {address: f"127.0.0.1:{port}" for port, address in ports.items()}
                lines = shell.run(ADDRESS.sub(lambda found: ports[found[1]], command))
                for address, shown_address in back.items():
                    lines = [line.replace(address, shown_address) for line in lines]
                count += 1
                found = differs(lines, shown)
                if found is not None:
                    wrong += 1
                    print(f"$ {command}")
                    print("\n".join(difflib.unified_diff(shown, found, str(document), "what came", lineterm="", n=1)))
    finally:
        if server:
            server.__exit__()
    print(f"{document}: {count} commands, {wrong} of them not as shown")
    return 1 if wrong or not count else 0


def is_address(flags, at):
    """Whether it is a flag for an address, or its value: those are given by the check itself."""
    return flags[at] in ("--http", "--metrics") or (at > 0 and flags[at - 1] in ("--http", "--metrics"))


if __name__ == "__main__":
    sys.exit(main())
