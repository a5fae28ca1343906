"""Hooks of scripts/check-openapi.py, for what the document cannot say."""

import re

import schemathesis

DURATION = re.compile(r"\A([0-9]{1,15}(ms|s|m|h))?\Z")


@schemathesis.hook
def before_call(context, case, kwargs):
    # A watch without `wait` is a stream without an end, and one with it may wait for a minute.
    if case.operation.path == "/v1/watch":
        wait = (case.query or {}).get("wait")
        if wait is None or (isinstance(wait, str) and DURATION.match(wait)):
            case.query = {**(case.query or {}), "wait": "20ms"}
        # Only a key can be meant without what is below it.
        if (case.query or {}).get("exact") is not None and "*" in str(case.query.get("pattern")):
            case.query = {name: value for name, value in case.query.items() if name != "exact"}
    # Only a page has a longest limit; lines have none.
    if case.operation.path == "/v1/kv" and (case.query or {}).get("format") == "ndjson":
        if isinstance(case.query.get("limit"), int) and case.query["limit"] > 10_000:
            case.query = {name: value for name, value in case.query.items() if name != "format"}
    # It makes values of its own for these headers, of which "0" is none that the document allows.
    for name in ("If-Match", "If-None-Match"):
        if (case.headers or {}).get(name) == "0":
            case.headers[name] = '"0"'


@schemathesis.hook
def map_body(context, body):
    return whole(body)


def whole(value):
    """JSON Schema takes 1.0 for an integer, and the door takes digits alone."""
    if isinstance(value, dict):
        return {name: whole(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [whole(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
