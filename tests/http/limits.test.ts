// Queues, rates and hedges: who waits, who comes back later, who is asked twice. Decisions run on a clock that only the
// test moves; what a client notices runs through the program.

import assert from "node:assert/strict";
import { type AddressInfo, connect, createServer, type Socket } from "node:net";
import { setImmediate } from "node:timers";
import { type Failure, type FetchAttempt, HttpServer, type LoadBalancer, parseConfig, WireError } from "../../lb.ts";
import { balancerFor } from "../rig/balancer.ts";
import {
  answer,
  assertIdle,
  freePort,
  get,
  listenLocally,
  type Message,
  patience,
  rawRequest,
  type ScriptedServer,
  scriptedServer,
  seeded,
  sleep,
  startProgram,
  status,
  target,
  test as patientTest,
  TestBody,
  until,
  value,
  type Visit,
} from "../rig/rig.ts";

// ─── A balancer whose clock and servers do nothing by themselves ───

const balancers: LoadBalancer[] = [];
/** A test at whose end nobody waits and every count is 0. */
const test = (name: string, run: () => Promise<void>) =>
  patientTest(name, async () => {
    await run();
    balancers.splice(0).forEach(assertIdle);
  });

/** Everything that is ready to happen happens. */
const settled = () => new Promise<void>((resolve) => setImmediate(resolve));

/** A clock that stands still, and what sleeps on it. */
function newClock() {
  const sleepers = new Set<{ at: number; wake(): void }>();
  const clock = {
    now: 0,
    sleepers,
    sleep: (ms: number, signal?: AbortSignal) =>
      new Promise<void>((resolve) => {
        const one = { at: clock.now + ms, wake: resolve };
        sleepers.add(one);
        signal?.addEventListener("abort", () => sleepers.delete(one));
      }),
    /** Moves on, and wakes each sleeper at its time. */
    async advance(ms: number) {
      const end = clock.now + ms;
      for (;;) {
        await settled();
        const [next] = [...sleepers].filter(({ at }) => at <= end).sort((a, b) => a.at - b.at);
        if (!next) break;
        clock.now = Math.max(clock.now, next.at);
        sleepers.delete(next);
        next.wake();
      }
      clock.now = end;
      await settled();
    },
  };
  return clock;
}

/** One attempt at a server, which ends when the test says so. */
interface Asked {
  server: string; // its first letter
  path: string;
  attempt: FetchAttempt;
  at: number; // when, by the clock
  /** Answers with this status; its body is whole. */
  finish(status?: number): Promise<void>;
  /** Answers with the head only; the call that comes back ends the body. */
  begin(status?: number): Promise<() => Promise<void>>;
  fail(kind: Failure, sent?: boolean): Promise<void>;
}

interface Ask {
  path?: string;
  method?: string;
  headers?: Record<string, string>;
  signal?: AbortSignal;
  body?: string;
  address?: string;
}

function setUp(keys: string, { servers = "[a:1]", yaml = "", random = seeded(1) } = {}) {
  const clock = newClock(), asked: Asked[] = [];
  const fetch = (url: string, attempt: FetchAttempt) => {
    const { promise, resolve, reject } = Promise.withResolvers<Response>();
    let over = false;
    const end = (status: number, problem?: Failure) => {
      if (!over) attempt.ended(status, 0, problem);
      over = true;
    };
    attempt.signal.addEventListener("abort", async () => { // the wire looks every 100 ms
      await clock.sleep(50);
      if (over) return;
      over = true;
      reject(new WireError("client-left", true, "nobody wants it"));
    });
    asked.push({
      server: attempt.server.name[0]!,
      path: url.slice(attempt.server.url.length),
      attempt,
      at: clock.now,
      finish(status = 200) {
        if (over) return settled();
        end(status);
        resolve(new Response(null, { status }));
        return settled();
      },
      async begin(status = 200) {
        let sink: ReadableStreamDefaultController;
        const start = (controller: ReadableStreamDefaultController) => void (sink = controller);
        resolve(new Response(new ReadableStream({ start, cancel: () => end(status, "client-left") }), { status }));
        await settled();
        return () => {
          if (!over) sink.close();
          end(status);
          return settled();
        };
      },
      fail(kind, sent = true) {
        over = true;
        reject(new WireError(kind, sent, kind));
        return settled();
      },
    });
    return promise;
  };
  const retries = keys.includes("retries:") ? "" : "retries: 0, ";
  const text = yaml || `log: json\ndefault: { servers: ${servers}, health: off, ${retries}${keys} }`;
  const one = balancerFor(text, { fetch, now: () => clock.now, date: () => new Date(0), random, sleep: clock.sleep });
  balancers.push(one.lb);
  const send = ({ path = "/", address = "192.0.2.9", ...init }: Ask = {}) =>
    one.send(`http://h.test${path}`, { ...init, from: { address } });
  return { ...one, clock, asked, send, service: one.service() };
}

/** One line of the access log. */
function logged(line: string) {
  const said = JSON.parse(line) as Record<string, string | number | undefined>;
  return {
    status: said["http.response.status_code"],
    path: said["url.path"],
    bytes: said["http.response.body.size"],
    failure: said["error.type"],
    server: said["lb.server"] as string | undefined,
    attempts: said["lb.attempts"],
  };
}

const outcome = async (response: Promise<Response>) => {
  const { status, headers } = await response;
  return [status, headers.get("x-lb-failure"), headers.get("retry-after")];
};

// ─── The queue ───

test("a request that finds all servers full waits, and gets the place of the one that ends first", async () => {
  const { send, asked } = setUp("max_in_flight: 1", { servers: "[a:1, b:1]" });
  const first = [send(), send()];
  const late = send();
  await settled();
  assert.deepEqual(asked.map(({ server }) => server), ["a", "b"]);
  await asked[1]!.finish();
  assert.deepEqual(asked.map(({ server }) => server), ["a", "b", "b"]);
  await asked[0]!.finish();
  await asked[2]!.finish();
  for (const one of [...first, late]) assert.equal((await one).status, 200);
});

test("who waits is served in the order of coming, by nobody overtaken, also where many places become free at once", async () => {
  const { send, asked, service } = setUp("max_in_flight: 3, queue: { size: 500 }", { servers: "[a:1, b:1]" });
  const random = seeded(7);
  const picked: string[] = [];
  const { strategy } = service;
  service.strategy = (candidates, draw) => {
    picked.push(draw.request!.target);
    return strategy(candidates, draw);
  };
  const sent: Promise<Response>[] = [];
  const running: Asked[] = [];
  let seen = 0;
  for (let step = 0; step < 400; step++) {
    for (let i = Math.floor(random() * 4); i > 0; i--) sent.push(send({ path: `/${sent.length}` }));
    running.push(...asked.slice(seen));
    seen = asked.length;
    for (let i = Math.floor(random() * 4); i > 0 && running.length; i--) {
      const [one] = running.splice(Math.floor(random() * running.length), 1);
      if (random() < 0.5) void one!.finish();
      else await one!.finish();
    }
  }
  for (; await settled(), seen < asked.length; seen = asked.length) {
    for (const one of [...running.splice(0), ...asked.slice(seen)]) void one.finish();
  }
  for (const one of running) await one.finish();
  assert.ok(sent.length > 400);
  for (const one of sent) assert.equal((await one).status, 200);
  assert.deepEqual(picked, sent.map((_, i) => `/${i}`));
});

test("one who comes in the very moment in which a server gets room does not overtake those who wait", async () => {
  const { send, asked, clock, service } = setUp("eject: { failures: 1, for: 1s }, max_in_flight: 1, panic: 0%", {
    servers: "[a:1, b:1]",
  });
  const sent = [send({ path: "/bad" }), send({ path: "/long" }), send({ path: "/waits" })];
  await settled();
  await asked[0]!.fail("reset"); // a is ejected: its place is nobody's
  assert.equal(service.waiting.size, 1);
  clock.now += 1_001; // nobody notices yet
  sent.push(send({ path: "/late" }));
  assert.deepEqual(asked.map(({ path }) => path), ["/bad", "/long"]);
  await settled();
  assert.deepEqual(asked.map(({ path }) => path), ["/bad", "/long", "/waits"]);
  for (let i = 1; i < 4; i++) await asked[i]!.finish();
  assert.deepEqual(await Promise.all(sent.map(async (one) => (await one).status)), [502, 200, 200, 200]);
});

test("beyond size there is 503 queue-full at once, after timeout 503 queue-timeout, both with Retry-After", async () => {
  const { send, asked, clock } = setUp("max_in_flight: 1, queue: { size: 2, timeout: 3s }");
  const served = send();
  const waiting = [outcome(send()), outcome(send())];
  await settled();
  assert.deepEqual(await outcome(send()), [503, "queue-full", "1"]);
  await clock.advance(2_999);
  assert.equal(clock.sleepers.size, 2);
  await clock.advance(1);
  for (const one of waiting) assert.deepEqual(await one, [503, "queue-timeout", "1"]);
  assert.equal(clock.sleepers.size, 0);
  await asked[0]!.finish();
  assert.equal((await served).status, 200);
  const next = send();
  await asked[1]!.finish();
  assert.equal((await next).status, 200, "the server has room again");
  assert.equal(asked.length, 2, "no server was asked for those who gave up");
});

test("a queue is there as soon as servers have a limit, 100 long and 5 s; queue: off is none", async () => {
  const { send, asked, clock, service } = setUp("max_in_flight: 1");
  const waiting = Array.from({ length: 102 }, () => outcome(send()));
  await settled();
  assert.equal(service.waiting.size, 100);
  assert.deepEqual(await waiting[101], [503, "queue-full", "1"]);
  await clock.advance(5_000);
  assert.deepEqual(await waiting[1], [503, "queue-timeout", "1"]);
  await asked[0]!.finish();
  assert.deepEqual(await waiting[0], [200, null, null]);
  const off = setUp("max_in_flight: 1, queue: off");
  const first = off.send();
  assert.deepEqual(await outcome(off.send()), [503, "queue-full", "1"]);
  await off.asked[0]!.finish();
  assert.equal((await first).status, 200);
});

test("while there is room nothing sleeps and nobody waits", async () => {
  const { send, asked, clock, service } = setUp("max_in_flight: 5");
  const sent = Array.from({ length: 5 }, () => send());
  await settled();
  assert.deepEqual([clock.sleepers.size, service.waiting.size], [0, 0]);
  for (const one of asked) await one.finish();
  for (const one of sent) assert.equal((await one).status, 200);
});

test("a client that has left leaves the queue at once, is logged with 499, and those behind it move up", async () => {
  const { send, asked, lines, service, clock } = setUp("max_in_flight: 1, queue: { size: 2 }");
  const leaving = new AbortController();
  const served = send();
  const gone = send({ path: "/gone", signal: leaving.signal });
  const behind = send({ path: "/behind" });
  await settled();
  leaving.abort();
  await settled();
  assert.equal(service.waiting.size, 1);
  assert.equal(clock.sleepers.size, 1);
  const { status, failure, path, server } = logged(lines[0]!);
  assert.deepEqual([status, failure, path, server], [499, "client-left", "/gone", undefined]);
  assert.equal((await gone).status, 499);
  await asked[0]!.finish();
  assert.equal(asked[1]!.path, "/behind");
  await asked[1]!.finish();
  for (const one of [served, behind]) assert.equal((await one).status, 200);
});

test("a client that has left before its turn to wait does not wait", async () => {
  const { send, asked } = setUp("max_in_flight: 1");
  const served = send();
  assert.deepEqual(await outcome(send({ signal: AbortSignal.abort() })), [499, "client-left", null]);
  await asked[0]!.finish();
  await served;
});

test("a place becomes free with the end of the body, or with a failure; not with the head", async () => {
  const { send, asked } = setUp("max_in_flight: 1, eject: off");
  const sent = [send(), send(), send()];
  const end = await asked[0]!.begin();
  assert.equal(asked.length, 1);
  await end();
  assert.equal(asked.length, 2);
  await asked[1]!.fail("reset");
  assert.equal(asked.length, 3);
  await asked[2]!.finish();
  assert.deepEqual(await Promise.all(sent.map(async (one) => (await one).status)), [200, 502, 200]);
});

for (
  const [what, change] of [
    [
      "a reload with more room",
      ({ lb, yaml }) => lb.reload(parseConfig(yaml.replace("max_in_flight: 1", "max_in_flight: 2"))),
    ],
    ["a reload with another server", ({ lb, yaml }) => lb.reload(parseConfig(yaml.replace("[a:1]", "[a:1, c:1]")))],
    ["the end of an ejection, seen by the clock of the probes", async ({ lb, clock, eject }) => {
      eject();
      clock.now += 1_000;
      await lb.probe();
    }],
    ["the end of an ejection, seen by another request", async ({ clock, eject, other }) => {
      eject();
      clock.now += 1_000;
      await other();
    }],
    ["the end of an ejection, seen at the end of the wait", async ({ clock, eject }) => {
      eject();
      await clock.advance(5_000);
    }],
  ] as [
    string,
    (tools: {
      lb: LoadBalancer;
      yaml: string;
      clock: ReturnType<typeof newClock>;
      eject(): void;
      other(): Promise<void>;
    }) => unknown,
  ][]
) {
  test(`those who wait go on after ${what}`, async () => {
    const ejected = what.includes("ejection");
    const servers = ejected ? "[a:1, b:1]" : "[a:1]";
    const yaml =
      `log: off\ndefault: { servers: ${servers}, health: off, max_in_flight: 1, panic: 0%, eject: { at_most: 100% } }`;
    const { lb, asked, send, clock } = setUp("", { yaml });
    const { services } = lb.balancer.table;
    const b = services.get("default")!.servers[1];
    const eject = () => {};
    if (b) Object.assign(b, { ejectedUntil: 1_000 });
    const sent = [send()];
    await settled();
    sent.push(send({ path: "/waits" }));
    await settled();
    assert.equal(asked.length, 1);
    const other = async () => {
      sent.push(send());
      await settled();
    };
    await change({ lb, yaml, clock, eject, other });
    await settled();
    assert.equal(asked[1]?.path, "/waits");
    for (let i = 0; i < asked.length; i++) await asked[i]!.finish();
    for (const one of sent) assert.equal((await one).status, 200);
  });
}

test("a probe that brings a server back lets those who wait go on", async () => {
  const yaml =
    "log: off\ndefault: { servers: [a:1, b:1], health: { path: /up, rise: 1, fall: 1 }, max_in_flight: 1, panic: 0% }";
  const { lb, asked, send, clock } = setUp("", { yaml });
  const probing = lb.probe();
  await settled();
  await asked[0]!.finish();
  await asked[1]!.finish(500);
  await probing;
  const sent = [send(), send({ path: "/waits" })];
  await settled();
  assert.equal(asked.length, 3);
  clock.now += 12_000;
  const again = lb.probe();
  await settled();
  await asked[3]!.finish();
  await asked[4]!.finish();
  await again;
  await settled();
  assert.equal(asked[5]!.path, "/waits");
  await asked[2]!.finish();
  await asked[5]!.finish();
  for (const one of sent) assert.equal((await one).status, 200);
});

test("where nobody may be asked there is 503 no-server at once, and nothing to wait for", async () => {
  const { send, asked } = setUp("max_in_flight: 1, panic: 0%, eject: { failures: 1, at_most: 100% }");
  const first = send();
  await asked[0]!.fail("reset");
  assert.equal((await first).status, 502);
  assert.deepEqual(await outcome(send()), [503, "no-server", "1"]);
});

test("a retry waits too when nobody has room, behind those who wait already, and never holds a second place", async () => {
  const { send, asked } = setUp("max_in_flight: 1, retries: 1, eject: off");
  const sent = [send({ path: "/retried" }), send({ path: "/waits" })];
  await settled();
  await asked[0]!.fail("reset");
  assert.deepEqual(asked.map(({ path }) => path), ["/retried", "/waits"]);
  await asked[1]!.finish();
  assert.equal(asked[2]!.path, "/retried");
  await asked[2]!.finish();
  for (const one of sent) assert.equal((await one).status, 200);
});

test("a strategy that throws for one who waits costs that request, not the one that made room, nor those behind", async () => {
  const yaml =
    "log: off\ndefault: { servers: [a:1], health: off, max_in_flight: 1, strategy: { hash: { header: x-key } } }";
  const { send, asked, service, reports } = setUp("", { yaml });
  const sent = [send(), send({ headers: { "x-key": "bad" } }), send({ headers: { "x-key": "good" } })];
  await settled();
  const { strategy } = service;
  service.strategy = (candidates, draw) => {
    if (draw.key === "bad") throw new Error("no such luck");
    return strategy(candidates, draw);
  };
  await asked[0]!.finish();
  await asked[1]!.finish();
  assert.deepEqual(await Promise.all(sent.map(async (one) => (await one).status)), [200, 500, 200]);
  assert.match(reports.join(), /no such luck/);
});

test("any mix of coming, leaving, failing and giving up ends with an empty queue and counts of 0", async () => {
  const random = seeded(3);
  const below = (n: number) => Math.floor(random() * n);
  const { send, asked, clock, service } = setUp(
    "max_in_flight: 2, queue: { size: 9, timeout: 1s }, retries: 1, eject: { failures: 3, for: 2s }",
    { servers: "[a:1, b:1, c:1]" },
  );
  const sent: Promise<Response>[] = [];
  const leaving: AbortController[] = [];
  const seen = new Set<string>();
  let ended = 0;
  const end = async (one: Asked) => below(3) ? await one.finish([200, 503][below(2)]) : await one.fail("reset");
  for (let step = 0; step < 1_500; step++) {
    const what = below(6);
    if (what < 3) {
      leaving.push(new AbortController());
      sent.push(send({ signal: leaving.at(-1)!.signal }));
    } else if (what === 3) leaving[below(leaving.length)]?.abort();
    else if (what === 4) await clock.advance(below(300));
    else for (let i = below(4); i > 0 && ended < asked.length; i--) await end(asked[ended++]!);
    assert.ok(service.waiting.size <= 9);
    for (const server of service.servers) assert.ok(server.inFlight <= 2);
  }
  while (await clock.advance(100), ended < asked.length) await end(asked[ended++]!);
  for (const one of sent) {
    const response = await one;
    seen.add(response.headers.get("x-lb-failure") ?? `${response.status}`);
  }
  for (const kind of ["200", "client-left", "queue-full", "queue-timeout", "reset"]) assert.ok(seen.has(kind), kind);
});

// ─── Rates ───

/** A route with this rate that answers by itself; gives what one request meets: status, tokens left, seconds, retry-after. */
function rated(rate: string, more = "") {
  const one = (rate: string) => `log: off\nroutes: [{ name: r, respond: { status: 204 }, rate: ${rate} }]\n${more}`;
  const tools = setUp("", { yaml: one(rate) });
  const ask = async (ask?: Ask) => {
    const { status, headers } = await tools.send(ask);
    const [, left, seconds] = /^"default";r=(\d+);t=(\d+)$/.exec(headers.get("ratelimit") ?? "") ?? [];
    const retry = headers.get("retry-after");
    assert.equal(headers.get("x-lb-failure"), status === 429 ? "rate" : null);
    return [status, Number(left), Number(seconds), ...(retry ? [Number(retry)] : [])];
  };
  /** How many of many requests pass. */
  const passes = async (many: number, how?: Ask) => {
    let passed = 0;
    for (let i = 0; i < many; i++) if ((await ask(how))[0] !== 429) passed++;
    return passed;
  };
  return { ...tools, ask, passes, reload: (rate: string) => tools.lb.reload(parseConfig(one(rate))) };
}

test("a client may ask as often as its rate says, then there is 429 and when to come back; tokens come one by one", async () => {
  const { ask, clock, send } = rated("{ requests: 3, per: 30s }");
  assert.deepEqual(await ask(), [204, 2, 10]);
  clock.now += 4_000;
  assert.deepEqual(await ask(), [204, 1, 6]);
  assert.deepEqual(await ask(), [204, 0, 6]);
  assert.deepEqual(await ask(), [429, 0, 6, 6]);
  clock.now += 5_900;
  assert.deepEqual(await ask(), [429, 0, 1, 1]);
  clock.now += 100;
  assert.deepEqual(await ask(), [204, 0, 10]);
  clock.now += 1e6;
  assert.deepEqual(await ask(), [204, 2, 10]);
  assert.equal((await send()).headers.get("ratelimit-policy"), '"default";q=3;w=30');
});

test("burst is how many may come at once, whatever the rate; a policy says its window where that is whole seconds", async () => {
  const { passes, clock, send } = rated("{ requests: 10, per: 500ms, burst: 25 }");
  assert.equal(await passes(100), 25);
  clock.now += 500;
  assert.equal(await passes(100), 10);
  clock.now += 125;
  assert.equal(await passes(100), 2);
  assert.equal((await send()).headers.get("ratelimit-policy"), '"default";q=10');
  const single = rated("{ requests: 100, burst: 1 }");
  assert.equal(await single.passes(5), 1);
  single.clock.now += 10;
  assert.equal(await single.passes(5), 1);
});

test("over any time no more than burst and rate pass, and no fewer, however the requests come", async () => {
  for (const [requests, per, burst] of [[7, 1_000, 3], [100, 1_000, 100], [3, 10, 9], [1, 60_000, 2]] as const) {
    const { ask, clock } = rated(`{ requests: ${requests}, per: ${per}ms, burst: ${burst} }`);
    const random = seeded(requests);
    const times: number[] = [];
    for (let i = 0; i < 600; i++) {
      clock.now += random() * 1.2 * per / requests;
      if ((await ask())[0] !== 429) times.push(clock.now);
    }
    for (let from = 0; from < times.length; from++) {
      for (let to = from; to < times.length; to++) {
        assert.ok(to - from + 1 <= burst + (times[to]! - times[from]!) * requests / per + 1e-6);
      }
    }
    assert.ok(times.length >= Math.min(600, Math.floor(clock.now * requests / per) - 1), `${times.length} passed`);
  }
});

test("each client has its own bucket: an IPv4 address, an IPv6 /64", async () => {
  const { passes } = rated("{ requests: 2, per: 1m }");
  assert.equal(await passes(3, { address: "192.0.2.1" }), 2);
  assert.equal(await passes(3, { address: "192.0.2.2" }), 2);
  assert.equal(await passes(3, { address: "2001:db8:1:2::1" }), 2);
  assert.equal(await passes(3, { address: "2001:db8:1:2:ffff::7" }), 0, "the same network");
  assert.equal(await passes(3, { address: "2001:db8:1:3::1" }), 2);
  assert.equal(await passes(3, { address: "unknown" }), 2);
});

test("by a header: each value has its bucket; who sends none is counted by address, and no value is an address", async () => {
  const { passes } = rated("{ requests: 2, per: 1m, by: { header: X-Key } }");
  const as = (key: string, address = "192.0.2.1"): Ask => ({ headers: { "x-key": key }, address });
  assert.equal(await passes(3, as("one")), 2);
  assert.equal(await passes(3, as("one", "192.0.2.2")), 0, "wherever it comes from");
  assert.equal(await passes(3, as("two")), 2);
  assert.equal(await passes(3, as("192.0.2.9")), 2);
  assert.equal(await passes(3, { address: "192.0.2.9" }), 2);
  assert.equal(await passes(3, { address: "192.0.2.9" }), 0);
  for (const long of ["x".repeat(30_000) + "a", "x".repeat(30_000) + "b", "y".repeat(30_000) + "a"]) {
    assert.equal(await passes(3, as(long)), 2);
  }
  const { buckets } = rated("{ requests: 2, by: { header: X-Key } }").lb.balancer.table;
  assert.equal(buckets.size, 1);
});

test("behind a trusted proxy the client is who asks through it", async () => {
  const { passes } = rated("{ requests: 1, per: 1m }", "trust: [192.0.2.9]");
  const through = (client: string): Ask => ({ headers: { "x-forwarded-for": client } });
  assert.equal(await passes(2, through("198.51.100.1")), 1);
  assert.equal(await passes(2, through("198.51.100.2")), 1);
});

test("a rule remembers at most 100,000 clients: those not heard of for longest are forgotten, full buckets for good", async () => {
  const { lb, ask, clock } = rated("{ requests: 2, per: 10s }");
  const [buckets] = lb.balancer.table.buckets.values();
  const kept = () => buckets!.recent.size + buckets!.older.size;
  await ask({ address: "192.0.2.1" });
  for (const generation of ["a", "b"]) { // a request fills no bucket of its own here: that would take its time
    for (let i = 0; i < 49_998; i++) buckets!.recent.set(`${generation}${i}`, clock.now + 5_000);
    for (let i = 0; i < 3; i++) await ask({ address: `198.51.100.${generation.charCodeAt(0) + i}` });
    assert.ok(kept() <= 100_000 && kept() >= 50_000, `${kept()} are kept`);
  }
  assert.deepEqual(await ask({ address: "198.51.100.100" }), [204, 0, 5], "the latest are known");
  assert.deepEqual(await ask({ address: "198.51.100.100" }), [429, 0, 5, 5]);
  assert.deepEqual(await ask({ address: "192.0.2.1" }), [204, 1, 5], "the first is not");
  for (let turn = 0; turn < 2; turn++) {
    clock.now += 10_000;
    await ask();
  }
  assert.equal(kept(), 2, "whoever stayed away for 10 s has a full bucket, and need not be kept");
});

test("a bucket survives the turn of its generation", async () => {
  const { ask, clock } = rated("{ requests: 2, per: 10s }");
  assert.equal((await ask())[0], 204);
  for (let i = 0; i < 40; i++) { // a token every 5 s
    assert.equal((await ask())[0], i % 2 ? 429 : 204, `at ${clock.now}`);
    clock.now += 2_500;
    await ask({ address: "192.0.2.77" });
  }
});

test("a reload keeps the buckets of a rule that stays the same, and begins anew with another", async () => {
  const { passes, reload } = rated("{ requests: 2, per: 1m }");
  assert.equal(await passes(3), 2);
  reload("{ requests: 2, per: 60s, by: ip }");
  assert.equal(await passes(3), 0, "the same in other words");
  reload("{ requests: 3, per: 1m }");
  assert.equal(await passes(5), 3);
  reload("off");
  assert.equal(await passes(5), 5);
});

test("answers of servers say what is left too, beside what the servers say; a refused request reaches none", async () => {
  const yaml =
    "log: json\ndefault: { servers: [a:1], health: off, rate: { requests: 1 }, response: { headers: { set: { x: y } } } }";
  const { send, asked, lines } = setUp("", { yaml });
  const sent = send();
  await asked[0]!.finish();
  const { headers } = await sent;
  assert.equal(headers.get("ratelimit"), '"default";r=0;t=1');
  assert.equal(headers.get("x"), "y");
  assert.deepEqual(await outcome(send()), [429, "rate", "1"]);
  assert.equal(asked.length, 1);
  assert.equal(logged(lines[1]!).failure, "rate");
});

test("a route without a rate says nothing of it, and those with one do not share it", async () => {
  const rate = "rate: { requests: 1, per: 1m }";
  const yaml =
    `log: off\nroutes: [{ path: /a, respond: {}, ${rate} }, { path: /b, respond: {}, ${rate} }, { path: /c, respond: {} }]`;
  const { send } = setUp("", { yaml });
  const ask = async (path: string) => (await send({ path })).status;
  assert.deepEqual([await ask("/a"), await ask("/a"), await ask("/b"), await ask("/b")], [200, 429, 200, 429]);
  for (let i = 0; i < 3; i++) {
    const { status, headers } = await send({ path: "/c" });
    assert.deepEqual([status, headers.get("ratelimit"), headers.get("ratelimit-policy")], [200, null, null]);
  }
});

// ─── Hedges ───

/** A balancer that has learned from 200 answers after 10 ms that 10 ms are usual. */
async function hedging(keys = "", patience = 10) {
  const tools = setUp(`hedge: p95, ${keys}`, { servers: "[a:1, b:1, c:1]" });
  const { clock, asked, send, service, lines } = tools;
  for (let i = 0; i < 200; i++) {
    const sent = send();
    clock.now += 10;
    await asked.at(-1)!.finish();
    await sent;
    clock.sleepers.clear();
  }
  asked.length = lines.length = 0;
  assert.equal(service.hedgeDelay, patience);
  return tools;
}
const names = (asked: Asked[]) => asked.map(({ server }) => server).join("");

test("a request that takes longer than usual is tried at another server too; the first good answer wins", async () => {
  for (const slow of [true, false]) {
    const { send, asked, clock, service, lines } = await hedging();
    const sent = send();
    await clock.advance(8);
    assert.equal(asked.length, 1);
    await clock.advance(4);
    assert.equal(asked.length, 2, "now there are two");
    assert.notEqual(asked[0]!.server, asked[1]!.server);
    assert.deepEqual(service.servers.map(({ inFlight }) => inFlight).sort(), [0, 1, 1]);
    assert.equal(service.retrying, 1);
    const [winner, loser] = slow ? [asked[1]!, asked[0]!] : [asked[0]!, asked[1]!];
    const end = await winner.begin();
    assert.equal((await sent).status, 200);
    assert.deepEqual([service.retrying, lines.length], [0, 0], "the body has not ended");
    const taken = clock.now - loser.at;
    await clock.advance(taken - 0.1);
    assert.equal(loser.attempt.signal.aborted, false, "it may take as long again");
    await clock.advance(0.2);
    assert.deepEqual([winner.attempt.signal.aborted, loser.attempt.signal.aborted], [false, true]);
    await clock.advance(60);
    assert.deepEqual(service.servers.map(({ inFlight }) => inFlight).sort(), [0, 0, 1]);
    await end();
    const { server, attempts, status, failure, bytes } = logged(lines[0]!);
    assert.deepEqual([server![0], attempts, status, failure, bytes], [winner.server, 2, 200, undefined, 0]);
    assert.equal(lines.length, 1);
    assert.deepEqual([service.hedges, service.hedgesWon], [1, Number(slow)]);
    assert.deepEqual([asked.length, service.retries], [2, 0]);
  }
});

test("where both answer in the same moment the first counts, and what is left of the other is given up", async () => {
  for (const whole of [true, false]) {
    const { send, asked, clock, lines, service } = await hedging();
    const sent = send();
    await clock.advance(20);
    const [first, second] = asked as [Asked, Asked];
    void first.finish();
    void (whole ? second.finish() : second.begin());
    assert.equal((await sent).status, 200);
    await settled();
    assert.equal(service.servers.find(({ name }) => name[0] === second.server)!.inFlight, 0);
    assert.equal(lines.length, 1);
    assert.equal(logged(lines[0]!).server![0], first.server);
    await clock.advance(100);
  }
});

test("a bad answer does not win while the other attempt may still be better; where both are bad the last one counts", async () => {
  for (const [end, status] of [[200, 200], [404, 404], [503, 503], [500, 500]] as const) {
    for (const bad of [503, 500, "reset"] as const) {
      const { send, asked, clock, lines } = await hedging("retries: 0, eject: off");
      const sent = send();
      await clock.advance(20);
      const [first, second] = asked as [Asked, Asked];
      if (bad === "reset") await second.fail(bad);
      else await second.finish(bad);
      await clock.advance(1_000);
      assert.equal(lines.length, 0, "still open");
      await first.finish(end);
      assert.equal((await sent).status, status);
      assert.equal(logged(lines[0]!).server![0], first.server);
    }
  }
});

test("where both attempts fail, the retry goes to a third server", async () => {
  const { send, asked, clock, lines } = await hedging("retries: 1, eject: off");
  const sent = send();
  await clock.advance(20);
  await asked[0]!.finish(503);
  await asked[1]!.fail("reset");
  assert.deepEqual([...names(asked)].sort().join(""), "abc");
  await asked[2]!.finish();
  assert.equal((await sent).status, 200);
  assert.equal(logged(lines[0]!).attempts, 3);
});

test("only safe requests without a body are tried twice, and only where another server is healthy and has room", async () => {
  const rows: [what: string, ask: Ask, change: (tools: Awaited<ReturnType<typeof hedging>>) => void, keys?: string][] =
    [
      ["POST", { method: "POST" }, () => {}],
      ["PUT", { method: "PUT" }, () => {}],
      ["DELETE", { method: "DELETE" }, () => {}],
      ["OPTIONS with a body", { method: "OPTIONS", body: "abc", headers: { "content-length": "3" } }, () => {}],
      ["others are down", {}, ({ service }) => {
        for (const server of service.servers) server.up = false;
        service.candidatesUntil = 0;
      }],
      ["others are full", {}, ({ service }) => {
        for (const server of service.servers.slice(1)) server.limit = 0;
      }, "strategy: first, max_in_flight: 5"],
      ["sticky", {}, () => {}, "sticky: { secret: abcdefghijklmnopqrstuvwxyz0123456789 }"],
    ];
  for (const [what, ask, change, keys] of rows) {
    const tools = await hedging(keys, what === "sticky" ? 0 : 10);
    change(tools);
    const sent = tools.send(ask);
    await tools.clock.advance(500);
    assert.equal(tools.asked.length, 1, what);
    await tools.asked[0]!.finish();
    assert.equal((await sent).status, 200);
  }
  for (const method of ["GET", "HEAD", "OPTIONS"]) {
    const { send, clock, asked } = await hedging();
    const sent = send({ method });
    await clock.advance(20);
    assert.equal(asked.length, 2, method);
    await asked[0]!.finish();
    assert.equal((await sent).status, 200);
    await clock.advance(100);
  }
});

test("a service that has answered less than 100 times, or has no hedge, sets no timer and tries nobody twice", async () => {
  for (const keys of ["hedge: p50", "hedge: off"]) {
    const { send, clock, asked } = setUp(keys, { servers: "[a:1, b:1]" });
    for (let i = 0; i < 99; i++) {
      const sent = send();
      assert.equal(clock.sleepers.size, 0);
      clock.now += 10;
      await asked.at(-1)!.finish();
      await sent;
    }
    const sent = send();
    await clock.advance(1_000);
    assert.equal(asked.length, 100);
    await asked.at(-1)!.finish();
    await sent;
  }
});

test("second attempts and retries share one budget: a service that stalls gets at most 20 % more", async () => {
  for (const [requests, most] of [[5, 3], [100, 20]] as const) {
    const { send, asked, clock, service } = await hedging("retry_budget: 20%");
    service.saved = 0;
    const sent = Array.from({ length: requests }, () => send());
    await clock.advance(1_000);
    assert.equal(asked.length, requests + most);
    assert.equal(service.retrying, most);
    for (const one of asked) await one.finish();
    for (const one of sent) assert.equal((await one).status, 200);
    await clock.advance(100);
    assert.equal(service.hedges, most);
  }
});

test("a request earns its share of a retry once, though a short answer is tried again", async () => {
  for (const hedge of ["p95", "off"]) {
    const { send, asked, clock, service } = await hedging(`retry_on: [500], retries: 1, retry_budget: 20%`);
    if (hedge === "off") service.hedge = 0;
    service.saved = 50;
    const sent = send();
    await clock.advance(1);
    await asked[0]!.finish(500);
    await clock.advance(1);
    assert.equal(asked.length, 2);
    await asked[1]!.finish();
    assert.equal((await sent).status, 200);
    assert.equal(service.saved, 50 + 0.2 - 1, hedge);
  }
});

test("the attempt that is given up counts neither as a failure nor as an answer; its server was at least so slow", async () => {
  const { send, asked, clock, service, reports } = await hedging("eject: { failures: 1 }");
  const sent = send();
  await clock.advance(30);
  const [loser, winner] = asked as [Asked, Asked];
  const server = service.servers.find(({ name }) => name[0] === loser.server)!;
  const other = service.servers.find(({ name }) => name[0] === winner.server)!;
  const { answers, failures, latency } = server;
  await winner.finish();
  await sent;
  await clock.advance(29);
  assert.equal(server.latency, latency, "it may still answer");
  await clock.advance(100);
  assert.deepEqual([server.answers, server.failures, server.ejectedUntil, server.waiting], [answers, failures, 0, 0]);
  assert.ok(server.latency > latency, `${server.latency} ms in the mean`);
  assert.ok(server.recent >= 60 && other.recent < 30, `${server.recent} ms and ${other.recent} ms`);
  assert.deepEqual(reports, []);
  const known = { typical: 500, recent: 500, latency: 500 };
  for (const one of service.servers) Object.assign(one, known);
  const next = send();
  await clock.advance(30);
  await asked[3]!.finish();
  await next;
  await clock.advance(100);
  const { typical } = service.servers.find(({ name }) => name[0] === asked[2]!.server)!;
  assert.equal(typical, 500, "60 ms and more is nothing new of a server that takes 500 ms");
});

test("a server that hangs is ejected as slow, although each of its attempts is given up, and fails its trials", async () => {
  const { send, asked, clock, service, reports } = await hedging("eject: { for: 5s }, retry_budget: 100%");
  const [hung] = service.servers;
  const pass = async (requests: number) => {
    for (let i = 0; i < requests; i++) {
      const sent = send(), from = asked.length;
      for (let ms = 0; ms < 100 && service.inFlight > 0; ms += 10) {
        await clock.advance(10);
        for (const one of asked.slice(from - 1)) if (one.server !== hung!.name[0]) void one.finish();
        await settled();
      }
      assert.equal((await sent).status, 200);
      await clock.advance(90);
    }
  };
  await pass(120);
  assert.ok(hung!.ejectedUntil > 0, `${hung!.typical} ms are typical of it`);
  assert.match(reports[0]!, /a:1 is ejected/);
  await pass(120);
  assert.match(reports.slice(1).join("\n"), /because it still takes more than \d+ ms/);
});

test("what is usual is learned from the answers that clients get: one that comes too late does not count", async () => {
  const { send, asked, clock, service } = await hedging();
  const { measured } = service;
  const sent = send();
  await clock.advance(20);
  await asked[1]!.finish();
  await sent;
  await clock.advance(20);
  await asked[0]!.finish(); // before it was given up
  await clock.advance(100);
  assert.equal(service.measured, measured + 1);
});

test("a client that leaves during two attempts ends both", async () => {
  const { send, asked, clock, lines, service } = await hedging();
  const leaving = new AbortController();
  const sent = send({ signal: leaving.signal });
  await clock.advance(20);
  leaving.abort();
  for (const one of asked) await one.fail("client-left");
  assert.equal((await sent).status, 499);
  assert.deepEqual([logged(lines[0]!).failure, lines.length, service.retrying], ["client-left", 1, 0]);
});

test("a strategy that throws for a second attempt costs its request, and leaves nothing in flight", async () => {
  const { send, asked, clock, service } = await hedging();
  const sent = send();
  await settled();
  service.strategy = () => {
    throw new Error("no such luck");
  };
  await clock.advance(20);
  assert.equal((await sent).status, 500);
  await clock.advance(100);
  assert.equal(asked.length, 1);
});

/** A time as servers take it: most near the median, some far above it. */
function lognormal(random: () => number, median: number, spread: number): () => number {
  return () => median * Math.exp(spread * Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random()));
}

test("what is usual is the wanted quantile of the answers, and follows them when they change", async () => {
  for (const [hedge, z] of [["p50", 0], ["p90", 1.2816], ["p95", 1.6449], ["p99", 2.3263]] as const) {
    const { clock, send, asked, service } = setUp(`hedge: ${hedge}`);
    for (const median of [20, 200, 5]) {
      const draw = lognormal(seeded(5), median, 0.5);
      const seen: number[] = [];
      for (let i = 0; i < 1_500; i++) {
        const sent = send({ method: "POST" }); // is measured too
        clock.now += draw();
        await asked.pop()!.finish();
        await sent;
        if (i >= 500) seen.push(service.hedgeDelay);
      }
      const mean = seen.reduce((sum, value) => sum + value, 0) / seen.length, right = median * Math.exp(0.5 * z);
      assert.ok(mean > 0.8 * right && mean < 1.25 * right, `${hedge}: ${mean}, not about ${right} ms`);
    }
  }
});

/** Many requests over a while, at servers that take what `time` says; gives how long each took, and all that was asked. */
async function load(
  tools: ReturnType<typeof setUp>,
  requests: number,
  every: number,
  time: (server: string) => number,
) {
  const { clock, send, asked } = tools;
  const times: number[] = [];
  let seen = 0;
  const serve = () => {
    for (; seen < asked.length; seen++) {
      const one = asked[seen]!;
      void clock.sleep(time(one.server)).then(() => one.finish());
    }
  };
  for (let i = 0; i < requests || tools.lb.balancer.inFlight > 0; i++) {
    if (i < requests) {
      const began = clock.now;
      void send().then(() => times.push(clock.now - began));
    }
    for (let step = 0; step < 2; step++) {
      serve();
      await clock.advance(every / 2);
    }
  }
  await clock.advance(5_000);
  return times.sort((a, b) => a - b);
}

test("where one server of eleven hangs, p99 stays small with a hedge, for no more than the budget", async () => {
  const servers = "[a:1, b:1, c:1, d:1, e:1, f:1, g:1, h:1, i:1, j:1, k:1]";
  const run = async (hedge: string) => {
    const random = seeded(11);
    const tools = setUp(`hedge: ${hedge}, strategy: random, eject: off`, { servers });
    await load(tools, 200, 2, () => 5 + 5 * random());
    const began = tools.asked.length;
    const times = await load(tools, 1_000, 2, (server) => server === "a" ? 2_000 : 5 + 5 * random());
    return { worst: times.at(-1)!, p99: times[990]!, load: (tools.asked.length - began) / 1_000 };
  };
  const [off, on] = [await run("off"), await run("p95")];
  assert.ok(off.p99 >= 2_000 && off.load === 1);
  assert.ok(on.p99 < 40 && on.worst < 1_000, JSON.stringify(on));
  assert.ok(on.load <= 1.2, `${on.load} times the load`);
});

test("any mix of hedges, failures and departures settles every attempt exactly once", async () => {
  const random = seeded(9), below = (n: number) => Math.floor(random() * n);
  const { send, asked, clock, service } = await hedging(
    "max_in_flight: 4, queue: { timeout: 300ms }, retries: 2, retry_budget: 100%, eject: { failures: 3, for: 1s }",
  );
  const sent: Promise<Response>[] = [], open: Asked[] = [], leaving: AbortController[] = [];
  let seen = 0;
  const end = async (one: Asked) => {
    const what = below(5);
    if (what === 0) await one.fail("reset");
    else if (what === 1) await one.finish(503);
    else if (what === 2) await (await one.begin())();
    else await one.finish();
  };
  const step = async () => {
    open.push(...asked.slice(seen));
    seen = asked.length;
    if (below(2) && open.length) await end(open.splice(below(open.length), 1)[0]!);
    else await clock.advance(below(12));
  };
  for (let i = 0; i < 8_000; i++) {
    if (below(4) === 0) {
      leaving.push(new AbortController());
      sent.push(send({ signal: leaving.at(-1)!.signal }));
    }
    if (below(40) === 0) leaving[below(leaving.length)]?.abort();
    await step();
  }
  while (open.length || seen < asked.length || service.inFlight) await step();
  await clock.advance(1_000);
  for (const one of sent) await (await one).body?.cancel();
  assert.ok(service.hedges > 50 && service.hedgesWon > 10, `${service.hedges} hedges, ${service.hedgesWon} won`);
  for (const server of service.servers) assert.equal(server.counters.requests, server.picks, server.name);
});

// ─── Through the program ───

/** The program over one scripted server that holds every answer until it is told to give it. */
async function running(config: (server: ScriptedServer) => Record<string, unknown>) {
  const held: { visit: Visit; request: Message; give(body?: string): Promise<void> }[] = [];
  const server = await scriptedServer((visit, request) =>
    void held.push({ visit, request, give: (body = "whole") => visit.send(answer(body)) })
  );
  const program = await startProgram({ admin: { listen: "127.0.0.1:0" }, ...config(server) });
  /** Resolves as soon as so many requests wait for the server. */
  const queued = async (count: number) => {
    const metric = new RegExp(`^lb_service_queue_length\\{.*\\} ${count}$`, "m");
    for (const end = Date.now() + patience(5_000);;) {
      const metrics = await (await fetch(`http://127.0.0.1:${program.admin}/metrics`)).text();
      if (metric.test(metrics)) return;
      assert.ok(Date.now() < end, `never do ${count} requests wait`);
      await sleep(10);
    }
  };
  const ask = (path: string, headers = "") =>
    rawRequest(program.port, `GET ${path} HTTP/1.1\r\nHost: a.test\r\n${headers}Connection: close\r\n\r\n`);
  const stop = async () => {
    await program.stop();
    await server.close();
  };
  return { program, server, held, ask, queued, stop, paths: () => held.map(({ request }) => target(request)) };
}

test("through the program: waiting in order, a client that leaves the queue, a full queue, and time that runs out", async () => {
  const timeout = `${Math.round(patience(700))}ms`; // in which those in front of the last one get their turn
  const { program, held, ask, queued, stop, paths } = await running(({ address }) => ({
    log: "json",
    default: { servers: [address], health: "off", max_in_flight: 1, queue: { size: 3, timeout } },
  }));
  try {
    const first = ask("/first");
    await until("the first is asked", () => held.length === 1);
    const leaving = rawRequest(program.port, [
      "GET /leaves HTTP/1.1\r\nHost: a.test\r\n\r\n",
      () => queued(1),
      (socket) => void socket.resetAndDestroy(),
    ]);
    await leaving;
    const left = await until("it is logged", () => /^.*\/leaves.*$/m.exec(program.output())?.[0]);
    assert.deepEqual([logged(left).status, logged(left).failure], [499, "client-left"]);
    const waiting: ReturnType<typeof ask>[] = [];
    for (const path of ["/second", "/third", "/fourth"]) {
      waiting.push(ask(path));
      await queued(waiting.length);
    }
    const { answers: [full] } = await ask("/fifth");
    assert.deepEqual([status(full!), value(full!, "x-lb-failure"), value(full!, "retry-after")], [
      503,
      "queue-full",
      "1",
    ]);
    await held[0]!.give();
    await until("the next is asked", () => held.length === 2);
    await held[1]!.give();
    await until("the next is asked", () => held.length === 3);
    const { answers: [late] } = await waiting[2]!;
    assert.deepEqual([status(late!), value(late!, "x-lb-failure")], [503, "queue-timeout"]);
    await held[2]!.give();
    for (const one of [first, ...waiting.slice(0, 2)]) assert.equal(status((await one).answers[0]!), 200);
    assert.deepEqual(paths(), ["/first", "/second", "/third"]);
  } finally {
    await stop();
  }
});

test("through the program: a drain lets those who wait finish, and ends", async () => {
  const { program, held, ask, queued, stop } = await running(({ address }) => ({
    log: "off",
    default: { servers: [address], health: "off", max_in_flight: 1, queue: { timeout: "1m" } },
  }));
  try {
    const sent = [ask("/first"), ask("/second")];
    await until("the first is asked", () => held.length === 1);
    await queued(1);
    const stopped = program.stop();
    await until("it drains", () => program.output().includes("draining; requests in flight: 2"));
    await held[0]!.give();
    await until("the second is asked", () => held.length === 2);
    await held[1]!.give();
    for (const one of sent) assert.equal(status((await one).answers[0]!), 200);
    await stopped;
    assert.match(program.output(), / info: drained$/m);
  } finally {
    await stop();
  }
});

test("through the program: a rate holds, and good answers say what is left", async () => {
  const { held, ask, stop } = await running(({ address }) => ({
    log: "off",
    default: {
      servers: [address],
      health: "off",
      rate: { requests: 2, per: "1h", by: { header: "x-key" } },
    },
  }));
  try {
    const first = ask("/", "X-Key: one\r\n");
    await until("it is asked", () => held.length === 1);
    await held[0]!.give();
    const { answers: [good] } = await first;
    assert.deepEqual([status(good!), value(good!, "ratelimit")], [200, '"default";r=1;t=1800']);
    assert.equal(value(good!, "ratelimit-policy"), '"default";q=2;w=3600');
    const second = ask("/", "X-Key: one\r\n");
    await until("it is asked", () => held.length === 2);
    await held[1]!.give();
    await second;
    const { answers: [refused] } = await ask("/", "X-Key: one\r\n");
    assert.deepEqual([status(refused!), value(refused!, "x-lb-failure")], [429, "rate"]);
    assert.match(value(refused!, "retry-after"), /^(1800|1799|1798)$/);
    assert.equal(held.length, 2);
    const other = ask("/", "X-Key: two\r\n");
    await until("it is asked", () => held.length === 3);
    await held[2]!.give();
    assert.equal(status((await other).answers[0]!), 200);
  } finally {
    await stop();
  }
});

test("through the program: a request that a server keeps waiting is answered by another one, and given up at the first", async () => {
  const quick = await scriptedServer((visit) => visit.send(answer("quick")));
  const held: Visit[] = [];
  const moody = await scriptedServer((visit, request) =>
    target(request) === "/slow" ? void held.push(visit) : visit.send(answer("moody"))
  );
  const program = await startProgram({
    log: "json",
    default: { servers: [moody.address, quick.address], strategy: "first", health: "off", hedge: "p90" },
  });
  try {
    const ask = (path: string) => rawRequest(program.port, get(path));
    for (let i = 0; i < 12; i++) await Promise.all(Array.from({ length: 10 }, () => ask("/")));
    const { answers: [answered] } = await ask("/slow");
    assert.deepEqual([status(answered!), answered!.body.toString()], [200, "quick"]);
    await until("the first attempt is given up", () => held.length === 1 && held[0]!.over);
    const line = await until("it is logged", () => /^.*"\/slow".*$/m.exec(program.output())?.[0]);
    const { attempts, server, failure } = logged(line);
    assert.deepEqual([attempts, server, failure], [2, quick.address, undefined]);
  } finally {
    await program.stop();
    await Promise.all([quick.close(), moody.close()]);
  }
});

test("through the program: so many requests in flight of one client, so many of all", async () => {
  const { held, ask, stop } = await running(({ address }) => ({
    log: "off",
    trust: ["127.0.0.1"],
    limits: { per_client: 2, requests: 3 },
    default: { servers: [address], health: "off" },
  }));
  const by = (client: string) => ask("/", `X-Forwarded-For: ${client}\r\n`);
  const refusal = async (client: string) => {
    const { answers: [one] } = await by(client);
    return [status(one!), value(one!, "x-lb-failure"), value(one!, "retry-after")];
  };
  try {
    const sent = [by("192.0.2.1"), by("192.0.2.1")];
    await until("two are asked", () => held.length === 2);
    assert.deepEqual(await refusal("192.0.2.1"), [429, "client-busy", "1"]);
    sent.push(by("2001:db8::1"));
    await until("three are asked", () => held.length === 3);
    assert.deepEqual(await refusal("192.0.2.3"), [503, "busy", "1"]);
    await held[0]!.give();
    await sent[0];
    sent.push(by("2001:db8::2"));
    await until("a fourth is asked", () => held.length === 4);
    await held[2]!.give();
    await sent[2];
    sent.push(by("2001:db8::3"));
    await until("a fifth is asked", () => held.length === 5);
    for (const one of held) await one.give();
    for (const one of sent) assert.equal(status((await one).answers[0]!), 200);
  } finally {
    await stop();
  }
});

patientTest(
  "through the program: so many connections, and no longer than so for the head of a request, or idle",
  { timeout: 30_000 },
  async () => {
    const mayAnswer = Promise.withResolvers<void>();
    const server = await scriptedServer((visit) => mayAnswer.promise.then(() => visit.send(answer("here"))));
    const header = `${Math.round(patience(500))}ms`; // in which others are refused
    const limits = { connections: 2, header, keep_alive: "500ms" }, service = { servers: [server.address] };
    const lb = await startProgram({ log: "off", limits, default: service });
    const patient = { quiet: patience(6_000), atMost: patience(8_000) };
    /** Asks on a connection until lb.ts closes it. Returns how many milliseconds that took. */
    const kept = async () => {
      const askedAt = performance.now();
      const { answers, closed } = await rawRequest(lb.port, "GET / HTTP/1.1\r\nHost: a.test\r\n\r\n", patient);
      assert.deepEqual([status(answers[0]!), value(answers[0]!, "connection"), closed], [200, "", true]);
      return performance.now() - askedAt;
    };
    try {
      const slow = rawRequest(lb.port, "GET / HTTP/1.1\r\nHost: a.test\r\n", patient); // and never the end of it
      const first = kept();
      await until("the second is asked", () => server.requests.length === 1);
      for (const upgrade of ["", "Upgrade: websocket\r\nConnection: Upgrade\r\n"]) {
        const { answers: [refused] } = await rawRequest(lb.port, get("/", upgrade));
        assert.deepEqual([status(refused!), value(refused!, "x-lb-failure")], [503, "busy"]);
      }
      assert.equal(server.requests.length, 1, "nothing else was asked");
      mayAnswer.resolve();
      const late = await slow;
      assert.deepEqual([status(late.answers[0]!), value(late.answers[0]!, "x-lb-failure")], [408, "client-timeout"]);
      await first;
      for (let tries = 0; status((await rawRequest(lb.port, get("/"))).answers[0]!) !== 200; tries++) {
        assert.ok(tries < 100, "others are served in their place");
        await sleep(20);
      }
      await lb.reload({ log: "off", limits: { keep_alive: "2s" }, default: service });
      const longer = await kept(); // the listener is the same
      assert.ok(longer > 1_950, `kept for ${longer} ms`);
    } finally {
      mayAnswer.resolve();
      await lb.stop();
      await server.close();
    }
  },
);

patientTest(
  "a client that takes nothing of a response is cut off after keep_alive where no server limits it",
  async () => {
    let left = false;
    const server = new HttpServer({
      handle(request) {
        request.onGone = () => left = true;
        const body = new TestBody(Array.from({ length: 500 }, () => Buffer.alloc(60_000, "x")), -1);
        request.respond({ status: 200, reason: "", fields: [], body });
      },
      limits: () => ({ header: 60_000, keep_alive: 1_000, header_size: 65_536, header_fields: 1_000 }),
      draining: () => false,
      now: () => performance.now(),
    });
    const listener = createServer((one) => server.accept(one, "http"));
    await listenLocally(listener);
    const socket = connect((listener.address() as AddressInfo).port, "127.0.0.1");
    socket.on("error", () => {});
    try {
      socket.pause();
      socket.write(get("/"));
      await until("it is cut off", () => left && server.connections.size === 0, 15_000);
    } finally {
      socket.destroy();
      listener.close();
    }
  },
);

for (const length of [100, 100_000, -1]) {
  const what = length < 0 ? "a chunked body" : `a body of ${length} bytes`;
  patientTest(
    `through the program: ${what} that comes byte by byte has to be whole within timeouts.request`,
    async () => {
      const server = await scriptedServer((visit) => void visit); // waits for the end
      const timeouts = { idle: "20s", request: "700ms" };
      const lb = await startProgram({
        ...{ log: "off", default: { service: "s" } },
        services: { s: { servers: [server.address], timeouts, health: "off", retries: 0 } },
      });
      const socket = connect(lb.port, "127.0.0.1");
      socket.on("error", () => {});
      let drip: ReturnType<typeof setInterval> | undefined;
      try {
        const framing = length < 0 ? "Transfer-Encoding: chunked" : `Content-Length: ${length}`;
        socket.write(`POST / HTTP/1.1\r\nHost: a.test\r\n${framing}\r\n\r\n`);
        drip = setInterval(() => socket.write(length < 0 ? "1\r\nx\r\n" : "x"), 50);
        let text = "";
        socket.on("data", (bytes) => text += bytes);
        await until("it is refused", () => text.includes("\r\n\r\n"));
        assert.match(text, /^HTTP\/1\.1 408 /);
        assert.match(text, /^x-lb-failure: client-timeout\r$/mi);
        assert.match(lb.output(), /^(?!.* warn: )/s, "it is not the server's fault");
      } finally {
        clearInterval(drip);
        socket.destroy();
        await lb.stop();
        await server.close();
      }
    },
  );
}

patientTest(
  "through the program: a server that takes no more of a body until timeouts.request is over is the late one",
  async () => {
    const held: Socket[] = [];
    const server = createServer((socket) => void held.push(socket.on("error", () => {}).pause()));
    await listenLocally(server);
    const address = `127.0.0.1:${(server.address() as AddressInfo).port}`, timeouts = { idle: "20s", request: "700ms" };
    const lb = await startProgram({
      ...{ log: "off", default: { service: "s" } },
      services: { s: { servers: [address], timeouts, health: "off", retries: 0 } },
    });
    try {
      const answer = await fetch(`http://127.0.0.1:${lb.port}/`, { method: "POST", body: new Uint8Array(32 << 20) });
      assert.deepEqual([answer.status, answer.headers.get("x-lb-failure")], [504, "timeout"]);
      await answer.text();
      await until("it is told of the server", () => lb.output().includes(`warn: s: ${address}: silent for`));
    } finally {
      await lb.stop();
      held.forEach((socket) => socket.destroy());
      server.close();
    }
  },
);

patientTest(
  "through the program: one client has only so many connections, over TCP and over HTTP",
  async () => {
    const echo = createServer((socket) => socket.on("error", () => {}).pipe(socket));
    await listenLocally(echo);
    const servers = [`127.0.0.1:${(echo.address() as AddressInfo).port}`], listen = await freePort();
    const limits = { client_connections: 2 }, respond = { body: "here" };
    const lb = await startProgram({
      limits,
      admin: { listen: 0 },
      routes: [{ path: "/", respond }],
      tcp: [{ listen: `127.0.0.1:${listen}`, servers, health: "off" }],
    });
    const sockets: Socket[] = [];
    /** What is echoed on a connection, or that it has been closed. */
    const said = (host: string) =>
      new Promise<string>((resolve) => {
        const socket = connect({ port: listen, host: "127.0.0.1", localAddress: host });
        sockets.push(socket);
        socket.on("error", () => {}).on("close", () => resolve("closed")).on("data", (bytes) => resolve(`${bytes}`));
        socket.write("hello");
      });
    try {
      assert.deepEqual([await said("127.0.0.1"), await said("127.0.0.1"), await said("127.0.0.1")], [
        ...["hello", "hello", "closed"],
      ]);
      assert.equal(await said("127.0.0.2"), "hello", "somebody else");
      const { answers: [refused] } = await rawRequest(lb.port, get("/"));
      assert.deepEqual([status(refused!), value(refused!, "x-lb-failure")], [429, "client-busy"]);
      const metrics = await (await fetch(`http://127.0.0.1:${lb.admin}/metrics`)).text();
      assert.match(metrics, /^lb_failures_total\{reason="client-busy"\} [2-9]/m, "both are counted");
      sockets[0]!.destroy();
      for (let tries = 0; await said("127.0.0.1") === "closed"; tries++) {
        assert.ok(tries < 100, "one less is open");
        await sleep(20);
      }
      assert.match(lb.output(), /"TCP tcp:.* 429 .* client-busy /);
    } finally {
      for (const socket of sockets) socket.destroy();
      await lb.stop();
      echo.close();
    }
  },
);
