// That nothing which the tests have started outlives them, whatever is killed.

import assert from "node:assert/strict";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { spawnGuarded } from "../rig/guard.ts";
import { runtime, test, until } from "../rig/rig.ts";

const ROOT = fileURLToPath(new URL("../..", import.meta.url));
const BINARIES = `${ROOT}node_modules/.bin`;

/** The command lines of all processes that have this variable in their environment, by their ids. */
function processesWith(mark: string): Map<number, string> {
  const found = new Map<number, string>();
  for (const id of readdirSync("/proc").map(Number).filter(Boolean)) {
    try {
      if (!readFileSync(`/proc/${id}/environ`, "latin1").includes(mark)) continue;
      found.set(id, readFileSync(`/proc/${id}/cmdline`, "latin1").replaceAll("\0", " "));
    } catch {
      // it has ended meanwhile
    }
  }
  return found;
}

/** Starts a command that starts lb.ts, ends it by `kill` as soon as that runs, and waits until nothing of it is left. */
async function killed(command: string[], kill: (inside: Map<number, string>) => void) {
  const id = crypto.randomUUID(), inside = () => processesWith(`LB_MARK=${id}`);
  const { NODE_TEST_CONTEXT: _, ...env } = process.env; // else `node --test` would not run tests inside tests
  const child = spawnGuarded(command[0]!, command.slice(1), {
    cwd: ROOT,
    env: { ...env, LB_MARK: id },
    detached: true,
  });
  let output = "";
  for (const stream of [child.stdout, child.stderr]) stream.on("data", (bytes) => output += bytes);
  const isProgram = (line: string) => / lb\.ts -c /.test(line) && !line.startsWith("sh "); // sh: not yet
  try {
    await until("lb.ts runs", () => [...inside().values()].some(isProgram) || child.exitCode !== null);
    assert.equal(child.exitCode, null, output);
    kill(inside());
    await until("nothing is left", () => inside().size === 0);
  } finally {
    const left = inside();
    for (const id of left.keys()) process.kill(id, "SIGKILL");
    assert.deepEqual([...left.values()], []);
  }
}

const installed = existsSync(BINARIES + "/deno");
const linux = { skip: process.platform === "linux" && installed ? false : "needs Linux's /proc, and all runtimes" };

for (const signal of ["SIGINT", "SIGTERM", "SIGKILL"] as const) {
  test(`${signal} to the test command leaves no process behind`, linux, () =>
    killed(
      [`${BINARIES}/deno`, "run", "-A", "tests/run.ts", "node", "matching"],
      (inside) => {
        const [runner] = [...inside].find(([, line]) => /^\S*deno run -A tests\/run\.ts/.test(line))!;
        process.kill(runner, signal);
      },
    ));
}

for (
  const [name, ...command] of [
    ["deno", "test", "-A", "--no-check"],
    ["bun", "test"],
    ["node", "--test"],
  ]
) {
  test(
    `SIGKILL to tests that run on ${name} leaves no lb.ts behind`,
    linux,
    () =>
      killed([`${BINARIES}/${name}`, ...command, "./tests/http/matching.test.ts"], (inside) => {
        const tests = [...inside].filter(([, line]) => line.includes("matching.test.ts"));
        for (const [id] of tests) process.kill(id, "SIGKILL");
      }),
  );
}

test("a guarded process ends with the one that has started it, and a detached one with its whole group", async () => {
  const script = `
    import { spawnGuarded } from ${JSON.stringify(new URL("../rig/guard.ts", import.meta.url).href)};
    const one = spawnGuarded("sleep", ["60"]), group = spawnGuarded("sh", ["-c", "sleep 60 & echo $!; wait"], { detached: true });
    group.stdout.on("data", (bytes) => console.log(one.pid, group.pid, String(bytes)));
    setInterval(() => {}, 1000);
  `;
  const child = spawnGuarded(process.execPath, [...EVAL[runtime()], script]);
  let said = "";
  child.stdout.on("data", (bytes) => said += bytes);
  await until("it has started them", () => said.endsWith("\n"));
  const ids = said.trim().split(/\s+/).map(Number);
  assert.deepEqual(ids.map(runs), [true, true, true]);
  child.kill("SIGKILL");
  await until("they have ended", () => ids.map(runs).join() === "false,false,false");
});
const EVAL = { deno: ["eval"], bun: ["-e"], node: ["--input-type=module", "-e"] };

test("a guarded process keeps its id and its exit status, and has the time that it takes after a signal", async () => {
  const child = spawnGuarded("sh", ["-c", "trap 'sleep 0.3; exit 7' TERM; echo $$; while :; do sleep 0.05; done"]);
  let said = "";
  child.stdout.on("data", (bytes) => said += bytes);
  await until("it runs", () => said.endsWith("\n"));
  assert.equal(Number(said), child.pid);
  child.kill("SIGTERM");
  assert.equal(await new Promise((resolve) => child.once("close", resolve)), 7);
  assert.equal(child.kill(), false);
});

/** Whether a process runs; one that has ended may still be listed until its parent has looked at it. */
function runs(id: number): boolean {
  try {
    return !/^\d+ \(.*\) [ZX]/.test(readFileSync(`/proc/${id}/stat`, "latin1"));
  } catch {
    return false;
  }
}
