// What real clients, proxies and servers send: cases from the field, over sockets. The id at the end of a test's name is
// that of its case: R are requests, P requests behind another proxy, A answers of servers. Most R and A cases are rows of
// conformance.test.ts, with their ids; here stand those that need routes of their own.

import assert from "node:assert/strict";
import { after, before } from "node:test";
import { gunzipSync } from "node:zlib";
import { createLoadBalancer, parseConfig } from "../../lb.ts";
import {
  answer,
  echo,
  echoServer,
  get,
  type Message,
  type Program,
  rawRequest,
  readGzip,
  requestOf,
  type Script,
  type ScriptedServer,
  startProgram,
  status,
  target,
  test,
  until,
  value,
  values,
} from "../rig/rig.ts";
import type { Attempt } from "../rig/types.ts";

let server: ScriptedServer, second: ScriptedServer, program: Program;

const KNOWN = ["203.0.113.7", "2001:db8::7"]; // clients that rules name
before(async () => {
  [server, second] = await Promise.all([echoServer(), echoServer()]);
  const servers = [server.address];
  program = await startProgram({
    trust: ["127.0.0.1", "10.0.0.0/8"],
    log: "json",
    defaults: { health: "off", eject: "off", retries: 0 },
    services: {
      shop: { servers },
      hashed: { servers: [...servers, second.address], strategy: { hash: { client: true } } },
    },
    routes: [
      { path: "/secure", scheme: "http", redirect: { scheme: "https" } },
      { path: "/moved", redirect: { path: "/new" } },
      { path: "/deny", service: "shop", deny: KNOWN },
      { path: "/allow", service: "shop", allow: KNOWN },
      { path: "/rate", service: "shop", rate: { requests: 1, per: "1h" } },
      { path: "/hash", service: "hashed" },
      { path: "/sticky", servers, sticky: { cookie: "lb" } },
      {
        path: "/cors/open",
        service: "shop",
        cors: { origin: "https://page.test" },
        response: { headers: { set: { "x-rule": "1", "access-control-max-age": "5" } } },
      },
      { path: "/cors/deny", service: "shop", cors: { origin: "*" }, deny: ["127.0.0.1"] },
      { path: "/cors/rate", service: "shop", cors: { origin: "*" }, rate: { requests: 1, per: "1h" } },
      { path: "/cors/small", service: "shop", cors: { origin: "*" }, body_limit: 3 },
      { path: "/cors/none", servers: ["127.0.0.1:1"], cors: { origin: "*" } },
      { path: "/query", service: "shop", request: { query: { set: { b: "new" }, remove: ["c"] } } },
      { path: "/strip", service: "shop", rewrite: { path: "/v2" } },
      { path: "/text", servers, compress: true },
    ],
    default: { service: "shop" },
  });
});
after(async () => {
  await program?.stop();
  await Promise.all([server?.close(), second?.close()]);
});

/** The answer to a request, after the servers have been set to this script. */
async function ask(bytes: string, script: Script = echo): Promise<Message> {
  server.reset(script);
  second.reset(script);
  const { answers } = await rawRequest(program.port, bytes);
  assert.equal(answers.length, 1, bytes);
  return answers[0]!;
}

// ─── P: behind another proxy ───

interface Told {
  sent: string;
  client?: string;
  scheme?: string;
  host?: string;
  port?: string;
  /** Addresses behind the client, the peer last. */
  proxies?: string[];
}
const CLIENT = "203.0.113.7", SIX = "2001:db8::7";
const FOR = `X-Forwarded-For: ${CLIENT}\r\n`;

const TOLD: Record<string, Told> = {
  "nothing is told: P1": { sent: "", client: "127.0.0.1", proxies: [] },
  "X-Forwarded-For and -Proto without Forwarded: P1": { sent: `${FOR}X-Forwarded-Proto: https\r\n`, scheme: "https" },
  "X-Forwarded-Proto alone: P1": {
    sent: "X-Forwarded-Proto: HTTPS\r\n",
    client: "127.0.0.1",
    scheme: "https",
    proxies: [],
  },
  "X-Forwarded-Host and -Port: P1": {
    sent: `${FOR}X-Forwarded-Host: shop.test\r\nX-Forwarded-Port: 8443\r\nX-Forwarded-Proto: https\r\n`,
    ...{ scheme: "https", host: "shop.test", port: "8443" },
  },
  "X-Forwarded-Port of a proxy behind the one that ends TLS: P1": {
    sent: `${FOR}X-Forwarded-Port: 80\r\nX-Forwarded-Proto: https\r\n`,
    scheme: "https",
  },
  "the scheme of a WebSocket: P1": { sent: `${FOR}X-Forwarded-Proto: wss\r\n`, scheme: "https" },
  "Forwarded alone: P2": { sent: `Forwarded: for=${CLIENT};proto=https\r\n`, scheme: "https" },
  "Forwarded with host, by and capitals: P2": {
    sent: `FORWARDED: For="${CLIENT}"; By=10.0.0.9; Host="shop.test:8443"; Proto=HTTPS\r\n`,
    ...{ scheme: "https", host: "shop.test:8443" },
  },
  "Forwarded without an address: P2": {
    sent: "Forwarded: proto=https;host=shop.test\r\n",
    ...{ client: "127.0.0.1", scheme: "https", host: "shop.test", proxies: [] },
  },
  "a port behind the address: P3": { sent: `X-Forwarded-For: ${CLIENT}:51008\r\n` },
  "a port behind the address in Forwarded: P3": { sent: `Forwarded: for="${CLIENT}:51008"\r\n` },
  "a port behind an IPv6 address: P3": { sent: `X-Forwarded-For: [${SIX}]:443\r\n`, client: SIX },
  "the zone of an address on the same link: P3": { sent: "X-Forwarded-For: fe80::7%eth0\r\n", client: "fe80::7" },
  "a zone and a port in Forwarded: P3": { sent: `Forwarded: for="[fe80::7%en0]:443"\r\n`, client: "fe80::7" },
  "IPv6 without a port: P3": { sent: `X-Forwarded-For: 2001:DB8:0::7\r\n`, client: SIX },
  "IPv4 in IPv6: P3": { sent: `X-Forwarded-For: ::ffff:${CLIENT}\r\n` },
  "IPv6 with a port in Forwarded: P4": { sent: `Forwarded: for="[${SIX}]:443"\r\n`, client: SIX },
  "a hidden port in Forwarded: P4": { sent: `Forwarded: for="${CLIENT}:_p-1"\r\n` },
  "lines and lists of X-Forwarded-For, from right to left: P4": {
    sent: `X-Forwarded-For: 198.51.100.1, ${CLIENT}\r\nX-Forwarded-For: 10.0.0.1 ,10.0.0.2:80\r\n`,
    proxies: ["10.0.0.1", "10.0.0.2", "127.0.0.1"],
  },
  "lines and lists of Forwarded, from right to left: P4": {
    sent: `Forwarded: for=198.51.100.1;proto=http, for="${CLIENT}";proto=https;host=shop.test\r\n` +
      `Forwarded: for=10.0.0.1;proto=http;host=inner.test\r\n`,
    ...{ scheme: "https", host: "shop.test", proxies: ["10.0.0.1", "127.0.0.1"] },
  },
  "lists of schemes and hosts, as long as the proxies are trusted: P4": {
    sent: `X-Forwarded-For: ${CLIENT}, 10.0.0.1\r\nX-Forwarded-Proto: gopher, https, http\r\n` +
      `X-Forwarded-Host: evil.test, shop.test, inner.test\r\n`,
    ...{ scheme: "https", host: "shop.test", proxies: ["10.0.0.1", "127.0.0.1"] },
  },
  "what a client has written in front of a proxy's: P4": {
    sent: `X-Forwarded-For: 198.51.100.1, ${CLIENT}\r\nX-Forwarded-Proto: https, http\r\n`,
  },
  "both headers with one story: P4": {
    sent: `${FOR}Forwarded: for=${CLIENT};proto=https;host=shop.test\r\n`,
    ...{ scheme: "https", host: "shop.test" },
  },
  "both headers with two stories: X-Forwarded-* count: P4": {
    sent: `${FOR}Forwarded: for=198.51.100.1;proto=https;host=evil.test\r\n`,
  },
  "an unknown node: P4": { sent: `Forwarded: for=${CLIENT}, for=unknown\r\n`, client: "127.0.0.1", proxies: [] },
  "a hidden node behind a trusted one: P4": {
    sent: `Forwarded: for=_hidden;proto=https, for=10.0.0.1\r\n`,
    ...{ client: "10.0.0.1", proxies: ["127.0.0.1"] },
  },
  "an address that is none: P4": {
    sent: `X-Forwarded-For: ${CLIENT}, 300.1.1.1\r\n`,
    client: "127.0.0.1",
    proxies: [],
  },
  "a quote that a client has left open: P4": { sent: `Forwarded: for="198.51.100.1\r\nForwarded: for=${CLIENT}\r\n` },
  "a quote that a client has left open in front of a proxy's own: P4": {
    sent: `Forwarded: for="198.51.100.1\r\nForwarded: for="${CLIENT}:443";proto=https\r\n`,
    scheme: "https",
  },
  "commas and semicolons in quotes: P4": {
    sent: `Forwarded: secret="a, for=198.51.100.1;\\"b";for=${CLIENT};proto=https\r\n`,
    scheme: "https",
  },
  "empty elements of a list: P4": {
    sent: `X-Forwarded-For: ,${CLIENT},\r\nX-Forwarded-For:\r\nX-Forwarded-For: 10.0.0.1, ,\r\n`,
    proxies: ["10.0.0.1", "127.0.0.1"],
  },
  "empty elements of Forwarded: P4": { sent: `Forwarded: ,for=${CLIENT};;proto=https; ,\r\n`, scheme: "https" },
  "an entry of Forwarded that says a thing twice: P4": {
    sent: `Forwarded: for=198.51.100.1;for=${CLIENT};proto=https\r\n`,
    ...{ client: "127.0.0.1", proxies: [] },
  },
  "a scheme and hosts that are none: P4": {
    sent: `${FOR}X-Forwarded-Proto: gopher\r\nX-Forwarded-Host: a b\r\nForwarded: for=${CLIENT};host="c/d";proto=x\r\n`,
  },
  "look-alikes of both: P4": {
    sent: "X_Forwarded_For: 6.6.6.6\r\nX.Forwarded.Proto: https\r\n",
    client: "127.0.0.1",
    proxies: [],
  },
};

interface LogLine {
  "client.address": string;
  "url.scheme": string;
  "server.address": string;
  "url.path": string;
}
const logged = (path: string) =>
  until("the request is in the log", () => {
    const line = program.output().split("\n").find((one) => one.includes(`"${path}"`));
    return line !== undefined && JSON.parse(line) as LogLine;
  });
const node = (address: string) => address.includes(":") ? `"[${address}]"` : address;

Object.entries(TOLD).forEach(([name, row], i) => {
  const { sent, client = CLIENT, scheme = "http", host = "a.test", port = "", proxies = ["127.0.0.1"] } = row;
  test(`one reading of what proxies tell: ${name}`, async () => {
    await ask(get(`/told/${i}`, sent));
    const [seen] = server.requests, own = `for=${node(client)};host="${host}";proto=${scheme}`;
    const told = ["x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-port", "forwarded"];
    assert.deepEqual(told.map((one) => values(seen!, one)), [
      [[client, ...proxies].join(", ")],
      [host],
      [scheme],
      port ? [port] : [],
      [[own, ...proxies.map((proxy) => `for=${node(proxy)}`)].join(", ")],
    ], "what the server gets");
    const rules = [await ask(get("/deny", sent)), await ask(get("/allow", sent))].map(status);
    assert.deepEqual(rules, KNOWN.includes(client) ? [403, 200] : [200, 403], "deny and allow");
    const place = port ? `${host}:${port}` : host;
    assert.equal(value(await ask(get("/moved", sent)), "location"), `${scheme}://${place}/new`, "a redirect");
    assert.equal(status(await ask(get("/secure", sent))), scheme === "https" ? 200 : 302, "a route of one scheme");
    const cookie = value(await ask(get("/sticky", sent)), "set-cookie");
    assert.equal(/; Secure/.test(cookie), scheme === "https", "a cookie of our own");
    const line = await logged(`/told/${i}`), name = host.replace(/:\d+$/, "");
    const words = [line["client.address"], line["url.scheme"], line["server.address"]];
    assert.deepEqual(words, [client, scheme, name], "the log");
  });
});

const SPELLINGS = [
  `X-Forwarded-For: 203.0.113.99\r\n`,
  `X-Forwarded-For: 203.0.113.99:51008\r\n`,
  `Forwarded: for=203.0.113.99\r\n`,
  `Forwarded: for="203.0.113.99:443";proto=https\r\n`,
];

test("a client has one rate and one server, however its proxy spells it, and others have theirs: P2, P3", async () => {
  const statuses = [], ports = new Set<boolean>();
  for (const sent of SPELLINGS) {
    statuses.push(status(await ask(get("/rate", sent))));
    await ask(get("/hash", sent));
    ports.add(server.requests.length === 1);
  }
  statuses.push(status(await ask(get("/rate", "Forwarded: for=203.0.113.98\r\n"))));
  assert.deepEqual([statuses, ports.size], [[200, 429, 429, 429, 200], 1]);
});

test("what trusted proxies tell besides passes as they spell it: P1", async () => {
  const [seen] = (await ask(get("/", `${FOR}X-Forwarded-Prefix: /Shop\r\nX-Real-IP: ${CLIENT}\r\n`)), server.requests);
  const passed = seen!.headers.filter(([name]) => /prefix|real/i.test(name));
  assert.deepEqual(passed, [["X-Forwarded-Prefix", "/Shop"], ["X-Real-IP", CLIENT]]);
});

test("the same head is read anew for another peer and after trust has changed: P1", () => {
  const config = (trust: string) => parseConfig(`trust: [${trust}]\ndefault: { servers: [a:1], health: off }`);
  const seen: (string | undefined)[] = [];
  const send = ({ lines }: Attempt) => void seen.push(/^x-forwarded-for: (.*)\r$/m.exec(lines)?.[1]);
  const lb = createLoadBalancer(config("10.0.0.1"), { send, accessLog() {} });
  const block = { fields: ["host", "a.test", "x-forwarded-for", CLIENT], passing: undefined };
  const from = (...peers: string[]) => peers.forEach((peer) => lb.handle(requestOf({ block, peer })));
  from("192.0.2.9", "10.0.0.1", "10.0.0.1", "192.0.2.9");
  void lb.reload(config("192.0.2.9"));
  from("192.0.2.9", "10.0.0.1");
  const through = `${CLIENT}, 10.0.0.1`;
  assert.deepEqual(seen, ["192.0.2.9", through, through, "192.0.2.9", `${CLIENT}, 192.0.2.9`, "10.0.0.1"]);
});

// ─── R: nothing that passes is rewritten ───

const PASSES: Record<string, [sent: string, seen: string]> = {
  "a rule for two parameters: R10, R11": [
    "/query?a=c:\\x&b=1&c&d='\"<>\xe9&e=%7e+%zz&&b=2&%63=3&f",
    "/query?a=c:\\x&b=new&d='\"<>\xe9&e=%7e+%zz&&f",
  ],
  "a rule that sets a parameter which is not there: R11": ["/query?x=%20'&", "/query?x=%20'&&b=new"],
  "a rewrite of a prefix: R11": ["/str%69p/caf%c3%a9/\xe9|%7E?q='", "/v2/caf%c3%a9/\xe9|%7E?q='"],
  "a prefix in another spelling: R11": ["/%71uery?a", "/%71uery?a&b=new"],
};
for (const [name, [sent, seen]] of Object.entries(PASSES)) {
  test(`what no rule changes passes byte for byte: ${name}`, async () => {
    await ask(get(sent));
    assert.equal(target(server.requests[0]!), seen);
  });
}

for (const name of ["Transfer___Encoding", "Transfer---Encoding", "Content__Length", "X-Forwarded--For"]) {
  test(`a name that folds into a framing word does not pass: ${name}: R20`, async () => {
    await ask(get("/", `${name}: chunked\r\n`));
    assert.deepEqual(values(server.requests[0]!, name), []);
  });
}

// ─── A: answers of servers ───

const ORIGIN = "Origin: https://page.test\r\n";
const post = (path: string, body: string, headers = "") =>
  `POST ${path} HTTP/1.1\r\nHost: a.test\r\n${headers}Connection: close\r\nContent-Length: ${body.length}\r\n\r\n${body}`;

const REFUSED: Record<string, [bytes: string, status: number]> = {
  "403 of deny": [get("/cors/deny", ORIGIN), 403],
  "429 of rate": [get("/cors/rate", ORIGIN), 429],
  "413 of body_limit": [post("/cors/small", "four", ORIGIN), 413],
  "502 of a server that is not there": [get("/cors/none", ORIGIN), 502],
};
for (const [name, [bytes, code]] of Object.entries(REFUSED)) {
  test(`a page can read what we refuse on a route with cors: ${name}: A7`, async () => {
    if (code === 429) await ask(bytes);
    const refused = await ask(bytes);
    assert.deepEqual([status(refused), value(refused, "access-control-allow-origin")], [code, "*"]);
    assert.notEqual(value(refused, "x-lb-failure"), "");
  });
}

test("a preflight costs no token and is answered where a rule refuses the request: A7", async () => {
  for (const path of ["/cors/deny", "/cors/rate", "/cors/rate"]) {
    const preflight = get(path, `${ORIGIN}Access-Control-Request-Method: PUT\r\n`).replace("GET", "OPTIONS");
    const allowed = await ask(preflight);
    assert.deepEqual([status(allowed), value(allowed, "access-control-allow-origin")], [204, "*"], path);
  }
});

const WHOLE = "HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n" +
  "HTTP/1.1 999 Request Denied\r\nX-a: 1\r\nx-A: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 7\r\n\r\n";
for (const path of ["/", "/cors/open", "/text"]) {
  test(`103, a reason of its own, status 999, fields as spelled and trailers pass: ${path}: A2`, async () => {
    server.reset((visit) => visit.send(WHOLE));
    const { bytes, interim } = await rawRequest(program.port, get(path, `${ORIGIN}TE: trailers\r\n`));
    const text = bytes.toString("latin1");
    assert.deepEqual(interim.map((one) => [status(one), value(one, "link")]), [[103, "</a.css>"]]);
    assert.match(text, /\r\n\r\nHTTP\/1\.1 999 Request Denied\r\nX-a: 1\r\nx-A: 2\r\n/);
    assert.match(text, /\r\n2\r\nok\r\n0\r\nX-Sum: 7\r\n\r\n$/);
    assert.equal(text.includes("access-control-allow-origin: https://page.test\r\n"), path === "/cors/open");
  });
}

test("with cors a server's own Access-Control-* do not pass, neither for a page that may read nor for another: A7", async () => {
  const own: Script = (visit) =>
    visit.send(answer("ok", "Access-Control-Allow-Origin: *\r\nAccess-Control-Expose-Headers: x\r\nVary: b\r\n"));
  for (const [origin, allowed] of [["https://page.test", "https://page.test"], ["https://other.test", ""]]) {
    const given = await ask(get("/cors/open", `Origin: ${origin}\r\n`), own);
    const names = ["access-control-allow-origin", "access-control-expose-headers", "vary", "access-control-max-age"];
    assert.deepEqual(names.map((name) => value(given, name)), [allowed, "", "b, Origin", "5"]); // 5: by a rule
  }
});

test("trailers pass behind a body that compress encodes: A4", async () => {
  server.reset((visit) =>
    visit.send(
      'HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nETag: "1"\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 7\r\n\r\n',
    )
  );
  const fields = "TE: trailers\r\nAccept-Encoding: *;q=0.1\r\n";
  const { answers, bytes } = await rawRequest(program.port, get("/text", fields));
  assert.match(bytes.toString("latin1"), /\r\n0\r\nX-Sum: 7\r\n\r\n$/);
  assert.equal(gunzipSync(answers[0]!.body).toString(), "ok");
  assert.deepEqual(["etag", "vary"].map((name) => value(answers[0]!, name)), ['W/"1"', "Accept-Encoding"]);
});

const NOT_ENCODED: Record<string, [accepted: string, head: string]> = {
  "a client that does not take gzip": ["br, gzip;q=0", "Content-Type: text/html\r\n"],
  "an answer that is encoded": ["gzip", "Content-Type: text/html\r\nContent-Encoding: br\r\n"],
  "an answer that nobody may transform": ["gzip", "Content-Type: text/html\r\nCache-Control: no-transform\r\n"],
  "an image": ["gzip", "Content-Type: image/png\r\n"],
  "events": ["gzip", "Content-Type: text/event-stream\r\n"],
};
for (const [name, [accepted, fields]] of Object.entries(NOT_ENCODED)) {
  test(`compress leaves alone what is not for it: ${name}: A4`, async () => {
    const text = "hello ".repeat(500), given = answer(text, fields);
    const got = await ask(get("/text", `Accept-Encoding: ${accepted}\r\n`), (visit) => visit.send(given));
    assert.deepEqual([got.body.toString(), value(got, "content-length")], [text, "3000"]);
  });
}

test("an answer whose lines end with LF alone is refused at once: A3", async () => {
  const refused = await ask(get("/"), (visit) => visit.send("HTTP/1.1 200 OK\nContent-Length: 2\n\nok"));
  assert.deepEqual([status(refused), value(refused, "x-lb-failure")], [502, "invalid-answer"]);
});

test("with compress each piece of an answer goes out when it comes: A4", async () => {
  for (const type of ["text/html", "application/json; charset=utf-8"]) {
    let got = "";
    server.reset(async (visit) => {
      await visit.send(`HTTP/1.1 200 OK\r\nContent-Type: ${type}\r\nTransfer-Encoding: chunked\r\n\r\n`);
      for (const piece of ["piece 1", "piece 2", "piece 3"]) {
        await visit.send(`7\r\n${piece}\r\n`);
        await until("the client has the piece", () => got.includes(piece)); // the next one is not sent before
      }
      await visit.send("0\r\n\r\n");
    });
    assert.equal(await readGzip(program.port, "/text", (text) => got = text), "piece 1piece 2piece 3");
  }
});
