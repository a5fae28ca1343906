// Joins the parts: what comes over the connection goes to the store, and what is on show is drawn from it.

import { Connection } from "./connection.js";
import { Editor } from "./editor.js";
import { Feed } from "./feed.js";
import { Figures } from "./figures.js";
import { duration, keyFault, number, show } from "./format.js";
import { Store } from "./store.js";
import { Tree } from "./tree.js";
import { ValuePane } from "./value.js";

const OPENED_AT_FIRST = 150;
const LABELS = { connecting: "Connecting", connected: "Connected, loading", synced: "Synced", stale: "Stale" };

const part = (id) => document.getElementById(id);
const narrow = matchMedia("(max-width: 700px)");
const store = new Store();
const tree = new Tree(store, part("tree"), (key) => {
  value.select(key);
  if (narrow.matches && value.node?.revision) part("value").scrollIntoView({ block: "nearest" });
});
const feed = new Feed(part("feed"), part("pause"), part("feed-note"), (key) => {
  const node = store.find(key);
  if (node) tree.reveal(node);
  else value.select(key);
});
const figures = new Figures(part("rates"), part("figures"), part("clients"));
let first = true;

const connection = new Connection({
  state: drawState,
  begin() {
    store.begin();
  },
  update(key, revision, bytes, skipped, known) {
    const node = store.put(key, revision, bytes, known);
    if (!node) return;
    if (!known) feed.add("put", key, revision, skipped, node.head);
    changed(key, () => value.update(key, revision, bytes), revision);
    if (store.full && connection.phase) connection.stop(`more than ${number(store.nodesMax)} keys and branches; choose a narrower pattern`);
  },
  close(key, revision, skipped, reason) {
    if (!store.remove(key, revision)) return;
    feed.add(reason, key, revision, skipped, "");
    changed(key, () => value.remove(key, reason === "expired" ? "The TTL of this key has ended" : "This key was deleted"), 0);
  },
  synced() {
    for (const { key } of store.finish()) {
      changed(key, () => value.remove(key, `This key is not in the present state of ${connection.pattern}`), 0);
    }
    if (first && store.nodes <= OPENED_AT_FIRST) store.setAllOpen(true);
    first = false;
    tree.draw();
    poll(0);
  },
});
const editor = new Editor(connection, part, (key) => {
  if (key !== null) value.select(key);
  value.draw();
});
const value = new ValuePane(connection, store, editor, part);

function changed(key, show, revision) {
  tree.draw();
  show();
  editor.notice(key, revision);
}

function drawState() {
  const { state, note } = connection;
  const age = state === "stale" && note ? ` for ${duration(performance.now() - connection.staleSince)}: ${note}` : note ? `: ${note}` : "";
  part("state").dataset.state = state;
  show(part("state-label"), LABELS[state] + age);
  document.body.dataset.state = state;
  document.title = `${state === "synced" ? "" : `${LABELS[state]} · `}nkv ${location.host}`;
}

async function poll(count) {
  if (!connection.open || poll.busy) return;
  poll.busy = true;
  try {
    const stats = await connection.request({ type: "Stats", ahead: true });
    if ((stats.status ?? 200) === 200) figures.take(stats, connection.info);
    if (count % 2 === 0 && !document.hidden) {
      const trace = await connection.request({ type: "Trace", ahead: true });
      if ((trace.status ?? 200) === 200) figures.takeClients(trace.clients ?? []);
    }
  } catch (error) {
    if (connection.open) console.error(error); // else the connection ended; the next one asks again
  }
  poll.busy = false;
}

let ticks = 0;
setInterval(() => {
  ticks += 1;
  poll(ticks);
  value.tick(ticks);
  if (connection.state === "stale") drawState();
  show(part("tree-note"), `${number(store.keys)} keys`);
}, 1000);

part("filter").addEventListener("submit", async (event) => {
  event.preventDefault();
  const pattern = part("pattern").value.trim() || "*";
  const fault = keyFault(pattern, true);
  show(part("filter-note"), fault ?? "");
  if (fault) return;
  const before = connection.pattern;
  try {
    await connection.select(pattern);
  } catch (error) {
    if (!connection.open) return; // the next connection takes the pattern
    show(part("filter-note"), error.message);
    connection.select(before).catch(() => {});
  }
});
part("new").addEventListener("click", () => {
  const node = value.node;
  editor.create(node && !node.revision ? `${node.key}.` : "");
});
part("open-all").addEventListener("click", () => { store.setAllOpen(true); tree.draw(); });
part("close-all").addEventListener("click", () => { store.setAllOpen(false); tree.draw(); });
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.closest("input, textarea, dialog")) return;
  event.preventDefault();
  part("pattern").focus();
  part("pattern").select();
});
show(part("host"), location.host);
drawState();
