// Tests the page in a real browser: node page.mjs [--server PROGRAM] [--only PART-OF-A-NAME] [--screenshots FOLDER]
//
// PROGRAM is an nkv-server with the HTTP door (or NKV_SERVER); the browser is NKV_CHROMIUM or /usr/bin/chromium.

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { once } from "node:events";
import http from "node:http";
import { parseArgs } from "node:util";
import { screenshots } from "./screenshots.mjs";
import { Proxy, Server, launch, open, pick, row, shows, sleep, state, text, until } from "./support.mjs";

const KEYS = 100_000;
const NODES_MAX = 3_000;
const { values: flags } = parseArgs({ options: { server: { type: "string" }, only: { type: "string" }, screenshots: { type: "string" } } });
const program = flags.server ?? process.env.NKV_SERVER ?? "nkv-server";

const cases = {
  async "a change is shown in the tree, the value and the feed"({ server, browser }) {
    await server.put("lamp.kitchen", "off");
    const page = await open(browser, server.url);
    await pick(page, "kitchen");
    await shows(page, "#value-body", "off");
    await server.put("lamp.kitchen", '{"on":true,"level":12345678901234567890}');
    await shows(page, "#value-body", '"level": 12345678901234567890');
    await shows(page, "#feed", "lamp.kitchen");
    await until("the row shows it", async () => /"on":true/.test(await row(page, "kitchen").innerText()));
    assert.match(await text(page, "#fact-changed"), /^\d+ s ago$/);
    await shows(page, "#watchers", "page");
    await shows(page, "#clients", "page");
    await server.put("lamp.hall", "soon gone", "?ttl=30s");
    await pick(page, "hall");
    await shows(page, "#fact-ttl", "s left");
    await server.delete("lamp.kitchen");
    await until("the row is gone", async () => (await row(page, "kitchen").count()) === 0);
    return page;
  },

  async "an edit that meets a newer value shows it and keeps the text"({ server, browser }) {
    await server.put("edit.me", "one");
    const page = await open(browser, server.url);
    await pick(page, "me");
    await shows(page, "#value-body", "one");
    await page.click("#edit");
    await page.fill("#editor-text", "mine");
    await server.put("edit.me", "theirs");
    await shows(page, "#editor-message", "revision");
    await page.click("#editor-save");
    await shows(page, "#editor-present-body", "theirs");
    assert.equal(await page.inputValue("#editor-text"), "mine");
    assert.equal(String(await server.get("edit.me")), "theirs");
    await page.keyboard.press("Escape");
    await until("the dialog is closed", async () => !(await page.isVisible("#editor")));
    await shows(page, "#edit", "Resume edit");
    await page.click("#edit");
    assert.equal(await page.inputValue("#editor-text"), "mine");
    await page.click("#editor-save");
    await until("mine is stored", async () => String(await server.get("edit.me")) === "mine");
    await page.click("#delete");
    await server.put("edit.me", "again");
    await page.click("#remover-yes");
    await shows(page, "#remover-body", "again");
    assert.equal(String(await server.get("edit.me")), "again");
    await page.click("#remover-yes");
    await until("the key is deleted", async () => (await server.get("edit.me")) === null);
    await shows(page, "#value-note", "deleted");
    return page;
  },

  async "a new key is put only where there is none"({ server, browser }) {
    await server.put("new.taken", "held");
    const page = await open(browser, server.url);
    await page.click("#new");
    await page.fill("#editor-key", "new.*");
    await page.click("#editor-save");
    await shows(page, "#editor-message", "cannot be part of a key");
    await page.fill("#editor-key", "new.taken");
    await page.fill("#editor-text", "mine");
    await page.click("#editor-save");
    await shows(page, "#editor-present-body", "held");
    await page.fill("#editor-key", "new.free");
    await page.check("#editor-hex");
    assert.equal(await page.inputValue("#editor-text"), "6d 69 6e 65");
    await page.fill("#editor-text", "00 ff");
    await page.click("#editor-save");
    await until("the bytes are stored", async () => (await server.get("new.free"))?.equals(Buffer.from([0, 255])));
    await shows(page, "#value-body", "00 ff");
    assert.equal(String(await server.get("new.taken")), "held");
    return page;
  },

  async "the tree, the filter and the forms work from the keyboard"({ server, browser }) {
    await server.fill([["b.one", "1"], ["b.two", "2"], ["a", "0"]]);
    const page = await open(browser, server.url);
    await page.focus("#tree");
    const chosen = () => page.locator(".row[aria-selected=true] .name").innerText();
    for (const [key, name] of [["Home", "a"], ["ArrowDown", "b"], ["ArrowRight", "one"], ["End", "two"], ["ArrowLeft", "b"]]) {
      await page.keyboard.press(key);
      await until(`${key} chooses ${name}`, async () => (await chosen()) === name);
    }
    await page.keyboard.press("ArrowLeft");
    await until("the branch is closed", async () => (await row(page, "b").getAttribute("aria-expanded")) === "false");
    const active = await page.getAttribute("#tree", "aria-activedescendant");
    assert.equal(await page.locator(`[id=${active}] .name`).innerText(), "b");
    await page.keyboard.press("/");
    await page.keyboard.type("b.*");
    await page.keyboard.press("Enter");
    await until("a is filtered out", async () => (await row(page, "a").count()) === 0);
    await page.fill("#pattern", "*.b");
    await page.keyboard.press("Enter");
    await shows(page, "#filter-note", "stands alone or at the end");
    await page.fill("#pattern", "");
    await page.keyboard.press("Enter");
    await row(page, "a").waitFor();
    return page;
  },

  async "a hundred thousand keys are drawn with few elements"({ server, browser }) {
    const key = (at) => `site.${at % 100}.sensor.${at}`;
    await server.fill(Array.from({ length: KEYS }, (_, at) => [key(at), `${at}`]));
    const before = Date.now();
    const page = await open(browser, server.url);
    console.log(`    synced after ${Date.now() - before} ms`);
    await page.click("#open-all");
    await until("all rows count", async () => (await page.evaluate(() => document.querySelector(".space").clientHeight)) > KEYS * 26);
    const frames = (work) => page.evaluate(async (scroll) => {
      const tree = document.querySelector("#tree");
      const times = [];
      let last = performance.now();
      for (let at = 0; at < 150; at += 1) {
        await new Promise(requestAnimationFrame);
        times.push(performance.now() - last);
        last = performance.now();
        if (scroll) tree.scrollTop = at < 75 ? at * 120 : at * 16_000;
      }
      times.sort((a, b) => a - b);
      return `median ${times[75].toFixed(1)} ms, 95 of 100 within ${times[142].toFixed(1)} ms, longest ${times[149].toFixed(1)} ms`;
    }, work);
    console.log(`    frames at rest: ${await frames(false)}`);
    console.log(`    frames while scrolling: ${await frames(true)}`);
    let writing = true;
    const writer = (async () => {
      for (let round = 0; writing; round += 1) {
        await server.fill(Array.from({ length: 300 }, (_, at) => [key((round * 300 + at) % KEYS), `round ${round}`]));
        await server.fill(Array.from({ length: 20 }, (_, at) => [`new.${round}.${at}`, "new"]));
        await sleep(20);
      }
    })();
    console.log(`    frames while scrolling, with changes: ${await frames(true)}`);
    writing = false;
    await writer;
    const nodes = await page.evaluate(() => document.querySelectorAll("*").length);
    console.log(`    ${nodes} elements`);
    assert.ok(nodes < NODES_MAX, `${nodes} elements`);
    await page.focus("#tree");
    await page.keyboard.press("End");
    await row(page, "99999").waitFor();
    await server.put(key(KEYS - 1), "the last one changed");
    await until("the change is in view", async () => /the last one/.test(await row(page, "99999").innerText()));
    return page;
  },

  async "hostile keys and values are shown as what they are"({ server, browser }) {
    const script = "<img/src=x/onerror=document.title='owned'>";
    const keys = [script, "__proto__.constructor.toString", "hostile.\u202egnp\u2066/exe", "hostile.a\u0301\u0301\u0301\u0301", "hostile.\u200bblank",
      `hostile.${"k".repeat(1000)}`, "hostile./x/.\\x%2F?#", `z${".z".repeat(500)}`];
    for (const key of keys) await server.put(key, script);
    await server.put("value.invalid", Buffer.from([0x7b, 0xff, 0xfe, 0x00, 0xc3]));
    await server.put("value.huge", Buffer.alloc(1_000_000, "<b>&"));
    await server.put("value.deep", "[".repeat(40_000) + "]".repeat(40_000));
    await server.put("value.line", "one\r\ntwo\u0000\u202e");
    await server.put("value.empty", "");
    const page = await open(browser, server.url);
    await page.click("#open-all");
    await shows(page, "#tree", script);
    await shows(page, "#tree", "__proto__");
    await shows(page, "#tree", "U+202E");
    for (const [name, shown] of [["invalid", "7b ff fe 00 c3"], ["huge", "<b>&"], ["deep", "[\n"], ["line", "U+202E"]]) {
      await page.fill("#pattern", `value.${name}`);
      await page.keyboard.press("Enter");
      await pick(page, name);
      await shows(page, "#value-body", shown);
      if (name === "huge") await shows(page, "#value-note", "Only the beginning");
    }
    await page.click("#edit");
    assert.ok(await page.isChecked("#editor-hex"), "a value with a carriage return is edited as hex");
    await page.click("#editor-save");
    await until("the dialog is closed", async () => !(await page.isVisible("#editor")));
    assert.equal(String(await server.get("value.line")), "one\r\ntwo\u0000\u202e", "the value came back as it was");
    await page.fill("#pattern", "*");
    await page.keyboard.press("Enter");
    await shows(page, "#tree", "<img");
    for (const key of keys.slice(0, 2)) await server.put(key, `again ${script}`);
    await shows(page, "#feed", "__proto__.constructor.toString");
    assert.equal(await page.locator("main img").count(), 0);
    assert.doesNotMatch(await page.title(), /owned/);
    return page;
  },

  async "after a restart of the server the page shows its state and no other"({ server, browser }) {
    await server.fill([["restart.kept", "old"], ["restart.lost", "old"]]);
    const page = await open(browser, server.url);
    await pick(page, "kept");
    await shows(page, "#value-body", "old");
    await page.click("#edit");
    await page.fill("#editor-text", "draft");
    await server.stop();
    await state(page, "stale");
    await page.click("#editor-save");
    await shows(page, "#editor-message", "Nothing was sent");
    await server.run();
    await server.fill([["restart.kept", "new"]]);
    await state(page, "synced");
    await page.click("#editor-save");
    await shows(page, "#editor-present-body", "new");
    assert.equal(String(await server.get("restart.kept")), "new", "a revision of the old epoch lets nothing be written");
    await page.click("#editor-discard");
    await shows(page, "#value-body", "new");
    await until("the lost key is gone", async () => (await row(page, "lost").count()) === 0);
    return page;
  },

  async "a reset begins anew, and skipped changes are counted"({ server, browser }) {
    await server.fill([["reset.kept", "old"], ["reset.lost", "old"]]);
    let near;
    const page = await open(browser, server.url, { socket: (route) => { near = route; route.connectToServer(); } });
    const update = (key, value, revision, skipped) => {
      const line = JSON.stringify({ Update: { key, revision, len: value.length, skipped } });
      near.send(Buffer.from(`${line}\n${value}\n`));
    };
    await row(page, "lost").waitFor();
    update("reset.kept", "late", 70, 7);
    await shows(page, "#feed", "+7 skipped");
    near.send('"Alive"');
    near.send('{"News":{"of":"a later version"}}');
    near.send('{"Reset":{"key":"*"}}');
    await state(page, "connected");
    update("reset.kept", "new", 3, 0);
    near.send('{"Synced":{"key":"*","revision":3,"epoch":"00000000000000000000000000000001"}}');
    await state(page, "synced");
    await until("the new value is in view", async () => /new/.test(await row(page, "kept").innerText()));
    await until("the lost key is gone", async () => (await row(page, "lost").count()) === 0);
    return page;
  },

  async "a proxy that goes silent is noticed, and what changed is shown without a reload"({ server, browser }) {
    const proxy = await Proxy.start(server.http);
    await server.put("silent.key", "before");
    const page = await open(browser, proxy.url);
    const begin = Date.now();
    proxy.silent = true;
    await server.put("silent.key", "after");
    await until("the page is not synced", async () => (await page.getAttribute("#state", "data-state")) !== "synced", 90_000);
    console.log(`    noticed after ${Date.now() - begin} ms`);
    await sleep(15_000);
    proxy.silent = false;
    await state(page, "synced");
    console.log(`    synced again ${Date.now() - begin - 15_000} ms later`);
    await until("the new value is in view", async () => /after/.test(await row(page, "key").innerText()));
    proxy.stop();
    return page;
  },

  async "a page that comes back from the back/forward cache connects again"({ server, browser }) {
    await server.put("cache.key", "before");
    const page = await open(browser, server.url);
    await page.evaluate(() => { window.sameDocument = true; addEventListener("pageshow", (event) => { window.fromCache = event.persisted; }); });
    await page.goto("about:blank");
    await server.put("cache.key", "after");
    await page.goBack({ waitUntil: "commit" });
    await state(page, "synced");
    assert.ok(await page.evaluate(() => window.sameDocument === true && window.fromCache === true), "the page came from the cache");
    await until("the new value is in view", async () => /after/.test(await row(page, "key").innerText()));
    return page;
  },

  async "pauses grow when each connection is accepted and closed at once"({ server, browser }) {
    const page = await open(browser, server.url);
    await server.stop();
    const dials = [];
    const refuser = http.createServer().on("upgrade", (request, socket) => {
      dials.push(performance.now());
      const accept = createHash("sha1").update(`${request.headers["sec-websocket-key"]}258EAFA5-E914-47DA-95CA-C5AB0DC85B11`).digest("base64");
      socket.write(`HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: ${accept}\r\n\r\n`);
      socket.end(Buffer.from([0x88, 2, 0x03, 0xf5])); // close, 1013: try again later
    }).listen(server.http, "127.0.0.1");
    await once(refuser, "listening");
    await until("four dials", () => dials.length >= 4);
    refuser.close();
    refuser.closeAllConnections();
    // A pause begins after its dial was answered, and a busy machine only makes it longer.
    for (const [at, least] of [450, 900, 1800].entries()) {
      const pause = dials[at + 1] - dials[at];
      assert.ok(pause >= least, `a pause of ${pause} ms, and ${least} is the least`);
    }
    await server.run();
    await state(page, "synced");
    return page;
  },
};

const browser = await launch();
let failed = 0;
for (const [name, run] of Object.entries(cases)) {
  if (flags.only && !name.includes(flags.only)) continue;
  const server = await Server.start(program);
  try {
    const page = await run({ server, browser });
    assert.deepEqual(page.faults, []);
    await page.context().close();
    console.log(`ok  ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED  ${name}\n${error.stack}`);
  }
  await server.stop();
}
if (flags.screenshots) {
  const server = await Server.start(program);
  await screenshots(server, browser, flags.screenshots).finally(() => server.stop());
}
await browser.close();
process.exitCode = failed ? 1 : 0;
