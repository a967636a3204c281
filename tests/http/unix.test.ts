// Unix sockets, as servers and as listeners: the running program, and clients and servers that speak over them.

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, rmSync, statSync, writeFileSync } from "node:fs";
import { connect, createServer, type Server, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { mistakesOf } from "../rig/balancer.ts";
import { endServer, get, sleep, startProgram, test, until } from "../rig/rig.ts";

const FOLDER = mkdtempSync(join(tmpdir(), "lb-unix-"));
process.once("exit", () => rmSync(FOLDER, { recursive: true, force: true }));
let sockets = 0;
const freePath = () => join(FOLDER, `${++sockets}.sock`);

/** Answers each request on a Unix socket with its head. */
async function serverAt(path: string): Promise<{ url: string; close(): Promise<void> }> {
  const open = new Set<Socket>();
  const server: Server = createServer((socket) => {
    open.add(socket);
    socket.on("error", () => {});
    socket.on("data", (head) => {
      const body = head.toString();
      const last = /connection: close/i.test(body);
      socket.write(
        `HTTP/1.1 200 OK\r\nContent-Length: ${Buffer.byteLength(body)}\r\n\r\n${body}`,
        () => last && socket.end(),
      );
    });
  });
  await new Promise<void>((resolve) => server.listen({ path }, resolve));
  return { url: `unix:${path}`, close: () => endServer(server, open) };
}

/** What comes back from a socket until the other side ends, or nothing has come for a while. */
const exchange = (where: { path: string } | { port: number }, sent: string) =>
  new Promise<string>((resolve, reject) => {
    let received = "";
    const socket = connect({ ...where, host: "127.0.0.1" }, () => socket.write(sent));
    socket.on("error", reject).on("close", () => resolve(received));
    socket.on("data", (bytes) => received += bytes);
  });
const ask = (where: { path: string } | { port: number }, fields = "") =>
  exchange(where, get("/", `Connection: close\r\n${fields}`));

const refused = (keys: string): string => mistakesOf(keys).join("\n");

test("a server may be a Unix socket: it is asked, probed and shown by its path", async () => {
  const server = await serverAt(freePath()), absent = `unix:${freePath()}`;
  const services = { app: { servers: [server.url, absent], health: { path: "/", interval: "100ms", fall: 1 } } };
  const lb = await startProgram({ admin: "127.0.0.1:0", services, default: "app" }, ["--admin", "127.0.0.1:0"]);
  try {
    for (let i = 0; i < 4; i++) {
      const answer = await ask({ port: lb.port });
      assert.match(answer, /^HTTP\/1\.1 200 OK\r\n/);
      assert.match(answer, /\r\nHost: a\.test\r\n/i);
    }
    await until("the one without a socket is down", () => lb.output().includes(`${absent} is down`));
    const { services } = await (await fetch(`http://127.0.0.1:${lb.admin}/services`)).json();
    assert.deepEqual(
      services[0].servers.map((one: Record<string, unknown>) => [one.name, one.url, one.status]),
      [[server.url, server.url, "up"], [absent, absent, "down"]],
    );
    const path = encodeURIComponent(server.url);
    const drained = await fetch(`http://127.0.0.1:${lb.admin}/services/app/servers/${path}/state`, {
      method: "PUT",
      body: '{"state":"drain"}',
      headers: { "content-type": "application/json" },
    });
    assert.equal((await drained.json()).state, "drain");
  } finally {
    await lb.stop();
    await server.close();
  }
});

test("a listener may be a Unix socket: 660 unless mode says otherwise, removed at the end, opened and closed by reloads", async () => {
  const [first, second] = [freePath(), freePath()];
  const listen = ["127.0.0.1:0", `unix:${first}`], fallback = { respond: { status: 200, body: "fixed" } };
  const lb = await startProgram({ listen, default: fallback });
  try {
    assert.match(await ask({ path: first }), /fixed$/);
    assert.match(lb.output(), /listening on http:\/\/unix:\/\S+1?\d*\.sock\n/);
    assert.equal(statSync(first).mode & 0o777, 0o660);
    await lb.reload({ listen: ["127.0.0.1:0", { address: `unix:${second}`, mode: 600 }], default: fallback });
    await until("the new socket is there, and the old one is not", () => existsSync(second) && !existsSync(first));
    assert.match(await ask({ path: second }), /fixed$/);
    assert.equal(statSync(second).mode & 0o777, 0o600);
    await lb.stop();
    assert.equal(existsSync(second), false, `the file is removed at the end: ${lb.output()}`);
  } finally {
    await lb.stop();
  }
});

test("a socket file that a killed process left is removed; one that is in use is not, and neither is another file", async () => {
  const [stale, used, file] = [freePath(), freePath(), freePath()];
  const bind =
    `const s = require("net").createServer().listen(process.argv[1], () => process.kill(process.pid, "SIGKILL"))`;
  const python = "import socket, sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])";
  spawnSync("python3", ["-c", python, stale]).error && spawnSync("node", ["-e", bind, stale]);
  assert.ok(existsSync(stale));
  const server = await serverAt(used);
  writeFileSync(file, "mine");
  const start = (path: string) => startProgram({ listen: ["127.0.0.1:0", `unix:${path}`], default: { respond: 200 } });
  try {
    const lb = await start(stale);
    assert.match(await ask({ path: stale }), /^HTTP\/1\.1 200/);
    await lb.stop();
    for (const path of [used, file]) {
      await assert.rejects(start(path), (error: Error) => {
        assert.match(error.message, new RegExp(`cannot listen on unix:${path}: the file exists, and another process`));
        return true;
      });
      assert.ok(existsSync(path));
    }
    assert.match(await ask({ path: used }), /^HTTP\/1\.1 200/, "who has it still answers");
    await assert.rejects(start(join(FOLDER, "none", "a.sock")), /its directory does not exist, or this user may not/);
  } finally {
    await server.close();
  }
});

test("clients over a Unix socket are trusted, allowed and denied as unix", async () => {
  const server = await serverAt(freePath()), path = freePath(), given = "X-Forwarded-For: 192.0.2.7\r\n";
  const config = (more: object) => ({ listen: ["127.0.0.1:0", `unix:${path}`], ...more });
  const forward = { servers: [server.url] };
  const lb = await startProgram(config({ default: forward }));
  try {
    assert.match(await ask({ path }, given), /\r\nX-Forwarded-For: unknown\r\n/i);
    await lb.reload(config({ default: forward, trust: ["unix"] }));
    assert.match(await ask({ path }, given), /\r\nX-Forwarded-For: 192\.0\.2\.7, unknown\r\n/i);
    await lb.reload(config({ default: { ...forward, deny: ["unix"] } }));
    assert.match(await ask({ path }), /^HTTP\/1\.1 403 /);
    assert.match(await ask({ port: lb.port }), /^HTTP\/1\.1 200 /);
  } finally {
    await lb.stop();
    await server.close();
  }
});

test("TCP services listen at Unix sockets and reach servers there; PROXY protocol then names no addresses", async () => {
  const [path, behind] = [freePath(), freePath()];
  const server = createServer({ allowHalfOpen: true }, (socket) => {
    let got = "";
    socket.on("data", (bytes) => got += bytes.toString("latin1")).on("end", () => socket.end(got, "latin1"));
  });
  await new Promise<void>((resolve) => server.listen({ path: behind }, resolve));
  const tcp = { listen: `unix:${path}`, servers: [`unix:${behind}`], proxy_protocol: true, health: "off" };
  const lb = await startProgram({ listen: "127.0.0.1:0", tcp: [tcp], default: { respond: 200 } });
  try {
    const received = await new Promise<string>((resolve, reject) => {
      let got = "";
      const socket = connect({ path, allowHalfOpen: true }, () => socket.end("hello"));
      socket.on("data", (bytes) => got += bytes.toString("latin1")).on("error", reject).on("close", () => resolve(got));
    });
    assert.equal(received, "\r\n\r\n\0\r\nQUIT\n\x21\0\0\0hello");
    await until("the log has the connection", () => lb.output().includes('"TCP '));
  } finally {
    await lb.stop();
    await new Promise((resolve) => server.close(resolve));
  }
});

test("of several workers one listens at a Unix socket, and another one when it has ended", async () => {
  const path = freePath();
  const config = { listen: ["127.0.0.1:0", `unix:${path}`], admin: "127.0.0.1:0", default: { respond: 200 } };
  const lb = await startProgram(config, ["--workers", "2"]);
  try {
    assert.match(await ask({ path }), /^HTTP\/1\.1 200/);
    const api = `http://127.0.0.1:${lb.admin}/workers`, [{ id }] = await (await fetch(api)).json();
    await fetch(`${api}/${id}`, { method: "DELETE" });
    await until("it has ended", () => lb.output().includes("a worker has ended"));
    let answer = "";
    for (let i = 0; !answer && i < 200; i++) {
      answer = await ask({ path }).catch(() => "");
      if (!answer) await sleep(50);
    }
    assert.match(answer, /^HTTP\/1\.1 200/, lb.output());
    await lb.stop();
    assert.equal(existsSync(path), false);
  } finally {
    await lb.stop();
  }
});

test("what cannot be a Unix socket is refused with what would be right", () => {
  const longest = `unix:/${"x".repeat(106)}`, route = "default: { respond: 200 }\n";
  assert.equal(refused(`listen: "${longest}"\n${route}`), "");
  assert.equal(
    refused(`listen: "${longest}x"\n${route}`),
    `listen: "${
      longest.slice(0, 56)
    }..." is not a port, or an address such as 127.0.0.1:8080 or [::]:8080, or unix:/run/lb.sock`,
  );
  assert.match(refused(`listen: unix:lb.sock\n${route}`), /or unix:\/run\/lb\.sock$/);
  assert.match(refused("default: { servers: [unix:app.sock] }"), /"unix:app\.sock" is not a server such as/);
  assert.equal(
    refused(`listen: { address: unix:/a, tls: { cert: c, key: k } }\n${route}`),
    "listen: a Unix socket has no TLS: nobody else hears what it carries",
  );
  assert.match(refused(`listen: { address: unix:/a, mode: rw }\n${route}`), /"rw" is not permissions such as 660/);
  assert.equal(refused(`listen: { address: 80, mode: 600 }\n${route}`), "listen: mode is for Unix sockets");
  assert.match(refused(`admin: unix:/a\n${route}`), /"unix:\/a" is not a port/);
});
