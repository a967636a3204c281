// Fleets: the engine's calls over real etcd, votes and probers as pure functions, an instance over a fake engine with a
// clock, and the running program among others.

import assert from "node:assert/strict";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { createServer, type Socket } from "node:net";
import type { AddressInfo } from "node:net";
import nodeTest from "node:test";
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
import { freePort, until } from "../rig/rig.ts";

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

test("the engine's calls do over etcd what a fleet needs", async (t) => {
  const etcd = await startEtcd(t), engine = clientOf({ etcd: etcd.urls });
  const first = await engine.list(true);
  assert.equal(first.keys.size, 0);
  const made = await engine.swap("config", "größer", 0);
  assert.ok(made.isOurs && made.revision > first.revision);
  assert.deepEqual(await engine.swap("config", "other", 0), {
    isOurs: false,
    value: "größer",
    revision: made.revision,
  });
  assert.ok((await engine.swap("config", "second", made.revision)).isOurs);
  assert.equal(await etcd.get("lb/config"), "second");

  const lease = await engine.grant(2_000);
  await engine.put("instances/a", "here", lease);
  assert.equal(await engine.keepAlive(lease), true);
  const { keys, revision } = await engine.list(true);
  assert.deepEqual([...keys.keys()], ["config", "instances/a"]);
  assert.equal((await engine.list(false)).keys.get("config")!.value, "");

  const heard: string[] = [];
  const watch = engine.watch(made.revision + 1, (events) => {
    for (const { key, value, revision } of events) {
      heard.push(`${key} ${value ?? "deleted"} ${revision - made.revision}`);
    }
  });
  await until("what was before is heard", () => heard.length === 2);
  await engine.revoke(lease);
  await until("the end of the lease is heard", () => heard.length === 3);
  assert.deepEqual(heard, ["config second 1", "instances/a here 2", "instances/a deleted 3"]);
  assert.equal(await engine.keepAlive(lease), false);
  await assert.rejects(engine.put("instances/a", "again", lease), failsWith("lease", /lease is over/));
  watch.close("over");
  assert.equal(await watch.ended, "over");

  await etcd.put("lb/x", "1");
  await etcd.call("kv/compaction", { revision: `${revision + 2}` });
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
  assert.equal((await a.ask("GET /health/ready")).status, 503);
  assert.equal(await etcd.get("lb/config"), undefined);
  await etcd.put("lb/config", `fleet: { etcd: "${etcd.urls[0]}" }\n${POOL(backend)}`);
  await eventually("it is ready", async () => (await a.ask("GET /health/ready")).status === 200);
  assert.equal((await ask(`http://127.0.0.1:${a.port}/`)).text, "one");
  await until("how it gets to the fleet stays its own", () => /name: \$\{NAME\}/.test(a.text()));
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
