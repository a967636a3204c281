// Where a service has nobody left: the other service is asked, under its own rules, and what is written down names it.

import assert from "node:assert/strict";
import { answerTo, balancerFor, mistakesOf, refusal } from "../rig/balancer.ts";
import { test } from "../rig/rig.ts";

/** A balancer over scripted servers; `manners`: what a server answers, or that it refuses. */
function setUp(services: string, routes = "default: { service: shop }") {
  const yaml = `log: json\ndefaults: { health: off, eject: off }\nservices: { ${services} }\n${routes}`;
  const manners: Record<string, number | "refuses"> = {};
  const naps: string[] = []; // those that never end
  let timeouts: unknown;
  const { lb, lines, send } = balancerFor(yaml, {
    sleep: () => naps.shift() ? new Promise(() => {}) : Promise.resolve(),
    fetch: (_url, attempt) => {
      const { name } = attempt.server, manner = manners[name[0]!] ?? 200;
      asked.push(name[0]!);
      timeouts = attempt.timeouts;
      return manner === "refuses" ? refusal() : answerTo(attempt, manner, { "x-server": name[0]! });
    },
  });
  const asked: string[] = [];
  /** Who was asked, in order, and what came of it; what the log says. */
  const ask = async (path = "/", headers = {}) => {
    asked.length = 0;
    const response = await send(`http://h${path}`, { headers });
    const line = JSON.parse(lines.at(-1)!);
    for (const { inFlight } of all()) assert.equal(inFlight, 0);
    return {
      asked: asked.join(""),
      status: response.status,
      response,
      service: line["lb.service"],
      server: line["lb.server"],
    };
  };
  const all = () => [...lb.balancer.table.services.values()];
  const set = (name: string, state: object) => {
    for (const service of all()) {
      service.candidatesUntil = 0;
      for (const server of service.servers) if (server.name[0] === name) Object.assign(server, state);
    }
  };
  return { lb, ask, set, manners, naps, timeouts: () => timeouts };
}

const SHOP = "shop: { servers: [a:1, b:1], fallback: spare }, spare: { servers: [x:1, y:1], strategy: first }";

test("as long as one server may be asked nobody else's are", async () => {
  const { ask, set } = setUp(SHOP);
  set("a", { up: false });
  for (let i = 0; i < 4; i++) assert.match((await ask()).asked, /^[ab]$/);
});

test("where all are down, ejected or full the other service answers, and the log says so", async () => {
  const states = [{ up: false }, { ejectedUntil: 1e9 }, { inFlight: 7, max: 7 }];
  for (const state of states) {
    const { ask, set, lb } = setUp(
      "shop: { servers: [{ url: a:1, max: 7 }, { url: b:1, max: 7 }], fallback: spare }, spare: { servers: [x:1] }",
    );
    set("a", state);
    set("b", state);
    const { asked, service, server, status } = await ask();
    assert.deepEqual({ asked, service, server, status }, { asked: "x", service: "spare", server: "x:1", status: 200 });
    assert.equal(lb.balancer.table.services.get("shop")!.panicking, false, "rather than to ask those who are dead");
    set("b", { up: true, ejectedUntil: 0, inFlight: 0 });
    assert.equal((await ask()).service, "shop", "and back");
  }
});

test("where all are full the queue comes first, and the other service where that is full too, or over", async () => {
  for (const [size, times, expected] of [[2, [], "x"], [3, ["never"], ""], [3, [], "x"]] as const) {
    const { ask, set, lb, naps } = setUp(
      `shop: { servers: [{ url: a:1, max: 7 }], queue: { size: ${size} }, fallback: spare }, spare: { servers: [x:1] }`,
    );
    naps.push(...times);
    const shop = lb.balancer.table.services.get("shop")!;
    for (let i = 0; i < 2; i++) shop.waiting.add(() => false);
    set("a", { inFlight: 7 });
    const answer = ask();
    for (let i = 0; i < 20; i++) await undefined;
    assert.equal(shop.waiting.size, expected ? 2 : 3);
    if (expected) assert.equal((await answer).asked, expected);
    else {
      set("a", { inFlight: 6 });
      for (const proceed of shop.waiting) proceed();
      assert.equal((await answer).asked, "a", "who waits is not sent away");
      set("a", { inFlight: 0 });
    }
  }
});

test("backups come before another service", async () => {
  const { ask, set } = setUp(
    "shop: { servers: [a:1, { url: b:1, backup: true }], fallback: spare }, spare: { servers: [x:1] }",
  );
  set("a", { up: false });
  assert.equal((await ask()).asked, "b");
  set("b", { up: false });
  assert.equal((await ask()).asked, "x");
});

test("a retry goes to the other service where all servers of the first have failed, and not before", async () => {
  const { ask, manners } = setUp(SHOP.replace("fallback", "retries: 2, strategy: first, fallback"));
  Object.assign(manners, { a: "refuses", b: 503 });
  const { asked, status, service } = await ask();
  assert.deepEqual([asked, status, service], ["abx", 200, "spare"]);
  Object.assign(manners, { b: 200 });
  assert.equal((await ask()).asked, "ab");
});

test("the other service is asked by its own strategy and policy, under what the route says", async () => {
  const more = "timeouts: { response: 9s }, retries: 3";
  const shop = SHOP.replace("strategy: first", `strategy: first, ${more}`);
  const { ask, set, manners, timeouts } = setUp(
    shop,
    "default: { service: shop }\npaths: [{ path: /fast, service: shop, timeouts: { idle: 7s } }]",
  );
  set("a", { up: false });
  set("b", { up: false });
  for (let i = 0; i < 3; i++) assert.equal((await ask()).asked, "x");
  assert.deepEqual(timeouts(), { connect: 3_000, response: 9_000, idle: 300_000, request: Infinity });
  await ask("/fast");
  assert.deepEqual(timeouts(), { connect: 3_000, response: 9_000, idle: 7_000, request: Infinity });
  Object.assign(manners, { x: "refuses", y: "refuses" });
  assert.equal((await ask()).asked.length, 4);
});

test("services may fall back in a row, and where nobody at all is left the client is told so", async () => {
  const { ask, set } = setUp(
    "shop: { servers: [a:1], fallback: spare }, spare: { servers: [x:1], fallback: last }, last: { servers: [z:1], panic: 0% }",
  );
  set("a", { up: false });
  set("x", { up: false });
  assert.deepEqual([(await ask()).asked, (await ask()).service], ["z", "last"]);
  set("z", { up: false });
  const { asked, status } = await ask();
  assert.deepEqual([asked, status], ["", 503]);
});

test("a sticky client comes back to its server when its service does", async () => {
  const { ask, set } = setUp(
    "shop: { servers: [a:1, b:1], sticky: {}, fallback: spare }, spare: { servers: [x:1, y:1], sticky: {} }",
  );
  await ask();
  const first = (await ask()).response;
  const cookie = first.headers.getSetCookie()[0]!.split(";")[0]!;
  assert.equal(first.headers.get("x-server"), "b");
  for (const name of ["a", "b"]) set(name, { up: false });
  const there = (await ask("/", { cookie })).response;
  assert.equal(there.headers.get("x-server"), "x");
  const both = there.headers.getSetCookie()[0]!.split(";")[0]!;
  assert.deepEqual((await ask("/", { cookie: both })).response.headers.getSetCookie(), []);
  for (const name of ["a", "b"]) set(name, { up: true });
  for (let i = 0; i < 3; i++) assert.equal((await ask("/", { cookie: both })).asked, "b");
});

test("routes.yml: what a service cannot fall back to is refused with its place", () => {
  const mistakes = (text: string): string[] => mistakesOf(`${text}\ndefault: { service: a }`);
  const of = (a: string, b = "") => `services: { a: { servers: [a:1]${a} }, b: { servers: [b:1]${b} } }`;
  assert.deepEqual(mistakes(of(", fallback: bb")), [
    'services.a.fallback: "bb" is not a service (a, b); did you mean "b"?',
  ]);
  assert.deepEqual(mistakes(of(", fallback: a")), ["services.a.fallback: falls back to itself: a -> a"]);
  assert.deepEqual(mistakes(of(", fallback: b", ", fallback: a")), [
    "services.a.fallback: falls back to itself: a -> b -> a",
    "services.b.fallback: falls back to itself: b -> a -> b",
  ]);
  assert.deepEqual(mistakes(of(", fallback: 777")), ["services.a.fallback: 777 is not a service (a, b)"]);
  assert.deepEqual(mistakes(`defaults: { fallback: b }\n${of("")}`), [
    "defaults.fallback: falls back to itself: b -> b",
  ]);
  assert.deepEqual(mistakes(`defaults: { fallback: b }\n${of("", ", fallback: none")}`), []);
  assert.deepEqual(mistakes(of(", fallback: b")), []);
});
