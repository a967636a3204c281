// TLS in front: the running program, and clients that speak TLS to it. Certificates stand in certificates.ts.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { execFile } from "node:child_process";
import { randomBytes } from "node:crypto";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { type ClientHttp2Session, connect as connectHttp2 } from "node:http2";
import { type AddressInfo, connect, createServer } from "node:net";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import process from "node:process";
import nodeTest from "node:test";
import {
  connect as connectTls,
  type ConnectionOptions,
  createServer as createTlsServer,
  type TlsOptions,
  type TLSSocket,
} from "node:tls";
import { fileURLToPath } from "node:url";
import { parseConfig } from "../lb.ts";
import { A, B, CA, CLIENT, EXPIRED, KEY, NAMED, OTHER_KEY, RENEWED, STRANGER } from "./certificates.ts";
import { echoStrictly, openWebSocket, TEXT, webSocketServer } from "./frames.ts";
import {
  type Echo,
  echo,
  type Program,
  runtime,
  type Script,
  type ScriptedServer,
  scriptedServer,
  sleep,
  startProgram,
  until,
} from "./rig.ts";

// bun test gives a test five seconds unless it says otherwise
const test = (name: string, body: () => Promise<void>, skip = false) => nodeTest(name, { timeout: 60_000, skip }, body);
const HTTP2 = runtime() !== "bun"; // Bun.serve has none
const FULL = runtime() !== "deno";

const FILES = { "a.pem": A, "a.key": KEY, "b.pem": B, "b.key": OTHER_KEY, "ca.pem": CA };
const FIRST = { cert: "a.pem", key: "a.key" }, SECOND = { cert: "b.pem", key: "b.key" };
const LOCAL = "127.0.0.1:0";

// ─── Clients ───

const portsOf = (lb: Program) =>
  [...lb.output().matchAll(/listening on https?:\/\/\S+:(\d+)$/gm)].map(([, port]) => Number(port));

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

/** Whom the certificate names that a client is shown. While a listener is replaced a connection may be reset (README). */
async function shownTo(port: number, servername: string): Promise<string> {
  const again = async (error: Error) => {
    if (runtime() === "node") throw error;
    await sleep(100);
    return await dial(port, { servername });
  };
  const socket = await dial(port, { servername }).catch(again).catch(again);
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

const seenIn = (answer: string): Echo => JSON.parse(/\{".*\}/.exec(answer)![0]);
const headersOf = ({ rawHeaders }: Echo): Record<string, string> =>
  Object.fromEntries(rawHeaders.map(([name, value]) => [name.toLowerCase(), value]));

interface Answer {
  headers: Record<string, string | string[] | undefined>;
  status: number;
  body: Buffer;
}

/** One request over HTTP/2. */
function ask2(session: ClientHttp2Session, headers: Record<string, string | string[]> = {}, body?: Buffer) {
  return new Promise<Answer>((resolve, reject) => {
    const stream = session.request(headers[":method"] === "CONNECT" ? headers : { ":path": "/", ...headers }, {
      endStream: body === undefined,
    });
    const answer: Answer = { headers: {}, status: 0, body: Buffer.alloc(0) };
    const got: Buffer[] = [];
    stream.on("response", (headers) => Object.assign(answer, { headers, status: headers[":status"] }));
    stream.on("data", (bytes: Buffer) => got.push(bytes));
    stream.on("end", () => resolve({ ...answer, body: Buffer.concat(got) }));
    stream.on("error", reject);
    if (body) stream.end(body);
  });
}

/** A session over HTTP/2, while `use` lasts. */
async function overHttp2(port: number, use: (session: ClientHttp2Session) => Promise<void>) {
  const session = connectHttp2(`https://localhost:${port}`, { ca: CA });
  session.on("error", () => {});
  try {
    await use(session);
  } finally {
    session.destroy();
  }
}

/** The program over a server that echoes, while `use` lasts. Then it drains. */
async function running(
  config: Record<string, unknown>,
  use: (lb: Program, server: ScriptedServer, ports: number[]) => Promise<void>,
  { files = FILES, script = echo }: { files?: Record<string, string>; script?: Script } = {},
) {
  const server = await scriptedServer(script);
  const whole = {
    listen: { address: LOCAL, tls: FIRST },
    default: { servers: [server.address], health: "off" },
    ...config,
  };
  const lb = await startProgram(whole, ["--drain", "5s"], files);
  try {
    const count = [whole.listen].flat().length;
    await use(lb, server, await until("all are open", () => portsOf(lb).length === count && portsOf(lb)));
    process.kill(lb.pid, "SIGTERM"); // not child.kill: after it Deno reports the signal as the end
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
    { listen: { address: LOCAL, tls: [FIRST, SECOND, { cert: "n.pem", key: "n.key" }] } },
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
    { files: { ...FILES, "n.pem": NAMED, "n.key": KEY } },
  ));

test("what is older than TLS 1.2, or no TLS at all, is refused, and costs nobody else anything", () =>
  running({}, async (_, __, [port]) => {
    const hello = Buffer.concat([
      Buffer.from("010000310302", "hex"), // a client that speaks TLS 1.1 at most
      randomBytes(32),
      Buffer.from("00" + "000a" + "c013c014002f0035000a" + "0100", "hex"),
    ]);
    hello.writeUIntBE(hello.length - 4, 1, 3);
    const record = Buffer.concat([Buffer.from([0x16, 3, 1, hello.length >> 8, hello.length & 255]), hello]);
    for (
      const [bytes, answer] of [[record, /^1503..000202(46|28)$/], ["GET / HTTP/1.1\r\nHost: a\r\n\r\n", /.*/]] as const
    ) {
      const socket = connect(port!, "127.0.0.1");
      const got: Buffer[] = [];
      socket.on("data", (bytes) => got.push(bytes));
      socket.on("error", () => {});
      socket.write(bytes);
      await until("the connection is closed", () => socket.destroyed || socket.readableEnded);
      assert.match(Buffer.concat(got).toString("hex"), answer);
      socket.destroy();
    }
    const socket = await dial(port!);
    assert.match(await ask(socket), /^HTTP\/1\.1 200/);
    socket.destroy();
  }));

test("HTTP/2: a tunnel is refused", () =>
  running({}, (_, server, [port]) =>
    overHttp2(port!, async (session) => {
      const { status, headers } = await ask2(session, { ":method": "CONNECT", ":authority": "b.test:443" });
      assert.deepEqual([status, headers["x-lb-failure"]], [405, "bad-method"]);
      assert.equal(server.requests.length, 0);
    })), !HTTP2);

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

// ─── HTTP/2 ───

test(
  "HTTP/2: :authority is Host, no pseudo-header passes, cookies come as one, names are in lower case",
  () =>
    running({}, (_, server, [port]) =>
      overHttp2(port!, async (session) => {
        const { status, headers, body } = await ask2(session, {
          ...{ ":path": "/x?y", ":authority": "b.test:8443", "x-up": "1", "te": "trailers" },
          cookie: ["a=1", "b=2"],
        });
        assert.equal(status, 200);
        assert.equal(headers["content-type"], "application/json");
        const seen: Echo = JSON.parse(body.toString()), named = headersOf(seen);
        assert.equal(seen.url, "/x?y");
        assert.deepEqual([named.host, named["x-forwarded-host"], named["x-up"]], ["b.test:8443", "b.test:8443", "1"]);
        assert.deepEqual([named["x-forwarded-proto"], named.cookie, named.te], ["https", "a=1; b=2", undefined]);
        assert.equal(seen.rawHeaders.filter(([name]) => /^:|^host$|^cookie$/i.test(name)).length, 2);
        assert.equal(server.requests.length, 1);
      })),
  !HTTP2,
);

test(
  "HTTP/2: bodies pass both ways, many at once, whole",
  () =>
    running({}, (_, __, [port]) =>
      overHttp2(port!, async (session) => {
        const bodies = Array.from({ length: 20 }, (_, i) => randomBytes(i * 17_000));
        const answers = await Promise.all(bodies.map((body) => ask2(session, { ":method": "POST" }, body)));
        const lengths = answers.map(({ body }) => (JSON.parse(body.toString()) as Echo).bodyLength);
        assert.deepEqual(lengths, bodies.map(({ length }) => length));
      })),
  !HTTP2,
);

test("HTTP/2: what belongs to a connection of HTTP/1.1 is not in the answers, neither the server's nor our own", () => {
  const connected =
    "Connection: keep-alive, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\nTransfer-Encoding: chunked\r\n";
  const named = "X-Name: caf\xe9\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n";
  const script: Script = (visit) =>
    visit.send(`HTTP/1.1 200 OK\r\n${named}${connected}\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n`);
  const asked = [[200, {}], [400, { ":path": "/%zz" }], [400, { ":authority": "a:99999" }], [405, {
    ":method": "TRACE",
  }]];
  return running({}, (_, __, [port]) =>
    overHttp2(port!, async (session) => {
      for (const [expected, headers] of asked as [number, Record<string, string>][]) {
        const { status, headers: given, body } = await ask2(session, headers);
        const names = Object.keys(given).filter((name) => !name.startsWith(":"));
        const mine = /^(connection|keep-alive|transfer-encoding|upgrade|proxy-connection|x-hop|x-t)$/;
        assert.deepEqual(names.filter((name) => mine.test(name) || name !== name.toLowerCase()), []);
        assert.deepEqual([status, given["x-lb-failure"] === undefined], [expected, expected === 200]);
        if (expected !== 200) continue;
        assert.deepEqual([body.toString(), given["set-cookie"]], ["abc", ["a", "b"]]);
        assert.equal(Buffer.from(String(given["x-name"]), "latin1").toString("hex"), "636166e9");
      }
    }), { script });
}, !HTTP2);

test("HTTP/2: a client that gives up one request ends it at the server, and keeps the others", () => {
  const script: Script = (visit, request) => request.start.includes("/slow") ? undefined : echo(visit, request, 0);
  return running({}, (_, server, [port]) =>
    overHttp2(port!, async (session) => {
      const stream = session.request({ ":path": "/slow" });
      stream.on("error", () => {});
      const visit = await until("it has come to the server", () => server.requests.length === 1 && server.visits[0]);
      stream.close(8);
      await until("it is over there", () => visit.over);
      assert.equal((await ask2(session)).status, 200);
    }), { script });
}, !HTTP2);

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
    await until("it says so", () => /https:\/\/127.0.0.1:0: other certificates are in force/.test(lb.output()));
    assert.equal(await shownTo(port!, "a.test"), "renewed");
    answer();
    assert.match(await late, /^HTTP\/1\.1 200/);
    server.reset(echo);
    if (runtime() === "node") assert.match(await ask(waiting), /^HTTP\/1\.1 200/); // Deno and Bun close what is idle
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

test(
  "a client has to show a certificate that client_ca has signed",
  () =>
    running({ listen: { address: LOCAL, tls: [FIRST, SECOND], client_ca: "ca.pem" } }, async (_, server, [port]) => {
      for (const name of ["a.test", "b.test"]) {
        const socket = await dial(port!, { servername: name, cert: CLIENT, key: OTHER_KEY });
        assert.match(await ask(socket), /^HTTP\/1\.1 200/);
        socket.destroy();
        for (const own of [{}, { cert: STRANGER, key: KEY }, { cert: EXPIRED, key: KEY }]) {
          const answer = await dial(port!, { servername: name, ...own }).then((socket) => {
            socket.removeAllListeners("error").on("error", () => {});
            return ask(socket);
          }).catch(() => "");
          assert.equal(answer, "");
        }
      }
      assert.equal(server.requests.length, 2);
    }),
  !FULL,
);

// ─── Other connections ───

/** The program with a TCP service that echoes, over TLS, while `use` lasts. */
async function runningTcp(
  front: Record<string, unknown>,
  use: (port: number, lb: Program) => Promise<void>,
  args: string[] = [],
) {
  const server = createServer({ allowHalfOpen: true }, (socket) => {
    const got: Buffer[] = [];
    socket.on("data", (bytes) => got.push(bytes));
    socket.on("end", () => socket.end(Buffer.concat(got)));
    socket.on("error", () => {});
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const servers = [`127.0.0.1:${(server.address() as AddressInfo).port}`];
  const lb = await startProgram({ tcp: [{ listen: { address: LOCAL, tls: FIRST, ...front }, servers }] }, args, FILES);
  try {
    const port = () => Number(/listening on tls:\/\/\S+:(\d+)$/m.exec(lb.output())?.[1]);
    await use(await until("it is open", port), lb);
  } finally {
    await lb.stop();
    server.close();
  }
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
      await until("it says so", () => lb.output().includes("tls://127.0.0.1:0: other certificates are in force"));
      assert.equal(await shownTo(port, "a.test"), "renewed");
    }),
  !FULL,
);

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
  }), !FULL);

// ─── What cannot be ───

const start = (config: Record<string, unknown>, files = FILES as Record<string, string>) =>
  startProgram({ default: { servers: ["a:1"], health: "off" }, ...config }, [], files);

/** What --check says of a file, and its exit status. */
async function checked(config: unknown, files: Record<string, string>): Promise<{ code: unknown; said: string }> {
  const folder = mkdtempSync(join(tmpdir(), "lb-"));
  for (const [name, text] of Object.entries(files)) writeFileSync(join(folder, name), text);
  writeFileSync(join(folder, "routes.yml"), JSON.stringify(config));
  const entry = fileURLToPath(new URL("../lb.ts", import.meta.url));
  const args = [...runtime() === "deno" ? ["run", "-A"] : [], entry, "--check", join(folder, "routes.yml")];
  return await new Promise((resolve) =>
    execFile(process.execPath, args, { cwd: dirname(entry) }, (error, out, err) => {
      rmSync(folder, { recursive: true });
      resolve({ code: error?.code ?? 0, said: out + err });
    })
  );
}

for (
  const [what, files, reason, tls = FIRST] of [
    ["a certificate that is missing", { "a.key": KEY }, /a\.pem cannot be read: /],
    ["a key that is missing", { "a.pem": A }, /a\.key cannot be read: /],
    ["a file that holds no certificate", { "a.pem": "hello", "a.key": KEY }, /a\.pem holds no certificate \(PEM\)/],
    ["a file that holds no key", { "a.pem": A, "a.key": A }, /a\.key holds no private key without a password \(PEM\)/],
    ["a key of another certificate", { "a.pem": A, "a.key": OTHER_KEY }, /a\.key is not the key of \S*a\.pem/],
    ["a bad one behind a good one", { ...FILES, "b.key": KEY }, /b\.key is not the key of \S*b\.pem/, [FIRST, SECOND]],
  ] as [string, Record<string, string>, RegExp, unknown][]
) {
  test(`${what} ends the program with its file and reason, and --check tells it too`, async () => {
    const listen = { address: LOCAL, tls };
    await assert.rejects(
      start({ listen }, files),
      new RegExp(`cannot listen on 127\\.0\\.0\\.1:0: \\S*${reason.source}`),
    );
    const { code, said } = await checked({ listen, default: { servers: ["a:1"] } }, files);
    assert.equal(code, 1);
    assert.match(said, new RegExp(`routes\\.yml: listen\\[0\\]: \\S*${reason.source}`));
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

test("client_ca is refused where the runtime cannot ask for certificates", async () => {
  const listen = { address: LOCAL, tls: FIRST, client_ca: "ca.pem" };
  const reason = /client_ca: deno cannot ask clients for a certificate; bun and node can/;
  await assert.rejects(start({ listen }), reason);
  assert.match((await checked({ listen, default: { servers: ["a:1"] } }, FILES)).said, reason);
}, FULL);

test("TLS in front of what is not HTTP is refused where the runtime would lose the end of it", async () => {
  const tcp = [{ listen: { address: LOCAL, tls: FIRST }, servers: ["a:1"] }];
  const reason = /deno loses the end of what it reads over TLS, where that is not HTTP; bun and node do not/;
  await assert.rejects(start({ tcp }), reason);
  assert.match((await checked({ tcp }, FILES)).said, reason);
}, FULL);

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
  const { listen, services } = parseConfig(text, {}, "/etc/lb/routes.yml");
  assert.deepEqual(listen, [
    { host: "", port: 81, tls: [], client_ca: "" },
    {
      ...{ host: "[::1]", port: 82, client_ca: "/etc/lb/../x" },
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
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const url = `https://127.0.0.1:${(server.address() as AddressInfo).port}`;
  return { url, close: () => new Promise((resolve) => server.close(resolve)) };
}

/** What each of these `tls` of a service makes of the same server: its answer, or why there is none. */
async function through(url: string, kinds: Record<string, object>): Promise<Record<string, string>> {
  const services = Object.fromEntries(
    Object.entries(kinds).map(([name, tls]) => [name, { servers: [url], health: "off", eject: "off", tls }]),
  );
  const files = { ...FILES, "client.pem": CLIENT, "client.key": OTHER_KEY };
  const lb = await startProgram({ name_routes: true, services }, [], files);
  const found: Record<string, string> = {};
  try {
    for (const name of Object.keys(kinds)) {
      const answer = await fetch(`http://127.0.0.1:${lb.port}/${name}/`), text = await answer.text();
      found[name] = answer.status === 200 ? text : `${answer.status} ${answer.headers.get("x-lb-failure")}`;
    }
  } finally {
    await lb.stop();
  }
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
  const found = await through(server.url, { shown, bare: { ca: "ca.pem" } });
  await server.close();
  assert.equal(found.shown, "none");
  assert.match(found.bare!, /^502 (connect|reset)$/);
}, !FULL); // Deno's node:tls cannot ask for one
