// Which servers may be asked: every transition by probes and by requests, on a clock that only the test moves.

import assert from "node:assert/strict";
import { test } from "node:test";
import { type Attempt, createLoadBalancer, type Failure, parseConfig, WireError } from "../lb.ts";

/** How a server behaves: a status, a failure before the answer, or something of its own. */
type Manner = number | Failure | ((attempt: Attempt, url: string) => Promise<Response>);

const HEALTH = "health: { path: /healthz, interval: 10s, timeout: 2s, rise: 1, fall: 1 }";
const OFF = "health: off";

/** A balancer over `servers`, with the first one asked first; `answers` and `health` say how each of them behaves. */
function setUp(keys: string, servers = "[a:1, b:1]", more = "") {
  const clock = { now: 0 };
  const sleepers = new Set<{ at: number; wake: () => void }>();
  const [answers, health]: [Record<string, Manner>, Record<string, Manner>] = [{}, {}];
  const [probes, reports]: [string[], string[]] = [[], []];
  const draws: number[] = [];
  let asked = "";
  const behave = async (manner: Manner, attempt: Attempt, url: string) => {
    if (typeof manner === "function") return await manner(attempt, url);
    if (typeof manner === "string") throw new WireError(manner, manner !== "connect", `it says ${manner}`);
    attempt.ended(manner, 0, undefined);
    return new Response(null, { status: manner });
  };
  const yaml = (keys: string, servers: string, more = "") => {
    const usual = ["strategy: first", "panic: 0%"].filter((one) => !keys.includes(one.split(" ")[0]!));
    const defaults = ["retries: 0", ...usual, keys].join(", ");
    return parseConfig(`log: off
defaults: { ${defaults} }
services: { s: { servers: ${servers} } }
default: { service: s }
${more}`);
  };
  const lb = createLoadBalancer(yaml(keys, servers, more), {
    now: () => clock.now,
    random: () => draws.shift() ?? 0.5,
    client: () => ({ address: "192.0.2.1", scheme: "http", headers: [] }),
    report: (level, text) => void (/ is (up|down|ejected)/.test(text) && reports.push(`${level} ${text}`)),
    sleep: (ms, signal) =>
      new Promise((wake) => {
        const sleeper = { at: clock.now + ms, wake };
        sleepers.add(sleeper);
        signal?.addEventListener("abort", () => sleepers.delete(sleeper));
      }),
    connect: (server, timeout) => {
      probes.push(`${server.name} connect ${timeout}`);
      const manner = health[server.name[0]!] ?? 200;
      return typeof manner === "string" ? Promise.reject(new Error(manner)) : Promise.resolve();
    },
    fetch: (url, attempt) => {
      const name = attempt.server.name[0]!;
      if (!attempt.headers.includes("lb.ts probe")) return behave(answers[asked = name] ?? 200, attempt, url);
      probes.push(`${name} ${url} ${attempt.method}`);
      return behave(health[name] ?? (() => Promise.resolve(new Response("ok"))), attempt, url);
    },
  });
  /** Asks once: who got it, or the failure where nobody did. */
  const ask = async (path = "/") => {
    asked = "";
    const response = await lb.fetch(new Request(`http://h${path}`, { headers: { host: "h" } }));
    await response.body?.cancel();
    return asked || response.headers.get("x-lb-failure")!;
  };
  const times = async (count: number) => {
    const names = [];
    for (let i = 0; i < count; i++) names.push(await ask());
    return names.join("");
  };
  /** Moves the clock and wakes who sleeps until then. */
  const advance = (ms: number) => {
    clock.now += ms;
    for (const sleeper of sleepers) {
      if (sleeper.at <= clock.now) sleepers.delete(sleeper), sleeper.wake();
    }
  };
  /** One round of probes after a time. */
  const probe = (ms = 20_000) => (advance(ms), lb.probe());
  const reload = (keys: string, servers = "[a:1, b:1]") => lb.reload(yaml(keys, servers));
  return { lb, clock, answers, health, probes, reports, draws, ask, times, advance, probe, reload };
}

// One letter a probe: + passes, - fails; below it who is asked afterwards: a while it may be, else b.
const COURSES: [rise: number, fall: number, probes: string, asked: string][] = [
  [1, 1, "+-+-", "abab"],
  [2, 3, "--+--+---+-++-++", "aaaaaaaabbbbaaaa"],
  [1, 3, "---+---+", "aabaaaba"],
  [3, 1, "-++-++++", "bbbbbbaa"],
];

for (const [rise, fall, course, expected] of COURSES) {
  test(`rise ${rise}, fall ${fall}: ${course} makes ${expected}, and each flip is reported once`, async () => {
    const { health, reports, ask, probe } = setUp(`health: { path: /healthz, rise: ${rise}, fall: ${fall} }`);
    let [asked, flips, was] = ["", 0, "a"];
    for (const verdict of course) {
      health.a = verdict === "+" ? 200 : 500;
      await probe();
      const name = await ask();
      if (name !== was) flips++;
      asked += was = name;
    }
    assert.equal(asked, expected);
    assert.equal(reports.length, flips);
    reports.forEach((text, i) =>
      assert.match(text, i % 2 ? /^info s: a:1 is up$/ : /^warn s: a:1 is down: status 500$/)
    );
  });
}

test("each server is probed again after its interval, give or take 10 %", async () => {
  const { probes, draws, advance, lb } = setUp(HEALTH, "[a:1]");
  const at: number[] = [];
  const random = [0, 0.5, 0.999_999, ...Array.from({ length: 50 }, (_, i) => i * 37 % 50 / 50)];
  for (let ms = 0; at.length < random.length; ms += 10, advance(10)) {
    if (draws.length === 0) draws.push(random[at.length]!);
    const before = probes.length;
    await lb.probe();
    if (probes.length > before) at.push(ms);
  }
  const gaps = at.slice(1).map((ms, i) => ms - at[i]!);
  assert.deepEqual(gaps.slice(0, 3), [9000, 10_000, 11_000]);
  assert.ok(gaps.every((gap) => gap >= 9000 && gap <= 11_000), `${gaps}`);
  assert.ok(new Set(gaps).size > 20, "servers that began together drift apart");
});

const EXPECTED: [probe: string, answer: number | [status: number, body: string], passes: boolean][] = [
  ["", 200, true],
  ["", 204, false],
  ["", 302, false],
  ["expect: 204", 204, true],
  ["expect: 200-399", 399, true],
  ["expect: 200-399", 400, false],
  ["expect: [200, 401, 500-599]", 401, true],
  ["expect: [200, 401, 500-599]", 599, true],
  ["expect: [200, 401, 500-599]", 402, false],
  ["body: ok", [200, "all is ok here"], true],
  ["body: ok", [200, "nothing is"], false],
  ["body: ok", [200, ""], false],
  ["body: ok", [500, "ok"], false],
];

test("a probe passes with an expected status and a body that contains what it has to", async () => {
  for (const [probeKeys, answer, passes] of EXPECTED) {
    const { health, ask, probe } = setUp(`health: { path: /healthz, fall: 1, ${probeKeys} }`);
    const [status, body] = typeof answer === "number" ? [answer, null] : answer;
    health.a = () => Promise.resolve(new Response(body, { status }));
    await probe();
    assert.equal(await ask(), passes ? "a" : "b", `${probeKeys} with ${answer}`);
  }
});

test("a probe is sent with its method, headers and path, and the server's own Host", async () => {
  const keys = "health: { path: /healthz, method: HEAD, headers: { Authorization: Basic eA==, x-a: 1 } }";
  const { health, probe, probes } = setUp(keys, '["https://a:8443", {url: b:1, host: own.test}]');
  const seen: string[][] = [];
  health.a = health.b = (attempt) => (seen.push(attempt.headers), Promise.resolve(new Response(null)));
  await probe();
  assert.deepEqual(probes, ["a https://a:8443/healthz HEAD", "b http://b:1/healthz HEAD"]);
  const own = ["user-agent", "lb.ts probe", "authorization", "Basic eA==", "x-a", "1"];
  assert.deepEqual(seen, [["host", "a:8443", ...own], ["host", "own.test", ...own]]);
});

test("the body of a probe's answer is read to its end where it matters, and given up where it does not", async () => {
  for (const [keys, status, end] of [["", 200, "cancel"], ["", 500, "cancel"], ["body: x", 200, "read"]] as const) {
    const { health, probe } = setUp(`health: { path: /healthz, ${keys} }`, "[a:1]");
    const ends: string[] = [];
    const pieces = ["x", "y"];
    health.a = () =>
      Promise.resolve(
        new Response(
          new ReadableStream({
            pull(controller) {
              const piece = pieces.shift();
              if (piece) return controller.enqueue(new TextEncoder().encode(piece));
              ends.push("read");
              controller.close();
            },
            cancel: () => void ends.push("cancel"),
          }, { highWaterMark: 0 }),
          { status },
        ),
      );
    await probe();
    assert.deepEqual(ends, [end], `${keys} ${status}`);
  }
});

test("a probe that takes longer than its timeout has failed: also in its body, and its connection is given up", async () => {
  const stuck = new ReadableStream({});
  for (const answer of [new Promise<Response>(() => {}), Promise.resolve(new Response(stuck))]) {
    const { health, ask, probe, advance, reports } = setUp(
      "health: { path: /healthz, timeout: 2s, fall: 1, body: ok }",
    );
    const given: AbortSignal[] = [];
    health.a = (attempt) => (given.push(attempt.request.signal), answer);
    const round = probe();
    advance(1999);
    assert.equal(await ask(), "a");
    assert.equal(given[0]!.aborted, false);
    advance(1);
    await round;
    assert.equal(await ask(), "b");
    assert.equal(given[0]!.aborted, true);
    assert.deepEqual(reports, ["warn s: a:1 is down: no answer within 2000 ms"]);
  }
});

test("without a path a probe is a TCP connect", async () => {
  const { health, probes, reports, probe, ask } = setUp("health: { fall: 1, rise: 1, timeout: 700ms }");
  health.a = "connect";
  await probe();
  assert.deepEqual(probes, ["a:1 connect 700", "b:1 connect 700"]);
  assert.equal(await ask(), "b");
  health.a = 200;
  await probe();
  assert.equal(await ask(), "a");
  assert.deepEqual(reports, ["warn s: a:1 is down: connect", "info s: a:1 is up"]);
});

test("health: off probes nobody and takes nobody out", async () => {
  const { health, probes, probe, ask } = setUp(OFF);
  health.a = health.b = "connect";
  for (let i = 0; i < 5; i++) await probe();
  assert.deepEqual([probes, await ask()], [[], "a"]);
});

const EJECT = "health: off, eject: { failures: 3, for: 30s }";

test("requests that fail so many times in a row eject a server, an answer in between begins anew", async () => {
  for (
    const [manner, counts] of Object.entries({
      502: true,
      503: true,
      504: true,
      500: false,
      404: false,
      connect: true,
      "connect-timeout": true,
      reset: true,
      timeout: true,
      "invalid-answer": true,
      "client-left": false,
      "client-timeout": false,
      "bad-body": false,
      "body-too-large": false,
    })
  ) {
    const { answers, times, reports } = setUp(EJECT);
    const bad = (Number(manner) || manner) as Manner;
    answers.a = bad;
    assert.equal(await times(2), "aa", manner);
    answers.a = 200;
    assert.equal(await times(1), "a", manner);
    answers.a = bad;
    assert.equal(await times(4), counts ? "aaab" : "aaaa", manner);
    assert.deepEqual(reports, counts ? ["warn s: a:1 is ejected for 30 s after 3 failures in a row"] : [], manner);
  }
});

test("an answer that is cut off counts as a failure, and one that the client cuts off does not", async () => {
  for (const [problem, asked] of [["reset", "aaab"], ["idle", "aaab"], ["client-left", "aaaa"]] as const) {
    const { answers, times } = setUp(EJECT);
    let cut = () => {};
    answers.a = (attempt) => {
      cut = () => attempt.ended(200, 5, problem);
      return Promise.resolve(new Response(null));
    };
    let names = "";
    for (let i = 0; i < 4; i++, cut(), cut = () => {}) names += await times(1);
    assert.equal(names, asked, problem);
  }
});

test("an ejection ends by itself with one trial, grows when it happens again, and is forgiven later", async () => {
  const { answers, times, advance, ask } = setUp(EJECT);
  answers.a = "reset";
  assert.equal(await times(4), "aaab");
  for (const seconds of [30, 60, 90]) { // each time a is back for one trial, which fails
    advance(seconds * 1000 - 1);
    assert.equal(await ask(), "b", `${seconds} s`);
    advance(1);
    assert.equal(await times(2), "ab", `after ${seconds} s`);
  }
  advance(120_000);
  answers.a = 200;
  assert.equal(await times(2), "aa"); // the trial passes
  answers.a = "reset";
  assert.equal(await times(4), "aaab", "a passed trial ends the run of failures");
  advance(150_000 - 1);
  assert.equal(await ask(), "b", "but not yet the memory of ejections");
  advance(1);
  answers.a = 200;
  assert.equal(await ask(), "a");
  advance(30_001);
  assert.equal(await ask(), "a"); // well after: forgiven
  answers.a = "reset";
  assert.equal(await times(4), "aaab");
  advance(30_000);
  assert.equal(await ask(), "a", "as the first time");
});

test("what was in flight when a server was ejected does not lengthen its ejection", async () => {
  const { answers, advance, ask, times } = setUp(EJECT, "[a:1, b:1, c:1, d:1]");
  const late = Promise.withResolvers<Response>();
  answers.a = () => late.promise;
  const waiting = [ask(), ask(), ask(), ask()];
  answers.a = "reset";
  assert.equal(await times(4), "aaab");
  advance(20_000);
  late.reject(new WireError("reset", true, "reset"));
  await Promise.all(waiting);
  advance(10_000);
  assert.equal(await ask(), "a");
});

test("at_most bounds how many servers of a service are ejected at a time", async () => {
  const rows: [servers: string, atMost: string, asked: string][] = [
    ["[a:1]", "50%", "aaaaaa"],
    ["[a:1]", "100%", "a"],
    ["[a:1, b:1]", "50%", "abbbbbb"],
    ["[a:1, b:1]", "0%", "aaaaa"],
    ["[a:1, b:1, c:1, d:1]", "50%", "abcccccc"],
    ["[a:1, b:1, c:1, d:1]", "75%", "abcddddd"],
  ];
  for (const [servers, atMost, asked] of rows) {
    const { answers, times } = setUp(`health: off, eject: { failures: 1, for: 1d, at_most: ${atMost} }`, servers);
    answers.a =
      answers.b =
      answers.c =
      answers.d =
        "reset";
    assert.equal(await times(asked.length), asked, `${servers} ${atMost}`);
  }
});

test("eject: off ejects nobody", async () => {
  const { answers, times } = setUp("health: off, eject: off");
  answers.a = "reset";
  assert.equal(await times(100), "a".repeat(100));
});

test("a passing probe brings an ejected server back at once", async () => {
  const { answers, times, probe, reports } = setUp(`${HEALTH}, eject: { failures: 2, for: 1d }`);
  answers.a = "reset";
  assert.equal(await times(3), "aab");
  await probe();
  answers.a = 200;
  assert.equal(await times(2), "aa");
  assert.deepEqual(reports.map((text) => / is (up|ejected)/.exec(text)?.[1]), ["ejected", "up"]);
});

const PANIC: [servers: string, panic: string, down: string, asked: string][] = [
  ["[a:1, b:1, c:1, d:1]", "50%", "", "abcd"],
  ["[a:1, b:1, c:1, d:1]", "50%", "ab", "cd"],
  ["[a:1, b:1, c:1, d:1]", "50%", "abc", "abcd"],
  ["[a:1, b:1, c:1, d:1]", "50%", "abcd", "abcd"],
  ["[a:1, b:1, c:1, d:1]", "100%", "a", "abcd"],
  ["[a:1, b:1, c:1, d:1]", "0%", "abc", "d"],
  ["[a:1, b:1]", "0%", "ab", "no-server"],
  ["[a:1, b:1, {url: c:1, weight: 0}]", "50%", "ab", "ab"],
  ["[a:1, b:1, {url: c:1, backup: true}]", "50%", "", "ab"],
  ["[a:1, b:1, {url: c:1, backup: true}]", "50%", "a", "b"],
  ["[a:1, b:1, {url: c:1, backup: true}]", "50%", "ab", "c"],
  ["[a:1, b:1, {url: c:1, backup: true}]", "50%", "abc", "ab"],
  ["[{url: a:1, backup: true}, {url: b:1, backup: true}]", "50%", "a", "b"],
];

test("backups are asked where no other may be; where too few may be, all are asked rather than none", async () => {
  for (const [servers, panic, down, expected] of PANIC) {
    const { health, probe, ask } = setUp(`${HEALTH}, panic: ${panic}, strategy: round-robin`, servers);
    for (const name of down) health[name] = 500;
    await probe();
    const asked = new Set<string>();
    for (let i = 0; i < 8; i++) asked.add(await ask());
    assert.equal([...asked].sort().join(""), expected, `${servers}, panic ${panic}, down: ${down}`);
  }
});

test("when the clock jumps an hour nobody is ejected, and everybody is probed once", async () => {
  const { probes, probe, times, reports } = setUp(
    `${HEALTH}, eject: { failures: 1, at_most: 100% }, strategy: round-robin`,
  );
  await probe();
  await probe(3_600_000);
  assert.equal(await times(4), "abab");
  assert.equal(probes.length, 4);
  assert.deepEqual(reports, []);
});

test("a reload keeps what is known of a server that stays, by service and URL", async () => {
  const { answers, health, times, probe, ask, reload } = setUp(
    `${HEALTH}, eject: { failures: 1, for: 1d }`,
    "[a:1, b:1, c:1]",
    "paths: [{ path: /other, servers: [b:1, a:1] }]",
  );
  health.a = 500;
  answers.b = "reset";
  await probe();
  assert.equal(await times(2), "bc"); // a is down, b has been ejected
  assert.equal(await ask("/other"), "b", "the same URL in another service is another server");
  reload(`${HEALTH}, eject: { failures: 1, for: 1d }`, "[d:1, {url: a:1, weight: 7}, b:1, c:1]");
  assert.equal(await times(1), "d");
  reload(HEALTH, "[a:1, b:1, c:1]");
  assert.equal(await times(1), "c", "still");
  reload(HEALTH, "[c:1]");
  reload(HEALTH, "[a:1, c:1]");
  assert.equal(await times(1), "a", "one that had left is new");
});

test("a reload to health: off lets nobody stay down, for nobody would bring it up", async () => {
  const { health, probe, ask, reload } = setUp(HEALTH);
  health.a = 500;
  await probe();
  assert.equal(await ask(), "b");
  reload(OFF);
  assert.equal(await ask(), "a");
});

test("what a probe or a request finds out that began before a reload holds after it", async () => {
  const { answers, health, ask, lb, reload } = setUp(
    `${HEALTH}, eject: { failures: 1, for: 1d }`,
    "[a:1, b:1, c:1, d:1]",
  );
  const [probed, asked] = [Promise.withResolvers<Response>(), Promise.withResolvers<Response>()];
  health.a = () => probed.promise;
  answers.b = () => asked.promise;
  const round = lb.probe();
  lb.balancer.table.services.get("s")!.servers[0]!.weight = 0; // so that b is asked
  const request = ask();
  reload(`${HEALTH}, eject: { failures: 1, for: 1d }`, "[a:1, b:1, c:1, d:1]");
  assert.equal(await ask(), "a");
  probed.resolve(new Response(null, { status: 500 }));
  asked.reject(new WireError("reset", true, "reset"));
  await Promise.all([round, request]);
  assert.equal(await ask(), "c");
});
