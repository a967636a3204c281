// Answers and requests as bytes, whole and broken, over sockets that a script feeds. However the network cuts a valid
// message, the same comes of it; whatever else is said ends in an error, and never in somebody else's answer or request.
// LB_FUZZ: how many inputs in all. LB_SEED: other inputs than last time; fast-check prints the seed with a failure.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { EventEmitter } from "node:events";
import type { Socket } from "node:net";
import process from "node:process";
import fc from "fast-check";
import { type Failure, FAILURES, HttpClient, HttpServer, NO_BODY, type Server } from "../../lb.ts";
import { assertOrder, sendAttempt, type Sending, test, TestBody, TestBytes } from "../rig/rig.ts";
import type { Body, Fields, HttpRequest } from "../rig/types.ts";

const INPUTS = Number(process.env.LB_FUZZ ?? 25_000);
const SEED = Number(process.env.LB_SEED ?? 20_260_401);
const runs = (share: number) => ({ seed: SEED, numRuns: Math.max(1, Math.round(INPUTS * share)) });
// ─── Peers that exist on paper only ───

/** A socket that a script feeds: bytes wait while it is paused, as they do in a real one. */
class FakeSocket extends EventEmitter {
  readonly remoteAddress = "192.0.2.1";
  readable = true;
  destroyed = false;
  paused = false;
  writableEnded = false;
  writableNeedDrain = false;
  writableLength = 0;
  written = ""; // latin1
  writes = 0;
  taken = 0; // bytes that were fed
  slow: "never" | "always" | "for ever" = "never"; // does every write fill it, and is there room again
  private readonly script: Iterator<string | Buffer | (() => void)>[] = [];
  private flowing = false;

  write(bytes: string | Buffer): boolean {
    assert.ok(!this.writableEnded, "nothing is written behind the end");
    this.writes++;
    this.written += typeof bytes === "string" ? bytes : bytes.toString("latin1");
    if (this.slow === "never") return true;
    if (this.slow === "always" && !this.writableNeedDrain) {
      soon(() => {
        this.writableLength = 0;
        this.writableNeedDrain = false;
        if (!this.destroyed && !this.writableEnded) this.emit("drain");
      });
    }
    this.writableLength += 300_000; // beyond what may wait in a socket
    this.writableNeedDrain = true;
    return false;
  }
  end() {
    this.writableEnded = true;
  }
  cork() {}
  uncork() {}
  pause() {
    this.paused = true;
  }
  resume() {
    this.paused = false;
    queueMicrotask(() => this.flow());
  }
  destroy() {
    if (this.destroyed) return;
    this.destroyed = true;
    this.readable = false;
    queueMicrotask(() => this.emit("close"));
  }
  resetAndDestroy() {
    this.destroy();
  }

  /** What the peer does: it sends some bytes; a function is called when all before it was taken. */
  feed(...script: Iterable<string | Buffer | (() => void)>[]) {
    for (const part of script) this.script.push(part[Symbol.iterator]());
    this.flow();
  }
  private flow() {
    if (this.flowing) return;
    this.flowing = true;
    while (!this.destroyed && !this.paused && this.script.length) {
      const { done, value } = this.script[0]!.next();
      if (done) this.script.shift();
      else if (typeof value === "function") value();
      else {
        this.taken += value.length;
        this.emit("data", typeof value === "string" ? Buffer.from(value, "latin1") : value);
      }
    }
    this.flowing = false;
  }
  /** The peer has ended its side, and then the connection. */
  hangUp() {
    if (!this.destroyed) this.emit("end");
    this.destroy();
  }
}

let dialed: FakeSocket[] = [];
const client = new HttpClient({
  dial: () => {
    const socket = new FakeSocket();
    dialed.push(socket);
    queueMicrotask(() => socket.emit("connect"));
    return socket as unknown as Socket;
  },
});

/** Clients and servers keep one timer while they have a connection: a timer that stays is a connection that has leaked. */
const timers = new Map<unknown, () => void>();
const [start, stop] = [globalThis.setInterval, globalThis.clearInterval];
globalThis.setInterval = ((look: () => void, milliseconds: number) => {
  const id = start(look, milliseconds);
  timers.set(id, look);
  return id;
}) as typeof start;
globalThis.clearInterval = ((id: Parameters<typeof stop>[0]) => {
  timers.delete(id);
  stop(id);
}) as typeof stop;

interface Seen {
  status: number; // 0: no head came
  reason: string;
  fields: Fields;
  informs: Sending["informs"];
  body: Buffer; // what of it came
  trailers: Fields;
  problem: Failure | undefined; // undefined: it came whole
  detail: string;
  kept: boolean; // the connection may serve another request
}

async function within<T>(promise: Promise<T>): Promise<T> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<never>((_, reject) => timer = setTimeout(() => reject(new Error("it hangs")), 5_000));
  return await Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

const MANNERS = ["at once", "later", "in pieces"] as const;
type Manner = typeof MANNERS[number];

interface BodyRead {
  body: Buffer;
  trailers: Fields;
  failure?: Failure;
}

/** Reads a body to its end, or to where it breaks off; `in pieces`: it pauses behind each of them. */
function readBody(body: Body, manner: Manner, done: (read: BodyRead) => void): void {
  const pieces: Buffer[] = [];
  let ends = 0;
  const end = (trailers: Fields, failure?: Failure) => {
    assert.equal(ends++, 0, "a body ends once");
    done({ body: Buffer.concat(pieces), trailers, ...(failure && { failure }) });
  };
  body.read({
    data(bytes) {
      assert.ok(bytes.length > 0 && ends === 0, "an empty piece would be taken for the last chunk");
      pieces.push(bytes);
      if (manner !== "in pieces") return;
      body.pause();
      soon(() => body.resume());
    },
    end: (trailers) => end(trailers),
    fail: (failure) => end([], failure),
  });
}

let pending = 0; // what `soon` has yet to do
function soon(go: () => void): void {
  pending++;
  setImmediate(() => {
    pending--;
    go();
  });
}

/** One request, answered with these bytes in these pieces, and then the end; with all that holds for any answer. */
async function play(pieces: Iterable<string | Buffer>, method = "GET", manner: Manner = "at once"): Promise<Seen> {
  dialed = [];
  const server = { url: "http://server.test:80", tls: {} } as Server;
  let kept = false, body: Body | undefined, reading: Promise<BodyRead> | undefined;
  const read = () => void (body && (reading ??= new Promise((resolve) => readBody(body!, manner, resolve))));
  const sending = sendAttempt(client, { server, method, body: NO_BODY }, {
    timeouts: { connect: 60_000, response: 60_000, idle: 60_000 },
    read(given) {
      body = given;
      if (manner !== "later") read();
    },
  });
  await Promise.resolve();
  await new Promise((resolve) => setImmediate(resolve)); // what is written leaves at the end of a turn
  const [socket] = dialed as [FakeSocket];
  assert.equal(socket.writes, 1);
  socket.feed(pieces, [() => {
    kept = !socket.destroyed && sending.order.includes("end");
    socket.hangUp();
  }]);
  if (manner === "later") await new Promise((resolve) => setImmediate(resolve));
  read();
  const { status, reason, fields, failure: problem, detail, sent } = await within(sending.outcome);
  const came = reading ? await within(reading) : { body: Buffer.alloc(0), trailers: [] };
  await within(new Promise<void>((done) => queueMicrotask(() => queueMicrotask(done))));
  assert.deepEqual(
    [dialed.length, socket.writes, timers.size, sent],
    [1, 1, 0, true],
    "asked once, and nothing is left",
  );
  assert.equal(socket.destroyed, true);
  assertOrder(sending.order, problem === undefined, false);
  assert.equal(body !== undefined, status > 0);
  assert.equal(reading && came.failure, reading && problem);
  if (problem === undefined) assert.equal(came.body.length, sending.attempt.received);
  assert.ok(came.body.length <= sending.attempt.received);
  const { informs } = sending;
  return { status, reason, fields, informs, ...came, problem, detail, kept: kept && !problem };
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
  reason: string;
  fields: string[];
  informs: number[];
  body: string;
  trailers: string[];
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

/** Names and values, without the blanks around them. */
const trimmedPairs = (fields: [string, string][]): string[] =>
  fields.flatMap(([name, value]) => [name, value.replace(/^[\t ]+|[\t ]+$/g, "")]);
/** Those that may come so late (RFC 9110 section 6.5.1). */
const passingTrailers = (trailers: [string, string][]): string[] =>
  trimmedPairs(trailers.filter(([name]) => !/^(?:content-type|set-cookie)$/i.test(name)));

interface Chunking {
  body: string;
  sizes: number[];
  extension: string;
  hex: string;
  trailers: [string, string][];
}
function inChunks({ body, sizes, extension, hex, trailers }: Chunking): string {
  let coded = "";
  for (let at = 0, i = 0; at < body.length; i++) {
    const data = body.slice(at, at += sizes[i % sizes.length]!);
    coded += `${hex}${data.length.toString(16).toUpperCase()}${extension}\r\n${data}\r\n`;
  }
  return `${coded}${hex}0${extension}\r\n${trailers.map(([name, value]) => `${name}:${value}\r\n`).join("")}\r\n`;
}
const chunking = {
  body: binary,
  sizes: fc.array(fc.integer({ min: 1, max: 20 }), { minLength: 1, maxLength: 5 }),
  extension: fc.constantFrom("", "", ";a", " ; a=b", ';q="x;y\xff"'),
  hex: fc.constantFrom("", "0", "000"),
  trailers: fc.array(fc.tuple(name, value), { maxLength: 2 }),
};

const validAnswer = fc.record({
  method: fc.constantFrom("GET", "GET", "GET", "HEAD", "POST"),
  before: fc.array(fc.constantFrom(100, 102, 103), { maxLength: 2 }),
  minor: fc.constantFrom(1, 1, 1, 0),
  status: fc.constantFrom(200, 200, 200, 201, 204, 205, 206, 304, 404, 500, 599, 600, 999),
  reason: fc.constantFrom(" OK", " ", "", " caf\xe9 \t!"),
  framing: fc.constantFrom("length", "length", "chunked", "chunked", "close", "zero"),
  fields: fc.array(fc.tuple(name, value), { maxLength: 4 }),
  connection,
  ...chunking,
}).map((it): Answer => {
  const empty = it.method === "HEAD" || [204, 205, 304].includes(it.status);
  const framing = it.framing === "chunked" && !it.minor ? "length" : it.framing;
  const body = empty || framing === "zero" ? "" : it.body;
  const sent = it.status === 204 || it.status === 205 ? "" : framing; // those have neither length nor encoding
  const lines = it.fields.map(([name, value]) => `${name}:${value}`);
  const own = it.fields.filter(([name]) => !/gone/i.test(it.connection) || name !== "X-Gone");
  const fields = trimmedPairs(own);
  const length = empty ? it.body.length : body.length;
  if (sent === "length" || sent === "zero") {
    lines.unshift(`Content-LENGTH:  ${length}\t`);
    fields.unshift("Content-LENGTH", `${length}`);
  } else if (sent === "chunked") lines.unshift("transfer-Encoding: Chunked");
  if (it.connection) lines.push(`Connection: ${it.connection}`, "X-Other: 1", "Upgrade: h2c");
  if (it.connection) fields.push("X-Other", "1");
  if (/gone/i.test(it.connection)) lines.unshift("x-gone: 1");
  const before = it.before.map((status) => `HTTP/1.1 ${status} Wait\r\nLink: </a>\r\n\r\n`).join("");
  const head = [`HTTP/1.${it.minor} ${it.status}${it.reason}`, ...lines].join("\r\n");
  const coded = framing === "chunked" && !empty ? inChunks({ ...it, body }) : body;
  const persistent = it.minor ? !/close/i.test(it.connection) : /keep-alive/i.test(it.connection);
  const kept = persistent && (empty || framing !== "close");
  return {
    ...{ method: it.method, bytes: `${before}${head}\r\n\r\n${coded}`, status: it.status, reason: it.reason.slice(1) },
    ...{ fields, informs: it.before.filter((status) => status !== 100), body, kept },
    trailers: framing === "chunked" && !empty ? passingTrailers(it.trailers) : [],
  };
});

const manner = fc.constantFrom(...MANNERS);

test("a valid answer is the same however the network cuts it, and however it is read", async () => {
  await fc.assert(
    fc.asyncProperty(validAnswer, cuts, manner, async (answer, cuts, manner) => {
      const seen = await play(cut(answer.bytes, cuts), answer.method, manner);
      assert.equal(seen.problem, undefined, seen.detail);
      assert.deepEqual([seen.status, seen.reason, seen.fields], [answer.status, answer.reason, answer.fields]);
      assert.deepEqual(seen.informs, answer.informs.map((status) => [status, "Wait", ["Link", "</a>"]]));
      assert.equal(seen.body.toString("latin1"), answer.body);
      assert.deepEqual(seen.trailers, answer.trailers);
      assert.equal(seen.kept, answer.kept, "whether the connection is kept");
    }),
    runs(0.2),
  );
});

// ─── What is not valid ───

type Reading = "incomplete" | "invalid" | { status: number; body: string; whole: boolean };

/** What the bytes mean to a simple reader who has them all. */
function simplyRead(bytes: string, method: string): Reading {
  const end = bytes.indexOf("\r\n\r\n");
  if (end < 0) return "incomplete";
  const [start = "", ...lines] = bytes.slice(0, end).split("\r\n");
  const [, minor, code] = /^HTTP\/1\.([01]) ([1-9][0-9][0-9])($| )/.exec(start) ?? [];
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
async function playAndJudge(pieces: Buffer[], method: string, manner: Manner): Promise<void> {
  const { status, body, problem, kept } = await play(pieces, method, manner);
  const reading = simplyRead(Buffer.concat(pieces).toString("latin1"), method);
  assert.ok(problem === undefined || problem === "invalid-answer" || problem === "reset", `kind ${problem}`);
  if (!status) {
    if (reading === "invalid") assert.deepEqual([problem, kept], ["invalid-answer", false]);
    return;
  }
  assert.ok(typeof reading === "object", `answered, though the bytes are ${reading}`);
  assert.equal(status, reading.status);
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
const changeOf = (fragments: string[]): fc.Arbitrary<Change> =>
  fc.oneof(
    fc.tuple(place, fc.constantFrom(...fragments)).map(([place, fragment]): Change => (text) =>
      text.slice(0, at(text, place)) + fragment + text.slice(at(text, place))
    ),
    fc.tuple(place, fc.constantFrom(...fragments)).map(([place, fragment]): Change => (text) =>
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
  const changes = fc.array(changeOf(FRAGMENTS), { minLength: 1, maxLength: 3 });
  await fc.assert(
    fc.asyncProperty(validAnswer, changes, cuts, manner, async ({ bytes, method }, changes, cuts, manner) => {
      await playAndJudge(cut(changes.reduce((text, change) => change(text), bytes), cuts), method, manner);
    }),
    runs(0.3),
  );
});

/** Bytes of any kind, and pieces of messages in any order. */
const noiseOf = (...pieces: string[]) =>
  fc.oneof(
    fc.string({ unit: fc.constantFrom(...latin1), maxLength: 200 }),
    fc.array(fc.constantFrom(...pieces), { maxLength: 30 }).map((all) => all.join("")),
  );

test("random bytes are refused, and leak nothing", async () => {
  const noise = noiseOf(...FRAGMENTS, "HTTP/1.1 ", "200", "A", "a: b");
  const beginning = fc.constantFrom(
    "",
    "",
    "HTTP/1.1 200 OK\r\n",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
  );
  await fc.assert(
    fc.asyncProperty(beginning, noise, cuts, manner, (beginning, noise, cuts, manner) => {
      return playAndJudge(cut(beginning + noise, cuts), "GET", manner);
    }),
    runs(0.1),
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
  "status 000": "HTTP/1.1 000 OK\r\n\r\n",
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
      const { status, problem, kept } = await play(pieces);
      assert.deepEqual([status, problem, kept], [0, "invalid-answer", false]);
    }
  });
}

for (const [name, bytes] of Object.entries(BROKEN)) {
  test(`${name}: the body breaks off`, async () => {
    for (const pieces of [[bytes], bytes.length > 1e5 ? inPieces(bytes, 1_000) : cut(bytes, "bytes")]) {
      const { problem, body, kept } = await play(pieces);
      assert.deepEqual([problem, kept], ["invalid-answer", false]);
      assert.ok(["hello", "hell\r"].some((said) => said.startsWith(body.toString())), `${body}`);
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
  const { fields, detail } = await play([`${OK}Content-Length: 0\r\n${headers}\r\n`]);
  assert.equal(fields.length, 2 * 991, detail);
});

test("a connection whose answer came whole while nobody read is kept, and reads on", async () => {
  const piece = "a".repeat(200_000);
  const { problem, body, kept } = await play(
    [`${OK}Content-Length: 400000\r\n\r\n${piece}`, piece],
    "GET",
    "later",
  );
  assert.deepEqual([problem, body.length, kept, dialed[0]!.paused], [undefined, 400_000, true, false]);
});

for (const left of [false, true]) {
  const name = left
    ? "is out when its kept connection ends fails"
    : "waits when its kept connection ends goes on another";
  test(`a POST that ${name}`, async () => {
    const server = { url: "http://server.test:80", tls: {} } as Server,
      turn = () => new Promise((go) => setImmediate(go));
    const answer = `${OK}Content-Length: 0\r\n\r\n`;
    dialed = [];
    const first = sendAttempt(client, { server, method: "GET", body: NO_BODY });
    await turn();
    await turn();
    dialed[0]!.feed([answer]);
    await first.outcome;
    const { outcome, order, attempt } = sendAttempt(client, { server, method: "POST", body: new TestBytes("abc") });
    if (left) await turn();
    dialed[0]!.hangUp();
    await turn();
    await turn();
    dialed[1]?.feed([answer]);
    const { status, failure, sent } = await outcome;
    assert.deepEqual([status, failure, sent], left ? [0, "reset", true] : [200, undefined, true]);
    assert.equal(attempt.uploaded, 3, "the bytes of its body count once");
    assert.deepEqual(dialed.map(({ writes }) => writes), left ? [2] : [1, 1]);
    assert.deepEqual(order, left ? ["sent", "end"] : ["sent", "sent again", "head", "body", "end"]);
    for (const socket of dialed) socket.destroy();
    await turn();
  });
}

test("statuses up to 999 pass, with any reason", async () => {
  for (const [status, reason] of [[600, ""], [799, "Odd  One"], [999, "\xff"]] as const) {
    const seen = await play([`HTTP/1.1 ${status} ${reason}\r\nContent-Length: 0\r\n\r\n`]);
    assert.deepEqual([seen.status, seen.reason, seen.kept], [status, reason, true]);
  }
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
      const seen = await play([`HTTP/1.1 ${status} No\r\n${framing}\r\n\r\n`]);
      assert.deepEqual([seen.status, seen.fields, seen.body.length, seen.kept], [status, [], 0, false]);
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
  const { fields } = await play([
    `${OK}${[...hop, ...more].join("\r\n")}\r\nset-cookie: c\r\nContent-Length: 0\r\n\r\n`,
  ]);
  assert.deepEqual(fields, [
    ...["Trailer", "A", "Via", "1.1 a", "Set-Cookie", "a=1, b; Expires=x"],
    ...["set-cookie", "c", "Content-Length", "0"],
  ]);
});

// ─── Clients that exist on paper only ───

/** A request as its handler has seen it. */
interface Asked {
  method: string;
  target: string;
  version: string;
  fields: string[];
  body: string;
  trailers: string[];
}
interface Handled extends Asked {
  request: HttpRequest;
  refused: string; // why it is no request, or its body broke off; empty: it came whole
  leaves: number; // how often its handler heard that the client has left
}

type Answering = Manner | "early" | "on demand";
let demanded: (() => void)[] = []; // begins to read a request, and answers it
let handled: Handled[] = [];
let answering: Answering = "at once";
const httpServer = new HttpServer({
  handle,
  limits: () => ({ header: 10_000, keep_alive: 60_000, header_size: 65_536, header_fields: 1_000 }),
  draining: () => false,
  now: () => clock,
});
let clock = 0; // milliseconds

/** Answers with the request's body, in one way or another; `early`: before it is read. */
function handle(request: HttpRequest): void {
  const { method, target, version, block, problem } = request, manner = answering, number = handled.length;
  const one: Handled = { method, target, version, fields: [...block.fields], body: "", trailers: [], request, ...NEW };
  const answer = () => {
    const { status } = one.refused ? FAILURES[one.refused as Failure] : { status: 200 };
    const pieces = [`${number}`, one.body].filter((piece) => piece !== "");
    const fields = ["X-Number", `${number}`], whole = version === "1.0" || number % 3 !== 0;
    const body = whole ? new TestBytes(pieces.join("")) : new TestBody(pieces, -1, number % 2 ? [] : ["X-Sum", "1"]);
    request.respond({ status, reason: "", fields, body });
  };
  handled.push(one);
  request.onGone = () => void one.leaves++;
  const read = () =>
    readBody(request.body, manner as Manner, ({ body, trailers, failure }) => {
      Object.assign(one, { body: body.toString("latin1"), trailers: [...trailers], refused: failure ?? "" });
      if (manner === "later") soon(answer);
      else answer();
    });
  if (problem) one.refused = problem;
  if (manner === "on demand" && !problem) return void demanded.push(read);
  if (problem || manner === "early") answer();
  else if (manner === "later") soon(read);
  else read();
}
const NEW = { refused: "", leaves: 0 };

/** Answers as they were written; fails where they are not whole. */
function readAnswers(text: string, methods: string[]) {
  const answers: { status: number; number: number; body: string; closes: boolean }[] = [];
  let continues = 0;
  while (text) {
    const end = text.indexOf("\r\n\r\n"), head = text.slice(0, end);
    const [, status] = /^HTTP\/1\.1 ([1-9]\d\d) [^\r\n]+(?:\r\n[\w-]+: [^\r\n]*)*$/.exec(head) ?? assert.fail(text);
    const rest = text.slice(end + 4), length = Number(/\r\ncontent-length: (\d+)/i.exec(head)?.[1] ?? -1);
    if (status === "100") {
      continues++;
      text = rest;
      continue;
    }
    assert.match(head, /\r\nDate: [^\r\n]+ GMT/);
    const chunked = /\r\ntransfer-encoding: chunked/i.test(head), method = methods[answers.length];
    assert.ok(length >= 0 !== chunked || method === "HEAD", head);
    const size = method === "HEAD" ? 0 : chunked ? sizeOfChunks(rest) : length;
    assert.ok(rest.length >= size, "an answer is not whole");
    const body = chunked && size ? simplyJoined(rest).body : rest.slice(0, size);
    const number = Number(/\r\nX-Number: (\d+)/.exec(head)?.[1] ?? -1);
    answers.push({ status: Number(status), number, body, closes: /\r\nConnection: close/.test(head) });
    text = rest.slice(size);
  }
  return { answers, continues };
}
function sizeOfChunks(text: string): number {
  for (let at = 0;;) {
    const size = parseInt(text.slice(at), 16), begin = text.indexOf("\r\n", at) + 2;
    if (!(size >= 0)) assert.fail(text);
    if (size === 0) return text.indexOf("\r\n\r\n", at) + 4;
    at = begin + size + 2;
  }
}

interface Served {
  handled: Handled[];
  answers: ReturnType<typeof readAnswers>["answers"];
  continues: number; // 100 Continue
  closed: boolean; // we have ended the connection before the client did
  socket: FakeSocket;
}

/** Waits until nothing happens any more. */
async function settle(socket: FakeSocket): Promise<void> {
  for (let turns = 0, before = ""; turns < 3; turns++) {
    await new Promise((resolve) => setImmediate(resolve));
    const now = [socket.taken, socket.writes, handled.length, socket.writableEnded, socket.destroyed, pending].join();
    if (now !== before || pending) turns = 0;
    before = now;
  }
}

/**
 * One connection on which these bytes come, and then its end; with all that holds for any client. `ends`: right behind the
 * last byte, or when nothing happens any more.
 */
async function serve(
  pieces: Iterable<string | Buffer>,
  how: Answering = "at once",
  slow: FakeSocket["slow"] = "never",
  ends: "at once" | "later" = "later",
): Promise<Served> {
  const socket = new FakeSocket(), all: Handled[] = handled = [];
  let fed = false, closed = false;
  answering = how;
  socket.slow = slow;
  httpServer.accept(socket as unknown as Socket, "http");
  try {
    socket.feed(pieces, [() => void (fed = true)]);
    if (ends === "at once") socket.feed([() => void socket.emit("end")]);
    await settle(socket);
    closed = socket.writableEnded || socket.destroyed;
    assert.ok(fed || socket.destroyed, "it is read to its end, also where it is refused");
    const before = all.length;
    if (!socket.destroyed && ends === "later") socket.emit("end");
    await settle(socket);
    assert.equal(all.length, before, "no request waits for the end");
    assert.ok(socket.writableEnded || socket.destroyed, "a client that has ended its side sees the connection end");
  } finally {
    socket.destroy();
    await settle(socket);
  }
  assert.equal(httpServer.connections.size, 0, "nothing is left");
  const { answers, continues } = readAnswers(socket.written, all.map((one) => one.method));
  for (const { request, leaves, refused } of all) {
    assert.deepEqual(
      [request.gone, leaves],
      [true, refused === "client-left" ? 1 : 0],
      "a client with an answer has not left",
    );
  }
  const answered = all.filter((one) => one.refused !== "client-left");
  assert.deepEqual(answers.map((one) => one.number), answered.map((_, i) => i), "each is answered once, in order");
  for (const [i, { status, body, closes }] of answers.entries()) {
    const { refused, body: asked, method } = answered[i]!;
    assert.equal(status, refused ? FAILURES[refused as Failure].status : 200);
    assert.equal(body, method === "HEAD" ? "" : `${i}${asked}`);
    if (closes || refused) assert.ok(closed && i === all.length - 1, "nothing comes behind an answer that closes");
  }
  return { handled: all, answers, continues, closed, socket };
}

/** What is compared of a request. */
const asAsked = ({ method, target, version, fields, body, trailers }: Asked): Asked => ({
  ...{ method, target, version, fields, body, trailers },
});

// ─── Valid requests ───

interface Valid extends Asked {
  bytes: string;
  waits: boolean; // until it hears 100
  persistent: boolean;
}

const validRequest = fc.record({
  before: fc.constantFrom("", "", "", "\r\n", "\r\n\r\n"),
  method: fc.constantFrom("GET", "GET", "POST", "POST", "HEAD", "PUT", "OPTIONS", "x!#$%&'*+-.^_`|~9"),
  target: fc.constantFrom("/", "/a?b=c", "/\xff%00|{}", "*", "http://a.test/x", "?#"),
  minor: fc.constantFrom(1, 1, 1, 0),
  framing: fc.constantFrom("none", "length", "length", "chunked", "chunked", "zero"),
  fields: fc.array(fc.tuple(name, value), { maxLength: 4 }),
  expects: fc.constantFrom(false, false, true),
  connection,
  ...chunking,
}).map((it): Valid => {
  const framing = it.framing === "chunked" && !it.minor ? "length" : it.framing;
  const body = framing === "none" || framing === "zero" ? "" : it.body;
  const lines = it.fields.map(([name, value]) => `${name}:${value}`);
  const gone = /gone/i.test(it.connection);
  const fields = ["host", "a.test", ...trimmedPairs(it.fields.filter(([name]) => !gone || name !== "X-Gone"))];
  lines.unshift("host:\ta.test ");
  if (framing === "length" || framing === "zero") {
    lines.push(`Content-LENGTH:  ${body.length}\t`);
    fields.push("Content-LENGTH", `${body.length}`);
  } else if (framing === "chunked") lines.unshift("transfer-Encoding: Chunked");
  if (it.expects) lines.push("Expect: 100-Continue");
  if (it.connection) lines.push(`Connection: ${it.connection}`, "X-Other: 1", "Upgrade: x");
  if (it.connection) fields.push("X-Other", "1");
  if (gone) lines.unshift("x-gone: 1");
  const head = [`${it.method} ${it.target} HTTP/1.${it.minor}`, ...lines].join("\r\n");
  return {
    ...{ method: it.method, target: it.target, version: `1.${it.minor}`, fields, body },
    bytes: `${it.before}${head}\r\n\r\n${framing === "chunked" ? inChunks({ ...it, body }) : body}`,
    trailers: framing === "chunked" ? passingTrailers(it.trailers) : [],
    waits: it.expects && it.minor === 1 && (body !== "" || framing === "chunked"),
    persistent: it.minor ? !/close/i.test(it.connection) : /keep-alive/i.test(it.connection),
  };
});
const validRequests = fc.array(validRequest, { minLength: 1, maxLength: 4 });
const parting = fc.constantFrom("at once" as const, "later" as const);
const slowness = fc.constantFrom("never" as const, "always" as const);

test("valid requests are the same however the network cuts them, however they are read, and however slow the client is", async () => {
  await fc.assert(
    fc.asyncProperty(validRequests, cuts, manner, slowness, parting, async (requests, cuts, manner, slow, ends) => {
      const last = requests.findIndex((one) => !one.persistent),
        served = last < 0 ? requests : requests.slice(0, last + 1);
      const bytes = requests.map((one) => one.bytes).join("");
      const { handled, closed, continues, answers } = await serve(cut(bytes, cuts), manner, slow, ends);
      assert.deepEqual(handled.map(asAsked), served.map(asAsked));
      assert.deepEqual(handled.map((one) => one.refused), served.map(() => ""));
      assert.equal(closed, last >= 0 || ends === "at once", "whether the connection is kept");
      assert.deepEqual(answers.map((one) => one.closes), served.map((one) => !one.persistent));
      assert.ok(
        continues <= served.filter((one) => one.waits).length,
        "100 is for clients that wait for it",
      );
    }),
    runs(0.15),
  );
});

test("a client that is answered before its body is read gets no answer to what that body holds", async () => {
  await fc.assert(
    fc.asyncProperty(validRequests, cuts, slowness, async (requests, cuts, slow) => {
      const bytes = requests.map((one) => one.bytes).join("");
      const { handled, answers, closed, continues } = await serve(cut(bytes, cuts), "early", slow);
      const heads = (all: Asked[]) => all.map((one) => asAsked({ ...one, body: "", trailers: [] }));
      assert.deepEqual(heads(handled), heads(requests.slice(0, handled.length)));
      assert.equal(continues, 0);
      if (handled.length < requests.length) assert.deepEqual([answers.at(-1)!.closes, closed], [true, true]);
    }),
    runs(0.05),
  );
});

// ─── Requests that are not valid ───

type End = "idle" | "closed" | "in a head" | "in a body" | "refused";
interface RequestReading {
  requests: (Asked & { doubtful: boolean })[]; // doubtful: a stricter reader may refuse it, or close behind it
  end: End;
}

/** What the bytes mean to a simple reader who has them all. */
function simplyReadRequests(text: string): RequestReading {
  const requests: RequestReading["requests"] = [];
  for (;;) {
    text = text.replace(/^(?:\r\n)+/, "");
    const end = text.indexOf("\r\n\r\n");
    if (end < 0) return { requests, end: text ? "in a head" : "idle" };
    const [start = "", ...lines] = text.slice(0, end).split("\r\n");
    const [, method, target, major, minor] = /^([!#-'*+.^-`|~\w-]+) ([!-~\x80-\xff]+) HTTP\/(\d)\.(\d)$/.exec(start) ??
      [];
    const pairs = lines.map((line) =>
      /^([!#-'*+.^-`|~\w-]+):([\t -~\x80-\xff]*)$/.exec(line)?.slice(1) as [string, string]
    );
    if (!method || major !== "1" || pairs.includes(undefined as never) || pairs.length > 1_000 || end > 65_536) {
      return { requests, end: "refused" };
    }
    const fields = pairs.map(([name, value]): [string, string] => [name, value.replace(/^[\t ]+|[\t ]+$/g, "")]);
    const all = (wanted: string) => fields.filter(([name]) => name.toLowerCase() === wanted).map(([, value]) => value);
    const [lengths, encodings, hosts] = [all("content-length"), all("transfer-encoding"), all("host")];
    const old = minor === "0", options = all("connection").join().toLowerCase().split(/[\t ]*,[\t ]*/);
    if (
      lengths.length + encodings.length > 1 || lengths.some((length) => !/^\d{1,15}$/.test(length)) ||
      encodings.some((encoding) => encoding.toLowerCase() !== "chunked" || old) ||
      hosts.length > 1 || hosts.length === 0 && !old ||
      !old && all("expect").some((value) => !/^100-continue(?:[\t ]*,[\t ]*100-continue)*$/i.test(value))
    ) return { requests, end: "refused" };
    const hop = new Set([
      ...HOP,
      ...options.filter((one) => !["", "close", "keep-alive", "te", "upgrade"].includes(one)),
    ]);
    const passing = fields.filter(([name]) => !hop.has(name.toLowerCase())).flat();
    let rest = text.slice(end + 4), body = "", trailers: string[] = [], doubtful = options.includes("upgrade");
    if (encodings.length) {
      const read = simplyReadChunks(rest);
      if (typeof read === "string") return { requests, end: read };
      [body, trailers, rest, doubtful] = [read.body, read.trailers, read.rest, read.doubtful || doubtful];
    } else {
      const length = Number(lengths[0] ?? 0);
      if (rest.length < length) return { requests, end: "in a body" };
      [body, rest] = [rest.slice(0, length), rest.slice(length)];
    }
    requests.push({ method, target: target!, version: old ? "1.0" : "1.1", fields: passing, body, trailers, doubtful });
    if (options.includes("close") || old && !options.includes("keep-alive")) return { requests, end: "closed" };
    text = rest;
  }
}
const HOP = ["connection", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade", "expect"];

function simplyReadChunks(rest: string) {
  for (let body = "", doubtful = false;;) {
    const line = /^[^\n]*\n/.exec(rest)?.[0];
    if (line === undefined) return "in a body" as const;
    const [, hex, extension = ""] = /^([0-9a-fA-F]{1,12})([\t ]*;[^\r\n]*)?\r\n$/.exec(line) ?? [];
    if (hex === undefined) return "refused" as const;
    const size = parseInt(hex, 16);
    doubtful ||= !/^(?:|;a| ; a=b|;q="x;y\xff")$/.test(extension);
    rest = rest.slice(line.length);
    if (size === 0) {
      const trailers: [string, string][] = [];
      for (;;) {
        const line = /^[^\n]*\n/.exec(rest)?.[0];
        if (line === undefined) return "in a body" as const;
        rest = rest.slice(line.length);
        if (line === "\r\n") return { body, trailers: passingTrailers(trailers.filter(passes)), rest, doubtful };
        const [, name, value] = /^([!#-'*+.^-`|~\w-]+):([\t -~\x80-\xff]*)\r\n$/.exec(line) ?? [];
        if (name === undefined) return "refused" as const;
        trailers.push([name, value!]);
      }
    }
    const end = rest.slice(size, size + 2);
    if (end.length && !"\r\n".startsWith(end)) return "refused" as const;
    if (end.length < 2) return "in a body" as const;
    body += rest.slice(0, size);
    rest = rest.slice(size + 2);
  }
}
const passes = ([name]: [string, string]): boolean =>
  ![...HOP, "content-length", "host", "date"].includes(name.toLowerCase());

/** Whatever comes of it, no request comes that the bytes do not say, and what is refused is the last. */
async function serveAndJudge(pieces: Buffer[], manner: Manner, slow: FakeSocket["slow"]): Promise<void> {
  const { handled, closed } = await serve(pieces, manner, slow);
  const { requests, end } = simplyReadRequests(Buffer.concat(pieces).toString("latin1"));
  const whole = handled.filter((one) => !one.refused), refused = handled.slice(whole.length);
  assert.deepEqual(handled.slice(0, whole.length), whole, "nothing comes behind what is refused");
  assert.ok(refused.length <= 1);
  assert.deepEqual(whole.map(asAsked), requests.slice(0, whole.length).map(asAsked));
  if (whole.length < requests.length) {
    assert.ok(closed, "a request is missing");
    return assert.ok(requests[whole.length]!.doubtful || requests[whole.length - 1]?.doubtful, "a request is missing");
  }
  const left = refused[0]?.refused === "client-left";
  if (closed && refused.length === 0 && requests.at(-1)?.doubtful) return; // what follows was meant for another protocol
  if (end === "refused") assert.deepEqual([refused.length, left, closed], [1, false, true]);
  else if (end === "closed" || end === "idle") assert.deepEqual([refused.length, closed], [0, end === "closed"]);
  else if (end === "in a body") assert.deepEqual([refused.length, left], [1, !closed]);
  else assert.deepEqual([refused.length, left], [closed ? 1 : 0, false]);
}

const REQUEST_FRAGMENTS = [
  ...FRAGMENTS.filter((one) => !/HTTP\/1|101/.test(one)),
  ...["GET /x HTTP/1.1\r\nHost: b\r\n\r\n", "0\r\n\r\nGET /x HTTP/1.1\r\nHost: b\r\n\r\n", "Host: b\r\n", " HTTP/1.1"],
  ...["HTTP/1.0", "HTTP/2.0", "Expect: 100-continue\r\n", "Expect: x\r\n", "Connection: upgrade\r\nUpgrade: x\r\n"],
];

test("spoilt requests are refused once, or are what their bytes say, and leak nothing", async () => {
  const changes = fc.array(changeOf(REQUEST_FRAGMENTS), { minLength: 1, maxLength: 3 });
  await fc.assert(
    fc.asyncProperty(validRequests, changes, cuts, manner, slowness, async (requests, changes, cuts, manner, slow) => {
      const bytes = requests.map((one) => one.bytes).join("");
      await serveAndJudge(cut(changes.reduce((text, change) => change(text), bytes), cuts), manner, slow);
    }),
    runs(0.2),
  );
});

test("random bytes are refused once, and leak nothing", async () => {
  const noise = noiseOf(...REQUEST_FRAGMENTS, "GET ", "/", "A", "a: b");
  const beginning = fc.constantFrom(
    "",
    "",
    "GET / HTTP/1.1\r\n",
    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
  );
  await fc.assert(
    fc.asyncProperty(beginning, noise, cuts, manner, slowness, (beginning, noise, cuts, manner, slow) => {
      return serveAndJudge(cut(beginning + noise, cuts), manner, slow);
    }),
    runs(0.05),
  );
});

const GET = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
const head = (lines: string, start = "POST / HTTP/1.1") => `${start}\r\nHost: a\r\n${lines}\r\n\r\n`;
const POST = head("Transfer-Encoding: chunked");
/** What could mean two things, or nothing, and the status of its answer. A request follows in each row. */
const NOT_REQUESTS: Record<string, [status: number, bytes: string]> = {
  "two Content-Lengths": [400, head("Content-Length: 2\r\nContent-Length: 3") + "abc"],
  "two equal Content-Lengths": [400, head("Content-Length: 2\r\ncontent-length: 2") + "ab"],
  "a list of Content-Lengths": [400, head("Content-Length: 2, 2") + "ab"],
  "an empty Content-Length": [400, head("Content-Length:")],
  "a Content-Length of +2": [400, head("Content-Length: +2") + "ab"],
  "a Content-Length of -1": [400, head("Content-Length: -1")],
  "a Content-Length of 0x2": [400, head("Content-Length: 0x2") + "ab"],
  "a Content-Length of 1e0": [400, head("Content-Length: 1e0") + "a"],
  "a Content-Length beyond all numbers": [400, head(`Content-Length: ${"9".repeat(30)}`) + "ab"],
  "Content-Length and Transfer-Encoding": [400, head("Content-Length: 5\r\nTransfer-Encoding: chunked") + "0\r\n\r\n"],
  "Transfer-Encoding and Content-Length": [400, head("Transfer-Encoding: chunked\r\nContent-Length: 0") + "0\r\n\r\n"],
  "Transfer-Encoding gzip, chunked": [400, head("Transfer-Encoding: gzip, chunked") + "0\r\n\r\n"],
  "Transfer-Encoding chunked, chunked": [400, head("Transfer-Encoding: chunked, chunked") + "0\r\n\r\n"],
  "Transfer-Encoding chunked, identity": [400, head("Transfer-Encoding: chunked, identity") + "0\r\n\r\n"],
  "Transfer-Encoding twice": [400, head("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked") + "0\r\n\r\n"],
  "Transfer-Encoding identity": [400, head("Transfer-Encoding: identity")],
  "an empty Transfer-Encoding": [400, head("Transfer-Encoding:") + "0\r\n\r\n"],
  "Transfer-Encoding xchunked": [400, head("Transfer-Encoding: xchunked") + "0\r\n\r\n"],
  "Transfer-Encoding with a vertical tab": [400, head("Transfer-Encoding: \x0bchunked") + "0\r\n\r\n"],
  "Transfer-Encoding with a no-break space": [400, head("Transfer-Encoding: chunked\xa0") + "0\r\n\r\n"],
  "Transfer-Encoding with a space before its colon": [400, head("Transfer-Encoding : chunked") + "0\r\n\r\n"],
  "HTTP/1.0 with Transfer-Encoding": [400, head("Transfer-Encoding: chunked", "POST / HTTP/1.0") + "0\r\n\r\n"],
  "HTTP/0.9": [400, "GET /\r\n\r\n"],
  "HTTP/0.9 with a version": [400, head("A: b", "GET / HTTP/0.9")],
  "HTTP/2.0": [505, head("A: b", "GET / HTTP/2.0")],
  "HTTP/9.9": [505, head("A: b", "GET / HTTP/9.9")],
  "the preface of HTTP/2": [400, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
  "HTTP/1.10": [400, head("A: b", "GET / HTTP/1.10")],
  "http in small letters": [400, head("A: b", "GET / http/1.1")],
  "no version": [400, head("A: b", "GET / ")],
  "no target": [400, head("A: b", "GET HTTP/1.1")],
  "two spaces before the target": [400, head("A: b", "GET  / HTTP/1.1")],
  "two spaces behind the target": [400, head("A: b", "GET /  HTTP/1.1")],
  "a space in the target": [400, head("A: b", "GET /a b HTTP/1.1")],
  "a tab in place of a space": [400, head("A: b", "GET\t/ HTTP/1.1")],
  "a space behind the version": [400, head("A: b", "GET / HTTP/1.1 ")],
  "a space before the method": [400, head("A: b", " GET / HTTP/1.1")],
  "a colon in the method": [400, head("A: b", "GE:T / HTTP/1.1")],
  "a NUL in the target": [400, head("A: b", "GET /\0 HTTP/1.1")],
  "a DEL in the target": [400, head("A: b", "GET /\x7f HTTP/1.1")],
  "a TLS handshake": [400, "\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03"],
  "a LF before the request line": [400, "\n" + GET],
  "a CR before the request line": [400, "\r" + GET],
  "a bare LF after the request line": [400, "GET / HTTP/1.1\nHost: a\r\n\r\n"],
  "bare LFs everywhere": [400, GET.replaceAll("\r", "")],
  "a header without a colon": [400, head("Content-Length 2") + "ab"],
  "a header without a name": [400, head(": 2")],
  "a space before the colon": [400, head("Content-Length : 2") + "ab"],
  "a space before the first header": [400, "GET / HTTP/1.1\r\n Host: a\r\n\r\n"],
  "a folded header": [400, head("A: b\r\n\tc")],
  "a NUL in a header": [400, head("A: b\0c")],
  "a bare CR in a header": [400, head("A: b\rContent-Length: 2")],
  "a bare LF in a header": [400, head("A: b\nContent-Length: 2")],
  "a DEL in a header": [400, head("A: \x7f")],
  "a quote in a name": [400, head('"A": b')],
  "an umlaut in a name": [400, head("\xe4: b")],
  "no Host": [400, "GET / HTTP/1.1\r\nA: b\r\n\r\n"],
  "no fields at all": [400, "GET / HTTP/1.1\r\n\r\n"],
  "two Hosts": [400, head("Host: b")],
  "two equal Hosts": [400, head("host: a")],
  "two Hosts of HTTP/1.0": [400, head("Host: b", "GET / HTTP/1.0")],
  "an Expect that nobody meets": [417, head("Expect: x\r\nContent-Length: 2") + "ab"],
  "two Expects": [417, head("Expect: 100-continue\r\nExpect: x")],
  "a head of 1 MB": [431, head(`A: ${"a".repeat(1e6)}`)],
  "a target of 1 MB": [414, head("A: b", `GET /${"a".repeat(1e6)} HTTP/1.1`)],
  "a head of 100,000 headers": [431, head("A: b\r\n".repeat(1e5) + "A: b")],
  "a head of 1,001 headers": [431, head("A:\r\n".repeat(999) + "A:")],
  "an empty chunk size": [400, `${POST}\r\n\r\n`],
  "a chunk size of +5": [400, `${POST}+5\r\nhello\r\n0\r\n\r\n`],
  "a chunk size of 0x5": [400, `${POST}0x5\r\nhello\r\n0\r\n\r\n`],
  "a chunk size of -1": [400, `${POST}-1\r\nhello\r\n0\r\n\r\n`],
  "a chunk size with a space before it": [400, `${POST} 5\r\nhello\r\n0\r\n\r\n`],
  "a chunk size with a space behind it": [400, `${POST}5 \r\nhello\r\n0\r\n\r\n`],
  "a chunk size of 2^64": [400, `${POST}10000000000000005\r\nhello\r\n0\r\n\r\n`],
  "a chunk size that ends in LF": [400, `${POST}5\nhello\r\n0\r\n\r\n`],
  "a chunk size that ends in CR": [400, `${POST}5\rhello\r\n0\r\n\r\n`],
  "a bare LF in a chunk extension": [400, `${POST}5;a\nhello\r\n0\r\n\r\n`],
  "a bare CR in a chunk extension": [400, `${POST}5;a\rb\r\nhello\r\n0\r\n\r\n`],
  "a NUL in a chunk extension": [400, `${POST}5;\0\r\nhello\r\n0\r\n\r\n`],
  "a chunk extension without a semicolon": [400, `${POST}5 a\r\nhello\r\n0\r\n\r\n`],
  "a chunk that is longer than its size": [400, `${POST}5\r\nhello!\r\n0\r\n\r\n`],
  "a chunk that is shorter than its size": [400, `${POST}5\r\nhell\r\n0\r\n\r\n`],
  "no line break after a chunk": [400, `${POST}5\r\nhello0\r\n\r\n`],
  "LF after a chunk": [400, `${POST}5\r\nhello\n0\r\n\r\n`],
  "a last chunk that ends in LF": [400, `${POST}5\r\nhello\r\n0\n\r\n`],
  "an end that is LF": [400, `${POST}5\r\nhello\r\n0\r\n\n`],
  "a line of 2 kB for a chunk's size": [400, `${POST}5;${"a".repeat(2_000)}\r\nhello\r\n0\r\n\r\n`],
  "a chunk size of 2,000 zeros": [400, `${POST}${"0".repeat(2_000)}\r\n\r\n`],
  "a trailer without a colon": [400, `${POST}5\r\nhello\r\n0\r\nA\r\n\r\n`],
  "a folded trailer": [400, `${POST}5\r\nhello\r\n0\r\nA: b\r\n c\r\n\r\n`],
  "a NUL in a trailer": [400, `${POST}5\r\nhello\r\n0\r\nA: \0\r\n\r\n`],
  "a bare LF in a trailer": [400, `${POST}5\r\nhello\r\n0\r\nA: b\nC: d\r\n\r\n`],
  "trailers of 1 MB": [400, `${POST}0\r\n${"A: b\r\n".repeat(2e5)}\r\n`],
};
for (const [name, [status, bytes]] of Object.entries(NOT_REQUESTS)) {
  test(`${name}: one ${status}, and the end of the connection`, async () => {
    const text = bytes + GET, long = text.length > 1e5;
    for (const pieces of [[text], long ? inPieces(text, 1_000) : cut(text, "bytes"), [GET + text], [bytes, GET]]) {
      const first = Array.isArray(pieces) && pieces[0] === GET + text;
      const { answers, closed, handled } = await serve(pieces, "later");
      assert.deepEqual(answers.map((one) => one.status), first ? [200, status] : [status]);
      assert.deepEqual([handled.length, closed], [answers.length, true]);
    }
  });
}

/** What is odd, and means one thing. */
const ODD_REQUESTS: Record<string, [bytes: string, seen: Partial<Asked>]> = {
  "empty lines before it": [`\r\n\r\n${GET}`, { method: "GET" }],
  "HTTP/1.2": [head("A: b", "GET / HTTP/1.2"), { version: "1.1", fields: ["Host", "a", "A", "b"] }],
  "HTTP/1.0 without Host": ["GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", { version: "1.0", fields: [] }],
  "an Expect of HTTP/1.0": [head("Expect: x\r\nConnection: keep-alive", "GET / HTTP/1.0"), { version: "1.0" }],
  "an empty Host": ["GET / HTTP/1.1\r\nHost:\r\n\r\n", { fields: ["Host", ""] }],
  "a field of several values and spellings": [head("a: 1\r\nA:  2\r\na:"), {
    fields: ["Host", "a", "a", "1", "A", "2", "a", ""],
  }],
  "a large chunk size with zeros": [`${POST}000000000005\r\nhello\r\n000000000000\r\n\r\n`, { body: "hello" }],
  "a chunk extension with a quoted string": [`${POST}5;a="\\"\xff;" ; b\r\nhello\r\n0;x=y\r\n\r\n`, { body: "hello" }],
  "trailers that may not come so late": [
    `${POST}0\r\nX-A: 1\r\nContent-Length: 5\r\nHost: b\r\nAuthorization: c\r\nX-Forwarded-For: d\r\nx-a: 2 \r\n\r\n`,
    { trailers: ["X-A", "1", "x-a", "2"] },
  ],
  "a head of 1,000 headers": [head("A:\r\n".repeat(998) + "A:"), { method: "POST" }],
  "a head of 64 KiB": [GET.slice(0, -4).padEnd(65_536, "a") + "\r\n\r\n", { method: "GET" }],
};
for (const [name, [bytes, seen]] of Object.entries(ODD_REQUESTS)) {
  test(`${name}: the request is served, and the next one too`, async () => {
    const text = bytes + GET;
    for (const pieces of [[text], text.length > 1e4 ? inPieces(text, 100) : cut(text, "bytes"), [bytes, GET]]) {
      const { handled, closed } = await serve(pieces);
      assert.deepEqual([handled.map((one) => one.refused), closed], [["", ""], false]);
      const keys = Object.keys(seen) as (keyof Asked)[];
      assert.deepEqual(Object.fromEntries(keys.map((key) => [key, handled[0]![key]])), seen);
      assert.deepEqual([handled[1]!.method, handled[1]!.target, handled[1]!.fields], ["GET", "/", ["Host", "a"]]);
    }
  });
}

const ENDLESS_REQUESTS: Record<string, [status: number, beginning: string, piece: string]> = {
  "a method": [414, "", "a".repeat(1_000)],
  "a target": [414, "GET /", "a".repeat(1_000)],
  "a header": [431, "GET / HTTP/1.1\r\nA: ", "a".repeat(1_000)],
  "headers": [431, "GET / HTTP/1.1\r\n", "A: b\r\n".repeat(100)],
  "trailers": [400, POST + "5\r\nhello\r\n0\r\n", "A: b\r\n".repeat(100)],
  "a trailer": [400, POST + "5\r\nhello\r\n0\r\nA: ", "a".repeat(1_000)],
  "a chunk extension": [400, POST + "5;", "a".repeat(100)],
  "zeros of a chunk size": [400, POST, "0".repeat(100)],
};
for (const [name, [status, beginning, piece]] of Object.entries(ENDLESS_REQUESTS)) {
  test(`${name} without end: one ${status} after 128 KiB at most, and the end of the connection`, async () => {
    const { taken, pieces } = endless(beginning, piece);
    let answeredAt = 0;
    const watched = function* () {
      for (const piece of pieces) {
        if (handled[0]?.refused) answeredAt ||= taken.bytes;
        yield piece;
      }
    };
    const { answers, closed } = await serve(watched());
    assert.deepEqual([answers.map((one) => one.status), closed], [[status], true]);
    assert.ok(answeredAt > 0 && answeredAt <= 131_072, `took ${answeredAt} bytes`);
  });
}

// ─── What a client may make us hold ───

/** A connection that stays for a while. */
async function holding(how: Answering, slow: FakeSocket["slow"], test: (socket: FakeSocket) => Promise<void>) {
  const socket = new FakeSocket();
  [handled, demanded, answering] = [[], [], how];
  socket.slow = slow;
  httpServer.accept(socket as unknown as Socket, "http");
  try {
    await test(socket);
  } finally {
    socket.destroy();
    await settle(socket);
  }
}

test("a client that pipelines is not read beyond 64 KiB before its answers are out, and gets all of them", async () => {
  await holding("on demand", "never", async (socket) => {
    const piece = GET.repeat(40), count = 10_000;
    socket.feed(Array<string>(count / 40).fill(piece));
    await settle(socket);
    assert.ok(socket.paused && socket.taken <= 65_536 + piece.length, `took ${socket.taken} bytes`);
    for (let i = 0; i < count; i++) {
      assert.equal(demanded.length, 1, "one at a time");
      demanded.pop()!();
      if (i % 100 === 0) await settle(socket);
      assert.ok(socket.taken - (i + 1) * GET.length <= 65_536 + piece.length);
    }
    await settle(socket);
    assert.deepEqual([handled.length, socket.taken, socket.paused], [count, count * GET.length, false]);
  });
});

for (const whole of [true, false]) {
  test(`a client that does not read its answers is not read either, ${whole ? "between" : "within"} them`, async () => {
    await holding("at once", "for ever", async (socket) => {
      const piece = (whole ? head("Connection: keep-alive", "GET / HTTP/1.0") : GET).repeat(40); // that one in one piece
      socket.feed([piece]);
      await new Promise((resolve) => setImmediate(resolve)); // what is written leaves at the end of a turn
      const answered = handled.length;
      socket.feed(Array<string>(1_000).fill(piece));
      await settle(socket);
      assert.ok(socket.taken <= 65_536 + 2 * piece.length, `took ${socket.taken} bytes`);
      assert.ok(socket.paused);
      assert.deepEqual([answered, handled.length], [40, 40], "no more answers are made");
    });
  });
}

for (const framing of ["length", "chunked"]) {
  test(`a body that nobody reads is not received beyond 256 KiB and one piece, and then whole, framing: ${framing}`, async () => {
    const piece = "a".repeat(10_000), count = 200, chunked = framing === "chunked";
    const bytes = chunked ? [POST, ...Array<string>(count).fill(`2710\r\n${piece}\r\n`), "0\r\n\r\n"] : [
      head(`Content-Length: ${count * 10_000}`),
      ...Array<string>(count).fill(piece),
    ];
    await holding("on demand", "never", async (socket) => {
      socket.feed(bytes, [GET]);
      await settle(socket);
      assert.ok(socket.paused && socket.taken <= 262_144 + 11_000, `took ${socket.taken} bytes`);
      const body = handled[0]!.request.body;
      let passed = 0;
      body.read({
        data(bytes) {
          passed += bytes.length;
          if (passed === 500_000) body.pause();
        },
        end: () => handled[0]!.request.respond({ status: 200, reason: "", fields: [], body: new TestBytes("ok") }),
        fail: () => {},
      });
      await settle(socket);
      assert.ok(passed === 500_000 && socket.taken <= 500_000 + 262_144 + 15_000, `took ${socket.taken} bytes`);
      body.resume();
      await settle(socket);
      assert.deepEqual(
        [passed, handled.length, socket.paused],
        [count * 10_000, 2, false],
        "the next request is read too",
      );
    });
  });
}

test("of a body whose request is answered no more than 64 KiB are read, if that keeps the connection", async () => {
  const rows: [announced: string, sent: number, kept: boolean][] = [
    ["Content-Length: 65536", 0, true],
    ["Content-Length: 65546", 10, true],
    ["Content-Length: 65537", 0, false],
    ["Content-Length: 1000000", 10, false],
    ["Transfer-Encoding: chunked", 0, false],
    ["Content-Length: 10\r\nExpect: 100-continue", 0, false], // nobody knows whether it comes
    ["Content-Length: 10\r\nExpect: 100-continue", 5, true],
  ];
  for (const [announced, sent, kept] of rows) {
    const size = Number(/\d+/.exec(announced)?.[0] ?? 30_000);
    const { handled, answers, closed } = await serve(
      [head(announced) + "a".repeat(sent), ...inPieces("a".repeat(size - sent), 10_000), GET],
      "early",
    );
    assert.deepEqual([handled.length, answers[0]!.closes, closed], [kept ? 2 : 1, !kept, !kept], announced);
  }
});

test("a head that has begun has to come in time; an empty line is not one", async () => {
  const rows: [pieces: string[], statuses: number[], closed: boolean][] = [
    [["GET / HT"], [408], true],
    [["GET / HT", "TP/1.1\r\n"], [408], true],
    [["\r\nG"], [408], true],
    [[GET, "GET / HT"], [200, 408], true],
    [[GET + "GET / HT"], [200, 408], true],
    [[GET], [200], false],
    [[GET, "\r\n"], [200], false],
    [[GET, "\r", "\n"], [200], false],
    [["\r\n"], [], true], // the first request has to come in time too: nothing is said to a client that asks nothing
  ];
  for (const [pieces, statuses, closed] of rows) {
    await holding("at once", "never", async (socket) => {
      socket.feed(pieces);
      clock += 11_000;
      for (let looks = 0; looks < 3; looks++) { // the first one finds that the process has stood still
        for (const look of timers.values()) look();
        await settle(socket);
      }
      const { answers } = readAnswers(socket.written, handled.map((one) => one.method));
      assert.deepEqual(
        [answers.map((one) => one.status), socket.writableEnded],
        [statuses, closed],
        JSON.stringify(pieces),
      );
    });
  }
});

test("no connection and no timer is left", async () => {
  for (const end = Date.now() + 5_000; timers.size && Date.now() < end;) {
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  assert.deepEqual([timers.size, httpServer.connections.size], [0, 0]);
});
