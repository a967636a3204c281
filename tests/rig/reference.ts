// The reference of routes.yml, made of its schema: `deno run -A tests/rig/reference.ts > docs/config.md`.

import { readFileSync } from "node:fs";
import process from "node:process";
import { jsonSchema } from "../../lb.ts";

/** As much of JSON Schema as `jsonSchema` uses. */
interface Schema {
  $ref?: string;
  $defs?: Record<string, Schema>;
  type?: string | string[];
  description?: string;
  default?: unknown;
  const?: unknown;
  enum?: unknown[];
  pattern?: string;
  minimum?: number;
  maximum?: number;
  anyOf?: Schema[];
  items?: Schema;
  properties?: Record<string, Schema>;
  additionalProperties?: Schema | false;
  required?: string[];
}

/** What texts of a pattern are called: the first row whose first text the pattern takes, and whose others it refuses. */
const WORDS: [name: string, taken: string, ...refused: string[]][] = [
  ["duration", "5s", "5", "a"],
  ["percentage", "50%", "a"],
  ["size", "10MB", "a"],
  ["status", "200-399", "a"],
  ["`1xx` to `5xx`", "2xx", "a"],
  ["rate", "5/s", "a"],
  ["`p50` to `p99`", "p95", "a"],
  ["file mode", "660", "a", "77777"],
  ["URL", "https://a.example/", "a", "https"],
  ["path", "/a", "a"],
  ["token", "abcdefgh", "a"],
  ["SRV name", "_http._tcp.a", "a", "*"],
  ["origin", "https://a.example", "a"],
  ["network", "10.0.0.0/8", "10.0.0.0/8/8"],
  ["address", "127.0.0.1:80", "a"],
  ["word", "a.b/c", "a b"],
  ["server", "http://a:1", "a b/c"],
  ["name", "x-name", "a b"],
  ["host", "a.example", "a:b:c"],
  ["text", "any text", "a\0"],
  ["regular expression", "a\0"],
];

const VARIABLE = /\|?\\\$\\\{$/; // `${NAME}` may stand anywhere

/** A name for each kind of text. */
function wordFor(pattern: string): string {
  const test = new RegExp(pattern.replace(VARIABLE, ""), "u");
  const found = WORDS.find(([, taken, ...refused]) => test.test(taken) && !refused.some((text) => test.test(text)));
  if (!found) throw new Error(`WORDS has no name for texts such as ${pattern}`);
  return found[0];
}

const code = (value: unknown): string => `\`${typeof value === "string" ? value : JSON.stringify(value)}\``;
const phrase = (words: string[]): string =>
  words.length > 1 ? `${words.slice(0, -1).join(", ")} or ${words.at(-1)}` : words.join();

const root = jsonSchema() as Schema;

/** A schema in place of a reference to it; what stands beside the reference is kept. */
function resolve({ $ref, ...own }: Schema): Schema {
  return $ref ? { ...resolve(root.$defs![$ref.split("/").at(-1)!]!), ...own } : own;
}

/** What may be written for a value, in words. */
function kindsOf(given: Schema): string[] {
  const schema = resolve(given), types = [schema.type ?? []].flat();
  const { anyOf, minimum, maximum, pattern, properties, items, additionalProperties: values } = schema;
  if (anyOf) {
    const kinds = [...new Set(anyOf.flatMap(kindsOf))], isList = (kind: string) => kind.startsWith("list of ");
    const single = kinds.filter((kind) => !isList(kind));
    return kinds.map((kind) => isList(kind) && single.length ? "a list of them" : kind);
  }
  if (schema.const !== undefined) return schema.const === "" ? [] : [code(schema.const)];
  if (schema.enum) return schema.enum.filter((value) => value !== "").map(code);
  if (items) return [`list of ${phrase(kindsOf(items))}`];
  if (properties) return ["map"];
  if (values) return [`map of names to ${phrase(kindsOf(values))}`];
  if (minimum !== undefined && maximum !== undefined) return [`${minimum} to ${maximum.toLocaleString("en")}`];
  if (types.includes("boolean") && !types.includes("number")) return ["`true`", "`false`"];
  if (!pattern) return ["text"];
  return VARIABLE.test(pattern) && !pattern.replace(VARIABLE, "") ? [] : [wordFor(pattern)];
}

/** The maps that may be written for a value or an item of it. */
function mapsOf(given: Schema): Schema[] {
  const schema = resolve(given);
  if (schema.properties) return [schema];
  return [...schema.anyOf ?? [], ...schema.items ? [schema.items] : []].flatMap(mapsOf);
}

function defaultOf({ default: value }: Schema): string {
  if (value === undefined || value === "" || /^(\[\]|\{\})$/.test(JSON.stringify(value))) return "";
  if (Array.isArray(value)) return code(`[${value.join(", ")}]`);
  return typeof value === "object" ? "below" : code(value);
}

const missing = new Set<string>(), said = new Set<string>(), shown = new Set<string>();

function row(path: string, key: string, given: Schema, isRequired: boolean): string {
  const schema = resolve(given), short = path.split(".").slice(-2).join(".");
  const about = ABOUT[path] ?? schema.description ?? ABOUT[short];
  said.add(path).add(short);
  if (about === undefined) missing.add(path);
  const first = isRequired ? "required" : defaultOf(schema), brief = SHORT[path] ?? "";
  const edge = NOT_AT_THE_EDGE.some((one) => `${path}.`.startsWith(`${one}.`)) ? "no" : "yes";
  return `| ${[code(key), phrase(kindsOf(schema)), first, brief && code(brief), edge, about].join(" | ")} |`;
}

/** The table of some keys of a map, and those of the maps in it, each of which is shown once. */
function tables(title: string, path: string, { properties = {}, required = [] }: Schema, keys: string[]): string[] {
  const under = (key: string) => path ? `${path}.${key}` : key;
  const rows = keys.map((key) => row(under(key), key, properties[key]!, required.includes(key)));
  const head = ["| key | value | default | short form | edge | what |", "| --- | --- | --- | --- | --- | --- |"];
  const inner = keys.filter((key) => path || !APART.has(key)).flatMap((key) =>
    mapsOf(properties[key]!).flatMap((map) => {
      const text = JSON.stringify(map.properties);
      if (shown.has(text)) return [];
      shown.add(text);
      return tables(`### ${code(under(key))}`, under(key), map, Object.keys(map.properties!));
    })
  );
  return [title, "", ...INTRO[path] ? [INTRO[path], ""] : [], ...head, ...rows, "", ...inner];
}

/** @throws {Error} where a key has no words yet, or words have no key any more */
export function makeReference(): string {
  const { properties: top = {} } = root;
  const service = resolve(resolve(top.services!).additionalProperties as Schema),
    ofService = Object.keys(service.properties!);
  const route = resolve(resolve(top.routes!).items!), tcp = resolve(resolve(top.tcp!).items!);
  const ofRoute = Object.keys(route.properties!).filter((key) => key === "servers" || !ofService.includes(key));
  const lines = [
    PREAMBLE,
    ...tables("## The top of the file", "", root, Object.keys(top)),
    ...tables("## A service", "service", service, ofService),
    ...tables("## A route", "route", route, ofRoute),
    ...tables("## A TCP service", "tcp", tcp, Object.keys(tcp.properties!)),
    "## The whole file",
    "",
    "Every key once, with its default or an example; also as a file, [routes.yml](routes.yml).",
    "",
    `\`\`\`yaml\n${readFileSync(new URL("../../docs/routes.yml", import.meta.url), "utf8")}\`\`\``,
  ];
  const unknown = [...Object.keys(ABOUT), ...Object.keys(SHORT), ...NOT_AT_THE_EDGE].filter((path) => !said.has(path));
  if (missing.size) throw new Error(`ABOUT says nothing about ${[...missing].join(", ")}`);
  if (unknown.length) throw new Error(`there is no key ${unknown.join(", ")}`);
  return `${lines.join("\n").trimEnd()}\n`;
}

const PREAMBLE = `# The keys of routes.yml

Made from the schema that checks the file; \`lb.ts --schema\` prints it as JSON Schema, for editors. Everything is optional
except some way to an answer. Unknown keys are errors, and the message says what may have been meant. \`--check\`, the start
and each reload also warn of what is right and cannot be meant: a route that another one shadows entirely, and a service
that nothing leads to.

Editors complete and check the file with \`lb.ts --schema > routes.schema.json\` and this first line:

    # yaml-language-server: $schema=routes.schema.json

- **Durations** are \`500ms\`, \`2s\`, \`1m\`, \`12h\` or \`1d\`. **Percentages** are \`0%\` to \`100%\`. **Sizes** are \`512kB\`, \`10MB\`,
  \`1MiB\`, a number of bytes, or \`none\`. **Statuses** are \`200\` or \`200-399\`. **Networks** are \`10.0.0.0/8\` or one address.
- \`\${NAME}\` in a value is an environment variable; one that is not set is an error, and \`$\${\` is \`\${\` itself.
- **Merge keys** (\`<<: *usual\`) put another map's keys under the own ones, and keys at the top that begin with \`x-\` are
  ignored: they hold what anchors name, as in Compose.
- **Short forms** mean one thing each; \`lb.ts --print-config\` shows the long form.
- The column **edge** says whether the key has an effect at the edge too. Everywhere else all keys have.
`;
const APART = new Set(["services", "defaults", "hosts", "paths", "routes", "default", "tcp"]);
/** What the platform does itself there, or what cannot be done there; the same holds for all keys in these. */
const NOT_AT_THE_EDGE = [
  "listen",
  "admin",
  "tcp",
  "limits.connections",
  "limits.client_connections",
  "limits.header",
  "limits.keep_alive",
  "limits.header_size",
  "limits.header_fields",
  "service.tls",
  "service.http",
  "service.host_header",
  "service.health.grpc",
  "service.timeouts.connect",
  "resolvers",
  "service.servers.srv",
  "service.servers.host",
  "route.rewrite.host",
];
const INTRO: Record<string, string> = {
  "fleet.tls": "`tls` of a service has the same keys.",
  service:
    "Under `services`, by its name. `defaults` takes the same keys, but for `servers`, and holds for all services. An entry of\n" +
    "`hosts`, `paths`, `routes` or `default` with `servers` is a service of its own, named after its host or path.",
  route:
    "An entry of `routes`; those of `hosts` need `host`, those of `paths` need `path`, and `default` has neither. It has exactly one\n" +
    "of `service`, `servers`, `split`, `redirect` and `respond`. Beside `servers` any key of a service may stand; beside the others\n" +
    "`retries`, `retry_on`, `timeouts`, `cors`, `compress` and `host_header`, which win over those of the service.",
  tcp:
    "An entry of `tcp`. `listen`, `servers`, `strategy`, `health` and `eject` are as above; of `hash` only `{ client: true }` fits.",
  "service.timeouts":
    "Timeouts are exact to 100 ms. A request's body of up to 64 KiB has to arrive whole within `idle`; of a longer one only the\n" +
    "silence between two pieces is bounded unless `request` is set. The client is told 408, but 504 where it is the server that\n" +
    "takes no more of the body.",
};
/** Each means what `--print-config` shows. */
const SHORT: Record<string, string> = {
  admin: "admin: 9090",
  log: "log: json",
  default: "default: shop",
  "service.servers": "servers: [8081]",
  "service.health": "health: /healthz",
  "service.health.expect": "expect: 2xx",
  "service.queue": "queue: 100",
  "service.sticky": "sticky: lb",
  "service.compress": "compress: gzip",
  "service.cors": 'cors: "*"',
  "route.rate": "rate: 100/10m",
  "route.redirect": "redirect: https://b.test/",
  "route.respond": "respond: 404",
  "route.rewrite": "rewrite: /v2",
  "route.mirror": "mirror: shop-next",
  "route.split": "split: { shop: 90%, next: 10% }",
};
/** Of keys that the schema does not describe, or only for editors. */
const ABOUT: Record<string, string> = {
  services: "servers that answer the same, by the name of the service: see *A service*",
  defaults: "any key of a service but `servers`, for all services",
  hosts: "routes for one host each: see *A route*",
  paths: "routes for one path each: see *A route*",
  routes: "routes in the general form: see *A route*",
  name_routes: "`true`: every service answers under `/NAME/...`, and sees the path without that prefix",
  default: "what takes a request that no route fits; without it 404",
  tcp: "connections that are not HTTP: see *A TCP service*",
  "log.format": "Apache's combined format with more behind it, JSON by OpenTelemetry's names, or no log",
  "log.sample": "the share of the requests that have a line; those that failed always have one",
  "service.servers": "one, or a list: `host:port`, a URL, `unix:/run/app.sock`, or a map",
  "service.servers.url":
    "`host:port`, `http://`, `https://` or `h2c://` and a host, or `unix:` and a path: one server, whose name is resolved when a connection is made",
  "service.servers.dns": "in place of `url`: `NAME:PORT` or `https://NAME`; each of its addresses is a server",
  "service.servers.srv":
    "in place of `url`: a name such as `_http._tcp.api.internal`; each of its SRV records is a server",
  "service.servers.weight": "its share, compared with those of the others; 0 takes no requests",
  "service.servers.host": "the Host that it gets; without it `host_header` decides",
  "service.servers.backup": "asked only when no other server of the service may be asked",
  "service.servers.max": "requests in flight at most",
  "service.servers.state": "`drain`: no new requests; `maint`: no probes either",
  "service.strategy.hash": "what is hashed: exactly one of these keys",
  "service.strategy.hash.header": "a request header",
  "service.strategy.hash.cookie": "a cookie",
  "service.strategy.hash.query": "a query parameter",
  "service.strategy.hash.path": "the path",
  "service.strategy.hash.client": "the client's address",
  "service.queue.size": "requests that wait at most; beyond: 503",
  "service.queue.timeout": "how long they wait at most; then: 503",
  "service.sticky.cookie": "its name",
  "service.sticky.secret": "what signs it; without it each process draws one",
  "service.sticky.max_age": "how long browsers keep it; 0: until they are closed",
  "tls.ca": "a PEM file with the authorities that may have signed the server's certificate; without it the system's",
  "tls.cert": "a PEM file: the certificate that we show the server",
  "tls.key": "a PEM file: its private key",
  "tls.servername": "the name that is asked for and verified; without it the server's host",
  "tls.insecure": "any certificate will do",
  "service.timeouts.connect": "until a server is connected",
  "service.timeouts.response": "until the head of its response is there",
  "service.timeouts.idle": "between two pieces of a body, and of a WebSocket",
  "service.timeouts.request": "for all of a request's body",
  "route.servers": "a service of its own; any key of one may stand beside it",
  "route.path.exact": "this path and none below it",
  "route.path.regex": "RE2: no pattern can be made slow by a request",
  "route.redirect.to": "the target, literally; or the parts that follow",
  "route.redirect.scheme": "what is not named stays as it was",
  "route.redirect.host": "another host",
  "route.redirect.port": "another port; without it the scheme's own where `scheme` or `host` is named, else as it was",
  "route.redirect.path": "another path",
  "route.redirect.status": "permanent: 301 or 308",
  "route.respond.status": "of the answer",
  "route.respond.body": "of the answer",
  "route.respond.headers": "of the answer",
  "route.rewrite.path": "in place of what the route's path matched",
  "route.rewrite.whole": "in place of the whole path",
  "route.rewrite.host": "in place of Host",
  "route.request.headers": "of the request, before it goes to a server",
  "route.request.query": "of the request; other parameters stay as they are",
  "route.request.headers.set": "in place of those that came",
  "route.request.headers.add": "beside those that came",
  "route.request.headers.remove": "by their names",
  "route.request.query.set": "in place of those that came",
  "route.request.query.remove": "by their names",
  "route.response.headers": "of the response, before it goes to the client",
  "route.mirror.service": "that gets the copies",
  "route.mirror.percent": "of the requests",
  "route.rate.requests": "tokens that each client gets",
  "route.rate.per": "in this time",
  "route.rate.by": "what tells clients apart: their address, or a header",
  "route.rate.by.header": "its name; a client without it counts by its address",
  "route.rate.burst": "tokens at once; without it `requests`",
  "tcp.timeouts.connect": "until a server is connected",
  "tcp.timeouts.idle": "without a byte either way",
};

if (import.meta.main) process.stdout.write(makeReference());
