// Tests the tree of keys against a sorted list: node store.mjs [SEED]

import assert from "node:assert/strict";
import { Store } from "../store.js";

const seed = Number(process.argv[2] ?? Math.floor(Math.random() * 2 ** 31));
console.log(`seed ${seed}`);
let state = seed;
const random = (below) => {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return Math.floor((state / 2 ** 32) * below);
};

const SEGMENTS = ["a", "b", "a!", "a-b", "__proto__", "constructor", "\ufffd", "\u{1f600}", "é", "z"];
const key = () => Array.from({ length: 1 + random(4) }, () => SEGMENTS[random(SEGMENTS.length)]).join(".");
// Key order is that of the bytes of UTF-8, with the dot below all others.
const order = (a, b) => Buffer.compare(Buffer.from(a.replaceAll(".", "\0")), Buffer.from(b.replaceAll(".", "\0")));
const value = (text) => new TextEncoder().encode(text);

function rowsOf(model, open) {
  const rows = new Set();
  for (const name of model.keys()) {
    const segments = name.split(".");
    for (let depth = 1; depth <= segments.length; depth += 1) {
      rows.add(segments.slice(0, depth).join("."));
      if (!open) break;
    }
  }
  return [...rows].sort(order);
}

function check(store, model, open) {
  const expected = rowsOf(model, open);
  assert.equal(store.keys, model.size);
  assert.equal(store.rows, expected.length);
  assert.deepEqual(Array.from({ length: store.rows }, (_, row) => store.at(row).key), expected);
  expected.forEach((name, row) => assert.equal(store.rowOf(store.find(name)), row));
  for (const [name, revision] of model) assert.equal(store.find(name).revision, revision);
}

const store = new Store();
let model = new Map();
let revision = 0;
for (let round = 0; round < 400; round += 1) {
  if (random(10) === 0) {
    // A new state, in which some keys are missing, and during which some change and some are deleted.
    const snapshot = [...model].filter(() => random(3));
    model = new Map(snapshot);
    store.begin();
    for (let at = 0; at < snapshot.length; at += 1) {
      const [name, old] = snapshot[at];
      const change = random(4);
      revision += 1;
      if (change === 0) { store.put(name, revision, value("new"), false); model.set(name, revision); }
      if (change === 1) { store.remove(name, revision); model.delete(name); }
      const taken = store.put(name, old, value("old"), true);
      assert.equal(taken === null, change < 2, "an older value of a page is no news");
    }
    store.finish();
  }
  for (let at = random(80); at > 0; at -= 1) {
    const name = key();
    revision += 1;
    if (random(3)) { store.put(name, revision, value("v"), false); model.set(name, revision); }
    else if (model.has(name)) { assert.ok(store.remove(name, revision)); model.delete(name); }
  }
  const open = random(2) === 0;
  store.setAllOpen(open);
  check(store, model, open);
}

const small = new Store(3);
small.begin();
small.put("a.b", 1, value("1"), true);
assert.ok(!small.full);
small.put("c", 2, value("2"), true);
assert.ok(small.full);
small.begin();
assert.equal(small.nodes, 0, "a full store begins a new state empty");
console.log("ok");
