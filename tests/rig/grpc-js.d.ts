// What the tests use of @grpc/grpc-js. Its own types bring @types/node, which would take the place of Deno's types of Node
// in every file that is checked together with them.

import type { Buffer } from "node:buffer";

export enum status {
  OK,
  CANCELLED,
  UNKNOWN,
  INVALID_ARGUMENT,
  DEADLINE_EXCEEDED,
  NOT_FOUND,
  ALREADY_EXISTS,
  PERMISSION_DENIED,
  RESOURCE_EXHAUSTED,
  FAILED_PRECONDITION,
  ABORTED,
  OUT_OF_RANGE,
  UNIMPLEMENTED,
  INTERNAL,
  UNAVAILABLE,
  DATA_LOSS,
  UNAUTHENTICATED,
}
export interface StatusObject {
  code: status;
  details: string;
  metadata: Metadata;
}
export type MetadataValue = string | Buffer;
export class Metadata {
  add(name: string, value: MetadataValue): void;
  set(name: string, value: MetadataValue): void;
  get(name: string): MetadataValue[];
}
type Codec = (bytes: Buffer) => Buffer;

// ─── Clients ───

/** A call of any kind: write and end are there where the client streams, data comes where the server does. */
export interface ClientCall {
  cancel(): void;
  write(message: Buffer): boolean;
  end(): void;
  on(event: "metadata", then: (head: Metadata) => void): this;
  on(event: "data", then: (message: Buffer) => void): this;
  on(event: "status", then: (given: StatusObject) => void): this;
  on(event: "error", then: (error: Error) => void): this;
}
export interface CallOptions {
  deadline?: number;
}
export type ChannelOptions = Record<string, string>;
export class ChannelCredentials {
  private constructor();
}
export const credentials: {
  createInsecure(): ChannelCredentials;
  createSsl(ca: Buffer): ChannelCredentials;
};
type Start<Message extends unknown[], Then extends unknown[]> = (
  ...given: [path: string, Codec, Codec, ...Message, Metadata, CallOptions, ...Then]
) => ClientCall;
type Then = (error: Error | null, reply?: Buffer) => void;
export class Client {
  constructor(target: string, credentials: ChannelCredentials, options: ChannelOptions);
  makeUnaryRequest: Start<[message: Buffer], [Then]>;
  makeClientStreamRequest: Start<[], [Then]>;
  makeServerStreamRequest: Start<[message: Buffer], []>;
  makeBidiStreamRequest: Start<[], []>;
  close(): void;
}

// ─── Servers ───

/** A call of any kind: a request is there where the client does not stream, write and end are where the server does. */
export interface ServerCall {
  readonly metadata: Metadata;
  readonly request: Buffer;
  sendMetadata(head: Metadata): void;
  resume(): this;
  write(message: Buffer): boolean;
  end(): void;
  on(event: "data", then: (message: Buffer) => void): this;
  on(event: "end" | "cancelled", then: () => void): this;
  emit(event: "error", failure: Partial<StatusObject>): boolean;
}
/** Answers a call in which the server does not stream. */
export type Reply = (failure: Partial<StatusObject> | null, message?: Buffer, trailers?: Metadata) => void;
export interface Method {
  path: string;
  requestStream: boolean;
  responseStream: boolean;
  requestSerialize: Codec;
  requestDeserialize: Codec;
  responseSerialize: Codec;
  responseDeserialize: Codec;
}
export class ServerCredentials {
  private constructor();
  static createInsecure(): ServerCredentials;
}
export class Server {
  addService(methods: Record<string, Method>, does: Record<string, (call: ServerCall, reply: Reply) => void>): void;
  bindAsync(address: string, credentials: ServerCredentials, then: (error: Error | null, port: number) => void): void;
  forceShutdown(): void;
}
