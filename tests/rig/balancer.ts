// A balancer without sockets, in the process of the test: time stands still, every client is the same one, and what the
// balancer logs and reports is kept. A test says what becomes of an attempt, by its own `fetch` or `send`.

import assert from "node:assert/strict";
import { accessLine, ConfigError, createLoadBalancer, type FetchAttempt, parseConfig, WireError } from "../../lb.ts";
import type { Client, Own } from "./types.ts";

/** A request: `from`: what differs in its client; `raw`: its URL as it was on the wire, where Request would tidy it up. */
export interface Ask extends RequestInit {
  headers?: Record<string, string>;
  from?: Partial<Client>;
  raw?: string;
}

/** A balancer with a config in YAML. `own`: effects in place of these, and strategies by name. */
export function balancerFor(yaml: string, own: Own = {}) {
  const clock = { now: 0 }, lines: string[] = [], reports: string[] = [];
  const lb = createLoadBalancer(parseConfig(yaml, { strategies: own.strategies ?? {} }), {
    now: () => clock.now,
    date: () => new Date(clock.now),
    random: () => 0.5,
    client: ({ headers }, env) => ({
      ...{ address: "192.0.2.9", scheme: "http", headers: [...headers].flat() },
      ...env as Partial<Client>,
    }),
    accessLog: (record, format) => lines.push(accessLine(record, format)),
    report: (level, text) => reports.push(`${level} ${text}`),
    ...own,
  });
  const service = (name = "default") => lb.balancer.table.services.get(name)!;
  const send = (url = "http://h.test/", { from = {}, raw, ...init }: Ask = {}): Promise<Response> => {
    const request = new Request(url, { ...init, headers: { host: new URL(url).host, ...init.headers } });
    if (raw) Object.defineProperty(request, "url", { value: raw });
    return Promise.resolve(lb.fetch(request, from));
  };
  return { lb, clock, lines, reports, service, send };
}

/** The attempt's answer, without a body. */
export function answerTo(attempt: FetchAttempt, status = 200, headers?: HeadersInit): Promise<Response> {
  attempt.ended(status, 0);
  return Promise.resolve(new Response(null, { status, ...headers && { headers } }));
}
export const refusal = (): Promise<never> => Promise.reject(new WireError("connect", false, "refused"));

/** The mistakes of a config in YAML, as `path: message`. */
export function mistakesOf(yaml: string): string[] {
  try {
    parseConfig(yaml);
  } catch (error) {
    assert.ok(error instanceof ConfigError, String(error));
    return error.mistakes.map(({ path, message }) => `${path}: ${message}`);
  }
  return [];
}
