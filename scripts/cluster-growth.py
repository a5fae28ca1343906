#!/usr/bin/env python3
"""Prints how the bytes of a cluster grow with nodes and with keys, as tables, and draws docs/cluster-growth.svg.

    cluster-growth.py [FILE]    of what `cargo test -p nkv-cluster --lib growth -- --ignored --nocapture` has printed, or run it

nkv's are counted in a simulated network, with the headers of packets. memberlist's are by arithmetic: at each interval a node gives
its whole state to one other and takes that of it, so it sends two states in each, of keys, values and stamps alone; with more than
32 nodes the interval is longer (memberlist, pushPullScale). Its interval is taken as nkv's default, 1 s, and what it sends beside
the state is left out.
"""
import math
import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STATE_KEYS = 100_000
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 430, 260, 70, 44, 330, 210


def main():
    if sys.argv[1:]:
        with open(sys.argv[1], encoding="utf-8") as file:
            printed = file.read()
    else:
        words = ["cargo", "test", "-p", "nkv-cluster", "--lib", "growth", "--", "--ignored", "--nocapture"]
        printed = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    nodes, keys = rows(printed, "growth_nodes"), rows(printed, "growth_keys")
    state = next(row["state"] for row in keys if row["keys"] == STATE_KEYS)
    for row in nodes:
        row["memberlist"] = round(2 * state / (1 if row["nodes"] <= 32 else math.ceil(math.log2(row["nodes"]) - 5) + 1))
    for row in keys:
        row["memberlist"] = 2 * row["state"]
    print(f"| nodes | an idle node of nkv sends each second | memberlist, with {STATE_KEYS:,} keys |\n|---|---|---|")
    for row in nodes:
        print(f"| {row['nodes']} | {unit(row['idle_bytes_per_s'])} | {unit(row['memberlist'])} |")
    print("\n| keys of two nodes | a second, idle | 1 change | 100 changes | memberlist, each second, whatever changed |\n|---|---|---|---|---|")
    for row in keys:
        cells = [f"{row['keys']:,}", *(unit(row[name]) for name in ("idle_bytes_per_s", "one", "hundred", "memberlist"))]
        print("| " + " | ".join(cells) + " |")
    first = panel("Sent by an idle node each second, by nodes", "nodes",
                  [("nkv", "first", points(nodes, "nodes", "idle_bytes_per_s")),
                   ("memberlist", "second", points(nodes, "nodes", "memberlist"))])
    second = panel("To level two nodes, by keys", "keys",
                   [("1 change", "first", points(keys, "keys", "one")), ("100 changes", "first", points(keys, "keys", "hundred")),
                    ("memberlist", "second", points(keys, "keys", "memberlist"))])
    with open(os.path.join(ROOT, "docs", "performance-growth.svg"), encoding="utf-8") as file:
        style = re.search(r"<style>.*?</style>", file.read(), re.DOTALL).group()
    path = os.path.join(ROOT, "docs", "cluster-growth.svg")
    with open(path, "w", encoding="utf-8") as file:
        file.write(f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{HEIGHT}" viewBox="0 0 {2 * WIDTH} {HEIGHT}">\n'
                   f'{style}\n<g>\n{first}</g>\n<g transform="translate({WIDTH}, 0)">\n{second}</g>\n</svg>\n')
    print(path)


def rows(printed, name):
    found = re.findall(rf"^TEST {name} (.*)$", printed, re.MULTILINE)
    if not found:
        sys.exit(f"no figures of {name}: has the test run to its end?")
    return [{field: int(number) for field, number in (word.split("=") for word in line.split())} for line in found]


def points(table, x, y):
    return [(row[x], row[y]) for row in table]


def unit(length):
    for name, size in (("MB", 1_000_000), ("kB", 1_000)):
        if length >= size:
            return f"{length / size:.{0 if length >= 10 * size else 1}f} {name}"
    return f"{length} B"


def short(number):
    return f"{number // 1_000_000} M" if number >= 1_000_000 else f"{number // 1_000} k" if number >= 1_000 else str(number)


def panel(title, x_name, series):
    """Curves, both axes logarithmic."""
    ys = [y for _, _, line in series for _, y in line]
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    first, last = series[0][2][0][0], series[0][2][-1][0]

    def at(x, y):
        return (LEFT + (RIGHT - LEFT) * math.log(x / first) / math.log(last / first),
                BOTTOM - (BOTTOM - TOP) * (math.log10(y) - low) / (high - low))

    out = [f'<text x="12" y="20" class="title">{title}</text>',
           f'<path class="axis" fill="none" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>']
    for power in range(low, high + 1):
        out.append(f'<text x="{LEFT - 6}" y="{at(first, 10 ** power)[1] + 4:.1f}" class="note" text-anchor="end">{unit(10 ** power)}</text>')
    for x, y in series[0][2]:
        out.append(f'<text x="{at(x, y)[0]:.1f}" y="{BOTTOM + 16}" class="note" text-anchor="middle">{short(x)}</text>')
    out.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 32}" class="note" text-anchor="middle">{x_name}</text>')
    for name, style, line in series:
        places = [at(x, y) for x, y in line]
        out.append(f'<polyline class="{style}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
        out += [f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
        out.append(f'<text x="{places[-1][0] + 8:.1f}" y="{places[-1][1] + 4:.1f}">{name}</text>')
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    main()
