'use strict';

// One connection, from its greeting to its end. It matches answers to requests by their id, so that no answer can be
// taken for that to another request, and knows when the server counts as dead.

const { CannotConnectError, ProtocolError } = require('./errors.js');
const { Reader } = require('./reader.js');

/** No more than this waits in the socket: what waits here can still be given up. */
const SOCKET_LEN_MAX = 256 * 1024;
const GREETING_LEN_MAX = 64 * 1024;
/** What a server that states no limit takes at most. */
const VALUE_LEN_MAX = 64 * 1024 * 1024;
const FEATURES = ['reset', 'exact', 'names', 'alive', 'stale'];

class Connection {
  #socket;
  #reader;
  #nextId = 1;
  /** What waits for an answer, by id. */
  #pending = new Map();
  /** `Subscribe`s without an answer, in the order in which they were sent. */
  #subscribes = [];
  #onEnd = () => {};
  #onDrain = () => {};
  #onNotification = () => {};
  #error;
  #heartbeat;
  #heardAt = performance.now();
  #written = 0;
  #queued = 0;
  /** Whether the last check took the server for dead. */
  #isDoubted = false;
  /** What waits for the answer to the question for a sign of life. */
  #probe;

  /** The highest revision that a message had; undefined before the first. */
  revision;
  /** Since when what the server shows may be old, in milliseconds of `performance.now()`; undefined if it is not. */
  staleSince;

  constructor(socket, lenMax) {
    this.#socket = socket;
    this.lenMax = lenMax;
    this.#reader = new Reader(GREETING_LEN_MAX, (kind, body, payload) => this.#message(kind, body, payload));
    socket.on('data', (chunk) => this.#data(chunk));
    socket.on('drain', () => this.#onDrain());
    socket.on('error', (error) => this.destroy(lost(error)));
    socket.on('end', () => this.destroy(lost('the server closed it')));
    socket.on('close', () => this.destroy(lost('it was closed')));
  }

  /** Sends `Connect` and returns the promise of what the server says about itself. */
  greet(fields) {
    return new Promise((resolve, reject) => {
      this.#onEnd = reject;
      const request = { type: 'Connect', values: 'payload', features: FEATURES, ...fields };
      this.ask(request, (kind, body) => {
        if (kind !== 'Base' || body.status !== 200) {
          throw new CannotConnectError(`the server refuses the connection: ${body.status}: ${body.message}`);
        }
        this.epoch = typeof body.epoch === 'string' ? body.epoch : '';
        // Whether revisions from before say nothing, as in another epoch.
        this.beginsAnew = body.begins_anew === true;
        this.features = Array.isArray(body.features) ? body.features : [];
        this.valueLenMax = Number.isSafeInteger(body.max_value) ? body.max_value : VALUE_LEN_MAX;
        this.patience = Number.isSafeInteger(body.patience_ms) ? body.patience_ms : 0;
        this.#reader.lenMax = this.lenMax;
        resolve();
      });
    });
  }

  /** From here on notifications, room to send, and the end are reported. */
  attach({ heartbeat, onNotification, onDrain, onEnd }) {
    if (this.#error !== undefined) {
      onEnd(this.#error);
      return;
    }
    this.#onNotification = onNotification;
    this.#onDrain = onDrain;
    this.#onEnd = onEnd;
    this.#heartbeat = setInterval(() => this.#checkLife(heartbeat), Math.max(1, Math.min(heartbeat / 4, 60_000)));
  }

  get hasRoom() {
    return this.#socket.writableLength < SOCKET_LEN_MAX;
  }

  /** Sends small requests together. */
  cork() {
    this.#socket.cork();
  }

  uncork() {
    this.#socket.uncork();
  }

  /** Sends a request of this client itself. */
  ask(fields, onAnswer) {
    const id = `c${this.#nextId}`;
    this.#nextId += 1;
    this.send(id, Buffer.from(`${JSON.stringify({ ...fields, id })}\n`), onAnswer);
  }

  /** Sends a request; `onAnswer(kind, body, payload)` is called with its answer, unless the connection ends before. */
  send(id, bytes, onAnswer) {
    if (this.#pending.size === 0) {
      // The wait for this answer begins now.
      this.#heardAt = performance.now();
    }
    this.#pending.set(id, onAnswer);
    this.#socket.write(bytes);
  }

  /** Sends a `Subscribe`; it is answered by `Hello`, or refused. */
  subscribe(fields, onHello, onRefused) {
    const subscribe = { pattern: fields.key, onHello };
    this.#subscribes.push(subscribe);
    this.ask({ type: 'Subscribe', ...fields }, (kind, body) => {
      this.#subscribes.splice(this.#subscribes.indexOf(subscribe), 1);
      onRefused(body);
    });
    subscribe.id = `c${this.#nextId - 1}`;
  }

  /** Whether a `Subscribe` to the pattern has no answer yet. */
  isSubscribing(pattern) {
    return this.#subscribes.some((subscribe) => subscribe.pattern === pattern);
  }

  /** No longer calls for the answer to this request. */
  forget(id) {
    if (this.#pending.has(id)) {
      this.#pending.set(id, undefined);
    }
  }

  /** Ends the connection; only the first reason counts. */
  destroy(error) {
    if (this.#error !== undefined) {
      return;
    }
    this.#error = error;
    clearInterval(this.#heartbeat);
    this.#pending.clear();
    this.#socket.destroy();
    this.#onEnd(error);
  }

  #data(chunk) {
    this.#heardAt = performance.now();
    this.#isDoubted = false;
    if (this.#error !== undefined) {
      return;
    }
    try {
      this.#reader.push(chunk);
    } catch (error) {
      this.destroy(error);
    }
  }

  #message(kind, body, payload) {
    if (this.#error !== undefined) {
      return;
    }
    this.#noteRevisions(body);
    if (kind === 'Hello') {
      const subscribe = this.#subscribes.shift();
      if (subscribe === undefined) {
        throw new ProtocolError("the server sent 'Hello' that answers nothing");
      }
      this.#pending.delete(subscribe.id);
      subscribe.onHello();
    } else if (body.status !== undefined && body.id !== undefined) {
      this.#answer(kind, body, payload);
    } else if (kind === 'Stale') {
      this.staleSince = Number.isSafeInteger(body.since_ms) ? performance.now() - body.since_ms : undefined;
    } else {
      this.#onNotification(kind, body, payload);
    }
  }

  #noteRevisions({ revision, revisions }) {
    for (const number of Array.isArray(revisions) ? [...revisions, revision] : [revision]) {
      if (Number.isSafeInteger(number) && number >= (this.revision ?? 0)) {
        this.revision = number;
      }
    }
  }

  #answer(kind, body, payload) {
    if (body.id === '') {
      // Such an answer is about the connection, which ends with it.
      this.destroy(new CannotConnectError(`the server says ${body.status}: ${body.message}`));
      return;
    }
    if (!this.#pending.has(body.id)) {
      throw new ProtocolError('the server answered what was not asked');
    }
    const onAnswer = this.#pending.get(body.id);
    this.#pending.delete(body.id);
    onAnswer?.(kind, body, payload);
  }

  /** Asks a silent server for a sign of life, and gives it up if none comes. Bytes that it takes are one too. */
  #checkLife(heartbeat) {
    // The queue of the handle shows the progress of one long write too.
    const queued = this.#socket._handle?.writeQueueSize ?? 0;
    const written = this.#socket.bytesWritten - this.#socket.writableLength;
    if (written !== this.#written || queued !== this.#queued) {
      [this.#written, this.#queued] = [written, queued];
      this.#heardAt = performance.now();
    }
    const silence = performance.now() - this.#heardAt;
    if (silence >= Math.max(2 * heartbeat, this.patience)) {
      // What came while this process slept or was busy is read before the next check.
      if (this.#isDoubted) {
        this.destroy(lost(`no sign of life for ${Math.round(silence)} ms`));
      }
      this.#isDoubted = true;
    } else if (silence >= heartbeat && this.#probe === undefined) {
      const heardAt = this.#heardAt;
      this.#probe = () => {
        this.#probe = undefined;
      };
      this.ask({ type: 'Health' }, this.#probe);
      this.#heardAt = heardAt;
    }
  }
}

function lost(cause) {
  const text = cause instanceof Error ? cause.message : cause;
  return new CannotConnectError(`connection lost: ${text}`, cause instanceof Error ? { cause } : undefined);
}

module.exports = { Connection };
