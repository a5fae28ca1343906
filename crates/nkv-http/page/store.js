// Holds what the page knows of the keys, as a tree of their segments. It keeps the beginning of each value, not the
// whole, so that a store of large values fits into a browser.

import { preview } from "./format.js";

class Node {
  constructor(name, key, parent) {
    this.name = name;
    this.key = key;
    this.parent = parent;
    this.children = null; // a Map, because a segment may be called __proto__
    this.keys = 0; // keys below this one
    this.revision = 0; // 0: no value of its own
    this.size = 0;
    this.head = "";
    this.changed = 0; // when this page saw it change, by performance.now()
    this.generation = 0;
    this.open = false;
    // What follows is made by measure(), and holds unless `dirty`. An open node is dirty only if its parent is.
    this.dirty = true;
    this.sorted = []; // children in key order
    this.added = []; // children that are not among them yet
    this.removed = false; // some of them are gone
    this.gone = false;
    this.place = 0; // its index among its siblings
    this.sums = []; // rows of the children up to each one
    this.rows = 0;
  }
}

export class Store {
  /** `nodesMax` is how many keys and branches the page is to hold; see `full`. */
  constructor(nodesMax = 1_000_000) {
    this.nodesMax = nodesMax;
    this.root = new Node("", "", null);
    this.nodes = 0;
    this.generation = 0;
    this.buried = new Map(); // revisions of the deletes that came during a snapshot
    this.loading = false;
  }

  get keys() {
    return this.root.keys;
  }

  get full() {
    return this.nodes >= this.nodesMax;
  }

  /** Returns the node of a key or branch, or undefined. */
  find(key) {
    let node = this.root;
    for (const segment of key.split(".")) {
      node = node?.children?.get(segment);
    }
    return node;
  }

  /** Begins a snapshot: what is neither in it nor changed during it will be gone at its end. */
  begin() {
    this.generation += 1;
    if (this.full) this.finish(); // else what is kept for comparison would leave no room for the new state
    this.loading = true;
    this.buried.clear();
  }

  /** Ends a snapshot: removes the keys that were not in it, and returns them. */
  finish() {
    const missing = [];
    const visit = (node) => {
      if (node.revision && node.generation !== this.generation) missing.push(node);
      for (const child of node.children?.values() ?? []) visit(child);
    };
    visit(this.root);
    for (const node of missing) this.removeNode(node);
    this.loading = false;
    this.buried.clear();
    return missing;
  }

  /**
   * Sets a value, and returns its node, or null if something newer is known. `known` says that a snapshot brought it, so
   * that only a new revision counts as a change.
   */
  put(key, revision, bytes, known) {
    if (this.buried.get(key) > revision) return null;
    let node = this.root;
    for (const segment of key.split(".")) node = node.children?.get(segment) ?? this.addNode(node, segment);
    if (node.revision >= revision && node.generation === this.generation) return null;
    if (!node.revision) {
      for (let above = node.parent; above; above = above.parent) above.keys += 1;
    }
    if (!known || (node.revision && node.revision !== revision)) node.changed = performance.now();
    node.revision = revision;
    node.size = bytes.length;
    node.head = preview(bytes);
    node.generation = this.generation;
    return node;
  }

  /** Removes a key, and returns whether nothing newer is known of it. */
  remove(key, revision) {
    const node = this.find(key);
    if (node?.generation === this.generation && node.revision > revision) return false;
    if (this.loading) this.buried.set(key, revision);
    if (node?.revision) this.removeNode(node);
    return true;
  }

  addNode(parent, name) {
    const node = new Node(name, parent === this.root ? name : `${parent.key}.${name}`, parent);
    parent.children ??= new Map();
    parent.children.set(name, node);
    parent.added.push(node);
    this.nodes += 1;
    soil(parent);
    return node;
  }

  removeNode(node) {
    node.revision = 0;
    for (let above = node.parent; above; above = above.parent) above.keys -= 1;
    for (let at = node; at.parent && !at.revision && !at.children?.size; at = at.parent) {
      at.gone = true;
      at.parent.children.delete(at.name);
      at.parent.removed = true;
      this.nodes -= 1;
      soil(at.parent);
    }
  }

  /** Returns how many rows the tree has: one for each node below branches that are open. */
  get rows() {
    return measure(this.root);
  }

  /** Returns the node in a row. */
  at(row) {
    measure(this.root);
    let node = this.root;
    for (;;) {
      const place = search(node.sums, (sum) => sum > row);
      row -= place ? node.sums[place - 1] : 0;
      node = node.sorted[place];
      if (!row) return node;
      row -= 1;
    }
  }

  /** Returns the row of a node, -1 if it is not on show. */
  rowOf(node) {
    measure(this.root);
    let row = -1;
    for (let at = node; at.parent; at = at.parent) {
      if (at.gone || (at !== node && !at.open)) return -1;
      row += 1 + (at.place ? at.parent.sums[at.place - 1] : 0);
    }
    return row;
  }

  setOpen(node, open) {
    node.open = open;
    soil(node.parent);
  }

  /** Opens or closes every branch. */
  setAllOpen(open) {
    const visit = (node) => {
      node.open = open;
      node.dirty = true;
      for (const child of node.children?.values() ?? []) visit(child);
    };
    visit(this.root);
  }
}

function soil(node) {
  for (let at = node; at && !at.dirty; at = at.parent) at.dirty = true;
}

// Only the branches that changed are measured again, so that one new key among a million costs its siblings alone.
function measure(node) {
  if (!node.dirty) return node.rows;
  if (node.removed) node.sorted = node.sorted.filter((child) => !child.gone);
  const added = node.added.filter((child) => !child.gone);
  if (added.length > 50) {
    node.sorted = node.sorted.concat(added).sort((a, b) => compare(a.name, b.name));
  } else {
    for (const child of added) node.sorted.splice(search(node.sorted, (other) => compare(other.name, child.name) > 0), 0, child);
  }
  node.added = [];
  node.removed = false;
  node.sums = new Uint32Array(node.sorted.length);
  node.rows = 0;
  node.sorted.forEach((child, place) => {
    child.place = place;
    node.rows += 1 + (child.open ? measure(child) : 0);
    node.sums[place] = node.rows;
  });
  node.dirty = false;
  return node.rows;
}

/** Returns the first index whose item is `behind`; all items from there on must be. */
function search(items, behind) {
  let low = 0;
  let high = items.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    if (behind(items[middle])) high = middle;
    else low = middle + 1;
  }
  return low;
}

// The server orders by the bytes of UTF-8: surrogates stand above all other units of UTF-16.
function compare(a, b) {
  const length = Math.min(a.length, b.length);
  for (let at = 0; at < length; at += 1) {
    const x = a.charCodeAt(at);
    const y = b.charCodeAt(at);
    if (x !== y) return rank(x) - rank(y);
  }
  return a.length - b.length;
}
const rank = (unit) => (unit >= 0xd800 && unit < 0xe000 ? unit + 0x10000 : unit);
