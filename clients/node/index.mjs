// The same objects as with `require`: a program that loads the package both ways has one set of classes.
import nkv from './index.js';

export const {
  connect,
  Client,
  Revision,
  Entry,
  Subscription,
  Watch,
  Branch,
  NkvError,
  InvalidAddressError,
  InvalidKeyError,
  CannotConnectError,
  TimeoutError,
  ConflictError,
  OtherEpochError,
  RefusedError,
  OutcomeUnknownError,
  ClosedError,
  ProtocolError,
  EndedError,
} = nkv;
