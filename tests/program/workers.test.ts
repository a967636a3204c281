// Many cores: threads that share the port and a main thread that decides for them.

import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { Agent, request } from "node:http";
import { dirname, join } from "node:path";
import process from "node:process";
import { connect as connectTls } from "node:tls";
import { A, KEY, OTHER_KEY, RENEWED } from "../rig/certificates.ts";
import { echoStrictly, openWebSocket, TEXT, webSocketServer } from "../rig/websocket.ts";
import {
  answer,
  freePort,
  get,
  type Program,
  rawRequest,
  type Script,
  scriptedServer,
  sharedProgram,
  sleep,
  startProgram,
  status,
  test,
  until,
  value,
} from "../rig/rig.ts";

/** Tells who has forwarded the request: ids begin with the worker's name. */
const named: Script = (visit, request) => visit.send(answer(value(request, "x-request-id").split("-")[0]!));

const shared = sharedProgram(["--workers", "2", "--admin", "127.0.0.1:0"]);

/** The shared program with this config, as soon as all of its workers have it. */
async function begin(config: { routes?: unknown[] }): Promise<Program> {
  const mark = `${Math.random()}`, routes = [...config.routes ?? [], { path: "/mark", respond: { body: mark } }];
  const lb = await shared.begin({ log: "off", ...config, routes });
  for (let row = 0, asked = 0; row < 20; asked++) {
    row = (await ask(lb.port, "/mark")).body.toString() === mark ? row + 1 : 0;
    assert.ok(asked < 1_000, "all workers have the config");
  }
  return lb;
}

/** Two workers in front of one server, or of what `more` says, with an admin listener. Nothing may be left in flight. */
async function fleet(
  use: (
    lb: Program & { api(path: string, method?: string, body?: unknown): Promise<Response> },
    address: string,
  ) => Promise<void>,
  more: Record<string, unknown> = {},
  script = named,
) {
  const server = await scriptedServer(script);
  const service = { servers: [server.address], health: { interval: "100ms", fall: 1, rise: 1 }, ...more };
  const lb = await begin({ services: { shop: service }, default: { service: "shop" } } as object);
  const api = (path: string, method = "GET", body?: unknown) =>
    fetch(`http://127.0.0.1:${lb.admin}${path}`, {
      method,
      ...(body !== undefined && { body: JSON.stringify(body), headers: { "content-type": "application/json" } }),
    });
  try {
    await use({ ...lb, api }, server.address);
    const left = async () => (await (await api("/connections")).json()).in_flight;
    for (let tries = 0; await left() !== 0; tries++) {
      assert.ok(tries < 500, "requests are left in flight");
      await sleep(10);
    }
  } finally {
    await server.close();
  }
}

const ask = async (port: number, path = "/", headers = "") =>
  (await rawRequest(port, get(path, headers), { quiet: 30 })).answers[0]!;
/** Waits until twenty in a row get this status: what the main thread has found reaches a worker a moment later. */
async function all(port: number, wanted: number): Promise<void> {
  for (let row = 0, asked = 0; row < 20; asked++) {
    row = status(await ask(port)) === wanted ? row + 1 : 0;
    assert.ok(asked < 1_000, `all workers answer ${wanted}`);
  }
}
/** So many connections, one after the other: which worker each of them met. */
async function met(port: number, connections: number): Promise<string[]> {
  const names: string[] = [];
  for (let i = 0; i < connections; i++) names.push((await ask(port)).body.toString());
  return names;
}

test("connections are spread over the workers, and what they count adds up", () =>
  fleet(async ({ port, api }) => {
    const names = await met(port, 60);
    assert.equal(new Set(names).size, 2, "each of two workers had some of sixty");
    const counted = () => api("/metrics").then((answer) => answer.text());
    let metrics = "";
    for (let i = 0; i < 50 && !/lb_service_requests_total\{.*\} 60\n/.test(metrics); i++) {
      await new Promise((resolve) => setTimeout(resolve, 100));
      metrics = await counted();
    }
    assert.match(metrics, /lb_service_requests_total\{service="shop",code="200",method="GET",protocol="http"\} 60\n/);
    assert.match(metrics, /lb_service_server_up\{.*\} 1\n/);
    const { services, in_flight } = await (await api("/services")).json();
    assert.deepEqual([services[0].requests, services[0].servers[0].picks, in_flight], [60, 60, 0]);
  }));

test("what the API changes and what probes find holds for all workers", () =>
  fleet(async ({ port, api }, address) => {
    const drained = await api(`/services/shop/servers/${address}/state`, "PUT", { state: "maint" });
    assert.equal(drained.status, 200);
    for (let i = 0; i < 20; i++) assert.equal(status(await ask(port)), 503);
    await api(`/services/shop/servers/${address}/state`, "PUT", { state: "ready" });
    for (let i = 0; i < 20; i++) assert.equal(status(await ask(port)), 200);
  }, { panic: "0%" }));

test("a server that is down is down for all workers, and up again for all", () => {
  let healthy = true;
  const script: Script = (visit, request) =>
    request.start.includes("/healthz")
      ? visit.send(answer("", "", healthy ? "200 OK" : "500 No"))
      : named(visit, request, 0);
  return fleet(
    async ({ port, output }) => {
      healthy = false;
      await until("it is down", () => / is down/.test(output()));
      await all(port, 503);
      healthy = true;
      await until("it is up", () => / is up/.test(output()));
      await all(port, 200);
      assert.equal(output().match(/ is down/g)!.length, 1, "said once");
    },
    { panic: "0%", health: { path: "/healthz", interval: "100ms", fall: 1, rise: 1 } },
    script,
  );
});

test("a worker that ends is replaced, and the other serves on", () =>
  fleet(async ({ port, api, output }) => {
    const before = await (await api("/workers")).json() as { id: number }[];
    assert.deepEqual(before.map(({ id }) => id), [1, 2]);
    assert.equal((await api("/workers/9", "DELETE")).status, 404);
    assert.equal((await api("/workers/1", "DELETE")).status, 200);
    await until("it is said", () => /a worker has ended and is replaced/.test(output()));
    let lost = 0; // what the system had given to the one that has ended
    for (let served = 0; served < 20;) {
      const { answers } = await rawRequest(port, get("/"), { quiet: 30 });
      if (answers[0]) assert.equal(status(answers[0]), 200);
      if (answers[0]) served++;
      else assert.ok(++lost < 20, "the other one serves");
    }
    let after = before;
    for (let i = 0; i < 100 && !after.some(({ id }) => id === 3); i++) {
      await new Promise((resolve) => setTimeout(resolve, 50));
      after = await (await api("/workers")).json();
    }
    assert.deepEqual(after.map(({ id }) => id), [2, 3]);
    assert.equal(new Set(await met(port, 60)).size, 2);
  }));

test("how a server fails is seen as the worker sees it that has it worst", () =>
  fleet(
    async ({ port, api }) => {
      for (let i = 0; i < 20; i++) assert.equal(status(await ask(port)), 500);
      for (let tries = 0, failing = 0; failing !== 1; tries++) {
        const { services: [{ servers: [server] }] } = await (await api("/services")).json();
        failing = server.failing;
        assert.ok(tries < 100, "all of its answers fail");
        await sleep(50);
      }
    },
    { eject: { failures: 1000 }, health: "off", retries: 0 },
    (visit) => visit.send(answer("", "", "500 No")),
  ));

test("workers serve a file that is far larger once it is spelt out, and a reload of it", async () => {
  const service = { servers: ["127.0.0.1:1"], health: "off" };
  const services = Object.fromEntries(Array.from({ length: 2_000 }, (_, i) => [`s${i}`, service]));
  const config = (body: string) => ({ log: "off", services, default: { respond: { body } } });
  const lb = await startProgram(config("one"), ["--workers", "2"]);
  try {
    assert.equal((await ask(lb.port)).body.toString(), "one");
    await lb.reload(config("two"));
    let row = 0;
    for (let asked = 0; row < 20; asked++) {
      row = (await ask(lb.port)).body.toString() === "two" ? row + 1 : 0;
      assert.ok(asked < 1_000, "both have the other one");
    }
  } finally {
    await lb.stop();
  }
});

test("max is divided among the workers: a server never has more", async () => {
  let [now, most] = [0, 0];
  const waiting: (() => void)[] = [];
  const server = await scriptedServer((visit) => {
    most = Math.max(most, ++now);
    waiting.push(() => (now--, visit.send(answer("at last"))));
  });
  const service = { servers: [{ url: `http://${server.address}`, max: 6 }], health: "off", queue: "off", panic: "0%" };
  const lb = await begin({ services: { s: service }, default: { service: "s" } } as object);
  try {
    const sent = Array.from({ length: 40 }, () => ask(lb.port));
    let refused = 0;
    for (const one of sent) void one.then((answer) => status(answer) === 503 && refused++);
    await until("all but six are refused", () => refused === 34 && now === 6);
    assert.equal(most, 6);
    while (waiting.length) waiting.pop()!();
    const answers = await Promise.all(sent);
    assert.equal(answers.filter((one) => status(one) === 200).length, 6);
  } finally {
    await server.close();
  }
});

test("TLS, WebSockets, TCP and sticky clients are served by all workers alike", async () => {
  const servers = await Promise.all(["a", "b"].map((name) => scriptedServer((visit) => visit.send(answer(name)))));
  const sockets = await webSocketServer(echoStrictly);
  const [plain, secure, tcp] = [await freePort(), await freePort(), await freePort()];
  const addresses = servers.map(({ address }) => address);
  const lb = await startProgram(
    {
      ...{
        log: "off",
        listen: [`127.0.0.1:${plain}`, { address: `127.0.0.1:${secure}`, tls: { cert: "a.pem", key: "a.key" } }],
      },
      services: { shop: { servers: addresses, health: "off", sticky: { cookie: "lb" } } },
      routes: [{ path: "/ws", servers: [`127.0.0.1:${sockets.port}`] }],
      default: { service: "shop" },
      tcp: [{ listen: `127.0.0.1:${tcp}`, servers: addresses, health: "off" }],
    },
    ["--workers", "2"],
    { "a.pem": A, "a.key": KEY },
  );
  try {
    const first = await ask(plain), cookie = `Cookie: ${value(first, "set-cookie").split(";")[0]}\r\n`;
    const [home, seen] = [first.body.toString(), new Set<string>()];
    for (let i = 0; i < 20; i++) {
      assert.equal((await ask(plain, "/", cookie)).body.toString(), home, "whichever worker has the connection");
      seen.add((await ask(tcp)).body.toString());
      assert.equal(await overTls(secure, cookie), home);
      const socket = await openWebSocket(plain, "/ws");
      socket.send(TEXT, `hello ${i}`);
      assert.equal(`${(await socket.frame(0)).payload}`, `hello ${i}`);
      socket.close(1000);
      assert.deepEqual(await socket.closed(), [1000, ""]);
    }
    assert.deepEqual([...seen].sort(), ["a", "b"]);
  } finally {
    await lb.stop();
    await Promise.all([...servers, sockets].map((one) => one.close()));
  }
});

test("certificates that change on disk are shown by all workers, and no connection is lost meanwhile", async () => {
  const listen = { address: "127.0.0.1:0", tls: { cert: "a.pem", key: "a.key" } };
  const config = { log: "off", listen, default: { respond: { body: "here" } } };
  const lb = await startProgram(config, ["--workers", "2"], { "a.pem": A, "a.key": KEY });
  try {
    let answered = 0, over = false;
    const coming = Promise.all(Array.from({ length: 4 }, async () => {
      for (; !over; answered++, await sleep(10)) assert.equal(await overTls(lb.port, ""), "here");
    }));
    await until("some have come", () => answered > 20);
    writeFileSync(join(dirname(lb.file), "a.pem"), RENEWED);
    writeFileSync(join(dirname(lb.file), "a.key"), OTHER_KEY);
    await until("it is said", () => lb.output().includes("other certificates are in force"));
    for (let row = 0, asked = 0; row < 20; asked++) {
      row = await shownTo(lb.port) === "renewed" ? row + 1 : 0;
      assert.ok(asked < 1_000, "all workers show them");
    }
    over = true;
    await coming;
    assert.equal(lb.output().match(/other certificates are in force/g)!.length, 1, "said once");
  } finally {
    await lb.stop();
  }
});

/** Whom the certificate names that a client is shown. */
const shownTo = (port: number) =>
  new Promise<string>((resolve, reject) => {
    const socket = connectTls({ port, host: "127.0.0.1", servername: "a.test", rejectUnauthorized: false }, () => {
      resolve(String(socket.getPeerCertificate().subject.CN));
      socket.destroy();
    });
    socket.on("error", reject);
  });

/** What is answered over TLS. */
const overTls = (port: number, headers: string) =>
  new Promise<string>((resolve, reject) => {
    const socket = connectTls({ port, host: "127.0.0.1", rejectUnauthorized: false }, () => {
      socket.write(`GET / HTTP/1.1\r\nHost: a.test\r\n${headers}Connection: close\r\n\r\n`);
    });
    let text = "";
    socket.on("error", reject).on("data", (bytes) => text += bytes);
    socket.on("end", () => resolve(text.slice(text.indexOf("\r\n\r\n") + 4)));
  });

test("the port is nobody else's, though workers share it", async () => {
  const lb = await begin({});
  const taken = ["--listen", `127.0.0.1:${lb.port}`];
  for (const workers of ["2", "1"]) {
    const second = startProgram({ default: { respond: {} } }, [...taken, "--workers", workers]);
    await assert.rejects(second, /cannot listen on/, `workers: ${workers}`);
    const elsewhere = startProgram({ default: { respond: {} } }, ["--listen", "192.0.2.1:1", "--workers", workers]);
    await assert.rejects(elsewhere, /cannot listen on 192\.0\.2\.1:1: (?!.*already in use)/, "not ours");
  }
});

// ─── The end of a process under load ───

interface Tally {
  whole: number;
  failed: string[];
}

/** Asks without a pause, over connections that are kept or over a fresh one each time, until it is told to stop. */
function load(port: number, clients: number, keepAlive: boolean) {
  const tally: Tally = { whole: 0, failed: [] }, agent = new Agent({ keepAlive, maxSockets: clients });
  let running = true;
  const one = () =>
    new Promise<void>((resolve) => {
      const failed = (what: unknown) => (tally.failed.push(String(what)), resolve());
      const sent = request({ port, host: "127.0.0.1", agent, headers: { host: "a.test" } }, (answer) => {
        answer.resume();
        answer.on("error", failed);
        answer.on("end", () => answer.statusCode === 200 ? (tally.whole++, resolve()) : failed(answer.statusCode));
      });
      sent.on("error", failed).end();
    });
  const client = async () => {
    while (running) await one();
  };
  const all = Promise.all(Array.from({ length: clients }, client));
  const stop = async () => {
    running = false;
    await all;
    agent.destroy();
    return tally;
  };
  return { tally, stop };
}

/** Answers after a while, so that something is always in flight. */
const slow: Script = async (visit) => {
  await sleep(20 + Math.random() * 40);
  visit.send(answer("slow"));
};

for (const workers of ["1", "2"]) {
  test(`a process that takes the port over leaves no request unanswered, workers: ${workers}`, async () => {
    const server = await scriptedServer(slow);
    const admin = await freePort(), config = { log: "off", admin, default: { servers: [server.address] } };
    const args = ["--reuse-port", "--workers", workers, "--drain", "5s"];
    let lb = await startProgram(config, args);
    const at = ["--listen", `127.0.0.1:${lb.port}`];
    const loads = [load(lb.port, 8, true), load(lb.port, 4, false)];
    try {
      for (let i = 0; i < 2; i++) {
        const seen = loads.map(({ tally }) => tally.whole);
        await until("both have been served", () => loads.every(({ tally }, i) => tally.whole > seen[i]! + 50), 20_000);
        const next = await startProgram(config, [...args, ...at]);
        process.kill(lb.pid, "SIGTERM");
        await until("the first one has drained", () => /info: drained\n$/.test(lb.output()), 20_000);
        await lb.stop();
        lb = next;
        assert.equal((await fetch(`http://127.0.0.1:${admin}/health/ready`)).status, 200);
      }
      const [kept, fresh] = await Promise.all(loads.map((one) => one.stop()));
      assert.deepEqual(kept!.failed, []);
      // the system resets what the first process has not yet accepted (docs/behaviour.md)
      assert.ok(
        fresh!.failed.length <= fresh!.whole / 50,
        `${fresh!.failed.length} of ${fresh!.whole}: ${fresh!.failed}`,
      );
      assert.ok(fresh!.failed.every((error) => /ECONNRESET|socket hang up|closed/.test(error)), `${fresh!.failed}`);
    } finally {
      await lb.stop();
      await server.close();
    }
  });
}
