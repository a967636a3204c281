// Why a server would be asked, why the others would not, and which one would take a request: GET /explain.

import assert from "node:assert/strict";
import { test } from "node:test";
import { createAdmin, type Strategy } from "../../lb.ts";
import { answerTo, balancerFor, refusal } from "../rig/balancer.ts";
import type { Candidates } from "../rig/types.ts";

type Verdict = { server: string; asked: boolean; why?: string; score?: number };

/** A balancer over scripted servers of a service `shop`, and what its admin API says of a path. `down`: who refuses connections. */
function setUp(keys = "", servers = "[a:1, b:1, c:1]", own: Record<string, Strategy> = {}) {
  const eject = keys.includes("eject") ? "" : ", eject: off";
  const yaml = `log: off
services: { shop: { servers: ${servers}, health: off${eject}${keys} }, spare: { servers: [x:1], health: off } }
routes: [{ path: /moved, redirect: { path: /new } }, { path: /only, methods: [PUT], service: shop }]
paths: [{ path: /shop, service: shop }]`;
  const down = new Set<string>(), asked: string[] = [];
  const { lb, send, service: serviceNamed } = balancerFor(yaml, {
    sleep: () => Promise.resolve(),
    fetch: (_url, attempt) => {
      asked.push(attempt.server.name);
      return down.has(attempt.server.name[0]!) ? refusal() : answerTo(attempt);
    },
    strategies: own,
  });
  const service = serviceNamed("shop");
  const set = (name: string, state: object) => {
    service.candidatesUntil = 0;
    Object.assign(service.servers.find((server) => server.name[0] === name)!, state);
  };
  const admin = createAdmin(lb);
  /** What would become of a request. */
  const explain = async (path = "/shop", method = "GET") => {
    const query = new URLSearchParams({ url: `http://h${path}`, method });
    const response = await admin.fetch(
      new Request(`http://localhost/explain?${query}`, { headers: { host: "localhost" } }),
    );
    assert.equal(response.status, 200);
    return await response.json();
  };
  /** The answer to a request, and who was asked for it. */
  const ask = async () => {
    asked.length = 0;
    const { status } = await send("http://h/shop");
    return [status, ...asked];
  };
  return { explain, ask, set, down, service };
}

test("/explain says of every server whether it may be asked, with what score, and why not", async () => {
  const keys = ", strategy: least-connections, max_in_flight: 9";
  const { explain, ask, set, service } = setUp(keys, "[a:1, b:1, c:1, d:1, e:1, f:1, g:1, h:1]");
  set("b", { inFlight: 3 });
  set("c", { up: false, probeProblem: "status 500" });
  set("d", { ejectedUntil: 12_345 });
  set("e", { inFlight: 9 });
  set("f", { state: "drain" });
  set("g", { weight: 0 });
  set("h", { state: "maint" });
  const { services: [shop] } = await explain();
  assert.deepEqual(shop, {
    fallback: false,
    weight: 1,
    service: "shop",
    strategy: "least-connections",
    takes: "a:1",
    servers: [
      { server: "a:1", asked: true, score: 1 },
      { server: "b:1", asked: true, score: 4 },
      { server: "c:1", asked: false, why: "down: status 500" },
      { server: "d:1", asked: false, why: "ejected for another 13 s" },
      { server: "e:1", asked: false, why: "full: 9 of 9" },
      { server: "f:1", asked: false, why: "it drains" },
      { server: "g:1", asked: false, why: "its weight is 0" },
      { server: "h:1", asked: false, why: "in maintenance" },
    ],
  });
  assert.deepEqual(await ask(), [200, shop.takes], "a request goes where it says");
  for (const server of service.servers) server.inFlight = 0;
});

test("a backup and a fallback service show why they would be asked, and a request that is tried again goes there", async () => {
  const keys = ", strategy: first, retries: 2, panic: 0%, fallback: spare";
  const { explain, ask, set, down } = setUp(keys, "[a:1, { url: b:1, backup: true }]");
  const brief = async () =>
    (await explain()).services.map(({ service, fallback, takes, servers }: Record<string, unknown>) => [
      service,
      fallback,
      takes,
      ...(servers as Verdict[]).map(({ asked, why }) => why ?? asked),
    ]);
  const spare = ["spare", true, "x:1", true];
  assert.deepEqual(await brief(), [["shop", false, "a:1", true, "a backup"], spare]);
  down.add("a").add("b");
  assert.deepEqual(await ask(), [200, "a:1", "b:1", "x:1"]);
  set("a", { up: false });
  assert.deepEqual(await brief(), [["shop", false, "b:1", "down", true], spare]);
  assert.deepEqual(await ask(), [200, "b:1", "x:1"]);
  set("b", { up: false });
  assert.deepEqual(await brief(), [["shop", false, null, "down", "down"], spare]);
  assert.deepEqual(await ask(), [200, "x:1"]);
});

test("where no server can take a request it says of each why, and where no route takes it, why that is", async () => {
  const { explain, ask, set } = setUp(", panic: 0%, queue: off, max_in_flight: 1", "[a:1, b:1]");
  set("a", { up: false });
  set("b", { inFlight: 1 });
  const { services: [{ takes, servers }] } = await explain();
  assert.deepEqual([takes, servers], [
    null,
    [{ server: "a:1", asked: false, why: "down" }, { server: "b:1", asked: false, why: "full: 1 of 1" }],
  ]);
  assert.deepEqual(await ask(), [503]);
  assert.deepEqual((await explain("/none")).failure, "no-route");
  const { route, action, status } = await explain("/moved");
  assert.deepEqual([route, action, status], ["/moved", "redirect", 302]);
  assert.deepEqual((await explain("/only")).allow, ["PUT"]);
  set("b", { inFlight: 0 });
});

test("in a panic those who are down are asked, and it says so", async () => {
  const { explain, set } = setUp("", "[a:1, b:1]");
  set("a", { up: false });
  set("b", { up: false });
  const { services: [{ takes, servers }] } = await explain();
  assert.deepEqual([takes, servers[0].why], ["a:1", "down, but too few are healthy"]);
});

test("a server says what limit auto has found, that it sent Retry-After, and that another request tries it out", async () => {
  const { explain, set } = setUp(", max_in_flight: auto, eject: {}", "[a:1, b:1, c:1]");
  set("a", { limit: 7.5 });
  set("b", { pausedUntil: 2_000 });
  set("c", { ejectedUntil: -1, trialInFlight: true });
  const { services: [{ servers }] } = await explain();
  assert.deepEqual(servers[0], { server: "a:1", asked: true, limit: 7 });
  assert.deepEqual(servers.slice(1).map(({ why }: Verdict) => why), [
    "its Retry-After holds for another 2 s",
    "another request tries it out",
  ]);
});

// deno-fmt-ignore
const SCORED = ["two-choices", "least-connections", "least-response-time", "peak-ewma", "ip-hash", "{ hash: { path: true } }"];
test("who is taken has the least score, where a strategy goes by one", async () => {
  for (const strategy of SCORED) {
    const { explain, service } = setUp(`, strategy: ${strategy}`, "[a:1, { url: b:1, weight: 2 }, c:1]");
    service.servers.forEach((server, i) =>
      Object.assign(server, { inFlight: 3 - i, latency: 9 - i, recent: 90 - 30 * i })
    );
    const { services: [{ takes, servers }] } = await explain();
    const least = Math.min(...servers.map(({ score }: Verdict) => score!)); // that of two servers, where they are equal
    assert.equal(servers.find(({ server }: Verdict) => server === takes).score, least, strategy);
    service.servers.forEach((server) => server.inFlight = 0);
  }
  for (const strategy of ["first", "round-robin", "random"]) {
    const { services: [{ servers }] } = await setUp(`, strategy: ${strategy}`).explain();
    assert.ok(servers.every((one: object) => !("score" in one)), strategy);
  }
});

test("a strategy of one's own may have a score", async () => {
  const score: Strategy["score"] = ({ name }) => -name.charCodeAt(0);
  const last: Strategy = Object.assign((candidates: Candidates) => candidates.at(-1)!, { score });
  const { explain } = setUp(", strategy: last", "[a:1, b:1]", { last });
  const { services: [{ takes, servers }] } = await explain();
  assert.deepEqual([takes, servers.map(({ score }: { score: number }) => score)], ["b:1", [-97, -98]]);
});
