// What is counted: of requests at their entrypoint and service, of attempts at their server, and what the text for
// Prometheus makes of it.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import {
  createLoadBalancer,
  type Failure,
  type FetchAttempt,
  type LoadBalancer,
  parseConfig,
  quantile,
  renderMetrics,
  samplesOf,
  WireError,
} from "../../lb.ts";
import { openWebSocket } from "../rig/websocket.ts";
import {
  answer,
  freePort,
  get,
  rawRequest,
  scriptedServer,
  sleep,
  startProgram,
  status,
  test,
  until,
} from "../rig/rig.ts";
import type { Own } from "../rig/types.ts";

/** What an attempt meets: a status, a failure before there is an answer, or one in its middle (`200 idle`). */
type Manner = number | Failure | `${number} ${Failure}`;

/** A balancer over a and b whose attempts meet the manners in turn, 40 ms each; answers have 10 bytes, 4 where cut. */
function setUp(manners: Manner[] = [200], yaml = "default: { servers: [a:1, b:1], health: off, eject: off }") {
  const clock = { now: 1_000 };
  let turn = 0;
  const effects = {
    client: ({ headers }) => ({ address: "192.0.2.9", scheme: "http", headers: [...headers].flat() }),
    now: () => clock.now,
    date: () => new Date(Date.UTC(2026, 10, 21) + clock.now),
    sleep: (_ms, signal) => signal ? new Promise<void>(() => {}) : Promise.resolve(),
    report: () => {},
    accessLog: () => {},
    connect: () => Promise.resolve(),
    fetch: (_url: string, attempt: FetchAttempt) => {
      const [, status, problem] = /^(\d*) ?(.*)$/.exec(String(manners[Math.min(turn++, manners.length - 1)]))!;
      clock.now += 40;
      if (!status) return Promise.reject(new WireError(problem as Failure, problem !== "connect", problem!));
      attempt.ended(Number(status), problem ? 4 : 10, problem ? problem as Failure : undefined);
      return Promise.resolve(new Response(null, { status: Number(status) }));
    },
  } satisfies Own;
  const lb = createLoadBalancer(parseConfig(`log: off\n${yaml}`), effects);
  const ask = async (init: RequestInit = {}, host = "h.test") => {
    const response = await lb.fetch(new Request(`http://${host}/`, { ...init, headers: { host, ...init.headers } }));
    await response.body?.cancel();
    return response.status;
  };
  const service = (name = "default") => lb.balancer.table.services.get(name)!;
  return { lb, ask, clock, effects, service };
}

/** All counters as one: what a service or an entrypoint has had. */
function totalOf(tallies: ReturnType<ReturnType<typeof setUp>["service"]>["tallies"]) {
  const all = [...tallies.values()], sum = (numbers: number[]) => numbers.reduce((a, b) => a + b, 0);
  const of = (key: "requests" | "errors" | "bytesIn" | "bytesOut" | "milliseconds") => sum(all.map((one) => one[key]));
  const durations = all[0]!.durations.map((_, bucket) => sum(all.map((one) => one.durations[bucket]!)));
  const [requests, errors, bytesIn, bytesOut] = [of("requests"), of("errors"), of("bytesIn"), of("bytesOut")];
  return { requests, errors, bytesIn, bytesOut, milliseconds: of("milliseconds"), durations };
}

// ─── Counters ───

test("a request is counted once at its service and entrypoint, and each attempt at its server", async () => {
  const { ask, service, lb } = setUp(["connect", 200, 503, 200, 500]);
  for (let i = 0; i < 3; i++) await ask({ method: "PUT", body: "abc", headers: { "content-length": "3" } });
  const { servers: [a, b], tallies, retries } = service();
  const { durations, ...total } = totalOf(tallies);
  assert.deepEqual(total, { requests: 3, errors: 1, bytesIn: 9, bytesOut: 30, milliseconds: 200 });
  assert.deepEqual(totalOf(lb.balancer.entrypoints.get("http")!.tallies), { durations, ...total });
  assert.equal(durations.reduce((sum, held) => sum + held), 3);
  assert.equal(retries, 2);
  const at = ({ counters: { durations: _, ...rest } }: typeof a & object) => Object.values(rest);
  assert.deepEqual([at(a!), at(b!)], [[3, 2, 6, 20, 120], [2, 1, 6, 20, 80]]);
  assert.deepEqual([a!.retries, b!.retries], [1, 1]);
});

test("an error is an answer with 5xx or one that is cut off; what the client does is none", async () => {
  for (
    const [manner, errors] of [[500, 1], ["200 idle", 1], ["timeout", 1], ["client-left", 0], ["200 client-left", 0], [
      404,
      0,
    ]] as const
  ) {
    const { ask, service } = setUp([manner], "default: { servers: [a:1], retries: 0, health: off, eject: off }");
    await ask();
    const { servers: [a], tallies } = service();
    assert.deepEqual([totalOf(tallies).errors, a!.counters.errors], [errors, errors], String(manner));
    assert.deepEqual([totalOf(tallies).requests, a!.counters.requests], [1, 1], String(manner));
  }
});

test("what no service has had is counted at the entrypoint alone", async () => {
  const { ask, lb, service } = setUp([200], "hosts: [{ host: a.test, servers: [a:1], health: off }]");
  assert.equal(await ask(), 404);
  const { requests, errors, bytesOut } = totalOf(lb.balancer.entrypoints.get("http")!.tallies);
  assert.deepEqual([requests, errors, bytesOut > 0], [1, 0, true]);
  assert.equal(service("a.test").tallies.size, 0);
});

test("ejections and probes are counted, and since when a server is what it is", async () => {
  const { lb, ask, clock, effects, service } = setUp(["reset"], "default: { servers: [a:1, b:1], retries: 0 }");
  const [a, b] = service().servers, begun = clock.now;
  assert.deepEqual([a!.since, b!.since], [begun, begun]);
  for (let i = 0; i < 10; i++) await ask({ method: "POST" });
  assert.deepEqual([a!.ejected, b!.ejected, a!.since, b!.since], [1, 0, clock.now - 40, begun]);
  await lb.probe(); // with the effects that it began with: all pass
  assert.deepEqual([a!.probesPassed, b!.probesPassed, a!.since, b!.since], [1, 1, clock.now, begun]);
  clock.now += 7;
  lb.reload(parseConfig("default: { servers: [a:1, { url: b:1, state: drain }, c:1] }"));
  assert.deepEqual(service().servers.map(({ since }) => clock.now - since), [7, 0, 0]);
  effects.connect = () => Promise.reject(new Error("refused"));
  const flaky = createLoadBalancer(parseConfig("default: { servers: [a:1] }"), effects);
  const [only] = flaky.balancer.table.services.get("default")!.servers;
  for (let i = 0; i < 3; i++) {
    clock.now += 20_000;
    await flaky.probe();
  }
  assert.deepEqual([only!.up, only!.probesPassed, only!.probesFailed, only!.since], [false, 0, 3, clock.now]);
  assert.deepEqual([only!.probedAt, only!.probeProblem], [clock.now, "refused"]);
});

test("a quantile lies in the class of durations that it fell into", () => {
  assert.equal(quantile({ requests: 0, durations: [] }, 0.5), 0);
  const { ask, service } = setUp();
  return Promise.all(Array.from({ length: 9 }, () => ask())).then(() => {
    const { counters } = service().servers[0]!;
    for (const share of [0.01, 0.5, 0.99, 1]) {
      const at = quantile(counters, share);
      assert.ok(at > 30, `${at}`);
    }
    const slow = counters.durations.map(() => 0).with(-1, 1);
    assert.equal(quantile({ requests: 1, durations: slow }, 0.5), 60_000);
  });
});

// ─── The text for Prometheus ───

interface Shown {
  type: string;
  help: string;
  samples: Map<string, number>;
}

/** Reads the text format, and holds it to what Prometheus and `promtool check metrics` ask for. */
function read(text: string): Map<string, Shown> {
  const families = new Map<string, Shown>();
  let name = "";
  assert.match(text, /\n$/);
  for (const line of text.trimEnd().split("\n")) {
    const [, kind, about, rest] = /^# (HELP|TYPE) (\w+) (.+)$/.exec(line) ?? [];
    if (kind === "HELP") {
      assert.ok(!families.has(about!), `${about} stands together`);
      families.set(name = about!, { type: "", help: rest!, samples: new Map() });
    } else if (kind === "TYPE") {
      assert.equal(about, name);
      families.get(name)!.type = rest!;
    } else {
      const found = /^(\w+)(\{(?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)*\})? (-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)$/.exec(line);
      assert.ok(found, line);
      const { samples, type } = families.get(name)!;
      const own = type === "histogram" || type === "summary" ? found[1]!.replace(/_(bucket|sum|count)$/, "") : found[1];
      assert.equal(own, name, "a sample stands below its family");
      const series = found[1]! + (found[2] ?? "");
      assert.ok(!samples.has(series), `${series} stands once`);
      samples.set(series, Number(found[3]));
    }
  }
  for (const [name, { type, help }] of families) {
    assert.match(type, /^(counter|gauge|histogram|summary)$/, name);
    assert.equal(
      name.endsWith("_total"),
      type === "counter",
      `${name}: counters end with _total, and nothing else does`,
    );
    assert.doesNotMatch(name, /_(bucket|sum|count|info_total|milliseconds|ms|kb|mb)\b/, name);
    assert.ok(help.length > 5);
  }
  return families;
}

/** The number of a series, whatever the order of its labels. */
function valueOf(families: Map<string, Shown>, name: string, labels: Record<string, string> = {}): number | undefined {
  for (const { samples } of families.values()) {
    for (const [series, value] of samples) {
      const [, own, list = ""] = /^(\w+)(.*)$/.exec(series)!;
      if (own === name && Object.entries(labels).every(([label, text]) => list.includes(`${label}="${text}"`))) {
        return value;
      }
    }
  }
  return undefined;
}
const shown = (lb: LoadBalancer) => read(renderMetrics(samplesOf(lb.balancer)));

test("names and labels are Traefik's, and the numbers are what has happened", async () => {
  const { lb, ask } = setUp(["connect", 200, 200, 503]);
  await ask();
  await ask({ method: "POST", body: "abc", headers: { "content-length": "3" } });
  await ask({ method: "POST" });
  const families = shown(lb);
  const by = { service: "default", code: "200", protocol: "http" };
  const rows: [name: string, labels: Record<string, string>, value: number][] = [
    ["lb_service_requests_total", { ...by, method: "GET" }, 1],
    ["lb_service_requests_total", { ...by, method: "POST" }, 1],
    ["lb_service_requests_total", { ...by, method: "POST", code: "503" }, 1],
    ["lb_service_requests_bytes_total", { ...by, method: "POST" }, 3],
    ["lb_service_responses_bytes_total", { ...by, method: "POST" }, 10],
    ["lb_service_request_duration_seconds_bucket", { ...by, method: "GET", le: "0.05" }, 0],
    ["lb_service_request_duration_seconds_bucket", { ...by, method: "GET", le: "0.1" }, 1],
    ["lb_service_request_duration_seconds_bucket", { ...by, method: "GET", le: "+Inf" }, 1],
    ["lb_service_request_duration_seconds_sum", { ...by, method: "GET" }, 0.08],
    ["lb_service_request_duration_seconds_count", { ...by, method: "GET" }, 1],
    ["lb_service_retries_total", { service: "default" }, 1],
    ["lb_service_server_up", { service: "default", url: "http://a:1" }, 1],
    ["lb_entrypoint_requests_total", { entrypoint: "http", code: "503", method: "POST", protocol: "http" }, 1],
    ["lb_server_requests_total", { url: "http://a:1" }, 2],
    ["lb_server_errors_total", { url: "http://a:1" }, 2],
    ["lb_server_picks_total", { url: "http://a:1", strategy: "round-robin" }, 2],
    ["lb_open_connections", { entrypoint: "http" }, 0],
    ["lb_config_reloads_total", {}, 0],
    ["lb_config_last_reload_success", {}, 1],
    ["lb_build_info", {}, 1],
  ];
  for (const [name, labels, value] of rows) {
    assert.equal(valueOf(families, name, labels), value, `${name} ${JSON.stringify(labels)}`);
  }
  for (const bound of ["0.1", "0.3", "1.2", "5", "+Inf"]) {
    assert.notEqual(valueOf(families, "lb_service_request_duration_seconds_bucket", { le: bound }), undefined, bound);
  }
});

test("the classes of a histogram grow to its count", async () => {
  const { lb, ask, clock } = setUp([200, 404, 500]);
  for (let i = 0; i < 9; i++) {
    clock.now += i * 100;
    await ask({ method: i % 2 ? "GET" : "DELETE" });
  }
  for (const [name, { type, samples }] of shown(lb)) {
    if (type !== "histogram") continue;
    let last = { labels: "", value: 0 };
    for (const [series, value] of samples) {
      const labels = series.slice(series.indexOf("{")).replace(/,le="[^"]*"/, "");
      if (!series.startsWith(`${name}_bucket`)) {
        if (series.startsWith(`${name}_count`)) {
          assert.equal(value, samples.get(`${name}_bucket${labels.slice(0, -1)},le="+Inf"}`));
        }
        continue;
      }
      assert.ok(labels !== last.labels || value >= last.value, series);
      last = { labels, value };
    }
  }
});

test("what a client sends makes no series: unknown methods, paths, hosts and addresses", async () => {
  const { lb, ask } = setUp();
  await ask({ method: "PROPFIND" });
  const before = samplesOf(lb.balancer).size;
  const methods = ["PROPFIND", "MKCOL", "LOCK", "PURGE", "REPORT"]; // not all runtimes make a Request with any other
  for (let i = 0; i < 50; i++) await ask({ method: methods[i % 5]! }, `h${i}.test`);
  assert.equal(samplesOf(lb.balancer).size, before);
  assert.equal(valueOf(shown(lb), "lb_service_requests_total", { method: "EXTENSION_METHOD" }), 51);
});

test("what is no longer in force is no longer shown; what stays goes on counting", async () => {
  const { lb, ask } = setUp(
    [200],
    "services: { one: { servers: [a:1, b:1] }, two: { servers: [c:1] } }\nhosts: [{ host: one.test, service: one }, { host: two.test, service: two }]",
  );
  for (const host of ["one.test", "two.test"]) await ask({}, host);
  assert.match(renderMetrics(samplesOf(lb.balancer)), /service="two"/);
  lb.reload(parseConfig("log: off\nservices: { one: { servers: [a:1] } }\ndefault: { service: one }"));
  const text = renderMetrics(samplesOf(lb.balancer));
  assert.doesNotMatch(text, /service="two"|b:1/);
  assert.equal(valueOf(read(text), "lb_service_requests_total", { service: "one" }), 1);
  assert.equal(valueOf(read(text), "lb_config_reloads_total"), 1);
});

test("no name of a service can break the text", async () => {
  const name = '\\"a"}\\n 1{';
  const quoted = JSON.stringify(name);
  const { lb, ask } = setUp([200], `services: { ${quoted}: { servers: [a:1] } }\ndefault: { service: ${quoted} }`);
  await ask();
  const series = [...shown(lb).get("lb_service_retries_total")!.samples.keys()];
  assert.deepEqual(series, ['lb_service_retries_total{service="\\\\\\"a\\"}\\\\n 1{"}']);
});

test("a server that is down or ejected is not up", async () => {
  const { lb, ask, clock } = setUp(["reset"], "default: { servers: [a:1, b:1], retries: 0, health: off }");
  for (let i = 0; i < 10; i++) await ask({ method: "POST" });
  const up = () => ["http://a:1", "http://b:1"].map((url) => valueOf(shown(lb), "lb_service_server_up", { url }));
  assert.deepEqual(up(), [0, 1]);
  assert.equal(valueOf(shown(lb), "lb_server_ejections_total", { url: "http://a:1" }), 1);
  clock.now += 31_000;
  assert.deepEqual(up(), [1, 1]);
});

/** The metrics that docs/metrics.md names. */
function documented(): string[] {
  const page = readFileSync(new URL("../../docs/metrics.md", import.meta.url), "utf8");
  const table = /\n\| `lb_\.\.\.`[^]*?\n\n/.exec(page)![0];
  const told = new Set([...table.matchAll(/`([a-z]+_[a-z_]+[a-z])`/g)].map(([, name]) => name!.replace(/^lb_/, "")));
  for (const name of ["requests_total", "request_duration_seconds", "requests_bytes_total", "responses_bytes_total"]) {
    told.add(`entrypoint_${name}`); // "the same four"
  }
  told.add("config_last_reload_success_timestamp_seconds");
  for (const name of told) if (/^(?:discovery|fleet)_/.test(name)) told.delete(name); // only where there is one
  return [...told].map((name) => name.startsWith("process_") ? name : `lb_${name}`).sort();
}

test("docs/metrics.md has every metric, and no other", async () => {
  const { lb, ask } = setUp(["connect", "connect"]);
  await ask();
  assert.deepEqual(documented(), [...shown(lb).keys()].sort());
});

test("the Grafana dashboard asks for nothing that is not there", async () => {
  const { lb, ask } = setUp(["connect", "connect", 200]);
  await ask();
  await ask();
  const families = shown(lb);
  const dashboard = readFileSync(new URL("../data/grafana.json", import.meta.url), "utf8");
  const asked = new Set(dashboard.match(/\blb_\w+/g));
  assert.ok(asked.size > 15);
  for (const name of asked) assert.notEqual(valueOf(families, name), undefined, name);
  const labels = new Set(
    [...dashboard.matchAll(/(\w+)=~?\\"/g), ...dashboard.matchAll(/\{\{(\w+)\}\}/g)].map(([, label]) => label),
  );
  const text = renderMetrics(samplesOf(lb.balancer));
  for (const label of labels) assert.match(text, new RegExp(`\\b${label}="`), label);
  const panels: { targets: { expr: string }[] }[] = JSON.parse(dashboard).panels;
  const exprs = panels.flatMap(({ targets }) => targets.map(({ expr }) => expr));
  for (const name of families.keys()) {
    if (!/_total$/.test(name)) continue;
    const used = exprs.filter((expr) => expr.includes(name));
    assert.ok(used.every((expr) => /rate\(/.test(expr)), `${name} is a counter`);
  }
});

// ─── The running program ───

test(
  "GET /metrics of the admin listener shows what has passed, to the read token as well",
  { timeout: 120_000 },
  async () => {
    const server = await scriptedServer((visit, request) =>
      visit.send(answer("hello", "", request.start.includes("/bad") ? "500 Bad" : "200 OK"))
    );
    const admin = { token: "the-operators-token", read_token: "the-readers-token" };
    const config = {
      services: { shop: { servers: [server.address], retries: 0 } },
      default: { service: "shop" },
      admin,
    };
    const lb = await startProgram(config, ["--admin", "127.0.0.1:0"]);
    try {
      for (const path of ["/", "/", "/bad"]) await rawRequest(lb.port, get(path));
      await rawRequest(lb.port, "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc");
      const url = `http://127.0.0.1:${lb.admin}/metrics`;
      assert.equal((await fetch(url)).status, 401);
      const shown = async () => {
        const response = await fetch(url, { headers: { authorization: "Bearer the-readers-token" } });
        assert.match(response.headers.get("content-type")!, /^text\/plain; ?version=0\.0\.4; ?charset=utf-8$/i);
        return read(await response.text());
      };
      let families = await shown();
      while (!valueOf(families, "lb_server_probes_total", { result: "passed" })) families = await shown();
      const of = (name: string, labels: Record<string, string> = {}) =>
        valueOf(families, name, { service: "shop", ...labels });
      assert.equal(of("lb_service_requests_total", { code: "200", method: "GET" }), 2);
      assert.equal(of("lb_service_requests_total", { code: "500", method: "GET" }), 1);
      assert.equal(of("lb_service_requests_bytes_total", { method: "POST" }), 3);
      assert.equal(of("lb_service_responses_bytes_total", { code: "200", method: "GET" }), 10);
      assert.equal(of("lb_server_requests_total", { url: `http://${server.address}` }), 4);
      assert.equal(of("lb_service_server_up", { url: `http://${server.address}` }), 1);
      const seconds = of("lb_service_request_duration_seconds_sum", { method: "POST" })!;
      assert.ok(seconds > 0 && seconds < 60, `${seconds}`);
      assert.ok(Math.abs(valueOf(families, "process_start_time_seconds")! - Date.now() / 1_000) < 600);
      writeFileSync(lb.file, "nonsense: [");
      await until("the file is refused", () => /the old config stays in force/.test(lb.output()));
      assert.equal(valueOf(await shown(), "lb_config_last_reload_success"), 0);
    } finally {
      await lb.stop();
      await server.close();
    }
  },
);

/** What `promtool check metrics` (Debian's package prometheus) says of a text: nothing, where it finds nothing. */
const promtool = (text: string) =>
  new Promise<string>((resolve, reject) => {
    const child = spawn("promtool", ["check", "metrics"]);
    let said = "";
    for (const stream of [child.stdout, child.stderr]) stream.on("data", (bytes) => said += bytes);
    child.on("error", reject);
    child.on("close", (code) => resolve(code === 0 ? said : `${said}ended with ${code}`));
    child.stdin.end(text);
  });

const QUEER = 'we"ird\\ né{}'; // a name that has to be escaped
for (const workers of ["1", "2"]) {
  test(
    `promtool finds nothing wrong with what a busy program of ${workers === "1" ? "one thread" : "two workers"} shows`,
    { needs: ["promtool"], timeout: 120_000 },
    async () => {
      const server = await scriptedServer((visit) => visit.send(30, answer("hello")));
      const [tcp, nobody] = [await freePort(), `127.0.0.1:${await freePort()}`];
      const service = QUEER.replaceAll(/["\\]/g, "\\$&"); // as it stands in a label
      const alone = { health: "off", eject: "off" };
      const config = {
        listen: "127.0.0.1:0",
        tcp: [{ listen: `127.0.0.1:${tcp}`, servers: [server.address], name: "db" }],
        services: {
          [QUEER]: { ...alone, servers: [server.address] },
          retried: { servers: [nobody, server.address], eject: "off", health: { interval: "100ms", fall: 100 } },
          dead: { ...alone, servers: [nobody], retries: 0 },
          drained: { ...alone, servers: [{ url: server.address, state: "drain" }] },
          queued: { ...alone, servers: [server.address], max_in_flight: 1, queue: { size: 9 } },
          doomed: { ...alone, servers: [server.address] },
        },
        name_routes: true,
        routes: [
          { path: "/queer", service: QUEER },
          { path: "/mirrored", service: "queued", mirror: { service: QUEER, percent: 100 } },
        ],
      };
      const lb = await startProgram(config, ["--admin", "127.0.0.1:0", "--log", "off", "--workers", workers]);
      const admin = (path: string, init?: RequestInit) => fetch(`http://127.0.0.1:${lb.admin}${path}`, init);
      const codes = async (...paths: string[]) =>
        (await Promise.all(paths.map((path) => rawRequest(lb.port, get(path))))).map(({ answers }) =>
          status(answers[0]!)
        );
      try {
        assert.deepEqual(await codes("/queued/", "/queued/", "/mirrored", "/queer"), Array(4).fill(200));
        const paths = ["/retried/", "/retried/", "/nowhere", "/dead/", "/drained/", "/doomed/"];
        assert.deepEqual(await codes(...paths), [200, 200, 404, 502, 503, 200]);
        await rawRequest(lb.port, "PROPFIND /queued/ HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n");
        await openWebSocket(lb.port, "/queued/").catch(() => {}); // which the server does not speak
        await rawRequest(tcp, get("/"), { quiet: 50 });
        await lb.reload({ ...config, trust: ["10.0.0.0/8"] });
        let text = "";
        const look = async () => read(text = await (await admin("/metrics")).text());
        let families = await look();
        const of = (name: string, labels: Record<string, string>) => valueOf(families, name, labels);
        const all = () =>
          of("lb_server_probes_total", { service: "retried", result: "failed" }) &&
          of("lb_service_requests_total", { service: "db" }) &&
          of("lb_service_copies_total", { result: "answered", service });
        for (let i = 0; i < 200 && !all(); i++) {
          await sleep(20);
          families = await look();
        }
        assert.equal(await promtool(text), "");
        for (const name of documented()) assert.ok(families.get(name)?.samples.size, `no sample of ${name}`);
        assert.equal(of("lb_service_requests_total", { service, code: "200", method: "GET" }), 1);
        assert.ok(of("lb_service_retries_total", { service: "retried" })! > 0);
        assert.equal(of("lb_service_requests_total", { service: "db", protocol: "tcp" }), 1);
        for (const reason of ["no-route", "connect", "no-server"]) {
          assert.ok(of("lb_failures_total", { reason })! > 0, reason);
        }
        assert.equal(of("lb_config_reloads_total", {}), 1);
        assert.match(text, /service="doomed"/);
        assert.equal((await admin("/services/doomed", { method: "DELETE" })).status, 200);
        await sleep(300); // workers tell their counts every 200 ms
        await look();
        assert.doesNotMatch(text, /doomed/);
        assert.equal(await promtool(text), "");
      } finally {
        await lb.stop();
        await server.close();
      }
    },
  );
}
