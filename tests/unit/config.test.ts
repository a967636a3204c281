import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { RE2JS } from "re2js";
import { Composer, parse as parseYaml } from "yaml";
import { ConfigError, jsonSchema, parseConfig, printConfig } from "../../lb.ts";

const ROUTE = "default: { servers: [a:1] }\n";
const SHOP = "services: { shop: { servers: [a:1] } }\n";

/** Every mistake of a file as `line:column: path: message`. */
function mistakes(text: string, env: Record<string, string> = {}): string[] {
  try {
    parseConfig(text, { env });
  } catch (error) {
    assert.ok(error instanceof ConfigError, String(error));
    return error.message.split("\n").map((line) => line.replace(/^routes\.yml:/, ""));
  }
  return [];
}
/** The one service of a file whose default route has these keys beside `servers`. */
const service = (keys: string, servers = "[a:1]") =>
  parseConfig(`default:\n  servers: ${servers}\n${keys.replace(/^/gm, "  ")}`).services.get("default")!;
const route = (yaml: string) => parseConfig(`${SHOP}routes: [ ${yaml} ]`).routes[0]!;

/** What a route with servers of its own says, and its service. */
const both = (keys: string, servers: string, env: Record<string, string>) => {
  const config = parseConfig(`${SHOP}routes:\n- path: /x\n  servers: ${servers}\n${keys.replace(/^/gm, "  ")}`, {
    env,
  });
  return { ...config.routes[0]!, ...config.services.get("/x")! };
};

/** A listener without TLS. */
const plain = (host: string, port: number) => ({ host, port, tls: [], client_ca: "", h2c: false });

test("Whirlwind's own file works as it is", () => {
  const { services, routes } = parseConfig(`
hosts:
  - host: www.peter.com
    servers:
      - localhost:8081
      - localhost:8082
paths:
  - path: /pete
    servers:
      - localhost:8081
`);
  assert.deepEqual([...services.keys()], ["www.peter.com", "/pete"]);
  assert.deepEqual(services.get("www.peter.com")!.servers.map((server) => server.url), [
    "http://localhost:8081",
    "http://localhost:8082",
  ]);
  assert.deepEqual(routes.map(({ name, hosts, paths }) => ({ name, hosts, paths })), [
    { name: "www.peter.com", hosts: ["www.peter.com"], paths: [] },
    { name: "/pete", hosts: [], paths: [{ kind: "prefix", path: "/pete" }] },
  ]);
});

test("what is left out has the documented default", () => {
  const config = parseConfig(ROUTE);
  const { listen, trust, log, name_routes } = config;
  assert.deepEqual({ listen, trust, log, name_routes }, {
    listen: [plain("", 8080)],
    trust: [],
    log: { format: "combined", sample: 1 },
    name_routes: false,
  });
  const { servers, health, cors, ...rest } = config.services.get("default")!;
  assert.deepEqual(servers, [{
    name: "a:1",
    url: "http://a:1",
    weight: 1,
    host: "",
    backup: false,
    max: Infinity,
    state: "ready",
  }]);
  const { headers, grpc, ...probe } = health;
  assert.equal(grpc, undefined);
  assert.equal(headers.size, 0);
  assert.deepEqual(probe, {
    kind: "tcp",
    path: "",
    interval: 10_000,
    timeout: 2_000,
    expect: [[200, 200]],
    body: "",
    rise: 2,
    fall: 3,
    method: "GET",
  });
  assert.deepEqual(cors.origin, []);
  assert.deepEqual(rest, {
    strategy: { name: "round-robin", by: "none", key: "" },
    eject: { failures: 5, for: 30_000, slow: 3, at_most: 0.5 },
    slow_start: 0,
    panic: 0.5,
    retries: 1,
    retry_on: ["connect", "reset", 502, 503, 504],
    retry_budget: 0.2,
    timeouts: { connect: 3_000, response: 60_000, idle: 300_000, request: Infinity },
    hedge: 0,
    max_in_flight: Infinity,
    queue: { size: 100, timeout: 5_000 },
    fallback: "",
    sticky: { cookie: "", secret: "", max_age: 0 },
    host_header: "keep",
    compress: false,
    http: 1,
    tls: { ca: "", cert: "", key: "", servername: "", insecure: false },
  });
});

test("hosts, paths, routes and default become routes in this order, the last one marked", () => {
  const { routes } = parseConfig(`
default: { service: shop }
routes: [{ name: general, service: shop }, { service: shop, host: [a.b, C.d], path: /v1/ }]
paths: [{ path: /p, service: shop }, { path: /p, service: shop }]
hosts: [{ host: "*.X.com.", service: shop }]
${SHOP}`);
  assert.deepEqual(routes.map(({ name, fallback }) => [name, fallback]), [
    ["*.x.com", false],
    ["/p", false],
    ["/p#2", false],
    ["general", false],
    ["a.b,c.d/v1", false],
    ["default", true],
  ]);
});

test("an inline service never takes the name of another one", () => {
  const { services, routes } = parseConfig(`
services: { /p: { servers: [a:1] } }
paths: [{ path: /p, servers: [b:1] }, { path: /q, service: /p }]`);
  assert.deepEqual([...services].map(([name, { servers }]) => [name, servers[0]!.name]), [["/p", "a:1"], [
    "/p#2",
    "b:1",
  ]]);
  assert.deepEqual(routes.map(({ action }) => action.kind === "forward" && action.targets[0]!.service), ["/p#2", "/p"]);
});

test("JSON is read as well, also with tabs", () => {
  const { listen } = parseConfig('{\n\t"listen": [80, "[::1]:81"],\n\t"default": {"servers": ["a:1"]}\n}');
  assert.deepEqual(listen, [plain("", 80), plain("[::1]", 81)]);
});

test("defaults lie under a service key by key, and the route's own keys over both", () => {
  const { services, routes } = parseConfig(`
defaults: { timeouts: { connect: 1s, idle: 9s }, retries: 3, health: { path: /up } , strategy: { hash: { cookie: a } } }
services:
  shop: { servers: [a:1], timeouts: { response: 2s }, retries: 2, health: { rise: 9 }, strategy: { hash: { header: b } } }
  next: { servers: [a:1], health: off }
routes:
  - { path: /a, service: shop, timeouts: { idle: 1m }, compress: true }
  - { path: /b, split: { shop: 9, next: 0 }, timeouts: { connect: 8s } }
  - { path: /c, respond: {} }`);
  const { timeouts, retries, health, strategy } = services.get("shop")!;
  assert.deepEqual(timeouts, { connect: 1000, response: 2000, idle: 9000, request: Infinity });
  assert.equal(retries, 2);
  assert.deepEqual([health.kind, health.path, health.rise], ["http", "/up", 9]);
  assert.deepEqual(strategy, { name: "hash", by: "header", key: "b" });
  assert.equal(services.get("next")!.health.kind, "off");
  assert.deepEqual(routes[0]!.policy.timeouts, { connect: 1000, response: 2000, idle: 60_000, request: Infinity });
  assert.equal(routes[0]!.policy.compress, true);
  assert.equal(services.get("shop")!.compress, false);
  const split = routes[1]!.action;
  assert.ok(split.kind === "forward");
  assert.deepEqual(
    split.targets.map(({ service, weight, policy }) => [service, weight, policy.timeouts, policy.retries]),
    [
      ["shop", 9, { connect: 8000, response: 2000, idle: 9000, request: Infinity }, 2],
      ["next", 0, { connect: 8000, response: 60_000, idle: 9000, request: Infinity }, 3],
    ],
  );
  assert.deepEqual(routes[2]!.policy.timeouts, { connect: 1000, response: 60_000, idle: 9000, request: Infinity });
});

for (
  const [text, ms] of [
    ["1ms", 1],
    ["500ms", 500],
    ["2s", 2000],
    ["1m", 60_000],
    ["1.5h", 5_400_000],
    ["1d", 86_400_000],
  ] as const
) {
  test(`the duration ${text} is ${ms} milliseconds`, () => {
    assert.equal(service(`timeouts: { idle: ${text} }`).timeouts.idle, ms);
  });
}

for (
  const [text, bytes] of [["0", 0], ["1234", 1234], ["10MB", 1e7], ["1MiB", 2 ** 20], ["1.5kB", 1500], ["7B", 7], [
    "none",
    Infinity,
  ]] as const
) {
  test(`the size ${text} is ${bytes} bytes`, () => {
    assert.equal(route(`{ service: shop, body_limit: ${text} }`).body_limit, bytes);
  });
}

test("percentages become fractions", () => {
  assert.deepEqual(["0%", "50%", "100%", "12.5%"].map((text) => service(`panic: ${text}`).panic), [0, 0.5, 1, 0.125]);
});

for (
  const [text, name, url] of [
    ["localhost:8081", "localhost:8081", "http://localhost:8081"],
    ["http://localhost", "localhost:80", "http://localhost"],
    ["https://B.internal/", "b.internal:443", "https://b.internal"],
    ["https://b.internal:8443", "b.internal:8443", "https://b.internal:8443"],
    ["'[::1]:80'", "[::1]:80", "http://[::1]"],
    ["http://10.0.0.9:81", "10.0.0.9:81", "http://10.0.0.9:81"],
    ["my_app:3000", "my_app:3000", "http://my_app:3000"],
  ] as const
) {
  test(`the server ${text} is ${name} at ${url}`, () => {
    const [server] = service("", `[${text}]`).servers;
    assert.deepEqual([server!.name, server!.url], [name, url]);
    assert.deepEqual(service("", `[{ url: ${text}, max: 7, weight: 0, backup: true, host: h }, z:1]`).servers[0], {
      ...{ name, url, max: 7, weight: 0, backup: true, host: "h", state: "ready" },
    });
  });
}

test("admin is off when absent, on loopback unless told otherwise, and there without a token", () => {
  const at = (text: string) => parseConfig(`${ROUTE}${text}`).admin;
  assert.equal(at(""), undefined);
  assert.deepEqual(at("admin: {}"), { listen: { host: "127.0.0.1", port: 9090 } });
  assert.deepEqual(at("admin: { listen: 9 }")?.listen, { host: "127.0.0.1", port: 9 });
  for (const listen of ["localhost:9", "127.0.0.2:9", "'[::1]:9'"]) assert.ok(at(`admin: { listen: ${listen} }`));
  for (const listen of ["0.0.0.0:9", "'[::]:9'", "10.0.0.1:9", "127.example:9"]) {
    assert.throws(
      () => at(`admin: { listen: ${listen} }`),
      /:2:8: admin: needs a token, as it listens beyond loopback$/,
    );
    assert.ok(at(`admin: { listen: ${listen}, token: 12345678 }`));
  }
  for (const token of ["short", "with a space in it", "''", "${EMPTY}"]) {
    const text = `${ROUTE}admin: { token: ${token} }`;
    assert.throws(
      () => parseConfig(text, { env: { EMPTY: "" } }),
      /admin\.token: .*\*\*\*.* is not a token of 8 or more/,
    );
  }
  assert.throws(() => at("admin: { read_token: abcdefgh }"), /needs a token beside read_token/);
  assert.throws(() => at("admin: { token: abcdefgh, read_token: abcdefgh }"), /are the same/);
});

test("a server that is listed again weighs more", () => {
  const { servers } = service("", "[a:1, b:1, a:1, { url: a:1, weight: 3 }]");
  assert.deepEqual(servers.map(({ name, weight }) => [name, weight]), [["a:1", 5], ["b:1", 1]]);
});

test("each strategy, and each way to hash, is understood", () => {
  const names = "round-robin first random two-choices least-connections least-response-time peak-ewma ip-hash".split(
    " ",
  );
  for (const name of names) {
    assert.deepEqual(service(`strategy: ${name}`).strategy, { name, by: "none", key: "" });
  }
  for (const by of ["header", "cookie", "query"]) {
    assert.deepEqual(service(`strategy: { hash: { ${by}: k } }`).strategy, { name: "hash", by, key: "k" });
  }
  assert.deepEqual(service("strategy: { hash: { path: true } }").strategy, { name: "hash", by: "path", key: "" });
});

test("health, eject and cors can be switched off and on", () => {
  assert.equal(service("health: off").health.kind, "off");
  assert.equal(service("eject: off").eject.failures, Infinity);
  assert.deepEqual(service("eject: {slow: off}").eject, { failures: 5, for: 30_000, slow: Infinity, at_most: 0.5 });
  assert.deepEqual(service("cors: off").cors.origin, []);
  assert.deepEqual(service("cors: {}").cors.origin, ["*"]);
  assert.deepEqual(service("health: { expect: [200, 300-399] }").health.expect, [[200, 200], [300, 399]]);
  assert.deepEqual(service("health: { expect: 204 }").health.expect, [[204, 204]]);
});

test("conditions of a route take their general form", () => {
  const { hosts, paths, methods, headers, query } = route(`{
    host: ["WWW.Example.com.", "*.example.com", "[::1]", 10.0.0.1],
    path: [/, /v1/, {exact: /a/}, {regex: "^/v[12]/"}], methods: [get, m-search],
    headers: { X-Beta: 1, x-version: 1.10, cookie: {regex: lb}, x-a: {present: false} }, query: { debug: true }, service: shop }`);
  assert.deepEqual(hosts, ["www.example.com", "*.example.com", "[::1]", "10.0.0.1"]);
  assert.deepEqual(paths, [
    { kind: "prefix", path: "" },
    { kind: "prefix", path: "/v1" },
    { kind: "exact", path: "/a/" },
    { kind: "regex", source: "^/v[12]/" },
  ]);
  assert.deepEqual(methods, ["GET", "M-SEARCH"]);
  assert.deepEqual(headers, [
    { name: "x-beta", kind: "is", value: "1" },
    { name: "x-version", kind: "is", value: "1.10" },
    { name: "cookie", kind: "regex", source: "lb" },
    { name: "x-a", kind: "present", present: false },
  ]);
  assert.deepEqual(query, [{ name: "debug", kind: "is", value: "true" }]);
});

const HINT =
  "is not a path such as /v1 (it begins with / and has no query): a segment is literal, or any one as :id or " +
  "{id}; /* ends a prefix; otherwise write ";
for (
  const [path, write] of [
    ["/api*", "{regex: '^/api'}"],
    ["/a/*/b", "/a/{any}/b"],
    ["*.php", "{regex: '[^/]+\\.php$'}"],
    ["/f/*.php", "{regex: '^/f/[^/]+\\.php$'}"],
    ["/f/**/x", "{regex: '^/f/.*/x$'}"],
    ["*", "/"],
    ["/f/:name.json", "{regex: '^/f/[^/]+\\.json$'}"],
    ["/f/{a,b}", "{regex: '^/f/(?:a|b)$'}"],
    ["/f/:", "{regex: '^/f/:$'}"],
    [{ exact: "/a/*" }, "{regex: '^/a/'}"],
  ] as const
) {
  test(`a path that looks like a pattern and is none is refused with what to write: ${JSON.stringify(path)}`, () => {
    const text = typeof path === "string" ? path : path.exact;
    const [first, ...more] = mistakes(`${SHOP}routes: [{ service: shop, path: ${JSON.stringify(path)} }]`);
    assert.deepEqual([first!.replace(/^.*?: /, "").replace(/^\S+: /, ""), more], [`"${text}" ${HINT}${write}`, []]);
    if (write.startsWith("{regex")) route(`{ service: shop, path: ${write} }`);
  });
}

for (
  const [path, write] of [
    ["= /a", "{exact: /a}"],
    ["^~ /a", "/a"],
    ["~ ^/a", "{regex: '^/a'}"],
    ["~* \\.php$", "{regex: '(?i)\\.php$'}"],
    ["/f/{rest...}", "/f"],
    ["/f/{*rest}", "/f"],
    ["/f/{**rest}", "/f"],
    ["/f/*rest", "/f"],
    ["/f/:rest*", "/f"],
    ["/f/[...rest]", "/f"],
    ["/*rest", "/"],
    ["/users/<int:id>/x", "/users/:id/x"],
    ["/users/[id]", "/users/:id"],
  ]
) {
  test(`a path as nginx and frameworks write it is refused with what to write: ${path}`, () => {
    const [said, ...more] = mistakes(`${SHOP}routes: [{ service: shop, path: ${JSON.stringify(path)} }]`);
    assert.deepEqual(more, []);
    assert.ok(said!.endsWith(`: write ${write}`), said);
    route(`{ service: shop, path: ${write} }`);
  });
}

for (
  const [path, write] of [
    ["^/api", "{regex: '^/api'}"],
    ["/api/.*", "/api"],
    ["/api/(.*)$", "/api"],
    ["^/.*", "/"],
    ["/api$", "{exact: /api}"],
    ["/v[12]/", "{regex: '^/v[12]/'}"],
    ["/v\\d+/x", "{regex: '^/v\\d+/x'}"],
    ["/a.+", "{regex: '^/a.+'}"],
    ["/f/{id:[0-9]+}/x", "{regex: '^/f/[0-9]+/x'}"],
    ["/(a|b)", "{regex: '^/(a|b)'}"],
  ]
) {
  test(`a regular expression in place of a path is refused with what to write: ${path}`, () => {
    const [said, ...more] = mistakes(`${SHOP}routes: [{ service: shop, path: ${JSON.stringify(path)} }]`);
    assert.deepEqual(more, []);
    assert.ok(said!.endsWith(`: a regular expression is {regex: ...}; write ${write}`), said);
    route(`{ service: shop, path: ${write} }`);
  });
}

test("a redirect is taken literally, and so what looks like a variable of other programs is refused", () => {
  for (const to of ["https://b.test$request_uri", "https://{host}/x", "/new/*", "/new/:id"]) {
    assert.match(
      mistakes(`default: { redirect: "${to}" }`).join(),
      /is not a URL or path to go to: it is taken literally; \{ host/,
    );
  }
});

test("paths of routes stand in the normal form of requests", () => {
  const paths = (...all: string[]) => route(JSON.stringify({ service: "shop", path: all })).paths;
  const normal = (...all: string[]) => paths(...all).map((rule) => rule.kind === "prefix" && rule.path);
  assert.deepEqual(normal("/api/*", "/api/**", "/*", "/a/", "/:a/{b}/"), ["/api", "/api", "", "/a", "/{a}/{b}"]);
  assert.deepEqual(normal("/caf%c3%a9", "/café", "/x%41", "/a|b", "/a%2fb"), [
    ...["/caf%C3%A9", "/caf%C3%A9", "/xA", "/a%7Cb", "/a%2Fb"],
  ]);
  for (const path of ["/100%", "/a%00", "/a\\b", "/%2e%2e/x", "/a/./b", "/\ud800"]) {
    assert.match(mistakes(JSON.stringify({ paths: [{ path, servers: ["a:1"] }] })).join(), /: no request has /, path);
  }
});

test("a rewrite takes no pattern, and the path of a probe may have a query", () => {
  for (const path of ["/v2/*", "/v2/:id", "/v2/{id}"]) {
    assert.match(mistakes(`${SHOP}default: { service: shop, rewrite: { path: "${path}" } }`).join(), /taken literally/);
  }
  assert.equal(service(`health: { path: "/health?standbyok=true" }`).health.path, "/health?standbyok=true");
});

test("a rewrite replaces what matched or the whole path, and strip is a rewrite to /", () => {
  const rewrite = (yaml: string) => route(`{ service: shop, rewrite: ${yaml} }`).rewrite;
  assert.deepEqual(rewrite("{}"), { kind: "none", path: "", host: "" });
  assert.deepEqual(rewrite("{ path: /v2/ }"), { kind: "replace", path: "/v2/", host: "" });
  assert.deepEqual(rewrite("{ path: / , host: x.y }"), { kind: "replace", path: "/", host: "x.y" });
  assert.deepEqual(rewrite("{ whole: /v2/ }"), { kind: "whole", path: "/v2/", host: "" });
  const { routes } = parseConfig("paths: [{ path: /p, servers: [a:1], strip: true }]");
  assert.deepEqual(routes[0]!.rewrite, { kind: "replace", path: "", host: "" });
});

test("a route may answer by itself", () => {
  const parts = { to: "", scheme: "", host: "", port: 0, path: "", status: 302 };
  assert.deepEqual(route("{ redirect: { to: 'https://x/y' } }").action, {
    kind: "redirect",
    ...parts,
    to: "https://x/y",
  });
  assert.deepEqual(route("{ redirect: { scheme: https, status: 308 } }").action, {
    ...{ kind: "redirect", ...parts, scheme: "https", status: 308 },
  });
  assert.deepEqual(route("{ respond: { status: 410, body: gone, headers: { X-A: b } } }").action, {
    ...{ kind: "respond", status: 410, body: "gone", headers: new Map([["x-a", "b"]]) },
  });
});

test("rules for headers are in lower case and in order", () => {
  const { request } = route(`{ service: shop, request: { headers: { set: { X-B: 1, X-A: "2" }, remove: [Cookie] } } }`);
  assert.deepEqual([...request.headers.set], [["x-b", "1"], ["x-a", "2"]]);
  assert.deepEqual(request.headers.remove, ["cookie"]);
});

test("environment variables are taken in values, several in one, and numbers count as numbers", () => {
  const text = `
listen: ["\${PORT}", "\${HOST}:\${PORT}"]
name_routes: \${YES}
default: { respond: { body: "$\${HOST} $5 $\${PORT}" } }`;
  const { listen, name_routes, routes } = parseConfig(text, { env: { PORT: "80", HOST: "h", YES: "true" } });
  assert.deepEqual(listen, [plain("", 80), plain("h", 80)]);
  assert.equal(name_routes, true);
  assert.deepEqual(routes[0]!.action.kind === "respond" && routes[0]!.action.body, "${HOST} $5 ${PORT}");
});

test("variables need no quotes in lists and maps, and bring in no YAML", () => {
  const { listen, routes } = parseConfig(
    "listen: [${A}, h:${A}]\ndefault: { respond: { body: ${B}, headers: { a: $${A} } } }",
    { env: { A: "80", B: "x, status: 500 }\n# " } },
  );
  assert.deepEqual(listen, [plain("", 80), plain("h", 80)]);
  const headers = new Map([["a", "${A}"]]);
  assert.deepEqual(routes[0]!.action, { kind: "respond", status: 200, body: "x, status: 500 }\n# ", headers });
});

test("name_routes puts the services under their names, after what was written and before default", () => {
  const { routes } = parseConfig(`
name_routes: true
services: { shop: { servers: [a:1] }, "a b": { servers: [a:1] }, a/b: { servers: [a:1] }, "..": { servers: [a:1] }, v1.2: { servers: [a:1] } }
paths: [{ path: /shop, service: v1.2 }]
default: { servers: [z:1] }`);
  const strip = { kind: "replace", path: "", host: "" }, keep = { ...strip, kind: "none" };
  assert.deepEqual(
    routes.map((
      { name, paths, rewrite, action },
    ) => [name, paths, rewrite, action.kind === "forward" && action.targets[0]!.service]),
    [
      ["/shop", [{ kind: "prefix", path: "/shop" }], keep, "v1.2"],
      ["/shop#2", [{ kind: "prefix", path: "/shop" }], strip, "shop"],
      ["/v1.2", [{ kind: "prefix", path: "/v1.2" }], strip, "v1.2"],
      ["default", [], keep, "default"],
    ],
  );
  assert.equal(parseConfig(SHOP + "name_routes: true").routes.length, 1);
  assert.equal(mistakes('services: { "a b": { servers: [a:1] } }\nname_routes: true').length, 1);
});

test("strategies of one's own are known by name, in every place, and others are refused with a guess", () => {
  const yaml = (name: string) =>
    `defaults: { strategy: ${name} }\nservices: { s: { servers: [a:1], strategy: ${name} } }\ndefault: { servers: [a:1], strategy: ${name} }`;
  const { services } = parseConfig(yaml("mine"), { strategies: { mine: () => {} } });
  assert.deepEqual([...services.values()].map(({ strategy }) => strategy.name), ["mine", "mine"]);
  const refused = mistakes(yaml("frist"));
  assert.equal(refused.length, 3);
  for (const line of refused) {
    assert.match(line, /"frist" is not a strategy \(round-robin, .*\); did you mean "first"\?$/);
  }
});

test("servers that share host and port are named by their URLs", () => {
  const { servers } = service("", "[http://x:443, https://x:443, http://x:443, y:1]");
  assert.deepEqual(servers.map(({ name, weight }) => [name, weight]), [["http://x:443", 2], ["https://x", 1], [
    "y:1",
    1,
  ]]);
});

test("no name is special: __proto__, constructor and prototype are services and headers like any other", () => {
  const names = ["__proto__", "constructor", "prototype", "services", "toString"];
  const { services, routes } = parseConfig(`
services: { ${names.map((name) => `${name}: { servers: [a:1] }`).join(", ")} }
routes:
  - split: { ${names.map((name, i) => `${name}: ${i}`).join(", ")} }
    headers: { ${names.map((name) => `${name}: ${name}`).join(", ")} }
  - service: __proto__`);
  assert.deepEqual([...services.keys()], names);
  const { action, headers } = routes[0]!;
  assert.deepEqual(action.kind === "forward" && action.targets.map((target) => target.service), names);
  assert.deepEqual(headers.map(({ name }) => name), names.map((name) => name.toLowerCase()));
});

// Where a key stands, keys and what is said of each; "key" alone: did you mean "key"?
const KEYS_OF_OTHERS: [
  where:
    | "top"
    | "service"
    | "server"
    | "sticky"
    | "queue"
    | "eject"
    | "path"
    | "health"
    | "route"
    | "limits"
    | "tls"
    | "cors",
  keys: string,
  said: string,
][] = [
  ["top", "upstream upstreams backend backends", "services"],
  ["top", "trusted_proxies set_real_ip_from", "trust"],
  ["top", "access_log logging", "log"],
  ["top", "port bind address", "listen"],
  ["top", "max_connections", "did you mean limits: { connections }?"],
  ["top", "retries timeouts", "KEY belongs to a service or a route"],
  ["top", "weight", "weight belongs to a server: { url, weight }"],
  ["service", "balance lb_policy algorithm", "strategy"],
  ["service", "healthcheck health_check check healthCheck", "health"],
  ["service", "circuit_breaker outlier_detection fail_timeout", "eject"],
  ["service", "max_fails", "eject"],
  ["service", "retry max_retries", "retries"],
  ["service", "max_connections maxconn max_conns", "max_in_flight"],
  ["service", "proxy_read_timeout read_timeout", "did you mean timeouts: { response }?"],
  ["service", "connect_timeout", "did you mean timeouts: { connect }?"],
  ["service", "gzip compression", "compress"],
  ["service", "session affinity stickiness cookie", "sticky"],
  ["service", "upstreams backends", "servers"],
  ["service", "weight", "weight belongs to a server: { url, weight }"],
  ["service", "interval", "interval belongs to health: { interval }"],
  ["service", "ca_file ca_cert", "ca belongs to tls: { ca }"],
  ["service", "insecure_skip_verify", "insecure belongs to tls: { insecure }"],
  ["service", "strip_prefix handle_path", "strip belongs to a route"],
  ["service", "allow_credentials", "credentials belongs to cors: { credentials }"],
  ["service", "name_routes", "name_routes belongs to the top of the file"],
  ["service", "backup_service", "fallback"],
  ["service", "queue_size", "queue"],
  ["route", "allow_methods", "allow_methods belongs to cors: { allow_methods }"],
  ["cors", "methods", "allow_methods"],
  ["service", "rate_limit ratelimit limit_req", "rate belongs to a route"],
  ["service", "whitelist allowlist", "allow belongs to a route"],
  ["server", "maxconn max_conns", "max"],
  ["server", "host_name wieght", '"host_name": did you mean "host"? "wieght": did you mean "weight"?'],
  ["server", "retries", "retries belongs to a service or a route"],
  ["health", "uri url", "path"],
  ["health", "status", "expect"],
  ["health", "unhealthy_threshold fails", "fall"],
  ["health", "healthy_threshold passes", "rise"],
  ["route", "rate_limit ratelimit limit_req", "rate"],
  ["route", "client_max_body_size max_body_size", "body_limit"],
  ["route", "strip_prefix stripPrefix strip-prefix", "strip"],
  ["route", "whitelist allowlist", "allow"],
  ["route", "blacklist denylist", "deny"],
  ["route", "code", "status belongs to redirect: { status } or respond: { status }"],
  ["route", "method", "methods"],
  ["route", "hsts", "write response: { headers: { set: { strict-transport-security: max-age=31536000 } } }"],
  [
    "route",
    "auth basic_auth",
    "nobody is asked for a password here: that is middleware of your own, with lb.ts as a library",
  ],
  ["route", "root file_server", "no files are served here: name a server that does, such as servers: [localhost:8081]"],
  ["limits", "max_connections", 'did you mean "connections"?'],
  ["tls", "certificate cert_file", "cert"],
  ["tls", "key_file", "key"],
  ["top", "workers threads worker_processes", "write --workers N on the command line"],
  ["top", "keepalive_timeout", "did you mean limits: { keep_alive }?"],
  ["top", "http", "what is in it stands at the top: services, routes and listen"],
  ["top", "stream", "tcp"],
  ["top", "LISTEN", "listen"],
  ["service", "backup", "backup belongs to a server: { url, backup }"],
  ["service", "passHostHeader preserve_host", "host_header"],
  ["service", "protocol", "http"],
  ["server", "port", 'the port belongs to the URL, as in { url: "10.0.0.1:8080" }'],
  ["server", "name", "a server's name is its host and port"],
  ["server", "max_fails", "eject belongs to a service"],
  ["health", "period inter", "interval"],
  ["health", "port", "servers are probed where they are asked"],
  ["health", "type", 'with path it is HTTP, with grpc: "" gRPC, else a TCP connect'],
  ["route", "priority", "the more specific route wins"],
  ["sticky", "name", "cookie"],
  ["sticky", "ttl", "max_age"],
  ["sticky", "secure sameSite", "it is HttpOnly and SameSite=Lax, over https also Secure"],
  ["queue", "max", "size"],
  ["eject", "max_fails", "failures"],
  ["path", "prefix", "a path alone is a prefix, as in path: /api"],
  ["path", "path_regexp", "regex"],
  ["cors", "allowed_origins", "origin"],
];
for (const [where, keys, said] of KEYS_OF_OTHERS) {
  for (const key of keys.split(" ")) {
    const place = (at: string) => at === where ? `, ${key}: 1` : "";
    const file = `services: { shop: { servers: [{ url: a:1${place("server")} }], health: { path: /${
      place("health")
    } }, cors: { max_age: 0s${place("cors")} }, sticky: { cookie: a${place("sticky")} }, queue: { size: 1${
      place("queue")
    } }, eject: { failures: 1${place("eject")} }${place("service")} } }
routes: [{ path: { exact: /a${place("path")} }, service: shop${place("route")} }]
limits: { requests: 1${place("limits")} }
listen: [{ address: 1, tls: { cert: c, key: k${place("tls")} } }]
${where === "top" ? `${key}: 1` : ""}`;
    const hint = said.includes('{ url: "') || said.includes('grpc: "')
      ? said
      : said.match(`"${key}": (did you mean "\\w+"\\?)`)?.[1] ??
        (/ /.test(said) ? said.replace("KEY", key) : `did you mean "${said}"?`);
    test(`in ${where}, ${key} is unknown: ${hint}`, () => {
      const [one, ...more] = mistakes(file);
      assert.deepEqual([one!.replace(/^\S+ \S+ /, ""), more], [`unknown key; ${hint}`, []]);
    });
  }
}

test("names of strategies are guessed by what other programs call them, and hash says what it needs", () => {
  const said = (name: string) => mistakes(`default: { servers: [a:1], strategy: ${name} }`).join().replace(/^.*; /, "");
  for (
    const [names, meant] of [
      ["leastconn least_conn", "least-connections"],
      ["rr roundrobin", "round-robin"],
      ["p2c", "two-choices"],
      ["ewma", "peak-ewma"],
      ["source client_ip", "ip-hash"],
    ] as const
  ) {
    for (const name of names.split(" ")) assert.equal(said(name), `did you mean "${meant}"?`);
  }
  assert.deepEqual(mistakes("default: { servers: [a:1], strategy: hash }"), [
    "1:38: default.strategy: hash needs what to hash, as in { hash: { header: x-user } }, or cookie, query, path: true, client: true",
  ]);
});

test("what is spelt alike is named at most three times", () => {
  const names = ["shop1", "shop2", "shop3", "shop4"].map((name) => `${name}: { servers: [a:1] }`).join(", ");
  assert.match(mistakes(`services: { ${names} }\ndefault: shop`).join(), /did you mean "shop1", "shop2" or "shop3"\?$/);
});

// Short forms beside `path: /x, service: shop` of a route or in a service: short, long.
const SHORT_FORMS: [short: string, long: string, where: "service" | "route" | "top"][] = [
  ["sticky: lb", "sticky: { cookie: lb }", "service"],
  ["health: /healthz", "health: { path: /healthz }", "service"],
  ["health: { path: /up, expect: 2xx }", "health: { path: /up, expect: 200-299 }", "service"],
  ["health: { expect: [204, 3xx] }", "health: { expect: [204, 300-399] }", "service"],
  ['cors: "*"', 'cors: { origin: "*" }', "service"],
  ["cors: [https://a.test, https://b.test]", "cors: { origin: [https://a.test, https://b.test] }", "service"],
  ["compress: gzip", "compress: true", "service"],
  ["queue: 7", "queue: { size: 7 }", "service"],
  ["rate: 5/s", "rate: { requests: 5, per: 1s }", "route"],
  ["rate: 100/10m", "rate: { requests: 100, per: 10m }", "route"],
  ["rewrite: /v2", "rewrite: { path: /v2 }", "route"],
  ["mirror: shop", "mirror: { service: shop, percent: 100 }", "route"],
  ["default: shop", "default: { service: shop }", "top"],
  ["default: { redirect: https://b.test/ }", "default: { redirect: { to: https://b.test/ } }", "top"],
  ["default: { respond: 404 }", "default: { respond: { status: 404 } }", "top"],
  ["default: { split: { shop: 90%, next: 10% } }", "default: { split: { shop: 90, next: 10 } }", "top"],
  ["admin: 9091", "admin: { listen: 127.0.0.1:9091 }", "top"],
  ["admin: localhost:9091", "admin: { listen: localhost:9091 }", "top"],
  ["default: { servers: [8081] }", "default: { servers: [localhost:8081] }", "top"],
  ["default: { servers: 8081 }", "default: { servers: localhost:8081 }", "top"],
  ['default: { servers: [{ url: "8081", max: 3 }] }', "default: { servers: [{ url: localhost:8081, max: 3 }] }", "top"],
];
for (const [short, long, where] of SHORT_FORMS) {
  test(`${short} is ${long}, and printed as that`, () => {
    const file = (keys: string) => {
      const service = where === "service" ? `, ${keys}` : "", route = where === "route" ? `, ${keys}` : "";
      return `services: { shop: { servers: [a:1]${service} }, next: { servers: [a:1] } }
routes: [{ path: /x, service: shop${route} }, { path: /y, service: next }]
${where === "top" ? keys : ""}`;
    };
    const one = parseConfig(file(short)), other = parseConfig(file(long));
    const known = ({ services, routes, admin }: typeof one) => ({ services, routes, admin });
    assert.deepEqual(known(one), known(other));
    if (!short.includes("split")) assert.deepEqual(one.source, parseConfig(printConfig(one)).source);
    if (!short.includes("split") && !short.startsWith("admin")) assert.deepEqual(one.source, other.source);
  });
}

test("off stays off where a name could stand, and a short form lies over defaults as a map does", () => {
  assert.equal(service("sticky: off").sticky.cookie, "");
  assert.deepEqual(service("cors: off").cors.origin, []);
  assert.equal(route("{ service: shop, mirror: off }").mirror.service, "");
  const { services } = parseConfig(
    `defaults: { health: { interval: 3s }, sticky: { secret: abc } }\n${
      SHOP.replace("]", "], health: /up, sticky: id")
    }default: shop`,
  );
  const { health, sticky } = services.get("shop")!;
  assert.deepEqual([health.path, health.interval], ["/up", 3000]);
  assert.deepEqual(sticky, { cookie: "id", secret: "abc", max_age: 0 });
});

const ONE_SENTENCE: [text: string, ...expected: string[]][] = [
  ["default: 404", "1:10: default.service: 404 is not a service (there is none); a status is { respond: 404 }"],
  ["default: php", '1:10: default.service: "php" is not a service (there is none)'],
  ["default: [php]", "1:10: default: a list is not a service, or a map such as { service: shop }"],
  [
    `${SHOP}default: { split: { shop: 90%, shop2: 20% } }`,
    '2:32: default.split.shop2: "shop2" is not a service (shop); did you mean "shop"?',
    "2:19: default.split: the percentages add up to 110%, not to 100%",
  ],
  [
    `${SHOP}default: { split: { shop: 90%, shop2: 20 } }`,
    '2:32: default.split.shop2: "shop2" is not a service (shop); did you mean "shop"?',
    "2:19: default.split: shares are all percentages, or all weights",
  ],
  [`${SHOP}default: { split: {} }`, "2:19: default.split: no service has a weight above 0"],
  [
    `${SHOP}routes: [{ host: [], path: [], allow: [], service: shop }]`,
    "2:18: routes[0].host: is empty: leave host out for any",
    "2:28: routes[0].path: is empty: leave path out for any",
    "2:39: routes[0].allow: is empty: leave allow out for any",
  ],
  [
    `${SHOP}routes: [{ methods: [GET|POST, ALL, "*"], service: shop }]`,
    '2:22: routes[0].methods[0]: "GET|POST" is not a method that can be forwarded, such as GET: write [GET, POST]',
    '2:32: routes[0].methods[1]: "ALL" is not a method that can be forwarded, such as GET: leave methods out for any',
    '2:37: routes[0].methods[2]: "*" is not a method that can be forwarded, such as GET: leave methods out for any',
  ],
  [
    `${SHOP}routes: [{ host: [_, .a.b, bücher.test], service: shop }]`,
    '2:19: routes[0].host[0]: "_" is not a host such as www.example.com or "*.example.com": leave host out for any',
    '2:22: routes[0].host[1]: ".a.b" is not a host such as www.example.com or "*.example.com": write [a.b, "*.a.b"]',
    '2:28: routes[0].host[2]: "bücher.test" is not a host such as www.example.com or "*.example.com": write xn--bcher-kva.test',
  ],
  [
    `${SHOP}default: { service: shop, request: { headers: { set: { a: $remote_addr, b: "{client_ip}", c: "%[src]" }, remove: [x-*] } } }`,
    ...["a", "b", "c"].map((name, i) =>
      `2:${[59, 76, 94][i]}: default.request.headers.set.${name}: "${
        ["$remote_addr", "{client_ip}", "%[src]"][i]
      }" would be sent as it is written: the only variables are \${NAME} of the environment`
    ),
    '2:115: default.request.headers.remove[0]: "x-*" is not a header name that a rule may change',
  ],
  [
    `${SHOP}routes: [{ headers: { x: "*" }, rewrite: /v2/$1, service: shop }]`,
    '2:26: routes[0].headers.x: "*" would be compared as it is written: for any value write {present: true}',
    "2:42: routes[0].rewrite.path: $1 is none of the groups of every path",
  ],
  [
    "listen: { address: 443, tls: [] }\ndefault: { servers: [a:1], host_header: backend, retry_on: 503 }",
    "1:30: listen.tls: is empty: without TLS leave it out",
    '2:41: default.host_header: "backend" is not keep, server or a host such as www.example.com: the server\'s own is called server',
    "2:60: default.retry_on: 503 is not a list such as [connect, 503]",
  ],
  [
    'default: { servers: [a:1], sticky: { cookie: "a b" }, strategy: { hash: { path: x } } }',
    '1:46: default.sticky.cookie: "a b" is not a cookie name',
    '1:81: default.strategy.hash.path: "x" is not true',
  ],
  [
    "default: { servers: [a:1\n",
    "2:1: ] is missing, or a line before it is not indented",
    "2:1: } is missing, or a line before it is not indented",
  ],
  ['log: "off\n', '2:1: " is missing at the end of a text'],
  ["listen: 80\n\0", "2:1: this is no key with a value, as in listen: 8080"],
  [
    "default: servers: [a:1]",
    "1:10: two keys stand on one line: an inner map has braces, or lines of its own",
  ],
  ["default:\n  servers: [a:1]\n health: /x", "3:1: the keys of a map begin in the same column"],
  ["[services]\ns = 1", "2:1: something stands behind the end of a value"],
  ["default: *shop", "1:10: default: *shop names nothing above; text that begins with * stands in quotes"],
  [
    `x-a: &a [*none]\nx-b: [*a, *a, *a]\n${ROUTE}`, // once, however often it is repeated
    "1:10: x-a[0]: *none names nothing above; text that begins with * stands in quotes",
  ],
  [
    "services: { shop: { <<: usual, servers: [a:1] } }\ndefault: shop",
    '1:25: services.shop["<<"]: "usual" is not a map, as in <<: *name',
  ],
  [
    "services: [{ name: shop }]\ndefault: shop",
    "1:11: services: a list is not a map such as { shop: { servers: [localhost:8081] } }",
  ],
  [`${SHOP}default: { redirect: b.test }`, '2:22: default.redirect: "b.test" is not a URL or path to go to'],
  [`${SHOP}default: { respond: 4040 }`, "2:21: default.respond: 4040 is not a whole number from 200 to 599"],
  [
    `${SHOP}default: { service: shop, mirror: shp }`,
    '2:35: default.mirror.service: "shp" is not a service (shop); did you mean "shop"?',
  ],
  [
    `${SHOP}default: { service: shop, rewrite: [/v2] }`,
    "2:36: default.rewrite: a list is not a path, or a map such as { path: /v2 }",
  ],
  [
    "default: { servers: [a:1], sticky: true }",
    "1:36: default.sticky: true is not off or the name of a cookie, or a map such as { cookie: lb }",
  ],
  [
    "default: { servers: [a:1], health: true }",
    "1:36: default.health: true is not off or a path, or a map such as { path: /healthz }",
  ],
  [
    "default: { servers: [70000] }",
    "1:22: default.servers[0]: 70000 is not a server such as localhost:8081 or http://localhost (no user, no path)",
  ],
];
for (const [text, ...expected] of ONE_SENTENCE) {
  test(`one sentence each: ${expected[0]}`, () => assert.deepEqual(mistakes(text).sort(), expected.sort()));
}

test("merge keys and x- keys are read as Compose reads them", () => {
  const { services } = parseConfig(`
x-usual: &usual { retries: 3, health: { path: /up, interval: 3s } }
x-other: &other { retries: 4, panic: 10% }
services:
  a: { <<: *usual, servers: [a:1] }
  b: { servers: [a:1], <<: [*usual, *other] }
  c: { <<: *usual, servers: [a:1], retries: 1, health: { path: /c } }
default: a`);
  const facts = [...services.values()].map((
    { retries, panic, health },
  ) => [retries, panic, health.path, health.interval]);
  assert.deepEqual(facts, [[3, 0.5, "/up", 3000], [3, 0.1, "/up", 3000], [1, 0.5, "/c", 10_000]]);
  assert.deepEqual(mistakes("x-a: &a { retires: 3 }\nservices: { a: { servers: [a:1],\n  <<: *a } }\ndefault: a"), [
    '1:11: services.a.retires: unknown key; did you mean "retries"?',
  ]);
  assert.deepEqual(mistakes(`${SHOP}default: shop\ny-a: 1`).length, 1);
});

test("an absolute name with its last dot is a server", () => {
  const [server] = service("", "[x.svc.cluster.local.:80]").servers;
  assert.deepEqual([server!.name, server!.url], ["x.svc.cluster.local.:80", "http://x.svc.cluster.local."]);
});

const EXAMPLES = "localhost:8081 or http://localhost (no user, no path)";
// Beside `default: { servers: [a:1], `: keys, mistakes as `column: path below default: message`.
const WRONG_KEYS: [keys: string, ...expected: string[]][] = [
  ["health: { interval: 5 sec }", '48: health.interval: "5 sec" is not a duration such as 500ms, 2s or 1m'],
  ["health: { interval: 5 }", "48: health.interval: 5 is not a duration such as 500ms, 2s or 1m"],
  [
    "health: { interval: 0s }",
    '48: health.interval: "0s" is not a duration such as 500ms, 2s or 1m: more than 0 and at most 1d',
  ],
  ["eject: { slow: 1 }", "43: eject.slow: 1 is not a number from 1.1 to 1000"],
  ["eject: { slow: none }", '43: eject.slow: "none" is not off or a number from 1.1 to 1000'],
  ["eject: { for: 25h }", '42: eject.for: "25h" is not a duration such as 500ms, 2s or 1m: more than 0 and at most 1d'],
  ["timeouts: [1]", "38: timeouts: a list is not a map such as { connect: 3s }"],
  ["timeouts: []", "38: timeouts: a list is not a map such as { connect: 3s }"],
  [
    "retry_on: [conect, 200, 502]",
    '39: retry_on[0]: "conect" is not connect, reset, unavailable, or 400 to 599',
    "47: retry_on[1]: 200 is not a whole number from 400 to 599",
  ],
  ["rate: 5", "34: rate: 5 is not a rate such as 5/s, or a map such as { requests: 5, per: 1s }"],
  ["rate: {}", "34: rate: requests is missing"],
  ["rate: { requests: 1, by: cookie }", '53: rate.by: "cookie" is not ip or {header: name}'],
  ["hedge: p49", '35: hedge: "p49" is not a share such as p95, from p50 to p99'],
  ["hedge: 95", "35: hedge: 95 is not a share such as p95, from p50 to p99"],
  ["queue: 0", "35: queue: 0 is not a whole number from 1 to 100000"],
  ["queue: some", '35: queue: "some" is not off or how many wait, or a map such as { size: 100 }'],
  ["queue: { size: 0 }", "43: queue.size: 0 is not a whole number from 1 to 100000"],
  ["max_in_flight: 0", "43: max_in_flight: 0 is not a whole number from 1 to 1000000"],
  ["max_in_flight: car", '43: max_in_flight: "car" is not auto, none or a whole number from 1 to 1000000'],
  ["host_header: a b", '41: host_header: "a b" is not keep, server or a host such as www.example.com'],
  ...["upstream", '"{upstream_hostport}"', "$proxy_host"].map((host): [string, string] => [
    `host_header: ${host}`,
    `41: host_header: "${
      host.replaceAll('"', "")
    }" is not keep, server or a host such as www.example.com: the server's own is called server`,
  ]),
  [
    "host_header: $host",
    '41: host_header: "$host" is not keep, server or a host such as www.example.com: the client\'s is called keep',
  ],
  [
    "strategy: robin",
    '38: strategy: "robin" is not a strategy (round-robin, first, random, two-choices, least-connections, least-response-time, peak-ewma, ip-hash)',
  ],
  [
    "strategy: { hash: { header: a, cookie: b } }",
    "46: strategy.hash: needs exactly one of header, cookie, query, path, client",
  ],
  ["cors: on", '34: cors: "on" is not an origin such as https://a.example, https://*.example or "*"'],
  [
    "cors: { origin: https://a.test/ }",
    '44: cors.origin: "https://a.test/" is not an origin such as https://a.example, https://*.example or "*"',
  ],
  ["sticky: on", '36: sticky: "on" is not the name of a cookie, or a map such as { cookie: lb }'],
  ["cors: { credentials: true }", "34: cors: credentials need origins by name, not *"],
  ["health: { path: up }", '44: health.path: "up" is not a path such as /healthz (it begins with /)'],
  ["health: { expect: [399-200] }", '47: health.expect[0]: "399-200" is not a status such as 200, 2xx, or 200-399'],
  ["panic: 50", "35: panic: 50 is not a percentage from 0% to 100%"],
  ["panic: 101%", '35: panic: "101%" is not a percentage from 0% to 100%'],
  ["retries: 11", "37: retries: 11 is not a whole number from 0 to 10"],
  ["retries: 1.5", "37: retries: 1.5 is not a whole number from 0 to 10"],
  ["compress: yes", '38: compress: "yes" is not true, false or gzip'],
  ["tls: { cert: c.pem }", "33: tls: needs cert and key together"],
];
// file, mistakes
const WRONG: [text: string, ...expected: string[]][] = [
  ...WRONG_KEYS.map(([keys, ...expected]): [string, ...string[]] => [
    `default: { servers: [a:1], ${keys} }`,
    ...expected.map((line) => line.replace(" ", " default.").replace(/^/, "1:")),
  ]),
  ["", "1:1: the file is empty"],
  ["# nothing\n", "1:1: the file is empty"],
  ["[1]", "1:1: a list is not a map such as { listen: 8080 }"],
  ["listen: 80", "1:1: no way leads to a server: write default: shop, or hosts, paths, routes or tcp"],
  [
    "services: { web: { servers: [a:1] } }",
    "1:1: no way leads to a server: write default: web, or hosts, paths, routes or tcp",
  ],
  [
    `${ROUTE}listn: 1\nworker: {}\n`,
    '2:1: listn: unknown key; did you mean "listen"?',
    "3:1: worker: unknown key; allowed: listen, admin, trust, resolvers, limits, log, name_routes, defaults, services, hosts, paths, routes, default, tcp, fleet",
  ],
  [
    `${ROUTE}__proto__: 1\nconstructor: 1`,
    "2:1: __proto__: unknown key; allowed: listen, admin, trust, resolvers, limits, log, name_routes, defaults, services, hosts, paths, routes, default, tcp, fleet",
    "3:1: constructor: unknown key; allowed: listen, admin, trust, resolvers, limits, log, name_routes, defaults, services, hosts, paths, routes, default, tcp, fleet",
  ],
  [
    "default: { servers: [{ url: a:1, wieght: 2 }] }",
    '1:34: default.servers[0].wieght: unknown key; did you mean "weight"?',
  ],
  [
    "default: { servers: [{ weight: x }] }",
    '1:32: default.servers[0].weight: "x" is not a whole number from 0 to 256',
  ],
  [
    `services: { shop: { servers: [a:1], cors: { origin: "https://a.example", credentials: true } } }
routes: [{ path: /x, service: shop, cors: "*" }]
default: shop`,
    "2:43: routes[0].cors: credentials need origins by name, not *",
  ],
  [
    `defaults: { cors: { origin: "https://a.example", credentials: true } }
services: { shop: { servers: [a:1], cors: "*" } }
default: shop`,
    "2:43: services.shop.cors: credentials need origins by name, not *",
  ],
  ["default: { servers: [] }", "1:21: default.servers: is empty: it needs a server"],
  ["default: { servers: }", "1:21: default.servers: an empty value is not a server, or a list of them"],
  ["default: { servers: [{ url: a:1, weight: 0 }] }", "1:21: default.servers: needs a server with a weight above 0"],
  [
    "default: { servers: [a:1, { url: a:1, backup: true }] }",
    "1:21: default.servers: http://a:1 stands twice with different host, backup, max or state",
  ],
  ...[
    ...[
      "localhost",
      ":80",
      "http://",
      "10.0.0.999:80",
      "data:x,y",
      "a:0",
      "a:65536",
      "foo.0x4:80",
      "file:///etc/passwd",
    ],
    ...["http://a:1/path", "http://a:1?x", "[10.0.0.1]:80", "me:s/e@a:1", "http://me:secret@a:1"],
  ].map((server): [string, string] => [
    `default: { servers: ["${server}"] }`,
    `1:22: default.servers[0]: "${server.replace(/me:.*@/, "***@")}" is not a server such as ${EXAMPLES}`,
  ]),
  [
    `${ROUTE}listen: "[::1:81"`,
    '2:9: listen: "[::1:81" is not a port, or an address such as 127.0.0.1:8080 or [::]:8080, or unix:/run/lb.sock',
  ],
  [
    `${ROUTE}listen: 65536`,
    "2:9: listen: 65536 is not a port, or an address such as 127.0.0.1:8080 or [::]:8080, or unix:/run/lb.sock",
  ],
  [`${ROUTE}listen: []`, "2:9: listen: is empty: nobody could ask"],
  [`${ROUTE}listen: { address: 1, tls: { cert: c } }`, "2:28: listen.tls: key is missing"],
  [
    `${ROUTE}listen: [80, { address: 1, clientca: x }]`,
    '2:28: listen[1].clientca: unknown key; did you mean "client_ca"?',
  ],
  [`${ROUTE}listen: { address: 1, client_ca: c }`, "2:9: listen: client_ca needs tls"],
  [`${ROUTE}listen: { address: 1, tls: { cert: "", key: k } }`, "2:36: listen.tls.cert: the name of the file is empty"],
  [`${ROUTE}routes: [{ scheme: ftp, respond: {} }]`, '2:20: routes[0].scheme: "ftp" is not one of http, https'],
  [
    `${ROUTE}trust: [10.0.0.0/33, 1.2.3, "fe80::1%eth0"]`,
    '2:9: trust[0]: "10.0.0.0/33" is not an address or a network such as 10.0.0.0/8',
    '2:22: trust[1]: "1.2.3" is not an address or a network such as 10.0.0.0/8',
    '2:29: trust[2]: "fe80::1%eth0" is not an address or a network such as 10.0.0.0/8',
  ],
  [
    `${ROUTE}limits: { header_size: 1023, header_fields: 0 }`,
    "2:24: limits.header_size: 1023 is not a size such as 64KiB, from 1KiB to 1MiB",
    "2:45: limits.header_fields: 0 is not a whole number from 1 to 10000",
  ],
  [
    `${ROUTE}limits: { header_size: 1MiB, header_fields: 10001 }`,
    "2:45: limits.header_fields: 10001 is not a whole number from 1 to 10000",
  ],
  [
    `${ROUTE}limits: { header_size: 2MiB }`,
    '2:24: limits.header_size: "2MiB" is not a size such as 64KiB, from 1KiB to 1MiB',
  ],
  [`${ROUTE}log: xml`, '2:6: log: "xml" is not combined, json or off, or a map such as { format: json, sample: 10% }'],
  [`${ROUTE}log: { format: xml }`, '2:16: log.format: "xml" is not one of combined, json, off'],
  [`${ROUTE}log: { sample: 2 }`, "2:16: log.sample: 2 is not a percentage from 0% to 100%"],
  [`${ROUTE}log: { sampel: 1% }`, '2:8: log.sampel: unknown key; did you mean "sample"?'],
  [
    `${ROUTE}defaults: { servers: [a:1] }`,
    "2:13: defaults.servers: unknown key; servers belongs to a service or a route",
  ],
  ["upstreams: { app: {} }", '1:1: upstreams: unknown key; did you mean "services"?'],
  [
    "http: {}",
    "1:1: http: unknown key; what is in it stands at the top: services, routes and listen",
  ],
  [
    `${SHOP}routes: [{ path: /, proxy_pass: http://shop }]`,
    '2:21: routes[0].proxy_pass: unknown key; did you mean "service"?',
  ],
  [
    "services: { api: [a:1] }\ndefault: api",
    "1:18: services.api: a list is not a map such as { servers: [localhost:8081] }",
  ],
  [`${SHOP}routes: { /a: shop }`, "2:9: routes: a map is not a list such as [{ path: /api, service: shop }]"],
  [`${ROUTE}hosts: { host: a }`, "2:8: hosts: a map is not a list such as [{ host: a.example, service: shop }]"],
  [`${ROUTE}services: [a]`, "2:11: services: a list is not a map such as { shop: { servers: [localhost:8081] } }"],
  [`${ROUTE}hosts: [{ servers: [a:1] }]`, "2:9: hosts[0]: host is missing"],
  [`${ROUTE}paths: [{ servers: [a:1] }]`, "2:9: paths[0]: path is missing"],
  [`${SHOP}hosts: [{ host: a.b }]`, "2:9: hosts[0]: needs exactly one of service, servers, split, redirect, respond"],
  [
    `${SHOP}hosts: [{ host: a.b, service: shop, servers: [a:1] }]`,
    "2:9: hosts[0]: needs exactly one of service, servers, split, redirect, respond, not service and servers",
  ],
  [`${SHOP}default: { service: shpo }`, '2:21: default.service: "shpo" is not a service (shop); did you mean "shop"?'],
  [`${SHOP}default: { service: other }`, '2:21: default.service: "other" is not a service (shop)'],
  ["default: { service: other }", '1:21: default.service: "other" is not a service (there is none)'],
  [
    `${SHOP}default: { split: { shop: 1, next: 2 } }`,
    '2:30: default.split.next: "next" is not a service (shop)',
  ],
  [`${SHOP}default: { split: { shop: 0 } }`, "2:19: default.split: no service has a weight above 0"],
  [
    `${SHOP}default: { service: shop, strategy: first }`,
    "2:27: default.strategy: belongs to a service: it stands there, or beside servers",
  ],
  [
    `${SHOP}routes: [{ name: a, service: shop }, { name: a, service: shop }]`,
    '2:46: routes[1].name: "a" names another route already',
  ],
  [
    `${SHOP}paths: [{ path: /a, service: shop, strip: true, rewrite: {} }]`,
    "2:36: paths[0].strip: strip and rewrite exclude each other",
  ],
  [
    `${SHOP}routes: [{ path: { regex: "^/(a)" }, service: shop, rewrite: { path: "/$2" } }]`,
    "2:70: routes[0].rewrite.path: $2 is none of the groups of every path",
  ],
  [
    `${SHOP}paths: [{ path: /a/../b, service: shop }]`,
    '2:17: paths[0].path: "/a/../b" is not a path such as /v1 (it begins with / and has no query): no request has . or .. in its path',
  ],
  [
    `${SHOP}routes: [{ host: ["*", a.*.b, "*.1.2.3.4"], service: shop }]`,
    ...['19: routes[0].host[0]: "*"', '24: routes[0].host[1]: "a.*.b"', '31: routes[0].host[2]: "*.1.2.3.4"'].map((
      at,
    ) =>
      `2:${at} is not a host such as www.example.com or "*.example.com"${
        at.endsWith(`"*"`) ? ": leave host out for any" : ""
      }`
    ),
  ],
  [
    `${SHOP}hosts: [{ host: "*.a.test:8080", service: shop }]`,
    '2:17: hosts[0].host: "*.a.test:8080" is not a host such as www.example.com or "*.example.com": routes match hosts on all ports; write *.a.test',
  ],
  [
    `${SHOP}routes: [{ path: v1, service: shop }]`,
    '2:18: routes[0].path: "v1" is not a path such as /v1 (it begins with / and has no query)',
  ],
  [
    `${SHOP}routes: [{ path: [/v1?x, { exact: /a, regex: b }], service: shop }]`,
    '2:19: routes[0].path[0]: "/v1?x" is not a path such as /v1 (it begins with / and has no query)',
    "2:26: routes[0].path[1]: needs exactly one of exact, regex",
  ],
  [
    `${SHOP}routes: [{ path: { exat: /a }, service: shop }]`,
    '2:20: routes[0].path.exat: unknown key; did you mean "exact"?',
  ],
  [
    `${SHOP}routes: [{ path: { regex: "(?=a)b" }, service: shop }]`,
    '2:27: routes[0].path.regex: "(?=a)b" is not a regular expression (RE2): invalid or unsupported Perl syntax',
  ],
  [
    `${SHOP}routes: [{ path: { regex: "a(" }, service: shop }]`,
    '2:27: routes[0].path.regex: "a(" is not a regular expression (RE2): missing closing )',
  ],
  [
    `${SHOP}routes: [{ methods: [GET, TRACE], service: shop }]`,
    '2:27: routes[0].methods[1]: "TRACE" is not a method that can be forwarded, such as GET',
  ],
  [
    `${SHOP}routes: [{ headers: { "a b": x, X: 1, x: 2 }, service: shop }]`,
    '2:23: routes[0].headers["a b"]: "a b" is not a header name',
    '2:39: routes[0].headers.x: "x" stands twice',
  ],
  [
    `${SHOP}routes: [{ query: { a: { present: 1 } }, service: shop }]`,
    "2:35: routes[0].query.a.present: 1 is not true or false",
  ],
  [
    `${SHOP}default: { service: shop, request: { headers: { set: { x: "a\\r\\nb" }, remove: [Host] } } }`,
    '2:59: default.request.headers.set.x: "a\\r\\nb" cannot stand in a header',
    '2:80: default.request.headers.remove[0]: "Host" is not a header name that a rule may change',
  ],
  [
    `${SHOP}default: { service: shop, response: { headers: { add: { Content-Length: 1 } } } }`,
    '2:57: default.response.headers.add.Content-Length: "Content-Length" is not a header name that a rule may change',
  ],
  [
    `${SHOP}default: { service: shop, request: { headers: { set: { x-api-key: "hunter2\\n2" } } } }`,
    "2:67: default.request.headers.set.x-api-key: *** cannot stand in a header",
  ],
  [
    `${SHOP}routes: [{ headers: { x-token: { regex: "hunter2(" } }, service: shop }]`,
    "2:41: routes[0].headers.x-token.regex: *** is not a regular expression (RE2): missing closing )",
  ],
  [
    `${SHOP}default: { service: shop, rewrite: { path: /a, whole: /b } }`,
    "2:36: default.rewrite: path and whole exclude each other",
  ],
  [
    `${SHOP}default: { service: shop, body_limit: big }`,
    '2:39: default.body_limit: "big" is not a size such as 512kB, 10MB, 1MiB, a number of bytes, or none',
  ],
  [
    "default: { respond: 200, cors: { origin: '*' } }",
    "1:26: default.cors: is for answers of servers: a respond has headers of its own under response",
  ],
  ["default: { redirect: {} }", "1:22: default.redirect: needs either to or its parts"],
  [
    "default: { redirect: { to: /a, path: /b } }",
    "1:22: default.redirect: needs either to or its parts",
  ],
  [
    'default: { redirect: { to: "/a\\nb", status: 200 } }',
    '1:28: default.redirect.to: "/a\\nb" is not a URL or path to go to',
    "1:45: default.redirect.status: 200 is not one of 301, 302, 303, 307, 308",
  ],
  ["default: { respond: { status: 204, body: x } }", "1:21: default.respond: an answer with this status has no body"],
  ["default: { respond: { status: 101 } }", "1:31: default.respond.status: 101 is not a whole number from 200 to 599"],
  ["default: { respond: { body: [x] } }", "1:29: default.respond.body: a list is not text"],
  [`${ROUTE}log: \${NOPE}`, "2:6: log: the environment variable NOPE is not set"],
  [`${ROUTE}log: \${A:-b}`, '2:6: log: "${A:-b}" is not a variable such as ${NAME}; ${ itself is written $${'],
  [`${ROUTE}log: \${toString}`, "2:6: log: the environment variable toString is not set"],
  [`${ROUTE}log: json\nlog: off`, "3:1: log: stands twice"],
  [
    `${SHOP}default: { service: "\${NOPE}" }`,
    "2:21: default.service: the environment variable NOPE is not set",
  ],
  [`${ROUTE}? [a]\n: 1`, "2:3: a key is a single word"],
  [
    "hosts: [{ host: *.a.com, servers: [a:1] }]",
    "1:17: hosts[0].host: *.a.com names nothing above; text that begins with * stands in quotes",
  ],
  [
    `default: { respond: { body: "${"x".repeat(99)}", status: "${"y".repeat(99)}" } }`,
    `1:140: default.respond.status: "${"y".repeat(56)}..." is not a whole number from 200 to 599`,
  ],
];
for (const [text, ...expected] of WRONG) {
  const [first] = expected;
  test(`refused with its place: ${first!.slice(0, 120)} (${text.length})`, () =>
    assert.deepEqual(mistakes(text), expected));
}

test("a listen without an address is told beside the other mistakes of a file", () => {
  const found = mistakes("listen: []\ndefault: { servers: [a:1], retries: x }");
  assert.deepEqual(found.map((line) => line.split(" ").slice(0, 2).join(" ")), [
    "1:9: listen:",
    "2:37: default.retries:",
  ]);
});

test("all mistakes of a file are told at once, in the order of the file", () => {
  const found = mistakes(`
services:
  shop: { servers: [a:0], helth: {}, retires: 2 }
log: \${NOPE}
hosts: [{ host: a b, service: ship }]
`);
  assert.deepEqual(found.map((line) => line.split(" ").slice(0, 2).join(" ")), [
    "3:21: services.shop.servers[0]:",
    "3:27: services.shop.helth:",
    "3:38: services.shop.retires:",
    "4:6: log:",
    "5:17: hosts[0].host:",
    "5:31: hosts[0].service:",
  ]);
});

test("what is not YAML is an error with its line", () => {
  for (
    const text of ["a: [", "a: 1\n b: 2", "\tlisten: 80", "a: 'x", "{", '{"a": 1', "a: !foo 1\nb", "a: 1\n---\nb: 1"]
  ) {
    assert.match(mistakes(text)[0] ?? "", /^[12]:\d+: \S/, text);
  }
});

test("files that would take memory or time are refused", () => {
  const bomb = "abcdefgh".split("").map((name, i) =>
    `${name}: &${name} [${i ? Array(10).fill(`*${"abcdefgh"[i - 1]}`) : 1}]`
  );
  for (
    const [text, why] of [
      [`# ${"x".repeat(2 ** 20)}`, "1:1: the file is larger than 1 MiB"],
      [bomb.join("\n"), "1:1: more than 100000 values"],
      ["[".repeat(20_000), "1:1: nested deeper than 32 levels"],
      ["- ".repeat(20_000), "1:1: nested deeper than 32 levels"],
    ] as const
  ) assert.deepEqual(mistakes(text), [why]);
  assert.match(mistakes(`default: ${"[".repeat(40)}${"]".repeat(40)}`).join(), /nested deeper than 32 levels/);
  assert.match(mistakes("a: &a [*a]").join(), /nested deeper than 32 levels/);
});

test("a file is parsed once, and its expressions are compiled once to check them and once to count their groups", () => {
  const { compose } = Composer.prototype, { compile } = RE2JS;
  const calls = { parsed: 0, compiled: 0 };
  Composer.prototype.compose = function (...given) {
    calls.parsed++;
    return compose.apply(this, given);
  };
  RE2JS.compile = (...given) => {
    calls.compiled++;
    return compile.apply(RE2JS, given);
  };
  try {
    parseConfig(`${SHOP}routes: [{ path: { regex: ^/a }, service: shop }]`);
  } finally {
    Composer.prototype.compose = compose;
    RE2JS.compile = compile;
  }
  assert.deepEqual(calls, { parsed: 1, compiled: 2 });
});

test("aliases work within reason", () => {
  const { services } = parseConfig("services: { a: &a { servers: [x:1] }, b: *a }\ndefault: { service: b }");
  assert.deepEqual(services.get("a"), services.get("b"));
});

test("the error carries its mistakes and the name of the file", () => {
  assert.throws(() => parseConfig("listn: 1\n" + ROUTE, { file: "x.yml" }), (error: unknown) => {
    assert.ok(error instanceof ConfigError);
    assert.equal(error.message, 'x.yml:1:1: listn: unknown key; did you mean "listen"?');
    assert.deepEqual(error.mistakes, [
      { line: 1, column: 1, path: "listn", message: 'unknown key; did you mean "listen"?' },
    ]);
    return true;
  });
});

// Routes of services `shop` and `next`, and what is warned of.
const UNREACHED: [routes: string, ...expected: string[]][] = [
  [
    "[{ path: /a, service: shop }, { path: /a/, service: next }]",
    "routes[1]: can never be reached: routes[0] takes all of its requests",
  ],
  ["[{ path: /a, service: shop }, { path: /a/b, service: next }]"],
  ["[{ path: /a, service: shop, methods: [GET] }, { path: /a, service: next }]"],
  ["[{ path: /a, service: shop }, { path: /a, service: next, methods: [GET] }]"],
  [
    "[{ path: /a, service: shop, methods: [GET, PUT] }, { path: /a, service: next, methods: [PUT] }]",
    "routes[1]: can never be reached: routes[0] takes all of its requests",
  ],
  ["[{ path: /a, service: shop, methods: [GET] }, { path: /a, service: next, methods: [PUT] }]"],
  ["[{ path: /a, service: shop, headers: { a: b } }, { path: /a, service: next, headers: { a: c } }]"],
  [
    "[{ path: /a, service: shop, headers: { a: b }, query: { c: d } }, { path: /a, service: next, headers: { a: b }, query: { c: d } }]",
    "routes[1]: can never be reached: routes[0] takes all of its requests",
  ],
  [
    "[{ path: /u/:id, service: shop }, { path: /u/:name, service: next }]",
    "routes[1]: can never be reached: routes[0] takes all of its requests",
  ],
  ["[{ path: /u/:id, service: shop }, { path: /u/me, service: next }]"],
  [
    "[{ path: /, service: shop }, { path: { regex: ^/api/ }, service: next }]",
    "routes[1]: can never be reached: routes[0] takes all of its requests",
  ],
  [
    "[{ path: /api, service: shop }, { path: { regex: '^/api/v[12]/' }, service: next }]",
    "routes[1]: can never be reached: routes[0] takes all of its requests",
  ],
  ["[{ path: /api, service: shop }, { path: { regex: ^/api/* }, service: next }, { path: { regex: '^/api/|^/b' }, service: next }, { path: { regex: ^/ap }, service: next }]"],
  ["[{ path: /a, service: shop }, { host: a.b, path: /a, service: next }, { host: '*.b', path: /a, service: next }]"],
  [
    "[{ host: a.b, service: shop }, { host: A.b., path: /, service: next }]",
    "routes[1]: can never be reached: routes[0] takes all of its requests",
  ],
  ["[{ path: [/a, /b], service: shop }, { path: [/a, /c], service: next }]"],
  [
    "[{ path: /a, service: shop }, { path: /b, service: shop }, { path: [/a, /b], service: next }]",
    "routes[2]: can never be reached: routes[0] and routes[1] take all of its requests",
  ],
  ["[{ scheme: http, redirect: { scheme: https } }, { path: /a, service: shop }, { path: /b, service: next }]"],
  [
    "[{ scheme: http, redirect: { scheme: https } }, { host: '*.b', scheme: https, service: shop }, { host: a.b, path: /b, service: next }]",
    "routes[2]: can never be reached: routes[0] and routes[1] take all of its requests",
  ],
  ["[{ scheme: https, service: shop }, { scheme: http, path: /b, service: next }]"],
  ["[{ service: shop }]\ndefault: next", "default: can never be reached: routes[0] takes all of its requests"],
  ["[{ path: /x, service: shop }]\ndefault: next"],
  ["[{ path: /x, service: shop }]", "services.next: nothing leads to this service"],
  [
    "[{ path: /x, respond: 404, rewrite: /y, mirror: off }, { path: /y, redirect: /z, strip: true }]\nname_routes: true",
    "routes[0].rewrite: has no effect: a respond asks no server",
    "routes[1].strip: has no effect: a redirect asks no server",
  ],
  ["[{ path: /x, service: shop, mirror: next }]"],
  [
    "[{ path: /v:version, service: shop }, { path: { exact: /things:cancel }, service: next }]",
    'routes[0].path: "/v:version" has its colon literally: any one segment is :id or {id}',
  ],
  ["[{ path: /x, split: { shop: 1, next: 0 } }]"],
  ["[{ path: /x, service: shop }]\nname_routes: true"],
  ["[{ path: /shop, service: shop }]\nname_routes: true"],
];
for (const [routes, ...expected] of UNREACHED) {
  test(`${expected.join() || "no warning"}: ${routes}`, () => {
    const { warnings } = parseConfig(
      `services: { shop: { servers: [a:1] }, next: { servers: [b:1] } }\nroutes: ${routes}`,
    );
    assert.deepEqual(warnings.map((line) => line.replace(/^routes\.yml:\d+:\d+: /, "")), expected);
  });
}

test("a service that others fall back to is led to, and a warning has its place", () => {
  const { warnings } = parseConfig(`services:
  shop: { servers: [a:1], fallback: next }
  next: { servers: [a:1], fallback: last }
  last: { servers: [a:1] }
  spare: { servers: [a:1] }
default: shop`);
  assert.deepEqual(warnings, ["routes.yml:5:3: services.spare: nothing leads to this service"]);
});

test("a secret that is short enough to be guessed is warned of, and not shown", () => {
  const warningsFor = (sticky: string) => parseConfig(`default: { servers: [a:1], sticky: ${sticky} }`).warnings;
  assert.deepEqual(warningsFor("{ cookie: lb, secret: fifteen-letters }"), [
    "routes.yml:1:58: default.sticky.secret: has fewer than 16 characters and can be guessed: " +
    "openssl rand -hex 16 makes a longer one",
  ]);
  for (const fine of ["{ cookie: lb, secret: sixteen--letters }", "lb", "off"]) assert.deepEqual(warningsFor(fine), []);
});

const FULL = `
listen: [8080, "[::1]:81", { address: 8443, tls: { cert: c.pem, key: k.pem }, client_ca: ca.pem }]
trust: [10.0.0.0/8, "::1"]
log: json
name_routes: true
defaults: { retries: 0, timeouts: { connect: 1500ms } }
services:
  shop:
    servers: [localhost:8081, { url: "https://b.internal:8443", weight: 3, host: b.internal, max: 200, backup: true }]
    strategy: { hash: { cookie: lb } }
    health: { path: /healthz, interval: 90s, expect: [200, 300-399], body: ok, headers: { x-a: "1" }, method: HEAD }
    eject: { failures: 9, for: 1h, at_most: 33.3% }
    panic: 0%
    retry_on: []
    hedge: p99
    max_in_flight: 7
    queue: { size: 1, timeout: 2m }
    tls: { ca: ca.pem, cert: c.pem, key: k.pem, servername: x, insecure: true }
    cors: { origin: "https://x", credentials: true, allow_methods: [], max_age: 10m }
  constructor: { servers: [a:1], health: off, eject: off, queue: off, strategy: { hash: { path: true } }, timeouts: { idle: 1d } }
hosts: [{ host: "*.a.com", servers: [a:1], compress: true }]
paths: [{ path: /, service: shop, strip: true }]
routes:
  - { split: { shop: 90, constructor: 10 }, timeouts: { response: 5s }, cors: off, retries: 4, retry_on: [502] }
  - { path: [{ exact: /a }, { regex: ^/b$ }], methods: [GET], headers: { a: { regex: x }, b: "" }, query: { c: { present: true } }, service: shop }
  - { redirect: { host: x.y, port: 81 }, compress: true, allow: [10.0.0.0/8], deny: ["::/0"], body_limit: 1MiB, rate: { requests: 5, by: { header: X-Key } } }
  - { respond: { body: "$\${X} 1", status: 410, headers: { a: b } }, response: { headers: { set: { a: "1.10" }, remove: [b] } } }
  - { service: shop, rewrite: { whole: /x, host: y.z }, request: { query: { set: { a: "" }, remove: [b] } }, host_header: server }
default: { servers: [z:1], cors: {} }
tcp:
  - { listen: 5432, servers: [a:1, b:1], strategy: ip-hash, timeouts: { idle: 1h } }
  - { listen: ["[::1]:25", 26], name: mail, servers: [m:25], proxy_protocol: true, allow: 10.0.0.0/8, deny: 10.0.0.1 }
`;

/** What of a config depends on how its file is written. */
const PLACES = { text: "", written: {}, warnings: [] };

test("what is printed is read again as the same config", () => {
  for (const text of [FULL, ROUTE, SHOP + "default: { split: { shop: 1 }, cors: {} }"]) {
    const config = parseConfig(text);
    assert.deepEqual({ ...parseConfig(printConfig(config)), ...PLACES }, { ...config, ...PLACES });
  }
});

test("what is printed has the defaults in it and is written as people write", () => {
  const text = printConfig(
    parseConfig(
      "defaults: { retries: 3 }\nservices: { s: { servers: [a:1], health: { path: /up } } }\ndefault: { service: s }",
    ),
  );
  for (
    const line of [
      "retries: 3",
      "path: /up",
      "interval: 10s",
      "panic: 50%",
      "max_in_flight: none",
      "cors: off",
      "listen: 8080",
    ]
  ) {
    assert.match(text, new RegExp(`^ *${line}$`, "m"));
  }
});

/** The same numbers below `n` on every run (a linear congruential generator). */
function numbers(seed: number) {
  return (n: number) => Math.floor((seed = (seed * 1664525 + 1013904223) % 2 ** 32) / 2 ** 32 * n);
}

test("any times, shares, sizes and texts survive printing and reading", { timeout: 60_000 }, () => {
  const below = numbers(1);
  const characters = [..."ab1 -:#'\"{}[]$\\\n\t*&!|>%@`,?é😀~", "${", "true", "null", "0x1"];
  for (let run = 0; run < 200; run++) {
    const [ms, share, size] = [1 + below(86_400_000), below(1001), below(2 ** 31)];
    const body = Array.from({ length: below(12) }, () => characters[below(characters.length)]).join("");
    const config = parseConfig(JSON.stringify({
      services: { s: { servers: ["a:1"], panic: `${share / 10}%`, timeouts: { idle: `${ms}ms` } } },
      routes: [{ service: "s", body_limit: size }],
      default: { respond: { body: body.replaceAll("${", () => "$${") } },
    }));
    const { action } = config.routes[1]!;
    assert.equal(action.kind === "respond" && action.body, body);
    assert.equal(config.services.get("s")!.timeouts.idle, ms);
    assert.deepEqual({ ...parseConfig(printConfig(config)), ...PLACES }, { ...config, ...PLACES });
  }
});

test("any text at all is either a config or a ConfigError", () => {
  const below = numbers(2);
  const words = [
    ..."{}[],'\n\n-/",
    "services",
    "default",
    "servers",
    "a:1",
    ": ",
    "  ",
    "*a",
    "&a ",
    "${X}",
    "null",
    "paths",
  ];
  for (let run = 0; run < 1000; run++) {
    mistakes(Array.from({ length: below(30) }, () => words[below(words.length)]).join(""));
  }
});

test("secrets are masked in print", () => {
  const text = printConfig(parseConfig(`${SHOP}
routes:
  - service: shop
    headers: { Cookie: hunter1, x-token: { regex: hunter2 }, x-other: seen }
    request: { headers: { set: { Authorization: hunter3 }, add: { x-api-key: hunter4 } }, query: { set: { password: hunter5 } } }`));
  assert.doesNotMatch(text, /hunter/);
  assert.equal(text.match(/\*\*\*/g)?.length, 5);
  assert.match(text, /x-other: seen/);
});

// deno-lint-ignore no-explicit-any
type Json = any;
const SCHEMA: Json = jsonSchema();
/** What a JSON Schema has against a value, as paths; of the keywords that ours uses, and of no others. */
function against(schema: Json, value: Json, at = "$"): string[] {
  const isMap = typeof value === "object" && value !== null && !Array.isArray(value);
  const is: Record<string, boolean> = {
    ...{
      object: isMap,
      array: Array.isArray(value),
      string: typeof value === "string",
      boolean: typeof value === "boolean",
    },
    ...{ number: typeof value === "number", integer: Number.isInteger(value) },
  };
  const wrong = (holds: boolean) => holds ? [] : [at];
  const keywords: Record<string, (said: Json) => string[]> = {
    $ref: (ref) => against(SCHEMA.$defs[ref.replace("#/$defs/", "")], value, at),
    type: (types) => wrong([types].flat().some((type) => is[type])),
    pattern: (pattern) => wrong(!is.string || new RegExp(pattern, "u").test(value)),
    enum: (all) => wrong(all.includes(value)),
    const: (one) => wrong(one === value),
    minimum: (least) => wrong(!is.number || value >= least),
    maximum: (most) => wrong(!is.number || value <= most),
    anyOf: (all) => {
      const found = all.map((one: Json) => against(one, value, at));
      return found.some((one: string[]) => !one.length)
        ? []
        : found.toSorted((a: string[], b: string[]) => b[0]!.length - a[0]!.length)[0];
    },
    oneOf: (all) => wrong(all.filter((one: Json) => !against(one, value, at).length).length === 1),
    required: (keys) => wrong(!isMap || keys.every((key: string) => Object.hasOwn(value, key))),
    properties: (of) =>
      isMap
        ? Object.keys(of).filter((key) => Object.hasOwn(value, key)).flatMap((key) =>
          against(of[key], value[key], `${at}.${key}`)
        )
        : [],
    propertyNames: (of) => isMap ? Object.keys(value).flatMap((key) => against(of, key, `${at}.${key}`)) : [],
    minItems: (least) => wrong(!is.array || value.length >= least),
    items: (of) => is.array ? value.flatMap((one: Json, i: number) => against(of, one, `${at}[${i}]`)) : [],
    additionalProperties: (of) => {
      const known = (key: string) =>
        Object.hasOwn(schema.properties ?? {}, key) || schema.patternProperties && /^x-/.test(key);
      const others = isMap ? Object.keys(value).filter((key) => !known(key)) : [];
      return others.flatMap((key) => of === false ? [`${at}.${key}`] : against(of, value[key], `${at}.${key}`));
    },
    ...Object.fromEntries(
      "$schema $defs description default patternProperties".split(" ").map((key) => [key, () => []]),
    ),
  };
  return Object.entries(schema).flatMap(([key, said]) => {
    assert.ok(Object.hasOwn(keywords, key), `${at}: ${key}`);
    return keywords[key]!(said);
  });
}
/** What an editor shows for a file. */
const shownFor = (text: string) => against(SCHEMA, parseYaml(text, { merge: true }));

test("the JSON Schema is below 60 kB as it is printed, and has a definition for whatever stands twice", () => {
  assert.ok(JSON.stringify(SCHEMA, null, 1).length < 60_000);
  const defs = new Set(Object.keys(SCHEMA.$defs)), used = new Set<string>();
  JSON.stringify(SCHEMA, (key, value) => {
    if (key === "$ref") used.add(value.replace("#/$defs/", ""));
    return value;
  });
  assert.ok(defs.size > 30);
  assert.deepEqual([...used].sort(), [...defs].sort());
});

test("an editor shows nothing for what the program takes", () => {
  const pages = ["README.md", "docs/behaviour.md", "docs/config.md", "docs/recipes.md", "docs/migrate.md"]
    .map((name) => readFileSync(new URL(`../../${name}`, import.meta.url), "utf8"));
  const files = [...pages.join("\n").matchAll(/```yaml\n(.*?)```/gs)].map(([, text]) => text!);
  const merging = "x-a: &a { retries: 1 }\nservices: { s: { <<: *a, servers: [a:1] } }\ndefault: s";
  const variables =
    'listen: "${PORT}"\nname_routes: "${A}"\ndefault: { servers: "${A}", retries: "${A}", health: { interval: "${A}", method: "${A}" }, sticky: "${A}" }';
  const shorts = SHORT_FORMS.flatMap(([short, long, where]) =>
    [short, long].map((keys) =>
      where === "top"
        ? keys
        : where === "service"
        ? `services: { shop: { servers: [a:1], ${keys} } }`
        : `routes: [{ path: /x, service: shop, ${keys} }]`
    )
  );
  for (const text of [FULL, ROUTE, SHOP, merging, variables, ...files, ...shorts]) {
    assert.deepEqual(shownFor(text), [], text);
  }
});

for (
  const [text, ...places] of [
    ["default: { servers: [a:1], health: { interval: 5 } }", "$.default.health.interval"],
    ["default: { servers: [a:1], health: { interval: 5 sec } }", "$.default.health.interval"],
    ["default: { servers: [a:1], health: { interval: 0s } }", "$.default.health.interval"],
    ["default: { servers: [a:1], timeouts: { response: 30 } }", "$.default.timeouts.response"],
    ["default: { servers: [a:1], slow_start: 3 }", "$.default.slow_start"],
    ["default: { servers: [a:1], panic: 50 }", "$.default.panic"],
    ["default: { servers: [a:1], retries: 11 }", "$.default.retries"],
    ["default: { servers: [a:1], strategy: robin }", "$.default.strategy"],
    ["default: { servers: [a:1], strategy: hash }", "$.default.strategy"],
    ["default: { servers: [http://a:1/path] }", "$.default.servers"],
    ["default: { servers: [{ url: a:1, wieght: 2 }] }", "$.default.servers[0].wieght"],
    ["default: { servers: [a:1], rate: 5 }", "$.default.rate"],
    ["default: { servers: [a:1], body_limit: big }", "$.default.body_limit"],
    ["default: { servers: [a:1], sticky: a b }", "$.default.sticky"],
    ["default: { timeouts: { connect: 1s } }", "$.default"],
    ["routes: [{ path: /a }]", "$.routes[0]"],
    ["hosts: [{ host: a.b }]", "$.hosts[0]"],
    ["paths: [{ path: /a, service: a, redirect: /b }]", "$.paths[0]"],
    ["paths: [{ servers: [a:1] }]", "$.paths[0]"],
    ["routes: [{ path: /api*, service: a }]", "$.routes[0].path"],
    ['routes: [{ path: "/f/{id}.json", service: a }]', "$.routes[0].path"],
    ["routes: [{ path: { exact: /a/* }, service: a }]", "$.routes[0].path.exact"],
    ["routes: [{ path: [/v1?x], service: a }]", "$.routes[0].path"],
    ["routes: [{ path: { exact: /a, regex: b }, service: a }]", "$.routes[0].path"],
    ["listn: 80", "$.listn"],
    ["log: xml", "$.log"],
    ["limits: { header: 10 }", "$.limits.header"],
  ]
) {
  test(`an editor shows what the program refuses: ${text}`, () => {
    assert.notEqual(mistakes(text!).length, 0);
    const shown = shownFor(text!);
    assert.ok(shown.length > 0 && shown.every((at) => at.startsWith(places[0]!)), `${shown}`);
  });
}

/** A schema with its definitions in their places. */
const resolved = (part: Json): Json => {
  if (Array.isArray(part)) return part.map(resolved);
  if (typeof part !== "object" || part === null) return part;
  if (part.$ref) return resolved(SCHEMA.$defs[part.$ref.replace("#/$defs/", "")]);
  const { $defs: _, ...rest } = part;
  return Object.fromEntries(Object.entries(rest).map(([key, one]) => [key, resolved(one)]));
};

test("the JSON Schema closes every map, and describes all of its keys or the map as a whole", () => {
  const schema = resolved(SCHEMA);
  assert.equal(schema.$schema, "http://json-schema.org/draft-07/schema#");
  type Node = { description?: string; properties?: Record<string, Node>; additionalProperties?: unknown };
  let maps = 0;
  /** `whole`: the key that this belongs to has a description. */
  const visit = (node: unknown, at: string, whole: boolean): void => {
    if (typeof node !== "object" || node === null) return;
    const { properties = {}, additionalProperties, ...rest } = node as Node;
    const keys = Object.entries(properties), described = keys.filter(([, { description }]) => description);
    if (keys.length) {
      maps++;
      assert.equal(additionalProperties, false, at);
      assert.ok(described.length === keys.length || whole && described.length === 0, at);
    }
    for (const [key, value] of keys) visit(value, `${at}.${key}`, whole && !described.length || !!value.description);
    visit(additionalProperties, `${at}.*`, whole);
    for (const [key, value] of Object.entries(rest)) if (key !== "default") visit(value, `${at}/${key}`, whole);
  };
  visit(schema, "$", false);
  assert.ok(maps > 20, String(maps));
});

test("numbers and truths count however they are spelt, and stay as they are written where a text is meant", () => {
  const { servers, eject, compress, ...rest } = both(
    `
eject: { slow: 3.0 }
compress: True
mirror: { service: shop, percent: 5.0 }
query: { debug: True, version: 1.10 }`,
    "[{ url: a:1, max: 1e3 }, { url: b:1, max: ${MAX} }]",
    { MAX: "250" },
  );
  assert.deepEqual([servers.map((one) => one.max), eject.slow, compress], [[1000, 250], 3, true]);
  assert.deepEqual([rest.mirror.percent, rest.query.map((one) => "value" in one && one.value)], [5, ["True", "1.10"]]);
  const { mirror } = both("mirror: { service: shop, percent: ${SHARE} }", "[a:1]", { SHARE: "2.5" });
  assert.equal(mirror.percent, 2.5);
  const quoted = service('retries: "4"\ncompress: "true"\nhttp: "1.1"\nqueue: "7"');
  assert.deepEqual([quoted.retries, quoted.compress, quoted.http, quoted.queue.size], [4, true, 1, 7]);
});

test("an alias repeats what stood there, whatever its anchors name further down", () => {
  const { services } = parseConfig(`
services:
  a: { servers: &s [&one a:1, a:2] }
  b: { servers: [&one b:1] }
  c: { servers: *s }
  d: { servers: [*one] }
default: { service: a }`);
  const names = (name: string) => services.get(name)!.servers.map((server) => server.name);
  assert.deepEqual([names("c"), names("d")], [["a:1", "a:2"], ["b:1"]]);
});

test("what other places of the file look at is true however it is spelt", () => {
  const names = (text: string) => parseConfig(text).routes.map((one) => one.name);
  assert.deepEqual(names(`${SHOP}name_routes: True`), ["/shop"]);
  assert.deepEqual(mistakes(`${SHOP}routes: [{ path: /a, service: shop, strip: TRUE, rewrite: { path: /b } }]`), [
    "2:37: routes[0].strip: strip and rewrite exclude each other",
  ]);
});

test("no two listeners have the same address, also where one of them is the default", () => {
  assert.deepEqual(mistakes(`${ROUTE}listen: [8080, 127.0.0.1:0, 127.0.0.1:0, 8080]`), [
    "2:42: listen[3]: 8080 is listened on already",
  ]);
  assert.deepEqual(mistakes(`${ROUTE}listen: [8080, 0.0.0.0:8080, ":8080", "[::]:8080"]`), [
    "2:16: listen[1]: 0.0.0.0:8080 is listened on already",
    "2:30: listen[2]: :8080 is listened on already",
  ]);
  assert.deepEqual(mistakes(`${ROUTE}tcp: [{ listen: 8080, servers: [a:1] }]`), [
    "2:17: tcp[0].listen: 8080 is listened on already",
  ]);
  assert.deepEqual(mistakes("tcp: [{ listen: 8080, servers: [a:1] }]"), []);
  assert.deepEqual(mistakes(`${ROUTE}admin: { listen: 127.0.0.1:9 }\nlisten: 127.0.0.1:9`), [
    "2:18: admin.listen: 127.0.0.1:9 is listened on already",
  ]);
});

test("wrong names of a map are told also where a value in it is wrong", () => {
  assert.deepEqual(mistakes(`${SHOP}routes: [{ service: shop, headers: { "a b": "1", x: [] } }]`).length, 2);
});

test("the number 7 and the text 7 are the same name", () => {
  assert.deepEqual(mistakes(`${SHOP}routes: [{ name: 7, service: shop }, { name: "7", service: shop }]`), [
    '2:46: routes[1].name: "7" names another route already',
  ]);
});
