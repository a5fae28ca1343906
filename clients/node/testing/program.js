'use strict';

// A program that closes its client in the state that it was started for, then says so, and is to end by itself.

const dgram = require('node:dgram');
const dns = require('node:dns');

const nkv = require('../index.js');
const { eventually, fakeServer } = require('./fake-server.js');

// What would keep the program lasts longer than its end is waited for.
const long = { connectTimeout: 300_000, requestTimeout: 300_000, backoffMin: 300_000, backoffMax: 300_000 };

const states = {
  async 'at once'() {
    return [new nkv.Client('127.0.0.1:1', long)];
  },
  async 'in a pause between attempts'() {
    const client = new nkv.Client('127.0.0.1:1', long);
    await eventually(() => client.state === 'connecting');
    await new Promise((resolve) => setTimeout(resolve, 200));
    return [client];
  },
  async 'in the lookup of a name that is never answered'() {
    const silent = dgram.createSocket('udp4').unref();
    await new Promise((resolve) => silent.bind(0, '127.0.0.1', resolve));
    dns.promises.Resolver = class extends dns.promises.Resolver {
      constructor(options) {
        super(options);
        this.setServers([`127.0.0.1:${silent.address().port}`]);
      }
    };
    let isAsked = false;
    silent.on('message', () => (isAsked = true));
    const client = new nkv.Client('nkv.example:4222', long);
    await eventually(() => isAsked);
    return [client];
  },
  async 'in a lookup of its own that never returns'() {
    return [new nkv.Client('nkv.example:4222', { ...long, lookup: () => {} })];
  },
  async 'in connect'() {
    // An address that never answers, and a socket that does not connect.
    const lookup = (host, options, callback) => callback(null, [{ address: '192.0.2.1', family: 4 }]);
    const clients = [new nkv.Client('192.0.2.1:4222', long), new nkv.Client('nkv.example:4222', { ...long, lookup })];
    await new Promise((resolve) => setTimeout(resolve, 50));
    await clients[0].close();
    return [clients[1]];
  },
  async 'before Connect is answered'() {
    const server = await fakeServer({ onConnect: () => {} });
    const client = new nkv.Client(server.addr, long);
    await eventually(() => server.of('Connect').length === 1);
    return [client, server];
  },
  async 'with calls, subscriptions and watches under way'() {
    const server = await fakeServer({});
    const client = await nkv.connect(server.addr, long);
    const subscription = client.subscribe('a');
    const waits = [client.get('a'), client.put('a', '1'), client.watch('a'), client.watchBranch('a'), subscription.ready()];
    waits.push(subscription.next());
    Promise.allSettled(waits).then((ends) => console.log(ends.map(({ reason }) => reason?.code ?? 'ended').join(' ')));
    await eventually(() => server.of('Subscribe').length === 1 && server.of('Put').length === 1);
    return [client, server];
  },
};

async function main(state) {
  const [client, server] = await states[state]();
  await client.close();
  await client.close();
  await server?.close();
  console.log('closed');
}

main(process.argv[2]);
