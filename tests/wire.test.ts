// The wire over real sockets: what goes out byte by byte, and which connection serves what, how long, and what ends it.
// How answers are read is in fuzz.test.ts.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { spawn } from "node:child_process";
import { lookup } from "node:dns/promises";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { type AddressInfo, createServer, type Server as Listener, Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test as nodeTest } from "node:test";
import { createServer as createTlsServer, type TlsOptions, type TLSSocket } from "node:tls";
import { type Attempt, createWire, type Server, WireError } from "../lb.ts";
import { runtime, sleep, until } from "./rig.ts";

const after: (() => unknown)[] = []; // what the running test has opened
const test = (name: string, body: () => Promise<void>) =>
  nodeTest(name, { timeout: 60_000 }, async () => {
    try {
      await body();
    } finally {
      for (const close of after.splice(0).reverse()) await close();
    }
  });

// ─── Servers ───

/** One connection as the server sees it. */
interface Line {
  number: number; // from 1
  socket: Socket;
  received: string; // latin1
  requests: number;
  closed: boolean;
}
type Script = (line: Line) => unknown;

/** What a server does with its connections: `onRequest` runs for each head that has come. */
function attend(listener: Listener, onRequest: Script, onLine: Script = () => {}): Line[] {
  const lines: Line[] = [];
  listener.on("connection", (socket: Socket) => {
    const line: Line = { number: lines.length + 1, socket, received: "", requests: 0, closed: false };
    lines.push(line);
    socket.on("data", (data: Buffer) => {
      line.received += data.toString("latin1");
      const heads = line.received.split(/^[A-Z]+ \S+ HTTP\/1\.1\r\n(?:.+\r\n)*\r\n/m).length - 1;
      for (; line.requests < heads;) {
        line.requests++;
        onRequest(line);
      }
    });
    socket.on("error", () => {});
    socket.on("close", () => line.closed = true);
    onLine(line);
  });
  return lines;
}

/** Makes it listen, on a free port if none is named, and closes it after the test. */
async function listening(listener: Listener, lines: Line[], host = "127.0.0.1", port = 0): Promise<number> {
  await new Promise<void>((resolve, reject) => {
    listener.on("error", reject);
    listener.listen(port, host, resolve);
  });
  after.push(() => {
    for (const { socket } of lines) socket.destroy();
    return new Promise((resolve) => listener.close(resolve));
  });
  return (listener.address() as AddressInfo).port;
}

const NO_TLS = { ca: "", cert: "", key: "", servername: "", insecure: false };
const serverAt = (url: string, tls: Partial<typeof NO_TLS> = {}) => ({ url, tls: { ...NO_TLS, ...tls } }) as Server;

interface Scripted {
  server: Server;
  lines: Line[];
  allClosed(): Promise<unknown>;
}

async function scripted(onRequest: Script, onLine?: Script): Promise<Scripted> {
  const listener = createServer();
  const lines = attend(listener, onRequest, onLine);
  const server = serverAt(`http://127.0.0.1:${await listening(listener, lines)}`);
  return { server, lines, allClosed: () => until("all is closed", () => lines.every((line) => line.closed)) };
}

const OK = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n";
/** Tells which connection it was. */
const answer: Script = ({ socket, number }) =>
  socket.write(`${OK}Content-Length: ${`${number}`.length}\r\n\r\n${number}`);
const never: Script = () => {};

// ─── Asking ───

type Wire = ReturnType<typeof createWire>;
type Asked = Partial<Omit<Attempt, "timeouts">> & { target?: string; timeouts?: Partial<Attempt["timeouts"]> };
const PATIENT = { connect: 20_000, response: 20_000, idle: 20_000, request: Infinity };

function ask(wire: Wire, server: Server, { target = "/", timeouts, ...own }: Asked = {}) {
  const ended: unknown[][] = [];
  const response = wire.fetch(server.url + target, {
    ...{ server, method: "GET", headers: ["host", "a.test"], body: null, length: 0, wrapped: false },
    request: { signal: new AbortController().signal },
    inbound: (headers) => headers,
    ended: (...args) => void ended.push(args),
    ...{ startedAt: 0, connectedAt: 0, headAt: 0, uploaded: 0 },
    ...own,
    timeouts: { ...PATIENT, ...timeouts },
  });
  response.catch(() => {});
  return { response, ended };
}

/** The body as text, or the kind of what went wrong. */
async function outcome(response: Promise<Response>): Promise<string> {
  try {
    return await (await response).text();
  } catch (error) {
    assert.ok(error instanceof WireError, `threw ${error}`);
    return error.kind;
  }
}
const get = (wire: Wire, server: Server, own?: Asked) => outcome(ask(wire, server, own).response);

const bytes = (text: string) => new Uint8Array(Buffer.from(text));
function stream(...pieces: string[]): ReadableStream<Uint8Array<ArrayBuffer>> {
  const left = pieces.values();
  return new ReadableStream({
    pull(controller) {
      const { done, value } = left.next();
      if (done) controller.close();
      else controller.enqueue(bytes(value));
    },
  }, { highWaterMark: 0 });
}
/** A body of which one piece comes, and then nothing. */
const stalled = (cancelled = () => {}) => {
  let first = true;
  return new ReadableStream<Uint8Array<ArrayBuffer>>({
    pull: (controller) => first ? void (first = false, controller.enqueue(bytes("begin"))) : new Promise(() => {}),
    cancel: cancelled,
  });
};

// ─── What goes out ───

const HEAD = "/a?b=c HTTP/1.1\r\nhost: a.test\r\nX-Y: 1\r\n";
const REQUESTS: Record<string, [asked: Asked, sent: string]> = {
  "GET": [{}, `GET ${HEAD}\r\n`],
  "HEAD": [{ method: "HEAD" }, `HEAD ${HEAD}\r\n`],
  "DELETE": [{ method: "DELETE" }, `DELETE ${HEAD}\r\n`],
  "POST without a body": [{ method: "POST" }, `POST ${HEAD}content-length: 0\r\n\r\n`],
  "POST without a body of unknown length": [
    { method: "POST", length: -1 },
    `POST ${HEAD}content-length: 0\r\n\r\n`,
  ],
  "POST of bytes": [{ method: "POST", body: bytes("hello"), length: 5 }, `POST ${HEAD}content-length: 5\r\n\r\nhello`],
  "POST of bytes of unknown length": [
    { method: "POST", body: bytes("hello"), length: -1 },
    `POST ${HEAD}content-length: 5\r\n\r\nhello`,
  ],
  "PUT of no bytes": [{ method: "PUT", body: bytes(""), length: 0 }, `PUT ${HEAD}content-length: 0\r\n\r\n`],
  "GET with bytes": [{ body: bytes("hello"), length: 5 }, `GET ${HEAD}content-length: 5\r\n\r\nhello`],
  "POST of a stream": [
    { method: "POST", body: stream("he", "", "llo"), length: 5 },
    `POST ${HEAD}content-length: 5\r\n\r\nhello`,
  ],
  "POST of a stream of unknown length": [
    { method: "POST", body: stream("he", "", "llo world!"), length: -1 },
    `POST ${HEAD}transfer-encoding: chunked\r\n\r\n2\r\nhe\r\na\r\nllo world!\r\n0\r\n\r\n`,
  ],
  "POST of an empty stream": [
    { method: "POST", body: stream(), length: 0 },
    `POST ${HEAD}content-length: 0\r\n\r\n`,
  ],
  "POST of an empty stream of unknown length": [
    { method: "POST", body: stream(), length: -1 },
    `POST ${HEAD}transfer-encoding: chunked\r\n\r\n0\r\n\r\n`,
  ],
  "DELETE with a stream": [
    { method: "DELETE", body: stream("hello"), length: 5 },
    `DELETE ${HEAD}content-length: 5\r\n\r\nhello`,
  ],
};

for (const [name, [asked, sent]] of Object.entries(REQUESTS)) {
  test(`${name} is these bytes on the wire, and no header of our own`, async () => {
    const { server, lines } = await scripted(never);
    const { response } = ask(createWire(), server, {
      target: "/a?b=c",
      headers: ["host", "a.test", "X-Y", "1"],
      ...asked,
    });
    await until("all of it is there", () => (lines[0]?.received.length ?? 0) >= sent.length);
    assert.equal(lines[0]!.received, sent);
    await answer(lines[0]!);
    assert.equal((await response).status, 200);
    assert.equal(lines[0]!.received, sent);
  });
}

const MISFITS: Record<string, Asked> = {
  "a stream that is longer than its length": { body: stream("hel", "lo"), length: 4 },
  "a stream that is shorter than its length": { body: stream("hel"), length: 4 },
};
for (const [name, asked] of Object.entries(MISFITS)) {
  test(`${name} is a bad body, and the server sees the connection end before its end`, async () => {
    const { server, lines, allClosed } = await scripted(never);
    assert.equal(await get(createWire(), server, { method: "POST", ...asked }), "bad-body");
    await allClosed();
    assert.equal(lines[0]!.received.split("\r\n\r\n")[1], "hel");
  });
}

test("bytes and a length that contradict each other never get out", async () => {
  const { server, lines } = await scripted(answer);
  const wire = createWire();
  for (const length of [4, 6]) {
    await get(wire, server, { method: "POST", body: bytes("hello"), length, timeouts: { response: 300 } });
  }
  for (const { received } of lines) assert.match(received, /^(POST .*\r\nhost.*\r\ncontent-length: 5\r\n\r\nhello)*$/);
});

test("an upload that breaks off is a bad body, or a client that has left, and the server sees it end", async () => {
  const controller = new AbortController();
  for (const kind of ["bad-body", "client-left"]) {
    if (kind === "client-left") controller.abort();
    const { server, allClosed } = await scripted(never);
    const body = new ReadableStream<Uint8Array<ArrayBuffer>>({ pull: (it) => it.error(new Error("gone")) });
    assert.equal(await get(createWire(), server, { method: "POST", body, length: -1, request: controller }), kind);
    await allClosed();
  }
});

test("a body that somebody else reads is a bad body", async () => {
  const { server, allClosed } = await scripted(never);
  const body = stream("hello");
  body.getReader();
  assert.equal(await get(createWire(), server, { method: "POST", body, length: 5 }), "bad-body");
  await allClosed();
});

test("nothing that could begin another line or request gets out", async () => {
  const { server, lines } = await scripted(answer);
  const wire = createWire();
  const bad = ["\r", "\n", "\0", "\u010d\u010a", "\u{1f600}", "\r\nX: y"];
  const asked: Asked[] = [...bad, " ", "\t", "\x7f"].map((char) => ({ target: `/a${char}b` }));
  for (const char of bad) asked.push({ headers: ["a", `b${char}c`] });
  for (const char of [...bad, " ", ":", "\t", "\xe4"]) asked.push({ headers: [`a${char}`, "b"] });
  for (const char of [...bad, " ", " /x HTTP/1.1\r\n\r\nGET"]) asked.push({ method: `GET${char}` });
  asked.push({ headers: ["", "a"] }, { method: "" }, { target: "" });
  for (const own of asked) {
    assert.equal(await get(wire, server, own), "bad-body", JSON.stringify(own));
  }
  assert.equal(lines.length, 0, "not even a connection");
});

// ─── Connections ───

test("connections are used again, the newest first", async () => {
  const waiting: Line[] = [];
  const { server, lines } = await scripted((line) => void waiting.push(line));
  const wire = createWire();
  const done: string[] = [];
  for (const _ of [1, 2, 3]) void get(wire, server).then((number) => done.push(number));
  await until("three requests are there", () => waiting.length === 3);
  for (const number of [3, 1, 2]) { // the second becomes idle last
    answer(lines[number - 1]!);
    await until("it is answered", () => done.includes(`${number}`));
  }
  for (const expected of ["2", "2"]) {
    const next = get(wire, server);
    await until("it is there", () => waiting.length > 3);
    answer(waiting.pop()!);
    assert.equal(await next, expected);
  }
  assert.equal(lines.length, 3);
});

test("another server gets a connection of its own", async () => {
  const [one, other] = [await scripted(answer), await scripted(answer)];
  const wire = createWire();
  await get(wire, one.server);
  await get(wire, other.server);
  assert.deepEqual([one.lines.length, other.lines.length], [1, 1]);
});

const IDLE_TIMES: [header: string, milliseconds: number][] = [
  ["", 4_000],
  ["Keep-Alive: timeout=3", 2_000],
  ["Keep-Alive: timeout=600", 4_000],
];
for (const [header, milliseconds] of IDLE_TIMES) {
  test(`an idle connection is closed after ${milliseconds} ms ${header && `where the server says ${header}`}`, async () => {
    const { server, lines, allClosed } = await scripted(({ socket }) =>
      socket.write(`${OK}${header}${header && "\r\n"}Content-Length: 0\r\n\r\n`)
    );
    let clock = 0;
    const wire = createWire({ now: () => clock });
    await get(wire, server);
    clock += milliseconds - 1;
    await get(wire, server);
    assert.equal(lines.length, 1, "used again just before");
    clock += milliseconds;
    await get(wire, server);
    assert.equal(lines.length, 2, "not used again, also where it could not be closed yet");
    clock += milliseconds;
    await allClosed();
  });
}

test("a connection that is a minute old is not used again", async () => {
  const { server, lines } = await scripted(answer);
  let clock = 0;
  const wire = createWire({ now: () => clock });
  const served: string[] = [];
  for (; clock <= 120_000; clock += 3_000) served.push(await get(wire, server));
  // from 0 s to 60 s the first one, whose last answer comes when it is a minute old
  assert.equal(served.join(""), "1".repeat(21) + "2".repeat(20));
  assert.equal(lines.length, 2);
});

/** What a server does on a connection that it has already answered on. */
const FEET: Record<string, Script> = {
  "closed": ({ socket }) => void socket.destroy(),
  "ended": ({ socket }) => void socket.end(),
  "reset": ({ socket }) => void socket.resetAndDestroy(),
};
for (const [name, close] of Object.entries(FEET)) {
  const onSecond: Script = (line) => line.number === 1 && line.requests > 1 ? close(line) : answer(line);
  const retried: [string, Asked][] = [
    ["GET", {}],
    ["PUT", { method: "PUT", body: bytes("hello"), length: 5 }],
  ];
  for (const [method, asked] of retried) {
    test(`${method} is sent again on a fresh connection when an idle one is ${name} under our feet`, async () => {
      const { server, lines } = await scripted(onSecond);
      const wire = createWire();
      assert.equal(await get(wire, server), "1");
      assert.equal(await get(wire, server, asked), "2");
      assert.deepEqual(lines.map((line) => line.requests), [2, 1]);
    });
  }
  const once: [string, Asked][] = [
    ["POST", { method: "POST", body: bytes("hello"), length: 5 }],
    ["POST without a body", { method: "POST" }],
    ["PUT of a stream", { method: "PUT", body: stream("hello"), length: 5 }],
    ["PATCH", { method: "PATCH" }],
  ];
  for (const [method, asked] of once) {
    test(`${method} is never sent twice when an idle connection is ${name} under our feet`, async () => {
      const { server, lines } = await scripted(onSecond);
      const wire = createWire();
      assert.equal(await get(wire, server), "1");
      await assert.rejects(ask(wire, server, asked).response, { kind: "reset", sent: true });
      assert.deepEqual(lines.map((line) => line.requests), [2]);
    });
  }
}

test("a server that closes every connection is asked once more and not for ever", async () => {
  const { server, lines } = await scripted((line) =>
    line.number === 1 && line.requests === 1 ? answer(line) : line.socket.destroy()
  );
  const wire = createWire();
  assert.equal(await get(wire, server), "1");
  assert.equal(await get(wire, server), "reset");
  assert.deepEqual(lines.map((line) => line.requests), [2, 1]);
});

test("GET is not sent again when some of an answer has come", async () => {
  const { server, lines } = await scripted((line) =>
    line.requests === 1 ? answer(line) : line.socket.end("HTTP/1.1 100 Continue\r\n\r\n")
  );
  const wire = createWire();
  assert.equal(await get(wire, server), "1");
  assert.equal(await get(wire, server), "reset");
  assert.equal(lines.length, 1);
});

test("an idle connection that the server has closed is not used", async () => {
  const { server, lines, allClosed } = await scripted((line) => {
    answer(line);
    line.socket.end();
  });
  const wire = createWire();
  assert.equal(await get(wire, server), "1");
  await allClosed();
  await sleep(50);
  assert.equal(await get(wire, server, { method: "POST" }), "2");
  assert.equal(lines.length, 2);
});

test("three hundred requests at once get each their own answer", async () => {
  const { server, lines, allClosed } = await scripted(({ socket, received }) => {
    const [, name] = /.*GET \/(\d+) /s.exec(received)!;
    const body = name!.repeat(50);
    setTimeout(() => {
      socket.write(`${OK}Content-Length: ${body.length}\r\n\r\n`);
      setTimeout(() => socket.write(body), 5);
    }, Number(name) % 7);
  });
  let clock = 0;
  const wire = createWire({ now: () => clock });
  for (const round of [0, 1, 2]) {
    const names = Array.from({ length: 100 }, (_, i) => `${i + 1_000 * round}`);
    const answers = await Promise.all(names.map((name) => get(wire, server, { target: `/${name}` })));
    assert.deepEqual(answers, names.map((name) => name.repeat(50)));
  }
  assert.ok(lines.length <= 100, `${lines.length} connections`);
  clock += 10_000;
  await allClosed();
});

// ─── What ends an attempt ───

test("a port where nobody listens is `connect`, and nothing was sent", async () => {
  const listener = createServer();
  const port = await listening(listener, []);
  await new Promise((resolve) => listener.close(resolve));
  after.pop();
  await assert.rejects(ask(createWire(), serverAt(`http://127.0.0.1:${port}`)).response, {
    kind: "connect",
    sent: false,
  });
  await assert.rejects(ask(createWire(), serverAt("http://nowhere.invalid:80")).response, {
    kind: "connect",
    sent: false,
  });
});

const drip = (text: string, every: number): Script => ({ socket }) => {
  let at = 0;
  const timer = setInterval(
    () => socket.destroyed || at >= text.length ? clearInterval(timer) : socket.write(text[at++]!),
    every,
  );
  after.push(() => clearInterval(timer));
};
const started = `${OK}Content-Length: 100\r\n\r\nbegin`;
const aborted = () => {
  const controller = new AbortController();
  setTimeout(() => controller.abort(), 200);
  return { request: controller };
};
/** How an attempt ends when somebody falls silent or leaves. `server: null`: a TLS server that never shakes hands. */
const ENDINGS: Record<string, [kind: string, server: Script, asked: () => Asked]> = {
  "a server that never answers": ["timeout", never, () => ({ timeouts: { response: 300 } })],
  "a server that answers a byte now and then": [
    "timeout",
    drip(`${OK}A: ${"a".repeat(1_000)}`, 50),
    () => ({ timeouts: { response: 300 } }),
  ],
  "a server that says 102 now and then": [
    "timeout",
    ({ socket }) => {
      const timer = setInterval(() => socket.write("HTTP/1.1 102 Processing\r\n\r\n"), 50);
      after.push(() => clearInterval(timer));
    },
    () => ({ timeouts: { response: 300 } }),
  ],
  "a server that stops in its body": [
    "idle",
    ({ socket }) => socket.write(started),
    () => ({ timeouts: { idle: 300 } }),
  ],
  "a client that stops in its body": [
    "client-timeout",
    never,
    () => ({ method: "POST", body: stalled(), length: 100, timeouts: { idle: 300 } }),
  ],
  "a client that leaves before the answer": ["client-left", never, aborted],
  "an attempt that is given up": ["client-left", never, () => ({ stop: AbortSignal.timeout(200) })],
  "a client that leaves in the answer": ["client-left", ({ socket }) => socket.write(started), aborted],
  "a client that leaves in its upload": [
    "client-left",
    never,
    () => ({ method: "POST", body: stalled(), length: 100, ...aborted() }),
  ],
  "a server that closes before the answer": ["reset", ({ socket }) => socket.end(), () => ({})],
  "a server that resets before the answer": ["reset", ({ socket }) => socket.resetAndDestroy(), () => ({})],
  "a server that closes in the head": ["reset", ({ socket }) => socket.end(OK), () => ({})],
  "a server that closes in the body": ["reset", ({ socket }) => socket.end(started), () => ({})],
  "a server that resets in the body": [
    "reset",
    ({ socket }) => void socket.write(started, () => setTimeout(() => socket.resetAndDestroy(), 100)),
    () => ({}),
  ],
  "a server that resets in a body without a length": [
    "reset",
    ({ socket }) => void socket.write(OK + "\r\nbegin", () => setTimeout(() => socket.resetAndDestroy(), 100)),
    () => ({}),
  ],
  "a server that closes within a chunk": [
    "reset",
    ({ socket }) => socket.end(`${OK}Transfer-Encoding: chunked\r\n\r\n5\r\nhel`),
    () => ({}),
  ],
  "a server that closes before the last chunk": [
    "reset",
    ({ socket }) => socket.end(`${OK}Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n`),
    () => ({}),
  ],
};
for (const [name, [kind, script, asked]] of Object.entries(ENDINGS)) {
  test(`${name} is \`${kind}\`, and the connection is closed`, async () => {
    const { server, lines, allClosed } = await scripted(script);
    const { response, ended } = ask(createWire(), server, asked());
    const got = await response.catch(() => undefined);
    assert.equal(await outcome(response), kind);
    assert.deepEqual(ended.map((args) => args.at(-1)), got ? [kind] : []);
    await allClosed();
    assert.equal(lines.length, 1);
  });
}

test("a TLS server that never shakes hands is `connect-timeout`, and the connection is closed", async () => {
  const { server, lines, allClosed } = await scripted(never);
  const secure = serverAt(server.url.replace("http:", "https:"), { insecure: true });
  const { response } = ask(createWire(), secure, { timeouts: { connect: 300 } });
  await assert.rejects(response, { kind: "connect-timeout", sent: false });
  assert.equal(lines.length, 1);
  await allClosed();
});

test("a body that comes slowly but steadily is not cut off", async () => {
  const { server } = await scripted((line) => {
    line.socket.write(`${OK}Content-Length: 20\r\n\r\n`);
    drip("steady ".repeat(3).slice(0, 20), 100)(line);
  });
  assert.equal(await get(createWire(), server, { timeouts: { idle: 1_500, response: 1_500 } }), "steady steady steady");
});

test("a reader that leaves closes the connection at once", async () => {
  const { server, allClosed } = await scripted(({ socket }) => socket.write(started));
  const { response, ended } = ask(createWire(), server);
  await (await response).body!.cancel();
  await allClosed();
  assert.deepEqual(ended.map((args) => args.slice(-2)), [[5, "client-left"]]);
});

test("an early answer reaches the client while its upload goes on, and ends the upload", async () => {
  let cancelled = 0;
  const { server, lines, allClosed } = await scripted(({ socket }) =>
    socket.write("HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
  );
  const body = stalled(() => cancelled++);
  const wire = createWire();
  const { response, ended } = ask(wire, server, { method: "POST", body, length: 1e9 });
  assert.equal((await response).status, 413);
  assert.equal(await (await response).text(), "big");
  assert.equal(ended.length, 1);
  assert.equal(await get(wire, server), "big");
  assert.equal(lines.length, 2, "the rest of an upload would be taken for a request");
  lines[1]!.socket.end();
  await allClosed();
  await until("the upload is cancelled", () => cancelled === 1);
});

test("an answer that streams while the request still does is passed on both ways", async () => {
  let release = () => {};
  const released = new Promise<void>((resolve) => release = resolve);
  let step = 0;
  const body = new ReadableStream<Uint8Array<ArrayBuffer>>({
    async pull(controller) {
      if (step++ === 0) return controller.enqueue(bytes("one"));
      await released;
      controller.enqueue(bytes("two"));
      controller.close();
    },
  });
  const { server, lines } = await scripted(({ socket }) => socket.write(`${OK}Content-Length: 6\r\n\r\none`));
  const { response } = ask(createWire(), server, { method: "POST", body, length: 6 });
  const reader = (await response).body!.getReader();
  assert.equal(Buffer.from((await reader.read()).value!).toString(), "one");
  release();
  await until("the rest of the request", () => lines[0]!.received.endsWith("onetwo"));
  lines[0]!.socket.write("two");
  assert.equal(Buffer.from((await reader.read()).value!).toString(), "two");
  assert.equal((await reader.read()).done, true);
});

// ─── Backpressure ───

const TOTAL = 64 * 1024 * 1024;
const BOUND = 24 * 1024 * 1024; // what the system's buffers and ours may take together
const PIECE = Buffer.alloc(65_536, Buffer.from(Array.from({ length: 251 }, (_, i) => i)));

/** Writes as fast as it is taken. */
function pour(socket: Socket, written: { bytes: number }) {
  while (written.bytes < TOTAL) {
    written.bytes += PIECE.length;
    if (!socket.write(PIECE)) return void socket.once("drain", () => pour(socket, written));
  }
}

/** Waits until a number stays the same for half a second. */
async function settled(look: () => number): Promise<number> {
  for (let last = -1;;) {
    const now = look();
    if (now === last && now > 0) return now;
    last = now;
    await sleep(500);
  }
}

/** The wrong bytes in a piece that stands at some place of the whole. */
const wrongIn = (piece: Uint8Array, at: number): number => {
  const from = at % PIECE.length;
  const first = Math.min(piece.length, PIECE.length - from);
  if (Buffer.compare(piece.subarray(0, first), PIECE.subarray(from, from + first))) return first;
  return first < piece.length ? wrongIn(piece.subarray(first), at + first) : 0;
};

test("a reader who does not read stops the server, and then gets all of it", async () => {
  const written = { bytes: 0 };
  const { server } = await scripted(({ socket }) => {
    socket.write(`${OK}Content-Length: ${TOTAL}\r\n\r\n`);
    pour(socket, written);
  });
  const { response, ended } = ask(createWire(), server);
  const reader = (await response).body!.getReader();
  const before = await settled(() => written.bytes);
  assert.ok(before < BOUND, `the server could write ${before} bytes`);
  let read = 0;
  for (let next; !(next = await reader.read()).done; read += next.value.length) {
    assert.equal(wrongIn(next.value, read), 0, `a piece at ${read}`);
  }
  assert.equal(read, TOTAL);
  assert.deepEqual(ended.map((args) => args.slice(-2)), [[TOTAL, undefined]]);
});

const FRAMED: Record<string, [head: string, frame: (piece: Buffer) => (Buffer | string)[], end: string]> = {
  "a length": [`Content-Length: ${PIECE.length * 16}\r\n\r\n`, (piece) => [piece], ""],
  "chunks": ["Transfer-Encoding: chunked\r\n\r\n", (piece) => ["10000\r\n", piece, "\r\n"], "0\r\n\r\n"],
  "neither": ["\r\n", (piece) => [piece], ""],
};
for (const [name, [head, frame, end]] of Object.entries(FRAMED)) {
  test(`a slow reader gets all of a body with ${name}, though the server has closed the connection`, async () => {
    const { server } = await scripted(({ socket }) => {
      socket.write(OK + head);
      for (let i = 0; i < 16; i++) for (const part of frame(PIECE)) socket.write(part);
      socket.end(end);
    });
    const { response, ended } = ask(createWire(), server);
    const reader = (await response).body!.getReader();
    await sleep(300);
    let read = 0;
    for (let next; !(next = await reader.read()).done; read += next.value.length) {
      assert.equal(wrongIn(next.value, read), 0, `a piece at ${read}`);
      if (read % 7 === 0) await sleep(1);
    }
    assert.equal(read, PIECE.length * 16);
    assert.deepEqual(ended.map((args) => args.slice(-2)), [[read, undefined]]);
  });
}

test("a server that ends its side and reads no further ends the upload", async () => {
  const sockets: Socket[] = [];
  const listener = createServer({ allowHalfOpen: true }, (socket) => {
    sockets.push(socket);
    socket.on("error", () => {});
    socket.pause();
    socket.end();
  });
  const port = await listening(listener, []);
  after.push(() => sockets[0]?.destroy());
  const body = new ReadableStream<Uint8Array<ArrayBuffer>>({ pull: (it) => it.enqueue(new Uint8Array(PIECE)) });
  assert.equal(
    await get(createWire(), serverAt(`http://127.0.0.1:${port}`), { method: "POST", body, length: -1 }),
    "reset",
  );
});

test("a reader who has stopped reading is `client-timeout`", async () => {
  const { server, allClosed } = await scripted(({ socket }) => {
    socket.write(`${OK}Content-Length: ${TOTAL}\r\n\r\n`);
    pour(socket, { bytes: 0 });
  });
  const { response, ended } = ask(createWire(), server, { timeouts: { idle: 500 } });
  await response;
  await allClosed();
  assert.deepEqual(ended.map((args) => args.at(-1)), ["client-timeout"]);
});

for (const length of [TOTAL, -1]) {
  test(`a server that does not read stops the upload of ${length < 0 ? "unknown" : "known"} length, and then gets all of it`, async () => {
    let [pulled, received] = [0, 0];
    const body = new ReadableStream<Uint8Array<ArrayBuffer>>({
      pull(controller) {
        if (pulled === TOTAL) return controller.close();
        pulled += PIECE.length;
        controller.enqueue(new Uint8Array(PIECE));
      },
    });
    const listener = createServer((socket) => {
      socket.pause();
      socket.on("error", () => {});
      let tail = "";
      socket.on("data", (data: Buffer) => {
        received += data.length;
        tail = (tail + data.toString("latin1")).slice(-5);
        if (length < 0 ? tail === "0\r\n\r\n" : received === TOTAL + head.length) {
          socket.end(`${OK}Content-Length: 2\r\n\r\nok`);
        }
      });
      sockets.push(socket);
    });
    const sockets: Socket[] = [];
    const head = `POST / HTTP/1.1\r\nhost: a.test\r\ncontent-length: ${TOTAL}\r\n\r\n`;
    const port = await listening(listener, []);
    after.push(() => sockets[0]?.destroy());
    const { response } = ask(createWire(), serverAt(`http://127.0.0.1:${port}`), { method: "POST", body, length });
    await until("it is connected", () => sockets.length > 0);
    const before = await settled(() => pulled);
    assert.ok(before < BOUND, `${before} bytes were read from the client`);
    sockets[0]!.resume();
    assert.equal(await outcome(response), "ok");
    assert.equal(pulled, TOTAL);
    assert.ok(received >= TOTAL);
  });
}

test("a server that has stopped reading an upload is `timeout`", async () => {
  const listener = createServer((socket) => void (socket.pause(), socket.on("error", () => {}), sockets.push(socket)));
  const sockets: Socket[] = [];
  const port = await listening(listener, []);
  after.push(() => sockets[0]?.destroy());
  const body = new ReadableStream<Uint8Array<ArrayBuffer>>({ pull: (it) => it.enqueue(new Uint8Array(PIECE)) });
  const asked = { method: "POST", body, length: -1, timeouts: { idle: 500 } };
  assert.equal(await get(createWire(), serverAt(`http://127.0.0.1:${port}`), asked), "timeout");
});

// ─── Names, probes, and the end of the process ───

for (const host of ["127.0.0.1", "::1"]) {
  test(`a server on ${host} alone is reached, also as localhost where that is one of its addresses`, async () => {
    const listener = createServer();
    const lines = attend(listener, answer);
    const port = await listening(listener, lines, host);
    const known = await lookup("localhost", { all: true });
    const names = known.some(({ address }) => address === host) ? ["localhost"] : [];
    for (const name of [host.includes(":") ? `[${host}]` : host, ...names]) {
      const server = serverAt(`http://${name}:${port}`);
      assert.equal(await get(createWire(), server), `${lines.length}`);
      await createWire().connect(server, 5_000);
    }
  });
}

test("connect() tells whether somebody listens, and closes the connection", async () => {
  const { server, lines, allClosed } = await scripted(never);
  await createWire().connect(server, 20_000);
  await until("the server has seen it", () => lines.length === 1);
  await allClosed();
  assert.equal(lines[0]!.received, "");
  const listener = createServer();
  const port = await listening(listener, []);
  await new Promise((resolve) => listener.close(resolve));
  after.pop();
  await assert.rejects(createWire().connect(serverAt(`http://127.0.0.1:${port}`), 20_000));
});

test("what cannot be reached is given up after its time, and when the client leaves", async () => {
  const sockets: Socket[] = [];
  const wire = createWire({ dial: () => (sockets.push(new Socket()), sockets.at(-1)!) });
  const server = serverAt("http://192.0.2.1:80");
  await assert.rejects(wire.connect(server, 50));
  await assert.rejects(ask(wire, server, { timeouts: { connect: 50 } }).response, {
    kind: "connect-timeout",
    sent: false,
  });
  await assert.rejects(ask(wire, server, aborted()).response, { kind: "client-left", sent: false });
  assert.deepEqual(sockets.map((socket) => socket.destroyed), [true, true, true]);
});

test("the wire keeps no process running when all its connections have closed", async () => {
  const { server, lines } = await scripted(({ socket, received }) =>
    received.startsWith("GET /never")
      ? undefined
      : socket.write(`${OK}Keep-Alive: timeout=2\r\nContent-Length: 2\r\n\r\nok`)
  );
  const script = `
    const { createWire } = await import(${JSON.stringify(new URL("../lb.ts", import.meta.url).href)});
    const wire = createWire(), server = ${JSON.stringify(server)};
    const ask = (target) => wire.fetch(server.url + target, { server, method: "GET", headers: [], body: null, length: 0,
      request: { signal: new AbortController().signal }, timeouts: { connect: 9e3, response: 300, idle: 9e3 },
      inbound: (headers) => headers, ended() {} }).then((response) => response.text(), (error) => error.kind);
    await wire.connect(server, 9e3);
    console.log((await Promise.all([ask("/never"), ask("/a"), ask("/b")])).join());
  `;
  const command = { deno: ["eval", "--no-check"], bun: ["-e"], node: ["--input-type=module", "-e"] }[runtime()];
  const child = spawn(process.execPath, [...command, script], { stdio: ["ignore", "pipe", "inherit"] });
  after.push(() => void child.kill("SIGKILL"));
  let said = "";
  child.stdout.on("data", (data) => said += data);
  const code = await new Promise((resolve) => child.on("close", resolve));
  assert.deepEqual([code, said.trim()], [0, "timeout,ok,ok"]);
  await until("nothing is left at the server", () => lines.every((line) => line.closed));
});

// ─── TLS ───

// An authority, and three certificates of one key that it has signed: for the names server.test and localhost, for the
// address 127.0.0.1, and for a client. Valid from 2020 to 2120. They guard nothing.
const CA = certificate(
  "MIIBYDCCAQagAwIBAgIUZpAPuaKYLeT+Vyb/zetAASI/ACkwCgYIKoZIzj0EAwIwDTELMAkGA1UEAwwCY2EwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMA0xCzAJBgNVBAMMAmNhMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEgRJ666tUrKKPyZU/bQASbetVDppoqKLypKgr+6X7ZlMyDEd+paGnL08mBNZ+bfVu+90t8hfREQanfZO3Fgy0M6NCMEAwDwYDVR0TAQH/BAUwAwEB/zAOBgNVHQ8BAf8EBAMCAgQwHQYDVR0OBBYEFC0rqkhZ9C126dpruKtp7zCGHopKMAoGCCqGSM49BAMCA0gAMEUCICdzshFXJ3fNO6fdcLezFDbXpmMxN1CVYf2SV8axyawyAiEA7tkyjyQrgWo0oQsimlZH2iwSWpngIR6gokshHGhpcrc=",
);
const BY_NAME = certificate(
  "MIIBmjCCAUCgAwIBAgIUBmt4RItp5RTAKhmg6T07t8UZjr4wCgYIKoZIzj0EAwIwDTELMAkGA1UEAwwCY2EwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMA8xDTALBgNVBAMMBG5hbWUwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASEa768Gi9bqNrRpfQdtEAp1A1gtuHUj09FHfMi3Pr0Ah+VJMYaPhK1txEH+YenwktbFhQTrADgfs96IGWbf8LLo3oweDATBgNVHSUEDDAKBggrBgEFBQcDATAhBgNVHREEGjAYggtzZXJ2ZXIudGVzdIIJbG9jYWxob3N0MB0GA1UdDgQWBBRsm3BFA/BhcO7XMAMNSirEULtnIjAfBgNVHSMEGDAWgBQtK6pIWfQtdunaa7irae8whh6KSjAKBggqhkjOPQQDAgNIADBFAiEAqRmHUa1wgY6xdpdbJrvNRrWVgIsAm0vAbn5CQUR6LLgCIHpEHWLDYKmKcrmOVu0oXKjNHps12M2gz/WlRzpIMXs9",
);
const BY_ADDRESS = certificate(
  "MIIBhjCCASygAwIBAgIUHu8VWELwmS7vmJBS8Klkj/cg6+YwCgYIKoZIzj0EAwIwDTELMAkGA1UEAwwCY2EwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMA0xCzAJBgNVBAMMAmlwMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEhGu+vBovW6ja0aX0HbRAKdQNYLbh1I9PRR3zItz69AIflSTGGj4StbcRB/mHp8JLWxYUE6wA4H7PeiBlm3/Cy6NoMGYwEwYDVR0lBAwwCgYIKwYBBQUHAwEwDwYDVR0RBAgwBocEfwAAATAdBgNVHQ4EFgQUbJtwRQPwYXDu1zADDUoqxFC7ZyIwHwYDVR0jBBgwFoAULSuqSFn0LXbp2mu4q2nvMIYeikowCgYIKoZIzj0EAwIDSAAwRQIgT5ViHf2GIQGTDKu3ta7ko5sH5gOvXilsrpg0m9Tq2/ECIQCSnPTrRjOqr7Vmxwjy2Xb6AVzSDyoqjkSpGiTWIJRyaw==",
);
const OF_CLIENT = certificate(
  "MIIBeDCCAR+gAwIBAgIUekuwK1/qu+cuse9vY69DQaXDSHswCgYIKoZIzj0EAwIwDTELMAkGA1UEAwwCY2EwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBExDzANBgNVBAMMBmNsaWVudDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABIRrvrwaL1uo2tGl9B20QCnUDWC24dSPT0Ud8yLc+vQCH5Ukxho+ErW3EQf5h6fCS1sWFBOsAOB+z3ogZZt/wsujVzBVMBMGA1UdJQQMMAoGCCsGAQUFBwMCMB0GA1UdDgQWBBRsm3BFA/BhcO7XMAMNSirEULtnIjAfBgNVHSMEGDAWgBQtK6pIWfQtdunaa7irae8whh6KSjAKBggqhkjOPQQDAgNHADBEAiBC7mqZW2hP9y4w7g+QhoOC9GvhRFZ5z17mChe+qrGVdQIgFzB9hD0rELP+1C45lecFVXTskwp9g8aNzTFn93EdQ/M=",
);
const KEY = pem(
  "PRIVATE KEY",
  "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgxCUhJxR0woo5Scu9vFo7yDrbRDrB09NnnJ6azS4Z+CKhRANCAASEa768Gi9bqNrRpfQdtEAp1A1gtuHUj09FHfMi3Pr0Ah+VJMYaPhK1txEH+YenwktbFhQTrADgfs96IGWbf8LL",
);

function pem(kind: string, text: string): string {
  return `-----BEGIN ${kind}-----\n${text.match(/.{1,64}/g)!.join("\n")}\n-----END ${kind}-----\n`;
}
function certificate(text: string): string {
  return pem("CERTIFICATE", text);
}

/** Files for the config to name, until the test has ended. */
function files<T extends Record<string, string>>(contents: T): T {
  const folder = mkdtempSync(join(tmpdir(), "lb-tls-"));
  after.push(() => rmSync(folder, { recursive: true }));
  return Object.fromEntries(
    Object.entries(contents).map(([name, content]) => {
      writeFileSync(join(folder, name), content);
      return [name, join(folder, name)];
    }),
  ) as T;
}

/** A TLS server that says which name it was asked for, and in which protocol. */
async function secure(options: TlsOptions) {
  const listener = createTlsServer({ key: KEY, ALPNProtocols: ["h2", "http/1.1"], ...options });
  const lines: Line[] = [];
  listener.on("tlsClientError", () => {});
  listener.on("secureConnection", (socket: TLSSocket & { servername?: string | false }) => {
    const line: Line = { number: lines.length + 1, socket, received: "", requests: 0, closed: false };
    lines.push(line);
    socket.on("error", () => {});
    socket.on("close", () => line.closed = true);
    socket.on("data", () => {
      const body = `${socket.servername} ${socket.alpnProtocol}`;
      socket.write(`${OK}Content-Length: ${body.length}\r\n\r\n${body}`);
    });
  });
  return { lines, port: await listening(listener, lines) };
}

test("a certificate that no known authority has signed is refused", async () => {
  const { lines, port } = await secure({ cert: BY_ADDRESS });
  await assert.rejects(ask(createWire(), serverAt(`https://127.0.0.1:${port}`)).response, {
    kind: "connect",
    sent: false,
  });
  await until("it is closed", () => lines.every((line) => line.closed));
});

test("`ca` names the authority; requests go by HTTP/1.1 and the connection is used again", async () => {
  const { lines, port } = await secure({ cert: BY_ADDRESS });
  const wire = createWire();
  const server = serverAt(`https://127.0.0.1:${port}`, files({ ca: CA }));
  for (const _ of [1, 2]) assert.match(await get(wire, server), /^(false|undefined|null|) http\/1.1$/);
  assert.equal(lines.length, 1);
});

test("a server is asked for by its name, and its certificate has to be for that name", async () => {
  const { port } = await secure({ cert: BY_NAME });
  const { ca } = files({ ca: CA });
  assert.equal(await get(createWire(), serverAt(`https://localhost:${port}`, { ca })), "localhost http/1.1");
  assert.equal(await get(createWire(), serverAt(`https://127.0.0.1:${port}`, { ca })), "connect");
  assert.equal(
    await get(createWire(), serverAt(`https://localhost:${port}`, { ca, servername: "other.test" })),
    "connect",
  );
});

test("`servername` is asked for and verified in place of the host", async () => {
  const { port } = await secure({ cert: BY_NAME });
  const tls = { ...files({ ca: CA }), servername: "server.test" };
  for (const host of ["127.0.0.1", "localhost"]) {
    assert.equal(await get(createWire(), serverAt(`https://${host}:${port}`, tls)), "server.test http/1.1");
  }
});

test("`insecure` takes any certificate", async () => {
  const { port } = await secure({ cert: BY_NAME });
  assert.match(await get(createWire(), serverAt(`https://127.0.0.1:${port}`, { insecure: true })), / http\/1.1$/);
});

test("`cert` and `key` are shown to a server that asks for them", async () => {
  const { port } = await secure({ cert: BY_ADDRESS, ca: CA, requestCert: true, rejectUnauthorized: true });
  const own = files({ ca: CA, cert: OF_CLIENT, key: KEY });
  const url = `https://127.0.0.1:${port}`;
  assert.match(await get(createWire(), serverAt(url, own)), / http\/1.1$/);
  assert.match(await get(createWire(), serverAt(url, { ca: own.ca })), /^(connect|reset)$/);
});

test("a TLS server that cannot be spoken to is `connect`: no such file, no certificate in it, no TLS there", async () => {
  const { port } = await secure({ cert: BY_ADDRESS });
  for (const ca of ["/nowhere/ca.pem", files({ ca: "nothing" }).ca]) {
    assert.equal(await get(createWire(), serverAt(`https://127.0.0.1:${port}`, { ca })), "connect");
  }
  const { server } = await scripted(never, ({ socket }) => socket.end("HTTP/1.1 400 Bad Request\r\n\r\n"));
  assert.equal(await get(createWire(), serverAt(server.url.replace("http:", "https:"), { insecure: true })), "connect");
});

test("connect() to a TLS server asks for no more than that somebody listens", async () => {
  const { server, allClosed } = await scripted(never);
  await createWire().connect(serverAt(server.url.replace("http:", "https:")), 5_000);
  await allClosed();
});

test("a large body passes through TLS both ways byte by byte", async () => {
  const listener = createTlsServer({ key: KEY, cert: BY_ADDRESS });
  let head = true;
  listener.on("secureConnection", (socket: TLSSocket) => {
    socket.on("error", () => {});
    after.push(() => socket.destroy());
    socket.on("data", (data: Buffer) => {
      if (head) socket.write(`${OK}Content-Length: ${PIECE.length * 16}\r\n\r\n`);
      socket.write(head ? data.subarray(data.indexOf("\r\n\r\n") + 4) : data);
      head = false;
    });
  });
  const port = await listening(listener, []);
  let left = 16;
  const body = new ReadableStream<Uint8Array<ArrayBuffer>>({
    pull: (it) => left-- > 0 ? it.enqueue(new Uint8Array(PIECE)) : it.close(),
  });
  const server = serverAt(`https://127.0.0.1:${port}`, files({ ca: CA }));
  const { response, ended } = ask(createWire(), server, { method: "POST", body, length: PIECE.length * 16 });
  const echoed = new Uint8Array(await (await response).arrayBuffer());
  assert.equal(echoed.length, PIECE.length * 16);
  assert.equal(wrongIn(echoed, 0), 0);
  assert.equal(ended.length, 1);
});
