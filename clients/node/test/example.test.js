'use strict';

const assert = require('node:assert/strict');
const { execFile } = require('node:child_process');
const path = require('node:path');
const { test } = require('node:test');
const { promisify } = require('node:util');

const { missing, startStage } = require('../testing/stage.js');

test('the example runs', { skip: missing(), timeout: 60_000 }, async (t) => {
  const stage = await startStage();
  t.after(() => stage.stop());
  const example = path.join(__dirname, '..', 'examples', 'live-config.js');
  const { stdout } = await promisify(execFile)(process.execPath, [example, stage.addresses.direct], { timeout: 30_000 });
  assert.match(stdout, /limit 30, verbose true\nok\n$/);
});
