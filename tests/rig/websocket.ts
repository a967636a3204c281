// WebSockets for tests, over node:net: a client and a server that can also do what a good one would not, and that see
// every frame as it was on the wire.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { createHash, randomBytes } from "node:crypto";
import { connect, createServer, type Socket } from "node:net";
import { endServer, listenLocally, until } from "./rig.ts";

export interface Frame {
  fin: boolean;
  rsv: number;
  opcode: number;
  masked: boolean;
  payload: Buffer;
}

export const [TEXT, BINARY, CLOSE, PING, PONG] = [1, 2, 8, 9, 10] as const;

export function encode(opcode: number, payload: string | Buffer, { fin = true, rsv = 0, mask = false } = {}): Buffer {
  const bytes = Buffer.from(payload as string), { length } = bytes;
  const head = Buffer.alloc(length < 126 ? 2 : length < 65_536 ? 4 : 10);
  head[0] = (fin ? 0x80 : 0) | rsv << 4 | opcode;
  head[1] = (mask ? 0x80 : 0) | (length < 126 ? length : length < 65_536 ? 126 : 127);
  if (head.length === 4) head.writeUInt16BE(length, 2);
  if (head.length === 10) head.writeBigUInt64BE(BigInt(length), 2);
  if (!mask) return Buffer.concat([head, bytes]);
  const key = randomBytes(4);
  return Buffer.concat([head, key, bytes.map((byte, i) => byte ^ key[i & 3]!)]);
}

/** The payload of a close frame. */
export function closing(code: number, reason = ""): Buffer {
  const payload = Buffer.from(`  ${reason}`);
  payload.writeUInt16BE(code);
  return payload;
}

/** Reads frames out of bytes in whatever portions they come. */
export function decoder(onFrame: (frame: Frame) => void): (bytes: Buffer) => void {
  let parts: Buffer[] = [], size = 0, wanted = 2;
  return (more) => {
    parts.push(more);
    size += more.length;
    while (size >= wanted) {
      const bytes = Buffer.concat(parts);
      parts = [bytes];
      const [first, second] = [bytes[0]!, bytes[1]!], short = second & 0x7f, masked = second > 0x7f;
      const start = 2 + (short === 127 ? 8 : short === 126 ? 2 : 0) + (masked ? 4 : 0);
      if (size < (wanted = start)) break;
      const length = short === 127 ? Number(bytes.readBigUInt64BE(2)) : short === 126 ? bytes.readUInt16BE(2) : short;
      if (size < (wanted = start + length)) break;
      const key = bytes.subarray(start - 4, start), sent = bytes.subarray(start, wanted);
      const payload = masked ? sent.map((byte, i) => byte ^ key[i & 3]!) as Buffer : sent;
      parts = [bytes.subarray(wanted)];
      [size, wanted] = [size - wanted, 2];
      onFrame({ fin: first > 0x7f, rsv: first >> 4 & 7, opcode: first & 15, masked, payload });
    }
  };
}

/** One end of a WebSocket. */
export interface Peer {
  socket: Socket;
  /** Everything that has come. */
  frames: Frame[];
  /** Called instead of keeping frames, where it is set. */
  onFrame: ((frame: Frame) => void) | undefined;
  /** Payload bytes that have come. */
  bytes: number;
  /** The connection has ended, whoever ended it. */
  over: boolean;
  send(opcode: number, payload: string | Buffer, how?: { fin?: boolean; rsv?: number }): boolean;
  close(code?: number, reason?: string): void;
  /** The frame that comes at this place. */
  frame(index: number): Promise<Frame>;
  /** Code and reason of the close frame; 1005 where it has none, 1006 where the connection ends without one. */
  closed(): Promise<[code: number, reason: string]>;
}

function newPeer(socket: Socket, mask: boolean): Peer & { feed(bytes: Buffer): void } {
  const peer = {
    socket,
    frames: [] as Frame[],
    onFrame: undefined as Peer["onFrame"],
    bytes: 0,
    over: false,
    feed: decoder((frame) => {
      peer.bytes += frame.payload.length;
      if (peer.onFrame) peer.onFrame(frame);
      else peer.frames.push(frame);
    }),
    send: (opcode: number, payload: string | Buffer, how = {}) =>
      socket.write(encode(opcode, payload, { mask, ...how })),
    close: (code?: number, reason = "") => void peer.send(CLOSE, code ? closing(code, reason) : ""),
    frame: (index: number) => until(`frame ${index} comes`, () => peer.frames[index]),
    async closed(): Promise<[number, string]> {
      const close = () => peer.frames.find(({ opcode }) => opcode === CLOSE);
      await until("the WebSocket ends", () => close() ?? peer.over, 15_000);
      const payload = close()?.payload;
      return payload ? payload.length ? [payload.readUInt16BE(), payload.toString("utf8", 2)] : [1005, ""] : [1006, ""];
    },
  };
  const over = () => void (peer.over = true);
  socket.on("end", over);
  socket.on("close", over);
  socket.on("error", over);
  return peer;
}

const accept = (key: string) =>
  createHash("sha1").update(`${key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11`).digest("base64");

export const handshake = (path: string, headers = "", key = randomBytes(16).toString("base64")) =>
  `GET ${path} HTTP/1.1\r\nHost: a.test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: ${key}\r\n` +
  `Sec-WebSocket-Version: 13\r\n${headers}\r\n`;

/** Opens a WebSocket; fails where the answer is no 101. */
export async function openWebSocket(
  port: number,
  path = "/",
  headers = "",
  socket: Socket = connect(port, "127.0.0.1"),
): Promise<Peer & { head: string }> {
  const peer = newPeer(socket, true);
  const key = randomBytes(16).toString("base64");
  let got = Buffer.alloc(0), end = -1;
  socket.on("data", (bytes: Buffer) => {
    if (end >= 0) return peer.feed(bytes);
    got = Buffer.concat([got, bytes]);
    end = got.indexOf("\r\n\r\n");
    if (end >= 0) peer.feed(got.subarray(end + 4));
  });
  socket.write(handshake(path, headers, key));
  await until("the handshake is answered", () => end >= 0 || peer.over);
  const head = got.toString("latin1", 0, end + 2);
  assert.match(head, /^HTTP\/1\.1 101 /, got.toString("latin1"));
  assert.ok(head.toLowerCase().includes(`sec-websocket-accept: ${accept(key).toLowerCase()}`), head);
  return Object.assign(peer, { head });
}

export interface WebSocketServer {
  port: number;
  address: string;
  /** The heads of the handshakes that have come, and what stands at their ends. */
  heads: string[];
  peers: Peer[];
  /** Called with each WebSocket that has been opened. */
  on: (peer: Peer) => void;
  /** Further headers of the 101, or the whole head (without its last line) that is sent in its place. */
  answer: (head: string, accept: string) => string;
  close(): Promise<void>;
}

/** A server of WebSockets; without `on` it takes what comes. */
export async function webSocketServer(on: (peer: Peer) => void = () => {}): Promise<WebSocketServer> {
  const tcp = createServer((socket) => {
    const peer = newPeer(socket, false);
    let got: Buffer | undefined = Buffer.alloc(0);
    socket.on("data", (bytes: Buffer) => {
      if (got === undefined) return peer.feed(bytes);
      got = Buffer.concat([got, bytes]);
      const end = got.indexOf("\r\n\r\n");
      if (end < 0) return;
      const head = got.toString("latin1", 0, end + 2), rest = got.subarray(end + 4);
      got = undefined;
      const proof = accept(/^sec-websocket-key: (.*)\r$/im.exec(head)?.[1] ?? "");
      const extra = server.answer(head, proof);
      server.heads.push(head);
      server.peers.push(peer);
      if (extra.startsWith("HTTP/")) return void socket.write(`${extra}\r\n`, "latin1");
      socket.write(
        `HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n` +
          `Sec-WebSocket-Accept: ${proof}\r\n${extra}\r\n`,
        "latin1",
      );
      server.on(peer);
      peer.feed(rest);
    });
  });
  const server: WebSocketServer = {
    port: 0,
    address: "",
    heads: [],
    peers: [],
    on,
    answer: () => "",
    close: () => endServer(tcp, server.peers.map(({ socket }) => socket)),
  };
  server.port = await listenLocally(tcp);
  server.address = `127.0.0.1:${server.port}`;
  return server;
}

const CODES = (code: number) =>
  code >= 1000 && code < 1015 && ![1004, 1005, 1006].includes(code) || code > 2999 && code < 5000;

const utf8 = (bytes: Buffer) => new TextDecoder("utf-8", { fatal: true }).decode(bytes);

/** What a strict server does: it sends back every message, answers pings, and ends what is against the RFC. */
export function echoStrictly(peer: Peer): void {
  let parts: Buffer[] = [], kind = 0;
  const end = (code: number) => {
    if (code === 1005) peer.close();
    else peer.close(code);
    peer.onFrame = () => {};
    peer.socket.end();
  };
  const take = ({ fin, rsv, opcode, masked, payload }: Frame): void => {
    if (rsv || !masked || ![0, TEXT, BINARY, CLOSE, PING, PONG].includes(opcode)) return end(1002);
    if (opcode >= CLOSE && (!fin || payload.length > 125)) return end(1002);
    if (opcode === PING) return void peer.send(PONG, payload);
    if (opcode === PONG) return;
    if (opcode === CLOSE) {
      if (payload.length === 0) return end(1005);
      if (payload.length === 1 || !CODES(payload.readUInt16BE())) return end(1002);
      utf8(payload.subarray(2));
      return end(payload.readUInt16BE());
    }
    if ((opcode === 0) !== (kind !== 0)) return end(1002);
    kind ||= opcode;
    parts.push(payload);
    if (!fin) return;
    const message = Buffer.concat(parts);
    if (kind === TEXT) utf8(message);
    peer.send(kind, message);
    [parts, kind] = [[], 0];
  };
  peer.onFrame = (frame) => {
    try {
      take(frame);
    } catch { // not UTF-8
      end(1007);
    }
  };
}
