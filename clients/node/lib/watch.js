'use strict';

const { limits, settleAll, waitFor } = require('./subscription.js');
const { ClosedError } = require('./errors.js');
const { Entry } = require('./entry.js');

/** What the watch of a key and that of a branch share. */
class Watched {
  #waiters = new Set();
  #liveWaiters = new Set();
  #version = 0;
  #leave;
  #isEnded = false;
  /** Whether it is known to be current: not while the connection is lost, nor after the end. */
  live = false;
  /** Why it has ended, if not by `close()`. */
  error = undefined;
  /** Up to this revision the last snapshot had all changes. */
  revision = undefined;

  constructor(entries, begin) {
    let len = 0;
    const set = (key, entry) => {
      len += (entry?.value.length ?? 0) - (entries.get(key)?.value.length ?? 0);
      if (entry === undefined) {
        entries.delete(key);
      } else {
        entries.set(key, entry);
      }
      this.#changed();
    };
    this.#leave = begin({
      isWatch: true,
      get len() {
        return len;
      },
      update: ({ key, value, revision }) => set(key, new Entry(key, ownBytes(value), revision)),
      gone: (key) => set(key, undefined),
      synced: (revision) => {
        this.revision = revision;
        this.live = true;
        settleAll(this.#liveWaiters, ({ resolve }) => resolve());
        this.#changed();
      },
      lost: () => {
        if (this.live) {
          this.live = false;
          this.#changed();
        }
      },
      connected: () => {},
      accepted: () => {},
      end: (error) => this.#finish(error),
    });
  }

  /** Waits until it is current. */
  async ready(options) {
    const wait = limits(options, 'ready', Infinity);
    if (this.#isEnded) {
      throw this.error ?? new ClosedError('the watch is closed');
    }
    if (!this.live) {
      await waitFor(this.#liveWaiters, wait, 'the present state');
    }
  }

  /** Yields at once, and again after changes: one time for all that came meanwhile. `live` counts as a change. */
  async *changes(options) {
    const { signal } = limits(options, 'changes', Infinity);
    for (let seen = -1; !this.#isEnded; ) {
      if (seen === this.#version) {
        await waitFor(this.#waiters, { timeout: Infinity, signal }, 'a change');
        continue;
      }
      seen = this.#version;
      yield this;
    }
    if (this.error !== undefined) {
      throw this.error;
    }
  }

  /** Ends it. What it holds stays as it is. */
  close() {
    this.#finish(undefined);
  }

  #changed() {
    this.#version += 1;
    settleAll(this.#waiters, ({ resolve }) => resolve());
  }

  #finish(error) {
    if (this.#isEnded) {
      return;
    }
    this.#isEnded = true;
    this.live = false;
    this.error = error;
    this.#leave?.();
    settleAll(this.#liveWaiters, ({ reject }) => reject(error ?? new ClosedError('the watch is closed')));
    settleAll(this.#waiters, ({ resolve }) => resolve());
  }
}

/** A value that is kept for long must not keep the memory around it. */
function ownBytes(value) {
  const own = Buffer.allocUnsafeSlow(value.length);
  value.copy(own);
  return own;
}

/** The present value of one key. */
class Watch extends Watched {
  #entries;

  constructor(key, begin) {
    const entries = new Map();
    super(entries, begin);
    this.#entries = entries;
    this.key = key;
  }

  /** Undefined if the key is absent. */
  get entry() {
    return this.#entries.get(this.key);
  }

  /** Undefined if the key is absent. */
  get value() {
    return this.entry?.value;
  }
}

/** The present entries of a branch: a map that is only read, in no particular order. */
class Branch extends Watched {
  #entries;

  constructor(pattern, begin) {
    const entries = new Map();
    super(entries, begin);
    this.#entries = entries;
    this.pattern = pattern;
  }

  get size() {
    return this.#entries.size;
  }

  get(key) {
    return this.#entries.get(key);
  }

  has(key) {
    return this.#entries.has(key);
  }

  keys() {
    return this.#entries.keys();
  }

  values() {
    return this.#entries.values();
  }

  entries() {
    return this.#entries.entries();
  }

  forEach(callback, thisArg) {
    for (const [key, entry] of this.#entries) {
      callback.call(thisArg, entry, key, this);
    }
  }

  [Symbol.iterator]() {
    return this.#entries.entries();
  }
}

module.exports = { Watch, Branch };
