// Eleven servers, the first of which has a fault for a third of the time, and an open loop: it sends on schedule, whether
// or not responses come back, and counts from the scheduled moment. Both run in the benchmark's own process.
import { Agent, createServer, get } from "node:http";
import type { AddressInfo } from "node:net";
import { setTimeout as sleep } from "node:timers/promises";
import { SMALL_ANSWER } from "./contestants.ts";

const SERVERS = 11;
const RATE = 500; // requests per second
const IN_TIME = 1000; // milliseconds
const TIMEOUT = 10_000;

const FAULTS = {
  none: (usual: number) => ({ status: 200, wait: usual }),
  slow: () => ({ status: 200, wait: 2000 }),
  failing: () => ({ status: 503, wait: 0 }),
  half: (usual: number, count: number) => count % 2 ? { status: 503, wait: 0 } : { status: 200, wait: usual },
  slower: (usual: number) => ({ status: 200, wait: usual + 30 }),
};
export type Fault = keyof typeof FAULTS;
let fault: Fault = "none"; // now

/** Starts the servers and returns their host:port. */
export const startTailServers = () => Promise.all(Array.from({ length: SERVERS }, (_, index) => serve(index)));

/** The first server has the fault: strategies that break ties by order prefer it. */
function serve(index: number): Promise<string> {
  let count = 0;
  const server = createServer((_request, response) => {
    const usual = 5 + count++ * 7 % 6; // 5 to 10 ms, the same for every contestant
    const { status, wait } = FAULTS[index === 0 ? fault : "none"](usual, count);
    response.statusCode = status;
    if (wait === 0) response.end(SMALL_ANSWER);
    else setTimeout(() => response.end(SMALL_ANSWER), wait);
  });
  server.keepAliveTimeout = 0;
  return new Promise((resolve) => {
    server.listen(0, "127.0.0.1", 1024, () => resolve(`127.0.0.1:${(server.address() as AddressInfo).port}`));
  });
}

export async function openLoop(port: number, seconds: number, faultOfRun: Fault) {
  const agent = new Agent({ keepAlive: true });
  const begin = performance.now(), elapsed = () => performance.now() - begin;
  /** Resolves with the response's status, 0 where there is none. */
  const ask = () =>
    new Promise<number>((resolve) => {
      const request = get({ port, host: "127.0.0.1", agent, timeout: TIMEOUT }, (response) => {
        response.resume().on("close", () => resolve(response.complete ? response.statusCode ?? 0 : 0));
      });
      request.on("error", () => resolve(0)).on("timeout", () => request.destroy());
    });
  const send = async (due: number) => ({ status: await ask(), took: elapsed() - due });
  const total = RATE * seconds;
  const sent: ReturnType<typeof send>[] = [];
  while (sent.length < total) {
    const now = elapsed() / 1000;
    fault = now > seconds / 3 && now < seconds * 2 / 3 ? faultOfRun : "none";
    while (sent.length < Math.min(total, now * RATE)) sent.push(send(sent.length * 1000 / RATE));
    await sleep(1);
  }
  const responses = await Promise.all(sent), took = elapsed() / 1000;
  agent.destroy();
  const times = responses.map(({ took }) => took).sort((a, b) => a - b);
  const quantile = (q: number) => times[Math.floor(q * total)]!;
  return {
    requests: total,
    seconds: took,
    errors: responses.filter(({ status }) => status !== 200).length,
    success: responses.filter(({ status, took }) => status === 200 && took <= IN_TIME).length / total,
    ...{ p50: quantile(0.5), p99: quantile(0.99), p999: quantile(0.999) },
  };
}
