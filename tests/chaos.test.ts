// Everything at once for a while: see chaos.ts.

import test from "node:test";
import { chaos, judge } from "./chaos.ts";

test(
  "servers are killed, paused, slowed and cut off and the config is reloaded under load, and no client is told a lie",
  {
    timeout: 120_000,
  },
  async () => {
    judge(await chaos({ seconds: 15, seed: 20_261_121 }));
  },
);
