'use strict';

/** A revision of a store's data. It knows the epoch of the data, and equals none of another epoch. */
class Revision {
  constructor(number, epoch) {
    this.number = number;
    this.epoch = epoch;
    Object.freeze(this);
  }

  equals(other) {
    return other instanceof Revision && other.number === this.number && other.epoch === this.epoch;
  }

  toString() {
    return String(this.number);
  }

  toJSON() {
    return { number: this.number, epoch: this.epoch };
  }
}

/** A key, its value, and the revision at which the value was put. */
class Entry {
  constructor(key, value, revision) {
    this.key = key;
    this.value = value;
    this.revision = revision;
  }

  /** The value as UTF-8; throws a TypeError if it is not. */
  text() {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(this.value);
  }

  /** The value as JSON; throws a SyntaxError or TypeError if it is not. */
  json() {
    return JSON.parse(this.text());
  }
}

module.exports = { Revision, Entry };
