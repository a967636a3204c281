// Which servers may be asked: every transition by probes and by requests, on a clock that only the test moves.

import assert from "node:assert/strict";
import { test } from "node:test";
import { createAdmin, type Failure, type FetchAttempt, parseConfig, type Strategy, WireError } from "../../lb.ts";
import { answerTo, balancerFor } from "../rig/balancer.ts";
import type { Fields, Strategies } from "../rig/types.ts";

/** How a server behaves: a status, a failure before the answer, or something of its own. */
type Manner = number | Failure | Behaviour;
type Behaviour = (attempt: FetchAttempt, url: string) => Promise<Response>;

const HEALTH = "health: { path: /healthz, interval: 10s, timeout: 2s, rise: 1, fall: 1 }";
const OFF = "health: off";

/** A balancer over `servers`, with the first one asked first; `answers` and `health` say how each of them behaves. */
function setUp(keys: string, servers = "[a:1, b:1]", more = "", own: Strategies = {}) {
  const sleepers = new Set<{ at: number; wake: () => void }>();
  const [answers, health]: [Record<string, Manner>, Record<string, Manner>] = [{}, {}];
  const [probes, reports]: [string[], string[]] = [[], []];
  const draws: number[] = [];
  let asked = "";
  const behave = async (manner: Manner, attempt: FetchAttempt, url: string) => {
    if (typeof manner === "function") return await manner(attempt, url);
    if (typeof manner === "string") throw new WireError(manner, manner !== "connect", `it says ${manner}`);
    return answerTo(attempt, manner);
  };
  /** A server that needs a time: the clock moves on by it. */
  const takes = (ms: number, status = 200): Manner => (attempt) => {
    clock.now += ms;
    return answerTo(attempt, status);
  };
  const yaml = (keys: string, servers: string, more = "") => {
    const usual = ["retries: 0", "strategy: first", "panic: 0%"].filter((one) => !keys.includes(one.split(" ")[0]!));
    const defaults = [...usual, keys].join(", ");
    return `log: off
defaults: { ${defaults} }
services: { s: { servers: ${servers} } }
default: { service: s }
${more}`;
  };
  const { lb, clock, send, service: serviceNamed } = balancerFor(yaml(keys, servers, more), {
    random: () => draws.shift() ?? 0.5,
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
    strategies: own,
  });
  /** Asks once: who got it, or the failure where nobody did. */
  const ask = async (path = "/") => {
    asked = "";
    const response = await send(`http://h${path}`);
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
  const reload = (keys: string, servers = "[a:1, b:1]") =>
    lb.reload(parseConfig(yaml(keys, servers), { strategies: own }));
  const service = serviceNamed("s");
  return { lb, service, clock, answers, health, probes, reports, draws, ask, times, takes, advance, probe, reload };
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
  const seen: Fields[] = [];
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
    health.a = (attempt) => (given.push(attempt.signal), answer);
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

// ─── Those who fall behind the others ───

const FOUR = "[a:1, b:1, c:1, d:1]";
const TURNS = "health: off, strategy: round-robin";

test("a server that takes slow times the median of its pool is ejected, after 20 answers of each", async () => {
  const { answers, times, takes, reports, clock } = setUp(TURNS, FOUR);
  answers.a = takes(100);
  answers.b = answers.c = answers.d = takes(10);
  assert.equal(await times(76), "abcd".repeat(19));
  clock.now += 1000;
  assert.equal(await times(4), "abcd", "the comparison was before these answers");
  clock.now += 1000;
  assert.equal((await times(6)).includes("a"), false);
  assert.deepEqual(reports, ["warn s: a:1 is ejected for 30 s because it takes 100 ms where 10 ms are usual"]);
});

test("nobody is ejected for being slow where that says nothing", async () => {
  const rows: [why: string, keys: string, servers: string, slow: number, usual: number][] = [
    ["within the factor", "", FOUR, 29, 10],
    ["a larger factor", "eject: {slow: 20}", FOUR, 150, 10],
    ["switched off", "eject: {slow: off}", FOUR, 1000, 10],
    ["no ejections at all", "eject: off", FOUR, 1000, 10],
    ["too few servers", "", "[a:1, b:1]", 1000, 10],
    ["none may be", "eject: {at_most: 0%}", FOUR, 1000, 10],
    ["so little that nobody minds", "", FOUR, 5, 1],
  ];
  for (const [why, keys, servers, slow, usual] of rows) {
    const { answers, times, takes, clock } = setUp([TURNS, keys].filter(Boolean).join(", "), servers);
    answers.a = takes(slow);
    answers.b = answers.c = answers.d = takes(usual);
    for (let i = 0; i < 10; i++, clock.now += 1000) assert.ok((await times(40)).includes("a"), why);
  }
});

test("one answer in 40 that takes long, a report say, ejects nobody", async () => {
  const { answers, times, takes, clock } = setUp(TURNS, FOUR);
  let turn = 0;
  answers.b = answers.c = answers.d = takes(10);
  answers.a = (attempt, url) => (takes(turn++ % 40 ? 10 : 5000) as Behaviour)(attempt, url);
  for (let i = 0; i < 20; i++, clock.now += 1000) assert.ok((await times(40)).includes("a"));
});

test("a server that hangs is ejected before it has answered", async () => {
  const { answers, ask, times, takes, clock, reports } = setUp(TURNS, FOUR);
  answers.a =
    answers.b =
    answers.c =
    answers.d =
      takes(10);
  await times(400);
  const stuck = Promise.withResolvers<Response>();
  answers.a = () => stuck.promise;
  const waiting: Promise<string>[] = [];
  for (let i = 0; i < 600; i++) waiting.push(ask()), await undefined, clock.now += 5;
  await times(8);
  clock.now += 1000;
  assert.equal((await times(9)).includes("a"), false);
  assert.match(reports.join(), /a:1 is ejected for 30 s because it takes \d+ ms where \d+ ms are usual$/);
  stuck.reject(new WireError("timeout", true, "at last"));
  await Promise.all(waiting);
  clock.now += 29_000;
  assert.ok((await times(4)).includes("a"), "and what it then still says makes that no longer");
});

test("a server that is slow because it has more to do than the others is not ejected: they would have even more", async () => {
  for (const [shares, ejected] of [["aabc", false], ["abc", true]] as const) {
    const own: Strategy = (candidates, { turn }) =>
      candidates.find(({ name }) => name[0] === shares[turn % shares.length]) ?? candidates[0];
    const { answers, times, takes, clock, reports } = setUp("health: off, strategy: own", "[a:1, b:1, c:1]", "", {
      own,
    });
    answers.a = takes(50);
    answers.b = answers.c = takes(10);
    for (let i = 0; i < 20; i++, clock.now += 1000) await times(20);
    assert.equal(reports.length > 0, ejected, shares);
  }
});

test("where the others cannot bear what a slow server leaves to them, it is asked again, and stays for a while", async () => {
  const { answers, ask, times, takes, clock, service, reports } = setUp(TURNS, FOUR);
  answers.a = takes(100);
  answers.b = answers.c = answers.d = takes(10);
  await times(80);
  clock.now += 1000;
  await times(8);
  assert.equal(reports.length, 1);
  const stuck = Promise.withResolvers<void>();
  answers.b = answers.c = answers.d = async (attempt) => (await stuck.promise, answerTo(attempt));
  const waiting = Array.from({ length: 9 }, () => ask());
  clock.now += 1000;
  assert.equal(service.servers[0]!.ejectedUntil > 0, true);
  waiting.push(ask(), ask()); // three at each: more than 3 times none, and 2
  clock.now += 1000;
  waiting.push(ask());
  assert.deepEqual([service.servers[0]!.ejectedUntil, service.servers[0]!.slow], [0, false]);
  stuck.resolve();
  await Promise.all(waiting);
  answers.b = answers.c = answers.d = takes(10);
  for (let i = 0; i < 30; i++, clock.now += 1000) assert.ok((await times(20)).includes("a"));
  for (let i = 0; i < 20; i++, clock.now += 1000) await times(20);
  assert.equal((await times(8)).includes("a"), false, "its time of grace is over");
});

test("the more servers are out already, the slower the next one has to be", async () => {
  for (const [slow, out] of [[35, 1], [300, 2]] as const) {
    const { answers, times, takes, clock, service } = setUp(TURNS, FOUR);
    answers.a = answers.b = takes(slow);
    answers.c = answers.d = takes(10);
    answers.a = takes(1000);
    await times(200);
    for (let i = 0; i < 10; i++, clock.now += 1000) await times(20);
    assert.equal(service.servers.filter((server) => server.ejectedUntil > 0).length, out, `${slow} ms`);
  }
});

test("a server whose success rate is out of line with that of the others is ejected", async () => {
  const rows: [why: string, share: Record<string, number>, out: string, names?: string][] = [
    ["every second request", { a: 0.5 }, "a"],
    ["one of three", { b: 0.5 }, "b", "abc"],
    ["one of two: nobody knows which is right", { b: 0.5 }, "", "ab"],
    ["two of eight", { a: 0.6, b: 0.5 }, "ab", "abcdefgh"],
    ["every fifth", { c: 0.2 }, "c"],
    ["every fiftieth", { c: 0.02 }, ""],
    ["all alike", { a: 0.5, b: 0.5, c: 0.5, d: 0.5 }, ""],
  ];
  for (const [why, shares, out, names = "abcd"] of rows) {
    for (const status of [500, 503]) {
      const servers = `[${[...names].map((name) => `${name}:1`)}]`;
      const { answers, times, takes, clock } = setUp(`${TURNS}, eject: {failures: 1000000}`, servers);
      for (const name of names) {
        let sum = 0;
        const share = shares[name] ?? 0;
        answers[name] = (attempt, url) => {
          const bad = (sum += share) >= 1;
          if (bad) sum--;
          return (takes(10, bad ? status : 200) as Behaviour)(attempt, url);
        };
      }
      await times(65 * names.length);
      for (let i = 0; i < 5; i++, clock.now += 1000) await times(40);
      const asked = await times(24);
      assert.equal([...names].filter((name) => !asked.includes(name)).join(""), out, `${why}, ${status}`);
    }
  }
});

test("a reload in the middle of it does not confuse the comparison", async () => {
  const { answers, times, takes, clock, reload } = setUp(TURNS, FOUR);
  answers.a = takes(100);
  answers.b = answers.c = answers.d = takes(10);
  for (let i = 0; i < 20; i++) {
    reload(TURNS, FOUR);
    await times(4);
  }
  clock.now += 1000;
  assert.equal((await times(8)).includes("a"), false);
});

test("servers are compared once a second at most", async () => {
  const { service, times, clock, lb } = setUp(TURNS, FOUR);
  const at: number[] = [];
  for (let i = 0; i < 50; i++, clock.now += 100) {
    const before = service.compareAt;
    await times(5);
    if (service.compareAt !== before) at.push(clock.now);
  }
  assert.deepEqual(at, [0, 1000, 2000, 3000, 4000]);
  lb.reload(parseConfig("log: off\ndefault: { servers: [a:1], eject: off }"));
  assert.equal(lb.balancer.table.services.get("default")!.compareAt, Infinity);
});

// ─── The way back ───

/** A server that fails until it has been ejected; then the clock stands where it may be tried out. */
async function onTrial(keys = "", servers = FOUR) {
  const all = setUp(`health: off, strategy: round-robin, eject: { failures: 1 }${keys && ", "}${keys}`, servers);
  all.answers.a = "reset";
  await all.times(all.service.servers.length);
  all.answers.a = 200;
  all.advance(29_999);
  assert.equal((await all.times(12)).includes("a"), false);
  all.advance(1);
  return all;
}

test("after an ejection one request tries the server out, and nobody else is sent there until it has been answered", async () => {
  const { answers, ask, times, reports, service } = await onTrial();
  const trial = Promise.withResolvers<void>();
  answers.a = async (attempt) => (await trial.promise, answerTo(attempt));
  const server = service.servers[0]!, { picks } = server, ejected = reports.length;
  const asked = [ask(), ask(), ask(), ask()];
  assert.equal((await times(20)).includes("a"), false);
  assert.deepEqual([server.trialInFlight, server.ejectedUntil > 0, server.picks], [true, true, picks + 1]);
  trial.resolve();
  await Promise.all(asked);
  assert.deepEqual([server.trialInFlight, server.ejectedUntil, server.picks], [false, 0, picks + 1]);
  answers.a = 200;
  assert.equal((await times(20)).match(/a/g)!.length, 5);
  assert.deepEqual(reports.slice(ejected), ["info s: a:1 is up again"]);
});

test("a trial that fails ejects again, whatever a failure was before: a reset, a 503, a 500, an answer that breaks off", async () => {
  const cut: Manner = (attempt) => {
    setTimeout(() => attempt.ended(200, 1, "reset"));
    return Promise.resolve(new Response(null));
  };
  for (const manner of ["reset", 503, 500, "timeout", cut] as Manner[]) {
    const { answers, times, advance } = await onTrial();
    answers.a = manner;
    await times(4);
    await new Promise((go) => setTimeout(go, 1));
    assert.equal((await times(12)).includes("a"), false, String(manner));
    advance(59_999);
    answers.a = 200;
    assert.equal((await times(12)).includes("a"), false, "for twice as long");
    advance(1);
    assert.ok((await times(8)).includes("a"));
  }
});

test("a trial whose client leaves decides nothing: the next request is one", async () => {
  for (const stuck of [false, true]) { // whether the server still has a request from before
    const { answers, times, service } = await onTrial();
    if (stuck) service.servers[0]!.inFlight++;
    answers.a = "client-left";
    assert.equal((await times(12)).match(/a/g)!.length, 3);
    answers.a = "reset";
    assert.equal((await times(12)).match(/a/g)!.length, 1);
  }
});

test("a retry is no trial", async () => {
  const { answers, service, ask } = await onTrial("retries: 1", "[a:1, b:1, c:1]");
  answers.b = "reset";
  service.turn = 4; // b's; of a and c it would be a's
  assert.equal(await ask(), "c");
  assert.equal(service.servers[0]!.trialInFlight, false);
});

test("a server that was slow comes back when it is no longer: probes cannot tell", async () => {
  const { answers, times, takes, clock, advance, probe, reports } = setUp(
    "health: { path: /healthz, rise: 1, fall: 1 }, strategy: round-robin",
    FOUR,
  );
  answers.a = takes(100);
  answers.b = answers.c = answers.d = takes(10);
  await times(80);
  clock.now += 1000;
  await times(8);
  assert.match(reports.at(-1)!, /a:1 is ejected for 30 s because it takes 100 ms/);
  await probe(10_000);
  assert.equal((await times(8)).includes("a"), false, "the probe has passed");
  advance(20_000);
  assert.equal((await times(8)).match(/a/g)!.length, 1, "the trial");
  assert.match(reports.at(-1)!, /a:1 is ejected for 60 s because it still takes 100 ms/);
  answers.a = takes(12);
  advance(60_000);
  assert.equal((await times(80)).match(/a/g)!.length, 20);
  for (let i = 0; i < 5; i++, clock.now += 1000) await times(20);
  assert.match(reports.at(-1)!, /a:1 is up again/);
});

test("a probe that passes lets a server that has failed be tried out at once", async () => {
  const { answers, times, probe } = setUp(`${HEALTH}, eject: { failures: 1, for: 1d }`);
  answers.a = "reset";
  await times(2);
  await probe();
  assert.equal(await times(3), "abb", "and it fails again");
  await probe();
  answers.a = 200;
  assert.equal(await times(3), "aaa");
});

test("slow_start: who comes back, or is new, begins with 10 % of its weight and has all of it when that time is over", async () => {
  const share = async (all: { times: (count: number) => Promise<string> }, name: string) =>
    (await all.times(1000)).split(name).length - 1;
  const all = await onTrial("slow_start: 100s");
  await all.times(4);
  for (const [seconds, part] of [[0, 0.1], [5, 0.1], [20, 0.2], [50, 0.5], [99, 0.99], [100, 1]] as const) {
    all.clock.now = 30_000 + seconds * 1000;
    all.service.candidatesUntil = 0;
    const expected = 1000 * part / (3 + part);
    assert.ok(Math.abs(await share(all, "a") - expected) <= 2, `${seconds} s: ${expected}`);
  }
  const keys = "health: { path: /healthz, rise: 1, fall: 1 }, strategy: round-robin, slow_start: 10s";
  const probed = setUp(keys, "[a:1, b:1]");
  assert.equal(await share(probed, "a"), 500, "not at the beginning");
  probed.health.a = 500;
  await probed.probe();
  probed.health.a = 200;
  await probed.probe();
  assert.ok(Math.abs(await share(probed, "a") - 1000 * 0.1 / 1.1) <= 2);
  probed.advance(10_000);
  assert.equal(await share(probed, "a"), 500);
  probed.reload(keys, "[a:1, b:1, c:1]");
  assert.ok(Math.abs(await share(probed, "c") - 1000 * 0.1 / 2.1) <= 2, "a new one");
  probed.reload(keys, "[a:1, {url: b:1, state: drain}, c:1]");
  probed.advance(10_000);
  assert.equal(await share(probed, "b"), 0);
  probed.reload(keys, "[a:1, b:1, c:1]");
  assert.ok(Math.abs(await share(probed, "b") - 1000 * 0.1 / 2.1) <= 2, "one that was drained");
});

// ─── Those who ask to be left alone ───

/** An answer with Retry-After. */
const later = (status: number, after: string): Manner => (attempt) =>
  answerTo(attempt, status, { "retry-after": after });

test("Retry-After of a 503 or 429: others are asked until then, at most as long as an ejection", async () => {
  const rows: [status: number, after: string, seconds: number][] = [
    [503, "7", 7],
    [429, "7", 7],
    [503, "86400", 30],
    [503, new Date(9000).toUTCString(), 9],
    [503, "soon", 0],
    [503, "-1", 0],
    [500, "7", 0],
    [200, "7", 0],
  ];
  for (const [status, after, seconds] of rows) {
    const { answers, times, clock, service } = setUp("health: off, strategy: round-robin", "[a:1, b:1]");
    answers.a = later(status, after);
    await times(2);
    assert.equal(service.servers[0]!.pausedUntil, seconds * 1000, `${status} ${after}`);
    if (!seconds) continue;
    answers.a = 200;
    clock.now = seconds * 1000 - 1;
    assert.equal(await times(4), "bbbb");
    clock.now++;
    assert.equal((await times(4)).match(/a/g)!.length, 2);
  }
});

test("Retry-After: where more than at_most of the pool ask for it, they are asked all the same; eject: off ignores it", async () => {
  for (
    const [keys, paused, asked] of [["", "ab", "cd"], ["", "abc", "abcd"], ["eject: {at_most: 100%}", "abc", "d"], [
      "eject: {at_most: 100%}",
      "abcd",
      "abcd",
    ], ["eject: off", "a", "abcd"]] as const
  ) {
    const { answers, times } = setUp([TURNS, keys].filter(Boolean).join(", "), FOUR);
    for (const name of paused) answers[name] = later(429, "5");
    await times(4);
    assert.equal([...new Set(await times(8))].sort().join(""), asked, `${keys} ${paused}`);
  }
});

test("Retry-After: no retry goes to who has said it, and where nobody else is left, the client is told so", async () => {
  const alone = setUp("health: off, retries: 3", "[a:1]");
  let count = 0;
  alone.answers.a = (
    attempt,
    url,
  ) => (count++, (later(503, "5") as Behaviour)(attempt, url));
  const { status, headers } = await alone.lb.fetch(new Request("http://h/", { headers: { host: "h" } }));
  assert.deepEqual([status, headers.get("retry-after"), count], [503, "5", 1]);
  const two = setUp("health: off, retries: 3, eject: {at_most: 100%}", "[a:1, b:1]");
  two.answers.a = later(503, "5");
  two.answers.b = 503;
  const asked: string[] = [];
  const noted = (name: string): Manner => {
    const manner = two.answers[name]!;
    return (attempt, url) => {
      asked.push(name);
      return typeof manner === "function" ? manner(attempt, url) : answerTo(attempt, manner as number);
    };
  };
  two.answers.a = noted("a");
  two.answers.b = noted("b");
  const answer = two.lb.fetch(new Request("http://h/", { headers: { host: "h" } }));
  for (let i = 0; i < 80; i++) await undefined, two.advance(20);
  await answer;
  assert.equal(asked.join(""), "abbb");
});

// ─── What a server can bear ───

/** A server that works on so many requests at a time, and always has so many clients; its limit after so many seconds. */
function saturate({ answers, clock, ask, service }: ReturnType<typeof setUp>) {
  const queue: (() => void)[] = [], waiting = new Set<Promise<string>>();
  answers.a = (attempt) => new Promise((resolve) => queue.push(() => resolve(answerTo(attempt))));
  return async (clients: number, workers: number, seconds: number, takes = 10) => {
    for (const end = clock.now + seconds * 1000; clock.now < end;) {
      while (waiting.size < clients) {
        const one = ask();
        waiting.add(one);
        void one.then(() => waiting.delete(one));
      }
      clock.now += takes;
      for (const answer of queue.splice(0, workers)) answer();
      for (let i = 0; i < 20; i++) await undefined;
    }
    return service.servers[0]!.limit;
  };
}

test("max_in_flight: auto finds what a server can bear, and finds it again when that changes", async () => {
  const all = setUp("health: off, queue: { size: 1000, timeout: 1d }, max_in_flight: auto", "[a:1]");
  const run = saturate(all), server = all.service.servers[0]!;
  assert.equal(server.limit, 8, "nothing is known yet");
  assert.equal(await run(3, 4, 10), 8, "who is not busy stays as it is");
  for (
    const [workers, takes, least, most] of [[4, 10, 4, 16], [16, 10, 16, 60], [4, 10, 4, 20], [4, 30, 2, 20]] as const
  ) {
    const limit = await run(2 * most, workers, 20, takes);
    assert.ok(limit >= least && limit <= most, `${workers} at a time, ${takes} ms: ${limit}`);
  }
  const found = server.limit;
  all.reload("health: off, max_in_flight: auto", "[{url: a:1, weight: 2}]");
  assert.equal(server.limit, found, "a reload forgets nothing");
  all.reload("health: off, max_in_flight: auto", "[{url: a:1, max: 1}]");
  assert.equal(server.limit, 1);
  all.reload("health: off, max_in_flight: 9", "[a:1]");
  assert.equal(server.limit, 9);
  all.reload("health: off", "[a:1]");
  assert.equal(server.limit, Infinity);
});

test("max_in_flight: auto takes a 429, a 5xx or a failure for too much", async () => {
  for (const manner of [429, 503, 500, "reset"] as const) {
    const { answers, times, clock, service } = setUp("health: off, eject: off, max_in_flight: auto", "[a:1]");
    const server = service.servers[0]!;
    server.inFlight = 6; // others, that take long
    answers.a = manner;
    await times(10);
    clock.now += 250;
    await times(10);
    assert.equal(server.limit, 8 * 0.9, `${manner}`);
  }
});

test("max_in_flight: auto is shown to those who look", async () => {
  const { lb } = setUp("health: off, max_in_flight: auto", "[a:1]");
  const answer = await createAdmin(lb).request("/services/s", { headers: { host: "localhost" } });
  const { servers } = await answer.json() as { servers: { limit: number }[] };
  assert.equal(servers[0]!.limit, 8);
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
