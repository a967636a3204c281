// lb.ts as a library: mounted in another Hono app, wrapped by it, reloaded, and with effects of one's own.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { Hono } from "hono";
import * as library from "../lb.ts";
import { type Attempt, createLoadBalancer, type Effects, parseConfig, strategies } from "../lb.ts";

/** Servers that answer with what they were asked; `hold` makes them wait for `free`. */
function servers() {
  const held: (() => void)[] = [];
  const state = { hold: false, free: () => held.splice(0).forEach((go) => go()), attempts: [] as Attempt[] };
  const effects = {
    client: () => ({ address: "192.0.2.9", scheme: "http", headers: [] }),
    report: () => {},
    fetch: async (url, attempt) => {
      state.attempts.push(attempt);
      const body = await new Response(attempt.body).text();
      if (state.hold) await new Promise<void>((go) => held.push(go));
      attempt.ended(200, 0, undefined);
      return new Response(`${attempt.method} ${url} ${body}`.trim(), { headers: { "x-from": attempt.server.name } });
    },
  } satisfies Partial<Effects>;
  return { state, effects };
}
const config = (servers: string, more = "") =>
  parseConfig(`log: off\ndefault: { servers: ${servers}, health: off${more} }`);
const HOST = { host: "h.test" };

test("it is a Hono app: request and fetch answer without a listener", async () => {
  const lb = createLoadBalancer(config("[a:1]"), servers().effects);
  const answers = [
    await lb.request("http://h.test/x?y", { headers: HOST }),
    await lb.fetch(new Request("http://h.test/x?y", { headers: HOST })),
  ];
  for (const answer of answers) assert.equal(await answer.text(), "GET http://a:1/x?y");
});

test("it can stand in a user's app, behind middleware and beside routes", async () => {
  const { state, effects } = servers();
  const app = new Hono();
  app.use(async (context, next) => {
    if (context.req.header("authorization") === undefined) return context.text("who are you?", 401);
    await next();
    context.header("x-wrapped", "yes");
  });
  app.get("/own", (context) => context.text("own"));
  app.route("/", createLoadBalancer(config("[a:1]"), effects));
  const ask = async (path: string, init: RequestInit = {}) => {
    const headers = { ...HOST, "authorization": "x", ...init.headers };
    const response = await app.request(`http://h.test${path}`, { ...init, headers });
    return [response.status, await response.text(), response.headers.get("x-wrapped"), response.headers.get("x-from")];
  };
  assert.deepEqual(await ask("/own"), [200, "own", "yes", null]);
  assert.deepEqual(await ask("/other?q=1"), [200, "GET http://a:1/other?q=1", "yes", "a:1"]);
  const put = { method: "PUT", body: "abc", headers: { "content-length": "3" } };
  assert.deepEqual(await ask("/other", put), [200, "PUT http://a:1/other abc", "yes", "a:1"]);
  const stranger = await app.request("http://h.test/other", { headers: HOST });
  assert.deepEqual([stranger.status, state.attempts.length], [401, 2], "no server saw that one");
});

test("behind middleware a path that it may have read otherwise is refused: /pub/../own is not /own", async () => {
  const { state, effects } = servers();
  const app = new Hono();
  app.all("/own/*", (context) => context.text("for me only", 401));
  app.route("/", createLoadBalancer(config("[a:1]"), effects));
  const ask = async (path: string) => {
    const request = new Request("http://h.test/", { headers: HOST });
    Object.defineProperty(request, "url", { value: `http://h.test${path}` }); // some runtimes leave it as it was sent
    return (await app.fetch(request)).status;
  };
  const rows: [string, number][] = [["/own/x", 401], ["/pub/../own/x", 400], ["/pub/%2e%2e/own/x", 400], [
    "/%6fwn/x",
    401,
  ], ["/pub/x", 200]];
  for (const [path, status] of rows) assert.equal(await ask(path), status, path);
  assert.equal(state.attempts.length, 1);
});

test("it can be mounted below a path, with and without that path in front", async () => {
  const { effects } = servers();
  const app = new Hono();
  const lb = createLoadBalancer(
    parseConfig("log: off\npaths: [{ path: /api, servers: [a:1] }]\ndefault: { servers: [b:1] }"),
    effects,
  );
  app.route("/api", lb);
  app.mount("/lb", (request) => lb.fetch(request));
  const ask = async (path: string) => {
    const response = await app.request(`http://h.test${path}`, { headers: HOST });
    return response.status === 200 ? await response.text() : response.status;
  };
  assert.equal(await ask("/api/x"), "GET http://a:1/api/x");
  assert.equal(await ask("/lb/x"), "GET http://b:1/x");
  assert.equal(await ask("/x"), 404);
});

test("a user's own onError is not asked for what the balancer answers itself", async () => {
  const { effects } = servers();
  const app = new Hono();
  app.onError((_error, context) => context.text("mine", 500));
  app.route(
    "/",
    createLoadBalancer(config("[a:1]", ", strategy: first"), effects, {
      first() {
        throw new Error("no");
      },
    }),
  );
  const response = await app.request("http://h.test/", { headers: HOST });
  assert.deepEqual([response.status, response.headers.get("x-lb-failure")], [500, "internal"]);
});

test("a reload changes where new requests go; those in flight finish where they began", async () => {
  const { state, effects } = servers();
  const lb = createLoadBalancer(config("[a:1]"), effects);
  const ask = () => lb.request("http://h.test/", { headers: HOST });
  state.hold = true;
  const before = ask();
  await new Promise((resolve) => setTimeout(resolve));
  const old = lb.balancer.table;
  lb.reload(config("[b:1]"));
  const after = ask();
  await new Promise((resolve) => setTimeout(resolve));
  assert.equal(lb.balancer.inFlight, 2);
  state.free();
  assert.equal((await before).headers.get("x-from"), "a:1");
  assert.equal((await after).headers.get("x-from"), "b:1");
  const services = [old, lb.balancer.table].flatMap((table) => [...table.services.values()]);
  const counts = services.flatMap(({ inFlight, servers }) => [inFlight, ...servers.map((server) => server.inFlight)]);
  assert.deepEqual([lb.balancer.inFlight, ...counts], [0, 0, 0, 0, 0]);
});

test("a server that stays over a reload stays the same record, with its new weight, and round robin goes on", async () => {
  const { state, effects } = servers();
  const lb = createLoadBalancer(config("[a:1, b:1]"), effects);
  const ask = async (times: number) => {
    for (let i = 0; i < times; i++) await lb.request("http://h.test/", { headers: HOST });
    return state.attempts.splice(0).map(({ server }) => server.name[0]).join("");
  };
  assert.equal(await ask(3), "aba");
  const [a] = lb.balancer.table.services.get("default")!.servers;
  lb.reload(config("[a:1, b:1]"));
  assert.equal(await ask(3), "bab");
  lb.reload(config("[{url: a:1, weight: 2}, b:1, c:1]"));
  assert.equal(lb.balancer.table.services.get("default")!.servers[0], a);
  assert.deepEqual([...await ask(400)].filter((name) => name === "a").length, 200);
});

test("a reload that cannot be done throws and changes nothing", async () => {
  const { effects } = servers();
  const yaml = (to: string) =>
    parseConfig(`log: off
services: { one: { servers: [${to}:1], health: off }, two: { servers: [${to}:2], health: off } }
hosts: [{ host: one.test, service: one }, { host: two.test, service: two }]`);
  const lb = createLoadBalancer(yaml("a"), effects);
  const next = yaml("b");
  (next.services.get("two")!.strategy as { name: string }).name = "nonsense";
  assert.throws(() => lb.reload(next), /nonsense/);
  const from = async (host: string) =>
    (await lb.request(`http://${host}/`, { headers: { host } })).headers.get("x-from");
  assert.deepEqual([await from("one.test"), await from("two.test")], ["a:1", "a:2"]);
});

test("two balancers in one process share nothing", async () => {
  const { state, effects } = servers();
  const one = { ...effects, date: () => new Date(0) }; // begun in the same millisecond
  const lbs = [one, one].map((effects) => createLoadBalancer(config("[a:1, b:1]"), effects));
  for (const lb of lbs) await lb.request("http://h.test/", { headers: HOST });
  assert.deepEqual(state.attempts.map(({ server }) => server.name), ["a:1", "a:1"]);
  const vias = state.attempts.map(({ headers }) => headers[headers.indexOf("via") + 1]);
  const ids = state.attempts.map(({ headers }) => headers[headers.indexOf("x-request-id") + 1]);
  assert.notEqual(vias[0], vias[1], "else each would take the other's requests for its own");
  assert.notEqual(ids[0], ids[1]);
});

test("nothing runs by itself: probes go out when probe is called, to the servers then in force", async () => {
  const probed: string[] = [];
  const connect: Effects["connect"] = (server) => (probed.push(server.name), Promise.resolve());
  const tcp = (servers: string) => parseConfig(`log: off\ndefault: { servers: ${servers} }`);
  const lb = createLoadBalancer(tcp("[a:1]"), { ...servers().effects, connect });
  await lb.request("http://h.test/", { headers: HOST });
  lb.reload(tcp("[b:1, c:1]"));
  assert.deepEqual(probed, []);
  await lb.probe();
  assert.deepEqual(probed, ["b:1", "c:1"]);
});

test("strategies of one's own do not change the table of strategies", () => {
  const before = Object.keys(strategies);
  createLoadBalancer(config("[a:1]"), servers().effects, { mine: (candidates) => candidates[0] });
  assert.deepEqual(Object.keys(strategies), before);
});

test("what a library needs is exported, and every export says what it is", () => {
  const needed = "createLoadBalancer parseConfig printConfig jsonSchema buildTable probeDue strategies FAILURES " +
    "ConfigError WireError";
  for (const name of needed.split(" ")) {
    assert.ok(name in library, name);
  }
  const lines = readFileSync(new URL("../lb.ts", import.meta.url), "utf8").split("\n");
  const bare = lines.flatMap((line, i) => {
    const name = /^export (?:async )?(?:function|const|class|interface|type) (\w+)/.exec(line)?.[1];
    return name === undefined || /\*\/$/.test(lines[i - 1] ?? "") ? [] : [name];
  });
  assert.deepEqual(bare, [], "exports without a doc comment");
  const odd = Object.entries(library).filter(([, value]) => !/^(function|object|undefined)$/.test(typeof value));
  assert.deepEqual(odd, [], "exports that workerd would not start with");
});
