'use strict';

const { after, checkOptions, checkSignal, checkTime, onAbort } = require('./args.js');
const { ClosedError, TimeoutError } = require('./errors.js');
const { Queue } = require('./queue.js');

/** Waits for something of a subscription or watch, within limits that end the wait alone. */
function waitFor(waiters, { timeout, signal }, what) {
  return new Promise((resolve, reject) => {
    const waiter = {};
    const settle = (end) => (result) => {
      stopTimer();
      stopSignal();
      end(result);
    };
    const giveUp = (error) => {
      waiters.delete(waiter);
      waiter.reject(error);
    };
    waiter.resolve = settle(resolve);
    waiter.reject = settle(reject);
    const stopTimer = after(timeout, () => giveUp(new TimeoutError(`${what} did not come within ${timeout} ms`)));
    const stopSignal = onAbort(signal, giveUp);
    waiters.add(waiter);
  });
}

function limits(options, where, fallback) {
  const { timeout, signal } = checkOptions(options, ['timeout', 'signal'], where);
  checkSignal(signal)?.throwIfAborted();
  return { timeout: checkTime(timeout, 'timeout', fallback), signal };
}

/** The events of a subscription, to one pattern or several: an async iterator. Its end, by `break` or `close()`, unsubscribes. */
class Subscription {
  #queue = new Queue();
  #waiters = new Set();
  #readyWaiters = new Set();
  /** Of each pattern, whether the server has accepted it, and the revision that it was synced with on this connection. */
  #parts;
  #isLost = false;
  #isEnded = false;
  #error;
  #timeout;
  #leave;
  #stopSignal = () => {};

  /** `begin` takes a pattern and what the hub calls for it, and returns what unsubscribes. */
  constructor(patterns, { timeout, signal }, begin) {
    this.patterns = Object.freeze([...patterns]);
    this.#timeout = timeout;
    this.#parts = patterns.map(() => ({ isAccepted: false, synced: undefined }));
    const leaves = patterns.map((pattern, index) => begin(pattern, this.#sink(this.#parts[index])));
    this.#leave = () => {
      this.#stopSignal();
      leaves.forEach((leave) => leave());
    };
    if (!this.#isEnded) {
      this.#stopSignal = onAbort(signal, (reason) => this.#finish(reason));
    }
  }

  /** What it covers; of several patterns, the first. */
  get pattern() {
    return this.patterns[0];
  }

  /** How many events wait to be read. */
  get waiting() {
    return this.#queue.size;
  }

  /** Waits until the server has accepted the subscription: from then on, no change is missed. */
  async ready(options) {
    const { timeout, signal } = limits(options, 'ready', this.#timeout);
    if (this.#parts.every(({ isAccepted }) => isAccepted)) {
      return;
    }
    if (this.#isEnded) {
      throw this.#error ?? closed();
    }
    await waitFor(this.#readyWaiters, { timeout, signal }, 'the answer to the subscription');
  }

  /** The next event, or undefined at the end. A time-out or signal ends this wait alone, and loses no event. */
  async take(options) {
    const { timeout, signal } = limits(options, 'take', Infinity);
    if (this.#waiters.size === 0) {
      const event = this.#queue.take();
      if (event !== undefined) {
        return event;
      }
      if (this.#isEnded) {
        return this.#end();
      }
    }
    return waitFor(this.#waiters, { timeout, signal }, 'an event');
  }

  async next() {
    const value = await this.take();
    return value === undefined ? { done: true, value } : { done: false, value };
  }

  async return(value) {
    this.close();
    return { done: true, value };
  }

  /** Unsubscribes, and ends the iterator. */
  close() {
    this.#queue.clear();
    this.#finish(undefined);
    this.#error = undefined;
  }

  [Symbol.asyncIterator]() {
    return this;
  }

  #sink(part) {
    const subscription = this;
    return {
      isWatch: false,
      get len() {
        return subscription.#queue.len;
      },
      update: (entry, skipped, isNew) => {
        const { key, value, revision } = entry;
        const event = { type: 'update', key, value: Buffer.from(value), revision, skipped };
        this.#post(() => this.#queue.change(event, isNew));
      },
      gone: (key, revision, reason, skipped) => {
        this.#post(() => this.#queue.change({ type: 'gone', key, revision, reason, skipped }, false));
      },
      synced: (revision, isSilent) => {
        part.synced = revision;
        if (!isSilent && this.#parts.every(({ synced }) => synced !== undefined)) {
          this.#synced();
        }
      },
      lost: (isAccepted) => {
        part.synced = undefined;
        if (isAccepted && !this.#isLost) {
          this.#isLost = true;
          this.#post(() => this.#queue.connection({ type: 'reconnecting' }));
        }
      },
      connected: (epoch, isAccepted) => {
        if (isAccepted && this.#isLost) {
          this.#isLost = false;
          this.#post(() => this.#queue.connection({ type: 'connected', epoch }));
        }
      },
      accepted: () => {
        part.isAccepted = true;
        if (this.#parts.every(({ isAccepted }) => isAccepted)) {
          settleAll(this.#readyWaiters, ({ resolve }) => resolve());
        }
      },
      end: (error) => this.#finish(error),
    };
  }

  /** All patterns are synced, up to the lowest of their revisions. */
  #synced() {
    const revisions = this.#parts.map(({ synced }) => synced);
    const revision = revisions.reduce((lowest, other) => (other.number < lowest.number ? other : lowest));
    this.#post(() => this.#queue.synced({ type: 'synced', revision }));
  }

  #post(add) {
    if (this.#isEnded) {
      return;
    }
    add();
    while (this.#waiters.size > 0 && this.#queue.size > 0) {
      const [waiter] = this.#waiters;
      this.#waiters.delete(waiter);
      waiter.resolve(this.#queue.take());
    }
  }

  /** No more events come: those that wait can still be read, then the error, once. */
  #finish(error) {
    if (this.#isEnded) {
      return;
    }
    this.#isEnded = true;
    this.#error = error;
    // At the end of a constructor that failed there is nothing to leave yet.
    this.#leave?.();
    settleAll(this.#readyWaiters, ({ reject }) => reject(error ?? closed()));
    for (const waiter of this.#waiters) {
      this.#waiters.delete(waiter);
      if (this.#error === undefined) {
        waiter.resolve(undefined);
      } else {
        waiter.reject(this.#error);
        this.#error = undefined;
      }
    }
  }

  #end() {
    const error = this.#error;
    this.#error = undefined;
    if (error !== undefined) {
      throw error;
    }
    return undefined;
  }
}

function closed() {
  return new ClosedError('the subscription is closed');
}

function settleAll(waiters, settle) {
  const all = [...waiters];
  waiters.clear();
  all.forEach(settle);
}

module.exports = { Subscription, limits, settleAll, waitFor };
