// HTTP/1.1 as RFC 9110 and RFC 9112 want it, in bytes: what clients and servers may send, and what they must not. Every
// row is one connection to the running program and has one expectation for all runtimes. Where an RFC leaves a choice,
// the name of the row says what we chose; R and A with a number are cases from the field, as in field.test.ts. The facts come from h1spec, Http11Probe and the smuggling corpora of
// defparam/smuggler and PortSwigger.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import type { Socket } from "node:net";
import { after, before } from "node:test";
import {
  answer,
  echo,
  type Exchange,
  type Message,
  type Part,
  type Program,
  rawRequest,
  type Script,
  type ScriptedServer,
  scriptedServer,
  sleep,
  startProgram,
  status,
  target,
  test,
  value,
  values,
  type Visit,
} from "../rig/rig.ts";

/** A request as a server behind the program has seen it. */
interface Seen extends Message {
  /** All its bytes, as latin1. */
  raw: string;
  /** Whether no earlier request of the same row was still unanswered. */
  alone: boolean;
}

type Check = (seen: Seen[], exchange: Exchange) => unknown;

export interface Row {
  name: string;
  /** `~row` becomes a number of the same length. It tells which row a request at a server belongs to. */
  send: Part | Part[];
  /**
   * The answers on the connection. `400|501`: either status. `cut`: a 200 that the client can tell to be incomplete.
   * `then closed`: the program ends the connection; `then open`: it does not; without either both are right.
   * `closes`: the connection ends without an answer. `... or ...`: either of the two.
   */
  expect: string;
  /** The requests at the servers, or how many there are (-1: any). Without it: one for each answer below 400. */
  seen?: number | string[];
  /** How the server answers: bytes, or a script. It echoes when left out. */
  answer?: string | Script;
  /** The methods of the requests, where one of them is HEAD. */
  methods?: string[];
  /** How long to wait for the answers, in milliseconds. */
  patience?: number;
  /** Every byte is sent by itself. */
  byteByByte?: true;
  /** The row needs a config that has no default service. */
  withoutDefault?: boolean;
  check?: Check;
}

// ─── Bytes ───

const HOST = "Host: a.test\r\n";
const CLOSE = "Connection: close\r\n";
const CHUNKED = "Transfer-Encoding: chunked\r\n";
const LAST_CHUNK = "0\r\n\r\n";
const EXPECT = "Expect: 100-continue\r\n";
const get = (fields = "", path = "/~row", version = "HTTP/1.1") => `GET ${path} ${version}\r\n${HOST}${fields}\r\n`;
const post = (fields: string, body = "") => `POST /~row HTTP/1.1\r\n${HOST}${fields}\r\n${body}`;
const sized = (body: string) => `Content-Length: ${body.length}\r\n`;
const chunk = (body: string) => `${body.length.toString(16)}\r\n${body}\r\n`;
/** The request behind the one that a row is about. Behind a refusal it must not be read. */
const NEXT = get(CLOSE, "/~row/next");
const SMUGGLED = get("X-Smuggled: 1\r\n", "/~row/smuggled");
const shown = (text: string) => JSON.stringify(text).replaceAll("\x7f", "\\u007f");

/** Waits for the next bytes of the program, 3 s at most. */
const answered: Part = (socket) =>
  new Promise<void>((resolve) => {
    const late = setTimeout(resolve, 3000);
    const go = () => (clearTimeout(late), resolve());
    socket.once("data", go).once("close", go).once("error", go);
  });
const halfClose: Part = (socket) => void socket.end();

// ─── Kinds of rows ───

type Named = Record<string, string>;
const rows = (cases: Named, row: (bytes: string, name: string) => Omit<Row, "name">): Row[] =>
  Object.entries(cases).map(([name, bytes]) => ({ name, ...row(bytes, name) }));
/** Refused, and what stands behind it is not read. */
const refused = (cases: Named, expect = "400 then closed"): Row[] =>
  rows(cases, (bytes) => ({ send: bytes + NEXT, expect, seen: 0 }));
/** Served, and the next request on the connection too. */
const served = (cases: Named, check?: Check): Row[] =>
  rows(cases, (bytes) => ({ send: [bytes, answered, NEXT], expect: "200 200", ...check && { check } }));
/** A field of a GET. */
const refusedFields = (cases: Named, expect?: string) =>
  refused(Object.fromEntries(Object.entries(cases).map(([name, field]) => [name, get(field)])), expect);

const bodyIs = (body: string) => (seen: Seen[]) => assert.equal(seen[0]?.body.toString("latin1"), body);
const targetIs = (path: string): Check => ([request]) => assert.equal(target(request!).replace(/~\d{3}/, "~row"), path);
const fieldIs = (name: string, expected: string[]) => ([request]: Seen[]) =>
  assert.deepEqual(values(request!, name), expected);
const interimAre = (...expected: number[]) => (_seen: Seen[], { interim }: Exchange) =>
  assert.deepEqual(interim.map(status), expected);
const all = (...checks: Check[]): Check => async (seen, exchange) => {
  for (const check of checks) await check(seen, exchange);
};

// ─── Request line ───

const line = (start: string) => `${start}\r\n${HOST}\r\n`;
const requestLine: Row[] = [
  { name: "a plain GET", send: get(), expect: "200 then open", seen: ["GET /~row"] },
  ...served({ "an empty line before the request line (R12)": `\r\n${get()}` }),
  ...refused({
    "two spaces before the target": line("GET  /~row HTTP/1.1"),
    "two spaces before the version": line("GET /~row  HTTP/1.1"),
    "a tab before the target": line("GET\t/~row HTTP/1.1"),
    "a tab before the version": line("GET /~row\tHTTP/1.1"),
    "a space behind the version": line("GET /~row HTTP/1.1 "),
    "a space before the method": line(" GET /~row HTTP/1.1"),
    "a tab before the method": line("\tGET /~row HTTP/1.1"),
    "a bare LF before the request line": `\n${get()}`,
    "a bare CR before the request line": `\r${get()}`,
    "no target": line("GET HTTP/1.1"),
    "an empty target": line("GET  HTTP/1.1"),
    "no method": line(" /~row HTTP/1.1"),
    "a method alone": "GET\r\n\r\n",
    "a space inside the target": line("GET /~row/a b HTTP/1.1"),
    "a NUL before the method": `\0${get()}`,
    "a NUL in the method": line("G\0ET /~row HTTP/1.1"),
    "a bare CR in the request line": line("GET /~row\rX HTTP/1.1"),
    "a bare CR behind the version": `GET /~row HTTP/1.1\r${HOST}\r\n`,
    "bytes of a TLS handshake": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "a status line": "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "a method that is no token (@)": line("G@T /~row HTTP/1.1"),
    "a method that is no token (parenthesis)": line("GE(T /~row HTTP/1.1"),
    "a method that is no token (colon)": line("GET: /~row HTTP/1.1"),
    "a method with a byte above 0x7f": line("G\xc9T /~row HTTP/1.1"),
  }),
];

const versions: Row[] = [
  ...served({
    "HTTP/1.2 is served as 1.1": line("GET /~row HTTP/1.2"),
    "HTTP/1.9 is served as 1.1": line("GET /~row HTTP/1.9"),
  }, (_seen, { answers }) => assert.match(answers[0]!.start, /^HTTP\/1\.1 /)),
  ...refused({
    "HTTP/0.9": line("GET /~row HTTP/0.9"),
    "HTTP/0.9 without a version": "GET /~row\r\n\r\n",
    "http in small letters": line("GET /~row http/1.1"),
    "Http in mixed letters": line("GET /~row Http/1.1"),
    "a version without a minor number": line("GET /~row HTTP/1"),
    "a version without numbers": line("GET /~row HTTP/"),
    "a version without a dot": line("GET /~row HTTP/11"),
    "a version with a comma": line("GET /~row HTTP/1,1"),
    "a version with two digits behind the dot": line("GET /~row HTTP/1.10"),
    "a version with a zero in front": line("GET /~row HTTP/01.1"),
    "a version with a zero behind the dot": line("GET /~row HTTP/1.01"),
    "a version with three numbers": line("GET /~row HTTP/1.1.1"),
    "a version with letters": line("GET /~row HTTP/1.x"),
    "a negative version": line("GET /~row HTTP/-1.1"),
    "a space inside the version": line("GET /~row HTTP/ 1.1"),
    "another protocol": line("GET /~row HTTQ/1.1"),
    "another protocol, RTSP": line("DESCRIBE /~row RTSP/1.0"),
    "a protocol with a letter more": line("GET /~row XHTTP/1.1"),
  }),
  ...refused({
    "HTTP/2.0 in a request line": line("GET /~row HTTP/2.0"),
    "HTTP/3.0 in a request line": line("GET /~row HTTP/3.0"),
    "HTTP/9.9 in a request line": line("GET /~row HTTP/9.9"),
  }, "505 then closed"),
  ...refused({ "the preface of HTTP/2": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" }, "400|505 then closed"),
];

const methods: Row[] = [
  ...["PURGE", "PROPFIND", "MKCOL", "REPORT", "M-SEARCH", "QUERY", "FOO", "PATCH", "PUT", "DELETE", "OPTIONS"]
    .map((method): Row => ({
      name: `${method} passes`,
      send: [line(`${method} /~row HTTP/1.1`), answered, NEXT],
      expect: "200 200",
      seen: [`${method} /~row`, "GET /~row/next"],
    })),
  ...["get", "post", "Get", "trace", "connect"].map((method): Row => ({
    name: `the method ${method} in small letters is not known`,
    send: line(`${method} /~row HTTP/1.1`),
    expect: "405|501",
    seen: 0,
  })),
  { name: "TRACE is refused", send: line("TRACE /~row HTTP/1.1"), expect: "405", seen: 0 },
  {
    name: "TRACE with a body is refused, and the body is no request",
    send: `TRACE /~row HTTP/1.1\r\n${HOST}${sized(SMUGGLED)}\r\n${SMUGGLED}`,
    expect: "405",
    seen: 0,
  },
  {
    name: "CONNECT with an authority is refused, and the bytes behind it are nobody's",
    send: `CONNECT b.test:443 HTTP/1.1\r\nHost: b.test:443\r\n\r\n${NEXT}`,
    expect: "405 then closed",
    seen: 0,
  },
  {
    name: "CONNECT with a path is refused",
    send: line("CONNECT /~row HTTP/1.1") + NEXT,
    expect: "400|405 then closed",
    seen: 0,
  },
];

// ─── Target ───

const MARK = "X-Mark: ~row\r\n";
const absolute = (uri: string, host = "a.test") => `GET ${uri} HTTP/1.1\r\nHost: ${host}\r\n${MARK}\r\n`;
const targets: Row[] = [
  ...Object.entries({
    "/~row?p=c:\\x": "a backslash in the query (R10)",
    "/~row?q='\"<>": "quotes and brackets in the query (R11)",
    "/~row?q=|^`{}[]": "other characters that a URI must not have, in the query",
    "/~row?caf\xe9": "a latin1 byte in the query (R11)",
    "/~row?caf\xc3\xa9=\xf0\x9f\x98\x80": "UTF-8 in the query",
    "/~row?%zz%": "broken escapes in the query",
    "/~row?a=/../b&c=//d&%2e%2e": "dots, slashes and escapes in the query",
    "/~row?a?b": "a question mark in the query",
    "/~row?": "an empty query",
    "/~row/a%2Fb%2fc": "encoded slashes in the path",
    "/~row//b": "two slashes in the path",
    "//b.test/~row": "two slashes at the beginning of the path",
    "/~row/!$&'()*+,;=:@-._~": "all characters that a path may have",
    "/~row/.a/..b/...": "names that begin with dots",
    "/~row/caf%C3%A9/%c3%a9": "encoded UTF-8 in the path, in both spellings",
    "/~row/caf\xe9/\xc3\xa9": "bytes above 0x7f in the path",
    "/~row/%7Eme/%41%2e": "needless escapes in the path",
    "/~row/'\"<>|^`{}[]": "other characters that a URI must not have, in the path",
  }).map(([path, name]): Row => ({
    name: `${name}: passes as sent`,
    send: [get("", path), answered, NEXT],
    expect: "200 200",
    check: (seen) => assert.equal(target(seen[0]!).replace(/~\d{3}/, "~row"), path),
  })),
  ...Object.entries({
    "/~row/a/../b": "/~row/b",
    "/~row/a/%2e%2e/b": "/~row/b",
    "/~row/a/.%2E/b": "/~row/b",
    "/~row/./b": "/~row/b",
    "/~row/a/..": "/~row/",
    "/../../~row": "/~row",
    "/%2e%2e/~row/b/.": "/~row/b/",
  }).map(([path, resolved]): Row => ({
    name: `the path ${path} is resolved`,
    send: get("", path),
    expect: "200",
    seen: [`GET ${resolved}`],
  })),
  ...refused({
    "a fragment": get("", "/~row#b"),
    "a fragment behind a query": get("", "/~row?a#b"),
    "a backslash in the path": get("", "/~row\\b"),
    "a backslash for the first slash": get("", "\\~row"),
    "an encoded NUL in the path": get("", "/~row%00"),
    "a broken escape in the path": get("", "/~row%zz"),
    "a NUL in the path": get("", "/~row\0b"),
    "a NUL in the query": get("", "/~row?\0"),
    "a control byte in the path": get("", "/~row\x1bb"),
    "DEL in the path": get("", "/~row\x7fb"),
    "DEL in the query": get("", "/~row?\x7f"),
    "a tab in the path": get("", "/~row\tb"),
    "a path without its slash": get("", "~row"),
    "a query alone": get("", "?~row"),
    "an authority alone": get("", "a.test:80"),
    "a host before the path, by an @": get("", "@b.test/~row"),
    "a port before the path": get("", ":80/~row"),
    "GET with an asterisk": get(MARK, "*"),
    "POST with an asterisk": `POST * HTTP/1.1\r\n${HOST}${MARK}${sized("")}\r\n`,
    "OPTIONS with two asterisks": `OPTIONS ** HTTP/1.1\r\n${HOST}${MARK}\r\n`,
    "an absolute target of another scheme": absolute("ftp://a.test/~row"),
    "an absolute target with a user": absolute("http://u:p@a.test/~row"),
    "an absolute target with an empty host": absolute("http:///~row"),
    "an absolute target with a host that is none": absolute("http://a%2ftest/~row"),
    "an absolute target with a backslash": absolute("http:\\\\a.test\\~row"),
    "an absolute target with a fragment": absolute("http://a.test/~row#b"),
    "an absolute target without Host": `GET http://a.test/~row HTTP/1.1\r\n\r\n`,
    "an absolute target with two Hosts": `GET http://a.test/~row HTTP/1.1\r\n${HOST}${HOST}\r\n`,
    "an absolute target with another host than Host: nobody wins": absolute("http://b.test/~row"),
    "an absolute target with another port than Host: nobody wins": absolute("http://a.test:81/~row"),
  }),
  ...served({ "an absolute target": absolute("http://a.test/~row?x") }, targetIs("/~row?x")),
  ...served({
    "an absolute target in capitals": absolute("HTTP://A.TEST/~row?x"),
    "an absolute target with the port of Host": absolute("http://a.test:8080/~row?x", "a.test:8080"),
    "an absolute target of https, which a proxy before us may send": absolute("https://a.test/~row?x"),
  }, targetIs("/~row?x")),
  ...served({ "an absolute target without a path": absolute("http://a.test") }, targetIs("/")),
  ...served({ "an absolute target with a query and without a path": absolute("http://a.test?x") }, targetIs("/?x")),
  {
    name: "OPTIONS * is answered by the default service or by ourselves (R14)",
    send: [`OPTIONS * HTTP/1.1\r\n${HOST}${MARK}\r\n`, answered, NEXT],
    expect: "200 200",
    seen: -1,
    check: (seen) => {
      const asked = seen.filter(({ start }) => start.startsWith("OPTIONS"));
      for (const request of asked) assert.equal(target(request), "*");
    },
  },
  {
    name: "OPTIONS /* is a path",
    send: `OPTIONS /* HTTP/1.1\r\n${HOST}${MARK}\r\n`,
    expect: "200",
    seen: ["OPTIONS /*"],
  },
  {
    name: "a target of 16,000 bytes passes",
    send: [get("", "/~row".padEnd(16_000, "a")), answered, NEXT],
    expect: "200 200",
  },
  { name: "a target of over 16 kB", send: get(CLOSE, "/~row".padEnd(16_500, "a")), expect: "414", seen: 0 },
  {
    name: "a query of over 16 kB",
    send: get(CLOSE, "/~row?".padEnd(30_000, "a")),
    expect: "414",
    seen: 0,
  },
  {
    name: "a target of 100 kB",
    send: get("", "/~row".padEnd(100_000, "a")),
    expect: "414 then closed",
    seen: 0,
  },
];

// ─── Host ───

const withHost = (host: string, version = "HTTP/1.1") => `GET /~row ${version}\r\nHost: ${host}\r\n\r\n`;
const hosts: Row[] = [
  ...refused({
    "no Host": "GET /~row HTTP/1.1\r\n\r\n",
    "no Host, and other fields": "GET /~row HTTP/1.1\r\nX-Host: a.test\r\n\r\n",
    "two Hosts": get("Host: b.test\r\n"),
    "two equal Hosts": get("Host: a.test\r\n"),
    "two Hosts in other letters": get("HOST: a.test\r\n"),
    "two Hosts, the second empty": get("Host:\r\n"),
    "no Host in HTTP/1.2": "GET /~row HTTP/1.2\r\n\r\n",
    "two Hosts in HTTP/1.0": `GET /~row HTTP/1.0\r\n${HOST}${HOST}\r\n`,
    "a Host that is none in HTTP/1.0": withHost("a b", "HTTP/1.0"),
    "a space before the colon of Host": `GET /~row HTTP/1.1\r\nHost : a.test\r\n\r\n`,
    "a folded Host": `GET /~row HTTP/1.1\r\nHost:\r\n a.test\r\n\r\n`,
  }),
  ...[
    ...["", "a.test,b.test", "a.test, a.test", "u@a.test", "u:p@a.test", "a.test/pub", "a b", "a.test:99999"],
    ...["a.test:x", "a.test:+80", "a.test:-1", "a.test:80:80", "a.test?x", "a.test#x", "a.test\\x", "a.test%2fx"],
    ...["[::1", "::1", "[::1]x", "[zz]", "http://a.test", "caf\xe9.test", "a\tb", "a.test\0", "a\x7fb", '"a.test"'],
  ].map((host): Row => ({
    name: `the Host ${shown(host)}`,
    send: withHost(host) + NEXT,
    expect: "400 then closed",
    seen: 0,
  })),
  ...["A.Test", "a.test:8080", "a.test:", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:80", "a.test:65535"].map((
    host,
  ): Row => ({
    name: `the Host ${host} is served${host.endsWith(":") ? " (R13)" : ""}`,
    send: [withHost(host), answered, NEXT],
    expect: "200 200",
    check: fieldIs("x-forwarded-host", [host]),
  })),
];

// ─── Fields ───

const many = (count: number, length = 1) =>
  Array.from({ length: count }, (_, i) => `X-${i}: ${"v".repeat(length)}\r\n`).join("");
const fields: Row[] = [
  ...refusedFields({
    "a field without a colon": "no colon\r\n",
    "a field of one word": "word\r\n",
    "an empty name": ": v\r\n",
    "a colon alone": ":\r\n",
    "a space before the colon": "X-A : v\r\n",
    "a tab before the colon": "X-A\t: v\r\n",
    "a space in a name": "X A: v\r\n",
    "a folded field, with a space": "X-A: a\r\n b\r\n",
    "a folded field, with a tab": "X-A: a\r\n\tb\r\n",
    "a fold of blanks alone": "X-A: a\r\n \r\n",
    "a fold that looks like a field": "X-A: a\r\n Content-Length: 5\r\n",
    "a bare CR in a value": "X-A: a\rb\r\n",
    "a bare CR before the line's end": "X-A: a\r\r\n",
    "a bare CR and what looks like a field": "X-A: a\rContent-Length: 5\r\n",
    "a bare LF as a line's end": "X-A: a\nX-B: b\r\n",
    "a bare LF in front of a line": "X-A: a\r\n\nX-B: b\r\n",
    "CR for a name": "\r: v\r\n",
    "a NUL in a value": "X-A: a\0b\r\n",
    "a NUL behind a value": "X-A: a\0\r\n",
    "a NUL in a name": "X\0A: v\r\n",
    "the byte 0x01 in a value": "X-A: a\x01b\r\n",
    "a backspace in a value": "X-A: a\bb\r\n",
    "a vertical tab in a value": "X-A: a\vb\r\n",
    "a form feed in a value": "X-A: a\fb\r\n",
    "ESC in a value": "X-A: a\x1bb\r\n",
    "DEL in a value": "X-A: a\x7fb\r\n",
    "DEL in a name": "X\x7fA: v\r\n",
    "a byte above 0x7f in a name": "X\xe9: v\r\n",
    "a byte order mark before a name": "\xef\xbb\xbfX-A: v\r\n",
    ...Object.fromEntries(
      [...'()/@[]{}?=",;<>\\'].map((char) => [`a name with ${char}`, `X${char}A: v\r\n`]),
    ),
  }),
  ...refused({
    "a space before the first field": `GET /~row HTTP/1.1\r\n ${HOST}\r\n`,
    "a tab before the first field": `GET /~row HTTP/1.1\r\n\t${HOST}\r\n`,
    "a blank line of one space before the first field": `GET /~row HTTP/1.1\r\n \r\n${HOST}\r\n`,
    "all lines ended by LF alone": get().replaceAll("\r\n", "\n"),
    "all lines ended by CR alone": get().replaceAll("\r\n", "\r"),
    "the request line ended by LF alone": `GET /~row HTTP/1.1\n${HOST}\r\n`,
    "a field ended by LF alone": `GET /~row HTTP/1.1\r\nHost: a.test\n\r\n`,
    "a head ended by LF alone": `GET /~row HTTP/1.1\r\n${HOST}\n`,
    "a head ended by CR and something else": `GET /~row HTTP/1.1\r\n${HOST}\rX`,
  }),
  ...served({ "an empty value": get("X-A:\r\nX-B: \t \r\n") }, all(fieldIs("x-a", [""]), fieldIs("x-b", [""]))),
  ...served({ "blanks around a value are not part of it": get("X-A:\t a b\tc \t\r\n") }, fieldIs("x-a", ["a b\tc"])),
  ...served({ "a value without a blank before it": get("X-A:a:b\r\n") }, fieldIs("x-a", ["a:b"])),
  ...served(
    { "bytes above 0x7f in a value: pass as sent": get("X-A: caf\xe9\r\nX-B: caf\xc3\xa9\x80\xff\r\n") },
    all(fieldIs("x-a", ["caf\xe9"]), fieldIs("x-b", ["caf\xc3\xa9\x80\xff"])),
  ),
  ...served(
    { "all characters that a name may have": get("X!#$%&'*+-^`|~0aZ: v\r\n") },
    fieldIs("X!#$%&'*+-^`|~0aZ", ["v"]),
  ),
  ...served(
    { "quotes, commas and backslashes in a value": get('X-A: "a\\"b", \'c\'; d=(e)<f>{g}\r\n') },
    fieldIs("x-a", ['"a\\"b", \'c\'; d=(e)<f>{g}']),
  ),
  ...served(
    { "several fields of one name stay several, spelled as sent": get("X-a: 1\r\nx-A: 2\r\nX-B: 3\r\nX-a: 4\r\n") },
    ([request]) =>
      assert.deepEqual(request!.headers.filter(([name]) => /^x-[ab]$/i.test(name)), [
        ["X-a", "1"],
        ["x-A", "2"],
        ["X-B", "3"],
        ["X-a", "4"],
      ]),
  ),
  ...served({ "two lines of cookies": get("Cookie: a=1\r\nCookie: b=2\r\n") }, fieldIs("cookie", ["a=1", "b=2"])),
  ...served(
    { "fields named as things of JavaScript": get("__proto__: x\r\nconstructor: y\r\ntoString: z\r\n") },
    all(fieldIs("constructor", ["y"]), fieldIs("toString", ["z"])),
  ),
  ...served(
    { "fields for one hop end here": get("Connection: X-Hop, keep-alive\r\nX-Hop: 1\r\nTE: trailers\r\nX-End: 1\r\n") },
    all(fieldIs("x-hop", []), fieldIs("keep-alive", []), fieldIs("x-end", ["1"])),
  ),
  ...served({ "Connection cannot take Host away": get("Connection: Host\r\n") }, fieldIs("host", ["a.test"])),
];

const limits: Row[] = [
  ...served({
    "a cookie of 8 kB (R21)": get(`Cookie: a=${"c".repeat(8000)}\r\n`),
    "one value of 30 kB": get(`X-A: ${"v".repeat(30_000)}\r\n`),
    "200 fields (R21)": get(many(200)),
    "990 fields": get(many(990)),
    "a head of 60 kB (R21)": get(many(60, 985)),
  }),
  ...refused({
    "a head of over 64 kB (R21)": get(many(70, 1000)),
    "one value of 70 kB": get(`X-A: ${"v".repeat(70_000)}\r\n`),
    "one name of 70 kB": get(`${"x".repeat(70_000)}: v\r\n`),
    "1,100 fields": get(many(1100)),
    "3,000 fields": get(many(3000)),
    "a head of 1 MB": get(many(1000, 1000)),
    "a field of 200 kB that does not end": `GET /~row HTTP/1.1\r\n${HOST}X-A: ${"v".repeat(200_000)}`,
  }, "431 then closed"),
  {
    name: "a request line of 100 kB without a space",
    send: "G".repeat(100_000),
    expect: "400|405|414|431|501 then closed",
    seen: 0,
  },
  {
    name: "a head that does not come to its end gets 408 after limits.header (R17)",
    send: `GET /~row HTTP/1.1\r\n${HOST}`,
    expect: "408 then closed",
    seen: 0,
    patience: 6000,
  },
  {
    name: "a connection that sends nothing is closed after limits.header (R17)",
    send: [],
    expect: "closes",
    patience: 6000,
  },
  {
    name: "a connection that is idle behind an answer is closed after limits.keep_alive (R17)",
    send: [get(), answered, (socket) => Promise.race([sleep(5000), new Promise((ended) => socket.once("end", ended))])],
    expect: "200 then closed",
    patience: 6000,
  },
];

// ─── Content-Length ───

const lengths: Row[] = [
  ...[
    ...["+5", "-5", "-0", "+0", "0x5", "0o5", "5x", "x5", "5 5", "5,5", "5, 5", "5,", ",5", "5;", "5.0", "5e0", "5_0"],
    ...[
      "",
      "five",
      '"5"',
      "5\0",
      "\v5",
      "5\f",
      "5\x7f",
      "5\xa0",
      "\xb2",
      "NaN",
      "99999999999999999999999",
      "1".repeat(400),
    ],
    ...["18446744073709551621", "9007199254740993", "4294967301000000000"],
  ].map((length): Row => ({
    name: `the length ${shown(length).slice(0, 40)}`,
    send: post(`Content-Length: ${length}\r\n`, "hello") + NEXT,
    expect: "400 then closed",
    seen: 0,
  })),
  ...refused({
    "two lengths that differ": post("Content-Length: 5\r\nContent-Length: 6\r\n", "hello"),
    "two equal lengths: are refused, though they could be joined": post(sized("hello") + sized("hello"), "hello"),
    "two lengths, one of them in other letters": post("Content-Length: 5\r\ncontent-length: 0\r\n", "hello"),
    "two lengths, one of them empty": post("Content-Length: 5\r\nContent-Length:\r\n", "hello"),
    "two lengths on a GET": get("Content-Length: 0\r\nContent-Length: 5\r\n"),
    "a list of two lengths": post("Content-Length: 5, 6\r\n", "hello"),
    "a space before the colon of Content-Length": post("Content-Length : 5\r\n", "hello"),
    "a space before Content-Length": post("X: y\r\n Content-Length: 5\r\n", "hello"),
    "a space inside Content-Length": post("Content Length: 5\r\n", "hello"),
    "a folded length": post("Content-Length:\r\n 5\r\n", "hello"),
    "a bare LF before the length": post("Content-Length:\n5\r\n", "hello"),
    "a bare CR behind the length": post("Content-Length: 5\r\r\n", "hello"),
    "a length that is no number on a GET": get("Content-Length: abc\r\n"),
  }),
  ...served({
    "a length": post(sized("hello"), "hello"),
    "a length with zeros in front: is decimal": post("Content-Length: 0005\r\n", "hello"),
    "a length with blanks around it": post("Content-Length: \t 5\t \r\n", "hello"),
    "a length in small letters": post("content-length:5\r\n", "hello"),
    "a length that Connection names": post("Connection: Content-Length\r\nContent-Length: 5\r\n", "hello"),
  }, bodyIs("hello")),
  ...served({
    "a POST with a length of 0": post("Content-Length: 0\r\n"),
    "a POST without a length has no body": post(""),
  }, all(bodyIs(""), fieldIs("content-length", ["0"]))),
  {
    name: "an empty line behind the body of a POST (R12)",
    send: [post(sized("hello"), "hello\r\n"), answered, NEXT],
    expect: "200 200",
  },
  {
    name: "a body in three pieces",
    send: [post(sized("hello")), 20, "he", 20, "llo", answered, NEXT],
    expect: "200 200",
    check: bodyIs("hello"),
  },
  {
    name: "a body that ends before its length",
    send: [post("Content-Length: 10\r\n", "hello"), halfClose],
    expect: "400|408 then closed or closes",
    seen: 0,
    patience: 6000,
  },
];

// ─── Transfer-Encoding ───

/** A body that is whole if it is read as chunks, and garbage if it is not. */
const encoded = (fields: string, version = "HTTP/1.1") =>
  `POST /~row ${version}\r\n${HOST}${fields}\r\n${chunk("hello")}${LAST_CHUNK}`;
const encodings = (cases: Named, expect = "400|501 then closed") =>
  refused(Object.fromEntries(Object.entries(cases).map(([name, fields]) => [name, encoded(fields)])), expect);
const bytesThatAreNoBlanks = ["\0", "\x01", "\b", "\v", "\f", "\r", "\n", "\x1f", "\x7f", "\xa0", "\xff"];
const transferEncodings: Row[] = [
  ...encodings({
    "gzip, chunked": "Transfer-Encoding: gzip, chunked\r\n",
    "gzip": "Transfer-Encoding: gzip\r\n",
    "gzip and then chunked in two lines": "Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n",
    "identity": "Transfer-Encoding: identity\r\n",
    "identity, chunked": "Transfer-Encoding: identity, chunked\r\n",
    "chunked, identity": "Transfer-Encoding: chunked, identity\r\n",
    "chunked and then identity in two lines": "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
    "xchunked": "Transfer-Encoding: xchunked\r\n",
    "chunkedx": "Transfer-Encoding: chunkedx\r\n",
    "chunk": "Transfer-Encoding: chunk\r\n",
    "chunked, cow": "Transfer-Encoding: chunked, cow\r\n",
    "cow, chunked": "Transfer-Encoding: cow, chunked\r\n",
    "cow and then chunked in two lines": "Transfer-Encoding: cow\r\nTransfer-Encoding: chunked\r\n",
    "chunked and then cow in two lines": "Transfer-Encoding: chunked\r\nTransfer-Encoding: cow\r\n",
    "cow chunked bar": "Transfer-Encoding: cow chunked bar\r\n",
    "chunked twice in two lines": `${CHUNKED}${CHUNKED}`,
    "chunked twice in one line": "Transfer-Encoding: chunked, chunked\r\n",
    "chunked;q=1": "Transfer-Encoding: chunked;q=1\r\n",
    "chunked in double quotes": 'Transfer-Encoding: "chunked"\r\n',
    "chunked in single quotes": "Transfer-Encoding: 'chunked'\r\n",
    "a comma behind chunked": "Transfer-Encoding: chunked,\r\n",
    "a comma before chunked": "Transfer-Encoding: , chunked\r\n",
    "an empty coding": "Transfer-Encoding:\r\n",
    "an empty coding and then chunked": `Transfer-Encoding:\r\n${CHUNKED}`,
    "a byte above 0x7f in chunked": "Transfer-Encoding: ch\x96nked\r\n",
    "the letter K of Kelvin in chunked": "Transfer-Encoding: chun\xe2\x84\xaaed\r\n",
  }),
  ...encodings({
    "Transfer-Encoding and Content-Length": `${CHUNKED}Content-Length: 5\r\n`,
    "Content-Length and Transfer-Encoding": `Content-Length: 5\r\n${CHUNKED}`,
    "Transfer-Encoding and a Content-Length of 0": `${CHUNKED}Content-Length: 0\r\n`,
    "Content-Length and an unknown coding": "Content-Length: 5\r\nTransfer-Encoding: xchunked\r\n",
    "Content-Length and identity": "Content-Length: 5\r\nTransfer-Encoding: identity\r\n",
    "Content-Length and an empty coding": "Content-Length: 5\r\nTransfer-Encoding:\r\n",
  }, "400|501 then closed"),
  ...encodings({
    "a space before the colon": "Transfer-Encoding : chunked\r\n",
    "a tab before the colon": "Transfer-Encoding\t:\tchunked\r\n",
    "a space before the name": ` ${CHUNKED}`,
    "a tab before the name": `\t${CHUNKED}`,
    "a space in the name": "Transfer Encoding: chunked\r\n",
    "a space in the name and none behind the colon": "Transfer Encoding:chunked\r\n",
    "a CR in the name": "Transfer\r-Encoding: chunked\r\n",
    "a byte above 0x7f in the name": "Transf\x82r-Encoding: chunked\r\n",
    "chunked on a line of its own": "Transfer-Encoding:\r\n chunked\r\n",
    "chunked behind a bare LF": "Transfer-Encoding:\n chunked\r\n",
    "chunked behind a folded field": `X-A: a\r\n ${CHUNKED}`,
    "the name behind a bare CR": `X: X\r${CHUNKED}`,
    "the name behind a bare LF": `X: X\n${CHUNKED}`,
    "the name behind CR, CR, LF": `X: X\r\r\n${CHUNKED}`,
    "the name behind LF, CR": `X: X\n\r${CHUNKED}`,
    "a bare CR behind chunked, and a field": "Transfer-Encoding: chunked\rX: X\r\n",
    "a bare LF behind chunked, and a field": "Transfer-Encoding: chunked\nX: X\r\n",
    "a colon too many": "Transfer-Encoding:: chunked\r\n",
    "no colon": "Transfer-Encoding chunked\r\n",
  }, "400|501 then closed"),
  ...bytesThatAreNoBlanks.flatMap((byte) =>
    encodings({
      [`the byte ${shown(byte)} before Transfer-Encoding`]: `${byte}${CHUNKED}`,
      [`the byte ${shown(byte)} behind Transfer-Encoding`]: `Transfer-Encoding${byte}: chunked\r\n`,
      [`the byte ${shown(byte)} before chunked`]: `Transfer-Encoding:${byte}chunked\r\n`,
      [`the byte ${shown(byte)} behind chunked`]: `Transfer-Encoding: chunked${byte}\r\n`,
    })
  ).filter(({ name }) =>
    name !== 'the byte "\\n" behind chunked' && name !== 'the byte "\\n" before Transfer-Encoding'
  ),
  ...refused({
    "Transfer-Encoding in HTTP/1.0 (R8)": encoded(CHUNKED, "HTTP/1.0"),
    "Transfer-Encoding in HTTP/1.0 beside keep-alive": encoded(`${CHUNKED}Connection: keep-alive\r\n`, "HTTP/1.0"),
    "Transfer-Encoding and Content-Length in HTTP/1.0": encoded(`${CHUNKED}Content-Length: 5\r\n`, "HTTP/1.0"),
  }),
  ...served({
    "chunked": encoded(CHUNKED),
    "chunked in capitals": encoded("TRANSFER-ENCODING: CHUNKED\r\n"),
    "chunked in mixed letters": encoded("TrAnSFer-EnCODinG: cHuNkeD\r\n"),
    "a tab before chunked": encoded("Transfer-Encoding:\tchunked\r\n"),
    "two spaces before chunked": encoded("Transfer-Encoding:  chunked\r\n"),
    "no blank before chunked": encoded("Transfer-Encoding:chunked\r\n"),
    "blanks behind chunked": encoded("Transfer-Encoding: chunked \t\r\n"),
    "chunked that Connection names": encoded(`Connection: Transfer-Encoding\r\n${CHUNKED}`),
  }, bodyIs("hello")),
];

// ─── Chunks ───

const chunked = (body: string) => post(CHUNKED, body);
const bodies = (cases: Named) => Object.fromEntries(Object.entries(cases).map(([name, body]) => [name, chunked(body)]));
const REFUSED_CHUNKS: Named = {
  "a chunk size that is no number": `zz\r\nhello\r\n${LAST_CHUNK}`,
  "a chunk size with a letter behind it": `5h\r\nhello\r\n${LAST_CHUNK}`,
  "an empty chunk size": `\r\nhello\r\n${LAST_CHUNK}`,
  "an extension without a chunk size": `;a=b\r\nhello\r\n${LAST_CHUNK}`,
  "a chunk size of 0x5": `0x5\r\nhello\r\n${LAST_CHUNK}`,
  "a chunk size of +5": `+5\r\nhello\r\n${LAST_CHUNK}`,
  "a chunk size of -5": `-5\r\nhello\r\n${LAST_CHUNK}`,
  "a chunk size of -0": "-0\r\n\r\n",
  "a chunk size with an underscore": `0_5\r\nhello\r\n${LAST_CHUNK}`,
  "a chunk size with a dot": `5.0\r\nhello\r\n${LAST_CHUNK}`,
  "a chunk size with a space before it": ` 5\r\nhello\r\n${LAST_CHUNK}`,
  "a chunk size with a tab before it": `\t5\r\nhello\r\n${LAST_CHUNK}`,
  "a chunk size with a space behind it": `5 \r\nhello\r\n${LAST_CHUNK}`,
  "a chunk size with a tab behind it": `5\t\r\nhello\r\n${LAST_CHUNK}`,
  "a chunk size with a word behind it": `5 a\r\nhello\r\n${LAST_CHUNK}`,
  "a chunk size of two numbers": `5 5\r\nhello\r\n${LAST_CHUNK}`,
  "a chunk size of 2^64 + 5": `10000000000000005\r\nhello\r\n${LAST_CHUNK}`,
  "a chunk size of 2^32 + 5 in front of zeros": `1000000000000000000000005\r\nhello\r\n${LAST_CHUNK}`,
  "a chunk size of sixteen Fs": `FFFFFFFFFFFFFFFF\r\nhello\r\n${LAST_CHUNK}`,
  "a chunk size of 2,000 zeros": `${"0".repeat(2000)}5\r\nhello\r\n${LAST_CHUNK}`,
  "a NUL behind a chunk size": `5\0\r\nhello\r\n${LAST_CHUNK}`,
  "a chunk size that ends in LF": `5\nhello\r\n${LAST_CHUNK}`,
  "a chunk size that ends in CR": `5\rhello\r\n${LAST_CHUNK}`,
  "a chunk size that ends in CR, CR, LF": `5\r\r\nhello\r\n${LAST_CHUNK}`,
  "a chunk that is longer than its size": `5\r\nhello!!\r\n${LAST_CHUNK}`,
  "a chunk that is shorter than its size": `5\r\nhel\r\n${LAST_CHUNK}`,
  "no line end behind a chunk": `5\r\nhello${LAST_CHUNK}`,
  "LF behind a chunk": `5\r\nhello\n${LAST_CHUNK}`,
  "CR behind a chunk": `5\r\nhello\r${LAST_CHUNK}`,
  "a space behind a chunk": `5\r\nhello \r\n${LAST_CHUNK}`,
  "all lines of the chunks ended by LF": "5\nhello\n0\n\n",
  "a last chunk that ends in LF": `${chunk("hello")}0\n\r\n`,
  "an end of the body that is a LF": `${chunk("hello")}0\r\n\n`,
  "a semicolon and no extension": `5;\r\nhello\r\n${LAST_CHUNK}`,
  "two semicolons": `5;;a\r\nhello\r\n${LAST_CHUNK}`,
  "an extension without a name": `5;=b\r\nhello\r\n${LAST_CHUNK}`,
  "an extension without its value": `5;a=\r\nhello\r\n${LAST_CHUNK}`,
  "an extension that is no token": `5;a@b=c\r\nhello\r\n${LAST_CHUNK}`,
  "an extension of two words": `5;a b\r\nhello\r\n${LAST_CHUNK}`,
  "an extension with a quote that does not end": `5;a="b\r\nhello\r\n${LAST_CHUNK}`,
  "an extension with bytes behind its quote": `5;a="b"c\r\nhello\r\n${LAST_CHUNK}`,
  "a bare LF in an extension": `5;a\nb\r\nhello\r\n${LAST_CHUNK}`,
  "a bare LF in a quoted extension": `5;a="\n"\r\nhello\r\n${LAST_CHUNK}`,
  "a bare CR in an extension": `5;a\rb\r\nhello\r\n${LAST_CHUNK}`,
  "a line end in a quoted extension": `5;a="\r\n"\r\nhello\r\n${LAST_CHUNK}`,
  "a NUL in an extension": `5;a=\0\r\nhello\r\n${LAST_CHUNK}`,
  "DEL in an extension": `5;a=\x7f\r\nhello\r\n${LAST_CHUNK}`,
  "an extension of the last chunk that ends in LF": `${chunk("hello")}0;a\n\r\n`,
};
const REFUSED_TRAILERS: Named = {
  "a trailer without a colon": "X-A\r\n",
  "a trailer without a name": ": a\r\n",
  "a trailer with a space before its colon": "X-A : a\r\n",
  "a space before a trailer": " X-A: a\r\n",
  "a folded trailer": "X-A: a\r\n b\r\n",
  "a NUL in a trailer": "X-A: \0\r\n",
  "a bare CR in a trailer": "X-A: a\rb\r\n",
  "a bare LF behind a trailer": "X-A: a\nX-B: b\r\n",
  "a request line for a trailer": "GET /~row/smuggled HTTP/1.1\r\n",
};
const chunks: Row[] = [
  ...refused(bodies(REFUSED_CHUNKS)),
  ...rows(REFUSED_CHUNKS, (body) => ({
    send: [chunked(chunk("abc")), 30, body + NEXT],
    expect: "400 then closed",
    seen: 0,
  })).filter((_, i) => i % 6 === 0).map((row) => ({ ...row, name: `${row.name}, later` })),
  ...refused(bodies(Object.fromEntries(
    Object.entries(REFUSED_TRAILERS).map(([name, trailer]) => [name, `${chunk("hello")}0\r\n${trailer}\r\n`]),
  ))),
  ...served(
    bodies({
      "a chunk size with zeros in front": `0005\r\nhello\r\n000\r\n\r\n`,
      "two chunks": `${chunk("he")}${chunk("llo")}${LAST_CHUNK}`,
      "an extension": `5;a\r\nhello\r\n${LAST_CHUNK}`,
      "an extension with a value": `5;a=b\r\nhello\r\n${LAST_CHUNK}`,
      "several extensions": `5;a=b;c;d=e\r\nhello\r\n0;f=g\r\n\r\n`,
      "an extension with a quoted value": `5;a="b;c d=\\"e\\""\r\nhello\r\n${LAST_CHUNK}`,
      "blanks around the semicolon, which a recipient has to bear": `5 ; a = b\r\nhello\r\n${LAST_CHUNK}`,
    }),
    bodyIs("hello"),
  ),
  ...served(
    bodies({
      "a chunk size in small letters": `a\r\n0123456789\r\n${LAST_CHUNK}`,
      "a chunk size in capitals": `A\r\n0123456789\r\n${LAST_CHUNK}`,
    }),
    bodyIs("0123456789"),
  ),
  ...served({ "chunks without any bytes": chunked(LAST_CHUNK) }, bodyIs("")),
  ...served(bodies({ "chunks that hold what ends chunks": `5\r\n0\r\n\r\n\r\n${LAST_CHUNK}` }), bodyIs("0\r\n\r\n")),
  {
    name: "chunks of which each byte comes by itself",
    send: [post(CHUNKED), ...[...chunk("hello") + LAST_CHUNK].flatMap((byte): Part[] => [byte, 2]), NEXT],
    expect: "200 200",
    check: bodyIs("hello"),
  },
  {
    name: "chunks without a last one",
    send: [chunked(chunk("hello")), halfClose],
    expect: "400|408 then closed or closes",
    seen: 0,
    patience: 6000,
  },
  {
    name: "an extension of 100 kB",
    send: chunked(`5;a=${"b".repeat(100_000)}\r\nhello\r\n${LAST_CHUNK}`),
    expect: "400|413|431 then closed",
    seen: 0,
  },
  {
    name: "trailers of 100 kB",
    send: chunked(`${chunk("hello")}0\r\n${many(100, 1000)}\r\n`),
    expect: "400|413|431 then closed",
    seen: 0,
  },
  {
    name: "trailers pass (R9)",
    send: [chunked(`${chunk("hello")}0\r\nX-Sum: abc\r\nx-sum: d\r\n\r\n`), answered, NEXT],
    expect: "200 200",
    check: all(bodyIs("hello"), ([request]) => assert.match(request!.raw, /\r\n0\r\nX-Sum: abc\r\nx-sum: d\r\n\r\n$/)),
  },
  {
    name: "trailers that belong into a head: do not pass and change nothing",
    send: [
      chunked(
        `${
          chunk("hello")
        }0\r\nHost: b.test\r\nContent-Length: 3\r\nTransfer-Encoding: x\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n`,
      ),
      answered,
      NEXT,
    ],
    expect: "200 200",
    check: all(bodyIs("hello"), fieldIs("host", ["a.test"]), ([request]) => {
      assert.doesNotMatch(request!.raw, /6\.6\.6\.6|b\.test|Content-Length|Transfer-Encoding: x/i);
    }),
  },
];

// ─── Smuggling ───

const lookAlike = (field: string): Row => ({
  name: `the field ${field} is not taken for what it looks like, and does not pass (R20)`,
  send: [post(`Content-Length: 5\r\n${field}\r\n`, "hello"), answered, NEXT],
  expect: "200 200",
  check: all(bodyIs("hello"), ([request]) => {
    const name = field.slice(0, field.indexOf(":")).toLowerCase();
    assert.deepEqual(request!.headers.filter(([given]) => given.toLowerCase() === name), []);
  }),
});
/** One request whose body looks like another one. */
const carried = (fields: string, body: string, method = "POST"): Omit<Row, "name"> => ({
  send: [`${method} /~row HTTP/1.1\r\n${HOST}${fields}\r\n${body}`, answered, NEXT],
  methods: [method],
  expect: "200 200",
  seen: [`${method} /~row`, "GET /~row/next"],
  check: ([request]) => assert.match(request!.body.toString(), /^GET \/~\d{3}\/smuggled HTTP\/1\.1\r\n/),
});
const smuggling: Row[] = [
  ...[
    "Transfer_Encoding: chunked",
    "Transfer___Encoding: chunked",
    "Transfer---Encoding: chunked",
    "Transfer-_Encoding: chunked",
    "Transfer.Encoding: chunked",
    "Content_Length: 0",
    "Content__Length: 0",
    "Content--Length: 0",
    "Content.Length: 0",
  ].map(lookAlike),
  ...served({
    "Content-Encoding: chunked says nothing about the body's length": post(
      `${sized("hello")}Content-Encoding: chunked\r\n`,
      "hello",
    ),
    "TE: chunked says nothing about the body's length": post(`${sized("hello")}TE: chunked\r\n`, "hello"),
    "X-Transfer-Encoding says nothing about the body's length": post(
      `${sized("hello")}X-Transfer-Encoding: chunked\r\n`,
      "hello",
    ),
  }, bodyIs("hello")),
  ...["GET", "HEAD", "OPTIONS", "DELETE", "POST"].flatMap((method): Row[] => [
    {
      name: `CL.0: a request in a body of ${method} by its length is a body`,
      ...carried(sized(SMUGGLED), SMUGGLED, method),
    },
    {
      name: `TE.0: a request in a body of ${method} in chunks is a body`,
      ...carried(CHUNKED, chunk(SMUGGLED) + LAST_CHUNK, method),
    },
  ]),
  ...refused({
    "CL.TE: a body that ends early as chunks": post(
      `Content-Length: ${5 + SMUGGLED.length}\r\n${CHUNKED}`,
      LAST_CHUNK + SMUGGLED,
    ),
    "TE.CL: a body that ends early by its length": post(
      `Content-Length: 4\r\n${CHUNKED}`,
      chunk(SMUGGLED) + LAST_CHUNK,
    ),
    "0.CL: a length behind a bare LF": get(`X: y\nContent-Length: ${SMUGGLED.length}\r\n`) + SMUGGLED,
    "0.CL: a length behind a space": get(` Content-Length: ${SMUGGLED.length}\r\n`) + SMUGGLED,
    "0.CL: a folded length": get(`Content-Length:\r\n ${SMUGGLED.length}\r\n`) + SMUGGLED,
    "a request in a field, behind a bare CR": get(`X: y\r\r${SMUGGLED}`),
    "a request in a target, behind a bare LF": `GET /~row\n${SMUGGLED}`,
  }),
  ...refused({
    "TE.TE: chunked and cow": post(`${CHUNKED}Transfer-Encoding: cow\r\nContent-Length: 5\r\n`, LAST_CHUNK + SMUGGLED),
  }, "400|501 then closed"),
  {
    name: "a body that is longer than its length: the rest belongs to the next request, whose method it changes",
    send: post("Content-Length: 5\r\n", "helloX") + NEXT,
    expect: "200 200 then closed",
    seen: ["POST /~row", "XGET /~row/next"],
    check: bodyIs("hello"),
  },
  {
    name: "a chunk extension with a LF and a size behind it",
    send: post(CHUNKED, `2;\nxx\r\n${(SMUGGLED.length + 5).toString(16)}\r\n${LAST_CHUNK}${SMUGGLED}\r\n${LAST_CHUNK}`),
    expect: "400 then closed",
    seen: 0,
  },
  {
    name: "a body that looks like an answer passes as a body",
    send: [post(sized("HTTP/1.1 200 OK\r\n\r\n"), "HTTP/1.1 200 OK\r\n\r\n"), answered, NEXT],
    expect: "200 200",
    check: bodyIs("HTTP/1.1 200 OK\r\n\r\n"),
  },
];

// ─── Expect ───

const asksFirst = (fields = "", host = "a.test") =>
  `POST /~row HTTP/1.1\r\nHost: ${host}\r\nContent-Length: 2000\r\n${EXPECT}${fields}\r\n`;
const BODY = "b".repeat(2000);
const without100 = interimAre();
const expects: Row[] = [
  {
    name: "Expect: 100-continue gets one 100, and the body passes",
    send: [asksFirst(), answered, BODY, answered, NEXT],
    expect: "200 200",
    check: all(interimAre(100), bodyIs(BODY)),
  },
  {
    name: "Expect: 100-Continue in other letters (R4)",
    send: [post("Content-Length: 5\r\nexpect: 100-CONTINUE\r\n"), answered, "hello"],
    expect: "200",
    check: all(interimAre(100), bodyIs("hello")),
  },
  {
    name: "Expect: 100-Continue as a list of itself",
    send: [
      post("Content-Length: 5\r\nExpect: 100-continue\r\nExpect: 100-Continue, 100-continue\r\n"),
      answered,
      "hello",
    ],
    expect: "200",
    check: all(interimAre(100), bodyIs("hello")),
  },
  {
    name: "Expect: 100-continue with chunks",
    send: [post(`${CHUNKED}${EXPECT}`), answered, chunk("hello") + LAST_CHUNK],
    expect: "200",
    check: all(interimAre(100), bodyIs("hello")),
  },
  {
    name: "Expect: 100-continue with a body that does not wait",
    send: [asksFirst() + BODY, answered, 50, NEXT],
    expect: "200 200",
    check: bodyIs(BODY),
  },
  {
    name: "Expect: 100-continue on a GET without a body",
    send: [get(EXPECT), answered, 50, NEXT],
    expect: "200 200",
  },
  {
    name: "Expect: 100-continue in HTTP/1.0 is not looked at",
    send: `POST /~row HTTP/1.0\r\n${HOST}Content-Length: 5\r\n${EXPECT}\r\nhello`,
    expect: "200 then closed",
    check: all(without100, bodyIs("hello")),
  },
  {
    name: "an Expect that a rule denies gets no 100 (R5)",
    send: asksFirst("", "denied.test"),
    expect: "403",
    check: without100,
  },
  {
    name: "an Expect for a body that is too large gets no 100 (R5)",
    send: asksFirst("", "limit.test"),
    expect: "413",
    check: without100,
  },
  {
    name: "an Expect beyond a rate gets no 100 (R5)",
    send: [`GET /~row HTTP/1.1\r\nHost: rate.test\r\n\r\n`, answered, asksFirst("", "rate.test")],
    expect: "200 429",
    check: without100,
  },
  {
    name: "an Expect that no route has gets no 100 (R5)",
    send: asksFirst("", "nobody.test").replace("/~row", "/none"),
    expect: "404",
    check: without100,
    withoutDefault: true,
  },
  {
    name: "an Expect with a framing that is none gets no 100",
    send: post(`Content-Length: 5\r\n${CHUNKED}${EXPECT}`),
    expect: "400 then closed",
    check: without100,
  },
  {
    name: "what comes behind an Expect that was refused is not a second request",
    send: [asksFirst("", "denied.test"), answered, SMUGGLED.padEnd(2000, "b")],
    expect: "403",
    check: without100,
  },
  ...["200-ok", "y 100-continue", "100-continue, foo", "100-continue=1"].map((expectation): Row => ({
    name: `the unknown Expect ${shown(expectation)} is refused`,
    send: post(`Content-Length: 5\r\nExpect: ${expectation}\r\n`, "hello"),
    expect: "417",
    seen: 0,
    check: without100,
  })),
  {
    name: "an unknown Expect before a request in the body: never two",
    send: post(`${sized(SMUGGLED)}Expect: y 100-continue\r\n`, SMUGGLED),
    expect: "417",
    seen: 0,
  },
];

// ─── HTTP/1.0 ───

const old = (fields = "", method = "GET") => `${method} /~row HTTP/1.0\r\n${fields}\r\n`;
const old10: Row[] = [
  { name: "HTTP/1.0 with Host is closed", send: old(HOST) + NEXT, expect: "200 then closed", seen: 1 },
  { name: "HTTP/1.0 without Host is served (R7)", send: old(), expect: "200 then closed" },
  {
    name: "OPTIONS of HTTP/1.0 without Host, as haproxy probes (R7)",
    send: old("", "OPTIONS"),
    expect: "200 then closed",
  },
  { name: "an empty Host in HTTP/1.0 is none", send: old("Host:\r\n"), expect: "200 then closed or 400 then closed" },
  { name: "POST of HTTP/1.0 without a length has no body", send: old(HOST, "POST"), expect: "200 then closed" },
  {
    name: "POST of HTTP/1.0 with a length",
    send: old(`${HOST}Content-Length: 5\r\n`, "POST") + "hello",
    expect: "200 then closed",
    check: bodyIs("hello"),
  },
  {
    name: "HTTP/1.0 with keep-alive stays, and the answer says so",
    send: [old(`${HOST}Connection: keep-alive\r\n`), answered, NEXT],
    expect: "200 200",
    check: (_seen, { answers }) => assert.match(value(answers[0]!, "connection"), /keep-alive/i),
  },
  {
    name: "HTTP/1.0 with keep-alive in capitals",
    send: [old(`${HOST}Connection: Keep-Alive\r\n`), answered, NEXT],
    expect: "200 200",
  },
  {
    name: "HTTP/1.0 with keep-alive and close is closed",
    send: [old(`${HOST}Connection: keep-alive, close\r\n`), answered, NEXT],
    expect: "200 then closed",
  },
  {
    name: "HTTP/1.0 gets no chunks, but a length or the end of the connection",
    send: old(`${HOST}Connection: keep-alive\r\n`),
    answer: `HTTP/1.1 200 OK\r\n${CHUNKED}\r\n${chunk("hello")}${LAST_CHUNK}`,
    expect: "200",
    check: (_seen, { answers: [one], closed }) => {
      assert.deepEqual([values(one!, "transfer-encoding"), one!.body.toString()], [[], "hello"]);
      assert.ok(closed || value(one!, "content-length") === "5", "the answer's end is in doubt");
    },
  },
  {
    name: "HTTP/1.0 gets no 103",
    send: old(HOST),
    answer: `HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n${answer("hello")}`,
    expect: "200 then closed",
    check: without100,
  },
  {
    name: "an absolute target in HTTP/1.0 without Host",
    send: "GET http://a.test/~row HTTP/1.0\r\n\r\n",
    expect: "200 then closed",
    check: all(targetIs("/~row"), fieldIs("host", ["a.test"])),
  },
  {
    name: "HTTP/1.0 is answered as 1.1, and asked of the server as 1.1",
    send: old(HOST),
    expect: "200 then closed",
    check: ([request], { answers }) => {
      assert.match(answers[0]!.start, /^HTTP\/1\.1 /);
      assert.match(request!.start, / HTTP\/1\.1$/);
    },
  },
];

// ─── Connections ───

const slowly = (ms: number): Script => async (visit, request, count) => {
  await sleep(ms);
  await echo(visit, request, count);
};
const inOrder = (...paths: string[]) => (seen: Seen[], { answers }: Exchange) => {
  const urls = answers.map(({ body }) => (JSON.parse(body.toString()).url as string).replace(/~\d{3}/, "~row"));
  assert.deepEqual(urls, paths);
  assert.deepEqual(seen.map(({ alone }) => alone), paths.map(() => true), "one at a time at the servers");
};
const GET_2 = get("", "/~row/2");
const POST_2 = post(sized("hello"), "hello").replace("/~row", "/~row/2");
const connections: Row[] = [
  { name: "HTTP/1.1 stays open", send: [get(), answered, 100, NEXT], expect: "200 200 then closed" },
  ...["close", "Close", "keep-alive, close", "close, X-A", "close\r\nConnection: keep-alive"].map((value_): Row => ({
    name: `Connection: ${value_.replace("\r\n", " and ")} is the end`,
    send: [get(`Connection: ${value_}\r\n`), answered, NEXT],
    expect: "200 then closed",
    seen: 1,
    check: (_seen, { answers }) => assert.match(value(answers[0]!, "connection"), /close/i),
  })),
  {
    name: "what stands behind a request with Connection: close is not read",
    send: get(CLOSE) + SMUGGLED,
    expect: "200 then closed",
    seen: 1,
  },
  {
    name: "a name that only begins with close",
    send: [get("Connection: closed\r\n"), answered, NEXT],
    expect: "200 200",
  },
  {
    name: "a refusal of what could not be read says that it closes and why",
    send: get("X-A : b\r\n"),
    expect: "400 then closed",
    check: (_seen, { answers: [refusal] }) => {
      assert.match(value(refusal!, "connection"), /close/i);
      assert.notEqual(value(refusal!, "x-lb-failure"), "");
      assert.deepEqual(values(refusal!, "date").length, 1);
    },
  },
  {
    name: "three requests in one packet: in order, one at a time (R15)",
    send: get("", "/~row/1") + GET_2 + get(CLOSE, "/~row/3"),
    answer: slowly(40),
    expect: "200 200 200",
    check: inOrder("/~row/1", "/~row/2", "/~row/3"),
  },
  {
    name: "GET, POST and GET in one packet: in order, one at a time (R15)",
    send: get("", "/~row/1") + POST_2 + get(CLOSE, "/~row/3"),
    answer: slowly(40),
    expect: "200 200 200",
    check: all(inOrder("/~row/1", "/~row/2", "/~row/3"), (seen) => assert.equal(seen[1]!.body.toString(), "hello")),
  },
  {
    name: "POST in chunks and GET in one packet",
    send: post(CHUNKED, chunk("hello") + LAST_CHUNK) + NEXT,
    answer: slowly(40),
    expect: "200 200",
    check: all(inOrder("/~row", "/~row/next"), bodyIs("hello")),
  },
  {
    name: "twelve requests in one packet",
    send: get().repeat(11) + NEXT,
    expect: `${"200 ".repeat(11)}200 then closed`,
  },
  {
    name: "HEAD and GET in one packet",
    send: get().replace("GET", "HEAD") + NEXT,
    methods: ["HEAD"],
    expect: "200 200",
  },
  {
    name: "two requests of which each byte comes by itself",
    send: get() + NEXT,
    byteByByte: true,
    expect: "200 200",
  },
  {
    name: "a request cut within its last line end",
    send: [get().slice(0, -1), 30, "\n", answered, NEXT.slice(0, -3), 30, "\n\r\n"],
    expect: "200 200",
  },
  {
    name: "a request that comes while the first is being answered",
    send: [get(), 30, NEXT],
    answer: slowly(100),
    expect: "200 200",
  },
  {
    name: "a valid request and then garbage: its answer, then 400 (R16)",
    send: `${get()}garbage\r\n\r\n`,
    expect: "200 400 then closed",
  },
  {
    name: "a valid request that takes its time and then garbage: its answer, then 400",
    send: `${get()}GET /~row\r\n\r\n`,
    answer: slowly(100),
    expect: "200 400 then closed",
  },
  {
    name: "a valid POST and then a request without Host: its answer, then 400",
    send: post(sized("hello"), "hello") + "GET /~row HTTP/1.1\r\n\r\n",
    expect: "200 400 then closed",
  },
  {
    name: "an empty line between two requests (R12)",
    send: `${get()}\r\n${NEXT}`,
    expect: "200 200",
  },
  {
    name: "a refusal by a rule leaves the connection open",
    send: [`GET /~row HTTP/1.1\r\nHost: denied.test\r\n\r\n`, answered, NEXT],
    expect: "403 200",
  },
  {
    name: "a refusal by a rule of a request with a body: the body is no request",
    send: [
      `POST /~row HTTP/1.1\r\nHost: denied.test\r\n${sized(SMUGGLED)}\r\n${SMUGGLED}`,
      answered,
      NEXT,
    ],
    expect: "403 200 or 403 then closed",
  },
  {
    name: "a request that no route has, and the next",
    send: [get("", "/none"), answered, get(CLOSE, "/none")],
    expect: "404 404",
    withoutDefault: true,
  },
  { name: "a half-closed client gets its answer (R19)", send: [get(), halfClose], expect: "200 then closed" },
  {
    name: "a half-closed client gets an answer that takes its time (R19)",
    send: [get(), halfClose],
    answer: slowly(200),
    expect: "200 then closed",
  },
  {
    name: "a half-closed client with Connection: close (R19)",
    send: [get(CLOSE), halfClose],
    expect: "200 then closed",
  },
  {
    name: "a half-closed client with a body",
    send: [post(sized("hello"), "hello"), halfClose],
    expect: "200 then closed",
    check: bodyIs("hello"),
  },
  {
    name: "a half-closed client with two requests gets two answers",
    send: [get() + get("", "/~row/2"), halfClose],
    expect: "200 200 then closed",
  },
  {
    name: "a half-closed client in the middle of a head",
    send: ["GET /~row HTTP/1.1\r\nHo", halfClose],
    expect: "400|408 then closed or closes",
  },
];

// ─── Bodies of any method ───

const anyBody: Row[] = ["GET", "HEAD", "DELETE", "OPTIONS", "PROPFIND"].flatMap((method): Row[] => [
  {
    name: `${method} with a body by its length: the body passes (R6)`,
    send: [`${method} /~row HTTP/1.1\r\n${HOST}${sized("hello")}\r\nhello`, answered, NEXT],
    methods: [method],
    expect: "200 200",
    check: all(bodyIs("hello"), fieldIs("content-length", ["5"])),
  },
  {
    name: `${method} with a body in chunks: the body passes`,
    send: [`${method} /~row HTTP/1.1\r\n${HOST}${CHUNKED}\r\n${chunk("hello")}${LAST_CHUNK}`, answered, NEXT],
    methods: [method],
    expect: "200 200",
    check: bodyIs("hello"),
  },
]);

// ─── Upgrade ───

const upgrade = (to: string, fields = "", method = "GET") =>
  `${method} /~row HTTP/1.1\r\n${HOST}Connection: Upgrade\r\nUpgrade: ${to}\r\n${fields}\r\n`;
const H2C = "HTTP2-Settings: AAMAAABkAAQAAP__\r\n";
const notUpgraded = ([request]: Seen[]) =>
  assert.deepEqual([values(request!, "upgrade"), values(request!, "http2-settings")], [[], []]);
/** Switches to bytes, and echoes them in capitals. */
const tunnel = (to: string): Script => async ({ socket, ...visit }: Visit) => {
  socket.on(
    "data",
    (bytes: Buffer) => socket.write(bytes.map((byte) => byte >= 0x61 && byte <= 0x7a ? byte - 32 : byte)),
  );
  await visit.send(`HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: ${to}\r\nX-Own: 1\r\n\r\n`);
};
const tunnelled = (to: string, fields: string, method: string): Omit<Row, "name"> => ({
  send: [upgrade(to, fields, method), answered, "hello\x00\xff", answered, "again\n", answered],
  answer: tunnel(to),
  expect: "101",
  check: ([request], { answers: [switched], bytes }) => {
    assert.deepEqual([value(request!, "upgrade"), value(request!, "connection").toLowerCase()], [to, "upgrade"]);
    assert.deepEqual([value(switched!, "upgrade"), value(switched!, "x-own")], [to, "1"]);
    assert.match(bytes.toString("latin1"), /\r\n\r\nHELLO\x00\xffAGAIN\n$/);
  },
});
const refusedUpgrade = (to: string, fields = ""): Omit<Row, "name"> => ({
  send: upgrade(to, fields) + SMUGGLED,
  expect: "200",
  seen: 1,
});
const HANDSHAKE = "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
const upgrades: Row[] = [
  ...served({
    "h2c (R2)": upgrade("h2c", H2C),
    "h2c with Content-Length: 0 (R2)": upgrade("h2c", `${H2C}Content-Length: 0\r\n`),
    "h2c with a longer Connection, as the JDK sends it (R2)": get(
      `Connection: Upgrade, HTTP2-Settings\r\nContent-Length: 0\r\n${H2C}Upgrade: h2c\r\n`,
    ),
  }, notUpgraded),
  ...served({
    "h2c with a body (R2)": upgrade("h2c", `${H2C}${sized("hello")}`, "POST") + "hello",
    "h2c with a body in chunks (R2)": upgrade("h2c", `${H2C}${CHUNKED}`, "POST") + chunk("hello") + LAST_CHUNK,
  }, all(notUpgraded, bodyIs("hello"))),
  ...served({ "Upgrade that Connection does not name": get("Upgrade: tcp\r\n") }, fieldIs("upgrade", [])),
  {
    name: "Upgrade in HTTP/1.0 is not looked at",
    send: upgrade("tcp").replace("HTTP/1.1", "HTTP/1.0"),
    expect: "200 then closed",
    check: fieldIs("upgrade", []),
  },
  { name: "Upgrade: tcp of a POST is a tunnel, as docker attach wants it (R18)", ...tunnelled("tcp", "", "POST") },
  { name: "Upgrade: tcp of a POST with Content-Length: 0 (R18)", ...tunnelled("tcp", "Content-Length: 0\r\n", "POST") },
  { name: "Upgrade: SPDY/3.1 is a tunnel, as kubectl exec wants it (R18)", ...tunnelled("SPDY/3.1", "", "POST") },
  { name: "Upgrade: foo of a GET is a tunnel (R18)", ...tunnelled("foo", "", "GET") },
  { name: "an upgrade that the server refuses, with a request behind it", ...refusedUpgrade("foo") },
  { name: "an upgrade to tcp that the server refuses, with a request behind it", ...refusedUpgrade("tcp") },
  { name: "a WebSocket that the server refuses, with a request behind it", ...refusedUpgrade("websocket", HANDSHAKE) },
  {
    name: "an upgrade that the server refuses by 404, with a request behind it",
    ...refusedUpgrade("tcp"),
    answer: answer("", "", "404 Not Found").toString(),
    expect: "404",
  },
  {
    name: "an upgrade that a rule refuses, with a request behind it",
    send: upgrade("tcp").replace("a.test", "denied.test") + SMUGGLED,
    expect: "403",
    seen: 0,
  },
  {
    name: "a WebSocket with Content-Length: 0, as the JDK asks for it (R3)",
    send: upgrade("websocket", `${HANDSHAKE}Content-Length: 0\r\n`),
    answer:
      "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n",
    expect: "101",
  },
];

// ─── What clients get ───

const OK = "HTTP/1.1 200 OK\r\n";
const LENGTH_5 = "Content-Length: 5\r\n";
/** Sends this, and ends the connection. */
const last = (bytes: string): Script => async (visit) => {
  await visit.send(bytes);
  visit.socket.end();
};
const first = (check: (answer: Message, exchange: Exchange) => unknown): Check => (_seen, exchange) =>
  check(exchange.answers[0]!, exchange);
const answerIs = (body: string) => first((one) => assert.equal(one.body.toString("latin1"), body));
const MEGABYTE = "m".repeat(1_000_000);
const head = (fields = "") => get(fields).replace("GET", "HEAD");
const dates = (...expected: number[]) => (_seen: Seen[], { answers }: Exchange) =>
  assert.deepEqual(answers.map((one) => values(one, "date").length), expected);
const framing: Row[] = [
  {
    name: "HEAD has the head of GET and no body",
    send: [head(), answered, NEXT],
    methods: ["HEAD"],
    answer: (visit, request) =>
      visit.send(request.start.startsWith("HEAD") ? `${OK}${LENGTH_5}X-A: b\r\n\r\n` : answer("hello")),
    expect: "200 200",
    check: first((one) => assert.deepEqual([value(one, "content-length"), value(one, "x-a")], ["5", "b"])),
  },
  {
    name: "HEAD of what would be in chunks",
    send: [head(), answered, NEXT],
    methods: ["HEAD"],
    answer: (visit, request) => visit.send(request.start.startsWith("HEAD") ? `${OK}${CHUNKED}\r\n` : answer("hello")),
    expect: "200 200",
  },
  {
    name: "HEAD that we refuse ourselves has no body",
    send: [head().replace("a.test", "denied.test"), answered, NEXT],
    methods: ["HEAD"],
    expect: "403 200",
  },
  ...["204 No Content", "304 Not Modified"].flatMap((line): Row[] => [
    {
      name: `${line} has no body`,
      send: [get(), answered, NEXT],
      answer: (visit, request) =>
        visit.send(request.start.includes("next") ? answer("hello") : `HTTP/1.1 ${line}\r\nETag: "a"\r\n\r\n`),
      expect: `${line.slice(0, 3)} 200`,
      check: first((one) => {
        assert.deepEqual([values(one, "transfer-encoding"), value(one, "etag")], [[], '"a"']);
        if (status(one) === 204) assert.deepEqual(values(one, "content-length"), []);
      }),
    },
    {
      name: `${line} with bytes behind it: they are nobody's`,
      send: [get(), answered, NEXT],
      answer: (visit, request) =>
        visit.send(request.start.includes("next") ? answer("next") : `HTTP/1.1 ${line}\r\n\r\n${answer("evil")}`),
      expect: `${line.slice(0, 3)} 200`,
      check: (_seen, { answers }) => assert.equal(answers[1]!.body.toString(), "next"),
    },
  ]),
  {
    name: "304 keeps the length that 200 would have",
    send: [get(), answered, NEXT],
    answer: (visit, request) =>
      visit.send(request.start.includes("next") ? answer("next") : `HTTP/1.1 304 Not Modified\r\n${LENGTH_5}\r\n`),
    expect: "304 200",
  },
  {
    name: "205 has no body",
    send: [get(), answered, NEXT],
    answer: (visit, request) =>
      visit.send(
        request.start.includes("next") ? answer("next") : "HTTP/1.1 205 Reset Content\r\nContent-Length: 0\r\n\r\n",
      ),
    expect: "205 200",
    check: answerIs(""),
  },
  {
    name: "a Content-Length of 1 MB stays (A6)",
    send: [get(), answered, 300, NEXT],
    answer: (visit) => visit.send(answer(MEGABYTE)),
    expect: "200 200",
    check: first((one) => {
      assert.deepEqual([values(one, "content-length"), values(one, "transfer-encoding")], [["1000000"], []]);
      assert.ok(one.body.equals(Buffer.from(MEGABYTE)));
    }),
  },
  {
    name: "a Content-Length of a request of 1 MB stays (A6)",
    send: [post(sized(MEGABYTE)), MEGABYTE, answered, NEXT],
    expect: "200 200",
    check: ([request]) => {
      assert.deepEqual([values(request!, "content-length"), values(request!, "transfer-encoding")], [["1000000"], []]);
      assert.ok(request!.body.equals(Buffer.from(MEGABYTE)));
    },
  },
  {
    name: "a Content-Length of 0 stays",
    send: [get(), answered, NEXT],
    answer: `${OK}Content-Length: 0\r\n\r\n`,
    expect: "200 200",
    check: first((one) => assert.deepEqual(values(one, "content-length"), ["0"])),
  },
  {
    name: "chunks come as chunks",
    send: [get(), answered, NEXT],
    answer: `${OK}${CHUNKED}\r\n${chunk("he")}3;a="b"\r\nllo\r\n${LAST_CHUNK}`,
    expect: "200 200",
    check: answerIs("hello"),
  },
  {
    name: "an answer that ends with its connection",
    send: get(),
    answer: last(`${OK}X-A: b\r\n\r\nhello`),
    expect: "200",
    check: answerIs("hello"),
  },
  {
    name: "an answer of HTTP/1.0 that ends with its connection",
    send: get(),
    answer: last("HTTP/1.0 200 OK\r\n\r\nhello"),
    expect: "200",
    check: all(first((one) => assert.match(one.start, /^HTTP\/1\.1 /)), answerIs("hello")),
  },
  {
    name: "an answer without Date gets one",
    send: get(),
    expect: "200",
    check: all(dates(1), first((one) => assert.ok(Math.abs(Date.parse(value(one, "date")) - Date.now()) < 60_000))),
  },
  {
    name: "the Date of a server stays",
    send: get(),
    answer: answer("hello", "Date: Tue, 15 Nov 1994 08:12:31 GMT\r\n").toString(),
    expect: "200",
    check: all(dates(1), first((one) => assert.equal(value(one, "date"), "Tue, 15 Nov 1994 08:12:31 GMT"))),
  },
  {
    name: "a refusal by a rule has a Date",
    send: get().replace("a.test", "denied.test"),
    expect: "403",
    check: dates(1),
  },
  {
    name: "a refusal of a target that is too long has a Date",
    send: get("", "/~row".padEnd(17_000, "a")),
    expect: "414",
    check: dates(1),
  },
  { name: "a refusal of a head that is too large has a Date", send: get(many(2000)), expect: "431", check: dates(1) },
  { name: "an answer to HEAD has a Date", send: head(), methods: ["HEAD"], expect: "200", check: dates(1) },
  {
    name: "an answer that is our 502 has a Date",
    send: get(),
    answer: "garbage\r\n\r\n",
    expect: "502",
    seen: 1,
    check: dates(1),
  },
];

// ─── Answers of servers ───

const bad = (cases: Named): Row[] =>
  rows(cases, (bytes) => ({ send: get(), answer: last(bytes), expect: "502", seen: 1 }));
const broken = (cases: Named): Row[] =>
  rows(cases, (bytes) => ({ send: get(), answer: last(bytes), expect: "cut then closed or 502", seen: 1 }));
const IN_CHUNKS = `${OK}${CHUNKED}\r\n`;
const answers: Row[] = [
  ...bad({
    "a status of two digits": "HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n",
    "a status of four digits": "HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n",
    "a status that is no number": "HTTP/1.1 2x0 OK\r\nContent-Length: 0\r\n\r\n",
    "the status 099": "HTTP/1.1 099 OK\r\nContent-Length: 0\r\n\r\n",
    "no status": "HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
    "two spaces before the status": "HTTP/1.1  200 OK\r\nContent-Length: 0\r\n\r\n",
    "HTTP/2.0 in a status line": "HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    "http in small letters in a status line": "http/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "another protocol in a status line": "ICY 200 OK\r\nContent-Length: 0\r\n\r\n",
    "no status line at all": "<html>hello</html>\r\n\r\n",
    "a NUL in a reason phrase": "HTTP/1.1 200 O\0K\r\nContent-Length: 0\r\n\r\n",
    "lines of an answer ended by LF alone": "HTTP/1.1 200 OK\nContent-Length: 5\n\nhello",
    "a field of an answer ended by LF alone": `${OK}X-A: b\nContent-Length: 5\r\n\r\nhello`,
    "two lengths of an answer": `${OK}Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello`,
    "two equal lengths of an answer": `${OK}${LENGTH_5}${LENGTH_5}\r\nhello`,
    "a list of lengths of an answer": `${OK}Content-Length: 5, 5\r\n\r\nhello`,
    "an answer's length of +5": `${OK}Content-Length: +5\r\n\r\nhello`,
    "Content-Length and Transfer-Encoding in an answer": `${OK}${LENGTH_5}${CHUNKED}\r\n${chunk("hello")}${LAST_CHUNK}`,
    "an unknown coding of an answer": `${OK}Transfer-Encoding: gzip, chunked\r\n\r\n${LAST_CHUNK}`,
    "a field of an answer without a colon": `${OK}X-A\r\n${LENGTH_5}\r\nhello`,
    "a field of an answer without a name": `${OK}: a\r\n${LENGTH_5}\r\nhello`,
    "a space before a colon in an answer": `${OK}X-A : b\r\n${LENGTH_5}\r\nhello`,
    "a folded field in an answer": `${OK}X-A: a\r\n b\r\n${LENGTH_5}\r\nhello`,
    "a NUL in an answer": `${OK}X-A: a\0\r\n${LENGTH_5}\r\nhello`,
    "a bare CR in an answer": `${OK}X-A: a\rb\r\n${LENGTH_5}\r\nhello`,
    "a 101 that nobody asked for": "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: foo\r\n\r\n",
    "a head of an answer of 1 MB": `${OK}X-A: ${MEGABYTE}\r\n${LENGTH_5}\r\nhello`,
    "no answer at all": "",
    "half a head": `${OK}X-A`,
    "only a 103": "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n",
  }),
  ...broken({
    "an answer's chunk size that is no number": `${IN_CHUNKS}${chunk("hello")}zz\r\nhello\r\n${LAST_CHUNK}`,
    "an answer's chunk size of -5": `${IN_CHUNKS}${chunk("hello")}-5\r\nhello\r\n${LAST_CHUNK}`,
    "an answer's chunk size that ends in LF": `${IN_CHUNKS}${chunk("hello")}5\nhello\r\n${LAST_CHUNK}`,
    "an answer's chunk that is too long": `${IN_CHUNKS}${chunk("hello")}5\r\nhello!\r\n${LAST_CHUNK}`,
    "an answer's chunks without a last one": `${IN_CHUNKS}${chunk("hello")}`,
    "an answer's trailer without a colon": `${IN_CHUNKS}${chunk("hello")}0\r\nX-A\r\n\r\n`,
    "an answer that is shorter than its length": `${OK}Content-Length: 10\r\n\r\nhello`,
  }),
  {
    name: "103 Early Hints passes (A2)",
    send: get(),
    answer: `HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n${answer("hello")}`,
    expect: "200",
    check: all(interimAre(103), answerIs("hello"), (_seen, { interim }) => {
      assert.equal(value(interim[0]!, "link"), "</a.css>; rel=preload");
    }),
  },
  {
    name: "a 100 that nobody asked for is not the answer",
    send: get(),
    answer: `HTTP/1.1 100 Continue\r\n\r\n${answer("hello")}`,
    expect: "200",
    check: answerIs("hello"),
  },
  ...Object.entries({
    "200 Fine By Me": "an own reason phrase (A2)",
    "200 caf\xe9 \xc3\xa9": "bytes above 0x7f in a reason phrase",
    "999 Request Denied": "the status 999 (A2)",
    "299 Own": "a status of the server's own",
    "418 I'm a teapot": "the status 418",
    "600 Beyond": "the status 600",
  }).map(([line, name]): Row => ({
    name: `${name} passes`,
    send: [get(), answered, NEXT],
    answer: Buffer.concat([Buffer.from(`HTTP/1.1 ${line}\r\n${LENGTH_5}\r\nhello`, "latin1")]).toString("latin1"),
    expect: `${line.slice(0, 3)} ${line.slice(0, 3)}`,
    seen: 2,
    check: all(first((one) => assert.equal(one.start, `HTTP/1.1 ${line}`)), answerIs("hello")),
  })),
  {
    name: "a status line without a reason phrase",
    send: get(),
    answer: `HTTP/1.1 200\r\n${LENGTH_5}\r\nhello`,
    expect: "200",
    check: answerIs("hello"),
  },
  {
    name: "trailers of an answer pass (A2)",
    send: [get("TE: trailers\r\n"), answered, NEXT],
    answer: `${OK}Trailer: X-Sum\r\n${CHUNKED}\r\n${chunk("hello")}0\r\nX-Sum: abc\r\n\r\n`,
    expect: "200 200",
    check: first((one, { bytes }) => {
      assert.equal(one.body.toString(), "hello");
      assert.match(bytes.toString("latin1"), /\r\n0\r\nX-Sum: abc\r\n\r\n/);
    }),
  },
  {
    name: "several fields of one name stay several, spelled as sent",
    send: get(),
    answer: answer(
      "hello",
      "X-a: 1\r\nx-A: 2\r\nVary: b\r\nX-a: 3\r\nSet-Cookie: a=1; Expires=Wed, 1 Jan\r\nset-cookie: b\r\n",
    )
      .toString(),
    expect: "200",
    check: first((one) =>
      assert.deepEqual(one.headers.filter(([name]) => /^(x-a|vary|set-cookie)$/i.test(name)), [
        ["X-a", "1"],
        ["x-A", "2"],
        ["Vary", "b"],
        ["X-a", "3"],
        ["Set-Cookie", "a=1; Expires=Wed, 1 Jan"],
        ["set-cookie", "b"],
      ])
    ),
  },
  {
    name: "bytes above 0x7f in a field of an answer pass as sent",
    send: get(),
    answer: `${OK}X-A: caf\xe9 \xc3\xa9\x80\xff\r\n${LENGTH_5}\r\nhello`,
    expect: "200",
    check: first((one) => assert.equal(value(one, "x-a"), "caf\xe9 \xc3\xa9\x80\xff")),
  },
  {
    name: "an empty Content-Type passes once (A5)",
    send: get(),
    answer: `${OK}Content-Type:\r\n${LENGTH_5}\r\nhello`,
    expect: "200",
    check: first((one) => assert.deepEqual(values(one, "content-type"), [""])),
  },
  {
    name: "no Content-Type is made up",
    send: get(),
    answer: `${OK}${LENGTH_5}\r\nhello`,
    expect: "200",
    check: first((one) => assert.deepEqual(values(one, "content-type"), [])),
  },
  {
    name: "fields of an answer for one hop end here",
    send: get(),
    answer:
      `${OK}Connection: keep-alive, X-Secret\r\nX-Secret: 1\r\nKeep-Alive: timeout=9\r\nUpgrade: h2c\r\n${LENGTH_5}\r\nhello`,
    expect: "200",
    check: first((one) => assert.deepEqual(["x-secret", "upgrade"].flatMap((name) => values(one, name)), [])),
  },
  {
    name: "Connection: close of a server does not close the client's connection",
    send: [get(), answered, NEXT],
    answer: last(answer("hello", CLOSE).toString()),
    expect: "200 200",
  },
  {
    name: "more bytes behind an answer are not the next answer",
    send: [get(), answered, NEXT],
    answer: (visit, request) =>
      visit.send(request.start.includes("next") ? answer("next") : answer("first").toString() + answer("evil")),
    expect: "200 200",
    check: (_seen, { answers }) => assert.deepEqual(answers.map(({ body }) => body.toString()), ["first", "next"]),
  },
  {
    name: "a 413 while 20 MB are still on their way, from a server that closes, reaches the client (A1)",
    send: [
      `POST /~row HTTP/1.1\r\nHost: early.test\r\nContent-Length: 20000000\r\n\r\n`,
      Buffer.alloc(20_000_000, "u"),
    ],
    answer: async ({ socket, ...visit }) => {
      socket.pause();
      await visit.send(answer("too much", CLOSE, "413 Content Too Large"));
      await sleep(100);
      socket.destroy();
    },
    expect: "413",
    seen: 1,
    check: answerIs("too much"),
  },
  {
    name: "a 401 while a body is held back reaches the client (A1)",
    send: [`POST /~row HTTP/1.1\r\nHost: early.test\r\nContent-Length: 200000\r\n\r\n`, "u".repeat(100_000)],
    answer: answer("who are you", "", "401 Unauthorized").toString(),
    expect: "401",
    seen: 1,
    check: answerIs("who are you"),
  },
];

export const GROUPS: Record<string, Row[]> = {
  "request line": requestLine,
  "version": versions,
  "method": methods,
  "target": targets,
  "Host": hosts,
  "fields": fields,
  "limits": limits,
  "Content-Length": lengths,
  "Transfer-Encoding": transferEncodings,
  "chunks": chunks,
  "smuggling": smuggling,
  "Expect": expects,
  "HTTP/1.0": old10,
  "connection": connections,
  "body": anyBody,
  "upgrade": upgrades,
  "answer": framing,
  "server": answers,
};
export const ROWS: (Row & { title: string })[] = Object.entries(GROUPS).flatMap(([group, rows]) =>
  rows.map((row) => ({ ...row, title: `${group}: ${row.name.slice(0, 100)}: ${row.expect}` }))
);

// ─── Servers ───

export interface Servers {
  /** Answers when it has a request, the other one when it has a head. */
  usual: ScriptedServer;
  early: ScriptedServer;
  /** What they have seen, by the number of the row. */
  seen: Map<number, Seen[]>;
  /** What belongs to no row. */
  strays: string[];
}

export async function startServers(): Promise<Servers> {
  const seen = new Map<number, Seen[]>();
  const strays: string[] = [];
  const unanswered = new Map<number, number>();
  const read = new WeakMap<Visit, number>(); // bytes of a connection that belong to requests before
  const attend: Script = async (visit, request, count) => {
    const raw = visit.received.slice(read.get(visit) ?? 0);
    read.set(visit, visit.received.length);
    const mark = /~(\d{3})/.exec(request.start) ?? /~(\d{3})/.exec(raw);
    const row = Number(mark?.[1] ?? -1);
    const waiting = unanswered.get(row) ?? 0;
    if (!ROWS[row]) strays.push(raw.slice(0, 300));
    seen.set(row, [...seen.get(row) ?? [], { ...request, raw, alone: waiting === 0 }]);
    unanswered.set(row, waiting + 1);
    const given = ROWS[row]?.answer ?? echo;
    await (typeof given === "string" ? visit.send(given) : given(visit, request, count));
    unanswered.set(row, (unanswered.get(row) ?? 1) - 1);
  };
  const [usual, early] = await Promise.all([scriptedServer(attend), scriptedServer(attend)]);
  early.at = "head";
  return { usual, early, seen, strays };
}

export const configFor = ({ usual, early }: Servers, withDefault: boolean) => ({
  log: "off",
  limits: { header: "2s", keep_alive: "2s" },
  // Nothing is left out or asked twice after a failure: every row finds the servers as good as new.
  defaults: {
    health: "off",
    eject: "off",
    retries: 0,
    timeouts: { connect: "3s", response: "5s", idle: "3s" },
  },
  services: { usual: { servers: [usual.address] } },
  routes: [
    { host: "denied.test", service: "usual", allow: ["203.0.113.9"] },
    { host: "limit.test", service: "usual", body_limit: 1000 },
    { host: "rate.test", service: "usual", rate: { requests: 1, per: "1h" } },
    { host: "early.test", servers: [early.address] },
    { path: { regex: "^/~[0-9][0-9][0-9]" }, service: "usual" },
  ],
  ...withDefault && { default: { service: "usual" } },
});

// ─── Playing a row ───

const wordsOf = (expected: string) => expected.replace(/ then (closed|open)$/, "").split(" ");

/** Notes how many final answers have begun to arrive, and whether the connection is over. */
function observe(): { listen: Part; enough: (expect: string, patience: number) => Part } {
  let [count, tail, over] = [0, "", false];
  const listen = (socket: Socket) => {
    socket.on("data", (bytes: Buffer) => {
      const text = tail + bytes.toString("latin1");
      count += text.match(/HTTP\/1\.1 (?:101|[2-9]\d\d)/g)?.length ?? 0;
      tail = text.slice(-11);
    });
    const ended = () => void (over = true);
    socket.on("end", ended).on("close", ended).on("error", ended);
  };
  const enough = (expect: string, patience: number) => async () => {
    const expectations = expect.split(" or ");
    const most = Math.max(...expectations.map((one) => one.startsWith("closes") ? 0 : wordsOf(one).length));
    for (const end = Date.now() + patience; !over && (count < most || most === 0) && Date.now() < end;) await sleep(5);
    if (!expect.includes("closed")) return;
    for (const end = Date.now() + 1000; !over && Date.now() < end;) await sleep(5);
  };
  return { listen, enough };
}

/** What came back, in the words of `Row.expect`; of a tunnel only that it is one. */
function verdict({ answers, closed }: Exchange): string {
  const tunnel = answers.findIndex((one) => status(one) === 101);
  const whole = tunnel < 0 ? answers : answers.slice(0, tunnel + 1);
  const words = whole.map((one) => {
    if (status(one) === 200 && !one.complete) return "cut";
    return one.complete ? `${status(one)}` : `${one.start.slice(0, 40)} (incomplete)`;
  });
  if (words.length === 0) return closed ? "closes" : "nothing";
  return `${words.join(" ")} then ${closed ? "closed" : "open"}`;
}

function fits(expected: string, got: string): boolean {
  return expected.split(" or ").some((one) => {
    const [, ending] = / then (closed|open)$/.exec(one) ?? [];
    if (one === "closes" || got === "closes") return one === got;
    if (ending && !got.endsWith(` then ${ending}`)) return false;
    const [wanted, given] = [wordsOf(one), wordsOf(got)];
    return wanted.length === given.length && wanted.every((word, i) => word.split("|").includes(given[i]!));
  });
}

/** What holds for every request that a server gets. */
function checkForwarded(request: Seen): void {
  assert.match(request.start, /^[!-~]+ [^\x00-\x20\x7f]+ HTTP\/1\.1$/);
  assert.notEqual(value(request, "x-forwarded-for"), "", "bytes passed by without being forwarded");
  assert.equal(values(request, "host").length, 1);
  const [lengths, encodings] = [values(request, "content-length"), values(request, "transfer-encoding")];
  assert.ok(lengths.length + encodings.length <= 1, "the body's end is in doubt");
  assert.doesNotMatch(request.raw.slice(0, request.raw.indexOf("\r\n\r\n")).replaceAll("\r\n", ""), /[\r\n\0]/);
}

export async function judge(port: number, servers: Servers, row: Row, number: number): Promise<void> {
  const mark = `~${`${number}`.padStart(3, "0")}`;
  const marked = (text: string) => text.replaceAll("~row", mark);
  const inParts = (text: string): Part[] => row.byteByByte ? [...text].flatMap((byte) => [byte, 1]) : [text];
  const parts = [row.send].flat().flatMap((part) => typeof part === "string" ? inParts(marked(part)) : [part]);
  const { listen, enough } = observe();
  const patience = row.patience ?? 4000;
  const exchange = await rawRequest(port, [listen, ...parts, enough(row.expect, patience)], {
    methods: row.methods ?? [],
    quiet: 200,
    atMost: 500,
  });
  const got = verdict(exchange);
  const seen = servers.seen.get(number) ?? [];
  const lines = seen.map(({ start }) => start.split(" ").slice(0, 2).join(" "));
  const asked = lines.length ? `, and the servers saw ${lines.join(", ").slice(0, 200)}` : "";
  assert.ok(fits(row.expect, got), `expected ${row.expect}, got ${got}${asked}`);
  const expected = row.seen ?? exchange.answers.filter((one) => status(one) < 400).length;
  if (Array.isArray(expected)) assert.deepEqual(lines, expected.map(marked), "what the servers saw");
  else if (expected >= 0) assert.equal(lines.length, expected, `the servers saw ${lines.join(", ") || "nothing"}`);
  for (const request of seen) checkForwarded(request);
  await row.check?.(seen, exchange);
}

const AT_ONCE = 24;

/** Plays all rows, many at once; tells of each whether it failed. Those without a default service come last. */
export async function judgeAll(
  program: Pick<Program, "port" | "reload">,
  servers: Servers,
  report: (number: number, failure: unknown) => void,
): Promise<void> {
  const play = async (numbers: number[]) => {
    const left = numbers.values();
    const worker = async () => {
      for (const number of left) {
        const failure = await judge(program.port, servers, ROWS[number]!, number).then(
          () => undefined,
          (error) => error,
        );
        report(number, failure);
      }
    };
    await Promise.all(Array.from({ length: AT_ONCE }, worker));
  };
  const numbers = ROWS.map((_, i) => i);
  const slowFirst = numbers.toSorted((a, b) => (ROWS[b]!.patience ?? 0) - (ROWS[a]!.patience ?? 0));
  await play(slowFirst.filter((number) => !ROWS[number]!.withoutDefault));
  await program.reload(configFor(servers, false));
  await play(numbers.filter((number) => ROWS[number]!.withoutDefault));
}

// ─── Tests ───

let servers: Servers;
let program: Program;
let finished: Promise<void> = Promise.resolve();
const outcomes = ROWS.map(() => Promise.withResolvers<unknown>());

before(async () => {
  servers = await startServers();
  program = await startProgram(configFor(servers, true));
  finished = judgeAll(program, servers, (number, failure) => outcomes[number]!.resolve(failure)).catch((error) => {
    for (const { resolve } of outcomes) resolve(error);
  });
});
after(async () => {
  await finished;
  await program?.stop();
  await Promise.all([servers?.usual.close(), servers?.early.close()]);
});

for (const [number, { title }] of ROWS.entries()) {
  test(title, { timeout: 60_000 }, async () => {
    const failure = await outcomes[number]!.promise;
    if (failure) throw failure;
  });
}

test("no bytes reached a server that belong to no row, and the program is well", { timeout: 60_000 }, async () => {
  await finished;
  assert.deepEqual(servers.strays, []);
  await judge(program.port, servers, { name: "", send: get(CLOSE), expect: "200 then closed" }, ROWS.length);
  assert.deepEqual(program.output().split("\n").filter((line) => /panicked|unhandled|uncaught|^ +at /i.test(line)), []);
});
