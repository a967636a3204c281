// The admin listener of the running program, asked with fetch as operators and their scripts ask it.

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import process from "node:process";
import nodeTest from "node:test";
import { fileURLToPath } from "node:url";
import { answer, get, type Program, rawRequest, runtime, scriptedServer, startProgram, status, until } from "./rig.ts";

// bun test gives a test five seconds unless it says otherwise
const test = (name: string, body: () => Promise<void>) => nodeTest(name, { timeout: 120_000 }, body);

const TOKEN = "the-operators-token", READ_TOKEN = "the-readers-token";
const ADMIN = ["--admin", "127.0.0.1:0"];

/** The program with this config and an admin listener, while `use` lasts. */
async function running(config: unknown, use: (lb: Program) => Promise<void>, args: string[] = ADMIN) {
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

test("beyond loopback it does not start without a token, and says so", () => {
  const entry = fileURLToPath(new URL("../lb.ts", import.meta.url));
  const run = [...runtime() === "deno" ? ["run", "-A"] : [], entry, "--demo", "-p", "0", "--admin"];
  for (
    const [address, said] of [["0.0.0.0:0", /--admin.*needs a token, as it listens beyond loopback/], ["x:y", /"x:y"/]]
  ) {
    const { status, stderr } = spawnSync(process.execPath, [...run, address as string], {
      encoding: "utf8",
      timeout: 60_000,
    });
    assert.equal(status, 2, stderr);
    assert.match(stderr, said as RegExp);
  }
  return Promise.resolve();
});

test("--admin off leaves it out", () =>
  running(`${SHOP}admin: {}\n`, async (lb) => {
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

test("what is not there is 404, what may not be done there 405 with Allow, both as problems", () =>
  running(SHOP, async (lb) => {
    assert.equal((await ask(lb, "GET /nowhere")).status, 404);
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
  await running(
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
