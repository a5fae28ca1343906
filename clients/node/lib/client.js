'use strict';

const { randomUUID } = require('node:crypto');

const { addressText, parseAddress } = require('./address.js');
const args = require('./args.js');
const { Connection } = require('./connection.js');
const { dial } = require('./dial.js');
const { Entry, Revision } = require('./entry.js');
const errors = require('./errors.js');
const { Hub } = require('./hub.js');
const { checkKey, checkPattern, disjoint, isWildcard } = require('./key.js');
const { valuesOf } = require('./reader.js');
const { Subscription } = require('./subscription.js');
const { Branch, Watch } = require('./watch.js');

const { CannotConnectError, ClosedError, OutcomeUnknownError, ProtocolError, RefusedError, TimeoutError } = errors;

/** A connection that lived for so long counts as good: the pauses between attempts begin anew. */
const LASTED_MS = 2_000;
const BACKOFF_LONGEST_MS = 86_400_000;
/** The pause after a conflict is a random part of a span that doubles with each, up to the second of these. */
const CONFLICT_MIN_MS = 1;
const CONFLICT_MAX_MS = 128;
/** How many entries `getAll` asks for at once, and how many keys `list`. */
const GET_PAGE = 1_000;
const LIST_PAGE = 10_000;

const CLIENT_OPTIONS = [
  'backoffMax',
  'backoffMin',
  'clientUuid',
  'connectTimeout',
  'heartbeat',
  'lookup',
  'messageLenMax',
  'name',
  'requestTimeout',
  'subscriptionLenMax',
  'token',
];
const LIMITS = ['timeout', 'signal'];

/** A client: one connection, which is made again when it is lost, and everything that goes over it. */
class Client {
  #address;
  #options;
  #hub = new Hub();
  #connection;
  /** `{ epoch, revision }`: the highest revision that any message of the epoch had. The next server must have it too. */
  #seen;
  #state = 'connecting';
  /** Ends the attempt to connect that is under way. */
  #attempt;
  /** Ends the pause between attempts. */
  #wake = () => {};
  #running;
  /** The caller of `connect` that still waits. */
  #opening;
  #lastError;
  #nextId = 1;
  /** Requests that no connection has begun to take, in the order in which they are to be sent. */
  #outbox = new Set();
  /** Requests that were sent over the present connection. */
  #inFlight = new Set();
  #isPumping = false;

  /** Begins to connect, and does not wait for it. */
  constructor(addr, options) {
    this.#address = parseAddress(addr);
    this.#options = clientOptions(options);
    this.#running = this.#run();
  }

  /** Returns a client that is connected. Without `waitForServer` it fails at once where no server answers. */
  static async connect(addr, options) {
    const { waitForServer, signal, ...rest } = options ?? {};
    const patience = args.checkTime(waitForServer, 'waitForServer', 0);
    args.checkSignal(signal)?.throwIfAborted();
    const client = new Client(addr, rest);
    let stopSignal;
    try {
      await new Promise((resolve, reject) => {
        client.#opening = { resolve, reject, until: performance.now() + patience };
        stopSignal = args.onAbort(signal, reject);
      });
    } catch (error) {
      await client.close();
      throw error;
    } finally {
      stopSignal();
    }
    return client;
  }

  get address() {
    return addressText(this.#address);
  }

  get clientUuid() {
    return this.#options.clientUuid;
  }

  /** 'connecting', 'connected', 'reconnecting' or 'closed'. */
  get state() {
    return this.#state;
  }

  /** For how many milliseconds the server has not seen its engine; undefined if it does, or without a connection. */
  get staleFor() {
    const since = this.#connection?.staleSince;
    return since === undefined ? undefined : performance.now() - since;
  }

  async put(key, value, options) {
    const given = args.checkOptions(options, ['ifRevision', 'ttl', ...LIMITS], 'put');
    checkKey(key);
    const ttl = args.checkCount(given.ttl, 'ttl', 1);
    const condition = conditionOf(given);
    const bytes = args.bytesOf(value);
    return this.#write(
      { type: 'Put', key, if_revision: condition?.number, ttl_ms: ttl, len: bytes.length },
      { condition, bytes, key },
      given,
      (body, epoch) => revisionOf(body.revision, epoch),
    );
  }

  /** The entry of a key; undefined if it is absent. */
  async get(key, options) {
    checkKey(key);
    const given = args.checkOptions(options, LIMITS, 'get');
    return this.#read({ type: 'Get', key }, given, (...answer) => entriesOf(answer).items[0]);
  }

  /**
   * Writes what `change` makes of the present entry if the key is still as it was read, and else begins again, after a random
   * pause. `change` returns undefined to write nothing. Returns the revision of what the key holds then.
   */
  async update(key, change, options) {
    const given = args.checkOptions(options, LIMITS, 'update');
    checkKey(key);
    if (typeof change !== 'function') {
      throw new TypeError('what changes the value is a function');
    }
    const timeout = args.checkTime(given.timeout, 'timeout', this.#options.requestTimeout);
    const until = performance.now() + timeout;
    const limits = () => {
      const left = until - performance.now();
      if (left <= 0) {
        throw this.#explained(new TimeoutError(`not done within ${timeout} ms`));
      }
      return { ...given, timeout: left };
    };
    for (let span = CONFLICT_MIN_MS; ; span = Math.min(2 * span, CONFLICT_MAX_MS)) {
      const old = await this.get(key, limits());
      const value = await change(old);
      if (value === undefined) {
        return old?.revision;
      }
      try {
        return await this.put(key, value, { ifRevision: old?.revision ?? 0, ...limits() });
      } catch (error) {
        const isConflict = error instanceof errors.ConflictError || error instanceof errors.OtherEpochError;
        const pause = Math.random() * span;
        if (!isConflict || performance.now() + pause >= until) {
          throw error;
        }
        await sleep(pause, given.signal);
      }
    }
  }

  /** All entries that a pattern selects, in key order, in as many pages as it takes. */
  async getAll(pattern, options) {
    const { pageSize, ...given } = args.checkOptions(options, ['pageSize', ...LIMITS], 'getAll');
    const limit = args.checkCount(pageSize, 'pageSize', 1) ?? GET_PAGE;
    return allPages((page) => this.getPage(pattern, { ...page, ...given }), limit);
  }

  /** `{ items, more }`: some of the entries that a pattern selects. */
  async getPage(pattern, options) {
    const { request, given } = pageRequest('Get', pattern, options, 'getPage');
    return this.#read(request, given, (...answer) => entriesOf(answer));
  }

  /** All keys that a pattern selects, in key order, with their revisions. */
  async list(pattern, options) {
    const { pageSize, ...given } = args.checkOptions(options, ['pageSize', ...LIMITS], 'list');
    const limit = args.checkCount(pageSize, 'pageSize', 1) ?? LIST_PAGE;
    return allPages((page) => this.listPage(pattern, { ...page, ...given }), limit);
  }

  /** `{ items, more }`: some of the keys that a pattern selects. */
  async listPage(pattern, options) {
    const { request, given } = pageRequest('List', pattern, options, 'listPage');
    return this.#read(request, given, (kind, body, payload, epoch) => {
      const { keys, revisions } = keysOf('List', kind, body, epoch);
      return { items: keys.map((key, index) => ({ key, revision: revisions[index] })), more: body.more === true };
    });
  }

  /** `{ count, revision }`: how many keys were removed. */
  async delete(pattern, options) {
    const given = args.checkOptions(options, ['ifRevision', ...LIMITS], 'delete');
    const condition = conditionOf(given);
    if (condition === undefined) {
      checkPattern(pattern);
    } else {
      checkKey(pattern);
    }
    return this.#write(
      { type: 'Delete', key: pattern, if_revision: condition?.number },
      { condition, key: isWildcard(pattern) ? undefined : pattern },
      given,
      (body, epoch) =>
        body.status === 404
          ? { count: 0, revision: undefined }
          : { count: countOf(body.count), revision: revisionOf(body.revision, epoch) },
    );
  }

  /** Whether a pattern selects any key. */
  async exists(pattern, options) {
    checkPattern(pattern);
    const given = args.checkOptions(options, LIMITS, 'exists');
    return this.#read({ type: 'Exists', key: pattern }, given, (kind, body) => body.status === 200);
  }

  /** The server's figures. */
  async stats(options) {
    const given = args.checkOptions(options, LIMITS, 'stats');
    return this.#read({ type: 'Stats' }, given, (kind, body) => statsOf(kind, body));
  }

  /** The changes of what a pattern covers, or several do: an async iterator of events. */
  subscribe(pattern, options) {
    const given = args.checkOptions(options, ['snapshot', 'exact', 'signal'], 'subscribe');
    const patterns = Array.isArray(pattern) ? pattern : [pattern];
    patterns.forEach(checkPattern);
    if (patterns.length === 0) {
      throw new errors.InvalidKeyError('invalid key: no pattern is given');
    }
    const snapshot = args.checkFlag(given.snapshot, 'snapshot', true);
    const exact = args.checkFlag(given.exact, 'exact', false);
    const signal = args.checkSignal(given.signal);
    if (exact && patterns.some(isWildcard)) {
      throw new TypeError("'exact' goes with one key, not with a wildcard");
    }
    signal?.throwIfAborted();
    const timeout = this.#options.requestTimeout;
    const group = { knownLen: 0 };
    const begin = (one, sink) => this.#beginner({ pattern: one, exact, snapshot, group })(sink);
    return new Subscription(disjoint(patterns, exact), { timeout, signal }, begin);
  }

  /** The value of a key, always current. Returns when it is known. */
  async watch(key, options) {
    checkKey(key);
    return this.#watched(options, 'watch', () => new Watch(key, this.#beginner({ pattern: key, exact: true })));
  }

  /** All that a pattern covers, always current. Returns when it is known. */
  async watchBranch(pattern, options) {
    checkPattern(pattern);
    return this.#watched(options, 'watchBranch', () => new Branch(pattern, this.#beginner({ pattern, exact: false })));
  }

  /** Ends everything. Requests that wait fail, iterators end. */
  async close() {
    if (this.#state !== 'closed') {
      this.#state = 'closed';
      const closed = new ClosedError();
      this.#opening?.reject(closed);
      this.#attempt?.abort(closed);
      this.#hub.end(undefined);
      for (const request of [...this.#inFlight, ...this.#outbox]) {
        request.giveUp(closed);
      }
      this.#connection?.destroy(closed);
      this.#wake();
    }
    await this.#running;
  }

  async [Symbol.asyncDispose ?? Symbol.for('Symbol.asyncDispose')]() {
    await this.close();
  }

  /** What a subscription or watch calls to begin; it returns what ends it. */
  #beginner({ pattern, exact, snapshot = true, group }) {
    if (this.#state === 'closed') {
      throw new ClosedError();
    }
    return (sink) => {
      const lenMax = this.#options.subscriptionLenMax;
      const local = this.#hub.subscribe({ pattern, exact, snapshot, lenMax, sink, group });
      return () => this.#hub.unsubscribe(local);
    };
  }

  async #watched(options, where, make) {
    const given = args.checkOptions(options, LIMITS, where);
    const timeout = args.checkTime(given.timeout, 'timeout', this.#options.requestTimeout);
    args.checkSignal(given.signal)?.throwIfAborted();
    const watched = make();
    try {
      await watched.ready({ timeout, signal: given.signal });
    } catch (error) {
      watched.close();
      throw this.#explained(error);
    }
    return watched;
  }

  #read(fields, given, read) {
    return this.#request({ fields, isWrite: false }, given, (kind, body, payload, epoch) => {
      if (body.status !== 200 && body.status !== 404) {
        throw refusal(body);
      }
      return read(kind, body, payload, epoch);
    });
  }

  async #write(fields, { condition, bytes, key }, given, read) {
    const check = (connection) => {
      if (condition !== undefined && condition.number !== 0 && (condition.epoch ?? connection.epoch) !== connection.epoch) {
        return new errors.OtherEpochError();
      }
      if (bytes !== undefined && bytes.length > connection.valueLenMax) {
        const most = `the server takes ${connection.valueLenMax} at most`;
        return new RefusedError(413, `the value has ${bytes.length} bytes, and ${most}`);
      }
      return undefined;
    };
    // A copy, since the caller may change the bytes meanwhile.
    const value = bytes === undefined ? undefined : Buffer.from(bytes);
    let revision;
    if (key !== undefined) {
      this.#hub.ownBegun(key);
    }
    try {
      return await this.#request({ fields, value, isWrite: true, check }, given, (kind, body, payload, epoch) => {
        if (body.status === 409) {
          throw new errors.ConflictError(revisionOf(body.revision ?? 0, epoch));
        }
        if (body.status === 503) {
          throw new OutcomeUnknownError(`the server says 503: ${body.message}`);
        }
        if (body.status !== 200 && !(body.status === 404 && fields.type === 'Delete')) {
          throw refusal(body);
        }
        const result = read(body, epoch);
        if (body.status === 200 && key !== undefined) {
          revision = revisionOf(body.revision, epoch);
          this.#hub.ownDone(key, revision, value);
        }
        return result;
      });
    } finally {
      if (key !== undefined && revision === undefined) {
        this.#hub.ownDone(key, undefined, undefined);
      }
    }
  }

  /** Sends a request when there is a connection with room; `read` makes the result of the answer. */
  #request({ fields, value, isWrite, check }, { timeout, signal }, read) {
    const ms = args.checkTime(timeout, 'timeout', this.#options.requestTimeout);
    args.checkSignal(signal)?.throwIfAborted();
    if (this.#state === 'closed') {
      throw new ClosedError();
    }
    return new Promise((resolve, reject) => {
      const id = this.#nextId;
      this.#nextId += 1;
      const head = Buffer.from(`${JSON.stringify({ ...fields, id })}\n`);
      const bytes = value === undefined ? head : Buffer.concat([head, value, NEWLINE]);
      const settle = (end, result) => {
        stopTimer();
        stopSignal();
        this.#outbox.delete(request);
        this.#inFlight.delete(request);
        end(result);
      };
      const request = {
        id,
        bytes,
        isWrite,
        isSent: false,
        check: check ?? (() => undefined),
        reject: (error) => settle(reject, error),
        giveUp: (error) => {
          if (request.isSent) {
            this.#connection?.forget(id);
          }
          const isUnknown = isWrite && request.isSent;
          settle(reject, isUnknown ? unknown(error) : error);
        },
        answer: (kind, body, payload, epoch) => {
          let result;
          try {
            result = read(kind, body, payload, epoch);
          } catch (error) {
            const isBroken = !(error instanceof errors.NkvError) || error instanceof ProtocolError;
            settle(reject, isBroken && isWrite ? unknown(error) : error);
            if (isBroken) {
              throw error; // it ends the connection
            }
            return;
          }
          settle(resolve, result);
        },
      };
      const stopTimer = args.after(ms, () => request.giveUp(this.#explained(new TimeoutError(`no answer within ${ms} ms`))));
      const stopSignal = args.onAbort(signal, request.giveUp);
      this.#outbox.add(request);
      this.#pumpSoon();
    });
  }

  /** Adds to a time-out why there is no connection. */
  #explained(error) {
    if (error instanceof TimeoutError && this.#connection === undefined && this.#lastError !== undefined) {
      return new TimeoutError(`${error.message}: ${this.#lastError.message}`, { cause: this.#lastError });
    }
    return error;
  }

  #pumpSoon() {
    if (!this.#isPumping) {
      this.#isPumping = true;
      process.nextTick(() => {
        this.#isPumping = false;
        this.#pump();
      });
    }
  }

  #pump() {
    const connection = this.#connection;
    if (connection === undefined || this.#outbox.size === 0) {
      return;
    }
    connection.cork();
    for (const request of this.#outbox) {
      if (!connection.hasRoom) {
        break;
      }
      this.#outbox.delete(request);
      const error = request.check(connection);
      if (error === undefined) {
        request.isSent = true;
        this.#inFlight.add(request);
        const { epoch } = connection;
        connection.send(request.id, request.bytes, (kind, body, payload) => request.answer(kind, body, payload, epoch));
      } else {
        request.reject(error);
      }
    }
    connection.uncork();
  }

  /** Connects again and again until the client is closed. It never throws. */
  async #run() {
    const { backoffMin, backoffMax } = this.#options;
    let span = backoffMin;
    while (this.#state !== 'closed') {
      let lived = 0;
      try {
        const connection = await this.#open();
        const begun = performance.now();
        this.#lastError = await this.#serve(connection);
        lived = performance.now() - begun;
      } catch (error) {
        this.#lastError = error;
      }
      if (this.#state === 'closed') {
        break;
      }
      span = lived >= LASTED_MS ? backoffMin : span;
      const pause = span * (0.5 + Math.random() / 2);
      span = Math.min(2 * span, backoffMax);
      if (this.#opening !== undefined && performance.now() + pause > this.#opening.until) {
        this.#opening.reject(this.#lastError);
      }
      await new Promise((resolve) => {
        const stop = args.after(pause, resolve);
        this.#wake = () => {
          stop();
          resolve();
        };
      });
    }
  }

  async #open() {
    const attempt = new AbortController();
    this.#attempt = attempt;
    const { connectTimeout, lookup, messageLenMax, clientUuid, name, token } = this.#options;
    const stop = args.after(connectTimeout, () => attempt.abort(new Error(`no answer within ${connectTimeout} ms`)));
    let connection;
    try {
      const socket = await dial(this.#address, lookup, attempt.signal);
      connection = new Connection(socket, messageLenMax);
      attempt.signal.throwIfAborted();
      attempt.signal.addEventListener('abort', () => connection.destroy(attempt.signal.reason), { once: true });
      const seen = this.#seen && `${this.#seen.epoch}-${this.#seen.revision}`;
      await connection.greet({ client_uuid: clientUuid, name, token, seen });
      return connection;
    } catch (error) {
      connection?.destroy(error);
      throw new CannotConnectError(`cannot connect to ${this.address}: ${error?.message ?? error}`, { cause: error });
    } finally {
      stop();
      this.#attempt = undefined;
    }
  }

  /** Uses a connection until it ends; returns why it did. */
  #serve(connection) {
    return new Promise((resolve) => {
      if (this.#state === 'closed') {
        connection.destroy(new ClosedError());
        resolve(undefined);
        return;
      }
      this.#connection = connection;
      this.#state = 'connected';
      this.#opening?.resolve();
      this.#opening = undefined;
      if (connection.beginsAnew || this.#seen?.epoch !== connection.epoch) {
        this.#seen = undefined;
      }
      this.#hub.attach(connection);
      connection.attach({
        heartbeat: this.#options.heartbeat,
        onNotification: (kind, body, payload) => this.#hub.notification(kind, body, payload),
        onDrain: () => this.#pump(),
        onEnd: (error) => {
          this.#noteSeen(connection);
          this.#lost(error);
          resolve(error);
        },
      });
      this.#pump();
    });
  }

  #noteSeen({ epoch, revision }) {
    if (epoch !== '' && revision !== undefined) {
      this.#seen = { epoch, revision: Math.max(revision, this.#seen?.revision ?? 0) };
    }
  }

  /** Of what was sent, reads are repeated; of writes it is not known what became of them. */
  #lost(error) {
    this.#connection = undefined;
    if (this.#state !== 'closed') {
      this.#state = 'reconnecting';
    }
    this.#lastError = error;
    this.#hub.detach();
    const again = [];
    for (const request of [...this.#inFlight]) {
      if (request.isWrite) {
        request.giveUp(error);
      } else {
        request.isSent = false;
        again.push(request);
      }
    }
    this.#inFlight.clear();
    this.#outbox = new Set([...again, ...this.#outbox]);
  }
}

const NEWLINE = Buffer.from('\n');

function clientOptions(options) {
  const given = args.checkOptions(options, CLIENT_OPTIONS, 'a client');
  const name = args.checkText(given.name, 'name', 256);
  if (name !== undefined && /\p{Cc}/u.test(name)) {
    throw new TypeError("'name' has control characters");
  }
  if (given.lookup !== undefined && typeof given.lookup !== 'function') {
    throw new TypeError("'lookup' is a function, such as dns.lookup");
  }
  // A pause of nothing would never grow, and one without end would never be over.
  const backoffMin = Math.min(Math.max(1, args.checkTime(given.backoffMin, 'backoffMin', 50)), BACKOFF_LONGEST_MS);
  return {
    name,
    lookup: given.lookup,
    clientUuid: args.checkText(given.clientUuid, 'clientUuid', 1024) ?? randomUUID(),
    token: args.checkText(given.token, 'token', 4096),
    requestTimeout: args.checkTime(given.requestTimeout, 'requestTimeout', 5_000),
    connectTimeout: args.checkTime(given.connectTimeout, 'connectTimeout', 5_000),
    heartbeat: Math.max(1, args.checkTime(given.heartbeat, 'heartbeat', 15_000)),
    backoffMin,
    backoffMax: Math.min(Math.max(backoffMin, args.checkTime(given.backoffMax, 'backoffMax', 5_000)), BACKOFF_LONGEST_MS),
    messageLenMax: args.checkCount(given.messageLenMax, 'messageLenMax', 1) ?? 80 * 1024 * 1024,
    subscriptionLenMax: args.checkCount(given.subscriptionLenMax, 'subscriptionLenMax', 1) ?? 1024 * 1024 * 1024,
  };
}

/** The condition of a write: undefined if there is none; a number is taken for one of the present epoch. */
function conditionOf(given) {
  if (!Object.hasOwn(given, 'ifRevision')) {
    return undefined;
  }
  const { ifRevision } = given;
  if (ifRevision instanceof Revision) {
    return ifRevision;
  }
  if (!Number.isSafeInteger(ifRevision) || ifRevision < 0) {
    // Also undefined: a condition must not be dropped silently.
    throw new TypeError("'ifRevision' is a Revision, or 0 for an absent key");
  }
  return { number: ifRevision, epoch: undefined };
}

function pageRequest(type, pattern, options, where) {
  const { limit, after, ...given } = args.checkOptions(options, ['limit', 'after', ...LIMITS], where);
  checkPattern(pattern);
  args.checkCount(limit, 'limit', 1);
  if (after !== undefined) {
    checkKey(after);
  }
  return { request: { type, key: pattern, limit, after }, given };
}

async function allPages(ask, pageSize) {
  const all = [];
  for (let limit = pageSize; ; ) {
    try {
      const { items, more } = await ask({ limit, after: all.at(-1)?.key });
      for (const item of items) {
        all.push(item);
      }
      if (!more || items.length === 0) {
        return all;
      }
      limit = Math.min(2 * limit, pageSize);
    } catch (error) {
      if (!(error instanceof RefusedError) || error.status !== 413 || limit === 1) {
        throw error;
      }
      // The values are larger than expected: fewer at a time.
      limit = Math.max(1, Math.floor(limit / 4));
    }
  }
}

function keysOf(expected, kind, body, epoch) {
  const { keys, revisions } = body;
  const isWhole =
    kind === expected &&
    Array.isArray(keys) &&
    keys.every((key) => typeof key === 'string') &&
    Array.isArray(revisions) &&
    keys.length === revisions.length;
  if (!isWhole) {
    throw new ProtocolError(`the answer of the server is not one to '${expected}'`);
  }
  return { keys, revisions: revisions.map((number) => revisionOf(number, epoch)) };
}

function entriesOf([kind, body, payload, epoch]) {
  const { keys, revisions } = keysOf('Get', kind, body, epoch);
  const values = valuesOf(body, payload, keys.length);
  const items = keys.map((key, index) => new Entry(key, values[index], revisions[index]));
  return { items, more: body.more === true };
}

function revisionOf(number, epoch) {
  if (!Number.isSafeInteger(number) || number < 0) {
    throw new ProtocolError('an answer of the server has no revision');
  }
  return new Revision(number, epoch);
}

function countOf(count) {
  return Number.isSafeInteger(count) ? count : 0;
}

const FIGURES = {
  keys: 'keys',
  valueBytes: 'value_bytes',
  subscriptions: 'subscriptions',
  connections: 'connections',
  revision: 'revision',
  uptimeMs: 'uptime_ms',
  puts: 'puts',
  deletes: 'deletes',
  expired: 'expired',
  batches: 'batches',
  failedBatches: 'failed_batches',
  notified: 'notified',
  conflated: 'conflated',
};

/** Figures that a server does not have are 0. */
function statsOf(kind, body) {
  const { epoch = '', durability = '' } = body;
  const numbers = Object.entries(FIGURES).map(([name, field]) => [name, body[field] ?? 0]);
  const isWhole = typeof epoch === 'string' && typeof durability === 'string' && numbers.every(([, value]) => value >= 0);
  if (kind !== 'Stats' || !isWhole || numbers.some(([, value]) => typeof value !== 'number')) {
    throw new ProtocolError("the answer of the server is not one to 'Stats'");
  }
  return { epoch, durability, ...Object.fromEntries(numbers) };
}

/** Waits; the signal's reason is thrown if it fires. */
async function sleep(ms, signal) {
  let stop = () => {};
  let stopSignal = () => {};
  try {
    await new Promise((resolve, reject) => {
      stop = args.after(ms, resolve);
      stopSignal = args.onAbort(signal, reject);
    });
  } finally {
    stop();
    stopSignal();
  }
}

function refusal(body) {
  return new RefusedError(body.status, `the server says ${body.status}: ${body.message}`);
}

function unknown(cause) {
  const why = cause instanceof Error ? cause.message : String(cause);
  return new OutcomeUnknownError(`the write may or may not have taken effect: ${why}`, { cause });
}

module.exports = { Client };
