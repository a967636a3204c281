// What every strategy makes of servers that are slow, fail or flap: lb.ts itself on a clock that jumps from event to
// event, with a seeded random and servers that exist only as times. No sockets, no waiting: `deno task simulate --help`.

import { existsSync, readFileSync, writeFileSync } from "node:fs";
import process from "node:process";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import {
  createLoadBalancer,
  type Effects,
  type Failure,
  type LoadBalancer,
  parseConfig,
  strategies,
} from "../../lb.ts";
import { requestOf, seeded, TestBytes } from "../rig/rig.ts";
import type { Attempt, HttpResponse } from "../rig/types.ts";

/** What a server does with a request: how long it works on it and what it then answers, or that it refuses to connect. */
export type Work = { status: number; takes: number } | "refused";

/** What a server knows when a request comes. Times are milliseconds since the beginning. */
export interface Asked {
  server: number; // which one, from 0
  at: number;
  share: number; // of the time that has passed, from 0 to 1
  count: number; // how many it has had
  random: () => number;
}

export interface Scenario {
  about: string;
  servers: number;
  workers: number; // requests that a server works on at a time; the others wait there, first come, first served
  rate: number; // requests a second, over all balancers
  seconds: number;
  balancers: number; // each of them sees only its own requests
  keys: string; // of the service, beside its strategy
  work: (asked: Asked) => Work;
}

export interface Figures {
  requests: number;
  attempts: number;
  p50: number;
  p99: number;
  p999: number;
  success: number; // 200 within a second, from 0 to 1
  shares: number[]; // of all attempts, by server
  ejections: number;
}

// ---- Scenarios

const IN_TIME = 1000; // milliseconds
const CLIENTS = 10_000;
const PROBE = 100; // milliseconds between two looks at which probes are due, as in the program
const COLD = 5_000; // milliseconds until a server that has started is warm

const exponential = (mean: number, random: () => number): Work => ({
  status: 200,
  takes: -mean * Math.log(1 - random()),
});
const exponentially = ({ random }: Asked): Work => exponential(10, random);
const usual = ({ random }: Asked): Work => ({ status: 200, takes: 5 + 5 * random() });
const failing: Work = { status: 503, takes: 0 };
/** The first server is the one with the fault, for the middle third of the time: ties are broken by order in its favour. */
const withFault = (fault: (asked: Asked) => Work) => (asked: Asked): Work =>
  asked.server === 0 && asked.share > 1 / 3 && asked.share < 2 / 3 ? fault(asked) : usual(asked);

/** As in the case "tail" of the benchmark. */
const eleven = { servers: 11, workers: 64, rate: 500, seconds: 60, balancers: 1, keys: "" };
/** Two thirds of what the servers can bear. */
const busy = { servers: 10, workers: 2, rate: 1300, seconds: 20, balancers: 1, keys: "" };
const restarted = ({ share, at, server, random }: Asked, seconds: number): Work => {
  if (server > 0 || share < 1 / 4) return exponential(10, random);
  if (share < 1 / 2) return "refused";
  const warm = Math.min(1, (at - seconds * 500) / COLD);
  return exponential(10 + 40 * (1 - warm), random);
};

export const scenarios: Record<string, Scenario> = {
  "equal": { ...busy, about: "10 equal servers, two thirds busy", work: exponentially },
  "slow": { ...eleven, about: "one of 11 takes 2 s", work: withFault(() => ({ status: 200, takes: 2000 })) },
  "slower": {
    ...eleven,
    about: "one of 11 takes 30 ms more",
    work: withFault(({ random }) => ({ status: 200, takes: 35 + 5 * random() })),
  },
  "failing": { ...eleven, about: "one of 11 answers 503 at once", work: withFault(() => failing) },
  "failing half": {
    ...eleven,
    about: "one of 11 answers every second request with 503",
    work: withFault((asked) => asked.count % 2 ? failing : usual(asked)),
  },
  "flapping": {
    ...eleven,
    about: "one of 11 refuses connections for 2 s out of 4",
    work: withFault((asked) => asked.at % 4000 < 2000 ? "refused" : usual(asked)),
  },
  "all failing": {
    ...busy,
    rate: 1000,
    about: "all of 10 servers answer 503 at once: what retries add to it",
    work: () => failing,
  },
  "restart": {
    ...busy,
    seconds: 40,
    about: "one of 10 stops, comes back cold and needs 5 s to be as fast as before",
    work: (asked) => restarted(asked, 40),
  },
  "slow start": {
    ...busy,
    seconds: 40,
    keys: "slow_start: 10s",
    about: "the same with slow_start: 10s",
    work: (asked) => restarted(asked, 40),
  },
  "overload": { ...busy, rate: 2600, about: "10 equal servers get 30 % more than they can bear", work: exponentially },
  "auto limits": {
    ...busy,
    rate: 2600,
    keys: "max_in_flight: auto",
    about: "the same with max_in_flight: auto",
    work: exponentially,
  },
  "thousand": {
    ...busy,
    servers: 1000,
    workers: 1,
    rate: 65_000,
    seconds: 1,
    about: "1,000 equal servers, two thirds busy",
    work: exponentially,
  },
  "ten balancers": {
    ...busy,
    balancers: 10,
    about: "10 equal servers, two thirds busy, behind 10 balancers that know nothing of each other",
    work: exponentially,
  },
};

/** What `strategy:` says for each; hash takes the client's address where there is no such header. */
const written: Record<string, string> = { hash: "{hash: {header: x-key}}" };
export const strategyNames = Object.keys(strategies);

// ---- Events

interface Event {
  at: number;
  order: number; // of those at the same time the first that was planned
  run: () => void;
}

/** A clock and what is going to happen: a heap by time. */
function newTimeline() {
  const heap: Event[] = [];
  let order = 0;
  const before = (a: number, b: number) =>
    heap[a]!.at < heap[b]!.at || heap[a]!.at === heap[b]!.at && heap[a]!.order < heap[b]!.order;
  const swap = (a: number, b: number) => [heap[a], heap[b]] = [heap[b]!, heap[a]!];
  const timeline = {
    now: 0,
    plan(at: number, run: () => void) {
      heap.push({ at, order: order++, run });
      for (let i = heap.length - 1, up; i > 0 && before(i, up = (i - 1) >> 1); i = up) swap(i, up);
    },
    next(): Event | undefined {
      const first = heap[0], last = heap.pop();
      if (first === undefined || last === undefined || first === last) return first;
      heap[0] = last;
      for (let i = 0;;) {
        const left = 2 * i + 1, right = left + 1;
        let least = i;
        if (left < heap.length && before(left, least)) least = left;
        if (right < heap.length && before(right, least)) least = right;
        if (least === i) return first;
        swap(i, least);
        i = least;
      }
    },
  };
  return timeline;
}
type Timeline = ReturnType<typeof newTimeline>;

/** Servers that work on so many requests at a time. */
function newServers({ servers, workers, seconds, work }: Scenario, timeline: Timeline, random: () => number) {
  const pool = Array.from({ length: servers }, () => ({ count: 0, working: 0, queue: [] as (() => void)[] }));
  const body = new TestBytes("");
  const send = (attempt: Attempt): void => {
    const index = Number(attempt.server.name.slice(1).split(":")[0]), server = pool[index]!;
    const at = timeline.now;
    const done = work({ server: index, at, share: at / (seconds * 1000), count: ++server.count, random });
    const deadline = at + attempt.timeouts.response;
    let over = false;
    const end = (why?: Failure, sent = true) => {
      if (over) return;
      over = true;
      attempt.carrier = undefined;
      attempt.onEnd(why, why ?? "", sent);
    };
    if (done === "refused") return end("connect", false);
    attempt.carrier = { cancel: (why) => end(why) }; // another attempt has won
    const answer = () => {
      if (over || timeline.now > deadline) return; // nobody waits for it any more
      attempt.onHead({ status: done.status, reason: "", fields: [], body });
      end();
    };
    if (done.takes === 0) timeline.plan(at, answer);
    else {
      const begin = () =>
        timeline.plan(timeline.now + done.takes, () => {
          answer();
          const next = server.queue.shift();
          if (next) next();
          else server.working--;
        });
      if (server.working === workers) {
        server.queue.push(begin);
        timeline.plan(deadline, () => end("timeout")); // nothing where it has come
      } else server.working++, begin();
    }
  };
  /** A probe, where these are TCP connects. */
  const connect = ({ name }: { name: string }) => {
    const at = timeline.now, share = at / (seconds * 1000), server = Number(name.slice(1).split(":")[0]);
    const refused = work({ server, at, share, count: 0, random: () => 0 }) === "refused";
    return refused ? Promise.reject(new Error("refused")) : Promise.resolve();
  };
  return { pool, send, connect };
}

// ---- One run

function newBalancer(scenario: Scenario, strategy: string, more: string, timeline: Timeline, seed: number) {
  const names = Array.from({ length: scenario.servers }, (_, index) => `"s${index}:1"`);
  const keys = [`strategy: ${written[strategy] ?? strategy}`, scenario.keys, more].filter(Boolean);
  const config = parseConfig(`log: off\ndefault: { servers: [${names}], ${keys.join(", ")} }`);
  return (effects: Pick<Effects, "send" | "connect">): LoadBalancer =>
    createLoadBalancer(config, {
      ...effects,
      now: () => timeline.now,
      date: () => new Date(0),
      random: seeded(seed),
      sleep: (ms, signal) => new Promise((wake) => timeline.plan(timeline.now + ms, () => signal?.aborted || wake())),
      report: () => {},
    });
}

/** Every request of a scenario in turn: they come at random times, at a random balancer, from a random client. */
export async function simulate(scenario: Scenario, strategy: string, more = "", seed = 1): Promise<Figures> {
  const timeline = newTimeline(), random = seeded(seed);
  const servers = newServers(scenario, timeline, seeded(seed + 1_000));
  const balancers = Array.from(
    { length: scenario.balancers },
    (_, index) => newBalancer(scenario, strategy, more, timeline, seed + 2_000 + index)(servers),
  );
  const { block } = requestOf(), times: number[] = [];
  let good = 0;
  const arrive = () => {
    const balancer = balancers[Math.floor(random() * balancers.length)]!;
    const began = timeline.now, client = Math.floor(random() * CLIENTS);
    const respond = ({ status }: HttpResponse) => {
      times.push(timeline.now - began);
      if (status === 200 && timeline.now - began <= IN_TIME) good++;
    };
    balancer.handle(requestOf({ block, peer: `10.0.${client >> 8}.${client & 255}`, respond }));
    const next = timeline.now - Math.log(1 - random()) * 1000 / scenario.rate;
    if (next < scenario.seconds * 1000) timeline.plan(next, arrive);
  };
  const probe = () => {
    for (const balancer of balancers) void balancer.probe();
    if (timeline.now < scenario.seconds * 1000) timeline.plan(timeline.now + PROBE, probe);
  };
  timeline.plan(0, arrive);
  timeline.plan(0, probe);
  for (let event; (event = timeline.next());) {
    timeline.now = event.at;
    event.run();
    for (let i = 0; i < 20; i++) await undefined; // until whoever waited for it has seen it
  }
  const known = balancers.flatMap(({ balancer }) =>
    [...balancer.table.services.values()].flatMap((one) => one.servers)
  );
  const ejections = known.reduce((sum, { ejected }) => sum + ejected, 0);
  return summary(times, good, servers.pool.map(({ count }) => count), ejections);
}

function summary(times: number[], good: number, counts: number[], ejections: number): Figures {
  times.sort((a, b) => a - b);
  const quantile = (q: number) => times[Math.min(times.length - 1, Math.floor(q * times.length))] ?? 0;
  const attempts = counts.reduce((a, b) => a + b, 0);
  return {
    requests: times.length,
    attempts,
    p50: quantile(0.5),
    p99: quantile(0.99),
    p999: quantile(0.999),
    success: good / times.length,
    shares: counts.map((count) => count / attempts),
    ejections,
  };
}

// ---- What is printed

const percent = (share: number, digits: number) => `${(100 * share).toFixed(digits)} %`;
const milliseconds = (value: number) => value >= 100 ? value.toFixed(0) : value.toPrecision(3);
const table = (head: string[], rows: string[][]) =>
  [head, head.map((_, index) => index ? "---:" : "---"), ...rows].map((cells) => `| ${cells.join(" | ")} |`).join("\n");

type Results = Map<string, Map<string, Figures>>;

/** Every figure of one scenario. */
function scenarioTable(results: Map<string, Figures>): string {
  const rows = [...results].map(([strategy, one]) => [
    `\`${strategy}\``,
    percent(one.success, 2),
    ...[one.p50, one.p99, one.p999].map(milliseconds),
    `${percent(Math.min(...one.shares), 1)} .. ${percent(Math.max(...one.shares), 1)}`,
    (one.attempts / one.requests).toFixed(3),
    String(one.ejections),
  ]);
  const head = ["strategy", "within 1 s", "p50 ms", "p99 ms", "p99.9 ms", "share of a server", "attempts", "ejections"];
  return table(head, rows);
}

/** What tells strategies apart, for all scenarios at once: p99.9, or where too few answers came in time, how many did. */
function overview(results: Results): string {
  const strategies = [...[...results.values()][0]?.keys() ?? []];
  const cell = ({ success, p999 }: Figures) => success < 0.9999 ? `**${percent(success, 2)}**` : milliseconds(p999);
  const rows = [...results].map(([name, one]) => [name, ...strategies.map((strategy) => cell(one.get(strategy)!))]);
  return table(["", ...strategies.map((name) => `\`${name}\``)], rows);
}

const detailed = (results: Results) =>
  [...results].map(([name, one]) => `**${name}**: ${scenarios[name]!.about}\n\n${scenarioTable(one)}`).join("\n\n");

// ---- The command

const PAGE = fileURLToPath(new URL("../../docs/strategies.md", import.meta.url));
const BLOCK = /(<!-- simulate -->)[^]*?(<!-- \/simulate -->)/;
const USAGE = `Usage: deno task simulate [options]

  --scenario LIST  of ${Object.keys(scenarios).join(", ")}
  --strategy LIST  of ${strategyNames.join(", ")}
  --keys TEXT      more keys of the service, such as 'eject: off, retries: 0'
  --seed N         another course of chance; default 1
  --docs           also replaces the block between <!-- simulate --> and <!-- /simulate --> in docs/strategies.md
  --lines          reads orders from standard input, a line of JSON each, and answers with figures
  --help`;

function chosen(option: string, list: string | undefined, known: string[]): string[] {
  const names = list?.split(",").map((name) => name.trim()) ?? known;
  const wrong = names.find((name) => !known.includes(name));
  if (wrong !== undefined) throw new Error(`--${option}: "${wrong}" is not one of ${known.join(", ")}`);
  return names;
}

/** One run, as a line of JSON asks for it; `change` are other figures for the scenario. */
export interface Order {
  scenario: string;
  strategy: string;
  change?: Partial<Scenario>;
  keys?: string;
  seed?: number;
}

/** A line of figures for each line of an order, for who wants them in a process of their own. */
async function serveLines(): Promise<void> {
  for await (const line of createInterface({ input: process.stdin })) {
    const { scenario, strategy, change, keys, seed } = JSON.parse(line) as Order;
    console.log(JSON.stringify(await simulate({ ...scenarios[scenario]!, ...change }, strategy, keys, seed)));
  }
}

async function main(args: string[]): Promise<void> {
  const text = { type: "string" } as const, flag = { type: "boolean", default: false } as const;
  const options = { scenario: text, strategy: text, keys: text, seed: text, docs: flag, lines: flag, help: flag };
  const { values } = parseArgs({ args: args.filter((arg) => arg !== "--"), options, strict: true });
  if (values.help) return console.log(USAGE);
  if (values.lines) return await serveLines();
  const results: Results = new Map();
  for (const name of chosen("scenario", values.scenario, Object.keys(scenarios))) {
    const row = new Map<string, Figures>();
    results.set(name, row);
    for (const strategy of chosen("strategy", values.strategy, strategyNames)) {
      row.set(strategy, await simulate(scenarios[name]!, strategy, values.keys, Number(values.seed ?? 1)));
    }
    console.log(`${detailed(new Map([[name, row]]))}\n`);
  }
  console.log(overview(results));
  if (!values.docs || !existsSync(PAGE)) return;
  const block = `${overview(results)}\n\n<details>\n<summary>All figures</summary>\n\n${
    detailed(results)
  }\n\n</details>`;
  writeFileSync(
    PAGE,
    readFileSync(PAGE, "utf8").replace(BLOCK, (_, open, close) => `${open}\n\n${block}\n\n${close}`),
  );
}

if (import.meta.main) {
  try {
    await main(process.argv.slice(2));
  } catch (error) {
    console.error(`${error instanceof Error ? error.message : error}\n\n${USAGE}`);
    process.exitCode = 2;
  }
}
