// A fleet without sockets: instances over one engine in memory, on a clock that only the test moves.

import assert from "node:assert/strict";
import { createLoadBalancer, EngineError, Fleet, type LoadBalancer, parseConfig } from "../../lb.ts";
import { answerTo } from "./balancer.ts";
import { seeded } from "./rig.ts";
import type { Engine, EngineEvent, EngineValue } from "./types.ts";

/** Time that passes when a test says so: who sleeps is woken in order. */
export class Clock {
  now = 0;
  private sleepers: { at: number; wake: () => void }[] = [];

  sleep = (milliseconds: number): Promise<void> =>
    new Promise((wake) => void this.sleepers.push({ at: this.now + milliseconds, wake }));

  async pass(milliseconds: number): Promise<void> {
    const end = this.now + milliseconds;
    for (;;) {
      await settled();
      const next = this.sleepers.toSorted((a, b) => a.at - b.at)[0];
      if (!next || next.at > end) break;
      this.now = Math.max(this.now, next.at);
      this.sleepers.splice(this.sleepers.indexOf(next), 1);
      next.wake();
    }
    this.now = end;
  }
}
/** What can go on without time passing has gone on. */
export async function settled(): Promise<void> {
  for (let i = 0; i < 4; i++) await new Promise((resolve) => setImmediate(resolve));
}

interface Watcher {
  from: number;
  hear(events: EngineEvent[]): void;
  end(why: string): void;
}

/** What etcd keeps, in memory. */
export class Store {
  revision = 1;
  keys = new Map<string, EngineValue & { lease: string }>();
  leases = new Map<string, { ttl: number; until: number }>();
  events: EngineEvent[] = [];
  watchers = new Set<Watcher>();
  writes = 0;
  isDown = false; // nobody gets an answer, and no lease ends
  private ids = 0;
  private readonly clock: Clock;

  constructor(clock: Clock) {
    this.clock = clock;
  }

  /** It is there again, with all that it knew: leases begin anew, as etcd's do. */
  restart(): void {
    this.isDown = false;
    for (const lease of this.leases.values()) lease.until = this.clock.now + lease.ttl;
  }
  expire(): void {
    if (this.isDown) return;
    for (const [id, { until }] of this.leases) if (until <= this.clock.now) this.end(id);
  }
  end(id: string): void {
    this.leases.delete(id);
    const gone = [...this.keys].filter(([, { lease }]) => lease === id).map(([key]) => key);
    if (gone.length) this.commit(gone.map((key) => ({ key, value: undefined, revision: this.revision + 1 })));
  }
  set(key: string, value: string | undefined, lease = ""): void {
    this.commit([{ key, value, revision: this.revision + 1 }], lease);
  }
  grant(ttl: number): string {
    const id = `${++this.ids}`;
    this.leases.set(id, { ttl, until: this.clock.now + ttl });
    return id;
  }
  private commit(events: EngineEvent[], lease = ""): void {
    this.revision++;
    this.writes++;
    for (const { key, value } of events) {
      if (value === undefined) this.keys.delete(key);
      else this.keys.set(key, { value, revision: this.revision, lease });
    }
    this.events.push(...events);
    for (const { hear } of this.watchers) hear(events);
  }
}

/** One instance's way to the store: silent where it does not answer, deaf where its watch brings nothing. */
export class FakeEngine implements Engine {
  silent = false;
  deaf = false;
  nexts = 0; // how often another member was chosen
  calls: string[] = [];
  private readonly store: Store;
  private watcher: Watcher | undefined;

  constructor(store: Store) {
    this.store = store;
  }
  private async call<T>(name: string, work: () => T): Promise<T> {
    await Promise.resolve();
    this.calls.push(name);
    if (this.silent || this.store.isDown) {
      this.watcher?.end("silent");
      throw new EngineError("silent", "no answer");
    }
    this.store.expire();
    return work();
  }
  next(): void {
    this.nexts++;
    this.deaf = false;
  }
  list(withValues: boolean) {
    return this.call("list", () => {
      const { revision, keys } = this.store;
      const shown = ({ value, revision }: EngineValue) => ({ value: withValues ? value : "", revision });
      return { revision, keys: new Map([...keys].map(([key, one]) => [key, shown(one)])) };
    });
  }
  swap(key: string, value: string, revision: number, lease = "") {
    return this.call("swap", () => {
      const there = this.store.keys.get(key);
      if ((there?.revision ?? 0) !== revision) {
        return { isOurs: false, value: there?.value ?? "", revision: there?.revision ?? 0 };
      }
      this.store.set(key, value, lease);
      return { isOurs: true, value, revision: this.store.revision };
    });
  }
  put(key: string, value: string, lease = "") {
    return this.call("put", () => {
      if (lease && !this.store.leases.has(lease)) throw new EngineError("lease", "the lease is over");
      this.store.set(key, value, lease);
    });
  }
  grant(ttl: number) {
    return this.call("grant", () => this.store.grant(ttl));
  }
  keepAlive(id: string) {
    return this.call("keepAlive", () => {
      const lease = this.store.leases.get(id);
      if (lease) lease.until = this.store["clock"].now + lease.ttl;
      return lease !== undefined;
    });
  }
  revoke(id: string) {
    return this.call("revoke", () => this.store.end(id));
  }
  watch(from: number, hear: (events: EngineEvent[]) => void) {
    const ended = Promise.withResolvers<string>(), { store } = this;
    const watcher: Watcher = {
      from,
      hear: (events) => void (!this.silent && !this.deaf && !store.isDown && hear(events)),
      end(why) {
        store.watchers.delete(watcher);
        ended.resolve(why);
      },
    };
    this.watcher = watcher;
    store.watchers.add(watcher);
    const missed = store.events.filter((event) => event.revision >= from);
    if (missed.length) watcher.hear(missed);
    return { ended: ended.promise, close: watcher.end };
  }
}

export interface Member {
  name: string;
  lb: LoadBalancer;
  fleet: Fleet;
  engine: FakeEngine;
  reports: string[];
  disk: { text: string; kept: string[] };
  /** Whether its process goes on: else it neither probes nor hears anything. */
  isUp(server: number): boolean;
  probed: number;
}

/** A fleet whose servers answer as `up` says, by their place. */
export class World {
  readonly clock = new Clock();
  readonly store = new Store(this.clock);
  readonly members: Member[] = [];
  readonly up: boolean[];
  readonly text: string;
  private readonly random = seeded(7);

  constructor(servers: number, fleet = "{ etcd: 'a:1', ttl: 3s, probers: 3 }") {
    this.up = Array.from({ length: servers }, () => true);
    const listed = this.up.map((_, i) => `s${i}:1`).join(", ");
    this.text = `fleet: ${fleet}\nlog: off\ndefault: { servers: [${listed}], panic: 0%, ` +
      `health: { path: /h, interval: 1s, fall: 2, rise: 2, timeout: 500ms } }\n`;
  }

  /** An instance that neither registers nor probes where others do: `fleet.listOnce` takes what the store says. */
  observe(): Member {
    return this.make("edge", this.text, new FakeEngine(this.store), true);
  }

  /** A further instance, which has joined or waited for that in vain. */
  async join(name: string, { text = this.text, engine = new FakeEngine(this.store) } = {}): Promise<Member> {
    const member = this.make(name, text, engine, false), started = member.fleet.start(3_000);
    await this.pass(200);
    if (engine.silent) await this.pass(3_000);
    await started;
    this.members.push(member);
    return member;
  }

  private make(name: string, text: string, engine: FakeEngine, isObserver: boolean): Member {
    const reports: string[] = [], disk: Member["disk"] = { text, kept: [] }, { clock } = this;
    const lb = createLoadBalancer(parseConfig(text), {
      now: () => clock.now,
      sleep: clock.sleep,
      random: this.random,
      report: (_, said) => void reports.push(said),
      fetch: (url, attempt) => {
        member.probed++;
        const server = Number(/s(\d+)/.exec(url)![1]), status = this.up[server] ? 200 : 503;
        return answerTo(attempt, status);
      },
    });
    const { fleet: own } = lb.balancer.table.config;
    const fleet = new Fleet(lb, engine, {
      ...{ own: own!, name, id: `${name} ${this.random()}`, file: "routes.yml", isObserver },
      parse: (text) => parseConfig(text),
      read: () => disk.text,
      save(before, text, keep) {
        if (keep) disk.kept.push(before);
        disk.text = text;
        return Promise.resolve();
      },
      onApplied() {},
    });
    const isUp = (server: number) => lb.balancer.table.services.get("default")!.servers[server]!.up;
    const member: Member = { name, lb, fleet, engine, reports, disk, isUp, probed: 0 };
    return member;
  }

  /** Time passes; all that live probe what is due. */
  async pass(milliseconds: number): Promise<void> {
    for (const end = this.clock.now + milliseconds; this.clock.now < end;) {
      await this.clock.pass(Math.min(100, end - this.clock.now));
      for (const { lb } of this.members) void lb.probe();
      await settled();
      this.store.expire();
    }
  }

  /** A process that ends without a word. */
  crash(member: Member): void {
    member.engine.silent = true;
    void member.fleet.leave();
    this.members.splice(this.members.indexOf(member), 1);
  }
  async leave(member: Member): Promise<void> {
    this.members.splice(this.members.indexOf(member), 1);
    void member.fleet.leave();
    await settled();
  }
}

/**
 * What every engine does, whatever it is: `pass` lets time go by. Keys with other prefixes may be there; with this one there
 * are none.
 */
export async function checkEngine(engine: Engine, pass: (milliseconds: number) => Promise<unknown>): Promise<void> {
  const becomes = async (what: string, is: () => boolean) => {
    for (let i = 0; !is(); i++) {
      assert.ok(i < 100, what);
      await pass(100);
    }
  };
  const first = await engine.list(true);
  assert.equal(first.keys.size, 0);
  const made = await engine.swap("config", "größer", 0);
  assert.ok(made.isOurs && made.revision > first.revision);
  assert.deepEqual(await engine.swap("config", "other", 0), {
    isOurs: false,
    value: "größer",
    revision: made.revision,
  });
  assert.deepEqual(await engine.swap("none", "other", 7), { isOurs: false, value: "", revision: 0 });
  assert.ok((await engine.swap("config", "second", made.revision)).isOurs);

  const lease = await engine.grant(2_000), other = await engine.grant(2_000);
  assert.notEqual(lease, other);
  await engine.put("instances/a", "here", lease);
  await engine.put("told/s http://h:1", "down");
  assert.equal(await engine.keepAlive(lease), true);
  assert.equal(await engine.keepAlive("4711"), false);
  const { keys, revision } = await engine.list(true);
  assert.deepEqual([...keys].map(([key, { value }]) => [key, value]), [
    ["config", "second"],
    ["instances/a", "here"],
    ["told/s http://h:1", "down"],
  ]);
  assert.equal(Math.max(...[...keys.values()].map((one) => one.revision)), revision);
  assert.deepEqual([...(await engine.list(false)).keys.values()].map(({ value }) => value), ["", "", ""]);

  const heard: string[] = [];
  const hear = (events: EngineEvent[]) => {
    for (const { key, value, revision } of events) heard.push(`${key} ${value ?? "gone"} ${revision - made.revision}`);
  };
  const watch = engine.watch(made.revision + 1, hear);
  await becomes("what was before is heard", () => heard.length === 3);
  await engine.put("instances/a", "again", lease);
  await becomes("what comes is heard", () => heard.length === 4);
  await becomes("the end of a lease that nobody keeps alive is heard", () => heard.length === 5);
  assert.deepEqual(heard, [
    "config second 1",
    "instances/a here 2",
    "told/s http://h:1 down 3",
    "instances/a again 4",
    "instances/a gone 5",
  ]);
  assert.equal(await engine.keepAlive(lease), false);
  await assert.rejects(engine.put("instances/a", "late", lease), (error: EngineError) => error.kind === "lease");
  const short = await engine.grant(60_000);
  await engine.put("instances/b", "here", short);
  await engine.revoke(short);
  await becomes("a lease that is given back is over at once", () => heard.at(-1) === "instances/b gone 7");
  watch.close("over");
  assert.equal(await watch.ended, "over");
  await engine.put("config", "third");
  await pass(200);
  assert.equal(heard.length, 7, "a closed watch hears nothing");
}
