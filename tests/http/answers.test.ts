// Answers that servers should not give, sent as bytes through the running program, and good ones that are easy to
// spoil. Whatever a server does, the client gets one whole answer or can tell that it is incomplete.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { connect, createServer, type Server } from "node:net";
import { after, before } from "node:test";
import {
  answer,
  type Exchange,
  get,
  inWords,
  listenLocally,
  matching,
  type Message,
  type Part,
  type Program,
  rawRequest,
  resetConnection,
  type Script,
  type ScriptedServer,
  scriptedServer,
  startProgram,
  status,
  target,
  test,
  until,
  value,
  values,
  type Visit,
} from "../rig/rig.ts";

let bad: ScriptedServer, good: ScriptedServer;
let program: Program;
let relay: Server; // leads back to the program
let rounds = 0;

before(async () => {
  const fine: Script = (visit) => visit.send(answer("good"));
  let gone: ScriptedServer;
  [bad, good, gone] = await Promise.all([scriptedServer(fine), scriptedServer(fine), scriptedServer(fine)]);
  await gone.close();
  relay = createServer((socket) => {
    rounds++;
    const back = connect(program.port, "127.0.0.1");
    socket.on("error", () => back.destroy()).on("close", () => back.destroy())
      .pipe(back);
    back.on("error", () => socket.destroy()).on("close", () => socket.destroy())
      .pipe(socket);
  });
  await listenLocally(relay);
  const { port } = relay.address() as { port: number };
  program = await startProgram({
    log: "off",
    // Nothing is left out after a failure: every row finds both servers as good as new.
    defaults: {
      health: "off",
      eject: "off",
      strategy: "first",
      retry_budget: "100%",
      timeouts: { connect: "1s", response: "1500ms", idle: "800ms" },
    },
    hosts: [
      { host: "alone.test", servers: [bad.address] },
      { host: "pair.test", servers: [bad.address, good.address] },
      { host: "gone.test", servers: [gone.address] },
      { host: "gone-pair.test", servers: [gone.address, good.address] },
      { host: "loop.test", servers: [`127.0.0.1:${port}`] },
    ],
  });
});
after(async () => {
  await program?.stop();
  await Promise.all([bad?.close(), good?.close()]);
  relay?.close();
});

interface Row {
  name: string;
  /** What the bad server does; a text is what it answers. */
  answer: string | Buffer | Script;
  expect: string;
  /** GET /x when left out. */
  send?: Part | Part[];
  method?: string;
  at?: "head" | "end";
  /** The connection to the server ends: it cannot be used again. */
  drops?: boolean;
  check?: (answer: Message, exchange: Exchange) => void;
}

const OK = "HTTP/1.1 200 OK\r\n";
const ask = (host = "alone.test", method = "GET", path = "/x") =>
  `${method} ${path} HTTP/1.1\r\nHost: ${host}\r\nConnection: close\r\n\r\n`;
const submit = (host: string, body = "hello") =>
  `POST /x HTTP/1.1\r\nHost: ${host}\r\nConnection: close\r\nContent-Length: ${body.length}\r\n\r\n${body}`;
const then = (...steps: (string | Buffer | number | "FIN" | "RST")[]): Script => async (visit) => {
  for (const step of steps) {
    if (step === "FIN") visit.socket.end();
    else if (step === "RST") resetConnection(visit);
    else await visit.send(step);
  }
};
const bodyIs = (expected: string | Buffer) => ({ body }: Message) =>
  assert.ok(body.equals(Buffer.from(expected)), body.toString());
const bytes = (length: number) => Buffer.from(Array.from({ length }, (_, i) => (i * 7919 + (i >> 8)) & 255));

// ─── A head that is not one: 502, and the connection is not used again ───

const heads: Row[] = Object.entries({
  "two lengths": `${OK}Content-Length: 2\r\nContent-Length: 3\r\n\r\nhello`,
  "two lengths in one line": `${OK}Content-Length: 2, 3\r\n\r\nhello`,
  "a length and chunks": `${OK}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n`,
  "the length +5": `${OK}Content-Length: +5\r\n\r\nhello`,
  "the length -1": `${OK}Content-Length: -1\r\n\r\nhello`,
  "the length 5x": `${OK}Content-Length: 5x\r\n\r\nhello`,
  "an empty length": `${OK}Content-Length:\r\n\r\nhello`,
  "a length that no number holds": `${OK}Content-Length: 99999999999999999999999\r\n\r\nhello`,
  "a coding that is not chunked": `${OK}Transfer-Encoding: xchunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n`,
  "chunked before another coding": `${OK}Transfer-Encoding: chunked, gzip\r\n\r\n5\r\nhello\r\n0\r\n\r\n`,
  "a status that is no number": "HTTP/1.1 abc OK\r\nContent-Length: 0\r\n\r\n",
  "a status of two digits": "HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n",
  "a status of four digits": "HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n",
  "the status 099": "HTTP/1.1 099 OK\r\nContent-Length: 0\r\n\r\n",
  "another protocol": "SSH-2.0-OpenSSH_9.2p1\r\n\r\n",
  "another version": "HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
  "a line without a colon": `${OK}no colon\r\nContent-Length: 2\r\n\r\nok`,
  "a header without a name": `${OK}: x\r\nContent-Length: 2\r\n\r\nok`,
  "a space before the colon": `${OK}X-A : x\r\nContent-Length: 2\r\n\r\nok`,
  "a space in a name": `${OK}X A: x\r\nContent-Length: 2\r\n\r\nok`,
  "a name that is not ASCII": `${OK}X\xe9: x\r\nContent-Length: 2\r\n\r\nok`,
  "a folded line": `${OK}X-A: a\r\n b\r\nContent-Length: 2\r\n\r\nok`,
  "a folded first line": `${OK} X-A: a\r\nContent-Length: 2\r\n\r\nok`,
  "a NUL in a value": `${OK}X-A: a\0b\r\nContent-Length: 2\r\n\r\nok`,
  "a bare CR in a value": `${OK}X-A: a\rb\r\nContent-Length: 2\r\n\r\nok`,
  "a bare LF between headers": `${OK}X-A: a\nX-B: b\r\nContent-Length: 2\r\n\r\nok`,
  "ESC in a value": `${OK}X-A: a\x1bb\r\nContent-Length: 2\r\n\r\nok`,
  "a control character in a value": `${OK}X-A: a\x01b\r\nContent-Length: 2\r\n\r\nok`,
  "DEL in a value": `${OK}X-A: a\x7fb\r\nContent-Length: 2\r\n\r\nok`,
  "a 101 that nobody asked for": "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: foo\r\n\r\nhello",
  "an end in the middle of the head": then(`${OK}X-A: a\r\nX-`, "FIN"),
  "an end instead of an answer": then("FIN"),
  "a megabyte of headers": then(OK + `X-A: ${"a".repeat(1000)}\r\n`.repeat(1000) + "\r\n"),
  "a header of a megabyte": then(`${OK}X-A: ${"a".repeat(1_000_000)}\r\n\r\n`),
}).map(([name, answer]) => ({ name, answer, expect: "502", drops: true }));

// ─── Bodies that end too soon or not at all ───

const bodies: Row[] = [
  {
    name: "a reset in the middle of a body",
    answer: then(`${OK}Content-Length: 10\r\n\r\nhello`, 100, "RST"),
    expect: "cut",
    drops: true,
  },
  {
    name: "a reset between chunks",
    answer: then(`${OK}Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n`, 100, "RST"),
    expect: "cut",
    drops: true,
  },
  {
    name: "a body shorter than its length",
    answer: then(`${OK}Content-Length: 10\r\n\r\nhello`, "FIN"),
    expect: "cut",
    drops: true,
  },
  {
    name: "chunks without the last one",
    answer: then(`${OK}Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n`, "FIN"),
    expect: "cut",
    drops: true,
  },
  {
    name: "an end inside a chunk",
    answer: then(`${OK}Transfer-Encoding: chunked\r\n\r\n5\r\nhel`, 100, "FIN"),
    expect: "cut",
    drops: true,
  },
  ...Object.entries({
    "a chunk size that is no number": "zz\r\nhello\r\n0\r\n\r\n",
    "an empty chunk size": "\r\nhello\r\n0\r\n\r\n",
    "the chunk size 0x5": "0x5\r\nhello\r\n0\r\n\r\n",
    "the chunk size -5": "-5\r\nhello\r\n0\r\n\r\n",
    "a chunk size that wraps around": "100000000000000005\r\nhello\r\n0\r\n\r\n",
    "a chunk longer than its size": "5\r\nhelloXX\r\n0\r\n\r\n",
    "an endless chunk size": "0".repeat(100_000),
  }).flatMap(([name, body]): Row[] => [
    {
      name: `${name} with the head`,
      answer: `${OK}Transfer-Encoding: chunked\r\n\r\n${body}`,
      expect: "502",
      drops: true,
    },
    {
      name: `${name} later`,
      answer: then(`${OK}Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n`, 100, body),
      expect: "cut",
      drops: true,
    },
  ]),
  { name: "a body that stops coming", answer: `${OK}Content-Length: 10\r\n\r\nhello`, expect: "cut", drops: true },
  {
    name: "chunks that stop coming",
    answer: `${OK}Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n`,
    expect: "cut",
    drops: true,
  },
  { name: "no answer at all", answer: () => {}, expect: "504", drops: true },
  { name: "half a head", answer: `${OK}X-A: `, expect: "504", drops: true },
  {
    name: "a head that comes one byte at a time",
    answer: drip(OK + "X-A: a\r\n".repeat(20), 250),
    expect: "504",
    drops: true,
  },
  {
    name: "100 Continue without end",
    answer: drip("HTTP/1.1 100 Continue\r\n\r\n".repeat(100), 100, 25),
    expect: "504",
    drops: true,
  },
  {
    name: "headers without end",
    answer: endless("X-A: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n".repeat(1000)),
    expect: "502",
    drops: true,
    check: () => assert.ok(sent < MOST, `${sent} bytes were taken`),
  },
];
function drip(text: string, pause: number, size = 1): Script {
  return async (visit) => {
    for (let at = 0; at < text.length && !visit.over; at += size) {
      await visit.send(text.slice(at, at + size), pause);
    }
  };
}
const MOST = 64e6; // of what a server sends without an end; it has to stop sooner, for nobody reads
let sent = 0;
function endless(more: string): Script {
  return async (visit) => {
    await visit.send(OK);
    for (sent = 0; !visit.over && sent < MOST; sent += more.length) {
      await visit.send(more);
    }
  };
}

// ─── Bytes behind an answer: never the beginning of the next one ───

const EVIL = answer("evil");
const behind: Row[] = [
  {
    name: "a body longer than its length",
    answer: `${OK}Content-Length: 5\r\n\r\nhelloEXTRA`,
    expect: "200",
    check: bodyIs("hello"),
    drops: true,
  },
  {
    name: "an answer and another one",
    answer: Buffer.concat([answer("hello"), EVIL]),
    expect: "200",
    check: bodyIs("hello"),
    drops: true,
  },
  {
    name: "an answer and later another one",
    answer: then(answer("hello"), 100, EVIL),
    expect: "200",
    check: bodyIs("hello"),
    drops: true,
  },
  {
    name: "chunks and another answer",
    answer: `${OK}Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n${EVIL}`,
    expect: "200",
    check: bodyIs("hello"),
    drops: true,
  },
  ...[204, 205, 304].flatMap((code): Row[] => [
    {
      name: `${code} with a length and a body`,
      answer: `HTTP/1.1 ${code} X\r\nContent-Length: ${EVIL.length}\r\n\r\n${EVIL}`,
      expect: `${code}`,
      check: bodyIs(""),
      drops: true,
    },
    {
      name: `${code} with chunks`,
      answer: `HTTP/1.1 ${code} X\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nevil\r\n0\r\n\r\n`,
      expect: `${code}`,
      check: bodyIs(""),
      drops: true,
    },
  ]),
  { name: "HEAD with a body", method: "HEAD", answer: answer("hello"), expect: "200", check: bodyIs(""), drops: true },
];

// ─── Answers that have to arrive as they are ───

const SECRET =
  "Connection: keep-alive, X-Secret\r\nX-Secret: 1\r\nKeep-Alive: timeout=77\r\nProxy-Connection: x\r\nTE: x\r\n";
const COOKIES = ["a=1; Expires=Wed, 21 Oct 2026 07:28:00 GMT; Path=/", "b=2", "c=3; HttpOnly"];
const codings: Row[] = ["gzip", "br", "zstd", "identity", "made-up"].flatMap(
  (coding): Row[] => {
    const headers = `Content-Encoding: ${coding}\r\nContent-Type: text/plain\r\nETag: "e"\r\nVary: Accept-Encoding\r\n`;
    const same = (one: Message) =>
      assert.deepEqual(
        ["content-encoding", "content-type", "etag", "vary"].map((name) => value(one, name)),
        [coding, "text/plain", '"e"', "Accept-Encoding"],
      );
    const send = (method: string) => get("/x", `Accept-Encoding: ${coding}\r\n`, "alone.test").replace("GET", method);
    return [
      {
        name: `${coding} that is none, byte by byte`,
        send: send("GET"),
        answer: answer(bytes(3000), headers),
        expect: "200",
        check: (one) => (same(one), bodyIs(bytes(3000))(one)),
      },
      {
        name: `${coding} in answer to HEAD`,
        method: "HEAD",
        send: send("HEAD"),
        answer: `${OK}${headers}Content-Length: 3000\r\n\r\n`,
        expect: "200",
        check: (one) => (same(one), assert.deepEqual(values(one, "content-length"), ["3000"])),
      },
    ];
  },
);
const fine: Row[] = [
  ...codings,
  {
    name: "304 with its headers",
    answer: 'HTTP/1.1 304 Not Modified\r\nETag: "e"\r\nCache-Control: max-age=1\r\n\r\n',
    expect: "304",
    check: (one) =>
      assert.deepEqual([value(one, "etag"), value(one, "cache-control"), one.body.length], ['"e"', "max-age=1", 0]),
  },
  {
    name: "a part of something",
    send: get("/x", "Range: bytes=2-4\r\n", "alone.test"),
    answer: answer("llo", "Content-Range: bytes 2-4/5\r\nAccept-Ranges: bytes\r\n", "206 Partial Content"),
    expect: "206",
    check: (one) => {
      bodyIs("llo")(one);
      assert.equal(value(one, "content-range"), "bytes 2-4/5");
      assert.equal(value(bad.requests[0]!, "range"), "bytes=2-4");
    },
  },
  {
    name: "three cookies",
    answer: answer("ok", COOKIES.map((cookie) => `Set-Cookie: ${cookie}\r\n`).join("")),
    expect: "200",
    check: (one) => assert.deepEqual(values(one, "set-cookie"), COOKIES),
  },
  {
    name: "headers for one hop",
    answer: answer("ok", SECRET),
    expect: "200",
    check: (one) => {
      assert.deepEqual(["x-secret", "proxy-connection", "te"].flatMap((name) => values(one, name)), []);
      assert.doesNotMatch(value(one, "connection") + value(one, "keep-alive"), /secret|77/i);
    },
  },
  {
    name: "a redirect to an inside address",
    answer: (visit) => visit.send(answer("", `Location: http://${bad.address}/inside\r\n`, "302 Found")),
    expect: "302",
    check: (one) =>
      assert.deepEqual([value(one, "location"), bad.requests.length], [`http://${bad.address}/inside`, 1]),
  },
  {
    name: "an error of its own",
    answer: answer("mine", "", "500 Oops"),
    expect: "500!",
    check: (one) => (bodyIs("mine")(one), assert.equal(value(one, "x-lb-failure"), "")),
  },
  {
    name: "HTTP/1.0 that ends with the connection",
    answer: then("HTTP/1.0 200 OK\r\n\r\nhel", 50, "lo", "FIN"),
    expect: "200",
    check: bodyIs("hello"),
    drops: true,
  },
  {
    name: "HTTP/1.1 that ends with the connection",
    answer: then(`${OK}Connection: close\r\n\r\nhel`, 50, "lo", "FIN"),
    expect: "200",
    check: bodyIs("hello"),
    drops: true,
  },
  {
    name: "HTTP/1.0 with a length",
    answer: "HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    expect: "200",
    check: bodyIs("hello"),
  },
  {
    name: "chunks for a client of HTTP/1.0",
    send: "GET /x HTTP/1.0\r\nHost: alone.test\r\n\r\n",
    answer: `${OK}Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n`,
    expect: "200",
    check: (one) => (bodyIs("hello")(one), assert.deepEqual(values(one, "transfer-encoding"), [])),
  },
  {
    name: "a status line without a reason",
    answer: "HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok",
    expect: "200",
    check: bodyIs("ok"),
  },
  ...["299 Unusual", "418 I'm a caf\xe9", "600 Beyond", "999 Odd"].map((line): Row => ({
    name: `the status ${line}`,
    answer: answer("ok", "", line),
    expect: `${line.slice(0, 3)}!`,
    check: (one) => (bodyIs("ok")(one), assert.equal(one.start, `HTTP/1.1 ${line}`)),
  })),
  {
    name: "headers in its own order and spelling",
    answer: answer("ok", "x-b: 1\r\nX-A: 2\r\nX-b: 3\r\nDATE: then\r\nset-COOKIE: a=1\r\nX-B: 4\r\n"),
    expect: "200",
    check: ({ headers }) =>
      assert.deepEqual(headers.filter(([name]) => name !== "Connection"), [
        ["x-b", "1"],
        ["X-A", "2"],
        ["X-b", "3"],
        ["DATE", "then"],
        ["set-COOKIE", "a=1"],
        ["X-B", "4"],
        ["Content-Length", "2"],
      ]),
  },
  {
    name: "no Date",
    answer: answer("ok"),
    expect: "200",
    check: (one) => assert.ok(Math.abs(Date.parse(value(one, "date")) - Date.now()) < 5_000, value(one, "date")),
  },
  { name: "an empty body", answer: answer(""), expect: "200", check: bodyIs("") },
  {
    name: "204",
    answer: "HTTP/1.1 204 No Content\r\nX-A: 1\r\n\r\n",
    expect: "204",
    check: (one) => assert.equal(value(one, "x-a"), "1"),
  },
  {
    name: "chunks in pieces",
    answer: drip(
      `${OK}Transfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n00a\r\n0123456789\r\n0\r\nX-T: 1\r\n\r\n`,
      1,
    ),
    expect: "200",
    check: (one, { bytes }) => {
      bodyIs("hello0123456789")(one);
      assert.ok(bytes.toString().endsWith("\r\n0\r\nX-T: 1\r\n\r\n"), "the trailer has come as well");
    },
  },
  { name: "a head in pieces", answer: drip(answer("hello").toString(), 1), expect: "200", check: bodyIs("hello") },
  { name: "three megabytes by length", answer: answer(bytes(3e6)), expect: "200", check: bodyIs(bytes(3e6)) },
  { name: "three megabytes in chunks", answer: chunksOf(bytes(3e6), 4999), expect: "200", check: bodyIs(bytes(3e6)) },
  {
    name: "values that are not ASCII",
    answer: answer("ok", "X-L: caf\xe9\r\nX-E:\r\n"),
    expect: "200",
    check: (one) => assert.deepEqual([values(one, "x-l"), values(one, "x-e")], [["caf\xe9"], [""]]),
  },
  {
    name: "no Content-Type",
    answer: answer("ok"),
    expect: "200",
    check: (one) => assert.deepEqual(values(one, "content-type"), []),
  },
  {
    name: "headers called __proto__ and constructor",
    answer: answer("ok", "__proto__: x\r\nconstructor: y\r\n"),
    expect: "200",
    check: (one) => assert.equal(value(one, "constructor"), "y"),
  },
  ...["100 Continue", "102 Processing", "103 Early Hints"].flatMap((line): Row[] => {
    const first = `HTTP/1.1 ${line}\r\nLink: </a.css>\r\n\r\n`, second = `HTTP/1.1 ${line}\r\n\r\n`;
    const check: Row["check"] = (one, { interim }) => {
      bodyIs("hello")(one);
      assert.equal(value(one, "link"), "");
      const passed = line.startsWith("100") ? [] : ["</a.css>", ""]; // nobody has asked for 100
      assert.deepEqual(interim.map((one) => value(one, "link")), passed);
      for (const { start } of interim) assert.equal(start, `HTTP/1.1 ${line}`);
    };
    return [
      { name: `${line} before the answer`, answer: first + second + answer("hello"), expect: "200", check },
      {
        name: `${line} and a while later the answer`,
        answer: then(first, 50, second, 50, answer("hello")),
        expect: "200",
        check,
      },
    ];
  }),
  {
    name: "an early 413 while the client still uploads",
    at: "head",
    send: [
      "POST /x HTTP/1.1\r\nHost: alone.test\r\nContent-Length: 1000000\r\n\r\n",
      "x".repeat(1000),
      200,
      "x".repeat(1000),
    ],
    answer: answer("too much", "Connection: close\r\n", "413 Content Too Large"),
    expect: "413!",
    check: (one) => (bodyIs("too much")(one), assert.equal(value(one, "x-lb-failure"), "")),
  },
];
function chunksOf(body: Buffer, size: number): Script {
  return async (visit) => {
    await visit.send(`${OK}Transfer-Encoding: chunked\r\n\r\n`);
    for (let at = 0; at < body.length; at += size) {
      const part = body.subarray(at, at + size);
      await visit.send(`${part.length.toString(16)}\r\n`, part, "\r\n");
    }
    await visit.send("0\r\n\r\n");
  };
}

for (const row of [heads, bodies, behind, fine].flat()) {
  const { name, answer: given, expect, send, method = "GET", at = "end", drops, check } = row;
  test(`a server that sends ${name}: the client gets ${inWords(expect)}`, async () => {
    const bytes = (text: string | Buffer) => Buffer.isBuffer(text) ? text : Buffer.from(text, "latin1");
    bad.reset(typeof given === "function" ? given : (visit) => visit.send(bytes(given)), at);
    const exchange = await rawRequest(program.port, send ?? ask("alone.test", method), { methods: [method] });
    matching(expect, exchange);
    check?.(exchange.answers[0]!, exchange);
    if (drops) await until("the connection to the server ends", () => bad.last?.over);
    // The next client gets his own answer.
    bad.reset((visit) => visit.send(answer("next")));
    const next = await rawRequest(program.port, ask());
    matching("200", next);
    bodyIs("next")(next.answers[0]!);
  });
}

test("a connection is used again after a good answer", async () => {
  const seen = new Set<Visit>();
  bad.reset((visit) => (seen.add(visit), visit.send(answer("ok"))));
  for (let i = 0; i < 5; i++) {
    matching("200", await rawRequest(program.port, ask()));
  }
  assert.equal(seen.size, 1);
});

// ─── Servers that fail before they answer ───

const served = new WeakSet<Visit>();
/** Answers the first request on a connection and then does something else. */
const onceThen = (otherwise: Script): Script => (visit, request, count) => {
  if (served.has(visit)) return otherwise(visit, request, count);
  served.add(visit);
  return visit.send(answer("first"));
};
interface Failing {
  name: string;
  script?: Script;
  send: string;
  expect: string;
  /** How many requests the bad and the good server have seen. */
  asked: [bad: number | undefined, good: number];
}
const failing: Failing[] = [
  {
    name: "a server that refuses: GET goes to another one",
    send: ask("gone-pair.test"),
    expect: "200",
    asked: [undefined, 1],
  },
  {
    name: "a server that refuses: POST goes to another one, for it was not sent",
    send: submit("gone-pair.test"),
    expect: "200",
    asked: [undefined, 1],
  },
  {
    name: "a server that refuses: a POST of a megabyte goes to another one",
    send: submit("gone-pair.test", "x".repeat(1e6)),
    expect: "200",
    asked: [undefined, 1],
  },
  { name: "the only server refuses", send: ask("gone.test"), expect: "502", asked: [undefined, 0] },
  {
    name: "a reset before the answer: GET goes to another server",
    script: resetConnection,
    send: ask("pair.test"),
    expect: "200",
    asked: [1, 1],
  },
  {
    name: "an end before the answer: GET goes to another server",
    script: then("FIN"),
    send: ask("pair.test"),
    expect: "200",
    asked: [1, 1],
  },
  {
    name: "nonsense before the answer: GET goes to another server",
    script: then("nonsense\r\n\r\n"),
    send: ask("pair.test"),
    expect: "200",
    asked: [1, 1],
  },
  {
    name: "503: GET goes to another server",
    script: then(answer("busy", "", "503 Busy")),
    send: ask("pair.test"),
    expect: "200",
    asked: [1, 1],
  },
  {
    name: "a reset before the answer: POST is never sent twice",
    script: resetConnection,
    send: submit("pair.test"),
    expect: "502",
    asked: [1, 0],
  },
  {
    name: "503: POST is never sent twice",
    script: then(answer("busy", "", "503 Busy")),
    send: submit("pair.test"),
    expect: "503!",
    asked: [1, 0],
  },
  {
    name: "a reset in the middle of the body: GET is not begun anew",
    script: then(`${OK}Content-Length: 10\r\n\r\nhello`, 100, "RST"),
    send: ask("pair.test"),
    expect: "cut",
    asked: [1, 0],
  },
];
for (const { name, script, send, expect, asked } of failing) {
  test(name, async () => {
    bad.reset(script ?? (() => {}));
    good.reset((visit) => visit.send(answer("good")));
    matching(expect, await rawRequest(program.port, send));
    assert.deepEqual([asked[0] === undefined ? undefined : bad.requests.length, good.requests.length], asked);
    if (good.requests[0]) assert.deepEqual(good.requests[0].body.toString(), send.slice(send.indexOf("\r\n\r\n") + 4));
  });
}

/** What a server does with an idle connection, and what a POST gets that comes then. */
const stale: Record<string, [Script, post: string]> = {
  "is reset when the next request arrives": [onceThen(resetConnection), "502"],
  "ends when the next request arrives": [onceThen(then("FIN")), "502"],
  "ends while it is idle": [async (visit) => (await visit.send(answer("first"), 50), visit.socket.end()), "200"],
  "is reset while it is idle": [
    async (visit) => (await visit.send(answer("first"), 50), resetConnection(visit)),
    "200",
  ],
};
for (const [name, [script, post]] of Object.entries(stale)) {
  test(`a connection that ${name} is not seen by the client of a GET, and POST is not sent twice`, async () => {
    bad.reset(script);
    matching("200", await rawRequest(program.port, ask("alone.test", "GET", "/warm")));
    matching("200", await rawRequest(program.port, [150, ask("alone.test", "GET", "/again")]));
    matching(post, await rawRequest(program.port, [150, submit("alone.test")]));
    assert.equal(bad.requests.filter(({ start }) => start.startsWith("POST")).length, 1);
  });
}

test("a server that is the balancer itself gives 508 and no storm", async () => {
  const exchange = await rawRequest(program.port, ask("loop.test"));
  matching("508", exchange);
  assert.ok(rounds > 0 && rounds < 100, `${rounds} connections`);
});

test("a client who reads nothing does not make us take all of a server's answer", async () => {
  sent = 0;
  bad.reset(async (visit) => {
    await visit.send(`${OK}Content-Length: 1000000000\r\n\r\n`);
    for (
      const part = Buffer.alloc(100_000);
      !visit.over && sent < MOST;
      sent += part.length
    ) await visit.send(part, 1);
  });
  const socket = connect(program.port, "127.0.0.1");
  socket.on("error", () => {});
  socket.pause();
  socket.write(ask().replace("Connection: close\r\n", ""));
  await until("the answer begins", () => sent > 0);
  let last = -1;
  await until("the server has to wait", () => last === sent || (last = sent, false), 10_000);
  socket.destroy();
  assert.ok(sent < MOST, `${sent} bytes were taken`);
  await until("the connection to the server ends", () => bad.last?.over);
});

test("no answer has ended the program", async () => {
  bad.reset((visit, request) => visit.send(answer(target(request))));
  const { answers } = await rawRequest(program.port, ask("alone.test", "GET", "/last"));
  assert.deepEqual(answers.map((one) => [status(one), one.body.toString()]), [[200, "/last"]]);
});

test("what a server does wrong is reported without stack traces", () => {
  const traces = program.output().split("\n").filter((line) => /^ +at |^ *\d+ \| |panicked|unhandled/i.test(line));
  assert.deepEqual(traces, []);
});
