#!/usr/bin/env python3
"""Follows keys over HTTP, and misses nothing: server-sent events with resume, in the standard library.

    python3 examples/http/watch.py http://127.0.0.1:8080 lamp    prints each change of `lamp` and all below it
    python3 examples/http/watch.py --self-check NKV_SERVER       starts a server, cuts the stream, and asserts what comes
"""

import http.client, json, subprocess, sys, tempfile, time, urllib.error, urllib.parse, urllib.request  # noqa: E401

SILENCE_MAX = 45  # the server gives a sign of life every 15 s


class Watch:
    """A branch as a map that is always current. `events()` never ends: it comes back when the stream breaks."""

    def __init__(self, url, pattern):
        self.url = f"{url}/v1/watch?pattern={urllib.parse.quote(pattern)}&name=watch.py"
        self.values, self.last_id, self.retry, self.stream = {}, None, 1.0, None

    def events(self):
        """Yields (event, data), after the map has it."""
        while True:
            resumed = {"Last-Event-ID": self.last_id} if self.last_id else {}
            try:
                with urllib.request.urlopen(urllib.request.Request(self.url, headers=resumed), timeout=SILENCE_MAX) as self.stream:
                    for event, data in self.blocks():
                        self.apply(event, data)
                        yield event, data
            except urllib.error.HTTPError as error:
                # Asked again, it would refuse again.
                if error.code < 500 and error.code != 429:
                    raise
            except (OSError, http.client.HTTPException, AttributeError, ValueError):
                pass  # the stream broke, or was closed here
            time.sleep(self.retry)

    def blocks(self):
        """A block of lines up to an empty one is an event, or only an id."""
        event, data, last_id = None, "", None
        for line in self.stream:
            name, _, value = line.decode().rstrip("\n").partition(":")
            value = value.removeprefix(" ")
            if name == "id":
                last_id = value
            elif name == "retry":
                self.retry = int(value) / 1000
            elif name == "event":
                event = value
            elif name == "data":
                data += value
            elif line == b"\n":
                # A block that was cut before its end says nothing.
                self.last_id = last_id or self.last_id
                if event:
                    yield event, json.loads(data)
                event, data, last_id = None, "", None

    def apply(self, event, data):
        if event == "reset":
            self.values.clear()
        elif event == "put":
            self.values[data["key"]] = data.get("value", data.get("value_base64"))
        elif event == "delete":
            self.values.pop(data["key"], None)


def self_check(program):
    def put(key, value):
        urllib.request.urlopen(urllib.request.Request(f"{url}/v1/kv/{key}", value.encode(), method="PUT")).close()

    def to_synced():
        seen = []
        for event, data in events:
            if event == "synced":
                return seen
            seen.append((event, data.get("key"), data.get("reason")))

    log = tempfile.TemporaryFile("w+")
    server = subprocess.Popen([program, "--persist", "memory", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"], stderr=log, env={"NO_COLOR": "1"})
    try:
        text = ""
        while "serving HTTP at " not in text and server.poll() is None:
            time.sleep(0.05)
            log.seek(0)
            text = log.read()
        url = "http://" + text.split("serving HTTP at ")[1].split()[0]
        put("lamp.kitchen", "on")
        put("lamp.hall", "off")
        watch = Watch(url, "lamp")
        watch.retry, events = 0.1, watch.events()
        assert to_synced() == [("put", "lamp.hall", None), ("put", "lamp.kitchen", None)]
        put("lamp.hall", "on")
        event, data = next(events)
        assert (event, data["value"], data["skipped"]) == ("put", "on", 0)

        # The connection is lost, and things change meanwhile.
        watch.stream.close()
        put("lamp.study", "on")
        urllib.request.urlopen(urllib.request.Request(f"{url}/v1/kv/lamp.kitchen", method="DELETE")).close()
        assert to_synced() == [("put", "lamp.study", None), ("delete", "lamp.kitchen", "missed")], "only what was missed"
        assert watch.values == {"lamp.hall": "on", "lamp.study": "on"}

        # An id of another life of the data: what is held says nothing any more.
        watch.last_id = "0" * 32 + "-7"
        watch.stream.close()
        assert to_synced() == [("reset", None, None), ("put", "lamp.hall", None), ("put", "lamp.study", None)]
        assert watch.values == {"lamp.hall": "on", "lamp.study": "on"}
    finally:
        server.terminate()
        server.wait(10)
    print("watch.py: resumed without a gap and without repeats")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    if sys.argv[1] == "--self-check":
        self_check(sys.argv[2])
    else:
        for event, data in Watch(sys.argv[1], sys.argv[2]).events():
            print(event, json.dumps(data, ensure_ascii=False), flush=True)
