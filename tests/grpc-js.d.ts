// What the tests use of @grpc/grpc-js 1.14. Its own types bring @types/node, which would take the place of Deno's in every
// file that is checked with them.

import type { Buffer } from "node:buffer";

export type MetadataValue = string | Buffer;
export class Metadata {
  add(name: string, value: MetadataValue): void;
  set(name: string, value: MetadataValue): void;
  get(name: string): MetadataValue[];
}

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

// ─── Clients ───

/** What every call of a client emits; `data` comes of those in which the server streams. */
export interface ClientCall {
  cancel(): void;
  on(event: "metadata", then: (head: Metadata) => void): this;
  on(event: "status", then: (given: StatusObject) => void): this;
  on(event: "data", then: (message: Buffer) => void): this;
  on(event: "error", then: (error: Error) => void): this;
}
export interface ClientWriter extends ClientCall {
  write(message: Buffer): boolean;
  end(): void;
}
export interface CallOptions {
  deadline?: number;
}
export type ChannelOptions = Record<string, string | number>;
type Codec = (bytes: Buffer) => Buffer;
type Then = (error: Error | null, reply?: Buffer) => void;
type Call<Message extends unknown[], Tail extends unknown[], Result> = (
  path: string,
  serialize: Codec,
  deserialize: Codec,
  ...rest: [...Message, metadata: Metadata, options: CallOptions, ...Tail]
) => Result;
export class ChannelCredentials {
  private constructor();
}
export const credentials: {
  createInsecure(): ChannelCredentials;
  createSsl(ca: Buffer): ChannelCredentials;
};
export class Client {
  constructor(target: string, credentials: ChannelCredentials, options?: ChannelOptions);
  makeUnaryRequest: Call<[message: Buffer], [then: Then], ClientCall>;
  makeClientStreamRequest: Call<[], [then: Then], ClientWriter>;
  makeServerStreamRequest: Call<[message: Buffer], [], ClientCall>;
  makeBidiStreamRequest: Call<[], [], ClientWriter>;
  close(): void;
}

// ─── Servers ───

export interface ServerCall {
  readonly metadata: Metadata;
  sendMetadata(head: Metadata): void;
  on(event: "cancelled" | "end", then: () => void): this;
}
export interface ServerUnaryCall extends ServerCall {
  readonly request: Buffer;
}
export interface ServerReader extends ServerCall {
  resume(): this;
  on(event: "cancelled" | "end", then: () => void): this;
  on(event: "data", then: (message: Buffer) => void): this;
}
export interface ServerWriter extends ServerCall {
  write(message: Buffer): boolean;
  end(): void;
  emit(event: "error", failure: Partial<StatusObject>): boolean;
}
export interface ServerStreamingCall extends ServerUnaryCall, ServerWriter {
  on(event: "cancelled" | "end", then: () => void): this;
}
export interface ServerDuplexCall extends ServerReader, ServerWriter {
  on(event: "cancelled" | "end", then: () => void): this;
  on(event: "data", then: (message: Buffer) => void): this;
}
export type Reply = (failure: Partial<StatusObject> | null, message?: Buffer, trailers?: Metadata) => void;

export interface MethodDefinition {
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
  addService<Name extends string>(
    methods: Record<Name, MethodDefinition>,
    // deno-lint-ignore no-explicit-any
    handlers: Record<Name, (call: any, reply: any) => void>,
  ): void;
  bindAsync(address: string, credentials: ServerCredentials, then: (error: Error | null, port: number) => void): void;
  forceShutdown(): void;
}

export type handleUnaryCall<_Request, _Reply> = (call: ServerUnaryCall, reply: Reply) => void;
export type handleClientStreamingCall<_Request, _Reply> = (call: ServerReader, reply: Reply) => void;
export type handleServerStreamingCall<_Request, _Reply> = (call: ServerStreamingCall) => void;
export type handleBidiStreamingCall<_Request, _Reply> = (call: ServerDuplexCall) => void;
