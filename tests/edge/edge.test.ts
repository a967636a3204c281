// The edge: what `wrangler deploy` would upload, run by the real workerd. Node only: miniflare and wrangler are Node
// programs, and what runs inside workerd is the same whoever has started it.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { randomBytes } from "node:crypto";
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import type { Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { after, before, test as nodeTest } from "node:test";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { brotliCompressSync, deflateSync, gunzipSync, gzipSync, zstdCompressSync } from "node:zlib";
import { createLoadBalancer, EtcdClient, parseConfig } from "../../lb.ts";
import { eventually, skip as noEtcd, startBackend, startEtcd, startInstance } from "../rig/engines.ts";
import { checkEngine } from "../rig/fleet.ts";
import { BINARY, handshake, openWebSocket, webSocketServer } from "../rig/websocket.ts";
import {
  answer,
  type Message,
  rawRequest,
  readGzip,
  runtime,
  type Script,
  type ScriptedServer,
  scriptedServer,
  sleep,
  status,
  target,
  until,
  value,
  values,
  type Visit,
} from "../rig/rig.ts";

const ROOT = fileURLToPath(new URL("../..", import.meta.url));
const require = createRequire(import.meta.url);
const skip = runtime() === "node" ? false : "miniflare and wrangler run on Node";

// ─── The rig ───

let folder = "";
let printed = ""; // by wrangler
before(async () => {
  if (skip) return;
  folder = mkdtempSync(join(tmpdir(), "lb-edge-"));
  const wrangler = join(require.resolve("wrangler/package.json"), "../bin/wrangler.js");
  const args = [wrangler, "deploy", "--dry-run", "--outdir", join(folder, "out")];
  const { PATH = "" } = process.env;
  const env = { PATH, HOME: folder, CI: "true", WRANGLER_SEND_METRICS: "false", WRANGLER_HIDE_BANNER: "true" };
  const { stdout, stderr } = await promisify(execFile)(process.execPath, args, { cwd: ROOT, env });
  printed = stdout + stderr;
  await Promise.all(runs.map((run) => run.begin()));
  await startWorkers(planned.splice(0));
});
after(async () => {
  if (skip) return;
  for (const run of runs) await run.end();
  for (const miniflare of running) await miniflare.dispose();
  rmSync(folder, { recursive: true, force: true });
});

/** What a test does when it has ended. */
interface Turn {
  after(end: () => unknown): void;
}
type TestCode = (t: Run) => unknown;

/**
 * A test up to its end. All of them begin before the first one: their workers start together, in one workerd. Behind
 * `edge` each goes on when it is its turn.
 */
class Run implements Turn {
  readonly turn = Promise.withResolvers<void>();
  private readonly asked = Promise.withResolvers<void>(); // for a worker
  private readonly ends: (() => unknown)[] = [];
  private over: Promise<unknown> = Promise.resolve();
  private readonly code: TestCode;
  constructor(code: TestCode) {
    this.code = code;
  }
  after(end: () => unknown): void {
    this.ends.push(end);
  }
  async begin(): Promise<void> {
    this.over = (async () => await this.code(this))();
    await Promise.race([this.asked.promise, this.over.catch(() => {})]); // the test itself fails with that
  }
  /** Its worker, once it is its turn. */
  async worker(config: object, env: Record<string, string>): Promise<Edge> {
    const made = Promise.withResolvers<Edge>(), isFirst = running.length === 0;
    const plan = { config, env, made };
    if (isFirst) planned.push(plan);
    else await startWorkers([plan]);
    this.asked.resolve();
    await this.turn.promise;
    return await made.promise;
  }
  async finish(): Promise<void> {
    this.turn.resolve();
    await this.over.finally(() => this.end());
  }
  async end(): Promise<void> {
    for (const end of this.ends.splice(0)) await end();
  }
}
const runs: Run[] = [];
function test(name: string, options: { skip: string | boolean }, code: TestCode): void {
  const run = new Run(code);
  if (!options.skip) runs.push(run);
  nodeTest(name, options, () => run.finish());
}

/** As much of miniflare as is used here. Its own types would have to be installed for Deno and Bun too. */
interface Miniflare {
  unsafeGetDirectURL(worker: string): Promise<URL>;
  getWorker(worker: string): Promise<{ scheduled(): Promise<{ outcome: string }> }>;
  dispose(): Promise<void>;
}
const running: Miniflare[] = [];

interface Edge {
  /** Sends bytes to workerd itself, without miniflare's own worker in front, and gives the answer as it was sent. */
  ask(path: string, options?: { method?: string; headers?: string; host?: string; body?: string }): Promise<Message>;
  port: number;
  logs: string[];
  byWorkerd: string[]; // what it says itself, of all workers
  cron(): Promise<void>;
}

/** A worker that is the bundle with another routes.yml (JSON is YAML), until the tests end. */
interface Plan {
  config: object;
  env: Record<string, string>;
  made: PromiseWithResolvers<Edge>;
}
const planned: Plan[] = [];
const edge = (run: Run, config: object, env: Record<string, string> = {}): Promise<Edge> => run.worker(config, env);

/** What the console of a worker says begins with its name, as all of them have one log. */
const namingConsole = (name: string) => `
  for (const level of ["debug", "log", "info", "warn", "error"]) {
    const say = console[level];
    console[level] = (...words) => say("${name}", ...words);
  }`;

let workers = 0; // that were started
async function startWorkers(plans: Plan[]): Promise<void> {
  const { Miniflare } = require("miniflare") as { Miniflare: new (options: object) => Miniflare };
  const { compatibility_date, compatibility_flags } = wranglerConfig();
  const bundle = readFileSync(join(folder, "out/lb.js"), "utf8"),
    logs: Record<string, string[]> = {},
    byWorkerd: string[] = [];
  const workerFor = ({ config, env }: Plan, name: string) => ({
    config: {
      name,
      compatibilityDate: compatibility_date,
      compatibilityFlags: compatibility_flags,
      manifest: {
        mainModule: "named.js",
        modules: {
          "named.js": {
            type: "esm",
            contents: 'import "./console.js"; export * from "./lb.js"; export { default } from "./lb.js";',
          },
          "console.js": { type: "esm", contents: namingConsole(name) },
          "lb.js": { type: "esm", contents: bundle },
          "routes.yml": { type: "text", contents: JSON.stringify({ log: "off", ...config }) },
        },
      },
      env: {
        ...Object.fromEntries(Object.entries(env).map(([name, value]) => [name, { type: "text", value }])),
        FLEET: { type: "durable-object", worker: name, exportName: "LbFleet" },
      },
      exports: { LbFleet: { type: "durable-object", storage: "sqlite" } },
    },
    dev: { unsafeDirectSockets: [{ host: "127.0.0.1", port: 0 }] },
  });
  const named = plans.map((plan) => ({ plan, name: `lb${++workers}` }));
  for (const { name } of named) logs[name] = [];
  const miniflare = new Miniflare({
    cf: false,
    enableDevRegistry: false,
    handleStructuredLogs({ message }: { message: string }) {
      const [name = ""] = message.split(" ", 1);
      if (logs[name]) logs[name].push(message.slice(name.length + 1));
      else byWorkerd.push(message);
    },
    workers: named.map(({ plan, name }) => workerFor(plan, name)),
  });
  running.push(miniflare);
  for (const { plan, name } of named) {
    const port = Number((await miniflare.unsafeGetDirectURL(name)).port);
    plan.made.resolve({
      port,
      logs: logs[name]!,
      byWorkerd,
      async ask(path, { method = "GET", headers = "", host = "a.test", body = "" } = {}) {
        const length = body ? `Content-Length: ${Buffer.byteLength(body, "latin1")}\r\n` : "";
        const head = `${method} ${path} HTTP/1.1\r\nHost: ${host}\r\n${headers}${length}Connection: close\r\n\r\n`;
        const { answers } = await rawRequest(port, head + body, { methods: [method] });
        assert.equal(answers.length, 1, `one answer to ${method} ${path}`);
        return answers[0]!;
      },
      async cron() {
        assert.equal((await (await miniflare.getWorker(name)).scheduled()).outcome, "ok");
      },
    });
  }
}

const wranglerConfig = (): { compatibility_date: string; compatibility_flags: string[] } =>
  JSON.parse(readFileSync(join(ROOT, "wrangler.jsonc"), "utf8").replace(/^\s*\/\/.*$/gm, ""));

/** A server that says its name, until the test ends. */
async function server(t: Turn, script: Script | string = "ok"): Promise<ScriptedServer> {
  const made = await scriptedServer(typeof script === "string" ? (visit) => visit.send(answer(script)) : script);
  t.after(() => made.close());
  return made;
}

/** An address at which nobody listens. */
async function nobody(): Promise<string> {
  const { address, close } = await scriptedServer(() => {});
  await close();
  return address;
}

const body = (message: Message) => message.body.toString("latin1");
const failure = (message: Message) => `${status(message)} ${value(message, "x-lb-failure")}`;
const over = (...servers: { address: string }[]) => servers.map(({ address }) => address);
const head = (lines: string, line = "200 OK") => `HTTP/1.1 ${line}\r\n${lines}\r\n`;

// ─── The bundle ───

test("wrangler bundles lb.ts with routes.yml and nothing else, within what the free plan takes", { skip }, () => {
  const files = readdirSync(join(folder, "out")).filter((name) => !/\.map$|^README/.test(name));
  assert.deepEqual(files.sort(), ["lb.js", "routes.yml"]);
  const size = Number(/gzip: ([\d.]+) KiB/.exec(printed)?.[1]);
  assert.ok(size > 0 && size < 3 * 1024, printed);
});

test(
  "a file that is wrong costs the start nothing: each request fails, and the log has every mistake",
  { skip },
  async (t) => {
    const lb = await edge(t, { hosts: [{ host: "a.test", servres: 1 }], listne: 1 });
    const answered = await lb.ask("/");
    assert.equal(status(answered), 500);
    assert.doesNotMatch(body(answered), /servres/);
    await until("the log has both", () => ["servres", "listne"].every((key) => lb.byWorkerd.join("\n").includes(key)));
  },
);

test(
  "a dns: server is one server, reached by its name; srv: and Unix sockets are left out, and said",
  { skip },
  async (t) => {
    const a = await server(t, "a"), name = a.address.replace("127.0.0.1", "localhost");
    const servers = [{ dns: name }, { srv: "_http._tcp.a.test" }, "unix:/run/app.sock"];
    const lb = await edge(t, { resolvers: ["10.0.0.2"], default: { servers } });
    for (const path of ["/", "/", "/"]) assert.equal(body(await lb.ask(path)), "a");
    await until("it is said", () => /left out/.test(lb.logs.join("\n")));
    assert.deepEqual(lb.logs.filter((line) => /left out/.test(line)), [
      "info: left out of routes.yml, as the platform does it: srv: servers, servers at Unix sockets, resolvers",
    ]);
  },
);

test("what the platform does is left out of the file with one line in the log", { skip }, async (t) => {
  const a = await server(t, "a");
  const limits = { requests: 100, connections: 5, header_size: "8KiB" };
  const lb = await edge(t, { listen: ["127.0.0.1:1", "[::1]:1"], limits, default: { servers: over(a) } });
  for (const path of ["/", "/", "/"]) assert.equal(body(await lb.ask(path)), "a");
  await sleep(50);
  assert.deepEqual(lb.logs.filter((line) => /left out/.test(line)), [
    "info: left out of routes.yml, as the platform does it: listen, limits.connections, limits.header_size",
  ]);
});

test("a file that names nothing of the platform's is used without a word", { skip }, async (t) => {
  const a = await server(t, "a");
  const lb = await edge(t, { default: { servers: over(a) } });
  assert.equal(body(await lb.ask("/")), "a");
  await sleep(50);
  assert.deepEqual(lb.logs, []);
});

test("${NAME} in the file takes the worker's variables", { skip }, async (t) => {
  const a = await server(t, "a");
  const lb = await edge(t, { default: { servers: ["${SHOP}"] } }, { SHOP: a.address });
  assert.equal(body(await lb.ask("/")), "a");
});

test("the access log is the console", { skip }, async (t) => {
  const a = await server(t, "four");
  const lb = await edge(t, { log: "json", default: { servers: over(a) } });
  await lb.ask("/x?y", { headers: "CF-Connecting-IP: 192.0.2.7\r\n" });
  const line = await until("there is a line", () => lb.logs[0]);
  const said = JSON.parse(line);
  const names = "client.address http.request.method url.path url.query http.response.status_code lb.server";
  assert.deepEqual(names.split(" ").map((name) => said[name]), ["192.0.2.7", "GET", "/x", "y", 200, a.address]);
  assert.equal(said["http.response.body.size"], 4);
  assert.equal(said.trace_id, value(a.requests[0]!, "traceparent").split("-")[1]);
});

// ─── Routing and balancing ───

test("hosts and paths lead to their servers, and what nothing fits is a 404 of our own", { skip }, async (t) => {
  const [a, b, c] = [await server(t, "a"), await server(t, "b"), await server(t, "c")];
  const lb = await edge(t, {
    hosts: [{ host: "a.test", servers: over(a) }, { host: "*.b.test", servers: over(b) }],
    paths: [{ path: "/pete", servers: over(c), strip: true }],
  });
  assert.equal(body(await lb.ask("/")), "a");
  assert.equal(body(await lb.ask("/", { host: "x.b.test:8080" })), "b");
  assert.equal(body(await lb.ask("/pete/x", { host: "c.test" })), "c");
  assert.equal(target(c.requests[0]!), "/x");
  assert.equal(failure(await lb.ask("/other", { host: "c.test" })), "404 no-route");
});

test("round robin rotates", { skip }, async (t) => {
  const [a, b] = [await server(t, "a"), await server(t, "b")];
  const lb = await edge(t, { default: { servers: over(a, b) } });
  const order = [];
  for (let i = 0; i < 6; i++) order.push(body(await lb.ask("/")));
  assert.equal(order.join(""), "ababab");
});

test("a client stays on its server, also in another isolate with the same secret", { skip }, async (t) => {
  const [a, b] = [await server(t, "a"), await server(t, "b")];
  const config = { default: { servers: over(a, b), sticky: { cookie: "lb", secret: "${LB_SECRET}" } } };
  const [lb, another] = await Promise.all([1, 2].map(() => edge(t, config, { LB_SECRET: "hush" }))) as [Edge, Edge];
  await lb.ask("/");
  const first = await lb.ask("/");
  const cookie = value(first, "set-cookie").split(";")[0]!;
  assert.match(cookie, /^lb=[\w-]{22}$/);
  for (const one of [lb, another, lb, another]) {
    const again = await one.ask("/", { headers: `Cookie: x=1; ${cookie}\r\n` });
    assert.deepEqual([body(again), values(again, "set-cookie")], ["b", []]);
  }
  assert.equal(value(b.requests.at(-1)!, "cookie"), "x=1");
  assert.notEqual(values(await lb.ask("/", { headers: "Cookie: lb=forged\r\n" }), "set-cookie").length, 0);
});

test("a service whose only server is dead falls back to another service", { skip }, async (t) => {
  const [dead, a] = [await nobody(), await server(t, "a")];
  const services = { shop: { servers: [dead], fallback: "spare" }, spare: { servers: over(a) } };
  const lb = await edge(t, { services, default: { service: "shop" } });
  const told = await lb.ask("/");
  assert.deepEqual([status(told), body(told)], [200, "a"]);
});

test("a service gets copies, and the client has its answer before", { skip }, async (t) => {
  const [a, copy] = [await server(t, "a"), await server(t, (visit) => visit.send(300, answer("copy")))];
  const services = { shop: { servers: over(a) }, next: { servers: over(copy) } };
  const lb = await edge(t, { services, default: { service: "shop", mirror: { service: "next" } } });
  for (const text of ["", "abc"]) {
    assert.equal(body(await lb.ask("/p", { method: text ? "POST" : "GET", body: text })), "a");
    const got = await until("the copy is there", () => copy.requests.splice(0)[0]);
    assert.deepEqual([target(got), got.body.toString()], ["/p", text]);
  }
});

test("a dead server is passed over by a retry, and ejected after its failures", { skip }, async (t) => {
  const [dead, a] = [await nobody(), await server(t, "a")];
  const lb = await edge(t, { default: { servers: [dead, a.address], eject: { failures: 2 } } });
  for (let i = 0; i < 6; i++) assert.equal(body(await lb.ask("/")), "a");
  await until("it is ejected", () => lb.logs.some((line) => line.includes(`${dead} is ejected`)));
});

test("when no server can be reached the client gets a 502 that does not say where they are", { skip }, async (t) => {
  const dead = await nobody();
  const lb = await edge(t, { default: { servers: [dead] } });
  const answered = await lb.ask("/");
  assert.equal(failure(answered), "502 reset");
  assert.doesNotMatch(answered.start + body(answered) + answered.headers.join(), /127\.0\.0\.1/);
});

test("when all servers have failed their probes the client gets a 503 with Retry-After", { skip }, async (t) => {
  const sick = await server(t, (visit) => visit.send(answer("no", "", "500 No")));
  const health = { path: "/healthz", fall: 1 };
  const lb = await edge(t, { default: { servers: over(sick), health, panic: "0%" } });
  await lb.cron();
  const answered = await lb.ask("/");
  assert.equal(failure(answered), "503 no-server");
  assert.equal(value(answered, "retry-after"), "1");
});

const PLATFORM: Record<string, string> = {
  520: "502 invalid-answer",
  521: "502 connect",
  522: "504 connect-timeout",
  523: "502 connect",
  524: "504 timeout",
  525: "502 connect",
  526: "502 connect",
  530: "502 connect",
};

test("an answer of the platform in place of a server's is the failure that it means", { skip }, async (t) => {
  const a = await server(t, (visit, request) => {
    const [, code, by] = target(request).split("/");
    return visit.send(answer("error code", by ? `Server: ${by}\r\n` : "", `${code} Error`));
  });
  const lb = await edge(t, { default: { servers: over(a), retries: 0, eject: "off" } });
  for (const [code, expected] of Object.entries(PLATFORM)) {
    assert.equal(failure(await lb.ask(`/${code}/cloudflare`)), expected);
    assert.equal(status(await lb.ask(`/${code}`)), Number(code), "the server's own");
  }
});

test("what never reached a server is repeated at another, whatever the method", { skip }, async (t) => {
  const [down, a] = [
    await server(t, (visit) => visit.send(answer("error code: 521", "Server: cloudflare\r\n", "521 Down"))),
    await server(t, "a"),
  ];
  const lb = await edge(t, { default: { servers: over(down, a) } });
  for (let i = 0; i < 4; i++) assert.equal(body(await lb.ask("/", { method: "POST", body: "x" })), "a");
  assert.ok(down.requests.length > 0);
});

test(
  "a POST is not repeated when a connection is lost: the platform does not tell how far it had come",
  { skip },
  async (t) => {
    const [dead, a] = [await nobody(), await server(t, "a")];
    const lb = await edge(t, { default: { servers: [dead, a.address], eject: "off" } });
    const answers = [];
    for (let i = 0; i < 4; i++) answers.push(failure(await lb.ask("/", { method: "POST", body: "x" })).trim());
    assert.deepEqual(answers, ["502 reset", "200", "502 reset", "200"]);
  },
);

test(
  "an answer that the platform cannot pass on costs a 502, and its server is counted free once",
  { skip },
  async (t) => {
    let release = () => {};
    const held = new Promise<void>((resolve) => release = resolve);
    const [a, b] = [
      await server(t, (visit) => held.then(() => visit.send(answer("a")))),
      await server(t, (visit) => visit.send(answer("odd", "", "999 Odd"))),
    ];
    const strategy = "least-connections"; // among equals the first; a server counted free twice would be the less busy
    const lb = await edge(t, {
      default: { servers: over(a, b), strategy, max_in_flight: 1, retries: 0, eject: "off" },
    });
    const first = lb.ask("/");
    await until("the first is asked", () => a.requests.length);
    assert.match(failure(await lb.ask("/")), /^502 /);
    b.script = (visit) => visit.send(answer("b"));
    assert.equal(body(await lb.ask("/")), "b");
    release();
    assert.equal(body(await first), "a");
    assert.equal(body(await lb.ask("/")), "a");
  },
);

test("a server that does not answer in time is a 504", { skip }, async (t) => {
  const silent = await server(t, () => {});
  const lb = await edge(t, { default: { servers: over(silent), timeouts: { response: "200ms" }, retries: 0 } });
  assert.equal(failure(await lb.ask("/")), "504 timeout");
});

// ─── Health ───

test("cron probes over HTTP: a server that fails is left out, and comes back", { skip }, async (t) => {
  let well = false;
  const [a, b] = [
    await server(t, (visit, request) => {
      return visit.send(target(request) === "/healthz" && !well ? answer("no", "", "500 No") : answer("a"));
    }),
    await server(t, "b"),
  ];
  const health = { path: "/healthz", interval: "1ms", rise: 1, fall: 1 };
  const lb = await edge(t, { default: { servers: over(a, b), health, panic: "0%" } });
  await lb.cron();
  const fourth = async () => {
    const names = [];
    for (let i = 0; i < 4; i++) names.push(body(await lb.ask("/")));
    return names.join("");
  };
  assert.equal(await fourth(), "bbbb");
  well = true;
  await sleep(5);
  await lb.cron();
  await until("it is up", () => lb.logs.some((line) => line.endsWith(`${a.address} is up`)));
  assert.equal([...await fourth()].sort().join(""), "aabb");
});

test("where no cron has come, a stale probe goes beside a request", { skip }, async (t) => {
  const a = await server(t, "a");
  const lb = await edge(t, { default: { servers: over(a), health: { path: "/healthz", interval: "1h" } } });
  for (let i = 0; i < 3; i++) assert.equal(body(await lb.ask("/x")), "a");
  await until("it is probed", () => a.requests.some((request) => target(request) === "/healthz"));
  assert.equal(a.requests.filter((request) => target(request) === "/healthz").length, 1);
});

test("a request does not wait for the probe beside it", { skip }, async (t) => {
  const a = await server(t, (visit, request) => target(request) === "/healthz" ? undefined : visit.send(answer("a")));
  const lb = await edge(t, { default: { servers: over(a), health: { path: "/healthz", timeout: "1h" } } });
  assert.equal(body(await lb.ask("/x")), "a");
});

test(
  "without a path there are no probes: nobody is called down, and no ejection is taken back",
  { skip },
  async (t) => {
    const [dead, a] = [await nobody(), await server(t, "a")];
    const lb = await edge(t, {
      default: {
        servers: [dead, a.address],
        health: { interval: "1ms", rise: 1, fall: 1 },
        eject: { failures: 1, for: "1h" },
      },
    });
    for (let i = 0; i < 6; i++) {
      assert.equal(body(await lb.ask("/")), "a");
      await lb.cron();
    }
    assert.equal(lb.logs.filter((line) => / is (ejected|up|down)/.test(line)).length, 1, lb.logs.join("\n"));
    assert.equal(a.visits.map((visit) => visit.received).join("").match(/GET \/ /g)?.length, 6);
  },
);

// ─── What passes ───

test("method, path, query, headers and body reach the server as they were sent", { skip }, async (t) => {
  const a = await server(t);
  const lb = await edge(t, { default: { servers: over(a) } });
  for (const method of ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"]) {
    const headers = "X-One: 1\r\nx-empty:\r\nContent-Type: text/x\r\n";
    const sent = method === "GET" || method === "OPTIONS" ? "" : "b\xf6dy";
    await lb.ask("/p%2Fq/r;s?x=%20&y=1&&z", { method, headers, body: sent });
    const got = a.requests.at(-1)!;
    assert.equal(got.start, `${method} /p%2Fq/r;s?x=%20&y=1&&z HTTP/1.1`);
    assert.deepEqual([value(got, "x-one"), values(got, "x-empty"), value(got, "content-type")], ["1", [""], "text/x"]);
    assert.equal(body(got), sent);
  }
});

test(
  "the server learns who asked, for which host, and through whom; what a client claims is dropped",
  { skip },
  async (t) => {
    const a = await server(t);
    const lb = await edge(t, { default: { servers: over(a) } });
    const claims =
      "X-Forwarded-For: 10.0.0.1\r\nX-Forwarded-Host: evil\r\nX-Forwarded-Proto: gopher\r\nForwarded: for=1\r\n";
    await lb.ask("/", {
      host: "shop.test:8080",
      headers: `CF-Connecting-IP: 2001:db8::7\r\nVia: 1.0 old\r\n${claims}`,
    });
    const got = a.requests[0]!;
    assert.equal(value(got, "host"), a.address);
    assert.equal(value(got, "x-forwarded-for"), "2001:db8::7");
    assert.equal(value(got, "x-forwarded-host"), "shop.test:8080");
    assert.equal(value(got, "x-forwarded-proto"), "http");
    assert.equal(value(got, "forwarded"), 'for="[2001:db8::7]";host="shop.test:8080";proto=http');
    assert.match(value(got, "via"), /^1\.0 old, 1\.1 lb-\w+$/);
    assert.match(value(got, "x-request-id"), /^\w+-\w+$/);
    await lb.ask("/");
    assert.equal(value(a.requests[1]!, "x-forwarded-for"), "unknown", "without CF-Connecting-IP");
  },
);

test("at the edge too there is one reading of what proxies tell: P1, P2, P3", { skip }, async (t) => {
  const a = await server(t);
  const lb = await edge(t, {
    trust: ["192.0.2.0/24"],
    routes: [{ path: "/deny", servers: over(a), deny: ["203.0.113.7"] }, { path: "/old", redirect: { path: "/new" } }],
    default: { servers: over(a) },
  });
  const told = [
    "X-Forwarded-For: 203.0.113.7\r\nX-Forwarded-Proto: https\r\n",
    "X-Forwarded-For: 203.0.113.7:51008\r\nX-Forwarded-Proto: https\r\n",
    'Forwarded: for="203.0.113.7:443";proto=https\r\n',
  ];
  for (const lines of told) {
    const headers = `CF-Connecting-IP: 192.0.2.1\r\n${lines}`;
    await lb.ask("/", { headers });
    const seen = ["x-forwarded-for", "x-forwarded-proto", "forwarded"].map((name) => value(a.requests.at(-1)!, name));
    const story = 'for=203.0.113.7;host="a.test";proto=https, for=192.0.2.1';
    assert.deepEqual(seen, ["203.0.113.7, 192.0.2.1", "https", story], lines);
    assert.equal(status(await lb.ask("/deny", { headers })), 403, lines);
    assert.equal(value(await lb.ask("/old", { headers }), "location"), "https://a.test/new", lines);
  }
});

test("at the edge too a rule for one query parameter leaves the others as they are: R10, R11", { skip }, async (t) => {
  const a = await server(t);
  const lb = await edge(t, { default: { servers: over(a), request: { query: { set: { b: 2 }, remove: ["c"] } } } });
  await lb.ask("/caf%c3%a9/%7Eme?a=%20+~&&b=1&c&d=%7e\\&e");
  assert.equal(target(a.requests[0]!), "/caf%c3%a9/%7Eme?a=%20+~&&b=2&d=%7e\\&e");
});

test("at the edge too a page can read what is refused on a route with cors: A7", { skip }, async (t) => {
  const a = await server(t);
  const lb = await edge(t, { default: { servers: over(a), cors: { origin: "*" }, body_limit: 3 } });
  const refused = await lb.ask("/", { method: "POST", headers: "Origin: https://page.test\r\n", body: "four" });
  assert.deepEqual([failure(refused), value(refused, "access-control-allow-origin")], ["413 body-too-large", "*"]);
});

test("headers of one hop end there, both ways", { skip }, async (t) => {
  const lines = "Connection: x-hop\r\nX-Hop: 1\r\nX-Kept: 1\r\nKeep-Alive: timeout=5\r\nProxy-Connection: close\r\n";
  const a = await server(t, (visit) => visit.send(answer("ok", lines)));
  const lb = await edge(t, { default: { servers: over(a) } });
  const { answers } = await rawRequest(lb.port, `GET / HTTP/1.1\r\nHost: a.test\r\n${lines}TE: trailers\r\n\r\n`);
  for (const message of [answers[0]!, a.requests[0]!]) {
    for (const name of ["x-hop", "keep-alive", "proxy-connection", "te"]) {
      assert.deepEqual(values(message, name), [], name);
    }
    assert.equal(value(message, "x-kept"), "1");
  }
});

test("several Set-Cookie stay several", { skip }, async (t) => {
  const a = await server(t, (visit) => visit.send(answer("ok", "Set-Cookie: a=1; Path=/\r\nSet-Cookie: b=2, 3\r\n")));
  const lb = await edge(t, { default: { servers: over(a) } });
  assert.deepEqual(values(await lb.ask("/"), "set-cookie"), ["a=1; Path=/", "b=2, 3"]);
});

test("redirects are passed on, not followed", { skip }, async (t) => {
  const a = await server(t, (visit) => visit.send(answer("", "Location: /there\r\n", "302 Found")));
  const lb = await edge(t, { default: { servers: over(a) } });
  const answered = await lb.ask("/");
  assert.deepEqual([status(answered), value(answered, "location"), a.requests.length], [302, "/there", 1]);
});

const TEXT = Buffer.from("a text that can be made shorter ".repeat(500));
const ENCODINGS: Record<string, Buffer> = {
  identity: TEXT,
  gzip: gzipSync(TEXT),
  deflate: deflateSync(TEXT),
  br: brotliCompressSync(TEXT),
  zstd: runtime() === "node" ? zstdCompressSync(TEXT) : TEXT,
  "gzip, br": brotliCompressSync(gzipSync(TEXT)),
  "x-unknown": TEXT,
};

for (const [encoding, bytes] of Object.entries(ENCODINGS)) {
  test(`a body in ${encoding} passes byte by byte, whatever the client accepts`, { skip }, async (t) => {
    const lines = `Content-Encoding: ${encoding}\r\n`;
    const chunk = Buffer.concat([Buffer.from(`${bytes.length.toString(16)}\r\n`), bytes, Buffer.from("\r\n0\r\n\r\n")]);
    const a = await server(t, (visit, request) => {
      if (target(request) === "/length") return visit.send(answer(bytes, lines));
      return visit.send(head(`${lines}Transfer-Encoding: chunked\r\n`), chunk);
    });
    const lb = await edge(t, { default: { servers: over(a) } });
    for (const headers of ["", `Accept-Encoding: ${encoding}\r\n`]) {
      for (const [path, length] of [["/length", `${bytes.length}`], ["/chunks", ""]] as const) {
        const answered = await lb.ask(path, { headers });
        assert.equal(value(answered, "content-encoding"), encoding);
        assert.equal(value(answered, "content-length"), length);
        assert.ok(answered.body.equals(bytes), "the same bytes");
        assert.equal(value(a.requests.at(-1)!, "accept-encoding"), headers && encoding);
      }
    }
  });
}

test("a server's gzip that is not gzip is none of our business", { skip }, async (t) => {
  const a = await server(t, (visit) => visit.send(answer("not gzip", "Content-Encoding: gzip\r\n")));
  const lb = await edge(t, { default: { servers: over(a) } });
  assert.equal(body(await lb.ask("/")), "not gzip");
});

test("compress compresses once what the server did not", { skip }, async (t) => {
  const a = await server(t, (visit) => visit.send(answer(TEXT, "Content-Type: text/plain\r\n")));
  const lb = await edge(t, { default: { servers: over(a), compress: true } });
  const answered = await lb.ask("/", { headers: "Accept-Encoding: gzip\r\n" });
  assert.equal(value(answered, "content-encoding"), "gzip");
  assert.ok(gunzipSync(answered.body).equals(TEXT));
});

test("at the edge too compress sends each piece when it comes: A4", { skip }, async (t) => {
  let got = "";
  const a = await server(t, async (visit) => {
    await visit.send(head("Content-Type: text/html\r\nTransfer-Encoding: chunked\r\n"), "7\r\npiece 1\r\n");
    await until("the client has the first piece", () => got.includes("piece 1"));
    await visit.send("7\r\npiece 2\r\n0\r\n\r\n");
  });
  const lb = await edge(t, { default: { servers: over(a), compress: true } });
  assert.equal(await readGzip(lb.port, "/", (text) => got = text), "piece 1piece 2");
});

test("HEAD, 204, 304 and 206 pass with their headers and without a body of our making", { skip }, async (t) => {
  const a = await server(t, (visit, request) => {
    if (request.start.startsWith("HEAD")) return visit.send(head("Content-Length: 1234\r\nContent-Encoding: gzip\r\n"));
    if (target(request) === "/204") return visit.send(head("X-A: 1\r\n", "204 No Content"));
    if (target(request) === "/304") return visit.send(head('ETag: "1"\r\n', "304 Not Modified"));
    return visit.send(answer("bcd", "Content-Range: bytes 1-3/9\r\n", "206 Partial Content"));
  });
  const lb = await edge(t, { default: { servers: over(a) } });
  const asked = await lb.ask("/", { method: "HEAD" });
  assert.deepEqual([status(asked), value(asked, "content-length"), value(asked, "content-encoding")], [
    200,
    "1234",
    "gzip",
  ]);
  const none = await lb.ask("/204");
  assert.deepEqual([status(none), value(none, "x-a"), body(none)], [204, "1", ""]);
  const same = await lb.ask("/304", { headers: 'If-None-Match: "1"\r\n' });
  assert.deepEqual([status(same), value(same, "etag"), body(same)], [304, '"1"', ""]);
  assert.equal(value(a.requests.at(-1)!, "if-none-match"), '"1"');
  const part = await lb.ask("/", { headers: "Range: bytes=1-3\r\n" });
  assert.deepEqual([status(part), value(part, "content-range"), body(part)], [206, "bytes 1-3/9", "bcd"]);
  assert.equal(value(a.requests.at(-1)!, "range"), "bytes=1-3");
});

test("an upload streams: the server has its beginning before the client has sent its end", { skip }, async (t) => {
  const a = await server(t);
  const lb = await edge(t, { default: { servers: over(a) } });
  const piece = "x".repeat(70_000);
  for (const framing of ["Content-Length: 140000", "Transfer-Encoding: chunked"]) {
    const wrap = (text: string) => framing.startsWith("T") ? `${text.length.toString(16)}\r\n${text}\r\n` : text;
    const before = a.visits.reduce((sum, visit) => sum + visit.received.length, 0);
    const { answers } = await rawRequest(lb.port, [
      `POST / HTTP/1.1\r\nHost: a.test\r\n${framing}\r\nConnection: close\r\n\r\n` + wrap(piece),
      () => until("the beginning", () => a.visits.reduce((sum, one) => sum + one.received.length, -before) > 70_000),
      wrap(piece) + (framing.startsWith("T") ? "0\r\n\r\n" : ""),
    ]);
    assert.equal(status(answers[0]!), 200, framing);
    assert.equal(a.requests.at(-1)!.body.length, 140_000, framing);
  }
});

test("a large answer passes whole", { skip }, async (t) => {
  const bytes = Buffer.alloc(8 * 2 ** 20, "0123456789");
  const a = await server(t, (visit) => visit.send(answer(bytes)));
  const lb = await edge(t, { default: { servers: over(a) } });
  assert.ok((await lb.ask("/")).body.equals(bytes));
});

test("events pass as they are sent: the second one is sent when the client has the first", { skip }, async (t) => {
  let visit: Visit | undefined;
  const a = await server(t, (one) => {
    visit = one;
    return one.send(head("Content-Type: text/event-stream\r\n"), "data: 1\n\n");
  });
  const lb = await edge(t, { default: { servers: over(a) } });
  let got = "";
  const wait = (socket: Socket) => {
    socket.on("data", (bytes) => got += bytes);
    return until("the first event", () => got.includes("data: 1"));
  };
  const { answers } = await rawRequest(lb.port, [
    "GET / HTTP/1.1\r\nHost: a.test\r\n\r\n",
    wait,
    () => visit!.send("data: 2\n\n"),
    () => until("the second event", () => got.includes("data: 2")),
    () => void visit!.socket.end(),
  ]);
  assert.equal(body(answers[0]!), "data: 1\n\ndata: 2\n\n");
  assert.equal(value(answers[0]!, "content-type"), "text/event-stream");
});

for (
  const [when, script] of [
    ["before the answer", () => {}],
    ["in the middle of the answer", (visit: Visit) => visit.send(head("Content-Length: 100\r\n"), "half")],
  ] as const
) {
  test(
    `a client that leaves ${when} ends the attempt at the server, and leaves nothing in flight`,
    { skip },
    async (t) => {
      const a = await server(t, script);
      const lb = await edge(t, { default: { servers: over(a), max_in_flight: 1, retries: 0, eject: "off" } });
      for (let i = 0; i < 3; i++) {
        const known = a.visits.length;
        await rawRequest(lb.port, [
          "GET / HTTP/1.1\r\nHost: a.test\r\n\r\n",
          () => until("it is asked", () => a.visits.length > known && a.requests.length > i),
          (socket) => void socket.resetAndDestroy(),
        ]);
        await until("its connection ends", () => a.visits.every((visit) => visit.over));
      }
      a.script = (visit) => visit.send(answer("free"));
      assert.equal(body(await lb.ask("/")), "free");
    },
  );
}

test(
  "requests wait in line at the edge too, across requests; one whose client leaves makes way",
  { skip },
  async (t) => {
    const given: (() => unknown)[] = [];
    const a = await server(t, (visit) => void given.push(() => visit.send(answer("a"))));
    const strategy = { hash: { header: "x-key" } }; // read for one request while another one ends
    const queue = { size: 3, timeout: "2s" };
    const lb = await edge(t, { default: { servers: over(a), max_in_flight: 1, strategy, queue, eject: "off" } });
    const first = lb.ask("/first");
    await until("the first is asked", () => given.length === 1);
    await rawRequest(lb.port, [
      "GET /leaves HTTP/1.1\r\nHost: a.test\r\n\r\n",
      200,
      (socket) => void socket.resetAndDestroy(),
    ]);
    const waiting: ReturnType<typeof lb.ask>[] = [];
    for (const path of ["/second", "/third", "/fourth"]) {
      waiting.push(lb.ask(path));
      await sleep(100);
    }
    assert.equal(failure(await lb.ask("/fifth")), "503 queue-full");
    for (const next of [0, 1, 2]) {
      await until("it is asked", () => given.length > next);
      if (next < 2) given[next]!();
    }
    assert.equal(failure(await waiting[2]!), "503 queue-timeout");
    given[2]!();
    for (const one of [first, waiting[0]!, waiting[1]!]) assert.equal(body(await one), "a");
    assert.deepEqual(a.requests.map(target), ["/first", "/second", "/third"]);
  },
);

test("a request that a server keeps waiting is answered by another one at the edge too", { skip }, async (t) => {
  const held: Visit[] = [];
  const [a, b] = [
    await server(t, (visit, request) => target(request) === "/slow" ? held.push(visit) : visit.send(answer("a"))),
    await server(t, (visit) => visit.send(answer("b"))),
  ];
  const lb = await edge(t, {
    default: { servers: over(a, b), strategy: "first", hedge: "p95", max_in_flight: 2, queue: { size: 100 } },
  });
  for (let i = 0; i < 12; i++) await Promise.all(Array.from({ length: 10 }, () => lb.ask("/")));
  // who finds the first server full, as its losing attempts may run as long again, is sent to the other one at once
  for (let i = 0; held.length < 3 && i < 30; i++) {
    assert.equal(body(await lb.ask("/slow")), "b");
    await until("the first attempts are given up", () => held.every((visit) => visit.over));
  }
  assert.equal(held.length, 3);
  await lb.ask("/again");
  await until("the first server has room", () => a.requests.some((request) => target(request) === "/again"));
});

test("a server that breaks off breaks off the answer", { skip }, async (t) => {
  const a = await server(t, async (visit) => {
    await visit.send(head("Content-Length: 100\r\n"), "half", 50);
    visit.socket.destroy();
  });
  const lb = await edge(t, { default: { servers: over(a) } });
  const answered = await lb.ask("/");
  assert.deepEqual([body(answered), answered.complete], ["half", false]);
});

test("a route's rules, redirects, answers and limits hold at the edge too", { skip }, async (t) => {
  const a = await server(t);
  const headers = { set: { "x-set": "1" }, remove: ["x-gone"] };
  const lb = await edge(t, {
    routes: [
      { path: "/rules", servers: over(a), request: { headers }, response: { headers } },
      { path: "/away", redirect: { scheme: "https" } },
      { path: "/own", respond: { status: 410, body: "gone" } },
      { path: "/small", servers: over(a), body_limit: 3 },
      { path: "/here", servers: over(a), allow: ["192.0.2.0/24"] },
      { path: "/rare", servers: over(a), rate: { requests: 2, per: "1m" } },
    ],
  });
  a.script = (visit) => visit.send(answer("ok", "X-Gone: 1\r\nX-Set: 0\r\n"));
  const ruled = await lb.ask("/rules", { headers: "X-Gone: 1\r\n" });
  for (const message of [ruled, a.requests[0]!]) {
    assert.deepEqual([values(message, "x-set"), values(message, "x-gone")], [["1"], []]);
  }
  assert.equal(value(await lb.ask("/away?x"), "location"), "https://a.test/away?x");
  const own = await lb.ask("/own");
  assert.deepEqual([status(own), body(own)], [410, "gone"]);
  assert.equal(failure(await lb.ask("/small", { method: "POST", body: "four" })), "413 body-too-large");
  assert.equal(failure(await lb.ask("/here", { headers: "CF-Connecting-IP: 198.51.100.1\r\n" })), "403 denied");
  assert.equal(status(await lb.ask("/here", { headers: "CF-Connecting-IP: 192.0.2.1\r\n" })), 200);
  const rare = (address: string) => lb.ask("/rare", { headers: `CF-Connecting-IP: ${address}\r\n` });
  assert.equal(value(await rare("2001:db8::1"), "ratelimit"), '"default";r=1;t=30');
  assert.equal(value(await rare("2001:db8::2"), "ratelimit"), '"default";r=0;t=30');
  assert.equal(failure(await rare("2001:db8::3")), "429 rate");
  assert.equal(status(await rare("2001:db8:1::1")), 200);
});

// ─── WebSockets ───

test("a WebSocket passes with its headers, its subprotocol and its close codes", { skip }, async (t) => {
  const own = await webSocketServer();
  t.after(() => own.close());
  own.answer = () => "Sec-WebSocket-Protocol: chat\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nX-Own: 1\r\n";
  const lb = await edge(t, { default: { servers: [await nobody(), own.address], strategy: "first" }, log: "json" });
  const headers = "Origin: https://x.test\r\nSec-WebSocket-Protocol: soap, chat\r\n";
  const client = await openWebSocket(lb.port, "/room?id=1", headers);
  const server = await until("the server's end is open", () => own.peers[0]);
  for (const line of ["get /room?id=1 http/1.1", "origin: https://x.test", "sec-websocket-protocol: soap, chat"]) {
    assert.ok(own.heads[0]!.toLowerCase().includes(`${line}\r\n`), own.heads[0]);
  }
  assert.match(own.heads[0]!, /^via: 1\.1 lb-/im);
  for (const line of ["sec-websocket-protocol: chat", "set-cookie: a=1", "set-cookie: b=2", "x-own: 1"]) {
    assert.ok(client.head.toLowerCase().includes(`${line}\r\n`), client.head);
  }
  const payload = randomBytes(1 << 20);
  client.send(BINARY, payload);
  assert.ok((await server.frame(0)).payload.equals(payload));
  server.send(BINARY, payload);
  assert.ok((await client.frame(0)).payload.equals(payload));
  client.close(4001, "bye");
  await until("the close frame comes", () => server.frames[1]);
  assert.deepEqual(await server.closed(), [4001, "bye"]);
  server.close(4001, "bye");
  assert.deepEqual(await client.closed(), [4001, "bye"]);
  const lines = lb.logs.filter((line) => line.includes('"/room"'));
  assert.deepEqual(lines.map((line) => JSON.parse(line)["http.response.status_code"]), [101]);
});

test("a server's refusal of a WebSocket reaches the client as it is", { skip }, async (t) => {
  const no = await server(t, (visit) => visit.send(answer("no", "X-Why: because\r\n", "401 Unauthorized")));
  const lb = await edge(t, { default: { servers: over(no) } });
  const { answers } = await rawRequest(lb.port, handshake("/"));
  assert.deepEqual(answers.map((one) => [status(one), value(one, "x-why"), body(one)]), [[401, "because", "no"]]);
  assert.equal(no.requests.length, 1);
});

// ─── Fleets ───

const FLEET = { durable: "FLEET" }, TOKEN = "token-of-the-fleet";
const b64 = (text: string) => Buffer.from(text).toString("base64");
/** One call of the Durable Object, through the Worker. */
async function callDurable(at: Edge, path: string, given: unknown, token = TOKEN) {
  const headers = token ? `Authorization: ${token}\r\n` : "";
  const answered = await at.ask(`/.well-known/lb-fleet/v3/${path}`, {
    method: "POST",
    headers,
    body: JSON.stringify(given),
  });
  return { status: status(answered), json: JSON.parse(body(answered)) };
}
const putDurable = (at: Edge, key: string, value: string) =>
  callDurable(at, "kv/txn", { success: [{ request_put: { key: b64(key), value: b64(value) } }] });

test("the Durable Object is there for who has the token, and for nobody where there is none", { skip }, async (t) => {
  const one = await server(t), config = { fleet: FLEET, default: { servers: over(one) } };
  const [open, closed] = await Promise.all([edge(t, config, { LB_FLEET_TOKEN: TOKEN }), edge(t, config)]);
  const range = { key: b64("lb/"), range_end: b64("lb0") };
  assert.equal((await callDurable(open, "kv/range", range)).status, 200);
  for (const token of ["", "wrong"]) assert.equal((await callDurable(open, "kv/range", range, token)).status, 401);
  for (const token of ["", TOKEN, "undefined"]) {
    assert.equal((await callDurable(closed, "kv/range", range, token)).status, 401);
  }
  assert.equal((await callDurable(open, "auth/authenticate", { name: "x", password: TOKEN }, "")).json.token, TOKEN);
  assert.equal((await callDurable(open, "auth/authenticate", { name: "x", password: "wrong" }, "")).status, 401);
  assert.equal((await callDurable(closed, "auth/authenticate", { name: "x", password: "" }, "")).status, 401);
  assert.equal((await callDurable(open, "kv/nothing", {})).status, 404);
  const parsed = parseConfig(
    `fleet: { etcd: "http://127.0.0.1:${open.port}/.well-known/lb-fleet", prefix: other/, user: lb, password: ${TOKEN} }`,
  );
  await checkEngine(new EtcdClient(parsed.fleet!, createLoadBalancer(parsed).balancer.effects), sleep);
});

test(
  "an isolate takes the fleet's document before its first answer, and a newer one beside requests",
  { skip },
  async (t) => {
    const [first, second] = [await server(t, "first"), await server(t, "second")];
    const at = await edge(t, { fleet: FLEET, default: { servers: over(first) } }, { LB_FLEET_TOKEN: TOKEN });
    assert.equal(body(await at.ask("/")), "first");
    const { json } = await callDurable(at, "kv/range", { key: b64("lb/config") });
    const text = Buffer.from(json.kvs[0].value, "base64").toString();
    assert.match(text, /"fleet"/, "there was none: its own has become the document");
    await putDurable(at, "lb/config", text.replace(first.address, second.address));
    const end = Date.now() + 10_000;
    while (body(await at.ask("/")) !== "second") {
      assert.ok(Date.now() < end, "the newer document");
      await sleep(50);
    }
    await putDurable(at, "lb/config", "servers: nonsense");
    await sleep(1_200);
    await at.ask("/");
    await until(
      "what cannot be used is said",
      () => at.logs.some((line) => /of the document cannot be used here/.test(line)),
    );
    assert.equal(body(await at.ask("/")), "second");
  },
);

test("instances elsewhere join over the Durable Object; where they probe, isolates do not", { skip }, async (t) => {
  const ends: (() => unknown)[] = [];
  t.after(async () => {
    for (const end of ends) await end();
  });
  const own = { after: (end: () => unknown) => void ends.unshift(end) };
  const at = await edge(t, { fleet: FLEET }, { LB_FLEET_TOKEN: TOKEN }),
    url = `http://127.0.0.1:${at.port}/.well-known/lb-fleet/`;
  assert.equal(status(await at.ask("/")), 404, "there is no document yet");
  const backend = await startBackend(own, "one"),
    joined = { etcd: url, user: "lb", password: "\${LB_FLEET_TOKEN}", ttl: "2s" };
  const rest =
    `default: { servers: [${backend.address}], health: { path: /health, interval: 200ms, fall: 2, rise: 2 } }\n`;
  const env = { LB_FLEET_TOKEN: TOKEN };
  const a = await startInstance(own, "a", joined, { rest, env }), b = await startInstance(own, "b", joined, { env });
  await eventually("both are there", async () => (await b.fleet()).instances.length === 2);
  await eventually("the edge has their document", async () => body(await at.ask("/")) === "one");
  assert.equal((await b.ask("PATCH /config?wait=5s", { log: "json" })).status, 200);
  assert.match(a.text(), /log: json/);
  backend.isUp = false;
  await eventually("down on both", async () => {
    const all = await Promise.all([a, b].map((one) => one.ask("GET /services")));
    return all.every(({ json }) => json.services[0].servers[0].up === false);
  });
  await eventually("and at the edge, by their word", async () => {
    await at.ask("/");
    return at.logs.some((line) => /is down: most of its probers say so/.test(line));
  });
  await a.stop("SIGKILL");
  await eventually(
    "who is gone loses its lease, by the alarm",
    async () => (await b.fleet()).instances.length === 1,
    20_000,
  );
});

test("an isolate lists etcd itself, where there is no Durable Object", { skip: skip || noEtcd }, async (t) => {
  const ends: (() => unknown)[] = [];
  t.after(async () => {
    for (const end of ends) await end();
  });
  const etcd = await startEtcd({ after: (end) => void ends.unshift(end) });
  const [first, second] = [await server(t, "first"), await server(t, "second")];
  const at = await edge(t, { fleet: { etcd: etcd.urls }, default: { servers: over(first) } });
  assert.equal(body(await at.ask("/")), "first");
  const text = (await etcd.get("lb/config"))!;
  await etcd.put("lb/config", text.replace(first.address, second.address));
  await eventually("the newer document", async () => body(await at.ask("/")) === "second");
  await etcd.kill(0);
  for (let i = 0; i < 5; i++) assert.equal(body(await at.ask("/")), "second", "no request waits for etcd");
  const other = await edge(t, { fleet: { etcd: etcd.urls }, default: { servers: over(first) } });
  assert.equal(body(await other.ask("/")), "first", "without etcd the file of the bundle");
});
