#!/usr/bin/env node
'use strict';

// Live configuration: a service reads its settings from nkv, and follows every change without a restart.
//
//   nkv-server --persist memory &
//   node examples/live-config.js [ADDR]
//
// It plays both sides, the service and its operator, and ends by itself.

const assert = require('node:assert/strict');
const { connect, ConflictError } = require('..');

async function main(addr = '127.0.0.1:4222') {
  const operator = await connect(addr, { name: 'operator' });
  await operator.delete('example.config.*');
  await operator.put('example.config.limit', '10');

  // The service: a branch that is always current, over lost connections too.
  const service = await connect(addr, { name: 'service', waitForServer: 10_000 });
  const config = await service.watchBranch('example.config');
  const setting = (name, fallback) => config.get(`example.config.${name}`)?.json() ?? fallback;
  assert.equal(setting('limit', 1), 10);
  assert.equal(setting('verbose', false), false);

  const following = (async () => {
    for await (const _ of config.changes()) {
      console.log(`limit ${setting('limit', 1)}, verbose ${setting('verbose', false)}${config.live ? '' : ' (stale)'}`);
      if (setting('limit', 1) === 30 && setting('verbose', false)) {
        return;
      }
    }
  })();

  // The operator changes settings; one of them only if no one else has changed it meanwhile.
  await operator.put('example.config.verbose', 'true');
  const limit = await operator.get('example.config.limit');
  await operator.put('example.config.limit', '20', { ifRevision: limit.revision });
  await assert.rejects(operator.put('example.config.limit', '99', { ifRevision: limit.revision }), ConflictError);
  await operator.put('example.config.limit', '30');

  await following;
  await operator.delete('example.config.*');
  await Promise.all([service.close(), operator.close()]);
  console.log('ok');
}

main(process.argv[2]).catch((error) => {
  console.error(error.message);
  process.exitCode = 1;
});
