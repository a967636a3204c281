// A client stays on its server: what the cookie says and does not say, when a client moves, and what passes untouched.

import assert from "node:assert/strict";
import { parseConfig, printConfig } from "../../lb.ts";
import { answerTo, balancerFor, refusal } from "../rig/balancer.ts";
import { test } from "../rig/rig.ts";
import type { Fields } from "../rig/types.ts";

const SHOP = "shop: { servers: [a:1, b:1, c:1], sticky: { cookie: lb } }";

interface Ask {
  path?: string;
  cookie?: string;
  scheme?: string;
  headers?: Record<string, string>;
}

/** A balancer over scripted servers, and a client who sends what it is told to. `down`: who refuses connections. */
function setUp(services = SHOP, routes = "default: { service: shop }", top = "") {
  const yaml = (services: string, routes: string) =>
    `log: off\n${top}\ndefaults: { health: off, eject: off }\nservices: { ${services} }\n${routes}`;
  const down = new Set<string>();
  const draws: number[] = [];
  const seen: { cookies: string[]; headers: Fields[] } = { cookies: [], headers: [] };
  const { lb, send, service } = balancerFor(yaml(services, routes), {
    random: () => draws.shift() ?? 0.5,
    fetch: (_url, attempt) => {
      const { name } = attempt.server;
      if (down.has(name[0]!)) return refusal();
      const at = attempt.headers.indexOf("cookie");
      seen.cookies.push(at < 0 ? "" : attempt.headers[at + 1]!);
      seen.headers.push(attempt.headers);
      return answerTo(attempt, 200, [["x-server", name[0]!], ["set-cookie", "own=1"], ["set-cookie", "other=2"]]);
    },
  });
  /** Who answered, and the cookies that were set beside the server's own. */
  const ask = async ({ path = "/", cookie, scheme = "http", headers = {} }: Ask = {}) => {
    const all = { ...(cookie !== undefined && { cookie }), ...headers };
    const response = await send(`${scheme}://h${path}`, { headers: all, from: { scheme } });
    const set = response.headers.getSetCookie().filter((one) => !/^(own|other)=/.test(one));
    return { server: response.headers.get("x-server") ?? response.headers.get("x-lb-failure")!, set, response };
  };
  /** A new client: its server and its cookie. */
  const arrive = async (one: Ask = {}) => {
    const { server, set } = await ask(one);
    assert.equal(set.length, 1);
    return { server, cookie: set[0]!.split(";")[0]! };
  };
  const reload = (services: string, again = routes) => lb.reload(parseConfig(yaml(services, again)));
  return { lb, ask, arrive, down, draws, seen, service, reload };
}

test("a client gets a cookie once, and stays with its server", async () => {
  const { ask, arrive } = setUp();
  const clients = [await arrive(), await arrive(), await arrive()];
  assert.deepEqual(clients.map(({ server }) => server), ["a", "b", "c"]);
  for (let i = 0; i < 5; i++) {
    for (const { server, cookie } of clients) {
      const { server: again, set } = await ask({ cookie });
      assert.deepEqual([again, set], [server, []]);
    }
  }
});

test("clients who stay take no turns away from those who come", async () => {
  const { ask, arrive } = setUp("shop: { servers: [a:1, b:1], sticky: { cookie: lb } }");
  const { cookie } = await arrive();
  const came = [];
  for (let i = 0; i < 6; i++) {
    await ask({ cookie });
    came.push((await arrive()).server);
  }
  assert.equal(came.join(""), "bababa");
});

test("the cookie is for this site and not for scripts, and over https only where it was set over https", async () => {
  const { ask } = setUp();
  assert.match((await ask()).set[0]!, /^lb=[\w-]{22}; Path=\/; HttpOnly; SameSite=Lax$/);
  assert.match((await ask({ scheme: "https" })).set[0]!, /^lb=[\w-]{22}; Path=\/; HttpOnly; SameSite=Lax; Secure$/);
  const aged = setUp("shop: { servers: [a:1], sticky: { cookie: id, max_age: 30d } }", undefined, "trust: [192.0.2.9]");
  const { set } = await aged.ask({ headers: { "x-forwarded-proto": "https" } });
  assert.match(set[0]!, /^id=[\w-]{22}; Path=\/; Max-Age=2592000; HttpOnly; SameSite=Lax; Secure$/);
});

test("the cookie tells nothing about the server, and nobody can make one", async () => {
  const secret = (word: string) => `shop: { servers: [a:1, b:1], sticky: { cookie: lb, secret: ${word} } }`;
  const one = await setUp(secret("one")).arrive();
  assert.equal((await setUp(secret("one")).arrive()).cookie, one.cookie, "the same secret, the same value");
  assert.notEqual((await setUp(secret("two")).arrive()).cookie, one.cookie);
  assert.notEqual(
    (await setUp().arrive()).cookie,
    (await setUp().arrive()).cookie,
    "without one each process has its own",
  );
  for (const encoded of ["a:1", "YTox", "613a31"]) assert.ok(!one.cookie.includes(encoded));
});

test("what is forged, of another secret, empty or garbage is as if it were not there", async () => {
  const { ask, arrive } = setUp();
  const { cookie } = await arrive();
  const stranger = await setUp().arrive();
  const last = cookie.at(-1) === "A" ? "B" : "A";
  const forged = [
    stranger.cookie,
    cookie.slice(0, -1) + last,
    cookie.slice(0, -1),
    cookie.toUpperCase(),
    "lb=",
    "lb",
    "lb=a:1",
    "lb=..",
    "lb=__proto__",
    `lb=${"x".repeat(4000)}`,
    `lbx=${cookie.slice(3)}`,
    "lb=%00%ff",
  ];
  const servers = [];
  for (const cookie of forged) {
    const { server, set } = await ask({ cookie });
    assert.match(set[0]!, /^lb=[\w-]{22};/, cookie);
    servers.push(server);
  }
  assert.equal(servers.join(""), "bcabcabcabca", "the strategy decides");
});

test("a client whose server is dead, ejected, full or gone moves once", async () => {
  const ways: Record<string, (rig: ReturnType<typeof setUp>) => unknown> = {
    "refuses": ({ down }) => down.add("a"),
    "down": ({ service }) => Object.assign(service("shop").servers[0]!, { up: false }),
    "ejected": ({ service }) => Object.assign(service("shop").servers[0]!, { ejectedUntil: 1e6 }),
    "full": ({ service }) => Object.assign(service("shop").servers[0]!, { inFlight: 5 }),
    "gone": ({ reload }) => reload("shop: { servers: [b:1, c:1], sticky: { cookie: lb } }"),
  };
  for (const [name, way] of Object.entries(ways)) {
    const rig = setUp("shop: { servers: [a:1, b:1, c:1], sticky: { cookie: lb }, max_in_flight: 5 }");
    const client = await rig.arrive();
    assert.equal(client.server, "a");
    way(rig);
    rig.service("shop").candidatesUntil = 0;
    const moved = await rig.ask({ cookie: client.cookie });
    assert.equal(moved.response.status, 200, name);
    assert.ok(/[bc]/.test(moved.server), name);
    assert.equal(moved.set.length, 1, name);
    for (let i = 0; i < 3; i++) {
      const { server, set } = await rig.ask({ cookie: moved.set[0]!.split(";")[0]! });
      assert.deepEqual([server, set], [moved.server, []], name);
    }
    rig.service("shop").servers.forEach((server) => server.inFlight = 0);
  }
});

test("a reload keeps clients where they are, also when servers come and their order changes", async () => {
  const { ask, arrive, reload } = setUp();
  const clients = [await arrive(), await arrive(), await arrive()];
  reload("shop: { servers: [d:1, c:1, b:1, a:1], sticky: { cookie: lb } }");
  for (const { server, cookie } of clients) assert.deepEqual((await ask({ cookie })).server, server);
  reload("shop: { servers: [a:1, b:1, c:1], sticky: { cookie: lb, secret: another } }");
  assert.equal((await ask({ cookie: clients[0]!.cookie })).set.length, 1, "another secret: values are of no use");
});

test("servers get the client's other cookies as they came, and never ours", async () => {
  const { ask, arrive, seen } = setUp();
  const { cookie } = await arrive();
  const sent: [string, string][] = [
    [`${cookie}`, ""],
    [`a=1; ${cookie}; b="2 3"`, `a=1; b="2 3"`],
    [`${cookie}; a=1`, "a=1"],
    [`a=lb;${cookie}`, "a=lb"],
    [`a=1; lb=; ${cookie};xlb=2`, "a=1;xlb=2"],
    ["a=%20;  b", "a=%20;  b"],
  ];
  for (const [given, passed] of sent) {
    await ask({ cookie: given });
    assert.equal(seen.cookies.at(-1), passed, given);
    assert.equal(seen.headers.at(-1)!.includes("cookie"), passed !== "", given);
  }
});

test("the server's own cookies pass beside ours, and rules for the answer do not take ours away", async () => {
  const { ask } = setUp();
  assert.equal((await ask()).response.headers.getSetCookie().slice(0, 2).join(" "), "own=1 other=2");
  const ruled = setUp(SHOP, "default: { service: shop, response: { headers: { remove: [set-cookie] } } }");
  const all = (await ruled.ask()).response.headers.getSetCookie();
  assert.equal(all.length, 1);
  assert.match(all[0]!, /^lb=/);
});

test("a service without sticky sets nothing and passes every cookie", async () => {
  const { ask, seen } = setUp("shop: { servers: [a:1, b:1] }");
  const { set } = await ask({ cookie: "lb=abc; a=1" });
  assert.deepEqual([set, seen.cookies], [[], ["lb=abc; a=1"]]);
});

const TWO = `shop: { servers: [a:1, b:1, c:1], sticky: { cookie: lb } },
  next: { servers: [x:1, y:1, z:1], sticky: { cookie: lb } }`;

test("services that share a cookie do not take each other's clients away", async () => {
  const { ask, arrive } = setUp(TWO, "paths: [{ path: /next, service: next }]\ndefault: { service: shop }");
  await arrive();
  const shop = await arrive();
  const next = await arrive({ path: "/next", cookie: shop.cookie });
  assert.equal(shop.server + next.server, "bx");
  for (let i = 0; i < 3; i++) {
    const { cookie } = next;
    assert.equal((await ask({ cookie })).server, "b");
    const there = await ask({ cookie, path: "/next" });
    assert.deepEqual([there.server, there.set], ["x", []]);
  }
});

test("a server of two services is two servers: who belongs to one of them is new to the other", async () => {
  const both = "shop: { servers: [a:1, b:1], sticky: {} }, next: { servers: [b:1, a:1], sticky: {} }";
  const { ask, arrive } = setUp(both, "paths: [{ path: /next, service: next }]\ndefault: { service: shop }");
  const { cookie } = await arrive();
  const there = await ask({ path: "/next", cookie });
  assert.deepEqual([there.server, there.set.length], ["b", 1]);
});

const SPLIT = "default: { split: { shop: 50, next: 50 } }";

test("a client of a split stays with its service, also when its server there dies or it asks the other one by name", async () => {
  const rig = setUp(TWO, `paths: [{ path: /shop, service: shop }]\n${SPLIT}`);
  rig.draws.push(0.9);
  const first = await rig.arrive();
  assert.equal(first.server, "x");
  const both = await rig.arrive({ path: "/shop", cookie: first.cookie });
  assert.equal(both.server, "a");
  rig.draws.push(...Array(9).fill(0));
  assert.equal((await rig.ask(both)).server, "x");
  rig.down.add("x");
  const moved = await rig.arrive({ cookie: both.cookie });
  assert.equal(moved.server, "y");
  for (let i = 0; i < 3; i++) assert.equal((await rig.ask(moved)).server, "y");
  rig.reload(TWO, "default: { split: { shop: 100, next: 0 } }");
  assert.match((await rig.ask(moved)).server, /[abc]/, "a share of 0 is none");
});

test("a client whom another service answers in the end gets no cookie of a server that was tried before", async () => {
  const services = "shop: { servers: [a:1], sticky: { cookie: lb }, fallback: spare }, spare: { servers: [x:1] }";
  const { ask, down } = setUp(services);
  down.add("a");
  const { server, set } = await ask();
  assert.deepEqual([server, set], ["x", []]);
});

test("a split in which only one service is sticky is drawn anew each time: it would collect all clients", async () => {
  const rig = setUp(`shop: { servers: [a:1] }, next: { servers: [x:1], sticky: { cookie: lb } }`, SPLIT);
  rig.draws.push(0.9);
  const { cookie } = await rig.arrive();
  rig.draws.push(0.1, 0.9);
  assert.equal((await rig.ask({ cookie })).server + (await rig.ask({ cookie })).server, "ax");
});

test("routes.yml: what sticky may say, and its secret is never printed", () => {
  const file = (sticky: string) => parseConfig(`default: { servers: [a:1], sticky: ${sticky} }`);
  for (
    const wrong of [
      "{ cookie: 'a b' }",
      "{ cookie: '' }",
      "{ secret: '' }",
      "{ name: lb }",
      "on",
      "yes",
      "{max_age: -1s}",
      "{max_age: 401d}",
    ]
  ) {
    assert.throws(() => file(wrong), { name: "ConfigError" }, wrong);
  }
  const config = file("{ cookie: id, secret: hush }");
  assert.match(printConfig(config), /cookie: id\n\s+secret: "?\*\*\*/);
  assert.ok(!printConfig(config).includes("hush"));
});
