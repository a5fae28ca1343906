// Writes: put and delete, each on the condition that the key is still at the revision that was shown. If it is not, the
// present value is shown beside the text, and nothing is lost.

import { decode, encode, fromHex, hexDump, keyFault, number, parseDuration, show, toHex } from "./format.js";

const EDITED = 1024 * 1024;
const KEPT = "The key has changed since. Nothing was written, and your text is kept.";

export class Editor {
  constructor(connection, part, onDone) {
    Object.assign(this, { connection, part, onDone, drafts: new Map() });
    this.dialog = part("editor");
    this.remover = part("remover");
    part("editor-form").addEventListener("submit", (event) => { event.preventDefault(); this.save(); });
    part("editor-text").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.save();
    });
    part("editor-key").addEventListener("input", () => this.setBase(0, connection.epoch, null, ""));
    part("editor-hex").addEventListener("change", () => this.convert());
    part("editor-discard").addEventListener("click", () => this.finish());
    part("editor-close").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("close", () => this.keep());
    part("remover-yes").addEventListener("click", () => this.remove());
    part("remover-no").addEventListener("click", () => this.remover.close());
  }

  hasDraft(key) {
    return this.drafts.has(key);
  }

  /** Gets a key: its revision (0 if it is absent) and its bytes. */
  async fetch(key) {
    const answer = await this.connection.request({ type: "Get", key, ahead: true });
    if (answer.status !== 200 && answer.status !== 404) throw new Error(answer.message);
    return { revision: answer.revisions[0] ?? 0, bytes: answer.payload?.slice() ?? new Uint8Array() };
  }

  /** Opens the editor for a key at revision `base`, or with a draft of it that was left. */
  edit(key, base, bytes, ttl) {
    const draft = this.drafts.get(key);
    this.begin(key, draft ?? { base, epoch: this.connection.epoch, ttl, ...editable(bytes, this.part("editor-text")) }, false);
    if (draft) this.say("This text was not saved.");
  }

  create(prefix) {
    this.begin(prefix, { base: 0, epoch: this.connection.epoch, ttl: "", text: "", hex: false }, true);
  }

  begin(key, draft, fresh) {
    const { part } = this;
    if (draft.text === null) return this.say("The value is too large to edit here.", true);
    this.draft = { ...draft, fresh };
    this.before = `${draft.text}\n${draft.ttl}`;
    show(part("editor-title"), fresh ? "New key" : draft.base ? "Edit value" : "Put value");
    part("editor-key").value = key;
    part("editor-key").readOnly = !fresh;
    part("editor-text").value = draft.text;
    part("editor-hex").checked = draft.hex;
    part("editor-ttl").value = draft.ttl;
    this.setBase(draft.base, draft.epoch, null, "");
    this.dialog.showModal();
    part(fresh ? "editor-key" : "editor-text").focus();
  }

  /** Sets the revision that the next save is on the condition of, and shows the value that the key has there. */
  setBase(base, epoch, present, message) {
    const { part } = this;
    Object.assign(this.draft, { base, epoch });
    part("editor-present").hidden = !present;
    if (present) showValue(part("editor-present-body"), present);
    show(part("editor-present-title"), present?.revision ? `Present value, revision ${number(present.revision)}` : "The key is absent now");
    const over = base ? `Save over revision ${number(base)}` : "Save as new key";
    part("editor-save").textContent = present || !base ? over : "Save";
    show(part("editor-condition"), base ? `Saved only if the key is still at revision ${number(base)}.` : "Saved only if the key is absent.");
    this.say(message);
  }

  /** Notifies the editor of a change while it is open. */
  notice(key, revision) {
    if (this.dialog.open && key === this.part("editor-key").value && revision !== this.draft.base && !this.saving) {
      this.say(revision ? `The key is at revision ${number(revision)} now. Save shows you its value first.` : "The key is gone now.");
    }
  }

  bytes() {
    const { value } = this.part("editor-text");
    return this.part("editor-hex").checked ? fromHex(value) : encode(value);
  }

  convert() {
    const { part } = this;
    const hex = part("editor-hex").checked;
    const bytes = hex ? encode(part("editor-text").value) : fromHex(part("editor-text").value);
    const text = bytes && (hex ? toHex(bytes) : asText(bytes, part("editor-text")));
    if (text === null) {
      part("editor-hex").checked = !hex;
      this.say(bytes ? "These bytes cannot be edited as text without changing them." : "Not hexadecimal: two digits for each byte.");
    } else {
      part("editor-text").value = text;
      this.say("");
    }
  }

  async save() {
    if (this.saving) return;
    const { part, draft } = this;
    const key = part("editor-key").value;
    const fault = keyFault(key, false);
    const value = this.bytes();
    const ttl = parseDuration(part("editor-ttl").value);
    if (fault) return this.say(`This key cannot be: ${fault}.`);
    if (!value) return this.say("Not hexadecimal: two digits for each byte.");
    if (Number.isNaN(ttl)) return this.say("The TTL is a number with ms, s, m, h or d, such as 30s.");
    const put = { type: "Put", key, if_revision: draft.base, ...(ttl && { ttl_ms: ttl }) };
    const conflict = (present) => this.setBase(present.revision, this.connection.epoch, present, KEPT);
    await this.write(draft.epoch, put, value, () => this.finish(), conflict, (text) => this.say(text));
  }

  /** Does a write on the condition of a revision of `epoch`, and gives its outcome to one of three functions. */
  async write(epoch, message, payload, onDone, onConflict, onError) {
    if (!this.connection.live) return onError("Not synced. Nothing was sent.");
    this.saving = true;
    try {
      const same = epoch === this.connection.epoch; // revisions of two epochs cannot be compared
      const answer = same ? await this.connection.request(message, payload) : { status: 409 };
      if (answer.status === 409) onConflict(await this.fetch(message.key));
      else if (answer.status === 200) onDone();
      else onError(`${answer.message} (status ${answer.status})`);
    } catch (error) {
      onError(error.message);
    } finally {
      this.saving = false;
    }
  }

  /** Leaves a text that was changed and not saved as a draft. */
  keep() {
    const key = this.part("editor-key").value;
    const { value: text } = this.part("editor-text");
    const { value: ttl } = this.part("editor-ttl");
    if (this.draft && key && `${text}\n${ttl}` !== this.before) {
      this.drafts.set(key, { ...this.draft, text, ttl, hex: this.part("editor-hex").checked });
    }
    this.draft = null;
    this.onDone(null);
  }

  finish() {
    const key = this.part("editor-key").value;
    const { fresh } = this.draft;
    this.drafts.delete(key);
    this.draft = null;
    this.dialog.close();
    this.onDone(fresh ? key : null);
  }

  say(message, outside) {
    show(this.part(outside ? "value-note" : "editor-message"), message);
  }

  askDelete(key, revision, bytes) {
    this.doomed = { key, revision, epoch: this.connection.epoch };
    this.describe({ revision, bytes }, "");
    this.remover.showModal();
  }

  describe({ revision, bytes }, message) {
    const { part } = this;
    this.doomed.revision = revision;
    this.doomed.epoch = this.connection.epoch;
    show(part("remover-key"), this.doomed.key);
    show(part("remover-title"), revision ? `Value at revision ${number(revision)}` : "The key is absent now");
    showValue(part("remover-body"), { bytes });
    show(part("remover-message"), message);
    part("remover-yes").textContent = `Delete revision ${number(revision)}`;
    part("remover-yes").disabled = !revision;
  }

  async remove() {
    const { key, revision, epoch } = this.doomed;
    const conflict = (present) => this.describe(present, "The key has changed since. Nothing was deleted.");
    const error = (text) => show(this.part("remover-message"), text);
    await this.write(epoch, { type: "Delete", key, if_revision: revision }, null, () => this.remover.close(), conflict, error);
  }
}

// A text area changes line ends; a value that does not come back as it was is edited as hex.
function asText(bytes, area) {
  const text = decode(bytes);
  if (text === null) return null;
  const { value } = area;
  area.value = text;
  const same = area.value === text;
  area.value = value;
  return same ? text : null;
}

function editable(bytes, area) {
  if (bytes.length > EDITED) return { text: null, hex: false };
  const text = asText(bytes, area);
  return { text: text ?? toHex(bytes), hex: text === null };
}

function showValue(element, { bytes }) {
  const begin = bytes.subarray(0, 4096);
  const cut = begin.length < bytes.length;
  // The cut may have gone through a character of up to four bytes.
  const ends = cut ? [0, 1, 2, 3] : [0];
  const text = ends.map((end) => decode(begin.subarray(0, begin.length - end))).find((whole) => whole !== null);
  show(element, (text ?? hexDump(begin)) + (cut ? "\n…" : ""));
}
