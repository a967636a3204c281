// Fleets without sockets: votes and probers as pure functions, and instances over an engine in memory, on a clock that
// only the test moves.

import assert from "node:assert/strict";
import process from "node:process";
import { test } from "node:test";
import fc from "fast-check";
import { createLoadBalancer, EtcdClient, LbFleet, parseConfig, serve } from "../../lb.ts";
import { checkEngine, Clock, FakeEngine, type Member, settled, Store, World } from "../rig/fleet.ts";
import { seeded, sleep } from "../rig/rig.ts";

const RECORD = {
  ...{ id: "x", since: new Date(0).toISOString(), version: "1", runtime: "node", config: 1, problem: "" },
  ...{ down: [], ejected: [], members: "", told: 0, unsure: [] },
};
const SERVER = "default http://s0:1"; // as records name it

/** A fleet whose instances are nothing but these records, as another one sees it. */
async function seenBy(records: Record<string, object>, probers: number, servers = 1) {
  const world = new World(servers, `{ etcd: 'a:1', probers: ${probers} }`), { fleet, lb } = world.observe();
  const write = (members: string) => {
    for (const [name, record] of Object.entries(records)) {
      world.store.set(`instances/${name}`, JSON.stringify({ ...RECORD, members, ...record }));
    }
  };
  write("");
  await fleet.listOnce();
  write(fleet["membersHash"]);
  await fleet.listOnce();
  return { fleet, members: fleet["membersHash"], server: lb.balancer.table.services.get("default")!.servers[0]! };
}
const among = (members: readonly string[], probers: number, servers?: number) =>
  seenBy(Object.fromEntries(members.map((name) => [name, {}])), probers, servers);
const probersOf = async (members: readonly string[], probers: number) =>
  (await among(members, probers)).fleet.view().probes[0]?.by ?? [];

/** What the instances with these records make of the server, all of which probe it; undefined: what it was. */
async function verdictOf(records: object[]): Promise<"up" | "down" | undefined> {
  const { fleet, server } = await seenBy(Object.fromEntries(records.entries()), 7), seen = new Set<boolean>();
  for (const up of [true, false]) {
    Object.assign(server, { up, upByOwnProbes: up });
    await fleet.listOnce();
    seen.add(server.up);
  }
  if (seen.size > 1) return undefined;
  return seen.has(true) ? "up" : "down";
}

const names = fc.uniqueArray(fc.stringMatching(/^[a-z]{1,8}$/), { minLength: 1, maxLength: 12 });

// ─── The config ───

const config = (fleet: Record<string, unknown>) =>
  parseConfig(JSON.stringify({ fleet, default: { servers: ["127.0.0.1:9"] } }));

test("a fleet has defaults, and its members are URLs", () => {
  const { fleet } = config({ etcd: ["10.0.0.1:2379", "https://a.example/.well-known/lb-fleet/"] });
  const { etcd, prefix, name, user, ttl, probers, durable } = fleet!;
  assert.deepEqual(etcd, ["http://10.0.0.1:2379", "https://a.example/.well-known/lb-fleet"]);
  assert.deepEqual({ prefix, name, user, ttl, probers, durable }, {
    ...{ prefix: "lb/", name: "", user: "", ttl: 10_000, probers: 3, durable: "" },
  });
});

for (
  const [fleet, message] of [
    [{}, /fleet: needs etcd, or durable/],
    [{ etcd: "http://user:pw@10.0.0.1:2379" }, /fleet\.etcd: .* is not an etcd such as http:\/\/10\.0\.0\.1:2379/],
    [{ etcd: "a:1", name: "a/b" }, /fleet\.name: "a\/b" is not a name of an instance/],
    [{ etcd: "a:1", ttl: "1s" }, /fleet\.ttl: is less than 2s/],
    [{ etcd: "a:1", probers: 0 }, /fleet\.probers: 0 is not a whole number from 1 to 100/],
    [{ etcd: "a:1", nodes: 3 }, /fleet\.nodes: unknown key/],
  ] as [Record<string, unknown>, RegExp][]
) {
  test(`a fleet that cannot be is refused: ${JSON.stringify(fleet)}`, () => {
    assert.throws(() => config(fleet), message);
  });
}

test("a file that says nothing but how to get to the fleet is a whole one", () => {
  assert.equal(parseConfig("fleet: { etcd: localhost:2379 }").routes.length, 0);
});

// ─── Votes, and instances ───

test("all choose the same probers in any order, and who leaves or comes moves only its own", async () => {
  await fc.assert(fc.asyncProperty(names, fc.integer({ min: 1, max: 5 }), async (members, probers) => {
    const chosen = await probersOf(members, probers), reversed = await among(members.toReversed(), probers);
    assert.equal(chosen.length, Math.min(probers, members.length));
    assert.deepEqual(reversed.fleet.view().probes[0]!.by, chosen);
    assert.equal(reversed.members, (await among(members, probers)).members);
    assert.notEqual(reversed.members, (await among(members, probers + 1)).members);
    const [gone, ...left] = members, after = await probersOf(left, probers);
    assert.deepEqual(after.filter((name) => chosen.includes(name)), chosen.filter((name) => name !== gone));
  }));
});

test("each of many instances probes its share of the servers", async () => {
  const { fleet } = await among(Array.from({ length: 6 }, (_, i) => `lb-${i}`), 3, 600),
    shares = new Map<string, number>();
  for (const name of fleet.view().probes.flatMap(({ by }) => by)) shares.set(name, (shares.get(name) ?? 0) + 1);
  assert.equal(shares.size, 6);
  for (const share of shares.values()) assert.ok(share > 240 && share < 360, `${share} of 300`);
});

const VOTES = { up: {}, down: { down: [SERVER] }, unknown: { members: "others" } };
type Vote = keyof typeof VOTES;
test("a verdict needs most of the votes, and stands whatever those that are unknown would say", async () => {
  const verdict = (votes: Vote[]) => verdictOf(votes.map((vote) => VOTES[vote]));
  const votes = fc.array(fc.constantFrom<Vote>("up", "down", "unknown"), { minLength: 1, maxLength: 7 });
  await fc.assert(fc.asyncProperty(votes, async (votes) => {
    const unknown = votes.filter((vote) => vote === "unknown").length;
    if (unknown * 2 >= votes.length) return assert.equal(await verdict(votes), undefined);
    const as = (vote: Vote) => verdict(votes.map((one) => one === "unknown" ? vote : one));
    assert.equal(await verdict(votes), await as("up") === await as("down") ? await as("up") : undefined);
  }));
  assert.equal(await verdict(["down", "up"]), "up", "of two not more than half");
  assert.equal(await verdict(["down"]), "down");
});

test("a vote counts only where the instance knows the same members and the same operators", async () => {
  assert.equal(await verdictOf([{ down: [SERVER] }]), "down");
  assert.equal(await verdictOf([{ down: ["default http://s1:1"] }]), "up");
  assert.equal(await verdictOf([{ unsure: [SERVER] }]), undefined, "it is unsure");
  assert.equal(await verdictOf([{ members: "others", down: [SERVER] }]), undefined, "it knows other members");
  const world = new World(1), { fleet, isUp } = world.observe();
  const say = async (told: number) => {
    world.store.set("instances/a", JSON.stringify({ ...RECORD, told, members: fleet["membersHash"], down: [SERVER] }));
    await fleet.listOnce();
  };
  await say(0);
  world.store.set(`told/${SERVER}`, "up");
  const { revision } = world.store;
  await say(revision - 1);
  assert.equal(isUp(0), true, "it has not heard the operator");
  await say(revision);
  assert.equal(isUp(0), false);
});

const flips = ({ reports }: Member) => reports.filter((said) => /: s\d+:1 is (up|down)/.test(said));
async function worldOf(servers: number, ...members: string[]): Promise<World> {
  const world = new World(servers);
  for (const name of members) await world.join(name);
  await world.pass(2_000);
  return world;
}

test("three instances probe each server, and all take it for down when most of these do", async () => {
  const world = await worldOf(4, "a", "b", "c", "d", "e");
  const before = world.members.map(({ probed }) => probed);
  await world.pass(10_000);
  const probes = world.members.reduce((sum, { probed }, i) => sum + probed - before[i]!, 0);
  assert.ok(probes >= 110 && probes <= 130, `${probes} probes of 4 servers in 10 s`);
  world.up[1] = false;
  await world.pass(4_000);
  assert.deepEqual(world.members.map(({ isUp }) => isUp(1)), Array(5).fill(false));
  assert.deepEqual(world.members.map(({ isUp }) => isUp(0)), Array(5).fill(true));
  world.up[1] = true;
  await world.pass(4_000);
  assert.deepEqual(world.members.map(({ isUp }) => isUp(1)), Array(5).fill(true));
});

test("an idle fleet writes nothing, and asks less than once a second", async () => {
  const world = await worldOf(20, "a", "b", "c", "d");
  const { writes } = world.store, calls = world.members[0]!.engine.calls.length;
  await world.pass(60_000);
  assert.equal(world.store.writes, writes);
  const perSecond = (world.members[0]!.engine.calls.length - calls) / 60;
  assert.ok(perSecond <= 2, `${perSecond} calls a second at a ttl of 3 s: keep-alive and listing`);
});

test("a fresh instance takes the others' word before its first probe", async () => {
  const world = await worldOf(3, "a", "b", "c");
  world.up[2] = false;
  await world.pass(4_000);
  const fresh = await world.join("d");
  assert.equal(fresh.isUp(2), false);
  assert.equal(fresh.probed, 0);
});

test("when probers go, nobody's verdict changes: others go on from what was agreed", async () => {
  const world = await worldOf(6, "a", "b", "c", "d", "e", "f");
  world.up[3] = false;
  await world.pass(4_000);
  for (const member of world.members) member.reports.length = 0;
  for (const [i, gone] of [...world.members.slice(0, 4)].entries()) {
    if (i % 2) world.crash(gone);
    else await world.leave(gone);
    await world.pass(8_000);
  }
  for (const member of world.members) {
    assert.deepEqual(flips(member), []);
    assert.equal(member.isUp(3), false);
  }
});

test("in any order of comings, goings, silence and deafness all end with what is true, and nothing flaps", async () => {
  const step = fc.oneof(
    fc.record({
      kind: fc.constantFrom("join", "leave", "crash", "silent", "deaf", "wait"),
      who: fc.nat(9),
      ms: fc.nat(6_000),
    }),
    fc.record({ kind: fc.constant("switch"), who: fc.nat(1), ms: fc.nat(6_000) }), // servers 0 and 1
  );
  const property = fc.asyncProperty(fc.array(step, { minLength: 1, maxLength: 12 }), async (steps) => {
    const world = await worldOf(4, "a", "b", "c"); // 2 is always up, 3 always down
    world.up[3] = false;
    await world.pass(4_000);
    const all = new Set(world.members);
    let names = 0;
    for (const { kind, who, ms } of steps) {
      const member = world.members[who % world.members.length]!, mayGo = world.members.length > 1;
      if (kind === "join" && all.size < 8) all.add(await world.join(`n${names++}`));
      if (kind === "leave" && mayGo) await world.leave(member);
      if (kind === "crash" && mayGo) world.crash(member);
      if (kind === "silent") member.engine.silent = !member.engine.silent;
      if (kind === "deaf") member.engine.deaf = true;
      if (kind === "switch") world.up[who] = !world.up[who];
      await world.pass(ms);
    }
    for (const { engine } of world.members) engine.silent = false;
    await world.pass(25_000);
    for (const member of world.members) {
      assert.deepEqual(
        world.up.map((_, i) => member.isUp(i)),
        world.up,
        `${member.name} of ${world.members.map((m) => m.name)}`,
      );
    }
    for (const member of all) {
      const steady = flips(member).filter((said) => /s2:1/.test(said) || /s3:1 is up/.test(said));
      assert.deepEqual(steady, [], `${member.name}: a server that did not change`);
    }
    for (const { fleet } of world.members) await fleet.leave();
  });
  await fc.assert(property, { numRuns: Number(process.env.LB_RUNS ?? 40) });
});

test("a watch that has gone deaf is dropped, and so are revisions that go backwards", async () => {
  const world = await worldOf(1, "a", "b"), [a, b] = world.members as [Member, Member];
  a.engine.deaf = true;
  world.store.set("config", world.text + "# changed\n");
  await world.pass(3_500);
  assert.equal(a.fleet.counted().resyncs.get("deaf"), 1);
  assert.equal(a.engine.nexts, 1, "of two members the other one is asked next, not the same again");
  assert.match(a.lb.balancer.table.config.text, /# changed/);
  world.store.revision = 3; // a backup
  world.store.events = [];
  world.store.keys.set("config", { value: world.text + "# restored\n", revision: 2, lease: "" });
  await world.pass(5_000);
  for (const one of [a, b]) assert.match(one.lb.balancer.table.config.text, /# restored/);
});

test("what an operator says counts on all, until probes say otherwise, and no vote from before undoes it", async () => {
  const world = await worldOf(2, "a", "b", "c", "d"),
    service = world.members[0]!.lb.balancer.table.services.get("default")!;
  const told = world.members[0]!.fleet.mark(service, service.servers[0]!, "down");
  await world.pass(100);
  assert.equal(await told, true);
  assert.deepEqual(world.members.map(({ isUp }) => isUp(0)), [false, false, false, false]);
  for (const { reports } of world.members) assert.deepEqual(reports.filter((said) => /s0:1 is up/.test(said)), []);
  await world.pass(4_000);
  assert.deepEqual(world.members.map(({ isUp }) => isUp(0)), [true, true, true, true], "probes pass");
});

test("a process that stood still registers anew, takes over what was agreed, and flaps nothing", async () => {
  const world = await worldOf(3, "a", "b", "c"), paused = world.members[0]!;
  world.members.splice(0, 1);
  paused.engine.silent = true; // it hears and says nothing for a while
  await world.pass(1_000);
  world.up[1] = false;
  await world.pass(9_000);
  world.members.push(paused);
  paused.engine.silent = false;
  await world.pass(6_000);
  assert.equal(paused.isUp(1), false);
  assert.deepEqual(world.members.map(({ fleet }) => fleet.view().instances.length), [3, 3, 3]);
});

test("two instances of one name: the later one gets a number behind it, and says so", async () => {
  const world = await worldOf(1, "a", "a", "a");
  assert.deepEqual(world.members[0]!.fleet.view().instances.map(({ name }) => name), ["a", "a#2", "a#3"]);
  assert.match(world.members[1]!.reports.join("\n"), /fleet: another instance is called "a": this one is "a#2"/);
  await world.leave(world.members[0]!);
  await world.pass(1_000);
  const left = world.members[0]!.fleet.view().instances.map(({ name }) => name);
  assert.equal(left.length, 2);
  assert.ok(left.includes("a"), `one has the name that is free: ${left}`);
});

test("an instance that comes back after a crash has its own name again once its old lease is over", async () => {
  const world = await worldOf(1, "a", "b");
  world.crash(world.members[0]!);
  const again = await world.join("a");
  assert.equal(again.fleet.view().name, "a#2");
  await world.pass(5_000);
  assert.equal(again.fleet.view().name, "a");
  assert.deepEqual(again.fleet.view().instances.map(({ name }) => name), ["a", "b"]);
});

test("a lease that ends under a write is registered anew at once", async () => {
  const world = await worldOf(2, "a", "b"), a = world.members[0]!;
  const lease = world.store.keys.get("instances/a")!.lease;
  world.store.leases.delete(lease); // without a word
  world.store.set("told/default http://s0:1", "down"); // which every instance answers with a write
  await settled();
  await world.pass(300);
  assert.notEqual(world.store.keys.get("instances/a")!.lease, lease);
  assert.equal(a.fleet.view().instances.length, 2);
});

test("nothing is put in force but what the watch brings, in its order: not even an own change", async () => {
  const world = await worldOf(1, "a", "b"), [a, b] = world.members as [Member, Member];
  const seen: string[] = [], { reload } = a.lb;
  a.lb.reload = (next) => {
    seen.push(/# (\w+)$/m.exec(next.text)?.[1] ?? "");
    return reload(next);
  };
  a.engine.deaf = true; // what it has written is not heard yet
  const mark = (word: string) => (config: { text: string }) => config.text + `# ${word}\n`;
  const own = a.fleet.change(mark("own"), 0, false);
  await world.pass(200);
  assert.deepEqual(seen, []);
  const other = b.fleet.change(mark("other"), 0, false);
  await world.pass(5_000);
  await Promise.all([own, other]);
  assert.match(a.lb.balancer.table.config.text, /# own\n# other\n$/);
  assert.equal(b.lb.balancer.table.config.text, a.lb.balancer.table.config.text);
});

test("a race that is lost is run again on the newer document, five times at most", async () => {
  const world = await worldOf(1, "a"), a = world.members[0]!;
  let races = 0;
  const edit = (config: { text: string }) => {
    if (races++ < 3) world.store.set("config", config.text + `# other ${races}\n`);
    return config.text + "# mine\n";
  };
  const change = a.fleet.change(edit, 0, false);
  await world.pass(500);
  await change;
  assert.match(world.store.keys.get("config")!.value, /# other 1\n# other 2\n# other 3\n# mine\n$/);
  const always = a.fleet.change(
    (config) => {
      world.store.set("config", config.text + "# again\n");
      return config.text + "# never\n";
    },
    0,
    false,
  );
  const refused = assert.rejects(always, /others were first, 5 times in a row/);
  await world.pass(500);
  await refused;
});

test("`ttl` and `probers` are the document's, whatever local files say", async () => {
  const world = new World(4, "{ etcd: 'a:1', ttl: 4s, probers: 1 }");
  await world.join("a");
  for (const name of ["b", "c"]) await world.join(name, { text: "fleet: { etcd: 'b:1', ttl: 60s, probers: 100 }" });
  await world.pass(2_000);
  for (const { fleet } of world.members) for (const { by } of fleet.view().probes) assert.equal(by.length, 1);
  assert.deepEqual([...world.store.leases.values()].map(({ ttl }) => ttl), [4_000, 4_000, 4_000]);
  assert.match(world.members[1]!.disk.text, /^fleet: \{ etcd: ["']?b:1["']?, ttl: 4s, probers: 1 \}\nlog: off/);
  world.store.set("config", world.text.replace("ttl: 4s", "ttl: 2s"));
  await world.pass(3_000);
  assert.deepEqual([...world.store.leases.values()].map(({ ttl }) => ttl), [2_000, 2_000, 2_000]);
  for (const { fleet } of world.members) assert.equal(fleet.view().instances.length, 3);
});

test("away from the engine an instance probes all servers itself, from what was agreed; back again it flaps nothing", async () => {
  const world = await worldOf(4, "a", "b", "c", "d"), a = world.members[0]!;
  world.up[0] = false;
  await world.pass(4_000);
  a.engine.silent = true;
  await world.pass(4_000);
  assert.equal(a.fleet.view().engine, "away");
  assert.equal(a.isUp(0), false, "as was agreed");
  world.up[1] = false;
  await world.pass(4_000);
  assert.equal(a.isUp(1), false, "it has found out itself");
  assert.equal(a.reports.filter((said) => /has not answered for 3 s/.test(said)).length, 1);
  a.engine.silent = false;
  const before = flips(a).length;
  await world.pass(10_000);
  assert.equal(flips(a).length, before);
  assert.equal(a.fleet.view().engine, "answers");
});

test("an engine that was away for all brings back no verdict from before", async () => {
  const world = await worldOf(3, "a", "b", "c");
  world.store.isDown = true;
  await world.pass(5_000);
  world.up[2] = false;
  await world.pass(5_000);
  assert.deepEqual(world.members.map(({ isUp }) => isUp(2)), [false, false, false]);
  world.store.restart(); // what it knows of instances is from before
  await world.pass(15_000);
  for (const member of world.members) {
    assert.equal(member.isUp(2), false);
    assert.deepEqual(flips(member).filter((said) => /s2:1 is up/.test(said)), []);
    assert.equal(member.fleet.view().engine, "answers");
  }
});

test("an instance that has heard nothing certain of a server has no vote on it until it has found out itself", async () => {
  const server = "default http://s3:1", world = new World(4, "{ etcd: 'a:1', ttl: 3s, probers: 1 }");
  const all = Array.from({ length: 50 }, (_, i) => `n${i}`),
    first = async (...some: string[]) => {
      const { fleet } = await among(some, 1, 4);
      return fleet.view().probes.find((one) => one.server === server)!.by[0];
    };
  const stale = (await first("n0", "n1"))!, other = stale === "n0" ? "n1" : "n0";
  let fresh = "";
  for (const name of all.slice(2)) if (!fresh && await first(stale, other, name) === name) fresh = name;
  for (const name of ["leaving", stale, other]) await world.join(name);
  world.up[3] = false;
  await world.pass(5_000);
  const [leaving, deaf, heard] = world.members as [Member, Member, Member];
  assert.deepEqual(world.members.map(({ isUp }) => isUp(3)), [false, false, false]);
  deaf.engine.deaf = true; // its record knows the one that leaves
  await world.leave(leaving);
  const late = await world.join(fresh);
  await world.pass(10_000);
  assert.deepEqual(flips(heard).filter((said) => /s3:1 is up/.test(said)), []);
  assert.deepEqual(world.members.map(({ isUp }) => isUp(3)), [false, false, false]);
  assert.ok(late.probed > 0);
});

test("the copy on disk is one at a time, and the last one is the last document", async () => {
  const world = await worldOf(1, "a"), a = world.members[0]!;
  for (let i = 0; i < 20; i++) world.store.set("config", `${world.text}# ${i}\n`);
  await world.pass(200);
  assert.match(a.disk.text, /# 19\n$/);
  assert.deepEqual(a.disk.kept, [], "copies are not worth keeping");
});

test("instances begin with different members, and not all with the first", async () => {
  const asked = new Map<string, number>();
  for (let i = 0; i < 60; i++) {
    const config = parseConfig("fleet: { etcd: ['a:1', 'b:1', 'c:1'] }"),
      { effects } = createLoadBalancer(config).balancer;
    const engine = new EtcdClient(config.fleet!, {
      ...effects,
      random: seeded(i),
      send({ server, onEnd }) {
        if (!asked.has(`${i}`)) asked.set(`${i}`, 1).set(server.name, (asked.get(server.name) ?? 0) + 1);
        onEnd("connect", "nobody", false);
      },
    });
    await engine.list(true).catch(() => {});
  }
  for (const name of ["a:1", "b:1", "c:1"]) assert.ok((asked.get(name) ?? 0) > 8, `${name}: ${asked.get(name)}`);
});

test("where there are other members, one may be silent without the lease being over before the next is asked", async () => {
  for (const [etcd, patience] of [[["a:1", "b:1"], 1_500], [["a:1"], 2_000]] as const) {
    const config = parseConfig(`fleet: ${JSON.stringify({ etcd })}`);
    const deadlines: number[] = [];
    const engine = new EtcdClient(config.fleet!, {
      ...{ now: () => 0, random: () => 0 },
      send({ onEnd, ...attempt }) {
        queueMicrotask(() => {
          deadlines.push(attempt.deadline);
          onEnd("timeout", "silent", false);
        });
      },
    });
    await engine.grant(3_000).catch(() => {});
    await engine.keepAlive("1").catch(() => {});
    assert.ok(deadlines.length >= 2);
    for (const deadline of deadlines.slice(etcd.length)) assert.equal(deadline, patience);
  }
});

test("an instance without a document waits for one, and one that cannot be used is none", async () => {
  const world = new World(1);
  world.store.set("config", "default: { servers: [s0:1], x: 1 }\n");
  const a = await world.join("a", { text: "fleet: { etcd: 'a:1', ttl: 3s }\n" });
  assert.equal(a.fleet.isWaiting(), true);
  assert.match(a.fleet.view().instances[0]!.problem, /unknown key/);
  world.store.set("config", undefined);
  await world.pass(1_000);
  assert.equal(world.store.keys.has("config"), false, "how it gets to the fleet is no document for others");
  world.store.set("config", world.text);
  await world.pass(1_000);
  assert.equal(a.fleet.isWaiting(), false);
});

test("an engine that answers again is listed at once, whatever pause a watch that broke has left", async () => {
  const world = new World(1, "{ etcd: 'a:1', ttl: 9s }");
  const a = await world.join("a");
  a.lb.balancer.effects.random = () => 0.99; // the longest pauses
  world.store.isDown = true;
  await world.pass(8_500);
  assert.equal(a.fleet.view().engine, "answers", "it was not away for `ttl`");
  world.store.restart();
  world.store.set("config", `${world.text}# newer\n`);
  await world.pass(1_000); // its lease is kept alive before the pause is over
  assert.match(a.disk.text, /# newer\n$/);
});

test("a local file that somebody has removed is written again, and leaves nothing beside it", async () => {
  const world = await worldOf(1, "a"), a = world.members[0]!;
  (a.disk as { text: string | undefined }).text = undefined;
  world.store.set("config", `${world.text}# newer\n`);
  await world.pass(200);
  assert.match(a.disk.text, /# newer\n$/);
  assert.deepEqual(a.disk.kept, []);
  assert.doesNotMatch(a.reports.join("\n"), /\.bak/);
});

test("a local file that names another engine is told when that counts; `ttl` and `probers` count at once", async () => {
  const world = await worldOf(1, "a"), a = world.members[0]!;
  const edit = async (from: string, to: string) => {
    a.disk.text = a.disk.text.replace(from, to);
    const checked = a.fleet.checkFile();
    await world.pass(500);
    await checked;
    assert.equal(world.store.keys.get("config")!.value, a.disk.text);
    return a.reports.filter((said) => /^fleet has changed, .* takes effect with the next start$/.test(said)).length;
  };
  assert.equal(await edit("probers: 3", "probers: 2"), 0);
  assert.equal(await edit("a:1", "b:1"), 1);
});

test("each of several edits of a local file counts, also where the watch brings them before they are answered", async () => {
  const world = await worldOf(1, "a", "b"), a = world.members[0]!;
  for (const word of ["one", "two", "three"]) {
    a.disk.text += `# ${word}\n`;
    const checked = a.fleet.checkFile();
    await world.pass(500);
    await checked;
  }
  assert.match(world.store.keys.get("config")!.value, /# one\n# two\n# three\n$/);
  assert.deepEqual(a.disk.kept, []);
});

test("a local file that loses `fleet` gets its own back, for this instance has no other way to the engine", async () => {
  const world = await worldOf(1, "a", "b"), a = world.members[0]!;
  a.disk.text = a.disk.text.replace(/^fleet: .*\n/, "");
  const checked = a.fleet.checkFile();
  await world.pass(500);
  await checked;
  assert.doesNotMatch(world.store.keys.get("config")!.value, /fleet/);
  for (const { disk } of world.members) assert.match(disk.text, /^fleet: \{ etcd: "?'?a:1/m);
  world.store.set("config", world.text);
  await world.pass(500);
  for (const { problem } of a.fleet.view().instances) assert.equal(problem, "");
});

test("what an operator has said once is not said again to a fleet that starts anew, but where nothing is probed", async () => {
  const world = new World(1), off = "services: { off: { servers: [s1:1], health: off } }\n";
  world.store.set("told/default http://s0:1", "down");
  world.store.set("told/off http://s1:1", "down");
  const a = await world.join("a", { text: world.text + off });
  assert.equal(a.isUp(0), true);
  assert.equal(a.lb.balancer.table.services.get("off")!.servers[0]!.up, false);
  const b = await world.join("b");
  assert.equal(b.isUp(0), true);
});

test("what an operator has just said counts on an instance that starts, though nobody has probed the server yet", async () => {
  const slow = new World(1), text = slow.text.replace("interval: 1s", "interval: 60s");
  const a = await slow.join("a", { text });
  slow.store.set("told/default http://s0:1", "down");
  await slow.pass(500);
  assert.equal(a.isUp(0), false);
  assert.equal((await slow.join("b", { text })).isUp(0), false);
});

test("the engine in memory does what engines do", async () => {
  const clock = new Clock(), store = new Store(clock);
  await checkEngine(new FakeEngine(store), async (milliseconds) => {
    await clock.pass(milliseconds);
    store.expire();
  });
});

/** The storage of a Durable Object, in memory; `alarm` is when it is called next. */
class Storage {
  values = new Map<string, unknown>();
  alarm: number | undefined;
  list = () => Promise.resolve(new Map([...this.values].sort()));
  put = (entries: Record<string, unknown>) => {
    for (const [key, value] of Object.entries(entries)) this.values.set(key, structuredClone(value));
    return Promise.resolve();
  };
  delete = (keys: string[]) => {
    for (const key of keys) this.values.delete(key);
    return Promise.resolve();
  };
  setAlarm = (at: number) => {
    this.alarm = at;
    return Promise.resolve();
  };
}
const objectOver = (storage: Storage) => new LbFleet({ storage, blockConcurrencyWhile: (work) => work() });

test("a Durable Object does what engines do, on every runtime, and keeps it all in its storage", async () => {
  const storage = new Storage(), object = objectOver(storage);
  const listener = await serve({ fetch: (request: Request) => object.fetch(request) }, {
    hostname: "127.0.0.1",
    port: 0,
  });
  const config = parseConfig(`fleet: { etcd: "${listener.address}/any/path/" }`),
    { effects } = createLoadBalancer(config).balancer;
  try {
    const engine = new EtcdClient(config.fleet!, effects);
    await checkEngine(engine, async (milliseconds) => {
      await sleep(milliseconds);
      if (storage.alarm !== undefined && storage.alarm <= Date.now()) await object.alarm();
    });
    await assert.rejects(engine.swap("big", "x".repeat(1_500_000), 0), /larger than etcd takes, which is 1\.5 MiB/);
    const { keys, revision } = await engine.list(true);
    const lease = await engine.grant(5_000);
    await engine.put("instances/c", "here", lease);
    // the platform ends the object and makes it again
    const again = objectOver(storage);
    const ask = async (path: string, body: unknown) =>
      await (await again.fetch(new Request(`http://x/v3/${path}`, { method: "POST", body: JSON.stringify(body) })))
        .json();
    const listed = await ask("kv/range", { key: btoa("lb/"), range_end: btoa("lb0") });
    assert.equal(Number(listed.header.revision), revision + 1);
    assert.equal(listed.kvs.length, keys.size + 1);
    assert.equal((await ask("lease/keepalive", { ID: lease })).result.TTL, "5");
    const watched = await again.fetch(
      new Request("http://x/v3/watch", {
        method: "POST",
        body: JSON.stringify({ create_request: { key: btoa("lb/"), start_revision: "2" } }),
      }),
    );
    assert.match(
      await watched.text(),
      /"canceled":true,"compact_revision"/,
      "what was before is forgotten: list again",
    );
  } finally {
    await listener.close();
  }
});

test("keys that no instance has written are left alone, and spoil nothing", async () => {
  const world = await worldOf(2, "a", "b"), [a, b] = world.members as [Member, Member];
  const odd = [
    "instances/x",
    "instances/",
    "told/x",
    "told/default http://s0:1#change",
    "told/#change",
    "other",
    "secrets",
  ];
  for (const key of odd) {
    for (const value of ["", "{", "[]", "{}", '{"id":1,"down":7}', "null"]) world.store.set(key, value);
  }
  await world.pass(1_000);
  world.store.set("config", world.text + "# after\n");
  await world.pass(1_000);
  const late = await world.join("c");
  for (const { lb, fleet } of [a, b, late]) {
    assert.match(lb.balancer.table.config.text, /# after/);
    assert.deepEqual(fleet.view().instances.map(({ name }) => name), ["a", "b", "c"]);
    assert.equal(fleet.view().problem, "");
  }
});
