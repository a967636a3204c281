// WebSockets and other protocols that connections switch to, through the running program: what passes, what is refused,
// and how they end.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { createHash, randomBytes } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { type AddressInfo, connect, createServer, type Socket } from "node:net";
import process from "node:process";
import { after, before } from "node:test";
import { Hono } from "hono";
import { createLoadBalancer, parseConfig, serve } from "../../lb.ts";
import {
  BINARY,
  CLOSE,
  closing,
  echoStrictly,
  encode,
  type Frame,
  handshake,
  openWebSocket,
  type Peer,
  PING,
  PONG,
  TEXT,
  type WebSocketServer,
  webSocketServer,
} from "../rig/websocket.ts";
import {
  answer,
  get,
  listenLocally,
  patience,
  type Program,
  rawRequest,
  resetConnection,
  scriptedServer,
  sleep,
  startProgram,
  status,
  test,
  until,
  value,
} from "../rig/rig.ts";

// ─── The recorded cases ───

type Payload = { b64: string } | { fill: string; len: number };
type Action = Payload & {
  t: number;
  do: "frame" | "kill" | "close" | "raw";
  opcode: number;
  fin?: boolean;
  rsv?: number;
  chop?: number;
};
type Expected = ["message", Payload, boolean] | ["pong", Payload] | ["timeout", unknown];
interface Case {
  id: string;
  actions: Action[];
  expected: Record<string, Expected[]>;
  expectedClose: {
    closedByMe: boolean;
    closeCode: number[];
    requireClean: boolean;
    closedByWrongEndpointIsFatal?: boolean;
  };
  suppressClose: boolean;
}
const { cases } = JSON.parse(readFileSync(new URL("../data/websocket-cases.json", import.meta.url), "utf8")) as {
  cases: Case[];
};

const bytesOf = (one: Payload) =>
  "b64" in one ? Buffer.from(one.b64, "base64") : Buffer.alloc(one.len, parseInt(one.fill, 16));

/** Plays a case: what is wrong with what comes back, or nothing. */
async function play(port: number, { id, actions, expected, expectedClose, suppressClose }: Case): Promise<string> {
  const peer = await openWebSocket(port);
  const got: string[] = [];
  const all = Object.entries(expected).map(([kind, list]) => ({
    kind,
    text: list.map((one) => one[0] === "timeout" ? one : [one[0], bytesOf(one[1]).toString("base64"), ...one.slice(2)])
      .map((one) => JSON.stringify(one)).join(),
  }));
  let closer = "", clean = false, code: number | undefined, dropped = false, parts: Buffer[] = [], kind = 0;
  const timers: ReturnType<typeof setTimeout>[] = [];
  const later = (seconds: number, what: () => void) => void timers.push(setTimeout(what, seconds * 1000));
  const drop = () => {
    dropped ||= !peer.over;
    peer.socket.destroy();
    peer.over = true;
  };
  const end = (payload: Buffer) => {
    if (closer) return;
    closer = "us";
    peer.send(CLOSE, payload);
    later(patience(3), drop);
  };
  const take = (what: unknown[]) => {
    got.push(JSON.stringify(what));
    const complete = all.every(({ text }) => text === got.join());
    if (complete && expectedClose.closedByMe && !suppressClose) end(closing(expectedClose.closeCode[0]!));
  };
  peer.onFrame = ({ fin, rsv, opcode, masked, payload }: Frame) => {
    if (rsv || masked) return end(closing(1002));
    if (opcode === CLOSE) {
      code = payload.length > 1 ? payload.readUInt16BE() : undefined;
      clean = true;
      if (!closer) peer.send(CLOSE, payload.subarray(0, 2));
      closer ||= "them";
      later(patience(1), drop);
    } else if (opcode === PING || opcode === PONG) {
      take([opcode === PING ? "ping" : "pong", payload.toString("base64")]);
    } else {
      kind = opcode || kind;
      parts.push(payload);
      if (!fin) return;
      const message = Buffer.concat(parts).toString("base64");
      parts = [];
      take(["message", message, kind === BINARY]);
    }
  };
  const marks = (expected["NON-STRICT"] ?? []).filter(([what]) => what === "timeout");
  let turn: Promise<void> = Promise.resolve(); // of those who write
  const write = (bytes: Buffer, chop = bytes.length) =>
    turn = turn.then(async () => {
      for (let at = 0; at < bytes.length && !peer.over; at += chop) {
        peer.socket.write(bytes.subarray(at, at + chop));
        if (chop < bytes.length) await new Promise((resolve) => setImmediate(resolve));
      }
    });
  const act = (action: Action) => {
    if (action.do === "kill") return closer ? drop() : end(closing(1001));
    if (action.do === "close") return end(bytesOf(action));
    if (action.do === "raw") return void write(bytesOf(action));
    const { fin = true, rsv = 0 } = action;
    write(encode(action.opcode, bytesOf(action), { fin, rsv, mask: true }), action.chop);
  };
  for (const [t, group] of Map.groupBy(actions, (action) => action.t)) {
    later(t, () => {
      if (peer.over) return;
      const mark = t > 0 && !closer && group.some((one) => one.do === "frame") ? marks.shift() : undefined;
      if (mark) got.push(JSON.stringify(mark));
      group.forEach(act);
    });
  }
  await until(`case ${id} ends`, () => peer.over, 30_000);
  timers.forEach(clearTimeout);
  if (/^7\.13\.|^7\.1\.6$/.test(id)) return ""; // only to inform
  if (!all.some(({ text }) => text === got.join())) return `came: ${got.join().slice(0, 200)}`;
  if (dropped) return "the connection does not end";
  if (expectedClose.closedByMe !== (closer === "us")) return `closed by ${closer || "nobody"}`;
  if (expectedClose.requireClean && !clean) return "no close frame";
  if (code !== undefined && !expectedClose.closeCode.includes(code)) return `close code ${code}`;
  return "";
}

// ─── One program, one server that echoes, one whose doings tests decide ───

/** A duration for a config, in which the test has something to do: longer, the more others use the machine. */
const soon = (milliseconds: number) => `${Math.round(patience(milliseconds))}ms`;

let echo: WebSocketServer, own: WebSocketServer, program: Program;

const config = () => ({
  routes: [
    // What is said of bodies is not said of what comes behind a 101.
    { path: "/own", servers: [own.address], body_limit: 1_000, compress: true },
    { path: "/brief", servers: [own.address], timeouts: { idle: soon(300) } },
  ],
  default: { servers: [echo.address] },
});

before(async () => {
  [echo, own] = [await webSocketServer(echoStrictly), await webSocketServer()];
  program = await startProgram(config());
});
after(async () => {
  await Promise.all([program.stop(), other?.then((lb) => lb.stop())]);
  await Promise.all([echo.close(), own.close()]);
});

let other: Promise<Program> | undefined;
/** A second program with this config, as if it had begun with it; the next test takes it over. */
async function configured(config: Record<string, unknown>): Promise<Program> {
  const lb = await (other ??= startProgram({ default: { respond: {} } }, ["--admin", "127.0.0.1:0"]));
  const from = lb.output().length;
  await lb.reload(config);
  return { ...lb, output: () => lb.output().slice(from), stop: () => Promise.resolve(0) };
}

test(
  `${cases.length} recorded cases of RFC 6455 come out as the standard says`,
  { timeout: 60_000 },
  async () => {
    const wrong: string[] = [], left = [...cases];
    await Promise.all(Array.from({ length: 24 }, async () => {
      for (let one; (one = left.shift());) {
        const problem = await play(program.port, one);
        if (problem) wrong.push(`${one.id}: ${problem}`);
      }
    }));
    assert.deepEqual(wrong.sort(), []);
  },
);

// ─── What passes ───

/** All bytes that come from now on. */
function received(socket: Socket): () => Buffer {
  const pieces: Buffer[] = [];
  socket.on("data", (bytes: Buffer) => pieces.push(bytes));
  return () => Buffer.concat(pieces);
}

/** A WebSocket to the server whose doings tests decide: its two ends. */
async function open(path = "/own", headers = "") {
  const before = own.peers.length;
  const client = await openWebSocket(program.port, path, headers);
  return { client, server: await until("the server's end is open", () => own.peers[before]), head: own.heads[before]! };
}

test("text, binary and fragments come back as they went, up to 1 MiB", async () => {
  const client = await openWebSocket(program.port);
  const long = randomBytes(1 << 20),
    messages: [number, Buffer][] = [
      [TEXT, Buffer.from("grüße, \u{1f600}\0")],
      [BINARY, Buffer.alloc(0)],
      [BINARY, randomBytes(125)],
      [BINARY, randomBytes(126)],
      [BINARY, randomBytes(65_536)],
      [TEXT, Buffer.from(long.toString("base64").slice(0, 1 << 20))],
      [BINARY, long],
    ];
  for (const [opcode, payload] of messages) client.send(opcode, payload);
  client.send(TEXT, "one, ", { fin: false });
  client.send(PING, "between");
  client.send(0, "two", { fin: true });
  const isPong = ({ opcode }: Frame) => opcode === PONG, [pongs, rest]: [Frame[], Frame[]] = [[], []];
  client.onFrame = (frame) => (isPong(frame) ? pongs : rest).push(frame);
  await until("all have come back", () => rest.length > messages.length && pongs.length);
  for (const [i, [opcode, payload]] of messages.entries()) {
    const frame = rest[i]!;
    assert.deepEqual([frame.opcode, frame.fin, frame.payload.length], [opcode, true, payload.length]);
    assert.ok(frame.payload.equals(payload), `message ${i}`);
  }
  const joined = rest.at(-1)!;
  assert.deepEqual([joined.opcode, joined.payload.toString()], [TEXT, "one, two"]);
  assert.deepEqual(pongs.map(({ payload }) => payload.toString()), ["between"]);
  client.onFrame = undefined;
  client.close(1000);
  assert.deepEqual(await client.closed(), [1000, ""]);
});

test("fragments arrive as they were sent, and a ping between them", async () => {
  const { client, server } = await open();
  for (const [from, to] of [[server, client], [client, server]] as const) {
    from.send(BINARY, "one, ", { fin: false });
    from.send(0, "", { fin: false });
    from.send(0, "two, ", { fin: false });
    from.send(PING, "between");
    from.send(0, "three");
    await to.frame(4);
    assert.deepEqual(to.frames.map(({ fin, opcode, payload }) => [fin, opcode, `${payload}`]), [
      [false, BINARY, "one, "],
      [false, 0, ""],
      [false, 0, "two, "],
      [true, PING, "between"],
      [true, 0, "three"],
    ]);
  }
  client.socket.destroy();
});

test("many messages in one piece, and one message in many pieces, arrive in their order", async () => {
  const { client, server } = await open();
  const frames = Array.from({ length: 500 }, (_, i) => encode(TEXT, `${i}`.repeat(i), { mask: true }));
  const bytes = Buffer.concat(frames);
  client.socket.write(bytes);
  await until("all have come", () => server.frames.length === 500);
  assert.ok(server.frames.every(({ payload }, i) => payload.toString() === `${i}`.repeat(i)));
  const back = Buffer.concat(server.frames.map(({ payload }) => encode(TEXT, payload)));
  for (let at = 0; at < back.length; at += 997) {
    server.socket.write(back.subarray(at, at + 997));
    await new Promise((resolve) => setImmediate(resolve));
  }
  await until("all have come back", () => client.frames.length === 500);
  assert.ok(client.frames.every(({ payload }, i) => payload.toString() === `${i}`.repeat(i)));
  client.socket.destroy();
});

test("bytes arrive as they were sent: masks of the client too, and none from the server", async () => {
  const { client, server } = await open();
  const [up, down] = [received(server.socket), received(client.socket)];
  const [sent, back] = [encode(TEXT, "same", { mask: true }), encode(TEXT, "back")];
  client.socket.write(Buffer.concat([sent, sent]));
  await server.frame(1);
  assert.deepEqual(up(), Buffer.concat([sent, sent]));
  assert.ok(server.frames.every(({ masked }) => masked));
  server.socket.write(back);
  assert.equal((await client.frame(0)).masked, false);
  assert.deepEqual(down(), back);
  client.socket.destroy();
});

test("pings are answered once, by the other end", async () => {
  const { client, server } = await open();
  const echoed = await openWebSocket(program.port);
  for (const text of ["a", "b", "c"]) echoed.send(PING, text);
  echoed.send(TEXT, "end");
  await until("the message comes back", () => echoed.frames.some(({ opcode }) => opcode === TEXT));
  await sleep(50);
  const pongs = echoed.frames.filter(({ opcode }) => opcode === PONG).map(({ payload }) => payload.toString());
  assert.deepEqual(pongs, ["a", "b", "c"]);
  client.send(PING, "hello");
  client.send(TEXT, "behind");
  await until("the message comes", () => server.frames.some(({ opcode }) => opcode === TEXT));
  assert.deepEqual(server.frames.map(({ opcode }) => opcode), [PING, TEXT]);
  server.send(PING, "there?");
  const ping = await client.frame(0);
  assert.deepEqual([ping.opcode, ping.payload.toString()], [PING, "there?"]);
  client.send(PONG, ping.payload);
  const pong = await server.frame(2);
  assert.deepEqual([pong.opcode, pong.payload.toString(), pong.masked], [PONG, "there?", true]);
  await sleep(50);
  assert.deepEqual([client.frames.length, server.frames.length], [1, 3]);
  for (const { socket } of [client, echoed]) socket.destroy();
});

test("the handshake passes with its headers, both ways, and names those that it came through", async () => {
  own.answer = () =>
    "Sec-WebSocket-Protocol: chat\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nX-Own: \xe9\r\nConnection: x-hop\r\nX-Hop: 1\r\nDate: then\r\n";
  try {
    const headers =
      "Origin: https://x.test\r\nCookie: c=3\r\nSec-WebSocket-Protocol: soap,chat\r\nX-Forwarded-For: 6.6.6.6\r\n";
    const { client, head } = await open("/own/room?id=1", headers);
    assert.match(head, /^GET \/own\/room\?id=1 HTTP\/1\.1\r\n/);
    for (
      const line of ["host: a.test", "origin: https://x.test", "cookie: c=3", "sec-websocket-protocol: soap,chat"]
    ) {
      assert.ok(head.toLowerCase().includes(`${line}\r\n`), line);
    }
    assert.match(head, /^x-forwarded-for: 127\.0\.0\.1\r$/im);
    assert.match(head, /^via: 1\.1 lb-/im);
    for (const line of ["sec-websocket-protocol: chat", "set-cookie: a=1", "set-cookie: b=2", "x-own: \xe9"]) {
      assert.ok(client.head.toLowerCase().includes(`${line}\r\n`), `${line} in ${client.head}`);
    }
    assert.equal(
      client.head.match(/^(sec-websocket-(accept|protocol)|upgrade|connection):/gim)?.length,
      4,
      client.head,
    );
    assert.doesNotMatch(client.head, /x-hop/i);
    assert.equal(client.head.match(/^date:/gim)?.length, 1, client.head);
    client.socket.destroy();
  } finally {
    own.answer = () => "";
  }
});

test("a handshake is one however it is spelt", async () => {
  const spelt = [
    ["Connection: keep-alive, Upgrade", "Upgrade: websocket"], // Firefox
    ["connection: upgrade", "upgrade: WebSocket"],
    ["Connection: foo\r\nConnection: UPGRADE", "UPGRADE: WEBSOCKET"],
  ] as const;
  for (const [connection, upgrade] of spelt) {
    const head = handshake("/own").replace("Connection: Upgrade", connection).replace("Upgrade: websocket", upgrade);
    const socket = connect(program.port, "127.0.0.1"), got = received(socket), before = own.peers.length;
    socket.write(head);
    await until("it is answered", () => got().includes("\r\n\r\n"));
    assert.match(got().toString(), /^HTTP\/1\.1 101 /);
    socket.write(encode(TEXT, "up", { mask: true }));
    assert.equal((await own.peers[before]!.frame(0)).payload.toString(), "up");
    socket.destroy();
  }
});

test("extensions are between the two ends: what is offered, what is agreed, and frames that use it", async () => {
  const agreed = "permessage-deflate; server_no_context_takeover";
  own.answer = () => `Sec-WebSocket-Extensions: ${agreed}\r\n`;
  try {
    const offer = "permessage-deflate; client_max_window_bits, x-own";
    const { client, server, head } = await open("/own", `Sec-WebSocket-Extensions: ${offer}\r\n`);
    assert.ok(head.includes(`Sec-WebSocket-Extensions: ${offer}\r\n`), head);
    assert.ok(client.head.includes(`Sec-WebSocket-Extensions: ${agreed}\r\n`), client.head);
    for (const [from, to] of [[client, server], [server, client]] as const) {
      from.send(TEXT, "\xca\x48", { rsv: 4 });
      const { rsv, opcode, payload } = await to.frame(0);
      assert.deepEqual([rsv, opcode, payload.toString()], [4, TEXT, "\xca\x48"]);
    }
    client.socket.destroy();
  } finally {
    own.answer = () => "";
  }
});

test("what a server sends right behind its 101 is not lost, nor what a client sends before it", async () => {
  own.on = (peer) => void peer.send(TEXT, "first");
  try {
    const { client, server } = await open();
    assert.equal((await client.frame(0)).payload.toString(), "first");
    client.socket.destroy();
    await until("the server's end is over", () => server.over);
  } finally {
    own.on = () => {};
  }
  const socket = connect(program.port, "127.0.0.1"), before = own.peers.length;
  socket.write(Buffer.concat([Buffer.from(handshake("/own")), encode(TEXT, "early", { mask: true })]));
  const server = await until("the server's end is open", () => own.peers[before]);
  assert.equal((await server.frame(0)).payload.toString(), "early");
  socket.destroy();
});

// ─── How it ends ───

test("close codes and reasons pass, whoever closes", async () => {
  for (
    const [code, reason] of [[1000, ""], [1001, "away"], [3000, "x".repeat(123)], [4999, "grüße"], [1005, ""]] as const
  ) {
    const one = await open();
    one.client.close(code === 1005 ? undefined : code, reason);
    assert.deepEqual(await one.server.closed(), [code, reason], "by the client");
    one.server.send(CLOSE, one.server.frames[0]!.payload);
    one.server.socket.end();
    assert.deepEqual(await one.client.closed(), [code, reason]);
    const other = await open();
    other.server.close(code === 1005 ? undefined : code, reason);
    assert.deepEqual(await other.client.closed(), [code, reason], "by the server");
    other.client.send(CLOSE, other.client.frames[0]!.payload);
    assert.equal((await other.server.closed())[0], code, "the client's answer");
    other.server.socket.end();
    await until("both have ended", () => other.client.over && other.server.over);
  }
});

test("a client that has gone takes its server's connection with it", async () => {
  for (const leave of ["destroy", "end", "resetAndDestroy"] as const) {
    const { client, server } = await open();
    client.socket[leave]();
    await until(`the server's end is over after ${leave}`, () => server.over);
    assert.deepEqual(server.frames, []);
  }
});

test("a server that has gone takes the client's connection with it, behind all that it had sent", async () => {
  for (const leave of ["end", "resetAndDestroy"] as const) {
    const { client, server } = await open();
    server.send(BINARY, randomBytes(300_000));
    server.send(TEXT, "last");
    if (leave === "resetAndDestroy") await client.frame(1); // a reset overtakes what is on its way
    server.socket[leave]();
    assert.deepEqual((await client.closed())[0], 1006);
    assert.deepEqual(client.frames.slice(0, 2).map(({ payload }) => payload.length), [300_000, 4]);
    await until("the client's end is over", () => client.over);
  }
});

test("silence ends a WebSocket with 1001 on both sides; whoever speaks stays", async () => {
  const [silent, lively] = [await open("/brief"), await open("/brief")];
  const talk = setInterval(() => lively.client.send(TEXT, "I am here"), 50);
  try {
    assert.deepEqual(await silent.client.closed(), [1001, ""]);
    assert.deepEqual(await silent.server.closed(), [1001, ""]);
    silent.client.close(1001); // as a client does
    await until("both ends are over", () => silent.client.over && silent.server.over);
    assert.deepEqual([lively.client.over, lively.server.over], [false, false]);
  } finally {
    clearInterval(talk);
    lively.client.socket.destroy();
  }
});

test("1001 comes between frames, however these were cut", async () => {
  const bytes = (mask: boolean) =>
    Buffer.concat([0, 1, 125, 126, 127, 65_535, 65_536].flatMap((length, i) => [
      encode(i % 2 ? BINARY : 0, randomBytes(length), { mask, fin: i % 3 > 0 }),
      encode(PING, "", { mask }),
    ]));
  for (const size of [1, 2, 3, 7, 1 << 20]) {
    const { client, server } = await open("/brief");
    const [up, down] = [bytes(true), bytes(false)];
    for (let at = 0, end = 0; at < up.length; at = end) {
      end = at < 1_000 ? at + size : up.length;
      client.socket.write(up.subarray(at, end));
      server.socket.write(down.subarray(at, end));
      await new Promise((resolve) => setImmediate(resolve));
    }
    assert.deepEqual([await client.closed(), await server.closed()], [[1001, ""], [1001, ""]], `by ${size} bytes`);
    assert.deepEqual([client.frames.length, server.frames.length], [15, 15]);
    client.socket.destroy();
  }
});

test("nothing comes behind a close frame", async () => {
  const { client, server } = await open("/brief"), up = received(server.socket);
  const farewell = encode(CLOSE, closing(1000), { mask: true });
  client.socket.write(farewell); // which the server leaves unanswered
  assert.deepEqual(await client.closed(), [1001, ""]);
  await until("the server's end is over", () => server.over);
  assert.deepEqual(up(), farewell);
});

test("in the middle of a frame there is no room for 1001: that side just ends", async () => {
  for (const half of [encode(BINARY, "x".repeat(200)).subarray(0, 100), Buffer.from([0x82, 126, 0])]) {
    const { client, server } = await open("/brief"), down = received(client.socket);
    server.socket.write(half);
    await until("the client's end is over", () => client.over);
    assert.deepEqual(down(), half);
    assert.deepEqual(await server.closed(), [1001, ""]);
    const other = await open("/brief"), up = received(other.server.socket);
    other.client.socket.write(half);
    await until("the server's end is over", () => other.server.over);
    assert.deepEqual(up(), half);
    assert.deepEqual(await other.client.closed(), [1001, ""]);
  }
});

test("frames that are against the RFC are the other end's matter", async () => {
  const bad: [string, Buffer][] = [
    ["masked", encode(TEXT, "a", { mask: true })],
    ["not masked", encode(TEXT, "a")],
    ["with a reserved bit", encode(TEXT, "a", { rsv: 4 })],
    ["of an unknown kind", encode(3, "a")],
    ["of an unknown control kind", encode(11, "")],
    ["that continue nothing", encode(0, "a")],
    ["that begin anew", Buffer.concat([encode(TEXT, "a", { fin: false }), encode(TEXT, "b")])],
    ["that cut a ping", encode(PING, "a", { fin: false })],
    ["with a ping too long", encode(PING, "a".repeat(126))],
    ["with half a code", encode(CLOSE, "a")],
    ["with a code that must not be sent", encode(CLOSE, closing(1006))],
    ["with text that is none", encode(TEXT, Buffer.from([0xc3, 0x28]))],
    ["with a reason that is no text", encode(CLOSE, Buffer.from([0x03, 0xe8, 0xff]))],
    ["without an end", Buffer.from([0x82, 127, 0, 0, 0x10, 0, 0, 0, 0, 0])],
    ["longer than can be", Buffer.from([0x82, 127, ...Array(8).fill(255), 1, 2, 3])],
  ];
  for (const [name, bytes] of bad) {
    for (const side of ["client", "server"] as const) {
      const ends = await open(), { client, server } = ends, got = received(ends[side].socket);
      ends[side === "client" ? "server" : "client"].socket.write(bytes);
      await until(`frames ${name} come`, () => got().length >= bytes.length);
      assert.deepEqual(got(), bytes, name);
      await sleep(20);
      assert.deepEqual([client.over, server.over], [false, false], name);
      client.socket.destroy();
      await until("the server's end is over", () => server.over);
    }
  }
});

// ─── The handshake ───

test("a server's refusal reaches the client as it is, and nothing that follows it reaches the server", async () => {
  const plain = await scriptedServer((visit) =>
    visit.send(answer("no", "X-Why: because\r\nSet-Cookie: a=1\r\n", "401 Unauthorized"))
  );
  const lb = await configured({ default: { servers: [plain.address] } });
  try {
    for (
      const line of [
        "401 Unauthorized",
        "403 Forbidden",
        "404 Not Found",
        "426 Upgrade Required",
        "302 Found",
        "200 OK",
      ]
    ) {
      plain.reset((visit) =>
        visit.send(answer(`body of ${line}`, `X-Why: because\r\nSet-Cookie: a=1\r\nLocation: /there\r\n`, line))
      );
      const next = "GET /smuggled HTTP/1.1\r\nHost: a.test\r\n\r\n", garbage = encode(BINARY, next, { mask: true });
      const answered = (socket: Socket) => new Promise((resolve) => socket.once("data", resolve));
      await rawRequest(lb.port, Buffer.concat([Buffer.from(handshake("/")), garbage, Buffer.from(next)]));
      const { answers } = await rawRequest(lb.port, [handshake("/"), answered, garbage, next]);
      const [first] = answers;
      assert.equal(status(first!), parseInt(line));
      assert.deepEqual([value(first!, "x-why"), value(first!, "set-cookie"), value(first!, "location")], [
        "because",
        "a=1",
        "/there",
      ]);
      assert.equal(first!.body.toString(), `body of ${line}`);
      assert.ok(
        plain.requests.every((one) => one.start === "GET / HTTP/1.1"),
        "only the handshake has reached the server",
      );
      assert.equal(value(plain.requests[0]!, "upgrade").toLowerCase(), "websocket");
    }
  } finally {
    await lb.stop();
    await plain.close();
  }
});

test("a server that is down, or dies before it has answered, is not the client's problem", async () => {
  const dead = await scriptedServer(() => {}), mute = await scriptedServer((visit) => resetConnection(visit));
  const { address } = dead;
  await dead.close();
  const lb = await configured({
    default: { servers: [address, mute.address, echo.address], retries: 2, health: "off" },
  });
  try {
    for (let i = 0; i < 6; i++) {
      const client = await openWebSocket(lb.port);
      client.send(TEXT, `${i}`);
      assert.equal((await client.frame(0)).payload.toString(), `${i}`);
      client.socket.destroy();
    }
  } finally {
    await lb.stop();
    await mute.close();
  }
});

test("a 101 that does not fit the request is an invalid answer", async () => {
  const head = "HTTP/1.1 101 Switching Protocols\r\n", up = "Connection: Upgrade\r\nUpgrade: websocket\r\n";
  const wrong: Record<string, (accept: string) => string> = {
    "another key's proof": () => `${head}${up}Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n`,
    "no proof": () => `${head}${up}`,
    "another protocol": (accept) => `${head}Connection: Upgrade\r\nUpgrade: h2c\r\nSec-WebSocket-Accept: ${accept}\r\n`,
    "no Connection": (accept) => `${head}Upgrade: websocket\r\nSec-WebSocket-Accept: ${accept}\r\n`,
    "a subprotocol that nobody offered": (accept) =>
      `${head}${up}Sec-WebSocket-Accept: ${accept}\r\nSec-WebSocket-Protocol: chat\r\n`,
    "two protocols": (accept) =>
      `${head}Connection: Upgrade\r\nUpgrade: foo, websocket\r\nSec-WebSocket-Accept: ${accept}\r\n`,
  };
  const lb = await configured({ default: { servers: [own.address], eject: "off", retries: 0 } });
  try {
    for (const [name, answer] of Object.entries(wrong)) {
      own.answer = (_, accept) => answer(accept);
      const { answers } = await rawRequest(lb.port, handshake("/"));
      assert.deepEqual(
        answers.map((one) => [status(one), value(one, "x-lb-failure")]),
        [[502, "invalid-answer"]],
        name,
      );
    }
  } finally {
    own.answer = () => "";
    await lb.stop();
  }
});

test("what is not a whole handshake is plain HTTP", async () => {
  const plain = await scriptedServer((visit) => visit.send(answer("plain")));
  const lb = await configured({ default: { servers: [plain.address] } });
  const asks = {
    "no Connection": handshake("/").replace("Connection: Upgrade\r\n", "Connection: close\r\n"),
    "no key": handshake("/").replace(/Sec-WebSocket-Key.*\r\n/, ""),
    "half a key": handshake("/", "", "AAAA"),
    "POST": handshake("/").replace("GET", "POST"),
    "HTTP/1.0": handshake("/").replace("HTTP/1.1", "HTTP/1.0"),
    "two protocols": handshake("/").replace("websocket", "websocket, foo"),
  };
  try {
    for (const [name, bytes] of Object.entries(asks)) {
      plain.reset((visit) => visit.send(answer("plain")));
      const { answers } = await rawRequest(lb.port, bytes);
      assert.deepEqual(answers.map((one) => [status(one), one.body.toString()]), [[200, "plain"]], name);
      const [request] = plain.requests;
      assert.deepEqual([value(request!, "upgrade"), value(request!, "connection")], ["", ""], name);
    }
  } finally {
    await lb.stop();
    await plain.close();
  }
});

test("a client that leaves in the middle of the handshake frees the server", async () => {
  const silent = await scriptedServer(() => {});
  const lb = await configured({ default: { servers: [silent.address], max_in_flight: 1, queue: "off" } });
  try {
    for (let i = 0; i < 3; i++) {
      const socket = connect(lb.port, "127.0.0.1");
      socket.write(handshake("/"));
      const visit = await until("the server is asked", () => silent.visits[i]);
      socket.destroy();
      await until("the server is free", () => visit.over);
    }
  } finally {
    await lb.stop();
    await silent.close();
  }
});

test("clients that leave as soon as they have asked leave nothing behind, however they do it", async () => {
  const echo = await webSocketServer(echoStrictly);
  const lb = await configured({
    log: "off",
    default: { servers: [`127.0.0.1:${echo.port}`] },
  });
  const handles = () => readdirSync(`/proc/${lb.pid}/fd`).length;
  const inFlight = async () => (await (await fetch(`http://127.0.0.1:${lb.admin}/services`)).json()).in_flight;
  try {
    assert.equal(await inFlight(), 0);
    const before = handles();
    for (let i = 0; i < 60; i++) {
      const socket = connect(lb.port, "127.0.0.1");
      await new Promise((resolve) => socket.once("connect", resolve));
      socket.write(handshake("/"));
      if (i % 3 === 1) await sleep(1);
      if (i % 2) socket.destroy();
      else socket.resetAndDestroy();
    }
    for (let tries = 0; await inFlight() > 0; tries++) {
      assert.ok(tries < 100, "all are over");
      await sleep(50);
    }
    await until("their handles are free", () => handles() <= before + 10);
  } finally {
    await lb.stop();
    await echo.close();
  }
});

test("a WebSocket that would come back is refused", async () => {
  let port = 0;
  const sockets: Socket[] = [];
  const tcp = createServer((socket) => { // leads back to lb.ts
    const on = connect(port, "127.0.0.1");
    socket.pipe(on).pipe(socket);
    for (const one of [socket, on]) one.on("error", () => {});
    sockets.push(socket, on);
  });
  await listenLocally(tcp);
  const lb = await configured({ default: { servers: [`127.0.0.1:${(tcp.address() as AddressInfo).port}`] } });
  port = lb.port;
  try {
    const { answers } = await rawRequest(lb.port, handshake("/"));
    assert.deepEqual(answers.map((one) => [status(one), value(one, "x-lb-failure")]), [[508, "loop"]]);
  } finally {
    await lb.stop();
    for (const one of sockets) one.destroy();
    await new Promise((resolve) => tcp.close(resolve));
  }
});

// ─── What it costs, and what is counted ───

const MEGA = 1 << 20;

/** Sends until nobody takes more, and says how many bytes have gone by then. */
async function stuff(peer: Peer, total: number, mask: boolean): Promise<{ stuck: number; sent: Promise<void> }> {
  const frame = encode(BINARY, randomBytes(65_536), { mask });
  let gone = 0, last = Date.now();
  const sent = (async () => {
    while (gone < total) {
      const room = peer.socket.write(frame);
      gone += 65_536;
      last = Date.now();
      if (!room) await new Promise((resolve) => peer.socket.once("drain", resolve));
    }
  })();
  await until("nobody takes more, or all has gone", () => gone >= total || Date.now() - last > 500, 30_000);
  return { stuck: gone, sent };
}

for (const slow of ["client", "server"] as const) {
  test(`a slow ${slow} holds the other side up, and then gets everything`, { timeout: 60_000 }, async () => {
    const { client, server } = await open();
    const [reader, writer] = slow === "client" ? [client, server] : [server, client];
    reader.onFrame = () => {};
    reader.socket.pause();
    const { stuck, sent } = await stuff(writer, 64 * MEGA, slow === "server");
    assert.ok(stuck < 32 * MEGA, `${stuck} bytes wait somewhere`);
    reader.socket.resume();
    await sent;
    await until("all has come", () => reader.bytes === 64 * MEGA, 40_000);
    writer.send(TEXT, "and on");
    await until("it goes on", () => reader.bytes === 64 * MEGA + 6);
    client.socket.destroy();
  });
}

test("a WebSocket is in flight as long as it is open, and one line of the log when it ends", async () => {
  const lb = await configured({ log: "json", default: { servers: [own.address], max_in_flight: 1, queue: "off" } });
  const lines = (path: string) => lb.output().split("\n").filter((one) => one.includes(`"${path}"`));
  try {
    for (let i = 0; i < 3; i++) {
      const before = own.peers.length;
      const client = await openWebSocket(lb.port, `/${i}`);
      const server = await until("the server's end is open", () => own.peers[before]);
      const { answers } = await rawRequest(lb.port, handshake("/more"));
      assert.deepEqual(answers.map((one) => [status(one), value(one, "x-lb-failure")]), [[503, "queue-full"]]);
      server.send(TEXT, "12345");
      await client.frame(0);
      client.close(1000);
      await server.closed();
      server.close(1000);
      server.socket.end();
      await until("it is written down", () => lines(`/${i}`).length > 0);
      const record = JSON.parse(lines(`/${i}`)[0]!);
      assert.deepEqual([record["http.response.status_code"], record["error.type"]], [101, undefined]);
      assert.deepEqual([record["http.request.body.size"], record["http.response.body.size"]], [8, 11]);
      assert.equal(lines(`/${i}`).length, 1);
    }
    for (const [side, problem] of [["client", "client-left"], ["server", "reset"]] as const) {
      const before = own.peers.length, client = await openWebSocket(lb.port, `/${side}`);
      const server = await until("the server's end is open", () => own.peers[before]);
      ({ client, server })[side].socket.resetAndDestroy();
      await until("it is written down", () => lines(`/${side}`).length > 0);
      const record = JSON.parse(lines(`/${side}`)[0]!);
      assert.deepEqual([record["http.response.status_code"], record["error.type"]], [101, problem]);
      await until("both are over", () => client.over && server.over);
    }
  } finally {
    await lb.stop();
  }
});

test("a reload leaves WebSockets alone, also where their server is gone from the file", async () => {
  const lb = await configured({ default: { servers: [own.address] } });
  try {
    const before = own.peers.length, client = await openWebSocket(lb.port);
    const server = await until("the server's end is open", () => own.peers[before]);
    await lb.reload({ default: { servers: [echo.address] } });
    client.send(TEXT, "up");
    assert.equal((await server.frame(0)).payload.toString(), "up");
    server.send(TEXT, "down");
    assert.equal((await client.frame(0)).payload.toString(), "down");
    client.close(1000);
    await server.closed();
    server.socket.end();
  } finally {
    await lb.stop();
  }
});

/** A program that drains ends well, and has cut nothing off. */
async function endedByItself(lb: Program) {
  const alive = () => {
    try {
      return process.kill(lb.pid, 0);
    } catch {
      return false;
    }
  };
  await until("it ends", () => !alive());
  assert.doesNotMatch(lb.output(), /cut off/);
  assert.equal(await lb.stop(), 0);
}

test("draining leaves WebSockets their time, and then ends them with 1001", async () => {
  const lb = await startProgram({ default: { servers: [own.address] } }, ["--drain", soon(700)]);
  const before = own.peers.length, client = await openWebSocket(lb.port);
  const server = await until("the server's end is open", () => own.peers[before]);
  process.kill(lb.pid, "SIGTERM");
  await until("it drains", () => lb.output().includes("draining"));
  let refused = false;
  await until("nobody else comes in", () => {
    const late = connect(lb.port, "127.0.0.1", () => late.destroy()).on("error", () => refused = true);
    return refused;
  });
  client.send(TEXT, "still here");
  assert.equal((await server.frame(0)).payload.toString(), "still here");
  assert.deepEqual(await client.closed(), [1001, ""]);
  assert.deepEqual(await server.closed(), [1001, ""]);
  client.close(1001);
  client.socket.end();
  server.socket.end();
  await endedByItself(lb);
});

// ─── Other protocols ───

/** One end of a connection that has switched to another protocol. */
interface End {
  socket: Socket;
  /** The other end's head. */
  head: string;
  /** What has come behind it. */
  got: Buffer;
  ended: boolean;
  /** The connection is closed, or was reset. */
  over: boolean;
}

/** Reads a head, and then bytes. */
function newEnd(socket: Socket): End {
  const end: End = { socket, head: "", got: Buffer.alloc(0), ended: false, over: false };
  socket.on("data", (bytes: Buffer) => {
    end.got = Buffer.concat([end.got, bytes]);
    const at = end.head ? -1 : end.got.indexOf("\r\n\r\n");
    if (at < 0) return;
    end.head = end.got.toString("latin1", 0, at + 4);
    end.got = end.got.subarray(at + 4);
  });
  socket.on("end", () => end.ended = true);
  socket.on("error", () => end.over = true);
  socket.on("close", () => end.over = true);
  return end;
}

interface TunnelServer {
  address: string;
  ends: End[];
  /** What it answers, and what comes right behind that. */
  answer: string;
  close(): Promise<void>;
}

/** A server that answers each head, and then leaves its end to the test. */
async function tunnelServer(): Promise<TunnelServer> {
  const ends: End[] = [], sockets = new Set<Socket>();
  const tcp = createServer({ allowHalfOpen: true }, (socket) => {
    const end = newEnd(socket);
    sockets.add(socket); // also of probes, which send nothing
    const look = () => {
      if (!end.head) return;
      socket.off("data", look);
      ends.push(end);
      socket.write(server.answer, "latin1");
    };
    socket.on("data", look);
  });
  await listenLocally(tcp);
  const server: TunnelServer = {
    address: `127.0.0.1:${(tcp.address() as AddressInfo).port}`,
    ends,
    answer: "",
    close() {
      for (const socket of sockets) socket.destroy();
      return new Promise((resolve) => tcp.close(() => resolve()));
    },
  };
  return server;
}

/** What clients of such protocols send, and what their servers answer. */
const SWITCHES = {
  "docker attach": {
    ask: "POST /v1.45/containers/web/attach?stream=1&stdin=1 HTTP/1.1\r\nHost: docker.test\r\n" +
      "User-Agent: Docker-Client/27.0 (linux)\r\nContent-Length: 0\r\nConnection: Upgrade\r\n" +
      "Content-Type: text/plain\r\nUpgrade: tcp\r\n\r\n",
    answer: "HTTP/1.1 101 UPGRADED\r\nApi-Version: 1.45\r\nContent-Type: application/vnd.docker.raw-stream\r\n" +
      "Connection: Upgrade\r\nUpgrade: tcp\r\n\r\n",
    up: ["User-Agent: Docker-Client/27.0 (linux)", "Content-Type: text/plain", "Content-Length: 0"],
    down: ["Api-Version: 1.45", "Content-Type: application/vnd.docker.raw-stream"],
    protocol: "tcp",
  },
  "kubectl exec": {
    ask: "POST /api/v1/namespaces/default/pods/web/exec?command=sh&stdin=true HTTP/1.1\r\nHost: kube.test\r\n" +
      "User-Agent: kubectl/v1.31.0\r\nContent-Length: 0\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n" +
      "X-Stream-Protocol-Version: v5.channel.k8s.io\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n",
    answer: "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n" +
      "X-Stream-Protocol-Version: v5.channel.k8s.io\r\n\r\n",
    up: ["X-Stream-Protocol-Version: v5.channel.k8s.io\r\nX-Stream-Protocol-Version: v4.channel.k8s.io"],
    down: ["X-Stream-Protocol-Version: v5.channel.k8s.io"],
    protocol: "SPDY/3.1",
  },
};
const { ask: ASK, answer: ANSWER } = SWITCHES["docker attach"];

let raw: TunnelServer, tunnels: Program;

before(async () => {
  raw = await tunnelServer();
  const servers = { servers: [raw.address], health: "off", eject: "off", retries: 0 };
  tunnels = await startProgram({
    log: "json",
    admin: { listen: "127.0.0.1:0" },
    routes: [{ host: "brief.test", ...servers, timeouts: { idle: soon(300) } }],
    default: servers,
  });
});
after(async () => {
  await tunnels.stop();
  await raw.close();
});

/** Asks for a tunnel; its two ends. */
async function openTunnel(ask = ASK, answer = ANSWER, lb = tunnels): Promise<{ client: End; server: End }> {
  const before = raw.ends.length, client = newEnd(connect({ port: lb.port, host: "127.0.0.1", allowHalfOpen: true }));
  raw.answer = answer;
  client.socket.write(ask);
  const server = await until("the server is asked", () => raw.ends[before]);
  await until("the client is answered", () => client.head || client.over);
  return { client, server };
}

const inFlight = async (): Promise<number> =>
  (await (await fetch(`http://127.0.0.1:${tunnels.admin}/services`)).json()).in_flight;
/** Nothing is left of the tunnels that there were. */
async function allOver() {
  for (let tries = 0; await inFlight() > 0; tries++) {
    assert.ok(tries < 200, "all are over");
    await sleep(10);
  }
}
const closeBoth = ({ client, server }: { client: End; server: End }) => {
  client.socket.destroy();
  server.socket.destroy();
};
/** The lines of its log. */
const recordsOf = (lb: Program) => lb.logLines().map((line) => JSON.parse(line));

let logged = 0;
for (const [name, { ask, answer, up, down, protocol }] of Object.entries(SWITCHES)) {
  test(`what ${name} asks for becomes a tunnel, and each side may end its half first`, async () => {
    for (const first of ["client", "server"] as const) {
      const ends = await openTunnel(ask, `${answer}early`), { client, server } = ends;
      assert.equal(server.head.split("\r\n")[0], ask.split("\r\n")[0]);
      assert.equal(client.head.split("\r\n")[0], answer.split("\r\n")[0]);
      for (const line of up) assert.ok(server.head.includes(`\r\n${line}\r\n`), `${line} in ${server.head}`);
      for (const line of down) assert.ok(client.head.includes(`\r\n${line}\r\n`), `${line} in ${client.head}`);
      for (const { head } of [client, server]) {
        assert.deepEqual(
          head.match(/^(?:connection|upgrade): .*$/gim)?.map((line) => line.split(": ")[1]).sort(),
          [
            protocol,
            "Upgrade",
          ].sort(),
        );
      }
      const [early, late] = [randomBytes(300_000), randomBytes(300_000)];
      const [here, there] = first === "client" ? [client, server] : [server, client];
      await until("the first bytes come", () => client.got.toString() === "early");
      client.got = Buffer.alloc(0);
      here.socket.write(early);
      here.socket.end();
      await until("the other side sees all, and the end", () => there.ended);
      assert.deepEqual(there.got, early);
      assert.equal(here.ended, false);
      there.socket.write(late.subarray(0, 1_000));
      await until("the first of it has come", () => here.got.length === 1_000);
      there.socket.write(late.subarray(1_000));
      there.socket.end();
      await until("the end has come back", () => here.ended);
      assert.deepEqual(here.got, late);
      await until("both are closed", () => client.over && server.over);
      await allOver();
      const record = await until("it is written down", () => recordsOf(tunnels)[logged]);
      const { "http.response.status_code": code, "error.type": problem, "url.path": path } = record;
      assert.deepEqual([code, problem, path], [101, undefined, ask.split(/[ ?]/)[1]]);
      const [sent, back] = first === "client" ? [early, late] : [late, early];
      assert.deepEqual([record["http.request.body.size"], record["http.response.body.size"]], [
        sent.length,
        back.length + "early".length,
      ]);
      logged++;
    }
  });
}

test(
  "64 MiB pass through a tunnel both ways at once, as fast as the slower side reads",
  { timeout: 60_000 },
  async () => {
    const { client, server } = await openTunnel(), size = 1 << 26, piece = randomBytes(1 << 16);
    const hashes = await Promise.all([[client, server], [server, client]].map(async ([from, to], i) => {
      const hash = createHash("sha256");
      let length = 0;
      to!.socket.removeAllListeners("data").on("data", (bytes: Buffer) => {
        length += bytes.length;
        hash.update(bytes);
        if (i) return;
        to!.socket.pause();
        setTimeout(() => to!.socket.resume(), 1);
      });
      for (let sent = 0; sent < size; sent += piece.length) {
        if (!from!.socket.write(piece)) await new Promise((resolve) => from!.socket.once("drain", resolve));
      }
      from!.socket.end();
      await until("all has come", () => to!.ended, 40_000);
      return [length, hash.digest("hex")];
    }));
    const whole = createHash("sha256");
    for (let sent = 0; sent < size; sent += piece.length) whole.update(piece);
    const expected = [size, whole.digest("hex")];
    assert.deepEqual(hashes, [expected, expected]);
    await allOver();
  },
);

test("what a client sends before the 101 comes behind it, and a body comes before it", async () => {
  const early = await openTunnel(`${ASK}early`);
  await until("it has come", () => early.server.got.toString() === "early");
  closeBoth(early);
  const late = await openTunnel(`${ASK.replace("Content-Length: 0", "Content-Length: 4")}bodybehind`);
  await until("it has come", () => late.server.got.toString() === "bodybehind");
  assert.match(late.server.head, /^content-length: 4\r$/im);
  closeBoth(late);
  await allOver();
});

test("a server may not switch before it has the whole request", async () => {
  const ask = ASK.replace("Content-Length: 0", "Transfer-Encoding: chunked") + "3\r\nabc\r\n";
  const { client, server } = await openTunnel(ask);
  try {
    assert.match(client.head, /^HTTP\/1\.1 502 /);
    assert.match(client.head, /^x-lb-failure: invalid-answer\r$/im);
    await until("the server's end is over", () => server.over || server.ended);
  } finally {
    closeBoth({ client, server });
  }
});

test("a 101 for another protocol, or without one, is an invalid answer", async () => {
  const answers = [
    ANSWER.replace("Upgrade: tcp", "Upgrade: udp"),
    ANSWER.replace("Upgrade: tcp\r\n", ""),
    ANSWER.replace("Connection: Upgrade\r\n", ""),
  ];
  for (const answer of answers) {
    const { client, server } = await openTunnel(ASK, answer);
    assert.match(client.head, /^HTTP\/1\.1 502 /);
    assert.match(client.head, /^x-lb-failure: invalid-answer\r$/im);
    await until("the server's end is over", () => server.over || server.ended);
    client.socket.destroy();
  }
});

test("a server that refuses a tunnel answers as to any request, and the connection serves the next one", async () => {
  const body = '{"message":"No such container: web"}';
  const refusal = `HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: ${body.length}\r\n\r\n${body}`;
  const { client } = await openTunnel(ASK, refusal), asked = raw.ends.length;
  await until("the answer is whole", () => client.got.toString() === body);
  assert.match(client.head, /^HTTP\/1\.1 404 Not Found\r\n/);
  assert.doesNotMatch(client.head, /^(connection|upgrade):/im);
  raw.answer = ANSWER;
  [client.head, client.got] = ["", Buffer.alloc(0)];
  client.socket.write(ASK);
  await until("the next one is a tunnel", () => client.head.startsWith("HTTP/1.1 101 "));
  closeBoth({ client, server: raw.ends[asked]! });
  await allOver();
});

test("a side that breaks off ends the tunnel, also when it had ended its half, and while the other side still sends", async () => {
  for (const [leaving, staying] of [["client", "server"], ["server", "client"]] as const) {
    for (const halfClosed of [false, true]) {
      for (const leave of ["destroy", "resetAndDestroy"] as const) {
        const what = `${leaving}, ${leave}, ${halfClosed ? "half closed" : "open"}`;
        const ends = await openTunnel(), there = ends[staying], here = ends[leaving];
        if (halfClosed) {
          here.socket.end();
          await until(`the half is closed: ${what}`, () => there.ended);
        }
        const talk = setInterval(() => there.over || there.socket.write("x"), 5);
        await until(`it talks: ${what}`, () => here.got.length > 0);
        const before = recordsOf(tunnels).length;
        here.socket[leave]();
        await until(`the other side is closed: ${what}`, () => there.over).finally(() => {
          clearInterval(talk);
          closeBoth(ends);
        });
        await allOver();
        const record = await until("it is written down", () => recordsOf(tunnels)[before]);
        // With both halves ended it is a tunnel's usual end, though what was on its way is lost.
        if (!halfClosed && leave === "resetAndDestroy") {
          assert.equal(record["error.type"], leaving === "client" ? "client-left" : "reset");
        }
      }
    }
  }
});

test("silence ends a tunnel, and adds no bytes to it", async () => {
  const { client, server } = await openTunnel(ASK.replace("docker.test", "brief.test"));
  client.socket.write("up");
  server.socket.write("down");
  await until("both see the end", () => client.ended && server.ended);
  assert.deepEqual([server.got.toString(), client.got.toString()], ["up", "down"]);
  for (const { socket } of [client, server]) socket.end();
  await until("both are closed", () => client.over && server.over);
  await allOver();
  const half = await openTunnel(ASK.replace("docker.test", "brief.test"));
  half.client.socket.end();
  await until("the client sees the end", () => half.client.ended);
  await allOver();
  closeBoth(half);
});

test("draining leaves tunnels their time, and then ends them", async () => {
  const lb = await startProgram({ log: "off", default: { servers: [raw.address] } }, ["--drain", soon(700)]);
  const whole = await openTunnel(ASK, ANSWER, lb), half = await openTunnel(ASK, ANSWER, lb);
  half.client.socket.end();
  await until("the half is closed", () => half.server.ended);
  process.kill(lb.pid, "SIGTERM");
  await until("it drains", () => lb.output().includes("draining"));
  for (const { server } of [whole, half]) server.socket.write("still here");
  await until("it still comes", () => [whole, half].every(({ client }) => client.got.toString() === "still here"));
  await until(
    "both sides see the end",
    () => [whole, half].every(({ client, server }) => client.ended && server.ended),
  );
  for (const { socket } of [whole, half].flatMap(({ client, server }) => [client, server])) socket.end();
  await endedByItself(lb);
});

// ─── HTTP/2 by an upgrade ───

/** As the JDK's HttpClient asks. */
const java = (method: string, body: string, more = "") =>
  `${method} /x?y HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nContent-Length: ${body.length}\r\n` +
  `Host: java.test\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nUpgrade: h2c\r\n` +
  `User-Agent: Java-http-client/21.0.4\r\n${more}\r\n${body}`;

test("a client that offers HTTP/2 is served with HTTP/1.1, on the same connection", async () => {
  const plain = await scriptedServer((visit, { body }) => visit.send(answer(`got ${body}`)));
  const lb = await configured({ default: { servers: [plain.address] } });
  const answered = (socket: Socket) => new Promise((resolve) => socket.once("data", resolve));
  const large = "x".repeat(200_000);
  try {
    const bodies = ["", "hello", "", large, "bye"];
    const { answers, interim } = await rawRequest(lb.port, [
      ...bodies.slice(0, -1).flatMap((body) => [java(body ? "POST" : "GET", body), answered]),
      java("POST", "bye"),
    ]);
    assert.deepEqual(
      answers.map((one) => [status(one), one.body.toString()]),
      bodies.map((body) => [200, `got ${body}`]),
    );
    assert.deepEqual(interim, []);
    assert.equal(plain.requests.length, bodies.length);
    for (const request of plain.requests) {
      assert.equal(value(request, "connection") + value(request, "upgrade") + value(request, "http2-settings"), "");
    }
    assert.deepEqual(plain.requests.map((one) => value(one, "content-length")), ["0", "5", "0", "200000", "3"]);
    for (const protocol of ["H2C", "h2"]) {
      plain.reset((visit) => visit.send(answer("plain")));
      const { answers } = await rawRequest(lb.port, java("GET", "").replace("h2c", protocol));
      assert.deepEqual([answers.map(status), value(plain.requests[0]!, "upgrade")], [[200], ""], protocol);
    }
  } finally {
    await lb.stop();
    await plain.close();
  }
});

// ─── As a library ───

test("in an app of one's own WebSockets and tunnels pass, behind the app's middleware", async () => {
  const lb = createLoadBalancer(parseConfig(
    `log: off\nroutes: [{ path: /docker, servers: ["${raw.address}"] }]\ndefault: { servers: ["${echo.address}"] }`,
  ));
  const app = new Hono();
  app.use(async (context, next) => {
    if (context.req.header("x-nobody")) return context.text("not you", 401);
    await next();
    return context.header("x-wrapped", "yes");
  });
  app.get("/own", (context) => context.text("own"));
  app.route("/", lb);
  const listener = await serve(app, { port: 0, hostname: "127.0.0.1" }), port = Number(listener.address.split(":")[1]);
  try {
    const client = await openWebSocket(port);
    client.send(TEXT, "through the app");
    assert.equal((await client.frame(0)).payload.toString(), "through the app");
    assert.equal(lb.balancer.inFlight, 1);
    const { client: near, server: far } = await openTunnel(
      ASK.replace("/v1.45", "/docker"),
      ANSWER,
      { port } as Program,
    );
    near.socket.end("up");
    await until("the server sees the end", () => far.ended);
    far.socket.end("down");
    await until("the client sees the end", () => near.ended);
    assert.deepEqual([far.got.toString(), near.got.toString()], ["up", "down"]);
    const { answers } = await rawRequest(port, get("/own"));
    assert.deepEqual(answers.map((one) => [status(one), value(one, "x-wrapped"), `${one.body}`]), [[
      200,
      "yes",
      "own",
    ]]);
    const refused = await rawRequest(port, handshake("/", "X-Nobody: 1\r\nConnection: close\r\n"));
    assert.deepEqual(refused.answers.map((one) => [status(one), `${one.body}`]), [[401, "not you"]]);
    client.close(1000);
    assert.deepEqual(await client.closed(), [1000, ""]);
    client.socket.end();
    await until("all is over", () => lb.balancer.inFlight === 0);
  } finally {
    await listener.close();
  }
});
