// Everything at once for a while: see chaos.ts.

import { chaos, judge } from "./chaos.ts";
import { test } from "../rig/rig.ts";

for (const workers of [1, 2]) {
  test(`under load servers are killed, paused, slowed and cut off, and no client is told a lie, workers: ${workers}`, async () => {
    judge(await chaos({ seconds: 4, seed: 20_261_121 + workers, workers, pause: 60 }));
  });
}
