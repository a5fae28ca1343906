'use strict';

// The stage of a scenario (../../scenarios/README.md): a server with an empty store behind a proxy that cuts.

const { spawn } = require('node:child_process');
const fs = require('node:fs');
const path = require('node:path');
const readline = require('node:readline');

const scenarios = process.env.NKV_SCENARIOS ?? path.join(__dirname, '..', '..', 'scenarios');
const target = process.env.CARGO_TARGET_DIR ?? path.join(__dirname, '..', '..', '..', 'target');

/** The server under test; undefined if there is none. */
const server =
  process.env.NKV_SERVER ??
  ['release', 'debug'].map((profile) => path.join(target, profile, 'nkv-server')).find((file) => fs.existsSync(file));

/** What a test needs that is not there: undefined, or the reason to skip it. With CI=true nothing is skipped. */
function missing() {
  const what = server === undefined ? 'NKV_SERVER is not set, and no server was built' : undefined;
  if (what !== undefined && process.env.CI === 'true') {
    throw new Error(what);
  }
  return what;
}

async function startStage() {
  const env = { ...process.env, NKV_SERVER: path.resolve(server) };
  const child = spawn('python3', [path.join(scenarios, 'proxy.py')], { env, stdio: ['pipe', 'pipe', 'inherit'] });
  const lines = readline.createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  const line = async () => {
    const { done, value } = await lines.next();
    if (done) {
      throw new Error('the stage has ended');
    }
    return value;
  };
  const ended = new Promise((resolve) => child.once('close', resolve));
  const addresses = JSON.parse(await line());
  let last = Promise.resolve();
  const command = async (text) => {
    child.stdin.write(`${text}\n`);
    const answer = await line();
    if (!answer.startsWith('ok')) {
      throw new Error(`stage: ${text}: ${answer}`);
    }
    return answer.slice(3);
  };
  return {
    addresses,
    /** Commands are answered in their order, also if several are given at once. */
    command(text) {
      last = last.then(() => command(text));
      return last;
    },
    async stop() {
      child.stdin.end();
      await ended;
    },
  };
}

module.exports = { missing, scenarios, startStage };
