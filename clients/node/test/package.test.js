'use strict';

// The package as npm packs it: loaded away from the checkout, from ESM and CommonJS, and by TypeScript.

const assert = require('node:assert/strict');
const { execFile } = require('node:child_process');
const fs = require('node:fs');
const os = require('node:os');
const path = require('node:path');
const { after, before, describe, test } = require('node:test');
const { promisify } = require('node:util');

const own = require('../package.json');

const TYPESCRIPT = ['typescript@5.9.3', 'typescript@5.4.5'];
const NODE_TYPES = '@types/node@20.19.0';
const root = path.join(__dirname, '..');

async function run(command, args, cwd) {
  try {
    const { stdout } = await promisify(execFile)(command, args, { cwd, shell: process.platform === 'win32', timeout: 500_000 });
    return stdout;
  } catch (error) {
    throw new Error(`${command} ${args.join(' ')}: ${error.message}\n${error.stdout}\n${error.stderr}`);
  }
}

/** A project that has the packed package installed, and whatever else it names. */
async function project(tarball, ...others) {
  const dir = fs.mkdtempSync(path.join(os.tmpdir(), 'nkv-client-'));
  fs.writeFileSync(path.join(dir, 'package.json'), '{"private":true}');
  const offline = others.length === 0 ? ['--offline'] : ['--fetch-retries=5', '--fetch-timeout=60000'];
  await run('npm', ['install', '--no-audit', '--no-fund', '--ignore-scripts', ...offline, tarball, ...others], dir);
  return dir;
}

describe('the package', () => {
  let packed;
  const dirs = [];

  before(async () => {
    const dir = fs.mkdtempSync(path.join(os.tmpdir(), 'nkv-pack-'));
    dirs.push(dir);
    const [{ filename, files }] = JSON.parse(await run('npm', ['pack', '--json', '--pack-destination', dir], root));
    packed = { tarball: path.join(dir, filename), files: files.map((file) => file.path) };
  });
  after(() => dirs.forEach((dir) => fs.rmSync(dir, { recursive: true, force: true })));

  test('has all that it needs, and no more', () => {
    for (const file of ['LICENSE', 'README.md', 'package.json', 'index.js', 'index.mjs', 'index.d.ts', 'index.d.mts']) {
      assert.ok(packed.files.includes(file), file);
    }
    for (const file of packed.files) {
      assert.match(file, /^(LICENSE|README\.md|package\.json|index\.(m?js|d\.m?ts)|lib\/\w+\.js|examples\/[\w-]+\.js)$/);
    }
    assert.deepEqual(Object.keys(own.dependencies ?? {}), []);
  });

  test('loads from ESM and CommonJS, with the same classes, and has what its types say', async () => {
    const dir = await project(packed.tarball);
    dirs.push(dir);
    fs.writeFileSync(
      path.join(dir, 'esm.mjs'),
      `import * as esm from 'nkv-client';
       import { createRequire } from 'node:module';
       const cjs = createRequire(import.meta.url)('nkv-client');
       for (const name of Object.keys(cjs)) if (esm[name] !== cjs[name]) throw new Error(name);
       console.log(JSON.stringify(Object.keys(esm).sort()));`,
    );
    fs.writeFileSync(
      path.join(dir, 'cjs.cjs'),
      `const cjs = require('nkv-client');
       console.log(JSON.stringify(Object.keys(cjs).sort()));`,
    );
    const esm = JSON.parse(await run(process.execPath, ['esm.mjs'], dir));
    assert.deepEqual(JSON.parse(await run(process.execPath, ['cjs.cjs'], dir)), esm);
    const types = fs.readFileSync(path.join(dir, 'node_modules', 'nkv-client', 'index.d.ts'), 'utf8');
    const declared = [...types.matchAll(/^export (?:class|function) (\w+)/gm)].map(([, name]) => name);
    assert.deepEqual(declared.sort(), esm);
  });

  test('has the members that its types declare, and no others', () => {
    const nkv = require('..');
    const types = fs.readFileSync(path.join(root, 'index.d.ts'), 'utf8');
    for (const [, name, body] of types.matchAll(/^export class (Client|Subscription|Watch|Branch|Revision|Entry)\b[^{]*\{\n(.*?)^\}/gms)) {
      const declared = new Set([...body.matchAll(/^ {2}(?:readonly |static )?(\w+)[(:?]/gm)].map(([, member]) => member));
      for (let proto = nkv[name].prototype; proto !== Object.prototype; proto = Object.getPrototypeOf(proto)) {
        for (const member of Object.getOwnPropertyNames(proto)) {
          assert.ok(declared.has(member) || member === 'constructor', `${name}.${member} is not declared`);
        }
      }
    }
  });

  for (const typescript of TYPESCRIPT) {
    test(`has types for ${typescript} in each module mode`, { timeout: 600_000 }, async (t) => {
      let dir;
      try {
        dir = await project(packed.tarball, typescript, NODE_TYPES);
      } catch (error) {
        if (process.env.CI === 'true') {
          throw error;
        }
        t.skip(`${typescript} cannot be installed: ${error.message.split('\n')[0]}`);
        return;
      }
      dirs.push(dir);
      const usage = fs.readFileSync(path.join(root, 'testing', 'types', 'usage.txt'), 'utf8');
      const modes = [
        ['esm.mts', 'node16', 'node16'],
        ['cjs.cts', 'node16', 'node16'],
        ['next.mts', 'nodenext', 'nodenext'],
        ['bundler.ts', 'esnext', 'bundler'],
      ];
      for (const [file, module, moduleResolution] of modes) {
        fs.writeFileSync(path.join(dir, file), usage);
        const target = ['--target', 'es2022', '--lib', 'es2022', '--types', 'node'];
        const options = ['--strict', '--noEmit', ...target, '--module', module, '--moduleResolution', moduleResolution];
        await run(process.execPath, [path.join('node_modules', 'typescript', 'bin', 'tsc'), ...options, file], dir);
      }
    });
  }
});
