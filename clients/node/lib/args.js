'use strict';

// Checks of what callers pass. A wrong argument is a TypeError or RangeError; nothing was sent.

const { loneSurrogate } = require('./key.js');

/** Timers of Node.js hold no longer time: such a limit is none. */
const TIMER_MAX_MS = 2 ** 31 - 1;

/** Refuses an option that is not known: a misspelt condition or limit must not be dropped. */
function checkOptions(options, names, where) {
  if (options === undefined) {
    return {};
  }
  if (options === null || typeof options !== 'object') {
    throw new TypeError(`the options of ${where} are an object`);
  }
  for (const name of Object.keys(options)) {
    if (!names.includes(name)) {
      throw new TypeError(`${where} has no option '${name}'; it has: ${names.join(', ')}`);
    }
  }
  return options;
}

/** A time in milliseconds; undefined gives the default. */
function checkTime(value, name, fallback) {
  if (value === undefined) {
    return fallback;
  }
  if (typeof value !== 'number' || Number.isNaN(value) || value < 0) {
    throw new RangeError(`'${name}' is a time in milliseconds, 0 or more, or Infinity for no limit`);
  }
  return value;
}

function checkCount(value, name, min) {
  if (value !== undefined && (!Number.isSafeInteger(value) || value < min)) {
    throw new RangeError(`'${name}' is a whole number, ${min} or more`);
  }
  return value;
}

function checkFlag(value, name, fallback) {
  if (value !== undefined && typeof value !== 'boolean') {
    throw new TypeError(`'${name}' is true or false`);
  }
  return value ?? fallback;
}

function checkText(value, name, lenMax) {
  if (value === undefined) {
    return undefined;
  }
  if (typeof value !== 'string') {
    throw new TypeError(`'${name}' is a string`);
  }
  const surrogate = loneSurrogate(value);
  if (surrogate !== undefined) {
    throw new TypeError(`'${name}' has a ${surrogate}`);
  }
  if (Buffer.byteLength(value) > lenMax) {
    throw new RangeError(`'${name}' has more than ${lenMax} bytes`);
  }
  return value;
}

function checkSignal(signal) {
  if (signal !== undefined && !(signal instanceof AbortSignal)) {
    throw new TypeError("'signal' is an AbortSignal");
  }
  return signal;
}

/** The bytes of a value, not yet copied. */
function bytesOf(value) {
  if (typeof value === 'string') {
    const surrogate = loneSurrogate(value);
    if (surrogate !== undefined) {
      throw new TypeError(`the value has a ${surrogate}: pass bytes, or text that is Unicode`);
    }
    return Buffer.from(value);
  }
  if (ArrayBuffer.isView(value)) {
    return Buffer.from(value.buffer, value.byteOffset, value.byteLength);
  }
  if (value instanceof ArrayBuffer || (typeof SharedArrayBuffer === 'function' && value instanceof SharedArrayBuffer)) {
    return Buffer.from(value);
  }
  throw new TypeError('a value is a string, a Buffer, a Uint8Array or an ArrayBuffer');
}

/** Calls `done` after a time, unless it is endless; returns a function that stops that. */
function after(ms, done) {
  if (ms > TIMER_MAX_MS) {
    return () => {};
  }
  const timer = setTimeout(done, ms);
  return () => clearTimeout(timer);
}

/** Calls `aborted` with the reason when the signal fires; returns a function that stops that. */
function onAbort(signal, aborted) {
  if (signal === undefined) {
    return () => {};
  }
  const listener = () => aborted(signal.reason);
  signal.addEventListener('abort', listener, { once: true });
  return () => signal.removeEventListener('abort', listener);
}

module.exports = { after, bytesOf, checkCount, checkFlag, checkOptions, checkSignal, checkText, checkTime, onAbort };
