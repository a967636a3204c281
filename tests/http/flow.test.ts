// Bodies on their way through the running program, from socket to socket: readers that are slow, servers that die or
// answer early, connections that idle, and what all of that costs in memory. One program serves all tests but one, plain
// and over TLS, before a plain server and one that speaks TLS. LB_FLOW=2GiB makes the large bodies larger, and has the
// program's memory printed.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { createHash, randomBytes } from "node:crypto";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { type AddressInfo, connect, createServer, type Server, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { after, before } from "node:test";
import { connect as connectTls, createServer as createTlsServer } from "node:tls";
import { fileURLToPath } from "node:url";
import { A, CA, KEY } from "../rig/certificates.ts";
import { spawnGuarded } from "../rig/guard.ts";
import {
  answer,
  COMMAND,
  listenLocally,
  patience,
  type Program,
  rawRequest,
  runtime,
  scriptedServer,
  sleep,
  startProgram,
  test,
  until,
  value,
} from "../rig/rig.ts";

const KIB = 1024, MIB = 1024 * KIB;
const { LB_FLOW } = process.env, [, amount = "16", unit = "MiB"] = /^(\d+)(MiB|GiB)$/.exec(LB_FLOW ?? "") ?? [];
const LARGE = Number(amount) * (unit === "GiB" ? 1024 : 1) * MIB;
const LARGE_TAKES = 30_000 + LARGE / MIB * 100; // milliseconds at most
const LONG = { timeout: 60_000 + 4 * LARGE_TAKES };

// ─── Sockets ───

/** What lies below a TLS socket: Deno reads it into memory while the socket itself is paused (tried on 2.9.6). */
function socketBelow(socket: Socket): { readStop?(): void; readStart?(): void } | undefined {
  if (runtime() !== "deno" || !("encrypted" in socket)) return undefined;
  return (socket as unknown as { _handle?: { _parent?: { readStop?(): void; readStart?(): void } } })._handle?._parent;
}
function stopReading(socket: Socket): void {
  socket.pause();
  socketBelow(socket)?.readStop?.();
}
function readOn(socket: Socket): void {
  socketBelow(socket)?.readStart?.();
  socket.resume();
}

/** Writes bytes (a text is latin1) and waits until the socket takes more; false where it is over. */
async function write(socket: Socket, part: string | Buffer): Promise<boolean> {
  if (socket.destroyed) return false;
  if (socket.write(typeof part === "string" ? Buffer.from(part, "latin1") : part)) return true;
  return await new Promise((resolve) => {
    const done = () => {
      socket.off("drain", done).off("close", done);
      resolve(!socket.destroyed);
    };
    socket.on("drain", done).on("close", done);
  });
}

// ─── Messages ───

/** How the end of a body is told: by Content-Length, by chunks, or by the end of the connection. */
type Framing = "length" | "chunked" | "close";
const FRAMING_LINES: Record<Framing, (length: number) => string> = {
  length: (length) => `Content-Length: ${length}\r\n`,
  chunked: () => "Transfer-Encoding: chunked\r\n",
  close: () => "Connection: close\r\n",
};

const PIECE = randomBytes(64 * KIB);

/** Pieces of large bodies, and the hashes of whole ones: many bodies are the same. */
const PIECES = new Map<string, Buffer>(), HASHES = new Map<string, string>();
function kept<T>(map: Map<string, T>, key: string, make: () => T): T {
  const value = map.get(key) ?? make();
  map.set(key, value);
  return value;
}

/** A body that is written as fast as it is taken. Its pieces differ, so that none can be missing or come twice. */
class LargeBody {
  readonly length: number;
  readonly framing: Framing;
  readonly pieces: number; // bytes that are written at a time, and make a chunk
  written = 0; // bytes that a socket has been given
  constructor(length: number, framing: Framing, pieces = PIECE.length) {
    this.length = length;
    this.framing = framing;
    this.pieces = pieces;
  }
  /** The one at `number * pieces`, and how it is written. */
  private piece(number: number): { bytes: Buffer; coded: Buffer } {
    const size = Math.min(this.length - number * this.pieces, this.pieces);
    const kind = number % 512; // LB_FLOW may make more pieces than memory should hold
    const bytes = kept(PIECES, `${size} ${kind}`, () => {
      const made = Buffer.from(PIECE.subarray(0, size));
      if (size >= 4) made.writeUInt32LE(kind);
      return made;
    });
    if (this.framing !== "chunked") return { bytes, coded: bytes };
    const [before, after] = [Buffer.from(`${size.toString(16)}\r\n`), Buffer.from("\r\n")];
    return { bytes, coded: kept(PIECES, `${size} ${kind} chunk`, () => Buffer.concat([before, bytes, after])) };
  }
  get sha256(): string {
    return kept(HASHES, `${this.length} ${this.pieces}`, () => {
      const hash = createHash("sha256");
      for (let number = 0; number * this.pieces < this.length; number++) hash.update(this.piece(number).bytes);
      return hash.digest("hex");
    });
  }
  /** The head up to the fields that frame the body is `start`. */
  async writeTo(socket: Socket, start: string, trailers = ""): Promise<void> {
    const { length, framing } = this;
    await write(socket, `${start}${FRAMING_LINES[framing](length)}\r\n`);
    for (let number = 0; number * this.pieces < length; number++) {
      const { bytes, coded } = this.piece(number);
      this.written += bytes.length;
      if (!await write(socket, coded)) return;
    }
    if (framing === "chunked") await write(socket, `0\r\n${trailers}\r\n`);
    if (framing === "close") socket.end();
  }
}

/** A message as it comes in. Of its body only the length and the hash are kept, and how it begins. */
class Incoming {
  head = ""; // latin1; empty: not there yet
  length = 0; // bytes of its body so far
  beginning = ""; // of its body
  trailers = "";
  whole = false; // its end was where its head, or its last chunk, says
  onHead = () => {};
  onBody = () => {}; // some of it has come
  onWhole = () => {};
  private readonly hash = createHash("sha256");
  private rest: Buffer = Buffer.alloc(0);
  private framing: Framing = "length";
  private left = 0; // bytes until the end, or until the end of the chunk
  private lastChunk = false;

  get status(): number {
    return Number(this.head.split(" ")[1] ?? 0);
  }
  get path(): string {
    return this.head.split(" ")[1] ?? "";
  }
  get sha256(): string {
    return this.hash.copy().digest("hex");
  }
  field(name: string): string {
    return new RegExp(`^${name}: *(.*)$`, "im").exec(this.head)?.[1] ?? "";
  }

  push(bytes: Buffer): void {
    if (this.rest.length) bytes = Buffer.concat([this.rest, bytes]);
    this.rest = bytes;
    if (!this.head && !this.takeHead()) return;
    while (!this.whole && this.takeSome());
  }
  /** The connection has ended. */
  end(): void {
    if (this.head && this.framing === "close") this.finish();
  }

  private takeHead(): boolean {
    const end = this.rest.indexOf("\r\n\r\n");
    if (end < 0) return false;
    this.head = this.rest.toString("latin1", 0, end).replaceAll("\r", "");
    this.rest = this.rest.subarray(end + 4);
    const length = this.field("content-length"), isAnswer = this.head.startsWith("HTTP/");
    if (isAnswer && this.status < 200) { // an interim answer
      this.head = "";
      return this.takeHead();
    }
    if (/chunked/i.test(this.field("transfer-encoding"))) this.framing = "chunked";
    else if (isAnswer && !length) this.framing = "close";
    this.left = this.framing === "close" ? Infinity : Number(length);
    this.onHead();
    return true;
  }
  /** Takes a line or some of the body; false where more has to come. */
  private takeSome(): boolean {
    if (this.left === 0) return this.framing === "length" ? this.finish() : this.takeLine();
    const some = this.rest.subarray(0, this.left);
    this.rest = this.rest.subarray(some.length);
    this.hash.update(some);
    this.length += some.length;
    this.left -= some.length;
    if (this.beginning.length < 200) this.beginning += some.toString("latin1", 0, 200);
    if (some.length) this.onBody();
    return some.length > 0;
  }
  private takeLine(): boolean {
    const end = this.rest.indexOf("\r\n");
    if (end < 0) return false;
    const line = this.rest.toString("latin1", 0, end);
    this.rest = this.rest.subarray(end + 2);
    if (this.lastChunk) return line ? (this.trailers += `${line}\n`) !== "" : this.finish();
    if (line === "") return true; // behind a chunk
    assert.match(line, /^[0-9a-f]+$/i, "the size of a chunk");
    this.left = parseInt(line, 16);
    this.lastChunk = this.left === 0;
    return true;
  }
  private finish(): false {
    this.whole = true;
    this.onWhole();
    return false;
  }
}

// ─── Servers, the program and its clients ───

type Script = (socket: Socket, request: Incoming) => unknown;
/** What both servers do, by path, as soon as a request's head is there. */
const scripts: Record<string, Script> = {};
const visits = new Set<Socket>(); // connections of the program to the servers

function attend(socket: Socket): void {
  visits.add(socket);
  socket.on("close", () => visits.delete(socket));
  socket.on("error", () => {}); // `close` follows
  let request: Incoming;
  const expect = () => {
    request = new Incoming();
    request.onHead = () => scripts[request.path]?.(socket, request);
  };
  expect();
  socket.on("data", (bytes: Buffer) => {
    if (request.whole) expect();
    request.push(bytes);
  });
}

const answerWith = (text: string, fields = "") =>
  `HTTP/1.1 200 OK\r\n${fields}Content-Length: ${text.length}\r\n\r\n${text}`;
/** Answers when the request is whole, with what has come of it. */
scripts["/count"] = (socket, request) => {
  request.onWhole = () => void write(socket, answerWith(`${request.length} ${request.sha256}`));
};
scripts["/"] = (socket) => write(socket, answerWith("here"));

type Front = "http" | "https"; // what the client speaks
type Back = "http" | "https"; // what the server speaks
const BOTH = ["http", "https"] as const;
const WAYS = BOTH.flatMap((front) => BOTH.map((back) => ({ front, back })));

const servers: Record<Back, Server> = {
  http: createServer({ noDelay: true }, attend),
  https: createTlsServer({ noDelay: true, cert: A, key: KEY }, attend),
};
const portAt = (back: Back) => (servers[back].address() as AddressInfo).port;
const serverAt = (back: Back) => `127.0.0.1:${portAt(back)}`;
const LOCAL = "127.0.0.1:0", FILES = { "a.pem": A, "a.key": KEY, "ca.pem": CA };

/** http.test and https.test lead to the servers. Those below strict.test are the same, and out at the first failure. */
const config = (limits: Record<string, string> = {}, timeouts: Record<string, string> = {}) => ({
  listen: [LOCAL, { address: LOCAL, tls: { cert: "a.pem", key: "a.key" } }],
  admin: { listen: LOCAL },
  log: "off",
  limits,
  defaults: {
    health: "off",
    eject: "off",
    retries: 0,
    panic: "0%",
    tls: { ca: "ca.pem" },
    timeouts: { ...PATIENT, ...timeouts },
  },
  hosts: [
    { host: "http.test", servers: [serverAt("http")] },
    { host: "https.test", servers: [`https://${serverAt("https")}`] },
    { host: "http.strict.test", servers: [serverAt("http")], eject: STRICT },
    { host: "https.strict.test", servers: [`https://${serverAt("https")}`], eject: STRICT },
  ],
});
/** Sixteen TLS handshakes at once take more than 3 s on a busy machine. */
const PATIENT = { connect: "60s" };
const STRICT = { failures: 1, at_most: "100%" };

let lb: Program;
const ports: Record<Front, number> = { http: 0, https: 0 };

let inForce = ""; // the config
async function put(next: unknown): Promise<void> {
  if (inForce !== JSON.stringify(next)) await lb.reload(next);
  inForce = JSON.stringify(next);
}

const portOf = (output: string, scheme: Front) => {
  const port = new RegExp(`listening on ${scheme}://127\\.0\\.0\\.1:(\\d+)`).exec(output)?.[1];
  return Number(port ?? 0);
};
before(async () => {
  await Promise.all(BOTH.map((back) => listenLocally(servers[back])));
  lb = await startCollecting();
  inForce = JSON.stringify(config());
  for (const front of BOTH) ports[front] = await until(`listens for ${front}`, () => portOf(lb.output(), front));
});
after(async () => {
  await lb?.stop();
  for (const socket of visits) socket.destroy();
  for (const back of BOTH) servers[back].close();
});

/** One connection of a client, and the answer on it. */
interface Client {
  socket: Socket;
  answer: Incoming; // to the latest request
  closed: boolean; // the program has ended its side, or all of it
  send(...parts: (string | Buffer)[]): Promise<void>;
}

/** Connects, and is connected: for TLS after the handshake. */
async function open(front: Front, port = ports[front]): Promise<Client> {
  const host = "127.0.0.1";
  const socket: Socket = front === "http"
    ? connect({ host, port })
    : connectTls({ host, port, ca: CA, servername: "a.test" });
  socket.setNoDelay(true);
  const client: Client = {
    ...{ socket, answer: new Incoming(), closed: false },
    async send(...parts) {
      for (const part of parts) await write(socket, part);
    },
  };
  const over = () => {
    if (!client.closed) client.answer.end();
    client.closed = true;
  };
  socket.on("data", (bytes: Buffer) => client.answer.push(bytes));
  socket.on("end", over).on("close", () => client.closed = true);
  await new Promise<void>((resolve, reject) => {
    socket.once(front === "http" ? "connect" : "secureConnect", () => resolve());
    socket.on("error", reject).on("close", () => reject(new Error("the connection was closed")));
  });
  return client;
}

/** A whole GET, or the head of another request up to the fields that frame its body. */
const requestTo = (back: Back | `${Back}.strict`, path: string, fields = "", method = "GET", version = "1.1") =>
  `${method} ${path} HTTP/${version}\r\nHost: ${back}.test\r\n${fields}${method === "GET" ? "\r\n" : ""}`;
const CLOSE = "Connection: close\r\n";

/** What the admin says. */
const ask = async (path: string) => await (await fetch(`http://127.0.0.1:${lb.admin}${path}`)).json();
interface ServiceSeen {
  name: string;
  in_flight: number;
  servers: { failures: number; status: string; in_flight: number }[];
}

/** Nothing is in flight any more, on any level; soon. */
async function nothingInFlight(): Promise<void> {
  type Seen = { in_flight: number; entrypoints: { in_flight: number }[]; services: ServiceSeen[] };
  let counts: number[] = [];
  for (const end = Date.now() + patience(5_000); Date.now() < end; await sleep(20)) {
    const { in_flight, entrypoints, services }: Seen = await ask("/connections");
    counts = [
      in_flight,
      ...[...entrypoints, ...services, ...services.flatMap((one) => one.servers)].map((one) => one.in_flight),
    ];
    if (counts.every((count) => count === 0)) return;
  }
  assert.fail(`in flight: ${counts}`);
}

// ─── Memory ───

/**
 * Starts the program so that it collects garbage all the time. Else what has passed stays for a while, up to 600 MiB on
 * Deno (tried on 2.9.6), and nobody sees what is held beside it.
 */
async function startCollecting(): Promise<Program> {
  const folder = mkdtempSync(join(tmpdir(), "lb-")), file = join(folder, "collect.mjs"), { env } = process;
  writeFileSync(file, "setInterval(() => globalThis.Bun ? Bun.gc(true) : gc(), 500).unref();\n");
  const options = {
    NODE_OPTIONS: `--max-semi-space-size=1 --expose-gc --import=${file}`,
    DENO_V8_FLAGS: "--gc-global,--max-semi-space-size=1",
    BUN_OPTIONS: `--preload=${file}`,
  };
  const before = Object.keys(options).map((name) => [name, env[name]] as const);
  Object.assign(env, options);
  try {
    return await startProgram(config(), [], FILES);
  } finally {
    for (const [name, value] of before) value === undefined ? delete env[name] : env[name] = value;
    rmSync(folder, { recursive: true });
  }
}

/** Resident memory of a process in bytes: statm counts pages of 4 KiB. */
const residentOf = (pid: number) => Number(readFileSync(`/proc/${pid}/statm`, "utf8").split(" ")[1]) * 4 * KIB;
const inMiB = (bytes: number) => `${Math.round(bytes / MIB)} MiB`;

/** What the program's memory may grow by, whatever passes. Deno has buffers that are yet to be collected all the same. */
const GROWTH = (runtime() === "deno" ? 192 : 64) * MIB;

let isWarm = false;
/** What the runtime compiles and keeps at its first large bodies is not to be taken for that of others. */
async function warmUp(): Promise<void> {
  if (isWarm) return;
  isWarm = true;
  for (const { front, back } of WAYS) {
    const body = new LargeBody(16 * MIB, "chunked"), client = await open(front);
    await body.writeTo(client.socket, requestTo(back, "/count", CLOSE, "POST"));
    await until("it is counted", () => client.closed, 20_000);
    assert.equal(client.answer.beginning, `${body.length} ${body.sha256}`);
  }
}

interface Memory {
  /** What came on top since the beginning, now. */
  grown(): number;
  peak: number;
}

/** Looks at the program's memory as long as `use` lasts. */
async function watched(what: string, use: (memory: Memory) => Promise<void>): Promise<void> {
  await put(config());
  await warmUp();
  const start = residentOf(lb.pid);
  const memory: Memory = {
    peak: 0,
    grown() {
      const grown = residentOf(lb.pid) - start;
      memory.peak = Math.max(memory.peak, grown);
      return grown;
    },
  };
  const timer = setInterval(memory.grown, 20);
  try {
    await use(memory);
  } finally {
    clearInterval(timer);
    if (LB_FLOW) console.error(`${what}: ${inMiB(start)}, at most ${inMiB(start + memory.peak)}`);
  }
}

/** Bytes that the system holds for connections of these ports: sent and not yet taken over there, or come and not yet read. */
function heldBySystem(ports: number[]): number {
  const portIn = (address = "") => parseInt(address.split(":")[1] ?? "", 16);
  return readFileSync("/proc/net/tcp", "utf8").split("\n").slice(1).map((line) => line.trim().split(/\s+/))
    .filter(([, local, remote]) => ports.includes(portIn(local)) || ports.includes(portIn(remote)))
    .flatMap(([, , , , queues = "0:0"]) => queues.split(":").map((bytes) => parseInt(bytes, 16)))
    .reduce((sum, bytes) => sum + bytes, 0);
}

/** Bytes of bodies on their way that are neither in the system nor read: the program (or the test) has them in memory. */
function heldInMemory(bodies: { body: LargeBody; reader: Incoming }[]): number {
  const onTheirWay = bodies.reduce((sum, { body, reader }) => sum + body.written - reader.length, 0);
  return onTheirWay - heldBySystem([...Object.values(ports), ...BOTH.map(portAt)]);
}
const HELD = 4 * MIB; // of one body, by the program and by both ends in the test

/** While nothing is read, next to nothing of the bodies is in memory. */
function assertHeldBack(memory: Memory, bodies: { body: LargeBody; reader: Incoming }[]): void {
  const held = heldInMemory(bodies), grown = memory.grown();
  assert.ok(held < bodies.length * HELD, `${inMiB(held)} of ${bodies.length} bodies are in memory`);
  assert.ok(grown < 48 * MIB, `the program has grown by ${inMiB(grown)}`);
}

// ─── Many connections ───

const PER_CONNECTION = 8 * KIB;
const FEW = 500, MANY = 2_000; // the first ones warm the heap: what it has grown by is used again

async function allAsk(clients: Client[]): Promise<void> {
  for (const client of clients) client.answer = new Incoming();
  await Promise.all(clients.map((client) => client.send(requestTo("http", "/"))));
  await until("all are answered", () => clients.every(({ answer }) => answer.whole), 20_000);
}
async function openAndAsk(count: number): Promise<Client[]> {
  const clients: Client[] = [];
  while (clients.length < count) {
    const more = await Promise.all(Array.from({ length: 100 }, () => open("http")));
    clients.push(...more);
    await allAsk(more);
  }
  return clients;
}

test("a connection that has asked and idles costs at most 8 KiB; limits.keep_alive and limits.header put to 1s close what is open", async () => {
  await put(config({ header: "60s" }));
  const silent = await Promise.all([...BOTH, ...BOTH].map((front) => open(front)));
  const shaking = await open("http", ports.https); // its handshake never comes
  const some = await openAndAsk(FEW);
  const settled = async () => {
    for (let i = 0; i < 5; i++) await allAsk(some); // code is compiled, and what opening has left is collected
    await sleep(600);
    return residentOf(lb.pid);
  };
  const few = await settled(), clients = [...some, ...await openAndAsk(MANY - FEW)];
  let each = Infinity;
  for (let look = 0; look < 3 && each > PER_CONNECTION; look++) each = (await settled() - few) / (MANY - FEW);
  if (LB_FLOW) console.error(`an idle connection: ${each / KIB} KiB`);
  assert.ok(each <= PER_CONNECTION, `each costs ${each / KIB} KiB`);
  const all = [...clients, ...silent, shaking];
  assert.equal(all.filter(({ closed }) => closed).length, 0);
  await put(config({ header: "60s", keep_alive: "1s" }));
  await until("those that have asked are closed", () => clients.every(({ closed }) => closed), 5000);
  assert.equal([...silent, shaking].filter(({ closed }) => closed).length, 0);
  await put(config({ header: "1s" }));
  await until("those that have said nothing are closed", () => all.every(({ closed }) => closed), 5000);
  for (const { socket } of all) socket.destroy();
});

// ─── Slow readers ───

const STOP = 400; // milliseconds for which nothing is read

for (const { front, back } of WAYS) {
  const way = `from an ${back} server over ${front}`;
  test(
    `an answer of ${inMiB(LARGE)} ${way} waits at the server while the client reads nothing`,
    LONG,
    () =>
      watched(`an answer ${way}`, async (memory) => {
        const body = new LargeBody(LARGE, "length"), client = await open(front);
        scripts["/large"] = (socket) => body.writeTo(socket, "HTTP/1.1 200 OK\r\n");
        client.answer.onHead = () => stopReading(client.socket);
        await client.send(requestTo(back, "/large", CLOSE));
        await until("the head is there", () => client.answer.head);
        await sleep(STOP);
        assertHeldBack(memory, [{ body, reader: client.answer }]);
        readOn(client.socket);
        await until("the end is seen", () => client.closed, LARGE_TAKES);
        assert.equal(client.answer.length, LARGE);
        assert.equal(client.answer.sha256, body.sha256);
        assert.ok(memory.peak < GROWTH, `the program has grown by ${inMiB(memory.peak)}`);
        await nothingInFlight();
      }),
  );
}

for (const { front, back } of WAYS) {
  const way = `over ${front} to an ${back} server`;
  test(
    `uploads of ${inMiB(LARGE)} ${way}, by length and chunked, wait at the client while the server reads nothing`,
    LONG,
    () =>
      watched(`uploads ${way}`, async (memory) => {
        const uploads: { socket: Socket; reader: Incoming }[] = [];
        scripts["/stop"] = (socket, reader) => {
          stopReading(socket);
          uploads.push({ socket, reader });
          scripts["/count"]!(socket, reader);
        };
        const clients = await Promise.all((["length", "chunked"] as const).map(async (framing) => {
          const client = await open(front), body = new LargeBody(LARGE, framing);
          const sent = body.writeTo(client.socket, requestTo(back, "/stop", `${CLOSE}X-Is: ${framing}\r\n`, "POST"));
          return { client, body, sent };
        }));
        await until("the heads are there", () => uploads.length === 2);
        await sleep(STOP);
        const readerOf = ({ framing }: LargeBody) =>
          uploads.find(({ reader }) => reader.field("x-is") === framing)!.reader;
        assertHeldBack(memory, clients.map(({ body }) => ({ body, reader: readerOf(body) })));
        for (const { socket } of uploads) readOn(socket);
        for (const { client, body, sent } of clients) {
          await until("the end is seen", () => client.closed, 2 * LARGE_TAKES);
          await sent;
          assert.equal(client.answer.status, 200);
          assert.equal(client.answer.beginning, `${LARGE} ${body.sha256}`);
          assert.equal(readerOf(body).field("content-length"), body.framing === "length" ? `${LARGE}` : "");
        }
        assert.ok(memory.peak < GROWTH, `the program has grown by ${inMiB(memory.peak)}`);
        await nothingInFlight();
      }),
  );
}

test("readers of a byte a second hold next to nothing in memory", () =>
  watched("readers of a byte a second", async (memory) => {
    const bodies = await Promise.all([...WAYS, ...WAYS].map(async ({ front, back }, i) => {
      const body = new LargeBody(32 * MIB, i < WAYS.length ? "length" : "chunked"), client = await open(front);
      scripts[`/drip${i}`] = (socket) => body.writeTo(socket, "HTTP/1.1 200 OK\r\n");
      client.answer.onHead = () => stopReading(client.socket);
      await client.send(requestTo(back, `/drip${i}`, CLOSE));
      return { body, client, reader: client.answer };
    }));
    await until("the heads are there", () => bodies.every(({ reader }) => reader.head));
    for (let second = 0; second < 2; second++) {
      await sleep(1000);
      for (const { client } of bodies) client.socket.read(1);
    }
    assertHeldBack(memory, bodies);
    for (const { client } of bodies) client.socket.destroy();
    await nothingInFlight();
  }));

// ─── Ends, and bytes as they are ───

test("an answer without a length comes whole, and its end is seen, also behind a client that stops reading", async () => {
  const variants = WAYS.flatMap((way) =>
    [0, STOP].flatMap((stop) =>
      ["1.0", "1.1"].flatMap((version) =>
        (["close", "chunked"] as const).map((framing) => ({ ...way, stop, version, framing }))
      )
    )
  );
  await Promise.all(variants.map(async ({ front, back, stop, version, framing }, i) => {
    const name = `by ${framing} from an ${back} server over ${front} in HTTP/${version} after ${stop} ms`;
    const body = new LargeBody(4 * MIB, framing, framing === "chunked" ? 4000 : undefined); // many chunks in each packet
    const client = await open(front);
    scripts[`/end${i}`] = (socket) => body.writeTo(socket, "HTTP/1.1 200 OK\r\n");
    if (stop) client.answer.onHead = () => stopReading(client.socket);
    await client.send(requestTo(back, `/end${i}`, "", "GET", version));
    await until(`the head ${name}`, () => client.answer.head);
    await sleep(stop);
    readOn(client.socket);
    await until(`the end ${name}`, () => client.answer.whole, 20_000);
    assert.equal(client.answer.status, 200, name);
    assert.equal(client.answer.length, body.length, name);
    assert.equal(client.answer.sha256, body.sha256, name);
    assert.equal(client.answer.field("transfer-encoding"), version === "1.1" ? "chunked" : "", name);
    client.socket.destroy();
  }));
  await nothingInFlight();
});

test("an answer without a length comes whole to a client that reads only when its server has closed the connection", async () => {
  await Promise.all(WAYS.map(async ({ front, back }, i) => {
    const name = `from an ${back} server over ${front}`, client = await open(front);
    const body = new LargeBody(2 * MIB, "close"); // more than is taken into memory, less than the system takes
    let isSent = false;
    scripts[`/gone${i}`] = async (socket) => {
      await body.writeTo(socket, "HTTP/1.1 200 OK\r\n");
      socket.once("finish", () => isSent = true);
    };
    client.answer.onHead = () => stopReading(client.socket);
    await client.send(requestTo(back, `/gone${i}`, "", "GET", "1.0"));
    await until(`the server has sent all ${name}`, () => isSent && client.answer.head, 20_000);
    assert.equal(client.answer.whole, false, name);
    readOn(client.socket);
    await until(`the end ${name}`, () => client.answer.whole, 20_000);
    assert.equal(client.answer.status, 200, name);
    assert.equal(client.answer.sha256, body.sha256, name);
    client.socket.destroy();
  }));
  await nothingInFlight();
});

test("bytes above 0x7f pass as they are in heads and trailers, both ways, also right behind a large body", async () => {
  const bytes = Array.from({ length: 128 }, (_, i) => String.fromCharCode(128 + i)).join("");
  await Promise.all(WAYS.map(async ({ front, back }, i) => {
    const name = `from ${front} to ${back}`, client = await open(front), up = new LargeBody(MIB, "chunked");
    const down = new LargeBody(MIB, "chunked");
    let request: Incoming | undefined;
    scripts[`/bytes${i}`] = (socket, incoming) => {
      request = incoming;
      request.onWhole = () =>
        void down.writeTo(socket, `HTTP/1.1 200 ${bytes}\r\nX-Down: ${bytes}\r\n`, `X-Last: ${bytes}d\r\n`);
    };
    const fields = `${CLOSE.replace("close", "close, TE")}TE: trailers\r\nX-Up: ${bytes}\r\n`;
    await up.writeTo(client.socket, requestTo(back, `/bytes${i}`, fields, "POST"), `X-Last: ${bytes}u\r\n`);
    await until("the answer is whole", () => client.answer.whole, 20_000);
    assert.equal(request!.field("x-up"), bytes, name);
    assert.equal(request!.trailers, `X-Last: ${bytes}u\n`, name);
    assert.equal(request!.sha256, up.sha256, name);
    assert.equal(client.answer.head.split("\n")[0], `HTTP/1.1 200 ${bytes}`, name);
    assert.equal(client.answer.field("x-down"), bytes, name);
    assert.equal(client.answer.trailers, `X-Last: ${bytes}d\n`, name);
    assert.equal(client.answer.sha256, down.sha256, name);
    client.socket.destroy();
  }));
});

// ─── Servers that die ───

const UPLOAD = 20_000_000; // bytes; more than the system takes while nobody reads

type Death = (socket: Socket) => unknown;
const DEATHS: Record<Back, Record<string, Death>> = {
  http: { closes: (socket) => socket.end(), "is reset": (socket) => socket.resetAndDestroy() },
  https: { closes: (socket) => socket.end(), "is destroyed": (socket) => socket.destroy() },
};
/** Each way, with each death of its server. */
const deaths = () =>
  WAYS.flatMap(({ front, back }) => Object.entries(DEATHS[back]).map(([word, die]) => ({ front, back, word, die })));

test("an answer whose server dies in the middle of it is visibly cut", async () => {
  const variants = deaths().flatMap((one) =>
    (["length", "chunked", "close"] as const).map((framing) => ({ ...one, framing }))
  )
    .filter(({ framing, word }) => framing !== "close" || word === "is reset"); // else that is its end
  await Promise.all(variants.map(async ({ front, back, word, die, framing }, i) => {
    const name = `by ${framing} from an ${back} server over ${front} that ${word}`, client = await open(front);
    scripts[`/die${i}`] = async (socket) => {
      await write(socket, `HTTP/1.1 200 OK\r\n${FRAMING_LINES[framing](2 * MIB)}\r\n`);
      await write(socket, framing === "chunked" ? `100000\r\n${"x".repeat(MIB)}\r\n` : "x".repeat(MIB));
      while (client.answer.length < MIB && !client.closed) await sleep(10); // a reset throws away what has not been read
      die(socket);
    };
    await client.send(requestTo(back, `/die${i}`));
    await until(`the connection ends: ${name}`, () => client.closed);
    assert.equal(client.answer.status, 200, name);
    assert.equal(client.answer.length, MIB, name);
    assert.equal(client.answer.whole, false, name);
    client.socket.destroy();
  }));
  await nothingInFlight();
});

test("a client of HTTP/1.0 sees by a reset that an answer without a length was cut", async () => {
  const client = await open("http");
  let error = "";
  client.socket.on("error", ({ code }: Error & { code?: string }) => error = String(code));
  scripts["/reset"] = async (socket) => {
    await write(socket, `HTTP/1.1 200 OK\r\n\r\n${"x".repeat(MIB)}`);
    while (client.answer.length < MIB && !client.closed) await sleep(10);
    socket.resetAndDestroy();
  };
  await client.send(requestTo("http", "/reset", "", "GET", "1.0"));
  await until("the connection ends", () => client.closed);
  assert.equal(client.answer.status, 200);
  assert.equal(client.answer.length, MIB);
  assert.equal(client.answer.whole, false);
  assert.equal(error, "ECONNRESET");
  await nothingInFlight();
});

test("an upgraded connection that is reset on one side is reset on the other: what is cut never looks whole", async () => {
  const server = await scriptedServer((visit) =>
    visit.send("HTTP/1.1 101 Go\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
  );
  const own = await startProgram({ log: "off", default: { servers: [server.address], health: "off" } });
  try {
    for (const cut of ["client", "server"] as const) {
      const client = connect(own.port, "127.0.0.1"), errors: string[] = [];
      const note = (error: NodeJS.ErrnoException) => errors.push(error.code ?? "");
      client.on("error", note).write("GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n");
      await new Promise((resolve) => client.once("data", resolve));
      const { socket } = server.last!, [side, other] = cut === "client" ? [client, socket] : [socket, client];
      other.on("error", note);
      client.resume();
      side.resetAndDestroy();
      await until("the other side has ended", () => other.destroyed);
      assert.ok(errors.includes("ECONNRESET"), `${cut}: ${errors}`);
    }
  } finally {
    await own.stop();
    await server.close();
  }
});

test("an upload whose server dies in the middle of it is answered 502, or reset", async () => {
  const variants = deaths().flatMap((one) =>
    (["length", "chunked"] as const).flatMap((framing) => [true, false].map((reads) => ({ ...one, framing, reads })))
  );
  await Promise.all(variants.map(async ({ front, back, word, die, framing, reads }, i) => {
    const server = `an ${back} server that ${reads ? "reads" : "does not read"} and ${word}`;
    const name = `by ${framing} over ${front} to ${server}`, client = await open(front);
    let inTheMiddle = false;
    scripts[`/die${i}`] = async (socket, request) => {
      if (reads) await new Promise<void>((resolve) => request.onBody = () => void (request.length > MIB && resolve()));
      else stopReading(socket);
      if (!reads) await sleep(200); // everything stands still
      inTheMiddle = !request.whole;
      die(socket);
    };
    const body = new LargeBody(UPLOAD, framing);
    await body.writeTo(client.socket, requestTo(back, `/die${i}`, "", "POST"));
    await until(`an answer or the end: ${name}`, () => client.answer.whole || client.closed, 10_000);
    assert.ok(inTheMiddle, name);
    if (client.answer.head) {
      assert.equal(client.answer.status, 502, name);
      assert.equal(client.answer.field("x-lb-failure"), "reset", name);
      assert.equal(client.answer.whole, true, name);
    }
    client.socket.destroy();
  }));
  await nothingInFlight();
});

test("a body that is kept for a retry or a copy stays this client's, whatever others send meanwhile", async () => {
  const got: string[] = [], OF_ONE_READ = 40_000; // 32 KiB and more are read into buffers that are used again
  const dies = await scriptedServer(async (visit, request) => {
    const isFirst = value(request, "x-who") === "one";
    await sleep(300); // others send
    if (isFirst) visit.socket.resetAndDestroy();
    else visit.send(answer("ok"));
  });
  const keeps = await scriptedServer((visit, request) => {
    got.push(`${value(request, "x-who")} ${String.fromCharCode(...new Set(request.body))} ${request.body.length}`);
    visit.send(answer("ok"));
  });
  const own = await startProgram({
    log: "off",
    services: { copies: { servers: [keeps.address], health: "off" } },
    routes: [
      { path: "/retry", servers: [dies.address, keeps.address], strategy: "first", health: "off" },
      { path: "/copy", servers: [dies.address], health: "off", mirror: { service: "copies", percent: 100 } },
    ],
  });
  try {
    const put = (path: string, who: string, letter: string) =>
      rawRequest(own.port, [
        `PUT ${path} HTTP/1.1\r\nHost: a.test\r\nX-Who: ${who}\r\nContent-Length: ${OF_ONE_READ}\r\n\r\n`,
        50, // so that the body comes in a read of its own
        letter.repeat(OF_ONE_READ),
      ]);
    for (const path of ["/retry", "/copy"]) {
      got.length = 0;
      const first = put(path, "one", "A");
      await sleep(150);
      await Promise.all([first, ...["B", "C", "D"].map((letter) => put(path, "other", letter))]);
      await until("the copies are there", () => got.length >= (path === "/copy" ? 4 : 1));
      for (const one of got) assert.match(one, /^(?:one A|other [BCD]) 40000$/);
      assert.ok(got.includes("one A 40000"), path);
    }
  } finally {
    await own.stop();
    await Promise.all([dies.close(), keeps.close()]);
  }
});

// ─── Early answers ───

const TOO_MUCH = "HTTP/1.1 413 Too Much\r\nContent-Length: 9\r\nConnection: close\r\n\r\ntoo much!";
const CLIENTS = 8;

for (const { front, back } of WAYS) {
  test(`a server that answers early, and closes with the upload unread, is heard by all, and it is not its failure (A1): ${front} to ${back}`, async () => {
    scripts["/early"] = (socket) => {
      stopReading(socket);
      socket.write(TOO_MUCH, () => socket.destroy());
    };
    for (let i = 0; i < CLIENTS; i++) {
      const client = await open(front), body = new LargeBody(UPLOAD, i % 4 < 2 ? "length" : "chunked");
      const deaf = i % 2 === 0; // it reads when all is sent
      if (deaf) stopReading(client.socket);
      await body.writeTo(client.socket, requestTo(`${back}.strict`, "/early", "", "POST"));
      if (deaf) readOn(client.socket);
      const name = `client ${i}`;
      await until(`the connection ends: ${name}`, () => client.closed, 10_000);
      assert.equal(client.answer.head.split("\n")[0], "HTTP/1.1 413 Too Much", name);
      assert.equal(client.answer.beginning, "too much!", name);
      client.socket.destroy();
    }
    const { services }: { services: ServiceSeen[] } = await ask("/services");
    const [service] = services.filter(({ name }) => name.includes(`${back}.strict`));
    assert.deepEqual(service!.servers.map(({ failures, status }) => ({ failures, status })), [{
      failures: 0,
      status: "up",
    }]);
    await nothingInFlight();
  });
}

// ─── Out of handles ───

const HANDLES = 160, CROWD = 300;

/** The program with that many handles at most, while `use` lasts. It has to end by itself then, with status 0. */
async function withHandles(handles: number, use: (port: number, alive: () => boolean) => Promise<void>): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), "lb-")), file = join(folder, "routes.yml");
  for (const [name, content] of Object.entries(FILES)) writeFileSync(join(folder, name), content);
  writeFileSync(file, JSON.stringify(config()));
  const command = [process.execPath, ...COMMAND[runtime()], "-c", file];
  const child = spawnGuarded("sh", ["-c", `ulimit -n ${handles}; exec "$@"`, "sh", ...command], {
    cwd: fileURLToPath(new URL("../..", import.meta.url)),
  });
  let output = "", exit: number | null | undefined;
  for (const stream of [child.stdout, child.stderr]) stream.on("data", (bytes: Buffer) => output += bytes.toString());
  child.on("exit", (code) => exit = code);
  try {
    const port = await until("it listens", () => portOf(output, "http"), 30_000);
    await use(port, () => exit === undefined);
    child.kill("SIGTERM");
    await until("it ends", () => exit !== undefined, 10_000);
    assert.equal(exit, 0, output);
    assert.doesNotMatch(output, /uncaught|unhandled|panicked|internal/i);
  } finally {
    if (exit === undefined) child.kill("SIGKILL");
    rmSync(folder, { recursive: true, force: true });
  }
}

test("out of handles the program answers 502 where it cannot connect, and serves again when clients have left", () =>
  withHandles(HANDLES, async (port, alive) => {
    scripts["/last"] = (socket) => socket.end(answerWith("here", CLOSE)); // every request needs a connection of its own
    const asked = async (client: Client, back: Back = "http") => {
      await client.send(requestTo(back, "/last"));
      return client;
    };
    const answered = async (back?: Back) => {
      const client = await asked(await open("http", port), back);
      await until("it is answered, or closed", () => client.answer.whole || client.closed);
      client.socket.destroy();
      return client.answer.status;
    };
    assert.equal(await answered(), 200);
    const crowd = await Promise.all(Array.from({ length: CROWD }, () => open("http", port).catch(() => undefined)));
    const connected = crowd.filter((client) => client !== undefined);
    await Promise.all(connected.map((client, i) => asked(client, BOTH[i % 2])));
    const seen = () => connected.filter(({ answer }) => answer.head).map(({ answer }) => answer.status);
    await until("one is answered 502", () => seen().includes(502));
    await sleep(500); // so that more are answered
    const statuses = seen();
    assert.deepEqual(statuses.filter((status) => status !== 200 && status !== 502), []);
    assert.ok(alive());
    for (const { socket } of connected) socket.destroy();
    const end = Date.now() + patience(5000);
    while (await answered() !== 200) {
      assert.ok(Date.now() < end, "it does not serve again");
      await sleep(50);
    }
    for (let i = 0; i < 20; i++) assert.equal(await answered(BOTH[i % 2]), 200);
  }));

// ─── Drips ───

test("a head that drips is cut at limits.header with 408, a body that drips at timeouts.request", async () => {
  await put(config({ header: "1s" }, { request: "1s" }));
  const drip = async (client: Client, text: string) => {
    for (const byte of text) {
      if (client.closed) return;
      await client.send(byte);
      await sleep(100);
    }
  };
  scripts["/never"] = () => {}; // waits for the rest
  const heads = {
    "a head": "",
    "a body by length": "Content-Length: 100\r\n\r\n",
    "a chunked body": "Transfer-Encoding: chunked\r\n\r\n64\r\n",
  };
  await Promise.all(WAYS.flatMap(({ front, back }) =>
    Object.entries(heads).map(async ([what, begin]) => {
      const name = `${what} from ${front} to ${back}`, client = await open(front), began = Date.now();
      if (begin) await client.send(requestTo(back, "/never", begin, "POST"));
      void drip(client, begin ? "x".repeat(100) : requestTo(back, "/", `X: ${"x".repeat(100)}\r\n`));
      await until(`an answer to ${name}`, () => client.answer.whole);
      const took = Date.now() - began;
      assert.equal(client.answer.status, 408, name);
      assert.equal(client.answer.field("x-lb-failure"), "client-timeout", name);
      assert.ok(took >= 900 && took < 4000, `${name} took ${took} ms`);
      await until(`the end of ${name}`, () => client.closed);
      client.socket.destroy();
    })
  ));
  await nothingInFlight();
});
