// The test command, `deno task test`: what all tests say on Deno, Bun, Node and workerd, after formatter, linter and
// type checker. It needs only npm to begin with, and root for apt-get where a program of PROGRAMS is missing.
// Words after it choose runtimes and files: `deno task test node gate`.
// A runtime on which a file's tests did not run counts as failed: silence is not success. A file that fails beside others
// is run once more by itself, and that counts; what it said the first time stays in the output.

const ROOT = new URL("..", import.meta.url).pathname;
const AT_ONCE = 7; // jobs; each of them mostly waits
const PATIENCE = 240_000; // milliseconds for one job; one that takes longer hangs
const EDGE = "edge.test.ts"; // starts workerd, and is itself run by Node
/** What the tests run beside lb.ts (or load into it), and Debian's packages that have it. */
const PROGRAMS = Object.entries({
  "/usr/bin/chromium": "chromium",
  "/usr/bin/curl": "curl",
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
  bun: (
    file,
    report,
  ) => ["bun", "test", "--timeout=60000", "--reporter=junit", `--reporter-outfile=${report}`, `./${file}`],
  node: (
    file,
    report,
  ) => [...["node", "--test", "--test-reporter=spec", "--test-reporter-destination=stdout"], ...[
    "--test-reporter=junit",
    `--test-reporter-destination=${report}`,
    file,
  ]],
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

async function run([program = "", ...args]: string[], patience = PATIENCE): Promise<{ code: number; output: string }> {
  const command = new Deno.Command(program, {
    args,
    cwd: ROOT,
    env: { NO_COLOR: "1", DEBIAN_FRONTEND: "noninteractive", RUNLEVEL: "1" }, // starts no service
    stdin: "null",
    stdout: "piped",
    stderr: "piped",
  });
  const child = command.spawn();
  const stop = (signal: Deno.Signal) => () => {
    try {
      child.kill(signal);
    } catch {
      // it has ended meanwhile
    }
  };
  const timers = [setTimeout(stop("SIGTERM"), patience), setTimeout(stop("SIGKILL"), patience + 5_000)];
  const { code, signal, stdout, stderr } = await child.output();
  timers.forEach(clearTimeout);
  const text = new TextDecoder();
  const ending = signal ? `\nended by ${signal} after at most ${patience / 1_000} s` : "";
  return { code, output: (text.decode(stdout) + text.decode(stderr)).replaceAll(COLORS, "") + ending };
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
  console.log(`${runtime.padEnd(8)} ${name.padEnd(20)} ${verdict}  ${seconds.toFixed(1)} s`);
  if (failed.length === 0) return;
  for (const { path } of failed) console.log(`    failed: ${path}`);
  const lines = output.trimEnd().split("\n").filter((line) => !PASSED_LINE.test(line));
  console.log(lines.map((line) => `    | ${line}`).join("\n"));
}

/** Runs the jobs, some at once, in their order. */
async function runAll(jobs: Job[]): Promise<Result[]> {
  const results: Result[] = [];
  const waiting = jobs.values();
  const worker = async () => {
    for (const job of waiting) {
      const result = await runJob(job);
      results.push(result);
      show(result);
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, worker));
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
  const needs = Object.entries((await readPackage("package.json")).dependencies ?? {});
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

/** Brings the programs that are not there. Their services are not started. */
async function installPrograms(): Promise<void> {
  const found = await Promise.all(PROGRAMS.map(([path]) => Deno.stat(path).catch(() => undefined)));
  const missing = PROGRAMS.filter((_, i) => !found[i]).map(([, name]) => name).join(" ");
  if (!missing) return;
  for (const words of ["update", `install -y --no-install-recommends ${missing}`]) {
    console.log(`apt-get ${words}`);
    const { code, output } = await run(["apt-get", ...words.split(" ")], 600_000);
    if (code !== 0) throw new Error(`${missing} is missing, and apt-get ${words} (as root) has failed:\n${output}`);
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

const without = (words: string[], kinds: readonly string[]) => words.filter((word) => !kinds.includes(word));

/** The checks, then each runtime's files; `words` leave out what they do not name. */
async function jobsFor(words: string[], reports: string): Promise<Job[]> {
  const all = await filesUnder("tests");
  const runtimes = [CHECKS, ...Object.keys(RUNTIMES), WORKERD];
  const names = without(words, runtimes);
  const chosen = (runtime: string) =>
    words.includes(runtime) || words.length === names.length && !(runtime === CHECKS && words.length);
  const files = all.filter((file) => /^tests\/[^/]+\.test\.ts$/.test(file)).filter((file) =>
    names.length === 0 || names.some((name) => file.includes(name))
  );
  const ordinary = files.filter((file) => !file.endsWith(EDGE)).sort((a, b) => size(b) - size(a)); // the long ones first
  const check = (name: string, ...args: string[]) => ({ runtime: CHECKS, name, command: ["deno", name, ...args] });
  const testing = (runtime: string, file: string): Job => {
    const name = file.replace(/^tests\/|\.test\.ts$/g, "");
    const report = `${reports}/${runtime}-${name}.xml`;
    return { runtime, name, report, command: (RUNTIMES[runtime] ?? RUNTIMES.node!)(file, report) };
  };
  const jobs = [
    ...[check("fmt", "--check"), check("lint"), check("check", "lb.ts", ...all)],
    ...Object.keys(RUNTIMES).flatMap((runtime) => ordinary.map((file) => testing(runtime, file))),
    ...files.filter((file) => file.endsWith(EDGE)).map((file) => testing(WORKERD, file)),
  ].filter(({ runtime }) => chosen(runtime));
  const idle = words.length ? [] : runtimes.filter((runtime) => !jobs.some((job) => job.runtime === runtime));
  if (idle.length) {
    throw new Error(`there are no tests for ${idle.join(" and ")}`);
  }
  return jobs;
}
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

async function main(args: string[]): Promise<number> {
  const started = performance.now();
  const reports = await Deno.makeTempDir({ prefix: "lb-reports-" });
  let results: Result[] = [];
  try {
    await install();
    await installPrograms();
    console.log(await versions());
    results = await againAlone(await runAll(await jobsFor(args.filter((word) => word !== "--only"), reports)));
    const lost = missing(results);
    lost.forEach(show);
    results.push(...lost);
  } catch (error) {
    const tests: Test[] = [{ path: "tests/all.ts", outcome: "failed" }];
    const broken = { runtime: CHECKS, name: "all", command: [], seconds: 0, tests, output: String(error) };
    show(broken);
    results.push(broken);
  }
  await Deno.remove(reports, { recursive: true });
  table(results);
  const [passed, failed, skipped] = [
    counted(results, "passed"),
    counted(results, "failed"),
    counted(results, "skipped"),
  ];
  console.log(`\n${((performance.now() - started) / 1_000).toFixed(0)} s in all`);
  console.log(`${passed} passed, ${failed} failed${skipped ? `, ${skipped} skipped` : ""}`);
  return failed > 0 || passed === 0 ? 1 : 0;
}

Deno.exit(await main(Deno.args));
