// A DNS server for tests: UDP, one question a message, and the records that the test has set.

import { Buffer } from "node:buffer";
import { createSocket } from "node:dgram";
import type { AddressInfo } from "node:net";

const TYPES = { A: 1, AAAA: 28, SRV: 33 };
type Type = keyof typeof TYPES;
/** `10.0.0.1`, `::1`, or of SRV `priority weight port target`; or what becomes of the question. */
type Records = string[] | "NXDOMAIN" | "SERVFAIL" | "silence";

export interface DnsServer {
  address: string; // host:port
  records: Map<string, Records>; // by `A name`
  ttl: number; // seconds, of all records
  asked: string[]; // such as `A name`
  set(type: Type, name: string, records: Records): void;
  close(): Promise<void>;
}

const word = (value: number, bytes: number) => Buffer.from(value.toString(16).padStart(2 * bytes, "0"), "hex");
const labels = (name: string) =>
  Buffer.concat([...name.split(".").map((one) => Buffer.from([one.length, ...Buffer.from(one)])), Buffer.from([0])]);

function ipv6(address: string): Buffer {
  const [left = "", right = ""] = address.split("::").map((half) =>
    half.split(":").filter(Boolean).map((group) => group.padStart(4, "0")).join("")
  );
  return Buffer.from(left + "0".repeat(32 - left.length - right.length) + right, "hex");
}

function dataOf(type: Type, record: string): Buffer {
  if (type === "A") return Buffer.from(record.split(".").map(Number));
  if (type === "AAAA") return ipv6(record);
  const [priority, weight, port, target] = record.split(" ");
  return Buffer.concat([...[priority, weight, port].map((number) => word(Number(number), 2)), labels(target!)]);
}

export async function dnsServer(): Promise<DnsServer> {
  const socket = createSocket("udp4");
  const server: DnsServer = {
    ...{ address: "", records: new Map(), ttl: 5, asked: [] },
    set: (type, name, records) => server.records.set(`${type} ${name}`, records),
    close: () => new Promise((resolve) => socket.close(() => resolve())),
  };
  socket.on("message", (message, { port, address }) => {
    const end = message.indexOf(0, 12), names: string[] = [];
    for (let at = 12; at < end; at += 1 + message[at]!) {
      names.push(message.toString("latin1", at + 1, at + 1 + message[at]!));
    }
    const code = message.readUInt16BE(end + 1), name = names.join(".").toLowerCase();
    const type = (Object.keys(TYPES) as Type[]).find((one) => TYPES[one] === code), question = `${type} ${name}`;
    server.asked.push(question);
    const isThere = [...server.records.keys()].some((key) => key.endsWith(` ${name}`));
    const found = server.records.get(question) ?? (isThere ? [] : "NXDOMAIN");
    if (found === "silence" || !type) return;
    const records = typeof found === "string" ? [] : found, status = { NXDOMAIN: 3, SERVFAIL: 2 }[String(found)] ?? 0;
    const head = [message.subarray(0, 2), word(0x8580 + status, 2), word(1, 2), word(records.length, 2), word(0, 4)];
    const answers = records.map((record) => {
      const data = dataOf(type, record);
      return Buffer.concat([
        word(0xc00c, 2),
        word(code, 2),
        word(1, 2),
        word(server.ttl, 4),
        word(data.length, 2),
        data,
      ]);
    });
    socket.send(Buffer.concat([...head, message.subarray(12, end + 5), ...answers]), port, address);
  });
  await new Promise<void>((resolve) => socket.bind(0, "127.0.0.1", resolve));
  server.address = `127.0.0.1:${(socket.address() as AddressInfo).port}`;
  return server;
}
