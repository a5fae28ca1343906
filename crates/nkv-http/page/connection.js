// Speaks docs/protocol.md over the WebSocket, and keeps one subscription alive through every kind of lost connection.
//
// States: "connecting", "connected" (the snapshot is coming), "synced", "stale" (lost, or silent for too long).

import { encode } from "./format.js";

const SILENT_MS = 10_000; // without a due answer for this long: no longer synced
const DEAD_MS = 20_000; // for this long: dial again
const DEAD_MS_MAX = 160_000; // a large value on a slow line arrives as one frame, and shows nothing until it is whole
const PAGE_KEYS = 2000;
const PAGE_BYTES = 256 * 1024;
const PAUSE_MS = 500;
const PAUSE_MS_MAX = 30_000;
const PROVEN_MS = 5_000;

const decoder = new TextDecoder();

export class Connection {
  /** `handler` has: state(), begin(), update(key, revision, bytes, skipped, known), close(key, revision, skipped, reason), synced(). */
  constructor(handler) {
    this.handler = handler;
    this.pattern = "*";
    this.state = "connecting";
    this.note = "";
    this.epoch = ""; // that of the state which the page shows
    this.info = {};
    this.failures = 0;
    this.deadMs = DEAD_MS;
    this.run = 0; // grows with whatever ends the loading of a state
    this.nextId = 0;
    this.pending = new Map();
    setInterval(() => this.watch(), 1000);
    addEventListener("online", () => this.socket || this.dial());
    // A page with an open socket cannot enter the back/forward cache; one that comes back from it dials again.
    addEventListener("pagehide", () => this.drop("the page was left", false));
    addEventListener("pageshow", (event) => event.persisted && this.dial());
    document.addEventListener("visibilitychange", () => document.hidden || this.watch());
    this.dial();
  }

  get open() {
    return this.socket?.readyState === WebSocket.OPEN;
  }

  dial() {
    this.drop("", false);
    const scheme = location.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(`${scheme}//${location.host}/v1/ws`);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    this.dialled = performance.now();
    this.opened = 0;
    socket.onopen = () => this.greet();
    socket.onmessage = (event) => this.receive(event.data);
    socket.onclose = () => this.drop(this.refusal || (this.opened ? "connection lost" : "no connection"), true);
  }

  /** Forgets the socket. A silent one would take long to close, so nothing waits for that. */
  drop(note, again) {
    clearTimeout(this.timer);
    const socket = this.socket;
    this.socket = null;
    this.refusal = "";
    this.phase = "";
    this.run += 1;
    if (socket) {
      socket.onopen = socket.onmessage = socket.onclose = null;
      socket.close();
      if (this.opened && performance.now() - this.opened > PROVEN_MS) this.failures = 0;
    }
    const waiting = [...this.pending.values()];
    this.pending.clear();
    for (const { reject } of waiting) reject(new Error("The connection ended before the answer. The write may or may not have been done."));
    if (note) this.setState(this.epoch ? "stale" : "connecting", note);
    if (!again) return;
    const longest = Math.min(PAUSE_MS_MAX, PAUSE_MS * 2 ** this.failures);
    this.failures += 1;
    this.timer = setTimeout(() => this.dial(), longest * (0.5 + Math.random() / 2));
  }

  async greet() {
    this.opened = performance.now();
    try {
      const features = ["reset", "names", "ahead", "alive"];
      this.info = await this.request({ type: "Connect", values: "payload", name: "page", features });
      this.setState("connected", "");
      await this.subscribe();
    } catch (error) {
      if (this.open) this.drop(error.message, true);
    }
  }

  get live() {
    return this.open && this.phase === "live";
  }

  /** Subscribes to the pattern. What comes of an older subscription meanwhile is passed over. */
  async subscribe() {
    const run = (this.run += 1);
    this.phase = "";
    this.setState("connected", "");
    this.subscribed = this.pattern;
    await this.request({ type: "Subscribe", key: this.pattern });
    await this.load(() => run !== this.run);
  }

  /**
   * Reads the present state in pages, while changes come already. A snapshot of the subscription would do the same with
   * one frame for each key, which takes a browser ten times as long. Revisions show which of two values is the newer.
   */
  async load(ended) {
    const { pattern } = this;
    let limit = 1; // grows as far as the values are small, so that large ones on a slow line come one by one
    for (const key of /(^|\.)\*$/.test(pattern) ? [pattern] : [pattern, `${pattern}.*`]) {
      for (let after = ""; after !== undefined && !ended();) {
        const page = await this.request({ type: "Get", key, limit, after, ahead: true });
        if (ended()) return;
        if (page.status === 413 && limit > 1) {
          limit = Math.ceil(limit / 8);
          continue;
        }
        if (!page.keys) throw new Error(page.message);
        let at = 0;
        page.keys.forEach((name, index) => {
          const end = at + page.lens[index];
          this.handler.update(name, page.revisions[index], page.payload.subarray(at, end), 0, true);
          at = end;
        });
        if (at < PAGE_BYTES / 4) limit = Math.min(PAGE_KEYS, limit * 4);
        else if (at > PAGE_BYTES) limit = Math.ceil(limit / 4);
        after = page.more ? page.keys.at(-1) : undefined;
      }
    }
    if (!ended()) this.endSnapshot(this.info.epoch);
  }

  /** Changes the pattern, and resolves when the server has taken it. */
  async select(pattern) {
    const old = this.subscribed;
    this.pattern = pattern;
    if (!this.open || !old) return;
    this.phase = "";
    this.request({ type: "Unsubscribe", key: old }).catch(() => {});
    await this.subscribe();
  }

  /** Ends the subscription and stays connected. */
  stop(note) {
    this.request({ type: "Unsubscribe", key: this.subscribed }).catch(() => {});
    this.phase = "";
    this.run += 1;
    this.setState("stale", note);
  }

  /** Sends a request and resolves with the answer, whatever its status but that of a refused Subscribe or Connect. */
  request(message, payload) {
    if (!this.open) return Promise.reject(new Error("Not connected. Nothing was sent."));
    const id = String((this.nextId += 1));
    const line = JSON.stringify({ ...message, id, ...(payload && { len: payload.length }) });
    if (payload) {
      const head = encode(`${line}\n`);
      const frame = new Uint8Array(head.length + payload.length + 1);
      frame.set(head);
      frame.set(payload, head.length);
      frame[frame.length - 1] = 10;
      this.socket.send(frame);
    } else {
      this.socket.send(line);
    }
    if (!this.pending.size) this.quiet = performance.now();
    return new Promise((resolve, reject) => this.pending.set(id, { type: message.type, resolve, reject }));
  }

  receive(data) {
    this.quiet = performance.now();
    let message;
    let payload = null;
    if (typeof data === "string") {
      message = JSON.parse(data);
    } else {
      const bytes = new Uint8Array(data);
      const end = bytes.indexOf(10);
      message = JSON.parse(decoder.decode(end < 0 ? bytes : bytes.subarray(0, end)));
      payload = bytes.subarray(end + 1);
    }
    if (this.state === "stale" && this.phase) this.setState(this.phase === "live" ? "synced" : "connected", "");
    if (message === "Hello") {
      const first = [...this.pending].find(([, { type }]) => type === "Subscribe");
      if (first) this.settle(first[0], {});
      this.beginSnapshot("loading");
      return;
    }
    const [kind, body] = typeof message === "object" ? Object.entries(message)[0] ?? [] : [];
    if (!body) return;
    if (payload) payload = payload.subarray(0, body.len ?? 0);
    switch (kind) {
      case "Update":
        if (this.phase) this.handler.update(body.key, body.revision, payload ?? new Uint8Array(), body.skipped, this.phase === "reset");
        break;
      case "Close":
        if (this.phase && "revision" in body) this.handler.close(body.key, body.revision, body.skipped, body.reason);
        break;
      case "Reset":
        if (!this.phase || body.key !== this.subscribed) break;
        this.run += 1;
        this.beginSnapshot("reset");
        break;
      case "Synced":
        if (this.phase === "reset" && body.key === this.subscribed) this.endSnapshot(body.epoch);
        break;
      default:
        if (body.id === "") this.refusal = body.message;
        else this.settle(String(body.id), { ...body, payload });
    }
  }

  beginSnapshot(phase) {
    this.phase = phase;
    this.setState("connected", "");
    this.handler.begin();
  }

  endSnapshot(epoch) {
    this.phase = "live";
    this.epoch = epoch;
    this.failures = 0;
    this.deadMs = DEAD_MS;
    this.handler.synced();
    this.setState("synced", "");
  }

  settle(id, answer) {
    const waiting = this.pending.get(id);
    this.pending.delete(id);
    const must = waiting?.type === "Subscribe" || waiting?.type === "Connect";
    if (must && answer.status >= 400) waiting.reject(new Error(answer.message));
    else waiting?.resolve(answer);
  }

  /** Notices silence. Stats are asked for each second, so an answer is always due. */
  watch() {
    if (!this.socket) return;
    const now = performance.now();
    const silent = this.opened ? (this.pending.size ? now - this.quiet : 0) : now - this.dialled;
    if (silent > (this.opened ? this.deadMs : SILENT_MS)) {
      if (this.phase !== "live") this.deadMs = Math.min(DEAD_MS_MAX, this.deadMs * 2);
      this.drop("the server is silent", true);
    } else if (silent > SILENT_MS) {
      this.setState("stale", "the server is silent");
    }
  }

  setState(state, note) {
    if (state === this.state && note === this.note) return;
    if (state === "stale" && this.state !== "stale") this.staleSince = performance.now();
    this.state = state;
    this.note = note;
    this.handler.state();
  }
}
