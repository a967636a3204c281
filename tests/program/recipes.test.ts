// docs/recipes.md and the six recipes of README: each runs as it stands, but for addresses, in front of small servers that
// say who they are.

import assert from "node:assert/strict";
import { readFileSync, rmSync, writeFileSync } from "node:fs";
import { text as readText } from "node:stream/consumers";
import { join } from "node:path";
import process from "node:process";
import type { TestContext } from "node:test";
import { connect as connectTls } from "node:tls";
import { pathToFileURL } from "node:url";
import { parse } from "yaml";
import { A, CA, KEY } from "../rig/certificates.ts";
import { openWebSocket, TEXT, webSocketServer } from "../rig/websocket.ts";
import {
  answer,
  get,
  makeFolder,
  type Message,
  type Program,
  rawRequest,
  scriptedServer,
  sharedProgram,
  startProgram,
  status,
  target,
  test,
  until,
  value,
} from "../rig/rig.ts";

const read = (name: string): string => readFileSync(new URL(`../../${name}`, import.meta.url), "utf8");
const PAGE = read("docs/recipes.md"), README = read("README.md");
process.env.LB_SECRET = "a secret of the tests";

/** The blocks behind a title, by their language: under a heading of docs/recipes.md, or behind bold words of README. */
function recipe(title: string): Record<string, string> {
  const text = PAGE.split(`\n## ${title}\n`)[1]?.split("\n## ")[0] ?? README.split(`\n**${title}`)[1]?.split("\n**")[0];
  assert.ok(text, title);
  const blocks = text.matchAll(/^```(\w+)\n(.*?)^```/gms);
  return Object.fromEntries([...blocks].map(([, language, block]) => [language, block]));
}

/** Starts a server for each address in a text, and puts its real address there. */
async function withServers(t: TestContext, text: string, own: Record<string, number> = {}) {
  const closers = new Map<string, () => Promise<void>>();
  for (const [name, port] of Object.entries(own)) text = text.replaceAll(name, `127.0.0.1:${port}`);
  for (const name of new Set(text.match(/localhost:(?:80|54)\d\d/g))) {
    const server = await scriptedServer((visit, request) => {
      const type = "Content-Type: text/plain\r\n";
      if (target(request) !== "/big") return visit.send(answer(`${name} ${target(request)}`, type));
      return visit.send(answer("text ".repeat(1000), type));
    });
    const close = () => server.close();
    closers.set(name, close);
    t.after(() => closers.has(name) && close());
    text = text.replaceAll(name, `127.0.0.1:${server.port}`);
  }
  const close = async (name: string) => {
    await closers.get(name)!();
    closers.delete(name);
  };
  return { text, close };
}

interface Site {
  lb: Program;
  /** The status and the body: `200 localhost:8081 /a`. */
  ask(path: string, headers?: string, host?: string): Promise<string>;
  answer(path: string, headers?: string, host?: string): Promise<Message>;
  /** Where the program listens for this scheme. */
  port(scheme: string): Promise<number>;
  close(name: string): Promise<void>;
}

const shared = sharedProgram(["--log", "off"]);

/** A recipe as a running program: the one that all share, but where there are listeners to be opened. */
async function cook(
  t: TestContext,
  title: string,
  { files = {}, servers = {} }: { files?: Record<string, string>; servers?: Record<string, number> } = {},
): Promise<Site> {
  const { text, close } = await withServers(t, recipe(title).yaml!, servers);
  const config = parse(text);
  const local = (at: number | { address: number }) =>
    typeof at === "object" ? { ...at, address: "127.0.0.1:0" } : "127.0.0.1:0";
  if (config.listen) config.listen = config.listen.map(local);
  if (config.admin) config.admin = { listen: "127.0.0.1:0" };
  for (const one of config.tcp ?? []) one.listen = "127.0.0.1:0";
  const isShared = !(config.listen || config.admin || config.tcp);
  const lb = await (isShared ? shared.begin(config, files) : startProgram(config, ["--log", "off"], files));
  t.after(() => lb.stop());
  const ask = async (path: string, headers = "", host = "a.test") => {
    const { answers } = await rawRequest(lb.port, get(path, `${headers}Connection: close\r\n`, host));
    return answers[0]!;
  };
  return {
    lb,
    answer: ask,
    ask: async (...about) => ((one) => `${status(one)} ${one.body}`)(await ask(...about)),
    async port(scheme) {
      const told = new RegExp(`listening on ${scheme}://127\\.0\\.0\\.1:(\\d+)`);
      return Number(await until(`it listens for ${scheme}`, () => told.exec(lb.output())?.[1]));
    },
    close,
  };
}

/** Two tests: of a recipe, and of its short form in README. */
function inBoth(title: string, short: string, check: (t: TestContext, title: string) => Promise<void>): void {
  test(title.toLowerCase(), (t) => check(t, title));
  test(`README: ${short}`, (t) => check(t, short));
}

inBoth("Several services behind one address", "Several services behind one address.", async (t, title) => {
  const { ask } = await cook(t, title);
  const users = [await ask("/api/users/7"), await ask("/api/users/7")];
  assert.deepEqual(users.sort(), ["200 localhost:8081 /7", "200 localhost:8082 /7"]);
  assert.match(await ask("/index.html"), /^200 localhost:808[34] \/index.html$/);
  if (recipe(title).yaml!.includes("orders")) assert.equal(await ask("/api/orders"), "200 localhost:8083 /");
});

inBoth("A canary, by header and by share", "A canary.", async (t, title) => {
  const { ask, answer } = await cook(t, title);
  assert.equal(await ask("/", "x-canary: 1\r\n"), "200 localhost:8082 /");
  const first = await answer("/"), cookie = value(first, "set-cookie").split(";")[0]!;
  for (let i = 0; i < 20; i++) {
    assert.equal(await ask("/", `Cookie: ${cookie}\r\n`), `200 ${first.body}`, "a client stays with its version");
  }
  const got = [];
  for (let i = 0; i < 100; i++) got.push(await ask("/"));
  assert.ok(got.filter((one) => one === "200 localhost:8081 /").length > 70, "most get the old version");
});

test("blue and green", async (t) => {
  const { ask, lb } = await cook(t, "Blue and green");
  assert.match(await ask("/"), /localhost:808[12] /);
  assert.match(await ask("/", "", "preview.example.com"), /localhost:808[34] /);
  const [, path, type, body] = /-X PATCH localhost:9090(\S+) -H '(.*?)' -d '(.*?)'/.exec(recipe("Blue and green").sh!)!;
  const head = `PATCH ${path} HTTP/1.1\r\nHost: localhost\r\n${type}\r\nContent-Length: ${body!.length}\r\n`;
  const { answers } = await rawRequest(lb.admin, `${head}Connection: close\r\n\r\n${body}`);
  assert.equal(status(answers[0]!), 200, `${answers[0]!.body}`);
  assert.match(await ask("/"), /localhost:808[34] /);
});

inBoth("Sessions that stay on their server", "Sessions that stay on their server,", async (t, title) => {
  const { ask, answer, close } = await cook(t, title);
  const first = await answer("/"), cookie = value(first, "set-cookie");
  assert.match(cookie, /^lb=.*Max-Age=604800/);
  const again = () => ask("/", `Cookie: ${cookie.split(";")[0]}\r\n`);
  for (let i = 0; i < 5; i++) assert.equal(await again(), `200 ${first.body}`);
  await close(`${first.body}`.split(" ")[0]!);
  assert.notEqual(await again(), `200 ${first.body}`);
  assert.match(await again(), /^200 /);
});

inBoth("https and HSTS", "https,", async (t, title) => {
  const { answer, port } = await cook(t, title, { files: { "shop.pem": A, "shop.key": KEY } });
  const redirect = await answer("/cart?a=1");
  assert.equal(status(redirect), 308);
  assert.equal(value(redirect, "location"), "https://a.test/cart?a=1");
  const socket = connectTls({ port: await port("https"), host: "127.0.0.1", servername: "a.test", ca: CA });
  socket.write(get("/cart", "Connection: close\r\n"));
  const secure = await readText(socket);
  assert.match(secure, /\r\nstrict-transport-security: max-age=31536000\r\n/i);
  assert.match(secure, /localhost:808[12] \/cart$/);
});

inBoth("TCP: databases and the like", "A database,", async (t, title) => {
  const { port, close } = await cook(t, title);
  const ask = async () =>
    `${(await rawRequest(await port("tcp"), get("/", "Connection: close\r\n"))).answers[0]?.body}`;
  assert.deepEqual([await ask(), await ask()], ["localhost:5433 /", "localhost:5433 /"]);
  await close("localhost:5433");
  assert.equal(await ask(), "localhost:5434 /");
});

inBoth("A public API with limits and CORS", "A public API", async (t, title) => {
  const { answer } = await cook(t, title);
  const ask = (key: string) => answer("/v1/a", `x-api-key: ${key}\r\nOrigin: https://app.example.com\r\n`);
  const answers = [];
  for (let i = 0; i < 40; i++) answers.push(await ask("one"));
  const statuses = new Set(answers.map(status));
  assert.deepEqual(statuses, new Set([200, 429]));
  for (const one of answers) assert.equal(value(one, "access-control-allow-origin"), "https://app.example.com");
  assert.equal(status(await ask("two")), 200, "another key has tokens of its own");
  assert.equal(status(await answer("/v2")), 404);
});

test("many hosts, one of them a wildcard", async (t) => {
  const { ask, answer } = await cook(t, "Many hosts, one of them a wildcard");
  assert.equal(await ask("/", "", "example.com"), "200 localhost:8081 /");
  assert.equal(await ask("/", "", "www.example.com"), "200 localhost:8081 /");
  assert.match(await ask("/", "", "anna.example.com"), /^200 localhost:808[23] \/$/);
  const moved = await answer("/a?b", "", "old.example.org");
  assert.deepEqual([status(moved), value(moved, "location")], [301, "https://www.example.com/a?b"]);
  assert.equal(await ask("/", "", "other.example.org"), "404 there is no such site\n");
});

test("WebSockets beside static files", async (t) => {
  const server = await webSocketServer((peer) => peer.onFrame = ({ opcode, payload }) => peer.send(opcode, payload));
  t.after(() => server.close());
  const servers = { "localhost:8081": server.port, "localhost:8082": server.port };
  const { lb, ask, answer } = await cook(t, "WebSockets beside static files", { servers });
  assert.equal(await ask("/style.css"), "200 localhost:8083 /style.css");
  assert.equal(value(await answer("/big", "Accept-Encoding: gzip\r\n"), "content-encoding"), "gzip");
  const socket = await openWebSocket(lb.port, "/live");
  socket.send(TEXT, "hello");
  assert.equal(`${(await socket.frame(0)).payload}`, "hello");
  socket.close();
});

test("a gateway that asks for a token", async (t) => {
  const { text } = await withServers(t, recipe("A gateway that asks for a token").ts!);
  const folder = makeFolder(), file = join(folder, "gateway.mjs");
  t.after(() => rmSync(folder, { recursive: true }));
  const code = text.replace("./lb.ts", new URL("../../lb.ts", import.meta.url).href)
    .replace(/"(hono[^"]*)"/g, (_, name) => JSON.stringify(import.meta.resolve(name)))
    .replace("await serve", "export const listener = await serve").replace(
      "port: 8080",
      'port: 0, hostname: "127.0.0.1"',
    );
  writeFileSync(file, `${code}\nexport { lb };\n`);
  const { lb, listener } = await import(pathToFileURL(file).href);
  t.after(() => (lb.stop(), listener.close()));
  const ask = async (headers: string) => {
    const { answers } = await rawRequest(
      Number(listener.address.split(":")[1]),
      get("/api/a", `${headers}Connection: close\r\n`),
    );
    return answers[0]!;
  };
  assert.equal(status(await ask("")), 401);
  assert.match(`${(await ask("Authorization: Bearer a-token\r\n")).body}`, /^localhost:808[12] \/api\/a$/);
});

test("every recipe has a test", () => {
  const tests = readFileSync(new URL(import.meta.url), "utf8").toLowerCase();
  const isTested = (title: string) =>
    tests.includes(`\ntest("${title.toLowerCase()}"`) || tests.includes(`\ninboth("${title.toLowerCase()}"`);
  const titles = [...PAGE.matchAll(/^## (.*)$/gm)].map(([, title]) => title!);
  const shorts = [...README.split("\n## Six recipes\n")[1]!.split("\n## ")[0]!.matchAll(/^\*\*(.*?)\*\*/gm)].map((
    [, title],
  ) => title!);
  assert.deepEqual([titles.length >= 10, shorts.length], [true, 6]);
  assert.deepEqual(titles.filter((title) => !isTested(title)), []);
  assert.deepEqual(shorts.filter((title) => !tests.includes(`", "${title.toLowerCase()}", async`)), []);
});
