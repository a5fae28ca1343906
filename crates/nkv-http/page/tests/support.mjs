// A server, a browser and a proxy that can go wrong, for the tests of the page.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import net from "node:net";
import { chromium } from "playwright-core";

// Nothing here measures speed: a machine that has much else to do passes too.
const WAIT_MS = 60_000;
// Below the ports that the system gives to outgoing connections: what stops and starts again finds its port free.
const PORT_MIN = 12_000;
const PORT_MAX = 32_000;
export const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

/** Waits until `check` returns something true, and returns it. */
export async function until(what, check, limitMs = WAIT_MS) {
  const end = Date.now() + limitMs;
  for (;;) {
    const result = await check();
    if (result) return result;
    if (Date.now() > end) throw new Error(`not within ${limitMs} ms: ${what}`);
    await sleep(50);
  }
}

async function freePort() {
  for (;;) {
    const port = PORT_MIN + Math.floor(Math.random() * (PORT_MAX - PORT_MIN));
    const server = net.createServer().listen(port, "127.0.0.1");
    try {
      await once(server, "listening");
    } catch {
      continue; // another program has it
    }
    server.close();
    await once(server, "close");
    return port;
  }
}

export class Server {
  static async start(program, flags = []) {
    const server = new Server();
    server.program = program;
    server.flags = flags;
    server.http = await freePort();
    server.lines = await freePort();
    server.url = `http://127.0.0.1:${server.http}`;
    await server.run();
    return server;
  }

  async run() {
    const addresses = ["--http", `127.0.0.1:${this.http}`, "--listen", `127.0.0.1:${this.lines}`];
    this.child = spawn(this.program, [...addresses, "--persist", "memory", ...this.flags], { stdio: ["ignore", "ignore", "inherit"] });
    await until("the server answers", () => fetch(this.url).then((answer) => answer.ok, () => false));
    await until("the server takes lines", () => this.fill([]).then(() => true, () => false));
  }

  async stop() {
    const { child } = this;
    if (child.exitCode !== null || child.signalCode) return;
    child.kill("SIGTERM");
    const killer = setTimeout(() => child.kill("SIGKILL"), WAIT_MS);
    await once(child, "exit");
    clearTimeout(killer);
  }

  async put(key, body, query = "") {
    const answer = await fetch(`${this.url}/v1/kv/${encodeURIComponent(key)}${query}`, { method: "PUT", body });
    assert.ok(answer.ok, `put of ${key}: ${answer.status}`);
  }

  async delete(key) {
    const answer = await fetch(`${this.url}/v1/kv/${encodeURIComponent(key)}`, { method: "DELETE" });
    assert.ok(answer.ok, `delete of ${key}: ${answer.status}`);
  }

  async get(key) {
    const answer = await fetch(`${this.url}/v1/kv/${encodeURIComponent(key)}`);
    return answer.ok ? Buffer.from(await answer.arrayBuffer()) : null;
  }

  /** Puts many pairs over one connection of lines. */
  async fill(pairs) {
    const socket = net.connect(this.lines, "127.0.0.1");
    let lines = 0;
    socket.on("data", (data) => { for (const byte of data) lines += byte === 10; });
    await once(socket, "connect");
    for (let at = 0; at < pairs.length; at += 2000) {
      const part = pairs.slice(at, at + 2000).map(([key, value]) => JSON.stringify({ type: "Put", key, value }));
      socket.write(`${part.join("\n")}\n`);
      await until("puts are answered", () => lines >= at + part.length);
    }
    socket.destroy();
  }
}

/** Forwards TCP until `silent` is set, from when on it keeps its connections open and passes on nothing. */
export class Proxy {
  static async start(port) {
    const proxy = new Proxy();
    proxy.silent = false;
    proxy.pairs = new Set();
    proxy.server = net.createServer((near) => {
      const far = net.connect(port, "127.0.0.1");
      proxy.pairs.add(near).add(far);
      for (const [from, to] of [[near, far], [far, near]]) {
        from.on("data", (data) => proxy.silent || to.write(data));
        from.on("close", () => proxy.silent || to.destroy());
        from.on("error", () => {});
      }
    }).listen(0, "127.0.0.1");
    await once(proxy.server, "listening");
    proxy.url = `http://127.0.0.1:${proxy.server.address().port}`;
    return proxy;
  }

  stop() {
    this.server.close();
    for (const socket of this.pairs) socket.destroy();
  }
}

export const launch = () => chromium.launch({
  executablePath: process.env.NKV_CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox"],
  ignoreDefaultArgs: ["--disable-back-forward-cache"],
});

/** Opens the page and waits for its first state. `page.faults` collects errors and violations of the policy. */
export async function open(browser, url, { socket, ...options } = {}) {
  const context = await browser.newContext({ viewport: { width: 1440, height: 900 }, ...options });
  context.setDefaultTimeout(WAIT_MS);
  const page = await context.newPage();
  if (socket) await page.routeWebSocket(/\/v1\/ws$/, socket);
  page.faults = [];
  page.on("pageerror", (error) => page.faults.push(String(error)));
  page.on("dialog", (dialog) => { page.faults.push(`dialog: ${dialog.message()}`); dialog.dismiss(); });
  page.on("console", (message) => {
    const network = /WebSocket connection to|Failed to load resource/.test(message.text());
    if (message.type() === "error" && !network) page.faults.push(message.text());
  });
  await page.goto(url);
  await state(page, "synced");
  return page;
}

export const state = (page, wanted, limitMs) =>
  until(`the page is ${wanted}`, async () => (await page.getAttribute("#state", "data-state")) === wanted, limitMs);

export const row = (page, name) => page.locator(".row:not([hidden])", { has: page.locator(".name", { hasText: new RegExp(`^${name}$`) }) });

/** Clicks the row of a name. Rows are filled anew at any time, so a click may have to be tried again. */
export const pick = (page, name) => until(`a click on ${name}`, async () => {
  await row(page, name).click({ timeout: 5000 }).catch(() => {});
  return (await page.locator(".row[aria-selected=true]:not([hidden]) .name").allInnerTexts())[0] === name;
});

export const text = (page, selector) => page.locator(selector).innerText();

export const shows = (page, selector, wanted) =>
  until(`${selector} shows ${wanted}`, async () => (await page.locator(selector).innerText()).includes(wanted));
