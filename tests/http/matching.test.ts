// Which route takes a request and what it makes of it, as clients and servers of the running program see it.

import assert from "node:assert/strict";
import { after, before } from "node:test";
import {
  type Echo,
  echoServer,
  get,
  type Message,
  type Program,
  rawRequest,
  type ScriptedServer,
  startProgram,
  status,
  test,
  value,
} from "../rig/rig.ts";

const QUICK = { quiet: 50 };
let server: ScriptedServer;
let program: Program;

before(async () => {
  server = await echoServer();
  const service = "shop";
  const says = (body: string) => ({ respond: { status: 200, body } });
  program = await startProgram({
    log: "off",
    services: { shop: { servers: [`http://${server.address}`], health: "off" } },
    routes: [
      { host: "*.w.test", ...says("any") },
      { host: "*.long.w.test", ...says("longer") },
      { path: "/p", ...says("prefix") },
      { path: { exact: "/p" }, ...says("exact") },
      { path: { regex: "^/v[12]/" }, ...says("regex") },
      { path: ["/one", "/two"], ...says("list") },
      { path: "/read", methods: ["GET"], ...says("read") },
      { path: "/head", headers: { "x-beta": { regex: "^[12]$" } }, ...says("header") },
      { path: "/ask", query: { debug: "1" }, ...says("query") },
      { path: "/to", redirect: { to: "https://b.test/x", status: 308 } },
      { path: "/part", redirect: { path: "/new", status: 301 } },
      { path: "/gone", respond: { status: 410, body: "gone" } },
      { path: "/old", service, rewrite: { path: "/v2" } },
      { path: "/whole", service, rewrite: { whole: "/all" } },
      { path: "/server", service, host_header: "server" },
      { path: "/literal", service, host_header: "c.test" },
      { path: "/closed", service, deny: ["127.0.0.1"] },
      { path: "/open", service, allow: ["127.0.0.0/8"], deny: ["127.0.0.9"] },
      { path: "/private", ...says("private"), allow: ["10.0.0.0/8"] },
      { path: "/is", headers: { "x-beta": "1" }, ...says("header is") },
      { path: "/has", headers: { "x-beta": { present: true } }, ...says("header there") },
      { path: "/has", headers: { "x-beta": { present: false } }, ...says("header not there") },
      { path: "/q", query: { a: { regex: "^[0-9]+$" } }, ...says("query matches") },
      { path: "/q", query: { b: { present: true } }, ...says("query there") },
      { path: "/plain", scheme: "http", ...says("http") },
      { path: "/plain", scheme: "https", ...says("https") },
      { path: "/moved", redirect: { scheme: "https", host: "new.test", port: 8443, path: "/there", status: 307 } },
      { path: { regex: "^/user/([0-9]+)/(.*)$" }, service, rewrite: { path: "/$2/of/$1" } },
      { path: "/named", service, rewrite: { host: "inner.test" } },
      {
        ...{ path: "/rules", service },
        request: { headers: { set: { "x-set": "new" }, add: { "x-add": "two" }, remove: ["x-gone"] } },
        response: { headers: { set: { "x-out": "out" }, remove: ["content-type"] } },
      },
      { path: "/params", service, request: { query: { set: { a: "new" }, remove: ["b"] } } },
      { path: "/small", service, body_limit: 10 },
      { path: "/cors", service, cors: { origin: ["https://app.test"], credentials: true, max_age: "1m" } },
      { path: "/star/*", ...says("star") },
      { path: "/star/deep/**", ...says("stars") },
      { path: "/users/:id", ...says("one user") },
      { path: "/users/:id/orders/{order}", ...says("an order") },
      { path: "/users/me", ...says("me") },
      { path: "/:kind/:id/orders/7", ...says("any seven") },
      { path: { exact: "/only/:id" }, ...says("only one") },
      { path: "/items/{id}", service, rewrite: { path: "/v3" } },
      { path: "/caf%c3%a9", ...says("escaped") },
      { path: "/tee/größe", ...says("unescaped") },
      { path: "/%78%41", ...says("needless") },
      { path: { exact: "/a|b" }, ...says("bar") },
      { path: "/v1/projects:list", ...says("colon") },
      { path: "/cors/below", service, cors: { origin: ["https://*.b.test", "http://c.test:81"] } },
      { path: "/tea", respond: { status: 418, body: "short", headers: { "x-tea": "1" } } },
    ],
    paths: [{ path: "/cut", servers: [`http://${server.address}`], strip: true }],
    default: { service },
  });
});

after(async () => {
  await program?.stop();
  await server?.close();
});

async function ask(path: string, headers = "", host = "a.test"): Promise<Message> {
  const { answers: [one] } = await rawRequest(program.port, get(path, headers, host), QUICK);
  assert.ok(one, `${path} has an answer`);
  return one;
}

const ROUTED: [path: string, expected: string | number, headers?: string, host?: string][] = [
  ["/", "any", "", "a.w.test"],
  ["/", "longer", "", "a.long.w.test"],
  ["/open", 200],
  ["/private", 403],
  ["/is", "header is", "x-beta: 1\r\n"],
  ["/has", "header there", "x-beta: 9\r\n"],
  ["/has", "header not there"],
  ["/q?a=12", "query matches"],
  ["/q?a=x&b=", "query there"],
  ["/plain", "http"],
  ["/tea", 418],
  ["/p", "exact"],
  ["/p/q", "prefix"],
  ["/pq", 200],
  ["/v2/x", "regex"],
  ["/v3/x", 200],
  ["/one", "list"],
  ["/two/x", "list"],
  ["/head", "header", "x-beta: 2\r\n"],
  ["/head", 200, "x-beta: 3\r\n"],
  ["/ask?debug=1", "query"],
  ["/ask?debug=2", 200],
  ["/gone", 410],
  ["/closed", 403],
  ["/star", "star"],
  ["/star/", "star"],
  ["/star/x/y", "star"],
  ["/stars", 200],
  ["/star/*", "star"],
  ["/star/deep/x", "stars"],
  ["/users", 200],
  ["/users/", 200],
  ["/users//x", 200],
  ["/users/12", "one user"],
  ["/users/:id", "one user"],
  ["/users/12/x", "one user"],
  ["/users/me", "me"],
  ["/users/me/x", "me"],
  ["/users/meme", "one user"],
  ["/users/12/orders/7", "an order"],
  ["/firms/12/orders/7/x", "any seven"],
  ["/only/7", "only one"],
  ["/only/7/", 200],
  ["/only/7/x", 200],
  ["/caf%c3%a9", "escaped"],
  ["/caf%C3%A9/x", "escaped"],
  ["/caf\xc3\xa9", "escaped"],
  ["/tee/gr%C3%B6%c3%9fe", "unescaped"],
  ["/xA", "needless"],
  ["/a|b", "bar"],
  ["/a%7cb", "bar"],
  ["/v1/projects:list", "colon"],
];

for (const [path, expected, headers = "", host = "a.test"] of ROUTED) {
  test(`${host}${path} ${headers.trim()} is ${expected}`, async () => {
    const one = await ask(path, headers, host);
    if (typeof expected === "number") assert.equal(status(one), expected);
    else assert.equal(one.body.toString(), expected);
  });
}

test("a method that no route takes is 405 with Allow", async () => {
  const { answers: [one] } = await rawRequest(program.port, get("/read").replace("GET", "DELETE"));
  assert.equal(one && status(one), 405);
  assert.match(value(one!, "allow"), /\bGET\b/);
});

for (
  const [path, code, to] of [
    ["/to?a=1", 308, /^https:\/\/b\.test\/x$/],
    ["/part?a=1", 301, /\/new\?a=1$/],
    ["/moved?a=1", 307, /^https:\/\/new\.test:8443\/there\?a=1$/],
  ] as const
) {
  test(`${path} is redirected with ${code}`, async () => {
    const one = await ask(path);
    assert.equal(status(one), code);
    assert.match(value(one, "location"), to);
  });
}

for (
  const [path, url, host] of [
    ["/old/x?a=1", "/v2/x?a=1", () => "a.test"],
    ["/whole/x?a=1", "/all?a=1", () => "a.test"],
    ["/server", "/server", () => server.address],
    ["/literal", "/literal", () => "c.test"],
    ["/user/12/a/b?c=1", "/a/b/of/12?c=1", () => "a.test"],
    ["/named", "/named", () => "inner.test"],
    ["/items/7/x?a=1", "/v3/x?a=1", () => "a.test"],
    ["/cut/a?b=1", "/a?b=1", () => "a.test"],
    ["/params?b=2&c=3&a=1", "/params?c=3&a=new", () => "a.test"],
    ["/nobody/asks/for/this", "/nobody/asks/for/this", () => "a.test"],
  ] as const
) {
  test(`the server sees ${url} for ${path}, with the Host that the route says`, async () => {
    const seen = JSON.parse((await ask(path)).body.toString()) as Echo;
    assert.equal(seen.url, url);
    assert.equal(seen.rawHeaders.find(([name]) => name.toLowerCase() === "host")?.[1], host());
  });
}

test("a route's rules change the headers of requests and of answers", async () => {
  const one = await ask("/rules", "x-set: old\r\nx-add: one\r\nx-gone: 1\r\n");
  const { rawHeaders } = JSON.parse(one.body.toString()) as Echo;
  const seen = (name: string) => rawHeaders.filter(([field]) => field.toLowerCase() === name).map(([, text]) => text);
  assert.deepEqual([seen("x-set"), seen("x-add").join(", "), seen("x-gone")], [["new"], "one, two", []]);
  assert.deepEqual([value(one, "x-out"), value(one, "content-type")], ["out", ""]);
});

test("a body over a route's limit is 413, announced or not, and says so as JSON to who asks for it", async () => {
  for (
    const body of [
      "Content-Length: 11\r\n\r\n01234567890",
      "Transfer-Encoding: chunked\r\n\r\nb\r\n01234567890\r\n0\r\n\r\n",
    ]
  ) {
    const head = "POST /small HTTP/1.1\r\nHost: a.test\r\nAccept: application/json\r\n";
    const { answers: [one] } = await rawRequest(program.port, head + body, QUICK);
    assert.deepEqual([status(one!), value(one!, "content-type")], [413, "application/problem+json"]);
    const { status: code, title } = JSON.parse(one!.body.toString());
    assert.deepEqual([code, title], [413, "the request's body is too large"]);
    assert.equal(value(one!, "x-lb-failure"), "body-too-large");
  }
});

test("cors: one of the origins may read the answers, with cookies, and its preflight is answered here", async () => {
  const origin = "Origin: https://app.test\r\n";
  const one = await ask("/cors", origin);
  assert.equal(value(one, "access-control-allow-origin"), "https://app.test");
  assert.equal(value(one, "access-control-allow-credentials"), "true");
  const stranger = await ask("/cors", "Origin: https://evil.test\r\n");
  assert.equal(value(stranger, "access-control-allow-origin"), "");
  const asked = server.requests.length;
  const preflight = get("/cors", `${origin}Access-Control-Request-Method: PUT\r\n`).replace("GET", "OPTIONS");
  const { answers: [allowed] } = await rawRequest(program.port, preflight, QUICK);
  assert.deepEqual([status(allowed!), value(allowed!, "access-control-max-age")], [204, "60"]);
  assert.match(value(allowed!, "access-control-allow-methods"), /\bPUT\b/);
  assert.equal(server.requests.length, asked);
});

test("cors: an OPTIONS that asks for no method is no preflight, and goes to the server", async () => {
  const asked = server.requests.length;
  const { answers: [one] } = await rawRequest(
    program.port,
    get("/cors", "Origin: https://app.test\r\n").replace("GET", "OPTIONS"),
    QUICK,
  );
  assert.deepEqual([status(one!), value(one!, "access-control-allow-origin")], [200, "https://app.test"]);
  assert.equal(server.requests.length, asked + 1);
  assert.match(server.requests[asked]!.start, /^OPTIONS \/cors /);
});

for (
  const [origin, isAllowed] of [
    ["https://a.b.test", true],
    ["https://x.a.b.test", true],
    ["https://b.test", false],
    ["https://.b.test", false],
    ["https://ab.test", false],
    ["http://a.b.test", false],
    ["https://a.b.test:8443", false],
    ["https://a.b.test.evil.test", false],
    ["http://c.test:81", true],
    ["http://c.test", false],
  ] as const
) {
  test(`cors: ${origin} ${isAllowed ? "is" : "is not"} below https://*.b.test, or the other origin`, async () => {
    const one = await ask("/cors/below", `Origin: ${origin}\r\n`);
    assert.equal(value(one, "access-control-allow-origin"), isAllowed ? origin : "");
  });
}

for (const method of ["OPTIONS", "DELETE", "POST"]) {
  test(`a request without a body stays one: ${method}`, async () => {
    const asked = server.requests.length;
    await rawRequest(program.port, get("/old").replace("GET", method), QUICK);
    const { headers } = server.requests[asked]!;
    const framing = headers.filter(([name]) => /^(transfer-encoding|content-length)$/i.test(name)).flat();
    assert.deepEqual(framing, method === "POST" ? ["Content-Length", "0"] : []);
  });
}
