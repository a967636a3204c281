// lb.ts as a library: mounted in another Hono app, wrapped by it, reloaded, and with effects of one's own.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { test } from "node:test";
import { Hono, type HonoRequest } from "hono";
import * as library from "../../lb.ts";
import { createLoadBalancer, type Effects, type FetchAttempt, parseConfig, serve, strategies } from "../../lb.ts";
import {
  answer,
  type Echo,
  echoServer,
  get,
  listenLocally,
  type Part,
  rawRequest,
  scriptedServer,
  sleep,
  status,
  until,
  value,
} from "../rig/rig.ts";
import type { Own, Strategies } from "../rig/types.ts";

/** Servers that answer with what they were asked; `hold` makes them wait for `free`. */
function servers() {
  const held: (() => void)[] = [];
  const state = { hold: false, free: () => held.splice(0).forEach((go) => go()), attempts: [] as FetchAttempt[] };
  const effects = {
    client: () => ({ address: "192.0.2.9", scheme: "http", headers: [] }),
    report: () => {},
    fetch: async (url, attempt) => {
      state.attempts.push(attempt);
      const body = await new Response(attempt.body).text();
      if (state.hold) await new Promise<void>((go) => held.push(go));
      attempt.ended(200, 0, undefined);
      return new Response(`${attempt.method} ${url} ${body}`.trim(), { headers: { "x-from": attempt.server.name } });
    },
  } satisfies Own;
  return { state, effects };
}
const config = (servers: string, more = "") =>
  parseConfig(`log: off\ndefault: { servers: ${servers}, health: off${more} }`);
const HOST = { host: "h.test" };

test("it is a Hono app: request and fetch answer without a listener", async () => {
  const lb = createLoadBalancer(config("[a:1]"), servers().effects);
  const answers = [
    await lb.request("http://h.test/x?y", { headers: HOST }),
    await lb.fetch(new Request("http://h.test/x?y", { headers: HOST })),
  ];
  for (const answer of answers) assert.equal(await answer.text(), "GET http://a:1/x?y");
});

test("a header whose value has a line break is refused: it would begin another header", async () => {
  const { state, effects } = servers();
  for (const [value, status] of [["b", 200], ["b\r\nc: d", 400], ["b\r\n\r\nGET / HTTP/1.1", 400]] as const) {
    const client = () => ({ address: "192.0.2.9", scheme: "http", headers: ["host", "h.test", "a", value] });
    const lb = createLoadBalancer(config("[a:1]"), { ...effects, client });
    assert.equal((await lb.fetch(new Request("http://h.test/"))).status, status, JSON.stringify(value));
  }
  assert.equal(state.attempts.length, 1);
});

test("a Request without a Host header has that of its URL; where both are there, Host wins", async () => {
  const { state, effects } = servers();
  const client = ({ headers }: Request) => ({ address: "192.0.2.9", scheme: "http", headers: [...headers].flat() });
  const lb = createLoadBalancer(parseConfig("log: off\nhosts: [{ host: h.test, servers: [a:1] }]"), {
    ...effects,
    client,
  });
  assert.equal(await (await lb.request("http://h.test:81/x")).text(), "GET http://a:1/x");
  assert.deepEqual(state.attempts[0]!.headers.slice(0, 2), ["host", "h.test:81"]);
  const other = await lb.fetch(new Request("http://x.test/a", { headers: { host: "h.test" } }));
  assert.equal(await other.text(), "GET http://a:1/a");
  assert.deepEqual(state.attempts[1]!.headers.slice(0, 2), ["host", "h.test"]);
  const unknown = await lb.fetch(new Request("http://h.test/", { headers: { host: "x.test" } }));
  assert.deepEqual([unknown.status, unknown.headers.get("x-lb-failure")], [404, "no-route"]);
  const bad = await lb.fetch(new Request("http://h.test/", { headers: { host: "a b" } }));
  assert.deepEqual([bad.status, bad.headers.get("x-lb-failure")], [400, "bad-host"]);
});

test("it can stand in a user's app, behind middleware and beside routes", async () => {
  const { state, effects } = servers();
  const app = new Hono();
  app.use(async (context, next) => {
    if (context.req.header("authorization") === undefined) return context.text("who are you?", 401);
    await next();
    return context.header("x-wrapped", "yes");
  });
  app.get("/own", (context) => context.text("own"));
  app.route("/", createLoadBalancer(config("[a:1]"), effects));
  const ask = async (path: string, init: RequestInit = {}) => {
    const headers = { ...HOST, "authorization": "x", ...init.headers };
    const response = await app.request(`http://h.test${path}`, { ...init, headers });
    return [response.status, await response.text(), response.headers.get("x-wrapped"), response.headers.get("x-from")];
  };
  assert.deepEqual(await ask("/own"), [200, "own", "yes", null]);
  assert.deepEqual(await ask("/other?q=1"), [200, "GET http://a:1/other?q=1", "yes", "a:1"]);
  const put = { method: "PUT", body: "abc", headers: { "content-length": "3" } };
  assert.deepEqual(await ask("/other", put), [200, "PUT http://a:1/other abc", "yes", "a:1"]);
  const stranger = await app.request("http://h.test/other", { headers: HOST });
  assert.deepEqual([stranger.status, state.attempts.length], [401, 2], "no server saw that one");
});

test("behind middleware a path that it may have read otherwise is refused: /pub/../own is not /own", async () => {
  const { state, effects } = servers();
  const app = new Hono();
  app.all("/own/*", (context) => context.text("for me only", 401));
  app.route("/", createLoadBalancer(config("[a:1]"), effects));
  const ask = async (path: string) => {
    const request = new Request("http://h.test/", { headers: HOST });
    Object.defineProperty(request, "url", { value: `http://h.test${path}` }); // some runtimes leave it as it was sent
    return (await app.fetch(request)).status;
  };
  const rows: [string, number][] = [["/own/x", 401], ["/pub/../own/x", 400], ["/pub/%2e%2e/own/x", 400], [
    "/%6fwn/x",
    401,
  ], ["/pub/x", 200]];
  for (const [path, status] of rows) assert.equal(await ask(path), status, path);
  assert.equal(state.attempts.length, 1);
});

test("it can be mounted below a path, with and without that path in front", async () => {
  const { effects } = servers();
  const app = new Hono();
  const lb = createLoadBalancer(
    parseConfig("log: off\npaths: [{ path: /api, servers: [a:1] }]\ndefault: { servers: [b:1] }"),
    effects,
  );
  app.route("/api", lb);
  app.mount("/lb", (request) => lb.fetch(request));
  const ask = async (path: string) => {
    const response = await app.request(`http://h.test${path}`, { headers: HOST });
    return response.status === 200 ? await response.text() : response.status;
  };
  assert.equal(await ask("/api/x"), "GET http://a:1/api/x");
  assert.equal(await ask("/lb/x"), "GET http://b:1/x");
  assert.equal(await ask("/x"), 404);
});

test("a user's own onError is not asked for what the balancer answers itself", async () => {
  const { effects } = servers();
  const app = new Hono();
  app.onError((_error, context) => context.text("mine", 500));
  app.route(
    "/",
    createLoadBalancer(config("[a:1]", ", strategy: first"), {
      ...effects,
      strategies: {
        first() {
          throw new Error("no");
        },
      },
    }),
  );
  const response = await app.request("http://h.test/", { headers: HOST });
  assert.deepEqual([response.status, response.headers.get("x-lb-failure")], [500, "internal"]);
});

test("a reload changes where new requests go; those in flight finish where they began", async () => {
  const { state, effects } = servers();
  const lb = createLoadBalancer(config("[a:1]"), effects);
  const ask = () => lb.request("http://h.test/", { headers: HOST });
  state.hold = true;
  const before = ask();
  await new Promise((resolve) => setTimeout(resolve));
  const old = lb.balancer.table;
  lb.reload(config("[b:1]"));
  const after = ask();
  await new Promise((resolve) => setTimeout(resolve));
  assert.equal(lb.balancer.inFlight, 2);
  state.free();
  assert.equal((await before).headers.get("x-from"), "a:1");
  assert.equal((await after).headers.get("x-from"), "b:1");
  const services = [old, lb.balancer.table].flatMap((table) => [...table.services.values()]);
  const counts = services.flatMap(({ inFlight, servers }) => [inFlight, ...servers.map((server) => server.inFlight)]);
  assert.deepEqual([lb.balancer.inFlight, ...counts], [0, 0, 0, 0, 0]);
});

test("a server that stays over a reload stays the same record, with its new weight, and round robin goes on", async () => {
  const { state, effects } = servers();
  const lb = createLoadBalancer(config("[a:1, b:1]"), effects);
  const ask = async (times: number) => {
    for (let i = 0; i < times; i++) await lb.request("http://h.test/", { headers: HOST });
    return state.attempts.splice(0).map(({ server }) => server.name[0]).join("");
  };
  assert.equal(await ask(3), "aba");
  const [a] = lb.balancer.table.services.get("default")!.servers;
  lb.reload(config("[a:1, b:1]"));
  assert.equal(await ask(3), "bab");
  lb.reload(config("[{url: a:1, weight: 2}, b:1, c:1]"));
  assert.equal(lb.balancer.table.services.get("default")!.servers[0], a);
  assert.deepEqual([...await ask(400)].filter((name) => name === "a").length, 200);
});

test("a reload that cannot be done throws and changes nothing", async () => {
  const { effects } = servers();
  const yaml = (to: string) =>
    parseConfig(`log: off
services: { one: { servers: [${to}:1], health: off }, two: { servers: [${to}:2], health: off } }
hosts: [{ host: one.test, service: one }, { host: two.test, service: two }]`);
  const lb = createLoadBalancer(yaml("a"), effects);
  const next = yaml("b");
  (next.services.get("two")!.strategy as { name: string }).name = "nonsense";
  assert.throws(() => lb.reload(next), /nonsense/);
  const from = async (host: string) =>
    (await lb.request(`http://${host}/`, { headers: { host } })).headers.get("x-from");
  assert.deepEqual([await from("one.test"), await from("two.test")], ["a:1", "a:2"]);
});

test("two balancers in one process share nothing", async () => {
  const { state, effects } = servers();
  const one = { ...effects, date: () => new Date(0) }; // begun in the same millisecond
  const lbs = [one, one].map((effects) => createLoadBalancer(config("[a:1, b:1]"), effects));
  for (const lb of lbs) await lb.request("http://h.test/", { headers: HOST });
  assert.deepEqual(state.attempts.map(({ server }) => server.name), ["a:1", "a:1"]);
  const vias = state.attempts.map(({ headers }) => headers[headers.indexOf("via") + 1]);
  const ids = state.attempts.map(({ headers }) => headers[headers.indexOf("x-request-id") + 1]);
  assert.notEqual(vias[0], vias[1], "else each would take the other's requests for its own");
  assert.notEqual(ids[0], ids[1]);
});

test("it needs no listener and no effects: a path is enough, and a URL's host is the Host", async () => {
  const { fetch, report } = servers().effects; // who the client is, the runtime says
  const lb = createLoadBalancer(config("[a:1]"), { fetch, report });
  assert.equal(await (await lb.request("/x")).text(), "GET http://a:1/x");
  assert.equal(await (await lb.fetch(new Request("http://a/x"))).text(), "GET http://a:1/x");
});

test("a body that middleware has read is passed as Hono has kept it, or the answer is 500 and the report says why", async () => {
  const text = '{ "a": 1 }', bytes = new Uint8Array([0, 0xff, 0xfe, 1]), form = new URLSearchParams({ a: "1" });
  const rows: [what: string, read: (req: HonoRequest) => Promise<unknown>, body: BodyInit, status: number][] = [
    ["json", (req) => req.json(), text, 200],
    ["text", (req) => req.text(), text, 200],
    ["bytes", (req) => req.arrayBuffer(), bytes, 200],
    ["text of what is none", (req) => req.text(), bytes, 500],
    ["a form", (req) => req.parseBody(), form, 500],
    ["the Request's own", (req) => req.raw.text(), text, 500],
  ];
  for (const [what, read, body, status] of rows) {
    for (const length of ["", `${new Response(body).body && (await new Response(body).bytes()).length}`]) {
      const { state, effects } = servers(), said: string[] = [], app = new Hono();
      app.use(async ({ req }, next) => {
        await read(req);
        await next();
      });
      app.route("/", createLoadBalancer(config("[a:1]"), { ...effects, report: (_, text) => void said.push(text) }));
      const headers = { ...HOST, ...(length && { "content-length": length }) };
      const response = await app.fetch(new Request("http://h.test/", { method: "POST", body, headers }));
      assert.equal(response.status, status, `${what}, length ${length}`);
      assert.equal(state.attempts.length, status === 200 ? 1 : 0);
      if (status === 500) assert.match(said.join(), /middleware has read the body/);
      else assert.deepEqual(state.attempts[0]!.body, Buffer.from(await new Response(body).bytes()), what);
    }
  }
});

test("a strategy that returns no server of those it is given is named in the report, and the answer is 500", async () => {
  const rows: [returned: (all: readonly unknown[]) => unknown, said: string][] = [
    [() => undefined, "undefined"],
    [([first]) => Promise.resolve(first), "a promise"],
    [([first]) => ({ ...first as object }), "another object"],
    [() => "a:1", "a:1"],
  ];
  for (const [returned, what] of rows) {
    const { state, effects } = servers(), said: string[] = [];
    const strategies = { mine: (all: readonly unknown[]) => returned(all) } as unknown as Strategies;
    const parsed = parseConfig("log: off\ndefault: { servers: [a:1], health: off, strategy: mine }", { strategies });
    const lb = createLoadBalancer(parsed, { ...effects, strategies, report: (_, text) => void said.push(text) });
    const { status } = await lb.request("http://h.test/", { headers: HOST });
    assert.deepEqual([status, state.attempts.length], [500, 0]);
    assert.ok(said.join().includes(`strategy mine returned ${what}; it has to return one of the servers`), said.join());
    assert.deepEqual([...lb.balancer.table.services.values()].map(({ inFlight }) => inFlight), [0]);
  }
});

test("there is no access log on standard output unless the config says log, or an effect asks for it", async () => {
  const yaml = "default: { servers: [a:1], health: off }\n", lines: string[] = [], { log } = console;
  const ask = async (text: string, more: Own = {}) => {
    const lb = createLoadBalancer(parseConfig(text), { ...servers().effects, ...more });
    await (await lb.request("http://h.test/", { headers: HOST })).text();
    await lb.reload(parseConfig(`${yaml}log: json\n`));
    return lb;
  };
  console.log = (line: string) => void lines.push(line);
  try {
    const lb = await ask(yaml);
    await sleep(10);
    assert.deepEqual(lines, []);
    await (await lb.request("http://h.test/", { headers: HOST })).text();
    await until("the reload asks for it", () => lines.length === 1);
    await ask(`${yaml}log: combined\n`);
    await until("the config asks for it", () => lines.length === 2);
    const records: number[] = [];
    await ask(yaml, { accessLog: (record) => void records.push(record["http.response.status_code"]) });
    await until("an effect asks for it", () => records.length === 1);
    assert.equal(lines.length, 2);
  } finally {
    console.log = log;
  }
});

test("start has servers probed until stop, and may be called twice", async () => {
  const probed: string[] = [];
  const connect: Effects["connect"] = (server) => (probed.push(server.name), Promise.resolve());
  const lb = createLoadBalancer(parseConfig("default: { servers: [a:1], health: { interval: 50ms, timeout: 40ms } }"), {
    ...servers().effects,
    connect,
  });
  lb.start();
  lb.start();
  await until("it is probed again and again", () => probed.length > 2);
  lb.stop();
  const then = probed.length;
  await sleep(300);
  assert.equal(probed.length, then);
});

test("nothing runs by itself: probes go out when probe is called, to the servers then in force", async () => {
  const probed: string[] = [];
  const connect: Effects["connect"] = (server) => (probed.push(server.name), Promise.resolve());
  const tcp = (servers: string) => parseConfig(`log: off\ndefault: { servers: ${servers} }`);
  const lb = createLoadBalancer(tcp("[a:1]"), { ...servers().effects, connect });
  await lb.request("http://h.test/", { headers: HOST });
  lb.reload(tcp("[b:1, c:1]"));
  assert.deepEqual(probed, []);
  await lb.probe();
  assert.deepEqual(probed, ["b:1", "c:1"]);
});

test("strategies of one's own do not change the table of strategies", () => {
  const before = Object.keys(strategies);
  createLoadBalancer(config("[a:1]"), { ...servers().effects, strategies: { mine: (candidates) => candidates[0] } });
  assert.deepEqual(Object.keys(strategies), before);
});

test("what users and tests need is exported and no more, and every export says what it is", () => {
  const forUsers =
    "createLoadBalancer serve parseConfig printConfig jsonSchema createAdmin accessLine samplesOf renderMetrics " +
    "strategies Strategy Server LoadBalancer Effects FetchAttempt Failure FAILURES ConfigError WireError LbFleet";
  const forTests = "HttpServer HttpClient NO_BODY relayTcp Fleet EtcdClient EngineError rewrite quantile";
  const lines = readFileSync(new URL("../../lb.ts", import.meta.url), "utf8").split("\n");
  const names = lines.flatMap((line) => {
    return /^export (?:async )?(?:function|const|class|interface|type) (\w+)/.exec(line)?.[1] ?? [];
  });
  assert.deepEqual(names.sort(), `${forUsers} ${forTests}`.split(" ").sort());
  const bare = lines.flatMap((line, i) => {
    const name = /^export (?:async )?(?:function|const|class|interface|type) (\w+)/.exec(line)?.[1];
    return name === undefined || /\*\/$/.test(lines[i - 1] ?? "") ? [] : [name];
  });
  assert.deepEqual(bare, [], "exports without a doc comment");
  const odd = Object.entries(library).filter(([, value]) => !/^(function|object|undefined)$/.test(typeof value));
  assert.deepEqual(odd, [], "exports that workerd would not start with");
});

// ─── Served ───

/** An app, served over sockets; `around` puts middleware in front of a balancer over one server. */
async function served(around: (app: Hono, lb: library.LoadBalancer) => void, config = "") {
  const server = await echoServer();
  const service =
    `default: { servers: ["${server.address}"], health: off, retries: 0, timeouts: { idle: 2s, response: 2s } }`;
  const lb = createLoadBalancer(parseConfig(`log: off\n${config || service}`), { report: () => {} }), app = new Hono();
  around(app, lb);
  app.route("/", lb);
  const stop = new AbortController();
  const { address } = await serve(app, { port: 0, hostname: "127.0.0.1", signal: stop.signal });
  const port = Number(address.split(":")[1]);
  /** The answer, and what the server has seen. */
  const ask = async (parts: Part | Part[]) => {
    const { answers: [one] } = await rawRequest(port, parts);
    return { one: one!, seen: status(one!) === 200 ? JSON.parse(one!.body.toString()) as Echo : undefined };
  };
  const end = async () => {
    stop.abort();
    await server.close();
  };
  return { server, lb, port, ask, end };
}
/** A request with a body that comes a little later than its head, or in one packet with it. */
const post = (path: string, size: number, later = size > 1_000): Part[] => {
  const head =
    `POST ${path} HTTP/1.1\r\nHost: a.test\r\nX-Own: 1\r\nx-own: 2\r\nContent-Length: ${size}\r\nConnection: close\r\n\r\n`;
  return later ? [head, 50, "x".repeat(size)] : [head + "x".repeat(size)];
};

test("served: a balancer answers by itself, probes its servers, and takes nobody any more once it is closed", async () => {
  const server = await scriptedServer((visit) => visit.send(answer("here")));
  const config = `log: off\ndefault: { servers: ["${server.address}"], health: { path: /up, interval: 1s } }`;
  const lb = createLoadBalancer(parseConfig(config));
  const { address, close } = await serve(lb, { port: 0, hostname: "127.0.0.1" });
  const port = Number(address.split(":")[1]);
  try {
    await until("it is probed", () => server.requests.some(({ start }) => start.startsWith("GET /up ")));
    const { answers: [one] } = await rawRequest(port, get("/x"));
    assert.deepEqual([status(one!), one!.body.toString()], [200, "here"]);
  } finally {
    await close();
    await server.close();
  }
  const { answers, closed } = await rawRequest(port, get("/x"));
  assert.deepEqual([answers.length, closed], [0, true]);
  const probes = server.requests.length;
  await new Promise((resolve) => setTimeout(resolve, 1_500));
  assert.equal(server.requests.length, probes, "nobody is probed");
});

test("served: behind middleware, headers keep their spelling and number, and the client its address", async () => {
  const { ask, end } = await served((app) =>
    app.use(async (context, next) => {
      await next();
      context.header("x-wrapped", "yes");
    })
  );
  try {
    for (const size of [0, 5, 100_000]) {
      const { one, seen } = await ask(post("/p?q=%41", size));
      assert.deepEqual([status(one), value(one, "x-wrapped"), seen!.url, seen!.bodyLength], [
        200,
        "yes",
        "/p?q=%41",
        size,
      ]);
      const own = seen!.rawHeaders.filter(([name]) => /^x-(own|forwarded-for)$/i.test(name));
      assert.deepEqual(own, [["X-Own", "1"], ["x-own", "2"], ["x-forwarded-for", "127.0.0.1"]]);
    }
  } finally {
    await end();
  }
});

test("served: a body that middleware keeps a copy of is not changed by those that follow", async () => {
  const LARGE = 2_000_000, kept: Promise<ArrayBuffer>[] = [];
  const large = createServer(({ url }, response) => void response.end(Buffer.alloc(LARGE, Number(url!.slice(1)))));
  await listenLocally(large);
  const yaml = `default: { servers: ["127.0.0.1:${(large.address() as AddressInfo).port}"], health: off }`;
  const { port, end } = await served((app) =>
    app.use(async (context, next) => {
      await next();
      const copy = context.res.clone();
      kept.push(sleep(200).then(() => copy.arrayBuffer()));
    }), yaml);
  try {
    for (const byte of [1, 2, 3]) {
      const { answers: [one] } = await rawRequest(port, get(`/${byte}`));
      assert.ok(one!.body.length === LARGE && one!.body.every((value) => value === byte), `body ${byte}`);
    }
    for (const [i, copy] of (await Promise.all(kept)).entries()) {
      const bytes = new Uint8Array(copy);
      assert.ok(bytes.length === LARGE && bytes.every((value) => value === i + 1), `copy ${i + 1}`);
    }
  } finally {
    await end();
    large.close();
    large.closeAllConnections();
  }
});

test("served: mounted below a path, with bodies", async () => {
  const { ask, end } = await served((app, lb) => app.mount("/lb", lb.fetch));
  try {
    for (const size of [0, 5, 100_000]) {
      const { one, seen } = await ask(post("/lb/x", size));
      assert.deepEqual([status(one), seen?.url, seen?.bodyLength], [200, "/x", size]);
    }
  } finally {
    await end();
  }
});

test("served: what middleware makes of a request is what the server gets", async () => {
  const { ask, end } = await served((app, lb) =>
    app.all("/changed", ({ req, env }) => {
      const headers = { "x-new": "1" }, body = "another body";
      return lb.fetch(new Request(req.url, { method: "PUT", body, headers }), env);
    })
  );
  try {
    const { seen } = await ask(post("/changed", 5));
    assert.deepEqual([seen!.method, seen!.bodyLength], ["PUT", 12]);
    const own = seen!.rawHeaders.filter(([name]) => /^x-(own|new)$/i.test(name));
    assert.deepEqual(own, [["x-new", "1"]]);
  } finally {
    await end();
  }
});

test("served: a body that middleware has read reaches no server cut, and no server is blamed", async () => {
  const { ask, server, lb, end } = await served((app) =>
    app.use(async ({ req }, next) => {
      await req.text();
      await next();
    })
  );
  try {
    for (const [size, later] of [[5, false], [5, true], [100_000, true]] as const) {
      const { one, seen } = await ask(post("/", size, later));
      if (seen) assert.equal(seen.bodyLength, size);
      else assert.deepEqual([status(one), value(one, "x-lb-failure")], [500, "internal"]);
    }
    for (const { start, body } of server.requests) assert.notEqual(body.length, 0, start);
    const [{ counters, inFlight, failures }] = lb.balancer.table.services.get("default")!.servers as [library.Server];
    assert.deepEqual([counters.errors, inFlight, failures], [0, 0, 0]);
  } finally {
    await end();
  }
});

test("served: an upgrade passes through an app", async () => {
  const { port, server, end } = await served((app) => app.use((_context, next) => next()));
  server.reset(async (visit) => {
    await visit.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: talk\r\n\r\nhello");
  }, "head");
  try {
    const { bytes } = await rawRequest(port, [
      "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: talk\r\n\r\n",
      () => until("it has switched", () => server.last),
      200,
      "and back",
      (socket) => void socket.end(),
    ]);
    assert.match(bytes.toString(), /^HTTP\/1\.1 101 Switching Protocols\r\n[^]*\r\n\r\nhello$/);
    assert.match(server.visits[0]!.received, /and back$/);
  } finally {
    await end();
  }
});
