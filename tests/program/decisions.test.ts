// Which server takes a request, as clients and servers of the running program see it: every strategy, and what keeps
// those servers away that fail or are slow. One program serves all services, each under its own name.

import assert from "node:assert/strict";
import { after, before } from "node:test";
import {
  answer,
  get,
  patience,
  type Program,
  rawRequest,
  type ScriptedServer,
  scriptedServer,
  sleep,
  startProgram,
  status,
  target,
  test,
  until,
  value,
  type Visit,
} from "../rig/rig.ts";

const NAMES = ["a", "b", "c", "d"] as const;
type Name = typeof NAMES[number];

/** Requests that a server keeps until it is told to answer them. */
interface Held {
  name: Name;
  visit: Visit;
}
let held: Held[] = [];
let servers: ScriptedServer[] = [];
let turns = 0;
let program: Program;
let config: Record<string, unknown>;

/** What a request says about this server: /?a=503 a status, /?a=80ms to be slow, /?a=hold to wait for the test, and so on. */
const manner = (path: string, name: Name) => {
  const query = new URLSearchParams(path.split("?")[1]);
  return query.get(name) ?? query.get("all") ?? "";
};

const serverOf = (name: Name) =>
  scriptedServer(async (visit, request) => {
    const asked = manner(target(request), name);
    if (asked === "hold") return void held.push({ name, visit });
    if (asked.endsWith("ms")) return visit.send(parseInt(asked), answer(name));
    if (asked === "busy") return visit.send(answer(name, "Retry-After: 60\r\n", "503 Busy"));
    if (asked === "half" && turns++ % 2) return visit.send(answer(name));
    if (asked === "half") return visit.send(answer(name, "", "500 Said so"));
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
    admin: { listen: "127.0.0.1:0" },
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
      "by-path": { ...plain, strategy: { hash: { path: true } } },
      "by-client": { ...plain, strategy: { hash: { client: true } } },
      paused: { servers: all, eject: { failures: 1000, for: "1h", slow: "off" } },
      slow: { servers: all, eject: { failures: 1000, for: "1h", slow: 3 } },
      unreliable: { servers: all, eject: { failures: 1000, for: "1h", slow: "off" } },
      capped: { servers: all, eject: { failures: 1, for: "1h", slow: "off", at_most: "50%" } },
      panicking: { servers: all, panic: "60%", eject: { failures: 1, for: "1h", slow: "off", at_most: "75%" } },
      starting: { servers: two, slow_start: "1h", eject: { failures: 1, for: "1s", slow: "off" } },
      hedged: { servers: two, strategy: "first", hedge: "p95" },
      auto: { servers: two, max_in_flight: "auto" },
      others: { servers: all.slice(2) },
      never: { servers: two.slice(1) },
      backed: { servers: [two[0], { url: two[1], backup: true }], eject: { failures: 2, for: "1h", at_most: "100%" } },
    },
    routes: [
      { name: "split", path: "/split", split: { first: 3, never: 0, others: 1 } },
      { name: "copied", path: "/copied", service: "first", mirror: { service: "others", percent: 50 } },
      { name: "rated", path: "/rated", service: "first", rate: { requests: 1, per: "1h", burst: 3 } },
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
  ["by-path", (key) => `/by-path/${key}`, () => ""],
  ["by-client", () => "/by-client/", (key) => `X-Forwarded-For: 192.0.2.${key}\r\n`],
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
  for (const end = Date.now() + patience(10_000); !held.length && Date.now() < end; await sleep(20)) {
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

test("a server that says Retry-After is left alone for that long", async () => {
  for (let i = 0; i < 4; i++) await ask("/paused/?a=busy");
  const got = await shares(9, "/paused/");
  assert.deepEqual(got, { a: 0, b: 3, c: 3, d: 3 });
});

/** Asks, eight at a time, until the program says so. */
async function askUntil(said: RegExp, path: string) {
  for (const end = Date.now() + patience(20_000); !said.test(program.output()) && Date.now() < end;) {
    await Promise.all(Array.from({ length: 8 }, () => ask(path)));
    await sleep(20);
  }
  assert.match(program.output(), said);
}

test("a server that is much slower than the others is left out, although all its answers are good", async () => {
  await askUntil(/slow: 127\.0\.0\.1:\d+ .*because it takes \d+ ms/, "/slow/?a=400ms");
  assert.equal((await shares(8, "/slow/")).a, 0);
});

test("a server that fails much more often than the others is left out, although never often in a row", async () => {
  await askUntil(/unreliable: 127\.0\.0\.1:\d+ .*because \d+ % of its answers fail/, "/unreliable/?a=half");
  assert.equal((await shares(8, "/unreliable/")).a, 0);
});

test("at_most: no more than that share of the servers is left out, however many fail", async () => {
  const got = await shares(12, "/capped/?a=503&b=503&c=503");
  assert.deepEqual(Object.values(got).sort(), [1, 1, 5, 5], JSON.stringify(got));
  assert.equal(got.d, 5);
});

test("panic: where too few are left all are asked", async () => {
  await shares(8, "/panicking/?a=503&b=503");
  const got = await shares(8, "/panicking/");
  for (const name of NAMES) assert.ok(got[name] > 0, JSON.stringify(got));
});

/** Asks until this server answers. */
async function askFor(name: Name, path: string) {
  for (const end = Date.now() + patience(20_000); Date.now() < end; await sleep(20)) {
    if ((await ask(path)).name === name) return;
  }
  assert.fail(`${name} is not asked again`);
}

test("slow_start: a server that comes back gets a small part of its share at first", async () => {
  await shares(2, "/starting/?a=503");
  await askFor("a", "/starting/");
  const { a } = await shares(44, "/starting/");
  assert.ok(a >= 2 && a <= 7, `${a} of 44, where a tenth of the weight makes 4`);
});

test("hedge: who waits too long is answered by another server, the first attempt ends, and both are counted", async () => {
  for (let i = 0; i < 15; i++) await Promise.all(Array.from({ length: 10 }, () => ask("/hedged/")));
  held = [];
  const { name, status } = await ask("/hedged/?a=hold");
  assert.deepEqual([status, name], [200, "b"]);
  await until("the first attempt is given up", () => held.length === 1 && held[0]!.visit.over);
  const { answers: [metrics] } = await rawRequest(program.admin, get("/metrics", "", "127.0.0.1"));
  const counted = /^lb_service_hedges_total\{service="hedged",answered="second"\} [1-9]/m;
  assert.match(metrics!.body.toString(), counted);
});

test("max_in_flight: auto gives a server of which nothing is known eight requests, and the others wait their turn", async () => {
  held = [];
  const all = Array.from({ length: 20 }, () => ask("/auto/?all=hold"));
  await until("both are full", () => held.length === 16);
  await ask("/first/");
  assert.equal(held.length, 16);
  for (let i = 0; i < 20; i++) {
    const { name, visit } = await until("one more is asked", () => held[i]);
    await visit.send(answer(name));
  }
  for (const one of await Promise.all(all)) assert.equal(one.status, 200);
});

test("mirror: so many percent of the requests are copied, and the client hears the first service alone", async () => {
  const copies = () => servers[2]!.requests.length + servers[3]!.requests.length, before = copies();
  assert.equal((await shares(100, "/copied")).a, 100);
  await until("copies arrive", () => copies() - before >= 25); // 50, five standard deviations around
  assert.ok(copies() - before <= 75, `${copies() - before} of 100`);
});

test("rate: so many at once as burst says, and the answers count them down", async () => {
  for (const left of [2, 1, 0]) {
    const { status, one } = await ask("/rated");
    assert.equal(status, 200);
    assert.match(value(one, "ratelimit"), new RegExp(`^"default";r=${left};t=\\d+$`));
    assert.equal(value(one, "ratelimit-policy"), '"default";q=1;w=3600');
  }
  const { status, one } = await ask("/rated");
  assert.deepEqual([status, value(one, "x-lb-failure")], [429, "rate"]);
  assert.match(value(one, "retry-after"), /^3[56]\d\d$/);
});
