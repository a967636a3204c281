// The client over real sockets: what goes out byte by byte, and which connection serves what, how long, and what ends it.
// How answers are read is in fuzz.test.ts. Every attempt is heard in one order of events, which `sendAttempt` checks.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { spawn } from "node:child_process";
import { lookup } from "node:dns/promises";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { type AddressInfo, connect, createServer, type Server as Listener, Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { createServer as createTlsServer, type TlsOptions, type TLSSocket } from "node:tls";
import { createLoadBalancer, type Failure, HttpClient, NO_BODY, parseConfig, serve, type Server } from "../../lb.ts";
import {
  assertOrder,
  rawRequest,
  runtime,
  sendAttempt,
  type Sending,
  sleep,
  test as patientTest,
  TestBody,
  TestBytes,
  until,
} from "../rig/rig.ts";
import type { Attempt, Body } from "../rig/types.ts";

const after: (() => unknown)[] = []; // what the running test has opened
const test = (name: string, body: () => Promise<void>) =>
  patientTest(name, { timeout: 60_000 }, async () => {
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

type Asked = Partial<Pick<Attempt, "method" | "target" | "lines" | "body" | "upgrade">> & {
  timeouts?: Partial<Attempt["timeouts"]>;
  /** Reads the answer's body; without that all of it is read at once. */
  read?: (body: Body) => void;
};

const ask = (client: HttpClient, server: Server, { timeouts, read, ...own }: Asked = {}): Sending =>
  sendAttempt(client, { server, body: NO_BODY, ...own }, { ...(timeouts && { timeouts }), ...(read && { read }) });

/** The body as text, or the kind of what went wrong. */
async function get(client: HttpClient, server: Server, own?: Asked): Promise<string> {
  const { failure, body } = await ask(client, server, own).outcome;
  return failure ?? body.toString("latin1");
}

/** Why there is no answer, and whether the server may have seen some of the request. */
async function failing(client: HttpClient, server: Server, own?: Asked): Promise<[Failure | undefined, boolean]> {
  const { failure, sent, status } = await ask(client, server, own).outcome;
  assert.equal(status, 0, "no head has come");
  return [failure, sent];
}

/** The answer's body as a stream, which is read as the test reads it. */
async function streamed(client: HttpClient, server: Server, own: Asked = {}) {
  const sending = ask(client, server, { ...own, read() {} }), response = await sending.head;
  return { ...sending, response, reader: response.body.stream().getReader() };
}

const bytes = (text: string) => new TestBytes(text);
const stream = (...pieces: string[]) => new TestBody(pieces, pieces.join("").length);
const chunked = (...pieces: string[]) => new TestBody(pieces, -1);
/** A body of which one piece comes, and then nothing. */
const stalled = (length: number) => new TestBody(["begin"], length, "stall");
/** A body that never ends. */
const endless = () =>
  new TestBody(
    function* () {
      for (;;) yield PIECE;
    }(),
    -1,
  );

// ─── What goes out ───

const HEAD = "/a?b=c HTTP/1.1\r\nhost: a.test\r\nX-Y: 1\r\n";
const LONG = Buffer.from(Array.from({ length: 10_000 }, (_, i) => i)).toString("latin1"); // is not written together with its head
const REQUESTS: Record<string, [asked: Asked, sent: string]> = {
  "GET": [{}, `GET ${HEAD}\r\n`],
  "HEAD": [{ method: "HEAD" }, `HEAD ${HEAD}\r\n`],
  "DELETE": [{ method: "DELETE" }, `DELETE ${HEAD}\r\n`],
  "POST without a body": [{ method: "POST" }, `POST ${HEAD}Content-Length: 0\r\n\r\n`],
  "POST of bytes": [{ method: "POST", body: bytes("hello") }, `POST ${HEAD}Content-Length: 5\r\n\r\nhello`],
  "POST of many bytes": [{ method: "POST", body: bytes(LONG) }, `POST ${HEAD}Content-Length: 10000\r\n\r\n${LONG}`],
  "PUT of no bytes": [{ method: "PUT", body: bytes("") }, `PUT ${HEAD}Content-Length: 0\r\n\r\n`],
  "GET of no bytes, which were announced": [{ body: bytes("") }, `GET ${HEAD}Content-Length: 0\r\n\r\n`],
  "GET with bytes": [{ body: bytes("hello") }, `GET ${HEAD}Content-Length: 5\r\n\r\nhello`],
  "POST of a stream": [
    { method: "POST", body: stream("he", "llo") },
    `POST ${HEAD}Content-Length: 5\r\n\r\nhello`,
  ],
  "POST of a stream of unknown length": [
    { method: "POST", body: chunked("he", "llo world!") },
    `POST ${HEAD}Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\na\r\nllo world!\r\n0\r\n\r\n`,
  ],
  "POST of a stream of large pieces": [
    { method: "POST", body: chunked(LONG, "he") },
    `POST ${HEAD}Transfer-Encoding: chunked\r\n\r\n2710\r\n${LONG}\r\n2\r\nhe\r\n0\r\n\r\n`,
  ],
  "POST of a stream with trailers": [
    { method: "POST", body: new TestBody(["he"], -1, ["X-Sum", "1", "x-sum", "\xe4"]) },
    `POST ${HEAD}Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n0\r\nX-Sum: 1\r\nx-sum: \xe4\r\n\r\n`,
  ],
  "POST of an empty stream": [
    { method: "POST", body: stream() },
    `POST ${HEAD}Content-Length: 0\r\n\r\n`,
  ],
  "POST of an empty stream of unknown length": [
    { method: "POST", body: chunked() },
    `POST ${HEAD}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n`,
  ],
  "DELETE with a stream": [
    { method: "DELETE", body: stream("hello") },
    `DELETE ${HEAD}Content-Length: 5\r\n\r\nhello`,
  ],
  "OPTIONS * and a method of its own": [
    { method: "X-Y", target: "*", lines: "" },
    `X-Y * HTTP/1.1\r\n\r\n`,
  ],
  "fields and bytes of every value": [
    { target: "/\xff", lines: "A: \xe4\xff\r\nA: \r\n" },
    `GET /\xff HTTP/1.1\r\nA: \xe4\xff\r\nA: \r\n\r\n`,
  ],
};

for (const [name, [asked, sent]] of Object.entries(REQUESTS)) {
  test(`${name} is these bytes on the wire, and no header of our own`, async () => {
    const { server, lines } = await scripted(never);
    const { outcome } = ask(new HttpClient(), server, {
      target: "/a?b=c",
      lines: "host: a.test\r\nX-Y: 1\r\n",
      ...asked,
    });
    await until("all of it is there", () => (lines[0]?.received.length ?? 0) >= sent.length);
    assert.equal(lines[0]!.received, sent);
    await answer(lines[0]!);
    assert.equal((await outcome).status, 200);
    assert.equal(lines[0]!.received, sent);
  });
}

test("an upload that breaks off ends its attempt, and the server sees the connection end before its end", async () => {
  for (const why of ["bad-body", "client-left", "body-too-large"] as const) {
    const { server, lines, allClosed } = await scripted(never);
    const body = new TestBody(["hel"], 5, why);
    assert.deepEqual(await failing(new HttpClient(), server, { method: "POST", body }), [why, true]);
    await allClosed();
    assert.equal(lines[0]!.received.split("\r\n\r\n")[1] ?? "", lines[0]!.received ? "hel" : "");
  }
});

// ─── Requests of the Fetch API: their streams keep no promise ───

/** A balancer for this server, as a library; `headers`: those that the runtime is said to have seen. */
function balancerOf(server: Server, headers: string[] = []) {
  const config = parseConfig(JSON.stringify({ log: "off", default: { servers: [server.url], health: "off" } }));
  return createLoadBalancer(config, {
    client: () => ({ address: "192.0.2.1", scheme: "http", headers }),
    report() {},
  });
}

/** A stream of these pieces, each as it is asked for. */
function webStream(...pieces: string[]): ReadableStream<Uint8Array<ArrayBuffer>> {
  const left = pieces.values();
  return new ReadableStream({
    pull(controller) {
      const { done, value } = left.next();
      if (done) controller.close();
      else controller.enqueue(Buffer.from(value));
    },
  }, { highWaterMark: 0 });
}

/** Why a POST of a stream fails; empty: it does not. `length`: as announced, if at all. */
async function post(
  server: Server,
  body: ReadableStream<Uint8Array<ArrayBuffer>>,
  length?: number,
  signal?: AbortSignal,
) {
  const headers = { host: "a.test", ...(length === undefined ? {} : { "content-length": `${length}` }) };
  const init = { method: "POST", body, duplex: "half", headers, ...(signal && { signal }) };
  const { status, headers: answered } = await balancerOf(server).fetch(new Request("http://a.test/", init));
  return [status, answered.get("x-lb-failure") ?? ""];
}

const HALF = "a".repeat(50_000); // two of them are not read before a server is asked
const MISFITS: Record<string, [pieces: string[], length: number]> = {
  "a short stream that is longer than its length": [["hel", "lo"], 4],
  "a short stream that is shorter than its length": [["hel"], 4],
  "a stream that is longer than its length": [[HALF, HALF, "b"], 100_000],
  "a stream that is shorter than its length": [[HALF], 100_000],
};
for (const [name, [pieces, length]] of Object.entries(MISFITS)) {
  test(`${name} is a bad body, and no server gets more or takes it for whole`, async () => {
    const { server, lines, allClosed } = await scripted(never);
    assert.deepEqual(await post(server, webStream(...pieces), length), [400, "bad-body"]);
    await allClosed();
    const [head = "", body = ""] = (lines[0]?.received ?? "").split("\r\n\r\n");
    if (head) assert.match(head, /\r\ncontent-length: 100000/i);
    assert.ok(pieces.join("").startsWith(body) && body.length <= length, body);
    assert.equal(lines.length, length > 65_536 ? 1 : 0);
  });
}

test("a stream passes whole, with its length and without one", async () => {
  for (const length of [undefined, 100_000]) {
    const { server, lines } = await scripted(({ socket }) => {
      setTimeout(() => socket.write(`${OK}Content-Length: 0\r\n\r\n`), 200);
    });
    assert.deepEqual(await post(server, webStream(HALF, "", HALF), length), [200, ""]);
    const body = lines[0]!.received.split("\r\n\r\n").slice(1).join("\r\n\r\n");
    const chunk = `${(50_000).toString(16)}\r\n${HALF}\r\n`;
    assert.ok(body === (length ? HALF + HALF : `${chunk}${chunk}0\r\n\r\n`), body.slice(0, 20));
  }
});

test("a stream that breaks off is a bad body, or a client that has left, and the server sees the connection end", async () => {
  for (const kind of ["bad-body", "client-left"]) {
    const leaving = new AbortController();
    const { server, lines, allClosed } = await scripted(never);
    let pieces = 0;
    const body = new ReadableStream<Uint8Array<ArrayBuffer>>({
      async pull(controller) {
        if (pieces++ === 0) return controller.enqueue(Buffer.from("hello"));
        await until("some of it is there", () => lines[0]?.received.includes("hello"));
        if (kind === "client-left") leaving.abort();
        controller.error(new Error("gone"));
      },
    });
    const [, failure] = await post(server, body, undefined, leaving.signal).catch(() => [0, "client-left"]);
    assert.equal(failure, kind);
    await allClosed();
    assert.ok(!lines[0]!.received.endsWith("0\r\n\r\n"), "its end has not come");
  }
});

test("a stream that somebody else reads is a bad body", async () => {
  const { server, lines, allClosed } = await scripted(never);
  const body = webStream("hello"),
    request = new Request("http://a.test/", {
      ...{ method: "POST", body, duplex: "half", headers: { host: "a.test" } },
    });
  request.body!.getReader();
  const response = await balancerOf(server).fetch(request);
  assert.equal(response.headers.get("x-lb-failure"), "bad-body");
  await allClosed();
  assert.equal(lines.length, 0);
});

test("no field that could begin another line or request gets out", async () => {
  const { server, lines } = await scripted(answer);
  const bad = ["\r", "\n", "\0", "\u010d\u010a", "\u{1f600}", "\r\nX: y"];
  const fields = bad.map((char) => ["a", `b${char}c`]);
  for (const char of [...bad, " ", ":", "\t", "\xe4"]) fields.push([`a${char}`, "b"]);
  fields.push(["", "a"]);
  for (const field of fields) {
    const request = new Request("http://a.test/", { headers: { host: "a.test" } });
    const response = await balancerOf(server, ["Host", "a.test", ...field]).fetch(request);
    assert.deepEqual(
      [response.status, response.headers.get("x-lb-failure")],
      [400, "bad-request"],
      JSON.stringify(field),
    );
  }
  assert.equal(lines.length, 0, "not even a connection");
});

// ─── Connections ───

test("connections are used again, the newest first", async () => {
  const waiting: Line[] = [];
  const { server, lines } = await scripted((line) => void waiting.push(line));
  const client = new HttpClient();
  const done: string[] = [];
  for (const _ of [1, 2, 3]) void get(client, server).then((number) => done.push(number));
  await until("three requests are there", () => waiting.length === 3);
  for (const number of [3, 1, 2]) { // the second becomes idle last
    answer(lines[number - 1]!);
    await until("it is answered", () => done.includes(`${number}`));
  }
  for (const expected of ["2", "2"]) {
    const next = get(client, server);
    await until("it is there", () => waiting.length > 3);
    answer(waiting.pop()!);
    assert.equal(await next, expected);
  }
  assert.equal(lines.length, 3);
});

test("another server gets a connection of its own", async () => {
  const [one, other] = [await scripted(answer), await scripted(answer)];
  const client = new HttpClient();
  await get(client, one.server);
  await get(client, other.server);
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
    const client = new HttpClient({ now: () => clock });
    await get(client, server);
    clock += milliseconds - 1;
    await get(client, server);
    assert.equal(lines.length, 1, "used again just before");
    clock += milliseconds;
    await get(client, server);
    assert.equal(lines.length, 2, "not used again, also where it could not be closed yet");
    clock += milliseconds;
    await allClosed();
  });
}

test("a connection that is a minute old is not used again", async () => {
  const { server, lines } = await scripted(answer);
  let clock = 0;
  const client = new HttpClient({ now: () => clock });
  const served: string[] = [];
  for (; clock <= 120_000; clock += 3_000) served.push(await get(client, server));
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
    ["PUT", { method: "PUT", body: bytes("hello") }],
  ];
  for (const [method, asked] of retried) {
    test(`${method} is sent again on a fresh connection when an idle one is ${name} under our feet`, async () => {
      const { server, lines } = await scripted(onSecond);
      const client = new HttpClient();
      assert.equal(await get(client, server), "1");
      const { outcome, order } = ask(client, server, asked);
      assert.equal((await outcome).body.toString(), "2");
      assert.deepEqual(order, ["sent", "sent again", "head", "body", "end"]);
      assert.deepEqual(lines.map((line) => line.requests), [2, 1]);
    });
  }
  const once: [string, Asked][] = [
    ["POST", { method: "POST", body: bytes("hello") }],
    ["POST without a body", { method: "POST" }],
    ["PUT of a stream", { method: "PUT", body: stream("hello") }],
    ["PATCH", { method: "PATCH" }],
  ];
  for (const [method, asked] of once) {
    test(`${method} is never sent twice when an idle connection is ${name} under our feet`, async () => {
      const { server, lines } = await scripted(onSecond);
      const client = new HttpClient();
      assert.equal(await get(client, server), "1");
      assert.deepEqual(await failing(client, server, asked), ["reset", true]);
      assert.deepEqual(lines.map((line) => line.requests), [2]);
    });
  }
}

test("a server that closes every connection is asked once more and not for ever", async () => {
  const { server, lines } = await scripted((line) =>
    line.number === 1 && line.requests === 1 ? answer(line) : line.socket.destroy()
  );
  const client = new HttpClient();
  assert.equal(await get(client, server), "1");
  assert.equal(await get(client, server), "reset");
  assert.deepEqual(lines.map((line) => line.requests), [2, 1]);
});

test("GET is not sent again when some of an answer has come", async () => {
  const { server, lines } = await scripted((line) =>
    line.requests === 1 ? answer(line) : line.socket.end("HTTP/1.1 100 Continue\r\n\r\n")
  );
  const client = new HttpClient();
  assert.equal(await get(client, server), "1");
  assert.equal(await get(client, server), "reset");
  assert.equal(lines.length, 1);
});

test("an idle connection that the server has closed is not used", async () => {
  const { server, lines, allClosed } = await scripted((line) => {
    answer(line);
    line.socket.end();
  });
  const client = new HttpClient();
  assert.equal(await get(client, server), "1");
  await allClosed();
  await sleep(50);
  assert.equal(await get(client, server, { method: "POST" }), "2");
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
  const client = new HttpClient({ now: () => clock });
  for (const round of [0, 1, 2]) {
    const names = Array.from({ length: 100 }, (_, i) => `${i + 1_000 * round}`);
    const answers = await Promise.all(names.map((name) => get(client, server, { target: `/${name}` })));
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
  for (const url of [`http://127.0.0.1:${port}`, "http://nowhere.invalid:80"]) {
    assert.deepEqual(await failing(new HttpClient(), serverAt(url)), ["connect", false]);
  }
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
/** The client leaves after a while. */
const leave = ({ attempt }: Sending) => void setTimeout(() => attempt.carrier?.cancel("client-left"), 200);
/** How an attempt ends when somebody falls silent or leaves. */
const ENDINGS: Record<string, [kind: Failure, server: Script, asked: () => Asked, then?: (sending: Sending) => void]> =
  {
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
      () => ({ method: "POST", body: stalled(100), timeouts: { idle: 300 } }),
    ],
    "a client that leaves before the answer": ["client-left", never, () => ({}), leave],
    "a client that leaves in the answer": ["client-left", ({ socket }) => socket.write(started), () => ({}), leave],
    "a client that leaves in its upload": [
      "client-left",
      never,
      () => ({ method: "POST", body: stalled(100) }),
      leave,
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
for (const [name, [kind, script, asked, then]] of Object.entries(ENDINGS)) {
  test(`${name} is \`${kind}\`, and the connection is closed`, async () => {
    const { server, lines, allClosed } = await scripted(script);
    const own = asked(), sending = ask(new HttpClient(), server, own);
    then?.(sending);
    const { failure, sent, status, body } = await sending.outcome;
    assert.deepEqual([failure, sent], [kind, true]);
    assert.match(body.toString(), status ? /^(begin|hel|hello)$/ : /^$/);
    await allClosed();
    assert.equal(lines.length, 1);
    assert.equal(own.body instanceof TestBody && own.body.cancelled, own.body instanceof TestBody && 1, "its upload");
    await sleep(50);
    assertOrder(sending.order, false);
  });
}

test("a TLS server that never shakes hands is `connect-timeout`, and the connection is closed", async () => {
  const { server, lines, allClosed } = await scripted(never);
  const secure = serverAt(server.url.replace("http:", "https:"), { insecure: true });
  assert.deepEqual(await failing(new HttpClient(), secure, { timeouts: { connect: 300 } }), ["connect-timeout", false]);
  assert.equal(lines.length, 1);
  await allClosed();
});

test("a body that comes slowly but steadily is not cut off", async () => {
  const { server } = await scripted((line) => {
    line.socket.write(`${OK}Content-Length: 20\r\n\r\n`);
    drip("steady ".repeat(3).slice(0, 20), 100)(line);
  });
  assert.equal(
    await get(new HttpClient(), server, { timeouts: { idle: 1_500, response: 1_500 } }),
    "steady steady steady",
  );
});

test("a reader that leaves closes the connection at once", async () => {
  const { server, allClosed } = await scripted(({ socket }) => socket.write(started));
  const { reader, outcome, attempt } = await streamed(new HttpClient(), server);
  await reader.cancel();
  await allClosed();
  assert.deepEqual([attempt.received, (await outcome).failure], [5, "client-left"]);
});

test("an early answer reaches the client while its upload goes on, and ends the upload", async () => {
  const { server, lines, allClosed } = await scripted(({ socket }) =>
    socket.write("HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
  );
  const client = new HttpClient(), body = stalled(1e9);
  const { status, reason, body: answered } = await ask(client, server, { method: "POST", body }).outcome;
  assert.deepEqual([status, reason, answered.toString()], [413, "Too Large", "big"]);
  assert.equal(body.cancelled, 1);
  assert.equal(await get(client, server), "big");
  assert.equal(lines.length, 2, "the rest of an upload would be taken for a request");
  lines[1]!.socket.end();
  await allClosed();
});

test("an answer that streams while the request still does is passed on both ways", async () => {
  const body = new TestBody(["one", "two"], 6);
  body.steps = 1;
  const { server, lines } = await scripted(({ socket }) => socket.write(`${OK}Content-Length: 6\r\n\r\none`));
  const { reader, outcome } = await streamed(new HttpClient(), server, { method: "POST", body });
  assert.equal(Buffer.from((await reader.read()).value!).toString(), "one");
  assert.ok(lines[0]!.received.endsWith("one"));
  body.step();
  body.step();
  await until("the rest of the request", () => lines[0]!.received.endsWith("onetwo"));
  lines[0]!.socket.write("two");
  assert.equal(Buffer.from((await reader.read()).value!).toString(), "two");
  assert.equal((await reader.read()).done, true);
  assert.equal((await outcome).failure, undefined);
});

test("interim answers are heard in order, before the head, and 100 is not: nobody has asked for it", async () => {
  const { server, lines } = await scripted(async ({ socket }) => {
    socket.write("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early  Hints\r\nLink: </a>\r\nlink: </b>\r\n\r\n");
    socket.write("HTTP/1.1 102 Pro");
    await sleep(50);
    socket.write("cessing\r\n\r\n");
    await sleep(50);
    socket.write(`${OK}Content-Length: 2\r\n\r\nok`);
  });
  const client = new HttpClient(), sending = ask(client, server);
  await until("the first ones are here", () => sending.informs.length > 0);
  assert.deepEqual(sending.order, ["sent"]);
  assert.equal((await sending.outcome).body.toString(), "ok");
  assert.deepEqual(sending.informs, [
    [103, "Early  Hints", ["Link", "</a>", "link", "</b>"]],
    [102, "Processing", []],
  ]);
  assert.equal(await get(client, server), "ok");
  assert.equal(lines.length, 1, "the connection is used again");
});

test("trailers pass both ways, in their spelling and order", async () => {
  const { server, lines } = await scripted(async (line) => {
    const { socket } = line;
    await until("all of it is there", () => line.received.endsWith("0\r\nX-Up: 1\r\nx-up: 2\r\n\r\n"));
    socket.write(`${OK}Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Down: a\r\n`);
    await sleep(50);
    socket.write("x-down:  \xe4 \r\nContent-Length: 7\r\nTransfer-Encoding: x\r\n\r\n", "latin1");
  });
  const client = new HttpClient();
  for (const _ of [1, 2]) {
    const body = new TestBody(["a", "b"], -1, ["X-Up", "1", "x-up", "2"]);
    const { body: answered, trailers } = await ask(client, server, { method: "POST", body }).outcome;
    assert.deepEqual([answered.toString(), trailers], ["ok", ["X-Down", "a", "x-down", "\xe4"]]);
  }
  assert.equal(lines.length, 1, "the connection is used again");
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
  const { reader, attempt, order, outcome } = await streamed(new HttpClient(), server);
  const before = await settled(() => written.bytes);
  assert.ok(before < BOUND, `the server could write ${before} bytes`);
  let read = 0;
  for (let next; !(next = await reader.read()).done; read += next.value.length) {
    assert.equal(wrongIn(next.value, read), 0, `a piece at ${read}`);
  }
  assert.equal(read, TOTAL);
  assert.deepEqual([attempt.received, (await outcome).failure, order], [TOTAL, undefined, ["sent", "head", "end"]]);
});

const WINDOW = 256 * 1024; // what waits for a reader
const READ = runtime() === "bun" ? 524_288 : 65_536; // what the runtime reads from a socket at once
/** Readers that have stopped, after how many bytes, and how much may have been taken for them meanwhile. */
const STOPPED: Record<string, [stopsAt: number, most: number]> = {
  "has not begun": [-1, WINDOW],
  "has paused at once": [0, 0],
  "has paused in the middle": [1_000_000, 0],
};
for (const [name, [stopsAt, most]] of Object.entries(STOPPED)) {
  for (const framing of ["length", "chunks"]) {
    test(`behind a reader who ${name} no more than 256 KiB and one read wait, and then all of it comes, framing: ${framing}`, async () => {
      const { server } = await scripted(({ socket }) => {
        const chunks = framing === "chunks";
        socket.write(OK + (chunks ? "Transfer-Encoding: chunked\r\n\r\n" : `Content-Length: ${TOTAL / 4}\r\n\r\n`));
        for (let written = 0; written < TOTAL / 4; written += PIECE.length) {
          if (chunks) socket.write("10000\r\n");
          socket.write(PIECE);
          if (chunks) socket.write("\r\n");
        }
        if (chunks) socket.write("0\r\n\r\n");
      });
      let passed = 0, wrong = 0, ended = false, body: Body | undefined;
      const reader = {
        data(piece: Buffer<ArrayBuffer>) {
          wrong += wrongIn(piece, passed);
          passed += piece.length;
          if (stopsAt > 0 && passed >= stopsAt && passed - piece.length < stopsAt) body!.pause();
        },
        end: () => void (ended = true),
        fail() {},
      };
      const { attempt, outcome } = ask(new HttpClient(), server, {
        read(given) {
          body = given;
          if (stopsAt >= 0) body.read(reader);
          if (stopsAt === 0) body.pause();
        },
      });
      await settled(() => attempt.received + 1);
      const waiting = attempt.received - passed, before = passed;
      if (stopsAt < 0) body!.read(reader);
      else body!.resume();
      await outcome;
      await until("all has come", () => ended);
      assert.ok(before >= stopsAt && before <= Math.max(0, stopsAt) + READ, `${before} bytes came before`);
      assert.ok(waiting <= most + READ, `${waiting} bytes waited`);
      assert.deepEqual([passed, attempt.received, wrong], [TOTAL / 4, TOTAL / 4, 0]);
    });
  }
}

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
    const { reader, attempt, outcome } = await streamed(new HttpClient(), server);
    await sleep(300);
    let read = 0;
    for (let next; !(next = await reader.read()).done; read += next.value.length) {
      assert.equal(wrongIn(next.value, read), 0, `a piece at ${read}`);
      if (read % 7 === 0) await sleep(1);
    }
    assert.equal(read, PIECE.length * 16);
    assert.deepEqual([attempt.received, (await outcome).failure], [read, undefined]);
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
  const asked = { method: "POST", body: endless() };
  assert.equal(await get(new HttpClient(), serverAt(`http://127.0.0.1:${port}`), asked), "reset");
  assert.equal(asked.body.cancelled, 1);
});

test("a reader who has stopped reading is `client-timeout`", async () => {
  const { server, allClosed } = await scripted(({ socket }) => {
    socket.write(`${OK}Content-Length: ${TOTAL}\r\n\r\n`);
    pour(socket, { bytes: 0 });
  });
  const { reader, outcome } = await streamed(new HttpClient(), server, { timeouts: { idle: 500 } });
  await allClosed();
  assert.equal((await outcome).failure, "client-timeout");
  await assert.rejects(reader.read(), { kind: "client-timeout" });
});

for (const length of [TOTAL, -1]) {
  test(`a server that does not read stops the upload of ${length < 0 ? "unknown" : "known"} length, and then gets all of it`, async () => {
    let received = 0;
    const body = new TestBody(Array(TOTAL / PIECE.length).fill(PIECE), length);
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
    const head = `POST / HTTP/1.1\r\nhost: a.test\r\nContent-Length: ${TOTAL}\r\n\r\n`;
    const port = await listening(listener, []);
    after.push(() => sockets[0]?.destroy());
    const { attempt, outcome } = ask(new HttpClient(), serverAt(`http://127.0.0.1:${port}`), { method: "POST", body });
    await until("it is connected", () => sockets.length > 0);
    const before = await settled(() => body.taken);
    assert.ok(before < BOUND, `${before} bytes were read from the client`);
    assert.equal(body.paused, true);
    sockets[0]!.resume();
    assert.equal((await outcome).body.toString(), "ok");
    assert.deepEqual([body.taken, attempt.uploaded], [TOTAL, TOTAL]);
    assert.ok(received >= TOTAL);
  });
}

test("a server that has stopped reading an upload is `timeout`", async () => {
  const listener = createServer((socket) => void (socket.pause(), socket.on("error", () => {}), sockets.push(socket)));
  const sockets: Socket[] = [];
  const port = await listening(listener, []);
  after.push(() => sockets[0]?.destroy());
  const asked = { method: "POST", body: endless(), timeouts: { idle: 500 } };
  assert.equal(await get(new HttpClient(), serverAt(`http://127.0.0.1:${port}`), asked), "timeout");
});

/** How a server refuses an upload that it does not read. */
const REFUSALS: Record<string, Script> = {
  "closes the connection": ({ socket }) => void socket.write(TOO_LARGE, () => socket.destroy()),
  "ends it and closes it later": ({ socket }) =>
    void socket.end(TOO_LARGE, () => setTimeout(() => socket.destroy(), 50)),
};
const TOO_LARGE = "HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig";
for (const [name, refuse] of Object.entries(REFUSALS)) {
  for (const length of [TOTAL, -1]) {
    test(`an early answer is heard though the server ${name} with the upload unread, length: ${length}`, async () => {
      const client = new HttpClient();
      for (let round = 0; round < 10; round++) {
        const { server, allClosed } = await scripted((line) => {
          line.socket.pause();
          setTimeout(() => refuse(line), 5 * round); // while both buffers fill
        });
        const body = new TestBody(Array(TOTAL / PIECE.length).fill(PIECE), length);
        const { status, body: answered, failure, detail } = await ask(client, server, { method: "POST", body }).outcome;
        assert.deepEqual([status, answered.toString(), failure], [413, "big", undefined], `${round}: ${detail}`);
        assert.equal(body.cancelled, 1);
        assert.ok(body.taken < TOTAL, "the rest of it is not read");
        await allClosed();
      }
    });
  }
}

test("an early answer is heard though a write has failed before it could be read", async () => {
  for (const length of [TOTAL, -1]) {
    const body = new TestBody(Array(TOTAL / PIECE.length).fill(PIECE), length);
    const { server } = await scripted(({ socket }) => {
      socket.pause();
      socket.on("close", () => { // the reset is here, and nothing has been read since
        body.step();
        body.step();
      });
      socket.write(TOO_LARGE, () => socket.destroy());
    });
    body.steps = 2;
    const { status, body: answered, failure, detail } = await ask(new HttpClient(), server, { method: "POST", body })
      .outcome;
    assert.deepEqual([status, answered.toString(), failure], [413, "big", undefined], detail);
  }
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
      assert.equal(await get(new HttpClient(), server), `${lines.length}`);
      await new HttpClient().connect(server, 5_000);
    }
  });
}

test("connect() tells whether somebody listens, and closes the connection", async () => {
  const { server, lines, allClosed } = await scripted(never);
  await new HttpClient().connect(server, 20_000);
  await until("the server has seen it", () => lines.length === 1);
  await allClosed();
  assert.equal(lines[0]!.received, "");
  const listener = createServer();
  const port = await listening(listener, []);
  await new Promise((resolve) => listener.close(resolve));
  after.pop();
  await assert.rejects(new HttpClient().connect(serverAt(`http://127.0.0.1:${port}`), 20_000));
});

test("what cannot be reached is given up after its time, and when the client leaves", async () => {
  const sockets: Socket[] = [];
  const client = new HttpClient({ dial: () => (sockets.push(new Socket()), sockets.at(-1)!) });
  const server = serverAt("http://192.0.2.1:80");
  await assert.rejects(client.connect(server, 50));
  assert.deepEqual(await failing(client, server, { timeouts: { connect: 50 } }), ["connect-timeout", false]);
  const leaving = ask(client, server);
  leave(leaving);
  const { failure, sent } = await leaving.outcome;
  assert.deepEqual([failure, sent, leaving.order], ["client-left", false, ["end"]]);
  assert.deepEqual(sockets.map((socket) => socket.destroyed), [true, true, true]);
});

test("a client keeps no process running when all its connections have closed", async () => {
  const { server, lines } = await scripted(({ socket, received }) =>
    received.startsWith("GET /never")
      ? undefined
      : socket.write(`${OK}Keep-Alive: timeout=2\r\nContent-Length: 2\r\n\r\nok`)
  );
  const script = `
    const { HttpClient, NO_BODY } = await import(${JSON.stringify(new URL("../../lb.ts", import.meta.url).href)});
    const client = new HttpClient(), server = ${JSON.stringify(server)};
    const ask = (target) => new Promise((resolve) => {
      let text = "";
      client.send({ server, method: "GET", target, lines: "", body: NO_BODY, upgrade: "", tunnels: new Set(),
        timeouts: { connect: 9e3, response: 300, idle: 9e3, request: Infinity }, startedAt: client.now(), connectedAt: 0,
        uploaded: 0, received: 0, carrier: undefined,
        onInform() {},
        onHead: ({ body }) => body.read({ data: (bytes) => text += bytes, end() {}, fail() {} }),
        onEnd: (failure) => resolve(failure ?? text) });
    });
    await client.connect(server, 9e3);
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
  assert.deepEqual(await failing(new HttpClient(), serverAt(`https://127.0.0.1:${port}`)), ["connect", false]);
  await until("it is closed", () => lines.every((line) => line.closed));
});

test("`ca` names the authority; requests go by HTTP/1.1 and the connection is used again", async () => {
  const { lines, port } = await secure({ cert: BY_ADDRESS });
  const client = new HttpClient();
  const server = serverAt(`https://127.0.0.1:${port}`, files({ ca: CA }));
  for (const _ of [1, 2]) assert.match(await get(client, server), /^(false|undefined|null|) http\/1.1$/);
  assert.equal(lines.length, 1);
});

test("a server is asked for by its name, and its certificate has to be for that name", async () => {
  const { port } = await secure({ cert: BY_NAME });
  const { ca } = files({ ca: CA });
  assert.equal(await get(new HttpClient(), serverAt(`https://localhost:${port}`, { ca })), "localhost http/1.1");
  assert.equal(await get(new HttpClient(), serverAt(`https://127.0.0.1:${port}`, { ca })), "connect");
  assert.equal(
    await get(new HttpClient(), serverAt(`https://localhost:${port}`, { ca, servername: "other.test" })),
    "connect",
  );
});

test("`servername` is asked for and verified in place of the host", async () => {
  const { port } = await secure({ cert: BY_NAME });
  const tls = { ...files({ ca: CA }), servername: "server.test" };
  for (const host of ["127.0.0.1", "localhost"]) {
    assert.equal(await get(new HttpClient(), serverAt(`https://${host}:${port}`, tls)), "server.test http/1.1");
  }
});

test("`insecure` takes any certificate", async () => {
  const { port } = await secure({ cert: BY_NAME });
  assert.match(await get(new HttpClient(), serverAt(`https://127.0.0.1:${port}`, { insecure: true })), / http\/1.1$/);
});

test("`cert` and `key` are shown to a server that asks for them", async () => {
  const { port } = await secure({ cert: BY_ADDRESS, ca: CA, requestCert: true, rejectUnauthorized: true });
  const own = files({ ca: CA, cert: OF_CLIENT, key: KEY });
  const url = `https://127.0.0.1:${port}`;
  assert.match(await get(new HttpClient(), serverAt(url, own)), / http\/1.1$/);
  assert.match(await get(new HttpClient(), serverAt(url, { ca: own.ca })), /^(connect|reset)$/);
});

test("a TLS server that cannot be spoken to is `connect`: no such file, no certificate in it, no TLS there", async () => {
  const { port } = await secure({ cert: BY_ADDRESS });
  for (const ca of ["/nowhere/ca.pem", files({ ca: "nothing" }).ca]) {
    assert.equal(await get(new HttpClient(), serverAt(`https://127.0.0.1:${port}`, { ca })), "connect");
  }
  const { server } = await scripted(never, ({ socket }) => socket.end("HTTP/1.1 400 Bad Request\r\n\r\n"));
  assert.equal(
    await get(new HttpClient(), serverAt(server.url.replace("http:", "https:"), { insecure: true })),
    "connect",
  );
});

test("connect() to a TLS server asks for no more than that somebody listens", async () => {
  const { server, allClosed } = await scripted(never);
  await new HttpClient().connect(serverAt(server.url.replace("http:", "https:")), 5_000);
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
  const body = new TestBody(Array(16).fill(PIECE), PIECE.length * 16);
  const server = serverAt(`https://127.0.0.1:${port}`, files({ ca: CA }));
  const { body: echoed } = await ask(new HttpClient(), server, { method: "POST", body }).outcome;
  assert.equal(echoed.length, PIECE.length * 16);
  assert.equal(wrongIn(echoed, 0), 0);
});

/** A TLS server that runs a script for each head that has come. */
async function scriptedTls(onRequest: Script): Promise<Server> {
  const listener = createTlsServer({ key: KEY, cert: BY_ADDRESS });
  const lines: Line[] = [];
  listener.on("tlsClientError", () => {});
  listener.on("secureConnection", (socket: TLSSocket) => {
    const line: Line = { number: lines.length + 1, socket, received: "", requests: 0, closed: false };
    lines.push(line);
    socket.on("error", () => {});
    socket.on("close", () => line.closed = true);
    socket.on("data", (data: Buffer) => {
      line.received += data.toString("latin1");
      if (line.requests++ === 0) onRequest(line);
    });
  });
  return serverAt(`https://127.0.0.1:${await listening(listener, lines)}`, files({ ca: CA }));
}

test("over TLS too a reader who does not read stops the server, and then gets all of it", async () => {
  const written = { bytes: 0 };
  const server = await scriptedTls(({ socket }) => {
    socket.write(`${OK}Content-Length: ${TOTAL}\r\n\r\n`);
    pour(socket, written);
  });
  const { reader, attempt, outcome } = await streamed(new HttpClient(), server);
  const before = await settled(() => written.bytes);
  assert.ok(before < BOUND, `the server could write ${before} bytes`);
  let read = 0;
  for (let next; !(next = await reader.read()).done; read += next.value.length) {
    assert.equal(wrongIn(next.value, read), 0, `a piece at ${read}`);
  }
  assert.deepEqual([read, attempt.received, (await outcome).failure], [TOTAL, TOTAL, undefined]);
});

test("over TLS too an early answer is heard though a write has failed before it could be read", async () => {
  const body = new TestBody(Array(TOTAL / PIECE.length).fill(PIECE), -1);
  body.steps = 2;
  const server = await scriptedTls(({ socket }) => {
    socket.pause();
    socket.on("close", () => {
      for (let i = 0; i < 4; i++) body.step();
    });
    socket.write(TOO_LARGE, () => socket.destroy());
  });
  const { status, body: answered, failure, detail } = await ask(new HttpClient(), server, { method: "POST", body })
    .outcome;
  assert.deepEqual([status, answered.toString(), failure], [413, "big", undefined], detail);
});

// ─── Both sides: a client, the balancer, a server ───

/** Where a balancer for this server listens. */
async function balanced(server: Server, more: Record<string, unknown> = {}): Promise<number> {
  const service = { servers: [server.url], health: "off", retries: 0, ...more };
  const lb = createLoadBalancer(parseConfig(JSON.stringify({ log: "off", default: service })), { report() {} });
  const listener = await serve(lb, { port: 0, hostname: "127.0.0.1" });
  after.push(async () => {
    await until("nothing is in flight when all is over", () => lb.balancer.inFlight === 0);
    await listener.close();
  });
  return Number(/\d+$/.exec(listener.address)![0]);
}

/** A client that writes as fast as it is taken, and reads only when it is told to. */
function slowClient(port: number, head: string) {
  const socket = connect(port, "127.0.0.1");
  socket.on("error", () => {});
  socket.pause();
  socket.write(head);
  after.push(() => void socket.destroy());
  return socket;
}

test("an interim 103 comes to the client in its spelling, before the answer is there; HTTP/1.0 gets none", async () => {
  const hints = "HTTP/1.1 103 Early  Hints\r\nLink: </a>; rel=preload\r\nlink: </b>\r\n\r\n";
  let go = () => {};
  const { server, lines } = await scripted(async ({ socket }) => {
    const told = new Promise<void>((resolve) => go = resolve);
    socket.write(`HTTP/1.1 100 Continue\r\n\r\n${hints}`);
    await told;
    socket.write(`HTTP/1.1 102 Processing\r\n\r\n${OK}Content-Length: 2\r\n\r\nok`);
  });
  const port = await balanced(server);
  let early = "";
  const { bytes } = await rawRequest(port, [
    "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n",
    async (socket) => {
      socket.on("data", (piece: Buffer) => early += piece.toString("latin1"));
      await until("the hints are here", () => early === hints);
      go();
    },
  ]);
  const text = bytes.toString("latin1");
  assert.ok(text.startsWith(`${hints}HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\n`), text);
  const old = rawRequest(port, "GET / HTTP/1.0\r\n\r\n");
  await until("it is asked", () => lines.reduce((sum, { requests }) => sum + requests, 0) === 2);
  await sleep(100);
  go();
  assert.match((await old).bytes.toString("latin1"), /^HTTP\/1\.1 200 OK\r\n/);
});

test("trailers pass from the client to the server and back, in their spelling and order", async () => {
  const { server, lines } = await scripted(async (line) => {
    await until(
      "all of it is there",
      () => line.received.endsWith("\r\n\r\n2\r\nab\r\n0\r\nX-Up: 1\r\nx-up: \xe4\r\n\r\n"),
    );
    line.socket.write(`${OK}Trailer: X-Down\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n`);
    await sleep(50);
    line.socket.write("0\r\nX-Down: a\r\nx-down:\xe4 \r\nContent-Length: 7\r\n\r\n", "latin1");
  });
  const { bytes } = await rawRequest(await balanced(server), [
    "POST / HTTP/1.1\r\nHost: a.test\r\nTE: trailers\r\nConnection: TE, close\r\nTransfer-Encoding: chunked\r\n\r\n",
    "2\r\nab\r\n0\r\nX-Up: 1\r\nHost: b.test\r\nx-up:  \xe4\r\n\r\n",
  ]);
  const text = bytes.toString("latin1");
  assert.match(text, /\r\nTrailer: X-Down\r\n/);
  assert.ok(text.endsWith("\r\n\r\n2\r\nok\r\n0\r\nX-Down: a\r\nx-down: \xe4\r\n\r\n"), text);
  assert.match(lines[0]!.received, /\r\nte: trailers\r\n/i);
});

for (const framing of ["length", "chunks"]) {
  test(`a client that uploads hears the early answer of a server that closes with the upload unread, framing: ${framing}`, async () => {
    const { server, allClosed } = await scripted((line) => {
      line.socket.pause();
      setTimeout(() => line.socket.write(TOO_LARGE, () => line.socket.destroy()), 50);
    });
    const port = await balanced(server), chunks = framing === "chunks";
    for (let round = 0; round < 3; round++) {
      const socket = slowClient(
        port,
        `POST / HTTP/1.1\r\nHost: a.test\r\n${
          chunks ? "Transfer-Encoding: chunked" : `Content-Length: ${TOTAL}`
        }\r\n\r\n`,
      );
      let heard = "", ended = false, written = 0;
      socket.on("data", (piece: Buffer) => heard += piece.toString("latin1"));
      socket.on("end", () => ended = true);
      socket.resume();
      const go = () => {
        while (!ended && written < TOTAL) {
          written += PIECE.length;
          if (chunks) socket.write("10000\r\n");
          const room = socket.write(PIECE);
          if (chunks) socket.write("\r\n");
          if (!room) return void socket.once("drain", go);
        }
      };
      go();
      await until("the connection ends", () => ended);
      assert.match(heard, /^HTTP\/1\.1 413 Too Large\r\n(?:.*\r\n)*Connection: close\r\n\r\nbig$/);
      assert.ok(written < TOTAL, "it has not sent all of it");
    }
    await allClosed();
  });
}

test("a client that does not read stops its server, and then gets all of it", async () => {
  const written = { bytes: 0 };
  const { server } = await scripted(({ socket }) => {
    socket.write(`${OK}Content-Length: ${TOTAL}\r\n\r\n`);
    pour(socket, written);
  });
  const socket = slowClient(await balanced(server), "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n");
  const before = await settled(() => written.bytes);
  assert.ok(before < BOUND, `the server could write ${before} bytes`);
  let [read, wrong, begun, ended]: [number, number, boolean, boolean] = [0, 0, false, false];
  socket.on("data", (piece: Buffer) => {
    if (!begun) piece = piece.subarray(piece.indexOf("\r\n\r\n") + 4);
    begun = true;
    wrong += wrongIn(piece, read);
    read += piece.length;
  });
  socket.on("end", () => ended = true);
  socket.resume();
  await until("it ends", () => ended, 30_000);
  assert.deepEqual([read, wrong], [TOTAL, 0]);
});

test("a server that does not read stops its client, gets all of it then, and the client is served again", async () => {
  let received = 0;
  const { server, lines } = await scripted((line) => {
    if (line.number > 1 || received >= TOTAL) return void answer(line);
    line.socket.pause();
    line.socket.removeAllListeners("data");
    received = line.received.length - line.received.indexOf("\r\n\r\n") - 4;
    line.socket.on("data", (piece: Buffer) => {
      received += piece.length;
      if (received === TOTAL || piece.toString("latin1", 0, 4) === "GET ") answer(line);
    });
  });
  const port = await balanced(server);
  const socket = slowClient(port, `POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: ${TOTAL}\r\n\r\n`);
  const written = { bytes: 0 };
  let heard = "";
  socket.on("data", (piece: Buffer) => heard += piece.toString("latin1"));
  socket.resume();
  pour(socket, written);
  const before = await settled(() => written.bytes);
  assert.ok(before < BOUND, `the client could write ${before} bytes`);
  lines[0]!.socket.resume();
  await until("it is answered", () => heard.endsWith("\r\n\r\n1"), 30_000);
  assert.equal(received, TOTAL);
  socket.write("GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n");
  await until("the next request is answered", () => heard.split("HTTP/1.1 200").length === 3);
});
