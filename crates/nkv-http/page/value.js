// Shows the chosen key: its value in three forms, what is known of it, and the subscribers that a change would notify.

import { CLIENTS, fillTable, ofClient } from "./figures.js";
import { decode, duration, hexDump, number, prettyJson, show, size } from "./format.js";

const SHOWN = 64 * 1024;
const PRETTY = 512 * 1024;
const DRAW_MS = 80;
const FORMS = ["text", "json", "hex"];

export class ValuePane {
  constructor(connection, store, editor, part) {
    Object.assign(this, { connection, store, editor, part, key: null });
    this.tabs = FORMS.map((form) => part(`form-${form}`));
    this.tabs.forEach((tab, at) => {
      tab.addEventListener("click", () => this.choose(FORMS[at]));
      tab.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: 2 }[event.key];
        if (!step) return;
        this.choose(FORMS[(at + step) % 3]);
        this.tabs[(at + step) % 3].focus();
      });
    });
    part("edit").addEventListener("click", () => this.edit());
    part("delete").addEventListener("click", () => editor.askDelete(this.key, this.node.revision, this.bytes));
    part("download").addEventListener("click", () => this.download());
    this.draw();
  }

  get node() {
    const node = this.key === null ? undefined : this.store.find(this.key);
    return node?.key === this.key ? node : undefined;
  }

  select(key) {
    if (key === this.key) return;
    Object.assign(this, { key, bytes: null, revision: 0, gone: "", form: null, ttl: null, ttlRevision: 0 });
    fillTable(this.part("watchers"), []);
    clearTimeout(this.loading);
    this.loading = setTimeout(() => this.load(), DRAW_MS);
    this.draw();
  }

  /** Fetches the whole value; the store keeps only its beginning. */
  async load() {
    const { key, node } = this;
    this.trace();
    if (!node?.revision || this.bytes || this.fetching === key) return;
    this.fetching = key;
    const present = await this.editor.fetch(key).catch(() => null);
    this.fetching = null;
    if (key !== this.key || !present?.revision || present.revision < this.revision) return;
    this.take(present.bytes, present.revision);
  }

  take(bytes, revision) {
    this.bytes = bytes;
    this.revision = revision;
    this.gone = "";
    this.draw();
  }

  update(key, revision, bytes) {
    if (key === this.key) this.take(bytes.slice(), revision);
  }

  remove(key, reason) {
    if (key !== this.key) return;
    this.gone = reason;
    this.draw();
  }

  draw() {
    this.timer ??= setTimeout(() => requestAnimationFrame(() => {
      this.timer = null;
      this.fill();
    }), DRAW_MS);
  }

  fill() {
    const { part, key, node, bytes } = this;
    show(part("value-key"), key ?? "No key chosen");
    const held = Boolean(node?.revision);
    part("value-facts").hidden = part("value-forms").hidden = key === null || !(held || bytes);
    part("edit").disabled = key === null || (held && !bytes);
    part("edit").textContent = this.editor.hasDraft(key) ? "Resume edit" : held ? "Edit" : "Put";
    part("delete").disabled = !held || !bytes;
    part("download").disabled = !bytes;
    show(part("fact-revision"), held ? number(node.revision) : "gone");
    show(part("fact-size"), bytes ? `${size(bytes.length)}${bytes.length > 1023 ? ` (${number(bytes.length)} B)` : ""}` : size(node?.size ?? 0));
    this.fillTimes();
    let note = "";
    if (key === null) note = "Choose a key in the tree, with the mouse or the arrow keys.";
    else if (this.gone) note = `${this.gone}. The last value that this page saw is kept here.`;
    else if (!node) note = "This key is not there.";
    else if (!held) note = `No value of its own; ${number(node.keys)} keys below.`;
    else if (!bytes) note = this.connection.open ? "Loading…" : "Not connected: only the beginning is here.";
    this.fillBody(note, bytes ?? null, held && !bytes ? node.head : "");
  }

  fillBody(note, bytes, head) {
    const { part } = this;
    if (bytes !== this.decoded) {
      this.decoded = bytes;
      this.text = bytes && decode(bytes);
      this.json = this.text && bytes.length <= PRETTY ? prettyJson(this.text) : null;
    }
    const form = this.form ?? (this.json && /^\s*[[{]/.test(this.text) ? "json" : this.text === null && bytes ? "hex" : "text");
    this.tabs.forEach((tab, at) => {
      tab.setAttribute("aria-selected", FORMS[at] === form);
      tab.tabIndex = FORMS[at] === form ? 0 : -1;
    });
    let body = head;
    let whole = true;
    if (bytes && form === "hex") {
      body = hexDump(bytes.subarray(0, SHOWN / 4));
      whole = bytes.length <= SHOWN / 4;
    } else if (bytes) {
      const large = this.text !== null && bytes.length > PRETTY;
      if (form === "json" && this.json === null) note ||= large ? "Too large to format as JSON." : "This is not JSON.";
      if (this.text === null) note ||= "This is not UTF-8; what cannot be read is shown as \ufffd. See hex.";
      const text = (form === "json" && this.json) || (this.text ?? new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes.subarray(0, SHOWN)));
      body = text.slice(0, SHOWN);
      whole = body.length === text.length && (this.text !== null || bytes.length <= SHOWN);
    }
    if (!whole) note ||= "Only the beginning is shown. Download has all of it.";
    if (bytes?.length === 0) note ||= "The value is empty.";
    show(part("value-body"), body);
    part("value-body").hidden = !body;
    show(part("value-note"), note);
  }

  fillTimes() {
    const { node } = this;
    const now = performance.now();
    show(this.part("fact-changed"), node?.changed ? `${duration(now - node.changed)} ago` : "no change seen yet");
    this.part("ttl").hidden = !this.ttl || this.ttlRevision !== node?.revision;
    if (this.ttl) show(this.part("fact-ttl"), `${duration(Math.max(0, this.ttl - now))} left`);
  }

  choose(form) {
    this.form = form;
    this.fill();
  }

  /** Runs each second. */
  tick(count) {
    if (this.key === null || document.hidden) return;
    this.fillTimes();
    if (!this.connection.live) return;
    if (this.node?.revision && !this.bytes) this.load();
    else if (count % 2) this.trace();
    if (this.node?.revision && this.ttlRevision !== this.node.revision) this.askTtl();
  }

  /** Asks HTTP for the TTL, which no message of the WebSocket has. */
  async askTtl() {
    const { key } = this;
    const asked = this.node.revision;
    this.ttlRevision = asked;
    this.ttl = null;
    try {
      const url = `/v1/kv/${encodeURIComponent(key)}`;
      const { headers } = await fetch(url, { method: "HEAD", cache: "no-store", signal: AbortSignal.timeout(5000) });
      const ms = headers.get("Nkv-Ttl-Ms");
      const same = key === this.key && this.ttlRevision === asked && headers.get("Nkv-Revision") === String(asked);
      if (same && ms !== null) this.ttl = performance.now() + Number(ms);
      else if (!same && key === this.key) this.ttlRevision = 0;
    } catch {
      // Without an answer the page says nothing about a TTL.
    }
    this.fillTimes();
  }

  async trace() {
    const { key } = this;
    if (!this.connection.open || this.tracing) return;
    this.tracing = true;
    const answer = await this.connection.request({ type: "Trace", key, ahead: true }).catch(() => ({}));
    this.tracing = false;
    if (key !== this.key || !answer.subscribers) return;
    show(this.part("watcher-count"), number(answer.subscribers.length));
    fillTable(this.part("watchers"), answer.subscribers.slice(0, CLIENTS).map(({ name, client_uuid: uuid, pattern, exact, ...rest }) => [
      name || uuid, pattern + (exact ? " (exact)" : ""), ...ofClient(rest),
    ]));
  }

  edit() {
    const { node, bytes } = this;
    const ttl = this.ttl && this.ttlRevision === node?.revision ? this.ttl - performance.now() : 0;
    const base = node?.revision ? this.revision : 0;
    this.editor.edit(this.key, base, bytes ?? new Uint8Array(), ttl > 0 ? `${Math.ceil(ttl / 1000)}s` : "");
  }

  download() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([this.bytes], { type: "application/octet-stream" }));
    link.download = `${this.key.replace(/[^\w.-]+/g, "_").slice(0, 100)}.bin`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
}
