#!/usr/bin/env python3
"""Parses /metrics as OpenMetrics: check-metrics.py NKV_SERVER

Starts the server, writes, watches and asks, and then checks of `/metrics`, on the door and on `--metrics`:

- a parser of OpenMetrics (prometheus_client, pinned) accepts it;
- no label holds a key, the name of a client or an address, and every label is one of LABELS;
- every metric that packaging/grafana/nkv.json asks for is there, with the labels that it asks for;
- docs/http.md lists these metrics and no others.

The parser is in the venv of check-openapi.py. Without a package registry this says so and passes, except in CI (CI=true).
"""

import json
import os
import pathlib
import re
import sys
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).parent / "http"))
import door  # noqa: E402

LABELS = {"version", "durability", "door", "operation", "outcome", "code", "route", "le"}
KEY, CLIENT = "metrics.secret-key", "secret-client"
# What Prometheus itself adds to each sample.
ADDED = {"job", "instance"}


def fetch(url, method="GET", body=None):
    with urllib.request.urlopen(urllib.request.Request(url, data=body, method=method), timeout=10) as answer:
        return answer.headers, answer.read()


def parse(text):
    from prometheus_client.openmetrics.parser import text_string_to_metric_families

    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample.labels)
    return samples


def check_labels(samples):
    for name, all_labels in samples.items():
        for labels in all_labels:
            unknown = set(labels) - LABELS
            if unknown:
                yield f"{name} has the label {', '.join(sorted(unknown))}"
            for label, value in labels.items():
                if any(part in value for part in (KEY, CLIENT, "127.0.0.1")):
                    yield f"{name} holds a key or a client: {label}={value}"


def check_dashboard(samples):
    dashboard = json.loads((door.ROOT / "packaging/grafana/nkv.json").read_text(encoding="utf-8"))
    targets = [target for panel in dashboard["panels"] for target in panel.get("targets", ())]
    texts = [target["expr"] for target in targets]
    texts += [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable]
    if len(texts) < 20:
        yield "the dashboard asks for next to nothing"
    for text in texts:
        names = re.findall(r"\bnkv_\w+", text)
        yield from (f"the dashboard names {name}, which is not there" for name in names if name not in samples)
        known = {label for name in names for labels in samples.get(name, ()) for label in labels} | ADDED
        asked = re.findall(r"(\w+)\s*!?=~?\s*\"", text)
        asked += [label.strip() for group in re.findall(r"\bby \(([^)]*)\)", text) for label in group.split(",")]
        yield from (f"the dashboard asks for the label {label}, which is not there: {text}" for label in asked if label not in known)
    for target in targets:
        known = {label for name in re.findall(r"\bnkv_\w+", target["expr"]) for labels in samples.get(name, ()) for label in labels}
        for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
            if label not in known | ADDED:
                yield f"a legend names the label {label}, which is not there"


def check_document(samples):
    text = (door.ROOT / "docs/http.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`(nkv_\w+)`", text))
    there = {re.sub(r"_(bucket|sum|count)$", "", name) for name in samples}
    yield from (f"docs/http.md names {name}, which is not there" for name in sorted(listed - there))
    yield from (f"docs/http.md does not name {name}" for name in sorted(there - listed))


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        import prometheus_client  # noqa: F401
    except ImportError:
        programs = door.venv()
        if programs is None:
            return 0
        os.execv(programs / "python", [programs / "python", *sys.argv])
    wrong = []
    with door.Server(sys.argv[1], on_disk=True) as server:
        for n in range(20):
            fetch(f"{server.url}/v1/kv/{KEY}.{n}?ttl=1h", "PUT", b"x" * 100)
        fetch(f"{server.url}/v1/kv?pattern={KEY}.*")
        fetch(f"{server.url}/v1/watch?pattern={KEY}&name={CLIENT}&wait=1ms")
        with urllib.request.urlopen(f"{server.url}/v1/watch?pattern={KEY}&name={CLIENT}", timeout=10) as watch:
            watch.readline()
            for where in (server.url, f"http://{server.metrics}"):
                headers, body = fetch(f"{where}/metrics")
                if not headers["content-type"].startswith("application/openmetrics-text; version=1.0.0"):
                    wrong.append(f"content type {headers['content-type']}")
                samples = parse(body.decode())
                wrong += check_labels(samples)
        wrong += check_dashboard(samples)
        wrong += check_document(samples)
    print("\n".join(sorted(set(wrong))) or f"{len(samples)} kinds of samples, all as the dashboard and the reference have them")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
