'use strict';

// A server that does what a test says, and records what it is sent.

const net = require('node:net');

const EPOCH = '0'.repeat(32);
const FEATURES = ['reset', 'ahead', 'exact', 'names', 'alive'];

/** One connection of a fake server. */
class Peer {
  #data = Buffer.alloc(0);

  constructor(socket, onRequest) {
    this.socket = socket;
    socket.on('error', () => {});
    socket.on('data', (chunk) => {
      this.#data = Buffer.concat([this.#data, chunk]);
      for (;;) {
        const end = this.#data.indexOf(10);
        if (end < 0) {
          return;
        }
        const request = JSON.parse(this.#data.subarray(0, end).toString());
        const len = request.len === undefined ? 0 : request.len + 1;
        if (this.#data.length < end + 1 + len) {
          return;
        }
        request.payload = this.#data.subarray(end + 1, end + len);
        this.#data = this.#data.subarray(end + 1 + len);
        onRequest(this, request);
      }
    });
  }

  send(message, payload) {
    this.socket.write(`${JSON.stringify(message)}\n`);
    if (payload !== undefined) {
      this.socket.write(Buffer.concat([Buffer.from(payload), Buffer.from('\n')]));
    }
  }

  greet({ id }, epoch = EPOCH, fields = {}) {
    this.answer(id, { server: 'nkv', version: '0', protocol: 1, epoch, max_value: 1 << 20, features: FEATURES, ...fields });
  }

  answer(id, fields = {}) {
    this.send({ Base: { id, status: 200, message: 'No Error', ...fields } });
  }

  update(key, value, revision, skipped = 0) {
    this.send({ Update: { key, revision, len: Buffer.byteLength(value), skipped } }, value);
  }

  gone(key, revision, reason = 'deleted') {
    this.send({ Close: { key, revision, skipped: 0, reason } });
  }

  synced(key, revision, epoch = EPOCH) {
    this.send({ Synced: { key, revision, epoch } });
  }
}

/** `onRequest(peer, request)` answers all but `Connect`, unless `onConnect` does that. */
async function fakeServer({ onRequest = () => {}, onConnect = (peer, request) => peer.greet(request), onPeer = () => {} }) {
  const requests = [];
  const peers = [];
  const server = net.createServer((socket) => {
    const peer = new Peer(socket, (from, request) => {
      requests.push(request);
      (request.type === 'Connect' ? onConnect : onRequest)(from, request);
    });
    peers.push(peer);
    onPeer(peer);
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address();
  return {
    addr: `127.0.0.1:${port}`,
    port,
    requests,
    peers,
    of: (type) => requests.filter((request) => request.type === type),
    async close() {
      peers.forEach(({ socket }) => socket.destroy());
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

/** Waits until something is so. */
async function eventually(isSo, ms = 50_000) {
  for (const until = performance.now() + ms; !isSo(); ) {
    if (performance.now() > until) {
      throw new Error(`it did not become so within ${ms} ms: ${isSo}`);
    }
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

module.exports = { EPOCH, eventually, fakeServer };
