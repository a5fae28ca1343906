// Opens examples/http/live.html from another port, as its first lines say: node example.mjs [--server PROGRAM]

import assert from "node:assert/strict";
import { once } from "node:events";
import { readFile } from "node:fs/promises";
import http from "node:http";
import { parseArgs } from "node:util";
import { Server, launch, until } from "./support.mjs";

const { values: flags } = parseArgs({ options: { server: { type: "string" } } });
const program = flags.server ?? process.env.NKV_SERVER ?? "nkv-server";

const page = await readFile(new URL("../../../../examples/http/live.html", import.meta.url));
const files = http.createServer((_, answer) => answer.setHeader("content-type", "text/html").end(page)).listen(0, "127.0.0.1");
await once(files, "listening");
const origin = `http://localhost:${files.address().port}`;

const rows = (tab) => tab.locator("tr").allInnerTexts();
const shows = (tab, wanted) => until(`the page shows ${wanted}`, async () => (await rows(tab)).join() === wanted);

async function run(server, browser, allowed) {
  const tab = await browser.newPage();
  await tab.goto(`${origin}/live.html?nkv=${encodeURIComponent(server.url)}`);
  if (!allowed) {
    const refused = await tab.evaluate((url) => fetch(`${url}/v1/stats`).then(() => false, () => true), server.url);
    assert.ok(refused, "a page of an origin that the server does not allow reads nothing");
    assert.deepEqual(await rows(tab), []);
    return;
  }
  await shows(tab, "lamp.hall\t<b>off</b>,lamp.kitchen\ton");
  await server.put("lamp.kitchen", "dimmed");
  await server.delete("lamp.hall");
  await shows(tab, "lamp.kitchen\tdimmed");
  // Values in memory: after a restart it is another state, and the page holds nothing of the first.
  await server.stop();
  await server.run();
  await server.put("lamp.study", "on");
  await shows(tab, "lamp.study\ton");
}

const browser = await launch();
try {
  for (const allowed of [true, false]) {
    const server = await Server.start(program, allowed ? ["--http-allow-origin", origin] : []);
    try {
      await server.put("lamp.kitchen", "on");
      await server.put("lamp.hall", "<b>off</b>");
      await run(server, browser, allowed);
    } finally {
      await server.stop();
    }
    console.log(`ok  the example page, of an origin that is ${allowed ? "" : "not "}allowed`);
  }
} finally {
  await browser.close();
  files.close();
}
