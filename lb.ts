/**
 * lb.ts: a load balancer for HTTP in one file, the same on Deno, Bun, Node and at the edge.
 *
 *     deno run -A lb.ts [routes.yml]      bun lb.ts      node lb.ts      wrangler deploy
 *
 * As a library: `createLoadBalancer(parseConfig(text))` is a Hono app; serve it, mount it, wrap it.
 *
 * The life of a request is one function, `balance`:
 *
 *     gate -> matchRoute -> pickServer -> forward -> settle -> (retry, minus those tried) -> response
 *
 * Each section uses only the sections above it:
 *
 *     1. Words       what a value may be
 *     2. Services    what a service may say
 *     3. Schema      what routes.yml may say
 *     4. Reading     from a text to plain values, or to every mistake in it
 *     5. Config      from plain values to a Config
 *     6. State       what the balancer remembers
 *     7. Exchange    one request from the gate to its last byte
 *     8. Gate        what may come in
 *     9. Routing     which route a request belongs to
 *    10. Strategies  which server takes a request
 *    11. Health      which servers may be asked
 *    12. Probes      asking servers how they are
 *    13. Messages    HTTP/1.1 as bytes
 *    14. Wire        one request and its answer over one connection
 *    15. Pool        connections that wait for the next request
 *    16. Headers     what passes to a server and back
 *    17. Forward     one attempt at one server
 *    18. Upgrade     one attempt, both ways
 *    19. Answers     what the balancer says by itself
 *    20. Limits      who has to wait, or to come back later
 *    21. Sticky      which server a client had before
 *    22. Log         what is written down
 *    23. Printing    how the log gets out
 *    24. Metrics     what has been counted
 *    25. Explain     which server was taken, and why not the others
 *    26. Retry       whether a request may be tried again, and at whom
 *    27. Pick        who takes the next attempt
 *    28. Settle      what an attempt has come to, and a request
 *    29. Hedge       attempts beside the first
 *    30. Balance     the request path
 *    31. Tls         what is shown to those who connect over TLS
 *    32. Tcp         connections that are not HTTP
 *    33. Doors       what every runtime does in its own way
 *    34. Node        over node:http and node:http2
 *    35. Bun         over Bun.serve
 *    36. Deno        over Deno.serve
 *    37. Edge        where the platform listens
 *    38. Runtimes    where it runs
 *    39. Assemble    one balancer from one config
 *    40. Save        the file after a change
 *    41. Views       what there is to see
 *    42. Changes     operating it
 *    43. Operations  the API
 *    44. Docs        the description of the API
 *    45. Dashboard   the page for people
 *    46. Admin       who may do that, and through which door
 *    47. Call        what the command line and the environment ask for
 *    48. Listeners   where clients come in
 *    49. Workers     many cores
 *    50. Main        as a program
 *
 * @module
 */

import { createHash, createHmac, createPrivateKey, randomBytes, randomFillSync, X509Certificate } from "node:crypto";
import {
  chmodSync,
  chownSync,
  closeSync,
  existsSync,
  fsync,
  openSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmSync,
  type Stats,
  statSync,
  write as writeTo,
  writeFileSync,
  writeSync,
} from "node:fs";
import type { IncomingMessage, RequestListener, ServerResponse } from "node:http";
import type { ServerHttp2Session } from "node:http2";
import { type AddressInfo, connect as netConnect, createServer, isIP, type Socket } from "node:net";
import process from "node:process";
import {
  connect as tlsConnect,
  createSecureContext,
  createServer as createTlsServer,
  type SecureContext,
  type SecureContextOptions,
  type Server as TlsServer,
  type TlsOptions,
  type TLSSocket,
} from "node:tls";
import { availableParallelism } from "node:os";
import { isDeepStrictEqual, parseArgs, promisify } from "node:util";
import { isMainThread, parentPort, Worker, workerData } from "node:worker_threads";
import { toJsonSchema } from "@valibot/to-json-schema";
import { closest, distance } from "fastest-levenshtein";
import { type Context, Hono, type MiddlewareHandler } from "hono";
import { bodyLimit } from "hono/body-limit";
import { compress } from "hono/compress";
import { cors } from "hono/cors";
import { html, raw } from "hono/html";
import { methodNotAllowed } from "hono/method-not-allowed";
import { NONCE, secureHeaders } from "hono/secure-headers";
import { streamSSE } from "hono/streaming";
import { parse as parseCookie } from "hono/utils/cookie";
import ipaddr from "ipaddr.js";
import { RE2JS, type RE2JSSyntaxException } from "re2js";
import * as v from "valibot";
import {
  isAlias,
  isMap,
  isScalar,
  isSeq,
  LineCounter,
  type Node,
  parseDocument,
  type Scalar,
  stringify,
  type YAMLMap,
  type YAMLSeq,
} from "yaml";

// ---------------------------------------------------------------------------------------------------------------------
// 1. Words: what a value may be. valibot schemas with our messages, and the texts that stand for times, sizes and the like.
// ---------------------------------------------------------------------------------------------------------------------

// A message that begins with $ begins with the value: `"5 sec" is not a duration` (see `report`).
type Schema = v.GenericSchema;
type Out<S extends Schema> = v.InferOutput<S>;
type Fields<E extends v.ObjectEntries> = Out<v.ObjectSchema<E, undefined>>;
type Raw = Record<string, unknown>;
const isRecord = (value: unknown): value is Raw => typeof value === "object" && value !== null && !Array.isArray(value);
const record = (value: unknown): Raw => isRecord(value) ? value : {};
const isTrue = (value: unknown) => /^true$/i.test(String(value)); // see `spelled`

/** valibot takes a list for a map with the keys "0", "1", ...; we do not. */
const notAList = <S extends Schema>(schema: S, message: string): S => ({
  ...schema,
  "~run": (dataset: v.UnknownDataset, config: v.Config<v.BaseIssue<unknown>>) =>
    (Array.isArray(dataset.value) ? v.string(message) : schema)["~run"](dataset, config),
});
/** A map with known keys. Unlike `v.strictObject`, which stops at the first one, it reports every unknown key. */
const map = <const E extends v.ObjectEntries>(entries: E) => {
  const message = `$ is not a map with keys such as ${Object.keys(entries).slice(0, 3).join(", ")}`;
  const schema = v.objectWithRest(entries, v.never(Object.keys(entries).join(" ")), message);
  return notAList(schema as unknown as v.ObjectSchema<E, string>, message);
};
/** A map with exactly one of these keys. */
const choice = <const E extends v.ObjectEntries>(entries: E) => {
  const message = `needs exactly one of ${Object.keys(entries).join(", ")}`;
  return v.pipe(map(entries), v.check((chosen) => Object.keys(chosen).length === 1, message));
};
/** A key that may be left out; without a fallback it then stays absent. */
const key = <S extends Schema, D extends v.InferInput<S> | undefined = undefined>(schema: S, about: string, or?: D) =>
  v.pipe(v.optional(schema, or as never), v.description(about)) as unknown as v.OptionalSchema<S, D>;
/** A key that must be there. The union keeps its description in front of the transformations, where JSON Schema ends. */
const need = <S extends Schema>(schema: S, about: string) => v.pipe(v.union([schema]), v.description(about));
const opt = v.optional; // for keys that their map's own description explains

// valibot drops the keys __proto__, constructor and prototype: they are written with a NUL in front until it is done.
const veiled = (name: string) => /^(__proto__|constructor|prototype)$/.test(name) ? `\0${name}` : name;
const plain = (name: string) => name.replace(/^\0/, "");
/** A map with free keys becomes a `Map`, in which no name is special. */
const dict = <I, O>(name: v.GenericSchema<unknown, string>, value: v.GenericSchema<I, O>) =>
  v.pipe(
    notAList(v.record(v.string(), value, "$ is not a map"), "$ is not a map"),
    v.rawCheck<Record<string, O>>(({ dataset: { value: input }, addIssue }) => { // also where a value is wrong
      const seen = new Set<string>();
      for (const [key, value] of Object.entries(record(input))) {
        const { issues, output } = v.safeParse(name, plain(key));
        const message = issues ? issues[0].message : seen.has(output) && "$ stands twice";
        if (message) addIssue({ message, path: [{ type: "object", origin: "key", input: record(input), key, value }] });
        else seen.add(output as string);
      }
    }),
    v.transform((input) => new Map(Object.entries(input).map(([key, value]) => [v.parse(name, plain(key)), value]))),
  );
const either = <const O extends Schema[]>(what: string, ...options: O) => v.union(options, `$ is not ${what}`);
const oneOf = <const N extends (string | number)[]>(...names: N) =>
  v.picklist(names, `$ is not one of ${names.filter((name) => name !== "").join(", ")}`);
/** One, or a list of them; always a list afterwards. */
const many = <S extends Schema>(item: S, what: string, least = 0) => {
  const message = `$ is not ${what}, or a list of them`;
  const one = v.pipe(item, v.transform((one: Out<S>) => [one]));
  return v.pipe(v.union([one, v.array(item, message)], message), v.check((list) => list.length >= least, message));
};
/** The word off or none, which means `meant`, or something else. */
const or = <T, S extends Schema>(off: "off" | "none", meant: T, schema: S, what = "a map") =>
  v.pipe(
    either(`${off} or ${what}`, v.literal(off), schema),
    v.transform((value): T | Out<S> => value === off ? meant : value as Out<S>),
  );
type Reader<T> = (text: string, ...groups: string[]) => T | Error | false;
/** A word or number. `read` makes a value of the pattern's groups; false refuses it, and so does an Error, which says why. */
const word = <T = string>(what: string, pattern: RegExp, read: Reader<T> = (text) => text as T) =>
  v.pipe(
    either(what, v.string(), v.number()),
    v.rawTransform<string | number, T>(({ dataset, addIssue, NEVER }) => {
      const found = pattern.exec(String(dataset.value)) as [string] | null;
      const value: T | Error | false = found !== null && read(...found);
      if (value !== false && !(value instanceof Error)) return value;
      addIssue({ message: `$ is not ${what}${value instanceof Error ? `: ${value.message}` : ""}` });
      return NEVER;
    }),
  );
/** Takes 3.0, 1e3 and True for what they are, where `scalar` has left them as they are written. */
const spelled = <S extends Schema>(schema: S): S => ({
  ...schema,
  "~run": (dataset: v.UnknownDataset, config: v.Config<v.BaseIssue<unknown>>) => {
    const { value } = dataset, odd = typeof value === "string" && ODD.test(value);
    return schema["~run"](odd ? { ...dataset, value: JSON.parse(lower(value)) } : dataset, config);
  },
});
const ODD = /^(?:True|TRUE|False|FALSE|(?:0|[1-9]\d*)(?:\.\d*0|(?:\.\d+)?[eE]\d+))$/;
const numeral = (message: string) => spelled(v.number(message));
const whole = (least: number, most: number) => {
  const message = `$ is not a whole number from ${least} to ${most}`;
  return v.pipe(numeral(message), v.integer(message), v.minValue(least, message), v.maxValue(most, message));
};

// Words. Times become milliseconds, percentages fractions, sizes bytes, and none becomes Infinity.
const UNITS: Record<string, number> = { ms: 1, s: 1e3, m: 60e3, h: 3600e3, d: 86400e3 };
const duration = (least: number) =>
  word("a duration such as 500ms, 2s or 1m", /^(?:0|(\d+(?:\.\d+)?)(ms|s|m|h|d))$/, (_, count = "0", unit = "s") => {
    const ms = Math.round(Number(count) * UNITS[unit]!);
    return ms >= least && ms <= UNITS.d! ? ms : new Error(`${least ? "more than 0 and " : ""}at most 1d`);
  });
/** Text such as 500ms, 2s or 1m to milliseconds. */
export const Duration = duration(1);
const Percent = word("a percentage from 0% to 100%", /^(?:100|\d?\d(?:\.\d+)?)%$/, (text) => parseFloat(text) / 100);
const SIZE = /^(?:none|(\d+(?:\.\d+)?) ?(?:([kmgt]?)(i?)b)?)$/i;
const Size = word("a size such as 512kB, 10MB, 1MiB, a number of bytes, or none", SIZE, (_, count, prefix = "", i) => {
  const bytes = Math.floor(Number(count) * (i ? 1024 : 1000) ** " kmgt".indexOf(lower(prefix) || " "));
  return count === undefined ? Infinity : Number.isSafeInteger(bytes) && bytes;
});
const Limit = or("none", Infinity, whole(1, 1e6), "a whole number from 1 to 1000000");
const Bool = spelled(v.boolean("$ is not true or false")), True = spelled(v.literal(true));
const Text = v.pipe(either("text", v.string(), v.number(), v.boolean()), v.transform(String));
// A line break would begin another header.
const Printable = v.pipe(Text, v.regex(/^[\t\x20-\x7e\x80-\xff]*$/, "$ cannot stand in a header"), v.trim());
const Texts = many(Printable, "a text");
const lower = (text: string) => text.toLowerCase();
const token = (not: string) => new RegExp(`^(?!(?:${not})$)[!#$%&'*+.^_\`|~0-9a-z-]+$`, "i"); // RFC 9110 section 5.6.2
const upper = (text: string) => text.toUpperCase();
const Method = word("a method that can be forwarded, such as GET", token("trace|connect"), upper);
const Methods = many(Method, "a method");
const TOKEN = token("");
const HeaderName = word("a header name", TOKEN, lower);
// Where a message ends and the next one begins is ours to say.
const FRAMING = "connection|content-length|host|keep-alive|proxy-connection|te|trailer|transfer-encoding|upgrade";
const RuleName = word("a header name that a rule may change", token(FRAMING), lower);
const RuleNames = many(RuleName, "a header name"), RuleValues = dict(RuleName, Printable);
const isIPv4 = ipaddr.IPv4.isValidFourPartDecimal;
const isIPv6 = (text: string) => text.includes(":") && !text.includes("%") && ipaddr.IPv6.isValid(text);
const isAddress = (text: string) => isIPv4(text) || isIPv6(text);
const isName = (text: string) =>
  text.length < 254 && /^(?!-)[a-z0-9_-]+(\.[a-z0-9_-]+)*$/i.test(text) && !/(^|\.)\d+$/.test(text);
const isHost = (text: string) => /^\[.*\]$/.test(text) ? isIPv6(text.slice(1, -1)) : isName(text) || isIPv4(text);
const NETWORK = /^([^/]+)(?:\/(\d{1,3}))?$/;
const Network = word("an address or a network such as 10.0.0.0/8", NETWORK, (text, address, bits = "0") => {
  return isAddress(address) && Number(bits) <= (isIPv4(address) ? 32 : 128) && text;
});
const Networks = many(Network, "an address or a network");
const AUTHORITY = /^(\[[^\]]*\]|[^:[\]]*)(?::(\d{1,5}))?$/;
const Host = word("a host such as www.example.com", AUTHORITY, (text, host) => (!text || isHost(host)) && text);
const HostPattern = word('a host such as www.example.com or "*.example.com"', AUTHORITY, (_, host) => {
  const name = lower(host).replace(/\.$/, "");
  return isHost(name.replace(/^\*\./, "")) && !/^\*\.[[\d.]+$/.test(name) && name;
});
const LISTEN = /^(?:(.*):)?(\d{1,5})$/;
const Listen = word("a port, or an address such as 127.0.0.1:8080 or [::]:8080", LISTEN, (_, host = "", port) => {
  return Number(port) < 65536 && (!host || isHost(host)) && { host, port: Number(port) };
});
/** A port alone is one of this machine's: only who says so opens it to others. */
const Local = v.pipe(Listen, v.transform(({ host, port }) => ({ host: host || "127.0.0.1", port })));
const isLoopback = (host: string) =>
  host === "localhost" || host === "[::1]" || isIPv4(host) && host.startsWith("127.");
const BEARER = /^[\w.~+/-]{8,}=*$/; // RFC 6750 section 2.1
const Bearer = word("a token of 8 or more letters, digits and -._~+/", BEARER);
const PATH = /^\/[!-"$->@-~]*$/; // ASCII without space, ? and #
const Path = word("a path such as /v1 (it begins with / and has no query)", PATH, (path) => {
  return /\/\.\.?(?:\/|$)/.test(path) ? new Error("no request has . or .. in its path") : path;
});
const Prefix = v.pipe(Path, v.transform((path) => path.replace(/\/+$/, "")));
/** RE2 syntax: linear time by construction, so that no pattern can be made slow by a request. */
const Regex = word("a regular expression (RE2)", /^[^]*$/, (text) => {
  try {
    return RE2JS.compile(text), text;
  } catch (error) { // its message has the pattern, which may be a secret
    return new Error((error as RE2JSSyntaxException).error);
  }
});

// ---------------------------------------------------------------------------------------------------------------------
// 2. Services: what a service may say. One schema gives types, defaults, bounds, messages and the JSON Schema.
// ---------------------------------------------------------------------------------------------------------------------

// A service.
const ORIGIN = /^(?:(https?):\/\/)?(\[[^\]]*\]|[^:[\]/?#@]*)(?::(\d{1,5}))?\/?$/i;
const SERVER = "a server such as localhost:8081 or http://localhost (no user, no path)";
const Url = word(SERVER, ORIGIN, (_, scheme = "", host, port) => {
  const number = Number(port ?? { http: 80, https: 443 }[lower(scheme)]), name = `${lower(host)}:${number}`;
  const fits = isHost(host) && number > 0 && number < 65536 && URL.canParse(`http://${name}`);
  return fits && { name, url: new URL(`${scheme || "http"}://${name}`).origin };
});
const also = {
  weight: opt(whole(0, 256), 1),
  host: opt(Host, ""),
  backup: opt(Bool, false),
  max: opt(Limit, "none"),
  state: opt(oneOf("ready", "drain", "maint"), "ready"),
};
const ServerMap = v.pipe(map({ url: Url, ...also }), v.transform(({ url, ...rest }) => ({ ...url, ...rest })));
const OnlyUrl = v.pipe(Url, v.transform((url) => ({ ...url, ...v.parse(v.object(also), {}) })));
const Server = either("a server such as localhost:8081 or {url: ..., weight: 2}", OnlyUrl, ServerMap);
/** A server that is listed again weighs more. Where http and https share a host and port, the URLs are the names. */
const Servers = v.pipe(
  many(Server, "a server"),
  v.rawTransform<ServerConfig[], ServerConfig[]>(({ dataset: { value: listed }, addIssue }) => {
    const named = Map.groupBy(listed, (server) => server.name);
    return [...Map.groupBy(listed, (server) => server.url)].map(([url, same]) => {
      const weight = same.reduce((sum, server) => sum + server.weight, 0), first = { ...same[0]!, weight };
      const differ = same.some((server) => JSON.stringify({ ...server, weight }) !== JSON.stringify(first));
      if (differ) addIssue({ message: `${url} stands twice with different host, backup, max or state` });
      return named.get(first.name)!.length > same.length ? { ...first, name: url } : first;
    });
  }),
  v.check((servers) => servers.some((server) => server.weight > 0), "needs a server with a weight above 0"),
);
// deno-fmt-ignore
/** The built-in strategies that are named by a word. */
export const STRATEGIES = ["round-robin", "first", "random", "two-choices", "least-connections", "least-response-time", "peak-ewma", "ip-hash"];
type Hashed = "header" | "cookie" | "query" | "path" | "client";
const named = { header: opt(HeaderName), cookie: opt(Text), query: opt(Text) };
const Hash = choice({ ...named, path: opt(True), client: opt(True) });
const AnyName = v.union([v.picklist(STRATEGIES), v.string()]);
/** Any name, for users may bring strategies of their own: `check` knows which there are. */
const Strategy = v.pipe(
  either("a strategy such as random or {hash: {header: name}}", AnyName, map({ hash: Hash })),
  v.transform((strategy): { name: string; by: Hashed | "none"; key: string } => {
    if (typeof strategy === "string") return { name: strategy, by: "none", key: "" };
    const [[by, key]] = Object.entries(strategy.hash) as [[Hashed, string | true]];
    return { name: "hash", by, key: key === true ? "" : key };
  }),
);
const Statuses = word("a status such as 200, or 200-399", /^([1-5]\d\d)(?:-([1-5]\d\d))?$/, (_, from, to = from) => {
  return from <= to && [Number(from), Number(to)] as [number, number];
});
const Probe = map({
  path: key(either("a path", v.literal(""), Path), "a request to it; without it a TCP connect", ""),
  interval: key(Duration, "time between two probes", "10s"),
  timeout: key(Duration, "a probe that takes longer has failed", "2s"),
  expect: key(many(Statuses, "a status", 1), "200, 200-399, or a list", [200]),
  body: key(Text, "what the body has to contain", ""),
  rise: key(whole(1, 100), "successes in a row until it may be asked again", 2),
  fall: key(whole(1, 100), "failures in a row until it may not be asked", 3),
  method: key(oneOf("GET", "HEAD", "OPTIONS", "POST"), "to ask with", "GET"),
  headers: key(dict(HeaderName, Printable), "of the request", {}),
});
const Probing = v.pipe(Probe, v.transform((one) => ({ kind: one.path ? "http" as const : "tcp" as const, ...one })));
const Health = or("off", { kind: "off" as const, ...v.parse(Probe, {}) }, Probing);
const TIMES = "a number from 1.1 to 1000", notTimes = `$ is not ${TIMES}`;
const Times = v.pipe(numeral(notTimes), v.minValue(1.1, notTimes), v.maxValue(1000, notTimes));
const EjectMap = map({
  failures: key(whole(1, 1e6), "failed requests in a row", 5),
  for: key(Duration, "how long; with every further time in a row that much longer", "30s"),
  slow: key(or("off", Infinity, Times, TIMES), "latency, in medians of the pool; or off", 3),
  at_most: key(Percent, "of the servers at a time", "50%"),
});
const Eject = or("off", { failures: Infinity, for: 0, slow: Infinity, at_most: 0 }, EjectMap);
const QueueMap = map({ size: opt(whole(1, 100_000), 100), timeout: opt(Duration, "5s") });
const Quantile = word("a share such as p95, from p50 to p99", /^p([5-9]\d)$/, (_, percent) => Number(percent) / 100);
const AUTO = 0; // max_in_flight: what each server can bear is found out
const InFlight = v.pipe(
  either("auto, none or a whole number from 1 to 1000000", v.literal("auto"), Limit),
  v.transform((limit) => limit === "auto" ? AUTO : limit),
);
const Hedge = or("off", 0, Quantile, "a share such as p95, from p50 to p99");
const Queue = or("off", { size: 0, timeout: 0 }, QueueMap);
const Timeouts = map({
  connect: opt(Duration, "3s"),
  response: opt(Duration, "60s"),
  idle: opt(Duration, "5m"),
  request: opt(or("none", Infinity, Duration, "a duration such as 30s"), "none"),
});
const CorsMap = map({
  origin: key(Texts, "origins that may read the answers", ["*"]),
  allow_methods: key(Methods, "methods they may use", ["GET", "HEAD", "PUT", "POST", "DELETE", "PATCH"]),
  allow_headers: key(Texts, "headers they may send; none: those they ask for", []),
  expose_headers: key(Texts, "headers they may read", []),
  max_age: key(duration(0), "how long a browser may remember this", 0),
  credentials: key(Bool, "with cookies", false),
});
const credible = (cors: Out<typeof CorsMap>) => !cors.credentials || !cors.origin.includes("*");
const SafeCors = v.pipe(CorsMap, v.check(credible, "credentials need origins by name, not *"));
const Cors = or("off", { ...v.parse(CorsMap, {}), origin: [] as string[] }, SafeCors);
const files = { ca: opt(Text, ""), cert: opt(Text, ""), key: opt(Text, "") };
const TlsMap = map({ ...files, servername: opt(Text, ""), insecure: opt(Bool, false) });
const Tls = v.pipe(TlsMap, v.check((tls) => !tls.cert === !tls.key, "needs cert and key together"));
const RetryOn = either("connect, reset, or 400 to 599", v.picklist(["connect", "reset"]), whole(400, 599));
const HostHeader = either("keep, server or a host", v.picklist(["keep", "server"]), Host);
const CookieName = word("a cookie name", TOKEN);
const Secret = v.pipe(Text, v.nonEmpty("the secret is empty"));
const StickyMap = map({ cookie: opt(CookieName, "lb"), secret: opt(Secret), max_age: opt(duration(0), 0) });
const Stuck = v.pipe(StickyMap, v.transform((one) => ({ secret: "", ...one })));
const Sticky = or("off", { cookie: "", secret: "", max_age: 0 }, Stuck);
const ServiceName = word("a name", /^\P{Cc}{1,200}$/u);
/** What a route may also say, and then wins over its service. */
const policy = {
  retries: key(whole(0, 10), "further attempts, always at another server while one is left", 1),
  retry_on: key(v.array(RetryOn, "$ is not a list"), "what is tried again", ["connect", "reset", 502, 503, 504]),
  timeouts: key(
    Timeouts,
    "until connected, until the headers, between pieces of a body, for all of a request's",
    v.getDefaults(Timeouts),
  ),
  host_header: key(HostHeader, "keep (the client's), server (the server's own), or a literal", "keep"),
  compress: key(Bool, "gzip for text when the client accepts it and the server did not", false),
  cors: key(Cors, "off, or who may read the answers in a browser", "off"),
};
const settings = {
  strategy: key(Strategy, "which server takes a request; hash: the same key, the same server", "round-robin"),
  health: key(Health, "off, or how servers are probed", v.getDefaults(Probe)),
  eject: key(Eject, "off, or whom requests take out: who fails, or falls behind the others", v.getDefaults(EjectMap)),
  slow_start: key(duration(0), "from 10 % of its weight to all of it, for a server that comes back or is new", "0s"),
  panic: key(Percent, "fewer servers than this may be asked: ask them all rather than none", "50%"),
  retry_budget: key(Percent, "retries at most, of the requests; at least 3 a second", "20%"),
  hedge: key(Hedge, "off, or p95: who waits longer than so many percent do is tried at another server too", "off"),
  max_in_flight: key(InFlight, "per server; auto: as many as leave its latency as it is", "none"),
  queue: key(Queue, "off, or how many requests wait where all servers are full, and how long", v.getDefaults(QueueMap)),
  fallback: key(
    or("none", "", ServiceName, "a name"),
    "the service that is asked when no server of this one may be",
    "none",
  ),
  sticky: key(
    Sticky,
    "off, or the cookie that keeps a client on its server; what signs it; how long it is kept",
    "off",
  ),
  tls: key(Tls, "PEM files; the name to verify; insecure: any will do", v.getDefaults(TlsMap)),
  ...policy,
};

// ---------------------------------------------------------------------------------------------------------------------
// 3. Schema: what routes.yml may say: routes, listeners, and the file as a whole.
// ---------------------------------------------------------------------------------------------------------------------

// A route.
const Test = v.pipe(
  either("a value, {regex: ...} or {present: true}", Text, choice({ regex: opt(Regex), present: opt(Bool) })),
  v.transform((test): Test => {
    if (typeof test === "string") return { kind: "is", value: test };
    const { regex, present } = test;
    return present === undefined ? { kind: "regex", source: regex! } : { kind: "present", present };
  }),
);
const tests = (name: v.GenericSchema<unknown, string>) =>
  v.pipe(dict(name, Test), v.transform((all) => [...all].map(([name, test]): Condition => ({ name, ...test }))));
const PathMatch = v.pipe(
  either("a path, {exact: ...} or {regex: ...}", Prefix, choice({ exact: opt(Path), regex: opt(Regex) })),
  v.transform((path): PathRule => {
    if (typeof path === "string") return { kind: "prefix", path };
    return path.exact === undefined ? { kind: "regex", source: path.regex! } : { kind: "exact", path: path.exact };
  }),
);
const Rewrite = v.pipe(
  map({ path: opt(Path), whole: opt(Path), host: opt(Host, "") }),
  v.check(({ path, whole }) => path === undefined || whole === undefined, "path and whole exclude each other"),
  v.transform(({ path, whole, host }): { kind: "none" | "replace" | "whole"; path: string; host: string } => {
    if (whole !== undefined) return { kind: "whole", path: whole, host };
    return { kind: path === undefined ? "none" : "replace", path: path ?? "", host };
  }),
);
const HeaderRules = map({ set: opt(RuleValues, {}), add: opt(RuleValues, {}), remove: opt(RuleNames, []) });
const QueryRules = map({ set: opt(dict(Text, Text), {}), remove: opt(many(Text, "a name"), []) });
const RequestRules = map({ headers: opt(HeaderRules, {}), query: opt(QueryRules, {}) });
const ResponseRules = map({ headers: opt(HeaderRules, {}) });
const To = word("a URL or path to go to", /^(?:(?:https?:\/\/|\/)[!-~]+|\/|)$/i);
const Place = word("a path such as /v1", /^(?:\/[!-~]*|)$/);
const parts = { scheme: opt(oneOf("http", "https", ""), ""), host: opt(Host, ""), port: opt(whole(0, 65535), 0) };
const Redirect = v.pipe(
  map({ to: opt(To, ""), ...parts, path: opt(Place, ""), status: opt(oneOf(301, 302, 303, 307, 308), 302) }),
  v.check((one) => !one.to !== !(one.scheme || one.host || one.port || one.path), "needs either to or its parts"),
  v.transform((one) => ({ kind: "redirect" as const, ...one })),
);
const Respond = v.pipe(
  map({ status: opt(whole(200, 599), 200), body: opt(Text, ""), headers: opt(RuleValues, {}) }),
  v.check((one) => !one.body || ![204, 205, 304].includes(one.status), "an answer with this status has no body"),
  v.transform((one) => ({ kind: "respond" as const, ...one })),
);
const RateKey = either("ip or {header: name}", v.literal("ip"), map({ header: HeaderName }));
const RateMap = v.pipe(
  map({ requests: whole(1, 1e6), per: opt(Duration, "1s"), by: opt(RateKey, "ip"), burst: opt(whole(1, 1e6)) }),
  v.transform(({ by, burst, ...rest }) => ({
    ...rest,
    burst: burst ?? rest.requests,
    by: by === "ip" ? "" : by.header,
  })),
);
const Rate = or("off", undefined, RateMap);
const SHARE = "$ is not a number from 0 to 100";
const Share = v.pipe(numeral(SHARE), v.minValue(0, SHARE), v.maxValue(100, SHARE));
const Mirror = or("off", { service: "", percent: 0 }, map({ service: ServiceName, percent: opt(Share, 100) }));
const place = {
  host: key(many(HostPattern, "a host"), '"*.example.com" is any labels in front, not example.com itself', []),
  path: key(many(PathMatch, "a path"), "prefix by whole segments, {exact: /v1}, {regex: ...}, or a list", []),
  strip: key(Bool, "true: the server sees the rest of the path", false),
};
const conditions = {
  scheme: key(oneOf("http", "https", ""), "that the client speaks; asked before all routes that leave it open", ""),
  methods: key(Methods, "any when empty", []),
  headers: key(tests(HeaderName), "all must hold: the value, {regex: ...} or {present: true}", {}),
  query: key(tests(Text), "all must hold: the value, {regex: ...} or {present: true}", {}),
};
const actions = {
  service: key(ServiceName, "one of services"),
  servers: key(Servers, "a service of its own; any key of one may stand beside it"),
  split: key(dict(ServiceName, whole(0, 1e6)), "services and their weights"),
  redirect: key(Redirect, "to, literally, or scheme, host, port and path (what is not named stays); status"),
  respond: key(Respond, "an answer of its own: status, body and headers"),
};
const changes = {
  name: key(word("a name", /^\P{Cc}{0,200}$/u), "for logs and --explain; else its host and path", ""),
  rewrite: key(Rewrite, "path for what matched, or whole for all of it; host", {}),
  request: key(RequestRules, "headers and query: set replaces, add adds, remove removes", {}),
  response: key(ResponseRules, "headers: set replaces, add adds, remove removes", {}),
  mirror: key(Mirror, "off, or the service that gets a copy of so many percent of the requests", "off"),
  allow: key(Networks, "only these clients", []),
  deny: key(Networks, "not these clients; wins over allow", []),
  rate: key(Rate, "off, or requests per time, by ip or {header: name}; burst: how many at once", "off"),
  body_limit: key(Size, "of a request's body", "none"),
};
const target = { ...actions, ...changes, ...settings }, route = { ...place, ...conditions, ...target };
const HostRoute = map({ ...route, host: need(many(HostPattern, "a host", 1), "a host or a list") });
const PathRoute = map({ ...route, path: need(many(PathMatch, "a path", 1), "this path and all below it") });
const Service = map({
  servers: need(Servers, "host:port, URL, or {url, weight, host, backup, max, state}"),
  ...settings,
});
const AdminMap = map({
  listen: key(Local, "where operators connect; a port alone is on 127.0.0.1", "127.0.0.1:9090"),
  token: key(Bearer, "what a request has to show; required beyond loopback"),
  read_token: key(Bearer, "another one, which may only look"),
});
const Admin = v.pipe(
  AdminMap,
  v.check(({ listen, token }) => !!token || isLoopback(listen.host), "needs a token, as it listens beyond loopback"),
  v.check(({ token, read_token }) => !read_token || !!token, "needs a token beside read_token"),
  v.check(({ token, read_token }) => !token || token !== read_token, "token and read_token are the same"),
);
const LogFormat = oneOf("combined", "json", "off");
const LogMap = map({ format: opt(LogFormat, "combined"), sample: opt(Percent, "100%") });
const Log = v.pipe(
  either("combined, json or off, or a map with format and sample", LogFormat, LogMap),
  v.transform((log): Out<typeof LogMap> => typeof log === "string" ? { format: log, sample: 1 } : log),
);
// Where clients connect.
const PemFile = v.pipe(Text, v.nonEmpty("the name of the file is empty"));
const Certificate = map({ cert: need(PemFile, "PEM: it, and those that sign it"), key: need(PemFile, "PEM") });
const FrontMap = map({
  address: need(Listen, "a port or an address"),
  tls: key(
    many(Certificate, "a map with cert and key"),
    "certificates; by the name that is asked for, else the first",
    [],
  ),
  client_ca: key(Text, "PEM: clients have to show a certificate that one of these has signed", ""),
});
const Front = v.pipe(
  either("a port or an address, or a map with address and tls", Listen, FrontMap),
  v.transform((at) =>
    "port" in at ? { ...at, tls: [], client_ca: "" } : { ...at.address, tls: at.tls, client_ca: at.client_ca }
  ),
  v.check((at) => !at.client_ca || at.tls.length > 0, "client_ca needs tls"),
);
// Connections that are not HTTP.
const TcpTimeouts = map({ connect: opt(Duration, "3s"), idle: opt(Duration, "5m") });
const tcpSettings = {
  strategy: settings.strategy,
  health: settings.health,
  eject: settings.eject,
  panic: settings.panic,
  max_in_flight: key(Limit, "per server", "none"),
  retries: key(whole(0, 10), "further servers, where one cannot be reached", 1),
  timeouts: key(TcpTimeouts, "until connected, and while nothing passes", v.getDefaults(TcpTimeouts)),
};
const Tcp = map({
  listen: need(many(Front, "a port or an address", 1), "where clients connect; over TLS, as {address, tls}"),
  name: key(changes.name, "of its service; else tcp: and its port", ""),
  servers: need(Servers, "host:port, or {url, weight, backup, max, state}"),
  proxy_protocol: key(Bool, "true: servers are told the client's address (PROXY protocol, version 2)", false),
  allow: changes.allow,
  deny: changes.deny,
  ...tcpSettings,
});
const Limits = map({
  requests: key(Limit, "in flight, of all clients: 503 beyond", "none"),
  per_client: key(Limit, "in flight, of one address (an IPv6 /64): 429 beyond", "none"),
  connections: key(Limit, "open, of one thread; of HTTP on Node alone: 503 beyond", "none"),
  client_connections: key(Limit, "of those, of one address (an IPv6 /64): 429 beyond", "none"),
  header: key(Duration, "until the head of a request is there; on Node alone: 408 beyond", "10s"),
  keep_alive: key(Duration, "until a connection without a request is closed; on Node alone", "75s"),
});
const RoutesFile = map({
  listen: key(many(Front, "a port or an address"), "where clients connect; over TLS, as {address, tls}", 8080),
  admin: key(Admin, "the API and the pages for operators: listen, token, read_token (may only look)"),
  trust: key(Networks, "peers whose X-Forwarded-* and Forwarded are believed", []),
  limits: key(Limits, "how much at once, against abuse", {}),
  log: key(Log, "combined, json or off; or {format, sample}: a share of what succeeds", "combined"),
  name_routes: key(Bool, "true: every service answers under /<its name>/..., prefix stripped", false),
  defaults: key(map(settings), "any key of a service, for all services", {}),
  services: key(dict(ServiceName, Service), "servers that answer the same", {}),
  hosts: key(v.array(HostRoute, "$ is not a list of hosts"), "one host to some servers", []),
  paths: key(v.array(PathRoute, "$ is not a list of paths"), "one path to some servers", []),
  routes: key(v.array(map(route), "$ is not a list of routes"), "the general form", []),
  default: key(map(target), "when nothing matches; without it 404"),
  tcp: key(v.array(Tcp, "$ is not a list of services"), "connections that are not HTTP, to some servers", []),
});

/** "", [] and Infinity are what was left out. */
export type ServerConfig = Out<typeof Server>;
/** A service, as it is parsed. */
export type ServiceConfig = Out<typeof Service>;
/** What a route may say about its services: retries, time limits and the like. */
export type Policy = Fields<typeof policy>;
type Test = { kind: "is"; value: string } | { kind: "regex"; source: string } | { kind: "present"; present: boolean };
/** What a header or a query parameter has to be. */
export type Condition = { name: string } & Test;
/** A path, as a route names it; prefixes without a slash at their end. */
export type PathRule = { kind: "prefix" | "exact"; path: string } | { kind: "regex"; source: string };
/** A service that a route leads to, its share, the policy that holds on that way, and who is asked in its place. */
export type Target = { service: string; weight: number; policy: Policy; fallback: Target | undefined };
/** What a route does with a request. */
export type Action = { kind: "forward"; targets: Target[] } | Out<typeof Redirect> | Out<typeof Respond>;
/** How often a client may ask: by its address, or by a header where `by` names one. */
export type Rate = Out<typeof RateMap>;
/** Where clients connect: without `tls` over plain TCP. */
export type FrontConfig = Out<typeof Front>;
type Carried = Fields<typeof conditions> & Fields<typeof changes>;
type Made = { hosts: string[]; paths: PathRule[]; action: Action; policy: Policy; fallback: boolean };
/** A route in the general form, as it is parsed. */
export type RouteConfig = Carried & Made;
type Top = Pick<Out<typeof RoutesFile>, "listen" | "admin" | "trust" | "limits" | "log" | "name_routes">;
/** Listeners whose connections go to one service as they are. */
export type TcpConfig = Pick<Out<typeof Tcp>, "listen" | "name" | "proxy_protocol" | "allow" | "deny">;
/**
 * A whole file, as it is parsed: nothing is optional any more. `source` is the file with all defaults written in, `text`
 * and `file` the file itself, and `places` say where in it each service stands.
 */
export type Config = Top & {
  services: Map<string, ServiceConfig>;
  routes: RouteConfig[];
  tcp: TcpConfig[];
  source: Raw;
  text: string;
  file: string;
  places: Map<string, Keys>;
};

// ---------------------------------------------------------------------------------------------------------------------
// 4. Reading: from a text to plain values, or to every mistake in it with its place.
// ---------------------------------------------------------------------------------------------------------------------

/** One thing that is wrong with a file, and where. */
export type Mistake = { line: number; column: number; path: string; message: string };
/** Everything that is wrong with a file, one mistake a line: `routes.yml:12:7: listen: 99999 is not a port`. */
export class ConfigError extends Error {
  override name = "ConfigError";
  mistakes: Mistake[];
  constructor(file: string, mistakes: Mistake[]) {
    super(mistakes.map((m) => `${file}:${m.line}:${m.column}: ${m.path && `${m.path}: `}${m.message}`).join("\n"));
    this.mistakes = mistakes;
  }
}
type Env = Record<string, string | undefined>;
type Keys = (string | number)[];
type Spot = { key: number; value: number };
type Say = (path: Keys, message: string, at?: "key" | number) => unknown;
const MOST = { bytes: 2 ** 20, values: 100_000, depth: 32, mistakes: 50 };
const SECRET = /token|secret|password|authorization|cookie|api[-_]?key/i;

const dotted = (path: Keys) =>
  path.reduce<string>((text, key) => {
    if (typeof key === "number") return `${text}[${key}]`;
    const name = plain(key);
    return /^[\w-]+$/.test(name) ? text + (text && ".") + name : `${text}[${JSON.stringify(name)}]`;
  }, "");
/** A value as a message shows it: short, on one line, and without the password of a URL. */
const quote = (value: unknown) => {
  if (value === null || value === undefined) return "an empty value";
  if (typeof value === "object") return Array.isArray(value) ? "a list" : "a map";
  if (typeof value !== "string") return String(value);
  const text = value.replace(/^(\w+:\/\/)?.*@/s, "$1***@");
  return JSON.stringify(text.length > 58 ? `${text.slice(0, 56)}...` : text);
};
const guess = (wrong: string, known: string[]) => {
  const near = known.length ? closest(wrong, known) : "";
  return near && distance(wrong, near) <= Math.ceil(wrong.length / 3) ? `; did you mean "${near}"?` : "";
};

// Reading: YAML nodes become plain values, and every path gets its place in the file.
/** In `{ port: ${PORT} }` the inner braces would be YAML's: they change places with two characters of no meaning. */
const wrapped = (text: string) => text.replace(/\$\{(\w+)\}/g, "$\ue000$1\ue001");
const unwrapped = (text: string) => text.replace(/\$\ue000(\w+)\ue001/g, "${$1}");
/** `${NAME}` is the variable, `$${` is `${`. */
const expanded = (text: string, env: Env, complain: (message: string) => void) =>
  text.replace(/\$\$\{|\$\{([^}]*)\}?/g, (whole, name?: string) => {
    if (name === undefined) return "${";
    const value = Object.hasOwn(env, name) ? env[name] : undefined;
    if (!/^[a-z_]\w*$/i.test(name)) {
      complain(`${quote(whole)} is not a variable such as \${NAME}; \${ itself is written $\${`);
    } else if (value === undefined) complain(`the environment variable ${name} is not set`);
    return value ?? "";
  });

/** Only now, after YAML has been read, are variables put in: none can bring in a key or a list. */
function scalar(
  { value, source = "", type }: Scalar,
  env: Env | undefined,
  complain: (message: string) => void,
): unknown {
  // 1.10 stays text, as a header or a version would be another one as the number 1.1; see `spelled`
  if (typeof value === "number" || typeof value === "boolean") return String(value) === source ? value : source;
  if (typeof value !== "string") return value;
  const text = unwrapped(value), out = env ? expanded(text, env, complain) : text;
  const meant = type === "PLAIN" && out !== text && /^(true|false|(0|[1-9]\d{0,14})(\.\d{0,9}[1-9])?)$/.test(out);
  return meant ? JSON.parse(out) : out;
}
/** Without `env` variables stay as they are written. */
function nodeReader(env: Env | undefined, places: Map<string, Spot>, say: Say) {
  const anchors = new Map<string, unknown>(), meant = new Map<unknown, unknown>(); // anchored nodes, and what aliases repeat
  let count = 0;
  return function read(node: unknown, path: Keys, at: Spot): unknown {
    const { anchor, range } = (node ?? {}) as { anchor?: string; range?: number[] };
    if (anchor && !meant.has(node)) {
      meant.set(node, node);
      anchors.set(anchor, node);
    }
    const start = range?.[0] ?? at.value, here = { key: start, value: start };
    places.set(JSON.stringify(path), { key: at.key, value: start });
    if (++count > MOST.values) throw new RangeError(`more than ${MOST.values} values`); // an alias bomb, say
    if (path.length > MOST.depth) return void say(path, `nested deeper than ${MOST.depth} levels`);
    if (isSeq(node)) return node.items.map((item, i) => read(item, [...path, i], here));
    if (isScalar(node)) return scalar(node, env, (message) => say(path, message));
    if (isAlias(node)) {
      if (!meant.has(node)) meant.set(node, anchors.get(node.source));
      if (meant.get(node)) return read(meant.get(node), path, { key: at.key, value: start });
      return void say(path, `*${node.source} names nothing above; text that begins with * stands in quotes`);
    }
    if (!isMap<Node>(node)) return null;
    const out: Raw = {};
    for (const { key, value } of node.items) {
      const offset = key.range?.[0] ?? start;
      if (!isScalar(key)) {
        say(path, "a key is a single word", offset);
        continue;
      }
      const name = veiled(unwrapped(key.source ?? String(key.value)));
      if (Object.hasOwn(out, name)) say([...path, name], "stands twice", offset);
      out[name] = read(value, [...path, name], { key: offset, value: offset });
    }
    return out;
  };
}
function readYaml(
  text: string,
  env: Env | undefined,
  lines: LineCounter,
  places: Map<string, Spot>,
  say: Say,
): unknown {
  if (text.length > MOST.bytes) return void say([], "the file is larger than 1 MiB");
  try {
    const doc = parseDocument(wrapped(text), { lineCounter: lines, prettyErrors: false, uniqueKeys: false });
    for (const { message, pos, code } of [...doc.errors, ...doc.warnings]) {
      if (message.includes("call stack")) throw new RangeError(message); // the parser's own
      say([], code === "MULTIPLE_DOCS" ? "the file holds more than one document" : unwrapped(message), pos[0]);
    }
    if (doc.errors.length) return undefined;
    return nodeReader(env, places, say)(doc.contents, [], { key: 0, value: 0 }) ?? void say([], "the file is empty");
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    say([], /call stack/.test(error.message) ? `nested deeper than ${MOST.depth} levels` : error.message);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. Config: from plain values to a Config. What the schema says is checked, and what holds between two places of the file.
// ---------------------------------------------------------------------------------------------------------------------

// Checking: what the schema says, and what holds between two places of the file.
type Issue = v.BaseIssue<unknown>;
/** A union lists what every option had against the value. The deepest were written by someone who meant that option. */
function flatten(issue: Issue, above: Keys = []): { issue: Issue; path: Keys }[] {
  const path = [...above, ...(issue.path ?? []).map((item) => item.key as string | number)];
  const below = issue.issues ?? [];
  const deeper = below.filter((sub) => sub.path?.length);
  const meant = deeper.length ? deeper : below.filter((sub) => sub.kind !== "schema" || flatten(sub)[0]!.issue !== sub);
  return meant.length ? meant.flatMap((sub) => flatten(sub, path)) : [{ issue, path }];
}
/** Keys that somebody may look for beside those of tcp. */
const FOR_REQUESTS = new Set(Object.keys({ ...route, ...Timeouts.entries }));

function report({ issue, path }: { issue: Issue; path: Keys }, say: Say) {
  const name = plain(String(path.at(-1))), ofKey = issue.path?.at(-1)?.origin === "key";
  if (issue.type === "never") {
    const known = issue.message.split(" ");
    if (path[0] === "tcp" && FOR_REQUESTS.has(name)) {
      return say(path, "is for requests: tcp passes bytes as they are, and knows of none", "key");
    }
    return say(path, `unknown key${guess(name, known) || `; allowed: ${known.join(", ")}`}`, "key");
  }
  if (ofKey && issue.kind === "schema") return say(path.slice(0, -1), `${name} is missing`);
  const secret = path.some((key) => SECRET.test(String(key)));
  const shown = ofKey ? quote(name) : secret ? "***" : quote(issue.input);
  say(path, issue.message.replace(/^\$/, () => shown), ofKey ? "key" : undefined);
}

/** The maps that stand in these lists and maps of the file, with their paths. */
const mapsIn = (file: Raw, ...keys: string[]) =>
  keys.flatMap((key) => {
    const all = file[key], pairs = Array.isArray(all) ? [...all.entries()] : Object.entries(record(all));
    return pairs.filter(([, one]) => isRecord(one)).map(([at, one]): [Keys, Raw] => [[key, at], one as Raw]);
  });
const topMap = (file: Raw, key: string): [Keys, Raw][] => isRecord(file[key]) ? [[[key], file[key]]] : [];
const entriesOf = (file: Raw) => [...mapsIn(file, "hosts", "paths", "routes"), ...topMap(file, "default")];
const SEGMENT = /^(?!\.\.?$)[\w.~-]+$/;
/** What `name_routes` adds: a route for every service whose name can be a segment of a path. */
const nameRoutes = ({ name_routes, services }: Raw): Raw[] =>
  Object.keys(isTrue(name_routes) ? record(services) : {}).map(plain)
    .filter((service) => SEGMENT.test(service)).map((service) => ({ path: `/${service}`, service, strip: true }));

/** How many groups a path's regular expression has; what is no expression is rewritten literally. */
function groupsOf(path: unknown): number {
  const { regex } = record(path);
  try {
    return typeof regex === "string" ? RE2JS.compile(regex).groupCount() : Infinity;
  } catch { // said elsewhere
    return Infinity;
  }
}

/** Whoever falls back to others must not come back to himself. */
function checkFallbacks(file: Raw, say: Say) {
  const services = mapsIn(file, "services"), usual = record(file.defaults).fallback ?? "none";
  const said = services.map(([[, name], own]): [string, string] => [plain(`${name}`), `${own.fallback ?? usual}`]);
  const next = new Map(said.filter(([, fallback]) => fallback !== "none"));
  services.forEach(([path, own], i) => {
    const name = said[i]![0], way = [name];
    for (let one = next.get(name); one !== undefined && !way.includes(one, 1); one = next.get(one)) way.push(one);
    if (way.length < 2 || way.at(-1) !== name) return;
    say(own.fallback ? [...path, "fallback"] : ["defaults", "fallback"], `falls back to itself: ${way.join(" -> ")}`);
  });
}

function check(file: Raw, more: string[], say: Say) {
  const services = Object.keys(record(file.services)).map(plain), strategies = [...STRATEGIES, ...more];
  const known = (path: Keys, name: unknown, what: string, names: string[], at?: "key") => {
    if (typeof name !== "string" && typeof name !== "number" || names.includes(`${name}`)) return;
    const there = names.join(", ").slice(0, 200) || "there is none";
    say(path, `${quote(name)} is not a ${what} (${there})${guess(`${name}`, names)}`, at);
  };
  const entries = entriesOf(file);
  for (const [path, own] of [...topMap(file, "defaults"), ...mapsIn(file, "services", "tcp"), ...entries]) {
    known([...path, "strategy"], own.strategy, "strategy", strategies);
    if (own.fallback !== "none") known([...path, "fallback"], own.fallback, "service", services);
  }
  checkFallbacks(file, say);
  const names = Object.keys(actions), taken = new Set<string>();
  for (const [path, entry] of entries) {
    const has = names.filter((name) => Object.hasOwn(entry, name)), but = has.length && `, not ${has.join(" and ")}`;
    if (has.length !== 1) say(path, `needs exactly one of ${names.join(", ")}${but || ""}`);
    known([...path, "service"], entry.service, "service", services);
    known([...path, "mirror", "service"], record(entry.mirror).service, "service", services);
    const split = Object.entries(record(entry.split));
    for (const [name] of split) known([...path, "split", name], plain(name), "service", services, "key");
    if (isRecord(entry.split) && split.every(([, weight]) => weight === 0)) {
      say([...path, "split"], "no service has a weight above 0");
    }
    for (const key of has.includes("servers") ? [] : Object.keys(entry)) {
      if (!Object.hasOwn(settings, key) || Object.hasOwn(policy, key)) continue;
      say([...path, key], "belongs to a service: it stands there, or beside servers", "key");
    }
    const groups = Math.min(...[entry.path].flat().map(groupsOf)), rewritten = record(entry.rewrite).path;
    const group = Math.max(0, ...[...String(rewritten).matchAll(/\$(\d+)/g)].map((found) => Number(found[1])));
    if (group > groups) say([...path, "rewrite", "path"], `$${group} is none of the groups of every path`);
    if (isTrue(entry.strip) && entry.rewrite) say([...path, "strip"], "strip and rewrite exclude each other", "key");
    const name = `${entry.name ?? ""}`;
    if (name && taken.has(name)) say([...path, "name"], `${quote(entry.name)} names another route already`);
    taken.add(name);
  }
  checkTcp(file, say);
  checkPorts(file, say);
  const none = entries.length + nameRoutes(file).length === 0;
  if (!none && Array.isArray(file.listen) && !file.listen.length) say(["listen"], "is empty: nobody could ask");
  const later = isTrue(file.name_routes) && services.length === 0; // they come over the admin API
  if (none && !later && !mapsIn(file, "tcp").length) {
    say([], "no way leads to a server: hosts, paths, routes, default or tcp is needed");
  }
}

/** What a TCP service may not be: the strategies that look at requests, servers over TLS, another one's name or port. */
function checkTcp(file: Raw, say: Say) {
  const names = new Set(Object.keys(record(file.services)).map(plain));
  for (const [path, { name, servers, strategy }] of mapsIn(file, "tcp")) {
    if (isRecord(strategy) && !record(strategy.hash).client) {
      say([...path, "strategy"], "there is no request whose parts could be hashed; {hash: {client: true}} works");
    }
    for (const [i, server] of [servers ?? []].flat().entries()) {
      const at = Array.isArray(servers) ? [...path, "servers", i] : [...path, "servers"];
      const url = String(isRecord(server) ? server.url : server);
      if (/^https:/i.test(url)) say(at, `${quote(url)} speaks TLS: tcp passes bytes as they are, and adds none`);
    }
    if (name && names.has(`${name}`)) say([...path, "name"], `${quote(name)} names another service already`);
    names.add(`${name}`);
  }
}

/** No two listeners have the same address. Port 0 is any that is free. */
function checkPorts(file: Raw, say: Say) {
  const taken = new Set<string>();
  const maps: [Keys, Raw][] = [[[], { listen: listenOf(file) }], ...topMap(file, "admin"), ...mapsIn(file, "tcp")];
  for (const [path, { listen }] of maps) {
    for (const [i, one] of [listen ?? []].flat().entries()) {
      const at = [...path, "listen", ...Array.isArray(listen) ? [i] : []];
      const address = String(isRecord(one) ? one.address : one);
      if (taken.has(address) && !/^(.*:)?0$/.test(address)) say(at, `${address} is listened on already`);
      taken.add(address);
    }
  }
}

/** Where HTTP comes in; nowhere, where nobody says so and there are no routes for it. */
const listenOf = (file: Raw): unknown =>
  file.listen ?? (file.tcp && !entriesOf(file).length && !nameRoutes(file).length ? [] : 8080);

/** `over` on top of `under`; two maps are merged, anything else is replaced. */
const laid = (under: Raw, over: Raw): Raw => {
  const out = { ...under };
  for (const [key, value] of Object.entries(over)) {
    out[key] = isRecord(value) ? { ...record(under[key]), ...value } : value;
  }
  return out;
};
const builtIn = v.getDefaults(map(settings));
/** Writes into every service what it leaves to `defaults`, and to us: the file as it could have been written. */
function spellOut(file: Raw): Raw {
  const full = (own: Raw) => laid(builtIn, laid(record(file.defaults), own));
  const inline = entriesOf(file).filter(([, entry]) => Object.hasOwn(entry, "servers"));
  for (const [, own] of [...mapsIn(file, "services"), ...inline]) Object.assign(own, full(own));
  const fitting = (keys: object, all: Raw) => Object.fromEntries(Object.keys(keys).map((name) => [name, all[name]]));
  for (const [, own] of mapsIn(file, "tcp")) {
    const all = fitting(tcpSettings, laid(full({}), own));
    all.timeouts = fitting(TcpTimeouts.entries, record(all.timeouts));
    if (isRecord(all.strategy)) all.strategy = { hash: { client: true } }; // what any hash is without a request
    Object.assign(own, all);
  }
  return { ...v.getDefaults(RoutesFile), ...file, listen: listenOf(file), defaults: full({}) };
}
const unique = (name: string, taken: { has(name: string): boolean }) => {
  let free = name;
  for (let i = 2; taken.has(free); i++) free = `${name}#${i}`;
  return free;
};
const Carried = v.object({ ...conditions, ...changes }), Leading = v.object({ ...place, ...actions });
/** Files that routes.yml names lie beside it, unless their names begin at the root. */
const beside = (file: string, name: string): string =>
  !name || /^(?:[a-z]:)?[/\\]/i.test(name) ? name : file.replace(/[^/\\]*$/, "") + name;
function locate(file: string, services: Iterable<ServiceConfig>, ...fronts: FrontConfig[][]): void {
  for (const service of services) {
    const { ca, cert, key } = service.tls;
    service.tls = { ...service.tls, ca: beside(file, ca), cert: beside(file, cert), key: beside(file, key) };
  }
  for (const at of fronts.flat()) {
    at.tls = at.tls.map(({ cert, key }) => ({ cert: beside(file, cert), key: beside(file, key) }));
    at.client_ca = beside(file, at.client_ca);
  }
}
/** Every entry in the general form, and a service for each that lists servers. */
function expand(source: Raw, text: string, file: string): Config {
  const { listen, admin, trust, limits, log, name_routes, tcp } = v.parse(RoutesFile, source);
  const services = new Map(mapsIn(source, "services").map(([[, name], own]) => [plain(String(name)), own]));
  const written = entriesOf(source).map(([, entry]) => entry), last = topMap(source, "default").length;
  const names = new Set(written.map((entry) => entry.name));
  const entries = written.toSpliced(written.length - last, 0, ...nameRoutes(source));
  const routes = entries.map((entry): RouteConfig => {
    const { host: hosts, path: paths, strip, service, servers, split, redirect, respond } = v.parse(Leading, entry);
    const carried = v.parse(Carried, entry), fallback = entry === source.default;
    const where = [hosts, paths.map((rule) => rule.kind === "regex" ? rule.source : rule.path || "/")].join("");
    const name = carried.name || unique(where || (fallback ? "default" : "any"), names);
    names.add(name);
    const own = servers ? unique(name, services) : service;
    if (servers) services.set(own!, entry);
    const under = (service = "") =>
      v.parse(v.object(policy), laid(services.get(service) ?? record(source.defaults), entry));
    const shares = own === undefined ? split ?? new Map<string, number>() : new Map([[own, 1]]);
    const target = ([service, weight]: [string, number]): Target => {
      const next = `${services.get(service)!.fallback}`;
      return { service, weight, policy: under(service), fallback: next === "none" ? undefined : target([next, 0]) };
    };
    const targets = [...shares].map(target);
    const action: Action = redirect ?? respond ?? { kind: "forward", targets };
    const rewrite = strip ? { ...carried.rewrite, kind: "replace" as const } : carried.rewrite;
    return { ...carried, name, hosts, paths, action, rewrite, policy: targets[0]?.policy ?? under(), fallback };
  });
  for (const [i, [, own]] of mapsIn(source, "tcp").entries()) {
    const { name, listen } = tcp[i]!;
    tcp[i]!.name = unique(name || `tcp:${listen[0]!.port}`, services);
    services.set(tcp[i]!.name, own);
  }
  const Inline = v.object(Service.entries); // beside the keys of a service stand those of its route
  const parsed = new Map([...services].map(([name, own]) => [name, v.parse(Inline, laid(builtIn, own))]));
  const stands = new Map(
    [...mapsIn(source, "services", "tcp"), ...entriesOf(source)].map(([path, own]) => [own, path]),
  );
  const places = new Map([...services].map(([name, own]) => [name, stands.get(own)!]));
  locate(file, parsed.values(), listen, ...tcp.map((one) => one.listen));
  const top = { listen, admin, trust, limits, log, name_routes };
  return { ...top, services: parsed, routes, tcp, source, text, file, places };
}

/** What is found wrong with a text, and where; `end` throws if there is anything. */
function newFindings(file: string) {
  const lines = new LineCounter(), places = new Map<string, Spot>();
  const found = new Map<string, Mistake & { offset: number }>();
  const say: Say = (path, message, at) => {
    const offset = typeof at === "number" ? at : places.get(JSON.stringify(path))?.[at ?? "value"] ?? 0;
    const { line, col } = lines.linePos(offset);
    const mistake = { line: line || 1, column: col || 1, path: dotted(path), message, offset };
    found.set(JSON.stringify([offset, path, message]), mistake);
  };
  const end = () => {
    const mistakes = [...found.values()].sort((a, b) => a.offset - b.offset).slice(0, MOST.mistakes);
    if (mistakes.length) throw new ConfigError(file, mistakes.map(({ offset: _, ...mistake }) => mistake));
  };
  return { lines, places, found, say, end };
}

/**
 * Reads routes.yml (YAML, and so JSON); `${NAME}` is taken from `env`, and `more` are strategies beside the built-in ones.
 * @throws {ConfigError} with all mistakes, in the order of the file
 */
export function parseConfig(text: string, env: Env = {}, file = "routes.yml", more: string[] = []): Config {
  const { lines, places, found, say, end } = newFindings(file);
  const raw = readYaml(text, env, lines, places, say);
  const unreadable = new Set([...found.values()].map((mistake) => mistake.path));
  if (raw !== undefined && !unreadable.has("")) {
    const sayMore: Say = (path, message, at) => unreadable.has(dotted(path)) || say(path, message, at);
    const issues = v.safeParse(RoutesFile, raw).issues ?? [];
    for (const one of issues.flatMap((issue) => flatten(issue))) report(one, sayMore);
    if (isRecord(raw)) check(raw, more, sayMore);
  }
  end();
  return expand(spellOut(raw as Raw), text, file);
}

/**
 * A text as it is written: it can be read, variables stay `${NAME}`, and nothing else is checked.
 * @throws {ConfigError} where it cannot be read
 */
function readAsWritten(text: string, file: string): unknown {
  const { lines, places, say, end } = newFindings(file);
  const written = readYaml(text, undefined, lines, places, say);
  end();
  return written;
}

const schemaOf = (schema: Schema, target: "draft-07" | "draft-2020-12") =>
  toJsonSchema(schema, {
    target,
    typeMode: "input",
    errorMode: "ignore",
    overrideSchema: ({ valibotSchema, jsonSchema }) =>
      valibotSchema.type === "object_with_rest" ? { ...jsonSchema, additionalProperties: false } : undefined,
  });
/** JSON Schema (draft-07) of routes.yml as it is written, for editors. */
export const jsonSchema = () => schemaOf(RoutesFile, "draft-07");

/** Names as they were before they were veiled. */
const unveiled = (value: unknown): unknown =>
  Array.isArray(value)
    ? value.map(unveiled)
    : isRecord(value)
    ? Object.fromEntries(Object.entries(value).map(([name, one]) => [plain(name), unveiled(one)]))
    : value;
/** `hash: {cookie: lb}` and the like name a thing and hold no secret; `sticky: {secret: ...}` does. */
function masked(value: unknown, show: (text: string, secret: boolean) => unknown, key = "", above = ""): unknown {
  if (Array.isArray(value)) return value.map((item) => masked(item, show, key, above));
  if (isRecord(value)) {
    const inside = (name: string, one: unknown) => masked(one, show, name === "regex" ? key : name, key);
    return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, inside(name, one)]));
  }
  const names = /^(hash|split)$/.test(above) || above === "sticky" && key !== "secret";
  const secret = SECRET.test(key) && !names && typeof value !== "boolean";
  return secret || typeof value === "string" ? show(String(value), secret) : value;
}
/** What is in force, as a routes.yml with the defaults spelt out and secrets as `***`. */
export const printConfig = ({ source }: Config): string => {
  const shown = masked(source, (text, secret) => secret ? "***" : text.replaceAll("${", () => "$${"));
  return stringify(unveiled(shown), { lineWidth: 0, aliasDuplicateObjects: false });
};

// ---------------------------------------------------------------------------------------------------------------------
// 6. State: what the balancer remembers. Plain records; what changes while serving stands together at the end of each.
// ---------------------------------------------------------------------------------------------------------------------

/** Upper bounds of the classes of durations, in milliseconds: Traefik's 0.1, 0.3, 1.2 and 5 s, and finer ones. */
const BUCKETS = [0.25, 0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 800, 1_200, 2_500, 5_000, 10_000, 60_000];

/** What has been counted of requests that have ended. It only grows, and adds up: over statuses, servers and workers. */
export type Counters = ReturnType<typeof newCounters>;
const newCounters = () => ({
  requests: 0,
  errors: 0, // answers with 5xx, and failures that are not the client's
  bytesIn: 0, // of the requests' bodies
  bytesOut: 0, // of the answers' bodies
  milliseconds: 0, // to the end of the answer, all together
  durations: [...BUCKETS, 0].fill(0), // how many took at most that one of BUCKETS, and more than the one before; last: more
});

/** Counters by status and method (see `tallyOf`). */
export type Tallies = Map<number, Counters>;
const newTallies = (): Tallies => new Map();

/** Where requests come in, by the scheme that clients speak there; and where connections do that are not HTTP: tcp. */
export type Entrypoint = ReturnType<typeof newEntrypoint>;
const newEntrypoint = (name: string) => ({
  name,
  // changes while serving
  inFlight: 0,
  tallies: newTallies(),
});

/** Mixes 32 bits so that numbers that differ in one bit are far apart (MurmurHash3's finish). */
function mix(h: number): number {
  h = Math.imul(h ^ h >>> 16, 0x85ebca6b);
  h = Math.imul(h ^ h >>> 13, 0xc2b2ae35);
  return (h ^ h >>> 16) >>> 0;
}

/** 32 bits of a text (FNV-1a, mixed). */
function hash(text: string): number {
  let h = 0x811c9dc5;
  for (let i = 0; i < text.length; i++) h = Math.imul(h ^ text.charCodeAt(i), 0x01000193);
  return mix(h);
}

const HEX = Array.from({ length: 256 }, (_, byte) => byte.toString(16).padStart(2, "0"));
/** 32 bits as eight digits. */
const digits = (word: number): string =>
  HEX[word >>> 24]! + HEX[word >>> 16 & 255]! + HEX[word >>> 8 & 255]! + HEX[word & 255]!;

/** One server of one service. Times are milliseconds of `Effects.now`. */
export type Server = ReturnType<typeof newServer>;
const newServer = (config: ServerConfig, service: string, tls: ServiceConfig["tls"]) => ({
  ...config,
  service,
  tls,
  hash: hash(config.name), // of its name, for rendezvous
  // changes while serving
  up: true, // what active probes say
  until: 0, // ejected until then, and after that on trial; 0: neither
  trying: false, // the one request that tries it out is on its way
  slow: false, // why it was ejected: the others were faster
  pausedUntil: 0, // what it has said itself with Retry-After
  effective: config.weight, // its weight as of now: less during slow start
  limit: Infinity, // requests in flight at most: its `max`, `max_in_flight`, or what `auto` has found
  pulse: newPulse(0, 0),
  failures: 0, // consecutive failures of requests
  ejections: 0, // consecutive ejections: each makes the next longer
  passes: 0, // consecutive probes passed while down
  fails: 0, // consecutive probes failed while up
  probeAt: 0, // when the next probe is due
  current: 0, // smooth weighted round robin's running weight
  inFlight: 0,
  picks: 0,
  answers: 0,
  saidAt: -Infinity, // when its last failure was reported
  since: 0, // when a probe, an ejection or a reload last changed what it is
  back: -Infinity, // when it came back, or was new: from then on it starts slowly; -Infinity: long ago
  ejected: 0, // how often it was
  probedAt: 0, // when its last probe ended; 0: there was none
  probeTook: 0,
  probeProblem: "", // what was wrong with it; empty: it passed
  probesPassed: 0,
  probesFailed: 0,
  retries: 0, // attempts that came here because another had failed
  counters: newCounters(), // of attempts that have ended
  picksThen: 0, // at the last comparison
  load: 0, // picks a second, over the last 10 s or so
  ...unheard,
  waiting: 0, // of those in flight: without the head of an answer yet
  waitingSince: 0, // the sum of when they began: so that their mean age is known at any time
  recentAt: 0,
});

/** What is known of a server of which nothing is known. */
const unheard = {
  samples: 0, // good answers since it was last ejected: what `latency` and `typical` are made of
  latency: 0, // mean milliseconds to the head of a good answer; over the last 64 or so once there are that many
  typical: 0, // the same as a geometric mean, which a single long answer hardly moves
  judged: 0, // attempts since it was last ejected: what `failing` is made of
  failing: 0, // the share of them that failed, or had a 5xx; over the last 64 or so
  recent: 0, // milliseconds to the head of an answer as of `recentAt`: a peak at once, else decaying; 0: not known
};

/** What `max_in_flight: auto` has felt of a server: its latency in calm times, and what is in the window that is open. */
const newPulse = (calm: number, since: number) => ({
  calm, // mean milliseconds to the head of an answer while it was not near its limit; 0: not known
  since, // when the window was opened
  answers: 0,
  sum: 0, // of their milliseconds
  most: 0, // requests in flight
  refused: false, // a 429, a 503 or a failure came
});

/** Never empty: who cannot be asked has been left out, and where nobody is left no strategy is asked. */
export type Candidates = readonly [Server, ...Server[]];

/** What a strategy may look at beside the candidates. */
export interface Draw {
  random(): number; // from 0 up to but not including 1; seeded in tests
  now: number; // when the server is picked, as `Effects.now` has it
  turn: number; // how many requests its service had before
  key: string; // what `hash` hashes
  client: string; // the client's address, behind trusted proxies
  request: Request | undefined; // a TCP connection has none
}

/** Chooses the server that takes a request. Reads, and may write only what its servers remember for it. */
export interface Strategy {
  (candidates: Candidates, draw: Draw): Server;
  score?: Score; // for those who ask why
}

/** What a strategy goes by, the least being the best. */
export type Score = (server: Server, candidates: Candidates, draw: Draw) => number;

/** What is said of a server where one is chosen. */
export interface Verdict {
  server: string;
  asked: boolean; // whether it may be
  why?: string; // what speaks against it, or for it
  score?: number; // where its strategy has one
  limit?: number; // requests in flight at most, where that is found out (`max_in_flight: auto`)
}

/** One choice among the servers of a service. */
export interface Choice {
  service: string;
  strategy: string;
  takes: string | null; // the server; null: there is none to take
  servers: Verdict[];
}

/** One service: its servers and how one of them is chosen, as the config in force says, and what outlives that. */
export type Service = ReturnType<typeof newService> & {
  config: ServiceConfig;
  servers: Server[];
  strategy: Strategy;
  key: (exchange: Exchange) => string; // what `hash` hashes
  cookies: Map<string, Server> | undefined; // the servers by the values of the sticky cookie, once they are signed
  hedge: number; // the share of answers that come before a second attempt is made; 0: none is made
  bounded: boolean; // some server has a `max`, or the service a `max_in_flight`
};
const newService = (name: string) => ({
  name,
  // changes while serving
  candidates: [] as readonly Server[], // who may be asked, as of the last change
  candidatesUntil: 0, // when that has to be worked out again; 0: at once
  panicking: false,
  turn: 0, // requests so far
  inFlight: 0,
  retrying: 0, // retries in flight: what the budget bounds
  saved: 0, // retries that requests have earned, the good ones more than are needed now: for when a server dies
  copies: { answered: 0, failed: 0, skipped: 0, inFlight: 0 }, // what `mirror` brings; counted nowhere else
  retries: 0, // so far
  tallies: newTallies(), // of requests that have ended
  waiting: new Set<() => boolean>(), // requests without a server, as they came: each takes one, or says that all are full
  secondAt: -Infinity, // when the second began that `retried` counts in
  retried: 0, // retries that came out of the budget in that second
  usual: 0, // mean milliseconds to the head of a good answer of any of its servers; 0: not known
  times: NO_TIMES, // the latest milliseconds to the head of a good answer, where there is a hedge
  measured: 0, // how many were written there
  patience: 0, // the quantile of these
  hedges: 0, // second attempts so far
  hedgesWon: 0, // those that answered first
  median: 0, // of its servers' `typical`, as of the last comparison; 0: not known
  crowd: 0, // requests in flight at each server when the first slow one was ejected
  peaceUntil: 0, // until then nobody is ejected for being slow
  comparedAt: -Infinity,
  compareAt: 0, // when its servers are compared again
});
const NO_TIMES = new Float64Array(0);

/** One service that a route may lead to, with the policy that holds on that way. */
export interface Destination {
  service: Service;
  weight: number;
  policy: Policy;
  retryOn: ReadonlySet<string | number>;
  around: Around | undefined; // compress and cors
  fallback: Destination | undefined; // where it goes when no server here may be asked
}

/** Hono's own middleware around an answer, which it gets through its env. */
export type Around = Hono<{ Bindings: { answer: () => Promise<Response> } }>;

/** One route, compiled: every decision about its shape was taken when the table was built. */
export interface Route extends Omit<RouteConfig, "mirror"> {
  destinations: Destination[]; // where the action is to forward
  weight: number; // the sum over destinations
  sticky: boolean; // a split, and each of its services knows its clients
  mirror: Destination | undefined; // where copies go; its weight is their share, from 0 to 1
  rank: number; // a method, then header conditions, then query conditions
  conditions: ((exchange: Exchange) => boolean)[];
  admits: ((client: string) => boolean) | undefined; // allow and deny
  buckets: Buckets | undefined; // of its rate
  hasRules: boolean; // for headers or query, of the request or the answer
}

/** What a rule remembers of its clients: when the bucket of each is full again. Those not named are full. */
export type Buckets = ReturnType<typeof newBuckets>;
const newBuckets = (rate: Rate) => ({
  rate,
  // changes while serving
  recent: new Map<string, number>(), // those that were drawn from since `turnedAt`
  older: new Map<string, number>(), // those of before; forgotten at the next turn
  turnedAt: 0,
});

/** Where the connections of a TCP listener go. */
export interface TcpRoute extends Pick<TcpConfig, "proxy_protocol"> {
  at: TcpConfig["listen"][number];
  service: Service;
  admits: Route["admits"];
}

/** One configuration in force. A request keeps the table that it started with. */
export interface Table {
  config: Config;
  services: Map<string, Service>;
  hosts: HostTable;
  schemes: Map<string, HostTable>; // of the routes for one of them
  fallback: Route | undefined; // `default`
  buckets: Map<string, Buckets>; // by route and rule
  tcp: Map<string, TcpRoute>; // by host:port, as the file has them
  trusts: (peer: string) => boolean;
}

// ---------------------------------------------------------------------------------------------------------------------
// 7. Exchange: one request from the gate to its last byte, and what carries it: attempts, tunnels, the balancer, its effects.
// ---------------------------------------------------------------------------------------------------------------------

/** Who asks, as the runtime knows it. `headers`: name, value, name, value, ... in the order of the wire. */
export interface Client {
  address: string;
  scheme: string;
  headers: readonly string[];
  authority?: string; // what stands for Host over HTTP/2
}

/** One request's life, from the gate to the end of the answer's body. */
export type Exchange = ReturnType<typeof newExchange>;

/** A request that has just come in; what is not known yet is empty. It is a Draw, too. */
function newExchange(balancer: Balancer, request: Request, from: Client, wrapped: boolean) {
  const { table, effects } = balancer, { log } = table.config, now = effects.now();
  return {
    random: effects.random,
    now,
    turn: 0,
    key: "",
    client: from.address,
    request,
    table,
    wrapped, // somebody's middleware stands around the whole balancer
    started: now,
    id: "",
    method: request.method,
    host: "", // as sent; matched without case and port
    path: "", // normalised: what is matched is what is forwarded
    query: "", // with its question mark, or empty
    peer: from.address, // who is connected; `client` is who asks through it
    told: undefined as Map<string, string> | undefined, // what the peer tells about the client, where the peer is trusted
    scheme: from.scheme, // that the peer speaks
    authority: from.authority, // of a request over HTTP/2
    headers: from.headers, // of the request: name, value, ...
    length: 0, // of the request's body in bytes; -1: unknown
    body: null as Body,
    upgrade: undefined as Upgrade | undefined, // it asks for a WebSocket, and may have one
    matched: "" as string | RE2JS, // the part of the path that the route's prefix took, or the pattern that found it
    allow: undefined as string[] | undefined, // methods of routes that fit but for the method
    route: undefined as Route | undefined,
    destination: undefined as Destination | undefined,
    tried: [] as Server[],
    choices: undefined as Choice[] | undefined, // so far, where an operator asks for them
    cookie: "", // Set-Cookie for a client that is new to its server, or empty
    counted: "", // the client, where it may have only so many requests in flight
    quota: NO_HEADERS, // what the answer says about the client's rate: name, value, ...
    attempt: undefined as Attempt | undefined, // the latest
    trace: "", // 32 digits, from the client or begun by us; empty: not asked for yet
    flags: "", // of the trace; 01: somebody records it
    state: "", // tracestate, that came with it
    span: "", // 16 digits, of the latest attempt
    earned: false, // its share of a retry, for its service
    chosen: log.sample === 1 || effects.random() < log.sample, // its line is written even if nothing goes wrong
    stop: undefined as AbortSignal | undefined, // where two attempts are made at the same time: the other one has won
    entrypoint: entry(balancer.entrypoints, from.scheme, newEntrypoint),
    endedAt: 0, // when the last byte had passed
    status: 0, // of the final answer; 0: there is none yet
    ended: false, // its body has ended, or been cut off
    bytes: 0, // of its body
    problem: "", // of FAILURES, or empty
  };
}
const NO_HEADERS: readonly string[] = [];

/** The body of a request: none, bytes kept for another attempt, or a stream that can be read once. */
export type Body = null | Uint8Array<ArrayBuffer> | ReadableStream<Uint8Array<ArrayBuffer>>;

/** One request to one server: what `Effects.fetch` takes beside the URL. */
export interface Attempt {
  method: string;
  headers: string[]; // name, value, name, value, ...
  body: Body;
  length: number; // of the body in bytes; -1: unknown
  wrapped: boolean; // middleware stands around the answer
  request: { readonly signal: AbortSignal }; // tells that the client has left; read late, because reading it costs
  stop?: AbortSignal | undefined; // tells that nobody wants the answer any more
  server: Server;
  timeouts: Policy["timeouts"];
  upgrade?: Upgrade | undefined; // it asks for a WebSocket
  /** Changes the answer's headers before a Response is made of them. */
  inbound(headers: readonly string[]): readonly string[];
  /** Called once for each answer, when its body has ended, been cut off or been given up: how much of it came, and why. */
  ended(status: number, bytes: number, problem: Failure | undefined): void;
  // changes while it lasts
  startedAt: number;
  connectedAt: number; // when the request could be written; 0: not yet, or not known
  headAt: number; // when the head of the answer was there; 0: not yet
  uploaded: number; // bytes of a body of unknown length that were passed on
}

/** How a request becomes a WebSocket (RFC 6455). */
export interface Upgrade {
  raw: boolean; // the client's side too is bytes, so that both ends may agree on extensions; otherwise it is messages
  /** The server has agreed: gives what takes over the connection to it, or says why that cannot be. */
  take(socket: Socket, head: Switched, attempt: Attempt): Taker | string;
  // changes while serving
  response: Response | undefined; // what stands for the answer, once the client's side has been switched over
}

/** A 101, as far as it matters. */
type Switched = Pick<Head, "headers" | "upgrade">;

/** Has taken over a connection: the wire goes on to tell it what happens there. */
export interface Taker {
  data(bytes: Bytes): void;
  drained(): void;
  closed(): void;
  /** Every 100 ms or so. */
  look(now: number): void;
}

/** What a runtime does to make a WebSocket of a request. It throws where the client has gone. */
export interface Switch {
  raw: boolean;
  accept(tunnel: Tunnel): Response;
}

/** A WebSocket that is open, or is closing. */
export interface Tunnel {
  readonly server: Socket;
  readonly headers: readonly string[]; // of the server's 101, for the client's
  readonly idle: number; // milliseconds of silence after which it is closed
  readonly up: Frames; // what goes to the server
  readonly down: Frames; // what comes from it
  // changes while serving
  client: ClientSide | undefined; // undefined: not open yet
  early: Bytes[]; // what has come for it by then
  bytesUp: number;
  bytesDown: number;
  seen: number; // bytes both ways, when it was last looked at
  since: number; // when some last passed
  said: boolean; // one of both has sent a close frame
  left: boolean; // the client has gone
  problem: Failure | undefined; // why it ends, where nobody has said
  closing: boolean; // we have ended it
  over: boolean; // the server has gone
}

/** The client's side of a tunnel, as the runtime has it. */
export interface ClientSide {
  /** Takes bytes of the server's frames; false: it has enough, and resumes the server when there is room again. */
  deliver(bytes: Bytes): boolean;
  /** Ends it after what has been delivered, with a close frame of this code; 0: without a word. */
  close(code: number): void;
  /** Bytes of the client wait for the server. */
  pause(): void;
  resume(): void;
}

/** A client's side that is messages: what runtimes have that do not give the connection away. */
export interface MessageSide {
  send(message: string | Bytes): void;
  /** False: no more until `drained`. */
  hasRoom(): boolean;
  ping?(payload: Bytes): void; // absent: pings and pongs end at the runtime
  pong?(payload: Bytes): void;
  close(code: number, reason: string): void;
  /** Ends the connection without a close frame, or as near to that as can be. */
  cut(): void;
  pause(): void;
  resume(): void;
}

/** What such a client says. */
export interface MessageEvents {
  message(message: string | Uint8Array): void;
  ping(payload: Uint8Array): void; // that the runtime has answered
  pong(payload: Uint8Array): void;
  drained(): void;
  closed(code: number, reason: string): void; // 1005: without a code; 1006: without a close frame
}

/** `fetch`, with the attempt where the init would be. Rejects with a `WireError` before the head of an answer. */
export type Fetch = (url: string, attempt: Attempt) => Promise<Response>;

/** One running balancer: the table in force, which a reload replaces, and what outlives a table. */
export type Balancer = ReturnType<typeof newBalancer>;
function newBalancer(table: Table, effects: Effects, runtime: string) {
  const startedAt = effects.date(), name = hash(`${effects.random()} ${startedAt.getTime()}`).toString(36);
  const word = () => effects.random() * 2 ** 32;
  return {
    table,
    effects,
    name, // of this process, in request ids
    via: `1.1 lb-${name}`, // how we are called in Via: by it a request that comes back is known
    runtime, // deno, bun, node or edge
    seed: Math.floor(word()), // of the ids of traces and spans
    origin: digits(word()) + digits(word()), // 16 digits that begin the ids of our traces
    startedAt,
    // changes while serving
    requests: 0,
    inFlight: 0, // requests, WebSockets, and connections that are not HTTP
    entrypoints: new Map<string, Entrypoint>(), // by name
    clients: new Map<string, number>(), // requests in flight, where `limits` bounds them
    connections: 0, // of clients, as far as the runtime shows them
    connected: new Map<string, number>(), // how many of them each client has
    tunnels: new Set<Tunnel>(), // WebSockets that are open
    relays: new Set<() => void>(), // connections that are not HTTP: a call ends one
    workers: new Map<number, { since: Date; end(): void }>(), // threads that serve for this one, where there are some
    draining: false, // it takes no new connections, and will end
    ids: 0, // of traces and spans, so far
    guesses: newBuckets({ requests: 1, per: 1_000, burst: 5, by: "" }), // wrong tokens in x-lb-explain
    failures: new Map<string, number>(), // how often each of FAILURES was the end of a request
    reloads: 0,
    reloadedAt: startedAt, // when the table in force became it
    reloadFailed: false, // a newer file could not be put in force
    tokens: { ...table.config.admin }, // of the admin API; those of before where there are none any more
  };
}

/** Strategies by the names that `strategy:` may say. */
export type Strategies = Record<string, Strategy>;

/** The one door for everything impure. Tests put a fake clock, a seeded random and scripted servers here. */
export interface Effects {
  fetch: Fetch;
  /** Resolves when a TCP connection to the server stands, rejects otherwise. */
  connect(server: Server, timeout: number): Promise<void>;
  /** Milliseconds that never go back. */
  now(): number;
  /** The time of day, for what people read. */
  date(): Date;
  /** From 0 up to but not including 1. */
  random(): number;
  /** HMAC-SHA256 in base64url. */
  sign(secret: string, text: string): string;
  /** What signs where the file has no secret: the same in all threads of a process, drawn at random. */
  secret(): string;
  /** Resolves after a time; after the signal it may never resolve, and keeps nothing waiting. */
  sleep(milliseconds: number, signal?: AbortSignal): Promise<void>;
  /** Who asks; `env` is what the runtime hands over beside the request. */
  client(request: Request, env: unknown): Client;
  /** How this request can become a WebSocket; undefined: it cannot. */
  upgrade(request: Request, env: unknown): Switch | undefined;
  /** Tells other threads what a probe has found: what is wrong with the server, or undefined. */
  probed(service: Service, server: Server, problem: string | undefined): void;
  /** Hears what an operator says of a server. */
  told(service: Service, server: Server, up: boolean): void;
  /** Logs a request that has ended; `accessLine` makes a line of it. */
  write(record: AccessRecord, format: LineFormat): void;
  /** One line for the operator. */
  report(level: "info" | "warn" | "error", text: string): void;
}

/** The host and port of a server's URL. */
const hostOf = (url: string): string => url.slice(url.indexOf("//") + 2);

/** Remembers what it has worked out for up to 1,000 short texts: the same few come again and again. */
function memo<T>(work: (text: string) => T, longest = 100): (text: string) => T {
  const known = new Map<string, T>();
  return (text) => {
    const found = known.get(text);
    if (found !== undefined) return found;
    if (known.size >= 1_000) known.clear();
    const fresh = work(text);
    if (text.length <= longest) known.set(text, fresh);
    return fresh;
  };
}

/** The value under `key`, made first where there is none. */
function entry<K extends WeakKey | string | number, V>(
  map: { get(key: K): V | undefined; set(key: K, value: V): unknown },
  key: K,
  make: (key: K) => V,
): V {
  let value = map.get(key);
  if (value === undefined) map.set(key, value = make(key));
  return value;
}

const ENCODER = new TextEncoder();

/** JSON in ASCII: as many bytes as letters, and good for a header or a line. */
function asciiJson(value: unknown, replace?: (key: string, value: unknown) => unknown): string {
  const text = JSON.stringify(value, replace);
  if (Buffer.byteLength(text) === text.length && !text.includes("\x7f")) return text; // faster than a search
  return text.replace(/[^\x20-\x7e]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

const VERSION = "0.1.0";

/** A host as the runtimes' listeners take it. */
const bare = (host: string): string => host.replace(/^\[|\]$/g, "");

/** A client's address: listeners for both families give ::ffff:10.0.0.1 (RFC 4291 section 2.5.5.2). */
const unmapped = (address: string | undefined): string => address?.replace(/^::ffff:/, "") || "unknown";

/** An address as people write it. */
const shown = (host: string, port: number): string => `${host || "0.0.0.0"}:${port}`;

// ---------------------------------------------------------------------------------------------------------------------
// 8. Gate: what may come in. One normalised path is both matched and forwarded, so that no rule can be talked around.
// ---------------------------------------------------------------------------------------------------------------------

const METHOD = /^[A-Z][A-Z0-9-]{0,31}$/;
const REFUSED_METHODS = new Set(["TRACE", "TRACK", "CONNECT"]);
const HOST = /^(?:[a-z0-9_](?:[a-z0-9_.-]{0,253})|\[[0-9a-f:.]{2,45}\])(?::(\d{1,5}))?$/i;
const PLAIN_PATH = /^\/(?:[\w~!$&'()*+,;=:@-]|\/(?!\.)|(?<!\/)\.)*$/; // nothing encoded, no segment beginning with a dot
const FORBIDDEN_IN_TARGET = /[\x00-\x20\x7f\\#]/;
const UNRESERVED = /[\w.~-]/;
const MAX_TARGET = 16_384; // bytes of path and query

/** Why a request is refused at the gate. */
export type Refusal = "bad-request" | "bad-host" | "bad-method" | "uri-too-long";

/** `a.example:80`, `A.example` and `a.example.` are one host: ports are not part of what routes match. */
const hostName = memo((host) => {
  const colon = host.lastIndexOf(":");
  const name = colon > host.lastIndexOf("]") ? host.slice(0, colon) : host;
  return (name.endsWith(".") ? name.slice(0, -1) : name).toLowerCase();
});

const hostIsValid = memo((host) => {
  const parts = HOST.exec(host);
  return parts !== null && Number(parts[1] ?? 0) <= 65_535;
});

/** Removes dot segments, also encoded ones (RFC 3986 section 5.2.4). `%2F` is not a slash. */
function removeDots(path: string): string {
  const out: string[] = [];
  const segments = path.split("/").slice(1);
  segments.forEach((segment, i) => {
    const last = i === segments.length - 1;
    if (segment === "..") out.pop();
    if (segment === "." || segment === "..") {
      if (last) out.push("");
    } else out.push(segment);
  });
  return "/" + out.join("/");
}

/** The path as it is matched and forwarded, or undefined where it cannot be trusted to mean one thing. */
function normalizePath(path: string): string | undefined {
  if (PLAIN_PATH.test(path)) return path;
  if (path[0] !== "/" || FORBIDDEN_IN_TARGET.test(path)) return undefined;
  if (/%(?![0-9a-f]{2})|%00/i.test(path)) return undefined;
  const decoded = path.replace(/%[0-9a-f]{2}/gi, (hex) => {
    const character = String.fromCharCode(parseInt(hex.slice(1), 16));
    return UNRESERVED.test(character) ? character : hex.toUpperCase();
  });
  return removeDots(encodeURI(decoded).replaceAll("%25", "%"));
}

/** Checks method, Host, target and framing once, and writes what everything below works with into the exchange. */
function admit(exchange: Exchange): Refusal | undefined {
  const { request } = exchange;
  const { method, url, headers } = request;
  if (!METHOD.test(method) || REFUSED_METHODS.has(method)) return "bad-method";
  const host = exchange.host = headers.get("host") ?? exchange.authority ?? "";
  if (!hostIsValid(host)) return "bad-host";
  const authority = url.indexOf("://") + 3;
  const start = url.indexOf("/", authority);
  if (authority < 3 || start < 0) return "bad-request";
  if (url.length - start > MAX_TARGET) return "uri-too-long";
  if (!sameAuthority(url.slice(authority, start), host)) return "bad-host";
  const mark = url.indexOf("?", start);
  const sent = mark < 0 ? url.slice(start) : url.slice(start, mark);
  const path = normalizePath(sent);
  const query = mark < 0 ? "" : url.slice(mark).replace(/[^\x00-\x7f]+/g, encodeURIComponent);
  if (path === undefined || FORBIDDEN_IN_TARGET.test(query)) return "bad-request";
  if (exchange.wrapped && path !== sent) return "bad-request"; // middleware has matched another path than servers would get
  exchange.path = path;
  exchange.query = query;
  if (method === "GET" || method === "HEAD") return undefined; // their bodies have been drained by the runtime
  const [length, encoding] = [headers.get("content-length"), headers.get("transfer-encoding")];
  if (length !== null && !/^\d{1,15}$/.test(length) || encoding !== null && !/^chunked$/i.test(encoding)) {
    return "bad-request";
  }
  exchange.length = encoding === null && (length !== null || request.body === null) ? Number(length) : -1;
}

/** The target's authority and Host must name the same host (RFC 9112 section 3.2.2 would ignore Host: nobody may win). */
function sameAuthority(authority: string, host: string): boolean {
  if (authority === host) return true;
  const plain = (name: string) => name.toLowerCase().replace(/:(?:80|443)?$/, "");
  return plain(authority) === plain(host);
}

// ---------------------------------------------------------------------------------------------------------------------
// 9. Routing: which route a request belongs to. Compiled once per table: a thousand routes cost what one costs.
// ---------------------------------------------------------------------------------------------------------------------

/** The routes of one host name, by kind of path. Within one path those with more conditions stand first. */
type PathTable = ReturnType<typeof newPathTable>;
const newPathTable = () => ({
  exact: new Map<string, Route[]>(),
  prefix: new Map<string, Route[]>(),
  depth: 0, // slashes in the longest prefix: deeper is not looked for
  regex: [] as { pattern: RE2JS; routes: Route[] }[],
});

/** Hosts by their names, wildcards by what follows the star, and routes for any host. */
export interface HostTable {
  named: Map<string, PathTable>;
  any: PathTable;
}

const ANY_PATH = { kind: "prefix", path: "" } as const;

function addPath(table: PathTable, path: RouteConfig["paths"][number], route: Route): void {
  if (path.kind === "regex") table.regex.push({ pattern: RE2JS.compile(path.source), routes: [route] });
  else entry(table[path.kind], path.path, () => []).push(route);
  if (path.kind === "prefix") table.depth = Math.max(table.depth, path.path.split("/").length - 1);
}

/** Builds the tables. Routes are put in by rank, so that the first that fits wins; among equals the one written first. */
function compileHosts(routes: Route[]): HostTable {
  const hosts: HostTable = { named: new Map(), any: newPathTable() };
  for (const route of [...routes].sort((a, b) => b.rank - a.rank)) {
    const tables = route.hosts.map((host) => entry(hosts.named, host.replace("*", ""), newPathTable));
    for (const table of tables.length ? tables : [hosts.any]) {
      for (const path of route.paths.length ? route.paths : [ANY_PATH]) addPath(table, path, route);
    }
  }
  return hosts;
}

/** The route that a request belongs to, in Gateway API's order (README, "Which route wins"). */
function matchRoute(table: Table, exchange: Exchange): Route | undefined {
  const own = table.schemes.size > 0 ? table.schemes.get(schemeOf(exchange)) : undefined;
  return (own && matchHost(own, exchange)) ?? matchHost(table.hosts, exchange) ??
    (exchange.allow === undefined ? table.fallback : undefined);
}

/** What the client speaks, as a trusted peer tells it, or as it is spoken here. */
const schemeOf = ({ told, scheme }: Exchange): string => told?.get("x-forwarded-proto") ?? scheme;

/** The host itself, then the longest wildcard: labels are taken off from the left, and no host begins with a dot. */
function matchHost({ named, any }: HostTable, exchange: Exchange): Route | undefined {
  const host = hostName(exchange.host);
  for (let at = named.size > 0 ? 0 : -1; at >= 0; at = host.indexOf(".", at + 1)) {
    const table = named.get(host.slice(at)), route = table && matchPath(table, exchange);
    if (route) return route;
  }
  return matchPath(any, exchange);
}

function matchPath(table: PathTable, exchange: Exchange): Route | undefined {
  const { path } = exchange;
  const exact = firstThatFits(table.exact.get(path), exchange, path);
  if (exact) return exact;
  for (let prefix = cut(path, table.depth);; prefix = prefix.slice(0, prefix.lastIndexOf("/"))) {
    const route = firstThatFits(table.prefix.get(prefix), exchange, prefix);
    if (route) return route;
    if (prefix === "") break;
  }
  for (const { pattern, routes } of table.regex) {
    const route = pattern.matcher(path).find() && firstThatFits(routes, exchange, pattern);
    if (route) return route;
  }
  return undefined;
}

/** The first `depth` segments of a path. */
function cut(path: string, depth: number): string {
  let end = 0;
  for (let i = 0; i < depth; i++) {
    end = path.indexOf("/", end + 1);
    if (end < 0) return path;
  }
  return path.slice(0, end);
}

/** Conditions first; where only the method does not fit, what would have fitted is noted for the 405. */
function firstThatFits(routes: Route[] | undefined, exchange: Exchange, matched: string | RE2JS): Route | undefined {
  if (routes === undefined) return undefined;
  for (const route of routes) {
    if (!route.conditions.every((holds) => holds(exchange))) continue;
    if (methodFits(route.methods, exchange.method)) {
      exchange.matched = matched;
      return route;
    }
    exchange.allow = [...exchange.allow ?? [], ...route.methods];
  }
  return undefined;
}

/** A route for GET answers HEAD too, as RFC 9110 section 9.3.2 expects. */
const methodFits = (methods: string[], method: string): boolean =>
  methods.length === 0 || methods.includes(method) || method === "HEAD" && methods.includes("GET");

type Read = (exchange: Exchange, name: string) => string | null | undefined;
const headerOf: Read = ({ request }, name) => request.headers.get(name);
const queryOf: Read = ({ query }, name) => new URLSearchParams(query).get(name);

function compileCondition(condition: Condition, read: Read): (exchange: Exchange) => boolean {
  const { name } = condition;
  if (condition.kind === "present") return (exchange) => read(exchange, name) != null === condition.present;
  if (condition.kind === "is") return (exchange) => read(exchange, name) === condition.value;
  const pattern = RE2JS.compile(condition.source);
  return (exchange) => {
    const value = read(exchange, name);
    return value != null && pattern.matcher(value).find();
  };
}

/** Whether a text is in one of the networks; `::ffff:10.0.0.1` is `10.0.0.1`, and what is no address is in none. */
export function addressMatcher(networks: string[]): (address: string) => boolean {
  const parsed = networks.map((network) => {
    const [ip, bits] = ipaddr.parseCIDR(network.includes("/") ? network : network + (isIPv4(network) ? "/32" : "/128"));
    const mapped = ip instanceof ipaddr.IPv6 && ip.isIPv4MappedAddress() && bits >= 96;
    return mapped ? [ip.toIPv4Address(), bits - 96] as const : [ip, bits] as const;
  });
  return (address) => {
    if (!parsed.length || !isAddress(address)) return false;
    const ip = ipaddr.process(address);
    return parsed.some(([network, bits]) => ip.kind() === network.kind() && ip.match(network, bits));
  };
}

function compileAdmission(allow: string[], deny: string[]): Route["admits"] {
  if (!allow.length && !deny.length) return undefined;
  const [allowed, denied] = [addressMatcher(allow), addressMatcher(deny)];
  return memo((client) => !denied(client) && (!allow.length || allowed(client)));
}

/** The path that the server sees: what matched is replaced, and what follows it stays. */
function rewritePath({ rewrite }: Route, path: string, matched: string | RE2JS): string {
  if (rewrite.kind === "none") return path;
  if (rewrite.kind === "whole") return rewrite.path;
  if (typeof matched === "string") return rewrite.path.replace(/\/+$/, "") + path.slice(matched.length) || "/";
  const rewritten = matched.matcher(path).replaceFirst(rewrite.path);
  return removeDots(rewritten.startsWith("/") ? rewritten : `/${rewritten}`);
}

// ---------------------------------------------------------------------------------------------------------------------
// 10. Strategies: which server takes a request. One function each, in one table that users may add to.
// ---------------------------------------------------------------------------------------------------------------------

const known = new WeakMap<Candidates, { even: boolean; heaviest: number; hashes: Uint32Array }>();

/** What the weights of these candidates are like. The list stays the same until a server flips, and so does the answer. */
const weightsOf = (candidates: Candidates) =>
  entry(known, candidates, () => {
    const heaviest = Math.max(...candidates.map(({ effective }) => effective));
    const even = candidates.every(({ effective }) => effective === heaviest);
    return { heaviest, even, hashes: Uint32Array.from(candidates, (server) => server.hash) };
  });

/** Smooth weighted round robin, nginx's: 5:1:1 gives a a b a c a a, shares are exact. Equal weights simply rotate. */
const roundRobin: Strategy = (candidates, { turn }) => {
  if (weightsOf(candidates).even) return candidates[turn % candidates.length]!;
  let best = candidates[0];
  let total = 0;
  for (const server of candidates) {
    server.current += server.effective;
    total += server.effective;
    if (server.current > best.current) best = server;
  }
  best.current -= total;
  return best;
};

/** The server with the least score; among equals the first, counted from `start`. */
function least(candidates: Candidates, score: (server: Server) => number, start = 0): Server {
  let best = candidates[start]!;
  let lowest = score(best);
  for (let i = 1, at = start; i < candidates.length; i++) {
    if (++at === candidates.length) at = 0;
    const server = candidates[at]!, value = score(server);
    if (!(value < lowest)) continue;
    best = server;
    lowest = value;
  }
  return best;
}

const busyness = (server: Server): number => server.inFlight / server.effective;

const withOneMore = (server: Server): number => (server.inFlight + 1) / server.effective;

/** Draws by weight without a sum: a server is accepted as often as its weight stands to the heaviest. */
function draw(candidates: Candidates, random: () => number, except?: Server): Server {
  const { heaviest } = weightsOf(candidates);
  for (;;) {
    const server = candidates[Math.floor(random() * candidates.length)]!;
    if (server !== except && (server.effective === heaviest || random() * heaviest < server.effective)) return server;
  }
}

const DECAY = 10_000; // milliseconds after which a latency counts for 1/e, as in Finagle's Peak EWMA
const LEAST_TIME = 0.01; // milliseconds: what is faster counts as that
const UNKNOWN = 1e12; // milliseconds: what a second request counts as where the first has not been answered yet
const NOISE = 2.5; // up to so many times the fastest is as good as equal: the peaks of equal servers differ that much

/** What is left of a server's latest peak. */
const recentOf = ({ recent, recentAt }: Server, now: number): number => recent * Math.exp((recentAt - now) / DECAY);

/** The time that a server takes of late; or the age of those that still wait, where it hangs and has not even been slow yet. */
function paceOf(server: Server, now: number): number {
  const { waiting, waitingSince } = server;
  if (server.recent === 0) return waiting && UNKNOWN; // one request finds out
  const recent = recentOf(server, now), age = waiting && now - waitingSince / waiting;
  return age > recent ? age : recent;
}

/** What one more request costs at a server, where the fastest takes `fastest`. */
function costOf(server: Server, now: number, fastest: number): number {
  const pace = paceOf(server, now);
  return (pace > NOISE * fastest ? pace : fastest) * (server.inFlight + 1) / server.effective;
}

/** The least cost of all, or of two at random where there are more than 8; among equals any. */
const peakEwma: Strategy = (candidates, { random, now }) => {
  if (candidates.length > 8) {
    const one = draw(candidates, random), other = draw(candidates, random, one);
    const fastest = Math.min(paceOf(one, now), paceOf(other, now));
    return costOf(other, now, fastest) < costOf(one, now, fastest) ? other : one;
  }
  let best = candidates[0], fastest = Infinity, lowest = Infinity, equals = 1;
  for (const server of candidates) fastest = Math.min(fastest, paceOf(server, now));
  for (const server of candidates) {
    const cost = costOf(server, now, fastest);
    if (cost > lowest || cost === lowest && random() * ++equals >= 1) continue;
    if (cost < lowest) equals = 1;
    [best, lowest] = [server, cost];
  }
  return best;
};

/** Takes note of how long a server has needed: a peak at once, what is less as far as time has passed. */
function noteTime(server: Server, milliseconds: number, now: number): void {
  const rest = Math.exp((server.recentAt - now) / DECAY), sample = Math.max(milliseconds, LEAST_TIME);
  server.recent = sample > server.recent ? sample : server.recent * rest + sample * (1 - rest);
  server.recentAt = now;
}

/** How far servers are from a key. */
function scoresFor(candidates: Candidates, key: string): (server: Server) => number {
  const seed = hash(key), { even } = weightsOf(candidates);
  const chance = (server: Server) => (mix(seed ^ server.hash) + 0.5) / 2 ** 32;
  return even ? (server) => -chance(server) : (server) => -Math.log(chance(server)) / server.effective;
}

/**
 * Rendezvous hashing by weight: each server scores the key and the least score takes it, so that a server that leaves
 * moves only its own keys.
 */
function rendezvous(candidates: Candidates, key: string, isFull: (server: Server) => boolean): Server {
  const { even, hashes } = weightsOf(candidates);
  const wanted = even ? candidates[farthest(hashes, hash(key))]! : least(candidates, scoresFor(candidates, key));
  if (!isFull(wanted)) return wanted;
  const score = scoresFor(candidates, key);
  return least(candidates, (server) => isFull(server) ? Infinity : score(server));
}

/** The first of the hashes that make the largest number with a seed: a thousand cost 2 us as numbers in a row, and 8 as servers. */
function farthest(hashes: Uint32Array, seed: number): number {
  let at = 0, most = -1;
  for (let i = 0; i < hashes.length; i++) {
    const chance = mix(seed ^ hashes[i]!);
    if (chance <= most) continue;
    most = chance;
    at = i;
  }
  return at;
}

/** Whether a server has over 125 % of its share of the requests in flight, and more than a handful (bounded load). */
function overloaded(candidates: Candidates): (server: Server) => boolean {
  const sum = (of: (server: Server) => number) => candidates.reduce((total, server) => total + of(server), 0);
  let all = 0, weights = 0; // not asked for as long as nobody has more than a handful
  return (server) => {
    if (server.inFlight < HANDFUL) return false;
    all ||= 1.25 * (sum(({ inFlight }) => inFlight) + 1);
    weights ||= sum(({ effective }) => effective);
    return server.inFlight >= Math.ceil(all * server.effective / weights); // in this order: exact where it can be
  };
}
const HANDFUL = 8;

/** The strategies of `strategy:` in routes.yml. */
export const strategies = {
  "round-robin": roundRobin,
  "first": (candidates) => candidates[0],
  "random": (candidates, { random }) => draw(candidates, random),
  "two-choices": (candidates, { random }) => {
    const one = draw(candidates, random);
    if (candidates.length <= 8) return least(candidates, busyness, candidates.indexOf(one));
    return least([one, draw(candidates, random, one)], busyness);
  },
  "least-connections": (candidates) => {
    const { heaviest } = weightsOf(candidates);
    let best = candidates[0];
    for (const one of candidates) {
      if ((one.inFlight + 1) * best.effective < (best.inFlight + 1) * one.effective) best = one;
      if (best.inFlight === 0 && best.effective === heaviest) break; // nobody can have less
    }
    return best;
  },
  "least-response-time": (candidates) => {
    let best = candidates[0];
    for (const one of candidates) {
      const ahead = one.latency - best.latency || one.picks / one.effective - best.picks / best.effective;
      if (ahead < 0) best = one;
    }
    return best;
  },
  "peak-ewma": peakEwma,
  "ip-hash": (candidates, { client }) => rendezvous(candidates, client, () => false),
  "hash": (candidates, { key }) => rendezvous(candidates, key, overloaded(candidates)),
} satisfies Record<string, Strategy>;

/** The scores of those that go by one. */
const SCORES: Record<string, Score> = {
  "two-choices": busyness,
  "least-connections": withOneMore,
  "least-response-time": ({ latency }) => latency,
  "peak-ewma": (server, candidates, { now }) =>
    costOf(server, now, Math.min(...candidates.map((one) => paceOf(one, now)))),
  "ip-hash": (server, candidates, { client }) => scoresFor(candidates, client)(server),
  "hash": (server, candidates, { key }) => scoresFor(candidates, key)(server),
};

const cookieOf: Read = ({ request }, name) => parseCookie(request.headers.get("cookie") ?? "", name)[name];
const KEYS = {
  header: headerOf,
  query: queryOf,
  cookie: cookieOf,
  path: ({ path }: Exchange) => path,
  client: ({ client }: Exchange) => client,
  none: () => null,
};

/** What `hash` hashes. A request without that header, cookie or parameter is hashed by its client's address. */
function keyOf({ by, key }: ServiceConfig["strategy"]): Service["key"] {
  const read: Read = KEYS[by];
  return (exchange) => read(exchange, key) ?? exchange.client;
}

// ---------------------------------------------------------------------------------------------------------------------
// 11. Health: which servers may be asked. Enabled is not healthy: requests eject for a time, probes take out and bring back.
// ---------------------------------------------------------------------------------------------------------------------

/** Whether a server is meant to be asked at all. One that drains still finishes what it has. */
const isEnabled = (server: Server): boolean => server.weight > 0 && server.state === "ready";

/** Whether a server may be asked, leaving aside how many requests it has. After an ejection one request tries it out. */
const isHealthy = (server: Server, now: number): boolean =>
  server.up && (server.until === 0 || now >= server.until && !server.trying);

/** How much of its weight a server has: all, or from the time when it came back 10 % and more. */
function partOf(server: Server, slowStart: number, now: number): number {
  const age = now - server.back;
  return age >= slowStart ? 1 : Math.max(0.1, age / slowStart);
}

/**
 * Who of a service may be asked: healthy servers; backups where none of the others is; all where too few are left, so
 * that the rest is not crushed (panic), unless none is left and another service can be asked. Kept until a server flips
 * or a time has passed that matters: the request path only reads it.
 */
function candidatesOf(service: Service, now: number): readonly Server[] {
  if (now < service.candidatesUntil) return service.candidates;
  const { servers, config: { panic, fallback, slow_start } } = service;
  for (const server of servers) server.effective = server.weight * partOf(server, slow_start, now);
  const weighted = servers.filter(isEnabled);
  const healthy = weighted.filter((server) => isHealthy(server, now));
  const regulars = weighted.filter((server) => !server.backup);
  const ready = healthy.filter((server) => !server.backup);
  const backups = healthy.filter((server) => server.backup);
  const few = ready.length < regulars.length * panic;
  service.panicking = few && backups.length === 0 && (ready.length > 0 || !fallback);
  service.candidates = service.panicking
    ? regulars.length ? regulars : weighted
    : withoutPaused(service, ready.length ? ready : backups, now);
  service.candidatesUntil = Math.min(...servers.map((server) => nextChange(server, slow_start, now)));
  return service.candidates;
}

/** Who has asked to be left alone is, as if it were full; but not where that is more of them than may be ejected. */
function withoutPaused({ config }: Service, servers: readonly Server[], now: number): readonly Server[] {
  const rest = servers.filter((server) => now >= server.pausedUntil);
  return rest.length > 0 && rest.length >= servers.length * (1 - config.eject.at_most) ? rest : servers;
}

/** When time alone changes how a server stands. */
function nextChange(server: Server, slowStart: number, now: number): number {
  const times = [server.until, server.pausedUntil, ...partOf(server, slowStart, now) < 1 ? [now + slowStart / 50] : []];
  return Math.min(...times.filter((time) => time > now));
}

/** The servers of a service that may take one more request: that is read at every pick. */
function withRoom(service: Service, servers: readonly Server[]): readonly Server[] {
  return service.bounded ? servers.filter((server) => server.inFlight < server.limit) : servers;
}

const FIRST_LIMIT = 8; // for a server of which nothing is known
const LEAST_LIMIT = 2;
const TOLERANCE = 1.5; // times the calm latency
const PULSE = { time: 250, answers: 10 }; // at least, until the limit is thought over

/**
 * Finds the limit of a server for `max_in_flight: auto`, by the gradient of its latency as in Netflix's
 * concurrency-limits: as long as that is what it is in calm times there is room for a few more, the root of the limit;
 * where it is worse, the limit shrinks by as much. At its least, a server is as calm as it will ever be.
 */
function findLimit(server: Server, milliseconds: number, refused: boolean, now: number): void {
  const { pulse, limit } = server;
  pulse.answers++;
  pulse.sum += milliseconds;
  pulse.most = Math.max(pulse.most, server.inFlight);
  pulse.refused ||= refused;
  if (now - pulse.since < PULSE.time || pulse.answers < PULSE.answers) return;
  const mean = Math.max(pulse.sum / pulse.answers, LEAST_TIME), busy = pulse.most >= limit / 2;
  const isCalm = !busy || limit <= LEAST_LIMIT || mean < pulse.calm;
  const calm = !pulse.calm ? mean : isCalm ? pulse.calm + 0.1 * (mean - pulse.calm) : pulse.calm;
  if (busy) {
    const gradient = Math.min(1, Math.max(0.5, TOLERANCE * calm / mean));
    const next = pulse.refused ? 0.9 * limit : limit * gradient + Math.sqrt(limit);
    server.limit = Math.min(server.max, Math.max(LEAST_LIMIT, next));
  }
  server.pulse = newPulse(calm, now);
}

/** A request is on its way to a server: until `onHeard` it waits. */
function onAsked(server: Server, now: number): void {
  server.waiting++;
  server.waitingSince += now;
}

/** The head of an answer has come, or none will: the request that began then waits no longer. */
function onHeard(server: Server, began: number): void {
  server.waiting--;
  server.waitingSince = server.waiting && server.waitingSince - began;
}

/** What a failure counts as: who fails fast shall not look attractive. */
const asSlow = ({ usual }: Service, milliseconds: number): number => Math.max(milliseconds, 10 * (usual || 100));

/**
 * Ejects a server for a time that grows with each time in a row, at most a share of its pool. What was known of it is
 * forgotten: it is new when it returns. False where no more may be ejected.
 */
function eject(service: Service, server: Server, why: string, effects: Effects): boolean {
  const { failures, for: unit, at_most } = service.config.eject;
  const others = service.servers.filter((other) => other !== server && other.until !== 0).length;
  if (others + 1 > service.servers.length * at_most) return false;
  const now = effects.now();
  server.ejections = Math.min(server.ejections + 1, 10);
  server.until = now + unit * server.ejections;
  server.trying = false;
  server.ejected++;
  server.since = now;
  server.failures = failures - 1; // so that a trial whose body breaks off is the last straw
  Object.assign(server, unheard);
  service.candidatesUntil = 0;
  const seconds = unit * server.ejections / 1_000;
  effects.report("warn", `${service.name}: ${server.name} is ejected for ${seconds} s ${why}`);
  return true;
}

/** A server has one request more. On trial it gets one; the others pass it by until that one's verdict. */
function onPicked(service: Service, server: Server, now: number): void {
  server.picks++;
  server.inFlight++;
  if (server.until === 0 || now < server.until) return; // where all are asked, those who are ejected are
  server.trying = true;
  service.candidatesUntil = 0;
}

/** Whether an attempt tries its server out: it began after the ejection. What was on its way before says nothing new. */
const isTrial = (server: Server, began: number): boolean => began >= server.until;

/** How a trial ended: with an answer, so that the server is back; with a failure (why); or undecided, so that another follows. */
function onTried(service: Service, server: Server, verdict: "back" | "undecided" | { why: string }, effects: Effects) {
  server.trying = false;
  service.candidatesUntil = 0;
  if (verdict === "undecided" || typeof verdict === "object" && eject(service, server, verdict.why, effects)) return;
  server.until = 0;
  server.slow = false;
  server.since = server.back = effects.now();
  effects.report("info", `${service.name}: ${server.name} is up again`);
}

/** A request to a server has failed, before its answer or in it. Enough of them in a row eject it; so does one on trial. */
function onFailed(service: Service, server: Server, began: number, effects: Effects): void {
  const { failures } = service.config.eject;
  if (server.until !== 0) {
    if (isTrial(server, began)) onTried(service, server, { why: "after a failed trial" }, effects);
    return;
  }
  if (++server.failures < failures) return;
  if (eject(service, server, `after ${failures} failures in a row`, effects)) server.slow = false;
}

/** A whole answer ends a run of failures; one well after the last ejection also forgets how often there was one. */
function onAnswered(service: Service, server: Server, effects: Effects): void {
  if (server.until !== 0) return;
  server.failures = 0;
  if (server.ejections > 0 && effects.now() > server.back + service.config.eject.for) server.ejections = 0;
}

const MEMORY = 64; // attempts: older ones fade

/** What an attempt says about a server: how long it took, and whether that was good. */
function note(service: Service, server: Server, good: boolean, milliseconds: number, now: number): void {
  if (service.config.max_in_flight === AUTO) findLimit(server, milliseconds, !good, now);
  server.judged++;
  server.failing += (Number(!good) - server.failing) / Math.min(server.judged, MEMORY);
  if (!good) return noteTime(server, asSlow(service, milliseconds), now);
  const first = 1 / ++server.samples, sample = Math.max(milliseconds, LEAST_TIME);
  server.latency += (milliseconds - server.latency) * Math.max(first, 1 / MEMORY);
  const part = Math.max(first, Math.min(1 / MEMORY, 1 - Math.exp((server.recentAt - now) / DECAY)));
  server.typical = first === 1 ? sample : server.typical * (sample / server.typical) ** part;
  service.usual += (milliseconds - service.usual) / (service.usual ? MEMORY : 1);
  noteTime(server, milliseconds, now);
}

/** The head of an answer. A 5xx is a failure for those who compare; a 429 says that the server has enough to do. */
function onHead(service: Service, server: Server, status: number, began: number, now: number, effects: Effects): void {
  const milliseconds = now - began;
  server.answers++;
  if (server.until !== 0 && isTrial(server, began)) {
    const still = server.slow && isSlow(service, milliseconds);
    const why = status >= 500
      ? `after a trial with ${status}`
      : `because it still takes ${Math.round(milliseconds)} ms`;
    onTried(service, server, status >= 500 || still ? { why } : "back", effects);
  }
  if (server.until !== 0) return;
  if (status === 429) {
    noteTime(server, asSlow(service, milliseconds), now);
    if (service.config.max_in_flight === AUTO) findLimit(server, milliseconds, true, now);
  } else note(service, server, status < 500, milliseconds, now);
}

/** An attempt was given up, because another one was faster: its server takes at least as long as it has taken so far. */
function onGivenUp(service: Service, server: Server, began: number, effects: Effects): void {
  const now = effects.now(), milliseconds = now - began;
  if (server.until === 0) {
    if (milliseconds > server.typical) note(service, server, true, milliseconds, now);
  } else if (isTrial(server, began) && server.slow && isSlow(service, milliseconds)) {
    onTried(service, server, { why: `because it still takes more than ${Math.round(milliseconds)} ms` }, effects);
  }
}

/** No answer has come, and that is the server's fault. */
function onSilence(service: Service, server: Server, began: number, now: number, effects: Effects): void {
  if (server.until === 0) note(service, server, false, now - began, now);
  onFailed(service, server, began, effects);
}

const LEAST_COMPARED = 3; // servers
const LEAST_SAMPLES = 20; // good answers of each
const NEGLIGIBLE = 5; // milliseconds: nobody minds so much more
const DEVIATIONS = 1.9; // below the mean of the others' success rates, as in Envoy
const LEAST_GAP = 0.1; // between success rates

/** Whether a time is out of all proportion to what the pool needs. */
function isSlow({ median, config }: Service, milliseconds: number): boolean {
  return median > 0 && milliseconds > Math.max(config.eject.slow * median, median + NEGLIGIBLE);
}

/** What is typical of a server, where those that wait longer than that count as if they were answered now; 0: not known. */
function typicalOf({ typical, samples, load, waiting, waitingSince }: Server, now: number): number {
  const age = waiting && now - waitingSince / waiting, late = age > typical && waiting >= LEAST_SAMPLES ? waiting : 0;
  if (samples + late < LEAST_SAMPLES) return 0;
  const known = Math.min(samples, Math.max(MEMORY, load * DECAY / 1_000));
  return late ? Math.exp((known * Math.log(typical || 1) + late * Math.log(age)) / (known + late)) : typical;
}

/** The middle of some numbers. */
function medianOf(numbers: number[]): number {
  const sorted = numbers.sort((a, b) => a - b), half = sorted.length / 2;
  return (sorted[Math.floor(half)]! + sorted[Math.ceil(half) - 1]!) / 2;
}

/** Once a second, beside a request: who is much slower than the others, or fails more often, is ejected. */
function compare(service: Service, now: number, effects: Effects): void {
  const seconds = Math.max(now - service.comparedAt, 1) / 1_000; // a reload may have it done again at once
  service.comparedAt = now;
  service.compareAt = now + 1_000;
  for (const server of service.servers) {
    server.load += ((server.picks - server.picksThen) / seconds - server.load) *
      (1 - Math.exp(-1_000 * seconds / DECAY));
    server.picksThen = server.picks;
  }
  const some = service.servers.filter((server) => server.until === 0 && server.up && isEnabled(server));
  const warm = some.filter((server) => now - server.back >= service.config.slow_start); // that is what it is for
  ejectSlow(service, warm, now, effects);
  ejectFailing(service, some.filter((server) => server.until === 0 && server.judged >= MEMORY), effects);
}

/** How many requests each of these has in flight, in the mean. */
const crowdOf = (servers: Server[]): number =>
  servers.reduce((sum, { inFlight }) => sum + inFlight, 0) / servers.length;

/**
 * Ejects those that take much longer than the others, unless that is because they have more to do. A pool that is busy
 * needs everybody, and a slow server is better than a queue: the more are out, the slower the next one has to be; and
 * where the others then have three times as much to do, the slow ones are asked again, and left in peace for a while.
 */
function ejectSlow(service: Service, some: Server[], now: number, effects: Effects): void {
  const out = service.servers.filter(({ slow, until }) => slow && until !== 0);
  if (out.length > 0 && crowdOf(some) > 3 * service.crowd + 2) return askAgain(service, out, now, effects);
  const timed = some.map((server) => ({ server, time: typicalOf(server, now) })).filter(({ time }) => time > 0);
  if (timed.length < LEAST_COMPARED) return;
  service.median = medianOf(timed.map(({ time }) => time));
  const load = medianOf(timed.map(({ server }) => server.load / server.effective));
  for (const { server, time } of timed.sort((a, b) => b.time - a.time)) {
    const ejected = service.servers.filter(({ until }) => until !== 0).length;
    if (!isSlow(service, time / (1 + 10 * ejected / service.servers.length)) || now < service.peaceUntil) return;
    if (server.load / server.effective > 1.1 * load) continue;
    const why = `because it takes ${Math.round(time)} ms where ${Math.round(service.median)} ms are usual`;
    if (out.length === 0) service.crowd = crowdOf(some.filter((other) => other !== server));
    if (eject(service, server, why, effects)) out.push(server), server.slow = true;
  }
}

/** Ends ejections that have made matters worse. */
function askAgain(service: Service, out: Server[], now: number, effects: Effects): void {
  for (const server of out) {
    Object.assign(server, { until: 0, trying: false, slow: false, since: now, back: now });
    effects.report("warn", `${service.name}: ${server.name} is asked again: without it the others have too much to do`);
  }
  service.candidatesUntil = 0;
  service.peaceUntil = now + 2 * service.config.eject.for;
}

/** Ejects those whose success rate is out of line with that of all who do better. */
function ejectFailing(service: Service, judged: Server[], effects: Effects): void {
  const [worst, ...others] = judged.sort((a, b) => b.failing - a.failing);
  if (worst === undefined || others.length < LEAST_COMPARED - 1) return;
  const mean = others.reduce((sum, { failing }) => sum + failing, 0) / others.length;
  const variance = others.reduce((sum, { failing }) => sum + (failing - mean) ** 2, 0) / others.length;
  if (worst.failing <= mean + Math.max(DEVIATIONS * Math.sqrt(variance), LEAST_GAP)) return;
  const why = `because ${Math.round(100 * worst.failing)} % of its answers fail`;
  if (!eject(service, worst, why, effects)) return;
  worst.slow = false;
  ejectFailing(service, others, effects);
}

/** A server has said when to come again (Retry-After, RFC 9110 section 10.2.3): that long, but no longer than an ejection. */
function onRetryAfter(service: Service, server: Server, value: string, effects: Effects): void {
  const at = value.endsWith("GMT") ? Date.parse(value) : NaN;
  const wait = /^\d+$/.test(value) ? Number(value) * 1_000 : at - effects.date().getTime();
  if (!(wait > 0)) return;
  server.pausedUntil = effects.now() + Math.min(wait, service.config.eject.for);
  service.candidatesUntil = 0;
}

const SAMPLES = 500; // answers that a quantile comes from
const LEARNED = 100; // answers after which it can be relied on

/** Works out anew, every 50 answers, how long most of the latest took. */
function learnPatience(service: Service, milliseconds: number): void {
  const { times, hedge } = service;
  times[service.measured++ % SAMPLES] = milliseconds;
  if (service.measured % 50 !== 0) return;
  const sorted = times.slice(0, service.measured).sort();
  service.patience = sorted[Math.floor(hedge * sorted.length)]!;
}

// ---------------------------------------------------------------------------------------------------------------------
// 12. Probes: asking servers how they are.
// ---------------------------------------------------------------------------------------------------------------------

/** Counts a probe's verdict: `rise` or `fall` of them in a row flip the server, and each flip is reported once. */
function onProbed(service: Service, server: Server, problem: string | undefined, effects: Effects): void {
  const { rise, fall } = service.config.health;
  const wasUp = server.up;
  const now = server.probedAt = effects.now();
  const wasEjected = now < server.until && !server.slow; // a probe says nothing about that
  server.probeProblem = problem ?? "";
  if (problem === undefined) server.probesPassed++;
  else server.probesFailed++;
  server.passes = problem === undefined ? server.passes + 1 : 0;
  server.fails = problem === undefined ? 0 : server.fails + 1;
  if (problem === undefined && wasEjected) server.until = now; // it may be tried out at once
  if (wasUp ? server.fails >= fall : server.passes >= rise) server.up = !wasUp;
  if (server.up === wasUp && (!wasEjected || problem !== undefined)) return;
  service.candidatesUntil = 0;
  server.since = now;
  if (server.up === wasUp) return;
  if (server.up) server.back = now;
  if (wasUp && !server.up) effects.report("warn", `${service.name}: ${server.name} is down: ${problem}`);
  else effects.report("info", `${service.name}: ${server.name} is up`);
}

const untimed = { startedAt: 0, connectedAt: 0, headAt: 0, uploaded: 0 };

/** What an operator says of a server. It holds until probes say otherwise. */
function onTold(service: Service, server: Server, up: boolean, effects: Effects): void {
  effects.told(service, server, up);
  if (server.up !== up || up && server.until > 0) server.since = effects.now();
  Object.assign(server, { up, passes: 0, fails: 0, failures: 0 }, up && { until: 0, ejections: 0 });
  service.candidatesUntil = 0;
}

/** One probe over HTTP: what is wrong with the answer, or undefined. Its body is read to the end or cancelled. */
async function askHealth(service: Service, server: Server, effects: Effects, giveUp: AbortController) {
  const { health } = service.config;
  const { timeout } = health;
  const attempt: Attempt = {
    method: health.method,
    headers: ["host", server.host || hostOf(server.url), "user-agent", "lb.ts probe", ...[...health.headers].flat()],
    body: null,
    length: 0,
    wrapped: false,
    request: giveUp,
    server,
    timeouts: { connect: timeout, response: timeout, idle: timeout, request: Infinity },
    inbound: (headers) => headers,
    ended: () => {},
    ...untimed,
  };
  const response = await effects.fetch(server.url + health.path, attempt);
  const { status } = response;
  if (!health.expect.some(([from, to]) => status >= from && status <= to)) {
    await response.body?.cancel();
    return `status ${status}`;
  }
  if (health.body === "") return await response.body?.cancel();
  return (await response.text()).includes(health.body) ? undefined : `the body lacks ${JSON.stringify(health.body)}`;
}

/** One probe: what is wrong with the server, or undefined. */
async function probe(service: Service, server: Server, effects: Effects): Promise<string | undefined> {
  const { kind, timeout } = service.config.health;
  const giveUp = new AbortController();
  const asked = kind === "tcp" ? effects.connect(server, timeout) : askHealth(service, server, effects, giveUp);
  const late = effects.sleep(timeout, giveUp.signal).then(() => `no answer within ${timeout} ms`);
  try {
    return await Promise.race([asked, late]) ?? undefined;
  } catch (error) {
    return error instanceof Error ? error.message : String(error);
  } finally {
    giveUp.abort();
  }
}

/** Probes every server that is due and resolves when all verdicts are in. Each is due again after its interval +-10 %. */
export async function probeDue(table: Table, effects: Effects): Promise<void> {
  const now = effects.now();
  const due = [...table.services.values()].filter(({ config }) => config.health.kind !== "off").flatMap((service) =>
    service.servers.filter((server) => server.probeAt <= now && server.state !== "maint").map((server) =>
      [service, server] as const
    )
  );
  await Promise.all(due.map(async ([service, server]) => {
    server.probeAt = now + service.config.health.interval * (0.9 + 0.2 * effects.random());
    const begun = effects.now();
    const problem = await probe(service, server, effects);
    onProbed(service, server, problem, effects);
    effects.probed(service, server, problem);
    server.probeTook = server.probedAt - begun;
  }));
}

// ---------------------------------------------------------------------------------------------------------------------
// 13. Messages: HTTP/1.1 as bytes. Strict on what comes from servers: what could mean two things is refused.
// ---------------------------------------------------------------------------------------------------------------------

type Bytes = Buffer<ArrayBuffer>;

const MAX_HEAD = 65_536; // bytes of an answer's head, of all its 1xx answers, and of its trailers
const MAX_FIELDS = 1_000; // of a head: Deno's Headers take quadratic time
const MAX_CHUNK_LINE = 1_024;

/** The grammar of a head (RFC 9112 sections 4 and 5): no bare CR or LF, no folding, no space before a colon. */
const HEAD =
  /^HTTP\/1\.[01] [1-5]\d\d(?: [\t\x20-\x7e\x80-\xff]*)?(?:\r\n[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*)*$/;
const CHUNK_LINE = /^([0-9a-f]{1,12})[\t ]*(?:;[\t\x20-\x7e\x80-\xff]*)?$/i;
const TRAILER = /^[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*$/;

/** How the end of a body is found (RFC 9112 section 6.3), and in a chunked one what comes next. */
type Framing = "none" | "length" | "close" | "chunk-size" | "chunk" | "chunk-end" | "trailer";

interface Head {
  readonly status: number;
  readonly headers: readonly string[]; // name, value, ...: without those that end at this hop
  readonly framing: Framing;
  readonly length: number; // where framing is "length"
  readonly upgrade: string; // the protocol that it switches to
  readonly keepAlive: number; // milliseconds for which the server keeps the connection; 0: it closes
}

/** What a header of an answer is to us; `pass`: nothing. */
type Role = "pass" | "hop" | "content-length" | "transfer-encoding" | "connection" | "keep-alive" | "upgrade";
const ROLES: Record<string, Role> = {
  "connection": "connection",
  "content-length": "content-length",
  "keep-alive": "keep-alive",
  "proxy-connection": "hop",
  "te": "hop",
  "trailer": "hop",
  "transfer-encoding": "transfer-encoding",
  "upgrade": "upgrade",
};

/** A field's name in lower case, and its role. */
const fieldOf = memo((spelled): { name: string; role: Role } => {
  const name = spelled.toLowerCase();
  return { name, role: Object.hasOwn(ROLES, name) ? ROLES[name]! : "pass" };
});

/** The headers that `Connection` names: they are for this hop only (RFC 9110 section 7.6.1). */
const connectionNames = memo((connection): ReadonlySet<string> => {
  const names = new Set(connection.toLowerCase().split(",").map((token) => token.trim()));
  for (const word of ["", "close", "keep-alive", "te", "upgrade"]) names.delete(word);
  return names;
});

/** Whether headers have this name, which is in lower case as theirs are; a value that reads like it is none. */
function hasName(headers: readonly string[], name: string): boolean {
  let at = headers.indexOf(name);
  while (at % 2 === 1) at = headers.indexOf(name, at + 1);
  return at >= 0;
}

/** A list of headers without some names. */
const without = (headers: readonly string[], names: ReadonlySet<string>): string[] =>
  headers.filter((_, i) => !names.has(headers[i & ~1]!.toLowerCase()));

/** A Response. Appending costs a third of what `new Response` takes for a record or for pairs, on Deno (1.1 us, 3.3 us). */
export function newResponse(body: BodyInit | null, status: number, headers: readonly string[]): Response {
  const response = new Response(body, { status });
  for (let i = 0; i < headers.length; i += 2) response.headers.append(headers[i]!, headers[i + 1]!);
  return response;
}

/** The same headers as pairs. */
function pairs(headers: readonly string[]): [string, string][] {
  return Array.from({ length: headers.length / 2 }, (_, i) => [headers[2 * i]!, headers[2 * i + 1]!]);
}

/** The text up to the empty line. Looked for as text, because Deno takes six times as long to find it in the bytes. */
function headText(bytes: Bytes): string | undefined {
  for (const window of [2_048, MAX_HEAD + 4]) {
    const text = bytes.toString("latin1", 0, window);
    const end = text.indexOf("\r\n\r\n");
    if (end >= 0) return text.slice(0, end);
    if (text.length < window) break;
  }
  return undefined;
}

/** A slice without the blanks and tabs around it; `trim` would also take bytes that belong to the value. */
function trimmed(text: string, start: number, end: number): string {
  const blank = (at: number) => text.charCodeAt(at) === 32 || text.charCodeAt(at) === 9;
  while (start < end && blank(start)) start++;
  while (end > start && blank(end - 1)) end--;
  return text.slice(start, end);
}

/** Reads a head; a sentence where it is invalid or ambiguous. `method` is that of the request. */
function readHead(text: string, method: string): Head | string {
  if (!HEAD.test(text)) return "its head is not that of HTTP/1.1";
  const status = Number(text.slice(9, 12));
  const modern = text[7] === "1";
  const headers: string[] = [];
  let [length, encoding, connection, upgrade, idle] = ["", "", "", "", Infinity];
  for (let line = text.indexOf("\r\n"), next; line >= 0; line = next) {
    next = text.indexOf("\r\n", line + 2);
    const colon = text.indexOf(":", line);
    const { name, role } = fieldOf(text.slice(line + 2, colon));
    const value = trimmed(text, colon + 1, next < 0 ? text.length : next);
    if (role === "pass") headers.push(name, value);
    else if (role === "content-length") {
      if (length || !/^\d{1,15}$/.test(value)) return `its Content-Length is ${length ? "there twice" : "no number"}`;
      length = value;
      if (status !== 204 && status !== 205) headers.push(name, value);
    } else if (role === "transfer-encoding") encoding += `,${value}`;
    else if (role === "connection") connection = connection ? `${connection},${value}` : value;
    else if (role === "upgrade") upgrade = value;
    else if (role === "keep-alive") idle = 1_000 * Number(/timeout=(\d+)/i.exec(value)?.[1] ?? Infinity);
  }
  if (headers.length > 2 * MAX_FIELDS) return `it has more than ${MAX_FIELDS} headers`;
  if (encoding && (length || !modern || encoding.toLowerCase() !== ",chunked")) return "its length is ambiguous";
  const empty = method === "HEAD" || status < 200 || status === 204 || status === 205 || status === 304;
  if (status === 205) headers.push("content-length", "0");
  const framing = empty ? "none" : encoding ? "chunk-size" : length ? "length" : "close";
  const persistent = !/close/i.test(connection) && (modern || /keep-alive/i.test(connection));
  const excess = (status === 204 || status === 205) && (encoding !== "" || Number(length) > 0); // may follow, unread
  const hop = connectionNames(connection);
  return {
    status,
    headers: hop.size ? without(headers, hop) : headers,
    framing,
    length: Number(length),
    upgrade: /\bupgrade\b/i.test(connection) ? upgrade.toLowerCase() : "",
    keepAlive: persistent && framing !== "close" && !excess ? idle : 0,
  };
}

/** Within a second most answers of a server have the same head: that saves 0.6 us of reading. */
const knownHead = memo((text) => readHead(text, "GET"), 1_024);

/** An answer that is being read: what is left to come, and bytes that do not yet make a head or a line. */
type Reading = typeof unread;
const unread = {
  head: undefined as Head | undefined,
  keepAlive: 0, // as the head says; 0 as soon as more came than was announced
  framing: "none" as Framing,
  left: 0, // bytes of the body, or of the chunk, that are still to come
  rest: undefined as Bytes | undefined,
  overhead: 0, // bytes of 1xx answers; then of framing since the last data
};

/** Reads up to the body; the bytes behind the head, undefined where more must come, or what is wrong. */
function takeHead(reading: Reading, bytes: Bytes, method: string): Bytes | undefined | string {
  for (;;) {
    const text = headText(bytes);
    if (reading.overhead + (text?.length ?? bytes.length - 3) > MAX_HEAD) return "its head is longer than 64 KiB";
    if (text === undefined) {
      reading.rest = bytes;
      return "HTTP/1.".startsWith(bytes.toString("latin1", 0, 7)) ? undefined : "it is not HTTP/1.1";
    }
    const head = method === "HEAD" ? readHead(text, method) : knownHead(text);
    if (typeof head === "string") return head;
    bytes = bytes.subarray(text.length + 4);
    if (head.status >= 200 || head.status === 101) {
      reading.head = head;
      reading.keepAlive = head.keepAlive;
      reading.framing = head.framing;
      reading.left = head.length;
      reading.overhead = 0;
      return bytes;
    }
    reading.overhead += text.length + 4; // 100, 102 and 103 are not the answer
  }
}

/** Adds the body's bytes to `out`; true at its end, or what is wrong. More than was announced is never kept for later. */
function takeBody(reading: Reading, bytes: Bytes, out: Bytes[]): boolean | string {
  switch (reading.framing) {
    case "none":
      if (bytes.length) reading.keepAlive = 0;
      return true;
    case "close":
      if (bytes.length) out.push(bytes);
      return false;
    case "length":
      if (bytes.length > reading.left) reading.keepAlive = 0;
      if (bytes.length && reading.left) out.push(bytes.length > reading.left ? bytes.subarray(0, reading.left) : bytes);
      reading.left = Math.max(0, reading.left - bytes.length);
      return reading.left === 0;
    default:
      return takeChunks(reading, bytes, out);
  }
}

/** The same for a chunked body, with its extensions and trailers, which end here. */
function takeChunks(reading: Reading, bytes: Bytes, out: Bytes[]): boolean | string {
  let at = 0;
  while (reading.framing !== "none") {
    if (reading.framing === "chunk") {
      if (at === bytes.length) return false;
      const data = bytes.subarray(at, at + reading.left);
      out.push(data);
      at += data.length;
      reading.left -= data.length;
      reading.overhead = 0;
      if (reading.left === 0) reading.framing = "chunk-end";
      continue;
    }
    const end = bytes.indexOf("\r\n", at);
    const size = (end < 0 ? bytes.length : end) - at;
    if (reading.overhead + size > (reading.framing === "trailer" ? MAX_HEAD : MAX_CHUNK_LINE)) {
      return "a line is too long";
    }
    if (end < 0) {
      if (size) reading.rest = bytes.subarray(at);
      return false;
    }
    const problem = takeLine(reading, bytes.toString("latin1", at, end));
    if (problem) return problem;
    reading.overhead += size;
    at = end + 2;
  }
  return takeBody(reading, bytes.subarray(at), out);
}

/** One line of chunked framing: a size, the end of a chunk, a trailer, or the end of all. */
function takeLine(reading: Reading, line: string): string | undefined {
  switch (reading.framing) {
    case "chunk-size": {
      const size = CHUNK_LINE.exec(line)?.[1];
      if (size === undefined) return "a chunk has no size";
      reading.left = parseInt(size, 16);
      reading.framing = reading.left ? "chunk" : "trailer";
      return undefined;
    }
    case "chunk-end":
      reading.framing = "chunk-size";
      return line === "" ? undefined : "a chunk is longer than its size";
    default:
      if (line === "") reading.framing = "none";
      return line === "" || TRAILER.test(line) ? undefined : "a trailer is not valid";
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// 14. Wire: one request and its answer over one connection. The runtimes' own fetch is slow for a proxy and changes what passes.
// ---------------------------------------------------------------------------------------------------------------------

/** Why there is no answer, or no whole answer. FAILURES says what the client is told. */
export type Failure =
  | "connect" // refused, unreachable, no such name, or TLS failed
  | "connect-timeout"
  | "reset" // closed or reset before the answer was whole
  | "invalid-answer" // not HTTP/1.1, or ambiguous
  | "timeout" // no head of an answer in time
  | "idle" // silence in the middle of an answer
  | "client-left"
  | "client-timeout" // silence in the middle of the request's body, or nobody reads the answer
  | "bad-body" // the request's body is longer or shorter than it said
  | "body-too-large";

/** What `Effects.fetch` rejects with. `sent`: the server may have seen some of the request. */
export class WireError extends Error {
  override name = "WireError";
  readonly kind: Failure;
  readonly sent: boolean;
  constructor(kind: Failure, sent: boolean, detail: string) {
    super(detail);
    this.kind = kind;
    this.sent = sent;
    this.stack = `${this.name}: ${detail}`; // where it was thrown says nothing, and runtimes print it
  }
}

const MAX_AGE = 60_000; // milliseconds: an older connection is not used again, so that names are resolved again
const IDLE = 4_000; // milliseconds: below the 5 s after which Node's servers close
const TICK = 100; // milliseconds between two looks at all connections: how exact timeouts are
const MOST_LATE = 1_000; // milliseconds between two looks after which the process has stood still
const WINDOW = 262_144; // bytes of a body that wait for a slow reader before the socket is paused

/** One attempt on its way: the request that goes out and the answer that comes in. */
type Transfer = ReturnType<typeof newTransfer>;
const newTransfer = (
  attempt: Attempt,
  target: string, // path and query
  resolve: (response: Response) => void,
  reject: (error: WireError) => void,
) => ({
  ...unread, // first, where a spread costs least
  attempt,
  target,
  resolve,
  reject,
  since: 0, // when something last passed
  sent: false, // the whole request is out
  upload: undefined as ReadableStreamDefaultReader<Uint8Array> | undefined,
  drained: undefined as (() => void) | undefined, // the upload waits for room in the socket
  bytes: 0, // of the answer's body that came
  sink: undefined as ReadableStreamDefaultController<Uint8Array<ArrayBuffer>> | undefined,
  paused: false, // the socket waits for a slow reader
});

/** One connection to a server. */
interface Connection {
  socket: Socket;
  pool: Connection[];
  bornAt: number;
  idleUntil: number;
  reused: boolean;
  connected: boolean;
  transfer: Transfer | undefined; // undefined: idle
  taker: Taker | undefined; // it is no longer HTTP's
}

/** All connections of one balancer, and what differs between runtimes and in tests. */
interface Wire {
  now: () => number;
  time: number; // when it was last asked: at most a TICK ago while there are connections
  /** `wrapped`: middleware may look at it before the runtime does. */
  newResponse: (body: BodyInit | null, status: number, headers: readonly string[], wrapped: boolean) => Response;
  dial: (server: Server) => Socket;
  reopen: (transfer: Transfer) => void; // the same once more, on a fresh connection
  connections: Set<Connection>;
  pools: WeakMap<Server, Connection[]>; // idle ones, the newest last
  timer: ReturnType<typeof setInterval> | undefined;
  sweptAt: number; // when it last looked at all connections
}

const CLOSED = "it closed the connection";

const BODY_EXPECTED = new Set(["POST", "PUT", "PATCH"]);

/** Writes the request: its head as one string, and a body in hand right behind it. */
function send(wire: Wire, connection: Connection, transfer: Transfer): void {
  const { attempt: { method, headers, body, length }, target } = transfer;
  const { socket } = connection;
  let head = `${method} ${target} HTTP/1.1\r\n`;
  for (let i = 0; i < headers.length; i += 2) head += `${headers[i]}: ${headers[i + 1]}\r\n`;
  const size = body instanceof ReadableStream ? length : body?.byteLength ?? 0;
  if (size < 0) head += "transfer-encoding: chunked\r\n";
  else if (body !== null || BODY_EXPECTED.has(method)) head += `content-length: ${size}\r\n`;
  transfer.since = transfer.attempt.connectedAt = wire.time;
  if (body === null) {
    socket.write(head + "\r\n", "latin1");
    transfer.sent = true;
    return;
  }
  socket.cork();
  socket.write(head + "\r\n", "latin1");
  if (body instanceof Uint8Array) transfer.sent = socket.write(body) || true;
  else upload(wire, connection, transfer, body);
  socket.uncork();
}

/** Passes a request's body on as it comes, no faster than the server takes it, and holds it to its announced length. */
async function upload(wire: Wire, connection: Connection, transfer: Transfer, body: ReadableStream<Uint8Array>) {
  const { socket } = connection;
  const { length } = transfer.attempt;
  let passed = 0;
  try {
    const reader = transfer.upload = body.getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (connection.transfer !== transfer) return;
      transfer.since = wire.time;
      if (done) break;
      if (value.byteLength === 0) continue; // as a chunk it would end the body
      transfer.attempt.uploaded = passed += value.byteLength;
      if (length >= 0 && passed > length) throw new WireError("bad-body", true, "the body is longer than it said");
      const room = length >= 0 ? socket.write(value) : writeChunk(socket, value);
      if (!room) await new Promise<void>((resolve) => transfer.drained = resolve);
      transfer.drained = undefined;
      if (connection.transfer !== transfer) return;
    }
    if (length >= 0 && passed < length) throw new WireError("bad-body", true, "the body is shorter than it said");
    if (length < 0) socket.write("0\r\n\r\n", "latin1");
    transfer.sent = true;
  } catch (error) {
    if (connection.transfer !== transfer) return;
    if (error instanceof WireError) return fail(wire, connection, error.kind, error.message);
    const left = transfer.attempt.request.signal.aborted; // otherwise its framing was wrong
    fail(wire, connection, left ? "client-left" : "bad-body", String(error));
  }
}

function writeChunk(socket: Socket, data: Uint8Array): boolean {
  socket.cork();
  socket.write(data.byteLength.toString(16) + "\r\n", "latin1");
  socket.write(data);
  const room = socket.write("\r\n", "latin1");
  socket.uncork();
  return room;
}

/** Bytes from the server, in whatever portions the network makes. */
function onData(wire: Wire, connection: Connection, data: Bytes): void {
  const { transfer } = connection;
  if (connection.taker) return connection.taker.data(data);
  if (transfer === undefined) return void connection.socket.destroy(); // nobody asked for that
  if (transfer.head) transfer.since = wire.time = wire.now(); // until then `response` is a deadline, whatever trickles in
  const bytes = transfer.rest === undefined ? data : Buffer.concat([transfer.rest, data]);
  transfer.rest = undefined;
  const body = transfer.head ? bytes : takeHead(transfer, bytes, transfer.attempt.method);
  if (typeof body === "string") fail(wire, connection, "invalid-answer", body);
  else if (transfer.head?.status === 101) onUpgrade(wire, connection, transfer, body!);
  else if (body !== undefined) onBody(wire, connection, transfer, body);
}

/** The server has switched to another protocol. The connection is never HTTP's again. */
function onUpgrade(wire: Wire, connection: Connection, transfer: Transfer, rest: Bytes): void {
  const { attempt, head } = transfer;
  const { upgrade } = attempt;
  const taker = upgrade ? upgrade.take(connection.socket, head!, attempt) : "it upgrades what nobody asked to upgrade";
  if (typeof taker === "string") return fail(wire, connection, "invalid-answer", taker);
  detach(connection, transfer);
  connection.taker = taker;
  transfer.resolve(upgrade!.response!);
  if (rest.length) taker.data(rest);
}

/** Bytes of the body. A body that came whole with its head is handed over as bytes, any other as a stream. */
function onBody(wire: Wire, connection: Connection, transfer: Transfer, bytes: Bytes): void {
  const out: Bytes[] = [];
  const ended = takeBody(transfer, bytes, out);
  for (const piece of out) transfer.bytes += piece.length;
  if (ended === true && transfer.sink === undefined) {
    const whole = out.length > 1 ? Buffer.concat(out) : out[0];
    const response = respond(wire, transfer, whole ?? (transfer.head!.framing === "none" ? null : NOTHING));
    finish(wire, connection, transfer);
    return transfer.resolve(response);
  }
  if (typeof ended === "string") return fail(wire, connection, "invalid-answer", ended);
  if (transfer.sink === undefined) {
    transfer.since = wire.time = wire.now();
    transfer.resolve(respond(wire, transfer, bodyStream(wire, connection, transfer)));
  }
  const sink = transfer.sink!;
  for (const piece of out) sink.enqueue(piece);
  if (ended) {
    finish(wire, connection, transfer);
    sink.close();
  } else if (sink.desiredSize! <= 0) {
    transfer.paused = true;
    connection.socket.pause();
  }
}

const NOTHING = new Uint8Array(0);

/** The answer as a Response. As a stream goes what runtimes would add to: bytes get a type, HEAD without a length gets 0. */
function respond(wire: Wire, { attempt, head }: Transfer, bytes: Body): Response {
  const headers = attempt.inbound(head!.headers);
  const typed = !(bytes instanceof Uint8Array) || bytes.length === 0 || hasName(headers, "content-type");
  const bodiless = [204, 205, 304].includes(head!.status);
  const whole = bytes !== null || attempt.method !== "HEAD" || bodiless || hasName(headers, "content-length");
  const body = typed && whole ? bytes : new ReadableStream({
    pull(sink) { // later than `start`: a stream that is closed at once is known to be empty
      if (bytes instanceof Uint8Array) sink.enqueue(bytes);
      sink.close();
    },
  }, { highWaterMark: 0 });
  return wire.newResponse(body, head!.status, headers, attempt.wrapped);
}

/** A body that is still coming. A slow reader pauses the socket; a reader who leaves closes it. */
function bodyStream(wire: Wire, connection: Connection, transfer: Transfer): ReadableStream<Uint8Array<ArrayBuffer>> {
  return new ReadableStream<Uint8Array<ArrayBuffer>>({
    start(controller) {
      transfer.sink = controller;
    },
    pull() {
      if (!transfer.paused || connection.transfer !== transfer) return;
      transfer.paused = false;
      transfer.since = wire.time;
      connection.socket.resume();
    },
    cancel() {
      if (connection.transfer === transfer) fail(wire, connection, "client-left", "the client has left");
    },
  }, { highWaterMark: WINDOW, size: (piece) => piece.byteLength });
}

/** The server has closed its side, so that nothing more can come: the end of a body without a length, else a failure. */
function onEnd(wire: Wire, connection: Connection): void {
  const { transfer } = connection;
  if (transfer?.framing !== "close") return fail(wire, connection, "reset", CLOSED);
  finish(wire, connection, transfer);
  transfer.sink!.close();
}

/** Takes a transfer off its connection, and ends what of it still waits. */
function detach(connection: Connection, transfer: Transfer): void {
  connection.transfer = undefined;
  transfer.drained?.();
  if (!transfer.sent) transfer.upload?.cancel().catch(() => {});
}

/** The answer is whole: the connection goes back to its pool, if another request can be trusted to it. */
function finish(wire: Wire, connection: Connection, transfer: Transfer): void {
  detach(connection, transfer);
  const idle = Math.min(IDLE, transfer.keepAlive - 1_000);
  if (transfer.sent && idle > 0 && !transfer.paused && wire.time - connection.bornAt < MAX_AGE) {
    connection.idleUntil = wire.time + idle;
    connection.reused = true;
    connection.pool.push(connection);
  } else connection.socket.destroy();
  transfer.attempt.ended(transfer.head!.status, transfer.bytes, undefined);
}

/** Methods that may be sent again when it is not known whether the server has seen them (RFC 9110 section 9.2.2). */
const IDEMPOTENT = new Set(["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PROPFIND", "REPORT", "SEARCH", "QUERY"]);

/** Whether a request can be sent again as it was: twice does no harm, and nothing of its body is used up. */
const mayRepeat = ({ method, body }: Pick<Attempt, "method" | "body">): boolean =>
  IDEMPOTENT.has(method) && !(body instanceof ReadableStream);

/** The transfer has failed: its connection is closed at once, and whoever waits for the answer is told why. */
function fail(wire: Wire, connection: Connection, kind: Failure, detail: string): void {
  const { transfer } = connection;
  connection.socket.destroy();
  connection.taker?.closed();
  if (transfer === undefined) return;
  detach(connection, transfer);
  const { attempt, head, rest, overhead, sink } = transfer;
  const silent = head === undefined && rest === undefined && overhead === 0;
  if (kind === "reset" && connection.reused && silent && mayRepeat(attempt)) {
    wire.reopen({ ...transfer, sent: false }); // the server had closed the idle connection
  } else if (sink === undefined) transfer.reject(new WireError(kind, connection.connected, detail));
  else {
    attempt.ended(head!.status, transfer.bytes, kind);
    sink.error(new WireError(kind, true, detail));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// 15. Pool: connections that wait for the next request, and the one clock that looks at all of them.
// ---------------------------------------------------------------------------------------------------------------------

/** A socket to a server; the addresses of a name are tried one after another (RFC 8305). */
function dial({ url, tls }: Server, allowHalfOpen = false): Socket {
  const { hostname, port, protocol } = new URL(url);
  const host = bare(hostname);
  const secure = protocol === "https:";
  const address = {
    host,
    port: Number(port || (secure ? 443 : 80)),
    autoSelectFamily: true,
    noDelay: true,
    allowHalfOpen,
  };
  if (!secure) return netConnect(address);
  const name = tls.servername || host;
  return tlsConnect({
    ...address,
    ...(isIP(name) ? {} : { servername: name }),
    ...(tls.ca && { ca: readFileSync(tls.ca) }),
    ...(tls.cert && { cert: readFileSync(tls.cert), key: readFileSync(tls.key) }),
    rejectUnauthorized: !tls.insecure,
    ALPNProtocols: ["http/1.1"],
  });
}

/** Opens a connection and begins the transfer on it as soon as it stands. */
function open(wire: Wire, transfer: Transfer): void {
  const { server } = transfer.attempt;
  let socket: Socket;
  try {
    socket = wire.dial(server);
  } catch (error) { // a certificate file that cannot be read
    return transfer.reject(new WireError("connect", false, String(error)));
  }
  const bornAt = transfer.since = wire.time;
  const pool = entry(wire.pools, server, () => []);
  const connection: Connection = {
    socket,
    pool,
    bornAt,
    idleUntil: 0,
    reused: false,
    connected: false,
    transfer,
    taker: undefined,
  };
  let reason = CLOSED;
  socket.on(server.url.startsWith("https:") ? "secureConnect" : "connect", () => {
    connection.connected = true;
    wire.time = wire.now();
    if (connection.transfer) send(wire, connection, connection.transfer);
  });
  socket.on("data", (data: Bytes) => {
    try {
      onData(wire, connection, data);
    } catch (error) { // what the runtime's Response does not take, or its client
      fail(wire, connection, error instanceof WireError ? error.kind : "invalid-answer", String(error));
    }
  });
  socket.on("drain", () => (connection.taker ?? connection.transfer)?.drained?.());
  socket.on("end", () => onEnd(wire, connection));
  socket.on("error", (error: Error) => void (reason = error.message || String(error)));
  socket.on("close", () => {
    fail(wire, connection, connection.connected ? "reset" : "connect", reason);
    forget(wire, connection);
  });
  wire.connections.add(connection);
  if (!wire.timer) wire.sweptAt = wire.time;
  wire.timer ??= setInterval(() => sweep(wire), TICK);
}

/** A connection that has closed. The last one takes the timer with it. */
function forget(wire: Wire, connection: Connection): void {
  wire.connections.delete(connection);
  const at = connection.pool.indexOf(connection);
  if (at >= 0) connection.pool.splice(at, 1);
  if (wire.connections.size > 0) return;
  clearInterval(wire.timer);
  wire.timer = undefined;
}

/** Looks at every connection: nothing else keeps time, so that a request costs no timer and no listener for an abort. */
function sweep(wire: Wire): void {
  const now = wire.time = wire.now(), stoodStill = now - wire.sweptAt > MOST_LATE;
  wire.sweptAt = now;
  if (stoodStill) return; // what has come meanwhile has yet to be read
  for (const connection of wire.connections) {
    const { transfer } = connection;
    if (transfer === undefined) {
      if (connection.taker) connection.taker.look(now);
      else if (now >= connection.idleUntil) connection.socket.destroy();
      continue;
    }
    const late = whatIsLate(connection, transfer, now);
    if (!late) continue;
    const detail = late === "client-left" ? "the client has left" : `silent for ${Math.round(now - transfer.since)} ms`;
    fail(wire, connection, late, detail);
  }
}

function whatIsLate({ connected }: Connection, transfer: Transfer, now: number): Failure | undefined {
  const { request, stop, startedAt, timeouts: { connect, response, idle, request: whole } } = transfer.attempt;
  const silence = now - transfer.since;
  if (stop?.aborted || request.signal.aborted) return "client-left";
  if (!connected) return silence < connect ? undefined : "connect-timeout";
  if (transfer.sent && !transfer.head) return silence < response ? undefined : "timeout";
  if (silence < idle && (transfer.sent || now - startedAt < whole)) return undefined;
  if (transfer.paused || !transfer.sent && !transfer.drained) return "client-timeout"; // it is the client's turn
  return transfer.head ? "idle" : "timeout";
}

/** Hands a transfer to the newest idle connection, or opens one. */
function begin(wire: Wire, transfer: Transfer): void {
  wire.time = wire.now();
  const pool = wire.pools.get(transfer.attempt.server);
  for (let connection; (connection = pool?.pop());) {
    if (connection.socket.readable && wire.time < connection.idleUntil) {
      connection.transfer = transfer;
      return send(wire, connection, transfer);
    }
    connection.socket.destroy();
  }
  open(wire, transfer);
}

const TARGET = /^[\x21-\x7e\x80-\xff]+$/;
const VALUE = /^[\t\x20-\x7e\x80-\xff]*$/;

/** A line break would begin another header, or another request. None can get here; if one does, nothing is sent. */
function isSafe(target: string, { method, headers }: Attempt): boolean {
  for (let i = 0; i < headers.length; i += 2) if (!isToken(headers[i]!) || !VALUE.test(headers[i + 1]!)) return false;
  return isToken(method) && TARGET.test(target);
}
const isToken = memo((text) => TOKEN.test(text));

/** The transport of Deno, Bun and Node: `fetch` over pooled sockets, and a plain connect for probes. */
export function createWire(
  own: Partial<Pick<Wire, "now" | "newResponse" | "dial">> = {},
): Pick<Effects, "fetch" | "connect"> {
  const now = () => performance.now();
  const state = {
    time: 0,
    connections: new Set<Connection>(),
    pools: new WeakMap<Server, Connection[]>(),
    timer: undefined,
    sweptAt: 0,
  };
  const wire: Wire = {
    now,
    newResponse,
    dial: (server) => dial(server),
    ...own,
    ...state,
    reopen: (transfer) => open(wire, transfer),
  };
  return {
    fetch: (url, attempt) =>
      new Promise((resolve, reject) => {
        const target = url.slice(attempt.server.url.length);
        if (isSafe(target, attempt)) begin(wire, newTransfer(attempt, target, resolve, reject));
        else reject(new WireError("bad-body", false, "a byte that cannot stand in a head"));
      }),
    connect: (server, timeout) =>
      new Promise((resolve, reject) => {
        const socket = wire.dial(server);
        const timer = setTimeout(() => socket.destroy(new Error(`no connection within ${timeout} ms`)), timeout);
        socket.on("connect", () => (resolve(), socket.destroy()));
        socket.on("error", reject);
        socket.on("close", () => clearTimeout(timer));
      }),
  };
}

// ---------------------------------------------------------------------------------------------------------------------
// 16. Headers: what passes to a server and back. What belongs to the client's hop stays there; what is ours is set anew.
// ---------------------------------------------------------------------------------------------------------------------

/** What became of one attempt. `sent`: the server may have seen some of the request. */
export type Outcome =
  | { kind: "answer"; response: Response; milliseconds: number }
  | { kind: Failure; sent: boolean; detail: string };

/** What happens to a request's header. `told`: it is believed only from trusted peers; `drop`: it ends here, or is set anew. */
type Passage = "pass" | "drop" | "told" | "connection" | "via" | "max-forwards";
const DROPPED = new Set(
  `content-length expect host http2-settings keep-alive proxy proxy-authorization proxy-connection te traceparent
  tracestate trailer transfer-encoding upgrade x-lb-explain`.split(/\s+/),
);
const TOLD = /^(?:forwarded$|x-forwarded|x-real-ip$|x-request-id$)/;

/** Look-alikes of names that mean something here (`X_Forwarded_For`, `Content.Length`) are dropped: some servers fold them. */
const passageOf = memo((spelled): Passage => {
  const name = spelled.toLowerCase(), folded = name.replaceAll(/[_.]/g, "-");
  if (DROPPED.has(folded)) return "drop";
  const isOurs = folded === "connection" || folded === "via" || folded === "max-forwards";
  const passage = TOLD.test(folded) ? "told" : isOurs ? folded : "pass";
  return passage !== "pass" && name !== folded ? "drop" : passage;
});

/** An address as RFC 7239 writes it. */
const forwardedFor = (address: string): string => address.includes(":") ? `"[${address}]"` : address;

const join = (before: string | undefined, value: string): string => before ? `${before}, ${value}` : value;

/** What a trusted peer tells about the client, by name in lower case. */
function toldBy(headers: readonly string[]): Map<string, string> {
  const told = new Map<string, string>();
  for (let i = 0; i < headers.length; i += 2) {
    const name = headers[i]!.toLowerCase();
    if (passageOf(name) === "told") told.set(name, join(told.get(name), headers[i + 1]!));
  }
  return told;
}

/** The client behind trusted proxies: X-Forwarded-For from right to left, up to the first who is not trusted. */
function clientBehind(peer: string, told: Map<string, string>, trusts: Table["trusts"]): string {
  let client = peer;
  for (const hop of (told.get("x-forwarded-for") ?? "").split(",").reverse()) {
    const address = hop.trim();
    if (!trusts(client) || !isAddress(address)) break;
    client = ipaddr.process(address).toString();
  }
  return client;
}

/** The values of a header, joined; empty where it is not there. The runtimes' own Headers take ten times as long. */
function valueIn(headers: readonly string[], name: string): string {
  let value = "";
  for (let i = 0; i < headers.length; i += 2) {
    const field = headers[i]!;
    if (field.length === name.length && field.toLowerCase() === name) value = join(value, headers[i + 1]!);
  }
  return value;
}

/** 16 digits, other ones each time: a counter, mixed (0.1 us; crypto's take 0.2 to 2). They need to keep no secret. */
function newId(balancer: Balancer): string {
  const id = mix(balancer.seed + ++balancer.ids | 0);
  return digits(mix(id ^ balancer.seed)) + digits(id);
}

/** W3C Trace Context: a trace id, who asks, and flags. Nothing stands behind them in version 00; later ones may add. */
const TRACEPARENT =
  /^(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})(?:$|(?<!^00.{53})-)/;

/**
 * Takes up the client's trace, or begins one. As with other proxies anybody may send one, for nothing depends on it; one
 * that is not valid is not passed on.
 */
function takeUpTrace(balancer: Balancer, exchange: Exchange): void {
  const asked = valueIn(exchange.headers, "traceparent"), sent = asked && TRACEPARENT.exec(asked);
  exchange.span = newId(balancer);
  exchange.trace = sent ? sent[1]! : balancer.origin + exchange.span;
  exchange.flags = sent ? HEX[parseInt(sent[2]!, 16) & 3]! : exchange.chosen ? "01" : "00"; // what we know: sampled, random
  if (sent) exchange.state = valueIn(exchange.headers, "tracestate");
}

/** Max-Forwards, which is about OPTIONS only (RFC 9110 section 7.6.2); at 0 a request goes no further. */
const oneHopLess = ({ method }: Exchange, hops: string): string =>
  method === "OPTIONS" && /^\d{1,9}$/.test(hops) ? `${Math.max(0, Number(hops) - 1)}` : hops;
const goesNoFurther = ({ method, headers }: Exchange): boolean =>
  method === "OPTIONS" && /^0+$/.test(valueIn(headers, "max-forwards"));

/** The headers of the request as its servers get them; Host stands first and is filled in for each of them. */
function outbound(exchange: Exchange, balancer: Balancer): string[] {
  const { headers, host, peer, scheme, told } = exchange;
  if (exchange.trace) exchange.span = newId(balancer);
  else takeUpTrace(balancer, exchange);
  let out = ["host", host];
  let [connection, chain] = ["", ""];
  for (let i = 0; i < headers.length; i += 2) {
    const passage = passageOf(headers[i]!);
    if (passage === "pass") out.push(headers[i]!, headers[i + 1]!);
    else if (passage === "via") chain = join(chain, headers[i + 1]!);
    else if (passage === "max-forwards") out.push(headers[i]!, oneHopLess(exchange, headers[i + 1]!));
    else if (passage === "connection") connection = join(connection, headers[i + 1]!);
  }
  const named = connectionNames(connection);
  if (named.size) out = ["host", host, ...without(out.slice(2), named)];
  out.push(
    "x-forwarded-for",
    join(told?.get("x-forwarded-for"), peer),
    "x-forwarded-host",
    told?.get("x-forwarded-host") ?? host,
    "x-forwarded-proto",
    told?.get("x-forwarded-proto") ?? scheme,
    "forwarded",
    join(told?.get("forwarded"), `for=${forwardedFor(peer)};host="${host}";proto=${scheme}`),
    "via",
    join(chain, balancer.via),
    "x-request-id",
    exchange.id,
    "traceparent",
    `00-${exchange.trace}-${exchange.span}-${exchange.flags}`,
  );
  if (exchange.state) out.push("tracestate", exchange.state);
  if (exchange.upgrade) out.push("connection", "Upgrade", "upgrade", "websocket");
  if (exchange.upgrade?.raw === false) out = without(out, EXTENSIONS);
  for (const [name, value] of told ?? []) if (!OURS.has(name)) out.push(name, value);
  return out;
}

const EXTENSIONS = new Set(["sec-websocket-extensions"]);
const OURS = new Set(["x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "forwarded", "x-request-id"]);

type Rules = RouteConfig["response"]["headers"];

function applyRules(headers: readonly string[], { set, add, remove }: Rules): string[] {
  return [...without(headers, new Set([...remove, ...set.keys()])), ...[...set, ...add].flat()];
}

const unchanged = (headers: readonly string[]): readonly string[] => headers;

/** Of what x-lb-explain says: enough to see why, and never more than a client's parser takes. */
const SHOWN = { choices: 3, servers: 16, letters: 100 };

/** What an operator is told of the choices so far, as compact JSON. No cache may keep it. */
function choiceHeaders({ route, choices }: Exchange): readonly string[] {
  if (!choices) return [];
  const brief = (key: string, value: unknown) => key === "why" ? String(value).slice(0, SHOWN.letters) : value;
  const last = choices.slice(-SHOWN.choices).map(({ servers, ...choice }) => {
    const more = servers.length - SHOWN.servers;
    return { ...choice, servers: servers.slice(0, SHOWN.servers), ...(more > 0 && { more }) };
  });
  const json = asciiJson({ route: route?.name ?? "", choices: last }, brief);
  return ["x-lb-explain", json, "cache-control", "no-store"];
}

/** In the answers of a balancer that drains: the client's next request goes over another connection, perhaps elsewhere. */
const LAST = ["connection", "close"] as const;

/** What changes an answer's headers: the route's rules, and then what we say ourselves. */
function inboundOf(exchange: Exchange, { hasRules, response }: Route, draining: boolean): Attempt["inbound"] {
  const { cookie, quota, choices } = exchange;
  if (!hasRules && !cookie && !quota.length && !choices && !draining) return unchanged;
  const said = cookie ? [...quota, "set-cookie", cookie] : quota;
  const own = [...said, ...choiceHeaders(exchange), ...draining ? LAST : []];
  return (headers) => [...hasRules ? applyRules(headers, response.headers) : headers, ...own];
}

/** The target that the server sees: path and query after the route's rules. */
function targetOf(exchange: Exchange, route: Route): string {
  const path = rewritePath(route, exchange.path, exchange.matched);
  const { set, remove } = route.request.query;
  if (!set.size && !remove.length) return path + exchange.query;
  const query = new URLSearchParams(exchange.query);
  for (const name of remove) query.delete(name);
  for (const [name, value] of set) query.set(name, value);
  return path + (query.size ? `?${query}` : "");
}

/** The Host that a server sees: its own literal, the route's, or as `host_header` says. */
function hostFor(exchange: Exchange, server: Server): string {
  const { host_header } = exchange.destination!.policy;
  const literal = exchange.route!.rewrite.host || server.host;
  if (literal) return literal;
  return host_header === "keep" ? exchange.host : host_header === "server" ? hostOf(server.url) : host_header;
}

// ---------------------------------------------------------------------------------------------------------------------
// 17. Forward: one attempt at one server.
// ---------------------------------------------------------------------------------------------------------------------

const KEPT = 65_536; // bytes: a body up to this size is read first, and kept for another attempt

/** Reads a small body, so that it can be sent twice; a larger one stays a stream, held to the route's limit. */
async function takeRequestBody(
  exchange: Exchange,
  destination: Destination,
  effects: Effects,
): Promise<FailureName | undefined> {
  const { request, length } = exchange, limit = exchange.route!.body_limit, stop = new AbortController();
  const { idle, request: whole } = destination.policy.timeouts;
  const late = () => effects.sleep(Math.min(idle, whole), stop.signal).then(() => undefined);
  try {
    if (length < 0 || length > KEPT) {
      const announced = request.headers.has("transfer-encoding") || length > 0;
      const body = announced ? request.body : await Promise.race([peeked(request.body!), late()]);
      if (body === undefined) return "client-timeout";
      exchange.body = length < 0 && limit < Infinity ? body?.pipeThrough(limited(limit)) ?? null : body;
      if (body === null) exchange.length = 0;
      return undefined;
    }
    const bytes = await Promise.race([request.arrayBuffer(), late()]);
    if (bytes === undefined) return "client-timeout";
    exchange.body = new Uint8Array(bytes);
    return bytes.byteLength === length ? undefined : "bad-body";
  } catch {
    return request.signal.aborted ? "client-left" : "bad-body";
  } finally {
    stop.abort();
  }
}

/** A body that is not announced by any header, as over HTTP/2: null where it turns out to be empty. */
async function peeked(body: ReadableStream<Uint8Array<ArrayBuffer>>): Promise<Body & (ReadableStream | null)> {
  const reader = body.getReader();
  let next: ReadableStreamReadResult<Uint8Array<ArrayBuffer>> | undefined;
  do next = await reader.read(); while (!next.done && next.value.byteLength === 0); // Deno begins with an empty piece
  if (next.done) return null;
  return new ReadableStream({
    async pull(sink) {
      const { done, value } = next ?? await reader.read();
      next = undefined;
      if (done) sink.close();
      else sink.enqueue(value);
    },
    cancel: (reason) => reader.cancel(reason),
  });
}

/** Passes bytes on up to a limit. */
function limited(limit: number): TransformStream<Uint8Array<ArrayBuffer>, Uint8Array<ArrayBuffer>> {
  let passed = 0;
  return new TransformStream({
    transform(piece, controller) {
      passed += piece.byteLength;
      if (passed > limit) controller.error(new WireError("body-too-large", true, "the body is over body_limit"));
      else controller.enqueue(piece);
    },
  });
}

/** Asks one server. Never throws: what can go wrong is an outcome. */
async function forward(
  balancer: Balancer,
  exchange: Exchange,
  server: Server,
  ended: Attempt["ended"],
  counts = true, // for what is known of the server: not a copy
): Promise<Outcome> {
  const { effects } = balancer;
  const { method, body, length } = exchange;
  const [route, destination] = [exchange.route!, exchange.destination!];
  const url = server.url + targetOf(exchange, route);
  const headers = outbound(exchange, balancer);
  headers[1] = hostFor(exchange, server);
  const attempt: Attempt = exchange.attempt = {
    ...untimed, // first, where a spread costs least
    method,
    headers: route.hasRules ? applyRules(headers, route.request.headers) : headers,
    body,
    length,
    wrapped: exchange.wrapped || destination.around !== undefined,
    request: exchange.request,
    stop: exchange.stop,
    server,
    timeouts: destination.policy.timeouts,
    upgrade: exchange.upgrade,
    inbound: inboundOf(exchange, route, balancer.draining),
    ended,
    startedAt: exchange.now,
  };
  if (counts) onAsked(server, attempt.startedAt);
  try {
    const response = await effects.fetch(url, attempt);
    attempt.headAt = exchange.ended ? exchange.endedAt : effects.now(); // a short answer has come whole by then
    return { kind: "answer", response, milliseconds: attempt.headAt - attempt.startedAt };
  } catch (error) {
    if (error instanceof WireError) return { kind: error.kind, sent: error.sent, detail: error.message };
    return { kind: "reset", sent: true, detail: String(error) };
  } finally {
    if (counts) onHeard(server, attempt.startedAt);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// 18. Upgrade: one attempt, both ways. WebSockets, from the handshake to the last frame.
// ---------------------------------------------------------------------------------------------------------------------

const [GOING_AWAY, BAD_GATEWAY] = [1001, 1014]; // close codes: section 7.4.1, and IANA's WebSocket registry
const PARTING = 5_000; // milliseconds of silence that the end of a WebSocket may take

/** Whether a request asks for a WebSocket (RFC 6455 section 4.1). Any other upgrade is answered as plain HTTP/1.1. */
const asksForWebSocket = ({ method, headers }: Exchange): boolean =>
  method === "GET" && valueIn(headers, "upgrade").toLowerCase() === "websocket" &&
  /(?:^|,)[\t ]*upgrade[\t ]*(?:,|$)/i.test(valueIn(headers, "connection")) &&
  /^[A-Za-z0-9+/]{22}==$/.test(valueIn(headers, "sec-websocket-key"));

/** What proves that a server has understood the handshake. */
const acceptOf = (key: string): string =>
  createHash("sha1").update(`${key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11`).digest("base64");

/** What is wrong with a 101, if anything (RFC 6455 section 4.1). `asked`: the headers of the request. */
function mistakeOf({ headers, upgrade }: Switched, asked: readonly string[], raw: boolean): string | undefined {
  const protocol = valueIn(headers, "sec-websocket-protocol");
  const offered = valueIn(asked, "sec-websocket-protocol").split(",").map((one) => one.trim());
  if (upgrade !== "websocket") return "it switches to another protocol";
  if (valueIn(headers, "sec-websocket-accept") !== acceptOf(valueIn(asked, "sec-websocket-key"))) {
    return "its Sec-WebSocket-Accept does not fit the key";
  }
  if (protocol && !offered.includes(protocol)) return "it speaks a subprotocol that was not offered";
  if (!raw && valueIn(headers, "sec-websocket-extensions")) return "it uses an extension that was not offered";
  return undefined;
}

const OURS_AT_101 = new Set(["connection", "upgrade"]);

/** What makes a WebSocket of a request as soon as a server has agreed. */
const upgradeOf = ({ tunnels }: Balancer, asked: readonly string[], { raw, accept }: Switch): Upgrade => ({
  raw,
  response: undefined,
  take(server, head, attempt) {
    const mistake = mistakeOf(head, asked, raw);
    if (mistake) return mistake;
    const tunnel: Tunnel = {
      server,
      headers: without(attempt.inbound(head.headers), OURS_AT_101),
      idle: attempt.timeouts.idle,
      ...{ up: newFrames(), down: newFrames(), bytesUp: 0, bytesDown: 0, seen: -1, since: 0 },
      ...{ client: undefined, early: [], said: false, left: false, closing: false, over: false, problem: undefined },
    };
    try {
      this.response = accept(tunnel);
    } catch (error) {
      throw new WireError("client-left", true, String(error));
    }
    tunnels.add(tunnel);
    return {
      data: (bytes) => fromServer(tunnel, bytes),
      drained: () => tunnel.client?.resume(),
      look: (now) => look(tunnel, now),
      closed() {
        if (!tunnels.delete(tunnel)) return;
        serverLeft(tunnel);
        attempt.uploaded = tunnel.bytesUp;
        attempt.ended(101, tunnel.bytesDown, tunnel.problem);
      },
    };
  },
});

/** The client's side is open: what the server has said by now goes there. */
function joinClient(tunnel: Tunnel, client: ClientSide): void {
  tunnel.client = client;
  tunnel.server.resume();
  for (const bytes of tunnel.early.splice(0)) if (!client.deliver(bytes)) tunnel.server.pause();
  if (tunnel.closing || tunnel.over) client.close(tunnel.closing ? GOING_AWAY : 0);
}

/** Bytes of the server's frames. A client that does not keep up pauses the server, and goes on by resuming it. */
function fromServer(tunnel: Tunnel, bytes: Bytes): void {
  if (tunnel.closing || tunnel.left) return;
  tunnel.bytesDown += bytes.length;
  if (tunnel.client === undefined) tunnel.early.push(bytes);
  if (!tunnel.client?.deliver(bytes)) tunnel.server.pause();
}

/** Bytes of the client's frames. A server that does not keep up pauses the client. */
function fromClient(tunnel: Tunnel, bytes: Bytes): void {
  if (tunnel.closing || tunnel.over) return;
  tunnel.bytesUp += bytes.length;
  if (!tunnel.server.write(bytes)) tunnel.client?.pause();
}

/** The server has closed its connection: the client's ends when it has got everything. */
function serverLeft(tunnel: Tunnel): void {
  tunnel.over = true;
  if (!tunnel.said && !tunnel.closing) tunnel.problem = tunnel.left ? "client-left" : "reset";
  tunnel.client?.close(0);
}

/** The client has gone: the server has a moment to end, too. */
function clientLeft(tunnel: Tunnel): void {
  if (tunnel.left) return;
  tunnel.left = true;
  tunnel.server.resume(); // else its end would go unnoticed
  tunnel.server.end();
}

/** Ends a WebSocket in the middle: both sides are told so, unless they are in the middle of a frame. */
function closeTunnel(tunnel: Tunnel, toClient: number, toServer = toClient): void {
  if (tunnel.closing || tunnel.left || tunnel.over) return;
  tunnel.closing = true;
  tunnel.server.resume();
  tunnel.server.end(isBetween(tunnel.up) ? closeFrame(toServer, true) : NO_BYTES);
  tunnel.client?.close(toClient);
  tunnel.client?.resume();
}

/** Counts instead of clocks: what passes costs no look at the time. */
function look(tunnel: Tunnel, now: number): void {
  const passed = tunnel.bytesUp + tunnel.bytesDown;
  if (passed !== tunnel.seen) [tunnel.seen, tunnel.since] = [passed, now];
  const silence = now - tunnel.since;
  if (tunnel.closing || tunnel.left) {
    if (silence >= Math.min(PARTING, tunnel.idle)) tunnel.server.destroy();
  } else if (silence >= tunnel.idle) {
    tunnel.problem = "client-timeout";
    tunnel.since = now;
    closeTunnel(tunnel, GOING_AWAY);
  }
}

// Frames (RFC 6455 section 5.2).

/** Where one is in a stream of frames. */
type Frames = ReturnType<typeof newFrames>;
const newFrames = () => ({
  head: NO_BYTES, // of the next frame, as far as it has come
  first: 0, // FIN, RSV and opcode of this one
  masked: false,
  left: 0, // bytes of its payload that are still to come
});
const NO_BYTES: Bytes = Buffer.alloc(0);

/** Whether the next byte begins a frame. */
const isBetween = ({ head, left }: Frames): boolean => left === 0 && head.length === 0;

/** Takes the head of a frame that begins at `at`: its size, or 0 where it is not yet whole. */
function takeFrameHead(frames: Frames, bytes: Bytes, at: number): number {
  if (bytes.length < at + 2) return 0;
  const [first, second] = [bytes[at]!, bytes[at + 1]!];
  const short = second & 0x7f;
  const long = short === 127 ? 8 : short === 126 ? 2 : 0;
  const size = 2 + long + (second & 0x80 ? 4 : 0);
  if (bytes.length < at + size) return 0;
  frames.first = first;
  frames.masked = second > 0x7f;
  frames.left = long === 8 ? Number(bytes.readBigUInt64BE(at + 2)) : long === 2 ? bytes.readUInt16BE(at + 2) : short;
  return size;
}

/**
 * Goes through bytes of a stream of frames. `begin` is told of each frame; `piece` gets its payload as it comes, the
 * last of it with `ends`. Both may stop it with a close code.
 */
function walk(
  frames: Frames,
  next: Bytes,
  begin: () => number,
  piece?: (bytes: Bytes, ends: boolean) => number,
): number {
  const bytes = frames.head.length ? Buffer.concat([frames.head, next]) : next;
  frames.head = NO_BYTES;
  for (let at = 0, code = 0; at < bytes.length;) {
    if (frames.left === 0) {
      const size = takeFrameHead(frames, bytes, at);
      if (size === 0) frames.head = Buffer.from(bytes.subarray(at)); // a copy, that does not keep all the rest
      if (size === 0 || (code = begin())) return code;
      at += size;
      if (frames.left > 0) continue;
    }
    const end = Math.min(bytes.length, at + frames.left);
    frames.left -= end - at;
    code = piece?.(bytes.subarray(at, end), frames.left === 0) ?? 0;
    if (code) return code;
    at = end;
  }
  return 0;
}

/** Knows where frames end, and whether there was a close frame, in bytes that pass as they are. */
function follow(tunnel: Tunnel, frames: Frames, bytes: Bytes): void {
  walk(frames, bytes, () => {
    if ((frames.first & 15) === CLOSE) tunnel.said = true;
    return 0;
  });
}

const [TEXT, BINARY, CLOSE, PING, PONG] = [1, 2, 8, 9, 10] as const; // opcodes; 0 continues a message

/** A whole frame. What goes to a server is masked. */
function frameOf(opcode: number, payload: Uint8Array, masked: boolean): Bytes {
  const { length } = payload;
  const long = length < 126 ? 0 : length < 65_536 ? 2 : 8;
  const start = 2 + long + (masked ? 4 : 0);
  const frame = Buffer.allocUnsafe(start + length);
  frame[0] = 0x80 | opcode;
  frame[1] = (masked ? 0x80 : 0) | (long === 8 ? 127 : long === 2 ? 126 : length);
  if (long === 2) frame.writeUInt16BE(length, 2);
  if (long === 8) frame.writeBigUInt64BE(BigInt(length), 2);
  if (masked) {
    const key = randomFillSync(frame, start - 4, 4).subarray(start - 4, start);
    for (let i = 0; i < length; i++) frame[start + i] = payload[i]! ^ key[i & 3]!;
  } else frame.set(payload, start);
  return frame;
}

/** A close frame with a code and a reason; 1005 is a close frame without both (RFC 6455 section 7.4.1). */
function closeFrame(code: number, masked: boolean, reason = ""): Bytes {
  const payload = Buffer.from(`  ${reason}`);
  payload.writeUInt16BE(code);
  return frameOf(CLOSE, code === 1005 ? NO_BYTES : payload, masked);
}

/** The client's side where it is bytes: what both say passes as it is, extensions and all. `early`: what it has said already. */
function joinSocket(tunnel: Tunnel, client: Socket, early: Bytes): void {
  const hear = (bytes: Bytes) => {
    if (tunnel.closing) return;
    follow(tunnel, tunnel.up, bytes);
    fromClient(tunnel, bytes);
  };
  client.on("data", hear);
  client.on("drain", () => tunnel.server.resume());
  client.on("end", () => clientLeft(tunnel));
  client.on("error", () => {}); // "close" comes after it
  client.on("close", () => clientLeft(tunnel));
  joinClient(tunnel, {
    deliver(bytes) {
      follow(tunnel, tunnel.down, bytes);
      return client.write(bytes);
    },
    close(code) {
      if (code && isBetween(tunnel.down)) client.write(closeFrame(code, false));
      client.setTimeout(PARTING, () => client.destroy());
      if (tunnel.over) client.destroySoon();
      else client.end();
    },
    pause: () => client.pause(),
    resume: () => client.resume(),
  });
  if (early.length) hear(early);
}

const MAX_MESSAGE = 67_108_864; // bytes, where the client's side is messages
const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** A message that is being put together out of frames, and a control frame that may stand between them. */
interface Pieces {
  opcode: number; // of the message; 0: none has begun
  message: Bytes[];
  size: number;
  control: Bytes[];
}

/** Whether a frame of a server may stand here: 0, or a close code. */
function judgeFrame({ first, masked, left }: Frames, pieces: Pieces): number {
  const opcode = first & 15, fin = first > 127;
  if (first & 0x70 || masked || opcode > PONG || opcode > BINARY && opcode < CLOSE) return 1002;
  if (opcode >= CLOSE) return fin && left < 126 ? 0 : 1002;
  if ((opcode === 0) !== (pieces.opcode !== 0)) return 1002;
  pieces.opcode ||= opcode;
  pieces.size += left;
  return pieces.size > MAX_MESSAGE ? 1009 : 0;
}

/** Reads a server's frames strictly (RFC 6455 section 5), and tells each message and control frame as it ends. */
function readFrames(frames: Frames, pieces: Pieces, bytes: Bytes, tell: (opcode: number, payload: Bytes) => number) {
  return walk(frames, bytes, () => judgeFrame(frames, pieces), (piece, ends) => {
    const opcode = frames.first & 15, list = opcode >= CLOSE ? pieces.control : pieces.message;
    if (piece.length) list.push(piece);
    if (!ends || opcode < CLOSE && frames.first < 128) return 0;
    const payload = list.length === 1 ? list[0]! : Buffer.concat(list), told = opcode >= CLOSE ? opcode : pieces.opcode;
    list.length = 0;
    if (opcode < CLOSE) pieces.opcode = pieces.size = 0;
    return tell(told, payload);
  });
}

/** What a close frame says: its code, 1005 where it has none, or undefined where it is not valid (section 7.4). */
function closeOf(payload: Bytes): { code: number; reason: string } | undefined {
  if (payload.length === 0) return { code: 1005, reason: "" };
  const code = payload.length > 1 ? payload.readUInt16BE() : 0;
  const known = code > 999 && code < 1015 && (code < 1004 || code > 1006) || code > 2999 && code < 5000;
  return known ? { code, reason: utf8.decode(payload.subarray(2)) } : undefined;
}

/** The client's side where it is messages: frames stand only between us and the server. */
function joinMessages(tunnel: Tunnel, side: MessageSide): MessageEvents {
  const pieces: Pieces = { opcode: 0, message: [], size: 0, control: [] };
  let answered = 0; // pings of the client, by the runtime: the server's pongs to them end here
  const tell = (opcode: number, payload: Bytes): number => {
    if (tunnel.said) return 0; // what follows a close frame is nothing
    if (opcode !== PONG || answered === 0) return hand(tunnel, side, opcode, payload);
    answered--;
    return 0;
  };
  const say = (opcode: number, payload: Uint8Array) => fromClient(tunnel, frameOf(opcode, payload, true));
  joinClient(tunnel, {
    deliver(bytes) {
      const mistake = readFrames(tunnel.down, pieces, bytes, tell);
      if (mistake) tunnel.problem = "invalid-answer";
      if (mistake) closeTunnel(tunnel, mistake === 1009 ? mistake : BAD_GATEWAY, mistake);
      return side.hasRoom();
    },
    close(code) {
      if (code) side.close(code, "");
      else if (!tunnel.said) side.cut();
    },
    pause: () => side.pause(),
    resume: () => side.resume(),
  });
  return {
    message: (message) => typeof message === "string" ? say(TEXT, Buffer.from(message)) : say(BINARY, message),
    ping(payload) {
      answered++;
      say(PING, payload);
    },
    pong: (payload) => say(PONG, payload),
    drained() {
      tunnel.server.resume();
      if (tunnel.over && !tunnel.said) side.cut();
    },
    closed(code, reason) {
      if (code !== 1006) fromClient(tunnel, closeFrame(code, true, reason));
      tunnel.said ||= code !== 1006;
      clientLeft(tunnel);
    },
  };
}

/** Passes on what a server has said: 0, or a close code for one that breaks the rules. */
function hand(tunnel: Tunnel, side: MessageSide, opcode: number, payload: Bytes): number {
  try {
    if (opcode === TEXT) side.send(utf8.decode(payload));
    else if (opcode === BINARY) side.send(payload);
    else if (opcode === PING && side.ping) side.ping(payload);
    else if (opcode === PING) tunnel.server.write(frameOf(PONG, payload, true));
    else if (opcode === PONG) side.pong?.(payload);
    else {
      const close = closeOf(payload);
      if (close === undefined) return 1002;
      tunnel.said = true;
      side.close(close.code, close.reason);
    }
    return 0;
  } catch { // not UTF-8
    return 1007;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// 19. Answers: what the balancer says by itself.
// ---------------------------------------------------------------------------------------------------------------------

/** Why the balancer refuses what has passed the gate. */
type Denial =
  | "denied"
  | "no-route"
  | "busy"
  | "client-busy"
  | "rate"
  | "no-server"
  | "queue-full"
  | "queue-timeout"
  | "loop"
  | "headers-too-large"
  | "internal"
  | "draining";

/** Every answer of our own. The text goes to clients: short, and never a server's address or error. */
export const FAILURES = {
  "bad-request": { status: 400, text: "the request is not valid" },
  "bad-host": { status: 400, text: "the Host header is missing or not valid" },
  "bad-body": { status: 400, text: "the request's body does not have its announced length" },
  "denied": { status: 403, text: "this address may not ask" },
  "no-route": { status: 404, text: "no route fits this request" },
  "bad-method": { status: 405, text: "this method is not allowed here" },
  "client-timeout": { status: 408, text: "the request's body did not arrive in time" },
  "body-too-large": { status: 413, text: "the request's body is too large" },
  "uri-too-long": { status: 414, text: "the request's target is too long" },
  "client-busy": { status: 429, text: "too many requests at once" },
  "rate": { status: 429, text: "too many requests" },
  "headers-too-large": { status: 431, text: "the request's headers are too large" },
  "client-left": { status: 499, text: "the client has left" },
  "internal": { status: 500, text: "the load balancer has failed" },
  "connect": { status: 502, text: "the server cannot be reached" },
  "reset": { status: 502, text: "the server closed the connection" },
  "invalid-answer": { status: 502, text: "the server's answer is not valid" },
  "busy": { status: 503, text: "too many requests at once" },
  "no-server": { status: 503, text: "no server may be asked" },
  "queue-full": { status: 503, text: "all servers are busy, and too many requests wait" },
  "queue-timeout": { status: 503, text: "all servers were busy for too long" },
  "draining": { status: 503, text: "the load balancer is ending" },
  "connect-timeout": { status: 504, text: "the server cannot be reached in time" },
  "timeout": { status: 504, text: "the server did not answer in time" },
  "idle": { status: 504, text: "the server stopped in the middle of its answer" },
  "loop": { status: 508, text: "the request has been here before" },
} satisfies Record<Failure | Refusal | Denial, { status: number; text: string }>;

/** A word of `x-lb-failure`. */
export type FailureName = keyof typeof FAILURES;

/** An answer of our own, as text, or as a problem (RFC 9457) for those who ask for JSON. */
function refusal(kind: FailureName, accept = "", id = ""): Response {
  const { status, text } = FAILURES[kind];
  const json = /[/+]json/.test(accept);
  const problem = { type: "about:blank", title: text, status, failure: kind, request: id };
  const body = json ? asciiJson(problem) + "\n" : `${status}: ${text}\n`;
  return new Response(body, {
    status,
    headers: {
      "content-type": json ? "application/problem+json" : "text/plain; charset=utf-8",
      "content-length": `${body.length}`,
      "cache-control": "no-store",
      "x-lb-failure": kind,
      ...((status === 503 || kind === "client-busy") && { "retry-after": "1" }),
      ...(CLOSING.has(status) && { connection: "close" }),
    },
  });
}

const CLOSING = new Set([400, 408, 413]); // where what follows on the connection cannot be trusted, or is not wanted

/** Where a redirect leads: taken literally, or the request's own address with some parts replaced. */
function redirect(exchange: Exchange, action: Extract<RouteConfig["action"], { kind: "redirect" }>): Response {
  const { to, scheme, host, port, path, status } = action;
  const spoken = exchange.told?.get("x-forwarded-proto") ?? "";
  const proto = scheme || (/^https?$/.test(spoken) ? spoken : exchange.scheme);
  const asked = exchange.told?.get("x-forwarded-host") ?? exchange.host;
  const own = /:\d+$/.exec(asked)?.[0] ?? ""; // it goes with its host and scheme
  const shown = port ? `:${port}` : scheme || host ? "" : own;
  const usual = proto === "https" ? ":443" : ":80";
  const authority = (host || hostName(asked)) + (shown === usual ? "" : shown);
  const location = to || `${proto}://${authority}${path || exchange.path}${exchange.query}`;
  return new Response(null, { status, headers: { location, "content-length": "0" } });
}

/** The answer that a route gives by itself. */
function respondLiterally(
  route: Route,
  { status, body, headers }: Extract<RouteConfig["action"], { kind: "respond" }>,
) {
  const bytes = ENCODER.encode(body);
  const own = headers.has("content-type") || !body ? [] : ["content-type", "text/plain; charset=utf-8"];
  const list = [
    ...own,
    ...[...headers].flat(),
    ...(status === 204 || status === 304 ? [] : ["content-length", `${bytes.length}`]),
  ];
  return new Response(body ? bytes : null, { status, headers: pairs(applyRules(list, route.response.headers)) });
}

// ---------------------------------------------------------------------------------------------------------------------
// 20. Limits: who has to wait, or to come back later. Queues, rates and the service's own measure of too much.
// ---------------------------------------------------------------------------------------------------------------------

const MOST_BUCKETS = 100_000; // that a rule remembers

/** The network of an IPv6 client: it has all 2^64 addresses of it. */
const networkOf = memo((address) => ipaddr.parse(address).toByteArray().slice(0, 8).join("."));

/** Whose bucket a request draws from. Without the header it is its address's; of a long value its end is kept. */
function bucketOf({ client, request }: Exchange, { by }: Rate): string {
  const value = by && request.headers.get(by);
  if (value) return `=${value.length > 100 ? `${hash(value)} ${value.slice(-80)}` : value}`;
  return clientNetwork(client);
}
const clientNetwork = (client: string): string => isIPv6(client) ? networkOf(client) : client;

/** One more of a client's; gives how many there were. */
function enterCrowd(crowd: Map<string, number>, client: string): number {
  const there = crowd.get(client) ?? 0;
  crowd.set(client, there + 1);
  return there;
}
function leaveCrowd(crowd: Map<string, number>, client: string): void {
  const left = crowd.get(client)! - 1;
  if (left) crowd.set(client, left);
  else crowd.delete(client);
}

/** Whether too much is in flight: of all clients, or of this one. */
function crowd(balancer: Balancer, exchange: Exchange): FailureName | undefined {
  const { requests, per_client } = exchange.table.config.limits;
  if (balancer.inFlight > requests) return "busy";
  if (per_client === Infinity) return undefined;
  exchange.counted = clientNetwork(exchange.client);
  return enterCrowd(balancer.clients, exchange.counted) < per_client ? undefined : "client-busy";
}

/** Counts a connection for as long as it is open, or says what it is refused for. Trusted proxies bring many clients. */
function letIn(balancer: Balancer, socket: Socket): FailureName | undefined {
  const { table: { config: { limits }, trusts }, connected } = balancer;
  if (socket.remoteAddress === undefined) return undefined; // it is gone already
  const peer = unmapped(socket.remoteAddress), client = clientNetwork(peer);
  if (balancer.connections >= limits.connections) return "busy";
  if ((connected.get(client) ?? 0) >= limits.client_connections && !trusts(peer)) return "client-busy";
  balancer.connections++;
  enterCrowd(connected, client);
  socket.on("close", () => (balancer.connections--, leaveCrowd(connected, client)));
  return undefined;
}

/** When a bucket is full again. A bucket that nobody has drawn from for as long as it takes to fill need not be kept. */
function fullAt(buckets: Buckets, bucket: string, now: number): number {
  const { rate: { requests, per, burst }, recent, turnedAt } = buckets;
  if (now - turnedAt >= burst * per / requests || recent.size >= MOST_BUCKETS / 2) {
    Object.assign(buckets, { recent: new Map(), older: recent, turnedAt: now });
  }
  return Math.max(now, buckets.recent.get(bucket) ?? buckets.older.get(bucket) ?? 0);
}

/**
 * Whether a client may ask once more: its bucket holds `burst` tokens, gets `requests` new ones `per` time, and each
 * request takes one. The answer says how many are left and the seconds until there is one more (the IETF's RateLimit
 * fields, draft-ietf-httpapi-ratelimit-headers-10).
 */
function withinRate(buckets: Buckets, exchange: Exchange): boolean {
  const { requests, per, burst } = buckets.rate;
  const now = exchange.started, each = per / requests;
  const bucket = bucketOf(exchange, buckets.rate);
  const before = (fullAt(buckets, bucket, now) - now) / each; // tokens that are missing
  const within = before <= burst - 1 + 1e-6;
  const missing = within ? before + 1 : before;
  if (within) buckets.recent.set(bucket, now + missing * each);
  const left = Math.max(0, Math.floor(burst - missing + 1e-6));
  const seconds = Math.max(1, Math.ceil((missing - (burst - left - 1)) * each / 1_000 - 1e-6));
  exchange.quota = [
    "ratelimit-policy",
    `"default";q=${requests}${per % 1_000 ? "" : `;w=${per / 1_000}`}`,
    "ratelimit",
    `"default";r=${left};t=${seconds}`,
    ...(within ? [] : ["retry-after", `${seconds}`]),
  ];
  return within;
}

/** There may be room again: those who wait take it in the order in which they came. */
function wake({ waiting }: Service): void {
  for (const proceed of waiting) if (!proceed()) return;
}

/** The same for all services, after a change that may have made room anywhere. */
function wakeAll({ services }: Table): void {
  for (const service of services.values()) if (service.waiting.size > 0) wake(service);
}

/** One request less at a server: whoever has waited longest gets its place. */
function release(service: Service, server: Server): void {
  server.inFlight--;
  if (server.trying && server.inFlight === 0) { // its trial was nothing that says anything, a copy say
    server.trying = false;
    service.candidatesUntil = 0;
  }
  if (service.waiting.size > 0) wake(service);
}

/**
 * Waits until `pick` finds a server with room, first come, first served; or for a reason to wait no longer. What ends it
 * may happen in another request, so that it only takes the server there, and cleans up at home (the edge insists on that).
 */
async function inQueue(
  service: Service,
  client: AbortSignal,
  effects: Effects,
  pick: () => Server | undefined,
): Promise<Server | FailureName> {
  const { waiting, config: { queue } } = service;
  if (waiting.size >= queue.size) return "queue-full";
  if (client.aborted) return "client-left";
  const { promise, resolve, reject } = Promise.withResolvers<Server | FailureName>();
  const leave = (result: Server | FailureName) => {
    waiting.delete(proceed);
    resolve(result);
  };
  const proceed = () => {
    try {
      const server = pick();
      if (server) leave(server);
      return server !== undefined;
    } catch (error) { // a strategy's, and so not of those who come behind
      waiting.delete(proceed);
      reject(error);
      return true;
    }
  };
  const over = new AbortController();
  waiting.add(proceed);
  client.addEventListener("abort", () => leave("client-left"), { once: true, signal: over.signal });
  effects.sleep(queue.timeout, over.signal).then(() => {
    wake(service); // an ejection may have ended unnoticed
    leave("queue-timeout");
  });
  try {
    return await promise;
  } finally {
    over.abort();
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// 21. Sticky: which server a client had before. A signed cookie says it.
// ---------------------------------------------------------------------------------------------------------------------

/**
 * What the cookie says for a server is nothing but a signature over its service and URL, cut to 132 bits: who has not the
 * secret can make none, and it tells nobody where the server is. All clients of a server have the same, so that a request
 * costs one look into a map, and a signature is made once for each server and once for each client that moves.
 */
const valueFor = ({ name, config }: Service, { url }: Server, { sign, secret }: Effects): string =>
  sign(config.sticky.secret || secret(), `${name}\n${url}`).slice(0, 22);

/** The servers of a service by their values. */
const signedServers = (service: Service, effects: Effects): Map<string, Server> =>
  service.cookies ??= new Map(service.servers.map((server) => [valueFor(service, server, effects), server]));

/** The values in a cookie: services that share its name have one each. */
const heldBy = (exchange: Exchange, name: string): string[] => cookieOf(exchange, name)?.split(".") ?? [];

/** The server that a client had before. What is forged, of another secret, or of a server that is gone, names none. */
function serverBefore(service: Service, exchange: Exchange, effects: Effects): Server | undefined {
  const servers = signedServers(service, effects);
  const value = heldBy(exchange, service.config.sticky.cookie).find((value) => servers.has(value));
  return value === undefined ? undefined : servers.get(value);
}

/** Where in a split a client was before. */
function destinationBefore({ destinations }: Route, exchange: Exchange, effects: Effects): Destination | undefined {
  const placeOf = ({ service }: Destination) =>
    heldBy(exchange, service.config.sticky.cookie).findIndex((value) => signedServers(service, effects).has(value));
  const known = destinations.filter((one) => one.weight > 0 && placeOf(one) >= 0);
  return known.sort((a, b) => placeOf(a) - placeOf(b))[0];
}

/** Set-Cookie for a client that is new to its server. Values of other services stay in their places. */
function cookieFor(service: Service, server: Server, exchange: Exchange, effects: Effects): string {
  const { cookie, max_age } = service.config.sticky;
  const sharing = [...exchange.table.services.values()].filter(({ config }) => config.sticky.cookie === cookie);
  const values = heldBy(exchange, cookie).filter((value) =>
    sharing.some((one) => signedServers(one, effects).has(value))
  );
  const at = values.findIndex((value) => signedServers(service, effects).has(value));
  values.splice(at < 0 ? values.length : at, 1, valueFor(service, server, effects));
  const https = schemeOf(exchange) === "https";
  const age = max_age ? `; Max-Age=${Math.ceil(max_age / 1_000)}` : "";
  return `${cookie}=${values.join(".")}; Path=/${age}; HttpOnly; SameSite=Lax${https ? "; Secure" : ""}`;
}

/** Headers without one cookie: it is between the client and us. */
function withoutCookie(headers: readonly string[], name: string): readonly string[] {
  const out: string[] = [];
  for (let i = 0; i < headers.length; i += 2) {
    const [field, value] = [headers[i]!, headers[i + 1]!];
    const holds = value.includes(name) && field.toLowerCase() === "cookie";
    const kept = holds ? value.split(";").filter((one) => one.split("=", 1)[0]!.trim() !== name).join(";") : value;
    if (kept || !holds) out.push(field, kept.trim());
  }
  return out;
}

// ---------------------------------------------------------------------------------------------------------------------
// 22. Log: what is written down of each request, one line when its last byte has passed.
// ---------------------------------------------------------------------------------------------------------------------

const MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(" ");

/** A text of a time, made once a second: it serves thousands of lines. */
function onceASecond(write: (date: Date) => string): (date: Date) => string {
  let [second, text] = [NaN, ""];
  return (date) => {
    const now = Math.floor(date.getTime() / 1_000);
    if (now !== second) [second, text] = [now, write(date)];
    return text;
  };
}

/** `21/Nov/2026:03:14:42 +0000`, the time of Apache's logs, in UTC. */
const clfTime = onceASecond((date) => {
  const iso = date.toISOString();
  return `${iso.slice(8, 10)}/${MONTHS[date.getUTCMonth()]}/${iso.slice(0, 4)}:${iso.slice(11, 19)} +0000`;
});
const isoSecond = onceASecond((date) => date.toISOString().slice(0, 20));
/** `2026-11-21T03:14:42.000Z` */
const isoTime = (date: Date): string => `${isoSecond(date)}${String(date.getTime() % 1_000).padStart(3, "0")}Z`;

/** Bytes of the request's body that were meant for servers; of a WebSocket all that the client has said. */
const receivedBy = ({ attempt, length }: Exchange): number => attempt ? Math.max(attempt.uploaded, length) : 0;

type LineFormat = Exclude<Out<typeof LogFormat>, "off">;

/** What a line says of a request, or of a connection (method TCP). Times are milliseconds since it came in; what there is not is undefined. */
export interface AccessRecord {
  time: Date;
  client: string;
  method: string;
  protocol: "HTTP/1.1" | "HTTP/2.0" | "-";
  scheme: string;
  host: string | undefined;
  url: string | undefined; // where there is no path: it was refused before, or is a connection
  path: string | undefined;
  query: string | undefined;
  status: number;
  received: number; // bytes of the request's body
  bytes: number; // of the answer's
  referer: string | undefined;
  agent: string | undefined;
  id: string;
  trace: string | undefined;
  span: string | undefined; // of the last attempt
  route: string | undefined;
  service: string | undefined;
  server: string | undefined; // the last that was asked
  attempts: number;
  connected: number | undefined; // the last attempt had a connection
  head: number | undefined; // the answer's head was there
  ended: number;
  failure: string | undefined;
}

function accessRecord(balancer: Balancer, exchange: Exchange): AccessRecord {
  if (!exchange.trace) takeUpTrace(balancer, exchange);
  const { headers, path, query, tried, attempt, started, endedAt, destination, problem } = exchange;
  const since = (time = 0) => time > 0 && time >= started ? Math.min(time, endedAt) - started : undefined;
  return {
    time: balancer.effects.date(),
    client: exchange.client,
    method: exchange.method,
    protocol: exchange.authority === undefined ? "HTTP/1.1" : "HTTP/2.0",
    scheme: exchange.scheme,
    host: hostName(exchange.host),
    url: path ? undefined : exchange.request.url,
    path: path || undefined,
    query: query.slice(1) || undefined,
    status: exchange.status,
    received: receivedBy(exchange),
    bytes: exchange.bytes,
    referer: valueIn(headers, "referer") || undefined,
    agent: valueIn(headers, "user-agent") || undefined,
    id: exchange.id,
    trace: exchange.trace,
    span: attempt && exchange.span,
    route: exchange.route?.name,
    service: destination?.service.name,
    server: tried.at(-1)?.name,
    attempts: tried.length,
    connected: since(attempt?.connectedAt),
    head: since(attempt?.headAt),
    ended: since(endedAt) ?? 0,
    failure: problem || undefined,
  };
}

/** The codes that may stand somewhere as they are. All else is written as in Apache's logs: `\x0a`. */
const allBut = (...marks: string[]): Uint8Array =>
  Uint8Array.from({ length: 127 }, (_, code) => Number(code > 31 && !marks.includes(String.fromCharCode(code))));
const AS_IS = allBut();
const IN_QUOTES = allBut('"', "\\"); // so that no byte begins another line or ends the quotes
const ONE_WORD = allBut('"', "\\", " ");

const DECIMALS = Array.from({ length: 1_000 }, (_, i) => `.${String(i).padStart(3, "0")}`);

/** What lines are put together in. */
class Pen {
  private bytes = new Uint8Array(512);
  private spare = new Uint8Array(512); // in turn with the other
  length = 0;

  /** Adds a short text, letter by letter: to join many of them takes twice as long, for they are made only to be copied. */
  add(text: string, plain: Uint8Array = AS_IS): this {
    this.makeRoom(6 * text.length);
    const { bytes } = this;
    let at = this.length;
    for (let i = 0; i < text.length; i++) {
      const code = text.charCodeAt(i);
      if (plain[code] === 1) bytes[at++] = code;
      else for (const letter of `\\x${HEX[code] ?? code.toString(16)}`) bytes[at++] = letter.charCodeAt(0);
    }
    this.length = at;
    return this;
  }

  /** Adds a long text of ASCII. */
  addAll(text: string): void {
    this.makeRoom(3 * text.length); // or it could be cut off, as encoders see it
    this.length += ENCODER.encodeInto(text, this.bytes.subarray(this.length)).written;
  }

  /** `0.250`: milliseconds with the microseconds. A table is ten times as fast as a number's own text. */
  addTime(milliseconds: number): this {
    const all = Math.round(milliseconds * 1_000), whole = Math.floor(all / 1_000);
    return this.add(`${whole}`).add(DECIMALS[all - whole * 1_000]!);
  }

  endLine(): void {
    this.makeRoom(1);
    this.bytes[this.length++] = 10;
  }

  addLines(bytes: Uint8Array): void {
    this.makeRoom(bytes.length);
    this.bytes.set(bytes, this.length);
    this.length += bytes.length;
  }

  /** Gives what is written, which stands until the next time, and begins anew. */
  take(): Uint8Array<ArrayBuffer> {
    const { bytes, length, spare } = this;
    [this.bytes, this.spare, this.length] = [spare.length < 1 << 20 ? spare : new Uint8Array(512), bytes, 0];
    return bytes.subarray(0, length);
  }

  private makeRoom(more: number): void {
    const { bytes, length } = this;
    if (length + more <= bytes.length) return;
    this.bytes = new Uint8Array(2 * (length + more));
    this.bytes.set(bytes);
  }
}

const rounded = (milliseconds: number | undefined): number | undefined =>
  milliseconds && Math.round(milliseconds * 1_000) / 1_000;

/** The formats of `log:`. Combined is Apache's; what stands behind it says who was asked, and how it went (see README). */
const ACCESS_LINES: Record<LineFormat, (pen: Pen, record: AccessRecord) => void> = {
  combined(pen, r) {
    const time = (milliseconds: number | undefined) =>
      milliseconds === undefined ? pen.add("-") : pen.addTime(milliseconds);
    pen.add(r.client).add(" - - [").add(clfTime(r.time)).add('] "');
    pen.add(r.method, ONE_WORD).add(" ").add(r.url ?? r.path ?? "-", IN_QUOTES);
    if (r.path && r.query) pen.add("?").add(r.query, IN_QUOTES);
    pen.add(" ").add(r.protocol).add(`" ${r.status} ${r.bytes} "`);
    pen.add(r.referer ?? "-", IN_QUOTES).add('" "').add(r.agent ?? "-", IN_QUOTES).add('" ');
    pen.add(r.service ?? "-", ONE_WORD).add(" ").add(r.server ?? "-", ONE_WORD).add(` ${r.attempts} `);
    time(r.connected).add("/");
    time(r.head).add("/");
    time(r.ended).add(" ");
    pen.add(r.failure ?? "-").add(" ").add(r.id || "-", ONE_WORD).add(" ").add(r.trace ?? "-");
  },
  /** OpenTelemetry's semantic conventions, and `lb.` before what has no name there. What is undefined is left out. */
  json(pen, r) {
    pen.addAll(asciiJson({
      "timestamp": isoTime(r.time),
      "client.address": r.client,
      "http.request.method": r.method,
      "url.scheme": r.scheme,
      "server.address": r.host,
      "url.full": r.url,
      "url.path": r.path,
      "url.query": r.query,
      "http.response.status_code": r.status,
      "http.request.body.size": r.received,
      "http.response.body.size": r.bytes,
      "http.request.header.referer": r.referer,
      "user_agent.original": r.agent,
      "error.type": r.failure ?? (r.status < 500 ? undefined : `${r.status}`),
      "trace_id": r.trace,
      "span_id": r.span,
      "lb.request_id": r.id,
      "lb.route": r.route,
      "lb.service": r.service,
      "lb.server": r.server,
      "lb.attempts": r.attempts,
      "lb.connected_ms": rounded(r.connected),
      "lb.head_ms": rounded(r.head),
      "lb.ended_ms": rounded(r.ended),
    }));
  },
};

/** One line of the access log, without its end. */
export function accessLine(record: AccessRecord, format: LineFormat): string {
  const pen = new Pen();
  ACCESS_LINES[format](pen, record);
  return new TextDecoder().decode(pen.take());
}

// ---------------------------------------------------------------------------------------------------------------------
// 23. Printing: how the log gets out: lines together, never waited for by a request.
// ---------------------------------------------------------------------------------------------------------------------

const MOST_WAITING = 1 << 26; // bytes of lines that wait for a reader of the log
const TOGETHER = 20; // ms for which lines wait for others: a write of its own costs more than a line
const STALLED = 2_000; // ms without taking anything after which a reader is not waited for at the end

/** Lines on their way out of a thread. */
interface AccessLog {
  write: Effects["write"];
  /** Adds lines of another thread. */
  append(lines: Uint8Array): void;
  /** What has to be printed by somebody else, as this is the end. */
  rest(): Uint8Array<ArrayBuffer>;
  /** Waits for the reader, at most for some milliseconds, and says what it has not taken. */
  end(patience: number): Promise<void>;
}

/** Records that have yet to become lines. */
function lineMaker(pen: Pen, report: Effects["report"]) {
  let [format, records]: [LineFormat, AccessRecord[]] = ["combined", []];
  const make = () => {
    const all = records, how = ACCESS_LINES[format];
    records = [];
    for (const record of all) {
      try {
        how(pen, record);
      } catch (error) {
        report("error", `the log cannot be written: ${error}`);
      }
      pen.endLine();
    }
  };
  return {
    make,
    waiting: () => pen.length + records.length > 0,
    add(record: AccessRecord, as: LineFormat) {
      if (as !== format) make();
      format = as;
      if (records.push(record) === 100) make();
    },
  };
}

const linesIn = (bytes: Uint8Array): number => bytes.reduce((lines, byte) => byte === 10 ? lines + 1 : lines, 0);

/**
 * Lines are made and printed together, and requests never wait for them: one by one, between requests, they would take
 * twice as long to make, and a reader that stalls, or a disk that is full, costs lines alone.
 * @param print takes some of the bytes, however long that lasts, and says how many; rejects where they cannot be written
 */
function accessLog(print: (bytes: Uint8Array<ArrayBuffer>) => Promise<number>, report: Effects["report"]): AccessLog {
  const pen = new Pen();
  const made = lineMaker(pen, report);
  let [busy, left, takenAt, cut, lost] = [false, new Uint8Array(), 0, false, 0]; // of what is being printed, and was
  const lose = (lines: number, why: string) => {
    if (!lost) report("warn", `${why}: its lines are lost`);
    lost += lines;
  };
  const sayLost = () => {
    if (lost) report("warn", `lines of the access log that are lost: ${lost}`);
    lost = 0;
  };
  const flush = async () => {
    busy = true;
    made.make();
    const all = left = pen.take();
    try {
      if (cut) await print(Uint8Array.of(10)); // the end of the line that an error has cut
      cut = false;
      while (left.length) {
        left = left.subarray(await print(left));
        takenAt = performance.now();
      }
      if (pen.length <= MOST_WAITING) sayLost(); // no more are
    } catch (error) {
      lose(linesIn(left), `the access log cannot be written (${(error as Error).message})`);
      cut ||= left.length < all.length && all.at(-left.length - 1) !== 10;
      left = left.subarray(left.length);
    }
    busy = false;
    if (made.waiting()) setTimeout(flush, TOGETHER);
  };
  /** Whether more can be held, which is printed soon. */
  const holds = (lines: () => number) => {
    if (!busy && !made.waiting()) setTimeout(flush, TOGETHER);
    if (pen.length <= MOST_WAITING) return true;
    lose(lines(), "nobody reads the access log");
    return false;
  };
  return {
    write: (record, format) => void (holds(() => 1) && made.add(record, format)),
    append: (lines) => void (holds(() => linesIn(lines)) && pen.addLines(lines)),
    rest() {
      if (busy) return new Uint8Array(); // nothing may come between the halves of a line
      made.make();
      return pen.take();
    },
    async end(patience) {
      const until = (takenAt = performance.now()) + patience;
      while ((busy || made.waiting()) && performance.now() < Math.min(until, takenAt + STALLED)) {
        await new Promise((resolve) => setTimeout(resolve, TOGETHER));
      }
      made.make();
      lost += linesIn(left) + linesIn(pen.take());
      sayLost();
    },
  };
}

// ---------------------------------------------------------------------------------------------------------------------
// 24. Metrics: what has been counted. Numbers that add up over workers, and their text for Prometheus.
// ---------------------------------------------------------------------------------------------------------------------

const METHODS = [..."EXTENSION_METHOD GET HEAD POST PUT PATCH DELETE OPTIONS TRACE CONNECT".split(" "), ""];

/** The counters of one status and one method, under a number: a request makes no text. Any other method is the first. */
const tallyOf = (tallies: Tallies, { status, method }: Pick<Exchange, "status" | "method">): Counters =>
  entry(tallies, status * 16 + Math.max(0, METHODS.indexOf(method)), newCounters);

/** Counts what a request or a connection has failed for. */
const countFailure = ({ failures }: Balancer, reason: string): unknown =>
  failures.set(reason, (failures.get(reason) ?? 0) + 1);

/** Adds one that has ended. */
function count(counters: Counters, milliseconds: number, bytesIn: number, bytesOut: number, failed: boolean): void {
  counters.requests++;
  if (failed) counters.errors++;
  counters.bytesIn += bytesIn;
  counters.bytesOut += bytesOut;
  counters.milliseconds += milliseconds;
  let bucket = 0;
  while (bucket < BUCKETS.length && milliseconds > BUCKETS[bucket]!) bucket++;
  counters.durations[bucket]!++;
}

/** All counters as one: what a service or an entrypoint has had. */
export function totalOf(tallies: Tallies): Counters {
  const total = newCounters();
  for (const { durations, ...counters } of tallies.values()) {
    for (const [key, value] of Object.entries(counters)) total[key as keyof typeof counters] += value;
    durations.forEach((value, bucket) => total.durations[bucket]! += value);
  }
  return total;
}

/** The milliseconds that a share of the requests took at most (0.95: p95), as exact as the classes are; 0: none yet. */
export function quantile({ requests, durations }: Counters, share: number): number {
  let rank = share * requests;
  for (const [bucket, held] of durations.entries()) {
    const [from, to] = [BUCKETS[bucket - 1] ?? 0, BUCKETS[bucket] ?? BUCKETS.at(-1)!];
    if (held > 0 && held >= rank) return from + (to - from) * rank / held;
    rank -= held;
  }
  return 0;
}

/**
 * What is shown to Prometheus: type, and what it means. Names and labels are Traefik's where it has them. Labels say what the config says, a status, or a method that we know: what a
 * client sends makes no series.
 */
const FAMILIES = {
  lb_entrypoint_requests_total: ["counter", "Requests that have ended, by the scheme that clients speak"],
  lb_entrypoint_request_duration_seconds: ["histogram", "Time to the end of the answer"],
  lb_entrypoint_requests_bytes_total: ["counter", "Bytes of the requests' bodies"],
  lb_entrypoint_responses_bytes_total: ["counter", "Bytes of the answers' bodies"],
  lb_open_connections: ["gauge", "Requests in flight (connections that wait for the next one are not seen)"],
  lb_failures_total: ["counter", "Requests that ended with a failure, by what x-lb-failure and the log say"],
  lb_service_requests_total: ["counter", "Requests that have ended"],
  lb_service_request_duration_seconds: ["histogram", "Time to the end of the answer, with all attempts"],
  lb_service_requests_bytes_total: ["counter", "Bytes of the requests' bodies"],
  lb_service_responses_bytes_total: ["counter", "Bytes of the answers' bodies"],
  lb_service_retries_total: ["counter", "Further attempts after the first"],
  lb_service_hedges_total: ["counter", "Second attempts beside a slow first one, by who answered"],
  lb_service_requests_in_flight: ["gauge", "Requests in flight"],
  lb_service_queue_length: ["gauge", "Requests that wait for a server with room"],
  lb_service_copies_total: ["counter", "Copies for it that mirror has asked for, by what became of them"],
  lb_service_copies_in_flight: ["gauge", "Copies in flight"],
  lb_service_panicking: ["gauge", "1: too few servers are healthy, so that all are asked"],
  lb_service_server_up: ["gauge", "1: it is healthy; 0: it is down, ejected or taken out by hand"],
  lb_server_requests_total: ["counter", "Attempts that have ended"],
  lb_server_request_duration_seconds: ["summary", "Time of attempts to the end of the answer"],
  lb_server_errors_total: ["counter", "Attempts that ended with a 5xx or with a failure that is not the client's"],
  lb_server_retries_total: ["counter", "Attempts that came here because another had failed"],
  lb_server_picks_total: ["counter", "How often the strategy in force, or one before it, took the server"],
  lb_server_requests_in_flight: ["gauge", "Attempts in flight"],
  lb_server_ejections_total: [
    "counter",
    "How often requests ejected the server: by failures, or by falling behind the others",
  ],
  lb_server_probes_total: ["counter", "Probes by their result"],
  lb_config_reloads_total: ["counter", "Reloads that put a config in force"],
  lb_config_last_reload_success: ["gauge", "1: the last reload succeeded; 0: the old config stayed in force"],
  lb_config_last_reload_success_timestamp_seconds: ["gauge", "When the config in force became it"],
  lb_build_info: ["gauge", "Always 1; the labels say what runs"],
  process_start_time_seconds: ["gauge", "When it was started"],
} satisfies Record<string, [type: "counter" | "gauge" | "histogram" | "summary", help: string]>;
type Family = keyof typeof FAMILIES;
type Put = (name: Family | `${Family}_${"bucket" | "sum" | "count"}`, labels: string, value: number) => void;

const LABEL_ESCAPES: Record<string, string> = { "\\": "\\\\", '"': '\\"', "\n": "\\n" };

/** `label="value",label="value"`, as Prometheus writes it. */
const labelsOf = (labels: Record<string, string | number>): string =>
  Object.entries(labels).map(([label, value]) =>
    `${label}="${String(value).replace(/[\\"\n]/g, (one) => LABEL_ESCAPES[one]!)}"`
  ).join();
const BOUNDS = [...BUCKETS.map((bound) => `${bound / 1_000}`), "+Inf"];

function putTallies(put: Put, level: "entrypoint" | "service", name: string, tallies: Tallies): void {
  for (const [key, { requests, bytesIn, bytesOut, milliseconds, durations }] of tallies) {
    const code = Math.floor(key / 16), method = METHODS[key % 16]!;
    const protocol = method === "" ? "tcp" : code === 101 ? "websocket" : "http";
    const labels = labelsOf({ [level]: name, code, method, protocol });
    put(`lb_${level}_requests_total`, labels, requests);
    put(`lb_${level}_requests_bytes_total`, labels, bytesIn);
    put(`lb_${level}_responses_bytes_total`, labels, bytesOut);
    let held = 0;
    for (const [i, more] of durations.entries()) {
      put(`lb_${level}_request_duration_seconds_bucket`, `${labels},le="${BOUNDS[i]}"`, held += more);
    }
    put(`lb_${level}_request_duration_seconds_sum`, labels, milliseconds / 1_000);
    put(`lb_${level}_request_duration_seconds_count`, labels, requests);
  }
}

function putServer(put: Put, service: Service, server: Server, now: number): void {
  const labels = labelsOf({ service: service.name, url: server.url }), { counters } = server;
  put("lb_service_server_up", labels, Number(server.state === "ready" && isHealthy(server, now)));
  put("lb_server_requests_total", labels, counters.requests);
  put("lb_server_request_duration_seconds_sum", labels, counters.milliseconds / 1_000);
  put("lb_server_request_duration_seconds_count", labels, counters.requests);
  put("lb_server_errors_total", labels, counters.errors);
  put("lb_server_retries_total", labels, server.retries);
  put("lb_server_picks_total", `${labels},${labelsOf({ strategy: service.config.strategy.name })}`, server.picks);
  put("lb_server_requests_in_flight", labels, server.inFlight);
  put("lb_server_ejections_total", labels, server.ejected);
  put("lb_server_probes_total", `${labels},result="passed"`, server.probesPassed);
  put("lb_server_probes_total", `${labels},result="failed"`, server.probesFailed);
}

/** Everything that is counted, flat: the text of a series and its number. What is not in force any more is not there. */
export function samplesOf(balancer: Balancer): Map<string, number> {
  const samples = new Map<string, number>();
  const put: Put = (name, labels, value) => void samples.set(labels ? `${name}{${labels}}` : name, value);
  for (const { name, inFlight, tallies } of balancer.entrypoints.values()) {
    putTallies(put, "entrypoint", name, tallies);
    put("lb_open_connections", labelsOf({ entrypoint: name }), inFlight);
  }
  for (const [reason, times] of balancer.failures) put("lb_failures_total", labelsOf({ reason }), times);
  for (const service of balancer.table.services.values()) {
    const { name, tallies, servers, retries, hedges, hedgesWon, inFlight, waiting, copies, panicking } = service;
    const labels = labelsOf({ service: name });
    putTallies(put, "service", name, tallies);
    put("lb_service_retries_total", labels, retries);
    put("lb_service_hedges_total", `${labels},answered="second"`, hedgesWon);
    put("lb_service_hedges_total", `${labels},answered="first"`, hedges - hedgesWon);
    put("lb_service_requests_in_flight", labels, inFlight);
    put("lb_service_queue_length", labels, waiting.size);
    for (const result of ["answered", "failed", "skipped"] as const) {
      put("lb_service_copies_total", `${labels},result="${result}"`, copies[result]);
    }
    put("lb_service_copies_in_flight", labels, copies.inFlight);
    put("lb_service_panicking", labels, Number(panicking));
    for (const server of servers) putServer(put, service, server, balancer.effects.now());
  }
  put("lb_config_reloads_total", "", balancer.reloads);
  put("lb_config_last_reload_success", "", Number(!balancer.reloadFailed));
  put("lb_config_last_reload_success_timestamp_seconds", "", balancer.reloadedAt.getTime() / 1_000);
  put("lb_build_info", labelsOf({ version: VERSION, runtime: balancer.runtime }), 1);
  put("process_start_time_seconds", "", balancer.startedAt.getTime() / 1_000);
  return samples;
}

/** The family of a name: without what a histogram's or summary's parts have behind it. */
const familyNamed = memo((name) =>
  (Object.hasOwn(FAMILIES, name) ? name : name.replace(/_(?:bucket|sum|count)$/, "")) as Family
);
const familyOf = (series: string): Family => {
  const end = series.indexOf("{");
  return familyNamed(end < 0 ? series : series.slice(0, end));
};

const noLines = (): string[] => [];

/** The text that Prometheus reads (exposition format 0.0.4): `text/plain; version=0.0.4`. */
export function renderMetrics(samples: ReadonlyMap<string, number>): string {
  const lines = new Map<string, string[]>();
  for (const [series, value] of samples) entry(lines, familyOf(series), noLines).push(`${series} ${value}\n`);
  return Object.entries(FAMILIES).map(([name, [type, help]]) =>
    lines.has(name) ? `# HELP ${name} ${help}\n# TYPE ${name} ${type}\n${lines.get(name)!.join("")}` : ""
  ).join("");
}

const METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8";

// ---------------------------------------------------------------------------------------------------------------------
// 25. Explain: which server was taken, and why not the others. In the same words wherever an operator asks.
// ---------------------------------------------------------------------------------------------------------------------

/** What speaks against asking a server, and where it may be asked all the same, why that is. */
function whyNot(server: Server, may: boolean, { tried, now }: Exchange): string {
  const { state, weight, inFlight, up, probeProblem, until, trying, pausedUntil, backup } = server;
  const left = (time: number) => Math.ceil((time - now) / 1_000);
  const room = Math.floor(server.limit);
  if (state !== "ready") return state === "drain" ? "it drains" : "in maintenance";
  if (weight === 0) return "its weight is 0";
  if (tried.includes(server)) return "tried before";
  const problem = up ? "" : `down${probeProblem && `: ${probeProblem}`}`;
  const ill = problem || (until > now ? `ejected for another ${left(until)} s` : "");
  if (may) return ill && `${ill}, but too few are healthy`;
  const calm = pausedUntil > now ? `it wants to be left alone for another ${left(pausedUntil)} s` : "";
  return ill || (trying ? "another request tries it out" : calm) ||
    (inFlight >= room ? `full: ${inFlight} of ${room}` : backup ? "a backup" : "");
}

/** Who of a service may be asked, with what score, why the others may not, and who takes the request. */
function choiceOf(
  service: Service,
  candidates: readonly Server[],
  exchange: Exchange,
  effects: Effects,
  taker: Server | undefined,
): Choice {
  const { strategy, config, name } = service;
  const score = strategy.score ?? SCORES[config.strategy.name];
  const before = config.sticky.cookie ? serverBefore(service, exchange, effects) : undefined;
  const servers = service.servers.map((server): Verdict => {
    const asked = candidates.includes(server), named = server === before && "the cookie names it";
    const why = [whyNot(server, asked, exchange), named].filter(Boolean).join("; ");
    const points = asked ? score?.(server, candidates as Candidates, exchange) : undefined;
    const short = points !== undefined && { score: Number(points.toPrecision(4)) };
    const auto = config.max_in_flight === AUTO && { limit: Math.floor(server.limit) };
    return { server: server.name, asked, ...(why && { why }), ...short, ...auto };
  });
  return { service: name, strategy: config.strategy.name, takes: taker?.name ?? null, servers };
}

/**
 * Whether x-lb-explain shows a token of the admin API. Signatures are compared, so that time tells nothing; and whoever
 * guesses wrong a few times is not listened to for a while.
 */
function isOperator({ effects, guesses }: Balancer, exchange: Exchange): boolean {
  const given = exchange.request.headers.get("x-lb-explain"), { admin } = exchange.table.config;
  if (!given || !admin?.token) return false;
  const bucket = bucketOf(exchange, guesses.rate), { requests, per, burst } = guesses.rate, each = per / requests;
  const full = fullAt(guesses, bucket, exchange.started);
  if (full > exchange.started + (burst - 1) * each) return false;
  const signed = (text: string) => effects.sign(effects.secret(), text);
  if ([admin.token, admin.read_token].some((token) => token && signed(token) === signed(given))) return true;
  guesses.recent.set(bucket, full + each);
  return false;
}

// ---------------------------------------------------------------------------------------------------------------------
// 26. Retry: whether a request may be tried again, and at whom.
// ---------------------------------------------------------------------------------------------------------------------

const BACK_OFF = 25; // milliseconds before the second retry at most; doubled for each further one, up to a second
const LEAST_RETRIES = 3; // a second, that the budget always allows
const MOST_SAVED = 100; // retries that can be saved up

const RETRIED_AS: Partial<Record<Failure, string | number>> = {
  "connect": "connect",
  "connect-timeout": "connect",
  "reset": "reset",
  "invalid-answer": 502,
  "timeout": 504,
};

/**
 * Who may be asked again: untried and healthy ones, untried backups; and where no other service can be asked, untried
 * ones, and where all have been tried anybody. A retry is no trial, and leaves alone who has asked for that.
 */
function forRetry(service: Service, candidates: readonly Server[], tried: Server[], now: number): readonly Server[] {
  const calm = candidates.filter((server) => now >= server.pausedUntil);
  const untried = calm.filter((server) => !tried.includes(server));
  const healthy = untried.filter((server) => server.up && server.until === 0);
  if (healthy.length) return healthy;
  const backups = service.servers.filter((server) => server.backup && isEnabled(server) && !tried.includes(server));
  const ready = withRoom(service, backups).filter((server) => isHealthy(server, now) && now >= server.pausedUntil);
  if (ready.length || service.config.fallback) return ready;
  return untried.length ? untried : calm;
}

/**
 * Whether another attempt may be made: the policy names what happened; repeating it does no harm, because no server has
 * seen the request or it is idempotent and its body is at hand; somebody is left who has not asked to be left alone; and
 * the budget has room. A connection that never stood put no load on any server, and so costs no budget.
 */
function mayRetry(
  exchange: Exchange,
  { policy, retryOn, service, fallback }: Destination,
  outcome: Outcome,
  retry: number,
  effects: Effects,
): boolean {
  if (retry >= policy.retries) return false;
  const what = outcome.kind === "answer" ? outcome.response.status : RETRIED_AS[outcome.kind];
  if (what === undefined || !retryOn.has(what)) return false;
  if (exchange.request.signal.aborted) return false;
  const sent = outcome.kind === "answer" || outcome.sent;
  if (sent && !mayRepeat(exchange)) return false;
  const now = effects.now(), { candidates } = service;
  if (!fallback && candidates.length > 0 && forRetry(service, candidates, exchange.tried, now).length === 0) {
    return false;
  }
  if (!sent) return true;
  if (retry === 0) earn(exchange, service);
  return spendRetry(service, policy.retries, now);
}

/**
 * Every request earns its share of a retry: one that wants it when it asks, a good one when it ends. What those have saved
 * up is for the many that a server which dies takes with it at once.
 */
function earn(exchange: Exchange, service: Service): void {
  if (exchange.earned) return;
  exchange.earned = true;
  service.saved = Math.min(MOST_SAVED, service.saved + service.config.retry_budget);
}

/**
 * Takes one retry out of the budget; false where there is none left. The first few of a second are lent, and what has not
 * been paid back after it is forgiven: that is for those to whom hardly anybody comes.
 */
function spendRetry(service: Service, retries: number, now: number): boolean {
  const lent = Math.max(LEAST_RETRIES, retries);
  if (now - service.secondAt >= 1_000) {
    service.secondAt = now;
    service.retried = 0;
    service.saved = Math.max(service.saved, 0);
  }
  const mayOwe = service.retried < lent && service.saved >= 1 - lent;
  if (service.saved < 1 - 1e-9 && !mayOwe) return false; // five times 0.2 is a little less than 1
  service.retried++;
  service.saved--;
  return true;
}

/** A pause before the second retry and those after it. */
const backOff = (retry: number, { random, sleep }: Effects): Promise<void> =>
  sleep(random() * Math.min(1_000, BACK_OFF * 2 ** (retry - 1)));

// ---------------------------------------------------------------------------------------------------------------------
// 27. Pick: who takes the next attempt: now, later, or elsewhere.
// ---------------------------------------------------------------------------------------------------------------------

/** What the service's strategy says. */
function choose(service: Service, candidates: Candidates, exchange: Exchange): Server {
  if (!exchange.tried.length) exchange.turn = service.turn++;
  exchange.key = service.key(exchange);
  return service.strategy(candidates, exchange);
}

/** The server that the client had before, as long as it may be asked; else another one, and a cookie that says so. */
function pickSticky(service: Service, candidates: Candidates, exchange: Exchange, effects: Effects): Server {
  const before = serverBefore(service, exchange, effects);
  const stays = before !== undefined && candidates.includes(before);
  const server = stays ? before : choose(service, candidates, exchange);
  exchange.headers = withoutCookie(exchange.headers, service.config.sticky.cookie);
  exchange.cookie = server === before ? "" : cookieFor(service, server, exchange, effects);
  return server;
}

/** Remembers a choice for the operator who asks. Of a request that waits the latest is enough. */
function noteChoice(exchange: Exchange, candidates: readonly Server[], effects: Effects, taker?: Server): undefined {
  const { service } = exchange.destination!, choices = exchange.choices!, last = choices.at(-1);
  if (last?.service === service.name && !last.takes) choices.pop();
  choices.push(choiceOf(service, candidates, exchange, effects, taker));
}

function picked({ tried, destination, now }: Exchange, server: Server): Server {
  onPicked(destination!.service, server, now);
  tried.push(server);
  return server;
}

/** The server that takes the next attempt. It is picked for it: in flight from here on, until `judge` or `settle`. */
function pickServer(exchange: Exchange, effects: Effects, now: number): Server | undefined {
  const { tried } = exchange, { service } = exchange.destination!;
  exchange.now = now;
  if (now >= service.compareAt) compare(service, now, effects);
  let candidates = candidatesOf(service, now);
  if (tried.length) candidates = forRetry(service, candidates, tried, now);
  candidates = withRoom(service, candidates);
  if (candidates.length === 0) return exchange.choices && noteChoice(exchange, candidates, effects);
  const server = service.config.sticky.cookie
    ? pickSticky(service, candidates as Candidates, exchange, effects)
    : choose(service, candidates as Candidates, exchange);
  if (exchange.choices) noteChoice(exchange, candidates, effects, server);
  return picked(exchange, server);
}

/** The same for who has just come: nobody overtakes those who wait. */
function pickNow(exchange: Exchange, effects: Effects, now: number): Server | undefined {
  const { service } = exchange.destination!;
  if (service.waiting.size > 0) wake(service);
  return pickServer(exchange, effects, now);
}

/** Where all who may be asked are full, a server later; where there is nobody to ask, the failure so far. */
function waitForServer(exchange: Exchange, failure: FailureName, effects: Effects) {
  const { service, fallback } = exchange.destination!, { tried, request } = exchange;
  if (candidatesOf(service, effects.now()).length === 0 || fallback && tried.length > 0) return failure;
  return inQueue(service, request.signal, effects, () => pickServer(exchange, effects, effects.now()));
}

/** A server later, or where that is in vain, one of the service that falls in; or why there is none. */
async function laterOrElsewhere(exchange: Exchange, failure: FailureName, effects: Effects) {
  for (;;) {
    const server = await waitForServer(exchange, failure, effects);
    const { service, fallback } = exchange.destination!;
    if (typeof server !== "string" || server === "client-left" || !fallback) return server;
    service.inFlight--;
    fallback.service.inFlight++;
    exchange.destination = fallback;
    exchange.cookie = "";
    const other = pickNow(exchange, effects, effects.now());
    if (other) return other;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// 28. Settle: what an attempt has come to, and a request: counted once each, when the last byte has passed.
// ---------------------------------------------------------------------------------------------------------------------

const TOO_MUCH = new Set([429, 503]); // that Retry-After is believed with
const GATEWAY_ERRORS = new Set([502, 503, 504]); // an answer that counts against its server
const BLAMELESS = new Set<string>(["client-left", "client-timeout", "bad-body", "body-too-large"]);

/** Reports what is wrong with a server, once a second at most: the access log has every request. */
function complain(service: Service, server: Server, detail: string, effects: Effects): void {
  const now = effects.now();
  if (now - server.saidAt < 1_000) return;
  server.saidAt = now;
  effects.report("warn", `${service.name}: ${server.name}: ${detail}`);
}

/** What an attempt says about its server before there is a body. What the client did says nothing. */
function judge(exchange: Exchange, server: Server, outcome: Outcome, effects: Effects): void {
  const { destination, attempt, upgrade } = exchange, { service } = destination!;
  if (outcome.kind === "answer") {
    const { response } = outcome; // whose headers are read only where they have to be: that costs, on Node more than time
    const wait = TOO_MUCH.has(response.status) && response.headers.get("retry-after");
    if (wait) onRetryAfter(service, server, wait, effects);
    const { startedAt, headAt } = attempt!, lost = exchange.stop?.aborted;
    onHead(service, server, response.status, startedAt, headAt, effects);
    if (service.hedge && !lost && response.status < 500) learnPatience(service, headAt - startedAt);
    if (upgrade?.response) onAnswered(service, server, effects); // its end may be hours away
    return;
  }
  const now = effects.now(), began = attempt!.startedAt, blame = !BLAMELESS.has(outcome.kind);
  count(server.counters, now - began, outcome.sent ? receivedBy(exchange) : 0, 0, blame);
  if (blame) {
    complain(service, server, outcome.detail, effects);
    onSilence(service, server, began, now, effects);
  } else if (server.until !== 0 && isTrial(server, began)) onTried(service, server, "undecided", effects);
  release(service, server);
}

/** Gives up an answer that another attempt will replace. */
async function discard(exchange: Exchange, response: Response): Promise<void> {
  await response.body?.cancel();
  exchange.ended = false;
}

/** The end of an attempt's answer, whole or not: every pick comes here exactly once, or with its failure to `judge`. */
function settle(
  balancer: Balancer,
  exchange: Exchange,
  server: Server,
  status: number,
  bytes: number,
  problem: Failure | undefined,
): void {
  const { service } = exchange.destination!;
  const { effects } = balancer;
  const open = status === 101; // for long: how it ends says nothing about the next one
  const cutOff = problem !== undefined && !BLAMELESS.has(problem) && !open;
  exchange.endedAt = effects.now();
  const { startedAt, headAt } = exchange.attempt!, milliseconds = (open && headAt || exchange.endedAt) - startedAt;
  count(server.counters, milliseconds, receivedBy(exchange), bytes, cutOff || status >= 500);
  if (cutOff) complain(service, server, `its answer was cut off (${problem})`, effects);
  if (cutOff || GATEWAY_ERRORS.has(status)) onFailed(service, server, startedAt, effects);
  else if (problem === undefined && !open) {
    onAnswered(service, server, effects);
    if (exchange.tried.length === 1) earn(exchange, service);
  }
  release(service, server);
  exchange.ended = true;
  exchange.bytes = bytes;
  exchange.problem = problem ?? "";
  if (exchange.status) finished(balancer, exchange);
}

/** The end of every exchange, once. */
function finished(balancer: Balancer, exchange: Exchange): void {
  const { entrypoint, destination, status, bytes, problem, endedAt, started } = exchange;
  const failed = status >= 500 || problem !== "" && !BLAMELESS.has(problem) && status < 400;
  const [milliseconds, received] = [endedAt - started, receivedBy(exchange)];
  balancer.inFlight--;
  if (exchange.counted) leaveCrowd(balancer.clients, exchange.counted);
  entrypoint.inFlight--;
  count(tallyOf(entrypoint.tallies, exchange), milliseconds, received, bytes, failed);
  if (destination) {
    destination.service.inFlight--;
    count(tallyOf(destination.service.tallies, exchange), milliseconds, received, bytes, failed);
  }
  if (problem) countFailure(balancer, problem);
  const { format } = exchange.table.config.log;
  if (format === "off" || !exchange.chosen && !problem && status < 500) return;
  try {
    balancer.effects.write(accessRecord(balancer, exchange), format);
  } catch (error) { // the request has had its answer
    balancer.effects.report("error", `the log cannot be written: ${error}`);
  }
}

/** The answer that the client gets. With its body's last byte the exchange is finished; one of our own is so at once. */
function conclude(balancer: Balancer, exchange: Exchange, response: Response, own = false): Response {
  exchange.status = response === exchange.upgrade?.response ? 101 : response.status;
  if (own) {
    exchange.endedAt = balancer.effects.now();
    exchange.bytes = exchange.method === "HEAD" ? 0 : Number(response.headers.get("content-length"));
    for (const [name, value] of pairs([...exchange.quota, ...choiceHeaders(exchange)])) {
      response.headers.set(name, value);
    }
    if (balancer.draining) response.headers.set(...LAST);
  }
  if (own || exchange.ended) finished(balancer, exchange);
  return response;
}

// ---------------------------------------------------------------------------------------------------------------------
// 29. Hedge: attempts beside the first. A second one where the first is slow, and copies that nobody waits for.
// ---------------------------------------------------------------------------------------------------------------------

/** What goes on when the answer has been given: copies, and attempts that have lost. The edge has to wait for it. */
const goingOn = new WeakMap<Request, Promise<unknown>>();
function goOn({ request }: Exchange, work: Promise<void>): void {
  goingOn.set(request, Promise.all([goingOn.get(request), work]));
}

/** One attempt; its end comes to `settle`, what it says before that to `judge`. */
const ask = (balancer: Balancer, exchange: Exchange, server: Server): Promise<Outcome> =>
  forward(
    balancer,
    exchange,
    server,
    (status, bytes, problem) => settle(balancer, exchange, server, status, bytes, problem),
  );

/** One of two attempts at the same time. What comes of it is its own until it has won. */
interface Leg {
  server: Server;
  exchange: Exchange;
  won: boolean;
  stop: AbortController;
  outcome: Promise<Outcome>;
}

function launch(balancer: Balancer, exchange: Exchange, server: Server): Leg {
  const stop = new AbortController(), own: Exchange = { ...exchange, stop: stop.signal };
  const leg = { server, exchange: own, won: false, stop };
  const outcome = forward(balancer, own, server, (status, bytes, problem) => {
    settle(balancer, leg.won ? exchange : own, server, status, bytes, problem);
  });
  return Object.assign(leg, { outcome });
}

const SAFE = new Set(["GET", "HEAD", "OPTIONS"]);
const MOST_GRACE = 1_000; // milliseconds that an attempt may run on that has lost

/** Whether a second server may be asked while the first is still busy: nobody notices that a safe request came twice. */
const mayHedge = ({ method, length, upgrade }: Exchange, { hedge, measured }: Service): boolean =>
  hedge > 0 && measured >= LEARNED && length === 0 && SAFE.has(method) && !upgrade;

/**
 * Asks one server, and a second one when the first takes longer than most answers do. The first good answer wins and the
 * other attempt is given up; a bad one does not win while the other may still be better.
 */
async function askTwo(balancer: Balancer, exchange: Exchange, server: Server): Promise<Outcome> {
  const { effects } = balancer, { service, retryOn } = exchange.destination!;
  if (!exchange.trace) takeUpTrace(balancer, exchange); // one for both
  const first = launch(balancer, exchange, server);
  const soon = await Promise.race([first.outcome, effects.sleep(service.patience)]);
  const other = soon ? undefined : pickSecond(exchange, first, effects);
  if (!other) return await win(exchange, first);
  service.retrying++;
  const second = launch(balancer, exchange, other);
  const ahead = await Promise.race([first, second].map((leg) => leg.outcome.then(() => leg)));
  const behind = ahead === first ? second : first;
  const outcome = await ahead.outcome;
  const good = outcome.kind === "answer" && outcome.response.status < 500 && !retryOn.has(outcome.response.status);
  const [winner, loser] = good ? [ahead, behind] : [behind, ahead];
  goOn(exchange, lose(loser, effects));
  await winner.outcome;
  service.retrying--;
  service.hedges++;
  if (winner === second) service.hedgesWon++;
  exchange.tried.splice(-2, 2, loser.server, winner.server); // the last one is who answers
  return await win(exchange, winner);
}

/** The request goes on with this attempt. */
function win(exchange: Exchange, leg: Leg): Promise<Outcome> {
  const { attempt, span, earned, ended, endedAt, bytes, problem } = leg.exchange;
  leg.won = true;
  Object.assign(exchange, { attempt, span, earned, ended, endedAt, bytes, problem });
  return leg.outcome;
}

/**
 * An attempt whose answer nobody gets. It may run as long again as it already has: a server that was only a little late
 * says so, and one that hangs shows that it is not just late. Then it is given up.
 */
async function lose({ server, exchange, stop, outcome }: Leg, effects: Effects): Promise<void> {
  const { service } = exchange.destination!, { startedAt } = exchange.attempt!;
  await Promise.race([outcome, effects.sleep(Math.min(MOST_GRACE, effects.now() - startedAt))]);
  stop.abort();
  const late = await outcome;
  if (late.kind === "client-left") onGivenUp(service, server, startedAt, effects);
  judge(exchange, server, late, effects);
  if (late.kind === "answer") await late.response.body?.cancel().catch(() => {});
}

/** Another server, healthy and with room, for a second attempt that the budget allows. */
function pickSecond(exchange: Exchange, first: Leg, effects: Effects): Server | undefined {
  const { service } = exchange.destination!, now = exchange.now = effects.now();
  const others = withRoom(service, candidatesOf(service, now))
    .filter((server) => !exchange.tried.includes(server) && server.up && server.until === 0);
  if (others.length === 0) return undefined;
  earn(exchange, service);
  if (!spendRetry(service, 0, now)) return undefined;
  try {
    const server = choose(service, others as readonly Server[] as Candidates, exchange);
    if (exchange.choices) noteChoice(exchange, others, effects, server);
    return picked(exchange, server);
  } catch (error) { // a strategy's: the first attempt is nobody's any more
    goOn(exchange, lose(first, effects));
    throw error;
  }
}

const MOST_COPIES = 100; // in flight to one service: what comes then is not copied

/**
 * Has a copy of a request sent to another service, behind the request itself. Nobody waits for it; where the body is a
 * stream there is none to copy.
 */
function mirror(balancer: Balancer, exchange: Exchange, destination: Destination): void {
  const { effects } = balancer, { copies } = destination.service;
  if (exchange.upgrade || effects.random() >= destination.weight) return; // a conversation has no copy
  if (exchange.body instanceof ReadableStream || copies.inFlight >= MOST_COPIES) return void copies.skipped++;
  copies.inFlight++;
  const sent = Promise.resolve().then(() => sendCopy(balancer, exchange, destination)).catch((error) =>
    effects.report("error", error instanceof Error ? error.stack ?? error.message : String(error))
  ).finally(() => copies.inFlight--);
  goOn(exchange, sent);
}

/** Asks once, and throws the answer away. What comes of it says nothing about the server, and takes nothing but its room. */
async function sendCopy(balancer: Balancer, exchange: Exchange, destination: Destination): Promise<void> {
  const { effects } = balancer, { service } = destination, { method, headers, url } = exchange.request;
  const request = new Request(url, { method, headers }); // with a signal of its own: the client may leave
  const copy: Exchange = { ...exchange, request, destination, tried: [], choices: undefined };
  const server = pickServer(copy, effects, effects.now());
  if (server === undefined) return void service.copies.skipped++;
  if (server.trying) onTried(service, server, "undecided", effects); // a copy tries nobody out
  let problem: Failure | undefined;
  const outcome = await forward(balancer, copy, server, (_status, _bytes, why) => {
    problem = why;
    release(service, server);
  }, false);
  if (outcome.kind === "answer") await outcome.response.body?.pipeTo(new WritableStream()).catch(() => {});
  else {
    problem = outcome.kind;
    release(service, server);
    complain(service, server, outcome.detail, effects);
  }
  service.copies[problem ? "failed" : "answered"]++;
}

// ---------------------------------------------------------------------------------------------------------------------
// 30. Balance: the request path. gate -> matchRoute -> pickServer -> forward -> settle -> (retry, minus those tried) -> response
// ---------------------------------------------------------------------------------------------------------------------

const MAX_HOPS = 20; // entries of Via

/** A request that has just come in, with what is told about it where its peer is trusted. */
function exchangeOf(balancer: Balancer, request: Request, from: Client, wrapped = false): Exchange {
  const exchange = newExchange(balancer, request, from, wrapped), { config, trusts } = exchange.table;
  if (config.trust.length > 0 && trusts(from.address)) {
    exchange.told = toldBy(from.headers);
    exchange.client = clientBehind(from.address, exchange.told, trusts);
  }
  exchange.id = exchange.told?.get("x-request-id") ?? `${balancer.name}-${(++balancer.requests).toString(36)}`;
  return exchange;
}

/** Answers one request; `env` is what the runtime hands over beside it. */
function balance(balancer: Balancer, request: Request, env: unknown, wrapped: boolean): Response | Promise<Response> {
  const exchange = exchangeOf(balancer, request, balancer.effects.client(request, env), wrapped);
  balancer.inFlight++;
  exchange.entrypoint.inFlight++;
  try {
    const refusal = admit(exchange) ?? loop(balancer, request) ?? crowd(balancer, exchange);
    if (exchange.table.config.admin?.token && isOperator(balancer, exchange)) exchange.choices = [];
    if (refusal) return refuse(balancer, exchange, refusal);
    const how = asksForWebSocket(exchange) ? balancer.effects.upgrade(request, env) : undefined;
    if (how) exchange.upgrade = upgradeOf(balancer, exchange.headers, how);
    const route = exchange.route = matchRoute(exchange.table, exchange);
    if (!route) return refuse(balancer, exchange, exchange.allow ? "bad-method" : "no-route");
    if (route.admits && !route.admits(exchange.client)) return refuse(balancer, exchange, "denied");
    if (route.buckets && !withinRate(route.buckets, exchange)) return refuse(balancer, exchange, "rate");
    if (exchange.length > route.body_limit) return refuse(balancer, exchange, "body-too-large");
    return answer(balancer, exchange, route);
  } catch (error) {
    return internal(balancer, exchange, error);
  }
}

/** Does what the route says: answers by itself, or asks servers, with Hono's middleware around that where it is wanted. */
function answer(balancer: Balancer, exchange: Exchange, route: Route): Response | Promise<Response> {
  const { action } = route;
  if (action.kind === "redirect") return conclude(balancer, exchange, redirect(exchange, action), true);
  if (action.kind === "respond") return conclude(balancer, exchange, respondLiterally(route, action), true);
  if (goesNoFurther(exchange)) return conclude(balancer, exchange, ownOptions(route), true);
  const destination = exchange.destination = drawDestination(route, exchange, balancer.effects);
  destination.service.inFlight++;
  if (!destination.around || exchange.upgrade) return attempts(balancer, exchange, destination);
  return layered(balancer, exchange, destination.around, () => attempts(balancer, exchange, destination));
}

/** What may be asked here, said by ourselves. */
function ownOptions({ methods }: Route): Response {
  const allow = (methods.length ? methods : ANY_METHOD).join(", ");
  return new Response(null, { status: 200, headers: { allow, "content-length": "0" } });
}

/** Middleware may answer in place of a server, as CORS does with preflights. */
async function layered(balancer: Balancer, exchange: Exchange, around: Around, answer: () => Promise<Response>) {
  const response = await around.fetch(exchange.request, { answer });
  return exchange.status ? response : conclude(balancer, exchange, response, true);
}

/** A request that has been here before, or that has passed too many proxies. */
function loop({ via }: Balancer, request: Request): FailureName | undefined {
  const chain = request.headers.get("via");
  return chain !== null && (chain.includes(via) || chain.split(",").length > MAX_HOPS) ? "loop" : undefined;
}

/** One of a split's services: where the client was before, or else by weight. */
function drawDestination(route: Route, exchange: Exchange, effects: Effects): Destination {
  const { destinations, weight, sticky } = route;
  const before = sticky ? destinationBefore(route, exchange, effects) : undefined;
  if (before) return before;
  let mark = destinations.length > 1 ? exchange.random() * weight : 0;
  return destinations.find((one) => (mark -= one.weight) < 0) ?? destinations[0]!;
}

/** Asks one server after another until one answers or no further attempt may be made. */
async function attempts(balancer: Balancer, exchange: Exchange, first: Destination): Promise<Response> {
  const { effects } = balancer;
  try {
    const waited = exchange.length !== 0; // for its body, however that turned out
    const refusal = waited ? await takeRequestBody(exchange, first, effects) : undefined;
    if (refusal) return refuse(balancer, exchange, refusal);
    let failure: FailureName = "no-server"; // what the client is told when there is nobody to ask
    for (let retry = 0;; retry++) {
      const now = retry > 0 || waited ? effects.now() : exchange.started;
      const server: Server | FailureName = pickNow(exchange, effects, now) ??
        await laterOrElsewhere(exchange, failure, effects);
      if (typeof server === "string") return refuse(balancer, exchange, server);
      const destination = exchange.destination!, { service } = destination;
      if (retry === 0 && exchange.route!.mirror) mirror(balancer, exchange, exchange.route!.mirror);
      if (retry > 0) {
        service.retrying++;
        service.retries++;
        server.retries++;
      }
      let outcome: Outcome;
      try {
        const two = mayHedge(exchange, service);
        outcome = two ? await askTwo(balancer, exchange, server) : await ask(balancer, exchange, server);
      } finally {
        if (retry > 0) service.retrying--;
      }
      judge(exchange, exchange.tried.at(-1)!, outcome, effects);
      if (!mayRetry(exchange, destination, outcome, retry, effects)) {
        if (outcome.kind === "answer") return conclude(balancer, exchange, outcome.response);
        return refuse(balancer, exchange, exchange.request.signal.aborted ? "client-left" : outcome.kind);
      }
      if (outcome.kind === "answer") await discard(exchange, outcome.response);
      else failure = outcome.kind;
      if (retry > 0) await backOff(retry, effects);
    }
  } catch (error) {
    return internal(balancer, exchange, error);
  }
}

/** Someone else's code has thrown, a strategy say: it costs its request and nothing more. */
function internal(balancer: Balancer, exchange: Exchange, error: unknown): Response {
  balancer.effects.report("error", error instanceof Error ? error.stack ?? error.message : String(error));
  return refuse(balancer, exchange, "internal");
}

/** Answers for the servers: why the request goes no further. */
function refuse(balancer: Balancer, exchange: Exchange, kind: FailureName): Response {
  const response = refusal(kind, exchange.request.headers.get("accept") ?? "", exchange.id);
  if (response.status === 405) response.headers.set("allow", [...new Set(exchange.allow ?? ANY_METHOD)].join(", "));
  exchange.problem = kind;
  return conclude(balancer, exchange, response, true);
}

const ANY_METHOD = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];

// ---------------------------------------------------------------------------------------------------------------------
// 31. Tls: what is shown to those who connect over TLS. Read from files, and again when these change.
// ---------------------------------------------------------------------------------------------------------------------

/** A certificate with its key, as texts, and the names that it is for. */
interface Pair {
  cert: string;
  key: string;
  names: string[];
}
/** What a listener over TLS shows, the first where nobody asks for another, and what it asks of clients. */
interface Secure {
  pairs: [Pair, ...Pair[]];
  clientCa: string; // or empty
}

function readPem(file: string): string {
  try {
    return readFileSync(file, "utf8");
  } catch (error) {
    throw new Error(`${file} cannot be read: ${(error as Error).message}`);
  }
}

/** What is in a file, or an error that says what is not. */
function parsed<T>(file: string, what: string, parse: (text: string) => T): T {
  const text = readPem(file);
  try {
    return parse(text);
  } catch {
    throw new Error(`${file} holds no ${what} (PEM)`);
  }
}

const readCertificate = (file: string): X509Certificate =>
  parsed(file, "certificate", (text) => new X509Certificate(text));

/** @throws {Error} with the file and what is wrong with it */
function readPair({ cert, key }: FrontConfig["tls"][number]): Pair {
  const certificate = readCertificate(cert);
  const own = certificate.checkPrivateKey(parsed(key, "private key without a password", createPrivateKey));
  if (!own) throw new Error(`${key} is not the key of ${cert}`);
  const { subjectAltName = "", subject } = certificate;
  const names = [...subjectAltName.matchAll(/DNS:([^\s,"]+)/g)].map(([, name]) => lower(name!));
  const common = /^CN=(\S+)$/m.exec(subject)?.[1];
  return { cert: readPem(cert), key: readPem(key), names: names.length || !common ? names : [lower(common)] };
}

/** @throws {Error} with the file and what is wrong with it */
function readSecure({ tls, client_ca }: Pick<FrontConfig, "tls" | "client_ca">): Secure {
  if (client_ca) readCertificate(client_ca);
  return { pairs: tls.map(readPair) as Secure["pairs"], clientCa: client_ca && readPem(client_ca) };
}

/** The certificate for a name; one for `*.example.com` has any label in place of the star (RFC 6125 section 6.4.3). */
function pairFor<P extends { names: string[] }>(pairs: readonly [P, ...P[]], name: string): P {
  const asked = lower(name), wildcard = asked.replace(/^[^.]*/, "*");
  return pairs.find(({ names }) => names.includes(asked)) ?? pairs.find(({ names }) => names.includes(wildcard)) ??
    pairs[0];
}

/** What a server of node:tls shows for each name, and how that is changed. */
function showing(secure: Secure) {
  const contextsOf = ({ pairs, clientCa }: Secure) =>
    pairs.map(({ names, cert, key }) => {
      const own = { cert, key, minVersion: "TLSv1.2" as const, ...(clientCa && { ca: clientCa }) };
      return { names, own, context: createSecureContext(own) };
    }) as [Shown, ...Shown[]];
  type Shown = { names: string[]; own: SecureContextOptions; context: SecureContext };
  let contexts = contextsOf(secure);
  const options: TlsOptions = {
    ...contexts[0].own,
    requestCert: secure.clientCa !== "",
    SNICallback: (name, done) => done(null, pairFor(contexts, name).context),
  };
  const swapOf = (server: TlsServer) => (next: Secure) => {
    contexts = contextsOf(next);
    server.setSecureContext(contexts[0].own);
    Object.assign(server, { requestCert: next.clientCa !== "" }); // read for each connection
  };
  return { options, swapOf };
}

/** What changes with a file, also when an editor puts another one in its place. */
function fileStamp(file: string): string {
  try {
    const { mtimeMs, size, ino } = statSync(file);
    return `${mtimeMs} ${size} ${ino}`;
  } catch { // it is not there, or in a folder that may not be read
    return "";
  }
}

/** What changes with the certificates of a listener. */
const stampOf = ({ tls, client_ca }: FrontConfig): string =>
  [...tls.flatMap(({ cert, key }) => [cert, key]), client_ca].filter(Boolean).map((file) => file + fileStamp(file))
    .join();

/** Certificates that clients do not accept, for their dates. As nginx and Caddy do, they are shown all the same. */
function outdated({ tls }: Pick<FrontConfig, "tls">, now: Date): string[] {
  return tls.flatMap(({ cert }) => {
    const { validFrom, validTo } = readCertificate(cert), [from, to] = [new Date(validFrom), new Date(validTo)];
    const day = (date: Date) => date.toISOString().slice(0, 10);
    return now > to
      ? [`${cert} has expired on ${day(to)}`]
      : now < from
      ? [`${cert} is not valid before ${day(from)}`]
      : [];
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// 32. Tcp: connections that are not HTTP. The same services and servers, with bytes in place of requests.
// ---------------------------------------------------------------------------------------------------------------------

/** One connection's life, from its listener to its last byte. A Draw, so that strategies can choose its server. */
interface Relay extends Draw {
  route: TcpRoute;
  near: Socket; // to the client
  target: string; // the listener's address
  id: string;
  entrypoint: Entrypoint;
  started: number;
  connectedAt: number; // to its server; 0: not yet
  since: number; // when something last passed
  tried: Server[];
  received: number; // bytes from the client
  bytes: number; // bytes to it
  problem: FailureName | "";
}

function newRelay(balancer: Balancer, route: TcpRoute, target: string, near: Socket): Relay {
  const { effects } = balancer, client = unmapped(near.remoteAddress), started = effects.now();
  const turn = route.service.turn++, id = `${balancer.name}-${(++balancer.requests).toString(36)}`;
  const entrypoint = entry(balancer.entrypoints, "tcp", newEntrypoint);
  return {
    ...{ random: effects.random, now: started, turn, key: client, client, request: undefined },
    ...{ route, near, target, id, entrypoint, started, connectedAt: 0, since: started, tried: [] },
    ...{ received: 0, bytes: 0, problem: "" },
  };
}

/** Finds a server for a client's connection and stays until both are closed. */
async function carry(balancer: Balancer, relay: Relay): Promise<void> {
  const { effects } = balancer, { route: { service, admits }, near, entrypoint } = relay;
  near.on("error", () => relay.problem ||= "client-left");
  for (const one of [balancer, entrypoint, service]) one.inFlight++;
  try {
    relay.problem = letIn(balancer, near) ?? (!admits || admits(relay.client) ? "" : "denied");
    if (!relay.problem) {
      const far = await reach(relay, effects);
      if (far) await couple(balancer, relay, far);
    }
  } catch (error) { // a strategy of somebody's own has thrown
    effects.report("error", error instanceof Error ? error.stack ?? error.message : String(error));
    relay.problem = "internal";
  }
  breakOff(near);
  for (const one of [balancer, entrypoint, service]) one.inFlight--;
  tally(balancer, relay);
}

/** What is left of a connection: counts, and a line of the log. */
function tally(balancer: Balancer, relay: Relay): void {
  const { effects, table } = balancer;
  const { route: { service }, entrypoint, bytes, received, problem } = relay, record = tcpRecord(relay, effects);
  const failed = record.status >= 500 && problem !== "draining", { format, sample } = table.config.log;
  for (const { tallies } of [entrypoint, service]) {
    const counters = tallyOf(tallies, { status: record.status, method: "" });
    count(counters, record.ended, received, bytes, failed);
  }
  if (problem) countFailure(balancer, problem);
  if (format !== "off" && (problem || effects.random() < sample)) effects.write(record, format);
}

/** Asks one server after another for a connection. No byte has passed yet, so that nothing can happen twice. */
async function reach(relay: Relay, effects: Effects): Promise<Socket | undefined> {
  const { route: { service }, near, tried } = relay;
  for (let retry = 0;; retry++) {
    const now = relay.now = effects.now(), { retries, timeouts } = service.config;
    if (now >= service.compareAt) compare(service, now, effects);
    const ready = withRoom(service, candidatesOf(service, now));
    const candidates = tried.length ? forRetry(service, ready, tried, now) : ready;
    if (candidates.length === 0) return void (relay.problem ||= "no-server");
    const server = service.strategy(candidates as Candidates, relay);
    onPicked(service, server, now);
    tried.push(server);
    if (retry > 0) [service.retries, server.retries] = [service.retries + 1, server.retries + 1];
    onAsked(server, now);
    const far = await connectTo(server, timeouts.connect, effects), milliseconds = effects.now() - now;
    onHeard(server, now);
    if (!(far instanceof WireError)) {
      onHead(service, server, 200, now, now + milliseconds, effects);
      relay.connectedAt = relay.since = now + milliseconds;
      relay.problem = "";
      return far;
    }
    relay.problem = far.kind;
    count(server.counters, milliseconds, 0, 0, true);
    complain(service, server, far.message, effects);
    onSilence(service, server, now, now + milliseconds, effects);
    release(service, server);
    if (retry >= retries || near.destroyed) return undefined;
    if (retry > 0) await backOff(retry, effects);
  }
}

function connectTo(server: Server, timeout: number, effects: Effects): Promise<Socket | WireError> {
  return new Promise((resolve) => {
    const far = dial(server, true), done = new AbortController();
    const fail = (kind: Failure, detail: string) => {
      done.abort();
      far.destroy();
      resolve(new WireError(kind, false, detail));
    };
    far.on("connect", () => (done.abort(), resolve(far)));
    far.on("error", (error: Error) => fail("connect", error.message || String(error)));
    effects.sleep(timeout, done.signal).then(() => {
      if (!done.signal.aborted) fail("connect-timeout", `no connection within ${timeout} ms`);
    });
  });
}

/** Passes bytes both ways until both sides have ended, or one breaks: then the other is made to see that. */
async function couple(balancer: Balancer, relay: Relay, far: Socket): Promise<void> {
  const { effects, relays } = balancer, { near, route: { service, proxy_protocol }, tried } = relay;
  const server = tried.at(-1)!, over = new AbortController(), began = effects.now();
  const end = (problem: FailureName) => (relay.problem ||= problem, breakOff(near), breakOff(far));
  const drained = () => end("draining");
  relays.add(drained);
  far.on("error", () => relay.problem ||= "reset");
  far.once("data", () => onAnswered(service, server, effects));
  if (near.destroyed || near.remoteAddress === undefined) end("client-left");
  else {
    const closed = [near, far].map((socket) => new Promise((resolve) => socket.on("close", resolve)));
    if (proxy_protocol) far.write(proxyHeader(near));
    pump(relay, near, far, "received", effects);
    pump(relay, far, near, "bytes", effects);
    void watch(relay, effects, over.signal).then(() => end("idle"));
    await Promise.all(closed);
  }
  over.abort();
  relays.delete(drained);
  const failed = relay.problem === "reset" && relay.bytes === 0; // later it may be how they say goodbye
  count(server.counters, effects.now() - began, relay.received, relay.bytes, failed);
  if (failed) {
    complain(service, server, "it reset the connection before it sent anything", effects);
    onFailed(service, server, began, effects);
  } else if (!relay.problem) onAnswered(service, server, effects);
  release(service, server);
}

/** One direction. What ends here ends there, and leaves the way back open; a slow reader stops a fast writer. */
function pump(relay: Relay, from: Socket, to: Socket, counted: "received" | "bytes", { now }: Effects): void {
  from.on("data", (bytes: Bytes) => {
    relay.since = now();
    relay[counted] += bytes.length;
    if (!to.write(bytes)) from.pause();
  });
  to.on("drain", () => {
    relay.since = now();
    from.resume();
  });
  if (from.readableEnded) to.end(); // before there was anybody to tell
  else from.on("end", () => to.end());
  from.on("close", () => {
    if (!from.readableEnded) breakOff(to);
    else if (!from.writableFinished) to.destroySoon(); // once it has all that was sent before that
  });
}

const A_MOMENT = 20; // milliseconds

/** Resolves when nothing has passed for the time that the service allows. */
async function watch(relay: Relay, effects: Effects, over: AbortSignal): Promise<void> {
  const left = () => relay.since + relay.route.service.config.timeouts.idle - effects.now();
  for (let wait = left(); wait > 0; wait = left()) {
    await effects.sleep(wait, over);
    if (left() <= 0) await effects.sleep(A_MOMENT, over); // a process that has stood still has to read what has come
  }
}

/** A reset, for the end of a stream would say that all of it has come; over TLS it does not say so without a last word. */
const breakOff = (socket: Socket): unknown =>
  socket.destroyed || ("encrypted" in socket ? socket.destroy() : socket.resetAndDestroy());

const PROXY_SIGNATURE = [0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a];

/** Who is connected to whom, in front of everything else (PROXY protocol version 2, section 2.2). */
function proxyHeader({ remoteAddress, remotePort, localAddress, localPort }: Socket): Uint8Array {
  const [from, to] = [ipaddr.process(remoteAddress!), ipaddr.process(localAddress!)];
  const ports = [remotePort!, localPort!].flatMap((port) => [port >> 8, port & 255]);
  const addresses = [...from.toByteArray(), ...to.toByteArray(), ...ports];
  const family = from.kind() === "ipv4" ? 0x11 : 0x21; // over TCP
  return Uint8Array.from([...PROXY_SIGNATURE, 0x21, family, 0, addresses.length, ...addresses]);
}

function tcpRecord(relay: Relay, effects: Effects): AccessRecord {
  const { route: { service: { name } }, tried, started, connectedAt, problem } = relay;
  return {
    ...{
      time: effects.date(),
      client: relay.client,
      method: "TCP",
      protocol: "-",
      scheme: "tcp",
      url: `tcp://${relay.target}`,
    },
    ...{ host: undefined, path: undefined, query: undefined, referer: undefined, agent: undefined },
    ...{ trace: undefined, span: undefined, head: undefined, route: name, service: name },
    ...{ id: relay.id, received: relay.received, bytes: relay.bytes },
    status: problem ? FAILURES[problem].status : 200,
    server: tried.at(-1)?.name,
    attempts: tried.length,
    connected: connectedAt ? connectedAt - started : undefined,
    ended: effects.now() - started,
    failure: problem || undefined,
  };
}

/**
 * Opens a listener for connections that are not HTTP. They go where the table in force says.
 * @param address of `tcp` in the table
 * @param shared with other threads and processes that say so too
 * @param given the port, where it shall not be the table's
 */
export async function openTcp(
  balancer: Balancer,
  address: string,
  shared = false,
  given?: number,
): Promise<Listener> {
  const { at } = balancer.table.tcp.get(address)!, { host } = at, port = given ?? at.port;
  let target = shown(host, port);
  const accept = (near: Socket) => {
    const route = balancer.table.tcp.get(address);
    if (route) void carry(balancer, newRelay(balancer, route, target, near));
    else near.destroy();
  };
  const options = { allowHalfOpen: true, noDelay: true };
  try {
    const secure = at.tls.length ? showing(readSecure(at)) : undefined;
    const tls = secure && createTlsServer({ ...options, ...secure.options }, accept);
    const server = tls ?? createServer(options, accept);
    await new Promise<void>((resolve, reject) => {
      server.on("error", reject);
      server.listen({ port, reusePort: shared, ...(host && { host: bare(host) }) }, resolve);
    });
    target = shown(host, (server.address() as AddressInfo).port);
    const close = () => new Promise<void>((resolve) => server.close(() => resolve()));
    return { address: target, close, swap: tls && secure.swapOf(tls) };
  } catch (error) {
    throw new Error(`cannot listen on ${target}: ${(error as Error).message}`);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// 33. Doors: what every runtime does in its own way: listeners, who asks, and what is said.
// ---------------------------------------------------------------------------------------------------------------------

/** What answers requests; `env` is what the runtime hands over beside them. */
export type Serve = (request: Request, env?: unknown) => Response | Promise<Response>;

/** A listener that is open. */
export interface Listener {
  address: string; // host:port
  /** Takes no more connections, and resolves when those that are open have ended. */
  close(tunnels?: ReadonlySet<Tunnel>): Promise<unknown>;
  /** Shows other certificates to those who connect from now on. Where it throws the old ones stay. */
  swap?: ((secure: Secure) => void) | undefined;
}

/** A listener of a runtime. */
interface Door {
  port: number;
  leave(): unknown; // takes no more connections
  close: Listener["close"];
}

/**
 * A listener whose certificates change in that another one takes its place at the same port. Connections that are open
 * stay with the one that has them.
 */
function replaceable(
  host: string,
  port: number,
  secure: Secure,
  open: (port: number, secure: Secure) => Door,
): Listener {
  const doors = [open(port, secure)];
  const address = shown(host, doors[0]!.port);
  return {
    address,
    swap(next) {
      const before = doors.at(-1)!;
      doors.push(open(before.port, next));
      before.leave();
    },
    close: (tunnels) => Promise.all(doors.map((door) => door.close(tunnels))),
  };
}

/**
 * That an address is ours, and nobody listens there: of those who share a port each would get a part of the clients, and
 * none would notice. It is asked as a client does: a listener at this port would take clients and turn them away.
 */
async function unused(host: string, port: number): Promise<void> {
  const server = createServer();
  await new Promise<void>((resolve, reject) => {
    server.on("error", reject);
    server.listen({ port: 0, ...(host && { host: bare(host) }) }, resolve); // else another machine might answer
  });
  const taken = port > 0 && await new Promise<boolean>((resolve) => {
    const socket = netConnect(port, bare(host) || "127.0.0.1", () => {
      resolve(socket.localPort !== port); // else it has met itself
      socket.destroy();
    }).on("error", () => resolve(false));
  });
  await new Promise((resolve) => server.close(resolve));
  if (taken) throw new Error("the address is already in use");
}

/** What a listener asks about its connections, where the runtime shows them: Deno and Bun keep theirs to themselves. */
interface Porter {
  limits(): Pick<Config["limits"], "header" | "keep_alive">;
  /** Counts a connection, or says what it is refused for. */
  letIn(socket: Socket): FailureName | undefined;
}
const NO_LIMITS = v.parse(Limits, {});
const LENIENT: Porter = { limits: () => NO_LIMITS, letIn: () => undefined };

/** What differs between runtimes. */
interface Runtime {
  /** `shared`: with other threads and processes that say so too; the system gives each of them its part. */
  serve(
    fetch: Serve,
    host: string,
    port: number,
    shared: boolean,
    secure?: Secure,
    porter?: Porter,
  ): Promise<Listener>;
  /** Whether it can ask clients for a certificate, and speak TLS with those that do not speak HTTP. */
  fullTls: boolean;
  client(request: Request, env: unknown): Client;
  upgrade: Effects["upgrade"];
  transport(): Pick<Effects, "fetch" | "connect">;
  /** Writes to standard output some of these bytes, however long its reader takes, and says how many. */
  print(bytes: Uint8Array): Promise<number>;
}

/** Milliseconds that never go back. */
const now = (): number => performance.now();

/** Who asks. Headers objects show names in lower case, sorted and joined; Node has them as they came. */
function clientOf(request: Request, address: string | undefined, raw?: readonly string[]): Client {
  const headers: string[] = [];
  if (!raw) request.headers.forEach((value, name) => headers.push(name, value));
  return {
    address: unmapped(address), // or "unknown", as RFC 7239 section 6.2 has it
    scheme: request.url.startsWith("https:") ? "https" : "http",
    headers: raw ?? headers,
  };
}

/** The headers of a 101 that the runtime does not write itself. */
function switchedHeaders(tunnel: Tunnel): Headers {
  const headers = new Headers(pairs(tunnel.headers));
  for (const name of ["accept", "extensions"]) headers.delete(`sec-websocket-${name}`);
  return headers;
}

/** A report in which nothing that a server or a client has said begins a line, or reaches a terminal as a command. */
const oneLine = (text: string): string =>
  text.replace(/[^\n\x20-\x7e\xa0-\uffff]/g, (c) => `\\x${c.charCodeAt(0).toString(16).padStart(2, "0")}`)
    .replaceAll("\n", "\n  ");

/** Says something on standard error; the platform of the edge has times of its own. */
const sayAloud: Effects["report"] = (level, text) =>
  console.error(`${AT_THE_EDGE ? "" : `${new Date().toISOString()} `}${level}: ${oneLine(text)}`);
const AT_THE_EDGE =
  (globalThis as { navigator?: { userAgent?: string } }).navigator?.userAgent === "Cloudflare-Workers";

// ---------------------------------------------------------------------------------------------------------------------
// 34. Node: over node:http and node:http2.
// ---------------------------------------------------------------------------------------------------------------------

/**
 * Node's server takes several values as a list, and only where headers are a record adds no Content-Type of its own;
 * whoever looks at them, middleware say, needs them as the standard has them.
 */
function nodeResponse(body: BodyInit | null, status: number, headers: readonly string[], wrapped: boolean): Response {
  if (wrapped || TOO_MUCH.has(status)) return new Response(body, { status, headers: pairs(headers) });
  const record: Record<string, string | string[]> = {};
  for (let i = 0; i < headers.length; i += 2) {
    const [name, value] = [headers[i]!, headers[i + 1]!];
    record[name] = Object.hasOwn(record, name) ? [record[name]!, value].flat() : value;
  }
  return new Response(body, { status, headers: record as Record<string, string> });
}

/** What Node's parser refuses before a handler sees it. */
const PARSER_ERRORS: Record<string, FailureName> = {
  HPE_HEADER_OVERFLOW: "headers-too-large",
  ERR_HTTP_REQUEST_TIMEOUT: "client-timeout",
};

function rawRefusal(kind: FailureName): string {
  const { status, text } = FAILURES[kind];
  const body = `${status}: ${text}\n`;
  const head = `HTTP/1.1 ${status} ${kind}\r\ncontent-type: text/plain; charset=utf-8\r\nx-lb-failure: ${kind}`;
  return `${head}\r\ncontent-length: ${body.length}\r\nconnection: close\r\n\r\n${body}`;
}

/** Requests that Node has taken for an upgrade: gives the connection away, and what has come on it since. */
const upgrading = new WeakMap<IncomingMessage, () => Bytes>();

/** Prepares the answer to a request for an upgrade. What follows one that is refused is nobody's: it is not read. */
function awaitUpgrade(request: IncomingMessage, response: ServerResponse, early: Bytes[]): void {
  const { socket } = request;
  const hear = (bytes: Bytes) => {
    if (!response.writableEnded && early.push(bytes)) socket.pause();
  };
  const end = () => response.writableEnded || socket.destroy();
  socket.setTimeout(0);
  socket.on("error", () => {}); // "close" comes after it
  socket.on("data", hear);
  socket.on("end", end);
  upgrading.set(request, () => {
    if (socket.destroyed) throw new Error("the client has left");
    socket.off("data", hear).off("end", end);
    response.detachSocket(socket); // what is written to it from now on goes nowhere
    return Buffer.concat(early);
  });
  response.shouldKeepAlive = false;
  response.assignSocket(socket);
  response.on("finish", () => dismiss(socket));
}

/** Ends a connection with these last words. What the client still sends is nobody's, and keeps it open no longer. */
function dismiss(socket: Socket, words = ""): void {
  socket.on("error", () => {}); // "close" comes after it
  socket.end(words);
  socket.resume();
  setTimeout(() => socket.destroy(), 1_000).unref();
}

/** The answer to CONNECT, for which Node gives a connection of HTTP/1.1 away, and a response over HTTP/2. */
function refuseTunnel(_request: IncomingMessage, given: Socket | ServerResponse): void {
  if (!("writeHead" in given)) return dismiss(given, rawRefusal("bad-method"));
  given.writeHead(FAILURES["bad-method"].status, { "x-lb-failure": "bad-method" }).end();
}

const switching = (headers: readonly string[]): string =>
  pairs(headers).reduce((head, [name, value]) => `${head}${name}: ${value}\r\n`, SWITCHING) + "\r\n";
const SWITCHING = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n";

/** Headers over HTTP/2: those that begin with a colon are the request line, and cookies come in crumbs (RFC 9113 section 8.2.3). */
function fromHttp2(raw: readonly string[]): string[] {
  const headers: string[] = [], crumbs: string[] = [];
  for (let i = 0; i < raw.length; i += 2) {
    const [name, value] = [raw[i]!, raw[i + 1]!];
    if (name === "cookie") crumbs.push(value);
    else if (!name.startsWith(":")) headers.push(name, value);
  }
  if (crumbs.length) headers.push("cookie", crumbs.join("; "));
  return headers;
}

/** Standard output through node:fs. A pipe that is full for now says so, and is asked again, ever less often. */
const printed = (bytes: Uint8Array, wait = 1): Promise<number> =>
  new Promise((resolve, reject) => {
    writeTo(1, bytes, (error, written) => {
      if (error?.code === "EAGAIN") setTimeout(() => resolve(printed(bytes, Math.min(2 * wait, 50))), wait);
      else if (error) reject(error);
      else resolve(written);
    });
  });

type Latest = WeakMap<Socket, ServerResponse>; // the answer that each connection had last, while it may still matter

/** Answers that flush their head as latin1, as it came (Node does it as UTF-8), and are forgotten when all has passed. */
function latin1(Base: typeof ServerResponse<IncomingMessage>, latest: Latest) {
  return class extends Base {
    override detachSocket(socket: Socket) {
      if (this.req.complete) latest.delete(socket);
      super.detachSocket(socket);
    }
    override flushHeaders() {
      const inside = this as unknown as {
        _header: string | null;
        _implicitHeader(): void;
        _send(data: string, encoding: string): void;
      };
      if (!inside._header) inside._implicitHeader();
      inside._send("", "latin1");
    }
  };
}

/** Node's server: HTTP/1.1, and over TLS HTTP/2 as well. */
async function nodeServer(fetch: Serve, secure: Secure | undefined, porter: Porter) {
  const { getRequestListener } = await import("@hono/node-server");
  const { createServer: createHttpServer, ServerResponse } = await import("node:http");
  const latest: Latest = new WeakMap(), Latin1Response = latin1(ServerResponse, latest);
  const listener = getRequestListener(fetch, { errorHandler: () => refusal("bad-request") });
  const patience = () => ({ headersTimeout: porter.limits().header, keepAliveTimeout: porter.limits().keep_alive });
  const limits = {
    ...{ requestTimeout: 0, maxHeaderSize: 65_536, requireHostHeader: false },
    ...{ ...patience(), connectionsCheckingInterval: 1_000 },
    shouldUpgradeCallback: ({ headers }: IncomingMessage) => /^websocket$/i.test(headers.upgrade ?? ""),
  };
  const tls = secure && await nodeTls(secure, { ...limits, Http1ServerResponse: Latin1Response });
  const server = tls?.server ?? createHttpServer({ ...limits, ServerResponse: Latin1Response });
  Object.assign(server, { ...limits, maxHeadersCount: 0 }); // where the one for both does not take them as options
  server.on("connection", (socket: Socket) => {
    Object.assign(server, patience()); // a reload may have changed it
    const refusal = porter.letIn(socket);
    if (refusal) dismiss(socket, secure ? "" : rawRefusal(refusal));
  });
  server.on("clientError", (error: Error & { code?: string }, socket: Socket) => {
    const answer = latest.get(socket);
    const answered = answer?.headersSent && !answer.req.complete; // the error is in the body of what was answered
    if (answered || !socket.writable) socket.destroy();
    else dismiss(socket, rawRefusal(PARSER_ERRORS[error.code ?? ""] ?? "bad-request"));
  });
  server.on("request", (request: IncomingMessage, response: ServerResponse) => {
    if (!request.socket.writable) return; // its connection was one too many
    latest.set(request.socket, response);
    (listener as RequestListener)(request, response);
  });
  server.on("upgrade", (request: IncomingMessage, socket: Socket, early: Bytes) => {
    if (!socket.writable) return;
    const response = new Latin1Response(request);
    latest.set(socket, response);
    awaitUpgrade(request, response, [early]);
    listener(request, response);
  });
  server.on("connect", refuseTunnel);
  const close = () =>
    new Promise<void>((resolve) => {
      server.close(() => resolve());
      if ("closeIdleConnections" in server) server.closeIdleConnections();
      tls?.leave();
    });
  return { server, close, swap: tls?.swap };
}

/** A server that speaks HTTP/2 and HTTP/1.1, and whose certificates can be changed. */
async function nodeTls(secure: Secure, options: Record<string, unknown>) {
  const { createSecureServer } = await import("node:http2");
  const shown = showing(secure);
  const server = createSecureServer({ ...options, ...shown.options, allowHTTP1: true });
  const sessions = new Set<ServerHttp2Session>();
  server.on("session", (session) => {
    sessions.add(session);
    session.on("close", () => sessions.delete(session));
  });
  return { server, swap: shown.swapOf(server), leave: () => sessions.forEach((session) => session.close()) };
}

const onNode: Runtime = {
  async serve(fetch, host, port, reusePort, secure, porter = LENIENT) {
    const { server, close, swap } = await nodeServer(fetch, secure, porter);
    await new Promise<void>((resolve, reject) => {
      server.on("error", reject);
      server.listen({ port, reusePort, ...(host && { host: bare(host) }) }, resolve);
    });
    return { address: shown(host, (server.address() as AddressInfo).port), close, swap };
  },
  fullTls: true,
  client(request, env) {
    const { incoming } = (env ?? {}) as { incoming?: IncomingMessage & { authority?: string } };
    const from = clientOf(request, incoming?.socket.remoteAddress, incoming?.rawHeaders);
    if (!incoming || !(incoming.socket as TLSSocket).encrypted) return from;
    const scheme = "https"; // whatever :scheme says
    if (incoming.httpVersionMajor < 2) return { ...from, scheme };
    return { ...from, scheme, headers: fromHttp2(incoming.rawHeaders), authority: incoming.authority ?? "" };
  },
  upgrade(_request, env) {
    const { incoming } = (env ?? {}) as { incoming?: IncomingMessage };
    const release = incoming && upgrading.get(incoming);
    return release && {
      raw: true,
      accept(tunnel) {
        const early = release();
        incoming.socket.write(switching(tunnel.headers), "latin1");
        joinSocket(tunnel, incoming.socket, early);
        return new Response(null);
      },
    };
  },
  transport: () => createWire({ newResponse: nodeResponse }),
  print: (bytes) => printed(bytes),
};

// ---------------------------------------------------------------------------------------------------------------------
// 35. Bun: over Bun.serve.
// ---------------------------------------------------------------------------------------------------------------------

/** What Bun offers beyond the standard, as far as it is used here. */
interface BunServer {
  port: number;
  upgrade(request: Request, options: { headers: Headers; data: BunTunnel }): boolean;
  requestIP(request: Request): { address: string } | null;
  stop(): Promise<void>;
}
interface BunSocket {
  data: BunTunnel;
  send(message: string | Uint8Array): number;
  ping(payload: Uint8Array): void;
  pong(payload: Uint8Array): void;
  close(code?: number, reason?: string): void;
  terminate(): void;
  pause(): void;
  resume(): void;
  getBufferedAmount(): number;
}

/** What Bun keeps beside a WebSocket. */
interface BunTunnel {
  tunnel: Tunnel;
  events: MessageEvents | undefined; // as soon as it is open
}

/** Bun's own handlers: `Bun.serve` takes them beside `fetch`. */
export const websocket = {
  idleTimeout: 0,
  sendPings: false,
  maxPayloadLength: MAX_MESSAGE,
  backpressureLimit: 4 * MAX_MESSAGE, // beyond it messages would be lost; the server has been paused long before
  open: (socket: BunSocket) => void (socket.data.events = joinMessages(socket.data.tunnel, bunSide(socket))),
  message: ({ data }: BunSocket, message: string | Uint8Array) => data.events?.message(message),
  ping: ({ data }: BunSocket, payload: Uint8Array) => data.events?.ping(payload),
  pong: ({ data }: BunSocket, payload: Uint8Array) => data.events?.pong(payload),
  drain: (socket: BunSocket) => void (socket.getBufferedAmount() < WINDOW && socket.data.events?.drained()),
  close: ({ data }: BunSocket, code: number, reason: string) => data.events?.closed(code, reason),
};

const bunSide = (socket: BunSocket): MessageSide => ({
  send: (message) => void socket.send(message),
  hasRoom: () => socket.getBufferedAmount() < WINDOW,
  ping: (payload) => socket.ping(payload),
  pong: (payload) => socket.pong(payload),
  close: (code, reason) => socket.close(code, reason), // 1005 is a close frame without a code
  cut() {
    if (socket.getBufferedAmount() === 0) socket.terminate();
    else setTimeout(() => socket.terminate(), PARTING);
  },
  pause: () => socket.pause(),
  resume: () => socket.resume(),
});

/** Bun finds the certificate for a name by itself; an entry without a name is for all others. */
const bunTls = ({ pairs, clientCa }: Secure) =>
  pairs.flatMap(({ cert, key, names }, i) => {
    const own = { cert, key, ...(clientCa && { ca: clientCa, requestCert: true, rejectUnauthorized: true }) };
    return [...(i === 0 ? [own] : []), ...names.map((serverName) => ({ ...own, serverName }))];
  });

const onBun: Runtime = {
  async serve(fetch, host, port, shared, secure) {
    const limits = { idleTimeout: 0, maxRequestBodySize: Infinity };
    const options = { ...(host && { hostname: bare(host) }), ...limits, development: false, fetch, websocket };
    const open = (port: number, reusePort: boolean, tls = {}): Door => {
      const server = bunApi().serve({ ...options, port, reusePort, ...tls });
      return { port: server.port, leave: () => server.stop(), close: () => server.stop() };
    };
    if (secure) {
      if (!shared) await unused(host, port);
      return replaceable(host, port, secure, (port, secure) => open(port, true, { tls: bunTls(secure) }));
    }
    const door = open(port, shared);
    return { address: shown(host, door.port), close: door.close };
  },
  fullTls: true,
  client: (request, env) => clientOf(request, (env as BunServer | undefined)?.requestIP?.(request)?.address),
  upgrade(request, env) {
    const server = env as BunServer | undefined;
    return server?.upgrade && {
      raw: false,
      accept(tunnel) {
        const data = { tunnel, events: undefined };
        const done = server.upgrade(request, { headers: switchedHeaders(tunnel), data });
        if (!done) throw new Error("the client has left");
        return new Response(null);
      },
    };
  },
  transport: () => createWire(),
  print: (bytes) => printed(bytes),
};
const bunApi = () => (globalThis as unknown as { Bun: { serve(options: Record<string, unknown>): BunServer } }).Bun;

// ---------------------------------------------------------------------------------------------------------------------
// 36. Deno: over Deno.serve.
// ---------------------------------------------------------------------------------------------------------------------

/** What Deno offers beyond the standard, as far as it is used here. */
interface DenoApi {
  serve(options: DenoAddress & { onListen(): void; cert?: string; key?: string }, handler: Serve): DenoServer;
  listenTls(options: Record<string | symbol, unknown>): unknown;
  internal: symbol;
  stdout: { write(bytes: Uint8Array): Promise<number> };
  upgradeWebSocket(
    request: Request,
    options: { idleTimeout: number },
  ): { response: Response; socket: WebSocket };
}
interface DenoServer {
  addr: { port: number };
  finished: Promise<void>;
  shutdown(): Promise<void>;
}
type DenoAddress = { hostname?: string; port: number; reusePort: boolean };
const denoApi = () => (globalThis as unknown as { Deno: DenoApi }).Deno;

/**
 * Deno has messages only, and answers pings itself. It also asks a client that is silent for half of `idleTimeout`, and
 * ends it after all of it; so that long, too, does it keep the memory of one that has broken off.
 */
function denoAccept(request: Request, tunnel: Tunnel): Response {
  const idleTimeout = Math.min(60, tunnel.idle / 500); // seconds
  if (request.signal.aborted) throw new Error("the client has left"); // its connection would stay, and nobody be told
  const { response, socket } = denoApi().upgradeWebSocket(request, { idleTimeout });
  switchedHeaders(tunnel).forEach((value, name) => response.headers.append(name, value));
  let events: MessageEvents | undefined;
  socket.binaryType = "arraybuffer";
  socket.onopen = () => void (events = joinMessages(tunnel, denoSide(socket, () => events?.drained())));
  socket.onmessage = ({ data }) => events?.message(typeof data === "string" ? data : new Uint8Array(data));
  socket.onclose = ({ code, reason, wasClean }) => events?.closed(wasClean ? code : 1006, reason);
  socket.onerror = () => events ?? clientLeft(tunnel);
  request.signal.addEventListener("abort", () => events ?? clientLeft(tunnel)); // before it is open
  return response;
}

/** Nothing says when there is room again: that is looked at every 5 ms while there is none. */
function denoSide(socket: WebSocket, drained: () => void): MessageSide {
  const reading = denoReading(socket);
  const isFull = () => socket.bufferedAmount >= WINDOW;
  let waits = false;
  const wait = () => {
    waits = isFull();
    if (waits) setTimeout(wait, 5);
    else drained();
  };
  const close = (code: number, reason = "") => {
    reading.resume(); // for the client's close frame
    if (code === 1005) socket.close();
    else socket.close(code, reason);
  };
  return {
    send: (message) => socket.send(message),
    hasRoom() {
      if (!waits && isFull()) wait();
      return !waits;
    },
    close,
    cut: () => close(BAD_GATEWAY),
    ...reading,
  };
}

/**
 * Deno has no pause. But its WebSocket reads in a loop that ends where it finds itself closed behind a message, and that
 * can be begun again. Where another Deno does not have these names nothing is paused, and what comes waits in memory.
 */
function denoReading(socket: WebSocket): Pick<MessageSide, "pause" | "resume"> {
  const symbol = (owner: object, name: string) =>
    Object.getOwnPropertySymbols(owner).find(({ description }) => description === name);
  const loop = symbol(WebSocket.prototype, "[[eventLoop]]"), state = symbol(socket, "[[readyState]]");
  const inside = socket as unknown as Record<symbol, unknown>;
  let paused = false;
  return {
    pause() {
      if (paused || !loop || !state || socket.readyState !== WebSocket.OPEN) return;
      paused = true;
      inside[state] = WebSocket.CLOSED;
      queueMicrotask(() => inside[state] = WebSocket.OPEN);
    },
    resume() {
      if (!paused) return;
      paused = false;
      (inside[loop!] as () => void).call(socket);
    },
  };
}

type ServeListener = (listener: unknown, stop: AbortSignal, ...handlers: unknown[]) => DenoServer;

/** Deno.serve has one certificate; what it does with a listener can be had without it, where Deno still has this name. */
function denoServe(fetch: Serve, where: DenoAddress, secure: Secure | undefined): DenoServer {
  const Deno = denoApi(), pairs = secure?.pairs;
  if (!pairs || pairs.length === 1) return Deno.serve({ ...where, ...pairs?.[0], onListen() {} }, fetch);
  const inside = (Deno as unknown as Record<symbol, { serveHttpOnListener?: ServeListener }>)[Deno.internal];
  if (!inside?.serveHttpOnListener) throw new Error("this Deno shows one certificate at each address, not several");
  const find = (name: string) => Promise.resolve(pairFor(pairs, name));
  const shown = { alpnProtocols: ["h2", "http/1.1"], [Symbol.for("unstableSniResolver")]: find };
  const listener = Deno.listenTls({ ...where, ...shown }), never = new AbortController().signal;
  return inside.serveHttpOnListener(listener, never, fetch, () => refusal("internal"), () => {});
}

/**
 * A listener of Deno. It ends for good where it cannot take a connection, for want of a handle say: then another takes its
 * place. And its `shutdown` ends WebSockets and uploads at once: it has to wait for them.
 */
function denoDoor(fetch: Serve, where: DenoAddress, secure?: Secure): Door {
  const servers = new Set<DenoServer>();
  let [port, open, uploads] = [where.port, true, 0];
  const upload = async (request: Request, env: unknown) => {
    uploads++;
    try {
      return await fetch(request, env);
    } finally {
      uploads--;
    }
  };
  const serve: Serve = (request, env) =>
    request.method === "GET" || request.method === "HEAD" ? fetch(request, env) : upload(request, env);
  const listen = () => {
    const server = denoServe(serve, { ...where, port }, secure);
    servers.add(server);
    port = server.addr.port;
    server.finished.catch((error) => {
      if (!open) return;
      sayAloud("error", `port ${port} takes no connections: ${error.message}; it is opened again`);
      setTimeout(again, 100);
    });
  };
  const again = () => {
    try {
      if (open) listen();
    } catch { // still no handle
      setTimeout(again, 100);
    }
  };
  const close = async (tunnels?: ReadonlySet<Tunnel>) => {
    while (tunnels?.size || uploads) await new Promise((resolve) => setTimeout(resolve, 20));
    open = false;
    await Promise.all([...servers].map((server) => server.shutdown().catch(() => {})));
  };
  listen();
  return { port, leave: () => close(), close };
}

const onDeno: Runtime = {
  async serve(fetch, host, port, shared, secure) {
    const where = { ...(host && { hostname: bare(host) }), port, reusePort: shared || secure !== undefined };
    if (secure) {
      if (!shared) await unused(host, port);
      return replaceable(host, port, secure, (port, secure) => denoDoor(fetch, { ...where, port }, secure));
    }
    const door = denoDoor(fetch, where);
    return { address: shown(host, door.port), close: door.close };
  },
  fullTls: false,
  client(request, env) {
    request.signal; // a signal that is first read after the client has left never says so
    const { url, headers } = request;
    const from = clientOf(request, (env as { remoteAddr?: { hostname?: string } } | undefined)?.remoteAddr?.hostname);
    // over HTTP/2 there is no Host, and nothing says that this is HTTP/2
    return from.scheme === "http" || headers.has("host") ? from : { ...from, authority: hostOf(url).split("/", 1)[0]! };
  },
  upgrade: (request, env) =>
    (env as { remoteAddr?: unknown } | undefined)?.remoteAddr
      ? { raw: false, accept: (tunnel) => denoAccept(request, tunnel) }
      : undefined,
  transport: () => createWire(),
  print: (bytes) => denoApi().stdout.write(bytes), // its node:fs would hold up everything
};

// ---------------------------------------------------------------------------------------------------------------------
// 37. Edge: where the platform listens.
// ---------------------------------------------------------------------------------------------------------------------

const HOP = Object.keys(ROLES).filter((name) => name !== "content-length"); // what ends at this hop

/** The platform answers in place of a server that it cannot reach: its statuses, and what they mean here. */
const PLATFORM_FAILURES: Record<number, Failure> = {
  520: "invalid-answer",
  521: "connect",
  522: "connect-timeout",
  523: "connect",
  524: "timeout",
  525: "connect",
  526: "connect",
  530: "connect",
};

/**
 * The edge's own fetch. The platform holds the connections, and when a client has left nothing of ours may run any more:
 * an attempt ends for us with the head of its answer. "manual", both times: a body that is encoded passes as it is.
 */
async function nativeFetch(url: string, attempt: Attempt): Promise<Response> {
  const { method, headers, body, request, stop, timeouts } = attempt;
  const late = new AbortController();
  const timer = setTimeout(() => late.abort(), timeouts.response);
  const signal = AbortSignal.any([request.signal, late.signal, ...stop ? [stop] : []]);
  const init = { encodeResponseBody: "manual", signal };
  let response: Response;
  try {
    const named = pairs(without(headers, new Set(["host"]))); // which the platform sets from the URL
    response = await fetch(url, { ...init, method, headers: named, body, redirect: "manual" });
  } catch (error) {
    const kind = late.signal.aborted ? "timeout" : request.signal.aborted || stop?.aborted ? "client-left" : "reset";
    throw new WireError(kind, true, String(error));
  } finally {
    clearTimeout(timer);
  }
  const { status } = response;
  const failure = PLATFORM_FAILURES[status];
  if (failure && response.headers.get("server") === "cloudflare") {
    await response.body?.cancel();
    const used = failure !== "connect" || body instanceof ReadableStream; // nobody can have the rest of a stream again
    throw new WireError(failure, used, `the platform answers ${status}`);
  }
  const hop = new Set([...HOP, ...connectionNames(response.headers.get("connection") ?? "")]);
  const own = attempt.inbound(without([...response.headers].flat(), hop));
  const { webSocket } = response as { webSocket?: unknown }; // of a 101
  const made = { status, headers: pairs(own), ...webSocket ? { webSocket } : { encodeBody: "manual" } };
  const passed = new Response(response.body, made as ResponseInit);
  if (webSocket && attempt.upgrade) attempt.upgrade.response = passed;
  attempt.ended(response.status, Number(response.body && response.headers.get("content-length")), undefined);
  return passed;
}

const onEdge: Runtime = {
  serve: () => Promise.reject(new Error("at the edge the platform listens")),
  fullTls: false,
  client: (request) => clientOf(request, request.headers.get("cf-connecting-ip") ?? undefined),
  upgrade: () => ({ raw: true, accept: () => new Response(null) }), // the platform's fetch has both ends
  transport: () => ({ fetch: nativeFetch, connect: () => Promise.reject(new Error("not at the edge")) }),
  print: (bytes) => Promise.resolve(bytes.length), // `Effects.write` goes to the platform's log
};

// ---------------------------------------------------------------------------------------------------------------------
// 38. Runtimes: where it runs. They differ in this table and nowhere else.
// ---------------------------------------------------------------------------------------------------------------------

const runtimes = { deno: onDeno, bun: onBun, node: onNode, edge: onEdge };

/** Where this runs. Workers are asked for first: they know Node's names too. */
const here: keyof typeof runtimes = AT_THE_EDGE
  ? "edge"
  : "Deno" in globalThis
  ? "deno"
  : "Bun" in globalThis
  ? "bun"
  : "node";

/** @throws {Error} with the file and what is wrong with it, or what cannot be here */
function secureOf(at: Pick<FrontConfig, "tls" | "client_ca">, isHttp: boolean): Secure {
  if (runtimes[here].fullTls || isHttp && !at.client_ca) return readSecure(at);
  if (isHttp) throw new Error(`client_ca: ${here} cannot ask clients for a certificate; bun and node can`);
  throw new Error(`${here} loses the end of what it reads over TLS, where that is not HTTP; bun and node do not`);
}

/** What is wrong with the files that a config names. */
function problemsOf({ listen, tcp, services }: Config, now: Date): string[] {
  const problems: string[] = [];
  const attempt = (where: string, read: () => string[]) => {
    try {
      problems.push(...read().map((one) => `${where}: ${one}`));
    } catch (error) {
      problems.push(`${where}: ${(error as Error).message}`);
    }
  };
  for (const [i, at] of listen.entries()) {
    attempt(`listen[${i}]`, () => (at.tls.length && secureOf(at, true), outdated(at, now)));
  }
  for (const { name, listen } of tcp) {
    for (const at of listen) attempt(name, () => (at.tls.length && secureOf(at, false), outdated(at, now)));
  }
  for (const [name, { tls: { ca, cert, key } }] of services) {
    if (ca) attempt(`${name}: tls`, () => (readCertificate(ca), []));
    if (cert) attempt(`${name}: tls`, () => (readPair({ cert, key }), outdated({ tls: [{ cert, key }] }, now)));
  }
  return problems;
}

/** The effects of the runtime that this runs on. */
function defaultEffects(): Effects {
  const runtime = runtimes[here];
  let secret = "";
  return {
    ...runtime.transport(),
    now,
    date: () => new Date(),
    random: Math.random,
    sign: (secret, text) => createHmac("sha256", secret).update(text).digest("base64url"),
    secret: () => secret ||= randomBytes(32).toString("base64url"), // at the edge not before a request has come
    sleep: (milliseconds, signal) =>
      new Promise((resolve) => {
        const timer = setTimeout(resolve, milliseconds);
        signal?.addEventListener("abort", () => clearTimeout(timer), { once: true });
      }),
    client: runtime.client,
    upgrade: runtime.upgrade,
    probed: () => {},
    told: () => {},
    write: (record, format) => console.log(accessLine(record, format)),
    report: sayAloud,
  };
}

// ---------------------------------------------------------------------------------------------------------------------
// 39. Assemble: one balancer from one config.
// ---------------------------------------------------------------------------------------------------------------------

/** A Hono app that balances, to be served, mounted or wrapped. */
export interface LoadBalancer extends Hono {
  /**
   * Puts another config in force. Requests in flight finish on the old one; what is known of servers that stay is kept.
   * With workers it resolves when all of them have it.
   */
  reload(config: Config): void | Promise<unknown>;
  /** Probes the servers that are due. Call it in an interval; `serve` does. */
  probe(): Promise<void>;
  /** What is in force and in flight, to be read. */
  balancer: Balancer;
}

/** What `auto` has found stays found. */
const limitFor = ({ max_in_flight }: ServiceConfig, { limit }: Server, before: ServiceConfig | undefined): number =>
  max_in_flight !== AUTO ? max_in_flight : before?.max_in_flight === AUTO ? limit : FIRST_LIMIT;

/**
 * Services that stay, by name, and their servers that stay, by URL, stay the same records: what is known of them is kept
 * over a reload, and what requests in flight find out is not lost.
 */
function buildService(
  config: ServiceConfig,
  name: string,
  strategies: Strategies,
  now: number,
  previous?: Service,
): Service {
  const known = new Map(previous?.servers.map((server) => [server.url, server]));
  const servers = config.servers.map((wanted) => {
    const before = known.get(wanted.url), since = before?.state === wanted.state ? before.since : now;
    const isNew = previous && before?.state !== "ready" && wanted.state === "ready";
    const server = Object.assign(before ?? newServer(wanted, name, config.tls), wanted, { tls: config.tls, since });
    if (isNew) server.back = now;
    server.limit = Math.min(server.max, limitFor(config, server, previous?.config));
    if (config.health.kind === "off" && previous?.config.health.kind !== "off") server.up = true; // nobody would find out
    if (config.eject.failures === Infinity) Object.assign(server, { until: 0, trying: false });
    return server;
  });
  return Object.assign(previous ?? newService(name), {
    config,
    servers,
    strategy: strategies[config.strategy.name]!,
    key: keyOf(config.strategy),
    cookies: undefined,
    hedge: config.sticky.cookie ? 0 : config.hedge, // no other server knows the client
    times: !config.hedge ? NO_TIMES : previous?.times.length ? previous.times : new Float64Array(SAMPLES),
    measured: config.hedge ? previous?.measured ?? 0 : 0,
    bounded: servers.some((server) => server.limit < Infinity),
    candidatesUntil: 0,
    compareAt: config.eject.failures === Infinity ? Infinity : 0,
  });
}

/** compress and cors are Hono's own middleware, around the answers of the routes that ask for them. */
function layersOf({ compress: compressed, cors: shared }: Policy): Around | undefined {
  if (!compressed && !shared.origin.length) return undefined;
  const around: Around = new Hono();
  if (shared.origin.length) {
    around.use(cors({
      origin: shared.origin.includes("*") ? "*" : shared.origin,
      allowMethods: shared.allow_methods,
      allowHeaders: shared.allow_headers,
      exposeHeaders: shared.expose_headers,
      credentials: shared.credentials,
      ...(shared.max_age > 0 && { maxAge: shared.max_age / 1_000 }),
    }));
  }
  if (compressed) around.use(compress({ encoding: "gzip" }));
  around.all("*", (context) => context.env.answer());
  return around;
}

/** The buckets of the routes that have a rate: those of before where route and rule are the same. */
function buildBuckets(routes: RouteConfig[], previous?: Table): Table["buckets"] {
  const limited = routes.filter(({ rate }) => rate);
  return new Map(limited.map((route) => {
    const id = bucketsId(route);
    return [id, previous?.buckets.get(id) ?? newBuckets(route.rate!)];
  }));
}
const bucketsId = ({ name, rate }: RouteConfig): string => JSON.stringify([name, rate]);

/** What stands around the answers stays the same where another service falls in. */
function destinationOf(
  { service, weight, policy, fallback }: Target,
  services: Map<string, Service>,
  around: Destination["around"],
): Destination {
  return {
    service: services.get(service)!,
    weight,
    policy,
    retryOn: new Set<string | number>(policy.retry_on),
    around,
    fallback: fallback && destinationOf(fallback, services, around),
  };
}

/** A copy is sent once, as its own service says. */
function mirrorTo({ service, percent }: RouteConfig["mirror"], services: Map<string, Service>): Destination {
  const to = services.get(service)!;
  const once = { retryOn: new Set<string>(), around: undefined, fallback: undefined };
  return { service: to, weight: percent / 100, policy: to.config, ...once };
}

function buildRoute(config: RouteConfig, services: Map<string, Service>, buckets: Table["buckets"]): Route {
  const { methods, request, response, action, headers, query } = config;
  const preflight = methods.length > 0 && config.policy.cors.origin.length > 0 && !methods.includes("OPTIONS");
  const destinations = action.kind === "forward"
    ? action.targets.map((target) => destinationOf(target, services, layersOf(target.policy)))
    : [];
  return {
    ...config,
    methods: preflight ? [...methods, "OPTIONS"] : methods,
    destinations,
    weight: destinations.reduce((sum, one) => sum + one.weight, 0),
    sticky: destinations.length > 1 && destinations.every((one) => !one.weight || one.service.config.sticky.cookie),
    rank: (methods.length ? 1e6 : 0) + headers.length * 1e3 + query.length,
    conditions: [
      ...headers.map((condition) => compileCondition(condition, headerOf)),
      ...query.map((condition) => compileCondition(condition, queryOf)),
    ],
    mirror: config.mirror.service ? mirrorTo(config.mirror, services) : undefined,
    admits: compileAdmission(config.allow, config.deny),
    buckets: buckets.get(bucketsId(config)),
    hasRules: [request.headers, response.headers].some(({ set, add, remove }) =>
      set.size + add.size + remove.length > 0
    ),
  };
}

function tcpRoutes({ tcp }: Config, services: Map<string, Service>): Table["tcp"] {
  const routes: Table["tcp"] = new Map();
  for (const { name, listen, proxy_protocol, allow, deny } of tcp) {
    const route = { service: services.get(name)!, proxy_protocol, admits: compileAdmission(allow, deny) };
    for (const at of listen) routes.set(unique(shown(at.host, at.port), routes), { ...route, at });
  }
  return routes;
}

/**
 * Compiles a config into what requests read.
 * @param now of the effects: servers that are new, or in another state than before, are so since then
 * @throws {TypeError} where a service has a strategy that is not among `strategies`; `parseConfig` has refused all else
 */
export function buildTable(config: Config, strategies: Strategies, previous?: Table, now = 0): Table {
  for (const [name, { strategy }] of config.services) { // before anything is changed that serves
    if (Object.hasOwn(strategies, strategy.name)) continue;
    throw new TypeError(`service ${name}: there is no strategy ${strategy.name}`);
  }
  const services = new Map<string, Service>();
  for (const [name, service] of config.services) {
    services.set(name, buildService(service, name, strategies, now, previous?.services.get(name)));
  }
  const buckets = buildBuckets(config.routes, previous);
  const routes = config.routes.map((route) => buildRoute(route, services, buckets));
  const ofScheme = Map.groupBy(routes.filter(({ fallback }) => !fallback), ({ scheme }) => scheme);
  return {
    config,
    services,
    buckets,
    hosts: compileHosts(ofScheme.get("") ?? []),
    schemes: new Map([...ofScheme].filter(([scheme]) => scheme).map(([scheme, own]) => [scheme, compileHosts(own)])),
    fallback: routes.find(({ fallback }) => fallback),
    tcp: tcpRoutes(config, services),
    trusts: memo(addressMatcher(config.trust)),
  };
}

/**
 * Makes a load balancer of a parsed config.
 * @param effects what shall differ from the runtime's own: a clock, a random, a transport
 * @param more strategies of your own, by the names that `strategy:` may then say
 */
export function createLoadBalancer(
  config: Config,
  effects: Partial<Effects> = {},
  more: Strategies = {},
): LoadBalancer {
  const all: Effects = { ...defaultEffects(), ...effects };
  const known: Strategies = { ...strategies, ...more };
  const balancer = newBalancer(buildTable(config, known, undefined, all.now()), all, here);
  const app = new Hono();
  app.all("*", ({ req, env }) => balance(balancer, req.raw, env, true));
  const throughHono = app.fetch;
  const fetch: typeof throughHono = (request, env, context) =>
    // past Hono's dispatch, 1 us, where nothing is mounted here
    app.routes.length > 1 ? throughHono(request, env, context) : balance(balancer, request, env, false);
  return Object.assign(app, {
    fetch,
    balancer,
    reload(next: Config) {
      balancer.table = buildTable(next, known, balancer.table, all.now());
      if (next.admin?.token) balancer.tokens = next.admin;
      balancer.reloads++;
      balancer.reloadedAt = all.date();
      balancer.reloadFailed = false;
      wakeAll(balancer.table);
    },
    async probe() {
      await probeDue(balancer.table, all);
      wakeAll(balancer.table); // also where an ejection has ended
    },
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// 40. Save: the file after a change. Its comments and order stay, and what is on disk is always whole.
// ---------------------------------------------------------------------------------------------------------------------

/** Why something is not done: the status of the answer that says so, and what is wrong with what was sent. */
class Refused extends Error {
  status: number;
  mistakes: Pick<Mistake, "path" | "message">[] | undefined;
  constructor(status: number, detail: string, mistakes?: Refused["mistakes"]) {
    super(detail);
    this.status = status;
    this.mistakes = mistakes;
  }
}

/** A text that is being changed: what is cut out of it, and what comes in its place. */
interface Draft {
  text: string;
  isJson: boolean;
  cuts: { from: number; to: number; text: string }[];
}
/** One item of a list, or key and value of a map; `end` is where the next one begins. */
interface Part {
  node: Node | null;
  from: number;
  to: number;
  end: number;
  says: unknown;
  shall: unknown;
  stays: boolean;
}

const same = (one: unknown, other: unknown): boolean => isDeepStrictEqual(one, other);

/** A value on one line. */
function inline(value: unknown, isJson = false): string {
  if (isJson || typeof value !== "object" && typeof value !== "string") return JSON.stringify(unveiled(value));
  if (Array.isArray(value)) return `[${value.map((one) => inline(one)).join(", ")}]`;
  if (isRecord(value)) {
    const pairs = Object.entries(value).map(([name, one]) => `${inline(plain(name))}: ${inline(one)}`);
    return pairs.length ? `{ ${pairs.join(", ")} }` : "{}";
  }
  if (typeof value !== "string" || /[\x00-\x1f\x7f-\x9f]/.test(value)) return JSON.stringify(value);
  const list = stringify([wrapped(value)], { collectionStyle: "flow", flowCollectionPadding: false, lineWidth: 0 });
  return unwrapped(list.trim().slice(1, -1).trim());
}

/** Two items of a list that are the same thing, changed or not: the same server, or whatever stands in the same place. */
const thing = (value: unknown): unknown => isRecord(value) ? value.url : value;

/** The items of a list, each with what it shall say; whatever is new has to come behind them, or there is no answer. */
function partsOfList(node: YAMLSeq, says: unknown[], shall: unknown[]): [Part[], unknown[]] | undefined {
  const parts = (node.items as Node[]).map((item, i): Part => {
    const [from, to, end] = item.range!;
    return { node: item, from, to, end, says: says[i], shall: undefined, stays: false };
  });
  let next = 0;
  const added: unknown[] = [];
  for (const one of shall) {
    const among = (fits: (part: Part) => boolean) => parts.findIndex((part, i) => i >= next && fits(part));
    const equal = among((part) => same(part.says, one));
    const found = equal < 0 ? among((part) => thing(part.says) === thing(one)) : equal;
    if (found < 0) added.push(one);
    else if (added.length) return undefined;
    else Object.assign(parts[found]!, { shall: one, stays: true }), next = found + 1;
  }
  return [parts, added];
}

const keyName = (key: Node): string => veiled(unwrapped(isScalar(key) ? key.source ?? String(key.value) : ""));

function partsOfMap(node: YAMLMap<Node, Node | null>, says: Raw, shall: Raw): Part[] {
  return node.items.map(({ key, value }): Part => {
    const [from, , afterKey] = key.range!, [, to, end] = value?.range ?? key.range!, name = keyName(key);
    return {
      node: value,
      from,
      to: Math.max(to, afterKey),
      end,
      says: says[name],
      shall: shall[name],
      stays: Object.hasOwn(shall, name),
    };
  });
}

/** Takes out the parts that do not stay, and puts what is new behind the last one. False: this cannot be done in place. */
function layParts(node: YAMLMap | YAMLSeq, parts: Part[], added: string[], draft: Draft): boolean {
  const { text, cuts } = draft, last = parts.findLastIndex((part) => part.stays);
  if (last < 0) return false;
  const { from } = parts[0]!, line = text.lastIndexOf("\n", from - 1) + 1, before = text.slice(line, from);
  if (!node.flow && !(isSeq(node) ? /^ *- *$/ : parts[0]!.stays ? /^/ : /^ *$/).test(before)) return false;
  const whole = (end: number) => text[end - 1] === "\n" ? end : text.indexOf("\n", end) + 1;
  const edges = node.flow ? parts.map((part) => part.from) : [line, ...parts.map((part) => whole(part.end))];
  for (const part of parts) if (part.stays) lay(part.node, part.says, part.shall, draft);
  parts.slice(0, last).forEach((part, i) => part.stays || cuts.push({ from: edges[i]!, to: edges[i + 1]!, text: "" }));
  const indent = isSeq(node) ? before : before.replace(/[^ ]/g, " ");
  const end = (part: Part) => node.flow ? part.to : whole(part.end);
  const lines = added.map((one) => node.flow ? `, ${one}` : `${indent}${one}\n`).join("");
  cuts.push({ from: end(parts[last]!), to: end(parts.at(-1)!), text: lines });
  return true;
}

/** Writes what a place shall say. What says so already stays as it is written, and with it its comments. */
function lay(node: Node | null, says: unknown, shall: unknown, draft: Draft): void {
  const { text, cuts, isJson } = draft;
  if (same(says, shall) || node === null) return;
  if (isMap<Node, Node | null>(node) && isRecord(says) && isRecord(shall)) {
    const added = Object.keys(shall).filter((name) => !Object.hasOwn(says, name)).map((name) =>
      `${inline(plain(name), isJson)}: ${inline(shall[name], isJson)}`
    );
    if (layParts(node, partsOfMap(node, says, shall), added, draft)) return;
  }
  if (isSeq(node) && Array.isArray(says) && Array.isArray(shall)) {
    const [parts, added] = partsOfList(node, says, shall) ?? [[], []];
    if (layParts(node, parts, added.map((one) => inline(one, isJson)), draft)) return;
  }
  const [from, to] = node.range!;
  const around = [
    text[from - 1] === ":" ? " " : "",
    text[to - 1] === "\n" && from < to ? "\n" : text[to] === "#" ? " " : "",
  ];
  cuts.push({ from, to, text: around[0] + inline(shall, isJson) + around[1] });
}

/**
 * The same file, saying something else: only what differs is written anew, so that comments, order and spelling stay.
 * @throws {Refused} where that would change other places too, as with anchors
 */
export function rewrite(text: string, shall: unknown, says = readAsWritten(text, "")): string {
  const [eol] = /\r?\n/.exec(text) ?? ["\n"];
  const source = wrapped(text.endsWith("\n") ? text : text + eol);
  const draft: Draft = { text: source, isJson: source.trimStart().startsWith("{"), cuts: [] };
  lay(parseDocument(source, { uniqueKeys: false }).contents, says, shall, draft);
  let out = "", at = 0;
  for (const { from, to, text } of draft.cuts.sort((a, b) => a.from - b.from)) {
    out += source.slice(at, from) + text.replaceAll(/\r?\n/g, eol);
    at = to;
  }
  const written = unwrapped(out + source.slice(at));
  try {
    if (same(readAsWritten(written, ""), shall)) return written;
  } catch { /* not even YAML any more */ }
  throw new Refused(409, "this cannot be written into the file without changing more of it, as with anchors (&, *)");
}

const fsyncLater = promisify(fsync);

/** A new file beside another one; `durable`: on the disk to its last byte. Only that is waited for: it may take long. */
async function writeBeside(
  path: string,
  text: string,
  { mode, uid, gid }: Pick<Stats, "mode" | "uid" | "gid">,
  durable: boolean,
): Promise<string> {
  const fresh = `${path}.new`;
  rmSync(fresh, { force: true });
  const file = openSync(fresh, "wx", 0o600); // nobody reads along; then as open as the other one
  try {
    writeFileSync(file, text);
    const own = statSync(fresh);
    if (uid >= 0 && (own.uid !== uid || own.gid !== gid)) chownSync(fresh, uid, gid);
    chmodSync(fresh, mode & 0o777);
    if (durable) await fsyncLater(file);
  } finally {
    closeSync(file);
  }
  return fresh;
}

/**
 * Saves a file that said `before`, and keeps that as `.bak` beside it. Whenever the process ends, it is whole: old or new.
 * @throws {Refused} where it says something else by now (409), or cannot be written (500): then it is as it was
 */
export async function saveFile(file: string, before: string, text: string): Promise<void> {
  const isThere = existsSync(file), path = isThere ? realpathSync(file) : file; // a link stays one
  const bak = `${path}.bak`;
  const check = () => {
    if (!isThere || readFileSync(path, "utf8") === before) return;
    throw new Refused(
      409,
      `${path} was changed by somebody else and is not in force, or not yet: nothing is overwritten`,
    );
  };
  try {
    check();
    const like = isThere ? statSync(path) : { mode: 0o600, uid: -1, gid: -1 };
    const kept = isThere && await writeBeside(bak, before, like, false); // no link: not every file system has them
    const fresh = await writeBeside(path, text, like, true);
    check();
    if (kept) renameSync(kept, bak);
    renameSync(fresh, path);
  } catch (error) {
    for (const name of [path, bak]) {
      try {
        rmSync(`${name}.new`, { force: true });
      } catch { /* what is in the way is not ours */ }
    }
    if (error instanceof Refused) throw error;
    throw new Refused(500, `${path} cannot be written: ${(error as Error).message}`);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// 41. Views: what there is to see. Plain JSON.
// ---------------------------------------------------------------------------------------------------------------------

/** How a server stands, in one word. */
function standing(server: Server, now: number): "up" | "down" | "ejected" | "trial" | "paused" | "drain" | "maint" {
  const { state, up, until, pausedUntil } = server;
  if (state !== "ready") return state;
  return !up ? "down" : until > now ? "ejected" : until ? "trial" : pausedUntil > now ? "paused" : "up";
}

const seconds = (milliseconds: number): number => Math.max(0, Math.round(milliseconds)) / 1_000;

/** What has been counted, as the API shows it: `durations` are classes up to each of `bounds`, and longer. */
const countersView = ({ requests, errors, bytesIn, bytesOut, durations }: Counters) => ({
  requests,
  errors,
  bytes_in: bytesIn,
  bytes_out: bytesOut,
  durations,
});

/** A server as the API shows it. */
const serverView = (server: Server, now: number) => ({
  name: server.name,
  url: server.url,
  status: standing(server, now),
  status_for: seconds(now - (server.until > now ? server.since : Math.max(server.since, server.until))),
  check: server.probedAt > 0
    ? { ago: seconds(now - server.probedAt), took: seconds(server.probeTook), problem: server.probeProblem }
    : null,
  state: server.state,
  weight: server.weight,
  effective_weight: Math.round(server.effective * 1_000) / 1_000, // less during slow start
  backup: server.backup,
  max: Number.isFinite(server.max) ? server.max : null,
  limit: Number.isFinite(server.limit) ? Math.floor(server.limit) : null, // in flight, whatever it comes from
  up: server.up,
  ejected_for: seconds(server.until - now),
  paused_for: seconds(server.pausedUntil - now), // as it has asked for
  in_flight: server.inFlight,
  picks: server.picks,
  answers: server.answers,
  failures: server.failures, // in a row
  retries: server.retries,
  failing: Math.round(server.failing * 1_000) / 1_000, // the share of the last 64 or so
  latency: Math.round(server.latency * 1_000) / 1_000, // milliseconds to the head of an answer, mean
  counters: countersView(server.counters),
});

/** A service as the API shows it. */
function serviceView(service: Service, now: number) {
  const candidates = candidatesOf(service, now), asked = new Set(candidates);
  const sum = candidates.reduce((sum, server) => sum + server.effective, 0);
  const share = (server: Server) => asked.has(server) ? server.effective / sum : 0; // of what may be asked
  const counters = countersView(totalOf(service.tallies));
  return {
    name: service.name,
    strategy: service.config.strategy.name,
    panicking: service.panicking,
    askable: candidates.length, // servers
    requests: counters.requests, // that have been answered
    in_flight: service.inFlight,
    waiting: service.waiting.size,
    retrying: service.retrying,
    retries: service.retries,
    counters,
    servers: service.servers.map((server) => ({ ...serverView(server, now), share: share(server) })),
  };
}

/** A route as the API shows it. */
const routeView = ({ name, hosts, paths, methods, headers, query, action, fallback }: RouteConfig) => ({
  ...{ name, default: fallback, hosts, methods },
  paths: paths.map((rule) => ({ [rule.kind]: rule.kind === "regex" ? rule.source : rule.path || "/" })),
  headers: headers.map((condition) => condition.name),
  query: query.map((condition) => condition.name),
  ...(action.kind === "forward"
    ? { services: action.targets.map(({ service, weight }) => ({ service, weight })) }
    : { [action.kind]: action.status }),
});

/** Services and servers with what is in flight there. */
function connections({ table, entrypoints, inFlight }: Balancer) {
  return {
    in_flight: inFlight,
    entrypoints: [...entrypoints.values()].map((one) => ({ name: one.name, in_flight: one.inFlight })),
    services: [...table.services.values()].map(({ name, inFlight, retrying, waiting, servers }) => ({
      ...{ name, in_flight: inFlight, retrying, waiting: waiting.size },
      servers: servers.map((server) => ({ name: server.name, in_flight: server.inFlight })),
    })),
  };
}

/** Everything that there is to see at this moment, as plain JSON. Times are seconds. */
export function snapshotOf({ table, effects, requests, inFlight, draining, entrypoints }: Balancer) {
  const now = effects.now(), services = [...table.services.values()];
  const total = totalOf(new Map([...entrypoints.values()].map(({ tallies }, i) => [i, totalOf(tallies)])));
  return {
    version: VERSION,
    time: seconds(now),
    draining,
    requests,
    in_flight: inFlight,
    bounds: BUCKETS, // milliseconds
    total: countersView(total),
    routes: table.config.routes.map(routeView),
    services: services.map((service) => serviceView(service, now)),
  };
}

/** What `snapshotOf` gives. */
export type Snapshot = ReturnType<typeof snapshotOf>;

/** What a status means (RFC 9110 section 15). */
const PHRASES: Record<number, string> = {
  400: "Bad Request",
  401: "Unauthorized",
  403: "Forbidden",
  404: "Not Found",
  405: "Method Not Allowed",
  409: "Conflict",
  412: "Precondition Failed",
  413: "Content Too Large",
  415: "Unsupported Media Type",
  428: "Precondition Required",
  429: "Too Many Requests",
  500: "Internal Server Error",
  503: "Service Unavailable",
};

/** An answer that says what is wrong (RFC 9457). */
const problem = (status: number, detail: string, headers: Record<string, string> = {}, more: Raw = {}): Response =>
  Response.json({ type: "about:blank", title: PHRASES[status], status, detail, ...more }, {
    status,
    headers: { ...headers, "content-type": "application/problem+json" },
  });

/** Who asks, and the token that it has shown. */
type AdminEnv = { Variables: { peer: string; shown: "token" | "read token" | "" } };
type AdminContext = Context<AdminEnv>;

const invalid = (mistakes: Pick<Mistake, "path" | "message">[]) =>
  new Refused(400, mistakes.map(({ path, message }) => path ? `${path}: ${message}` : message).join("; "), mistakes);

// ---------------------------------------------------------------------------------------------------------------------
// 42. Changes: operating it. Every change is a change of the file.
// ---------------------------------------------------------------------------------------------------------------------

// Explaining: what would become of a request, without asking anybody and without changing anything.

/** One service as a request would find it: its records are copies, with which its strategy may do what it likes. */
function explainService({ service: found, weight }: Destination, exchange: Exchange, effects: Effects) {
  const service = { ...found, servers: found.servers.map((server) => ({ ...server })), candidatesUntil: 0 };
  const asked = withRoom(service, candidatesOf(service, exchange.now));
  const taker = asked.length > 0 ? choose(service, asked as Candidates, exchange) : undefined;
  return { weight, ...choiceOf(service, asked, exchange, effects, taker) };
}

/** Which route a request would take, or why it takes none; which services and servers; and who would take it. */
function explain(balancer: Balancer, method: string, url: string) {
  const { username, password } = new URL(url);
  if (username || password) {
    throw invalid([{ path: "url", message: "it has a user name or a password, which no request has there" }]);
  }
  if (!METHOD.test(method) || REFUSED_METHODS.has(method)) {
    throw invalid([{ path: "method", message: `${quote(method)} is not a method that can be forwarded` }]);
  }
  const effects = { ...balancer.effects, random: Math.random };
  const request = new Request(url, { method, headers: { host: new URL(url).host } });
  const from = { address: "127.0.0.1", scheme: new URL(url).protocol.slice(0, -1), headers: [] };
  const exchange = exchangeOf({ ...balancer, effects, entrypoints: new Map() }, request, from);
  const refusal = admit(exchange), route = refusal ? undefined : matchRoute(balancer.table, exchange);
  if (!route) {
    const failure = refusal ?? (exchange.allow ? "bad-method" : "no-route");
    return { ...FAILURES[failure], failure, ...(exchange.allow && { allow: exchange.allow }) };
  }
  const { name, action, admits, destinations, mirror } = route;
  const found = { route: name, action: action.kind, restricted: admits !== undefined, weight: route.weight };
  if (action.kind !== "forward") return { ...found, status: action.status };
  exchange.now = effects.now();
  const chain = (one: Destination, fallback = false): (ReturnType<typeof explainService> & { fallback: boolean })[] => [
    { fallback, ...explainService(one, exchange, effects) },
    ...one.fallback ? chain(one.fallback, true) : [],
  ];
  const services = destinations.flatMap((one) => chain(one));
  const copies = mirror && { copies: mirror.service.name };
  return { ...found, target: `${method} ${targetOf(exchange, route)}`, services, ...copies };
}

// Changing: whatever changes is first changed in the file, as it is written, and then put in force from there.

const written = new WeakMap<Config, Raw>();
/** The file in force as it is written: variables stay `${NAME}`. */
const writtenOf = (config: Config): Raw => entry(written, config, () => record(readAsWritten(config.text, "")));
/** What stands at a place; what every object inherits (`toString`) does not. */
const at = (raw: unknown, path: Keys): unknown =>
  path.reduce(
    (value, key) => value instanceof Object && Object.hasOwn(value, key) ? (value as Raw)[key] : undefined,
    raw,
  );
/** Puts a value in its place; undefined takes it away. */
function put(raw: Raw, path: Keys, value: unknown): void {
  const above = path.slice(0, -1), last = path.at(-1)!;
  const parent = above.reduce<Raw>((value, key) => (value[key] ??= {}) as Raw, raw);
  if (value !== undefined) parent[last] = value;
  else if (Array.isArray(parent)) parent.splice(Number(last), 1);
  else delete parent[last];
}
/** A merge patch (RFC 7396): maps are merged, null takes away, anything else replaces. */
function merged(under: unknown, patch: unknown): unknown {
  if (!isRecord(patch)) return patch;
  const out = { ...record(under) };
  for (const [key, value] of Object.entries(patch)) {
    if (value === null) delete out[key];
    else out[key] = merged(out[key], value);
  }
  return out;
}

/** What differs, as people read it: `services.shop.servers[0].weight: 3`. */
function differences(before: unknown, after: unknown, path: Keys = []): string[] {
  if (same(before, after)) return [];
  const lists = Array.isArray(before) && Array.isArray(after) && before.length === after.length;
  if (lists || isRecord(before) && isRecord(after)) {
    const keys = new Set([...Object.keys(before), ...Object.keys(after as Raw)]);
    return [...keys].flatMap((key) =>
      differences(at(before, [key]), at(after, [key]), [...path, lists ? Number(key) : key])
    );
  }
  const shown = masked({ [String(path.at(-1))]: after }, hidden, String(path.at(-2))) as Raw;
  return [`${dotted(path)}: ${after === undefined ? "taken out" : inline(Object.values(shown)[0]).slice(0, 200)}`];
}

/** Secrets stay where they are, unless they are no secrets: `${NAME}` only says where one is. */
const hidden = (text: string, secret: boolean): string => secret && !/^\$\{\w+\}$/.test(text) ? "***" : text;

/** Names one state of something, for `ETag` and `If-Match`. */
function tagOf(value: unknown): string | undefined {
  const text = JSON.stringify(value) as string | undefined;
  return text && `"${hash(`1${text}`).toString(36)}${hash(`2${text}`).toString(36)}"`;
}

/** Changes the file as it is written. A text replaces it. */
type Edit = (raw: Raw, config: Config) => string | void;
/** Who has changed what. */
function reportChange({ req, get }: AdminContext, { report }: Effects, changes: string[]): void {
  const who = `${get("peer")}${get("shown") && ` with the ${get("shown")}`}`;
  const what = changes.slice(0, 5).join(", ") || "nothing but comments";
  const more = changes.length > 5 ? `, and ${changes.length - 5} more` : "";
  report("info", `admin: ${who}: ${req.method} ${quote(req.path)}: ${what}${more}`);
}

const NEEDS_RESTART = "admin.listen has changed: that takes effect with the next start";
const needsRestart = (...configs: Config[]): boolean =>
  new Set(configs.map(({ admin }) => JSON.stringify(admin?.listen))).size > 1;

/** What has changed, for `If-Match`. */
type Versioned = (config: Config) => unknown;
type Parse = (text: string) => Config;
type Change = (context: AdminContext, edit: Edit, what: Versioned) => Promise<void>;

/**
 * The one way in which the config is changed: one change after the other, each whole or not at all. It is edited, read
 * again and checked like any routes.yml, saved, and put in force.
 */
function changesOf(lb: LoadBalancer, parse: Parse, file?: string): Change {
  const { balancer } = lb;
  let last: Promise<unknown> = Promise.resolve();
  const apply = async (context: AdminContext, edit: Edit, what: Versioned) => {
    const { req } = context, { config } = balancer.table, before = writtenOf(config), after = structuredClone(before);
    const match = req.header("if-match"), tag = tagOf(what(config));
    if (match && !(tag && match.split(",").some((one) => one.trim() === tag || one.trim() === "*"))) {
      throw new Refused(412, "it has changed in the meantime");
    }
    const text = edit(after, config) ?? rewrite(config.text, after, before), next = parse(text);
    if (text === config.text && !balancer.reloadFailed) return;
    if (file) await saveFile(file, config.text, text);
    await lb.reload(next);
    reportChange(context, balancer.effects, differences(before, writtenOf(next)));
    if (needsRestart(config, next)) balancer.effects.report("warn", NEEDS_RESTART);
  };
  return (...asked) => last = last.then(() => apply(...asked), () => apply(...asked)) as Promise<void>;
}

// Asking: what comes with a request to the API.

// What the bodies have to be. Services, servers and the file are described by their own schemas.
const State = map({
  state: need(also.state.wrapped, "drain: no new requests, those in flight finish; maint: no probes either"),
});
const Told = map({ health: need(oneOf("up", "down"), "until probes say otherwise") });
const Addr = word("a host name or an address", /^.+$/, (text) => (isName(text) || isAddress(text)) && text);
const Pool = map({
  servers: need(
    v.pipe(v.array(map({ addr: Addr, port: whole(1, 65_535) }), "$ is not a list"), v.minLength(1, "is empty")),
    "addr and port of each; one that is repeated weighs more",
  ),
});
const ServerPatch = map({ url: opt(Url), ...also });
/** What bodies may be, by the names that the description has for them. */
const SHAPES = { Config: RoutesFile, Service, Settings: map(settings), Server, ServerPatch, Pool, State, Health: Told };

/** What an operation has at hand. */
interface Asked {
  context: AdminContext;
  lb: LoadBalancer;
  parse: Parse;
  change: Change;
}
/** One operation of the API: what it does, what it takes, and what comes of it. The description is made of the same. */
interface Operation {
  does: string;
  takes?: keyof typeof SHAPES; // its body
  asks?: Record<string, string>; // its query
  gives?: number[]; // statuses beside 200 and those of what is wrong
  open?: true; // to everybody who gets here, without a token
  run(asked: Asked): Response | Promise<Response>;
}

/** How bodies are written: JSON, also where nobody says so (`curl -d`), or YAML. */
const BODIES: Record<string, "json" | "yaml"> = {
  "": "json",
  "application/x-www-form-urlencoded": "json",
  "application/json": "json",
  "application/merge-patch+json": "json",
  "application/yaml": "yaml",
  "application/x-yaml": "yaml",
  "text/yaml": "yaml",
};

/** The places of `***`: it stands for a secret that is not shown, and would become one. */
const starsIn = (value: unknown, path: Keys): Keys[] => {
  if (typeof value !== "object" || value === null) return value === "***" ? [path] : [];
  return Object.entries(value).flatMap(([key, one]) =>
    starsIn(one, [...path, Array.isArray(value) ? Number(key) : key])
  );
};

/** The body of a request, as it is written. */
async function bodyOf({ req }: AdminContext): Promise<{ value: unknown; text: string; kind: "json" | "yaml" }> {
  const type = lower((req.header("content-type") ?? "").split(";")[0]!.trim()),
    kind = at(BODIES, [type]) as "json" | "yaml" | undefined;
  if (!kind) throw new Refused(415, `${quote(type)} is neither JSON nor YAML`);
  const text = await req.text();
  if (text.trim() === "") throw new Refused(400, "this needs a body");
  try {
    if (kind === "json") JSON.parse(text);
  } catch (error) {
    throw new Refused(400, `the body is not JSON: ${(error as Error).message}`);
  }
  const value = readAsWritten(text, "body"), stars = starsIn(value, []);
  if (!stars.length) return { value, text, kind };
  throw invalid(stars.map((path) => ({
    path: dotted(path),
    message: "*** stands for a secret that is not shown: write the secret, ${NAME}, or leave this out",
  })));
}

/** The body of a request, checked at once: what does not become part of the file. */
async function checkedBody<S extends Schema>(context: AdminContext, schema: S): Promise<Out<S>> {
  const { output, issues } = v.safeParse(schema, (await bodyOf(context)).value), mistakes: Refused["mistakes"] = [];
  for (const one of issues?.flatMap((issue) => flatten(issue)) ?? []) {
    report(one, (path, message) => mistakes.push({ path: dotted(path), message }));
  }
  if (mistakes.length) throw invalid(mistakes);
  return output as Out<S>;
}

const jsonOf = (value: unknown, status = 200, headers: Record<string, string> = {}): Response =>
  new Response(`${JSON.stringify(value)}\n`, { status, headers: { "content-type": "application/json", ...headers } });

/** The service that a change without a name means: the default, or the only one. */
function meantService({ routes, services }: Config): string {
  const action = routes.find((route) => route.fallback)?.action;
  const named = action?.kind === "forward" ? action.targets.map((target) => target.service) : [];
  const [name, ...others] = named.length === 1 ? named : services.keys();
  if (name !== undefined && !others.length) return name;
  throw new Refused(409, name ? `which service? ${[name, ...others].join(", ")}` : "there is no service");
}
const nameOf = ({ context: { req } }: Asked, config: Config): string => req.param("service") ?? meantService(config);

function serviceOf(asked: Asked): Service {
  const { table } = asked.lb.balancer, name = nameOf(asked, table.config), service = table.services.get(name);
  if (!service) throw new Refused(404, `there is no service ${quote(name)}`);
  return service;
}
/** By its name or its URL. */
function serverOf(asked: Asked): Server {
  const name = asked.context.req.param("server") ?? "", service = serviceOf(asked);
  const server = service.servers.find((one) => one.name === name || one.url === name);
  if (!server) throw new Refused(404, `${service.name} has no server ${quote(name)}`);
  return server;
}

/** Makes a change after which a server gets no more requests, and waits for those in flight as long as `?wait=` says. */
async function leave({ context: { req }, lb }: Asked, server: Server, change: () => Promise<void>): Promise<void> {
  const { effects } = lb.balancer, sent = req.query("wait") ?? "0", wait = v.safeParse(duration(0), sent);
  if (!wait.success) throw invalid([{ path: "wait", message: `${quote(sent)} is not a duration such as 30s` }]);
  await change();
  const end = effects.now() + wait.output;
  while (server.inFlight > 0 && effects.now() < end && !req.raw.signal.aborted) await effects.sleep(20);
}

// ---------------------------------------------------------------------------------------------------------------------
// 43. Operations: the API, one operation a row.
// ---------------------------------------------------------------------------------------------------------------------

// Services and their servers.

const serviceKeys = new Set(Object.keys(Service.entries));
/** The keys of a service in its entry, or the others: those of the route that it stands beside. */
const keysOf = (entry: unknown, own: boolean): Raw =>
  Object.fromEntries(Object.entries(record(entry)).filter(([key]) => serviceKeys.has(key) === own));
const placeOf = ({ places }: Config, name: string): Keys => places.get(name) ?? ["services", veiled(name)];
const versionOf = (asked: Asked): Versioned => (config) =>
  at(writtenOf(config), placeOf(config, nameOf(asked, config)));

/** A service as it stands and as it is written: that is what PUT takes. */
function answerService(asked: Asked, status = 200): Response {
  const { effects, table } = asked.lb.balancer, entry = versionOf(asked)(table.config);
  const config = unveiled(masked(keysOf(entry, true), hidden));
  return jsonOf({ ...serviceView(serviceOf(asked), effects.now()), config }, status, { etag: tagOf(entry)! });
}

/** Writes a service: a new one, another one in its place, or the one there is with changes. */
async function writeService(asked: Asked, how: "POST" | "PUT" | "PATCH"): Promise<Response> {
  const { context, change } = asked, { value } = await bodyOf(context), name = context.req.param("service") ?? "";
  const unknown = Object.keys(record(value)).filter((key) => !serviceKeys.has(key));
  if (!isRecord(value)) {
    throw invalid([{ path: "", message: `${quote(value)} is not a map with keys such as servers` }]);
  }
  if (unknown.length) {
    throw invalid(unknown.map((key) => ({ path: plain(key), message: `unknown key${guess(key, [...serviceKeys])}` })));
  }
  let isNew = false;
  await change(context, (raw, config) => {
    const place = placeOf(config, name), entry = at(raw, place);
    isNew = entry === undefined;
    if (how === "POST" && !isNew) throw new Refused(409, `there is a service ${quote(name)} already`);
    if (how === "PATCH" && isNew) throw new Refused(404, `there is no service ${quote(name)}`);
    put(raw, place, {
      ...keysOf(entry, false),
      ...how === "PATCH" ? merged(keysOf(entry, true), value) as Raw : value,
    });
  }, versionOf(asked));
  return answerService(asked, isNew ? 201 : 200);
}

const asMap = (entry: unknown): Raw => isRecord(entry) ? { ...entry } : { url: entry };
const USUAL: Raw = v.getDefaults(v.object(also));
/** As short as it can be said: what has its default again is left out, and a URL alone is no map. */
function shortest(entry: Raw, ...changed: string[]): unknown {
  const said = Object.entries(entry).filter(([key, value]) => !(changed.includes(key) && value === USUAL[key]));
  return said.length === 1 && said[0]![0] === "url" ? entry.url : Object.fromEntries(said);
}

/** Where in a service's entry its servers are listed, and which is at which place: one that is repeated at several. */
function listOf(raw: Raw, config: Config, name: string) {
  const place = [...placeOf(config, name), "servers"];
  const listed = [at(raw, place)].flat(), now = [at(config.source, place)].flat().map((one) => v.parse(Server, one));
  return { place, listed, now };
}

/** Changes one server in its list, or takes it out. One that was repeated is then listed once, with its weight. */
function editServer(asked: Asked, edit: (entry: Raw) => unknown): Promise<void> {
  return asked.change(asked.context, (raw, config) => {
    const { url, weight } = serverOf(asked), { place, listed, now } = listOf(raw, config, nameOf(asked, config));
    const [first, ...again] = now.flatMap((one, i) => one.url === url ? [i] : []);
    const changed = edit({ ...asMap(listed[first!]), ...(again.length > 0 && { weight }) });
    put(raw, place, listed.flatMap((one, i) => i === first ? changed ?? [] : again.includes(i) ? [] : [one]));
  }, versionOf(asked));
}

/** 202: what has been told is done, and requests are still in flight there. */
const answerServer = (asked: Asked, server: Server, status: number): Response => {
  const { effects, table } = asked.lb.balancer, now = effects.now(), service = table.services.get(server.service);
  if (service) candidatesOf(service, now); // weights are worked out with it
  return jsonOf(serverView(server, now), status, { etag: tagOf(versionOf(asked)(table.config)) ?? '""' });
};
const stillBusy = (server: Server): 200 | 202 => server.inFlight > 0 ? 202 : 200;

async function patchServer(asked: Asked, patch: Raw): Promise<Response> {
  const server = serverOf(asked), changed = Object.keys(patch);
  await leave(asked, server, () => editServer(asked, (entry) => shortest(merged(entry, patch) as Raw, ...changed)));
  return answerServer(asked, server, server.state === "ready" ? 200 : stillBusy(server));
}

/** Takes a server out; who wants to wait for what is in flight there drains it first. */
async function deleteServer(asked: Asked): Promise<Response> {
  const server = serverOf(asked);
  await editServer(asked, () => undefined);
  return answerServer(asked, server, stillBusy(server));
}

/** Adds a server; which one it is shows when the file has been read. */
async function postServer(asked: Asked): Promise<Response> {
  const { value } = await bodyOf(asked.context);
  let url: string | undefined;
  await asked.change(asked.context, (raw, config) => {
    const name = nameOf(asked, config), { place, listed, now } = listOf(raw, config, name);
    put(raw, place, [...listed, value]);
    const text = rewrite(config.text, raw), distinct = new Set(now.map((one) => one.url));
    url = asked.parse(text).services.get(name)!.servers.find((one) => !distinct.has(one.url))?.url;
    if (url !== undefined) return text;
    throw new Refused(409, `${name} has this server already`);
  }, versionOf(asked));
  const added = serviceOf(asked).servers.find((one) => one.url === url);
  return added ? answerServer(asked, added, 201) : answerService(asked);
}

/** Marks a server by hand. This is no change of the config: probes have the last word. */
async function tellHealth(asked: Asked): Promise<Response> {
  const { health } = await checkedBody(asked.context, Told), server = serverOf(asked), { effects } = asked.lb.balancer;
  onTold(serviceOf(asked), server, health === "up", effects);
  reportChange(asked.context, effects, [health]);
  return answerServer(asked, server, 200);
}

/** The servers of PythonLoadBalancer's body: one that is repeated weighs more, and what else is known of one stays. */
function pool(servers: Out<typeof Pool>["servers"], { listed, now }: ReturnType<typeof listOf>): unknown[] {
  const named = Map.groupBy(servers, ({ addr, port }) => `${isIPv6(addr) ? `[${addr}]` : lower(addr)}:${port}`);
  return [...named].map(([name, { length }]) => {
    const known = now.findIndex((one) => hostOf(one.url) === hostOf(v.parse(Url, name).url));
    return shortest({ ...asMap(known < 0 ? name : listed[known]), weight: length }, "weight");
  });
}

// The whole config, and what there is to see of it.

const shownConfig = (config: Config): Raw => masked(writtenOf(config), hidden) as Raw;
const wantsJson = ({ req }: AdminContext): boolean => /[/+]json/.test(req.header("accept") ?? "");

async function writeConfig({ context, lb, change }: Asked, how: "PUT" | "PATCH"): Promise<Response> {
  const { value, text, kind } = await bodyOf(context);
  if (how === "PUT" && !context.req.header("if-match")) {
    throw new Refused(428, "send If-Match with the ETag of GET /config, or *");
  }
  await change(context, (raw) => {
    if (kind === "yaml" && how === "PUT") return text;
    return rewrite(lb.balancer.table.config.text, how === "PUT" ? value : merged(raw, value));
  }, ({ text }) => text);
  return answerConfig(context, lb);
}

function answerConfig(context: AdminContext, { balancer: { table: { config } } }: LoadBalancer): Response {
  const headers = { etag: tagOf(config.text)! }, shown = shownConfig(config);
  if (wantsJson(context)) return jsonOf(unveiled(shown), 200, headers);
  return new Response(rewrite(config.text, shown), { headers: { ...headers, "content-type": "application/yaml" } });
}

const WAIT = { wait: "how long the answer may wait for requests in flight there, such as 30s; then 202" };

/** The whole API: its routes and its description are made of this table. Nothing but PUT, PATCH, POST and DELETE changes anything. */
const OPERATIONS: Record<string, Operation> = {
  "POST /": {
    does: "Changes the servers of the default service, or of the only one; one that is repeated weighs more",
    takes: "Pool",
    run: async (asked) => {
      const { servers } = await checkedBody(asked.context, Pool);
      await asked.change(asked.context, (raw, config) => {
        const list = listOf(raw, config, meantService(config));
        put(raw, list.place, pool(servers, list));
      }, versionOf(asked));
      return answerService(asked);
    },
  },
  "GET /services": { does: "All services and their servers", run: ({ lb }) => jsonOf(snapshotOf(lb.balancer)) },
  "GET /services/:service": { does: "One service, and how it is written", run: (asked) => answerService(asked) },
  "POST /services/:service": {
    does: "A new service",
    takes: "Service",
    gives: [201],
    run: (asked) => writeService(asked, "POST"),
  },
  "PUT /services/:service": {
    does: "A service, new or in the place of the one there is",
    takes: "Service",
    gives: [201],
    run: (asked) => writeService(asked, "PUT"),
  },
  "PATCH /services/:service": {
    does: "Changes some keys of a service (RFC 7396: null takes one out)",
    takes: "Settings",
    run: (asked) => writeService(asked, "PATCH"),
  },
  "DELETE /services/:service": {
    does: "Takes a service out; requests in flight there finish",
    run: async (asked) => {
      const service = serviceOf(asked);
      await asked.change(
        asked.context,
        (raw, config) => put(raw, placeOf(config, service.name), undefined),
        versionOf(asked),
      );
      return jsonOf(serviceView(service, asked.lb.balancer.effects.now()));
    },
  },
  "GET /services/:service/servers": {
    does: "The servers of a service",
    run: (asked) => jsonOf(serviceView(serviceOf(asked), asked.lb.balancer.effects.now()).servers),
  },
  "POST /services/:service/servers": { does: "A further server", takes: "Server", gives: [201], run: postServer },
  "GET /services/:service/servers/:server": {
    does: "One server, by its name or URL",
    run: (asked) => answerServer(asked, serverOf(asked), 200),
  },
  "PATCH /services/:service/servers/:server": {
    does: "Changes a server: its weight, say",
    takes: "ServerPatch",
    asks: WAIT,
    gives: [202],
    run: async (asked) => patchServer(asked, record((await bodyOf(asked.context)).value)),
  },
  "DELETE /services/:service/servers/:server": {
    does: "Takes a server out; requests in flight there finish (drain it first to wait for them)",
    gives: [202],
    run: deleteServer,
  },
  "PUT /services/:service/servers/:server/state": {
    does: "ready, drain (no new requests, those in flight finish) or maint (no probes either)",
    takes: "State",
    asks: WAIT,
    gives: [202],
    run: async (asked) => patchServer(asked, await checkedBody(asked.context, State)),
  },
  "PUT /services/:service/servers/:server/health": {
    does: "Says that a server is up or down, until probes say otherwise; this is not saved",
    takes: "Health",
    run: tellHealth,
  },
  "GET /config": {
    does: "routes.yml, as YAML or JSON; secrets as ***",
    run: ({ context, lb }) => answerConfig(context, lb),
  },
  "PUT /config": {
    does: "Another routes.yml; needs If-Match",
    takes: "Config",
    run: (asked) => writeConfig(asked, "PUT"),
  },
  "PATCH /config": {
    does: "Changes some keys of routes.yml (RFC 7396: null takes one out)",
    takes: "Config",
    run: (asked) => writeConfig(asked, "PATCH"),
  },
  "POST /config/check": {
    does: "Checks a routes.yml and changes nothing",
    takes: "Config",
    run: async ({ context, parse }) => {
      const { services, routes } = parse((await bodyOf(context)).text);
      return jsonOf({ services: services.size, routes: routes.length });
    },
  },
  "GET /routes": {
    does: "All routes, in the order of the file",
    run: ({ lb }) => jsonOf(lb.balancer.table.config.routes.map(routeView)),
  },
  "GET /explain": {
    does:
      "Which route a request would take, which services, which servers and why not the others, and who would take it",
    asks: { url: "such as http://www.example.com/path", method: "default GET" },
    run: ({ context: { req }, lb }) => {
      const url = req.query("url") ?? "", method = req.query("method") ?? "GET";
      if (!/^https?:/.test(url) || !URL.canParse(url)) {
        throw invalid([{ path: "url", message: `${quote(url)} is not a URL such as http://host/path` }]);
      }
      return jsonOf(explain(lb.balancer, method, url));
    },
  },
  "GET /metrics": {
    does: "Everything that is counted, for Prometheus",
    run: ({ lb }) => new Response(renderMetrics(samplesOf(lb.balancer)), { headers: { "content-type": METRICS_TYPE } }),
  },
  "GET /connections": { does: "What is in flight, and where", run: ({ lb }) => jsonOf(connections(lb.balancer)) },
  "GET /workers": {
    does: "The threads that serve, if there are some",
    run: ({ lb }) => jsonOf([...lb.balancer.workers].map(([id, { since }]) => ({ id, since }))),
  },
  "DELETE /workers/:worker": {
    does: "Ends a thread at once, with what is in flight there; another one takes its place",
    run: ({ context: { req }, lb: { balancer } }) => {
      const id = req.param("worker") ?? "", worker = balancer.workers.get(Number(id));
      if (!worker) throw new Refused(404, `there is no worker ${quote(id)}`);
      worker.end();
      return jsonOf({ id: Number(id) });
    },
  },
  "GET /health/live": { does: "200 as long as it runs", open: true, run: () => jsonOf({ status: "live" }) },
  "GET /health/ready": {
    does: "200, and 503 as soon as it drains",
    open: true,
    run: ({ lb: { balancer } }) => balancer.draining ? problem(503, "draining") : jsonOf({ status: "ready" }),
  },
  "GET /version": { does: "Of lb.ts, and where it runs", run: () => jsonOf({ version: VERSION, runtime: here }) },
};

// ---------------------------------------------------------------------------------------------------------------------
// 44. Docs: the description of the API. OpenAPI from the schemas that check it.
// ---------------------------------------------------------------------------------------------------------------------

const problemSchema = {
  type: "object",
  description: "RFC 9457",
  properties: {
    type: { type: "string" },
    title: { type: "string" },
    status: { type: "integer" },
    detail: { type: "string" },
    mistakes: {
      type: "array",
      description: "of a config: all of them; lines are those of the routes.yml that would have come of it",
      items: {
        type: "object",
        properties: {
          path: { type: "string" },
          message: { type: "string" },
          line: { type: "integer" },
          column: { type: "integer" },
        },
      },
    },
  },
};

const ref = (kind: string, name: string) => ({ $ref: `#/components/${kind}/${name}` });
const parameter = (where: "path" | "query" | "header", name: string, description: string) => ({
  name,
  in: where,
  description,
  required: where === "path",
  schema: { type: "string" },
});

/** One operation as OpenAPI has it. */
function described(method: string, path: string, { does, takes, asks = {}, gives = [], open }: Operation) {
  const inPath = [...path.matchAll(/:(\w+)/g)].map(([, name]) => parameter("path", name!, `name of the ${name}`));
  const inQuery = Object.entries(asks).map(([name, about]) => parameter("query", name, about));
  const changes = method === "GET" ? [] : [parameter("header", "If-Match", "the ETag that the change is meant for")];
  const schema = takes && ref("schemas", takes);
  return {
    summary: does,
    operationId: `${lower(method)}${path.replace(/\W+(\w)/g, (_, letter) => upper(letter)).replace(/\W/g, "")}`,
    parameters: [...inPath, ...inQuery, ...changes],
    ...(schema && {
      requestBody: { required: true, content: { "application/json": { schema }, "application/yaml": { schema } } },
    }),
    responses: {
      ...Object.fromEntries([200, ...gives].map((status) => [status, { description: STATUS_SAYS[status] }])),
      default: ref("responses", "Problem"),
    },
    security: open ? [] : [{ token: [] }, {}],
  };
}
const STATUS_SAYS: Record<number, string> = {
  200: "done",
  201: "made",
  202: "done, and requests are still in flight there",
};

/** The API as OpenAPI 3.1 describes it, made of the table and the schemas that it works with. */
export function openApi() {
  const paths: Record<string, Raw> = {};
  for (const [name, operation] of Object.entries(OPERATIONS)) {
    const [method, path] = name.split(" ") as [string, string];
    (paths[path.replace(/:(\w+)/g, "{$1}")] ??= {})[lower(method)] = described(method, path, operation);
  }
  const schemas = Object.fromEntries(
    Object.entries(SHAPES).map(([name, shape]) => [name, schemaOf(shape, "draft-2020-12")]),
  );
  const content = { "application/problem+json": { schema: ref("schemas", "Problem") } };
  return {
    openapi: "3.1.0",
    info: { title: "lb.ts", version: VERSION, description: "Looking at a load balancer and operating it." },
    paths,
    components: {
      schemas: { ...schemas, Problem: problemSchema },
      responses: { Problem: { description: "what is wrong", content } },
      securitySchemes: {
        token: { type: "http", scheme: "bearer", description: "admin.token of routes.yml, or read_token for GET" },
      },
    },
  };
}

const DOCS_STYLE = `
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 900px; margin: auto; padding: 16px 24px 64px; }
details { border-top: 1px solid color-mix(in srgb, currentColor 20%, transparent); padding: 8px 0; }
summary { cursor: pointer; }
summary code { font-weight: 600; }
code, pre { font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap; }
table { width: 100%; border-spacing: 0; margin: 8px 0; }
td { padding: 2px 16px 2px 0; vertical-align: top; }
td:first-child { width: 25%; }
`;

interface Shape {
  description?: string;
  default?: unknown;
  enum?: unknown[];
  properties?: Record<string, Shape>;
  anyOf?: Shape[];
}
/** The keys of a body, wherever among its alternatives they stand. */
const keysIn = ({ properties, anyOf = [] }: Shape): [string, Shape][] =>
  properties ? Object.entries(properties) : anyOf.flatMap(keysIn);

const usualValue = (value: unknown) =>
  value === undefined ? "" : html`
    <br>default <code>${JSON.stringify(value)}</code>
  `;
const bodyKeys = (shape: Shape) =>
  keysIn(shape).map(([key, one]) =>
    html`
      <tr>
        <td><code>${key}</code></td>
        <td>${one.description ?? one.enum?.join(", ") ?? ""}${usualValue(one.default)}</td>
      </tr>
    `
  );

type Described = ReturnType<typeof described>;
const operationHtml = (method: string, path: string, operation: Described, takes: Shape | undefined) =>
  html`
    <details id="${operation.operationId}">
      <summary><code>${upper(method)} ${path}</code> ${operation.summary}</summary>
      <table>
        ${operation.parameters.map(({ name, in: where, description }) =>
          html`
            <tr>
              <td><code>${name}</code></td>
              <td>${description} (${where})</td>
            </tr>
          `
        )}
        ${takes && bodyKeys(takes)}
      </table>
    </details>
  `;

function docsPage(nonce: string) {
  const { paths, components: { schemas } } = openApi();
  const operations = Object.entries(paths).flatMap(([path, methods]) =>
    Object.entries(methods as Record<string, Described>).map(([method, one]) => {
      const name = one.requestBody?.content["application/json"].schema.$ref.split("/").at(-1) as
        | keyof typeof schemas
        | undefined;
      return operationHtml(method, path, one, name && schemas[name] as Shape);
    })
  );
  return html`
    <!DOCTYPE html>
    <html lang="en">
      <head>
        <meta charset="utf-8">
        <meta name="viewport" content="width=device-width, initial-scale=1">
        <title>lb.ts: API</title>
        <link rel="icon" href="data:,">
        <style nonce="${nonce}">${raw(DOCS_STYLE)}</style>
      </head>
      <body>
        <h1>lb.ts ${VERSION}: API</h1>
        <p>Bodies are JSON or YAML, by Content-Type. What is wrong comes as <code>application/problem+json</code> (RFC 9457).
          With a token in routes.yml: <code>Authorization: Bearer ...</code>. The same for machines: <a
          href="openapi.json">openapi.json</a>.</p>
        <pre>curl -X PUT localhost:9090/services/shop/servers/localhost:8081/state?wait=30s -d '{"state": "drain"}'</pre>
        ${operations}
      </body>
    </html>
  `;
}

/** What a page says to browsers. Whether this host is to be asked over TLS only is not for one of its ports to say. */
const secured = (contentSecurityPolicy: Record<string, (string | typeof NONCE)[]>) =>
  secureHeaders({ contentSecurityPolicy, strictTransportSecurity: false });

/** The description as a page and for machines. There is nothing in it that depends on the config. */
function docs(): Hono<AdminEnv> {
  const app = new Hono<AdminEnv>();
  const policy = { defaultSrc: ["'none'"], styleSrc: [NONCE], imgSrc: ["data:"], frameAncestors: ["'none'"] };
  app.get("/openapi.json", () => jsonOf(openApi()));
  app.get(
    "/docs",
    secured(policy),
    (context) => context.html(docsPage(context.get("secureHeadersNonce") ?? "")),
  );
  return app;
}

// ---------------------------------------------------------------------------------------------------------------------
// 45. Dashboard: the page for people. One page, no script from anywhere else.
// ---------------------------------------------------------------------------------------------------------------------

const STYLE = `
:root {
  --ground: light-dark(#f5f5f2, #111215); --card: light-dark(#fff, #191b1f); --line: light-dark(#e3e3de, #2d3036);
  --ink: light-dark(#1c1e22, #e8e8e5); --dim: light-dark(#5a606b, #a3a9b5); --blue: light-dark(#1a5fb4, #8ab4f8);
  --good: light-dark(#0a6b3b, #63d69d); --warn: light-dark(#7d4b00, #f2b84f); --bad: light-dark(#b3201a, #ff8f85);
  color-scheme: light dark;
  font: 14px/1.4 system-ui, sans-serif;
  font-variant-numeric: tabular-nums;
}
* { box-sizing: border-box; margin: 0; padding: 0; font: inherit; color: inherit; }
[hidden], :is(p, ul, small):empty { display: none !important; }
:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; border-radius: 3px; }
body { max-width: 1680px; margin: auto; padding: 16px 24px 64px; background: var(--ground); color: var(--ink); }
header { display: flex; flex-wrap: wrap; gap: 0 16px; align-items: baseline; }
main, #services, form, label { display: grid; gap: 16px; }
main { margin-top: 4px; }
h1, h2, b, summary, tbody th { font-weight: 600; }
#verdict, b { flex: 1; font-size: 22px; font-weight: 600; }
#link, small, thead th { color: var(--dim); font-size: 12px; }
.up td:nth-child(2), .good { color: var(--good); }
:is(.drain, .maint, .trial, .paused) td:nth-child(2), .warn { color: var(--warn); }
:is(.down, .ejected) td:nth-child(2), .bad { color: var(--bad); }
ul { list-style: none; }
#charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 16px; }
figure, details, table, dialog { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
figure { padding: 12px 16px; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: baseline; }
b { flex-basis: 100%; }
svg { display: block; width: 100%; height: 56px; margin-top: 8px; border-bottom: 1px solid var(--line); }
path { fill: none; stroke: var(--blue); stroke-width: 1.5; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
figure:nth-child(2) path { stroke: var(--bad); }
path + path { stroke: var(--dim); stroke-dasharray: 3 3; }
summary { padding: 10px 16px; }
summary, button { cursor: pointer; }
table { width: 100%; table-layout: fixed; border-spacing: 0; overflow: clip; }
details table { border: 0; }
details > div { max-height: 205px; overflow: auto; }
th, td { padding: 6px 8px; border-top: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:nth-child(3), details td { overflow-wrap: anywhere; }
thead th { position: sticky; top: 0; z-index: 1; border-top: 0; background: var(--card); }
small { display: block; font-weight: 400; }
details :is(th, td), :is(th, td):nth-child(-n + 3) { text-align: left; }
section tbody tr { height: 49px; }
section thead th:is(:first-child, :nth-child(3)) { width: 15%; }
section thead th:nth-child(2) { width: 8%; }
section thead th:last-child { width: 13%; }
h2 { margin-bottom: 6px; }
h2 small { display: inline; margin-left: 8px; font-weight: 400; }
input, menu button { padding: 6px 10px; border: 1px solid var(--dim); border-radius: 6px; background: var(--card); }
#find { max-width: 320px; }
td button { padding: 0 4px; border: 0; border-radius: 6px; background: none; color: var(--blue); }
button + button { margin-left: 4px; }
[data-title=Weight] { background: linear-gradient(var(--blue) 0 0) 100% 100% / var(--share) 2px no-repeat; }
tr:is(.down, .ejected) { background: color-mix(in srgb, var(--bad) 7%, transparent); }
dialog { width: min(440px, calc(100% - 32px)); margin: auto; padding: 24px; }
dialog::backdrop { background: rgb(0 0 0 / 0.5); }
menu { display: flex; gap: 8px; justify-content: end; }
#go { border-color: var(--blue); background: var(--blue); color: var(--card); }
.lost main { opacity: 0.45; }
tr:target { box-shadow: inset 3px 0 var(--blue); }
@media (max-width: 1100px) {
  body { padding: 12px 12px 48px; }
  #verdict { flex-basis: 100%; order: 1; }
  #link { margin-left: auto; }
  section thead { display: none; }
  section tbody { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); }
  section tbody tr {
    display: grid; grid-template-columns: repeat(4, 1fr); height: auto; padding: 8px; border-top: 1px solid var(--line);
  }
  section :is(th, td) { padding: 4px; border: 0; background: none; text-align: left; }
  section td:nth-child(-n + 3) { grid-column: span 2; }
  section td:last-child { grid-column: span 3; align-self: end; }
  section th { grid-column: span 4; }
  section [data-title=Weight] { background: none; }
  section td[data-title]::before { content: attr(data-title); display: block; color: var(--dim); font-size: 12px; }
  figure { padding: 8px 12px; }
  svg { height: 36px; margin-top: 0; }
  td button { padding: 8px 10px; border: 1px solid var(--line); }
}
`;

/** Plain JavaScript for browsers: it runs in the page, and uses nothing of this file. */
const SCRIPT = String.raw`
"use strict";
const base = location.pathname.replace(/\/?$/, "/");
const $ = (id) => document.getElementById(id);
const make = (tag, props, ...inside) => {
  const one = Object.assign(document.createElement(tag), props);
  one.append(...inside);
  return one;
};
/** Writes only what has changed: what stays the same costs the browser nothing. */
const say = (node, text) => node.said === text || (node.textContent = node.said = text);
/** Makes a node's children those of a list, by name and in its order. What stays is kept. */
const arrange = (parent, list, create) => {
  const known = parent.known ?? new Map();
  parent.known = new Map(list.map((one) => [one.name, known.get(one.name) ?? create(one)]));
  const nodes = [...parent.known.values()];
  nodes.forEach((node, i) => parent.children[i] === node || parent.insertBefore(node, parent.children[i] ?? null));
  while (parent.children.length > nodes.length) parent.lastElementChild.remove();
  return nodes;
};

// Figures as people read them.
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const few = { maximumSignificantDigits: 3, maximumFractionDigits: 2, roundingPriority: "lessPrecision" };
const short = new Intl.NumberFormat("en", few);
const scaled = (n, ...units) => {
  for (; n >= 999.5 && units.length > 1; n /= 1000) units.shift();
  return short.format(n) + units[0];
};
const count = (n) => n < 1e5 ? whole.format(n) : scaled(n, "", " k", " M", " G", " T");
const rate = (n) => scaled(n, "/s", " k/s", " M/s");
const bytes = (n) => scaled(n, " B", " kB", " MB", " GB", " TB");
const time = (ms) => ms === undefined ? "–" : scaled(ms, " ms", " s");
const percent = (share) => short.format(100 * share) + " %";
const ago = (seconds) => {
  const [s, m, h, d] = [1, 60, 3600, 86400].map((unit) => Math.floor(seconds / unit));
  return d ? d + " d " + h % 24 + " h" : h ? h + " h " + m % 60 + " m" : m ? m + " m" : s + " s";
};

// What comes in: a look at everything, once a second.
const CHARTED = 300, RECENT = 30; // seconds: what the charts show, and what rates and latencies are of
let latest, drawing, samples = [], looks = [];
const keyOf = (service, server) => service.name + "\n" + (server?.name ?? "");
const receive = (look) => {
  latest = look;
  const { time, history, total, services } = look;
  if (history) [samples, looks] = [history, []]; // the first of a connection
  if (time - (samples.at(-1)?.time ?? -9) > 1.9) samples.push({ time, total });
  samples = samples.filter((one) => time - one.time <= CHARTED);
  if (time - (looks.at(-1)?.time ?? -9) > 4.9) {
    const all = services.flatMap((one) => [[one], ...one.servers.map((server) => [one, server])]);
    looks.push({ time, counters: new Map(all.map((one) => [keyOf(...one), one.at(-1).counters])) });
  }
  looks = looks.filter((one) => time - one.time <= RECENT);
  drawing ??= requestAnimationFrame(show);
};
/** What has been counted between two looks; all of it where there is only one. */
const between = (now, then) => {
  if (!then || now.requests < then.requests) return now;
  const durations = now.durations.map((n, i) => n - then.durations[i]);
  return { requests: now.requests - then.requests, errors: now.errors - then.errors, durations };
};
const recent = (...one) => between(one.at(-1).counters, looks[0].counters.get(keyOf(...one)));
const perSecond = ({ requests }, since = looks[0].time, to = latest.time) => requests / Math.max(1, to - since);
const failing = ({ errors, requests }) => requests && errors / requests;
const quantile = ({ requests, durations }, share) => {
  let rank = share * requests;
  for (const [i, held] of durations.entries()) {
    const [from, to] = [latest.bounds[i - 1] ?? 0, latest.bounds[i] ?? latest.bounds.at(-1)];
    if (held && held >= rank) return from + (to - from) * rank / held;
    rank -= held;
  }
};
const p50 = (counted) => quantile(counted, 0.5), p99 = (counted) => quantile(counted, 0.99);

// The charts: how each is written, and what it is of. A point is of ten seconds: few requests make no mountains.
const CHARTS = [[rate, perSecond], [percent, failing], [time, p50, p99]];
const draw = ([as, ...lines], chart) => {
  const [caption, svg] = $("charts").children[chart].children, most = [];
  const points = samples.slice(1).map((one, i) => {
    const then = samples[Math.max(0, i - 4)], counted = between(one.total, then.total);
    const values = lines.map((of) => of(counted, then.time, one.time));
    most.push(...values.filter(Boolean));
    return { x: CHARTED - (latest.time - one.time), values };
  });
  const top = Math.max(0, ...most), now = points.at(-1)?.values.map(as).join(", ") ?? "–";
  lines.forEach((_, line) => {
    let pen = "M";
    const to = points.map(({ x, values: { [line]: value } }) => {
      const step = value === undefined ? "" : pen + x.toFixed(1) + " " + (54 - 52 * value / (top || 1)).toFixed(1);
      pen = step ? "L" : "M"; // where there was nothing the line has a gap
      return step;
    });
    svg.children[line].setAttribute("d", to.join(""));
  });
  say(caption.children[1], "at most " + as(top) + " in 5 min");
  say(caption.children[2], now);
  svg.ariaLabel = caption.firstChild.textContent + ": now " + now + ", at most " + as(top) + " in five minutes";
};

// The tables, and what can be done in them.
const DEEDS = {
  ready: () => "Requests and probes go to it again.",
  drain: (one) => "No new requests go to it; those in flight finish (" + one.in_flight + "). Probes go on.",
  maint: () => "Neither requests nor probes go to it.",
  weight: () => "Its share of new requests, from 0 (none) to 256.",
};
const SIGNS = { up: "●", trial: "△", paused: "○", drain: "◐", maint: "◇", ejected: "▲", down: "✕" };
const COLUMNS = {
  "Server": (one) => [one.name, one.backup ? "backup" : ""],
  "State": ({ status, status_for, paused_for }) =>
    [SIGNS[status] + " " + status, "for " + (status === "paused" ? "another " + ago(paused_for) : ago(status_for))],
  "Last check": ({ check: last }) =>
    last ? [last.problem || "passed", ago(last.ago) + " ago, took " + time(1e3 * last.took)] : ["–"],
  "Weight": (one) => [one.weight, percent(one.share)],
  "In flight": (one) => [count(one.in_flight)],
  "Requests": (one, now) => [count(one.counters.requests), rate(perSecond(now))],
  "Errors": (one, now) => [count(one.counters.errors), now.errors ? percent(failing(now)) : ""],
  "Retries": (one) => [count(one.retries)],
  "p50": (one, now) => [time(p50(now))],
  "p95": (one, now) => [time(quantile(now, 0.95))],
  "p99": (one, now) => [time(p99(now))],
  "Bytes out": (one) => [bytes(one.counters.bytes_out), bytes(one.counters.bytes_in) + " in"],
};
const TITLES = Object.keys(COLUMNS);
const newCell = (_, i) => make(i ? "td" : "th", {}, make("span"), make("small"));
const cells = (length) => Array.from({ length }, newCell);
let ids = 0;
const newService = () => {
  const head = make("tr", {}, ...[...TITLES, "Change"].map((textContent) => make("th", { textContent })));
  const table = make("table", {}, make("thead", {}, head), make("tbody"));
  return make("section", { id: "s" + ++ids }, make("h2", {}, make("span"), make("small")), table);
};
const newServer = ({ name: textContent }) => {
  const row = make("tr", { id: "s" + ++ids }, make("th", { textContent }));
  seen.observe(row);
  return row;
};
const fillRow = (row) => {
  row.replaceChildren(...cells(TITLES.length), make("td"));
  TITLES.forEach((title, i) => row.children[i].dataset.title = title);
  for (const deed of Object.keys(DEEDS)) {
    const onclick = () => propose(deed, row.service, row.server);
    row.lastChild.append(make("button", { textContent: deed, ariaLabel: deed + " " + row.server.name, onclick }));
  }
};
/** Of a thousand rows those that are in sight, or nearly, are filled and kept up to date. */
const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) if (target.seen = isIntersecting) showServer(target);
}, { rootMargin: "50%" });
const showServer = (row) => {
  const { service, server } = row, now = recent(service, server);
  if (row.children.length === 1) fillRow(row);
  row.className = server.status;
  row.children[3].style.setProperty("--share", 100 * server.share + "%");
  Object.values(COLUMNS).forEach((text, i) => {
    const [main, small = ""] = text(server, now);
    say(row.children[i].firstChild, String(main));
    say(row.children[i].lastChild, small);
  });
  for (const button of row.lastChild.children) button.hidden = button.textContent === server.state;
};
const isUp = (one) => one.status === "up";
const showService = (section, service) => {
  const { name, strategy, servers, in_flight, waiting } = service, now = recent(service);
  const [[title, facts], { tBodies: [body] }] = [section.firstChild.children, section.lastChild];
  const figures = [rate(perSecond(now)), percent(failing(now)) + " errors", "p99 " + time(p99(now))];
  const up = servers.filter(isUp).length + " of " + servers.length + " up";
  if (waiting) figures.unshift(waiting + " waiting");
  say(title, name);
  say(facts, [strategy, up, in_flight + " in flight", ...figures].join(" · "));
  const wanted = $("find").value.trim().toLowerCase();
  section.rows = arrange(body, servers, newServer);
  section.rows.forEach((row, i) => {
    const server = servers[i];
    const hidden = ![name, server.name, server.status].join(" ").toLowerCase().includes(wanted);
    Object.assign(row, { service, server, hidden });
    if (row.seen) showServer(row);
  });
  section.hidden = section.rows.every((row) => row.hidden);
};

// What is wrong, in words.
const MOST = 8; // lines about it
const troublesOf = (section, service) => {
  const { name, servers, askable, panicking } = service, share = failing(recent(service));
  const out = section.rows.filter(({ server }) => server.state === "ready" && !isUp(server));
  const wrong = (level, text, { id } = section) => ({ name: name + ": " + text, level, id });
  return [
    ...(askable || !servers.length ? [] : [wrong("bad", "no server may be asked")]),
    ...(panicking ? [wrong("bad", "too few servers are healthy: all of them are asked")] : []),
    ...(share > 0.05 ? [wrong("bad", "more than 5 % of the requests fail")] : []),
    ...out.map((row) => {
      const { name, status, check } = row.server;
      return wrong("warn", [name + " is " + status, check?.problem].filter(Boolean).join(": "), row);
    }),
  ];
};
const judge = (sections, services) => {
  const troubles = services.flatMap((service, i) => troublesOf(sections[i], service));
  const bad = troubles.filter((one) => one.level === "bad"), all = services.flatMap((one) => one.servers);
  const level = bad.length ? "bad" : troubles.length ? "warn" : "good";
  const up = all.filter(isUp).length, aside = all.filter((one) => one.state !== "ready").length;
  const some = count(up) + " of " + count(all.length) + " servers are up" + (aside ? ", " + aside + " set aside" : "");
  tell(level, up === all.length ? "All servers are up: " + count(up) : some);
  const list = [...new Set([...bad, ...troubles])], more = list.length - MOST;
  if (more > 0) list.splice(MOST, more, { name: "and " + more + " more", level: "warn", id: "services" });
  arrange($("troubles"), list, ({ name, level, id }) =>
    make("li", { className: level }, make("a", { href: "#" + id, textContent: name })));
};
const tell = (level, text) => {
  const said = { good: "●", warn: "▲", bad: "✕" }[level] + " " + text;
  $("verdict").className = level;
  say($("verdict"), said);
  document.title = said + " – lb.ts";
};
const PATHS = { prefix: "", exact: "= ", regex: "~ " };
const asksFor = ({ methods, hosts, paths, headers, query, default: last }) => {
  const rules = paths.flatMap(Object.entries).map(([kind, path]) => PATHS[kind] + path);
  const all = [methods, hosts, rules, [...headers, ...query]].map((list) => list.join(", "));
  return last ? "all else" : all.filter(Boolean).join(" ") || "everything";
};
const leadsTo = ({ services, redirect, respond }) =>
  services?.map(({ service, weight }) => services.length > 1 ? weight + " " + service : service).join(", ") ??
    (redirect ? "redirect " + redirect : "answer " + respond);
const show = () => {
  drawing = undefined;
  const { services, routes, version, draining } = latest;
  const sections = arrange($("services"), services, newService);
  sections.forEach((section, i) => showService(section, services[i]));
  judge(sections, services);
  CHARTS.forEach(draw);
  arrange($("routes"), routes, () => make("tr", {}, ...cells(3))).forEach(({ children }, i) => {
    const words = [routes[i].name, asksFor(routes[i]), leadsTo(routes[i])];
    words.forEach((text, column) => say(children[column].firstChild, text));
  });
  say($("link"), "lb.ts " + version + (draining ? " · draining" : " · live"));
};

// What is done, once a person has said so.
const call = (path, options = {}) => {
  const headers = { "content-type": "application/json" };
  if (sessionStorage.token) headers.authorization = "Bearer " + sessionStorage.token;
  return fetch(base + path, { ...options, headers });
};
const change = async (deed, service, server, value) => {
  const path = ["services", service.name, "servers", server.name].map(encodeURIComponent).join("/");
  const put = { method: "PUT", body: JSON.stringify({ state: deed }) };
  const patch = { method: "PATCH", body: JSON.stringify({ weight: Number(value) }) };
  const answer = await (deed === "weight" ? call(path, patch) : call(path + "/state", put)).catch(() => undefined);
  if (answer?.ok) return "";
  const problem = await answer?.json().catch(() => undefined);
  return problem?.detail ?? (answer ? "The answer is " + answer.status : "The connection is lost") + ".";
};
const propose = (deed, service, server) => {
  const leaves = ["drain", "maint"].includes(deed) && !service.servers.some((one) => isUp(one) && one !== server);
  const why = DEEDS[deed](server) + (leaves ? " No other server of " + service.name + " is up!" : "");
  const field = deed === "weight" && { name: "Weight", type: "number", min: 0, max: 256, value: server.weight };
  ask(deed + " " + server.name, why, field ? "set" : deed, field, (value) => change(deed, service, server, value));
};
const ask = (what, why, go, field, act) => {
  const [label, box] = $("value").parentNode.children, dialog = $("ask");
  [["what", what], ["why", why], ["go", go], ["problem", ""]].forEach(([id, text]) => say($(id), text));
  label.parentNode.hidden = !field;
  say(label, field.name ?? "");
  Object.assign(box, { type: "text", value: "" }, field);
  dialog.firstElementChild.onsubmit = async (event) => {
    event.preventDefault();
    const problem = await act(box.value);
    say($("problem"), problem);
    if (!problem) dialog.close();
  };
  if (!dialog.open) dialog.showModal();
};
$("cancel").onclick = () => $("ask").close();
$("find").oninput = () => latest && show();

// The connection. EventSource sends no Authorization: the events are read as they come.
const login = () => {
  const why = sessionStorage.token ? "This one is not right." : "What is shown here is for those who have it.";
  const field = { name: "Token", type: "password" };
  $("ask").onclose = ({ target }) => (target.onclose = null, listen());
  ask("The token, please", why, "Enter", field, (token) => (sessionStorage.token = token, ""));
};
const listen = async () => {
  const stop = new AbortController(), wait = () => setTimeout(() => stop.abort(), 5e3);
  let text = "", silence = wait();
  try {
    const answer = await call("events", { signal: stop.signal });
    if (answer.status === 401) return login();
    const reader = answer.ok && answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let piece; !(piece = await reader.read()).done;) {
      clearTimeout(silence);
      silence = wait();
      const events = (text + piece.value).split("\n\n");
      text = events.pop();
      for (const event of events) receive(JSON.parse(event.replace("data: ", "")));
      document.body.className = "";
    }
  } catch {
    // however it ended, it is made again
  } finally {
    clearTimeout(silence);
  }
  document.body.className = "lost";
  tell("bad", "The connection is lost");
  say($("link"), "trying again");
  setTimeout(listen, 2e3);
};
listen();
`;

const CHARTED = ["Requests", "Requests that failed", "Latency: p50, p99"];
// deno-fmt-ignore
const chart = (name: string) => html`
<figure>
  <figcaption><span>${name}</span><small></small><b></b></figcaption>
  <svg viewBox="0 0 300 56" preserveAspectRatio="none" role="img"><path /><path /></svg>
</figure>`;

// deno-fmt-ignore
const page = (nonce: string) => html`<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>lb.ts</title>
<link rel="icon" href="data:,">
<style nonce="${nonce}">${raw(STYLE)}</style>
<body>
<header><h1>lb.ts</h1><p id="verdict" role="status">Connecting</p><p id="link"></p></header>
<main>
  <ul id="troubles" aria-label="What is wrong"></ul>
  <div id="charts">${CHARTED.map(chart)}</div>
  <details open>
    <summary>Routes</summary>
    <div><table>
      <thead><tr><th>Route</th><th>Asks for</th><th>Leads to</th></tr></thead>
      <tbody id="routes"></tbody>
    </table></div>
  </details>
  <input id="find" type="search" placeholder="Find a server, service or state" aria-label="Find">
  <div id="services"></div>
</main>
<dialog id="ask" aria-labelledby="what">
  <form method="dialog">
    <h2 id="what"></h2>
    <p id="why"></p>
    <label><span></span><input id="value" autocomplete="off"></label>
    <p id="problem" class="bad" role="alert"></p>
    <menu><button type="button" id="cancel">Cancel</button><button id="go"></button></menu>
  </form>
</dialog>
<noscript>This page needs JavaScript; the same figures are at <a href="services">services</a>.</noscript>
<script nonce="${nonce}">${raw(SCRIPT)}</script>
</body>
</html>`;

const PAGE_TICK = 1_000; // milliseconds between two looks that a page is sent
const POINTS = { every: 2_000, most: 150 }; // milliseconds between the points of the charts, and how many are kept

/** Nothing but what stands in the page itself may run there, and it talks to nobody but us. */
const POLICY = {
  defaultSrc: ["'none'"],
  scriptSrc: [NONCE],
  styleSrc: [NONCE],
  connectSrc: ["'self'"],
  imgSrc: ["data:"],
  baseUri: ["'none'"],
  formAction: ["'none'"],
  frameAncestors: ["'none'"],
  requireTrustedTypesFor: ["'script'"],
};

/**
 * The page for people. It holds nothing that is worth a token: all that it shows comes with /events.
 * @param look what is to be seen at this moment: of this process, or a sum over many
 * @param gate what asks for the token
 */
export function dashboard(look: () => Snapshot | Promise<Snapshot>, gate: Gatekeeper): Hono<AdminEnv> {
  const app = new Hono<AdminEnv>(), history: Pick<Snapshot, "time" | "total">[] = [];
  const remember = async () => {
    const { time, total } = await look();
    history.push({ time, total });
    if (history.length > POINTS.most) history.shift();
  };
  if (here !== "edge") setInterval(remember, POINTS.every).unref(); // for those who look when something has happened
  app.get(
    "/",
    secured(POLICY),
    (context) => context.html(page(context.get("secureHeadersNonce") ?? "")),
  );
  app.get("/events", gate, (context) =>
    streamSSE(context, async (stream) => {
      await stream.writeSSE({ data: JSON.stringify({ ...await look(), history }) });
      while (!stream.aborted) {
        await stream.sleep(PAGE_TICK);
        await stream.writeSSE({ data: JSON.stringify(await look()) });
      }
    }));
  return app;
}

// ---------------------------------------------------------------------------------------------------------------------
// 46. Admin: who may do that, and through which door. Hosts, sites and tokens are checked before anything is looked at.
// ---------------------------------------------------------------------------------------------------------------------

/** What every answer says to browsers, and to what is between them and us. */
const ALWAYS = {
  "cache-control": "no-store",
  "cross-origin-resource-policy": "same-origin",
  "referrer-policy": "no-referrer",
  "x-content-type-options": "nosniff",
  "x-frame-options": "DENY",
};

/** What the admin app is made with. */
export interface AdminOptions {
  /** Where changes are saved. Without a file they are in force, and forgotten with the process. */
  file?: string;
  /** Reads such a file: with an environment and strategies of your own, say. */
  parse?: (text: string) => Config;
  /** Host names that lead here, beside localhost and addresses: others are refused where no token is asked for. */
  hosts?: string[];
}
type Gatekeeper = MiddlewareHandler<AdminEnv>;
type Tokens = Balancer["tokens"];

/** No page of another site gets in through a browser: neither by a name of its own (DNS rebinding), nor by a form (CSRF). */
const sameSite = (hosts: string[], tokens: () => Tokens): Gatekeeper => async ({ req }, next) => {
  const host = lower(req.header("host") ?? ""), name = hostName(host);
  const known = name === "localhost" || isAddress(bare(name)) || hosts.includes(name);
  if (!hostIsValid(host) || !known && !tokens().token) {
    return problem(403, `Host: ${quote(host)} is neither an address nor localhost`);
  }
  const origin = lower(req.header("origin") ?? `http://${host}`);
  if (origin.replace(/^https?:\/\//, "") !== host) return problem(403, `Origin: ${quote(origin)} is another site`);
  const followed = req.method === "GET" && req.header("sec-fetch-mode") === "navigate"; // a link to a page of ours
  const site = req.header("sec-fetch-site") ?? "none";
  if (site !== "same-origin" && site !== "none" && !followed) return problem(403, "the request is another site's");
  await next();
};

const TRIES = 5; // wrong tokens from one network until it has to wait: a second, two, four, ... and a minute at most
const MOST_PEERS = 1_000; // that are remembered for their wrong tokens
const BEARER_HEADER = /^Bearer +([\w.~+/-]+=*) *$/i; // RFC 6750 section 2.1

/** Asks for a token where there is one; the read token opens GET alone. Who tries wrong ones has to wait. */
function bearer({ effects }: Balancer, tokens: () => Tokens): Gatekeeper {
  const wrong = new Map<string, { count: number; until: number }>();
  const isWrong = (peer: string, network: string) => {
    const count = (wrong.get(network)?.count ?? 0) + 1, wait = count < TRIES ? 0 : Math.min(60, 2 ** (count - TRIES));
    wrong.delete(network); // so that the first is the one that has been quiet for longest
    if (wrong.size >= MOST_PEERS) wrong.delete(wrong.keys().next().value!);
    wrong.set(network, { count, until: effects.now() + wait * 1_000 });
    if (wait) effects.report("warn", `admin: ${peer}: wrong tokens in a row: ${count}`);
  };
  const signed = (text: string) => effects.sign(effects.secret(), text); // so that time tells nothing
  return async ({ req, set, env }, next) => {
    const peer = effects.client(req.raw, env).address, network = clientNetwork(peer), { token, read_token } = tokens();
    set("peer", peer);
    set("shown", "");
    if (!token) return await next();
    const wait = Math.ceil(((wrong.get(network)?.until ?? 0) - effects.now()) / 1_000);
    if (wait > 0) return problem(429, "too many wrong tokens", { "retry-after": `${wait}` });
    const header = req.header("authorization"), given = BEARER_HEADER.exec(header ?? "")?.[1];
    if (header && !given) {
      const why = { "www-authenticate": 'Bearer error="invalid_request"' };
      return problem(400, "Authorization is not a bearer token", why);
    }
    // From the look at the count to here nothing is waited for: of guesses that come at once each is counted.
    const isShown = (known?: string) => !!known && !!given && signed(known) === signed(given);
    const shown = isShown(token) ? "token" : isShown(read_token) ? "read token" : "";
    if (!shown) {
      if (given) isWrong(peer, network);
      const why = { "www-authenticate": given ? 'Bearer error="invalid_token"' : "Bearer" };
      return problem(401, "the right bearer token is needed", why);
    }
    wrong.delete(network);
    set("shown", shown);
    if (shown === "token" || req.method === "GET" || req.method === "HEAD") return await next();
    return problem(403, "the read token may only look");
  };
}

/** What is thrown to say no, as a problem. A config that nothing would be left of is a conflict, and no bad request. */
function refused(error: Error, method: string): Response | undefined {
  if (error instanceof Refused) {
    return problem(error.status, error.message, {}, error.mistakes && { mistakes: error.mistakes });
  }
  if (!(error instanceof ConfigError)) return undefined;
  const { mistakes } = error;
  return problem(method === "DELETE" ? 409 : 400, invalid(mistakes).message, {}, { mistakes });
}
function failed({ effects }: Balancer, error: Error): Response {
  effects.report("error", `admin: ${error.stack ?? error}`);
  return problem(500, "the load balancer has failed");
}

/**
 * The admin API and its pages, to be served, or mounted in an app of your own. Tokens are those of `admin` in the config
 * in force; one that is taken out of it stays in force, for the listener stays open.
 */
export function createAdmin(lb: LoadBalancer, options: AdminOptions = {}): Hono<AdminEnv> {
  const { file, parse = (text: string) => parseConfig(text, {}, file), hosts = [] } = options;
  const { balancer } = lb, app = new Hono<AdminEnv>(), change = changesOf(lb, parse, file);
  const tokens = () => balancer.tokens;
  app.notFound(({ req }) => problem(404, `there is no ${req.path}`));
  app.onError((error, context) => refused(error, context.req.method) ?? failed(balancer, error));
  app.use(async (context, next) => {
    await next();
    for (const [name, value] of Object.entries(ALWAYS)) context.res.headers.set(name, value);
  });
  app.use(methodNotAllowed({
    app,
    onMethodNotAllowed: ({ req }, allowed) => problem(405, `${req.method} ${req.path}`, { allow: allowed.join(", ") }),
  }));
  app.use(sameSite(hosts.map((host) => hostName(host)), tokens));

  const offer = (open: boolean) => {
    for (const [name, operation] of Object.entries(OPERATIONS)) {
      const [method, path] = name.split(" ") as [string, string];
      if (!!operation.open === open) app.on(method, path, (context) => operation.run({ context, lb, parse, change }));
    }
  };

  // For everybody who gets here, without a token: pages must not have anything in them that the API would not tell.
  offer(true);
  app.route("/", docs());
  const gate = bearer(balancer, tokens);
  app.route("/", dashboard(() => snapshotOf(balancer), gate));

  app.use(gate);
  app.use(bodyLimit({ maxSize: MOST.bytes, onError: () => problem(413, "the body is larger than 1 MiB") }));
  offer(false);
  return app;
}

// ---------------------------------------------------------------------------------------------------------------------
// 47. Call: what the command line and the environment ask for.
// ---------------------------------------------------------------------------------------------------------------------

const USAGE = `lb.ts ${VERSION}: a load balancer for HTTP in one file

Usage: lb.ts [options] [routes.yml]

  -c, --config FILE      the configuration              (LB_CONFIG, default routes.yml)
  -l, --listen ADDRESS   instead of listen in the file  (LB_LISTEN)
  -p, --port N           the same, a port only          (LB_PORT)
      --admin ADDRESS    instead of admin.listen, or off  (LB_ADMIN)
      --workers N        threads that share the port, or auto: one for each core  (LB_WORKERS, default 1)
      --reuse-port       share the port with another process, to be replaced by it without a gap
      --log FORMAT       combined, json or off          (LB_LOG)
      --drain TIME       how long requests in flight may take at the end  (default 30s)
  -t, --check            check the file: 0 and one line, or 1 and every mistake with its line
      --print-config     print what is in force, secrets masked
      --explain REQUEST  'GET http://host/path': which route, which service, which servers and why not the others
      --schema           print the JSON Schema of routes.yml
      --demo             start three small servers and balance over them
  -h, --help             print this
      --version          print the version

SIGHUP, or a change of the file, puts the file in force again; SIGTERM and SIGINT drain, and end at once when repeated.
`;

const OPTIONS = {
  "config": { type: "string", short: "c" },
  "listen": { type: "string", short: "l" },
  "port": { type: "string", short: "p" },
  "admin": { type: "string" },
  "workers": { type: "string" },
  "reuse-port": { type: "boolean" },
  "log": { type: "string" },
  "drain": { type: "string" },
  "check": { type: "boolean", short: "t" },
  "print-config": { type: "boolean" },
  "explain": { type: "string" },
  "schema": { type: "boolean" },
  "demo": { type: "boolean" },
  "help": { type: "boolean", short: "h" },
  "version": { type: "boolean" },
} as const;

/** A call of the program that cannot be meant: exit status 2. */
class UsageError extends Error {}
/** What keeps a good config from being served: exit status 1. */
class StartError extends Error {}

/** What the program was asked to do: options, then the environment, then what the file says. */
interface Call {
  options: ReturnType<typeof readOptions>["values"];
  file: string;
  listen: string | undefined;
  admin: string | undefined;
  log: string | undefined;
  workers: number;
  drain: number;
  env: Record<string, string | undefined>;
}

const readOptions = (args: string[]) => parseArgs({ args, options: OPTIONS, allowPositionals: true });

function readCall(args: string[], env: Call["env"]): Call {
  let parsed;
  try {
    parsed = readOptions(args);
  } catch (error) {
    throw new UsageError((error as Error).message);
  }
  const { values, positionals } = parsed;
  if (positionals.length > 1) throw new UsageError(`one file expected, not ${positionals.join(" and ")}`);
  if (values.demo && positionals.length) throw new UsageError(`--demo takes no file: ${positionals[0]}`);
  const drain = v.safeParse(duration(0), values.drain ?? "30s");
  if (!drain.success) throw new UsageError(`--drain: "${values.drain}" is not a duration such as 30s`);
  return {
    options: values,
    file: values.config ?? positionals[0] ?? (env.LB_CONFIG || "routes.yml"), // an empty variable is none
    listen: values.listen ?? values.port ?? (env.LB_LISTEN || env.LB_PORT || undefined),
    admin: values.admin ?? (env.LB_ADMIN || undefined),
    log: values.log ?? (env.LB_LOG || undefined),
    workers: readWorkers(values.workers ?? (env.LB_WORKERS || "1")),
    drain: drain.output,
    env,
  };
}

const MOST_WORKERS = 256;
function readWorkers(text: string): number {
  if (text === "auto") return availableParallelism();
  const count = /^[1-9]\d{0,2}$/.test(text) ? Number(text) : Infinity;
  if (count <= MOST_WORKERS) return count;
  throw new UsageError(`--workers or LB_WORKERS: "${text}" is not auto or a whole number from 1 to ${MOST_WORKERS}`);
}

/** Reads the file, and lays the command line and the environment over it. */
function load(call: Call, text = readText(call.file)): Config {
  const config = parseConfig(text, call.env, call.file);
  if (call.listen !== undefined) {
    const address = v.safeParse(Front, call.listen);
    const from = "--listen, --port, LB_LISTEN or LB_PORT";
    if (!address.success) {
      throw new UsageError(`${from}: "${call.listen}" is not a port, or an address such as 127.0.0.1:8080`);
    }
    config.listen = [address.output];
    config.source.listen = /^\d+$/.test(call.listen) ? Number(call.listen) : call.listen;
  }
  if (call.admin !== undefined) placeAdmin(config, call.admin);
  if (call.log !== undefined) {
    const format = v.safeParse(LogFormat, call.log), { source } = config;
    if (!format.success) throw new UsageError(`--log or LB_LOG: "${call.log}" is not combined, json or off`);
    config.log.format = format.output;
    source.log = isRecord(source.log) ? { ...source.log, format: format.output } : format.output;
  }
  return config;
}

/** Puts the admin listener elsewhere, or nowhere. */
function placeAdmin(config: Config, listen: string): void {
  const source = listen === "off" ? undefined : { ...record(config.source.admin), listen };
  const { success, issues, output } = v.safeParse(v.optional(Admin), source);
  if (!success) {
    throw new UsageError(`--admin or LB_ADMIN: ${issues[0].message.replace(/^\$/, quote(listen))}`);
  }
  Object.assign(config, { admin: output, source: { ...config.source, admin: source } });
}

function readText(file: string): string {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(readFileSync(file)); // else saving would lose bytes
  } catch (error) {
    throw new ConfigError(file, [{
      line: 1,
      column: 1,
      path: "",
      message: `cannot be read: ${(error as Error).message}`,
    }]);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// 48. Listeners: where clients come in. They are opened, kept at what is in force, and drained.
// ---------------------------------------------------------------------------------------------------------------------

/** What a thread, or all of them, listens with. */
interface Seats {
  opened: Map<string, string>; // host:port, by the names of fronts
  /** Takes no more connections, and lets those that are open end. */
  close(): Promise<unknown>;
  /** Ends the work, and gives how much had to be cut off. */
  drain(grace: number): Promise<{ requests: number; connections: number }>;
}

/** What is listened on, by what is spoken there and where. */
type Fronts = Map<string, Front>;
interface Front {
  listener: Promise<Listener>;
  stamp: string; // of the certificates' files, as they are in force
  seen: string; // the same, as they were when last looked at
}
/** How a thread listens. */
interface Post {
  lb: LoadBalancer;
  shared: boolean; // with other threads and processes
  ports: ReadonlyMap<string, number>; // that others have been given, by the names of fronts
  report: Effects["report"];
}

/** Where a table has listeners, by the names that fronts have: what is spoken there, and the address in the file. */
function frontsOf({ config, tcp }: Table): Map<string, FrontConfig> {
  const fronts = new Map<string, FrontConfig>(), secured = ({ tls }: FrontConfig) => tls.length > 0;
  for (const at of config.listen) {
    fronts.set(unique(`${secured(at) ? "https" : "http"}://${shown(at.host, at.port)}`, fronts), at);
  }
  for (const [address, { at }] of tcp) fronts.set(`${secured(at) ? "tls" : "tcp"}://${address}`, at);
  return fronts;
}
const isHttp = (name: string): boolean => name.startsWith("http");

async function openFront({ lb, shared, ports }: Post, name: string, at: FrontConfig): Promise<Listener> {
  const { balancer } = lb, port = ports.get(name) ?? at.port;
  if (isHttp(name)) {
    const porter: Porter = {
      limits: () => balancer.table.config.limits,
      letIn(socket) {
        const refusal = letIn(balancer, socket);
        if (refusal) countFailure(balancer, refusal);
        return refusal;
      },
    };
    return await openListener((request, env) => lb.fetch(request, env), { ...at, port, porter }, shared);
  }
  if (at.tls.length) secureOf(at, false);
  return await openTcp(balancer, name.slice(name.indexOf("//") + 2), shared, port);
}

/**
 * Opens and closes listeners until they are those of the table in force. Connections that are open stay so. Gives the
 * addresses of what was opened, by name, and what went wrong.
 */
async function tend(post: Post, fronts: Fronts): Promise<[opened: Map<string, string>, problems: string[]]> {
  const wanted = frontsOf(post.lb.balancer.table);
  for (const [name, { listener }] of fronts) {
    if (wanted.has(name)) continue;
    fronts.delete(name);
    listener.then((one) => one.close(), () => {});
  }
  const fresh = [...wanted].filter(([name]) => !fronts.has(name));
  const done = await Promise.all(fresh.map(async ([name, at]) => {
    const stamp = stampOf(at), listener = openFront(post, name, at);
    fronts.set(name, { listener, stamp, seen: stamp });
    try {
      return [name, (await listener).address] as const;
    } catch (error) {
      fronts.delete(name); // the next reload tries again
      return (error as Error).message;
    }
  }));
  return [new Map(done.filter((one) => typeof one !== "string")), done.filter((one) => typeof one === "string")];
}

const sayOpened = (opened: Map<string, string>, report: Effects["report"]): void =>
  opened.forEach((address, name) => {
    report("info", `lb.ts ${VERSION} listening on ${name.slice(0, name.indexOf(":"))}://${address}`);
  });

/** Puts certificates in force that have changed on disk, or by another config, and stood still since the last look. */
function renewAll({ lb: { balancer: { table, effects } }, report }: Post, fronts: Fronts): void {
  for (const [name, at] of frontsOf(table)) {
    const front = fronts.get(name), stamp = stampOf(at), still = front?.seen === stamp;
    if (!front) continue;
    front.seen = stamp;
    if (!still || front.stamp === stamp) continue;
    front.stamp = stamp;
    void renew(name, front, at, report, effects.date());
  }
}

async function renew(name: string, { listener }: Front, at: FrontConfig, report: Effects["report"], now: Date) {
  try {
    (await listener).swap?.(secureOf(at, isHttp(name)));
    report("info", `${name}: other certificates are in force`);
    for (const one of outdated(at, now)) report("error", `${name}: ${one}`);
  } catch (error) {
    report("error", `${name}: the old certificates stay in force: ${(error as Error).message}`);
  }
}

const FOLLOW_TICK = 100; // milliseconds between two looks at whether another table is in force
const RENEW_TICK = 500; // milliseconds between two looks at the files of certificates

/** Opens the listeners of a balancer, and keeps them, and their certificates, at what is in force. */
async function listenAll(post: Post): Promise<Seats> {
  const { lb: { balancer }, report } = post, fronts: Fronts = new Map();
  const [opened, problems] = await tend(post, fronts);
  if (problems.length) throw new StartError(problems.join("\n"));
  let { table } = balancer, failed = "", said = "";
  const following = setInterval(async () => {
    const changed = table !== balancer.table; // by the file or by an operator
    if (!changed && !failed) return;
    if (changed) [table, said] = [balancer.table, ""];
    const [opened, problems] = await tend(post, fronts), before = failed;
    failed = problems.join("\n"); // and is tried again: the port may be that of a listener that is just being closed
    sayOpened(opened, report);
    if (failed === before && failed !== said) report("error", said = failed);
  }, FOLLOW_TICK);
  const renewing = setInterval(() => renewAll(post, fronts), RENEW_TICK);
  const close = (tcp: boolean) => {
    for (const timer of [following, renewing]) clearInterval(timer);
    const some = [...fronts].filter(([name]) => isHttp(name) !== tcp);
    return Promise.all(some.map(async ([, { listener }]) => (await listener).close(balancer.tunnels)));
  };
  return {
    opened,
    close: () => Promise.all([close(true), close(false)]),
    drain(grace) {
      const closed = close(true);
      return drain(balancer, () => Promise.all([closed, close(false)]), grace);
    },
  };
}

type Handler = (request: Request, env: object) => ReturnType<Serve>;
type Address = Pick<FrontConfig, "host" | "port"> & Partial<FrontConfig> & { porter?: Porter };
async function openListener(fetch: Handler, at: Address, shared = false): Promise<Listener> {
  const { host, port, tls = [], client_ca = "", porter } = at;
  try {
    const secure = tls.length ? secureOf({ tls, client_ca }, true) : undefined;
    const serve = (request: Request, env: unknown) => fetch(request, env as object);
    return await runtimes[here].serve(serve, host, port, shared, secure, porter);
  } catch (error) {
    return cannotListen(host, port)(error as Error);
  }
}
const cannotListen = (host: string, port: number) => (error: Error): never => {
  throw new StartError(`cannot listen on ${shown(host, port)}: ${error.message}`);
};

const LINGER = 1_000; // milliseconds at most for which clients are asked to come on another connection
const QUIET = 200; // milliseconds without a request after which none is expected

/**
 * Ends the work of a thread: clients are told with each answer to close their connections, then the listeners close, what
 * is in flight finishes, and tunnels and relays are ended.
 */
async function drain(balancer: Balancer, close: Seats["close"], grace: number): ReturnType<Seats["drain"]> {
  const { effects, tunnels, relays } = balancer, begun = effects.now(), end = begun + grace;
  const until = async (time: number, over: () => boolean) => {
    while (!over() && effects.now() < time) await effects.sleep(20);
  };
  balancer.draining = true;
  let [seen, since] = [balancer.requests, begun];
  await until(Math.min(begun + LINGER, end), () => {
    if (seen !== balancer.requests) [seen, since] = [balancer.requests, effects.now()];
    return effects.now() >= since + QUIET;
  });
  const closed = close();
  await until(end, () => balancer.inFlight === 0);
  const connections = relays.size;
  for (const tunnel of tunnels) closeTunnel(tunnel, GOING_AWAY);
  for (const end of relays) end();
  await until(effects.now() + 1_000, () => tunnels.size + relays.size === 0);
  await Promise.race([closed, effects.sleep(Math.min(500, Math.max(0, end - effects.now())))]);
  await effects.sleep(50); // for the last lines of the log
  return { requests: balancer.inFlight, connections };
}

// ---------------------------------------------------------------------------------------------------------------------
// 49. Workers: many cores. One main thread decides, and threads that share the port serve.
// ---------------------------------------------------------------------------------------------------------------------

const WORKER = "lb.ts worker";
/** What a worker has to know when it starts. All of it can be copied from thread to thread. */
interface Task {
  role: typeof WORKER; // somebody else's threads may have imported this file
  config: Raw; // in force, as it is spelt out
  file: string; // its name
  ports: ReadonlyMap<string, number>; // that the first worker was given, by the names of fronts
  speaks: boolean; // for all: it reports what each of them finds
  workers: number; // that divide the limits
  secret: string; // of sticky cookies
  down: [service: string, url: string][]; // what probes have found so far
}
/** What the main thread says to its workers. */
type Order =
  | { kind: "config"; config: Raw }
  | { kind: "probed"; service: string; url: string; problem: string | undefined }
  | { kind: "told"; service: string; url: string; up: boolean }
  | { kind: "drain"; grace: number };
/** What a worker says. */
type Word =
  | { kind: "listening"; opened: Seats["opened"] }
  | { kind: "applied" }
  | { kind: "failed"; reason: string }
  | { kind: "lines"; lines: Uint8Array<ArrayBuffer> }
  | { kind: "report"; level: "info" | "warn" | "error"; text: string }
  | { kind: "counts"; counts: Counts }
  | { kind: "drained"; left: Awaited<ReturnType<Seats["drain"]>> };

/** Limits that hold for all workers together: each has its part. Rates and budgets are each worker's own (README). */
function divided(config: Config, workers: number): Config {
  const part = (limit: number) => Number.isFinite(limit) ? Math.ceil(limit / workers) : limit;
  for (const service of config.services.values()) {
    if (typeof service.max_in_flight === "number") service.max_in_flight = part(service.max_in_flight);
    for (const server of service.servers) server.max = part(server.max);
  }
  return config;
}

const COUNTING = 200; // milliseconds between two times that a worker says what it has counted

/** What a worker has counted, by names that its main thread has too. */
const countsOf = ({ table, requests, inFlight, entrypoints, failures, effects }: Balancer) => ({
  ...{ requests, inFlight, failures },
  entrypoints: new Map([...entrypoints].map(([name, { inFlight, tallies }]) => [name, { inFlight, tallies }])),
  services: new Map([...table.services].map(([name, service]) => {
    const { turn, inFlight, retrying, retries, hedges, hedgesWon, copies, tallies, waiting } = service;
    const servers = new Map(service.servers.map((server) => {
      const { url, inFlight, picks, answers, retries, ejected, counters, latency, until } = server;
      const { failures, failing, limit } = server;
      const more = { spent: latency * answers, ejectedFor: Math.max(0, until - effects.now()) };
      return [url, { inFlight, picks, answers, retries, ejected, counters, failures, failing, limit, ...more }];
    }));
    const own = { turn, inFlight, retrying, retries, hedges, hedgesWon, copies, tallies };
    return [name, { ...own, queued: waiting.size, panicked: Number(service.panicking), servers }];
  })),
});
type Counts = ReturnType<typeof countsOf>;

/** Puts numbers together, and what holds numbers, place by place. */
function summed<T>(one: T, other: T, how: (a: number, b: number, name: string) => number, name = ""): T {
  const inside = (a: unknown, b: unknown, key: unknown) => b === undefined ? a : summed(a, b, how, String(key));
  if (typeof one === "number") return how(one, other as number, name) as T;
  if (one instanceof Map) {
    const rest = [...other as Map<unknown, unknown>].filter(([key]) => !one.has(key));
    return new Map([
      ...[...one].map(([key, a]) => [key, inside(a, (other as typeof one).get(key), key)] as const),
      ...rest,
    ]) as T;
  }
  if (Array.isArray(one)) return one.map((a, i) => inside(a, (other as unknown[])[i], i)) as T;
  return Object.fromEntries(
    Object.entries(one as Raw).map(([key, a]) => [key, inside(a, (other as Raw)[key], key)]),
  ) as T;
}
/** What is as bad as where it is worst; all else adds up. */
const WORST = new Set(["ejectedFor", "panicked", "failures", "failing"]);
const added = (a: number, b: number, name: string): number => WORST.has(name) ? Math.max(a, b) : a + b;
const MOMENTARY = new Set([...WORST, "inFlight", "retrying", "queued", "limit"]);
/** What stays of the counts of a worker that has ended. */
const finalCounts = (counts: Counts): Counts => summed(counts, counts, (a, _, name) => MOMENTARY.has(name) ? 0 : a);

/** Writes what the workers have counted into the main thread's records, so that all who look there see it. */
function showCounts(balancer: Balancer, { services, entrypoints, ...own }: Counts): void {
  Object.assign(balancer, own);
  for (const [name, counts] of entrypoints) Object.assign(entry(balancer.entrypoints, name, newEntrypoint), counts);
  for (const service of balancer.table.services.values()) {
    const { servers, queued = 0, panicked = 0, ...counts } = services.get(service.name) ?? {};
    Object.assign(service, counts, {
      panicking: panicked > 0,
      waiting: new Set(Array.from({ length: queued }, () => () => false)),
    });
    for (const server of service.servers) {
      const { spent = 0, ejectedFor = 0, answers = 0, ...counts } = servers?.get(server.url) ?? {};
      const now = balancer.effects.now(), until = ejectedFor && now + ejectedFor;
      if (!until !== !server.until) server.since = now;
      Object.assign(server, counts, { answers, until, latency: spent / (answers || 1) });
    }
  }
}

/** A worker's whole life: it serves, and does what the main thread says. */
async function work({ config, file, ports, speaks, workers, secret, down }: Task): Promise<void> {
  const say = (word: Word): undefined => void parentPort!.postMessage(word); // Node's gives true
  const sayLines = (lines: Uint8Array) => say({ kind: "lines", lines: lines.slice() }); // a view would take all of its buffer along
  const read = (source: Raw) => divided(expand(source, "", file), workers);
  const report: Effects["report"] = (level, text) => say({ kind: "report", level, text });
  const log = accessLog((lines) => {
    sayLines(lines);
    return Promise.resolve(lines.length);
  }, report);
  const lb = createLoadBalancer(read(config), { write: log.write, report, secret: () => secret });
  const { balancer } = lb, { effects } = balancer;
  process.on("uncaughtException", (error) => effects.report("error", `internal: ${error.stack ?? error}`)); // serve on
  const found = (service: string, url: string) => {
    const known = balancer.table.services.get(service);
    return [known!, known?.servers.find((server) => server.url === url)] as const;
  };
  for (const [name, url] of down) {
    const [, server] = found(name, url);
    if (server) server.up = false;
  }
  const post = { lb, shared: true, ports, report: speaks ? effects.report : () => {} };
  const seats = await listenAll(post).catch((error) => say({ kind: "failed", reason: error.message }));
  if (!seats) return;
  parentPort!.on("message", async (order: Order) => {
    if (order.kind === "config") {
      lb.reload(read(order.config));
      say({ kind: "counts", counts: countsOf(balancer) }); // what is in flight where nothing new goes any more
      say({ kind: "applied" });
    } else if (order.kind === "told") {
      const [service, server] = found(order.service, order.url);
      if (server) onTold(service, server, order.up, effects);
    } else if (order.kind === "probed") {
      const [service, server] = found(order.service, order.url);
      if (!server) return;
      onProbed(service, server, order.problem, { ...effects, report: () => {} }); // the main thread has said it
      server.probesPassed = server.probesFailed = 0; // it has counted them, too
    } else {
      const left = await seats.drain(order.grace);
      sayLines(log.rest());
      say({ kind: "drained", left });
    }
  });
  let seen = -1;
  setInterval(() => {
    const { requests, inFlight } = balancer;
    if (seen !== requests) say({ kind: "counts", counts: countsOf(balancer) });
    seen = inFlight > 0 ? -1 : requests;
  }, COUNTING);
  say({ kind: "listening", opened: seats.opened });
}

const APPLYING = 5_000; // milliseconds that a worker may take to put a config in force before it is not waited for
const COME_BACK = 500; // milliseconds until a worker that has died is replaced

/** The next word of a kind that a worker says; undefined when it takes too long, or dies. */
const nextWord = <K extends Word["kind"]>(worker: Worker, kind: K, patience: number) =>
  new Promise<Extract<Word, { kind: K }> | undefined>((resolve) => {
    const end = (word?: Word) => {
      clearTimeout(timer);
      worker.off("message", hear).off("exit", end);
      resolve(typeof word === "object" ? word as Extract<Word, { kind: K }> : undefined);
    };
    const hear = (word: Word) => word.kind === kind && end(word);
    const timer = setTimeout(end, patience);
    worker.on("message", hear).on("exit", end);
  });

/** What is changed or found here, the workers hear at once; a config is waited for until all of them have it. */
function passOn(lb: LoadBalancer, workers: Map<Worker, unknown>, show: () => void): void {
  const { balancer } = lb, { effects } = balancer, { reload } = lb;
  const tell = (order: Order) => workers.forEach((_, worker) => worker.postMessage(order));
  lb.reload = (config) => {
    reload(config);
    const applied = [...workers.keys()].map((worker) => nextWord(worker, "applied", APPLYING));
    tell({ kind: "config", config: balancer.table.config.source });
    show();
    return Promise.all(applied);
  };
  effects.told = ({ name }, { url }, up) => tell({ kind: "told", service: name, url, up });
  effects.probed = ({ name }, { url }, problem) => tell({ kind: "probed", service: name, url, problem });
}

/** What a worker needs at its start. */
function taskOf(
  { table: { config, services }, effects }: Balancer,
  more: Pick<Task, "ports" | "speaks" | "workers">,
): Task {
  const down = [...services.values()].flatMap(({ name, servers }) =>
    servers.filter(({ up }) => !up).map(({ url }): [string, string] => [name, url])
  );
  const known = { config: config.source, file: config.file, secret: effects.secret(), down };
  return { role: WORKER, ...known, ...more };
}

/** Starts the workers, one after the other, and keeps as many. */
async function startFleet(lb: LoadBalancer, count: number, log: AccessLog): Promise<Seats> {
  const { balancer } = lb, { effects } = balancer;
  const workers = new Map<Worker, Counts | undefined>();
  const tell = (order: Order) => workers.forEach((_, worker) => worker.postMessage(order));
  let [id, speaker, gone]: [number, number, Counts | undefined] = [0, 0, undefined];
  let ports = new Map<string, number>();
  const together = (one: Counts | undefined, other: Counts | undefined) =>
    one && other ? summed(one, other, added) : one ?? other;
  const show = () => {
    const total = [...workers.values()].reduce(together, gone);
    if (total) showCounts(balancer, total);
  };
  const start = async (): Promise<Seats["opened"]> => {
    const own = ++id;
    speaker ||= own;
    const task = taskOf(balancer, { ports, speaks: speaker === own, workers: count });
    const worker = new Worker(new URL(import.meta.url), { workerData: task });
    let failed = "it was ended";
    worker.on("message", (word: Word) => {
      if (word.kind === "lines") log.append(word.lines);
      if (word.kind === "counts" && workers.has(worker)) workers.set(worker, word.counts), show();
      if (word.kind === "report") effects.report(word.level, word.text);
      if (word.kind === "failed") failed = word.reason, void worker.terminate();
    });
    worker.on("error", (error: Error) => failed = String(error));
    worker.on("exit", () => {
      if (speaker === own) speaker = 0;
      const counts = workers.get(worker);
      gone = together(gone, counts && finalCounts(counts));
      balancer.workers.delete(own);
      if (workers.delete(worker)) replace(failed);
    });
    const heard = await nextWord(worker, "listening", 30_000);
    if (!heard) await worker.terminate();
    if (!heard) throw new StartError(failed);
    workers.set(worker, undefined);
    balancer.workers.set(own, { since: effects.date(), end: () => void worker.terminate() });
    worker.postMessage({ kind: "config", config: balancer.table.config.source } satisfies Order); // it may be another
    return heard.opened;
  };
  const replace = (reason: string) => {
    if (balancer.draining) return;
    effects.report("error", `a worker has ended and is replaced: ${reason}`);
    setTimeout(() => start().catch((error) => replace(error.message)), COME_BACK);
  };
  const opened = await start();
  ports = new Map([...opened].map(([name, address]) => [name, Number(/\d+$/.exec(address))]));
  for (let i = 1; i < count; i++) await start();
  passOn(lb, workers, show);
  return {
    opened,
    close: () => Promise.resolve(tell({ kind: "drain", grace: 0 })),
    async drain(grace) {
      const drained = [...workers.keys()].map((worker) => nextWord(worker, "drained", grace + 2 * LINGER));
      tell({ kind: "drain", grace });
      const left = (await Promise.all(drained)).flatMap((word) => word?.left ?? []);
      return left.reduce((sum, one) => summed(sum, one, added), { requests: 0, connections: 0 });
    },
  };
}

// ---------------------------------------------------------------------------------------------------------------------
// 50. Main: as a program.
// ---------------------------------------------------------------------------------------------------------------------

/** The same as text, for a balancer that has just started. */
function explained(config: Config, text: string): string {
  const [, method = "GET", url = ""] = /^(?:([A-Z]+) )?(https?:\/\/\S+)$/.exec(text.trim()) ?? [];
  if (!URL.canParse(url)) throw new UsageError(`--explain: "${text}" is not a request such as 'GET http://host/path'`);
  const found = explain(createLoadBalancer(config).balancer, method, url);
  if ("failure" in found) {
    const allow = found.allow ? `; allowed: ${found.allow.join(", ")}` : "";
    return `no route: ${found.status}, ${found.text} (x-lb-failure: ${found.failure})${allow}`;
  }
  if ("status" in found) return `route    ${found.route}\nanswer   ${found.action} ${found.status}`;
  return [
    `route    ${found.route}`,
    ...found.restricted ? ["clients  only those that allow and deny admit"] : [],
    `target   ${found.target}`,
    ...found.copies ? [`copies   ${found.copies}`] : [],
    ...found.services.flatMap(({ service, weight, fallback, strategy, servers }) => [
      `service  ${service}${
        fallback ? " (fallback)" : weight < found.weight ? ` (${weight} of ${found.weight})` : ""
      }: ${strategy}`,
      ...servers.map(({ server, asked, why, score, limit }) =>
        `server   ${server}: ${asked ? "may be asked" : "is not asked"}${why ? `: ${why}` : ""}${
          score === undefined ? "" : `; score ${score}`
        }${limit === undefined ? "" : `; at most ${limit} in flight`}`
      ),
    ]),
  ].join("\n");
}

/** Three small servers inside this process, and a config that balances over them. */
async function demo(): Promise<string> {
  const open = (name: string) =>
    runtimes[here].serve(
      (request) => new Response(`hello from ${name}: ${request.method} ${new URL(request.url).pathname}\n`),
      "127.0.0.1",
      0,
      false,
    );
  const servers = await Promise.all(["one", "two", "three"].map(open));
  return `services: {demo: {servers: [${
    servers.map(({ address }) => `"${address}"`).join(", ")
  }]}}\ndefault: {service: demo}\n`;
}

/** Runs until a signal ends it. */
async function run(call: Call): Promise<void> {
  const text = call.options.demo ? await demo() : undefined;
  let inForce = fileStamp(call.file), seen = inForce; // before it is read, so that no change after that is missed
  const config = load(call, text);
  const log = accessLog(runtimes[here].print, defaultEffects().report);
  const lb = createLoadBalancer(config, { write: log.write });
  const { effects } = lb.balancer;
  process.on("exit", () => printAtLast(log.rest()));
  const opening = takeSeats(lb, call, log);
  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    process.on(signal, () => void quit(lb, opening, call.drain, log));
  }
  const seats = await opening;
  if (config.admin) {
    const file = text === undefined ? { file: call.file } : {};
    const admin = createAdmin(lb, { ...file, parse: (text) => load(call, text) });
    const { address } = await openListener((request, env) => admin.fetch(request, env), config.admin.listen);
    effects.report("info", `admin on http://${address}`);
  }
  setInterval(() => void lb.probe(), PROBE_TICK);
  const reload = () => again(call, lb);
  if (text === undefined) {
    process.on("SIGHUP", reload);
    setInterval(() => {
      const still = seen === (seen = fileStamp(call.file)); // nobody is still writing it
      if (still && inForce !== (inForce = seen) && !isInForce(call.file, lb)) reload();
    }, WATCH_TICK);
  }
  process.stderr.on("error", () => {}); // nobody reads it any more: reporting that would go round in circles
  process.on("uncaughtException", (error) => effects.report("error", `internal: ${error.stack ?? error}`)); // serve on
  sayOpened(seats.opened, effects.report);
  if (call.workers > 1) effects.report("info", `workers: ${call.workers}`);
  announce(lb);
}

/** What is printed while the process ends, when nothing can be waited for. */
function printAtLast(bytes: Uint8Array): void {
  try {
    if (bytes.length) writeSync(1, bytes);
  } catch { /* nobody reads it */ }
}

/** Opens the listeners: here, or in workers. That the port is nobody else's is tried first, as workers share it. */
async function takeSeats(lb: LoadBalancer, call: Call, log: AccessLog): Promise<Seats> {
  const shared = call.options["reuse-port"] ?? false, { report } = lb.balancer.effects;
  const here = (shared: boolean) => listenAll({ lb, shared, ports: new Map(), report });
  if (call.workers === 1) return await here(shared);
  const fronts = shared ? [] : [...frontsOf(lb.balancer.table).values()];
  await Promise.all(fronts.map(({ host, port }) => unused(host, port).catch(cannotListen(host, port))));
  return await startFleet(lb, call.workers, log);
}

/** The end after a signal; a second one ends at once. */
async function quit({ balancer }: LoadBalancer, opening: Promise<Seats>, grace: number, log: AccessLog): Promise<void> {
  const { effects } = balancer, until = effects.now() + grace;
  if (balancer.draining) process.exit(1);
  balancer.draining = true;
  effects.report("info", `draining; requests in flight: ${balancer.inFlight}`);
  const seats = await opening, left = await seats.drain(grace);
  const words = [
    ...left.requests ? [`; requests cut off: ${left.requests}`] : [],
    ...left.connections ? [`; connections ended: ${left.connections}`] : [],
  ];
  effects.report("info", `drained${words.join("")}`);
  await log.end(until - effects.now());
  process.exit(0);
}

/** Whether a file says what is in force: what the admin API has saved is. */
function isInForce(file: string, { balancer: { table, reloadFailed } }: LoadBalancer): boolean {
  try {
    return !reloadFailed && readText(file) === table.config.text;
  } catch {
    return false;
  }
}

const WATCH_TICK = 500; // milliseconds between two looks at the file
const PROBE_TICK = 100; // milliseconds between two looks at which probes are due

/** Says what is balanced, and which files that are named cannot be used. */
function announce({ balancer: { table, effects } }: LoadBalancer): void {
  for (const problem of problemsOf(table.config, effects.date())) effects.report("error", problem);
  const services = [...table.services.values()];
  for (const { name, servers, config } of services.slice(0, 20)) {
    effects.report("info", `${name}: ${config.strategy.name} over ${servers.map((server) => server.name).join(", ")}`);
  }
  if (services.length > 20) effects.report("info", `and ${services.length - 20} more services`);
}

/** Reads the file again. A file that cannot be used changes nothing. */
function again(call: Call, lb: LoadBalancer): void {
  const { effects, table } = lb.balancer;
  try {
    const config = load(call);
    lb.reload(config);
    effects.report("info", `${call.file} is in force again`);
    if (needsRestart(config, table.config)) effects.report("warn", NEEDS_RESTART);
    announce(lb);
  } catch (error) {
    lb.balancer.reloadFailed = true;
    effects.report("error", `the old config stays in force:\n${(error as Error).message}`);
  }
}

/** The program. Gives an exit status, or undefined while it runs on. */
async function main(args: string[], env: Call["env"]): Promise<number | undefined> {
  try {
    const call = readCall(args, env);
    const { options } = call;
    if (options.help) return print(USAGE);
    if (options.version) return print(VERSION);
    if (options.schema) return print(JSON.stringify(jsonSchema(), null, 2));
    if (options.check) return print(checked(call));
    if (options["print-config"]) return print(printConfig(load(call)));
    if (options.explain !== undefined) return print(explained(load(call), options.explain));
    await run(call);
  } catch (error) {
    if (![UsageError, ConfigError, StartError, Refused].some((known) => error instanceof known)) throw error;
    console.error((error as Error).message);
    if (error instanceof UsageError) console.error("lb.ts --help lists the options");
    return error instanceof UsageError ? 2 : 1;
  }
}

/** @throws {StartError} with what is wrong with other files than routes.yml */
function checked(call: Call): string {
  const config = load(call), problems = problemsOf(config, new Date());
  if (problems.length) throw new StartError(problems.map((one) => `${call.file}: ${one}`).join("\n"));
  return `${call.file} is fine: ${summary(config)}`;
}

const summary = ({ services, routes }: Config): string => `services: ${services.size}, routes: ${routes.length}`;

function print(text: string): number {
  console.log(text.trimEnd());
  return 0;
}

const NOT_AT_THE_EDGE = ["listen", "admin", "tcp"]; // keys of the file

/** The balancer of the edge. What cannot be there is left out, and said in one line, so that one file serves both. */
function makeAtTheEdge(): LoadBalancer {
  const text = readFileSync("/bundle/routes.yml", "utf8"); // it lies beside the bundle
  const config = parseConfig(text, process.env);
  const services = [...config.services.values()];
  for (const service of services) {
    if (service.health.kind === "tcp") service.health = { ...service.health, kind: "off" }; // passive only
  }
  const lb = createLoadBalancer(config);
  const file = parseDocument(text);
  const left = NOT_AT_THE_EDGE.filter((key) => file.has(key));
  if (services.some(({ tls }) => Object.values(tls).some(Boolean))) left.push("tls of servers");
  const { report } = lb.balancer.effects;
  if (left.length) report("info", `left out of routes.yml, as the platform does it: ${left.join(", ")}`);
  return lb;
}

/** Everything is made with the first request, since nothing may run before. Probes go beside requests, and by cron. */
function edge() {
  let made: LoadBalancer | undefined;
  const lb = () => made ??= makeAtTheEdge();
  return {
    fetch(request: Request, env: unknown, context: { waitUntil(promise: Promise<unknown>): void }) {
      const answer = Promise.resolve(lb().fetch(request, env as object));
      const behind = answer.then(() => goingOn.get(request));
      context.waitUntil(Promise.all([answer, behind, lb().probe()])); // else a client that leaves would stay in flight for ever
      return answer;
    },
    scheduled: () => lb().probe(),
  };
}

if (!isMainThread && (workerData as Task | null)?.role === WORKER) await work(workerData as Task);
else if (import.meta.main) {
  const status = await main(process.argv.slice(2), process.env);
  if (status) process.exit(status); // listeners that are open already would keep it running
}

export default here === "edge" ? edge() : undefined;
