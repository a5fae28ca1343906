'use strict';

// The framing of what a server sends: lines of JSON, each followed by a payload if it says so (docs/protocol.md, 1).

const { isUtf8 } = require('node:buffer');

const { ProtocolError } = require('./errors.js');

const NEWLINE = 10;
const NONE = Buffer.alloc(0);

/** Takes bytes as they come, and calls `onMessage(kind, body, payload)` for each whole message. */
class Reader {
  #onMessage;
  #parts = [];
  #partsLen = 0;
  /** The message whose payload is being read. */
  #waiting;

  constructor(lenMax, onMessage) {
    this.lenMax = lenMax;
    this.#onMessage = onMessage;
  }

  /** Throws a ProtocolError if the bytes are not the protocol, or a message is too long. */
  push(chunk) {
    let at = 0;
    while (at < chunk.length) {
      at = this.#waiting === undefined ? this.#line(chunk, at) : this.#payload(chunk, at);
    }
  }

  #line(chunk, at) {
    const end = chunk.indexOf(NEWLINE, at);
    if (end < 0) {
      this.#keep(chunk.subarray(at));
      return chunk.length;
    }
    let line = chunk.subarray(at, end);
    if (this.#partsLen > 0) {
      this.#keep(line);
      line = this.#take();
    }
    this.#checkLen(line.length);
    this.#parsed(parse(line));
    return end + 1;
  }

  #parsed(message) {
    if (message === undefined) {
      return;
    }
    const { kind, body } = message;
    const len = body.len;
    if (typeof len !== 'number') {
      this.#onMessage(kind, body, NONE);
      return;
    }
    if (!Number.isSafeInteger(len) || len < 0) {
      throw new ProtocolError(`the server announced a payload of ${len} bytes`);
    }
    this.#checkLen(len);
    this.#waiting = { kind, body, len };
  }

  #payload(chunk, at) {
    const { kind, body, len } = this.#waiting;
    const end = at + len + 1 - this.#partsLen;
    if (end > chunk.length) {
      this.#keep(chunk.subarray(at));
      return chunk.length;
    }
    let payload = chunk.subarray(at, end);
    if (this.#partsLen > 0) {
      this.#keep(payload);
      payload = this.#take();
    }
    if (payload[len] !== NEWLINE) {
      throw new ProtocolError('no newline after the payload of a message');
    }
    this.#waiting = undefined;
    this.#onMessage(kind, body, payload.subarray(0, len));
    return end;
  }

  #checkLen(len) {
    if (len > this.lenMax) {
      throw new ProtocolError(`a message of the server has more than ${this.lenMax} bytes`);
    }
  }

  #keep(part) {
    this.#parts.push(part);
    this.#partsLen += part.length;
    this.#checkLen(this.#partsLen - 1);
  }

  #take() {
    const whole = Buffer.concat(this.#parts, this.#partsLen);
    this.#parts = [];
    this.#partsLen = 0;
    return whole;
  }
}

/** The kind of a message and its fields; undefined for an empty line. */
function parse(line) {
  const text = line.toString('utf8').trim();
  if (text === '') {
    return undefined;
  }
  if (text.includes('\ufffd') && !isUtf8(line)) {
    throw new ProtocolError('a message of the server is not UTF-8');
  }
  let message;
  try {
    message = JSON.parse(text);
  } catch (cause) {
    throw new ProtocolError('a message of the server is not JSON', { cause });
  }
  if (typeof message === 'string') {
    return { kind: message, body: {} };
  }
  if (message === null || typeof message !== 'object' || Array.isArray(message)) {
    throw new ProtocolError('a message of the server is neither an object nor a string');
  }
  const fields = Object.entries(message);
  if (fields.length !== 1) {
    throw new ProtocolError(`a message of the server has ${fields.length} fields instead of one`);
  }
  const [kind, body] = fields[0];
  return { kind, body: body !== null && typeof body === 'object' && !Array.isArray(body) ? body : {} };
}

/** The bytes of a value in a message, in each form that it may have. The bytes are a copy. */
function valueOf(form) {
  if (typeof form === 'string') {
    return Buffer.from(form);
  }
  if (Array.isArray(form) && form.every((byte) => Number.isInteger(byte) && byte >= 0 && byte <= 255)) {
    return Buffer.from(form);
  }
  throw new ProtocolError('a value in a message of the server has no form that is known');
}

/** The values of an answer to `Get`. */
function valuesOf(body, payload, count) {
  if (!Array.isArray(body.lens)) {
    const data = Array.isArray(body.data) ? body.data : [];
    if (data.length !== count) {
      throw new ProtocolError('an answer of the server has not as many values as keys');
    }
    return data.map(valueOf);
  }
  let at = 0;
  const values = body.lens.map((len) => {
    if (!Number.isSafeInteger(len) || len < 0 || at + len > payload.length) {
      throw new ProtocolError('the lengths in an answer of the server do not fit its payload');
    }
    at += len;
    return Buffer.from(payload.subarray(at - len, at));
  });
  if (values.length !== count || at !== payload.length) {
    throw new ProtocolError('the lengths in an answer of the server do not fit its payload');
  }
  return values;
}

module.exports = { Reader, valueOf, valuesOf };
