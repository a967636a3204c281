// Copies of requests for another service: which are made, what is in them, and that nothing of it comes back.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { type ConfigError, type FetchAttempt, parseConfig, WireError } from "../../lb.ts";
import { answerTo, type Ask, balancerFor } from "../rig/balancer.ts";
import { seeded, test } from "../rig/rig.ts";
import type { Fields } from "../rig/types.ts";

const turns = async () => {
  for (let i = 0; i < 30; i++) await undefined;
};

/** A balancer with a service `shop` whose requests are copied to `next`; `behave` says what becomes of a copy. */
function setUp(
  keys = "",
  behave: (attempt: FetchAttempt) => Promise<Response> = (attempt) => answerTo(attempt),
  more = "",
) {
  const yaml = `log: json
defaults: { health: off, eject: { failures: 1, at_most: 100% } }
services: { shop: { servers: [a:1], sticky: {} }, next: { servers: [x:1]${more} } }
default: { service: shop, mirror: { service: next, percent: 100 }${keys} }`;
  const copies: [string, FetchAttempt][] = [], order: string[] = [];
  const { lb, lines, send, service } = balancerFor(yaml, {
    random: seeded(1),
    sleep: () => new Promise(() => {}),
    fetch: (url, attempt) => {
      order.push(attempt.server.name[0]!);
      if (attempt.server.name === "x:1") {
        copies.push([url, attempt]);
        return behave(attempt);
      }
      original.attempt = attempt;
      return answerTo(attempt);
    },
  });
  const original: { attempt?: FetchAttempt } = {};
  const ask = async (init: Ask = {}, path = "/p?q") => {
    const { status } = await send(`http://h${path}`, init);
    await turns();
    return status;
  };
  return { lb, ask, copies, original, next: service("next"), lines, order };
}
/** Headers, in traceparent without the span: each attempt has one of its own. */
const unspanned = (headers: Fields) => headers.map((one) => one.replace(/^(00-[0-9a-f]{32})-.*/, "$1"));
const withBody = { method: "POST", headers: { "content-length": "3" }, body: "abc" };

test("a copy is the same request: method, target, headers, body and id, and goes out behind it", async () => {
  const { ask, copies, original, order } = setUp(
    ", request: { headers: { set: { x-by: lb } } }, rewrite: { path: /v2 }",
  );
  assert.equal(await ask({ ...withBody, headers: { ...withBody.headers, cookie: "a=1; lb=x", "x-own": "1" } }), 200);
  const [url, copy] = copies[0]!;
  assert.equal(url, "http://x:1/v2/p?q");
  assert.deepEqual([copy.method, Buffer.from(copy.body as Uint8Array).toString()], ["POST", "abc"]);
  assert.deepEqual(unspanned(copy.headers), unspanned(original.attempt!.headers));
  assert.ok(copy.headers.includes("x-own") && copy.headers.includes("a=1") && copy.headers.includes("x-by"));
  assert.deepEqual(order, ["a", "x"]);
});

test("what is copied is counted apart: not in the log, nor among the service's requests, nor for its health", async () => {
  const { ask, next, lines, lb } = setUp("", () => Promise.reject(new WireError("connect", false, "refused")));
  for (let i = 0; i < 5; i++) assert.equal(await ask(), 200);
  assert.equal(lines.length, 5);
  assert.deepEqual(lines.map((line) => JSON.parse(line)["lb.service"]), Array(5).fill("shop"));
  assert.deepEqual(next.copies, { answered: 0, failed: 5, skipped: 0, inFlight: 0 });
  const [server] = next.servers;
  assert.deepEqual([server!.inFlight, server!.failures, server!.ejectedUntil, next.tallies.size], [0, 0, 0, 0]);
  assert.equal(lb.balancer.inFlight, 0);
});

test("a copy tries no server out that has been ejected: the next request does", async () => {
  const { ask, next, lb } = setUp("", () => new Promise(() => {}));
  Object.assign(next.servers[0]!, { ejectedUntil: -1, slow: true });
  await ask();
  assert.deepEqual([next.copies.inFlight, next.servers[0]!.trialInFlight, next.servers[0]!.ejectedUntil], [
    1,
    false,
    -1,
  ]);
  assert.equal(lb.balancer.inFlight, 0);
});

test("the client has its answer long before the copy has one, and at most a hundred wait for one", async () => {
  const hanging: FetchAttempt[] = [];
  const { ask, next } = setUp("", (attempt) => {
    hanging.push(attempt);
    return new Promise(() => {});
  });
  for (let i = 0; i < 103; i++) assert.equal(await ask(), 200);
  assert.deepEqual(next.copies, { answered: 0, failed: 0, skipped: 3, inFlight: 100 });
});

test("a copy outlives its client", async () => {
  const { lb, copies } = setUp("", () => new Promise(() => {}));
  const leave = new AbortController();
  await lb.fetch(new Request("http://h/", { headers: { host: "h" }, signal: leave.signal }));
  await turns();
  leave.abort();
  assert.equal(copies[0]![1].signal.aborted, false);
});

test("a copy's answer is read to its end, and one that is cut off harms nobody", async () => {
  for (const cut of [false, true]) {
    let pieces = 0;
    const { ask, next } = setUp("", (attempt) =>
      Promise.resolve(
        new Response(
          new ReadableStream({
            pull(sink) {
              if (++pieces < 4) return sink.enqueue(new Uint8Array(9));
              attempt.ended(200, 27, cut ? "reset" : undefined);
              if (cut) sink.error(new WireError("reset", true, "cut"));
              else sink.close();
            },
          }),
        ),
      ));
    assert.equal(await ask(), 200);
    for (let i = 0; i < 20; i++) await turns();
    assert.deepEqual(next.copies, { answered: cut ? 0 : 1, failed: cut ? 1 : 0, skipped: 0, inFlight: 0 });
    assert.equal(next.servers[0]!.inFlight, 0);
  }
});

test("no copy is made of a body that is a stream, nor where no server has room, nor of what is refused", async () => {
  const { ask, next, copies } = setUp("", undefined, ", max_in_flight: 1");
  const long = "x".repeat(70_000);
  assert.equal(await ask({ method: "POST", headers: { "content-length": "70000" }, body: long }), 200);
  assert.deepEqual(next.copies, { answered: 0, failed: 0, skipped: 1, inFlight: 0 });
  next.servers[0]!.inFlight = 1;
  assert.equal(await ask(), 200);
  next.servers[0]!.inFlight = 0;
  assert.deepEqual(next.copies, { answered: 0, failed: 0, skipped: 2, inFlight: 0 });
  const denied = setUp(", deny: [192.0.2.9]");
  assert.equal(await denied.ask(), 403);
  assert.deepEqual([copies.length, denied.copies.length], [0, 0]);
});

test("a strategy that throws for a copy costs the copy", async () => {
  const { ask, next } = setUp();
  next.strategy = () => {
    throw new Error("no");
  };
  assert.equal(await ask(), 200);
  assert.equal(next.copies.inFlight, 0);
});

test("so many percent of the requests are copied", async () => {
  const { ask, copies, lb } = setUp();
  lb.balancer.table.fallback!.mirror!.weight = 0.1;
  for (let i = 0; i < 2_000; i++) await ask();
  assert.ok(copies.length > 150 && copies.length < 250, `${copies.length}`);
});

test("routes.yml: mirror names a service and a share", () => {
  const mistakes = (mirror: string) => {
    try {
      const { routes } = parseConfig(`services: { a: { servers: [a:1] } }\ndefault: { service: a, mirror: ${mirror} }`);
      return JSON.stringify(routes[0]!.mirror);
    } catch (error) {
      return (error as ConfigError).mistakes.map(({ path, message }) => `${path}: ${message}`).join("; ");
    }
  };
  assert.equal(mistakes("{ service: a }"), '{"service":"a","percent":100}');
  assert.equal(mistakes("{ service: a, percent: 0.5 }"), '{"service":"a","percent":0.5}');
  assert.equal(mistakes("{ service: b }"), 'default.mirror.service: "b" is not a service (a); did you mean "a"?');
  assert.equal(mistakes("{ service: a, percent: 101 }"), "default.mirror.percent: 101 is not a number from 0 to 100");
  assert.equal(mistakes("{ percent: 1 }"), "default.mirror: service is missing");
});
