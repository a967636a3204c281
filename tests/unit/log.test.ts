// What is written down: a line for each request in one of two formats, what is never in it, which requests have one, the
// trace that a request belongs to, and what the operator is told.

import assert from "node:assert/strict";
import { createLoadBalancer, type Failure, parseConfig } from "../../lb.ts";
import { type Ask, balancerFor } from "../rig/balancer.ts";
import { seeded, test, TestBytes } from "../rig/rig.ts";

/** A balancer over a and b whose attempts meet a status, or a failure, in turn: connected after 1 ms, a head after 10. */
function setUp(top: string, manners: (number | Failure)[] = [200], random = () => 0.5) {
  const asked: Record<string, string>[] = [];
  let turn = 0;
  const { lb, clock, lines, reports, send } = balancerFor(`${top}\n${TWO}`, {
    random,
    date: () => new Date(Date.UTC(2026, 10, 21, 3, 14, 42, 7)),
    sleep: (_ms, signal) => signal ? new Promise<void>(() => {}) : Promise.resolve(),
    send(attempt) {
      const { lines } = attempt;
      asked.push(Object.fromEntries(lines.split("\r\n").slice(0, -1).map((line) => line.split(": "))));
      const manner = manners[Math.min(turn++, manners.length - 1)]!;
      if (typeof manner === "string") return attempt.onEnd(manner, "no", manner !== "connect");
      attempt.connectedAt = clock.now += 1;
      clock.now += 9.1234;
      attempt.received = 6;
      attempt.onHead({ status: manner, reason: "", fields: [], body: new TestBytes("") });
      attempt.onEnd(undefined, "", true);
    },
  });
  clock.now = 1_000;
  const ask = async (url?: string, init?: Ask) => {
    const { status } = await send(url, init);
    clock.now += 0.5;
    return status;
  };
  return { lb, ask, lines, reports, asked };
}
const TWO = "default: { servers: [a:1, b:1], health: off, eject: off }";
const EVIL = { "user-agent": 'a"b\\c\t\x9bé', "referer": "http://r.test/\t." };
/** No request may have these. */
const WORSE = { "user-agent": 'a"b\\c\x1b[31m\x7f\x9bé', "referer": "http://r.test/\x0b" };
const TRUSTED = { address: "10.1.2.3" };

// ─── The formats ───

test("combined is Apache's line, and behind it who was asked, when what happened, and the names of the request", async () => {
  const { ask, lines, asked } = setUp("log: combined", ["connect", 200, 200]);
  await ask("http://h.test/a%22b?q=%0a", { headers: { ...EVIL } });
  await ask("http://h.test/", { from: { address: "2001:db8::1" }, headers: { host: "a@b" } });
  await ask("http://h.test/", { headers: { ...WORSE } });
  const [{ "x-request-id": id, traceparent }] = asked as [Record<string, string>];
  const trace = traceparent!.split("-")[1];
  assert.deepEqual(lines[0]!.split(" default "), [
    '192.0.2.9 - - [21/Nov/2026:03:14:42 +0000] "GET /a%22b?q=%0a HTTP/1.1" 200 6 "http://r.test/\\x09." "a\\x22b\\x5cc\\x09\\x9b\\xe9"',
    `b:1 2 1.000/10.123/10.123 - ${id} ${trace}`,
  ]);
  assert.match(
    lines[1]!,
    /^2001:db8::1 - - \[.*\] "GET \/ HTTP\/1\.1" 400 45 "-" "-" - - 0 -\/-\/0.000 bad-host \S+ [0-9a-f]{32}$/,
  );
  const [, worse] = lines[2]!.split(" HTTP/1.1");
  assert.match(worse!, /^" 400 \d+ "http:\/\/r\.test\/\\x0b" "a\\x22b\\x5cc\\x1b\[31m\\x7f\\x9b\\xe9" - - 0 /);
  assert.match(worse!, / bad-request /);
});

test("combined has as many words where a trusted peer gives an empty request id", async () => {
  const { ask, lines } = setUp("log: combined\ntrust: [10.0.0.0/8]");
  for (const id of ["given", ""]) await ask("http://h.test/", { from: { ...TRUSTED, headers: ["x-request-id", id] } });
  assert.match(lines[0]!, / - given [0-9a-f]{32}$/);
  assert.match(lines[1]!, / - - [0-9a-f]{32}$/);
});

test("json has OpenTelemetry's names, and lb. before those of our own", async () => {
  const { ask, lines, asked } = setUp("log: json", [503, 200]);
  await ask("http://h.test:81/p?q=1", { method: "PUT", body: "abc", headers: { ...EVIL, "content-length": "3" } });
  const { trace_id, span_id, "lb.request_id": id, ...rest } = JSON.parse(lines[0]!);
  const [first, last] = asked.map(({ traceparent }) => traceparent!.split("-"));
  assert.deepEqual([trace_id, span_id], [last![1], last![2]]);
  assert.notEqual(span_id, first![2]);
  assert.equal(id, asked[0]!["x-request-id"]);
  assert.deepEqual(rest, {
    "timestamp": "2026-11-21T03:14:42.007Z",
    "client.address": "192.0.2.9",
    "http.request.method": "PUT",
    "network.protocol.version": "1.1",
    "url.scheme": "http",
    "server.address": "h.test",
    "url.path": "/p",
    "url.query": "q=1",
    "http.response.status_code": 200,
    "http.request.body.size": 3,
    "http.response.body.size": 6,
    "http.request.header.referer": EVIL.referer,
    "user_agent.original": EVIL["user-agent"],
    "lb.route": "default",
    "lb.service": "default",
    "lb.server": "b:1",
    "lb.attempts": 2,
    "lb.connected_ms": 11.123,
    "lb.head_ms": 20.247,
    "lb.ended_ms": 20.247,
  });
});

test("json says why a request failed, and leaves out what there was not", async () => {
  const { ask, lines } = setUp("log: json\nhosts: [{ host: only.test, respond: {} }]", ["timeout"]);
  await ask("http://h.test/", { method: "POST" });
  await ask("http://h.test/", { headers: { host: "a@b" } });
  await ask("http://only.test/");
  const [failed, refused, own] = lines.map((line) => JSON.parse(line));
  assert.deepEqual([failed["error.type"], failed["http.response.status_code"], failed["lb.server"]], [
    "timeout",
    504,
    "a:1",
  ]);
  assert.ok(!("lb.head_ms" in failed) && !("lb.connected_ms" in failed));
  assert.deepEqual([refused["error.type"], refused["url.original"], refused["lb.attempts"]], [
    "bad-host",
    "/",
    0,
  ]);
  for (const name of ["url.path", "lb.route", "lb.service", "lb.server", "span_id", "user_agent.original"]) {
    assert.ok(!(name in refused), name);
  }
  assert.deepEqual([own["lb.route"], own["error.type"], "lb.service" in own], ["only.test", undefined, false]);
  assert.match(refused.trace_id, /^[0-9a-f]{32}$/);
});

test("nothing that a client sends begins another line or reaches a terminal as a command", async () => {
  for (const log of ["combined", "json"]) {
    const { ask, lines } = setUp(`log: ${log}\ntrust: [10.0.0.0/8]`);
    await ask("http://h.test/\x9b?\u2028", { headers: { ...WORSE } });
    await ask("http://h.test/", { headers: { "user-agent": "a\x1b[31m\x9b", "host": "\x9b" } });
    const raw = ["x-request-id", "\x1b\x9b\r\n\ud800", "x-forwarded-for", "\x1b", "user-agent", "\udfff\u2028\x85é"];
    await ask(undefined, { from: { ...TRUSTED, headers: raw } });
    assert.equal(lines.length, 3);
    for (const line of lines) assert.match(line, /^[\x20-\x7e]+$/, log);
    if (log === "json") assert.equal(JSON.parse(lines[2]!)["user_agent.original"], "\udfff\u2028\x85é");
  }
});

test("Authorization and Cookie are in no line, nor is any header but Referer and User-Agent", async () => {
  for (const log of ["combined", "json"]) {
    const { ask, lines } = setUp(`log: ${log}`, [200, "reset"]);
    const names = ["authorization", "cookie", "proxy-authorization", "x-api-key", "tracestate"];
    const headers = Object.fromEntries(names.map((name) => [name, `a=secret-${name}`]));
    for (const method of ["GET", "POST"]) await ask("http://h.test/", { method, headers });
    assert.equal(lines.length, 2);
    assert.doesNotMatch(lines.join("\n"), /secret/);
  }
});

test("a server's 5xx is its status, and a name with blanks stays one word", async () => {
  const { ask, lines } = setUp("log: json", [500]);
  await ask();
  assert.equal(JSON.parse(lines[0]!)["error.type"], "500");
  const named = setUp("log: combined\nhosts: [{ name: my own shop, host: my.test, servers: [c:1], health: off }]");
  await named.ask("http://my.test/");
  assert.match(named.lines[0]!, / my\\x20own\\x20shop c:1 1 /);
});

// ─── Which requests have a line ───

test("of what succeeds a sample is written, of what fails everything", async () => {
  const { ask, lines } = setUp("log: { format: json, sample: 10% }", [200], seeded(7));
  for (let i = 0; i < 1_000; i++) await ask();
  assert.ok(lines.length > 60 && lines.length < 140, `${lines.length}`);
  for (const [manner, written] of [[404, 0], [500, 1], [503, 1], ["reset", 1], ["client-left", 1]] as const) {
    const never = setUp("log: { sample: 0% }", [manner]);
    await never.ask("http://h.test/", { method: "POST" });
    assert.equal(never.lines.length, written, String(manner));
  }
  const refused = setUp("log: { sample: 0% }");
  await refused.ask("http://h.test/", { headers: { host: "a@b" } });
  assert.equal(refused.lines.length, 1);
});

test("a trace that is begun here is marked as recorded where its line is written", async () => {
  const { ask, lines, asked } = setUp("log: { format: json, sample: 50% }", [200], seeded(3));
  for (let i = 0; i < 40; i++) await ask();
  const written = new Set(lines.map((line) => JSON.parse(line).trace_id));
  for (const { traceparent } of asked) {
    const [, trace, , flags] = traceparent!.split("-");
    assert.equal(flags, written.has(trace) ? "01" : "00");
  }
  assert.ok(written.size > 5 && written.size < 35);
  const off = setUp("log: off");
  await off.ask();
  assert.match(off.asked[0]!.traceparent!, /-01$/);
});

// ─── Traces ───

const TRACE = "4bf92f3577b34da6a3ce929d0e0e4736", PARENT = "00f067aa0ba902b7";

test("a valid traceparent is kept, with a span of its own for each attempt, and so is its tracestate", async () => {
  const { ask, asked } = setUp("log: off", [503, 200]);
  await ask("http://h.test/", { headers: { traceparent: `00-${TRACE}-${PARENT}-01`, tracestate: "a=1,b=2" } });
  const spans = asked.map(({ traceparent }) => {
    assert.match(traceparent!, new RegExp(`^00-${TRACE}-(?!0{16}|${PARENT})[0-9a-f]{16}-01$`));
    return traceparent!.split("-")[2];
  });
  assert.equal(new Set(spans).size, 2);
  assert.deepEqual(asked.map(({ tracestate }) => tracestate), ["a=1,b=2", "a=1,b=2"]);
});

for (
  const [what, sent, flags] of [
    ["not sampled", `00-${TRACE}-${PARENT}-00`, "00"],
    ["flags that we do not know", `00-${TRACE}-${PARENT}-ff`, "03"],
    ["a later version", `01-${TRACE}-${PARENT}-01`, "01"],
    ["a later version with more behind it", `cc-${TRACE}-${PARENT}-01-what-ever`, "01"],
  ] as const
) {
  test(`a traceparent is kept: ${what}`, async () => {
    const { ask, asked } = setUp("log: off");
    await ask("http://h.test/", { headers: { traceparent: sent } });
    assert.match(asked[0]!.traceparent!, new RegExp(`^00-${TRACE}-[0-9a-f]{16}-${flags}$`));
  });
}

for (
  const [what, sent] of [
    ["none", ""],
    ["an id of zeros", `00-${"0".repeat(32)}-${PARENT}-01`],
    ["a parent of zeros", `00-${TRACE}-${"0".repeat(16)}-01`],
    ["capitals", `00-${TRACE.toUpperCase()}-${PARENT}-01`],
    ["version ff", `ff-${TRACE}-${PARENT}-01`],
    ["version 00 with more behind it", `00-${TRACE}-${PARENT}-01-more`],
    ["a later version with more and no dash", `01-${TRACE}-${PARENT}-01more`],
    ["too short", `00-${TRACE.slice(1)}-${PARENT}-01`],
    ["two of them", `00-${TRACE}-${PARENT}-01, 00-${TRACE}-${PARENT}-01`],
    ["something else", "hello"],
  ] as const
) {
  test(`a trace is begun in place of: ${what}`, async () => {
    const { ask, asked } = setUp("log: off");
    for (let i = 0; i < 2; i++) {
      await ask("http://h.test/", { headers: { ...(sent && { traceparent: sent }), tracestate: "a=1" } });
    }
    const traces = asked.map(({ traceparent, tracestate }) => {
      assert.equal(tracestate, undefined, "it belongs to the other one");
      const [, trace] = /^00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-01$/.exec(traceparent!)!;
      return trace;
    });
    assert.ok(!traces.includes(TRACE) && traces[0] !== traces[1]);
  });
}

test("twenty thousand traces and spans have names of their own", async () => {
  const { ask, asked } = setUp("log: off");
  for (let i = 0; i < 20_000; i++) await ask();
  assert.equal(new Set(asked.map(({ traceparent }) => traceparent!.slice(3, 35))).size, 20_000);
  assert.equal(new Set(asked.map(({ traceparent }) => traceparent!.slice(36, 52))).size, 20_000);
});

// ─── What the operator is told ───

test("a report is one entry with its time and level, whatever is in it", () => {
  const said: string[] = [];
  const { error } = console;
  console.error = (line: string) => said.push(line);
  try {
    const { report } = createLoadBalancer(parseConfig("default: { servers: [a:1] }")).balancer.effects;
    report("warn", "its name is \x1b[31mx\x07\r\n2026-01-01T00:00:00.000Z error: forged");
    report("info", "café");
  } finally {
    console.error = error;
  }
  const [warning, info] = said as [string, string];
  assert.match(
    warning,
    /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z warn: its name is \\x1b\[31mx\\x07\\x0d\n {2}2026-01-01T00:00:00.000Z error: forged$/,
  );
  assert.match(info, /Z info: café$/);
});
