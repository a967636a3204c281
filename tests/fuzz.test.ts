// Answers as bytes, whole and broken, over sockets that a script feeds. However the network cuts a valid answer, the
// same Response comes of it; whatever else a server says ends in an error, and never in somebody else's answer.
// LB_FUZZ: how many inputs in all. LB_SEED: other inputs than last time; fast-check prints the seed with a failure.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { EventEmitter } from "node:events";
import type { Socket } from "node:net";
import process from "node:process";
import { test as nodeTest } from "node:test";
import fc from "fast-check";
import { type Attempt, createWire, type Failure, type Server, WireError } from "../lb.ts";

const INPUTS = Number(process.env.LB_FUZZ ?? 100_000);
const SEED = Number(process.env.LB_SEED ?? 20_260_401);
const runs = (share: number) => ({ seed: SEED, numRuns: Math.max(1, Math.round(INPUTS * share)) });
const test = (name: string, body: () => Promise<void>) => nodeTest(name, { timeout: 200_000 }, body);

// ─── Servers that exist on paper only ───

class FakeSocket extends EventEmitter {
  readable = true;
  destroyed = false;
  requests = 0;
  write(): boolean {
    this.requests++;
    return true;
  }
  cork() {}
  uncork() {}
  pause() {}
  resume() {}
  destroy() {
    if (this.destroyed) return;
    this.destroyed = true;
    this.readable = false;
    queueMicrotask(() => this.emit("close"));
  }
  /** What the server does: some bytes, then the end of the connection. */
  feed(pieces: Iterable<string | Buffer>) {
    for (const piece of pieces) {
      if (this.destroyed) return;
      this.emit("data", typeof piece === "string" ? Buffer.from(piece, "latin1") : piece);
    }
  }
  hangUp() {
    if (!this.destroyed) this.emit("end");
    this.destroy();
  }
}

let dialed: FakeSocket[] = [];
const wire = createWire({
  dial: () => {
    const socket = new FakeSocket();
    dialed.push(socket);
    queueMicrotask(() => socket.emit("connect"));
    return socket as unknown as Socket;
  },
});

/** The wire keeps one timer while it has a connection: a timer that stays is a connection that has leaked. */
const timers = new Set<unknown>();
const [start, stop] = [globalThis.setInterval, globalThis.clearInterval];
globalThis.setInterval = ((...args: Parameters<typeof start>) => {
  const id = start(...args);
  timers.add(id);
  return id;
}) as typeof start;
globalThis.clearInterval = ((id: Parameters<typeof stop>[0]) => {
  timers.delete(id);
  stop(id);
}) as typeof stop;

const MINUTE = { connect: 60_000, response: 60_000, idle: 60_000, request: Infinity };

interface Seen {
  response: Response | undefined; // undefined: rejected
  body: Buffer; // what of it came
  problem: Failure | undefined; // undefined: it came whole
  detail: string;
  kept: boolean; // the connection may serve another request
}

async function within<T>(promise: Promise<T>): Promise<T> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<never>((_, reject) => timer = setTimeout(() => reject(new Error("it hangs")), 5_000));
  return await Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

/** Reads a body to its end, or to where it breaks off. */
async function readBody(response: Response): Promise<{ body: Buffer; error?: unknown }> {
  const pieces: Uint8Array[] = [];
  const reader = response.body?.getReader();
  try {
    for (let next; reader && !(next = await reader.read()).done;) pieces.push(next.value);
    return { body: Buffer.concat(pieces) };
  } catch (error) {
    return { body: Buffer.concat(pieces), error };
  }
}

/** One request, answered with these bytes in these pieces, and then the end; with all that holds for any answer. */
async function play(
  pieces: Iterable<string | Buffer>,
  method = "GET",
  inbound: Attempt["inbound"] = (headers) => headers,
): Promise<Seen> {
  dialed = [];
  const server = { url: "http://server.test:80", tls: {} } as Server;
  const ended: unknown[][] = [];
  const attempt: Attempt = {
    ...{ server, method, headers: [], body: null, length: 0, wrapped: false, timeouts: MINUTE },
    request: { signal: new AbortController().signal },
    inbound,
    ended: (...args) => void ended.push(args),
    ...{ startedAt: 0, connectedAt: 0, headAt: 0, uploaded: 0 },
  };
  const answer = wire.fetch(server.url + "/", attempt).catch((error: unknown) => error);
  await Promise.resolve();
  await Promise.resolve();
  const [socket] = dialed as [FakeSocket];
  assert.equal(socket.requests, 1);
  socket.feed(pieces);
  const kept = !socket.destroyed && ended.length === 1;
  socket.hangUp();
  const response = await within(answer);
  await within(new Promise<void>((done) => queueMicrotask(() => queueMicrotask(done))));
  assert.deepEqual([dialed.length, socket.requests, timers.size], [1, 1, 0], "asked once, and nothing is left");
  if (!(response instanceof Response)) {
    assert.ok(response instanceof WireError, `threw ${response}`);
    assert.deepEqual(ended, [], "ended() is for answers");
    return { response: undefined, body: Buffer.alloc(0), problem: response.kind, detail: response.message, kept };
  }
  const { body, error } = await within(readBody(response));
  assert.ok(error === undefined || error instanceof WireError, `its body threw ${error}`);
  const bytes = error ? ended[0]?.[1] : body.length; // an error comes before bytes that nobody has read yet
  assert.deepEqual(ended, [[response.status, bytes, error?.kind]], "ended() is called once");
  return { response, body, problem: error?.kind, detail: error?.message ?? "", kept: kept && !error };
}

/** The bytes cut at some places, or everywhere; what stands between two cuts is one piece. */
function cut(text: string, cuts: readonly number[] | "bytes"): Buffer[] {
  const bytes = Buffer.from(text, "latin1");
  if (cuts === "bytes") return Array.from(bytes, (_, i) => bytes.subarray(i, i + 1));
  const at = [...new Set([0, ...cuts.map((cut) => cut % (bytes.length + 1)), bytes.length])].sort((a, b) => a - b);
  return at.slice(1).map((end, i) => bytes.subarray(at[i], end));
}

// ─── Valid answers ───

interface Answer {
  method: string;
  bytes: string;
  status: number;
  headers: [string, string][];
  body: string;
  kept: boolean;
}

const letters = (from: string) => [...from];
const latin1 = Array.from({ length: 256 }, (_, i) => String.fromCharCode(i));
const visible = latin1.filter((char) => /[\t\x20-\x7e\x80-\xff]/.test(char));
const value = fc.string({ unit: fc.constantFrom(...visible), maxLength: 12 });
const binary = fc.string({ unit: fc.constantFrom("\r", "\n", "0", "a", ...latin1), maxLength: 60 });
const name = fc.oneof(
  fc.constantFrom("Content-Type", "set-cookie", "Set-Cookie", "__proto__", "constructor", "ETag", "X-A", "x-a"),
  fc.string({ unit: fc.constantFrom(...letters("!#$%&'*+.^_`|~09AZaz-")), minLength: 1, maxLength: 9 }).map((x) =>
    `x${x}`
  ),
);
const cuts = fc.oneof(fc.array(fc.nat(400), { maxLength: 8 }), fc.constant("bytes" as const));
const connection = fc.constantFrom("", "", "", "close", "keep-alive", "Keep-Alive, X-Gone", "Close,TE");

const validAnswer = fc.record({
  method: fc.constantFrom("GET", "GET", "GET", "HEAD", "POST"),
  before: fc.array(fc.constantFrom(100, 102, 103), { maxLength: 2 }),
  minor: fc.constantFrom(1, 1, 1, 0),
  status: fc.constantFrom(200, 200, 200, 201, 204, 205, 206, 304, 404, 500, 599),
  reason: fc.constantFrom(" OK", " ", "", " caf\xe9 \t!"),
  framing: fc.constantFrom("length", "length", "chunked", "chunked", "close", "zero"),
  fields: fc.array(fc.tuple(name, value), { maxLength: 4 }),
  connection,
  body: binary,
  sizes: fc.array(fc.integer({ min: 1, max: 20 }), { minLength: 1, maxLength: 5 }),
  extension: fc.constantFrom("", "", ";a", " ; a=b", ';q="x;y\xff"'),
  hex: fc.constantFrom("", "0", "000"),
  trailers: fc.array(fc.tuple(name, value), { maxLength: 2 }),
}).map((it): Answer => {
  const empty = it.method === "HEAD" || [204, 205, 304].includes(it.status);
  const framing = it.framing === "chunked" && !it.minor ? "length" : it.framing;
  const body = empty || framing === "zero" ? "" : it.body;
  const sent = it.status === 204 || it.status === 205 ? "" : framing; // those have neither length nor encoding
  const lines = it.fields.map(([name, value]) => `${name}:${value}`);
  const own = it.fields.filter(([name]) => !/gone/i.test(it.connection) || name !== "X-Gone");
  const headers: [string, string][] = own.map(([name, value]) => [name, value.replace(/^[\t ]+|[\t ]+$/g, "")]);
  const length = empty ? it.body.length : body.length;
  if (sent === "length" || sent === "zero") {
    lines.splice(1, 0, `Content-LENGTH:  ${length}\t`);
    headers.push(["content-length", `${length}`]);
  } else if (sent === "chunked") lines.unshift("transfer-Encoding: Chunked");
  if (it.status === 205) headers.push(["content-length", "0"]); // without it a server on the way would add chunks
  if (it.connection) lines.push(`Connection: ${it.connection}`, "X-Other: 1", "Upgrade: h2c");
  if (it.connection) headers.push(["x-other", "1"]);
  if (/gone/i.test(it.connection)) lines.unshift("x-gone: 1");
  const before = it.before.map((status) => `HTTP/1.1 ${status} Wait\r\nLink: </a>\r\n\r\n`).join("");
  const head = [`HTTP/1.${it.minor} ${it.status}${it.reason}`, ...lines].join("\r\n");
  let coded = body;
  if (framing === "chunked" && !empty) {
    coded = "";
    for (let at = 0, i = 0; at < body.length; i++) {
      const data = body.slice(at, at += it.sizes[i % it.sizes.length]!);
      coded += `${it.hex}${data.length.toString(16).toUpperCase()}${it.extension}\r\n${data}\r\n`;
    }
    coded += `${it.hex}0${it.extension}\r\n${it.trailers.map(([name, value]) => `${name}:${value}\r\n`).join("")}\r\n`;
  }
  const persistent = it.minor ? !/close/i.test(it.connection) : /keep-alive/i.test(it.connection);
  const kept = persistent && (empty || framing !== "close");
  return { method: it.method, bytes: `${before}${head}\r\n\r\n${coded}`, status: it.status, headers, body, kept };
});

test("a valid answer is the same Response however the network cuts it", async () => {
  await fc.assert(
    fc.asyncProperty(validAnswer, cuts, async (answer, cuts) => {
      const { response, body, problem, detail, kept } = await play(cut(answer.bytes, cuts), answer.method);
      assert.ok(response, `${problem}: ${detail}`);
      assert.equal(problem, undefined, detail);
      assert.equal(response.status, answer.status);
      assert.deepEqual([...response.headers], [...new Headers(answer.headers)]);
      assert.equal(body.toString("latin1"), answer.body);
      assert.equal(kept, answer.kept, "whether the connection is kept");
    }),
    runs(0.25),
  );
});

// ─── What is not valid ───

type Reading = "incomplete" | "invalid" | { status: number; body: string; whole: boolean };

/** What the bytes mean to a simple reader who has them all. */
function simplyRead(bytes: string, method: string): Reading {
  const end = bytes.indexOf("\r\n\r\n");
  if (end < 0) return "incomplete";
  const [start = "", ...lines] = bytes.slice(0, end).split("\r\n");
  const [, minor, code] = /^HTTP\/1\.([01]) ([1-5][0-9][0-9])($| )/.exec(start) ?? [];
  const fields = lines.map((line) => /^([^\x00-\x20\x7f-\xff:()<>@,;\\"/[\]?={}]+):(.*)$/s.exec(line));
  if (!code || code === "101" || fields.includes(null) || /[\x00-\x08\n-\x1f\x7f]/.test(start + lines.join(""))) {
    return "invalid";
  }
  const all = (name: string) => fields.filter((f) => f![1]!.toLowerCase() === name).map((f) => f![2]!.trim());
  const [lengths, encodings] = [all("content-length"), all("transfer-encoding")];
  if (lengths.length + encodings.length > 1 || lengths.some((length) => !/^[0-9]+$/.test(length))) return "invalid";
  if (encodings.some((encoding) => encoding.toLowerCase() !== "chunked" || minor === "0")) return "invalid";
  const rest = bytes.slice(end + 4);
  const status = Number(code);
  if (status < 200) return simplyRead(rest, method);
  if (method === "HEAD" || [204, 205, 304].includes(status)) return { status, body: "", whole: true };
  if (encodings.length) return { status, ...simplyJoined(rest) };
  const length = Number(lengths[0] ?? rest.length);
  return { status, body: rest.slice(0, length), whole: rest.length >= length };
}

function simplyJoined(rest: string): { body: string; whole: boolean } {
  for (let body = "";;) {
    const [line, hex] = /^([0-9a-fA-F]+)[\t ]*(?:;[^\r\n]*)?\r\n/.exec(rest) ?? [];
    if (line === undefined) return { body, whole: false };
    const size = parseInt(hex!, 16);
    rest = rest.slice(line.length);
    if (size === 0) return { body, whole: /^(?:[^\r\n:]+:[^\r\n]*\r\n)*\r\n/.test(rest) };
    body += rest.slice(0, size);
    if (rest.slice(size, size + 2) !== "\r\n") return { body, whole: false };
    rest = rest.slice(size + 2);
  }
}

/** Whatever came of it, nothing came that the bytes do not say. */
async function playAndJudge(pieces: Buffer[], method: string): Promise<void> {
  const { response, body, problem, kept } = await play(pieces, method);
  const reading = simplyRead(Buffer.concat(pieces).toString("latin1"), method);
  assert.ok(problem === undefined || problem === "invalid-answer" || problem === "reset", `kind ${problem}`);
  if (!response) {
    if (reading === "invalid") assert.deepEqual([problem, kept], ["invalid-answer", false]);
    return;
  }
  assert.ok(typeof reading === "object", `answered, though the bytes are ${reading}`);
  assert.equal(response.status, reading.status);
  const text = body.toString("latin1");
  if (problem) return assert.ok(reading.body.startsWith(text), "the beginning of the body");
  assert.ok(reading.whole, "taken for whole");
  assert.equal(text, reading.body);
}

const FRAGMENTS = [
  ...[
    "\r\n",
    "\n",
    "\r",
    "\0",
    " ",
    "\t",
    ":",
    ";",
    ",",
    "0",
    "-1",
    "+5",
    "0x5",
    "ffffffffffffffff",
    "\x7f",
    "\xff",
    "\r\n ",
  ],
  ...[
    "\r\n\r\n",
    "0\r\n\r\n",
    "5\r\nhello\r\n",
    "HTTP/1.1 200 OK\r\n\r\n",
    "HTTP/1.1 100 Continue\r\n\r\n",
    "HTTP/1.0",
  ],
  ...["Content-Length: 3\r\n", "Content-Length: 3, 3\r\n", "Content-Length:\r\n", "Content-Length : 3\r\n", " 101 "],
  ...["Transfer-Encoding: chunked\r\n", "Transfer-Encoding: gzip, chunked\r\n", "Transfer-Encoding: identity\r\n"],
  ...[
    "Connection: close\r\n",
    "Connection: keep-alive\r\n",
    "Keep-Alive: timeout=0\r\n",
    "Connection: transfer-encoding\r\n",
  ],
];
type Change = (text: string) => string;
const place = fc.double({ min: 0, max: 1, noNaN: true });
const at = (text: string, place: number) => Math.floor(place * text.length);
/** A place where lines begin, for that is where what is inserted means something. */
const lineAt = (text: string, place: number) => text.indexOf("\r\n", at(text, place)) + 2;
const change: fc.Arbitrary<Change> = fc.oneof(
  fc.tuple(place, fc.constantFrom(...FRAGMENTS)).map(([place, fragment]): Change => (text) =>
    text.slice(0, at(text, place)) + fragment + text.slice(at(text, place))
  ),
  fc.tuple(place, fc.constantFrom(...FRAGMENTS)).map(([place, fragment]): Change => (text) =>
    text.slice(0, lineAt(text, place)) + fragment + text.slice(lineAt(text, place))
  ),
  fc.tuple(place, fc.constantFrom(...latin1)).map(([place, char]): Change => (text) =>
    text.slice(0, at(text, place)) + char + text.slice(at(text, place) + 1)
  ),
  fc.tuple(place, fc.nat(9)).map(([place, count]): Change => (text) =>
    text.slice(0, at(text, place)) + text.slice(at(text, place) + count)
  ),
  fc.tuple(place, fc.nat(60)).map(([place, count]): Change => (text) =>
    text.slice(0, at(text, place) + count) + text.slice(at(text, place))
  ),
  place.map((place): Change => (text) => text.slice(0, at(text, place))),
);

test("a spoilt answer fails or says what its bytes say, and leaks nothing", async () => {
  const changes = fc.array(change, { minLength: 1, maxLength: 3 });
  await fc.assert(
    fc.asyncProperty(validAnswer, changes, cuts, async ({ bytes, method }, changes, cuts) => {
      await playAndJudge(cut(changes.reduce((text, change) => change(text), bytes), cuts), method);
    }),
    runs(0.6),
  );
});

test("random bytes are refused, and leak nothing", async () => {
  const noise = fc.oneof(
    fc.string({ unit: fc.constantFrom(...latin1), maxLength: 200 }),
    fc.array(fc.constantFrom(...FRAGMENTS, "HTTP/1.1 ", "200", "A", "a: b"), { maxLength: 30 }).map((all) =>
      all.join("")
    ),
  );
  const beginning = fc.constantFrom(
    "",
    "",
    "HTTP/1.1 200 OK\r\n",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
  );
  await fc.assert(
    fc.asyncProperty(beginning, noise, cuts, (beginning, noise, cuts) => {
      return playAndJudge(cut(beginning + noise, cuts), "GET");
    }),
    runs(0.15),
  );
});

// ─── Rows that have a name ───

const OK = "HTTP/1.1 200 OK\r\n";
const CHUNKED = `${OK}Transfer-Encoding: chunked\r\n\r\n`;
/** What could mean two things, or nothing. In each row the bytes that follow would make a whole answer of it. */
const REFUSED: Record<string, string> = {
  "two Content-Lengths": `${OK}Content-Length: 2\r\nContent-Length: 3\r\n\r\nabc`,
  "two equal Content-Lengths": `${OK}Content-Length: 2\r\ncontent-length: 2\r\n\r\nab`,
  "a list of Content-Lengths": `${OK}Content-Length: 2, 2\r\n\r\nab`,
  "an empty Content-Length": `${OK}Content-Length:\r\n\r\n`,
  "a Content-Length of +2": `${OK}Content-Length: +2\r\n\r\nab`,
  "a Content-Length of -1": `${OK}Content-Length: -1\r\n\r\n`,
  "a Content-Length of 0x2": `${OK}Content-Length: 0x2\r\n\r\nab`,
  "a Content-Length of 1e0": `${OK}Content-Length: 1e0\r\n\r\na`,
  "a Content-Length beyond all numbers": `${OK}Content-Length: ${"9".repeat(30)}\r\n\r\nab`,
  "Content-Length and Transfer-Encoding": `${OK}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n`,
  "Transfer-Encoding and Content-Length": `${OK}Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n`,
  "Transfer-Encoding gzip, chunked": `${OK}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n`,
  "Transfer-Encoding chunked, chunked": `${OK}Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n`,
  "Transfer-Encoding twice": `${OK}Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n`,
  "Transfer-Encoding identity": `${OK}Transfer-Encoding: identity\r\n\r\n0\r\n\r\n`,
  "an empty Transfer-Encoding": `${OK}Transfer-Encoding:\r\n\r\n0\r\n\r\n`,
  "Transfer-Encoding xchunked": `${OK}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n`,
  "Transfer-Encoding with a vertical tab": `${OK}Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n`,
  "Transfer-Encoding with a no-break space": `${OK}Transfer-Encoding: chunked\xa0\r\n\r\n0\r\n\r\n`,
  "HTTP/1.0 with Transfer-Encoding": `HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n`,
  "HTTP/1.2": "HTTP/1.2 200 OK\r\n\r\n",
  "HTTP/2.0": "HTTP/2.0 200 OK\r\n\r\n",
  "HTTP/0.9": "<html></html>\r\n\r\n",
  "http in small letters": "http/1.1 200 OK\r\n\r\n",
  "status 600": "HTTP/1.1 600 OK\r\n\r\n",
  "status 099": "HTTP/1.1 099 OK\r\n\r\n",
  "status 20": "HTTP/1.1 20 OK\r\n\r\n",
  "status 2000": "HTTP/1.1 2000 OK\r\n\r\n",
  "status 2x0": "HTTP/1.1 2x0 OK\r\n\r\n",
  "no status": "HTTP/1.1\r\n\r\n",
  "two spaces before the status": "HTTP/1.1  200 OK\r\n\r\n",
  "a line break before the status line": "\r\nHTTP/1.1 200 OK\r\n\r\n",
  "a NUL in the reason": "HTTP/1.1 200 O\0K\r\n\r\n",
  "a header without a colon": `${OK}Content-Length 2\r\n\r\nab`,
  "a header without a name": `${OK}: 2\r\n\r\n`,
  "a space before the colon": `${OK}Content-Length : 2\r\n\r\nab`,
  "a space before the first header": `${OK} Content-Length: 2\r\n\r\nab`,
  "a folded header": `${OK}A: b\r\n\tc\r\n\r\n`,
  "a NUL in a header": `${OK}A: b\0c\r\n\r\n`,
  "a bare CR in a header": `${OK}A: b\rContent-Length: 2\r\n\r\n`,
  "a bare LF in a header": `${OK}A: b\nContent-Length: 2\r\n\r\n`,
  "a bare LF after the status line": `HTTP/1.1 200 OK\nA: b\r\n\r\n`,
  "a DEL in a header": `${OK}A: \x7f\r\n\r\n`,
  "a quote in a name": `${OK}"A": b\r\n\r\n`,
  "an umlaut in a name": `${OK}\xe4: b\r\n\r\n`,
  "a 101 that nobody asked for": "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
  "a 101 after a 100": `HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 101 Switching Protocols\r\n\r\n`,
  "a 1xx that is not valid": `HTTP/1.1 103 Hints\r\nA\r\n\r\n${OK}\r\n`,
  "a head of 1 MB": `${OK}A: ${"a".repeat(1e6)}\r\n\r\n`,
  "a head of 100,000 headers": `${OK}${"A: b\r\n".repeat(1e5)}\r\n`,
};
/** The same where the head has passed: the body breaks off. */
const BROKEN: Record<string, string> = {
  "an empty chunk size": `${CHUNKED}\r\n\r\n`,
  "a chunk size of +5": `${CHUNKED}+5\r\nhello\r\n0\r\n\r\n`,
  "a chunk size of 0x5": `${CHUNKED}0x5\r\nhello\r\n0\r\n\r\n`,
  "a chunk size of -1": `${CHUNKED}-1\r\nhello\r\n0\r\n\r\n`,
  "a chunk size with a space before it": `${CHUNKED} 5\r\nhello\r\n0\r\n\r\n`,
  "a chunk size of 2^64": `${CHUNKED}10000000000000005\r\nhello\r\n0\r\n\r\n`,
  "a chunk size that ends in LF": `${CHUNKED}5\nhello\r\n0\r\n\r\n`,
  "a chunk size that ends in CR": `${CHUNKED}5\rhello\r\n0\r\n\r\n`,
  "a bare LF in a chunk extension": `${CHUNKED}5;a\nhello\r\n0\r\n\r\n`,
  "a bare CR in a chunk extension": `${CHUNKED}5;a\rb\r\nhello\r\n0\r\n\r\n`,
  "a NUL in a chunk extension": `${CHUNKED}5;\0\r\nhello\r\n0\r\n\r\n`,
  "a chunk extension without a semicolon": `${CHUNKED}5 a\r\nhello\r\n0\r\n\r\n`,
  "a chunk that is longer than its size": `${CHUNKED}5\r\nhello!\r\n0\r\n\r\n`,
  "a chunk that is shorter than its size": `${CHUNKED}5\r\nhell\r\n0\r\n\r\n`,
  "no line break after a chunk": `${CHUNKED}5\r\nhello0\r\n\r\n`,
  "LF after a chunk": `${CHUNKED}5\r\nhello\n0\r\n\r\n`,
  "a line of 2 kB for a chunk's size": `${CHUNKED}5;${"a".repeat(2_000)}\r\nhello\r\n0\r\n\r\n`,
  "a chunk size of 2,000 zeros": `${CHUNKED}${"0".repeat(2_000)}\r\n\r\n`,
  "a trailer without a colon": `${CHUNKED}5\r\nhello\r\n0\r\nA\r\n\r\n`,
  "a folded trailer": `${CHUNKED}5\r\nhello\r\n0\r\nA: b\r\n c\r\n\r\n`,
  "a NUL in a trailer": `${CHUNKED}5\r\nhello\r\n0\r\nA: \0\r\n\r\n`,
  "a bare LF in a trailer": `${CHUNKED}5\r\nhello\r\n0\r\nA: b\nC: d\r\n\r\n`,
  "trailers of 1 MB": `${CHUNKED}0\r\n${"A: b\r\n".repeat(2e5)}\r\n`,
};

for (const [name, bytes] of Object.entries(REFUSED)) {
  test(`${name}: there is no answer`, async () => {
    for (const pieces of bytes.length > 1e5 ? [[bytes], inPieces(bytes, 1_000)] : [[bytes], cut(bytes, "bytes")]) {
      const { response, problem, kept } = await play(pieces);
      assert.deepEqual([response, problem, kept], [undefined, "invalid-answer", false]);
    }
  });
}

for (const [name, bytes] of Object.entries(BROKEN)) {
  test(`${name}: the body breaks off`, async () => {
    for (const pieces of [[bytes], bytes.length > 1e5 ? inPieces(bytes, 1_000) : cut(bytes, "bytes")]) {
      const { problem, body, kept } = await play(pieces);
      assert.deepEqual([problem, kept], ["invalid-answer", false]);
      assert.ok("hello".startsWith(body.toString()), `${body}`);
    }
  });
}

function* inPieces(text: string, size: number): Generator<string> {
  for (let at = 0; at < text.length; at += size) yield text.slice(at, at + size);
}

/** Pieces without end, and how many bytes of them were taken. */
function endless(beginning: string, piece: string) {
  const taken = { bytes: 0 };
  const pieces = function* () {
    yield beginning;
    while (taken.bytes < 1e7) yield (taken.bytes += piece.length, piece);
  };
  return { taken, pieces: pieces() };
}

const ENDLESS: Record<string, [beginning: string, piece: string]> = {
  "a header": [OK + "A: ", "a".repeat(1_000)],
  "headers": [OK, "A: b\r\n".repeat(100)],
  "a reason": ["HTTP/1.1 200 ", "a".repeat(1_000)],
  "100 Continue": ["", "HTTP/1.1 100 Continue\r\n\r\n".repeat(20)],
  "103 in halves": ["HTTP/1.1 103 E", "\r\n\r\nHTTP/1.1 103 E"],
  "trailers": [CHUNKED + "5\r\nhello\r\n0\r\n", "A: b\r\n".repeat(100)],
  "a trailer": [CHUNKED + "5\r\nhello\r\n0\r\nA: ", "a".repeat(1_000)],
  "a chunk extension": [CHUNKED + "5;", "a".repeat(100)],
  "zeros of a chunk size": [CHUNKED, "0".repeat(100)],
};
for (const [name, [beginning, piece]] of Object.entries(ENDLESS)) {
  test(`${name} without end: the connection is closed after 128 KiB at most`, async () => {
    const { taken, pieces } = endless(beginning, piece);
    const { problem } = await play(pieces);
    assert.equal(problem, "invalid-answer");
    assert.ok(taken.bytes <= 131_072, `took ${taken.bytes} bytes`);
  });
}

test("a head of 64 KiB passes, and one of a byte more does not, however they are cut", async () => {
  const head = (length: number) => `${OK}Content-Length: 0\r\nA: `.padEnd(length, "a") + "\r\n\r\n";
  for (const end of [0, 1, 2, 3, 4]) {
    const fits = cut(head(65_536), [65_536 + end]);
    assert.equal((await play(fits)).detail, "", `cut ${end} bytes behind the last header`);
    assert.equal((await play(cut(head(65_537), [65_537 + end]))).problem, "invalid-answer");
  }
});

test("a thousand short headers are read", async () => {
  const headers = Array.from({ length: 990 }, (_, i) => `a${i}:\r\n`).join("");
  const { response, detail } = await play([`${OK}Content-Length: 0\r\n${headers}\r\n`]);
  assert.equal([...response?.headers ?? []].length, 991, detail);
});

test("a connection whose answer came whole while nobody read is not kept, for it has been paused", async () => {
  const half = "a".repeat(300_000);
  const { problem, body, kept } = await play([`${OK}Content-Length: 600000\r\n\r\n${half}`, half]);
  assert.deepEqual([problem, body.length, kept], [undefined, 600_000, false]);
});

/** Answers that are whole, and what stands behind them. */
const BEHIND: Record<string, [method: string, bytes: string, behind: string, body: string]> = {
  "a body": ["GET", `${OK}Content-Length: 2\r\n\r\nab`, "c", "ab"],
  "no body": ["GET", `${OK}Content-Length: 0\r\n\r\n`, "\r\n", ""],
  "the last chunk": ["GET", `${CHUNKED}2\r\nab\r\n0\r\n\r\n`, "0\r\n\r\n", "ab"],
  "the head of HEAD": ["HEAD", `${OK}Content-Length: 2\r\n\r\n`, "ab", ""],
  "204": ["GET", "HTTP/1.1 204 No Content\r\n\r\n", "ab", ""],
  "304": ["GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 2\r\n\r\n", "ab", ""],
  "205": ["GET", "HTTP/1.1 205 Reset Content\r\n\r\n", "0\r\n\r\n", ""],
  "an answer, as if it were the next": ["GET", `${OK}Content-Length: 0\r\n\r\n`, `${OK}Content-Length: 0\r\n\r\n`, ""],
};
for (const [name, [method, bytes, behind, expected]] of Object.entries(BEHIND)) {
  test(`bytes behind ${name} are dropped with the connection`, async () => {
    for (const pieces of [[bytes], cut(bytes, "bytes")]) {
      assert.equal((await play(pieces, method)).kept, true, "without them it is kept");
    }
    for (const pieces of [[bytes + behind], [bytes, behind], cut(bytes + behind, "bytes")]) {
      const { problem, body, kept } = await play(pieces, method);
      assert.deepEqual([problem, body.toString(), kept], [undefined, expected, false]);
    }
  });
}

for (const status of [204, 205]) {
  for (const framing of ["Content-Length: 5", "Transfer-Encoding: chunked"]) {
    test(`a ${status} with ${framing} closes the connection, for what may follow would be taken for an answer`, async () => {
      const { response, body, kept } = await play([`HTTP/1.1 ${status} No\r\n${framing}\r\n\r\n`]);
      assert.deepEqual([response?.status, body.length, kept], [status, 0, false]);
    });
  }
}

test("a connection is kept as the answer's version, Connection and Keep-Alive say", async () => {
  const rows: [version: string, header: string, kept: boolean][] = [
    ["1.1", "", true],
    ["1.1", "Connection: close", false],
    ["1.1", "Connection: Keep-Alive, Close", false],
    ["1.1", "Connection: x\r\nConnection: close", false],
    ["1.0", "", false],
    ["1.0", "Connection: Keep-Alive", true],
    ["1.0", "Connection: close, keep-alive", false],
    ["1.1", "Keep-Alive: timeout=5, max=100", true],
    ["1.1", "Keep-Alive: max=100, timeout=5", true],
    ["1.1", "Keep-Alive: timeout=1", false], // it may be closing already
    ["1.1", "Keep-Alive: timeout=0", false],
    ["1.1", "Keep-Alive: timeout=garbage", true],
  ];
  for (const [version, header, kept] of rows) {
    const seen = await play([`HTTP/${version} 200 OK\r\nContent-Length: 0${header && "\r\n"}${header}\r\n\r\n`]);
    assert.equal(seen.kept, kept, `${version} ${header}`);
  }
});

test("headers of the hop, and those that Connection names, end here", async () => {
  const hop = ["Connection: keep-alive, X-Secret, te", "X-Secret: 1", "Keep-Alive: timeout=9", "TE: trailers"];
  const more = [
    "Trailer: A",
    "Upgrade: h2c",
    "Proxy-Connection: keep-alive",
    "Via: 1.1 a",
    "Set-Cookie: a=1, b; Expires=x",
  ];
  const { response } = await play([
    `${OK}${[...hop, ...more].join("\r\n")}\r\nset-cookie: c\r\nContent-Length: 0\r\n\r\n`,
  ]);
  assert.deepEqual([...response!.headers].map((pair) => pair.join(": ")).sort(), [
    "content-length: 0",
    "set-cookie: a=1, b; Expires=x",
    "set-cookie: c",
    "via: 1.1 a",
  ]);
});

test("`inbound` sees the headers that pass, and what it gives back is what the Response has", async () => {
  const bytes = `${OK}Connection: X-Gone\r\nX-Gone: 1\r\nX-A: b\r\nContent-Length: 0\r\n\r\n`;
  const seen: (readonly string[])[] = [];
  const { response } = await play([bytes], "GET", (headers) => (seen.push(headers), ["x-b", "c", "X-B", "d"]));
  assert.deepEqual(seen, [["x-a", "b", "content-length", "0"]]);
  assert.deepEqual([...response!.headers], [["x-b", "c, d"]]);
});
