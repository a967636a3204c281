// HTTP/2 for tests, over node:net and node:tls: a client and a server that send frames as they are, also wrong ones, and
// that note everything that lb.ts must not do as their peer (RFC 9113, RFC 7541) in `faults`.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { createHash } from "node:crypto";
import { connect, createServer, type Socket } from "node:net";
import { connect as connectTls, createServer as createTlsServer, type TlsOptions } from "node:tls";
import { type Echo, endServer, listenLocally } from "./rig.ts";

export const [DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION] =
  [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] as const;
export const [END_STREAM, ACK, END_HEADERS, PADDED, PRIORITIZED] = [1, 1, 4, 8, 32] as const;
/** Names of settings. */
export const [TABLE_SIZE, ENABLE_PUSH, MAX_STREAMS, INITIAL_WINDOW, MAX_FRAME, MAX_LIST, ENABLE_CONNECT] = //
  [1, 2, 3, 4, 5, 6, 8] as const;
// deno-fmt-ignore
/** Error codes: the position is the code. */
const CODES = [
  "NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT", "STREAM_CLOSED",
  "FRAME_SIZE_ERROR", "REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR", "CONNECT_ERROR", "ENHANCE_YOUR_CALM",
] as const;
export type Code = (typeof CODES)[number];

export const PREFACE = Buffer.from("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
const LARGEST_FRAME = 16_384, WINDOW = 65_535;

// ─── Frames ───

export interface Frame {
  type: number;
  flags: number;
  stream: number;
  payload: Buffer;
}

export const hex = (text: string): Buffer => Buffer.from(text.replaceAll(" ", ""), "hex");
export const u32 = (value: number): Buffer => {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
};

/** A frame; a text is latin1. */
export function frame(type: number, flags: number, stream: number, payload: string | Buffer = ""): Buffer {
  const bytes = typeof payload === "string" ? Buffer.from(payload, "latin1") : payload, head = Buffer.alloc(9);
  head.writeUIntBE(bytes.length, 0, 3);
  head[3] = type;
  head[4] = flags;
  head.writeUInt32BE(stream, 5);
  return Buffer.concat([head, bytes]);
}

/** SETTINGS with names and values. */
export const settings = (...values: [name: number, value: number][]): Buffer =>
  frame(
    SETTINGS,
    0,
    0,
    Buffer.concat(values.map(([name, value]) => Buffer.concat([Buffer.from([0, name]), u32(value)]))),
  );
export const windowUpdate = (stream: number, more: number): Buffer => frame(WINDOW_UPDATE, 0, stream, u32(more));
export const reset = (stream: number, code: Code = "CANCEL"): Buffer =>
  frame(RST_STREAM, 0, stream, u32(CODES.indexOf(code)));
export const goAway = (last: number, code: Code = "NO_ERROR"): Buffer =>
  frame(GOAWAY, 0, 0, Buffer.concat([u32(last), u32(CODES.indexOf(code))]));
export const headers = (stream: number, block: Buffer, flags: number = END_STREAM): Buffer =>
  frame(HEADERS, flags | END_HEADERS, stream, block);
export const data = (stream: number, payload: string | Buffer, flags = 0): Buffer =>
  frame(DATA, flags, stream, payload);

/** Reads frames out of bytes in whatever portions they come. */
function frameReader(onFrame: (frame: Frame) => void): (bytes: Buffer) => void {
  let rest: Buffer = Buffer.alloc(0);
  return (bytes) => {
    rest = rest.length ? Buffer.concat([rest, bytes]) : bytes;
    let at = 0;
    for (let end; rest.length - at >= 9 && (end = at + 9 + rest.readUIntBE(at, 3)) <= rest.length; at = end) {
      const stream = rest.readUInt32BE(at + 5);
      onFrame({ type: rest[at + 3]!, flags: rest[at + 4]!, stream, payload: Buffer.from(rest.subarray(at + 9, end)) });
    }
    rest = rest.subarray(at);
  };
}

// ─── Header blocks ───

export type Field = [name: string, value: string];

/** An integer behind the flags of its first byte (RFC 7541 section 5.1). */
export function integer(value: number, bits: number, flags = 0): Buffer {
  const most = 2 ** bits - 1, bytes: number[] = [flags | Math.min(value, most)];
  if (value >= most) {
    for (value -= most; value > 127; value = Math.floor(value / 128)) bytes.push(value % 128 | 128);
    bytes.push(value);
  }
  return Buffer.from(bytes);
}
/** A text as it is, without the Huffman code. */
export const text = (value: string): Buffer => Buffer.concat([integer(value.length, 7), Buffer.from(value, "latin1")]);
/** A field that is written out, and not put into the table; `flags` 64: put into it. */
export const literal = (name: string, value: string, flags = 0): Buffer =>
  Buffer.concat([Buffer.from([flags]), text(name), text(value)]);
export const block = (...fields: Field[]): Buffer => Buffer.concat(fields.map(([name, value]) => literal(name, value)));

/** The four pseudo-fields of a request, and more fields. */
export const request = (path: string, fields: Field[] = [], method = "GET"): Field[] => [
  [":method", method],
  [":scheme", "http"],
  [":authority", "a.test"],
  [":path", path],
  ...fields,
];

/** The static table (RFC 7541 appendix A), a line for each: a name, or a name and a value. */
const STATIC: Field[] = `:authority
:method GET
:method POST
:path /
:path /index.html
:scheme http
:scheme https
:status 200
:status 204
:status 206
:status 304
:status 400
:status 404
:status 500
accept-charset
accept-encoding gzip, deflate
accept-language
accept-ranges
accept
access-control-allow-origin
age
allow
authorization
cache-control
content-disposition
content-encoding
content-language
content-length
content-location
content-range
content-type
cookie
date
etag
expect
expires
from
host
if-match
if-modified-since
if-none-match
if-range
if-unmodified-since
last-modified
link
location
max-forwards
proxy-authenticate
proxy-authorization
range
referer
refresh
retry-after
server
set-cookie
strict-transport-security
transfer-encoding
user-agent
vary
via
www-authenticate`.split("\n").map((line): Field => {
  const [name = "", ...value] = line.split(" ");
  return [name, value.join(" ")];
});

/** Reads a header block of lb.ts, which uses neither a dynamic table nor the Huffman code. */
export function readBlock(bytes: Buffer): Field[] {
  const fields: Field[] = [];
  let at = 0;
  const byte = () => {
    assert.ok(at < bytes.length, `a header block is cut off: ${bytes.toString("hex")}`);
    return bytes[at++]!;
  };
  const number = (bits: number) => {
    const most = 2 ** bits - 1;
    let value = byte() & most;
    if (value < most) return value;
    for (let scale = 1;; scale *= 128) {
      const next = byte();
      value += (next & 127) * scale;
      if (next < 128) return value;
    }
  };
  const string = () => {
    assert.ok((bytes[at] ?? 255) < 128, "a text is in the Huffman code");
    const length = number(7);
    assert.ok(at + length <= bytes.length, "a text is cut off");
    return bytes.toString("latin1", at, at += length);
  };
  const known = (index: number): Field => {
    assert.ok(index > 0 && STATIC[index - 1], `index ${index} is not in the static table`);
    return STATIC[index - 1]!;
  };
  while (at < bytes.length) {
    const first = bytes[at]!;
    assert.ok(first < 32 || first >= 128, `a field is indexed, or changes the table: ${first}`);
    if (first >= 128) {
      const [name, value] = known(number(7));
      fields.push([name, value]);
      continue;
    }
    const index = number(4), name = index ? known(index)[0] : string();
    fields.push([name, string()]);
  }
  return fields;
}

export const valuesOf = (fields: Field[], name: string) =>
  fields.filter(([one]) => one === name).map(([, value]) => value);
export const valueOf = (fields: Field[], name: string) => valuesOf(fields, name).join(", ");

// ─── One end of a connection ───

/** Padding, and the five bytes of a priority, off. */
function unwrapped({ flags, payload }: Frame, type: number): Buffer {
  const padding = flags & PADDED ? payload[0]! : 0,
    from = (flags & PADDED ? 1 : 0) + (type === HEADERS && flags & PRIORITIZED ? 5 : 0);
  assert.ok(from + padding <= payload.length, "more padding than payload");
  return payload.subarray(from, payload.length - padding);
}

const FORBIDDEN = new Set(["connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"]);
const SIZES = new Map<number, number>([[PRIORITY, 5], [RST_STREAM, 4], [PING, 8], [WINDOW_UPDATE, 4]]);

/** One stream, as it was received; and what is sent on it. */
export class Stream {
  readonly end: End;
  readonly id: number;
  interim: Field[][] = [];
  head: Field[] = [];
  trailers: Field[] | undefined;
  pieces: Buffer[] = [];
  bytes = 0; // of DATA, without padding
  ended = false; // by the peer's END_STREAM
  wasReset: Code | undefined; // by the peer
  window: number; // bytes that the peer takes
  credit: number; // bytes that the peer may send
  closed = false; // we have reset it: what comes may have crossed that

  constructor(end: End, id: number) {
    this.end = end;
    this.id = id;
    this.window = end.peerWindow;
    this.credit = end.ownWindow;
  }
  get body(): Buffer {
    return Buffer.concat(this.pieces);
  }
  get status(): number {
    return Number(valueOf(this.head, ":status"));
  }
  /** What came of it, in short: a status, `200 cut` or a code. */
  get result(): string {
    if (this.wasReset && !this.ended) return this.head.length ? `${this.status} ${this.wasReset}` : this.wasReset;
    return this.ended ? `${this.status}` : `${this.head.length ? this.status : "nothing"} cut`;
  }
  header(name: string): string {
    return valueOf(this.head, name);
  }
  json(): Echo {
    return JSON.parse(this.body.toString());
  }

  /** Resolves with the final head, or what came in its place. */
  async begun(): Promise<this> {
    await this.end.when(`a head on stream ${this.id}`, () => this.head.length > 0 || this.wasReset || this.end.over);
    return this;
  }
  /** Resolves when the peer has ended or reset it, or the connection is over. */
  async done(within?: number): Promise<this> {
    const isDone = () => this.ended || this.wasReset !== undefined || this.end.over;
    await this.end.when(`the end of stream ${this.id}`, isDone, within);
    return this;
  }

  sendHead(fields: Field[], ends = false): void {
    this.end.send(headers(this.id, block(...fields), ends ? END_STREAM : 0));
  }
  /** Sends a piece of a body as the windows allow. */
  async sendData(bytes: string | Buffer, ends = false): Promise<void> {
    let rest = Buffer.from(bytes as string);
    do {
      const room = () => Math.min(this.window, this.end.window, LARGEST_FRAME, rest.length);
      if (rest.length) await this.end.when(`a window for stream ${this.id}`, () => room() > 0 || this.isOver());
      if (this.isOver()) return;
      const piece = rest.subarray(0, room());
      rest = rest.subarray(piece.length);
      this.window -= piece.length;
      this.end.window -= piece.length;
      this.end.send(data(this.id, piece, ends && !rest.length ? END_STREAM : 0));
    } while (rest.length);
  }
  private isOver(): boolean {
    return this.end.over || this.closed || this.wasReset !== undefined;
  }
  sendTrailers(fields: Field[]): void {
    this.sendHead(fields, true);
  }
  reset(code: Code = "CANCEL"): void {
    this.closed = true;
    this.end.send(reset(this.id, code));
  }
  /** A whole response; the status in front of its fields. */
  async respond(status: number, fields: Field[] = [], body: string | Buffer = ""): Promise<void> {
    this.sendHead([[":status", `${status}`], ...fields], !body.length);
    if (body.length) await this.sendData(body, true);
  }
}

export interface EndOptions {
  /** What is sent first, after the preface: SETTINGS. */
  greeting?: Buffer;
  /** Our initial window, as the greeting says it. */
  window?: number;
  /** false: windows are raised by the test only. */
  raises?: boolean;
  /** The greeting asks for a small table: the first header block has to say that it is empty. */
  shrinks?: boolean;
  /** false: neither SETTINGS nor PING are answered, for that would stand in the middle of what the test sends. */
  answers?: boolean;
}

/** What both ends have: the client's and the server's. */
export abstract class End {
  readonly socket: Socket;
  readonly streams = new Map<number, Stream>();
  /** All frames that have come, in order. */
  readonly frames: Frame[] = [];
  /** What lb.ts did that it must not. */
  readonly faults: string[] = [];
  over = false;
  goAway: { last: number; code: Code; text: string } | undefined;
  window = WINDOW; // bytes that the peer takes on all streams
  peerWindow = WINDOW; // its initial window
  peerStreams = Infinity; // that it takes at once
  ownWindow = WINDOW; // ours, as far as the peer has acknowledged it
  credit = WINDOW; // bytes that it may send on all streams
  answers: boolean; // SETTINGS and PING
  raises: boolean;
  private shrinks: boolean; // the next header block has to
  private nextWindow: number; // with the next ACK
  private readonly waiting = new Set<() => void>();
  private inBlock: { stream: number; ends: boolean; pieces: Buffer[] } | undefined;

  constructor(socket: Socket, { window = WINDOW, raises = true, answers = true, shrinks = false }: EndOptions = {}) {
    this.socket = socket;
    this.shrinks = shrinks;
    socket.setNoDelay(true);
    this.nextWindow = window;
    this.raises = raises;
    this.answers = answers;
    const over = () => {
      this.over = true;
      this.wake();
    };
    socket.on("end", over).on("close", over).on("error", over);
  }
  protected listen(): (bytes: Buffer) => void {
    const read = frameReader((one) => {
      this.frames.push(one);
      try {
        this.take(one);
      } catch (error) {
        this.faults.push(`${(error as Error).message} (frame ${one.type} on stream ${one.stream})`);
      }
    });
    return (bytes) => {
      read(bytes);
      this.wake();
    };
  }
  private wake(): void {
    for (const look of this.waiting) look();
  }

  /** Resolves as soon as something is seen after a frame, or the end; fails when it is not. */
  when<T>(what: string, look: () => T | undefined | false, within = 8_000): Promise<T> {
    return new Promise((resolve, reject) => {
      const attempt = () => {
        const seen = look();
        if (!seen) return;
        this.waiting.delete(attempt);
        clearTimeout(timer);
        resolve(seen);
      };
      const timer = setTimeout(() => {
        this.waiting.delete(attempt);
        const last = this.frames.slice(-8).map((one) => `${one.type}/${one.flags} on ${one.stream}`).join(", ");
        reject(new Error(`did not happen within ${within} ms: ${what}; the last frames: ${last}`));
      }, within);
      this.waiting.add(attempt);
      attempt();
    });
  }
  /** Resolves with the GOAWAY of a connection that has ended, or its absence. */
  async closed(within?: number): Promise<string> {
    await this.when("the end of the connection", () => this.over, within);
    return this.goAway?.code ?? "no GOAWAY";
  }

  /** Sends nothing more once the test has ended this side, as answers to PING would: such a write is an error. */
  send(...parts: (Buffer | string)[]): void {
    const bytes = Buffer.concat(parts.map((part) => typeof part === "string" ? Buffer.from(part, "latin1") : part));
    if (bytes.length && !this.socket.destroyed && !this.socket.writableEnded) this.socket.write(bytes);
  }
  destroy(): void {
    this.socket.destroy();
    this.over = true;
  }

  protected abstract streamOf(id: number): Stream | undefined;
  protected abstract onBlock(stream: Stream, fields: Field[], ends: boolean): void;
  protected onStreamEnd(_stream: Stream): void {}

  private take(one: Frame): void {
    const { type, flags, stream: id, payload } = one, size = SIZES.get(type);
    const isFirst = this.frames.length === 1,
      isOfStream = [DATA, HEADERS, PRIORITY, RST_STREAM, CONTINUATION].includes(type as 0);
    assert.ok(!isFirst || type === SETTINGS && !(flags & ACK), "the first frame is not SETTINGS");
    assert.ok(payload.length <= LARGEST_FRAME, `a frame of ${payload.length} bytes`);
    assert.ok(size === undefined || payload.length === size, `a frame of ${payload.length} bytes`);
    assert.ok(type <= CONTINUATION && type !== PUSH_PROMISE, "a frame that lb.ts never sends");
    assert.ok(type === WINDOW_UPDATE || isOfStream === id > 0, "its stream is 0, or should be");
    assert.ok(!this.inBlock || type === CONTINUATION && id === this.inBlock.stream, "a frame inside a header block");
    assert.ok(!this.goAway || this.goAway.code === "NO_ERROR", "a frame behind a GOAWAY with an error");
    if (type === SETTINGS) this.takeSettings(flags, payload);
    else if (type === PING && !(flags & ACK) && this.answers) this.send(frame(PING, ACK, 0, payload));
    else if (type === GOAWAY) this.takeGoAway(payload);
    else if (type === WINDOW_UPDATE) this.takeWindow(id, payload.readUInt32BE());
    else if (isOfStream) this.takeOfStream(one);
  }
  private takeSettings(flags: number, payload: Buffer): void {
    assert.ok(payload.length % 6 === 0 && !(flags & ACK && payload.length), "SETTINGS of a wrong size");
    if (flags & ACK) return this.moveWindow(this.nextWindow);
    for (let at = 0; at < payload.length; at += 6) {
      const name = payload.readUInt16BE(at), value = payload.readUInt32BE(at + 2);
      if (name === MAX_STREAMS) this.peerStreams = value;
      if (name !== INITIAL_WINDOW) continue;
      for (const stream of this.streams.values()) stream.window += value - this.peerWindow;
      this.peerWindow = value;
    }
    if (this.answers) this.send(frame(SETTINGS, ACK, 0));
  }
  /** Our initial window is in force. */
  private moveWindow(window: number): void {
    for (const stream of this.streams.values()) stream.credit += window - this.ownWindow;
    this.ownWindow = window;
  }
  private takeGoAway(payload: Buffer): void {
    const before = this.goAway, last = payload.readUInt32BE() & 0x7fffffff;
    this.goAway = { last, code: CODES[payload.readUInt32BE(4)]!, text: payload.toString("latin1", 8) };
    assert.ok(!before || last <= before.last, "a later GOAWAY names a higher stream");
  }
  private takeWindow(id: number, more: number): void {
    assert.ok(more > 0 && more < 2 ** 31, `WINDOW_UPDATE of ${more}`);
    if (!id) this.window += more;
    else if (this.streams.has(id)) this.streams.get(id)!.window += more;
    else assert.fail("WINDOW_UPDATE of a stream that has not begun");
    assert.ok(this.window < 2 ** 31 && (this.streams.get(id)?.window ?? 0) < 2 ** 31, "a window over 2^31-1");
  }
  private takeOfStream(one: Frame): void {
    const { type, flags, stream: id, payload } = one, isHead = type === HEADERS || type === CONTINUATION;
    const stream = this.streamOf(id);
    assert.ok(stream, "its stream has not begun");
    if (type === PRIORITY) return;
    if (type === DATA) {
      this.credit -= payload.length;
      stream.credit -= payload.length;
      assert.ok(this.credit >= 0 && stream.credit >= 0, "more data than a window allows");
      if (this.raises && payload.length) this.raise(stream, payload.length);
    }
    if (isHead) {
      this.inBlock ??= { stream: id, ends: (flags & END_STREAM) > 0, pieces: [] };
      assert.ok((type === HEADERS) === (this.inBlock.pieces.length === 0), "HEADERS and CONTINUATION in a wrong order");
      this.inBlock.pieces.push(unwrapped(one, type));
      if (!(flags & END_HEADERS)) return;
    }
    const head = this.inBlock;
    this.inBlock = undefined;
    assert.ok(!stream.wasReset, "a frame behind a reset");
    if (type === RST_STREAM) stream.wasReset = CODES[payload.readUInt32BE()] ?? "INTERNAL_ERROR";
    if (type === RST_STREAM || stream.closed) return;
    assert.ok(!stream.ended, "a frame behind the end of a stream");
    if (isHead) return this.takeBlock(stream, readBlock(this.shrunk(Buffer.concat(head!.pieces))), head!.ends);
    assert.ok(stream.head.length, "data in front of the head");
    const bytes = unwrapped(one, type);
    stream.pieces.push(bytes);
    stream.bytes += bytes.length;
    if (flags & END_STREAM) this.endStream(stream);
  }
  private shrunk(bytes: Buffer): Buffer {
    if (!this.shrinks) return bytes;
    this.shrinks = false;
    assert.equal(bytes[0], 0x20, "the first header block does not say that the table is empty");
    return bytes.subarray(1);
  }
  private takeBlock(stream: Stream, fields: Field[], ends: boolean): void {
    let isPseudo = true;
    for (const [name, value] of fields) {
      assert.ok(!name.startsWith(":") || isPseudo, `${name} stands behind a field`);
      isPseudo = name.startsWith(":");
      assert.match(name, /^:?[!#$%&'*+.^_`|~0-9a-z-]+$/, "a name of a field");
      assert.match(value, /^(?![ \t])[\t -~\x80-\xff]*$(?<![ \t])/, `the value of ${name}`);
      assert.ok(!FORBIDDEN.has(name) && (name !== "te" || value === "trailers"), `${name} is for HTTP/1.1`);
    }
    const names = fields.map(([name]) => name).filter((name) => name.startsWith(":"));
    assert.equal(new Set(names).size, names.length, "a pseudo-field stands twice");
    this.onBlock(stream, fields, ends);
    if (ends) this.endStream(stream);
  }
  private endStream(stream: Stream): void {
    const length = valueOf(stream.head, "content-length");
    stream.ended = true;
    this.onStreamEnd(stream);
    const isWhole = this.hasNoBody(stream) || length === "" || Number(length) === stream.bytes;
    assert.ok(isWhole, `${stream.bytes} bytes, and content-length: ${length}`);
  }
  protected hasNoBody(stream: Stream): boolean {
    return stream.status === 304;
  }
  private raise(stream: Stream, bytes: number): void {
    this.credit += bytes;
    stream.credit += bytes;
    this.send(windowUpdate(0, bytes), ...stream.ended || stream.closed ? [] : [windowUpdate(stream.id, bytes)]);
  }
}

// ─── The client ───

export interface Asking {
  method?: string;
  fields?: Field[];
  body?: string | Buffer;
  /** false: the request is not ended. */
  ends?: boolean;
  trailers?: Field[];
  /** A body goes with its length where it is all there is. */
  sized?: boolean;
}

export class Client extends End {
  private next = 1;
  private readonly heads = new Set<number>(); // of HEAD requests

  constructor(socket: Socket, options: EndOptions = {}) {
    super(socket, options);
    socket.on("data", this.listen());
  }
  /** A stream that the test opens by itself. */
  stream(id = this.next): Stream {
    this.next = Math.max(this.next, id + 2);
    const stream = new Stream(this, id);
    this.streams.set(id, stream);
    return stream;
  }
  /** Sends a request. A body goes out as the windows allow. */
  ask(path: string, { method, fields = [], body, ends = true, trailers, sized = true }: Asking = {}): Stream {
    const stream = this.stream(), hasMore = body !== undefined || trailers !== undefined || !ends;
    const isSized = sized && body !== undefined && ends && !trailers && !valuesOf(fields, "content-length").length;
    const length: Field[] = isSized ? [["content-length", `${Buffer.byteLength(body!)}`]] : [];
    const all = request(path, [...fields, ...length], method ?? (hasMore ? "POST" : "GET"));
    if (method === "HEAD") this.heads.add(stream.id);
    stream.sendHead(all, !hasMore);
    const sent = body === undefined ? Promise.resolve() : stream.sendData(body, ends && !trailers);
    sent.then(() => trailers && stream.sendTrailers(trailers), () => {});
    return stream;
  }
  get(path: string, fields: Field[] = []): Promise<Stream> {
    return this.ask(path, { fields }).done();
  }
  protected streamOf(id: number): Stream | undefined {
    return this.streams.get(id);
  }
  protected onBlock(stream: Stream, fields: Field[], ends: boolean): void {
    const status = Number(valueOf(fields, ":status")), pseudo = fields.filter(([name]) => name.startsWith(":"));
    if (stream.head.length) {
      assert.ok(ends && !pseudo.length, "trailers that do not end, or with a pseudo-field");
      stream.trailers = fields;
      return;
    }
    assert.ok(pseudo.length === 1 && status >= 100 && status < 600, "the pseudo-fields of a response");
    assert.ok(status !== 101, "a status of HTTP/1.1");
    if (status >= 200) stream.head = fields;
    else if (ends) assert.fail("an interim response is the last");
    else stream.interim.push(fields);
  }
  protected override hasNoBody(stream: Stream): boolean {
    return super.hasNoBody(stream) || this.heads.has(stream.id);
  }
}

export interface ClientOptions extends EndOptions {
  /** Over TLS, with these protocols. */
  tls?: { ca: string; protocols: string[] };
  /** Sent in place of preface and SETTINGS. */
  opening?: Buffer;
  /** Frames that are sent with them. */
  more?: Buffer[];
}

/** Opens a connection, over which HTTP/2 has begun. */
export async function h2Client(port: number, options: ClientOptions = {}): Promise<Client> {
  const { tls, greeting = settings(), opening = Buffer.concat([PREFACE, greeting]), more = [] } = options;
  const socket = tls === undefined ? connect(port, "127.0.0.1") : connectTls({
    ...{ port, host: "127.0.0.1", ca: tls.ca, servername: "a.test", ALPNProtocols: tls.protocols },
    checkServerIdentity: () => undefined,
  });
  const client = new Client(socket, options);
  await new Promise<void>((resolve, reject) => {
    socket.once(tls ? "secureConnect" : "connect", () => {
      // Deno fails with EPERM on an empty write over TLS (2.9.6)
      client.send(...[opening, ...more].filter(({ length }) => length > 0)); // before SETTINGS of lb.ts can come, and be answered
      resolve();
    });
    socket.once("error", reject);
  });
  return client;
}

// ─── The server ───

export type H2Script = (stream: Stream, server: H2Server) => unknown;

export interface H2Server {
  port: number;
  address: string;
  url: string; // h2c://
  /** Called with each request, as soon as its head is there. */
  script: H2Script;
  /** For the next connections. */
  options: EndOptions;
  ends: ServerEnd[];
  /** All requests, in the order of their heads. */
  requests: Stream[];
  close(): Promise<void>;
}

export class ServerEnd extends End {
  readonly server: H2Server;
  private last = 0;
  constructor(socket: Socket, server: H2Server) {
    super(socket, server.options);
    this.server = server;
    const read = this.listen();
    let rest: Buffer | undefined = Buffer.alloc(0);
    socket.on("data", (bytes: Buffer) => {
      if (rest === undefined) return read(bytes);
      rest = Buffer.concat([rest, bytes]);
      if (rest.length < PREFACE.length) return;
      if (!rest.subarray(0, PREFACE.length).equals(PREFACE)) {
        this.faults.push("no preface");
        return socket.destroy();
      }
      bytes = rest.subarray(PREFACE.length);
      rest = undefined;
      read(bytes);
    });
    this.send(server.options.greeting ?? settings());
  }
  protected streamOf(id: number): Stream | undefined {
    if (id > this.last && id % 2) {
      this.last = id;
      this.streams.set(id, new Stream(this, id));
    }
    return this.streams.get(id);
  }
  protected onBlock(stream: Stream, fields: Field[], ends: boolean): void {
    const names = fields.map(([name]) => name).filter((name) => name.startsWith(":")).sort().join();
    if (stream.head.length) {
      assert.ok(ends && !names, "trailers that do not end, or with a pseudo-field");
      stream.trailers = fields;
      return;
    }
    assert.equal(names, ":authority,:method,:path,:scheme", "the pseudo-fields of a request");
    assert.equal(valueOf(fields, "host"), "", ":authority stands for host");
    stream.head = fields;
    this.server.requests.push(stream);
    Promise.resolve().then(() => this.server.script(stream, this.server)).catch(() => this.socket.destroy());
  }
  protected override hasNoBody(): boolean {
    return false;
  }
  /** Ends the connection, and resolves when lb.ts has ended it, too. */
  async close(): Promise<void> {
    if (this.socket.destroyed) return;
    const closed = new Promise((resolve) => this.socket.once("close", resolve));
    this.socket.end();
    const late = setTimeout(() => this.socket.destroy(), 1_000);
    await closed;
    clearTimeout(late);
  }
}

/** Answers with what it has seen of the request, as the echo of HTTP/1.1 does. */
export const echoH2: H2Script = async (stream) => {
  await stream.done();
  if (!stream.ended) return;
  const { head, body } = stream, method = valueOf(head, ":method");
  const sha256 = createHash("sha256").update(body).digest("hex");
  const seen: Echo = { method, url: valueOf(head, ":path"), rawHeaders: head, bodyLength: body.length, sha256 };
  const text = JSON.stringify(seen);
  const fields: Field[] = [["content-type", "application/json"], ["content-length", `${Buffer.byteLength(text)}`]];
  await stream.respond(200, fields, method === "HEAD" ? "" : text);
};

export async function h2Server(
  script: H2Script = echoH2,
  options: EndOptions = {},
  tls?: TlsOptions,
  port = 0,
): Promise<H2Server> {
  const open = new Set<Socket>();
  const accept = (socket: Socket) => {
    open.add(socket);
    socket.on("error", () => {}).on("close", () => open.delete(socket));
    server.ends.push(new ServerEnd(socket, server));
  };
  const tcp = tls ? createTlsServer({ ALPNProtocols: ["h2"], ...tls }, accept) : createServer(accept);
  const server: H2Server = {
    ...{ port: 0, address: "", url: "", script, options, ends: [], requests: [] },
    close: () => endServer(tcp, open),
  };
  server.port = await listenLocally(tcp, port);
  server.address = `127.0.0.1:${server.port}`;
  server.url = tls ? `https://${server.address}` : `h2c://${server.address}`;
  return server;
}
