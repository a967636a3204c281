// Types of lb.ts that tests name and users do not: each as a part of a type that lb.ts exports.

import type { createLoadBalancer, Effects, Fleet, LoadBalancer, Strategy } from "../../lb.ts";

export type Candidates = Parameters<Strategy>[0];
export type PickInput = Parameters<Strategy>[1];
export type Strategies = Record<string, Strategy>;
/** Effects of a test in place of the runtime's, and strategies by name. */
export type Own = NonNullable<Parameters<typeof createLoadBalancer>[1]>;
export type Client = ReturnType<Effects["client"]>;

export type Attempt = Parameters<Effects["send"]>[0];
export type Body = Attempt["body"];
export type Fields = Attempt["trailers"];
export type HttpRequest = Parameters<LoadBalancer["handle"]>[0];
export type HttpResponse = Parameters<Attempt["onHead"]>[0];

export type Engine = ConstructorParameters<typeof Fleet>[1];
export type EngineEvent = Parameters<Parameters<Engine["watch"]>[1]>[0][number];
export type EngineValue = Pick<Awaited<ReturnType<Engine["swap"]>>, "value" | "revision">;
