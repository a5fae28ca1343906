'use strict';

const { Client } = require('./lib/client.js');
const { Revision, Entry } = require('./lib/entry.js');
const errors = require('./lib/errors.js');
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
  NkvError: errors.NkvError,
  InvalidAddressError: errors.InvalidAddressError,
  InvalidKeyError: errors.InvalidKeyError,
  CannotConnectError: errors.CannotConnectError,
  TimeoutError: errors.TimeoutError,
  ConflictError: errors.ConflictError,
  OtherEpochError: errors.OtherEpochError,
  RefusedError: errors.RefusedError,
  OutcomeUnknownError: errors.OutcomeUnknownError,
  ClosedError: errors.ClosedError,
  ProtocolError: errors.ProtocolError,
  EndedError: errors.EndedError,
};
