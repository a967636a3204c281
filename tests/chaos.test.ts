// Everything at once for a while: see chaos.ts.

import test from "node:test";
import { chaos, judge } from "./chaos.ts";

for (const workers of [1, 2]) {
  test(`under load servers are killed, paused, slowed and cut off, and no client is told a lie, workers: ${workers}`, {
    timeout: 120_000,
  }, async () => {
    judge(await chaos({ seconds: 10, seed: 20_261_121 + workers, workers }));
  });
}
