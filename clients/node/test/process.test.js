'use strict';

// What a client does to its process: it never ends it, and never keeps it.

const assert = require('node:assert/strict');
const { spawn } = require('node:child_process');
const path = require('node:path');
const { describe, test } = require('node:test');

/** Runs a program with strict rejections. `endedMs` is the time from its line `closed` to its end. */
function run(program, ...args) {
  return new Promise((resolve) => {
    const file = path.join(__dirname, '..', 'testing', program);
    const child = spawn(process.execPath, ['--unhandled-rejections=strict', file, ...args]);
    let [out, err, closedAt, timer] = ['', ''];
    child.stderr.on('data', (chunk) => (err += chunk));
    child.stdout.on('data', (chunk) => {
      out += chunk;
      if (closedAt === undefined && out.includes('closed\n')) {
        closedAt = performance.now();
      }
    });
    timer = setTimeout(() => child.kill('SIGKILL'), 60_000);
    child.on('close', (code) => {
      clearTimeout(timer);
      resolve({ code, out, err, endedMs: performance.now() - closedAt });
    });
  });
}

describe('a program ends by itself after close()', { concurrency: 2 }, () => {
  const states = [
    'at once',
    'in a pause between attempts',
    'in the lookup of a name that is never answered',
    'in a lookup of its own that never returns',
    'in connect',
    'before Connect is answered',
    'with calls, subscriptions and watches under way',
  ];
  for (const state of states) {
    test(state, { timeout: 90_000 }, async () => {
      const { code, out, err, endedMs } = await run('program.js', state);
      assert.deepEqual([code, err], [0, ''], out);
      // 500 ms are promised; a busy machine may be late. What would keep it lasts longer.
      assert.ok(endedMs < 20_000, `${endedMs} ms`);
      if (state.startsWith('with calls')) {
        assert.match(out, /CLOSED OUTCOME_UNKNOWN CLOSED CLOSED CLOSED ended/);
      }
    });
  }
});

test('a program lives on when its server ends connections in any state', { timeout: 120_000 }, async () => {
  const { code, out, err } = await run('survivor.js');
  assert.deepEqual([code, err], [0, ''], out);
  assert.match(out, /lived through \d\d+ ends/);
});
