// The program as people run it: a process on the runtime that runs this test, with its command line, its signals, its
// files and real servers behind it. Nothing here looks at a clock; waiting is for something to happen.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { spawnSync } from "node:child_process";
import { randomBytes } from "node:crypto";
import { chmodSync, existsSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { type AddressInfo, connect, createServer, type Socket } from "node:net";
import { join } from "node:path";
import process from "node:process";
import { brotliCompressSync, gunzipSync, gzipSync, zstdCompressSync } from "node:zlib";
import { parseConfig } from "../../lb.ts";
import { callProgram, ENTRY, inFolder, type Process, RUN, startScript } from "../rig/process.ts";
import {
  answer,
  echoServer,
  freePort,
  get,
  listenLocally,
  makeFolder,
  type Message,
  rawRequest,
  runtime,
  type Script,
  type ScriptedServer,
  scriptedServer,
  sharedProgram,
  sleep,
  status,
  target,
  test,
  until,
  value,
  values,
  type Visit,
} from "../rig/rig.ts";

// ─── Processes ───

interface Running extends Process {
  ports: number[];
  port: number;
  file: string;
  write(config: unknown): void;
}

const text = (config: unknown) => typeof config === "string" ? config : JSON.stringify(config, null, 1);
const DRAINED = /\binfo: drained\n$/;
const LOCAL = ["--listen", "127.0.0.1:0"];

/** The program with this file, while `use` lasts. Then it drains, which shows that nothing is left in flight. */
async function running(
  config: unknown,
  use: (lb: Running) => Promise<void>,
  { args = LOCAL, listeners = 1 } = {},
): Promise<void> {
  await inFolder({ "routes.yml": text(config) }, async (folder) => {
    const file = join(folder, "routes.yml");
    const program = startScript(ENTRY, ["--config", file, "--drain", "5s", ...args]);
    const ports = () =>
      [...program.err().matchAll(/listening on http:\/\/\S+:(\d+)$/gm)].map((found) => Number(found[1]));
    try {
      await until("lb.ts listens or ends", () => program.over() || ports().length === listeners, 30_000);
      assert.ok(!program.over(), `lb.ts ended instead of listening:\n${program.err()}`);
      const write = (next: unknown) => writeFileSync(file, text(next));
      await use({ ...program, ports: ports(), port: ports()[0]!, file, write });
      if (program.over()) return;
      program.signal("SIGTERM");
      await until("lb.ts ends", program.over, 20_000);
      assert.match(program.err(), DRAINED, "requests are left in flight");
      assert.equal(await program.ended, 0);
    } finally {
      if (!program.over()) program.signal("SIGKILL");
      await program.ended;
    }
  });
}

const shared = sharedProgram(["--admin", "127.0.0.1:0"]);

/** What a test sees of the program that most tests share. */
type Shared = Pick<Running, "pid" | "port" | "file" | "err" | "write" | "signal">;

/** The shared program with this config. When `use` is over, nothing may be left in flight. */
async function sharing(config: unknown, use: (lb: Shared) => Promise<void>): Promise<void> {
  const { pid, port, admin, file, errors: err } = await shared.begin(config);
  const write = (next: unknown) => writeFileSync(file, text(next));
  await use({ pid, port, file, err, write, signal: (name) => void process.kill(pid, name) });
  let left = NaN;
  const look = async () => left = (await (await fetch(`http://127.0.0.1:${admin}/connections`)).json()).in_flight;
  for (let tries = 0; await look() !== 0; tries++) {
    assert.ok(tries < 500, `requests are left in flight: ${left}`);
    await sleep(10);
  }
}

/** Servers, while `use` lasts. */
async function serving(scripts: Script[], use: (...servers: ScriptedServer[]) => Promise<void>): Promise<void> {
  const servers = await Promise.all(scripts.map(scriptedServer));
  try {
    await use(...servers);
  } finally {
    await Promise.all(servers.map((server) => server.close()));
  }
}

const EVENTS = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n";
const saying = (body: string, headers = ""): Script => (visit) => visit.send(answer(body, headers));

/** A service over these servers that takes every request; `more` stands beside them. */
const over = (servers: { address: string }[], more: Record<string, unknown> = {}) => ({
  services: { shop: { servers: servers.map(({ address }) => address), ...more } },
  default: { service: "shop" },
});

const one = async (port: number, path: string, headers = "", host = "a.test") => {
  const { answers } = await rawRequest(port, get(path, headers, host));
  assert.equal(answers.length, 1);
  return answers[0]!;
};
const body = async (port: number, path = "/", host = "a.test") => (await one(port, path, "", host)).body.toString();

/** The shared program in front of one server that does what the script says. */
const through = (
  script: Script,
  more: Record<string, unknown>,
  use: (lb: Shared, server: ScriptedServer) => Promise<void>,
) => serving([script], (server) => sharing(over([server], more), (lb) => use(lb, server)));

/** The same with a program of its own. */
const throughOwn = (
  script: Script,
  more: Record<string, unknown>,
  use: (lb: Running, server: ScriptedServer) => Promise<void>,
) => serving([script], (server) => running(over([server], more), (lb) => use(lb, server)));

// ─── The command line ───

const FINE = "services: {shop: {servers: ['localhost:8081', 'localhost:8082']}}\ndefault: {service: shop}\n";
const fine = (use: (folder: string) => Promise<void>) => inFolder({ "routes.yml": FINE }, use);

test("--help lists every option and --version is that of package.json", async () => {
  const help = await callProgram(["--help"]);
  assert.equal(help.code, 0);
  assert.equal(help.err, "");
  for (
    const option of "config listen port admin log drain check print-config explain header schema demo help version"
      .split(" ")
  ) {
    assert.match(help.out, new RegExp(`--${option}\\b`));
  }
  const { version } = JSON.parse(readFileSync(new URL("../../package.json", import.meta.url), "utf8"));
  assert.deepEqual(await callProgram(["--version"]), { code: 0, out: `${version}\n`, err: "" });
});

test("--check gives 0 and one line for a file that is fine", () =>
  fine(async (folder) => {
    for (const option of ["--check", "-t"]) {
      const { code, out, err } = await callProgram([option], { cwd: folder });
      assert.equal(code, 0);
      assert.match(out, /^routes\.yml[^\n]*\n$/);
      assert.equal(err, "");
    }
  }));

test("--check and the start warn of routes that are never reached and of services that nothing leads to", async () => {
  const text =
    "services: { shop: { servers: [a:1] }, spare: { servers: [b:1] } }\nroutes: [{ respond: 200 }, { path: /, service: shop }]\n";
  const warnings = [
    "1:39: services.spare: nothing leads to this service",
    "2:28: routes[1]: can never be reached: routes[0] takes all of its requests",
  ];
  await inFolder({ "routes.yml": text }, async (folder) => {
    const { code, out, err } = await callProgram(["--check"], { cwd: folder });
    assert.deepEqual([code, err], [0, ""]);
    const fine = "routes.yml is fine: services: 2, routes: 2";
    assert.deepEqual(out.trimEnd().split("\n"), [...warnings.map((one) => `warning: routes.yml:${one}`), fine]);
  });
  await running(text, async (lb) => {
    await until("the start warns", () => warnings.every((one) => lb.err().includes(`routes.yml:${one}`)));
  });
});

test("a file that cannot be read or used ends the program with 1 before it listens", () =>
  inFolder({ "bad.yml": "services: {shop: {servers: []}}" }, async (folder) => {
    for (const file of ["none.yml", "bad.yml"]) {
      const { code, out, err } = await callProgram(["-c", file, ...LOCAL], { cwd: folder });
      assert.deepEqual([code, out], [1, ""]);
      assert.match(err, new RegExp(`^${file}:\\d+:`));
      assert.doesNotMatch(err, /listening/);
    }
  }));

test("a port that is taken ends the program with 1 and is named", () =>
  serving([saying("")], ({ address }) =>
    fine(async (folder) => {
      const { code, err } = await callProgram(["--listen", address], { cwd: folder });
      assert.equal(code, 1);
      assert.ok(
        err.endsWith(
          `cannot listen on ${address}: the port is in use: end the process that has it, or choose another port\n`,
        ),
        err,
      );
      const more = await callProgram(["--listen", "127.0.0.1:0", "--admin", address], { cwd: folder });
      assert.equal(more.code, 1);
      assert.match(more.err, /the port is in use/);
      const workers = await callProgram(["--listen", address, "--workers", "2"], { cwd: folder });
      assert.equal(workers.code, 1);
      assert.match(workers.err, /the port is in use/);
    })));

// What cannot be done, as the same sentence on all runtimes: arguments, exit status, what is said.
const PLAIN_SENTENCES: [args: string[], code: number, said: RegExp][] = [
  [
    ["-c", "none.yml"],
    1,
    /^none\.yml:1:1: cannot be read: there is no such file; -c FILE names another one, --demo needs none\n$/,
  ],
  [["-c", "."], 1, /^\.:1:1: cannot be read: it is a folder\n$/],
  [
    ["--listen", "nowhere.invalid:8080"],
    1,
    /^cannot listen on nowhere\.invalid:8080: the name does not resolve to an address\n$/m,
  ],
  [
    ["--listen", "198.51.100.7:8080"],
    1,
    /^cannot listen on 198\.51\.100\.7:8080: this machine does not have this address\n$/m,
  ],
  [["--chek"], 2, /^--chek is not an option; did you mean "--check"\?\n/],
  [["--chek=1"], 2, /^--chek is not an option; did you mean "--check"\?\n/],
  [["-x"], 2, /^-x is not an option\n/],
  [["--port"], 2, /^--port needs a value\n/],
  [["-p"], 2, /^--port needs a value\n/],
  [["--check=yes"], 2, /^--check takes no value\n/],
  [["--workers", "-1"], 2, /^--workers needs a value\n/],
  [
    ["--check", "utf16.yml"],
    1,
    /^utf16\.yml:1:1: cannot be read: it is not UTF-8: save it in that encoding\n$/,
  ],
  [
    ["--check", "tls.yml"],
    1,
    /^tls\.yml: listen\[0\]: none\.pem cannot be read: there is no such file\n$/,
  ],
];
const TLS = 'listen: { address: 1, tls: { cert: none.pem, key: none.pem } }\ndefault: { servers: ["a:1"] }\n';
for (const [args, code, said] of PLAIN_SENTENCES) {
  test(`one sentence says what is wrong with ${args.join(" ")}`, () =>
    inFolder({ "routes.yml": FINE, "tls.yml": TLS }, async (folder) => {
      writeFileSync(join(folder, "utf16.yml"), Buffer.from(`\ufeff${FINE}`, "utf16le"));
      const found = await callProgram(args, { cwd: folder });
      assert.equal(found.code, code);
      assert.match(found.err, said);
      assert.ok(found.err.split("\n").length <= 3, found.err);
    }));
}

// only root can run the program as nobody, and nobody may not read root's cache of Deno
const CAN_BE_NOBODY = process.platform === "linux" && process.getuid?.() === 0 && runtime() !== "deno" &&
  Number(readFileSync("/proc/sys/net/ipv4/ip_unprivileged_port_start", "utf8")) > 80;
test(
  "a port that only root may use is refused with what to do",
  { skip: !CAN_BE_NOBODY },
  () =>
    inFolder({ "routes.yml": FINE }, (folder) => {
      chmodSync(folder, 0o755);
      const args = [...RUN, ENTRY, "--listen", "127.0.0.1:80"];
      const { status, stderr } = spawnSync(process.execPath, args, {
        cwd: folder,
        uid: 65534,
        gid: 65534,
        timeout: 30_000,
      });
      const said =
        "cannot listen on 127.0.0.1:80: this user may not use ports below 1024: choose another port, or run setcap ";
      assert.deepEqual([status, stderr.toString().slice(0, said.length)], [1, said]);
      return Promise.resolve();
    }),
);

test("--demo balances over three servers of its own, shows them on its dashboard, and says what to do next", () =>
  running("", async ({ port, err }) => {
    const seen: string[] = [];
    for (let i = 0; i < 6; i++) seen.push(await body(port));
    assert.equal(new Set(seen.slice(0, 3)).size, 3, seen.join());
    assert.deepEqual(seen.slice(3), seen.slice(0, 3));
    const admin = await until("it says what to do", () => /open http:\/\/127\.0\.0\.1:(\d+)\/ in/.exec(err())?.[1]);
    assert.match(await body(Number(admin), "/", "localhost"), /<title>lb\.ts/);
    assert.match(err(), new RegExp(`^  curl http://127\\.0\\.0\\.1:${port}/ a few times`, "m"));
    parseConfig(/^ {4}services: .*\n {4}default: .*/m.exec(err())![0]); // what it says to write
  }, { args: [...LOCAL, "--demo", "--admin", "127.0.0.1:0"] }));

test("it says first where it listens, then what it balances, and nothing on standard output", () =>
  throughOwn(saying("hello"), {}, async (lb, { address }) => {
    await until("the service is named", () => lb.err().split("\n").length > 2);
    const [first, second] = lb.err().split("\n");
    assert.match(first!, new RegExp(`lb\\.ts \\S+ listening on http://127\\.0\\.0\\.1:${lb.port}$`));
    assert.match(second ?? "", new RegExp(`shop: round-robin over ${address}$`));
    assert.equal(lb.out(), "");
  }));

test("every address of listen is served", () =>
  serving(
    [saying("hello")],
    (server) =>
      running({ listen: ["127.0.0.1:0", "127.0.0.1:0", "127.0.0.2:0"], ...over([server]) }, async ({ ports }) => {
        assert.equal(new Set(ports).size, 3);
        assert.equal(await body(ports[0]!), "hello");
        assert.equal(await body(ports[1]!), "hello");
      }, { args: [], listeners: 3 }),
  ));

// ─── What users of Whirlwind have ───

test("Whirlwind's file works as it is: hosts and paths in turn, and 404 for what it does not name", () =>
  serving(["p1", "p2", "s1", "s2"].map((name) => saying(name)), (p1, p2, s1, s2) => {
    const file = `hosts:
  - host: www.peter.com
    servers:
      - localhost:${p1.port}
      - localhost:${p2.port}
  - host: www.simpson.com
    servers:
      - localhost:${s1.port}
      - localhost:${s2.port}
paths:
  - path: /peter
    servers:
      - localhost:${p1.port}
      - localhost:${p2.port}
  - path: /simpson
    servers:
      - localhost:${s1.port}
      - localhost:${s2.port}
`;
    return sharing(file, async ({ port }) => {
      const four = async (path: string, host: string) => {
        const seen: string[] = [];
        for (let i = 0; i < 4; i++) seen.push(await body(port, path, host));
        return seen.join(" ");
      };
      assert.equal(await four("/", "www.peter.com"), "p1 p2 p1 p2");
      assert.equal(await four("/", "www.simpson.com"), "s1 s2 s1 s2");
      assert.equal(await four("/peter", "localhost"), "p1 p2 p1 p2");
      assert.equal(await four("/simpson/homer", "localhost"), "s1 s2 s1 s2");
      for (
        const [path, host] of [["/", "www.marge.com"], ["/marge", "localhost"], ["/petersen", "localhost"]] as const
      ) {
        const refused = await one(port, path, "", host);
        assert.deepEqual([status(refused), value(refused, "x-lb-failure")], [404, "no-route"]);
      }
      assert.deepEqual([p1, p2, s1, s2].map((server) => server.requests.length), [4, 4, 4, 4]);
    });
  }));

// ─── Reading the file again ───

const reloads = (lb: Shared) => lb.err().split("is in force again").length - 1;
const complaints = (lb: Shared) => lb.err().split("the old config stays in force").length - 1;

test("a changed file is put in force by itself, written in place or replaced as editors do", () =>
  serving(
    ["one", "two", "three"].map((name) => saying(name)),
    (first, second, third) =>
      sharing(over([first]), async (lb) => {
        assert.equal(await body(lb.port), "one");
        lb.write(over([second]));
        await until("the changed file is in force", () => reloads(lb) === 1, 20_000);
        assert.equal(await body(lb.port), "two");
        for (const [server, name] of [[third, "three"], [first, "one"]] as const) {
          const before = reloads(lb);
          const paths = [{ path: `/${name}`, servers: [second.address] }];
          writeFileSync(`${lb.file}.new`, text({ paths, ...over([server]) }));
          renameSync(`${lb.file}.new`, lb.file);
          await until("the replaced file is in force", () => reloads(lb) > before, 20_000);
          assert.deepEqual([await body(lb.port), await body(lb.port, `/${name}`)], [name, "two"]);
        }
      }),
  ));

test("a file that is still being written is not read before it stands still", () =>
  through(saying("hello"), {}, async (lb, server) => {
    const whole = text(over([server]));
    for (let longest = Infinity; longest > 300;) { // what took longer may have looked like the end
      longest = 0;
      const before = complaints(lb);
      for (let i = 0, last = Date.now(); i < 15; i++) {
        writeFileSync(lb.file, `services: [${" ".repeat(i)}`);
        await sleep(100);
        longest = Math.max(longest, Date.now() - last);
        last = Date.now();
      }
      const read = reloads(lb);
      writeFileSync(lb.file, `${whole}\n# after ${read}`);
      await until("the whole file is in force", () => reloads(lb) > read, 20_000);
      if (longest <= 300) assert.equal(complaints(lb), before, "nobody has read a part of it");
    }
  }));

test("a file that is a pipe by now is not waited for: the old config stays in force", () =>
  throughOwn(
    (visit) => visit.send(answer("here")),
    {},
    async (lb) => {
      rmSync(lb.file);
      spawnSync("mkfifo", [lb.file]);
      lb.signal("SIGHUP");
      await until("it is reported", () => lb.err().includes("is no file"));
      const { answers: [one] } = await rawRequest(lb.port, get("/"));
      assert.equal(one && status(one), 200);
    },
  ));

test("SIGHUP reads the file again", () =>
  through(saying("hello"), {}, async (lb) => {
    for (let i = 1; i <= 3; i++) {
      lb.signal("SIGHUP");
      await until("the file is in force again", () => reloads(lb) === i);
    }
    assert.equal(await body(lb.port), "hello");
  }));

test("a bad file changes nothing and is reported with its line, and so is a file that is gone", () =>
  serving([saying("one"), saying("two")], (first, second) =>
    sharing(over([first]), async (lb) => {
      lb.write("services:\n  shop: {servers: [], strateggy: random}\n");
      await until("the mistake is reported", () => complaints(lb) > 0, 20_000);
      await until("with its line", () => /routes\.yml:2:.*strateggy/.test(lb.err()));
      assert.equal(await body(lb.port), "one");
      rmSync(lb.file);
      await until("the file is missed", () => /routes\.yml:.*cannot be read/.test(lb.err()), 20_000);
      assert.equal(await body(lb.port), "one");
      assert.equal(reloads(lb), 0);
      lb.write(over([second]));
      await until("the new file is in force", () => reloads(lb) > 0, 20_000);
      assert.equal(await body(lb.port), "two");
    })));

test("a stream that has begun survives a reload that takes its server away", () =>
  serving([
    (visit) => visit.send(`${EVENTS}Transfer-Encoding: chunked\r\n\r\n9\r\ndata: 0\n\n\r\n`),
    saying("new"),
  ], (old, next) =>
    sharing(over([old]), async (lb) => {
      await streaming(lb.port, "/", async (seen) => {
        await until("the answer has begun", () => seen().includes("data: 0\n\n"));
        lb.write(over([next]));
        lb.signal("SIGHUP");
        await until("the new file is in force", () => reloads(lb) > 0);
        assert.equal(await body(lb.port), "new");
        for (const event of ["a", "b", "c"]) {
          await old.last!.send(`9\r\ndata: ${event}\n\n\r\n`);
          await until("the event is there", () => seen().includes(`data: ${event}\n\n`));
        }
        await old.last!.send("0\r\n\r\n");
        await until("the stream has ended", () => seen().endsWith("0\r\n\r\n"));
      });
    })));

// ─── Load ───

/** One answer as the load's clients see it; status 0: the connection ended before it was whole. */
interface Seen {
  status: number;
  body: string;
  request: string;
}

/** Asks on one kept connection after another until there are no more requests. */
async function keepAsking(port: number, next: () => string | undefined, saw: (seen: Seen) => void): Promise<void> {
  let request = next();
  while (request !== undefined) {
    await new Promise<void>((done) => {
      const socket = connect(port, "127.0.0.1");
      let received = "";
      const ask = () => {
        received = "";
        if (request === undefined) socket.end();
        else socket.write(request, "latin1");
      };
      socket.on("connect", ask);
      socket.on("data", (bytes: Buffer) => {
        received += bytes.toString("latin1");
        const end = received.indexOf("\r\n\r\n");
        const length = Number(/\r\ncontent-length: *(\d+)/i.exec(received)?.[1]);
        if (end < 0 || received.length < end + 4 + length || request === undefined) return;
        assert.ok(length >= 0, received);
        saw({ status: Number(received.slice(9, 12)), body: received.slice(end + 4), request });
        request = next();
        ask();
      });
      socket.on("error", () => {});
      socket.on("close", () => {
        if (request !== undefined) {
          saw({ status: 0, body: received, request });
          request = next();
        }
        done();
      });
    });
  }
}

const CLIENTS = 32;

/** Requests from several clients at once; gives the answers that were not 200, and how many there were of each body. */
async function load(
  port: number,
  next: () => string | undefined,
  saw: (seen: Seen) => void = () => {},
  clients = CLIENTS,
) {
  const bodies = new Map<string, number>();
  const failed: Seen[] = [];
  await Promise.all(Array.from({ length: clients }, () =>
    keepAsking(port, next, (seen) => {
      if (seen.status === 200) {
        bodies.set(seen.body, (bodies.get(seen.body) ?? 0) + 1);
      } else failed.push(seen);
      saw(seen);
    })));
  return { bodies, failed };
}

const GET = "GET /load HTTP/1.1\r\nHost: a.test\r\n\r\n";

test("a hundred reloads under load fail no request", () =>
  serving(
    ["one", "two", "three"].map((name) => saying(name)),
    (first, second, third) =>
      sharing({ log: "off", ...over([first, second]) }, async (lb) => {
        let done = false;
        const loading = load(lb.port, () => done ? undefined : GET, () => {}, 4);
        for (let i = 1; i <= 100; i++) {
          const before = reloads(lb);
          // replaced at once, so that the watch never sees half a file
          writeFileSync(`${lb.file}.new`, text({ log: "off", ...over(i % 2 ? [second, third] : [first, second]) }));
          renameSync(`${lb.file}.new`, lb.file);
          lb.signal("SIGHUP");
          await until("the file is in force again", () => reloads(lb) > before, 20_000);
        }
        done = true;
        const { bodies, failed } = await loading;
        assert.deepEqual(failed, []);
        assert.deepEqual([...bodies.keys()].sort(), ["one", "three", "two"]);
        assert.equal(complaints(lb), 0);
      }),
  ));

/** A server that can be killed: it writes down each body it has received, and answers with its name a little later. */
const KILLABLE = `
import { appendFileSync } from "node:fs";
import { createServer } from "node:net";
const [port, name, file] = process.argv.slice(2);
const server = createServer((socket) => {
  let rest = "";
  socket.on("error", () => {});
  socket.on("data", (bytes) => {
    rest += bytes.toString("latin1");
    for (let end; (end = rest.indexOf("\\r\\n\\r\\n")) >= 0;) {
      const whole = end + 4 + Number(/\\r\\ncontent-length: *(\\d+)/i.exec(rest.slice(0, end + 2))?.[1] ?? 0);
      if (rest.length < whole) return;
      if (whole > end + 4) appendFileSync(file, rest.slice(end + 4, whole) + "\\n");
      rest = rest.slice(whole);
      setTimeout(() => socket.write("HTTP/1.1 200 OK\\r\\nContent-Length: " + name.length + "\\r\\n\\r\\n" + name), 2);
    }
  });
});
server.listen(Number(port), "127.0.0.1", () => console.log("port " + server.address().port));
`;

interface Killable {
  address: string;
  port: number;
  kill(): Promise<void>;
}

async function killable(folder: string, name: string, port = 0): Promise<Killable> {
  const script = join(folder, "killable.mjs");
  writeFileSync(script, KILLABLE);
  const child = startScript(script, [`${port}`, name, join(folder, "received")]);
  const kill = async () => {
    if (!child.over()) child.signal("SIGKILL");
    await child.ended;
  };
  try {
    const found = () => Number(/port (\d+)/.exec(child.out())?.[1]);
    await until(`server ${name} listens`, () => child.over() || found() > 0, 30_000);
    assert.ok(!child.over(), child.err());
    return { address: `127.0.0.1:${found()}`, port: found(), kill };
  } catch (error) {
    await kill();
    throw error;
  }
}

/** The program in front of three servers that can be killed. */
async function withThree(
  more: Record<string, unknown>,
  use: (lb: Shared, servers: Killable[], folder: string) => Promise<void>,
) {
  await inFolder({}, async (folder) => {
    const servers: Killable[] = [];
    try {
      for (const name of ["one", "two", "three"]) {
        servers.push(await killable(folder, name));
      }
      await sharing({ log: "off", ...over(servers, more) }, (lb) => use(lb, servers, folder));
    } finally {
      for (const server of servers) await server.kill();
    }
  });
}

test("a server that is killed under load is no client's problem, and takes its share when it is back", () =>
  withThree(
    { eject: { failures: 3, for: "500ms" }, health: { interval: "200ms", rise: 1, fall: 2 } },
    async (lb, servers, folder) => {
      const total = 4_000;
      let asked = 0, seen = 0;
      const { bodies, failed } = await load(lb.port, () => asked++ < total ? GET : undefined, () => {
        if (++seen === 1_000) void servers[1]!.kill();
      });
      assert.deepEqual(failed, []);
      assert.equal([...bodies.values()].reduce((sum, count) => sum + count), total);
      assert.deepEqual([...bodies.keys()].sort(), ["one", "three", "two"]);
      assert.ok(bodies.get("two")! < bodies.get("one")! / 2, "the server was not killed early enough to mean anything");
      servers.push(await killable(folder, "two", servers[1]!.port));
      for (let came = "", tries = 0; came !== "two"; came = await body(lb.port)) {
        assert.ok(tries++ < 1_000, "the server is not asked again");
        await sleep(20);
      }
    },
  ));

test("a POST is never received twice, whoever is killed", () =>
  withThree({ retries: 2 }, async (lb, servers, folder) => {
    let id = 0, seen = 0;
    const next = () => {
      if (id === 3_000) return undefined;
      const body = `id-${++id}`;
      return `POST /orders HTTP/1.1\r\nHost: a.test\r\nContent-Length: ${body.length}\r\n\r\n${body}`;
    };
    const answered: string[] = [];
    const { failed } = await load(lb.port, next, (one) => {
      if (++seen === 1_000) void servers[2]!.kill();
      if (one.status === 200) answered.push(one.request.split("\r\n\r\n")[1]!);
    });
    const received = readFileSync(join(folder, "received"), "utf8").trim().split("\n");
    assert.deepEqual(received.filter((one, i) => received.indexOf(one) !== i), [], "received twice");
    const known = new Set(received);
    assert.deepEqual(answered.filter((one) => !known.has(one)), [], "answered, but never received");
    // what the killed server had taken and not answered is lost, and the client is told so
    assert.deepEqual(failed.filter((one) => one.status !== 502), []);
    assert.ok(failed.length <= CLIENTS, `${failed.length} failed`);
    assert.equal(answered.length + failed.length, 3_000);
  }));

// ─── The end ───

test("SIGTERM and SIGINT let what is in flight finish, take no new connection, and end with 0", async () => {
  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    await throughOwn(() => {}, {}, async (lb, server) => {
      const waiting = rawRequest(lb.port, get("/held"), { atMost: 20_000, quiet: 20_000 });
      await until("the request is at the server", () => server.requests.length === 1);
      lb.signal(signal);
      await until("it drains", () => /draining.*\b1\b/.test(lb.err()));
      let refused = false;
      for (let tries = 0; !refused; tries++) {
        assert.ok(tries < 500, "new connections are still taken");
        refused = await new Promise<boolean>((resolve) => {
          const socket = connect(lb.port, "127.0.0.1", () => (socket.destroy(), resolve(false)));
          socket.on("error", () => resolve(true));
        });
        await sleep(10);
      }
      await sleep(1_000); // time to end, for a program that does not wait
      assert.ok(!lb.over(), "it ended with a request in flight");
      await server.last!.send(answer("late, but here"));
      const { answers } = await waiting;
      assert.deepEqual(answers.map(({ body }) => body.toString()), ["late, but here"]);
      assert.equal(await lb.ended, 0);
      assert.match(lb.err(), DRAINED);
    });
  }
});

test("a signal that comes while workers are started lets what they have taken finish", async () => {
  const server = await scriptedServer(async (visit) => (await sleep(300), visit.send(answer("taken"))));
  const port = await freePort(), folder = makeFolder();
  writeFileSync(join(folder, "routes.yml"), JSON.stringify({ default: { servers: [server.address] } }));
  const lb = startScript(ENTRY, ["--listen", `127.0.0.1:${port}`, "--workers", "2"], { cwd: folder });
  try {
    let answers: Message[] = [];
    while (answers.length === 0) {
      let over = false;
      const asked = rawRequest(port, get("/"), { quiet: 20 }).finally(() => over = true);
      await until("it is refused, or at the server", () => over || server.requests.length > 0);
      if (server.requests.length) lb.signal("SIGTERM");
      ({ answers } = await asked);
    }
    assert.equal(answers[0]!.body.toString(), "taken");
    assert.equal(await lb.ended, 0);
  } finally {
    if (!lb.over()) lb.signal("SIGKILL");
    await server.close();
    rmSync(folder, { recursive: true });
  }
});

test("with workers the first connection that is taken is served", async () => {
  const port = await freePort(), folder = makeFolder();
  writeFileSync(join(folder, "routes.yml"), "default: { respond: { body: here } }");
  const lb = startScript(ENTRY, ["--listen", `127.0.0.1:${port}`, "--workers", "2"], { cwd: folder });
  /** What is answered, or that nobody listens. */
  const ask = () =>
    new Promise<string>((resolve) => {
      let [taken, text] = [false, ""];
      const socket = connect(port, "127.0.0.1", () => (taken = true, socket.write(get("/"))));
      socket.on("data", (bytes) => (text += bytes).endsWith("here") && socket.destroy());
      socket.on("error", () => {}).on("close", () => resolve(taken ? text : "refused"));
    });
  try {
    let first = "refused";
    for (const end = Date.now() + 30_000; first === "refused" && Date.now() < end;) first = await ask();
    for (const answered of [first, ...await Promise.all(Array.from({ length: 20 }, ask)), await ask()]) {
      assert.match(answered, /^HTTP\/1\.1 200 [^]*here$/);
    }
  } finally {
    lb.signal("SIGTERM");
    await lb.ended;
    rmSync(folder, { recursive: true });
  }
});

test("a process that has stood still reads what has come meanwhile before it judges", () =>
  through(
    async (visit) => (await sleep(200), visit.send(answer("in time"))),
    { timeouts: { response: "1s" }, retries: 0 },
    async (lb, server) => {
      const asked = rawRequest(lb.port, get("/"));
      await until("the request is at the server", () => server.requests.length === 1);
      process.kill(lb.pid, "SIGSTOP");
      await sleep(2_500);
      process.kill(lb.pid, "SIGCONT");
      assert.equal((await asked).answers[0]!.body.toString(), "in time");
    },
  ));

test("a process that has run out of handles serves again as soon as there are some", () =>
  throughOwn((visit) => visit.send(answer("here")), {}, async (lb) => {
    assert.equal(status((await rawRequest(lb.port, get("/"))).answers[0]!), 200);
    const open = readdirSync(`/proc/${lb.pid}/fd`).length, few = `--nofile=${open + 30}:${open + 30}`;
    assert.equal(spawnSync("prlimit", ["--pid", `${lb.pid}`, few]).status, 0);
    const crowd = Array.from({ length: 100 }, () => connect(lb.port, "127.0.0.1").on("error", () => {}));
    await sleep(1_000);
    for (const socket of crowd) socket.destroy();
    for (let tries = 0, here = false; !here; tries++) {
      assert.ok(tries < 100, "it serves again");
      here = (await rawRequest(lb.port, get("/"), { quiet: 20 })).answers[0]?.body.toString() === "here";
      if (!here) await sleep(50);
    }
  }));

test("an answer that is on its way when SIGTERM comes arrives whole", () =>
  throughOwn((visit) => visit.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nfirst"), {}, async (lb, server) => {
    await streaming(lb.port, "/", async (seen) => {
      await until("half of it is there", () => seen().includes("first"));
      lb.signal("SIGTERM");
      await until("it drains", () => /draining/.test(lb.err()));
      await server.last!.send("other");
      await until("the rest is there", () => seen().endsWith("\r\n\r\nfirstother"));
    });
    assert.equal(await lb.ended, 0);
  }));

test("a client that has connected before a drain gets its first request answered", () =>
  throughOwn((visit) => visit.send(answer("here")), {}, async (lb) => {
    const asked = rawRequest(lb.port, [
      200,
      () => lb.signal("SIGTERM"),
      () => until("it drains", () => /draining/.test(lb.err())),
      350, // the listener has closed by then
      get("/"),
    ]);
    const { answers: [one] } = await asked;
    assert.equal(one && status(one), 200);
    assert.equal(await lb.ended, 0);
  }));

for (const framing of ["Content-Length: 10", "Transfer-Encoding: chunked"]) {
  test(`an upload that is on its way when SIGTERM comes arrives whole: ${framing}`, () =>
    throughOwn((visit, request) => visit.send(answer(request.body)), {}, async (lb) => {
      const [first, last] = framing.endsWith("chunked")
        ? ["5\r\nfirst\r\n", "5\r\nother\r\n0\r\n\r\n"]
        : ["first", "other"];
      const sent = rawRequest(lb.port, [
        `POST / HTTP/1.1\r\nHost: a.test\r\n${framing}\r\n\r\n${first}`,
        200,
        () => lb.signal("SIGTERM"),
        350, // the listener has closed by then
        last,
      ]);
      const { answers: [one] } = await sent;
      assert.deepEqual([status(one!), one!.body.toString()], [200, "firstother"]);
      assert.equal(await lb.ended, 0);
    }));
}

test("a crowd of small chunks passes as a few large ones", () =>
  through(
    (visit, request) => visit.send(answer(`${request.body.length} in ${visit.received.split("\r\n").length}`)),
    {},
    async (lb) => {
      const head = "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n";
      const { answers: [one] } = await rawRequest(lb.port, `${head}${"1\r\na\r\n".repeat(2_000)}0\r\n\r\n`);
      const [length, lines] = one!.body.toString().split(" in ").map(Number);
      assert.equal(length, 2_000);
      assert.ok(lines! < 100, `${lines} lines`);
    },
  ));

test("a body of 200,000 small chunks arrives whole, from a client and from a server", () => {
  const chunked = "Transfer-Encoding: chunked\r\n", crowd = `${"1\r\na\r\n".repeat(200_000)}0\r\n\r\n`;
  const script: Script = async (visit, request) => {
    if (request.start.startsWith("POST")) await visit.send(answer(`${request.body.length}`));
    else await visit.send(`HTTP/1.1 200 OK\r\n${chunked}\r\n${crowd}`);
  };
  return through(script, {}, async (lb) => {
    const up = await rawRequest(lb.port, `POST / HTTP/1.1\r\nHost: a.test\r\n${chunked}\r\n${crowd}`, {
      atMost: 20_000,
    });
    assert.equal(up.answers[0]?.body.toString(), "200000");
    const down = await rawRequest(lb.port, get("/"), { atMost: 20_000 });
    assert.equal(down.answers[0]?.body.length, 200_000);
  });
});

test("a second signal ends at once, whatever is in flight", () =>
  throughOwn(() => {}, {}, async (lb, server) => {
    const waiting = rawRequest(lb.port, get("/held"), { atMost: 20_000, quiet: 20_000 });
    await until("the request is at the server", () => server.requests.length === 1);
    lb.signal("SIGTERM");
    await until("it drains", () => /draining/.test(lb.err()));
    assert.ok(!lb.over());
    lb.signal("SIGTERM");
    assert.equal(await lb.ended, 1);
    assert.match(lb.err(), /ended by a second signal; requests cut off: 1\n$/);
    assert.doesNotMatch(lb.err(), /drained/);
    assert.deepEqual((await waiting).answers, []);
  }));

test("a drain ends after its time, and says what it has cut off", () =>
  serving([() => {}], (server) =>
    inFolder({ "routes.yml": text(over([server])) }, async (folder) => {
      const program = startScript(ENTRY, [...LOCAL, "--drain", "200ms"], { cwd: folder });
      try {
        const port = () => Number(/listening on http:\/\/\S+:(\d+)/.exec(program.err())?.[1]);
        await until("it listens", () => port() > 0, 30_000);
        const waiting = rawRequest(port(), get("/held"), { atMost: 20_000, quiet: 20_000 });
        await until("the request is at the server", () => server.requests.length === 1);
        program.signal("SIGTERM");
        assert.equal(await program.ended, 0);
        assert.match(program.err(), /cut off: 1\n$/);
        await waiting;
      } finally {
        if (!program.over()) program.signal("SIGKILL");
      }
    })));

// ─── Large bodies ───

const MIB = 1 << 20;
const PIECE = randomBytes(MIB + 7); // not a power of two: a piece lost or swapped shows

/** Whether bytes are those of the pattern at this place. */
function fits(bytes: Buffer, at: number): boolean {
  for (let done = 0; done < bytes.length;) {
    const from = (at + done) % PIECE.length;
    const length = Math.min(PIECE.length - from, bytes.length - done);
    if (!bytes.subarray(done, done + length).equals(PIECE.subarray(from, from + length))) return false;
    done += length;
  }
  return true;
}

/** The pattern up to a length, as fast as the other side takes it; `sent` hears of each piece that was taken. */
async function sendPattern(socket: Socket, length: number, sent: (bytes: number) => void = () => {}): Promise<void> {
  for (let at = 0; at < length && !socket.destroyed;) {
    const from = at % PIECE.length;
    const piece = PIECE.subarray(from, Math.min(from + MIB / 4, PIECE.length, from + length - at));
    if (!socket.write(piece)) {
      await new Promise<void>((go) => {
        const on = () => (socket.off("drain", on), socket.off("close", on), go());
        socket.on("drain", on);
        socket.on("close", on);
      });
    }
    at += piece.length;
    sent(at);
  }
}

/** The most memory that a process has had, in MiB; 0 where the system does not say. */
const peak = (pid: number) =>
  existsSync("/proc/self/status")
    ? Number(/VmHWM:\s+(\d+) kB/.exec(readFileSync(`/proc/${pid}/status`, "latin1"))?.[1]) / 1024
    : 0;
const LARGE = 512 * MIB;
const ENOUGH = 400; // MiB: below what passes, far above what a runtime needs

/** Takes a body's framing off as it comes: all, or what chunks hold. */
function unframed(chunked: boolean): (bytes: Buffer, take: (data: Buffer) => void) => void {
  let left = chunked ? 0 : Infinity;
  let line = "";
  return (bytes, take) => {
    for (let at = 0; at < bytes.length;) {
      if (left > 0) {
        const data = bytes.subarray(at, at + left);
        take(data);
        at += data.length;
        left -= data.length;
      } else {
        const end = bytes.indexOf("\n", at);
        line += bytes.toString("latin1", at, end < 0 ? bytes.length : end);
        at = end < 0 ? bytes.length : end + 1;
        if (end < 0) return;
        if (line.trim()) left = parseInt(line, 16); // an empty line is the end of a chunk
        line = "";
      }
    }
  };
}

/** Asks for a body that is the pattern, and compares it while it comes. */
function takePattern(port: number, path: string) {
  const socket = connect(port, "127.0.0.1");
  const state = { socket, head: "", bytes: 0, wrong: false, closed: false };
  let body: ReturnType<typeof unframed> | undefined;
  const take = (data: Buffer) => {
    state.wrong ||= !fits(data, state.bytes);
    state.bytes += data.length;
  };
  socket.on("connect", () => socket.write(`GET ${path} HTTP/1.1\r\nHost: a.test\r\n\r\n`));
  socket.on("error", () => {});
  socket.on("close", () => state.closed = true);
  socket.on("data", (bytes: Buffer) => {
    if (body) return body(bytes, take);
    const before = state.head.length;
    state.head += bytes.toString("latin1");
    const end = state.head.indexOf("\r\n\r\n") + 4;
    if (end < 4) return;
    state.head = state.head.slice(0, end);
    body = unframed(/\r\ntransfer-encoding: *chunked\r\n/i.test(state.head));
    body(bytes.subarray(end - before), take);
  });
  return state;
}

const sending = (length: number, sent?: (bytes: number) => void): Script => async (visit) => {
  await visit.send(`HTTP/1.1 200 OK\r\nContent-Length: ${length}\r\n\r\n`);
  await sendPattern(visit.socket, length, sent);
};

test("a download of 512 MiB passes byte for byte, and is not kept in memory", () =>
  throughOwn(sending(LARGE), {}, async (lb) => {
    const got = takePattern(lb.port, "/large");
    await until("all of it is there", () => got.bytes >= LARGE || got.wrong || got.closed, 90_000);
    got.socket.destroy();
    assert.deepEqual([got.wrong, got.bytes], [false, LARGE]);
    assert.match(got.head, new RegExp(`\r\ncontent-length: ${LARGE}\r\n`, "i"));
    assert.ok(peak(lb.pid) < ENOUGH, `${peak(lb.pid)} MiB`);
  }));

test("an upload of 512 MiB passes byte for byte, and is not kept in memory", async () => {
  const length = LARGE;
  let bytes = 0, wrong = false;
  const server = createServer((socket) => {
    let head = "";
    socket.on("error", () => {});
    socket.on("data", (data: Buffer) => {
      if (!head.endsWith("\r\n\r\n")) {
        const end = data.indexOf("\r\n\r\n");
        head += data.toString("latin1", 0, end < 0 ? data.length : end + 4);
        data = data.subarray(end < 0 ? data.length : end + 4);
      }
      wrong ||= !fits(data, bytes);
      bytes += data.length;
      if (bytes === length) {
        socket.write(answer(/content-length: *(\d+)/i.exec(head)?.[1] ?? "no length"));
      }
    });
  });
  await listenLocally(server);
  try {
    const address = `127.0.0.1:${(server.address() as AddressInfo).port}`;
    await running(over([{ address }]), async (lb) => {
      const { answers } = await rawRequest(lb.port, [
        `PUT /large HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nContent-Length: ${length}\r\n\r\n`,
        (socket) => sendPattern(socket, length),
      ], { atMost: 90_000 });
      assert.deepEqual([wrong, bytes], [false, length]);
      assert.deepEqual(answers.map(({ body }) => body.toString()), [`${length}`]);
      assert.ok(peak(lb.pid) < ENOUGH, `${peak(lb.pid)} MiB`);
    });
  } finally {
    server.close();
  }
});

test("a client that reads slowly slows its server down", () => {
  const length = 64 * MIB;
  let sent = 0;
  return through(sending(length, (bytes) => sent = bytes), {}, async (lb) => {
    const got = takePattern(lb.port, "/large");
    got.socket.once("data", () => got.socket.pause());
    await until("it has begun", () => sent > 0);
    for (let before = -1; before !== sent; await sleep(500)) before = sent;
    assert.ok(sent < length * 3 / 4, `${sent / MIB} MiB were taken from the server for a client that reads nothing`);
    assert.ok(got.bytes < length / 4);
    got.socket.resume();
    await until("all of it is there", () => got.bytes >= length || got.wrong || got.closed, 60_000);
    got.socket.destroy();
    assert.deepEqual([got.wrong, got.bytes], [false, length]);
  });
});

// ─── Streams, and those who leave ───

/** Sends a request and lets `use` look at what has come back so far; then leaves. */
async function streaming(
  port: number,
  path: string,
  use: (seen: () => string, socket: Socket) => Promise<void>,
  request = `GET ${path} HTTP/1.1\r\nHost: a.test\r\n\r\n`,
) {
  const socket = connect(port, "127.0.0.1");
  let received = "";
  socket.on("error", () => {});
  socket.on("connect", () => socket.write(request, "latin1"));
  socket.on("data", (bytes: Buffer) => received += bytes.toString("latin1"));
  try {
    await use(() => received, socket);
  } finally {
    socket.destroy();
  }
}

test("each event of a stream arrives before the next is sent", async () => {
  for (
    const [head, frame, end] of [[
      `${EVENTS}Transfer-Encoding: chunked\r\n\r\n`,
      (data: string) => `${data.length.toString(16)}\r\n${data}\r\n`,
      "0\r\n\r\n",
    ], [
      `${EVENTS}Connection: close\r\n\r\n`,
      (data: string) => data,
      undefined,
    ]] as const
  ) {
    await through(
      (visit) => visit.send(head),
      { compress: true },
      (lb, server) =>
        streaming(lb.port, "/events", async (seen) => {
          await until("the request is there", () => server.last);
          await until("the head is there", () => seen().includes("\r\n\r\n"));
          for (let i = 0; i < 5; i++) {
            await server.last!.send(frame(`data: ${i}\n\n`));
            await until(`event ${i} is there`, () => seen().includes(`data: ${i}\n\n`));
          }
          if (end === undefined) server.last!.socket.end();
          else await server.last!.send(end);
          await until("the stream has ended", () => seen().endsWith("0\r\n\r\n"));
          assert.match(seen(), /^HTTP\/1\.1 200 [^]*\r\ncontent-type: text\/event-stream\r\n/i);
        }),
    );
  }
});

test("a client that leaves ends its server's side too: before the answer, in it, and in its own body", async () => {
  const silent: Script = () => {};
  const half: Script = (visit) => visit.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nfirst");
  const chunk: Script = (visit) => visit.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n");
  const large = randomBytes(200_000).toString("latin1");
  const post = `POST /up HTTP/1.1\r\nHost: a.test\r\nContent-Length: 400000\r\n\r\n${large}`;
  const chunked = `POST /up HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n`;
  type Case = [name: string, Script, request: string | undefined, seen: (visit: Visit, client: string) => boolean];
  const cases: Case[] = [
    ["before the answer", silent, undefined, () => true],
    ["in an answer with a length", half, undefined, (_, client) => client.includes("first")],
    ["in a chunked answer", chunk, undefined, (_, client) => client.includes("first")],
    ["in an upload with a length", silent, post, (visit) => visit.received.length > 100_000],
    ["in a chunked upload", silent, chunked, (visit) => visit.received.includes("first")],
  ];
  for (const [name, script, request, ready] of cases) {
    await through(script, {}, async (lb, server) => {
      server.at = "head";
      await streaming(lb.port, "/", async (seen) => {
        await until(`the request is at the server: ${name}`, () => server.last && ready(server.last, seen()));
        assert.ok(!server.last!.over, name);
      }, request);
      await until(`the server sees the end: ${name}`, () => server.last!.over);
    });
  }
});

test("an answer that its server does not finish is seen to be unfinished", async () => {
  for (const framing of ["Content-Length: 10\r\n\r\nfirst", "Transfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n"]) {
    for (const end of ["end", "resetAndDestroy"] as const) {
      await through(
        async ({ send, socket }) => {
          await send(`HTTP/1.1 200 OK\r\n${framing}`, 100);
          socket[end]();
        },
        {},
        async (lb) => {
          const { answers, closed } = await rawRequest(lb.port, "GET / HTTP/1.1\r\nHost: a.test\r\n\r\n");
          const got = answers[0] as Message;
          assert.deepEqual([answers.length, status(got), got.body.toString(), got.complete, closed], [
            1,
            200,
            "first",
            false,
            true,
          ]);
        },
      );
    }
  }
});

// ─── What passes ───

test("bodies that the server has encoded pass byte for byte, with and without a length", async () => {
  const plain = Buffer.from("hello, hello, hello. ".repeat(5_000));
  const encoded: Record<string, Buffer> = {
    gzip: gzipSync(plain),
    br: brotliCompressSync(plain),
    zstd: zstdCompressSync(plain),
  };
  const script: Script = (visit, request) => {
    const [, how = "", coding = ""] = target(request).split("/");
    const bytes = encoded[coding]!;
    const headers = `Content-Type: text/plain\r\nContent-Encoding: ${coding}\r\n`;
    if (how === "length") return visit.send(answer(bytes, headers));
    return visit.send(
      `HTTP/1.1 200 OK\r\n${headers}Transfer-Encoding: chunked\r\n\r\n${bytes.length.toString(16)}\r\n`,
      ...[bytes, "\r\n0\r\n\r\n"],
    );
  };
  await through(script, { compress: true }, async (lb) => {
    for (const [coding, bytes] of Object.entries(encoded)) {
      for (const how of ["length", "chunked"]) {
        const got = await one(lb.port, `/${how}/${coding}`, "Accept-Encoding: gzip, br, zstd\r\n");
        assert.equal(value(got, "content-encoding"), coding);
        assert.ok(got.complete && got.body.equals(bytes), `${how} ${coding}`);
        if (how === "length") {
          assert.equal(value(got, "content-length"), `${bytes.length}`);
        }
      }
    }
  });
});

for (const [where, more] of Object.entries({ plain: {}, "behind middleware": { cors: { origin: ["*"] } } })) {
  test(`every Set-Cookie stays a line of its own, in order: ${where}`, () =>
    through(
      saying(
        "hello",
        "Set-Cookie: a=1; Path=/\r\nSet-Cookie: b=2; Expires=Wed, 09 Jun 2027 10:18:14 GMT\r\nSet-Cookie: c=3\r\n",
      ),
      more,
      async ({ port }) => {
        assert.deepEqual(values(await one(port, "/", "Origin: http://b.test\r\n"), "set-cookie"), [
          "a=1; Path=/",
          "b=2; Expires=Wed, 09 Jun 2027 10:18:14 GMT",
          "c=3",
        ]);
      },
    ));
}

test("an answer that a route gives by itself has one Content-Type", () =>
  sharing(
    {
      routes: [{ path: "/a", respond: { body: "<b>", headers: { "content-type": "text/html" } } }, {
        path: "/b",
        respond: { body: "b" },
      }],
    },
    async ({ port }) => {
      assert.deepEqual(values(await one(port, "/a"), "content-type"), ["text/html"]);
      assert.deepEqual(values(await one(port, "/b"), "content-type"), ["text/plain; charset=utf-8"]);
    },
  ));

test("HEAD, 204, 304 and ranges have the head that the server gave, and only the body that belongs to it", async () => {
  const script: Script = (visit, request) => {
    if (request.start.startsWith("HEAD /unsaid")) return visit.send("HTTP/1.1 200 OK\r\nX-Own: yes\r\n\r\n");
    if (request.start.startsWith("HEAD")) {
      return visit.send('HTTP/1.1 200 OK\r\nContent-Length: 1234\r\nETag: "v"\r\n\r\n');
    }
    if (target(request) === "/204") {
      return visit.send("HTTP/1.1 204 No Content\r\nX-Own: yes\r\n\r\n");
    }
    if (target(request) === "/304") {
      return visit.send('HTTP/1.1 304 Not Modified\r\nETag: "v"\r\n\r\n');
    }
    return visit.send(
      answer(`for ${value(request, "range")}`, "Content-Range: bytes 0-3/100\r\n", "206 Partial Content"),
    );
  };
  await through(script, {}, async ({ port }) => {
    const next = get("/range", "Range: bytes=0-3\r\n");
    const request = (method: string, path: string, headers = "") =>
      `${method} ${path} HTTP/1.1\r\nHost: a.test\r\n${headers}\r\n`;
    // a second request on the same connection shows where the first answer has ended
    const [head, partial] = (await rawRequest(port, [request("HEAD", "/"), 100, next], { methods: ["HEAD"] })).answers;
    assert.deepEqual([status(head!), value(head!, "content-length"), value(head!, "etag")], [200, "1234", '"v"']);
    assert.deepEqual([status(partial!), value(partial!, "content-range")], [206, "bytes 0-3/100"]);
    assert.equal(partial!.body.toString(), "for bytes=0-3");
    const [unsaid] = (await rawRequest(port, [request("HEAD", "/unsaid"), 100, next], { methods: ["HEAD"] })).answers;
    assert.deepEqual([status(unsaid!), value(unsaid!, "x-own"), value(unsaid!, "content-length")], [200, "yes", ""]);
    const [none, after] = (await rawRequest(port, [request("GET", "/204"), 100, next])).answers;
    assert.deepEqual([status(none!), value(none!, "x-own"), value(none!, "content-length"), status(after!)], [
      204,
      "yes",
      "",
      206,
    ]);
    const [same, last] =
      (await rawRequest(port, [request("GET", "/304", 'If-None-Match: "v"\r\n'), 100, next])).answers;
    assert.deepEqual([status(same!), value(same!, "etag"), status(last!)], [304, '"v"', 206]);
  });
});

test("compress: true encodes text for those who accept it, and nothing twice", async () => {
  const long = "hello, hello, hello. ".repeat(500);
  const script: Script = (visit, request) => {
    if (target(request) === "/image") {
      return visit.send(answer(long, "Content-Type: image/png\r\n"));
    }
    return visit.send(answer(long, "Content-Type: text/plain\r\n"));
  };
  await through(script, { compress: true }, async ({ port }) => {
    const packed = await one(port, "/text", "Accept-Encoding: gzip\r\n");
    assert.equal(value(packed, "content-encoding"), "gzip");
    assert.match(value(packed, "vary"), /accept-encoding/i);
    assert.ok(packed.complete && packed.body.length < long.length);
    assert.equal(gunzipSync(packed.body).toString(), long);
    for (const [path, headers] of [["/text", ""], ["/image", "Accept-Encoding: gzip\r\n"]] as const) {
      const plain = await one(port, path, headers);
      assert.equal(value(plain, "content-encoding"), "");
      assert.equal(plain.body.toString(), long);
    }
  });
});

test("cors answers preflights itself and marks the answers of the server", async () => {
  const server = await echoServer();
  try {
    await sharing(over([server], { cors: { origin: ["https://app.test"], credentials: true } }), async ({ port }) => {
      const asking = "Origin: https://app.test\r\n";
      const [preflight] = (await rawRequest(
        port,
        `OPTIONS /a HTTP/1.1\r\nHost: a.test\r\n${asking}Access-Control-Request-Method: PUT\r\nConnection: close\r\n\r\n`,
      )).answers;
      assert.equal(status(preflight!), 204);
      assert.equal(value(preflight!, "access-control-allow-origin"), "https://app.test");
      assert.match(value(preflight!, "access-control-allow-methods"), /\bPUT\b/);
      assert.equal(server.requests.length, 0);
      const allowed = await one(port, "/a", asking);
      assert.equal(value(allowed, "access-control-allow-origin"), "https://app.test");
      assert.equal(value(allowed, "access-control-allow-credentials"), "true");
      const stranger = await one(port, "/a", "Origin: https://other.test\r\n");
      assert.equal(value(stranger, "access-control-allow-origin"), "");
    });
  } finally {
    await server.close();
  }
});
