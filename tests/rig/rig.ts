// What the tests of the running program share: the program itself on the runtime that runs the test, a client that
// sends bytes as they are, and servers that answer with bytes as they are. Everything speaks over node:net, for an
// HTTP library would correct the very mistakes that these tests make on purpose.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { createHash } from "node:crypto";
import { once } from "node:events";
import { existsSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { get as httpGet, type IncomingMessage } from "node:http";
import { type AddressInfo, connect, createServer, type Server, type Socket } from "node:net";
import { availableParallelism, loadavg, tmpdir } from "node:os";
import { dirname, join } from "node:path";
import process from "node:process";
import type { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { after, test as nodeTest, type TestContext } from "node:test";
import { fileURLToPath } from "node:url";
import { createGunzip } from "node:zlib";
import { spawnGuarded } from "./guard.ts";
import type { Failure, HttpClient, LoadBalancer } from "../../lb.ts";
import type { Attempt, Body, Fields, HttpRequest, HttpResponse } from "./types.ts";

type Bytes = NonNullable<Body["bytes"]>;
type BodyReader = Parameters<Body["read"]>[0];

export type Runtime = "deno" | "bun" | "node";
export const runtime = (): Runtime => "Deno" in globalThis ? "deno" : "Bun" in globalThis ? "bun" : "node";

export const sleep = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));

/** How long to wait where an idle machine would take this many milliseconds: longer, the more others use the machine. */
export function patience(milliseconds: number): number {
  const beside = Number(process.env.LB_PATIENCE ?? 1); // the test command says how many jobs share a core
  return milliseconds * Math.max(1, beside, loadavg()[0]! / availableParallelism());
}

/** Options of a test: what `node:test` has, or the programs without which it is skipped. */
interface TestOptions {
  skip?: string | boolean;
  /** Names of commands. */
  needs?: string[];
  /** Milliseconds after which it hangs, on an idle machine. */
  timeout?: number;
}

type TestCode = (t: TestContext) => unknown;

/** A test of node:test that waits longer on a busy machine, and is skipped without the programs that it needs. */
export function test(name: string, options: TestOptions | TestCode, body?: TestCode): void {
  if (typeof options === "function") return test(name, {}, options);
  const { skip = false, needs = [], timeout = 200_000 } = options, missing = needs.filter((one) => !isInstalled(one));
  const lacking = missing.length > 0 && `not installed: ${missing.join(", ")}`;
  nodeTest(name, { timeout: patience(timeout), skip: skip || lacking }, async (t) => void (await body!(t)));
}

/** Tests that mostly wait: three of them run at once. */
export function alongside(...tests: [name: string, options: TestOptions, body: () => Promise<unknown>][]): void {
  const begun = tests.map(() => Promise.withResolvers<unknown>());
  const waiting = tests.keys().filter((i) => (tests[i]![1].needs ?? []).every(isInstalled));
  const work = async () => {
    for (const i of waiting) {
      const running = tests[i]![2]();
      begun[i]!.resolve(running);
      await running.catch(() => {}); // its own test tells that
    }
  };
  let isBegun = false;
  for (const [i, [name, options]] of tests.entries()) {
    test(name, options, async () => {
      if (!isBegun) { for (let workers = 0; workers < 3; workers++) void work(); }
      isBegun = true;
      await begun[i]!.promise;
    });
  }
}

const isInstalled = (command: string): boolean =>
  (process.env.PATH ?? "").split(":").some((folder) => existsSync(join(folder, command)));

/** Looks every 10 ms until it sees something; fails when that does not happen. */
export async function until<T>(what: string, look: () => T | undefined | false, within = 5000): Promise<T> {
  within = patience(within);
  for (const end = Date.now() + within;;) {
    const seen = look();
    if (seen) return seen;
    assert.ok(Date.now() < end, `did not happen within ${within} ms: ${what}`);
    await sleep(10);
  }
}

/** An empty folder, which the test command removes in any case. */
export const makeFolder = (): string => mkdtempSync(join(tmpdir(), "lb-"));

// ─── HTTP messages, as they were on the wire ───

export interface Message {
  /** The request line or status line. */
  start: string;
  /** Names and values as they were sent, in order. */
  headers: [name: string, value: string][];
  body: Buffer;
  /** Whether the body came to the end that its head had announced. */
  complete: boolean;
}

/** Every value of a header, in order. */
export const values = (message: Message, name: string) =>
  message.headers.filter(([given]) => given.toLowerCase() === name.toLowerCase()).map(([, value]) => value);
export const value = (message: Message, name: string) => values(message, name).join(", ");
export const status = (answer: Message) => Number(answer.start.split(" ")[1]);
export const target = (request: Message) => request.start.split(" ")[1] ?? "";

const EMPTY = Buffer.alloc(0);

function chunked(bytes: Buffer): { body: Buffer; rest: Buffer; complete: boolean } {
  const parts: Buffer[] = [];
  for (let at = 0;;) {
    const eol = bytes.indexOf("\r\n", at);
    const size = eol < 0 ? NaN : parseInt(/^[0-9a-f]+(?=$|;)/i.exec(bytes.toString("latin1", at, eol))?.[0] ?? "", 16);
    if (size === 0) {
      const end = bytes.subarray(eol, eol + 4).equals(Buffer.from("\r\n\r\n")) ? eol : bytes.indexOf("\r\n\r\n", eol);
      if (end >= 0) {
        return { body: Buffer.concat(parts), rest: bytes.subarray(end + 4), complete: true };
      }
    }
    const end = eol + 2 + size;
    if (
      !(size > 0) || bytes.length < end + 2 ||
      bytes.toString("latin1", end, end + 2) !== "\r\n"
    ) {
      if (size > 0) {
        parts.push(bytes.subarray(eol + 2, Math.min(end, bytes.length)));
      }
      return { body: Buffer.concat(parts), rest: EMPTY, complete: false };
    }
    parts.push(bytes.subarray(eol + 2, end));
    at = end + 2;
  }
}

/** Takes one message off the front; undefined while its head is not complete. */
function take(
  bytes: Buffer,
  body: "framed" | "none" | "until the end",
): { message: Message; rest: Buffer } | undefined {
  const end = bytes.indexOf("\r\n\r\n");
  if (end < 0) return undefined;
  const [start = "", ...lines] = bytes.toString("latin1", 0, end).split("\r\n");
  const headers = lines.map((line): [string, string] => {
    const colon = line.indexOf(":");
    return [line.slice(0, colon), line.slice(colon + 1).trim()];
  });
  const message: Message = { start, headers, body: EMPTY, complete: true };
  const after = bytes.subarray(end + 4);
  const length = values(message, "content-length")[0];
  if (body === "none") return { message, rest: after };
  if (/chunked/i.test(value(message, "transfer-encoding"))) {
    const { rest, ...found } = chunked(after);
    return { message: { ...message, ...found }, rest };
  }
  if (length === undefined) {
    return body === "framed" ? { message, rest: after } : { message: { ...message, body: after }, rest: EMPTY };
  }
  const complete = after.length >= Number(length);
  return {
    message: { ...message, body: after.subarray(0, Number(length)), complete },
    rest: after.subarray(Number(length)),
  };
}

// ─── The client ───

/** Bytes (a string is latin1), a pause in milliseconds, or something to do or wait for before going on. */
export type Part = string | Buffer | number | ((socket: Socket) => unknown);

export interface Exchange {
  /** The final answers, in order. */
  answers: Message[];
  /** The 1xx answers before them. */
  interim: Message[];
  /** Whether the balancer ended the connection (false: we did, when nothing more came). */
  closed: boolean;
  bytes: Buffer;
}

/** Sends what it is given on one connection and collects what comes back until the connection ends, or is quiet. */
export async function rawRequest(
  port: number,
  parts: Part | Part[],
  { methods = [], quiet = 400, atMost = patience(8_000) }: {
    methods?: string[];
    quiet?: number;
    atMost?: number;
  } = {},
): Promise<Exchange> {
  const socket = connect(port, "127.0.0.1");
  const got: Buffer[] = [];
  let last = Date.now();
  let closed = false;
  socket.on("data", (bytes: Buffer) => (got.push(bytes), last = Date.now()));
  const ended = new Promise<void>((resolve) => {
    for (const event of ["error", "end", "close"]) socket.on(event, () => (closed = true, resolve()));
  });
  await new Promise((resolve) => (socket.once("connect", resolve), socket.once("error", resolve)));
  const read = () => {
    const answers: Message[] = [], interim: Message[] = [];
    for (
      let rest: Buffer = Buffer.concat(got), found;
      rest.length;
      rest = found.rest
    ) {
      const code = Number(/^HTTP\/1\.[01] (\d{3})/.exec(rest.toString("latin1", 0, 12))?.[1]);
      const none = methods[answers.length] === "HEAD" || code < 200 ||
        code === 204 || code === 304;
      found = code ? take(rest, none ? "none" : "until the end") : undefined;
      if (!found) {
        answers.push({ start: rest.toString("latin1"), headers: [], body: EMPTY, complete: false });
        break;
      }
      (code < 200 && code !== 101 ? interim : answers).push(found.message);
    }
    return { answers, interim };
  };
  for (const part of Array.isArray(parts) ? parts : [parts]) {
    if (typeof part === "number") await sleep(part);
    else if (typeof part === "function") await part(socket);
    else if (!closed) {
      socket.write(typeof part === "string" ? Buffer.from(part, "latin1") : part);
    }
  }
  last = Date.now();
  for (
    const end = last + atMost;
    !closed && Date.now() < end;
    await Promise.race([sleep(5), ended])
  ) {
    if (socket.destroyed) break;
    if (Date.now() - last > quiet && read().answers.at(-1)?.complete) break;
  }
  socket.destroy();
  return { ...read(), closed, bytes: Buffer.concat(got) };
}

/** The text of an answer that comes in gzip; `heard` gets with each piece all that has come so far. */
export async function readGzip(port: number, path: string, heard: (text: string) => void): Promise<string> {
  const request = httpGet({ port, host: "127.0.0.1", path, headers: { "accept-encoding": "br, gzip;q=0.5" } });
  const [response] = await once(request, "response") as [IncomingMessage];
  let text = "";
  assert.equal(response.headers["content-encoding"], "gzip");
  await pipeline(response, createGunzip(), async (plain: AsyncIterable<Buffer>) => {
    for await (const bytes of plain) heard(text += bytes.toString());
  });
  return text;
}

/** A request that asks to close the connection, so that nobody has to wait for more. */
export const get = (path: string, headers = "", host = "a.test") =>
  `GET ${path} HTTP/1.1\r\nHost: ${host}\r\n${headers}Connection: close\r\n\r\n`;

/**
 * The answers on one connection, as a test expects them: `200` is a server's, `502` our own and says why in x-lb-failure,
 * `400!` may also be somebody else's (the runtime's parser, or a server's). `cut`: a 200 that the client can tell to be
 * incomplete. `closes`: the connection ends without an answer. `a | b`: either.
 */
export type Expected = string | Record<Runtime, string>;
export const expectedHere = (expected: Expected) => typeof expected === "string" ? expected : expected[runtime()];
/** The same for the name of a test. */
export const inWords = (expected: Expected) =>
  expectedHere(expected).replaceAll("!", "").replaceAll(" | ", " or ").replace("cut", "an answer that is visibly cut")
    .replace("closes", "the end of the connection");

/** Which of the alternatives came true; fails when none did. */
export function matching(expected: string, { answers, closed }: Exchange): string {
  const fits = (code: string, one: Message) =>
    code === "cut" ? status(one) === 200 && !one.complete && closed : status(one) === parseInt(code) && one.complete &&
      (status(one) < 400 || code.endsWith("!") ||
        value(one, "x-lb-failure") !== "");
  const found = expected.split(" | ").find((list) => {
    const codes = list === "closes" ? [] : list.split(" ");
    return codes.length === answers.length && codes.every((code, i) => fits(code, answers[i]!)) &&
      (codes.length || closed);
  });
  const got = answers.map((one) =>
    `${one.start} ${value(one, "x-lb-failure")}`.trim() +
    (one.complete ? "" : " (cut)")
  );
  assert.ok(found, `expected ${expected}, got ${JSON.stringify(got)}${closed ? ", closed" : ""}`);
  return found;
}

// ─── Servers ───

/** One connection to a scripted server. */
export interface Visit {
  /** Counts connections from 0. */
  index: number;
  socket: Socket;
  /** All bytes received on it, as latin1. */
  received: string;
  /** Sends bytes and pauses, in order. */
  send(...parts: (string | Buffer | number)[]): Promise<void>;
  /** Whether the connection is over, whoever ended it. */
  over: boolean;
}

/** What a server does with the request that has just arrived (the count is over all connections, from 0). */
export type Script = (visit: Visit, request: Message, count: number) => unknown;

export interface ScriptedServer {
  /** Can be replaced between two requests. */
  script: Script;
  /** When the script is called: as soon as a request's head is there, or (the default) when its body is. */
  at: "head" | "end";
  port: number;
  address: string;
  visits: Visit[];
  /** The connection on which the latest request has begun to arrive. */
  last: Visit | undefined;
  /** The requests that arrived whole, in order. */
  requests: Message[];
  /** Forgets what it has seen; `script` and `at` are set anew. Connections stay. */
  reset(script: Script, at?: "head" | "end"): void;
  close(): Promise<void>;
}

/** Listens on 127.0.0.1, on a free port unless another is given; gives the port. */
export async function listenLocally(server: Server, port = 0): Promise<number> {
  await new Promise<void>((resolve) => server.listen(port, "127.0.0.1", resolve));
  return (server.address() as AddressInfo).port;
}

/** Ends a server and its open connections. */
export function endServer(server: Server, open: Iterable<Socket>): Promise<void> {
  for (const socket of open) socket.destroy();
  return new Promise((resolve) => server.close(() => resolve()));
}

export const scriptedServer = (script: Script): Promise<ScriptedServer> => scriptedServerAt("127.0.0.1", 0, script);

export async function scriptedServerAt(host: string, port: number, script: Script): Promise<ScriptedServer> {
  const open = new Set<Socket>();
  let count = 0, visits = 0;
  const tcp = createServer((socket) => {
    const visit: Visit = {
      index: visits++,
      socket,
      received: "",
      over: false,
      async send(...parts) {
        for (const part of parts) {
          if (typeof part === "number") await sleep(part);
          else if (!visit.over && !socket.write(typeof part === "string" ? Buffer.from(part, "latin1") : part)) {
            await Promise.race([
              new Promise((go) => socket.once("drain", go)),
              new Promise((go) => socket.once("close", go)),
            ]);
          }
        }
      },
    };
    let rest: Buffer = EMPTY;
    let called = false; // for the request at the front of `rest`
    let turn: Promise<unknown> = Promise.resolve();
    server.visits.push(visit);
    open.add(socket);
    const over = () => (visit.over = true, open.delete(socket));
    socket.on("close", over);
    socket.on("end", over);
    socket.on("error", over);
    socket.on("data", (bytes: Buffer) => {
      visit.received += bytes.toString("latin1");
      rest = Buffer.concat([rest, bytes]);
      for (let found; (found = take(rest, "framed"));) {
        const { message } = found;
        server.last = visit;
        if (!called && (message.complete || server.at === "head")) {
          const number = count++;
          turn = turn.then(() => server.script(visit, message, number)).catch(() => socket.destroy());
          called = true;
        }
        if (!message.complete) break;
        server.requests.push(message);
        rest = found.rest;
        called = false;
      }
    });
  });
  const server: ScriptedServer = {
    script,
    at: "end",
    port: 0,
    address: "",
    visits: [],
    last: undefined,
    requests: [],
    reset(script, at = "end") {
      Object.assign(server, { script, at, visits: [], requests: [], last: undefined });
      count = 0;
    },
    close: () => endServer(tcp, open),
  };
  await new Promise<void>((resolve) => tcp.listen(port, host, resolve));
  server.port = (tcp.address() as AddressInfo).port;
  server.address = `127.0.0.1:${server.port}`;
  return server;
}

/** An answer that is as it should be. */
export const answer = (body: string | Buffer, headers = "", line = "200 OK") =>
  Buffer.concat([
    Buffer.from(`HTTP/1.1 ${line}\r\n${headers}Content-Length: ${Buffer.byteLength(body)}\r\n\r\n`, "latin1"),
    Buffer.from(body),
  ]);

/** Ends a connection with RST instead of FIN. */
export const resetConnection = ({ socket }: { socket: Socket }) => void socket.resetAndDestroy();

export interface Echo {
  method: string;
  url: string;
  rawHeaders: [name: string, value: string][];
  bodyLength: number;
  sha256: string;
}

/** Answers every request with what it has seen of it. */
export const echo: Script = (visit, request) => {
  const [method = "", url = ""] = request.start.split(" ");
  const sha256 = createHash("sha256").update(request.body).digest("hex");
  const seen: Echo = { method, url, rawHeaders: request.headers, bodyLength: request.body.length, sha256 };
  const bytes = answer(JSON.stringify(seen), "Content-Type: application/json\r\n");
  return visit.send(method === "HEAD" ? bytes.subarray(0, bytes.indexOf("\r\n\r\n") + 4) : bytes);
};
export const echoServer = () => scriptedServer(echo);

// ─── Requests without a connection ───

/** A request as a listener makes it; what it is answered with comes to `answers`. */
export function requestOf(
  { fields = ["host", "h.test"], ...given }: Partial<HttpRequest> & { fields?: Fields } = {},
): HttpRequest & { answers: HttpResponse[] } {
  const at = fields.findIndex((name, i) => i % 2 === 0 && name.toLowerCase() === "host");
  const host = at < 0 ? "" : fields[at + 1]!, answers: HttpResponse[] = [];
  return {
    ...{ method: "GET", target: "/", version: "1.1", block: { fields, passing: undefined }, host, scheme: "http" },
    ...{ peer: "192.0.2.9", upgrade: "", trailers: false, expects: false, problem: undefined, source: undefined },
    ...{ body: new TestBytes(""), gone: false, onGone: undefined, answers },
    respond: (response) => void answers.push(response),
    inform: () => {},
    ...given,
  };
}

// ─── The program ───

export interface Program {
  port: number;
  /** The admin's; 0: it has none. */
  admin: number;
  /** Its routes.yml. */
  file: string;
  pid: number;
  stdout: Readable; // to stop reading it
  /** Everything it has printed so far, both streams. */
  output(): string;
  /** What it has printed on standard error. */
  errors(): string;
  /** The whole lines that it has printed on standard output: its access log. */
  logLines(): string[];
  /** Puts another config in force, by the file. */
  reload(config: unknown): Promise<void>;
  /** SIGTERM; gives the exit status, or null when it had to be killed. */
  stop(): Promise<number | null>;
}

const ROOT = fileURLToPath(new URL("../..", import.meta.url));
/** What comes before the arguments of lb.ts. */
export const COMMAND: Record<Runtime, string[]> = { deno: ["run", "-A", "lb.ts"], bun: ["lb.ts"], node: ["lb.ts"] };

/**
 * Starts lb.ts on the runtime that runs this, and waits until it listens: with this config (JSON is YAML; a text stays as
 * it is) and these files beside it; on a free port where an object does not say where.
 */
export async function startProgram(
  config: unknown,
  args: string[] = [],
  beside: Record<string, string> = {},
): Promise<Program> {
  const folder = makeFolder();
  const file = join(folder, "routes.yml");
  for (const [name, content] of Object.entries(beside)) writeFileSync(join(folder, name), content);
  const own = typeof config === "object" && config !== null && "listen" in config;
  writeFileSync(file, textOf(config));
  const words = [...COMMAND[runtime()], "-c", file, ...own ? [] : ["--listen", "127.0.0.1:0"], ...args];
  const child = spawnGuarded(process.execPath, words, { cwd: ROOT });
  let output = "", errors = "", log = "", exited = false;
  child.stdout.on("data", (bytes: Buffer) => {
    output += bytes.toString();
    log += bytes.toString();
  });
  child.stderr.on("data", (bytes: Buffer) => {
    output += bytes.toString();
    errors += bytes.toString();
  });
  const exit = new Promise<number | null>((resolve) =>
    child.once("exit", (code) => {
      exited = true;
      rmSync(folder, { recursive: true, force: true });
      resolve(code);
    })
  );
  const stop = async () => {
    for (const signal of ["SIGTERM", "SIGTERM", "SIGKILL"] as const) {
      if (!exited) child.kill(signal);
      for (const end = Date.now() + 3000; !exited && Date.now() < end;) {
        await sleep(20);
      }
    }
    return exit;
  };
  const reloads = () => output.split(IN_FORCE).length;
  const reload = async (next: unknown) => {
    const before = reloads();
    writeFileSync(file, textOf(next));
    child.kill("SIGHUP");
    await until("the changed file is in force", () => reloads() > before, 20_000);
  };
  try {
    const admin = () => Number(/admin on http:\/\/127\.0\.0\.1:(\d+)/.exec(output)?.[1] ?? 0);
    const address = () => /listening on https?:\/\/127\.0\.0\.1:(\d+)/.exec(output)?.[1];
    await until("lb.ts listens or ends", () => exited || address(), 30_000);
    assert.ok(address(), `lb.ts ended instead of listening:\n${output}`);
    return {
      port: Number(address()),
      admin: admin(),
      file,
      pid: child.pid ?? 0,
      stdout: child.stdout,
      output: () => output,
      errors: () => errors,
      logLines: () => log.split("\n").slice(0, -1),
      reload,
      stop,
    };
  } catch (error) {
    await stop();
    throw error;
  }
}

const textOf = (config: unknown) => typeof config === "string" ? config : JSON.stringify(config, null, 1);

/** A program that the tests of a file share, for its start costs more than most of them. It is started with the first use. */
export function sharedProgram(args: string[] = []) {
  let started: Promise<Program> | undefined;
  after(async () => await (await started)?.stop());
  return {
    /**
     * Puts a config in force, after an empty one that keeps nothing of the test before, with these files beside it. What
     * the program has printed until then is not shown.
     */
    async begin(config: unknown, beside: Record<string, string> = {}): Promise<Program> {
      const program = await (started ??= startProgram(EMPTY_CONFIG, args));
      await program.reload(EMPTY_CONFIG);
      for (const [name, content] of Object.entries(beside)) writeFileSync(join(dirname(program.file), name), content);
      const lines = program.logLines().length;
      await program.reload(config);
      const [output, errors] = [program.output, program.errors].map((all) =>
        all().lastIndexOf(IN_FORCE) + IN_FORCE.length
      );
      return {
        ...program,
        output: () => program.output().slice(output),
        errors: () => program.errors().slice(errors),
        logLines: () => program.logLines().slice(lines),
        stop: () => Promise.resolve(0),
      };
    },
  };
}
const IN_FORCE = "is in force again\n";
const EMPTY_CONFIG = "log: off\ndefault: { respond: {} }\n";

/** A port that nobody listens on. */
export async function freePort(): Promise<number> {
  const server = createServer();
  const port = await listenLocally(server);
  await endServer(server, []);
  return port;
}

/** A random that gives the same numbers for the same seed (mulberry32). */
export function seeded(seed: number): () => number {
  return () => {
    let t = seed += 0x6d2b79f5;
    t = Math.imul(t ^ t >>> 15, t | 1);
    t ^= t + Math.imul(t ^ t >>> 7, t | 61);
    return ((t ^ t >>> 14) >>> 0) / 2 ** 32;
  };
}

/** Nothing is in flight in a balancer, and nobody waits: every count is 0. */
export function assertIdle({ balancer }: LoadBalancer): void {
  assert.equal(balancer.inFlight, 0, "requests in flight");
  for (const { name, servers, inFlight, retrying, waiting } of balancer.table.services.values()) {
    const counts = [inFlight, retrying, waiting.size, ...servers.map((server) => server.inFlight)];
    assert.deepEqual(counts, counts.map(() => 0), `${name}: requests, retries, waiting, at each server`);
  }
}

// ─── Attempts: a request through an HttpClient, without a balancer ───

/** What comes at the end of a body: nothing more for ever, a failure, or trailers. */
export type BodyEnd = "stall" | Failure | Fields;

/** A body that a test makes: some pieces, as fast as they are taken. `length` -1: nobody has announced it. */
export class TestBody implements Body {
  readonly length: number;
  readonly bytes: Bytes | undefined = undefined;
  limit = Infinity;
  paused = false;
  taken = 0; // bytes that the reader has got
  cancelled = 0; // how often nobody wanted the rest
  steps = Infinity; // pieces that may still go out, its end included
  private reader: BodyReader | undefined;
  private readonly pieces: Iterator<Bytes>;
  private readonly end: BodyEnd;

  constructor(pieces: Iterable<Bytes | string>, length: number, end: BodyEnd = []) {
    this.length = length;
    this.end = end;
    this.pieces = function* () {
      for (const piece of pieces) yield typeof piece === "string" ? Buffer.from(piece, "latin1") : piece;
    }();
  }
  read(reader: BodyReader): void {
    this.reader = reader;
    this.feed();
  }
  pause(): void {
    this.paused = true;
  }
  resume(): void {
    if (!this.paused) return;
    this.paused = false;
    this.feed();
  }
  cancel(): void {
    this.cancelled++;
    this.reader = undefined;
  }
  stream(): ReadableStream<Uint8Array<ArrayBuffer>> {
    throw new Error("nobody needs it");
  }
  /** Lets one more piece go out. */
  step(): void {
    this.steps++;
    this.feed();
  }
  private feed(): void {
    while (this.reader && !this.paused && this.steps > 0) {
      this.steps--;
      const next = this.pieces.next();
      if (next.done) return this.finish(this.reader);
      this.taken += next.value.length;
      this.reader.data(next.value);
    }
  }
  private finish(reader: BodyReader): void {
    if (this.end === "stall") return;
    this.reader = undefined;
    if (typeof this.end === "string") reader.fail(this.end);
    else reader.end(this.end);
  }
}

/** Bytes that are there, and can be sent again. */
export class TestBytes implements Body {
  readonly bytes: Bytes;
  limit = Infinity;
  constructor(bytes: string | Bytes) {
    this.bytes = typeof bytes === "string" ? Buffer.from(bytes, "latin1") : bytes;
  }
  get length(): number {
    return this.bytes.length;
  }
  read(reader: BodyReader): void {
    if (this.length) reader.data(this.bytes);
    reader.end([]);
  }
  pause(): void {}
  resume(): void {}
  cancel(): void {}
  stream(): ReadableStream<Uint8Array<ArrayBuffer>> {
    throw new Error("nobody needs it");
  }
}

/** What has come of an attempt. */
export interface Outcome {
  status: number; // 0: no head came
  reason: string;
  fields: Fields;
  body: Buffer; // as far as it came
  trailers: Fields;
  failure: Failure | undefined; // undefined: the answer is whole
  detail: string;
  sent: boolean; // the server may have seen some of it
}

export interface Sending {
  attempt: Attempt;
  /** sent, head, body, end: what was heard of it, in order; `sent again`: over a fresh connection. */
  order: string[];
  /** The interim answers. */
  informs: [status: number, reason: string, fields: Fields][];
  /** The head of the answer; never resolves where none comes. */
  head: Promise<HttpResponse>;
  /** Resolves when all is over; rejects where the order of events was another one than always. */
  outcome: Promise<Outcome>;
}

/** Sent, head, body, end: each at most once, in this order; and an answer that is whole has all of them. */
export function assertOrder(order: readonly string[], whole: boolean, read = true): void {
  const body = read ? "body " : "";
  const expected = whole ? `^sent (sent again )?head ${body}end $` : `^(sent (sent again )?(head ${body})?)?end $`;
  assert.match(order.map((event) => `${event} `).join(""), new RegExp(expected), "the order of events");
}

/**
 * Sends an attempt through a client. `read`: who reads the answer's body; without that all of it is read at once, and
 * `body` in the order of events is when its reader has heard its end.
 */
export function sendAttempt(
  client: HttpClient,
  given: Pick<Attempt, "server" | "body"> & Partial<Pick<Attempt, "method" | "target" | "lines" | "upgrade">>,
  { timeouts, read }: { timeouts?: Partial<Attempt["timeouts"]>; read?: (body: Body) => void } = {},
): Sending {
  const order: string[] = [], informs: Sending["informs"] = [], pieces: Buffer[] = [];
  const seen: Outcome = {
    ...{ status: 0, reason: "", fields: [], body: EMPTY, trailers: [] },
    ...{ failure: undefined, detail: "", sent: false },
  };
  let connectedAt = 0, brokenBy: Failure | undefined;
  const head = Promise.withResolvers<HttpResponse>(), end = Promise.withResolvers<void>();
  const attempt: Attempt = {
    ...{ method: "GET", target: "/", lines: "host: a.test\r\n", upgrade: "", tunnels: new Set(), ...given },
    timeouts: { connect: 20_000, response: 20_000, idle: 20_000, request: Infinity, ...timeouts },
    ...{ startedAt: client.now(), uploaded: 0, trailers: [], deadline: Infinity, received: 0, carrier: undefined },
    get connectedAt() {
      return connectedAt;
    },
    set connectedAt(at) {
      connectedAt = at;
      order.push(order.includes("sent") ? "sent again" : "sent");
    },
    onInform: (...inform) => void informs.push(inform),
    onHead(response) {
      const { status, reason, fields } = response;
      order.push("head");
      Object.assign(seen, { status, reason, fields });
      head.resolve(response);
      if (read) return read(response.body);
      response.body.read({
        data: (bytes) => void pieces.push(bytes),
        end(trailers) {
          order.push("body");
          seen.trailers = trailers;
        },
        fail(why) {
          order.push("body");
          brokenBy = why;
        },
      });
    },
    onEnd(failure, detail, sent) {
      order.push("end");
      Object.assign(seen, { failure, detail, sent });
      end.resolve();
    },
  };
  const outcome = end.promise.then(() => {
    seen.body = Buffer.concat(pieces);
    assertOrder(order, seen.failure === undefined, !read);
    if (order.includes("body")) assert.equal(brokenBy, seen.failure, "its reader hears of the same failure");
    return seen;
  });
  outcome.catch(() => {});
  client.send(attempt);
  return { attempt, order, informs, head: head.promise, outcome };
}
