// Where a service of the running program has nobody left, the other one is asked.

import assert from "node:assert/strict";
import { answer, get, rawRequest, scriptedServer, startProgram, status, test, until, value } from "../rig/rig.ts";

test("running: the other service answers while one is dead, without a single error", async (t) => {
  const [a, x] = await Promise.all(["a", "x"].map((name) => scriptedServer((visit) => visit.send(answer(name)))));
  for (const server of [a!, x!]) t.after(() => server.close());
  const health = { path: "/", interval: "100ms", fall: 1, rise: 1 };
  const lb = await startProgram({
    log: "json",
    services: {
      shop: { servers: [a!.address], fallback: "spare", health },
      spare: { servers: [x!.address], health: "off" },
    },
    default: { service: "shop" },
  });
  t.after(() => lb.stop());
  const ask = async () => {
    const { answers } = await rawRequest(lb.port, get("/"));
    assert.equal(status(answers[0]!), 200, value(answers[0]!, "x-lb-failure"));
    return answers[0]!.body.toString();
  };
  assert.equal(await ask(), "a");
  await a!.close();
  assert.equal(await ask(), "x", "its first failure is not the client's");
  await until("it is down", () => lb.output().includes("is down"));
  for (let i = 0; i < 4; i++) assert.equal(await ask(), "x");
  await until(
    "the log names who answered",
    () => /"lb.service":"spare","lb.server":"[^"]+","lb.attempts":1,/.test(lb.output()),
  );
});
