// The test command, `deno task test`: formatter, linter, type checker, and all tests on Deno, Bun, Node and workerd.
// It needs only npm to begin with.
//
//   deno task test              everything
//   deno task test node gate    only these runtimes and files
//   deno task test:quick        one runtime, without the files of SLOW
//   deno task test --install    installs the missing programs of PROGRAMS first (apt-get, as root)
//
// A runtime on which a file's tests did not run counts as failed. A file that fails beside others runs once more alone,
// and that counts; the first output stays visible. When this process ends, in whatever way, all that it has started ends.

import { mkdtempSync, statfsSync } from "node:fs";
import { cpus, tmpdir } from "node:os";
import { spawnGuarded } from "./rig/guard.ts";

const ROOT = new URL("..", import.meta.url).pathname;
const CORES = navigator.hardwareConcurrency;
/** Jobs at once: most of them mostly wait, so there are more while a processor has nothing to do. */
const AT_LEAST = 2 * CORES, AT_MOST = 5 * CORES;
const BUSY = 0.85; // of the time; from there on no more jobs than AT_LEAST begin
const JOB_TIMEOUT = 240_000; // milliseconds; a job that takes longer hangs
const EDGE = "edge/edge"; // starts workerd; Node runs it
/** The folder whose files run on Node only, all others on every runtime: logic without sockets, and this command's test. */
const ONE_RUNTIME = "tests/unit/";
/** Files that `--quick` leaves out. */
const SLOW = [
  ...["program/clients", "program/dashboard", "program/package"],
  ...["http/flow", "http/tls", "load/chaos", "unit/simulate"],
];
/** Files that take long, about the longest first: at the end a core would wait for them alone. */
const LONG = [
  ...["program/fleet", "program/dashboard", "http/tls", "program/program", "program/admin", "http/flow"],
  ...["program/workers", "edge/edge", "load/chaos", "http/websocket", "program/clients", "http/http2"],
  ...["program/discovery", "http/tcp", "http/wire", "http/limits", "program/decisions", "http/answers"],
  ...["unit/simulate", "program/package", "program/recipes", "program/log", "program/save"],
];
/** The programs that tests run beside lb.ts, and the Debian packages that contain them. */
const PROGRAMS = Object.entries({
  "/usr/bin/chromium": "chromium",
  "/usr/bin/curl": "curl",
  "/usr/bin/etcd": "etcd-server",
  "/usr/bin/faketime": "faketime",
  "/usr/bin/git": "git",
  "/usr/bin/goaccess": "goaccess",
  "/usr/bin/h2load": "nghttp2-client",
  "/usr/bin/openssl": "openssl",
  "/usr/bin/promtool": "prometheus",
  "/usr/bin/redis-server": "redis-server",
  "/usr/bin/slowhttptest": "slowhttptest",
});

/** How a file's tests are run, and reported as JUnit's XML. */
const RUNTIMES: Record<string, (file: string, report: string) => string[]> = {
  deno: (file, report) => ["deno", "test", "-A", "--no-check", `--junit-path=${report}`, file],
  bun: (file, report) => {
    return ["bun", "test", "--timeout=60000", "--reporter=junit", `--reporter-outfile=${report}`, `./${file}`];
  },
  node: (file, report) => {
    const shown = ["--test-reporter=spec", "--test-reporter-destination=stdout"];
    return [
      "node",
      "--import=./tests/rig/node.ts",
      "--test",
      ...shown,
      "--test-reporter=junit",
      `--test-reporter-destination=${report}`,
      file,
    ];
  },
};
const WORKERD = "workerd";
const CHECKS = "checks";

interface Job {
  runtime: string;
  name: string;
  command: string[];
  report?: string;
}

interface Result extends Job {
  seconds: number;
  tests: Test[];
  output: string;
}

interface Test {
  path: string; // names from the outermost suite inwards, joined by " > "
  outcome: "passed" | "failed" | "skipped";
}

// ─── Reading what a runner reports ───

const ENTITIES: Record<string, string> = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'" };
/** Node escapes quotes twice. */
const unescaped = (text: string) =>
  text.replaceAll(/&amp;(?=\w+;)/g, "&").replaceAll(/&(amp|lt|gt|quot|apos);/g, (_, name) => ENTITIES[name]!);

/** The tests in a report. Suites are not tests, nor is a test with steps where each step is listed. */
function readReport(xml: string): Test[] {
  const tests: Test[] = [];
  const suites: string[] = [];
  for (const tag of xml.matchAll(/<(\/?)(testsuite|testcase|failure|error|skipped)\b((?:[^>"]|"[^"]*")*?)(\/?)>/g)) {
    const [, closing, kind, attributes = "", empty] = tag;
    const name = unescaped(/\bname="([^"]*)"/.exec(attributes)?.[1] ?? "");
    if (kind === "testsuite" && closing) suites.pop();
    else if (kind === "testsuite" && !empty) {
      suites.push(/\.ts$/.test(name) ? "" : name); // a file is not a suite
    } else if (kind === "testcase" && !closing) {
      tests.push({ path: [...suites, name].filter(Boolean).join(" > "), outcome: "passed" });
    } else if (!closing && tests.length) {
      const blamed = /\bmessage="\d+ test steps? failed"/.test(attributes); // its steps are listed themselves
      tests.at(-1)!.outcome = kind === "skipped" ? "skipped" : blamed ? "passed" : "failed";
    }
  }
  const parents = (test: Test) => tests.some((other) => other.path.startsWith(`${test.path} > `));
  return tests.filter((test) => test.outcome === "failed" || !parents(test));
}

/** Whether a runtime knows a test: Bun lists a test with steps as one, the others list its steps. */
const knows = (tests: Test[], path: string) =>
  tests.some((one) => one.path === path || one.path.startsWith(`${path} > `) || path.startsWith(`${one.path} > `));

/**
 * Tests that ran on one runtime and not on another, where nobody has said that they should be skipped. A name may differ,
 * where what is expected does: as many unknown names on both sides are the same tests.
 */
function missing(results: Result[]): Result[] {
  const lost: Result[] = [];
  const unknown = (one: Result, to: Result) => one.tests.filter(({ path }) => !knows(to.tests, path));
  const broken = ({ tests }: Result) => tests.some(({ path }) => path.endsWith(NO_VERDICT)); // has failed already
  const there = results.filter((one) => one.runtime in RUNTIMES && !broken(one));
  for (const here of there) {
    const others = there.filter((other) => other.name === here.name && other !== here);
    const gaps = others.map((other) => unknown(other, here).slice(unknown(here, other).length));
    const gap = gaps.sort((a, b) => b.length - a.length)[0] ?? [];
    if (gap.length === 0) continue;
    const tests = gap.map(({ path }): Test => ({ path, outcome: "failed" }));
    lost.push({ ...here, seconds: 0, tests, output: "so many tests, perhaps these, ran elsewhere and not here" });
  }
  return lost;
}
const NO_VERDICT = "(the runner)";

// ─── Running ───

const COLORS = /\x1b\[[\d;]*m/g;
const MEMORY = "/dev/shm", ENOUGH = 1 << 30; // bytes
/** A folder in memory, where that has room: lb.ts waits for the disk with each config that it saves, and etcd does too. */
function fastFolder(): string {
  try {
    const { bavail, bsize } = statfsSync(MEMORY);
    return bavail * bsize > ENOUGH ? MEMORY : tmpdir();
  } catch { // there is none
    return tmpdir();
  }
}
/** Temporary files of the jobs and their reports. */
const SCRATCH = mkdtempSync(`${fastFolder()}/lb-tests-`);

/** Runs a command in a process group of its own, which ends with it. */
async function run(
  [program = "", ...args]: string[],
  timeout = JOB_TIMEOUT,
): Promise<{ code: number; output: string }> {
  const env = {
    ...Deno.env.toObject(),
    NO_COLOR: "1",
    TMPDIR: SCRATCH,
    NODE_COMPILE_CACHE: `${SCRATCH}/compiled`, // a start of lb.ts on Node takes 0.1 s of CPU time instead of 0.3
    LB_PATIENCE: String(AT_MOST / CORES), // see patience in rig.ts
  };
  const child = spawnGuarded(program, args, { cwd: ROOT, env, detached: true });
  const texts = [child.stdout, child.stderr].map(() => "");
  [child.stdout, child.stderr].forEach((stream, i) =>
    stream.setEncoding("utf8").on("data", (text) => texts[i] += text)
  );
  const stop = (signal: Deno.Signal) => {
    try {
      Deno.kill(-child.pid, signal);
    } catch {
      // the group has ended
    }
  };
  const timers = [setTimeout(stop, timeout, "SIGTERM"), setTimeout(stop, timeout + 5_000, "SIGKILL")];
  const [code, signal] = await new Promise<[number, string | null]>((resolve) => {
    child.once("close", (...ending) => resolve(ending as [number, string | null]));
  });
  timers.forEach(clearTimeout);
  const ending = signal ? `\nended by ${signal} after at most ${timeout / 1_000} s` : "";
  return { code, output: texts.join("").replaceAll(COLORS, "") + ending };
}

async function runJob(job: Job): Promise<Result> {
  const started = performance.now();
  const { code, output } = await run([binary(job.command[0]!), ...job.command.slice(1)]);
  const seconds = (performance.now() - started) / 1_000;
  if (!job.report) {
    return { ...job, seconds, tests: [{ path: job.name, outcome: code === 0 ? "passed" : "failed" }], output };
  }
  const tests = readReport(await Deno.readTextFile(job.report).catch(() => ""));
  const failed = tests.some((test) => test.outcome === "failed");
  if (tests.length === 0 || failed !== (code !== 0)) {
    const why = tests.length === 0 ? "ran no tests" : `ended with ${code}`;
    tests.push({ path: `${job.name} ${why} ${NO_VERDICT}`, outcome: "failed" });
  }
  return { ...job, seconds, tests, output };
}

const PASSED_LINE = /^\s*(?:(?:✔|\(pass\)|▶) .*|.* \.\.\. ok \(.*\))$/;

/** A failure is shown with all that its runner has said, but for the tests that passed. */
function show({ runtime, name, tests, seconds, output }: Result): void {
  const failed = tests.filter((test) => test.outcome === "failed");
  const skipped = tests.filter((test) => test.outcome === "skipped").length;
  const count = `${tests.length - failed.length - skipped} passed${skipped ? `, ${skipped} skipped` : ""}`;
  const verdict = failed.length ? `FAILED  ${failed.length} failed, ${count}` : `ok      ${count}`;
  console.log(`${runtime.padEnd(8)} ${name.padEnd(24)} ${verdict}  ${seconds.toFixed(1)} s`);
  if (failed.length === 0) return;
  for (const { path } of failed) console.log(`    failed: ${path}`);
  const lines = output.trimEnd().split("\n").filter((line) => !PASSED_LINE.test(line));
  console.log(lines.map((line) => `    | ${line}`).join("\n"));
}

/** How busy the processors were since the last call, from 0 to 1. */
function busyMeter(): () => number {
  const total = () =>
    cpus().reduce(({ idle, all }, { times }) => ({
      idle: idle + times.idle,
      all: all + times.idle + times.user + times.sys + times.nice + times.irq,
    }), { idle: 0, all: 0 });
  let before = total();
  return () => {
    const now = total(), all = now.all - before.all, idle = now.idle - before.idle;
    before = now;
    return all > 0 ? 1 - idle / all : 1;
  };
}

/** Runs the jobs, some at once, in their order. */
async function runAll(jobs: Job[]): Promise<Result[]> {
  const results: Result[] = [], running = new Set<Promise<void>>(), busy = busyMeter();
  const start = async (job: Job) => {
    const result = await runJob(job);
    results.push(result);
    show(result);
  };
  for (const job of jobs) {
    while (running.size >= AT_LEAST) {
      await Promise.race([...running, new Promise((go) => setTimeout(go, 500))]);
      if (running.size < AT_MOST && busy() < BUSY) break;
    }
    const one = start(job).finally(() => running.delete(one));
    running.add(one);
  }
  await Promise.all(running);
  return results;
}

/** Runs once more, by itself, what has failed while other jobs kept the machine busy. */
async function againAlone(results: Result[]): Promise<Result[]> {
  const settled: Result[] = [];
  for (const one of results) {
    const failed = one.report && one.tests.some(({ outcome }) => outcome === "failed");
    if (failed) console.log(`${one.runtime.padEnd(8)} ${one.name}: once more, alone`);
    if (failed) await Deno.remove(one.report!).catch(() => {});
    const last = failed ? await runJob(one) : one;
    if (failed) show(last);
    settled.push(last);
  }
  return settled;
}

// ─── What there is to run ───

interface Package {
  version?: string;
  dependencies?: Record<string, string>;
  devDependencies?: Record<string, string>;
}
const readPackage = async (path: string): Promise<Package> =>
  JSON.parse(await Deno.readTextFile(ROOT + path).catch(() => "{}"));

/** Brings what lb.ts needs and what its tests run on, in the versions that are named, where it is not there already. */
async function install(): Promise<void> {
  const { dependencies = {}, devDependencies = {} } = await readPackage("package.json");
  const needs = Object.entries({ ...dependencies, ...devDependencies });
  const tools = Object.entries((await readPackage(".ci/package.json")).devDependencies ?? {});
  const there = async ([name, version]: [string, string]) =>
    (await readPackage(`node_modules/${name}/package.json`)).version === version;
  if ((await Promise.all([...needs, ...tools].map(there))).every(Boolean)) return;
  console.log("npm install");
  const flags = ["--no-save", "--no-package-lock", "--no-audit", "--no-fund"];
  const { code, output } = await run(
    ["npm", "install", ...flags, ...tools.map(([name, version]) => `${name}@${version}`)],
    600_000,
  );
  if (code !== 0) throw new Error(`npm install has failed:\n${output}`);
}

/** The programs that are not there, by their packages. */
async function missingPrograms(): Promise<string[]> {
  const found = await Promise.all(PROGRAMS.map(([path]) => Deno.stat(path).catch(() => undefined)));
  return PROGRAMS.filter((_, i) => !found[i]).map(([, name]) => name);
}

/** The services in some of these packages. */
const SERVICES: Record<string, string> = {
  "etcd-server": "etcd",
  "prometheus": "prometheus",
  "redis-server": "redis-server",
};
/** What Debian's package scripts ask before they start a service: 101 forbids it. */
const POLICY = "/usr/sbin/policy-rc.d";

/** Installs Debian packages, without starting the services that some of them contain, now or at the next boot. */
async function installPrograms(packages: string[]): Promise<void> {
  for (const service of packages.flatMap((name) => SERVICES[name] ?? [])) {
    await Deno.mkdir("/etc/systemd/system", { recursive: true });
    await Deno.symlink("/dev/null", `/etc/systemd/system/${service}.service`).catch(() => {}); // as systemctl mask does
  }
  const isOurs = await Deno.writeTextFile(POLICY, "#!/bin/sh\nexit 101\n", { createNew: true, mode: 0o755 })
    .then(() => true, () => false);
  try {
    for (const words of [["update"], ["install", "-y", "--no-install-recommends", ...packages]]) {
      console.log(`apt-get ${words.join(" ")}`);
      const { code, output } = await run(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", ...words], 600_000);
      if (code !== 0) throw new Error(`apt-get ${words[0]} (as root) has failed:\n${output}`);
    }
  } finally {
    if (isOurs) await Deno.remove(POLICY);
  }
}

/** A runtime in the version that .ci/package.json names. */
const binary = (name: string) => `${ROOT}node_modules/.bin/${name}`;

/** The versions of the runtimes; one that cannot start is an error, not a runtime without tests. */
async function versions(): Promise<string> {
  const found = await Promise.all(
    Object.keys(RUNTIMES).map(async (name) => {
      const { code, output } = await run([binary(name), "--version"], 30_000);
      if (code !== 0) throw new Error(`${name} cannot start:\n${output}`);
      return `${name} ${/\d+\.\d+\.\d+/.exec(output)?.[0]}`;
    }),
  );
  return found.join(", ");
}

async function filesUnder(folder: string): Promise<string[]> {
  const files: string[] = [];
  for await (const { name, isDirectory } of Deno.readDir(ROOT + folder)) {
    if (name === "node_modules") continue;
    if (isDirectory) files.push(...await filesUnder(`${folder}/${name}`));
    else if (name.endsWith(".ts")) files.push(`${folder}/${name}`);
  }
  return files.sort();
}

/** What the command line chooses; nothing chosen is all. */
interface Choice {
  runtimes: string[];
  names: string[]; // parts of files' names
  quick: boolean;
}

const ALL_RUNTIMES = [CHECKS, ...Object.keys(RUNTIMES), WORKERD];
/** Its folder and name: files of two folders may have one name. */
const nameOf = (file: string) => file.replace(/^tests\/|\.test\.ts$/g, "");

/** The checks, then each file on each runtime: what takes long first, then the large ones. */
async function jobsFor({ runtimes, names, quick }: Choice): Promise<Job[]> {
  const sources = await filesUnder("tests");
  const isChosen = (name: string) =>
    (names.length === 0 || names.some((one) => name.includes(one))) &&
    !(quick && SLOW.includes(name));
  const files = sources.filter((file) => file.endsWith(".test.ts") && isChosen(nameOf(file)))
    .sort((a, b) => rank(a) - rank(b) || size(b) - size(a));
  const check = (name: string, ...args: string[]) => ({ runtime: CHECKS, name, command: ["deno", name, ...args] });
  const testing = (runtime: string, file: string): Job => {
    const report = `${SCRATCH}/${runtime}-${nameOf(file).replaceAll("/", "-")}.xml`;
    return { runtime, name: nameOf(file), report, command: (RUNTIMES[runtime] ?? RUNTIMES.node!)(file, report) };
  };
  const runtimesOf = (file: string) => {
    if (nameOf(file) === EDGE) return [WORKERD];
    return file.startsWith(ONE_RUNTIME) ? ["node"] : Object.keys(RUNTIMES);
  };
  const jobs = [
    ...[check("fmt", "--check"), check("lint"), check("check", "lb.ts", "build.ts", ...sources)],
    ...files.flatMap((file) => runtimesOf(file).map((runtime) => testing(runtime, file))),
  ];
  const isWanted = (runtime: string) =>
    runtimes.length ? runtimes.includes(runtime) : runtime !== CHECKS || !names.length;
  const chosen = jobs.filter(({ runtime }) => isWanted(runtime));
  const idle = names.length
    ? []
    : ALL_RUNTIMES.filter(isWanted).filter((runtime) => !chosen.some((job) => job.runtime === runtime));
  if (idle.length) throw new Error(`there are no tests for ${idle.join(" and ")}`);
  return chosen;
}
const rank = (file: string) => LONG.includes(nameOf(file)) ? LONG.indexOf(nameOf(file)) : LONG.length;
const size = (file: string) => Deno.statSync(ROOT + file).size;

// ─── The sum ───

const counted = (results: Result[], outcome: Test["outcome"]) =>
  results.reduce((sum, { tests }) => sum + tests.filter((test) => test.outcome === outcome).length, 0);

function table(results: Result[]): void {
  const row = (...cells: string[]) =>
    console.log(cells[0]!.padEnd(8) + cells.slice(1).map((c) => c.padStart(9)).join(""));
  row("\nruntime ", "passed", "failed", "skipped", "seconds");
  for (const runtime of new Set(results.map((one) => one.runtime))) {
    const own = results.filter((one) => one.runtime === runtime);
    const counts = (["passed", "failed", "skipped"] as const).map((outcome) => `${counted(own, outcome)}`);
    row(runtime, ...counts, own.reduce((sum, { seconds }) => sum + seconds, 0).toFixed(1));
  }
}

/** What did not run, and why: nothing is left out silently. */
function reportLeftOut({ runtimes, names, quick }: Choice, lacking: string[]): void {
  const say = (what: string, list: string[], why: string) =>
    list.length && console.log(`${what}: ${list.join(", ")} (${why})`);
  say("only on Node", [ONE_RUNTIME], "logic without sockets, and this command's own test");
  if (quick) {
    say("left out", ALL_RUNTIMES.filter((runtime) => !runtimes.includes(runtime)), "quick: one runtime");
    say("left out", SLOW, "quick: slow files");
  }
  if (runtimes.length + names.length && !quick) say("ran only", [...runtimes, ...names], "as asked for");
  say("not installed", lacking, "tests that need it are skipped; --install installs it with apt-get");
}

async function main(args: string[]): Promise<number> {
  const started = performance.now();
  const words = args.filter((word) => !word.startsWith("--")), quick = args.includes("--quick");
  const named = words.filter((word) => ALL_RUNTIMES.includes(word));
  const choice: Choice = {
    runtimes: quick && named.length === 0 ? [CHECKS, "node"] : named,
    names: words.filter((word) => !ALL_RUNTIMES.includes(word)),
    quick,
  };
  let results: Result[] = [], lacking: string[] = [];
  try {
    await install();
    lacking = await missingPrograms();
    if (args.includes("--install") && lacking.length > 0) {
      await installPrograms(lacking);
      lacking = await missingPrograms();
    }
    console.log(await versions());
    results = await againAlone(await runAll(await jobsFor(choice)));
    const lost = missing(results);
    lost.forEach(show);
    results.push(...lost);
  } catch (error) {
    const tests: Test[] = [{ path: "tests/run.ts", outcome: "failed" }];
    const broken = { runtime: CHECKS, name: "run", command: [], seconds: 0, tests, output: String(error) };
    show(broken);
    results.push(broken);
  }
  table(results);
  const [passed, failed, skipped] = (["passed", "failed", "skipped"] as const).map((one) => counted(results, one));
  console.log("");
  reportLeftOut(choice, lacking);
  console.log(`${((performance.now() - started) / 1_000).toFixed(0)} s in all`);
  console.log(`${passed} passed, ${failed} failed${skipped ? `, ${skipped} skipped` : ""}`);
  return failed || !passed ? 1 : 0;
}

/** Removes the temporary files. The jobs end with this process. */
function end(status: number): never {
  try {
    Deno.removeSync(SCRATCH, { recursive: true });
  } catch {
    // a job still writes there
  }
  Deno.exit(status);
}
for (const [signal, status] of [["SIGINT", 130], ["SIGTERM", 143]] as const) {
  Deno.addSignalListener(signal, () => {
    console.log(`ended by ${signal}`);
    end(status);
  });
}
end(await main(Deno.args));
