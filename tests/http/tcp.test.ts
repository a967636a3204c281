// Connections that are not HTTP: the running program between clients and servers that speak bytes over node:net, and the
// balancer inside this process where counts are looked at.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { createHash, randomBytes } from "node:crypto";
import { writeFileSync } from "node:fs";
import { type AddressInfo, connect, createServer, type Socket } from "node:net";
import process from "node:process";
import { ConfigError, createLoadBalancer, parseConfig, relayTcp, type Strategy } from "../../lb.ts";
import { listenLocally, type Program, sleep, startProgram, test, until } from "../rig/rig.ts";
import type { PickInput } from "../rig/types.ts";

// ─── Servers and clients ───

interface End {
  socket: Socket;
  got: Buffer;
  ended: boolean; // the other side has sent all that it will
  broken: boolean; // it was reset
  closed: boolean;
}

function watched(socket: Socket): End {
  const end: End = { socket, got: Buffer.alloc(0), ended: false, broken: false, closed: false };
  socket.on("data", (bytes: Buffer) => end.got = Buffer.concat([end.got, bytes]));
  socket.on("end", () => end.ended = true);
  socket.on("error", () => end.broken = true);
  socket.on("close", () => end.closed = true);
  return end;
}

interface Backend {
  address: string;
  visits: End[];
  close(): Promise<void>;
}

const endsToo = ({ socket }: End): unknown => socket.on("end", () => socket.end());

/** A server that says its name first, where it has one, and then does what it is told. */
async function backend(greeting = "", talk = endsToo, host = "127.0.0.1"): Promise<Backend> {
  const visits: End[] = [];
  const server = createServer({ allowHalfOpen: true }, (socket) => {
    const visit = watched(socket);
    visits.push(visit);
    if (greeting) socket.write(greeting);
    talk(visit);
  });
  await new Promise<void>((resolve) => server.listen(0, host, resolve));
  const { port } = server.address() as AddressInfo;
  return {
    address: `${host.includes(":") ? `[${host}]` : host}:${port}`,
    visits,
    close: () => {
      for (const { socket } of visits) socket.destroy();
      return new Promise((resolve) => server.close(() => resolve()));
    },
  };
}

/** An address at which nobody listens. */
async function nobody(): Promise<string> {
  const server = await backend();
  await server.close();
  return server.address;
}

async function visit(port: number, host = "127.0.0.1"): Promise<End> {
  const socket = connect({ port, host, allowHalfOpen: true });
  const end = watched(socket);
  await until("a connection stands or is refused", () => !socket.connecting || end.broken);
  return end;
}

const text = ({ got }: End) => got.toString("latin1");
const says = (end: End, what: string) => until(`"${what}" arrives`, () => text(end).includes(what));
const over = (end: End) => until("the connection is closed", () => end.closed);

async function refused(port: number) {
  for (let tries = 0; !(await visit(port)).broken; tries++) {
    assert.ok(tries < 100, `port ${port} still takes connections`);
  }
}

/** The ports of the TCP listeners, in the order in which they were opened. */
const portsOf = (lb: Program) =>
  [...lb.output().matchAll(/listening on tcp:\/\/\S+:(\d+)$/gm)].map(([, n]) => Number(n));

/** The program with these TCP services, each on a free port, while `use` lasts. Then it drains. */
async function running(
  tcp: Record<string, unknown>[],
  use: (lb: Program, ports: number[]) => Promise<void>,
  more: Record<string, unknown> = {},
) {
  const lb = await startProgram(
    { tcp: tcp.map((one) => ({ listen: "127.0.0.1:0", health: "off", ...one })), ...more },
    [
      "--drain",
      "1s",
    ],
  );
  try {
    const ports = await until("all are open", () => portsOf(lb).length === tcp.length && portsOf(lb));
    await use(lb, ports);
  } finally {
    process.kill(lb.pid, "SIGTERM");
    await until("lb.ts ends", () => /info: drained(; connections ended: \d+)?\n/.test(lb.output()));
    await lb.stop();
  }
}

const hashed = (bytes: Buffer) => createHash("sha256").update(bytes).digest("hex");

// ─── Bytes ───

test("bytes pass as they are, and each side may end while the other still speaks", async () => {
  const late = randomBytes(3_000_000), early = randomBytes(3_000_000);
  const slow = await backend("", (visit) => visit.socket.on("end", () => visit.socket.end(late))); // once it has all
  const quick = await backend("", (visit) => visit.socket.end(early)); // and takes what comes after that
  await running([{ servers: [slow.address] }, { servers: [quick.address] }], async (_lb, [one, two]) => {
    const first = await visit(one!);
    first.socket.end(early);
    await over(first);
    assert.equal(hashed(first.got), hashed(late));
    assert.equal(hashed(slow.visits[0]!.got), hashed(early));
    const second = await visit(two!);
    await until("the server's side has ended", () => second.ended);
    assert.equal(hashed(second.got), hashed(early));
    second.socket.end(late);
    await over(second);
    await until("all arrived", () => quick.visits[0]!.ended);
    assert.equal(hashed(quick.visits[0]!.got), hashed(late));
    assert.ok(!first.broken && !second.broken);
  });
  await Promise.all([slow.close(), quick.close()]);
});

test("a client that has nothing to say and ends its side at once hears all that the server says", async () => {
  const server = await backend("", (visit) => visit.socket.on("end", () => visit.socket.end("hello")));
  await running([{ servers: [server.address] }], async (_lb, [port]) => {
    for (let i = 0; i < 20; i++) {
      const end = watched(connect({ port: port!, host: "127.0.0.1", allowHalfOpen: true }).end());
      await over(end);
      assert.equal(text(end), "hello");
    }
  });
  await server.close();
});

test("a slow reader stops a fast writer, both ways, and loses nothing", async () => {
  const SIZE = 64 * 2 ** 20, piece = Buffer.alloc(2 ** 16, 7);
  /** Writes as fast as the socket takes it; gives how much has been written. */
  const flood = (socket: Socket) => {
    let written = 0;
    const go = () => {
      while (written < SIZE) {
        written += piece.length;
        if (!socket.write(piece)) return void socket.once("drain", go);
      }
      socket.end();
    };
    go();
    return () => written;
  };
  const stalls = async (written: () => number) => {
    for (let before = -1; before !== written(); await sleep(500)) before = written();
    assert.ok(written() < SIZE / 2, `${written()} bytes were taken though nobody reads`);
  };
  const drains = async (socket: Socket) => {
    let count = 0;
    socket.on("data", (bytes: Buffer) => count += bytes.length);
    socket.resume();
    await until("all arrives", () => count === SIZE, 30_000);
  };
  let written = () => 0, reader: Socket | undefined;
  const server = createServer({ allowHalfOpen: true, pauseOnConnect: true }, (socket) => reader = socket);
  const talker = createServer((socket) => written = flood(socket));
  for (const one of [server, talker]) await listenLocally(one);
  const at = (one: typeof server) => `127.0.0.1:${(one.address() as AddressInfo).port}`;
  await running([{ servers: [at(server)] }, { servers: [at(talker)] }], async (_lb, [up, down]) => {
    const sender = connect(up!, "127.0.0.1");
    const sent = flood(sender);
    await until("the server is reached", () => reader);
    await stalls(sent);
    await drains(reader!);
    const listener = connect({ port: down!, host: "127.0.0.1" });
    listener.pause();
    await until("it speaks", () => written() > 0);
    await stalls(written);
    await drains(listener);
    for (const socket of [sender, reader!, listener]) socket.destroy();
  });
  for (const one of [server, talker]) await new Promise((resolve) => one.close(resolve));
});

test("a connection that breaks never looks like one that has ended, on either side", async () => {
  const server = await backend("hello");
  await running([{ servers: [server.address] }], async (lb, [port]) => {
    const client = await visit(port!);
    await says(client, "hello");
    server.visits[0]!.socket.resetAndDestroy();
    await over(client);
    assert.ok(client.broken, "the client sees a reset");
    const other = await visit(port!);
    await says(other, "hello");
    other.socket.resetAndDestroy();
    await over(server.visits[1]!);
    assert.ok(server.visits[1]!.broken, "the server sees a reset");
    await until("both are logged", () => / 502 5 .*\n[^]* 499 5 /.test(lb.output()));
  });
  await server.close();
});

test("a client that has sent all and then breaks off is not kept for the server, nor the server for it", async () => {
  const endless = ({ socket }: End) => {
    const saying = setInterval(() => socket.write("still here"), 20);
    socket.on("close", () => clearInterval(saying));
  };
  const server = await backend("", endless);
  await running([{ servers: [server.address] }], async (lb, [port]) => {
    const client = await visit(port!);
    client.socket.end("all");
    await says(client, "still here");
    await until("the server has it all", () => server.visits[0]!.ended);
    client.socket.resetAndDestroy();
    await over(server.visits[0]!);
    assert.equal(text(server.visits[0]!), "all");
    await until("it is logged", () => / 499 \d+ /.test(lb.output()));
  });
  await server.close();
});

// ─── Which server ───

test("each connection goes to the server that the strategy chooses, and keeps it", async () => {
  const [a, b] = await Promise.all([backend("a"), backend("b")]);
  const servers = [a.address, b.address];
  const all = ["round-robin", "ip-hash", "least-connections", "first"].map((strategy) => ({ strategy, servers }));
  await running([...all, { servers: [{ url: a.address, max: 1 }, b.address], strategy: "first" }], async (_, ports) => {
    const seen = async (port: number, count: number) => {
      const ends: End[] = [];
      for (let i = 0; i < count; i++) {
        ends.push(await visit(port));
        await until("it greets", () => text(ends[i]!));
      }
      return ends;
    };
    const names = (ends: End[]) => ends.map(text).join("");
    assert.equal(names(await seen(ports[0]!, 4)), "abab");
    assert.match(names(await seen(ports[1]!, 4)), /^(aaaa|bbbb)$/);
    const open = await seen(ports[2]!, 4);
    assert.equal(names(open), "abab");
    for (const i of [1, 3]) { // b has none left: the next two are its own
      open[i]!.socket.end();
      await over(open[i]!);
    }
    assert.equal(names(await seen(ports[2]!, 2)), "bb");
    assert.equal(names(await seen(ports[3]!, 3)), "aaa");
    assert.equal(names(await seen(ports[4]!, 3)), "abb", "a takes one at a time");
  });
  await Promise.all([a.close(), b.close()]);
});

test("a server that refuses is never the client's problem, and no byte is lost by asking the next", async () => {
  const [a, dead] = await Promise.all([backend("a"), nobody()]);
  const tcp = [{ servers: [dead, a.address] }, { servers: [dead, a.address], retries: 0 }, { servers: [dead] }];
  await running(tcp, async (lb, ports) => {
    for (let i = 0; i < 6; i++) {
      const client = connect(ports[0]!, "127.0.0.1");
      client.write(`early ${i};`);
      await says(watched(client), "a");
    }
    const came = () => a.visits.map(text).sort().join("");
    await until("all that was sent has come", () => came() === [..."012345"].map((i) => `early ${i};`).join(""));
    const without = [await visit(ports[1]!), await visit(ports[1]!)];
    await until("one is cut off, one is not", () => without.some(({ closed }) => closed) && without.some(text));
    const last = await visit(ports[2]!);
    await over(last);
    assert.equal(text(last), "");
    await until("why is logged", () => / 502 0 "-" "-" tcp:0#3 \S+ 2 \S+ connect /.test(lb.output()));
    assert.match(lb.output(), /warn: tcp:0: 127\.0\.0\.1:\d+: .*refused/i);
  });
  await a.close();
});

test("where no server may be asked the connection is cut", async () => {
  const a = await backend("a");
  await running([{ servers: [a.address], max_in_flight: 1 }], async (lb, [port]) => {
    const one = await visit(port!);
    await says(one, "a");
    await over(await visit(port!));
    await until("it is logged", () => / 503 0 "-" "-" tcp:0 - 0 /.test(lb.output()));
    assert.ok(!one.closed);
  });
  await a.close();
});

test("allow and deny know the client's address", async () => {
  const a = await backend("a");
  const denied = { servers: [a.address], deny: ["127.0.0.0/8"] },
    allowed = { servers: [a.address], allow: ["127.0.0.1"] };
  await running([denied, allowed], async (lb, ports) => {
    await over(await visit(ports[0]!));
    await says(await visit(ports[1]!), "a");
    await until("it is logged", () => / 403 0 /.test(lb.output()));
    assert.equal(a.visits.length, 1);
  });
  await a.close();
});

test("a connection on which nothing passes is ended after timeouts.idle, and one on which something does is not", async () => {
  const a = await backend("", (visit) => visit.socket.on("data", (bytes) => visit.socket.write(bytes)));
  await running([{ servers: [a.address], timeouts: { idle: "1s" } }], async (lb, [port]) => {
    const [silent, busy] = [await visit(port!), await visit(port!)];
    for (let i = 0; i < 8; i++) {
      busy.socket.write(".");
      await sleep(200);
    }
    await over(silent);
    assert.ok(silent.broken && !busy.closed && text(busy) === "........");
    await until("it is logged", () => / 504 0 /.test(lb.output()));
  });
  await a.close();
});

test("a process that has stood still reads what has come meanwhile before it ends a connection as idle", async () => {
  const a = await backend("", (visit) => visit.socket.on("data", (bytes) => visit.socket.write(bytes)));
  await running([{ servers: [a.address], timeouts: { idle: "1s" } }], async (lb, [port]) => {
    const one = await visit(port!);
    one.socket.write("a");
    await until("it is there and back", () => text(one) === "a");
    process.kill(lb.pid, "SIGSTOP");
    one.socket.write("b");
    await sleep(2_000);
    process.kill(lb.pid, "SIGCONT");
    await until("the rest is there and back", () => text(one) === "ab");
    await sleep(500);
    assert.ok(!one.closed);
    await over(one);
  });
  await a.close();
});

// ─── Who is connected ───

test("the PROXY protocol tells the server both addresses, byte by byte, in front of all else", async () => {
  const four = await backend(), six = await backend("", endsToo, "::1");
  const tcp = [
    { servers: [four.address], proxy_protocol: true },
    { servers: [six.address], proxy_protocol: true, listen: "[::1]:0" },
  ];
  await running(tcp, async (_, [one, two]) => {
    const signature = [0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a, 0x21];
    const port = (n: number) => [n >> 8, n & 255];
    const check = async (at: number, host: string, server: Backend, head: number[]) => {
      const client = await visit(at, host);
      const own = client.socket.localPort!;
      client.socket.end("and then this");
      await until("the server has it all", () => server.visits[0]?.ended);
      const expected = [...signature, ...head, ...port(own), ...port(at)];
      assert.equal(
        server.visits[0]!.got.toString("hex"),
        Buffer.from([...expected, ...Buffer.from("and then this")]).toString("hex"),
      );
    };
    await check(one!, "127.0.0.1", four, [0x11, 0, 12, 127, 0, 0, 1, 127, 0, 0, 1]);
    const loopback = [...Array(15).fill(0), 1];
    await check(two!, "::1", six, [0x21, 0, 36, ...loopback, ...loopback]);
  });
  await Promise.all([four.close(), six.close()]);
});

test("each connection is one line of the log, when its last byte has passed", async () => {
  const a = await backend("hello");
  for (const log of ["combined", "json"]) {
    await running([{ servers: [a.address], name: "db" }], async (lb, [port]) => {
      const client = await visit(port!);
      await says(client, "hello");
      client.socket.end("hi there");
      await over(client);
      const line = await until("the line", () => /^.*"TCP\b.*$/m.exec(lb.output())?.[0]);
      if (log === "combined") {
        const time = String.raw`\[\d\d/\w{3}/\d{4}:\d\d:\d\d:\d\d \+0000\]`;
        const target = `"TCP tcp://127\\.0\\.0\\.1:${port} -"`;
        return assert.match(
          line,
          new RegExp(`^127.0.0.1 - - ${time} ${target} 200 5 "-" "-" db ${a.address} 1 [\\d.]+/-/[\\d.]+ - \\S+ -$`),
        );
      }
      const { timestamp, "lb.request_id": id, "lb.connected_ms": connected, "lb.ended_ms": ended, ...rest } = JSON
        .parse(
          line,
        );
      assert.ok(Date.parse(timestamp) > 0 && ended >= connected && connected > 0 && id);
      assert.deepEqual(rest, {
        "client.address": "127.0.0.1",
        "http.request.method": "TCP",
        "url.scheme": "tcp",
        "url.original": `tcp://127.0.0.1:${port}`,
        "http.response.status_code": 200,
        "http.request.body.size": 8,
        "http.response.body.size": 5,
        ...{ "lb.route": "db", "lb.service": "db", "lb.server": a.address, "lb.attempts": 1 },
      });
    }, { log });
  }
  await a.close();
});

// ─── Operation ───

test("a reload changes servers and listeners, and leaves open connections alone", async () => {
  const [a, b] = await Promise.all([backend("a"), backend("b")]);
  const free = Number((await nobody()).split(":")[1]), db = { name: "db", health: "off" };
  const first = { ...db, listen: `127.0.0.1:${free}`, servers: [a.address] };
  await running([first], async (lb) => {
    const old = await visit(free);
    await says(old, "a");
    const write = async (tcp: unknown[], times: number) => {
      writeFileSync(lb.file, JSON.stringify({ tcp, listen: "127.0.0.1:0" }));
      await until("it is in force", () => lb.output().split("is in force again").length > times);
    };
    await write([{ ...first, servers: [b.address] }], 1);
    await says(await visit(free), "b");
    await write([{ ...db, listen: "127.0.0.1:0", servers: [b.address] }], 2);
    await until("the new listener is open", () => portsOf(lb).length === 2);
    await says(await visit(portsOf(lb)[1]!), "b");
    await refused(free);
    old.socket.write("still here");
    await says(a.visits[0]!, "still here");
    assert.ok(!old.closed);
    old.socket.destroy();
  });
  await Promise.all([a.close(), b.close()]);
});

test("a listener takes the port of one that a reload closes", async () => {
  const a = await backend("a"), free = Number((await nobody()).split(":")[1]);
  const at = (listen: unknown) => ({ listen, servers: [a.address], health: "off" });
  await running([at(`127.0.0.1:${free}`)], async (lb) => {
    await says(await visit(free), "a");
    writeFileSync(lb.file, JSON.stringify({ tcp: [at(free)], listen: "127.0.0.1:0" }));
    await until("the other one is open", () => lb.output().includes(`0.0.0.0:${free}`));
    await says(await visit(free), "a");
  });
  await a.close();
});

test("a drain lets open connections finish, takes no more, and ends those that are left", async () => {
  const a = await backend("a", (visit) => visit.socket.on("end", () => visit.socket.end("bye")));
  const lb = await startProgram({ tcp: [{ listen: "127.0.0.1:0", servers: [a.address] }] }, ["--drain", "2s"]);
  const [port] = await until("it is open", () => portsOf(lb).length > 0 && portsOf(lb));
  const [one, two] = [await visit(port!), await visit(port!)];
  await says(one, "a");
  await says(two, "a");
  process.kill(lb.pid, "SIGTERM");
  await until("it drains", () => lb.output().includes("draining; requests in flight: 2"));
  await refused(port!);
  one.socket.end();
  await says(one, "bye");
  assert.ok(!two.closed);
  await over(two);
  assert.ok(two.broken);
  await until("it says so", () => /drained; connections ended: 1\n/.test(lb.output()));
  await lb.stop();
  assert.match(lb.output(), / 503 1 "-" "-" tcp:0 /);
  await a.close();
});

test("a listener that cannot be opened ends the program with 1 and the reason", async () => {
  const a = await backend("a");
  await assert.rejects(
    startProgram({ tcp: [{ listen: a.address, servers: ["localhost:1"] }] }),
    /cannot listen on 127\.0\.0\.1:\d+: .*(in use|EADDRINUSE)/i,
  );
  await a.close();
});

// ─── Counts, in this process ───

const NEVER = () => Promise.resolve();

/** A balancer with one TCP service in this process. */
async function inProcess(config: Record<string, unknown>, own: Record<string, Strategy> = {}) {
  const reports: string[] = [];
  const all = JSON.stringify({ tcp: [{ listen: "127.0.0.1:0", name: "db", ...config }] });
  const lb = createLoadBalancer(parseConfig(all, { strategies: own }), {
    accessLog: NEVER,
    report: (level, text) => void reports.push(`${level}: ${text}`),
    strategies: own,
  });
  const listener = createServer(
    { allowHalfOpen: true },
    (socket) => relayTcp(lb.balancer, "127.0.0.1:0", "127.0.0.1:0", socket),
  );
  await listenLocally(listener);
  const service = lb.balancer.table.services.get("db")!;
  const settled = () =>
    until(
      "every pick is settled",
      () =>
        [lb.balancer, service, ...service.servers].every(({ inFlight }) => inFlight === 0) && !lb.balancer.relays.size,
    );
  const { port } = listener.address() as AddressInfo;
  return { lb, reports, service, settled, port, close: () => new Promise((resolve) => listener.close(resolve)) };
}

test("what is in flight is counted, and counts return to 0 however a connection ends", async () => {
  const [a, dead] = await Promise.all([
    backend("a"),
    nobody(),
  ]);
  const { service, lb, settled, port, close } = await inProcess({ servers: [a.address, dead], eject: "off" });
  const ends: ((end: End, i: number) => unknown)[] = [
    ({ socket }) => socket.end(),
    ({ socket }) => socket.destroy(),
    ({ socket }) => socket.resetAndDestroy(),
    (_, i) => a.visits[i]!.socket.end(),
    (_, i) => a.visits[i]!.socket.destroy(),
    (_, i) => a.visits[i]!.socket.resetAndDestroy(),
    () => [...lb.balancer.relays].at(-1)!(),
  ];
  for (const [i, end] of ends.entries()) {
    const client = await visit(port);
    await says(client, "a");
    const { inFlight, picks, name } = service.servers[0]!;
    assert.deepEqual([inFlight, picks, name], [1, i + 1, a.address]);
    assert.deepEqual([service.inFlight, lb.balancer.inFlight, service.servers[1]!.inFlight], [1, 1, 0]);
    end(client, i);
    if (client.ended) client.socket.end();
    await until("the client's side has ended", () => client.ended || client.closed || client.socket.writableEnded);
    client.socket.end();
    await settled();
  }
  for (let i = 0; i < 5; i++) connect(port, "127.0.0.1").on("error", () => {}).destroy(); // left before anything began
  await settled();
  await close();
  await a.close();
});

test("probes connect, failed connections eject, and the service is seen like any other", async () => {
  const [a, dead] = await Promise.all([backend("a"), nobody()]);
  const { lb, service, reports, settled, port, close } = await inProcess({
    servers: [dead, a.address],
    health: { fall: 1, rise: 1 },
    eject: { failures: 2 },
    timeouts: { connect: "2s" },
  });
  for (let i = 0; i < 4; i++) {
    const client = await visit(port);
    await says(client, "a");
    client.socket.destroy();
  }
  assert.ok(reports.some((line) => /^warn: db: .* is ejected for 30 s after 2 failures in a row/.test(line)));
  await lb.probe();
  assert.deepEqual(service.servers.map(({ up }) => up), [false, true]);
  assert.ok(service.servers[1]!.latency > 0, "least-response-time has the time to connect");
  await settled();
  await close();
  await a.close();
});

test("a server that accepts and resets at once counts as failing", async () => {
  const a = await backend("", ({ socket }) => socket.resetAndDestroy());
  const { service, settled, port, close } = await inProcess({ servers: [a.address], health: "off", retries: 0 });
  for (let i = 1; i <= 3; i++) {
    const client = await visit(port);
    await over(client);
    await settled();
    assert.equal(service.servers[0]!.failures, i);
  }
  await close();
  await a.close();
});

test("a strategy of one's own chooses for connections too: there is no request then, and one that throws costs one", async () => {
  const a = await backend("a");
  const draws: PickInput[] = [];
  const mine: Strategy = (candidates, draw) => {
    if (draws.push(draw) > 1) throw new Error("no more");
    return candidates[0];
  };
  const { reports, settled, port, close } = await inProcess({ servers: [a.address], strategy: "mine" }, { mine });
  const client = await visit(port);
  await says(client, "a");
  assert.deepEqual([draws[0]!.request, draws[0]!.client, draws[0]!.turn], [undefined, "127.0.0.1", 0]);
  await over(await visit(port));
  assert.ok(reports.some((line) => /^error: Error: no more/.test(line)));
  client.socket.destroy();
  await settled();
  await close();
  await a.close();
});

// ─── The file ───

const TCP = "tcp: [{ listen: 5432, servers: [a:1], ";
for (
  const [name, file, ...expected] of [
    [
      "cookies",
      `${TCP}strategy: { hash: { cookie: x } } }]`,
      "tcp[0].strategy: there is no request whose parts could be hashed; {hash: {client: true}} works",
    ],
    [
      "compression",
      `${TCP}compress: true }]`,
      "tcp[0].compress: is for requests: tcp passes bytes as they are, and knows of none",
    ],
    ["cors", `${TCP}cors: {} }]`, "tcp[0].cors: is for requests: tcp passes bytes as they are, and knows of none"],
    [
      "conditions",
      `${TCP}retry_on: [] }]`,
      "tcp[0].retry_on: is for requests: tcp passes bytes as they are, and knows of none",
    ],
    ["hosts", `${TCP}host: a }]`, "tcp[0].host: is for requests: tcp passes bytes as they are, and knows of none"],
    [
      "response times",
      `${TCP}timeouts: { response: 1s } }]`,
      "tcp[0].timeouts.response: is for requests: tcp passes bytes as they are, and knows of none",
    ],
    ["misspelt keys", `${TCP}stratgy: first }]`, 'tcp[0].stratgy: unknown key; did you mean "strategy"?'],
    [
      "unknown strategies",
      `${TCP}strategy: frist }]`,
      'tcp[0].strategy: "frist" is not a strategy (round-robin, first, random, two-choices, least-connections, least-response-time, peak-ewma, ip-hash); did you mean "first"?',
    ],
    [
      "TLS",
      "tcp: [{ listen: 1, servers: ['https://a:1', b:1] }]",
      'tcp[0].servers[0]: "https://a:1" speaks TLS: tcp passes bytes as they are, and adds none',
    ],
    ["a missing listener", "tcp: [{ servers: [a:1] }]", "tcp[0]: listen is missing"],
    [
      "a taken port",
      `listen: [5432]\ndefault: { servers: [a:1] }\n${TCP}}]`,
      "tcp[0].listen: 5432 is listened on already",
    ],
    [
      "a taken name",
      `${TCP}name: x }, { listen: 1, name: x, servers: [a:1] }]`,
      'tcp[1].name: "x" names another service already',
    ],
    ["routes and no listener", "listen: []\ndefault: { servers: [a:1] }", "listen: is empty: nobody could ask"],
  ]
) {
  test(`tcp refuses ${name}`, () => {
    assert.throws(() => parseConfig(file!), (error: unknown) => {
      assert.ok(error instanceof ConfigError);
      assert.deepEqual(error.mistakes.map(({ path, message }) => `${path}: ${message}`), expected);
      return true;
    });
    return Promise.resolve();
  });
}

const plain = (host: string, port: number) => ({ host, port, tls: [], client_ca: "", h2c: false });

test("defaults hold for tcp as far as they fit, and who has only tcp needs no other listener", () => {
  const { services, tcp, listen, source } = parseConfig(`
defaults: { retries: 4, compress: true, timeouts: { response: 1s, idle: 9s }, strategy: { hash: { header: x } } }
tcp:
  - { listen: [5432, "[::1]:5432"], servers: [a:1], timeouts: { connect: 1s } }
  - { listen: "127.0.0.1:5432", servers: [a:1], retries: 0, name: db, proxy_protocol: true, allow: 10.0.0.0/8 }
`);
  assert.deepEqual(listen, []);
  assert.deepEqual(
    tcp,
    [
      {
        ...{ listen: [plain("", 5432), plain("[::1]", 5432)], name: "tcp:5432" },
        ...{ proxy_protocol: false, allow: [], deny: [] },
      },
      {
        listen: [plain("127.0.0.1", 5432)],
        name: "db",
        proxy_protocol: true,
        allow: ["10.0.0.0/8"],
        deny: [],
      },
    ].map((one, i) => ({ ...tcp[i], ...one })),
  );
  const { retries, timeouts, compress } = services.get("tcp:5432")!;
  assert.deepEqual({ retries, timeouts, compress }, {
    retries: 4,
    timeouts: { connect: 1_000, response: 60_000, idle: 9_000, request: Infinity },
    compress: false,
  });
  assert.equal(services.get("db")!.retries, 0);
  assert.deepEqual(parseConfig(JSON.stringify(source)).services, services);
  return Promise.resolve();
});
