// Chaos: under load of requests over HTTP/1.1 and HTTP/2, WebSockets and TCP connections servers of both versions are killed, paused, slowed and made to reset in
// the middle of a body, workers are ended and the config is reloaded. Events, clients and servers each draw from a stream of
// their own that follows from one seed. Afterwards every byte of every answer was right, nothing was sent twice that must not
// be, and nothing is left behind. `deno task chaos --seconds 120 --seed 7 --workers 2`; tests/load/chaos.test.ts runs it for a while.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import type { ChildProcess } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { Agent, createServer, request, type ServerResponse } from "node:http";
import { type AddressInfo, connect } from "node:net";
import { availableParallelism, loadavg, tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { type Client, type Field, h2Client, type H2Script, h2Server, valueOf } from "../rig/http2.ts";
import { BINARY, echoStrictly, openWebSocket, webSocketServer } from "../rig/websocket.ts";
import { spawnGuarded } from "../rig/guard.ts";
import { freePort, runtime, seeded, sleep, until } from "../rig/rig.ts";

const SELF = fileURLToPath(import.meta.url);
const ENTRY = fileURLToPath(new URL("../../lb.ts", import.meta.url));
const RUN = runtime() === "deno" ? ["run", "-A"] : [];
const SERVERS = 4;
const CLIENTS = 16; // of HTTP/1.1
const SESSIONS = 3; // clients of HTTP/2, each with some streams at once on one connection
const STREAMS_EACH = 4;
const ASKING = CLIENTS + SESSIONS * STREAMS_EACH; // requests at once
const STREAMS = 4; // clients of each other kind: TCP, WebSocket

// ─── The server: bytes that follow from the path, in a manner that it is told ───

/** The body of an answer: the same for the same number. */
function bodyOf(number: number): Buffer {
  const random = seeded(number), block = Buffer.from(Array.from({ length: BLOCK }, () => random() * 256));
  return Buffer.alloc(Math.floor(random() ** 4 * 200_000) + 1, block);
}
const BLOCK = 1_021; // a prime: where a piece is missing, what follows is out of step

interface Manner {
  delay: number; // milliseconds before the head
  reset: number; // how often a body is cut off, from 0 to 1
}

/** Answers until it is killed; says on standard output where it listens, which POSTs came, and what it has cut off. */
async function serve(port: number, port2: number, seed: number): Promise<void> {
  const random = seeded(seed);
  let manner: Manner = { delay: 0, reset: 0 };
  const answer2: H2Script = async (stream) => {
    const [, , number = ""] = valueOf(stream.head, ":path").split("/"), body = bodyOf(Number(number));
    await stream.done(60_000); // a body is read before it is answered
    if (stream.end.faults.length) console.error(`lb.ts sends ${stream.end.faults}`);
    if (!stream.ended) return; // the client has left
    if (valueOf(stream.head, ":method") === "POST") console.log(`post ${number}`);
    if (manner.delay) await sleep(manner.delay);
    const fields: Field[] = Number(number) % 2 ? [] : [["content-length", `${body.length}`]];
    if (random() >= manner.reset) return stream.respond(200, fields, body);
    console.log(`cut ${number}`);
    stream.sendHead([[":status", "200"], ...fields]);
    await stream.sendData(body.subarray(0, body.length / 2));
    stream.reset("INTERNAL_ERROR");
  };
  const server = createServer(async (asked, answer: ServerResponse) => {
    const [, kind, number = "0"] = asked.url!.split("/");
    if (kind === "manner") {
      manner = JSON.parse(decodeURIComponent(number));
      return void answer.end();
    }
    try {
      for await (const _ of asked); // a body is read before it is answered
    } catch { // the client has left
      return;
    }
    if (asked.method === "POST") console.log(`post ${number}`);
    if (manner.delay) await sleep(manner.delay);
    const body = bodyOf(Number(number));
    answer.writeHead(200, Number(number) % 2 ? {} : { "content-length": body.length });
    if (random() >= manner.reset) return void answer.end(body);
    console.log(`cut ${number}`);
    answer.write(body.subarray(0, body.length / 2));
    setTimeout(() => asked.socket.resetAndDestroy?.(), 5);
  });
  server.keepAliveTimeout = 60_000;
  setTimeout(() => process.exit(), 600_000); // nobody may be left to end it
  const http2 = await h2Server(answer2, {}, undefined, port2);
  const says = () => console.log(`listening ${(server.address() as AddressInfo).port} ${http2.port}`);
  server.listen(port, "127.0.0.1", says);
}

interface Backend {
  port: number;
  port2: number; // for HTTP/2
  child: ChildProcess;
  paused: boolean;
}

/** What the servers have said: how often each POST came, and how many bodies they cut off. */
interface Heard {
  posts: Map<string, number>;
  cuts: number;
  said: string; // what went wrong in them
}

async function startBackend(heard: Heard, seed: number, port = 0, port2 = 0): Promise<Backend> {
  const words = [...RUN, SELF, "serve", `${port}`, `${port2}`, `${seed}`];
  const child = spawnGuarded(process.execPath, words);
  child.stderr.on("data", (bytes: Buffer) => heard.said += bytes);
  let listening: [number, number] | undefined, rest = "";
  child.stdout.on("data", (bytes: Buffer) => {
    const lines = (rest + bytes).split("\n");
    rest = lines.pop()!;
    for (const [word, value = "", second] of lines.map((line) => line.split(" "))) {
      if (word === "listening") listening = [Number(value), Number(second)];
      if (word === "post") heard.posts.set(value, (heard.posts.get(value) ?? 0) + 1);
      if (word === "cut") heard.cuts++;
    }
  });
  const [first, second] = await until("a server listens", () => listening, 30_000);
  return { port: first, port2: second, child, paused: false };
}

// ─── The clients ───

interface Tally {
  whole: number;
  wrong: string[]; // answers whose bytes or status are not what they have to be
  cut: number; // answers that began and did not end
  broken: number; // connections that ended without an answer
  refused: number; // POSTs that got an answer of our own: their server was ended over them
  streams: number; // TCP connections and WebSockets that came to their end, each byte as it had to be
  torn: number; // and those that did not
}

type Asked = [path: string, method: string, number: number];

/** One request; its answer is compared byte for byte. */
function ask(agent: Agent | false, port: number, [path, method, number]: Asked, tally: Tally): Promise<void> {
  return new Promise((resolve) => {
    const to = { port, agent, method, path: `${path}${number}`, host: "127.0.0.1", headers: { host: "a.test" } };
    const sent = request(to);
    let begun = false, done = false;
    const end = (what: () => void) => {
      if (!done) what();
      done = true;
      resolve();
    };
    sent.on("response", (answer) => {
      const pieces: Buffer[] = [];
      begun = true;
      answer.on("data", (piece: Buffer) => pieces.push(piece));
      answer.on("error", () => {});
      answer.on("close", () =>
        end(() => {
          const body = Buffer.concat(pieces), want = bodyOf(number), status = answer.statusCode!;
          if (status !== 200) {
            const why = String(answer.headers["x-lb-failure"] ?? "");
            if (method === "POST" && NOT_REPEATED.has(why)) tally.refused++;
            else tally.wrong.push(`${method} ${number}: ${status} ${why}`);
          } else if (!answer.complete && body.equals(want.subarray(0, body.length))) tally.cut++;
          else if (digest(body) !== digest(want)) {
            tally.wrong.push(`${method} ${number}: ${body.length} of ${want.length} bytes`);
          } else tally.whole++;
        }));
    });
    sent.on("error", (error: Error & { code?: string }) =>
      end(() => {
        if (begun) tally.cut++;
        else if (/ECONNRESET|EPIPE/.test(error.code ?? "")) tally.broken++;
        else tally.wrong.push(`${method} ${number}: ${error.code}`);
      }));
    sent.end(method === "POST" ? "a body" : undefined);
  });
}

/** One request over HTTP/2; its answer is compared byte for byte. */
async function askOver(client: Client, [path, method, number]: Asked, tally: Tally): Promise<void> {
  const body = method === "POST" ? { body: "a body", sized: number % 4 < 2 } : {};
  const stream = client.ask(`${path}${number}`, { method, ...body }), want = bodyOf(number);
  await stream.done(60_000);
  const { status, ended, head, body: got } = stream, why = stream.header("x-lb-failure");
  if (!head.length) tally.broken++;
  else if (status === 200 && ended && digest(got) === digest(want)) tally.whole++;
  else if (status === 200 && !ended && got.equals(want.subarray(0, got.length))) tally.cut++;
  else if (method === "POST" && NOT_REPEATED.has(why)) tally.refused++;
  else tally.wrong.push(`${method} ${path}${number} over HTTP/2: ${stream.result} ${why}, ${got.length} bytes`);
}

/** Some requests at once over one connection of HTTP/2, again and again. */
async function converseInHttp2(port: number, next: () => Asked, tally: Tally, pause: number): Promise<void> {
  const client = await h2Client(port);
  const asking = Array.from({ length: STREAMS_EACH }, async () => {
    for (let i = 0; i < 25 && !client.over; i++) {
      await askOver(client, next(), tally);
      await sleep(pause);
    }
  });
  await Promise.all(asking);
  tally.wrong.push(...client.faults);
  client.destroy();
}

/** Why a POST that a server may have seen is not sent to another one. */
const NOT_REPEATED = new Set(["reset", "timeout", "idle"]);

const digest = (bytes: Buffer) => createHash("sha1").update(bytes).digest("hex");

/** One answer over a plain connection: it is whole, or visibly cut, and never other bytes. */
function stream(port: number, number: number, tally: Tally): Promise<void> {
  return new Promise((resolve) => {
    const socket = connect(port, "127.0.0.1"), pieces: Buffer[] = [];
    socket.write(`GET /x/${number} HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n`);
    socket.on("data", (piece: Buffer) => pieces.push(piece));
    socket.on("error", () => {});
    socket.on("close", () => {
      const bytes = Buffer.concat(pieces), head = bytes.indexOf("\r\n\r\n");
      const body = bytes.subarray(head + 4), want = bodyOf(number);
      if (head < 0) tally.torn++; // in the middle of the head
      else if (digest(body) === digest(want)) tally.streams++;
      else if (body.length < want.length) tally.torn++;
      else tally.wrong.push(`TCP ${number}: ${body.length} of ${want.length} bytes`);
      resolve();
    });
  });
}

/** Some messages over a WebSocket: each comes back as it was sent. */
async function converse(port: number, random: () => number, tally: Tally): Promise<void> {
  try {
    const peer = await openWebSocket(port, "/ws");
    for (let i = 0; i < 20; i++) {
      const sent = bodyOf(Math.floor(random() * 1e6)), seen = peer.frames.length;
      peer.send(BINARY, sent);
      await until("it comes back", () => peer.frames.length > seen || peer.over, 10_000);
      const back = peer.frames[seen];
      if (back?.opcode !== BINARY) return void (tally.torn++, peer.socket.destroy());
      if (digest(back.payload) !== digest(sent)) {
        tally.wrong.push(`WebSocket: ${back.payload.length} of ${sent.length}`);
      }
      await sleep(random() * 50);
    }
    peer.close(1000);
    peer.socket.end();
    tally.streams++;
  } catch { // no 101
    tally.torn++;
    await sleep(20);
  }
}

// ─── What happens to them ───

export interface Chaos {
  seconds: number;
  seed: number;
  workers?: number;
  /** Milliseconds for which each client waits after a response. */
  pause?: number;
}

/** The program's memory in MiB and its open files. */
function held(pid: number): { memory: number; files: number } {
  const status = readFileSync(`/proc/${pid}/status`, "utf8");
  return { memory: Number(/VmRSS:\s+(\d+)/.exec(status)![1]) / 1_024, files: readdirSync(`/proc/${pid}/fd`).length };
}

/** Runs the whole, and gives what was seen; throws at the first thing that is not as it should be. */
export async function chaos({ seconds, seed, workers = 1, pause = 0 }: Chaos) {
  const random = seeded(seed), heard: Heard = { posts: new Map(), cuts: 0, said: "" };
  let lives = seed * 1_000; // no two servers or clients draw alike
  const backends = await Promise.all(Array.from({ length: SERVERS }, () => startBackend(heard, lives++)));
  const echoing = await webSocketServer(echoStrictly), tcpPort = await freePort();
  const folder = mkdtempSync(join(tmpdir(), "lb-chaos-")), file = join(folder, "routes.yml");
  // where more than the other tests use the machine, servers that are well take longer
  const slowness = Math.max(1, loadavg()[0]! / availableParallelism() / 4);
  const times = { connect: 500, response: 1_000, idle: 2_000 };
  const timeouts = Object.fromEntries(
    Object.entries(times).map(([name, ms]) => [name, `${Math.round(ms * slowness)}ms`]),
  );
  const weight = () => 1 + Math.floor(random() * 3);
  const write = () =>
    writeFileSync(
      file,
      JSON.stringify({
        log: "off",
        listen: [{ address: "127.0.0.1:0", h2c: true }],
        admin: { listen: "127.0.0.1:0" },
        tcp: [{ listen: `127.0.0.1:${tcpPort}`, servers: backends.map(({ port }) => `127.0.0.1:${port}`), retries: 3 }],
        defaults: {
          health: { path: "/x/0", interval: "500ms", timeout: "500ms", rise: 1, fall: 2 },
          eject: { failures: 3, for: "2s" },
          ...{ retries: SERVERS - 1, retry_budget: "100%", timeouts },
        },
        paths: [
          { path: "/ws", servers: [echoing.address], health: "off" },
          { path: "/y", servers: backends.map(({ port2 }) => ({ url: `h2c://127.0.0.1:${port2}`, weight: weight() })) },
        ],
        default: { servers: backends.map(({ port }) => ({ url: `127.0.0.1:${port}`, weight: weight() })) },
      }),
    );
  write();
  const more = workers > 1 ? ["--workers", String(workers)] : [];
  const args = [...RUN, ENTRY, "-c", file, "--drain", "5s", ...more];
  const program = spawnGuarded(process.execPath, args, { stdout: "ignore" });
  let err = "", over = false;
  program.stderr.on("data", (bytes: Buffer) => err += bytes);
  program.on("exit", () => over = true);
  const counts = { kill: 0, pause: 0, slow: 0, reset: 0, reload: 0, worker: 0 };
  const tally: Tally = { whole: 0, wrong: [], cut: 0, broken: 0, refused: 0, streams: 0, torn: 0 };
  try {
    const port = await until("lb.ts listens", () => Number(/listening on http:\/\/\S+:(\d+)/.exec(err)?.[1]), 30_000);
    const agent = new Agent({ keepAlive: true, maxSockets: CLIENTS });
    let running = true, number = 0;
    const draw = (random: () => number): Asked => {
      const path = random() < 0.5 ? "/x/" : "/y/"; // of a server of HTTP/1.1, or HTTP/2
      return [path, random() < 0.8 ? "GET" : "POST", ++number];
    };
    const client = async (random: () => number) => {
      while (running) {
        const asked = draw(random);
        await ask(asked[1] === "GET" && agent, port, asked, tally); // Deno and Bun send a POST again over a kept connection
        await sleep(pause);
      }
    };
    const clientOfHttp2 = async (random: () => number) => {
      while (running) await converseInHttp2(port, () => draw(random), tally, pause);
    };
    const streaming = async () => {
      while (running) {
        await stream(tcpPort, number += 2 - number % 2, tally); // even: their length is known
        await sleep(pause);
      }
    };
    const conversing = async (random: () => number) => {
      while (running) {
        await converse(port, random, tally);
        await sleep(pause);
      }
    };
    const some = (count: number, one: (random: () => number) => Promise<void>) =>
      Array.from({ length: count }, () => one(seeded(lives++)));
    const talking = [...some(STREAMS, streaming), ...some(STREAMS, conversing)];
    const clients = [...some(CLIENTS, client), ...some(SESSIONS, clientOfHttp2), ...talking];
    await sleep(2_000);
    const before = held(program.pid!);

    const admin = /admin on (\S+)/.exec(err)![1];
    const manner = (backend: Backend, one: Manner) =>
      fetch(`http://127.0.0.1:${backend.port}/manner/${encodeURIComponent(JSON.stringify(one))}`, {
        signal: AbortSignal.timeout(2_000),
      }).then((answer) => answer.text()).catch(() => "");
    const EVENTS: Record<keyof typeof counts, (backend: Backend) => Promise<unknown>> = {
      async kill(backend) {
        backend.child.kill("SIGKILL");
        await sleep(300 + random() * 700);
        backend.child = (await startBackend(heard, lives++, backend.port, backend.port2)).child;
      },
      async pause(backend) {
        process.kill(backend.child.pid!, "SIGSTOP");
        await sleep(500 + random() * 1_000);
        process.kill(backend.child.pid!, "SIGCONT");
      },
      async slow(backend) {
        await manner(backend, { delay: 50 + random() * 200, reset: 0 });
        await sleep(1_000);
        await manner(backend, { delay: 0, reset: 0 });
      },
      async reset(backend) {
        await manner(backend, { delay: 0, reset: 0.3 });
        await sleep(500);
        await manner(backend, { delay: 0, reset: 0 });
      },
      async reload() {
        write();
        if (random() < 0.5) process.kill(program.pid!, "SIGHUP");
        await sleep(100);
      },
      async worker() {
        const [first] = await (await fetch(`${admin}/workers`)).json() as { id: number }[];
        await (await fetch(`${admin}/workers/${first!.id}`, { method: "DELETE" })).text();
        await until("another one serves", () => err.includes("a worker has ended"));
        await sleep(1_500);
      },
    };
    const names = (Object.keys(EVENTS) as (keyof typeof counts)[]).filter((name) => workers > 1 || name !== "worker");
    for (const end = Date.now() + seconds * 1_000; Date.now() < end;) {
      const name = names[Math.floor(random() * names.length)]!;
      const backend = backends[Math.floor(random() * SERVERS)]!;
      counts[name]++;
      await EVENTS[name](backend);
      assert.equal(over, false, `lb.ts has ended:\n${err}`);
    }
    await sleep(500);
    running = false;
    await Promise.all(clients);
    agent.destroy();
    await sleep(5_000); // connections that nobody uses are closed
    const after = held(program.pid!);
    program.kill("SIGTERM");
    await until("lb.ts ends", () => over, 20_000);
    return { counts, ...tally, heard, before, after, err };
  } catch (error) {
    console.error(`${error}\nservers: ${heard.said}\nlb.ts: ${err}`);
    throw error;
  } finally {
    program.kill("SIGKILL");
    for (const { child } of backends) {
      if (child.exitCode === null) process.kill(child.pid!, "SIGKILL"); // also one that is stopped
    }
    rmSync(folder, { recursive: true, force: true });
    await echoing.close();
  }
}

/** What has to hold afterwards. Answers may end early, or not come, only where a server or a worker was ended over them. */
export function judge(
  { counts, whole, wrong, cut, broken, refused, streams, torn, heard, before, after, err }: Awaited<
    ReturnType<typeof chaos>
  >,
): void {
  const twice = [...heard.posts].filter(([, times]) => times > 1).map(([number]) => number);
  const line =
    `${
      JSON.stringify(counts)
    }: ${whole} answers whole, ${cut} cut off (servers cut ${heard.cuts}), ${broken} connections broken, ` +
    `${refused} POSTs refused, ${streams} TCP connections and WebSockets whole, ${torn} torn, ` +
    `memory ${before.memory.toFixed(0)} to ${
      after.memory.toFixed(0)
    } MiB, open files ${before.files} to ${after.files}`;
  console.log(line);
  assert.ok(whole > 100 && streams > 20, line);
  assert.equal(heard.said, "", "what the servers say is wrong");
  assert.deepEqual(wrong, [], "answers that are wrong");
  assert.deepEqual(twice, [], "POSTs that came twice");
  assert.ok(cut <= heard.cuts + ASKING * (counts.kill + counts.pause + counts.worker), line);
  assert.ok(broken <= ASKING * counts.worker, line);
  assert.ok(refused <= heard.cuts + ASKING * (counts.kill + counts.pause + counts.slow), line);
  assert.ok(torn <= heard.cuts + STREAMS * (counts.kill + counts.pause + 2 * counts.worker), line);
  assert.match(err, /requests in flight: 0\n/, "in flight at the end");
  assert.doesNotMatch(err.replaceAll(/error: a worker has ended.*/g, ""), /error: /, "what the program reports");
  assert.ok(after.files <= before.files + 4, line);
  assert.ok(after.memory < before.memory + 150, line);
}

if (process.argv[1] === SELF && process.argv[2] === "serve") {
  const [port = 0, port2 = 0, seed = 0] = process.argv.slice(3).map(Number);
  await serve(port, port2, seed);
} else if (process.argv[1] === SELF) {
  const text = { type: "string" } as const;
  const { values } = parseArgs({ options: { seconds: text, seed: text, workers: text } });
  const seed = Number(values.seed ?? Date.now() % 1e6);
  console.log(`--seed ${seed}: the same once more`);
  judge(await chaos({ seconds: Number(values.seconds ?? 60), seed, workers: Number(values.workers ?? 1) }));
  process.exit(0);
}
