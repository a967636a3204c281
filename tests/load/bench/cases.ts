// The cases: what is sent to whom, and what is compared.
import { existsSync } from "node:fs";
import { connect, type Socket } from "node:net";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { MEBIBYTE, type Setup, SMALL_ANSWER } from "./contestants.ts";
import { ALL_CORES, BALANCER_CORE, cpuOf, LOAD_CORE, memoryOf, type Program, start } from "./processes.ts";
import { type Fault, openLoop } from "./tail.ts";

const digits = (value: number) => value >= 100 ? Math.round(value).toLocaleString("en") : value.toPrecision(3);

/** What is measured in a burst, and how it is shown: the title of its column, its text. */
export const FIGURES = {
  success: ["within 1 s", (share: number) => `${(share * 100).toFixed(2)} %`], // share of the requests
  rps: ["requests/s", digits],
  p50: ["p50 ms", digits],
  p99: ["p99 ms", digits],
  p999: ["p99.9 ms", digits],
  cpu: ["CPU µs/request", digits],
  peak: ["peak MiB", digits],
  idle: ["KiB/connection", (kib: number) => kib.toFixed(1)],
  errors: ["errors", String],
} satisfies Record<string, [title: string, text: (value: number) => string]>;
export type Figures = Partial<Record<keyof typeof FIGURES, number>>;

/** A column with the median over rounds of what `of` makes of two bursts of the same round. */
export interface Comparison {
  title: string;
  of(mine: Required<Figures>, other: Required<Figures>): number;
}

export interface Case {
  about: string;
  setups: Setup[];
  compare: Comparison[]; // to haproxy; where there are several setups, to the same contestant in the first one
  cores: string; // of the contestants
  anew: boolean; // contestants are started for every round
  warmUp: number; // bursts between the start and the first that counts
  tail: boolean; // the servers are those of tail.ts
  measure(running: Running, seconds: number): Promise<Figures>;
}

export interface Running {
  program: Program;
  port: number;
  setup: Setup;
}

// --- Measurements ---

const SMALL = { path: "/", method: "GET", body: 0, answer: SMALL_ANSWER.length, connections: 64, header: "A: b" };
type Load = typeof SMALL;
type Report = { requests: number; seconds: number; errors: number };

/** Counts what a contestant spends while `load` runs. */
async function counted(program: Program, load: () => Promise<Report>): Promise<Figures> {
  const before = cpuOf(program);
  const { requests, seconds, ...report } = await load();
  if (requests === 0) throw new Error(`answered nothing: ${program.complaint()}`);
  if (!existsSync(`/proc/${program.pid}`)) throw new Error(`ended under load: ${program.complaint()}`);
  const cpu = (cpuOf(program) - before) / requests;
  return { ...report, rps: requests / seconds, cpu, peak: memoryOf(program, "VmHWM") / 1024 };
}

async function wrk({ port, setup }: Running, duration: number, load: Load): Promise<Report> {
  const url = `${setup.tls ? "https" : "http"}://127.0.0.1:${port}${load.path}`;
  const options = ["-t1", `-c${load.connections}`, `-d${duration}s`, "--timeout", "10s", "-H", load.header];
  const script = ["-s", join(import.meta.dirname!, "wrk.lua"), url, "--", load.method, load.body, setup.routes];
  const run = start(LOAD_CORE, ["wrk", ...options, ...script.map(String)], "pipe");
  const line = /^\{.*\}$/m.exec(await run.output)?.[0];
  if (line === undefined) throw new Error(`wrk: ${run.complaint()}`);
  const { bytes, ...report } = JSON.parse(line) as Report & { bytes: number };
  if (bytes < report.requests * load.answer) throw new Error("responses are too short"); // quick, but wrong
  return report;
}

/** HTTP/2 over 10 connections of 20 streams. h2load gives no percentiles. */
async function h2load({ port }: Running, duration: number, path: string): Promise<Report> {
  const url = `http://127.0.0.1:${port}${path}`;
  const run = start(LOAD_CORE, ["h2load", "-D", `${duration}`, "-c", "10", "-m", "20", url], "pipe"),
    out = await run.output;
  const [, good = "0", failed = "0"] = /(\d+) succeeded, (\d+) failed/.exec(out) ?? [];
  const [, rate = "0"] = /, ([\d.]+) req\/s/.exec(out) ?? [];
  if (!Number(good)) throw new Error(`h2load: ${run.complaint()}${out}`);
  return { requests: Number(good), seconds: Number(good) / Number(rate), errors: Number(failed) };
}

const IDLE_CONNECTIONS = 10_000;

async function measureIdle({ program, port }: Running): Promise<Figures> {
  for (let i = 0; i < 40; i++) { // its heap grows with the first requests, whatever they cost later
    for (const socket of await Promise.all(Array.from({ length: 500 }, () => askOnce(port)))) socket.destroy();
  }
  await sleep(1000);
  const before = memoryOf(program, "VmRSS");
  const sockets: Socket[] = [];
  try {
    while (sockets.length < IDLE_CONNECTIONS) {
      sockets.push(...await Promise.all(Array.from({ length: 50 }, () => askOnce(port))));
    }
    await sleep(1000);
    const idle = (memoryOf(program, "VmRSS") - before) / IDLE_CONNECTIONS;
    return { idle, errors: sockets.filter((socket) => socket.closed || socket.readableEnded).length };
  } finally {
    for (const socket of sockets) socket.destroy();
  }
}

/** Opens a connection that asks once and then does nothing. */
function askOnce(port: number): Promise<Socket> {
  return new Promise((resolve, reject) => {
    const socket = connect(port, "127.0.0.1", () => socket.write("GET / HTTP/1.1\r\nHost: idle.test\r\n\r\n"));
    socket.once("data", () => resolve(socket));
    socket.on("error", () => reject(new Error("refuses connections")));
    socket.on("close", () => reject(new Error("closes connections that have asked once")));
  });
}

async function measureTail({ program, port }: Running, seconds: number, fault: Fault): Promise<Figures> {
  await openLoop(port, 2 * seconds, "none");
  return await counted(program, () => openLoop(port, 6 * seconds, fault));
}

// --- The table ---

const PLAIN: Setup = { title: "", servers: 3, strategy: "round-robin", routes: 0, tls: false };
const timesRequests: Comparison = { title: "× requests/s", of: (mine, other) => mine.rps / other.rps };
const timesCpu: Comparison = { title: "× CPU", of: (mine, other) => mine.cpu / other.cpu };
const addedLatency: Comparison = { title: "µs added", of: (mine, other) => (mine.p50 - other.p50) * 1000 };
const coresUsed: Comparison = { title: "cores used", of: (mine) => mine.cpu * mine.rps / 1e6 };

const byWrk = (about: string, load: Partial<Load>, rest: Partial<Case> = {}): Case => ({
  about,
  setups: [PLAIN],
  compare: [timesRequests, timesCpu],
  cores: BALANCER_CORE,
  ...{ anew: false, warmUp: 2, tail: false },
  measure: (running, seconds) => counted(running.program, () => wrk(running, seconds, { ...SMALL, ...load })),
  ...rest,
});

/** Setups are changes of the plain one by their titles. */
const inSetups = (about: string, setups: Record<string, Partial<Setup>>, rest: Partial<Case> = {}): Case => {
  const entries = Object.entries(setups);
  return byWrk(about, {}, { setups: entries.map(([title, setup]) => ({ ...PLAIN, title, ...setup })), ...rest });
};

const overHttp2 = (about: string, path: string): Case =>
  byWrk(about, {}, {
    setups: [{ ...PLAIN, h2: true }],
    measure: (running, seconds) => counted(running.program, () => h2load(running, seconds, path)),
  });

const EWMA = { servers: 11, strategy: "peak-ewma" };
const tail = (fault: Fault, what: string): Case => {
  const setups = { "": EWMA, "hedge": { ...EWMA, service: { hedge: "p95" } } };
  const measure = (running: Running, seconds: number) => measureTail(running, seconds, fault);
  const about = `11 servers, 500 requests/s in an open loop; for a third of the time the first server ${what}`;
  return inSetups(about, setups, { compare: [], anew: true, warmUp: 0, tail: true, measure });
};

export const CASES: Record<string, Case> = {
  small: byWrk("GET, 20-byte answer, 64 connections", {}),
  one: byWrk("small over 1 connection; µs added to the p50 of haproxy", { connections: 1 }, {
    compare: [addedLatency, timesCpu],
  }),
  big: byWrk("GET, 1 MiB answer, 16 connections", { path: "/big", answer: MEBIBYTE, connections: 16 }),
  upload: byWrk("POST of 1 MiB, 16 connections", { path: "/upload", method: "POST", body: MEBIBYTE, connections: 16 }),
  close: byWrk("small, every request over a new connection", { header: "Connection: close" }),
  tls: byWrk("small over TLS", {}, { setups: [{ ...PLAIN, tls: true }] }),
  h2: overHttp2("GET, 20-byte answer, over HTTP/2, 10 connections of 20 streams", "/"),
  h2big: overHttp2("GET, 1 MiB answer, over HTTP/2, 10 connections of 20 streams", "/big"),
  log: inSetups("small with an access log to /dev/null, compared to none", {
    off: { args: ["--log", "off"] },
    combined: { args: ["--log", "combined"] },
    json: { args: ["--log", "json"] },
  }),
  routes: inSetups("small with so many hosts and as many paths, compared to 1", {
    "1 route": { routes: 1 },
    "1,000 routes": { routes: 1000 },
  }),
  servers: inSetups("small with so many servers in one service, compared to 3", {
    "3 servers": { servers: 3 },
    "1,000 servers": { servers: 1000 },
  }),
  workers: inSetups("small with two workers on all cores, compared to one", {
    "1 worker": { args: ["--workers", "1"] },
    "2 workers": { args: ["--workers", "2"] },
  }, { compare: [timesCpu, coresUsed], cores: ALL_CORES, anew: true }), // no two processes are compiled alike
  idle: byWrk(
    "memory of 10,000 connections that have asked once, beyond that of a program which has served 20,000",
    {},
    {
      ...{ compare: [], anew: true, warmUp: 0, measure: measureIdle },
    },
  ),
  "tail-slow": tail("slow", "takes 2 s"),
  "tail-failing": tail("failing", "answers 503 at once"),
  "tail-half": tail("half", "answers every other request with 503"),
  "tail-slower": tail("slower", "takes 30 ms more"),
};
