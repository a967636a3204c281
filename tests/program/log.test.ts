// What the running program writes down, and what becomes of it where nobody reads it in time.

import assert from "node:assert/strict";
import {
  answer,
  get,
  type Message,
  type Program,
  rawRequest,
  scriptedServer,
  sharedProgram,
  sleep,
  startProgram,
  test,
  until,
  value,
} from "../rig/rig.ts";

const TRACE = "4bf92f3577b34da6a3ce929d0e0e4736", PARENT = "00f067aa0ba902b7";

// ─── The running program ───

const shared = sharedProgram();
/** The shared program with a config, or one of its own with these arguments. */
const begin = (config: unknown, args?: string[]) => args ? startProgram(config, args) : shared.begin(config);

/** The program over some servers, while `use` lasts; gives what has been said of requests since it listened. */
async function running(
  config: Record<string, unknown>,
  scripts: Parameters<typeof scriptedServer>[0][],
  use: (
    program: Awaited<ReturnType<typeof startProgram>>,
    lines: (count: number) => Promise<string[]>,
    servers: Awaited<ReturnType<typeof scriptedServer>>[],
  ) => Promise<void>,
  args?: string[],
) {
  const servers = await Promise.all(scripts.map(scriptedServer));
  const shop = { servers: servers.map(({ address }) => address), health: "off" };
  const program = await begin({ services: { shop }, default: { service: "shop" }, ...config }, args);
  const said = () => program.output().split("\n").filter((line) => /^(\{|127\.0\.0\.1 - )/.test(line));
  const lines = (count: number) => until(`${count} lines`, () => said().length >= count && said());
  try {
    await use(program, lines, servers);
  } finally {
    await program.stop();
    for (const server of servers) await server.close();
  }
}
const LONG = { timeout: 120_000 };
const hello = (visit: { send(...parts: (Buffer | number)[]): Promise<void> }) => visit.send(answer("hello"));

test(
  "the program writes Apache's line for each request, and what it knows of it",
  LONG,
  () =>
    running({ log: "combined" }, [hello], async (lb, lines, [server]) => {
      await rawRequest(lb.port, get('/a?b="c', "User-Agent: curl/8\r\nReferer: http://r.test/\r\n"));
      const [line] = await lines(1);
      const time = String.raw`\[\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d \+0000\]`;
      const told = String.raw`"GET /a\?b=(\\x22|%22)c HTTP/1\.1" 200 5 "http://r\.test/" "curl/8"`;
      const more = String.raw`shop ${server!.address} 1 [\d.]+/[\d.]+/[\d.]+ - \S+ [0-9a-f]{32}`;
      assert.match(line!, new RegExp(String.raw`^127\.0\.0\.1 - - ${time} ${told} ${more}$`));
    }),
);

test(
  "the program's json has the times of a request, in their order, over both attempts",
  LONG,
  () =>
    running({ log: "json" }, [
      (visit) => visit.send(answer("no", "", "503 No")),
      async (visit) => {
        await visit.send(50, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello", 50, "hello");
      },
    ], async (lb, lines, servers) => {
      await rawRequest(lb.port, get("/a?b=c", `traceparent: 00-${TRACE}-${PARENT}-01\r\nTraceState: x=y\r\n`));
      await rawRequest(lb.port, "TRACE / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n");
      const [passed, refused] = (await lines(2)).map((line) => JSON.parse(line));
      const { "lb.connected_ms": connected, "lb.head_ms": head, "lb.ended_ms": ended } = passed;
      assert.ok(0 < connected && connected < head && head < ended, `${connected} ${head} ${ended}`);
      assert.ok(head - connected > 40 && ended - head > 40, `${connected} ${head} ${ended}`);
      assert.deepEqual([passed["lb.attempts"], passed["http.response.body.size"]], [2, 10]);
      assert.deepEqual([passed["lb.service"], passed["lb.server"]], ["shop", servers[1]!.address]);
      assert.deepEqual([refused["error.type"], refused["lb.attempts"]], ["bad-method", 0]);
      assert.notEqual(passed["lb.request_id"], refused["lb.request_id"]);
      const seen = servers.map(({ requests }) => requests[0]!);
      const parts = seen.map((request: Message) => value(request, "traceparent").split("-"));
      assert.deepEqual(parts.map(([version, trace, , flags]) => [version, trace, flags]), [["00", TRACE, "01"], [
        "00",
        TRACE,
        "01",
      ]]);
      assert.notEqual(parts[0]![2], parts[1]![2]);
      assert.deepEqual(seen.map((request) => value(request, "tracestate")), ["x=y", "x=y"]);
      assert.deepEqual([passed.trace_id, passed.span_id], [TRACE, parts[1]![2]]);
    }),
);

for (const format of ["combined", "json"]) {
  test(
    `the program's ${format} log stays one line a request, whatever is in it`,
    LONG,
    () =>
      running({ log: format }, [hello], async (lb, lines) => {
        const evil =
          'User-Agent: a"b\\c\xe9\x9b\r\nReferer: " 200 0 "x\r\nAuthorization: Bearer sesame\r\nCookie: a=sesame\r\n';
        await rawRequest(lb.port, get("/log/%0d%0a127.0.0.1%20-%20%1b[31m\"'", evil));
        await rawRequest(lb.port, get("/x?\x1b[31m%0d%0a{", evil));
        await rawRequest(lb.port, get("/last"));
        const all = await lines(2);
        await until("the last", () => lb.output().includes("/last"));
        for (const line of all) assert.match(line, /^[\x20-\x7e]+$/);
        assert.ok(!lb.output().includes("sesame"));
        if (format === "json") { for (const line of all) assert.equal(typeof JSON.parse(line), "object"); }
      }),
  );
}

test(
  "the program samples what succeeds, and --log changes the format alone",
  LONG,
  () =>
    running({ log: { format: "combined", sample: "0%" } }, [
      (visit, { start }) => visit.send(answer("x", "", start.includes("/bad") ? "500 Bad" : "200 OK")),
    ], async (lb, lines) => {
      for (let i = 0; i < 20; i++) await rawRequest(lb.port, get("/good"));
      await rawRequest(lb.port, get("/bad"));
      const all = await lines(1);
      assert.deepEqual(all.map((line) => JSON.parse(line)["url.path"]), ["/bad"]);
    }, ["--log", "json"]),
);

test(
  "log: off writes nothing, and standard error has times and levels",
  LONG,
  () =>
    running({ log: "off" }, [hello], async (lb) => {
      await rawRequest(lb.port, get("/"));
      await lb.stop();
      const time = String.raw`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z`;
      const entries = lb.output().trimEnd().split("\n");
      for (const entry of entries) assert.match(entry, new RegExp(`^${time} info: `));
      assert.match(entries.at(-1)!, /info: drained$/);
    }, []),
);

test("a server that is down is told as a warning", LONG, async () => {
  const server = await scriptedServer(() => {});
  await server.close();
  const health = { interval: "100ms", timeout: "1s", rise: 1, fall: 1 };
  const lb = await begin({ default: { servers: [server.address], health } });
  try {
    await until("it is down", () => / warn: default: \S+ is down: /.test(lb.output()));
  } finally {
    await lb.stop();
  }
});

/** Asks for many lines of 56 kB: each letter of the agent is escaped. */
async function fill({ port }: Program, count: number) {
  const headers = { "user-agent": '"'.repeat(14_000) };
  const ask = () => fetch(`http://127.0.0.1:${port}/`, { headers }).then((one) => one.text());
  for (let i = 0; i < count; i += 20) {
    for (const body of await Promise.all(Array.from({ length: 20 }, ask))) assert.equal(body, "here");
  }
}
const filled = (lb: Program) =>
  lb.output().split("\n").filter((line) => /^127.* 200 4 "-" "(\\x22){14000}" .* \S+$/.test(line)).length;

test("a reader of the log that stalls costs lines, which are counted, and no request", LONG, async () => {
  const lb = await startProgram({ log: "combined", default: { respond: { body: "here" } } }), sent = 1_600; // 90 MB
  /** Until nothing more comes: its length is known at once, but to look into 64 MiB again and again keeps a machine busy. */
  const quiet = async () => {
    for (let before = -1; before !== lb.output().length;) {
      before = lb.output().length;
      await sleep(500);
    }
  };
  const lost = () => [...lb.errors().matchAll(/that are lost: (\d+)\n/g)].reduce((sum, one) => sum + Number(one[1]), 0);
  try {
    lb.stdout.pause();
    await fill(lb, sent);
    await until("the warning", () => lb.errors().includes("warn: nobody reads the access log: its lines are lost"));
    lb.stdout.resume();
    await until("what was lost is counted", () => lost() > 0, 60_000);
    await quiet();
    await fetch(`http://127.0.0.1:${lb.port}/last`).then((one) => one.text());
    await until("the log goes on", () => lb.output().includes("GET /last"), 60_000);
    assert.ok(lost() > 200 && lost() < 800, `${lost()} lines`);
    assert.equal(filled(lb) + lost(), sent);
  } finally {
    await lb.stop();
  }
});

test("a reader that takes its time has the whole log before the program ends", LONG, async () => {
  const lb = await startProgram({ log: "combined", default: { respond: { body: "here" } } });
  try {
    lb.stdout.pause();
    await fill(lb, 200); // 11 MB, far more than pipes hold
    const ended = lb.stop();
    await until("it has nothing else to do", () => lb.output().includes("info: drained"));
    lb.stdout.resume();
    await ended;
    await until("every line is there", () => filled(lb) === 200);
    assert.doesNotMatch(lb.output(), /lost/);
  } finally {
    await lb.stop();
  }
});

test("a log that cannot be written is told once, and how much was lost", LONG, async () => {
  const lb = await startProgram({ log: "combined", default: { respond: { body: "here" } } });
  const ask = () => fetch(`http://127.0.0.1:${lb.port}/`).then((one) => one.text());
  try {
    lb.stdout.destroy();
    for (let i = 0; i < 5; i++) {
      assert.equal(await ask(), "here");
      await sleep(50);
    }
    await until(
      "it is told",
      () => /warn: the access log cannot be written \(.+\): its lines are lost\n/.test(lb.output()),
    );
  } finally {
    await lb.stop();
  }
  assert.equal(lb.output().split("cannot be written").length, 2);
  assert.match(lb.output(), /warn: lines of the access log that are lost: [1-5]\n/);
});
