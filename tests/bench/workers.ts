// What a second worker brings where the machine has no cores to spare for the load: deno task bench:workers [starts]
// One lb.ts with one worker and one with two stand on the same cores as their load and their servers, and get bursts of
// it in turn; both are started anew several times, as no two processes are compiled alike. On two cores that do nothing
// else there are so many times one worker's requests: twice the ratio of the CPU that one takes.
import process from "node:process";
import { serversFor, small, wrk } from "./cases.ts";
import { CONTESTANTS, RUNTIMES } from "./contestants.ts";
import { ALL_CORES, type Child, cleanUpAtExit, cpuOf, freePorts, listening, start, stop } from "./processes.ts";

/** In microseconds per request, cores, and requests per second. */
type Burst = { cpu: number; cores: number; rate: number };
type Arm = { child: Child; port: number };

async function open(runtime: string, workers: number, servers: string[]): Promise<Arm> {
  const [port = 0] = await freePorts(1), contestant = CONTESTANTS.find(({ name }) => name === runtime)!;
  const command = contestant.command({ port, servers, strategy: "round-robin", routes: 0 });
  const child = start(ALL_CORES, [...command, "--workers", `${workers}`]);
  await listening(child, port);
  await wrk(port, 3, small, 0, ALL_CORES);
  return { child, port };
}

async function burst({ child, port }: Arm): Promise<Burst> {
  const [began, before] = [performance.now(), cpuOf(child.pid)];
  const { requests, seconds } = await wrk(port, 1, small, 0, ALL_CORES);
  const spent = cpuOf(child.pid) - before;
  return {
    cpu: spent / requests,
    cores: spent / 1_000 / (performance.now() - began),
    rate: requests / seconds,
  };
}

const median = (values: number[]): number => values.toSorted((a, b) => a - b)[values.length >> 1]!;

/** Bursts of one worker and of two, each pair one after the other. */
async function pairs(runtime: string, servers: string[]): Promise<[Burst, Burst][]> {
  const [one, two] = [await open(runtime, 1, servers), await open(runtime, 2, servers)];
  const measured: [Burst, Burst][] = [];
  for (let i = 0; i < BURSTS; i++) measured.push([await burst(one), await burst(two)]);
  for (const { child } of [one, two]) await stop(child);
  return measured;
}

const BURSTS = 6; // for each start
const starts = Number(process.argv[2] ?? 5);
cleanUpAtExit();
const servers = await serversFor(3, ALL_CORES);
console.log(
  "| | workers | requests/s | CPU us/request | cores it has | on two cores |\n| --- | --- | --- | --- | --- | --- |",
);
for (const runtime of RUNTIMES) {
  const measured: [Burst, Burst][] = [];
  for (let i = 0; i < starts; i++) measured.push(...await pairs(runtime, servers));
  const gain = 2 * median(measured.map(([one, two]) => one.cpu / two.cpu));
  for (const [i, last] of ["", `${gain.toFixed(2)} times`].entries()) {
    const of = (what: keyof Burst, digits: number) => median(measured.map((pair) => pair[i]![what])).toFixed(digits);
    console.log(`| ${runtime} | ${i + 1} | ${of("rate", 0)} | ${of("cpu", 1)} | ${of("cores", 2)} | ${last} |`);
  }
}
process.exit();
