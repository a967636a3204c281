// TLS in front: the running program, and clients that speak TLS to it. Certificates stand in certificates.ts.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { type ChildProcess, execFile, spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { type AddressInfo, connect, createServer, type Socket, type TcpNetConnectOpts } from "node:net";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import process from "node:process";
import { after } from "node:test";
import {
  connect as connectTls,
  type ConnectionOptions,
  createServer as createTlsServer,
  type TlsOptions,
  type TLSSocket,
} from "node:tls";
import { fileURLToPath } from "node:url";
import { parseConfig } from "../../lb.ts";
import { A, B, CA, CLIENT, EXPIRED, KEY, NAMED, OTHER_KEY, RENEWED, STRANGER } from "../rig/certificates.ts";
import { echoStrictly, openWebSocket, TEXT, webSocketServer } from "../rig/websocket.ts";
import {
  type Echo,
  echo,
  freePort,
  listenLocally,
  patience,
  type Program,
  runtime,
  type Script,
  type ScriptedServer,
  scriptedServer,
  sleep,
  startProgram,
  test,
  until,
} from "../rig/rig.ts";

/** A certificate and its key in one file. */
const TOGETHER = `\ufeffCommon name: a.test\n${KEY}\n${A}${CA}`.replaceAll("\n", "\r\n");
const FILES = {
  ...{ "a.pem": A, "a.key": KEY, "b.pem": B, "b.key": OTHER_KEY, "ca.pem": CA, "n.pem": NAMED, "one.pem": TOGETHER },
  ...{ "client.pem": CLIENT, "client.key": OTHER_KEY, "both.pem": `\ufeff${OTHER_KEY}${CLIENT}` },
  ...{ "stranger.pem": STRANGER, "stranger.key": KEY },
};
const FIRST = { cert: "a.pem", key: "a.key" }, SECOND = { cert: "b.pem", key: "b.key" };
const LOCAL = "127.0.0.1:0";

// ─── Clients ───

const portsOf = (lb: Program) =>
  [...lb.output().matchAll(/listening on (?:https?|tls):\/\/\S+:(\d+)$/gm)].map(([, port]) => Number(port));

/** A connection over TLS; the certificate is checked, but for its name. */
function dial(port: number, options: ConnectionOptions = {}): Promise<TLSSocket> {
  return new Promise((resolve, reject) => {
    const socket = connectTls({
      ...{ port, host: "127.0.0.1", ca: CA, servername: "a.test", ALPNProtocols: ["http/1.1"] },
      checkServerIdentity: () => undefined,
      ...options,
    });
    socket.on("error", reject);
    socket.on("close", () => reject(new Error("closed")));
    socket.on("secureConnect", () => resolve(socket));
  });
}

/** Whom the certificate names that a client is shown. */
async function shownTo(port: number, servername: string): Promise<string> {
  const socket = await dial(port, { servername });
  const { subject } = socket.getPeerCertificate();
  socket.destroy();
  return String(subject.CN);
}

/** One request and its whole answer, as they are on the wire. */
async function ask(socket: TLSSocket, path = "/", headers = ""): Promise<string> {
  const got: Buffer[] = [];
  const take = (bytes: Buffer) => got.push(bytes);
  const text = () => Buffer.concat(got).toString("latin1");
  socket.on("data", take);
  socket.write(`GET ${path} HTTP/1.1\r\nHost: a.test\r\n${headers}\r\n`);
  const whole = () => {
    const [head = "", body] = text().split("\r\n\r\n");
    const length = /content-length: (\d+)/i.exec(head)?.[1];
    return body !== undefined && (length ? body.length === Number(length) : text().endsWith("0\r\n\r\n"));
  };
  await until("the answer is there, or the connection is over", () => whole() || socket.destroyed, 20_000);
  socket.off("data", take);
  return text();
}

/** What curl makes of these addresses, in one process: it resumes sessions, and sees where an answer is cut. */
const curl = (...given: Parameters<typeof startCurl>) => startCurl(...given)[1];
function startCurl(lb: Program, port: number, args: string[], paths = ["/"]): [ChildProcess, Promise<Curled>] {
  const file = (name: string) => join(dirname(lb.file), name);
  const trust = ["--cacert", file("ca.pem"), "--resolve", `a.test:${port}:127.0.0.1`, "--cert-type", "PEM"];
  const all = [...trust, ...args.map((one) => one.startsWith("@") ? file(one.slice(1)) : one)];
  const urls = paths.map((path) => `https://a.test:${port}${path}`);
  const { promise, resolve } = Promise.withResolvers<Curled>();
  const child = execFile("curl", ["-qsv", ...all, ...urls], (error, out, err) => {
    resolve({ code: Number(error?.code ?? 0), out, err });
  });
  return [child, promise];
}
/** What OpenSSL's client prints: curl resumes no session of TLS 1.2. */
function openssl(lb: Program, args: string[], input = ""): Promise<string> {
  const all = args.map((one) => one.startsWith("@") ? join(dirname(lb.file), one.slice(1)) : one);
  return new Promise((resolve) => execFile("openssl", all, (_, out) => resolve(out)).stdin!.end(input));
}
type Curled = { code: number; out: string; err: string };

/** How often a client that curl was has been shown a certificate: a session that is resumed needs none. */
const timesShown = ({ err }: Curled): number => err.match(/\(IN\), TLS handshake, Certificate \(11\)/g)?.length ?? 0;

/** A connection without TLS, and what came on it. */
function connectRaw(port: number, options: TcpNetConnectOpts = { port }) {
  const socket = connect({ host: "127.0.0.1", ...options });
  const raw = { socket, got: Buffer.alloc(0), openedAt: Date.now(), closedAt: 0 };
  socket.on("data", (bytes: Buffer) => raw.got = Buffer.concat([raw.got, bytes]));
  socket.on("error", () => {}); // `close` follows
  socket.on("close", () => raw.closedAt = Date.now());
  return raw;
}

/** The first record of a client that speaks this version at most: 0302 is TLS 1.1, 0303 is TLS 1.2. */
function helloOf({ version }: { version: string }): Buffer {
  const hello = Buffer.concat([
    Buffer.from(`01000031${version}`, "hex"),
    randomBytes(32),
    Buffer.from("00" + "000a" + "c013c014002f0035000a" + "0100", "hex"),
  ]);
  hello.writeUIntBE(hello.length - 4, 1, 3);
  return Buffer.concat([Buffer.from([0x16, 3, 1, hello.length >> 8, hello.length & 255]), hello]);
}

/** The sockets that listen on a port, as the system numbers them. */
const listenersOf = (port: number): string[] =>
  readFileSync("/proc/net/tcp", "utf8").split("\n").map((line) => line.trim().split(/\s+/))
    .filter(([, local = "", , state]) => state === "0A" && parseInt(local.split(":")[1]!, 16) === port)
    .map((columns) => columns[9]!);

/** What a client with this certificate is answered; empty: nothing, for its handshake has failed. */
const answeredTo = (port: number, own: ConnectionOptions): Promise<string> =>
  dial(port, own).then((socket) => {
    socket.removeAllListeners("error").on("error", () => {});
    return ask(socket).finally(() => socket.destroy());
  }).catch(() => "");

const seenIn = (answer: string): Echo => JSON.parse(/\{".*\}/.exec(answer)![0]);
const headersOf = ({ rawHeaders }: Echo): Record<string, string> =>
  Object.fromEntries(rawHeaders.map(([name, value]) => [name.toLowerCase(), value]));

/** One program serves most tests: each puts its own config in force, on ports of its own. */
let shared: Promise<Program> | undefined;
after(async () => {
  const lb = await shared;
  if (!lb) return;
  process.kill(lb.pid, "SIGTERM");
  await until("it drains: nothing is left in flight", () => /info: drained\n/.test(lb.output()), 10_000);
  await lb.stop();
});

interface Counted {
  in_flight: number;
  servers?: Counted[];
}
/** Nothing is in flight any more, on any level; soon. */
async function nothingInFlight({ admin }: Program): Promise<void> {
  let counts: number[] = [];
  for (const end = Date.now() + patience(10_000); Date.now() < end; await sleep(20)) {
    const answer = await fetch(`http://127.0.0.1:${admin}/connections`, { headers: { connection: "close" } });
    const all = await answer.json() as Counted & { entrypoints: Counted[]; services: Counted[] };
    const some = [all, ...all.entrypoints, ...all.services, ...all.services.flatMap(({ servers }) => servers!)];
    counts = some.map((one) => one.in_flight);
    if (counts.every((count) => count === 0)) return;
  }
  assert.fail(`in flight: ${counts}`);
}

type Listen = { address: string };
const IDLE = { listen: LOCAL, default: { respond: {} } };
/**
 * The program with this config while `use` lasts, as if it had begun with it: `output` says what it has printed since.
 * In place of LOCAL it listens on free ports: `ports` are those of `listen`, in their order.
 */
async function sharing(
  config: Record<string, unknown>,
  use: (lb: Program, ports: number[]) => Promise<void>,
): Promise<void> {
  const lb = await (shared ??= startProgram(IDLE, ["--drain", "5s", "--admin", LOCAL], FILES));
  const folder = dirname(lb.file), addresses: string[] = [];
  const changed: [string, string][] = [];
  for (const file of Object.entries(FILES)) {
    if (await readFile(join(folder, file[0]), "utf8").catch(() => "") !== file[1]) changed.push(file);
  }
  if (changed.length) { // else the listeners of the last test show the certificates that are written
    const idle = lb.output().length;
    await lb.reload(IDLE);
    await until("it is open", () => lb.output().includes("listening on", idle));
  }
  for (const [name, text] of changed) writeFileSync(join(folder, name), text);
  const placed = async (given: unknown): Promise<string[]> => {
    const count = [given].flat().length;
    while (addresses.length < count) addresses.push(`127.0.0.1:${await freePort()}`);
    return addresses.slice(0, count);
  };
  const reload = async ({ listen = LOCAL, ...rest }: Record<string, unknown>) => {
    const at = await placed(listen);
    const all = ([listen].flat() as (string | Listen)[]).map((one, i) =>
      typeof one === "string" ? one.replace(LOCAL, at[i]!) : { ...one, address: one.address.replace(LOCAL, at[i]!) }
    );
    await lb.reload({ ...rest, listen: all });
  };
  const from = lb.output().length;
  await reload(config);
  const view: Program = {
    ...lb,
    output: () => lb.output().slice(from),
    reload: (next) => reload(next as Record<string, unknown>),
  };
  await use(view, await until("all are open", () => portsOf(view).length >= addresses.length && portsOf(view)));
  await nothingInFlight(lb);
}

/** The program over a server that echoes, while `use` lasts. `files`: in a program of its own, which then drains. */
async function running(
  config: Record<string, unknown>,
  use: (lb: Program, server: ScriptedServer, ports: number[]) => Promise<void>,
  { files, script = echo }: { files?: Record<string, string>; script?: Script } = {},
) {
  const server = await scriptedServer(script);
  const whole = {
    listen: { address: LOCAL, tls: FIRST },
    default: { servers: [server.address], health: "off" },
    ...config,
  };
  if (!files) return await sharing(whole, (lb, ports) => use(lb, server, ports)).finally(server.close);
  const lb = await startProgram(whole, ["--drain", "5s"], files);
  try {
    const count = [whole.listen].flat().length;
    await use(lb, server, await until("all are open", () => portsOf(lb).length === count && portsOf(lb)));
    if (!/info: draining/.test(lb.output())) process.kill(lb.pid, "SIGTERM");
    await until("it drains: nothing is left in flight", () => /info: drained\n/.test(lb.output()), 10_000);
  } finally {
    await lb.stop();
    await server.close();
  }
}

// ─── What is spoken ───

test("over TLS the server is told so, and cookies of our own are Secure", () =>
  running({
    listen: [{ address: LOCAL, tls: FIRST }, LOCAL],
  }, async (lb, server, [secure, plain]) => {
    const socket = await dial(secure!);
    assert.equal(socket.authorized, true);
    const answer = await ask(socket, "/x?y");
    assert.match(answer, /^HTTP\/1\.1 200/);
    const seen = headersOf(seenIn(answer));
    assert.equal(seen["x-forwarded-proto"], "https");
    assert.match(seen.forwarded!, /proto=https/);
    assert.equal(seen["x-forwarded-for"], "127.0.0.1");
    assert.equal(seen.host, "a.test");
    assert.equal(seenIn(answer).url, "/x?y");
    assert.match(await ask(socket), /^HTTP\/1\.1 200/, "the connection is used again");
    socket.destroy();
    const response = await fetch(`http://127.0.0.1:${plain}/`);
    assert.equal(headersOf(await response.json())["x-forwarded-proto"], "http");
    await lb.reload({
      listen: [{ address: LOCAL, tls: FIRST }, LOCAL],
      default: { servers: [server.address], sticky: { cookie: "lb" } },
    });
    const again = await dial(secure!);
    assert.match(await ask(again), /set-cookie: lb=.*; Secure/i);
    again.destroy();
    assert.doesNotMatch((await fetch(`http://127.0.0.1:${plain}/`)).headers.get("set-cookie")!, /Secure/);
  }));

test("the certificate is the one for the name that the client asks for; for others, and for none, the first", () =>
  running(
    { listen: { address: LOCAL, tls: [FIRST, SECOND, { cert: "n.pem", key: "a.key" }] } },
    async (_, __, [port]) => {
      const expected = {
        "a.test": "a",
        "b.test": "b",
        "B.Test": "b",
        "x.b.test": "b",
        "x.y.b.test": "a",
        "named.test": "named.test",
        "other.test": "a",
        "": "a",
      };
      for (const [name, shown] of Object.entries(expected)) assert.equal(await shownTo(port!, name), shown, name);
      const socket = await dial(port!, { servername: "b.test" });
      assert.match(await ask(socket), /^HTTP\/1\.1 200/);
      socket.destroy();
    },
  ));

test("a certificate and its key may stand in one file, with a mark, comments and other line ends, as in haproxy's", () => {
  const one = { cert: "one.pem", key: "one.pem" };
  return running({ listen: { address: LOCAL, tls: [one, SECOND] } }, async (_, __, [port]) => {
    assert.equal(await shownTo(port!, "a.test"), "a");
    assert.equal(await shownTo(port!, "b.test"), "b");
    const socket = await dial(port!);
    assert.match(await ask(socket), /^HTTP\/1\.1 200/);
    socket.destroy();
  });
});

test("what is older than TLS 1.2 is refused, plain HTTP is told to come by https, and neither costs anybody else anything", () =>
  running({}, async (_, server, [port]) => {
    const plain =
      /^HTTP\/1\.1 400 .*\r\n(.+\r\n)*x-lb-failure: bad-scheme\r\n(.+\r\n)*\r\n400: this port speaks https, .*\n$/i;
    for (
      const [bytes, encoding, answer] of [
        [helloOf({ version: "0302" }), "hex", /^1503..000202(46|28)$/],
        ["GET / HTTP/1.1\r\nHost: a\r\n\r\n", "latin1", plain],
      ] as const
    ) {
      const socket = connect(port!, "127.0.0.1");
      const got: Buffer[] = [];
      socket.on("data", (bytes) => got.push(bytes));
      socket.on("error", () => {});
      socket.write(bytes);
      await until("the connection is closed", () => socket.destroyed || socket.readableEnded);
      assert.match(Buffer.concat(got).toString(encoding), answer);
      socket.destroy();
    }
    assert.equal(server.requests.length, 0);
    const socket = await dial(port!);
    assert.match(await ask(socket), /^HTTP\/1\.1 200/);
    socket.destroy();
  }));

test(
  "TLS 1.2 and 1.3 are spoken, and HTTP/2 and HTTP/1.1 are offered",
  { needs: ["curl"] },
  () =>
    running({}, async (lb, _, [port]) => {
      for (const version of ["TLSv1.2", "TLSv1.3"] as const) {
        const socket = await dial(port!, { minVersion: version, maxVersion: version });
        assert.equal(socket.getProtocol(), version);
        assert.match(await ask(socket), /^HTTP\/1\.1 200/);
        assert.match(await ask(socket), /^HTTP\/1\.1 200/);
        socket.destroy();
      }
      const { out } = await curl(lb, port!, ["--http2", "-o", "@out", "-w", "%{http_version}"]);
      assert.equal(out, "2");
      await assert.rejects(dial(port!, { ALPNProtocols: ["h3"] }), /alert/i);
      const silent = connectTls({ port: port!, host: "127.0.0.1", ca: CA, servername: "a.test" }); // asks for no protocol
      assert.match(await ask(silent), /^HTTP\/1\.1 200/);
      silent.destroy();
    }),
);

for (
  const [what, front, own] of [
    ["one certificate", { tls: FIRST }, []],
    ["several", { tls: [SECOND, FIRST] }, []],
    ["certificates of clients", { tls: FIRST, client_ca: "ca.pem" }, ["cert", "@client.pem", "key", "@b.key"]],
  ] as [string, Record<string, unknown>, string[]][]
) {
  test(
    `a client that comes again resumes its session: ${what}`,
    { needs: ["curl", "openssl"] },
    () =>
      running({ listen: { address: LOCAL, ...front } }, async (lb, server, [port]) => {
        const dashed = (dashes: string) => own.map((one) => one.startsWith("@") ? one : dashes + one);
        const args13 = ["--http1.1", "--tlsv1.3", ...dashed("--"), "-H", "Connection: close"];
        const once = await curl(lb, port!, args13, ["/1", "/2"]);
        assert.equal(once.code, 0, once.err);
        assert.deepEqual([timesShown(once), once.err.match(/Connected to/g)?.length], [1, 2], once.err);
        assert.equal(server.requests.length, 2);
        const args12 = ["-servername", "a.test", "-tls1_2", "-reconnect", ...dashed("-")];
        const said = await openssl(lb, ["s_client", "-connect", `127.0.0.1:${port}`, ...args12]);
        const kinds = said.match(/^(New|Reused), TLSv1\.2/gm);
        assert.deepEqual(kinds, ["New, TLSv1.2", ...Array(5).fill("Reused, TLSv1.2")]);
      }),
  );
}

test("a client that has ended its side gets its answer over TLS too", () => {
  const script: Script = (visit, request) => sleep(1_000).then(() => echo(visit, request, 0));
  return running({}, async (_, __, [port]) => {
    const socket = await dial(port!, { allowHalfOpen: true } as ConnectionOptions);
    const got: Buffer[] = [];
    let ended = false;
    socket.on("data", (bytes) => got.push(bytes));
    socket.on("end", () => ended = true);
    socket.end("GET /late HTTP/1.1\r\nHost: a.test\r\n\r\n");
    await until("the balancer ends its side", () => ended);
    const answer = Buffer.concat(got).toString();
    assert.match(answer, /HTTP\/1\.1 200 /);
    assert.equal(seenIn(answer).url, "/late");
    socket.destroy();
  }, { script });
});

test("an answer that breaks off never looks whole over TLS: neither chunked, nor where only its end tells", {
  needs: ["curl", "openssl"],
}, () => {
  const script: Script = async (visit, request) => {
    await visit.send("HTTP/1.1 200 OK\r\n\r\nhalf", 100);
    if (request.start.includes("/whole")) visit.socket.end();
    else visit.socket.resetAndDestroy();
  };
  return running({}, async (lb, _, [port]) => {
    const cut = await curl(lb, port!, ["--http1.1"], ["/cut"]), whole = await curl(lb, port!, [], ["/whole"]);
    assert.deepEqual([cut.out, whole.out, whole.code], ["half", "half", 0]);
    assert.match(String(cut.code), /^(18|56)$/, "a partial file, or a failure in receiving");
    assert.deepEqual((await curl(lb, port!, ["--http1.0"], ["/whole"])).out, "half");
    for (const [path, ends] of [["/cut", 0], ["/whole", 1]] as const) {
      const args = ["s_client", "-ign_eof", "-quiet", "-msg", "-connect", `127.0.0.1:${port}`];
      const said = await openssl(lb, args, `GET ${path} HTTP/1.0\r\n\r\n`);
      assert.match(said, /\r\n\r\nhalf/);
      assert.equal(said.match(/<<< .*\bclose_notify$/gm)?.length ?? 0, ends, `the end of ${path} is told`);
    }
  }, { script });
});

test("headers are bytes over TLS too, and an upgrade is one", () => {
  const script: Script = (visit, request) =>
    /upgrade/i.test(request.headers.flat().join())
      ? visit.send("HTTP/1.1 403 Forbidden\r\nX-Who: server\r\nContent-Length: 2\r\n\r\nno")
      : visit.send("HTTP/1.1 200 OK\r\nX-Name: caf\xe9\r\nContent-Length: 2\r\n\r\nok");
  return running({}, async (_, __, [port]) => {
    const socket = await dial(port!);
    assert.match(await ask(socket), /x-name: caf\xe9\r\n/i);
    const upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n" +
      "Sec-WebSocket-Key: AQIDBAUGBwgJCgsMDQ4PEA==\r\n";
    const answer = await ask(socket, "/", upgrade);
    assert.match(answer, /^HTTP\/1\.1 403/);
    assert.match(answer, /x-who: server/i);
    socket.destroy();
  }, { script });
});

for (const [what, tls] of [["one certificate", FIRST], ["several", [FIRST, SECOND]]] as const) {
  test(`a WebSocket passes over TLS as it does without: ${what}`, async () => {
    const echo = await webSocketServer(echoStrictly);
    const routes = [{ path: "/ws", servers: [`127.0.0.1:${echo.port}`] }];
    await running({ listen: { address: LOCAL, tls }, routes }, async (_, __, [port]) => {
      const socket = await openWebSocket(port!, "/ws", "", await dial(port!));
      for (const [i, text] of ["hello", "x".repeat(2 ** 20), "again"].entries()) {
        socket.send(TEXT, text);
        assert.ok((await socket.frame(i)).payload.equals(Buffer.from(text)), `message ${i}`);
      }
      socket.close(4000, "enough");
      assert.equal((await socket.closed())[0], 4000);
    });
    await echo.close();
  });
}

// ─── How much, and how long ───

/** Writes as fast as it is taken, up to 64 MiB; gives how much has been. */
function flood(socket: Pick<Socket, "write" | "once">): () => number {
  const piece = Buffer.alloc(2 ** 16, 7);
  let written = 0;
  const go = () => {
    while (written < FLOOD) {
      written += piece.length;
      if (!socket.write(piece)) return void socket.once("drain", go);
    }
  };
  go();
  return () => written;
}
const FLOOD = 64 * 2 ** 20;

/** Waits until a flood stands still, and fails when it does not before it is half done. */
async function stalls(written: () => number): Promise<void> {
  for (let before = -1; before !== written(); await sleep(500)) before = written();
  assert.ok(written() < FLOOD / 2, `${written()} bytes were taken though nobody reads`);
}

test("a slow reader stops a fast writer over TLS, both ways, and loses nothing: HTTP, and what is not", {
  needs: ["curl"],
}, async () => {
  let sent = () => 0, reader: Socket | undefined, length = 0;
  const server = createServer((socket) => {
    socket.on("error", () => {});
    socket.once("data", (head: Buffer) => {
      if (head.toString("latin1").startsWith("GET")) {
        socket.write(`HTTP/1.1 200 OK\r\nContent-Length: ${FLOOD}\r\nConnection: close\r\n\r\n`);
        sent = flood(socket);
        return;
      }
      socket.pause();
      reader = socket;
      length = head.length - head.indexOf("\r\n\r\n") - 4;
      socket.on("data", (bytes: Buffer) => length += bytes.length);
    });
  });
  await listenLocally(server);
  const servers = [`127.0.0.1:${(server.address() as AddressInfo).port}`], listen = { address: LOCAL, tls: FIRST };
  const config = { listen, tcp: [{ listen, servers, health: "off" }], default: { servers, health: "off" } };
  const lb = await startProgram(config, ["--drain", "0s"], FILES);
  try {
    for (const port of await until("both are open", () => portsOf(lb).length === 2 && portsOf(lb))) {
      const [child, downloaded] = startCurl(lb, port, ["-o", "@download", "-w", "%{size_download}"]);
      await until("the answer has begun", () => sent() > 0);
      process.kill(child.pid!, "SIGSTOP");
      await stalls(sent);
      process.kill(child.pid!, "SIGCONT");
      assert.equal((await downloaded).out, String(FLOOD));
      assert.equal(statSync(join(dirname(lb.file), "download")).size, FLOOD);

      const client = await dial(port);
      client.write(`POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: ${FLOOD}\r\n\r\n`);
      const uploaded = flood(client);
      const held = await until("the request has come", () => reader);
      await stalls(uploaded);
      held.resume();
      await until("all of it has come", () => length === FLOOD, 30_000);
      client.destroy();
      [sent, reader] = [() => 0, undefined];
    }
  } finally {
    await lb.stop();
    server.close();
  }
});

test("a handshake that does not come is cut at limits.header, also one that comes byte by byte", () =>
  running({ limits: { header: "1s" } }, async (lb, server, [port]) => {
    const slow = connectRaw(port!), silent = connectRaw(port!), begun = connectRaw(port!);
    const late: Script = (visit, request) => sleep(2_500).then(() => echo(visit, request, 0));
    server.reset(late);
    const busy = await dial(port!), waiting = await dial(port!), hello = helloOf({ version: "0303" });
    const answer = ask(busy); // takes longer than a handshake may
    begun.socket.write(hello.subarray(0, 20));
    for (const byte of hello.subarray(0, 15)) { // for 1.5 s at least
      if (slow.closedAt) break;
      slow.socket.write(Buffer.from([byte]));
      await sleep(100);
    }
    for (const one of [slow, silent, begun]) {
      await until("it is cut", () => one.closedAt);
      assert.ok(one.closedAt - one.openedAt > 900, "not before its time");
      assert.ok(one.closedAt - one.openedAt < 4_000, "soon after it");
      assert.equal(one.got.length, 0);
    }
    assert.match(await answer, /^HTTP\/1\.1 200 /, "a handshake that came in time is none any more");
    await until("who says nothing after it is sent away as well", () => waiting.destroyed || waiting.readableEnded);
    assert.equal(server.requests.length, 1);
    busy.destroy();
    assert.doesNotMatch(lb.output(), / 408 /, "no request was begun");
  }));

test("a handshake that has not come holds up neither a reload nor the end", () =>
  running({ listen: [{ address: LOCAL, tls: FIRST }, LOCAL] }, async (lb, server, [port]) => {
    const before = connectRaw(port!);
    await until("it is connected", () => !before.socket.connecting);
    await lb.reload({ listen: [LOCAL], default: { servers: [server.address], health: "off" } });
    await until("it is cut", () => before.closedAt);
    await lb.reload({ listen: [{ address: LOCAL, tls: FIRST }, LOCAL], default: { servers: [server.address] } });
    const silent = connectRaw(await until("it is open again", () => portsOf(lb)[2]));
    await until("it is connected", () => !silent.socket.connecting);
    const begun = Date.now();
    process.kill(lb.pid, "SIGTERM");
    await until("it drains", () => /info: drained\n/.test(lb.output()));
    assert.ok(Date.now() - begun < 3_000, "of 5 seconds that it may take");
  }, { files: FILES }));

test("a head that comes too slowly is answered 408 over TLS too", () =>
  running({ limits: { header: "1s" } }, async (_, __, [port]) => {
    const socket = await dial(port!), got: Buffer[] = [];
    socket.on("data", (bytes) => got.push(bytes));
    socket.write("GET / HTTP/1.1\r\nHo");
    await until("it is told, and that is all", () => socket.readableEnded || socket.destroyed);
    assert.match(Buffer.concat(got).toString(), /^HTTP\/1\.1 408 [^]*x-lb-failure: client-timeout/i);
  }));

test("clients of two addresses may have the same port: each has its own time for its handshake", () =>
  running({ limits: { header: "1s" } }, async (_, server, [port]) => {
    const one = connectRaw(port!);
    await until("it is connected", () => one.socket.localPort);
    const other = connect({
      port: port!,
      host: "127.0.0.1",
      localAddress: "127.0.0.2",
      localPort: one.socket.localPort!,
    });
    server.reset((visit, request) => sleep(2_500).then(() => echo(visit, request, 0)));
    await new Promise((resolve) => other.on("connect", resolve));
    const socket = await dial(port!, { socket: other });
    assert.match(await ask(socket), /^HTTP\/1\.1 200 /, "the second one has done its handshake");
    assert.ok(one.closedAt - one.openedAt > 900, "the first one has not");
    socket.destroy();
  }));

for (const limit of ["connections", "client_connections"]) {
  test(`limits.${limit} is asked before a handshake, and counts those that are in one`, () =>
    running({ limits: { [limit]: 2 } }, async (_, __, [port]) => {
      const first = await dial(port!);
      assert.match(await ask(first), /^HTTP\/1\.1 200 /);
      const silent = connectRaw(port!);
      await until("it is connected", () => !silent.socket.connecting);
      const beyond = connectRaw(port!);
      beyond.socket.write(helloOf({ version: "0303" }));
      await until("it is turned away", () => beyond.closedAt);
      assert.equal(beyond.got.length, 0, "without a word");
      await assert.rejects(dial(port!));
      assert.match(await ask(first), /^HTTP\/1\.1 200 /);
      silent.socket.destroy();
      let next: TLSSocket | undefined;
      for (let tries = 0; !next && tries < 100; tries++) {
        next = await dial(port!).catch(() => sleep(20) as Promise<undefined>);
      }
      assert.match(await ask(next!), /^HTTP\/1\.1 200 /);
      for (const socket of [first, next!]) socket.destroy();
    }));
}

// ─── Which certificates ───

test("certificates that change on disk are shown from then on; open connections and requests stay", () =>
  running({}, async (lb, server, [port]) => {
    const write = (cert: string, key: string) => {
      writeFileSync(join(dirname(lb.file), "a.pem"), cert);
      writeFileSync(join(dirname(lb.file), "a.key"), key);
    };
    const waiting = await dial(port!), busy = await dial(port!);
    assert.match(await ask(waiting), /^HTTP\/1\.1 200/);
    let answer = () => {};
    server.reset((visit, request) =>
      new Promise<void>((resolve) => answer = () => resolve(echo(visit, request, 0) as undefined))
    );
    const late = ask(busy);
    await until("a request is on its way", () => server.requests.length === 1);
    assert.equal(await shownTo(port!, "a.test"), "a");
    write(RENEWED, OTHER_KEY);
    await until("it says so", () => /https:\/\/127\.0\.0\.1:\d+: other certificates are in force/.test(lb.output()));
    assert.equal(await shownTo(port!, "a.test"), "renewed");
    answer();
    assert.match(await late, /^HTTP\/1\.1 200/);
    server.reset(echo);
    assert.match(await ask(waiting), /^HTTP\/1\.1 200/);
    write(A, OTHER_KEY);
    await until(
      "it refuses them",
      () => /the old certificates stay in force: .*a\.key is not the key of .*a\.pem/.test(lb.output()),
    );
    assert.equal(await shownTo(port!, "a.test"), "renewed");
    rmSync(join(dirname(lb.file), "a.pem"));
    await until("it refuses that too", () => /stay in force: .*a\.pem cannot be read/.test(lb.output()));
    assert.equal(await shownTo(port!, "a.test"), "renewed");
    write(A, KEY);
    await until("they are good again", () => lb.output().split("other certificates are in force").length === 3);
    assert.equal(await shownTo(port!, "a.test"), "a");
    for (const socket of [waiting, busy]) socket.destroy();
  }));

test("certificates are swapped on the listener that is there: nobody who connects meanwhile notices", () =>
  running({}, async (lb, server, [port]) => {
    const [listener, ...others] = listenersOf(port!);
    assert.ok(listener && others.length === 0);
    const between = connectRaw(port!); // has connected, and not begun its handshake
    await until("it is connected", () => !between.socket.connecting);
    const early = await dial(port!);
    const names = new Set<string>();
    let over = false, count = 0;
    const coming = Promise.all([0, 1, 2].map(async () => {
      for (; !over; count++) {
        const socket = await dial(port!); // throws where it is refused or reset
        names.add(String(socket.getPeerCertificate().subject.CN));
        assert.match(await ask(socket), /^HTTP\/1\.1 200 /);
        socket.destroy();
      }
    }));
    for (const [i, [cert, key]] of [[RENEWED, OTHER_KEY], [A, KEY], [RENEWED, OTHER_KEY]].entries()) {
      writeFileSync(join(dirname(lb.file), "a.pem"), cert!);
      writeFileSync(join(dirname(lb.file), "a.key"), key!);
      await until("they are in force", () => lb.output().split("other certificates are in force").length === i + 2);
      const before = count;
      await until("some have come since", () => count > before + 6);
    }
    over = true;
    await coming;
    assert.deepEqual([...names].sort(), ["a", "renewed"]);
    assert.deepEqual(listenersOf(port!), [listener], "the same socket listens, and no other one");
    assert.deepEqual(portsOf(lb), [port]);
    assert.match(await ask(early), /^HTTP\/1\.1 200 /);
    const late = await dial(port!, { socket: between.socket });
    assert.match(await ask(late), /^HTTP\/1\.1 200 /);
    for (const socket of [early, late]) socket.destroy();
    assert.equal(server.requests.length, count + 2);
  }));

test("a reload opens and closes listeners, also between http and https, and takes other certificates", () =>
  running({ listen: [LOCAL] }, async (lb, server, [plain]) => {
    const rest = { default: { servers: [server.address], health: "off" } };
    const at = `127.0.0.1:${plain}`;
    await lb.reload({ ...rest, listen: [LOCAL, { address: LOCAL, tls: FIRST }] });
    const ports = await until("the second is open", () => portsOf(lb).length === 2 && portsOf(lb));
    assert.equal(await shownTo(ports[1]!, "b.test"), "a");
    assert.equal((await fetch(`http://${at}/`)).status, 200);
    await lb.reload({ ...rest, listen: [LOCAL, { address: LOCAL, tls: SECOND }] });
    await until("it has them", () => lb.output().includes("other certificates are in force"));
    assert.equal(await shownTo(ports[1]!, "b.test"), "b");
    await lb.reload({ ...rest, listen: [LOCAL, { address: LOCAL, tls: { cert: "nowhere.pem", key: "b.key" } }] });
    await until(
      "it says what is wrong",
      () => /old certificates stay in force: .*nowhere\.pem cannot be read/.test(lb.output()),
    );
    assert.equal(await shownTo(ports[1]!, "b.test"), "b");
    await lb.reload({ ...rest, listen: [LOCAL, { address: LOCAL, tls: FIRST, client_ca: "ca.pem" }] });
    await until("it asks for certificates", () => lb.output().split("other certificates are in force").length === 3);
    assert.equal(await answeredTo(ports[1]!, {}), "");
    assert.match(await answeredTo(ports[1]!, { cert: CLIENT, key: OTHER_KEY }), /^HTTP\/1\.1 200 /);
    await lb.reload({ ...rest, listen: [LOCAL] });
    await until("it is closed", () => {
      const socket = connect(ports[1]!, "127.0.0.1");
      socket.on("connect", () => socket.destroy());
      socket.on("error", () => refused = true);
      return refused;
    });
    assert.equal((await fetch(`http://${at}/`)).status, 200);
  }));
let refused = false;

test("an address turns from http to https and back at a reload; connections that are open stay as they are", async () => {
  const port = await freePort(), address = `127.0.0.1:${port}`;
  await running({ listen: address }, async (lb, server) => {
    const rest = { default: { servers: [server.address], health: "off" } };
    const opened = (times: number) =>
      until("it is open", () => portsOf(lb).filter((one) => one === port).length === times, 10_000);
    server.reset((visit, request) => request.start.includes("/held") ? undefined : echo(visit, request, 0));
    const held = connectRaw(port);
    held.socket.write("GET /held HTTP/1.1\r\nHost: a.test\r\n\r\n");
    const visit = await until("the request has come", () => server.visits[0]);
    await until("all of it", () => server.requests.length === 1);
    await lb.reload({ ...rest, listen: { address, tls: FIRST } });
    await opened(2);
    const secure = await dial(port);
    assert.match(await ask(secure), /^HTTP\/1\.1 200 /);
    await visit.send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nheld");
    await until("it is answered", () => held.got.toString().endsWith("held"));
    await lb.reload({ ...rest, listen: address });
    await opened(3);
    assert.equal((await fetch(`http://${address}/`)).status, 200);
    for (const socket of [secure, held.socket]) socket.destroy();
  });
});

test(
  "a client has to show a certificate that client_ca has signed",
  () =>
    running({ listen: { address: LOCAL, tls: [FIRST, SECOND], client_ca: "ca.pem" } }, async (_, server, [port]) => {
      for (const name of ["a.test", "b.test"]) {
        const socket = await dial(port!, { servername: name, cert: CLIENT, key: OTHER_KEY });
        assert.match(await ask(socket), /^HTTP\/1\.1 200/);
        socket.destroy();
        for (const own of [{}, { cert: STRANGER, key: KEY }, { cert: EXPIRED, key: KEY }]) {
          assert.equal(await answeredTo(port!, { servername: name, ...own }), "");
        }
      }
      assert.equal(server.requests.length, 2);
    }),
);

test("a session gets nobody around client_ca: neither one of another listener nor one from before a change", {
  needs: ["openssl"],
}, () => {
  const open = { address: LOCAL, tls: FIRST }, strange = { ...open, client_ca: "stranger.pem" };
  const closed = { ...open, client_ca: "ca.pem" }, listen = [open, strange, closed];
  return running({ listen }, async (lb, server, ports) => {
    /** Whether there is an answer for a client that keeps its session in a file, or has it from there. */
    const isAnswered = async (port: number, args: string[]) => {
      const all = ["s_client", "-ign_eof", "-connect", `127.0.0.1:${port}`, "-servername", "a.test", ...args];
      return / 200 OK\r\n/.test(await openssl(lb, all, "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n"));
    };
    const stranger = ["-cert", "@stranger.pem", "-key", "@stranger.key"];
    for (const version of ["-tls1_2", "-tls1_3"]) {
      const kept = [version, "-sess_out", `@${version}`], resumed = [version, "-sess_in", `@${version}`];
      assert.ok(await isAnswered(ports[0]!, kept));
      assert.ok(!await isAnswered(ports[1]!, resumed), "it has shown no certificate");
      assert.ok(!await isAnswered(ports[2]!, resumed));
      assert.ok(await isAnswered(ports[1]!, [...kept, ...stranger]));
      assert.ok(await isAnswered(ports[1]!, resumed), "it has shown one");
      assert.ok(!await isAnswered(ports[2]!, [...resumed, ...stranger]), "it has shown one that is no good here");
    }
    const rest = { default: { servers: [server.address], health: "off" } };
    await lb.reload({ ...rest, listen: [open, { ...closed, tls: [FIRST, SECOND] }, closed] });
    await until("they are in force", () => lb.output().includes("other certificates are in force"));
    for (const version of ["-tls1_2", "-tls1_3"]) {
      assert.ok(!await isAnswered(ports[1]!, [version, "-sess_in", `@${version}`, ...stranger]), "it was good before");
    }
  });
});

// ─── Other connections ───

/** Sends everything back once it has it all. */
function echoAll(socket: Socket): void {
  const got: Buffer[] = [];
  socket.on("data", (bytes) => got.push(bytes));
  socket.on("end", () => socket.end(Buffer.concat(got)));
}

/** The program with a TCP service over TLS, while `use` lasts. */
async function runningTcp(
  front: Record<string, unknown>,
  use: (port: number, lb: Program) => Promise<void>,
  talk: (socket: Socket) => void = echoAll,
  { limits = {}, ...more }: Record<string, unknown> = {},
) {
  const server = createServer({ allowHalfOpen: true }, (socket) => {
    socket.on("error", () => {});
    talk(socket);
  });
  await listenLocally(server);
  const servers = [`127.0.0.1:${(server.address() as AddressInfo).port}`];
  const listen = { address: `127.0.0.1:${await freePort()}`, tls: FIRST, ...front };
  await sharing({ limits, tcp: [{ listen, servers, ...more }] }, async (lb) => {
    const port = () => Number(/listening on tls:\/\/\S+:(\d+)$/m.exec(lb.output())?.[1]);
    await use(await until("it is open", port), lb);
  }).finally(() => server.close());
}

test(
  "connections that are not HTTP come over TLS too, by name, with half-close, and with other certificates",
  () =>
    runningTcp({ tls: [FIRST, SECOND] }, async (port, lb) => {
      for (const [name, shown] of [["a.test", "a"], ["x.b.test", "b"], ["other", "a"]] as const) {
        const socket = await dial(port, { servername: name, allowHalfOpen: true } as ConnectionOptions);
        assert.equal(socket.getPeerCertificate().subject.CN, shown);
        const got: Buffer[] = [], sent = randomBytes(1_000_000);
        socket.on("data", (bytes) => got.push(bytes));
        socket.end(sent);
        await until("all of it comes back", () => Buffer.concat(got).equals(sent));
        socket.destroy();
      }
      writeFileSync(join(dirname(lb.file), "a.pem"), RENEWED);
      writeFileSync(join(dirname(lb.file), "a.key"), OTHER_KEY);
      await until("it says so", () => /tls:\/\/127\.0\.0\.1:\d+: other certificates are in force/.test(lb.output()));
      assert.equal(await shownTo(port, "a.test"), "renewed");
    }),
);

test("a connection that is not HTTP and breaks off never looks like one that has ended over TLS", {
  needs: ["openssl"],
}, () => {
  const talk = (socket: Socket) =>
    socket.once("data", (bytes) => {
      socket.write("half");
      setTimeout(() => bytes.toString() === "cut" ? socket.resetAndDestroy() : socket.end(), 100);
    });
  return runningTcp({}, async (port, lb) => {
    for (const [bytes, ends] of [["cut", 0], ["whole", 1]] as const) {
      const args = ["s_client", "-ign_eof", "-quiet", "-msg", "-connect", `127.0.0.1:${port}`];
      const said = await openssl(lb, args, bytes);
      assert.match(said, /half/);
      assert.equal(said.match(/<<< .*\bclose_notify$/gm)?.length ?? 0, ends, `the end of ${bytes} is told`);
    }
  }, talk);
});

test("the PROXY protocol tells the server who is connected over TLS", () => {
  let seen = "";
  const talk = (socket: Socket) =>
    socket.once("data", (bytes: Buffer) => {
      seen = bytes.toString("hex");
      socket.end();
    });
  return runningTcp(
    {},
    async (port) => {
      const socket = await dial(port), own = socket.localPort!;
      socket.write("hello");
      await until("the server has seen it", () => seen);
      const ports = [own, port].map((one) => one.toString(16).padStart(4, "0")).join("");
      assert.equal(seen.slice(0, 56), `0d0a0d0a000d0a515549540a2111000c7f0000017f000001${ports}`);
      socket.destroy();
    },
    talk,
    { proxy_protocol: true },
  );
});

test("limits hold for handshakes of connections that are not HTTP", () =>
  runningTcp(
    {},
    async (port) => {
      const silent = [connectRaw(port), connectRaw(port)];
      for (const { socket } of silent) await until("it is connected", () => !socket.connecting);
      const beyond = connectRaw(port);
      beyond.socket.write(helloOf({ version: "0303" }));
      await until("it is turned away", () => beyond.closedAt);
      assert.equal(beyond.got.length, 0);
      for (const one of silent) {
        await until("it is cut", () => one.closedAt);
        assert.ok(one.closedAt - one.openedAt > 900);
      }
      const socket = await dial(port, { allowHalfOpen: true } as ConnectionOptions), got: Buffer[] = [];
      socket.on("data", (bytes) => got.push(bytes));
      await sleep(2_000);
      socket.end("not cut");
      await until("it comes back", () => Buffer.concat(got).toString() === "not cut");
      socket.destroy();
    },
    echoAll,
    { limits: { connections: 2, header: "1s" } },
  ));

test("client_ca holds for connections that are not HTTP", () =>
  runningTcp({ client_ca: "ca.pem" }, async (port) => {
    /** What comes back to a client with this certificate. */
    const echoed = async (own: ConnectionOptions) => {
      const socket = connectTls({ port, host: "127.0.0.1", ca: CA, servername: "a.test", ...own });
      const got: Buffer[] = [];
      let over = false;
      for (const event of ["close", "end", "error"]) socket.on(event, () => over = true);
      socket.on("data", (bytes) => got.push(bytes));
      socket.on("secureConnect", () => socket.end("hello"));
      await until("the connection is over", () => over);
      socket.destroy();
      return Buffer.concat(got).toString();
    };
    assert.equal(await echoed({ cert: CLIENT, key: OTHER_KEY }), "hello");
    for (const own of [{}, { cert: STRANGER, key: KEY }, { cert: EXPIRED, key: KEY }]) {
      assert.equal(await echoed(own), "");
    }
  }));

// ─── What cannot be ───

const start = (config: Record<string, unknown>, files = FILES as Record<string, string>) =>
  startProgram({ default: { servers: ["a:1"], health: "off" }, ...config }, [], files);

/** What --check says of a file, and its exit status. */
async function checked(config: unknown, files: Record<string, string>): Promise<{ code: unknown; said: string }> {
  const folder = mkdtempSync(join(tmpdir(), "lb-"));
  for (const [name, text] of Object.entries(files)) writeFileSync(join(folder, name), text);
  writeFileSync(join(folder, "routes.yml"), JSON.stringify(config));
  const entry = fileURLToPath(new URL("../../lb.ts", import.meta.url));
  const args = [...runtime() === "deno" ? ["run", "-A"] : [], entry, "--check", join(folder, "routes.yml")];
  return await new Promise((resolve) =>
    execFile(process.execPath, args, { cwd: dirname(entry) }, (error, out, err) => {
      rmSync(folder, { recursive: true });
      resolve({ code: error?.code ?? 0, said: out + err });
    })
  );
}

type Pair = { cert: string; key: string };
const UNUSABLE: [what: string, files: Record<string, string>, reason: RegExp, tls?: Pair[]][] = [
  ["a certificate that is missing", { "a.key": KEY }, /a\.pem cannot be read: /],
  ["a key that is missing", { "a.pem": A }, /a\.key cannot be read: /],
  ["a file that holds no certificate", { "a.pem": "hello", "a.key": KEY }, /a\.pem holds no certificate \(PEM\)/],
  [
    "a certificate and a key in each other's place",
    { "a.pem": KEY, "a.key": A },
    /a\.pem holds no certificate \(PEM\)/,
  ],
  ["a file that holds no key", { "a.pem": A, "a.key": A }, /a\.key holds no private key without a password \(PEM\)/],
  ["a key of another certificate", { "a.pem": A, "a.key": OTHER_KEY }, /a\.key is not the key of \S*a\.pem/],
  ["a bad one behind a good one", { ...FILES, "b.key": KEY }, /b\.key is not the key of \S*b\.pem/, [FIRST, SECOND]],
];
/** All of them in one file, each in front of a listener of its own. */
let checkedOnce: ReturnType<typeof checked> | undefined;
function checkAll() {
  const files = UNUSABLE.flatMap(([, files], i) => Object.entries(files).map(([name, text]) => [`${i}-${name}`, text]));
  const listen = UNUSABLE.map(([, , , tls = [FIRST]], i) => ({
    address: `127.0.0.1:${i + 1}`,
    tls: tls.map(({ cert, key }) => ({ cert: `${i}-${cert}`, key: `${i}-${key}` })),
  }));
  return checked({ listen, default: { servers: ["a:1"] } }, Object.fromEntries(files));
}

for (const [i, [what, files, reason, tls = FIRST]] of UNUSABLE.entries()) {
  test(`${what} ends the program with its file and reason, and --check tells it too`, async () => {
    await assert.rejects(
      start({ listen: { address: LOCAL, tls } }, files),
      new RegExp(`cannot listen on 127\\.0\\.0\\.1:0: \\S*${reason.source}`),
    );
    const { code, said } = await (checkedOnce ??= checkAll());
    assert.equal(code, 1);
    assert.match(said, new RegExp(`routes\\.yml: listen\\[${i}\\]: \\S*${reason.source}`));
  });
}

test("an expired certificate is shown all the same, and reported; --check counts it as a mistake", async () => {
  const files = { "a.pem": EXPIRED, "a.key": KEY };
  await running({}, async (lb, _, [port]) => {
    const socket = await dial(port!, { rejectUnauthorized: false });
    assert.match(await ask(socket), /^HTTP\/1\.1 200/);
    socket.destroy();
    assert.match(lb.output(), /error: listen\[0\]: \S*a\.pem has expired on 2021-01-01\n/);
  }, { files });
  const { code, said } = await checked({ listen: { address: 1, tls: FIRST }, default: { servers: ["a:1"] } }, files);
  assert.equal(code, 1);
  assert.match(said, /listen\[0\]: \S*a\.pem has expired on 2021-01-01/);
});

test("--check reads the files of servers too, beside routes.yml", async () => {
  const tls = { ca: "ca.pem", ...FIRST }, services = { one: { servers: ["https://a"], tls } };
  assert.equal((await checked({ services, default: { service: "one" } }, FILES)).code, 0);
  const { code, said } = await checked({ services, default: { service: "one" } }, { ...FILES, "ca.pem": "" });
  assert.equal(code, 1);
  assert.match(said, /one: tls: \S*ca\.pem holds no certificate/);
});

// ─── From http to https ───

test("routes for a scheme are asked before all others: http goes to https, but for what has to be there", () =>
  running({
    listen: [LOCAL, { address: LOCAL, tls: FIRST }],
    hosts: [{ host: "a.test", service: "shop" }],
    paths: [{ path: "/api", service: "shop" }],
    services: { shop: { servers: ["localhost:1"], health: "off" } },
    routes: [
      { scheme: "http", redirect: { scheme: "https", status: 308 } },
      { scheme: "http", path: "/.well-known/acme-challenge", respond: { body: "challenge" } },
      { scheme: "https", host: "a.test", path: "/only", respond: { body: "secure" } },
      {
        host: "a.test",
        path: "/hello",
        respond: { body: "hello" },
        response: { headers: { set: { "strict-transport-security": "max-age=31536000" } } },
      },
    ],
    default: { respond: { status: 404 } },
  }, async (_, __, [plain, secure]) => {
    const get = async (path: string) => {
      const response = await fetch(`http://localhost:${plain}${path}`, { redirect: "manual" });
      return `${response.status} ${response.headers.get("location") ?? await response.text()}`;
    };
    assert.equal(await get("/api/x?y"), "308 https://localhost/api/x?y");
    assert.equal(await get("/hello"), "308 https://localhost/hello");
    assert.equal(await get("/.well-known/acme-challenge/x"), "200 challenge");
    const socket = await dial(secure!);
    assert.match(
      await ask(socket, "/hello"),
      /^HTTP\/1\.1 200 [^]*strict-transport-security: max-age=31536000[^]*hello$/i,
    );
    assert.match(await ask(socket, "/only"), /secure$/);
    assert.match(await ask(socket, "/.well-known/acme-challenge/x"), /^HTTP\/1\.1 502/);
    socket.destroy();
  }));

test("names of files are relative to routes.yml, unless they begin at the root", () => {
  const text = JSON.stringify({
    listen: [81, { address: "[::1]:82", tls: [FIRST, { cert: "/c/a", key: "C:\\k" }], client_ca: "../x" }],
    services: { s: { servers: ["https://a"], tls: { ca: "ca.pem", cert: "/c", key: "k/k" } } },
    default: { service: "s" },
  });
  const { listen, services } = parseConfig(text, { file: "/etc/lb/routes.yml" });
  assert.deepEqual(listen, [
    { host: "", port: 81, tls: [], client_ca: "", h2c: false },
    {
      ...{ host: "[::1]", port: 82, client_ca: "/etc/lb/../x", h2c: false },
      tls: [{ cert: "/etc/lb/a.pem", key: "/etc/lb/a.key" }, { cert: "/c/a", key: "C:\\k" }],
    },
  ]);
  const { ca, cert, key } = services.get("s")!.tls;
  assert.deepEqual([ca, cert, key], ["/etc/lb/ca.pem", "/c", "/etc/lb/k/k"]);
  assert.equal(parseConfig(text).listen[1]!.tls[0]!.cert, "a.pem");
  return Promise.resolve();
});

// ─── TLS to servers ───

/** A server over TLS, for a.test and 127.0.0.1: its answer is the name that it was asked for. */
async function secured(options: TlsOptions = {}) {
  const server = createTlsServer({ cert: A, key: KEY, ALPNProtocols: ["http/1.1"], ...options }, (socket) => {
    const body = String((socket as TLSSocket & { servername?: string | false }).servername || "none");
    socket.on("error", () => {});
    socket.on("data", () => socket.write(`HTTP/1.1 200 OK\r\nContent-Length: ${body.length}\r\n\r\n${body}`));
  });
  server.on("tlsClientError", () => {});
  await listenLocally(server);
  const url = `https://127.0.0.1:${(server.address() as AddressInfo).port}`;
  return { url, close: () => new Promise((resolve) => server.close(resolve)) };
}

/** What each of these `tls` of a service makes of the same server: its answer, or why there is none. */
async function through(url: string, kinds: Record<string, object>): Promise<Record<string, string>> {
  const services = Object.fromEntries(
    Object.entries(kinds).map(([name, tls]) => [name, { servers: [url], health: "off", eject: "off", tls }]),
  );
  const found: Record<string, string> = {};
  await sharing({ name_routes: true, services }, async (_, [port]) => {
    for (const name of Object.keys(kinds)) {
      const answer = await fetch(`http://127.0.0.1:${port}/${name}/`), text = await answer.text();
      found[name] = answer.status === 200 ? text : `${answer.status} ${answer.headers.get("x-lb-failure")}`;
    }
  });
  return found;
}

test("a server over TLS is asked only where its certificate is trusted and names it, unless any will do", async () => {
  const server = await secured();
  const found = await through(server.url, {
    trusted: { ca: "ca.pem" },
    named: { ca: "ca.pem", servername: "a.test" },
    misnamed: { ca: "ca.pem", servername: "x.test" },
    unknown: {},
    insecure: { insecure: true },
  });
  await server.close();
  assert.deepEqual(found, {
    trusted: "none",
    named: "a.test",
    misnamed: "502 connect",
    unknown: "502 connect",
    insecure: "none",
  });
});

test("a server that asks for a certificate is shown that of its service", async () => {
  const server = await secured({ requestCert: true, rejectUnauthorized: true, ca: CA });
  const shown = { ca: "ca.pem", cert: "client.pem", key: "client.key" };
  const together = { ca: "ca.pem", cert: "both.pem", key: "both.pem" };
  const found = await through(server.url, { shown, together, bare: { ca: "ca.pem" } });
  await server.close();
  assert.deepEqual([found.shown, found.together], ["none", "none"]);
  assert.match(found.bare!, /^502 (connect|reset)$/);
});

test(
  "a slow reader stops a fast writer over TLS to servers, both ways, and loses nothing",
  { needs: ["openssl"] },
  async () => {
    let sent = () => 0, asked = "";
    const fast = createTlsServer({ cert: A, key: KEY }, (socket) => {
      socket.on("error", () => {});
      socket.once("data", () => {
        socket.write(`HTTP/1.1 200 OK\r\nContent-Length: ${FLOOD}\r\nConnection: close\r\n\r\n`);
        sent = flood(socket);
      });
    });
    await listenLocally(fast);
    const port = await freePort(), tls = { ca: "ca.pem" };
    const routes = [["/down", (fast.address() as AddressInfo).port], ["/up", port]].map(([path, port]) => ({
      ...{ path, servers: [`https://127.0.0.1:${port}`], tls, health: "off" },
    }));
    const lb = await startProgram({ routes }, ["--drain", "0s"], FILES), folder = dirname(lb.file);
    // a process of its own, to be stopped: a paused socket of Deno goes on reading over TLS
    const args = ["s_server", "-quiet", "-accept", `127.0.0.1:${port}`, "-cert", "a.pem", "-key", "a.key"];
    const slow = spawn("openssl", args, { cwd: folder, stdio: ["pipe", "pipe", "ignore"] });
    let taken = 0;
    slow.stdout.on("data", (bytes: Buffer) => {
      asked ||= bytes.toString("latin1");
      taken += bytes.length;
    });
    try {
      const client = connectRaw(lb.port);
      client.socket.write("GET /down HTTP/1.1\r\nHost: a.test\r\n\r\n");
      await until("the answer has begun", () => client.got.includes("\r\n\r\n"));
      client.socket.pause();
      await stalls(sent);
      let length = client.got.length - client.got.indexOf("\r\n\r\n") - 4;
      client.socket.removeAllListeners("data").on("data", (bytes: Buffer) => length += bytes.length).resume();
      await until("all of it has come", () => length === FLOOD, 30_000);
      client.socket.destroy();

      const uploader = connectRaw(lb.port);
      uploader.socket.write(`POST /up HTTP/1.1\r\nHost: a.test\r\nContent-Length: ${FLOOD + 1}\r\n\r\nx`);
      await until("the request has come", () => asked.startsWith("POST /up "));
      process.kill(slow.pid!, "SIGSTOP");
      const uploaded = flood(uploader.socket);
      await stalls(uploaded);
      process.kill(slow.pid!, "SIGCONT");
      await until("all of it is there", () => taken > FLOOD, 30_000); // with its head
      slow.stdin.write("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
      await until("it is answered", () => uploader.got.toString().endsWith("ok"));
      uploader.socket.destroy();
    } finally {
      slow.kill("SIGKILL");
      await lb.stop();
      fast.close();
    }
  },
);
