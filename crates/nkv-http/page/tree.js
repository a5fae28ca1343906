// Draws the tree of keys: only the rows in view exist as elements, and they are filled anew at most once per frame.

import { make, number, show } from "./format.js";

const ROW_PX = 26;
const FRESH_MS = 900;
const SPARE_ROWS = 6;

export class Tree {
  constructor(store, element, onSelect) {
    this.store = store;
    this.element = element;
    this.onSelect = onSelect;
    this.active = null;
    this.slots = [];
    this.space = element.appendChild(make("div", "space"));
    this.space.setAttribute("role", "presentation");
    this.element.addEventListener("scroll", () => this.draw(), { passive: true });
    this.element.addEventListener("keydown", (event) => this.key(event));
    this.element.addEventListener("focus", () => this.active || this.moveTo(0));
    this.space.addEventListener("click", (event) => this.click(event));
    new ResizeObserver(() => this.draw()).observe(element);
  }

  /** Asks for the rows to be filled in the next frame. */
  draw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.fill();
    });
  }

  fill() {
    const { rows } = this.store;
    this.element.classList.toggle("empty", !rows);
    this.setHeight(rows);
    const count = Math.min(rows, Math.ceil(this.element.clientHeight / ROW_PX) + 2 * SPARE_ROWS);
    const wanted = Math.floor(this.element.scrollTop / ROW_PX) - SPARE_ROWS;
    const first = Math.max(0, Math.min(wanted, rows - count));
    while (this.slots.length < count) this.slots.push(this.makeSlot());
    const now = performance.now();
    let fresh = false;
    this.element.removeAttribute("aria-activedescendant");
    // A row keeps its element while it is in view, so that scrolling by one row changes one element.
    for (let at = first; at < first + count; at += 1) {
      fresh = this.fillSlot(this.slots[at % this.slots.length], this.store.at(at), at, now) || fresh;
    }
    if (count < this.slots.length) {
      const used = new Set(Array.from({ length: count }, (_, at) => (first + at) % this.slots.length));
      this.slots.forEach((slot, at) => { slot.row.hidden = !used.has(at); });
    }
    if (fresh) this.later ??= setTimeout(() => { this.later = null; this.draw(); }, 250);
  }

  setHeight(rows) {
    const height = `${rows * ROW_PX}px`;
    if (this.height !== height) this.space.style.height = this.height = height;
  }

  makeSlot() {
    const row = this.space.appendChild(make("div", "row"));
    row.id = `row-${this.slots.length}`;
    row.setAttribute("role", "treeitem");
    const [twist, name, count, head] = ["twist", "name", "count", "head"].map((part) => row.appendChild(make("span", part)));
    return { row, index: -1, twist, name, count, head };
  }

  fillSlot(slot, node, index, now) {
    const { row } = slot;
    row.hidden = false;
    if (slot.index !== index) {
      slot.index = index;
      row.style.transform = `translateY(${index * ROW_PX}px)`;
    }
    const fresh = node.changed > 0 && now - node.changed < FRESH_MS;
    const branch = Boolean(node.children?.size);
    const siblings = node.parent.children.size;
    const chosen = node === this.active;
    let level = 0;
    for (let at = node; at.parent; at = at.parent) level += 1;
    const looks = `${level} ${node.place} ${siblings} ${branch && node.open} ${branch} ${fresh} ${chosen} ${node.keys} ${node.revision}`;
    if (chosen) this.element.setAttribute("aria-activedescendant", row.id);
    if (slot.node === node && slot.looks === looks) return fresh;
    slot.node = node;
    slot.looks = looks;
    row.classList.toggle("fresh", fresh);
    row.classList.toggle("bare", !node.revision);
    row.style.paddingInlineStart = `${8 + 14 * Math.min(level - 1, 16)}px`;
    row.setAttribute("aria-level", level);
    row.setAttribute("aria-posinset", node.place + 1);
    row.setAttribute("aria-setsize", siblings);
    row.setAttribute("aria-selected", chosen);
    if (branch) row.setAttribute("aria-expanded", node.open);
    else row.removeAttribute("aria-expanded");
    show(slot.name, node.name);
    show(slot.count, branch ? number(node.keys) : "");
    show(slot.head, node.revision ? node.head.replaceAll(/[\n\t]/g, " ") : "");
    return fresh;
  }

  click(event) {
    const slot = this.slots.find(({ row }) => row.contains(event.target));
    if (!slot) return;
    const opens = event.target === slot.twist || !slot.node.revision;
    if (opens && slot.node.children?.size) this.toggle(slot.node);
    this.choose(slot.node);
  }

  key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const node = this.active;
    const index = node ? this.store.rowOf(node) : -1;
    const page = Math.max(1, Math.floor(this.element.clientHeight / ROW_PX) - 1);
    const steps = { ArrowDown: index + 1, ArrowUp: index - 1, Home: 0, End: Infinity, PageDown: index + page, PageUp: index - page };
    const branch = Boolean(node?.children?.size);
    if (event.key in steps) this.moveTo(steps[event.key]);
    else if (event.key === "ArrowRight" && branch) node.open ? this.moveTo(index + 1) : this.toggle(node);
    else if (event.key === "ArrowLeft" && branch && node.open) this.toggle(node);
    else if (event.key === "ArrowLeft" && node && node.parent !== this.store.root) this.reveal(node.parent);
    else if ((event.key === "Enter" || event.key === " ") && branch) this.toggle(node);
    else return;
    event.preventDefault();
  }

  moveTo(index) {
    const { rows } = this.store;
    if (rows) this.reveal(this.store.at(Math.max(0, Math.min(index, rows - 1))));
  }

  /** Chooses a node and scrolls to it, opening the branches above it. */
  reveal(node) {
    for (let above = node.parent; above.parent; above = above.parent) {
      if (!above.open) this.store.setOpen(above, true);
    }
    const top = this.store.rowOf(node) * ROW_PX;
    const { scrollTop, clientHeight } = this.element;
    this.setHeight(this.store.rows);
    if (top < scrollTop) this.element.scrollTop = top;
    else if (top + ROW_PX > scrollTop + clientHeight) this.element.scrollTop = top + ROW_PX - clientHeight;
    this.choose(node);
  }

  choose(node) {
    this.active = node;
    this.onSelect(node.key);
    this.draw();
  }

  toggle(node) {
    this.store.setOpen(node, !node.open);
    this.draw();
  }
}
