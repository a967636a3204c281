// What is counted: of requests at their entrypoint and service, of attempts at their server, and what the text for
// Prometheus makes of it.

import assert from "node:assert/strict";
import { test } from "node:test";
import {
  type Attempt,
  createLoadBalancer,
  type Effects,
  type Failure,
  parseConfig,
  quantile,
  totalOf,
  WireError,
} from "../lb.ts";

/** What an attempt meets: a status, a failure before there is an answer, or one in its middle (`200 idle`). */
type Manner = number | Failure | `${number} ${Failure}`;

/** A balancer over a and b whose attempts meet the manners in turn, 40 ms each; answers have 10 bytes, 4 where cut. */
function setUp(manners: Manner[] = [200], yaml = "default: { servers: [a:1, b:1], health: off, eject: off }") {
  const clock = { now: 1_000 };
  let turn = 0;
  const effects = {
    client: () => ({ address: "192.0.2.9", scheme: "http", headers: [] }),
    now: () => clock.now,
    date: () => new Date(Date.UTC(2026, 10, 21) + clock.now),
    sleep: (_ms, signal) => signal ? new Promise<void>(() => {}) : Promise.resolve(),
    report: () => {},
    write: () => {},
    connect: () => Promise.resolve(),
    fetch: (_url: string, attempt: Attempt) => {
      const [, status, problem] = /^(\d*) ?(.*)$/.exec(String(manners[Math.min(turn++, manners.length - 1)]))!;
      clock.now += 40;
      if (!status) return Promise.reject(new WireError(problem as Failure, problem !== "connect", problem!));
      attempt.ended(Number(status), problem ? 4 : 10, problem ? problem as Failure : undefined);
      return Promise.resolve(new Response(null, { status: Number(status) }));
    },
  } satisfies Partial<Effects>;
  const lb = createLoadBalancer(parseConfig(`log: off\n${yaml}`), effects);
  const ask = async (init: RequestInit = {}, host = "h.test") => {
    const response = await lb.fetch(new Request(`http://${host}/`, { ...init, headers: { host, ...init.headers } }));
    await response.body?.cancel();
    return response.status;
  };
  const service = (name = "default") => lb.balancer.table.services.get(name)!;
  return { lb, ask, clock, effects, service };
}

// ─── Counters ───

test("a request is counted once at its service and entrypoint, and each attempt at its server", async () => {
  const { ask, service, lb } = setUp(["connect", 200, 503, 200, 500]);
  for (let i = 0; i < 3; i++) await ask({ method: "PUT", body: "abc", headers: { "content-length": "3" } });
  const { servers: [a, b], tallies, retries } = service();
  const { durations, ...total } = totalOf(tallies);
  assert.deepEqual(total, { requests: 3, errors: 1, bytesIn: 9, bytesOut: 30, milliseconds: 200 });
  assert.deepEqual(totalOf(lb.balancer.entrypoints.get("http")!.tallies), { durations, ...total });
  assert.equal(durations.reduce((sum, held) => sum + held), 3);
  assert.equal(retries, 2);
  const at = ({ counters: { durations: _, ...rest } }: typeof a & object) => Object.values(rest);
  assert.deepEqual([at(a!), at(b!)], [[3, 2, 6, 20, 120], [2, 1, 6, 20, 80]]);
  assert.deepEqual([a!.retries, b!.retries], [1, 1]);
});

test("an error is an answer with 5xx or one that is cut off; what the client does is none", async () => {
  for (
    const [manner, errors] of [[500, 1], ["200 idle", 1], ["timeout", 1], ["client-left", 0], ["200 client-left", 0], [
      404,
      0,
    ]] as const
  ) {
    const { ask, service } = setUp([manner], "default: { servers: [a:1], retries: 0, health: off, eject: off }");
    await ask();
    const { servers: [a], tallies } = service();
    assert.deepEqual([totalOf(tallies).errors, a!.counters.errors], [errors, errors], String(manner));
    assert.deepEqual([totalOf(tallies).requests, a!.counters.requests], [1, 1], String(manner));
  }
});

test("what no service has had is counted at the entrypoint alone", async () => {
  const { ask, lb, service } = setUp([200], "hosts: [{ host: a.test, servers: [a:1], health: off }]");
  assert.equal(await ask(), 404);
  const { requests, errors, bytesOut } = totalOf(lb.balancer.entrypoints.get("http")!.tallies);
  assert.deepEqual([requests, errors, bytesOut > 0], [1, 0, true]);
  assert.equal(service("a.test").tallies.size, 0);
});

test("ejections and probes are counted, and since when a server is what it is", async () => {
  const { lb, ask, clock, effects, service } = setUp(["reset"], "default: { servers: [a:1, b:1], retries: 0 }");
  const [a, b] = service().servers;
  for (let i = 0; i < 10; i++) await ask({ method: "POST" });
  assert.deepEqual([a!.ejected, b!.ejected, a!.since, b!.since], [1, 0, clock.now - 40, 0]);
  await lb.probe(); // with the effects that it began with: all pass
  assert.deepEqual([a!.probesPassed, b!.probesPassed, a!.since, b!.since], [1, 1, clock.now, 0]);
  effects.connect = () => Promise.reject(new Error("refused"));
  const flaky = createLoadBalancer(parseConfig("default: { servers: [a:1] }"), effects);
  const [only] = flaky.balancer.table.services.get("default")!.servers;
  for (let i = 0; i < 3; i++) {
    clock.now += 20_000;
    await flaky.probe();
  }
  assert.deepEqual([only!.up, only!.probesPassed, only!.probesFailed, only!.since], [false, 0, 3, clock.now]);
  assert.deepEqual([only!.probedAt, only!.probeProblem], [clock.now, "refused"]);
});

test("a quantile lies in the class of durations that it fell into", () => {
  const counters = totalOf(new Map());
  assert.equal(quantile(counters, 0.5), 0);
  const { ask, service } = setUp();
  return Promise.all(Array.from({ length: 9 }, () => ask())).then(() => {
    const { counters } = service().servers[0]!;
    for (const share of [0.01, 0.5, 0.99, 1]) {
      const at = quantile(counters, share);
      assert.ok(at > 30, `${at}`);
    }
    const slow = { ...totalOf(new Map()), requests: 1 };
    slow.durations[slow.durations.length - 1] = 1;
    assert.equal(quantile(slow, 0.5), 60_000);
  });
});
