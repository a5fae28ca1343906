'use strict';

// The client against a server that does what a real one seldom does.

const assert = require('node:assert/strict');
const net = require('node:net');
const { describe, test } = require('node:test');
const { setTimeout: sleep } = require('node:timers/promises');

const nkv = require('../index.js');
const { EPOCH, eventually, fakeServer } = require('../testing/fake-server.js');

/** Runs a test with a fake server and a client of it. */
function withFake(name, handlers, options, run) {
  test(name, { timeout: 60_000 }, async () => {
    const server = await fakeServer(handlers);
    const client = new nkv.Client(server.addr, { backoffMin: 20, backoffMax: 200, ...options });
    try {
      await run(client, server);
    } finally {
      await client.close();
      await server.close();
    }
  });
}

/** A fake server that ends with the test. */
async function fakeFor(t, handlers) {
  const server = await fakeServer(handlers);
  t.after(() => server.close());
  return server;
}

/** The same for a client of it, which is connected. */
async function clientFor(t, addr, options) {
  const client = await nkv.connect(addr, options);
  t.after(() => client.close());
  return client;
}

const failsWith = (code) => (error) => error instanceof nkv.NkvError && error.code === code;

describe('requests', () => {
  const echo = (peer, { id, type, key }) => {
    if (type === 'Get') {
      peer.send({ Get: { id, status: 200, message: 'No Error', lens: [key.length], len: key.length, keys: [key], revisions: [1] } }, key);
    } else {
      peer.answer(id, { revision: 1 });
    }
  };

  withFake('zero and empty are given values, on the wire as such', { onRequest: echo }, {}, async (client, server) => {
    await client.put('a', '', { ifRevision: 0 });
    await client.delete('a', { ifRevision: 0 });
    const [put] = server.of('Put');
    assert.deepEqual([put.if_revision, put.len, put.payload.length], [0, 0, 0]);
    assert.equal(server.of('Delete')[0].if_revision, 0);
  });

  withFake('an option that is not known, or a condition that is not there, is refused', {}, {}, async (client, server) => {
    const wrong = [{ if_revision: 0 }, { ifRevison: 0 }, { tll: 1 }, { ifRevision: undefined }, { ifRevision: null }, { ifRevision: -1 }];
    for (const options of [...wrong, { ttl: 0 }, { ttl: 1.5 }, { timeout: -1 }, { signal: {} }, null]) {
      await assert.rejects(client.put('a', 'x', options), (error) => error instanceof TypeError || error instanceof RangeError);
    }
    for (const value of [undefined, null, 1, {}, '\ud800']) {
      await assert.rejects(client.put('a', value), TypeError);
    }
    assert.throws(() => client.subscribe('a', { snapshots: false }), TypeError);
    assert.throws(() => new nkv.Client('x', { requestTimout: 1 }), /has no option 'requestTimout'/);
    assert.equal(server.of('Put').length, 0);
  });

  withFake('a value is what it was when put was called', { onRequest: echo }, {}, async (client, server) => {
    const value = Buffer.from('before');
    const put = client.put('a', value);
    value.write('after!');
    await put;
    assert.equal(server.of('Put')[0].payload.toString(), 'before');
  });

  withFake('views of other types are their bytes', { onRequest: echo }, {}, async (client, server) => {
    const bytes = new Uint8Array([9, 1, 2, 3, 9]);
    await client.put('a', bytes.subarray(1, 4));
    await client.put('b', new DataView(bytes.buffer, 3, 2));
    await client.put('c', bytes.buffer);
    assert.deepEqual(server.of('Put').map(({ payload }) => [...payload]), [[1, 2, 3], [3, 9], [9, 1, 2, 3, 9]]);
  });

  const reversed = [];
  const later = (peer, request) => {
    reversed.push(request);
    if (reversed.length === 100) {
      reversed.reverse().forEach((each) => echo(peer, each));
    }
  };
  withFake('answers are matched by id', { onRequest: later }, {}, async (client) => {
    const keys = Array.from({ length: 100 }, (_, number) => `k.${number}`);
    const entries = await Promise.all(keys.map((key) => client.get(key)));
    assert.deepEqual(entries.map((entry) => entry.text()), keys);
  });

  let late;
  const answersLate = (peer, request) => {
    if (late === undefined) {
      late = request;
    } else {
      echo(peer, late);
      echo(peer, request);
    }
  };
  withFake('the answer to a call that was given up is of no other', { onRequest: answersLate }, {}, async (client, server) => {
    await assert.rejects(client.get('first', { timeout: 50 }), failsWith('TIMEOUT'));
    assert.equal((await client.get('second')).text(), 'second');
    assert.equal(server.peers.length, 1);
  });

  test('a put that timed out before it was sent is never sent', { timeout: 60_000 }, async (t) => {
    // The server takes nothing until all has timed out: some is in the socket by then, the rest waits in the client.
    const server = await fakeFor(t, {
      onConnect: (peer, request) => {
        peer.greet(request);
        peer.socket.pause();
      },
      onRequest: (peer, { id }) => peer.answer(id, { revision: 1 }),
    });
    const client = await clientFor(t, server.addr, { heartbeat: 60_000 });
    const value = Buffer.alloc(500_000);
    const puts = Array.from({ length: 60 }, (_, number) => client.put(`k.${number}`, value, { timeout: 300 }));
    const codes = (await Promise.allSettled(puts)).map(({ reason }) => reason?.code);
    const unsent = codes.flatMap((code, number) => (code === 'TIMEOUT' ? [`k.${number}`] : []));
    assert.ok(unsent.length > 0 && codes.includes('OUTCOME_UNKNOWN'), codes.join(' '));
    assert.ok(codes.every((code) => code === 'TIMEOUT' || code === 'OUTCOME_UNKNOWN'), codes.join(' '));
    server.peers[0].socket.resume();
    await client.put('last', 'x', { timeout: 20_000 });
    const sent = server.of('Put').map(({ key }) => key);
    assert.deepEqual(sent.filter((key) => unsent.includes(key)), []);
    assert.deepEqual(sent, [...codes.flatMap((code, number) => (code === 'TIMEOUT' ? [] : [`k.${number}`])), 'last']);
  });

  test('it reads on while its writes are blocked', { timeout: 60_000 }, async (t) => {
    // The server takes nothing while its own answers are not read.
    const value = Buffer.alloc(100_000, 'v');
    const server = await fakeFor(t, {
      onPeer: ({ socket }) => socket.on('drain', () => socket.resume()),
      onRequest: (peer, { id, type, key }) => {
        if (type === 'Get') {
          peer.send({ Get: { id, status: 200, message: 'No Error', lens: [value.length], len: value.length, keys: [key], revisions: [1] } }, value);
        } else {
          peer.answer(id, { revision: 1 });
        }
        if (peer.socket.writableNeedDrain) {
          peer.socket.pause();
        }
      },
    });
    const client = await clientFor(t, server.addr, { requestTimeout: 50_000 });
    const calls = Array.from({ length: 1000 }, (_, n) => (n % 2 === 0 ? client.put(`k.${n}`, value) : client.get(`k.${n}`)));
    await Promise.all(calls);
  });

  withFake('a signal ends a call: before it is sent for good, after that with the outcome unknown', {}, {}, async (client, server) => {
    await assert.rejects(client.put('a', '1', { signal: AbortSignal.abort(new Error('no')) }), { message: 'no' });
    const before = new AbortController();
    const unsent = client.put('b', '1', { signal: before.signal });
    before.abort();
    await assert.rejects(unsent, { name: 'AbortError' });
    const during = new AbortController();
    const [put, get] = [client.put('c', '1', { signal: during.signal }), client.get('c', { signal: during.signal })];
    put.catch(() => {});
    get.catch(() => {});
    await eventually(() => server.of('Get').length === 1);
    during.abort();
    await assert.rejects(put, (error) => failsWith('OUTCOME_UNKNOWN')(error) && error.cause.name === 'AbortError');
    await assert.rejects(get, { name: 'AbortError' });
    assert.deepEqual(server.of('Put').map(({ key }) => key), ['c']);
  });

  let cuts = 0;
  const cutsFirst = (peer, request) => {
    cuts += 1;
    if (cuts <= 2) {
      peer.socket.resetAndDestroy();
    } else {
      echo(peer, request);
    }
  };
  withFake('a read is repeated over a new connection, a write is not', { onRequest: cutsFirst }, {}, async (client, server) => {
    assert.equal((await client.get('again')).text(), 'again');
    cuts = 0;
    await assert.rejects(client.put('once', '1'), failsWith('OUTCOME_UNKNOWN'));
    assert.equal(server.of('Put').length, 1);
  });

  const refuses = (peer, { id, key }) => peer.answer(id, { status: Number(key.slice(1)), message: 'no', revision: 7 });
  withFake('each refusal has its class', { onRequest: refuses }, {}, async (client) => {
    await assert.rejects(client.put('s507', ''), (error) => error instanceof nkv.RefusedError && error.status === 507);
    await assert.rejects(client.put('s429', ''), (error) => error instanceof nkv.RefusedError && error.retryable);
    await assert.rejects(client.put('s409', ''), (error) => error instanceof nkv.ConflictError && error.revision.number === 7);
    await assert.rejects(client.put('s503', ''), failsWith('OUTCOME_UNKNOWN'));
    await assert.rejects(client.get('s503'), (error) => failsWith('REFUSED')(error) && error.retryable && error.status === 503);
  });

  withFake('a value over the limit is not sent', { onRequest: echo }, {}, async (client, server) => {
    await assert.rejects(client.put('a', Buffer.alloc((1 << 20) + 1)), (error) => failsWith('REFUSED')(error) && error.status === 413);
    await client.put('b', Buffer.alloc(1 << 20));
    assert.deepEqual(server.of('Put').map(({ key }) => key), ['b']);
  });

  const nonsense = (peer, { id }) => peer.send({ Get: { id, status: 200, message: 'No Error', keys: ['a'], lens: [5], len: 0 } }, '');
  withFake('an answer that makes no sense fails the call and ends the connection', { onRequest: nonsense }, {}, async (client, server) => {
    await assert.rejects(client.get('a'), failsWith('PROTOCOL'));
    await assert.rejects(client.put('a', ''), failsWith('OUTCOME_UNKNOWN'));
    await eventually(() => server.peers.length >= 3);
  });

  let epoch = 0;
  const nextEpoch = { onConnect: (peer, request) => peer.greet(request, String((epoch += 1)).padStart(32, '0')), onRequest: echo };
  withFake('a condition of another epoch is never sent', nextEpoch, {}, async (client, server) => {
    const first = await client.put('a', '1');
    server.peers[0].socket.destroy();
    await eventually(() => client.state !== 'connected');
    await assert.rejects(client.put('a', '2', { ifRevision: first }), failsWith('OTHER_EPOCH'));
    await assert.rejects(client.delete('a', { ifRevision: first }), failsWith('OTHER_EPOCH'));
    const second = await client.put('a', '3');
    assert.deepEqual([first.number, second.number, first.equals(second)], [1, 1, false]);
    await client.put('a', '4', { ifRevision: second });
    assert.equal(server.of('Put').length, 3);
  });
});

describe('a server is tried in growing pauses that', { concurrency: 4 }, () => {
  const closes = {
    'accepts and closes': { onPeer: ({ socket }) => socket.destroy() },
    'answers 503 and closes': {
      onPeer: ({ socket }) => socket.end('{"Base":{"id":"","status":503,"message":"too many connections"}}\n'),
    },
    'greets and closes': { onConnect: (peer, request) => (peer.greet(request), peer.socket.end()) },
    'speaks HTTP': { onConnect: (peer) => peer.socket.end('HTTP/1.1 400 Bad Request\r\n\r\n') },
  };
  for (const [name, handlers] of Object.entries(closes)) {
    test(name, { timeout: 30_000 }, async (t) => {
      const server = await fakeFor(t, handlers);
      const client = new nkv.Client(server.addr);
      t.after(() => client.close());
      await sleep(6_000);
      const count = server.peers.length;
      assert.ok(count >= 3 && count <= 12, `${count} attempts in 6 s`);
    });
  }
});

describe('the connection', () => {
  test('connect fails at once where no server answers, and says why', { timeout: 30_000 }, async (t) => {
    const server = await fakeServer({});
    await server.close();
    await assert.rejects(nkv.connect(server.addr), (error) => failsWith('CANNOT_CONNECT')(error) && /ECONNREFUSED/.test(error.message));
    await assert.rejects(nkv.connect('nkv.invalid:1'), failsWith('CANNOT_CONNECT'));
    await assert.rejects(nkv.connect('/nowhere/nkv.sock'), failsWith('CANNOT_CONNECT'));
    await assert.rejects(nkv.connect('http://x'), failsWith('INVALID_ADDRESS'));
  });

  test('connect waits for the server if it is told to', { timeout: 30_000 }, async (t) => {
    let isUp = false;
    const onConnect = (peer, request) => (isUp ? peer.greet(request) : peer.socket.destroy());
    const server = await fakeFor(t, { onConnect });
    setTimeout(() => (isUp = true), 300);
    const client = await clientFor(t, server.addr, { waitForServer: 20_000 });
    assert.equal(client.state, 'connected');
    const abort = AbortSignal.timeout(50);
    isUp = false;
    await assert.rejects(nkv.connect(server.addr, { waitForServer: 20_000, signal: abort }), { name: 'TimeoutError' });
  });

  test('the addresses of a name are tried in turn', { timeout: 30_000 }, async (t) => {
    const server = await fakeFor(t, {});
    // One refuses, one never answers.
    const addresses = ['127.0.0.9', '192.0.2.1', '127.0.0.1'].map((address) => ({ address, family: 4 }));
    const connect = net.connect;
    t.mock.method(net, 'connect', (options) => (options.host === '192.0.2.1' ? new net.Socket() : connect(options)));
    const lookup = (host, options, callback) => callback(null, addresses);
    const client = await clientFor(t, `name.example:${server.port}`, { lookup });
  });

  withFake('a server that gives no sign of life counts as dead', { onRequest: () => {} }, { heartbeat: 100 }, async (client, server) => {
    await eventually(() => server.peers.length >= 2);
    assert.ok(server.of('Health').length >= 1);
  });

  const slow = (peer, { id }) => {
    const alive = setInterval(() => peer.send('Alive'), 100);
    setTimeout(() => (clearInterval(alive), peer.answer(id, { revision: 1 })), 3_000);
  };
  withFake('one that says that it works does not', { onRequest: slow }, { heartbeat: 1_000 }, async (client, server) => {
    await client.put('a', '1');
    assert.equal(server.peers.length, 1);
  });

  const says = (peer, { id, key }) => {
    peer.send({ Stale: key === 'stale' ? { since_ms: 60_000 } : {} });
    peer.answer(id, { revision: 1 });
  };
  withFake('a server that is stale says since when', { onRequest: says }, {}, async (client) => {
    assert.equal(client.staleFor, undefined);
    await client.put('stale', '1');
    assert.ok(client.staleFor >= 60_000 && client.staleFor < 120_000, String(client.staleFor));
    await client.put('seen', '1');
    assert.equal(client.staleFor, undefined);
    await client.put('stale', '1');
    await client.close();
    assert.equal(client.staleFor, undefined);
  });

  withFake('a time-out says why there is no connection', { onPeer: ({ socket }) => socket.destroy() }, {}, async (client) => {
    await assert.rejects(client.get('a', { timeout: 200 }), (error) => failsWith('TIMEOUT')(error) && /cannot connect|lost/.test(error.message));
  });

  withFake('a client has the options that it is given', {}, { name: 'é lamp', token: 't', clientUuid: 'u' }, async (client, server) => {
    await eventually(() => server.of('Connect').length === 1);
    const [{ name, token, client_uuid: uuid, values }] = server.of('Connect');
    assert.deepEqual([name, token, uuid, values], ['é lamp', 't', 'u', 'payload']);
  });
});

describe('subscriptions', () => {
  /** Answers each Subscribe with the snapshot that `state` has then. */
  const store = (state) => ({
    onRequest: (peer, { id, type, key }) => {
      if (type === 'Subscribe') {
        peer.send('Hello');
        state.entries.forEach(([name, value, revision]) => peer.update(name, value, revision));
        peer.synced(key, state.revision);
      } else if (type === 'Unsubscribe') {
        peer.send({ Close: { key, reason: 'unsubscribed' } });
        peer.answer(id);
      } else if (type === 'Put') {
        state.onPut?.(peer);
        peer.answer(id, { revision: state.putRevision });
      } else {
        peer.answer(id);
      }
    },
  });
  const take = async (subscription, count) => {
    const events = [];
    while (events.length < count) {
      const { type, key, value, reason, skipped } = await subscription.take({ timeout: 30_000 });
      events.push([type, key, value?.toString() ?? reason, skipped || undefined].filter((part) => part !== undefined).join(' '));
    }
    return events;
  };
  const nothing = (subscription) => assert.rejects(subscription.take({ timeout: 100 }), failsWith('TIMEOUT'));

  const two = { entries: [['a.x', '1', 1], ['a.y', '2', 2]], revision: 2 };
  withFake('Reset begins anew: what is missing is gone, what is known is not repeated', store(two), {}, async (client, server) => {
    const subscription = client.subscribe('a');
    assert.deepEqual(await take(subscription, 3), ['update a.x 1', 'update a.y 2', 'synced']);
    const [peer] = server.peers;
    peer.send({ Reset: { key: 'a' } });
    peer.update('a.y', '2', 2);
    peer.update('a.z', '4', 4);
    peer.synced('a', 4);
    assert.deepEqual((await take(subscription, 2)).sort(), ['gone a.x missed', 'update a.z 4']);
    await nothing(subscription);
  });

  withFake('what came before the end of a snapshot is no news', store({ entries: [], revision: 9 }), {}, async (client, server) => {
    const subscription = client.subscribe('a');
    assert.deepEqual(await take(subscription, 1), ['synced']);
    const [peer] = server.peers;
    peer.update('a.x', 'old', 8);
    peer.update('a.x', 'new', 10);
    peer.gone('a.x', 9);
    peer.update('a.x', 'new', 10);
    assert.deepEqual(await take(subscription, 1), ['update a.x new']);
    await nothing(subscription);
  });

  withFake('messages and reasons of later versions are passed over', store(two), {}, async (client, server) => {
    const subscription = client.subscribe('a');
    await take(subscription, 3);
    const [peer] = server.peers;
    peer.send('Later');
    peer.send({ Later: { key: 'a.x', len: 8 } }, '{"a":1}\n');
    peer.send({ Close: { key: 'a.x', reason: 'later' } });
    peer.send({ Synced: { key: 'other', revision: 1 } });
    peer.update('a.x', '3', 3);
    assert.deepEqual(await take(subscription, 1), ['update a.x 3']);
    assert.equal(server.peers.length, 1);
  });

  withFake('a second subscription to a pattern gets the present state, and the first nothing twice', store(two), {}, async (client, server) => {
    const first = client.subscribe('a');
    await take(first, 3);
    const second = client.subscribe('a');
    assert.deepEqual(await take(second, 3), ['update a.x 1', 'update a.y 2', 'synced']);
    await nothing(first);
    server.peers[0].update('a.x', '3', 3);
    assert.deepEqual([await take(first, 1), await take(second, 1)], [['update a.x 3'], ['update a.x 3']]);
    first.close();
    second.close();
    await eventually(() => server.of('Unsubscribe').length === 1);
  });

  withFake('another client with the same name ends a subscription, which says so once', store(two), {}, async (client, server) => {
    const subscription = client.subscribe('a');
    await take(subscription, 3);
    server.peers[0].send({ Close: { key: 'a', reason: 'replaced' } });
    await assert.rejects(subscription.next(), (error) => failsWith('ENDED')(error) && error.reason === 'replaced');
    assert.deepEqual(await subscription.next(), { done: true, value: undefined });
  });

  const refuses = (peer, { id }) => peer.answer(id, { status: 429, message: 'too many subscriptions' });
  withFake('a subscription that is refused says so, also if it is not read', { onRequest: refuses }, {}, async (client) => {
    client.subscribe('unread');
    const subscription = client.subscribe('a');
    await assert.rejects(subscription.ready(), (error) => failsWith('REFUSED')(error) && error.status === 429);
    await assert.rejects(subscription.next(), failsWith('REFUSED'));
    await assert.rejects(client.watch('a'), failsWith('REFUSED'));
  });

  let isFull = false;
  const sometimesFull = {
    onRequest: (peer, request) => (isFull ? refuses(peer, request) : store(two).onRequest(peer, request)),
  };
  withFake('one that was accepted waits for room after a reconnect', sometimesFull, {}, async (client, server) => {
    const subscription = client.subscribe('a');
    await take(subscription, 3);
    isFull = true;
    server.peers[0].socket.destroy();
    await eventually(() => server.of('Subscribe').length >= 3);
    isFull = false;
    const events = [];
    while (events.at(-1) !== 'synced') {
      events.push(...(await take(subscription, 1)));
    }
    assert.deepEqual(events, ['connected', 'synced']);
  });

  const many = { entries: Array.from({ length: 1000 }, (_, n) => [`a.${n}`, 'x'.repeat(100), n + 1]), revision: 1000 };
  withFake('one that would hold more than its limit ends', store(many), { subscriptionLenMax: 100_000 }, async (client, server) => {
    const subscription = client.subscribe('a');
    await assert.rejects(async () => {
      for await (const _ of subscription);
    }, (error) => failsWith('ENDED')(error) && error.reason === 'too-much');
    await assert.rejects(client.watchBranch('a'), failsWith('ENDED'));
    await eventually(() => server.of('Unsubscribe').length === 2);
  });

  withFake('break, a signal and close end the iterator and unsubscribe', store(two), {}, async (client, server) => {
    for await (const event of client.subscribe('a')) {
      assert.equal(event.type, 'update');
      break;
    }
    const abort = new AbortController();
    const subscription = client.subscribe('b', { signal: abort.signal });
    await take(subscription, 3 - 2);
    const next = subscription.next();
    abort.abort();
    await assert.rejects(next, { name: 'AbortError' });
    assert.equal((await subscription.next()).done, true);
    const closed = client.subscribe('c');
    await closed.ready();
    closed.close();
    assert.equal((await closed.next()).done, true);
    await eventually(() => server.of('Unsubscribe').length === 3);
  });

  withFake('dropped and made again at once, it has the present state each time', store(two), {}, async (client, server) => {
    for (let time = 0; time < 20; time += 1) {
      client.subscribe('a').close();
    }
    const subscription = client.subscribe('a');
    assert.deepEqual(await take(subscription, 3), ['update a.x 1', 'update a.y 2', 'synced']);
    client.subscribe('a.*').close();
    server.peers[0].update('a.x', '3', 3);
    assert.deepEqual(await take(subscription, 1), ['update a.x 3']);
    assert.equal(server.peers.length, 1);
  });

  const lagging = { entries: [], revision: 1, putRevision: 5 };
  withFake('a watch is never older than an own write that is done', store(lagging), {}, async (client) => {
    const watch = await client.watch('k');
    await client.put('k', 'mine');
    assert.equal(watch.entry.text(), 'mine');
    // One that was deleted by someone else before the answer came stays deleted.
    lagging.putRevision = 6;
    lagging.onPut = (peer) => peer.gone('k', 7);
    await client.put('k', 'gone already');
    assert.equal(watch.value, undefined);
  });

  withFake('a watch says whether it is live, and keeps what it has', store(two), {}, async (client, server) => {
    const branch = await client.watchBranch('a');
    assert.deepEqual([branch.live, branch.size, branch.get('a.x').text()], [true, 2, '1']);
    two.entries = [['a.y', '5', 5]];
    const seen = [];
    const following = (async () => {
      for await (const { live, size } of branch.changes()) {
        seen.push(`${live} ${size}`);
        if (live && size === 1) {
          return;
        }
      }
    })();
    server.peers[0].socket.destroy();
    await following;
    assert.equal(seen[0], 'true 2');
    assert.ok(seen.includes('false 2'), seen.join());
    assert.deepEqual([...branch].map(([key, entry]) => [key, entry.json()]), [['a.y', 5]]);
    branch.close();
    assert.equal(branch.live, false);
  });

  const highest = {
    'the answer to a put': (peer, { id }) => peer.answer(id, { revision: 9 }),
    'a conflict': (peer, { id }) => peer.answer(id, { status: 409, revision: 9 }),
    'the answer to a list': (peer, { id }) => peer.answer(id, { revision: 3, revisions: [9, 2] }),
    'an update': (peer, { id }) => {
      peer.update('k', 'v', 9);
      peer.answer(id, { revision: 7 });
    },
    'the end of a key': (peer, { id }) => {
      peer.gone('k', 9, 'expired');
      peer.answer(id, { revision: 7 });
    },
    'the end of a snapshot': (peer, { id }) => {
      peer.synced('s', 9);
      peer.answer(id, { revision: 7 });
    },
  };
  for (const [name, onRequest] of Object.entries(highest)) {
    withFake(`what was seen is said on a reconnect: ${name}`, { onRequest }, {}, async (client, server) => {
      await client.put('k', 'v').catch(() => {});
      server.peers[0].socket.destroy();
      await eventually(() => server.of('Connect').length === 2);
      assert.deepEqual(server.of('Connect').map(({ seen }) => seen), [undefined, `${EPOCH}-9`]);
    });
  }

  const conflicts = (peer, { id, key }) => peer.answer(id, { status: 409, revision: Number(key) });
  withFake('a lower revision on a later connection is not what was seen', { onRequest: conflicts }, {}, async (client, server) => {
    for (const key of ['9', '2']) {
      await assert.rejects(client.put(key, 'v', { ifRevision: 0 }), failsWith('CONFLICT'));
      const before = server.peers.length;
      server.peers.at(-1).socket.destroy();
      await eventually(() => server.of('Connect').length > before);
    }
    assert.deepEqual(server.of('Connect').map(({ seen }) => seen), [undefined, `${EPOCH}-9`, `${EPOCH}-9`]);
  });

  // The second and third server lag. The engine behind the fifth has lost the newest changes.
  test('a client that moves to another server sees nothing older, or begins anew', { timeout: 60_000 }, async (t) => {
    const state = { entries: [['a.x', 'new', 5], ['a.y', 'new', 9]], revision: 9 };
    const server = await fakeFor(t, {
      ...store(state),
      onConnect: (peer, request) => {
        const count = server.of('Connect').length;
        if (count === 2 || count === 3) {
          peer.answer(request.id, { status: 503, message: 'it is not as far yet' });
          return;
        }
        if (count === 5) {
          [state.entries, state.revision] = [[['a.x', 'old', 2]], 3];
        }
        peer.greet(request, EPOCH, count === 5 ? { begins_anew: true } : {});
      },
    });
    const client = await clientFor(t, server.addr, { backoffMin: 20, backoffMax: 200 });
    const subscription = client.subscribe('a');
    assert.deepEqual(await take(subscription, 3), ['update a.x new', 'update a.y new', 'synced']);
    const branch = await client.watchBranch('a');
    const cut = () => server.peers.at(-1).socket.destroy();
    cut();
    assert.deepEqual(await take(subscription, 3), ['reconnecting', 'connected', 'synced']);
    assert.deepEqual([branch.live, branch.size], [true, 2]);
    cut();
    assert.deepEqual(await take(subscription, 5), ['reconnecting', 'connected', 'update a.x old', 'gone a.y missed', 'synced']);
    assert.deepEqual([...branch].map(([key, entry]) => [key, entry.text(), entry.revision.number]), [['a.x', 'old', 2]]);
    assert.equal(branch.revision.number, 3);
    cut();
    assert.deepEqual(await take(subscription, 3), ['reconnecting', 'connected', 'synced']);
    const seen = server.of('Connect').map((request) => request.seen);
    assert.deepEqual(seen, [undefined, ...Array(4).fill(`${EPOCH}-9`), `${EPOCH}-3`]);
  });

  test('250 subscriptions, half of them dropped while there is no connection', { timeout: 60_000 }, async (t) => {
    const server = await fakeFor(t, store({ entries: [], revision: 1 }));
    const client = await clientFor(t, server.addr, { backoffMin: 300 });
    const all = Array.from({ length: 250 }, (_, number) => client.subscribe(`s.${number}`));
    await Promise.all(all.map((subscription) => subscription.ready()));
    server.peers[0].socket.destroy();
    await eventually(() => client.state === 'reconnecting');
    all.slice(0, 125).forEach((subscription) => subscription.close());
    const before = server.of('Subscribe').length;
    await eventually(() => client.state === 'connected');
    await client.exists('x');
    assert.equal(server.of('Subscribe').length - before, 125);
    server.peers[1].update('s.200', 'x', 2);
    assert.deepEqual(await take(all[200], 3), ['connected', 'synced', 'update s.200 x']);
  });
});

describe('several patterns', () => {
  const snapshot = (entriesOf) => (peer, request) => {
    const { id, type, key } = request;
    if (type !== 'Subscribe') {
      peer.answer(id, { revision: 1 });
      return;
    }
    peer.send('Hello');
    const { entries, revision } = entriesOf(key);
    entries.forEach(([name, value, at]) => peer.update(name, value, at));
    peer.synced(key, revision);
  };
  /** The events up to the next `synced`, those of the connection too. */
  const synced = async (subscription) => {
    for (const texts = []; ; ) {
      const event = await subscription.take({ timeout: 30_000 });
      assert.ok(event !== undefined, `it ended after ${texts}`);
      texts.push([event.type, event.key, event.type === 'synced' ? event.revision.number : event.reason].filter(Boolean).join(' '));
      if (event.type === 'synced') {
        return texts;
      }
    }
  };

  const at = { a: 7, 'b.*': 5, c: 8 };
  const each = (key) => ({ entries: [[`${key[0]}.x`, '1', at[key]]], revision: at[key] });
  withFake('are synced once all are, up to the lowest revision', { onRequest: snapshot(each) }, {}, async (client, server) => {
    const subscription = client.subscribe(['a.x', 'b.*', 'a', 'b.y', 'c', 'a']);
    assert.deepEqual([subscription.pattern, subscription.patterns], ['b.*', ['b.*', 'a', 'c']]);
    assert.deepEqual(await synced(subscription), ['update b.x', 'update a.x', 'update c.x', 'synced 5']);
    server.peers[0].socket.destroy();
    const lost = await subscription.take({ timeout: 30_000 });
    assert.deepEqual([lost.type, ...(await synced(subscription))], ['reconnecting', 'connected', 'synced 5']);
    assert.throws(() => client.subscribe([]), failsWith('INVALID_KEY'));
    assert.throws(() => client.subscribe(['a', 'b..c']), failsWith('INVALID_KEY'));
    assert.throws(() => client.subscribe(['a', 'b.*'], { exact: true }), TypeError);
    assert.equal(server.of('Subscribe').length, 6);
  });

  const anew = {
    onRequest: (peer, request) => {
      const first = [['.x', '1', 8], ['.y', '1', 9]];
      const entries = peer.isAnew ? [['.x', '2', 2]] : first;
      const of = (key) => ({ entries: entries.map(([name, value, revision]) => [key + name, value, revision]), revision: peer.isAnew ? 3 : 9 });
      snapshot(of)(peer, request);
    },
    onConnect: (peer, request) => {
      peer.isAnew = request.seen !== undefined;
      peer.greet(request, EPOCH, peer.isAnew ? { begins_anew: true } : {});
    },
  };
  withFake('begin anew', anew, {}, async (client, server) => {
    const subscription = client.subscribe(['a', 'b']);
    assert.equal((await synced(subscription)).length, 5);
    server.peers[0].socket.destroy();
    const news = (await synced(subscription)).filter((text) => !/connect/.test(text)).sort();
    assert.deepEqual(news, ['gone a.y missed', 'gone b.y missed', 'synced 3', 'update a.x', 'update b.x']);
    for (const key of ['a', 'b']) {
      server.peers[1].send({ Reset: { key } });
      server.peers[1].synced(key, 4);
    }
    assert.deepEqual([(await subscription.take()).key, (await subscription.take()).key], ['a.x', 'b.x']);
  });

  const replacing = (peer, request) => {
    snapshot(() => ({ entries: [], revision: 1 }))(peer, request);
    if (request.type === 'Subscribe' && request.key === 'c') {
      peer.send({ Close: { key: 'a', reason: 'replaced' } });
    }
  };
  withFake('end with the first of them that ends', { onRequest: replacing }, {}, async (client, server) => {
    const subscription = client.subscribe(['a', 'b', 'c']);
    await assert.rejects(
      async () => {
        for await (const _ of subscription);
      },
      (error) => error.code === 'ENDED' && error.reason === 'replaced',
    );
    await eventually(() => server.of('Unsubscribe').length === 2);
    assert.deepEqual(server.of('Unsubscribe').map(({ key }) => key), ['b', 'c']);
  });

  const refusing = (peer, request) => {
    if (request.type === 'Subscribe' && request.key === 'b') {
      peer.answer(request.id, { status: 429, message: 'too many' });
    } else {
      snapshot(() => ({ entries: [], revision: 1 }))(peer, request);
    }
  };
  withFake('are refused with the first of them that is', { onRequest: refusing }, {}, async (client, server) => {
    const subscription = client.subscribe(['a', 'b', 'c']);
    await assert.rejects(subscription.ready(), failsWith('REFUSED'));
    await eventually(() => server.of('Unsubscribe').length === 2);
    assert.deepEqual(server.of('Unsubscribe').map(({ key }) => key), ['a', 'c']);
  });

  const six = (key) => ({ entries: Array.from({ length: 6 }, (_, n) => [`${key}.${n}`, '', n + 1]), revision: 9 });
  withFake('share one limit', { onRequest: snapshot(six) }, { subscriptionLenMax: 3_000 }, async (client) => {
    // Six keys of some 200 bytes each, known and waiting, are not too much. Eighteen are, also when all were read.
    assert.equal((await synced(client.subscribe('a'))).length, 7);
    await assert.rejects(synced(client.subscribe(['b', 'c', 'd'])), (error) => error.reason === 'too-much');
  });
});
