// Fleets: the engine's calls over real etcd, and the running program among others.

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer, type Socket } from "node:net";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import process from "node:process";
import { after } from "node:test";
import { fileURLToPath } from "node:url";
import { createLoadBalancer, type EngineError, EtcdClient, parseConfig } from "../../lb.ts";
import {
  ask,
  type Backend,
  type Cluster,
  type Ends,
  eventually,
  type Instance,
  type Loose,
  startBackend,
  startEtcd,
  startInstance,
} from "../rig/engines.ts";
import { A, CA, KEY } from "../rig/certificates.ts";
import { checkEngine } from "../rig/fleet.ts";
import { alongside, COMMAND, freePort, makeFolder, runtime, sleep, test as rigTest, until } from "../rig/rig.ts";

type Code = (t: Ends) => unknown;
/** A test that ends what it has begun, the last first. */
function ending(body: Code): () => Promise<void> {
  return async () => {
    const ends: (() => unknown)[] = [];
    try {
      await body({ after: (end) => void ends.unshift(end) });
    } finally {
      for (const end of ends) await end();
    }
  };
}
const needsEtcd = { needs: ["etcd"], timeout: 110_000 };
const test = (name: string, body: Code) => rigTest(name, needsEtcd, ending(body));
/** What ends with the file. */
const endings: (() => unknown)[] = [];
after(async () => {
  for (const end of endings) await end();
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

const POOL = (...servers: { address: string }[]) =>
  `# the pool\nservices:\n  shop:\n    servers: [${servers.map(({ address }) => address).join(", ")}] # all\n` +
  `    health: { path: /health, interval: 200ms, fall: 2, rise: 2 }\ndefault: { service: shop }\n`;
const weightOf = async (one: Instance, server = 0) => (await one.ask("GET /services/shop")).json.servers[server].weight;
const isDown = async (one: Instance, server = 0) => !(await one.ask("GET /services/shop")).json.servers[server].up;
const count = (text: string, what: string) => text.split(what).length - 1;

/** Asks for a page again and again until it is stopped. Gives how many answers were no 200. */
function load(port: number): { stop(): Promise<{ sent: number; failed: number }> } {
  let isOver = false, sent = 0, failed = 0;
  const one = async () => {
    while (!isOver) {
      sent++;
      await ask(`http://127.0.0.1:${port}/`).then(({ status }) => status === 200 || failed++, () => failed++);
      await sleep(20);
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

// ─── The engine, and instances that have one of their own ───

alongside(
  ...Object.entries({
    "etcd does what engines do, and a watch of what it has compacted ends": ending(async (t) => {
      const etcd = await startEtcd(t), engine = clientOf({ etcd: etcd.urls });
      await checkEngine(engine, sleep);
      const { revision } = await engine.list(true);
      await etcd.call("kv/compaction", { revision: `${revision}` });
      assert.equal(await engine.watch(1, () => {}).ended, "compacted");
    }),
    "an engine that cannot be used is said in one sentence": ending(async (t) => {
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
      await assert.rejects(
        as("lb", "wrong").list(true),
        failsWith("refused", /the user "lb": name or password is wrong$/),
      );
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
    }),
    "what is no etcd is named": ending(async (t) => {
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
    }),
    "members are asked over TLS, as servers are": ending(async (t) => {
      const folder = makeFolder();
      t.after(() => rmSync(folder, { recursive: true, force: true }));
      for (const [name, text] of Object.entries({ "a.pem": A, "a.key": KEY, "ca.pem": CA })) {
        writeFileSync(join(folder, name), text);
      }
      const etcd = await startEtcd(t, 1, { cert: join(folder, "a.pem"), key: join(folder, "a.key") });
      const trusting = clientOf({ etcd: etcd.urls, tls: { ca: join(folder, "ca.pem") } });
      await trusting.swap("config", "here", 0);
      const heard: string[] = [],
        watch = trusting.watch(1, (events) => void heard.push(...events.map(({ key }) => key)));
      await until("the watch brings it", () => heard.includes("config"));
      watch.close("over");
      assert.equal((await clientOf({ etcd: etcd.urls, tls: { insecure: true } }).list(true)).keys.size, 1);
      await assert.rejects(
        clientOf({ etcd: etcd.urls }).list(true),
        failsWith("silent", /certificate|verif|issuer|signed/i),
      );
    }),
    "an instance that says only where the fleet is waits for a document, answers 404, and is not ready": ending(
      async (t) => {
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
      },
    ),
    "a running instance whose file gets a fleet says that it joins with the next start": ending(async (t) => {
      const folder = makeFolder(), file = join(folder, "routes.yml");
      t.after(() => rmSync(folder, { recursive: true, force: true }));
      writeFileSync(file, "default: { servers: [127.0.0.1:9] }\n");
      const a = await startInstance(t, "a", {}, { file });
      writeFileSync(file, "fleet: { etcd: 127.0.0.1:9 }\ndefault: { servers: [127.0.0.1:9] }\n");
      const said = () => count(a.output(), "warn: fleet has changed, and all of it but ttl and probers takes effect");
      await until("that is said", () => said() === 1);
      assert.equal((await a.fleet()).engine, "none");
      writeFileSync(file, "fleet: { etcd: 127.0.0.1:9 }\ndefault: { servers: [127.0.0.1:8] }\n");
      await until("the file is read again", () => count(a.output(), "is in force again") === 2);
      assert.equal(said(), 1, "the fleet has not changed");
    }),
    "passwords appear nowhere: not in the document of who has them in the environment, the API, the log or a page":
      ending(async (t) => {
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
      }),
    "without TLS beyond this machine the start says who can read along; what only prints asks no engine": ending(
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
    ),
    "three members: the leader is killed, each is frozen, the log is compacted: changes go on, and no request fails":
      ending(async (t) => {
        const etcd = await startEtcd(t, 3),
          backend = await startBackend(t, "one"),
          fleet = { etcd: etcd.urls, ttl: "2s" };
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
          await eventually(
            "it follows again",
            async () => !!(await etcd.call("kv/range", { key: btoa("x") }, i)).header,
          );
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
        console.log(
          `leader killed: ${Math.round(killed)} ms; a member frozen: ${frozen.map(Math.round).join(", ")} ms`,
        );
      }),
  }).map(([name, body]): Parameters<typeof alongside>[0] => [name, needsEtcd, body]),
);

// ─── Three instances over one engine ───

/** Instances that the tests share, the servers, and their etcd. `a` has brought the document, and alone has $WEIGHT. */
interface Trio {
  etcd: Cluster;
  fleet: Record<string, unknown>; // how an instance gets to it
  one: Backend;
  two: Backend;
  a: Instance;
  b: Instance;
  c: Instance;
  first: string; // the document
}

async function startTrio(): Promise<Trio> {
  const t: Ends = { after: (end) => void endings.unshift(end) };
  const [etcd, one, two] = await Promise.all([startEtcd(t), startBackend(t, "one"), startBackend(t, "two")]);
  const fleet = { etcd: etcd.urls, ttl: "2s" };
  const a = await startInstance(t, "a", { ...fleet, probers: 2 }, { rest: POOL(one, two), env: { WEIGHT: "5" } });
  const first = a.text();
  assert.equal(await etcd.get("lb/config"), first, "the local file becomes the document");
  const [b, c] = await Promise.all([
    startInstance(t, "b", fleet, { rest: POOL({ address: "127.0.0.1:9" }) }),
    startInstance(t, "c", fleet),
  ]);
  return { etcd, fleet, one, two, a, b, c, first };
}
let started: Promise<Trio> | undefined;

/** The three with a document that says this, and all servers up. `said`: what an instance has printed since then. */
async function begin(rest?: (...servers: Backend[]) => string) {
  const trio = await (started ??= startTrio()), { etcd, one, two, a, b, c, first } = trio, all = [a, b, c];
  const document = `${first.split("\n")[0]}\n${(rest ?? POOL)(one, two)}`;
  one.isUp = two.isUp = true;
  await etcd.put("lb/config", document);
  for (const instance of all) {
    await until("it is copied", () => instance.text() === document, 15_000);
    await eventually("it knows the others", async () => (await instance.fleet()).instances.length === all.length);
    await eventually("all servers are up", async () => {
      const { services } = (await instance.ask("GET /services")).json;
      return services.every(({ servers }: Loose) => servers.every(({ up }: Loose) => up));
    });
  }
  const before = new Map(all.map((instance) => [instance, instance.output().length]));
  return { ...trio, all, said: (instance: Instance) => instance.output().slice(before.get(instance)) };
}

test("instances share a document: the first has it, changes on any are in force on all, comments and order stay", async () => {
  const { etcd, a, b, c, one: { address }, first } = await (started ??= startTrio());
  for (const one of [b, c]) {
    assert.equal(one.text(), first, "the document is written over the local file");
    assert.match(readFileSync(`${one.file}.bak`, "utf8"), /^fleet: /);
    assert.match(one.output(), /warn: fleet: .* said something else than the fleet's document/);
    assert.match((await ask(`http://127.0.0.1:${one.port}/`)).text, /^(one|two)$/);
  }
  await eventually("all know all", async () => (await a.fleet()).instances.length === 3);
  const changed = await b.ask(`PATCH /services/shop/servers/${address}?wait=5s`, { weight: 7 });
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
});

test("what cannot be used changes nothing where it cannot, and is said there", async () => {
  const { etcd, a, b, one: { address } } = await begin();
  const text = a.text(), server = `{ url: ${address}, weight: \${WEIGHT} }`;
  await etcd.put("lb/config", text.replace(`[${address}, `, `[${server}, `));
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
  assert.deepEqual([waited.status, waited.json.missing.sort()], [202, ["b", "c"]]);
  await etcd.put("lb/config", "newer_key: 1\n");
  await eventually("nobody takes it", async () => /unknown key/.test(await problemOf(b, "a")));
  assert.equal(await weightOf(a), 5);
  await etcd.put("lb/config", text);
  await eventually("all are well again", async () => await problemOf(b, "b") === "" && await weightOf(a) === 1);
});

test("If-Match holds over the fleet, and an edit on the base of an older document is not taken", async () => {
  const { etcd, a, b } = await begin();
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
  await until("both have the same on disk", () => b.text() === a.text());
  assert.ok(!(await etcd.get("lb/config"))!.includes("# mine"));
});

test("two instances of one name: the later one gets a number behind it", async (t) => {
  const { a, fleet } = await begin(), other = await startInstance(t, "a", fleet);
  assert.deepEqual([(await a.fleet()).name, (await other.fleet()).name], ["a", "a#2"]);
  assert.match(other.output(), /warn: fleet: another instance is called "a": this one is "a#2"/);
});

test("60 changes by three writers at once: each is there or was refused, and all end with one document", async () => {
  const { etcd, a, all } = await begin(() =>
    "services: { shop: { servers: [localhost:1], health: off } }\ndefault: { service: shop }\n"
  );
  const made: string[] = [], refused: number[] = [];
  await Promise.all(all.map(async (one, writer) => {
    for (let i = writer; i < 60; i += 3) {
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
});

test("a disk that cannot be written is a warning: the document is in force all the same", async (t) => {
  const { a } = await begin();
  t.after(() => rmSync(`${a.file}.new`, { recursive: true }));
  mkdirSync(`${a.file}.new`); // in the way of what is written first
  writeFileSync(join(`${a.file}.new`, "x"), "");
  assert.equal((await a.ask("PATCH /services/shop", { retries: 7 })).status, 200);
  await until(
    "it is said",
    () => /warn: fleet: .* cannot be written: .*the document is in force all the same/.test(a.output()),
  );
  assert.match((await a.ask("GET /config")).text, /retries: 7/);
});

test("five instances on three runtimes: a change on any is in force on all", async (t) => {
  const { all: three, fleet } = await begin(),
    others = (["deno", "bun", "node"] as const).filter((one) => one !== runtime());
  const all = [...three, ...await Promise.all(others.map((where) => startInstance(t, where, fleet, { where })))];
  for (const one of all) await eventually("all know all", async () => (await one.fleet()).instances.length === 5);
  const times: number[] = [];
  for (const [i, one] of all.entries()) {
    const begun = performance.now();
    const { status, text } = await one.ask("PATCH /services/shop?wait=10s", { retries: i + 2 });
    assert.equal(status, 200, text);
    times.push(performance.now() - begun);
    for (const other of all) assert.match((await other.ask("GET /config")).text, new RegExp(`retries: ${i + 2}\\b`));
  }
  console.log(`in force on all five: ${times.map(Math.round).join(", ")} ms`);
});

test("a process that stood still registers anew, and takes over what was agreed meanwhile", async () => {
  const { one, a, b, said } = await begin();
  a.freeze();
  await eventually("its lease is over", async () => (await b.fleet()).instances.length === 2);
  one.isUp = false;
  await eventually("the other has found out", () => isDown(b));
  a.resume();
  await eventually("it has taken that over", () => isDown(a));
  for (const instance of [a, b]) {
    await eventually("all are there again", async () => (await instance.fleet()).instances.length === 3);
  }
  assert.equal(await isDown(b), true);
  assert.equal(await isDown(a, 1), false);
  assert.equal(count(said(b), ": " + one.address + " is up"), 0, "nothing has flapped");
});

test("sticky cookies hold on all instances, on one that starts later, and in workers; these have changes and the fleet's verdicts", async (t) => {
  const { etcd, fleet, one, two, a, b } = await begin((one, two) =>
    `default: { servers: [${one.address}, ${two.address}], sticky: lb }\n`
  );
  const first = await ask(`http://127.0.0.1:${a.port}/`), cookie = String(first.headers["set-cookie"]).split(";")[0]!;
  const d = await startInstance(t, "d", fleet, { args: ["--workers", "2"] });
  for (const instance of [b, d]) {
    for (let i = 0; i < 6; i++) {
      const answer = await ask(`http://127.0.0.1:${instance.port}/`, { headers: { cookie } });
      assert.deepEqual([answer.text, answer.headers["set-cookie"]], [first.text, undefined], instance.name);
    }
  }
  // somebody sets another secret: all follow
  await etcd.put("lb/secret", "another-secret");
  await eventually("workers have it too", async () => {
    const { headers } = await ask(`http://127.0.0.1:${d.port}/`, { headers: { cookie } });
    return headers["set-cookie"] !== undefined;
  });
  const texts = async () => {
    const seen = new Set<string>();
    for (let i = 0; i < 12; i++) seen.add((await ask(`http://127.0.0.1:${d.port}/`)).text);
    return [...seen].sort().join();
  };
  await etcd.put("lb/config", a.text().split("\n")[0] + "\n" + POOL(one, two));
  await eventually("they have another document", async () => await texts() === "one,two");
  one.isUp = false;
  await eventually("workers leave it out", async () => await texts() === "two");
  one.isUp = true;
  await eventually("workers ask it again", async () => await texts() === "one,two");
  const state = `PUT /services/shop/servers/${two.address}/state?wait=5s`;
  assert.equal((await a.ask(state, { state: "drain" })).status, 200);
  await eventually("workers have the change", async () => await texts() === "one");
  await d.stop();
});

test("a deleted document is put back, and an engine that is empty or restored gets what is in force", async () => {
  const { etcd, a, b, all, said } = await begin();
  const before = (await etcd.keys()).get("lb/secret")!.value;
  await etcd.remove("lb/config");
  await eventually("it is back", async () => await etcd.get("lb/config") === a.text());
  await until(
    "one of them says so",
    () => /was deleted: what is in force here is put back/.test(all.map(said).join()),
  );
  for (let i = 0; i < 30; i++) await etcd.put("other/x", "1"); // so that the new one's revisions are lower
  await etcd.kill(0);
  etcd.wipe();
  await etcd.start(0);
  await eventually(
    "an empty one is filled",
    async () => (await etcd.keys("lb/instances/")).size === 3 && await etcd.get("lb/config"),
  );
  assert.equal(await etcd.get("lb/config"), a.text());
  assert.equal((await etcd.keys()).get("lb/secret")!.value, before, "the secret too");
  assert.equal((await b.ask("PATCH /config?wait=5s", { log: "json" })).status, 200);
  assert.match((await a.ask("GET /config")).text, /log: json/, "lower revisions are no older ones");
});

test("without the engine an instance goes on as it is, says so once, and refuses changes; then all is well again", async (t) => {
  const { etcd, fleet, one: { address }, two, a, b, said } = await begin();
  await etcd.kill(0);
  await eventually("it is away", async () => (await a.fleet()).engine === "away");
  assert.match((await ask(`http://127.0.0.1:${a.port}/`)).text, /^(one|two)$/);
  assert.match((await a.ask("GET /live")).text, /the fleet&#39;s engine does not answer: /);
  const refused = await a.ask("PATCH /config", { log: "json" });
  assert.deepEqual([refused.status, refused.json.detail], [
    503,
    "the fleet's engine is away: nothing can be changed",
  ]);
  assert.equal((await a.ask(`PUT /services/shop/servers/${address}/health`, { health: "down" })).status, 200);
  assert.equal(await isDown(a), true, "here alone");
  assert.equal(await isDown(b), false);
  await eventually("its own probes go on", async () => !await isDown(a));
  assert.match((await a.ask("GET /metrics")).text, /lb_fleet_up 0/);
  // a start without it: the local file, at once
  const d = await startInstance(t, "d", fleet, { rest: POOL(two) });
  assert.equal((await ask(`http://127.0.0.1:${d.port}/`)).text, "two");
  assert.match(d.output(), /warn: fleet: .*; starts with /);
  await etcd.start(0);
  await eventually("all are there again", async () => (await d.fleet()).instances.length === 4);
  assert.equal(count(said(a), "has not answered for"), 1);
  assert.equal(count(said(a), "answers again"), 1);
  assert.equal((await d.ask("PATCH /config?wait=5s", { log: "json" })).status, 200);
  assert.match((await b.ask("GET /config")).text, /log: json/);
});

test("each server is probed by some, and down on all when most of these say so; operators' words count on all", async (t) => {
  const { etcd, one, two, a, b, c, all, said } = await begin(), others = [b, c];
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
  assert.equal(count(said(a), " is down:"), 1, "no flapping");
});
