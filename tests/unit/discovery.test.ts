// Servers that DNS has under a name: what is asked, kept and dropped on a clock that only the test moves.

import assert from "node:assert/strict";
import { createAdmin, createLoadBalancer, jsonSchema, parseConfig, printConfig, samplesOf } from "../../lb.ts";
import { answerTo, balancerFor, mistakesOf } from "../rig/balancer.ts";
import { test } from "../rig/rig.ts";

type Answer = string[] | Error;
type Srv = [priority: number, weight: number, port: number, name: string][] | Error;
const error = (code: string): Error => Object.assign(new Error(code), { code });
const UNKNOWN = error("ENOTFOUND");

/** A balancer whose DNS says what `a`, `aaaa`, `srv` and `hosts` have; `asked` is what it was asked. */
function setUp(servers: string, more = "", keys = "") {
  const chances = { next: 0.5 }, asked: string[] = [], looked: string[] = [];
  const a: Record<string, Answer> = {}, aaaa: Record<string, Answer> = {}, hosts: Record<string, Answer> = {};
  const srv: Record<string, Srv> = {}, ttl = { seconds: 30 }, silent = new Set<string>();
  const yaml = (servers: string, more = "") =>
    `services: { s: { servers: ${servers}, health: off, ${keys} } }\ndefault: s\n${more}`;
  const give = <T>(found: T[] | Error | undefined): Promise<T[]> =>
    found instanceof Error || !found ? Promise.reject(found ?? UNKNOWN) : Promise.resolve(found);
  const addresses = (found: Answer | undefined, seconds: number) =>
    give(found).then((all) => all.map((address) => ({ address, ttl: seconds })));
  const requests: { url: string; host: string }[] = [];
  const { lb, clock, reports, service } = balancerFor(yaml(servers, more), {
    random: () => chances.next,
    sleep: () => new Promise((resolve) => setTimeout(resolve, 5)), // everything that is asked answers before
    resolve: (name, type, resolver) => {
      asked.push(`${type} ${name}${resolver && ` ${resolver}`}`);
      if (silent.has(resolver)) return new Promise(() => {});
      return addresses((type === "A" ? a : aaaa)[name], ttl.seconds);
    },
    resolveSrv: (name) =>
      give(srv[name]).then((all) => all.map(([priority, weight, port, name]) => ({ priority, weight, port, name }))),
    lookup: (name) => (looked.push(name), addresses(hosts[name], 0)),
    fetch: (url, attempt) => {
      const { headers } = attempt, at = headers.findIndex((one) => one.toLowerCase() === "host");
      requests.push({ url, host: headers[at + 1]! });
      return answerTo(attempt);
    },
  });
  const all = () => service("s").servers;
  /** Lets time pass, and looks up what is due. */
  const after = async (milliseconds: number) => {
    clock.now += milliseconds;
    await lb.discover();
    return all().map((server) => server.name);
  };
  const reload = (servers: string, more = "") => lb.reload(parseConfig(yaml(servers, more)));
  const ask = () => lb.request("http://client.test/");
  return {
    lb,
    clock,
    chances,
    reports,
    asked,
    looked,
    a,
    aaaa,
    hosts,
    srv,
    ttl,
    silent,
    requests,
    all,
    after,
    reload,
    ask,
  };
}

interface View {
  servers: { found_by: string }[];
  names: { name: string; servers: number; problem: string; stale_for: number | null }[];
}
/** The service as the API shows it. */
const viewed = async (lb: ReturnType<typeof createLoadBalancer>): Promise<View> =>
  await (await createAdmin(lb).request("http://localhost/services/s", { headers: { host: "localhost" } })).json();

test("each address of a name is a server, with what stands beside the name, among those that are listed", async () => {
  const { a, after, all, lb, ask, requests } = setUp(
    '[{ url: "fixed:1", weight: 3 }, { dns: "api.internal:8080", weight: 2, max: 100, backup: true }]',
  );
  a["api.internal"] = ["10.0.0.2", "10.0.0.1"];
  assert.deepEqual(await after(0), ["fixed:1", "10.0.0.2:8080", "10.0.0.1:8080"]);
  assert.deepEqual(
    all().map(({ url, weight, max, backup, foundBy }) => [url, weight, max, backup, foundBy]),
    [
      ["http://fixed:1", 3, Infinity, false, ""],
      ["http://10.0.0.2:8080", 2, 100, true, "api.internal:8080"],
      ["http://10.0.0.1:8080", 2, 100, true, "api.internal:8080"],
    ],
  );
  const service = await viewed(lb);
  assert.deepEqual(service.servers.map(({ found_by }) => found_by), ["", "api.internal:8080", "api.internal:8080"]);
  assert.deepEqual(service.names, [{ name: "api.internal:8080", servers: 2, problem: "", stale_for: null }]);
  await ask();
  assert.equal(requests[0]!.url, "http://fixed:1/");
});

test("A records go before AAAA, which are asked for only where there is no A", async () => {
  const { a, aaaa, after, asked, all } = setUp('[{ dns: "api:80" }]');
  a.api = ["10.0.0.1"];
  aaaa.api = ["2001:db8::1"];
  assert.deepEqual(await after(0), ["10.0.0.1:80"]);
  assert.deepEqual(asked, ["A api"]);
  a.api = error("ENODATA");
  await after(60_000);
  assert.deepEqual(await after(60_000), ["[2001:db8::1]:80"]);
  assert.equal(all()[0]!.url, "http://[2001:db8::1]");
});

test("a name is looked up again after the TTL, from 5 to 60 seconds, 10 % more or less; after a failure in 2 seconds", async () => {
  const { a, after, asked, ttl, clock, chances } = setUp('[{ dns: "api:80" }]');
  a.api = ["10.0.0.1"];
  const nextLook = async () => {
    const { length } = asked, begun = clock.now;
    while (asked.length === length) await after(100);
    return clock.now - begun;
  };
  await after(0);
  assert.equal(await nextLook(), 30_000);
  for (const [seconds, chance, next] of [[1, 0.5, 5_000], [3_600, 0.5, 60_000], [10, 0, 9_000], [10, 0.999, 11_000]]) {
    Object.assign(ttl, { seconds });
    chances.next = chance!;
    await nextLook();
    assert.equal(await nextLook(), next, `TTL ${seconds}`);
  }
  a.api = error("ESERVFAIL");
  await nextLook();
  assert.equal(await nextLook(), 2_000);
});

test("answers that fail keep the servers of before, without limit, and are said when they begin and end", async () => {
  const { a, after, reports, lb, clock } = setUp('[{ dns: "api:80" }]');
  const numbers = () => {
    const samples = samplesOf(lb.balancer);
    return ["up", "servers"].map((one) => samples.get(`lb_discovery_${one}{name="api:80"}`));
  };
  a.api = ["10.0.0.1", "10.0.0.2"];
  await after(0);
  assert.deepEqual(numbers(), [1, 2]);
  reports.length = 0;
  for (const answer of [error("ESERVFAIL"), UNKNOWN, error("ETIMEOUT"), error("ENODATA"), []]) {
    a.api = answer;
    for (let i = 0; i < 50; i++) assert.deepEqual(await after(60_000), ["10.0.0.1:80", "10.0.0.2:80"]);
  }
  assert.deepEqual(reports, [
    "warn api:80: DNS has no good answer: there is no such name; the 2 servers of before stay",
  ]);
  const { problem, stale_for } = (await viewed(lb)).names[0]!;
  assert.equal(problem, "there is no such name");
  assert.equal(stale_for, (clock.now - 60_000) / 1_000);
  assert.deepEqual(numbers(), [0, 2]);
  a.api = ["10.0.0.1", "10.0.0.2"];
  await after(60_000);
  assert.deepEqual(reports.slice(1), ["info api:80: DNS answers again, with 2 servers"]);
  const single = setUp('[{ dns: "api:80" }]');
  single.a.api = ["10.0.0.1"];
  await single.after(0);
  single.a.api = UNKNOWN;
  await single.after(60_000);
  assert.match(single.reports.at(-1)!, /no such name; the server of before stays$/);
  assert.deepEqual(numbers(), [1, 2]);
  assert.equal((await viewed(lb)).names[0]!.stale_for, null);
});

test("an address that one answer lacks stays until a second one in a row lacks it", async () => {
  const { a, after, reports } = setUp('[{ dns: "api:80" }]');
  const look = (...addresses: string[]) => (a.api = addresses, after(60_000));
  await look("10.0.0.1", "10.0.0.2");
  reports.length = 0;
  assert.deepEqual(await look("10.0.0.3", "10.0.0.1"), ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"]);
  assert.deepEqual(await look("10.0.0.2"), ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"]);
  assert.deepEqual(await look("10.0.0.1"), ["10.0.0.1:80", "10.0.0.2:80"]);
  a.api = UNKNOWN;
  await after(60_000); // a failure lacks nothing
  assert.deepEqual(await look("10.0.0.1"), ["10.0.0.1:80"]);
  assert.deepEqual(reports.filter((one) => one.startsWith("info")), [
    "info api:80: found 10.0.0.3:80",
    "info api:80: gone are 10.0.0.3:80",
    "info api:80: DNS answers again, with 1 server",
    "info api:80: gone are 10.0.0.2:80",
  ]);
});

test("another order is no change, and what is known of a server is kept by its URL", async () => {
  const { a, after, all, reports } = setUp('[{ dns: "api:80" }]');
  a.api = ["10.0.0.1", "10.0.0.2"];
  await after(0);
  const [first, second] = all();
  first!.picks = 7;
  const { length } = reports;
  a.api = ["10.0.0.2", "10.0.0.1"];
  await after(60_000);
  assert.deepEqual([all()[0] === first, all()[1] === second, reports.length], [true, true, length]);
  a.api = ["10.0.0.2", "10.0.0.9"];
  await after(60_000);
  await after(60_000);
  assert.equal(all()[0], second);
  assert.deepEqual(all().map(({ name }) => name), ["10.0.0.2:80", "10.0.0.9:80"]);
});

test("SRV records give port and weight; those of the lowest priority come first, the others are backups", async () => {
  const { a, srv, after, all, ask, requests } = setUp(
    "[{ srv: _http._tcp.old.internal, weight: 2 }]",
    "",
    "host_header: server",
  );
  Object.assign(a, { "a.internal": ["10.0.0.1", "10.0.0.2"], "b.internal": ["10.0.0.3"], "c.internal": ["10.0.0.4"] });
  srv["_http._tcp.old.internal"] = [[20, 1, 83, "c.internal"], [10, 5, 81, "a.internal"], [10, 0, 82, "b.internal"]];
  await after(0);
  assert.deepEqual(
    all().map(({ name, weight, backup, authority }) => [name, weight, backup, authority]),
    [
      ["10.0.0.4:83", 2, true, "c.internal:83"],
      ["10.0.0.1:81", 10, false, "a.internal:81"],
      ["10.0.0.2:81", 10, false, "a.internal:81"],
      ["10.0.0.3:82", 2, false, "b.internal:82"],
    ],
  );
  await ask();
  assert.deepEqual(requests[0], { url: "http://10.0.0.1:81/", host: "a.internal:81" });
  srv["_http._tcp.old.internal"] = [[20, 1, 83, "c.internal"], [10, 7, 81, "a.internal"]];
  await after(60_000);
  await after(60_000);
  assert.deepEqual(all().map(({ name, weight }) => [name, weight]), [["10.0.0.4:83", 2], ["10.0.0.1:81", 14], [
    "10.0.0.2:81",
    14,
  ]]);
});

test("where one of several SRV targets has no address the others are taken, nobody is dropped, and it is said", async () => {
  const { a, srv, after, reports } = setUp("[{ srv: _http._tcp.old.internal }]");
  Object.assign(a, { "a.internal": ["10.0.0.1"], "b.internal": ["10.0.0.2"] });
  srv["_http._tcp.old.internal"] = [[1, 1, 81, "a.internal"], [1, 1, 82, "b.internal"]];
  await after(0);
  a["b.internal"] = UNKNOWN;
  a["a.internal"] = ["10.0.0.9"];
  for (let i = 0; i < 5; i++) assert.deepEqual(await after(60_000), ["10.0.0.1:81", "10.0.0.2:82", "10.0.0.9:81"]);
  assert.ok(reports.some((one) => one.includes("DNS has no good answer: there is no such name; the 3 servers")));
});

test("resolvers are asked in their order, the next where one fails or says nothing in a second", async () => {
  const { a, after, asked, silent } = setUp(
    '[{ dns: "api:80" }]',
    'resolvers: [10.9.9.1, "10.9.9.2:5353", "[2001:db8::2]:54", "::1"]',
  );
  a.api = ["10.0.0.1"];
  for (const one of ["10.9.9.1:53", "10.9.9.2:5353"]) silent.add(one);
  assert.deepEqual(await after(0), ["10.0.0.1:80"]);
  assert.deepEqual(asked, ["A api 10.9.9.1:53", "A api 10.9.9.2:5353", "A api [2001:db8::2]:54"]);
});

test("the system is asked where DNS fails, for its hosts file, but not once DNS has known the name", async () => {
  const { a, hosts, looked, after } = setUp('[{ dns: "api:80" }]');
  hosts.api = ["::1", "127.0.0.9", "fe80::1%eth0"];
  assert.deepEqual(await after(0), ["127.0.0.9:80"]);
  assert.deepEqual(await after(4_999), ["127.0.0.9:80"]);
  assert.equal(looked.length, 1);
  await after(1);
  assert.equal(looked.length, 2, "its answers have no TTL and last 5 s");
  a.api = ["10.0.0.1"];
  await after(5_000);
  assert.deepEqual(await after(60_000), ["10.0.0.1:80"]);
  a.api = UNKNOWN;
  for (let i = 0; i < 3; i++) assert.deepEqual(await after(60_000), ["10.0.0.1:80"]);
  assert.equal(looked.length, 2);
});

test("a name that is unknown at the start is 503 no-server, and is served as soon as it is known", async () => {
  const { a, after, ask, reports } = setUp('[{ dns: "api:80" }]');
  await after(0);
  const refused = await ask();
  assert.deepEqual([refused.status, refused.headers.get("x-lb-failure")], [503, "no-server"]);
  assert.deepEqual(reports, ["warn api:80: DNS has no good answer: there is no such name; it has no server yet"]);
  a.api = ["10.0.0.1"];
  await after(2_000);
  assert.equal((await ask()).status, 200);
});

test("the dashboard shows by what a server was found, names without servers, and what is wrong with answers", async () => {
  const { a, after, lb } = setUp('[{ dns: "api:80", backup: true }]');
  const shown = async () =>
    await (await createAdmin(lb).request("http://localhost/live", { headers: { host: "localhost" } })).text();
  await after(0);
  await after(120_000);
  const before = await shown();
  assert.ok(before.includes("s: DNS has had no good answer for api:80 for 2 m: there is no such name"), before);
  assert.ok(before.includes("s: no server may be asked") && before.includes("0 of 0 up"), before);
  a.api = ["10.0.0.1"];
  await after(60_000);
  const page = await shown();
  assert.ok(page.includes("<span>10.0.0.1:80</span><small>backup · api:80</small>"), page);
  assert.ok(!page.includes("DNS has had"));
});

test("a reload keeps what was found; a service whose servers become names serves on until they are known", async () => {
  const { a, after, all, reload, ask } = setUp("[fixed:1]");
  reload('[{ dns: "api:80" }]');
  assert.equal((await ask()).status, 200, "nobody has looked yet");
  assert.deepEqual(all().map(({ name }) => name), ["fixed:1"]);
  a.api = ["10.0.0.1"];
  assert.deepEqual(await after(0), ["10.0.0.1:80"]);
  const [server] = all();
  reload('[{ dns: "api:80", weight: 5 }, fixed:1]');
  assert.equal(all()[0], server);
  assert.deepEqual(all().map(({ name, weight }) => [name, weight]), [["10.0.0.1:80", 5], ["fixed:1", 1]]);
});

test("Host, SNI and verification go by the name, unless the config has others", async () => {
  const { a, after, all, reload, ask, requests } = setUp(
    '[{ dns: "https://api.internal." }]',
    "",
    "host_header: server",
  );
  a["api.internal."] = ["10.0.0.1"];
  await after(0);
  const [{ url, name, tls, authority }] = all() as [ReturnType<typeof all>[number]];
  assert.deepEqual([url, name, tls.servername, authority], [
    "https://10.0.0.1",
    "10.0.0.1:443",
    "api.internal",
    "api.internal",
  ]);
  await ask();
  assert.deepEqual(requests, [{ url: "https://10.0.0.1/", host: "api.internal" }]);
  reload('[{ dns: "https://api.internal.", host: other.test }], tls: { servername: verified.test }');
  assert.equal(all()[0]!.tls.servername, "verified.test");
  await ask();
  assert.equal(requests[1]!.host, "other.test");
});

test("two services ask once for the name that they share, and each server that is found twice is there once", async () => {
  const { a, lb, asked } = setUp("[a:1]");
  lb.reload(parseConfig(`services:
  s: { servers: [{ dns: "one:80", weight: 2 }, { dns: "two:80" }, "10.0.0.2:80"], health: off }
  t: { servers: [{ dns: "one:80" }], health: off }
default: s
routes: [{ path: /t, service: t }]`));
  Object.assign(a, { one: ["10.0.0.1", "10.0.0.2"], two: ["10.0.0.2", "10.0.0.3"] });
  await lb.discover();
  const names = (service: string) => lb.balancer.table.services.get(service)!.servers.map(({ name }) => name);
  assert.deepEqual(names("s"), ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"]);
  const weights = lb.balancer.table.services.get("s")!.servers.map(({ weight }) => weight);
  assert.deepEqual(weights, [2, 2, 1], "what is found first counts");
  assert.deepEqual(names("t"), ["10.0.0.1:80", "10.0.0.2:80"]);
  assert.deepEqual(asked.filter((one) => one === "A one"), ["A one"]);
});

test("without DNS a name is one server, reached by it, and SRV records are left out", async () => {
  const config = parseConfig('default: { servers: [{ dns: "api:80", weight: 2 }, { srv: _http._tcp.api.internal }] }');
  const lb = createLoadBalancer(config, { resolve: undefined });
  await lb.discover();
  const [service] = lb.balancer.table.services.values();
  assert.deepEqual(service!.servers.map(({ url, weight }) => [url, weight]), [["http://api", 2]]);
});

test("what cannot be a name or a resolver is refused with what would be right", () => {
  const server = (entry: string) => mistakesOf(`default: { servers: [${entry}] }`);
  const dns = "a name and a port such as api.internal:8080, or https://api.internal";
  for (const wrong of ["10.0.0.1:80", "[::1]:80", "api.internal", "unix:/a", "8080", "api:0", "http://a/b"]) {
    assert.deepEqual(server(`{ dns: "${wrong}" }`), [`default.servers[0].dns: "${wrong}" is not ${dns}`]);
  }
  for (const wrong of ["old", "_http._tcp.a:80", "_http._tcp..a"]) {
    const is = "a name of SRV records such as _http._tcp.api.internal";
    assert.deepEqual(server(`{ srv: "${wrong}" }`), [`default.servers[0].srv: "${wrong}" is not ${is}`]);
  }
  assert.deepEqual(server('{ dns: "a:80", url: "b:80" }'), ["default.servers[0]: needs exactly one of url, dns, srv"]);
  assert.deepEqual(server("{ weight: 2 }"), ["default.servers[0]: needs exactly one of url, dns, srv"]);
  for (const wrong of ["10.0.0", "dns.internal", "10.0.0.1:0", "[::1", "10.0.0.1:99999"]) {
    const found = mistakesOf(`resolvers: ["${wrong}"]\ndefault: { servers: [a:1] }`);
    assert.deepEqual(found, [`resolvers[0]: "${wrong}" is not an address such as 10.0.0.2 or 10.0.0.2:53`]);
  }
  const tcp = mistakesOf('tcp: [{ listen: 1, servers: [{ dns: "https://a" }] }]');
  assert.match(tcp[0]!, /"https:\/\/a" speaks TLS: tcp passes bytes as they are/);
});

test("--print-config shows names as they are written, and the schema has them", () => {
  const text = 'resolvers: 10.0.0.2\ndefault: { servers: [{ dns: "api:80" }, { srv: _https._tcp.api.internal }] }';
  const printed = printConfig(parseConfig(text));
  assert.match(printed, /dns: api:80\n/);
  assert.match(printed, /srv: _https\._tcp\.api\.internal\n/);
  assert.match(printed, /^resolvers: 10\.0\.0\.2$/m);
  assert.deepEqual(printConfig(parseConfig(printed)), printed);
  const schema = JSON.stringify(jsonSchema());
  for (const key of ['"resolvers"', '"dns"', '"srv"', '{"required":["dns"]}']) assert.ok(schema.includes(key), key);
});
