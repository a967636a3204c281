// How fast lb.ts is beside its peers: deno task bench --help
// All contestants of a case run at once on core 0 and get short bursts in turn from core 1, where the servers are too.
// A figure is the median over rounds, a ratio the median of the ratios within a round: a noisy machine meets all alike.
import { spawnSync } from "node:child_process";
import { writeFileSync } from "node:fs";
import { availableParallelism } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { parseArgs } from "node:util";
import { type Case, CASES, FIGURES, type Figures, type Running } from "./cases.ts";
import { type Contestant, CONTESTANTS, type Setup, startServers } from "./contestants.ts";
import { cleanUp, freePorts, listening, LOAD_CORE, start, versionOf } from "./processes.ts";
import { startTailServers } from "./tail.ts";

const NAMES = CONTESTANTS.map(({ name }) => name);
const USAGE = `Usage: deno task bench [case ...] [options]

Cases: ${Object.keys(CASES).join(", ")};
"tail" is all four of them; default all

  --rounds N         bursts for each contestant; default 9 (tail: at most 3)
  --seconds N        length of a burst; default 1 (tail: 6 times that)
  --only LIST        of ${NAMES.join(",")} (node, bun, deno: lb.ts there);
                     default all but caddy; haproxy always takes part
  --strategy NAME    of lb.ts instead of round-robin (peers: least connections); not for tail
  --results          also writes tests/load/bench/RESULTS.md
  --help`;

function readOptions() {
  const text = { type: "string" } as const, flag = { type: "boolean", default: false } as const;
  const options = { rounds: text, seconds: text, only: text, strategy: text, results: flag, help: flag };
  const { values, positionals } = parseArgs({ options, allowPositionals: true });
  const { rounds = "9", seconds = "1", strategy = "round-robin", results, help } = values;
  const only = values.only?.split(",") ?? NAMES.filter((name) => name !== "caddy");
  const named = (wanted: string) => Object.keys(CASES).filter((name) => `${name}-`.startsWith(`${wanted}-`));
  const unknown = [
    ...positionals.filter((wanted) => named(wanted).length === 0),
    ...only.filter((name) => !NAMES.includes(name)),
    ...[rounds, seconds].filter((number) => !/^[1-9]\d{0,2}$/.test(number)),
  ];
  if (unknown.length > 0) throw new Error(`what is "${unknown.join('", "')}"?`);
  const cases = positionals.length > 0 ? positionals.flatMap(named) : Object.keys(CASES);
  const contestants = CONTESTANTS.filter(({ name }) => name === "haproxy" || only.includes(name));
  return { cases, contestants, rounds: Number(rounds), seconds: Number(seconds), strategy, results, help };
}
type Options = ReturnType<typeof readOptions>;

// --- Measuring ---

/** A contestant in one setup, and its figures in each round. `note` says why there are no more. */
interface Arm {
  contestant: Contestant;
  setup: Setup;
  running?: Running;
  rounds: Figures[];
  note?: string;
}

async function measure(name: string, one: Case, servers: string[], options: Options): Promise<Arm[]> {
  const rounds = one.tail ? Math.min(3, options.rounds) : options.rounds;
  const arms = options.contestants.flatMap((contestant) => {
    const setups = one.setups.filter(({ args, service }) => contestant.lb || !args && !service);
    return setups.map((setup): Arm => ({ contestant, setup, rounds: [] }));
  });
  for (let round = 1; round <= rounds; round++) {
    if (process.stderr.isTTY) process.stderr.write(`\r\x1b[K${name}, round ${round} of ${rounds}\r`);
    if (one.anew || round === 1) {
      await stopAll(arms);
      await withEach(arms, (arm) => startArm(arm, one, servers, options));
    }
    await withEach(arms, async (arm) => arm.rounds.push(await one.measure(arm.running!, options.seconds)));
  }
  await stopAll(arms);
  return arms;
}

async function startArm(arm: Arm, one: Case, servers: string[], { strategy, seconds }: Options): Promise<void> {
  const setup = one.tail ? arm.setup : { ...arm.setup, strategy };
  const [port = 0] = await freePorts(1);
  const program = start(one.cores, arm.contestant.command(port, servers.slice(0, setup.servers), setup));
  arm.running = { program, port, setup };
  await listening(program, port);
  if (one.warmUp > 0) await one.measure(arm.running, one.warmUp * seconds);
}

/** Does something with all arms in turn. One that fails is left out from then on; the others go on. */
async function withEach(arms: Arm[], act: (arm: Arm) => Promise<unknown>): Promise<void> {
  for (const arm of arms.filter(({ note }) => note === undefined)) {
    try {
      await act(arm);
    } catch (error) {
      arm.note = (error as Error).message;
    }
  }
}

async function stopAll(arms: Arm[]): Promise<void> {
  for (const { running } of arms) await running?.program.stop();
}

// --- Tables ---

/** Shows the median; a dash where there is none. */
function median(values: number[], text: (value: number) => string): string {
  const sorted = values.toSorted((a, b) => a - b), half = (sorted.length - 1) / 2;
  return sorted.length === 0 ? "–" : text((sorted[Math.floor(half)]! + sorted[Math.ceil(half)]!) / 2);
}

function caseTable({ setups, compare }: Case, arms: Arm[]): string {
  const measured = arms.filter(({ rounds }) => rounds.length > 0);
  const columns = Object.entries(FIGURES).filter(([key]) => key in (measured[0]?.rounds[0] ?? {}));
  const title = ({ contestant: { lb, name }, setup }: Arm) =>
    (lb ? `lb.ts on ${name}` : name) + (setup.title && `, ${setup.title}`);
  const rows = measured.map((arm) => {
    const isOther = ({ contestant }: Arm) =>
      setups.length > 1 ? contestant === arm.contestant : contestant.name === "haproxy";
    const others = arms.find(isOther)?.rounds ?? [], shared = arm.rounds.slice(0, others.length);
    const compared = compare.map(({ of }) => {
      const values = shared.map((mine, round) => of(mine as Required<Figures>, others[round] as Required<Figures>));
      return median(values, (value) => value.toFixed(2));
    });
    const figures = columns.map(([key, [, text]]) => median(arm.rounds.map((one) => one[key as keyof Figures]!), text));
    return [title(arm), ...compared, ...figures];
  });
  const head = ["", ...compare.map(({ title }) => title), ...columns.map(([, [title]]) => title)];
  const notes = arms.filter(({ note }) => note !== undefined).map((arm) => `\n\n${title(arm)}: ${arm.note}`);
  return table([head, ...rows]) + notes.join("");
}

/** Markdown that can be read in a terminal too: the first column stands left, the others right. */
function table(rows: string[][]): string {
  const widths = rows[0]!.map((_, column) => Math.max(4, ...rows.map((row) => row[column]!.length)));
  const [head, ...lines] = rows.map((row) =>
    row.map((cell, column) => column === 0 ? cell.padEnd(widths[column]!) : cell.padStart(widths[column]!))
  );
  const ruler = widths.map((width, column) => column === 0 ? "-".repeat(width) : "-".repeat(width - 1) + ":");
  return [head!, ruler, ...lines].map((cells) => `| ${cells.join(" | ")} |`).join("\n");
}

// --- The command ---

async function main(options: Options): Promise<void> {
  if (availableParallelism() < 2) throw new Error("a benchmark needs two cores");
  spawnSync("taskset", ["-acp", LOAD_CORE, `${process.pid}`]); // what this process does itself is load and servers
  const { cases, contestants, rounds, seconds, strategy, results } = options;
  const versions = [...contestants.map(({ name }) => name), "wrk"].map((name) => `${name} ${versionOf(name)}`);
  const parts: string[] = [];
  const add = (part: string) => {
    parts.push(`${part}\n`);
    console.log(`${part}\n`);
  };
  add(`# Speed of lb.ts beside its peers

\`deno task bench --rounds ${rounds} --seconds ${seconds} --strategy ${strategy}\` on Linux with ${availableParallelism()} cores.
${versions.join(", ")}.

Figures are medians over the rounds. "×" is the ratio to haproxy in the same round; where there are several setups, to the
same contestant in the first one. Figures differ between machines: compare ratios.`);
  const servers = await startServers(1000), tailServers = await startTailServers();
  for (const name of cases) {
    const one = CASES[name]!;
    const arms = await measure(name, one, one.tail ? tailServers : servers, options);
    add(`## ${name}: ${one.about}\n\n${caseTable(one, arms)}`);
  }
  if (results) writeFileSync(join(import.meta.dirname!, "RESULTS.md"), parts.join("\n"));
}

function end(status: number, message?: unknown): never {
  if (message !== undefined) console.error(message);
  cleanUp();
  process.exit(status);
}

for (const [signal, status] of [["SIGINT", 130], ["SIGTERM", 143], ["SIGHUP", 129]] as const) {
  process.on(signal, () => end(status));
}
process.on("uncaughtException", (error) => end(1, error));
let options: Options;
try {
  options = readOptions();
} catch (error) {
  end(2, `${(error as Error).message}\n\n${USAGE}`);
}
if (options.help) console.log(USAGE);
else await main(options).catch((error) => end(1, error));
end(0);
