'use strict';

// The backlog of one subscription: at most one event for each key, and two more.

const SYNCED = Symbol('synced');
const CONNECTION = Symbol('connection');

/** What an event takes besides its key and value, about. */
const EVENT_LEN = 200;

/**
 * A newer event of a key takes the place of one that waits, and moves to the end, but not past a `synced` that waits:
 * after that the reader knows some state of every key that is there. Of a key that comes and goes unread nothing is kept.
 */
class Queue {
  #events = new Map();
  #iterator;
  #place = 0;
  /** How many bytes wait, about. */
  len = 0;

  get size() {
    return this.#events.size;
  }

  /** Adds an `update` or `gone`. `isNew`: the reader does not know the key. */
  change(event, isNew) {
    const old = this.#events.get(event.key);
    let place = this.#place;
    this.#place += 1;
    if (old !== undefined) {
      this.len -= lenOf(old.event);
      event.skipped += old.event.skipped + 1;
      const synced = this.#events.get(SYNCED);
      const isBeforeSynced = synced !== undefined && old.place < synced.place;
      if (event.type === 'gone' && old.isNew) {
        this.#events.delete(event.key);
        return;
      }
      isNew = old.isNew;
      if (isBeforeSynced) {
        place = old.place;
      } else {
        this.#events.delete(event.key);
      }
    }
    this.len += lenOf(event);
    this.#events.set(event.key, { event, isNew, place });
  }

  synced(event) {
    this.#last(SYNCED, event);
  }

  /** The connection is lost, or there again. Another `synced` follows. */
  connection(event) {
    this.#events.delete(SYNCED);
    this.#last(CONNECTION, event);
  }

  /** Removes and returns the first event; undefined if there is none. */
  take() {
    // One iterator as long as possible: each new one would pass over all places that were removed.
    this.#iterator ??= this.#events.entries();
    const { done, value } = this.#iterator.next();
    if (done) {
      this.#iterator = undefined;
      return undefined;
    }
    const [slot, { event }] = value;
    this.#events.delete(slot);
    this.len -= lenOf(event);
    return event;
  }

  clear() {
    this.#events.clear();
    this.len = 0;
  }

  #last(slot, event) {
    this.#events.delete(slot);
    this.#events.set(slot, { event, place: this.#place });
    this.#place += 1;
  }
}

function lenOf(event) {
  return event.key === undefined ? 0 : event.key.length + (event.value?.length ?? 0) + EVENT_LEN;
}

module.exports = { Queue, EVENT_LEN };
