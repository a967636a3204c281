// HTTP/2 through the running program, both sides (RFC 9113, RFC 7541, RFC 8441): what clients may send and what becomes of
// it, how servers are asked, and what ends whom. Ends of connections are those of h2.ts: they send frames as they are, and
// note everything that lb.ts must not send; a test fails where they have noted something.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { connect as connectHttp2, createSecureServer } from "node:http2";
import type { AddressInfo, Socket } from "node:net";
import process from "node:process";
import { after, before } from "node:test";
import {
  connect as connectTls,
  createServer as createTlsServer,
  type Server as TlsServer,
  type TLSSocket,
} from "node:tls";
import { A, CA, KEY } from "../rig/certificates.ts";
import {
  BINARY,
  CLOSE,
  closing,
  echoStrictly,
  encode as encodeFrame,
  TEXT,
  type WebSocketServer,
  webSocketServer,
} from "../rig/websocket.ts";
import {
  ACK,
  block,
  type Client,
  type ClientOptions,
  type Code,
  CONTINUATION,
  DATA,
  data,
  echoH2,
  ENABLE_CONNECT,
  ENABLE_PUSH,
  END_HEADERS,
  END_STREAM,
  type Field,
  frame,
  GOAWAY,
  goAway,
  h2Client,
  type H2Server,
  h2Server,
  HEADERS,
  headers,
  hex,
  INITIAL_WINDOW,
  integer,
  literal,
  MAX_FRAME,
  MAX_STREAMS,
  PADDED,
  PING,
  PREFACE,
  PRIORITIZED,
  PRIORITY,
  PUSH_PROMISE,
  request,
  reset,
  RST_STREAM,
  SETTINGS,
  settings,
  type Stream,
  TABLE_SIZE,
  text,
  u32,
  valueOf,
  WINDOW_UPDATE,
  windowUpdate,
} from "../rig/http2.ts";
import {
  answer,
  type Echo,
  echo,
  get,
  listenLocally,
  type Message,
  type Program,
  rawRequest,
  type Script,
  type ScriptedServer,
  scriptedServer,
  seeded,
  sleep,
  startProgram,
  status,
  target,
  test as patientTest,
  until,
  value,
} from "../rig/rig.ts";

// ─── One program, one server of each version ───

let lb: Program, tlsPort = 0;
let h1: ScriptedServer; // asked when a request has come whole
let early: ScriptedServer; // asked when its head has come
let h2: H2Server;
let secure: H2Server; // over TLS
let probed: H2Server;
let ws: WebSocketServer;
let others: Record<"old" | "mute" | "foreign", TlsServer>; // over TLS: HTTP/1.1 by ALPN, without ALPN, node:http2
const scripts = new Map<string, Script>(); // by path
const clients: Client[] = []; // of the running test

const LOCAL = "127.0.0.1:0", TLS = { cert: A, key: KEY };
const config = (more: Record<string, unknown> = {}) => {
  const url = (server: TlsServer) => `https://127.0.0.1:${(server.address() as AddressInfo).port}`;
  const { old, mute, foreign } = others, tls = { insecure: true };
  return {
    listen: [{ address: LOCAL, h2c: true }, { address: LOCAL, tls: [{ cert: "a.pem", key: "a.key" }] }],
    admin: { listen: LOCAL },
    log: "json",
    defaults: { health: "off", eject: "off", retries: 0 },
    routes: [
      { path: "/early", servers: [early.address] },
      { path: ["/brief", "/early/brief"], servers: [early.address], timeouts: { idle: "300ms" } },
      { path: "/h2/brief", servers: [h2.url], timeouts: { connect: "300ms", idle: "300ms", response: "300ms" } },
      { path: "/one", servers: [h1.address], max_in_flight: 1, queue: { timeout: "60s" } },
      { path: "/h2", servers: [h2.url] },
      { path: "/either", servers: [h2.url, h1.address], retries: 1 },
      { path: "/ws", servers: [ws.address] },
      { path: "/not-h2", servers: [`h2c://${early.address}`] },
      { path: "/two", servers: [secure.url], http: 2, tls },
      { path: "/auto", servers: [secure.url], http: "auto", tls },
      { path: "/auto-old", servers: [url(old)], http: "auto", tls },
      { path: "/auto-mute", servers: [url(mute)], http: "auto", tls },
      { path: "/two-old", servers: [url(old)], http: 2, tls },
      { path: "/two-mute", servers: [url(mute)], http: 2, tls },
      { path: "/foreign", servers: [url(foreign)], http: 2, tls },
      {
        path: "/probed",
        servers: [probed.url],
        health: { path: "/healthz", interval: "100ms", rise: 1, fall: 1 },
        panic: "0%",
      },
    ],
    default: { servers: [h1.address] },
    ...more,
  };
};

/** Plays the script of a request's path; without one, `/hold` is never answered, and all else with what came. */
const play: Script = (visit, request, count) => {
  const path = target(request).split("?")[0]!, script = scripts.get(path);
  return (script ?? (path.endsWith("/hold") ? () => {} : echo))(visit, request, count);
};

before(async () => {
  [h1, early] = [await scriptedServer(play), await scriptedServer(play)];
  early.at = "head";
  [h2, secure, probed] = [
    await h2Server(),
    await h2Server(echoH2, {}, TLS),
    await h2Server((stream) => stream.respond(200)),
  ];
  ws = await webSocketServer(echoStrictly);
  const speakHttp1 = (socket: Socket) =>
    void socket.on("data", () => socket.write(answer("old"))).on("error", () => {});
  others = {
    old: createTlsServer({ ...TLS, ALPNProtocols: ["http/1.1"] }, speakHttp1),
    mute: createTlsServer(TLS, speakHttp1),
    foreign: createSecureServer({ ...TLS, settings: { headerTableSize: 0 } }, (request, response) => {
      let size = 0;
      request.on("data", (bytes: Buffer) => size += bytes.length);
      request.on(
        "end",
        () => response.end(`${request.httpVersion} ${request.method} ${size} ${request.headers["x-y"]}`),
      );
    }),
  };
  for (const server of Object.values(others)) await listenLocally(server);
  lb = await startProgram(config(), [], { "a.pem": A, "a.key": KEY });
  tlsPort = await until("it listens", () => Number(/listening on https:\/\/\S+:(\d+)/.exec(lb.output())?.[1]));
});
after(async () => {
  await lb.stop();
  for (const server of Object.values(others)) server.close();
  await Promise.all([h1, early, h2, secure, probed, ws].map((server) => server.close()));
});

/** The sum of all samples of the metrics whose series fit. */
async function metric(series: RegExp): Promise<number> {
  const text = await (await fetch(`http://127.0.0.1:${lb.admin}/metrics`)).text();
  const samples = text.split("\n").filter((line) => series.test(line));
  return samples.reduce((sum, line) => sum + Number(line.split(" ").at(-1)), 0);
}
const failures = (reason: string) => metric(new RegExp(`^lb_failures_total.*"${reason}"`));
const inFlight = () => metric(/^lb_(?:open_connections|\w+_in_flight|service_queue_length)\b/);

/** Fails once, and not at each test that follows, where a request never ends. */
let left = 0;
async function assertIdle(): Promise<void> {
  if (left < 0) return;
  const before = left;
  for (const end = Date.now() + 20_000; (left = await inFlight()) > before && Date.now() < end;) await sleep(20);
  assert.ok(left <= before, `${left - before} counts of requests in flight do not fall back to 0`);
}

/** A test at whose end lb.ts has sent nothing wrong, on no connection, and nothing is in flight. */
function test(name: string, body: () => Promise<unknown>, timeout = 60_000): void {
  patientTest(name, { timeout }, async () => {
    for (const visit of [...h1.visits, ...early.visits]) visit.received = "";
    try {
      await body();
      const faults = [...clients, ...h2.ends].flatMap((end) => end.faults);
      assert.deepEqual(faults.slice(0, 5), [], "what lb.ts sent wrong");
    } finally {
      for (const client of clients.splice(0)) client.destroy();
      await Promise.all(h2.ends.splice(0).map((end) => end.close()));
      Object.assign(h2, { script: echoH2, options: {}, requests: [] });
      Object.assign(ws, { on: echoStrictly, answer: () => "", heads: [], peers: [] });
      scripts.clear();
    }
    await assertIdle();
  });
}

async function open(options: ClientOptions = {}, port = lb.port): Promise<Client> {
  const client = await h2Client(port, options);
  clients.push(client);
  return client;
}

/** A request that is served on this connection. */
async function assertServed(client: Client, path = "/served"): Promise<void> {
  const { result } = await client.get(path);
  assert.equal(result, "200", `a request for ${path}`);
}

/** The latest request for a path that a server of HTTP/1.1 got. */
const latest = (server: ScriptedServer, path: string) => server.requests.findLast((one) => target(one) === path)!;

// ─── Header compression ───

const KNOWN: Record<string, string[]> = {
  "RFC 7541, C.3, requests without the Huffman code": [
    "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
    "8286 84be 5808 6e6f 2d63 6163 6865",
    "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
  ],
  "RFC 7541, C.4, requests in the Huffman code": [
    "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
    "8286 84be 5886 a8eb 1064 9cbf",
    "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
  ],
};
for (const [name, blocks] of Object.entries(KNOWN)) {
  test(`a server gets the fields of ${name}`, async () => {
    const client = await open();
    h1.reset(play);
    const streams = blocks.map(() => client.stream());
    client.send(...blocks.map((one, i) => headers(2 * i + 1, hex(one))));
    for (const stream of streams) assert.equal((await stream.done()).result, "200");
    const seen = h1.requests.map((
      one,
    ) => [target(one), ...["host", "cache-control", "custom-key"].map((name) => value(one, name))]);
    assert.deepEqual(seen.sort(), [
      ["/", "www.example.com", "", ""],
      ["/", "www.example.com", "no-cache", ""],
      ["/index.html", "www.example.com", "", "custom-value"],
    ]);
  });
}

const ANSWERS: Record<string, string[]> = {
  "RFC 7541, C.5, responses without the Huffman code": [
    "3fe101 4803 3330 3258 0770 7269 7661 7465 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 2032 303a 3133 3a32 3120 474d " +
    "546e 1768 7474 7073 3a2f 2f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
    "4803 3330 37c1 c0bf",
    "88c1 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 2032 303a 3133 3a32 3220 474d 54c0 5a04 677a 6970 7738 666f 6f3d " +
    "4153 444a 4b48 514b 425a 584f 5157 454f 5049 5541 5851 5745 4f49 553b 206d 6178 2d61 6765 3d33 3630 303b 2076 6572 " +
    "7369 6f6e 3d31",
  ],
  "RFC 7541, C.6, responses in the Huffman code": [
    "3fe101 4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 82a6 2d1b ff6e 919d 29ad 1718 63c7 " +
    "8f0b 97c8 e9ae 82ae 43d3",
    "4883 640e ffc1 c0bf",
    "88c1 6196 d07a be94 1054 d444 a820 0595 040b 8166 e084 a62d 1bff c05a 839b d9ab 77ad 94e7 821d d7f2 e6c7 b335 dfdf " +
    "cd5b 3960 d5af 2708 7f36 72c1 ab27 0fb5 291f 9587 3160 65c0 03ed 4ee5 b106 3d50 07",
  ],
};
for (const [name, blocks] of Object.entries(ANSWERS)) {
  test(`a client gets the fields of ${name}`, async () => {
    const seen: string[][] = [];
    for (const [i, bytes] of blocks.entries()) {
      h2.script = (stream) => stream.end.send(headers(stream.id, hex(bytes)));
      const { answers: [one] } = await rawRequest(
        lb.port,
        `GET /h2/known${i} HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n`,
      );
      const names = ["cache-control", "date", "location", "content-encoding", "set-cookie"];
      seen.push([`${status(one!)}`, ...names.map((name) => value(one!, name))]);
    }
    const [date, later] = ["Mon, 21 Oct 2013 20:13:21 GMT", "Mon, 21 Oct 2013 20:13:22 GMT"],
      to = "https://www.example.com";
    assert.deepEqual(seen, [
      ["302", "private", date, to, "", ""],
      ["307", "private", date, to, "", ""],
      ["200", "private", later, to, "gzip", "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1"],
    ]);
  });
}

/** All bytes that a value may have, between a and z, in the Huffman code. */
const ALL_CODED = hex(
  "1fffff529fc7f3ff5ff957e3fd7f5fdfcffbfa5976001132d36e3af3f73efffe41ff7fe7fea1bb7afe0c38b1e4cb9b3e8d3ab5ecdbbb7f0e3cbf39fef" +
    "feffff87ff3ffc8bffe8e324859669cdd3ad14d47afb5884dbdfc79f5effff7fcfff7ffbfffcdfffe97fff3ffff47fffa7fffea7fffabffff67fffd6ff" +
    "ffb5ffff6ffffee7fffddffffbdffffd7ffff7fffffb3ffffb7fffd7ffffc1ffffddffff87ffff17fffe3ffffc9fffdcffff63ffff2ffffb3ffff9bff" +
    "ff3fffff7ffffb5fffddfffe9ffff6ffffdcffffd1ffffa7fffbdffffabfffddffff7bffffc3fffbffffefffffebffffd9fffe0ffff0ffffc1fffe2ff" +
    "ffdbffff0ffffeeffffdffffd5ffff17fffc7ffff27ffff0ffff97fffe6ffffe3fffff07ffffc3fffd7fffc7fffe7ffffe5ffff47ffffb3ffffe2ffff" +
    "f8fffffe4fffffbdfffff7fffffe5fffff1fffff6ffff2ffff1fffffcdfffff83fffff0fffffcffffff8bffffcbfffc9fffe5fffffa3ffffe9ffffffd" +
    "fffffc7fffff93fffff2ffff67ffff9ffff6ffff9bfffe9ffff3ffffa3ffff9ffffd5ffff5fffffbbffffdfffffe9ffffebfffff57ffff4fffffaffff" +
    "ff37ffffd9fffff6fffffe7fffffd1fffffa7fffff57ffffebffffffefffffd9fffffb7fffff77ffffeffffffe1fffff77bf",
);
const ALL = Buffer.from([
  97,
  9,
  ...Array.from({ length: 95 }, (_, i) => 32 + i),
  ...Array.from({ length: 128 }, (_, i) => 128 + i),
  122,
]);
const huffman = (bytes: Buffer) => Buffer.concat([integer(bytes.length, 7, 128), bytes]);

const START = block(...request("/hpack"));
/** A field that is put into the table. */
const added = (name: string, value: string) => literal(name, value, 64);
/** Each: header blocks of requests, and what the server sees of the field `x` in the last, or of the whole. */
const BLOCKS: Record<string, [blocks: Buffer[], x: string]> = {
  "every byte that a value may have, in the Huffman code": [
    [Buffer.concat([START, Buffer.from([0]), text("x"), huffman(ALL_CODED)])],
    ALL.toString("latin1"),
  ],
  "an empty value in the Huffman code": [[Buffer.concat([START, literal("x", "").subarray(0, -1), hex("80")])], ""],
  "a field of the table that the request before has put there": [[
    Buffer.concat([START, added("x", "1")]),
    Buffer.concat([START, hex("be")]),
  ], "1"],
  "the older of two fields of the table": [
    [Buffer.concat([START, added("x", "1"), added("y", "2")]), Buffer.concat([START, hex("bf")])],
    "1",
  ],
  "a name of the table with another value": [
    [
      Buffer.concat([START, added("x", "1")]),
      Buffer.concat([START, hex("7e"), text("2")]),
      Buffer.concat([START, hex("be")]),
    ],
    "2",
  ],
  "a field that is never indexed": [[Buffer.concat([START, literal("x", "secret", 16)])], "secret"],
  "a number with more bytes than it needs": [[
    Buffer.concat([START, hex("0f 80 80 00"), text("unused"), literal("x", "1")].filter((_, i) => i !== 1 && i !== 2)),
  ], "1"],
  "a text whose length takes two bytes": [[Buffer.concat([START, literal("x", "v".repeat(127))])], "v".repeat(127)],
  "a text whose length takes three bytes": [
    [Buffer.concat([START, literal("x", "v".repeat(5_000))])],
    "v".repeat(5_000),
  ],
  "a table that is emptied and has its size again": [
    [
      Buffer.concat([START, added("x", "1")]),
      Buffer.concat([hex("20 3fe11f"), START, added("x", "2")]),
      Buffer.concat([START, hex("be")]),
    ],
    "2",
  ],
  "a table that a field just fits in": [
    [Buffer.concat([hex("3f0f"), START, added("x", "v".repeat(46 - 32 - 1))]), Buffer.concat([START, hex("be")])],
    "v".repeat(13),
  ],
  "a table that keeps the latest fields as far as they fit": [
    [
      Buffer.concat([START, ...Array.from({ length: 200 }, (_, i) => added("y", `${i}`.padStart(31, "0")))]),
      Buffer.concat([START, added("x", "1"), integer(62 + 63, 7, 128)]),
    ],
    "1",
  ],
};
for (const [name, [blocks, x]] of Object.entries(BLOCKS)) {
  test(`a server gets ${name}`, async () => {
    const client = await open();
    let last = "";
    for (const one of blocks) {
      const stream = client.stream();
      client.send(headers(stream.id, one));
      assert.equal((await stream.done()).result, "200");
      last = stream.json().rawHeaders.filter(([name]) => name === "x").map(([, value]) => value).join();
    }
    assert.equal(last, x);
  });
}

const UNREADABLE: Record<string, Buffer> = {
  "index 0": hex("80"),
  "an index beyond the static table, while the other is empty": hex("be"),
  "an index far beyond both tables": hex("ff8001"),
  "a name at an index beyond both tables": hex("7e0131"),
  "a number that is cut off": hex("ff"),
  "a number that never ends": hex("ff80808080808080808000"),
  "a number above 2^32": hex("ffffffffff7f"),
  "a text that is cut off": hex("00017803 3132"),
  "a text that has no length": hex("000178"),
  "a name that is cut off": hex("000a78"),
  "a text whose length is above 2^31": hex("0001787fffffffff7f"),
  "a text that contains the end of the Huffman code": hex("00017884ffffffff"),
  "a text that ends with the end of the Huffman code": hex("000178 85 1f ff ff ff ff"),
  "a text with zeros as padding": hex("0001788118"),
  "a text with a byte of padding": hex("000178821fff"),
  "a text that is nothing but a byte of padding": hex("00017881ff"),
  "a text that ends inside a code": hex("00017881fe"),
  "a size of the table above what was allowed": Buffer.concat([hex("3fe21f")]),
  "a size of the table behind a field": Buffer.concat([literal("x", "1"), hex("20")]),
};
for (const [name, bytes] of Object.entries(UNREADABLE)) {
  const isSize = name.includes("above what was allowed");
  test(`${name} in a header block ends the connection with COMPRESSION_ERROR`, async () => {
    const client = await open(), start = block(...request("/dirty/hpack"));
    client.send(headers(client.stream().id, Buffer.concat(isSize ? [bytes, start] : [start, bytes])));
    assert.equal(await client.closed(), "COMPRESSION_ERROR");
    await assertServed(await open());
    assertClean();
  });
}

/** No server has seen anything of a request that is not valid. */
function assertClean(): void {
  const seen = [h1, early].flatMap((server) => server.visits.filter((visit) => visit.received.includes("/dirty")));
  assert.deepEqual(seen.map((visit) => visit.received), [], "what a server has seen of a request that is not valid");
}

test("fields that a refused request puts into the table are there for the next", async () => {
  const client = await open();
  const refused: [string, Buffer, number][] = [
    ["with an uppercase name", Buffer.concat([START, literal("X", "1"), added("x", "from-malformed")]), END_STREAM],
    [
      "without a host",
      Buffer.concat([block([":method", "GET"], [":scheme", "http"], [":path", "/hpack"]), added("x", "from-400")]),
      END_STREAM,
    ],
    [
      "with 70,000 bytes of fields",
      Buffer.concat([START, added("x", "from-431"), literal("y", "y".repeat(7_000))]),
      END_STREAM,
    ],
  ];
  for (const [, bytes, flags] of refused) {
    const first = client.stream(), second = client.stream();
    client.send(headers(first.id, bytes, flags), headers(second.id, Buffer.concat([START, hex("be")])));
    const [, x] = (await second.done()).json().rawHeaders.find(([name]) => name === "x")!;
    assert.match(x, /^from-/);
  }
});

test("fields that trailers and blocks of reset streams put into the table are there for the next", async () => {
  const client = await open();
  const first = client.ask("/early/hold", { ends: false });
  client.send(headers(first.id, added("x", "from-trailers"), END_STREAM));
  const second = client.stream();
  client.send(headers(second.id, Buffer.concat([START, hex("be")])));
  assert.match(JSON.stringify((await second.done()).json().rawHeaders), /from-trailers/);
  first.reset();
  client.send(headers(second.id + 2, Buffer.concat([START, added("x", "from-reset")]), 0), reset(second.id + 2));
  const third = client.stream(second.id + 4);
  client.send(headers(third.id, Buffer.concat([START, hex("be")])));
  assert.match(JSON.stringify((await third.done()).json().rawHeaders), /from-reset/);
});

// ─── Frames that end a connection ───

const GET = block(...request("/hold")), POST = block(...request("/early/hold", [], "POST"));
const DIRTY = block(...request("/dirty"));
const half = headers(1, GET), opened = headers(1, POST, 0); // half-closed by the client; open on both sides
const FATAL: Record<string, [frames: Buffer[], code: Code]> = {
  "DATA of 16,385 bytes": [[opened, data(1, Buffer.alloc(16_385))], "FRAME_SIZE_ERROR"],
  "HEADERS of 16,385 bytes": [[headers(1, Buffer.alloc(16_385))], "FRAME_SIZE_ERROR"],
  "a frame of an unknown type of 16,385 bytes": [[frame(99, 0, 0, Buffer.alloc(16_385))], "FRAME_SIZE_ERROR"],
  "the head of a frame of 16 MiB": [[hex("ffffff 00 00 00000001")], "FRAME_SIZE_ERROR"],
  "RST_STREAM of 3 bytes": [[opened, frame(RST_STREAM, 0, 1, hex("000000"))], "FRAME_SIZE_ERROR"],
  "RST_STREAM of 5 bytes": [[opened, frame(RST_STREAM, 0, 1, hex("0000000000"))], "FRAME_SIZE_ERROR"],
  "SETTINGS of 5 bytes": [[frame(SETTINGS, 0, 0, hex("0003000000"))], "FRAME_SIZE_ERROR"],
  "SETTINGS with ACK and a setting": [[frame(SETTINGS, ACK, 0, hex("000300000001"))], "FRAME_SIZE_ERROR"],
  "PING of 7 bytes": [[frame(PING, 0, 0, "1234567")], "FRAME_SIZE_ERROR"],
  "PING of 9 bytes": [[frame(PING, 0, 0, "123456789")], "FRAME_SIZE_ERROR"],
  "GOAWAY of 7 bytes": [[frame(GOAWAY, 0, 0, "1234567")], "FRAME_SIZE_ERROR"],
  "WINDOW_UPDATE of 3 bytes": [[frame(WINDOW_UPDATE, 0, 0, "123")], "FRAME_SIZE_ERROR"],
  "WINDOW_UPDATE of 5 bytes": [[frame(WINDOW_UPDATE, 0, 0, "12345")], "FRAME_SIZE_ERROR"],
  "HEADERS too short for its priority": [[headers(1, hex("000000"), END_STREAM | PRIORITIZED)], "FRAME_SIZE_ERROR"],

  "DATA on stream 0": [[data(0, "x")], "PROTOCOL_ERROR"],
  "HEADERS on stream 0": [[headers(0, DIRTY)], "PROTOCOL_ERROR"],
  "PRIORITY on stream 0": [[frame(PRIORITY, 0, 0, "12345")], "PROTOCOL_ERROR"],
  "RST_STREAM on stream 0": [[reset(0)], "PROTOCOL_ERROR"],
  "CONTINUATION on stream 0": [[frame(CONTINUATION, END_HEADERS, 0, DIRTY)], "PROTOCOL_ERROR"],
  "SETTINGS on stream 1": [[opened, frame(SETTINGS, 0, 1)], "PROTOCOL_ERROR"],
  "PING on stream 1": [[opened, frame(PING, 0, 1, "12345678")], "PROTOCOL_ERROR"],
  "GOAWAY on stream 1": [[opened, frame(GOAWAY, 0, 1, "12345678")], "PROTOCOL_ERROR"],

  "DATA on a stream that has not begun": [[data(1, "x")], "PROTOCOL_ERROR"],
  "RST_STREAM on a stream that has not begun": [[reset(1)], "PROTOCOL_ERROR"],
  "WINDOW_UPDATE on a stream that has not begun": [[windowUpdate(1, 1)], "PROTOCOL_ERROR"],
  "WINDOW_UPDATE on a stream with an even number": [[opened, windowUpdate(2, 1)], "PROTOCOL_ERROR"],
  "HEADERS on a stream with an even number": [[headers(2, DIRTY)], "PROTOCOL_ERROR"],
  "DATA behind a reset of the client": [[opened, reset(1), data(1, "x")], "STREAM_CLOSED"],
  "HEADERS behind a reset of the client": [[opened, reset(1), headers(1, DIRTY)], "STREAM_CLOSED"],

  "CONTINUATION without HEADERS": [[frame(CONTINUATION, END_HEADERS, 1, DIRTY)], "PROTOCOL_ERROR"],
  "CONTINUATION behind END_HEADERS": [[half, frame(CONTINUATION, END_HEADERS, 1, DIRTY)], "PROTOCOL_ERROR"],
  "CONTINUATION on another stream": [
    [frame(HEADERS, END_STREAM, 1, DIRTY), frame(CONTINUATION, END_HEADERS, 3)],
    "PROTOCOL_ERROR",
  ],
  "PING inside a header block": [
    [frame(HEADERS, END_STREAM, 1, DIRTY), frame(PING, 0, 0, "12345678")],
    "PROTOCOL_ERROR",
  ],
  "HEADERS inside a header block": [[frame(HEADERS, END_STREAM, 1, DIRTY), headers(1, DIRTY)], "PROTOCOL_ERROR"],
  "DATA inside a header block": [[opened, frame(HEADERS, 0, 3, DIRTY), data(1, "x")], "PROTOCOL_ERROR"],
  "SETTINGS inside a header block": [[frame(HEADERS, END_STREAM, 1, DIRTY), settings()], "PROTOCOL_ERROR"],
  "PRIORITY inside a header block": [
    [frame(HEADERS, END_STREAM, 1, DIRTY), frame(PRIORITY, 0, 1, hex("0000000010"))],
    "PROTOCOL_ERROR",
  ],
  "a frame of an unknown type inside a header block": [
    [frame(HEADERS, END_STREAM, 1, DIRTY), frame(99, 0, 1)],
    "PROTOCOL_ERROR",
  ],

  "DATA with more padding than payload": [[opened, data(1, hex("0578797a7a"), PADDED)], "PROTOCOL_ERROR"],
  "DATA with as much padding as payload": [
    [opened, data(1, hex("0400000000").subarray(0, 4), PADDED)],
    "PROTOCOL_ERROR",
  ],
  "HEADERS with more padding than payload": [
    [headers(1, Buffer.concat([hex("ff"), DIRTY]), PADDED | END_STREAM)],
    "PROTOCOL_ERROR",
  ],

  "WINDOW_UPDATE of 0 for the connection": [[windowUpdate(0, 0)], "PROTOCOL_ERROR"],
  "WINDOW_UPDATE beyond 2^31-1 for the connection": [[windowUpdate(0, 2 ** 31 - 1)], "FLOW_CONTROL_ERROR"],
  "an initial window of 2^31": [[settings([INITIAL_WINDOW, 2 ** 31])], "FLOW_CONTROL_ERROR"],
  "an initial window that takes an open stream beyond 2^31-1": [
    [opened, windowUpdate(1, 2 ** 31 - 1 - 65_535), settings([INITIAL_WINDOW, 65_536])],
    "FLOW_CONTROL_ERROR",
  ],
  "SETTINGS that say 2 for push": [[settings([ENABLE_PUSH, 2])], "PROTOCOL_ERROR"],
  "SETTINGS that say 2 for extended CONNECT": [[settings([ENABLE_CONNECT, 2])], "PROTOCOL_ERROR"],
  "SETTINGS with frames of at most 16,383 bytes": [[settings([MAX_FRAME, 16_383])], "PROTOCOL_ERROR"],
  "SETTINGS with frames of at most 2^24 bytes": [[settings([MAX_FRAME, 2 ** 24])], "PROTOCOL_ERROR"],
  "PUSH_PROMISE": [[opened, frame(PUSH_PROMISE, END_HEADERS, 1, Buffer.concat([u32(2), DIRTY]))], "PROTOCOL_ERROR"],
};
for (const [name, [frames, code]] of Object.entries(FATAL)) {
  test(`${name} ends the connection with ${code}`, async () => {
    const other = await open();
    await assertServed(other);
    const client = await open({ more: frames });
    client.stream(1);
    assert.equal(await client.closed(), code);
    await assertServed(other);
    assertClean();
  });
}

test("HEADERS on a lower stream that was never used end the connection with PROTOCOL_ERROR", async () => {
  const client = await open({ more: [headers(5, block(...request("/hold"))), headers(3, DIRTY)] });
  client.stream(5);
  assert.equal(await client.closed(), "PROTOCOL_ERROR");
  assertClean();
});

test("DATA or HEADERS on a stream that has ended on both sides end the connection with STREAM_CLOSED", async () => {
  for (const late of [data(1, "x"), data(1, "", END_STREAM), headers(1, DIRTY)]) {
    const client = await open();
    await assertServed(client);
    client.send(late);
    assert.equal(await client.closed(), "STREAM_CLOSED");
  }
  assertClean();
});

test("a connection whose first frame is not SETTINGS ends with PROTOCOL_ERROR", async () => {
  for (const first of [frame(PING, 0, 0, "12345678"), headers(1, DIRTY), windowUpdate(0, 1), frame(99, 0, 0)]) {
    const client = await open({ greeting: first });
    client.stream(1);
    assert.equal(await client.closed(), "PROTOCOL_ERROR");
  }
  assertClean();
});

test("a client that chose HTTP/2 over TLS and sends something else gets PROTOCOL_ERROR", async () => {
  const tls = { ca: CA, protocols: ["h2"] };
  for (
    const opening of [
      "GET /dirty HTTP/1.1\r\nHost: a.test\r\n\r\n",
      "PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n",
      "\0\0\0\x04\0\0\0\0\0",
    ]
  ) {
    const client = await open({ tls, opening: Buffer.from(opening, "latin1") }, tlsPort);
    assert.equal(await client.closed(), "PROTOCOL_ERROR");
  }
  assertClean();
});

// ─── Frames that end a stream ───

/** What is sent on a connection, and the code with which stream 1 ends. */
const BROKEN: Record<string, [frames: Buffer[], code: Code]> = {
  "PRIORITY of 4 bytes": [[opened, frame(PRIORITY, 0, 1, "1234")], "FRAME_SIZE_ERROR"],
  "PRIORITY on itself": [[opened, frame(PRIORITY, 0, 1, hex("0000000110"))], "PROTOCOL_ERROR"],
  "HEADERS with a priority on itself": [[
    headers(1, Buffer.concat([hex("0000000110"), DIRTY]), PRIORITIZED | END_STREAM),
  ], "PROTOCOL_ERROR"],
  "DATA behind the end": [[half, data(1, "x", END_STREAM)], "STREAM_CLOSED"],
  "HEADERS behind the end": [[half, headers(1, DIRTY)], "STREAM_CLOSED"],
  "WINDOW_UPDATE of 0": [[opened, windowUpdate(1, 0)], "PROTOCOL_ERROR"],
  "WINDOW_UPDATE beyond 2^31-1": [[opened, windowUpdate(1, 2 ** 31 - 1)], "FLOW_CONTROL_ERROR"],
  "trailers that do not end": [[opened, headers(1, block(["x", "1"]), 0)], "PROTOCOL_ERROR"],
  "trailers with a pseudo-field": [[opened, headers(1, block([":path", "/dirty"]))], "PROTOCOL_ERROR"],
  "trailers with an uppercase name": [[opened, headers(1, block(["X", "1"]))], "PROTOCOL_ERROR"],
  "trailers with connection": [[opened, headers(1, block(["connection", "close"]))], "PROTOCOL_ERROR"],
};
for (const [name, [frames, code]] of Object.entries(BROKEN)) {
  test(`${name} resets the stream with ${code}, and the connection goes on`, async () => {
    const client = await open({ more: frames });
    assert.equal((await client.stream(1).done()).result, code);
    await assertServed(client);
    assertClean();
  });
}

/** Frames that change nothing: a request on the same connection is served. */
const IGNORED: Record<string, Buffer[]> = {
  "frames of an unknown type": [frame(99, 255, 0, "x"), opened, frame(99, 0, 1, "x"), frame(200, 0, 2 ** 31 - 1)],
  "unknown settings": [settings([99, 2 ** 32 - 1], [0, 0])],
  "settings that stand twice": [settings([INITIAL_WINDOW, 2 ** 31 - 1], [INITIAL_WINDOW, 65_535])],
  "flags that a frame does not have": [
    frame(PING, 0xfe, 0, "12345678"),
    frame(SETTINGS, 0xfe, 0),
    frame(WINDOW_UPDATE, 0xff, 0, u32(1)),
    frame(HEADERS, 0xd6 & ~PADDED & ~PRIORITIZED | END_HEADERS, 1, POST),
    data(1, "x", 0xf6),
  ],
  "the reserved bit of streams and windows": [
    Buffer.concat([headers(1, POST, 0).subarray(0, 5), hex("80000001"), POST]),
    frame(WINDOW_UPDATE, 0, 0, hex("80000001")),
  ],
  "PRIORITY of a stream that has not begun": [frame(PRIORITY, 0, 9, hex("0000000010"))],
  "PRIORITY of a stream that has ended": [opened, reset(1), frame(PRIORITY, 0, 1, hex("0000000310"))],
  "WINDOW_UPDATE and RST_STREAM of a stream that was reset": [opened, reset(1), windowUpdate(1, 1), reset(1)],
  "an ACK for SETTINGS that nobody has sent": [frame(SETTINGS, ACK, 0), frame(SETTINGS, ACK, 0)],
  "an ACK for a PING that nobody has sent": [frame(PING, ACK, 0, "12345678")],
  "PING on no stream": [frame(PING, 0, 0, "12345678")],
  "nothing but padding": [opened, data(1, hex("0400000000"), PADDED), data(1, hex("00"), PADDED)],
};
for (const [name, frames] of Object.entries(IGNORED)) {
  test(`${name} change nothing`, async () => {
    const client = await open({ more: frames }), first = client.stream(1);
    await assertServed(client);
    assert.equal(first.wasReset, undefined);
    assert.equal(client.goAway, undefined);
  });
}

test("PING is answered with the same eight bytes, SETTINGS with an ACK", async () => {
  const client = await open({ more: [frame(PING, 0, 0, "12\0\xff5678"), settings([MAX_FRAME, 20_000])] });
  const pong = await client.when("an answer", () => client.frames.find((one) => one.type === PING));
  assert.deepEqual([pong.flags, pong.payload.toString("latin1")], [ACK, "12\0\xff5678"]);
  await client.when(
    "two ACKs",
    () => client.frames.filter((one) => one.type === SETTINGS && one.flags === ACK).length === 2,
  );
});

test("padding and priorities of HEADERS and padding of DATA are taken off", async () => {
  const client = await open(), stream = client.stream();
  const fields = block(...request("/padded", [["x", "1"]], "POST"));
  client.send(
    headers(1, Buffer.concat([hex("03 8000000010"), fields, hex("000000")]), PADDED | PRIORITIZED),
    data(1, Buffer.concat([hex("ff"), Buffer.from("hel"), Buffer.alloc(255)]), PADDED),
    data(1, Buffer.concat([hex("00"), Buffer.from("lo")]), PADDED | END_STREAM),
  );
  await stream.done();
  assert.equal(latest(h1, "/padded").body.toString(), "hello");
});

test("header blocks may be cut anywhere into CONTINUATION frames, also empty ones", async () => {
  const client = await open(), fields = block(...request("/cut", [["x", "1"]]));
  for (let at = 0; at <= fields.length; at += 7) {
    const stream = client.stream();
    client.send(
      frame(HEADERS, END_STREAM, stream.id, fields.subarray(0, at)),
      frame(CONTINUATION, 0, stream.id),
      frame(CONTINUATION, 0, stream.id, fields.subarray(at, at + 3)),
      frame(CONTINUATION, END_HEADERS, stream.id, fields.subarray(at + 3)),
    );
    assert.equal((await stream.done()).result, "200");
    assert.equal(value(latest(h1, "/cut"), "x"), "1");
  }
});

test("frames may come byte by byte", async () => {
  const client = await open({ opening: Buffer.alloc(0), answers: false }), stream = client.stream();
  const all = Buffer.concat([
    PREFACE,
    settings(),
    headers(1, block(...request("/bytes", [], "POST")), 0),
    data(1, "hello", END_STREAM),
  ]);
  client.socket.setNoDelay(true);
  for (const byte of all) {
    client.send(Buffer.from([byte]));
    await new Promise((resolve) => setImmediate(resolve));
  }
  assert.equal((await stream.done()).json().bodyLength, 5);
});

// ─── Malformed requests ───

const DIRTY_REQUEST = request("/dirty");
const without = (name: string) => DIRTY_REQUEST.filter(([one]) => one !== name);
const dirty = (...fields: Field[]): Field[] => [...DIRTY_REQUEST, ...fields];
/** What is wrong with a request, and how it is refused: by a reset, or by a status. */
const MALFORMED: Record<string, [fields: Field[], result?: string]> = {
  "no fields at all": [[]],
  "no :method": [without(":method")],
  "no :scheme": [without(":scheme")],
  "no :path": [without(":path")],
  "an empty :path": [[...without(":path"), [":path", ""]]],
  "a :path without a slash": [[...without(":path"), [":path", "dirty"]]],
  "a :path that is a URL": [[...without(":path"), [":path", "http://a.test/dirty"]]],
  "a :path with a blank": [[...without(":path"), [":path", "/dirty HTTP/1.1"]]],
  "a :path with a tab": [[...without(":path"), [":path", "/dirty\tx"]]],
  "a :path with CR and LF": [[...without(":path"), [":path", "/dirty HTTP/1.1\r\nHost: b\r\n\r\n"]]],
  "a :path with NUL": [[...without(":path"), [":path", "/dirty\0"]]],
  "a :path with DEL": [[...without(":path"), [":path", "/dirty\x7f"]]],
  "a :path with a fragment": [[...without(":path"), [":path", "/dirty#x"]], "400"],
  "a :path that is * with GET": [[...without(":path"), [":path", "*"]], "400"],
  "an empty :method": [[...without(":method"), [":method", ""]]],
  "a :method with a blank": [[...without(":method"), [":method", "GET /dirty"]]],
  "a :method with CR and LF": [[...without(":method"), [":method", "GET / HTTP/1.1\r\n\r\nGET"]]],
  "an empty :scheme": [[...without(":scheme"), [":scheme", ""]]],
  "a :scheme with a blank": [[...without(":scheme"), [":scheme", "http x"]]],
  "two :method": [[[":method", "GET"], ...DIRTY_REQUEST]],
  "two :path": [[[":path", "/dirty"], ...DIRTY_REQUEST]],
  "two :scheme": [[[":scheme", "http"], ...DIRTY_REQUEST]],
  "two :authority": [[[":authority", "a.test"], ...DIRTY_REQUEST]],
  "an unknown pseudo-field": [[...DIRTY_REQUEST, [":version", "2"]]],
  "a pseudo-field of responses": [[...DIRTY_REQUEST, [":status", "200"]]],
  ":protocol with GET": [[...DIRTY_REQUEST, [":protocol", "websocket"]]],
  "a pseudo-field behind a field": [[...without(":path"), ["x", "1"], [":path", "/dirty"]]],
  "CONNECT with a path": [[[":method", "CONNECT"], [":authority", "a.test:80"], [":path", "/dirty"]]],
  "CONNECT without :authority": [[[":method", "CONNECT"]]],
  "an uppercase name": [dirty(["X-Dirty", "1"])],
  "an empty name": [dirty(["", "1"])],
  "a name with a blank": [dirty(["x y", "1"])],
  "a name with a colon": [dirty(["x:y", "1"])],
  "a name with CR and LF": [dirty(["x\r\ny", "1"])],
  "a name with NUL": [dirty(["x\0", "1"])],
  "a name beyond ASCII": [dirty(["x\xe4", "1"])],
  "a value with CR": [dirty(["x", "1\r2"])],
  "a value with LF": [dirty(["x", "1\n2"])],
  "a value with NUL": [dirty(["x", "1\x002"])],
  "a value with a control character": [dirty(["x", "1\x012"])],
  "a value with DEL": [dirty(["x", "1\x7f2"])],
  "a value with a blank in front": [dirty(["x", " 1"])],
  "a value with a blank at its end": [dirty(["x", "1 "])],
  "a value with a tab in front": [dirty(["x", "\t1"])],
  "a value with a tab at its end": [dirty(["x", "1\t"])],
  "a value that is a blank": [dirty(["x", " "])],
  "connection": [dirty(["connection", "keep-alive"])],
  "keep-alive": [dirty(["keep-alive", "timeout=5"])],
  "proxy-connection": [dirty(["proxy-connection", "keep-alive"])],
  "transfer-encoding": [dirty(["transfer-encoding", "chunked"])],
  "upgrade": [dirty(["upgrade", "websocket"])],
  "te other than trailers": [dirty(["te", "gzip"])],
  "te with trailers and more": [dirty(["te", "trailers, gzip"])],
  "two content-length": [dirty(["content-length", "0"], ["content-length", "0"])],
  "a content-length that is no number": [dirty(["content-length", "0x0"])],
  "a content-length with a sign": [dirty(["content-length", "+0"])],
  "a content-length that is a list": [dirty(["content-length", "0, 0"])],
  "an empty content-length": [dirty(["content-length", ""])],
  "a content-length without a body": [dirty(["content-length", "5"])],
  "neither :authority nor host": [without(":authority"), "400"],
  "an empty :authority": [[...without(":authority"), [":authority", ""]], "400"],
  ":authority with a user": [[...without(":authority"), [":authority", "user@a.test"]], "400"],
  ":authority with a path": [[...without(":authority"), [":authority", "a.test/dirty"]], "400"],
  ":authority and another host": [dirty(["host", "b.test"]), "400"],
  ":authority and an empty host": [dirty(["host", ""]), "400"],
  "two hosts": [dirty(["host", "a.test"], ["host", "a.test"]), "400"],
  "two hosts without :authority": [[...without(":authority"), ["host", "a.test"], ["host", "b.test"]], "400"],
  "an expectation that nobody knows": [dirty(["expect", "magic"]), "417"],
};
for (const [name, [fields, result = "PROTOCOL_ERROR"]] of Object.entries(MALFORMED)) {
  test(`a request with ${name} is refused with ${result}, and the connection goes on`, async () => {
    const client = await open(), stream = client.stream();
    client.send(headers(stream.id, block(...fields)));
    assert.equal((await stream.done()).result, result);
    await assertServed(client);
    assertClean();
  });
}

// ─── Bodies that are not what was announced ───

const SMUGGLED = "GET /dirty HTTP/1.1\r\nHost: a.test\r\n\r\n";
const upload = (length: number, path = "/upload") =>
  headers(1, block(...request(path, [["content-length", `${length}`]], "POST")), 0);
const chunks = (count: number) =>
  Buffer.concat(Array.from({ length: count }, () => data(1, Buffer.alloc(16_000, "a"))));
/** What a client sends; a number is a pause. Each ends with a reset or with 400, and no server sees a whole request. */
const MISMATCHES: Record<string, (Buffer | number)[]> = {
  "a byte more than announced": [Buffer.concat([upload(5), data(1, "hello!", END_STREAM)])],
  "a byte where 0 was announced": [Buffer.concat([upload(0), data(1, "x", END_STREAM)])],
  "more than announced, a while later": [upload(5), 50, data(1, `hello${SMUGGLED}`, END_STREAM)],
  "more than announced, and no end": [upload(5), 50, data(1, `hello${SMUGGLED}`)],
  "more than announced in a frame of its own": [
    Buffer.concat([upload(5), data(1, "hello")]),
    50,
    data(1, SMUGGLED, END_STREAM),
  ],
  "a byte less than announced": [Buffer.concat([upload(5), data(1, "hell", END_STREAM)])],
  "a byte less than announced, a while later": [upload(5), 50, data(1, "hell", END_STREAM)],
  "nothing where 5 were announced": [upload(5), 50, data(1, "", END_STREAM)],
  "less than announced and trailers": [upload(5), data(1, "hell"), headers(1, block(["x", "1"]))],
  "more than announced of a large body": [
    upload(160_000),
    50,
    chunks(9),
    100,
    data(1, "a".repeat(16_000) + SMUGGLED, END_STREAM),
  ],
  "less than announced of a large body": [upload(160_000), 50, chunks(9), 100, data(1, "a".repeat(15_999), END_STREAM)],
};
for (const [name, parts] of Object.entries(MISMATCHES)) {
  test(`a request with ${name} is refused, and no server sees it whole`, async () => {
    const client = await open(), stream = client.stream(1);
    h1.reset(play);
    for (const part of parts) typeof part === "number" ? await sleep(part) : client.send(part);
    await stream.done();
    assert.match(stream.result, /^(?:400|PROTOCOL_ERROR|400 PROTOCOL_ERROR)$/);
    await assertServed(client);
    assert.deepEqual(h1.requests.map(target), ["/served"]);
  });
}

// ─── Requests and responses between versions ───

/** A request over HTTP/1.1, and what comes back. */
async function ask1(path: string, { method = "GET", fields = "", body = "" } = {}): Promise<Message> {
  const head = `${method} ${path} HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n${fields}\r\n`;
  const { answers: [one], interim } = await rawRequest(lb.port, head + body, { methods: [method] });
  assert.ok(one, `an answer to ${method} ${path}`);
  return { ...one, headers: [...one.headers, ...interim.map((early): [string, string] => ["interim", early.start])] };
}
const rawFields = (message: Message) => message.headers.map(([name, value]) => `${name}: ${value}`);
/** Those that do not come from lb.ts. */
const own = (fields: Field[]) =>
  fields.filter(([name]) => !/^(?:x-forwarded-.*|forwarded|via|x-request-id|traceparent|date)$/i.test(name));

test("a server of HTTP/1.1 gets a request as its client sent it", async () => {
  const client = await open();
  const fields: Field[] = [
    ["x-first", "1"],
    ["accept", "text/html, */*;q=0.1"],
    ["x-empty", ""],
    ["x-latin", "\xe4\xff"],
    ["x-twice", "1"],
    ["x-twice", "2"],
  ];
  await client.ask("/as/sent?a=b%20c&d", { fields, method: "DELETE" }).done();
  const seen = latest(h1, "/as/sent?a=b%20c&d");
  assert.equal(seen.start, "DELETE /as/sent?a=b%20c&d HTTP/1.1");
  assert.deepEqual(own(seen.headers), [["host", "a.test"], ...fields]);
});

test("a server of HTTP/2 gets a request as its client of HTTP/1.1 sent it, without what was for the connection", async () => {
  const fields =
    "X-First: 1\r\nX-Latin: \xe4\xff\r\nX-Twice: 1\r\nx-twice: 2\r\nKeep-Alive: timeout=5\r\nProxy-Connection: close\r\n" +
    "TE: trailers, gzip\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\nConnection: X-Hop, HTTP2-Settings, Upgrade, TE\r\nX-Hop: 1\r\n";
  await ask1("/h2/as/sent?a=b%20c", { fields, method: "DELETE" });
  const [{ head }] = h2.requests as [typeof h2.requests[0] & object];
  const pseudo: Field[] = [[":method", "DELETE"], [":scheme", "http"], [":authority", "a.test"], [
    ":path",
    "/h2/as/sent?a=b%20c",
  ]];
  const rest: Field[] = [["x-first", "1"], ["x-latin", "\xe4\xff"], ["x-twice", "1"], ["x-twice", "2"]];
  assert.deepEqual(own(head).filter(([name]) => name !== "te"), [...pseudo, ...rest]);
});

test("a client gets the response of a server of HTTP/1.1, without what was for the connection", async () => {
  const fields =
    "Content-Type: text/plain\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nX-Latin: \xe4\r\nX-Empty:\r\nKeep-Alive: timeout=5\r\n" +
    "Connection: keep-alive, X-Hop\r\nX-Hop: 1\r\n";
  scripts.set("/fields", (visit) => visit.send(answer("hello", fields)));
  const stream = await (await open()).get("/fields");
  assert.deepEqual(own(stream.head), [
    ...[[":status", "200"], ["content-type", "text/plain"], ["set-cookie", "a=1"], ["set-cookie", "b=2"], [
      "x-latin",
      "\xe4",
    ]] as Field[],
    ...[["x-empty", ""], ["content-length", "5"]] as Field[],
  ]);
  assert.match(stream.header("date"), /GMT$/);
  assert.equal(stream.body.toString(), "hello");
});

test("a client of HTTP/1.1 gets the response of a server of HTTP/2", async () => {
  h2.script = (stream) =>
    stream.respond(404, [["content-type", "text/plain"], ["set-cookie", "a=1"], ["set-cookie", "b=2"], [
      "x-latin",
      "\xe4",
    ]], "hello");
  const got = await ask1("/h2/fields");
  assert.equal(got.start, "HTTP/1.1 404 Not Found");
  assert.deepEqual(rawFields(got).filter((line) => !/^(?:date|connection|transfer-encoding)/i.test(line)), [
    ...["content-type: text/plain", "set-cookie: a=1", "set-cookie: b=2", "x-latin: \xe4"],
  ]);
  assert.equal(got.body.toString(), "hello");
});

test("GET, HEAD, POST, PUT, PATCH, DELETE and OPTIONS reach servers of both versions", async () => {
  const client = await open();
  for (const path of ["/methods", "/h2/methods"]) {
    for (const method of ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"]) {
      const hasBody = /^P[OUA]/.test(method), stream = client.ask(path, { method, ...hasBody && { body: "hello" } });
      assert.equal((await stream.done()).result, "200", `${method} ${path}`);
      if (method === "HEAD") assert.deepEqual([stream.bytes, Number(stream.header("content-length")) > 0], [0, true]);
      else assert.deepEqual([stream.json().method, stream.json().bodyLength], [method, hasBody ? 5 : 0]);
    }
  }
  const all = client.ask("*", { method: "OPTIONS" });
  assert.equal((await all.done()).result, "200");
});

for (const code of [200, 204, 205, 304, 404, 500]) {
  test(`a response ${code} without a body passes both ways`, async () => {
    const line = `HTTP/1.1 ${code} X\r\nETag: "1"\r\n${
      code === 204 || code === 304 ? "" : "Content-Length: 0\r\n"
    }\r\n`;
    scripts.set("/empty", (visit) => visit.send(line));
    h2.script = (stream) => stream.respond(code, [["etag", '"1"']]);
    const client = await open();
    for (const path of ["/empty", "/h2/empty"]) {
      const stream = await client.get(path);
      assert.deepEqual([stream.result, stream.bytes, stream.header("etag")], [`${code}`, 0, '"1"']);
    }
    const got = await ask1("/h2/empty");
    assert.deepEqual([status(got), got.body.length, value(got, "etag")], [code, 0, '"1"']);
  });
}

test("HEAD and 304 keep the content-length of the body that they do not have", async () => {
  scripts.set(
    "/length",
    (visit, { start }) => visit.send(`HTTP/1.1 ${start.startsWith("HEAD") ? 200 : 304} X\r\nContent-Length: 5\r\n\r\n`),
  );
  h2.script = (stream) => stream.respond(stream.head[0]![1] === "HEAD" ? 200 : 304, [["content-length", "5"]]);
  const client = await open();
  for (const path of ["/length", "/h2/length"]) {
    for (const method of ["HEAD", "GET"]) {
      const stream = await client.ask(path, { method }).done();
      assert.deepEqual([stream.header("content-length"), stream.bytes], ["5", 0], `${method} ${path}`);
    }
  }
  const got = await ask1("/h2/length", { method: "HEAD" });
  assert.equal(value(got, "content-length"), "5");
});

test("interim responses pass both ways", async () => {
  const link = "</a.css>; rel=preload";
  scripts.set(
    "/hints",
    (visit) =>
      visit.send(
        `HTTP/1.1 103 Early Hints\r\nLink: ${link}\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n`,
        20,
        answer("hello"),
      ),
  );
  h2.script = async (stream) => {
    stream.sendHead([[":status", "103"], ["link", link]]);
    stream.sendHead([[":status", "102"]]);
    await stream.respond(200, [], "hello");
  };
  const client = await open();
  for (const path of ["/hints", "/h2/hints"]) {
    const { interim, body } = await client.get(path);
    assert.deepEqual(interim, [[[":status", "103"], ["link", link]], [[":status", "102"]]], path);
    assert.equal(body.toString(), "hello");
  }
  const got = await ask1("/h2/hints");
  assert.deepEqual(got.headers.filter(([name]) => name === "interim").map(([, start]) => start), [
    "HTTP/1.1 103 Early Hints",
    "HTTP/1.1 102 Processing",
  ]);
});

test("a client that expects 100 gets it before it sends its body, whichever version the server speaks", async () => {
  const client = await open();
  for (const path of ["/expect", "/h2/expect"]) {
    const stream = client.ask(path, { fields: [["expect", "100-continue"], ["content-length", "5"]], ends: false });
    await client.when("100", () => stream.interim.length > 0);
    assert.deepEqual(stream.interim, [[[":status", "100"]]]);
    await stream.sendData("hello", true);
    assert.equal((await stream.done()).json().bodyLength, 5);
  }
});

test("a client that expects 100 and is refused gets the status alone", async () => {
  scripts.set("/early/refuse", (visit) => visit.send(answer("no", "Connection: close\r\n", "403 Forbidden")));
  const client = await open();
  const denied = client.ask("/early/refuse", {
    fields: [["expect", "100-continue"], ["content-length", "5"]],
    ends: false,
  });
  assert.equal((await denied.done()).status, 403);
  await assertServed(client);
});

test("a client's trailers reach servers of both versions", async () => {
  const client = await open();
  for (const path of ["/trailers", "/h2/trailers"]) {
    const stream = client.ask(path, { body: "hello", trailers: [["x-sum", "1"], ["grpc-status", "0"]] });
    assert.equal((await stream.done()).json().bodyLength, 5);
  }
  assert.match(h1.last!.received, /\r\n0\r\nx-sum: 1\r\ngrpc-status: 0\r\n\r\n/);
  assert.deepEqual(h2.requests[0]!.trailers, [["x-sum", "1"], ["grpc-status", "0"]]);
  const chunked = {
    method: "POST",
    fields: "Transfer-Encoding: chunked\r\nTrailer: X-Sum\r\n",
    body: "5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n",
  };
  await ask1("/h2/trailers", chunked);
  assert.deepEqual(h2.requests[1]!.trailers, [["x-sum", "1"]]);
});

test("a server's trailers reach clients of both versions", async () => {
  scripts.set(
    "/trailed",
    (visit) =>
      visit.send(
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n",
      ),
  );
  h2.script = async (stream) => {
    stream.sendHead([[":status", "200"], ["trailer", "x-sum"]]);
    await stream.sendData("hello");
    stream.sendTrailers([["x-sum", "1"]]);
  };
  const client = await open();
  for (const path of ["/trailed", "/h2/trailed"]) {
    const stream = await client.get(path, [["te", "trailers"]]);
    assert.deepEqual([stream.body.toString(), stream.trailers], ["hello", [["x-sum", "1"]]], path);
  }
  const { bytes } = await rawRequest(
    lb.port,
    "GET /h2/trailed HTTP/1.1\r\nHost: a.test\r\nTE: trailers\r\nConnection: TE, close\r\n\r\n",
  );
  assert.match(bytes.toString("latin1"), /\r\n0\r\nx-sum: 1\r\n\r\n$/i);
});

test("fields that may not trail are dropped from trailers, both ways", async () => {
  h2.script = async (stream) => {
    await stream.done();
    stream.sendHead([[":status", "200"]]);
    await stream.sendData("hello");
    stream.sendTrailers([["content-length", "5"], ["host", "b"], ["content-type", "x"], ["x-sum", "1"]]);
  };
  const client = await open();
  const stream = client.ask("/h2/trailed", {
    fields: [["te", "trailers"]],
    body: "x",
    trailers: [["content-length", "9"], ["host", "b"], ["x-sum", "2"]],
  });
  await stream.done();
  assert.deepEqual(stream.trailers, [["x-sum", "1"]]);
  assert.deepEqual(h2.requests[0]!.trailers, [["x-sum", "2"]]);
});

test("fields that a client never indexes are never indexed to a server, and others are as they were", async () => {
  const client = await open(), stream = client.stream();
  const fields = [literal("x-secret", "1", 16), literal("x-open", "1"), added("x-added", "1")];
  client.send(headers(stream.id, Buffer.concat([block(...request("/h2/secret")), ...fields])));
  await stream.done();
  const { payload } = h2.ends[0]!.frames.find((one) => one.type === HEADERS)!;
  for (const field of [literal("x-secret", "1", 16), literal("x-open", "1"), literal("x-added", "1")]) {
    assert.ok(payload.includes(field), `${field} in ${payload.toString("latin1")}`);
  }
});

test("a peer that wants a smaller table for its header blocks hears once that it is empty", async () => {
  const greeting = settings([TABLE_SIZE, 100]), client = await open({ greeting, shrinks: true });
  h2.options = { greeting, shrinks: true };
  for (const path of ["/1", "/2", "/h2/1", "/h2/2"]) await assertServed(client, path);
  assert.equal(h2.requests.length, 2);
});

test("trailers that are too long are not cut: the stream is reset, both ways", async () => {
  const long: Field[] = ["a", "b", "c", "d", "e"].map((name) => [name, "x".repeat(15_000)]);
  h2.script = async (stream) => {
    stream.sendHead([[":status", "200"]]);
    await stream.sendData("hello");
    stream.end.send(...cut(stream.id, block(...long, ["grpc-status", "0"])));
  };
  const client = await open();
  assert.equal((await client.get("/h2/trailed")).result, "200 INTERNAL_ERROR");
  const stream = client.ask("/trailed", { body: "x", ends: false });
  client.send(...cut(stream.id, block(...long)));
  assert.match((await stream.done()).result, /^(?:400|PROTOCOL_ERROR)$/);
  const isWhole = (received: string) => received.includes("/trailed") && received.includes("\r\n0\r\n");
  assert.ok(!h1.visits.some((visit) => isWhole(visit.received)), "a server has got it whole");
  await assertServed(client);
});
/** Trailers in frames of 16 KiB. */
const cut = (id: number, bytes: Buffer): Buffer[] =>
  Array.from({ length: Math.ceil(bytes.length / 16_384) }, (_, i) => {
    const piece = bytes.subarray(i * 16_384, (i + 1) * 16_384),
      flags = (i + 1) * 16_384 < bytes.length ? 0 : END_HEADERS;
    return i ? frame(CONTINUATION, flags, id, piece) : frame(HEADERS, flags | END_STREAM, id, piece);
  });

test("crumbs of cookies are joined for servers of both versions", async () => {
  const client = await open(),
    fields: Field[] = [["cookie", "a=1"], ["x", "1"], ["cookie", "b=2"], ["cookie", "c=3; d=4"]];
  await client.get("/cookies", fields);
  assert.deepEqual(latest(h1, "/cookies").headers.filter(([name]) => name === "cookie"), [[
    "cookie",
    "a=1; b=2; c=3; d=4",
  ]]);
  await client.get("/h2/cookies", fields);
  const seen = h2.requests[0]!.head.filter(([name]) => name === "cookie").map(([, value]) => value);
  assert.equal(seen.join("; "), "a=1; b=2; c=3; d=4");
});

const SIZES = [0, 1, 16_384, 16_385, 2 ** 20];
const bytesOf = (size: number) => Buffer.alloc(size, "0123456789abcdefghijklm");
for (const size of SIZES) {
  test(`a body of ${size} bytes passes both ways between all versions, with and without its length`, async () => {
    const body = bytesOf(size),
      sha256 = createHash("sha256").update(body).digest("hex"),
      client = await open({ greeting: settings([INITIAL_WINDOW, 2 ** 20]), window: 2 ** 20 });
    const framed = `${size.toString(16)}\r\n${body.toString("latin1")}\r\n0\r\n\r\n`;
    scripts.set("/body", (visit) => visit.send(answer(body)));
    scripts.set(
      "/chunked",
      (visit) => visit.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", size ? framed : "0\r\n\r\n"),
    );
    for (const path of ["/echo", "/h2/echo"]) {
      for (const fields of [[], [["content-length", `${size}`]]] as Field[][]) {
        const seen = (await client.ask(path, { body, fields, sized: false }).done()).json();
        assert.deepEqual([seen.bodyLength, seen.sha256], [size, sha256], `${path} ${fields}`);
      }
    }
    for (const path of ["/body", "/chunked"]) {
      const got = await client.get(path);
      assert.ok(got.body.equals(body), path);
    }
    for (const fields of [[], [["content-length", `${size}`]]] as Field[][]) {
      h2.script = (stream) => stream.respond(200, fields, body);
      assert.ok((await client.get("/h2/body")).body.equals(body), "from HTTP/2 to HTTP/2");
      assert.ok((await ask1("/h2/body")).body.equals(body), "from HTTP/2 to HTTP/1.1");
    }
    h2.script = echoH2;
    for (
      const [fields, sent] of [[`Content-Length: ${size}\r\n`, body.toString("latin1")], [
        "Transfer-Encoding: chunked\r\n",
        size ? framed : "0\r\n\r\n",
      ]]
    ) {
      const seen = JSON.parse(
        (await ask1("/h2/echo", { method: "POST", fields: fields!, body: sent! })).body.toString(),
      );
      assert.deepEqual([seen.bodyLength, seen.sha256], [size, sha256], fields);
    }
  });
}

test("a hundred requests at once are served on one connection", async () => {
  const client = await open(), streams = Array.from({ length: 100 }, (_, i) => client.ask(`/many/${i}`));
  assert.deepEqual(
    await Promise.all(streams.map(async (one) => (await one.done()).json().url)),
    streams.map((_, i) => `/many/${i}`),
  );
});

test("a slow response holds up no other on its connection", async () => {
  const client = await open(), slow = client.ask("/hold");
  for (let i = 0; i < 3; i++) await assertServed(client);
  assert.equal(slow.head.length, 0);
});

test("a response while the upload goes on reaches the client, and the connection goes on", async () => {
  scripts.set("/early/refuse", (visit) => visit.send(answer("too large", "Connection: close\r\n", "413 X")));
  h2.script = (stream) => stream.respond(413, [], "too large");
  const client = await open();
  for (const path of ["/early/refuse", "/h2/refuse"]) {
    const stream = client.ask(path, { body: Buffer.alloc(100_000), ends: false });
    await client.when("the response", () => stream.ended);
    assert.deepEqual([stream.status, stream.body.toString()], [413, "too large"], path);
    await assertServed(client);
  }
});

test("a server that dies in the middle of its response resets the client's stream alone", async () => {
  scripts.set("/dies", async (visit) => {
    await visit.send("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello", 20);
    visit.socket.destroy();
  });
  scripts.set("/dies/chunked", async (visit) => {
    await visit.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", 20);
    visit.socket.destroy();
  });
  const client = await open();
  for (const path of ["/dies", "/dies/chunked"]) {
    const stream = await client.get(path);
    assert.match(stream.result, /^200 (?:INTERNAL_ERROR|CANCEL)$/, path);
    assert.equal(stream.body.toString(), "hello");
    assert.equal((await logged(path))["error.type"], "reset");
    await assertServed(client);
  }
});

/** The line of the access log of the latest request for a path. */
function record(path: string): Record<string, unknown> {
  const lines = lb.logLines().map((line) => JSON.parse(line));
  const found = lines.findLast((line) => (line["url.path"] ?? line["url.original"]) === path);
  assert.ok(found, `a line of the log for ${path}`);
  return found;
}
const logged = (path: string) =>
  until(`a line of the log for ${path}`, () => lb.output().includes(`"url.path":"${path}"`) && record(path));

test("a client that resets its stream cancels the attempt at the server, and is logged as 499", async () => {
  const client = await open();
  const first = client.ask("/reset/hold"), second = client.ask("/h2/reset/1");
  let begun = 0;
  h2.script = () => void begun++;
  await until("both servers have been asked", () => h1.last?.received.includes("/reset/hold") && begun);
  const visit = h1.last!;
  first.reset();
  second.reset();
  await until("the server's connection has ended", () => visit.over);
  await h2.ends[0]!.when("the server's stream is reset", () => h2.requests[0]!.wasReset === "CANCEL");
  for (const path of ["/reset/hold", "/h2/reset/1"]) {
    const { "http.response.status_code": code, "error.type": why } = await logged(path);
    assert.deepEqual([code, why], [499, "client-left"]);
  }
  await assertServed(client);
});

test("a client whose connection breaks cancels the attempts of all its streams", async () => {
  const client = await open();
  h2.script = () => {};
  for (let i = 0; i < 5; i++) client.ask(`/h2/broken/${i}`);
  await until("the server has been asked", () => h2.requests.length === 5);
  client.destroy();
  await h2.ends[0]!.when("all streams are reset", () => h2.requests.every((one) => one.wasReset === "CANCEL"));
});

test("a client that has half-closed its connection still gets its responses", async () => {
  const asked = Promise.withResolvers<Parameters<Script>[0]>();
  scripts.set("/late", asked.resolve);
  const client = await open(), stream = client.ask("/late");
  const visit = await asked.promise;
  client.socket.end();
  await client.when("a PING tests whether the client is there", () => client.frames.some((one) => one.type === PING));
  visit.send(answer("hello"));
  assert.equal((await stream.done()).result, "200");
});

test("a GOAWAY of the client lets what it has asked for end, and then its connection", async () => {
  scripts.set("/late", (visit) => visit.send(50, answer("hello")));
  const client = await open(), stream = client.ask("/late");
  client.send(goAway(0));
  assert.equal((await stream.done()).result, "200");
});

test("data that crosses the reset of its stream is ignored, also when many streams have ended meanwhile", async () => {
  const client = await open(), first = client.stream();
  client.send(headers(first.id, block(...request("/dirty", [["X", "1"]], "POST")), 0));
  assert.equal((await first.done()).result, "PROTOCOL_ERROR");
  const others = Array.from({ length: 3 }, () => Array.from({ length: 60 }, () => client.ask("/many").done()));
  for (const all of others) await Promise.all(all);
  client.send(data(first.id, "late"), headers(first.id, block(["x", "1"])));
  await assertServed(client);
  assertClean();
});

test("the highest number of a stream is served", async () => {
  const client = await open(), last = client.stream(2 ** 31 - 1);
  client.send(headers(last.id, block(...request("/last"))));
  assert.equal((await last.done()).result, "200");
});

test("a response that ends with its server's connection is whole", async () => {
  scripts.set("/until-the-end", async (visit) => {
    await visit.send("HTTP/1.1 200 OK\r\n\r\nhello", 20, "world");
    visit.socket.end();
  });
  const stream = await (await open()).get("/until-the-end");
  assert.deepEqual([stream.result, stream.body.toString()], ["200", "helloworld"]);
});

test("a request that is reset while it waits for a server reaches none", async () => {
  const client = await open(), first = client.ask("/one/hold");
  await until("the server has been asked", () => h1.last?.received.includes("/one/hold"));
  const second = client.ask("/one/waits");
  await settled(client);
  second.reset();
  await logged("/one/waits");
  first.reset();
  await assertServed(client, "/one/next");
  assert.ok(!h1.visits.some((visit) => visit.received.includes("/one/waits")));
});

test("a client whose stream is reset for what it did gets no response on it: 499 is for the log", async () => {
  h2.options = { greeting: Buffer.alloc(0) }; // its server is not ready
  const client = await open(), stream = client.ask("/h2/wrong", { ends: false });
  await until("the server is connected", () => h2.ends.length);
  client.send(windowUpdate(stream.id, 0));
  assert.deepEqual([(await stream.done()).result, stream.head], ["PROTOCOL_ERROR", []]);
  assert.equal((await logged("/h2/wrong"))["http.response.status_code"], 499);
});

// ─── Flow control ───

const bulk = (size: number): Script => (visit) =>
  visit.send(
    `HTTP/1.1 200 OK\r\nContent-Length: ${size}\r\n\r\n`,
    ...Array.from({ length: size / 2 ** 16 }, () => Buffer.alloc(2 ** 16)),
  );

/** Lets lb.ts send more. */
function allow(client: Client, more: number, ...streams: Stream[]): void {
  client.credit += more;
  client.send(windowUpdate(0, more));
  for (const stream of streams) {
    stream.credit += more;
    client.send(windowUpdate(stream.id, more));
  }
}
/** Resolves when all that lb.ts may send is there: it answers a PING behind it. */
async function settled(client: Client, within?: number): Promise<void> {
  const pings = () => client.frames.filter((one) => one.type === PING && one.flags === ACK).length, before = pings();
  client.send(frame(PING, 0, 0, "settled?"));
  await client.when("a PING is answered", () => pings() > before, within);
}

test("a response waits for the windows of its stream and of its connection", async () => {
  scripts.set("/bulk", bulk(2 ** 18));
  const client = await open({ greeting: settings([INITIAL_WINDOW, 100_000]), window: 100_000, raises: false });
  const stream = client.ask("/bulk");
  await client.when("the connection's window is used up", () => client.credit === 0);
  allow(client, 30_000);
  await client.when("that is used up, too", () => client.credit === 0);
  allow(client, 100_000);
  await client.when("the stream's window is used up", () => stream.credit === 0);
  await settled(client);
  assert.equal(stream.bytes, 100_000);
  while (stream.bytes < 2 ** 18) {
    const before = stream.bytes;
    allow(client, 9_999, stream);
    await client.when("more comes", () => stream.bytes === Math.min(before + 9_999, 2 ** 18));
  }
  assert.equal((await stream.done()).result, "200");
});

test("a window that SETTINGS make negative has to be raised above 0 again", async () => {
  scripts.set("/bulk", bulk(2 ** 18));
  const client = await open({ raises: false }), stream = client.ask("/bulk");
  await client.when("the window is used up", () => stream.credit === 0);
  client.credit += 2 ** 20;
  client.send(windowUpdate(0, 2 ** 20), settings([INITIAL_WINDOW, 10]), windowUpdate(1, 65_525));
  await settled(client);
  assert.equal(stream.bytes, 65_535);
  client.send(windowUpdate(1, 1));
  stream.credit = 1;
  await client.when("one byte comes", () => stream.credit === 0);
  await settled(client);
  stream.credit = 90;
  client.send(settings([INITIAL_WINDOW, 100]));
  await client.when("90 bytes come", () => stream.credit === 0);
  stream.credit = 2 ** 20;
  client.send(windowUpdate(1, 2 ** 20));
  assert.equal((await stream.done()).bytes, 2 ** 18);
});

test("a window of 0 from the start lets the head pass, and the body when it is raised", async () => {
  const client = await open({ greeting: settings([INITIAL_WINDOW, 0]), window: 0, raises: false });
  const stream = client.ask("/zero");
  await stream.begun();
  await settled(client);
  assert.equal(stream.bytes, 0);
  const empty = await client.ask("/zero", { method: "HEAD" }).done();
  assert.equal(empty.result, "200");
  allow(client, 10_000, stream);
  assert.equal((await stream.done()).result, "200");
});

test("windows are shared: a large response lets small ones pass", async () => {
  scripts.set("/bulk", bulk(2 ** 22));
  const client = await open(), large = client.ask("/bulk");
  await large.begun();
  for (let i = 0; i < 10; i++) await assertServed(client);
  assert.equal((await large.done()).bytes, 2 ** 22);
});

test("streams share the window of their connection, whichever began first", async () => {
  scripts.set("/bulk/1", bulk(2 ** 21));
  scripts.set("/bulk/2", bulk(2 ** 21));
  const client = await open({ greeting: settings([INITIAL_WINDOW, 2 ** 21]), window: 2 ** 21, raises: false });
  const first = client.ask("/bulk/1");
  await client.when("the connection's window is used up", () => client.credit === 0);
  const second = client.ask("/bulk/2");
  await second.begun();
  for (let i = 0; i < 20; i++) {
    allow(client, 16_384);
    await client.when("that is used up, too", () => client.credit === 0);
  }
  assert.ok(first.bytes > 0 && second.bytes >= 5 * 16_384, `${first.bytes} and ${second.bytes} bytes`);
});

test("a large response leaves room in the socket for others, to a client that reads slowly", async () => {
  scripts.set("/bulk", bulk(2 ** 25));
  const client = await open({
    greeting: settings([INITIAL_WINDOW, 2 ** 30]),
    window: 2 ** 30,
    raises: false,
    more: [windowUpdate(0, 2 ** 30)],
  });
  client.credit += 2 ** 30;
  const large = client.ask("/bulk");
  await client.when("it begins", () => large.bytes > 0);
  client.socket.pause();
  await sleep(100); // it fills all buffers on the way
  scripts.set("/bulk/2", bulk(2 ** 20));
  const second = client.ask("/bulk/2");
  await sleep(100);
  client.socket.resume();
  await second.done(20_000);
  assert.ok(!large.ended, "the large response is not over before the small one");
});

test("a response for which the client raises no window is not read from the server", async () => {
  let isRead = false;
  scripts.set("/bulk", async (visit, message, count) => {
    await bulk(2 ** 25)(visit, message, count);
    isRead = true;
  });
  const client = await open({ raises: false }), stream = client.ask("/bulk");
  await client.when("the window is used up", () => stream.credit === 0);
  const waiting = () => h1.last!.socket.writableLength;
  for (let before = -1; before !== waiting();) {
    before = waiting();
    await sleep(100);
  }
  assert.ok(waiting() > 0 && !isRead, "the server waits");
  client.raises = true;
  allow(client, 2 ** 20, stream);
  assert.equal((await stream.done(20_000)).bytes, 2 ** 25);
});

test("an upload that the server does not read is held up at the client", async () => {
  scripts.set("/early/unread", (visit) => visit.socket.pause());
  const client = await open(),
    stream = client.ask("/early/unread", { body: Buffer.alloc(2 ** 25), fields: [["content-length", `${2 ** 25}`]] });
  for (let before = -1; before !== client.window + stream.window;) {
    before = client.window + stream.window;
    await sleep(150);
  }
  assert.equal(stream.window, 0);
  await assertServed(client);
});

/** Sends until the window is used up and not raised again; how many bytes that were. */
async function fill(stream: Stream): Promise<number> {
  for (let size = 0;;) {
    await settled(stream.end as Client);
    if (stream.window === 0) return size;
    const piece = Buffer.alloc(stream.window);
    await stream.sendData(piece);
    size += piece.length;
  }
}

test("more data than a stream's window allows resets it with FLOW_CONTROL_ERROR", async () => {
  const client = await open(), first = client.ask("/one/hold"); // the one that its service takes at a time
  await until("the server has been asked", () => h1.last?.received.includes("/one/hold"));
  const second = client.ask("/one/waits", { ends: false });
  await settled(client);
  await fill(second);
  client.send(data(second.id, "x"));
  assert.equal((await second.done()).result, "FLOW_CONTROL_ERROR");
  await assertServed(client);
  first.reset();
});

test("as much data as a stream's window allows is kept while its request waits", async () => {
  const client = await open(), first = client.ask("/one/hold");
  await until("the server has been asked", () => h1.last?.received.includes("/one/hold"));
  const second = client.ask("/one/waits", { ends: false });
  await settled(client);
  const size = await fill(second);
  first.reset();
  await client.when(
    "the window is raised",
    () => client.frames.some((one) => one.type === WINDOW_UPDATE && one.stream === second.id),
  );
  client.send(data(second.id, "", END_STREAM));
  assert.equal((await second.done()).json().bodyLength, size);
});

const residentOf = (pid: number) => Number(readFileSync(`/proc/${pid}/statm`, "utf8").split(" ")[1]) * 4_096;
test("bodies in frames of one byte take hardly more memory than others while they wait", async () => {
  const client = await open(), first = client.ask("/one/hold"), size = 63 * 4_096;
  await until("the server has been asked", () => h1.last?.received.includes("/one/hold"));
  const waiting = Array.from({ length: 20 }, () => client.ask("/one/waits", { ends: false }));
  await settled(client);
  const before = residentOf(lb.pid);
  for (const stream of waiting) {
    const bytes = Buffer.concat(Array.from({ length: 4_096 }, () => data(stream.id, "x")));
    for (let sent = 0; sent < size; sent += 4_096) {
      await client.when("a window", () => client.window >= 4_096);
      client.window -= 4_096;
      stream.window -= 4_096;
      client.send(bytes);
    }
  }
  await settled(client);
  const grown = Math.round((residentOf(lb.pid) - before) / 2 ** 20);
  assert.ok(grown < 400, `the program has grown by ${grown} MiB`);
  first.reset();
  for (const stream of waiting) client.send(data(stream.id, "", END_STREAM));
  for (const stream of waiting) assert.equal((await stream.done()).json().bodyLength, size);
});

// ─── Servers that speak HTTP/2 ───

test("requests to a server of HTTP/2 share one connection", async () => {
  const client = await open(), paths = Array.from({ length: 30 }, (_, i) => `/h2/shared/${i}`);
  const fromH2 = paths.map((path) => client.ask(path).done()), fromH1 = paths.slice(0, 10).map((path) => ask1(path));
  for (const stream of await Promise.all(fromH2)) assert.equal(stream.result, "200");
  for (const got of await Promise.all(fromH1)) assert.equal(status(got), 200);
  assert.equal(h2.ends.length, 1);
});

test("more requests than a server takes on a connection open another", async () => {
  h2.options = { greeting: settings([MAX_STREAMS, 2]) };
  const begun: Stream[] = [];
  h2.script = (stream) => void begun.push(stream);
  const client = await open(), streams = Array.from({ length: 7 }, (_, i) => client.ask(`/h2/few/${i}`));
  await until("all are there", () => begun.length === 7);
  const counts = h2.ends.map((end) => end.streams.size);
  assert.equal(counts.reduce((a, b) => a + b), 7);
  assert.ok(counts.every((count) => count <= 2), `streams on each connection: ${counts}`);
  for (const stream of begun) await stream.respond(200, [], "hello");
  for (const stream of streams) assert.equal((await stream.done()).result, "200");
  h2.script = echoH2;
  await assertServed(client, "/h2/few");
  assert.equal(h2.ends.length, counts.length, "connections are used again");
});

test("a burst that opens several connections before a server says how many streams it takes is served", async () => {
  const clients = [await open(), await open()];
  await assertServed(clients[0]!, "/h2/known"); // what the server said last: nothing
  const known = h2.ends.splice(0)[0]!;
  known.send(goAway(1));
  await known.closed();
  h2.options = { greeting: Buffer.alloc(0) };
  const asked = clients.flatMap((client) => Array.from({ length: 75 }, () => client.ask("/h2/burst")));
  await until("two connections are open", () => h2.ends.length === 2);
  const greeting = settings([MAX_STREAMS, 7]);
  h2.options = { greeting };
  h2.ends[0]!.send(greeting);
  await until("others are open", () => h2.ends.length > 2);
  h2.ends[1]!.send(greeting);
  for (const stream of asked) await stream.done();
  assert.deepEqual([...new Set(asked.map(({ result }) => result))], ["200"]);
});

test("a server that lowers its streams to 1 is asked over more connections", async () => {
  const client = await open();
  await assertServed(client, "/h2/first");
  h2.options = { greeting: settings([MAX_STREAMS, 1]) };
  h2.ends[0]!.send(settings([MAX_STREAMS, 1]));
  const acks = () => h2.ends[0]!.frames.filter((one) => one.type === SETTINGS && one.flags === ACK).length;
  await h2.ends[0]!.when("SETTINGS are answered", () => acks() === 2);
  const begun: Stream[] = [];
  h2.script = (stream) => void begun.push(stream);
  const streams = [1, 2, 3].map((i) => client.ask(`/h2/one/${i}`));
  await until("all are there", () => begun.length === 3);
  assert.equal(new Set(begun.map((stream) => stream.end)).size, 3);
  for (const stream of begun) await stream.respond(200);
  for (const stream of streams) assert.equal((await stream.done()).result, "200");
});

test("GOAWAY of a server moves what it has not looked at to another connection, a POST exactly once", async () => {
  const begun: Stream[] = [];
  h2.script = (stream) => void begun.push(stream);
  const client = await open(), first = client.ask("/h2/goaway/1", { body: "one" });
  await until("it is there", () => begun.length === 1);
  const second = client.ask("/h2/goaway/2", { body: "two" }), third = client.ask("/h2/goaway/3");
  await until("all are there", () => begun.length === 3);
  h2.ends[0]!.send(goAway(1));
  await until("the others are asked again", () => begun.length === 5);
  assert.ok(begun.slice(3).every((stream) => stream.end === h2.ends[1]), "over a second connection");
  await Promise.all([begun[0]!, begun[3]!, begun[4]!].map((stream) => echoH2(stream, h2)));
  for (const stream of [first, second, third]) assert.equal((await stream.done()).result, "200");
  assert.deepEqual([first.json().bodyLength, second.json().bodyLength], [3, 3]);
  assert.equal(h2.requests.length, 5);
  await h2.ends[0]!.closed();
  await assertAttempts("/h2/goaway/2", 1);
});

/** One line of the log says how many attempts a request took. */
async function assertAttempts(path: string, attempts: number): Promise<void> {
  assert.equal((await logged(path))["lb.attempts"], attempts, `attempts for ${path}`);
}

test("GOAWAY of a server does not repeat a POST that it may have looked at", async () => {
  h2.script = async (stream) => {
    await stream.done();
    stream.end.send(goAway(stream.id));
    stream.end.socket.end();
  };
  const client = await open(), stream = client.ask("/h2/goaway/post", { body: "one" });
  assert.equal((await stream.done()).result, "502");
  assert.equal(h2.requests.length, 1);
});

test("two GOAWAYs, as of a server that drains, lose no request", async () => {
  h2.script = async (stream) => {
    if (stream.id === 3) stream.end.send(goAway(2 ** 31 - 1));
    await stream.done();
    await sleep(30);
    if (stream.id === 3) stream.end.send(goAway(3));
    await stream.respond(200);
  };
  const client = await open(), results: string[] = [];
  for (let i = 0; i < 4; i++) {
    const streams = [1, 2, 3].map((n) => client.ask(`/h2/drains/${i}/${n}`));
    for (const stream of streams) results.push((await stream.done()).result);
  }
  assert.deepEqual(results, results.map(() => "200"));
});

test("a request that a server refuses with REFUSED_STREAM is asked again, also a POST", async () => {
  let refused = 0;
  h2.script = (stream, server) => refused++ ? echoH2(stream, server) : stream.reset("REFUSED_STREAM");
  const client = await open(), stream = client.ask("/h2/refused/once", { body: "hello" });
  assert.equal((await stream.done()).json().bodyLength, 5);
  assert.equal(h2.requests.length, 2);
});

const CHUNKED = { method: "POST", fields: "Transfer-Encoding: chunked\r\n", body: "5\r\nhello\r\n0\r\n\r\n" };
test("a small POST without a length is asked again where the server has not looked at it", async () => {
  const client = await open();
  const refusals: Record<string, (stream: Stream) => void> = {
    "REFUSED_STREAM": (stream) => stream.reset("REFUSED_STREAM"),
    "GOAWAY": (stream) => stream.end.send(goAway(Math.max(0, stream.id - 2))),
  };
  for (const [name, refuse] of Object.entries(refusals)) {
    const hash = (body: string) => createHash("sha256").update(body).digest("hex"), many = bytesOf(300).toString();
    const asks: Record<string, [body: string, ask: () => Promise<Echo>]> = {
      "HTTP/2": ["hello", async () => (await client.ask("/h2/unsized", { body: "hello", sized: false }).done()).json()],
      "HTTP/2 in many pieces": [many, async () => {
        const stream = client.ask("/h2/unsized", { ends: false });
        for (const one of many) await stream.sendData(one);
        await stream.sendData("", true);
        return (await stream.done()).json();
      }],
      "HTTP/1.1": ["hello", async () => JSON.parse((await ask1("/h2/unsized", CHUNKED)).body.toString())],
    };
    for (const [version, [body, ask]] of Object.entries(asks)) {
      let refused = 0;
      h2.requests = [];
      h2.script = async (stream, server) => {
        await stream.done(); // the whole body has been sent
        if (refused++) await echoH2(stream, server);
        else refuse(stream);
      };
      assert.equal((await ask()).sha256, hash(body), `${name}, ${version}`);
      assert.equal(h2.requests.length, 2, `${name}, ${version}`);
    }
  }
});

test("a POST without a length is not asked again where it may have been looked at, has trailers or is too large", async () => {
  const client = await open();
  h2.script = async (stream) => {
    await stream.done();
    stream.reset("INTERNAL_ERROR");
  };
  assert.equal((await client.ask("/h2/unsized", { body: "hello", sized: false }).done()).status, 502);
  assert.equal(h2.requests.length, 1);
  h2.script = async (stream) => {
    await stream.done();
    stream.reset("REFUSED_STREAM");
  };
  const large = { body: Buffer.alloc(100_000), sized: false },
    trailed = { body: "hello", trailers: [["x", "1"] as Field] };
  for (const asking of [large, trailed]) {
    const streams = [1, 2].map(() => client.ask("/either", asking));
    for (const stream of streams) await stream.done();
    assert.deepEqual(streams.map(({ status }) => status).sort(), [200, 502]);
  }
  assert.equal(h2.requests.length, 3);
});

test("a small PUT without a length is asked of another server after a failure, with all of its body", async () => {
  const client = await open();
  h2.script = async (stream) => {
    await stream.done();
    stream.reset("INTERNAL_ERROR");
  };
  for (let i = 0; i < 2; i++) {
    const put = client.ask("/either", { method: "PUT", body: "hello", sized: false });
    assert.equal((await put.done()).json().bodyLength, 5);
    assert.equal(JSON.parse((await ask1("/either", { ...CHUNKED, method: "PUT" })).body.toString()).bodyLength, 5);
  }
  assert.ok(h2.requests.length > 0, "it was asked");
});

test("a request that a server always refuses is answered with 502", async () => {
  h2.script = (stream) => stream.reset("REFUSED_STREAM");
  const stream = await (await open()).ask("/h2/refused/always", { body: "hello" }).done();
  assert.equal(stream.status, 502);
  assert.ok(h2.requests.length <= 3, `it was asked ${h2.requests.length} times`);
});

for (const code of ["CANCEL", "INTERNAL_ERROR", "PROTOCOL_ERROR", "NO_ERROR"] as const) {
  test(`a request that a server resets with ${code} is answered with 502 and not repeated`, async () => {
    h2.script = (stream) => stream.reset(code);
    const client = await open(), stream = await client.ask("/h2/reset", { body: "hello" }).done();
    assert.deepEqual([stream.status, stream.header("x-lb-failure")], [502, "reset"]);
    assert.equal(h2.requests.length, 1);
    assert.equal(h2.ends.length, 1);
  });
}

test("a reset behind the head cuts the response of clients of both versions", async () => {
  h2.script = async (stream) => {
    stream.sendHead([[":status", "200"], ["content-length", "10"]]);
    await stream.sendData("hello");
    await sleep(20);
    stream.reset("INTERNAL_ERROR");
  };
  const client = await open(), stream = await client.get("/h2/cut");
  assert.match(stream.result, /^200 (?:INTERNAL_ERROR|CANCEL)$/);
  const got = await ask1("/h2/cut");
  assert.deepEqual([status(got), got.complete, got.body.toString()], [200, false, "hello"]);
  h2.script = async (stream) => {
    stream.sendHead([[":status", "200"]]);
    await stream.sendData("hello");
    await sleep(20);
    stream.end.socket.destroy();
  };
  const chunked = await ask1("/h2/cut");
  assert.deepEqual([status(chunked), chunked.complete], [200, false]);
});

test("a response that ends while the upload goes on is complete, and its connection goes on", async () => {
  h2.script = async (stream) => {
    await stream.respond(200, [["content-length", "5"]], "hello");
    stream.reset("NO_ERROR");
  };
  const client = await open(), stream = client.ask("/h2/enough", { body: Buffer.alloc(100_000), ends: false });
  await client.when("the response", () => stream.ended);
  assert.equal(stream.body.toString(), "hello");
  h2.script = echoH2;
  await assertServed(client, "/h2/next");
  assert.equal(h2.ends.length, 1);
});

test("an upload keeps to the windows of a server, however small", async () => {
  h2.options = { greeting: settings([INITIAL_WINDOW, 10]), window: 10 };
  const body = bytesOf(3_000), client = await open();
  const seen = (await client.ask("/h2/small", { body }).done()).json();
  assert.equal(seen.sha256, createHash("sha256").update(body).digest("hex"));
});

test("an upload that a server of HTTP/2 gives no window is held up at the client, and goes on with a window", async () => {
  h2.options = { raises: false };
  const client = await open(), size = 2 ** 22, stream = client.ask("/h2/unread", { body: Buffer.alloc(size) });
  await until("the server's window is used up", () => h2.requests[0]?.credit === 0);
  for (let before = -1; before !== stream.window;) {
    before = stream.window;
    await sleep(50);
  }
  assert.equal(stream.window, 0);
  const [seen] = h2.requests as [Stream];
  seen.end.raises = true;
  seen.end.credit += 2 ** 20;
  seen.credit += 2 ** 20;
  seen.end.send(windowUpdate(0, 2 ** 20), windowUpdate(seen.id, 2 ** 20));
  assert.equal((await stream.done()).json().bodyLength, size);
});

test("responses that cross the reset of their streams are ignored, however many", async () => {
  h2.options = { greeting: settings([MAX_STREAMS, 1_000]) };
  const begun: Stream[] = [];
  h2.script = (stream) => void begun.push(stream);
  const gone = [await open(), await open()], stays = await open(), kept = stays.ask("/h2/cross/kept");
  await until("it is there", () => begun.length === 1);
  for (const client of gone) for (let i = 0; i < 80; i++) client.ask(`/h2/cross/${i}`);
  await until("all are there", () => begun.length === 161);
  assert.equal(h2.ends.length, 1);
  for (const client of gone) client.destroy();
  await h2.ends[0]!.when("all are reset", () => begun.slice(1).every((one) => one.wasReset));
  for (const stream of begun.slice(1)) {
    stream.end.send(headers(stream.id, block(OK), 0), data(stream.id, "late", END_STREAM));
  }
  await begun[0]!.respond(200, [], "hello");
  assert.equal((await kept.done()).result, "200");
  assert.equal(h2.ends[0]!.goAway, undefined);
});

test("a connection that a server has closed meanwhile is replaced", async () => {
  const client = await open();
  for (let i = 0; i < 3; i++) {
    await assertServed(client, "/h2/replaced");
    await h2.ends[i]!.close();
  }
  assert.equal(h2.ends.length, 3);
});

test("a server's PING is answered, and its SETTINGS", async () => {
  await assertServed(await open(), "/h2/ping");
  const [end] = h2.ends as [typeof h2.ends[0] & object];
  end.send(frame(PING, 0, 0, "\0\xff345678"), settings([MAX_FRAME, 20_000]));
  const pong = await end.when("an answer", () => end.frames.find((one) => one.type === PING));
  assert.deepEqual([pong.flags, pong.payload.toString("latin1")], [ACK, "\0\xff345678"]);
  await end.when("an ACK", () => end.frames.filter((one) => one.type === SETTINGS && one.flags === ACK).length === 2);
});

/** What a server answers with, as frames on stream 0 that stands for its own: each is a 502, and the connection goes on. */
const whole = (...fields: Field[]) => [headers(0, block(...fields))];
const withBody = (...fields: Field[]) => [headers(0, block(...fields), 0), data(0, "hello", END_STREAM)];
const OK: Field = [":status", "200"];
const BAD_ANSWERS: Record<string, Buffer[]> = {
  "no fields": whole(),
  "no :status": whole(["x", "1"]),
  "an empty :status": whole([":status", ""]),
  "a :status of two digits": whole([":status", "20"]),
  "a :status of four digits": whole([":status", "2000"]),
  "a :status that begins with 0": whole([":status", "099"]),
  "a :status with a text": whole([":status", "200 OK"]),
  "a :status with a sign": whole([":status", "+200"]),
  "two :status": whole(OK, OK),
  "a :status behind a field": whole(["x", "1"], OK),
  "a pseudo-field of requests": whole(OK, [":path", "/"]),
  "101": whole([":status", "101"]),
  "an interim response that ends": whole([":status", "103"]),
  "an uppercase name": withBody(OK, ["X-Y", "1"]),
  "a name with a blank": withBody(OK, ["x y", "1"]),
  "a name with a colon": withBody(OK, ["x:", "1"]),
  "an empty name": withBody(OK, ["", "1"]),
  "a value with CR and LF": withBody(OK, ["x", "1\r\nset-cookie: a=1"]),
  "a value with NUL": withBody(OK, ["x", "1\0"]),
  "a value with a blank in front": withBody(OK, ["x", " 1"]),
  "connection": withBody(OK, ["connection", "close"]),
  "keep-alive": withBody(OK, ["keep-alive", "timeout=5"]),
  "transfer-encoding": withBody(OK, ["transfer-encoding", "chunked"]),
  "upgrade": withBody(OK, ["upgrade", "h2c"]),
  "two content-length": withBody(OK, ["content-length", "5"], ["content-length", "5"]),
  "a content-length that is no number": withBody(OK, ["content-length", "5x"]),
  "a content-length with a sign": withBody(OK, ["content-length", "+5"]),
  "a content-length and no body": whole(OK, ["content-length", "5"]),
  "70,000 bytes of fields": [
    frame(HEADERS, 0, 0, block(OK, ["x", "x".repeat(16_000)])),
    ...Array.from({ length: 4 }, () => frame(CONTINUATION, 0, 0, block(["x", "x".repeat(14_000)]))),
    frame(CONTINUATION, END_HEADERS, 0),
  ],
};
for (const [name, frames] of Object.entries(BAD_ANSWERS)) {
  test(`a response of HTTP/2 with ${name} is answered with 502, and the connection goes on`, async () => {
    const client = await open();
    h2.script = (stream) => stream.end.send(...frames.map((one) => onStream(one, stream.id)));
    const { status, header, end } = await client.get("/h2/bad").then((stream) => ({
      status: stream.status,
      header: stream.header("x-lb-failure"),
      end: h2.ends[0]!,
    }));
    assert.deepEqual([status, header], [502, "invalid-answer"]);
    h2.script = echoH2;
    await assertServed(client, "/h2/good");
    assert.ok(!end.goAway && h2.ends.length === 1, "over the same connection");
  });
}

/** A frame on another stream. */
function onStream(bytes: Buffer, id: number): Buffer {
  const copy = Buffer.from(bytes);
  copy.writeUInt32BE(id, 5);
  return copy;
}

test("DATA in front of a response's head is answered with 502", async () => {
  h2.script = (stream) => stream.end.send(data(stream.id, "hello", END_STREAM));
  const client = await open();
  assert.equal((await client.get("/h2/bad")).status, 502);
});

/** Bodies that do not have the announced length: what a client of HTTP/1.1 gets behind the head. */
const BAD_BODIES: Record<string, [frames: (Buffer | number)[], body: RegExp]> = {
  "more than announced": [[
    headers(0, block(OK, ["content-length", "5"]), 0),
    data(0, "helloHTTP/1.1 200 OK\r\n\r\n", END_STREAM),
  ], /^(?:hello)?$/],
  "more than announced, a while later": [
    [
      headers(0, block(OK, ["content-length", "5"]), 0),
      30,
      data(0, "hello"),
      30,
      data(0, "HTTP/1.1 200 OK\r\n\r\n", END_STREAM),
    ],
    /^(?:hello)?$/,
  ],
  "less than announced": [
    [headers(0, block(OK, ["content-length", "5"]), 0), 30, data(0, "hell", END_STREAM)],
    /^hell$/,
  ],
  "trailers with a pseudo-field": [
    [headers(0, block(OK, ["content-length", "5"]), 0), data(0, "hell"), 30, headers(0, block([":status", "200"]))],
    /^hell$/,
  ],
  "trailers that do not end": [
    [headers(0, block(OK), 0), 30, data(0, "hello"), headers(0, block(["x", "1"]), 0)],
    /hello/,
  ],
};
for (const [name, [parts, body]] of Object.entries(BAD_BODIES)) {
  test(`a response of HTTP/2 with ${name} is cut, and brings nothing behind it`, async () => {
    h2.script = async (stream) => {
      for (const part of parts) {
        await (typeof part === "number" ? sleep(part) : stream.end.send(onStream(part, stream.id)));
      }
    };
    const client = await open(), stream = await client.get("/h2/bad");
    assert.notEqual(stream.result, "200");
    const { bytes, closed } = await rawRequest(lb.port, "GET /h2/bad HTTP/1.1\r\nHost: a.test\r\n\r\n");
    const [head, rest] = bytes.toString("latin1").split("\r\n\r\n") as [string, string];
    if (head.includes(" 502 ")) return;
    assert.match(bytes.subarray(head.length + 4).toString("latin1"), body, rest);
    assert.ok(closed, "the client sees that it is cut");
  });
}

/** What a server sends that ends its connection. */
const BAD_SERVERS: Record<string, [frames: (id: number) => Buffer[], code: Code]> = {
  "PUSH_PROMISE": [
    (id) => [frame(PUSH_PROMISE, END_HEADERS, id, Buffer.concat([u32(2), block(...request("/"))]))],
    "PROTOCOL_ERROR",
  ],
  "SETTINGS that allow push": [() => [settings([ENABLE_PUSH, 1])], "PROTOCOL_ERROR"],
  "HEADERS on a stream that was never begun": [(id) => [headers(id + 2, block(OK))], "PROTOCOL_ERROR"],
  "HEADERS on a stream with an even number": [() => [headers(2, block(OK))], "PROTOCOL_ERROR"],
  "DATA on stream 0": [() => [data(0, "x")], "PROTOCOL_ERROR"],
  "PING of 7 bytes": [() => [frame(PING, 0, 0, "1234567")], "FRAME_SIZE_ERROR"],
  "a frame of 16,385 bytes": [() => [frame(99, 0, 0, Buffer.alloc(16_385))], "FRAME_SIZE_ERROR"],
  "a header block that cannot be read": [(id) => [headers(id, hex("80"))], "COMPRESSION_ERROR"],
  "a size of the table above what was allowed": [
    (id) => [headers(id, Buffer.concat([hex("3fe21f"), block(OK)]))],
    "COMPRESSION_ERROR",
  ],
  "CONTINUATION without HEADERS": [(id) => [frame(CONTINUATION, END_HEADERS, id, block(OK))], "PROTOCOL_ERROR"],
  "WINDOW_UPDATE of 0 for the connection": [() => [windowUpdate(0, 0)], "PROTOCOL_ERROR"],
  "a window beyond 2^31-1 for the connection": [() => [windowUpdate(0, 2 ** 31 - 1)], "FLOW_CONTROL_ERROR"],
};
for (const [name, [frames, code]] of Object.entries(BAD_SERVERS)) {
  test(`a server that sends ${name} is left with ${code}, and the request is answered with 502`, async () => {
    const client = await open();
    h2.script = (stream) => stream.end.send(...frames(stream.id));
    assert.equal((await client.get("/h2/broken")).status, 502);
    await until("it is left", () => h2.ends[0]!.over);
    assert.equal(h2.ends[0]!.goAway?.code, code);
    h2.script = echoH2;
    await assertServed(client, "/h2/good");
  });
}

test("a server that does not begin with SETTINGS is left with PROTOCOL_ERROR, and the request is answered with 502", async () => {
  for (
    const greeting of [
      frame(PING, 0, 0, "12345678"),
      Buffer.from("HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"),
    ]
  ) {
    h2.options = { greeting };
    h2.ends = [];
    assert.equal((await (await open()).get("/h2/greeting")).status, 502);
    await until("it is left", () => h2.ends[0]!.over);
    assert.match(h2.ends[0]!.goAway?.code ?? "", /^(?:PROTOCOL_ERROR|FRAME_SIZE_ERROR)$/);
  }
});

/** The latest warning about a server of the service of a path. */
const warned = (path: string) => lb.output().split("\n").findLast((line) => line.includes(`warn: ${path}: `)) ?? "";

test("a server of HTTP/1.1 behind h2c:// is answered for with 502, and the log says what to write", async () => {
  assert.equal((await (await open()).get("/not-h2")).status, 502);
  assert.equal((await logged("/not-h2"))["error.type"], "connect");
  await until("a warning", () => /it speaks HTTP\/1\.1, .*write http:\/\//.test(warned("/not-h2")));
});

test("a server that takes no streams at all is answered for with a failure, and not asked for ever", async () => {
  h2.options = { greeting: settings([MAX_STREAMS, 0]) };
  const stream = await (await open()).ask("/h2/none", { body: "hello" }).done();
  assert.ok(stream.status >= 502, stream.result);
  assert.ok(h2.ends.length <= 5, `${h2.ends.length} connections`);
});

test("a server that says GOAWAY at once is answered for with 502, and not asked for ever", async () => {
  h2.options = { greeting: Buffer.concat([settings(), goAway(0)]) };
  const stream = await (await open()).get("/h2/gone");
  assert.equal(stream.status, 502);
  assert.ok(h2.ends.length <= 5, `${h2.ends.length} connections`);
});

test("a server that closes at once is answered for with 502", async () => {
  h2.options = { greeting: Buffer.alloc(0) };
  await sleep(1_000); // a server is reported once a second
  const asked = (await open()).get("/h2/closes");
  let isOver = false;
  asked.then(() => isOver = true);
  await until("it is answered", () => {
    for (const end of h2.ends) end.socket.destroy();
    return isOver;
  });
  assert.equal((await asked).status, 502);
  await until("a warning", () => /it has not spoken HTTP\/2: .* write http:\/\//.test(warned("/h2")));
});

/** What a server sends again and again. */
const SERVER_FLOODS: Record<string, [begin: (id: number) => Buffer, again: (id: number) => Buffer]> = {
  "PING": [() => frame(99, 0, 0), () => frame(PING, 0, 0, "12345678")],
  "SETTINGS": [() => frame(99, 0, 0), () => settings()],
  "empty DATA": [(id) => headers(id, block(OK), 0), (id) => data(id, "")],
  "empty CONTINUATION": [(id) => frame(HEADERS, 0, id, block(OK)), (id) => frame(CONTINUATION, 0, id)],
  "CONTINUATION of 16 KiB": [
    (id) => frame(HEADERS, 0, id, block(OK)),
    (id) => frame(CONTINUATION, 0, id, Buffer.alloc(16_384)),
  ],
  "frames of an unknown type": [() => frame(99, 0, 0), () => frame(99, 0, 0)],
};
for (const [name, [begin, again]] of Object.entries(SERVER_FLOODS)) {
  test(`a flood of ${name} of a server ends its connection with ENHANCE_YOUR_CALM`, async () => {
    h2.script = async (stream) => {
      stream.end.answers = false;
      stream.end.send(begin(stream.id));
      for (let i = 0; i < 5_000 && !stream.end.over; i += 50) {
        stream.end.send(...Array.from({ length: 50 }, () => again(stream.id)));
        await new Promise((resolve) => setImmediate(resolve));
      }
    };
    const client = await open(), stream = await client.get("/h2/flood");
    assert.match(stream.result, /^(?:502|200 (?:INTERNAL_ERROR|CANCEL))$/);
    await until("it is left", () => h2.ends[0]!.over);
    assert.equal(h2.ends[0]!.goAway?.code, "ENHANCE_YOUR_CALM");
    h2.script = echoH2;
    await assertServed(client, "/h2/good");
  });
}

test("a body behind a head that has none is thrown away, and the connection of the client goes on", async () => {
  h2.script = async (stream) => {
    const method = valueOf(stream.head, ":method"), code = valueOf(stream.head, ":path").slice(-3);
    stream.sendHead([
      [":status", method === "HEAD" ? "200" : code],
      ...method === "HEAD" ? [["content-length", "5"]] as Field[] : [],
    ]);
    await stream.sendData("HTTP/1.1 200 OK\r\n\r\n", true);
  };
  const client = await open();
  for (const [method, path] of [["HEAD", "/h2/200"], ["GET", "/h2/204"], ["GET", "/h2/304"]] as const) {
    const head = (one: string) => `${one} ${path} HTTP/1.1\r\nHost: a.test\r\n\r\n`,
      next = "GET /next HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n";
    const { answers } = await rawRequest(lb.port, head(method) + next, { methods: [method] });
    assert.deepEqual(
      answers.map((one) => [status(one), one.complete]),
      [[Number(path.slice(-3)), true], [200, true]],
      `${method} ${path}`,
    );
    const stream = await client.ask(path, { method }).done();
    assert.deepEqual([stream.status, stream.bytes], [Number(path.slice(-3)), 0]);
  }
  await assertServed(client);
});

test("a response without a body may end in a frame of its own: nothing is reset, and the log has no failure", async () => {
  h2.script = async (stream) => {
    stream.sendHead([[":status", valueOf(stream.head, ":path").slice(-3)]]);
    await sleep(20);
    await stream.sendData("", true);
  };
  const client = await open();
  for (const [method, path] of [["HEAD", "/h2/ends/200"], ["GET", "/h2/ends/204"], ["GET", "/h2/ends/304"]] as const) {
    assert.equal((await client.ask(path, { method }).done()).status, Number(path.slice(-3)));
    assert.equal((await logged(path))["error.type"], undefined, path);
  }
  assert.deepEqual(h2.requests.map((one) => one.wasReset), [undefined, undefined, undefined]);
});

test("interim responses without end are answered for with 502, as one head that is too long", async () => {
  h2.script = async (stream) => {
    for (let i = 0; i < 1_000 && !stream.wasReset && !stream.end.over; i++) {
      stream.sendHead([[":status", "103"], ["link", "x".repeat(1_000)]]);
      if (i % 10 === 0) await new Promise((resolve) => setImmediate(resolve));
    }
  };
  const client = await open(), stream = await client.get("/h2/hints");
  assert.deepEqual([stream.status, stream.header("x-lb-failure")], [502, "invalid-answer"]);
  assert.ok(stream.interim.length < 100, `${stream.interim.length} interim responses`);
  h2.script = echoH2;
  await assertServed(client, "/h2/good");
});

test("a request that a server of HTTP/2 resets is asked of another server where it may be repeated", async () => {
  h2.script = (stream) => stream.reset("INTERNAL_ERROR");
  const client = await open();
  for (let i = 0; i < 4; i++) assert.equal((await client.get("/either")).result, "200");
  assert.ok(h2.requests.length > 0, "it was asked");
  const posts = [1, 2].map(() => client.ask("/either", { body: "hello" }));
  for (const post of posts) await post.done();
  assert.deepEqual(posts.map(({ status }) => status).sort(), [200, 502], "a POST is not repeated");
});

// ─── Servers over TLS ───

test("http: 2 and auto ask https:// servers over HTTP/2, on one connection each", async () => {
  const client = await open(), body = Buffer.alloc(100_000);
  for (const path of ["/two", "/auto"]) {
    const streams = [1, 2, 3].map(() => client.ask(path, { body }));
    for (const stream of streams) assert.equal((await stream.done()).json().bodyLength, body.length, path);
  }
  assert.equal(secure.ends.length, 2);
  assert.deepEqual(secure.requests.map(({ head }) => valueOf(head, ":scheme")), secure.requests.map(() => "https"));
  assert.deepEqual(secure.ends.flatMap((end) => end.faults), []);
});

test("http: auto asks servers that do not choose HTTP/2 over HTTP/1.1", async () => {
  const client = await open();
  for (const path of ["/auto-old", "/auto-mute"]) {
    const streams = [1, 2, 3].map(() => client.ask(path, { body: "hello" }));
    for (const stream of streams) assert.equal((await stream.done()).body.toString(), "old", path);
    assert.equal((await client.get(path)).body.toString(), "old", path);
  }
});

test("http: 2 answers for servers that do not choose HTTP/2 with 502, and the log says why", async () => {
  const client = await open();
  for (const path of ["/two-old", "/two-mute"]) {
    const refused = await client.get(path);
    assert.deepEqual([refused.status, refused.header("x-lb-failure")], [502, "connect"], path);
    assert.equal((await logged(path))["error.type"], "connect");
    await until("a warning", () => /it does not offer HTTP\/2 by ALPN; .*http: 1\.1 or auto/.test(warned(path)));
  }
});

test("node:http2 is asked as a server, over TLS", async () => {
  const client = await open(), body = Buffer.alloc(100_000);
  const asked = [1, 2, 3, 4].map(() => client.ask("/foreign", { body, fields: [["x-y", "1"]] }));
  for (const stream of asked) assert.equal((await stream.done()).body.toString(), "2.0 POST 100000 1");
});

test("a server over h2c is probed by requests of HTTP/2", async () => {
  const client = await open();
  await until("it is probed", () => probed.requests.some(({ head }) => valueOf(head, ":path") === "/healthz"));
  await untilAsync("it is up", async () => (await client.get("/probed")).status === 200);
  probed.script = (stream) => stream.respond(503);
  await untilAsync("it is down", async () => (await client.get("/probed")).header("x-lb-failure") === "no-server");
  probed.script = (stream) => stream.respond(200);
  await untilAsync("it is up again", async () => (await client.get("/probed")).status === 200);
  assert.deepEqual(probed.ends.flatMap((end) => end.faults), []);
});

async function untilAsync(what: string, look: () => Promise<boolean>): Promise<void> {
  for (const end = Date.now() + 8_000; !(await look()); await sleep(20)) assert.ok(Date.now() < end, what);
}

// ─── Clients over TLS, and foreign ones ───

test("clients over TLS choose HTTP/2 by ALPN, others stay with HTTP/1.1", async () => {
  const modern = await open({ tls: { ca: CA, protocols: ["h2", "http/1.1"] } }, tlsPort);
  assert.equal((modern.socket as TLSSocket).alpnProtocol, "h2");
  const stream = await modern.ask("/tls", { body: Buffer.alloc(300_000) }).done();
  assert.equal(stream.json().bodyLength, 300_000);
  assert.match(JSON.stringify(stream.json().rawHeaders), /"x-forwarded-proto","https"/i);
  const socket = connectTls({
    port: tlsPort,
    host: "127.0.0.1",
    ca: CA,
    servername: "a.test",
    ALPNProtocols: ["http/1.1"],
  });
  let got = "";
  socket.on("data", (bytes: Buffer) => got += bytes.toString("latin1"));
  socket.on("secureConnect", () => socket.write("GET /tls HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n"));
  await until("HTTP/1.1 is answered", () => got.startsWith("HTTP/1.1 200 "));
  socket.destroy();
});

test("a client without prior knowledge is served over HTTP/1.1 on the same listener", async () => {
  assert.equal(status(await ask1("/plain")), 200);
  const { answers } = await rawRequest(lb.port, "PRI * HTTP/2.0\r\n\r\nGE /dirty HTTP/1.1\r\n\r\n");
  assert.ok(answers.length === 0 || status(answers[0]!) >= 400);
  assertClean();
});

test("node:http2 is served as a client, over TLS", async () => {
  const session = connectHttp2(`https://127.0.0.1:${tlsPort}`, {
    ca: CA,
    servername: "a.test",
    rejectUnauthorized: false,
    settings: { headerTableSize: 0 }, // nghttp2 then waits to hear that
  });
  session.on("error", () => {});
  const ask = (path: string, body = "") =>
    new Promise<string>((resolve, reject) => {
      const stream = session.request({ ":path": path, ":method": body ? "POST" : "GET", "x-y": "1" });
      let text = "";
      stream.setEncoding("utf8");
      stream.on("data", (piece: string) => text += piece).on("end", () => resolve(text)).on("error", reject);
      if (body) stream.end(body);
    });
  const all = await Promise.all(
    Array.from({ length: 20 }, (_, i) => ask(`/from-http2/${i}`, i % 2 ? "x".repeat(50_000) : "")),
  );
  assert.deepEqual(all.map((text) => JSON.parse(text).bodyLength), all.map((_, i) => i % 2 ? 50_000 : 0));
  session.destroy();
});

// ─── WebSockets (RFC 8441) ───

const HANDSHAKE: Field[] = [["sec-websocket-version", "13"], ["origin", "http://a.test"]];
/** Opens a WebSocket over HTTP/2; its frames are those of HTTP/1.1, in DATA. */
function connectWebSocket(client: Client, path: string, fields: Field[] = []): Stream {
  const stream = client.stream(), [, ...pseudo] = request(path, [...HANDSHAKE, ...fields]);
  stream.sendHead([[":method", "CONNECT"], [":protocol", "websocket"], ...pseudo]);
  return stream;
}
const masked = (opcode: number, payload: string | Buffer) => encodeFrame(opcode, payload, { mask: true });

test("WebSockets over HTTP/2 are bridged to servers of HTTP/1.1: bytes pass both ways, and both ends", async () => {
  const client = await open();
  await client.when("SETTINGS", () => client.frames.length > 0);
  assert.ok(
    client.frames[0]!.payload.includes(Buffer.concat([Buffer.from([0, ENABLE_CONNECT]), u32(1)])),
    "it is offered",
  );

  ws.answer = () => "Sec-WebSocket-Protocol: chat\r\n";
  const stream = await connectWebSocket(client, "/ws/a?b", [["sec-websocket-protocol", "chat, other"]]).begun();
  assert.equal(stream.status, 200);
  assert.deepEqual(own(stream.head), [[":status", "200"], ["sec-websocket-protocol", "chat"]]);
  ws.answer = () => "";
  const head = ws.heads[0]!;
  assert.match(head, /^GET \/ws\/a\?b HTTP\/1\.1\r\n/);
  for (
    const line of [
      /^host: a\.test\r$/im,
      /^upgrade: websocket\r$/im,
      /^connection: upgrade\r$/im,
      /^sec-websocket-version: 13\r$/im,
    ]
  ) assert.match(head, line);
  assert.match(head, /^origin: http:\/\/a\.test\r$/im);
  assert.match(head, /^sec-websocket-protocol: chat, other\r$/im);
  assert.doesNotMatch(head, /^(?::|content-length|transfer-encoding)/im);

  await stream.sendData(masked(TEXT, "hello"));
  await client.when("an echo", () => stream.bytes >= 7);
  assert.deepEqual(stream.body, encodeFrame(TEXT, "hello"));
  const large = bytesOf(300_000);
  await stream.sendData(masked(BINARY, large));
  await client.when("a large echo", () => stream.bytes === 7 + 10 + large.length, 15_000);
  assert.ok(stream.body.subarray(17).equals(large));
  await assertServed(client);

  // The client ends it.
  await stream.sendData(masked(CLOSE, closing(1000, "bye")));
  await client.when("a close frame", () => stream.bytes === 7 + 10 + large.length + 4);
  assert.deepEqual(stream.body.subarray(-4), encodeFrame(CLOSE, closing(1000)));
  await stream.sendData("", true);
  assert.equal((await stream.done()).result, "200");
  await until("the server's connection has ended", () => ws.peers[0]!.over);
  const { "http.response.status_code": code, "error.type": why } = await logged("/ws/a");
  assert.deepEqual([code, why], [101, undefined]);

  // The server ends it.
  const second = await connectWebSocket(client, "/ws/b").begun();
  ws.peers[1]!.onFrame = undefined;
  ws.peers[1]!.close(1001, "gone");
  await client.when("a close frame", () => second.bytes >= 8);
  assert.deepEqual(second.body, encodeFrame(CLOSE, closing(1001, "gone")));
  await second.sendData(masked(CLOSE, closing(1001)), true);
  assert.deepEqual(await ws.peers[1]!.closed(), [1001, ""]);
  ws.peers[1]!.socket.end();
  assert.equal((await second.done()).result, "200");

  // A reset of the client, and a server that dies.
  const third = await connectWebSocket(client, "/ws/c").begun();
  third.reset();
  await until("the server's connection has ended", () => ws.peers[2]!.over);
  const fourth = await connectWebSocket(client, "/ws/d").begun();
  ws.peers[3]!.socket.destroy();
  await fourth.done();
  await assertServed(client);
});

test("a WebSocket over HTTP/2 that the server refuses passes its status, and 200 without a switch becomes 502", async () => {
  const client = await open();
  ws.answer = () => "HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: 2\r\nX-Why: not you\r\n\r\nno";
  const refused = await connectWebSocket(client, "/ws").begun();
  assert.deepEqual([refused.status, refused.header("x-why")], [403, "not you"]);
  for (
    const [path, head] of [
      ["/ws/200", "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n"],
      ["/ws/204", "HTTP/1.1 204 No Content\r\nConnection: close\r\n"],
    ] as const
  ) {
    ws.answer = () => head;
    const stream = await connectWebSocket(client, path).begun();
    assert.deepEqual([stream.status, stream.header("x-lb-failure")], [502, "invalid-answer"]);
    const record = await logged(path);
    assert.deepEqual([record["http.response.status_code"], record["error.type"]], [502, "invalid-answer"]);
  }
  ws.answer = () =>
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: wrong\r\n";
  assert.equal((await connectWebSocket(client, "/ws").begun()).status, 502);
  await assertServed(client);
});

test("a server that switches and writes at once loses nothing", async () => {
  const client = await open();
  ws.on = (peer) => void peer.send(TEXT, "first");
  const stream = connectWebSocket(client, "/ws");
  await client.when("the first frame", () => stream.bytes >= 7);
  assert.deepEqual(stream.body, encodeFrame(TEXT, "first"));
});

test("a key that a client sends with its WebSocket over HTTP/2 is not passed on beside that of lb.ts", async () => {
  const client = await open();
  const stream = await connectWebSocket(client, "/ws", [["sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="]]).begun();
  assert.equal(ws.heads[0]!.match(/^sec-websocket-key:/gim)?.length, 1);
  assert.equal(stream.status, 200);
});

/** Extended CONNECT that is not valid, and how it is refused. */
const BAD_CONNECTS: Record<string, [fields: Field[], ends: boolean]> = {
  "no :scheme": [
    [[":method", "CONNECT"], [":protocol", "websocket"], [":authority", "a.test"], [":path", "/ws"]],
    false,
  ],
  "no :path": [
    [[":method", "CONNECT"], [":protocol", "websocket"], [":authority", "a.test"], [":scheme", "http"]],
    false,
  ],
  "a protocol with CR and LF": [[
    [":method", "CONNECT"],
    [":protocol", "websocket\r\nx: 1"],
    ...request("/ws").slice(1),
  ], false],
  "an empty protocol": [[[":method", "CONNECT"], [":protocol", ""], ...request("/ws").slice(1)], false],
  "two protocols": [
    [[":method", "CONNECT"], [":protocol", "a"], [":protocol", "b"], ...request("/ws").slice(1)],
    false,
  ],
  "another method": [[[":method", "POST"], [":protocol", "websocket"], ...request("/ws").slice(1)], false],
};
for (const [name, [fields, ends]] of Object.entries(BAD_CONNECTS)) {
  test(`an extended CONNECT with ${name} is refused with PROTOCOL_ERROR`, async () => {
    const client = await open(), stream = client.stream();
    stream.sendHead(fields, ends);
    assert.equal((await stream.done()).result, "PROTOCOL_ERROR");
    assert.equal(ws.heads.length, 0);
    await assertServed(client);
  });
}

test("a WebSocket whose client has ended its stream at once ends, and leaves nothing behind", async () => {
  const client = await open(), stream = client.stream();
  stream.sendHead([[":method", "CONNECT"], [":protocol", "websocket"], ...request("/ws", HANDSHAKE).slice(1)], true);
  await stream.done();
  await until("the server's connection has ended", () => ws.peers.every((peer) => peer.over));
  await assertServed(client);
});

test("data that a client sends before its WebSocket is open arrives", async () => {
  const client = await open(), stream = connectWebSocket(client, "/ws");
  await stream.sendData(masked(TEXT, "early"));
  await client.when("an echo", () => stream.bytes >= 7);
  assert.deepEqual(stream.body, encodeFrame(TEXT, "early"));
});

test("a WebSocket keeps to the windows of both sides", async () => {
  const client = await open({ raises: false }), stream = await connectWebSocket(client, "/ws").begun();
  ws.peers[0]!.send(BINARY, Buffer.alloc(300_000));
  await client.when("the window is used up", () => stream.credit === 0);
  await settled(client);
  assert.equal(stream.bytes, 65_535);
  allow(client, 300_000, stream);
  await client.when("all has come", () => stream.bytes === 300_010);
});

test("CONNECT without a protocol is refused", async () => {
  const client = await open(), stream = client.stream();
  stream.sendHead([[":method", "CONNECT"], [":authority", "a.test:443"]]);
  await stream.begun();
  assert.equal(stream.status, 405);
  await assertServed(client);
});

// ─── Abuse ───

const HOLD = block(...request("/hold"));
const odd = (i: number) => 2 * i + 1;
const fields4k = block(
  ...request("/dirty/large", Array.from({ length: 5 }, (_, i): Field => [`x${i}`, "x".repeat(900)])),
);
/** What is sent again and again (`i` counts from 0) behind what begins it: the connection ends with ENHANCE_YOUR_CALM. */
const FLOODS: Record<string, [begin: Buffer[], again: (i: number) => Buffer]> = {
  "requests that are reset at once": [[], (i) => Buffer.concat([headers(odd(i), HOLD), reset(odd(i))])],
  "requests with a body that are reset at once": [[], (i) => Buffer.concat([headers(odd(i), POST, 0), reset(odd(i))])],
  "requests that make lb.ts reset them": [[], (i) => Buffer.concat([headers(odd(i), HOLD), windowUpdate(odd(i), 0)])],
  "requests above the announced number": [[], (i) => headers(odd(i), HOLD)],
  "PING": [[], () => frame(PING, 0, 0, "12345678")],
  "SETTINGS": [[], () => settings()],
  "SETTINGS that change the window of every stream": [
    Array.from({ length: 90 }, (_, i) => headers(odd(i), HOLD)),
    (i) => settings([INITIAL_WINDOW, 1_000 + i % 2]),
  ],
  "empty DATA": [[opened], () => data(1, "")],
  "DATA of nothing but padding": [[opened], () => data(1, hex("0400000000"), PADDED)],
  "PRIORITY": [[], () => frame(PRIORITY, 0, 1, hex("0000000310"))],
  "frames of an unknown type": [[], () => frame(99, 0, 0)],
  "resets of a closed stream": [[opened, reset(1)], () => reset(1)],
  "empty CONTINUATION": [[frame(HEADERS, END_STREAM, 1, DIRTY)], () => frame(CONTINUATION, 0, 1)],
  "CONTINUATION of one byte": [[frame(HEADERS, END_STREAM, 1, DIRTY)], () => frame(CONTINUATION, 0, 1, "\0")],
  "CONTINUATION of 16 KiB": [
    [frame(HEADERS, END_STREAM, 1, DIRTY)],
    () => frame(CONTINUATION, 0, 1, Buffer.alloc(16_384)),
  ],
};
for (const [name, [begin, again]] of Object.entries(FLOODS)) {
  test(`a flood of ${name} ends its connection with ENHANCE_YOUR_CALM, and no other`, async () => {
    const before = await failures("flood"), other = await open(), client = await open({ more: begin, answers: false });
    for (let i = 0; i < 5_000; i++) client.stream();
    for (let i = 0; i < 5_000 && !client.over; i += 50) {
      client.send(...Array.from({ length: 50 }, (_, n) => again(i + n)));
      await new Promise((resolve) => setImmediate(resolve));
    }
    assert.equal(await client.closed(), "ENHANCE_YOUR_CALM");
    await assertServed(other);
    assert.equal(await failures("flood"), before + 1);
    const lines = () => lb.output().split("\n").filter((one) => one.includes('"error.type":"flood"'));
    await until("a line of the log", () => lines().length === before + 1);
    assert.equal(JSON.parse(lines().at(-1)!)["http.response.status_code"], 429);
  });
}

/** Pieces of a body, each of which is followed by a PING, as gRPC's libraries send them to measure each round trip. */
const PIECES = 1_000;
test("a client may send a PING for each piece of a response", async () => {
  scripts.set(
    "/pieces",
    (visit) =>
      visit.send(`HTTP/1.1 200 OK\r\nContent-Length: ${PIECES}\r\n\r\n`, ...Array.from({ length: PIECES }, () => "x")),
  );
  const client = await open({ greeting: settings([INITIAL_WINDOW, 1]), window: 1, raises: false });
  const stream = client.ask("/pieces");
  for (let i = 1; i <= PIECES; i++) {
    await client.when("a piece", () => stream.bytes === i || client.over);
    client.send(frame(PING, 0, 0, "measured"));
    allow(client, 1, stream);
  }
  assert.equal((await stream.done()).result, "200");
});
test("a server may send a PING for each piece of an upload", async () => {
  let seen = 0;
  h2.script = async (stream) => {
    for (; !stream.ended && !stream.end.over; seen = stream.bytes) {
      stream.end.send(frame(PING, 0, 0, "measured"));
      await stream.end.when("a piece", () => stream.bytes > seen || stream.ended || stream.end.over);
    }
    await stream.respond(200);
  };
  const client = await open(), stream = client.ask("/h2/pieces", { ends: false });
  await stream.sendData(Buffer.alloc(2 ** 17)); // more than is kept
  await until("a server is asked", () => h2.requests.length);
  for (let size = 2 ** 17; size < 2 ** 17 + PIECES; size++) {
    await h2.ends[0]!.when("it has arrived", () => h2.requests[0]!.bytes === size || h2.ends[0]!.over);
    await stream.sendData("x");
  }
  await stream.sendData("", true);
  assert.equal((await stream.done()).result, "200");
});

test("a client may reset the rest of each upload that was answered early", async () => {
  scripts.set("/answered", (visit) => visit.send(answer("early")));
  const client = await open();
  for (let i = 0; i < 600; i++) {
    const stream = client.ask("/early/answered", { ends: false });
    assert.equal((await stream.done()).result, "200", `request ${i}`);
    stream.reset("NO_ERROR");
  }
  await assertServed(client);
});
test("a server may reset each request, or the rest of each upload that it has answered early, without losing its connection", async () => {
  const client = await open();
  for (const code of ["NO_ERROR", "INTERNAL_ERROR"] as const) {
    h2.script = (stream) => {
      if (code === "NO_ERROR") stream.sendHead([[":status", "200"]], true);
      stream.reset(code);
    };
    const asked: Stream[] = [];
    for (let i = 0; i < 600; i += 50) {
      asked.push(
        ...Array.from({ length: 50 }, () => client.ask("/h2/early", { ends: code !== "NO_ERROR", method: "POST" })),
      );
      for (const stream of asked.slice(-50)) if ((await stream.done()).status === 200) stream.reset("NO_ERROR");
    }
    assert.deepEqual([...new Set(asked.map(({ result }) => result))], [code === "NO_ERROR" ? "200" : "502"]);
  }
  assert.deepEqual(h2.ends.map((end) => end.goAway?.code), [undefined]);
});

test("resets at once cost a server no more requests than patience allows", async () => {
  h1.reset(play);
  const client = await open();
  for (let i = 0; i < 5_000 && !client.over; i += 50) {
    client.send(...Array.from({ length: 50 }, (_, n) => Buffer.concat([headers(odd(i + n), HOLD), reset(odd(i + n))])));
    await new Promise((resolve) => setImmediate(resolve));
  }
  assert.equal(await client.closed(), "ENHANCE_YOUR_CALM");
  assert.ok(h1.visits.length < 600, `${h1.visits.length} connections to the server`);
});

test("streams above the announced number are refused with REFUSED_STREAM, and served later", async () => {
  const client = await open();
  await client.when("SETTINGS", () => client.frames.length > 0);
  assert.equal(client.peerStreams, 100);
  const held = Array.from({ length: 100 }, () => client.ask("/hold"));
  const refused = Array.from({ length: 20 }, () => client.ask("/hold"));
  for (const stream of refused) assert.equal((await stream.done()).result, "REFUSED_STREAM");
  for (const stream of held.slice(0, 50)) stream.reset();
  for (let i = 0; i < 20; i++) await assertServed(client);
});

/** Small limits, so that what is slow is too slow soon. */
const SMALL = {
  limits: { header: "400ms", keep_alive: "900ms", header_size: "4KiB", header_fields: 50 },
};
test("a reload turns HTTP/2 without TLS off and on again, and puts small limits in force for what follows", async () => {
  const without = config();
  Object.assign(without.listen[0]!, { h2c: false });
  await lb.reload(without);
  const client = await open({ answers: false });
  assert.equal(await client.closed(), "no GOAWAY");
  clients.pop(); // what it got is not HTTP/2
  await lb.reload(config(SMALL));
  await assertServed(await open());
});

test("a header list that is too large is refused with 431, and the connection goes on", async () => {
  const client = await open();
  const many = block(...request("/dirty/many", Array.from({ length: 51 }, (_, i): Field => [`x${i}`, "1"])));
  for (const fields of [fields4k, many]) {
    const stream = client.stream();
    client.send(headers(stream.id, fields));
    await stream.begun();
    assert.deepEqual([stream.status, stream.header("x-lb-failure")], [431, "headers-too-large"]);
  }
  await assertServed(client);
  assertClean();
});

test("a header list that a few bytes name a thousand times is refused with 431", async () => {
  const client = await open(), first = client.stream(), second = client.stream();
  client.send(headers(first.id, Buffer.concat([START, added("x", "x".repeat(3_000))])));
  client.send(headers(second.id, Buffer.concat([block(...request("/dirty/bomb")), Buffer.alloc(16_000, 0xbe)])));
  assert.equal((await second.begun()).status, 431);
  await assertServed(client);
  assertClean();
});

test("a header list that is far too large ends the connection with ENHANCE_YOUR_CALM", async () => {
  const client = await open(), piece = block(["x", "x".repeat(16_000)]);
  client.send(
    frame(HEADERS, END_STREAM, client.stream().id, fields4k),
    frame(CONTINUATION, 0, 1, piece),
    frame(CONTINUATION, END_HEADERS, 1, piece),
  );
  assert.equal(await client.closed(), "ENHANCE_YOUR_CALM");
  assertClean();
});

test("a response's head that is larger than a frame passes in CONTINUATION", async () => {
  const fields = Array.from({ length: 30 }, (_, i) => `X-${i}: ${"x".repeat(1_500)}\r\n`).join("");
  scripts.set("/large-head", (visit) => visit.send(answer("hello", fields)));
  const stream = await (await open()).get("/large-head");
  assert.equal(stream.header("x-29"), "x".repeat(1_500));
});

/** Clients that are slow: what they send, and how their connection ends. */
const DRY = { window: 2 ** 20, raises: false, greeting: settings([INITIAL_WINDOW, 2 ** 20]) };
const SLOW: Record<string, [options: ClientOptions, end: Code]> = {
  "nothing behind the preface": [{ opening: PREFACE }, "ENHANCE_YOUR_CALM"],
  "half of its SETTINGS": [
    { opening: Buffer.concat([PREFACE, settings([MAX_FRAME, 20_000]).subarray(0, 12)]) },
    "ENHANCE_YOUR_CALM",
  ],
  "half a header block": [{ more: [frame(HEADERS, END_STREAM, 1, DIRTY)] }, "ENHANCE_YOUR_CALM"],
  "no request": [{}, "NO_ERROR"],
  "half a frame": [{ more: [headers(1, DIRTY).subarray(0, 20)] }, "NO_ERROR"],
  "a request, and a window of 0 for ever": [
    {
      window: 0,
      raises: false,
      greeting: settings([INITIAL_WINDOW, 0]),
      more: [headers(1, block(...request("/zero")))],
    },
    "ENHANCE_YOUR_CALM",
  ],
  "a request, and no more window for the connection": [
    { ...DRY, more: [headers(1, block(...request("/bulk")))] },
    "ENHANCE_YOUR_CALM",
  ],
};
test("clients that are too slow are left with ENHANCE_YOUR_CALM, idle ones with NO_ERROR", async () => {
  scripts.set("/bulk", bulk(2 ** 20));
  await Promise.all(
    Object.entries(SLOW).map(async ([name, [options, end]]) => {
      const client = await open(options);
      client.answers = false;
      client.stream(1);
      assert.equal(await client.closed(), end, `a client that sends ${name}`);
    }),
  );
  assertClean();
});

test("a client that drips a header block is left with ENHANCE_YOUR_CALM", async () => {
  const client = await open({ more: [frame(HEADERS, END_STREAM, 1, DIRTY)], answers: false });
  client.stream(1);
  for (let i = 0; i < 100 && !client.over; i++) {
    client.send(frame(CONTINUATION, 0, 1, literal("x", "1")));
    await sleep(50);
  }
  assert.equal(await client.closed(), "ENHANCE_YOUR_CALM");
  assertClean();
});

test("a client that chose HTTP/2 over TLS and sends nothing is left", async () => {
  const client = await open({ tls: { ca: CA, protocols: ["h2"] }, opening: Buffer.alloc(0), answers: false }, tlsPort);
  assert.equal(await client.closed(), "ENHANCE_YOUR_CALM");
});

test("a client that does not read is left, and its server with it", async () => {
  scripts.set("/bulk", bulk(2 ** 26));
  const before = await failures("flood");
  const client = await open({
    raises: false,
    greeting: settings([INITIAL_WINDOW, 2 ** 30]),
    window: 2 ** 30,
    more: [windowUpdate(0, 2 ** 30)],
  });
  client.credit += 2 ** 30;
  client.ask("/bulk");
  await client.when("it begins", () => client.frames.some((one) => one.type === DATA));
  client.socket.pause();
  const visit = h1.last!;
  await until("the server's connection has ended", () => visit.over, 10_000);
  assert.equal(await failures("flood"), before + 1);
  await assertServed(await open());
});

test("a client that reads slowly, but reads, gets all of its response", async () => {
  scripts.set("/bulk", bulk(2 ** 17));
  const client = await open({ raises: false }), stream = client.ask("/bulk");
  while (stream.bytes < 2 ** 17) {
    const before = stream.bytes;
    await client.when("the window is used up", () => stream.credit === 0 || stream.ended);
    await sleep(350);
    allow(client, 22_000, stream);
    await client.when("more comes", () => stream.bytes > before);
  }
  assert.equal((await stream.done()).result, "200");
});

test("a response that finds no window waits for one, and its connection goes on", async () => {
  const client = await open({ greeting: settings([INITIAL_WINDOW, 0]), window: 0, raises: false });
  for (let i = 0; i < 3; i++) {
    const stream = await client.ask("/zero").begun();
    await sleep(250); // lb.ts looks at it meanwhile
    allow(client, 10_000, stream);
    assert.equal((await stream.done()).result, "200");
  }
});

test("a stream whose window stays 0 is reset, and others of its connection are served", async () => {
  const client = await open({ raises: false, greeting: settings([INITIAL_WINDOW, 0]), window: 0 });
  const stuck = client.ask("/stuck"), held = client.ask("/hold");
  for (const end = Date.now() + 8_000; Date.now() < end && !client.over && !stuck.wasReset; await sleep(100)) {
    const other = client.ask("/served");
    await client.when("its head", () => other.head.length > 0 || client.over);
    allow(client, 10_000, other);
    await client.when("its end", () => other.ended || client.over);
  }
  assert.deepEqual([stuck.wasReset, held.wasReset, client.over], ["ENHANCE_YOUR_CALM", undefined, false]);
  await until("a line of the log", () => record("/stuck"));
  held.reset();
});

test("an upload that stops is answered for with 408, and the connection goes on", async () => {
  const client = await open(), stream = client.ask("/brief", { fields: [["content-length", "10"]], ends: false });
  await stream.sendData("hello");
  await stream.begun();
  assert.deepEqual([stream.status, stream.header("x-lb-failure")], [408, "client-timeout"]);
  await assertServed(client);
});

test("a server that stops in the middle of its response is answered for with a reset", async () => {
  scripts.set("/early/brief", (visit) => visit.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello"));
  h2.script = async (stream) => {
    stream.sendHead([[":status", "200"]]);
    await stream.sendData("hello");
  };
  const client = await open();
  for (const path of ["/early/brief", "/h2/brief"]) {
    const stream = await client.get(path);
    assert.match(stream.result, /^200 (?:INTERNAL_ERROR|CANCEL)$/, path);
    await assertServed(client);
  }
});

test("a server of HTTP/2 that does not answer in time is answered for with 504, and its stream is reset", async () => {
  h2.script = () => {};
  const client = await open(), stream = await client.get("/h2/brief");
  assert.deepEqual([stream.status, stream.header("x-lb-failure")], [504, "timeout"]);
  await h2.ends[0]!.when("its stream is reset", () => h2.requests[0]!.wasReset === "CANCEL");
});

test("a server of HTTP/2 that sends no SETTINGS in time is answered for with 504", async () => {
  h2.options = { greeting: Buffer.alloc(0) };
  const stream = await (await open()).get("/h2/brief");
  assert.deepEqual([stream.status, stream.header("x-lb-failure")], [504, "connect-timeout"]);
});

// ─── Frames at random ───

const CONNECTIONS = Math.min(20_000, Number(process.env.LB_FUZZ ?? 500));
const SEED = Number(process.env.LB_SEED ?? 20_260_401);

/** What a client of good manners sends, frame by frame. */
function session(random: () => number): Buffer[] {
  const any = (below: number) => Math.floor(random() * below),
    frames: Buffer[] = [settings([INITIAL_WINDOW, any(3) * 40_000])];
  const path = () => ["/fuzz", "/h2/fuzz", "/early/fuzz", "/hold"][any(4)]!;
  for (let i = 0, id = 1; i < 1 + any(6); i++, id += 2) {
    const hasBody = random() < 0.5,
      body = Buffer.alloc(any(3_000), "b"),
      fields: Field[] = random() < 0.5 ? [["x", "y".repeat(any(200))]] : [];
    if (hasBody && random() < 0.5) fields.push(["content-length", `${body.length}`]);
    const head = block(...request(path(), fields, hasBody ? "POST" : "GET")), cut = any(head.length);
    if (random() < 0.3) {
      frames.push(
        frame(HEADERS, hasBody ? 0 : END_STREAM, id, head.subarray(0, cut)),
        frame(CONTINUATION, END_HEADERS, id, head.subarray(cut)),
      );
    } else frames.push(headers(id, head, hasBody ? 0 : END_STREAM));
    if (hasBody) {
      frames.push(data(id, body), random() < 0.3 ? headers(id, block(["x-sum", "1"])) : data(id, "", END_STREAM));
    }
    if (random() < 0.2) frames.push(windowUpdate(any(2) * id, 1 + any(100_000)));
    if (random() < 0.2) frames.push(frame(PING, 0, 0, "12345678"));
    if (random() < 0.2) frames.push(reset(id));
    if (random() < 0.1) frames.push(frame(PRIORITY, 0, id, hex("0000000010")));
    if (random() < 0.1) frames.push(settings([INITIAL_WINDOW, any(100_000)]));
  }
  return frames;
}

/** Frames with mistakes: some are changed, lost, sent twice, moved or cut, or come from nowhere. */
function mutated(frames: Buffer[], random: () => number): Buffer[] {
  const any = (below: number) => Math.floor(random() * below), all: Buffer[] = frames.map((one) => Buffer.from(one));
  for (let n = any(4); n >= 0; n--) {
    const at = any(all.length), one = all[at] ?? Buffer.alloc(0);
    const changes: (() => void)[] = [
      () => void (one.length && (one[any(one.length)] = any(256))),
      () => void (one.length && (one[any(Math.min(9, one.length))]! ^= 1 << any(8))),
      () => void all.splice(at, 1),
      () => void all.splice(at, 0, one),
      () => void all.splice(any(all.length), 0, ...all.splice(at, 1)),
      () => void (all[at] = one.subarray(0, any(one.length))),
      () =>
        void all.splice(
          at,
          0,
          frame(any(12), any(256), any(8), Buffer.from(Array.from({ length: any(40) }, () => any(256)))),
        ),
      () => void all.splice(at, 0, settings([any(10), any(2 ** 32)])),
    ];
    changes[any(changes.length)]!();
  }
  return all;
}

/** What a client may blame lb.ts for, whatever it has sent itself: mutated settings and windows are the client's own. */
const isFault = (fault: string) => !/window allows|has not begun|behind a reset|behind the end|over 2\^31/.test(fault);

test(`whatever ${CONNECTIONS} clients and servers send, lb.ts goes on, and nothing stays in flight`, async () => {
  const faults: string[] = [], starts = new Set<string>();
  let next = 0;
  await lb.reload(config()); // with usual limits no client is too slow, however busy the machine is
  const internal = await failures("internal");
  h1.reset(play);
  const worker = async () => {
    for (let i; (i = next++) < CONNECTIONS;) {
      const random = seeded(SEED + i), any = (below: number) => Math.floor(random() * below);
      const isValid = random() < 0.2, frames = session(random), sent = isValid ? frames : mutated(frames, random);
      const all = Buffer.concat(sent), isPolite = !isValid && random() < 0.7; // what is sent meanwhile may stand inside a frame
      const client = await h2Client(lb.port, { opening: PREFACE, raises: isPolite, answers: isPolite });
      for (let n = 0; n < 10; n++) client.stream();
      for (let at = 0, end; at < all.length; at = end) {
        end = at + 1 + any(random() < 0.3 ? 20 : 3_000);
        client.send(all.subarray(at, end));
        if (random() < 0.5) await new Promise((resolve) => setImmediate(resolve));
      }
      if (isValid) await settled(client, 60_000);
      else if (random() < 0.5) await sleep(any(30));
      const { code = "NO_ERROR", text = "" } = client.goAway ?? {};
      if (isValid && code !== "NO_ERROR") faults.push(`seed ${SEED + i}: ${code}, ${text}`);
      faults.push(...client.faults.filter(isFault).map((fault) => `seed ${SEED + i}: ${fault}`));
      client.destroy();
    }
  };
  h2.script = async (stream) => {
    const random = seeded(SEED + stream.id + h2.ends.length * 1_000),
      any = (below: number) => Math.floor(random() * below);
    const body = Buffer.alloc(any(2_000), "r"),
      fields: Field[] = random() < 0.5 ? [["content-length", `${body.length}`]] : [];
    const frames = [
      headers(stream.id, block([":status", "200"], ...fields), 0),
      data(stream.id, body, random() < 0.8 ? END_STREAM : 0),
    ];
    const sent = random() < 0.5 ? frames : mutated(frames, random);
    await sleep(any(5));
    stream.end.send(...sent);
  };
  const asker = async () => {
    while (next < CONNECTIONS) {
      const { answers } = await rawRequest(lb.port, get("/h2/fuzz"), { atMost: 500, quiet: 100 });
      for (const { start, complete } of answers) starts.add(`${start.split(" ").slice(0, 2).join(" ")} ${complete}`);
      assert.ok(answers.length <= 1, "one response at most");
    }
  };
  await Promise.all([...Array.from({ length: 16 }, worker), ...Array.from({ length: 4 }, asker)]);
  Object.assign(h2, { script: echoH2 });
  await Promise.all(h2.ends.splice(0).map((end) => end.close()));
  assert.deepEqual(faults, []);
  assert.equal(await failures("internal"), internal);
  assert.ok(!/^\s+at /m.test(lb.errors()), "a stack trace");
  for (const { start } of h1.requests) {
    assert.match(start, /^[!#$%&'*+.^_`|~0-9A-Za-z-]+ [\x21-\x7e\x80-\xff]+ HTTP\/1\.1$/);
  }
  for (const start of starts) assert.match(start, /^HTTP\/1\.1 [2-9]\d\d (?:true|false)$/);
  await assertServed(await open());
  await assertServed(await open(), "/h2/after");
}, 600_000);

// ─── The end ───

test("a drain tells clients with GOAWAY, lets what is open end, refuses what comes later, and ends", async () => {
  const release: (() => void)[] = [];
  scripts.set("/release", (visit) => void release.push(() => void visit.send(answer("hello"))));
  const busy = await open(), idle = await open(), slow = busy.ask("/release");
  await assertServed(idle);
  await until("the server has been asked", () => release.length === 1);
  process.kill(lb.pid, "SIGTERM");
  await busy.when("a first GOAWAY", () => busy.goAway);
  assert.deepEqual([busy.goAway!.code, busy.goAway!.last], ["NO_ERROR", 2 ** 31 - 1]);
  assert.match((await busy.get("/meanwhile")).result, /^(?:200|503)$/);
  assert.equal(await idle.closed(), "NO_ERROR");
  await busy.when("a second GOAWAY", () => busy.goAway!.last < 2 ** 31 - 1);
  assert.equal((await busy.get("/late")).result, "REFUSED_STREAM");
  release[0]!();
  assert.equal((await slow.done()).result, "200");
  assert.equal(await busy.closed(), "NO_ERROR");
  await until("it has drained", () => lb.output().includes("drained"));
  assert.ok(!lb.output().includes("requests cut off"));
  left = -1; // its metrics are gone
});
