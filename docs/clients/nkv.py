#!/usr/bin/env python3
"""A client of nkv in the standard library. Its self test: python3 nkv.py HOST PORT"""
import collections, contextlib, json, socket, sys

ENDS = ("unsubscribed", "replaced")  # why a subscription is closed; a key is "deleted" or "expired"


class Nkv:
    """A connection, for one thread. A lost connection, or a call that is interrupted, closes it for good."""

    def __init__(self, host="127.0.0.1", port=4222):
        self.stream = socket.create_connection((host, port)).makefile("rwb")
        self.asked, self.unread = 0, {}  # how many requests were sent; pattern -> what its iterator has yet to return
        self.ask(type="Connect", values="payload")

    def put(self, key, value, **options):
        """Stores bytes and returns the revision. Options: if_revision, ttl_ms."""
        return self.ask(value + b"\n", type="Put", key=key, len=len(value), **options)[0]["revision"]

    def get(self, key):
        """Returns the value, or None; for a wildcard, a list of pairs (key, value)."""
        body, values = self.ask(type="Get", key=key)
        pairs, start = [], 0
        for name, length in zip(body["keys"], body.get("lens", ())):
            pairs.append((name, values[start:start + length]))
            start += length
        return pairs if key.endswith("*") else pairs[0][1] if pairs else None

    def delete(self, key):
        """Returns how many keys were removed."""
        return self.ask(type="Delete", key=key)[0].get("count", 0)

    def subscribe(self, pattern):
        """Returns an iterator of notifications (kind, fields, value), which ends when the subscription does."""
        for other in self.unread:
            shorter, longer = sorted((branch(pattern), branch(other)), key=len)
            if other != pattern and longer[:len(shorter)] == shorter:
                raise ValueError(f"'{pattern}' overlaps '{other}': it needs a connection of its own")
        self.ask(type="Subscribe", key=pattern, snapshot=True)
        self.unread[pattern] = collections.deque()
        return self.notifications(self.unread[pattern])

    def unsubscribe(self, pattern):
        self.ask(type="Unsubscribe", key=pattern)

    def notifications(self, unread):
        kind, body = None, {}
        while kind != "Close" or body["reason"] not in ENDS:
            while not unread:
                with self.closed_on_error():
                    self.keep(*self.receive())
            kind, body, value = unread.popleft()
            yield kind, body, value

    def ask(self, payload=b"", **request):
        """Sends a request and returns the fields of its answer and its payload."""
        with self.closed_on_error():
            self.asked += 1
            self.stream.write(json.dumps(dict(request, id=self.asked)).encode() + b"\n" + payload)
            self.stream.flush()
            kind, body, payload = self.receive()
            while kind != "Hello" and body.get("id") != self.asked:
                self.keep(kind, body, payload)
                kind, body, payload = self.receive()
        if body.get("status", 200) not in (200, 404):
            raise RuntimeError(f"{body['status']}: {body['message']}")
        return body, payload

    def keep(self, kind, body, value):
        """Keeps a notification for its iterator. One that is not known is skipped."""
        if "status" in body:
            raise ConnectionError(f"{body['status']}: {body['message']}")
        if kind == "Update" or kind == "Close" and body.get("reason") in ("deleted", "expired"):
            segments = body["key"].split(".")
            for pattern, unread in self.unread.items():
                if segments[:len(branch(pattern))] == branch(pattern):
                    unread.append((kind, body, value))
        elif kind == "Synced" and body["key"] in self.unread:
            self.unread[body["key"]].append((kind, body, value))
        elif kind == "Close" and body.get("reason") in ENDS and body["key"] in self.unread:
            self.unread.pop(body["key"]).append((kind, body, value))

    def receive(self):
        """Returns the next message: its kind, its fields, its payload."""
        message = json.loads(self.read())
        kind, body = next(iter(message.items()), (None, None)) if isinstance(message, dict) else (message, None)
        body = body if isinstance(body, dict) else {}
        return kind, body, self.read(body["len"] + 1) if "len" in body else b""

    def read(self, length=None):
        """Reads a line, or a payload with its newline; returns it without the newline."""
        data = self.stream.readline() if length is None else self.stream.read(length)
        if not data.endswith(b"\n") or length not in (None, len(data)):
            raise ConnectionError("the server closed the connection")
        return data[:-1]

    @contextlib.contextmanager
    def closed_on_error(self):
        try:
            yield
        except BaseException:  # also an interrupt: the rest of a message would be taken for the next one
            with contextlib.suppress(OSError):
                self.stream.close()
            raise


def branch(pattern):
    """The segments with which every key begins that the pattern covers."""
    return [segment for segment in pattern.split(".") if segment != "*"]


if __name__ == "__main__":
    nkv = Nkv(sys.argv[1], int(sys.argv[2]))
    first = nkv.put("nkv-py.a", b"one\n\xff")
    assert nkv.get("nkv-py.a") == b"one\n\xff" and nkv.get("nkv-py.b") is None

    events = nkv.subscribe("nkv-py")
    second = nkv.put("nkv-py.b", b"")
    assert second > first and nkv.get("nkv-py.*") == [("nkv-py.a", b"one\n\xff"), ("nkv-py.b", b"")]
    assert nkv.delete("nkv-py.*") == 2 and nkv.delete("nkv-py.*") == 0
    nkv.unsubscribe("nkv-py")

    # All of it was kept, in order: a snapshot, what changed since, and the end.
    received = [(kind, body.get("key"), body.get("reason"), value) for kind, body, value in events]
    assert received[:1] == [("Update", "nkv-py.a", None, b"one\n\xff")] and ("Synced", "nkv-py", None, b"") in received
    assert ("Close", "nkv-py.a", "deleted", b"") in received and received[-1] == ("Close", "nkv-py", "unsubscribed", b"")
    print("ok")
