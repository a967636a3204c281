// Which route a request belongs to, and what the server is then asked: the tables of "Which route wins", row by row.

import assert from "node:assert/strict";
import { test } from "node:test";
import { answerTo, type Ask, balancerFor } from "../rig/balancer.ts";
import { seeded } from "../rig/rig.ts";

/** A balancer whose servers answer at once; `asked` is what they saw: `server target`, and `headers` the last ones. */
function setUp(yaml: string) {
  const asked: string[] = [];
  const last = { headers: new Headers() };
  const { lb, send } = balancerFor(yaml, {
    random: seeded(7),
    fetch: (url, attempt) => {
      asked.push(`${attempt.server.name} ${url.slice(attempt.server.url.length)}`);
      last.headers = new Headers();
      for (let i = 0; i < attempt.headers.length; i += 2) {
        last.headers.append(attempt.headers[i]!, attempt.headers[i + 1]!);
      }
      return answerTo(attempt, 200, { "x-one": "server", "x-two": "server" });
    },
  });
  return { lb, asked, last, ask: send };
}

/** The route that answers, by its place in the list; else the status. */
async function winner(routes: string[], url: string, ask?: Ask): Promise<number> {
  const yaml = routes.map((match, i) => `  - { ${match}${match && ", "}respond: { body: "${i}" } }`);
  const response = await setUp(`routes:\n${yaml.join("\n")}`).ask(url, ask);
  return response.status === 200 ? Number(await response.text()) : response.status;
}

const both: Ask = { headers: { "x-a": "1", "x-b": "1" } };
const WINS: [why: string, winner: string, loser: string, url: string, ask?: Ask][] = [
  ["an exact host over a wildcard", "host: x.a.test", 'host: "*.a.test", path: {exact: /p}', "http://x.a.test/p"],
  ["the longer wildcard", 'host: "*.b.a.test"', 'host: "*.a.test", path: {exact: /p}', "http://x.b.a.test/p"],
  ["a wildcard over any host", 'host: "*.a.test"', "path: {exact: /p}, methods: [GET]", "http://x.a.test/p"],
  ["an exact host over any host", "host: a.test", "path: {exact: /p}, methods: [GET]", "http://a.test/p"],
  ["an exact path over a prefix", "path: {exact: /p/q}", "path: /p/q, methods: [GET]", "http://a/p/q"],
  ["an exact path over a regex", "path: {exact: /p}", 'path: {regex: "^/p$"}, methods: [GET]', "http://a/p"],
  ["the longer prefix", "path: /p/q", "path: /p, methods: [GET], headers: {x-a: 1}", "http://a/p/q/r", both],
  ["a prefix over a regex", "path: /p", 'path: {regex: "^/p/q$"}, methods: [GET]', "http://a/p/q"],
  ["no path, which ranks as /, over a regex", "", 'path: {regex: "^/p/q$"}', "http://a/p/q"],
  ["any prefix over no path", "path: /p", "methods: [GET], headers: {x-a: 1}", "http://a/p", both],
  ["a method over conditions", "methods: [GET]", "headers: {x-a: 1, x-b: 1}, query: {q: 1}", "http://a/?q=1", both],
  [
    "more headers over more query",
    "headers: {x-a: 1, x-b: 1}",
    "headers: {x-a: 1}, query: {q: 1, r: 1}",
    "http://a/?q=1&r=1",
    both,
  ],
  ["one header over two query parameters", "headers: {x-a: 1}", "query: {q: 1, r: 1}", "http://a/?q=1&r=1", both],
  ["more query parameters", "query: {q: 1, r: 1}", "query: {q: 1}", "http://a/?q=1&r=1"],
  [
    "a regex with a method over one without",
    'path: {regex: "^/p"}, methods: [GET]',
    'path: {regex: "^/"}',
    "http://a/p",
  ],
];
/** Here the second would come first, but does not fit. */
const FALLS_BACK: typeof WINS = [
  ["the only one whose method fits", "path: /p", "path: {exact: /p/q}, methods: [POST]", "http://a/p/q"],
  ["the only one whose header fits", "path: /p", "path: {exact: /p/q}, headers: {x-a: 2}", "http://a/p/q", both],
  ["any host where the exact host has no route that fits", "path: /p", "host: a.test, path: /q", "http://a.test/p"],
  [
    "a shorter wildcard where the longer has no route that fits",
    'host: "*.a.test"',
    'host: "*.b.a.test", path: /q',
    "http://x.b.a.test/p",
  ],
  [
    "a wildcard where the exact host's method does not fit",
    'host: "*.a.test"',
    "host: x.a.test, methods: [POST]",
    "http://x.a.test/",
  ],
];

for (const [why, first, second, url, ask] of [...WINS, ...FALLS_BACK]) {
  test(`the route that wins, wherever it is written: ${why}`, async () => {
    assert.equal(await winner([first, second], url, ask), 0);
    assert.equal(await winner([second, first], url, ask), 1);
    assert.equal(await winner([first], url, ask), 0);
    assert.equal(await winner([second], url, ask) === 0, WINS.some(([one]) => one === why), "the other one alone");
  });
}

test("among equals the route written first wins", async () => {
  for (const match of ["", "path: /p", "path: {exact: /p}", 'path: {regex: "p"}', "host: a", "query: {q: 1}"]) {
    assert.equal(await winner([match, match, match], "http://a/p?q=1"), 0, match);
  }
});

const FITS: [match: string, url: string, fits: boolean, ask?: Ask][] = [
  ["path: /v1", "http://a/v1", true],
  ["path: /v1", "http://a/v1/", true],
  ["path: /v1", "http://a/v1/x", true],
  ["path: /v1", "http://a/v12", false],
  ["path: /v1", "http://a/V1", false],
  ["path: /v1", "http://a/x/v1", false],
  ["path: /v1/", "http://a/v1", true],
  ["path: /v1/", "http://a/v1/x", true],
  ["path: /v1/", "http://a/v10", false],
  ["path: [/v1, /v2]", "http://a/v2/x", true],
  ["path: {exact: /v1}", "http://a/v1/", false],
  ["path: {exact: /v1}", "http://a/v1?x", true],
  ['path: {regex: "^/v[12]/"}', "http://a/v2/x", true],
  ['path: {regex: "^/v[12]/"}', "http://a/x/v2/x", false],
  ["host: www.a.test", "http://WWW.A.test:8080/", true],
  ["host: WWW.a.test", "http://www.a.test/", true],
  ["host: [a.test, b.test]", "http://b.test/", true],
  ["host: a.test", "http://a.test./", true],
  ["host: a.test", "http://aa.test/", false],
  ["host: a.test", "http://x.a.test/", false],
  ['host: "*.example.com"', "http://a.example.com/", true],
  ['host: "*.example.com"', "http://a.b.c.Example.com:81/", true],
  ['host: "*.example.com"', "http://example.com/", false],
  ['host: "*.example.com"', "http://badexample.com/", false],
  ['host: "[::1]"', "http://[::1]:8080/", true],
  ['headers: {X-Beta: "1"}', "http://a/", true, { headers: { "x-beta": "1" } }],
  ['headers: {x-beta: "1"}', "http://a/", false, { headers: { "x-beta": "12" } }],
  ['headers: {x-beta: "1"}', "http://a/", false],
  ['headers: {x-beta: {regex: "^b"}}', "http://a/", true, { headers: { "x-beta": "blue" } }],
  ['headers: {x-beta: {regex: "^b"}}', "http://a/", false, { headers: { "x-beta": "a b" } }],
  ['headers: {x-beta: {regex: ""}}', "http://a/", false],
  ["headers: {x-beta: {present: true}}", "http://a/", true, { headers: { "x-beta": "" } }],
  ["headers: {x-beta: {present: true}}", "http://a/", false],
  ["headers: {x-beta: {present: false}}", "http://a/", true],
  ["headers: {x-beta: {present: false}}", "http://a/", false, { headers: { "x-beta": "" } }],
  ["headers: {x-a: 1, x-b: 2}", "http://a/", false, both],
  ["headers: {constructor: {present: true}}", "http://a/", false],
  ["query: {debug: 1}", "http://a/?x=2&debug=1", true],
  ["query: {debug: 1}", "http://a/?debug=11", false],
  ["query: {debug: a b}", "http://a/?debug=a%20b", true],
  ['query: {debug: {regex: "^[0-9]+$"}}', "http://a/?debug=42", true],
  ['query: {debug: {regex: "^[0-9]+$"}}', "http://a/?debug=x", false],
  ["query: {debug: {present: true}}", "http://a/?debug", true],
  ["query: {debug: {present: false}}", "http://a/?debug", false],
  ["query: {__proto__: {present: true}}", "http://a/", false],
  ["query: {constructor: 1}", "http://a/?constructor=1", true],
];

test("a condition holds, or it does not", async () => {
  for (const [match, url, fits, ask] of FITS) {
    assert.equal(await winner([match], url, ask), fits ? 0 : 404, `${match} for ${url} ${JSON.stringify(ask ?? "")}`);
  }
});

test("405 with Allow where only the method does not fit, and 404 where something else does not fit either", async () => {
  const { ask } = setUp(`
routes:
  - { path: /p, methods: [GET, PUT], respond: {} }
  - { path: /p, methods: [PUT, DELETE], headers: { x-a: 1 }, respond: {} }
  - { path: /p/q, methods: [PATCH], respond: {} }
default: { respond: { status: 410 } }
`);
  const rows: [
    method: string,
    path: string,
    headers: Record<string, string>,
    status: number,
    allow: string | null,
  ][] = [
    ["GET", "/p", {}, 200, null],
    ["HEAD", "/p", {}, 200, null],
    ["POST", "/p", {}, 405, "GET, PUT"],
    ["POST", "/p", { "x-a": "1" }, 405, "DELETE, GET, PUT"],
    ["POST", "/p/q", {}, 405, "GET, PATCH, PUT"],
    ["DELETE", "/p", {}, 405, "GET, PUT"],
    ["POST", "/elsewhere", {}, 410, null],
  ];
  for (const [method, path, headers, status, allow] of rows) {
    const response = await ask(`http://a${path}`, { method, headers });
    const methods = response.headers.get("allow")?.split(", ").sort().join(", ") ?? null;
    assert.deepEqual([response.status, methods], [status, allow], `${method} ${path}`);
    assert.equal(response.headers.get("x-lb-failure"), status === 405 ? "bad-method" : null);
  }
  assert.equal(await winner(["methods: [GET], path: /p"], "http://a/q", { method: "POST" }), 404);
  assert.equal(await winner(["methods: [GET], query: {q: 1}"], "http://a/", { method: "POST" }), 404);
});

test("default takes what no route takes, and without it there is 404", async () => {
  assert.equal(await winner(["host: b"], "http://a/"), 404);
  const { ask, asked } = setUp("routes: [{ path: /p, respond: {} }]\ndefault: { servers: [d:1] }");
  assert.equal((await ask("http://a/p")).status, 200);
  assert.equal((await ask("http://a/q")).status, 200);
  assert.deepEqual(asked, ["d:1 /q"]);
});

const REWRITES: [route: string, url: string, target: string, host?: string][] = [
  ["path: /v1", "http://a/v1/x?y=1&y=%20", "/v1/x?y=1&y=%20"],
  ["path: /v1, rewrite: {path: /v2}", "http://a/v1/x?y", "/v2/x?y"],
  ["path: /v1, rewrite: {path: /v2}", "http://a/v1", "/v2"],
  ["path: /v1, rewrite: {path: /v2/}", "http://a/v1/x/", "/v2/x/"],
  ["path: /v1, rewrite: {path: /}", "http://a/v1", "/"],
  ["path: /v1, rewrite: {path: /}", "http://a/v1/x", "/x"],
  ["path: [/v1, /v1/long], rewrite: {path: /v2}", "http://a/v1/long/x", "/v2/x"],
  ["path: {exact: /v1}, rewrite: {path: /v2/w}", "http://a/v1", "/v2/w"],
  ["path: /v1, rewrite: {whole: /v2}", "http://a/v1/x?y", "/v2?y"],
  ["rewrite: {path: /v2}", "http://a/x", "/v2/x"],
  ['path: {regex: "^/v[12]"}, rewrite: {path: /v3}', "http://a/v2/x/v2", "/v3/x/v2"],
  ['path: {regex: "^/u/([0-9]+)/(.*)"}, rewrite: {path: /$2/by/$1}', "http://a/u/7/cats?q", "/cats/by/7?q"],
  ['path: {regex: "^/v[12]/"}, rewrite: {path: /}', "http://a/v1/x", "/x"],
  ['path: {regex: "^/x-([a-z]*)/"}, rewrite: {path: /y/.$1./}', "http://a/x-/etc", "/etc"],
  ['path: {regex: "^/v[12]/"}, rewrite: {path: /new/}', "http://a/v1/x", "/new/x"],
  ["rewrite: {host: inner.test}", "http://a/x", "/x", "inner.test"],
  ["request: {query: {set: {b: 2, c: x y}, remove: [d]}}", "http://a/x?a=1&b=1&b=3&d=4", "/x?a=1&b=2&c=x+y"],
  ["request: {query: {remove: [d]}}", "http://a/x?d=4", "/x"],
  ["request: {query: {remove: [d]}}", "http://a/x?a=%20+%c3&&b=~%7E&c&%64=4&d", "/x?a=%20+%c3&&b=~%7E&c"],
  ["request: {query: {set: {b: é}}}", "http://a/x?b&a=%7e&b=3", "/x?b=%C3%A9&a=%7e"],
  ["path: /v1, rewrite: {path: /v2}", "http://a/v%31/caf%c3%a9/%7Ex", "/v2/caf%c3%a9/%7Ex"],
];

for (const [route, url, target, host = "a"] of REWRITES) {
  test(`${route} has the server see ${target} for ${url}`, async () => {
    const { ask, asked, last } = setUp(`routes: [{ ${route}, servers: [s:1] }]`);
    await ask(url);
    assert.deepEqual([asked, last.headers.get("host")], [[`s:1 ${target}`], host]);
  });
}

test("strip takes the path's own prefix away", async () => {
  const { ask, asked } = setUp("paths: [{ path: /pete, strip: true, servers: [s:1] }]");
  for (const path of ["/pete", "/pete/", "/pete/a/b?c", "/pete//evil/x"]) {
    await ask(`http://a${path}`);
  }
  assert.deepEqual(asked, ["s:1 /", "s:1 /", "s:1 /a/b?c", "s:1 //evil/x"]);
});

const REDIRECTS: [redirect: string, url: string, location: string, status?: number][] = [
  ['to: "https://b.test/x"', "http://a/p?q", "https://b.test/x"],
  ["to: /x, status: 308", "http://a/p?q", "/x", 308],
  ["scheme: https", "http://a:8080/p?q=1", "https://a/p?q=1"],
  ["scheme: https, port: 8443, status: 301", "http://a:8080/p", "https://a:8443/p", 301],
  ["host: b.test", "http://a:8080/p?q", "http://b.test/p?q"],
  ["port: 81", "http://a/p", "http://a:81/p"],
  ["port: 80", "http://a:8080/p", "http://a/p"],
  ["path: /new", "http://a:8080/p?q", "http://a:8080/new?q"],
];

test("a redirect goes where it says literally, or changes the named parts and keeps the others", async () => {
  for (const [redirect, url, location, status = 302] of REDIRECTS) {
    const response = await setUp(`default: { redirect: { ${redirect} } }`).ask(url);
    assert.deepEqual([response.headers.get("location"), response.status], [location, status], redirect);
  }
});

test("a redirect keeps the scheme and host that a trusted peer tells, and no stranger", async () => {
  const { ask } = setUp("trust: [172.16.0.0/12]\ndefault: { redirect: { path: /new } }");
  const headers = { "x-forwarded-proto": "https", "x-forwarded-host": "shop.test" };
  const [trusted, stranger] = await Promise.all(
    ["172.16.0.1", "192.0.2.1"].map((address) => ask("http://a:8080/p", { headers, from: { address } })),
  );
  assert.equal(trusted!.headers.get("location"), "https://shop.test/new");
  assert.equal(stranger!.headers.get("location"), "http://a:8080/new");
});

test("respond answers by itself: status, body, headers, and the route's rules for answers", async () => {
  const { ask, asked } = setUp(
    "default: { respond: { status: 410, body: götterdämmerung, headers: { x-a: 1 } }, response: { headers: { add: { x-b: 2 } } } }",
  );
  const response = await ask("http://a/");
  assert.deepEqual([response.status, await response.text(), asked], [410, "götterdämmerung", []]);
  const own = ["x-a", "x-b", "content-length", "content-type"].map((name) => response.headers.get(name));
  assert.deepEqual(own, ["1", "2", "17", "text/plain; charset=utf-8"]);
});

test("rules set, add and remove headers of the request and of the answer", async () => {
  const { ask, last } = setUp(`
default:
  servers: [s:1]
  request: { headers: { set: { x-a: new }, add: { x-b: more, via: mine }, remove: [X-C, x-forwarded-for] } }
  response: { headers: { set: { x-one: ours }, add: { x-three: ours }, remove: [x-two] } }
`);
  const response = await ask("http://a/", { headers: { "x-a": "old", "x-b": "one", "x-c": "gone", "x-d": "stays" } });
  const sent = ["x-a", "x-b", "x-c", "x-d", "x-forwarded-for"].map((name) => last.headers.get(name));
  assert.deepEqual(sent, ["new", "one, more", null, "stays", null]);
  const got = ["x-one", "x-two", "x-three"].map((name) => response.headers.get(name));
  assert.deepEqual(got, ["ours", null, "ours"]);
});

test("one rule is enough, whichever it is", async () => {
  const rows: [rule: string, name: string, seen: string | null][] = [
    ["request: { headers: { set: { x-a: 1 } } }", "x-a", "1"],
    ["request: { headers: { add: { x-a: 1 } } }", "x-a", "0, 1"],
    ["request: { headers: { remove: [x-a] } }", "x-a", null],
    ["response: { headers: { set: { x-one: 1 } } }", "x-one", "1"],
    ["response: { headers: { add: { x-one: 1 } } }", "x-one", "server, 1"],
    ["response: { headers: { remove: [x-one] } }", "x-one", null],
  ];
  for (const [rule, name, seen] of rows) {
    const { ask, last } = setUp(`default: { servers: [s:1], ${rule} }`);
    const response = await ask("http://a/", { headers: { "x-a": "0" } });
    assert.equal((rule.startsWith("request") ? last : response).headers.get(name), seen, rule);
  }
});

test("Host is the client's, the server's, or a literal of the service, the server or the route", async () => {
  const rows: [keys: string, server: string, host: string][] = [
    ["", "s:81", "a.test:8080"],
    ["host_header: keep", "s:81", "a.test:8080"],
    ["host_header: server", "s:81", "s:81"],
    ["host_header: server", '"https://s"', "s"],
    ["host_header: shop.internal", "s:81", "shop.internal"],
    ["host_header: shop.internal", "{url: s:81, host: own.test}", "own.test"],
    ["rewrite: {host: route.test}", "{url: s:81, host: own.test}", "route.test"],
  ];
  for (const [keys, server, host] of rows) {
    const { ask, last } = setUp(`default: { servers: [${server}]${keys && ", "}${keys} }`);
    await ask("http://a.test:8080/");
    assert.deepEqual([last.headers.get("host"), last.headers.get("x-forwarded-host")], [host, "a.test:8080"], keys);
  }
});

test("a split draws its services by weight, and one of weight 0 never", async () => {
  const { ask, asked } = setUp(`
services: { a: { servers: [a:1] }, b: { servers: [b:1] }, c: { servers: [c:1] }, d: { servers: [d:1] } }
default: { split: { a: 60, b: 0, c: 30, d: 10 } }
`);
  for (let i = 0; i < 5000; i++) await ask("http://a/");
  const count = (name: string) => asked.filter((one) => one === `${name}:1 /`).length;
  assert.equal(count("b"), 0);
  const chi = Object.entries({ a: 3000, c: 1500, d: 500 }).reduce(
    (sum, [name, n]) => sum + (count(name) - n) ** 2 / n,
    0,
  );
  assert.ok(chi < 13.8, `chi-square ${chi} with 2 degrees of freedom`); // p = 0.001
});

const ADMISSION: [rules: string, peer: string, forwardedFor: string, status: number][] = [
  ["allow: [10.0.0.0/8]", "10.1.2.3", "", 200],
  ["allow: [10.0.0.0/8]", "192.0.2.1", "", 403],
  ["allow: [10.0.0.0/8]", "::ffff:10.1.2.3", "", 200],
  ["allow: [10.0.0.0/8]", "", "", 403],
  ['allow: ["::ffff:10.1.2.3"]', "10.1.2.3", "", 200],
  ['allow: ["::ffff:10.0.0.0/104"]', "10.1.2.3", "", 200],
  ['allow: ["::ffff:10.0.0.0/104"]', "11.1.2.3", "", 403],
  ["allow: ['2001:db8::/32']", "2001:db8::1", "", 200],
  ["allow: [192.0.2.7]", "192.0.2.7", "", 200],
  ["deny: [192.0.2.0/24]", "192.0.2.1", "", 403],
  ["deny: [192.0.2.0/24]", "198.51.100.1", "", 200],
  ["allow: [192.0.2.0/24], deny: [192.0.2.7]", "192.0.2.7", "", 403],
  ["allow: [192.0.2.0/24], deny: [192.0.2.7]", "192.0.2.8", "", 200],
  ["allow: [203.0.113.9]", "192.0.2.1", "203.0.113.9", 403], // a stranger's word
  ["allow: [203.0.113.9]", "172.16.0.1", "203.0.113.9", 200],
  ["allow: [203.0.113.9]", "172.16.0.1", "6.6.6.6, 203.0.113.9, 172.16.0.2", 200],
  ["allow: [6.6.6.6]", "172.16.0.1", "6.6.6.6, 203.0.113.9, 172.16.0.2", 403],
  ["allow: [172.16.0.3]", "172.16.0.1", "172.16.0.3, 172.16.0.2", 200], // all trusted: the farthest
  ["allow: [172.16.0.2]", "172.16.0.1", "203.0.113.9, unknown, 172.16.0.2", 200], // garbage stops the walk
  ["allow: [172.16.0.1]", "172.16.0.1", "203.0.113.9, _hidden", 200],
  ["allow: [203.0.113.9]", "172.16.0.1", "203.0.113.9, ", 200], // RFC 9110 5.6.1: empty elements are ignored
  ["allow: [172.16.0.1]", "172.16.0.1", "203.0.113.9, 300.1.1.1", 200],
  ["allow: [172.16.0.1]", "172.16.0.1", "203.0.113.9, 0254.020.1", 200], // 172.16.0.1 in octal, for some
];

test("allow and deny see the client behind trusted peers, found from right to left", async () => {
  for (const [rules, address, forwardedFor, status] of ADMISSION) {
    const { ask } = setUp(`trust: [172.16.0.0/12]\ndefault: { respond: {}, ${rules} }`);
    const headers: Record<string, string> = forwardedFor ? { "x-forwarded-for": forwardedFor } : {};
    const response = await ask("http://a/", { from: { address }, headers });
    assert.equal(response.status, status, `${rules} for ${address} with "${forwardedFor}"`);
  }
});

test("name_routes: every service answers under its name, prefix stripped, and routes of the file still win", async () => {
  const { ask, asked } = setUp(`
name_routes: true
services: { shop: { servers: [shop:1] }, constructor: { servers: [c:1] }, services: { servers: [s:1] } }
routes: [{ path: /shop/own, respond: {} }]
`);
  for (
    const path of ["/shop", "/shop/a?b", "/shop/own", "/constructor/x", "/services/", "/toString"]
  ) await ask(`http://a${path}`);
  assert.deepEqual(asked, ["shop:1 /", "shop:1 /a?b", "c:1 /x", "s:1 /"]);
});

test("services, hosts and paths with names that JavaScript knows are nothing special", async () => {
  const names = ["constructor", "__proto__", "services", "toString", "hasOwnProperty"];
  const { ask, asked } = setUp(`
services: { ${names.map((name, i) => `${name}: { servers: [s${i}:1] }`).join(", ")} }
routes: [ ${names.map((name) => `{ path: /${name}, service: ${name} }`).join(", ")} ]
hosts: [{ host: valueof, servers: [h:1] }]
`);
  for (const name of names) await ask(`http://a/${name}`);
  await ask("http://valueOf/");
  assert.deepEqual(asked, [...names.map((name, i) => `s${i}:1 /${name}`), "h:1 /"]);
  for (const url of ["http://constructor/", "http://__proto__/", "http://a/valueOf"]) {
    assert.equal((await ask(url)).status, 404, url);
  }
});

const NORMALISED: [target: string, seen: string | number][] = [
  ["/pub/../admin", "admin:1 /admin"],
  ["/pub/%2e%2E/admin", "admin:1 /admin"],
  ["/pub/.%2e/./admin/.", "admin:1 /admin/"],
  ["/%61dmin", "admin:1 /%61dmin"],
  ["/../../admin", "admin:1 /admin"],
  ["/admin/..", "any:1 /"],
  ["/pub/..%2fadmin", "any:1 /pub/..%2fadmin"],
  ["/pub/%252e%252e/admin", "any:1 /pub/%252e%252e/admin"],
  ["//evil/x", "any:1 //evil/x"],
  ["//admin", "any:1 //admin"],
  ["/a%2Fb/%c3%a4?x=%2e%2e/..", "any:1 /a%2Fb/%c3%a4?x=%2e%2e/.."],
  ["/a//../%61dmin", "any:1 /a/admin"],
  ["/a/.hidden/..b/...", "any:1 /a/.hidden/..b/..."],
  ["/a%00b", 400],
  ["/a%0", 400],
  ["/a%zz", 400],
  ["/a\\b", 400],
  ["/a#/b", 400],
  ["/a b", 400],
  [`/${"a".repeat(20_000)}`, 414],
];

test("the normal form of a path is matched; what came is forwarded, but for dot segments", async () => {
  for (const [target, seen] of NORMALISED) {
    const { ask, asked } = setUp("paths: [{ path: /admin, servers: [admin:1] }, { path: /, servers: [any:1] }]");
    const { status } = await ask("http://a/", { raw: `http://a${target}` });
    assert.deepEqual(typeof seen === "number" ? [status, ...asked] : asked, [seen], target.slice(0, 40));
  }
});
