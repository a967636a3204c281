// README's first screen: its commands, as they stand but for ports, on the runtime that they are for.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { whileRunning } from "../rig/guard.ts";
import { runtime, test, until } from "../rig/rig.ts";

const ROOT = fileURLToPath(new URL("../..", import.meta.url));
const README = readFileSync(join(ROOT, "README.md"), "utf8");
const SCREEN = README.split("\n## Try it\n")[1]!.split("\n## ")[0]!;
const WITH = { node: "Node and npm", deno: "Deno alone", bun: "Bun alone" }[runtime()];
const PATH = `${dirname(process.execPath)}:${join(ROOT, "node_modules/.bin")}:${process.env.PATH}`;

/** The two commands of this runtime's row. */
function commands(): string[] {
  const row = SCREEN.split("\n").find((line) => line.startsWith(`| ${WITH}`))!;
  return [...row.matchAll(/`(.*?)`/g)].map(([, command]) => command!);
}

/** Runs a line of a shell, until `use` has seen what it says. */
const shell = (line: string, use: Parameters<typeof whileRunning<void>>[2]): Promise<void> =>
  whileRunning(["sh", "-c", line], { cwd: ROOT, env: { ...process.env, PATH } }, use);

test("the demo of README's first screen answers what README says", { needs: ["curl"] }, async () => {
  const [demo] = commands();
  await shell(`${demo} --listen 127.0.0.1:0 --admin 127.0.0.1:0`, async (said, over) => {
    await until("the demo says what to do next", () => over() || said().includes("what to do next"), 60_000);
    const [, port] = /listening on http:\S+:(\d+)/.exec(said())!, [, admin] = /admin on http:\S+:(\d+)/.exec(said())!;
    const [, block] = /```sh\n(.*?)```/s.exec(SCREEN)!, lines = block!.trim().split("\n");
    assert.equal(lines.length, 2);
    const outputOf = async (line: string): Promise<string> => {
      let output = "";
      const command = line.replace("8080", port!).replace("9090", admin!);
      await shell(command, async (said, over) => {
        await until(command, over, 20_000);
        output = said();
      });
      return output;
    };
    const answers = [await outputOf(lines[0]!), await outputOf(lines[0]!), await outputOf(lines[0]!)];
    for (const hello of lines[0]!.match(/hello from \w+/g)!) {
      assert.ok(answers.some((one) => one.includes(hello)), `${hello} in ${answers}`);
    }
    assert.match(await outputOf(lines[1]!), /^ *SERVER +STATE.*\n.* up /m);
  });
});

test("the tests of README's first screen run", async () => {
  const [, tests] = commands();
  if (runtime() === "node") { // it runs everything, this test too: CI does that
    return assert.match(readFileSync(join(ROOT, ".ci/run"), "utf8"), new RegExp(`^exec ${tests}`, "m"));
  }
  const one = "./tests/unit/versions.test.ts", run = tests!.replace("bun install && ", ""); // it is installed
  const line = run.endsWith(" tests") ? run.replace(/tests$/, one) : `${run} ${one}`;
  await shell(line, async (said, over) => {
    await until("the tests end", over, 60_000);
    assert.match(said(), /\b4 pass/, said());
  });
});
