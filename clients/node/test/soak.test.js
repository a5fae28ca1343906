'use strict';

// Random writes, cuts and lost data: what a client knows in the end is what there is, and nothing came twice.

const assert = require('node:assert/strict');
const { randomInt } = require('node:crypto');
const { test } = require('node:test');
const { setTimeout: sleep } = require('node:timers/promises');

const nkv = require('../index.js');
const { missing, startStage } = require('../testing/stage.js');

const ROUNDS = 100;
const PATTERNS = ['a', 'a.b', 'a.*', 'a.b.*', '*', 'c'];
const KEYS = ['a', 'a.b', 'a.b.c', 'a.b.d', 'a.e', 'c', 'c.f', 'a-b', 'g'];
const seed = Number(process.env.NKV_SEED ?? randomInt(2 ** 31));

/** A small generator of numbers (mulberry32), so that a seed repeats a run. */
function generator(state) {
  return (below) => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) % below;
  };
}

/** Follows a subscription, and checks each event against those before. */
function follow(subscription) {
  const state = new Map();
  const seen = new Map();
  const check = ({ type, key, value, revision, reason }) => {
    if (type !== 'update' && type !== 'gone') {
      return;
    }
    const last = seen.get(key);
    if (last !== undefined && last.epoch === revision.epoch) {
      const isLater = type === 'update' ? revision.number > last.number : revision.number >= last.number;
      assert.ok(isLater, `${type} ${key} at ${revision} after ${last}`);
    }
    seen.set(key, revision);
    if (type === 'update') {
      state.set(key, value.toString());
    } else {
      assert.ok(state.delete(key), `${key} is ${reason}, and was not there`);
    }
  };
  const ended = (async () => {
    for await (const event of subscription) {
      check(event);
    }
  })();
  ended.catch(() => {});
  return { state, ended };
}

test(`random writes and cuts, seed ${seed}`, { skip: missing(), timeout: 180_000 }, async () => {
  const random = generator(seed);
  const stage = await startStage();
  const writer = new nkv.Client(stage.addresses.direct, { requestTimeout: 20_000, backoffMax: 100 });
  const reader = new nkv.Client(stage.addresses.proxy, { requestTimeout: 20_000, backoffMax: 100 });
  try {
    const followed = PATTERNS.map((pattern) => follow(reader.subscribe(pattern)));
    const branches = await Promise.all(PATTERNS.map((pattern) => reader.watchBranch(pattern)));
    const actions = {
      cut: () => stage.command('cut'),
      'cut later': () => stage.command(`cut-after-bytes ${random(3_000)}`),
      down: async () => {
        await stage.command('down');
        await writer.put('a.b', 'while down');
        await writer.delete('a.b.*');
        await stage.command('up');
      },
      wipe: async () => {
        await stage.command('server-kill');
        await stage.command('server-wipe');
        await stage.command('server-start');
      },
      own: () => reader.put(KEYS[random(KEYS.length)], `own ${random(1000)}`).catch(({ code }) => assert.equal(code, 'OUTCOME_UNKNOWN')),
      pause: () => sleep(random(60)),
    };
    for (let round = 0; round < ROUNDS; round += 1) {
      const writes = Array.from({ length: random(20) }, () => {
        const key = KEYS[random(KEYS.length)];
        return random(3) === 0 ? writer.delete(key) : writer.put(key, `${round} ${'x'.repeat(random(200))}`);
      });
      const dice = random(20);
      const name = dice < 5 ? 'cut' : dice < 8 ? 'cut later' : dice < 9 ? 'down' : dice < 10 ? 'wipe' : dice < 15 ? 'own' : 'pause';
      const results = await Promise.allSettled([...writes, actions[name]()]);
      const failed = results.filter(({ reason }) => reason !== undefined && reason.code !== 'OUTCOME_UNKNOWN');
      assert.deepEqual(failed, [], name);
    }
    await writer.put('end', 'x');
    for (const [index, pattern] of PATTERNS.entries()) {
      const present = await writer.getAll('*');
      const covered = present.filter(({ key }) => isCoveredBy(pattern, key));
      const expected = new Map(covered.map((entry) => [entry.key, entry.text()]));
      const isSame = (map, text) =>
        map.size === expected.size && [...map].every(([key, value]) => text(value) === expected.get(key));
      const until = performance.now() + 60_000;
      while (!isSame(followed[index].state, (text) => text) || !isSame(branches[index], (entry) => entry.text())) {
        assert.ok(performance.now() < until, `${pattern}: ${[...followed[index].state.keys()]}, ${[...branches[index].keys()]} instead of ${[...expected.keys()]}`);
        await sleep(20);
      }
    }
    await reader.close();
    await Promise.all(followed.map(({ ended }) => ended));
  } finally {
    await reader.close();
    await writer.close();
    await stage.stop();
  }
});

function isCoveredBy(pattern, key) {
  const branch = pattern.replace(/\.?\*$/, '');
  const isBelow = branch === '' || key.startsWith(`${branch}.`);
  return isBelow || (key === branch && !pattern.endsWith('*'));
}
