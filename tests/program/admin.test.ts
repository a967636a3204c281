// The admin listener of the running program, asked with fetch as operators and their scripts ask it.

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { Hono } from "hono";
import { createAdmin, createLoadBalancer, parseConfig } from "../../lb.ts";
import {
  answer,
  freePort,
  get,
  makeFolder,
  type Program,
  rawRequest,
  runtime,
  type ScriptedServer,
  scriptedServer,
  sharedProgram,
  sleep,
  startProgram,
  status,
  target,
  test,
  until,
} from "../rig/rig.ts";

const TOKEN = "the-operators-token", READ_TOKEN = "the-readers-token";
const ADMIN = ["--admin", "127.0.0.1:0"];

/** Where there has been a token, there is one ever after: who asks with tokens has a program without which others do. */
const open = sharedProgram(ADMIN), guarded = sharedProgram(ADMIN);

/** The program with this config and an admin listener. */
async function running(config: unknown, use: (lb: Program) => Promise<void>) {
  await use(await (config === WITH_TOKENS ? guarded : open).begin(config));
}

/** A program of its own, while `use` lasts. */
async function runningAlone(config: unknown, use: (lb: Program) => Promise<void>, args: string[] = ADMIN) {
  const lb = await startProgram(config, args);
  try {
    await use(lb);
  } finally {
    await lb.stop();
  }
}

/** Everything an answer says. */
interface Said {
  status: number;
  headers: Headers;
  text: string;
  // deno-lint-ignore no-explicit-any
  json: any;
}

/** One request to the admin; a body that is no text is sent as JSON. */
async function ask(lb: Program, what: string, body?: unknown, headers: Record<string, string> = {}): Promise<Said> {
  const [method = "GET", path = ""] = what.split(" ");
  const json = body !== undefined && typeof body !== "string";
  const answer = await fetch(`http://127.0.0.1:${lb.admin}${path}`, {
    method,
    headers: { ...(json && { "content-type": "application/json" }), ...headers },
    body: body === undefined ? null : json ? JSON.stringify(body) : body as string,
  });
  const text = await answer.text(), type = answer.headers.get("content-type") ?? "";
  if (answer.status >= 400) assert.equal(type, "application/problem+json", `${what}: ${text}`);
  return {
    status: answer.status,
    headers: answer.headers,
    text,
    json: /json/.test(type) ? JSON.parse(text) : undefined,
  };
}
const bearer = (token: string) => ({ authorization: `Bearer ${token}` });

const SHOP = "services: { shop: { servers: [127.0.0.1:1, 127.0.0.1:2], health: off } }\ndefault: { service: shop }\n";
const WITH_TOKENS = `${SHOP}admin: { token: ${TOKEN}, read_token: ${READ_TOKEN} }\n`;

// ─── Who may ask ───

test("without a token it answers on loopback, and says which services and servers there are", () =>
  running(SHOP, async (lb) => {
    const { status, json, headers } = await ask(lb, "GET /services");
    assert.equal(status, 200);
    assert.deepEqual(json.services.map((one: { name: string }) => one.name), ["shop"]);
    assert.deepEqual(
      json.services[0].servers.map((one: { name: string; status: string }) => [one.name, one.status]),
      [["127.0.0.1:1", "up"], ["127.0.0.1:2", "up"]],
    );
    assert.equal(headers.get("cache-control"), "no-store");
    assert.deepEqual((await ask(lb, "GET /version")).json.runtime, runtime());
    assert.equal((await ask(lb, "GET /health/live")).json.status, "live");
    assert.equal((await ask(lb, "GET /health/ready")).json.status, "ready");
  }));

/** What a call of the program comes to. */
function called(...args: string[]) {
  const entry = fileURLToPath(new URL("../../lb.ts", import.meta.url));
  const run = [...runtime() === "deno" ? ["run", "-A"] : [], entry, ...args];
  return spawnSync(process.execPath, run, { encoding: "utf8", timeout: 60_000 });
}

test("beyond loopback it does not start without a token, and says so", () => {
  for (
    const [address, said] of [["0.0.0.0:0", /--admin.*needs a token, as it listens beyond loopback/], ["x:y", /"x:y"/]]
  ) {
    const { status, stderr } = called("--demo", "-p", "0", "--admin", address as string);
    assert.equal(status, 2, stderr);
    assert.match(stderr, said as RegExp);
  }
  return Promise.resolve();
});

test("a reload moves, closes and opens the admin listener, and the answer to the change of it arrives", async () => {
  const [first, second] = [await freePort(), await freePort()];
  const config = { services: { shop: { servers: ["127.0.0.1:1"], health: "off" } }, default: { service: "shop" } };
  const becomes = async (port: number, what: number | "closed") => {
    const look = () => fetch(`http://127.0.0.1:${port}/health/live`).then(({ status }) => status, () => "closed");
    while (await look() !== what) await sleep(50);
  };
  await runningAlone({ ...config, admin: { listen: `127.0.0.1:${first}` } }, async (lb) => {
    await becomes(first, 200);
    const change = { admin: { listen: `127.0.0.1:${second}` } };
    assert.equal((await ask(lb, "PATCH /config", change)).status, 200);
    await Promise.all([becomes(second, 200), becomes(first, "closed")]);
    await lb.reload(config);
    await becomes(second, "closed");
    await lb.reload({ ...config, admin: first });
    await becomes(first, 200);
  }, []);
});

test("--admin off leaves it out", () =>
  runningAlone(`${SHOP}admin: {}\n`, async (lb) => {
    assert.equal(lb.admin, 0);
    await Promise.resolve();
  }, ["--admin", "off"]));

test("with tokens: the token opens everything, the read token GET, and nothing else opens anything", () =>
  running(WITH_TOKENS, async (lb) => {
    for (const headers of [bearer(TOKEN), bearer(READ_TOKEN)]) {
      assert.equal((await ask(lb, "GET /services", undefined, headers)).status, 200);
    }
    const refused = await ask(lb, "GET /services");
    assert.equal(refused.status, 401);
    assert.match(refused.headers.get("www-authenticate") ?? "", /^Bearer/);
    const other = await ask(lb, "GET /services", undefined, bearer("the-operators-tokem"));
    assert.equal(other.status, 401);
    assert.equal((await ask(lb, "GET /services", undefined, { authorization: "Basic YTpi" })).status, 400);
    assert.equal((await ask(lb, "DELETE /services/shop", undefined, bearer(READ_TOKEN))).status, 403);
    for (const path of ["/health/live", "/health/ready"]) assert.equal((await ask(lb, `GET ${path}`)).status, 200);
    for (const text of [refused.text, other.text, lb.output()]) assert.ok(!/the-\w+-tok/.test(text), text);
  }));

test("wrong tokens are slowed: 429 with Retry-After, for the right one too, until the time is over", () =>
  running(WITH_TOKENS, async (lb) => {
    const codes: number[] = [];
    for (let i = 0; i < 7; i++) {
      codes.push((await ask(lb, "GET /services", undefined, bearer(`wrong-token-${i}`))).status);
    }
    assert.deepEqual(codes, [401, 401, 401, 401, 401, 429, 429]);
    const late = await ask(lb, "GET /services", undefined, bearer(TOKEN));
    assert.equal(late.status, 429);
    assert.ok(Number(late.headers.get("retry-after")) >= 1);
    let open = false;
    await until("the right token opens again", () => {
      ask(lb, "GET /services", undefined, bearer(TOKEN)).then(({ status }) => open ||= status === 200);
      return open;
    }, 20_000);
  }));

test("wrong tokens that come at once are each counted, for a whole IPv6 network, and nobody else's tries lift that", async () => {
  let client = "2001:db8::1";
  const lb = createLoadBalancer(parseConfig(`${SHOP}admin: { token: ${TOKEN} }\n`), {
    report: () => {},
    now: () => 0,
    client: () => ({ address: client, scheme: "http", headers: [] }),
  });
  const admin = createAdmin(lb);
  const asked = async (token: string) => {
    const headers = { host: "127.0.0.1", ...bearer(token) };
    return (await admin.fetch(new Request("http://127.0.0.1/services", { headers }))).status;
  };
  const codes = await Promise.all(Array.from({ length: 20 }, (_, i) => asked(`wrong-token-${i}`)));
  assert.deepEqual(codes.map((code) => code === 401), codes.map((_, i) => i < 5));
  client = "2001:db8::2";
  assert.equal(await asked(TOKEN), 429);
  client = "2001:db8:0:1::1";
  assert.equal(await asked(TOKEN), 200);
  for (let i = 0; i < 999; i++) { // as many as are remembered
    client = `10.0.${i >> 8}.${i & 255}`;
    assert.equal(await asked("wrong-token"), 401);
  }
  assert.equal(await asked("wrong-token"), 401);
  client = "2001:db8::3";
  assert.equal(await asked(TOKEN), 429);
});

test("hosts and sites other than its own are refused: no DNS rebinding, no cross-site request", () =>
  running(SHOP, async (lb) => {
    const asked = async (headers: string, host = `127.0.0.1:${lb.admin}`) =>
      status((await rawRequest(lb.admin, get("/services", headers, host))).answers[0]!);
    assert.equal(await asked(""), 200);
    assert.equal(await asked("", "localhost"), 200);
    assert.equal(await asked("", "[::1]:9090"), 200);
    assert.equal(await asked("", "evil.test"), 403);
    assert.equal(await asked("", `127.0.0.1.evil.test:${lb.admin}`), 403);
    assert.equal(await asked(`Origin: http://127.0.0.1:${lb.admin}\r\n`), 200);
    for (const origin of ["http://evil.test", "null", "http://127.0.0.1:1"]) {
      assert.equal(await asked(`Origin: ${origin}\r\n`), 403, origin);
    }
    assert.equal(await asked("Sec-Fetch-Site: same-origin\r\n"), 200);
    assert.equal(await asked("Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\n"), 200);
    for (const site of ["cross-site", "same-site"]) assert.equal(await asked(`Sec-Fetch-Site: ${site}\r\n`), 403, site);
  }));

test("a change that another site asks for is none, whatever its method and with the token too", () =>
  running(WITH_TOKENS, async (lb) => {
    const own = `127.0.0.1:${lb.admin}`, body = '{"state":"drain"}', place = "/services/shop/servers/127.0.0.1:1";
    const asked = async (line: string, headers: string, host = own) => {
      const head = `Host: ${host}\r\nAuthorization: Bearer ${TOKEN}\r\nContent-Type: application/json\r\n${headers}`;
      const end = `Content-Length: ${body.length}\r\nConnection: close\r\n\r\n${body}`;
      return status((await rawRequest(lb.admin, `${line} HTTP/1.1\r\n${head}${end}`)).answers[0]!);
    };
    for (const line of [`PUT ${place}/state`, `DELETE ${place}`, "PATCH /services/shop", "POST /", "PUT /config"]) {
      for (const origin of ["http://evil.test", "null", "http://127.0.0.1", `http://${own}.evil.test`]) {
        assert.equal(await asked(line, `Origin: ${origin}\r\n`), 403, `${line} ${origin}`);
      }
      const navigates = "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\n"; // a form of theirs
      assert.equal(await asked(line, navigates), 403, line);
      assert.equal(await asked(line, `Origin: http://${own}\r\n`, "evil.test"), 403, line);
    }
    assert.equal(file(lb), WITH_TOKENS);
    assert.equal(await asked(`PUT ${place}/state`, `Origin: http://${own}\r\n`), 200);
    assert.match(file(lb), /state: drain/);
  }));

test("nothing but the whole token, in its header, opens anything", () =>
  running(WITH_TOKENS, async (lb) => {
    const asked = async (headers: string, path = "/services") =>
      status((await rawRequest(lb.admin, get(path, headers, "127.0.0.1"))).answers[0]!);
    const bad: [headers: string, status: number, path?: string][] = [
      ["", 401],
      ["Authorization: Bearer\r\n", 400],
      [`Authorization: ${TOKEN}\r\n`, 400],
      [`Authorization: Bearer ${TOKEN}, Bearer ${TOKEN}\r\n`, 400],
      [`Authorization: Bearer ${TOKEN.slice(0, -1)}\r\n`, 401],
      [`Authorization: Bearer ${TOKEN}x\r\n`, 401],
      [`Authorization: Bearer ${TOKEN.toUpperCase()}\r\n`, 401],
      [`Authorization: Bearer ${TOKEN.slice(0, -1)}x\r\n`, 401], // of its length
      [`Cookie: token=${TOKEN}\r\nX-Token: ${TOKEN}\r\n`, 401],
      ["", 401, `/services?token=${TOKEN}&access_token=${TOKEN}`],
    ];
    for (const [headers, code, path] of bad) {
      assert.equal(await asked(headers, path), code, headers + path);
      assert.equal(await asked(`Authorization: bearer ${TOKEN}\r\n`), 200, "the right one is no guess");
    }
  }));

test("what is not there is 404, what may not be done there 405 with Allow, both as problems", () =>
  running(SHOP, async (lb) => {
    assert.equal((await ask(lb, "GET /nowhere")).status, 404);
    assert.equal((await ask(lb, "POST /services/nowhere/servers", { url: "localhost:8081" })).status, 404);
    const { status, headers, json } = await ask(lb, "DELETE /version");
    assert.equal(status, 405);
    assert.match(headers.get("allow") ?? "", /GET/);
    assert.deepEqual(json.title, "Method Not Allowed");
  }));

test("readiness turns 503 when it drains, and requests in flight still finish", async () => {
  let finish = () => {};
  const server = await scriptedServer((visit) =>
    new Promise<void>((resolve) => {
      finish = () => (void visit.send(answer("done")), resolve());
    })
  );
  await runningAlone(
    { services: { shop: { servers: [server.address], health: "off" } }, default: { service: "shop" } },
    async (lb) => {
      const asked = rawRequest(lb.port, get("/"));
      await until("the request arrives", () => server.requests.length === 1);
      process.kill(lb.pid, "SIGTERM");
      await until("it drains", () => lb.output().includes("draining"));
      assert.equal((await ask(lb, "GET /health/ready")).status, 503);
      assert.equal((await ask(lb, "GET /health/live")).status, 200);
      finish();
      const { answers } = await asked;
      assert.equal(answers[0]!.body.toString(), "done");
      await until("it ends", () => lb.output().includes("info: drained"));
    },
  );
  await server.close();
});

// ─── Services and servers ───

/** Servers that say their own name, while `use` lasts. */
async function serving(count: number, use: (...servers: ScriptedServer[]) => Promise<void>): Promise<void> {
  const servers = await Promise.all(
    Array.from({ length: count }, (_, i) => scriptedServer((visit) => visit.send(answer(`s${i}`)))),
  );
  try {
    await use(...servers);
  } finally {
    await Promise.all(servers.map((server) => server.close()));
  }
}
const over = (...servers: ScriptedServer[]) =>
  `# the shop
services:
  shop:
    servers:
${servers.map(({ address }, i) => `      - ${address}   # s${i}`).join("\n")}
    health: off
default: { service: shop }   # for all
`;
const body = async (port: number, path = "/") => {
  const answer = await fetch(`http://127.0.0.1:${port}${path}`);
  return `${answer.status === 200 ? "" : `${answer.status} `}${await answer.text()}`.trim();
};
/** Who answers the next requests, in alphabetical order. */
const answers = async (port: number, count: number, path = "/") => {
  const said: string[] = [];
  for (let i = 0; i < count; i++) said.push(await body(port, path));
  return said.sort().join(" ");
};
const file = (lb: Program) => readFileSync(lb.file, "utf8");
const WEBSITE = { "content-type": "application/x-www-form-urlencoded" }; // what curl -d says

test("POST / changes the servers of the default service, with PythonLoadBalancer's body; repeated ones weigh more", () =>
  serving(3, (a, b, c) =>
    running(over(a, b), async (lb) => {
      const entry = ({ port }: ScriptedServer) => ({ addr: "127.0.0.1", port });
      assert.equal(await answers(lb.port, 4), "s0 s0 s1 s1");
      const changed = await ask(lb, "POST /", JSON.stringify({ servers: [entry(b), entry(c), entry(c)] }), WEBSITE);
      assert.equal(changed.status, 200, changed.text);
      assert.equal(await answers(lb.port, 6), "s1 s1 s2 s2 s2 s2");
      for (
        const bad of [
          "{}",
          '{"servers":[]}',
          '{"servers":[{"addr":"127.0.0.1"}]}',
          '{"servers":[{"addr":"a/b","port":1}]}',
          '{"servers":[{"addr":"127.0.0.1","port":"x"}]}',
          '{"servers":[{"addr":"127.0.0.1","port":70000}]}',
          '{"servers":[{"addr":"127.0.0.1","port":1,"x":1}]}',
          '{"servers":',
          "[]",
          "",
        ]
      ) {
        assert.equal((await ask(lb, "POST /", bad, WEBSITE)).status, 400, bad);
      }
      assert.equal(await answers(lb.port, 3), "s1 s2 s2");
      assert.match(file(lb), new RegExp(`^      - ${b.address} # s1$`, "m"));
      assert.match(file(lb), /default: \{ service: shop \} # for all\n$/);
    })));

test("POST / means the only service where there is no default, and asks which one where there are several", () =>
  serving(2, async (a, b) => {
    const to = { servers: [{ addr: "127.0.0.1", port: b.port }] };
    await running(`paths: [{ path: /, servers: ["${a.address}"], health: off }]`, async (lb) => {
      assert.equal((await ask(lb, "POST /", to)).status, 200);
      assert.equal(await body(lb.port), "s1");
    });
    const two = { one: { servers: [a.address] }, two: { servers: [a.address] } };
    await running({ services: two, name_routes: true }, async (lb) => {
      const { status, json } = await ask(lb, "POST /", to);
      assert.deepEqual([status, json.detail], [409, "which service? one, two"]);
    });
  }));

test("services come and go over the API, forward at once under their names, and are there after a restart", () =>
  serving(2, async (a, b) => {
    const folder = makeFolder(), path = join(folder, "routes.yml");
    writeFileSync(path, "name_routes: true # /<service>/<path>\n# mine\nadmin: { listen: 127.0.0.1:0 }\n");
    const again = (use: (lb: Program) => Promise<void>) => runningAlone("", use, ["-c", path]);
    await again(async (lb) => {
      assert.deepEqual((await ask(lb, "GET /services")).json.services, []);
      assert.equal((await ask(lb, "GET /services/one")).status, 404);
      const made = await ask(lb, "POST /services/one", { servers: [a.address], health: "off" });
      assert.deepEqual([made.status, made.json.name], [201, "one"]);
      assert.equal((await ask(lb, "POST /services/one", { servers: [b.address] })).status, 409);
      assert.equal(await body(lb.port, "/one/deep/path?x=1"), "s0");
      assert.equal(target(a.requests.at(-1)!), "/deep/path?x=1");
      const put = await ask(lb, "PUT /services/services", { servers: [b.address], health: "off" });
      assert.equal(put.status, 201);
      assert.equal(await body(lb.port, "/services/x"), "s1");
      assert.deepEqual((await ask(lb, "GET /services/services")).json.config, { servers: [b.address], health: "off" });
      const patched = await ask(lb, "PATCH /services/one", { servers: [a.address, b.address], strategy: "first" });
      assert.deepEqual([patched.status, patched.json.strategy], [200, "first"]);
      assert.equal(await answers(lb.port, 2, "/one/"), "s0 s0");
      const replaced = await ask(lb, "PUT /services/one", { servers: [b.address], health: "off" });
      assert.deepEqual([replaced.status, replaced.json.strategy], [200, "round-robin"]);
      assert.equal((await ask(lb, "GET /services")).json.services.length, 2);
    });
    assert.match(readFileSync(path, "utf8"), /^name_routes: true # \/<service>\/<path>\n# mine\nadmin: /);
    await again(async (lb) => {
      assert.equal(await body(lb.port, "/one/"), "s1");
      assert.equal((await ask(lb, "DELETE /services/one")).status, 200);
      assert.equal((await ask(lb, "DELETE /services/one")).status, 404);
      assert.match(await body(lb.port, "/one/"), /^404/);
      assert.equal(await body(lb.port, "/services/"), "s1");
    });
    rmSync(folder, { recursive: true });
  }));

test("a patch keeps what short forms and merge keys say", () =>
  running(
    `x-usual: &usual { servers: [127.0.0.1:1, 127.0.0.1:2], retries: 2 }
services:
  shop: { <<: *usual, health: /up, sticky: id } # the shop
default: shop
`,
    async (lb) => {
      const file = () => readFileSync(lb.file, "utf8");
      assert.equal((await ask(lb, "PATCH /services/shop", { health: { interval: "9s" } })).status, 200);
      assert.match(
        file(),
        /<<: \*usual, health: \{ path: \/up, interval: 9s \}, sticky: id \} # the shop\ndefault: shop\n/,
      );
      const patch = { services: { shop: { sticky: { max_age: "1d" } } }, default: { retries: 0 } };
      assert.equal((await ask(lb, "PATCH /config", patch)).status, 200);
      assert.match(
        file(),
        /sticky: \{ cookie: id, max_age: 1d \} \} # the shop\ndefault: \{ service: shop, retries: 0 \}\n/,
      );
      assert.equal((await ask(lb, "PATCH /services/shop/servers/127.0.0.1:2", { weight: 3 })).status, 200);
      const { services } = parseConfig(file());
      assert.deepEqual(services.get("shop")!.servers.map(({ name, weight }) => [name, weight]), [
        ["127.0.0.1:1", 1],
        ["127.0.0.1:2", 3],
      ]);
      assert.equal(services.get("shop")!.retries, 2);
    },
  ));

test("a drained server gets no new requests, finishes those it has, and the answer can wait for them", async () => {
  let finish = () => {};
  const slow = await scriptedServer((visit) =>
    new Promise<void>((resolve) => finish = () => (void visit.send(answer("slow")), resolve()))
  );
  await serving(1, (other) =>
    running(over(slow, other), async (lb) => {
      const state = `/services/shop/servers/${slow.address}/state`;
      const asked = body(lb.port);
      await until("the request arrives", () => slow.requests.length === 1);
      const early = await ask(lb, `PUT ${state}?wait=30ms`, { state: "drain" });
      assert.deepEqual([early.status, early.json.status, early.json.in_flight], [202, "drain", 1]);
      let over = false;
      const waiting = ask(lb, `PUT ${state}?wait=30s`, { state: "drain" }).finally(() => over = true);
      assert.equal(await answers(lb.port, 5), "s0 s0 s0 s0 s0");
      assert.equal(over, false);
      finish();
      assert.equal(await asked, "slow");
      assert.deepEqual([(await waiting).status, (await waiting).json.in_flight], [200, 0]);
      assert.match(file(lb), new RegExp(`- \\{ url: ${slow.address}, state: drain \\} # s0\n`));
      assert.equal((await ask(lb, `PUT ${state}`, { state: "ready" })).status, 200);
      assert.match(file(lb), new RegExp(`- ${slow.address} # s0\n`));
      const last = Promise.all([body(lb.port), body(lb.port)]);
      await until("it is asked again", () => slow.requests.length === 2);
      finish();
      assert.deepEqual((await last).sort(), ["s0", "slow"]);
      assert.equal((await ask(lb, `PUT ${state}?wait=soon`, { state: "drain" })).status, 400);
      assert.equal((await ask(lb, `PUT ${state}`, { state: "off" })).status, 400);
    })).finally(() => slow.close());
});

test("a server in maintenance is not even probed; back from it, it is", () =>
  serving(2, (a, b) =>
    running({
      services: {
        shop: { servers: [a.address, b.address], health: { path: "/up", interval: "50ms", timeout: "40ms", rise: 1 } },
      },
      default: { service: "shop" },
    }, async (lb) => {
      const probes = () => a.requests.filter((request) => target(request) === "/up").length;
      await until("it is probed", () => probes() > 1);
      const state = `/services/shop/servers/${a.address}/state`;
      assert.equal((await ask(lb, `PUT ${state}`, { state: "maint" })).json.status, "maint");
      const others = () => b.requests.length;
      const [before, seen] = [probes(), others()];
      await until("the other one is probed on", () => others() > seen + 4);
      assert.ok(probes() <= before + 1, "one may have been under way");
      assert.equal(await answers(lb.port, 3), "s1 s1 s1");
      await ask(lb, `PUT ${state}`, { state: "ready" });
      await until("it is probed again", () => probes() > before + 1);
    })));

test("where all servers drain there is 503, and where one is left no panic asks the others", () =>
  serving(2, (a, b) =>
    running(over(a, b), async (lb) => {
      const drain = ({ address }: ScriptedServer) =>
        ask(lb, `PUT /services/shop/servers/${address}/state`, { state: "drain" });
      await drain(a);
      assert.equal(await answers(lb.port, 4), "s1 s1 s1 s1");
      await drain(b);
      assert.match(await body(lb.port), /^503/);
    })));

test("weights change while it runs, and shares follow exactly", () =>
  serving(2, (a, b) =>
    running(over(a, b), async (lb) => {
      const weight = (weight: unknown) => ask(lb, `PATCH /services/shop/servers/${a.address}`, { weight });
      const { json } = await weight(3);
      assert.deepEqual([json.weight, json.effective_weight], [3, 3]);
      assert.equal(await answers(lb.port, 8), "s0 s0 s0 s0 s0 s0 s1 s1");
      assert.equal((await weight(0)).status, 200);
      assert.equal(await answers(lb.port, 2), "s1 s1");
      assert.equal((await weight(257)).status, 400);
      assert.equal((await weight(1)).status, 200);
      assert.equal(file(lb), over(a, b).replaceAll("   #", " #"), "the file is what it was, but for spaces");
    })));

test("servers are added and taken out one by one; the last one stays", () =>
  serving(2, (a, b) =>
    running(over(a), async (lb) => {
      const servers = "/services/shop/servers";
      const added = await ask(lb, `POST ${servers}`, { url: b.address, weight: 2 });
      assert.deepEqual([added.status, added.json.name, added.json.weight], [201, b.address, 2]);
      assert.equal((await ask(lb, `POST ${servers}`, b.address, { "content-type": "application/yaml" })).status, 409);
      assert.equal(await answers(lb.port, 3), "s0 s1 s1");
      const names = (await ask(lb, `GET ${servers}`)).json.map((one: { name: string }) => one.name);
      assert.deepEqual(names, [a.address, b.address]);
      assert.equal((await ask(lb, `GET ${servers}/${encodeURIComponent(`http://${b.address}`)}`)).json.weight, 2);
      assert.equal((await ask(lb, `DELETE ${servers}/${a.address}`)).status, 200);
      assert.equal(await answers(lb.port, 2), "s1 s1");
      const last = await ask(lb, `DELETE ${servers}/${b.address}`);
      assert.equal(last.status, 409);
      assert.match(last.json.mistakes[0].message, /needs a server/);
      assert.equal((await ask(lb, `DELETE ${servers}/${a.address}`)).status, 404);
      assert.equal((await ask(lb, `POST ${servers}`, { url: "a/b" })).status, 400);
    })));

test("health is set by hand where nobody probes, and outlives other changes", () =>
  serving(2, (a, b) =>
    running(over(a, b), async (lb) => {
      const health = (health: string) => ask(lb, `PUT /services/shop/servers/${a.address}/health`, { health });
      assert.equal((await health("down")).json.status, "down");
      assert.equal((await ask(lb, "PATCH /services/shop", { retries: 2 })).status, 200);
      assert.equal(await answers(lb.port, 3), "s1 s1 s1");
      assert.equal((await health("up")).json.status, "up");
      assert.equal(await answers(lb.port, 2), "s0 s1");
      assert.equal((await health("so-so")).status, 400);
    })));

test("services that stand beside their routes are changed there, and the route stays", () =>
  serving(
    2,
    (a, b) =>
      running(`paths:\n  - path: /pete # mine\n    servers: [${a.address}]\n    health: off\n`, async (lb) => {
        const pete = "/services/%2Fpete";
        assert.equal((await ask(lb, `PATCH ${pete}`, { servers: [b.address] })).status, 200);
        assert.equal(await body(lb.port, "/pete"), "s1");
        assert.equal((await ask(lb, `PUT ${pete}`, { servers: [a.address, b.address], health: "off" })).status, 200);
        assert.equal(await answers(lb.port, 2, "/pete"), "s0 s1");
        assert.equal((await ask(lb, `PATCH ${pete}`, { path: "/other" })).status, 400);
        assert.equal((await ask(lb, `PUT ${pete}/servers/${a.address}/state`, { state: "drain" })).status, 200);
        assert.equal(await body(lb.port, "/pete"), "s1");
        assert.match(file(lb), /- path: \/pete # mine\n {4}servers: \[/);
      }),
  ));

// ─── The whole config ───

test("ETag and If-Match: who has not seen the latest state changes nothing", () =>
  serving(2, (a, b) =>
    running(over(a, b), async (lb) => {
      const seen = (await ask(lb, "GET /services/shop")).headers.get("etag")!;
      const patch = (retries: number, match: string) =>
        ask(lb, "PATCH /services/shop", { retries }, { "if-match": match });
      const first = await patch(2, seen);
      assert.equal(first.status, 200);
      assert.equal((await patch(3, seen)).status, 412);
      assert.equal((await patch(3, `"other", ${first.headers.get("etag")}`)).status, 200);
      assert.equal((await patch(4, "*")).status, 200);
      assert.equal((await ask(lb, "PUT /services/new", { servers: ["a:1"] }, { "if-match": "*" })).status, 412);
      const config = await ask(lb, "GET /config");
      assert.equal((await ask(lb, "PUT /config", config.text, { "content-type": "text/yaml" })).status, 428);
      const put = (text: string, match: string) =>
        ask(lb, "PUT /config", text, { "content-type": "text/yaml", "if-match": match });
      assert.equal((await put(`${config.text}log: json\n`, config.headers.get("etag")!)).status, 200);
      assert.equal((await put(`${config.text}log: off\n`, config.headers.get("etag")!)).status, 412);
      assert.match(file(lb), /retries: 4\n[^]*log: json\n$/);
    })));

test("the config is read, replaced and changed as YAML or JSON; comments and variables survive, secrets are not shown", () =>
  serving(1, async (a) => {
    process.env.LB_TEST_PORT = `${a.port}`;
    process.env.LB_TEST_TOKEN = TOKEN;
    const text = `# mine
services:
  shop: { servers: ["127.0.0.1:\${LB_TEST_PORT}"], health: { headers: { authorization: s3cret } } }   # one
admin: { token: "\${LB_TEST_TOKEN}" }
default: { service: shop }
`;
    const spaced = text.replace(/\["(.*)"\]/, '[ "$1" ]').replace("   # one", " # one");
    await runningAlone(text, async (lb) => {
      const mine = (what: string, body?: unknown, headers = {}) =>
        ask(lb, what, body, { ...bearer(TOKEN), ...headers });
      const yaml = await mine("GET /config");
      assert.equal(yaml.headers.get("content-type"), "application/yaml");
      assert.equal(yaml.text, spaced.replace("s3cret", '"***"'));
      const json = await mine("GET /config", undefined, { accept: "application/json" });
      assert.equal(json.json.admin.token, "${LB_TEST_TOKEN}");
      assert.equal(json.json.services.shop.health.headers.authorization, "***");
      for (const path of ["/services", "/services/shop", "/routes"]) {
        assert.ok(!/s3cret|the-operators/.test((await mine(`GET ${path}`)).text), path);
      }
      const masked = await mine("PUT /config", yaml.text, { "content-type": "application/yaml", "if-match": "*" });
      assert.equal(masked.status, 400);
      assert.equal(masked.json.mistakes[0].path, "services.shop.health.headers.authorization");
      assert.match(masked.json.detail, /\*\*\* stands for a secret/);
      assert.equal((await mine("PATCH /config", { log: "json", retries: null })).status, 200);
      assert.equal(file(lb), `${spaced}log: json\n`);
      assert.equal((await mine("PATCH /config", { log: null })).status, 200);
      assert.equal(file(lb), spaced);
      const { admin, ...rest } = json.json;
      rest.services.shop.health.headers.authorization = "0ther";
      const replaced = await mine("PUT /config", { ...rest, admin, trust: ["10.0.0.0/8"] }, { "if-match": "*" });
      assert.equal(replaced.status, 200, replaced.text);
      assert.equal(file(lb), `${spaced.replace("s3cret", "0ther")}trust: [ 10.0.0.0/8 ]\n`);
      assert.equal((await mine("POST /config/check", { log: "jso" })).status, 400);
      const fine = await mine("POST /config/check", file(lb), { "content-type": "application/yaml" });
      assert.deepEqual([fine.status, fine.json.services], [200, 1]);
      assert.ok(!/s3cret|0ther|the-operators-token/.test(lb.output()), lb.output());
      assert.match(lb.output(), /admin: 127\.0\.0\.1 with the token: PATCH "\/config": log: json/);
    });
  }));

test("a token that is taken out of the file still has to be shown; another one counts at once", () =>
  running(WITH_TOKENS, async (lb) => {
    const put = (text: string, token: string) =>
      ask(lb, "PUT /config", text, { ...bearer(token), "content-type": "text/yaml", "if-match": "*" });
    const next = "another-operators-token";
    assert.equal((await put(`${SHOP}admin: { token: ${next} }\n`, TOKEN)).status, 200);
    assert.equal((await ask(lb, "GET /services", undefined, bearer(TOKEN))).status, 401);
    assert.equal((await put(SHOP, next)).status, 200);
    assert.equal((await ask(lb, "GET /services")).status, 401);
    assert.equal((await ask(lb, "GET /services", undefined, bearer(next))).status, 200);
  }));

// ─── What must not come in ───

const BOMB = `a: &a [x, x, x, x, x, x, x, x, x]\n${
  "bcdefgh".split("").map((name, i) => `${name}: &${name} [${`*${"abcdefg"[i]}, `.repeat(9)}]`).join("\n")
}\n`;
const DEFAULT = "default: { servers: [127.0.0.1:1] }\n";
const BAD_CONFIGS: [what: string, body: string, status: number, path: string | RegExp, type?: string][] = [
  ["JSON that is none", '{"services": ', 400, /JSON/, "application/json"],
  ["YAML that is none", "a: [", 400, ""],
  ["nothing", "", 400, /body/],
  ["more than 1 MiB", `${DEFAULT}# ${"x".repeat(10_000_000)}`, 413, /1 MiB/],
  ["an unknown key", `${DEFAULT}listn: 80`, 400, "listn"],
  ["an alias bomb", `${BOMB}${DEFAULT}`, 400, ""],
  ["a key that stands twice", `${DEFAULT}log: off\nlog: json`, 400, "log"],
  ["a key that stands twice in JSON", '{"log": "off", "log": "json"}', 400, "log", "application/json"],
  ["__proto__", `${DEFAULT}__proto__: { log: off }`, 400, "__proto__"],
  ["constructor", '{"constructor": {"prototype": {"x": 1}}}', 400, "constructor", "application/json"],
  ["a server that is a file", "default: { servers: ['file:///etc/passwd'] }", 400, "default.servers[0]"],
  ["a server that is data", "default: { servers: ['data:text/plain,x'] }", 400, "default.servers[0]"],
  ["a server with a password", "default: { servers: ['http://me:s3cret@a:1'] }", 400, "default.servers[0]"],
  ["a server without a host", "default: { servers: ['http://:80'] }", 400, "default.servers[0]"],
  ["a body of another kind", DEFAULT, 415, /neither JSON nor YAML/, "image/png"],
];
test("a config that cannot be is refused with its places, and the old one keeps serving", () =>
  serving(1, (a) =>
    running(over(a), async (lb) => {
      for (const [what, text, status, where, type = "application/yaml"] of BAD_CONFIGS) {
        for (const operation of ["PUT /config", "POST /config/check"]) {
          const said = await ask(lb, operation, text, { "content-type": type, "if-match": "*" });
          assert.equal(said.status, status, `${what}: ${said.text}`);
          if (typeof where === "string") {
            const paths = said.json.mistakes.map((one: { path: string }) => one.path);
            assert.ok(paths.includes(where), `${what}: ${said.text}`);
          } else assert.match(said.json.detail, where, what);
          assert.ok(!said.text.includes("s3cret"), said.text);
        }
        assert.equal(await body(lb.port), "s0", what);
      }
      assert.equal(file(lb), over(a));
      assert.ok(!existsSync(`${lb.file}.new`));
    })));

const BAD_SERVICES: [what: string, body: string, status: number, type?: string][] = [
  ["JSON that is none", '{"servers": ', 400, "application/json"],
  ["YAML that is none", "servers: [", 400],
  ["a list", "[a:1]", 400],
  ["nothing", "", 400],
  ["more than 1 MiB", `retries: 1 # ${"x".repeat(10_000_000)}`, 413],
  ["an unknown key", "servers: [a:1]\nretrys: 1", 400],
  ["an alias bomb", `${BOMB}servers: [a:1]`, 400],
  ["a key that stands twice", "servers: [a:1]\nservers: [b:1]", 400],
  ["a key that stands twice in JSON", '{"servers": ["a:1"], "servers": ["b:1"]}', 400, "application/json"],
  ["__proto__", '{"servers": ["a:1"], "__proto__": {"retries": 1}}', 400, "application/json"],
  ["a server that is a file", "servers: ['file:///etc/passwd']", 400],
  ["a server that is data", "servers: ['data:text/plain,x']", 400],
  ["a server with a password", "servers: ['http://me:s3cret@a:1']", 400],
  ["a server without a host", "servers: ['http://:80']", 400],
  ["a variable that is not set", "servers: ['${LB_TEST_NOT_SET}:1']", 400],
  ["a body of another kind", "servers: [a:1]", 415, "image/png"],
];
test("a service or server that cannot be is refused, and the old ones keep serving", () =>
  serving(1, (a) =>
    running(over(a), async (lb) => {
      for (const [what, text, status, type = "application/yaml"] of BAD_SERVICES) {
        for (const operation of ["PATCH /services/shop", "PUT /services/shop", "POST /services/new"]) {
          const said = await ask(lb, operation, text, { "content-type": type });
          assert.equal(said.status, status, `${operation} ${what}: ${said.text}`);
          assert.ok(!said.text.includes("s3cret"), said.text);
        }
      }
      for (
        const url of ["file:///etc/passwd", "data:text/plain,x", "http://me:s3cret@a:1", "http://:80", "//a:1", ""]
      ) {
        for (const operation of ["POST /services/shop/servers", `PATCH /services/shop/servers/${a.address}`]) {
          const said = await ask(lb, operation, { url });
          assert.equal(said.status, 400, `${operation} ${url}: ${said.text}`);
          assert.ok(!said.text.includes("s3cret"), said.text);
        }
      }
      assert.equal(await body(lb.port), "s0");
      assert.equal(file(lb), over(a));
      assert.ok(!/s3cret/.test(lb.output()), lb.output());
    })));

test("the same in the file is reported, and the old config keeps serving", () =>
  serving(1, (a) =>
    running(over(a), async (lb) => {
      for (const [what, text, , where, type = "yaml"] of BAD_CONFIGS) {
        if (type === "image/png") continue;
        const before = lb.output().length;
        writeFileSync(lb.file, text);
        process.kill(lb.pid, "SIGHUP");
        const said = () => lb.output().slice(before);
        const told = typeof where === "string" ? where : where.source === "1 MiB" ? "1 MiB" : "";
        const reported = () => said().includes("stays in force") && said().includes(told);
        await until(`${what} is reported`, reported, 20_000);
        assert.ok(!said().includes("s3cret"), said());
        assert.equal(await body(lb.port), "s0", what);
      }
      assert.equal((await ask(lb, "GET /health/ready")).status, 200);
      assert.match((await ask(lb, "GET /metrics")).text, /^lb_config_last_reload_success 0$/m);
    })));

test("no pattern in a route is slow for a long path", () =>
  serving(1, (a) =>
    running(over(a), async (lb) => {
      const routes = [{ path: { regex: "^/(a+)+$" }, respond: { body: "matched" } }];
      assert.equal((await ask(lb, "PATCH /config", { routes })).status, 200);
      assert.equal(await body(lb.port, `/${"a".repeat(8_000)}`), "matched");
      assert.equal(await body(lb.port, `/${"a".repeat(8_000)}!`), "s0");
    })));

test("nothing changes by GET, and the read token changes nothing", () =>
  running(WITH_TOKENS, async (lb) => {
    const all = (await ask(lb, "GET /openapi.json")).json.paths as Record<string, Record<string, unknown>>;
    let changes = 0;
    for (const [path, methods] of Object.entries(all)) {
      const place = path.replace("{service}", "shop").replace("{server}", "127.0.0.1:1");
      for (const method of Object.keys(methods).filter((method) => method !== "get")) {
        changes++;
        const said = await ask(lb, `${method.toUpperCase()} ${place}`, { state: "drain" }, bearer(READ_TOKEN));
        assert.equal(said.status, 403, `${method} ${path}`);
      }
      if (methods.get || path === "/") continue;
      const got = await ask(lb, `GET ${place}?state=drain`, undefined, bearer(TOKEN));
      assert.equal(got.status, 405, path);
      assert.match(got.headers.get("allow") ?? "", /^(PUT|POST|DELETE)/);
    }
    assert.ok(changes > 10);
    assert.equal(file(lb), WITH_TOKENS);
  }));

// ─── The file ───

test("saving is no reason to read the file again; somebody else's change is", () =>
  serving(2, (a, b) =>
    running(over(a, b), async (lb) => {
      const reloads = () => lb.output().split("is in force again").length - 1;
      for (const retries of [2, 3, 4]) {
        assert.equal((await ask(lb, "PATCH /services/shop", { retries })).status, 200);
        await sleep(300); // longer than the file may stay unseen, all in all
      }
      assert.equal(reloads(), 0);
      writeFileSync(lb.file, over(b));
      await until("the other file is in force", () => reloads() === 1, 20_000);
      assert.equal(await body(lb.port), "s0".replace("0", "1"));
    })));

test("while the file on disk is not what is in force, nothing is changed and nothing overwritten", () =>
  serving(2, (a, b) =>
    running(over(a, b), async (lb) => {
      const change = (retries: number) => ask(lb, "PATCH /services/shop", { retries });
      const failed = () => lb.output().split("the old config stays in force").length - 1;
      writeFileSync(lb.file, "services: { shop: { ser");
      const refused = await change(2);
      assert.equal(refused.status, 409);
      assert.match(refused.json.detail, /changed by somebody else/);
      await until("the half file is reported", () => failed() === 1, 20_000);
      assert.equal((await change(2)).status, 409);
      assert.equal(file(lb), "services: { shop: { ser");
      assert.equal(await answers(lb.port, 2), "s0 s1");
      rmSync(lb.file);
      await until("the missing file is reported", () => failed() === 2, 20_000);
      assert.equal(await answers(lb.port, 2), "s0 s1");
      mkdirSync(lb.file);
      await until("what is no file is reported", () => failed() === 3, 20_000);
      rmSync(lb.file, { recursive: true });
      writeFileSync(lb.file, over(a, b));
      await until("the file is in force again", () => lb.output().includes("is in force again"), 20_000);
      assert.equal((await change(2)).status, 200);
    })));

test("what cannot be saved is not put in force: 500 with the reason, and the file as it was", () =>
  serving(2, (a, b) =>
    running(over(a, b), async (lb) => {
      mkdirSync(`${lb.file}.new`); // in the way of what is written first
      const said = await ask(lb, `PUT /services/shop/servers/${a.address}/state`, { state: "drain" });
      assert.equal(said.status, 500);
      assert.match(said.json.detail, /routes\.yml\S* cannot be written: /);
      assert.equal(await answers(lb.port, 2), "s0 s1");
      assert.equal(file(lb), over(a, b));
      rmSync(`${lb.file}.new`, { recursive: true });
      assert.equal((await ask(lb, `PUT /services/shop/servers/${a.address}/state`, { state: "drain" })).status, 200);
      assert.equal(await answers(lb.port, 2), "s1 s1");
    })));

test("150 changes under load: not one request fails, each change is in force when it is answered, in their order", () =>
  serving(4, (...servers) =>
    running(over(servers[0]!, servers[1]!), async (lb) => {
      let over = false, requests = 0;
      const failures: string[] = [];
      const client = async () => {
        while (!over) {
          const said = await body(lb.port).catch(String);
          if (!/^s[0-3]$/.test(said)) failures.push(said);
          requests++;
          await sleep(50); // the changes want to get on, too
        }
      };
      const clients = Array.from({ length: 4 }, client);
      for (let i = 0; i < 300 || requests <= 100; i++) { // in memory 300 changes are made before 100 requests
        const [one, two] = [servers[i % 4]!, servers[(i + 1 + i % 3) % 4]!];
        const pool = [one, two].map(({ port }) => ({ addr: "127.0.0.1", port }));
        const { status, json } = await ask(lb, "POST /", { servers: pool });
        assert.equal(status, 200);
        assert.deepEqual(
          json.servers.map((server: { name: string }) => server.name),
          [one.address, two.address],
          `${i}`,
        );
      }
      await until("there is some load", () => requests > 100, 20_000);
      over = true;
      await Promise.all(clients);
      assert.deepEqual(failures, []);
      assert.equal((await ask(lb, "GET /connections")).json.in_flight, 0);
    })));

test("changes that come at once are made one after the other: none is lost", () =>
  serving(1, (a) =>
    running(over(a), async (lb) => {
      const names = Array.from({ length: 40 }, (_, i) => `s${i}`);
      const made = await Promise.all(
        names.map((name) => ask(lb, `POST /services/${name}`, { servers: ["127.0.0.1:1"] })),
      );
      assert.deepEqual(new Set(made.map(({ status }) => status)), new Set([201]));
      const { json } = await ask(lb, "GET /services");
      assert.deepEqual(json.services.map((one: { name: string }) => one.name).sort(), ["shop", ...names].sort());
      const same = await Promise.all(names.map(() => ask(lb, "POST /services/same", { servers: ["127.0.0.1:1"] })));
      assert.equal(same.filter(({ status }) => status === 201).length, 1);
      for (const name of names) assert.match(file(lb), new RegExp(`^  ${name}: `, "m"));
    })));

test("all workers have a change when it is answered, a drain waits for what is in flight in any, health holds for all", async () => {
  let finish = () => {};
  const slow = await scriptedServer((visit, request) => {
    if (target(request) !== "/slow") return visit.send(answer("s9"));
    return new Promise<void>((resolve) => finish = () => (void visit.send(answer("slow")), resolve()));
  });
  await serving(2, (a, b) =>
    runningAlone(over(a), async (lb) => {
      const many = async (count: number) =>
        // connections of their own, so that all workers are met
        new Set(
          await Promise.all(
            Array.from(
              { length: count },
              async () => (await rawRequest(lb.port, get("/"))).answers[0]!.body.toString(),
            ),
          ),
        );
      for (const server of [b, a, b, a, slow]) {
        await ask(lb, "POST /", { servers: [{ addr: "127.0.0.1", port: server.port }] });
        assert.deepEqual([...await many(8)], [server === a ? "s0" : server === b ? "s1" : "s9"]);
      }
      await ask(lb, "POST /services/shop/servers", { url: b.address, backup: true });
      const asked = body(lb.port, "/slow");
      await until("it is there", () => slow.requests.some((request) => target(request) === "/slow"));
      const state = `/services/shop/servers/${slow.address}/state`;
      const drained = await ask(lb, `PUT ${state}`, { state: "drain" });
      assert.deepEqual([drained.status, drained.json.in_flight], [202, 1]);
      finish();
      assert.equal((await ask(lb, `PUT ${state}?wait=20s`, { state: "drain" })).status, 200);
      assert.equal(await asked, "slow");
      await ask(lb, `PUT ${state}`, { state: "ready" });
      await ask(lb, `PUT /services/shop/servers/${slow.address}/health`, { health: "down" });
      let said = new Set<string>(); // the workers hear it a moment after the answer
      for (let i = 0; i < 20 && !(said.size === 1 && said.has("s1")); i++) said = await many(8);
      assert.deepEqual([...said], ["s1"]);
    }, [...ADMIN, "--workers", "2"])).finally(() => slow.close());
});

// ─── Looking ───

test("/explain says which route, which servers and why not the others, and who would take it, and changes nothing", () =>
  running({
    services: {
      shop: {
        servers: ["a:1", { url: "b:1", weight: 0 }, { url: "c:1", backup: true }, { url: "d:1", state: "drain" }],
        health: "off",
        strategy: "random",
      },
      blog: { servers: ["e:1", "f:1"], health: "off" },
    },
    routes: [
      { path: "/blog", methods: ["GET"], service: "blog", strip: true },
      { path: "/half", split: { shop: 1, blog: 3 } },
      { path: "/gone", respond: { status: 410 } },
    ],
    default: { service: "shop" },
  }, async (lb) => {
    const explain = async (url: string, method = "GET") =>
      (await ask(lb, `GET /explain?method=${method}&url=${encodeURIComponent(url)}`)).json;
    const before = (await ask(lb, "GET /services")).json;
    const shop = await explain("http://x/");
    assert.deepEqual([shop.route, shop.target, shop.services[0].takes], ["default", "GET /", "a:1"]);
    assert.deepEqual(shop.services[0].servers, [
      { server: "a:1", asked: true },
      { server: "b:1", asked: false, why: "its weight is 0" },
      { server: "c:1", asked: false, why: "a backup" },
      { server: "d:1", asked: false, why: "it drains" },
    ]);
    for (let i = 0; i < 3; i++) {
      const blog = await explain("http://x/blog/a?b=c");
      assert.deepEqual([blog.target, blog.services[0].takes], ["GET /a?b=c", "e:1"]);
    }
    assert.deepEqual((await explain("http://x/half")).services.map((one: { weight: number }) => one.weight), [1, 3]);
    assert.deepEqual((await explain("http://x/gone")).status, 410);
    const posted = await explain("http://x/blog", "POST");
    assert.deepEqual([posted.failure, posted.allow], ["bad-method", ["GET"]]);
    assert.equal((await ask(lb, "GET /explain?url=x")).status, 400);
    assert.equal((await ask(lb, "GET /explain?url=http://x/&method=TRACE")).status, 400);
    await ask(lb, "PUT /services/blog/servers/e:1/health", { health: "down" });
    const down = await explain("http://x/blog");
    assert.deepEqual([down.services[0].takes, down.services[0].servers[0].why], ["f:1", "down"]);
    await ask(lb, "PUT /services/blog/servers/e:1/health", { health: "up" });
    const still = (await ask(lb, "GET /services")).json;
    const turns = ({ services }: typeof before) => services.map((one: { requests: number }) => one.requests);
    assert.deepEqual(turns(still), turns(before));
    const routes = (await ask(lb, "GET /routes")).json;
    assert.deepEqual(routes.map((one: { name: string }) => one.name), ["/blog", "/half", "/gone", "default"]);
    assert.deepEqual(routes[1].services, [{ service: "shop", weight: 1 }, { service: "blog", weight: 3 }]);
  }));

test("the API describes itself, without a token and without a request to anybody else", () =>
  running(WITH_TOKENS, async (lb) => {
    const { json, status } = await ask(lb, "GET /openapi.json");
    assert.equal(status, 200);
    assert.match(json.openapi, /^3\.1/);
    const { headers, text } = await ask(lb, "GET /docs");
    assert.match(
      headers.get("content-security-policy") ?? "",
      /^default-src 'none'; script-src 'nonce-\w+'; style-src 'nonce-/,
    );
    assert.ok(!/(src|href|action)="?(https?:)?\/\//.test(text), "an address of somebody else");
    const refs = [...JSON.stringify(json).matchAll(/"\$ref":"#\/([^"]+)"/g)].map(([, path]) => path!.split("/"));
    for (const path of refs) assert.ok(path.reduce((value, key) => value?.[key], json), path.join("/"));
    for (const [path, methods] of Object.entries<Record<string, { summary: string }>>(json.paths)) {
      for (const [method, { summary }] of Object.entries(methods)) {
        assert.ok(text.includes(`<code>${method.toUpperCase()} ${path}</code> ${summary}`), `${method} ${path}`);
        if (path === "/events") continue; // it never ends
        const asked = path.replace("{service}", "shop").replace("{server}", "127.0.0.1:1");
        const said = await ask(lb, `${method.toUpperCase()} ${asked}`, undefined, bearer(TOKEN));
        const missing = path.includes("{worker}") ? 404 : 0; // there are none, without --workers
        assert.ok(said.status === missing || ![404, 405, 500].includes(said.status), `${method} ${path}: ${said.text}`);
      }
    }
  }));

/** A part of a JSON Schema, as the description uses them. */
interface Schema {
  $ref?: string;
  type?: string | string[];
  properties?: Record<string, Schema>;
  required?: string[];
  items?: Schema;
  anyOf?: Schema[];
  enum?: unknown[];
}
/** Whether a value is what a schema says, and says nothing else; gives the first place where not. */
function mismatch(value: unknown, schema: Schema, all: Record<string, Schema>, path = ""): string | undefined {
  const name = schema.$ref?.split("/").at(-1);
  if (name === "Service" || name === "Config") return undefined; // as in routes.yml
  if (name) return mismatch(value, all[name]!, all, path);
  if (schema.anyOf) {
    const found = schema.anyOf.map((one) => mismatch(value, one, all, path));
    return found.includes(undefined) ? undefined : found[0];
  }
  const kind = Array.isArray(value) ? "array" : value === null ? "null" : typeof value;
  if (schema.enum && !schema.enum.includes(value)) return `${path} is ${value}, not one of ${schema.enum}`;
  if (![schema.type].flat().includes(kind)) return `${path} is ${kind}, not ${schema.type}`;
  if (Array.isArray(value)) {
    return value.map((one, i) => mismatch(one, schema.items!, all, `${path}[${i}]`)).find((found) => found);
  }
  if (kind !== "object") return undefined;
  const keys = Object.keys(value as object), missing = schema.required!.find((key) => !keys.includes(key));
  if (missing) return `${path} lacks ${missing}`;
  const unknown = keys.find((key) => !schema.properties![key]);
  if (unknown) return `${path}.${unknown} is not described`;
  return keys.map((key) =>
    mismatch((value as Record<string, unknown>)[key], schema.properties![key]!, all, `${path}.${key}`)
  )
    .find((found) => found);
}

test("the description has tags, security and schemas of answers, and what the program answers fits them", () =>
  runningAlone({
    listen: ["127.0.0.1:0"],
    services: {
      shop: { servers: [{ url: "127.0.0.1:1", max: 5 }, "127.0.0.1:2"], health: "off" },
      blog: { servers: [{ url: "127.0.0.1:3", state: "drain" }], max_in_flight: "auto" },
    },
    routes: [
      { path: { regex: "^/x" }, redirect: { to: "https://a.test/" } },
      { path: "/half", methods: ["GET"], split: { shop: 1, blog: 2 } },
      { host: "b.test", headers: { x: "1" }, query: { y: "1" }, service: "blog" },
    ],
    default: { service: "shop", mirror: { service: "blog" } },
  }, async (lb) => {
    await body(lb.port); // so that there are counters and failures
    const { json } = await ask(lb, "GET /openapi.json"), { schemas, securitySchemes } = json.components;
    const tags = json.tags.map(({ name }: { name: string }) => name);
    // deno-lint-ignore no-explicit-any
    for (const [path, methods] of Object.entries<Record<string, any>>(json.paths)) {
      for (const [method, operation] of Object.entries(methods)) {
        const what = `${method} ${path}`, statuses = Object.keys(operation.responses);
        assert.ok(operation.tags.length === 1 && tags.includes(operation.tags[0]), what);
        assert.match(statuses[0]!, /^20[01]$/, what);
        for (const parameter of operation.parameters) assert.ok(parameter.description, `${what} ${parameter.name}`);
        const schemes = operation.security.flatMap((one: object) => Object.keys(one));
        const isOpen = /^\/health\//.test(path), reads = ["token", "read_token"];
        const expected = isOpen ? [] : method === "get" ? reads : ["token"];
        assert.deepEqual(schemes, expected, what);
        assert.ok(schemes.every((name: string) => securitySchemes[name]), what);
      }
    }
    const asked = [
      "/services",
      "/services/shop",
      "/services/blog/servers",
      "/services/blog/servers/127.0.0.1:3",
      "/routes",
    ];
    const explained = ["http://a.test/", "http://a.test/half", "http://a.test/x"].map((url) => `/explain?url=${url}`);
    for (const path of [...asked, ...explained, "/connections", "/workers", "/version", "/health/live"]) {
      const place = path.split("?")[0]!.replace(/shop|blog/, "{service}").replace(/127.*/, "{server}");
      const { schema } = json.paths[place].get.responses[200].content["application/json"];
      assert.equal(mismatch((await ask(lb, `GET ${path}`)).json, schema, schemas), undefined, path);
    }
  }));

test("every example of the description can be sent, and is answered with a status and a body that it names", () =>
  runningAlone( // one of the examples sets a token
    "services: { shop: { servers: [10.0.0.1:8080, 10.0.0.2:8080], health: off } }\ndefault: shop\n",
    async (lb) => {
      const { json } = await ask(lb, "GET /openapi.json"), { schemas } = json.components;
      // deno-lint-ignore no-explicit-any
      for (const [path, methods] of Object.entries<Record<string, any>>(json.paths)) {
        for (const [method, { parameters, requestBody, responses }] of Object.entries(methods)) {
          const what = `${method} ${path}`;
          if (path === "/events" || path === "/workers/{worker}") continue; // without end, and without --workers
          assert.equal(!!requestBody, /^(post|put|patch)/.test(method), what);
          const examples = (place: string) =>
            parameters.filter((one: { in: string }) => one.in === place)
              .map(({ name, example }: { name: string; example: string }) => [name, example]);
          const names = Object.fromEntries(examples("path"));
          // The service and the server of the examples stay, so that others are made and taken out.
          if (path === "/services/{service}" && /post|delete/.test(method)) names.service = "other";
          if (method === "delete") names.server = "10.0.0.4:8080";
          const filled = path.replace(/{(\w+)}/g, (_, name) => names[name]),
            asked = new URLSearchParams(examples("query"));
          const example = requestBody?.content["application/json"].example;
          const headers = {
            ...(what === "put /config" && { "if-match": "*" }),
            accept: "application/json, text/plain",
          };
          const said = await ask(
            lb,
            `${method.toUpperCase()} ${filled}?${new URLSearchParams(asked)}`,
            example,
            headers,
          );
          const { content } = responses[said.status] ?? {}, type = said.headers.get("content-type")!.split(";")[0]!;
          assert.ok(content?.[type], `${what}: ${said.status} ${type} ${said.text}`);
          assert.equal(mismatch(said.json ?? said.text, content[type].schema, schemas), undefined, what);
        }
      }
    },
  ));

test("GET /events tells once a second what GET /services says", () =>
  running(SHOP, async (lb) => {
    const leave = new AbortController();
    const answer = await fetch(`http://127.0.0.1:${lb.admin}/events`, { signal: leave.signal });
    assert.equal(answer.headers.get("content-type"), "text/event-stream");
    let text = "";
    for await (const piece of answer.body!.pipeThrough(new TextDecoderStream())) {
      text += piece;
      if (text.split("\n\n").length > 2) break;
    }
    leave.abort();
    const [first] = text.split("\n\n"), { services } = JSON.parse(first!.replace("data: ", ""));
    assert.deepEqual(services.map((one: { name: string }) => one.name), ["shop"]);
  }));

test("answers are JSON on one line, on many with ?pretty, and text for Accept: text/plain", () =>
  running(SHOP, async (lb) => {
    const plain = { accept: "text/plain" };
    assert.equal((await ask(lb, "GET /routes")).text.split("\n").length, 2);
    const pretty = await ask(lb, "GET /services?pretty");
    assert.ok(pretty.text.split("\n").length > 50, pretty.text);
    assert.match(pretty.text, /^ {2}"bounds": \[ [\d., ]+ \],$/m);
    assert.ok(pretty.json.services.length === 1 && pretty.headers.get("content-type") === "application/json");
    const services = await ask(lb, "GET /services", undefined, plain);
    assert.equal(services.headers.get("content-type"), "text/plain; charset=utf-8");
    assert.match(services.text, /^shop: round-robin, 2 of 2 may be asked, 0 in flight, 0 waiting\n {2}SERVER +STATE /);
    assert.match(services.text, /^ {2}127\.0\.0\.1:2 +unchecked +\d+ s +1 +0 +0 +0 +–$/m);
    assert.match((await ask(lb, "GET /services/shop", undefined, plain)).text, /^shop: round-robin/);
    assert.match((await ask(lb, "GET /services/shop/servers", undefined, plain)).text, /^ {2}SERVER/);
    assert.match((await ask(lb, "GET /services/shop/servers/127.0.0.1:1", undefined, plain)).text, /127\.0\.0\.1:1 /);
    assert.match(
      (await ask(lb, "GET /explain?url=http://a.test/", undefined, plain)).text,
      /^route +default\n[^]*takes +127/,
    );
    assert.match((await ask(lb, "GET /connections", undefined, plain)).text, /^in_flight: 0\n/);
    const config = await ask(lb, "GET /config", undefined, { accept: "text/html,*/*" }); // browsers would save YAML
    assert.equal(config.headers.get("content-type"), "text/plain; charset=utf-8");
    assert.match(config.text, /^services:/);
  }));

test("a name that is not there is answered with one that is like it", () =>
  running(SHOP, async (lb) => {
    const detail = async (what: string, body?: unknown) => (await ask(lb, what, body)).json.detail;
    assert.equal(await detail("GET /services/shp"), 'there is no service "shp"; did you mean "shop"?');
    assert.equal(await detail("PATCH /services/shopp", {}), 'there is no service "shopp"; did you mean "shop"?');
    assert.equal(await detail("DELETE /services/x"), 'there is no service "x"');
    const server = "/services/shop/servers/127.0.0.1:3/state";
    assert.match(
      await detail(`PUT ${server}`, { state: "drain" }),
      /^shop has no server "127\.0\.0\.1:3"; did you mean "127/,
    );
  }));

test("the dashboard says what is wrong with the program: certificates that end soon, a file that is not in force", async () => {
  const ends: Record<string, string> = { "a.pem": "2026-12-10", "b.pem": "2027-12-10", "c.pem": "2026-11-01" };
  const tls = Object.keys(ends).map((cert) => ({ cert, key: "a.key" }));
  const text = JSON.stringify({ listen: [{ address: 443, tls }], default: { servers: ["127.0.0.1:1"] } });
  const lb = createLoadBalancer(parseConfig(text, { file: "routes.yml" }), {
    report: () => {},
    date: () => new Date("2026-11-29"),
    certificate: (file) => ({ names: [`${file[0]}.test`], until: new Date(ends[file]!) }),
  });
  lb.balancer.reloadFailed = true;
  const shown = await createAdmin(lb).request("http://localhost/live", { headers: { host: "localhost" } });
  const troubles = [...(await shown.text()).matchAll(/<li class="tone (\w+)"><span>(.*?)<\/span>/g)];
  assert.deepEqual(troubles.map(([, level, text]) => `${level} ${text}`), [
    "bad the file on disk could not be put in force: what is shown here stays in force",
    "bad the certificate for c.test has ended on 2026-11-01",
    "warn the certificate for a.test ends on 2026-12-10",
  ]);
});

test("the dashboard says which instances lack the newest document of a fleet, this one too, in the same words twice", async () => {
  const lb = createLoadBalancer(parseConfig(SHOP), { report: () => {} });
  const one = { since: "", version: "1", runtime: "node", problem: "", down: [], ejected: [] };
  const instances = [{ ...one, name: "a", config: 7 }, { ...one, name: "b", config: 8 }, {
    ...{ ...one, name: "c", config: 8 },
    problem: "LB_SECRET is not set",
  }];
  const view = { engine: "answers", since: "", problem: "", name: "a", config: 7, instances, probes: [] };
  Object.assign(lb.balancer.effects, { fleet: { view: () => view } });
  const shown = await createAdmin(lb).request("http://localhost/live", { headers: { host: "localhost" } });
  const text = await shown.text(), troubles = [...text.matchAll(/<a href="#fleet">(.*?)<\/a>/g)];
  assert.deepEqual(troubles.map(([, said]) => said), [
    "a lacks the fleet&#39;s newest document: revision 7",
    "c lacks the fleet&#39;s newest document: LB_SECRET is not set",
  ]);
  const rows = [...text.matchAll(/<tr class="(\w*)"><td>(\w)\b.*?<td>([^<]*)<\/td><td><\/td><\/tr>/g)];
  assert.deepEqual(rows.map(([, level, name, said]) => [level, name, said]), [
    ["warn", "a", "revision 7"],
    ["", "b", "the newest"],
    ["warn", "c", "LB_SECRET is not set"],
  ]);
});

// ─── As a library ───

test("/explain refuses what no client can ask for, with a sentence; --explain too", () =>
  running(SHOP, async (lb) => {
    for (
      const [query, why] of [
        ["url=http://u:p@x/", /user name/],
        ["url=http://x/&method=CONNECT", /method/],
        ["url=http://x/&header=a:1&header=x-canary", /"x-canary" is not a header/],
      ] as const
    ) {
      const refused = await ask(lb, `GET /explain?${query}`);
      assert.equal(refused.status, 400);
      assert.match(refused.json.detail, why);
    }
    for (
      const [request, why] of [["TRACE http://x/", /"TRACE" is not a method/], ["http://u:p@x/", /user name/]] as const
    ) {
      const { status, stderr } = called("--explain", request, lb.file);
      assert.equal(status, 1, stderr);
      assert.match(stderr, why);
      assert.ok(!stderr.includes("    at "), stderr);
    }
  }));

test("servers that are added at once are each answered with their own", () =>
  running(SHOP, async (lb) => {
    const urls = Array.from({ length: 6 }, (_, i) => `127.0.0.1:${i + 10}`);
    const added = await Promise.all(urls.map((url) => ask(lb, "POST /services/shop/servers", { url })));
    assert.deepEqual(added.map(({ status, json }) => [status, json.name]), urls.map((url) => [201, url]));
  }));

test("a service may have a name that every object has a property of", () =>
  running(SHOP, async (lb) => {
    for (const name of ["toString", "constructor", "__proto__", "hasOwnProperty"]) {
      const made = await ask(lb, `POST /services/${name}`, { servers: ["127.0.0.1:1"] });
      assert.deepEqual([made.status, made.json.name], [201, name], made.text);
      assert.equal((await ask(lb, `PATCH /services/${name}`, { retries: 2 })).status, 200);
    }
    const type = { "content-type": "constructor" };
    assert.equal((await ask(lb, "POST /services/other", '{"servers":["127.0.0.1:1"]}', type)).status, 415);
  }));

test("health that is set by hand counts from then", async () => {
  let now = 1_000;
  const lb = createLoadBalancer(parseConfig(SHOP), { report: () => {}, now: () => now });
  const admin = createAdmin(lb);
  const headers = { host: "127.0.0.1", "content-type": "application/json" };
  const asked = async (path: string, init?: RequestInit) =>
    (await admin.fetch(new Request(`http://127.0.0.1${path}`, { ...init, headers }))).json();
  now += 60_000;
  const told = await asked("/services/shop/servers/127.0.0.1:1/health", { method: "PUT", body: '{"health":"down"}' });
  assert.deepEqual([told.status, told.status_for], ["down", 0]);
});

test("while the file is broken, writing what is in force is a conflict, and not done", () =>
  running(SHOP, async (lb) => {
    const before = file(lb);
    writeFileSync(lb.file, "services: {");
    await until("it is reported", () => lb.output().includes("the old config stays in force"), 20_000);
    const headers = { "content-type": "application/yaml", "if-match": "*" };
    assert.equal((await ask(lb, "PUT /config", before, headers)).status, 409);
    writeFileSync(lb.file, before);
    await until("it is in force again", () => lb.output().includes("is in force again"), 20_000);
    assert.equal((await ask(lb, "PUT /config", before, headers)).status, 200);
  }));

test("neither page tells browsers to ask this host over TLS only", () =>
  running(SHOP, async (lb) => {
    for (const path of ["/", "/docs"]) {
      const { headers } = await ask(lb, `GET ${path}`);
      assert.equal(headers.get("strict-transport-security"), null, path);
      assert.match(headers.get("content-security-policy") ?? "", /default-src 'none'/);
    }
  }));

test("requests are those of clients: a sticky client's too, and no copies", () =>
  serving(2, (a, b) =>
    running({
      services: {
        shop: { servers: [`127.0.0.1:${a.port}`], health: "off", sticky: {} },
        copy: { servers: [`127.0.0.1:${b.port}`], health: "off" },
      },
      default: { service: "shop", mirror: { service: "copy", percent: 100 } },
    }, async (lb) => {
      const first = await fetch(`http://127.0.0.1:${lb.port}/`);
      await first.text();
      const cookie = first.headers.get("set-cookie")!.split(";")[0]!;
      for (let i = 0; i < 2; i++) await (await fetch(`http://127.0.0.1:${lb.port}/`, { headers: { cookie } })).text();
      const seen = async () =>
        (await ask(lb, "GET /services")).json.services.map((one: { requests: number }) => one.requests);
      let last: number[] = [];
      await until("all are counted", () => (seen().then((now) => last = now), last[0] === 3));
      assert.deepEqual(last, [3, 0]);
    })));

test("createAdmin is an app to be mounted; without a file changes are in force and nothing is written", async () => {
  const lb = createLoadBalancer(parseConfig(SHOP)), lines: string[] = [];
  lb.balancer.effects.report = (_, text) => void lines.push(text);
  const app = new Hono().route("/ops", createAdmin(lb, { hosts: ["Ops.example.com."] })).route("/", lb);
  const asked = (path: string, init?: RequestInit, host = "ops.example.com") =>
    app.fetch(new Request(`http://${host}/ops${path}`, { ...init, headers: { host, ...init?.headers } }));
  assert.equal((await asked("/health/live")).status, 200);
  assert.equal((await asked("/services", {}, "other.example.com")).status, 403);
  const state = "/services/shop/servers/127.0.0.1:1/state";
  const put = await asked(state, {
    method: "PUT",
    body: '{"state":"maint"}',
    headers: { "content-type": "application/json" },
  });
  assert.deepEqual([put.status, (await put.json()).state], [200, "maint"]);
  assert.equal(lb.balancer.table.services.get("shop")!.servers[0]!.state, "maint");
  assert.match(lb.balancer.table.config.text, /\{ url: 127\.0\.0\.1:1, state: maint \}/);
  assert.equal((await asked(state)).status, 405);
  const page = await asked("/"), without = await asked("");
  assert.deepEqual([page.status, page.headers.get("content-type")], [200, "text/html; charset=UTF-8"]);
  assert.deepEqual([without.status, without.headers.get("location")], [302, "ops/"], "links need the slash");
  assert.equal((await asked("/live")).status, 200);
  assert.equal((await asked("/nowhere")).status, 404);
  for (const path of ["/", "/nowhere", "/services/nowhere"]) {
    const { headers } = await asked(path);
    assert.equal(headers.get("x-lb-failure"), null, `${path} is not asked of a backend`);
  }
  assert.ok(lines.some((line) => line.startsWith("admin: ") && line.includes("state: maint")), lines.join("\n"));
});

test("a token stays in force when it leaves the file, also where nobody has asked in between", async () => {
  const withToken = (line: string) => parseConfig(`${SHOP}${line}`);
  const lb = createLoadBalancer(withToken("admin: { token: the-first-token }\n"), { report: () => {} });
  const admin = createAdmin(lb);
  const asked = async (token?: string) => {
    const headers = { host: "127.0.0.1", ...(token && { authorization: `Bearer ${token}` }) };
    return (await admin.fetch(new Request("http://127.0.0.1/services", { headers }))).status;
  };
  await lb.reload(withToken("admin: { token: the-second-token }\n"));
  await lb.reload(withToken(""));
  assert.deepEqual([await asked(), await asked("the-first-token"), await asked("the-second-token")], [401, 401, 200]);
});

test("a server whose URL is taken out by a patch stays: a change that cannot be is none", () =>
  running(SHOP.replace("127.0.0.1:1", "{ url: 127.0.0.1:1, weight: 2 }"), async (lb) => {
    const before = file(lb);
    const patched = await ask(lb, "PATCH /services/shop/servers/127.0.0.1:1", { url: null });
    assert.equal(patched.status, 400, patched.text);
    assert.equal(file(lb), before);
  }));

test("a clock that jumps an hour ejects nobody", async () => {
  let [now, hours] = [0, 0];
  const lb = createLoadBalancer(parseConfig(SHOP), {
    now: () => now,
    date: () => new Date(Date.UTC(2026, 0, 1, hours)),
    fetch: (_, attempt) => {
      attempt.ended(200, 2, undefined);
      return Promise.resolve(new Response("ok"));
    },
    accessLog: () => {},
    client: () => ({ address: "127.0.0.1", scheme: "http", headers: ["host", "a.test"] }),
  });
  for (const jump of [1, -1, 24]) {
    hours += jump;
    now += 1;
    assert.equal((await lb.request("http://a.test/", { headers: { host: "a.test" } })).status, 200);
    const servers = lb.balancer.table.services.get("shop")!.servers;
    assert.ok(servers.every((server) => server.up && server.ejectedUntil === 0));
  }
});

const FAKETIME = "/usr/$LIB/faketime/libfaketime.so.1"; // of Debian's package faketime; the loader knows $LIB
test(
  "a clock that jumps by hours while the program runs ejects nobody and cuts nothing off",
  { needs: ["faketime"] },
  async () => {
    const folder = makeFolder(), clock = join(folder, "clock");
    let finish = () => {};
    const server = await scriptedServer((visit, request) =>
      target(request) === "/slow"
        ? new Promise<void>((resolve) => finish = () => (void visit.send(answer("slow")), resolve()))
        : visit.send(answer("s1"))
    );
    const set = {
      LD_PRELOAD: FAKETIME,
      FAKETIME_TIMESTAMP_FILE: clock,
      FAKETIME_NO_CACHE: "1",
      FAKETIME_DONT_FAKE_MONOTONIC: "1",
    };
    writeFileSync(clock, "+0\n");
    await serving(1, async (other) => {
      const health = { interval: "1s", timeout: "900ms", fall: 1 };
      const shop = { servers: [server.address, other.address], health, strategy: "first" };
      Object.assign(process.env, set);
      const started = runningAlone({ log: "json", services: { shop }, default: { service: "shop" } }, async (lb) => {
        const times = () => [...lb.output().matchAll(/"timestamp":"([^"]+)"/g)].map(([, time]) => Date.parse(time!));
        const slow = body(lb.port, "/slow");
        await until("the slow request arrives", () => server.requests.some((request) => target(request) === "/slow"));
        for (const [i, offset] of ["+0", "+3600", "-7200", "+86400"].entries()) {
          writeFileSync(clock, `${offset}\n`);
          for (let j = 0; j < 5; j++) assert.equal(await body(lb.port), "s1");
          await until("the log says so", () => times().length >= (i + 1) * 5);
          const { services } = (await ask(lb, "GET /services")).json;
          assert.deepEqual(services[0].servers.map((one: { status: string }) => one.status), ["up", "up"], offset);
        }
        finish();
        assert.equal(await slow, "slow");
        const text = (await ask(lb, "GET /metrics")).text;
        assert.ok(!/ejections_total.* [1-9]|result="failed"} [1-9]/.test(text), text);
        const hours = times().slice(0, 20).map((time, _, [first]) => Math.round((time - first!) / 3_600_000));
        assert.deepEqual(
          hours,
          [0, 1, -2, 24].flatMap((hour) => Array(5).fill(hour)),
          "the program's clock has jumped",
        );
      });
      for (const name of Object.keys(set)) delete process.env[name];
      await started;
    }).finally(() => server.close());
    rmSync(folder, { recursive: true });
  },
);
