'use strict';

// Who within this client is notified of what. Local subscriptions to one pattern share one subscription at the server,
// which knows it by client and pattern. Each local one keeps what it was sent: the revision of each key. So after a lost
// connection, only what is new is delivered, and what is missing from the new snapshot is gone.

const { EndedError, ProtocolError, RefusedError, TOO_MANY, UNAVAILABLE } = require('./errors.js');
const { covers, isWildcard, patternsOf } = require('./key.js');
const { EVENT_LEN } = require('./queue.js');
const { Entry, Revision } = require('./entry.js');
const { valueOf } = require('./reader.js');

/** A refusal that time may cure is followed by another try after so long, then after twice that. */
const RETRY_MIN_MS = 100;
const RETRY_MAX_MS = 10_000;

/**
 * A pattern of a subscription of the program. Its sink receives what happens, and copies the values that it keeps. `group` is
 * `{ knownLen }`: what the keys take that the subscription knows, those of its other patterns too.
 */
class Local {
  constructor({ pattern, exact, snapshot, lenMax, sink, group = { knownLen: 0 } }) {
    this.pattern = pattern;
    this.exact = exact || isWildcard(pattern);
    this.snapshot = snapshot;
    this.lenMax = lenMax;
    this.sink = sink;
    /** The revisions, as numbers, of the keys that exist as far as it was sent. */
    this.known = new Map();
    this.group = group;
    this.epoch = undefined;
    /** Of these, those that the snapshot under way has not had yet. */
    this.unseen = undefined;
    this.isJoined = false;
    this.isSynced = false;
    this.isAccepted = false;
    /** Without a snapshot, what was there before is passed over. */
    this.isSilent = !snapshot;
  }

  beginSnapshot(epoch) {
    if (epoch !== this.epoch) {
      // Revisions of another epoch say nothing: everything is delivered again.
      this.epoch = epoch;
      for (const key of this.known.keys()) {
        this.known.set(key, 0);
      }
    }
    this.unseen = new Set(this.known.keys());
    this.isJoined = true;
    if (this.snapshot) {
      this.#accept();
    }
  }

  update(entry, skipped) {
    const { key } = entry;
    if (!this.isJoined || !covers(this.pattern, key, this.exact)) {
      return;
    }
    this.unseen?.delete(key);
    const known = this.known.get(key);
    if (known !== undefined && known >= entry.revision.number) {
      return;
    }
    if (known === undefined) {
      this.group.knownLen += key.length + EVENT_LEN;
    }
    this.known.set(key, entry.revision.number);
    if (!this.isSilent) {
      this.sink.update(entry, skipped, known === undefined);
    }
  }

  gone(key, revision, reason, skipped) {
    const known = this.isJoined ? this.known.get(key) : undefined;
    if (known === undefined || known > revision.number) {
      return;
    }
    this.known.delete(key);
    this.group.knownLen -= key.length + EVENT_LEN;
    if (!this.isSilent) {
      this.sink.gone(key, revision, reason, skipped);
    }
  }

  endSnapshot(revision) {
    if (this.unseen === undefined) {
      return;
    }
    for (const key of this.unseen) {
      // Whatever revision was seen: it may be of another epoch.
      this.known.set(key, 0);
      this.gone(key, revision, 'missed', 0);
    }
    this.unseen = undefined;
    const wasSilent = this.isSilent;
    this.isSilent = false;
    this.#accept();
    if (!this.isSynced) {
      this.isSynced = true;
      this.sink.synced(revision, wasSilent);
    }
  }

  lost() {
    this.unseen = undefined;
    this.isJoined = false;
    this.isSynced = false;
    this.sink.lost(this.isAccepted);
  }

  /** Revisions from before say nothing any more, as in another epoch. */
  beginAnew() {
    this.epoch = undefined;
  }

  connected(epoch) {
    this.sink.connected(epoch, this.isAccepted);
  }

  get isTooLarge() {
    return this.group.knownLen + this.sink.len > this.lenMax;
  }

  #accept() {
    if (!this.isAccepted) {
      this.isAccepted = true;
      this.sink.accepted();
    }
  }
}

/** A subscription at the server. */
class Wire {
  constructor(pattern) {
    this.pattern = pattern;
    this.locals = new Set();
    /** Whether the server takes it for one to the key alone. */
    this.exact = false;
    /** Whether a snapshot has begun on this connection; before that, changes are none of its business. */
    this.isLive = false;
    this.isAsked = false;
    /** The number of the revision up to which the last snapshot has all changes. */
    this.has = 0;
    this.epoch = undefined;
    this.retry = undefined;
    this.retryMs = RETRY_MIN_MS;
  }

  get wantsExact() {
    return !isWildcard(this.pattern) && [...this.locals].every((local) => local.exact);
  }

  /** The local subscriptions that a snapshot of this extent is whole for. */
  served() {
    return [...this.locals].filter((local) => local.exact || !this.exact);
  }
}

class Hub {
  #wires = new Map();
  #connection;
  /** The subscription whose snapshot is under way. */
  #filling;
  /** Keys with writes of this client under way: how many, and the number of the last revision at which the key had gone. */
  #own = new Map();

  subscribe(options) {
    const local = new Local(options);
    let wire = this.#wires.get(local.pattern);
    if (wire === undefined) {
      wire = new Wire(local.pattern);
      this.#wires.set(local.pattern, wire);
    }
    wire.locals.add(local);
    this.#ask(wire);
    return local;
  }

  unsubscribe(local) {
    const wire = this.#wires.get(local.pattern);
    if (wire === undefined || !wire.locals.delete(local) || wire.locals.size > 0) {
      return;
    }
    this.#wires.delete(wire.pattern);
    clearTimeout(wire.retry);
    if (this.#connection !== undefined && (wire.isLive || wire.isAsked)) {
      this.#connection.ask({ type: 'Unsubscribe', key: wire.pattern }, () => {});
    }
  }

  attach(connection) {
    this.#connection = connection;
    connection.cork();
    for (const wire of [...this.#wires.values()]) {
      if (connection.beginsAnew) {
        wire.locals.forEach((local) => local.beginAnew());
      }
      wire.locals.forEach((local) => local.connected(connection.epoch));
      this.#ask(wire);
    }
    connection.uncork();
  }

  detach() {
    this.#connection = undefined;
    this.#filling = undefined;
    // The next connection may be to data of another epoch.
    for (const own of this.#own.values()) {
      own.gone = 0;
    }
    for (const wire of this.#wires.values()) {
      wire.isLive = false;
      wire.isAsked = false;
      clearTimeout(wire.retry);
      wire.retry = undefined;
      wire.locals.forEach((local) => local.lost());
    }
  }

  /** Ends everything; without an error it is the orderly end. */
  end(error) {
    const wires = [...this.#wires.values()];
    this.#wires.clear();
    for (const wire of wires) {
      clearTimeout(wire.retry);
      wire.locals.forEach((local) => local.sink.end(error));
      wire.locals.clear();
    }
  }

  /** A write of this client to a key begins; `ownDone` must follow. */
  ownBegun(key) {
    const own = this.#own.get(key);
    if (own === undefined) {
      this.#own.set(key, { count: 1, gone: 0 });
    } else {
      own.count += 1;
    }
  }

  /**
   * A write of this client has ended, and if it was done, has this revision. Watches are never older than such a write,
   * also where the server conflated its notification with that of a later change.
   */
  ownDone(key, revision, value) {
    const own = this.#own.get(key);
    own.count -= 1;
    if (own.count === 0) {
      this.#own.delete(key);
    }
    if (revision === undefined || own.gone > revision.number) {
      return;
    }
    for (const wire of this.#live(key)) {
      if (revision.number > wire.has && revision.epoch === wire.epoch) {
        const watches = [...wire.locals].filter((local) => local.sink.isWatch);
        for (const local of watches) {
          if (value === undefined) {
            local.gone(key, revision, 'deleted', 0);
          } else {
            local.update(new Entry(key, value, revision), 0);
          }
          this.#limit(local);
        }
      }
    }
  }

  /** Takes a message that answers nothing. One that is not known is passed over. */
  notification(kind, body, payload) {
    const { key } = body;
    if (typeof key !== 'string') {
      return;
    }
    if (kind === 'Update') {
      this.#update(body, body.len === undefined ? valueOf(body.value) : payload);
    } else if (kind === 'Close' && (body.reason === 'deleted' || body.reason === 'expired')) {
      this.#gone(key, this.#revision(body), body.reason, countOf(body.skipped));
    } else if (kind === 'Close' && (body.reason === 'unsubscribed' || body.reason === 'replaced')) {
      this.#closed(key, body.reason);
    } else if (kind === 'Synced') {
      this.#synced(key, this.#revision(body));
    } else if (kind === 'Reset') {
      const wire = this.#wires.get(key);
      if (wire !== undefined && wire.isLive) {
        this.#begin(wire);
      } else {
        this.#filling = { pattern: key }; // of one that was given up
      }
    }
  }

  #revision(body) {
    if (!Number.isSafeInteger(body.revision) || body.revision < 0) {
      throw new ProtocolError('a notification of the server has no revision');
    }
    return new Revision(body.revision, this.#connection.epoch);
  }

  /** The live subscriptions at the server that cover a key. */
  #live(key) {
    if (this.#wires.size > 16) {
      return patternsOf(key)
        .map((pattern) => this.#wires.get(pattern))
        .filter((wire) => wire !== undefined && wire.isLive);
    }
    return [...this.#wires.values()].filter((wire) => wire.isLive && covers(wire.pattern, key, wire.exact));
  }

  /** Asks the server for a snapshot and what follows it. */
  #ask(wire) {
    if (this.#connection === undefined || wire.isAsked || wire.retry !== undefined || this.#filling === wire) {
      return;
    }
    wire.isAsked = true;
    const exact = wire.wantsExact && this.#connection.features.includes('exact');
    const fields = { key: wire.pattern, snapshot: true, ...(exact ? { exact } : {}) };
    const onHello = () => {
      wire.isAsked = false;
      wire.retryMs = RETRY_MIN_MS;
      wire.exact = exact;
      this.#begin(wire);
    };
    this.#connection.subscribe(fields, onHello, (body) => this.#refused(wire, body));
  }

  #begin(wire) {
    this.#filling = wire;
    wire.epoch = this.#connection.epoch;
    wire.isLive = true;
    wire.has = 0;
    wire.served().forEach((local) => local.beginSnapshot(wire.epoch));
  }

  #update(body, value) {
    const { key } = body;
    const revision = this.#revision(body);
    const skipped = countOf(body.skipped);
    const isSnapshot = this.#filling !== undefined;
    for (const wire of isSnapshot ? [this.#filling] : this.#live(key)) {
      // What came before the end of the last snapshot is in it, unless it has gone meanwhile.
      if (wire.locals !== undefined && (isSnapshot || revision.number > wire.has)) {
        for (const local of [...wire.locals]) {
          local.update(new Entry(key, value, revision), skipped);
          this.#limit(local);
        }
      }
    }
  }

  #gone(key, revision, reason, skipped) {
    const own = this.#own.get(key);
    if (own !== undefined) {
      own.gone = Math.max(own.gone, revision.number);
    }
    for (const wire of this.#live(key)) {
      for (const local of [...wire.locals]) {
        local.gone(key, revision, reason, skipped);
        this.#limit(local);
      }
    }
  }

  #synced(pattern, revision) {
    const wire = this.#filling;
    if (wire?.pattern !== pattern) {
      return;
    }
    this.#filling = undefined;
    if (this.#wires.get(pattern) !== wire) {
      return; // it was given up meanwhile
    }
    wire.has = revision.number;
    for (const local of [...wire.locals]) {
      local.endSnapshot(revision);
      this.#limit(local);
    }
    if ([...wire.locals].some((local) => !local.isJoined)) {
      this.#ask(wire);
    }
  }

  /** A subscription at the server has ended: by this client's own request, or by another with this one's name. */
  #closed(pattern, reason) {
    if (this.#filling?.pattern === pattern) {
      this.#filling = undefined;
    }
    if (this.#connection.isSubscribing(pattern)) {
      return; // the subscription here is a later one
    }
    const wire = this.#wires.get(pattern);
    if (wire !== undefined && wire.isLive) {
      this.#wires.delete(pattern);
      const message = `the subscription to '${pattern}' was ${reason} by a client with the same name`;
      wire.locals.forEach((local) => local.sink.end(new EndedError(reason, message)));
      wire.locals.clear();
    }
  }

  #refused(wire, body) {
    wire.isAsked = false;
    if (this.#wires.get(wire.pattern) !== wire) {
      return;
    }
    const { status } = body;
    const mayBeCured = status === TOO_MANY || status === UNAVAILABLE;
    const error = new RefusedError(status, `the server says ${status}: ${body.message}`);
    for (const local of [...wire.locals]) {
      // One that was accepted once goes on, and waits for room at the server.
      if (!local.isJoined && !(mayBeCured && local.isAccepted)) {
        wire.locals.delete(local);
        local.sink.end(error);
      }
    }
    if (wire.locals.size === 0) {
      this.#wires.delete(wire.pattern);
      return;
    }
    if ([...wire.locals].some((local) => !local.isJoined)) {
      const pause = wire.retryMs * (0.5 + Math.random() / 2);
      wire.retryMs = Math.min(2 * wire.retryMs, RETRY_MAX_MS);
      wire.retry = setTimeout(() => {
        wire.retry = undefined;
        this.#ask(wire);
      }, pause);
    }
  }

  /** Ends a subscription that would hold more than its limit. */
  #limit(local) {
    if (local.isTooLarge) {
      this.unsubscribe(local);
      const message = `the subscription to '${local.pattern}' needs more than ${local.lenMax} bytes`;
      local.sink.end(new EndedError('too-much', message));
    }
  }
}

function countOf(skipped) {
  return Number.isSafeInteger(skipped) && skipped > 0 ? skipped : 0;
}

module.exports = { Hub };
