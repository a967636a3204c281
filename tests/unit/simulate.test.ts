// What docs/strategies.md claims of the strategies and of ejection, on the simulator's clock and with its seeds: no sockets, no waiting.

// In a process of its own: where Node's test runner watches every promise, the simulator takes ten times as long.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import process from "node:process";
import { createInterface } from "node:readline";
import { after } from "node:test";
import { fileURLToPath } from "node:url";
import { runtime, test } from "../rig/rig.ts";
import { type Figures, type Order, strategyNames } from "../load/simulate.ts";

const SCRIPT = fileURLToPath(new URL("../load/simulate.ts", import.meta.url));
const ARGS = [...runtime() === "deno" ? ["run", "-A", "--no-check"] : [], SCRIPT, "--lines"];
const simulator = spawn(process.execPath, ARGS, { stdio: ["pipe", "pipe", "inherit"] });
const lines = createInterface({ input: simulator.stdout })[Symbol.asyncIterator]();
after(() => simulator.stdin.end());

/** The figures of every order, in their order. */
async function simulated(orders: Order[]): Promise<Figures[]> {
  simulator.stdin.write(orders.map((order) => JSON.stringify(order) + "\n").join(""));
  const figures: Figures[] = [];
  while (figures.length < orders.length) {
    const { value, done } = await lines.next();
    assert.ok(!done, "the simulator has ended");
    figures.push(JSON.parse(value) as Figures);
  }
  return figures;
}
/** Checks the figures of every order. */
async function each(orders: Order[], check: (one: Figures, order: Order, text: string) => void): Promise<void> {
  const figures = await simulated(orders);
  orders.forEach((order, i) => {
    check(figures[i]!, order, JSON.stringify({ ...order, ...figures[i]!, shares: undefined }));
  });
}
/** Eleven servers as in the benchmark, half as long. */
const SHORT = { seconds: 18 };

test("peak-ewma hides a server that is slow, slower, failing, half failing or flapping, whatever chance does", async () => {
  const most = {
    "slow": { success: 0.9995, p99: 12, p999: 40 },
    "slower": { success: 1, p99: 25, p999: 45 },
    "failing": { success: 0.9995, p99: 12, p999: 25 },
    "failing half": { success: 0.999, p99: 12, p999: 25 },
    "flapping": { success: 0.9995, p99: 12, p999: 25 },
  };
  const orders = Object.keys(most).flatMap((scenario) =>
    [1, 2].map((seed) => ({ scenario, strategy: "peak-ewma", change: SHORT, seed }))
  );
  await each(orders, (one, { scenario }, text) => {
    const { success, p99, p999 } = most[scenario as keyof typeof most];
    assert.ok(one.success >= success && one.p99 <= p99 && one.p999 <= p999, text);
    assert.ok(one.attempts / one.requests < 1.02, text);
  });
});

test("a slow server is ejected also where the strategy does not look at latency", async () => {
  const orders = ["round-robin", "random", "ip-hash"].flatMap((strategy) =>
    ["eject: {slow: off}", ""].map((keys) => ({ scenario: "slow", strategy, change: SHORT, keys }))
  );
  await each(orders, (one, { keys }, text) => {
    assert.ok(keys ? one.success < 0.975 : one.success > 0.985 && one.ejections >= 1, text);
  });
});

test("among equals ejection by comparison does no harm, however busy they are: what is slow there is only busier", async () => {
  const orders = ["round-robin", "random", "ip-hash", "peak-ewma"].flatMap((strategy) =>
    [0.65, 0.9].flatMap((load) =>
      [3, 10].map((servers) => (
        { scenario: "equal", strategy, change: { servers, rate: 200 * servers * load, seconds: 10 } }
      ))
    )
  );
  await each(orders, (one, _order, text) => assert.ok(one.success > 0.999, text));
});

test("equal servers get equal shares: exactly, or as chance has it", async () => {
  const off: Record<string, number> = { "round-robin": 0.001, "random": 0.05, "two-choices": 0.05, "peak-ewma": 0.05 };
  const orders = Object.keys(off).map((strategy) => ({ scenario: "equal", strategy, change: { seconds: 10 } }));
  await each(orders, ({ shares }, { strategy }, text) => {
    for (const share of shares) assert.ok(Math.abs(share * 10 - 1) <= off[strategy]!, `${text} ${shares}`);
  });
});

test("least-response-time runs no server into the ground: as quick as the least busy one at two thirds load", async () => {
  const orders = ["least-connections", "least-response-time"].map((strategy) => (
    { scenario: "equal", strategy, change: { seconds: 10 } }
  ));
  const [busy, timed] = await simulated(orders);
  assert.ok(timed!.success === 1 && timed!.p99 < 1.1 * busy!.p99, JSON.stringify(timed));
});

test("a thousand servers: nobody is left out by who draws or rotates", async () => {
  const orders = ["round-robin", "two-choices", "peak-ewma"].map((strategy) => (
    { scenario: "thousand", strategy, change: { seconds: 0.3 } }
  ));
  await each(orders, ({ success, shares }, _order, text) => {
    assert.ok(success === 1 && Math.min(...shares) > 0 && Math.max(...shares) < 0.003, text);
  });
});

test("ten balancers over one pool: drawing two avoids the herd that goes to the first of the least busy", async () => {
  const orders = ["least-connections", "two-choices", "peak-ewma"].map((strategy) => (
    { scenario: "ten balancers", strategy, change: { seconds: 10 } }
  ));
  const [herd, ...others] = await simulated(orders);
  for (const one of others) assert.ok(one.p50 < 0.6 * herd!.p50 && one.p99 < herd!.p99);
});

test("max_in_flight: auto keeps answers quick where more comes than can be borne, and loses hardly any capacity", async () => {
  const [none, auto, calm] = await simulated([
    { scenario: "overload", strategy: "peak-ewma", change: { seconds: 10 } },
    { scenario: "auto limits", strategy: "peak-ewma", change: { seconds: 10 } },
    { scenario: "equal", strategy: "peak-ewma", change: { seconds: 10 }, keys: "max_in_flight: auto" },
  ]);
  assert.ok(none!.success < 0.5);
  assert.ok(auto!.success > 0.74 && auto!.p99 < 300, `${auto!.success} ${auto!.p99}`);
  assert.ok(calm!.success === 1 && calm!.p99 < 60, `${calm!.success} ${calm!.p99}`);
});

test("where every server fails at once, 1,000 requests a second become 1,200 and no more", async () => {
  await each([{ scenario: "all failing", strategy: "round-robin" }], ({ requests, attempts }, _order, text) => {
    assert.ok(attempts <= 1.2 * requests + 3 && attempts > 1.19 * requests, text);
  });
});

test("slow_start leaves a cold server the time to become warm", async () => {
  const [without, slowly] = await simulated(
    ["restart", "slow start"].map((scenario) => ({ scenario, strategy: "round-robin" })),
  );
  assert.ok(without!.success === 1 && slowly!.success === 1);
  assert.ok(slowly!.p999 <= without!.p999, `${slowly!.p999} ${without!.p999}`);
});

test("every strategy of docs/strategies.md can be simulated, and the same seed gives the same figures", async () => {
  const orders = strategyNames.map((strategy) => ({
    scenario: "failing half",
    strategy,
    change: { seconds: 3 },
    seed: 5,
  }));
  assert.deepEqual(await simulated(orders), await simulated(orders));
});
