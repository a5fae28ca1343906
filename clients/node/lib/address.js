'use strict';

// Where a server is: `host:port`, `nkv://host:port`, `[::1]:port`, `unix:PATH`, `/path`, `./path`.

const { InvalidAddressError } = require('./errors.js');

const PORT = 4222;

/** Returns `{ path }` or `{ host, port }`. */
function parseAddress(text) {
  if (typeof text !== 'string') {
    throw new TypeError(`an address is a string, not ${text === null ? 'null' : typeof text}`);
  }
  const wrong = (what) => new InvalidAddressError(`address '${text}': ${what}`);
  if (text.includes('\0')) {
    throw wrong('a zero byte is not expected here');
  }
  if (text.startsWith('unix:')) {
    let path = text.slice('unix:'.length);
    if (path.startsWith('//')) {
      path = path.slice(2);
      if (!path.startsWith('/')) {
        throw wrong(`write unix:${path} for a relative path`);
      }
    }
    if (path === '') {
      throw wrong("a path must follow 'unix:'");
    }
    return { path };
  }
  if (text.startsWith('/') || text.startsWith('.')) {
    return { path: text };
  }
  return parseHostPort(text, wrong);
}

function parseHostPort(text, wrong) {
  let rest = text;
  const scheme = text.indexOf('://');
  if (scheme >= 0) {
    if (text.slice(0, scheme) !== 'nkv') {
      throw wrong(`unknown scheme '${text.slice(0, scheme)}'; write host:port, nkv://host:port or unix:PATH`);
    }
    rest = text.slice(scheme + 3);
    rest = rest.endsWith('/') ? rest.slice(0, -1) : rest;
  }
  if (/[/@?#\s]/.test(rest)) {
    throw wrong('only host:port is expected here');
  }
  let host;
  let port;
  if (rest.startsWith('[')) {
    const end = rest.indexOf(']');
    if (end < 0) {
      throw wrong("no ']' after the IPv6 address");
    }
    host = rest.slice(1, end);
    port = rest.slice(end + 1);
    if (port !== '' && !port.startsWith(':')) {
      throw wrong("':port' must follow ']'");
    }
  } else {
    const colon = rest.indexOf(':');
    if (colon !== rest.lastIndexOf(':')) {
      throw wrong('write an IPv6 address in brackets: [::1]:4222');
    }
    host = colon < 0 ? rest : rest.slice(0, colon);
    port = colon < 0 ? '' : rest.slice(colon);
  }
  if (port === ':') {
    throw wrong("the port is missing after ':'");
  }
  if (host === '') {
    throw wrong('the host is missing; write host:port, such as 127.0.0.1:4222');
  }
  if (port === '' && /^\d{1,5}$/.test(host)) {
    throw wrong(`the host is missing; write host:port, such as 127.0.0.1:${host}`);
  }
  if (port !== '' && (!/^:\d{1,5}$/.test(port) || Number(port.slice(1)) > 65535)) {
    throw wrong('the port must be a number from 0 to 65535');
  }
  return { host, port: port === '' ? PORT : Number(port.slice(1)) };
}

function addressText({ host, port, path }) {
  if (path !== undefined) {
    return `unix:${path}`;
  }
  return host.includes(':') ? `[${host}]:${port}` : `${host}:${port}`;
}

module.exports = { parseAddress, addressText };
