// Lists the newest changes. The list is bounded, and is drawn a few times a second at most.

import { make, number, show } from "./format.js";

const KEPT = 200;
const DRAW_MS = 200;
const KINDS = { put: "put", deleted: "delete", expired: "expire" };

export class Feed {
  constructor(list, pause, note, onSelect) {
    this.list = list;
    this.note = note;
    this.changes = [];
    this.rows = [];
    this.missed = 0;
    this.skipped = 0;
    pause.addEventListener("click", () => {
      this.paused = !this.paused;
      this.missed = 0;
      pause.setAttribute("aria-pressed", this.paused);
      pause.textContent = this.paused ? "Resume" : "Pause";
      this.draw();
    });
    list.addEventListener("click", (event) => {
      const row = this.rows.find(({ item }) => item.contains(event.target));
      if (row) onSelect(row.change.key);
    });
  }

  add(kind, key, revision, skipped, head) {
    this.skipped += skipped;
    if (this.paused) {
      this.missed += 1;
    } else {
      this.changes.push({ at: new Date(), kind, key, revision, skipped, head });
      if (this.changes.length > 2 * KEPT) this.changes.splice(0, this.changes.length - KEPT);
    }
    this.draw();
  }

  draw() {
    this.timer ??= setTimeout(() => requestAnimationFrame(() => {
      this.timer = null;
      this.fill();
    }), DRAW_MS);
  }

  fill() {
    const skipped = this.skipped ? `${number(this.skipped)} skipped` : "";
    show(this.note, this.paused ? `paused, ${number(this.missed)} newer` : skipped);
    if (this.paused) return;
    const newest = this.changes.slice(-KEPT).reverse();
    newest.forEach((change, at) => this.fillRow((this.rows[at] ??= this.makeRow()), change));
  }

  makeRow() {
    const item = this.list.appendChild(make("li"));
    const parts = ["time", "kind", "key", "skips", "head", "revision"].map((name) => item.appendChild(make("span", name)));
    return { item, parts };
  }

  fillRow(row, change) {
    if (row.change === change) return;
    row.change = change;
    const { at, kind, key, revision, skipped, head } = change;
    const texts = [at.toTimeString().slice(0, 8), KINDS[kind] ?? kind, key, skipped ? `+${number(skipped)} skipped` : "", head, `r${revision}`];
    texts.forEach((text, part) => show(row.parts[part], text));
    row.item.dataset.kind = kind;
  }
}
