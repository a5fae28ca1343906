#!/usr/bin/env python3
"""A client of nkv in the standard library. Its self test: python3 nkv.py HOST PORT"""
import json, socket, sys


class Nkv:
    def __init__(self, host="127.0.0.1", port=4222):
        self.stream = socket.create_connection((host, port)).makefile("rwb")
        self.ask(type="Connect", values="payload")

    def ask(self, payload=b"", **request):
        self.stream.write(json.dumps(request).encode() + b"\n" + payload)
        self.stream.flush()
        _, body, payload = self.receive()
        if body.get("status", 200) not in (200, 404):
            raise RuntimeError(f"{body['status']}: {body['message']}")
        return body, payload

    def receive(self):
        line = self.stream.readline()
        if not line:
            raise ConnectionError("the server closed the connection")
        message = json.loads(line)
        kind, body = (message, {}) if message == "Hello" else next(iter(message.items()))
        payload = self.stream.read(body["len"] + 1)[:-1] if "len" in body else b""
        return kind, body, payload

    def put(self, key, value):
        return self.ask(value + b"\n", type="Put", key=key, len=len(value))[0]["revision"]

    def get(self, key):
        body, payload = self.ask(type="Get", key=key)
        return payload if body["status"] == 200 else None

    def delete(self, key):
        return self.ask(type="Delete", key=key)[0].get("count", 0)

    def subscribe(self, key):
        self.ask(type="Subscribe", key=key, snapshot=True)
        return iter(self.receive, None)


if __name__ == "__main__":
    host, port = sys.argv[1], int(sys.argv[2])
    nkv, listener = Nkv(host, port), Nkv(host, port)
    first = nkv.put("nkv-py.a", b"one\n\xff")
    assert nkv.get("nkv-py.a") == b"one\n\xff" and nkv.get("nkv-py.b") is None

    events = listener.subscribe("nkv-py")
    kind, body, value = next(events)
    assert (kind, body["key"], body["revision"], value) == ("Update", "nkv-py.a", first, b"one\n\xff")
    assert next(events)[0] == "Synced"

    second = nkv.put("nkv-py.a", b"")
    kind, body, value = next(events)
    assert (kind, body["revision"], value) == ("Update", second, b"")
    assert nkv.delete("nkv-py.*") == 1 and nkv.delete("nkv-py.*") == 0
    kind, body, _ = next(events)
    assert (kind, body["key"], body["reason"]) == ("Close", "nkv-py.a", "deleted")
    print("ok")
