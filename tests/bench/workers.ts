// What a second worker brings where the machine has no cores to spare for the load: deno task bench:workers [starts]
// One lb.ts with one worker and one with two stand on the same cores as their load and their servers, and get bursts of
// it in turn; both are started anew several times, as no two processes are compiled alike. On two cores that do nothing
// else there are so many times one worker's requests: twice the ratio of the CPU that one takes.
import process from "node:process";
import { counted, type Figures, serversFor, small, wrk } from "./cases.ts";
import { CONTESTANTS, type Runtime, RUNTIMES } from "./contestants.ts";
import { ALL_CORES, type Child, cleanUpAtExit, freePorts, listening, start, stop } from "./processes.ts";
import { digits, median, table, times } from "./report.ts";

const BURSTS = 6; // of one second, for each start

type Arm = { child: Child; port: number };

async function open(runtime: Runtime, workers: number, servers: string[]): Promise<Arm> {
  const [port = 0] = await freePorts(1), contestant = CONTESTANTS.find(({ name }) => name === runtime)!;
  const command = contestant.command({ port, servers, strategy: "round-robin", routes: 0 });
  const child = start(ALL_CORES, [...command, "--workers", `${workers}`]);
  await listening(child, port);
  await wrk(port, 3, small, 0, ALL_CORES);
  return { child, port };
}

const burst = ({ child, port }: Arm): Promise<Figures> => counted(child, () => wrk(port, 1, small, 0, ALL_CORES));

/** Bursts of one worker and of two, each pair one after the other. */
async function pairs(runtime: Runtime, servers: string[]): Promise<[Figures, Figures][]> {
  const one = await open(runtime, 1, servers), two = await open(runtime, 2, servers);
  const measured: [Figures, Figures][] = [];
  for (let i = 0; i < BURSTS; i++) measured.push([await burst(one), await burst(two)]);
  for (const { child } of [one, two]) await stop(child);
  return measured;
}

cleanUpAtExit();
const starts = Number(process.argv[2] ?? 5), servers = await serversFor(3, ALL_CORES), rows: string[][] = [];
for (const runtime of RUNTIMES) {
  const measured: [Figures, Figures][] = [];
  for (let i = 0; i < starts; i++) measured.push(...await pairs(runtime, servers));
  for (const i of [0, 1]) {
    const of = (what: (figures: Figures) => number) => median(measured.map((pair) => what(pair[i]!)));
    const gain = 2 * median(measured.map(([one, two]) => one.cpu / two.cpu));
    rows.push([
      ...[runtime, `${i + 1}`, digits(of(({ rps }) => rps)), digits(of(({ cpu }) => cpu))],
      ...[times(of(({ cpu, rps }) => cpu * rps / 1e6)), times(i ? gain : undefined)],
    ]);
  }
}
console.log(table(1, ["", "workers", "requests/s", "CPU us/request", "cores it has", "times one, on two cores"], rows));
process.exit();
