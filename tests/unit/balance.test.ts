// The request path: what is tried again and where, what ends up in headers, answers and logs, and that every count
// goes back to 0.

import assert from "node:assert/strict";
import {
  createLoadBalancer,
  type Failure,
  FAILURES,
  type FetchAttempt,
  type LoadBalancer,
  parseConfig,
  strategies,
  WireError,
} from "../../lb.ts";
import { answerTo, type Ask, balancerFor } from "../rig/balancer.ts";
import { assertIdle, requestOf, test as patientTest } from "../rig/rig.ts";
import type { Attempt, Client, HttpRequest, HttpResponse, Strategies } from "../rig/types.ts";

type FailureName = keyof typeof FAILURES;
type RequestProblem = NonNullable<HttpRequest["problem"]>;
/** What one attempt meets: a status, or a failure before (`connect`) or after the server has seen the request. */
type Manner = number | `${"" | "unsent "}${Failure}` | ((attempt: FetchAttempt) => Promise<Response>);
interface More {
  servers?: string;
  top?: string; // of the file
  own?: Strategies;
  yaml?: string; // the whole file
  transport?: (attempt: Attempt) => void; // in place of fetch
}

const balancers: LoadBalancer[] = [];
/** A test at whose end every count is 0. (Deno runs no `afterEach` outside of `describe`.) */
const test = (name: string, run: () => Promise<void>) =>
  patientTest(name, async () => {
    await run();
    balancers.splice(0).forEach(assertIdle);
  });

const bytesOf = (body: FetchAttempt["body"]) => new Response(body).text();

/** A balancer whose attempts meet the manners in turn, the last one again and again. Afterwards all counts must be 0. */
function setUp(
  keys = "",
  manners: Manner[] = [200],
  { servers = "[a:1, b:1, c:1]", top = "log: off", own = {}, yaml, transport }: More = {},
) {
  const asked: string[] = [], slept: number[] = [];
  type Seen = { attempt?: FetchAttempt; headers: Record<string, string>; bodies: string[] };
  const seen: Seen = { headers: {}, bodies: [] };
  let turn = 0;
  const fetch = async (_url: string, attempt: FetchAttempt) => {
    asked.push(attempt.server.name[0]!);
    seen.attempt = attempt;
    seen.headers = {};
    for (let i = 0; i < attempt.headers.length; i += 2) seen.headers[attempt.headers[i]!] = attempt.headers[i + 1]!;
    const manner = manners[Math.min(turn++, manners.length - 1)]!;
    if (typeof manner === "function") return await manner(attempt);
    if (typeof manner === "string") {
      const sent = !/^(unsent|connect)/.test(manner);
      throw new WireError(manner.replace("unsent ", "") as Failure, sent, `secret 10.9.8.7 ${manner}`);
    }
    try {
      seen.bodies.push(await bytesOf(attempt.body)); // as the wire does, also for an answer
    } catch (error) {
      throw error instanceof WireError ? error : new WireError("client-left", true, String(error));
    }
    clock.now += 12.5;
    const body = attempt.method === "HEAD" ? null : new TextEncoder().encode(`from ${attempt.server.name}`);
    if (!body) attempt.ended(manner, 0, undefined);
    const stream = body && new ReadableStream({
      pull(controller) {
        controller.enqueue(body);
        controller.close();
        attempt.ended(manner, body.length, undefined);
      },
      cancel: () => attempt.ended(manner, 0, "client-left"),
    }, { highWaterMark: 0 });
    return new Response(stream, { status: manner });
  };
  const usual = ["health: off", "eject: off"].filter((one) => !keys.includes(one.split(" ")[0]!));
  const file = yaml ?? `${top}\ndefault: { ${[`servers: ${servers}`, ...usual, keys].join(", ")} }`;
  const { lb, clock, lines, reports, send } = balancerFor(file, {
    ...transport ? { send: transport } : { fetch },
    date: () => new Date(Date.UTC(2026, 10, 21, 3, 14, 42)),
    sleep: (ms, signal) => {
      if (signal === undefined) slept.push(ms); // a back-off; with a signal it is a limit
      return signal && ms > 1 ? new Promise(() => {}) : Promise.resolve();
    },
    strategies: own,
  });
  balancers.push(lb);
  /** Sends, and reads the answer to its end. */
  const ask = async (url?: string, init?: Ask) => {
    const response = await send(url, init);
    return { status: response.status, headers: response.headers, text: await response.text() };
  };
  /** What our own server has refused already is answered and counted like all else. */
  const refused = (problem: RequestProblem, headers: Record<string, string>) => {
    const request = requestOf({ problem, fields: ["host", "h.test", ...Object.entries(headers).flat()] });
    lb.handle(request);
    const [{ status, fields, body }] = request.answers as [HttpResponse];
    const pairs = fields.flatMap((name, i): [string, string][] => i % 2 ? [] : [[name, fields[i + 1]!]]);
    return { status, headers: new Headers(pairs), text: body.bytes!.toString() };
  };
  return { lb, ask, send, refused, asked, lines, reports, slept, seen, clock };
}

const stream = (...pieces: string[]) =>
  new ReadableStream<Uint8Array<ArrayBuffer>>({
    pull(controller) {
      const piece = pieces.shift();
      if (piece === undefined) return controller.close();
      controller.enqueue(new TextEncoder().encode(piece));
    },
  });
/** A request with a body that can be kept (its length is known and small), or one that is a stream. */
const withBody = (method: string, body: "none" | "kept" | "stream" | "long"): Ask => {
  if (body === "none") return { method };
  if (body === "kept") return { method, body: "abc", headers: { "content-length": "3" } };
  const long = body === "long";
  const headers: Record<string, string> = long ? { "content-length": "70000" } : { "transfer-encoding": "chunked" };
  return { method, body: long ? stream("x".repeat(70_000)) : stream("a", "bc"), headers, duplex: "half" } as Ask;
};

// ─── Retries ───

// deno-fmt-ignore
const KINDS = [
  "connect", "unsent connect-timeout", "unsent reset", "reset", "timeout", "invalid-answer",
  "client-left", "client-timeout", "bad-body", "body-too-large", 502, 503, 504, 500, 404, 200,
] as const;
const UNSENT: Manner[] = ["connect", "unsent connect-timeout", "unsent reset"];
const RETRIED: Manner[] = [...UNSENT, "reset", "timeout", "invalid-answer", 502, 503, 504];

test("a second attempt is made for what retry_on names, where repeating it does no harm", async () => {
  for (const method of ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PROPFIND", "POST", "PATCH", "PURGE"]) {
    const idempotent = !["POST", "PATCH", "PURGE"].includes(method);
    for (const body of ["none", "kept", "stream", "long"] as const) { // long: of a known length, too long to be kept
      if (body !== "none" && /GET|HEAD/.test(method)) continue;
      for (const kind of KINDS) {
        const { ask, asked, seen } = setUp("", [kind, 200]);
        const { status } = await ask(undefined, withBody(method, body));
        const again = RETRIED.includes(kind) && (UNSENT.includes(kind) || idempotent && /none|kept/.test(body));
        assert.equal(asked.join(""), again ? "ab" : "a", `${method}, body ${body}, ${kind}`);
        const wanted = again
          ? 200
          : typeof kind === "number"
          ? kind
          : FAILURES[kind.replace("unsent ", "") as Failure].status;
        assert.equal(status, wanted, `${method}, body ${body}, ${kind}`);
        const whole = { none: "", kept: "abc", stream: "abc", long: "x".repeat(70_000) }[body];
        for (const one of seen.bodies) assert.equal(one, whole, "each attempt has the whole body");
      }
    }
  }
});

test("a retry never asks the same server twice while another is left", async () => {
  const names = Object.keys(strategies).map((name) => name === "hash" ? "{hash: {path: true}}" : name);
  for (const strategy of names) {
    const { ask, asked } = setUp(`retries: 2, strategy: ${strategy}`, ["connect"]);
    await ask();
    assert.deepEqual(asked.toSorted(), ["a", "b", "c"], strategy);
  }
  const panicking = setUp("eject: {failures: 1, at_most: 100%}, panic: 100%, strategy: first", ["reset"]);
  for (let i = 0; i < 4; i++, panicking.clock.now += 1000) await panicking.ask();
  assert.equal(panicking.asked.join(" "), "a b a c a b a b", "nor when all of them have failed");
  const { ask, asked } = setUp("retries: 3, strategy: first", ["connect"], { servers: "[a:1, b:1]" });
  await ask();
  assert.deepEqual(asked.slice(0, 2), ["a", "b"]);
  assert.equal(asked.length, 4, "when none is left, one is asked again");
});

test("what a failing server leaves undone is shared evenly by the others", async () => {
  const { ask, asked } = setUp("", [(attempt) => {
    if (attempt.server.name === "a:1") return Promise.reject(new WireError("connect", false, "refused"));
    attempt.ended(200, 0, undefined);
    return Promise.resolve(new Response(null));
  }]);
  for (let i = 0; i < 60; i++) assert.equal((await ask()).status, 200);
  const shares = ["a", "b", "c"].map((name) => asked.filter((one) => one === name).length);
  assert.deepEqual(shares, [20, 30, 30]);
});

test("a retry goes to a backup when no other is left", async () => {
  const { ask, asked } = setUp("", ["connect", 200], { servers: "[a:1, {url: b:1, backup: true}]" });
  assert.equal((await ask()).status, 200);
  assert.equal(asked.join(""), "ab");
});

test("when nobody is left to ask again, the client is told what the last attempt met", async () => {
  const keys = "eject: { failures: 1, at_most: 100% }, panic: 0%";
  const { ask, asked } = setUp(keys, ["reset", "timeout"], { servers: "[a:1, b:1]" });
  assert.equal((await ask()).headers.get("x-lb-failure"), "timeout");
  const alone = setUp(keys, ["reset"], { servers: "[a:1]" });
  assert.equal((await alone.ask()).headers.get("x-lb-failure"), "reset");
  assert.deepEqual([asked.length, alone.asked.length], [2, 1]);
});

test("retries is the number of further attempts, and the last answer is passed on as it is", async () => {
  for (const retries of [0, 1, 2, 5]) {
    const { ask, asked } = setUp(`retries: ${retries}`, [502, 503, 504], { servers: "[a:1, b:1, c:1, d:1, e:1, f:1]" });
    const { status, text, headers } = await ask();
    assert.equal(asked.length, retries + 1);
    assert.deepEqual([status, text], [[502, 503, 504][Math.min(retries, 2)], `from ${asked.at(-1)}:1`]);
    assert.equal(headers.get("x-lb-failure"), null);
  }
});

test("retry_on is all that is tried again", async () => {
  const rows: [retryOn: string, kind: Manner, again: boolean][] = [
    ["[]", "connect", false],
    ["[connect]", "connect", true],
    ["[connect]", "unsent connect-timeout", true],
    ["[connect]", "reset", false],
    ["[reset]", "reset", true],
    ["[reset]", "connect", false],
    ["[502]", "invalid-answer", true],
    ["[502]", 503, false],
    ["[504]", "timeout", true],
    ["[503]", "timeout", false],
    ["[404]", 404, true],
  ];
  for (const [retryOn, kind, again] of rows) {
    const { ask, asked } = setUp(`retry_on: ${retryOn}`, [kind, 200]);
    await ask();
    assert.equal(asked.length, again ? 2 : 1, `${retryOn} ${kind}`);
  }
});

test("there is no back-off before the first retry, then a random part of a time that doubles up to a second", async () => {
  const { ask, slept } = setUp("retries: 9", ["connect"]);
  await ask();
  assert.deepEqual(slept, [12.5, 25, 50, 100, 200, 400, 500, 500]); // random is 0.5
});

test("a process that has no file handle left blames no server", async () => {
  const refused = () => Promise.reject(new WireError("connect", false, "connect EMFILE 127.0.0.1:1"));
  const { ask, lb } = setUp("eject: { failures: 1 }, retries: 0", [refused]);
  assert.equal((await ask()).status, 502);
  const [server] = lb.balancer.table.services.get("default")!.servers;
  assert.deepEqual([server!.failures, server!.ejectedUntil], [0, 0]);
});

test("no further attempt is made for a client that has left", async () => {
  const { send, asked } = setUp("retries: 5", ["reset"]);
  const leaving = new AbortController();
  leaving.abort();
  await send(undefined, { signal: leaving.signal });
  assert.equal(asked.length, 0, "a client that has left before its request is looked at costs no server anything");
});

test("a client that leaves while its server cannot be reached has left: that is what the log says", async () => {
  const leaving = new AbortController();
  const meet = () => {
    leaving.abort();
    return Promise.reject(new WireError("connect", false, "refused"));
  };
  const { ask, lines } = setUp("", [meet], { top: "" });
  const { status } = await ask(undefined, { signal: leaving.signal });
  assert.equal(status, 499);
  assert.match(lines.join(), /" 499 /);
});

/** So many requests whose first attempts fail together, after others went well; how many second attempts are then in flight. */
async function storm(requests: number, kind: Failure, keys = "", before = 0): Promise<number> {
  const [first, second]: [(() => void)[], (() => void)[]] = [[], []];
  let good = before;
  const yaml = `log: off\ndefault: { servers: [a:1, b:1], health: off, eject: off${keys} }`;
  const { lb, send } = balancerFor(yaml, {
    now: () => performance.now(),
    random: Math.random,
    fetch: (_url, attempt) =>
      new Promise((resolve, reject) => {
        if (good-- > 0) return resolve(answerTo(attempt));
        if (first.length < requests) return first.push(() => reject(new WireError(kind, kind !== "connect", "")));
        second.push(() => resolve(answerTo(attempt)));
      }),
  });
  balancers.push(lb);
  for (let i = 0; i < before; i++) await send();
  const answers = Array.from({ length: requests }, () => send());
  for (let i = 0; i < 20; i++) await undefined;
  for (const fail of first) fail();
  for (let i = 0; i < 50; i++) await undefined;
  const retries = second.length;
  for (const answer of second) answer();
  const statuses = (await Promise.all(answers)).map((response) => response.status);
  assert.equal(statuses.filter((status) => status === 200).length, retries);
  return retries;
}

test("retries are at most 20 % of the requests, at least 3 a second; where no connection stood they are free", async () => {
  assert.equal(await storm(3, "reset"), 3);
  assert.equal(await storm(8, "reset"), 3);
  assert.ok(await storm(100, "reset") <= 20 && await storm(100, "reset") >= 15);
  assert.equal(await storm(100, "reset", ", retry_budget: 100%"), 100);
  assert.equal(await storm(100, "reset", ", retry_budget: 0%"), 3);
  assert.equal(await storm(100, "connect"), 100);
});

test("good answers save up retries for the moment when a server dies, a hundred at most", async () => {
  assert.equal(
    await storm(60, "reset", "", 200),
    60 * 0.2 + 200 * 0.2,
    "20 % of those that fail, and of 200 good answers",
  );
  const many = await storm(300, "reset", "", 2_000);
  assert.ok(many >= 100 + 20 && many <= 100 + 60, `${many}`);
});

test("where all servers fail, 1,000 requests a second become 1,200 and no more, also after good times", async () => {
  for (const manner of ["reset", 503, "timeout"] as const) {
    for (const before of [0, 1000]) {
      let failing = false;
      const meet = (attempt: FetchAttempt) => {
        if (failing && typeof manner === "string") return Promise.reject(new WireError(manner, true, ""));
        attempt.ended(failing ? manner as number : 200, 0, undefined);
        return Promise.resolve(new Response(null, { status: failing ? manner as number : 200 }));
      };
      const { ask, asked, clock } = setUp("retries: 3, panic: 100%", [meet]);
      for (let i = 0; i < before; i++) await ask();
      failing = true;
      asked.length = 0;
      for (let i = 0; i < 5000; i++, clock.now += 1) await ask();
      const saved = before ? 100 : 0;
      assert.ok(asked.length <= 5000 * 1.2 + saved + 3, `${manner}: ${asked.length}`);
      assert.ok(asked.length >= 5000 * 1.19 + saved, `${manner}: ${asked.length}`);
    }
  }
});

test("what is wrong with one server is reported once a second, however many requests meet it", async () => {
  const { ask, reports, clock } = setUp("retries: 0", ["reset"], { servers: "[a:1]" });
  for (let i = 0; i < 5; i++) await ask();
  clock.now += 999;
  await ask();
  assert.equal(reports.length, 1);
  clock.now += 1;
  await ask();
  assert.equal(reports.length, 2);
});

// ─── Answers of our own ───

type Cause = More & { keys?: string; manners?: Manner[]; ask?: Ask; before?: number; problem?: RequestProblem };
const own: Strategies = {
  first() {
    throw new Error("secret 10.9.8.7");
  },
};
/** What ends in each failure. */
const CAUSES: Record<FailureName, Cause | "limits.test.ts" | "tcp.test.ts" | "tls.test.ts"> = {
  "bad-request": { ask: { raw: "http://h.test/%zz" } },
  "bad-host": { ask: { headers: { host: "a@b" } } },
  "bad-scheme": "tls.test.ts",
  "bad-body": { ask: { method: "PUT", body: "abc", headers: { "content-length": "5" } } },
  "denied": { keys: "deny: [192.0.2.9]" },
  "no-route": { yaml: "log: off\nhosts: [{ host: other.test, respond: {} }]" },
  "bad-method": { top: "log: off\nroutes: [{ methods: [PUT], respond: {} }]" },
  "client-timeout": {
    keys: "timeouts: { idle: 1ms }",
    ask: { ...withBody("PUT", "stream"), body: new ReadableStream({}), headers: { "content-length": "3" } },
  },
  "body-too-large": { keys: "body_limit: 2", ask: withBody("PUT", "kept") },
  "uri-too-long": { ask: { raw: `http://h.test/${"a".repeat(20_000)}` } },
  "headers-too-large": { problem: "headers-too-large" },
  "bad-version": { problem: "bad-version" },
  "bad-expect": { problem: "bad-expect" },
  "flood": { problem: "flood" },
  "client-left": { manners: ["client-left"] },
  "internal": { keys: "strategy: first", own },
  "connect": { manners: ["connect"] },
  "reset": { manners: ["reset"] },
  "invalid-answer": { manners: ["invalid-answer"] },
  "deadline": { manners: ["deadline"] },
  "no-server": {
    keys: "eject: { failures: 1, at_most: 100% }, panic: 0%",
    manners: ["reset"],
    servers: "[a:1]",
    before: 1,
  },
  "busy": "limits.test.ts",
  "client-busy": "limits.test.ts",
  "rate": "limits.test.ts",
  "queue-full": "limits.test.ts",
  "queue-timeout": "limits.test.ts",
  "draining": "tcp.test.ts",
  "connect-timeout": { manners: ["unsent connect-timeout"] },
  "timeout": { manners: ["timeout"] },
  "idle": { manners: ["idle"] },
  "loop": { ask: { headers: { via: Array(21).fill("1.1 x").join() } } },
};

test("an answer of our own in JSON is as long as it says, whatever a trusted peer calls the request", async () => {
  const { ask } = setUp("", [], { yaml: "trust: [192.0.2.9]\nroutes: [{ path: /a, respond: {} }]" });
  const { status, headers, text } = await ask(undefined, {
    headers: { "accept": "application/json", "x-request-id": "\xe9\xe9" },
  });
  assert.deepEqual([status, JSON.parse(text).request], [404, "\xe9\xe9"]);
  assert.equal(headers.get("content-length"), `${new TextEncoder().encode(text).length}`);
});

for (const [kind, { status, text }] of Object.entries(FAILURES)) {
  const cause = CAUSES[kind as FailureName];
  if (typeof cause === "string") continue;
  test(`${kind} is answered with ${status}, x-lb-failure and a short text, or JSON for those who ask for it`, async () => {
    for (const accept of [undefined, "*/*", "application/json", "text/html, application/problem+json;q=0.9"]) {
      const { ask, refused, reports } = setUp(cause.keys, cause.manners, cause);
      const headers = { ...cause.ask?.headers, ...accept && { accept } };
      // a body can be sent once
      const body = cause.ask?.body instanceof ReadableStream ? { body: new ReadableStream({}) } : {};
      for (let i = 0; i < (cause.before ?? 0); i++) await ask();
      const answer: Awaited<ReturnType<typeof ask>> = cause.problem
        ? refused(cause.problem, headers)
        : await ask(undefined, { ...cause.ask, ...body, headers });
      assert.deepEqual([answer.status, answer.headers.get("x-lb-failure")], [status, kind]);
      assert.equal(answer.headers.get("retry-after"), status === 503 ? "1" : null);
      assert.equal(answer.headers.get("allow"), status === 405 ? "PUT" : null);
      assert.equal(answer.headers.get("cache-control"), "no-store");
      assert.equal(answer.headers.get("content-length"), `${answer.text.length}`);
      if (accept?.includes("json")) {
        assert.equal(answer.headers.get("content-type"), "application/problem+json");
        const { request, ...problem } = JSON.parse(answer.text);
        assert.deepEqual(problem, { type: "about:blank", title: text, status, failure: kind });
        assert.match(request, /./);
      } else {
        assert.equal(answer.headers.get("content-type"), "text/plain; charset=utf-8");
        assert.equal(answer.text, `${status}: ${text}\n`);
      }
      const isBlamed = kind !== "deadline"; // a deadline of the client's own is no fault of the server
      if (status >= 500 && isBlamed && !cause.before && (cause.manners || cause.own)) {
        assert.match(reports.join(), /secret 10\.9\.8\.7/, "the operator is told more");
      }
    }
  });
}

test("a request that comes back is not sent on: the balancer as its own server answers 508 once", async () => {
  const { ask, lb, asked } = setUp("", [async (attempt) => {
    const headers = new Headers();
    for (let i = 0; i < attempt.headers.length; i += 2) headers.append(attempt.headers[i]!, attempt.headers[i + 1]!);
    attempt.ended(200, 0, undefined);
    return await lb.fetch(new Request("http://h.test/", { headers }), {});
  }]);
  assert.equal((await ask()).status, 508);
  assert.equal(asked.length, 1);
});

// ─── Headers ───

const TRUSTED = { address: "10.1.2.3" };
/** What is sent, and what of it the server sees; `-` is nothing, `*` anything. */
const HEADERS: [why: string, from: Partial<Client>, sent: string, seen: string][] = [
  [
    "end-to-end headers pass as they are",
    {},
    "X-Any: 1 | TE-x: 2 | Authorization: Basic x | Trailer: x-sum",
    "X-Any: 1 | TE-x: 2 | Authorization: Basic x | Trailer: x-sum",
  ],
  [
    "hop-by-hop headers end here",
    {},
    "Connection: close | Keep-Alive: 1 | TE: trailers | Upgrade: h2c | HTTP2-Settings: x",
    "Connection: - | Keep-Alive: - | TE: - | Upgrade: - | HTTP2-Settings: -",
  ],
  [
    "so do those for proxies",
    {},
    "Proxy-Connection: x | Proxy-Authorization: x | Proxy: http://evil",
    "Proxy-Connection: - | Proxy-Authorization: - | Proxy: -",
  ],
  [
    "and the framing, which is set anew",
    {},
    "Transfer-Encoding: chunked | Content-Length: 5 | Expect: 100-continue",
    "Transfer-Encoding: - | Content-Length: - | Expect: -",
  ],
  [
    "what Connection names ends here",
    {},
    "X-Secret: 1 | Connection: close, x-SECRET | X-Other: 2 | connection: x-other",
    "X-Secret: - | X-Other: - | Connection: -",
  ],
  [
    "Connection cannot name away what we set",
    {},
    "Connection: X-Forwarded-For, Host, Via, X-Request-Id, Forwarded",
    "x-forwarded-for: 192.0.2.9 | host: h.test | via: 1.1 lb-NAME | x-request-id: * | forwarded: *",
  ],
  [
    "a stranger's forwarding headers are replaced",
    {},
    "X-Forwarded-For: 6.6.6.6 | x-forwarded-host: evil | X-Forwarded-Proto: https | Forwarded: for=6.6.6.6",
    'x-forwarded-for: 192.0.2.9 | x-forwarded-host: h.test | x-forwarded-proto: http | forwarded: for=192.0.2.9;host="h.test";proto=http',
  ],
  [
    "or dropped where we set none",
    {},
    "X-Forwarded-Prefix: /x | X-Forwarded-Port: 1 | X-Real-IP: 6.6.6.6",
    "X-Forwarded-Prefix: - | X-Forwarded-Port: - | X-Real-IP: -",
  ],
  [
    "a trusted peer's are added to",
    TRUSTED,
    "X-Forwarded-For: 203.0.113.9 | X-Forwarded-For: 10.0.0.1 | Forwarded: for=203.0.113.9",
    'x-forwarded-for: 203.0.113.9, 10.0.0.1, 10.1.2.3 | forwarded: for=203.0.113.9;host="h.test";proto=http, for=10.0.0.1, for=10.1.2.3',
  ],
  [
    "or kept",
    TRUSTED,
    "X-Forwarded-Host: shop.test | X-Forwarded-Proto: https | X-Forwarded-Prefix: /x | X-Real-IP: 203.0.113.9 | X-Request-Id: theirs",
    "x-forwarded-host: shop.test | x-forwarded-proto: https | X-Forwarded-Prefix: /x | X-Real-IP: 203.0.113.9 | x-request-id: theirs",
  ],
  [
    "an IPv6 address stands in brackets and quotes in Forwarded",
    { address: "2001:db8::1" },
    "",
    'x-forwarded-for: 2001:db8::1 | forwarded: for="[2001:db8::1]";host="h.test";proto=http',
  ],
  [
    "https is told",
    { scheme: "https" },
    "",
    'x-forwarded-proto: https | forwarded: for=192.0.2.9;host="h.test";proto=https',
  ],
  ["Via grows", {}, "Via: 1.0 fred | via: 1.1 p.example (x)", "via: 1.0 fred, 1.1 p.example (x), 1.1 lb-NAME"],
  [
    "look-alikes of what means something are dropped",
    {},
    "X_Forwarded_For: 1 | X.Real.IP: 2 | Content_Length: 3 | Transfer_Encoding: chunked | x.forwarded-host: 4 | X_Other: 5",
    "X_Forwarded_For: - | X.Real.IP: - | Content_Length: - | Transfer_Encoding: - | x.forwarded-host: - | X_Other: 5",
  ],
  [
    "from trusted peers too",
    TRUSTED,
    "X_Forwarded_For: 6.6.6.6 | X_Request_ID: 1",
    "X_Forwarded_For: - | x-forwarded-for: 10.1.2.3 | X_Request_ID: -",
  ],
  [
    "names that JavaScript knows are nothing special",
    {},
    "__proto__: 1 | constructor: 2 | toString: 3",
    "__proto__: 1 | constructor: 2 | toString: 3",
  ],
];
const fields = (text: string) =>
  text.split(" | ").filter(Boolean).map((field) => field.split(": ") as [string, string]);

for (const [why, from, sent, wanted] of HEADERS) {
  test(`headers: ${why}`, async () => {
    const { ask, seen, lb } = setUp("", [200], { top: "log: off\ntrust: [10.0.0.0/8]" });
    await ask(undefined, { from: { ...from, headers: ["Host", "h.test", ...fields(sent).flat()] } });
    const got = new Map<string, string>();
    const { headers } = seen.attempt!;
    for (let i = 0; i < headers.length; i += 2) {
      assert.ok(!got.has(headers[i]!), `${headers[i]} once`);
      got.set(headers[i]!, headers[i + 1]!.replace(lb.balancer.via, "lb-NAME"));
    }
    for (const [name, value] of fields(wanted)) {
      if (value === "*") assert.ok(got.get(name), name);
      else assert.equal(got.get(name) ?? "-", value, name);
    }
  });
}

test("headers pass in the sender's spelling and order, and several of one name stay several", async () => {
  const { ask, seen } = setUp();
  const sent = ["X-b", "1", "Cookie", "a=1", "x-A", "2", "X-B", "3", "cookie", "b=2"];
  await ask(undefined, { from: { headers: ["HOST", "h.test", ...sent] } });
  assert.deepEqual(seen.attempt!.headers.slice(0, 2 + sent.length), ["host", "h.test", ...sent]);
});

test("Max-Forwards and x-lb-explain pass as they came, and no answer says which server was taken", async () => {
  const { ask, asked, seen } = setUp("", [200], {
    top: "log: off\nadmin: { listen: 127.0.0.1:0, token: secret-token }",
  });
  for (const method of ["GET", "OPTIONS"]) {
    const headers = { "max-forwards": "0", "x-lb-explain": "secret-token" };
    const answer = await ask(undefined, { method, headers });
    assert.equal(asked.length, 1, method);
    assert.deepEqual([seen.headers["max-forwards"], seen.headers["x-lb-explain"]], ["0", "secret-token"]);
    assert.equal(answer.headers.get("x-lb-explain"), null);
    asked.length = 0;
  }
});

test("a stranger's request id is replaced", async () => {
  const { ask, seen } = setUp();
  await ask(undefined, { from: { headers: ["X-Request-Id", "theirs"] } });
  assert.notEqual(seen.headers["x-request-id"], "theirs");
});

test("each request has an id of its own, which its retries keep", async () => {
  const { ask, seen } = setUp();
  const ids = new Set<string>();
  for (let i = 0; i < 50; i++) {
    await ask();
    ids.add(seen.headers["x-request-id"]!);
  }
  assert.equal(ids.size, 50);
  const kept: string[] = [];
  const note = (attempt: FetchAttempt) => {
    kept.push(attempt.headers[attempt.headers.indexOf("x-request-id") + 1]!);
    return Promise.reject(new WireError("reset", true, ""));
  };
  await setUp("", [note]).ask();
  assert.deepEqual([kept.length, kept[0]], [2, kept[1]]);
});

test("the transport gets the timeouts, and the length of the body", async () => {
  const wanted = { connect: 1000, response: 2000, idle: 3000, request: Infinity };
  for (const [body, length] of [["none", 0], ["kept", 3], ["stream", -1], ["long", 70_000]] as const) {
    const sent: Attempt[] = [];
    const transport = (attempt: Attempt) => {
      sent.push(attempt);
      attempt.onEnd("reset", "closed", true);
    };
    const keys = "timeouts: { connect: 1s, response: 2s, idle: 3s }, retries: 0";
    const { ask } = setUp(keys, [], { transport });
    await ask(undefined, withBody("PUT", body));
    const told = sent.map(({ timeouts, method, body }) => ({ timeouts, method, length: body.length }));
    assert.deepEqual(told, [{ timeouts: wanted, method: "PUT", length }]);
    const { ask: byFetch, seen } = setUp(keys);
    await byFetch(undefined, withBody("PUT", body));
    assert.deepEqual([seen.attempt!.timeouts, seen.attempt!.method], [wanted, "PUT"]);
  }
});

// ─── Limits ───

test("body_limit refuses by length before a server is asked, and cuts a stream off", async () => {
  const rows: [limit: string, body: "kept" | "stream" | "long", status: number, asks: number][] = [
    ["3", "kept", 200, 1],
    ["2", "kept", 413, 0],
    ["3", "stream", 200, 1],
    ["2", "stream", 413, 1],
    ["70kB", "long", 200, 1],
    ["69999", "long", 413, 0],
  ];
  for (const [limit, body, status, asks] of rows) {
    const { ask, asked, seen } = setUp(`body_limit: ${limit}`);
    assert.equal((await ask(undefined, withBody("POST", body))).status, status, `${limit} ${body}`);
    assert.equal(asked.length, asks, `${limit} ${body}`);
    const whole = body === "long" ? "x".repeat(70_000) : "abc";
    assert.deepEqual(seen.bodies, status === 200 ? [whole] : [], "no server has the whole body of a refused request");
  }
});

test("a body without a length and without chunks, of a Request made in the program, reaches the server too", async () => {
  const { ask, seen } = setUp();
  await ask(undefined, { method: "POST", body: "abc" });
  assert.deepEqual(seen.bodies, ["abc"]);
});

test("max and max_in_flight bound what a server has in flight; without a queue there is 503 beyond them, and later room again", async () => {
  const rows: [keys: string, servers: string, room: string][] = [
    ["", "[{url: a:1, max: 1}, {url: b:1, max: 2}]", "abb"],
    ["max_in_flight: 2", "[a:1, b:1]", "abab"],
    ["max_in_flight: 2", "[{url: a:1, max: 1}, {url: b:1, max: 9}]", "abb"],
  ];
  for (const [keys, servers, room] of rows) {
    const ends: (() => void)[] = [];
    const pend = (attempt: FetchAttempt) =>
      new Promise<Response>((resolve) =>
        ends.push(() => (attempt.ended(200, 0, undefined), resolve(new Response(null))))
      );
    const { send, ask, asked } = setUp(`queue: off, ${keys}`, [pend], { servers });
    const answers = [...room].map(() => send());
    const { status, headers } = await ask();
    const failure = headers.get("x-lb-failure");
    assert.deepEqual([asked.join(""), status, failure, headers.get("retry-after")], [room, 503, "queue-full", "1"]);
    ends.shift()!();
    await new Promise((resolve) => setTimeout(resolve)); // its answer is there
    answers.push(send());
    for (let end; await undefined, end = ends.shift();) end();
    for (const answer of answers) assert.equal((await answer).status, 200);
    assert.equal(asked.length, room.length + 1);
  }
});

test("counts return to 0 after bodies that are cancelled or cut off, a transport that throws, and a strategy that throws", async () => {
  const cancelled = setUp();
  await (await cancelled.send()).body!.cancel();
  const thrown = setUp("", [() => Promise.reject(new TypeError("what no transport should do"))]);
  assert.equal((await thrown.ask()).status, 502);
  const cut = setUp("", [(attempt) =>
    Promise.resolve(
      new Response(
        new ReadableStream({
          pull(controller) {
            attempt.ended(200, 0, "reset");
            controller.error(new Error("reset"));
          },
        }, { highWaterMark: 0 }),
      ),
    )]);
  await assert.rejects(cut.ask());
  assert.match(cut.reports.join(), /^warn default: a:1: .*reset/, "the operator is told");
  const half = setUp();
  const reading = await half.send();
  assert.equal(half.lb.balancer.inFlight, 1, "in flight until the body has ended");
  await reading.text();
  assert.equal((await setUp("strategy: first", [200], { own }).ask()).status, 500);
});

// ─── Logs ───

test("log: off writes nothing, and every request is logged once, when its last byte has passed", async () => {
  const quiet = setUp("", [200]);
  await quiet.ask();
  assert.deepEqual(quiet.lines, []);
  const { send, lines } = setUp("", [503, 200], { top: "" });
  const response = await send();
  assert.equal(lines.length, 0);
  await response.text();
  assert.equal(lines.length, 1);
  await (await send()).body!.cancel();
  assert.equal(lines.length, 2);
  const redirecting = setUp("", [200], { top: "hosts: [{ host: r.test, redirect: { to: /x } }]" });
  await redirecting.ask("http://r.test/");
  assert.match(redirecting.lines.join("\n"), /^192\.0\.2\.9 - - .*" 302 0 "-" "-" - - 0 -\/-\/0.000 - /);
});

test("a retry waits for the untried server where that is full, rather than go back to the one that has failed", async () => {
  let release = () => {};
  const held = new Promise<void>((resolve) => release = resolve);
  const hangs = async (attempt: FetchAttempt) => {
    await held;
    attempt.ended(200, 4, undefined);
    return new Response("late");
  };
  const { ask, asked } = setUp("strategy: first, max_in_flight: 1", [503, hangs, 503, 200], { servers: "[a:1, b:1]" });
  const first = ask(); // a fails it, b has it
  while (asked.length < 2) await new Promise((resolve) => setTimeout(resolve));
  const second = ask();
  while (asked.length < 3) await new Promise((resolve) => setTimeout(resolve));
  await new Promise((resolve) => setTimeout(resolve, 20));
  assert.equal(asked.join(""), "aba", "the second one waits");
  release();
  assert.deepEqual([(await first).status, (await second).status], [200, 200]);
  assert.equal(asked.join(""), "abab");
});

test("a log that cannot be written costs no request its answer, and no count", async () => {
  const lb = createLoadBalancer(parseConfig("default: { servers: [a:1] }"), {
    fetch: (_url, attempt) => {
      attempt.ended(200, 2, undefined);
      return Promise.resolve(new Response("ok"));
    },
    accessLog: () => {
      throw new Error("the disk is full");
    },
    report: () => {},
  });
  balancers.push(lb);
  assert.equal(await (await lb.request("http://a/", { headers: { host: "a" } })).text(), "ok");
});
