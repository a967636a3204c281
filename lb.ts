/**
 * lb.ts: a load balancer for HTTP in one file, the same on Deno, Bun, Node and at the edge.
 *
 *     deno run -A lb.ts [routes.yml]      bun lb.ts      node lb.ts      wrangler deploy
 *
 * As a library: `createLoadBalancer(parseConfig(text))` is a Hono app; serve it, mount it, wrap it.
 *
 * The life of a request, in the functions of section 8.5:
 *
 *     validate -> match -> pick -> forward -> account -> (retry, minus those tried) -> respond
 *
 * Each section uses only the sections above it:
 *
 *      1 Configuration     value types, services, routes and listeners, YAML, checks and defaults
 *      2 Records           failures, messages, services and routes, exchanges and attempts, balancer and
 *                          effects
 *      3 HTTP              parser, sockets, tunnels, server, client, HTTP/2, versions, fetch
 *      4 Routing           validation, matching and rewriting
 *      5 Load balancing    strategies, eligibility, outlier detection, health checks, sticky sessions
 *      6 Traffic control   limits and queue, retries, hedging
 *      7 Observability     traces, access log, metrics
 *      8 Request path      local replies, proxy headers, attempts, hedged and mirrored attempts, balance
 *      9 TCP proxy         connections that are not HTTP
 *     10 Assembly          the table of a config, and the state carried over a reload
 *     11 Admin             views, explain, config edits, endpoints, API description, dashboard, access
 *     12 Fleet and discovery  engine, fleet, discovery, Durable Object
 *     13 Program           TLS, runtimes, library, command line, listeners, workers, main, edge
 *
 * @module
 */

import { createHash, createHmac, createPrivateKey, randomBytes, X509Certificate } from "node:crypto";
import type { RecordWithTtl, SrvRecord } from "node:dns";
import { lookup as lookupName, Resolver } from "node:dns/promises";
import * as fs from "node:fs";
import { STATUS_CODES } from "node:http";
import {
  type AddressInfo,
  connect as netConnect,
  createServer,
  isIP,
  type NetConnectOpts,
  type Socket,
  Socket as NetSocket,
  type SocketConstructorOpts,
} from "node:net";
import process from "node:process";
import {
  connect as tlsConnect,
  createSecureContext,
  createServer as createTlsServer,
  type Server as TlsServer,
  type TlsOptions,
  type TLSSocket,
} from "node:tls";
import { availableParallelism, hostname } from "node:os";
import { Duplex } from "node:stream";
import { isDeepStrictEqual, parseArgs, promisify } from "node:util";
import { isMainThread, parentPort, Worker, workerData } from "node:worker_threads";
import { constants as zlib, createGzip } from "node:zlib";
import { distance } from "fastest-levenshtein";
import { type Context, Hono, type HonoRequest, type MiddlewareHandler } from "hono";
import { bearerAuth } from "hono/bearer-auth";
import { bodyLimit } from "hono/body-limit";
import { cors } from "hono/cors";
import { html, raw } from "hono/html";
import { HTTPException } from "hono/http-exception";
import { methodNotAllowed } from "hono/method-not-allowed";
import { basePath } from "hono/route";
import { secureHeaders } from "hono/secure-headers";
import { streamSSE } from "hono/streaming";
import { parseAccept } from "hono/utils/accept";
import { COMPRESSIBLE_CONTENT_TYPE_REGEX } from "hono/utils/compress";
import { parse as parseCookie } from "hono/utils/cookie";
import type { ContentfulStatusCode } from "hono/utils/http-status";
import ipaddr from "ipaddr.js";
import { RE2JS, type RE2JSSyntaxException } from "re2js";
import * as v from "valibot";
import {
  type Document,
  isAlias,
  isCollection,
  isMap,
  isScalar,
  isSeq,
  LineCounter,
  type Node,
  type Pair as YamlPair,
  parseDocument,
  type Scalar,
  type ScalarTag,
  stringify,
  visit,
  type YAMLSeq,
} from "yaml";

// -----------------------------------------------------------------------------------------------------------
// 1. Configuration
// What routes.yml may say, and what comes of it. One schema gives types, defaults, bounds, messages, the JSON
// Schema and the reference. A file is parsed once and validated once; every mistake is reported with its place.
// -----------------------------------------------------------------------------------------------------------

// --- 1.1 Value types: durations, sizes, names, addresses, and how schemas are put together ---

type Schema = v.GenericSchema;
type Out<S extends Schema> = v.InferOutput<S>;
type Raw = Record<string, unknown>;
type Keys = (string | number)[];

const isRecord = (value: unknown): value is Raw => typeof value === "object" && value !== null && !Array.isArray(value);
const mapOf = (value: unknown): Raw => isRecord(value) ? value : {};
const isTrue = (value: unknown): boolean => /^true$/i.test(String(value));
/** The entries of a record whose keys `keys` has, or has not. No key is special, not even `__proto__`. */
const pickKeys = (from: Raw, keys: object, has = true): Raw =>
  Object.fromEntries(Object.entries(from).filter(([key]) => Object.hasOwn(keys, key) === has));
const mapValues = (values: Raw, change: (value: unknown, key: string) => unknown): Raw =>
  Object.fromEntries(Object.entries(values).map(([key, value]) => [key, change(value, key)]));

/** The value under `key`, made first where there is none. */
function getOrMake<K extends WeakKey | string | number, V>(
  values: { get(key: K): V | undefined; set(key: K, value: V): unknown },
  key: K,
  make: (key: K) => V,
): V {
  let value = values.get(key);
  if (value === undefined) values.set(key, value = make(key));
  return value;
}

// A message that begins with $ begins with the value: `"5 sec" is not a duration` (see `reportIssue`).
const UNKNOWN_KEY = "unknown key", MISSING = "is missing";

/** What the functions below add to a schema of valibot, for `longForm` and `jsonOf`. */
interface Parts {
  json?: Raw; // what JSON Schema says of it, where that is more than its type
  about?: string; // a key's description
  entries?: Record<string, Schema>; // of a map with known keys
  oneOf?: string[]; // exactly one of these keys is there
  values?: Schema; // of a map with free keys
  short?: Schema; // what may stand in its place
  long?(value: unknown): unknown; // what `short` stands for
  // valibot's own
  type: string;
  message: string;
  literal?: string | boolean;
  wrapped?: Schema;
  default?: unknown;
  options?: Schema[];
  item?: Schema;
  least?: number; // items of a list
}
const partsOf = (schema: Schema): Parts => schema as unknown as Parts;
const withParts = <S extends Schema, P extends Partial<Parts>>(schema: S, parts: P): S & P =>
  Object.assign(schema, parts);

const mayBeAbsent = (schema: Schema): boolean => /optional$/.test(partsOf(schema).type); // or exact_optional

type AddIssue = (info: { message: string; input?: unknown; path: [v.ObjectPathItem, ...v.IssuePathItem[]] }) => void;
const pathItem = (origin: "key" | "value", input: Raw, key: string): v.ObjectPathItem => {
  return { type: "object", origin, input, key, value: input[key] };
};
/** Reads the value of a key; its mistakes get the key in front of their paths. */
function readKey(schema: Schema, input: Raw, key: string, addIssue: AddIssue): unknown {
  const { issues, output } = v.safeParse(schema, Object.hasOwn(input, key) ? input[key] : undefined);
  for (const issue of issues ?? []) addIssue({ ...issue, path: [pathItem("value", input, key), ...issue.path ?? []] });
  return output;
}

/** A key of a map with its default, as one would write it. */
const exampleOf = (entries: v.ObjectEntries): string => {
  const [name, value] = Object.entries(entries).map(([key, schema]) => [key, partsOf(schema).default])
    .find(([, usual]) => usual && typeof usual !== "object") ?? [Object.keys(entries)[0], "..."];
  return `{ ${name}: ${value} }`;
};
type OutOf<E extends v.ObjectEntries> = Out<v.ObjectSchema<E, undefined>>;
/** A map with known keys. Unlike valibot's own it takes no list, reports every unknown key, and knows no special one. */
const map = <const E extends v.ObjectEntries>(entries: E, example: string = exampleOf(entries)) => {
  const read = v.rawTransform<Raw, OutOf<E>>(({ dataset: { value: input }, addIssue }) => {
    const say = addIssue as AddIssue, out: Raw = {};
    for (const [key, schema] of Object.entries(entries)) {
      const { default: usual } = partsOf(schema), isThere = Object.hasOwn(input, key);
      if (!isThere && !mayBeAbsent(schema)) say({ message: MISSING, path: [pathItem("key", input, key)] });
      else if (isThere || usual !== undefined) out[key] = readKey(schema, input, key, say);
    }
    const known = Object.keys(entries), unknown = Object.keys(input).filter((key) => !known.includes(key));
    for (const key of unknown) say({ message: UNKNOWN_KEY, input: known, path: [pathItem("key", input, key)] });
    return out as OutOf<E>;
  });
  return withParts(v.pipe(v.custom<Raw>(isRecord, `$ is not a map such as ${example}`), read), { entries });
};
/** A map with exactly one of `keys`. */
const choice = <const E extends v.ObjectEntries>(entries: E, keys: readonly string[] = Object.keys(entries)) =>
  v.pipe(
    withParts(map(entries), { oneOf: [...keys] }),
    v.check(
      (chosen) => keys.filter((key) => Object.hasOwn(chosen, key)).length === 1,
      `needs exactly one of ${keys.join(", ")}`,
    ),
  );
/** A map with free keys becomes a `Map`. */
const dict = <O>(name: v.GenericSchema<unknown, string>, value: v.GenericSchema<unknown, O>, example: string) => {
  const read = v.rawTransform<Raw, Map<string, O>>(({ dataset: { value: input }, addIssue }) => {
    const say = addIssue as AddIssue, out = new Map<string, O>();
    for (const key of Object.keys(input)) {
      const { issues, output } = v.safeParse(name, key), isTwice = !issues && out.has(output);
      const message = issues ? issues[0].message : isTwice && "$ stands twice";
      if (message) say({ message, input: key, path: [pathItem("key", input, key)] });
      out.set(output as string, readKey(value, input, key, say) as O);
    }
    return out;
  });
  return v.pipe(withParts(v.custom<Raw>(isRecord, `$ is not a map such as ${example}`), { values: value }), read);
};
/** A key that may be left out; without a fallback it then stays absent. */
const may = <S extends Schema, D extends v.InferInput<S> | undefined = undefined>(
  schema: S,
  about: string,
  usual?: D,
) => withParts(v.optional(schema, usual as never), { about }) as unknown as v.OptionalSchema<S, D>;
/** A schema with a description, such as that of a key that must be there. */
const says = <S extends Schema>(schema: S, about: string): S => ({ ...schema, about });
/** The defaults of a map as they are written. */
const defaultsOf = (schema: Schema): Raw => JSON.parse(JSON.stringify(v.getDefaults(schema)));
const opt = v.optional; // for keys that their map's own description explains

const either = <const O extends Schema[]>(what: string, ...options: O) => v.union(options, `$ is not ${what}`);
/** One, or a list of them; always a list afterwards. */
const many = <S extends Schema>(item: S, what: string, least = 0) => {
  const message = `$ is not ${what}, or a list of them`;
  const one = v.pipe(item, v.transform((one: Out<S>) => [one]));
  const list = withParts(v.array(item, message), { least });
  return v.pipe(v.union([one, list], message), v.check(({ length }) => length >= least, `is empty: it needs ${what}`));
};
/** A list of maps such as `example`. */
const mapList = <S extends Schema>(item: S, example: string) => v.array(item, `$ is not a list such as [${example}]`);
/** Either the long form or a short one, which stands for the value of a key, or for what a function makes of it. */
const orBrief = <S extends Schema, L extends Schema>(
  what: string,
  short: S,
  stands: string | ((value: v.InferInput<S>) => unknown),
  schema: L,
) => {
  const long = typeof stands === "string" ? (value: unknown) => ({ [stands]: value }) : stands;
  return withParts(either(what, short, schema), { short, long }) as unknown as v.GenericSchema<unknown, Out<L>>;
};
/** A value with its short forms written out. What is not valid stays as it is. */
function longForm(schema: Schema, value: unknown): unknown {
  const { short, long, wrapped, options = [], item, entries, values } = partsOf(schema);
  if (short && v.is(short, value)) return long!(value);
  if (wrapped) return longForm(wrapped, value);
  if (options.some((one) => partsOf(one).literal === value)) return value;
  for (const option of options) value = longForm(option, value);
  if (Array.isArray(value)) return item ? value.map((one) => longForm(item, one)) : value;
  if (!isRecord(value) || !entries && !values) return value;
  return mapValues(value, (one, key) => {
    const part = values ?? (Object.hasOwn(entries!, key) ? entries![key] : undefined);
    return part ? longForm(part, one) : one;
  });
}
/** The word off or none, which means `meant`, or something else. */
const or = <T, S extends Schema>(off: "off" | "none", meant: T, schema: S) =>
  v.pipe(
    either(`${off} or ${partsOf(schema).message.replace("$ is not ", "")}`, v.literal(off), schema),
    v.transform((value): T | Out<S> => value === off ? meant : value as Out<S>),
  );

const VARIABLE = "\\$\\{"; // in JSON Schema: ${NAME} may stand in place of any value
/** The JSON Schema of words and numbers of a pattern. */
function patternJson(pattern: RegExp): Raw {
  const text = { type: "string", pattern: `${pattern.source}|${VARIABLE}` };
  if (pattern.test("7") || pattern.test("200")) return { ...text, type: ["string", "number"] };
  return pattern.test("0") ? { anyOf: [text, { const: 0 }] } : text;
}
type Reader<T> = (text: string, ...groups: string[]) => T | Error | false;
/**
 * A word or number. `read` makes a value of the pattern's groups; false refuses it, and so does an Error, which says why.
 * Editors show what the pattern refuses, or what `strict` does, where that refuses more.
 */
const term = <T = string>(
  what: string,
  pattern: RegExp,
  read: Reader<T> = (text) => text as T,
  strict: RegExp | Raw = pattern,
) =>
  v.pipe(
    withParts(either(what, v.string(), v.number()), { json: strict instanceof RegExp ? patternJson(strict) : strict }),
    v.rawTransform<string | number, T>(({ dataset, addIssue, NEVER }) => {
      const found = pattern.exec(String(dataset.value)) as [string] | null;
      const value: T | Error | false = found !== null && read(...found);
      if (value !== false && !(value instanceof Error)) return value;
      addIssue({ message: `$ is not ${what}${value instanceof Error ? `: ${value.message}` : ""}` });
      return NEVER;
    }),
  );
/** A word, number or truth that passes a test. */
const scalar = (what: string, json: Raw, test: (text: string) => boolean) => {
  const isScalar = (value: unknown) => /^(?:string|number|boolean)$/.test(typeof value);
  const schema = v.custom<string | number | boolean>(
    (value) => isScalar(value) && test(`${value}`),
    `$ is not ${what}`,
  );
  return withParts(schema, { json });
};
const oneOf = <const N extends (string | number)[]>(...names: N) => {
  const json = { anyOf: [{ enum: names }, { type: "string", pattern: VARIABLE }] };
  const find = (text: string): N[number] | undefined => names.find((name) => `${name}` === text);
  const what = `one of ${names.filter((name) => name !== "").join(", ")}`;
  return v.pipe(scalar(what, json, (text) => find(text) !== undefined), v.transform((value) => find(`${value}`)!));
};
const numberFrom = (least: number, most: number, type: "number" | "integer") => {
  const what = `a ${type === "integer" ? "whole number" : "number"} from ${least} to ${most}`;
  const json = { type: [type, "string"], minimum: least, maximum: most, pattern: VARIABLE };
  const fits = (number: number) => number >= least && number <= most && (type === "number" || Number.isInteger(number));
  return v.pipe(
    scalar(what, json, (text) => /^-?\d+(?:\.\d+)?(?:[eE]\d+)?$/.test(text)), // 3.0 and 1e3 too
    v.transform(Number),
    v.check(fits, `$ is not ${what}`),
  );
};
const numeral = (least: number, most: number) => numberFrom(least, most, "number");
const integer = (least: number, most: number) => numberFrom(least, most, "integer");
const BOOL = { type: ["boolean", "string"], pattern: VARIABLE };
const Bool = v.pipe(
  scalar("true or false", BOOL, (text) => /^(?:true|false)$/i.test(text)),
  v.transform((one) => isTrue(one)),
);
const True = v.pipe(scalar("true", { const: true }, isTrue), v.transform(() => true as const));

// Times become milliseconds, percentages fractions, sizes bytes, and none becomes Infinity.
const UNITS: Record<string, number> = { ms: 1, s: 1e3, m: 60e3, h: 3600e3, d: 86400e3 };
const TIME = /^(?:0|(\d+(?:\.\d+)?)(ms|s|m|h|d))$/, MORE_THAN_0 = /^(?=.*[1-9])\d+(?:\.\d+)?(?:ms|s|m|h|d)$/;
const duration = (least: number, days = 1) =>
  term("a duration such as 500ms, 2s or 1m", TIME, (_, count = "0", unit = "s") => {
    const ms = Math.round(Number(count) * UNITS[unit]!);
    return ms >= least && ms <= days * UNITS.d! ? ms : new Error(`${least ? "more than 0 and " : ""}at most ${days}d`);
  }, least ? MORE_THAN_0 : TIME);
/** Text such as 500ms, 2s or 1m to milliseconds. */
const Duration = duration(1);
const Percent = term("a percentage from 0% to 100%", /^(?:100|\d?\d(?:\.\d+)?)%$/, (text) => parseFloat(text) / 100);
const SIZE = /^(?:[nN]one|NONE|(\d+(?:\.\d+)?) ?(?:([kKmMgGtT]?)([iI]?)[bB])?)$/;
const readBytes: Reader<number> = (_, count, prefix = "", i) => {
  const bytes = Math.floor(Number(count) * (i ? 1024 : 1000) ** " kmgt".indexOf(lower(prefix) || " "));
  return count === undefined ? Infinity : Number.isSafeInteger(bytes) && bytes;
};
const Size = term("a size such as 512kB, 10MB, 1MiB, a number of bytes, or none", SIZE, readBytes);
const HeadSize = term("a size such as 64KiB, from 1KiB to 1MiB", SIZE, (...size) => {
  const bytes = readBytes(...size);
  return Number(bytes) >= 1_024 && Number(bytes) <= 2 ** 20 && bytes;
});
const Limit = or("none", Infinity, integer(1, 1e6));
const Text = v.pipe(scalar("text", { type: ["string", "number", "boolean"] }, () => true), v.transform(String));
// A line break would begin another header.
const Printable = v.pipe(Text, v.regex(/^[\t\x20-\x7e\x80-\xff]*$/, "$ cannot stand in a header"), v.trim());
const Texts = many(Printable, "a text");
const lower = (text: string) => text.toLowerCase();
const TOKEN = /^[!#$%&'*+.^_`|~0-9A-Za-z-]+$/; // RFC 9110 section 5.6.2
const upper = (text: string) => text.toUpperCase();
const A_METHOD = "a method that can be forwarded, such as GET";
const Method = term(A_METHOD, TOKEN, (text) => !/^(trace|connect)$/i.test(text) && upper(text));
const Methods = many(Method, "a method");
/** The method of a route: words for any of them, and several with a bar, are valid tokens and would match nothing. */
const RouteMethod = term(A_METHOD, TOKEN, (text) => {
  if (/^(?:\*|all|any)$/i.test(text)) return new Error("leave methods out for any");
  if (text.includes("|")) return new Error(`write [${upper(text).split("|").join(", ")}]`);
  return v.is(Method, text) && upper(text);
}, /^(?!(?:\*|[aA][lL][lL]|[aA][nN][yY])$)[!#$%&'*+.^_`~0-9A-Za-z-]+$/);
const HeaderName = term("a header name", TOKEN, lower);
// Where a message ends and the next one begins is ours to say.
const FRAMING = /^(connection|content-length|host|keep-alive|proxy-connection|te|trailer|transfer-encoding|upgrade)$/;
const RuleName = term(
  "a header name that a rule may change",
  /^[!#$%&'+.^_`|~0-9A-Za-z-]+$/, // a star would be taken for a pattern
  (name) => !FRAMING.test(lower(name)) && lower(name),
);
/** Variables of other programs, such as $remote_addr, {client_ip} and %[src], would be sent as they are written. */
const isVariable = (text: string) => /^(?:\$[a-z]\w*|\{[a-z][\w.]*\}|%\[[^\]]*\])$/i.test(text);
const VARIABLE_VALUE = "$ would be sent as it is written: the only variables are ${NAME} of the environment";
const RuleValue = v.pipe(Printable, v.check((text) => !isVariable(text), VARIABLE_VALUE));
const RuleNames = many(RuleName, "a header name"), RuleValues = dict(RuleName, RuleValue, "{ x-name: value }");
const isIPv4 = ipaddr.IPv4.isValidFourPartDecimal;
const isIPv6 = (text: string) => text.includes(":") && !text.includes("%") && ipaddr.IPv6.isValid(text);
const isAddress = (text: string) => isIPv4(text) || isIPv6(text);
const isName = (text: string) =>
  text.length < 254 && /^(?!-)[a-z0-9_-]+(\.[a-z0-9_-]+)*$/i.test(text) && !/(^|\.)\d+$/.test(text);
const isHost = (text: string) => /^\[.*\]$/.test(text) ? isIPv6(text.slice(1, -1)) : isName(text) || isIPv4(text);
const LOCAL = "unix"; // among networks: clients of Unix sockets, which have no address
const NETWORK = /^([^/]+)(?:\/(\d{1,3}))?$/;
const Network = term("an address or a network such as 10.0.0.0/8", NETWORK, (text, address, bits = "0") => {
  return (text === LOCAL || isAddress(address) && Number(bits) <= (isIPv4(address) ? 32 : 128)) && text;
});
const Networks = many(Network, "an address or a network");
const AUTHORITY = /^(\[[^\]]*\]|[^:[\]]*)(?::(\d{1,5}))?$/;
const Host = term("a host such as www.example.com", AUTHORITY, (text, host) => (!text || isHost(host)) && text);
/** What to write for a host as nginx and browsers write it. */
const otherHost = (host: string): string | undefined => {
  if (/^[*_]$/.test(host)) return "leave host out for any";
  if (/^\.[\w.-]+$/.test(host)) return `write [${host.slice(1)}, "*${host}"]`;
  const { hostname = "" } = /[^\x00-\x7f]/.test(host) ? URL.parse(`http://${host.replace("*", "any")}`) ?? {} : {};
  return hostname ? `write ${host.startsWith("*") ? `"${hostname.replace("any", "*")}"` : hostname}` : undefined;
};
const HostPattern = term('a host such as www.example.com or "*.example.com"', AUTHORITY, (_, host, port) => {
  const name = lower(host).replace(/\.$/, ""), other = otherHost(name);
  if (other) return new Error(other);
  if (!isHost(name.replace(/^\*\./, "")) || /^\*\.[[\d.]+$/.test(name)) return false;
  return port ? new Error(`routes match hosts on all ports; write ${host}`) : name;
}, /^(?:\[[^\]]*\]|(?![*_]$)[^:[\]]*)$/);
const ADDRESS = /^(?:(.*):)?(\d{1,5})$/, A_LISTENER = "a port, or an address such as 127.0.0.1:8080 or [::]:8080";
const readAddress = (_: string, host = "", port: string) =>
  Number(port) < 65536 && (!host || isHost(host)) && { host, port: Number(port) };
const AddressSchema = term(A_LISTENER, ADDRESS, readAddress);
/** The name of a Unix socket. Of its path the system takes 107 bytes (unix(7)). */
const UNIX = /unix:\/[!-~]{1,106}/, isUnix = (host: string): boolean => host.startsWith("unix:");
const LISTEN = new RegExp(`^(?:${UNIX.source}|(?:(.*):)?(\\d{1,5}))$`);
const Listen = term(`${A_LISTENER}, or unix:/run/lb.sock`, LISTEN, (text, host, port) => {
  return isUnix(text) ? { host: text, port: 0 } : readAddress(text, host, port!);
});
const Mode = term("permissions such as 660", /^0?[0-7]{3}$/, (text) => parseInt(text, 8));
/** A port alone is on the loopback interface: other machines can connect only where an address says so. */
const Local = v.pipe(AddressSchema, v.transform(({ host, port }) => ({ host: host || "127.0.0.1", port })));
const isLoopback = (host: string) =>
  host === "localhost" || host === "[::1]" || isIPv4(host) && host.startsWith("127.");
const Bearer = term("a token of 8 or more letters, digits and -._~+/", /^[\w.~+/-]{8,}=*$/); // RFC 6750 section 2.1
const UNRESERVED = /[\w.~-]/;
/** Percent-encoding in its normal form: in capitals, and only where it is needed (RFC 3986 section 6.2.2). */
const normalEncoding = (path: string): string => {
  const decoded = path.replace(/%[0-9a-f]{2}/gi, (hex) => {
    const character = String.fromCharCode(parseInt(hex.slice(1), 16));
    return UNRESERVED.test(character) ? character : hex.toUpperCase();
  });
  return encodeURI(decoded).replaceAll("%25", "%");
};
const A_PATH = "a path such as /v1 (it begins with / and has no query)", NO_DOTS = "no request has . or .. in its path";
const hasDots = (path: string) => /\/\.\.?(?:[/?]|$)/.test(path);
const ProbePath = term("a path such as /healthz (it begins with /)", /^\/[!-"$-~]*$/, (path) => {
  return hasDots(path) ? new Error(NO_DOTS) : path; // ASCII without space and #
});
/** Where a rewrite leads. Nobody means a star or a name literally there. */
const Path = term(A_PATH, /^\/[!-"$->@-~]*$/, (path) => {
  if (hasDots(path)) return new Error(NO_DOTS);
  if (!/\*|\{|\/:[a-z]/i.test(path)) return path;
  return new Error("it is taken literally; what follows the match stays by itself, and $1 is a group of {regex: ...}");
});
const ONE_SEGMENT = /^(?::([a-z_]\w*)|\{([a-z_]\w*)\})$/i;
const partFor = (piece: string): string => {
  if (piece === "**") return ".*";
  return piece.includes(",") ? `(?:${piece.slice(1, -1).replaceAll(",", "|")})` : "[^/]+"; // {a,b}: one of them
};
/** A regular expression for a path with stars, or with names inside segments. */
const regexFor = (path: string): string => {
  const open = path.replace(/\*+$/, "");
  if (!open) return "/";
  const pieces = open.split(/(\*\*|\*|:[a-z_]\w*|\{[^}]*\})/i);
  const parts = pieces.map((piece, i) => i % 2 ? partFor(piece) : piece.replace(/[.+()|[\]^$]/g, "\\$&"));
  return `{regex: '${path.startsWith("/") ? "^" : ""}${parts.join("")}${open === path ? "$" : ""}'}`;
};
/** What to write for a regular expression that stands where a path does. */
const insteadOf = (regex: string): string => {
  const plain = regex.replace(/^\^/, "").replace(/\{\w+:([^}]*)\}/g, "$1");
  const [, prefix, isAll] = /^(\/[\w/.-]*?)(?:\/?(\(?\.\*\)?\$?)|\$)$/.exec(plain) ?? [];
  if (prefix === undefined) return `{regex: '^${plain}'}`;
  return isAll ? prefix : `{exact: ${prefix}}`;
};
const ALL_THAT_FOLLOWS = /^(.*)\/(?:\{\*{0,2}\w+\.{3}\}|\{\*{1,2}\w+\}|\*\w+|:\w+[*+]|\[\.{3}\w+\]|<path:\w+>)$/;
const OTHER_SEGMENT = /(?<=\/)(?:<(?:\w+:)?(\w+)>|\[(\w+)\])(?=\/|$)/g;
const ODD_SEGMENT = /(?:^|\/)(?!(?::[a-z_]\w*|\{[a-z_]\w*\})(?:\/|$))(?::|[^/]*[{}*])/i;
const SEGMENT_IS = "a segment is literal, or any one as :id or {id}; /* ends a prefix; otherwise ";
/** Patterns of nginx, Flask, Next.js, Go and others: taken literally they would match nothing. And what to write. */
const OTHER_PATTERNS: [looks: RegExp, why: string, write: (path: string, ...groups: string[]) => string][] = [
  [/^=\s*(\S.*)$/, "", (_, path) => `{exact: ${path}}`],
  [/^\^~\s*(\S.*)$/, "", (_, path) => path!],
  [/^~(\*?)\s*(\S.*)$/, "", (_, anyCase, regex) => `{regex: '${anyCase && "(?i)"}${regex}'}`],
  [ALL_THAT_FOLLOWS, "a path takes all below it: ", (_, before) => before || "/"],
  [OTHER_SEGMENT, "any one segment is :id or {id}: ", (path) => path.replace(OTHER_SEGMENT, ":$1$2")],
  [/^\^|[[\]]|\.[*+]|\\[dwsDWS]|\$$|\(.*\|.*\)/, "a regular expression is {regex: ...}; ", insteadOf],
  [ODD_SEGMENT, SEGMENT_IS, (path) => {
    const starless = path.replace(/(?<=\/)\*(?=\/)/g, "{any}");
    return ODD_SEGMENT.test(starless) ? regexFor(path) : starless;
  }],
];
/** A path as people write it, in the normal form of requests, with `{name}` where any segment fits. */
const readPattern = (written: string): string | Error => {
  for (const [looks, why, write] of OTHER_PATTERNS) {
    const found = written.match(looks);
    if (found) return new Error(`${why}write ${write(written, ...found.slice(1))}`);
  }
  if (/%(?![0-9a-f]{2})|%00|\\|\p{Cs}/iu.test(written)) {
    return new Error("no request has a bare %, %00 or \\ in its path");
  }
  const normal = written.split("/").map((segment) => {
    const [, colon, braces] = ONE_SEGMENT.exec(segment) ?? [], name = colon ?? braces;
    return name ? `{${name}}` : normalEncoding(segment);
  });
  return hasDots(normal.join("/")) ? new Error(NO_DOTS) : normal.join("/");
};
const PATTERN = /^(?:[/*^][^\x00-\x20?#\x7f]*|(?:=|\^~|~\*?) *[!-~]+)$/;
const SEGMENTS = String
  .raw`(?:/(?::[A-Za-z_]\w*|\{[A-Za-z_]\w*\}|(?!:)(?:[^\x00-\x20?#\x7f/{}*\\%]|%[0-9A-Fa-f]{2})*))`;
const Exact = term(A_PATH, PATTERN, readPattern, new RegExp(`^${SEGMENTS}+$`));
const readPrefix: Reader<string> = (path) => {
  const pattern = readPattern(path.replace(/\/\*\*?$/, "/"));
  return typeof pattern === "string" ? pattern.replace(/\/+$/, "") : pattern;
};
const Prefix = term(A_PATH, PATTERN, readPrefix, new RegExp(`^(?:${SEGMENTS}+|${SEGMENTS}*/\\*\\*?)$`));
/** RE2 syntax: linear time by construction, so that no pattern can be made slow by a request. */
const Regex = term("a regular expression (RE2)", /^[\s\S]*$/, (text) => {
  try {
    return RE2JS.compile(text), text;
  } catch (error) { // its message has the pattern, which may be a secret
    return new Error((error as RE2JSSyntaxException).error);
  }
});

/** A host as the runtimes' listeners take it. */
const bareAddress = (host: string): string => host.replace(/^\[|\]$/g, "");

/** A client's address: listeners for both families give ::ffff:10.0.0.1 (RFC 4291 section 2.5.5.2). */
const unmapped = (address: string | undefined): string => address?.replace(/^::ffff:/, "") || "unknown";

/** The file of a Unix socket. */
const pathOfUnix = (host: string): string => host.slice("unix:".length);

/** An address as people write it. */
const shownAddress = (host: string, port: number): string => isUnix(host) ? host : `${host || "0.0.0.0"}:${port}`;

// --- 1.2 Services: what a service and its servers may say ---

const HTTP_ORIGIN = /(?:([hH][tT][tT][pP][sS]?|[hH]2[cC]):\/\/)?(\[[^\]]*\]|[^:[\]/?#@]*)(?::(\d{1,5}))?\/?/;
const ORIGIN = new RegExp(`^(?:${UNIX.source}|${HTTP_ORIGIN.source})$`);
const SERVER = "a server such as localhost:8081 or http://localhost (no user, no path)";
const isPortText = (server: unknown): boolean =>
  typeof server !== "object" && /^\d{1,5}$/.test(String(server)) && Number(server) < 65536;
const readServer: Reader<{ name: string; url: string }> = (text, scheme = "", given, at) => {
  if (isUnix(text)) return { name: text, url: text };
  const [host, port] = isPortText(text) ? ["localhost", text] : [given!, at];
  const number = Number(port ?? { http: 80, h2c: 80, https: 443 }[lower(scheme)]), name = `${lower(host)}:${number}`;
  const isThere = isHost(host.replace(/\.$/, "")) && URL.canParse(`http://${name}`); // a last dot: no search domains
  const fits = isThere && number > 0 && number < 65536, isH2c = lower(scheme) === "h2c";
  const { origin } = new URL(`${isH2c ? "http" : scheme || "http"}://${fits ? name : "none"}`);
  return fits && { name, url: isH2c ? origin.replace("http", "h2c") : origin };
};
const Url = withParts(
  term(SERVER, ORIGIN, readServer),
  { short: v.custom(isPortText), long: (server) => `localhost:${server}` },
);
const A_DNS_NAME = "a name and a port such as api.internal:8080, or https://api.internal";
const DnsName = term(A_DNS_NAME, ORIGIN, (text, scheme, host = "", port) => {
  return isName(host.replace(/\.$/, "")) && readServer(text, ...[scheme, host, port] as string[]);
});
const SRV = /^(?:(https?|h2c):\/\/)?((?:[\w-]+\.)+[\w-]+\.?)$/i;
const SrvName = term("a name of SRV records such as _http._tcp.api.internal", SRV, (_, scheme = "", host) => {
  const usual = /^_https\./i.test(host!) ? "https" : "http";
  return isName(host!.replace(/\.$/, "")) && { name: lower(host!), url: `${lower(scheme || usual)}://${lower(host!)}` };
});
const also = {
  weight: opt(integer(0, 256), 1),
  host: opt(Host, ""),
  backup: opt(Bool, false),
  max: opt(Limit, "none"),
  state: opt(oneOf("ready", "drain", "maint"), "ready"),
};
const SERVER_KEYS = ["url", "dns", "srv"] as const;
const ServerMap = v.pipe(
  choice({ url: opt(Url), dns: opt(DnsName), srv: opt(SrvName), ...also }, SERVER_KEYS),
  v.transform(({ url, dns, srv, ...rest }): ServerConfig => {
    if (url) return { ...url, ...rest };
    return dns ? { ...dns, find: "dns", ...rest } : { ...srv!, find: "srv", ...rest };
  }),
);
/** A server as the file has it: where it is, or the name by which it is found. */
const writtenServer = (server: unknown): unknown =>
  isRecord(server) ? SERVER_KEYS.map((key) => server[key]).find((one) => one !== undefined) : server;
const OnlyUrl = v.pipe(Url, v.transform((url) => ({ ...url, ...v.parse(v.object(also), {}) })));
const ServerSchema = either("a server such as localhost:8081 or {url: ..., weight: 2}", OnlyUrl, ServerMap);

/** A server, as it is parsed. */
interface ServerConfig {
  url: string;
  name: string; // host:port, or the URL where servers share that
  find?: "dns" | "srv"; // it stands for all servers that DNS has under its name
  weight: number;
  host: string; // the Host that it gets; empty: as `host_header` says
  backup: boolean;
  max: number; // requests in flight; Infinity: any number
  state: "ready" | "drain" | "maint"; // as an operator wants it
}

/** What tells servers and names of one list apart. */
const idOf = ({ find = "", url }: { find?: string | undefined; url: string }): string => find + url;

/** A server that is listed again weighs more. Where http and https share a host and port, the URLs are the names. */
const Servers = v.pipe(
  many(ServerSchema, "a server", 1),
  v.rawTransform<ServerConfig[], ServerConfig[]>(({ dataset: { value: listed }, addIssue }) => {
    const named = Map.groupBy(listed, (server) => server.find ? "" : server.name);
    return [...Map.groupBy(listed, idOf).values()].map((same) => {
      const weight = same.reduce((sum, server) => sum + server.weight, 0), first = { ...same[0]!, weight };
      const differ = same.some((server) => JSON.stringify({ ...server, weight }) !== JSON.stringify(first));
      if (differ) addIssue({ message: `${first.url} stands twice with different host, backup, max or state` });
      return !first.find && named.get(first.name)!.length > same.length ? { ...first, name: first.url } : first;
    });
  }),
  v.check((servers) => servers.some((server) => server.weight > 0), "needs a server with a weight above 0"),
);
// deno-fmt-ignore
/** The built-in strategies that are named by a word. */
const STRATEGIES = ["round-robin", "first", "random", "two-choices", "least-connections", "least-response-time", "peak-ewma", "ip-hash"] as const;
type Hashed = "header" | "cookie" | "query" | "path" | "client";
const NAMED_KEYS = { header: opt(HeaderName), cookie: opt(Text), query: opt(Text) };
const HashMap = map({ hash: choice({ ...NAMED_KEYS, path: opt(True), client: opt(True) }) });
const AnyName = withParts(v.string(), {
  json: { anyOf: [{ enum: STRATEGIES }, { type: "string", pattern: VARIABLE }] },
});
/** Any name, for users may bring strategies of their own: `check` knows which there are. */
const StrategySchema = v.pipe(
  either("a strategy such as random or {hash: {header: name}}", AnyName, HashMap),
  v.transform((strategy): { name: string; by: Hashed | "none"; key: string } => {
    if (typeof strategy === "string") return { name: strategy, by: "none", key: "" };
    const [[by, key]] = Object.entries(strategy.hash) as [[Hashed, string | true]];
    return { name: "hash", by, key: key === true ? "" : key };
  }),
);
const A_STATUS = "a status such as 200, 2xx, or 200-399";
const StatusRange = term(A_STATUS, /^([1-5]\d\d)(?:-([1-5]\d\d))?$/, (_, from, to = from) => {
  return from <= to && [Number(from), Number(to)] as [number, number];
});
const Hundred = term(A_STATUS, /^[1-5](?:xx|XX)$/);
const Statuses = orBrief(A_STATUS, Hundred, (text) => String(text).replace(/xx/i, "00-$`99"), StatusRange);
const GrpcName = v.pipe(Text, v.maxBytes(100, "$ is longer than 100 bytes"));
const Probe = map({
  path: may(either("a path", v.literal(""), ProbePath), "a request to it; without it a TCP connect", ""),
  interval: may(Duration, "time between two probes", "10s"),
  timeout: may(Duration, "a probe that takes longer has failed", "2s"),
  expect: may(many(Statuses, "a status", 1), "200, 200-399, or a list", [200]),
  body: may(Text, "what the body has to contain", ""),
  grpc: may(GrpcName, "the service that grpc.health.v1 is asked about, over HTTP/2; empty: the whole server"),
  rise: may(integer(1, 100), "successes in a row until it may be asked again", 2),
  fall: may(integer(1, 100), "failures in a row until it may not be asked", 3),
  method: may(oneOf("GET", "HEAD", "OPTIONS", "POST"), "to ask with", "GET"),
  headers: may(dict(HeaderName, Printable, "{ x-name: value }"), "of the request", {}),
});
const kindOfProbe = ({ grpc, path }: Pick<Out<typeof Probe>, "grpc" | "path">) => {
  if (grpc !== undefined) return "grpc" as const;
  return path ? "http" as const : "tcp" as const;
};
const Probing = v.pipe(Probe, v.transform((one) => ({ kind: kindOfProbe(one), ...one })));
const ShortProbe = orBrief("a path, or a map such as { path: /healthz }", ProbePath, "path", Probing);
const Health = or("off", { kind: "off" as const, ...v.parse(Probe, {}) }, ShortProbe);
const Slow = or("off", Infinity, numeral(1.1, 1000));
const EjectMap = map({
  failures: may(integer(1, 1e6), "failed requests in a row", 5),
  for: may(Duration, "how long; with every further time in a row that much longer", "30s"),
  slow: may(Slow, "latency, in medians of the pool; or off", 3),
  at_most: may(Percent, "of the servers at a time", "50%"),
});
const Eject = or("off", { failures: Infinity, for: 0, slow: Infinity, at_most: 0 }, EjectMap);
const QueueMap = map({ size: opt(integer(1, 100_000), 100), timeout: opt(Duration, "5s") });
const Quantile = term("a share such as p95, from p50 to p99", /^p([5-9]\d)$/, (_, percent) => Number(percent) / 100);
const ServiceName = term("a name", /^\P{Cc}{1,200}$/u);
const AUTO = 0; // max_in_flight: what each server can bear is found out
const InFlight = v.pipe(
  either("auto, none or a whole number from 1 to 1000000", v.literal("auto"), Limit),
  v.transform((limit) => limit === "auto" ? AUTO : limit),
);
const Hedge = or("off", 0, Quantile);
const ShortQueue = orBrief("how many wait, or a map such as { size: 100 }", QueueMap.entries.size, "size", QueueMap);
const Queue = or("off", { size: 0, timeout: 0 }, ShortQueue);
const Timeouts = map({
  connect: opt(Duration, "3s"),
  response: opt(Duration, "60s"),
  idle: opt(Duration, "5m"),
  request: opt(or("none", Infinity, Duration), "none"),
});
const WEB_ORIGIN = /^(?:\*|null|[a-z][a-z0-9+.-]*:\/\/(?:\*\.)?(?:\[[^\]]*\]|[^*:[\]/?#@\s]+)(?::\d{1,5})?)$/;
const WebOrigin = term('an origin such as https://a.example, https://*.example or "*"', WEB_ORIGIN);
const WebOrigins = many(WebOrigin, "an origin");
const CorsMap = map({
  origin: may(WebOrigins, "origins that may read the answers; https://*.example.com is any below it", ["*"]),
  allow_methods: may(Methods, "methods they may use", ["GET", "HEAD", "PUT", "POST", "DELETE", "PATCH"]),
  allow_headers: may(Texts, "headers they may send; none: those they ask for", []),
  expose_headers: may(Texts, "headers they may read", []),
  max_age: may(duration(0), "how long a browser may remember this", 0),
  credentials: may(Bool, "with cookies", false),
});
const SafeCors = v.pipe(
  CorsMap,
  v.check((cors) => !cors.credentials || !cors.origin.includes("*"), "credentials need origins by name, not *"),
);
const ORIGINS = 'an origin, a list of them, or a map such as { origin: "https://a.example" }';
const ShortCors = orBrief(ORIGINS, WebOrigins, "origin", SafeCors);
const Cors = or("off", { ...v.parse(CorsMap, {}), origin: [] as string[] }, ShortCors);
const Name = opt(Text, "");
const TlsMap = map({ ca: Name, cert: Name, key: Name, servername: Name, insecure: opt(Bool, false) });
const Tls = v.pipe(TlsMap, v.check((tls) => !tls.cert === !tls.key, "needs cert and key together"));
const HttpVersion = v.pipe(oneOf(1, 1.1, 2, "auto"), v.transform((version) => version === 1.1 ? 1 : version));
const RETRY_CAUSES = ["connect", "reset", "unavailable"] as const; // the last is gRPC's
const RetryOn = either("connect, reset, unavailable, or 400 to 599", oneOf(...RETRY_CAUSES), integer(400, 599));
const RETRIED: v.InferInput<typeof RetryOn>[] = ["connect", "reset", 502, 503, 504];
const Fallback = or("none", "", ServiceName);
/** What other programs call the server's own name, and the client's. */
const OWN_HOST =
  /^(?:upstream|upstream_hostport|backend|target|origin|destination|auto|rewrite|\{.*upstream.*|\$proxy_host)$/;
const SENT_HOST = /^(?:preserve|pass|original|host|client|request|\{.*host.*|\$(?:http_)?host)$/;
const HostHeader = term("keep, server or a host such as www.example.com", /^\S+$/, (host) => {
  if (OWN_HOST.test(host)) return new Error("the server's own is called server");
  if (SENT_HOST.test(host)) return new Error("the client's is called keep");
  return /^(?:keep|server)$/.test(host) || v.is(Host, host) ? host : false;
}, AUTHORITY);
const CookieName = term("a cookie name", TOKEN);
const Secret = v.pipe(Text, v.nonEmpty("the secret is empty"));
const StickyMap = map({ cookie: opt(CookieName, "lb"), secret: opt(Secret), max_age: opt(duration(0, 400), 0) }); // browsers keep none longer
const Stuck = v.pipe(StickyMap, v.transform((one) => ({ secret: "", ...one })));
const A_COOKIE = "the name of a cookie, or a map such as { cookie: lb }";
const NO_COOKIE = /^(?:on|yes|no|none|true|false|enabled?|disabled?|cookie|source|ip)$/i;
const ShortCookie = term(A_COOKIE, TOKEN, (name) => !NO_COOKIE.test(name) && name);
const ShortSticky = orBrief(A_COOKIE, ShortCookie, "cookie", Stuck);
const Sticky = or("off", { cookie: "", secret: "", max_age: 0 }, ShortSticky);
const Compress = orBrief("true, false or gzip", v.literal("gzip"), () => true, Bool);
/** What a route may also say, and then wins over its service. */
const POLICY_KEYS = {
  retries: may(integer(0, 10), "further attempts, always at another server while one is left", 1),
  retry_on: may(v.array(RetryOn, "$ is not a list such as [connect, 503]"), "what is tried again", RETRIED),
  timeouts: may(
    Timeouts,
    "until connected, until the headers, between pieces of a body, for all of a request's",
    defaultsOf(Timeouts),
  ),
  host_header: may(HostHeader, "keep (the client's), server (the server's own), or a literal", "keep"),
  compress: may(Compress, "gzip for text when the client accepts it and the server did not", false),
  cors: may(Cors, "off, or which pages may read the responses in a browser", "off"),
};
const settings = {
  strategy: may(StrategySchema, "which server takes a request; hash: the same key, the same server", "round-robin"),
  health: may(Health, "off, or how servers are probed", defaultsOf(Probe)),
  eject: may(
    Eject,
    "off, or which servers requests take out: those that fail, or fall behind the others",
    defaultsOf(EjectMap),
  ),
  slow_start: may(duration(0), "from 10 % of its weight to all of it, for a server that comes back or is new", "0s"),
  panic: may(Percent, "fewer servers than this may be asked: ask them all rather than none", "50%"),
  retry_budget: may(Percent, "retries at most, of the requests; at least 3 a second", "20%"),
  hedge: may(Hedge, "off, or p95: a request that waits longer than 95 % do is sent to another server too", "off"),
  max_in_flight: may(InFlight, "per server; auto: as many as leave its latency as it is", "none"),
  queue: may(Queue, "off, or how many requests wait where all servers are full, and how long", defaultsOf(QueueMap)),
  fallback: may(Fallback, "the service that is asked when no server of this one may be", "none"),
  sticky: may(
    Sticky,
    "off, or the cookie that keeps a client on its server; what signs it; how long it lasts",
    "off",
  ),
  tls: may(Tls, "PEM files; the name to verify; insecure: any will do", defaultsOf(TlsMap)),
  http: may(HttpVersion, "with https:// servers: 1.1, 2, or auto, which takes 2 where the server offers it", 1.1),
  ...POLICY_KEYS,
};

/** What a route may say about its services: retries, time limits and the like. Times are milliseconds. */
interface Policy {
  retries: number;
  retry_on?: (number | "connect" | "reset" | "unavailable")[] | undefined;
  timeouts: { connect: number; response: number; idle: number; request: number }; // Infinity: none
  host_header: string; // keep, server or a literal
  compress: boolean;
  /** No origin: off. */
  cors: {
    origin: string[];
    allow_methods: string[];
    allow_headers: string[];
    expose_headers: string[];
    max_age: number;
    credentials: boolean;
  };
}

// --- 1.3 Routes and listeners: routes, listeners, TCP services, and the file as a whole ---

const TestSchema = v.pipe(
  either("a value, {regex: ...} or {present: true}", Text, choice({ regex: opt(Regex), present: opt(Bool) })),
  v.check((test) => test !== "*", "$ would be compared as it is written: for any value write {present: true}"),
  v.transform((test) => {
    if (typeof test === "string") return { kind: "is" as const, value: test };
    const { regex, present } = test;
    return present === undefined ? { kind: "regex" as const, source: regex! } : { kind: "present" as const, present };
  }),
);
const tests = (name: v.GenericSchema<unknown, string>) =>
  v.pipe(
    dict(name, TestSchema, "{ name: value }"),
    v.transform((all) => [...all].map(([name, test]): Condition => ({ name, ...test }))),
  );
const PathMatch = v.pipe(
  either("a path, {exact: ...} or {regex: ...}", Prefix, choice({ exact: opt(Exact), regex: opt(Regex) })),
  v.transform((path): PathRule => {
    if (typeof path === "string") return { kind: "prefix", path };
    return path.exact === undefined ? { kind: "regex", source: path.regex! } : { kind: "exact", path: path.exact };
  }),
);
const RewriteMap = v.pipe(
  map({ path: opt(Path), whole: opt(Path), host: opt(Host, "") }),
  v.check(({ path, whole }) => path === undefined || whole === undefined, "path and whole exclude each other"),
  v.transform(({ path, whole, host }): { kind: "none" | "replace" | "whole"; path: string; host: string } => {
    if (whole !== undefined) return { kind: "whole", path: whole, host };
    return { kind: path === undefined ? "none" : "replace", path: path ?? "", host };
  }),
);
const Rewrite = orBrief("a path, or a map such as { path: /v2 }", Path, "path", RewriteMap);
const HeaderRulesSchema = map({ set: opt(RuleValues, {}), add: opt(RuleValues, {}), remove: opt(RuleNames, []) });
const QueryRules = map({ set: opt(dict(Text, Text, "{ name: value }"), {}), remove: opt(many(Text, "a name"), []) });
const RequestRules = map({ headers: opt(HeaderRulesSchema, {}), query: opt(QueryRules, {}) });
const To = term("a URL or path to go to", /^(?:(?:[hH][tT][tT][pP][sS]?:\/\/|\/)[!-~]+|\/)$/, (to) => {
  if (!/\$\w|[{}]|\*$|\/:[a-z]/i.test(to)) return to;
  return new Error("it is taken literally; { host: b.example } and { scheme: https } keep path and query");
});
const Place = term("a path such as /v1", /^(?:\/[!-~]*|)$/);
const PARTS = { scheme: opt(oneOf("http", "https", ""), ""), host: opt(Host, ""), port: opt(integer(0, 65535), 0) };
const RedirectMap = v.pipe(
  map({
    to: opt(either("a URL or path to go to", v.literal(""), To), ""),
    ...PARTS,
    path: opt(Place, ""),
    status: opt(oneOf(301, 302, 303, 307, 308), 302),
  }),
  v.check((one) => !one.to !== !(one.scheme || one.host || one.port || one.path), "needs either to or its parts"),
  v.transform((one) => ({ kind: "redirect" as const, ...one })),
);
const Redirect = orBrief("a URL or path to go to, or a map such as { scheme: https }", To, "to", RedirectMap);
const RespondMap = v.pipe(
  map({ status: opt(integer(200, 599), 200), body: opt(Text, ""), headers: opt(RuleValues, {}) }),
  v.check((one) => !one.body || ![204, 205, 304].includes(one.status), "an answer with this status has no body"),
  v.transform((one) => ({ kind: "respond" as const, ...one })),
);
const Respond = orBrief("a status, or a map such as { status: 404 }", integer(200, 599), "status", RespondMap);
const RateKey = either("ip or {header: name}", v.literal("ip"), map({ header: HeaderName }));
const RateMap = v.pipe(
  map({ requests: integer(1, 1e6), per: opt(Duration, "1s"), by: opt(RateKey, "ip"), burst: opt(integer(1, 1e6)) }),
  v.transform(({ by, ...one }) => ({ ...one, burst: one.burst ?? one.requests, by: by === "ip" ? "" : by.header })),
);
const A_RATE = "a rate such as 5/s, or a map such as { requests: 5, per: 1s }";
const PER = /^([1-9]\d{0,6})\/(\d*)(ms|s|m|h|d)$/;
const readRate = (rate: string | number) => {
  const [, requests, count, unit] = PER.exec(String(rate))!;
  return { requests: Number(requests), per: `${count || 1}${unit}` };
};
const RateWord = term(A_RATE, PER, (text, requests) => Number(requests) <= 1e6 && text);
const ShortRate = orBrief(A_RATE, RateWord, readRate, RateMap);
const RateSchema = or("off", undefined, ShortRate);
const MirrorMap = map({ service: ServiceName, percent: opt(numeral(0, 100), 100) });
const A_MIRROR = "a service, or a map such as { service: shop, percent: 10 }";
const ShortMirror = orBrief(A_MIRROR, ServiceName, (service) => ({ service, percent: 100 }), MirrorMap);
const Mirror = or("off", { service: "", percent: 0 }, ShortMirror);
const Share = either(
  "a whole number from 0 to 1000000, or a percentage",
  integer(0, 1e6),
  v.pipe(Percent, v.transform((part) => part * 100)),
);
const PLACE_KEYS = {
  host: may(many(HostPattern, "a host"), '"*.example.com" is any labels in front, not example.com itself', []),
  path: may(many(PathMatch, "a path"), "prefix by whole segments, {exact: /v1}, {regex: ...}, or a list", []),
  strip: may(Bool, "true: the server sees the rest of the path", false),
};
const conditions = {
  scheme: may(oneOf("http", "https", ""), "that the client speaks; asked before all routes that leave it open", ""),
  methods: may(many(RouteMethod, "a method"), "any when empty", []),
  headers: may(tests(HeaderName), "all must hold: the value, {regex: ...} or {present: true}", {}),
  query: may(tests(Text), "all must hold: the value, {regex: ...} or {present: true}", {}),
};
const ACTION_KEYS = {
  service: may(ServiceName, "one of services"),
  servers: may(Servers, "a service of its own; any key of one may stand beside it"),
  split: may(dict(ServiceName, Share, "{ shop: 90%, next: 10% }"), "services, by weights or percentages"),
  redirect: may(Redirect, "to, literally, or scheme, host, port and path (what is not named stays); status"),
  respond: may(Respond, "an answer of its own: status, body and headers"),
};
const CHANGE_KEYS = {
  name: may(term("a name", /^\P{Cc}{0,200}$/u), "for logs and --explain; else its host and path", ""),
  rewrite: may(Rewrite, "path for what matched, or whole for all of it; host", {}),
  request: may(RequestRules, "headers and query: set replaces, add adds, remove removes", {}),
  response: may(map({ headers: opt(HeaderRulesSchema, {}) }), "headers: set replaces, add adds, remove removes", {}),
  mirror: may(Mirror, "off, or the service that gets a copy of so many percent of the requests", "off"),
  allow: may(Networks, "only these clients", []),
  deny: may(Networks, "not these clients; wins over allow", []),
  rate: may(RateSchema, "off, or requests per time, by ip or {header: name}; burst: how many at once", "off"),
  body_limit: may(Size, "of a request's body", "none"),
};
const TARGET_KEYS = { ...ACTION_KEYS, ...CHANGE_KEYS, ...settings };
const ROUTE_KEYS = { ...PLACE_KEYS, ...conditions, ...TARGET_KEYS };
const ACTIONS = Object.keys(ACTION_KEYS), A_ROUTE = "{ path: /api, service: shop }";
const routeMap = <const E extends v.ObjectEntries>(keys: E, example?: string) =>
  withParts(map(keys, example), { oneOf: ACTIONS });
const DefaultMap = routeMap(TARGET_KEYS, "{ service: shop }"), AnyRoute = routeMap(ROUTE_KEYS, A_ROUTE);
const Default = orBrief("a service, or a map such as { service: shop }", ServiceName, "service", DefaultMap);
const HostRoute = routeMap({ ...ROUTE_KEYS, host: says(many(HostPattern, "a host", 1), "a host or a list") });
const PathRoute = routeMap({ ...ROUTE_KEYS, path: says(many(PathMatch, "a path", 1), "this path and all below it") });
const SettingsMap = map(settings);
const ServiceSchema = map({
  servers: says(Servers, "host:port, URL, or {url (or dns, or srv), weight, host, backup, max, state}"),
  ...settings,
}, "{ servers: [localhost:8081] }");
const AdminMap = map({
  listen: may(Local, "where operators connect; a port alone is on 127.0.0.1", "127.0.0.1:9090"),
  token: may(Bearer, "what a request has to show; required beyond loopback"),
  read_token: may(Bearer, "another one, which may only look"),
});
const AdminChecked = v.pipe(
  AdminMap,
  v.check(({ listen, token }) => !!token || isLoopback(listen.host), "needs a token, as it listens beyond loopback"),
  v.check(({ token, read_token }) => !read_token || !!token, "needs a token beside read_token"),
  v.check(({ token, read_token }) => !token || token !== read_token, "token and read_token are the same"),
);
const Admin = orBrief("a port, an address, or a map such as { listen: 9090 }", Local, "listen", AdminChecked);
const LogFormat = oneOf("combined", "json", "off");
const LogMap = map({ format: opt(LogFormat, "combined"), sample: opt(Percent, "100%") });
const Log = v.pipe(
  either("combined, json or off, or a map such as { format: json, sample: 10% }", LogFormat, LogMap),
  v.transform((log): Out<typeof LogMap> => typeof log === "string" ? { format: log, sample: 1 } : log),
);
// Where clients connect.
const PemFile = v.pipe(Text, v.nonEmpty("the name of the file is empty"));
const Certificate = map({ cert: says(PemFile, "PEM: it, and those that sign it"), key: says(PemFile, "PEM") });
const Certificates = many(Certificate, "a map with cert and key");
const ListenerMap = map({
  address: says(Listen, "a port or an address"),
  tls: may(Certificates, "certificates; by the name that is asked for, else the first", []),
  client_ca: may(Text, "PEM: clients have to show a certificate that one of these has signed", ""),
  h2c: may(Bool, "without TLS: clients may begin with HTTP/2 (prior knowledge)", false),
  mode: may(Mode, "of a Unix socket; without it 660"),
});
const ListenerSchema = v.pipe(
  either("a port or an address, or a map with address and tls", Listen, ListenerMap),
  v.transform((at): Out<typeof ListenerMap> => "port" in at ? { address: at, tls: [], client_ca: "", h2c: false } : at),
  v.transform(({ address, ...rest }) => ({ ...address, ...rest })),
  v.check((at) => !at.client_ca || at.tls.length > 0, "client_ca needs tls"),
  v.check((at) => !("mode" in at) || isUnix(at.host), "mode is for Unix sockets"),
  v.check(
    (at) => !isUnix(at.host) || at.tls.length === 0,
    "a Unix socket has no TLS: nobody else hears what it carries",
  ),
  v.check(
    (at) => !at.h2c || at.tls.length === 0,
    "h2c is HTTP/2 without TLS; with tls clients choose HTTP/2 by themselves",
  ),
);
// Connections that are not HTTP.
const TcpTimeouts = map({ connect: opt(Duration, "3s"), idle: opt(Duration, "5m") });
const tcpSettings = {
  strategy: settings.strategy,
  health: settings.health,
  eject: settings.eject,
  panic: settings.panic,
  max_in_flight: may(Limit, "per server", "none"),
  retries: may(integer(0, 10), "further servers, where one cannot be reached", 1),
  timeouts: may(TcpTimeouts, "until connected, and while nothing passes", defaultsOf(TcpTimeouts)),
};
const Tcp = map({
  listen: says(many(ListenerSchema, "a port or an address", 1), "where clients connect; over TLS, as {address, tls}"),
  name: may(CHANGE_KEYS.name, "of its service; else tcp: and its port", ""),
  servers: says(Servers, "host:port, or {url (or dns, or srv), weight, backup, max, state}"),
  proxy_protocol: may(Bool, "true: servers are told the client's address (PROXY protocol, version 2)", false),
  allow: CHANGE_KEYS.allow,
  deny: CHANGE_KEYS.deny,
  ...tcpSettings,
});
const RESOLVER = /^(?:(\d[\d.]+|\[[^\]]+\])(?::(\d{1,5}))?|([\da-f:.]*:[\da-f:.]*))$/i;
const ResolverSchema = term("an address such as 10.0.0.2 or 10.0.0.2:53", RESOLVER, (_, host, port = "53", bare) => {
  const address = host ?? `[${bare}]`, number = Number(port);
  return !isName(address) && isHost(address) && number > 0 && number < 65536 && `${address}:${number}`;
});
const Limits = map({
  requests: may(Limit, "in flight, of all clients: 503 beyond", "none"),
  per_client: may(Limit, "in flight, of one address (an IPv6 /64): 429 beyond", "none"),
  connections: may(Limit, "open, of one thread: 503 beyond", "none"),
  client_connections: may(Limit, "of those, of one address (an IPv6 /64): 429 beyond", "none"),
  header: may(Duration, "until the head of a request is there: 408 beyond", "10s"),
  keep_alive: may(Duration, "until a connection without a request is closed", "75s"),
  header_size: may(HeadSize, "of a request's head: 431 beyond", "64KiB"),
  header_fields: may(integer(1, 10_000), "of a request: 431 beyond", 1_000),
});
// Several instances, one configuration.
const ENGINE = "an etcd such as http://10.0.0.1:2379 (a path may follow, no user)";
const EngineUrl = term(ENGINE, /^(?:https?:\/\/)?[^\s/?#@]+(?:\/[^\s?#@]*)?$/, (text) => {
  const url = text.includes("://") ? text : `http://${text}`;
  return URL.canParse(url) && new URL(url).href.replace(/\/+$/, "");
});
const AN_INSTANCE = "a name of an instance (at most 100 characters, without / and spaces)";
const InstanceName = term(AN_INSTANCE, /^[^\s/\p{Cc}]{0,100}$/u);
const Ttl = v.pipe(Duration, v.check((ms) => ms >= 2_000, "is less than 2s"));
const FleetMap = map({
  etcd: may(many(EngineUrl, ENGINE), "members of etcd; any that answers will do", []),
  prefix: may(term("a prefix such as lb/", /^[!-~]{1,200}$/), "of the fleet's keys", "lb/"),
  name: may(InstanceName, "of this instance; else the name of its host and the id of its process", ""),
  user: may(Text, "of etcd", ""),
  password: may(Text, "of the user, or the token of a Durable Object", ""),
  tls: may(Tls, "PEM files; the name to verify; insecure: any will do", defaultsOf(TlsMap)),
  ttl: may(Ttl, "an instance that the engine has not heard for so long is gone; at least 2s", "10s"),
  probers: may(integer(1, 100), "instances that probe each server; most of them decide", 3),
  durable: may(Text, "at the edge, in place of etcd: the binding of an LbFleet object", ""),
}, "{ etcd: http://10.0.0.1:2379 }");
const FleetSchema = v.pipe(
  FleetMap,
  v.check((one) => one.etcd.length > 0 || one.durable !== "", "needs etcd, or durable"),
);
const RoutesFile = map({
  listen: may(many(ListenerSchema, "a port or an address"), "where clients connect; over TLS, as {address, tls}", 8080),
  admin: may(Admin, "the API and the pages for operators: listen, token, read_token (may only look)"),
  trust: may(Networks, "peers whose X-Forwarded-* and Forwarded are believed", []),
  resolvers: may(many(ResolverSchema, "an address"), "asked for dns: and srv: servers; else the machine's", []),
  limits: may(Limits, "how much at once, against abuse", {}),
  log: may(Log, "combined, json or off; or {format, sample}: a share of what succeeds", "combined"),
  name_routes: may(Bool, "true: every service answers under /<its name>/..., prefix stripped", false),
  defaults: may(SettingsMap, "any key of a service, for all services", {}),
  services: may(
    dict(ServiceName, ServiceSchema, "{ shop: { servers: [localhost:8081] } }"),
    "servers that answer the same",
    {},
  ),
  hosts: may(mapList(HostRoute, "{ host: a.example, service: shop }"), "one host to some servers", []),
  paths: may(mapList(PathRoute, "{ path: /api, service: shop }"), "one path to some servers", []),
  routes: may(mapList(AnyRoute, "{ path: /api, service: shop }"), "the general form", []),
  default: may(Default, "when nothing matches; without it 404"),
  tcp: may(
    mapList(Tcp, "{ listen: 5432, servers: [localhost:5433] }"),
    "connections that are not HTTP, to some servers",
    [],
  ),
  fleet: may(
    FleetSchema,
    "instances that share this file and what they know of servers, and the etcd through which they do",
  ),
});

/** A service, as it is parsed. Times are milliseconds, shares from 0 to 1. */
interface ServiceConfig extends Policy {
  servers: ServerConfig[];
  strategy: { name: string; by: Hashed | "none"; key: string };
  health: {
    kind: "http" | "grpc" | "tcp" | "off";
    path: string;
    interval: number;
    timeout: number;
    expect: [from: number, to: number][]; // statuses
    body: string;
    grpc?: string | undefined;
    rise: number;
    fall: number;
    method: string;
    headers: Map<string, string>;
  };
  eject: { failures: number; for: number; slow: number; at_most: number }; // Infinity: never
  slow_start: number;
  panic: number;
  retry_budget: number;
  hedge: number; // 0: off
  max_in_flight: number; // Infinity: any number; 0: auto
  queue: { size: number; timeout: number }; // size 0: off
  fallback: string; // empty: none
  sticky: { cookie: string; secret?: string | undefined; max_age: number }; // no cookie: off
  tls: { ca: string; cert: string; key: string; servername: string; insecure: boolean };
  http: 1 | 2 | "auto";
}

/** What a header or a query parameter has to be. */
type Condition =
  | { name: string; kind: "is"; value: string }
  | { name: string; kind: "regex"; source: string }
  | { name: string; kind: "present"; present: boolean };
/** A path, as a route names it; prefixes without a slash at their end. `{name}` stands for any one segment. */
type PathRule = { kind: "prefix" | "exact"; path: string } | { kind: "regex"; source: string };
/** A service that a route leads to: its share, the policy of the route there, and the fallback in its place. */
type Target = { service: string; weight: number; policy: Policy; fallback: Target | undefined };
/** What a route does with a request. */
type Action =
  | { kind: "forward"; targets: Target[] }
  | {
    kind: "redirect";
    to: string; // literally; empty: the parts that follow, each of which may be empty or 0
    scheme: "http" | "https" | "";
    host: string;
    port: number;
    path: string;
    status: number;
  }
  | { kind: "respond"; status: number; body: string; headers: Map<string, string> };
/** How often a client may ask: by its address, or by a header where `by` names one. */
interface Rate {
  requests: number;
  per: number; // milliseconds
  by: string;
  burst: number;
}
/** An address to listen on. */
interface Address {
  host: string; // empty: all addresses of this machine
  port: number;
}
/** Where clients connect: without `tls` over plain TCP. */
interface ListenerConfig extends Address {
  tls: { cert: string; key: string }[];
  client_ca: string;
  h2c: boolean;
  mode?: number | undefined; // of a Unix socket
}
/** Rules for headers, by their lower-case names. */
interface HeaderRules {
  set: Map<string, string>;
  add: Map<string, string>;
  remove: string[];
}
/** A route in the general form, as it is parsed. */
interface RouteConfig {
  name: string;
  hosts: string[]; // empty: any
  paths: PathRule[]; // empty: any
  scheme: "http" | "https" | ""; // empty: any
  methods: string[]; // empty: any
  headers: Condition[];
  query: Condition[];
  action: Action;
  policy: Policy; // of its first service
  fallback: boolean; // it is `default`
  rewrite: { kind: "none" | "replace" | "whole"; path: string; host: string };
  request: { headers: HeaderRules; query: { set: Map<string, string>; remove: string[] } };
  response: { headers: HeaderRules };
  mirror: { service: string; percent: number };
  allow: string[];
  deny: string[];
  rate?: Rate | undefined;
  body_limit: number; // bytes; Infinity: none
}
/** Listeners whose connections go to one service as they are. */
interface TcpConfig extends Pick<RouteConfig, "name" | "allow" | "deny"> {
  listen: ListenerConfig[];
  proxy_protocol: boolean;
}
/** The fleet that an instance belongs to. */
interface FleetConfig {
  etcd: string[]; // URLs without a slash at their end
  prefix: string;
  name: string; // empty: of host and process
  user: string;
  password: string;
  tls: ServiceConfig["tls"];
  ttl: number; // milliseconds
  probers: number;
  durable: string; // a binding of the edge; empty: none
}

/** A whole file, as it is parsed: nothing is optional any more. */
interface Config {
  listen: ListenerConfig[];
  admin?: { listen: Address; token?: string | undefined; read_token?: string | undefined } | undefined;
  trust: string[];
  resolvers: string[]; // address:port
  limits: {
    requests: number; // this and the next three: Infinity is none
    per_client: number;
    connections: number;
    client_connections: number;
    header: number; // milliseconds
    keep_alive: number; // milliseconds
    header_size: number; // bytes
    header_fields: number;
  };
  log: { format: "combined" | "json" | "off"; sample: number };
  name_routes: boolean;
  services: Map<string, ServiceConfig>;
  routes: RouteConfig[];
  tcp: TcpConfig[];
  fleet?: FleetConfig | undefined;
  source: Raw; // the file with short forms and all defaults written out
  text: string; // the file itself, and its name
  file: string;
  written: Raw; // its values as they are written: variables stay `${NAME}`
  places: Map<string, Keys>; // where in it each service stands
  warnings: string[]; // routes that are never reached, services that nothing leads to
}

// --- 1.4 YAML: from a text to plain values, and where in the file each stands ---

/** One thing that is wrong with a file, and where. */
interface Mistake {
  line: number;
  column: number;
  path: string;
  message: string;
}
const lineOf = (file: string, { line, column, path, message }: Mistake): string =>
  `${file}:${line}:${column}: ${path && `${path}: `}${message}`;
/** Everything that is wrong with a file, one mistake a line: `routes.yml:12:7: listen: 99999 is not a port`. */
export class ConfigError extends Error {
  override name = "ConfigError";
  mistakes: Mistake[];
  constructor(file: string, mistakes: Mistake[]) {
    super(mistakes.map((mistake) => lineOf(file, mistake)).join("\n"));
    this.mistakes = mistakes;
  }
}
type Env = Record<string, string | undefined>;

/** Says what is wrong with the value at a path, with its key, or at an offset of the text. */
type Report = (path: Keys, message: string, at?: "key" | "value" | number) => unknown;
type Complain = (message: string) => unknown;
const MOST = { bytes: 2 ** 20, values: 100_000, depth: 32, mistakes: 50 };
const SECRET = /token|secret|password|authorization|cookie|api[-_]?key/i;

const dotted = (path: Keys) =>
  path.reduce<string>((text, key) => {
    if (typeof key === "number") return `${text}[${key}]`;
    return /^[\w-]+$/.test(key) ? text + (text && ".") + key : `${text}[${JSON.stringify(key)}]`;
  }, "");
/** A value as a message shows it: short, on one line, and without the password of a URL. */
const quote = (value: unknown) => {
  if (value === null || value === undefined) return "an empty value";
  if (typeof value === "object") return Array.isArray(value) ? "a list" : "a map";
  if (typeof value !== "string") return String(value);
  const text = value.replace(/^(\w+:\/\/)?.*@/s, "$1***@");
  return JSON.stringify(text.length > 58 ? `${text.slice(0, 56)}...` : text);
};

/** In `{ port: ${PORT} }` the inner braces would be YAML's: they change places with two characters of no meaning. */
const wrapVariables = (text: string) => text.replace(/\$\{(\w+)\}/g, "$\ue000$1\ue001");
const unwrapped = (text: string) => text.replace(/\$\ue000(\w+)\ue001/g, "${$1}");
/** `${NAME}` is the variable, `$${` is `${`. */
const expanded = (text: string, env: Env, complain: Complain) =>
  text.replace(/\$\$\{|\$\{([^}]*)\}?/g, (whole, name?: string) => {
    if (name === undefined) return "${";
    const value = Object.hasOwn(env, name) ? env[name] : undefined;
    if (!/^[a-z_]\w*$/i.test(name)) {
      complain(`${quote(whole)} is not a variable such as \${NAME}; \${ itself is written $\${`);
    } else if (value === undefined) complain(`the environment variable ${name} is not set`);
    return value ?? "";
  });

/** Numbers and truths that can be written in no other way. All else is text, such as 1.10, 007 and True. */
const EXACT: ScalarTag = {
  tag: "tag:yaml.org,2002:float",
  default: true,
  test: /^(?:true|false|-?[1-9]\d{0,14}(?:\.\d{0,9}[1-9])?|0(?:\.\d{0,9}[1-9])?)$/,
  identify: (value) => typeof value === "number" || typeof value === "boolean",
  resolve: (text) => JSON.parse(text),
  stringify: ({ value }) => String(value),
};
/** The YAML of a text. Every scalar is text, a number or a truth; the schema says what it means. */
const parseYaml = (text: string, lineCounter = new LineCounter()): Document.Parsed =>
  parseDocument(wrapVariables(text), {
    ...{ schema: "failsafe", customTags: ["null", EXACT] },
    ...{ stringKeys: true, uniqueKeys: false, prettyErrors: false, lineCounter },
  });

const keyText = ({ key }: YamlPair): string => {
  const { source, value } = key as Scalar;
  return unwrapped(String(source ?? value));
};
const offsetOf = (node: unknown): number => (node as Node | null)?.range?.[0] ?? 0;

/** What is found wrong with a file, and where its values and their keys stand: offsets in the text, by their paths. */
function newFindings(file: string) {
  const found = new Map<string, { path: Keys; message: string; at: "key" | "value" | number }>();
  const places = new Map<string, { key: number; value: number }>(), lines = new LineCounter();
  const say: Report = (path, message, at = "value") => {
    const key = JSON.stringify(typeof at === "number" ? [at, message] : [path, message, at]); // aliases repeat a place
    if (found.size < 20 * MOST.mistakes && !found.has(key)) found.set(key, { path, message, at });
  };
  /** Of what a short form leaves out, the place of the short form. */
  const offsetAt = (path: Keys, what: "key" | "value"): number =>
    places.get(dotted(path))?.[what] ?? (path.length ? offsetAt(path.slice(0, -1), what) : 0);
  /** All mistakes with their places, in the order of the file. */
  const list = (): Mistake[] => {
    const placed = [...found.values()].map(({ path, message, at }) => {
      const { line, col } = lines.linePos(typeof at === "number" ? at : offsetAt(path, at));
      return { line: line || 1, column: col || 1, path: dotted(path), message };
    });
    return placed.sort((a, b) => a.line - b.line || a.column - b.column).slice(0, MOST.mistakes);
  };
  /** @throws {ConfigError} where there are any */
  const end = (): void => {
    if (found.size) throw new ConfigError(file, list());
  };
  return { lines, places, found, say, list, end };
}
type Findings = ReturnType<typeof newFindings>;

/**
 * The values of a document as they are written; with `env` variables and merge keys (`<<: *name` puts another map's keys
 * under the own ones, as in YAML 1.1) are what they stand for. No variable can bring in a key or a list.
 */
function valuesOf(doc: Document, { say, places }: Findings = newFindings(""), env?: Env): unknown {
  const targets = new Map<unknown, Node | undefined>(), anchors = new Map<string, Node>();
  visit(doc, {
    Alias: (_, alias) => void targets.set(alias, anchors.get(alias.source)), // the last one above it
    Value: (_, node) => void (node.anchor && anchors.set(node.anchor, node)),
  });
  let count = 0;
  const read = (node: unknown, path: Keys, key = node, value = node): unknown => {
    if (++count > MOST.values) throw new RangeError(`more than ${MOST.values} values`); // an alias bomb, say
    places.set(dotted(path), { key: offsetOf(key), value: offsetOf(value ?? key) });
    if (path.length > MOST.depth) return void say(path, `nested deeper than ${MOST.depth} levels`);
    if (isSeq(node)) return node.items.map((item, i) => read(item, [...path, i]));
    if (isMap(node)) return readMap(node.items, path, key, value);
    if (isAlias(node)) {
      const target = targets.get(node);
      if (target) return read(target, path, key, value);
      say(path, `*${node.source} names nothing above; text that begins with * stands in quotes`, offsetOf(node));
      return null;
    }
    const written = isScalar(node) ? node.value : null;
    if (typeof written !== "string") return written;
    return env ? expanded(unwrapped(written), env, (message) => say(path, message)) : unwrapped(written);
  };
  const readMap = (items: YamlPair[], path: Keys, key: unknown, value: unknown): Raw => {
    const pairs = new Map<string, YamlPair>();
    for (const pair of items) {
      const name = keyText(pair);
      if (pairs.has(name)) say([...path, name], "stands twice", offsetOf(pair.key));
      pairs.set(name, pair);
    }
    const merge = env && pairs.get("<<")?.value, list = targets.get(merge) ?? merge;
    if (env) pairs.delete("<<");
    const sources = [isSeq(list) ? list.items.toReversed() : merge ?? []].flat(); // the first one wins
    const brought = sources.flatMap((source) => {
      const values = read(source, path, key, value);
      if (!isRecord(values)) say([...path, "<<"], `${quote(values)} is not a map, as in <<: *name`, offsetOf(source));
      return Object.entries(mapOf(values));
    });
    const own = [...pairs].map(([name, { key, value }]) => [name, read(value, [...path, name], key, value)] as const);
    return Object.fromEntries([...brought, ...own]);
  };
  return read(doc.contents, []);
}

/** What the parser says in terms of YAML's grammar, in other words. */
const YAML_ERRORS: [what: RegExp, sentence: string][] = [
  [/^MULTIPLE_DOCS/, "the file holds more than one document"],
  [/^NON_STRING_KEY/, "a key is a single word"],
  [/^BAD_ALIAS/, "text that begins with * stands in quotes"],
  [/ Flow \w+ .* end with a .$/, "is missing, or a line before it is not indented"],
  [/ Missing closing ["']quote$/, "is missing at the end of a text"],
  [/ Implicit (?:map )?keys need/, "this is no key with a value, as in listen: 8080"],
  [/ Nested mappings are not allowed/, "two keys stand on one line: an inner map has braces, or lines of its own"],
  [/ All mapping items must start/, "the keys of a map begin in the same column"],
  [/ Unexpected scalar at node end/, "something stands behind the end of a value"],
];
/** The YAML of a file, and its values; undefined, with reports, where it cannot be read. */
function readYaml(text: string, findings: Findings, env?: Env): { doc: Document; values: unknown } | undefined {
  const { lines, say } = findings;
  if (text.length > MOST.bytes) return void say([], "the file is larger than 1 MiB");
  try {
    const doc = parseYaml(text, lines);
    for (const { message, pos, code } of [...doc.errors, ...doc.warnings]) {
      if (message.includes("call stack")) throw new RangeError(message); // the parser's own
      const [, sentence] = YAML_ERRORS.find(([what]) => what.test(`${code} ${message}`)) ?? [];
      const [closing = ""] = /[\]}]$|["'](?=quote$)/.exec(message) ?? [];
      say([], sentence ? `${closing && `${closing} `}${sentence}` : unwrapped(message), pos[0]);
    }
    if (doc.errors.length) return undefined;
    const values = valuesOf(doc, findings, env);
    return values === null ? void say([], "the file is empty") : { doc, values };
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    return void say([], /call stack/.test(error.message) ? `nested deeper than ${MOST.depth} levels` : error.message);
  }
}

// --- 1.5 Checks and defaults: from plain values to a Config, or to every mistake in it ---

type Issue = v.BaseIssue<unknown>;
/** A union has the issues of all its options. Those with the longest paths are of the option that was meant. */
function flatten(issue: Issue, above: Keys = []): { issue: Issue; path: Keys }[] {
  const path = [...above, ...(issue.path ?? []).map((item) => item.key as string | number)];
  const below = issue.issues ?? [];
  const deeper = below.filter((sub) => sub.path?.length);
  const meant = deeper.length ? deeper : below.filter((sub) => sub.kind !== "schema" || flatten(sub)[0]!.issue !== sub);
  return meant.length ? meant.flatMap((sub) => flatten(sub, path)) : [{ issue, path }];
}
/** What other programs call it, by what it is called here; `a.b` is the key b in the map a. */
const ALIASES: Record<string, string> = {
  services: "upstream upstreams backend backends cluster clusters pool pools",
  service: "upstream backend cluster pool proxy_pass reverse_proxy",
  servers: "upstream upstreams backend backends target targets endpoint endpoints node nodes members server",
  url: "address addr host target server",
  routes: "rules locations route ingress",
  default: "default_backend default_service fallback catch_all",
  fallback: "backup_service",
  strategy: "balance lb_policy algorithm policy lb_method lb_algorithm load_balancing balancing mode",
  "least-connections": "leastconn least_conn least_connection leastconnections",
  "round-robin": "rr roundrobin round_robin wrr weighted weighted_round_robin static_rr",
  "two-choices": "p2c random_choose two_random power_of_two",
  "peak-ewma": "ewma peakewma",
  "least-response-time": "least_time leasttime least_latency fastest",
  "ip-hash": "source client_ip ip_hash source_ip src iphash",
  health: "healthcheck health_check healthchecks health_checks check probe probes health_uri httpchk active_health",
  path: "uri url location match rule prefix path_prefix pathprefix endpoint http http_get httpget",
  regex: "regexp path_regexp path_regex pattern re matches",
  exact: "equals equal full",
  expect: "status expect_status expected_status status_code expected_codes codes",
  fall: "unhealthy_threshold fails failure_threshold failures",
  rise: "healthy_threshold passes success_threshold successes",
  interval: "period inter every frequency",
  eject: "circuit_breaker circuitbreaker outlier_detection max_fails fail_timeout passive_health",
  for: "fail_timeout base_ejection_time duration",
  failures: "max_fails max_failures threshold errors consecutive_errors consecutive_5xx",
  retries: "retry max_retries num_retries attempts tries lb_retries redispatch retry_policy",
  retry_on: "proxy_next_upstream retry_conditions retry_if",
  max: "maxconn max_conns",
  max_in_flight: "max_connections max_conns maxconn max_requests concurrency",
  "limits.connections": "max_connections maxconn worker_connections",
  "limits.keep_alive": "keepalive_timeout keep_alive_timeout",
  connections: "max_connections maxconn worker_connections",
  rate: "rate_limit ratelimit limit_req rate_limiting throttle",
  requests: "limit average count rate",
  per: "period window interval time",
  client: "ip source src client_ip remote_addr",
  by: "key source",
  body_limit: "client_max_body_size max_body_size max_request_body max_body request_body",
  "timeouts.response": "proxy_read_timeout read_timeout response_timeout timeout_server server_timeout",
  "timeouts.connect": "connect_timeout proxy_connect_timeout dial_timeout timeout_connect",
  "timeouts.idle": "idle_timeout",
  "timeouts.request": "request_timeout client_body_timeout timeout_client",
  host_header: "pass_host_header preserve_host host_override",
  response: "read server header response_header ttfb receive",
  slow_start: "slowstart warmup warm_up",
  compress: "gzip compression encode brotli deflate",
  strip: "strip_prefix strippath strip_path handle_path",
  rewrite: "replace_path url_rewrite rewrite_target add_prefix",
  status: "code status_code",
  redirect: "redir return redirect_to",
  to: "url uri location target destination",
  respond: "static_response fixed_response direct_response return",
  split: "canary traffic_split weights weighted",
  mirror: "shadow request_mirror mirroring",
  trust: "trusted_proxies set_real_ip_from real_ip_from trusted trust_proxy forwarded_headers",
  log: "access_log accesslog logging logs",
  allow: "whitelist allowlist ip_whitelist ip_allowlist ip_allow_list",
  deny: "blacklist denylist ip_denylist block ip_deny_list",
  sticky: "session sessions session_affinity affinity stickiness sticky_session sticky_sessions cookie persistence",
  max_age: "ttl expires expiry lifetime",
  cookie: "name cookie_name",
  cert: "certificate cert_file ssl_certificate crt certfile",
  key: "key_file private_key ssl_certificate_key keyfile",
  tls: "ssl certificates https",
  size: "max length limit depth",
  http: "protocol proto http2 http_version",
  listen: "frontend frontends port ports bind address listeners listener entrypoints entry_points",
  host: "match rule domain domains hostname host_name server_name vhost",
  methods: "method verbs",
  "request.headers": "header_up proxy_set_header request_headers set_header",
  "response.headers": "header_down add_header response_headers",
  origin: "origins allow_origin allow_origins allowed_origins",
  allow_methods: "allowed_methods methods",
  allow_headers: "allowed_headers headers",
  credentials: "allow_credentials",
  admin: "api stats dashboard management metrics prometheus",
  ca: "ca_file root_ca trusted_ca ca_cert",
  servername: "sni server_name",
  insecure: "insecure_skip_verify skip_verify tls_insecure_skip_verify",
  proxy_protocol: "send_proxy send_proxy_v2",
  tcp: "stream streams",
};

const HSTS = "{ headers: { set: { strict-transport-security: max-age=31536000 } } }";
const NO_PASSWORDS = "nobody is asked for a password here: that is middleware of your own, with lb.ts as a library";
const NO_FILES = "no files are served here: name a server that does, such as servers: [localhost:8081]";
const COOKIE_IS = "it is HttpOnly and SameSite=Lax, over https also Secure";
/** Hints about keys of any map, or of one kind of map, which is recognized by another of its keys. */
const HINTS: [known: string, names: RegExp, hint: string][] = [
  ["", /^hsts$/, `write response: ${HSTS}`],
  ["", /^(?:basic_?)?auth$|^(?:jwt|oauth)$/, NO_PASSWORDS],
  ["", /^(?:root|file_server|static|files)$/, NO_FILES],
  ["", /^(?:workers|threads|nbthread|worker_processes)$/, "write --workers N on the command line"],
  ["", /^priority$/, "the more specific route wins"],
  ["name_routes", /^http$/, "what is in it stands at the top: services, routes and listen"],
  ["exact", /^(?:path_?)?prefix$/, "a path alone is a prefix, as in path: /api"],
  ["weight", /^port$/, 'the port belongs to the URL, as in { url: "10.0.0.1:8080" }'],
  ["weight", /^(?:name|id)$/, "a server's name is its host and port"],
  ["rise", /^(?:port|host|scheme)$/, "servers are probed where they are asked"],
  ["rise", /^(?:type|protocol|mode)$/, 'with path it is HTTP, with grpc: "" gRPC, else a TCP connect'],
  ["max_age", /^(?:secure|http_?only|same_?site)$/, COOKIE_IS],
];

const asWritten = (name: string): string => name.includes(".") ? name.replace(/\.(.*)/, ": { $1 }") : `"${name}"`;
const firstPart = (name: string): string => name.split(".")[0]!;
/** The keys of the maps that a value may be. */
function keysOfMaps(schema: Schema): string[] {
  const { wrapped, options = [], entries = {} } = partsOf(schema);
  return wrapped ? keysOfMaps(wrapped) : [...Object.keys(entries), ...options.flatMap(keysOfMaps)];
}
/** Where in a file a key belongs. */
function placesNamed(name: string): string[] {
  const key = firstPart(name), ways = { ...PLACE_KEYS, ...conditions, ...ACTION_KEYS, ...CHANGE_KEYS, ...POLICY_KEYS };
  const scopes = { "the top of the file": RoutesFile.entries, "a service": ServiceSchema.entries, "a route": ways };
  const { defaults: _, default: __, ...above }: Record<string, Schema> = Object.assign({}, ...Object.values(scopes));
  const outer = Object.keys(above).filter((one) => keysOfMaps(above[one]!).includes(key));
  return [
    ...Object.entries(scopes).filter(([, entries]) => Object.hasOwn(entries, key)).map(([scope]) => scope),
    ...outer.map((one) => one === "servers" ? `a server: { url, ${key} }` : `${one}: { ${key} }`),
  ];
}
/** At most three of them: `a, b or c`. */
const inWords = (words: string[]): string => {
  const some = words.slice(0, 3), last = some.pop();
  return some.length ? `${some.join(", ")} or ${last}` : `${last}`;
};
/** What may have been meant by a name: what is called so elsewhere, or by other programs, then what is spelt alike. */
function guess(wrong: string, known: string[], isKey = false): string {
  const plain = lower(wrong.replace(/(?<=[a-z])(?=[A-Z])|[-. ]+/g, "_"));
  const meant = Object.keys(ALIASES).filter((name) => ALIASES[name]!.split(" ").includes(plain));
  const hint = HINTS.find(([key, names]) => (!key || known.includes(key)) && names.test(plain));
  if (hint && isKey) return `; ${hint[2]}`;
  if (known.includes(plain)) return `; did you mean ${quote(plain)}?`;
  const isNew = meant.length === 0 && (!isKey || placesNamed(wrong).length === 0);
  const isPart = (name: string) => isNew && `_${plain}_`.includes(`_${name}_`); // queue_size: queue
  const here = [...meant.filter((name) => known.includes(firstPart(name))), ...known.filter(isPart)];
  if (here.length) return `; did you mean ${inWords(here.map(asWritten))}?`;
  const apart = (name: string) => distance(wrong, name), least = Math.min(...known.map(apart));
  const elsewhere = isKey && least > 1 && [wrong, ...meant].find((name) => placesNamed(name).length > 0);
  if (elsewhere) return `; ${asWritten(elsewhere).replaceAll('"', "")} belongs to ${inWords(placesNamed(elsewhere))}`;
  const isLike = (name: string) => apart(name) === least && (least < 2 || name[0] === wrong[0]); // http is not tcp
  const near = least <= Math.ceil(wrong.length / 3) ? known.filter(isLike) : [];
  return near.length ? `; did you mean ${inWords(near.map(quote))}?` : "";
}

/** Keys that somebody may look for beside those of tcp. */
const FOR_REQUESTS = new Set(Object.keys({ ...ROUTE_KEYS, ...Timeouts.entries }));

function reportIssue({ issue, path }: { issue: Issue; path: Keys }, say: Report): unknown {
  const name = String(path.at(-1)), ofKey = issue.path?.at(-1)?.origin === "key";
  if (issue.message === MISSING) return say(path.slice(0, -1), `${name} ${MISSING}`);
  if (issue.message === UNKNOWN_KEY) {
    const known = issue.input as string[];
    if (path[0] === "tcp" && FOR_REQUESTS.has(name)) {
      return say(path, "is for requests: tcp passes bytes as they are, and knows of none", "key");
    }
    return say(path, `${UNKNOWN_KEY}${guess(name, known, true) || `; allowed: ${known.join(", ")}`}`, "key");
  }
  const namesCookie = (i: number) => path[i] === "cookie" && /^(?:sticky|hash)$/.test(String(path[i - 1]));
  const isSecret = path.some((key, i) => SECRET.test(String(key)) && !namesCookie(i));
  const shown = ofKey ? quote(name) : isSecret ? "***" : quote(issue.input);
  return say(path, issue.message.replace(/^\$/, () => shown), ofKey ? "key" : undefined);
}

/** Reads a value that stands at a path; mistakes in it are reported. */
function readValue<S extends Schema>(schema: S, value: unknown, say: Report, at: Keys = []): Out<S> {
  const { issues = [], output } = v.safeParse(schema, value);
  for (const { issue, path } of issues.flatMap((one) => flatten(one))) {
    reportIssue({ issue, path: [...at, ...path] }, say);
  }
  return output as Out<S>;
}

/** A map of the file, and where it stands. */
type Placed = [path: Keys, own: Raw];
/** The maps at these keys of the file: those in a list or in a map of names, or the one map that stands there. */
const mapsIn = (file: Raw, ...keys: string[]): Placed[] =>
  keys.flatMap((key) => {
    const all = file[key], isOne = /^(?:admin|defaults?)$/.test(key);
    const inner = Array.isArray(all) ? [...all.entries()] : Object.entries(mapOf(all));
    const found = isOne ? [[[key], all]] : inner.map(([at, one]) => [[key, at], one]);
    return found.filter(([, one]) => isRecord(one)) as Placed[];
  });
/** Where a file says what becomes of requests, and of connections. */
const ENTRIES = ["hosts", "paths", "routes", "default"], ROUTED = [...ENTRIES, "tcp"];
const SEGMENT = /^(?!\.\.?$)[\w.~-]+$/;
/** What `name_routes` adds: a route for every service whose name can be a segment of a path. */
const nameRoutes = ({ name_routes, services }: Raw): Raw[] =>
  Object.keys(isTrue(name_routes) ? mapOf(services) : {}).filter((service) => SEGMENT.test(service))
    .map((service) => ({ path: `/${service}`, service, strip: true }));
const hasRoutes = (file: Raw): boolean => mapsIn(file, ...ENTRIES).length + nameRoutes(file).length > 0;
/** The listeners of a file that names none: port 8080, for HTTP; none where it has only TCP services. */
const usualListeners = (file: Raw): unknown => file.tcp && !hasRoutes(file) ? [] : 8080;
/** The items of a list, or the one value that stands in place of it. */
const itemsOf = (own: Raw, path: Keys, key: string): [path: Keys, item: unknown][] => {
  const value = own[key], at = [...path, key];
  if (value === undefined) return [];
  return Array.isArray(value) ? value.map((item, i) => [[...at, i], item]) : [[at, value]];
};
/** How many groups a path has: those of its regular expression, or none. */
function groupsOf(path: unknown): number {
  const { regex } = mapOf(path);
  try {
    return typeof regex === "string" ? RE2JS.compile(regex).groupCount() : 0;
  } catch { // the schema reports it
    return Infinity;
  }
}

/** Weights are of any sum, and percentages of 100. */
function checkShares(shares: unknown[], complain: Complain): void {
  const percent = shares.filter((share) => typeof share === "string" && share.endsWith("%"));
  const sum = percent.reduce<number>((sum, share) => sum + parseFloat(String(share)), 0);
  if (percent.length > 0 && percent.length < shares.length) complain("shares are all percentages, or all weights");
  else if (percent.length > 0 && Math.abs(sum - 100) > 0.5) complain(`the percentages add up to ${sum}%, not to 100%`);
  else if (shares.every((share) => share === 0)) complain("no service has a weight above 0");
}

/** A service that falls back to others must not come back to itself. */
function checkFallbacks(file: Raw, say: Report) {
  const usual = mapOf(file.defaults).fallback ?? "none", services = mapsIn(file, "services");
  const next = new Map(services.map(([[, name], own]) => [String(name), String(own.fallback ?? usual)]));
  for (const [path, own] of services) {
    const name = String(path[1]), way = [name];
    for (let one = next.get(name); one && one !== "none" && !way.includes(one, 1); one = next.get(one)) way.push(one);
    if (way.length < 2 || way.at(-1) !== name) continue;
    say(own.fallback ? [...path, "fallback"] : ["defaults", "fallback"], `falls back to itself: ${way.join(" -> ")}`);
  }
}

const HASH_OF =
  "hash needs what to hash, as in { hash: { header: x-user } }, or cookie, query, path: true, client: true";
/** Reports names that nothing has; without `names` they are not known, and it has been said why. */
const checkName = (
  say: Report,
  path: Keys,
  name: unknown,
  what: string,
  names: string[] | undefined,
  at?: "key",
): void => {
  if (!names || typeof name !== "string" && typeof name !== "number" || names.includes(`${name}`)) return;
  const there = names.join(", ").slice(0, 200) || "there is none", isStatus = /^[2-5]\d\d$/.test(`${name}`);
  const hint = isStatus ? `; a status is { respond: ${name} }` : guess(`${name}`, names);
  say(path, `${quote(name)} is not a ${what} (${there})${hint}`, at);
};
/** Checks a route, or `default`, by itself. */
function checkRoute([path, own]: Placed, services: string[] | undefined, say: Report): void {
  const has = ACTIONS.filter((name) => Object.hasOwn(own, name)), but = has.length ? `, not ${has.join(" and ")}` : "";
  const isMisnamed = Object.keys(own).some((key) => !Object.hasOwn(ROUTE_KEYS, key) && guess(key, ACTIONS)); // said already
  if (has.length > 1 || !has.length && !isMisnamed) say(path, `needs exactly one of ${ACTIONS.join(", ")}${but}`);
  for (const key of ["host", "path", "allow"]) { // it would stand for any, where somebody may have taken out the last
    if (Array.isArray(own[key]) && !own[key].length) say([...path, key], `is empty: leave ${key} out for any`);
  }
  checkName(say, [...path, "service"], own.service, "service", services);
  checkName(say, [...path, "mirror", "service"], mapOf(own.mirror).service, "service", services);
  const split = Object.entries(mapOf(own.split));
  for (const [name] of split) checkName(say, [...path, "split", name], name, "service", services, "key");
  if (isRecord(own.split)) {
    checkShares(split.map(([, share]) => share), (message) => say([...path, "split"], message));
  }
  for (const key of has.includes("servers") ? [] : Object.keys(own)) {
    if (!Object.hasOwn(settings, key) || Object.hasOwn(POLICY_KEYS, key)) continue;
    say([...path, key], "belongs to a service: it stands there, or beside servers", "key");
  }
  const isReply = has.length === 1 && (has[0] === "redirect" || has[0] === "respond");
  if (isReply && own.cors && own.cors !== "off") {
    say([...path, "cors"], `is for answers of servers: a ${has[0]} has headers of its own under response`, "key");
  }
  const groups = Math.min(...[own.path].flat().map(groupsOf)), rewritten = String(mapOf(own.rewrite).path);
  const group = Math.max(0, ...[...rewritten.matchAll(/\$(\d+)/g)].map((found) => Number(found[1])));
  if (group > groups) say([...path, "rewrite", "path"], `$${group} is none of the groups of every path`);
  if (isTrue(own.strip) && own.rewrite) say([...path, "strip"], "strip and rewrite exclude each other", "key");
}
/** Checks what the schema cannot: names that other places of the file give, and keys that do not go together. */
function checkFile(file: Raw, more: string[], say: Report) {
  const services = isRecord(file.services ?? {}) ? Object.keys(mapOf(file.services)) : undefined;
  const taken = { routes: new Set<string>(), services: new Set(services) };
  for (const [path, own] of mapsIn(file, "defaults", "services", ...ROUTED)) {
    if (own.strategy === "hash") say([...path, "strategy"], HASH_OF);
    else checkName(say, [...path, "strategy"], own.strategy, "strategy", [...STRATEGIES, ...more]);
    if (own.fallback !== "none") checkName(say, [...path, "fallback"], own.fallback, "service", services);
    checkServers([path, own], say);
    if (!ROUTED.includes(String(path[0]))) continue;
    const isTcp = path[0] === "tcp", name = `${own.name ?? ""}`, names = isTcp ? taken.services : taken.routes;
    if (name && names.has(name)) {
      say([...path, "name"], `${quote(own.name)} names another ${isTcp ? "service" : "route"} already`);
    }
    names.add(name);
    if (!isTcp) checkRoute([path, own], services, say);
    else if (isRecord(own.strategy) && !mapOf(own.strategy.hash).client) {
      say([...path, "strategy"], "there is no request whose parts could be hashed; {hash: {client: true}} works");
    }
  }
  checkFallbacks(file, say);
  checkPorts(file, say);
  if (Array.isArray(file.listen) && !file.listen.length && hasRoutes(file)) {
    say(["listen"], "is empty: nobody could ask");
  }
}

/** TCP services ask no server over TLS. HTTP/2 without TLS cannot be asked for: the URL has to say it. */
function checkServers([path, own]: Placed, say: Report): void {
  for (const [at, server] of itemsOf(own, path, "servers")) {
    const url = String(writtenServer(server));
    if (path[0] === "tcp" && /^https:/i.test(url)) {
      say(at, `${quote(url)} speaks TLS: tcp passes bytes as they are, and adds none`);
    } else if (String(own.http) === "2" && !/^(?:https|h2c):/i.test(url)) {
      say(at, `${quote(url)} is asked without TLS: for HTTP/2 write h2c://${url.replace(/^http:\/\//i, "")}`);
    }
  }
}

/** No two listeners have the same address. Port 0 is any that is free. */
function checkPorts(file: Raw, say: Report) {
  const taken = new Set<string>();
  const maps: Placed[] = [[[], file], ...mapsIn(file, "admin", "tcp")];
  for (const [at, one] of maps.flatMap(([path, own]) => itemsOf(own, path, "listen"))) {
    const address = String(isRecord(one) ? one.address : one);
    const full = address.replace(/^:?(?=\d+$)/, "0.0.0.0:");
    if (taken.has(full) && !/:0$/.test(full)) say(at, `${address} is listened on already`);
    taken.add(full);
    const { tls } = mapOf(one);
    if (Array.isArray(tls) && !tls.length) say([...at, "tls"], "is empty: without TLS leave it out");
  }
}

/** One place of the file over another: two maps are merged, anything else is replaced. */
const layer = (under: Raw, over: Raw): Raw => {
  const merge = (value: unknown, key: string) => isRecord(value) ? { ...mapOf(under[key]), ...value } : value;
  return { ...under, ...mapValues(over, merge) };
};
const PolicyMap = map(POLICY_KEYS), BUILT_IN = defaultsOf(SettingsMap);

/** Of the settings of a service those that are for connections, too. Without a request any hash is of the client. */
function tcpSettingsOf({ strategy, timeouts, ...others }: Raw): Raw {
  return {
    ...pickKeys(others, tcpSettings),
    strategy: isRecord(strategy) ? { hash: { client: true } } : strategy,
    timeouts: pickKeys(mapOf(timeouts), TcpTimeouts.entries),
  };
}
const unique = (name: string, taken: { has(name: string): boolean }) => {
  let free = name;
  for (let i = 2; taken.has(free); i++) free = `${name}#${i}`;
  return free;
};
const READ_ERRORS: Partial<Record<string, string>> = {
  ENOENT: "there is no such file",
  EACCES: "this user may not read it",
  EISDIR: "it is a folder",
};
/** Why a file cannot be read, in the same words on all runtimes. */
function whyUnreadable(error: unknown): string {
  if (error instanceof TypeError) return "it is not UTF-8: save it in that encoding"; // TextDecoder's
  const { code = "", message } = error as Error & { code?: string };
  return READ_ERRORS[code] ?? message;
}
/** Files that routes.yml names lie beside it, unless their names begin at the root. */
const beside = (file: string, name: string): string =>
  !name || /^(?:[a-z]:)?[/\\]/i.test(name) ? name : file.replace(/[^/\\]*$/, "") + name;
function locateFiles(file: string, services: Pick<ServiceConfig, "tls">[], listeners: ListenerConfig[]): void {
  for (const service of services) {
    const { ca, cert, key } = service.tls;
    service.tls = { ...service.tls, ca: beside(file, ca), cert: beside(file, cert), key: beside(file, key) };
  }
  for (const at of listeners) {
    at.tls = at.tls.map(({ cert, key }) => ({ cert: beside(file, cert), key: beside(file, key) }));
    at.client_ca = beside(file, at.client_ca);
  }
}

type FileRead = Out<typeof RoutesFile>;
type EntryRead = Out<typeof AnyRoute>;
/** Every entry in the general form, and a service for each that lists servers. `file` gets all defaults written in. */
function expandConfig(file: Raw, read: FileRead, say: Report) {
  const base = layer(BUILT_IN, mapOf(file.defaults)), raws = new Map<string, Raw>();
  const services = new Map<string, ServiceConfig>(), places = new Map<string, Keys>();
  const add = (name: string, [path, raw]: Placed, isTcp = false) => {
    const all = layer(base, pickKeys(raw, settings));
    Object.assign(raw, isTcp ? tcpSettingsOf(all) : all);
    services.set(name, readValue(ServiceSchema, pickKeys(raw, ServiceSchema.entries), say, path));
    raws.set(name, raw);
    places.set(name, path);
  };
  for (const placed of mapsIn(file, "services")) add(String(placed[0][1]), placed);
  const generated = nameRoutes(file).map((raw): Placed => [[], raw]);
  const entries = [...mapsIn(file, "hosts", "paths", "routes"), ...generated, ...mapsIn(file, "default")];
  const names = new Set(entries.map(([, { name = "" }]) => String(name)));
  const routes = new Map<RouteConfig, Keys>(); // and where they stand in the file; those of `name_routes`: nowhere
  for (const [path, raw] of entries) {
    const means = path.length === 2 ? read[path[0] as "routes"][Number(path[1])]! : v.parse(AnyRoute, raw);
    const { host: hosts, path: paths, strip, service, servers, split, rewrite: rule, ...others } = means as EntryRead;
    const fallback = path[0] === "default";
    const where = [hosts, paths.map((rule) => rule.kind === "regex" ? rule.source : rule.path || "/")].join("");
    const name = others.name || unique(where || (fallback ? "default" : "any"), names);
    names.add(name);
    const own = servers ? unique(name, services) : service;
    if (servers) add(own!, [path, raw]);
    const said = pickKeys(raw, POLICY_KEYS), isSilent = Object.keys(said).length === 0;
    const policyOver = (under: Raw) =>
      readValue(PolicyMap, layer(pickKeys(under, POLICY_KEYS), said), say, path) as Policy;
    const target = ([name, weight]: [string, number]): Target => {
      const config = services.get(name)!, { fallback } = config;
      return {
        ...{ service: name, weight, policy: isSilent ? config : policyOver(raws.get(name)!) },
        fallback: services.has(fallback) ? target([fallback, 0]) : undefined, // none, or one that is not valid
      };
    };
    const targets = [...own === undefined ? split ?? [] : [[own, 1] as [string, number]]].map(target);
    const action: Action = others.redirect ?? others.respond ?? { kind: "forward", targets };
    const policy = targets[0]?.policy ?? policyOver(base);
    const made = { name, hosts, paths, action, fallback, policy, rewrite: strip ? { ...rule, kind: "replace" } : rule };
    routes.set({ ...pickKeys(others, { ...conditions, ...CHANGE_KEYS }), ...made } as unknown as RouteConfig, path);
  }
  const tcp = mapsIn(file, "tcp").map(([path, raw]): TcpConfig => {
    const { listen, proxy_protocol, allow, deny, name: given } = read.tcp[Number(path[1])]!;
    const { host, port } = listen[0]!, name = unique(given || `tcp:${isUnix(host) ? host : port}`, services);
    add(name, [path, raw], true);
    return { listen, name, proxy_protocol, allow, deny };
  });
  const source = { ...defaultsOf(RoutesFile), ...file, defaults: base };
  return { services, places, routes, tcp, source };
}

/** Among routes of one place those with a method, then with more conditions go first. */
const rankOf = ({ methods, headers, query }: Pick<RouteConfig, "methods" | "headers" | "query">): number =>
  (methods.length ? 1e6 : 0) + headers.length * 1e3 + query.length;
/** Whether what `inner` takes by method, headers and query `outer` takes too. */
function includesAll(outer: RouteConfig, inner: RouteConfig): boolean {
  const has = (all: Condition[]) => (one: Condition) =>
    all.some((other) => JSON.stringify(one) === JSON.stringify(other));
  const methods = !outer.methods.length ||
    inner.methods.length > 0 && inner.methods.every((one) => outer.methods.includes(one));
  return methods && outer.headers.every(has(inner.headers)) && outer.query.every(has(inner.query));
}
/** A host and the wildcards above it, or a path and the prefixes above it; the empty one is any. */
const hostsAbove = (host: string): string[] => {
  const labels = host.replace(/^\*\./, "").split(".");
  return [host, ...labels.map((_, i) => `*.${labels.slice(i + 1).join(".")}`), ""];
};
const pathsAbove = (path: string): string[] => {
  const segments = path.replace(/\/$/, "").split("/");
  return segments.map((_, i) => segments.slice(0, segments.length - i).join("/"));
};
/** The folder of all paths that a regular expression takes; empty where that is not plain. */
const folderOf = (regex: string): string => {
  const literal = regex.includes("|") ? "" : /^\^((?:[\w/-](?![*?+{]))*)/.exec(regex)?.[1] ?? "";
  return literal.slice(0, literal.lastIndexOf("/") + 1);
};

/**
 * Finds the routes that take all requests of another one before it is asked: at the same place without further conditions;
 * a prefix above a regular expression; and those of a scheme, which are asked before all others.
 */
function findShadows(routes: RouteConfig[]): Map<RouteConfig, RouteConfig[]> {
  const order = new Map(routes.map((route, i) => [route, i])), at = new Map<string, RouteConfig[]>();
  const spotKey = (scheme: string, host: string, kind: string, path: string) =>
    [scheme, host, kind, path.replace(/\{\w+\}/g, "{}")].join(" ");
  const spotsOf = ({ scheme, hosts, paths }: RouteConfig) =>
    (hosts.length ? hosts : [""]).flatMap((host) =>
      (paths.length ? paths : [{ kind: "prefix" as const, path: "" }]).map((rule) => {
        const isRegex = rule.kind === "regex", path = isRegex ? rule.source : rule.path;
        const above = pathsAbove(isRegex ? folderOf(path) : path);
        return { host, isRegex, above, key: spotKey(scheme, host, rule.kind, path) };
      })
    );
  for (const route of routes) for (const { key } of spotsOf(route)) getOrMake(at, key, () => []).push(route);
  const shadows = new Map<RouteConfig, RouteConfig[]>();
  for (const route of routes) {
    const find = (keys: string[], isBefore = (one: RouteConfig) => !one.fallback) =>
      keys.flatMap((key) => at.get(key)!).find((one) =>
        one && one !== route && isBefore(one) && includesAll(one, route)
      );
    const isEarlier = (one: RouteConfig) => rankOf(one) === rankOf(route) && order.get(one)! < order.get(route)!;
    const covers = spotsOf(route).flatMap(({ host, isRegex, above, key }) => {
      const prefixes = (scheme: string, host: string) => above.map((path) => spotKey(scheme, host, "prefix", path));
      const own = find([key], isEarlier) ?? (isRegex ? find(prefixes(route.scheme, host)) : undefined);
      if (own || route.scheme) return own;
      return ["http", "https"].map((scheme) => find(hostsAbove(host).flatMap((one) => prefixes(scheme, one))));
    });
    if (!covers.includes(undefined)) shadows.set(route, [...new Set(covers as RouteConfig[])]);
  }
  return shadows;
}

/** What a route may say about requests that go to servers. */
const FOR_SERVERS = ["strip", "rewrite", "request", "mirror", "retries", "retry_on", "compress", "host_header"];

/** Warns of routes that no request can reach, of services that no route leads to, and of keys without effect. */
function warn({ routes, services, places, source }: ReturnType<typeof expandConfig>, say: Report): void {
  for (const [route, covers] of findShadows([...routes.keys()])) {
    const path = routes.get(route)!, verb = covers.length > 1 ? "take" : "takes";
    const names = covers.slice(0, 3).map((one) => dotted(routes.get(one)!) || "name_routes").join(" and ");
    if (path.length) say(path, `can never be reached: ${names} ${verb} all of its requests`);
  }
  for (const [{ paths }, path] of routes) {
    for (const rule of paths) {
      if (rule.kind !== "prefix" || !/[^/]:[a-z]/i.test(rule.path)) continue; // {exact: ...} is meant
      say([...path, "path"], `${quote(rule.path)} has its colon literally: any one segment is :id or {id}`);
    }
  }
  const used = new Set<string>();
  const use = ({ service, fallback }: Target): unknown => used.add(service) && fallback && use(fallback);
  for (const { action, mirror } of routes.keys()) {
    if (action.kind === "forward") action.targets.forEach(use);
    used.add(mirror.service);
  }
  for (const [path, entry] of mapsIn(source, ...ENTRIES)) {
    const action = entry.redirect ? "redirect" : entry.respond && "respond";
    for (const key of action ? FOR_SERVERS : []) {
      if (!/^(?:undefined|false|off)$/.test(String(entry[key]))) {
        say([...path, key], `has no effect: a ${action} asks no server`, "key");
      }
    }
  }
  for (const [path] of mapsIn(source, "services")) {
    if (!used.has(String(path[1]))) say(path, "nothing leads to this service", "key");
  }
  for (const [name, { sticky: { secret } }] of services) {
    if (!secret || secret.length >= 16) continue;
    const message = "has fewer than 16 characters and can be guessed: openssl rand -hex 16 makes a longer one";
    say([...places.get(name)!, "sticky", "secret"], message);
  }
}

/** What a text is read with. */
interface ParseOptions {
  /** Where `${NAME}` is taken from. */
  env?: Env;
  /** Its name, for messages, and for the names of files in it, which are relative to it. */
  file?: string;
  /** Strategies beside the built-in ones, by the names that the text may say. */
  strategies?: Record<string, unknown>;
}

/** The YAML of each config, for changes over the API. */
const YAML_OF = new WeakMap<Config, Document>();
/**
 * Reads routes.yml (YAML, and so JSON): once from text to values, which the schema checks once.
 * @throws {ConfigError} with all mistakes, in the order of the file
 */
export function parseConfig(text: string, options: ParseOptions = {}): Config {
  const { env = {}, file = "routes.yml", strategies: own = {} } = options;
  const findings = newFindings(file), { found, say } = findings;
  const yaml = readYaml(text, findings, env), unread = new Set([...found.values()].map(({ path }) => dotted(path)));
  if (!yaml || unread.has("")) throw new ConfigError(file, findings.list());
  const isRead = ([key]: [string, unknown]) => !key.startsWith("x-"); // the others hold what anchors name, as in Compose
  const raw = isRecord(yaml.values) ? Object.fromEntries(Object.entries(yaml.values).filter(isRead)) : yaml.values;
  const sayMore: Report = (path, message, at) => unread.has(dotted(path)) || say(path, message, at);
  const long = longForm(RoutesFile, raw);
  if (isRecord(long) && long.listen === undefined) long.listen = usualListeners(long);
  const read = readValue(RoutesFile, long, sayMore);
  if (isRecord(long)) checkFile(long, Object.keys(own), sayMore);
  findings.end();
  const made = expandConfig(long as Raw, read, say), { services, places, routes, tcp, source } = made;
  const { listen, admin, trust, resolvers, limits, log, name_routes, fleet } = read, [first = "shop"] = services.keys();
  const isLater = name_routes && !services.size || fleet; // services come over the API, or all of it from the fleet
  if (!routes.size && !tcp.length && !isLater) {
    say([], `no way leads to a server: write default: ${first}, or hosts, paths, routes or tcp`);
  }
  findings.end();
  locateFiles(file, [...services.values(), ...fleet ? [fleet] : []], [...listen, ...tcp.flatMap((one) => one.listen)]);
  warn(made, say);
  const config: Config = {
    ...{ listen, admin, trust, resolvers, limits, log, name_routes, fleet, services, routes: [...routes.keys()], tcp },
    ...{ source, text, file, written: mapOf(valuesOf(yaml.doc)), places },
    warnings: findings.list().map((one) => lineOf(file, one)),
  };
  YAML_OF.set(config, yaml.doc);
  return config;
}

/**
 * A text as it is written: it can be read, variables stay `${NAME}`, and nothing else is checked.
 * @throws {ConfigError} where it cannot be read
 */
function readAsWritten(text: string, file: string): { doc: Document; values: unknown } {
  const findings = newFindings(file), yaml = readYaml(text, findings);
  findings.end();
  return yaml!;
}

type Refer = (schema: Schema, key: string) => Raw;
/** JSON Schema of what may be written at a key. `refer` gives that of its parts, in full or as a reference. */
function schemaJson(schema: Schema, refer: Refer, key = "value"): Raw {
  const { json, about, type, literal, wrapped, default: usual } = partsOf(schema);
  const { entries, oneOf: oneKey, values, options, item, least } = partsOf(schema);
  const own = about === undefined ? {} : { description: about };
  if (json) return { ...own, ...json };
  if (type === "nullable") return { ...own, anyOf: [refer(wrapped!, key), { type: "null" }] };
  if (type === "picklist") return { ...own, type: "string", enum: options };
  if (wrapped && about === undefined && usual === undefined) return refer(wrapped, key);
  if (wrapped) return { ...schemaJson(wrapped, refer, key), ...own, ...usual !== undefined && { default: usual } };
  if (type === "literal") return { anyOf: [{ const: literal }, { type: "string", pattern: VARIABLE }] };
  if (item) return { type: "array", items: refer(item, key), ...least && { minItems: least } };
  if (values) return { ...own, type: "object", additionalProperties: refer(values, key) };
  if (entries) {
    const required = Object.keys(entries).filter((key) => !mayBeAbsent(entries[key]!));
    const properties = mapValues(entries, (one, key) => refer(one as Schema, key));
    const closed = type === "object" ? {} : { additionalProperties: false }; // all maps of the file are
    const one = oneKey && { oneOf: oneKey.map((key) => ({ required: [key] })) };
    return { ...own, type: "object", properties, required, ...closed, ...one };
  }
  if (!options) return { ...own, type };
  const all = options.map((one) => refer(one, key));
  const parts = all.flatMap((one) => Object.keys(one).join() === "anyOf" ? one.anyOf as Raw[] : [one]);
  const distinct = [...new Map(parts.map((one) => [JSON.stringify(one), one])).values()];
  return { ...own, ...distinct.length > 1 ? { anyOf: distinct } : distinct[0] };
}
/** JSON Schemas that refer to each other by their names in the API description. */
function schemasOf(schemas: Record<string, Schema>): Record<string, Raw> {
  const names = new Map(Object.entries(schemas).map(([name, schema]) => [schema, name]));
  const refer: Refer = (schema, key) =>
    names.has(schema) ? { $ref: `#/components/schemas/${names.get(schema)}` } : schemaJson(schema, refer, key);
  return Object.fromEntries(Object.entries(schemas).map(([name, schema]) => [name, schemaJson(schema, refer)]));
}
/** JSON Schema (draft-07) of routes.yml, for editors. What is long stands once, under the name of a key that holds it. */
export function jsonSchema(): Raw {
  const $defs: Record<string, Raw> = {}, names = new Map<string, string>();
  const refer: Refer = (schema, key) => {
    const json = schemaJson(schema, refer, key), text = JSON.stringify(json);
    if (text.length < 70) return json;
    let name = names.get(text) ?? key;
    for (let i = 2; !names.has(text) && Object.hasOwn($defs, name); i++) name = `${key}${i}`;
    names.set(text, name);
    $defs[name] = json;
    return { $ref: `#/$defs/${name}` };
  };
  const $schema = "http://json-schema.org/draft-07/schema#", file = schemaJson(RoutesFile, refer);
  return { $schema, ...file, patternProperties: { "^x-": {} }, $defs };
}

/** `hash: {cookie: lb}` and the like name a thing and hold no secret; `sticky: {secret: ...}` does. */
function maskSecrets(value: unknown, show: (text: string, secret: boolean) => unknown, key = "", above = ""): unknown {
  if (Array.isArray(value)) return value.map((item) => maskSecrets(item, show, key, above));
  if (isRecord(value)) {
    return mapValues(value, (one, name) => maskSecrets(one, show, name === "regex" ? key : name, key));
  }
  const names = /^(hash|split)$/.test(above) || above === "sticky" && key !== "secret";
  const secret = SECRET.test(key) && !names && typeof value !== "boolean";
  return secret || typeof value === "string" ? show(String(value), secret) : value;
}
/** What is in force, as a routes.yml with the defaults spelt out and secrets as `***`. */
export const printConfig = ({ source }: Config): string => {
  const shown = maskSecrets(source, (text, secret) => secret ? "***" : text.replaceAll("${", () => "$${"));
  return stringify(shown, { lineWidth: 0, aliasDuplicateObjects: false });
};

// -----------------------------------------------------------------------------------------------------------
// 2. Records
// The program's state as plain data. Each record lists what it is given first, then what changes while serving.
// Records of this chapter refer to each other; every later chapter works on them.
// -----------------------------------------------------------------------------------------------------------

// --- 2.1 Failures: why a request gets no response from a server, or only part of one ---

/** Every error response of the balancer. Clients see the text: short, and never a server's address or error. */
export const FAILURES = {
  "bad-request": { status: 400, text: "the request is not valid" },
  "bad-host": { status: 400, text: "the Host header is missing or not valid" },
  "bad-scheme": { status: 400, text: "this port speaks https, and the request is plain http" },
  "bad-body": { status: 400, text: "the request's body does not have its announced length" }, // or chunks that are not valid
  "denied": { status: 403, text: "this address may not ask" },
  "no-route": { status: 404, text: "no route fits this request" },
  "bad-method": { status: 405, text: "this method is not allowed here" },
  "client-timeout": { status: 408, text: "the request did not arrive in time" }, // or its client stopped reading
  "body-too-large": { status: 413, text: "the request's body is too large" },
  "uri-too-long": { status: 414, text: "the request's target is too long" },
  "bad-expect": { status: 417, text: "this expectation cannot be met" },
  "client-busy": { status: 429, text: "too many requests at once" },
  "flood": { status: 429, text: "too many frames that ask for nothing" },
  "rate": { status: 429, text: "too many requests" },
  "headers-too-large": { status: 431, text: "the request's headers are too large" },
  "client-left": { status: 499, text: "the client has left" },
  "internal": { status: 500, text: "the load balancer has failed" },
  "connect": { status: 502, text: "the server cannot be reached" }, // refused, unreachable, no such name, or TLS failed
  "reset": { status: 502, text: "the server closed the connection" },
  "invalid-answer": { status: 502, text: "the server's answer is not valid" }, // not HTTP/1.1, or ambiguous
  "busy": { status: 503, text: "too many requests at once" },
  "no-server": { status: 503, text: "no server may be asked" },
  "queue-full": { status: 503, text: "all servers are busy, and too many requests wait" },
  "queue-timeout": { status: 503, text: "all servers were busy for too long" },
  "draining": { status: 503, text: "the load balancer is ending" },
  "connect-timeout": { status: 504, text: "the server cannot be reached in time" },
  "timeout": { status: 504, text: "the server did not answer in time" },
  "idle": { status: 504, text: "the server stopped in the middle of its answer" },
  "deadline": { status: 504, text: "the call's deadline has passed" }, // which calls of gRPC give
  "bad-version": { status: 505, text: "this version of HTTP is not spoken here" },
  "loop": { status: 508, text: "the request has been here before" },
} as const;

/** A value of the header `x-lb-failure`. */
type FailureName = keyof typeof FAILURES;

/** Why an attempt gets no response, or only part of one: for reasons of its client, or of its server. */
export type Failure =
  | Extract<FailureName, "client-left" | "client-timeout" | "bad-body" | "body-too-large" | "deadline">
  | Extract<FailureName, "connect" | "connect-timeout" | "reset" | "invalid-answer" | "timeout" | "idle">;

/** A failure as an error, for the Fetch API. `sent`: the server may have seen some of the request. */
export class WireError extends Error {
  override name = "WireError";
  readonly kind: Failure;
  readonly sent: boolean;
  constructor(kind: Failure, sent: boolean, detail: string) {
    super(detail);
    this.kind = kind;
    this.sent = sent;
    this.stack = `${this.name}: ${detail}`; // a stack trace adds nothing, and runtimes print it
  }
}

/** What is reported of an error of a program: where it was thrown. */
const stackOf = (error: unknown): string => error instanceof Error ? error.stack ?? error.message : String(error);

// --- 2.2 Messages: requests, responses and their bodies as plain data ---

/** Received bytes. Never change them: Deno sends them as they are when the socket takes them, after `write`. */
type Bytes = Buffer<ArrayBuffer>;
const NO_BYTES: Bytes = Buffer.alloc(0);

/** Header fields as on the wire (RFC 9110 section 5): name, value, name, value, ... in the sender's order and case. */
type Fields = readonly string[];
const NO_FIELDS: Fields = [];

/** Receives a body: `data` any number of times, then exactly one of `end` and `fail`. */
interface BodyReader {
  data(bytes: Bytes): void;
  end(trailers: Fields): void;
  fail(why: Failure): void;
}

/** A body in transit, with one source and one reader. Bytes wait for the reader; at 256 KiB the source is paused. */
abstract class Body {
  /** The announced length in bytes; 0: empty; -1: unknown until its end. */
  abstract readonly length: number;
  /** The whole body if it is in memory: only then can it be read again. */
  abstract readonly bytes: Bytes | undefined;
  /** Most bytes to accept of a body on its way; a longer one fails with body-too-large. */
  declare limit?: number;
  abstract read(reader: BodyReader): void;
  pause(): void {}
  resume(): void {}
  /** Discards the rest. */
  cancel(): void {}

  /** The body for the Fetch API, read only as fast as its consumer reads. One that came as a stream is returned as that where possible. */
  stream(): ReadableStream<Uint8Array<ArrayBuffer>> {
    let begun = false, ended = false;
    const begin = (sink: ReadableStreamDefaultController<Uint8Array<ArrayBuffer>>) =>
      this.read({
        data: (bytes) => {
          sink.enqueue(bytes);
          this.pause();
        },
        end() {
          ended = true;
          sink.close();
        },
        fail(why) {
          ended = true;
          sink.error(new WireError(why, true, FAILURES[why].text));
        },
      });
    return new ReadableStream({
      pull: (sink) => {
        if (begun) return this.resume();
        begun = true;
        begin(sink);
      },
      cancel: () => {
        if (!ended) this.cancel();
      },
    }, { highWaterMark: 0 });
  }
}

/** The fields of a head, with what is derived from them once: the same heads come again and again. */
interface FieldBlock {
  readonly fields: Fields;
  /** The fields to forward; undefined: not derived yet. */
  passing: PassingFields | undefined;
  /** The client that sent this head last. */
  origin?: Origin | undefined;
  /** Whether it is of a call of gRPC; absent: not asked for yet. */
  grpc?: boolean;
}

/** The client of a request, its scheme and host: from the connection, or as trusted proxies report them. */
interface Origin {
  readonly peer: string; // the address that is connected
  readonly peerScheme: string; // http or https, as the peer is connected
  readonly trusts: (peer: string) => boolean; // whether a peer is a trusted proxy

  readonly client: string; // its address
  readonly scheme: string; // http or https, as the client speaks it
  readonly host: string; // with its port, as a trusted proxy reports it; empty: the request's own Host
  readonly port: string; // that the client has asked, as a trusted proxy reports it; else empty
  readonly chain: readonly string[]; // addresses from the client to the peer
  readonly isForwarded: boolean; // a trusted proxy has reported it
}

/** The request's fields that are forwarded, and the values of those that the balancer rewrites. */
interface PassingFields {
  readonly lines: string; // as wire text
  readonly via: string;
  latest?: { via: string; origin: Origin; named: string; host: string; text: string }; // of `commonLines`
}

/** The head of a request. */
interface RequestHead {
  readonly method: string;
  readonly target: string; // as sent: a path with its query, a URL, host:port, or *
  readonly version: "1.0" | "1.1" | "2.0";
  readonly block: FieldBlock;
  readonly host: string; // the Host header, else the URL's authority; empty: none
  readonly upgrade: string; // the protocol asked for by Upgrade; empty: none
  readonly trailers: boolean; // the client takes trailers (TE: trailers)
  readonly expects: boolean; // the client sends its body only after 100 Continue (Expect)
  readonly problem: FailureName | undefined; // why the bytes are not a valid request
  readonly secret?: ReadonlySet<string> | undefined; // names of fields that came as never indexed, over HTTP/2
}

/** A request that was received, with the means to respond to it. */
interface HttpRequest extends RequestHead {
  readonly scheme: string; // as the client connected: http or https
  readonly peer: string; // the address of the connected peer
  readonly body: Body;
  readonly source: Request | undefined; // the Fetch API Request that it came as, if any

  gone: boolean; // the client has disconnected, or has its response
  onGone: (() => void) | undefined; // called once if the client disconnects before its response is complete
  /** Sends the final answer, once. One of status 101 hands the connection over. */
  respond(response: HttpResponse): void;
  /** Sends an interim answer (RFC 9110 section 15.2), such as 103. */
  inform(status: number, reason: string, fields: Fields): void;
}

/** A response, from a server or from the balancer. */
interface HttpResponse {
  readonly status: number;
  readonly reason: string; // empty: the standard phrase of the status
  readonly fields: Fields; // without hop-by-hop fields
  readonly lines?: string | undefined; // the same as wire text, where it is known
  readonly body: Body;
  readonly closes?: boolean; // close the client's connection: its next bytes may not be a request
  readonly tunnel?: UpstreamEnd | undefined; // of a 101: the server's side of the connection
  readonly webSocket?: unknown; // of a 101 at the edge: what the platform's Response carries
}

/** Receives the events of a socket. */
interface SocketListener {
  onData(bytes: Bytes): void;
  onDrain(): void;
  onEnd(): void;
  onClose(): void;
}

/** The server's side of a connection that has switched protocols. */
interface UpstreamEnd {
  readonly protocol: string;
  /** Begins to pass bytes between it and a client. Gives what has to hear of the client's socket. */
  join(client: Socket): SocketListener;
}

/** A connection that has switched protocols, from its client to its server. */
interface Tunnel {
  /** Ends it early; a WebSocket gets a close frame with this code. */
  close(code: number): void;
}

/** Buffers that are reused once their bytes have been written, by the view that was handed out; other views do not free them. */
const LENT_BUFFERS = new WeakMap<Bytes, Bytes>();

/** A body in memory, which can be sent again: its bytes are no longer lent. */
class MemoryBody extends Body {
  readonly bytes: Bytes;
  readonly length: number;
  constructor(bytes: Bytes) {
    super();
    this.bytes = bytes;
    this.length = bytes.length;
    LENT_BUFFERS.delete(bytes);
  }
  read(reader: BodyReader): void {
    if (this.bytes.length) reader.data(this.bytes);
    reader.end(NO_FIELDS);
  }
}

/** No body and no Content-Length. */
export const NO_BODY: Body = new MemoryBody(NO_BYTES);
const EMPTY_BODY: Body = new MemoryBody(NO_BYTES); // Content-Length: 0
const WINDOW = 262_144; // bytes that wait for a slow reader before the source is paused
const KEPT = 65_536; // bytes: a body up to this size is kept for another attempt
const KEPT_PIECES = 64; // that are put together: a byte in a piece of its own takes the memory of a hundred
const WAITING_PIECES = 1_024; // the same, of a body that waits for its reader

/** The connection that a body comes from. */
interface BodySource {
  /** The body is being read: the time to send 100 Continue. */
  onRead?(): void;
  /** Stops reading, for the body's reader is slow: HTTP/1 pauses its socket, HTTP/2 sends no more WINDOW_UPDATEs. */
  pauseReading?(): void;
  resumeReading(): void;
  /** Reads the rest and drops it, or cancels the attempt whose response it is. */
  discardRest?(): void;
}

/** A body that a connection receives, which is paused while the reader is, or while WINDOW bytes wait for it. */
class StreamedBody extends Body {
  readonly length: number;
  override limit = Infinity;
  received = 0;
  kept: Bytes[] | undefined; // all of it so far, where it may have to be sent again
  isSourcePaused = false;
  over = false; // complete, failed or cancelled
  readonly hasTimeouts: boolean = true; // the connection that it comes from ends it when it stands still

  private readonly source: BodySource;
  private reader: BodyReader | undefined;
  private isRead = false;
  private waiting: Bytes[] = [];
  private waitingBytes = 0;
  private paused = false;
  private outcome: Fields | Failure | undefined; // trailers, or why it broke off

  constructor(length: number, source: BodySource) {
    super();
    this.length = length;
    this.source = source;
  }

  get bytes(): Bytes | undefined {
    const { kept, outcome } = this, isWhole = typeof outcome === "object" && outcome.length === 0; // trailers are not kept
    if (!kept || !isWhole || this.received > this.limit) return undefined;
    if (kept.length > 1) kept.splice(0, kept.length, Buffer.concat(kept));
    return kept[0] ?? NO_BYTES;
  }

  read(reader: BodyReader): void {
    if (this.isRead) { // before, so that only a copy can be read
      const { bytes } = this;
      return bytes ? new MemoryBody(bytes).read(reader) : reader.fail("bad-body");
    }
    this.isRead = true;
    if (this.received > this.limit) {
      this.cancel();
      return reader.fail("body-too-large");
    }
    this.reader = reader;
    if (!this.over) this.source.onRead?.();
    this.flush();
  }
  override pause(): void {
    this.paused = true;
    if (!this.over) this.pauseSource();
  }
  override resume(): void {
    if (!this.paused) return;
    this.paused = false;
    this.flush();
  }
  override cancel(): void {
    this.waiting = [];
    this.reader = undefined;
    if (this.over) return;
    this.over = true;
    this.source.discardRest?.();
  }

  /** Adds bytes from the source. */
  push(bytes: Bytes): void {
    if (this.over) return;
    this.received += bytes.length;
    if (this.received > this.limit) return this.end("body-too-large");
    if (this.received > KEPT) this.kept = undefined;
    if (this.kept) {
      LENT_BUFFERS.delete(bytes);
      if (this.kept.push(bytes) >= KEPT_PIECES) this.kept = [Buffer.concat(this.kept)];
    }
    if (this.reader && !this.paused && this.waiting.length === 0) return this.reader.data(bytes);
    if (this.waiting.push(bytes) >= WAITING_PIECES) this.waiting = [Buffer.concat(this.waiting)];
    this.waitingBytes += bytes.length;
    if (this.waitingBytes >= WINDOW) this.pauseSource();
  }
  /** Ends it with trailers, or with a failure, which drops the bytes that still wait. */
  end(outcome: Fields | Failure): void {
    if (this.over) return;
    this.over = true;
    this.outcome = outcome;
    this.resumeSource();
    if (typeof outcome !== "string") return this.flush();
    const { reader } = this;
    this.waiting = [];
    this.reader = undefined;
    reader?.fail(outcome);
  }

  private pauseSource(): void {
    if (this.isSourcePaused) return;
    this.isSourcePaused = true;
    this.source.pauseReading?.();
  }
  private resumeSource(): void {
    if (!this.isSourcePaused) return;
    this.isSourcePaused = false;
    this.source.resumeReading();
  }
  private flush(): void {
    const { reader } = this;
    while (reader && this.reader === reader && !this.paused && this.waiting.length) {
      const bytes = this.waiting.shift()!;
      this.waitingBytes -= bytes.length;
      reader.data(bytes);
    }
    if (!reader || this.reader !== reader || this.paused) return;
    this.resumeSource();
    if (this.outcome === undefined) return;
    this.reader = undefined;
    if (typeof this.outcome === "string") reader.fail(this.outcome);
    else reader.end(this.outcome);
  }
}

/** The values of a field, joined; undefined if it is absent. `name` is in lower case. */
function fieldOf(fields: Fields, name: string, separator = ", "): string | undefined {
  let value: string | undefined;
  for (let i = 0; i < fields.length; i += 2) {
    const field = fields[i]!;
    if (field.length !== name.length || field !== name && field.toLowerCase() !== name) continue;
    value = value === undefined ? fields[i + 1]! : value + separator + fields[i + 1]!;
  }
  return value;
}

/** Fields without some names, which are in lower case. */
function without(fields: Fields, names: ReadonlySet<string>): string[] {
  const rest: string[] = [];
  for (let i = 0; i < fields.length; i += 2) {
    if (!names.has(fields[i]!.toLowerCase())) rest.push(fields[i]!, fields[i + 1]!);
  }
  return rest;
}

/** Fields as wire text. */
function linesOf(fields: Fields): string {
  let lines = "";
  for (let i = 0; i < fields.length; i += 2) lines += `${fields[i]}: ${fields[i + 1]}\r\n`;
  return lines;
}

/** Whether a request is a call of gRPC, which is over HTTP/2 only. */
const isGrpc = ({ version, block }: Pick<RequestHead, "version" | "block">): boolean =>
  version === "2.0" &&
  (block.grpc ??= /^application\/grpc(?:$|[+;])/.test(fieldOf(block.fields, "content-type") ?? ""));
const GRPC_UNAVAILABLE = "14"; // a status of gRPC
/** The status of gRPC for each status of a failure; others are UNKNOWN. */
const GRPC_STATUSES: Record<number, number> = {
  ...{ 400: 13, 403: 7, 404: 12, 405: 12, 408: 4, 413: 8, 417: 13, 429: 8, 431: 8, 499: 1, 500: 13, 502: 14, 503: 14 },
  ...{ 504: 4, 508: 13 },
};
/** A failure as a client of gRPC reads it. */
function grpcFields(kind: FailureName): Fields {
  const { status, text } = FAILURES[kind];
  return ["grpc-status", `${GRPC_STATUSES[status] ?? 2}`, "grpc-message", text];
}

/** Fields as pairs of name and value. */
const fieldPairs = (fields: Fields): [string, string][] =>
  Array.from({ length: fields.length / 2 }, (_, i) => [fields[2 * i]!, fields[2 * i + 1]!]);

/** Reads a whole body into memory. */
function collect(body: Body, done: (taken: Body | Failure) => void): void {
  const pieces: Bytes[] = [];
  body.read({
    data: (bytes) => void pieces.push(bytes),
    end: () => done(pieces.length ? inMemory(pieces) : EMPTY_BODY),
    fail: done,
  });
}
function inMemory(pieces: Bytes[]): Body {
  if (pieces.length === 0) return NO_BODY;
  return new MemoryBody(pieces.length === 1 ? pieces[0]! : Buffer.concat(pieces));
}

// --- 2.3 Services and routes: servers, services, routes and tables, and their state ---

/** Upper bounds of the latency histogram, in milliseconds: Traefik's 0.1, 0.3, 1.2 and 5 s, and finer ones. */
const BUCKETS = [0.25, 0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 800, 1_200, 2_500, 5_000, 10_000, 60_000];

/** Totals of requests that have ended. They only grow, and are summed over statuses, servers and workers. */
class Counters {
  requests = 0;
  errors = 0; // answers with 5xx, and failures that are not the client's
  bytesIn = 0; // of the requests' bodies
  bytesOut = 0; // of the answers' bodies
  milliseconds = 0; // the sum of their times to the end of the response
  durations: number[] = [...BUCKETS, 0].fill(0); // requests by bucket of the histogram; the last one: longer than all BUCKETS
}

/** Counters by status and method (see `tallyOf`). */
type Tallies = Map<number, Counters>;

/** How often something was. */
interface Occurrences {
  times: number;
}
const newOccurrences = (): Occurrences => ({ times: 0 });

/** Counters by the protocol that clients speak: http, https or tcp. */
interface Entrypoint {
  name: string;
  inFlight: number;
  tallies: Tallies;
}
const newEntrypoint = (name: string): Entrypoint => ({ name, inFlight: 0, tallies: new Map() });

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
/** 32 bits as eight digits: a fifteenth of the time of `toString` (Node 24.21). */
const digits = (word: number): string =>
  HEX[word >>> 24]! + HEX[word >>> 16 & 255]! + HEX[word >>> 8 & 255]! + HEX[word & 255]!;

/** A server as its service has it: one that the file lists, or one that DNS has under a name in the file. */
type ListedServer = Omit<ServerConfig, "find"> & { authority: string; foundBy: string };

/** A server that DNS has. */
interface FoundServer {
  url: string;
  name: string; // address:port
  authority: string; // its Host where there is no other
  servername: string; // for SNI and verification
  weight: number; // its own, which multiplies that of the file
  backup: boolean;
  lacking: number; // answers in a row that did not have it
}

/** A name whose records are servers. */
class Discovery {
  readonly url: string;
  readonly name: string;
  readonly find: "dns" | "srv";
  found: FoundServer[] = []; // in the order in which they were found first
  isKnown = false; // a look has ended
  isOfSystem = false; // its servers are those that the system has, and DNS has not
  lookAt = -Infinity; // when it is looked up again; Infinity: that goes on now
  problem = ""; // why the latest answer was of no use; empty: it was
  staleSince = 0; // when the first of these came

  constructor(url: string, name: string, find: Discovery["find"]) {
    [this.url, this.name, this.find] = [url, name, find];
  }
}

/** One server of one service. Times are milliseconds of `Effects.now`. */
export interface Server extends ListedServer, ServerState {
  service: string; // the name of its service
  tls: ServiceConfig["tls"];
  http: ServiceConfig["http"]; // the version to ask it with; auto: 2 if it offers that
  hash: number; // of its name, for rendezvous
}

/**
 * What a server's attempts have shown since its last ejection. There are three estimates of the milliseconds to the
 * head of a response; 0: not known.
 */
class Latency {
  samples = 0; // good responses in `latency` and `typical`
  latency = 0; // mean of the last 64 or so good ones: for least-response-time, `max_in_flight: auto`, views
  typical = 0; // geometric mean over the last 64 or 10 s, which single long ones hardly move: for `eject.slow`
  recent = 0; // a peak at once, decaying since `recentAt`: for peak-ewma
  judged = 0; // attempts in `failing`
  failing = 0; // the share of them that failed, or had a 5xx; over the last 64 or so
}

/** What is known of a server, as it is in the beginning. */
class ServerState extends Latency {
  effective = 1; // its weight as of now: less during slow start
  limit = Infinity; // requests in flight at most: its `max`, `max_in_flight`, or what `auto` has found

  // health
  up = true; // what probes say: in a fleet those of most instances that probe it
  upByOwnProbes = true; // what the probes of this instance alone say
  ejectedUntil = 0; // then it is on trial, until a request to it has been answered; 0: neither
  trialInFlight = false; // its one trial request has begun, and not ended
  slow = false; // ejected for its latency, not for failures
  pausedUntil = 0; // skipped until then, as its Retry-After asked
  since = 0; // when a probe, an ejection or a reload last changed its state
  backAt = -Infinity; // when it was new or came back, and its slow start began; -Infinity: long ago
  failures = 0; // consecutive failures of requests
  ejections = 0; // consecutive ejections: each makes the next longer

  // probes
  probeAt = 0; // when the next one is due
  passes = 0; // consecutive ones passed
  fails = 0; // consecutive ones failed
  probedAt = 0; // when the last one ended; 0: there was none
  probeTook = 0; // milliseconds
  probeProblem = ""; // what was wrong with it; empty: it passed

  // in flight
  inFlight = 0; // requests and connections that it has been given
  waiting = 0; // of those: requests still without a response head
  waitingSince = 0; // the sum of their start times, which gives their mean age at any time
  current = 0; // smooth weighted round robin's running weight
  limitWindow = new LimitWindow(0, 0); // for `max_in_flight: auto`
  load = 0; // picks a second, over the last 10 s or so
  picksThen = 0; // `picks` at the last comparison with the other servers
  recentAt = 0; // when `recent` was last updated
  failureReportedAt = -Infinity; // when its last failure was reported

  // counters
  picks = 0; // requests and connections that it was given so far
  answers = 0; // responses whose head has come
  retries = 0; // attempts that came here because another had failed
  ejected = 0; // ejections so far
  probesPassed = 0;
  probesFailed = 0;
  counters = new Counters(); // of attempts that have ended
}

const newServer = (config: ListedServer, service: string, tls: Server["tls"], http: Server["http"]): Server => {
  const given = { service, tls, http, hash: hash(config.name), effective: config.weight };
  return Object.assign(new ServerState(), config, given);
};

/** State of `max_in_flight: auto` for one server: its latency in calm times, and the current window. */
class LimitWindow {
  baseline: number; // its `latency` while it was not near its limit; 0: not known
  since: number; // when the window was opened
  answers = 0;
  most = 0; // the peak of requests in flight
  refused = false; // a 429, a 503 or a failure came

  constructor(baseline: number, since: number) {
    [this.baseline, this.since] = [baseline, since];
  }
}

/** What operators may say of a server that was found, until it is gone. */
type FoundChange = Partial<Pick<ServerConfig, "weight" | "state">>;

/** Never empty: servers that cannot take the request are left out, and with none left no strategy runs. */
type Candidates = readonly [Server, ...Server[]];

/** What a strategy may look at beside the candidates. */
interface PickInput {
  random(): number; // from 0 up to but not including 1; seeded in tests
  now: number; // when the server is picked, as `Effects.now` has it
  turn: number; // how many requests its service had before
  key: string; // what `hash` hashes
  client: string; // the client's address, behind trusted proxies
  request: HttpRequest | undefined; // a TCP connection has none
}

/** Chooses the server that takes a request. It changes nothing but its own state in the servers (`current`). */
export interface Strategy {
  (candidates: Candidates, input: PickInput): Server;
  score?: Score; // shown by explain
}

/** The number that a strategy compares; the lowest wins. */
type Score = (server: Server, candidates: Candidates, input: PickInput) => number;

/** One service: its servers and strategy, from the config in force, and the state that survives a reload. */
interface Service extends ServiceState {
  readonly effects: Effects; // of its balancer
  name: string;
  config: ServiceConfig;
  servers: Server[];
  names: Discovery[]; // that stand for servers
  strategy: Strategy;
  key: (exchange: Exchange) => string; // what `hash` hashes
  cookies: Map<string, Server> | undefined; // the servers by the values of the sticky cookie, once they are signed
  changes: Map<string, FoundChange>; // by URL, what operators have said of servers that were found
  hedge: number; // the quantile of latency after which a second attempt is sent; 0: never
  bounded: boolean; // some server has a `max`, or the service a `max_in_flight`
}

/** What is known of a service, as it is in the beginning. */
class ServiceState {
  lostCookie = ""; // the name of the sticky cookie, once a server has set one of that name: it is the application's

  // selection
  candidates: readonly Server[] = []; // eligible servers, as last computed
  candidatesUntil = 0; // when to compute them again; 0: now
  panicking = false; // so few servers are healthy that all may be asked
  turn = 0; // requests so far
  waiting: Set<() => boolean> = new Set(); // the queue, oldest first: a call picks a server, or says that all are full

  // retries
  retrying = 0; // retries and hedged attempts in flight, for metrics
  saved = 0; // the retry budget: what requests have earned and retries have not spent; below 0: lent
  secondAt = -Infinity; // when the second of `retried` began
  retried = 0; // retries from the budget in that second

  // latency
  times: Float64Array<ArrayBuffer> = NO_TIMES; // the latest milliseconds to the head of a good answer, where there is a hedge
  measured = 0; // how many were written there
  hedgeDelay = 0; // the quantile of these
  median = 0; // of its servers' `typical`, as of the last comparison; 0: not known
  inFlightBefore = 0; // requests in flight at each server when the first slow one was ejected
  toleratedUntil = 0; // until then no server is ejected for its latency
  comparedAt = -Infinity; // when its servers were last compared; -Infinity: never
  compareAt = 0; // when they are compared again

  // counters
  inFlight = 0; // requests, with those in the queue
  retries = 0; // so far
  hedges = 0; // second attempts so far
  hedgesWon = 0; // those that answered first
  copies = { answered: 0, failed: 0, skipped: 0, inFlight: 0 }; // of `mirror`; in no other counter
  tallies: Tallies = new Map(); // of requests that have ended
  grpc: Map<string, Occurrences> = new Map(); // calls of gRPC by their status
}
const NO_TIMES: Float64Array<ArrayBuffer> = new Float64Array(0);

/** One service that a route may forward to, with the policy of that route. */
interface Destination {
  service: Service;
  weight: number; // its share of the route's requests, of the sum of weights
  policy: Policy;
  retryOn: ReadonlySet<string | number>; // statuses and failures after which a request is sent again
  around: Around | undefined; // cors
  compress: boolean;
  fallback: Destination | undefined; // used when no server here is eligible
}

/** Hono middleware around a response, which it gets by calling `env.answer`. */
type Around = Hono<{ Bindings: { answer: () => Response } }>;

/** One route, compiled: every decision about its shape was taken when the table was built. */
interface Route extends Omit<RouteConfig, "mirror"> {
  destinations: Destination[]; // where the action is to forward
  weight: number; // the sum over destinations
  sticky: boolean; // a split whose services all have sticky sessions
  mirror: Destination | undefined; // where copies go; its weight is their share, from 0 to 1
  rank: number; // a method, then header conditions, then query conditions
  conditions: ((exchange: Exchange) => boolean)[];
  admits: ((client: string) => boolean) | undefined; // allow and deny
  buckets: Buckets | undefined; // of its rate
  hasRules: boolean; // for headers or query, of the request or the answer
}

/** Token buckets of one limit: when each client's bucket is full again. Clients that are absent have a full one. */
interface Buckets {
  rate: Rate;
  recent: Map<string, number>; // those that were drawn from since `turnedAt`
  older: Map<string, number>; // those of before; forgotten at the next turn
  turnedAt: number;
}
const newBuckets = (rate: Rate): Buckets => ({ rate, recent: new Map(), older: new Map(), turnedAt: 0 });

/** Where the connections of a TCP listener go. */
interface TcpRoute extends Pick<TcpConfig, "proxy_protocol"> {
  at: TcpConfig["listen"][number];
  service: Service;
  admits: Route["admits"];
}

/** One configuration in force. A request keeps the table that it started with. */
interface Table {
  config: Config;
  services: Map<string, Service>;
  names: Map<string, Discovery>; // by `idOf`
  hosts: HostTable;
  schemes: Map<string, HostTable>; // routes that are limited to one scheme
  fallback: Route | undefined; // `default`
  buckets: Map<string, Buckets>; // by route and rule
  tcp: Map<string, TcpRoute>; // by host:port, as the file has them
  trusts: (peer: string) => boolean; // whether an address is one of `trust`
}

const portOf = ({ port, protocol }: URL): number => Number(port || (protocol === "https:" ? 443 : 80));

/** The host and port of a server's URL. */
const hostOf = (url: string): string => isUnix(url) ? "localhost" : url.slice(url.indexOf("//") + 2);

/** The same as a Host field has it: no server expects the last dot of an absolute name there. */
const hostFieldOf = (url: string): string => hostOf(url).replace(/\.(?=:|$)/, "");

/** The routes of one host name, by kind of path. Within one path those with more conditions stand first. */
interface PathTable {
  exact: Map<string, Route[]>;
  prefix: Map<string, Route[]>;
  depth: number; // slashes in the longest prefix: deeper is not looked for
  shapes: string[]; // of patterns such as /users/{id}, a character a segment: 1 where any one fits
  regex: { pattern: RE2JS; routes: Route[] }[];
}
const newPathTable = (): PathTable => ({ exact: new Map(), prefix: new Map(), depth: 0, shapes: [], regex: [] });

/** Hosts by their names, wildcards by what follows the star, and routes for any host. */
interface HostTable {
  named: Map<string, PathTable>;
  any: PathTable;
}

// --- 2.4 Exchanges and attempts: a request of a client, its attempts at servers, and their outcomes ---

/** What servers are picked for: a request or a connection. */
interface PickRequest extends PickInput {
  readonly tried: Server[]; // the latest last
}

/**
 * One request, from its head to the end of the response's body. It is a class because of V8: had a literal made it, dead
 * ones could stay in memory until the next full collection, with all that they refer to.
 */
class Exchange implements PickRequest {
  // given
  readonly balancer: Balancer;
  readonly table: Table; // in force when it came in
  readonly request: HttpRequest;
  readonly method: string;
  readonly origin: Origin;
  readonly client: string; // the same as the origin's
  readonly started: number; // milliseconds
  readonly entrypoint: Entrypoint;
  readonly logged: boolean; // in the sample of the access log; failures are logged anyway
  readonly isWrapped: boolean; // middleware has seen it before
  readonly random: () => number;

  // read
  readonly id: string;
  host: string; // as sent; matched without case and port
  path = ""; // normalised: what is matched
  sentPath = ""; // the same as the client spells it, but for dot segments: what is forwarded
  query = ""; // as it came, with its question mark, or empty
  block: FieldBlock; // the request's fields, less the sticky cookie once it has been read
  body: Body;
  upgrade = ""; // the protocol that it asks to switch to, where it may; else empty

  // decided
  now: number; // when its server was last picked
  turn = 0; // of the service
  key = ""; // what `hash` hashes
  matched: string | RE2JS = ""; // the part of the path that the route's prefix took, or the pattern that found it
  allow: string[] | undefined = undefined; // methods of routes that match in all but the method
  route: Route | undefined = undefined;
  destination: Destination | undefined = undefined;
  readonly tried: Server[] = [];
  cookie = ""; // Set-Cookie for a client that is new to its server, or empty
  rateFields: Fields = NO_FIELDS; // of the answer: how often the client may still ask
  corsFields: [name: string, value: string][] = []; // of the answer: which pages may read it
  trace = ""; // 32 digits, from the client or begun by us; empty: not asked for yet
  traceFlags = ""; // 01: sampled
  traceState = ""; // that came with it
  span = ""; // 16 digits, of the latest attempt
  target = ""; // path and query as servers get them, after the route's rules
  reply: (response: HttpResponse) => void; // to the client, or through middleware
  onLeave: ((exchange: Exchange) => void) | undefined = undefined; // ends what goes on when the client leaves

  // counted
  concurrencyKey = ""; // the client, where it may have only so many requests in flight
  hasEarnedRetry = false; // it has paid its share into the retry budget
  attempt: ExchangeAttempt | undefined = undefined; // the latest, and at the end the one that answers
  status = 0; // of the final answer; 0: there is none yet
  bytes = 0; // of the body of a local reply
  problem: FailureName | "" = ""; // why it failed
  isFinished = false; // it is counted

  constructor(balancer: Balancer, request: HttpRequest, origin: Origin, id: string, isWrapped: boolean) {
    const { table, effects } = balancer, { sample } = table.config.log;
    this.balancer = balancer;
    this.table = table;
    this.request = request;
    this.isWrapped = isWrapped;
    this.method = request.method;
    this.origin = origin;
    this.client = origin.client;
    this.id = id;
    this.host = request.host;
    this.block = request.block;
    this.body = request.body;
    this.random = effects.random;
    this.started = this.now = effects.now();
    this.entrypoint = getOrMake(balancer.entrypoints, request.scheme, newEntrypoint);
    this.logged = sample === 1 || effects.random() < sample;
    this.reply = (response) => request.respond(response);
  }
}

/** When a call of gRPC has to be over (`grpc-timeout: 100m`), with its wait in a queue and all attempts; else never. */
function deadlineOf({ request, block, started }: Exchange): number {
  if (!isGrpc(request)) return Infinity;
  const [, count, unit] = /^(\d{1,8})([HMSmun])$/.exec(fieldOf(block.fields, "grpc-timeout") ?? "") ?? [];
  return unit ? started + Number(count) * GRPC_UNITS[unit]! : Infinity;
}
const GRPC_UNITS: Record<string, number> = { H: 3.6e6, M: 6e4, S: 1e3, m: 1, u: 1e-3, n: 1e-6 }; // milliseconds

/** One request to one server. Its events come in this order: `onInform` any number of times, `onHead` at most once, `onEnd` once. */
class Attempt {
  // given
  declare server: Server;
  declare method: string;
  declare target: string; // path and query
  declare lines: string; // the fields as they are written, but for those that frame the body
  declare body: Body;
  declare upgrade: string; // the protocol that it asks to switch to; empty: none
  declare secret?: ReadonlySet<string> | undefined; // names of fields that came as never indexed
  declare timeouts: Policy["timeouts"];
  declare deadline: number; // when it has to be over, as a call of gRPC says; Infinity: never
  declare startedAt: number; // milliseconds
  declare tunnels?: Set<Tunnel>; // where its tunnel is, as long as it is open

  // counted by its connection
  connectedAt = 0; // when the request could be written; 0: not yet, or not known
  uploaded = 0; // bytes of the request's body that were passed on, where it is a stream
  received = 0; // bytes of the answer's body
  trailers: Fields = NO_FIELDS; // of the response, once it is complete
  carrier: { cancel(why: Failure): void } | undefined = undefined; // cancels it; undefined: not begun, or over

  /** An interim answer, such as 103. */
  onInform(_status: number, _reason: string, _fields: Fields): void {}
  /** The head of the response; its body is still to be read. */
  onHead(_response: HttpResponse): void {}
  /** The response is complete, or why it is not. `sent`: the server may have seen some of the request. */
  onEnd(_failure: Failure | undefined, _detail: string, _sent: boolean): void {}
}

/** An attempt that is not counted: a probe or a mirrored copy. */
const newAttempt = (
  given: Pick<Attempt, "server" | "method" | "target" | "lines" | "body" | "timeouts" | "startedAt"> & Partial<Attempt>,
): Attempt => Object.assign(new Attempt(), { upgrade: "", deadline: Infinity }, given);

/** Bytes of the request's body that were meant for servers; of a tunnel all that the client has sent. */
const receivedBy = ({ uploaded, body }: Attempt): number => Math.max(uploaded, body.length);

/** An attempt of an exchange, with its results. */
class ExchangeAttempt extends Attempt {
  readonly exchange: Exchange;
  readonly service: Service;
  readonly retry: number; // 0: the first attempt, or a hedged one beside it; 1: the first retry
  readonly decide: (attempt: ExchangeAttempt) => void; // called when there is a response's head, or there will be none
  span = ""; // 16 digits, of its trace

  // results
  headAt = 0; // when the response's head was there; 0: not yet
  endedAt = 0; // when the last byte had passed; 0: not yet
  response: HttpResponse | undefined = undefined; // the server's, as soon as its head is there
  failure: Failure | undefined = undefined; // why there is none, or not all of it
  detail = ""; // what is wrong with the response, for the operator; or empty
  sent = true; // the server may have seen some of the request
  hasLost = false; // another attempt was faster
  afterEnd: (() => void) | undefined = undefined; // called once it has ended

  constructor(exchange: Exchange, server: Server, retry: number, decide: ExchangeAttempt["decide"]) {
    super();
    const { service, policy: { timeouts } } = exchange.destination!;
    this.exchange = exchange;
    this.service = service;
    this.server = server;
    this.retry = retry;
    this.decide = decide;
    this.startedAt = exchange.now;
    this.method = exchange.method;
    this.target = exchange.target;
    this.body = exchange.body;
    this.upgrade = exchange.upgrade;
    this.secret = exchange.request.secret;
    this.timeouts = timeouts;
    this.tunnels = exchange.balancer.tunnels;
    this.deadline = deadlineOf(exchange);
  }
}

/** The status of a call that has ended: from the trailers, or from a head that has them. */
const grpcStatus = ({ trailers, response }: ExchangeAttempt): string | undefined =>
  fieldOf(trailers, "grpc-status") ?? fieldOf(response?.fields ?? NO_FIELDS, "grpc-status");

// --- 2.5 Balancer and effects: the running balancer, and its access to network, clock, chance and log ---

const VERSION = "0.1.0";

/** One running balancer: the table in force, which a reload replaces, and what outlives a table. */
interface Balancer {
  // given
  readonly effects: Effects;
  readonly name: string; // of this process, in request ids
  readonly via: string; // our name in Via, by which loops are detected
  readonly runtime: string; // deno, bun, node or edge
  readonly seed: number; // of the ids of traces and spans
  readonly origin: string; // 16 digits that begin the ids of our traces
  readonly startedAt: Date;

  // in force
  table: Table;
  tokens: Partial<NonNullable<Config["admin"]>>; // of the admin API; the previous ones if the table has none
  reloads: number;
  reloadedAt: Date; // when the table in force took effect
  reloadFailed: boolean; // a newer file could not be put in force
  draining: boolean; // it takes no new connections, and will end

  // open
  inFlight: number; // requests, tunnels, and connections that are not HTTP
  connections: number; // of clients
  readonly connected: Map<string, number>; // how many of them each client has
  readonly clients: Map<string, number>; // requests in flight, where `limits` bounds them
  readonly tunnels: Set<Tunnel>;
  readonly relays: Set<() => void>; // connections that are not HTTP: a call ends one
  readonly workers: Map<number, { since: Date; end(): void }>; // threads that serve for this one, where there are some

  // counted
  requests: number;
  ids: number; // of traces and spans, so far
  readonly entrypoints: Map<string, Entrypoint>; // by name
  readonly failures: Map<string, Occurrences>; // requests that failed, by FailureName
}

function newBalancer(table: Table, effects: Effects, runtime: string): Balancer {
  const startedAt = effects.date(), name = hash(`${effects.random()} ${startedAt.getTime()}`).toString(36);
  const word = () => effects.random() * 2 ** 32;
  return {
    ...{ effects, name, via: `lb-${name}`, runtime, startedAt },
    seed: Math.floor(word()),
    origin: digits(word()) + digits(word()),
    ...{ table, reloads: 0, reloadedAt: startedAt, reloadFailed: false, draining: false },
    tokens: { ...table.config.admin },
    ...{ inFlight: 0, connections: 0, connected: new Map(), clients: new Map(), tunnels: new Set(), relays: new Set() },
    ...{ workers: new Map(), requests: 0, ids: 0, entrypoints: new Map(), failures: new Map() },
  };
}

/** Strategies by the names that `strategy:` may say. */
type Strategies = Record<string, Strategy>;

/** All access to network, clock, random numbers and log. Tests pass a fake clock, a seeded random, scripted servers. */
export interface Effects {
  /** Sends an attempt to its server; what is heard of it goes to its `on` methods. */
  send(attempt: Attempt): void;
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
  /** The secret that signs where the config has none: random, and the same in all threads of a process. */
  secret(): string;
  /** Resolves after a time; after the signal it may never resolve, and keeps nothing waiting. */
  sleep(milliseconds: number, signal?: AbortSignal): Promise<void>;
  /**
   * Asks a resolver, or those of the machine (empty). Rejects where there is no answer. A time to live of 0 is not known.
   * Undefined: there is no DNS here.
   */
  resolve: ((name: string, type: "A" | "AAAA", resolver: string) => Promise<RecordWithTtl[]>) | undefined;
  resolveSrv(name: string, resolver: string): Promise<SrvRecord[]>;
  /** Asks the system, which knows its hosts file and search domains. */
  lookup(name: string): Promise<RecordWithTtl[]>;
  /** Tells other threads what this one has found out or was asked to change. */
  onNews(news: News): void;
  /** The client of a Request; `env` is what the runtime passes beside it. */
  client(request: Request, env: unknown): Client;
  /** The fleet that this instance belongs to. */
  fleet?: Membership | undefined;
  /** What the certificate in a file is for, and until when. */
  certificate(file: string): { names: string[]; until: Date } | undefined;
  /** Logs a request that has ended; `accessLine` makes a line of it. */
  accessLog(record: AccessRecord, format: LineFormat): void;
  /** One line for the operator. */
  report(level: "info" | "warn" | "error", text: string): void;
}

/** What one thread has found out about servers, or an operator has told it, for the other threads. */
type News =
  | { kind: "probed"; service: string; url: string; problem: string | undefined; up: boolean }
  | { kind: "marked"; service: string; url: string; up: boolean } // by an operator
  | { kind: "found"; id: string; found: FoundServer[] } // which servers a name has
  | { kind: "changed"; service: string; url: string; change: FoundChange }; // by an operator: a server that was found

/** What the program asks of its fleet. */
interface Membership {
  /** Whether this instance probes a server: some do. */
  mayProbe(server: Server): boolean;
  /** Whether a server is up, after a probe of this instance: most of its probers decide, and without the engine this one. */
  isUp(service: Service, server: Server): boolean;
  /** Whether it waits for the fleet's first document: this instance has none of its own. */
  isWaiting(): boolean;
  /**
   * Has all instances change their config. `edit` makes a text of a config, and again of a newer one where somebody else was
   * first. Resolves when it is in force here. Gives the live instances that have it not in force after `wait` milliseconds.
   * `replaces`: nothing of the config before stays.
   */
  change(edit: (config: Config) => string, wait: number, replaces: boolean): Promise<string[]>;
  /** Has all instances mark a server up or down for an operator, or change one that was found. False: the engine is away. */
  mark(service: Service, server: Server, mark: "up" | "down" | FoundChange): Promise<boolean>;
  view(): FleetView;
  /** Documents that could not be used, seconds since the engine answered, and listings by what made them necessary. */
  counted(): { refused: number; contact: number; resyncs: ReadonlyMap<string, number> };
}

/** A fleet as `GET /fleet` shows it. */
interface FleetView {
  engine: "answers" | "away" | "none";
  since: string; // when that began
  problem: string; // what is wrong with the engine
  name: string; // of this instance
  config: number; // revision of the document in force here
  instances: InstanceView[];
  probes: { server: string; by: string[] }[];
}

/** What an instance says of itself. */
interface InstanceView {
  name: string;
  since: string;
  version: string;
  runtime: string;
  config: number; // revision in force there
  problem: string; // why it is not the newest
  down: string[]; // servers among its probes that these found down
  ejected: string[];
}

/** The client of a Request. `headers`: name, value, name, value, ... in the order of the wire. */
interface Client {
  address: string;
  scheme: string;
  headers: Fields;
  upgrades?: boolean; // the platform can make a WebSocket of it: at the edge
}

/** One request to one server, as a function of type `Fetch` takes it beside the URL. */
export interface FetchAttempt extends Pick<Attempt, "server" | "method" | "timeouts"> {
  headers: Fields;
  body: null | Uint8Array<ArrayBuffer> | ReadableStream<Uint8Array<ArrayBuffer>>;
  signal: AbortSignal; // aborted when the answer is no longer needed
  /** Call it once per response, when its body has ended or been cut off: how many bytes came, and what failed. */
  ended(status: number, bytes: number, problem?: Failure): void;
}

/** `fetch`, with the attempt where the init would be. Rejects with a `WireError` before the head of an answer. */
type Fetch = (url: string, attempt: FetchAttempt) => Promise<Response>;

type LineFormat = "combined" | "json";

/**
 * An entry of the access log, for a request or a connection (method TCP), as `log: json` writes it: OpenTelemetry's
 * semantic conventions, and `lb.` before names that they lack. Times are milliseconds since the request came in.
 */
interface AccessRecord {
  "timestamp": string; // of the end
  "client.address": string;
  "http.request.method": string;
  "network.protocol.version"?: RequestHead["version"] | undefined; // a connection has none
  "url.scheme": string;
  "server.address"?: string | undefined; // the host that was asked for
  "url.original"?: string | undefined; // where there is no path: it was refused before, or is a connection
  "url.path"?: string | undefined;
  "url.query"?: string | undefined;
  "http.response.status_code": number;
  "rpc.grpc.status_code"?: number | undefined;
  "http.request.body.size": number; // bytes
  "http.response.body.size": number; // bytes
  "http.request.header.referer"?: string | undefined;
  "user_agent.original"?: string | undefined;
  "error.type"?: string | undefined; // a FailureName, or a status of 500 and more
  "trace_id"?: string | undefined;
  "span_id"?: string | undefined; // of the last attempt
  "lb.request_id": string;
  "lb.route"?: string | undefined;
  "lb.service"?: string | undefined;
  "lb.server"?: string | undefined; // the last that was asked
  "lb.attempts": number;
  "lb.connected_ms"?: number | undefined; // the last attempt had a connection
  "lb.head_ms"?: number | undefined; // the response's head was there
  "lb.ended_ms": number; // the last byte had passed
}

// -----------------------------------------------------------------------------------------------------------
// 3. HTTP
// Bytes to messages and back, the same on all runtimes. Strict on input: bytes that could mean two things are
// refused. One sweep checks the timeouts of all clients, another those of all servers; requests need no timers.
// -----------------------------------------------------------------------------------------------------------

// --- 3.1 Parser: HTTP/1.1 heads, bodies and trailers ---

/** Caches results for the latest 1,000 to 2,000 short texts: those of a thousand hosts are not parsed again. */
function memo<T>(work: (text: string) => T, longest = 100): (text: string) => T {
  let known = new Map<string, T>(), older = known;
  return (text) => {
    const found = known.get(text);
    if (found !== undefined) return found;
    const result = older.get(text) ?? work(text);
    if (known.size >= 1_000) [known, older] = [new Map(), known];
    if (text.length <= longest) known.set(text, result);
    return result;
  };
}

const MAX_TARGET = 16_384; // bytes of path and query

const MAX_HEAD = 65_536; // bytes of an answer's head, of all its interim answers, and of trailers
const MAX_FIELDS = 1_000; // of an answer's head
const MAX_CHUNK_LINE = 1_024;

/** Field lines (RFC 9112 section 5): no bare CR or LF, no folding, no blank before a colon. */
const FIELD_LINES = /^(?:\r\n[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*)*$/;
const REQUEST_LINE = /^([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([\x21-\x7e\x80-\xff]+) HTTP\/(\d)\.(\d)$/;
const STATUS_LINE = /^HTTP\/1\.([01]) ([1-9]\d\d)(?: ([\t\x20-\x7e\x80-\xff]*))?$/;
/** RFC 9112 section 7.1.1; blanks are accepted around the `;` and `=` of extensions only. */
const CHUNK_LINE =
  /^([0-9a-f]{1,12})(?:[\t ]*;[\t ]*[!#$%&'*+.^_`|~0-9a-z-]+(?:[\t ]*=[\t ]*(?:[!#$%&'*+.^_`|~0-9a-z-]+|"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*"))?)*$/i;
const TRAILER = /^[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*$/;

/** Fields that frame a message or are for one connection: each hop has its own. */
const CONNECTION_FIELDS = new Set(
  "connection content-length expect host keep-alive proxy-connection te transfer-encoding upgrade".split(" "),
);
/** The name of a field that means something for the connection, in lower case; `pass`: of any other. */
const fieldRole = memo((spelled): string => {
  const name = spelled.toLowerCase();
  return CONNECTION_FIELDS.has(name) ? name : "pass";
});

/** The options that a field such as Connection lists, in lower case. */
const optionsOf = memo((list): ReadonlySet<string> => new Set(list.toLowerCase().split(/[\t ]*,[\t ]*/)));

/** The field lines of a head, read. */
interface ParsedFields extends FieldBlock {
  readonly lines: string; // of `fields`, as they are written on
  readonly count: number; // of all field lines; -1: they are not valid
  readonly length: string | undefined; // Content-Length; ?: several, or no number
  readonly encoding: string | undefined; // Transfer-Encoding, in lower case
  readonly options: ReadonlySet<string>; // of Connection
  readonly upgrade: string;
  readonly expect: string;
  readonly trailers: boolean;
  readonly host: string;
  readonly hosts: number;
  readonly idle: number; // milliseconds of Keep-Alive: timeout; Infinity: it does not say
}

/** A slice without the blanks and tabs around it; `trim` would also take bytes that belong to the value. */
function trimmed(text: string, start: number, end: number): string {
  const blank = (at: number) => text.charCodeAt(at) === 32 || text.charCodeAt(at) === 9;
  while (start < end && blank(start)) start++;
  while (end > start && blank(end - 1)) end--;
  return text.slice(start, end);
}

/** Reads field lines, each with CR and LF in front. `fields` has what does not end at this hop. */
function parseFields(text: string): ParsedFields {
  const fields: string[] = [], own: Record<string, string | undefined> = {}; // fields for this hop, joined
  let count = 0, hosts = 0;
  const valid = FIELD_LINES.test(text);
  for (let line = valid ? 0 : text.length, next; line < text.length; line = next) {
    next = text.indexOf("\r\n", line + 2);
    if (next < 0) next = text.length;
    const colon = text.indexOf(":", line), name = text.slice(line + 2, colon), role = fieldRole(name);
    const value = trimmed(text, colon + 1, next);
    count++;
    if (role === "host") hosts++;
    if (role !== "pass") own[role] = own[role] === undefined ? value : `${own[role]}, ${value}`;
    if (role === "pass" || role === "content-length" || role === "host") fields.push(name, value);
  }
  const { connection = "", upgrade = "", expect = "", te = "", host = "" } = own;
  const { "content-length": length, "transfer-encoding": encoding } = own;
  const options = optionsOf(connection), rest = connection ? without(fields, options) : fields;
  return {
    ...{ fields: rest, lines: linesOf(rest), passing: undefined, origin: undefined, count: valid ? count : -1 },
    ...{ options, upgrade, expect, host, hosts, trailers: optionsOf(te).has("trailers") },
    length: length === undefined || /^\d{1,15}$/.test(length) ? length : "?",
    encoding: encoding?.toLowerCase(),
    idle: 1_000 * Number(/timeout=(\d+)/i.exec(own["keep-alive"] ?? "")?.[1] ?? Infinity),
  };
}

/** Expect is a list (RFC 9110 section 10.1.1), and some clients add to it what stands there already. */
const ONLY_CONTINUE = /^100-continue(?:[ \t]*,[ \t]*100-continue)*$/i;

/** Clients and servers send the same fields again and again: a hit saves 1 to 3 us of parsing. */
const knownFields = memo(parseFields, 2_048);

const joinValues = (before: string, value: string): string => before ? `${before}, ${value}` : value;

const VALUE = /^[\t\x20-\x7e\x80-\xff]*$/;

/** Whether the target's authority and Host name the same host. RFC 9112 section 3.2.2 ignores Host; here both must agree. */
function sameAuthority(authority: string, host: string): boolean {
  if (authority === host) return true;
  const plain = (name: string) => name.toLowerCase().replace(/:(?:80|443)?$/, "");
  return plain(authority) === plain(host);
}

/** The text up to the empty line. Looked for as text, because Deno takes six times as long to find it in the bytes. */
function headText(bytes: Bytes, most: number): string | undefined {
  for (const window of [2_048, most + 4]) {
    const text = bytes.toString("latin1", 0, window), end = text.indexOf("\r\n\r\n");
    if (end >= 0) return text.slice(0, end);
    if (text.length < window) break;
  }
  return undefined;
}

/** Whether an incomplete head is invalid already: a line ends with LF alone, or the first byte begins no token. */
function isBroken(bytes: Bytes): boolean {
  const text = bytes.toString("latin1", 0, bytes.length);
  return !/^(?:$|[\r\n]|[!#$%&'*+.^_`|~0-9A-Za-z-])/.test(text) || /(?:^|[^\r])\n/.test(text);
}

/** How the end of a body is found (RFC 9112 section 6.3). */
interface BodyFraming {
  readonly length: number; // 0: there is no body; -1: chunks or the end of the connection tell its end
  readonly chunked: boolean;
}

/** The head of a request as it is read, and how its body is framed. */
interface FramedHead extends RequestHead, BodyFraming {
  readonly announced: boolean; // it has a Content-Length
  readonly persistent: boolean; // the connection may serve another request
}

/** Parses the head of a request (RFC 9112 sections 3 and 6). Its `problem` says what is invalid. */
function parseRequestHead(text: string, maxFields: number): FramedHead {
  const end = text.indexOf("\r\n"), line = end < 0 ? text : text.slice(0, end);
  const [, method = "", target = "", major = "", minor = ""] = REQUEST_LINE.exec(line) ?? [];
  const fields = knownFields(end < 0 ? "" : text.slice(end)), { length, encoding, options } = fields;
  const version = major === "1" && minor === "0" ? "1.0" : "1.1", chunked = encoding === "chunked";
  const problem = ((): FailureName | undefined => {
    if (!method) return "bad-request";
    if (major !== "1") return major > "1" && method !== "PRI" ? "bad-version" : "bad-request";
    if (fields.count > maxFields) return "headers-too-large";
    if (fields.count < 0 || length === "?") return "bad-request";
    if (encoding !== undefined && (!chunked || length !== undefined || version === "1.0")) return "bad-request";
    if (fields.hosts > 1 || version === "1.1" && fields.hosts === 0) return "bad-host";
    return fields.expect && version === "1.1" && !ONLY_CONTINUE.test(fields.expect) ? "bad-expect" : undefined;
  })();
  return {
    method,
    target,
    version,
    block: fields,
    host: fields.host,
    trailers: fields.trailers,
    problem,
    upgrade: version === "1.1" && options.has("upgrade") ? fields.upgrade : "",
    expects: fields.expect !== "" && version === "1.1",
    chunked,
    length: chunked ? -1 : Number(length ?? 0),
    announced: length !== undefined,
    persistent: problem === undefined && !options.has("close") && (version === "1.1" || options.has("keep-alive")),
  };
}

/** The head of an answer. */
interface ResponseHead extends BodyFraming {
  readonly status: number;
  readonly reason: string;
  readonly fields: Fields; // without those that end at this hop
  readonly lines: string; // the same, as they are written
  readonly upgrade: string; // the protocol that it switches to
  readonly keepAlive: number; // milliseconds for which the server keeps the connection; 0: it closes
}

const BODILESS = new Set([204, 205, 304]); // statuses of answers without a body

/** Parses the head of a response; a sentence if it is invalid or ambiguous. `method` is that of the request. */
function parseResponseHead(text: string, method: string): ResponseHead | string {
  const end = text.indexOf("\r\n"), line = end < 0 ? text : text.slice(0, end);
  const [, minor, code, reason = ""] = STATUS_LINE.exec(line) ?? [], head = knownFields(end < 0 ? "" : text.slice(end));
  const { length, encoding, options, count, upgrade, idle } = head, status = Number(code), modern = minor === "1";
  if (minor === undefined || count < 0) return "its head is not that of HTTP/1.1";
  if (count > MAX_FIELDS) return `it has more than ${MAX_FIELDS} headers`;
  if (length === "?") return "its Content-Length is there twice, or no number";
  const isChunked = encoding === "chunked";
  if (encoding !== undefined && (!isChunked || length !== undefined || !modern)) return "its length is ambiguous";
  const empty = method === "HEAD" || status < 200 || BODILESS.has(status), isFramed = isChunked || length !== undefined;
  const persistent = !options.has("close") && (modern || options.has("keep-alive"));
  const excess = (status === 204 || status === 205) && (isChunked || Number(length) > 0); // left unread
  const fields = withoutVainLength(status, head.fields);
  return {
    ...{ status, reason, fields, lines: fields === head.fields ? head.lines : linesOf(fields) },
    length: empty ? 0 : Number(length ?? -1),
    chunked: isChunked && !empty,
    upgrade: options.has("upgrade") ? upgrade : "",
    keepAlive: persistent && (empty || isFramed) && !excess ? idle : 0,
  };
}

/** The fields of an answer; one whose status excludes a body has no length, either. */
const withoutVainLength = (status: number, fields: Fields): Fields =>
  status === 204 || status === 205 ? without(fields, LENGTH_NAME) : fields;
const LENGTH_NAME = new Set(["content-length"]);

/** Within a second most answers of a server have the same head. */
const knownResponseHead = memo((text) => parseResponseHead(text, "GET"), 1_024);

const MOST_PIECES = 16; // of what was read at once

/** The bytes from `at` on. An empty view would keep the whole buffer in memory, for each of thousands of idle connections. */
const bytesBehind = (bytes: Bytes, at: number): Bytes => at < bytes.length ? bytes.subarray(at) : NO_BYTES;

/** Receives a body: what is left to come, and bytes that do not yet make a line. Chunk extensions are dropped. */
class BodyDecoder {
  left: number; // bytes of the body, or of the chunk, that are still to come
  trailers: string[] = [];
  isCrowded = false; // many small chunks have come at once
  private readonly isChunked: boolean;
  private next: "data" | "size" | "line end" | "trailer" | "nothing"; // what comes now
  private rest: Bytes | undefined; // of a line that has not come whole
  private overhead = 0; // bytes of framing since the last data

  constructor({ length, chunked }: BodyFraming) {
    this.left = length < 0 ? Infinity : length;
    this.isChunked = chunked;
    this.next = length === 0 ? "nothing" : "data";
    if (chunked) this.next = "size";
  }

  /** Appends the body's bytes to `out`. Gives the bytes behind its end, undefined if more must come, or the error. */
  decode(data: Bytes, out: Bytes[]): Bytes | undefined | string {
    const bytes = this.rest ? Buffer.concat([this.rest, data]) : data;
    this.rest = undefined;
    const after = this.read(bytes, out);
    this.isCrowded = out.length > MOST_PIECES;
    if (this.isCrowded) out.splice(0, out.length, Buffer.concat(out));
    return after;
  }

  private read(bytes: Bytes, out: Bytes[]): Bytes | undefined | string {
    let at = 0;
    while (this.next !== "nothing") {
      if (at === bytes.length) return undefined;
      if (this.next === "data") {
        const isAll = at === 0 && bytes.length <= this.left; // no other view of bytes that are lent
        const piece = isAll ? bytes : bytes.subarray(at, at + this.left);
        out.push(piece);
        at += piece.length;
        this.left -= piece.length;
        this.overhead = 0;
        if (this.left === 0) this.next = this.isChunked ? "line end" : "nothing";
        continue;
      }
      const end = bytes.indexOf(10, at), size = (end < 0 ? bytes.length : end) - at;
      if (this.overhead + size > (this.next === "trailer" ? MAX_HEAD : MAX_CHUNK_LINE)) return "a line is too long";
      if (end < 0) {
        this.rest = bytes.subarray(at);
        return undefined;
      }
      if (size === 0 || bytes[end - 1] !== 13) return "a line of its chunks does not end with CR and LF";
      const problem = this.readLine(bytes.toString("latin1", at, end - 1));
      if (problem) return problem;
      this.overhead += size;
      at = end + 1;
    }
    return bytesBehind(bytes, at);
  }

  /** One line of chunked framing: a size, the end of a chunk, a trailer, or the end of all. */
  private readLine(line: string): string | undefined {
    if (this.next === "size") {
      const size = CHUNK_LINE.exec(line)?.[1];
      if (size === undefined) return "a chunk has no size";
      this.left = parseInt(size, 16);
      this.next = this.left ? "data" : "trailer";
    } else if (this.next === "line end") {
      if (line) return "a chunk is longer than its size";
      this.next = "size";
    } else if (line === "") this.next = "nothing";
    else if (!TRAILER.test(line)) return "a trailer is not valid";
    else {
      const colon = line.indexOf(":"), name = line.slice(0, colon);
      if (mayTrail(name)) this.trailers.push(name, trimmed(line, colon + 1, line.length));
    }
    return undefined;
  }
}

/** Whether a field may be a trailer: none that frames, routes or authenticates (RFC 9110 section 6.5.1). */
const mayTrail = (name: string): boolean => fieldRole(name) === "pass" && !NOT_IN_TRAILERS.test(name);
const NOT_IN_TRAILERS =
  /^(?:authorization|cache-control|content-(?:encoding|range|type)|cookie|forwarded|max-forwards|pragma|proxy.*|range|set-cookie|trailer|via|x[-_.]forwarded.*|x[-_.]real[-_.]ip|x-request-id)$/i;

/** The size line of a chunk. */
const chunkHead = (size: number): string => `${size.toString(16)}\r\n`;
const lastChunk = (trailers: Fields): string => `0\r\n${linesOf(trailers)}\r\n`;

// --- 3.2 Sockets: pausing, writing and resetting them; what both sides of HTTP have, and the sweep of timeouts ---

const CLOSED = "it closed the connection";
const MOST_LATE = 1_000; // milliseconds between sweeps above which the process was stalled

/**
 * Deno goes on reading what lies below a paused TLS socket, into memory and without bound (tried on 2.9.6): that has to be
 * held too. `_handle._parent` is no public API; where it is not there, a slow reader over TLS costs memory.
 */
function socketBelow(socket: Socket): { readStop?(): void; readStart?(): void } | undefined {
  if (!("Deno" in globalThis && "encrypted" in socket)) return undefined;
  return (socket as unknown as { _handle?: { _parent?: { readStop?(): void; readStart?(): void } } })._handle?._parent;
}
function pauseSocket(socket: Socket): void {
  socket.pause();
  socketBelow(socket)?.readStop?.();
}
function resumeSocket(socket: Socket): void {
  socketBelow(socket)?.readStart?.();
  socket.resume();
}

/** Resets a connection: a regular end would mark the response as complete. TLS lacks its close_notify then. */
const resetSocket = (socket: Socket): unknown =>
  socket.destroyed || ("encrypted" in socket ? socket.destroy() : socket.resetAndDestroy());

const LENT_SIZE = 65_536; // bytes
const FRAME_HEADS = 64; // bytes of the heads of HTTP/2's frames, for as many bytes
const idleBuffers: Bytes[] = []; // that nobody uses: 4 MiB at most

/** Memory of a size. A large buffer is reused once it has been written, for V8 is slow to collect thousands. */
function borrowed(size: number): Bytes {
  if (size < LENT_SIZE / 2 || size > LENT_SIZE + FRAME_HEADS) return Buffer.allocUnsafe(size);
  const buffer = idleBuffers.pop() ?? Buffer.allocUnsafeSlow(LENT_SIZE + FRAME_HEADS), part = buffer.subarray(0, size);
  LENT_BUFFERS.set(part, buffer);
  return part;
}
function copyOfBytes(bytes: Bytes): Bytes {
  const copy = borrowed(bytes.length);
  bytes.copy(copy);
  return copy;
}
/** Frees a lent buffer: its bytes are not needed any more. */
function giveBack(bytes: Bytes): void {
  const buffer = LENT_BUFFERS.get(bytes);
  LENT_BUFFERS.delete(bytes);
  if (buffer) useAgain(buffer);
}
const useAgain = (buffer: Bytes): unknown => idleBuffers.length < 64 && idleBuffers.push(buffer);

/** Writes bytes. A buffer that was lent is free again when all of it has gone out. */
function writeBytes(socket: Socket, bytes: Bytes): void {
  const buffer = LENT_BUFFERS.get(bytes);
  if (!buffer) return void socket.write(bytes);
  LENT_BUFFERS.delete(bytes); // once
  socket.write(bytes, () => void useAgain(buffer));
}

/** Whether less than WINDOW waits in a socket. `write` returns false even where all went out at once. */
const socketHasRoom = (socket: Socket): boolean => socket.writableLength < WINDOW;

/**
 * A connection that speaks HTTP, of any version. What it writes in one turn of the event loop leaves at the end of the turn, as one
 * text: that is fewer system calls, and a process at the other end of many connections wakes up once.
 */
abstract class Connection implements SocketListener {
  readonly socket: Socket;
  protected unwritten = ""; // texts of this turn
  protected hasLeft = false; // the socket has got the beginning of the latest message

  protected reason = CLOSED; // why it is closed, as the socket tells
  protected listener: SocketListener = this; // another one once the socket has switched protocols

  /** @param from the connection of another version that had the socket before, and goes on hearing of it */
  constructor(socket: Socket, from?: Connection) {
    this.socket = socket;
    if (from) {
      from.listener = this;
      return;
    }
    socket.on("data", (bytes: Bytes) => this.listener.onData(bytes));
    socket.on("drain", () => this.listener.onDrain());
    socket.on("end", () => this.listener.onEnd());
    socket.on("error", (error: Error) => void (this.reason = error.message || String(error))); // `close` follows
    socket.on("close", () => this.listener.onClose());
  }

  abstract onData(bytes: Bytes): void;
  abstract onDrain(): void;
  abstract onEnd(): void;
  abstract onClose(): void;

  /** Writes a text as Latin-1, behind the others of this turn. */
  protected write(text: string): void {
    if (this.unwritten === "" && writing.push(this) === 1) setImmediate(flushAll);
    this.unwritten += text;
    if (this.unwritten.length >= WINDOW) this.flush();
  }

  flush(): void {
    const { socket, unwritten: text } = this;
    if (text === "" || socket.destroyed || socket.writableEnded) return;
    this.unwritten = "";
    this.hasLeft = true;
    if ("encrypted" in socket) socket.write(Buffer.from(text, "latin1")); // Deno writes queued texts as UTF-8 (2.9.6)
    else socket.write(text, "latin1");
  }

  /** Writes some of a body. False: the socket is full, and the body has to pause until `drain`. */
  protected writeBody(bytes: Bytes, chunked: boolean): boolean {
    const { socket } = this;
    if (bytes.length <= SMALL) {
      const text = bytes.toString("latin1");
      this.write(chunked ? `${chunkHead(bytes.length)}${text}\r\n` : text);
    } else if (!chunked && this.unwritten === "") writeBytes(socket, bytes);
    else {
      socket.cork();
      if (chunked) this.write(chunkHead(bytes.length));
      this.flush();
      writeBytes(socket, bytes);
      if (chunked) this.write("\r\n");
      socket.uncork();
    }
    return socketHasRoom(socket);
  }

  pauseReading(): void {
    pauseSocket(this.socket);
  }
  resumeReading(): void {
    resumeSocket(this.socket);
  }

  /** Called by the sweep. */
  abstract checkTimeouts(now: number): void;

  /** Ends our side. */
  protected end(): void {
    if (this.socket.writableEnded) return;
    this.flush();
    this.socket.end();
  }
}

/** Open connections. One timer checks the timeouts of all, so that a request needs none; it stops when none are left. */
class Connections<C extends Connection> extends Set<C> {
  private readonly now: () => number;
  private timer: ReturnType<typeof setInterval> | undefined;
  private sweptAt = 0;

  constructor(now: () => number) {
    super();
    this.now = now;
  }

  override add(connection: C): this {
    if (!this.size) [this.sweptAt, this.timer] = [this.now(), setInterval(() => this.sweep(), TICK)];
    connection.socket.on("close", () => this.delete(connection));
    return super.add(connection);
  }
  override delete(connection: C): boolean {
    if (this.size === 1 && this.has(connection)) clearInterval(this.timer);
    return super.delete(connection);
  }
  private sweep(): void {
    const now = this.now(), stoodStill = now - this.sweptAt > MOST_LATE;
    this.sweptAt = now;
    if (stoodStill) return; // what has come meanwhile has yet to be read
    for (const connection of this) connection.checkTimeouts(now);
  }
}
const TICK = 100; // milliseconds between two sweeps: the precision of timeouts

const SMALL = 8_192; // bytes of a body that are written together with what stands before them, as one text
let writing: Connection[] = []; // those that have written in this turn

function flushAll(): void {
  const all = writing;
  writing = [];
  for (const connection of all) connection.flush();
}

// --- 3.3 Tunnels: connections that have switched to another protocol ---

const GOING_AWAY = 1001; // a close code (RFC 6455 section 7.4.1)
const PARTING = 5_000; // milliseconds of silence after which a closing WebSocket is cut off

/** The position in a stream of WebSocket frames (RFC 6455 section 5.2). */
class FrameCounter {
  closed = false; // there was a close frame
  private head: Bytes = NO_BYTES; // of the next frame, as far as it has come
  private left = 0; // bytes of this one's payload that are still to come

  /** Whether the next byte begins a frame. */
  isBetween(): boolean {
    return this.left === 0 && this.head.length === 0;
  }

  follow(next: Bytes): void {
    const bytes = this.head.length ? Buffer.concat([this.head, next]) : next;
    this.head = NO_BYTES;
    for (let at = 0;;) {
      const payload = Math.min(this.left, bytes.length - at);
      this.left -= payload;
      at += payload;
      if (at === bytes.length) return;
      const size = frameHeadSize(bytes, at);
      if (at + size > bytes.length) { // a copy, that does not keep all the rest
        this.head = Buffer.from(bytes.subarray(at));
        return;
      }
      if ((bytes[at]! & 15) === CLOSE_FRAME) this.closed = true;
      this.left = payloadSize(bytes, at);
      at += size;
    }
  }
}
const CLOSE_FRAME = 8; // an opcode

/** The size of the frame head at `at`; if the head is incomplete, more than there are bytes. */
function frameHeadSize(bytes: Bytes, at: number): number {
  const second = bytes[at + 1];
  if (second === undefined) return 2;
  const short = second & 0x7f;
  const masked = second & 0x80 ? 4 : 0;
  if (short === 127) return 10 + masked;
  return short === 126 ? 4 + masked : 2 + masked;
}
function payloadSize(bytes: Bytes, at: number): number {
  const short = bytes[at + 1]! & 0x7f;
  if (short === 127) return Number(bytes.readBigUInt64BE(at + 2));
  return short === 126 ? bytes.readUInt16BE(at + 2) : short;
}

/** A close frame. What goes to a server is masked; the mask may be any, and so is one of zeros (section 5.3). */
const closeFrame = (code: number, masked: boolean): Bytes =>
  Buffer.from(masked ? [0x88, 0x82, 0, 0, 0, 0, code >> 8, code & 255] : [0x88, 2, code >> 8, code & 255]);

const isWebSocket = (protocol: string): boolean => protocol.toLowerCase() === "websocket";

/** What is wrong with the answer to a WebSocket's handshake, if anything (section 4.1). */
function handshakeMistake(asked: Fields, answered: Fields): string | undefined {
  const key = fieldOf(asked, "sec-websocket-key") ?? "", protocol = fieldOf(answered, "sec-websocket-protocol");
  const offered = (fieldOf(asked, "sec-websocket-protocol") ?? "").split(",").map((one) => one.trim());
  const proof = createHash("sha1").update(`${key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11`).digest("base64");
  if (fieldOf(answered, "sec-websocket-accept") !== proof) return "its Sec-WebSocket-Accept does not fit the key";
  return protocol && !offered.includes(protocol) ? "it speaks a subprotocol that was not offered" : undefined;
}

/** One side of a ByteTunnel: what comes from its socket goes to that of the other side. */
class ByteSide implements SocketListener {
  readonly socket: Socket;
  readonly frames = new FrameCounter();
  other: ByteSide = this; // until the tunnel has both
  bytes = 0;
  isDone = false; // it has ended its side
  private readonly tunnel: ByteTunnel;
  private readonly blame: Failure; // why the tunnel ended, where this side breaks it off

  constructor(tunnel: ByteTunnel, socket: Socket, blame: Failure) {
    this.tunnel = tunnel;
    this.socket = socket;
    this.blame = blame;
  }

  onData(bytes: Bytes): void {
    const { tunnel, other: { socket: to } } = this;
    if (tunnel.closing || to.writableEnded) return;
    this.bytes += bytes.length;
    if (tunnel.webSocket) this.frames.follow(bytes);
    to.write(bytes);
    if (!socketHasRoom(to)) pauseSocket(this.socket);
  }
  onDrain(): void {
    resumeSocket(this.other.socket);
  }

  /** It has half-closed: the other side sees that, and may go on sending. */
  onEnd(): void {
    const { tunnel, other } = this;
    if (this.isDone) return;
    this.isDone = true;
    if (tunnel.webSocket && !tunnel.isEnding() && !other.isDone) tunnel.problem = this.blame;
    resumeSocket(other.socket); // a paused socket does not report its end
    if (!other.socket.writableEnded) other.socket.end();
  }

  /** Its connection is closed; without a half-close before, it was cut off. A server may do that behind its client. */
  onClose(): void {
    const { tunnel, other, isDone } = this, isOver = isDone || this === tunnel.server && other.isDone;
    if (!isOver && !tunnel.webSocket && !tunnel.closing) { // a regular end would make what is cut look whole
      tunnel.problem ??= this.blame;
      this.isDone = true;
      return void resetSocket(other.socket);
    }
    this.onEnd();
    other.socket.destroySoon();
  }
}

/** Passes bytes between two sockets: after an upgrade, and for TCP services. */
class ByteTunnel implements Tunnel {
  readonly client: ByteSide;
  readonly server: ByteSide;
  readonly webSocket: boolean;
  problem: Failure | undefined;
  closing = false; // we have ended it
  private readonly idle: number; // milliseconds of silence after which it is ended
  private seen = -1; // bytes both ways, when it was last looked at
  private since = 0; // when some last passed

  constructor(client: Socket, server: Socket, protocol: string, idle: number) {
    this.client = new ByteSide(this, client, "client-left");
    this.server = new ByteSide(this, server, "reset");
    [this.client.other, this.server.other] = [this.server, this.client];
    this.webSocket = isWebSocket(protocol);
    this.idle = idle;
  }

  /** Ends it early: WebSockets get a close frame, except in the middle of another frame. */
  close(code: number): void {
    if (this.closing) return;
    this.closing = true;
    for (const { socket, other: { frames } } of [this.server, this.client]) {
      const isMasked = socket === this.server.socket;
      resumeSocket(socket);
      if (socket.writableEnded) continue;
      if (this.webSocket && frames.isBetween() && !frames.closed) socket.write(closeFrame(code, isMasked));
      socket.end();
    }
  }

  /** Compares byte counts from sweep to sweep, so that passing bytes never reads the clock. */
  checkTimeouts(now: number): void {
    const { client, server, idle } = this, isHalf = client.isDone || server.isDone;
    const passed = client.bytes + server.bytes;
    if (passed !== this.seen) [this.seen, this.since] = [passed, now];
    const silence = now - this.since, parting = this.closing || this.webSocket && isHalf;
    if (silence < (parting ? Math.min(PARTING, idle) : idle)) return;
    if (parting || isHalf) return [server, client].forEach(({ socket }) => socket.destroy());
    this.problem = "client-timeout";
    this.since = now;
    this.close(GOING_AWAY);
  }

  /** Whether one side of a WebSocket has sent a close frame, or the balancer has ended the tunnel. */
  isEnding(): boolean {
    return this.closing || this.client.frames.closed || this.server.frames.closed;
  }
}

/** Two bodies as a socket, where a tunnel is one stream of a connection: what comes in, and what `send` has go out. */
function socketOf(incoming: Body, send: (outgoing: Body) => void): Socket {
  let goOn: (() => void) | undefined;
  const outgoing = new StreamedBody(-1, { resumeReading: () => goOn?.(), discardRest: () => socket.destroy() });
  const socket: Duplex = new Duplex({
    read: () => incoming.resume(),
    write(bytes: Bytes, _encoding, done) {
      outgoing.push(bytes);
      if (outgoing.isSourcePaused) goOn = done;
      else done();
    },
    final(done) {
      outgoing.end(NO_FIELDS);
      done();
    },
    destroy(error, done) {
      outgoing.end("reset");
      incoming.cancel();
      done(error);
    },
  });
  send(outgoing);
  incoming.read({
    data: (bytes) => socket.push(bytes) || incoming.pause(),
    end: () => socket.push(null),
    fail: () => socket.destroy(),
  });
  const destroySoon = () => socket.writableFinished ? socket.destroy() : socket.end(() => socket.destroy());
  return Object.assign(socket, { destroySoon, resetAndDestroy: () => socket.destroy() }) as unknown as Socket;
}

// --- 3.4 Server: connections of clients, one request at a time on each ---

const ENCODER = new TextEncoder();

/** JSON in ASCII: its length is its size, and it is safe in log lines. */
function asciiJson(value: unknown): string {
  const text = JSON.stringify(value);
  if (Buffer.byteLength(text) === text.length && !text.includes("\x7f")) return text; // faster than a search
  return text.replace(/[^\x20-\x7e]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

const CLOSING = new Set([400, 405, 408, 414, 417, 431, 505]);

/** A local reply with a text. */
const textReply = (status: number, text: string, fields: Fields): HttpResponse => {
  const body = new MemoryBody(Buffer.from(text));
  return { status, reason: "", fields: [...fields, "content-length", `${body.length}`], body };
};

/** A local reply that says why a request fails: a text, or a problem (RFC 9457) for clients that accept JSON. */
function failureReply(kind: FailureName, accept = "", id = ""): HttpResponse {
  const { status, text } = FAILURES[kind], json = /[/+]json/.test(accept);
  const problem = { type: "about:blank", title: text, status, failure: kind, request: id };
  const reply = textReply(status, json ? asciiJson(problem) + "\n" : `${status}: ${text}\n`, [
    ...["content-type", json ? "application/problem+json" : "text/plain; charset=utf-8"],
    ...["cache-control", "no-store", "x-lb-failure", kind],
    ...(status === 503 || kind === "client-busy") ? ["retry-after", "1"] : [],
  ]);
  return { ...reply, closes: CLOSING.has(status) };
}

/** Formats the time once a second: thousands of lines share the text. */
function onceASecond(write: (date: Date) => string): (date: Date) => string {
  let [second, text] = [NaN, ""];
  return (date) => {
    const now = Math.floor(date.getTime() / 1_000);
    if (now !== second) [second, text] = [now, write(date)];
    return text;
  };
}

const DISCARDED = 65_536; // bytes of a refused body that are read so that the connection can serve another request
/** Milliseconds for which a closed connection is read on: while silent, at most, and at most without an upload. */
const LINGER = { silent: 2_000, most: 30_000, without: 1_000 }; // nginx: 5 s, 30 s
const REFUSED = 1_000; // milliseconds for which a refused connection is read on
const PROBES = 2; // interim responses that test whether a half-closed client is there: the second fails if not
const PROBE_AFTER = 300; // milliseconds until each
const STANDSTILL = 600; // milliseconds in which a half-closed client must take a byte of its response

/** What an HttpServer needs from its owner. */
interface ServerContext {
  handle(request: HttpRequest): void;
  limits(): Pick<Config["limits"], "header" | "keep_alive" | "header_size" | "header_fields">;
  draining(): boolean;
  now(): number; // milliseconds
  http2?(): boolean; // whether the listener takes HTTP/2 without TLS
}
const PREFACE = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"; // RFC 9113 section 3.4

/** A request on its connection. */
type IncomingRequest = HttpRequest & FramedHead & { expects: boolean; body: Body };

/** The client has its response. */
function endRequest(request: HttpRequest): void {
  request.gone = true;
  request.onGone = undefined;
}
/** The client has left before it had its response. */
function cancelRequest(request: HttpRequest): void {
  request.gone = true;
  request.onGone?.();
  request.onGone = undefined;
}

/** Reads on after a turn of the event loop: many small chunks are so much work that the other connections would wait. */
function letOthersGoFirst(socket: Socket, isPaused: () => boolean): void {
  pauseSocket(socket);
  setImmediate(() => isPaused() || resumeSocket(socket));
}

/** A body in gzip, of which each piece goes out when it comes: CompressionStream holds them back on Bun and Node. */
function gzipped(body: Body): Body {
  const gzip = createGzip({ flush: zlib.Z_SYNC_FLUSH });
  let trailers = NO_FIELDS;
  const packed: StreamedBody = new StreamedBody(-1, {
    onRead: () =>
      body.read({
        data(bytes) {
          if (!gzip.write(bytes)) body.pause();
        },
        end(given) {
          trailers = given;
          gzip.end();
        },
        fail(why) {
          gzip.destroy();
          packed.end(why);
        },
      }),
    pauseReading: () => gzip.pause(),
    resumeReading: () => gzip.resume(),
    discardRest() {
      gzip.destroy();
      body.cancel();
    },
  });
  gzip.on("data", (bytes: Bytes) => packed.push(bytes)).on("drain", () => body.resume());
  gzip.on("end", () => packed.end(trailers));
  return packed;
}

/** `Date`, made once a second (RFC 9110 section 6.6.1). */
const dateLine = onceASecond((date) => `Date: ${date.toUTCString()}\r\n`);

/** The state of a client's connection: `head`, part of one has come; `request`, its response is not out yet. */
type ConnectionPhase = "idle" | "head" | "request" | "discarding" | "lingering" | "tunnel";

/** One connection of a client. */
class ClientConnection extends Connection implements BodySource {
  readonly scheme: string;
  readonly peer: string;
  private readonly context: ServerContext;
  private readonly switchToHttp2: (from: ClientConnection, received: Bytes) => void;
  private phase: ConnectionPhase = "idle";
  private since: number; // when the phase began, or something last passed in it; `head`: when the head began
  private lingersUntil = 0; // when a connection that we have ended is closed at the latest
  private served = 0; // requests
  private unsent = 0; // bytes that waited in the socket when it was last looked at
  private rest: Bytes = NO_BYTES; // received, and not yet looked at
  private searched = 0; // bytes of `rest` that were searched for the end of a head
  private proceeding = false;
  private isPipelineFull = false; // the socket is paused until requests in `rest` have been taken
  private request: IncomingRequest | undefined;
  private receiving: BodyDecoder | undefined; // the request's body
  private body: StreamedBody | undefined; // the same, for its reader
  private answer: Body | undefined; // the answer's body, while it is written
  private closes = false; // after the answer
  private clientEnded = false; // the client has ended its side
  private probes = 0;

  /** @param switchToHttp2 called where the client begins with the preface of HTTP/2 */
  constructor(
    context: ServerContext,
    socket: Socket,
    scheme: string,
    switchToHttp2: ClientConnection["switchToHttp2"],
  ) {
    super(socket);
    this.context = context;
    this.scheme = scheme;
    this.switchToHttp2 = switchToHttp2;
    this.peer = unmapped(socket.remoteAddress);
    this.since = context.now();
  }

  private enter(phase: ConnectionPhase): void {
    this.phase = phase;
    this.since = this.context.now();
  }

  onData(bytes: Bytes): void {
    if (this.phase === "lingering") return void (this.since = this.context.now());
    if (this.receiving) return this.receiveBody(this.receiving, bytes);
    this.rest = this.rest.length ? Buffer.concat([this.rest, bytes]) : bytes;
    if (this.phase !== "request") this.proceed();
    if (this.rest.length >= DISCARDED && (this.phase === "request" || !socketHasRoom(this.socket))) {
      this.pausePipeline();
    }
  }

  /** Pauses the socket once 64 KiB of pipelined requests wait. */
  private pausePipeline(): void {
    if (this.isPipelineFull) return;
    this.isPipelineFull = true;
    pauseSocket(this.socket);
  }

  /** Takes requests while there are any, and while the client reads its responses. */
  private proceed(): void {
    if (this.proceeding) return;
    this.proceeding = true;
    while ((this.phase === "idle" || this.phase === "head") && this.rest.length && socketHasRoom(this.socket)) {
      if (!this.served && this.rest[0] === PREFACE.charCodeAt(0) && this.hasPreface()) return;
      if (!this.takeRequest()) break;
    }
    this.proceeding = false;
    const waits = this.phase === "idle" || this.phase === "head";
    if (waits && this.clientEnded && socketHasRoom(this.socket)) this.close();
    if (!this.isPipelineFull || this.rest.length >= DISCARDED) return;
    this.isPipelineFull = false;
    resumeSocket(this.socket);
  }

  /** Whether the first bytes are those of HTTP/2, which goes on from here, or may become them. */
  private hasPreface(): boolean {
    const begin = this.rest.toString("latin1", 0, PREFACE.length);
    if (!PREFACE.startsWith(begin) || !this.context.http2?.()) return false;
    this.proceeding = false;
    if (this.phase === "idle") this.enter("head");
    if (begin === PREFACE) this.switchToHttp2(this, this.rest);
    return true;
  }

  /** Takes one request off the front of what has come; false where its head is not whole yet. */
  private takeRequest(): boolean {
    const { header_size, header_fields } = this.context.limits();
    if (this.phase === "head" && this.searched && this.rest.length <= header_size) { // a head that drips is searched once
      const tail = this.rest.toString("latin1", this.searched - 3);
      if (!tail.includes("\r\n\r\n") && !/[^\r]\n/.test(tail)) {
        this.searched = this.rest.length;
        return false;
      }
    }
    this.searched = 0;
    let start = 0; // an empty line in front is ignored (RFC 9112 section 2.2)
    while (this.rest[start] === 13 && this.rest[start + 1] === 10) start += 2;
    const bytes = start ? this.rest.subarray(start) : this.rest, text = headText(bytes, header_size);
    this.rest = bytes;
    if (text === undefined || text.length > header_size) {
      if (text !== undefined || bytes.length > header_size + 3) {
        const line = bytes.indexOf("\r\n");
        return this.refuse(line < 0 || line > MAX_TARGET + 100 ? "uri-too-long" : "headers-too-large");
      }
      if (isBroken(bytes)) return this.refuse("bad-request");
      const begun = bytes.length > 1 || bytes.length === 1 && bytes[0] !== 13; // a CR may be that of an empty line
      if (begun && this.phase === "idle") this.enter("head");
      if (bytes.length > 3) this.searched = bytes.length;
      return false;
    }
    const head = parseRequestHead(text, header_fields);
    this.rest = bytesBehind(bytes, text.length + 4);
    this.begin(head);
    return true;
  }

  /** Refuses bytes that are not a request; this is counted and logged like any other request. */
  private refuse(problem: FailureName): true {
    this.begin({ ...parseRequestHead("", 0), problem });
    return true;
  }

  private begin(head: FramedHead): void {
    const { scheme, peer, rest } = this;
    const request: IncomingRequest = this.request = {
      ...head,
      scheme,
      peer,
      source: undefined,
      body: NO_BODY,
      gone: false,
      onGone: undefined,
      respond: (response) => this.respond(request, response),
      inform: (status, reason, fields) => this.inform(request, status, reason, fields),
    };
    this.phase = "request";
    this.served++;
    this.closes = false;
    if (head.problem) this.rest = NO_BYTES;
    else if (head.length === 0) request.body = head.announced ? EMPTY_BODY : NO_BODY;
    else if (head.length > 0 && rest.length >= head.length) {
      request.body = new MemoryBody(rest.subarray(0, head.length));
      this.rest = bytesBehind(rest, head.length);
    } else {
      request.body = this.body = new StreamedBody(head.length, this);
      if (head.length < 0) this.body.kept = [];
      this.receiving = new BodyDecoder(head);
      this.rest = NO_BYTES;
      if (rest.length) this.receiveBody(this.receiving, rest);
    }
    this.context.handle(request);
  }

  private receiveBody(receiving: BodyDecoder, bytes: Bytes): void {
    const out: Bytes[] = [], { body, request } = this;
    const after = receiving.decode(bytes, out);
    if (request) request.expects = false; // the client did not wait
    if (this.phase === "discarding") this.since = this.context.now();
    for (const piece of out) body!.push(piece);
    if (receiving.isCrowded) letOthersGoFirst(this.socket, () => this.isPipelineFull || !!this.body?.isSourcePaused);
    if (this.receiving !== receiving || after === undefined) return;
    this.receiving = this.body = undefined;
    if (typeof after === "string") {
      this.closes = true;
      return this.phase === "discarding" ? this.close() : body!.end("bad-body");
    }
    this.rest = after;
    body!.end(receiving.trailers);
    if (this.phase === "discarding") this.next();
  }

  /** Sends 100 Continue to a client that waits for it (RFC 9110 section 10.1.1), now that its body is read. */
  onRead(): void {
    const { request } = this;
    if (!request?.expects || this.answer) return;
    request.expects = false;
    this.write("HTTP/1.1 100 Continue\r\n\r\n");
  }
  discardRest(): void {
    this.resumeReading(); // the rest is read and thrown away
  }

  inform(request: IncomingRequest, status: number, reason: string, fields: Fields): void {
    if (request !== this.request || this.answer || request.version === "1.0") return;
    this.write(`HTTP/1.1 ${status} ${reason || STATUS_CODES[status] || ""}\r\n${linesOf(fields)}\r\n`);
  }

  respond(request: IncomingRequest, response: HttpResponse): void {
    const { status, body } = response, { receiving } = this;
    if (request !== this.request || this.answer) return body.cancel(); // the client has disconnected
    if (response.tunnel) return this.switch(response, response.tunnel);
    const bodiless = request.method === "HEAD" || BODILESS.has(status), length = bodiless ? 0 : body.length;
    const chunked = length < 0 && request.version !== "1.0";
    const isUnread = !!receiving && (request.expects || request.chunked || receiving.left > DISCARDED);
    const isAmbiguous = request.upgrade !== "" && this.rest.length > 0; // of another protocol, or the next request
    const endsByClose = length < 0 && !chunked;
    this.closes ||= !request.persistent || !!response.closes || isUnread || isAmbiguous || endsByClose;
    this.closes ||= this.context.draining();
    this.answer = body;
    this.write(this.headOf(request, response, chunked, bodiless));
    if (bodiless) {
      body.cancel();
      return this.answered();
    }
    body.read({
      data: (bytes) => {
        const room = this.writeBody(bytes, chunked);
        if (this.clientEnded) this.since = this.context.now();
        if (!room) body.pause();
      },
      end: (trailers) => {
        if (chunked) this.write(lastChunk(trailers));
        this.answered();
      },
      fail: () => this.breakOff(endsByClose),
    });
  }

  private headOf(request: HttpRequest, response: HttpResponse, chunked: boolean, bodiless: boolean): string {
    const { status, reason, fields, body } = response;
    let head = `HTTP/1.1 ${status} ${reason || STATUS_CODES[status] || ""}\r\n${response.lines ?? linesOf(fields)}`;
    if (fieldOf(fields, "date") === undefined) head += dateLine(new Date());
    const framed = status === 205 || body.length >= 0 && !bodiless;
    if (chunked) head += "Transfer-Encoding: chunked\r\n";
    else if (framed && fieldOf(fields, "content-length") === undefined) {
      head += `Content-Length: ${status === 205 ? 0 : body.length}\r\n`;
    }
    if (this.closes) return `${head}Connection: close\r\n\r\n`;
    return request.version === "1.0" ? `${head}Connection: keep-alive\r\n\r\n` : `${head}\r\n`;
  }

  /** The answer has been written. */
  private answered(): void {
    if (this.request) endRequest(this.request);
    this.request = this.answer = undefined;
    if (this.closes || this.clientEnded && !this.rest.length) return this.close();
    this.body?.cancel();
    if (this.receiving) this.enter("discarding");
    else this.next();
  }

  private next(): void {
    this.enter("idle");
    this.proceed();
  }

  /** Ends our side, and reads on for a while: a client that is still sending would otherwise lose its answer to a reset. */
  private close(): void {
    const most = this.receiving ? LINGER.most : LINGER.without;
    this.body?.cancel();
    this.receiving = this.body = undefined;
    this.rest = NO_BYTES;
    this.enter("lingering");
    this.lingersUntil = this.since + most;
    this.end();
    resumeSocket(this.socket);
  }

  /** Cuts the response short. `silent`: only a reset shows the client that it is incomplete. */
  private breakOff(silent: boolean): void {
    if (!this.answer) return; // the client has left
    if (this.request) this.request.onGone = undefined;
    this.answer = undefined;
    this.flush();
    if (silent) resetSocket(this.socket);
    else this.close();
    this.leave();
  }

  /** The server has agreed to another protocol: the connection is a tunnel from here on (RFC 9110 section 7.8). */
  private switch(response: HttpResponse, server: UpstreamEnd): void {
    const { rest, request } = this, lines = response.lines ?? linesOf(response.fields);
    this.phase = "tunnel";
    this.rest = NO_BYTES;
    this.request = undefined;
    request!.gone = true;
    const status = `HTTP/1.1 101 ${response.reason || "Switching Protocols"}\r\n`;
    this.write(`${status}Connection: Upgrade\r\nUpgrade: ${server.protocol}\r\n${lines}\r\n`);
    this.flush();
    const tunnel = this.listener = server.join(this.socket);
    if (rest.length) tunnel.onData(rest);
    if (this.isPipelineFull) resumeSocket(this.socket);
    if (this.clientEnded) tunnel.onEnd();
  }

  onDrain(): void {
    if (this.answer) this.answer.resume();
    else this.proceed();
  }

  /** The client has half-closed. It still gets its response, unless its request is incomplete. */
  onEnd(): void {
    this.clientEnded = true;
    if (this.receiving && this.phase === "request") this.leave();
    if (this.phase === "request" && this.request) this.since = this.context.now();
    else if (this.phase === "idle" || this.phase === "head") this.proceed();
    else this.end();
  }

  onClose(): void {
    this.leave();
  }

  /** The client gets no more: its request is cancelled, and with an upload in progress the connection to the server ends. */
  private leave(): void {
    const { request, body, answer } = this;
    this.receiving = this.body = undefined;
    this.request = this.answer = undefined;
    body?.end("client-left");
    if (!request) return;
    cancelRequest(request);
    answer?.cancel();
  }

  /** Ends a connection that waits for its next request; the others end with their answers, a new one with its first. */
  closeIdle(): void {
    if (this.served && (this.phase === "idle" || this.phase === "discarding")) this.close();
  }

  /** Whether the client has yet to take some of its answers. */
  isWriting(): boolean {
    return this.phase !== "tunnel" && (this.unwritten !== "" || this.socket.writableLength > 0);
  }

  checkTimeouts(now: number): void {
    const { phase, socket } = this, { header, keep_alive } = this.context.limits(), waited = now - this.since;
    const { answer } = this, isTimedByServer = answer instanceof StreamedBody && answer.hasTimeouts && !answer.over;
    if (phase === "tunnel") return;
    if (socket.writableLength !== this.unsent) { // the client takes something
      this.unsent = socket.writableLength;
      if (phase !== "head") this.since = now;
    } else if (phase === "idle") {
      if (waited >= (this.served ? keep_alive : header)) this.close();
    } else if (phase === "head") {
      if (waited >= header) this.refuse("client-timeout");
    } else if (phase === "discarding") {
      if (waited >= header) socket.destroy();
    } else if (phase === "lingering") {
      const limit = this.unsent ? keep_alive : LINGER.silent;
      if (waited >= limit || !this.unsent && now >= this.lingersUntil) socket.destroy();
    } else if (this.clientEnded && this.answer) {
      if (waited >= STANDSTILL) socket.destroy();
    } else if (this.clientEnded && this.request) this.probe(now);
    else if (this.unsent && !isTimedByServer && waited >= keep_alive) socket.destroy();
  }

  /**
   * A client that has ended its side may still read, or be gone: TCP does not tell before something is sent. Interim answers
   * are skipped by all clients of HTTP/1.1, and where nobody is there the second one fails.
   */
  private probe(now: number): void {
    if (this.probes >= PROBES || this.request!.version === "1.0" || now - this.since < PROBE_AFTER) return;
    this.probes++;
    this.since = now;
    this.write("HTTP/1.1 100 Continue\r\n\r\n");
  }
}

// --- 3.5 Client: connections to servers, one request after the other on each ---

const MAX_AGE = 60_000; // milliseconds: an older connection is not used again, so that names are resolved again
const IDLE = 4_000; // milliseconds: below the 5 s after which Node's servers close

const BODY_EXPECTED = new Set(["POST", "PUT", "PATCH"]);
/** Methods that may be sent again when it is not known whether the server has seen them (RFC 9110 section 9.2.2). */
const IDEMPOTENT = new Set(["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PROPFIND", "REPORT", "SEARCH", "QUERY"]);

/** Whether a request can be sent again as it was: twice does no harm, and nothing of its body is used up. */
const mayRepeat = ({ method, body }: Pick<Attempt, "method" | "body">): boolean =>
  IDEMPOTENT.has(method) && body.bytes !== undefined;

const isSecure = ({ url }: Server): boolean => url.startsWith("https:");

/** What connections to servers share. */
abstract class Dialer {
  time = 0; // when `now` was last asked: at most a TICK ago while there are connections
  readonly pools: WeakMap<Server, UpstreamConnection[]> = new WeakMap(); // those that wait, the newest last
  readonly moved: WeakSet<Attempt> = new WeakSet(); // attempts that have changed their connection of HTTP/2
  readonly mostStreams: WeakMap<Server, number> = new WeakMap(); // that a server takes at once on a connection, as it said last
  readonly withoutHttp2: WeakSet<Server> = new WeakSet(); // servers that have chosen HTTP/1.1
  abstract readonly now: () => number;
  abstract send(attempt: Attempt): void;
  /** Sends an attempt over a new connection. */
  abstract open(attempt: Attempt): void;
}

/** The progress of an attempt, by which its timeouts are checked. */
interface Progress {
  since: number; // when something last passed
  connected: boolean;
  sent: boolean; // the whole request is out
  isFull: boolean; // the upload waits for the server
  head: ResponseHead | undefined;
  body: StreamedBody | undefined; // the response's
}

/** Which of its timeouts an attempt has exceeded, if any. */
function exceededTimeout({ startedAt, timeouts, deadline }: Attempt, at: Progress, now: number): Failure | undefined {
  const silence = now - at.since, { connect, response, idle, request } = timeouts;
  if (now >= deadline) return "deadline";
  if (!at.connected) return silence < connect ? undefined : "connect-timeout";
  if (at.sent && !at.head) return silence < response ? undefined : "timeout";
  if (silence < idle && (at.sent || now - startedAt < request)) return undefined;
  if (at.body?.isSourcePaused || !at.sent && !at.isFull) return "client-timeout"; // it is the client's turn
  return at.head ? "idle" : "timeout";
}

/** One connection to a server. */
class UpstreamConnection extends Connection implements BodySource, Progress {
  readonly client: Dialer;
  readonly pool: UpstreamConnection[];
  readonly bornAt: number;
  idleUntil = 0;
  attempt: Attempt | undefined; // undefined: it waits for the next one

  since: number; // when something last passed
  sent = false; // the whole request is out
  isFull = false; // the upload waits for room in the socket
  connected = false;
  private reused = false;
  head: ResponseHead | undefined;
  private receiving: BodyDecoder | undefined; // the answer's body
  private rest: Bytes | undefined; // of a head that has not come whole
  private overhead = 0; // bytes of interim answers
  body: StreamedBody | undefined; // the answer's
  private keepAlive = 0; // milliseconds, as the head says; 0 as soon as more came than was announced
  private tunnel: ByteTunnel | undefined;

  constructor(client: Dialer, socket: Socket, attempt: Attempt) {
    super(socket);
    const { server } = attempt;
    this.client = client;
    this.pool = getOrMake(client.pools, server, () => []);
    this.bornAt = this.since = client.time;
    this.attempt = attempt;
    attempt.carrier = this;
    socket.on(isSecure(server) ? "secureConnect" : "connect", () => {
      this.connected = true;
      client.time = client.now();
      if (this.attempt) this.send(this.attempt);
    });
  }

  /** Sends the next request on an open connection. */
  begin(attempt: Attempt): void {
    this.attempt = attempt;
    attempt.carrier = this;
    this.reused = true;
    this.sent = this.isFull = false;
    this.head = this.receiving = undefined;
    this.rest = this.body = undefined;
    this.overhead = 0;
    this.send(attempt);
  }

  /** Writes the request: its head, and its body as it comes. */
  private send(attempt: Attempt): void {
    const { method, target, lines, body } = attempt, { client } = this, chunked = body.length < 0;
    let head = `${method} ${target} HTTP/1.1\r\n${lines}`;
    if (chunked) head += "Transfer-Encoding: chunked\r\n";
    else if (body !== NO_BODY || BODY_EXPECTED.has(method)) head += `Content-Length: ${body.length}\r\n`;
    this.hasLeft = false;
    this.write(head + "\r\n");
    this.since = attempt.connectedAt = client.time;
    attempt.uploaded = 0; // it may have been sent before, on a connection that had ended
    if (body === NO_BODY) return void (this.sent = true);
    const isOver = () => this.attempt !== attempt;
    body.read({
      data: (bytes) => {
        if (isOver()) return;
        attempt.uploaded += bytes.length;
        this.since = client.time;
        if (this.writeBody(bytes, chunked)) return;
        this.isFull = true;
        body.pause();
      },
      end: (trailers) => {
        if (isOver()) return;
        if (body.length > attempt.uploaded) return this.fail("bad-body", FAILURES["bad-body"].text);
        if (chunked) this.write(lastChunk(trailers));
        this.sent = true;
        this.since = client.time;
      },
      fail: (why) => {
        if (!isOver()) this.fail(why, FAILURES[why].text);
      },
    });
  }

  onDrain(): void {
    this.isFull = false;
    this.since = this.client.time;
    if (this.attempt && !this.sent) this.attempt.body.resume();
  }

  onData(bytes: Bytes): void {
    const { attempt } = this;
    if (!attempt) return void this.socket.destroy(); // bytes without a request
    if (this.receiving) {
      this.since = this.client.time = this.client.now(); // not before the head: `response` is a deadline
      return this.receiveBody(attempt, this.receiving, bytes);
    }
    const behind = this.takeHead(attempt, this.rest ? Buffer.concat([this.rest, bytes]) : bytes);
    if (typeof behind === "string") this.fail("invalid-answer", behind);
    else if (behind && this.head!.status === 101) this.switch(attempt, this.head!, behind);
    else if (behind) this.beginBody(attempt, this.head!, behind);
  }

  /** Reads heads up to the final one. Gives the bytes behind it, undefined if more must come, or the error. */
  private takeHead(attempt: Attempt, bytes: Bytes): Bytes | undefined | string {
    this.rest = undefined;
    for (;;) {
      const text = headText(bytes, MAX_HEAD);
      if (this.overhead + (text?.length ?? bytes.length - 3) > MAX_HEAD) return "its head is longer than 64 KiB";
      if (text === undefined) {
        this.rest = bytes;
        if (!"HTTP/1.".startsWith(bytes.toString("latin1", 0, 7))) return "it is not HTTP/1.1";
        return isBroken(bytes) ? "a line of its head does not end with CR and LF" : undefined;
      }
      const head = attempt.method === "HEAD" ? parseResponseHead(text, "HEAD") : knownResponseHead(text);
      if (typeof head === "string") return head;
      bytes = bytes.subarray(text.length + 4);
      if (head.status >= 200 || head.status === 101) {
        this.head = head;
        return bytes;
      }
      this.overhead += text.length + 4;
      if (head.status > 100) attempt.onInform(head.status, head.reason, head.fields); // not 100
      if (this.attempt !== attempt) return undefined;
    }
  }

  /** The head of the answer, and what has come with it. A body that came whole is handed over as bytes. */
  private beginBody(attempt: Attempt, head: ResponseHead, behind: Bytes): void {
    const { status, reason, fields, lines, length } = head, out: Bytes[] = [];
    const receiving = this.receiving = new BodyDecoder(head), after = receiving.decode(behind, out);
    if (typeof after === "string") return this.fail("invalid-answer", after);
    this.keepAlive = after?.length ? 0 : head.keepAlive; // more than was announced is never kept for another request
    const whole = after !== undefined && receiving.trailers.length === 0;
    const body = whole ? inMemory(out) : this.body = new StreamedBody(length, this);
    for (const piece of out) {
      attempt.received += piece.length;
      this.body?.push(piece);
    }
    if (after) this.body?.end(receiving.trailers);
    else this.since = this.client.time = this.client.now();
    attempt.onHead({ status, reason, fields, lines, body });
    if (after && this.attempt === attempt) this.finish(attempt);
  }

  private receiveBody(attempt: Attempt, receiving: BodyDecoder, bytes: Bytes): void {
    const out: Bytes[] = [], after = receiving.decode(bytes, out);
    for (const piece of out) {
      attempt.received += piece.length;
      this.body!.push(piece);
    }
    if (receiving.isCrowded) letOthersGoFirst(this.socket, () => !!this.body?.isSourcePaused);
    if (after === undefined || this.attempt !== attempt) return;
    if (typeof after === "string") return this.fail("invalid-answer", after);
    if (after.length) this.keepAlive = 0;
    this.body!.end(receiving.trailers);
    this.finish(attempt);
  }

  /** The server has switched to another protocol. The connection is never HTTP's again. */
  private switch(attempt: Attempt, head: ResponseHead, early: Bytes): void {
    const { status, reason, fields, lines, upgrade } = head;
    if (!attempt.upgrade) return this.fail("invalid-answer", "it upgrades what nobody asked to upgrade");
    if (!this.sent) return this.fail("invalid-answer", "it switches before it has the whole request");
    const isAsked = lower(upgrade) === lower(attempt.upgrade);
    if (!isAsked) return this.fail("invalid-answer", "it switches to another protocol");
    const join = (client: Socket) => {
      const tunnel = this.tunnel = new ByteTunnel(client, this.socket, upgrade, attempt.timeouts.idle);
      this.listener = tunnel.server;
      this.attempt = attempt.carrier = undefined;
      attempt.tunnels?.add(tunnel);
      this.socket.on("close", () => {
        attempt.tunnels?.delete(tunnel);
        [attempt.uploaded, attempt.received] = [tunnel.client.bytes, tunnel.server.bytes];
        attempt.onEnd(tunnel.problem, tunnel.problem ?? "", true);
      });
      if (early.length) tunnel.server.onData(early);
      return tunnel.client;
    };
    attempt.onHead({ status, reason, fields, lines, body: NO_BODY, tunnel: { protocol: upgrade, join } });
    if (this.attempt === attempt) this.fail("client-left", "the client has left");
  }

  /** The server has ended its side: the end of a body without a length, else a failure. */
  onEnd(): void {
    const { attempt } = this;
    const isEnd = this.receiving && this.head!.length < 0 && !this.head!.chunked;
    if (!attempt || !isEnd) return this.fail("reset", CLOSED);
    this.body!.end(NO_FIELDS);
    this.finish(attempt);
  }

  /** The response is complete: the connection returns to its pool, unless it came before any of its request had left. */
  private finish(attempt: Attempt): void {
    const { client, socket } = this, idle = Math.min(IDLE, this.keepAlive - 1_000);
    if (this.sent && this.hasLeft && idle > 0 && client.time - this.bornAt < MAX_AGE) {
      this.idleUntil = client.time + idle;
      this.pool.push(this);
    } else socket.destroy();
    this.detach(attempt);
    attempt.onEnd(undefined, "", true);
  }

  private detach(attempt: Attempt): void {
    this.attempt = attempt.carrier = undefined;
    if (!this.sent && this.connected) attempt.body.cancel(); // the rest of the upload
  }

  /** The attempt has failed: its connection is closed at once. */
  fail(why: Failure, detail: string): void {
    const { attempt } = this;
    this.socket.destroy();
    if (!attempt) return;
    const silent = this.head === undefined && this.rest === undefined && this.overhead === 0;
    if (why === "reset" && this.reused && silent && (mayRepeat(attempt) || !this.hasLeft && attempt.body.bytes)) {
      this.attempt = undefined; // a stale keep-alive connection: repeat once, on a new one
      return this.client.open(attempt);
    }
    this.detach(attempt);
    this.body?.end(why);
    attempt.onEnd(why, detail, this.connected);
  }

  onClose(): void {
    this.fail(this.connected ? "reset" : "connect", this.reason);
    const at = this.pool.indexOf(this);
    if (at >= 0) this.pool.splice(at, 1);
  }

  cancel(why: Failure): void {
    if (this.attempt) this.fail(why, FAILURES[why].text);
  }
  override resumeReading(): void {
    this.since = this.client.time;
    super.resumeReading();
  }
  discardRest(): void {
    this.cancel("client-left");
  }

  checkTimeouts(now: number): void {
    if (this.tunnel) return this.tunnel.checkTimeouts(now);
    if (!this.attempt) return void (now >= this.idleUntil && this.socket.destroy());
    const late = exceededTimeout(this.attempt, this, now);
    if (late) this.fail(late, `silent for ${Math.round(now - this.since)} ms`);
  }
}

/**
 * Lets a connection read on after a write has failed: a server that refuses an upload closes behind its answer, which then
 * waits to be read, and a stream that hears of the failure throws it away. Reading ends by itself.
 */
function readOnAfterFailedWrites(socket: Socket): Socket {
  type Done = (error?: Error | null) => void;
  const later = (done: Done): Done => (error) => error ? void setTimeout(done, READ_ON, error) : done(error);
  const write = socket._write, writev = socket._writev;
  socket._write = (chunk, encoding, done) => write.call(socket, chunk, encoding, later(done));
  if (writev) socket._writev = (chunks, done) => writev.call(socket, chunks, later(done));
  return socket;
}
const READ_ON = 100; // milliseconds

/** The option of a socket that reads into one buffer for all sockets, out of which what came is copied. */
const sharedReads = (socket: () => Socket) => ({
  onread: { buffer: RECEIVED, callback: (size: number) => socket().push(copyOfBytes(RECEIVED.subarray(0, size))) },
});
const RECEIVED = Buffer.allocUnsafeSlow(LENT_SIZE);

/**
 * Connects without TLS, to read into the shared buffer: without it every read allocates 64 KiB, which takes 5 to 10 % of the
 * speed (tried on Deno 2.9.6 and Node 24.21). On Bun 1.4.5 it is slower.
 */
function connectPlain(address: NetConnectOpts): Socket {
  if ("Bun" in globalThis) return netConnect(address);
  const socket: Socket = netConnect({ ...address, ...sharedReads(() => socket) });
  return socket;
}

type Pem = "CERTIFICATE" | "PRIVATE KEY";
/** What a PEM file has of one kind: haproxy's hold certificates and key together, and editors put a mark in front. */
function readPem(file: string, kind: Pem): string {
  try {
    const text = fs.readFileSync(file, "utf8");
    return text.match(new RegExp(`-----BEGIN ([A-Z ]*)${kind}-----[^]*?-----END \\1${kind}-----`, "g"))?.join("\n") ??
      "";
  } catch (error) {
    throw new Error(`${file} cannot be read: ${whyUnreadable(error)}`);
  }
}

/** A socket to a server; the addresses of a name are tried one after another (RFC 8305). */
function dial({ url, tls }: Server, protocols = ["http/1.1"]): Socket {
  if (isUnix(url)) return readOnAfterFailedWrites(connectPlain({ path: pathOfUnix(url), allowHalfOpen: true }));
  const parsed = new URL(url), host = bareAddress(parsed.hostname), secure = parsed.protocol === "https:";
  const address = {
    host,
    port: portOf(parsed),
    autoSelectFamily: true,
    noDelay: true,
    allowHalfOpen: true,
  };
  if (!secure) return readOnAfterFailedWrites(connectPlain(address));
  const name = tls.servername || host.replace(/\.$/, ""); // no last dot in SNI (RFC 6066 section 3)
  return readOnAfterFailedWrites(tlsConnect({
    ...address,
    ...(isIP(name) ? {} : { servername: name }),
    ...(tls.ca && { ca: readPem(tls.ca, "CERTIFICATE") }),
    ...(tls.cert && { cert: readPem(tls.cert, "CERTIFICATE"), key: readPem(tls.key, "PRIVATE KEY") }),
    rejectUnauthorized: !tls.insecure,
    ALPNProtocols: protocols,
  }));
}

/** A socket that is connected in time, or what is wrong with it. */
function connectWithin(timeout: number, socket: Socket): Promise<Socket | WireError> {
  return new Promise((resolve) => {
    const end = (result: Socket | WireError) => {
      clearTimeout(timer);
      if (result !== socket) socket.destroy();
      resolve(result);
    };
    const late = `no connection within ${timeout} ms`;
    const timer = setTimeout(() => end(new WireError("connect-timeout", false, late)), timeout);
    socket.on("connect", () => end(socket));
    socket.on("error", (error: Error) => end(new WireError("connect", false, error.message || String(error))));
  });
}

// --- 3.6 HTTP/2: header compression, frames and flow control, and its connections of both sides (RFC 9113, RFC 7541) ---

const STREAM_WINDOW = 262_144; // bytes of one body that a peer may send ahead of its reader
const CONNECTION_WINDOW = 1_048_576; // the same of all bodies; raised as they come, since each stream has its own limit
const MAX_FRAME = 16_384; // bytes: our limit, and that of a peer until its SETTINGS say more
const MAX_WINDOW = 2 ** 31 - 1;
const MAX_STREAMS = 100; // that a client may open at once (haproxy: 100); the same at servers that set no limit
const MOST_RESETS = 1_000; // streams that a connection remembers as reset
const MAX_USELESS = 300; // frames that ask for nothing, beyond one for each response and 100 each second

const DATA = 0, HEADERS = 1, PRIORITY = 2, RESET = 3, SETTINGS = 4; // types of frames
const PING = 6, GOAWAY = 7, WINDOW_UPDATE = 8, CONTINUATION = 9;
const END_STREAM = 1, ACK = 1, END_HEADERS = 4, PADDED = 8, PRIORITIZED = 32; // flags of frames
const SETTING = { table: 1, push: 2, streams: 3, window: 4, frame: 5, list: 6, connect: 8 } as const;
/** Error codes (RFC 9113 section 7): the position is the code. */
// deno-fmt-ignore
const HTTP2_ERRORS = [
  "NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT", "STREAM_CLOSED",
  "FRAME_SIZE_ERROR", "REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR", "CONNECT_ERROR", "ENHANCE_YOUR_CALM",
] as const;
type Http2Error = (typeof HTTP2_ERRORS)[number];

/** An error of the peer, which ends a stream; with stream 0 it ends the connection. */
class Http2Failure extends Error {
  readonly code: Http2Error;
  readonly stream: number;
  constructor(code: Http2Error, detail: string, stream = 0) {
    super(detail);
    this.code = code;
    this.stream = stream;
  }
}
const fault = (code: Http2Error, detail: string, stream = 0) => new Http2Failure(code, detail, stream);

// Header compression.

/** The static table (RFC 7541 appendix A). */
const STATIC_FIELDS =
  `:authority|:method GET|:method POST|:path /|:path /index.html|:scheme http|:scheme https|:status 200|
:status 204|:status 206|:status 304|:status 400|:status 404|:status 500|accept-charset|accept-encoding gzip, deflate|
accept-language|accept-ranges|accept|access-control-allow-origin|age|allow|authorization|cache-control|content-disposition|
content-encoding|content-language|content-length|content-location|content-range|content-type|cookie|date|etag|expect|expires|
from|host|if-match|if-modified-since|if-none-match|if-range|if-unmodified-since|last-modified|link|location|max-forwards|
proxy-authenticate|proxy-authorization|range|referer|refresh|retry-after|server|set-cookie|strict-transport-security|
transfer-encoding|user-agent|vary|via|www-authenticate`.replaceAll("\n", "").split("|").map(
    (field): [string, string] => [field.split(" ", 1)[0]!, field.split(" ").slice(1).join(" ")],
  );
const STATIC_INDEX = new Map(STATIC_FIELDS.map(([name, value], i) => [`${name}: ${value}`, i + 1]));
const STATIC_NAMES = new Map(STATIC_FIELDS.map(([name], i): [string, number] => [name, i + 1]).reverse());

/** The lengths in bits of the Huffman code's 257 symbols, in base 36 (RFC 7541 appendix B). The code is canonical. */
const HUFFMAN_LENGTHS =
  "dnsssssssoussussssssssusssssssss6aacd68baa8b8666555666666678f6cad67777777777777777777777878djde6f56565666577666567655677777fbeds" +
  "kmkkmmmnmnnnnnonoomnonnnnlmnmnnomlkmmnnlnmmolmnnllmlnmnnkmmmnmmnqqkjmnmpqqqrrqopjlqrrqrollqqsrrrkoklmllnmmppooqnqrqqrrrrrsrrrrrqu";

/** The symbols of each length, and the code of the first. */
const HUFFMAN = Array.from({ length: 31 }, () => ({ first: 0, symbols: [] as number[] }));
[...HUFFMAN_LENGTHS].forEach((length, symbol) => HUFFMAN[parseInt(length, 36)]!.symbols.push(symbol));
for (let i = 1; i < HUFFMAN.length; i++) {
  HUFFMAN[i]!.first = (HUFFMAN[i - 1]!.first + HUFFMAN[i - 1]!.symbols.length) * 2;
}

function decodeHuffman(bytes: Bytes): string {
  let text = "", code = 0, length = 0;
  for (const byte of bytes) {
    for (let bit = 7; bit >= 0; bit--) {
      code = code * 2 + (byte >> bit & 1);
      const row = HUFFMAN[++length], symbol = row?.symbols[code - row.first];
      if (row === undefined || symbol === 256) throw fault("COMPRESSION_ERROR", "a text is not in the Huffman code");
      if (symbol === undefined) continue;
      text += String.fromCharCode(symbol);
      code = length = 0;
    }
  }
  if (length > 7 || code !== 2 ** length - 1) throw fault("COMPRESSION_ERROR", "a text has other padding than ones");
  return text;
}

/** An integer behind the flags of its first byte (RFC 7541 section 5.1). */
function hpackInteger(value: number, bits: number, flags: number): string {
  const most = (1 << bits) - 1;
  if (value < most) return String.fromCharCode(flags | value);
  let text = String.fromCharCode(flags | most);
  for (value -= most; value > 127; value >>= 7) text += String.fromCharCode(value & 127 | 128);
  return text + String.fromCharCode(value);
}
const hpackText = (text: string): string => hpackInteger(text.length, 7, 0) + text;

const TABLE_SIZE = 4_096; // bytes of a dynamic table, unless SETTINGS say less
const EMPTY_TABLE = "\x20"; // sets the size to 0: a peer that sets less than TABLE_SIZE waits for that (section 4.2)
const NEVER_INDEXED = 16; // a flag of fields that no table on the way may hold (RFC 7541 section 6.2.3)
const SECRET_NAMES = new Set(["authorization", "cookie", "proxy-authorization", "set-cookie"]);
const NO_NAMES: ReadonlySet<string> = new Set();

/**
 * A field line, compressed. What ends at this hop is left out. Only the static table is used: the text is the same on all
 * connections, and most are known already, which saves more time than a dynamic table saves bytes.
 */
const compressLine = memo((line) => {
  const colon = line.indexOf(":", 1), name = lower(line.slice(0, colon)), value = line.slice(colon + 2);
  const role = fieldRole(name), whole = STATIC_INDEX.get(`${name}: ${value}`), known = STATIC_NAMES.get(name) ?? 0;
  const passes = role === "te" ? value === "trailers" : /^(?:pass|content-length|expect)$/.test(role);
  if (!passes) return "";
  if (whole) return hpackInteger(whole, 7, 128);
  const flags = SECRET_NAMES.has(name) ? NEVER_INDEXED : 0;
  return hpackInteger(known, 4, flags) + (known ? "" : hpackText(name)) + hpackText(value);
}, 300);

/** Marks a compressed line as never indexed, unless the static table has it whole: then it is no secret. */
function neverIndexed(bytes: string): string {
  const first = bytes.charCodeAt(0);
  return first < NEVER_INDEXED ? String.fromCharCode(first | NEVER_INDEXED) + bytes.slice(1) : bytes;
}

/** Compresses field lines. Fields whose names are in `secret` came as never indexed, and stay so. */
function compressLines(lines: string, secret?: ReadonlySet<string>): string {
  let block = "";
  for (let at = 0, next; at < lines.length; at = next + 2) {
    next = lines.indexOf("\r\n", at);
    const line = lines.slice(at, next), bytes = compressLine(line);
    block += secret?.has(lower(line.slice(0, line.indexOf(":")))) ? neverIndexed(bytes) : bytes;
  }
  return block;
}
/** Most responses of a server have the same lines as the one before. */
const compressHead = memo((lines) => compressLines(lines), 2_048);

/** The fields of a header block. The same block means the same as long as the dynamic table does not change. */
interface HeaderBlock {
  readonly fields: string[]; // name, value, ...
  readonly size: number; // as RFC 9113 section 6.5.2 counts it; above the limit not all fields are there
  readonly secret: ReadonlySet<string> | undefined; // names of fields that are never indexed
  request?: Http2Head;
  response?: ResponseHead | string;
}

/** Decompresses the header blocks of one connection, in their order. */
class HeaderDecoder {
  private readonly table: [string, string][] = []; // the newest last
  private readonly known = new Map<string, HeaderBlock>();
  private size = 0; // of the table, in bytes
  private most = TABLE_SIZE;
  private bytes: Bytes = NO_BYTES;
  private at = 0;

  /** Keeps fields up to `limit` bytes. @throws {Http2Failure} */
  decode(bytes: Bytes, limit: number): HeaderBlock {
    const text = bytes.toString("latin1"), before = this.known.get(text), fields: string[] = [];
    if (before) return before;
    let size = 0, hasFields = false, changes = false, secret: Set<string> | undefined;
    [this.bytes, this.at] = [bytes, 0];
    while (this.at < bytes.length) {
      const first = bytes[this.at]!, isIndexed = first >= 128, isAdded = !isIndexed && first >= 64;
      if (first >> 5 === 1) {
        const most = this.integer(5);
        if (hasFields || most > TABLE_SIZE) throw fault("COMPRESSION_ERROR", "the table may not have this size");
        this.most = most;
        this.shrink();
        changes = true;
        continue;
      }
      const index = this.integer(isIndexed ? 7 : isAdded ? 6 : 4);
      const [name, value] = isIndexed ? this.entry(index) : [index ? this.entry(index)[0] : this.text(), this.text()];
      hasFields = true;
      size += name.length + value.length + 32;
      if (size <= limit) fields.push(name, value);
      if (first >> 4 === 1) (secret ??= new Set()).add(name);
      if (!isAdded) continue;
      this.table.push([name, value]);
      this.size += name.length + value.length + 32;
      this.shrink();
      changes = true;
    }
    const block = { fields, size, secret };
    if (changes) this.known.clear();
    else if (this.known.size < 100 && text.length < 500) this.known.set(text, block);
    return block;
  }

  private shrink(): void {
    while (this.size > this.most) {
      const [name, value] = this.table.shift()!;
      this.size -= name.length + value.length + 32;
    }
  }
  private entry(index: number): [string, string] {
    const { table } = this, added = index - STATIC_FIELDS.length;
    const found = added > 0 ? table[table.length - added] : STATIC_FIELDS[index - 1];
    if (!found) throw fault("COMPRESSION_ERROR", `nothing stands at ${index} of the table`);
    return found;
  }
  private integer(bits: number): number {
    const most = (1 << bits) - 1;
    let value = this.bytes[this.at++]! & most;
    for (let shift = 0; value >= most; shift += 7) {
      const byte = this.bytes[this.at++];
      if (byte === undefined || shift > 21) throw fault("COMPRESSION_ERROR", "a number is cut off or too large");
      value += (byte & 127) << shift;
      if (byte < 128) break;
    }
    return value;
  }
  private text(): string {
    const isHuffman = this.bytes[this.at]! >= 128, length = this.integer(7), end = this.at + length;
    if (end > this.bytes.length) throw fault("COMPRESSION_ERROR", "a text is cut off");
    const bytes = this.bytes.subarray(this.at, end);
    this.at = end;
    return isHuffman ? decodeHuffman(bytes) : bytes.toString("latin1");
  }
}

// Heads.

/** The head of a request on a stream. One that breaks the rules of HTTP/2 itself has the problem `bad-request`. */
interface Http2Head extends RequestHead {
  readonly length: number; // of the body, as announced; -1: only its end tells
}
type HeadLimits = Pick<Config["limits"], "header_size" | "header_fields">;
const PSEUDO_FIELDS = new Set([":method", ":scheme", ":authority", ":path", ":protocol"]);
const STATUS_FIELD = new Set([":status"]);
const TARGET = /^(?:\/[\x21-\x7e\x80-\xff]*|\*)$/;
/** A name in lower case, of no field that is for connections of HTTP/1.1. */
const HTTP2_NAME =
  /^(?!(?:connection|keep-alive|proxy-connection|transfer-encoding|upgrade)$)[!#$%&'*+.^_`|~0-9a-z-]+$/;

/** The same fields come with many targets and on many connections: a hit saves 14 % of a GET (Node 24.21). */
const knownHttp2Fields = memo(parseFields, 2_048);

/** Reads pseudo-fields, Host, and the others as lines (RFC 9113 section 8.2 and 8.3); undefined if they are malformed. */
function readHttp2Fields(given: readonly string[], pseudo: ReadonlySet<string>) {
  const own = new Map<string, string>();
  let at = 0, lines = "", cookie = "", host: string | undefined;
  for (; given[at]?.startsWith(":"); at += 2) {
    if (!pseudo.has(given[at]!) || own.has(given[at]!) || !VALUE.test(given[at + 1]!)) return undefined;
    own.set(given[at]!, given[at + 1]!);
  }
  for (; at < given.length; at += 2) {
    const name = given[at]!, value = given[at + 1]!;
    if (!HTTP2_NAME.test(name) || !VALUE.test(value) || /^[\t ]|[\t ]$/.test(value)) return undefined;
    if (name === "te" && value !== "trailers") return undefined;
    if (name === "host") host = host === undefined ? value : `${host}, ${value}`;
    else if (name === "cookie") cookie += cookie ? `; ${value}` : value; // crumbs (section 8.2.3)
    else lines += `\r\n${name}: ${value}`;
  }
  return { own, host, lines: cookie ? `${lines}\r\ncookie: ${cookie}` : lines };
}
const NOTHING_READ = { own: new Map<string, string>(), host: undefined, lines: "" };

function http2RequestHead({ fields: given, size, secret }: HeaderBlock, limits: HeadLimits): Http2Head {
  const isLarge = size > limits.header_size, read = isLarge ? undefined : readHttp2Fields(given, PSEUDO_FIELDS);
  const { own, host: named, lines } = read ?? NOTHING_READ;
  const [method, target, protocol] = [own.get(":method") ?? "", own.get(":path") ?? "", own.get(":protocol")];
  const authority = own.get(":authority"),
    host = authority ?? named ?? "",
    isConnect = method === "CONNECT" && !protocol;
  const block = knownHttp2Fields(`\r\nhost: ${host}${lines}`), { count, length, expect, trailers } = block;
  const isWhole = isConnect
    ? Boolean(authority) && own.size === 2
    : TOKEN.test(method) && TARGET.test(target) && /^https?$/.test(own.get(":scheme") ?? "");
  const mayExtend = protocol === undefined || protocol === "" || method === "CONNECT" && TOKEN.test(protocol);
  const problem = ((): FailureName | undefined => {
    if (isLarge || count > limits.header_fields) return "headers-too-large";
    if (!isWhole || !mayExtend || length === "?") return "bad-request";
    if (named?.includes(",")) return "bad-host";
    if (named !== undefined && authority !== undefined && !sameAuthority(authority, named)) return "bad-host";
    return expect && !ONLY_CONTINUE.test(expect) ? "bad-expect" : undefined;
  })();
  return {
    method: protocol ? "GET" : method,
    target: isConnect ? host : target,
    version: "2.0",
    ...{ host, problem, block, secret, trailers },
    ...{ upgrade: protocol ?? "", expects: expect !== "" },
    length: length ? Number(length) : -1,
  };
}

/** The head of a response on a stream, or what is wrong with it. */
function http2ResponseHead({ fields: given, size }: HeaderBlock): ResponseHead | string {
  if (size > MAX_HEAD || given.length > 2 * MAX_FIELDS) return "its head is too long";
  const read = readHttp2Fields(given, STATUS_FIELD), code = read?.own.get(":status") ?? "", status = Number(code);
  const { fields: all, lines, length } = knownHttp2Fields(read?.lines ?? "");
  if (!read || !/^[1-9]\d\d$/.test(code) || status === 101 || length === "?") return "its head is malformed";
  const fields = withoutVainLength(status, all);
  return {
    ...{ status, reason: "", fields, lines: fields === all ? lines : linesOf(fields), chunked: false, upgrade: "" },
    ...{ keepAlive: Infinity, length: length ? Number(length) : -1 },
  };
}

// Frames.

const u32 = (value: number): string =>
  String.fromCharCode(value >>> 24, value >>> 16 & 255, value >>> 8 & 255, value & 255);
const frameHead = (length: number, type: number, flags: number, stream: number): string =>
  String.fromCharCode(length >>> 16, length >>> 8 & 255, length & 255, type, flags) + u32(stream);
const streamIn = (payload: Bytes): number => payload.readUInt32BE(0) & MAX_WINDOW;

function unpadded(payload: Bytes, flags: number): Bytes {
  if (!(flags & PADDED)) return payload;
  const end = payload.length - (payload[0] ?? 0);
  if (end < 1) throw fault("PROTOCOL_ERROR", "more padding than payload");
  return payload.subarray(1, end);
}

/** One request and its response (RFC 9113 section 5). */
abstract class Http2Stream<C extends Http2Connection = Http2Connection> implements BodySource {
  readonly connection: C;
  readonly id: number;
  window: number; // bytes that we may still send
  body: StreamedBody | undefined; // what comes in
  hasEnded = false; // the peer has ended its side
  sent = false; // we have ended ours
  protected source: Body | undefined; // of what goes out
  protected sentBytes = 0; // of it
  private seenBytes = 0; // the same, when the sweep last looked
  since: number; // when something last passed
  private piece: Bytes | undefined; // read from it, waiting for windows and for room in the socket
  private at = 0; // bytes of this piece that are sent
  private trailers: Fields | undefined; // its end
  private unread = 0; // bytes that have come since the peer was told to send more

  constructor(connection: C, id: number) {
    this.connection = connection;
    this.id = id;
    this.window = connection.initialWindow;
    this.since = connection.now();
  }

  /** It has ended early: `reset` by the peer or with its connection. `unseen`: the peer has not looked at the request. */
  protected abstract onAbort(why: Failure, detail: string, unseen: boolean): void;
  /** Ends it early because the body that goes out breaks off. */
  abstract cancel(why: Failure): void;

  onData(bytes: Bytes, size: number, ends: boolean): void {
    const { body, id } = this;
    this.unread += size;
    if (this.hasEnded) throw fault("STREAM_CLOSED", "data behind the end of a stream", id);
    if (this.unread > STREAM_WINDOW) throw fault("FLOW_CONTROL_ERROR", "more data than its window allows", id);
    if (!body) throw fault("PROTOCOL_ERROR", "data in front of its head", id);
    const isTooLong = !body.over && body.length >= 0 && body.received + bytes.length > body.length;
    if (isTooLong) throw fault("PROTOCOL_ERROR", "more data than announced", id);
    if (bytes.length) body.push(bytes);
    if (ends) this.onEnd(NO_FIELDS);
    else this.resumeReading();
  }

  /** The peer has ended its side. */
  protected onEnd(trailers: Fields): void {
    const { body } = this;
    this.hasEnded = true;
    if (body && !body.over && body.received < body.length) {
      throw fault("PROTOCOL_ERROR", "less data than announced", this.id);
    }
    body?.end(trailers);
    this.closeIfDone();
  }

  /** Receives trailers. */
  onBlock({ fields: given, size }: HeaderBlock, ends: boolean): void {
    const read = ends ? readHttp2Fields(given, NO_NAMES) : undefined;
    if (this.hasEnded) throw fault("STREAM_CLOSED", "a head behind the end of a stream", this.id);
    if (size > this.connection.headLimit) throw fault("PROTOCOL_ERROR", "trailers are too long", this.id);
    if (!read) throw fault("PROTOCOL_ERROR", "trailers are malformed", this.id);
    const pairs = fieldPairs(parseFields(read.lines).fields);
    this.onEnd(pairs.filter(([name]) => mayTrail(name)).flat());
  }

  /** Lets the peer send more: its window is raised, unless the reader of its body is slow. */
  resumeReading(): void {
    if (this.hasEnded || this.body?.isSourcePaused || this.unread < STREAM_WINDOW / 2) return;
    this.connection.raiseWindow(this.id, this.unread);
    this.unread = 0;
  }

  /** Sends a body, as fast as both windows and the socket take it. */
  protected sendBody(body: Body): void {
    const { bytes } = body;
    this.source = body;
    if (bytes) {
      if (bytes.length) this.piece = bytes;
      this.trailers = NO_FIELDS;
      return void this.pump();
    }
    body.read({
      data: (piece) => {
        if (this.sent) return;
        this.piece = piece;
        this.pump();
        if (this.piece) body.pause();
      },
      end: (trailers) => {
        this.trailers = trailers;
        this.pump();
      },
      fail: (why) => this.sent || this.cancel(why),
    });
  }

  /** Sends what may be sent now, at most `frames` frames. Returns whether more could follow at once. */
  pump(frames = Infinity): boolean {
    const { connection, id } = this;
    while (this.piece && !this.sent) {
      const { piece, at } = this, left = piece.length - at;
      const size = Math.min(left, this.window, connection.window, frames === 1 ? connection.maxFrame : LENT_SIZE);
      if (size <= 0 || !socketHasRoom(connection.socket) || frames <= 0) {
        connection.blocked.add(this);
        return frames <= 0;
      }
      const isWhole = size === left, isLast = isWhole && this.trailers?.length === 0;
      frames--;
      this.window -= size;
      this.sentBytes += size;
      connection.sendData(id, piece, at, size, isLast);
      this.at = isWhole ? 0 : at + size;
      if (isWhole) {
        this.piece = undefined;
        giveBack(piece);
      }
      if (isLast) this.endSide();
    }
    connection.blocked.delete(this);
    if (this.sent) return false;
    if (!this.trailers) this.source?.resume();
    else {
      if (this.trailers.length) connection.sendHead(id, compressLines(linesOf(this.trailers)), true);
      else connection.sendData(id, NO_BYTES, 0, 0, true);
      this.endSide();
    }
    return false;
  }
  checkTimeouts(now: number): void {
    if (this.sentBytes !== this.seenBytes) [this.since, this.seenBytes] = [now, this.sentBytes];
  }
  /** Our side has ended. */
  protected endSide(): void {
    this.sent = true;
    this.closeIfDone();
  }
  private closeIfDone(): void {
    if (this.sent && this.hasEnded) this.drop();
  }

  /** Ends it early: with a code, where the peer does not know of it yet. */
  abort(why: Failure, detail: string, code?: Http2Error, unseen = false): void {
    this.drop(code);
    this.onAbort(why, detail, unseen);
  }
  /** Nothing more is sent, but for a reset with a code where it has not come to its regular end. */
  drop(code?: Http2Error): void {
    if (code && this.connection.streams.has(this.id)) this.connection.sendReset(this.id, code);
    this.sent = this.hasEnded = true;
    this.piece = undefined;
    this.connection.blocked.delete(this);
    this.connection.remove(this.id);
  }
}

/** A header block, until END_HEADERS completes it. */
interface OpenBlock {
  readonly id: number;
  readonly ends: boolean; // its HEADERS ends the peer's side
  readonly isBad: boolean; // its priority depends on itself
  readonly since: number; // milliseconds
  readonly pieces: Bytes[];
  size: number;
}

/** A connection that speaks HTTP/2: what both sides have. */
abstract class Http2Connection extends Connection {
  readonly now: () => number; // milliseconds
  readonly headLimit: number; // bytes of a header list
  readonly streams: Map<number, Http2Stream> = new Map();
  readonly blocked: Set<Http2Stream> = new Set(); // streams that wait for a window, or for room in the socket
  window = 65_535; // bytes that we may still send, on all streams
  initialWindow = 65_535;
  maxFrame = MAX_FRAME;
  hasSettings = false; // the peer's
  protected maxStreams = MAX_STREAMS; // that the peer accepts at once
  protected lastId = 0; // the highest that a client has begun
  protected usedAt: number; // when the last stream ended, or the connection began, in milliseconds
  protected leavingAt = 0; // when one side said that it opens no more streams; 0: not yet
  protected lastServed = Infinity; // the last stream of the peer that is served, as our GOAWAY said
  protected overAt = 0; // when it ended, with a GOAWAY or without; 0: not yet
  protected preface = ""; // what the peer has to begin with
  private rest: Bytes = NO_BYTES; // of a frame that has not come whole
  protected block: OpenBlock | undefined;
  protected readonly maxPush: number = 1; // that SETTINGS_ENABLE_PUSH may be
  protected readonly resets: Set<number> = new Set(); // the latest that we have reset: their frames may still arrive
  private readonly decoder = new HeaderDecoder();
  private unread = 0; // bytes of data that have come since the peer was told to send more
  private moved = 0; // pieces of data that have passed, either way, less the peer's PINGs
  private tableUpdate = ""; // what the next header block begins with
  private useless = 0; // frames that asked for nothing: 100 are forgotten each second, and one for each response
  private uselessAt = 0;

  constructor(socket: Socket, now: () => number, headLimit: number, from?: Connection) {
    super(socket, from);
    this.now = now;
    this.headLimit = headLimit;
    this.usedAt = now();
  }

  abstract onHead(id: number, block: HeaderBlock, ends: boolean): void;
  abstract onGoAway(last: number): void;
  onPong(): void {}
  onFirstSettings(): void {}

  onData(bytes: Bytes): void {
    if (this.overAt) return;
    const data = this.rest.length ? Buffer.concat([this.rest, bytes]) : bytes, { preface } = this;
    let at = 0;
    this.rest = NO_BYTES;
    if (preface) {
      const text = data.toString("latin1", 0, preface.length);
      if (!preface.startsWith(text)) return this.fail(fault("PROTOCOL_ERROR", "not the preface of HTTP/2"));
      if (text === preface) [this.preface, at] = ["", preface.length];
    }
    while (data.length - at >= 9 && !this.overAt && !this.preface) {
      const length = data.readUIntBE(at, 3), end = at + 9 + length;
      if (length > MAX_FRAME) return this.fail(fault("FRAME_SIZE_ERROR", `a frame of ${length} bytes`));
      if (end > data.length) break;
      const stream = data.readUInt32BE(at + 5) & MAX_WINDOW;
      this.takeFrame(data[at + 3]!, data[at + 4]!, stream, data.subarray(at + 9, end));
      at = end;
    }
    if (!this.overAt) this.rest = bytesBehind(data, at);
    // peers that do not read are not read; bodies stop at WINDOW, so that two balancers never wait for each other
    if (this.socket.writableLength > 4 * WINDOW) this.pauseReading();
  }
  onDrain(): void {
    if (!this.overAt) this.resumeReading();
    this.pumpBlocked();
  }

  private takeFrame(type: number, flags: number, id: number, payload: Bytes): void {
    try {
      this.checkFrame(type, id, payload);
      if (FRAMES[type]) FRAMES[type].read.call(this, payload, flags, id);
      else this.countUseless();
    } catch (error) {
      if (!(error instanceof Http2Failure)) throw error;
      if (!error.stream) return this.fail(error);
      const stream = this.streams.get(error.stream);
      if (stream) stream.abort("invalid-answer", error.message, error.code);
      else if (!this.resets.has(error.stream)) this.sendReset(error.stream, error.code);
      this.countUseless();
    }
  }
  private checkFrame(type: number, id: number, payload: Bytes): void {
    const { block } = this, { of = "both", size = payload.length } = FRAMES[type] ?? {};
    if (!this.hasSettings && type !== SETTINGS) throw fault("PROTOCOL_ERROR", "no SETTINGS first");
    if (block ? type !== CONTINUATION || id !== block.id : type === CONTINUATION) {
      throw fault("PROTOCOL_ERROR", "a header block is not in one piece");
    }
    if (of === (id ? "connection" : "stream")) throw fault("PROTOCOL_ERROR", `frame ${type} on stream ${id}`);
    if (size !== payload.length) throw fault("FRAME_SIZE_ERROR", `frame ${type}`, type === PRIORITY ? id : 0);
  }

  /** Counts a frame that asks for nothing. Too many are an attack (CVE-2019-9512, -9515, -9518, CVE-2023-44487). */
  protected countUseless(): void {
    const now = this.now();
    this.useless = Math.max(0, this.useless - (now - this.uselessAt) / 10) + 1;
    this.uselessAt = now;
    if (this.useless > MAX_USELESS) this.fail(fault("ENHANCE_YOUR_CALM", "too many frames that ask for nothing"));
  }
  /** Allows one more such frame: after a response the peer may reset the rest of the stream. */
  onResponse(): void {
    this.useless = Math.max(0, this.useless - 1);
  }

  onDataFrame(payload: Bytes, flags: number, id: number): void {
    const bytes = unpadded(payload, flags), ends = (flags & END_STREAM) > 0;
    this.unread += payload.length;
    if (this.unread >= CONNECTION_WINDOW / 2) { // one frame never uses up the other half
      this.raiseWindow(0, this.unread);
      this.unread = 0;
    }
    if (bytes.length) this.moved++;
    else if (!ends) this.countUseless();
    this.streamOf(id)?.onData(bytes, payload.length, ends);
  }

  onHeadersFrame(padded: Bytes, flags: number, id: number): void {
    const payload = unpadded(padded, flags), skipped = flags & PRIORITIZED ? 5 : 0;
    if (payload.length < skipped) throw fault("FRAME_SIZE_ERROR", "HEADERS");
    const isBad = skipped > 0 && streamIn(payload) === id, ends = (flags & END_STREAM) > 0;
    this.block = { id, ends, isBad, since: this.now(), pieces: [], size: 0 };
    this.onContinuation(payload.subarray(skipped), flags, id);
  }
  onContinuation(payload: Bytes, flags: number, id: number): void {
    const block = this.block!; // `checkFrame` refuses CONTINUATION without HEADERS
    block.size += payload.length + 32; // empty frames count, too
    block.pieces.push(payload);
    if (block.size > this.headLimit + MAX_FRAME) throw fault("ENHANCE_YOUR_CALM", "an endless header block");
    if (!(flags & END_HEADERS)) return;
    this.block = undefined;
    const bytes = block.pieces.length === 1 ? payload : Buffer.concat(block.pieces);
    const head = this.decoder.decode(bytes, this.headLimit);
    if (block.isBad) throw fault("PROTOCOL_ERROR", "it depends on itself", id);
    this.onHead(id, head, block.ends);
  }

  onPriority(payload: Bytes, _flags: number, id: number): void {
    if (streamIn(payload) === id) throw fault("PROTOCOL_ERROR", "it depends on itself", id);
    this.countUseless();
  }
  /** One PING for each piece of data is not counted: gRPC's libraries measure round trips with them. */
  onPing(payload: Bytes, flags: number): void {
    if (flags & ACK) return this.onPong();
    this.writeFrame(PING, ACK, 0, payload.toString("latin1"));
    if (this.moved === 0) this.countUseless();
    else this.moved = Math.min(this.moved, MAX_USELESS) - 1;
  }
  onPush(): void {
    throw fault("PROTOCOL_ERROR", "PUSH_PROMISE");
  }
  onGoAwayFrame(payload: Bytes): void {
    if (payload.length < 8) throw fault("FRAME_SIZE_ERROR", "GOAWAY");
    this.onGoAway(streamIn(payload));
  }
  onReset(payload: Bytes, _flags: number, id: number): void {
    const stream = this.openStream(id), code = payload.readUInt32BE(0), name = HTTP2_ERRORS[code];
    this.countUseless();
    stream?.abort("reset", `it was reset (${name ?? code})`, undefined, name === "REFUSED_STREAM");
  }

  onSettings(payload: Bytes, flags: number): void {
    const isFirst = !this.hasSettings;
    if (payload.length % 6 || flags & ACK && payload.length) throw fault("FRAME_SIZE_ERROR", "SETTINGS");
    if (flags & ACK) return;
    if (isFirst) this.maxStreams = MAX_STREAMS;
    else this.countUseless();
    this.hasSettings = true;
    for (let at = 0; at < payload.length; at += 6) {
      this.onSetting(payload.readUInt16BE(at), payload.readUInt32BE(at + 2));
    }
    this.writeFrame(SETTINGS, ACK, 0, "");
    if (isFirst) this.onFirstSettings();
    this.pumpBlocked();
  }
  private onSetting(name: number, value: number): void {
    const isBad = name === SETTING.push && value > this.maxPush || name === SETTING.connect && value > 1 ||
      name === SETTING.frame && (value < MAX_FRAME || value >= 2 ** 24);
    if (isBad) throw fault("PROTOCOL_ERROR", `SETTINGS ${name} is ${value}`);
    if (name === SETTING.table && value < TABLE_SIZE) this.tableUpdate = EMPTY_TABLE;
    if (name === SETTING.streams) this.maxStreams = value;
    if (name === SETTING.frame) this.maxFrame = Math.min(value, LENT_SIZE);
    if (name !== SETTING.window) return;
    const more = value - this.initialWindow,
      windows = [...this.streams.values()].map((stream) => stream.window += more);
    if (Math.max(value, ...windows) > MAX_WINDOW) throw fault("FLOW_CONTROL_ERROR", WINDOW_TOO_LARGE);
    this.initialWindow = value;
  }

  onWindow(payload: Bytes, _flags: number, id: number): void {
    const target = id ? this.openStream(id) : this, more = streamIn(payload);
    if (!more) throw fault("PROTOCOL_ERROR", "WINDOW_UPDATE of 0", id);
    if (!target) return;
    const wasOpen = target.window > 0;
    target.window += more;
    if (target.window > MAX_WINDOW) throw fault("FLOW_CONTROL_ERROR", WINDOW_TOO_LARGE, id);
    if (target instanceof Http2Stream) target.pump();
    else if (!wasOpen) this.pumpBlocked(); // otherwise streams wait for their own windows
  }
  /** Lets the streams that wait send a frame each, in turn, while there is room. */
  private pumpBlocked(): void {
    for (let more = true; more;) {
      more = false;
      for (const stream of [...this.blocked]) {
        if (this.window <= 0 || !socketHasRoom(this.socket)) return; // the others come first the next time
        this.blocked.delete(stream);
        more = stream.pump(1) || more;
      }
    }
  }

  /** The stream of a frame that may have crossed its end; undefined: it is over. */
  private openStream(id: number): Http2Stream | undefined {
    if (id % 2 === 0 || id > this.lastId) throw fault("PROTOCOL_ERROR", `stream ${id} has not begun`);
    return this.streams.get(id);
  }
  /** The stream of a frame; undefined if we have reset it. */
  protected streamOf(id: number): Http2Stream | undefined {
    const stream = this.openStream(id);
    if (!stream && !this.resets.has(id)) throw fault("STREAM_CLOSED", `stream ${id} is closed`);
    return stream;
  }
  /** Forgets a stream that is over. */
  remove(id: number): void {
    this.streams.delete(id);
    this.usedAt = this.now();
    if (this.leavingAt) this.endIfUnused();
  }
  protected endIfUnused(): void {
    if (!this.streams.size) this.goAway("NO_ERROR");
  }

  protected override write(text: string): void {
    if (!this.overAt) super.write(text);
  }
  protected writeFrame(type: number, flags: number, id: number, payload: string): void {
    this.write(frameHead(payload.length, type, flags, id) + payload);
  }
  /** Sends our settings, with the windows that all peers get. */
  protected sendSettings(own: [name: number, value: number][]): void {
    const all = [...own, [SETTING.window, STREAM_WINDOW] as const];
    const payload = all.map(([name, value]) => String.fromCharCode(0, name) + u32(value)).join("");
    this.writeFrame(SETTINGS, 0, 0, payload);
    this.raiseWindow(0, CONNECTION_WINDOW - 65_535);
  }
  raiseWindow(id: number, bytes: number): void {
    this.writeFrame(WINDOW_UPDATE, 0, id, u32(bytes));
  }
  sendHead(id: number, lines: string, ends: boolean): void {
    const { maxFrame } = this, block = this.tableUpdate + lines;
    this.tableUpdate = "";
    for (let at = 0, type = HEADERS, flags = ends ? END_STREAM : 0; at < block.length; at += maxFrame) {
      const part = block.slice(at, at + maxFrame), isLast = at + maxFrame >= block.length;
      this.writeFrame(type, isLast ? flags | END_HEADERS : flags, id, part);
      type = CONTINUATION;
      flags = 0;
    }
  }
  /**
   * Sends some of the bytes, in frames that leave as one piece of memory: that makes responses of 1 MiB 1.5 times as fast
   * on Node 24.21.
   */
  sendData(id: number, bytes: Bytes, at: number, size: number, ends: boolean): void {
    const { maxFrame } = this, flags = ends ? END_STREAM : 0, end = at + size;
    if (this.overAt) return;
    if (size) this.moved++;
    this.window -= size;
    if (size <= Math.min(SMALL, maxFrame)) return this.writeFrame(DATA, flags, id, bytes.toString("latin1", at, end));
    const out = borrowed(size + 9 * Math.ceil(size / maxFrame));
    for (let to = 0; at < end;) {
      const part = Math.min(maxFrame, end - at);
      to += out.write(frameHead(part, DATA, at + part === end ? flags : 0, id), to, "latin1");
      to += bytes.copy(out, to, at, at + part);
      at += part;
    }
    this.flush();
    writeBytes(this.socket, out);
  }
  sendReset(id: number, code: Http2Error): void {
    const { resets } = this;
    this.writeFrame(RESET, 0, id, u32(HTTP2_ERRORS.indexOf(code)));
    resets.add(id);
    if (resets.size > MOST_RESETS) resets.delete(resets.values().next().value!);
  }
  protected sendGoAway(last: number, code: Http2Error, detail = ""): void {
    this.writeFrame(GOAWAY, 0, 0, u32(last) + u32(HTTP2_ERRORS.indexOf(code)) + detail);
  }

  /** Sends the last GOAWAY: nothing else is sent, and streams that are open are lost. */
  protected goAway(code: Http2Error, detail = ""): void {
    if (this.overAt) return;
    this.sendGoAway(Math.min(this.lastId, this.lastServed), code, detail);
    this.overAt = this.now();
    this.leaveAll(detail);
    this.end();
    this.resumeReading(); // reads on, for unread bytes would reset the connection before the GOAWAY arrives
  }
  /** Ends the connection for an error of the peer. */
  protected fail({ code, message }: Http2Failure): void {
    this.goAway(code, message);
  }
  /** Ends all streams, or some, which the peer or the connection has ended. */
  protected leaveAll(detail: string, isMeant = (_stream: Http2Stream): boolean => true, unseen = false): void {
    for (const stream of [...this.streams.values()].filter(isMeant)) stream.abort("reset", detail, undefined, unseen);
  }
  checkTimeouts(now: number): void {
    for (const stream of [...this.streams.values()]) stream.checkTimeouts(now);
  }
}
const WINDOW_TOO_LARGE = "a window over 2^31-1";

/** What frames of a type belong to, the size of their payload where it is fixed, and the method that reads them. */
interface FrameRule {
  readonly of: "stream" | "connection" | "both";
  readonly size?: number;
  read(this: Http2Connection, payload: Bytes, flags: number, id: number): void;
}
const { prototype: READERS } = Http2Connection;
/** The frames of RFC 9113 section 6: the position is the type. */
const FRAMES: readonly FrameRule[] = [
  { of: "stream", read: READERS.onDataFrame },
  { of: "stream", read: READERS.onHeadersFrame },
  { of: "stream", size: 5, read: READERS.onPriority },
  { of: "stream", size: 4, read: READERS.onReset },
  { of: "connection", read: READERS.onSettings },
  { of: "stream", read: READERS.onPush },
  { of: "connection", size: 8, read: READERS.onPing },
  { of: "connection", read: READERS.onGoAwayFrame },
  { of: "both", size: 4, read: READERS.onWindow },
  { of: "stream", read: READERS.onContinuation },
];

// Connections of clients.

/** A request of a client on its stream. */
class ClientStream extends Http2Stream<Http2ClientConnection> {
  readonly request: HttpRequest & { expects: boolean };
  private isAnswered = false;
  private isTunnel = false;
  private answeredAt = Infinity; // when the response was out

  constructor(connection: Http2ClientConnection, id: number, head: Http2Head, ends: boolean) {
    super(connection, id);
    const { scheme, peer } = connection, { upgrade, block, length } = head;
    this.hasEnded = ends;
    if (!ends || upgrade) this.body = new StreamedBody(length, this);
    if (this.body && length < 0 && !upgrade) this.body.kept = [];
    if (ends) this.body?.end(NO_FIELDS);
    this.request = {
      ...head,
      ...{ scheme, peer, source: undefined, gone: false, onGone: undefined },
      block: isWebSocket(upgrade) ? withKey(block) : block,
      body: upgrade ? NO_BODY : this.body ?? (length < 0 ? NO_BODY : EMPTY_BODY),
      respond: (response) => this.respond(response),
      inform: (status, _reason, fields) => this.inform(status, fields),
    };
  }

  onRead(): void {
    if (!this.request.expects || this.isAnswered) return;
    this.request.expects = false;
    this.inform(100, NO_FIELDS);
  }
  private inform(status: number, fields: Fields): void {
    if (!this.isAnswered && !this.sent) this.sendLines(`:status: ${status}\r\n${linesOf(fields)}`, false);
  }
  private sendLines(lines: string, ends: boolean): void {
    this.connection.sendHead(this.id, compressLines(lines), ends);
  }

  private respond(response: HttpResponse): void {
    const { status, fields, body, tunnel } = response, { id, request } = this;
    if (this.isAnswered || this.sent) return body.cancel();
    if (request.upgrade && !tunnel && status < 300) { // the client would take 200 for a switch
      body.cancel();
      return this.respond(failureReply("invalid-answer"));
    }
    this.isAnswered = true;
    if (!id || request.problem === "bad-request") {
      body.cancel();
      endRequest(request);
      return id ? this.drop("PROTOCOL_ERROR") : undefined;
    }
    if (tunnel) return this.switch(fields, tunnel);
    const isBodiless = request.method === "HEAD" || BODILESS.has(status) || body.bytes?.length === 0;
    const date = fieldOf(fields, "date") === undefined ? compressLine(dateLine(new Date()).trimEnd()) : "";
    const block = compressHead(`:status: ${status}\r\n${response.lines ?? linesOf(fields)}`) + date;
    this.connection.sendHead(id, block, isBodiless);
    if (!isBodiless) return this.sendBody(body);
    body.cancel();
    this.endSide();
  }

  /** The server speaks the protocol that the client asked for (RFC 8441): bytes pass both ways. */
  private switch(fields: Fields, server: UpstreamEnd): void {
    endRequest(this.request);
    this.isTunnel = true;
    this.sendLines(`:status: 200\r\n${linesOf(without(fields, HANDSHAKE))}`, false);
    const socket = socketOf(this.body!, (outgoing) => this.sendBody(outgoing));
    const client = server.join(socket);
    socket.on("data", (bytes: Bytes) => client.onData(bytes)).on("drain", () => client.onDrain());
    socket.on("end", () => client.onEnd()).on("close", () => client.onClose()).on("error", () => {});
  }

  override endSide(): void {
    this.connection.onResponse();
    if (!this.isTunnel) {
      endRequest(this.request);
      this.body?.cancel();
      this.answeredAt = this.connection.now();
    }
    super.endSide();
  }
  /** Resets an upload that outlives its response, once the client has had time to read that. */
  override checkTimeouts(now: number): void {
    if (now - this.answeredAt >= LINGER.without) this.drop("NO_ERROR");
    if (!this.connection.blocked.has(this)) this.since = now; // nothing waits for the client
    super.checkTimeouts(now);
  }
  cancel(why: Failure): void {
    endRequest(this.request);
    if (!isGrpc(this.request)) return this.drop(this.isTunnel ? "CANCEL" : "INTERNAL_ERROR");
    this.sendLines(linesOf(grpcFields(why)), true);
    this.endSide();
  }
  protected onAbort(why: Failure): void {
    const { request, body, source } = this;
    body?.end(why === "reset" ? "client-left" : "bad-body");
    if (request.gone) return;
    cancelRequest(request);
    source?.cancel();
  }
}

/** RFC 8441 has no key, but servers of HTTP/1.1 want one. */
function withKey({ fields }: FieldBlock): FieldBlock {
  const key = randomBytes(16).toString("base64");
  return { fields: [...without(fields, KEY_NAME), "sec-websocket-key", key], passing: undefined };
}
const KEY_NAME = new Set(["sec-websocket-key"]);
const HANDSHAKE = new Set(["sec-websocket-accept"]);

/** One connection of a client. */
class Http2ClientConnection extends Http2Connection {
  readonly scheme: string;
  readonly peer: string;
  private readonly context: ServerContext;
  protected override preface = PREFACE;
  private begun: ClientStream[] = []; // requests that have begun in the bytes being read
  private hasSkipped = false; // the client has left out numbers of streams
  private clientEnded = false; // the client has ended its side
  private unsent = 0; // what waited for the client when it was last looked at
  private movedAt: number; // when it last took something

  constructor(context: ServerContext, socket: Socket, scheme: string, from?: ClientConnection) {
    const { header_size } = context.limits();
    super(socket, () => context.now(), header_size, from);
    this.context = context;
    this.scheme = scheme;
    this.peer = unmapped(socket.remoteAddress);
    this.movedAt = this.usedAt;
    this.sendSettings([[SETTING.streams, MAX_STREAMS], [SETTING.list, header_size], [SETTING.connect, 1]]);
  }

  override onData(bytes: Bytes): void {
    super.onData(bytes);
    const { begun, context } = this;
    if (!begun.length) return;
    this.begun = []; // small bodies have arrived whole by now
    for (const stream of begun) context.handle(stream.request);
  }

  onHead(id: number, block: HeaderBlock, ends: boolean): void {
    const stream = this.streams.get(id);
    if (stream) return stream.onBlock(block, ends);
    if (this.resets.has(id)) return;
    if (id % 2 === 0) throw fault("PROTOCOL_ERROR", `stream ${id} is not a client's`);
    if (id <= this.lastId) throw fault(this.hasSkipped ? "PROTOCOL_ERROR" : "STREAM_CLOSED", `stream ${id} is closed`);
    this.hasSkipped ||= id > this.lastId + 2;
    this.lastId = id;
    const isLate = id > this.lastServed, isRefused = isLate || this.streams.size >= MAX_STREAMS;
    if (isRefused && !isLate) this.countUseless();
    if (isRefused) return this.sendReset(id, "REFUSED_STREAM");
    const head = block.request ??= http2RequestHead(block, this.context.limits());
    if (ends && head.length > 0) throw fault("PROTOCOL_ERROR", "no body where one was announced", id);
    const begun = new ClientStream(this, id, head, ends);
    this.streams.set(id, begun);
    this.begun.push(begun);
  }

  /** Ends the connection, which is counted and logged as a request that is not valid. */
  protected override fail(failure: Http2Failure): void {
    const { context } = this, problem = failure.code === "ENHANCE_YOUR_CALM" ? "flood" : "bad-request";
    if (this.overAt) return;
    super.fail(failure);
    const head = http2RequestHead({ fields: [], size: 0, secret: undefined }, context.limits());
    context.handle(new ClientStream(this, 0, { ...head, problem }, true).request);
  }

  onGoAway(): void {} // its open requests go on
  /** The client has half-closed: it still gets the responses to whole requests. */
  onEnd(): void {
    this.clientEnded = true;
    this.leavingAt ||= this.now();
    this.leaveAll(CLOSED, (stream) => !stream.hasEnded);
    this.endIfUnused();
  }
  onClose(): void {
    this.overAt = this.now();
    this.leaveAll("the client has left");
  }

  /** Tells the client to open no more streams. Those that it has opened meanwhile are still served (RFC 9113 section 6.8). */
  closeIdle(): void {
    if (this.leavingAt || this.overAt) return;
    this.leavingAt = this.now();
    this.sendGoAway(MAX_WINDOW, "NO_ERROR");
    this.writeFrame(PING, 0, 0, "draining");
  }
  override onPong(): void {
    if (this.leavingAt) this.endIfUnused();
  }

  isWriting(): boolean {
    return this.unwritten !== "" || this.socket.writableLength > 0 || this.blocked.size > 0;
  }

  override checkTimeouts(now: number): void {
    const { header, keep_alive } = this.context.limits(), { socket, streams, block } = this;
    const unsent = socket.writableLength, waited = now - this.usedAt;
    if (unsent === 0 || unsent !== this.unsent) this.movedAt = now;
    this.unsent = unsent;
    super.checkTimeouts(now);
    const open = [...streams.values()], stuck = open.filter((stream) => now - stream.since >= keep_alive);
    const isStuck = open.length > 0 && stuck.length === open.length;
    if (this.overAt) {
      if (now - this.overAt >= (unsent ? keep_alive : LINGER.silent)) socket.destroy();
    } else if (isStuck || now - this.movedAt >= keep_alive) {
      this.fail(fault("ENHANCE_YOUR_CALM", "the client does not read"));
    } else if (stuck.length) { // by a paused video, say: the others go on
      for (const stream of stuck) stream.abort("reset", "the client does not read", "ENHANCE_YOUR_CALM");
    } else if (!this.hasSettings && waited >= header || block && now - block.since >= header) {
      this.fail(fault("ENHANCE_YOUR_CALM", "the client is too slow"));
    } else if (this.clientEnded) this.writeFrame(PING, 0, 0, "are you?"); // a client that has left answers with a reset
    else if (!streams.size && waited >= keep_alive) this.endIfUnused();
    else if (this.leavingAt && this.lastServed === Infinity && now - this.leavingAt >= LEAVING) {
      this.lastServed = this.lastId;
      this.sendGoAway(this.lastServed, "NO_ERROR");
      this.endIfUnused();
    }
  }
}
const LEAVING = 1_000; // milliseconds between the two GOAWAYs of a drain

// Connections to servers.

const NO_HTTP2 = "; it has not spoken HTTP/2: for a server of HTTP/1.1 write http://";
const HTTP1 = "it speaks HTTP/1.1, not HTTP/2: write http:// in place of h2c://";
const NO_ALPN = "it does not offer HTTP/2 by ALPN; http: 1.1 or auto asks it over HTTP/1.1";

/** An attempt on its stream. */
class UpstreamStream extends Http2Stream<Http2UpstreamConnection> implements Progress {
  readonly attempt: Attempt;
  connected = false; // the request has begun to be sent
  head: ResponseHead | undefined;
  private overhead = 0; // bytes of interim responses

  constructor(to: Http2UpstreamConnection, id: number, attempt: Attempt) {
    super(to, id);
    this.attempt = attempt;
    attempt.carrier = this;
  }
  get isFull(): boolean {
    return this.connection.blocked.has(this);
  }

  send(): void {
    const { connection, id, attempt, attempt: { method, target, lines, body, server, secret } } = this;
    const [, host = ""] = /^host: (.*)\r\n/im.exec(lines) ?? [], scheme = isSecure(server) ? "https" : "http";
    const isSized = body.length >= 0 && (body !== NO_BODY || BODY_EXPECTED.has(method));
    const length = isSized ? `content-length: ${body.length}\r\n` : "";
    const pseudo = `:method: ${method}\r\n:scheme: ${scheme}\r\n:authority: ${host}\r\n:path: ${target}\r\n`;
    this.connected = true;
    this.since = attempt.connectedAt = connection.client.time;
    connection.sendHead(id, compressLines(pseudo + lines + length, secret), body === NO_BODY);
    if (body === NO_BODY) this.endSide();
    else this.sendBody(body);
  }

  override onBlock(block: HeaderBlock, ends: boolean): void {
    const { attempt, id, connection: { client } } = this, head = block.response ??= http2ResponseHead(block);
    this.since = client.time = client.now();
    if (this.head) return super.onBlock(block, ends);
    if (typeof head === "string") throw fault("PROTOCOL_ERROR", head, id);
    const { status, reason, fields, lines } = head, isBodiless = attempt.method === "HEAD" || BODILESS.has(status);
    if (status < 200 && ends) throw fault("PROTOCOL_ERROR", "its interim response is the last", id);
    if (status < 200) this.overhead += block.size;
    if (this.overhead > MAX_HEAD) throw fault("PROTOCOL_ERROR", "its head is too long", id);
    if (status < 200) return status > 100 ? attempt.onInform(status, reason, fields) : undefined;
    if (ends && !isBodiless && head.length > 0) throw fault("PROTOCOL_ERROR", "it has no body, but a length", id);
    this.head = head;
    if (!ends) this.body = new StreamedBody(isBodiless ? 0 : head.length, this);
    attempt.onHead({ status, reason, fields, lines, body: isBodiless ? NO_BODY : this.body ?? EMPTY_BODY });
    if (ends && attempt.carrier === this) this.onEnd(NO_FIELDS);
  }

  /** The response is complete: the rest of the upload is cancelled. */
  protected override onEnd(trailers: Fields): void {
    const { attempt } = this;
    attempt.trailers = trailers;
    super.onEnd(trailers);
    if (attempt.carrier !== this) return;
    this.detach();
    if (!this.sent) this.drop("NO_ERROR");
    attempt.onEnd(undefined, "", true);
  }
  private detach(): void {
    const { attempt } = this;
    this.connection.onResponse();
    attempt.uploaded = this.sentBytes;
    attempt.received = this.body?.received ?? 0;
    attempt.carrier = undefined;
  }
  /** The server gets a reset only where it has the request; the rest of the upload is cancelled. */
  override drop(code?: Http2Error): void {
    const { connected, sent, attempt } = this;
    super.drop(connected ? code : undefined);
    if (code && connected && !sent) attempt.body.cancel();
  }

  cancel(why: Failure): void {
    this.abort(why, FAILURES[why].text, "CANCEL");
  }
  discardRest(): void {
    this.cancel("client-left");
  }
  override resumeReading(): void {
    this.since = this.connection.client.time;
    super.resumeReading();
  }

  /** Fails the attempt; one that the server has not looked at goes to another connection instead, once. */
  protected onAbort(why: Failure, detail: string, unseen: boolean): void {
    const { attempt, id, connected, connection: { client } } = this;
    if (attempt.carrier !== this) return;
    const isWhole = !connected || attempt.body.bytes !== undefined; // nothing of the body is used up
    const mayMove = unseen || why === "reset" && id > 1 && mayRepeat(attempt); // the first stream is on no stale connection
    if (mayMove && isWhole && !this.head && !client.moved.has(attempt)) {
      attempt.carrier = undefined;
      client.moved.add(attempt);
      return client.send(attempt);
    }
    this.detach();
    this.body?.end(why);
    attempt.onEnd(connected || why !== "reset" ? why : "connect", detail, connected && !(unseen && isWhole));
  }

  override checkTimeouts(now: number): void {
    super.checkTimeouts(now);
    const late = exceededTimeout(this.attempt, this, now);
    if (late) this.abort(late, `silent for ${Math.round(now - this.since)} ms`, "CANCEL");
  }
}

/** One connection to a server, shared by attempts. */
class Http2UpstreamConnection extends Http2Connection {
  readonly client: Dialer;
  readonly server: Server;
  readonly pool: Http2UpstreamConnection[];
  protected override readonly maxPush = 0;
  protected override lastServed = 0; // the server opens none
  private hint = ""; // what to write in routes.yml, until the server has spoken HTTP/2
  private readonly bornAt: number;

  constructor(client: Dialer, socket: Socket, server: Server, pool: Http2UpstreamConnection[]) {
    super(socket, () => client.now(), MAX_HEAD);
    this.client = client;
    this.server = server;
    this.pool = pool;
    this.bornAt = client.time;
    this.maxStreams = client.mostStreams.get(server) ?? MAX_STREAMS;
    socket.on(isSecure(server) ? "secureConnect" : "connect", () => this.onConnect());
  }

  private onConnect(): void {
    const { socket, client, server } = this;
    client.time = client.now();
    if (!isSecure(server)) this.hint = NO_HTTP2;
    if (!isSecure(server) || (socket as TLSSocket).alpnProtocol === "h2") {
      this.write(PREFACE);
      return this.sendSettings([[SETTING.push, 0], [SETTING.list, MAX_HEAD]]);
    }
    const mayFallBack = server.http === "auto"; // to HTTP/1.1, from now on
    if (mayFallBack) client.withoutHttp2.add(server);
    this.overAt = this.now();
    socket.destroy();
    this.leaveAll(NO_ALPN, undefined, mayFallBack);
  }

  override onData(bytes: Bytes): void {
    if (!this.hasSettings && bytes.toString("latin1", 0, 7) === "HTTP/1.") {
      return this.fail(fault("PROTOCOL_ERROR", HTTP1));
    }
    super.onData(bytes);
  }

  /** Sends the attempts that wait: now it is known how many streams the server accepts. */
  override onFirstSettings(): void {
    const { client, server, maxStreams, pool } = this, waiting = [...this.streams.values() as Iterable<UpstreamStream>];
    this.hint = "";
    client.mostStreams.set(server, maxStreams);
    for (const other of pool) if (!other.hasSettings) other.maxStreams = Math.min(other.maxStreams, maxStreams);
    for (const stream of waiting.splice(0, maxStreams)) stream.send();
    for (const stream of waiting) stream.abort("reset", "it takes no more streams", undefined, true);
  }

  /** Whether another attempt may use it. */
  isOpen(): boolean {
    const { overAt, leavingAt, socket, client, bornAt, streams, lastId } = this;
    if (overAt || leavingAt || socket.destroyed || client.time - bornAt >= MAX_AGE) return false;
    return streams.size < this.maxStreams && lastId < MAX_WINDOW - 2;
  }
  /** Sends an attempt, as soon as the server's SETTINGS have come. */
  take(attempt: Attempt): void {
    this.lastId += this.lastId ? 2 : 1;
    const stream = new UpstreamStream(this, this.lastId, attempt);
    this.streams.set(this.lastId, stream);
    if (this.hasSettings) stream.send();
  }

  onHead(id: number, block: HeaderBlock, ends: boolean): void {
    this.streamOf(id)?.onBlock(block, ends);
  }
  onGoAway(last: number): void {
    this.leavingAt = this.now();
    this.leaveAll("it ends the connection", ({ id }) => id > last, true);
    this.endIfUnused();
  }
  onEnd(): void {
    this.goAway("NO_ERROR", this.reason + this.hint);
  }
  onClose(): void {
    const { pool } = this;
    this.overAt = this.now();
    this.leaveAll(NO_PROTOCOL.test(this.reason) ? NO_ALPN : this.reason + this.hint);
    pool.splice(pool.indexOf(this), 1);
  }

  override checkTimeouts(now: number): void {
    const { streams, socket } = this;
    super.checkTimeouts(now);
    if (this.overAt) {
      if (now - this.overAt >= LINGER.silent) socket.destroy();
    } else if (!this.hasSettings) {
      if (!streams.size) socket.destroy();
    } else if (now - this.usedAt >= IDLE) this.endIfUnused();
  }
}
const NO_PROTOCOL = /no.?application.?protocol|alert number 120/i; // what runtimes say where ALPN finds none

// --- 3.7 Versions: which version of HTTP a connection speaks, and the pools of connections ---

/** A server for connections that a listener accepts. */
export class HttpServer {
  readonly context: ServerContext;
  readonly connections: Connections<ClientConnection | Http2ClientConnection>;

  constructor(context: ServerContext) {
    this.context = context;
    this.connections = new Connections(context.now);
  }

  accept(socket: Socket, scheme: string): void {
    const { context, connections } = this;
    if ((socket as TLSSocket).alpnProtocol === "h2") {
      return void connections.add(new Http2ClientConnection(context, socket, scheme));
    }
    connections.add(
      new ClientConnection(context, socket, scheme, (from, received) => {
        const to = new Http2ClientConnection(context, socket, scheme, from);
        connections.add(to);
        connections.delete(from);
        to.onData(received);
      }),
    );
  }

  /** Refuses a connection above the limit. */
  refuse(socket: Socket, why: FailureName): void {
    const { body, fields, status } = failureReply(why), reason = STATUS_CODES[status] ?? "";
    const head = `HTTP/1.1 ${status} ${reason}\r\n${linesOf(fields)}${dateLine(new Date())}Connection: close\r\n\r\n`;
    socket.on("error", () => {}); // `close` follows
    socket.end(head + body.bytes!.toString("latin1"));
    socket.resume();
    setTimeout(() => socket.destroy(), REFUSED).unref();
  }
}

/** All connections to servers of one balancer. */
export class HttpClient extends Dialer {
  readonly now: () => number;
  readonly shared: WeakMap<Server, Http2UpstreamConnection[]> = new WeakMap(); // connections of HTTP/2
  private readonly dial: typeof dial;
  readonly connections: Connections<UpstreamConnection | Http2UpstreamConnection> = new Connections(() =>
    this.time = this.now()
  );

  constructor(own: { now?: () => number; dial?: typeof dial } = {}) {
    super();
    this.now = own.now ?? (() => performance.now());
    this.dial = own.dial ?? dial;
  }

  /** Hands an attempt to the newest connection that waits, or opens one. */
  send(attempt: Attempt): void {
    const { server, upgrade } = attempt, pool = this.pools.get(server);
    this.time = this.now();
    const mayShare = (server.http === 2 || server.http === "auto") && !upgrade && !this.withoutHttp2.has(server);
    if (mayShare) return this.share(attempt);
    for (let connection = pool?.pop(); connection; connection = pool?.pop()) {
      if (connection.socket.readable && this.time < connection.idleUntil) return connection.begin(attempt);
      connection.socket.destroy();
    }
    this.open(attempt);
  }

  open(attempt: Attempt): void {
    const socket = this.connectFor(attempt);
    if (socket) this.connections.add(new UpstreamConnection(this, socket, attempt));
  }

  /** Hands an attempt to a connection of HTTP/2 that has room for it, or opens one. */
  private share(attempt: Attempt): void {
    const { server } = attempt, pool = getOrMake(this.shared, server, (): Http2UpstreamConnection[] => []);
    let connection = pool.find((one) => one.isOpen());
    if (!connection) {
      const socket = this.connectFor(attempt, server.http === 2 ? ["h2"] : ["h2", "http/1.1"]);
      if (!socket) return;
      connection = new Http2UpstreamConnection(this, socket, server, pool);
      this.connections.add(connection);
      pool.push(connection);
    }
    connection.take(attempt);
  }

  private connectFor(attempt: Attempt, protocols?: string[]): Socket | undefined {
    try {
      return this.dial(attempt.server, protocols);
    } catch (error) { // a certificate file that cannot be read
      attempt.onEnd("connect", String(error), false);
      return undefined;
    }
  }

  /** Resolves when a TCP connection to the server stands, rejects otherwise. */
  async connect(server: Server, timeout: number): Promise<void> {
    const socket = await connectWithin(timeout, this.dial(server));
    if (socket instanceof WireError) throw socket;
    socket.destroy();
  }
}

// --- 3.8 Fetch: where Request, Response and streams meet our records ---

/** A body from a stream of the Fetch API. */
class FetchBody extends StreamedBody {
  override readonly hasTimeouts = false;
  private readonly fetched: ReadableStream<Uint8Array<ArrayBuffer>>;
  private readonly whyBroken: () => Failure;
  private input: ReadableStreamDefaultReader<Uint8Array<ArrayBuffer>> | undefined;
  private first: ReadableStreamReadResult<Uint8Array<ArrayBuffer>> | undefined; // that `isEmpty` has read
  private goOn: (() => void) | undefined; // while the source is paused: a call reads on

  constructor(fetched: ReadableStream<Uint8Array<ArrayBuffer>>, length: number, whyBroken: () => Failure) {
    super(length, {
      onRead: () => void this.pump(),
      resumeReading: () => this.goOn?.(),
      discardRest: () => void (this.input ?? fetched).cancel().catch(() => {}),
    });
    this.fetched = fetched;
    this.whyBroken = whyBroken;
  }

  /** Whether nothing comes; asked before it is read, where no header says it (HTTP/2 on Deno). */
  async isEmpty(): Promise<boolean> {
    this.input = this.fetched.getReader();
    do this.first = await this.input.read(); while (!this.first.done && this.first.value.byteLength === 0);
    return this.first.done;
  }

  private async pump(): Promise<void> {
    try {
      const input = this.input ??= this.fetched.getReader();
      while (!this.over) {
        const { done, value } = this.first ?? await input.read();
        this.first = undefined;
        if (done) return this.end(this.received < this.length ? "bad-body" : NO_FIELDS);
        if (value.byteLength === 0) continue; // as a chunk it would end the body
        if (this.length >= 0 && this.received + value.byteLength > this.length) this.end("bad-body");
        else this.push(Buffer.from(value.buffer, value.byteOffset, value.byteLength));
        if (this.isSourcePaused) await new Promise<void>((resolve) => this.goOn = resolve);
      }
      await input.cancel();
    } catch {
      this.end(this.whyBroken());
    }
  }

  override stream(): ReadableStream<Uint8Array<ArrayBuffer>> {
    return this.input || this.length < 0 && this.limit < Infinity ? super.stream() : this.fetched;
  }
}

/** The HttpRequest behind a Request that our own server has made. */
const INCOMING = new WeakMap<Request, HttpRequest>();

/** Converts a Request of the Fetch API. `answer` gets the Response; `kept` is its body, where others have read that. */
function requestOf(
  source: Request,
  from: Client,
  answer: (response: Response) => void,
  kept?: Uint8Array,
): HttpRequest {
  const { method } = source, incoming = INCOMING.get(source);
  const request: HttpRequest = {
    ...incoming ?? messageOf(source, from, () => request.gone),
    ...{ scheme: from.scheme, peer: from.address, source, gone: source.signal.aborted, onGone: undefined },
    ...kept && { body: new MemoryBody(Buffer.from(kept)) },
    respond(response) {
      // from now on only the response's body reports that the client is gone
      source.signal.removeEventListener("abort", left);
      if (incoming && response.tunnel) incoming.respond(response);
      answer(response.tunnel ? new Response(null) : toResponse(response, method));
    },
    inform: (status, reason, fields) => incoming?.inform(status, reason, fields),
  };
  const left = () => cancelRequest(request);
  const before = incoming?.onGone;
  if (incoming) {
    incoming.onGone = () => {
      before?.();
      left();
    };
  } else source.signal.addEventListener("abort", left);
  return request;
}

/** The head of a Request, and its body; `isGone` tells whether its client has left. */
function messageOf({ method, url, headers, body }: Request, from: Client, isGone: () => boolean) {
  const authority = url.indexOf("://") + 3, start = url.indexOf("/", authority), own = url.slice(authority, start);
  const block = parseFields(from.headers.length ? `\r\n${linesOf(from.headers).slice(0, -2)}` : "");
  const length = headers.get("content-length"), encoding = headers.get("transfer-encoding");
  const isAnnounced = length !== null && encoding === null;
  const isBad = authority < 3 || start < 0 || !isPrintable(from.headers) || !/^\d{1,15}$/.test(length ?? "0") ||
    !/^chunked$/i.test(encoding ?? "chunked");
  const head: RequestHead = {
    ...{ method, version: "1.1", trailers: false, expects: false },
    block: isBad ? { ...block, fields: from.headers } : block, // the log shows what is refused
    host: headers.get("host") ?? own, // Host wins, as with a request that comes over a socket
    target: url.slice(start).replace(/[^\x00-\xff]+/g, encodeURIComponent),
    upgrade: from.upgrades && headers.get("upgrade") || "",
    problem: isBad ? "bad-request" : undefined,
  };
  const none = isAnnounced ? EMPTY_BODY : NO_BODY, bytes = isAnnounced ? Number(length) : -1;
  return { ...head, body: body ? new FetchBody(body, bytes, () => isGone() ? "client-left" : "bad-body") : none };
}

const HOP_FIELDS = [...CONNECTION_FIELDS].filter((name) => !/^(?:content-length|expect|host)$/.test(name));
/** Fields without those that end at this hop. */
const withoutHopFields = (fields: Fields): Fields =>
  without(fields, new Set([...HOP_FIELDS, ...optionsOf(fieldOf(fields, "connection") ?? "")]));
const isTokenText = memo((text) => TOKEN.test(text));
/** Whether all fields are valid: a line break would begin another header, or another request. */
function isPrintable(fields: Fields): boolean {
  for (let i = 0; i < fields.length; i += 2) if (!isTokenText(fields[i]!) || !VALUE.test(fields[i + 1]!)) return false;
  return true;
}

/** Converts a request for middleware; with its body and abort signal only if `withBody`. */
function toRequest(request: HttpRequest, withBody: boolean): Request {
  const { method, target, host, scheme, block, body } = request;
  const path = target.startsWith("/") ? target : target.replace(/^https?:\/\/[^/?#]*\/?|^\*$/i, "/");
  const init: RequestInit & { duplex?: "half" } = { method, headers: fieldPairs(block.fields) };
  if (withBody && body.length !== 0 && method !== "GET" && method !== "HEAD") {
    Object.assign(init, { body: body.stream(), duplex: "half" });
  }
  const gone = new AbortController(), url = `${scheme}://${host || "unknown"}${path}`;
  const made = new Request(url, withBody ? { ...init, signal: gone.signal } : init);
  if (withBody) {
    INCOMING.set(made, request);
    request.onGone = () => gone.abort();
  }
  return made;
}

/** Converts a response for the Fetch API, whose statuses end at 599 and exclude 101. */
function toResponse(response: HttpResponse, method: string): Response {
  const { status, fields, body, webSocket } = response, bodiless = method === "HEAD" || BODILESS.has(status);
  const shown = status > 599 ? 502 : status, init = webSocket ? { webSocket } : { encodeBody: "manual" };
  if (bodiless) body.cancel();
  const content = bodiless || body === NO_BODY ? null : body.bytes ?? body.stream();
  const made = new Response(content, { status: shown, statusText: response.reason, ...init } as ResponseInit);
  for (let i = 0; i < fields.length; i += 2) made.headers.append(fields[i]!, fields[i + 1]!);
  return made;
}

/** A Response as an answer. */
function fromResponse(response: Response): HttpResponse {
  const { status, statusText, headers, body } = response, { webSocket } = response as { webSocket?: unknown };
  const length = headers.get("content-length"), known = length !== null && /^\d{1,15}$/.test(length);
  const fields = withoutHopFields([...headers].flat());
  const content = body ? new FetchBody(body, known ? Number(length) : -1, () => "reset") : NO_BODY;
  return { status, reason: statusText, fields, body: content, ...(webSocket ? { webSocket } : {}) };
}

/** Sends attempts by a function such as fetch. */
const sendByFetch = (fetch: Fetch): Effects["send"] => (attempt) => {
  const { server, method, target, lines, body, timeouts } = attempt, giveUp = new AbortController();
  let [begun, over]: [boolean, (() => void) | undefined] = [false, undefined];
  const end = (why: Failure | undefined, detail: string, sent: boolean) => {
    attempt.carrier = undefined;
    attempt.onEnd(why, detail, sent);
  };
  attempt.carrier = { cancel: (why) => giveUp.abort(why) };
  const given: FetchAttempt = {
    ...{ server, method, timeouts, headers: fieldsOf(lines), signal: giveUp.signal },
    body: body === NO_BODY ? null : body.bytes ?? body.stream(),
    ended(_status, bytes, problem) {
      if (over) return;
      attempt.received = bytes;
      over = () => end(problem, problem ?? "", true);
      if (begun) over();
    },
  };
  fetch(server.url + target, given).then((response) => {
    attempt.onHead(fromResponse(response));
    begun = true;
    over?.();
  }, (error) => {
    if (error instanceof WireError) end(error.kind, error.message, error.sent);
    else end("reset", String(error), true);
  });
};

/** Fields from the lines in which they are written. */
const fieldsOf = (lines: string): string[] =>
  lines.split("\r\n").slice(0, -1).flatMap((line) => {
    const colon = line.indexOf(":");
    return [line.slice(0, colon), line.slice(colon + 2)];
  });

/** The platform answers in place of a server that it cannot reach: its statuses, and what they mean here. */
const PLATFORM_FAILURES: Record<number, Failure> = {
  ...{ 520: "invalid-answer", 521: "connect", 522: "connect-timeout", 523: "connect", 524: "timeout" },
  ...{ 525: "connect", 526: "connect", 530: "connect" },
};

/**
 * The edge's own fetch. The platform holds the connections, and when a client has left nothing of ours may run any more:
 * an attempt ends for us with the head of its answer. "manual": a body that is encoded passes as it is.
 */
async function nativeFetch(url: string, attempt: FetchAttempt): Promise<Response> {
  const { method, headers, body, signal, timeouts } = attempt, late = new AbortController();
  const timer = setTimeout(() => late.abort(), timeouts.response);
  const init = { encodeResponseBody: "manual", signal: AbortSignal.any([signal, late.signal]) };
  let response: Response;
  try {
    const named = fieldPairs(without(headers, new Set(["host"]))); // which the platform sets from the URL
    response = await fetch(url, { ...init, method, headers: named, body, redirect: "manual" });
  } catch (error) {
    const other = signal.aborted ? "client-left" : "reset";
    throw new WireError(late.signal.aborted ? "timeout" : other, true, String(error));
  } finally {
    clearTimeout(timer);
  }
  const { status } = response, failure = PLATFORM_FAILURES[status];
  if (failure && response.headers.get("server") === "cloudflare") {
    await response.body?.cancel();
    const used = failure !== "connect" || body instanceof ReadableStream; // nobody can have the rest of a stream again
    throw new WireError(failure, used, `the platform answers ${status}`);
  }
  attempt.ended(status, Number(response.body && response.headers.get("content-length")));
  return response;
}

// -----------------------------------------------------------------------------------------------------------
// 4. Routing
// Which route a request belongs to. The normal form of its path is matched; what is forwarded is what came, where
// both mean the same to every server. Routes are compiled once per table: a thousand cost what one costs.
// -----------------------------------------------------------------------------------------------------------

// --- 4.1 Validation: method, Host, target, framing and loops ---

const METHOD = /^[A-Z][A-Z0-9-]{0,31}$/;
const REFUSED_METHODS = new Set(["TRACE", "TRACK", "CONNECT"]);
const HOST = /^(?:[a-z0-9_](?:[a-z0-9_.-]{0,253})|\[[0-9a-f:.]{2,45}\])(?::(\d{0,5}))?$/i;
const PLAIN_PATH = /^\/(?:[\w~!$&'()*+,;=:@-]|\/(?!\.)|(?<!\/)\.)*$/; // nothing encoded, no segment beginning with a dot
const FORBIDDEN_IN_PATH = /[\x00-\x20\x7f\\#]/;
const FORBIDDEN_IN_QUERY = /[\x00-\x20\x7f#]/; // as sent otherwise: browsers send a backslash as it is, and so do we

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

/** Removes dot segments (RFC 3986 section 5.2.4). `%2F` is not a slash. */
function removeDots(path: string): string {
  if (!path.includes("/.")) return path;
  const out: string[] = [];
  for (const segment of path.split("/").slice(1)) {
    if (segment === "..") out.pop();
    else if (segment !== ".") out.push(segment);
  }
  if (/\/\.\.?$/.test(path)) out.push(""); // what ends in dots is a folder
  return "/" + out.join("/");
}

/** Bytes above 0x7f as a URI writes them. */
const percentEncoded = (text: string) => text.replace(/[\x80-\xff]/g, (byte) => `%${HEX[byte.charCodeAt(0)]!}`);

/** A path in one spelling, or undefined where it cannot be trusted to mean one thing. Its dot segments are still there. */
function respellPath(path: string): string | undefined {
  if (PLAIN_PATH.test(path)) return path;
  if (path[0] !== "/" || FORBIDDEN_IN_PATH.test(path)) return undefined;
  if (/%(?![0-9a-f]{2})|%00/i.test(path)) return undefined;
  return normalEncoding(percentEncoded(path));
}

/** The path and query of a target, which may be a whole URL (RFC 9112 section 3.2); undefined where it is neither. */
function originForm(exchange: Exchange): string | undefined {
  const { request: { target, host }, method } = exchange;
  if (target.startsWith("/") || target === "*" && method === "OPTIONS") return target;
  const [, authority = "", rest = ""] = /^https?:\/\/([^/?#]+)(.*)$/i.exec(target) ?? [];
  if (!hostIsValid(authority) || host && !sameAuthority(authority, host)) return undefined;
  exchange.host ||= authority; // of HTTP/1.0
  return rest.startsWith("/") ? rest : `/${rest}`;
}

/** Checks method, Host and target once, and writes what everything below works with into the exchange. */
function validate(exchange: Exchange): FailureName | undefined {
  const { request, method, host } = exchange;
  if (request.problem) return request.problem;
  if (!METHOD.test(method) || REFUSED_METHODS.has(method)) return "bad-method";
  if (host ? !hostIsValid(host) : request.version !== "1.0") return "bad-host";
  const target = originForm(exchange);
  if (target === undefined) return "bad-request";
  if (target.length > MAX_TARGET) return "uri-too-long";
  const mark = target.indexOf("?"), sent = mark < 0 ? target : target.slice(0, mark);
  const spelled = sent === "*" ? sent : respellPath(sent), query = mark < 0 ? "" : target.slice(mark);
  if (spelled === undefined || FORBIDDEN_IN_QUERY.test(query)) return "bad-request";
  const path = removeDots(spelled);
  if (exchange.isWrapped && path !== sent) return "bad-request"; // middleware has matched another path than servers would get
  exchange.path = path;
  exchange.sentPath = path === spelled ? sent : path; // servers do not agree on dots behind two slashes
  exchange.query = query;
  return undefined;
}

const MAX_HOPS = 20; // entries of Via

/** A request that has been here before, or that has passed too many proxies. */
function detectLoop({ balancer, block }: Exchange): FailureName | undefined {
  const via = fieldOf(block.fields, "via");
  return via && (via.includes(balancer.via) || via.split(",").length > MAX_HOPS) ? "loop" : undefined;
}

// --- 4.2 Matching and rewriting: hosts, paths and conditions; what servers see in their place ---

const ANY_PATH = { kind: "prefix", path: "" } as const;

/** Builds the tables. Routes are put in by rank, so that the first that fits wins; among equals the one written first. */
function compileHosts(routes: Route[]): HostTable {
  const hosts: HostTable = { named: new Map(), any: newPathTable() };
  for (const route of [...routes].sort((a, b) => b.rank - a.rank)) {
    const tables = route.hosts.map((host) => getOrMake(hosts.named, host.replace("*", ""), newPathTable));
    for (const table of tables.length ? tables : [hosts.any]) {
      for (const path of route.paths.length ? route.paths : [ANY_PATH]) {
        if (path.kind === "regex") table.regex.push({ pattern: RE2JS.compile(path.source), routes: [route] });
        else putPath(table, path, route);
      }
    }
  }
  return hosts;
}

function putPath(table: PathTable, { kind, path }: Extract<PathRule, { path: string }>, route: Route): void {
  const segments = path.split("/"), shape = segments.map((segment) => segment.startsWith("{") ? "1" : "0").join("");
  getOrMake(table[kind], shapeKey(segments, shape), () => []).push(route);
  if (kind === "prefix") table.depth = Math.max(table.depth, segments.length - 1);
  if (shape.includes("1")) table.shapes = [...new Set([...table.shapes, shape])].sort(); // literal segments go first
}

/** A path with `{}` where a shape takes any segment. No request's path has braces, and an empty segment stays. */
const shapeKey = (segments: string[], shape: string): string =>
  segments.map((segment, i) => shape[i] === "1" && segment ? "{}" : segment).join("/");

/**
 * The route that a request belongs to, in Gateway API's order (docs/behaviour.md). Routes for its scheme come first; then the
 * most specific host decides, under that host the most specific path, and among routes of one path their rank. Where no
 * route under a host fits, those of the next less specific host are asked, and at last `default`.
 */
function matchRoute(table: Table, exchange: Exchange): Route | undefined {
  const ofScheme = table.schemes.size > 0 ? table.schemes.get(exchange.origin.scheme) : undefined;
  const route = (ofScheme && matchHost(ofScheme, exchange)) ?? matchHost(table.hosts, exchange);
  if (route) return route;
  return exchange.allow === undefined ? table.fallback : undefined;
}

/** The host itself, then wildcards, the longest first, then any host. Wildcards begin with a dot here, and no host does. */
function matchHost({ named, any }: HostTable, exchange: Exchange): Route | undefined {
  if (named.size === 0) return matchPath(any, exchange);
  const host = hostName(exchange.host);
  for (let at = 0; at >= 0; at = host.indexOf(".", at + 1)) {
    const table = named.get(host.slice(at)), route = table && matchPath(table, exchange);
    if (route) return route;
  }
  return matchPath(any, exchange);
}

/** An exact path, then prefixes, the longest first, then regular expressions by rank. */
function matchPath(table: PathTable, exchange: Exchange): Route | undefined {
  const { path } = exchange;
  const exact = matchText(table, "exact", exchange, path);
  if (exact) return exact;
  for (let prefix = firstSegments(path, table.depth);; prefix = prefix.slice(0, prefix.lastIndexOf("/"))) {
    const route = matchText(table, "prefix", exchange, prefix);
    if (route) return route;
    if (prefix === "") break;
  }
  for (const { pattern, routes } of table.regex) {
    const route = pattern.matcher(path).find() && firstThatFits(routes, exchange, pattern);
    if (route) return route;
  }
  return undefined;
}

/** The route of a path or a part of it: literally, else by patterns of as many segments. */
function matchText(table: PathTable, kind: "exact" | "prefix", exchange: Exchange, text: string): Route | undefined {
  const literal = firstThatFits(table[kind].get(text), exchange, text);
  if (literal || table.shapes.length === 0) return literal;
  const segments = text.split("/");
  for (const shape of table.shapes) {
    if (shape.length !== segments.length) continue;
    const route = firstThatFits(table[kind].get(shapeKey(segments, shape)), exchange, text);
    if (route) return route;
  }
  return undefined;
}

/** The first `depth` segments of a path. */
function firstSegments(path: string, depth: number): string {
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
    const { methods } = route, isHead = exchange.method === "HEAD"; // a route for GET answers HEAD too (RFC 9110 9.3.2)
    if (!methods.length || methods.includes(exchange.method) || isHead && methods.includes("GET")) {
      exchange.matched = matched;
      return route;
    }
    exchange.allow = [...exchange.allow ?? [], ...route.methods];
  }
  return undefined;
}

type Read = (exchange: Exchange, name: string) => string | null | undefined;
const headerOf: Read = ({ block }, name) => fieldOf(block.fields, name);
const queryOf: Read = ({ query }, name) => new URLSearchParams(percentEncoded(query)).get(name);

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

/** Whether a text is in one of the networks; `::ffff:10.0.0.1` is `10.0.0.1`, and what has no address is in `unix`. */
function addressMatcher(networks: string[]): (address: string) => boolean {
  const parsed = networks.filter((network) => network !== LOCAL).map((network) => {
    const [ip, bits] = ipaddr.parseCIDR(network.includes("/") ? network : network + (isIPv4(network) ? "/32" : "/128"));
    const mapped = ip instanceof ipaddr.IPv6 && ip.isIPv4MappedAddress() && bits >= 96;
    return mapped ? [ip.toIPv4Address(), bits - 96] as const : [ip, bits] as const;
  });
  return (address) => {
    if (!isAddress(address)) return address === unmapped(undefined) && networks.includes(LOCAL);
    if (!parsed.length) return false;
    const ip = ipaddr.process(address);
    return parsed.some(([network, bits]) => ip.kind() === network.kind() && ip.match(network, bits));
  };
}

function compileAdmission(allow: string[], deny: string[]): Route["admits"] {
  if (!allow.length && !deny.length) return undefined;
  const [allowed, denied] = [addressMatcher(allow), addressMatcher(deny)];
  return memo((client) => !denied(client) && (!allow.length || allowed(client)));
}

/** The path that the server sees: what matched is replaced, and what follows it stays as it came. */
function rewritePath({ rewrite: rule }: Route, { path, sentPath, matched }: Exchange): string {
  if (rule.kind === "none") return sentPath;
  if (rule.kind === "whole") return rule.path;
  if (typeof matched === "string") {
    const rest = path === matched ? "" : sentPath.slice(firstSegments(sentPath, matched.split("/").length - 1).length);
    return rule.path.replace(/\/+$/, "") + rest || "/";
  }
  const rewritten = matched.matcher(path).replaceFirst(rule.path);
  return removeDots(rewritten.startsWith("/") ? rewritten : `/${rewritten}`);
}

/** The query after a route's rules. Parameters that no rule names stay as they came, byte for byte. */
function rewriteQuery(query: string, { set, remove }: Route["request"]["query"]): string {
  if (!set.size && !remove.length) return query;
  const nameOf = (pair: string) => new URLSearchParams(`?${percentEncoded(pair)}`).keys().next().value ?? "";
  const unset = new Map(set), rest: string[] = [];
  for (const pair of query ? query.slice(1).split("&") : []) {
    const name = nameOf(pair), value = unset.get(name);
    if (value !== undefined) rest.push(`${new URLSearchParams([[name, value]])}`);
    else if (!set.has(name) && !remove.includes(name)) rest.push(pair);
    unset.delete(name);
  }
  if (unset.size) rest.push(`${new URLSearchParams([...unset])}`);
  return rest.length ? `?${rest.join("&")}` : "";
}

/** The target that the server sees: path and query after the route's rules. */
const targetOf = (exchange: Exchange, route: Route): string =>
  exchange.path === "*" ? "*" : rewritePath(route, exchange) + rewriteQuery(exchange.query, route.request.query);

function applyRules(fields: Fields, { set, add, remove }: HeaderRules): string[] {
  return [...without(fields, new Set([...remove, ...set.keys()])), ...[...set, ...add].flat()];
}

// -----------------------------------------------------------------------------------------------------------
// 5. Load balancing
// Which server takes a request. Failed requests eject a server for a time, failed probes take it down. Strategies
// only see the servers that may be asked.
// -----------------------------------------------------------------------------------------------------------

// --- 5.1 Strategies: pure functions from candidates to a server, in one table ---

const CANDIDATE_WEIGHTS = new WeakMap<Candidates, { even: boolean; heaviest: number; hashes: Uint32Array }>();

/** What the weights of these candidates are like. The list stays the same until a server flips, and so does the answer. */
const weightsOf = (candidates: Candidates) =>
  getOrMake(CANDIDATE_WEIGHTS, candidates, () => {
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

/** Scores servers for a request: the lowest score wins. */
type Scoring = (candidates: Candidates, input: PickInput) => (server: Server) => number;

/** Whether a server is preferred to the best before it, which has the same score; `equals`: the weight of all that have it. */
type Preference = (server: Server, best: Server, equals: number) => boolean;

/** The server with the least score; among equals the preferred one, or the first. */
function leastByScore(
  candidates: Candidates,
  score: (server: Server) => number,
  isPreferred: Preference = () => false,
): Server {
  let best = candidates[0], lowest = Infinity, equals = 0;
  for (const server of candidates) {
    const value = score(server);
    if (value > lowest) continue;
    equals = value < lowest ? server.effective : equals + server.effective;
    if (value === lowest && !isPreferred(server, best, equals)) continue;
    best = server;
    lowest = value;
  }
  return best;
}

const busyness = ({ inFlight, effective }: Server): number => inFlight / effective;
/** What least-connections compares: the connections that a server would have, by its weight. */
const connectionsByWeight = ({ inFlight, effective }: Server): number => (inFlight + 1) / effective;

/** Draws by weight without a sum: a server is accepted as often as its weight stands to the heaviest. */
function drawByWeight(candidates: Candidates, random: () => number, except?: Server): Server {
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

/** The least score of two at random, or of all where there are at most 8; among equals any, by weight. */
function leastOfSome(candidates: Candidates, input: PickInput, scoring: Scoring): Server {
  const { random } = input;
  if (candidates.length <= 8) {
    return leastByScore(
      candidates,
      scoring(candidates, input),
      ({ effective }, _, equals) => random() * equals < effective,
    );
  }
  const one = drawByWeight(candidates, random), two: Candidates = [one, drawByWeight(candidates, random, one)];
  return leastByScore(two, scoring(two, input));
}

/** The mean age of the requests that wait at a server for the head of a response; 0: none does. */
const waitingAge = ({ waiting, waitingSince }: Server, now: number): number => waiting && now - waitingSince / waiting;

/** What is left of a server's latest peak of latency, or the age of the requests that wait there, whichever is longer. */
function recentLatency(server: Server, now: number): number {
  if (server.recent === 0) return server.waiting && UNKNOWN; // one request finds out
  const decayed = server.recent * Math.exp((server.recentAt - now) / DECAY);
  return Math.max(decayed, waitingAge(server, now));
}

/** The cost of one more request at a server: its recent latency times requests in flight, by weight. */
const costOf: Scoring = (candidates, { now }) => {
  let fastest = Infinity;
  for (const server of candidates) fastest = Math.min(fastest, recentLatency(server, now));
  return (server) => {
    const pace = recentLatency(server, now);
    return (pace > NOISE * fastest ? pace : fastest) * (server.inFlight + 1) / server.effective;
  };
};

/** Scores servers for a key; the least score takes it. */
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
  const wanted = even ? candidates[farthest(hashes, hash(key))]! : leastByScore(candidates, scoresFor(candidates, key));
  if (!isFull(wanted)) return wanted;
  const score = scoresFor(candidates, key);
  return leastByScore(candidates, (server) => isFull(server) ? Infinity : score(server));
}

/**
 * The position of the hash that makes the largest number with a seed; among equals the first. For a thousand servers this
 * takes 2 us over their hashes in a row, and 8 us over the servers themselves.
 */
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
  let all = 0, weights = 0; // summed only once a server has HANDFUL in flight
  return (server) => {
    if (server.inFlight < HANDFUL) return false;
    all ||= 1.25 * (sum(({ inFlight }) => inFlight) + 1);
    weights ||= sum(({ effective }) => effective);
    return server.inFlight >= Math.ceil(all * server.effective / weights); // in this order: exact where it can be
  };
}
const HANDFUL = 8;

/** The mean latency of those servers whose latency is known; 0: of none. */
function meanLatency(servers: readonly Server[]): number {
  let sum = 0, known = 0;
  for (const { latency } of servers) {
    if (latency === 0) continue;
    sum += latency;
    known++;
  }
  return known && sum / known;
}

/**
 * The time that a server is expected to take: its latency, or the age of what waits there, times the requests that it would
 * have, by weight: nginx's least_time. A server without an answer yet counts as an eighth of the others' mean, so that it
 * is tried and not flooded.
 */
const expectedTime: Scoring = (candidates, { now }) => {
  const untried = meanLatency(candidates) / 8 || 1;
  return (server) => {
    const time = server.latency ? Math.max(server.latency, waitingAge(server, now)) : untried;
    return time * (server.inFlight + 1) / server.effective;
  };
};

const hasFewerPicks: Preference = (server, best) => server.picks * best.effective < best.picks * server.effective;

/** A strategy that goes by scores, which explain shows. */
function scored(scoring: Scoring, pick: (all: Candidates, input: PickInput, scoring: Scoring) => Server): Strategy {
  const score: Score = (server, all, input) => scoring(all, input)(server);
  return Object.assign((all: Candidates, input: PickInput) => pick(all, input, scoring), { score });
}

/** The strategies of `strategy:` in routes.yml. */
export const strategies: Record<typeof STRATEGIES[number] | "hash", Strategy> = {
  "round-robin": roundRobin,
  "first": (candidates) => candidates[0],
  "random": (candidates, { random }) => drawByWeight(candidates, random),
  "two-choices": scored(() => busyness, leastOfSome),
  "least-connections": scored(() => connectionsByWeight, (all) => leastByScore(all, connectionsByWeight)),
  "least-response-time": scored(
    expectedTime,
    (all, input, scoring) => leastByScore(all, scoring(all, input), hasFewerPicks),
  ),
  "peak-ewma": scored(costOf, leastOfSome),
  "ip-hash": scored(
    (all, { client }) => scoresFor(all, client),
    (all, { client }) => rendezvous(all, client, () => false),
  ),
  "hash": scored((all, { key }) => scoresFor(all, key), (all, { key }) => rendezvous(all, key, overloaded(all))),
};

const cookieOf = ({ block }: Pick<Exchange, "block">, name: string) =>
  parseCookie(fieldOf(block.fields, "cookie", "; ") ?? "", name)[name];
const KEYS = {
  header: headerOf,
  query: queryOf,
  cookie: cookieOf,
  path: ({ path }: Exchange) => path,
  client: ({ client }: Exchange) => client,
  none: () => null,
};

// --- 5.2 Eligibility: which servers may be asked, and how many requests each may have ---

/** Whether a server is meant to be asked at all. One that drains still finishes what it has. */
const isEnabled = (server: Server): boolean => server.weight > 0 && server.state === "ready";

/** Whether a server may be asked, leaving aside how many requests it has. After an ejection one request tries it out. */
const isHealthy = (server: Server, now: number): boolean =>
  server.up && (server.ejectedUntil === 0 || now >= server.ejectedUntil && !server.trialInFlight);

/** The share of its weight that a server has: from 10 % when it comes back to all after `slow_start`. */
function partOf(server: Server, slowStart: number, now: number): number {
  const age = now - server.backAt;
  return age >= slowStart ? 1 : Math.max(0.1, age / slowStart);
}

/**
 * The servers of a service that may be asked: healthy ones; backups where no other is healthy; all where too few are, so
 * that the rest is not overloaded (panic), unless none is and there is a fallback. The list is kept until the state of a
 * server changes: the request path only reads it.
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
  if (service.panicking) service.candidates = regulars.length ? regulars : weighted;
  else service.candidates = withoutPaused(service, ready.length ? ready : backups, now);
  service.candidatesUntil = Math.min(...servers.map((server) => nextChange(server, slow_start, now)));
  return service.candidates;
}

/** Servers that sent Retry-After are skipped, as full ones are; but no more of them than may be ejected. */
function withoutPaused({ config }: Service, servers: readonly Server[], now: number): readonly Server[] {
  const rest = servers.filter((server) => now >= server.pausedUntil);
  return rest.length > 0 && rest.length >= servers.length * (1 - config.eject.at_most) ? rest : servers;
}

/** When time alone changes whether a server may be asked, or its weight. */
function nextChange(server: Server, slowStart: number, now: number): number {
  const times = [
    server.ejectedUntil,
    server.pausedUntil,
    ...partOf(server, slowStart, now) < 1 ? [now + slowStart / 50] : [],
  ];
  return Math.min(...times.filter((time) => time > now));
}

/** Those servers that have room for one more request. */
function withRoom(service: Service, servers: readonly Server[]): readonly Server[] {
  return service.bounded ? servers.filter((server) => server.inFlight < server.limit) : servers;
}

const FIRST_LIMIT = 8; // for a server of which nothing is known
const LEAST_LIMIT = 2;
const TOLERANCE = 1.5; // times the calm latency
const LEAST_WINDOW = { time: 250, answers: 10 }; // milliseconds and answers between two changes of the limit

/**
 * Finds the limit of a server for `max_in_flight: auto`, by the gradient of its latency as in Netflix's
 * concurrency-limits: as long as that is what it is in calm times there is room for a few more, the root of the limit;
 * where it is worse, the limit shrinks by as much. At its least, a server is as calm as it will ever be.
 */
function findLimit(server: Server, refused: boolean, now: number): void {
  const { limitWindow: window, limit, latency } = server;
  window.answers++;
  window.most = Math.max(window.most, server.inFlight);
  window.refused ||= refused;
  if (now - window.since < LEAST_WINDOW.time || window.answers < LEAST_WINDOW.answers) return;
  const busy = window.most >= limit / 2, calm = window.baseline || latency;
  const isCalm = !busy || limit <= LEAST_LIMIT || latency < calm;
  const baseline = isCalm ? calm + 0.1 * (latency - calm) : calm;
  if (busy) {
    const gradient = Math.min(1, Math.max(0.5, TOLERANCE * baseline / latency));
    const next = window.refused ? 0.9 * limit : limit * gradient + Math.sqrt(limit);
    server.limit = Math.min(server.max, Math.max(LEAST_LIMIT, next));
  }
  server.limitWindow = new LimitWindow(baseline, now);
}

// --- 5.3 Outlier detection: what requests find out about servers: failures, latencies, ejections ---

/** What a failure counts as: ten times the usual latency, so that failing fast attracts no requests. */
const asSlow = ({ servers }: Service, milliseconds: number): number =>
  Math.max(milliseconds, 10 * (meanLatency(servers) || 100));

/**
 * Ejects a server for a time that grows with each time in a row, at most a share of its pool. What was known of it is
 * forgotten: it is new when it returns. False where no more may be ejected.
 */
function eject(service: Service, server: Server, why: string): boolean {
  const { failures, for: unit, at_most } = service.config.eject;
  const others = service.servers.filter((other) => other !== server && other.ejectedUntil !== 0).length;
  if (others + 1 > service.servers.length * at_most) return false;
  const now = service.effects.now();
  server.ejections = Math.min(server.ejections + 1, 10);
  server.ejectedUntil = now + unit * server.ejections;
  server.trialInFlight = false;
  server.ejected++;
  server.since = now;
  server.failures = failures - 1; // one more ejects it again: a trial that has a good head, and whose body breaks off
  Object.assign(server, new Latency());
  service.candidatesUntil = 0;
  const seconds = unit * server.ejections / 1_000;
  service.effects.report("warn", `${service.name}: ${server.name} is ejected for ${seconds} s ${why}`);
  return true;
}

/** An ejected server gets its trial request: it gets no other one until that has ended. */
function beginTrial(service: Service, server: Server, now: number): void {
  if (now < server.ejectedUntil) return; // still ejected, and asked in a panic only
  server.trialInFlight = true;
  service.candidatesUntil = 0;
}

/** Whether an attempt is the trial of its server: it began after the ejection. Earlier ones that end now do not count. */
const isTrial = (server: Server, began: number): boolean => began >= server.ejectedUntil;

/**
 * Ends the trial of a server: it is back, for it has answered; it is ejected again, with the reason why; or the trial is
 * undecided, and another one follows.
 */
function endTrial(service: Service, server: Server, verdict: "back" | "undecided" | { why: string }) {
  server.trialInFlight = false;
  service.candidatesUntil = 0;
  if (verdict === "undecided") return;
  if (verdict !== "back" && eject(service, server, verdict.why)) return;
  server.ejectedUntil = 0;
  server.slow = false;
  server.since = server.backAt = service.effects.now();
  service.effects.report("info", `${service.name}: ${server.name} is up again`);
}

/** A request to a server has failed, before its answer or in it. Enough of them in a row eject it; so does one on trial. */
function onFailed(service: Service, server: Server, began: number): void {
  const { failures } = service.config.eject;
  if (server.ejectedUntil !== 0) {
    if (isTrial(server, began)) endTrial(service, server, { why: "after a failed trial" });
    return;
  }
  if (++server.failures < failures) return;
  if (eject(service, server, `after ${failures} failures in a row`)) server.slow = false;
}

/** A whole response ends a run of failures; one well after the last ejection also resets the count of ejections. */
function onAnswered(service: Service, server: Server): void {
  if (server.ejectedUntil !== 0) return;
  server.failures = 0;
  if (server.ejections > 0 && service.effects.now() > server.backAt + service.config.eject.for) server.ejections = 0;
}

/** Updates `recent`: it jumps to a longer time, and moves towards a shorter one with a time constant of 10 s. */
function noteTime(server: Server, milliseconds: number, now: number): void {
  const rest = Math.exp((server.recentAt - now) / DECAY), sample = Math.max(milliseconds, LEAST_TIME);
  server.recent = sample > server.recent ? sample : server.recent * rest + sample * (1 - rest);
  server.recentAt = now;
}

const MEMORY = 64; // attempts: older ones fade

/** Updates a server's statistics by the result of an attempt. */
function recordResult(service: Service, server: Server, good: boolean, milliseconds: number, now: number): void {
  server.judged++;
  server.failing += (Number(!good) - server.failing) / Math.min(server.judged, MEMORY);
  if (good) {
    server.samples++;
    const sample = Math.max(milliseconds, LEAST_TIME), equal = 1 / server.samples; // the share of each sample so far
    const byAge = 1 - Math.exp((server.recentAt - now) / DECAY), share = Math.max(equal, Math.min(1 / MEMORY, byAge));
    server.latency += (sample - server.latency) * Math.max(equal, 1 / MEMORY);
    server.typical = server.typical === 0 ? sample : server.typical * (sample / server.typical) ** share;
  }
  noteTime(server, good ? milliseconds : asSlow(service, milliseconds), now);
  if (service.config.max_in_flight === AUTO) findLimit(server, !good, now);
}

/** The head of a response. A 5xx counts as a failure in comparisons; a 429 says that the server is busy. */
function onHead(service: Service, server: Server, status: number, began: number, now: number): void {
  const milliseconds = now - began;
  server.answers++;
  if (server.ejectedUntil !== 0 && isTrial(server, began)) {
    const isStillSlow = server.slow && isSlow(service, milliseconds);
    if (status >= 500) endTrial(service, server, { why: `after a trial with ${status}` });
    else if (isStillSlow) endTrial(service, server, { why: `because it still takes ${Math.round(milliseconds)} ms` });
    else endTrial(service, server, "back");
  }
  if (server.ejectedUntil !== 0) return;
  if (status === 429) {
    noteTime(server, asSlow(service, milliseconds), now);
    if (service.config.max_in_flight === AUTO) findLimit(server, true, now);
  } else recordResult(service, server, status < 500, milliseconds, now);
}

/** An attempt was given up because another was faster: its server takes at least the time that has passed. */
function onAbandoned(service: Service, server: Server, began: number): void {
  const now = service.effects.now(), milliseconds = now - began;
  if (server.ejectedUntil === 0) {
    if (milliseconds > server.typical) recordResult(service, server, true, milliseconds, now);
  } else if (isTrial(server, began) && server.slow && isSlow(service, milliseconds)) {
    endTrial(service, server, { why: `because it still takes more than ${Math.round(milliseconds)} ms` });
  }
}

/** No response has come, by the server's fault. */
function onNoResponse(service: Service, server: Server, began: number, now: number): void {
  if (server.ejectedUntil === 0) recordResult(service, server, false, now - began, now);
  onFailed(service, server, began);
}

const LEAST_COMPARED = 3; // servers
const LEAST_SAMPLES = 20; // good answers of each
const NEGLIGIBLE = 5; // milliseconds above the median that eject no server
const DEVIATIONS = 1.9; // below the mean of the others' success rates, as in Envoy
const LEAST_GAP = 0.1; // between success rates

/** Whether a time is `eject.slow` times the median of the pool, and not just a few milliseconds more. */
const isSlow = ({ median, config }: Service, milliseconds: number): boolean =>
  median > 0 && milliseconds > Math.max(config.eject.slow * median, median + NEGLIGIBLE);

/** What is typical of a server, where requests that wait longer than that count as if they were answered now; 0: not known. */
function typicalOf(server: Server, now: number): number {
  const { typical, samples, load, waiting } = server, age = waitingAge(server, now);
  const late = age > typical && waiting >= LEAST_SAMPLES ? waiting : 0;
  if (samples + late < LEAST_SAMPLES) return 0;
  const known = Math.min(samples, Math.max(MEMORY, load * DECAY / 1_000));
  return late ? Math.exp((known * Math.log(typical || 1) + late * Math.log(age)) / (known + late)) : typical;
}

/** The middle of some numbers. */
function medianOf(numbers: number[]): number {
  const sorted = numbers.sort((a, b) => a - b), half = sorted.length / 2;
  return (sorted[Math.floor(half)]! + sorted[Math.ceil(half) - 1]!) / 2;
}

/** Ejects servers that are much slower than the others, or fail more often. It runs once a second, beside a request. */
function compare(service: Service, now: number): void {
  const seconds = Math.max(now - service.comparedAt, 1) / 1_000; // a reload may have it done again at once
  service.comparedAt = now;
  service.compareAt = now + 1_000;
  for (const server of service.servers) {
    server.load += ((server.picks - server.picksThen) / seconds - server.load) *
      (1 - Math.exp(-1_000 * seconds / DECAY));
    server.picksThen = server.picks;
  }
  const serving = service.servers.filter((server) => server.ejectedUntil === 0 && server.up && isEnabled(server));
  const warm = serving.filter((server) => now - server.backAt >= service.config.slow_start); // cold ones may be slow
  ejectSlow(service, warm, now);
  ejectFailing(service, serving.filter((server) => server.ejectedUntil === 0 && server.judged >= MEMORY));
}

/** How many requests each of these has in flight, in the mean. */
const meanInFlight = (servers: Server[]): number =>
  servers.reduce((sum, { inFlight }) => sum + inFlight, 0) / servers.length;

/**
 * Ejects servers whose typical latency is `eject.slow` times the median of the pool, unless they have more to do. In a busy
 * pool a slow server is better than a queue: the more servers are out, the slower the next one has to be; and where the
 * others then have three times as much to do, the ejections end, and no server is ejected for its latency for a while.
 */
function ejectSlow(service: Service, compared: Server[], now: number): void {
  const slow = service.servers.filter((server) => server.slow && server.ejectedUntil !== 0);
  if (slow.length > 0 && meanInFlight(compared) > 3 * service.inFlightBefore + 2) {
    return endEjections(service, slow, now);
  }
  const timed = compared.map((server) => ({ server, time: typicalOf(server, now) })).filter(({ time }) => time > 0);
  if (timed.length < LEAST_COMPARED) return;
  service.median = medianOf(timed.map(({ time }) => time));
  if (now < service.toleratedUntil) return;
  const usualLoad = medianOf(timed.map(({ server }) => server.load / server.effective));
  for (const { server, time } of timed.sort((a, b) => b.time - a.time)) {
    const ejected = service.servers.filter(({ ejectedUntil }) => ejectedUntil !== 0).length;
    const tolerance = 1 + 10 * ejected / service.servers.length;
    if (!isSlow(service, time / tolerance)) return; // and neither are the others, which are faster
    if (server.load / server.effective > 1.1 * usualLoad) continue;
    const why = `because it takes ${Math.round(time)} ms where ${Math.round(service.median)} ms are usual`;
    if (slow.length === 0) service.inFlightBefore = meanInFlight(compared.filter((other) => other !== server));
    if (!eject(service, server, why)) continue;
    server.slow = true;
    slow.push(server);
  }
}

/** Ends ejections that have made matters worse. */
function endEjections(service: Service, out: Server[], now: number): void {
  for (const server of out) {
    Object.assign(server, { ejectedUntil: 0, trialInFlight: false, slow: false, since: now, backAt: now });
    service.effects.report(
      "warn",
      `${service.name}: ${server.name} is asked again: without it the others have too much to do`,
    );
  }
  service.candidatesUntil = 0;
  service.toleratedUntil = now + 2 * service.config.eject.for;
}

/** Ejects servers whose success rate is out of line with that of the better ones. */
function ejectFailing(service: Service, judged: Server[]): void {
  const [worst, ...others] = judged.sort((a, b) => b.failing - a.failing);
  if (worst === undefined || others.length < LEAST_COMPARED - 1) return;
  const mean = others.reduce((sum, { failing }) => sum + failing, 0) / others.length;
  const variance = others.reduce((sum, { failing }) => sum + (failing - mean) ** 2, 0) / others.length;
  if (worst.failing <= mean + Math.max(DEVIATIONS * Math.sqrt(variance), LEAST_GAP)) return;
  const why = `because ${Math.round(100 * worst.failing)} % of its answers fail`;
  if (!eject(service, worst, why)) return;
  worst.slow = false;
  ejectFailing(service, others);
}

/** A server has said when to come again (Retry-After, RFC 9110 section 10.2.3): that long, but no longer than an ejection. */
function onRetryAfter(service: Service, server: Server, value: string): void {
  const at = value.endsWith("GMT") ? Date.parse(value) : NaN;
  const wait = /^\d+$/.test(value) ? Number(value) * 1_000 : at - service.effects.date().getTime();
  if (!(wait > 0)) return;
  server.pausedUntil = service.effects.now() + Math.min(wait, service.config.eject.for);
  service.candidatesUntil = 0;
}

// --- 5.4 Health checks: probes, and what operators say ---

/**
 * Counts the result of a probe: `rise` or `fall` of them in a row change the server's state, which is reported once.
 * `decided`: whether it is up, where another thread has decided and reported that.
 */
function onProbed(service: Service, server: Server, problem: string | undefined, decided?: boolean): void {
  const { effects, config: { health: { rise, fall } } } = service;
  const now = server.probedAt = effects.now();
  const wasEjected = now < server.ejectedUntil && !server.slow; // a probe does not show how long requests take
  server.probeProblem = problem ?? "";
  if (problem === undefined) server.probesPassed++;
  else server.probesFailed++;
  server.passes = problem === undefined ? server.passes + 1 : 0;
  server.fails = problem === undefined ? 0 : server.fails + 1;
  if (server.upByOwnProbes && server.fails >= fall) server.upByOwnProbes = false;
  else if (!server.upByOwnProbes && server.passes >= rise) server.upByOwnProbes = true;
  if (problem === undefined && wasEjected) {
    server.ejectedUntil = server.since = now; // it may be tried out at once
    service.candidatesUntil = 0;
  }
  if (decided === undefined) {
    setUp(service, server, effects.fleet?.isUp(service, server) ?? server.upByOwnProbes, problem);
  } else setUp(service, server, decided, problem, () => {});
}

/** Sets a server up or down by its probes, and reports the change. */
function setUp(
  service: Service,
  server: Server,
  up: boolean,
  problem: string | undefined,
  report = service.effects.report,
): void {
  if (server.up === up) return;
  const now = service.effects.now();
  server.up = up;
  server.since = now;
  if (up) server.backAt = now;
  service.candidatesUntil = 0;
  if (up) report("info", `${service.name}: ${server.name} is up`);
  else report("warn", `${service.name}: ${server.name} is down: ${problem ?? "most of its probers say so"}`);
}

/** Marks a server up or down for an operator, until probes find otherwise. */
function setHealth(service: Service, server: Server, up: boolean): void {
  service.effects.onNews({ kind: "marked", service: service.name, url: server.url, up });
  if (server.up !== up || up && server.ejectedUntil > 0) server.since = service.effects.now();
  Object.assign(server, { up, upByOwnProbes: up, passes: 0, fails: 0, failures: 0 });
  if (up) Object.assign(server, { ejectedUntil: 0, trialInFlight: false, ejections: 0 });
  service.candidatesUntil = 0;
}

/** A probe: its request, and what becomes of the response. `done` is told what is wrong with the server, or undefined. */
interface ProbeRequest extends Pick<Attempt, "method" | "target" | "body"> {
  fields: Fields;
  onHead(response: HttpResponse, done: (problem: string | undefined) => void): void;
}

/** A request over HTTP. Its response is read to the end or cancelled. */
const httpProbe = ({ method, path: target, headers, expect, body: wanted }: ServiceConfig["health"]): ProbeRequest => ({
  ...{ method, target, body: NO_BODY, fields: [...headers].flat() },
  onHead({ status, body }, done) {
    const isExpected = expect.some(([from, to]) => status >= from && status <= to);
    if (isExpected && wanted) return collect(body, (taken) => done(bodyProblem(wanted, taken)));
    done(isExpected ? undefined : `status ${status}`);
    body.cancel();
  },
});

/** A call of grpc.health.v1. */
function grpcProbe({ grpc = "" }: ServiceConfig["health"]): ProbeRequest {
  const name = Buffer.from(grpc), message = name.length ? [Buffer.from([10, name.length]), name] : [];
  const prefix = Buffer.from([0, 0, 0, 0, message.length && name.length + 2]);
  return {
    ...{ method: "POST", target: "/grpc.health.v1.Health/Check", body: inMemory([prefix, ...message]) },
    fields: ["content-type", "application/grpc", "te", "trailers"],
    onHead({ status, fields, body }, done) {
      const pieces: Bytes[] = [];
      body.read({
        data: (bytes) => void pieces.push(bytes),
        fail: (why) => done(FAILURES[why].text),
        end(trailers) {
          const code = fieldOf(trailers, "grpc-status") ?? fieldOf(fields, "grpc-status");
          if (code !== "0") return done(code ? `grpc-status ${code}` : `status ${status} without a grpc-status`);
          const answer = Buffer.concat(pieces); // 5 bytes, then field 1: UNKNOWN, SERVING, NOT_SERVING, SERVICE_UNKNOWN
          const state = answer[5] === 8 ? answer[6]! : 0,
            text = ["UNKNOWN", "", "NOT_SERVING", "SERVICE_UNKNOWN"][state];
          done(state === 1 ? undefined : `it is ${text ?? state}`);
        },
      });
    },
  };
}

/** Sends a probe: rejects, or resolves to what is wrong with the server. */
function sendProbe(service: Service, server: Server, giveUp: AbortSignal) {
  const { effects, config: { health } } = service, { timeout } = health, overGrpc = health.kind === "grpc";
  if (overGrpc && server.http === 1) return Promise.resolve("gRPC needs HTTP/2: an h2c:// server, or http: 2");
  const { fields, onHead: judge, ...request } = overGrpc ? grpcProbe(health) : httpProbe(health);
  const timeouts = { connect: timeout, response: timeout, idle: timeout, request: Infinity };
  const lines = linesOf(["host", server.host || server.authority, "user-agent", "lb.ts probe", ...fields]);
  return new Promise<string | undefined>((resolve, reject) => {
    const attempt = newAttempt({
      ...{ ...request, server, timeouts, lines, startedAt: effects.now() },
      onHead: (response) => judge(response, resolve),
      onEnd: (failure, detail) => failure && reject(new Error(detail)),
    });
    giveUp.addEventListener("abort", () => attempt.carrier?.cancel("client-left"));
    effects.send(attempt);
  });
}

/** What is wrong with the body of a probe's answer, or undefined. */
function bodyProblem(wanted: string, taken: Body | Failure): string | undefined {
  if (typeof taken === "string") return FAILURES[taken].text;
  return taken.bytes!.includes(wanted) ? undefined : `the body lacks ${JSON.stringify(wanted)}`;
}

/** One probe: what is wrong with the server, or undefined. */
async function probeServer(service: Service, server: Server): Promise<string | undefined> {
  const { effects, config: { health: { kind, timeout } } } = service;
  const giveUp = new AbortController();
  const asked = kind === "tcp" ? effects.connect(server, timeout) : sendProbe(service, server, giveUp.signal);
  const late = effects.sleep(timeout, giveUp.signal).then(() => `no answer within ${timeout} ms`);
  try {
    return await Promise.race([asked, late]) ?? undefined;
  } catch (error) {
    return error instanceof Error ? error.message : String(error);
  } finally {
    giveUp.abort();
  }
}

/** Whether this process has no file handle left, which is no server's fault. On Bun 1.4.5 it reads as ECONNREFUSED. */
const isOutOfHandles = (detail: string): boolean => /\bE[MN]FILE\b/.test(detail);

/** Probes every server that is due and resolves when all verdicts are in. Each is due again after its interval +-10 %. */
async function probeDue(table: Table, effects: Effects): Promise<void> {
  const now = effects.now();
  const probed = [...table.services.values()].filter(({ config }) => config.health.kind !== "off");
  const servers = probed.flatMap((service) => service.servers.map((server) => [service, server] as const));
  const due = servers.filter(([, server]) =>
    server.probeAt <= now && server.state !== "maint" && (effects.fleet?.mayProbe(server) ?? true)
  );
  await Promise.all(due.map(async ([service, server]) => {
    server.probeAt = now + service.config.health.interval * (0.9 + 0.2 * effects.random());
    const begun = effects.now();
    const problem = await probeServer(service, server);
    if (problem && isOutOfHandles(problem)) return effects.report("error", `a probe is left out: ${problem}`);
    onProbed(service, server, problem);
    effects.onNews({ kind: "probed", service: service.name, url: server.url, problem, up: server.up });
    server.probeTook = server.probedAt - begun;
  }));
}

// --- 5.5 Sticky sessions: a signed cookie names the server that a client had before ---

/**
 * The value of the cookie for a server: a signature over its service and URL, cut to 132 bits. Without the secret no client
 * can make one, and it does not reveal the server's address. All clients of a server have the same value, so that a request
 * costs one look-up in a map.
 */
const valueFor = ({ name, config, effects: { sign, secret } }: Service, { url }: Server): string =>
  sign(config.sticky.secret || secret(), `${name}\n${url}`).slice(0, 22);

/** The servers of a service by their values. */
const signedServers = (service: Service): Map<string, Server> =>
  service.cookies ??= new Map(service.servers.map((server) => [valueFor(service, server), server]));

/** The values in a cookie, as it came: services that share its name have one each. */
const stickyValues = ({ request }: Exchange, name: string): string[] => cookieOf(request, name)?.split(".") ?? [];

/** The server that a client had before. What is forged, of another secret, or of a server that is gone, names none. */
function stickyServer(service: Service, exchange: Exchange): Server | undefined {
  const servers = signedServers(service);
  const value = stickyValues(exchange, service.config.sticky.cookie).find((value) => servers.has(value));
  return value === undefined ? undefined : servers.get(value);
}

/** The service of a split that the client had before. */
function stickyDestination({ destinations }: Route, exchange: Exchange): Destination | undefined {
  const placeOf = ({ service }: Destination) =>
    stickyValues(exchange, service.config.sticky.cookie).findIndex((value) => signedServers(service).has(value));
  const known = destinations.filter((one) => one.weight > 0 && placeOf(one) >= 0);
  return known.sort((a, b) => placeOf(a) - placeOf(b))[0];
}

/** Set-Cookie for a client that is new to its server. Values of other services stay in their places. */
function cookieFor(service: Service, server: Server, exchange: Exchange): string {
  const { cookie, max_age } = service.config.sticky;
  const sharing = [...exchange.table.services.values()].filter(({ config }) => config.sticky.cookie === cookie);
  const values = stickyValues(exchange, cookie).filter((value) => sharing.some((one) => signedServers(one).has(value)));
  const at = values.findIndex((value) => signedServers(service).has(value));
  values.splice(at < 0 ? values.length : at, 1, valueFor(service, server));
  const https = exchange.origin.scheme === "https";
  const age = max_age ? `; Max-Age=${Math.ceil(max_age / 1_000)}` : "";
  return `${cookie}=${values.join(".")}; Path=/${age}; HttpOnly; SameSite=Lax${https ? "; Secure" : ""}`;
}

/** Gives up the sticky cookie if a server sets one of that name: it is the application's, and both would break otherwise. */
function noteCookies({ destination, cookie, balancer: { effects } }: Exchange, fields: Fields): string {
  const { service } = destination!, { cookie: name } = service.config.sticky;
  const isSet = name &&
    fieldPairs(fields).some(([field, value]) => lower(field) === "set-cookie" && value.startsWith(`${name}=`));
  if (!isSet) return cookie;
  const said =
    `${service.name}: its servers set the cookie ${name} themselves, and so sticky does not: it needs another name, such as lb`;
  if (service.lostCookie !== name) effects.report("warn", said);
  service.lostCookie = name;
  return "";
}

/** Headers without one cookie: servers do not get ours. */
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

// -----------------------------------------------------------------------------------------------------------
// 6. Traffic control
// How much and how often: which requests wait or are refused, and when a request is sent again.
// Decisions only; the attempts themselves are made in the request path.
// -----------------------------------------------------------------------------------------------------------

// --- 6.1 Limits and queue: requests and connections at once, rates, and waiting for a server with room ---

const MOST_BUCKETS = 100_000; // that a rule remembers

/** An address, or the network of an IPv6 client: it has all 2^64 addresses of that. */
const clientNetwork = memo((client) =>
  isIPv6(client) ? ipaddr.parse(client).toByteArray().slice(0, 8).join(".") : client
);

/**
 * The key of the bucket that a request draws from. Without the header it is the client's address, or its network of IPv6;
 * of a long value the end is kept.
 */
function bucketOf({ client, block }: Exchange, { by }: Rate): string {
  const value = by && fieldOf(block.fields, by);
  if (value) return `=${value.length > 100 ? `${hash(value)} ${value.slice(-80)}` : value}`;
  return clientNetwork(client);
}

/** Counts one more of a client; returns how many there were before. */
function countIn(counts: Map<string, number>, client: string): number {
  const there = counts.get(client) ?? 0;
  counts.set(client, there + 1);
  return there;
}
function countOut(counts: Map<string, number>, client: string): void {
  const left = counts.get(client)! - 1;
  if (left) counts.set(client, left);
  else counts.delete(client);
}

/** Counts a connection for as long as it is open, or says what it is refused for. Trusted proxies bring many clients. */
function admitConnection(balancer: Balancer, socket: Socket, isLocal = false): FailureName | undefined {
  const { table: { config: { limits }, trusts }, connected } = balancer;
  if (socket.remoteAddress === undefined && !isLocal) return undefined; // it is gone already
  const peer = unmapped(socket.remoteAddress), client = clientNetwork(peer);
  if (balancer.connections >= limits.connections) return "busy";
  if ((connected.get(client) ?? 0) >= limits.client_connections && !trusts(peer)) return "client-busy";
  balancer.connections++;
  countIn(connected, client);
  socket.on("close", () => {
    balancer.connections--;
    countOut(connected, client);
  });
  return undefined;
}

/**
 * Whether a client may ask once more: its bucket holds `burst` tokens, gets `requests` new ones `per` time, and each
 * request takes one. The answer says how many are left and the seconds until there is one more (the IETF's RateLimit
 * fields, draft-ietf-httpapi-ratelimit-headers-10).
 */
function withinRate(buckets: Buckets, exchange: Exchange): boolean {
  const { rate, recent, turnedAt } = buckets, { requests, per, burst } = rate;
  const now = exchange.started, each = per / requests, bucket = bucketOf(exchange, rate);
  if (now - turnedAt >= burst * each || recent.size >= MOST_BUCKETS / 2) { // buckets not drawn from since are full
    Object.assign(buckets, { recent: new Map(), older: recent, turnedAt: now });
  }
  const fullAt = Math.max(now, buckets.recent.get(bucket) ?? buckets.older.get(bucket) ?? 0);
  const before = (fullAt - now) / each; // tokens that are missing
  const within = before <= burst - 1 + 1e-6;
  const missing = within ? before + 1 : before;
  if (within) buckets.recent.set(bucket, now + missing * each);
  const left = Math.max(0, Math.floor(burst - missing + 1e-6));
  const seconds = Math.max(1, Math.ceil((missing - (burst - left - 1)) * each / 1_000 - 1e-6));
  exchange.rateFields = [
    "ratelimit-policy",
    `"default";q=${requests}${per % 1_000 ? "" : `;w=${per / 1_000}`}`,
    "ratelimit",
    `"default";r=${left};t=${seconds}`,
    ...(within ? [] : ["retry-after", `${seconds}`]),
  ];
  return within;
}

/** Gives room that has become free to the requests that wait, oldest first. */
function wakeQueue({ waiting }: Service): void {
  for (const proceed of waiting) if (!proceed()) return;
}

/** The same for all services, after a change that may have made room anywhere. */
function wakeQueues({ services }: Table): void {
  for (const service of services.values()) if (service.waiting.size > 0) wakeQueue(service);
}

/**
 * Waits until `pick` finds a server with room, first come, first served; or for a reason to wait no longer. Where
 * another request ends the wait, it only takes the server; all else is done by this request, as the edge demands.
 */
async function waitInQueue(exchange: Exchange, pick: () => Server | undefined): Promise<Server | FailureName> {
  const { service } = exchange.destination!, { waiting, config: { queue } } = service;
  if (waiting.size >= queue.size) return "queue-full";
  if (exchange.request.gone) return "client-left";
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
    } catch (error) { // of a strategy; it fails this request only
      waiting.delete(proceed);
      reject(error);
      return true;
    }
  };
  const over = new AbortController();
  waiting.add(proceed);
  exchange.onLeave = () => leave("client-left");
  const { effects } = exchange.balancer, left = deadlineOf(exchange) - effects.now(), isShort = left < queue.timeout;
  effects.sleep(isShort ? Math.max(1, left) : queue.timeout, over.signal).then(() => {
    wakeQueue(service); // an ejection may have ended unnoticed
    leave(isShort ? "deadline" : "queue-timeout");
  });
  try {
    return await promise;
  } finally {
    over.abort();
    exchange.onLeave = undefined;
  }
}

// --- 6.2 Retries: whether a request may be tried again, at which servers, within which budget ---

const BACK_OFF = 25; // milliseconds before the second retry at most; doubled for each further one, up to a second
const LEAST_RETRIES = 3; // a second, that the budget always allows
const MOST_SAVED = 100; // retries that can be saved up

/**
 * What `retry_on` calls a failure. All others are never tried again: what the client did, a deadline that has passed, and a
 * response that broke off behind its head, which the client has got already.
 */
const RETRIED_AS: Partial<Record<Failure, string | number>> = {
  "connect": "connect",
  "connect-timeout": "connect",
  "reset": "reset",
  "invalid-answer": 502,
  "timeout": 504,
};

/**
 * The servers for a retry: untried healthy ones, then untried backups; without a fallback also any untried ones, and once
 * all have been tried any. A retry never goes to a server on trial while others are healthy, nor to one that sent
 * Retry-After.
 */
function serversForRetry(
  service: Service,
  candidates: readonly Server[],
  tried: Server[],
  now: number,
): readonly Server[] {
  const notPaused = candidates.filter((server) => now >= server.pausedUntil);
  const untried = notPaused.filter((server) => !tried.includes(server));
  const healthy = untried.filter((server) => server.up && server.ejectedUntil === 0);
  if (healthy.length) return healthy;
  const backups = service.servers.filter((server) => server.backup && isEnabled(server) && !tried.includes(server));
  const ready = withRoom(service, backups).filter((server) => isHealthy(server, now) && now >= server.pausedUntil);
  if (ready.length || service.config.fallback) return ready;
  return untried.length ? untried : notPaused;
}

/**
 * Whether another attempt may be made: the policy names what happened; repeating it does no harm, because no server has
 * seen the request or it is idempotent and its body is at hand; a server is left that did not send Retry-After; and the
 * budget has room. A connection that was never established put no load on a server, and so costs no budget.
 */
function mayRetry(attempt: ExchangeAttempt): boolean {
  const { exchange, response, failure, retry } = attempt,
    { policy, retryOn, service, fallback } = exchange.destination!;
  if (retry >= policy.retries) return false;
  const isUnavailable = isGrpc(exchange.request) &&
    fieldOf(response?.fields ?? NO_FIELDS, "grpc-status") === GRPC_UNAVAILABLE;
  const cause = isUnavailable ? "unavailable" : response?.status ?? RETRIED_AS[failure!];
  if (cause === undefined || !retryOn.has(cause)) return false;
  if (exchange.request.gone) return false;
  const sent = response !== undefined || attempt.sent;
  const isHarmless = isUnavailable ? exchange.body.bytes !== undefined : mayRepeat(exchange);
  if (sent && !isHarmless) return false;
  const now = exchange.balancer.effects.now(), { candidates } = service;
  if (!fallback && candidates.length > 0 && serversForRetry(service, candidates, exchange.tried, now).length === 0) {
    return false;
  }
  if (!sent) return true;
  if (retry === 0) earnRetry(exchange, service);
  return spendRetry(service, policy.retries, now);
}

/**
 * Adds a request's share to the retry budget, once: when it is answered, or when it needs a retry itself. The saved shares
 * pay for the many retries at once when a server with many requests fails.
 */
function earnRetry(exchange: Exchange, service: Service): void {
  if (exchange.hasEarnedRetry) return;
  exchange.hasEarnedRetry = true;
  service.saved = Math.min(MOST_SAVED, service.saved + service.config.retry_budget);
}

/**
 * Takes one retry out of the budget; false if none is left. The first few in each second are lent, and the debt is dropped
 * after that second: a service with few requests could otherwise never retry.
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

/** Waits before the second retry and those after it. */
const backOff = (retry: number, { random, sleep }: Effects): Promise<void> =>
  sleep(random() * Math.min(1_000, BACK_OFF * 2 ** (retry - 1)));

// --- 6.3 Hedging: whether a second server is asked, and after how long ---

const SAMPLES = 500; // answers that a quantile comes from
const LEARNED = 100; // answers after which it can be relied on

/** Works out anew, every 50 answers, how long most of the latest took. */
function learnHedgeDelay(service: Service, milliseconds: number): void {
  const { times, hedge } = service;
  times[service.measured++ % SAMPLES] = milliseconds;
  if (service.measured % 50 !== 0) return;
  const sorted = times.slice(0, service.measured).sort();
  service.hedgeDelay = sorted[Math.floor(hedge * sorted.length)]!;
}

const SAFE = new Set(["GET", "HEAD", "OPTIONS"]);

/** Whether a second server may be asked while the first is still busy: a safe request may be sent twice. */
const mayHedge = ({ method, body, upgrade }: Exchange, { hedge, measured }: Service): boolean =>
  hedge > 0 && measured >= LEARNED && body.length === 0 && SAFE.has(method) && !upgrade;

// -----------------------------------------------------------------------------------------------------------
// 7. Observability
// What is logged and counted, under the names of OpenTelemetry and Traefik. Requests never wait for the log, and
// counters add up over workers.
// -----------------------------------------------------------------------------------------------------------

// --- 7.1 Traces: W3C Trace Context ---

/** 16 digits, other ones each time: a counter, mixed (0.1 us; crypto's take 0.2 to 2). They need to keep no secret. */
function newId(balancer: Balancer): string {
  const id = mix(balancer.seed + ++balancer.ids | 0);
  return digits(mix(id ^ balancer.seed)) + digits(id);
}

/** W3C Trace Context: version, trace id, parent id and flags. Only versions after 00 may have more behind them. */
const TRACEPARENT =
  /^(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})(?:$|(?<!^00.{53})-)/;

/** Continues the client's trace, or begins one. As in other proxies any client may send one; an invalid one is replaced. */
function startTrace(exchange: Exchange): void {
  const { balancer, block: { fields } } = exchange;
  const asked = fieldOf(fields, "traceparent"), sent = asked && TRACEPARENT.exec(asked);
  exchange.span = newId(balancer);
  exchange.trace = sent ? sent[1]! : balancer.origin + exchange.span;
  exchange.traceFlags = exchange.logged ? "01" : "00";
  if (!sent) return;
  exchange.traceFlags = HEX[parseInt(sent[2]!, 16) & 3]!; // what we know: sampled, random
  exchange.traceState = fieldOf(fields, "tracestate") ?? "";
}

/** Gives an attempt a span of its own, in the trace of its request. */
function nextSpan(exchange: Exchange): void {
  if (exchange.trace) exchange.span = newId(exchange.balancer);
  else startTrace(exchange);
}

// --- 7.2 Access log: one line a request, made and printed together with others ---

const isoSecond = onceASecond((date) => date.toISOString().slice(0, 19));
const isoTime = (date: Date): string => `${isoSecond(date)}.${String(1_000 + date.getUTCMilliseconds()).slice(1)}Z`;

const thousandths = (value: number): number => Math.round(value * 1_000) / 1_000;

/** The record of a request that has ended. */
function accessRecord(exchange: Exchange, endedAt: number): AccessRecord {
  if (!exchange.trace) startTrace(exchange);
  const { origin, status, path, tried, attempt, started } = exchange,
    { block: { fields }, version, target } = exchange.request;
  const since = (time = 0) => time > 0 && time >= started ? thousandths(Math.min(time, endedAt) - started) : undefined;
  const grpc = isGrpc(exchange.request) && attempt ? grpcStatus(attempt) : undefined;
  return {
    "timestamp": isoTime(exchange.balancer.effects.date()),
    "client.address": exchange.client,
    "http.request.method": exchange.method || "-",
    "network.protocol.version": version,
    "url.scheme": origin.scheme,
    "server.address": hostName(origin.host || exchange.host) || undefined,
    "url.original": path ? undefined : target || "-",
    "url.path": path || undefined,
    "url.query": exchange.query.slice(1) || undefined,
    "http.response.status_code": status,
    "rpc.grpc.status_code": grpc === undefined ? undefined : Number(grpc),
    "http.request.body.size": attempt ? receivedBy(attempt) : 0,
    "http.response.body.size": exchange.bytes,
    "http.request.header.referer": fieldOf(fields, "referer"),
    "user_agent.original": fieldOf(fields, "user-agent"),
    "error.type": exchange.problem || (status < 500 ? undefined : `${status}`),
    "trace_id": exchange.trace,
    "span_id": attempt?.span,
    "lb.request_id": exchange.id,
    "lb.route": exchange.route?.name,
    "lb.service": exchange.destination?.service.name,
    "lb.server": tried.at(-1)?.name,
    "lb.attempts": tried.length,
    "lb.connected_ms": since(attempt?.connectedAt),
    "lb.head_ms": since(attempt?.headAt),
    "lb.ended_ms": since(endedAt) ?? 0,
  };
}

// The characters that are escaped. A text in quotes cannot begin another line or end the quotes; a word has no blanks.
const UNSAFE_IN_QUOTES = /[^ !#-[\]-~]/;
const UNSAFE_IN_WORD = /[^!#-[\]-~]/;

/** Escapes as Apache does: `\x0a`. */
const escaped = (text: string, unsafe: RegExp): string =>
  unsafe.test(text) // a replacement of nothing costs four times as much
    ? text.replace(new RegExp(unsafe, "g"), (c) => `\\x${c.charCodeAt(0).toString(16).padStart(2, "0")}`)
    : text;
const inQuotes = (text = "-"): string => `"${escaped(text, UNSAFE_IN_QUOTES)}"`;
const oneWord = (text: string | undefined): string => text ? escaped(text, UNSAFE_IN_WORD) : "-";

/** `0.250`: milliseconds with three decimals. */
const inMillis = (time: number | undefined): string => time?.toFixed(3) ?? "-";

/** `21/Nov/2026:03:14:42 +0000`, the time of Apache's logs, from an ISO time without its fraction. */
const apacheTime = memo((second) => {
  const [, day, month, year, time] = new Date(`${second}Z`).toUTCString().split(" ");
  return `${day}/${month}/${year}:${time} +0000`;
});

/** Apache's line; service, server, attempts, times, failure and ids follow it (docs/metrics.md). */
function combinedLine(r: AccessRecord): string {
  const path = r["url.path"] ?? "-", query = r["url.query"], target = query ? `${path}?${query}` : path;
  const version = r["network.protocol.version"],
    grpc = r["rpc.grpc.status_code"],
    status = r["http.response.status_code"];
  const asked = escaped(r["url.original"] ?? target, UNSAFE_IN_QUOTES);
  const request = `"${oneWord(r["http.request.method"])} ${asked} ${version ? `HTTP/${version}` : "-"}"`;
  const times = `${inMillis(r["lb.connected_ms"])}/${inMillis(r["lb.head_ms"])}/${inMillis(r["lb.ended_ms"])}`;
  const failure = r["error.type"] === `${status}` ? undefined : r["error.type"];
  return `${oneWord(r["client.address"])} - - [${apacheTime(r.timestamp.slice(0, 19))}] ${request} ${status} ` +
    `${r["http.response.body.size"]} ${inQuotes(r["http.request.header.referer"])} ` +
    `${inQuotes(r["user_agent.original"])} ${oneWord(r["lb.service"])} ${oneWord(r["lb.server"])} ` +
    `${r["lb.attempts"]} ${times} ${failure ?? (grpc ? `grpc-status-${grpc}` : "-")} ` +
    `${oneWord(r["lb.request_id"])} ${r.trace_id ?? "-"}`;
}

/** One line of the access log, without its end. Undefined values are left out of JSON. */
export const accessLine = (record: AccessRecord, format: LineFormat): string =>
  format === "json" ? asciiJson(record) : combinedLine(record);

const MOST_WAITING = 1 << 26; // bytes of lines that wait for a slow reader
const FLUSH_DELAY = 20; // ms for which lines wait for others: a write of its own costs more than a line
const STALL_TIMEOUT = 2_000; // ms without taking anything after which a reader is not waited for at the end
const NO_LINES = new Uint8Array();

const countLines = (bytes: Uint8Array): number => bytes.reduce((lines, byte) => byte === 10 ? lines + 1 : lines, 0);

/**
 * Makes the lines of a thread and writes them together. Requests never wait for that: a reader that stalls, or a disk that
 * is full, costs only lines, which are counted.
 */
class AccessLog {
  private readonly print: (bytes: Uint8Array) => Promise<number>;
  private readonly report: Effects["report"];
  private lines: string[] = []; // the latest, with their ends
  private chunks: Uint8Array[] = []; // older lines that wait
  private size = 0; // bytes in chunks
  private isScheduled = false; // flush runs, or will
  private left: Uint8Array = NO_LINES; // of what flush writes
  private takenAt = 0; // when the reader took something
  private isCut = false; // an error came in the middle of a line
  private lost = 0; // lines that are yet to be reported

  /** @param print writes some of the bytes, however long that lasts, and gives their number; rejects where it cannot */
  constructor(print: (bytes: Uint8Array) => Promise<number>, report: Effects["report"]) {
    [this.print, this.report] = [print, report];
  }

  readonly write: Effects["accessLog"] = (record, format) => {
    if (this.size > MOST_WAITING) return this.lose(1);
    if (this.lines.push(`${accessLine(record, format)}\n`) === 100) this.encodeLines();
    this.schedule();
  };

  /** Adds lines of another thread. */
  append(lines: Uint8Array): void {
    if (this.size > MOST_WAITING) return this.lose(countLines(lines));
    this.size += lines.length;
    this.chunks.push(lines);
    this.schedule();
  }

  /** Takes the lines that wait, for a caller that writes them at the end. */
  rest(): Uint8Array {
    return this.left.length ? NO_LINES : this.take(); // nothing may come between the halves of a line
  }

  /** Waits for the reader, at most for some milliseconds, and reports how many lines it has not taken. */
  async end(patience: number): Promise<void> {
    this.takenAt = performance.now();
    const until = this.takenAt + patience;
    while (this.isScheduled && performance.now() < Math.min(until, this.takenAt + STALL_TIMEOUT)) {
      await new Promise((resolve) => setTimeout(resolve, FLUSH_DELAY));
    }
    this.lost += countLines(this.left) + countLines(this.take());
    this.reportLost();
  }

  private encodeLines(): void {
    const { lines } = this;
    this.lines = [];
    this.append(ENCODER.encode(lines.join("")));
  }

  private take(): Uint8Array {
    if (this.lines.length) this.encodeLines();
    const all = Buffer.concat(this.chunks);
    [this.chunks, this.size] = [[], 0];
    return all;
  }

  private schedule(): void {
    if (!this.isScheduled) setTimeout(() => this.flush(), FLUSH_DELAY);
    this.isScheduled = true;
  }

  private async flush(): Promise<void> {
    let last: number | undefined = 10; // the byte that was written last
    try {
      this.left = this.take();
      if (this.isCut) await this.print(ENCODER.encode("\n")); // ends the line that an error has cut
      this.isCut = false;
      while (this.left.length) {
        const written = await this.print(this.left);
        if (written) last = this.left[written - 1];
        this.left = this.left.subarray(written);
        this.takenAt = performance.now();
      }
      if (this.size <= MOST_WAITING) this.reportLost(); // no more are
    } catch (error) {
      this.lose(countLines(this.left), `the access log cannot be written (${(error as Error).message})`);
      this.isCut ||= last !== 10;
      this.left = NO_LINES;
    }
    this.isScheduled = false;
    if (this.size + this.lines.length) this.schedule();
  }

  private lose(lines: number, why = "nobody reads the access log"): void {
    if (!this.lost) this.report("warn", `${why}: its lines are lost`);
    this.lost += lines;
  }

  private reportLost(): void {
    if (this.lost) this.report("warn", `lines of the access log that are lost: ${this.lost}`);
    this.lost = 0;
  }
}

// --- 7.3 Metrics: counters, and their text for Prometheus ---

/** Counts what a request or a connection has failed for. */
const countFailure = ({ failures }: Balancer, reason: string): unknown =>
  getOrMake(failures, reason, newOccurrences).times++;

const METHODS = [..."EXTENSION_METHOD GET HEAD POST PUT PATCH DELETE OPTIONS TRACE CONNECT".split(" "), ""];

/** All counters as one: what a service or an entrypoint has had. */
function totalOf(tallies: Tallies): Counters {
  const total = new Counters();
  for (const { durations, ...counters } of tallies.values()) {
    for (const [key, value] of Object.entries(counters)) total[key as keyof typeof counters] += value;
    durations.forEach((value, bucket) => total.durations[bucket]! += value);
  }
  return total;
}

/** The milliseconds that a share of the requests took at most (0.95: p95), as exact as the classes are; 0: none yet. */
export function quantile({ requests, durations }: Pick<Counters, "requests" | "durations">, share: number): number {
  let rank = share * requests;
  for (const [bucket, held] of durations.entries()) {
    const [from, to] = [BUCKETS[bucket - 1] ?? 0, BUCKETS[bucket] ?? BUCKETS.at(-1)!];
    if (held > 0 && held >= rank) return from + (to - from) * rank / held;
    rank -= held;
  }
  return 0;
}

/** A number of a record: what Prometheus calls it, and what workers send of it. */
interface Metric<T> {
  name: string; // of its series, with fixed labels; empty: Prometheus does not get it
  help: string; // of its family; empty: the family stands above
  /** Over workers all are summed, but for the maximum. Gauges and maxima of a worker end with it. */
  type: "counter" | "gauge" | "maximum" | "histogram" | "summary";
  read(record: T, now: number): number;
  write?(record: T, value: number, now: number): void; // what all workers have together; without it they send nothing
}

type NumberKey<T> = { [K in keyof T]: T[K] extends number ? K : never }[keyof T];
/** Where a number stands: in a field, or where it is read, and written if workers send it. */
type NumberAt<T> = NumberKey<T> | Pick<Metric<T>, "read" | "write"> | Metric<T>["read"];
const metric = (type: Metric<unknown>["type"]) => <T>(name: string, help: string, place: NumberAt<T>): Metric<T> => {
  if (typeof place === "function") return { type, name, help, read: place };
  if (typeof place === "object") return { type, name, help, ...place };
  const write = (record: T, value: number) => void Object.assign(record as object, { [place]: value });
  return { type, name, help, read: (record) => Number(record[place]), write };
};
const counter = metric("counter"), gauge = metric("gauge"), maximum = metric("maximum");
const histogram = metric("histogram"), summary = metric("summary");

const copiesAt = (key: keyof Service["copies"]): NumberAt<Service> => ({
  read: (service) => service.copies[key],
  write: (service, value) => void (service.copies[key] = value),
});
/** How many requests lasted as long as a bound or less. */
const requestsUpTo = (bound: number): NumberAt<Counters> => ({
  read: ({ durations }) => durations.reduce((sum, held, at) => at > bound ? sum : sum + held),
  write({ durations }, value) { // behind those of lower bounds
    durations[bound] = 0;
    durations[bound] = value - durations.reduce((sum, held, at) => at > bound ? sum : sum + held);
  },
});
const inSeconds: NumberAt<Counters> = {
  read: ({ milliseconds }) => milliseconds / 1_000,
  write: (counters, seconds) => void (counters.milliseconds = seconds * 1_000),
};
const BOUNDS = [...BUCKETS.map((milliseconds) => `${milliseconds / 1_000}`), "+Inf"];

const requestMetrics = (level: "entrypoint" | "service"): Metric<Counters>[] => [
  counter(`lb_${level}_requests_total`, "Requests that have ended", "requests"),
  ...BOUNDS.map((bound, i) =>
    histogram(
      `lb_${level}_request_duration_seconds_bucket{le="${bound}"}`,
      "Time to the end of the answer, with all attempts",
      requestsUpTo(i),
    )
  ),
  histogram(`lb_${level}_request_duration_seconds_sum`, "", inSeconds),
  histogram(`lb_${level}_request_duration_seconds_count`, "", ({ requests }: Counters) => requests),
  counter(`lb_${level}_requests_bytes_total`, "Bytes of the requests' bodies", "bytesIn"),
  counter(`lb_${level}_responses_bytes_total`, "Bytes of the answers' bodies", "bytesOut"),
  counter("", "", "errors"),
];

/** The records with numbers, by kind. */
interface Counted {
  balancer: Balancer;
  build: Balancer;
  fleet: Membership;
  resyncs: Occurrences;
  failure: Occurrences;
  entrypoint: Entrypoint;
  entrypointRequests: Counters;
  service: Service;
  serviceRequests: Counters;
  grpc: Occurrences;
  name: Discovery;
  server: Server;
  serverRequests: Counters;
  strategy: Server;
}
type Kind = keyof Counted;

/** Names and labels are Traefik's where it has them. No value of a label is a client's own, so that none can add series. */
const METRICS: { [K in Kind]: Metric<Counted[K]>[] } = {
  balancer: [
    counter("", "", "requests"),
    gauge("", "", "inFlight"),
    counter("lb_config_reloads_total", "Reloads that put a config in force", (b) => b.reloads),
    gauge("lb_config_last_reload_success", "0: it failed, and the old config is in force", (b) => +!b.reloadFailed),
    gauge(
      "lb_config_last_reload_success_timestamp_seconds",
      "When the config came in force",
      (b) => +b.reloadedAt / 1_000,
    ),
    gauge("process_start_time_seconds", "When it was started", (b) => +b.startedAt / 1_000),
  ],
  build: [gauge("lb_build_info", "Always 1; the labels say what runs", () => 1)],
  fleet: [
    gauge("lb_fleet_up", "1: the fleet's engine answers", (f) => Number(f.view().engine === "answers")),
    gauge("lb_fleet_instances", "Live instances", (f) => f.view().instances.length),
    gauge("lb_fleet_config_revision", "Revision of the document in force", (f) => f.view().config),
    counter("lb_fleet_config_refused_total", "Documents that could not be used here", (f) => f.counted().refused),
    gauge("lb_fleet_seconds_since_contact", "Since the engine has answered", (f) => f.counted().contact),
  ],
  resyncs: [counter("lb_fleet_resyncs_total", "Listings, by what ended the watch before", (n) => n.times)],
  failure: [counter("lb_failures_total", "Requests that failed, by what x-lb-failure says", "times")],
  entrypoint: [
    gauge("lb_open_connections", "Requests in flight (connections that wait for the next are not seen)", "inFlight"),
  ],
  entrypointRequests: requestMetrics("entrypoint"),
  service: [
    counter("", "", "turn"),
    counter("", "", "hedges"),
    gauge("", "", "retrying"),
    counter("lb_service_retries_total", "Further attempts after the first", "retries"),
    counter('lb_service_hedges_total{answered="second"}', "Second attempts beside a slow first", "hedgesWon"),
    counter('lb_service_hedges_total{answered="first"}', "", (s) => s.hedges - s.hedgesWon),
    gauge("lb_service_requests_in_flight", "Requests in flight", "inFlight"),
    gauge("lb_service_queue_length", "Requests that wait for a server with room", {
      read: (s) => s.waiting.size,
      write: (s, size) => void (s.waiting = new Set(Array.from({ length: size }, () => () => false))),
    }),
    counter('lb_service_copies_total{result="answered"}', "Copies that mirror has asked for", copiesAt("answered")),
    counter('lb_service_copies_total{result="failed"}', "", copiesAt("failed")),
    counter('lb_service_copies_total{result="skipped"}', "", copiesAt("skipped")),
    gauge("lb_service_copies_in_flight", "Copies in flight", copiesAt("inFlight")),
    maximum("lb_service_panicking", "1: too few servers are healthy, so that all are asked", {
      read: (s) => Number(s.panicking),
      write: (s, value) => void (s.panicking = value > 0),
    }),
  ],
  serviceRequests: requestMetrics("service"),
  name: [
    gauge(
      "lb_discovery_up",
      "1: the latest answer for the name was good; 0: the servers of before stay",
      (d) => +!d.problem,
    ),
    gauge("lb_discovery_servers", "Servers that the name has", (d) => d.found.length),
  ],
  grpc: [counter("lb_service_grpc_responses_total", "Calls of gRPC that have ended, by status", "times")],
  server: [
    counter("", "", "picks"),
    counter("", "", "answers"),
    gauge("", "", "limit"),
    maximum("", "", "failures"),
    maximum("", "", "failing"),
    counter("", "", { // behind `answers`
      read: (s) => s.latency * s.answers,
      write: (s, spent) => void (s.latency = spent / (s.answers || 1)),
    }),
    maximum("", "", { // for how long it is ejected: the clocks of threads differ
      read: (s, now) => Math.max(0, s.ejectedUntil - now),
      write(s, left, now) {
        const until = left && now + left;
        if (!until !== !s.ejectedUntil) s.since = now;
        s.ejectedUntil = until;
      },
    }),
    gauge(
      "lb_service_server_up",
      "1: it is healthy; 0: it is down, ejected or taken out by hand",
      (s, now) => Number(s.state === "ready" && isHealthy(s, now)),
    ),
    counter("lb_server_retries_total", "Attempts that came here because another had failed", "retries"),
    gauge("lb_server_requests_in_flight", "Attempts in flight", "inFlight"),
    counter("lb_server_ejections_total", "Ejections for failures, or for falling behind the others", "ejected"),
    counter('lb_server_probes_total{result="passed"}', "Probes by their result", (s) => s.probesPassed),
    counter('lb_server_probes_total{result="failed"}', "", (s) => s.probesFailed),
  ],
  serverRequests: [
    counter("lb_server_requests_total", "Attempts that have ended", "requests"),
    summary("lb_server_request_duration_seconds_sum", "Time of attempts to their end", inSeconds),
    summary("lb_server_request_duration_seconds_count", "", (c) => c.requests),
    counter("lb_server_errors_total", "Attempts with a 5xx, or a failure that is not the client's", "errors"),
    counter("", "", "bytesIn"),
    counter("", "", "bytesOut"),
    ...BOUNDS.map((_, i) => counter("", "", requestsUpTo(i))),
  ],
  strategy: [counter("lb_server_picks_total", "How often a strategy took the server", (s) => s.picks)],
};

type Labels = Record<string, string | number>;
type Visit = <K extends Kind>(kind: K, labels: Labels, record: Counted[K]) => void;

/** Visits every record that has numbers. What has left the config is not there. */
function visitCounted(balancer: Balancer, visit: Visit): void {
  const { table, entrypoints, failures, runtime } = balancer;
  const visitTallies = (kind: "entrypointRequests" | "serviceRequests", labels: Labels, tallies: Tallies) => {
    for (const [key, counters] of tallies) {
      const code = Math.floor(key / 16), method = METHODS[key % 16]!;
      const overHttp = code === 101 ? "websocket" : "http", protocol = method === "" ? "tcp" : overHttp;
      visit(kind, { ...labels, code, method, protocol }, counters);
    }
  };
  visit("balancer", {}, balancer);
  visit("build", { version: VERSION, runtime }, balancer);
  const { fleet } = balancer.effects;
  if (fleet) visit("fleet", {}, fleet);
  for (const [reason, times] of fleet?.counted().resyncs ?? []) visit("resyncs", { reason }, { times });
  for (const [reason, failure] of failures) visit("failure", { reason }, failure);
  for (const entrypoint of entrypoints.values()) {
    const labels = { entrypoint: entrypoint.name };
    visit("entrypoint", labels, entrypoint);
    visitTallies("entrypointRequests", labels, entrypoint.tallies);
  }
  for (const discovery of table.names.values()) visit("name", { name: discovery.name }, discovery);
  for (const service of table.services.values()) {
    const { name, tallies, grpc, servers, config: { strategy } } = service;
    visit("service", { service: name }, service);
    visitTallies("serviceRequests", { service: name }, tallies);
    for (const [grpc_status, calls] of grpc) visit("grpc", { service: name, grpc_status }, calls);
    for (const server of servers) {
      const labels = { service: name, url: server.url };
      visit("server", labels, server);
      visit("serverRequests", labels, server.counters);
      visit("strategy", { ...labels, strategy: strategy.name }, server);
    }
  }
}

/** `label="value",label="value"`, as Prometheus writes it. */
const labelsText = (labels: Labels): string =>
  Object.entries(labels).map(([label, value]) =>
    `${label}="${String(value).replace(/[\\"]/g, "\\$&").replaceAll("\n", "\\n")}"`
  ).join();

/** All numbers of Prometheus, by the text of their series. */
export function samplesOf(balancer: Balancer): Map<string, number> {
  const samples = new Map<string, number>(), now = balancer.effects.now();
  visitCounted(balancer, (kind, of, record) => {
    const labels = labelsText(of);
    for (const { name, read } of METRICS[kind]) {
      const plain = labels ? `${name}{${labels}}` : name;
      const series = name.endsWith("}") ? name.replace("{", `{${labels},`) : plain;
      if (name) samples.set(series, read(record, now));
    }
  });
  return samples;
}

const familyNamed = memo((name) => name.replace(/_(?:bucket|sum|count)$/, ""));
const familyOf = (series: string): string => familyNamed(series.split("{", 1)[0]!);
/** What is said of each family: the type and help of its first series. */
const FAMILIES = new Map(
  Object.values(METRICS).flat().reverse().map(({ name, type, help }) => [familyOf(name), { type, help }]),
);

/** The text that Prometheus reads (exposition format 0.0.4). */
export function renderMetrics(samples: ReadonlyMap<string, number>): string {
  return Array.from(Map.groupBy(samples, ([series]) => familyOf(series)), ([name, group]) => {
    const { type, help } = FAMILIES.get(name)!;
    const lines = group.map(([series, value]) => `${series} ${value}\n`);
    return `# HELP ${name} ${help}\n# TYPE ${name} ${type === "maximum" ? "gauge" : type}\n${lines.join("")}`;
  }).join("");
}

const METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8";

// -----------------------------------------------------------------------------------------------------------
// 8. Request path
// From the head of a request to the last byte of its response. The functions of 8.5 are the steps, in order:
// validate, match, pick, forward, account, (retry, minus those tried), respond.
// Every pick is released exactly once, when its attempt ends.
// -----------------------------------------------------------------------------------------------------------

// --- 8.1 Local replies: redirects, fixed responses, OPTIONS ---

/** Where a redirect leads: taken literally, or the request's own address with some parts replaced. */
function redirectReply(exchange: Exchange, action: Extract<Action, { kind: "redirect" }>): HttpResponse {
  const { to, scheme, host, port, path, status } = action, { origin } = exchange;
  const proto = scheme || origin.scheme, asked = origin.host || exchange.host;
  const own = /:\d+$/.exec(asked)?.[0] ?? (origin.port && `:${origin.port}`); // it goes with its host and scheme
  const kept = scheme || host ? "" : own, shown = port ? `:${port}` : kept;
  const usual = proto === "https" ? ":443" : ":80";
  const authority = (host || hostName(asked)) + (shown === usual ? "" : shown);
  const location = to || `${proto}://${authority}${path || exchange.path}${exchange.query}`;
  return textReply(status, "", ["location", location]);
}

/** The response that a route's `respond` holds. */
function respondLiterally(route: Route, { status, body, headers }: Extract<Action, { kind: "respond" }>): HttpResponse {
  const own = headers.has("content-type") || !body ? [] : ["content-type", "text/plain; charset=utf-8"];
  const fields = applyRules([...own, ...[...headers].flat()], route.response.headers);
  if (!BODILESS.has(status)) return textReply(status, body, fields);
  return { status, reason: "", fields, body: NO_BODY };
}

/** A failure as a client of gRPC reads it: its own status in a response that is nothing but a head. */
function grpcReply(kind: FailureName): HttpResponse {
  const fields = ["content-type", "application/grpc", ...grpcFields(kind), "x-lb-failure", kind];
  return { status: 200, reason: "", fields, body: NO_BODY };
}

const ANY_METHOD = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"; // of Allow

// --- 8.2 Proxy headers: what passes to a server and back ---

/**
 * What is done with a request's field. `trusted`: it passes from trusted peers; `drop`: it ends here, or is set anew. The
 * fields that Connection names are gone already (see `parseFields`).
 */
type FieldAction = "pass" | "drop" | "trusted" | "via";
const DROPPED = new Set(
  `connection content-length expect host http2-settings keep-alive proxy proxy-authorization proxy-connection te
  traceparent tracestate transfer-encoding upgrade`.split(/\s+/),
);
const FORWARDED = /^(?:forwarded$|x-forwarded|x-real-ip$|x-request-id$)/;

/** Drops look-alikes of special names (`X_Forwarded_For`, `Content.Length`, `A--B`): some servers fold them. */
const fieldAction = memo((spelled): FieldAction => {
  const name = spelled.toLowerCase(), folded = name.replaceAll(/[_.-]+/g, "-");
  if (name === "via") return "via";
  if (DROPPED.has(folded)) return "drop";
  if (!FORWARDED.test(folded)) return "pass";
  return name === folded ? "trusted" : "drop";
});

/**
 * The elements of a list, without empty ones (RFC 9110 section 5.6.1). A comma or semicolon in quotes separates
 * nothing, unless quotes stay open: then the client has opened them to hide what the proxies have added behind.
 */
function splitBy(text = "", separator: "," | ";"): string[] {
  const isClosed = !text.includes('"') || /^(?:[^"]|"(?:[^"\\]|\\.)*")*$/.test(text);
  const pieces = isClosed && text.includes('"') ? text.match(QUOTED_PIECES[separator]) ?? [] : text.split(separator);
  return pieces.map((piece) => piece.trim()).filter(Boolean);
}
const QUOTED_PIECES = {
  ",": /(?:[^",]|"(?:[^"\\]|\\.)*")+/g,
  ";": /(?:[^";]|"(?:[^"\\]|\\.)*")+/g,
};
const FORWARDED_PARAMETER = /^([\w-]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s"]*))$/;

/** The parameters of an entry of Forwarded (RFC 7239 section 4); none where it is not valid, or says a thing twice. */
function parametersOf(entry: string): Map<string, string> {
  const parameters = new Map<string, string>();
  for (const text of splitBy(entry, ";")) {
    const [, name = "", quoted, plain = ""] = FORWARDED_PARAMETER.exec(text) ?? [];
    if (!name || parameters.has(lower(name))) return new Map();
    parameters.set(lower(name), quoted ?? plain);
  }
  return parameters;
}

/**
 * The address of a node, without its port (RFC 7239 section 6; Azure writes one) and without its zone (Go writes one for
 * clients on the same link); empty: it is unknown or hidden.
 */
function addressOf(node: string): string {
  const bare = node.replace(/(?<=:[0-9a-f]*)%[\w.-]+(?=\]|$)/i, "").replace(
    /^(?:\[([0-9a-f:.]+)\]|([\d.]+))(?::[\w.-]+)?$/i,
    "$1$2",
  );
  return isAddress(bare) ? ipaddr.process(bare).toString() : "";
}

/** The schemes that trusted peers send; some send those of WebSockets. */
const FORWARDED_SCHEMES = new Map([["http", "http"], ["https", "https"], ["ws", "http"], ["wss", "https"]]);

/**
 * The addresses from the client to a peer. `nodes` are those that proxies have added, the latest last: from there each is
 * believed as long as the one behind it is trusted. The last that is believed is the client.
 */
function chainTo(peer: string, nodes: string[], trusts: Table["trusts"]): string[] {
  const chain = [peer];
  for (const node of nodes.reverse()) {
    const address = addressOf(node);
    if (!address || !trusts(chain[0]!)) break;
    chain.unshift(address);
  }
  return chain;
}

/**
 * The client's origin, as trusted proxies report it (see `chainTo`): scheme, host and port as the trusted proxy next to the
 * client has seen them. X-Forwarded-* come before Forwarded (RFC 7239), which adds what they leave open where both name the
 * same addresses. Values that are not valid are ignored.
 */
function readOrigin(fields: Fields, known: Pick<Origin, "peer" | "peerScheme" | "trusts">): Origin {
  const { peer, peerScheme, trusts } = known;
  const listed = (name: string) => splitBy(fieldOf(fields, name), ",");
  const entries = listed("forwarded").map(parametersOf);
  const parameters = (name: string) => entries.map((entry) => entry.get(name) ?? "");
  const ofXForwarded = chainTo(peer, listed("x-forwarded-for"), trusts);
  const ofForwarded = chainTo(peer, parameters("for"), trusts);
  const chain = ofXForwarded.length > 1 ? ofXForwarded : ofForwarded, agrees = chain.join() === ofForwarded.join();
  const forwarded = (name: string) =>
    [listed(`x-forwarded-${name}`), agrees ? parameters(name) : []].flatMap((list) =>
      list.slice(-Math.max(1, chain.length - 1)) // as many as there are proxies
    );
  const scheme = forwarded("proto").map((text) => FORWARDED_SCHEMES.get(lower(text))).find(Boolean) ?? peerScheme;
  const wrong = scheme === "https" ? "80" : "443"; // as a proxy behind the one that ends TLS says it
  const isPort = (text: string) => /^[1-9]\d{0,4}$/.test(text) && Number(text) <= 65_535 && text !== wrong;
  return {
    ...{ ...known, client: chain[0]!, scheme, chain, isForwarded: true },
    host: forwarded("host").find((host) => hostIsValid(host)) ?? "",
    port: forwarded("port").find(isPort) ?? "",
  };
}

/** The client's origin, read once for each head that comes again from the same peer, which saves up to 15 us. */
function originOf({ peer, scheme: peerScheme, block }: HttpRequest, trusts: Table["trusts"]): Origin {
  const { origin } = block;
  if (origin?.peer === peer && origin.peerScheme === peerScheme && origin.trusts === trusts) return origin;
  const known = { peer, peerScheme, trusts };
  if (trusts(peer)) return block.origin = readOrigin(block.fields, known);
  const direct = { client: peer, scheme: peerScheme, host: "", port: "", chain: [peer], isForwarded: false };
  return block.origin = { ...known, ...direct };
}

/** The fields of a request that pass to servers, worked out once for each head. */
function passingFields(block: FieldBlock): PassingFields {
  if (block.passing) return block.passing;
  const { fields } = block, passing: string[] = [];
  let via = "";
  for (let i = 0; i < fields.length; i += 2) {
    const action = fieldAction(fields[i]!);
    if (action === "pass") passing.push(fields[i]!, fields[i + 1]!);
    else if (action === "via") via = joinValues(via, fields[i + 1]!);
  }
  return block.passing = { lines: linesOf(passing), via };
}

/** Fields of trusted peers that are written anew; all others of theirs pass. */
const OURS = new Set(
  ["for", "host", "proto", "port"].map((name) => `x-forwarded-${name}`).concat("forwarded", "x-request-id"),
);
/** An address as Forwarded writes it (RFC 7239 section 6). */
const forwardedNode = (address: string): string => address.includes(":") ? `"[${address}]"` : address;

/** The header lines in which a client's requests with one head do not differ. The latest are kept, which saves 1 us. */
function commonLines(exchange: Exchange, host: string): string {
  const { balancer: { via }, block, host: named, origin, request: { version } } = exchange,
    { scheme, port, chain } = origin;
  const passing = passingFields(block), { latest } = passing;
  const isSame = latest?.origin === origin && latest.named === named && latest.host === host && latest.via === via;
  if (isSame) return latest.text;
  const asked = origin.host || named, [node, ...proxies] = chain.map((address) => `for=${forwardedNode(address)}`);
  const forwarded = [`${node};${asked && `host="${asked}";`}proto=${scheme}`, ...proxies].join(", ");
  const passed = origin.isForwarded
    ? fieldPairs(block.fields).filter(([name]) => fieldAction(name) === "trusted").flat()
    : [];
  const text =
    `host: ${host}\r\n${passing.lines}${linesOf(without(passed, OURS))}x-forwarded-for: ${chain.join(", ")}\r\n` +
    (asked && `x-forwarded-host: ${asked}\r\n`) + `x-forwarded-proto: ${scheme}\r\n` +
    (port && `x-forwarded-port: ${port}\r\n`) +
    `forwarded: ${forwarded}\r\nvia: ${joinValues(passing.via, `${version === "2.0" ? "2" : "1.1"} ${via}`)}\r\n`;
  const flat = Buffer.from(text, "latin1").toString("latin1"); // engines join the pieces of `text` at each use, else
  passing.latest = { via, origin, named, host, text: flat };
  return text;
}

/** The fields of the request as a server gets them, after the route's rules, as they are written. */
function outboundLines(exchange: Exchange, server: Server): string {
  const { upgrade, request } = exchange, { hasRules, request: rules } = exchange.route!;
  let out = `${commonLines(exchange, hostFor(exchange, server))}x-request-id: ${exchange.id}\r\n` +
    `traceparent: 00-${exchange.trace}-${exchange.span}-${exchange.traceFlags}\r\n`;
  if (exchange.traceState) out += `tracestate: ${exchange.traceState}\r\n`;
  if (upgrade) out += `connection: Upgrade\r\nupgrade: ${upgrade}\r\n`;
  else if (request.trailers) out += "te: trailers\r\nconnection: TE\r\n";
  return hasRules ? linesOf(applyRules(fieldsOf(out), rules.headers)) : out;
}

/** A server's fields without its own CORS. */
const withoutCors = (fields: Fields): string[] =>
  fieldPairs(fields).filter(([name]) => !/^access-control-/i.test(name)).flat();

/** Replaces fields by those of our CORS; Vary is added to. */
function withCors(fields: Fields, own: Exchange["corsFields"]): Fields {
  const names = new Set(own.map(([name]) => name));
  names.delete("vary");
  return own.length ? [...without(fields, names), ...own.flat()] : fields;
}

/** A server's response after the route's rules, with our CORS, cookie and rate fields. */
function inboundResponse(exchange: Exchange, response: HttpResponse): HttpResponse {
  const { rateFields, corsFields } = exchange, { hasRules, response: rules } = exchange.route!;
  const isSticky = exchange.destination!.service.config.sticky.cookie !== "";
  const cookie = isSticky ? noteCookies(exchange, response.fields) : "";
  if (!hasRules && !cookie && !rateFields.length && !corsFields.length) return response;
  const own = [...rateFields, ...cookie ? ["set-cookie", cookie] : []];
  const given = corsFields.length ? withoutCors(response.fields) : response.fields;
  const ruled = withCors(hasRules ? applyRules(given, rules.headers) : given, corsFields);
  return { ...response, fields: [...ruled, ...own], lines: undefined };
}

const LEAST_COMPRESSED = 1_024; // bytes; what is shorter hardly gets smaller
const VARIES = /(?:^|,)[\t ]*(?:\*|accept-encoding)[\t ]*(?:,|$)/i;
const CODED = new Set(["content-length", "etag"]); // fields of a response that gzip changes

/** Whether Accept-Encoding takes gzip (RFC 9110 section 12.5.3). */
function acceptsGzip(accept: string): boolean {
  const codings = parseAccept(accept),
    qualityOf = (name: string) => codings.find(({ type }) => lower(type) === name)?.q;
  return (qualityOf("gzip") ?? qualityOf("*") ?? 0) > 0;
}

/** A response in gzip, where the service says so: text that is not encoded yet, for clients that accept it. */
function compress(exchange: Exchange, response: HttpResponse): HttpResponse {
  const { status, fields, body } = response, valueOf = (name: string) => fieldOf(fields, name) ?? "";
  if (!exchange.destination!.compress || status === 206 || BODILESS.has(status) || response.tunnel) return response;
  const isFixed = valueOf("content-encoding") !== "" || /no-transform/i.test(valueOf("cache-control"));
  const isShort = body.length >= 0 && body.length < LEAST_COMPRESSED;
  if (isFixed || isShort || !COMPRESSIBLE_CONTENT_TYPE_REGEX.test(valueOf("content-type"))) return response;
  const varied = [...fields, ...VARIES.test(valueOf("vary")) ? [] : ["vary", "Accept-Encoding"]];
  const plain = { ...response, fields: varied, lines: undefined };
  const accept = fieldOf(exchange.request.block.fields, "accept-encoding") ?? "";
  if (exchange.method === "HEAD" || !acceptsGzip(accept)) return plain;
  const etag = valueOf("etag"), weak = etag && ["etag", etag.startsWith("W/") ? etag : `W/${etag}`];
  return { ...plain, fields: [...without(varied, CODED), ...weak, "content-encoding", "gzip"], body: gzipped(body) };
}

/** The Host that a server sees: its own literal, the route's, or as `host_header` says. */
function hostFor(exchange: Exchange, server: Server): string {
  const { host_header } = exchange.destination!.policy;
  const literal = exchange.route!.rewrite.host || server.host;
  if (literal) return literal;
  if (host_header === "keep" && exchange.host) return exchange.host;
  return /^(?:keep|server)$/.test(host_header) ? server.authority : host_header;
}

// --- 8.3 Attempts: a server is picked and asked, and what becomes of that is counted once ---

const TOO_MUCH = new Set([429, 503]); // statuses whose Retry-After is obeyed
const GATEWAY_ERRORS = new Set([502, 503, 504]); // an answer that counts against its server
const BLAMELESS = new Set<string>(["client-left", "client-timeout", "bad-body", "body-too-large", "deadline"]);
const isServerError = (status: number): boolean => status >= 500 && status < 600;

/** Counts a request that has ended. */
function tally(counters: Counters, milliseconds: number, bytesIn: number, bytesOut: number, failed: boolean): void {
  counters.requests++;
  if (failed) counters.errors++;
  counters.bytesIn += bytesIn;
  counters.bytesOut += bytesOut;
  counters.milliseconds += milliseconds;
  let bucket = 0;
  while (bucket < BUCKETS.length && milliseconds > BUCKETS[bucket]!) bucket++;
  counters.durations[bucket]!++;
}

/** The counters of one status and one method, under a number: a request makes no text. Any other method is the first. */
const tallyOf = (tallies: Tallies, { status, method }: { status: number; method: string }): Counters =>
  getOrMake(tallies, status * 16 + Math.max(0, METHODS.indexOf(method)), () => new Counters());

/** The servers that a request or a connection may go to now. */
function serversFor(service: Service, { tried, now }: PickRequest): readonly Server[] {
  if (now >= service.compareAt) compare(service, now);
  const candidates = candidatesOf(service, now);
  return withRoom(service, tried.length ? serversForRetry(service, candidates, tried, now) : candidates);
}

/** Gives a server a request or a connection, until `releaseServer`. */
function takeServer(service: Service, server: Server, { tried, now }: PickRequest): Server {
  tried.push(server);
  server.picks++;
  server.inFlight++;
  if (server.ejectedUntil !== 0) beginTrial(service, server, now);
  return server;
}

/** Takes a request or a connection off a server: the request that has waited longest in the queue gets its place. */
function releaseServer(service: Service, server: Server): void {
  server.inFlight--;
  if (service.waiting.size > 0) wakeQueue(service);
}

/** A request to a server waits for its response, until `endWaiting`. */
function beginWaiting(server: Server, now: number): void {
  server.waiting++;
  server.waitingSince += now;
}

/** The head of a response has come, or none will. */
function endWaiting(server: Server, startedAt: number): void {
  server.waiting--;
  server.waitingSince = server.waiting && server.waitingSince - startedAt;
}

/** Asks the strategy of a service. */
function runStrategy(service: Service, candidates: Candidates, exchange: Exchange): Server {
  if (!exchange.tried.length) exchange.turn = service.turn++;
  exchange.key = service.key(exchange);
  return service.strategy(candidates, exchange);
}

/** The client's previous server while it is eligible; else another one, with a new cookie. */
function pickSticky(service: Service, candidates: Candidates, exchange: Exchange): Server {
  const { cookie } = service.config.sticky;
  if (service.lostCookie === cookie) return runStrategy(service, candidates, exchange);
  const before = stickyServer(service, exchange);
  const stays = before !== undefined && candidates.includes(before);
  const server = stays ? before : runStrategy(service, candidates, exchange);
  exchange.block = { fields: withoutCookie(exchange.block.fields, cookie), passing: undefined };
  exchange.cookie = server === before ? "" : cookieFor(service, server, exchange);
  return server;
}

/** Picks the server of the next attempt; undefined where none may be asked now. */
function pickServer(exchange: Exchange, now: number): Server | undefined {
  const { service } = exchange.destination!;
  exchange.now = now;
  const candidates = serversFor(service, exchange);
  if (candidates.length === 0) return undefined;
  const pick = service.config.sticky.cookie ? pickSticky : runStrategy;
  return takeServer(service, pick(service, candidates as Candidates, exchange), exchange);
}

/** Reports what is wrong with a server, once a second at most: the access log has every request. */
function reportServer(service: Service, server: Server, detail: string): void {
  const now = service.effects.now();
  if (now - server.failureReportedAt < 1_000) return;
  server.failureReportedAt = now;
  service.effects.report("warn", `${service.name}: ${server.name}: ${detail}`);
}

/** A request or a connection at a server. */
type ServerUse = Pick<ExchangeAttempt, "service" | "server" | "startedAt" | "endedAt">;

/** No response has come from a server. `problem`: what it is blamed for; undefined: that was not its fault. */
function countNoResponse(use: ServerUse, received: number, problem: string | undefined): void {
  const { service, server, startedAt, endedAt } = use, isBlamed = problem !== undefined;
  endWaiting(server, startedAt);
  tally(server.counters, endedAt - startedAt, received, 0, isBlamed);
  if (isBlamed) {
    reportServer(service, server, problem);
    onNoResponse(service, server, startedAt, endedAt);
  } else if (server.ejectedUntil !== 0 && isTrial(server, startedAt)) endTrial(service, server, "undecided");
}

/** An attempt at the server that was picked for it, and the events of its connection. */
class ServerAttempt extends ExchangeAttempt {
  constructor(exchange: Exchange, server: Server, retry: number, decide: ExchangeAttempt["decide"]) {
    super(exchange, server, retry, decide);
    nextSpan(exchange);
    this.span = exchange.span;
    this.lines = outboundLines(exchange, server);
  }

  send(): void {
    const { exchange, server } = this;
    exchange.attempt = this;
    beginWaiting(server, this.startedAt);
    exchange.balancer.effects.send(this);
  }

  override onInform(status: number, reason: string, fields: Fields): void {
    if (this.exchange.attempt === this) this.exchange.request.inform(status, reason, fields);
  }

  override onHead(response: HttpResponse): void {
    const { exchange, service, server, startedAt } = this, { effects } = exchange.balancer, { status } = response;
    const mistake = response.tunnel && isWebSocket(this.upgrade) &&
      handshakeMistake(exchange.block.fields, response.fields);
    if (mistake) {
      this.detail = mistake;
      return this.carrier?.cancel("invalid-answer");
    }
    this.headAt = effects.now();
    this.response = response;
    endWaiting(server, startedAt);
    const wait = TOO_MUCH.has(status) && fieldOf(response.fields, "retry-after");
    if (wait) onRetryAfter(service, server, wait);
    onHead(service, server, status, startedAt, this.headAt);
    if (service.hedge && !this.hasLost && status < 500) learnHedgeDelay(service, this.headAt - startedAt);
    if (response.tunnel) onAnswered(service, server); // its end may be hours away
    try {
      this.decide(this);
    } catch (error) { // of a custom strategy, say
      failInternally(exchange, error);
    }
  }

  override onEnd(failure: Failure | undefined, detail: string, sent: boolean): void {
    if (this.endedAt) return;
    const { exchange, response, afterEnd } = this;
    this.endedAt = exchange.balancer.effects.now();
    this.failure = failure;
    this.sent = sent;
    if (response) this.countResponse(response.status);
    else this.countFailure(failure ?? "reset", this.detail || detail);
    releaseServer(this.service, this.server);
    if (!response) guarded(exchange, () => this.decide(this));
    else if (exchange.attempt === this && exchange.status) finish(exchange);
    this.afterEnd = undefined;
    if (afterEnd) guarded(exchange, afterEnd);
  }

  /** There will be no response. What the client did says nothing about the server. */
  private countFailure(failure: Failure, detail: string): void {
    const { service, server, startedAt } = this;
    const isBlamed = !BLAMELESS.has(failure) && !isOutOfHandles(detail);
    this.failure = failure;
    if (this.hasLost && failure === "client-left") onAbandoned(service, server, startedAt);
    countNoResponse(this, this.sent ? receivedBy(this) : 0, isBlamed ? detail : undefined);
  }

  /** The response has ended, whole or not. */
  private countResponse(status: number): void {
    const { exchange, service, server, startedAt, failure } = this;
    const isOpen = status === 101; // its end, perhaps hours later, says nothing about the server
    const isCutOff = failure !== undefined && !BLAMELESS.has(failure) && !isOpen;
    const milliseconds = (isOpen ? this.headAt : this.endedAt) - startedAt;
    tally(server.counters, milliseconds, receivedBy(this), this.received, isCutOff || isServerError(status));
    if (isCutOff) reportServer(service, server, `its answer was cut off (${failure})`);
    if (isCutOff || GATEWAY_ERRORS.has(status)) return onFailed(service, server, startedAt);
    if (failure !== undefined || isOpen) return;
    onAnswered(service, server);
    if (exchange.tried.length === 1) earnRetry(exchange, service);
  }
}

/** Runs a step that may throw, such as a custom strategy: the error fails this request only. */
function guarded(exchange: Exchange, step: (exchange: Exchange) => void): void {
  try {
    step(exchange);
  } catch (error) {
    failInternally(exchange, error);
  }
}

function failInternally(exchange: Exchange, error: unknown): void {
  exchange.balancer.effects.report("error", stackOf(error));
  if (!exchange.status) refuse(exchange, "internal");
}

/** Counts and logs an exchange, once. */
function finish(exchange: Exchange): void {
  if (exchange.isFinished) return;
  const { balancer, entrypoint, destination, attempt, status, started } = exchange, { effects } = balancer;
  const answering = exchange.problem ? undefined : attempt, endedAt = answering?.endedAt ?? effects.now();
  const problem = exchange.problem ||= answering?.failure ?? "";
  const bytes = exchange.bytes = answering?.received ?? exchange.bytes;
  const failed = isServerError(status) || problem !== "" && !BLAMELESS.has(problem) && status < 400;
  const [milliseconds, received] = [endedAt - started, attempt ? receivedBy(attempt) : 0];
  exchange.isFinished = true;
  balancer.inFlight--;
  if (exchange.concurrencyKey) countOut(balancer.clients, exchange.concurrencyKey);
  entrypoint.inFlight--;
  tally(tallyOf(entrypoint.tallies, exchange), milliseconds, received, bytes, failed);
  if (destination) {
    destination.service.inFlight--;
    tally(tallyOf(destination.service.tallies, exchange), milliseconds, received, bytes, failed);
    const code = isGrpc(exchange.request) && answering && grpcStatus(answering), { grpc } = destination.service;
    if (code && /^(?:\d|1[0-6])$/.test(code)) getOrMake(grpc, code, newOccurrences).times++;
  }
  if (problem) countFailure(balancer, problem);
  const { format } = exchange.table.config.log;
  if (format === "off" || !exchange.logged && !problem && status < 500) return;
  try {
    effects.accessLog(accessRecord(exchange, endedAt), format);
  } catch (error) { // the request has had its answer
    effects.report("error", `the log cannot be written: ${error}`);
  }
}

/** Sends a server's response. The exchange is finished when its attempt ends. */
function sendResponse(attempt: ExchangeAttempt, response: HttpResponse): void {
  const { exchange } = attempt, { status, tunnel, body } = response;
  const { upgrade, version } = exchange.request;
  if (upgrade && version === "2.0" && !tunnel && status < 300) { // the client would read it as a switch
    body.cancel();
    return refuse(exchange, "invalid-answer");
  }
  exchange.attempt = attempt;
  exchange.status = status;
  exchange.reply(compress(exchange, inboundResponse(exchange, response)));
  if (attempt.endedAt) finish(exchange);
}

/** Sends a local reply, and finishes the exchange. `shown`: what the client gets, where that is another one. */
function respondLocally(exchange: Exchange, response: HttpResponse, shown = response): void {
  exchange.status = response.status;
  exchange.bytes = exchange.method === "HEAD" ? 0 : Math.max(0, response.body.length);
  exchange.reply({ ...shown, fields: [...withCors(shown.fields, exchange.corsFields), ...exchange.rateFields] });
  finish(exchange);
}

/** Replies with a failure. */
function refuse(exchange: Exchange, kind: FailureName): void {
  const reply = failureReply(kind, fieldOf(exchange.block.fields, "accept"), exchange.id);
  const allow = exchange.allow ? [...new Set(exchange.allow)].join(", ") : ANY_METHOD;
  exchange.problem = kind;
  if (isGrpc(exchange.request)) return respondLocally(exchange, reply, grpcReply(kind));
  respondLocally(exchange, reply.status === 405 ? { ...reply, fields: [...reply.fields, "allow", allow] } : reply);
}

// --- 8.4 Hedged and mirrored attempts: a second attempt beside a slow first one, and copies ---

/** Work that outlives the response: copies and losing attempts. The edge must wait for it. */
const BACKGROUND_WORK = new WeakMap<Request, Promise<unknown>>();
function addBackgroundWork({ request: { source } }: Exchange, work: Promise<void>): void {
  if (source) BACKGROUND_WORK.set(source, Promise.all([BACKGROUND_WORK.get(source), work]));
}

const MOST_GRACE = 1_000; // milliseconds that a losing attempt may still run, at most

/**
 * Asks one server, and a second one when the first takes longer than most answers do. The first good answer wins and the
 * other attempt is given up; a bad one does not win while the other may still be better.
 */
function sendHedged(exchange: Exchange, server: Server, retry: number, decide: ExchangeAttempt["decide"]): void {
  const { effects } = exchange.balancer, { service, retryOn } = exchange.destination!;
  let second: ServerAttempt | undefined, waiting: ExchangeAttempt | undefined, over = false;
  const onDecided: ExchangeAttempt["decide"] = (attempt) => {
    const other = attempt === first ? second : first;
    if (over) return attempt.response?.body.cancel(); // it has lost
    if (other && !waiting) {
      const status = attempt.response?.status ?? 0;
      const isGood = status > 0 && !isServerError(status) && !retryOn.has(status);
      if (!isGood) return void (waiting = attempt);
    }
    over = true;
    if (!other) return decide(attempt);
    service.retrying--;
    service.hedges++;
    if (attempt === second) service.hedgesWon++;
    exchange.tried.splice(-2, 2, other.server, attempt.server); // the winner stands last
    exchange.attempt = attempt;
    addBackgroundWork(exchange, endLoser(other));
    decide(attempt);
  };
  const first = new ServerAttempt(exchange, server, retry, onDecided);
  exchange.onLeave = () => [first, second].forEach((attempt) => attempt?.carrier?.cancel("client-left"));
  first.send();
  effects.sleep(service.hedgeDelay).then(() =>
    guarded(exchange, () => {
      const other = over || exchange.request.gone ? undefined : pickSecond(exchange, first);
      if (!other) return;
      service.retrying++;
      second = new ServerAttempt(exchange, other, retry, onDecided);
      second.send();
    })
  );
}

/**
 * Ends an attempt that has lost. It may first run as long again as it already has, so that the latency of a server that
 * was only a little late is measured, and one that hangs is known to be slower than that.
 */
async function endLoser(attempt: ExchangeAttempt): Promise<void> {
  const { effects } = attempt.service;
  attempt.hasLost = true;
  if (!attempt.response && !attempt.endedAt) {
    await effects.sleep(Math.min(MOST_GRACE, effects.now() - attempt.startedAt));
  }
  if (attempt.endedAt) return;
  const ended = new Promise<void>((resolve) => attempt.afterEnd = resolve);
  if (attempt.response) attempt.response.body.cancel();
  else attempt.carrier?.cancel("client-left");
  await ended; // at the edge nothing would run behind its request
}

/** Another server, healthy and with room, for a second attempt that the budget allows. */
function pickSecond(exchange: Exchange, first: ExchangeAttempt): Server | undefined {
  const { effects } = exchange.balancer, { service } = exchange.destination!, now = exchange.now = effects.now();
  const others = withRoom(service, candidatesOf(service, now))
    .filter((server) => !exchange.tried.includes(server) && server.up && server.ejectedUntil === 0);
  if (others.length === 0) return undefined;
  earnRetry(exchange, service);
  if (!spendRetry(service, 0, now)) return undefined;
  try {
    return takeServer(service, runStrategy(service, others as readonly Server[] as Candidates, exchange), exchange);
  } catch (error) { // a strategy threw: nothing waits for the first attempt any more
    addBackgroundWork(exchange, endLoser(first));
    throw error;
  }
}

const MOST_COPIES = 100; // in flight to one service; further requests are not copied

/**
 * Sends a copy of a request to another service, behind the request itself, and discards the response. Only the server's
 * room is used; no health or latency is counted. Where the body is a stream there is none to copy.
 */
async function sendCopy(exchange: Exchange, destination: Destination): Promise<void> {
  const { balancer: { effects }, method, body } = exchange, { service, policy: { timeouts } } = destination;
  const mayCopy = body.length >= 0 && body.bytes !== undefined && service.copies.inFlight < MOST_COPIES;
  if (!mayCopy) return void service.copies.skipped++;
  service.copies.inFlight++;
  await undefined;
  try {
    const copy: Exchange = { ...exchange, destination, tried: [], onLeave: undefined };
    const server = pickServer(copy, effects.now());
    if (server === undefined) return void service.copies.skipped++;
    if (server.trialInFlight) endTrial(service, server, "undecided"); // a copy is no trial
    nextSpan(copy);
    const { target } = copy, lines = outboundLines(copy, server);
    const problem = await new Promise<string | undefined>((resolve) =>
      effects.send(newAttempt({
        ...{ server, method, body, target, lines, timeouts, startedAt: copy.now },
        onHead: (response) => response.body.read({ data() {}, end() {}, fail() {} }),
        onEnd: (failure, detail) => resolve(failure && detail),
      }))
    );
    releaseServer(service, server);
    if (problem) reportServer(service, server, problem);
    service.copies[problem ? "failed" : "answered"]++;
  } catch (error) { // of a custom strategy
    effects.report("error", stackOf(error));
  } finally {
    service.copies.inFlight--;
  }
}

// --- 8.5 Balance: the request path, step by step ---

/** A new exchange; a trusted peer may have given it an id. */
function newExchange(balancer: Balancer, request: HttpRequest, isWrapped = false): Exchange {
  const origin = originOf(request, balancer.table.trusts);
  const given = origin.isForwarded ? fieldOf(request.block.fields, "x-request-id") : undefined;
  balancer.requests++;
  const id = given ?? `${balancer.name}-${balancer.requests.toString(36)}`;
  return new Exchange(balancer, request, origin, id, isWrapped);
}

/** Answers one request. `isWrapped`: middleware has seen it before. */
function balance(balancer: Balancer, request: HttpRequest, isWrapped = false): void {
  const exchange = newExchange(balancer, request, isWrapped);
  balancer.inFlight++;
  exchange.entrypoint.inFlight++;
  request.onGone = () => exchange.onLeave?.(exchange);
  try {
    takeRequest(exchange);
  } catch (error) { // of a custom strategy, say
    failInternally(exchange, error);
  }
}

/** Validates a request, and finds its route and its service. */
function takeRequest(exchange: Exchange): void {
  const { request } = exchange;
  if (request.gone) return refuse(exchange, "client-left");
  const refusal = validate(exchange) ?? detectLoop(exchange);
  if (refusal) return refuse(exchange, refusal);
  if (request.source?.bodyUsed && !request.body.bytes) throw new Error(BODY_READ);
  const route = exchange.route = matchRoute(exchange.table, exchange);
  if (route) exchange.target = targetOf(exchange, route);
  exchange.upgrade = upgradeOf(request);
  if (!route && exchange.path === "*") return respondLocally(exchange, textReply(200, "", ["allow", ANY_METHOD]));
  if (!route) return refuse(exchange, exchange.allow ? "bad-method" : "no-route");
  const destination = route.action.kind === "forward" ? drawDestination(route, exchange) : undefined;
  if (destination?.around && !exchange.upgrade) void actWithCors(exchange, destination);
  else act(exchange, destination);
}

const BODY_READ =
  "middleware has read the body, and nothing has kept it for the server: read it by c.req.text() or the " +
  "like, not as a form";

/** The protocol that a request asks to switch to, where it may: not HTTP/2, and a WebSocket only by its whole handshake. */
function upgradeOf({ upgrade, method, block: { fields } }: HttpRequest): string {
  if (!upgrade || /[,\s]|^h2c?$/i.test(upgrade)) return "";
  const hasKey = /^[A-Za-z0-9+/]{22}==$/.test(fieldOf(fields, "sec-websocket-key") ?? ""); // RFC 6455 section 4.1
  return isWebSocket(upgrade) && (method !== "GET" || !hasKey) ? "" : upgrade;
}

/** Why the route does not take a request, if it does not. */
function checkAdmission(exchange: Exchange): FailureName | undefined {
  const { balancer, client, body, table: { config: { limits } } } = exchange;
  const { admits, buckets, body_limit } = exchange.route!;
  if (balancer.inFlight > limits.requests) return "busy";
  if (limits.per_client < Infinity) {
    exchange.concurrencyKey = clientNetwork(client);
    if (countIn(balancer.clients, exchange.concurrencyKey) >= limits.per_client) return "client-busy";
  }
  if (admits && !admits(client)) return "denied";
  if (buckets && !withinRate(buckets, exchange)) return "rate";
  return body.length > body_limit ? "body-too-large" : undefined;
}

/** Does what the route says, if it takes the request: answers by itself, or asks servers. */
function act(exchange: Exchange, destination: Destination | undefined): void {
  const route = exchange.route!, { action } = route, refusal = checkAdmission(exchange);
  if (refusal) return refuse(exchange, refusal);
  if (action.kind === "redirect") return respondLocally(exchange, redirectReply(exchange, action));
  if (action.kind === "respond") return respondLocally(exchange, respondLiterally(route, action));
  exchange.destination = destination!;
  destination!.service.inFlight++;
  takeBody(exchange);
}

/** Does the same behind Hono's CORS: that answers preflights, and its fields go with any other answer. */
async function actWithCors(exchange: Exchange, destination: Destination): Promise<void> {
  let isWanted = false;
  const answer = () => {
    isWanted = true;
    return new Response();
  };
  try {
    const asked = toRequest(exchange.request, false), isPreflight = asked.headers.has("access-control-request-method");
    // other OPTIONS are the server's (WebDAV, tus), and Hono would take them for preflights
    const sent = exchange.method === "OPTIONS" && !isPreflight
      ? new Request(asked.url, { headers: asked.headers })
      : asked;
    const response = await destination.around!.fetch(sent, { answer });
    if (!isWanted) return respondLocally(exchange, fromResponse(response));
    exchange.corsFields = [...response.headers];
  } catch (error) {
    return failInternally(exchange, error);
  }
  guarded(exchange, () => act(exchange, destination));
}

/** A service of a split: the client's previous one, or one by weight. */
function drawDestination(route: Route, exchange: Exchange): Destination {
  const { destinations, weight, sticky } = route;
  const before = sticky ? stickyDestination(route, exchange) : undefined;
  if (before) return before;
  let left = destinations.length > 1 ? exchange.random() * weight : 0;
  for (const one of destinations) {
    left -= one.weight;
    if (left < 0) return one;
  }
  return destinations[0]!;
}

/** Reads a small body first, so that it can be sent twice; streams a longer one, within the route's limit. */
function takeBody(exchange: Exchange): void {
  const { request, body, balancer: { effects } } = exchange;
  body.limit = exchange.route!.body_limit;
  if (body.bytes) return askServer(exchange, 0, exchange.started);
  const isSmall = body.length >= 0 && body.length <= KEPT && !request.expects; // what is held back is read when a server takes it
  const isUnknown = body instanceof FetchBody && body.length < 0 && !fieldOf(request.block.fields, "transfer-encoding");
  if (!isSmall && !isUnknown) return askServer(exchange, 0, exchange.started);
  const { idle, request: whole } = exchange.destination!.policy.timeouts, over = new AbortController();
  const go = (taken: Body | Failure) => {
    if (over.signal.aborted) return;
    over.abort();
    exchange.onLeave = undefined;
    if (typeof taken === "string") return refuse(exchange, request.gone ? "client-left" : taken);
    exchange.body = taken;
    guarded(exchange, () => askServer(exchange, 0, effects.now()));
  };
  exchange.onLeave = () => go("client-left");
  effects.sleep(Math.min(idle, whole), over.signal).then(() => go("client-timeout"));
  if (isSmall) return collect(body, go);
  (body as FetchBody).isEmpty().then((isEmpty) => go(isEmpty ? NO_BODY : body), () => go("bad-body"));
}

/** Asks a server: at once, or when one has room; else one of the fallback service. Requests in the queue go first. */
function askServer(exchange: Exchange, retry: number, now: number, failure: FailureName = "no-server"): void {
  const { effects } = exchange.balancer, { service, fallback } = exchange.destination!;
  if (service.waiting.size > 0) wakeQueue(service);
  const server = pickServer(exchange, now);
  if (server) return forward(exchange, server, retry);
  const mayWait = candidatesOf(service, now).length > 0 && !(fallback && exchange.tried.length);
  const waited = mayWait ? waitInQueue(exchange, () => pickServer(exchange, effects.now())) : Promise.resolve(failure);
  waited.then((serverOrFailure) => {
    if (typeof serverOrFailure !== "string") return forward(exchange, serverOrFailure, retry);
    if (serverOrFailure === "client-left" || !fallback) return refuse(exchange, serverOrFailure);
    service.inFlight--;
    fallback.service.inFlight++;
    exchange.destination = fallback;
    exchange.cookie = "";
    askServer(exchange, retry, effects.now(), failure);
  }).catch((error) => failInternally(exchange, error));
}

/** Sends the request to a server that has been picked for it. */
function forward(exchange: Exchange, server: Server, retry: number): void {
  const { service } = exchange.destination!, copies = exchange.route!.mirror;
  exchange.onLeave = cancelAttempt;
  const isCopied = retry === 0 && copies && !exchange.upgrade && exchange.random() < copies.weight; // no copy of a tunnel
  if (isCopied) addBackgroundWork(exchange, sendCopy(exchange, copies));
  if (retry > 0) {
    service.retrying++;
    service.retries++;
    server.retries++;
  }
  if (service.hedge > 0 && mayHedge(exchange, service)) sendHedged(exchange, server, retry, conclude);
  else new ServerAttempt(exchange, server, retry, conclude).send();
}

const cancelAttempt = ({ attempt }: Exchange): void => attempt?.carrier?.cancel("client-left");

/** Sends the response or failure of an attempt to the client, or asks another server. */
function conclude(attempt: ExchangeAttempt): void {
  const { exchange, response, retry, failure = "reset" } = attempt, { effects } = exchange.balancer;
  if (retry > 0) attempt.service.retrying--;
  if (!mayRetry(attempt)) {
    if (response) return sendResponse(attempt, response);
    return refuse(exchange, exchange.request.gone ? "client-left" : failure);
  }
  const again = () => askServer(exchange, retry + 1, effects.now(), response ? undefined : failure);
  const soon = retry === 0 ? again : () => {
    backOff(retry, effects).then(() => guarded(exchange, again));
  };
  if (!response) return soon();
  attempt.afterEnd = soon; // its server is free again by then
  response.body.cancel();
}

// -----------------------------------------------------------------------------------------------------------
// 9. TCP proxy
// Connections that are not HTTP.
// The same services, strategies and health, with bytes in place of requests.
// -----------------------------------------------------------------------------------------------------------

/** One connection, from its listener to its last byte. */
interface Relay extends PickRequest {
  // given
  readonly balancer: Balancer;
  readonly route: TcpRoute;
  readonly near: Socket; // to the client
  readonly target: string; // the listener's address
  readonly id: string;
  readonly entrypoint: Entrypoint;
  readonly started: number; // milliseconds

  // counted
  connectedAt: number; // to its server; 0: not yet
  since: number; // when something last passed
  received: number; // bytes from the client
  bytes: number; // bytes to it
  problem: FailureName | "";
}

/** Finds a server for a client's connection, and passes bytes until both sides are closed. */
async function serveRelay(relay: Relay): Promise<void> {
  const { balancer, route: { service, admits }, near, entrypoint } = relay;
  near.on("error", () => relay.problem ||= "client-left");
  pauseSocket(near); // until its server is reached
  for (const one of [balancer, entrypoint, service]) one.inFlight++;
  try {
    if (admits && !admits(relay.client)) relay.problem ||= "denied";
    const far = relay.problem ? undefined : await connectRelay(relay);
    if (far) await relayUntilClosed(relay, far);
  } catch (error) { // of a custom strategy
    balancer.effects.report("error", stackOf(error));
    relay.problem = "internal";
  }
  resetSocket(near);
  for (const one of [balancer, entrypoint, service]) one.inFlight--;
  finishRelay(relay);
}

/** Counts and logs a connection that has ended. */
function finishRelay(relay: Relay): void {
  const { balancer, route: { service }, entrypoint, bytes, received, problem, tried, started, connectedAt } = relay;
  const { effects, table: { config: { log } } } = balancer;
  const status = problem ? FAILURES[problem].status : 200, ended = effects.now() - started;
  for (const { tallies } of [entrypoint, service]) {
    const counters = tallyOf(tallies, { status, method: "" });
    tally(counters, ended, received, bytes, status >= 500 && problem !== "draining");
  }
  if (problem) countFailure(balancer, problem);
  if (log.format === "off" || !problem && effects.random() >= log.sample) return;
  effects.accessLog({
    "timestamp": isoTime(effects.date()),
    "client.address": relay.client,
    "http.request.method": "TCP",
    "url.scheme": "tcp",
    "url.original": `tcp://${relay.target}`,
    "http.response.status_code": status,
    "http.request.body.size": received,
    "http.response.body.size": bytes,
    "error.type": problem || undefined,
    "lb.request_id": relay.id,
    "lb.route": service.name,
    "lb.service": service.name,
    "lb.server": tried.at(-1)?.name,
    "lb.attempts": tried.length,
    "lb.connected_ms": connectedAt ? thousandths(connectedAt - started) : undefined,
    "lb.ended_ms": thousandths(ended),
  }, log.format);
}

/** Asks one server after another for a connection. No byte has passed yet, so that nothing can happen twice. */
async function connectRelay(relay: Relay): Promise<Socket | undefined> {
  const { balancer: { effects }, route: { service }, near } = relay;
  for (let retry = 0;; retry++) {
    const startedAt = relay.now = effects.now(), { retries, timeouts } = service.config;
    const candidates = serversFor(service, relay);
    if (candidates.length === 0) return void (relay.problem ||= "no-server");
    const server = takeServer(service, service.strategy(candidates as Candidates, relay), relay);
    if (retry > 0) [service.retries, server.retries] = [service.retries + 1, server.retries + 1];
    beginWaiting(server, startedAt);
    const far = await connectWithin(timeouts.connect, dial(server)), endedAt = effects.now();
    if (!(far instanceof WireError)) {
      endWaiting(server, startedAt);
      onHead(service, server, 200, startedAt, endedAt);
      relay.connectedAt = relay.since = endedAt;
      relay.problem = "";
      return far;
    }
    relay.problem = far.kind;
    countNoResponse({ service, server, startedAt, endedAt }, 0, far.message);
    releaseServer(service, server);
    if (retry >= retries || near.destroyed) return undefined;
    if (retry > 0) await backOff(retry, effects);
  }
}

/** Passes bytes both ways until both sides are closed. A side that breaks has the other reset. */
async function passBytes(relay: Relay, far: Socket, now: Effects["now"]): Promise<void> {
  const { near } = relay, touch = () => relay.since = now();
  const tunnel = new ByteTunnel(near, far, "", Infinity);
  const closed = [tunnel.client, tunnel.server].map((side) => {
    const { socket, other } = side;
    socket.on("data", (bytes: Bytes) => side.onData(bytes)).on("drain", () => side.onDrain());
    socket.on("end", () => side.onEnd());
    socket.on("close", () => socket.readableEnded ? side.onClose() : resetSocket(other.socket));
    return new Promise((resolve) => socket.on("data", touch).on("drain", touch).on("close", resolve));
  });
  if (near.readableEnded) tunnel.client.onEnd(); // before anybody listened
  resumeSocket(near);
  await Promise.all(closed);
  [relay.received, relay.bytes] = [tunnel.client.bytes, tunnel.server.bytes];
}

/** Connects a client to its server until both are closed, and counts what the server has done. */
async function relayUntilClosed(relay: Relay, far: Socket): Promise<void> {
  const { balancer: { effects, relays }, near, route: { service, proxy_protocol, at }, tried } = relay;
  const server = tried.at(-1)!, over = new AbortController(), began = effects.now();
  const end = (problem: FailureName) => {
    relay.problem ||= problem;
    resetSocket(near);
    resetSocket(far);
  };
  const drained = () => end("draining");
  relays.add(drained);
  far.on("error", () => relay.problem ||= "reset");
  far.once("data", () => onAnswered(service, server));
  if (near.destroyed || near.remoteAddress === undefined && !isUnix(at.host)) end("client-left");
  else {
    if (proxy_protocol) far.write(proxyHeader(near));
    void untilIdle(relay, effects, over.signal).then(() => end("idle"));
    await passBytes(relay, far, effects.now);
  }
  over.abort();
  relays.delete(drained);
  const failed = relay.problem === "reset" && relay.bytes === 0; // later it may be how they say goodbye
  tally(server.counters, effects.now() - began, relay.received, relay.bytes, failed);
  if (failed) {
    reportServer(service, server, "it reset the connection before it sent anything");
    onFailed(service, server, began);
  } else if (!relay.problem) onAnswered(service, server);
  releaseServer(service, server);
}

/** Resolves when no byte has passed for `timeouts.idle`. */
async function untilIdle(relay: Relay, effects: Effects, over: AbortSignal): Promise<void> {
  const left = () => relay.since + relay.route.service.config.timeouts.idle - effects.now();
  for (let wait = left(); wait > 0; wait = left()) {
    await effects.sleep(wait, over);
    if (left() <= 0) await effects.sleep(20, over); // a process that has stood still has to read what has come
  }
}

/** The header of the PROXY protocol, version 2 (section 2.2): the addresses of client and listener. */
function proxyHeader({ remoteAddress, remotePort, localAddress, localPort }: Socket): Uint8Array {
  const begin = [...Buffer.from("\r\n\r\n\0\r\nQUIT\n"), 0x21];
  if (remoteAddress === undefined) return Uint8Array.from([...begin, 0, 0, 0]); // over a Unix socket: no addresses
  const [from, to] = [ipaddr.process(remoteAddress), ipaddr.process(localAddress!)];
  const ports = [remotePort!, localPort!].flatMap((port) => [port >> 8, port & 255]);
  const addresses = [...from.toByteArray(), ...to.toByteArray(), ...ports];
  const family = from.kind() === "ipv4" ? 0x11 : 0x21; // over TCP
  return Uint8Array.from([...begin, family, 0, addresses.length, ...addresses]);
}

/** Takes a client's connection to a server of its listener, whose address in the file this is; or refuses it. */
export function relayTcp(
  balancer: Balancer,
  address: string,
  target: string,
  near: Socket,
  refusal?: FailureName,
): void {
  const { effects, table, name } = balancer, route = table.tcp.get(address);
  if (!route) return void near.destroy();
  const client = unmapped(near.remoteAddress), now = effects.now(), turn = route.service.turn++;
  const entrypoint = getOrMake(balancer.entrypoints, "tcp", newEntrypoint);
  const id = `${name}-${(++balancer.requests).toString(36)}`;
  void serveRelay({
    ...{ balancer, random: effects.random, now, turn, key: client, client, request: undefined },
    ...{ route, near, target, id, entrypoint, started: now, connectedAt: 0, since: now, tried: [] },
    ...{ received: 0, bytes: 0, problem: refusal ?? "" },
  });
}

// -----------------------------------------------------------------------------------------------------------
// 10. Assembly
// The table of a config, and the state carried over a reload.
// Services and servers that stay keep their records, so that nothing learned is lost.
// -----------------------------------------------------------------------------------------------------------

/** A Hono app that balances, to be served, mounted or wrapped. */
export interface LoadBalancer extends Hono {
  /** Answers a request of our own server: without a Request and a Response, where no middleware of yours wants them. */
  handle(request: HttpRequest): void;
  /**
   * Puts another config in force. Requests in flight finish on the old one; what is known of servers that stay is kept.
   * With workers it resolves when all of them have it.
   */
  reload(config: Config): void | Promise<unknown>;
  /** Probes the servers that are due, and again whenever some are, until `stop`. `serve` does both. */
  start(): void;
  stop(): void;
  /** Probes the servers that are due, once. */
  probe(): Promise<void>;
  /** Looks up the names of servers that are due, once. `start` does it again and again. */
  discover(): Promise<void>;
  /** What is in force and in flight, to be read. */
  balancer: Balancer;
}

type WantedServer = ListedServer & Pick<FoundServer, "servername">;
/** The servers of a service: those that the file lists, and those that its names stand for; each URL once. */
function serversOf(listed: ServerConfig[], names: Table["names"], changes: Service["changes"]): WantedServer[] {
  const byUrl = new Map<string, WantedServer>();
  for (const { find, ...one } of listed) {
    const discovery = find && names.get(idOf({ find, url: one.url }));
    const plain = { ...one, authority: hostFieldOf(one.url), foundBy: "", servername: "" };
    const found = discovery?.found.map(({ lacking: _, weight, backup, ...server }) => {
      const both = { weight: one.weight * weight, backup: one.backup || backup, foundBy: one.name };
      return { ...one, ...server, ...both, ...changes.get(server.url) };
    });
    for (const server of found || [plain]) if (!byUrl.has(server.url)) byUrl.set(server.url, server);
  }
  return [...byUrl.values()];
}

/**
 * Services that stay, by name, and their servers that stay, by URL, stay the same records: what is known of them is kept
 * over a reload, and what requests in flight find out is not lost.
 */
function buildService(
  { name, config, strategy, effects }: Pick<Service, "name" | "config" | "strategy" | "effects">,
  known: Table["names"],
  previous?: Service,
): Service {
  const now = effects.now();
  const changes = previous?.changes ?? new Map<string, FoundChange>();
  const names = [...new Set(config.servers.flatMap((one) => known.get(idOf(one)) ?? []))];
  const byUrl = new Map(previous?.servers.map((server) => [server.url, server]));
  const isAuto = config.max_in_flight === AUTO, wasAuto = previous?.config.max_in_flight === AUTO;
  const servers = serversOf(config.servers, known, changes).map(({ servername, ...wanted }) => {
    const before = byUrl.get(wanted.url), since = before?.state === wanted.state ? before.since : now;
    const isNew = previous && before?.state !== "ready" && wanted.state === "ready";
    const tls = servername && !config.tls.servername ? { ...config.tls, servername } : config.tls;
    const overTls = wanted.url.startsWith("https:") ? config.http : 1;
    const http = wanted.url.startsWith("h2c:") ? 2 : overTls;
    const server = Object.assign(before ?? newServer(wanted, name, tls, http), wanted, { tls, http, since });
    if (isNew) server.backAt = now;
    const found = wasAuto ? server.limit : FIRST_LIMIT; // what `auto` has found stays found
    server.limit = Math.min(server.max, isAuto ? found : config.max_in_flight);
    if (config.health.kind === "off" && previous?.config.health.kind !== "off") server.up = server.upByOwnProbes = true; // no probe would bring it back
    if (config.eject.failures === Infinity) Object.assign(server, { ejectedUntil: 0, trialInFlight: false });
    return server;
  });
  const urls = new Set(servers.map((server) => server.url));
  if (names.some((one) => !one.isKnown)) { // until the first look-up has ended, all servers of before stay
    servers.push(...previous?.servers.filter((server) => !urls.has(server.url)) ?? []);
  }
  for (const url of changes.keys()) if (!urls.has(url)) changes.delete(url);
  const { by, key } = config.strategy, read: Read = KEYS[by];
  const knownTimes = previous?.times.length ? previous.times : undefined;
  return Object.assign(previous ?? new ServiceState(), {
    ...{ name, config, strategy, effects },
    ...{ servers, names, changes },
    key: (exchange: Exchange) => read(exchange, key) ?? exchange.client, // which `hash` hashes
    cookies: undefined,
    hedge: config.sticky.cookie ? 0 : config.hedge, // no other server knows the client
    times: config.hedge ? knownTimes ?? new Float64Array(SAMPLES) : NO_TIMES,
    measured: config.hedge ? previous?.measured ?? 0 : 0,
    bounded: servers.some((server) => server.limit < Infinity),
    candidatesUntil: 0,
    compareAt: config.eject.failures === Infinity ? Infinity : 0,
  });
}

/** Brings a service up to date with what its names and operators say. */
function refreshService({ table }: Balancer, service: Service): void {
  buildService(service, table.names, service);
  wakeQueues(table);
}

/** Changes a server that was found; nothing of that is saved. */
function changeFound(balancer: Balancer, service: Service, server: Server, change: FoundChange): void {
  service.changes.set(server.url, { ...service.changes.get(server.url), ...change });
  refreshService(balancer, service);
  balancer.effects.onNews({ kind: "changed", service: service.name, url: server.url, change });
}

/** Whether an origin is one of these; `https://*.example.com` is any below it, and as for hosts not itself. */
const originMatcher = (allowed: string[]) => (origin: string): string | null => {
  const fits = (one: string) => {
    const [before = "", behind] = one.split("*");
    return behind === undefined
      ? one === origin
      : origin.startsWith(before) && origin.slice(before.length + 1).endsWith(behind);
  };
  return allowed.some(fits) ? origin : null;
};

/** cors is Hono's own middleware, around the answers of the routes that ask for it. */
function corsAround({ cors: own }: Policy): Around | undefined {
  if (!own.origin.length) return undefined;
  const around: Around = new Hono();
  around.use(cors({
    origin: own.origin.includes("*") ? "*" : originMatcher(own.origin),
    allowMethods: own.allow_methods,
    allowHeaders: own.allow_headers,
    exposeHeaders: own.expose_headers,
    credentials: own.credentials,
    ...(own.max_age > 0 && { maxAge: own.max_age / 1_000 }),
  }));
  around.all("*", (context) => context.env.answer());
  return around;
}

const bucketsId = ({ name, rate }: RouteConfig): string => JSON.stringify([name, rate]);

/** `outer`: of the service that the route names; what it does to answers stays where another service falls in. */
function destinationOf(target: Target, services: Map<string, Service>, outer = target.policy): Destination {
  const { service, weight, policy, fallback } = target;
  return {
    ...{ service: services.get(service)!, weight, policy, retryOn: new Set<string | number>(policy.retry_on) },
    ...{ around: corsAround(outer), compress: outer.compress },
    fallback: fallback && destinationOf(fallback, services, outer),
  };
}

function buildRoute(config: RouteConfig, services: Map<string, Service>, buckets: Table["buckets"]): Route {
  const { methods, request, response, action, headers, query } = config;
  const preflight = methods.length > 0 && config.policy.cors.origin.length > 0 && !methods.includes("OPTIONS");
  const destinations = action.kind === "forward" ? action.targets.map((target) => destinationOf(target, services)) : [];
  const { service, percent } = config.mirror, copies = services.get(service);
  const policy = copies && { ...copies.config, retry_on: [] }; // a copy is sent once
  const mirror = policy && { service, policy, weight: percent / 100, fallback: undefined };
  return {
    ...config,
    methods: preflight ? [...methods, "OPTIONS"] : methods,
    destinations,
    weight: destinations.reduce((sum, one) => sum + one.weight, 0),
    sticky: destinations.length > 1 && destinations.every((one) => !one.weight || one.service.config.sticky.cookie),
    rank: rankOf(config),
    conditions: [
      ...headers.map((condition) => compileCondition(condition, headerOf)),
      ...query.map((condition) => compileCondition(condition, queryOf)),
    ],
    mirror: mirror && destinationOf(mirror, services),
    admits: compileAdmission(config.allow, config.deny),
    buckets: buckets.get(bucketsId(config)),
    hasRules: [request.headers, response.headers].some(({ set, add, remove }) =>
      set.size + add.size + remove.length > 0
    ),
  };
}

/**
 * Compiles a config into what requests read.
 * @throws {TypeError} where a service has a strategy that is not among `known`; `parseConfig` has refused all else
 */
function buildTable(config: Config, known: Strategies, effects: Effects, previous?: Table): Table {
  for (const [name, { strategy }] of config.services) { // before anything is changed that serves
    if (Object.hasOwn(known, strategy.name)) continue;
    throw new TypeError(`service ${name}: there is no strategy ${strategy.name}`);
  }
  const services = new Map<string, Service>(), names: Table["names"] = new Map();
  for (const { url, name, find } of [...config.services.values()].flatMap(({ servers }) => servers)) {
    const id = idOf({ find, url });
    if (find) names.set(id, previous?.names.get(id) ?? new Discovery(url, name, find));
  }
  for (const [name, service] of config.services) {
    const given = { name, config: service, strategy: known[service.strategy.name]!, effects };
    services.set(name, buildService(given, names, previous?.services.get(name)));
  }
  const buckets: Table["buckets"] = new Map(); // those of before where route and rule are the same
  for (const route of config.routes) {
    const id = bucketsId(route);
    if (route.rate) buckets.set(id, previous?.buckets.get(id) ?? newBuckets(route.rate));
  }
  const routes = config.routes.map((route) => buildRoute(route, services, buckets));
  const tcp: Table["tcp"] = new Map();
  for (const { name, listen, proxy_protocol, allow, deny } of config.tcp) {
    const route = { service: services.get(name)!, proxy_protocol, admits: compileAdmission(allow, deny) };
    for (const at of listen) tcp.set(unique(shownAddress(at.host, at.port), tcp), { ...route, at });
  }
  const ofScheme = Map.groupBy(routes.filter(({ fallback }) => !fallback), ({ scheme }) => scheme);
  return {
    config,
    ...{ services, names },
    buckets,
    hosts: compileHosts(ofScheme.get("") ?? []),
    schemes: new Map([...ofScheme].filter(([scheme]) => scheme).map(([scheme, own]) => [scheme, compileHosts(own)])),
    fallback: routes.find(({ fallback }) => fallback),
    tcp,
    trusts: memo(addressMatcher(config.trust)),
  };
}

/** What answers Requests; `env` is what the runtime hands over beside them. */
type Serve = (request: Request, env?: unknown) => Response | Promise<Response>;

/** Answers requests of our own server by a function of Request and Response. Its env has the request as `incoming`. */
const handleByFetch = (fetch: Serve, report: Effects["report"]) => async (incoming: HttpRequest): Promise<void> => {
  const fail = (kind: FailureName) => incoming.respond(failureReply(kind));
  if (incoming.problem) return fail(incoming.problem);
  let request: Request;
  try {
    request = toRequest(incoming, true);
  } catch { // no Request can be made of its method or host
    return fail(REFUSED_METHODS.has(incoming.method) ? "bad-method" : "bad-request");
  }
  try {
    incoming.respond(fromResponse(await fetch(request, { incoming })));
  } catch (error) {
    report("error", stackOf(error));
    fail("internal");
  }
};

/**
 * The body that middleware has read, where Hono has kept it as it came. A form is not, for it gets other boundaries, and
 * neither is what was no UTF-8 and has become text.
 */
async function keptBody(req: HonoRequest): Promise<Uint8Array | undefined> {
  if (req.bodyCache.formData) return undefined;
  const kept = await req.bytes().catch(() => undefined), length = req.header("content-length");
  return kept && (length ? Number(length) === kept.length : !Buffer.from(kept).includes("\ufffd")) ? kept : undefined;
}

/** What a balancer is put together of, beside its config and effects. */
interface Assembly {
  strategies: Strategies; // that the config may name
  runtime: string;
  discover(balancer: Balancer): Promise<void>;
}

/** A config for where there is no DNS: a name is one server, which is reached by it, and SRV records are left out. */
function withoutDns(config: Config): Config {
  const plain = (service: ServiceConfig): ServiceConfig => ({
    ...service,
    servers: service.servers.flatMap(({ find, ...one }) => find === "srv" ? [] : [one]),
  });
  return { ...config, services: new Map([...config.services].map(([name, service]) => [name, plain(service)])) };
}

/** Puts a balancer together from its config and its effects. */
function assembleBalancer(config: Config, all: Effects, own: Assembly): LoadBalancer {
  const { strategies: known, runtime } = own, fit = all.resolve ? (same: Config) => same : withoutDns;
  const balancer = newBalancer(buildTable(fit(config), known, all), all, runtime);
  const app = new Hono(), throughHono = app.fetch;
  let probing: ReturnType<typeof setInterval> | undefined;
  const answer = (request: Request, env: unknown, isWrapped: boolean, kept?: Uint8Array) =>
    new Promise<Response>((resolve) =>
      balance(balancer, requestOf(request, all.client(request, env), resolve, kept), isWrapped)
    );
  app.all("*", async ({ req, env }) => answer(req.raw, env, true, req.raw.bodyUsed ? await keptBody(req) : undefined));
  const isWrapped = () => app.routes.length > 1; // something is mounted here
  const fetch: typeof throughHono = (request, env, context) =>
    isWrapped() ? throughHono(request, env, context) : answer(request, env, false);
  const probe = async () => {
    await probeDue(balancer.table, all);
    wakeQueues(balancer.table); // also where an ejection has ended
  };
  const handleThroughHono = handleByFetch((request, env) => throughHono(request, env as object), all.report);
  return Object.assign(app, {
    fetch,
    balancer,
    handle: (request: HttpRequest) => isWrapped() ? handleThroughHono(request) : balance(balancer, request),
    reload(next: Config) {
      balancer.table = buildTable(fit(next), known, all, balancer.table);
      if (next.admin?.token) balancer.tokens = next.admin;
      balancer.reloads++;
      balancer.reloadedAt = all.date();
      balancer.reloadFailed = false;
      wakeQueues(balancer.table);
      if (probing) void own.discover(balancer);
    },
    probe,
    discover: () => own.discover(balancer),
    start() {
      probing ??= setInterval(() => void Promise.all([probe(), own.discover(balancer)]), PROBE_TICK);
    },
    stop() {
      clearInterval(probing);
      probing = undefined;
    },
  });
}
const PROBE_TICK = 100; // milliseconds between two looks at which probes are due

// -----------------------------------------------------------------------------------------------------------
// 11. Admin
// Looking at it and operating it. Every change is a change of the file: edited in place, checked like any
// routes.yml, saved, and put in force.
// -----------------------------------------------------------------------------------------------------------

// --- 11.1 Views: servers, services and routes, as plain JSON and as text ---

/** The client of a request, the token that it has shown, and the instances that lack the change it has made. */
type AdminEnv = { Variables: { peer: string; shown: "token" | "read token" | ""; missing?: string[] } };
type AdminContext = Context<AdminEnv>;

type Gatekeeper = MiddlewareHandler<AdminEnv>;

/** An answer that says what is wrong (RFC 9457). */
const problemJson = (status: number, detail: string, headers: Record<string, string> = {}, more: Raw = {}): Response =>
  Response.json({ type: "about:blank", title: STATUS_CODES[status], status, detail, ...more }, {
    status,
    headers: { ...headers, "content-type": "application/problem+json" },
  });

/** A request to the API that is refused: the status of the answer, and the mistakes in its body. */
class AdminError extends HTTPException {
  constructor(status: ContentfulStatusCode, message: string, mistakes?: Pick<Mistake, "path" | "message">[]) {
    super(status, { message, res: problemJson(status, message, {}, mistakes && { mistakes }) });
  }
}

function invalid(mistakes: Pick<Mistake, "path" | "message">[], status: 400 | 409 = 400): AdminError {
  const sentences = mistakes.map(({ path, message }) => path ? `${path}: ${message}` : message);
  return new AdminError(status, sentences.join("; "), mistakes);
}
const invalidAt = (path: string, message: string) => invalid([{ path, message }]);

/** The keys of a view: what each is like, for the API description, and how it is read. */
type ViewKeys<A extends unknown[]> = Record<string, [schema: Schema, read: (...of: A) => unknown]>;
const viewOf = <A extends unknown[]>() => <const K extends ViewKeys<A>>(keys: K) => ({
  schema: v.object(Object.fromEntries(Object.entries(keys).map(([key, [schema]]) => [key, schema]))),
  read(this: void, ...of: A) {
    const view: Raw = {};
    for (const key in keys) view[key] = keys[key]![1](...of);
    return view as { -readonly [P in keyof K]: ReturnType<K[P][1]> };
  },
});

const numeric = (about: string) => says(v.number(), about);
const numericOrNull = (about: string) => says(v.nullable(v.number()), about);
const STRING = v.string(), NUMBER = v.number(), BOOLEAN = v.boolean(), STRINGS = v.array(STRING);
const NUMBERS = v.array(NUMBER);
const MOMENT = v.pipe(STRING, v.isoTimestamp());

const toSeconds = (milliseconds: number): number => Math.max(0, Math.round(milliseconds)) / 1_000;
const finite = (limit: number): number | null => Number.isFinite(limit) ? limit : null;

/** The counters of a server, a service or all entrypoints, since the start. */
const COUNTERS_VIEW = viewOf<[Counters]>()({
  requests: [numeric("that have ended"), (c) => c.requests],
  errors: [numeric("answers with 5xx, and failures that are not the client's"), (c) => c.errors],
  bytes_in: [numeric("of the requests' bodies"), (c) => c.bytesIn],
  bytes_out: [numeric("of the answers' bodies"), (c) => c.bytesOut],
  durations: [says(NUMBERS, "requests up to each of bounds, and longer"), (c): number[] => [...c.durations]],
});

const CHECK = v.object({ ago: NUMBER, took: NUMBER, problem: says(STRING, "what was wrong; empty: it passed") });
const checkView = ({ probedAt, probeTook, probeProblem }: Server, now: number) =>
  probedAt > 0 ? { ago: toSeconds(now - probedAt), took: toSeconds(probeTook), problem: probeProblem } : null;

const STATUSES = ["up", "down", "ejected", "trial", "paused", "drain", "maint"] as const;
function serverStatus(server: Server, now: number): typeof STATUSES[number] {
  const { state, up, ejectedUntil, pausedUntil } = server;
  if (state !== "ready") return state;
  if (!up) return "down";
  if (ejectedUntil) return ejectedUntil > now ? "ejected" : "trial";
  return pausedUntil > now ? "paused" : "up";
}

/** Times are seconds, here and in all other views. */
const SERVER_VIEW = viewOf<[server: Server, now: number, share?: number | undefined]>()({
  name: [STRING, (s) => s.name],
  url: [STRING, (s) => s.url],
  status: [v.picklist(STATUSES), serverStatus],
  status_for: [
    numeric("for how long"),
    (s, now) => toSeconds(now - (s.ejectedUntil > now ? s.since : Math.max(s.since, s.ejectedUntil))),
  ],
  check: [says(v.nullable(CHECK), "the last probe; null: there was none"), checkView],
  state: [v.picklist(["ready", "drain", "maint"]), (s) => s.state],
  found_by: [says(STRING, "the name whose DNS records have it; empty: the file lists it"), (s) => s.foundBy],
  saved: [v.optional(says(BOOLEAN, "false: changes are not in the file")), (s) => s.foundBy ? false : undefined],
  backup: [BOOLEAN, (s) => s.backup],
  up: [says(BOOLEAN, "what probes say"), (s) => s.up],
  weight: [NUMBER, (s) => s.weight],
  effective_weight: [numeric("less than weight during slow start"), (s) => thousandths(s.effective)],
  share: [v.optional(numeric("of the service's new requests")), (_, __, share) => share],
  max: [numericOrNull("requests in flight at most, as the file says; null: any number"), (s) => finite(s.max)],
  limit: [numericOrNull("the same, whatever it comes from"), (s) => finite(Math.floor(s.limit))],
  ejected_for: [numeric("for how much longer"), (s, now) => toSeconds(s.ejectedUntil - now)],
  paused_for: [numeric("for how much longer, as its Retry-After asked"), (s, now) => toSeconds(s.pausedUntil - now)],
  in_flight: [NUMBER, (s) => s.inFlight],
  picks: [numeric("requests that it was chosen for"), (s) => s.picks],
  answers: [NUMBER, (s) => s.answers],
  retries: [numeric("attempts that were made because another had failed"), (s) => s.retries],
  failures: [numeric("failed requests in a row"), (s) => s.failures],
  failing: [numeric("the share of its latest 64 or so requests that failed"), (s) => thousandths(s.failing)],
  latency: [numeric("milliseconds to the head of an answer, mean"), (s) => thousandths(s.latency)],
  counters: [COUNTERS_VIEW.schema, (s) => COUNTERS_VIEW.read(s.counters)],
});
type ServerView = ReturnType<typeof SERVER_VIEW.read>;

function serverViews(service: Service, now: number): ServerView[] {
  const candidates = candidatesOf(service, now), sum = candidates.reduce((sum, { effective }) => sum + effective, 0);
  const shares = new Map(candidates.map((server) => [server, server.effective / sum]));
  return service.servers.map((server) => SERVER_VIEW.read(server, now, shares.get(server) ?? 0));
}

/** A name that stands for servers. */
const NAME_VIEW = viewOf<[Discovery, now: number]>()({
  name: [STRING, (d) => d.name],
  servers: [numeric("that were found by it"), (d) => d.found.length],
  problem: [says(STRING, "of the latest answer; empty: there is none"), (d) => d.problem],
  stale_for: [
    numericOrNull("for how long answers have been of no use; null: the latest was good"),
    (d, now) => d.problem ? toSeconds(now - d.staleSince) : null,
  ],
});

const SERVICE_VIEW = viewOf<[service: Service, now: number]>()({
  name: [STRING, (s) => s.name],
  strategy: [STRING, (s) => s.config.strategy.name],
  askable: [numeric("servers that may be asked"), (s, now) => candidatesOf(s, now).length],
  panicking: [says(BOOLEAN, "too few servers are healthy, and so all are asked"), (s) => s.panicking],
  in_flight: [NUMBER, (s) => s.inFlight],
  waiting: [numeric("requests in the queue"), (s) => s.waiting.size],
  retrying: [numeric("retries in flight"), (s) => s.retrying],
  retries: [NUMBER, (s) => s.retries],
  requests: [numeric("that have been answered"), (s) => totalOf(s.tallies).requests],
  counters: [COUNTERS_VIEW.schema, (s) => COUNTERS_VIEW.read(totalOf(s.tallies))],
  names: [
    says(v.array(NAME_VIEW.schema), "by which servers are found"),
    (s, now) => s.names.map((one) => NAME_VIEW.read(one, now)),
  ],
  servers: [v.array(SERVER_VIEW.schema), serverViews],
  config: [v.optional(ServiceSchema), (): unknown => undefined], // see `answerService`
});
type ServiceView = ReturnType<typeof SERVICE_VIEW.read>;

const PATH_KINDS = v.object({ prefix: v.optional(STRING), exact: v.optional(STRING), regex: v.optional(STRING) });
const pathView = (rule: PathRule) => ({ [rule.kind]: rule.kind === "regex" ? rule.source : rule.path || "/" });
const TARGETS = v.array(v.object({ service: STRING, weight: NUMBER }));
const targetViews = ({ action }: RouteConfig) =>
  action.kind === "forward" ? action.targets.map(({ service, weight }) => ({ service, weight })) : undefined;
const statusAt = (kind: string) => ({ action }: RouteConfig) =>
  action.kind !== "forward" && action.kind === kind ? action.status : undefined;

const ROUTE_VIEW = viewOf<[RouteConfig]>()({
  name: [STRING, (r) => r.name],
  default: [says(BOOLEAN, "it takes what no other does"), (r) => r.fallback],
  hosts: [STRINGS, (r) => r.hosts],
  methods: [STRINGS, (r) => r.methods],
  paths: [v.array(PATH_KINDS), (r) => r.paths.map(pathView)],
  headers: [STRINGS, (r) => r.headers.map(({ name }) => name)],
  query: [STRINGS, (r) => r.query.map(({ name }) => name)],
  services: [v.optional(TARGETS), targetViews],
  redirect: [v.optional(numeric("the status")), statusAt("redirect")],
  respond: [v.optional(numeric("the status")), statusAt("respond")],
});
type RouteView = ReturnType<typeof ROUTE_VIEW.read>;
const routeViews = ({ table }: Balancer) => table.config.routes.map((route) => ROUTE_VIEW.read(route));

const WORKERS = v.array(v.object({ id: NUMBER, since: MOMENT }));
const workersView = ({ workers }: Balancer) => [...workers].map(([id, { since }]) => ({ id, since }));

const INSTANCE = v.object({
  ...{ name: STRING, since: MOMENT, version: STRING, runtime: STRING },
  config: numeric("revision in force there"),
  problem: says(STRING, "why it is not the newest"),
  down: says(STRINGS, "servers among its probes that these found down"),
  ejected: STRINGS,
});
const FLEET = v.object({
  engine: says(v.picklist(["answers", "away", "none"]), "none: there is no fleet"),
  since: MOMENT,
  problem: says(STRING, "what is wrong with the engine"),
  name: says(STRING, "of this instance"),
  config: numeric("revision in force here"),
  instances: v.array(INSTANCE),
  probes: says(v.array(v.object({ server: STRING, by: STRINGS })), "the instances that probe a server"),
});
const NO_FLEET_VIEW = { engine: "none", problem: "", name: "", config: 0, instances: [], probes: [] };
const fleetView = ({ effects: { fleet }, startedAt }: Balancer) =>
  fleet?.view() ?? { ...NO_FLEET_VIEW, since: startedAt.toISOString() };

const ENTRYPOINTS = v.array(v.object({ name: STRING, in_flight: NUMBER }));
const entrypointsView = ({ entrypoints }: Balancer) =>
  [...entrypoints.values()].map(({ name, inFlight }) => ({ name, in_flight: inFlight }));

const CERTIFICATES = says(v.array(v.object({ names: STRINGS, until: MOMENT })), "names, and when each ends");
const LISTENERS = v.array(v.object({ address: STRING, protocol: STRING, certificates: CERTIFICATES }));
function listenersView({ table: { config }, effects }: Balancer) {
  const view = (plain: string, secure: string) => ({ host, port, tls }: ListenerConfig) => ({
    address: shownAddress(host, port), // as the file says it
    protocol: tls.length ? secure : plain,
    certificates: tls.flatMap(({ cert }) => effects.certificate(cert) ?? []),
  });
  const tcp = config.tcp.flatMap(({ listen }) => listen.map(view("tcp", "tls")));
  return [...config.listen.map(view("http", "https")), ...tcp];
}

const secondsAgo = (then: Date, { effects }: Balancer) => toSeconds(+effects.date() - +then);

const totalView = ({ entrypoints }: Balancer) =>
  COUNTERS_VIEW.read(totalOf(new Map([...entrypoints.values()].map(({ tallies }, i) => [i, totalOf(tallies)]))));
function serviceViews({ table, effects }: Balancer): ServiceView[] {
  const now = effects.now();
  return [...table.services.values()].map((service) => SERVICE_VIEW.read(service, now));
}

/** Everything that there is to see at this moment. */
const SNAPSHOT_VIEW = viewOf<[balancer: Balancer]>()({
  version: [STRING, () => VERSION],
  runtime: [STRING, (b) => b.runtime],
  time: [numeric("on a clock that begins anywhere and never goes back"), (b) => toSeconds(b.effects.now())],
  uptime: [numeric("of the program"), (b) => secondsAgo(b.startedAt, b)],
  reloads: [
    v.object({ count: NUMBER, ago: NUMBER, failed: says(BOOLEAN, "the file on disk could not be put in force") }),
    (b) => ({ count: b.reloads, ago: secondsAgo(b.reloadedAt, b), failed: b.reloadFailed }),
  ],
  workers: [WORKERS, workersView],
  listeners: [LISTENERS, listenersView],
  draining: [says(BOOLEAN, "it takes no new connections, and will end"), (b) => b.draining],
  requests: [NUMBER, (b) => b.requests],
  in_flight: [NUMBER, (b) => b.inFlight],
  bounds: [says(NUMBERS, "milliseconds"), () => BUCKETS],
  total: [COUNTERS_VIEW.schema, totalView],
  entrypoints: [ENTRYPOINTS, entrypointsView],
  routes: [v.array(ROUTE_VIEW.schema), routeViews],
  services: [v.array(SERVICE_VIEW.schema), serviceViews],
});
const snapshotOf = SNAPSHOT_VIEW.read;

/** What `snapshotOf` gives. */
type Snapshot = ReturnType<typeof snapshotOf>;

/** What is in flight, and where: so much of a snapshot. */
const ConnectionsSchema = v.object({
  in_flight: NUMBER,
  entrypoints: ENTRYPOINTS,
  services: v.array(v.object({
    ...v.pick(SERVICE_VIEW.schema, ["name", "in_flight", "retrying", "waiting"]).entries,
    servers: v.array(v.pick(SERVER_VIEW.schema, ["name", "in_flight"])),
  })),
});

// The same for people.

/** How a server stands: a sign beside the word, and whether it is well. */
const STATES = {
  up: ["●", "good"],
  unchecked: ["○", ""], // no probe and no request has asked it yet
  failing: ["▲", "bad"], // requests fail there
  trial: ["△", "warn"],
  paused: ["○", "warn"],
  draining: ["◐", "warn"],
  drained: ["◐", "warn"],
  maint: ["◇", "warn"],
  ejected: ["▲", "bad"],
  down: ["✕", "bad"],
} satisfies Record<string, [sign: string, level: "good" | "warn" | "bad" | ""]>;
type ShownState = keyof typeof STATES;

const FAILING = 0.05; // the share of its latest requests from which a server is not called up
/** `recent`: the share of the requests of the last 30 seconds that failed; undefined: there were none. */
function stateOf({ status, in_flight, failing, check, counters }: ServerView, recent = failing): ShownState {
  if (status === "drain") return in_flight ? "draining" : "drained";
  if (status !== "up") return status;
  if (Math.min(failing, recent) > FAILING) return "failing";
  return check || counters.requests ? "up" : "unchecked";
}

/** Numbers as people read them. */
const FORMAT = {
  digits: new Intl.NumberFormat("en", { maximumSignificantDigits: 3 }),
  whole: new Intl.NumberFormat("en"),
  scaled(value: number | undefined, ...units: string[]): string {
    if (value === undefined) return "–";
    const steps = Math.min(Math.floor(Math.log10(Math.max(1, value * 1.0005)) / 3), units.length - 1);
    return FORMAT.digits.format(value / 1_000 ** steps) + units[steps];
  },
  count: (n: number) => n < 1e5 ? FORMAT.whole.format(n) : FORMAT.scaled(n, "", " k", " M", " G", " T"),
  rate: (perSecond: number | undefined) => FORMAT.scaled(perSecond, "/s", " k/s", " M/s"),
  bytes: (n: number) => FORMAT.scaled(n, " B", " kB", " MB", " GB", " TB"),
  time: (ms: number | undefined) => ms && ms < 1 ? `${ms.toFixed(2)} ms` : FORMAT.scaled(ms, " ms", " s"),
  percent: (share: number | undefined) => FORMAT.scaled(share && 100 * share, " %"),
  age(time: number): string {
    const units: [string, number][] = [["d", 86_400], ["h", 3_600], ["m", 60]];
    const [name, unit] = units.find(([, unit]) => time >= 2 * unit) ?? ["s", 1];
    return `${Math.floor(time / unit)} ${name}`;
  },
};

/** Servers as text, in columns. */
function serversText(servers: ServerView[]): string {
  const titles = ["SERVER", "STATE", "FOR", "WEIGHT", "IN FLIGHT", "REQUESTS", "ERRORS", "LATENCY", "PROBLEM"];
  const rows = servers.map((server) => [
    ...[server.name, stateOf(server), FORMAT.age(server.status_for), `${server.weight}`],
    ...[server.in_flight, server.counters.requests, server.counters.errors].map(FORMAT.count),
    ...[FORMAT.time(server.latency || undefined), server.check?.problem ?? ""],
  ]);
  const widths = titles.map((title, i) => Math.max(title.length, ...rows.map((row) => row[i]!.length)));
  const line = (row: string[]) => `  ${row.map((cell, i) => cell.padEnd(widths[i]!)).join("  ").trimEnd()}\n`;
  return [titles, ...rows].map(line).join("");
}
const serviceText = ({ name, strategy, askable, in_flight, waiting, servers }: ServiceView): string =>
  `${name}: ${strategy}, ${askable} of ${servers.length} may be asked, ${in_flight} in flight, ${waiting} waiting\n` +
  serversText(servers);

// --- 11.2 Explain: which route and server a request would take, and why not the others, without asking any ---

/** What speaks against asking a server, and where it may be asked all the same, why that is. */
function whyNot(server: Server, isAsked: boolean, now: number): string {
  const { state, weight, inFlight, up, probeProblem, ejectedUntil, trialInFlight, pausedUntil, backup } = server;
  const left = (time: number) => Math.ceil((time - now) / 1_000);
  const room = Math.floor(server.limit);
  if (state !== "ready") return state === "drain" ? "it drains" : "in maintenance";
  if (weight === 0) return "its weight is 0";
  const down = up ? "" : `down${probeProblem && `: ${probeProblem}`}`;
  const ill = down || (ejectedUntil > now ? `ejected for another ${left(ejectedUntil)} s` : "");
  if (isAsked) return ill && `${ill}, but too few are healthy`;
  if (ill) return ill;
  if (trialInFlight) return "another request tries it out";
  if (pausedUntil > now) return `its Retry-After holds for another ${left(pausedUntil)} s`;
  if (inFlight >= room) return `full: ${inFlight} of ${room}`;
  return backup ? "a backup" : "";
}

/** One service as a request would find it: its records are copies, with which its strategy may do what it likes. */
function explainService({ service: found, weight }: Destination, exchange: Exchange) {
  const service = { ...found, servers: found.servers.map((server) => ({ ...server })), candidatesUntil: 0 };
  const { name, config, strategy } = service, { score } = strategy;
  const candidates = withRoom(service, candidatesOf(service, exchange.now)) as Candidates;
  const taker = candidates.length > 0 ? runStrategy(service, candidates, exchange) : undefined;
  const servers = service.servers.map((server) => {
    const asked = candidates.includes(server), points = asked ? score?.(server, candidates, exchange) : undefined;
    return {
      ...{ server: server.name, asked, why: whyNot(server, asked, exchange.now) || undefined },
      score: points === undefined ? undefined : Number(points.toPrecision(4)),
      limit: config.max_in_flight === AUTO ? Math.floor(server.limit) : undefined,
    };
  });
  return { weight, service: name, strategy: config.strategy.name, takes: taker?.name ?? null, servers };
}

/** The route of a request, or why it has none; its services and their servers; and the server that would take it. */
function explain(balancer: Balancer, method: string, url: string, headers: string[] = []) {
  if (!/^https?:/.test(url) || !URL.canParse(url)) {
    throw invalidAt("url", `${quote(url)} is not a URL such as http://host/path`);
  }
  const { username, password, protocol } = new URL(url);
  if (username || password) throw invalidAt("url", "it has a user name or a password, which no request has there");
  if (!METHOD.test(method) || REFUSED_METHODS.has(method)) {
    throw invalidAt("method", `${quote(method)} is not a method that can be forwarded`);
  }
  const fields = headers.map((line) => {
    const [, name = "", value = ""] = /^([!#$%&'*+.^`|~\w-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*)$/.exec(line) ?? [];
    if (!name) throw invalidAt("header", `${quote(line)} is not a header such as "x-canary: 1"`);
    return [name, value] as [string, string];
  });
  const effects = { ...balancer.effects, random: Math.random }; // which leaves a seeded one as it is
  const from = { address: "127.0.0.1", scheme: protocol.slice(0, -1), headers: fields.flat() };
  const request = requestOf(new Request(url, { method, headers: fields }), from, () => {});
  const exchange = newExchange({ ...balancer, effects, entrypoints: new Map() }, request);
  const refusal = validate(exchange), route = refusal ? undefined : matchRoute(balancer.table, exchange);
  if (!route) {
    const failure = refusal ?? (exchange.allow ? "bad-method" : "no-route");
    return { ...FAILURES[failure], failure, allow: exchange.allow };
  }
  const { name, action, admits, destinations, mirror } = route;
  const found = { route: name, action: action.kind, restricted: admits !== undefined, weight: route.weight };
  if (action.kind !== "forward") return { ...found, status: action.status };
  const chain = (one: Destination, fallback = false): (ReturnType<typeof explainService> & { fallback: boolean })[] => [
    { fallback, ...explainService(one, exchange) },
    ...one.fallback ? chain(one.fallback, true) : [],
  ];
  const services = destinations.flatMap((one) => chain(one));
  return { ...found, target: `${method} ${targetOf(exchange, route)}`, services, copies: mirror?.service.name };
}

/** The same of a request as people write it, `GET http://host/path`; undefined where it is none. */
function explainLine(balancer: Balancer, line: string, headers?: string[]): ReturnType<typeof explain> | undefined {
  const [, method = "GET", url = ""] = /^(?:([A-Z]+) )?(https?:\/\/\S+)$/.exec(line.trim()) ?? [];
  return URL.canParse(url) ? explain(balancer, method, url, headers) : undefined;
}

/** What `explain` gives: `failure` where no route takes the request, `status` where it is not forwarded. */
const ExplanationSchema = v.partial(v.object({
  failure: says(STRING, "as in x-lb-failure: no route takes it"),
  ...{ text: STRING, allow: STRINGS, status: NUMBER, route: STRING, weight: NUMBER },
  action: says(STRING, "forward, redirect or respond"),
  restricted: says(BOOLEAN, "allow or deny may refuse the client"),
  target: says(STRING, "what the server gets"),
  copies: says(STRING, "the service that gets copies"),
  services: v.array(v.object({
    ...{ service: STRING, strategy: STRING, weight: NUMBER, fallback: BOOLEAN },
    takes: says(v.nullable(STRING), "the server that would take it"),
    servers: v.array(v.object({
      ...{ server: STRING, asked: says(BOOLEAN, "it may be asked"), why: v.optional(STRING) },
      score: v.optional(numeric("that the strategy gives it: the lowest wins")),
      limit: v.optional(numeric("requests in flight at most, as max_in_flight: auto has found")),
    })),
  })),
}));

function explanationText(found: ReturnType<typeof explain>): string {
  if ("failure" in found) {
    const allow = found.allow ? `; allowed: ${found.allow.join(", ")}` : "";
    return `no route: ${found.status}, ${found.text} (x-lb-failure: ${found.failure})${allow}`;
  }
  const lines = [`route    ${found.route}`];
  if ("status" in found) return `${lines[0]}\nanswer   ${found.action} ${found.status}`;
  if (found.restricted) lines.push("clients  only those that allow and deny admit");
  lines.push(`target   ${found.target}`);
  if (found.copies) lines.push(`copies   ${found.copies}`);
  for (const { service, weight, fallback, strategy, servers, takes } of found.services) {
    const part = weight < found.weight ? ` (${weight} of ${found.weight})` : "";
    lines.push(`service  ${service}${fallback ? " (fallback)" : part}: ${strategy}`);
    for (const { server, asked, why, score, limit } of servers) {
      const reason = why ? `: ${why}` : "", points = score === undefined ? "" : `; score ${score}`;
      const most = limit === undefined ? "" : `; at most ${limit} in flight`;
      lines.push(`server   ${server}: ${asked ? "may be asked" : "is not asked"}${reason}${points}${most}`);
    }
    lines.push(`takes    ${takes ?? "nobody"}`);
  }
  return lines.join("\n");
}

// --- 11.3 Config edits: the file after a change: its comments and order stay, and it is always whole on disk ---

/** A value as YAML on one line. */
function inlineYaml(value: unknown): string {
  const list = JSON.parse(wrapVariables(JSON.stringify([value])));
  return unwrapped(stringify(list, { collectionStyle: "flow", lineWidth: 0 }).trim().slice(1, -1).trim());
}
const nodeOf = (value: unknown): Node => (parseYaml(`[${inlineYaml(value)}]`).contents as YAMLSeq<Node>).items[0]!;

/** Makes a node say `after` instead of `before`. What stays the same keeps its node: comments, quotes, style. */
function edited(node: Node | null, before: unknown, after: unknown): Node | null {
  if (isDeepStrictEqual(before, after)) return node;
  if (isMap<Scalar, Node | null>(node) && isRecord(before) && isRecord(after)) {
    node.items = node.items.filter((pair) => Object.hasOwn(after, keyText(pair)));
    for (const pair of node.items) pair.value = edited(pair.value, before[keyText(pair)], after[keyText(pair)]);
    for (const [name, value] of Object.entries(after)) {
      if (!Object.hasOwn(before, name)) node.add({ key: nodeOf(name) as Scalar, value: nodeOf(value) });
    }
    return node;
  }
  if (isSeq<Node>(node) && Array.isArray(before) && Array.isArray(after)) {
    const left = node.items.map((item, i) => ({ item, value: before[i] }));
    const take = (fits: (value: unknown) => boolean) => {
      const found = left.findIndex(({ value }) => fits(value));
      return found < 0 ? undefined : left.splice(found, 1)[0];
    };
    const same = after.map((value) => take((one) => isDeepStrictEqual(one, value)));
    node.items = after.map((value, i) => {
      const from = same[i] ?? take((one) => writtenServer(one) === writtenServer(value)); // the same server, or the next route
      return from ? edited(from.item, from.value, value)! : nodeOf(value);
    });
    return node;
  }
  const { comment, commentBefore, spaceBefore } = node ?? {};
  return Object.assign(nodeOf(after), { comment, commentBefore, spaceBefore });
}

function looksLikeJson(text: string): boolean {
  try {
    return isRecord(JSON.parse(text));
  } catch {
    return false;
  }
}

const ANCHORS = "this cannot be written into the file without changing more of it, as with anchors (&, *)";
/**
 * The same file, saying something else: comments, order and quotes stay, and it is indented as it was. Spaces within
 * lines are set anew, and line breaks in `[]` and `{}`.
 * @throws {AdminError} where that would change other places too, as with anchors
 */
export function rewrite(text: string, after: unknown, doc: Document = readAsWritten(text, "").doc): string {
  const before = valuesOf(doc);
  if (isDeepStrictEqual(before, after)) return text;
  const mark = text.startsWith("\ufeff") ? "\ufeff" : "", eol = text.includes("\r\n") ? "\r\n" : "\n";
  const lines = text.slice(mark.length).replaceAll("\r\n", "\n"), source = wrapVariables(text);
  const json = looksLikeJson(lines) ? JSON.stringify(after, null, /^\{\n(\s+)/.exec(lines)?.[1]) : undefined;
  if (json !== undefined) return `${mark}${json}\n`.replaceAll("\n", eol);
  const changed = doc.clone();
  visit(changed, {
    Pair(_, { key, value }) { // `key: # comment` stays one line
      if (!isScalar(key) || !isCollection(value) || !/^ *: *#/.test(source.slice(key.range![1]))) return;
      const [first = "", ...others] = value.commentBefore!.split("\n");
      key.comment = first;
      value.commentBefore = others.join("\n");
    },
  });
  changed.contents = edited(changed.contents, before, after) as typeof changed.contents;
  const indent = /^( +)[^\s#]/m.exec(lines)?.[1]?.length ?? 2;
  const indentSeq = !/^( *)[^\s#-].*\n\1- /m.test(lines); // whether the items of a list stand further right than its key
  try {
    const isAlone = isDeepStrictEqual(valuesOf(changed), after); // else an anchor has shared it with others
    const written = unwrapped(changed.toString({ indent, indentSeq, lineWidth: 0 }));
    if (isAlone) return mark + written.replace(/\r?\n/g, eol);
  } catch { /* an alias without its anchor, say */ }
  throw new AdminError(409, ANCHORS);
}

const fsyncLater = promisify(fs.fsync);

/** A new file beside another one; `durable`: on the disk to its last byte. Only that is waited for: it may take long. */
async function writeBeside(
  path: string,
  text: string,
  { mode, uid, gid }: Pick<fs.Stats, "mode" | "uid" | "gid">,
  durable: boolean,
): Promise<string> {
  const fresh = `${path}.new`;
  fs.rmSync(fresh, { force: true });
  const file = fs.openSync(fresh, "wx", 0o600); // readable by its owner alone until it has the mode of the other one
  try {
    fs.writeFileSync(file, text);
    const own = fs.statSync(fresh);
    if (uid >= 0 && (own.uid !== uid || own.gid !== gid)) fs.chownSync(fresh, uid, gid);
    fs.chmodSync(fresh, mode & 0o777);
    if (durable) await fsyncLater(file);
  } finally {
    fs.closeSync(file);
  }
  return fresh;
}

/**
 * Saves a file that said `before`, and keeps that as `.bak` beside it. It is written beside the old one and then renamed: when
 * the process ends or the disk is full, the file is the old one or the new one, and whole.
 * @throws {AdminError} where the file has changed in the meantime (409), or cannot be written (500): it then stays as it was
 */
async function saveFile(file: string, before: string, text: string, keeps = true): Promise<void> {
  const isThere = fs.existsSync(file), path = isThere ? fs.realpathSync(file) : file; // a link stays one
  const bak = `${path}.bak`;
  const check = () => {
    if (!isThere || fs.readFileSync(path, "utf8") === before) return;
    throw new AdminError(
      409,
      `${path} was changed by somebody else and is not in force, or not yet: nothing is overwritten`,
    );
  };
  try {
    check();
    const like = isThere ? fs.statSync(path) : { mode: 0o600, uid: -1, gid: -1 };
    const kept = isThere && keeps && await writeBeside(bak, before, like, false); // no link: not every file system has them
    const fresh = await writeBeside(path, text, like, true);
    check();
    if (kept) fs.renameSync(kept, bak);
    fs.renameSync(fresh, path);
  } catch (error) {
    for (const name of [path, bak]) {
      try {
        fs.rmSync(`${name}.new`, { force: true });
      } catch { /* what is in the way is not ours */ }
    }
    if (error instanceof AdminError) throw error;
    throw new AdminError(500, `${path} cannot be written: ${(error as Error).message}`);
  }
}

/** What stands at a place; what every object inherits (`toString`) does not. */
const valueAt = (raw: unknown, path: Keys): unknown =>
  path.reduce((at, key) => at instanceof Object && Object.hasOwn(at, key) ? (at as Raw)[key] : undefined, raw);
/** Sets a key of its own, also where it is called `__proto__`. */
const setOwn = (raw: Raw, key: string | number, value: unknown): Raw =>
  Object.defineProperty(raw, key, { value, writable: true, enumerable: true, configurable: true });
/** Puts a value in its place; undefined takes it away. */
function putValue(raw: Raw, [key, ...deeper]: Keys, value: unknown): void {
  if (deeper.length) {
    const inner = valueAt(raw, [key!]);
    putValue(inner instanceof Object ? inner as Raw : setOwn(raw, key!, {})[key!] as Raw, deeper, value);
  } else if (value !== undefined) setOwn(raw, key!, value);
  else if (Array.isArray(raw)) raw.splice(Number(key), 1);
  else delete raw[key!];
}
/**
 * A merge patch (RFC 7396): maps are merged, null takes away, anything else replaces. `long` is what `under` says without
 * short forms: a map that is merged into one is merged into what that means.
 */
function merged(under: unknown, patch: unknown, long = under): unknown {
  if (!isRecord(patch)) return patch;
  const out = { ...mapOf(isRecord(under) ? under : long) };
  for (const [key, value] of Object.entries(patch)) {
    if (value === null) delete out[key];
    else setOwn(out, key, merged(valueAt(out, [key]), value, valueAt(long, [key])));
  }
  return out;
}

/** What differs, as people read it: `services.shop.servers[0].weight: 3`. */
function differences(before: unknown, after: unknown, path: Keys = []): string[] {
  if (isDeepStrictEqual(before, after)) return [];
  const lists = Array.isArray(before) && Array.isArray(after) && before.length === after.length;
  if (lists || isRecord(before) && isRecord(after)) {
    const keys = new Set([...Object.keys(before), ...Object.keys(after as Raw)]);
    return [...keys].flatMap((key) =>
      differences(valueAt(before, [key]), valueAt(after, [key]), [...path, lists ? Number(key) : key])
    );
  }
  const shown = maskSecrets({ [String(path.at(-1))]: after }, hidden, String(path.at(-2))) as Raw;
  return [`${dotted(path)}: ${after === undefined ? "taken out" : inlineYaml(Object.values(shown)[0]).slice(0, 200)}`];
}

/** Secrets stay where they are, unless they are no secrets: `${NAME}` only says where one is. */
const hidden = (text: string, secret: boolean): string => secret && !/^\$\{\w+\}$/.test(text) ? "***" : text;

/** Names one state of something, for `ETag` and `If-Match`. */
function tagOf(value: unknown): string | undefined {
  const text = JSON.stringify(value) as string | undefined;
  return text && `"${hash(`1${text}`).toString(36)}${hash(`2${text}`).toString(36)}"`;
}

/** Edits the file's values in place; or returns new values, or a whole new text. */
type Edit = (raw: Raw, config: Config) => unknown;
function reportChange({ req, get }: AdminContext, { report }: Effects, changes: string[]): void {
  const who = `${get("peer")}${get("shown") && ` with the ${get("shown")}`}`;
  const what = changes.slice(0, 5).join(", ") || "nothing but comments";
  const more = changes.length > 5 ? `, and ${changes.length - 5} more` : "";
  report("info", `admin: ${who}: ${req.method} ${quote(req.path)}: ${what}${more}`);
}

const FLEET_NEEDS_RESTART = "fleet has changed, and all of it but ttl and probers takes effect with the next start";

/** What has changed, for `If-Match`. */
type Versioned = (config: Config) => unknown;
type Parse = (text: string) => Config;
/** May still refuse what comes of a change. */
type Check = (next: Config, before: Config) => void;
/** `replaces`: nothing of the config before stays. */
type Change = (
  context: AdminContext,
  edit: Edit,
  what: Versioned,
  more?: { replaces?: boolean; check?: Check | undefined },
) => Promise<void>;

/** How long an answer may wait, as `?wait=` says. */
function waitOf({ req }: AdminContext): number {
  const sent = req.query("wait") ?? "0", wait = v.safeParse(duration(0), sent);
  if (wait.success) return wait.output;
  throw invalidAt("wait", `${quote(sent)} is not a duration such as 30s`);
}

/**
 * The one way in which the config is changed: one change after the other, each whole or not at all. It is edited, read
 * again and checked like any routes.yml, saved, and put in force; in a fleet by all instances.
 */
function changesOf(lb: LoadBalancer, parse: Parse, file?: string): Change {
  const { balancer } = lb, { effects } = balancer;
  let last: Promise<unknown> = Promise.resolve();
  const apply: Change = async (context, edit, what, { replaces = false, check } = {}) => {
    const match = context.req.header("if-match"), wait = waitOf(context);
    let base = balancer.table.config;
    const make = (config: Config): { text: string; next: Config } => {
      base = config;
      const raw = structuredClone(config.written), tag = tagOf(what(config));
      if (match && !(tag && match.split(",").some((one) => one.trim() === tag || one.trim() === "*"))) {
        throw new AdminError(412, "it has changed in the meantime");
      }
      const after = edit(raw, config) ?? raw;
      const text = typeof after === "string" ? after : rewrite(config.text, after, YAML_OF.get(config));
      const next = parse(text);
      check?.(next, config);
      return { text, next };
    };
    if (effects.fleet) {
      context.set("missing", await effects.fleet.change((config) => make(config).text, wait, replaces));
    } else {
      const { text, next } = make(base);
      if (text === base.text && !balancer.reloadFailed) return;
      if (file) await saveFile(file, base.text, text);
      await lb.reload(next);
    }
    const { config } = balancer.table;
    if (config === base) return;
    reportChange(context, effects, differences(base.written, config.written));
  };
  return (...asked) => last = last.then(() => apply(...asked), () => apply(...asked)) as Promise<void>;
}

// --- 11.4 Endpoints: the API, one operation a row ---

const State = map({
  state: says(also.state.wrapped, "drain: no new requests, those in flight finish; maint: no probes either"),
});
const HealthSchema = map({ health: says(oneOf("up", "down"), "until probes say otherwise") });
const Addr = term("a host name or an address", /^.+$/, (text) => (isName(text) || isAddress(text)) && text);
const Member = map({ addr: Addr, port: integer(1, 65_535) });
const Members = v.pipe(v.array(Member, "$ is not a list"), v.minLength(1, "is empty"));
const Pool = map({ servers: says(Members, "addr and port of each; one that is repeated weighs more") });
const ServerPatch = map({ url: opt(Url), ...also });
const Mistakes = says(
  v.array(v.object({ path: STRING, message: STRING, line: v.optional(NUMBER), column: v.optional(NUMBER) })),
  "of a config: all of them; lines are those of the routes.yml that would have come of it",
);
const Problem = v.object({
  ...{ type: STRING, title: STRING, status: NUMBER, detail: STRING, mistakes: v.optional(Mistakes) },
});
/** What bodies and answers are like, by the names that the description has for them. */
const BODIES = {
  ...{ Config: RoutesFile, Service: ServiceSchema, Settings: SettingsMap, Server: ServerSchema },
  ...{ ServerPatch, Pool, State, Health: HealthSchema },
  ...{ Snapshot: SNAPSHOT_VIEW.schema, Events: SNAPSHOT_VIEW.schema, ServiceState: SERVICE_VIEW.schema },
  ...{ ServerState: SERVER_VIEW.schema, Servers: v.array(SERVER_VIEW.schema), Routes: v.array(ROUTE_VIEW.schema) },
  ...{ Explanation: ExplanationSchema, Connections: ConnectionsSchema, Workers: WORKERS, Fleet: FLEET },
  Worker: v.object({ id: NUMBER }),
  Checked: v.object({ services: NUMBER, routes: NUMBER }),
  Status: v.object({ status: STRING }),
  Version: v.object({ version: STRING, runtime: STRING }),
  Text: v.string(),
  Problem: says(Problem, "RFC 9457"),
} satisfies Record<string, Schema>;
/** How answers read as text; others are YAML. */
const TEXTS: Partial<Record<keyof typeof BODIES, (value: never) => string>> = {
  Snapshot: ({ services }: Snapshot) => services.map(serviceText).join("\n"),
  ServiceState: serviceText,
  Servers: serversText,
  ServerState: (server: ServerView) => serversText([server]),
  Explanation: explanationText,
};

/** A request to the API, and what it looks at and changes. */
interface ApiRequest {
  context: AdminContext;
  balancer: Balancer;
  parse: Parse;
  change: Change;
}
/** The parameters of a query. */
type Query = Record<string, [about: string, example: string]>;
interface OperationDetails {
  takes?: [body: keyof typeof BODIES, example: unknown];
  asks?: Query;
  gives?: number[]; // the statuses of what goes well
  open?: boolean; // without a token
}
/** One operation of the API. The description is made of the same. */
function endpoint(
  place: string,
  does: string,
  answers: keyof typeof BODIES,
  run: (request: ApiRequest) => unknown,
  more: OperationDetails = {},
) {
  const [method, path] = place.split(" ") as [string, string];
  return { method, path, does, answers, run, asks: {}, gives: [200], open: false, ...more };
}
type Operation = ReturnType<typeof endpoint>;

/** Content-Types of bodies: JSON, which also the form type of `curl -d` stands for, or YAML. */
const JSON_BODY = /^(?:|application\/(?:json|merge-patch\+json|x-www-form-urlencoded))$/;
const YAML_BODY = /^(?:application\/yaml|application\/x-yaml|text\/yaml)$/;

/** The places of `***`: it stands for a secret that is not shown, and would become one. */
const starsIn = (value: unknown, path: Keys): Keys[] => {
  if (typeof value !== "object" || value === null) return value === "***" ? [path] : [];
  const isList = Array.isArray(value);
  return Object.entries(value).flatMap(([key, one]) => starsIn(one, [...path, isList ? Number(key) : key]));
};

/** The body of a request, as it is written. */
async function bodyOf({ req }: AdminContext): Promise<{ value: unknown; text: string; isYaml: boolean }> {
  const type = lower((req.header("content-type") ?? "").split(";")[0]!.trim()), isYaml = YAML_BODY.test(type);
  if (!isYaml && !JSON_BODY.test(type)) throw new AdminError(415, `${quote(type)} is neither JSON nor YAML`);
  const text = await req.text();
  if (text.trim() === "") throw new AdminError(400, "this needs a body");
  try {
    if (!isYaml) JSON.parse(text);
  } catch (error) {
    throw new AdminError(400, `the body is not JSON: ${(error as Error).message}`);
  }
  const value = readAsWritten(text, "body").values, stars = starsIn(value, []);
  if (!stars.length) return { value, text, isYaml };
  const message = "*** stands for a secret that is not shown: write the secret, ${NAME}, or leave this out";
  throw invalid(stars.map((path) => ({ path: dotted(path), message })));
}

/** Reads what does not become part of the file. @throws {AdminError} with its mistakes */
function checkedValue<S extends Schema>(schema: S, value: unknown): Out<S> {
  const mistakes: Pick<Mistake, "path" | "message">[] = [];
  const output = readValue(schema, value, (path, message) => mistakes.push({ path: dotted(path), message }));
  if (mistakes.length) throw invalid(mistakes);
  return output;
}

/** The service that a change without a name means: the default, or the only one. */
function meantService({ routes, services }: Config): string {
  const action = routes.find((route) => route.fallback)?.action;
  const named = action?.kind === "forward" ? action.targets.map((target) => target.service) : [];
  const [name, ...others] = named.length === 1 ? named : services.keys();
  if (name !== undefined && !others.length) return name;
  throw new AdminError(409, name ? `which service? ${[name, ...others].join(", ")}` : "there is no service");
}
const givenName = ({ context: { req } }: ApiRequest, config: Config): string =>
  req.param("service") ?? meantService(config);

function serviceOf(request: ApiRequest): Service {
  const { services, config } = request.balancer.table, name = givenName(request, config), service = services.get(name);
  if (service) return service;
  throw new AdminError(404, `there is no service ${quote(name)}${guess(name, [...services.keys()])}`);
}
/** By its name or its URL. */
function serverOf(request: ApiRequest): Server {
  const name = request.context.req.param("server") ?? "", service = serviceOf(request);
  const server = service.servers.find((one) => one.name === name || one.url === name);
  if (server) return server;
  const names = service.servers.map((one) => name.includes("/") ? one.url : one.name);
  throw new AdminError(404, `${service.name} has no server ${quote(name)}${guess(name, names)}`);
}

/** The keys of a service in its entry, or the others: those of the route that it stands beside. */
const ownKeys = (entry: unknown, own: boolean): Raw => pickKeys(mapOf(entry), ServiceSchema.entries, own);
const servicePlace = (request: ApiRequest, config: Config): Keys => {
  const name = givenName(request, config);
  return config.places.get(name) ?? ["services", name];
};
const versionOf = (request: ApiRequest): Versioned => (config) =>
  valueAt(config.written, servicePlace(request, config));
const editService = (request: ApiRequest, edit: Edit, check?: Check): Promise<void> =>
  request.change(request.context, edit, versionOf(request), { check });

/** A service as it stands and as it is written: that is what PUT takes. */
function answerService(request: ApiRequest): ServiceView & { config: unknown } {
  const { table, effects } = request.balancer, entry = versionOf(request)(table.config);
  request.context.header("etag", tagOf(entry));
  const config = maskSecrets(ownKeys(entry, true), hidden);
  return { ...SERVICE_VIEW.read(serviceOf(request), effects.now()), config };
}

/** Writes a service: a new one, another one in its place, or the one there is with changes. */
async function writeService(request: ApiRequest) {
  const { req } = request.context, { value } = await bodyOf(request.context), name = req.param("service") ?? "";
  if (!isRecord(value)) throw invalidAt("", `${quote(value)} is not a map with keys such as servers`);
  const mistakes = Object.keys(ownKeys(value, false)).map((key) => {
    return { path: key, message: `unknown key${guess(key, Object.keys(ServiceSchema.entries), true)}` };
  });
  if (mistakes.length) throw invalid(mistakes);
  await editService(request, (raw, config) => {
    const place = servicePlace(request, config), entry = valueAt(raw, place), isNew = entry === undefined;
    if (req.method === "POST" && !isNew) throw new AdminError(409, `there is a service ${quote(name)} already`);
    if (req.method === "PATCH" && isNew) serviceOf(request); // which says so
    const under = ownKeys(entry, true), isPatch = req.method === "PATCH";
    const own = isPatch ? merged(under, value, longForm(ServiceSchema, under)) as Raw : value;
    putValue(raw, place, { ...ownKeys(entry, false), ...own });
    request.context.status(isNew ? 201 : 200);
  });
  return answerService(request);
}

const asMap = (entry: unknown): Raw => isRecord(entry) ? { ...entry } : { url: entry };
const USUAL: Raw = defaultsOf(v.object(also));
/** As short as it can be said: what has its default again is left out, and a URL alone is no map. */
function shortest(entry: Raw, ...changed: string[]): unknown {
  const said = Object.entries(entry).filter(([key, value]) => !(changed.includes(key) && value === USUAL[key]));
  return said.length === 1 && said[0]![0] === "url" ? entry.url : Object.fromEntries(said);
}

/** Where in a service's entry its servers are listed, and which is at which place: one that is repeated at several. */
function listOf(request: ApiRequest, raw: Raw, config: Config) {
  const place = [...servicePlace(request, config), "servers"];
  const inForce = [valueAt(config.source, place)].flat(), now = inForce.map((one) => v.parse(ServerSchema, one));
  const listed = [valueAt(raw, place) ?? inForce].flat(); // a merge key (<<) has brought them in
  return { place, listed, now };
}

/** Changes one server in its list, or takes it out. One that was repeated is then listed once, with its weight. */
function editServer(request: ApiRequest, edit: (entry: Raw) => unknown): Promise<void> {
  return editService(request, (raw, config) => {
    const { url, weight } = serverOf(request), { place, listed, now } = listOf(request, raw, config);
    const [first, ...again] = now.flatMap((one, i) => one.url === url ? [i] : []);
    const changed = edit({ ...asMap(listed[first!]), ...(again.length > 0 && { weight }) });
    const others = listed.map((one, i) => i === first ? changed : one).filter((_, i) => !again.includes(i));
    putValue(raw, place, others.filter((one) => one !== undefined));
  });
}

/** A server, also one that has just been taken out. `leaves`: 202 while requests are still in flight there. */
function answerServer(request: ApiRequest, server = serverOf(request), leaves = false): ServerView {
  const { effects, table } = request.balancer, now = effects.now(), service = table.services.get(server.service);
  if (service) candidatesOf(service, now); // weights are worked out with it
  request.context.header("etag", tagOf(versionOf(request)(table.config)) ?? '""');
  if (leaves && server.inFlight > 0) request.context.status(202);
  return SERVER_VIEW.read(server, now);
}

const FoundChangeSchema = map({
  weight: v.exactOptional(also.weight.wrapped),
  state: v.exactOptional(also.state.wrapped),
});

/** Changes a server that DNS has: that is not in the file, and holds until the server is gone. */
async function changeFoundServer(request: ApiRequest, server: Server, patch: Raw): Promise<void> {
  if (Object.keys(pickKeys(patch, FoundChangeSchema.entries, false)).length) {
    throw new AdminError(
      400,
      `of ${server.name}, which was found by ${server.foundBy}, only weight and state can be changed`,
    );
  }
  const output = checkedValue(FoundChangeSchema, patch), { balancer } = request;
  const service = serviceOf(request);
  if (!await balancer.effects.fleet?.mark(service, server, output)) {
    changeFound(balancer, service, server, output);
  }
  reportChange(request.context, balancer.effects, Object.keys(patch));
}

/** Changes a server, and waits for requests in flight there as long as `?wait=` says. */
async function patchServer(request: ApiRequest, patch: Raw): Promise<ServerView> {
  const { context, balancer: { effects } } = request, server = serverOf(request), wait = waitOf(context);
  if (server.foundBy) await changeFoundServer(request, server, patch);
  else await editServer(request, (entry) => shortest(merged(entry, patch) as Raw, ...Object.keys(patch)));
  const end = effects.now() + wait;
  while (server.inFlight > 0 && effects.now() < end && !context.req.raw.signal.aborted) await effects.sleep(20);
  return answerServer(request, server, server.state !== "ready");
}

/** Adds a server; which one it is shows when the file has been read. */
async function postServer(request: ApiRequest): Promise<ServerView | ServiceView> {
  const { value } = await bodyOf(request.context);
  let url: string | undefined;
  const edit: Edit = (raw, config) => {
    serviceOf(request); // or 404
    const { place, listed } = listOf(request, raw, config);
    putValue(raw, place, [...listed, value]);
  };
  const check: Check = (next, before) => {
    const name = givenName(request, before), known = before.services.get(name)!.servers.map((one) => one.url);
    url = next.services.get(name)!.servers.find((one) => !known.includes(one.url))?.url;
    if (url === undefined) throw new AdminError(409, `${name} has this server already`);
  };
  await editService(request, edit, check);
  const added = serviceOf(request).servers.find((one) => one.url === url);
  request.context.status(201);
  return added ? answerServer(request, added) : answerService(request); // it is a name
}

async function writeConfig(request: ApiRequest): Promise<unknown> {
  const { context, change } = request, { value, text, isYaml } = await bodyOf(context);
  const replaces = context.req.method === "PUT";
  if (replaces && !context.req.header("if-match")) {
    throw new AdminError(428, "send If-Match with the ETag of GET /config, or *");
  }
  const edit: Edit = (raw) => {
    if (replaces) return isYaml ? text : value;
    return merged(raw, value, longForm(RoutesFile, raw));
  };
  await change(context, edit, (config) => config.text, { replaces });
  return answerConfig(request);
}

const TEXT_TYPE = "text/plain; charset=utf-8";
function answerConfig({ context, balancer }: ApiRequest): unknown {
  const { config } = balancer.table, accept = context.req.header("accept") ?? "";
  const shown = maskSecrets(config.written, hidden);
  context.header("etag", tagOf(config.text));
  if (/[/+]json/.test(accept)) return shown;
  const type = accept.startsWith("text/") ? TEXT_TYPE : "application/yaml"; // which browsers do not show
  return context.body(rewrite(config.text, shown, YAML_OF.get(config)), { headers: { "content-type": type } });
}

/** PythonLoadBalancer's body: a server that is repeated weighs more, and what else is known of one stays. */
async function writePool(request: ApiRequest): Promise<ServiceView> {
  const { servers } = checkedValue(Pool, (await bodyOf(request.context)).value);
  const named = Map.groupBy(servers, ({ addr, port }) => `${isIPv6(addr) ? `[${addr}]` : lower(addr)}:${port}`);
  await editService(request, (raw, config) => {
    const { place, listed, now } = listOf(request, raw, config);
    const pool = Array.from(named, ([name, { length }]) => {
      const known = now.findIndex((one) => hostOf(one.url) === hostOf(v.parse(Url, name).url));
      return shortest({ ...asMap(known < 0 ? name : listed[known]), weight: length }, "weight");
    });
    putValue(raw, place, pool);
  });
  return answerService(request);
}

async function deleteService(request: ApiRequest): Promise<ServiceView> {
  const last = answerService(request);
  await editService(request, (raw, config) => putValue(raw, servicePlace(request, config), undefined));
  return last;
}

async function deleteServer(request: ApiRequest): Promise<ServerView> {
  const server = serverOf(request);
  if (server.foundBy) {
    throw new AdminError(409, `${server.name} was found by ${server.foundBy}: set its state, or take that name out`);
  }
  await editServer(request, () => undefined);
  return answerServer(request, server, true);
}

async function putHealth(request: ApiRequest): Promise<ServerView> {
  const { health } = checkedValue(HealthSchema, (await bodyOf(request.context)).value), server = serverOf(request);
  const { effects } = request.balancer, service = serviceOf(request), isUp = health === "up";
  if (!await effects.fleet?.mark(service, server, health)) setHealth(service, server, isUp);
  reportChange(request.context, effects, [health]);
  return answerServer(request, server);
}

async function checkConfig({ context, parse }: ApiRequest) {
  const { services, routes } = parse((await bodyOf(context)).text);
  return { services: services.size, routes: routes.length };
}

function endWorker({ context: { req }, balancer }: ApiRequest) {
  const id = req.param("worker") ?? "", worker = balancer.workers.get(Number(id));
  if (!worker) throw new AdminError(404, `there is no worker ${quote(id)}`);
  worker.end();
  return { id: Number(id) };
}

function answerReady({ balancer: { draining, effects } }: ApiRequest): { status: string } {
  if (draining) throw new AdminError(503, "draining");
  if (effects.fleet?.isWaiting()) throw new AdminError(503, "waiting for the fleet's document");
  return { status: "ready" };
}

const sendEvents = ({ context, balancer }: ApiRequest) =>
  streamSSE(context, async (stream) => {
    for (; !stream.aborted; await stream.sleep(1_000)) {
      await stream.writeSSE({ data: JSON.stringify(snapshotOf(balancer)) });
    }
  });

const WAIT: Query = { wait: ["how long the answer may wait for requests in flight there; then 202", "30s"] };
const WAIT_FOR_ALL: Query = { wait: ["how long the answer may wait for the instances of a fleet; then 202", "10s"] };
const EXPLAIN: Query = {
  url: ["what is asked for", "http://www.example.com/cart"],
  method: ["default GET", "GET"],
  header: ["one of the request's; may stand several times", "x-canary: 1"],
};
const EXAMPLE_FILE = { default: { servers: ["10.0.0.1:8080"] } };
const EXAMPLE_POOL = { servers: [{ addr: "10.0.0.1", port: 8080 }, { addr: "10.0.0.2", port: 8080 }] };

/** The whole API: its routes and its description are made of this table. GET changes nothing. */
// deno-fmt-ignore
const OPERATIONS = [
  endpoint("POST /", "Changes the servers of the default service, or of the only one; one that is repeated weighs more",
    "ServiceState", writePool, { takes: ["Pool", EXAMPLE_POOL] }),

  endpoint("GET /services", "All services and their servers", "Snapshot", ({ balancer }) => snapshotOf(balancer)),
  endpoint("GET /services/{service}", "One service, and how it is written", "ServiceState", answerService),
  endpoint("POST /services/{service}", "A new service", "ServiceState", writeService,
    { takes: ["Service", { servers: ["10.0.0.9:80"] }], gives: [201] }),
  endpoint("PUT /services/{service}", "A service, new or in the place of the one there is", "ServiceState", writeService,
    { takes: ["Service", { servers: ["10.0.0.1:8080"], strategy: "random" }], gives: [200, 201] }),
  endpoint("PATCH /services/{service}", "Changes some keys of a service (RFC 7396: null takes one out)",
    "ServiceState", writeService, { takes: ["Settings", { strategy: "random", retries: null }] }),
  endpoint("DELETE /services/{service}", "Takes a service out; requests in flight there finish",
    "ServiceState", deleteService),

  endpoint("GET /services/{service}/servers", "The servers of a service", "Servers",
    (request) => serverViews(serviceOf(request), request.balancer.effects.now())),
  endpoint("POST /services/{service}/servers", "A further server", "ServerState", postServer,
    { takes: ["Server", { url: "10.0.0.4:8080", weight: 2 }], gives: [201] }),
  endpoint("GET /services/{service}/servers/{server}", "One server, by its name or URL", "ServerState",
    (request) => answerServer(request)),
  endpoint("PATCH /services/{service}/servers/{server}", "Changes a server: its weight, say", "ServerState",
    async (request) => patchServer(request, mapOf((await bodyOf(request.context)).value)),
    { takes: ["ServerPatch", { weight: 3 }], asks: WAIT, gives: [200, 202] }),
  endpoint("DELETE /services/{service}/servers/{server}",
    "Takes a server out; requests in flight there finish (drain it first to wait for them)",
    "ServerState", deleteServer, { gives: [200, 202] }),
  endpoint("PUT /services/{service}/servers/{server}/state",
    "ready, drain (no new requests, those in flight finish) or maint (no probes either)", "ServerState",
    async (request) => patchServer(request, checkedValue(State, (await bodyOf(request.context)).value)),
    { takes: ["State", { state: "drain" }], asks: WAIT, gives: [200, 202] }),
  endpoint("PUT /services/{service}/servers/{server}/health",
    "Says that a server is up or down, until probes say otherwise; this is not saved",
    "ServerState", putHealth, { takes: ["Health", { health: "down" }] }),

  endpoint("GET /config", "routes.yml, as YAML or JSON; secrets as ***", "Config", answerConfig),
  endpoint("PUT /config", "Another routes.yml; needs If-Match", "Config", writeConfig,
    { takes: ["Config", EXAMPLE_FILE], asks: WAIT_FOR_ALL }),
  endpoint("PATCH /config", "Changes some keys of routes.yml (RFC 7396: null takes one out)",
    "Config", writeConfig, { takes: ["Config", { log: "json" }], asks: WAIT_FOR_ALL }),
  endpoint("POST /config/check", "Checks a routes.yml and changes nothing", "Checked", checkConfig,
    { takes: ["Config", EXAMPLE_FILE] }),

  endpoint("GET /routes", "All routes, in the order of the file", "Routes", ({ balancer }) => routeViews(balancer)),
  endpoint("GET /explain", "Which route a request would take, which services, which servers and why not the others, and who would take it",
    "Explanation", ({ context: { req }, balancer }) =>
      explain(balancer, req.query("method") ?? "GET", req.query("url") ?? "", req.queries("header")), { asks: EXPLAIN }),
  endpoint("GET /metrics", "Everything that is counted, for Prometheus", "Text",
    ({ context, balancer }) => context.body(renderMetrics(samplesOf(balancer)), 200, { "content-type": METRICS_TYPE })),
  endpoint("GET /connections", "What is in flight, and where", "Connections",
    ({ balancer }) => v.parse(ConnectionsSchema, snapshotOf(balancer))),
  endpoint("GET /workers", "The threads that serve, if there are some", "Workers", ({ balancer }) => workersView(balancer)),
  endpoint("DELETE /workers/{worker}", "Ends a thread at once, with what is in flight there; another one takes its place",
    "Worker", endWorker),
  endpoint("GET /fleet", "The fleet: its engine, its instances, and which of them probe which server", "Fleet",
    ({ balancer }) => fleetView(balancer)),
  endpoint("GET /events", "What GET /services says, once a second (Server-Sent Events)", "Events", sendEvents),
  endpoint("GET /health/live", "200 as long as it runs", "Status", () => ({ status: "live" }), { open: true }),
  endpoint("GET /health/ready", "200; 503 as soon as it drains, and while it waits for the first document of its fleet",
    "Status", answerReady, { open: true }),
  endpoint("GET /version", "Of lb.ts, and where it runs", "Version",
    ({ balancer }) => ({ version: VERSION, runtime: balancer.runtime })),
];

/** JSON on many lines, but for lists of numbers. */
const prettyJson = (value: unknown): string =>
  JSON.stringify(value, null, 2).replace(/\[\n[\d.,\s]+\]/g, (list) => list.replace(/\s+/g, " "));

/** Runs an operation. Its answer is JSON on one line, on many with `?pretty`, or text for `Accept: text/plain`. */
async function runOperation({ answers, run }: Operation, request: ApiRequest): Promise<Response> {
  const { context } = request, { req } = context, value = await run(request);
  const missing = context.get("missing") ?? []; // the client has waited for all, and these have not made the change
  if (missing.length) return context.json({ missing }, 202);
  if (value instanceof Response) return value; // which is no JSON, or a problem
  const isText = /^text\/plain\b/.test(req.header("accept") ?? "");
  const text = TEXTS[answers] as ((value: unknown) => string) | undefined ?? stringify;
  const json = req.query("pretty") === undefined ? JSON.stringify(value) : prettyJson(value);
  context.header("content-type", isText ? TEXT_TYPE : "application/json");
  return context.body(`${isText ? text(value).trimEnd() : json}\n`);
}

/** Adds the operations that everybody may use, or the others. */
function addRoutes(app: Hono<AdminEnv>, isOpen: boolean, known: Omit<ApiRequest, "context">): void {
  for (const one of OPERATIONS.filter(({ open }) => open === isOpen)) {
    app.on(one.method, one.path.replace(/{(\w+)}/g, ":$1"), (context) => runOperation(one, { context, ...known }));
  }
}

// --- 11.5 API description: OpenAPI and a page, from the operations and the schemas of bodies and answers ---

const ref = (kind: string, name: string) => ({ $ref: `#/components/${kind}/${name}` });
const parameter = (place: "path" | "query" | "header", name: string, description: string, example?: string) => {
  return { name, in: place, description, required: place === "path", schema: ref("schemas", "Text"), example };
};
const EXAMPLE_NAMES: Record<string, string> = { service: "shop", server: "10.0.0.1:8080", worker: "1" };

const GROUPS: Record<string, string> = {
  ...{ "": "Services", services: "Services", config: "Config", routes: "Routing", explain: "Routing" },
};
const groupOf = ({ path }: Operation): string => GROUPS[path.split("/")[1]!] ?? "Watching";
const TYPES: Partial<Record<keyof typeof BODIES, string>> = { Text: "text/plain", Events: "text/event-stream" };

const DONE: Record<number, string> = { 200: "done", 201: "made", 202: "done, and requests are still in flight there" };

/** One operation as OpenAPI has it. */
function described(one: Operation) {
  const { method, path, does, answers, takes, asks, gives, open } = one, isGet = method === "GET";
  const names = Array.from(path.matchAll(/{(\w+)}/g), ([, name]) => name!);
  const content = { [TYPES[answers] ?? "application/json"]: { schema: ref("schemas", answers) } };
  const body = takes && { schema: ref("schemas", takes[0]), example: takes[1] };
  return {
    tags: [groupOf(one)],
    summary: does,
    operationId: `${lower(method)}${path.replace(/\W+(\w)/g, (_, letter) => upper(letter)).replace(/\W/g, "")}`,
    parameters: [
      ...names.map((name) => parameter("path", name, `name of the ${name}`, EXAMPLE_NAMES[name])),
      ...Object.entries(asks).map(([name, [about, example]]) => parameter("query", name, about, example)),
      ...(isGet ? [] : [parameter("header", "If-Match", "the ETag that the change is meant for")]),
    ],
    ...(body && { requestBody: { required: true, content: { "application/json": body, "application/yaml": body } } }),
    responses: {
      ...Object.fromEntries(gives.map((status) => [status, { description: DONE[status]!, content }])),
      default: ref("responses", "Problem"),
    },
    security: open ? [] : [{ token: [] }, ...(isGet ? [{ read_token: [] }] : []), {}],
  };
}

const CONVENTIONS =
  "Bodies are JSON or YAML, by Content-Type. Answers are JSON, with ?pretty on many lines, and text " +
  "for Accept: text/plain. What is wrong comes as application/problem+json (RFC 9457). With a token in routes.yml: " +
  "Authorization: Bearer ...";
/** The API as OpenAPI 3.1 describes it. */
function openApi() {
  const paths: Record<string, Record<string, ReturnType<typeof described>>> = {};
  for (const one of OPERATIONS) {
    const methods = paths[one.path] ??= {};
    methods[lower(one.method)] = described(one);
  }
  const scheme = (description: string) => ({ type: "http", scheme: "bearer", description });
  const content = { "application/problem+json": { schema: ref("schemas", "Problem") } };
  return {
    openapi: "3.1.0",
    info: { title: "lb.ts", version: VERSION, description: CONVENTIONS },
    servers: [{ url: "./" }],
    tags: [...new Set(OPERATIONS.map(groupOf))].map((name) => ({ name })),
    paths,
    components: {
      schemas: schemasOf(BODIES),
      responses: { Problem: { description: "what is wrong", content } },
      securitySchemes: {
        token: scheme("admin.token of routes.yml; where it is not set, none is needed"),
        read_token: scheme("admin.read_token of routes.yml, which opens GET only"),
      },
    },
  };
}

/** What the docs and the dashboard look like. */
const STYLE = `
:root {
  --ground: light-dark(#f4f5f3, #111215); --card: light-dark(#fff, #1a1c20); --line: light-dark(#e2e3de, #2e3137);
  --ink: light-dark(#1c1e22, #e8e8e5); --dim: light-dark(#5a606b, #a3a9b5); --blue: light-dark(#1a5fb4, #8ab4f8);
  --good: light-dark(#0a6b3b, #63d69d); --warn: light-dark(#7d4b00, #f2b84f); --bad: light-dark(#b3201a, #ff8f85);
  color-scheme: light dark;
  font: 14px/1.45 system-ui, sans-serif;
}
* { box-sizing: border-box; margin: 0; padding: 0; font: inherit; color: inherit; }
body { padding: 16px clamp(12px, 2vw, 32px) 32px; background: var(--ground); color: var(--ink); }
main { display: grid; grid-template-columns: minmax(0, 1fr); gap: 16px; margin: auto; }
h1, h2, b, th, summary code { font-weight: 600; }
details, figure, dialog, .card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
summary, figure, .card { padding: 10px 16px; }
summary, button { cursor: pointer; }
a { color: var(--blue); }
header, nav, figcaption, menu { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: baseline; gap: 4px 16px; }
h1 { font-size: 18px; }
table { width: 100%; table-layout: fixed; border-spacing: 0; }
th, td { padding: 6px 8px; border-top: 1px solid var(--line); text-align: left; vertical-align: top; }
:is(th, td):first-child { padding-left: 16px; } :is(th, td):last-child { padding-right: 16px; }
th, td, code, pre { overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, monospace; white-space: pre-wrap; }
small, thead th { color: var(--dim); font-size: 12px; font-weight: 400; }
:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; border-radius: 3px; }
`;

/**
 * Answers with a page. Nothing but the style and the script that stand in it may run there, and it connects to nobody but
 * this listener.
 */
function answerPage(context: AdminContext, title: string, style: string, body: unknown, script?: string) {
  const nonce = crypto.randomUUID().replaceAll("-", "");
  context.header(
    "content-security-policy",
    `default-src 'none'; script-src 'nonce-${nonce}'; style-src 'nonce-${nonce}'; connect-src 'self'; img-src data:; ` +
      "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
  );
  // deno-fmt-ignore
  return context.html(html`<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>${title}</title>
<link rel="icon" href="data:,">
<style nonce="${nonce}">${raw(STYLE + style)}</style>
<body>${body}${script && html`<script nonce="${nonce}">${raw(script)}</script>`}</body>
</html>`);
}

/** The keys of a body or an answer, in all of its alternatives, and what they mean. */
function keysIn(schema: Schema): string[][] {
  const { type, entries = {}, options = [], item, wrapped } = partsOf(schema);
  const refer: Refer = (one, key) => schemaJson(one, () => ({}), key);
  const own = Object.entries(entries).map(([name, one]) => {
    const { description, enum: values, default: usual } = schemaJson(one as Schema, refer, name);
    const text = description ?? (Array.isArray(values) ? values.join(", ") : "");
    return [name, usual === undefined ? `${text}` : `${text} (default ${JSON.stringify(usual)})`];
  });
  const parts = [...(type === "picklist" ? [] : options), item, wrapped].filter((one) => one !== undefined);
  return [...own, ...parts.flatMap(keysIn)];
}

/** Links to pages of this listener, and to its texts but where a token is needed: a link has none. */
function linksTo(pages: Record<string, string>, { tokens }: Balancer) {
  const all = { ...pages, ...(tokens.token ? {} : { metrics: "Metrics", config: "Config" }) };
  return html`<nav>${Object.entries(all).map(([at, name]) => html`<a href="${at}">${name}</a>`)}</nav>`;
}

const DOCS_STYLE = `
main { max-width: 900px; gap: 8px; } h2 { margin-top: 12px; }
td:first-child { width: 30%; }
details > :is(p, pre) { margin: 8px 16px; }
details pre { padding: 8px; max-height: 300px; overflow: auto; border: 1px solid var(--line); border-radius: 6px; }
`;

/** The command that sends an operation its example. */
function curlOf({ method, path, takes, asks }: Operation): string {
  const target = path.replace(/{(\w+)}/g, (_, name) => EXAMPLE_NAMES[name]!);
  const asked = new URLSearchParams(Object.entries(asks).map(([name, [, example]]) => [name, example]));
  const query = asked.size ? `?${asked}` : "", data = takes ? ` -d '${JSON.stringify(takes[1])}'` : "";
  return `curl ${method === "GET" ? "" : `-X ${method} `}'localhost:9090${target}${query}'${data}`;
}

/** One operation: a line that opens to its parameters, the keys of its body and of its answer, and a command. */
// deno-fmt-ignore
function docsOf(one: Operation) {
  const { method, path, does, answers, takes, gives } = one, { parameters } = described(one);
  const table = (rows: string[][]) => html`<table>${rows.map(([key, text]) =>
    html`<tr><td><code>${key}</code></td><td>${text}</td></tr>`)}</table>`;
  const asked = parameters.map(({ name, description, in: place }) => [name, `${description} (${place})`]);
  return html`
<details>
  <summary><code>${method} ${path}</code> ${does}</summary>
  ${table([...asked, ...(takes ? keysIn(BODIES[takes[0]]) : [])])}
  <pre>${curlOf(one)}</pre>
  <p>${gives.join(", ")}</p>
  ${table(keysIn(BODIES[answers]))}
</details>`;
}

/** The API for people. */
function docsPage(balancer: Balancer) {
  const links = linksTo({ "./": "Dashboard", "openapi.json": "openapi.json" }, balancer);
  const groups = Map.groupBy(OPERATIONS, groupOf);
  return html`
    <main>
      <header><h1>lb.ts ${VERSION}: API</h1>${links}</header>
      <p>${CONVENTIONS}</p>
      ${Array.from(groups, ([name, all]) => html`<h2>${name}</h2>${all.map(docsOf)}`)}
    </main>
  `;
}

/** The description as a page and for machines. */
function addDocs(app: Hono<AdminEnv>, balancer: Balancer): void {
  let known: ReturnType<typeof openApi> | undefined; // it takes 10 ms
  app.get("/openapi.json", (context) => context.json(known ??= openApi()));
  app.get("/docs", (context) => answerPage(context, "lb.ts: API", DOCS_STYLE, docsPage(balancer)));
}

// --- 11.6 Dashboard: rendered here; its script only fetches it again and again, and sends what is to be done ---

const DASHBOARD_STYLE = `
main { max-width: 1600px; }
p:empty, ul:empty, [hidden] { display: none !important; }
.good { --tone: var(--good); } .warn { --tone: var(--warn); } .bad { --tone: var(--bad); }
.tone, [data-title=State] { color: var(--tone, var(--ink)); }
.lost > :not(header) { opacity: 0.45; }
header .card { flex-basis: 100%; margin-top: 8px; border-left: 4px solid var(--tone, var(--line)); }
#verdict { font-size: clamp(18px, 2.4vw, 22px); font-weight: 600; }
#troubles { max-height: 200px; margin-top: 8px; padding-left: 18px; overflow: auto; list-style: "▲ "; } li.bad { list-style: "✕ "; }
li a { color: inherit; } li a:not(:hover) { text-decoration: none; }
#charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 16px; }
b { flex-basis: 100%; font-size: 20px; }
svg { display: block; width: 100%; height: 56px; border-bottom: 1px solid var(--line); }
path { fill: none; stroke: var(--blue); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
path + path { stroke: var(--dim); stroke-dasharray: 3 3; }
.bar, .facts, label { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 16px; }
.bar > input { flex: 1; min-width: 0; } #problems { accent-color: var(--blue); }
input, button { padding: 6px 10px; border: 1px solid var(--line); border-radius: 6px; background: var(--card); }
#services { display: grid; gap: 8px; } #services:empty, table:not(:has(td)) { display: none; }
details { overflow: clip; } summary h2 { display: inline; } h2 small { margin-left: 8px; }
details > p, details > .bar, #answer { margin: 0 16px 12px; }
section :is(th, td) { font-variant-numeric: tabular-nums; }
section :is(th, td):nth-child(n + 4) { padding-inline: 4px; text-align: right; white-space: nowrap; }
section th:first-child { width: 16%; } section th:nth-child(2) { width: 9%; } section th:nth-child(3) { width: 12%; }
section :is(th, td):last-child { padding-right: 16px; } section th.change { width: 204px; }
tr:is(.bad, .warn) { box-shadow: inset 3px 0 var(--tone); } tr:target { outline: 2px solid var(--blue); outline-offset: -2px; }
td small, th small { display: block; }
td button { padding: 2px 7px; margin-left: 4px; color: var(--blue); font-size: 12px; }
dialog { width: min(440px, calc(100% - 32px)); margin: auto; padding: 24px; }
dialog form { display: grid; gap: 16px; } ::backdrop { background: #0008; }
#go { border-color: var(--blue); color: var(--blue); }
@media (max-width: 1280px) {
  section thead { display: none; }
  section tbody { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); }
  section tbody tr { display: grid; grid-template-columns: repeat(4, 1fr); align-content: start; padding: 6px 8px; border-top: 1px solid var(--line); }
  section tr > :is(th, td):nth-child(n) { width: auto; padding: 3px 8px; border: 0; text-align: left; }
  section th:first-child { grid-column: span 4; } section td:nth-child(-n + 3) { grid-column: span 2; }
  section td.change { grid-column: span 3; align-self: end; } td button { padding: 6px 10px; margin: 0 4px 0 0; }
  section td::before { content: attr(data-title); display: block; color: var(--dim); font-size: 12px; }
}
`;

/** What was counted at a moment; those of the last 30 seconds also have the counters of services and servers. */
interface Sample {
  time: number; // seconds
  total: CountersView;
  counters?: Map<string, CountersView>;
}
type CountersView = ReturnType<typeof COUNTERS_VIEW.read>;
const HISTORY = { interval: 2_000, most: 150, recent: 15 }; // milliseconds between samples, and how many are kept

const adminPath = (service: string, server?: string): string =>
  ["services", service, ...(server === undefined ? [] : ["servers", server])].map(encodeURIComponent).join("/");

const sampleOf = ({ time, total, services }: Snapshot): Sample => ({
  ...{ time, total },
  counters: new Map(services.flatMap(({ name, counters, servers }) => [
    [adminPath(name), counters] as const,
    ...servers.map((server) => [adminPath(name, server.name), server.counters] as const),
  ])),
});

/** What was counted between two moments, as figures; all that was counted if the counters began again. */
function figuresOf(now: CountersView, then: CountersView | undefined, time: number) {
  const since = then && then.requests <= now.requests ? then : { requests: 0, errors: 0, durations: [] };
  const requests = now.requests - since.requests;
  const durations = now.durations.map((n, i) => n - (since.durations[i] ?? 0));
  const upTo = (share: number) => requests > 0 ? quantile({ requests, durations }, share) : undefined;
  const failed = requests > 0 ? (now.errors - since.errors) / requests : undefined;
  return { rate: requests / Math.max(1, time), failed, p50: upTo(0.5), p95: upTo(0.95), p99: upTo(0.99) };
}
type Figures = ReturnType<typeof figuresOf>;

const CHARTS: [title: string, format: (value: number | undefined) => string, ...names: (keyof Figures)[]][] = [
  ["Requests", FORMAT.rate, "rate"],
  ["Requests that failed", FORMAT.percent, "failed"],
  ["Latency: p50, p99", FORMAT.time, "p50", "p99"],
];
function chartsOf(history: Sample[], snapshot: Snapshot) {
  const samples = [...history, snapshot].slice(-HISTORY.most);
  const points = samples.slice(1).map(({ time, total }, i) => {
    const then = samples[Math.max(0, i - 4)]!; // ten seconds before, so that a few requests are no peak
    return figuresOf(total, then.total, time - then.time);
  });
  return CHARTS.map(([title, format, ...names]) => {
    const most = Math.max(0, ...points.flatMap((point) => names.map((name) => point[name] ?? 0)));
    const lines = names.map((name) =>
      points.map(({ [name]: value }, i) => {
        if (value === undefined) return "";
        const pen = points[i - 1]?.[name] === undefined ? "M" : "L"; // after a gap the line begins again
        return `${pen}${2 * (HISTORY.most - points.length + i)} ${(54 - 52 * value / (most || 1)).toFixed(1)}`;
      }).join("")
    );
    const now = names.map((name) => format(points.at(-1)?.[name])).join(", "), top = `max ${format(most)} in 5 min`;
    // deno-fmt-ignore
    return html`<figure><figcaption><span>${title}</span><small>${top}</small><b>${now}</b></figcaption>
<svg viewBox="0 0 300 56" preserveAspectRatio="none" role="img" aria-label="${title}: now ${now}, ${top}">
${lines.map((d) => html`<path d="${d}"/>`)}</svg></figure>`;
  });
}

// Services and servers: first what is to be shown of them, then the HTML.

/** What is wrong, and the id of what it is about; empty: of nothing on the page. */
type Trouble = { level: "bad" | "warn"; text: string; at: string };

/** The instances of a fleet that probe a server, and which of them disagree with what most say. */
function probersIn(fleet?: FleetView): (server: string, up: boolean) => string {
  const probers = new Map(fleet?.probes.map(({ server, by }) => [server, by]));
  const down = new Map(fleet?.instances.map((one) => [one.name, new Set(one.down)]));
  return (server, up) => {
    const names = probers.get(server)?.map((name) => down.get(name)?.has(server) === up ? `${name} (disagrees)` : name);
    return names ? `by ${names.join("; ")}` : "";
  };
}

/**
 * A service with its servers, how they do, and what is wrong with them. `id` is also a path in the API; `now` are the figures
 * of the last 30 seconds.
 */
function shownOf(service: ServiceView, snapshot: Snapshot, history: Sample[], probedBy: ReturnType<typeof probersIn>) {
  const { name, counters, askable, panicking, names } = service, since = history.find((sample) => sample.counters);
  const time = since ? snapshot.time - since.time : snapshot.uptime;
  const recently = (id: string, counters: CountersView) => figuresOf(counters, since?.counters?.get(id), time);
  const servers = service.servers.map((server) => {
    const id = adminPath(name, server.name), now = recently(id, server.counters), state = stateOf(server, now.failed);
    const level: Level = STATES[state][1], probers = probedBy(`${name} ${server.url}`, server.up);
    return { server, id, now, state, level, probers };
  });
  const id = adminPath(name), now = recently(id, counters), troubles: Trouble[] = [];
  const say = (level: Trouble["level"], what: string, at = id) =>
    troubles.push({ level, text: `${name}: ${what}`, at });
  if (servers.length + names.length > 0 && !askable) say("bad", "no server may be asked");
  for (const { name, problem, stale_for } of names) {
    if (problem) say("warn", `DNS has had no good answer for ${name} for ${FORMAT.age(stale_for ?? 0)}: ${problem}`);
  }
  if (panicking) say("bad", "too few servers are healthy: all of them are asked");
  if ((now.failed ?? 0) > FAILING) say("bad", "more than 5 % of the requests fail");
  for (const { server, state, level, id } of servers) {
    const reason = server.check?.problem ? `: ${server.check.problem}` : "";
    if (server.state === "ready" && isTrouble(level)) say("warn", `${server.name} is ${state}${reason}`, id);
  }
  return { service, id, now, servers, troubles };
}
type ShownService = ReturnType<typeof shownOf>;
type ShownServer = ShownService["servers"][number];
type Level = "good" | "warn" | "bad" | "";
const isTrouble = (level: Level): boolean => level === "bad" || level === "warn";

/** Why an instance lacks the fleet's newest document, or which one it has in its place; empty: it has the newest. */
function lagOf({ problem, config }: InstanceView, { instances }: FleetView): string {
  const isNewest = instances.every((one) => one.config <= config);
  return problem || (isNewest ? "" : `revision ${config}`);
}

function fleetSection(fleet: FleetView, flipped: Set<string>) {
  const { engine, name, config, instances } = fleet;
  const rows = instances.map((one) => {
    const self = one.name === name ? " (this one)" : "", runs = `lb.ts ${one.version} on ${one.runtime}`;
    const lag = lagOf(one, fleet), cells = [one.name + self, runs, one.since, lag || "the newest", one.down.join(", ")];
    return html`<tr class="${lag && "warn"}">${cells.map((text) => html`<td>${text}</td>`)}</tr>`;
  });
  const facts = [`its engine ${engine === "away" ? "is away" : "answers"}`, `instances: ${instances.length}`];
  // deno-fmt-ignore
  return html`<details id="fleet" ${flipped.has("fleet") ? "" : "open"}>
<summary><h2><span>Fleet</span><small>${[...facts, `document of revision ${config}`].join(" · ")}</small></h2></summary>
<table><thead><tr><th>Instance</th><th>Runs</th><th>Since</th><th>Document</th><th>Finds down</th></tr></thead>
<tbody>${rows}</tbody></table></details>`;
}

const SOON = 14 * 86_400_000; // milliseconds before a certificate's end from which on it is a trouble
const dayOf = (date: Date): string => date.toISOString().slice(0, 10);
/** What is wrong with the program and with its fleet. */
function troublesOf({ listeners, reloads }: Snapshot, fleet: FleetView | undefined, date: Date): Trouble[] {
  const troubles: Trouble[] = [];
  const say = (level: Trouble["level"], text: string, at = "") => troubles.push({ level, text, at });
  if (reloads.failed) say("bad", "the file on disk could not be put in force: what is shown here stays in force");
  for (const { names, until } of listeners.flatMap((one) => one.certificates)) {
    const certificate = `the certificate for ${names.join(", ")}`;
    if (until < date) say("bad", `${certificate} has ended on ${dayOf(until)}`);
    else if (+until < +date + SOON) say("warn", `${certificate} ends on ${dayOf(until)}`);
  }
  if (fleet?.engine === "away") {
    say("warn", `the fleet's engine does not answer: ${fleet.problem || "nothing has been heard of it"}`, "fleet");
    return troubles;
  }
  for (const one of fleet?.instances ?? []) {
    const lag = lagOf(one, fleet!);
    if (lag) say("warn", `${one.name} lacks the fleet's newest document: ${lag}`, "fleet");
  }
  return troubles;
}

/** What may be done to a server: its state is set, or its weight. */
const SERVER_ACTIONS = {
  ready: "Requests and probes go to it again.",
  drain: "No new requests go to it; those in flight finish. Probes go on.",
  maint: "Neither requests nor probes go to it.",
  weight: "Its share of new requests, from 0 (none) to 256.",
};
function buttonsOf({ service, servers }: ShownService, { server }: ShownServer) {
  const isLast = !servers.some((other) => other.level === "good" && other.server !== server);
  const actions = Object.entries(SERVER_ACTIONS).filter(([action]) => action !== server.state);
  return actions.map(([action, means]) => {
    const alone = isLast && /drain|maint/.test(action) ? ` No other server of ${service.name} is up!` : "";
    // deno-fmt-ignore
    return html`<button name="${action}" value="${server.weight}" title="${means}${alone}"
aria-label="${action} ${server.name}">${action}</button>`;
  });
}

/** What stands below a server's state. */
function stateDetail({ server, state }: ShownServer): string {
  if (state === "paused") return `for another ${FORMAT.age(server.paused_for)}`;
  if (state === "failing") return `${FORMAT.percent(server.failing)} failed`;
  return state === "unchecked" ? "not asked yet" : `for ${FORMAT.age(server.status_for)}`;
}
function checkDetail({ server: { check }, probers }: ShownServer): string {
  const own = check && `${FORMAT.age(check.ago)} ago, took ${FORMAT.time(1_000 * check.took)}`;
  return [own, probers].filter(Boolean).join(" · ");
}

/** What each column shows of a server: a figure, and a detail below it. */
// deno-fmt-ignore
const COLUMNS: Record<string, (shown: ShownServer) => [figure: string, detail?: string]> = {
  "Server": ({ server: { name, backup, found_by } }) => [name, [backup ? "backup" : "", found_by].filter(Boolean).join(" · ")],
  "State": (shown) => [`${STATES[shown.state][0]} ${shown.state}`, stateDetail(shown)],
  "Last check": (shown) => [shown.server.check ? shown.server.check.problem || "passed" : "–", checkDetail(shown)],
  "Weight": ({ server }) => [`${server.weight}`, FORMAT.percent(server.share)],
  "In flight": ({ server }) => [FORMAT.count(server.in_flight)],
  "Requests": ({ server, now }) => [FORMAT.count(server.counters.requests), FORMAT.rate(now.rate)],
  "Errors": ({ server, now }) => [FORMAT.count(server.counters.errors), now.failed ? FORMAT.percent(now.failed) : ""],
  "Retries": ({ server }) => [FORMAT.count(server.retries)],
  "p50": ({ now }) => [FORMAT.time(now.p50)],
  "p95": ({ now }) => [FORMAT.time(now.p95)],
  "p99": ({ now }) => [FORMAT.time(now.p99)],
  "Bytes out": ({ server: { counters: c } }) => [FORMAT.bytes(c.bytes_out), `${FORMAT.bytes(c.bytes_in)} in`],
};

/** What the user of the page has chosen. */
const chosenOf = ({ req, get }: AdminContext) => ({
  mayChange: get("shown") !== "read token",
  find: lower(req.query("find") ?? "").trim(),
  onlyProblems: req.query("problems") === "true",
  flipped: new Set(req.queries("flip")), // ids of what is folded that would be open, or open that would be folded
  explain: req.query("explain") ?? "", // a request
});
type Chosen = ReturnType<typeof chosenOf>;

const FEW = 8; // services up to which all of them are open
const WHOLE = 100; // servers of a service with all figures: a thousand would take 30 ms, in which no request is served
/** A service, and those of its servers that are looked for; nothing where there is none. */
function serviceSection(shown: ShownService, { find, onlyProblems, flipped, mayChange }: Chosen, isFew: boolean) {
  const { service: { name, strategy, waiting, in_flight }, id, now, servers, troubles } = shown, fold = `fold:${id}`;
  const isAllTrouble = troubles.some(({ at }) => at === id);
  const found = servers.filter(({ server, state, level }) =>
    lower(`${name} ${server.name} ${server.status} ${state}`).includes(find) &&
    (!onlyProblems || isTrouble(level) || isAllTrouble)
  );
  if (!found.length && (servers.length > 0 || !lower(name).includes(find))) return []; // or none is known yet
  const isOpen = (isFew || troubles.length > 0 || find !== "") !== flipped.has(fold), level = troubles[0]?.level ?? "";
  const facts = [strategy, `${servers.filter(({ state }) => state === "up").length} of ${servers.length} up`];
  facts.push(`${in_flight} in flight`, ...(waiting ? [`${waiting} waiting`] : []), FORMAT.rate(now.rate));
  facts.push(`${FORMAT.percent(now.failed ?? 0)} errors`, `p99 ${FORMAT.time(now.p99)}`);
  const rows = (isOpen ? found : []).map((one, i) => {
    const cells = Object.entries(COLUMNS).slice(0, i < WHOLE ? undefined : 2).map(([title, textsOf], column) => {
      const [figure, detail = ""] = textsOf(one), inside = html`<span>${figure}</span><small>${detail}</small>`;
      return column ? html`<td data-title="${title}">${inside}</td>` : html`<th scope="row">${inside}</th>`;
    });
    const change = i < WHOLE && mayChange ? html`<td class="change">${buttonsOf(shown, one)}</td>` : "";
    return html`<tr id="${one.id}" class="${one.level}">${cells}${change}</tr>`;
  });
  const titles = Object.keys(COLUMNS).map((title) => html`<th>${title}</th>`);
  const note = rows.length > WHOLE ? `The figures of the first ${WHOLE} are shown: find others by their names.` : "";
  // deno-fmt-ignore
  return html`<section id="${id}"><details id="${fold}" ${isOpen ? "open" : ""}>
<summary><h2><span class="tone ${level}">${level && "▲ "}${name}</span><small>${facts.join(" · ")}</small></h2></summary>
<table><thead><tr>${titles}${mayChange ? html`<th class="change">Change</th>` : ""}</tr></thead><tbody>${rows}</tbody></table>
<p>${note}</p></details></section>`;
}

// Routes, and the page.

function routeRow(route: RouteView) {
  const { name, methods, hosts, headers, query, services, redirect, respond } = route;
  const signs: Raw = { prefix: "", exact: "= ", regex: "~ " };
  const paths = route.paths.flatMap((one) => Object.entries(one)).map(([kind, path]) => `${signs[kind]}${path}`);
  const rules = [methods, hosts, paths, [...headers, ...query]].map((list) => list.join(", ")).filter(Boolean);
  const match = route.default ? "all else" : rules.join(" ") || "everything";
  const targets = services?.map(({ service, weight }) => services.length > 1 ? `${weight} ${service}` : service);
  const target = targets?.join(", ") ?? (redirect ? `redirect ${redirect}` : `answer ${respond}`);
  return html`<tr>${[name, match, target].map((text) => html`<td>${text}</td>`)}</tr>`;
}

/** In one line: how many servers are up. */
function verdictOf(servers: ShownServer[]): string {
  const count = (fits: (one: ShownServer) => boolean) => servers.filter(fits).length;
  const up = count(({ state }) => state === "up"), all = FORMAT.count(servers.length);
  if (!servers.length) return "No servers yet";
  if (up === servers.length) return `All servers are up: ${all}`;
  const aside = count(({ server }) => server.state !== "ready"),
    unchecked = count(({ state }) => state === "unchecked");
  const others = `${aside ? `, ${FORMAT.count(aside)} set aside` : ""}${
    unchecked ? `, ${FORMAT.count(unchecked)} unchecked` : ""
  }`;
  return `${FORMAT.count(up)} of ${all} servers are up${others}`;
}

/** Where it listens, since when, and with what. */
function programFacts(snapshot: Snapshot, { mayChange }: Chosen): string[] {
  const { version, runtime, uptime, workers, reloads, listeners, draining } = snapshot;
  const addresses = listeners.map(({ protocol, address, certificates }) => {
    const ends = certificates.map(({ names, until }) => `${names.join(", ")} until ${dayOf(until)}`).join("; ");
    return `${protocol}://${address}${ends && ` (certificate ${ends})`}`;
  });
  return [
    ...[`lb.ts ${version} on ${runtime}`, draining ? "draining" : `up ${FORMAT.age(uptime)}`],
    ...(workers.length ? [`workers: ${workers.length}`] : []),
    ...[reloads.count ? `last reload ${FORMAT.age(reloads.ago)} ago` : "no reload yet", ...addresses],
    ...(mayChange ? [] : ["read token: nothing can be changed here"]),
  ];
}

/** What would become of a request, in words: `GET http://host/path`, or a path alone. */
function explainText(balancer: Balancer, line: string): string {
  try {
    const found = explainLine(balancer, line.replace(/^([A-Z]+ )?\//, "$1http://localhost/"));
    return found ? explanationText(found) : `${quote(line)} is not a request such as GET http://host/path`;
  } catch (error) {
    return (error as Error).message;
  }
}

const SIGNS = { good: "●", warn: "▲", bad: "✕", "": "○" };
/** All that changes, as the script puts it in place: elements have either elements in them or text. */
function liveView(balancer: Balancer, history: Sample[], chosen: Chosen) {
  const snapshot = snapshotOf(balancer), { services, routes } = snapshot, { find, onlyProblems, flipped } = chosen;
  const fleet = balancer.effects.fleet?.view(), probedBy = probersIn(fleet);
  const all = services.map((service) => shownOf(service, snapshot, history, probedBy));
  const servers = all.flatMap((one) => one.servers);
  const troubles = [troublesOf(snapshot, fleet, balancer.effects.date()), ...all.map((one) => one.troubles)].flat()
    .sort((a, b) => a.level.localeCompare(b.level)); // bad before warn
  const isKnown = servers.every(({ state }) => state !== "unchecked");
  const level = troubles[0]?.level ?? (isKnown && servers.length ? "good" : "");
  const isFew = services.length <= FEW, sections = all.flatMap((one) => serviceSection(one, chosen, isFew));
  const nothing = `No ${onlyProblems ? "problem" : "server"}${find && ` matches "${find}"`}.`;
  const none = services.length ? nothing : "There is no service yet. The API adds one, and so does routes.yml.";
  const answer = chosen.explain && explainText(balancer, chosen.explain);
  // deno-fmt-ignore
  return html`<main id="live">
<header><h1>lb.ts</h1>${linksTo({ docs: "API" }, balancer)}
<div class="card ${level}"><p id="verdict" class="tone" role="status">${SIGNS[level]} ${verdictOf(servers)}</p>
<p class="facts">${programFacts(snapshot, chosen).map((fact) => html`<small>${fact}</small>`)}</p>
<ul id="troubles" aria-label="What is wrong">${troubles.map(({ level, text, at }) =>
  html`<li class="tone ${level}">${at ? html`<a href="#${at}">${text}</a>` : html`<span>${text}</span>`}</li>`)}</ul></div></header>
<div id="charts">${chartsOf(history, snapshot)}</div>
<div class="bar"><input id="find" type="search" placeholder="Find a server or state" aria-label="Find">
<label><input id="problems" type="checkbox"><span>Problems only</span></label></div>
<p id="none">${sections.length ? "" : none}</p>
<div id="services">${sections}</div>
${fleet ? fleetSection(fleet, flipped) : ""}
<details id="rules" ${flipped.has("rules") === isFew ? "" : "open"}><summary><h2>Routes</h2></summary>
<form id="explain" class="bar"><input id="request" aria-label="Request"
placeholder="Route of GET http://host/path?"><button>Explain</button></form>
<pre id="answer" ${answer ? "" : "hidden"}>${answer}</pre>
<table><thead><tr><th>Route</th><th>Match</th><th>Service</th></tr></thead>
<tbody id="routes">${routes.map(routeRow)}</tbody></table></details>
</main>`;
}

/** Plain JavaScript for browsers: it runs in the page, and uses nothing of this file. */
const SCRIPT = String.raw`
"use strict";
const $ = (id) => document.getElementById(id);

/** Makes an element what another one is. What stays keeps the focus, and what was typed. */
const morph = (old, now) => {
  if (old.isEqualNode(now)) return;
  if (old.nodeName !== now.nodeName || old.id !== now.id) return old.replaceWith(now);
  for (const { name } of [...old.attributes]) if (!now.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of now.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  if (!now.childElementCount) return old.replaceChildren(now.textContent);
  const children = [...now.children], ids = new Set(children.map(({ id }) => id));
  for (const child of [...old.children]) if (!ids.has(child.id)) child.remove();
  children.forEach((child, i) => old.children[i] ? morph(old.children[i], child) : old.append(child));
  while (old.childElementCount > children.length) old.lastElementChild.remove();
};
const plain = { createHTML: (text) => text };
const policy = globalThis.trustedTypes?.createPolicy("lb", plain) ?? plain;
const parse = (text) => new DOMParser().parseFromString(policy.createHTML(text), "text/html").body.firstElementChild;

const call = (path, method = "GET", body = undefined) => {
  const headers = { "content-type": "application/json" };
  if (sessionStorage.token) headers.authorization = "Bearer " + sessionStorage.token;
  const signal = method === "GET" ? AbortSignal.timeout(5e3) : null;
  return fetch(path, { method, headers, body: JSON.stringify(body), signal });
};

// What is shown: fetched once a second, and when something else is chosen; not while a dialog asks for something.
const chosen = new URLSearchParams();
let turn = 0;
const look = async () => {
  const mine = ++turn, answer = await call("live?" + chosen), text = await answer.text();
  if (mine !== turn || $("ask").open) return; // a later one is under way
  if (answer.status === 401 || answer.status === 429) return signIn(JSON.parse(text));
  if (!answer.ok) throw new Error(text);
  morph($("live"), parse(text));
  document.title = $("verdict").textContent + " – lb.ts";
};
const refresh = () => look().catch(() => {
  $("live").className = "lost";
  $("verdict").className = "tone bad";
  document.title = $("verdict").textContent = "✕ The connection is lost: trying again";
});
const keepFresh = async () => {
  if (!document.hidden && !$("ask").open) await refresh();
  setTimeout(keepFresh, 1e3);
};
document.onvisibilitychange = () => document.hidden || refresh();
const choose = (name, value) => {
  chosen.set(name, value);
  refresh();
};
document.oninput = ({ target: { id, value, checked } }) => {
  if (id === "find") choose(id, value);
  if (id === "problems") choose(id, checked);
};
document.onsubmit = (event) => {
  event.preventDefault();
  if (event.target.id === "explain") choose("explain", $("request").value.trim());
};
document.onclick = ({ target }) => {
  const button = target.closest("tr button"), folded = target.closest("summary")?.parentElement.id;
  if (button) propose(button, button.closest("tr").id);
  if (!folded) return;
  const flip = chosen.has("flip", folded) ? "delete" : "append";
  chosen[flip]("flip", folded);
  refresh();
};

// The dialog: changes, each confirmed there, and the token.
/** Asks in the dialog. What submit says is wrong is shown there; otherwise the dialog is closed. */
const ask = (texts, input, submit) => {
  for (const [id, text] of Object.entries({ ...texts, problem: "" })) $(id).textContent = text;
  $("field").hidden = !input;
  Object.assign($("value"), { type: "text", value: "" }, input);
  $("form").onsubmit = async () => {
    const problem = await submit($("value").value);
    if (problem) return $("problem").replaceChildren(problem);
    $("ask").close();
    refresh();
  };
  $("ask").showModal();
};
$("cancel").onclick = () => $("ask").close();
const propose = ({ name: action, value, title: why, ariaLabel: what }, path) => {
  const isWeight = action === "weight", input = isWeight && { type: "number", min: 0, max: 256, value };
  ask({ what, why, go: isWeight ? "set" : action, label: "Weight" }, input, async (typed) => {
    const change = isWeight ? [path, "PATCH", { weight: Number(typed) }] : [path + "/state", "PUT", { state: action }];
    const answer = await call(...change).catch(() => undefined);
    if (!answer) return "The connection is lost.";
    if (!answer.ok) return (await answer.json()).detail;
  });
};
const signIn = ({ status, detail }) => {
  const wrong = sessionStorage.token ? "This token is not right." : "A token of admin in routes.yml is needed.";
  const texts = { what: "Sign in", why: status === 429 ? detail : wrong, go: "Sign in", label: "Token" };
  ask(texts, { type: "password" }, (token) => {
    sessionStorage.token = token;
  });
};
keepFresh();
`;

// deno-fmt-ignore
const DASHBOARD = html`
<main id="live"><header><h1>lb.ts</h1><p id="verdict" role="status">Connecting</p></header></main>
<dialog id="ask" aria-labelledby="what">
  <form id="form">
    <h2 id="what"></h2>
    <p id="why"></p>
    <label id="field"><span id="label"></span><input id="value" autocomplete="off"></label>
    <p id="problem" class="bad tone" role="alert"></p>
    <menu><button type="button" id="cancel">Cancel</button><button id="go"></button></menu>
  </form>
</dialog>
<noscript>This page needs JavaScript; the same figures are at <a href="services">services</a>.</noscript>`;

/** The page, which needs no token, and what it shows, which the gate protects. */
function addDashboard(app: Hono<AdminEnv>, balancer: Balancer, gate: Gatekeeper): void {
  const history: Sample[] = [];
  const remember = () => {
    history.push(sampleOf(snapshotOf(balancer)));
    if (history.length > HISTORY.most) history.shift();
    delete history.at(-HISTORY.recent - 1)?.counters;
  };
  if (balancer.runtime !== "edge") { // also while no page is open
    remember();
    setInterval(remember, HISTORY.interval).unref();
  }
  // Mounted at /ops it is asked as /ops and as /ops/: links on the page need the slash.
  app.use(async (context, next) => {
    const root = basePath(context).replace(/\/$/, ""), { path, method } = context.req;
    if (!/^(?:GET|HEAD)$/.test(method) || path !== root && path !== `${root}/`) return await next();
    if (path === root) return context.redirect(`${path.split("/").at(-1)}/`);
    return await answerPage(context, "lb.ts", DASHBOARD_STYLE, DASHBOARD, SCRIPT);
  });
  app.get("/live", gate, (context) => context.html(liveView(balancer, history, chosenOf(context))));
}

// --- 11.7 Access: hosts, sites and tokens, checked before anything is looked at ---

/** What the admin app is made with. */
interface AdminOptions {
  /** Where changes are saved. Without a file they are in force, and forgotten with the process. */
  file?: string;
  /** Reads such a file: with an environment and strategies of your own, say. */
  parse?: (text: string) => Config;
  /** Host names that lead here, beside localhost and addresses: others are refused where no token is asked for. */
  hosts?: string[];
}

/** No page of another site gets in through a browser: neither by a name of its own (DNS rebinding), nor by a form (CSRF). */
const checkSite = (balancer: Balancer, hosts: string[]): Gatekeeper => async ({ req }, next) => {
  const host = lower(req.header("host") ?? ""), name = hostName(host);
  const known = name === "localhost" || isAddress(bareAddress(name)) || hosts.includes(name);
  if (!hostIsValid(host) || !known && !balancer.tokens.token) {
    return problemJson(403, `Host: ${quote(host)} is neither an address nor localhost`);
  }
  const origin = lower(req.header("origin") ?? `http://${host}`);
  if (origin.replace(/^https?:\/\//, "") !== host) return problemJson(403, `Origin: ${quote(origin)} is another site`);
  const followed = req.method === "GET" && req.header("sec-fetch-mode") === "navigate"; // a link to a page of ours
  const site = req.header("sec-fetch-site") ?? "none";
  if (site !== "same-origin" && site !== "none" && !followed) return problemJson(403, "the request is another site's");
  return await next();
};

const TRIES = 5; // wrong tokens from one network until it has to wait: a second, two, four, ... and a minute at most
const MOST_PEERS = 1_000; // that are remembered for their wrong tokens

/**
 * Asks for a token where there is one (RFC 6750); the read token opens GET alone. Clients that try wrong ones have to
 * wait.
 */
function checkToken(balancer: Balancer): Gatekeeper {
  const { effects } = balancer, wrong = new Map<string, { count: number; until: number }>(); // by network
  const signed = (text: string) => effects.sign(effects.secret(), text); // so that time tells nothing
  // Nothing is waited for in here: of guesses that come at once each is counted.
  const verifyToken = (given: string, { req, get, set }: AdminContext): boolean => {
    const peer = get("peer"), network = clientNetwork(peer), { token, read_token } = balancer.tokens;
    const { count, until } = wrong.get(network) ?? { count: 0, until: 0 };
    const wait = Math.ceil((until - effects.now()) / 1_000);
    const tooMany = () => problemJson(429, "too many wrong tokens", { "retry-after": `${wait}` });
    if (wait > 0) throw new HTTPException(429, { res: tooMany() });
    wrong.delete(network); // so that the first of them is the one that has been quiet for longest
    const isShown = (known?: string) => known !== undefined && signed(known) === signed(given);
    const isToken = isShown(token), tries = count + 1;
    if (!isToken && !isShown(read_token)) {
      const pause = tries < TRIES ? 0 : Math.min(60, 2 ** (tries - TRIES));
      if (wrong.size >= MOST_PEERS) wrong.delete(wrong.keys().next().value!);
      wrong.set(network, { count: tries, until: effects.now() + pause * 1_000 });
      if (pause) effects.report("warn", `admin: ${peer}: wrong tokens in a row: ${tries}`);
      return false;
    }
    set("shown", isToken ? "token" : "read token");
    if (isToken || /^(?:GET|HEAD)$/.test(req.method)) return true;
    throw new AdminError(403, "the read token may only look");
  };
  const needed = { message: () => problemJson(401, "the right bearer token is needed") };
  const check = bearerAuth<AdminEnv>({
    verifyToken,
    noAuthenticationHeader: needed,
    invalidToken: needed,
    invalidAuthenticationHeader: { message: () => problemJson(400, "Authorization is not a bearer token") },
  });
  return (context, next) => {
    context.set("peer", effects.client(context.req.raw, context.env).address);
    context.set("shown", "");
    return balancer.tokens.token ? check(context, next) : next();
  };
}

/** What is thrown, as a problem. A config that nothing would be left of is a conflict, and no bad request. */
function problemOf({ effects }: Balancer, error: Error, method: string): Response {
  if (error instanceof ConfigError) return invalid(error.mistakes, method === "DELETE" ? 409 : 400).getResponse();
  if (error instanceof HTTPException) return error.getResponse();
  effects.report("error", `admin: ${error.stack ?? error}`);
  return problemJson(500, "the load balancer has failed");
}

/**
 * The admin API and its pages, to be served, or mounted in an app of your own. Tokens are those of `admin` in the config
 * in force; one that is taken out of it stays in force, for the listener stays open.
 */
export function createAdmin(lb: LoadBalancer, options: AdminOptions = {}): Hono<AdminEnv> {
  const { file, parse = (text: string) => parseConfig(text, file ? { file } : {}), hosts = [] } = options;
  const { balancer } = lb, app = new Hono<AdminEnv>(), known = { balancer, parse, change: changesOf(lb, parse, file) };
  app.onError((error, { req }) => problemOf(balancer, error, req.method));
  // Whether browsers may use only TLS with this host is not for one of its ports to say.
  app.use(secureHeaders({ xFrameOptions: "DENY", strictTransportSecurity: false }));
  app.use(async (context, next) => {
    await next();
    context.res.headers.set("cache-control", "no-store");
  });
  app.use(methodNotAllowed({
    app,
    onMethodNotAllowed: ({ req }, allowed) =>
      problemJson(405, `${req.method} ${req.path}`, { allow: allowed.join(", ") }),
  }));
  app.use(checkSite(balancer, hosts.map((host) => hostName(host))));

  // Without a token: pages must not have anything in them that the API would not tell.
  addRoutes(app, true, known);
  addDocs(app, balancer);
  const gate = checkToken(balancer);
  addDashboard(app, balancer, gate);

  app.use(gate);
  app.use(bodyLimit({ maxSize: MOST.bytes, onError: () => problemJson(413, "the body is larger than 1 MiB") }));
  addRoutes(app, false, known);
  app.all("*", ({ req }) => problemJson(404, `there is no ${req.path}`)); // else a balancer beside it would be asked
  return app;
}

// -----------------------------------------------------------------------------------------------------------
// 12. Fleet and discovery
// Many instances, one configuration and one verdict on each server, through etcd or a Durable Object. An instance
// puts in force only what its watch brings, in that order; without the engine it goes on alone.
// Servers that come and go behind a name of DNS; they stay when DNS fails.
// -----------------------------------------------------------------------------------------------------------

// --- 12.1 Engine: the calls of etcd that a fleet makes, over its JSON gateway ---

/** The value of a key, and the revision of its last change. */
interface EngineValue {
  value: string;
  revision: number;
}
/** A key that has changed; without a value it was deleted. */
interface EngineEvent {
  key: string; // without the prefix
  value: string | undefined;
  revision: number;
}
/** A watch that is open. */
interface Watch {
  ended: Promise<string>; // why, in a word
  close(why: string): void;
}
/** What a fleet asks of its engine. All calls reject with an EngineError. */
type Engine = Pick<EtcdClient, keyof EtcdClient>;

/** silent: no member answers; lease: it is over; refused: all else. */
export class EngineError extends Error {
  readonly kind: "silent" | "lease" | "refused";
  constructor(kind: EngineError["kind"], message: string) {
    super(message);
    this.kind = kind;
  }
}

const ANSWER_TIME = 2_000; // milliseconds that a member may take to answer
/** What etcd says of a token that it takes no more. */
const STALE = /auth token|auth store is old|user name is empty/;
const base64 = (text: string): string => Buffer.from(text).toString("base64");
const fromBase64 = (text: unknown): string => Buffer.from(String(text ?? ""), "base64").toString();
/** The key that ends the range of all keys with a prefix. */
function endOf(prefix: string): string {
  const bytes = Buffer.from(prefix);
  bytes[bytes.length - 1]!++;
  return bytes.toString("base64");
}

/** Calls `take` with each line of a body, and `end` when no more will come. */
function readLines(body: Body, take: (line: string) => void, end: () => void): void {
  let rest = "";
  body.read({
    data(bytes) {
      const lines = (rest + bytes.toString("latin1")).split("\n");
      rest = lines.pop()!;
      lines.filter(Boolean).forEach(take);
    },
    end,
    fail: end,
  });
}

/** The text of an error: streams have it in a map. */
const textOf = ({ error, message }: Raw): string => String(mapOf(error).message ?? error ?? message ?? "");
/** What etcd says in an error, as an operator should read it. */
function engineError(member: string, status: number, answer: Raw, { user, prefix }: FleetConfig): EngineError {
  const text = textOf(answer), isEtcd = text.startsWith("etcdserver: ");
  const refused = (message: string) => new EngineError("refused", message);
  if (/lease not found/.test(text)) return new EngineError("lease", "the lease is over");
  if (/authentication failed/.test(text)) {
    return refused(`etcd refuses the user ${quote(user)}: name or password is wrong`);
  }
  if (/user name is empty/.test(text) || status === 401) return refused("etcd asks for fleet.user and fleet.password");
  if (/permission denied/.test(text)) {
    const what = `the user ${quote(user)} may not read and write all keys that begin with ${quote(prefix)}`;
    return refused(`${what}: grant its role readwrite there`);
  }
  if (/too large/.test(text)) {
    return refused("the document is larger than etcd takes, which is 1.5 MiB unless it is told more");
  }
  const message = isEtcd ? `${member}: ${text}` : `${member} does not speak etcd's JSON gateway (status ${status})`;
  const isPassing = isEtcd
    ? /timed out|leader|stopped|unhealthy|unavailable|not capable/i.test(text)
    : status >= 500 && status !== 501;
  return isPassing ? new EngineError("silent", message) : refused(message);
}

/** A client of etcd, or of what speaks like it. It stays with a member as long as that answers. */
export class EtcdClient implements Engine {
  private readonly config: FleetConfig;
  private readonly effects: Pick<Effects, "send" | "now" | "random">;
  private readonly members: { server: Server; path: string; url: string }[];
  private patience = ANSWER_TIME;
  private current: number;
  private token: string | undefined; // empty: none is asked for
  private watching: Watch | undefined;

  constructor(config: FleetConfig, effects: Pick<Effects, "send" | "now" | "random">) {
    this.config = config;
    this.effects = effects;
    this.members = config.etcd.map((url) => {
      const parsed = new URL(url), { origin, pathname } = parsed;
      const name = `${parsed.hostname}:${portOf(parsed)}`, authority = hostFieldOf(origin);
      const given = { ...v.parse(v.object(also), {}), url: origin, name, authority, foundBy: "" };
      const server = newServer(given, "fleet", config.tls, 1);
      return { url, path: pathname.replace(/\/$/, ""), server };
    });
    this.current = Math.floor(effects.random() * this.members.length); // not all instances ask the same one
  }

  /** Asks another member from now on. */
  next(): void {
    const { length } = this.members, others = Math.max(1, length - 1);
    this.current = (this.current + 1 + Math.floor(this.effects.random() * others)) % length;
  }

  /** All keys with this prefix, as of a revision; without values they are empty. */
  async list(withValues: boolean): Promise<{ revision: number; keys: Map<string, EngineValue> }> {
    const { prefix } = this.config, range = { key: base64(prefix), range_end: endOf(prefix) };
    const { header, kvs = [] } = await this.call("kv/range", { ...range, keys_only: !withValues });
    const keys = (kvs as Raw[]).map((kv) => [this.nameOf(kv), this.valueOf(kv)] as const);
    return { revision: Number(mapOf(header).revision), keys: new Map(keys) };
  }

  /** Writes a value if the key has this revision (0: is not there). Gives what the key holds then. */
  async swap(key: string, value: string, revision: number, lease = "0"): Promise<EngineValue & { isOurs: boolean }> {
    const where = { key: base64(this.config.prefix + key) };
    const { succeeded, header, responses } = await this.call("kv/txn", {
      compare: [{ ...where, target: "MOD", result: "EQUAL", mod_revision: `${revision}` }],
      success: [{ request_put: { ...where, value: base64(value), lease } }],
      failure: [{ request_range: where }],
    });
    if (succeeded) return { isOurs: true, value, revision: Number(mapOf(header).revision) };
    const [kv] = (mapOf(mapOf((responses as Raw[])[0]).response_range).kvs ?? []) as Raw[];
    return { isOurs: false, ...this.valueOf(kv ?? {}) };
  }

  async put(key: string, value: string, lease = "0"): Promise<void> {
    const put = { key: base64(this.config.prefix + key), value: base64(value), lease };
    await this.call("kv/txn", { success: [{ request_put: put }] });
  }

  async grant(ttl: number): Promise<string> {
    // with the third of `ttl` after which a lease is kept alive, another member is asked before it is over
    if (this.members.length > 1) this.patience = Math.min(ANSWER_TIME, ttl / 2);
    return String((await this.call("lease/grant", { TTL: `${Math.ceil(ttl / 1_000)}` })).ID);
  }
  /** False: the lease is over. */
  async keepAlive(lease: string): Promise<boolean> {
    return Number((await this.call("lease/keepalive", { ID: lease })).TTL ?? 0) > 0;
  }
  async revoke(lease: string): Promise<void> {
    await this.call("lease/revoke", { ID: lease });
  }

  /** Hands over what changes from a revision on, in order. */
  watch(from: number, onEvents: (events: EngineEvent[]) => void): Watch {
    const { prefix } = this.config, ended = Promise.withResolvers<string>();
    let attempt: Attempt | undefined, isOver = false;
    const close = (why: string) => {
      isOver = true;
      ended.resolve(why);
      attempt?.carrier?.cancel("client-left");
    };
    const take = (line: string) => {
      if (isOver) return;
      const { result, error } = JSON.parse(line) as Raw, { canceled, events = [], compact_revision } = mapOf(result);
      if (error || canceled) {
        if (!compact_revision) this.token = undefined; // it may be that which is refused
        return close(compact_revision ? "compacted" : "refused");
      }
      const changes = (events as Raw[]).map(({ type, kv }) => {
        const { value, revision } = this.valueOf(mapOf(kv));
        return { key: this.nameOf(mapOf(kv)), revision, value: type === "DELETE" ? undefined : value };
      });
      if (changes.length) onEvents(changes);
    };
    const range = { key: base64(prefix), range_end: endOf(prefix), start_revision: `${from}` };
    const breakOff = () => close("broken");
    this.open("watch", { create_request: range }, Infinity, (begun) => attempt = begun).then(({ status, body }) => {
      if (status === 200) return readLines(body, take, breakOff);
      body.cancel();
      close("refused");
    }).catch(breakOff);
    return this.watching = { ended: ended.promise, close };
  }

  private nameOf({ key }: Raw): string {
    return fromBase64(key).slice(this.config.prefix.length);
  }
  private valueOf({ value, mod_revision }: Raw): EngineValue {
    return { value: fromBase64(value), revision: Number(mod_revision ?? 0) };
  }

  /** Asks each member once, beginning with the one that has answered last. */
  private async call(path: string, body: Raw): Promise<Raw> {
    for (let left = this.members.length - 1;; left--) {
      const asked = this.current;
      try {
        return await this.ask(path, body);
      } catch (error) {
        if (!(error instanceof EngineError) || error.kind !== "silent") throw error;
        this.watching?.close("silent");
        if (left === 0) throw error;
        if (this.current === asked) this.current = (asked + 1) % this.members.length;
      }
    }
  }

  /** A token that is refused, as after another password or five quiet minutes, is got anew at once. */
  private async ask(path: string, body: Raw, isAgain = false): Promise<Raw> {
    const { url } = this.members[this.current]!, hasUser = this.config.user + this.config.password !== "";
    if (hasUser) this.token ??= await this.logIn(url);
    const { status, answer } = await this.post(path, body);
    if (status === 200 && "header" in answer) return answer;
    const isStale = status === 401 || STALE.test(textOf(answer));
    if (!isStale || !hasUser || isAgain) throw engineError(url, status, answer, this.config);
    this.token = undefined;
    return await this.ask(path, body, true);
  }

  private async logIn(url: string): Promise<string> {
    const { user: name, password } = this.config;
    const { status, answer } = await this.post("auth/authenticate", { name, password });
    if (/authentication is not enabled/.test(textOf(answer))) return ""; // it would refuse any token
    if (status !== 200 || !answer.token) throw engineError(url, status, answer, this.config);
    return String(answer.token);
  }

  private async post(path: string, body: Raw): Promise<{ status: number; answer: Raw }> {
    const { url } = this.members[this.current]!, { status, body: content } = await this.open(path, body, this.patience);
    const taken = await new Promise<Body | Failure>((resolve) => collect(content, resolve));
    if (typeof taken === "string") throw new EngineError("silent", `${url}: ${FAILURES[taken].text}`);
    try {
      const answer = mapOf(JSON.parse(taken.bytes!.toString()));
      return { status, answer: isRecord(answer.result) ? answer.result : answer };
    } catch { // another program
      return { status, answer: {} };
    }
  }

  /** Sends a request to the current member: resolves with the head of its answer, which `patience` bounds as a whole. */
  private open(path: string, body: Raw, patience: number, onBegin?: (attempt: Attempt) => void) {
    const { server, path: base, url } = this.members[this.current]!, { effects, token } = this;
    const fields = ["host", hostFieldOf(server.url), "content-type", "application/json"];
    if (token) fields.push("authorization", token);
    const given = {
      ...{ server, method: "POST", target: `${base}/v3/${path}`, lines: linesOf(fields), startedAt: effects.now() },
      body: inMemory([Buffer.from(JSON.stringify(body))]),
      timeouts: { connect: this.patience, response: this.patience, idle: patience, request: Infinity },
      deadline: effects.now() + patience,
    };
    return new Promise<Pick<HttpResponse, "status" | "body">>((resolve, reject) => {
      const attempt = newAttempt({
        ...given,
        onHead: resolve,
        onEnd: (failure, detail) => failure && reject(new EngineError("silent", `${url}: ${detail}`)),
      });
      onBegin?.(attempt);
      effects.send(attempt);
    });
  }
}

// --- 12.2 Fleet: one document, one verdict on each server, and an instance among others ---

/** What an instance writes of itself. */
const RecordSchema = v.object({
  ...v.omit(INSTANCE, ["name"]).entries,
  id: STRING, // of its process
  members: STRING, // `viewHash` of the fleet as it knows it
  told: NUMBER, // revision of the latest mark of an operator that it has
  unsure: STRINGS, // servers on which it has no vote: neither its probes nor the others have decided yet
});
type InstanceRecord = Out<typeof RecordSchema>;
/** An instance's vote on a server. */
type Vote = "up" | "down" | "unknown";

const keyOfServer = ({ service, url }: Pick<Server, "service" | "url">): string => `${service} ${url}`;

/** The instances that probe a server: those with the highest hash of both (rendezvous). */
function probersOf(server: string, members: readonly string[], probers: number): string[] {
  const ranked = members.map((name) => ({ name, rank: hash(`${name}\n${server}`) }));
  ranked.sort((a, b) => b.rank - a.rank || (a.name < b.name ? -1 : 1));
  return ranked.slice(0, probers).map(({ name }) => name);
}

/** The same for all instances that choose the same probers. */
const viewHash = (members: readonly string[], probers: number): string =>
  digits(hash(`${probers}\n${members.toSorted().join("\n")}`));

/** An instance's vote on a server. It counts if the instance knows the same members, and the operator's latest mark. */
function voteOf(of: InstanceRecord | undefined, server: string, view: string, told: number): Vote {
  if (!of || of.members !== view || of.told < told || of.unsure.includes(server)) return "unknown";
  return of.down.includes(server) ? "down" : "up";
}

/** What more than half of the votes say, whatever the unknown ones would be; undefined: that is open. */
function majorityOf(votes: readonly Vote[]): "up" | "down" | undefined {
  const count = (vote: Vote) => votes.filter((one) => one === vote).length, half = votes.length / 2;
  if (votes.length - count("unknown") <= half) return undefined;
  if (count("down") > half) return "down";
  return count("up") >= half ? "up" : undefined;
}

/** Parses what instances write as JSON; undefined: no instance has written this. */
function readJson<S extends Schema>(schema: S, text = ""): Out<S> | undefined {
  try {
    return v.parse(schema, JSON.parse(text));
  } catch {
    return undefined;
  }
}

/** A document of a fleet. */
interface FleetDocument extends EngineValue {
  problem: string; // why it cannot be used here
}

/** What a fleet needs of the program around it. */
interface FleetMember {
  own: FleetConfig; // as the local file has it
  name: string; // where that gives none
  id: string; // of this process
  file: string;
  /** At the edge: it neither registers nor watches. */
  isObserver: boolean;
  parse(text: string): Config;
  /** The local file; undefined: it cannot be read. */
  read(): string | undefined;
  /** Writes the local file, which said `before`. `keep`: that stays beside it as .bak. */
  save(before: string, text: string, keep: boolean): Promise<void>;
  /** A document has been put in force. */
  onApplied(): void;
}

const CHANGE_TIME = 10_000; // milliseconds that a change may take until it is in force here
const RETRY_TIME = 4_000; // milliseconds for which a change is tried again while no member answers
const MOST_TRIES = 5; // of one change, while other changes come first
const PAUSES = { least: 100, most: 5_000 }; // milliseconds before the engine is listed again
const LATEST = 1_000; // milliseconds that a watch may be behind what is listed
const BEAT = 100; // milliseconds between two checks of the lease and the engine
const POLL = 10; // milliseconds between two checks of what is waited for
/** Why all keys were listed again. */
const RESYNCS = ["broken", "compacted", "deaf", "lease", "paused", "refused", "restored", "silent", "unreachable"];
const SHARED = ["ttl", "probers"]; // keys of `fleet` that count as the document has them
const withoutShared = (own: Raw): Raw =>
  Object.fromEntries(Object.entries(own).filter(([key]) => !SHARED.includes(key)));

/** This instance in its fleet. */
export class Fleet implements Membership {
  private readonly lb: LoadBalancer;
  private readonly effects: Effects;
  private readonly engine: Engine;
  private readonly member: FleetMember;

  // from the engine
  private keys = new Map<string, EngineValue>();
  private revision = 0;
  private records = new Map<string, InstanceRecord>(); // of live instances
  private membersHash = ""; // `viewHash` of these
  private probing = new Map<string, string[]>(); // instances that probe a server
  private document: FleetDocument | undefined; // the newest
  private inForce = 0; // revision of the document in force; 0: it is the local file
  private readonly changed = new Set<string>(); // keys of servers that were found, and then changed

  // state of the engine
  private state: "unknown" | "answers" | "away" = "unknown";
  private since: Date;
  private contactAt: number;
  private problem = ""; // why it does not answer
  private votesCountAt = Infinity; // when votes of others are younger than the engine's latest absence; 0: they count
  private hasListed = false;
  private isOver = false;
  private applying: unknown; // resolves when workers have the document too
  private refused = 0; // documents that could not be used here
  private readonly resyncs = new Map(RESYNCS.map((reason) => [reason, 0]));

  // this instance
  private readonly wanted: string; // as the local file has it
  private name: string; // with a number behind it, where another instance has that
  private lease = "";
  private leaseTtl = 0;
  private written: InstanceRecord | undefined; // its record as the engine has it
  private isWriting = false;
  private watching: Watch | undefined;
  private keepLeaseAt = 0; // when the lease is kept alive again; Infinity: that goes on now
  private readonly unsure = new Set<string>(); // servers on which it has no vote yet
  private local: Raw; // `fleet` as the local file has it
  private copied: EngineValue; // what the local file said last, and of which document that is a copy; 0: of none
  private copying: Promise<void> = Promise.resolve();

  constructor(lb: LoadBalancer, engine: Engine, member: FleetMember) {
    const { table: { config }, effects } = lb.balancer;
    [this.lb, this.effects, this.engine, this.member] = [lb, effects, engine, member];
    this.name = this.wanted = member.own.name || member.name;
    this.since = effects.date();
    this.contactAt = effects.now();
    this.local = mapOf(config.written.fleet);
    this.copied = { value: config.text, revision: 0 };
    effects.fleet = this;
    effects.onNews = ({ kind }) => {
      if (kind !== "found") return;
      this.applyRecords(); // other servers may have other probers
      this.applyChanges();
    };
  }

  // Start, end and loops.

  /** Joins the fleet, and goes on in the background. Resolves when it has joined, or after a time at most. */
  async start(patience: number): Promise<void> {
    void this.follow();
    void this.beat();
    await this.waitUntil(() => this.hasListed && this.records.has(this.name), patience);
    if (this.hasListed) return await this.copying;
    const instead = this.isWaiting() ? "waits for its document" : `starts with ${this.member.file}`;
    this.effects.report("warn", `fleet: ${this.problem || "the engine has not answered yet"}; ${instead}`);
  }

  /** Takes this instance off the fleet at once. */
  async leave(): Promise<void> {
    const { lease } = this;
    this.isOver = true;
    this.lease = "";
    this.watching?.close("over");
    this.beginProbingAll();
    if (lease) await this.engine.revoke(lease).catch(() => {});
  }

  /** At the edge, beside a request. */
  async listOnce(): Promise<void> {
    try {
      await this.listAll();
    } catch (error) {
      this.reportProblem(error);
      this.checkSilence();
    }
  }

  /** Lists all keys and watches them from there on. Whatever ends a watch, the next listing is the truth. */
  private async follow(): Promise<void> {
    for (let pause = PAUSES.least; !this.isOver;) {
      let reason = "unreachable";
      const begun = this.effects.now();
      try {
        await this.listAll();
        if (this.isOver) return;
        this.watching = this.engine.watch(this.revision + 1, (events) => this.onEvents(events));
        reason = await this.watching.ended;
      } catch (error) {
        this.reportProblem(error);
      }
      if (reason !== "silent") this.engine.next(); // then it has gone on to one that answers
      this.resyncs.set(reason, (this.resyncs.get(reason) ?? 0) + 1);
      const endedAt = this.effects.now();
      if (endedAt - begun > PAUSES.most) pause = PAUSES.least;
      await this.waitUntil(() => this.contactAt > endedAt, pause * (0.5 + this.effects.random()));
      pause = Math.min(2 * pause, PAUSES.most);
    }
  }

  /** Checks the lease, whether the engine is away, and whether this process was suspended. */
  private async beat(): Promise<void> {
    for (let seen = this.effects.now(); !this.isOver; await this.effects.sleep(BEAT)) {
      const now = this.effects.now(), late = now - seen - BEAT;
      seen = now;
      if (late > LATEST) { // the engine may have ended our lease meanwhile
        this.contactAt += late;
        this.watching?.close("paused");
      }
      this.checkSilence();
      if (this.votesCountAt > 0 && now >= this.votesCountAt) {
        this.votesCountAt = 0;
        this.applyVerdicts();
      }
      if (this.hasListed && now >= this.keepLeaseAt) void this.keepLease(now + this.shared().ttl / 3);
    }
  }

  /** Keeps the lease alive, and checks whether the watch misses changes (a frozen member: etcd issue 8980). */
  private async keepLease(next: number): Promise<void> {
    const { watching, engine } = this;
    this.keepLeaseAt = Infinity;
    try {
      if (this.lease && !await engine.keepAlive(this.lease)) this.onLeaseOver();
      const known = this.revision, { revision, keys } = await engine.list(false);
      this.onContact();
      void this.publish(); // ejections, and what could not be written before
      if (revision < known) return watching?.close("restored");
      if (!this.isBehind(keys, revision)) return;
      await this.effects.sleep(LATEST);
      if (this.isBehind(keys, revision)) watching?.close("deaf");
    } catch (error) {
      this.reportProblem(error);
    } finally {
      this.keepLeaseAt = next;
    }
  }

  /** Whether the watch has missed some of what is listed. */
  private isBehind(listed: ReadonlyMap<string, EngineValue>, revision: number): boolean {
    const isGone = ([key, one]: [string, EngineValue]) => one.revision <= revision && !listed.has(key);
    return [...listed.values()].some((one) => one.revision > this.revision) || [...this.keys].some(isGone);
  }

  /** Reports what is wrong with the engine: silence once it has lasted (`checkSilence`), all else at once. */
  private reportProblem(error: unknown): void {
    const { message, stack } = error as Error, isKnown = error instanceof EngineError;
    const isNew = message !== this.problem && !this.isOver;
    if (!isKnown) this.effects.report("error", `fleet: ${stack}`);
    else if (isNew && error.kind !== "silent") this.effects.report("warn", `fleet: ${message}`);
    this.problem = message;
  }

  /** The engine has answered. */
  private onContact(): void {
    const now = this.effects.now();
    this.contactAt = now;
    if (this.state === "answers") return;
    if (this.state === "away") this.effects.report("info", "fleet: the engine answers again");
    this.state = "answers";
    this.since = this.effects.date();
  }

  /** Without an answer for `ttl` the engine is away: this instance goes on by itself. */
  private checkSilence(): void {
    const { ttl } = this.shared();
    if (this.state === "away" || this.effects.now() - this.contactAt <= ttl) return;
    if (this.state === "answers") this.since = this.effects.date();
    this.state = "away";
    this.votesCountAt = Infinity;
    this.beginProbingAll();
    const why = this.problem && ` (${this.problem})`;
    const what = "config, health and secret stay as they are, and this instance probes all servers itself";
    this.effects.report("warn", `fleet: the engine has not answered for ${ttl / 1_000} s${why}: ${what}`);
  }

  // What the engine says.

  /** Lists all keys and applies them. A document or a secret that is missing is written first. */
  private async listAll(): Promise<void> {
    let listed = await this.engine.list(true);
    if (!this.isWaiting() && !listed.keys.has("config")) await this.putDocument();
    if (!listed.keys.has("secret")) await this.engine.swap("secret", this.effects.secret(), 0);
    if (!listed.keys.has("config") || !listed.keys.has("secret")) listed = await this.engine.list(true);
    if (this.isOver) return;
    this.onContact();
    const before = this.keys;
    [this.keys, this.revision] = [listed.keys, listed.revision];
    this.applySecret();
    this.applyDocument();
    this.applyRecords();
    for (const [key, { revision }] of this.keys) {
      if (key.startsWith("told/") && revision !== before.get(key)?.revision) this.applyMark(key);
    }
    const isMember = !!this.lease && this.records.get(this.name)?.id === this.member.id;
    if (!isMember) {
      this.adoptVerdicts();
      if (!this.member.isObserver) await this.join();
    }
    if (this.votesCountAt === Infinity) this.votesCountAt = this.effects.now() + this.shared().ttl; // leases have ended by then
    this.applyVerdicts();
    void this.publish();
    this.problem = "";
    this.hasListed = true;
    if (!this.member.isObserver) void this.checkFile();
  }

  /** Applies what the watch brings, in its order. */
  private onEvents(events: EngineEvent[]): void {
    this.onContact();
    for (const { key, value, revision } of events) {
      this.revision = revision;
      if (value === undefined) this.keys.delete(key);
      else this.keys.set(key, { value, revision });
      if (key === "secret") this.applySecret();
      else if (key === "config") this.applyDocument();
      else if (key.startsWith("told/")) this.applyMark(key);
      else if (key.startsWith("instances/")) this.applyRecords();
      if (key === `instances/${this.name}` && value === undefined && this.lease) this.onLeaseOver();
      if (key === `instances/${this.wanted}` && value === undefined && this.lease) this.rejoin();
    }
    this.applyVerdicts();
    void this.publish();
  }

  private applySecret(): void {
    const { value } = this.keys.get("secret") ?? {}, isOther = value !== this.effects.secret();
    if (!value) return void this.engine.swap("secret", this.effects.secret(), 0).catch(() => {}); // it was deleted
    this.effects.secret = () => value;
    if (isOther) void this.lb.reload(this.lb.balancer.table.config); // cookies are signed anew, in workers too
  }

  private applyDocument(): void {
    const { balancer } = this.lb, before = balancer.table.config, entry = this.keys.get("config");
    if (!entry && this.isWaiting()) return;
    if (!entry) return void this.putDocument().catch(() => {}); // a new listing tries again
    if (entry.revision === this.document?.revision && entry.value === this.document.value) return;
    const document = this.document = { ...entry, problem: "" };
    let next = before;
    try {
      if (entry.value !== before.text) next = this.parse(entry.value);
      if (next !== before) this.applying = this.lb.reload(next);
    } catch (error) {
      document.problem = (error as Error).message;
      this.refused++;
      balancer.reloadFailed = true;
      const why = `revision ${entry.revision} of the document cannot be used here, and the one before stays in force`;
      return this.effects.report("error", `fleet: ${why}:\n${document.problem}`);
    }
    balancer.reloadFailed = false;
    this.inForce = entry.revision;
    if (this.leaseTtl && this.leaseTtl !== this.shared().ttl) this.rejoin();
    this.applyRecords(); // with other servers and another number of probers
    if (!this.member.isObserver) this.copying = this.copying.then(() => this.copy(document));
    if (next !== before) this.member.onApplied();
  }

  /** Writes the missing document: what is in force here, unless another instance was first. */
  private async putDocument(): Promise<void> {
    const { isOurs } = await this.engine.swap("config", this.lb.balancer.table.config.text, 0);
    if (!isOurs) return;
    const what = this.inForce
      ? "was deleted: what is in force here is put back"
      : `did not exist: it is ${this.member.file}`;
    this.effects.report(this.inForce ? "warn" : "info", `fleet: the document ${what}`);
  }

  /** The server that a key under told/ names, and its service. */
  private serverOf(key: string): { service: Service | undefined; server: Server | undefined } {
    const name = key.slice("told/".length), at = name.lastIndexOf(" ");
    const service = this.lb.balancer.table.services.get(name.slice(0, at));
    return { service, server: service?.servers.find(({ url }) => url === name.slice(at + 1)) };
  }

  /** Marks a server up or down, as an operator has said to some instance. */
  private applyMark(key: string): void {
    if (key.endsWith(CHANGE)) return this.applyChanges();
    const mark = this.keys.get(key)?.value, { service, server } = this.serverOf(key);
    if (mark === undefined || !service || !server) return;
    // at the start probes may have overtaken it: it counts where an instance still finds the server down
    const isHeld = [...this.records.values()].some(({ down }) => down.includes(keyOfServer(server)));
    if (this.hasListed || isHeld || service.config.health.kind === "off") {
      setHealth(service, server, mark === "up");
    }
  }

  /**
   * Applies what operators have changed of servers that were found, whenever this instance finds them too. It holds until they
   * are gone: later the same address may be another server.
   */
  private applyChanges(): void {
    for (const [key, { value }] of this.keys) {
      if (!key.endsWith(CHANGE)) continue;
      const { service, server } = this.serverOf(key.slice(0, -CHANGE.length));
      if (!service || !server?.foundBy) {
        if (this.changed.delete(key)) void this.engine.put(key, NO_CHANGE).catch(() => {});
      } else if (value !== NO_CHANGE) {
        this.changed.add(key);
        const isNew = JSON.stringify(service.changes.get(server.url)) !== value;
        const change = isNew && readJson(FoundChangeSchema, value);
        if (change) changeFound(this.lb.balancer, service, server, change);
      }
    }
  }

  /** Reads the records of live instances, and works out which of them probe each server. */
  private applyRecords(): void {
    const { probers } = this.shared(), before = this.probing;
    this.records = new Map();
    for (const [key, { value }] of this.keys) {
      const record = key.startsWith("instances/") && readJson(RecordSchema, value);
      if (record) this.records.set(key.slice("instances/".length), record);
    }
    const members = [...this.records.keys()];
    this.membersHash = viewHash(members, probers);
    this.probing = new Map();
    for (const server of this.servers()) {
      const key = keyOfServer(server), by = probersOf(key, members, probers);
      this.probing.set(key, by);
      if (by.includes(this.name) && !before.get(key)?.includes(this.name) && this.followsMajority()) {
        beginProbing(server);
      }
    }
  }

  // Health.

  /** The servers that are probed. */
  private servers(): Server[] {
    const { services } = this.lb.balancer.table;
    const checked = [...services.values()].filter(({ config }) => config.health.kind !== "off");
    return checked.flatMap(({ servers }) => servers);
  }
  private isProber(server: Server): boolean {
    return this.probing.get(keyOfServer(server))?.includes(this.name) ?? false;
  }
  /** From now on this instance probes all servers by itself. */
  private beginProbingAll(): void {
    this.servers().filter((server) => !this.isProber(server)).forEach(beginProbing);
  }
  /** Whether most probers decide on a server. If not, as while the engine is away, the probes of this instance do. */
  private followsMajority(): boolean {
    return this.state === "answers" && this.votesCountAt === 0 && this.records.size > 0 && !this.isOver;
  }
  mayProbe(server: Server): boolean {
    return !this.followsMajority() || this.lease !== "" && this.isProber(server);
  }
  isUp({ config: { health: { rise, fall } } }: Service, server: Server): boolean {
    const key = keyOfServer(server);
    if (server.passes >= rise || server.fails >= fall) this.unsure.delete(key);
    if (!this.followsMajority()) return server.upByOwnProbes;
    if (server.upByOwnProbes === this.written?.down.includes(key)) void this.publish();
    const verdict = this.verdict(server);
    return verdict === undefined ? server.up : verdict === "up";
  }
  /** What most probers of a server find; undefined: they have not decided. */
  private verdict(server: Server): "up" | "down" | undefined {
    const key = keyOfServer(server), told = this.keys.get(`told/${key}`)?.revision ?? 0;
    return majorityOf((this.probing.get(key) ?? []).map((name) => {
      if (name !== this.name || !this.lease) return voteOf(this.records.get(name), key, this.membersHash, told);
      if (this.unsure.has(key)) return "unknown";
      return server.upByOwnProbes ? "up" : "down";
    }));
  }

  /** Sets servers up or down, as most of their probers say. */
  private applyVerdicts(): void {
    if (!this.followsMajority()) return;
    for (const server of this.servers()) {
      const verdict = this.verdict(server), up = verdict === "up";
      if (verdict === undefined) continue;
      if (this.unsure.delete(keyOfServer(server))) server.upByOwnProbes = up;
      if (up === server.up) continue;
      const problem = up ? undefined : "most of its probers say so";
      setUp(this.lb.balancer.table.services.get(server.service)!, server, up, problem);
      this.effects.onNews({ kind: "probed", service: server.service, url: server.url, problem, up });
    }
  }

  /** Begins with the verdicts of the others, for this instance is new or its lease has ended; it has no vote yet. */
  private adoptVerdicts(): void {
    this.votesCountAt = 0;
    this.lease = "";
    if (this.records.size === 0 && this.member.isObserver) return; // it probes all servers itself
    for (const server of this.servers()) this.unsure.add(keyOfServer(server));
    this.applyVerdicts();
    this.servers().forEach(beginProbing);
  }

  // This instance among others.

  /** `fleet` as the document has it: only what has to be the same on all instances. */
  private shared(): Pick<FleetConfig, "ttl" | "probers"> {
    return this.lb.balancer.table.config.fleet ?? (this.inForce ? NO_FLEET : this.member.own);
  }

  private record(): InstanceRecord {
    const { balancer } = this.lb, servers = this.servers(), now = this.effects.now();
    const marks = [...this.keys].filter(([key]) => key.startsWith("told/") && !key.endsWith(CHANGE));
    return {
      ...{ id: this.member.id, since: balancer.startedAt.toISOString(), version: VERSION, runtime: balancer.runtime },
      ...{ config: this.inForce, problem: this.document?.problem ?? "", members: this.membersHash },
      told: Math.max(0, ...marks.map(([, { revision }]) => revision)),
      down: servers.filter((server) => !server.upByOwnProbes && this.isProber(server)).map(keyOfServer).sort(),
      ejected: servers.filter(({ ejectedUntil }) => ejectedUntil > now).map(keyOfServer).sort(),
      unsure: [...this.unsure].sort(),
    };
  }

  /** Registers under a new lease. A name that another one has gets a number behind it. */
  private async join(): Promise<void> {
    const { ttl } = this.shared(), { wanted } = this, old = this.lease;
    const lease = await this.engine.grant(ttl),
      isOwn = (text: string) => readJson(RecordSchema, text)?.id === this.member.id;
    for (let i = 1;; i++) {
      const name = i === 1 ? wanted : `${wanted}#${i}`, key = `instances/${name}`, there = this.keys.get(key);
      if (there && !isOwn(there.value)) continue;
      const own = this.record(), text = JSON.stringify(own);
      if (there) await this.engine.put(key, text, lease);
      else if (!isOwn((await this.engine.swap(key, text, 0, lease)).value)) continue;
      const isOther = name !== wanted, why = `another instance is called ${quote(wanted)}: this one is ${quote(name)}`;
      const said = isOther ? why : `this instance is called ${quote(name)} again`;
      if (name !== this.name) this.effects.report(isOther ? "warn" : "info", `fleet: ${said}`);
      [this.name, this.lease, this.leaseTtl, this.written] = [name, lease, ttl, own];
      if (old) await this.engine.revoke(old).catch(() => {}); // its record has the new one already
      return;
    }
  }

  /** Registers again: for another `ttl`, or under its own name, which another instance has left. */
  private rejoin(): void {
    void this.join().catch(() => this.onLeaseOver());
  }

  /** The lease has ended, as after a suspension: this instance registers anew. */
  private onLeaseOver(): void {
    this.lease = "";
    this.watching?.close("lease");
  }

  /** Writes this instance's record if it has changed. */
  private async publish(): Promise<void> {
    if (!this.lease || this.isWriting) return;
    this.isWriting = true;
    await Promise.resolve(); // what else changes in this turn is written with it
    try {
      while (this.lease) {
        const own = this.record(), text = JSON.stringify(own);
        if (text === JSON.stringify(this.written)) return;
        await this.engine.put(`instances/${this.name}`, text, this.lease);
        this.written = own;
      }
    } catch (error) {
      if ((error as EngineError).kind === "lease") this.onLeaseOver();
      else this.reportProblem(error); // `keepLease` writes again
    } finally {
      this.isWriting = false;
    }
  }

  // Changes.

  isWaiting(): boolean {
    const { routes, tcp, name_routes } = this.lb.balancer.table.config;
    return this.inForce === 0 && routes.length + tcp.length === 0 && !name_routes;
  }

  async change(edit: (config: Config) => string, wait: number, replaces: boolean): Promise<string[]> {
    const end = this.effects.now() + CHANGE_TIME;
    let tried = "";
    for (let left = MOST_TRIES; left > 0;) {
      const base = this.document, { config } = this.lb.balancer.table;
      if (this.state !== "answers") throw new AdminError(503, "the fleet's engine is away: nothing can be changed");
      if (base?.problem && !replaces) {
        throw new AdminError(409, `the fleet's newest document cannot be used here: PUT /config replaces it`);
      }
      if (base && base.value === tried) return await this.waitForAll(base.revision, wait); // its answer was lost
      const text = tried = edit(config);
      if (text === base?.value) return [];
      try {
        const { isOurs, value, revision } = await this.engine.swap("config", text, base?.revision ?? 0);
        const isThere = isOurs || value === text; // then an answer was lost
        const hasCome = () => isThere ? (this.document?.revision ?? 0) >= revision : this.document !== base;
        if (!await this.waitUntil(hasCome, end - this.effects.now())) {
          throw new AdminError(503, isThere ? "it is written, and not in force here yet" : "the engine falls behind");
        }
        await this.applying;
        if (isThere) return await this.waitForAll(revision, wait);
        left--;
      } catch (error) {
        if (!(error instanceof EngineError)) throw error;
        if (error.kind !== "silent") throw new AdminError(500, `this could not be written: ${error.message}`);
        if (this.effects.now() >= end - CHANGE_TIME + RETRY_TIME) {
          throw new AdminError(503, `the fleet's engine is away: ${error.message}`);
        }
        await this.effects.sleep(PAUSES.least);
      }
    }
    throw new AdminError(409, `others were first, ${MOST_TRIES} times in a row: try again`);
  }

  /** Waits until all live instances have a document in force. Gives the names of those that have not. */
  private async waitForAll(revision: number, wait: number): Promise<string[]> {
    const missing = () =>
      [...this.records].filter(([name, { config }]) => (name === this.name ? this.inForce : config) < revision);
    if (wait > 0) await this.waitUntil(() => missing().length === 0, wait);
    return wait > 0 ? missing().map(([name]) => name) : [];
  }

  async mark(service: Service, server: Server, mark: "up" | "down" | FoundChange): Promise<boolean> {
    const isChange = typeof mark === "object", key = `told/${keyOfServer(server)}${isChange ? CHANGE : ""}`;
    const value = isChange ? JSON.stringify({ ...service.changes.get(server.url), ...mark }) : mark;
    const before = this.keys.get(key)?.revision, hasCome = () => this.keys.get(key)?.revision !== before;
    if (this.state !== "answers") return false;
    const isWritten = await this.engine.put(key, value).then(() => true, () => false);
    return isWritten && await this.waitUntil(hasCome, CHANGE_TIME); // the watch has brought it back
  }

  private async waitUntil(has: () => boolean, patience: number): Promise<boolean> {
    for (const end = this.effects.now() + patience; !has(); await this.effects.sleep(POLL)) {
      if (this.effects.now() >= end) return false;
    }
    return true;
  }

  // The local file.

  /** A document as the local file has it: with `fleet` of its own, but for the shared keys. */
  private localText(text: string): string {
    const raw = mapOf(readAsWritten(text, this.member.file).values), theirs = mapOf(raw.fleet);
    if (differences(withoutShared(theirs), withoutShared(this.local)).length === 0) return text;
    const shared = Object.entries(theirs).filter(([key]) => SHARED.includes(key));
    try {
      return rewrite(text, { ...raw, fleet: { ...withoutShared(this.local), ...Object.fromEntries(shared) } });
    } catch { // anchors
      return text;
    }
  }

  /** Parses a document with `fleet` of the local file, so that the variables of other instances need not be set here. */
  parse(text: string): Config {
    return { ...this.member.parse(this.localText(text)), text };
  }

  /** Copies a document to the local file. What stood there and was no copy stays beside it. */
  private async copy({ value, revision }: FleetDocument): Promise<void> {
    if (revision !== this.inForce) return; // a newer one follows
    const { member: { file, save, read }, effects: { report }, copied } = this;
    const there = read(), local = this.localText(value);
    const isOther = there !== local && (there !== copied.value || copied.revision === 0);
    const keeps = isOther && there !== undefined; // else somebody has removed it
    const why = copied.revision ? "was edited on the base of an older one than" : "said something else than";
    try {
      if (there !== local) await save(there ?? "", local, keeps);
      if (keeps) report("warn", `fleet: ${file} ${why} the fleet's document, which is there now; it is ${file}.bak`);
      this.copied = { value: local, revision };
    } catch (error) {
      if (read() === local) this.copied = { value: local, revision }; // another instance has done it
      else report("warn", `fleet: ${(error as Error).message}: the document is in force all the same`);
    }
  }

  /** Makes the local file the document if somebody has edited it. */
  async checkFile(): Promise<void> {
    await this.copying;
    const text = this.member.read(), { document, copied, local: before } = this;
    if (text === undefined || text === copied.value) return;
    if (this.state !== "answers") {
      return this.effects.report("warn", `fleet: the engine is away: ${this.member.file} counts when it is back`);
    }
    try {
      this.member.parse(text);
      const base = document?.problem ? document.revision : copied.revision; // what cannot be used is replaced
      const { fleet } = mapOf(readAsWritten(text, this.member.file).values);
      this.local = mapOf(fleet ?? before); // the watch may bring it before this is answered
      const { isOurs, revision } = await this.engine.swap("config", text, base);
      if (!isOurs) return void (this.local = before); // the other one is copied, over this one
      if (this.copied === copied) this.copied = { value: text, revision };
      const changes = differences(withoutShared(before), withoutShared(this.local));
      if (changes.length) this.effects.report("warn", FLEET_NEEDS_RESTART);
    } catch (error) {
      this.local = before;
      this.lb.balancer.reloadFailed = true;
      this.effects.report("error", `the old config stays in force:\n${(error as Error).message}`);
    }
  }

  // Views.

  view(): FleetView {
    const { name, state, problem, inForce: config } = this, answers = state === "answers";
    const all = [...this.records].map(([of, record]) => ({ name: of, ...of === name ? this.record() : record }));
    return {
      ...{ engine: answers ? "answers" : "away", since: this.since.toISOString(), problem, name, config },
      instances: all.map((one) => v.parse(INSTANCE, one)).sort((a, b) => a.name < b.name ? -1 : 1),
      probes: [...this.probing].map(([server, by]) => ({ server, by: answers ? by : [name] })),
    };
  }
  counted(): { refused: number; contact: number; resyncs: ReadonlyMap<string, number> } {
    const contact = (this.effects.now() - this.contactAt) / 1_000;
    return { refused: this.refused, contact, resyncs: this.resyncs };
  }
}
const CHANGE = "#change", NO_CHANGE = "{}"; // at the end of a key under told/, and what it holds when the server is gone
const NO_FLEET: FleetConfig = v.parse(FleetMap, {});

/** Makes this instance begin its probes of a server with the verdict in force. */
function beginProbing(server: Server): void {
  Object.assign(server, { upByOwnProbes: server.up, passes: 0, fails: 0 });
}

// --- 12.3 Discovery: the servers that DNS has under a name ---

/** Milliseconds until a name is looked up again: at least, at most, and after a failure. */
const LOOK_AGAIN = { least: 5_000, most: 60_000, failed: 2_000 };
const DNS_TIMEOUTS = { resolver: 1_000, system: 2_000 }; // milliseconds that an answer may take

/** Access to DNS, where `Effects` has it. */
interface Dns extends Pick<Effects, "resolveSrv" | "lookup" | "sleep"> {
  resolve: NonNullable<Effects["resolve"]>;
  resolvers: string[]; // empty: those of the machine
}

/** What a look has found. */
interface LookResult {
  found: FoundServer[];
  ttl: number; // seconds
  problem: string; // why some or all of it is missing; empty: nothing is
}

/** Waits for an answer; rejects when that takes too long. */
async function waitAtMost<T>(milliseconds: number, asked: Promise<T>, sleep: Effects["sleep"]): Promise<T> {
  const over = new AbortController();
  const late = sleep(milliseconds, over.signal).then(() => Promise.reject(new Error("no answer")));
  try {
    return await Promise.race([asked, late]);
  } finally {
    over.abort();
  }
}

/** Asks one resolver after the other; rejects with what the last one has said. */
async function askResolvers<T>({ resolvers, sleep }: Dns, ask: (resolver: string) => Promise<T[]>): Promise<T[]> {
  let problem: unknown;
  for (const resolver of resolvers.length ? resolvers : [""]) {
    try {
      const records = await waitAtMost(resolver ? DNS_TIMEOUTS.resolver : DNS_TIMEOUTS.system, ask(resolver), sleep);
      if (records.length) return records;
      problem = new Error("no records");
    } catch (error) {
      problem = error;
    }
  }
  throw problem;
}

/**
 * The addresses of a name: AAAA only where there is no A. The system is asked where DNS fails, for it knows the hosts file
 * and search domains, but no longer once DNS has known the name: others' answers for unknown names would replace it.
 */
async function addressesOf(name: string, dns: Dns, mayAskSystem: boolean): Promise<RecordWithTtl[]> {
  try {
    return await askResolvers(dns, async (resolver) => {
      const addresses = await dns.resolve(name, "A", resolver).catch(() => []);
      return addresses.length ? addresses : await dns.resolve(name, "AAAA", resolver);
    });
  } catch (error) {
    const all = mayAskSystem ? await waitAtMost(DNS_TIMEOUTS.system, dns.lookup(name), dns.sleep).catch(() => []) : [];
    const usable = all.filter(({ address }) => isAddress(address)),
      v4 = usable.filter(({ address }) => isIPv4(address));
    if (!usable.length) throw error;
    return v4.length ? v4 : usable;
  }
}

/** The servers at the addresses of a name. `url` is of that name, and says the scheme and port. */
function serversAt(
  url: string,
  addresses: RecordWithTtl[],
  more: Pick<FoundServer, "weight" | "backup">,
): FoundServer[] {
  const parsed = new URL(url), { protocol, hostname } = parsed, port = portOf(parsed);
  return addresses.map(({ address }) => {
    const at = `${protocol}//${isIPv6(address) ? `[${address}]` : address}:${port}`;
    const named = { authority: hostFieldOf(url), servername: bareAddress(hostname).replace(/\.$/, "") };
    return { url: v.parse(Url, at).url, name: hostOf(at), ...named, ...more, lacking: 0 };
  });
}

const PROBLEMS: Record<string, string> = {
  ENOTFOUND: "there is no such name",
  ENODATA: "the name has no such records",
  ESERVFAIL: "the resolver has failed (SERVFAIL)",
  ETIMEOUT: "no answer",
  ECONNREFUSED: "no resolver is there",
};
const problemOfDns = (error: Error & { code?: string }): string => PROBLEMS[error.code ?? ""] ?? error.message;

/** SRV records are in force for as long as the addresses of their servers: no runtime tells their own time. */
async function lookUpSrv({ name, url }: Discovery, dns: Dns): Promise<LookResult> {
  const records = await askResolvers(dns, (resolver) => dns.resolveSrv(name, resolver));
  const first = Math.min(...records.map(({ priority }) => priority)), scheme = url.slice(0, url.indexOf(":"));
  const looks = await Promise.allSettled(records.map(async ({ name: host, port, priority, weight }) => {
    const addresses = await addressesOf(host, dns, true);
    const at = v.parse(Url, `${scheme}://${host}:${port}`).url, backup = priority > first;
    return { addresses, servers: serversAt(at, addresses, { weight: Math.max(1, weight), backup }) }; // 0: a small chance
  }));
  const failed = looks.find((look) => look.status === "rejected");
  const good = looks.flatMap((look) => look.status === "fulfilled" ? [look.value] : []);
  const ttl = Math.min(...good.flatMap(({ addresses }) => addresses.map((one) => one.ttl)));
  return { found: good.flatMap(({ servers }) => servers), ttl, problem: failed ? problemOfDns(failed.reason) : "" };
}

/** Looks a name up. Never rejects. */
async function lookUp(discovery: Discovery, dns: Dns): Promise<LookResult> {
  const { find, url, found } = discovery;
  try {
    if (find === "srv") return await lookUpSrv(discovery, dns);
    const isOfDns = found.length > 0 && !discovery.isOfSystem;
    const addresses = await addressesOf(new URL(url).hostname, dns, !isOfDns);
    discovery.isOfSystem = addresses.every(({ ttl }) => ttl === 0);
    const ttl = Math.min(...addresses.map((one) => one.ttl));
    return { found: serversAt(url, addresses, { weight: 1, backup: false }), ttl, problem: "" };
  } catch (error) {
    return { found: [], ttl: 0, problem: problemOfDns(error as Error) };
  }
}

/**
 * The servers of a name after an answer: those of before in their order, then new ones. One that an answer lacks stays until
 * the next lacks it too, for many resolvers give a few of all addresses in turn.
 */
function afterAnswer(before: FoundServer[], { found, problem }: LookResult): FoundServer[] {
  const fresh = new Map(found.map((server) => [server.url, server]));
  const stayed = before.flatMap((server) => {
    const now = fresh.get(server.url), lacking = server.lacking + (problem ? 0 : 1);
    fresh.delete(server.url);
    if (now) return [now];
    return lacking < 2 ? [{ ...server, lacking }] : [];
  });
  return [...stayed, ...fresh.values()];
}

/** Puts the servers of a name in force. */
function setFound(balancer: Balancer, id: string, found: FoundServer[]): void {
  const discovery = balancer.table.names.get(id);
  if (!discovery) return; // it has left the config
  Object.assign(discovery, { found, isKnown: true });
  for (const service of balancer.table.services.values()) {
    if (service.names.includes(discovery)) refreshService(balancer, service);
  }
}

/** Says when answers begin to fail and when that ends, and which servers come and go. */
function reportLook({ name, found, problem }: Discovery, before: Discovery, report: Effects["report"]): void {
  const listed = (servers: FoundServer[], others: FoundServer[]) =>
    servers.filter(({ url }) => !others.some((other) => other.url === url)).map((server) => server.name).join(", ");
  const more = listed(found, before.found), gone = listed(before.found, found);
  const stay = found.length === 1 ? "the server of before stays" : `the ${found.length} servers of before stay`;
  const kept = found.length ? stay : "it has no server yet", plural = found.length === 1 ? "" : "s";
  if (problem && !before.problem) report("warn", `${name}: DNS has no good answer: ${problem}; ${kept}`);
  if (!problem && before.problem) report("info", `${name}: DNS answers again, with ${found.length} server${plural}`);
  if (more) report("info", `${name}: found ${more}`);
  if (gone) report("info", `${name}: gone are ${gone}`);
}

/** Puts the result of a look in force, and says when the next one is due. */
function applyLook(balancer: Balancer, discovery: Discovery, look: LookResult): void {
  const { effects } = balancer, now = effects.now(), { problem, ttl } = look, before = { ...discovery };
  const found = afterAnswer(before.found, look);
  const wait = problem ? LOOK_AGAIN.failed : Math.min(Math.max(1_000 * ttl, LOOK_AGAIN.least), LOOK_AGAIN.most);
  const staleSince = problem && !before.problem ? now : before.staleSince;
  const lookAt = now + wait * (problem ? 1 : 0.9 + 0.2 * effects.random());
  Object.assign(discovery, { found, problem, staleSince, lookAt });
  reportLook(discovery, before, effects.report);
  const plain = (servers: FoundServer[]) => JSON.stringify(servers.map((server) => ({ ...server, lacking: 0 })));
  if (before.isKnown && plain(found) === plain(before.found)) return;
  setFound(balancer, idOf(discovery), found);
  effects.onNews({ kind: "found", id: idOf(discovery), found });
}

/** Looks up all names that are due, and resolves when all answers are in. */
async function discoverDue(balancer: Balancer): Promise<void> {
  const { table: { names, config: { resolvers } }, effects: { resolve, ...others } } = balancer, now = others.now();
  if (!resolve) return;
  const due = [...names.values()].filter(({ lookAt }) => lookAt <= now);
  for (const discovery of due) discovery.lookAt = Infinity;
  await Promise.all(due.map(async (discovery) => {
    applyLook(balancer, discovery, await lookUp(discovery, { ...others, resolve, resolvers }));
  }));
}

const FIRST_LOOK = 2_000; // milliseconds that the start waits for it
/** Looks up the names of a balancer that starts. Those that are unknown then do not stop the start. */
const firstLook = ({ balancer }: LoadBalancer): Promise<void> =>
  waitAtMost(FIRST_LOOK, discoverDue(balancer), balancer.effects.sleep).catch(() => {});

// --- 12.4 Durable Object: an engine at the edge, which answers as etcd does ---

/** As much as is used of what the platform gives a Durable Object. */
interface DurableState {
  storage: {
    list(): Promise<Map<string, unknown>>;
    put(entries: Raw): Promise<void>;
    delete(names: string[]): Promise<unknown>;
    setAlarm(at: number): Promise<void>;
  };
  blockConcurrencyWhile(work: () => Promise<void>): Promise<void>;
}

/** A key as etcd's JSON has it. */
interface StoredKey {
  key: string; // this and the value in base64
  value: string;
  mod_revision: string;
  lease: string;
}
/** A change of a key as etcd's JSON has it: a deletion has neither value nor lease. */
interface StoredEvent {
  type?: "DELETE";
  kv: Pick<StoredKey, "key" | "mod_revision"> & Partial<StoredKey>;
}
interface Watcher {
  covers(name: string): boolean;
  stream: ReadableStreamDefaultController<Uint8Array>;
}

const MOST_EVENTS = 1_000; // that a watch may be behind
const MOST_VALUE = 1.9e6; // characters in base64: the platform stores 2 MB under a key
const MOST_UNREAD = 100; // pieces for a watcher that does not read
const bytesOf = (text: unknown): string => Buffer.from(String(text ?? ""), "base64").toString("latin1");

/** Whether a key is in a range of etcd's: without an end it is that key alone. */
function rangeOf({ key, range_end }: Raw): (name: string) => boolean {
  const from = bytesOf(key), end = range_end === undefined ? undefined : bytesOf(range_end);
  return (name) => end === undefined ? name === from : name >= from && (end === "\0" || name < end);
}

/** A call that etcd refuses: its code is gRPC's. */
const engineRefusal = (status: number, code: number, message: string): Response =>
  Response.json({ error: message, message, code }, { status });
const noSuchLease = (): Response => engineRefusal(404, 5, "etcdserver: requested lease not found");

/**
 * The engine of a fleet at the edge: a Durable Object that answers the calls of etcd's JSON gateway that a fleet makes.
 * Keys and leases are in its storage, and an alarm ends leases.
 */
export class LbFleet {
  private readonly storage: DurableState["storage"];
  private readonly loaded: Promise<void>;
  private keys = new Map<string, StoredKey>(); // by their bytes
  private leases = new Map<string, { ttl: number; until: number }>(); // seconds; milliseconds, which `load` counts anew
  private revision = 1;
  private forgotten = 1; // no event of this revision or an earlier one is known
  private readonly events: StoredEvent[] = [];
  private readonly watchers = new Set<Watcher>();
  private alarmAt = Infinity;

  constructor(state: DurableState) {
    this.storage = state.storage;
    this.loaded = state.blockConcurrencyWhile(() => this.load());
  }

  private async load(): Promise<void> {
    for (const [name, value] of await this.storage.list()) {
      if (name === "revision") this.revision = this.forgotten = value as number;
      else if (name.startsWith("key ")) this.keys.set(name.slice(4), value as StoredKey);
      else this.leases.set(name.slice(6), { ttl: value as number, until: Date.now() + 1_000 * Number(value) });
    }
    await this.setAlarm();
  }

  /** Answers a call: `.../v3/kv/range` and the like. */
  async fetch(request: Request): Promise<Response> {
    const path = new URL(request.url).pathname.replace(/^.*\/v3\//, "");
    const body = mapOf(await request.json().catch(() => undefined));
    await this.loaded;
    await this.alarm();
    if (path === "watch") return this.watch(mapOf(body.create_request));
    const id = String(body.ID ?? "");
    if (path === "kv/range") return this.answer(this.list(body));
    if (path === "kv/txn") return await this.transact(body);
    if (path === "lease/grant") return await this.grant(Math.max(1, Math.ceil(Number(body.TTL) || 0)));
    if (path === "lease/keepalive") return this.keepAlive(id);
    if (path === "lease/revoke") {
      if (!this.leases.has(id)) return noSuchLease();
      await this.endLeases([id]);
      return this.answer({});
    }
    return engineRefusal(404, 5, "Not Found");
  }

  /** Ends the leases that nobody has kept alive. */
  async alarm(): Promise<void> {
    const now = Date.now(), over = [...this.leases].filter(([, { until }]) => until <= now).map(([id]) => id);
    if (over.length) await this.endLeases(over);
    await this.setAlarm();
  }
  private async setAlarm(): Promise<void> {
    const next = Math.min(...[...this.leases.values()].map(({ until }) => until));
    if (this.alarmAt <= Date.now()) this.alarmAt = Infinity;
    if (next >= this.alarmAt) return; // which looks again
    this.alarmAt = next;
    await this.storage.setAlarm(next);
  }

  private withHeader(answer: Raw): Raw {
    return { header: { revision: `${this.revision}` }, ...answer };
  }
  private answer(answer: Raw): Response {
    return Response.json(this.withHeader(answer));
  }

  private list(range: Raw): Raw {
    const names = [...this.keys.keys()].filter(rangeOf(range)).sort(), kvs = names.map((name) => this.keys.get(name)!);
    return { kvs: range.keys_only ? kvs.map(({ value: _, ...kv }) => kv) : kvs };
  }

  /** Puts keys where those that it compares have these revisions; else it lists keys. A fleet asks for nothing else. */
  private async transact({ compare: wanted = [], success = [], failure = [] }: Raw): Promise<Response> {
    const revisionOf = (key: unknown) => this.keys.get(bytesOf(key))?.mod_revision ?? "0";
    const succeeded = (wanted as Raw[]).every(({ key, mod_revision }) => revisionOf(key) === mod_revision);
    if (!succeeded) {
      const lists = (failure as Raw[]).map(({ request_range }) => this.list(mapOf(request_range)));
      return this.answer({ succeeded, responses: lists.map((response_range) => ({ response_range })) });
    }
    const puts = (success as Raw[]).map(({ request_put }) => mapOf(request_put)).map(({ key, value, lease }) => ({
      ...{ key: String(key ?? ""), value: String(value ?? ""), lease: String(lease ?? "0") },
    }));
    if (puts.some(({ lease }) => lease !== "0" && !this.leases.has(lease))) return noSuchLease();
    if (puts.some(({ value }) => value.length > MOST_VALUE)) {
      return engineRefusal(400, 3, "etcdserver: request is too large");
    }
    await this.commit(puts.map((put) => [bytesOf(put.key), put]));
    return this.answer({ succeeded });
  }

  private async grant(ttl: number): Promise<Response> {
    const id = `${1 + Math.floor(Math.random() * (2 ** 53 - 1))}`;
    this.leases.set(id, { ttl, until: Date.now() + 1_000 * ttl });
    await this.storage.put({ [`lease ${id}`]: ttl });
    await this.setAlarm();
    return this.answer({ ID: id, TTL: `${ttl}` });
  }
  private keepAlive(id: string): Response {
    const lease = this.leases.get(id);
    if (lease) lease.until = Date.now() + 1_000 * lease.ttl;
    return Response.json({ result: this.withHeader({ ID: id, ...lease && { TTL: `${lease.ttl}` } }) });
  }

  /** Ends leases, and their keys with them. */
  private async endLeases(ids: string[]): Promise<void> {
    for (const id of ids) this.leases.delete(id);
    const names = [...this.keys].filter(([, { lease }]) => ids.includes(lease)).map(([name]) => name);
    await this.commit(names.map((name) => [name, undefined]));
    await this.storage.delete(ids.map((id) => `lease ${id}`));
  }

  /** Changes keys under one revision, stores that and tells the watchers. Without a value a key is deleted. */
  private async commit(changes: [name: string, put: Omit<StoredKey, "mod_revision"> | undefined][]): Promise<void> {
    if (!changes.length) return;
    const mod_revision = `${++this.revision}`, stored: Raw = { revision: this.revision }, gone: string[] = [];
    const fresh = changes.map(([name, put]): StoredEvent => {
      const { key } = put ?? this.keys.get(name)!, kv = put && { ...put, mod_revision };
      if (kv) stored[`key ${name}`] = kv;
      else gone.push(`key ${name}`);
      if (kv) this.keys.set(name, kv);
      else this.keys.delete(name);
      return kv ? { kv } : { type: "DELETE", kv: { key, mod_revision } };
    });
    this.events.push(...fresh);
    while (this.events.length > MOST_EVENTS) this.forgotten = Number(this.events.shift()!.kv.mod_revision);
    await this.storage.put(stored);
    if (gone.length) await this.storage.delete(gone);
    for (const watcher of this.watchers) this.send(watcher, fresh);
  }

  private watch(range: Raw): Response {
    const covers = rangeOf(range), from = Number(range.start_revision ?? 0) || this.revision + 1;
    let watcher: Watcher | undefined;
    const stream = new ReadableStream<Uint8Array>({
      start: (stream) => {
        watcher = { covers, stream };
        this.write(watcher, { created: true });
        if (from <= this.forgotten) {
          this.write(watcher, { canceled: true, compact_revision: `${this.forgotten + 1}` });
          return stream.close();
        }
        this.watchers.add(watcher);
        this.send(watcher, this.events.filter(({ kv }) => Number(kv.mod_revision) >= from));
      },
      cancel: () => void (watcher && this.watchers.delete(watcher)),
    });
    return new Response(stream, { headers: { "content-type": "application/json" } });
  }

  /** Tells a watcher what has changed of the keys that it covers. */
  private send(watcher: Watcher, changes: StoredEvent[]): void {
    const events = changes.filter(({ kv }) => watcher.covers(bytesOf(kv.key)));
    if (events.length) this.write(watcher, { events });
  }
  private write(watcher: Watcher, result: Raw): void {
    const { stream } = watcher, line = JSON.stringify({ result: this.withHeader(result) });
    try {
      stream.enqueue(Buffer.from(`${line}\n`));
      if ((stream.desiredSize ?? 0) > -MOST_UNREAD) return;
      stream.close(); // it lists again when it reads on
    } catch { /* its client has left */ }
    this.watchers.delete(watcher);
  }
}

// -----------------------------------------------------------------------------------------------------------
// 13. Program
// The program around the balancer: effects of the runtimes, command line, listeners, workers, signals, edge.
// Only this chapter names runtimes.
// -----------------------------------------------------------------------------------------------------------

// --- 13.1 TLS: certificates of listeners, read again when their files change ---

type CertificateFiles = Pick<ListenerConfig, "tls" | "client_ca">;
/** A certificate with its key, as PEM. */
interface Pair {
  cert: string;
  key: string;
}
/** What a listener over TLS needs. */
interface Secure {
  pairs: Pair[]; // the first is for clients that ask for none of the names
  clientCa: string; // the authority of clients' certificates, as PEM; empty: clients need none
}

/** Reads and parses a PEM file. @throws {Error} with the file and what it does not contain */
function parsePem<T>(file: string, what: string, kind: Pem, parse: (text: string) => T): T {
  const text = readPem(file, kind);
  try {
    return parse(text);
  } catch {
    throw new Error(`${file} holds no ${what} (PEM)`);
  }
}

const readCertificate = (file: string): X509Certificate =>
  parsePem(file, "certificate", "CERTIFICATE", (text) => new X509Certificate(text));

/** @throws {Error} with the file and what is wrong with it */
function readPair({ cert, key }: Pair): Pair {
  const certificate = readCertificate(cert);
  const own = parsePem(key, "private key without a password", "PRIVATE KEY", createPrivateKey);
  if (!certificate.checkPrivateKey(own)) throw new Error(`${key} is not the key of ${cert}`);
  return { cert: readPem(cert, "CERTIFICATE"), key: readPem(key, "PRIVATE KEY") };
}

/** The host names that a certificate is for. */
function namesOf({ subjectAltName = "", subject }: X509Certificate): string[] {
  const names = [...subjectAltName.matchAll(/DNS:([^\s,"]+)/g)].map(([, name]) => lower(name!));
  const common = /^CN=(\S+)$/m.exec(subject)?.[1];
  return names.length || !common ? names : [lower(common)];
}

/** @throws {Error} with the file and what is wrong with it */
function readSecure({ tls, client_ca }: CertificateFiles): Secure {
  if (client_ca) readCertificate(client_ca);
  return { pairs: tls.map(readPair), clientCa: client_ca && readPem(client_ca, "CERTIFICATE") };
}

/**
 * A server of node:tls that does not listen: listeners hand it the connections that they have accepted. So limits are
 * checked before the handshake, and a reload of certificates replaces this object.
 */
function tlsServer({ pairs, clientCa }: Secure, protocols: string[], take: (socket: TLSSocket) => void): TlsServer {
  const contexts = pairs.map(({ cert, key }) => {
    const own = { cert, key, minVersion: "TLSv1.2" as const, ...(clientCa && { ca: clientCa }) };
    return { own, names: namesOf(new X509Certificate(cert)), context: createSecureContext(own) };
  });
  const contextFor = (name: string) => {
    const asked = lower(name), wildcard = asked.replace(/^[^.]*/, "*"); // of any label (RFC 6125 section 6.4.3)
    const named = (own: string) => contexts.find(({ names }) => names.includes(own));
    return (named(asked) ?? named(wildcard) ?? contexts[0])?.context;
  };
  const options: TlsOptions = {
    ...contexts[0]!.own,
    ...(clientCa && { requestCert: true, rejectUnauthorized: true }),
    ALPNProtocols: protocols,
    // with an SNICallback Deno sends no alert to clients that it refuses (2.9.6)
    ...(pairs.length > 1 && { SNICallback: (name, done) => done(null, contextFor(name)) }),
    allowHalfOpen: true,
  };
  const verified = new Set<string>(); // fingerprints of clients' certificates that a full handshake has checked here
  const isVerified = (socket: TLSSocket) => {
    const { fingerprint256 = "" } = socket.getPeerCertificate() ?? {};
    if (!socket.isSessionReused()) verified.add(fingerprint256);
    return verified.has(fingerprint256);
  };
  // Deno resumes sessions of other listeners of the process, which may ask for no certificate (2.9.6)
  const admit = (socket: TLSSocket) => !clientCa || isVerified(socket) ? take(socket) : socket.destroy();
  const server = createTlsServer(options, admit);
  server.on("tlsClientError", (_error, socket: TLSSocket) => socket.destroy());
  return server;
}

/** Changes with the content of a file, also when an editor replaces the file; empty: it cannot be read. */
function fileStamp(file: string): string {
  try {
    const { mtimeMs, size, ino } = fs.statSync(file);
    return `${mtimeMs} ${size} ${ino}`;
  } catch {
    return "";
  }
}

/** Says at each look whether files are others than those in use, and the same as at the look before: nobody is writing. */
function changeDetector(known: string): (stamp: string) => boolean {
  let last = known;
  return (stamp) => {
    const isStill = stamp === last, isOther = stamp !== known;
    last = stamp;
    if (isStill) known = stamp;
    return isStill && isOther;
  };
}

/** Changes with the files of a listener's certificates. */
const stampOf = ({ tls, client_ca }: CertificateFiles): string =>
  [...tls.flatMap(({ cert, key }) => [cert, key]), client_ca].filter(Boolean).map((file) => file + fileStamp(file))
    .join();

/** What is wrong with certificate files. As in nginx and Caddy, listeners use a certificate that is out of date. */
function problemsIn(files: CertificateFiles, now: Date): string[] {
  try {
    readSecure(files);
  } catch (error) {
    return [(error as Error).message];
  }
  return files.tls.flatMap(({ cert }) => {
    const { validFrom, validTo } = readCertificate(cert), [from, to] = [new Date(validFrom), new Date(validTo)];
    if (now > to) return [`${cert} has expired on ${dayOf(to)}`];
    return now < from ? [`${cert} is not valid before ${dayOf(from)}`] : [];
  });
}

/** What is wrong with the certificate files that a config names. */
function problemsOf({ listen, tcp, services }: Config, now: Date): string[] {
  const check = (where: string, files: CertificateFiles) => problemsIn(files, now).map((one) => `${where}: ${one}`);
  return [
    ...listen.flatMap((at, i) => check(`listen[${i}]`, at)),
    ...tcp.flatMap(({ name, listen }) => listen.flatMap((at) => check(name, at))),
    ...[...services].flatMap(([name, { tls: { ca, cert, key } }]) => [
      ...check(`${name}: tls`, { tls: [], client_ca: ca }),
      ...check(`${name}: tls`, { tls: cert ? [{ cert, key }] : [], client_ca: "" }),
    ]),
  ];
}

// --- 13.2 Runtimes: what Deno, Bun, Node and the edge do in ways of their own ---

/** A report in which text of a server or client can neither begin a line nor control a terminal. */
const oneLine = (text: string): string =>
  text.replace(/[^\n\x20-\x7e\xa0-\uffff]/g, (c) => `\\x${c.charCodeAt(0).toString(16).padStart(2, "0")}`)
    .replaceAll("\n", "\n  ");

/** Writes a report to standard error, with the time; the edge's platform adds its own. */
const printReport: Effects["report"] = (level, text) =>
  console.error(`${AT_THE_EDGE ? "" : `${new Date().toISOString()} `}${level}: ${oneLine(text)}`);
const AT_THE_EDGE =
  (globalThis as { navigator?: { userAgent?: string } }).navigator?.userAgent === "Cloudflare-Workers";

/** The runtime. The edge comes first, since workerd has Node's names too. */
const HERE = ((): "edge" | "deno" | "bun" | "node" => {
  if (AT_THE_EDGE) return "edge";
  if ("Deno" in globalThis) return "deno";
  return "Bun" in globalThis ? "bun" : "node";
})();

/** Writes bytes to standard output, and gives how many. While the pipe is full, tries again after 1, 2, 4, ... 50 ms. */
function writeOut(bytes: Uint8Array, wait = 1): Promise<number> {
  if (HERE === "deno") return (globalThis as unknown as DenoApi).Deno.stdout.write(bytes); // its fs.write blocks the thread
  return new Promise((resolve, reject) => {
    fs.write(1, bytes, (error, written) => {
      if (error?.code === "EAGAIN") setTimeout(() => resolve(writeOut(bytes, Math.min(2 * wait, 50))), wait);
      else if (error) reject(error);
      else resolve(written);
    });
  });
}
type DenoApi = { Deno: { stdout: { write(bytes: Uint8Array): Promise<number> } } };

/** Monotonic milliseconds and the date, read once in each turn of the event loop. */
function clock(): { now: number; date: Date } {
  if (clockOfTurn) return clockOfTurn;
  const read = { now: performance.now(), date: new Date() };
  if (HERE === "edge") return read; // immediates there end with their request and may never run
  setImmediate(() => clockOfTurn = undefined);
  return clockOfTurn = read;
}
let clockOfTurn: ReturnType<typeof clock> | undefined;
const currentTime = (): number => clock().now;

/** What HTTP servers pass with a Request about its client: ours, Deno's, Bun's, and @hono/node-server. */
interface ServerEnv {
  incoming?: HttpRequest | { socket?: { remoteAddress?: string } };
  remoteAddr?: { hostname?: string };
  requestIP?(request: Request): { address: string } | null;
}

/** The client of a Request. At the edge a header of the platform has its address. */
function clientOf(request: Request, env: unknown): Client {
  const { incoming, remoteAddr, requestIP } = (env ?? {}) as ServerEnv, headers = [...request.headers].flat();
  if (incoming && "block" in incoming) return { address: incoming.peer, scheme: incoming.scheme, headers };
  const address = remoteAddr?.hostname ?? (requestIP && requestIP.call(env, request)?.address) ??
    incoming?.socket?.remoteAddress ?? (HERE === "edge" && request.headers.get("cf-connecting-ip") || undefined);
  const scheme = request.url.startsWith("https:") ? "https" : "http";
  return { address: unmapped(address), scheme, headers, upgrades: HERE === "edge" };
}

/** A resolver, made for one question: Bun's never asks again after a negative answer (1.4.5). */
function newResolver(resolver: string): Resolver {
  const made = new Resolver({ timeout: DNS_TIMEOUTS.resolver, tries: 2 });
  if (resolver) made.setServers([resolver]);
  return made;
}

/** DNS of this machine. At the edge the platform asks it. */
const DNS: Pick<Effects, "resolve" | "resolveSrv" | "lookup"> = {
  resolve: HERE === "edge"
    ? undefined
    : (name, type, resolver) => newResolver(resolver)[type === "A" ? "resolve4" : "resolve6"](name, { ttl: true }),
  resolveSrv: (name, resolver) => newResolver(resolver).resolveSrv(name),
  lookup: async (name) => (await lookupName(name, { all: true })).map(({ address }) => ({ address, ttl: 0 })),
};

/** What a certificate is for, and until when; undefined: it cannot be read, as is reported at the start and at reloads. */
function certificateIn(file: string): ReturnType<Effects["certificate"]> {
  try {
    const certificate = readCertificate(file);
    return { names: namesOf(certificate), until: new Date(certificate.validTo) };
  } catch {
    return undefined;
  }
}

/** The effects of the runtime that this runs on. */
function defaultEffects(): Omit<Effects, "accessLog"> {
  const client = new HttpClient({ now: currentTime });
  let secret = "";
  return {
    send: HERE !== "edge" ? (attempt) => client.send(attempt) : sendByFetch(nativeFetch),
    connect: (server, timeout) => client.connect(server, timeout), // at the edge no health check asks for it
    now: currentTime,
    date: () => clock().date,
    random: Math.random,
    sign: (secret, text) => createHmac("sha256", secret).update(text).digest("base64url"),
    secret: () => secret ||= randomBytes(32).toString("base64url"), // the edge has no random bytes before a request
    sleep: (milliseconds, signal) =>
      new Promise((resolve) => {
        const timer = setTimeout(resolve, milliseconds);
        signal?.addEventListener("abort", () => clearTimeout(timer), { once: true });
      }),
    client: clientOf,
    ...DNS,
    onNews: () => {},
    certificate: certificateIn,
    report: printReport,
  };
}

// --- 13.3 Library: a balancer with the effects of this runtime ---

/** Effects of the library's user, in place of the runtime's. `fetch` sends attempts by a function of the Fetch API. */
type OwnEffects = Partial<Effects> & { fetch?: Fetch };

/** A strategy of the library's user that throws where the user's function returns no candidate. */
function checkedStrategy(name: string, own: Strategy): Strategy {
  const checked: Strategy = (candidates, input) => {
    const server: unknown = own(candidates, input);
    if (candidates.includes(server as Server)) return server as Server;
    const other = isRecord(server) ? "another object" : String(server);
    const what = server instanceof Promise ? "a promise" : other;
    throw new TypeError(
      `strategy ${name} returned ${what}; it has to return one of the servers that it is called with`,
    );
  };
  return Object.assign(checked, own.score && { score: own.score });
}

const logToConsole: Effects["accessLog"] = (record, format) => console.log(accessLine(record, format));

/**
 * Makes a load balancer of a parsed config. It writes an access log only where the config has `log`, or to your effect.
 * @param options effects in place of the runtime's, such as a clock or a transport, and your own strategies by the names
 *   that `strategy:` may then have
 */
export function createLoadBalancer(
  config: Config,
  options: OwnEffects & { strategies?: Strategies } = {},
): LoadBalancer {
  const { fetch: sends, strategies: own = {}, ...others } = options;
  const accessLog: Effects["accessLog"] = (...entry) =>
    "log" in lb.balancer.table.config.written && logToConsole(...entry);
  const all: Effects = { ...defaultEffects(), accessLog, ...sends && { send: sendByFetch(sends) }, ...others };
  const checked = Object.entries(own).map(([name, strategy]) => [name, checkedStrategy(name, strategy)]);
  const lb: LoadBalancer = assembleBalancer(config, all, {
    ...{ strategies: { ...strategies, ...Object.fromEntries(checked) }, runtime: HERE, discover: discoverDue },
  });
  return lb;
}

// --- 13.4 Command line: options, then the environment, then the file ---

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
  -H, --header FIELD     of the request to explain, such as 'x-canary: 1'; may stand several times
      --schema           print the JSON Schema of routes.yml
      --demo             start three small servers and balance over them, with a dashboard on 127.0.0.1:9090
  -h, --help             print this
      --version          print the version

SIGHUP, or a change of the file, puts the file in force again; SIGTERM and SIGINT drain, and end at once when repeated.
`;

/** The options that USAGE lists, as node:util takes them: those with a value in capitals are strings. */
const OPTIONS = Object.fromEntries(
  Array.from(USAGE.matchAll(/^ {2}(?:-(\w),| {3}) --([\w-]+)( [A-Z]+)?/gm), ([, short, name = "", value]) => {
    const type = value ? "string" as const : "boolean" as const;
    return [name, { type, multiple: name === "header", ...short && { short } }];
  }),
);

/** A command line or environment that cannot be used: exit status 2. */
class UsageError extends Error {}

/** What the program was asked to do: options, then the environment, then what the file says. */
interface Call {
  options: Record<string, unknown>;
  file: string;
  listen: string | undefined;
  admin: string | undefined;
  log: string | undefined;
  workers: number;
  drain: number; // milliseconds
  env: Record<string, string | undefined>;
}

const WorkerCount = term("auto or a whole number from 1 to 256", /^(?:auto|[1-9]\d{0,2})$/, (text) => {
  return text === "auto" ? availableParallelism() : Number(text) <= 256 && Number(text);
});

/** What is wrong with an option, from the error of node:util. */
function misused({ code, message }: { code: string; message: string }): string {
  const [, option = ""] = /'(?:-\w, )?(--?[\w-]+)/.exec(message) ?? [], names = Object.keys(OPTIONS);
  const hint = guess(option.replace(/^-+/, ""), names).replace(/"(?=\w)/g, '"--');
  if (code === "ERR_PARSE_ARGS_UNKNOWN_OPTION") return `${option} is not an option${hint}`;
  return `${option} ${/argument (?:missing|is ambiguous)/.test(message) ? "needs a value" : "takes no value"}`;
}

function readCall(args: string[], env: Call["env"]): Call {
  let parsed;
  try {
    parsed = parseArgs({ args, options: OPTIONS, allowPositionals: true });
  } catch (error) {
    throw new UsageError(misused(error as Error & { code: string }));
  }
  const { values, positionals } = parsed;
  if (positionals.length > 1) throw new UsageError(`one file expected, not ${positionals.join(" and ")}`);
  if (values.demo && positionals.length) throw new UsageError(`--demo takes no file: ${positionals[0]}`);
  const option = (name: string) => values[name] as string | undefined;
  const variable = (name: string) => env[`LB_${name.toUpperCase()}`] || undefined; // an empty variable is none
  const given = (name: string) => option(name) ?? variable(name);
  return {
    options: values,
    file: option("config") ?? positionals[0] ?? variable("config") ?? "routes.yml",
    listen: option("listen") ?? option("port") ?? variable("listen") ?? variable("port"),
    admin: given("admin"),
    log: given("log"),
    workers: readOption("--workers or LB_WORKERS", WorkerCount, given("workers") ?? "1"),
    drain: readOption("--drain", duration(0), option("drain") ?? "30s"),
    env,
  };
}

/** Reads a value of the command line or the environment by the schema that the file has for it. */
function readOption<T>(name: string, schema: v.GenericSchema<unknown, T>, text: string, value: unknown = text): T {
  const { success, issues, output } = v.safeParse(schema, value);
  if (success) return output;
  throw new UsageError(`${name}: ${issues[0].message.replace(/^\$/, () => quote(text))}`);
}

/** Reads the file; options and the environment replace what it says. */
function loadConfig({ file, env, listen, admin, log }: Call, text = readText(file)): Config {
  const config = parseConfig(text, { env, file }), { source } = config;
  if (listen !== undefined) {
    const at = readOption("--listen, --port, LB_LISTEN or LB_PORT", Listen, listen);
    config.listen = [{ ...at, tls: [], client_ca: "", h2c: false }];
    source.listen = /^\d+$/.test(listen) ? Number(listen) : listen;
  }
  if (admin !== undefined) {
    const own = admin === "off" ? undefined : { ...mapOf(source.admin), listen: admin };
    config.admin = own && readOption("--admin or LB_ADMIN", Admin, admin, own);
    source.admin = own;
  }
  if (log !== undefined) {
    const format = config.log.format = readOption("--log or LB_LOG", LogFormat, log);
    source.log = isRecord(source.log) ? { ...source.log, format } : format;
  }
  return config;
}

function readText(file: string): string {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(fs.readFileSync(file)); // fatal: saving would lose bytes
  } catch (error) {
    const why = whyUnreadable(error), isMissing = (error as { code?: string }).code === "ENOENT";
    const message = `cannot be read: ${why}${isMissing ? "; -c FILE names another one, --demo needs none" : ""}`;
    throw new ConfigError(file, [{ line: 1, column: 1, path: "", message }]);
  }
}

// --- 13.5 Listeners: opened, updated with the config and certificates, and drained ---

/** A valid config cannot be served: exit status 1. */
class StartError extends Error {}

/** A listener that is open. */
interface Listener {
  /** host:port */
  address: string;
  /** Takes no more connections, and resolves when those that are open have ended. */
  close(): Promise<unknown>;
  /** Whether bytes wait to be sent to a client. */
  isWriting(): boolean;
  /** Uses other certificates for new connections. If that throws, the old ones stay. */
  swap(secure: Secure): void;
}

/** Where to listen. `shared`: with other threads and processes (SO_REUSEPORT); `mode`: of a Unix socket. */
type ListenAt = Address & { shared: boolean; mode?: number | undefined; secure: Secure | undefined };

/** What a listener does with its connections. */
interface Protocol {
  alpn: string[]; // what clients over TLS may choose
  take(socket: Socket, address: string): void;
  refuse(socket: Socket, why: FailureName, address: string): void;
  /** The listener has closed: connections end with the response in progress. */
  close(): void;
  isWriting(): boolean;
}

/** HTTP for a balancer or another app. `http2`: whether it takes HTTP/2 without TLS. */
function httpProtocol(app: LoadBalancer | { fetch: Serve }, overTls = false, http2?: () => boolean): Protocol {
  let isClosed = false;
  const { handle, balancer }: Partial<LoadBalancer> = "balancer" in app ? app : {};
  const http = new HttpServer({
    handle: handle ?? handleByFetch((request, env) => app.fetch(request, env), printReport),
    limits: () => limitsOf(balancer),
    draining: () => isClosed || balancer?.draining === true,
    now: currentTime,
    ...http2 && { http2 },
  });
  return {
    alpn: ["h2", "http/1.1", "http/1.0"],
    take: (socket) => http.accept(socket, overTls ? "https" : "http"),
    refuse(socket, why) {
      if (balancer) countFailure(balancer, why);
      if (overTls && why !== "bad-scheme") socket.destroy(); // no response is possible before a handshake
      else http.refuse(socket, why);
    },
    close() {
      isClosed = true;
      for (const connection of http.connections) connection.closeIdle();
    },
    isWriting: () => [...http.connections].some((one) => one.isWriting()),
  };
}
const limitsOf = (balancer?: Balancer): Config["limits"] => balancer?.table.config.limits ?? NO_LIMITS;
const NO_LIMITS = v.parse(Limits, {});

/** TCP to the servers of a listener, whose address in the file this is. */
const tcpProtocol = (balancer: Balancer, inFile: string): Protocol => ({
  alpn: ["http/1.1", "http/1.0"], // not HTTP/2, which servers behind TLS seldom speak
  take: (socket, address) => relayTcp(balancer, inFile, address, socket),
  refuse: (socket, why, address) => relayTcp(balancer, inFile, address, socket, why),
  close() {},
  isWriting: () => false,
});

/** Removes the file of a Unix socket on which nobody listens any more: a process that was killed leaves it behind. */
async function removeStaleSocket(path: string): Promise<void> {
  if (!fs.statSync(path, { throwIfNoEntry: false })?.isSocket()) return;
  const found = await connectWithin(1_000, netConnect({ path }));
  if (!(found instanceof WireError)) found.destroy();
  else if (found.message.includes("ECONNREFUSED")) fs.rmSync(path, { force: true });
}

/**
 * Listens, and counts and limits connections where they are a balancer's.
 * @throws {StartError} with the address and why it cannot be listened on
 */
async function listenOn(at: ListenAt, protocol: Protocol, balancer?: Balancer): Promise<Listener> {
  const { host, port, shared: reusePort, mode = 0o660, secure } = at, path = isUnix(host) ? pathOfUnix(host) : "";
  const shaking = new Map<string, [Socket, number]>(); // handshakes, by client
  let address = shownAddress(host, port);
  const secured = (own: Secure) =>
    tlsServer(own, protocol.alpn, (socket) => {
      shaking.delete(peerOf(socket));
      socket.allowHalfOpen = true;
      protocol.take(socket, address);
    });
  let tls = secure && secured(secure);
  const canShare = !secure && HERE !== "bun"; // read buffers, as connections to servers do
  // a client that ends its side during a handshake has left: so no half-open connections where there is TLS
  const server = createServer({ allowHalfOpen: !secure, noDelay: true, pauseOnConnect: canShare }, (accepted) => {
    const socket = canShare ? withSharedReads(accepted) : accepted;
    const refusal = balancer && admitConnection(balancer, socket, path !== "");
    if (refusal) return protocol.refuse(socket, refusal, address);
    socket.setKeepAlive(true, KEEP_ALIVE);
    if (!tls) return protocol.take(socket, address);
    const peer = peerOf(socket);
    shaking.set(peer, [socket, currentTime()]);
    socket.on("error", () => {}); // `close` follows
    socket.on("close", () => shaking.delete(peer));
    socket.once("data", (first: Bytes) => {
      socket.pause();
      socket.unshift(first);
      if (first[0] === TLS_HANDSHAKE) tls!.emit("connection", socket);
      else protocol.refuse(socket, "bad-scheme", address);
    });
  });
  const timer = setInterval(() => {
    const { header } = limitsOf(balancer); // a TLS handshake may take as long as a request head
    for (const [socket, began] of shaking.values()) if (currentTime() - began >= header) socket.destroy();
    acceptAgain(server as object);
  }, 500);
  try {
    if (path) await removeStaleSocket(path);
    await new Promise<void>((resolve, reject) => {
      server.on("error", reject);
      server.listen(path ? { path } : { port, reusePort, ...(host && { host: bareAddress(host) }) }, resolve);
    });
    if (path) fs.chmodSync(path, mode);
  } catch (error) {
    clearInterval(timer);
    return cannotListen(at)(error as Error);
  }
  address = shownAddress(host, (server.address() as AddressInfo).port);
  const close = () =>
    new Promise<void>((resolve) => {
      clearInterval(timer);
      for (const [socket] of shaking.values()) socket.destroy();
      server.close(() => resolve());
      if (path) fs.rmSync(path, { force: true }); // Deno does it later, or not before the process ends
      protocol.close?.();
    });
  return { address, close, isWriting: protocol.isWriting, swap: (next) => void (tls = secured(next)) };
}

/**
 * Makes a listener of Deno accept again. When the process runs out of file handles it stops for ever, without an event
 * (2.9.6); a listener that accepts is not changed. `_handle` is no public API: without it the listener would stay stopped.
 */
function acceptAgain(server: { _handle?: { listen?(backlog: number): void } }): void {
  if (HERE === "deno") server._handle?.listen?.(511);
}

/**
 * Moves an accepted connection to a new socket that reads into the shared buffer: only new sockets take that option.
 * `_handle` is no public API (Deno 2.9.6, Node 24.21): without it the accepted socket is used, and uploads of 1 MiB have
 * 0.6 to 0.7 of the speed.
 */
function withSharedReads(accepted: Socket): Socket {
  const own = accepted as unknown as { _handle?: object | null }, handle = own._handle;
  if (!handle) return accepted.resume();
  own._handle = null;
  const options: object = { handle, allowHalfOpen: true, ...sharedReads(() => socket) };
  const socket: Socket = new NetSocket(options as SocketConstructorOpts);
  return socket.once("close", () => accepted.destroy()); // the listener counts the connection until then
}
const peerOf = ({ remoteAddress, remotePort }: Socket): string => `${remoteAddress} ${remotePort}`;
const TLS_HANDSHAKE = 22; // the first byte of a TLS record that begins one (RFC 8446 section 5.1)
const KEEP_ALIVE = 60_000; // milliseconds of silence before TCP keep-alive probes a client

/** Why an address cannot be listened on, and what to do, by the code of the error; Deno has EINVAL for EADDRNOTAVAIL. */
const LISTEN_ERRORS: Record<string, string> = {
  EADDRINUSE: "the port is in use: end the process that has it, or choose another port",
  EACCES: "this user may not use ports below 1024: choose another port, or run " +
    `setcap cap_net_bind_service=+ep ${process.execPath}`,
  EADDRNOTAVAIL: "this machine does not have this address",
  EINVAL: "this machine does not have this address",
  ENOTFOUND: "the name does not resolve to an address",
};
/** The same of a Unix socket. Where its directory does not exist, Node says EACCES, and Bun nothing but a message (1.4.5). */
const NO_DIRECTORY = "its directory does not exist, or this user may not write there";
const SOCKET_ERRORS: Record<string, string> = {
  EADDRINUSE: "the file exists, and another process listens there or it is no socket: choose another path",
  ...{ ENOENT: NO_DIRECTORY, EACCES: NO_DIRECTORY, EPERM: NO_DIRECTORY },
};
const cannotListen = ({ host, port }: Address) => (error: Error & { code?: string }): never => {
  const hasName = !isUnix(host) && !isIP(bareAddress(host));
  const isUnresolved = hasName && /EAI_|Failed to listen at/.test(error.message); // Bun's, without a code (1.4.5)
  const known = isUnix(host) ? SOCKET_ERRORS : LISTEN_ERRORS, code = isUnresolved ? "ENOTFOUND" : error.code ?? "";
  throw new StartError(`cannot listen on ${shownAddress(host, port)}: ${known[code] ?? error.message}`);
};

/**
 * Checks, before workers share a port, that no other process listens there: the system would give that one a part of
 * the clients. It connects as a client does: a trial listener would take clients and turn them away.
 * @throws {StartError} with the address
 */
async function checkUnused(at: Address): Promise<void> {
  if (at.port === 0) return;
  const socket = await connectWithin(1_000, netConnect(at.port, bareAddress(at.host) || "127.0.0.1"));
  if (socket instanceof WireError) return;
  const { localAddress, remoteAddress, localPort } = socket;
  socket.destroy();
  if (localAddress !== remoteAddress) return; // another machine's: listening fails, as this one lacks the address
  if (localPort === at.port) return; // the socket has connected to itself
  cannotListen(at)(Object.assign(new Error(), { code: "EADDRINUSE" }));
}

/** Certificate and key, as PEM, and where to listen. */
interface ServeOptions {
  /** Default 8080; 0: any that is free. */
  port?: number;
  /** An address of this machine; default: all. */
  hostname?: string;
  /** Several: chosen by the client's SNI name, else the first. */
  tls?: Pair | Pair[];
  /** Closes the listener. */
  signal?: AbortSignal;
}

/**
 * Serves a balancer, or an app that has one mounted, over our own HTTP server. Only this way messages pass byte for byte,
 * and WebSockets pass at all. A balancer's health checks run until the listener is closed; for a mounted balancer, call
 * its `start`.
 * @throws {Error} with the address and why it cannot be listened on
 */
export async function serve(app: LoadBalancer | { fetch: Serve }, options: ServeOptions = {}): Promise<Listener> {
  const { port = 8080, hostname: host = "", tls = [], signal } = options, pairs = [tls].flat();
  const secure = pairs.length ? { pairs, clientCa: "" } : undefined;
  const lb = "balancer" in app ? app : undefined;
  if (lb) await firstLook(lb);
  const listener = await listenOn({ host, port, shared: false, secure }, httpProtocol(app, !!secure), lb?.balancer);
  lb?.start();
  const close = () => {
    lb?.stop();
    return listener.close();
  };
  signal?.addEventListener("abort", () => void close(), { once: true });
  return { ...listener, close };
}

/** The listeners of a thread, or of all workers. */
interface Listeners {
  opened: Map<string, string>; // host:port, by the names of `listenersOf`
  /** Drains, and counts what was cut off. */
  drain(grace: number): Promise<CutOff>;
}
type CutOff = { requests: number; connections: number };

/** Listeners that are open or being opened, by name, and whether the files of their certificates have changed. */
type OpenListeners = Map<string, { listener: Promise<Listener>; hasChanged: ReturnType<typeof changeDetector> }>;
/** How a thread listens. */
interface ListenContext {
  lb: LoadBalancer;
  admin?: { fetch: Serve }; // the API, where this thread has it
  shared: boolean; // with other threads and processes
  ports: ReadonlyMap<string, number>; // as the first worker got them, by listener name
  /** Whether this thread opens a listener, and not another one. */
  opens(name: string, at: ListenerConfig): boolean;
  report: Effects["report"];
}

/** The listeners of a table, by protocol and the address in the file. */
function listenersOf({ config: { listen, admin }, tcp }: Table): Map<string, ListenerConfig> {
  const listeners = new Map<string, ListenerConfig>();
  const nameOf = (protocol: string, { host, port }: Address) => `${protocol}://${shownAddress(host, port)}`;
  if (admin) listeners.set(nameOf("admin", admin.listen), { ...admin.listen, tls: [], client_ca: "", h2c: false });
  for (const at of listen) listeners.set(unique(nameOf(at.tls.length ? "https" : "http", at), listeners), at);
  for (const [address, { at }] of tcp) listeners.set(`${at.tls.length ? "tls" : "tcp"}://${address}`, at);
  return listeners;
}
const isHttp = (name: string): boolean => name.startsWith("http");
const isAdmin = (name: string): boolean => name.startsWith("admin");

async function openListener(context: ListenContext, name: string, own: ListenerConfig): Promise<Listener> {
  const { lb, lb: { balancer }, admin, shared, ports } = context, port = ports.get(name) ?? own.port;
  const secure = own.tls.length ? await Promise.resolve(own).then(readSecure).catch(cannotListen(own)) : undefined;
  const at = { ...own, port, shared, secure }, http2 = () => listenersOf(balancer.table).get(name)?.h2c === true;
  if (isAdmin(name)) return await listenOn(at, httpProtocol(admin!));
  const protocol = isHttp(name) ? httpProtocol(lb, !!secure, http2) : tcpProtocol(balancer, hostOf(name));
  return await listenOn(at, protocol, balancer);
}

/**
 * Opens and closes listeners to match the table in force; open connections stay. Gives the addresses of new
 * listeners, by name, and what went wrong.
 */
async function updateListeners(context: ListenContext, open: OpenListeners) {
  const opened = new Map<string, string>(), problems: string[] = [], all = listenersOf(context.lb.balancer.table);
  const wanted = new Map([...all].filter(([name, at]) => context.opens(name, at)));
  for (const [name, { listener }] of open) {
    if (wanted.has(name)) continue;
    open.delete(name);
    listener.then((one) => one.close(), () => {});
  }
  for (const [name, at] of wanted) {
    if (open.has(name)) continue;
    const hasChanged = changeDetector(stampOf(at)), listener = openListener(context, name, at);
    open.set(name, { listener, hasChanged });
    try {
      opened.set(name, (await listener).address);
    } catch (error) {
      open.delete(name); // the next tick tries again
      problems.push((error as Error).message);
    }
  }
  return { opened, problem: problems.join("\n") };
}

function reportOpened(opened: Listeners["opened"], report: Effects["report"]): void {
  for (const [name, address] of opened) {
    const scheme = name.slice(0, name.indexOf(":"));
    const what = isAdmin(name) ? "admin on http" : `lb.ts ${VERSION} listening on ${scheme}`;
    report("info", `${what}://${address}`);
  }
}

/** Swaps certificates that changed on disk or in the config. */
function renewCertificates({ lb: { balancer: { table, effects } }, report }: ListenContext, open: OpenListeners): void {
  for (const [name, at] of listenersOf(table)) {
    const one = open.get(name);
    if (!one?.hasChanged(stampOf(at))) continue;
    one.listener.then((listener) => {
      listener.swap(readSecure(at));
      report("info", `${name}: other certificates are in force`);
      for (const problem of problemsIn(at, effects.date())) report("error", `${name}: ${problem}`);
    }).catch((error) => report("error", `${name}: the old certificates stay in force: ${error.message}`));
  }
}

const FOLLOW_TICK = 100; // milliseconds between two checks for another table
const RENEW_TICK = 500; // milliseconds between two checks of certificate files

/** Opens the listeners of a balancer, and keeps them and their certificates up to date. */
async function listenAll(context: ListenContext): Promise<Listeners> {
  const { lb: { balancer }, report } = context, open: OpenListeners = new Map();
  let { table } = balancer, failed = "", reported = "";
  const { opened, problem } = await updateListeners(context, open);
  if (problem) throw new StartError(problem);
  const following = setInterval(async () => {
    const changed = table !== balancer.table; // by the file or by an operator
    if (!changed && !failed) return;
    if (changed) [table, reported] = [balancer.table, ""];
    const { opened, problem } = await updateListeners(context, open), isRepeated = problem === failed;
    failed = problem; // tried again: a listener that is still closing may hold the port
    reportOpened(opened, report);
    if (!isRepeated || problem === reported) return;
    reported = problem;
    report("error", problem);
  }, FOLLOW_TICK);
  const renewing = setInterval(() => renewCertificates(context, open), RENEW_TICK);
  return {
    opened,
    drain(grace) {
      clearInterval(following);
      clearInterval(renewing);
      return drain(balancer, open, grace);
    },
  };
}

const LAST_CALL = 1_000; // milliseconds at most in which responses ask clients to reconnect elsewhere
const QUIET = 200; // milliseconds without a request after which none is expected

/**
 * Drains a thread. Responses ask clients to close, until none asks any more; then listeners and idle connections close.
 * Requests and tunnels go on for as long as `grace`; then WebSockets get a close frame, and connections that are not HTTP a
 * reset. Listeners that are not for HTTP close at once: no response can announce it.
 */
async function drain(balancer: Balancer, open: OpenListeners, grace: number): Promise<CutOff> {
  const { effects, tunnels, relays } = balancer, begun = effects.now(), deadline = begun + grace;
  const until = async (time: number, over: () => boolean) => {
    while (!over() && effects.now() < time) await effects.sleep(20);
  };
  balancer.draining = true;
  const served = [...open].filter(([name]) => !isAdmin(name)); // the admin API answers to the end
  const all = await Promise.all(served.map(async ([name, { listener }]) => ({ name, ...await listener })));
  const close = (http: boolean) => all.filter(({ name }) => isHttp(name) === http).map((one) => one.close());
  const closed = close(false);
  let [seen, since] = [balancer.requests, begun];
  await until(Math.min(begun + LAST_CALL, deadline), () => {
    if (seen !== balancer.requests) [seen, since] = [balancer.requests, effects.now()];
    return effects.now() >= since + QUIET;
  });
  closed.push(...close(true));
  await until(deadline, () => balancer.inFlight === 0);
  const connections = relays.size;
  for (const tunnel of tunnels) tunnel.close(GOING_AWAY); // a WebSocket's close frame has that code
  for (const endRelay of relays) endRelay();
  await until(effects.now() + 1_000, () => tunnels.size + relays.size === 0);
  await until(deadline, () => !all.some((one) => one.isWriting()));
  await Promise.race([Promise.all(closed), effects.sleep(Math.min(500, Math.max(0, deadline - effects.now())))]);
  await effects.sleep(50); // for the last lines of the log
  return { requests: balancer.inFlight, connections };
}

// --- 13.6 Workers: threads that share the port, and one that decides ---

// The main thread probes servers, looks names up, and hears operators and the fleet; it tells the workers what it has found out
// (`News`) and each new config. Workers send what they have counted, and the main thread adds it up. Ejections, latencies and
// queues are each worker's own.

const WORKER = "lb.ts worker";
/** What a worker is started with. All of it can be copied from thread to thread. */
interface WorkerTask {
  role: typeof WORKER; // somebody else's threads may have imported this file
  config: Config; // in force
  ports: ListenContext["ports"];
  reports: boolean; // this one reports what all workers find alike, and alone listens at Unix sockets
  workers: number; // that divide the limits
  secret: string; // of sticky cookies
  news: News[]; // so far
}
/** From the main thread to its workers. */
type ToWorker =
  | News
  | { kind: "config"; config: Config; secret: string }
  | { kind: "drain"; grace: number };
/** From a worker. */
type WorkerMessage =
  | { kind: "listening"; opened: Listeners["opened"] }
  | { kind: "applied" }
  | { kind: "failed"; reason: string }
  | { kind: "lines"; lines: Uint8Array<ArrayBuffer> }
  | { kind: "report"; level: "info" | "warn" | "error"; text: string }
  | { kind: "counts"; counts: Samples }
  | { kind: "drained"; left: CutOff };

/** Gives each worker its part of `max` and `max_in_flight`. Rates, retry budgets and `limits` hold for each worker by itself. */
function divideLimits(config: Config, workers: number): Config {
  const part = (limit: number) => Number.isFinite(limit) ? Math.ceil(limit / workers) : limit;
  for (const service of config.services.values()) {
    if (typeof service.max_in_flight === "number") service.max_in_flight = part(service.max_in_flight);
    for (const server of service.servers) server.max = part(server.max);
  }
  return config;
}

/** The numbers of a worker by kind and path of their record, in the order of its rows that are written. */
type Samples = Map<string, number[]>;

/** The rows of METRICS that workers send. */
const SENT = Object.fromEntries(
  Object.entries(METRICS).map(([kind, rows]) => [kind, (rows as Metric<never>[]).filter(({ write }) => write)]),
) as { [K in Kind]: Required<Metric<Counted[K]>>[] };
const keyOf = (kind: Kind, labels: Labels): string => [kind, ...Object.values(labels)].join("\n");
const kindOf = (key: string): Kind => key.split("\n", 1)[0] as Kind;

/** What a worker has counted. */
function takeSamples(balancer: Balancer): Samples {
  const samples: Samples = new Map(), now = balancer.effects.now();
  visitCounted(balancer, (kind, labels, record) => {
    const rows = SENT[kind];
    if (rows.length) samples.set(keyOf(kind, labels), rows.map(({ read }) => read(record, now)));
  });
  return samples;
}

/** Adds what stays of a worker that has ended: its counters. */
function addCounters(gone: Samples, ended: Samples): void {
  for (const [key, numbers] of ended) {
    const before = gone.get(key), rows = SENT[kindOf(key)];
    const endsWithWorker = (i: number) => /gauge|maximum/.test(rows[i]!.type);
    gone.set(key, numbers.map((number, i) => endsWithWorker(i) ? 0 : number + (before?.[i] ?? 0)));
  }
}

/** Makes the records of the main thread that samples of workers are written into: where there are no workers, requests make them. */
function makeCounted({ entrypoints, failures, table }: Balancer, samples: Samples): void {
  for (const key of samples.keys()) {
    const [kind, name = "", last = "", method = ""] = key.split("\n"), service = table.services.get(name);
    const of = { status: Number(last), method };
    if (kind === "failure") getOrMake(failures, name, newOccurrences);
    if (kind === "entrypoint") getOrMake(entrypoints, name, newEntrypoint);
    if (kind === "entrypointRequests") tallyOf(getOrMake(entrypoints, name, newEntrypoint).tallies, of);
    if (kind === "serviceRequests" && service) tallyOf(service.tallies, of);
    if (kind === "grpc" && service) getOrMake(service.grpc, last, newOccurrences);
  }
}

/** Writes what the workers have counted into the main thread's records, where admin and metrics read it. */
function applySamples(balancer: Balancer, workers: Samples[]): void {
  const now = balancer.effects.now();
  for (const samples of workers) makeCounted(balancer, samples);
  visitCounted(balancer, (kind, labels, record) => {
    const key = keyOf(kind, labels);
    const counted = workers.map((samples) => samples.get(key)).filter((numbers) => numbers !== undefined);
    if (counted.length === 0) return;
    for (const [i, { type, write }] of SENT[kind].entries()) {
      const numbers = counted.map((one) => one[i]!);
      write(record, type === "maximum" ? Math.max(...numbers) : numbers.reduce((a, b) => a + b), now);
    }
  });
}

/** Runs a worker: it serves requests, and follows the orders of the main thread. */
async function runWorker({ config, ports, reports, workers, secret, news }: WorkerTask): Promise<void> {
  const send = (message: WorkerMessage): void => void parentPort!.postMessage(message); // Node's gives true
  const sendLines = (lines: Uint8Array) => send({ kind: "lines", lines: new Uint8Array(lines) }); // a view would take all of its buffer along
  const report: Effects["report"] = (level, text) => send({ kind: "report", level, text });
  const log = new AccessLog((lines) => {
    sendLines(lines);
    return Promise.resolve(lines.length);
  }, report);
  let signing = secret;
  const lb = createLoadBalancer(divideLimits(config, workers), { accessLog: log.write, report, secret: () => signing });
  const { balancer } = lb;
  process.on("uncaughtException", (error) => report("error", `internal: ${error.stack ?? error}`)); // serve on
  const takeNews = (one: News): void => {
    if (one.kind === "found") return setFound(balancer, one.id, one.found);
    const service = balancer.table.services.get(one.service);
    const server = service?.servers.find(({ url }) => url === one.url);
    if (!service || !server) return;
    if (one.kind === "changed") return changeFound(balancer, service, server, one.change);
    if (one.kind === "marked") return setHealth(service, server, one.up);
    const { problem, up } = one; // the main thread has decided and reported it
    onProbed(service, server, problem, up);
  };
  news.forEach(takeNews);
  const opens: ListenContext["opens"] = (name, { host }) => !isAdmin(name) && (reports || !isUnix(host));
  const listeners = await listenAll({ lb, shared: true, ports, opens, report: reports ? report : () => {} })
    .catch((error) => send({ kind: "failed", reason: error.message }));
  if (!listeners) return;
  parentPort!.on("message", async (order: ToWorker) => {
    if (order.kind === "config") {
      signing = order.secret;
      lb.reload(divideLimits(order.config, workers));
      send({ kind: "counts", counts: takeSamples(balancer) }); // what is in flight where nothing new goes any more
      return send({ kind: "applied" });
    }
    if (order.kind === "drain") {
      const left = await listeners.drain(order.grace);
      sendLines(log.rest());
      return send({ kind: "drained", left });
    }
    takeNews(order);
  });
  let seen = -1;
  setInterval(() => {
    const { requests, inFlight } = balancer;
    if (seen !== requests) send({ kind: "counts", counts: takeSamples(balancer) });
    seen = inFlight > 0 ? -1 : requests;
  }, COUNT_TICK);
  send({ kind: "listening", opened: listeners.opened });
}

const COUNT_TICK = 200; // milliseconds between two times that a worker sends what it has counted
const APPLYING = 5_000; // milliseconds for which a reload waits until a worker has put the config in force
const RESPAWN_DELAY = 500; // milliseconds until a worker that has died is replaced

/** The next message of a kind from a worker; undefined when it takes too long, or the worker ends. */
const nextMessage = <K extends WorkerMessage["kind"]>(worker: Worker, kind: K, timeout: number) =>
  new Promise<Extract<WorkerMessage, { kind: K }> | undefined>((resolve) => {
    const end = (message?: WorkerMessage) => {
      clearTimeout(timer);
      worker.off("message", hear).off("exit", end);
      resolve(typeof message === "object" ? message as Extract<WorkerMessage, { kind: K }> : undefined);
    };
    const hear = (message: WorkerMessage) => message.kind === kind && end(message);
    const timer = setTimeout(end, timeout);
    worker.on("message", hear).on("exit", end);
  });

/** The workers of a process, with what each of them has counted. */
type Workers = Map<Worker, Samples>;
const sendToAll = (workers: Workers, order: ToWorker): void =>
  workers.forEach((_, worker) => worker.postMessage(order));
const nextFromAll = <K extends WorkerMessage["kind"]>(workers: Workers, kind: K, timeout: number) =>
  Promise.all([...workers.keys()].map((worker) => nextMessage(worker, kind, timeout)));

const configOrder = ({ table, effects }: Balancer): ToWorker => ({
  ...{ kind: "config", config: table.config, secret: effects.secret() },
});

/** Sends reloads, results of probes and marks of operators to the workers at once. A reload resolves when all have it. */
function passOn(lb: LoadBalancer, workers: Workers, show: () => void): void {
  const { reload, balancer } = lb, { effects } = balancer;
  lb.reload = (config) => {
    reload(config);
    const applied = nextFromAll(workers, "applied", APPLYING);
    sendToAll(workers, configOrder(balancer));
    show();
    return applied;
  };
  const { onNews } = effects;
  effects.onNews = (news) => {
    onNews(news);
    sendToAll(workers, news);
  };
}

/** What a worker that starts has to hear: what DNS, operators and probes have said so far. */
const newsOf = ({ names, services }: Table): News[] => [
  ...[...names].flatMap(([id, { found, isKnown }]): News[] => isKnown ? [{ kind: "found", id, found }] : []),
  ...[...services.values()].flatMap(({ name: service, changes, servers }) => [
    ...[...changes].map(([url, change]): News => ({ kind: "changed", service, url, change })),
    ...servers.filter(({ up }) => !up).map(({ url, probeProblem: problem }): News => {
      return { kind: "probed", service, url, problem, up: false };
    }),
  ]),
];

/** Drains all workers at once, and adds up what they have cut off. */
async function drainWorkers(workers: Workers, grace: number): Promise<CutOff> {
  const drained = nextFromAll(workers, "drained", grace + 2 * LAST_CALL);
  sendToAll(workers, { kind: "drain", grace });
  const left = (await drained).flatMap((message) => message?.left ?? []);
  const sum = (key: keyof CutOff) => left.reduce((total, one) => total + one[key], 0);
  return { requests: sum("requests"), connections: sum("connections") };
}

/** Starts the workers, one after the other, and replaces those that end. */
async function startWorkers(lb: LoadBalancer, count: number, log: AccessLog): Promise<Listeners> {
  const { balancer } = lb, { effects } = balancer, workers: Workers = new Map();
  let ids = 0, reporter = 0, ports: WorkerTask["ports"] = new Map();
  const gone: Samples = new Map(); // counters of workers that have ended
  const show = () => applySamples(balancer, [gone, ...workers.values()]);
  const start = async (): Promise<Listeners["opened"]> => {
    const id = ++ids;
    reporter ||= id;
    const { config } = balancer.table, news = newsOf(balancer.table);
    const known = { config, ports, workers: count, secret: effects.secret(), news };
    const workerData: WorkerTask = { role: WORKER, reports: reporter === id, ...known };
    const worker = new Worker(new URL(import.meta.url), { workerData });
    let failed = "it was ended";
    worker.on("message", (message: WorkerMessage) => {
      if (message.kind === "lines") log.append(message.lines);
      if (message.kind === "counts" && workers.has(worker)) {
        workers.set(worker, message.counts);
        show();
      }
      if (message.kind === "report") effects.report(message.level, message.text);
      if (message.kind === "failed") {
        failed = message.reason;
        void worker.terminate();
      }
    });
    worker.on("error", (error: Error) => failed = String(error));
    worker.on("exit", () => {
      if (reporter === id) reporter = 0;
      addCounters(gone, workers.get(worker) ?? new Map());
      balancer.workers.delete(id);
      if (workers.delete(worker)) replace(failed);
    });
    const listening = await nextMessage(worker, "listening", 30_000);
    if (!listening) {
      await worker.terminate();
      throw new StartError(failed);
    }
    workers.set(worker, new Map());
    balancer.workers.set(id, { since: effects.date(), end: () => void worker.terminate() });
    for (const order of [configOrder(balancer), ...newsOf(balancer.table)]) worker.postMessage(order); // news since then
    return listening.opened;
  };
  const replace = (reason: string) => {
    if (balancer.draining) return;
    effects.report("error", `a worker has ended and is replaced: ${reason}`);
    setTimeout(() => start().catch((error) => replace(error.message)), RESPAWN_DELAY);
  };
  const opened = await start();
  ports = new Map([...opened].map(([name, address]) => [name, Number(/\d+$/.exec(address))]));
  for (let i = 1; i < count; i++) await start();
  passOn(lb, workers, show);
  return { opened, drain: (grace) => drainWorkers(workers, grace) };
}

// --- 13.7 Main: the program, from its arguments to its exit status ---

/** Which route a request belongs to and which servers it may go to, for a balancer that has just started. */
function explained(config: Config, text: string, headers: string[]): string {
  const { balancer } = createLoadBalancer(config, { resolve: undefined }); // it asks no DNS
  const found = explainLine(balancer, text, headers);
  if (!found) throw new UsageError(`--explain: "${text}" is not a request such as 'GET http://host/path'`);
  if ("failure" in found) process.exitCode = 1;
  return explanationText(found);
}

/** Three small servers inside this process, and a config that balances over them, with a dashboard. */
async function demo(): Promise<string> {
  const servers = await Promise.all(["one", "two", "three"].map((name) => {
    const hello = ({ method, url }: Request) => `hello from ${name}: ${method} ${new URL(url).pathname}\n`;
    return serve({ fetch: (request: Request) => new Response(hello(request)) }, { hostname: "127.0.0.1", port: 0 });
  }));
  const addresses = servers.map(({ address }) => address);
  return JSON.stringify({ admin: {}, services: { demo: { servers: addresses } }, default: "demo" });
}

/** What to do next with the demo, by its listeners. */
function demoHints(opened: Listeners["opened"]): string {
  const firstOf = (is: (name: string) => boolean) => [...opened].find(([name]) => is(name))?.[1];
  const admin = firstOf(isAdmin);
  return [
    "what to do next:",
    `curl http://${firstOf(isHttp)!.replace("0.0.0.0", "localhost")}/ a few times: the servers answer in turn`,
    ...admin ? [`open http://${admin}/ in a browser: drain a server there, and ask again`] : [],
    "write a routes.yml such as this one, and start lb.ts without --demo:",
    "  services: { shop: { servers: [localhost:8081, localhost:8082] } }",
    "  default: shop",
  ].join("\n");
}

const WATCH_TICK = 500; // milliseconds between two looks at the file

/** Runs until a signal ends it. */
async function runProgram(call: Call): Promise<void> {
  const { file } = call, isDemo = Boolean(call.options.demo), text = isDemo ? await demo() : undefined;
  const hasChanged = changeDetector(fileStamp(file)); // before the file is read: no later change is missed
  const config = loadConfig(call, text);
  const log = new AccessLog(writeOut, printReport);
  const lb = createLoadBalancer(config, { accessLog: log.write });
  const { report } = lb.balancer.effects;
  process.on("exit", () => {
    try {
      fs.writeSync(1, log.rest()); // asynchronous writes no longer happen
    } catch { /* nobody reads it */ }
  });
  let onApplied = () => {}; // what comes first is announced with the listeners
  const fleet = config.fleet && makeFleet(lb, call, config.fleet, () => onApplied());
  await fleet?.start(JOINING); // what the others know comes before the first request
  const parse = (text: string) => fleet?.parse(text) ?? loadConfig(call, text);
  const admin = createAdmin(lb, { ...!isDemo && { file }, parse });
  const opening = firstLook(lb).then(() => openListeners(lb, admin, call, log));
  const stop = () => void quit({ lb, opening, log, fleet }, call.drain);
  process.on("SIGTERM", stop).on("SIGINT", stop);
  const { opened } = await opening;
  onApplied = () => {
    report("info", `${file} is in force again, as the fleet has it`);
    announce(lb);
  };
  lb.start();
  if (!isDemo) {
    const read = (onlyIfOther: boolean) => fleet ? void fleet.checkFile() : reloadFile(call, lb, onlyIfOther);
    process.on("SIGHUP", () => read(false));
    setInterval(() => hasChanged(fileStamp(file)) && read(true), WATCH_TICK);
  }
  process.stderr.on("error", () => {}); // nobody reads it: a report of that would fail the same way
  process.on("uncaughtException", (error) => report("error", `internal: ${error.stack ?? error}`)); // serve on
  reportOpened(opened, report);
  if (call.workers > 1) report("info", `workers: ${call.workers}`);
  announce(lb);
  if (isDemo) report("info", demoHints(opened));
}

const JOINING = 3_000; // milliseconds that the start waits for the fleet's engine

/** Makes the main thread the member of its fleet, for all workers. Without an etcd there is none. */
function makeFleet(lb: LoadBalancer, call: Call, own: FleetConfig, onApplied: () => void) {
  const { file } = call, { effects } = lb.balancer, isThisMachine = (url: string) => isLoopback(new URL(url).hostname);
  if (!own.etcd.length) {
    return void effects.report("error", `${file}: fleet.durable is for the edge: without etcd this instance is alone`);
  }
  for (const url of own.etcd.filter((url) => url.startsWith("http:") && !isThisMachine(url))) {
    effects.report("warn", `fleet: ${url} is asked without TLS: documents and passwords cross the network unencrypted`);
  }
  return new Fleet(lb, new EtcdClient(own, effects), {
    ...{ own, file, name: `${hostname()}-${process.pid}`, id: randomBytes(9).toString("base64url"), isObserver: false },
    parse: (text) => loadConfig(call, text),
    read() {
      try {
        return readText(file);
      } catch { // the next document is saved in its place, or a report says why not
        return undefined;
      }
    },
    save: (before, text, keeps) => saveFile(file, before, text, keeps),
    onApplied,
  });
}

/** Opens the listeners in this thread, or in workers; these share ports, so other processes must not have them. */
async function openListeners(lb: LoadBalancer, admin: Hono<AdminEnv>, call: Call, log: AccessLog): Promise<Listeners> {
  const shared = call.options["reuse-port"] === true, { effects: { report }, table } = lb.balancer;
  const context = { lb, admin, shared, ports: new Map(), report };
  if (call.workers === 1) return await listenAll({ ...context, opens: () => true });
  const tried = [...listenersOf(table)].filter(([name, { host }]) => !shared && !isAdmin(name) && !isUnix(host));
  await Promise.all(tried.map(([, at]) => checkUnused(at)));
  const workers = await startWorkers(lb, call.workers, log);
  const { opened } = await listenAll({ ...context, opens: isAdmin });
  return { ...workers, opened: new Map([...opened, ...workers.opened]) };
}

/** What ends with the program. */
type Running = { lb: LoadBalancer; opening: Promise<Listeners>; log: AccessLog; fleet: Fleet | undefined };

/**
 * Ends the program after SIGTERM or SIGINT: it leaves its fleet, drains, writes the last lines of the log and exits with 0. A
 * second signal ends it at once, with 1.
 */
async function quit({ lb: { balancer }, opening, log, fleet }: Running, grace: number): Promise<void> {
  const { effects } = balancer, until = effects.now() + grace;
  if (balancer.draining) {
    effects.report("warn", `ended by a second signal; requests cut off: ${balancer.inFlight}`);
    process.exit(1);
  }
  balancer.draining = true;
  const left = fleet?.leave();
  effects.report("info", `draining; requests in flight: ${balancer.inFlight}`);
  const { requests, connections } = await (await opening).drain(grace);
  const cut = requests ? `; requests cut off: ${requests}` : "";
  effects.report("info", `drained${cut}${connections ? `; connections ended: ${connections}` : ""}`);
  await Promise.all([left, log.end(Math.max(until - effects.now(), 500))]);
  process.exit(0);
}

/** Reports the services, and problems with the files and routes of the config. */
function announce({ balancer: { table, effects } }: LoadBalancer): void {
  for (const problem of problemsOf(table.config, effects.date())) effects.report("error", problem);
  for (const warning of table.config.warnings) effects.report("warn", warning);
  const services = [...table.services.values()];
  for (const { name, servers, config } of services.slice(0, 20)) {
    const over = servers.map((server) => server.name).join(", ") || "no server yet";
    effects.report("info", `${name}: ${config.strategy.name} over ${over}`);
  }
  if (services.length > 20) effects.report("info", `and ${services.length - 20} more services`);
}

/** Reloads the file; `onlyIfOther`: unless its text is in force already. A file that is not valid changes nothing. */
function reloadFile(call: Call, lb: LoadBalancer, onlyIfOther: boolean): void {
  const { effects, table, reloadFailed } = lb.balancer;
  try {
    if (fs.statSync(call.file, { throwIfNoEntry: false })?.isFile() === false) {
      throw new Error(`${call.file} is no file`);
    }
    const text = readText(call.file);
    if (onlyIfOther && !reloadFailed && text === table.config.text) return; // the admin API has saved it
    const config = loadConfig(call, text);
    lb.reload(config);
    effects.report("info", `${call.file} is in force again`);
    if (!isDeepStrictEqual(config.fleet, table.config.fleet)) effects.report("warn", FLEET_NEEDS_RESTART);
    announce(lb);
  } catch (error) {
    lb.balancer.reloadFailed = true;
    effects.report("error", `the old config stays in force:\n${(error as Error).message}`);
  }
}

/** The output of --check. @throws {StartError} with what is wrong with the files that the config names */
function checkCall(call: Call): string {
  const config = loadConfig(call), problems = problemsOf(config, new Date());
  if (problems.length) throw new StartError(problems.map((one) => `${call.file}: ${one}`).join("\n"));
  const warnings = config.warnings.map((one) => `warning: ${one}\n`).join("");
  return `${warnings}${call.file} is fine: services: ${config.services.size}, routes: ${config.routes.length}`;
}

/** The output of the options that only print; undefined: the program has to run. */
function textAskedFor(call: Call): string | undefined {
  const { options } = call;
  if (options.help) return USAGE;
  if (options.version) return VERSION;
  if (options.schema) return JSON.stringify(jsonSchema(), null, 1);
  if (options.check) return checkCall(call);
  if (options["print-config"]) return printConfig(loadConfig(call));
  const headers = options.header as string[] | undefined;
  if (typeof options.explain === "string") return explained(loadConfig(call), options.explain, headers ?? []);
  if (headers) throw new UsageError("--header goes with --explain");
  return undefined;
}

/** The program. Exits with 2 after a wrong call, and with 1 where it cannot start. */
async function main(args: string[], env: Call["env"]): Promise<void> {
  try {
    const call = readCall(args, env), text = textAskedFor(call);
    if (text === undefined) await runProgram(call);
    else console.log(text.trimEnd());
  } catch (error) {
    if (![UsageError, ConfigError, StartError, AdminError].some((known) => error instanceof known)) throw error;
    console.error((error as Error).message);
    if (error instanceof UsageError) console.error("lb.ts --help lists the options");
    process.exit(error instanceof UsageError ? 2 : 1);
  }
}

// --- 13.8 Edge: the handlers that the platform calls ---

/** Limits of connections and heads: the platform has its own. */
const SOCKET_LIMITS = ["connections", "client_connections", "header", "keep_alive", "header_size", "header_fields"];

/** Reads a routes.yml for the edge: there are no connections but those of HTTP. `left` is what of it is left out. */
function parseAtTheEdge(text: string, left: string[] = []): Config {
  const config = parseConfig(text, { env: process.env });
  for (const service of config.services.values()) {
    const { servers, health } = service;
    if (!/^(?:http|off)$/.test(health.kind)) service.health = { ...health, kind: "off" }; // passive only
    service.servers = servers.filter(({ url }) => !isUnix(url));
    if (servers.some(({ find }) => find === "srv")) left.push("srv: servers");
    if (service.servers.length < servers.length) left.push("servers at Unix sockets");
    if (Object.values(service.tls).some(Boolean)) left.push("tls of servers");
  }
  return config;
}

/** The balancer of the edge. Leaves out, with one report, what the platform does itself: so one file serves both. */
function makeAtTheEdge(env: EdgeEnv): { lb: LoadBalancer; fleet: Fleet | undefined; durable: string } {
  const text = fs.readFileSync("/bundle/routes.yml", "utf8"); // it lies beside the bundle
  const left: string[] = [], config = parseAtTheEdge(text, left), file = parseDocument(text), { fleet: own } = config;
  left.push(...["listen", "admin", "tcp", "resolvers"].filter((key) => file.has(key)));
  left.push(...SOCKET_LIMITS.filter((key) => file.hasIn(["limits", key])).map((key) => `limits.${key}`));
  const lb = createLoadBalancer(config, { accessLog: logToConsole }), { report } = lb.balancer.effects;
  for (const warning of config.warnings) report("warn", warning);
  const all = [...new Set(left)].join(", ");
  if (all) report("info", `left out of routes.yml, as the platform does it: ${all}`);
  return { lb, fleet: own && makeFleetAtTheEdge(lb, own, env), durable: own?.durable ?? "" };
}

/** The variables and bindings of the edge. */
type EdgeEnv = Record<string, unknown>;
/** What the platform gives for the binding of a Durable Object. */
interface DurableBinding {
  idFromName(name: string): unknown;
  get(id: unknown): { fetch(url: string | Request, init?: RequestInit): Promise<Response> };
}
/** The one object that is the engine of a fleet. */
const durableOf = (env: EdgeEnv, name: string) => {
  const binding = env[name] as DurableBinding | undefined;
  return binding?.idFromName && binding.get(binding.idFromName("fleet"));
};

/** Makes this isolate an observer of its fleet. An isolate cannot keep a watch open, and lists instead. */
function makeFleetAtTheEdge(lb: LoadBalancer, own: FleetConfig, env: EdgeEnv): Fleet | undefined {
  const { effects } = lb.balancer, isBound = !!durableOf(env, own.durable);
  if (own.durable && !isBound) effects.report("error", `fleet.durable: there is no binding ${quote(own.durable)}`);
  if (!isBound && !own.etcd.length) return undefined;
  const send = sendByFetch(async (url, { method, headers, body, signal, ended }) => {
    const init = { method, headers: fieldPairs(headers), body, signal };
    const response = await durableOf(env, own.durable)!.fetch(url, init);
    ended(response.status, 0);
    return response;
  });
  const durable = { ...own, etcd: ["https://fleet"], user: "", password: "" };
  const engine = isBound ? new EtcdClient(durable, { ...effects, send }) : new EtcdClient(own, effects);
  return new Fleet(lb, engine, {
    ...{ own, name: "edge", id: "edge", file: "routes.yml", isObserver: true },
    ...{ read: () => undefined, save: () => Promise.resolve(), onApplied() {} },
    parse: (text) => parseAtTheEdge(text),
  });
}

const FLEET_PATH = "/.well-known/lb-fleet/";

/** Passes requests of instances elsewhere to the Durable Object, where they have its token. */
async function passToFleet(request: Request, env: EdgeEnv, binding: string, { sign }: Effects): Promise<Response> {
  const token = String(env.LB_FLEET_TOKEN ?? ""), path = new URL(request.url).pathname.slice(FLEET_PATH.length);
  const isToken = (given: unknown) => token !== "" && sign(token, "") === sign(String(given ?? ""), "");
  if (path === "v3/auth/authenticate") {
    const { password } = mapOf(await request.json().catch(() => undefined));
    if (isToken(password)) return Response.json({ header: {}, token });
    return engineRefusal(401, 16, "etcdserver: authentication failed, invalid user ID or password");
  }
  if (!isToken(request.headers.get("authorization")?.replace(/^Bearer /i, ""))) {
    return engineRefusal(401, 16, "etcdserver: invalid auth token");
  }
  return await durableOf(env, binding)!.fetch(new Request(`https://fleet/${path}`, request));
}

/** What the platform calls: for each request, and by cron. */
interface EdgeHandlers {
  fetch(request: Request, env: EdgeEnv, context: { waitUntil(work: Promise<unknown>): void }): Promise<Response>;
  scheduled(event: unknown, env: EdgeEnv): Promise<void>;
}

const LIST_EVERY = 1_000; // milliseconds

/**
 * The edge's handlers. The first request makes the balancer, since nothing may run before; requests and cron run probes.
 * In a fleet the first request waits for the document; then others list, each for itself: no promise of one request may be
 * waited for in another.
 */
function edge(): EdgeHandlers {
  let made: ReturnType<typeof makeAtTheEdge> | undefined, listedAt = -Infinity, hasListed = false;
  const list = async ({ lb, fleet }: NonNullable<typeof made>) => {
    const { effects } = lb.balancer;
    if (!fleet || hasListed && effects.now() - listedAt < LIST_EVERY) return;
    listedAt = effects.now();
    await Promise.race([fleet.listOnce(), effects.sleep(JOINING)]);
    hasListed = true;
  };
  return {
    async fetch(request, env, context) {
      const { lb, fleet, durable } = made ??= makeAtTheEdge(env);
      if (durable && new URL(request.url).pathname.startsWith(FLEET_PATH) && durableOf(env, durable)) {
        return await passToFleet(request, env, durable, lb.balancer.effects);
      }
      if (fleet && !hasListed) await list(made);
      const answer = Promise.resolve(lb.fetch(request, env));
      const behind = answer.then(() => BACKGROUND_WORK.get(request));
      context.waitUntil(Promise.all([answer, behind, lb.probe(), list(made)])); // else a client that leaves stays in flight
      return await answer;
    },
    async scheduled(_, env) {
      await list(made ??= makeAtTheEdge(env));
      await made.lb.probe();
    },
  };
}

if (!isMainThread && (workerData as WorkerTask | null)?.role === WORKER) await runWorker(workerData as WorkerTask);
else if (import.meta.main) await main(process.argv.slice(2), process.env);

const handlers: EdgeHandlers | undefined = HERE === "edge" ? edge() : undefined;
export default handlers;
