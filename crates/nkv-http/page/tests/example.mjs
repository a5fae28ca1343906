// Opens examples/http/live.html from another port, as its first lines say: node example.mjs [--server PROGRAM]

import assert from "node:assert/strict";
import { once } from "node:events";
import { readFile } from "node:fs/promises";
import http from "node:http";
import { parseArgs } from "node:util";
import { Server, launch, sleep, until } from "./support.mjs";

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

/** A proxy before a server: while `status` is set, it answers with that alone. */
class Gateway {
  static async start(server) {
    const gateway = new Gateway();
    gateway.seen = [];
    gateway.open = new Set();
    gateway.server = http.createServer((request, answer) => {
      gateway.seen.push({ url: request.url, id: request.headers["last-event-id"], status: gateway.status });
      if (gateway.status) return answer.writeHead(gateway.status).end("not now");
      const headers = { ...request.headers, host: `127.0.0.1:${server.http}` };
      const onward = http.request({ host: "127.0.0.1", port: server.http, path: request.url, headers });
      onward.on("response", (from) => {
        answer.writeHead(from.statusCode, from.headers);
        from.on("error", () => {}).pipe(answer);
      });
      onward.on("error", () => answer.destroy());
      answer.on("close", () => onward.destroy());
      onward.end();
    }).listen(0, "127.0.0.1");
    gateway.server.on("connection", (socket) => gateway.open.add(socket));
    await once(gateway.server, "listening");
    gateway.url = `http://127.0.0.1:${gateway.server.address().port}`;
    return gateway;
  }

  /** Ends every connection. */
  cut() {
    for (const socket of this.open) socket.destroy();
    this.open.clear();
  }
}

/** A proxy that answers 502, then 503 for ten seconds, ends a browser's source for good: the page goes on with another. */
async function comesBack(server, browser) {
  const gateway = await Gateway.start(server);
  await server.put("kept", "1");
  await server.put("lost", "1");
  const tab = await browser.newPage();
  await tab.goto(`${origin}/live.html?nkv=${encodeURIComponent(gateway.url)}`);
  await shows(tab, "kept\t1,lost\t1");
  gateway.status = 502;
  gateway.cut();
  const seen = (status) => gateway.seen.filter((request) => request.status === status).length;
  await until("502 was answered", () => seen(502) > 0);
  gateway.status = 503;
  await server.put("kept", "2");
  await server.delete("lost");
  await until("503 was answered", () => seen(503) > 0);
  await sleep(10_000);
  gateway.status = undefined;
  await shows(tab, "kept\t2");
  // The address now has an old cursor. The browser's own way back has a newer one beside it, which counts.
  await server.put("new", "1");
  await shows(tab, "kept\t2,new\t1");
  gateway.seen.length = 0;
  gateway.cut();
  await server.put("new", "2");
  await shows(tab, "kept\t2,new\t2");
  const [back] = gateway.seen;
  const after = new URL(back.url, origin).searchParams.get("after");
  assert.ok(after && back.id && after !== back.id, JSON.stringify(back));
  gateway.cut();
  gateway.server.close();
}

const browser = await launch();
try {
  const server = await Server.start(program, ["--http-allow-origin", origin]);
  try {
    await comesBack(server, browser);
  } finally {
    await server.stop();
  }
  console.log("ok  the example page, behind a proxy that answers with errors for a while");
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
