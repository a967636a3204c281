// Why a server was taken and the others were not: who may ask, what is said, and that nobody else learns of it.

import assert from "node:assert/strict";
import { test as nodeTest, type TestContext } from "node:test";
import {
  type Candidates,
  type Choice,
  createLoadBalancer,
  type Fields,
  parseConfig,
  type Score,
  type Strategy,
  type Verdict,
  WireError,
} from "../lb.ts";
import { answer, get, rawRequest, scriptedServer, startProgram, status, value, values } from "./rig.ts";

const test = (name: string, body: (t: TestContext) => Promise<void> | void) =>
  nodeTest(name, { timeout: 120_000 }, body);

const TOKEN = "secret-token", READ = "read-token-1";
const ADMIN = `admin: { listen: 127.0.0.1:0, token: ${TOKEN}, read_token: ${READ} }`;

/** A balancer over scripted servers of a service `shop`; `down`: who refuses connections. */
function setUp(keys = "", servers = "[a:1, b:1, c:1]", top = ADMIN, own: Record<string, Strategy> = {}) {
  const yaml = `log: off\n${top}
services: { shop: { servers: ${servers}, health: off, eject: off${keys} }, spare: { servers: [x:1], health: off } }
routes: [{ path: /moved, redirect: { path: /new } }, { path: /only, methods: [PUT], service: shop }]
paths: [{ path: /shop, service: shop }]`;
  const down = new Set<string>(), clock = { now: 0 };
  const sent: Fields[] = [];
  const lb = createLoadBalancer(parseConfig(yaml, { strategies: own }), {
    now: () => clock.now,
    random: () => 0.5,
    report: () => {},
    sleep: () => Promise.resolve(),
    client: (request, env) => ({
      address: (env as { from?: string }).from ?? "192.0.2.1",
      scheme: "http",
      headers: [...request.headers].flat(),
    }),
    fetch: (_url, attempt) => {
      sent.push(attempt.headers);
      if (down.has(attempt.server.name[0]!)) return Promise.reject(new WireError("connect", false, "refused"));
      attempt.ended(200, 0);
      return Promise.resolve(new Response(null, { headers: { "cache-control": "public" } }));
    },
    strategies: own,
  });
  const service = lb.balancer.table.services.get("shop")!;
  const set = (name: string, state: object) => {
    service.candidatesUntil = 0;
    Object.assign(service.servers.find((server) => server.name[0] === name)!, state);
  };
  /** The answer; with a token also what is said about it. */
  const ask = async (token?: string, path = "/shop", headers = {}, from?: string) => {
    const all = { host: "h", ...headers, ...(token !== undefined && { "x-lb-explain": token }) };
    const response = await lb.fetch(new Request(`http://h${path}`, { headers: all }), { from });
    const said = response.headers.get("x-lb-explain");
    return { response, said: said === null ? undefined : JSON.parse(said) };
  };
  return { lb, ask, set, down, sent, clock, service };
}

test("who shows a token of the admin API learns which server was taken, and why not the others", async () => {
  const { ask, set } = setUp(", strategy: least-connections, max_in_flight: 9", "[a:1, b:1, c:1, d:1, e:1, f:1, g:1]");
  set("b", { inFlight: 3 });
  set("c", { up: false, probeProblem: "status 500" });
  set("d", { until: 12_345 });
  set("e", { inFlight: 9 });
  set("f", { state: "drain" });
  set("g", { weight: 0 });
  const { said, response } = await ask(TOKEN);
  assert.deepEqual(said, {
    route: "/shop",
    choices: [{
      service: "shop",
      strategy: "least-connections",
      servers: [
        { server: "a:1", asked: true, score: 1 },
        { server: "b:1", asked: true, score: 4 },
        { server: "c:1", asked: false, why: "down: status 500" },
        { server: "d:1", asked: false, why: "ejected for another 13 s" },
        { server: "e:1", asked: false, why: "full: 9 of 9" },
        { server: "f:1", asked: false, why: "it drains" },
        { server: "g:1", asked: false, why: "its weight is 0" },
      ],
      takes: "a:1",
    }],
  });
  assert.match(response.headers.get("cache-control")!, /\bno-store$/, "no cache keeps it for others");
  assert.equal((await ask(READ)).said.choices[0].takes, "a:1", "the read token may look, too");
});

test("nobody else learns anything, and servers never see the header", async () => {
  const { ask, sent } = setUp();
  for (const token of [undefined, "", "x", TOKEN.slice(0, -1), `${TOKEN}x`, TOKEN.toUpperCase()]) {
    const { said, response } = await ask(token, "/shop", {}, `192.0.2.${token?.length ?? 99}`);
    assert.deepEqual([said, response.headers.get("cache-control")], [undefined, "public"], token);
  }
  await ask(TOKEN);
  const open = setUp("", undefined, "");
  assert.equal((await open.ask("anything")).said, undefined, "without a token in the file nobody may");
  assert.equal((await setUp("", undefined, "admin: { listen: 127.0.0.1:0 }").ask("undefined")).said, undefined);
  for (const headers of [...sent, ...open.sent]) assert.ok(!headers.includes("x-lb-explain"));
});

test("who guesses tokens is not listened to for a while, and others are", async () => {
  const { ask, clock } = setUp();
  for (let i = 0; i < 5; i++) assert.equal((await ask(`wrong-${i}`)).said, undefined);
  assert.equal((await ask(TOKEN)).said, undefined);
  assert.ok((await ask(TOKEN, "/shop", {}, "192.0.2.2")).said);
  clock.now += 1_000;
  assert.ok((await ask(TOKEN)).said);
});

test("a retry, a backup and another service show as further choices", async () => {
  const { ask, down } = setUp(", strategy: first, retries: 2, fallback: spare", "[a:1, { url: b:1, backup: true }]");
  down.add("a").add("b");
  const { said } = await ask(TOKEN);
  const brief = said.choices.map(({ service, takes, servers }: Choice) => [
    service,
    takes,
    ...servers.map(({ asked, why }) => why ?? asked),
  ]);
  assert.deepEqual(brief, [
    ["shop", "b:1", "tried before", true],
    ["shop", null, "tried before", "tried before"],
    ["spare", "x:1", true],
  ]);
});

test("an answer of our own says why there is no other", async () => {
  const { ask, set } = setUp(", panic: 0%, queue: off, max_in_flight: 1", "[a:1, b:1]");
  set("a", { up: false });
  set("b", { inFlight: 1 });
  const { said, response } = await ask(TOKEN);
  assert.equal(response.status, 503);
  const [{ takes, servers }] = said.choices;
  assert.deepEqual([takes, servers.map(({ asked, why }: Verdict) => [asked, why])], [
    null,
    [[false, "down"], [false, "full: 1 of 1"]],
  ]);
  assert.deepEqual((await ask(TOKEN, "/none")).said, { route: "", choices: [] });
  assert.deepEqual((await ask(TOKEN, "/moved")).said, { route: "/moved", choices: [] });
  set("b", { inFlight: 0 });
});

test("in a panic those who are down are asked, and it says so", async () => {
  const { ask, set } = setUp("", "[a:1, b:1]");
  set("a", { up: false });
  set("b", { up: false });
  assert.equal((await ask(TOKEN)).said.choices[0].servers[0].why, "down, but too few are healthy");
});

test("a sticky client's server is named", async () => {
  const { ask } = setUp(", sticky: {}");
  const cookie = (await ask()).response.headers.getSetCookie()[0]!.split(";")[0]!;
  const { said } = await ask(TOKEN, "/shop", { cookie });
  assert.deepEqual([said.choices[0].takes, said.choices[0].servers[0].why], [
    "a:1",
    "the cookie names it",
  ]);
});

test("what is said stays small and is ASCII, whatever the service", async () => {
  const many = Array.from({ length: 200 }, (_, i) => `s${i}:1`);
  const { ask, set, service } = setUp(", retries: 9", `[${many}]`);
  set("s", { up: false, probeProblem: `ü${"x".repeat(999)}` });
  service.name = "größe";
  const { said, response } = await ask(TOKEN);
  const text = response.headers.get("x-lb-explain")!;
  assert.match(text, /^[\x20-\x7e]+$/);
  assert.ok(text.length < 8_000, `${text.length}`);
  assert.deepEqual([said.choices[0].service, said.choices[0].servers.length, said.choices[0].more], ["größe", 16, 184]);
});

// deno-fmt-ignore
const SCORED = ["two-choices", "least-connections", "least-response-time", "peak-ewma", "ip-hash", "{ hash: { path: true } }"];
test("who is taken has the least score, where a strategy goes by one", async () => {
  for (const strategy of SCORED) {
    const { ask, service } = setUp(`, strategy: ${strategy}`, "[a:1, { url: b:1, weight: 2 }, c:1]");
    service.servers.forEach((server, i) =>
      Object.assign(server, { inFlight: 3 - i, latency: 9 - i, recent: 90 - 30 * i })
    );
    const [{ takes, servers }] = (await ask(TOKEN)).said.choices;
    const least = servers.toSorted((a: { score: number }, b: { score: number }) => a.score - b.score)[0];
    assert.equal(takes, least.server, strategy);
    service.servers.forEach((server) => server.inFlight = 0);
  }
  for (const strategy of ["first", "round-robin", "random"]) {
    const [{ servers }] = (await setUp(`, strategy: ${strategy}`).ask(TOKEN)).said.choices;
    assert.ok(servers.every((one: object) => !("score" in one)), strategy);
  }
});

test("a strategy of one's own may have a score", async () => {
  const score: Score = ({ name }) => -name.charCodeAt(0);
  const last: Strategy = Object.assign((candidates: Candidates) => candidates.at(-1)!, { score });
  const { ask } = setUp(", strategy: last", "[a:1, b:1]", ADMIN, { last });
  const [{ takes, servers }] = (await ask(TOKEN)).said.choices;
  assert.deepEqual([takes, servers.map(({ score }: { score: number }) => score)], ["b:1", [-97, -98]]);
});

test("running: x-lb-explain with the token tells what happened, and without it nothing", async (t) => {
  const servers = await Promise.all(["a", "b"].map((name) => scriptedServer((visit) => visit.send(answer(name)))));
  for (const server of servers) t.after(() => server.close());
  const [a, b] = servers.map(({ address }) => address);
  const lb = await startProgram({
    log: "off",
    admin: { listen: "127.0.0.1:0", token: TOKEN },
    default: { servers: [a, { url: b, state: "drain" }], health: "off" },
  });
  t.after(() => lb.stop());
  const ask = async (headers: string) => (await rawRequest(lb.port, get("/", headers))).answers[0]!;
  const told = await ask(`X-Lb-Explain: ${TOKEN}\r\n`);
  assert.equal(status(told), 200);
  assert.deepEqual(JSON.parse(value(told, "x-lb-explain")), {
    route: "default",
    choices: [{
      service: "default",
      strategy: "round-robin",
      servers: [{ server: a, asked: true }, { server: b, asked: false, why: "it drains" }],
      takes: a,
    }],
  });
  for (const headers of ["", "x-lb-explain: wrong\r\n"]) {
    assert.deepEqual(values(await ask(headers), "x-lb-explain"), []);
  }
  for (const request of servers[0]!.requests) assert.deepEqual(values(request, "x-lb-explain"), []);
});
