'use strict';

// A program without any listener for errors, whose server ends connections in every state. It is to live through all
// of them, and to see no error but those of its own calls.

const assert = require('node:assert/strict');

const nkv = require('../index.js');
const { EPOCH, eventually, fakeServer } = require('./fake-server.js');

/** What the server sends before it ends the connection, as the answer to `Connect` and to `Subscribe`. */
const greeting = JSON.stringify({ Base: { id: 'c1', status: 200, message: 'No Error', epoch: EPOCH, features: ['reset', 'exact', 'alive'] } });
const snapshot = `"Hello"\n{"Update":{"key":"a.x","revision":1,"skipped":0,"len":5}}\nvalue\n{"Synced":{"key":"a","revision":1,"epoch":"${EPOCH}"}}\n`;
const ways = ['destroy', 'resetAndDestroy', 'end'];
const states = [['accepted', '', undefined]];
for (const at of [0, 1, greeting.length - 1, greeting.length]) {
  states.push([`greeted up to ${at}`, greeting.slice(0, at), undefined]);
}
for (let at = 0; at <= snapshot.length; at += 7) {
  states.push([`subscribed up to ${at}`, `${greeting}\n`, snapshot.slice(0, at)]);
}
states.push(['nonsense', 'HTTP/1.1 400\r\n', undefined], ['nonsense later', `${greeting}\n`, '[]\n']);

async function main() {
  for (const way of ways) {
    for (const [name, greet, subscribed] of states) {
      let isBroken = true;
      const end = (peer, text) => peer.socket.write(text || '\n', () => peer.socket[way]());
      const server = await fakeServer({
        onConnect: (peer, request) => {
          if (!isBroken) {
            peer.greet(request);
          } else if (subscribed === undefined) {
            isBroken = false;
            end(peer, greet);
          } else {
            peer.socket.write(greet);
          }
        },
        onRequest: (peer, { id, type, key }) => {
          if (isBroken && type === 'Subscribe') {
            isBroken = false;
            end(peer, subscribed);
          } else if (!isBroken && type === 'Subscribe') {
            peer.send('Hello');
            peer.update('a.x', 'value', 1);
            peer.synced(key, 1);
          } else if (!isBroken && type === 'Get') {
            peer.send({ Get: { id, status: 404, message: 'Not Found', data: [], keys: [], revisions: [] } });
          }
        },
      });
      const client = new nkv.Client(server.addr, { backoffMin: 1, backoffMax: 5 });
      client.subscribe('unread');
      const put = client.put('a.x', '1').then(() => 'done', ({ code }) => code);
      const subscription = client.subscribe('a');
      const branch = await client.watchBranch('a');
      assert.equal(branch.get('a.x')?.text(), 'value', name);
      assert.equal(await client.get('a.y'), undefined, name);
      const first = await subscription.take({ timeout: 5_000 });
      assert.ok(['update', 'connected', 'reconnecting', 'synced'].includes(first.type), name);
      const closing = client.close();
      assert.ok(['OUTCOME_UNKNOWN', 'CLOSED'].includes(await put), name);
      await closing;
      await eventually(() => client.state === 'closed');
      await server.close();
    }
  }
  console.log(`lived through ${ways.length * states.length} ends`);
}

main();
