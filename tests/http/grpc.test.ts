// gRPC: the running program between a client and servers of @grpc/grpc-js. Messages are texts here, for nothing on the way
// reads them.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { createServer as createHttp2Server, type Http2Server } from "node:http2";
import { type AddressInfo, connect, createServer, type Server as TcpServer } from "node:net";
import process from "node:process";
import { after, before } from "node:test";
import { createServer as createTlsServer } from "node:tls";
// @ts-types="../rig/grpc-js.d.ts"
import {
  type CallOptions,
  type ChannelOptions,
  Client,
  type ClientCall,
  credentials,
  Metadata,
  type MetadataValue,
  type Method,
  type Reply,
  Server,
  type ServerCall,
  ServerCredentials,
  status,
} from "@grpc/grpc-js";
import { A, CA, KEY } from "../rig/certificates.ts";
import {
  answer,
  freePort,
  listenLocally,
  type Program,
  type ScriptedServer,
  scriptedServer,
  sleep,
  startProgram,
  test,
  until,
} from "../rig/rig.ts";

// ─── Servers ───

const asIs = (bytes: Buffer) => bytes;
const method = (path: string, requestStream: boolean, responseStream: boolean): Method => ({
  ...{ path, requestStream, responseStream },
  ...{ requestSerialize: asIs, requestDeserialize: asIs, responseSerialize: asIs, responseDeserialize: asIs },
});
const METHODS = {
  unary: method("/t.T/Unary", false, false),
  collect: method("/t.T/Collect", true, false),
  list: method("/t.T/List", false, true),
  chat: method("/t.T/Chat", true, true),
};
const HEALTH = { check: method("/grpc.health.v1.Health/Check", false, false) };

/** What a server does with a call; `name` is its own. */
type Manner = (name: string, call: ServerCall, reply: Reply) => void;
type Manners = Record<keyof typeof METHODS, Manner>;
const USUAL: Manners = {
  unary: (name, { request }, reply) => reply(null, Buffer.from(`${name}: ${request}`)),
  collect(_, call, reply) {
    let messages = 0, bytes = 0;
    call.on("data", (message) => (messages++, bytes += message.length));
    call.on("end", () => reply(null, Buffer.from(`${bytes} bytes in ${messages} messages`)));
  },
  list(_, call) {
    for (let i = 0; i < Number(call.request); i++) call.write(Buffer.from(`${i}`));
    call.end();
  },
  chat(_, call) {
    call.on("data", (message) => void call.write(Buffer.from(`re: ${message}`)));
    call.on("end", () => call.end());
  },
};

/** What the servers do now, and whom calls have reached since that was said. */
let manners = USUAL, asked: string[] = [];
function letServers(does: Partial<Manners> = {}): void {
  manners = { ...USUAL, ...does };
  asked = [];
}

/** What the health service says, by the name of a service. */
const states = new Map<string, "SERVING" | "NOT_SERVING" | "UNKNOWN">();
const STATES = { UNKNOWN: Buffer.alloc(0), SERVING: Buffer.from([8, 1]), NOT_SERVING: Buffer.from([8, 2]) };

const servers: Server[] = [];
/** Starts a server; gives where it listens. */
async function grpcServer(name: string, { hasHealth = false } = {}): Promise<string> {
  const server = new Server();
  const does = (kind: keyof typeof METHODS) => (call: ServerCall, reply: Reply) => {
    asked.push(`${name} ${kind}`);
    manners[kind](name, call, reply);
  };
  server.addService(METHODS, {
    ...{ unary: does("unary"), collect: does("collect"), list: does("list"), chat: does("chat") },
  });
  const check = ({ request }: ServerCall, reply: Reply) => {
    const state = states.get(request.toString("utf8", 2)); // behind the number of the field and the length
    if (state) reply(null, STATES[state]);
    else reply({ code: status.NOT_FOUND, details: "unknown service" });
  };
  if (hasHealth) server.addService(HEALTH, { check });
  servers.push(server);
  return await new Promise((resolve, reject) =>
    server.bindAsync(
      "127.0.0.1:0",
      ServerCredentials.createInsecure(),
      (error, port) => error ? reject(error) : resolve(`127.0.0.1:${port}`),
    )
  );
}

/** What is agreed on by ALPN with the server that speaks TLS. */
let agreed: (string | false | null)[] = [];
/** TLS in front of a server; that of grpc-js speaks none on Deno 2.9.6. */
async function tlsInFrontOf(address: string): Promise<TcpServer> {
  const server: TcpServer = createTlsServer({ cert: A, key: KEY, ALPNProtocols: ["h2"] }, (socket) => {
    agreed.push(socket.alpnProtocol);
    const on = connect(Number(address.split(":")[1]), "127.0.0.1");
    socket.on("error", () => on.destroy()).pipe(on).on("error", () => socket.destroy()).pipe(socket);
  });
  return await listening(server);
}
async function listening<S extends TcpServer | Http2Server>(server: S): Promise<S> {
  await listenLocally(server);
  return server;
}
const portOf = (server: TcpServer | Http2Server) => (server.address() as AddressInfo).port;

// ─── Clients ───

/** What has come of a call. */
interface Outcome {
  code: status;
  details: string;
  messages: string[];
  /** undefined: there was none, for the response was nothing but trailers. */
  head: Metadata | undefined;
  trailers: Metadata;
}
function outcomeOf(call: ClientCall, messages: string[]): Promise<Outcome> {
  let head: Metadata | undefined;
  call.on("metadata", (given) => head = given);
  call.on("data", (message) => void messages.push(message.toString("latin1")));
  call.on("error", () => {}); // the status says the same
  return new Promise((resolve) =>
    call.on("status", ({ code, details, metadata }) => resolve({ code, details, messages, head, trailers: metadata }))
  );
}

const clients = new Map<string, Client>();
/** The client whose calls are for a host. */
function clientOf(host: string, target = `127.0.0.1:${ports[0]}`, options: ChannelOptions = {}, ca = ""): Client {
  const known = clients.get(`${host} ${target}`);
  if (known) return known;
  const safety = ca ? credentials.createSsl(Buffer.from(ca)) : credentials.createInsecure();
  const client = new Client(target, safety, { "grpc.default_authority": host, ...options });
  clients.set(`${host} ${target}`, client);
  return client;
}

const PATIENCE = 10_000; // milliseconds until a call has failed

interface Given extends CallOptions {
  metadata?: Record<string, MetadataValue>;
  client?: Client;
}
/** A call, its messages so far, what says one more, and what comes of it in the end. */
function start(host: string, kind: keyof typeof METHODS, message: string | Buffer, given: Given = {}) {
  const { metadata = {}, client = clientOf(host), deadline = Date.now() + PATIENCE } = given;
  const sent = new Metadata(), messages: string[] = [], bytes = Buffer.from(message), { path } = METHODS[kind];
  for (const [name, value] of Object.entries(metadata)) sent.add(name, value);
  const options = "grpc-timeout" in metadata ? {} : { deadline }; // the client's own deadline would replace it
  const then = (_: unknown, reply?: Buffer) => void (reply && messages.push(reply.toString("latin1")));
  const call = {
    unary: () => client.makeUnaryRequest(path, asIs, asIs, bytes, sent, options, then),
    collect: () => client.makeClientStreamRequest(path, asIs, asIs, sent, options, then),
    list: () => client.makeServerStreamRequest(path, asIs, asIs, bytes, sent, options),
    chat: () => client.makeBidiStreamRequest(path, asIs, asIs, sent, options),
  }[kind]();
  const say = (text: string) => void call.write(Buffer.from(text));
  return { call, messages, say, outcome: outcomeOf(call, messages) };
}
const ask = (host: string, message: string | Buffer = "x", given?: Given) =>
  start(host, "unary", message, given).outcome;
const list = (host: string, message: string, given?: Given) => start(host, "list", message, given).outcome;
const collect = (host: string, given?: Given) => start(host, "collect", "", given);
const chat = (host: string, given?: Given) => start(host, "chat", "", given);

// ─── The program ───

let lb: Program, ports: string[];
let plain: ScriptedServer, noGrpc: Http2Server, secure: TcpServer, closing: TcpServer;

const portsOf = (program: Program) =>
  [...program.output().matchAll(/listening on https?:\/\/\S+:(\d+)$/gm)].map(([, port]) => port!);
/** The whole lines that a program has printed. */
const linesOf = (program: Program) => program.output().split("\n").slice(0, -1);
/** The lines of the log about calls to a host. */
const linesAbout = (host: string) =>
  linesOf(lb).filter((line) => line.includes(`"server.address":"${host}"`)).map((line) => JSON.parse(line));
const metrics = async () => (await (await fetch(`http://127.0.0.1:${lb.admin}/metrics`)).text()).split("\n");
/** The sum of the metrics whose series begins and ends so. */
async function metric(begin: string, end = ""): Promise<number> {
  const lines = (await metrics()).map((line) => line.split(" ")).filter(([series]) =>
    series!.startsWith(begin) && series!.endsWith(end)
  );
  assert.ok(lines.length, `there is no ${begin}`);
  return lines.reduce((sum, [, value]) => sum + Number(value), 0);
}

/** Services and the checks of their only server: what it is, and what the balancer finds wrong with it. */
const CHECKS: Record<string, { grpc: string; at: keyof typeof CHECKED; finds: string | undefined }> = {
  "serving": { grpc: "", at: "one", finds: undefined },
  "secure": { grpc: "", at: "secure", finds: undefined },
  "some": { grpc: "some.Service", at: "one", finds: undefined },
  "down": { grpc: "down.Service", at: "one", finds: "it is NOT_SERVING" },
  "new": { grpc: "new.Service", at: "one", finds: "it is UNKNOWN" },
  "not-found": { grpc: "no.Service", at: "one", finds: "grpc-status 5" },
  "missing": { grpc: "", at: "bare", finds: "grpc-status 12" },
  "no-grpc": { grpc: "", at: "h2", finds: "status 200 without a grpc-status" },
  "no-http2": { grpc: "", at: "plain", finds: "it speaks HTTP/1.1, not HTTP/2: write http:// in place of h2c://" },
  "http1": { grpc: "", at: "old", finds: "gRPC needs HTTP/2: an h2c:// server, or http: 2" },
};
const CHECKED = {
  one: "a server",
  secure: "a server over TLS",
  bare: "a server without that service",
  h2: "a server of HTTP/2 without gRPC",
  plain: "a server of HTTP/1.1 behind h2c://",
  old: "a server behind http://",
};

/** Keeps the deadline from the server, which would end the call by itself. */
const UNTIMED = { headers: { remove: ["grpc-timeout"] } };

before(async () => {
  const [one, two, bare, gone] = await Promise.all([
    grpcServer("one", { hasHealth: true }),
    grpcServer("two"),
    grpcServer("bare"),
    freePort(),
  ]);
  secure = await tlsInFrontOf(one);
  plain = await scriptedServer((visit) => visit.send(answer("hello")));
  noGrpc = await listening(createHttp2Server((_, response) => void response.end("hello")));
  const settings = Buffer.from([0, 0, 0, 4, 0, 0, 0, 0, 0]);
  closing = await listening(createServer((socket) => void socket.on("error", () => {}).end(settings)));
  const urls: Record<keyof typeof CHECKED, string> = {
    one: `h2c://${one}`,
    secure: `https://127.0.0.1:${portOf(secure)}`,
    bare: `h2c://${bare}`,
    h2: `h2c://127.0.0.1:${portOf(noGrpc)}`,
    plain: `h2c://${plain.address}`,
    old: `http://${plain.address}`,
  };
  states.set("", "SERVING").set("some.Service", "SERVING").set("down.Service", "NOT_SERVING");
  states.set("new.Service", "UNKNOWN");
  const pair = { servers: [`h2c://${one}`, `h2c://${two}`] }, alone = { servers: [`h2c://${one}`] };
  const tls = { ca: "ca.pem", servername: "a.test" }, encrypted = { servers: [urls.secure], tls };
  const services: Record<string, Record<string, unknown>> = {
    ...{ alone, pair, counted: alone },
    retried: { ...pair, retry_on: ["unavailable"] },
    ...{ h2: { ...encrypted, http: 2 }, auto: { ...encrypted, http: "auto" } },
    late: { ...alone, timeouts: { response: "300ms" } },
    full: { servers: [{ url: `h2c://${one}`, max: 1 }], queue: "off" },
    queued: { servers: [{ url: `h2c://${one}`, max: 1 }], queue: { size: 1, timeout: "1s" } },
    ejecting: { ...pair, eject: { failures: 3, for: "1m" } },
    gone: { servers: [`h2c://127.0.0.1:${gone}`] },
    cut: { servers: [`h2c://127.0.0.1:${portOf(closing)}`] },
  };
  for (const [name, { grpc, at }] of Object.entries(CHECKS)) {
    const health = { grpc, interval: "200ms", fall: 1, rise: 1 };
    services[name] = { servers: [urls[at]], health, panic: "0%", ...at === "secure" && { tls, http: 2 } };
  }
  const toService = Object.keys(services).map((service) => ({ host: `${service}.test`, service }));
  const program = {
    listen: [{ address: "127.0.0.1:0", h2c: true }, {
      address: "127.0.0.1:0",
      tls: { cert: "a.pem", key: "a.key" },
    }],
    admin: { listen: "127.0.0.1:0" },
    log: "json",
    defaults: { health: "off", eject: "off", retry_budget: "100%" },
    services,
    routes: [
      ...toService.map((route) => route.service === "ejecting" ? { ...route, request: UNTIMED } : route),
      { host: "deadline.test", service: "alone", request: UNTIMED },
      { host: "small.test", service: "alone", body_limit: "1kB" },
      { host: "denied.test", service: "alone", deny: ["127.0.0.0/8"] },
      { host: "rated.test", service: "alone", rate: { requests: 1, per: "1h" } },
      { host: "get.test", service: "alone", methods: ["GET"] },
    ],
  };
  lb = await startProgram(program, [], { "a.pem": A, "a.key": KEY, "ca.pem": CA });
  ports = await until("both listeners are open", () => portsOf(lb).length === 2 && portsOf(lb));
});
after(async () => {
  for (const client of clients.values()) client.close();
  await lb?.stop();
  for (const server of servers) server.forceShutdown();
  noGrpc?.close();
  secure?.close();
  closing?.close();
  await plain?.close();
  if (lb) assert.match(lb.output(), /info: drained\n/, "calls are left in flight");
});

// ─── Calls ───

test("a unary call passes with its metadata, and the answer with its own and its trailers", async () => {
  let seen: Metadata | undefined;
  letServers({
    unary(_, call, reply) {
      seen = call.metadata;
      const head = new Metadata(), trailers = new Metadata();
      for (const value of ["1", "2"]) head.add("x-head", value);
      head.set("bytes-bin", Buffer.from([0, 255, 13, 10]));
      trailers.set("x-trailer", "t, u");
      trailers.set("more-bin", Buffer.from([0, 128]));
      call.sendMetadata(head);
      reply(null, Buffer.from([0, 1, 255]), trailers);
    },
  });
  const bytes = Buffer.from([0, 13, 10, 200]);
  const { code, messages, head, trailers } = await ask("alone.test", "hi", {
    metadata: { "x-asks": "a b", "asks-bin": bytes },
  });
  assert.equal(code, status.OK);
  assert.deepEqual(messages, ["\x00\x01\xff"]);
  assert.deepEqual(seen!.get("x-asks"), ["a b"]);
  assert.deepEqual(seen!.get("asks-bin").map((value) => Buffer.from(value)), [bytes]);
  assert.match(String(seen!.get("user-agent")), /^grpc-node-js\//);
  assert.match(head!.get("x-head").join(), /^1, ?2$/);
  assert.deepEqual(head!.get("bytes-bin").map((value) => Buffer.from(value)), [Buffer.from([0, 255, 13, 10])]);
  assert.deepEqual(trailers.get("x-trailer"), ["t, u"]);
  assert.deepEqual(trailers.get("more-bin").map((value) => Buffer.from(value)), [Buffer.from([0, 128])]);
});

test("a client streams 1 MB in many messages, and is answered once", async () => {
  letServers();
  const { call, outcome } = collect("alone.test");
  for (let i = 0; i < 500; i++) call.write(Buffer.alloc(2_000, i));
  call.end();
  const { code, messages } = await outcome;
  assert.equal(code, status.OK);
  assert.deepEqual(messages, ["1000000 bytes in 500 messages"]);
});

test("a server streams many messages, in their order", async () => {
  letServers();
  const { code, messages } = await list("alone.test", "1000");
  assert.equal(code, status.OK);
  assert.deepEqual(messages, Array.from({ length: 1_000 }, (_, i) => `${i}`));
});

test("of a call in both directions each message can wait for the answer to the one before", async () => {
  letServers();
  const { call, outcome, messages, say } = chat("alone.test");
  for (const round of [1, 2, 3]) {
    say(`${round}`);
    await until("it is answered", () => messages.length === round);
  }
  call.end();
  assert.equal((await outcome).code, status.OK);
  assert.deepEqual(messages, ["re: 1", "re: 2", "re: 3"]);
});

test("a server's message and its trailers may come before the client has ended its side", async () => {
  letServers({ collect: (_, _call, reply) => reply(null, Buffer.from("enough")) });
  const { call, outcome } = collect("alone.test");
  call.write(Buffer.from("1"));
  const { code, messages } = await outcome;
  assert.deepEqual([code, messages], [status.OK, ["enough"]]);
});

test("every status passes with its details and metadata, in nothing but trailers", async () => {
  const text = "100 % of ü\nfailed";
  for (let code = 1; code <= 16; code++) {
    letServers({
      unary(_, _call, reply) {
        const metadata = new Metadata();
        metadata.set("grpc-status-details-bin", Buffer.from([8, code]));
        reply({ code, details: text, metadata });
      },
    });
    const outcome = await ask("pair.test");
    assert.deepEqual([outcome.code, outcome.details, outcome.messages], [code, text, []]);
    assert.deepEqual(Buffer.from(outcome.trailers.get("grpc-status-details-bin")[0]!), Buffer.from([8, code]));
    assert.equal(outcome.head, undefined, "a head in front of the trailers");
  }
});

test("a status that comes behind messages passes, too", async () => {
  letServers({
    list(_, call) {
      call.write(Buffer.from("1"));
      call.emit("error", { code: status.ABORTED, details: "no more" });
    },
  });
  const { code, details, messages } = await list("pair.test", "x");
  assert.deepEqual([code, details, messages], [status.ABORTED, "no more", ["1"]]);
});

test("the calls of one connection are spread over the servers", async () => {
  letServers();
  let connections = 0;
  const relay = createServer((socket) => {
    connections++;
    const on = connect(Number(ports[0]), "127.0.0.1");
    socket.on("error", () => on.destroy()).pipe(on).on("error", () => socket.destroy()).pipe(socket);
  });
  const client = clientOf("pair.test", `127.0.0.1:${portOf(await listening(relay))}`);
  const outcomes = await Promise.all(Array.from({ length: 20 }, () => ask("pair.test", "x", { client })));
  client.close();
  relay.close();
  assert.equal(connections, 1);
  assert.deepEqual(outcomes.map(({ messages }) => messages.join()).sort(), [
    ...Array.from({ length: 10 }, () => "one: x"),
    ...Array.from({ length: 10 }, () => "two: x"),
  ]);
});

test("over TLS client and balancer, balancer and server agree on HTTP/2 by ALPN", async () => {
  letServers();
  agreed = [];
  for (const host of ["h2.test", "auto.test"]) {
    const client = clientOf(host, `127.0.0.1:${ports[1]}`, { "grpc.ssl_target_name_override": "a.test" }, CA);
    const { code, details, messages } = await ask(host, "hi", { client });
    assert.deepEqual([code, details, messages], [status.OK, "OK", ["one: hi"]]);
  }
  assert.deepEqual(agreed, ["h2", "h2"]);
});

// ─── Retries ───

/** The first call is answered with UNAVAILABLE, later ones as ever. */
const busyOnce = (): Manner => (name, call, reply) =>
  asked.length === 1 ? reply({ code: status.UNAVAILABLE, details: "busy" }) : USUAL.unary(name, call, reply);

test("retry_on: [unavailable] asks another server where nothing was answered", async () => {
  letServers({ unary: busyOnce() });
  const { code, messages } = await ask("retried.test");
  assert.equal(code, status.OK);
  assert.equal(new Set(asked).size, 2, `asked: ${asked}`);
  assert.equal(messages.length, 1);
  const line = await until("it is logged", () => linesAbout("retried.test").at(-1));
  assert.deepEqual([line["lb.attempts"], line["rpc.grpc.status_code"]], [2, status.OK]);
});

test("without unavailable in retry_on the client gets that status", async () => {
  letServers({ unary: busyOnce() });
  const { code, details } = await ask("pair.test");
  assert.deepEqual([code, details, asked.length], [status.UNAVAILABLE, "busy", 1]);
});

test("other statuses than UNAVAILABLE are not asked again", async () => {
  letServers({ unary: (_, _call, reply) => reply({ code: status.RESOURCE_EXHAUSTED, details: "no" }) });
  const { code } = await ask("retried.test");
  assert.deepEqual([code, asked.length], [status.RESOURCE_EXHAUSTED, 1]);
});

test("where every server is UNAVAILABLE, the client gets what the last one said", async () => {
  letServers({ unary: (_, _call, reply) => reply({ code: status.UNAVAILABLE, details: `busy ${asked.length}` }) });
  const { code, details } = await ask("retried.test");
  assert.deepEqual([code, details, new Set(asked).size], [status.UNAVAILABLE, "busy 2", 2]);
});

test("a call of which a message has been answered is not asked again", async () => {
  letServers({
    list(_, call) {
      call.write(Buffer.from("1"));
      call.emit("error", { code: status.UNAVAILABLE, details: "cut" });
    },
  });
  const { code, details, messages } = await list("retried.test", "x");
  assert.deepEqual([code, details, messages, asked.length], [status.UNAVAILABLE, "cut", ["1"], 1]);
});

test("a request of 64 KiB is asked again, one that is longer is not", async () => {
  const head = 5; // bytes in front of a message
  for (const [size, expected] of [[65_536 - head, 2], [65_537 - head, 1]] as const) {
    let last = 0;
    letServers({
      unary(name, call, reply) {
        last = call.request.length;
        busyOnce()(name, call, reply);
      },
    });
    const { code } = await ask("retried.test", Buffer.alloc(size, "a"));
    assert.deepEqual([asked.length, code], [expected, expected === 2 ? status.OK : status.UNAVAILABLE]);
    assert.equal(last, size);
  }
});

test("a request that has not come whole is not asked again", async () => {
  letServers({
    chat(_, call) {
      call.on("data", () => void call.emit("error", { code: status.UNAVAILABLE, details: "busy" }));
    },
  });
  const { say, outcome } = chat("retried.test");
  say("1");
  const { code, details } = await outcome;
  assert.deepEqual([code, details, asked.length], [status.UNAVAILABLE, "busy", 1]);
});

// ─── Deadlines and cancelled calls ───

/** A server that waits until a call is cancelled. */
function deaf() {
  const seen = { cancelled: 0 };
  const wait = (call: ServerCall) => void call.on("cancelled", () => seen.cancelled++);
  letServers({
    unary: (_, call) => wait(call),
    collect: (_, call) => wait(call.resume()),
    list: (_, call) => wait(call),
    chat(_, call) {
      call.on("data", () => void call.write(Buffer.from("yes")));
      wait(call);
    },
  });
  return seen;
}

/** Waits until the server hears of it; less than the 4 s after which a connection without calls is closed. */
const cancelled = (seen: { cancelled: number }, calls: number) =>
  until("the server hears of it", () => seen.cancelled === calls, 3_000);

// The client has no deadline of its own here, and the route keeps grpc-timeout from the server.
const SOON = { metadata: { "grpc-timeout": "300m" } };
const TOO_LATE = "the server did not answer in time";

test("grpc-timeout ends a call that the server does not answer, and cancels it there", async () => {
  const seen = deaf();
  const { code, details, head } = await ask("deadline.test", "x", SOON);
  assert.deepEqual([code, details, head], [status.DEADLINE_EXCEEDED, "the call's deadline has passed", undefined]);
  await cancelled(seen, 1);
});

test("grpc-timeout ends a call whose client has not ended its side", async () => {
  const seen = deaf();
  const { call, outcome } = collect("deadline.test", SOON);
  call.write(Buffer.from("1"));
  assert.equal((await outcome).code, status.DEADLINE_EXCEEDED);
  await cancelled(seen, 1);
});

test("grpc-timeout ends a call of which a message has been answered", async () => {
  const seen = deaf(), { call, messages, say, outcome } = chat("deadline.test", SOON);
  say("1");
  await until("it is answered", () => messages.length === 1);
  call.end();
  const late = sleep(2_000).then(() => undefined), ended = await Promise.race([outcome, late]);
  call.cancel();
  assert.equal(ended?.code, status.DEADLINE_EXCEEDED);
  await cancelled(seen, 1);
});

test("grpc-timeout ends a call that waits for a server with room", async () => {
  const seen = deaf(), first = chat("queued.test");
  first.say("1");
  await until("the first call runs", () => first.messages.length === 1);
  const { code } = await ask("queued.test", "x", SOON);
  first.call.cancel();
  await cancelled(seen, 1);
  assert.equal(code, status.DEADLINE_EXCEEDED);
});

test("a server is not ejected for the deadlines of its clients", async () => {
  deaf();
  const short = { metadata: { "grpc-timeout": "1m" } };
  for (let i = 0; i < 6; i++) assert.equal((await ask("ejecting.test", "x", short)).code, status.DEADLINE_EXCEEDED);
  assert.equal(await metric('lb_server_ejections_total{service="ejecting"'), 0);
});

test("grpc-timeout does not lengthen timeouts.response", async () => {
  const seen = deaf();
  const { code, details } = await ask("late.test", "x", { deadline: Date.now() + 20_000 });
  assert.deepEqual([code, details], [status.DEADLINE_EXCEEDED, TOO_LATE]);
  await cancelled(seen, 1);
});

test("a call that its client cancels is cancelled at the server, whether the client has said all or not", async () => {
  const seen = deaf();
  const { call, outcome, messages, say } = chat("alone.test");
  say("are you there?");
  await until("it runs", () => messages.length === 1);
  call.cancel();
  assert.equal((await outcome).code, status.CANCELLED);
  await cancelled(seen, 1);
  const second = start("alone.test", "unary", "x");
  await until("the server has it", () => asked.length === 2);
  second.call.cancel();
  assert.equal((await second.outcome).code, status.CANCELLED);
  await cancelled(seen, 2);
  const failures = () => linesAbout("alone.test").map((line) => line["error.type"]).filter(Boolean);
  await until("both are logged", () => failures().length === 2);
  assert.deepEqual(failures(), ["client-left", "client-left"]);
});

// ─── Local replies ───

/** Who is refused, with which status and text, and what the log says. */
const REFUSALS: [host: string, code: status, details: string, http: number, failure: string][] = [
  ["down.test", status.UNAVAILABLE, "no server may be asked", 503, "no-server"],
  ["full.test", status.UNAVAILABLE, "all servers are busy, and too many requests wait", 503, "queue-full"],
  ["gone.test", status.UNAVAILABLE, "the server cannot be reached", 502, "connect"],
  ["cut.test", status.UNAVAILABLE, "the server closed the connection", 502, "reset"],
  ["late.test", status.DEADLINE_EXCEEDED, TOO_LATE, 504, "timeout"],
  ["rated.test", status.RESOURCE_EXHAUSTED, "too many requests", 429, "rate"],
  ["denied.test", status.PERMISSION_DENIED, "this address may not ask", 403, "denied"],
  ["nowhere.test", status.UNIMPLEMENTED, "no route fits this request", 404, "no-route"],
  ["get.test", status.UNIMPLEMENTED, "this method is not allowed here", 405, "bad-method"],
];
for (const [host, code, details, http, failure] of REFUSALS) {
  test(`a client of gRPC reads ${failure} as ${status[code]}`, async () => {
    const seen = deaf();
    const first = host === "full.test" ? chat(host) : undefined;
    first?.say("1");
    if (first) await until("the first call runs", () => first.messages.length === 1);
    if (host === "down.test") await until("it is down", () => lb.output().includes("warn: down: "));
    if (host === "rated.test") {
      letServers();
      assert.equal((await ask(host)).code, status.OK);
    }
    const outcome = await ask(host);
    assert.deepEqual([outcome.code, outcome.details], [code, details]);
    assert.deepEqual([outcome.head, outcome.messages], [undefined, []]);
    assert.deepEqual(outcome.trailers.get("x-lb-failure"), [failure]);
    const line = await until("it is logged", () => linesAbout(host).find((one) => one["error.type"] === failure));
    assert.equal(line["http.response.status_code"], http);
    assert.equal(line["rpc.grpc.status_code"], undefined, "no server has said it");
    first?.call.cancel();
    if (first) await cancelled(seen, 1);
  });
}

test("body_limit holds for a message that comes whole, and for one that comes in pieces", async () => {
  letServers();
  const expected = [status.RESOURCE_EXHAUSTED, "the request's body is too large"];
  const { call, outcome } = collect("small.test");
  for (let i = 0; i < 3; i++) call.write(Buffer.alloc(500));
  const inPieces = await outcome, whole = await ask("small.test", Buffer.alloc(2_000));
  assert.deepEqual([inPieces.code, inPieces.details], expected);
  assert.deepEqual([whole.code, whole.details], expected);
  assert.equal((await ask("small.test", Buffer.alloc(900))).code, status.OK);
});

// ─── Health ───

for (const [name, { grpc, at, finds }] of Object.entries(CHECKS)) {
  const found = finds ? `is down: ${finds}` : "is up";
  test(`health: {grpc: ${JSON.stringify(grpc)}}: ${CHECKED[at]} ${found}`, async () => {
    const [wanted, other] = finds ? ["failed", "passed"] : ["passed", "failed"];
    while (await metric(`lb_server_probes_total{service="${name}",`, `,result="${wanted}"}`) < 2) await sleep(20);
    assert.equal(await metric(`lb_server_probes_total{service="${name}",`, `,result="${other}"}`), 0);
    assert.equal(await metric(`lb_service_server_up{service="${name}",`), finds ? 0 : 1);
    const warnings = linesOf(lb).filter((line) => line.includes(` warn: ${name}: `));
    assert.deepEqual(warnings.map((line) => line.replace(/^.* is down: /, "")), finds ? [finds] : []);
  });
}

test("a server that no longer says SERVING is down, and up again when it does", async () => {
  letServers();
  const said = (what: RegExp) => until(`${what}`, () => what.test(lb.output()));
  states.set("some.Service", "NOT_SERVING");
  await said(/ warn: some: \S+ is down: it is NOT_SERVING$/m);
  assert.equal((await ask("some.test")).code, status.UNAVAILABLE);
  states.set("some.Service", "SERVING");
  await said(/ info: some: \S+ is up$/m);
  assert.equal((await ask("some.test")).code, status.OK);
});

// ─── What is counted and written down ───

test("calls are counted and logged by the status that their server gave", async () => {
  letServers({
    unary: (name, call, reply) =>
      call.request.toString() === "0" ? USUAL.unary(name, call, reply) : reply({ code: Number(call.request) }),
  });
  for (const code of ["0", "5", "0", "16", "99"]) await ask("counted.test", code);
  letServers({
    list(_, call) {
      call.write(Buffer.from("1"));
      call.emit("error", { code: status.DATA_LOSS, details: "lost" });
    },
  });
  await list("counted.test", "x");
  const lines = await until(
    "all are logged",
    () => linesAbout("counted.test").length === 6 && linesAbout("counted.test"),
  );
  assert.deepEqual(lines.map((line) => line["rpc.grpc.status_code"]), [0, 5, 0, 16, 99, 15]);
  assert.deepEqual(lines.map((line) => line["http.response.status_code"]), [200, 200, 200, 200, 200, 200]);
  const counted = (await metrics()).filter((line) =>
    line.startsWith('lb_service_grpc_responses_total{service="counted"')
  );
  assert.deepEqual(
    counted.sort(),
    [[0, 2], [15, 1], [16, 1], [5, 1]].map(([code, times]) =>
      `lb_service_grpc_responses_total{service="counted",grpc_status="${code}"} ${times}`
    ),
  );
});

test("when all calls are over, none is counted as in flight", async () => {
  for (const name of ["lb_open_connections", "lb_service_requests_in_flight", "lb_server_requests_in_flight"]) {
    while (await metric(`${name}{`) > 0) await sleep(20);
  }
});

// ─── Draining ───

test("a running call ends as ever while the program drains, new ones go elsewhere; combined names the status", async () => {
  const [behind, elsewhere] = await Promise.all([grpcServer("behind"), grpcServer("elsewhere")]);
  const old = await startProgram(
    {
      listen: [{ address: "127.0.0.1:0", h2c: true }],
      log: "combined",
      default: { servers: [`h2c://${behind}`], health: "off" },
    },
    ["--drain", "10s"],
  );
  try {
    letServers({
      unary(name, call, reply) {
        if (call.request.toString() !== "9") return USUAL.unary(name, call, reply);
        reply({ code: status.FAILED_PRECONDITION, details: "no" });
      },
    });
    const here = `127.0.0.1:${old.port}`;
    const stays = clientOf("old.test", here), moves = clientOf("old.test", `ipv4:${here},${elsewhere}`);
    assert.equal((await ask("old.test", "9", { client: stays })).code, status.FAILED_PRECONDITION);
    assert.deepEqual((await ask("old.test", "x", { client: moves })).messages, ["behind: x"]);
    const [failed, fine] = await until("both are logged", () => {
      const lines = linesOf(old).filter((line) => line.includes('"POST /t.T/Unary HTTP/2.0" 200 '));
      return lines.length === 2 && lines;
    });
    assert.match(failed!, / default \S+ 1 \S+ grpc-status-9 \S+ \S+$/);
    assert.match(fine!, / default \S+ 1 \S+ - \S+ \S+$/);

    const { call, outcome, messages, say } = chat("old.test", { client: stays });
    say("1");
    await until("the call runs", () => messages.length === 1);
    process.kill(old.pid, "SIGTERM");
    await until("it drains", () => old.output().includes("info: draining"));
    for (let moved = ""; moved !== "elsewhere: x";) {
      const { code, messages } = await ask("old.test", "x", { client: moves });
      assert.equal(code, status.OK);
      moved = messages.join();
    }
    for (let last = status.OK; last !== status.UNAVAILABLE;) {
      last = (await ask("old.test", "x", { client: stays })).code;
      assert.ok(last === status.OK || last === status.UNAVAILABLE, status[last]);
    }
    for (let round = 2; round <= 9; round++) { // longer than it takes to end where nothing is in flight
      await sleep(200);
      say(`${round}`);
      await until("the call still runs", () => messages.length === round);
    }
    call.end();
    assert.equal((await outcome).code, status.OK);
    await until("nothing is left in flight", () => /info: drained\n/.test(old.output()), 10_000);
  } finally {
    await old.stop();
  }
});
