// Fleets: the engine's calls over real etcd, votes and probers as pure functions, an instance over a fake engine with a
// clock, and the running program among others.

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer, type Socket } from "node:net";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import nodeTest from "node:test";
import { fileURLToPath } from "node:url";
import { createLoadBalancer, type EngineError, EtcdClient, parseConfig } from "../../lb.ts";
import {
  ask,
  type Ends,
  eventually,
  type Instance,
  type Loose,
  skip,
  startBackend,
  startEtcd,
  startInstance,
} from "../rig/engines.ts";
import { A, CA, KEY } from "../rig/certificates.ts";
import { checkEngine } from "../rig/fleet.ts";
import { COMMAND, freePort, runtime, sleep, until } from "../rig/rig.ts";

/** A test that ends what it has begun, the last first. */
const test = (name: string, body: (t: Ends) => unknown, skipped: string | false = false) =>
  nodeTest(name, { timeout: 110_000, skip: skipped }, async () => {
    const ends: (() => unknown)[] = [];
    try {
      await body({ after: (end) => void ends.unshift(end) });
    } finally {
      for (const end of ends) await end();
    }
  });

const config = (fleet: Record<string, unknown>) =>
  parseConfig(JSON.stringify({ fleet, default: { servers: ["127.0.0.1:9"] } }));
/** A client of etcd as an instance has it. */
function clientOf(fleet: Record<string, unknown>): EtcdClient {
  const parsed = config(fleet), { effects } = createLoadBalancer(parsed).balancer;
  return new EtcdClient(parsed.fleet!, effects);
}
const failsWith = (kind: string, message: RegExp) => (error: EngineError) => {
  assert.equal(error.kind, kind, String(error));
  assert.match(error.message, message);
  return true;
};

// ─── The config ───

test("a fleet has defaults, and its members are URLs", () => {
  const { fleet } = config({ etcd: ["10.0.0.1:2379", "https://a.example/.well-known/lb-fleet/"] });
  const { etcd, prefix, name, user, ttl, probers, durable } = fleet!;
  assert.deepEqual(etcd, ["http://10.0.0.1:2379", "https://a.example/.well-known/lb-fleet"]);
  assert.deepEqual({ prefix, name, user, ttl, probers, durable }, {
    ...{ prefix: "lb/", name: "", user: "", ttl: 10_000, probers: 3, durable: "" },
  });
});

for (
  const [fleet, message] of [
    [{}, /fleet: needs etcd, or durable/],
    [{ etcd: "http://user:pw@10.0.0.1:2379" }, /fleet\.etcd: .* is not an etcd such as http:\/\/10\.0\.0\.1:2379/],
    [{ etcd: "a:1", name: "a/b" }, /fleet\.name: "a\/b" is not a name of an instance/],
    [{ etcd: "a:1", ttl: "1s" }, /fleet\.ttl: is less than 2s/],
    [{ etcd: "a:1", probers: 0 }, /fleet\.probers: 0 is not a whole number from 1 to 100/],
    [{ etcd: "a:1", nodes: 3 }, /fleet\.nodes: unknown key/],
  ] as [Record<string, unknown>, RegExp][]
) {
  test(`a fleet that cannot be is refused: ${JSON.stringify(fleet)}`, () => {
    assert.throws(() => config(fleet), message);
  });
}

test("a file that says nothing but how to get to the fleet is a whole one", () => {
  assert.equal(parseConfig("fleet: { etcd: localhost:2379 }").routes.length, 0);
});

// ─── The engine ───

test("etcd does what engines do, and a watch of what it has compacted ends", async (t) => {
  const etcd = await startEtcd(t), engine = clientOf({ etcd: etcd.urls });
  await checkEngine(engine, sleep);
  const { revision } = await engine.list(true);
  await etcd.call("kv/compaction", { revision: `${revision}` });
  assert.equal(await engine.watch(1, () => {}).ended, "compacted");
}, skip);

test("an engine that cannot be used is said in one sentence", async (t) => {
  const etcd = await startEtcd(t), url = etcd.urls[0]!;
  const post = async (path: string, body: Loose) => void await etcd.call(path, body);
  await assert.rejects(
    clientOf({ etcd: url }).swap("config", "x".repeat(1_600_000), 0),
    failsWith("refused", /1\.5 MiB/),
  );
  for (const name of ["root", "lb", "other"]) await post("auth/user/add", { name, password: "right" });
  const range = { key: btoa("lb/"), range_end: btoa("lb0") };
  await post("auth/role/add", { name: "lb" });
  await post("auth/role/grant", { name: "lb", perm: { permType: "READWRITE", ...range } });
  await post("auth/user/grant", { user: "lb", role: "lb" });
  await post("auth/user/grant", { user: "root", role: "root" });
  await post("auth/enable", {});
  await assert.rejects(clientOf({ etcd: url }).list(true), failsWith("refused", /fleet\.user and fleet\.password/));
  const as = (user: string, password: string) => clientOf({ etcd: url, user, password });
  await assert.rejects(as("lb", "wrong").list(true), failsWith("refused", /the user "lb": name or password is wrong$/));
  await assert.rejects(as("other", "right").list(true), failsWith("refused", /keys that begin with "lb\/": grant/));

  const engine = as("lb", "right");
  await engine.swap("config", "kept", 0);
  const { token } = await etcd.call("auth/authenticate", { name: "root", password: "right" });
  await etcd.call("auth/user/changepw", { name: "lb", password: "newer" }, 0, token);
  await assert.rejects(engine.list(true), failsWith("refused", /name or password is wrong/));
  await etcd.call("auth/user/changepw", { name: "lb", password: "right" }, 0, token);
  assert.equal((await engine.list(true)).keys.get("config")!.value, "kept", "a refused token is got anew");
  await etcd.call("auth/disable", {}, 0, token);
  assert.equal((await engine.list(true)).keys.size, 1, "users are switched off");
}, skip);

test("what is no etcd is named", async (t) => {
  const backend = await startBackend(t, "a page");
  await assert.rejects(
    clientOf({ etcd: backend.url }).list(true),
    failsWith("refused", /does not speak etcd's JSON gateway/),
  );
  const greets = createServer((socket: Socket) => socket.on("error", () => {}).end("SSH-2.0-OpenSSH_9.9\r\n"));
  await new Promise<void>((resolve) => greets.listen(0, "127.0.0.1", resolve));
  t.after(() => greets.close());
  const { port } = greets.address() as AddressInfo;
  await assert.rejects(clientOf({ etcd: `127.0.0.1:${port}` }).list(true), failsWith("silent", /not HTTP\/1\.1/));
  await assert.rejects(
    clientOf({ etcd: `127.0.0.1:${await freePort()}` }).list(true),
    failsWith("silent", /127\.0\.0\.1/),
  );
});

// ─── Instances ───

const POOL = (...servers: { address: string }[]) =>
  `# the pool\nservices:\n  shop:\n    servers: [${servers.map(({ address }) => address).join(", ")}] # all\n` +
  `    health: { path: /health, interval: 200ms, fall: 2, rise: 2 }\ndefault: { service: shop }\n`;
const weightOf = async (one: Instance, server = 0) => (await one.ask("GET /services/shop")).json.servers[server].weight;
const isDown = async (one: Instance, server = 0) => !(await one.ask("GET /services/shop")).json.servers[server].up;
const count = (text: string, what: string) => text.split(what).length - 1;

test(
  "instances share a document: the first has it, changes on any are in force on all, comments and order stay",
  async (t) => {
    const etcd = await startEtcd(t), backend = await startBackend(t, "one"), fleet = { etcd: etcd.urls, ttl: "3s" };
    const a = await startInstance(t, "a", fleet, { rest: POOL(backend) });
    assert.equal(await etcd.get("lb/config"), a.text(), "the local file becomes the document");
    const b = await startInstance(t, "b", fleet, { rest: POOL({ address: "127.0.0.1:9" }) });
    const c = await startInstance(t, "c", { etcd: etcd.urls, ttl: "3s" });
    for (const one of [b, c]) {
      assert.equal(one.text(), a.text(), "the document is written over the local file");
      assert.match(readFileSync(`${one.file}.bak`, "utf8"), /^fleet: /);
      assert.match(one.output(), /warn: fleet: .* said something else than the fleet's document/);
      assert.equal((await ask(`http://127.0.0.1:${one.port}/`)).text, "one");
    }
    await eventually("all know all", async () => (await a.fleet()).instances.length === 3);
    const changed = await b.ask("PATCH /services/shop/servers/" + backend.address + "?wait=5s", { weight: 7 });
    assert.equal(changed.status, 200, changed.text);
    for (const one of [a, b, c]) assert.equal(await weightOf(one), 7);
    await until("it is copied", () => [a, b, c].every((one) => one.text().includes("weight: 7")));
    assert.match(c.text(), /^fleet: .*\n# the pool\n[^]*# all\n/);
    const { engine, config, instances } = await c.fleet();
    assert.equal(engine, "answers");
    assert.deepEqual(instances.map((one: Loose) => [one.name, one.config, one.problem]), [
      ...["a", "b", "c"].map((name) => [name, config, ""]),
    ]);
    const metrics = (await c.ask("GET /metrics")).text;
    for (const name of ["up 1", "instances 3", `config_revision ${config}`, "config_refused_total 0"]) {
      assert.match(metrics, new RegExp(`^lb_fleet_${name}$`, "m"));
    }
    assert.match(metrics, /^lb_fleet_seconds_since_contact [\d.]+$/m);
    assert.match(metrics, /^lb_fleet_resyncs_total\{reason="deaf"\} 0$/m);
    // a change by etcd's own tools
    await etcd.put("lb/config", a.text().replace("weight: 7", "weight: 8"));
    for (const one of [a, b, c]) await eventually("it is in force", async () => await weightOf(one) === 8);
    // the local file of one
    await until("it is copied", () => a.text().includes("weight: 8"));
    writeFileSync(a.file, a.text().replace("weight: 8", "weight: 9"));
    for (const one of [a, b, c]) await eventually("the edited file is in force", async () => await weightOf(one) === 9);
    await eventually("it is the document", async () => (await etcd.get("lb/config"))?.includes("weight: 9"));
  },
  skip,
);

test("an instance that says only where the fleet is waits for a document, answers 404, and is not ready", async (t) => {
  const etcd = await startEtcd(t), backend = await startBackend(t, "one");
  const a = await startInstance(t, "a", { etcd: etcd.urls });
  assert.equal((await ask(`http://127.0.0.1:${a.port}/`)).status, 404);
  assert.deepEqual(
    (await a.fleet()).instances.map(({ name }: Loose) => name),
    ["a"],
    "it is one of them from the start",
  );
  assert.equal((await a.ask("GET /health/ready")).status, 503);
  assert.equal(await etcd.get("lb/config"), undefined);
  await etcd.put("lb/config", `fleet: { etcd: "${etcd.urls[0]}" }\n${POOL(backend)}`);
  await eventually("it is ready", async () => (await a.ask("GET /health/ready")).status === 200);
  assert.equal((await ask(`http://127.0.0.1:${a.port}/`)).text, "one");
  await until("how it gets to the fleet stays its own", () => /name"?: "?\$\{NAME\}/.test(a.text()));
}, skip);

test("what cannot be used changes nothing where it cannot, and is said there", async (t) => {
  const etcd = await startEtcd(t), backend = await startBackend(t, "one"), fleet = { etcd: etcd.urls, ttl: "3s" };
  const a = await startInstance(t, "a", fleet, { rest: POOL(backend), env: { WEIGHT: "5" } });
  const b = await startInstance(t, "b", fleet);
  const text = a.text(), server = `{ url: ${backend.address}, weight: \${WEIGHT} }`;
  await etcd.put("lb/config", text.replace(`[${backend.address}]`, `[${server}]`));
  await eventually("it is in force where the variable is set", async () => await weightOf(a) === 5);
  const problemOf = async (one: Instance, of: string) =>
    (await one.fleet()).instances.find(({ name }: Loose) => name === of)?.problem;
  await eventually("the other one says why", async () => /WEIGHT is not set/.test(await problemOf(a, "b")));
  assert.equal(await weightOf(b), 1);
  assert.match(b.output(), /error: fleet: revision \d+ of the document cannot be used here[^]*WEIGHT is not set/);
  assert.match((await b.ask("GET /metrics")).text, /lb_fleet_config_refused_total 1/);
  // a change there would undo what it cannot read
  assert.equal((await b.ask("PATCH /config", { log: "json" })).status, 409);
  const waited = await a.ask("PATCH /config?wait=300ms", { log: "json" });
  assert.deepEqual([waited.status, waited.json], [202, { missing: ["b"] }]);
  await etcd.put("lb/config", "newer_key: 1\n");
  await eventually("nobody takes it", async () => /unknown key/.test(await problemOf(b, "a")));
  assert.equal(await weightOf(a), 5);
  await etcd.put("lb/config", text);
  await eventually("all are well again", async () => await problemOf(b, "b") === "" && await weightOf(a) === 1);
}, skip);

test("If-Match holds over the fleet, and an edit on the base of an older document is not taken", async (t) => {
  const etcd = await startEtcd(t), backend = await startBackend(t, "one"), fleet = { etcd: etcd.urls, ttl: "3s" };
  const a = await startInstance(t, "a", fleet, { rest: POOL(backend) }), b = await startInstance(t, "b", fleet);
  const { headers: { etag } } = await a.ask("GET /config");
  assert.equal((await b.ask("GET /config")).headers.etag, etag, "tags are of the content");
  assert.equal((await b.ask("PATCH /config?wait=5s", { log: "json" }, { "if-match": etag })).status, 200);
  assert.equal((await a.ask("PATCH /config", { log: "off" }, { "if-match": etag })).status, 412);
  // b's edit is made while it stands still, and another change comes first
  b.freeze();
  assert.equal((await a.ask("PATCH /services/shop", { retries: 5 })).status, 200);
  writeFileSync(b.file, b.text() + "# mine\n");
  b.resume();
  await eventually("b has the other change", async () => /retries: 5/.test((await b.ask("GET /config")).text));
  await until(
    "the edit is kept beside it",
    () => existsSync(`${b.file}.bak`) && /# mine/.test(readFileSync(`${b.file}.bak`, "utf8")),
  );
  await until("that is said", () => /was edited on the base of an older one/.test(b.output()));
  assert.equal(b.text(), a.text());
  assert.ok(!(await etcd.get("lb/config"))!.includes("# mine"));
}, skip);

test(
  "without the engine an instance goes on as it is, says so once, and refuses changes; then all is well again",
  async (t) => {
    const etcd = await startEtcd(t), backend = await startBackend(t, "one"), fleet = { etcd: etcd.urls, ttl: "2s" };
    const a = await startInstance(t, "a", fleet, { rest: POOL(backend) }), b = await startInstance(t, "b", fleet);
    await etcd.kill(0);
    await eventually("it is away", async () => (await a.fleet()).engine === "away");
    assert.equal((await ask(`http://127.0.0.1:${a.port}/`)).text, "one");
    assert.match((await a.ask("GET /live")).text, /the fleet&#39;s engine does not answer: /);
    const refused = await a.ask("PATCH /config", { log: "json" });
    assert.deepEqual([refused.status, refused.json.detail], [
      503,
      "the fleet's engine is away: nothing can be changed",
    ]);
    assert.equal((await a.ask(`PUT /services/shop/servers/${backend.address}/health`, { health: "down" })).status, 200);
    assert.equal(await isDown(a), true, "here alone");
    assert.equal(await isDown(b), false);
    await eventually("its own probes go on", async () => !await isDown(a));
    assert.match((await a.ask("GET /metrics")).text, /lb_fleet_up 0/);
    // a start without it: the local file, at once
    const c = await startInstance(t, "c", fleet, { rest: POOL(backend) });
    assert.equal((await ask(`http://127.0.0.1:${c.port}/`)).text, "one");
    assert.match(c.output(), /warn: fleet: .*; starts with /);
    await etcd.start(0);
    await eventually("all are there again", async () => (await c.fleet()).instances.length === 3);
    assert.equal(count(a.output(), "has not answered for"), 1);
    assert.equal(count(a.output(), "answers again"), 1);
    assert.equal((await c.ask("PATCH /config?wait=5s", { log: "json" })).status, 200);
    assert.match((await b.ask("GET /config")).text, /log: json/);
  },
  skip,
);

test("a deleted document is put back, and an engine that is empty or restored gets what is in force", async (t) => {
  const etcd = await startEtcd(t), backend = await startBackend(t, "one"), fleet = { etcd: etcd.urls, ttl: "2s" };
  const a = await startInstance(t, "a", fleet, { rest: POOL(backend) }), b = await startInstance(t, "b", fleet);
  const before = (await etcd.keys()).get("lb/secret")!.value;
  await etcd.remove("lb/config");
  await eventually("it is back", async () => await etcd.get("lb/config") === a.text());
  await until(
    "one of them says so",
    () => /was deleted: what is in force here is put back/.test(a.output() + b.output()),
  );
  for (let i = 0; i < 30; i++) await etcd.put("other/x", "1"); // so that the new one's revisions are lower
  await etcd.kill(0);
  etcd.wipe();
  await etcd.start(0);
  await eventually("an empty one is filled", async () => (await etcd.keys()).size === 4);
  assert.equal(await etcd.get("lb/config"), a.text());
  assert.equal((await etcd.keys()).get("lb/secret")!.value, before, "the secret too");
  assert.equal((await b.ask("PATCH /config?wait=5s", { log: "json" })).status, 200);
  assert.match((await a.ask("GET /config")).text, /log: json/, "lower revisions are no older ones");
}, skip);

test(
  "each server is probed by some, and down on all when most of these say so; operators' words count on all",
  async (t) => {
    const etcd = await startEtcd(t), fleet = { etcd: etcd.urls, ttl: "2s", probers: 2 };
    const [one, two] = [await startBackend(t, "one"), await startBackend(t, "two")];
    const a = await startInstance(t, "a", fleet, { rest: POOL(one, two) });
    const others = await Promise.all(["b", "c"].map((name) => startInstance(t, name, { etcd: etcd.urls }))),
      all = [a, ...others];
    for (const one of all) await eventually("all know all", async () => (await one.fleet()).instances.length === 3);
    const { probes } = await others[0]!.fleet();
    assert.deepEqual(probes.map(({ server, by }: Loose) => [server, by.length]), [
      [`shop ${one.url}`, 2],
      [`shop ${two.url}`, 2],
    ]);
    one.isUp = false;
    for (const instance of all) await eventually("it is down", () => isDown(instance));
    for (const instance of all) assert.equal(await isDown(instance, 1), false);
    const down = (await a.fleet()).instances.flatMap((one: Loose) => one.down);
    assert.ok(down.length > 0 && down.every((server: string) => server === `shop ${one.url}`), String(down));
    const { text: page } = await a.ask("GET /live");
    for (const name of ["a (this one)", "b", "c"]) assert.ok(page.includes(`<td>${name}</td>`), page);
    assert.match(page, /<small>[^<]*by [abc]; [abc]<\/small>/, "who probes a server stands in its row");
    // a fresh one has not probed it, and knows
    const fresh = await startInstance(t, "d", { etcd: etcd.urls });
    assert.equal(await isDown(fresh), true);
    one.isUp = true;
    for (const instance of [...all, fresh]) await eventually("it is up", async () => !await isDown(instance));
    assert.equal((await a.ask(`PUT /services/shop/servers/${two.address}/health`, { health: "down" })).status, 200);
    for (const instance of all) await eventually("an operator has said it", () => isDown(instance, 1));
    for (const instance of all) await eventually("probes say otherwise", async () => !await isDown(instance, 1));
    // one is killed, one ends by itself: its lease is gone at once
    await others[1]!.stop("SIGTERM");
    await eventually("who ends is off at once", async () => (await a.fleet()).instances.length === 3, 1_500);
    await others[0]!.stop("SIGKILL");
    await eventually("who is killed is off after the ttl", async () => (await a.fleet()).instances.length === 2);
    assert.equal(count(a.output(), " is down:"), 1, "no flapping");
  },
  skip,
);

test("sticky cookies hold on all instances and over restarts, in workers too", async (t) => {
  const etcd = await startEtcd(t), [one, two] = [await startBackend(t, "one"), await startBackend(t, "two")];
  const rest = `default: { servers: [${one.address}, ${two.address}], sticky: lb }\n`, fleet = { etcd: etcd.urls };
  const a = await startInstance(t, "a", fleet, { rest });
  const b = await startInstance(t, "b", fleet, { args: ["--workers", "2"] });
  const first = await ask(`http://127.0.0.1:${a.port}/`), cookie = String(first.headers["set-cookie"]).split(";")[0]!;
  const again = async (instance: Instance) => {
    for (let i = 0; i < 6; i++) {
      const answer = await ask(`http://127.0.0.1:${instance.port}/`, { headers: { cookie } });
      assert.deepEqual([answer.text, answer.headers["set-cookie"]], [first.text, undefined], instance.name);
    }
  };
  await again(b);
  await a.stop();
  await again(await startInstance(t, "a", fleet, { rest }));
  // somebody sets another secret: all follow
  await etcd.put("lb/secret", "another-secret");
  await eventually("workers have it too", async () => {
    const { headers } = await ask(`http://127.0.0.1:${b.port}/`, { headers: { cookie } });
    return headers["set-cookie"] !== undefined;
  });
}, skip);

test("a change is in force in workers too, and their verdicts are the fleet's", async (t) => {
  const etcd = await startEtcd(t), fleet = { etcd: etcd.urls, ttl: "2s" };
  const [one, two] = [await startBackend(t, "one"), await startBackend(t, "two")];
  const a = await startInstance(t, "a", fleet, { rest: POOL(one, two) });
  const b = await startInstance(t, "b", fleet, { args: ["--workers", "2"] });
  const texts = async () => {
    const seen = new Set<string>();
    for (let i = 0; i < 12; i++) seen.add((await ask(`http://127.0.0.1:${b.port}/`)).text);
    return [...seen].sort().join();
  };
  assert.equal(await texts(), "one,two");
  one.isUp = false;
  await eventually("workers leave it out", async () => await texts() === "two");
  one.isUp = true;
  await eventually("workers ask it again", async () => await texts() === "one,two");
  assert.equal(
    (await a.ask(`PUT /services/shop/servers/${two.address}/state?wait=5s`, { state: "drain" })).status,
    200,
  );
  await eventually("workers have the change", async () => await texts() === "one");
}, skip);

test("a running instance whose file gets a fleet says that it joins with the next start", async (t) => {
  const folder = mkdtempSync(join(tmpdir(), "lb-fleet-")), file = join(folder, "routes.yml");
  t.after(() => rmSync(folder, { recursive: true, force: true }));
  writeFileSync(file, "default: { servers: [127.0.0.1:9] }\n");
  const a = await startInstance(t, "a", {}, { file });
  writeFileSync(file, "fleet: { etcd: 127.0.0.1:9 }\ndefault: { servers: [127.0.0.1:9] }\n");
  await until("that is said", () => /warn: fleet has changed, .* takes effect with the next start/.test(a.output()));
  assert.equal((await a.fleet()).engine, "none");
});

test("two instances of one name: the later one gets a number behind it", async (t) => {
  const etcd = await startEtcd(t), backend = await startBackend(t, "one"), fleet = { etcd: etcd.urls, name: "lb" };
  const a = await startInstance(t, "a", fleet, { rest: POOL(backend) }), b = await startInstance(t, "b", fleet);
  assert.deepEqual([(await a.fleet()).name, (await b.fleet()).name], ["lb", "lb#2"]);
  assert.match(b.output(), /warn: fleet: another instance is called "lb": this one is "lb#2"/);
}, skip);

test(
  "passwords appear nowhere: not in the document of who has them in the environment, the API, the log or a page",
  async (t) => {
    const etcd = await startEtcd(t), backend = await startBackend(t, "one"), password = "pass-of-the-fleet";
    const post = async (path: string, body: Loose) => void await etcd.call(path, body);
    for (const name of ["root", "lb"]) await post("auth/user/add", { name, password });
    await post("auth/role/add", { name: "lb" });
    await post("auth/role/grant", {
      name: "lb",
      perm: { permType: "READWRITE", key: btoa("lb/"), range_end: btoa("lb0") },
    });
    await post("auth/user/grant", { user: "lb", role: "lb" });
    await post("auth/user/grant", { user: "root", role: "root" });
    await post("auth/enable", {});
    const fleet = { etcd: etcd.urls, user: "lb", password: "${ETCD_PASSWORD}", ttl: "2s" },
      env = { ETCD_PASSWORD: password };
    const a = await startInstance(t, "a", fleet, { rest: POOL(backend), env });
    assert.equal((await a.fleet()).engine, "answers");
    const shown = [a.text(), a.output()];
    for (const path of ["fleet", "config", "services", "metrics", "live", "openapi.json"]) {
      shown.push((await a.ask(`GET /${path}`)).text);
    }
    for (const text of shown) assert.ok(!text.includes(password), text);
    // another password: said in one sentence, and nothing is lost
    const { token } = await etcd.call("auth/authenticate", { name: "root", password });
    await etcd.call("auth/user/changepw", { name: "lb", password: "another" }, 0, token);
    const refused = /etcd refuses the user "lb": name or password is wrong/;
    await eventually("it is away, and says why", async () => {
      const { engine, problem } = await a.fleet();
      return engine === "away" && refused.test(problem);
    });
    await until("the log says why", () => refused.test(a.output()));
    assert.equal((await ask(`http://127.0.0.1:${a.port}/`)).text, "one");
    await etcd.call("auth/user/changepw", { name: "lb", password }, 0, token);
    await eventually("it is back", async () => (await a.fleet()).engine === "answers");
    assert.equal((await a.ask("PATCH /config?wait=5s", { log: "json" })).status, 200);
  },
  skip,
);

/** Asks for a page again and again until it is stopped. Gives how many answers were no 200. */
function load(port: number): { stop(): Promise<{ sent: number; failed: number }> } {
  let isOver = false, sent = 0, failed = 0;
  const one = async () => {
    while (!isOver) {
      sent++;
      await ask(`http://127.0.0.1:${port}/`).then(({ status }) => status === 200 || failed++, () => failed++);
      await sleep(5);
    }
  };
  const running = Promise.all([one(), one()]);
  return {
    async stop() {
      isOver = true;
      await running;
      return { sent, failed };
    },
  };
}

test(
  "three members: the leader is killed, each is frozen, the log is compacted: changes go on, and no request fails",
  async (t) => {
    const etcd = await startEtcd(t, 3), backend = await startBackend(t, "one"), fleet = { etcd: etcd.urls, ttl: "3s" };
    const a = await startInstance(t, "a", fleet, { rest: POOL(backend) }), b = await startInstance(t, "b", fleet);
    const loads = [a, b].map(({ port }) => load(port));
    let weight = 1;
    /** How long a change takes until it is in force on both, from wherever it can be made. */
    const change = async (what: string) => {
      const begun = performance.now(), wanted = ++weight;
      await eventually(`${what}: a change is made`, async () => {
        const made = await a.ask("PATCH /services/shop", { retries: wanted % 10 });
        return made.status === 200;
      });
      const has = async () => new RegExp(`retries: ${wanted % 10}\\b`).test((await b.ask("GET /config")).text);
      await eventually(`${what}: the other has it`, has);
      return performance.now() - begun;
    };
    await change("all well");
    const leader = await etcd.leader();
    await etcd.kill(leader);
    const killed = await change("the leader is killed");
    await etcd.start(leader);
    const frozen: number[] = [];
    for (let i = 0; i < 3; i++) {
      etcd.freeze(i);
      frozen.push(await change(`member ${i} is frozen`));
      etcd.resume(i);
      await eventually("it follows again", async () => !!(await etcd.call("kv/range", { key: btoa("x") }, i)).header);
    }
    for (let i = 0; i < 20; i++) await etcd.put("lb/noise", `${i}`);
    const { header } = await etcd.call("kv/range", { key: btoa("x") });
    await etcd.call("kv/compaction", { revision: header.revision });
    await change("compacted");
    for (const one of loads) {
      const { sent, failed } = await one.stop();
      assert.ok(sent > 50, `${sent} requests`);
      assert.equal(failed, 0);
    }
    console.log(`leader killed: ${Math.round(killed)} ms; a member frozen: ${frozen.map(Math.round).join(", ")} ms`);
  },
  skip,
);

test("200 changes by three writers at once: each is there or was refused, and all end with one document", async (t) => {
  const etcd = await startEtcd(t), fleet = { etcd: etcd.urls, ttl: "3s" };
  const rest = "services: { shop: { servers: [localhost:1], health: off } }\ndefault: { service: shop }\n";
  const a = await startInstance(t, "a", fleet, { rest });
  const all = [a, ...await Promise.all(["b", "c"].map((name) => startInstance(t, name, fleet)))];
  const made: string[] = [], refused: number[] = [];
  await Promise.all(all.map(async (one, writer) => {
    for (let i = writer; i < 200; i += 3) {
      const { status, text } = await one.ask("POST /services/shop/servers", `10.0.0.1:${1_000 + i}`);
      if (status === 201) made.push(`10.0.0.1:${1_000 + i}`);
      else refused.push(status), assert.match(`${status}`, /^(409|503)$/, text);
    }
  }));
  const text = (await etcd.get("lb/config"))!;
  for (const name of made) assert.ok(text.includes(name), name);
  assert.equal(count(text, "10.0.0.1:"), made.length, "who was refused is not there");
  for (const one of all) {
    await eventually(
      "the same in force",
      async () => (await one.ask("GET /config")).headers.etag === (await a.ask("GET /config")).headers.etag,
    );
    await until("the same on disk", () => one.text() === text);
  }
  console.log(`${made.length} made, ${refused.length} refused`);
}, skip);

test("members are asked over TLS, as servers are", async (t) => {
  const folder = mkdtempSync(join(tmpdir(), "lb-tls-"));
  t.after(() => rmSync(folder, { recursive: true, force: true }));
  for (const [name, text] of Object.entries({ "a.pem": A, "a.key": KEY, "ca.pem": CA })) {
    writeFileSync(join(folder, name), text);
  }
  const etcd = await startEtcd(t, 1, { cert: join(folder, "a.pem"), key: join(folder, "a.key") });
  const trusting = clientOf({ etcd: etcd.urls, tls: { ca: join(folder, "ca.pem") } });
  await trusting.swap("config", "here", 0);
  const heard: string[] = [], watch = trusting.watch(1, (events) => void heard.push(...events.map(({ key }) => key)));
  await until("the watch brings it", () => heard.includes("config"));
  watch.close("over");
  assert.equal((await clientOf({ etcd: etcd.urls, tls: { insecure: true } }).list(true)).keys.size, 1);
  await assert.rejects(
    clientOf({ etcd: etcd.urls }).list(true),
    failsWith("silent", /certificate|verif|issuer|signed/i),
  );
}, skip);

test(
  "without TLS beyond this machine the start says who can read along; what only prints asks no engine",
  async (t) => {
    const rest = POOL({ address: "127.0.0.1:9" }), far = { etcd: ["http://192.0.2.1:2379", "http://localhost:1"] };
    const a = await startInstance(t, "a", far, { rest });
    assert.equal(count(a.output(), "is asked without TLS"), 1);
    assert.match(a.output(), /warn: fleet: http:\/\/192\.0\.2\.1:2379 is asked without TLS/);
    for (const words of [["--check"], ["--print-config"], ["--explain", "GET http://a.test/"]]) {
      const printed = spawnSync(process.execPath, [...COMMAND[runtime()], "-c", a.file, ...words], {
        ...{ encoding: "utf8", timeout: 60_000, env: { ...process.env, NAME: "x" } },
        cwd: fileURLToPath(new URL("../..", import.meta.url)),
      });
      assert.equal(printed.status, 0, printed.stderr);
      assert.ok(!/fleet: .*(answer|starts with)/.test(printed.stderr), printed.stderr);
    }
  },
  skip,
);

test("a process that stood still registers anew, and takes over what was agreed meanwhile", async (t) => {
  const etcd = await startEtcd(t), fleet = { etcd: etcd.urls, ttl: "2s" };
  const [one, two] = [await startBackend(t, "one"), await startBackend(t, "two")];
  const a = await startInstance(t, "a", fleet, { rest: POOL(one, two) }), b = await startInstance(t, "b", fleet);
  await eventually("both are there", async () => (await b.fleet()).instances.length === 2);
  a.freeze();
  await eventually("its lease is over", async () => (await b.fleet()).instances.length === 1);
  one.isUp = false;
  await eventually("the other has found out", () => isDown(b));
  a.resume();
  await eventually("it has taken that over", () => isDown(a));
  for (const instance of [a, b]) {
    await eventually("both are there again", async () => (await instance.fleet()).instances.length === 2);
  }
  assert.equal(await isDown(b), true);
  assert.equal(await isDown(a, 1), false);
  assert.equal(count(b.output(), ": " + one.address + " is up"), 0, "nothing has flapped");
}, skip);

test("four instances on three runtimes: a change on any is in force on all", async (t) => {
  const etcd = await startEtcd(t), backend = await startBackend(t, "one"), fleet = { etcd: etcd.urls, ttl: "3s" };
  const a = await startInstance(t, "a", fleet, { rest: POOL(backend) });
  const all = [
    a,
    ...await Promise.all((["deno", "bun", "node"] as const).map((where) => startInstance(t, where, fleet, { where }))),
  ];
  for (const one of all) await eventually("all know all", async () => (await one.fleet()).instances.length === 4);
  const times: number[] = [];
  for (const [i, one] of all.entries()) {
    const begun = performance.now();
    const { status, text } = await one.ask("PATCH /services/shop?wait=10s", { retries: i + 2 });
    assert.equal(status, 200, text);
    times.push(performance.now() - begun);
    for (const other of all) assert.match((await other.ask("GET /config")).text, new RegExp(`retries: ${i + 2}\\b`));
  }
  console.log(`in force on all four: ${times.map(Math.round).join(", ")} ms`);
}, skip);

test("a disk that cannot be written is a warning: the document is in force all the same", async (t) => {
  const etcd = await startEtcd(t), backend = await startBackend(t, "one"), fleet = { etcd: etcd.urls };
  const a = await startInstance(t, "a", fleet, { rest: POOL(backend) });
  mkdirSync(`${a.file}.new`); // in the way of what is written first
  writeFileSync(join(`${a.file}.new`, "x"), "");
  assert.equal((await a.ask("PATCH /services/shop", { retries: 7 })).status, 200);
  await until(
    "it is said",
    () => /warn: fleet: .* cannot be written: .*the document is in force all the same/.test(a.output()),
  );
  assert.match((await a.ask("GET /config")).text, /retries: 7/);
}, skip);
