// Turns keys, values and numbers into text that is safe to show.

// Characters that are invisible, or that reorder the text around them. A tab and a newline are shown as they are.
const HIDDEN = /((?![\n\t])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}\u115f\u1160\u3164\uffa0])\1*/gu;
const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const lenient = new TextDecoder("utf-8", { ignoreBOM: true });
const encoder = new TextEncoder();

export const encode = (text) => encoder.encode(text);

/** Returns the text that the bytes are in UTF-8, or null if they are something else. */
export function decode(bytes) {
  try {
    return strict.decode(bytes);
  } catch {
    return null;
  }
}

/** Returns the beginning of a value on one line, for lists. */
export function preview(bytes) {
  const text = lenient.decode(bytes.length > 120 ? bytes.subarray(0, 120) : bytes);
  return text.length > 100 || bytes.length > 120 ? `${text.slice(0, 100)}…` : text;
}

/** Makes `text` the content of `element`. Hidden characters become visible marks such as U+202E. */
export function show(element, text) {
  if (element.shown === text) return;
  element.shown = text;
  if (text.search(HIDDEN) < 0) {
    element.textContent = text;
    return;
  }
  const parts = [];
  let end = 0;
  for (const found of text.matchAll(HIDDEN)) {
    const [run, one] = found;
    const code = one.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    parts.push(text.slice(end, found.index), make("span", "mark", `U+${code}${run === one ? "" : ` ×${run.length / one.length}`}`));
    end = found.index + found[0].length;
  }
  element.replaceChildren(...parts, text.slice(end));
}

/** Creates an element with a class and a text. */
export function make(tag, name, text) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
}

/** Returns JSON with one member on each line. Every token stays as it is, so no digit of a long number is lost. */
export function prettyJson(text) {
  try {
    JSON.parse(text);
  } catch {
    return null;
  }
  const out = [];
  let depth = 0;
  let before = "";
  const line = () => out.push("\n", "  ".repeat(Math.min(depth, 40)));
  for (const [token] of text.matchAll(/"(?:[^"\\]+|\\.)*"|[{}[\],:]|[^\s{}[\],:"]+/g)) {
    const opened = before === "{" || before === "[";
    if (token === "}" || token === "]") {
      depth -= 1;
      if (!opened) line();
    } else if (opened || before === ",") {
      line();
    }
    out.push(token === ":" ? ": " : token);
    if (token === "{" || token === "[") depth += 1;
    before = token;
  }
  return out.join("");
}

/** Returns a dump with the offset, sixteen bytes and their ASCII on each line. */
export function hexDump(bytes) {
  const lines = [];
  for (let at = 0; at < bytes.length; at += 16) {
    const row = bytes.subarray(at, at + 16);
    const hex = Array.from(row, (byte) => byte.toString(16).padStart(2, "0"));
    const ascii = Array.from(row, (byte) => (byte > 31 && byte < 127 ? String.fromCharCode(byte) : "."));
    const columns = `${hex.slice(0, 8).join(" ").padEnd(23)}  ${hex.slice(8).join(" ").padEnd(23)}`;
    lines.push(`${at.toString(16).padStart(6, "0")}  ${columns}  ${ascii.join("")}`);
  }
  return lines.join("\n");
}

/** Returns the bytes as hexadecimal digits that can be edited, and back; null if they are not such digits. */
export const toHex = (bytes) =>
  Array.from(bytes, (byte, at) => byte.toString(16).padStart(2, "0") + (at % 16 === 15 ? "\n" : " ")).join("").trim();
export function fromHex(text) {
  const digits = text.replace(/\s+/g, "");
  if (digits.length % 2 || /[^0-9a-f]/i.test(digits)) return null;
  return Uint8Array.from({ length: digits.length / 2 }, (_, at) => parseInt(digits.slice(at * 2, at * 2 + 2), 16));
}

export const number = (value) => (value ?? 0).toLocaleString("en");

export function size(bytes) {
  if (bytes < 1024) return `${bytes} B`;
  const power = Math.min(4, Math.floor(Math.log2(bytes) / 10));
  return `${(bytes / 1024 ** power).toFixed(1)} ${["", "KiB", "MiB", "GiB", "TiB"][power]}`;
}

export function duration(ms) {
  const seconds = Math.max(0, Math.floor(ms / 1000));
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
}

/** Returns the largest unit of a duration alone, for tables. */
export const brief = (ms) => duration(ms).split(" ", 2).join(" ");

/** Returns the milliseconds that a text such as "30s" or "5m" stands for; null for none, NaN if it is no duration. */
export function parseDuration(text) {
  if (!text.trim()) return null;
  const found = /^\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?\s*$/.exec(text);
  if (!found) return NaN;
  return Math.max(1, Math.round(found[1] * { ms: 1, s: 1000, m: 60000, h: 3600000, d: 86400000 }[found[2] ?? "s"]));
}

/** Says what is wrong with a key or, with `pattern`, a pattern; null if nothing is. */
export function keyFault(text, pattern) {
  if (!text) return "a key is needed";
  if (encode(text).length > 1024) return "longer than 1,024 bytes";
  if (/[\p{White_Space}\p{Cc}]/u.test(text)) return "white space and control characters cannot be part of a key";
  const segments = text.split(".");
  if (segments.includes("")) return "a segment is empty: segments are joined by single dots";
  if (pattern && segments.at(-1) === "*") segments.pop();
  if (segments.some((segment) => segment.includes("*"))) return pattern ? "* stands alone or at the end: a.b.*" : "* cannot be part of a key";
  return null;
}
