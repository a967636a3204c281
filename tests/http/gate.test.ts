// Bad requests, sent as bytes to the running program. A row says what comes back and the rig sees what the servers
// saw: never more whole requests than the client was answered for ("never two"), and none that was not forwarded by us.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { connect } from "node:net";
import { after, before } from "node:test";
import {
  answer,
  echo,
  echoServer,
  type Exchange,
  get,
  matching,
  type Message,
  type Part,
  type Program,
  rawRequest,
  resetConnection,
  type ScriptedServer,
  scriptedServer,
  sleep,
  startProgram,
  status,
  target,
  test,
  until,
  value,
  values,
} from "../rig/rig.ts";

interface Row {
  name: string;
  send: Part | Part[];
  expect: string;
  /** What the servers saw, as "METHOD target"; without it one request for each 200. */
  seen?: string[];
  methods?: string[];
  /** The program that believes X-Forwarded-For from 127.0.0.0/8 and 10.0.0.0/8; it logs in the combined format. */
  trusting?: boolean;
  /** Looks closer at what the servers saw. */
  check?: (seen: Message[], exchange: Exchange) => unknown;
}

let first: ScriptedServer, second: ScriptedServer, held: ScriptedServer;
let strict: Program, trusting: Program;

before(async () => {
  [first, second, held] = await Promise.all([echoServer(), echoServer(), scriptedServer(echo)]);
  const config = {
    defaults: { health: "off", eject: "off", timeouts: { connect: "2s", response: "5s", idle: "1s" } },
    services: { constructor: { servers: [first.address] }, services: { servers: [second.address] } },
    hosts: [
      { host: ["a.test", "localhost", "[::1]"], servers: [first.address] },
      { host: "b.test", servers: [second.address] },
      { host: "private.test", servers: [first.address], allow: ["203.0.113.9"] },
      { host: "limit.test", servers: [first.address], body_limit: 1000 },
      { host: "constructor.test", service: "constructor" },
      { host: "services.test", service: "services" },
      // One at a time and out at the first failure: a count that stays, or a departure that is held against the server, shows.
      {
        host: "held.test",
        servers: [held.address],
        max_in_flight: 1,
        queue: "off",
        eject: { failures: 1, at_most: "100%" },
        panic: "0%",
      },
      { host: "paths.test", path: "/pub", servers: [first.address] },
      { host: "paths.test", path: "/admin", servers: [second.address] },
    ],
  };
  [strict, trusting] = await Promise.all([
    startProgram({ ...config, log: "json" }),
    startProgram({ ...config, log: "combined", trust: ["127.0.0.0/8", "10.0.0.0/8"] }),
  ]);
});
after(async () => {
  await Promise.all([strict?.stop(), trusting?.stop()]);
  await Promise.all([first?.close(), second?.close(), held?.close()]);
});

const NEXT = get("/next"); // what follows on the same connection
const post = (headers: string, body = "") => `POST /p HTTP/1.1\r\nHost: a.test\r\n${headers}\r\n${body}`;
const line = (start: string, headers = "") =>
  `${start} HTTP/1.1\r\nHost: a.test\r\n${headers}Connection: close\r\n\r\n`;
const fields = (count: number, length = 1) =>
  Array.from({ length: count }, (_, i) => `X-${i}: ${"v".repeat(length)}\r\n`)
    .join("");
const chunks = "Transfer-Encoding: chunked\r\n";
const EMPTY_CHUNKS = "0\r\n\r\n";

const badHosts: Row[] = [
  "a.test,b.test",
  "a.test, a.test",
  "a@a.test",
  "a.test/pub",
  "a b",
  "a.test:99999",
  "a.test:x",
  "a.test?x",
  "a.test#x",
  "a.test\\x",
  "a.test%2fx",
  "[::1",
  "caf\xe9",
].map((host) => ({ name: `the Host ${JSON.stringify(host)}`, send: get("/h", "", host), expect: "400" }));

const hosts: Row[] = [
  ...badHosts,
  { name: "no Host", send: "GET /h HTTP/1.1\r\nConnection: close\r\n\r\n", expect: "400" },
  { name: "an empty Host", send: get("/h", "", ""), expect: "400" },
  { name: "two Hosts", send: get("/h", "Host: b.test\r\n"), expect: "400" },
  { name: "two equal Hosts", send: get("/h", "Host: a.test\r\n"), expect: "400" },
  { name: "a Host in other letters and with a port", send: get("/h", "", "A.Test:8080"), expect: "200" },
  { name: "an IPv6 address as Host", send: get("/h", "", "[::1]:80"), expect: "200" },
  { name: "a Host that no route has", send: get("/h", "", "nobody.test"), expect: "404" },
  { name: "a target with another host than Host", send: get("http://b.test/x"), expect: "400" },
  { name: "an absolute target with the same host", send: get("http://a.test/x?y"), expect: "200", seen: ["GET /x?y"] },
  { name: "an absolute target with a user", send: get("http://u:p@a.test/x"), expect: "400" },
];

const paths: Row[] = [
  // What is forwarded is what was matched.
  ...[
    "/pub/../admin",
    "/pub/%2e%2e/admin",
    "/pub/.%2E/admin",
    "/pub/x/../../admin",
    "/pub/./../admin",
    "/../../admin",
  ].map((path): Row => ({
    name: `the path ${path}`,
    send: get(path, "", "paths.test"),
    expect: "200",
    seen: ["GET /admin"],
    check: () => assert.equal(second.requests.length, 1),
  })),
  { name: "dots in the query", send: get("/x?a=/../b"), expect: "200", seen: ["GET /x?a=/../b"] },
  {
    name: "a path that begins with two slashes",
    send: get("//b.test/x"),
    expect: "200",
    seen: ["GET //b.test/x"],
    check: ([request]) => assert.deepEqual([first.requests.length, value(request!, "host")], [1, "a.test"]),
  },
  { name: "an encoded slash", send: get("/a%2Fb"), expect: "200", seen: ["GET /a%2Fb"] },
  {
    name: "an encoded slash with dots",
    send: get("/pub%2F..%2Fadmin", "", "a.test"),
    expect: "200",
    seen: ["GET /pub%2F..%2Fadmin"],
  },
  {
    name: "an encoded line break",
    send: get("/a%0d%0aX:%20y"),
    expect: "200",
    seen: ["GET /a%0d%0aX:%20y"],
  },
  { name: "an encoded NUL", send: get("/a%00b"), expect: "400" },
  { name: "a fragment", send: get("/a#/b"), expect: "400" },
  { name: "a backslash", send: get("/a\\b"), expect: "400" },
  { name: "a query in which nothing is special", send: get("/a?b=[]{}|^&c='"), expect: "200" },
  { name: "a path that is not UTF-8", send: get("/caf%E9"), expect: "200", seen: ["GET /caf%E9"] },
  { name: "a path with a broken escape", send: get("/a%zz"), expect: "400" },
  ...["/a\0b", "/a\tb", "/a\rb", "/a\x1bb", "/a b", "x", "?x", "@b.test/x", ":80/x", "*"].map((path): Row => ({
    name: `the target ${JSON.stringify(path)}`,
    send: get(path),
    expect: "400",
  })),
];

const methods: Row[] = [
  {
    name: "CONNECT",
    send: "CONNECT b.test:443 HTTP/1.1\r\nHost: b.test:443\r\nConnection: close\r\n\r\n",
    expect: "405",
  },
  { name: "CONNECT with a path", send: line("CONNECT /m"), expect: "405" },
  ...["TRACE", "TRACK", "get", "post", "trace", "M".repeat(60)].map((method): Row => ({
    name: `the method ${method}`,
    send: line(`${method} /m`),
    expect: "405",
  })),
  { name: "a method of the server's own", send: line("FOO /m"), expect: "200", seen: ["FOO /m"] },
  { name: "a method that is no word", send: line("G@T /m"), expect: "400" },
  ...["PURGE", "PROPFIND", "MKCOL", "REPORT", "PATCH", "DELETE", "OPTIONS", "PUT"].map((method): Row => ({
    name: `${method} without a body`,
    send: line(`${method} /m`),
    expect: "200",
    seen: [`${method} /m`],
    check: ([request]) => assert.equal(Number(value(request!, "content-length")) + request!.body.length, 0),
  })),
];

/** What is not HTTP/1: it is answered, and nothing behind it is read. */
const versions: Row[] = [
  ...["2.0", "3.0", "9.9"].map((version): Row => ({
    name: `HTTP/${version}`,
    send: `GET /v HTTP/${version}\r\nHost: a.test\r\n\r\n${NEXT}`,
    expect: "505",
  })),
  ...["HTTP/0.9", "HTTP/1", "HTTP/1.10", "HTTP/11.1", "http/1.1", "HTTP1.1", "HTTP/1.1 ", "SIP/2.0", ""].map((
    version,
  ): Row => ({
    name: `the version ${JSON.stringify(version)}`,
    send: `GET /v ${version}\r\nHost: a.test\r\n\r\n${NEXT}`,
    expect: "400",
  })),
  { name: "no version", send: `GET /v\r\n\r\n${NEXT}`, expect: "400" },
  { name: "the preface of HTTP/2", send: "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", expect: "400" },
  { name: "a handshake of TLS", send: Buffer.from("160301020001000001fc0303", "hex"), expect: "400" },
  { name: "a line that ends with LF alone", send: "GET /v HTTP/1.1\nHost: a.test\n\n", expect: "400" },
  { name: "an empty line in front", send: `\r\n${get("/v")}`, expect: "200", seen: ["GET /v"] },
  { name: "a blank in front", send: ` ${get("/v")}`, expect: "400" },
  {
    name: "a version of HTTP/1 that is not there yet",
    send: "GET /v HTTP/1.9\r\nHost: a.test\r\nConnection: close\r\n\r\n",
    expect: "200",
    seen: ["GET /v"],
  },
];

/** Where a body ends must be beyond doubt, or the connection with everything on it is dropped. */
const refusedFraming: Row[] = Object.entries({
  "Content-Length and chunked": "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
  "chunked and Content-Length": "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
  "two lengths": "Content-Length: 5\r\nContent-Length: 6\r\n",
  "two lengths in one line": "Content-Length: 5, 6\r\n",
  "the length +5": "Content-Length: +5\r\n",
  "the length -5": "Content-Length: -5\r\n",
  "the length 0x5": "Content-Length: 0x5\r\n",
  "the length 5x": "Content-Length: 5x\r\n",
  "no length after its name": "Content-Length: \r\n",
  "a length that no number holds": "Content-Length: 99999999999999999999999\r\n",
  "a space before the colon of Content-Length": "Content-Length : 5\r\n",
  "a space before Content-Length": " Content-Length: 5\r\n",
  "the coding xchunked": "Transfer-Encoding: xchunked\r\n",
  "the coding chunked, gzip": "Transfer-Encoding: chunked, gzip\r\n",
  "the coding identity": "Transfer-Encoding: identity\r\n",
  'the coding "chunked"': 'Transfer-Encoding: "chunked"\r\n',
  "the coding chunked;x": "Transfer-Encoding: chunked;x\r\n",
  "a vertical tab before chunked": "Transfer-Encoding: \x0bchunked\r\n",
  "chunked on a line of its own": "Transfer-Encoding:\r\n chunked\r\n",
  "chunked twice": "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
  "chunked and then identity": "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
  "a space before the colon of Transfer-Encoding": "Transfer-Encoding : chunked\r\n",
  "no coding after its name": "Transfer-Encoding: \r\n",
}).map(([name, headers]) => ({ name, send: post(headers, EMPTY_CHUNKS + NEXT), expect: "400" }));

const refusedChunks: Row[] = Object.entries({
  "a chunk size that is no number": "zz\r\nhello\r\n0\r\n\r\n",
  "an empty chunk size": "\r\nhello\r\n0\r\n\r\n",
  "the chunk size 0x5": "0x5\r\nhello\r\n0\r\n\r\n",
  "the chunk size +5": "+5\r\nhello\r\n0\r\n\r\n",
  "the chunk size -5": "-5\r\nhello\r\n0\r\n\r\n",
  "a chunk size that wraps around": "100000000000000005\r\nhello\r\n0\r\n\r\n",
  "a chunk longer than its size": "5\r\nhelloXX\r\n0\r\n\r\n",
  "chunks without line ends": "5\r\nhello0\r\n\r\n",
  "chunks that end in a bare LF": "5\nhello\n0\n\n",
  "a bare LF in a chunk extension": "5;a\nb\r\nhello\r\n0\r\n\r\n",
}).flatMap(([name, body]): Row[] => [
  { name, send: post(chunks, body + NEXT), expect: "400" },
  { name: `${name}, later`, send: [post(chunks, "3\r\nabc\r\n"), 50, body + NEXT], expect: "400" },
]);

const bodyIs = (expected: string) => ([request]: Message[]) => assert.equal(request!.body.toString(), expected);
const POST_AND_NEXT = ["POST /p", "GET /next"];
const answered: Part = (socket) =>
  new Promise((resolve) => (socket.once("data", resolve), socket.once("close", resolve)));
const upgrade = (to: string, headers = "") =>
  `GET /p HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: ${to}\r\n${headers}\r\n`;
const upgradesTo = (protocol: string) => ([request]: Message[]) =>
  assert.deepEqual([value(request!, "connection"), value(request!, "upgrade")], ["Upgrade", protocol]);
const handshake = "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
const MANY = Buffer.from(Array.from({ length: 3e6 }, (_, i) => (i * 7919 + (i >> 8)) & 255));
const isMany = ([request]: Message[]) => assert.ok(request!.body.equals(MANY));
const framing: Row[] = [
  ...refusedFraming,
  ...refusedChunks,
  {
    name: "two requests at once",
    send: post("Content-Length: 5\r\n", "hello") + NEXT,
    expect: "200 200",
    seen: POST_AND_NEXT,
  },
  {
    name: "two equal lengths",
    send: post("Content-Length: 5\r\nContent-Length: 5\r\nConnection: close\r\n", "hello"),
    expect: "400",
  },
  {
    name: "a length with zeros in front",
    send: [post("Content-Length: 0005\r\n", "hello"), answered, NEXT],
    expect: "200 200",
    seen: POST_AND_NEXT,
    check: bodyIs("hello"),
  },
  {
    name: "the coding CHUNKED",
    send: [post("Transfer-Encoding: CHUNKED\r\n", "5\r\nhello\r\n0\r\n\r\n"), answered, NEXT],
    expect: "200 200",
    seen: POST_AND_NEXT,
    check: bodyIs("hello"),
  },
  {
    name: "chunks with extensions",
    send: [post(chunks, "5;a=b\r\nhello\r\nA\r\n0123456789\r\n0\r\n\r\n"), answered, NEXT],
    expect: "200 200",
    seen: POST_AND_NEXT,
    check: bodyIs("hello0123456789"),
  },
  {
    name: "trailers that name other headers",
    send: [
      post(`${chunks}Trailer: Host\r\n`, "5\r\nhello\r\n0\r\nHost: b.test\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n"),
      answered,
      NEXT,
    ],
    expect: "200 200",
    seen: POST_AND_NEXT,
    check: (seen) => {
      bodyIs("hello")(seen);
      const received = first.last!.received.slice(first.last!.received.lastIndexOf("POST /p"));
      assert.deepEqual([value(seen[0]!, "host"), value(seen[0]!, "x-forwarded-for")], ["a.test", "127.0.0.1"]);
      assert.match(received, /\r\n0\r\n\r\n/); // no trailers
      assert.doesNotMatch(received, /b\.test|6\.6\.6\.6/);
    },
  },
  {
    name: "chunked in HTTP/1.0",
    send: `POST /p HTTP/1.0\r\nHost: a.test\r\n${chunks}\r\n5\r\nhello\r\n0\r\n\r\n`,
    expect: "400",
  },
  {
    name: "Transfer_Encoding beside a length",
    send: [post("Content-Length: 5\r\nTransfer_Encoding: chunked\r\n", "hello"), answered, NEXT],
    expect: "200 200",
    seen: POST_AND_NEXT,
    check: bodyIs("hello"),
  },
  ...["GET", "HEAD"].flatMap((method) =>
    Object.entries({
      "a length": `Content-Length: ${NEXT.length}\r\n\r\n${NEXT}`,
      chunks: `${chunks}\r\n${NEXT.length.toString(16)}\r\n${NEXT}\r\n0\r\n\r\n`,
    }).map(([how, rest]): Row => ({
      name: `${method} with a body by ${how}`,
      send: [`${method} /p HTTP/1.1\r\nHost: a.test\r\n${rest}`, answered, get("/after")],
      methods: [method],
      expect: "200 200",
      seen: [`${method} /p`, "GET /after"],
      check: bodyIs(NEXT),
    }))
  ),
  {
    name: "DELETE with a body",
    send: [`DELETE /p HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\n\r\nhello`, answered, NEXT],
    expect: "200 200",
    seen: ["DELETE /p", "GET /next"],
    check: bodyIs("hello"),
  },
  {
    name: "three megabytes by length",
    send: [post("Content-Length: 3000000\r\nConnection: close\r\n"), MANY],
    expect: "200",
    check: isMany,
  },
  {
    name: "three megabytes in chunks",
    send: [
      post(`${chunks}Connection: close\r\n`),
      ...[0, 1e6, 2e6].flatMap((at) => ["f4240\r\n", MANY.subarray(at, at + 1e6), "\r\n"]),
      EMPTY_CHUNKS,
    ],
    expect: "200",
    check: isMany,
  },
  {
    name: "Expect: 100-continue",
    send: [
      post("Content-Length: 200000\r\nExpect: 100-continue\r\nConnection: close\r\n"),
      answered,
      "x".repeat(200_000),
    ],
    expect: "200",
    check: (seen, { interim }) => {
      bodyIs("x".repeat(200_000))(seen);
      assert.deepEqual(interim.map(status), [100]);
    },
  },
  {
    name: "Expect: 100-continue and a body that is not allowed",
    send: post("Content-Length: 1001\r\nExpect: 100-continue\r\n").replace("a.test", "limit.test"),
    expect: "413",
    check: (_, { interim }) => assert.deepEqual(interim, []),
  },
  {
    name: "another expectation",
    send: post("Content-Length: 5\r\nExpect: wonders\r\n", "hello") + NEXT,
    expect: "417",
    check: (_, { interim }) => assert.deepEqual(interim, []),
  },
  // What follows may be another request, or bytes of the protocol that was asked for: nobody reads it as a request.
  {
    name: "h2c with bytes behind it",
    send: upgrade("h2c", "HTTP2-Settings: AAMAAABkAAQAAP__\r\n") + NEXT,
    expect: "200",
    seen: ["GET /p"],
    check: ([request]) => assert.equal(value(request!, "upgrade") + value(request!, "http2-settings"), ""),
  },
  {
    name: "an unknown upgrade that the server refuses, with bytes behind it",
    send: upgrade("foo") + NEXT,
    expect: "200",
    seen: ["GET /p"],
    check: upgradesTo("foo"),
  },
  {
    name: "a WebSocket that the server refuses, with bytes behind it",
    send: upgrade("websocket", handshake) + NEXT,
    expect: "200",
    seen: ["GET /p"],
    check: upgradesTo("websocket"),
  },
];

const ours = [
  "x-forwarded-for",
  "x-forwarded-host",
  "x-forwarded-proto",
  "x-forwarded-prefix",
  "forwarded",
  "x-real-ip",
];
const FORGED = "X-Forwarded-For: 6.6.6.6\r\nX-Forwarded-Host: evil.test\r\nX-Forwarded-Proto: gopher\r\n" +
  "X-Forwarded-Prefix: /evil\r\nForwarded: for=6.6.6.6;host=evil.test;proto=gopher\r\nX-Real-IP: 6.6.6.6\r\n";
const nothingForged = ([request]: Message[]) => {
  const found = Object.fromEntries(ours.map((name) => [name, value(request!, name)]));
  assert.doesNotMatch(JSON.stringify(found), /6\.6\.6\.6|evil|gopher/);
  assert.equal(found["x-forwarded-for"], "127.0.0.1");
  assert.equal(found["x-forwarded-proto"], "http");
};
const from = (chain: string) => get("/x", `X-Forwarded-For: ${chain}\r\n`, "private.test");
const headers: Row[] = [
  {
    name: "names that look like others with _ or .",
    send: get(
      "/u",
      "X_Forwarded_For: 6.6.6.6\r\nX.Real.IP: 6.6.6.6\r\nContent_Length: 3\r\nTransfer_Encoding: chunked\r\nX.Forwarded_For: 6.6.6.6\r\n",
    ),
    expect: "200",
    check: ([request]) => assert.deepEqual(request!.headers.filter(([name]) => /[_.]/.test(name)), []),
  },
  {
    name: "Connection that names our own headers",
    send:
      `GET /u HTTP/1.1\r\nHost: a.test\r\nConnection: close, X-Forwarded-For, X-Forwarded-Proto, Host, X-Hop\r\nX-Hop: 1\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n`,
    expect: "200",
    check: (seen) => {
      nothingForged(seen);
      assert.deepEqual([values(seen[0]!, "host"), values(seen[0]!, "x-hop")], [["a.test"], []]);
    },
  },
  {
    name: "Connection that names Content-Length",
    send: post("Connection: close, Content-Length\r\nContent-Length: 5\r\n", "hello"),
    expect: "200",
    check: bodyIs("hello"),
  },
  {
    name: "headers for one hop",
    send: get(
      "/u",
      "Keep-Alive: 9\r\nTE: trailers\r\nProxy-Connection: x\r\nProxy-Authorization: x\r\nTrailer: x\r\nProxy: http://evil\r\n",
    ),
    expect: "200",
    check: ([request]) => {
      const names = ["keep-alive", "proxy-connection", "proxy-authorization", "proxy", "upgrade"];
      assert.deepEqual(names.flatMap((name) => values(request!, name)), []);
      // Trailers pass: the client takes them, and so do we.
      assert.deepEqual([values(request!, "te"), values(request!, "connection")], [["trailers"], ["TE"]]);
    },
  },
  { name: "forwarding headers from a stranger", send: get("/u", FORGED), expect: "200", check: nothingForged },
  { name: "a rule, and a stranger who says that he is someone else", send: from("203.0.113.9"), expect: "403" },
  { name: "a rule, and a trusted peer", trusting: true, send: from("6.6.6.6, 203.0.113.9, 10.0.0.1"), expect: "200" },
  {
    name: "a rule, and what somebody wrote in front of a trusted peer's list",
    trusting: true,
    send: from("203.0.113.9, 6.6.6.6, 10.0.0.1"),
    expect: "403",
  },
  {
    name: "garbage in a trusted peer's list",
    trusting: true,
    send: from("203.0.113.9, garbage, 10.0.0.1"),
    expect: "403",
  },
  { name: "a trusted peer without a list", trusting: true, send: get("/x", "", "private.test"), expect: "403" },
  {
    name: "the lists of a trusted peer in two lines",
    trusting: true,
    send: get("/x", "X-Forwarded-For: 6.6.6.6\r\nX-Forwarded-For: 203.0.113.9, 10.0.0.1\r\n", "private.test"),
    expect: "200",
  },
  {
    name: "headers called __proto__ and constructor",
    send: get("/u", "__proto__: x\r\nconstructor: y\r\ntoString: z\r\n"),
    expect: "200",
    check: ([request]) => assert.deepEqual([value(request!, "constructor"), value(request!, "tostring")], ["y", "z"]),
  },
  {
    name: "a service called constructor",
    send: get("/u", "", "constructor.test"),
    expect: "200",
    check: () => assert.equal(first.requests.length, 1),
  },
  {
    name: "a service called services",
    send: get("/u", "", "services.test"),
    expect: "200",
    check: () => assert.equal(second.requests.length, 1),
  },
  {
    name: "values that are not ASCII",
    send: get("/u", "X-L: caf\xe9\r\nX-U: caf\xc3\xa9\r\nX-E:\r\n"),
    expect: "200",
    check: ([request]) =>
      assert.deepEqual(["x-l", "x-u", "x-e"].map((name) => value(request!, name)), ["caf\xe9", "caf\xc3\xa9", ""]),
  },
  {
    name: "a query that is not ASCII",
    send: get("/u?caf\xc3\xa9=\xf0\x9f\x98\x80"),
    expect: "200",
    check: ([request]) => assert.equal(target(request!), "/u?caf\xc3\xa9=\xf0\x9f\x98\x80"),
  },
  {
    name: "several cookies",
    send: get("/u", "Cookie: a=1\r\nCookie: b=2\r\n"),
    expect: "200",
    check: ([request]) => assert.equal(values(request!, "cookie").join("; "), "a=1; b=2"),
  },
  ...[
    "X-E: a\0b",
    "X-E: a\x1bb",
    "X-E: a\x7fb",
    "X-E: a\rb",
    "X-E: a\nb",
    "X-E: a\r\n b",
    "no colon",
    ": v",
    "X Y: v",
    "X-Y : v",
    "X\xe9: v",
  ].map((header): Row => ({
    name: `the header ${JSON.stringify(header)}`,
    send: get("/u", `${header}\r\n`),
    expect: "400",
  })),
  { name: "60 kB of headers", send: get("/b", fields(60, 1000)), expect: "200" },
  { name: "200 kB of headers", send: get("/b", fields(200, 1000)), expect: "431" },
  { name: "900 headers", send: get("/b", fields(900)), expect: "200" },
  { name: "3000 headers", send: get("/b", fields(3000)), expect: "431" },
  { name: "a path of 16 kB", send: get(`/${"u".repeat(16_000)}`), expect: "200" },
  { name: "a path of 20 kB", send: get(`/${"u".repeat(20_000)}`), expect: "414" },
];

const limits: Row[] = [
  {
    name: "a body as large as allowed",
    send: `POST /l HTTP/1.1\r\nHost: limit.test\r\nConnection: close\r\nContent-Length: 1000\r\n\r\n${
      "x".repeat(1000)
    }`,
    expect: "200",
  },
  {
    name: "a body that announces to be too large",
    send: `POST /l HTTP/1.1\r\nHost: limit.test\r\nConnection: close\r\nContent-Length: 1001\r\n\r\n${
      "x".repeat(1001)
    }`,
    expect: "413",
  },
  {
    name: "a body that turns out too large",
    send: `POST /l HTTP/1.1\r\nHost: limit.test\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n${
      "1f4\r\n" + "x".repeat(500) + "\r\n"
    }`.concat("1f4\r\n" + "x".repeat(500) + "\r\n", "1\r\nx\r\n0\r\n\r\n"),
    expect: "413",
    check: () => until("the connection to the server ends", () => !first.last || first.last.over),
  },
];

async function run(row: Row) {
  first.reset(echo);
  second.reset(echo);
  const program = row.trusting ? trusting : strict;
  const exchange = await rawRequest(program.port, row.send, { methods: row.methods ?? [] });
  const found = matching(row.expect, exchange);
  const seen = [...first.requests, ...second.requests];
  const passed = found.split(" ").filter((code) => code === "200").length;
  const lines = seen.map(({ start }) => start.split(" ").slice(0, 2).join(" "));
  if (row.seen) assert.deepEqual(lines, row.seen, "what the servers saw");
  assert.equal(seen.length, passed, `${passed} were answered and ${seen.length} reached a server`);
  for (const request of seen) {
    assert.notEqual(value(request, "x-forwarded-for"), "", "bytes passed by without being forwarded");
  }
  await row.check?.(seen, exchange);
  // A head or body that was refused makes the rest of the connection worthless.
  if (/^[45]/.test(found)) {
    assert.ok(exchange.closed, "the connection is still open");
  }
}

for (const row of [hosts, paths, methods, versions, framing, headers, limits].flat()) {
  test(`a request with ${row.name.slice(0, 80)} gets ${row.expect}`, () => run(row));
}

// ─── Clients who are slow or leave ───

const held1 = (start = "GET /held", headers = "") => `${start} HTTP/1.1\r\nHost: held.test\r\n${headers}\r\n`;
const leave: Part = (socket) => void socket.destroy();
const arrived: Part = () => until("the request arrives", () => held.last);
const started = (length: number) => held1("POST /held", `Content-Length: ${length}\r\n`) + "hel";

const departures: {
  name: string;
  send: Part[];
  script: () => Parameters<typeof held.reset>;
}[] = [
  { name: "waits for the answer", send: [held1(), arrived, leave], script: () => [() => {}] },
  {
    name: "has a part of the answer",
    send: [held1(), arrived, 200, leave],
    script: () => [(visit) => visit.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhel")],
  },
  {
    name: "is in the middle of an endless answer",
    send: [held1(), arrived, 200, leave],
    script: () => [async (visit) => {
      await visit.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
      while (!visit.over) await visit.send("5\r\nhello\r\n", 20);
    }],
  },
  { name: "has sent a part of the body", send: [started(1e6), arrived, 100, leave], script: () => [() => {}] },
  {
    name: "has sent a part of a chunked body",
    send: [held1("POST /held", "Transfer-Encoding: chunked\r\n") + "3\r\nhel\r\n", arrived, 100, leave],
    script: () => [() => {}],
  },
];
for (const { name, send, script } of departures) {
  test(`a client who leaves while he ${name} frees the server, and it is not the server's failure`, async () => {
    held.reset(...script());
    await rawRequest(strict.port, send);
    await until("the connection to the server ends", () => held.last?.over);
    held.reset(echo);
    const { answers } = await rawRequest(strict.port, get("/again", "", "held.test"));
    assert.deepEqual(answers.map(status), [200]);
  });
}

for (const length of [10, 1e6]) {
  test(`a client who stops in the middle of a body of ${length} bytes gets 408, and the server is free again`, async () => {
    held.reset(echo);
    const { answers } = await rawRequest(strict.port, [started(length)]);
    assert.deepEqual(answers.map((one) => [status(one), value(one, "x-lb-failure") !== ""]), [[408, true]]);
    await until("the connection to the server ends", () => !held.last || held.last.over);
    assert.deepEqual(held.requests, []);
    const again = await rawRequest(strict.port, get("/again", "", "held.test"));
    assert.deepEqual(again.answers.map(status), [200]);
  });
}

test("a small body that takes longer than idle is not waited for, however steadily it comes", async () => {
  held.reset(echo);
  const bytes = Array.from({ length: 8 }, (): Part[] => ["x", 200]).flat();
  const { answers } = await rawRequest(strict.port, [
    held1("POST /held", "Connection: close\r\nContent-Length: 8\r\n"),
    ...bytes,
  ]);
  assert.deepEqual([answers.map(status), held.requests.length], [[408], 0]);
});

test("a server that is busy with as many as it may take gives 503 with Retry-After", async () => {
  held.reset(async (visit) => {
    await until("the second client has been answered", () => answered);
    await visit.send(answer("done"));
  });
  let answered = false;
  const one = rawRequest(strict.port, held1("GET /one", "Connection: close\r\n"));
  await until("the first request arrives", () => held.requests.length === 1);
  const { answers: [refusal] } = await rawRequest(strict.port, held1("GET /two", "Connection: close\r\n"));
  answered = true;
  assert.deepEqual([
    status(refusal!),
    value(refusal!, "retry-after") !== "",
    value(refusal!, "x-lb-failure") !== "",
  ], [503, true, true]);
  assert.deepEqual((await one).answers.map(status), [200]);
});

test("a client that asks for a tunnel is let go, though it holds its own end open or breaks off", async () => {
  const seen = strict.output().length;
  for (const breaks of [true, false]) {
    const socket = connect({ port: strict.port, host: "127.0.0.1", allowHalfOpen: true });
    let [ended, gone] = [false, false];
    socket.on("data", () => {}).on("end", () => ended = true).on("error", () => gone = true);
    socket.write("CONNECT b.test:443 HTTP/1.1\r\nHost: b.test:443\r\nConnection: close\r\n\r\n");
    await until("it is refused", () => ended || gone);
    if (breaks) socket.resetAndDestroy();
    else await until("nobody hears it any more", () => gone || (socket.write("x"), false));
  }
  assert.doesNotMatch(strict.output().slice(seen), /internal/);
});

// ─── Logs ───

for (const format of ["json", "combined"]) {
  test(`the ${format} log stays one line a request, whatever is in it`, async () => {
    const program = format === "json" ? strict : trusting;
    await sleep(50);
    const before = program.output().length;
    const agent = 'User-Agent: a"b\\c\xe9\x9b\r\nReferer: " 200 0 "x\r\n';
    await rawRequest(program.port, get("/log/%0d%0a%1b[31m\"'", agent));
    await rawRequest(program.port, get("/nobody/%0D%0AGET", agent, "nobody.test"));
    const lines = await until("two lines are written", () => {
      const lines = program.output().slice(before).trimEnd().split("\n");
      return lines.length >= 2 && lines;
    });
    assert.equal(lines.length, 2);
    for (const line of lines) {
      // deno-lint-ignore no-control-regex
      assert.doesNotMatch(line, /[\x00-\x1f\x7f-\x9f]/);
      if (format === "json") assert.equal(typeof JSON.parse(line), "object");
      else {assert.match(
          line,
          /^\S+ \S+ \S+ \[[^\]]+\] "([^"\\]|\\.)*" \d{3} (\d+|-) "([^"\\]|\\.)*" "([^"\\]|\\.)*"( |$)/,
        );}
    }
  });
}

test("what cannot be read as a request is a line of the log all the same", async () => {
  const sent = { "GET /v HTTP/2.0": "bad-version", "\x16\x03\x01\x02": "bad-request", "GET  /": "bad-request" };
  for (const program of [strict, trusting]) {
    const before = program.output().length;
    for (const start of Object.keys(sent)) await rawRequest(program.port, `${start}\r\nHost: a.test\r\n\r\n`);
    const lines = await until("a line for each", () => {
      const lines = program.output().slice(before).trimEnd().split("\n");
      return lines.length >= 3 && lines;
    });
    const statuses = [505, 400, 400];
    if (program === strict) {
      const records = lines.map((line) => JSON.parse(line));
      assert.deepEqual(records.map((one) => one["http.response.status_code"]), statuses);
      assert.deepEqual(records.map((one) => one["error.type"]), Object.values(sent));
    } else assert.deepEqual(lines.map((line) => Number(/" (\d{3}) /.exec(line)![1])), statuses);
    assert.equal(lines.length, 3);
  }
});

test("nothing that was sent here has ended the program or been held against a server", async () => {
  held.reset(resetConnection);
  for (const program of [strict, trusting]) {
    const { answers } = await rawRequest(program.port, get("/last"));
    assert.deepEqual(answers.map(status), [200]);
    assert.deepEqual(
      program.output().split("\n").filter((line) => /panicked|unhandled|uncaught|^ +at /i.test(line)),
      [],
    );
  }
});
