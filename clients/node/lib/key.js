'use strict';

// Keys and patterns (docs/protocol.md, section 3), checked before anything is sent.

const { InvalidKeyError } = require('./errors.js');

const KEY_LEN_MAX = 1024;
const NOT_IN_KEYS = /[\p{White_Space}\p{Cc}]/u;
const LONE_SURROGATE = /[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/;

function hex(code) {
  return code.toString(16).padStart(4, '0');
}

/** Names the lone surrogate of a text that is not Unicode; undefined if there is none. */
function loneSurrogate(text) {
  if (text.isWellFormed()) {
    return undefined;
  }
  const at = LONE_SURROGATE.exec(text).index;
  return `lone surrogate \\u${hex(text.charCodeAt(at))} at position ${at + 1}`;
}

/** Returns the key, or throws an InvalidKeyError that says what is wrong. */
function checkKey(key) {
  check(key, 'key');
  if (key.includes('*')) {
    throw new InvalidKeyError(`invalid key: '*' at position ${key.indexOf('*') + 1}: this takes one key, not a wildcard`);
  }
  return key;
}

/** The same for a key, `*`, or a key followed by `.*`. */
function checkPattern(pattern) {
  check(pattern, 'pattern');
  const star = pattern.indexOf('*');
  if (star >= 0 && (star !== pattern.length - 1 || (star > 0 && pattern[star - 1] !== '.'))) {
    const rule = "a wildcard is '*' alone or the last segment of a pattern, such as a.*";
    throw new InvalidKeyError(`invalid key: '*' at position ${star + 1}: ${rule}`);
  }
  return pattern;
}

function check(text, what) {
  if (typeof text !== 'string') {
    throw new InvalidKeyError(`invalid key: a ${what} is a string, not ${text === null ? 'null' : typeof text}`);
  }
  const surrogate = loneSurrogate(text);
  if (surrogate !== undefined) {
    throw new InvalidKeyError(`invalid key: ${surrogate}: a ${what} is Unicode text`);
  }
  if (text === '') {
    throw new InvalidKeyError(`invalid key: the ${what} is empty`);
  }
  if (text.length > KEY_LEN_MAX || Buffer.byteLength(text) > KEY_LEN_MAX) {
    throw new InvalidKeyError(`invalid key: the ${what} has more than ${KEY_LEN_MAX} bytes`);
  }
  const wrong = NOT_IN_KEYS.exec(text);
  if (wrong !== null) {
    const where = `character \\u${hex(text.charCodeAt(wrong.index))} at position ${wrong.index + 1}`;
    throw new InvalidKeyError(`invalid key: ${where}: a key must not hold white space or control characters`);
  }
  if (text.startsWith('.') || text.endsWith('.') || text.includes('..')) {
    throw new InvalidKeyError(`invalid key: empty segment: a ${what} is segments joined by single dots, such as a.b.c`);
  }
}

function isWildcard(pattern) {
  return pattern.endsWith('*');
}

/** Whether a subscription to the pattern covers the key. */
function covers(pattern, key, exact) {
  if (pattern === '*') {
    return true;
  }
  if (isWildcard(pattern)) {
    return key.startsWith(pattern.slice(0, -1));
  }
  return key === pattern || (!exact && key.startsWith(pattern) && key[pattern.length] === '.');
}

/** The patterns that no other includes, in their order, so that no key is covered twice. */
function disjoint(patterns, exact) {
  let kept = [];
  for (const pattern of patterns) {
    // What a pattern covers of another's text, it covers of all that the other does.
    if (!kept.some((other) => covers(other, pattern, exact))) {
      kept = kept.filter((other) => !covers(pattern, other, exact));
      kept.push(pattern);
    }
  }
  return kept;
}

/** Each pattern whose subscription covers the key. */
function patternsOf(key) {
  const patterns = ['*', key];
  for (let dot = key.indexOf('.'); dot >= 0; dot = key.indexOf('.', dot + 1)) {
    patterns.push(key.slice(0, dot), `${key.slice(0, dot)}.*`);
  }
  return patterns;
}

module.exports = { checkKey, checkPattern, covers, disjoint, isWildcard, loneSurrogate, patternsOf };
