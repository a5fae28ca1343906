'use strict';

// Runs the scenarios that all clients share (../../scenarios/cases.json) against the real server.

const assert = require('node:assert/strict');
const fs = require('node:fs');
const path = require('node:path');
const { describe, test } = require('node:test');
const { setTimeout: sleep } = require('node:timers/promises');

const nkv = require('../index.js');
const { missing, scenarios, startStage } = require('../testing/stage.js');

/** The limit of a wait that names none, and of a request. */
const WAIT_MS = 60_000;
/** The limit of what is to return at once. */
const SOON_MS = 10_000;
const skip = missing();
const cases = JSON.parse(fs.readFileSync(path.join(scenarios, 'cases.json'), 'utf8'));

const hexText = (bytes) => {
  const text = bytes.toString('utf8');
  return Buffer.from(text).equals(bytes) ? text : undefined;
};

/** A text of a case: a key, or what stands for one. Undefined: this language has no such string. */
function textOf(form) {
  if (typeof form === 'string') {
    return form;
  }
  if (form?.repeat !== undefined) {
    return form.repeat.repeat(form.times);
  }
  if (form?.utf16 !== undefined) {
    return String.fromCharCode(...form.utf16);
  }
  return form?.hex === undefined ? form : hexText(Buffer.from(form.hex, 'hex'));
}

function valueOf(form) {
  return typeof form === 'string' || form.hex === undefined ? Buffer.from(textOf(form)) : Buffer.from(form.hex, 'hex');
}

function manyValue(number, size = 0) {
  return Buffer.from(String(number).padEnd(size, 'x'));
}

/** The name that the scenarios have for an error. */
function errorName(error) {
  if (error instanceof nkv.NkvError) {
    return error.code.toLowerCase();
  }
  if (error?.name === 'AbortError') {
    return 'cancelled';
  }
  return error instanceof TypeError || error instanceof RangeError ? 'invalid_argument' : `unexpected: ${error?.stack}`;
}

class Run {
  clients = new Map();
  saved = new Map();
  subscriptions = new Map();
  watches = new Map();
  background = new Map();

  constructor(stage, given) {
    this.stage = stage;
    this.given = given.clients ?? { a: { via: 'proxy' } };
  }

  client(name = 'a') {
    if (!this.clients.has(name)) {
      const { via, timeout_ms: requestTimeout = WAIT_MS } = this.given[name];
      this.clients.set(name, new nkv.Client(this.stage.addresses[via], { requestTimeout }));
    }
    return this.clients.get(name);
  }

  revision(form) {
    return typeof form === 'string' ? this.saved.get(form.slice(1)) : form;
  }

  /** Runs a step, and checks that it ends as it is to. */
  async step(step, signal) {
    const key = textOf(step.key);
    if (step.key !== undefined && key === undefined) {
      return;
    }
    const allowed = [step.error ?? []].flat();
    // Of several gets, each may end with an error that is named.
    const mayPass = step.error === undefined || step.op === 'get_many' || allowed.includes('ok');
    let error;
    try {
      await this.call({ ...step, key }, signal);
    } catch (caught) {
      if (caught instanceof assert.AssertionError) {
        throw caught;
      }
      error = caught;
    }
    const what = JSON.stringify(step).slice(0, 300);
    if (error === undefined) {
      assert.ok(mayPass, `${what} passed`);
      return;
    }
    assert.ok(allowed.includes(errorName(error)), `${what} failed: ${errorName(error)}: ${error?.message}`);
    if (step.status !== undefined && error.code === 'REFUSED') {
      assert.equal(error.status, step.status, what);
    }
    if (step.revision !== undefined && error.code === 'CONFLICT') {
      const revision = this.revision(step.revision);
      assert.ok(typeof revision === 'number' ? error.revision.number === revision : error.revision.equals(revision), what);
    }
  }

  async call(step, signal) {
    const call = this[step.op];
    assert.ok(call !== undefined, `unknown op '${step.op}'`);
    await call.call(this, step, this.limits(step, signal));
  }

  limits({ timeout_ms: timeout }, signal) {
    return { ...(timeout === undefined ? {} : { timeout }), ...(signal === undefined ? {} : { signal }) };
  }

  save({ save }, revision) {
    if (save !== undefined) {
      this.saved.set(save, revision);
    }
  }

  condition({ if_revision: form }) {
    return form === undefined ? {} : { ifRevision: this.revision(form) };
  }

  async put(step, limits) {
    const ttl = step.ttl_ms === undefined ? {} : { ttl: step.ttl_ms };
    const options = { ...this.condition(step), ...ttl, ...limits };
    this.save(step, await this.client(step.on).put(step.key, valueOf(step.value), options));
  }

  async get(step, limits) {
    const until = performance.now() + WAIT_MS;
    const isSo = (entry) => (step.absent ? entry === undefined : entry?.value.equals(valueOf(step.value)));
    while (step.becomes && !isSo(await this.client(step.on).get(step.key, limits)) && performance.now() < until) {
      await sleep(20);
    }
    const entry = await this.client(step.on).get(step.key, limits);
    if (step.absent) {
      assert.equal(entry, undefined, `${step.key} is there`);
      return;
    }
    assert.ok(entry !== undefined, `${step.key} is absent`);
    if (step.value !== undefined) {
      assert.deepEqual(entry.value, valueOf(step.value), step.key);
    }
    if (step.revision !== undefined) {
      assert.ok(entry.revision.equals(this.revision(step.revision)), step.key);
    }
    this.save(step, entry.revision);
  }

  async delete(step, limits) {
    const { count } = await this.client(step.on).delete(step.key, { ...this.condition(step), ...limits });
    if (step.count !== undefined) {
      assert.equal(count, step.count, step.key);
    }
  }

  async update(step, limits) {
    let calls = 0;
    let revision;
    const change = async (old) => {
      calls += 1;
      for (const inner of calls === 1 || step.always ? (step.meanwhile ?? []) : []) {
        await this.step(inner);
      }
      return step.keep ? undefined : Buffer.concat([old?.value ?? Buffer.alloc(0), Buffer.from(step.append)]);
    };
    try {
      revision = await this.client(step.on).update(step.key, change, limits);
    } finally {
      assert.equal(calls, step.calls ?? calls, 'calls of the change');
    }
    assert.equal(revision === undefined, step.absent ?? false);
    if (step.revision !== undefined) {
      assert.ok(revision.equals(this.revision(step.revision)), step.key);
    }
    this.save(step, revision);
  }

  async update_many({ key, clients, count }) {
    const add = (name) => this.client(name).update(key, (old) => String(Number(old?.text() ?? 0) + 1));
    await Promise.all(clients.flatMap((name) => Array.from({ length: count }, () => add(name))));
  }

  async stats({ on, is, above_0: above = [] }, limits) {
    const stats = await this.client(on).stats(limits);
    const of = (name) => stats[name.replace(/_(.)/g, (_, letter) => letter.toUpperCase())];
    for (const [name, value] of Object.entries(is)) {
      assert.equal(of(name), value, name);
    }
    above.forEach((name) => assert.ok(of(name) > 0, name));
    assert.match(stats.epoch, /^[0-9a-f]{32}$/);
  }

  async exists(step, limits) {
    assert.equal(await this.client(step.on).exists(step.key, limits), step.is, step.key);
  }

  async list(step, limits) {
    const options = { limit: step.limit, after: textOf(step.after), ...limits };
    const { items, more } = await this.client(step.on).listPage(textOf(step.pattern), options);
    assert.deepEqual(items.map(({ key }) => key), step.keys);
    assert.equal(more, step.more);
  }

  async get_all(step, limits) {
    const found = await this.client(step.on).getAll(textOf(step.pattern), { pageSize: step.page, ...limits });
    assert.deepEqual(found.map(({ key, value }) => [key, value]), step.entries.map(([key, value]) => [key, valueOf(value)]));
  }

  async put_many({ on, prefix, keys, count, size }, limits) {
    const client = this.client(on);
    const put = (number) => client.put(`${prefix}.${number % (keys ?? count)}`, manyValue(number, size), limits);
    await Promise.all(Array.from({ length: count }, (_, number) => put(number)));
  }

  async get_many({ on, prefix, count, size, error }, limits) {
    const client = this.client(on);
    const get = async (number) => {
      let entry;
      try {
        entry = await client.get(`${prefix}.${number}`, limits);
      } catch (caught) {
        assert.ok([error ?? []].flat().includes(errorName(caught)), errorName(caught));
        return;
      }
      assert.deepEqual(entry?.value, manyValue(number, size));
    };
    await Promise.all(Array.from({ length: count }, (_, number) => get(number)));
  }

  async mix_many({ on, prefix, count, size }, limits) {
    const client = this.client(on);
    const calls = [];
    for (let number = 0; number < count; number += 1) {
      calls.push(client.put(`${prefix}.${number}`, manyValue(number, size), limits));
      if (number > 0) {
        calls.push(
          client.get(`${prefix}.${number - 1}`, limits).then((entry) => {
            assert.ok(entry === undefined || entry.value.equals(manyValue(number - 1, size)), `get ${number - 1}`);
          }),
        );
      }
    }
    await Promise.all(calls);
  }

  async subscribe(step, limits) {
    const options = { snapshot: step.snapshot ?? true, exact: step.exact ?? false };
    const subscription = this.client(step.on).subscribe(step.patterns ?? textOf(step.pattern), options);
    this.subscriptions.set(step.name, subscription);
    await subscription.ready(limits);
  }

  async unsubscribe({ name }) {
    this.subscriptions.get(name).close();
  }

  /** The next event as a list of the scenarios; undefined if it is passed over; null if none came in time. */
  async event(name, limits, withSynced) {
    let event;
    try {
      event = await this.subscriptions.get(name).take(limits);
    } catch (error) {
      if (error.code === 'TIMEOUT' || error.name === 'AbortError') {
        return null;
      }
      throw error;
    }
    assert.ok(event !== undefined, `${name} has ended`);
    switch (event.type) {
      case 'update':
        return ['update', event.key, event.value, event.skipped];
      case 'gone':
        return ['gone', event.key, event.reason, event.skipped];
      case 'synced':
        return withSynced ? ['synced'] : undefined;
      default:
        return undefined;
    }
  }

  async events({ name, expect, ordered, quiet_ms: quiet }) {
    const withSynced = expect.some(([type]) => type === 'synced');
    const until = performance.now() + WAIT_MS;
    const got = [];
    while (got.length < expect.length) {
      const event = await this.event(name, { timeout: Math.max(0, until - performance.now()) }, withSynced);
      assert.ok(event !== null, `${name}: nothing more came than ${JSON.stringify(got.map(shown))}`);
      if (event !== undefined) {
        got.push(event);
      }
    }
    assertEvents(got, expect, ordered);
    for (const end = performance.now() + (quiet ?? 0); performance.now() < end; ) {
      const event = await this.event(name, { timeout: Math.max(0, end - performance.now()) }, withSynced);
      assert.ok(event === null || event === undefined, `${name}: unexpected: ${JSON.stringify(event && shown(event))}`);
    }
  }

  async state({ name, entries }) {
    const until = performance.now() + WAIT_MS;
    const state = new Map();
    while (!isMap(state, entries)) {
      const event = await this.event(name, { timeout: Math.max(0, until - performance.now()) }, false);
      assert.ok(event !== null, `${name}: the state is ${[...state.keys()]}`);
      if (event?.[0] === 'update') {
        state.set(event[1], event[2]);
      } else if (event?.[0] === 'gone') {
        state.delete(event[1]);
      }
    }
  }

  async ended({ name }) {
    const subscription = this.subscriptions.get(name);
    while ((await subscription.take({ timeout: WAIT_MS })) !== undefined);
  }

  async conflated({ name, keys, changes, at_most: most, prefix, count }) {
    const last = new Map();
    const total = count ?? changes;
    for (let number = total - keys; number < total; number += 1) {
      last.set(`${prefix ?? name}.${number % keys}`, manyValue(number));
    }
    const seen = new Map();
    let [sum, read] = [0, 0];
    while (![...last].every(([key, value]) => seen.get(key)?.equals(value))) {
      const event = await this.event(name, { timeout: WAIT_MS }, false);
      assert.ok(event !== null, `${name}: the last values did not come`);
      if (event !== undefined) {
        read += 1;
        sum += 1 + event[3];
        seen.set(event[1], event[2]);
      }
    }
    assert.equal(sum, changes);
    assert.ok(most === undefined || read <= most, `${read} events were read`);
  }

  async poll_cancel({ name, times, each_ms: each, put_during: puts, expect }) {
    const during = (async () => {
      for (const [key, value] of puts ?? []) {
        await sleep(40);
        await this.client('b').put(textOf(key), valueOf(value));
      }
    })();
    const got = [];
    for (let time = 0; time < times; time += 1) {
      const limits = time % 2 === 0 ? { timeout: each } : { signal: AbortSignal.timeout(each) };
      const event = await this.event(name, limits, false).catch((error) => {
        assert.equal(error.name, 'TimeoutError');
        return null;
      });
      if (event) {
        got.push(event);
      }
    }
    await during;
    await this.more(name, got, expect.length);
    assertEvents(got, expect, true);
  }

  async more(name, got, count) {
    while (got.length < count) {
      const event = await this.event(name, { timeout: WAIT_MS }, false);
      assert.ok(event !== null, `${name}: only ${got.length} events came`);
      if (event !== undefined) {
        got.push(event);
      }
    }
  }

  async watch(step, limits) {
    this.watches.set(step.name, await this.client(step.on).watch(step.key, limits));
  }

  async watch_branch(step, limits) {
    this.watches.set(step.name, await this.client(step.on).watchBranch(textOf(step.pattern), limits));
  }

  async watch_is({ name, value, absent }) {
    const watch = this.watches.get(name);
    const isSo = () => (absent ? watch.value === undefined : watch.value?.equals(valueOf(value)));
    await becomes(watch, isSo, () => `${name} is ${watch.value}`);
  }

  async branch_is({ name, entries }) {
    const branch = this.watches.get(name);
    const values = () => new Map([...branch].map(([key, entry]) => [key, entry.value]));
    await becomes(branch, () => isMap(values(), entries), () => `${name} has ${[...branch.keys()]}`);
  }

  async branch_is_now({ name, entries }) {
    const branch = this.watches.get(name);
    assert.ok(isMap(new Map([...branch].map(([key, entry]) => [key, entry.value])), entries), `${[...branch.keys()]}`);
  }

  async lost({ name }) {
    const watch = this.watches.get(name);
    await becomes(watch, () => !watch.live, () => `${name} is live`);
  }

  async unwatch({ name }) {
    this.watches.get(name).close();
  }

  async cancel({ step, after_ms: ms }) {
    const abort = new AbortController();
    const done = this.step(step, abort.signal);
    await sleep(ms);
    const begun = performance.now();
    abort.abort();
    await done;
    assert.ok(performance.now() - begun < SOON_MS, 'it did not return soon');
  }

  async begin({ name, step }) {
    const done = this.step(step);
    done.catch(() => {}); // `join` says so
    this.background.set(name, done);
  }

  async join({ name, within_ms: ms }) {
    await within(this.background.get(name), ms ?? WAIT_MS, name);
  }

  async stage_({ command, reply, at_least: least, at_most: most }) {
    const until = performance.now() + WAIT_MS;
    let answer = await this.stage.command(command);
    while (reply !== undefined && answer !== String(reply) && performance.now() < until) {
      await sleep(20);
      answer = await this.stage.command(command);
    }
    assert.ok(reply === undefined || answer === String(reply), `stage ${command}: ${answer}`);
    assert.ok(least === undefined || Number(answer) >= least, `stage ${command}: ${answer}`);
    assert.ok(most === undefined || Number(answer) <= most, `stage ${command}: ${answer}`);
  }

  async sleep({ ms }) {
    await sleep(ms);
  }

  async close({ on, within_ms: ms }) {
    await within(this.client(on).close(), ms ?? SOON_MS, 'close');
  }

  async within({ ms, steps }) {
    const begun = performance.now();
    for (const step of steps) {
      await this.step(step);
    }
    const took = performance.now() - begun;
    assert.ok(took <= ms, `the steps took ${took} ms`);
  }

  async end() {
    await Promise.all([...this.clients.values()].map((client) => client.close()));
  }
}

// `stage` is the field, so its step has another name here.
const callOf = Run.prototype.call;
Run.prototype.call = function call(step, signal) {
  return callOf.call(this, step.op === 'stage' ? { ...step, op: 'stage_' } : step, signal);
};

function shown([type, key, what]) {
  return [type, key, what instanceof Buffer ? what.toString().slice(0, 40) : what];
}

function isSame(got, [type, key, what]) {
  return (
    got[0] === type &&
    (type === 'synced' ||
      (got[1] === textOf(key) && (type === 'update' ? got[2].equals(valueOf(what)) : what === 'any' || got[2] === what)))
  );
}

function assertEvents(got, expect, ordered) {
  const message = `got ${JSON.stringify(got.map(shown))} instead of ${JSON.stringify(expect)}`;
  assert.equal(got.length, expect.length, message);
  const left = [...got];
  for (const expected of expect) {
    const at = ordered ? (isSame(left[0], expected) ? 0 : -1) : left.findIndex((event) => isSame(event, expected));
    assert.ok(at >= 0, message);
    left.splice(at, 1);
  }
}

function isMap(state, entries) {
  const expected = Array.isArray(entries) ? entries : Object.entries(entries);
  return state.size === expected.length && expected.every(([key, value]) => state.get(key)?.equals(valueOf(value)));
}

async function becomes(watch, isSo, describe_) {
  const signal = AbortSignal.timeout(WAIT_MS);
  try {
    for await (const _ of watch.changes({ signal })) {
      if (isSo()) {
        return;
      }
    }
  } catch (error) {
    assert.equal(error, signal.reason);
  }
  assert.fail(describe_());
}

async function within(promise, ms, what) {
  const abort = new AbortController();
  const late = sleep(ms, 'late', { signal: abort.signal }).catch(() => {});
  try {
    assert.notEqual(await Promise.race([promise, late]), 'late', `${what} took more than ${ms} ms`);
  } finally {
    abort.abort();
  }
}

describe('scenarios', { skip, concurrency: 3 }, () => {
  for (const given of cases) {
    test(`${given.name}: ${given.why}`, { timeout: 120_000 }, async (t) => {
      if (given.needs !== undefined) {
        t.skip(`needs ${given.needs}`);
        return;
      }
      const stage = await startStage();
      const run = new Run(stage, given);
      try {
        for (const step of given.steps) {
          await run.step(step);
        }
      } finally {
        await run.end();
        await stage.stop();
      }
    });
  }
});
