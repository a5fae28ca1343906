/// <reference types="node" />

/** `host:port`, `nkv://host:port`, `[::1]:port`, `unix:PATH`, `/path` or `./path`. Without a port, 4222. */
export type Address = string;

/** A value as it is passed in. A string stands for its UTF-8 bytes. */
export type ValueLike = string | NodeJS.ArrayBufferView | ArrayBuffer | SharedArrayBuffer;

/** Resolves a name, as `dns.lookup` does with `all: true`. */
export type Lookup = (
  hostname: string,
  options: { all: true },
  callback: (
    error: NodeJS.ErrnoException | null,
    address: string | Array<{ address: string; family: number }>,
    family?: number,
  ) => void,
) => void;

/** All times are in milliseconds; `Infinity` is no limit. */
export interface ClientOptions {
  /** A name for people, which the server shows in its list of clients: at most 256 bytes. */
  name?: string;
  /** Identifies the client across connections. Random if not given; two clients that have the same take each other's subscriptions away. */
  clientUuid?: string;
  /** The credential to show to the server. */
  token?: string;
  /** How long a request may take, waiting for a connection included. 5,000 if not given. */
  requestTimeout?: number;
  /** How long an attempt to connect may take, the lookup of the name and the greeting included. 5,000 if not given. */
  connectTimeout?: number;
  /** After this time without a sign of life the server is asked for one; after twice that, the connection counts as lost. 15,000 if not given. */
  heartbeat?: number;
  /** The pause before the second attempt to connect. It doubles up to `backoffMax`, and half of it is random. 50 if not given. */
  backoffMin?: number;
  /** 5,000 if not given. */
  backoffMax?: number;
  /** Longest message taken from the server, in bytes. 80 MiB if not given. */
  messageLenMax?: number;
  /** How many bytes may be kept for a subscription or watch; one that would need more ends. 1 GiB if not given. */
  subscriptionLenMax?: number;
  /** Resolves the name in the address; the system does if not given. */
  lookup?: Lookup;
}

export interface ConnectOptions extends ClientOptions {
  /** For how long to try again while no server answers. Not at all if not given. */
  waitForServer?: number;
  /** Ends the wait for the connection. */
  signal?: AbortSignal;
}

/** Limits of one call. */
export interface Limits {
  /** In milliseconds, the time waiting for a connection included. The client's `requestTimeout` if not given. */
  timeout?: number;
  /** Ends the call. The promise rejects with the signal's reason; that of a write that was sent, with `OUTCOME_UNKNOWN`. */
  signal?: AbortSignal;
}

export interface PutOptions extends Limits {
  /** Only if the key is at this revision; 0: only if it is absent. A number above 0 is taken for one of the present epoch. */
  ifRevision?: Revision | number;
  /** The value ends by itself after this time in milliseconds: 1 or more. */
  ttl?: number;
}

export interface DeleteOptions extends Limits {
  /** Only if the key is at this revision. Goes with a key alone. */
  ifRevision?: Revision | number;
}

export interface AllOptions extends Limits {
  /** How many to ask for at once. The limits are those of each page. */
  pageSize?: number;
}

export interface PageOptions extends Limits {
  /** How many at most. */
  limit?: number;
  /** Only keys after this one, in key order. */
  after?: string;
}

/** The figures of a server. Those from `puts` on are counted since its start. */
export interface Stats {
  /** That of the data. */
  readonly epoch: string;
  /** What an answer to a write promises: `sync`, `interval:50ms`, `os` or `memory`. */
  readonly durability: string;
  readonly keys: number;
  /** What all values take. */
  readonly valueBytes: number;
  readonly subscriptions: number;
  readonly connections: number;
  /** The last revision that was given. */
  readonly revision: number;
  readonly uptimeMs: number;
  readonly puts: number;
  /** Keys that were deleted. */
  readonly deletes: number;
  /** Keys whose time to live ended. */
  readonly expired: number;
  /** Writes to storage. */
  readonly batches: number;
  readonly failedBatches: number;
  /** Notifications. */
  readonly notified: number;
  /** Changes that were passed over in favour of newer ones. */
  readonly conflated: number;
}

export interface SubscribeOptions {
  /** Whether it starts with the present state. True if not given. */
  snapshot?: boolean;
  /** Whether it is to the key alone, or to each of several, without what is below it. */
  exact?: boolean;
  /** Ends the subscription: its iterator throws the signal's reason. */
  signal?: AbortSignal;
}

/** A revision of a store's data. It knows the epoch of the data, and equals none of another epoch. */
export class Revision {
  private constructor();
  /** 0: the key is absent. */
  readonly number: number;
  readonly epoch: string;
  equals(other: unknown): boolean;
  toString(): string;
  toJSON(): { number: number; epoch: string };
}

export class Entry {
  private constructor();
  readonly key: string;
  readonly value: Buffer;
  readonly revision: Revision;
  /** The value as UTF-8; throws a TypeError if it is not. */
  text(): string;
  /** The value as JSON; throws a SyntaxError or TypeError if it is not. */
  json(): any;
}

export interface Listed {
  readonly key: string;
  readonly revision: Revision;
}

export interface Page<T> {
  readonly items: T[];
  /** Whether there is more after the last one. */
  readonly more: boolean;
}

export interface Deleted {
  /** How many keys were removed. */
  readonly count: number;
  /** The highest of their revisions; undefined if there was no such key. */
  readonly revision: Revision | undefined;
}

/** `missed`: it went while the connection was lost; how is not known. */
export type GoneReason = 'deleted' | 'expired' | 'missed';

export interface UpdateEvent {
  readonly type: 'update';
  readonly key: string;
  readonly value: Buffer;
  readonly revision: Revision;
  /** How many changes of the key were left out since the last event of it. */
  readonly skipped: number;
}

export interface GoneEvent {
  readonly type: 'gone';
  readonly key: string;
  readonly revision: Revision;
  readonly reason: GoneReason;
  readonly skipped: number;
}

/** Everything up to this revision was delivered. */
export interface SyncedEvent {
  readonly type: 'synced';
  readonly revision: Revision;
}

/** The connection is lost. */
export interface ReconnectingEvent {
  readonly type: 'reconnecting';
}

/** The connection is there again. What was missed follows, then `synced`. */
export interface ConnectedEvent {
  readonly type: 'connected';
  readonly epoch: string;
}

export type Event = UpdateEvent | GoneEvent | SyncedEvent | ReconnectingEvent | ConnectedEvent;

/** The events of a subscription. `break` out of `for await` unsubscribes. Unread, it holds one event for each key at most. */
export class Subscription implements AsyncIterableIterator<Event> {
  private constructor();
  /** What it covers; of several patterns, the first. */
  readonly pattern: string;
  /** What it covers: the patterns that were asked for, without those that another one includes. */
  readonly patterns: readonly string[];
  /** How many events wait to be read. */
  readonly waiting: number;
  /** Waits until the server has accepted the subscription: from then on, no change is missed. */
  ready(options?: Limits): Promise<void>;
  /** The next event; undefined at the end. A time-out or signal ends this wait alone, and loses no event. Without a timeout it has no limit. */
  take(options?: Limits): Promise<Event | undefined>;
  next(): Promise<IteratorResult<Event, undefined>>;
  return(value?: any): Promise<IteratorResult<Event, any>>;
  /** Unsubscribes, and ends the iterator. */
  close(): void;
  [Symbol.asyncIterator](): this;
}

/** The present value of one key. */
export class Watch {
  private constructor();
  readonly key: string;
  /** Undefined if the key is absent. */
  readonly entry: Entry | undefined;
  /** Undefined if the key is absent. */
  readonly value: Buffer | undefined;
  /** Whether it is known to be current: not while the connection is lost. */
  readonly live: boolean;
  /** Why it has ended, if not by `close()`. */
  readonly error: Error | undefined;
  /** Up to this revision the last snapshot had all changes. */
  readonly revision: Revision | undefined;
  /** Waits until it is current. */
  ready(options?: Limits): Promise<void>;
  /** Yields at once, and again after changes: one time for all that came meanwhile. */
  changes(options?: { signal?: AbortSignal }): AsyncGenerator<this, void, void>;
  close(): void;
}

/** The present entries of a branch, in no particular order. */
export class Branch implements ReadonlyMap<string, Entry> {
  private constructor();
  readonly pattern: string;
  readonly size: number;
  /** Whether it is known to be whole and current: not while the connection is lost. */
  readonly live: boolean;
  /** Why it has ended, if not by `close()`. */
  readonly error: Error | undefined;
  /** Up to this revision the last snapshot had all changes. */
  readonly revision: Revision | undefined;
  get(key: string): Entry | undefined;
  has(key: string): boolean;
  keys(): ReturnType<ReadonlyMap<string, Entry>['keys']>;
  values(): ReturnType<ReadonlyMap<string, Entry>['values']>;
  entries(): ReturnType<ReadonlyMap<string, Entry>['entries']>;
  forEach(callback: (entry: Entry, key: string, branch: ReadonlyMap<string, Entry>) => void, thisArg?: any): void;
  [Symbol.iterator](): ReturnType<ReadonlyMap<string, Entry>['entries']>;
  /** Waits until it is current. */
  ready(options?: Limits): Promise<void>;
  /** Yields at once, and again after changes: one time for all that came meanwhile. */
  changes(options?: { signal?: AbortSignal }): AsyncGenerator<this, void, void>;
  close(): void;
}

export type ClientState = 'connecting' | 'connected' | 'reconnecting' | 'closed';

/** One connection, which is made again when it is lost. */
export class Client {
  /** Begins to connect, and does not wait for it. */
  constructor(addr: Address, options?: ClientOptions);
  /** Returns a client that is connected. Without `waitForServer` it fails at once where no server answers. */
  static connect(addr: Address, options?: ConnectOptions): Promise<Client>;
  readonly address: string;
  readonly clientUuid: string;
  readonly state: ClientState;
  /**
   * For how many milliseconds the server has not seen its engine, by its own word: reads and watches are of an old state then, and writes
   * may be refused. Undefined if it does, or without a connection.
   */
  readonly staleFor: number | undefined;
  /** Stores a value, and returns its revision. */
  put(key: string, value: ValueLike, options?: PutOptions): Promise<Revision>;
  /** The entry of a key; undefined if it is absent. */
  get(key: string, options?: Limits): Promise<Entry | undefined>;
  /**
   * Changes a value that others may change too: reads the key, and writes what `change` makes of the entry if the key is still as it
   * was read. If not, all of that is done again, after a random pause of at most 128 ms. `change` gets undefined if the key is absent,
   * and returns undefined to write nothing. The value has no TTL. Returns the revision of what the key holds then; undefined if absent.
   *
   * The limits count for all of it. It rejects with a `ConflictError` if others were faster until the time was over, and with what
   * `change` throws. After `OUTCOME_UNKNOWN` it is not tried again.
   */
  update(
    key: string,
    change: (old: Entry | undefined) => ValueLike | undefined | Promise<ValueLike | undefined>,
    options?: Limits,
  ): Promise<Revision | undefined>;
  /** All entries that a pattern selects, in key order, in as many pages as it takes. */
  getAll(pattern: string, options?: AllOptions): Promise<Entry[]>;
  getPage(pattern: string, options?: PageOptions): Promise<Page<Entry>>;
  /** All keys that a pattern selects, in key order, with their revisions. */
  list(pattern: string, options?: AllOptions): Promise<Listed[]>;
  listPage(pattern: string, options?: PageOptions): Promise<Page<Listed>>;
  /** Removes a key, or all that a pattern selects. */
  delete(pattern: string, options?: DeleteOptions): Promise<Deleted>;
  /** Whether a pattern selects any key. */
  exists(pattern: string, options?: Limits): Promise<boolean>;
  /** The figures of the server. */
  stats(options?: Limits): Promise<Stats>;
  /**
   * The changes of what a pattern covers: of `a`, this key and all below it; of `a.*`, all below it; of `*`, everything.
   *
   * Several patterns are one stream: a change that several cover comes once, and `synced` comes once all have had their present
   * state. If one of them ends, the subscription does.
   */
  subscribe(pattern: string | readonly string[], options?: SubscribeOptions): Subscription;
  /** The value of a key, always current. Returns when it is known; the limits are for that. */
  watch(key: string, options?: Limits): Promise<Watch>;
  /** All that a pattern covers, always current. Returns when it is known; the limits are for that. */
  watchBranch(pattern: string, options?: Limits): Promise<Branch>;
  /** Ends everything: calls that wait reject, iterators end. */
  close(): Promise<void>;
  /** The same as `close`, for `await using`. */
  [Symbol.asyncDispose](): Promise<void>;
}

/** The same as `Client.connect`. */
export function connect(addr: Address, options?: ConnectOptions): Promise<Client>;

export type ErrorCode =
  | 'INVALID_ADDRESS'
  | 'INVALID_KEY'
  | 'CANNOT_CONNECT'
  | 'TIMEOUT'
  | 'CONFLICT'
  | 'OTHER_EPOCH'
  | 'REFUSED'
  | 'OUTCOME_UNKNOWN'
  | 'CLOSED'
  | 'PROTOCOL'
  | 'ENDED';

/** Any error of this package, except a wrong argument (TypeError, RangeError) and the reason of a signal. */
export class NkvError extends Error {
  protected constructor();
  readonly code: ErrorCode;
  /** Whether the same request may succeed later, and asking again does no harm: nothing was changed. */
  readonly retryable: boolean;
}

/** The address cannot be understood. */
export class InvalidAddressError extends NkvError {
  readonly code: 'INVALID_ADDRESS';
}

/** The key or pattern cannot be understood. Nothing was sent. */
export class InvalidKeyError extends NkvError {
  readonly code: 'INVALID_KEY';
}

/** No server answers, or what answers is not nkv, or it refuses the connection. Nothing was changed. */
export class CannotConnectError extends NkvError {
  readonly code: 'CANNOT_CONNECT';
}

/** There was no answer in time. Nothing was changed, and the request is never sent later. */
export class TimeoutError extends NkvError {
  readonly code: 'TIMEOUT';
}

/** The key is at another revision than the request expected. Nothing was changed. */
export class ConflictError extends NkvError {
  readonly code: 'CONFLICT';
  /** The present revision of the key; its number is 0 if the key is absent. */
  readonly revision: Revision;
}

/** The condition names a revision of another epoch than that of the data. Nothing was sent. */
export class OtherEpochError extends NkvError {
  readonly code: 'OTHER_EPOCH';
}

/** The server refused the request or failed to serve it. Nothing was changed, unless the status is 500. */
export class RefusedError extends NkvError {
  readonly code: 'REFUSED';
  /** As in HTTP: 400, 401, 403, 413, 429, 500, 503, 507. */
  readonly status: number;
}

/** A write was sent, and no answer says what became of it. */
export class OutcomeUnknownError extends NkvError {
  readonly code: 'OUTCOME_UNKNOWN';
}

/** The client or subscription was closed. Nothing was changed. */
export class ClosedError extends NkvError {
  readonly code: 'CLOSED';
}

/** The server does not speak the protocol, or exceeds a limit. */
export class ProtocolError extends NkvError {
  readonly code: 'PROTOCOL';
}

/** A subscription or watch has ended, other than by `close()`. */
export class EndedError extends NkvError {
  readonly code: 'ENDED';
  /** `unsubscribed`, `replaced`: by a client with the same `clientUuid`. `too-much`: it would hold more than its limit. */
  readonly reason: 'unsubscribed' | 'replaced' | 'too-much';
}
