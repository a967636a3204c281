// What people install: the built file alone, on each runtime and in workerd, and the package, as npm would unpack it.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import {
  copyFileSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { after, before } from "node:test";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { whileRunning } from "../rig/guard.ts";
import { answer, get, rawRequest, runtime, scriptedServer, test, until } from "../rig/rig.ts";

const ROOT = fileURLToPath(new URL("../..", import.meta.url));
const NODE = join(ROOT, "node_modules/.bin/node"); // PATH may have an older one
const skip = existsSync(NODE) ? false : "the build's tools are not installed";
const onNode = runtime() === "node" ? { skip } : { skip: "it does not depend on the runtime" };
const run = promisify(execFile);

let folder = "", project = "/nowhere"; // until it is made
before(async () => {
  if (skip) return;
  folder = mkdtempSync(join(tmpdir(), "lb-package-"));
  const copy = join(folder, "copy"), alone = join(folder, "alone");
  await run(NODE, [join(ROOT, "build.ts"), join(copy, "dist")], { cwd: ROOT });
  mkdirSync(alone);
  copyFileSync(join(copy, "dist/lb.js"), join(alone, "lb.js"));
  for (const name of ["package.json", "lb.ts", "README.md", "CHANGELOG.md", "LICENSE"]) {
    copyFileSync(join(ROOT, name), join(copy, name));
  }
  project = join(folder, "project");
  const modules = join(project, "node_modules");
  mkdirSync(join(modules, ".bin"), { recursive: true });
  await run("npm", ["pack", "--ignore-scripts", "--offline", "--pack-destination", folder], { cwd: copy });
  await run("tar", ["-xzf", join(folder, `lb-ts-${packageJson().version}.tgz`), "-C", modules]);
  cpSync(join(modules, "package"), join(modules, "lb-ts"), { recursive: true });
  rmSync(join(modules, "package"), { recursive: true });
  symlinkSync("../lb-ts/dist/lb.js", join(modules, ".bin/lb-ts")); // as npm install does
  for (const name of [...Object.keys(packageJson().dependencies), "@types", "undici-types"]) {
    const parent = name.split("/").slice(0, -1).join("/");
    mkdirSync(join(modules, parent), { recursive: true });
    symlinkSync(join(ROOT, "node_modules", name), join(modules, name));
  }
  writeFileSync(join(project, "package.json"), JSON.stringify({ type: "module", private: true }));
});
after(() => folder && rmSync(folder, { recursive: true, force: true }));

const packageJson = (): { version: string; dependencies: Record<string, string> } =>
  JSON.parse(readFileSync(join(ROOT, "package.json"), "utf8"));

/** This runtime, told to fetch nothing. */
const HERE = {
  deno: ["run", "--cached-only", "--no-prompt", "--allow-net", "--allow-read", "--allow-env"],
  bun: ["--no-install"],
  node: [],
}[runtime()];
/** No cache of this machine helps. */
const alone = () => ({ PATH: "/usr/bin:/bin", HOME: folder, DENO_DIR: join(folder, "deno"), NO_COLOR: "1" });

/** What a program answers to a request, once it listens; then it is ended. */
const answersOf = (command: string[], cwd: string, env: Record<string, string>): Promise<string> =>
  whileRunning(command, { cwd, env }, async (said, over) => {
    const port = () => Number(/listening on http:\/\/127\.0\.0\.1:(\d+)/.exec(said())?.[1]);
    await until("it listens or ends", () => over() || port(), 30_000);
    assert.ok(port(), said());
    const { answers } = await rawRequest(port(), get("/a", "Connection: close\r\n"));
    return answers[0]!.body.toString();
  });
const DEMO = ["--demo", "--listen", "127.0.0.1:0", "--admin", "off"];

test("the built file runs alone in an empty folder", { skip }, async () => {
  const cwd = join(folder, "alone"), command = [process.execPath, ...HERE, "lb.js", ...DEMO];
  assert.match(await answersOf(command, cwd, alone()), /^hello from \w+: GET \/a\n$/);
  assert.match(await answersOf([...command, "--workers", "2"], cwd, alone()), /^hello from \w+: GET \/a\n$/);
});

/** Runs a file on Node and gives what it ends with and says. */
async function ended(args: string[], cwd: string): Promise<{ code: number; stderr: string }> {
  return await run(NODE, args, { cwd }).then(({ stderr }) => ({ code: 0, stderr }), (error) => error);
}

test("an older Node is told in one sentence which one is needed", onNode, async () => {
  const older = 'data:text/javascript,Object.defineProperty(process, "versions", { value: { node: "20.20.2" } })';
  for (const file of [join(folder, "alone/lb.js"), join(ROOT, ".ci/ready.cjs")]) {
    const { code, stderr } = await ended(["--import", older, file], folder);
    assert.equal(code, 1);
    assert.match(stderr, /^lb\.ts needs Node 22\.18 or later, and this is Node 20\.20\.2: update Node, or .*\n$/);
  }
});

test("npm start says what to do where nothing is installed", onNode, async () => {
  copyFileSync(join(ROOT, ".ci/ready.cjs"), join(folder, "ready.cjs"));
  const { code, stderr } = await ended(["ready.cjs", "hono"], folder);
  assert.deepEqual([code, stderr], [1, "hono, which lb.ts needs, is not in node_modules: run npm install\n"]);
  assert.equal((await ended([join(ROOT, ".ci/ready.cjs"), "hono", "esbuild"], folder)).code, 0);
});

test("the built file runs as a Worker", onNode, async (t) => {
  const server = await scriptedServer((visit) => visit.send(answer("from the server")));
  t.after(() => server.close());
  const { Miniflare } = createRequire(import.meta.url)("miniflare");
  const wrangler = JSON.parse(readFileSync(join(ROOT, "wrangler.jsonc"), "utf8").replace(/^\s*\/\/.*$/gm, ""));
  const routes = { log: "off", default: { servers: [`127.0.0.1:${server.port}`], health: "off" } };
  const modules = {
    "lb.js": { type: "esm", contents: readFileSync(join(folder, "alone/lb.js"), "utf8") },
    "routes.yml": { type: "text", contents: JSON.stringify(routes) },
  };
  const config = {
    name: "lb",
    compatibilityDate: wrangler.compatibility_date,
    compatibilityFlags: wrangler.compatibility_flags,
    manifest: { mainModule: "lb.js", modules },
  };
  const dev = { unsafeDirectSockets: [{ host: "127.0.0.1", port: 0 }] };
  const miniflare = new Miniflare({ cf: false, enableDevRegistry: false, workers: [{ config, dev }] });
  t.after(() => miniflare.dispose());
  const port = Number((await miniflare.unsafeGetDirectURL()).port);
  const { answers } = await rawRequest(port, get("/a", "Connection: close\r\n"));
  assert.equal(answers[0]!.body.toString(), "from the server");
});

test("the package has the program, its source and its types, and nothing else that is large", onNode, async () => {
  const { stdout } = await run("tar", ["-tzf", join(folder, `lb-ts-${packageJson().version}.tgz`)]);
  const files = stdout.trim().split("\n").map((name) => name.replace(/^package\//, ""));
  const own = files.filter((name) => !name.startsWith("docs/")).sort();
  const expected = ["CHANGELOG.md", "LICENSE", "README.md", "dist/lb.d.ts", "dist/lb.js", "lb.ts", "package.json"];
  assert.deepEqual(own, expected);
  const types = readFileSync(join(project, "node_modules/lb-ts/dist/lb.d.ts"), "utf8");
  assert.ok(types.length < 60_000, `${types.length} bytes of types`);
});

test("npx runs the package", onNode, async () => {
  const env = { ...alone(), PATH: `${join(ROOT, "node_modules/.bin")}:${process.env.PATH}` };
  assert.match(await answersOf(["npx", "--offline", "lb-ts", ...DEMO], project, env), /^hello from \w+: GET \/a\n$/);
});

/** README's first example of the library. */
const example = () => /## As a library\n.*?```ts\n(.*?)```/s.exec(readFileSync(join(ROOT, "README.md"), "utf8"))![1]!;

test("a program of its own imports the package", { skip }, async () => {
  const code = example().replace('"./lb.ts"', '"lb-ts"').replace("port: 8080", 'port: 0, hostname: "127.0.0.1"');
  assert.ok(code.includes('"lb-ts"'));
  writeFileSync(join(project, `${runtime()}.ts`), `${code}\nlb.stop();\nconsole.log("it serves");\nprocess.exit(0);\n`);
  const flags = { deno: ["run", "-A", "--cached-only", "--no-check", "--node-modules-dir=manual"], bun: [], node: [] };
  const { stdout } = await run(process.execPath, [...flags[runtime()], `${runtime()}.ts`], { cwd: project });
  assert.match(stdout, /^it serves$/m);
});

test("a strict program without the DOM's types type checks against the package", onNode, async () => {
  const file = join(project, "typed.ts"), tsc = join(ROOT, "node_modules/typescript/bin/tsc");
  const code = example().replace('"./lb.ts"', '"lb-ts"');
  writeFileSync(file, `${code}\n// @ts-expect-error: a text is no config\nlb.reload("a text");\n`);
  const strict = ["--strict", "--noImplicitReturns", "--exactOptionalPropertyTypes", "--noUncheckedIndexedAccess"];
  const target = ["--lib", "es2024", "--target", "es2024", "--module", "nodenext", "--types", "node", "--noEmit"];
  const { stdout } = await run(NODE, [tsc, ...strict, ...target, file], { cwd: project }).catch((error) => error);
  assert.equal(stdout, "");
});

test("the sources could be published: every public name has an explicit type", {
  skip: runtime() === "deno" ? false : "deno publishes",
}, async () => {
  const args = ["publish", "--dry-run", "--allow-dirty", "--no-check"];
  const { stderr } = await run(process.execPath, args, { cwd: ROOT, env: { ...process.env, NO_COLOR: "1" } });
  assert.match(stderr, /Dry run complete/);
});
