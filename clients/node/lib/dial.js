'use strict';

// From an address to a connected socket. Everything here ends when its signal fires, and leaves nothing behind that
// would keep the process alive.

const dns = require('node:dns');
const fs = require('node:fs/promises');
const net = require('node:net');
const path = require('node:path');

/** The addresses of a name are tried this much apart, the earlier ones going on. */
const ATTEMPT_MS = 250;
/** Above this, name servers count as slow: the answer that came is used, and the system is not asked as well. */
const SLOW_MS = 1000;

const ignore = () => {};

/** Runs something that cannot be stopped, but not for longer than the signal allows. */
function until(signal, start) {
  return new Promise((resolve, reject) => {
    signal.throwIfAborted();
    const aborted = () => reject(signal.reason);
    signal.addEventListener('abort', aborted, { once: true });
    const done = (end) => (result) => {
      signal.removeEventListener('abort', aborted);
      end(result);
    };
    start(done(resolve), done(reject));
  });
}

function callLookup(lookup, host, signal) {
  return until(signal, (resolve, reject) => {
    lookup(host, { all: true }, (error, address, family) => {
      if (error) {
        reject(error);
      } else {
        resolve(Array.isArray(address) ? address : [{ address, family }]);
      }
    });
  });
}

/**
 * Looks a name up as the system does. That cannot be stopped once it has begun, and where no name server answers, it
 * holds the process for many seconds. So the name servers are asked first in a way that can be stopped; only if they
 * answer, or cannot be reached at all, is the system asked.
 */
async function systemLookup(host, signal) {
  const name = host.toLowerCase().replace(/\.$/, '');
  if (!/(^|\.)(localhost|local)$/.test(name) && !(await isInHostsFile(name))) {
    signal.throwIfAborted();
    const answer = await probe(name, signal);
    if (answer !== undefined) {
      return answer;
    }
  }
  return callLookup(dns.lookup, host, signal);
}

async function isInHostsFile(name) {
  const file =
    process.platform === 'win32'
      ? path.join(process.env.SystemRoot ?? 'C:\\Windows', 'System32', 'drivers', 'etc', 'hosts')
      : '/etc/hosts';
  try {
    const text = await fs.readFile(file, 'utf8');
    return text.split('\n').some((line) => line.replace(/#.*/, '').trim().toLowerCase().split(/\s+/).slice(1).includes(name));
  } catch {
    return false;
  }
}

/** Whether the name servers answer: undefined if the system may be asked, else the addresses, or an error. */
async function probe(name, signal) {
  const resolver = new dns.promises.Resolver();
  const cancel = () => resolver.cancel();
  signal.addEventListener('abort', cancel, { once: true });
  const begun = performance.now();
  try {
    const answers = await Promise.allSettled([resolver.resolve4(name), resolver.resolve6(name)]);
    signal.throwIfAborted();
    const silent = answers.find(({ reason }) => reason?.code === 'ETIMEOUT' || reason?.code === 'ETIMEDOUT');
    const addresses = answers.flatMap(({ value }, index) =>
      (value ?? []).map((address) => ({ address, family: index === 0 ? 4 : 6 })),
    );
    if (silent === undefined && performance.now() - begun < SLOW_MS) {
      return undefined;
    }
    if (addresses.length > 0) {
      return addresses;
    }
    throw (silent ?? answers[0]).reason;
  } finally {
    signal.removeEventListener('abort', cancel);
  }
}

async function addressesOf(host, lookup, signal) {
  const family = net.isIP(host);
  if (family !== 0) {
    return [{ address: host, family }];
  }
  const found = lookup === undefined ? await systemLookup(host, signal) : await callLookup(lookup, host, signal);
  if (found.length === 0 || !found.every(({ address }) => net.isIP(address) !== 0)) {
    throw new Error(`no address was found for ${host}`);
  }
  return found;
}

/** Tries targets in turn, ATTEMPT_MS apart; the first socket that is connected wins, the others are destroyed. */
function race(targets, signal) {
  return new Promise((resolve, reject) => {
    signal.throwIfAborted();
    const sockets = new Set();
    let next = 0;
    let timer;
    let lastError;
    const finish = (end, result, winner) => {
      clearTimeout(timer);
      signal.removeEventListener('abort', aborted);
      for (const socket of sockets) {
        if (socket !== winner) {
          socket.destroy();
        }
      }
      sockets.clear();
      end(result);
    };
    const aborted = () => finish(reject, signal.reason);
    const tryNext = () => {
      clearTimeout(timer);
      if (next === targets.length) {
        if (sockets.size === 0) {
          finish(reject, lastError);
        }
        return;
      }
      const socket = net.connect(targets[next]);
      next += 1;
      sockets.add(socket);
      // For good: an error must always find a listener, also long after the race.
      socket.on('error', ignore);
      socket.once('connect', () => finish(resolve, socket, socket));
      socket.once('error', (error) => {
        if (sockets.delete(socket)) {
          lastError = error;
          tryNext();
        }
      });
      timer = setTimeout(tryNext, ATTEMPT_MS);
    };
    signal.addEventListener('abort', aborted, { once: true });
    tryNext();
  });
}

/** Returns a connected socket, or throws what went wrong last, or the reason of the signal. */
async function dial({ host, port, path: socketPath }, lookup, signal) {
  if (socketPath !== undefined) {
    return race([{ path: socketPath }], signal);
  }
  const addresses = await addressesOf(host, lookup, signal);
  const socket = await race(
    addresses.map(({ address }) => ({ host: address, port })),
    signal,
  );
  socket.setNoDelay(true);
  socket.setKeepAlive(true, 30_000);
  return socket;
}

module.exports = { dial };
