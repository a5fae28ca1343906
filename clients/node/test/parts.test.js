'use strict';

// Parts that need no socket.

const assert = require('node:assert/strict');
const { describe, test } = require('node:test');

const { addressText, parseAddress } = require('../lib/address.js');
const { checkKey, checkPattern, covers, patternsOf } = require('../lib/key.js');
const { Queue } = require('../lib/queue.js');
const { Reader, valuesOf } = require('../lib/reader.js');
const { InvalidAddressError, InvalidKeyError, ProtocolError } = require('../index.js');

describe('addresses', () => {
  const good = {
    '127.0.0.1:5000': '127.0.0.1:5000',
    'nkv://db1:5000': 'db1:5000',
    'nkv://db1/': 'db1:4222',
    localhost: 'localhost:4222',
    '[::1]:5000': '[::1]:5000',
    'nkv://[::1]': '[::1]:4222',
    'unix:nkv.sock': 'unix:nkv.sock',
    'unix:///run/nkv.sock': 'unix:/run/nkv.sock',
    '/run/nkv.sock': 'unix:/run/nkv.sock',
    './nkv.sock': 'unix:./nkv.sock',
  };
  const wrong = {
    '': 'host is missing',
    ':4222': 'host is missing',
    4222: '127.0.0.1:4222',
    'db1:': 'port is missing',
    'db1:70000': 'port must be a number',
    'db1:1e3': 'port must be a number',
    '::1': 'in brackets',
    '[::1': "no ']'",
    'http://db1': "unknown scheme 'http'",
    'nkv://me@db1': 'only host:port',
    'unix:': 'path must follow',
    'unix://nkv.sock': 'unix:nkv.sock',
  };
  for (const [text, shown] of Object.entries(good)) {
    test(`'${text}' is understood`, () => assert.equal(addressText(parseAddress(text)), shown));
  }
  for (const [text, part] of Object.entries(wrong)) {
    test(`what is wrong with '${text}' is named`, () => {
      assert.throws(() => parseAddress(text), (error) => error instanceof InvalidAddressError && error.message.includes(part));
    });
  }
});

describe('keys', () => {
  test('whatever is Unicode without white space and control characters is a key', () => {
    for (const key of ['a', 'a.b.c', 'é.🔑', '-rf', '$(x)', '__proto__.constructor', 'k'.repeat(1024), '\ufffd']) {
      assert.equal(checkKey(key), key);
    }
  });

  test('what is wrong with a key is named', () => {
    const wrong = ['', '.a', 'a.', 'a..b', 'a b', 'a\u00a0b', 'a\u2028b', 'a\tb', 'a\0b', 'a\u0085b', 'é'.repeat(513), 'a.*'];
    for (const key of [...wrong, 1, null, undefined, {}]) {
      assert.throws(() => checkKey(key), InvalidKeyError, String(key));
    }
  });

  test('a lone surrogate is refused by name, in each place', () => {
    for (const key of ['\ud800', 'a.\udc00b', '🔑\udfff', '\ud83da', 'a\ud83d']) {
      assert.throws(() => checkKey(key), /lone surrogate \\u(d800|dc00|dfff|d83d) at position \d/, JSON.stringify(key));
      assert.throws(() => checkPattern(key), InvalidKeyError);
    }
  });

  test('a wildcard is the last segment', () => {
    assert.equal(checkPattern('a.*'), 'a.*');
    assert.equal(checkPattern('*'), '*');
    for (const pattern of ['a*', '*.a', 'a.*.b', '**', 'a.**']) {
      assert.throws(() => checkPattern(pattern), InvalidKeyError, pattern);
    }
  });

  test('a pattern covers what the protocol says, and is found by the key', () => {
    const cases = { a: ['a', 'a.b', 'a.b.c'], 'a.b': ['a.b', 'a.b.c'], 'a.*': ['a.b', 'a.b.c'], '*': ['a', 'a.b', 'a.b.c', 'a-b'] };
    for (const [pattern, keys] of Object.entries(cases)) {
      for (const key of ['a', 'a.b', 'a.b.c', 'a-b', 'b']) {
        const isCovered = pattern === '*' || keys.includes(key);
        assert.equal(covers(pattern, key, false), isCovered, `${pattern} ${key}`);
        assert.equal(patternsOf(key).includes(pattern), isCovered, `${pattern} ${key}`);
      }
    }
    assert.equal(covers('a', 'a.b', true), false);
  });
});

describe('framing', () => {
  const stream = Buffer.concat([
    Buffer.from('"Hello"\n\n{"Update":{"key":"a","len":3,"revision":1}}\n'),
    Buffer.from('{\n}\n'),
    Buffer.from('{"OfALaterVersion":{"len":2}}\r\n{}\n{"Base":{"id":1}}\n{"Update":{"key":"é","len":0}}\n\n'),
  ]);
  const read = (chunks) => {
    const messages = [];
    const reader = new Reader(1000, (kind, body, payload) => messages.push([kind, body.key ?? body.id, payload.toString()]));
    chunks.forEach((chunk) => reader.push(chunk));
    return messages;
  };

  test('messages are the same however they are cut', () => {
    const whole = read([stream]);
    const expected = [['Hello', undefined, ''], ['Update', 'a', '{\n}'], ['OfALaterVersion', undefined, '{}'], ['Base', 1, '']];
    assert.deepEqual(whole, [...expected, ['Update', 'é', '']]);
    for (let size = 1; size < stream.length; size += 1) {
      const chunks = [];
      for (let at = 0; at < stream.length; at += size) {
        chunks.push(stream.subarray(at, at + size));
      }
      assert.deepEqual(read(chunks), whole, `in parts of ${size}`);
    }
  });

  test('what is not the protocol is an error, never taken for something', () => {
    const wrong = ['HTTP/1.1 400 Bad Request\n', '[]\n', '1\n', 'null\n', '{}\n', '{"a":1,"b":2}\n', '{"Get":{"len":1}}\nab'];
    for (const text of [...wrong, '{"Get":{"len":-1}}\n', '{"Get":{"len":1.5}}\n', '{"Get":{"len":1e300}}\n']) {
      assert.throws(() => read([Buffer.from(text)]), ProtocolError, text);
    }
    assert.throws(() => read([Buffer.from([0x22, 0xff, 0x22, 10])]), /not UTF-8/);
  });

  test('a message has a limit, which needs no room beforehand', () => {
    const line = (len) => Buffer.from(`"${'x'.repeat(len - 2)}"\n`);
    assert.equal(read([line(1000)]).length, 1);
    assert.throws(() => read([line(1001)]), ProtocolError);
    assert.throws(() => read([Buffer.alloc(600, 120), Buffer.alloc(600, 120)]), ProtocolError);
    assert.throws(() => read([Buffer.from('{"Get":{"len":1001}}\n')]), ProtocolError);
  });

  test('lengths must fit the payload', () => {
    assert.deepEqual(valuesOf({ lens: [2, 0] }, Buffer.from('hi'), 2).map(String), ['hi', '']);
    assert.deepEqual(valuesOf({ data: [[104, 105], 'é'] }, Buffer.alloc(0), 2).map(String), ['hi', 'é']);
    for (const lens of [[2], [1, 0], [3, 0], [-1, 3], [1.5, 0.5], ['2', 0]]) {
      assert.throws(() => valuesOf({ lens }, Buffer.from('hi'), 2), ProtocolError, JSON.stringify(lens));
    }
    assert.throws(() => valuesOf({ data: [[256]] }, Buffer.alloc(0), 1), ProtocolError);
  });
});

describe('the backlog', () => {
  const update = (key, number, skipped = 0) => ({ type: 'update', key, value: Buffer.alloc(0), revision: number, skipped });
  const gone = (key, number) => ({ type: 'gone', key, revision: number, reason: 'deleted', skipped: 0 });
  const drain = (queue) => {
    const events = [];
    for (let event = queue.take(); event !== undefined; event = queue.take()) {
      events.push([event.type, event.key, event.revision, event.skipped].filter((part) => part !== undefined).join(' '));
    }
    return events;
  };

  test('a slow reader gets the newest state of each key and the count of what it missed', () => {
    const queue = new Queue();
    for (let number = 1; number <= 1000; number += 1) {
      queue.change(update(number % 2 === 0 ? 'even' : 'odd', number), number <= 2);
      assert.ok(queue.size <= 2);
    }
    assert.deepEqual(drain(queue), ['update odd 999 499', 'update even 1000 499']);
    assert.equal(queue.len, 0);
  });

  test('who is synced knows some state of every key that is there', () => {
    const queue = new Queue();
    queue.change(update('a', 1), true);
    queue.change(update('b', 2), true);
    queue.synced({ type: 'synced' });
    queue.change(update('a', 3), false);
    queue.change(gone('b', 4), false);
    queue.change(update('c', 5), true);
    // b has come and gone unread.
    assert.deepEqual(drain(queue), ['update a 3 1', 'synced', 'update c 5 0']);
  });

  test('a key that comes and goes unread takes no place, and one that was read is reported gone', () => {
    const queue = new Queue();
    queue.change(update('known', 1), true);
    drain(queue);
    for (let number = 0; number < 10_000; number += 1) {
      queue.change(update(`k.${number}`, 2), true);
      queue.change(gone(`k.${number}`, 3), false);
    }
    assert.equal(queue.size, 0);
    queue.change(update('known', 4), false);
    queue.change(gone('known', 5), false);
    assert.deepEqual(drain(queue), ['gone known 5 1']);
  });

  test('a connection that comes and goes costs no memory', () => {
    const queue = new Queue();
    queue.change(update('a', 1), true);
    for (let number = 0; number < 1000; number += 1) {
      queue.connection({ type: 'reconnecting' });
      queue.connection({ type: 'connected' });
      queue.synced({ type: 'synced' });
    }
    assert.deepEqual(drain(queue), ['update a 1 0', 'connected', 'synced']);
  });

  test('a backlog of 200,000 keys is read whole', () => {
    const queue = new Queue();
    for (let number = 0; number < 200_000; number += 1) {
      queue.change(update(`k.${number}`, number), true);
    }
    assert.equal(drain(queue).length, 200_000);
  });
});
