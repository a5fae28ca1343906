'use strict';

// What can go wrong, by what a caller can do about it. `code` and the class say the same.

const TOO_MANY = 429;
const UNAVAILABLE = 503;

/** Any error of this package, except a wrong argument (TypeError, RangeError) and the reason of an AbortSignal. */
class NkvError extends Error {
  constructor(code, message, options) {
    super(message, options);
    this.code = code;
  }

  /** Whether the same request may succeed later, and asking again does no harm: nothing was changed. */
  get retryable() {
    return false;
  }
}

class InvalidAddressError extends NkvError {
  constructor(message) {
    super('INVALID_ADDRESS', message);
  }
}

class InvalidKeyError extends NkvError {
  constructor(message) {
    super('INVALID_KEY', message);
  }
}

class CannotConnectError extends NkvError {
  constructor(message, options) {
    super('CANNOT_CONNECT', message, options);
  }

  get retryable() {
    return true;
  }
}

class TimeoutError extends NkvError {
  constructor(message, options) {
    super('TIMEOUT', message, options);
  }

  get retryable() {
    return true;
  }
}

class ConflictError extends NkvError {
  constructor(revision) {
    const what = revision.number === 0 ? 'does not exist' : `is at revision ${revision.number}`;
    super('CONFLICT', `conflict: the key ${what}`);
    this.revision = revision;
  }
}

class OtherEpochError extends NkvError {
  constructor() {
    super('OTHER_EPOCH', 'the condition names a revision of another epoch than that of the data');
  }
}

class RefusedError extends NkvError {
  constructor(status, message) {
    super('REFUSED', message);
    this.status = status;
  }

  get retryable() {
    return this.status === TOO_MANY || this.status === UNAVAILABLE;
  }
}

class OutcomeUnknownError extends NkvError {
  constructor(message, options) {
    super('OUTCOME_UNKNOWN', message, options);
  }
}

class ClosedError extends NkvError {
  constructor(message = 'the client is closed') {
    super('CLOSED', message);
  }
}

class ProtocolError extends NkvError {
  constructor(message, options) {
    super('PROTOCOL', message, options);
  }
}

class EndedError extends NkvError {
  constructor(reason, message) {
    super('ENDED', message);
    this.reason = reason;
  }
}

/** The classes of the errors, as the package exports them. */
const classes = {
  NkvError,
  InvalidAddressError,
  InvalidKeyError,
  CannotConnectError,
  TimeoutError,
  ConflictError,
  OtherEpochError,
  RefusedError,
  OutcomeUnknownError,
  ClosedError,
  ProtocolError,
  EndedError,
};

for (const [name, type] of Object.entries(classes)) {
  Object.defineProperty(type.prototype, 'name', { value: name, configurable: true, writable: true });
}

module.exports = { ...classes, classes, TOO_MANY, UNAVAILABLE };
