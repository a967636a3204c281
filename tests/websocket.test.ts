// WebSockets through the running program: what passes, what is refused, and how they end.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { randomBytes } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { type AddressInfo, connect, createServer, type Socket } from "node:net";
import process from "node:process";
import { after, before, test } from "node:test";
import { Hono } from "hono";
import { createLoadBalancer, parseConfig, websocket } from "../lb.ts";
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
} from "./frames.ts";
import {
  answer,
  get,
  type Program,
  rawRequest,
  resetConnection,
  runtime,
  scriptedServer,
  sleep,
  startProgram,
  status,
  until,
  value,
} from "./rig.ts";

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
const { cases } = JSON.parse(readFileSync(new URL("websocket-cases.json", import.meta.url), "utf8")) as {
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
    later(3, drop);
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
      later(1, drop);
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

let echo: WebSocketServer, own: WebSocketServer, program: Program;

const config = () => ({
  routes: [
    { path: "/own", servers: [own.address] },
    { path: "/brief", servers: [own.address], timeouts: { idle: "300ms" } },
  ],
  default: { servers: [echo.address] },
});

before(async () => {
  [echo, own] = [await webSocketServer(echoStrictly), await webSocketServer()];
  program = await startProgram(config());
});
after(async () => {
  await program.stop();
  await Promise.all([echo.close(), own.close()]);
});

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
    const known = runtime() === "deno" ? ["7.3.6: close code 1000"] : []; // a close frame that is too long ends it all the same
    assert.deepEqual(wrong.sort(), known);
  },
);

// ─── What passes ───

const RAW = runtime() === "node"; // bytes pass; elsewhere messages do
const CUT = runtime() === "deno" ? 1014 : 1006; // Deno cannot end a connection without a close frame

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

test("fragments of a server arrive whole, and a ping between them", async () => {
  const { client, server } = await open();
  server.send(BINARY, "one, ", { fin: false });
  server.send(0, "", { fin: false });
  server.send(0, "two, ", { fin: false });
  if (runtime() !== "deno") server.send(PING, "between");
  server.send(0, "three");
  const text = () => client.frames.filter(({ opcode }) => opcode < CLOSE).map(({ payload }) => payload).join("");
  await until("the message is whole", () => text() === "one, two, three");
  assert.equal(client.frames.some(({ opcode }) => opcode === PING), runtime() !== "deno");
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

test("what goes to a server is masked, each frame with another key, and what comes from it is not", async () => {
  const { client, server } = await open();
  let raw = Buffer.alloc(0);
  server.socket.on("data", (bytes: Buffer) => raw = Buffer.concat([raw, bytes]));
  client.send(TEXT, "same");
  client.send(TEXT, "same");
  await server.frame(1);
  assert.ok(server.frames.every(({ masked }) => masked));
  assert.notDeepEqual(raw.subarray(2, 10), raw.subarray(12, 20));
  server.send(TEXT, "back");
  assert.equal((await client.frame(0)).masked, false);
  client.socket.destroy();
});

test("pings of a client are answered once, whoever answers", async () => {
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
  const seen = server.frames.map(({ opcode }) => opcode);
  assert.deepEqual(seen, runtime() === "deno" ? [TEXT] : [PING, TEXT]);
  for (const { socket } of [client, echoed]) socket.destroy();
});

test("a ping of a server is answered, by the client where the runtime can ask it", async () => {
  const { client, server } = await open();
  server.send(PING, "there?");
  if (runtime() !== "deno") {
    const ping = await client.frame(0);
    assert.deepEqual([ping.opcode, ping.payload.toString()], [PING, "there?"]);
    client.send(PONG, ping.payload);
  }
  const pong = await server.frame(0);
  assert.deepEqual([pong.opcode, pong.payload.toString(), pong.masked], [PONG, "there?", true]);
  client.socket.destroy();
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

test("an offer of compression passes where bytes do, and is taken out where messages do", async () => {
  const { client, head } = await open("/own", "Sec-WebSocket-Extensions: permessage-deflate\r\n");
  assert.equal(/^sec-websocket-extensions: permessage-deflate\r$/im.test(head), RAW);
  client.socket.destroy();
});

test("what a server sends right behind its 101 is not lost, nor what a client sends before it where bytes pass", async () => {
  own.on = (peer) => void peer.send(TEXT, "first");
  try {
    const { client, server } = await open();
    assert.equal((await client.frame(0)).payload.toString(), "first");
    client.socket.destroy();
    await until("the server's end is over", () => server.over);
  } finally {
    own.on = () => {};
  }
  if (!RAW) return;
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
    assert.deepEqual(await one.client.closed(), [
      code,
      RAW ? reason : one.client.frames[0]!.payload.toString("utf8", 2),
    ]);
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
    assert.deepEqual((await client.closed())[0], CUT);
    assert.deepEqual(client.frames.slice(0, 2).map(({ payload }) => payload.length), [300_000, 4]);
    if (runtime() === "deno") client.close(CUT); // it waits for that
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

test("frames of a server that are against the RFC end both sides where frames are read, and else are the client's matter", async () => {
  const bad: [string, Buffer, number][] = [
    ["masked", encode(TEXT, "a", { mask: true }), 1002],
    ["with a reserved bit", encode(TEXT, "a", { rsv: 4 }), 1002],
    ["of an unknown kind", encode(3, "a"), 1002],
    ["of an unknown control kind", encode(11, ""), 1002],
    ["that continue nothing", encode(0, "a"), 1002],
    ["that begin anew", Buffer.concat([encode(TEXT, "a", { fin: false }), encode(TEXT, "b")]), 1002],
    ["that cut a ping", encode(PING, "a", { fin: false }), 1002],
    ["with a ping too long", encode(PING, "a".repeat(126)), 1002],
    ["with half a code", encode(CLOSE, "a"), 1002],
    ["with a code that must not be sent", encode(CLOSE, closing(1006)), 1002],
    ["with text that is none", encode(TEXT, Buffer.from([0xc3, 0x28])), 1007],
    ["with a reason that is no text", encode(CLOSE, Buffer.from([0x03, 0xe8, 0xff])), 1007],
    ["without an end", Buffer.from([0x82, 127, 0, 0, 0x10, 0, 0, 0, 0, 0]), 1009],
  ];
  for (const [name, bytes, code] of bad) {
    const { client, server } = await open();
    server.socket.write(bytes);
    if (RAW) {
      await until(`frames ${name} come`, () => client.frames.length > 0 || name === "without an end");
      client.socket.destroy();
      await until("the server's end is over", () => server.over);
    } else {
      assert.equal((await client.closed())[0], code === 1009 ? 1009 : 1014, name);
      assert.equal((await server.closed())[0], code, name);
    }
  }
});

// ─── The handshake ───

test("a server's refusal reaches the client as it is, and nothing that follows it reaches the server", async () => {
  const plain = await scriptedServer((visit) =>
    visit.send(answer("no", "X-Why: because\r\nSet-Cookie: a=1\r\n", "401 Unauthorized"))
  );
  const lb = await startProgram({ default: { servers: [plain.address] } });
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
  const lb = await startProgram({
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
    ...(!RAW && {
      "an extension that nobody offered": (accept) =>
        `${head}${up}Sec-WebSocket-Accept: ${accept}\r\nSec-WebSocket-Extensions: permessage-deflate\r\n`,
    }),
  };
  const lb = await startProgram({ default: { servers: [own.address], eject: "off", retries: 0 } });
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

test("what is not a whole handshake, or asks for another protocol, is plain HTTP", async () => {
  const plain = await scriptedServer((visit) => visit.send(answer("plain")));
  const lb = await startProgram({ default: { servers: [plain.address] } });
  const asks = {
    "h2c": get("/", "Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n").replace("close", "Upgrade, HTTP2-Settings"),
    "TLS": get("/", "Upgrade: TLS/1.0\r\n").replace("close", "Upgrade"),
    "no Connection": handshake("/").replace("Connection: Upgrade\r\n", "Connection: close\r\n"),
    "no key": handshake("/").replace(/Sec-WebSocket-Key.*\r\n/, ""),
    "half a key": handshake("/", "", "AAAA"),
    ...(runtime() !== "deno" && Number(process.versions.node.split(".")[0]) > 22 && { // they refuse it
      "POST": `POST / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 4\r\n\r\nbody`,
    }),
  };
  try {
    for (const [name, bytes] of Object.entries(asks)) {
      plain.reset((visit) => visit.send(answer("plain")));
      const { answers } = await rawRequest(lb.port, bytes);
      assert.deepEqual(answers.map((one) => [status(one), one.body.toString()]), [[200, "plain"]], name);
      assert.equal(value(plain.requests[0]!, "upgrade"), "", name);
      assert.equal(plain.requests[0]!.body.toString(), name === "POST" ? "body" : "", name);
    }
  } finally {
    await lb.stop();
    await plain.close();
  }
});

test("a client that leaves in the middle of the handshake frees the server", async () => {
  const silent = await scriptedServer(() => {});
  const lb = await startProgram({ default: { servers: [silent.address], max_in_flight: 1, queue: "off" } });
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
  const lb = await startProgram({
    log: "off",
    admin: { listen: "127.0.0.1:0" },
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
  await new Promise<void>((resolve) => tcp.listen(0, "127.0.0.1", resolve));
  const lb = await startProgram({ default: { servers: [`127.0.0.1:${(tcp.address() as AddressInfo).port}`] } });
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
  const lb = await startProgram({ log: "json", default: { servers: [own.address], max_in_flight: 1, queue: "off" } });
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
      const lines = () => lb.output().split("\n").filter((one) => one.includes(`"/${i}"`));
      await until("it is written down", () => lines().length > 0);
      const record = JSON.parse(lines()[0]!);
      assert.deepEqual([record["http.response.status_code"], record["error.type"]], [101, undefined]);
      assert.deepEqual([record["http.request.body.size"], record["http.response.body.size"]], [8, RAW ? 11 : 7]);
      assert.equal(lines().length, 1);
    }
  } finally {
    await lb.stop();
  }
});

test("a reload leaves WebSockets alone, also where their server is gone from the file", async () => {
  const lb = await startProgram({ default: { servers: [own.address] } });
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

test("draining leaves WebSockets their time, and then ends them with 1001", async () => {
  const lb = await startProgram({ default: { servers: [own.address] } }, ["--drain", "700ms"]);
  const before = own.peers.length, client = await openWebSocket(lb.port);
  const server = await until("the server's end is open", () => own.peers[before]);
  process.kill(lb.pid, "SIGTERM");
  await until("it drains", () => lb.output().includes("draining"));
  if (runtime() === "deno") { // which takes connections as long as WebSockets are open
    const late = await openWebSocket(lb.port);
    assert.doesNotMatch(late.head, /^connection: close/im);
    late.socket.destroy();
  }
  client.send(TEXT, "still here");
  assert.equal((await server.frame(0)).payload.toString(), "still here");
  assert.deepEqual(await client.closed(), [1001, ""]);
  assert.deepEqual(await server.closed(), [1001, ""]);
  client.close(1001);
  client.socket.end();
  server.socket.end();
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
});

// ─── As a library ───

interface Globals {
  Deno?: { serve(options: object, fetch: unknown): { addr: { port: number }; shutdown(): Promise<void> } };
  Bun?: { serve(options: object): { port: number; stop(force: boolean): Promise<void> } };
}

const skip = RAW && "Node gives upgrades to those who listen for them"; // as the program does

test("in an app of one's own WebSockets pass: on Deno as they are, on Bun with our handlers", { skip }, async () => {
  const { Deno, Bun } = globalThis as Globals;
  const lb = createLoadBalancer(parseConfig(`log: off\ndefault: { servers: ["${echo.address}"] }`));
  const app = new Hono();
  app.use(async (context, next) => {
    await next();
    context.header("x-wrapped", "yes");
  });
  app.route("/", lb);
  const options = { port: 0, hostname: "127.0.0.1", onListen() {}, fetch: app.fetch, websocket };
  const server = Deno?.serve(options, app.fetch) ?? Bun!.serve(options);
  const client = await openWebSocket("addr" in server ? server.addr.port : server.port);
  client.send(TEXT, "through the app");
  assert.equal((await client.frame(0)).payload.toString(), "through the app");
  assert.equal(lb.balancer.inFlight, 1);
  client.close(1000);
  await until("it is over", () => lb.balancer.inFlight === 0);
  client.socket.destroy();
  await ("addr" in server ? server.shutdown() : server.stop(true));
});
