// Takes the pictures of the page for the documentation, from a store that looks like one in use.

import { spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import net from "node:net";
import { open, pick, shows, sleep } from "./support.mjs";

const RUN_MS = 100_000; // until the sparklines are nearly full
const SHOTS = [
  ["page-light", { viewport: { width: 1440, height: 900 } }],
  ["page-dark", { viewport: { width: 1440, height: 900 }, colorScheme: "dark" }],
  ["page-phone", { viewport: { width: 390, height: 844 }, deviceScaleFactor: 1.5, hasTouch: true }],
];

const WATCHERS = [["api 1", "config.api"], ["api 2", "config.api"], ["dashboard", "host.*"], ["lamp driver", "home.*"]];

function pairs() {
  const list = [];
  for (const host of ["db1", "db2", "web1", "web2", "web3"]) {
    list.push([`host.${host}.load`, "0.42"], [`host.${host}.memory.free`, "12884901888"], [`host.${host}.uptime`, "1893204"]);
  }
  const api = { listen: "0.0.0.0:8080", workers: 8, limits: { body_bytes: 1048576, idle_ms: 65000 }, features: ["search", "export"], owner: "platform" };
  for (const room of ["hall", "kitchen", "study"]) {
    list.push([`home.${room}.lamp`, JSON.stringify({ on: true, level: 80, colour: [255, 214, 170] })], [`home.${room}.temperature`, "21.5"]);
  }
  list.push(["config.api", JSON.stringify(api)], ["config.api.flags.beta", "false"], ["config.worker", '{"queue":"mail","retries":5}']);
  list.push(["deploy.current", "2026-11-30.2"], ["deploy.previous", "2026-11-28.1"]);
  return list;
}

function watch(server, name, key) {
  const socket = net.connect(server.lines, "127.0.0.1").resume();
  const connect = { type: "Connect", id: "1", client_uuid: name, name, features: ["names"] };
  socket.write(`${JSON.stringify(connect)}\n${JSON.stringify({ type: "Subscribe", id: "2", key })}\n`);
  return socket;
}

export async function screenshots(server, browser, folder) {
  await server.fill(pairs());
  const watchers = WATCHERS.map(([name, key]) => watch(server, name, key));
  let running = true;
  const writer = (async () => {
    for (let round = 0; running; round += 1) {
      const busy = Math.round(6 + 5 * Math.sin(round / 6));
      for (let at = 0; at < busy; at += 1) {
        const host = ["db1", "db2", "web1", "web2", "web3"][(round + at) % 5];
        await server.fill([[`host.${host}.load`, (Math.abs(Math.sin(round + at)) * 2).toFixed(2)]]);
      }
      if (round % 5 === 0) await server.fill([["home.study.temperature", (20 + (round % 30) / 10).toFixed(1)]]);
      if (round % 12 === 0) await server.put("session.1f0c", "ada", "?ttl=4s");
      await sleep(150);
    }
  })();
  for (const [name, options] of SHOTS) {
    const page = await open(browser, server.url, options);
    await pick(page, "api");
    await shows(page, "#value-body", "listen");
    await sleep(RUN_MS);
    const path = `${folder}/${name}.png`;
    await page.screenshot({ path });
    // Fewer colours make the file smaller; without the program the picture stays as it is.
    if (existsSync("/usr/bin/pngquant")) spawnSync("pngquant", ["--force", "--output", path, "128", path]);
    await page.context().close();
  }
  running = false;
  await writer;
  for (const socket of watchers) socket.destroy();
}
