// A process of its own for the case "tail": eleven servers, the first of which misbehaves for a third of the time, and
// an open loop, which sends on schedule whether or not answers come back and counts from the scheduled moment.
// Prints the servers' ports; then, for each line {"port", "seconds", "fault"} it reads, one line of figures.
import { Agent, createServer, get } from "node:http";
import type { AddressInfo } from "node:net";
import { createInterface } from "node:readline";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";

const SERVERS = 11;
const RATE = 500;
const IN_TIME = 1000;
const PATIENCE = 10_000;

/** The first server is the one that fails: strategies that break ties by order like it best. */
const faults = {
  none: (usual: number) => ({ status: 200, wait: usual }),
  slow: () => ({ status: 200, wait: 2000 }),
  failing: () => ({ status: 503, wait: 0 }),
  "failing half": (usual: number, asked: number) => asked % 2 ? { status: 503, wait: 0 } : { status: 200, wait: usual },
  "30 ms slower": (usual: number) => ({ status: 200, wait: usual + 30 }),
};
type Fault = keyof typeof faults;
let fault: Fault = "none";

function serve(index: number): Promise<number> {
  let asked = 0;
  const server = createServer((_req, res) => {
    const usual = 5 + asked++ * 7 % 6; // 5 to 10 ms, the same for every contestant
    const { status, wait } = faults[index === 0 ? fault : "none"](usual, asked);
    res.statusCode = status;
    if (wait === 0) res.end("twenty bytes of text");
    else setTimeout(() => res.end("twenty bytes of text"), wait);
  });
  server.keepAliveTimeout = 0;
  return new Promise((resolve) => {
    server.listen(0, "127.0.0.1", 1024, () => resolve((server.address() as AddressInfo).port));
  });
}

async function openLoop(port: number, seconds: number, faultOfRun: Fault) {
  const agent = new Agent({ keepAlive: true });
  const total = RATE * seconds;
  const times: number[] = [];
  let sent = 0, good = 0, failed = 0;
  const begin = performance.now();
  const send = (due: number) =>
    new Promise<void>((resolve) => {
      let settled = false; // a broken answer is reported by both the request and the answer
      const settle = (status: number) => {
        if (settled) return;
        settled = true;
        const took = performance.now() - begin - due;
        times.push(took);
        if (status !== 200) failed++;
        else if (took <= IN_TIME) good++;
        resolve();
      };
      const request = get({ port, host: "127.0.0.1", agent, timeout: PATIENCE }, (answer) => {
        answer.resume().on("close", () => settle(answer.complete ? answer.statusCode ?? 0 : 0));
      });
      request.on("error", () => settle(0)).on("timeout", () => request.destroy());
    });
  const answers: Promise<void>[] = [];
  while (sent < total) {
    const now = performance.now() - begin;
    fault = now > seconds * 1000 / 3 && now < seconds * 2000 / 3 ? faultOfRun : "none";
    for (; sent < total && sent * 1000 / RATE <= now; sent++) answers.push(send(sent * 1000 / RATE));
    await sleep(1);
  }
  await Promise.all(answers);
  agent.destroy();
  times.sort((a, b) => a - b);
  const quantile = (q: number) => times[Math.min(times.length - 1, Math.floor(q * times.length))] ?? 0;
  const took = (performance.now() - begin) / 1000;
  const shares = { p50: quantile(0.5), p99: quantile(0.99), p999: quantile(0.999), success: good / total };
  return { requests: total, seconds: took, errors: failed, ...shares };
}

const ports = [];
for (let index = 0; index < SERVERS; index++) ports.push(await serve(index));
console.log(JSON.stringify(ports));
for await (const line of createInterface({ input: process.stdin })) {
  const { port, seconds, fault } = JSON.parse(line) as { port: number; seconds: number; fault: Fault };
  console.log(JSON.stringify(await openLoop(port, seconds, fault)));
}
process.exit(); // the servers would keep it alive
