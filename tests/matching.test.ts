// Which route takes a request and what it makes of it, as clients and servers of the running program see it.

import assert from "node:assert/strict";
import { after, before, test as nodeTest } from "node:test";
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
  value,
} from "./rig.ts";

const test = (name: string, body: () => Promise<void>) => nodeTest(name, { timeout: 120_000 }, body);

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
    ],
  });
});

after(async () => {
  await program?.stop();
  await server?.close();
});

async function ask(path: string, headers = "", host = "a.test"): Promise<Message> {
  const { answers: [one] } = await rawRequest(program.port, get(path, headers, host));
  assert.ok(one, `${path} has an answer`);
  return one;
}

const ROUTED: [path: string, expected: string | number, headers?: string, host?: string][] = [
  ["/", "any", "", "a.w.test"],
  ["/", "longer", "", "a.long.w.test"],
  ["/", 404, "", "w.test"],
  ["/p", "exact"],
  ["/p/q", "prefix"],
  ["/pq", 404],
  ["/v2/x", "regex"],
  ["/v3/x", 404],
  ["/one", "list"],
  ["/two/x", "list"],
  ["/head", "header", "x-beta: 2\r\n"],
  ["/head", 404, "x-beta: 3\r\n"],
  ["/ask?debug=1", "query"],
  ["/ask?debug=2", 404],
  ["/gone", 410],
  ["/closed", 403],
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
  const [path, code, to] of [["/to?a=1", 308, /^https:\/\/b\.test\/x$/], ["/part?a=1", 301, /\/new\?a=1$/]] as const
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
  ] as const
) {
  test(`the server sees ${url} for ${path}, with the Host that the route says`, async () => {
    const seen = JSON.parse((await ask(path)).body.toString()) as Echo;
    assert.equal(seen.url, url);
    assert.equal(seen.rawHeaders.find(([name]) => name.toLowerCase() === "host")?.[1], host());
  });
}
