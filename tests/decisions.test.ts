// Which server takes a request, as clients and servers of the running program see it: every strategy, and what keeps
// those servers away that fail or are slow. One program serves all services, each under its own name.

import assert from "node:assert/strict";
import { after, before, test as nodeTest } from "node:test";
import {
  answer,
  get,
  type Program,
  rawRequest,
  type ScriptedServer,
  scriptedServer,
  startProgram,
  status,
  target,
  until,
  value,
  type Visit,
} from "./rig.ts";

const test = (name: string, body: () => Promise<void>) => nodeTest(name, { timeout: 120_000 }, body);

const NAMES = ["a", "b", "c", "d"] as const;
type Name = typeof NAMES[number];

/** Requests that a server keeps until it is told to answer them. */
interface Held {
  name: Name;
  visit: Visit;
}
let held: Held[] = [];
let servers: ScriptedServer[] = [];
let program: Program;
let config: Record<string, unknown>;

/** What a request says about this server: /?a=503 a status, /?a=80ms to be slow, /?a=hold to wait for the test. */
const manner = (path: string, name: Name) => {
  const query = new URLSearchParams(path.split("?")[1]);
  return query.get(name) ?? query.get("all") ?? "";
};

const serverOf = (name: Name) =>
  scriptedServer(async (visit, request) => {
    const asked = manner(target(request), name);
    if (asked === "hold") return void held.push({ name, visit });
    if (asked.endsWith("ms")) return visit.send(parseInt(asked), answer(name));
    return await visit.send(answer(name, "", asked ? `${asked} Said so` : "200 OK"));
  });

before(async () => {
  servers = await Promise.all(NAMES.map(serverOf));
  const all = servers.map(({ address }) => address);
  const two = all.slice(0, 2);
  const plain = { servers: all, health: "off", eject: "off" };
  const secret = "for the tests of decisions alone, not for anything else";
  config = {
    log: "off",
    trust: ["127.0.0.1"],
    name_routes: true,
    defaults: { health: "off", eject: "off", retries: 0 },
    services: {
      ...Object.fromEntries(
        [
          "first",
          "round-robin",
          "random",
          "two-choices",
          "least-connections",
          "least-response-time",
          "peak-ewma",
          "ip-hash",
        ]
          .map((strategy) => [strategy, { ...plain, strategy }]),
      ),
      ...Object.fromEntries(
        ["header", "cookie", "query"].map((by) => [`by-${by}`, { ...plain, strategy: { hash: { [by]: "k" } } }]),
      ),
      sticky: { servers: all, sticky: { cookie: "lb", secret, max_age: "1h" } },
      retried: { servers: two, strategy: "first", retries: 1, retry_on: [500] },
      budget: { servers: all, retries: 3 },
      ejected: { servers: two, retries: 0, eject: { failures: 3, for: "3s", slow: "off", at_most: "50%" } },
      others: { servers: all.slice(2) },
      never: { servers: two.slice(1) },
      backed: { servers: [two[0], { url: two[1], backup: true }], eject: { failures: 2, for: "1h", at_most: "100%" } },
    },
    routes: [
      { name: "split", path: "/split", split: { first: 3, never: 0, others: 1 } },
    ],
  };
  program = await startProgram(config);
});

after(async () => {
  await program?.stop();
  await Promise.all(servers.map((server) => server.close()));
});

/** One request; who answered it, and how. */
async function ask(path: string, headers = "", { port } = program) {
  const { answers: [one] } = await rawRequest(port, get(path, headers));
  assert.ok(one, `${path} has an answer`);
  return { name: one.body.toString() as Name, status: status(one), one };
}

/** How many of so many requests, one after another, each server has answered. */
async function shares(count: number, path: string, headers: (i: number) => string = () => "") {
  const got: Record<Name, number> = { a: 0, b: 0, c: 0, d: 0 };
  for (let i = 0; i < count; i++) got[(await ask(path, headers(i))).name]++;
  return got;
}

/** Sends a request that waits at its server; who that is. */
async function hold(path: string) {
  const before = held.length;
  const done = ask(path);
  const { name, visit } = await until(`${path} reaches a server`, () => held[before]);
  return { name, finish: async () => (await visit.send(answer(name)), await done) };
}

const SEQUENCES: [strategy: string, ends: string, expected: string][] = [
  ["first", "", "aaaaaaaa"],
  ["round-robin", "", "abcdabcd"],
  ["least-connections", "", "abcdabcd"],
  ["least-connections", "adca", "abcdaadc"],
  ["least-response-time", "", "abcdabcd"],
];
for (const [strategy, ends, expected] of SEQUENCES) {
  test(`${strategy} picks ${expected}${ends && `, where requests at ${ends} end in turn from the fifth pick on`}`, async () => {
    held = [];
    const open: Awaited<ReturnType<typeof hold>>[] = [];
    let picks = "";
    for (let i = 0; i < 8; i++) {
      const one = await hold(`/${strategy}/?all=hold`);
      picks += one.name;
      open.push(one);
      const at = open.findIndex(({ name }) => name === ends[i - 4]);
      if (at >= 0) await open.splice(at, 1)[0]!.finish();
    }
    for (const one of open) await one.finish();
    assert.equal(picks, expected);
  });
}

test("two-choices never lets one server be busier than the others where there are few", async () => {
  held = [];
  const open = [];
  for (let i = 0; i < 8; i++) open.push(await hold("/two-choices/?all=hold"));
  for (const one of open) await one.finish();
  assert.equal(open.map(({ name }) => name).sort().join(""), "aabbccdd");
});

test("random asks every server, and none as if it were the only one", async () => {
  const got = await shares(120, "/random/");
  for (const name of NAMES) assert.ok(got[name] >= 8 && got[name] <= 60, JSON.stringify(got));
});

for (const strategy of ["peak-ewma", "least-response-time"]) {
  test(`${strategy} asks a slow server little, and still gets every answer`, async () => {
    const got = await shares(60, `/${strategy}/?a=150ms`);
    assert.ok(got.a <= 7, JSON.stringify(got));
    assert.equal(got.a + got.b + got.c + got.d, 60);
  });
}

const KEYS: [service: string, path: (key: number) => string, headers: (key: number) => string][] = [
  ["ip-hash", () => "/ip-hash/", (key) => `X-Forwarded-For: 192.0.2.${key}\r\n`],
  ["by-header", () => "/by-header/", (key) => `K: ${key}\r\n`],
  ["by-cookie", () => "/by-cookie/", (key) => `Cookie: other=1; k=${key}\r\n`],
  ["by-query", (key) => `/by-query/?k=${key}`, () => ""],
];
for (const [service, path, headers] of KEYS) {
  test(`${service}: a key stays at its server, and many keys use all servers`, async () => {
    const of = async (key: number) => (await ask(path(key), headers(key))).name;
    const homes: Name[] = [];
    for (let key = 0; key < 60; key++) homes.push(await of(key));
    assert.equal(new Set(homes).size, 4, homes.join(""));
    for (let key = 0; key < 60; key += 3) assert.equal(await of(key), homes[key]);
  });
}

test("a sticky cookie lives as long as max_age says, and holds for every balancer with the same secret", async () => {
  const { name, one } = await ask("/sticky/");
  assert.match(value(one, "set-cookie"), /^lb=[\w-]{22}; .*Max-Age=3600/);
  const cookie = `Cookie: ${value(one, "set-cookie").split(";")[0]}\r\n`;
  for (let i = 0; i < 5; i++) assert.equal((await ask("/sticky/", cookie)).name, name);
  const another = await startProgram(config);
  try {
    for (let i = 0; i < 5; i++) assert.equal((await ask("/sticky/", cookie, another)).name, name);
  } finally {
    await another.stop();
  }
});

test("retry_on: what it names is tried at another server, and all else is the client's answer", async () => {
  const mended = await ask("/retried/?a=500");
  assert.deepEqual([mended.status, mended.name], [200, "b"]);
  const passed = await ask("/retried/?a=503");
  assert.deepEqual([passed.status, passed.name], [503, "a"]);
});

test("where all servers fail, retries add no more than the budget", async () => {
  const arrived = () => servers.reduce((sum, { requests }) => sum + requests.length, 0);
  const [start, before] = [Date.now(), arrived()];
  for (let i = 0; i < 20; i++) {
    const all = await Promise.all(Array.from({ length: 10 }, () => ask("/budget/?all=503")));
    for (const one of all) assert.equal(one.status, 503);
  }
  const got = arrived() - before, seconds = (Date.now() - start) / 1000;
  assert.ok(got > 200, "some are tried again");
  assert.ok(got <= 200 * 1.2 + 3 * (seconds + 1), `${got} arrived in ${seconds} s`);
});

test("a server that fails in a row is left out, and comes back through one request at a time", async () => {
  held = [];
  const failed = await shares(6, "/ejected/?a=503");
  assert.equal(failed.a, 3);
  assert.deepEqual(await shares(4, "/ejected/?a=503"), { a: 0, b: 4, c: 0, d: 0 });
  let trial: Promise<{ name: Name }> | undefined;
  for (const end = Date.now() + 10_000; !held.length && Date.now() < end;) {
    trial = ask("/ejected/?a=hold");
    await Promise.race([trial, until("it is held or answered", () => held.length > 0, 20_000).catch(() => {})]);
  }
  assert.equal(held.length, 1, "it is tried out after a while");
  assert.deepEqual(await shares(6, "/ejected/?a=hold"), { a: 0, b: 6, c: 0, d: 0 }, "nobody else is sent there");
  await held[0]!.visit.send(answer("a"));
  assert.equal((await trial)?.name, "a");
  const back = await shares(6, "/ejected/");
  assert.ok(back.a > 0, JSON.stringify(back));
});

test("a backup is asked only when no other server may be", async () => {
  assert.deepEqual(await shares(4, "/backed/"), { a: 4, b: 0, c: 0, d: 0 });
  await shares(2, "/backed/?a=503");
  assert.deepEqual(await shares(4, "/backed/"), { a: 0, b: 4, c: 0, d: 0 });
});

test("split: each service gets its share, and one with 0 nothing", async () => {
  const got = await shares(120, "/split");
  assert.ok(got.a >= 65 && got.a <= 113, JSON.stringify(got)); // 90, five standard deviations around
  assert.equal(got.b, 0);
  assert.ok(got.c > 0 && got.d > 0);
});
