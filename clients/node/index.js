'use strict';

const { Client } = require('./lib/client.js');
const { Revision, Entry } = require('./lib/entry.js');
const { classes } = require('./lib/errors.js');
const { Subscription } = require('./lib/subscription.js');
const { Branch, Watch } = require('./lib/watch.js');

module.exports = {
  connect: (addr, options) => Client.connect(addr, options),
  Client,
  Revision,
  Entry,
  Subscription,
  Watch,
  Branch,
  ...classes,
};
