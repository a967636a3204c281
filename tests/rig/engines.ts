// What the tests of fleets share: real etcd (Debian's etcd-server) on free ports of this machine, instances of lb.ts that
// may run on different runtimes, and servers whose health can be switched.

import assert from "node:assert/strict";
import type { ChildProcess } from "node:child_process";
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer, request as httpRequest, type Server } from "node:http";
import { request as httpsRequest } from "node:https";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { hasEnded, spawnGuarded } from "./guard.ts";
import { COMMAND, freePort, makeFolder, patience, type Runtime, runtime, sleep, until } from "./rig.ts";

const ETCD = "/usr/bin/etcd";
/** Why tests over etcd cannot run here; false: they can. */
export const skip: string | false = existsSync(ETCD) ? false : `${ETCD} is missing: apt-get install etcd-server`;

// deno-lint-ignore no-explicit-any
export type Loose = any;
/** What a test ends with, the last first. */
export interface Ends {
  after(end: () => unknown): void;
}

/** A child's own `kill` does something once only, on Deno. */
function send({ pid = 0 }: ChildProcess, signal: "SIGSTOP" | "SIGCONT" | "SIGTERM" | "SIGKILL"): void {
  try {
    process.kill(pid, signal);
  } catch { /* it has ended */ }
}
const exited = (child: ChildProcess) => new Promise<void>((resolve) => child.once("exit", () => resolve()));
const base64 = (text: string) => Buffer.from(text).toString("base64");

/** One request with a JSON body; its answer as JSON, where it is. */
export function ask(
  url: string,
  { method = "GET", body, headers = {} }: { method?: string; body?: unknown; headers?: Record<string, string> } = {},
): Promise<{ status: number; json: Loose; text: string; headers: Loose }> {
  return new Promise((resolve, reject) => {
    const sent = body === undefined ? "" : JSON.stringify(body);
    const type: Record<string, string> = sent ? { "content-type": "application/json" } : {};
    const more = { ...type, "content-length": String(Buffer.byteLength(sent)), ...headers };
    const send = url.startsWith("https:") ? httpsRequest : httpRequest;
    const request = send(url, { method, headers: more, agent: false, rejectUnauthorized: false }, (answer) => {
      const pieces: Buffer[] = [];
      answer.on("data", (bytes: Buffer) => pieces.push(bytes));
      answer.on("error", reject);
      answer.on("end", () => {
        const text = Buffer.concat(pieces).toString();
        let json: unknown;
        try {
          json = JSON.parse(text);
        } catch { /* YAML, say */ }
        resolve({ status: answer.statusCode ?? 0, json, text, headers: answer.headers });
      });
    });
    request.on("error", reject);
    request.setTimeout(30_000, () => request.destroy(new Error(`no answer: ${url}`)));
    request.end(sent);
  });
}

export interface Cluster {
  urls: string[];
  kill(i: number): Promise<void>;
  start(i: number): Promise<void>;
  freeze(i: number): void;
  resume(i: number): void;
  /** Forgets all data of a single member, while it does not run. */
  wipe(): void;
  data: string;
  call(path: string, body: Loose, i?: number, token?: string): Promise<Loose>;
  put(key: string, value: string): Promise<number>;
  get(key: string): Promise<string | undefined>;
  keys(prefix?: string): Promise<Map<string, { value: string; revision: number }>>;
  remove(key: string): Promise<void>;
  leader(): Promise<number>;
}

/** Starts a cluster of etcd, until the test ends. */
export async function startEtcd(t: Ends, count = 1, own?: { cert: string; key: string }): Promise<Cluster> {
  const memory = "/dev/shm", folder = existsSync(memory) ? memory : tmpdir(); // etcd waits for its disk with each write
  const data = mkdtempSync(join(folder, "lb-etcd-")), children: (ChildProcess | undefined)[] = [];
  const logs: string[] = Array.from({ length: count }, () => "");
  const ports: number[] = [];
  for (let i = 0; i < 2 * count; i++) ports.push(await freePort());
  const url = (i: number) => `http${own ? "s" : ""}://127.0.0.1:${ports[i]}`;
  const peer = (i: number) => `http://127.0.0.1:${ports[count + i]}`;
  const members = Array.from({ length: count }, (_, i) => `m${i}=${peer(i)}`).join(",");
  const call: Cluster["call"] = async (path, body, i = 0, token) =>
    (await ask(`${url(i)}/v3/${path}`, { method: "POST", body, ...token ? { headers: { authorization: token } } : {} }))
      .json;
  const isUp = async (i: number) => {
    for (const end = Date.now() + patience(20_000);; await sleep(50)) {
      const answer = await call("kv/range", { key: base64("up") }, i).catch(() => undefined);
      if (answer?.header) return;
      assert.ok(Date.now() < end, `etcd does not start:\n${logs[i]!.slice(-2000)}`);
    }
  };
  const launch = (i: number) => {
    const args = ["--name", `m${i}`, "--data-dir", join(data, `m${i}`), "--enable-v2=false"];
    args.push("--listen-client-urls", url(i), "--advertise-client-urls", url(i));
    args.push("--listen-peer-urls", peer(i), "--initial-advertise-peer-urls", peer(i), "--initial-cluster", members);
    if (own) args.push("--cert-file", own.cert, "--key-file", own.key);
    args.push("--heartbeat-interval", "50", "--election-timeout", "500");
    const child = children[i] = spawnGuarded(ETCD, args, { stdout: "ignore" });
    child.stderr.on("data", (bytes: Buffer) => logs[i] = logs[i]! + bytes);
  };
  const cluster: Cluster = {
    urls: Array.from({ length: count }, (_, i) => url(i)),
    data,
    async kill(i) {
      const child = children[i];
      children[i] = undefined;
      if (!child || hasEnded(child)) return;
      const over = exited(child);
      send(child, "SIGCONT");
      send(child, "SIGKILL");
      await over;
    },
    async start(i) {
      launch(i);
      await isUp(i);
    },
    freeze: (i) => send(children[i]!, "SIGSTOP"),
    resume: (i) => send(children[i]!, "SIGCONT"),
    wipe: () => rmSync(join(data, "m0"), { recursive: true, force: true }),
    call,
    async put(key, value) {
      const { header } = await call("kv/put", { key: base64(key), value: base64(value) });
      return Number(header.revision);
    },
    async get(key) {
      const { kvs } = await call("kv/range", { key: base64(key) });
      return kvs && Buffer.from(kvs[0].value ?? "", "base64").toString();
    },
    async keys(prefix = "lb/") {
      const end = prefix.slice(0, -1) + String.fromCharCode(prefix.charCodeAt(prefix.length - 1) + 1);
      const { kvs = [] } = await call("kv/range", { key: base64(prefix), range_end: base64(end) });
      const text = (value: string) => Buffer.from(value ?? "", "base64").toString();
      return new Map(
        kvs.map((kv: Loose) => [text(kv.key), { value: text(kv.value), revision: Number(kv.mod_revision) }]),
      );
    },
    async remove(key) {
      await call("kv/deleterange", { key: base64(key) });
    },
    async leader() {
      const all = await Promise.all(cluster.urls.map((_, i) => call("maintenance/status", {}, i)));
      return all.findIndex(({ leader, header }) => leader === header.member_id);
    },
  };
  for (let i = 0; i < count; i++) launch(i);
  t.after(async () => {
    for (let i = 0; i < count; i++) await cluster.kill(i);
    rmSync(data, { recursive: true, force: true });
  });
  await Promise.all(cluster.urls.map((_, i) => isUp(i)));
  return cluster;
}

export interface Instance {
  name: string;
  port: number;
  admin: string; // its URL
  file: string;
  child: ChildProcess;
  output(): string;
  /** Asks its API. */
  ask(operation: string, body?: unknown, headers?: Record<string, string>): ReturnType<typeof ask>;
  fleet(): Promise<Loose>;
  text(): string; // of its file
  freeze(): void;
  resume(): void;
  stop(signal?: "SIGTERM" | "SIGKILL"): Promise<void>;
}

const ROOT = fileURLToPath(new URL("../..", import.meta.url));
const programOf = (where: Runtime) => where === runtime() ? process.execPath : join(ROOT, "node_modules/.bin", where);

/** Starts an instance of lb.ts, until the test ends. `fleet` is put in front of the text of its file. */
export async function startInstance(
  t: Ends,
  name: string,
  fleet: Record<string, unknown>,
  { rest = "", where = runtime(), env = {}, args = [], file, listens = true }: {
    rest?: string;
    where?: Runtime;
    env?: Record<string, string>;
    args?: string[];
    file?: string;
    listens?: boolean; // wait until it does
  } = {},
): Promise<Instance> {
  const folder = makeFolder(), path = file ?? join(folder, "routes.yml");
  if (!file) writeFileSync(path, `fleet: ${JSON.stringify({ name: "${NAME}", ...fleet })}\n${rest}`);
  const child = spawnGuarded(
    programOf(where),
    [...COMMAND[where], "-c", path, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--drain", "1s", ...args],
    { cwd: ROOT, env: { ...process.env, NO_COLOR: "1", NAME: name, ...env } },
  );
  let output = "", isOver = false;
  child.stdout.on("data", (bytes: Buffer) => output += bytes);
  child.stderr.on("data", (bytes: Buffer) => output += bytes);
  const over = exited(child).then(() => isOver = true);
  const found = (pattern: RegExp) => Number(pattern.exec(output)?.[1] ?? 0);
  const one: Instance = {
    name,
    get port() {
      return found(/listening on http:\/\/127\.0\.0\.1:(\d+)/);
    },
    get admin() {
      return `http://127.0.0.1:${found(/admin on http:\/\/127\.0\.0\.1:(\d+)/)}`;
    },
    file: path,
    child,
    output: () => output,
    ask(operation, body, headers = {}) {
      const [method = "", path = ""] = operation.split(" ");
      return ask(one.admin + path, { method, body, headers });
    },
    fleet: async () => (await one.ask("GET /fleet")).json,
    text: () => readFileSync(path, "utf8"),
    freeze: () => send(child, "SIGSTOP"),
    resume: () => send(child, "SIGCONT"),
    async stop(signal = "SIGTERM") {
      if (!isOver) {
        send(child, "SIGCONT");
        send(child, signal);
      }
      const killer = setTimeout(() => child.kill("SIGKILL"), 8_000);
      await over;
      clearTimeout(killer);
    },
  };
  t.after(async () => {
    await one.stop("SIGKILL");
    rmSync(folder, { recursive: true, force: true });
  });
  if (!listens) return one;
  await until(`${name} listens or ends`, () => isOver || one.port > 0, 30_000);
  assert.ok(!isOver, `${name} has ended:\n${output}`);
  return one;
}

/** Looks until something that has to be asked for is so: every 20 ms at first, and less often the longer it takes. */
export async function eventually<T>(
  what: string,
  look: () => Promise<T | undefined | false>,
  within = 15_000,
): Promise<T> {
  within = patience(within);
  for (let pause = 20, end = Date.now() + within;; pause = Math.min(pause * 1.1, 200)) {
    const seen = await look().catch((error) => {
      if (Date.now() > end) throw error;
      return undefined;
    });
    if (seen) return seen;
    assert.ok(Date.now() < end, `did not happen within ${within} ms: ${what}`);
    await sleep(pause);
  }
}

export interface Backend {
  address: string;
  url: string;
  isUp: boolean;
  /** Probes by the instance that made them; others are requests. */
  probes: number;
  close(): Promise<void>;
}

/** A server whose /health can be switched, until the test ends. */
export async function startBackend(t: Ends, name: string): Promise<Backend> {
  const server: Server = createServer((request, response) => {
    const isProbe = request.url === "/health";
    if (isProbe) one.probes++;
    response.statusCode = isProbe && !one.isUp ? 503 : 200;
    response.end(name);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const address = `127.0.0.1:${(server.address() as AddressInfo).port}`;
  const one: Backend = {
    ...{ address, url: `http://${address}`, isUp: true, probes: 0 },
    close() {
      server.closeAllConnections?.();
      return new Promise((resolve) => server.close(() => resolve()));
    },
  };
  t.after(() => one.close());
  return one;
}
