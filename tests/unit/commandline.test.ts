// What the command line prints: it follows from the arguments, the environment and the file alone, on every runtime.

import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { callProgram, inFolder } from "../rig/process.ts";
import { test } from "../rig/rig.ts";

const FINE = "services: {shop: {servers: ['localhost:8081', 'localhost:8082']}}\ndefault: {service: shop}\n";
const fine = (use: (folder: string) => Promise<void>) => inFolder({ "routes.yml": FINE }, use);

test("--check gives 1 and every mistake with its line", () =>
  inFolder({
    "bad.yml": `services:
  shop:
    servers: [localhost:8081]
    strateggy: random
    health: {interval: 5 sec}
routes:
  - path: /a
    service: shopp
`,
  }, async (folder) => {
    const { code, err } = await callProgram(["--check", "bad.yml"], { cwd: folder });
    assert.equal(code, 1);
    for (const [line, word] of [[4, "strateggy"], [5, "5 sec"], [8, "shopp"]]) {
      assert.match(err, new RegExp(`^bad\\.yml:${line}:.* .*${word}`, "m"));
    }
  }));

test("a wrong call ends with 2 and names what is wrong", () =>
  fine(async (folder) => {
    for (
      const [args, named] of [
        [["--nope"], /--nope/],
        [["routes.yml", "more.yml"], /more\.yml/],
        [["--port", "eighty"], /eighty/],
        [["--port", "70000"], /70000/],
        [["--listen", "here:there"], /here:there/],
        [["--log", "loud"], /loud/],
        [["--drain", "soon"], /soon/],
        [["--explain", "/a"], /\/a/],
      ] as [string[], RegExp][]
    ) {
      const { code, out, err } = await callProgram(args, { cwd: folder });
      assert.deepEqual([code, out], [2, ""], args.join(" "));
      assert.match(err, named);
      assert.match(err, /--help/);
    }
  }));

test("--print-config prints a config that means the same", () =>
  fine(async (folder) => {
    const first = await callProgram(["--print-config"], { cwd: folder });
    assert.deepEqual([first.code, first.err], [0, ""]);
    assert.match(first.out, /strategy: round-robin/);
    writeFileSync(join(folder, "printed.yml"), first.out);
    assert.deepEqual(await callProgram(["--print-config", "printed.yml"], { cwd: folder }), first);
  }));

test("--schema is JSON and knows the top of the file", async () => {
  const { code, out } = await callProgram(["--schema"]);
  assert.equal(code, 0);
  const { properties } = JSON.parse(out);
  for (const name of ["listen", "log", "services", "hosts", "paths", "routes", "default"]) {
    assert.ok(properties[name], name);
  }
});

test("--explain tells the route, the service and its servers", () =>
  fine(async (folder) => {
    const found = await callProgram(["--explain", "GET http://www.peter.com/a?b=c"], { cwd: folder });
    assert.equal(found.code, 0);
    for (const word of ["default", "shop", "round-robin", "localhost:8081", "localhost:8082", "/a?b=c"]) {
      assert.ok(found.out.includes(word), `${word} in ${found.out}`);
    }
    writeFileSync(join(folder, "routes.yml"), "paths: [{path: /pete, servers: ['localhost:8081']}]");
    const none = await callProgram(["--explain", "http://www.peter.com/a"], { cwd: folder });
    assert.match(none.out, /404.*no-route/);
    assert.equal(none.code, 1);
  }));

test("--explain takes headers, for routes that ask for them", () =>
  fine(async (folder) => {
    const servers = (port: number) => `servers: ['localhost:${port}']`;
    const routes = `- {path: /, headers: {x-canary: "1"}, ${servers(8082)}}\n- {path: /, ${servers(8081)}}`;
    writeFileSync(join(folder, "routes.yml"), `routes:\n${routes}`);
    const explain = (...more: string[]) => callProgram(["--explain", "http://a.test/", ...more], { cwd: folder });
    assert.match((await explain()).out, /localhost:8081/);
    assert.match((await explain("-H", "accept: */*", "-H", "x-canary: 1")).out, /localhost:8082/);
    const wrong = await explain("--header", "x-canary");
    assert.deepEqual([wrong.code, /"x-canary" is not a header such as "x-canary: 1"/.test(wrong.err)], [1, true]);
    const alone = await callProgram(["-H", "a: b"], { cwd: folder });
    assert.deepEqual([alone.code, /--header goes with --explain/.test(alone.err)], [2, true]);
  }));

test("an option wins over the environment, the environment over the file, the file over the default", () =>
  inFolder({ "routes.yml": FINE, "own.yml": `listen: 127.0.0.1:1111\nlog: json\n${FINE}` }, async (folder) => {
    const inForce = async (args: string[], env: Record<string, string> = {}) => {
      const { code, out, err } = await callProgram(["--print-config", ...args], { cwd: folder, env });
      assert.equal(code, 0, err);
      return [/^listen:(?:\n {2}-)? "?([^"\s]+)"?\n\w/m.exec(out)?.[1], /^log: (\w+)$/m.exec(out)?.[1]];
    };
    const env = { LB_CONFIG: "own.yml" };
    assert.deepEqual(await inForce([]), ["8080", "combined"]);
    assert.deepEqual(await inForce([], env), ["127.0.0.1:1111", "json"]);
    assert.deepEqual(await inForce(["routes.yml"], env), ["8080", "combined"]);
    assert.deepEqual(await inForce(["-c", "own.yml"]), ["127.0.0.1:1111", "json"]);
    assert.deepEqual(await inForce([], { ...env, LB_PORT: "2222", LB_LOG: "off" }), ["2222", "off"]);
    assert.deepEqual(await inForce([], { ...env, LB_LISTEN: "127.0.0.2:3333" }), ["127.0.0.2:3333", "json"]);
    const empty = { LB_PORT: "", LB_LISTEN: "", LB_LOG: "", LB_ADMIN: "", LB_WORKERS: "" }; // as good as not set
    assert.deepEqual(await inForce([], { ...env, ...empty }), ["127.0.0.1:1111", "json"]);
    assert.deepEqual(await inForce(["--drain", "0s"], env), ["127.0.0.1:1111", "json"]);
    const all = { ...env, LB_LISTEN: "127.0.0.2:3333", LB_PORT: "2222", LB_LOG: "off" };
    assert.deepEqual(await inForce(["-l", "127.0.0.3:4444", "--log", "combined"], all), ["127.0.0.3:4444", "combined"]);
    assert.deepEqual(await inForce(["-p", "5555"], all), ["5555", "off"]);
  }));

test("a wrong number of workers is refused", () =>
  fine(async (folder) => {
    for (const wrong of ["0", "-1", "two", "1.5", "257"]) {
      const { code, err } = await callProgram([`--workers=${wrong}`], { cwd: folder });
      assert.equal(code, 2);
      assert.match(err, /is not auto or a whole number/);
    }
  }));
