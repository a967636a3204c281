// Copies of requests for another service, made by the running program.

import assert from "node:assert/strict";
import { answer, get, rawRequest, scriptedServer, startProgram, status, test, until, value } from "../rig/rig.ts";
import type { Fields } from "../rig/types.ts";

/** Headers, in traceparent without the span: each attempt has one of its own. */
const unspanned = (headers: Fields) => headers.map((one) => one.replace(/^(00-[0-9a-f]{32})-.*/, "$1"));

test("running: a service gets copies, and the client notices nothing of it, whatever becomes of them", async (t) => {
  const shop = await scriptedServer((visit) => visit.send(answer("shop")));
  const next = await scriptedServer((visit) => visit.send(answer("next", "Set-Cookie: next=1\r\n", "500 Broken")));
  for (const server of [shop, next]) t.after(() => server.close());
  const lb = await startProgram({
    log: "json",
    services: {
      shop: { servers: [shop.address], health: "off" },
      next: { servers: [next.address], health: "off" },
    },
    default: { service: "shop", mirror: { service: "next", percent: 100 } },
  });
  t.after(() => lb.stop());
  const ask = async (request: string) => {
    const { answers } = await rawRequest(lb.port, request);
    assert.deepEqual([status(answers[0]!), answers[0]!.body.toString()], [200, "shop"]);
    assert.equal(value(answers[0]!, "set-cookie"), "");
  };
  await ask(get("/p?q", "X-Own: 1\r\n"));
  await ask("POST /p HTTP/1.1\r\nHost: a.test\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc");
  await until("both copies are there", () => next.requests.length === 2);
  for (const [i, copy] of next.requests.entries()) {
    assert.deepEqual([copy.start, copy.body.toString()], [shop.requests[i]!.start, shop.requests[i]!.body.toString()]);
    assert.deepEqual(unspanned(copy.headers.flat()), unspanned(shop.requests[i]!.headers.flat()));
  }
  assert.equal(next.visits.length, 1, "the answer is read: the connection serves the next one");
  next.script = () => {}; // never answers
  for (let i = 0; i < 5; i++) await ask(get("/"));
  await next.close();
  for (let i = 0; i < 5; i++) await ask(get("/"));
  assert.ok(!lb.output().includes('"lb.service":"next"'));
});
