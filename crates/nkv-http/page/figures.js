// Shows the server's figures, their rates as sparklines, and the clients of the server.

import { brief, duration, make, number, show, size } from "./format.js";

export const CLIENTS = 100;
const POINTS = 120;
const SVG = "http://www.w3.org/2000/svg";
const RATES = {
  Writes: ({ puts, deletes, expired }) => puts + deletes + expired,
  Notified: ({ notified }) => notified,
  Conflated: ({ conflated }) => conflated,
};

export class Figures {
  constructor(rates, list, clients) {
    this.list = list;
    this.clients = clients;
    this.cells = new Map();
    this.lines = Object.entries(RATES).map(([name, count]) => ({ count, points: [], ...makeLine(rates, name) }));
  }

  /** Takes the answer to Stats. The rates are those since the answer before it, of the same run of the server. */
  take(stats, info) {
    const now = performance.now();
    const last = this.last?.epoch === stats.epoch && this.last.uptime_ms <= stats.uptime_ms ? this.last : null;
    for (const line of this.lines) {
      const rate = last ? ((line.count(stats) - line.count(last)) * 1000) / Math.max(1, now - this.at) : 0;
      line.points.push(Math.max(0, rate));
      if (line.points.length > POINTS) line.points.shift();
      drawLine(line);
    }
    this.last = stats;
    this.at = now;
    this.fill({
      Keys: number(stats.keys),
      Values: size(stats.value_bytes),
      Revision: number(stats.revision),
      Subscriptions: number(stats.subscriptions),
      Connections: number(stats.connections),
      "Failed batches": number(stats.failed_batches),
      Durability: stats.durability,
      Uptime: duration(stats.uptime_ms),
      Version: info.version ?? "",
      Epoch: stats.epoch.slice(0, 8),
      ...ofEngine(stats),
    });
  }

  fill(figures) {
    for (const [name, text] of Object.entries(figures)) {
      if (!this.cells.has(name)) {
        const pair = this.list.appendChild(make("div"));
        pair.append(make("dt", "", name));
        this.cells.set(name, pair.appendChild(make("dd")));
      }
      show(this.cells.get(name), text);
    }
    this.cells.get("Failed batches").classList.toggle("bad", this.last.failed_batches > 0);
  }

  /** Takes the clients of a Trace without a key. */
  takeClients(clients) {
    fillTable(this.clients, clients.slice(0, CLIENTS).map(({ name, client_uuid: uuid, subscriptions, ...rest }) => [
      name || uuid || "unnamed", number(subscriptions), ...ofClient(rest),
    ]));
  }
}

/** Returns the figures of the server's engine, and of the cluster that it is a node of. */
function ofEngine({ engine, cluster, cluster_members: members, cluster_members_joined: joined, clock_offset_ms: offset }) {
  const figures = {};
  if (engine) figures.Engine = engine;
  if (cluster) {
    figures.Cluster = `${cluster}: ${number(joined)} of ${number(members)} other nodes`;
    figures["Clock offset"] = offset === undefined ? "unknown" : `${offset} ms`;
  }
  return figures;
}

/** Returns what tables show at the end of a client's row. */
export const ofClient = ({ queued, skipped, since_ms: since, peer }) => [number(queued), number(skipped), brief(since), peer ?? ""];

/** Fills the body of a table, reusing its cells. */
export function fillTable(body, rows) {
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((texts, at) => {
    const row = body.rows[at] ?? body.insertRow();
    texts.forEach((text, cell) => show(row.cells[cell] ?? row.insertCell(), text));
  });
}

function makeLine(rates, name) {
  const box = rates.appendChild(make("figure", "rate"));
  const label = box.appendChild(make("figcaption", "", name));
  const value = label.appendChild(make("output"));
  const svg = box.appendChild(document.createElementNS(SVG, "svg"));
  svg.setAttribute("viewBox", `0 0 ${POINTS - 1} 32`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const [area, line] = ["polygon", "polyline"].map((tag) => svg.appendChild(document.createElementNS(SVG, tag)));
  return { value, area, line };
}

function drawLine({ points, value, area, line }) {
  const most = Math.max(1, ...points);
  const start = POINTS - points.length;
  const path = points.map((rate, at) => `${start + at},${(30.5 - (28 * rate) / most).toFixed(1)}`).join(" ");
  line.setAttribute("points", path);
  area.setAttribute("points", `${start},32 ${path} ${POINTS - 1},32`);
  const now = points.at(-1);
  show(value, `${now && now < 10 ? now.toFixed(1) : number(Math.round(now))}/s`);
}
