// Which server takes a request: exact sequences, exact or tested shares, and what every strategy has to keep.

import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { type Server, strategies, type Strategy } from "../../lb.ts";
import { balancerFor } from "../rig/balancer.ts";
import { requestOf, seeded, TestBytes } from "../rig/rig.ts";
import type { Candidates, PickInput } from "../rig/types.ts";

type Answer = (status?: number) => Promise<void>;
interface Ask {
  path?: string;
  headers?: Record<string, string>;
  client?: string;
}

/** A balancer over `servers`; `pick` sends a request and says who got it, `end` has that server's oldest one answered. */
function setUp(keys: string, servers = "[S0:1, S1:1, S2:1, S3:1]", own: Record<string, Strategy> = {}, seed = 1) {
  const pending = new Map<string, Answer[]>();
  let picked = "";
  const yaml = `log: off\ndefault: { servers: ${servers}, retries: 0${keys && ", "}${keys} }`;
  const { lb, clock, service } = balancerFor(yaml, {
    random: seeded(seed),
    send: (attempt) => {
      picked = attempt.server.name.split(":")[0]!;
      const answer = async (status = 200) => {
        attempt.onHead({ status, reason: "", fields: [], body: new TestBytes("") });
        attempt.onEnd(undefined, "", true);
        for (let i = 0; i < 9; i++) await undefined; // until the balancer has seen it
      };
      const waiting = pending.get(picked);
      if (waiting) waiting.push(answer);
      else pending.set(picked, [answer]);
    },
    strategies: own,
  });
  const pick = ({ path = "/", headers = {}, client = "192.0.2.1" }: Ask = {}): string => {
    const fields = ["host", "a", ...Object.entries(headers).flat()];
    lb.handle(requestOf({ target: path, fields, peer: client }));
    return picked.toLowerCase();
  };
  const end = (name: string, status?: number) => pending.get(name)!.shift()!(status);
  /** Picks and has each one answered at once. */
  const once = async (ask?: Ask) => {
    const name = pick(ask);
    await end(name);
    return name;
  };
  return { lb, clock, pick, end, once, service: service() };
}

/** Servers for routes.yml. */
const list = (names: string[]) => `[${names.map((name) => `"${name}:1"`)}]`;

const counts = (names: string[]) => {
  const out: Record<string, number> = {};
  for (const name of names) out[name] = (out[name] ?? 0) + 1;
  return out;
};

/** Whether counts fit shares: chi-square below its 0.1 % point for one to nine degrees of freedom. */
function fits(names: string[], shares: Record<string, number>) {
  const [seen, sum] = [counts(names), Object.values(shares).reduce((a, b) => a + b)];
  const point = [10.8, 13.8, 16.3, 18.5, 20.5, 22.5, 24.3, 26.1, 27.9][Object.keys(shares).length - 2]!;
  const chi = Object.entries(shares).reduce((total, [name, share]) => {
    const expected = names.length * share / sum;
    return total + ((seen[name] ?? 0) - expected) ** 2 / expected;
  }, 0);
  assert.ok(chi < point, `chi-square ${chi.toFixed(1)} is over ${point}: ${JSON.stringify(seen)}`);
}

const SEQUENCES: [strategy: string, nothingEnds: string, withEnds?: string][] = [
  ["first", "s0 s0 s0 s0 s0 s0 s0 s0", "s0 s0 s0 s0 s0 s0 s0 s0"],
  ["round-robin", "s0 s1 s2 s3 s0 s1 s2 s3", "s0 s1 s2 s3 s0 s1 s2 s3"],
  ["least-connections", "s0 s1 s2 s3 s0 s1 s2 s3", "s0 s1 s2 s3 s0 s0 s3 s2"],
  ["least-response-time", "s0 s1 s2 s3 s0 s1 s2 s3", "s0 s1 s2 s3 s0 s1 s2 s1"],
];

for (const [strategy, nothingEnds, withEnds] of SEQUENCES) {
  test(`${strategy} picks servers in its known order`, async () => {
    for (const [expected, ends] of [[nothingEnds, []], [withEnds, ["s0", "s3", "s2", "s0"]]] as const) {
      const { clock, pick, end } = setUp(`strategy: ${strategy}`, "[s0:1, s1:1, s2:1, s3:1]");
      const picks = [];
      for (let i = 0; i < 8; i++, clock.now += 100) {
        picks.push(pick());
        // `first` has no request at the others: there is nothing to end
        if (i >= 4 && ends.length && strategy !== "first") await end(ends[i - 4]!);
      }
      assert.equal(picks.join(" "), expected);
    }
  });
}

test("round-robin is smooth: 5:1:1 gives a a b a c a a, and exact shares over any number of rounds", () => {
  const weighted = "[{url: a:1, weight: 5}, {url: b:1}, {url: c:1}]";
  const { pick } = setUp("", weighted);
  assert.equal(Array.from({ length: 14 }, () => pick()).join(" "), "a a b a c a a a a b a c a a");
  const many = setUp(
    "",
    "[{url: a:1, weight: 97}, {url: b:1, weight: 31}, {url: c:1, weight: 7}, {url: d:1, weight: 0}]",
  );
  assert.deepEqual(counts(Array.from({ length: 135 * 20 }, () => many.pick())), { a: 1940, b: 620, c: 140 });
});

test("least-connections measures by weight: the server that can bear more gets more", () => {
  const { pick } = setUp("strategy: least-connections", "[{url: a:1, weight: 3}, b:1]");
  assert.deepEqual(counts(Array.from({ length: 400 }, () => pick())), { a: 300, b: 100 });
});

test("least-response-time asks the faster server, and another once that one has become slower", async () => {
  const { clock, pick, end } = setUp("strategy: least-response-time", "[a:1, b:1]");
  const take = async (milliseconds: number) => {
    const name = pick();
    clock.now += milliseconds;
    await end(name);
    return name;
  };
  assert.equal([await take(50), await take(20), await take(20), await take(20)].join(" "), "a b b b");
  assert.equal(await take(100) + await take(20), "bb", "its mean is still the lower one");
  assert.equal([await take(500), await take(50), await take(50)].join(" "), "b a a");
});

test("least-response-time weighs what is in flight: the fastest server gets more, and not everything", async () => {
  const { clock, pick, end } = setUp("strategy: least-response-time", "[{url: a:1, weight: 2}, b:1, c:1]");
  for (const [name, milliseconds] of [["a", 20], ["b", 20], ["c", 60]] as const) {
    assert.equal(pick(), name);
    clock.now += milliseconds;
    await end(name);
  }
  assert.deepEqual(counts(Array.from({ length: 100 }, () => pick())), { a: 60, b: 30, c: 10 });
});

test("least-response-time leaves a server alone that hangs: a request that waits counts as its age", async () => {
  const { clock, pick, end } = setUp("strategy: least-response-time", "[a:1, b:1]");
  for (const [name, milliseconds] of [["a", 10], ["b", 40]] as const) {
    assert.equal(pick(), name);
    clock.now += milliseconds;
    await end(name);
  }
  assert.equal(pick(), "a");
  clock.now += 1_000;
  assert.deepEqual(counts(Array.from({ length: 20 }, () => pick())), { b: 20 });
});

test("least-response-time tries a server of which nothing is known, and does not flood it", async () => {
  const { clock, pick, end } = setUp("strategy: least-response-time", "[a:1, b:1]");
  assert.equal(pick(), "a");
  clock.now += 80;
  await end("a");
  assert.deepEqual(counts(Array.from({ length: 45 }, () => pick())), { a: 5, b: 40 });
});

/** So many requests a second, each answered after its server's time; how many each server got. */
function drive(servers: string[], times: (name: string, at: number) => number, seconds: number, rate = 100) {
  const { clock, pick, end, lb } = setUp("strategy: peak-ewma, eject: off", list(servers));
  const due: { at: number; name: string }[] = [];
  const seen: Record<string, number> = Object.fromEntries(servers.map((name) => [name, 0]));
  const until = async (at: number) => {
    for (due.sort((a, b) => a.at - b.at); due[0] && due[0].at <= at;) {
      clock.now = Math.max(clock.now, due[0].at);
      await end(due.shift()!.name);
    }
    clock.now = at;
  };
  const run = async () => {
    const from = clock.now;
    for (let i = 0; i < seconds * rate; i++) {
      await until(from + i * 1000 / rate);
      const name = pick();
      seen[name] = (seen[name] ?? 0) + 1;
      due.push({ at: clock.now + times(name, clock.now), name });
    }
    return seen;
  };
  return { run, until, seen, lb };
}

test("peak-ewma leaves a server alone that hangs, before it has answered even once", async () => {
  const { run } = drive(names, (name) => name === "s3" ? 60_000 : 10, 20, 200);
  const { s3 = 0, ...others } = await run();
  assert.equal(s3, 1, "nothing is known of it: one request");
  for (const count of Object.values(others)) assert.ok(count > 300, JSON.stringify(others));
  const known = drive(names, (name, at) => name === "s3" && at > 2000 ? 60_000 : 10, 20, 200);
  const before = 400 / 10;
  assert.ok((await known.run()).s3! <= before + 12, `${known.seen.s3}`);
});

test("peak-ewma shares evenly among equals, also after one of them was slow for a while", async () => {
  const random = seeded(7);
  const slow = (at: number) => at < 10_000;
  const { run, seen } = drive(
    names.slice(0, 5),
    (name, at) => name === "s0" && slow(at) ? 400 : -10 * Math.log(1 - random()),
    60,
    150,
  );
  await run();
  assert.ok(seen.s0! < 60 * 150 / 5);
  Object.keys(seen).forEach((name) => seen[name] = 0);
  await run();
  for (const count of Object.values(seen)) assert.ok(Math.abs(count / (60 * 30) - 1) < 0.15, JSON.stringify(seen));
});

test("peak-ewma asks a faster and a heavier server more, and nobody never", async () => {
  const fast = drive(["a", "b"], (name) => name === "a" ? 10 : 40, 20, 600);
  const { a = 0, b = 0 } = await fast.run();
  assert.ok(a > 3 * b && b > 500, `${a} ${b}`);
  const { pick, service } = setUp("strategy: peak-ewma", "[{url: a:1, weight: 3}, b:1]");
  for (const server of service.servers) server.recent = 10;
  const share = counts(Array.from({ length: 400 }, () => pick())).a!;
  assert.ok(Math.abs(share - 300) < 15, `${share}`);
});

test("peak-ewma counts a 429 and every 5xx as slow: who fails fast attracts nobody", async () => {
  for (const status of [429, 500, 503]) {
    for (const count of [3, 12]) {
      const { clock, pick, end } = setUp(
        "strategy: peak-ewma, eject: off",
        list(names.concat("x", "y").slice(0, count)),
      );
      const picks = [];
      for (let i = 0; i < 600; i++) { // 12 seconds
        const name = pick();
        picks.push(name);
        clock.now += name === "s1" ? 1 : 20;
        await end(name, name === "s1" ? status : 200);
      }
      assert.ok(picks.filter((name) => name === "s1").length <= 3, `${status}, ${count} servers`);
    }
  }
});

test("peak-ewma takes a peak at once, and what is better as time passes: 63 % of it after 10 s", async () => {
  const { clock, pick, end, service } = setUp("strategy: peak-ewma", "[a:1]");
  const server = service.servers[0]!;
  for (
    const [wait, takes, recent] of [
      [0, 20, 20],
      [0, 500, 500],
      [9_990, 10, 500 / Math.E + 10 * (1 - 1 / Math.E)],
      [0, 200, 200],
      [1e9, 7, 7],
    ] as const
  ) {
    clock.now += wait;
    pick();
    clock.now += takes;
    await end("a");
    assert.ok(Math.abs(server.recent - recent) < 0.001, `${server.recent} is not ${recent}`);
  }
  assert.deepEqual([server.waiting, server.waitingSince], [0, 0]);
});

test("random and two-choices draw by weight", async () => {
  const nine = Object.fromEntries("abcdefghi".split("").map((name, i) => [name, i % 3 + 1]));
  const rows: [strategy: string, shares: Record<string, number>][] = [
    ["random", { a: 1, b: 1, c: 1 }],
    ["random", { a: 6, b: 3, c: 1 }],
    ["random", nine],
    ["two-choices", Object.fromEntries(Object.keys(nine).map((name) => [name, 1]))],
    ["two-choices", nine], // nobody is busy: the first draw counts
  ];
  for (const [strategy, shares] of rows) {
    const servers = Object.entries(shares).map(([name, weight]) => `{ url: "${name}:1", weight: ${weight} }`);
    const { once } = setUp(`strategy: ${strategy}`, `[${servers}, { url: never:1, weight: 0 }]`);
    const picks = [];
    for (let i = 0; i < 6000; i++) picks.push(await once());
    fits(picks, shares);
  }
});

test("two-choices takes the less busy: in flight no server is far from its share", () => {
  for (const many of [2, 8, 20]) {
    const { pick, service } = setUp("strategy: two-choices", list(Array.from({ length: many }, (_, i) => `s${i}`)));
    for (let i = 0; i < many * 50; i++) pick();
    const busy = service.servers.map((server) => server.inFlight);
    assert.equal(busy.reduce((a, b) => a + b), many * 50);
    assert.ok(Math.max(...busy) <= 55 && Math.min(...busy) >= 40, `${busy}`); // blind draws reach 70 and 30
  }
});

const KEYED: [keys: string, ask: (key: string) => Ask, other: (key: string) => Ask][] = [
  ["strategy: {hash: {client: true}}", (client) => ({ client }), (client) => ({ client, path: "/other" })],
  ["strategy: ip-hash", (client) => ({ client }), (client) => ({ client, path: "/other", headers: { "x-a": "b" } })],
  [
    "strategy: {hash: {header: X-User}}",
    (key) => ({ headers: { "x-user": key } }),
    (key) => ({ headers: { "X-User": key }, path: "/x" }),
  ],
  [
    "strategy: {hash: {cookie: id}}",
    (key) => ({ headers: { cookie: `id=${key}` } }),
    (key) => ({ headers: { cookie: `a=b; id=${key}` } }),
  ],
  ["strategy: {hash: {query: id}}", (key) => ({ path: `/?id=${key}` }), (key) => ({ path: `/x?a=b&id=${key}` })],
  [
    "strategy: {hash: {path: true}}",
    (key) => ({ path: `/${key}` }),
    (key) => ({ path: `/${key}?a=b`, client: "192.0.2.77" }),
  ],
];
const names = Array.from({ length: 10 }, (_, i) => `s${i}`);

for (const [keys, ask, other] of KEYED) {
  test(`${keys} keeps a key at its server, shares keys evenly, and moves only those of a server that leaves`, async () => {
    const some = Array.from({ length: 3000 }, (_, i) => `10.${i % 7}.${i >> 8}.${i & 255}`);
    const where = async (servers: string[], ask: (key: string) => Ask) => {
      const { once } = setUp(keys, list(servers));
      const out = [];
      for (const key of some) out.push(await once(ask(key)));
      return out;
    };
    const before = await where(names, ask);
    fits(before, Object.fromEntries(names.map((name) => [name, 1])));
    assert.deepEqual(await where(names, other), before, "other parts of the request do not matter");
    assert.deepEqual(await where(names.toReversed(), ask), before, "the order of the servers does not matter");
    const after = await where(names.filter((name) => name !== "s4"), ask);
    after.forEach((name, i) => before[i] === "s4" ? assert.notEqual(name, "s4") : assert.equal(name, before[i]));
  });
}

test("a request without the key is hashed by its client, so that not all of them meet at one server", async () => {
  for (const by of ["header: x-user", "cookie: id", "query: id"]) {
    const { once } = setUp(`strategy: {hash: {${by}}}`, list(names));
    const picks = [];
    for (let i = 0; i < 200; i++) picks.push(await once({ client: `10.0.0.${i}` }));
    assert.equal(Object.keys(counts(picks)).length, 10, by);
    assert.equal(await once({ client: "10.0.0.5" }), picks[5]);
  }
});

test("hash honours weights", async () => {
  const { once } = setUp("strategy: {hash: {path: true}}", "[{url: a:1, weight: 3}, b:1]");
  const picks = [];
  for (let i = 0; i < 4000; i++) picks.push(await once({ path: `/${i}` }));
  fits(picks, { a: 3, b: 1 });
});

test("hash is bounded: one hot key fills its server to 125 % of its share, the rest goes elsewhere, and comes back", async () => {
  const { pick, end, service } = setUp("strategy: {hash: {path: true}}", list(["a", "b", "c", "d"]));
  const home = pick({ path: "/hot" });
  for (let i = 1; i < 200; i++) pick({ path: "/hot" });
  const busy = service.servers.map((server) => server.inFlight);
  assert.ok(Math.max(...busy) <= Math.ceil(1.25 * 200 / 4), `${busy}`);
  for (const server of service.servers) {
    while (server.inFlight) await end(server.name.split(":")[0]!);
  }
  assert.equal(pick({ path: "/hot" }), home);
});

/** Server records as strategies see them. */
function candidatesOf(count: number): Candidates {
  const { service } = setUp("", list(Array.from({ length: count }, (_, i) => `s${i}`)));
  return service.servers as unknown as Candidates;
}

const anyPool = fc.uniqueArray(fc.record({ name: fc.domain(), weight: fc.integer({ min: 1, max: 9 }) }), {
  selector: ({ name }) => name.toLowerCase(),
  minLength: 2,
  maxLength: 12,
});
const poolOf = (servers: { name: string; weight: number }[]) => {
  const yaml = JSON.stringify(servers.map(({ name, weight }) => ({ url: `http://${name}`, weight })));
  return setUp("", yaml).service.servers as unknown as Candidates;
};
const KEYS = 20_000; // so many that 2 % is more than five standard deviations

test("a server that leaves moves its own keys and no others: at most its share (+2 %)", () => {
  const where = (servers: Candidates, seed: number) =>
    Array.from({ length: KEYS }, (_, i) => strategies.hash(servers, { key: `${seed}/${i}` } as PickInput).url);
  fc.assert(
    fc.property(anyPool, fc.nat(), fc.boolean(), (pool, pick, even) => {
      const servers = poolOf(even ? pool.map(({ name }) => ({ name, weight: 1 })) : pool);
      const leaves = servers[pick % servers.length]!;
      const before = where(servers, pick);
      const after = where(servers.filter((server) => server !== leaves) as unknown as Candidates, pick);
      const moved = after.filter((url, i) => url !== before[i]).length / KEYS;
      assert.ok(after.every((url, i) => url === before[i] || before[i] === leaves.url), "a key of another server");
      const share = leaves.weight / servers.reduce((sum, { weight }) => sum + weight, 0);
      assert.ok(moved <= share + 0.02, `${moved} of the keys moved, its share was ${share}`);
    }),
    { numRuns: 40 },
  );
});

test("whatever the keys, no server has more than 125 % of its share of the requests in flight", () => {
  fc.assert(
    fc.property(
      anyPool,
      fc.integer({ min: 1, max: 50 }),
      fc.integer({ min: 50, max: 2_000 }),
      (pool, keys, requests) => {
        const servers = poolOf(pool), weights = servers.reduce((sum, { weight }) => sum + weight, 0);
        for (let sum = 1; sum <= requests; sum++) {
          const server = strategies.hash(servers, { key: `${sum * 7 % keys}` } as PickInput);
          server.inFlight++;
          assert.ok(server.inFlight <= Math.max(8, Math.ceil(1.25 * sum * server.weight / weights)));
        }
      },
    ),
    { numRuns: 40 },
  );
});

test("every strategy of the documentation exists", () => {
  const documented =
    "round-robin first random two-choices least-connections least-response-time peak-ewma ip-hash hash";
  assert.deepEqual(Object.keys(strategies).sort(), documented.split(" ").sort());
});

for (const [name, strategy] of Object.entries(strategies) as [string, Strategy][]) {
  const drawOf = (seed: number): (i: number) => PickInput => {
    const random = seeded(seed);
    return (i) => ({
      random,
      now: i,
      turn: i,
      key: `key ${i}`,
      client: `10.0.0.${i % 256}`,
      request: requestOf(),
    });
  };

  test(`${name} picks one of the candidates, whoever has been left out and whatever they carry`, () => {
    for (const count of [1, 2, 3, 9, 30]) {
      const [all, draw, random] = [candidatesOf(count), drawOf(3), seeded(count)];
      for (let i = 0; i < 200; i++) {
        for (const server of all) {
          Object.assign(server, {
            inFlight: Math.floor(random() * 20),
            latency: random() * 900,
            weight: 1 + i % 3,
            picks: i,
          });
        }
        const some = all.filter(() => random() < 0.6) as Server[];
        const candidates = (some.length ? some : all) as Candidates;
        assert.ok(candidates.includes(strategy(candidates, draw(i))), `${count} servers, draw ${i}`);
      }
    }
  });

  test(`${name} is reproducible: the same seed gives the same picks`, () => {
    const run = (seed: number) => {
      const [all, draw] = [candidatesOf(12), drawOf(seed)];
      return Array.from({ length: 100 }, (_, i) => strategy(all, draw(i)).name).join(" ");
    };
    assert.equal(run(5), run(5));
    if (["random", "two-choices", "peak-ewma"].includes(name)) assert.notEqual(run(5), run(6));
  });

  test(`${name} can be written in routes.yml and works with one server`, () => {
    const { pick } = setUp(`strategy: ${name === "hash" ? "{hash: {path: true}}" : name}`, "[a:1]");
    assert.equal(pick() + pick() + pick(), "aaa");
  });
}

test("a strategy of one's own is used by the name that it was given, and sees only who may be asked", () => {
  const seen: string[] = [];
  const last: Strategy = (candidates, { client }) => {
    seen.push(`${client} ${candidates.map((server) => server.name)}`);
    return candidates.at(-1)!;
  };
  const { pick } = setUp("strategy: last", "[a:1, {url: b:1, weight: 0}, c:1]", { last });
  assert.equal(pick() + pick(), "cc");
  assert.deepEqual(seen, ["192.0.2.1 a:1,c:1", "192.0.2.1 a:1,c:1"]);
});

test("a strategy of one's own may take the place of one that exists", () => {
  const { pick } = setUp("strategy: first", "[a:1, b:1]", { first: (candidates) => candidates.at(-1)! });
  assert.equal(pick(), "b");
});
