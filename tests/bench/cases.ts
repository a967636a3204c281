// The cases: which variants each has, who can take part, and how one contestant is measured once.
import {
  type Contestant,
  NGINX_COMMON,
  NGINX_HTTP,
  nginxFolder,
  type Setup,
  STRATEGIES,
  type Strategy,
} from "./contestants.ts";
import {
  BALANCER_CORE,
  type Child,
  type Cores,
  cpuOf,
  findProgram,
  freePorts,
  listening,
  LOAD_CORE,
  memoryOf,
  needProgram,
  run,
  Skip,
  start,
  stop,
} from "./processes.ts";
import { writeFileSync } from "node:fs";
import { connect, type Socket } from "node:net";
import { join } from "node:path";
import process from "node:process";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";

/** Times in ms, cpu in microseconds per request, memory in bytes, shares from 0 to 1. */
export type Figures = {
  rps: number;
  p50: number;
  p99: number;
  p999?: number;
  success?: number;
  errors: number;
  cpu: number;
  peak: number;
  idle?: number;
};

export type Pace = { warmUp: number; seconds: number };

export type Variant = {
  title: string;
  servers: number;
  strategy: Strategy;
  routes: number;
  keys?: object; // of the service, which only lb.ts has
  fault?: string;
};

export type Case = {
  name: string;
  about: string;
  variants: Variant[];
  takes: (contestant: Contestant, variant: Variant) => boolean;
  measure: (contestant: Contestant, variant: Variant, pace: Pace) => Promise<Figures>;
  /** Seconds of one measurement beside starting and stopping. */
  lasts: (pace: Pace) => number;
};

const MEBIBYTE = 1 << 20;
const SMALL_BODY = "twenty bytes of text";
const IDLE_CONNECTIONS = 2000 - 64;
const plain: Variant = { title: "", servers: 3, strategy: "round-robin", routes: 0 };

// ---- Servers behind the balancer: one nginx that listens on as many ports as there are servers.

const serversByCount = new Map<number, string[]>();

export async function serversFor(count: number, cores: Cores = LOAD_CORE): Promise<string[]> {
  const known = serversByCount.get(count);
  if (known !== undefined) return known;
  const ports = await freePorts(count);
  const folder = nginxFolder(ports[0]!);
  writeFileSync(join(folder, "big"), Buffer.alloc(MEBIBYTE, "x"));
  const config = join(folder, "nginx.conf");
  // `return` answers before the body has come. /upload has the body read first: mirror needs all of it.
  writeFileSync(
    config,
    `master_process off; ${NGINX_COMMON(folder)}
http { ${NGINX_HTTP(folder)}
  keepalive_timeout 1h; open_file_cache max=10; default_type text/plain; client_body_buffer_size 2m;
  server {
    ${ports.map((port) => `listen 127.0.0.1:${port} backlog=4096;`).join("\n    ")}
    location / { return 200 "${SMALL_BODY}"; }
    location = /big { root ${folder}; }
    location = /upload { mirror /sink; root ${folder}; error_page 405 404 =200 /; }
    location = /sink { internal; return 204; }
  }
}`,
  );
  const child = start(cores, [needProgram("nginx"), "-p", folder, "-e", "stderr", "-c", config]);
  await listening(child, ports.at(-1)!);
  const servers = ports.map((port) => `127.0.0.1:${port}`);
  serversByCount.set(count, servers);
  return servers;
}

// ---- One measurement

type Running = { child: Child; port: number };

/** Starts a contestant on a free port, and ends it whatever happens. */
async function withContestant<T>(
  contestant: Contestant,
  setup: Omit<Setup, "port">,
  use: (running: Running) => Promise<T>,
): Promise<T> {
  const [port = 0] = await freePorts(1);
  const child = start(BALANCER_CORE, contestant.command({ ...setup, port }));
  await listening(child, port);
  try {
    return await use({ child, port });
  } finally {
    await stop(child);
  }
}

type Load = { path: string; method?: string; body?: number; answer: number; connections: number };
type Report = { requests: number; seconds: number; p50: number; p99: number; errors: number };

export async function wrk(
  port: number,
  seconds: number,
  load: Load,
  routes: number,
  cores: Cores = LOAD_CORE,
): Promise<Report> {
  const { path, method = "GET", body = 0, connections } = load;
  const script = join(import.meta.dirname ?? ".", "wrk.lua");
  const options = ["-t1", `-c${connections}`, `-d${seconds}s`, "--timeout", "10s", "--latency", "-s", script];
  const url = `http://127.0.0.1:${port}${path}`;
  const printed = await run(cores, [needProgram("wrk"), ...options, url, "--", method, `${body}`, `${routes}`]);
  const line = printed.split("\n").find((line) => line.startsWith("{"));
  if (line === undefined) throw new Skip(`wrk printed no figures: ${printed.trim().split("\n").at(-1) ?? ""}`);
  return JSON.parse(line) as Report;
}

/** A contestant that answers quickly but wrongly gets no figures. */
async function checkAnswer(port: number, { path, method = "GET", body, answer }: Load): Promise<void> {
  const init = { method, ...(body === undefined ? {} : { body: "x".repeat(body) }) };
  const response = await fetch(`http://127.0.0.1:${port}${path}`, { ...init, signal: AbortSignal.timeout(10_000) })
    .catch((error: Error) => error);
  if (response instanceof Error) throw new Skip(`answers nothing: ${response.message}`);
  const length = (await response.arrayBuffer()).byteLength;
  if (response.status !== 200 || length !== answer) {
    throw new Skip(`answers ${response.status} with ${length} bytes instead of 200 with ${answer}`);
  }
}

/** Counts what the balancer spends while `load` runs. */
export async function counted(child: Child, load: () => Promise<Report>): Promise<Figures & Report> {
  const before = cpuOf(child.pid);
  const report = await load();
  const cpu = (cpuOf(child.pid) - before) / Math.max(1, report.requests);
  const peak = memoryOf(child.pid, "VmHWM");
  if (peak === 0) throw new Skip(`ended under load: ${child.complaint() || "no message"}`);
  return { ...report, rps: report.requests / report.seconds, cpu, peak };
}

async function measureWrk(contestant: Contestant, variant: Variant, pace: Pace, load: Load): Promise<Figures> {
  const setup = { ...variant, servers: await serversFor(variant.servers) };
  return await withContestant(contestant, setup, async ({ child, port }) => {
    await checkAnswer(port, load);
    await wrk(port, pace.warmUp, load, variant.routes);
    return await counted(child, () => wrk(port, pace.seconds, load, variant.routes));
  });
}

// ---- many: the memory of connections that have asked once and then do nothing

async function measureMany(contestant: Contestant, variant: Variant, pace: Pace): Promise<Figures> {
  const load = { path: "/", answer: SMALL_BODY.length, connections: 64 };
  const setup = { ...variant, servers: await serversFor(variant.servers) };
  return await withContestant(contestant, setup, async ({ child, port }) => {
    await wrk(port, pace.warmUp, load, 0); // so that what the first load needs is not counted as the connections'
    await sleep(500);
    const before = memoryOf(child.pid, "VmRSS");
    const sockets: Socket[] = [];
    try {
      while (sockets.length < IDLE_CONNECTIONS) {
        const batch = Array.from({ length: Math.min(64, IDLE_CONNECTIONS - sockets.length) }, () => askOnce(port));
        sockets.push(...await Promise.all(batch));
      }
      await sleep(500);
      const idle = (memoryOf(child.pid, "VmRSS") - before) / IDLE_CONNECTIONS;
      const figures = await counted(child, () => wrk(port, pace.seconds, load, 0));
      const lost = sockets.filter((socket) => socket.closed || socket.readableEnded).length;
      return { ...figures, idle, errors: figures.errors + lost };
    } finally {
      for (const socket of sockets) socket.destroy();
    }
  });
}

function askOnce(port: number): Promise<Socket> {
  return new Promise((resolve, reject) => {
    const socket = connect(port, "127.0.0.1", () => socket.write("GET / HTTP/1.1\r\nHost: idle.test\r\n\r\n"));
    socket.once("data", () => resolve(socket));
    socket.on("error", () => reject(new Skip("refuses some of the connections")));
    socket.on("close", () => reject(new Skip("closes connections that have asked once")));
  });
}

// ---- tail: the helper process with the servers and the open loop

type Tail = { servers: string[]; run: (order: object) => Promise<Report & Partial<Figures>> };
let tail: Promise<Tail> | undefined;

async function startTail(): Promise<Tail> {
  const node = findProgram("node");
  const script = join(import.meta.dirname ?? ".", "tail.ts");
  const runtime = node === undefined ? [process.execPath, ..."Deno" in globalThis ? ["run", "-A"] : []] : [node];
  const child = start(LOAD_CORE, [...runtime, script]);
  const { stdin, stdout } = child.process;
  if (stdin === null || stdout === null) throw new Error("the helper of tail has no pipes");
  const lines = createInterface({ input: stdout })[Symbol.asyncIterator]();
  const answer = async () => {
    const { value, done } = await lines.next();
    if (done) throw new Skip(`the helper of tail ended: ${child.complaint()}`);
    return JSON.parse(value);
  };
  const servers = (await answer() as number[]).map((port) => `127.0.0.1:${port}`);
  return {
    servers,
    run(order) {
      stdin.write(JSON.stringify(order) + "\n");
      return answer();
    },
  };
}

async function measureTail(contestant: Contestant, variant: Variant, pace: Pace): Promise<Figures> {
  const helper = await (tail ??= startTail());
  return await withContestant(contestant, { ...variant, servers: helper.servers }, async ({ child, port }) => {
    await helper.run({ port, seconds: pace.warmUp, fault: "none" });
    return await counted(child, () => helper.run({ port, seconds: 2 * pace.seconds, fault: variant.fault }));
  });
}

// ---- The table

const everyone = () => true;
const hasStrategy = (contestant: Contestant, { strategy }: Variant) => contestant.strategies[strategy] !== undefined;
const byWrk = (load: Load) => ({
  measure: (contestant: Contestant, variant: Variant, pace: Pace) => measureWrk(contestant, variant, pace, load),
  lasts: (pace: Pace) => pace.warmUp + pace.seconds,
});

export const small: Load = { path: "/", answer: SMALL_BODY.length, connections: 64 };

export const CASES: Case[] = [
  { name: "small", about: "GET, 20-byte answer, 64 connections", variants: [plain], takes: everyone, ...byWrk(small) },
  {
    name: "one",
    about: "the same over 1 connection: the latency added",
    variants: [plain],
    takes: everyone,
    ...byWrk({ ...small, connections: 1 }),
  },
  {
    name: "big",
    about: "GET, 1 MiB answer, 16 connections",
    variants: [plain],
    takes: everyone,
    ...byWrk({ path: "/big", answer: MEBIBYTE, connections: 16 }),
  },
  {
    name: "upload",
    about: "POST of 1 MiB, 16 connections",
    variants: [plain],
    takes: everyone,
    ...byWrk({ path: "/upload", method: "POST", body: MEBIBYTE, answer: SMALL_BODY.length, connections: 16 }),
  },
  {
    name: "many",
    about: `small with ${IDLE_CONNECTIONS} more connections that have asked once and stay open`,
    variants: [plain],
    takes: everyone,
    measure: measureMany,
    lasts: (pace) => pace.warmUp + pace.seconds + 2,
  },
  {
    name: "routes",
    about: "small with as many hosts and as many paths, asked for in turn",
    variants: [1, 1000].map((routes) => ({ ...plain, title: String(routes), routes })),
    takes: (contestant) => contestant.routes,
    ...byWrk({ ...small, path: "/p0/" }),
  },
  {
    name: "servers",
    about: "small with as many servers in one service",
    variants: STRATEGIES.flatMap((strategy) =>
      [3, 1000].map((servers) => ({ ...plain, title: `${strategy}, ${servers}`, servers, strategy }))
    ),
    takes: (contestant, variant) =>
      contestant.kind !== "hono" && contestant.kind !== "npm" && hasStrategy(contestant, variant),
    ...byWrk(small),
  },
  {
    name: "tail",
    about: "11 servers, 500 requests per second in an open loop; the first server misbehaves for a third of the time",
    variants: ["slow", "failing", "failing half", "30 ms slower"].flatMap((fault) => [
      ...(["round-robin", "two-choices", "least-connections", "peak-ewma"] as const).map((strategy) => (
        { ...plain, title: `${fault}, ${strategy}`, servers: 11, strategy, fault }
      )),
      {
        ...{
          ...plain,
          title: `${fault}, peak-ewma and hedge: p95`,
          servers: 11,
          strategy: "peak-ewma" as const,
          fault,
        },
        keys: { hedge: "p95" },
      },
    ]),
    takes: (contestant, variant) =>
      contestant.kind !== "hono" && contestant.kind !== "npm" && hasStrategy(contestant, variant),
    measure: measureTail,
    lasts: (pace) => pace.warmUp + 2 * pace.seconds + 2,
  },
];

export const CASE_NAMES = CASES.map(({ name }) => name);
