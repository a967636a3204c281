// Programs that people use, through the running program: curl, git, Redis, a browser, and what reads its log. Debian has
// them all.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { createHash } from "node:crypto";
import { readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer, type RequestListener } from "node:http";
import { type AddressInfo, connect } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { after } from "node:test";
import { type Browser, chromium } from "playwright-core";
import { A, CA, KEY } from "../rig/certificates.ts";
import { BINARY, echoStrictly, openWebSocket, TEXT, webSocketServer } from "../rig/websocket.ts";
import { spawnGuarded } from "../rig/guard.ts";
import {
  freePort,
  get,
  listenLocally,
  makeFolder,
  type Program,
  rawRequest,
  sharedProgram,
  sleep,
  startProgram,
  test,
  until,
} from "../rig/rig.ts";

/** Runs a command to its end; what it prints. Fails where it does. */
const run = (command: string, args: string[], cwd = tmpdir()): Promise<string> =>
  new Promise((resolve, reject) =>
    execFile(command, args, { cwd, maxBuffer: 1 << 26 }, (error, out, err) => {
      if (error) reject(new Error(`${command} ${args.join(" ")}: ${error.message}\n${err}`));
      else resolve(out);
    })
  );

async function inFolder(use: (folder: string) => Promise<void>) {
  const folder = makeFolder();
  try {
    await use(folder);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

/** An HTTP server, while `use` lasts. */
async function serving(listener: RequestListener, use: (address: string) => Promise<void>) {
  const server = createServer(listener);
  await listenLocally(server);
  try {
    await use(`127.0.0.1:${(server.address() as AddressInfo).port}`);
  } finally {
    server.closeAllConnections();
    await new Promise((resolve) => server.close(resolve));
  }
}

const shared = sharedProgram(["--admin", "127.0.0.1:0"]);

/** The program with this config, while `use` lasts: the shared one, but where there are listeners to be opened. */
async function balancing(config: object, use: (lb: Program) => Promise<void>, beside: Record<string, string> = {}) {
  const isShared = !("listen" in config || "tcp" in config);
  const lb = await (isShared ? shared.begin(config) : startProgram(config, [], beside));
  try {
    await use(lb);
  } finally {
    await lb.stop();
  }
}

const sha = (bytes: Uint8Array) => createHash("sha256").update(bytes).digest("hex");
/** 24 MiB that repeat nothing. */
const LARGE = new Uint8Array(24 << 20);
for (let i = 0, seed = 7; i < LARGE.length; i++) LARGE[i] = (seed = Math.imul(seed, 1_103_515_245) + 12_345) >>> 16;

/** Serves LARGE, also from somewhere on; the first time it breaks off in the middle. */
const downloads = (): RequestListener => {
  let asked = 0;
  return ({ headers }, answer) => {
    const from = Number(/^bytes=(\d+)-$/.exec(headers.range ?? "")?.[1] ?? 0), rest = LARGE.subarray(from);
    const range = { "content-range": `bytes ${from}-${LARGE.length - 1}/${LARGE.length}` };
    answer.writeHead(from ? 206 : 200, { "content-length": rest.length, etag: '"1"', ...from ? range : {} });
    if (asked++) answer.end(rest);
    else answer.write(rest.subarray(0, 5 << 20), () => setTimeout(() => answer.destroy(), 200));
  };
};

test("curl resumes a large download that has been broken off", { needs: ["curl"] }, () =>
  serving(
    downloads(),
    (server) =>
      balancing({ log: "off", default: { servers: [server] } }, ({ port }) =>
        inFolder(async (folder) => {
          const args = ["-sS", "-o", "got", `http://127.0.0.1:${port}/large`];
          await assert.rejects(run("curl", args, folder), /transfer closed|outstanding|Recv failure|18|56/);
          const first = readFileSync(join(folder, "got")).length;
          assert.ok(first > 0 && first < LARGE.length, `${first} bytes at first`);
          await run("curl", ["-C", "-", ...args], folder);
          assert.equal(sha(readFileSync(join(folder, "got"))), sha(LARGE));
        })),
  ));

test(
  "curl uploads a large file, and asks first whether it may (Expect: 100-continue)",
  { needs: ["curl"] },
  () =>
    serving(async (request, answer) => {
      const hash = createHash("sha256");
      for await (const piece of request) hash.update(piece);
      answer.end(hash.digest("hex"));
    }, (server) =>
      balancing({ log: "off", default: { servers: [server] } }, ({ port }) =>
        inFolder(async (folder) => {
          writeFileSync(join(folder, "large"), LARGE);
          const args = ["-sS", "-H", "Expect: 100-continue", "-T", "large", `http://127.0.0.1:${port}/up`];
          assert.equal(await run("curl", args, folder), sha(LARGE));
        }))),
);

test(
  "curl over TLS that would rather have HTTP/2 gets it, whatever its server speaks",
  { needs: ["curl"] },
  () =>
    serving(
      (request, answer) => answer.end(`${request.headers["x-forwarded-proto"]} ${request.httpVersion}`),
      (server) =>
        balancing(
          {
            log: "off",
            listen: { address: "127.0.0.1:0", tls: { cert: "a.pem", key: "a.key" } },
            default: { servers: [server] },
          },
          ({ port }) =>
            inFolder(async (folder) => {
              writeFileSync(join(folder, "ca.pem"), CA);
              const where = ["--resolve", `a.test:${port}:127.0.0.1`, `https://a.test:${port}/`];
              const args = ["-sS", "--http2", "--cacert", "ca.pem", "-w", " %{http_version}", ...where];
              assert.equal(await run("curl", args, folder), "https 1.1 2");
            }),
          { "a.pem": A, "a.key": KEY },
        ),
    ),
);

test(
  "curl that offers HTTP/2 by an upgrade gets HTTP/1.1, also with a body",
  { needs: ["curl"] },
  () =>
    serving(async (request, answer) => {
      const { headers, httpVersion } = request;
      answer.end(`${httpVersion} ${headers.upgrade ?? headers["http2-settings"] ?? "plain"} ${await text(request)}`);
    }, (server) =>
      balancing({ log: "off", default: { servers: [server] } }, async ({ port }) => {
        const curl = (...args: string[]) =>
          run("curl", ["-sS", "--http2", "-w", " %{http_version}", ...args, `http://127.0.0.1:${port}/`]);
        assert.equal(await curl(), "1.1 plain  1.1");
        assert.equal(await curl("-d", "hello"), "1.1 plain hello 1.1");
      })),
);

test("git clones over HTTP", { needs: ["git"] }, () =>
  inFolder((folder) =>
    serving((request, answer) => {
      const path = join(folder, new URL(request.url!, "http://a.test").pathname);
      try {
        answer.end(readFileSync(path));
      } catch {
        answer.writeHead(404).end();
      }
    }, (server) =>
      balancing({ log: "off", default: { servers: [server] } }, async ({ port }) => {
        const git = (...args: string[]) =>
          run("git", ["-c", "user.name=t", "-c", "user.email=t@a.test", ...args], folder);
        await git("init", "-q", "work");
        for (let i = 0; i < 20; i++) writeFileSync(join(folder, "work", `file${i}`), LARGE.subarray(0, 10_000 * i));
        await git("-C", "work", "add", ".");
        await git("-C", "work", "commit", "-qm", "all of it");
        await git("clone", "-q", "--bare", "work", "bare.git");
        await git("-C", "bare.git", "update-server-info");
        await git("clone", "-q", `http://127.0.0.1:${port}/bare.git`, "cloned");
        assert.equal(await git("-C", "cloned", "rev-parse", "HEAD"), await git("-C", "work", "rev-parse", "HEAD"));
        assert.deepEqual(readFileSync(join(folder, "cloned", "file19")), readFileSync(join(folder, "work", "file19")));
      }))
  ));

test("redis-cli works through tcp", { needs: ["redis-server", "redis-cli"] }, () =>
  inFolder(async (folder) => {
    const [redis, front] = [await freePort(), await freePort()];
    const words = ["--port", `${redis}`, "--bind", "127.0.0.1", "--save", "", "--dir", folder];
    const server = spawnGuarded("redis-server", words, { stdout: "ignore" });
    try {
      let up = false;
      await until("Redis listens", () => {
        const socket = connect(redis, "127.0.0.1", () => up = socket.destroy() !== undefined);
        socket.on("error", () => {});
        return up;
      });
      const http = { listen: "127.0.0.1:0", default: { respond: { status: 204 } } };
      const tcp = [{ listen: `127.0.0.1:${front}`, servers: [`127.0.0.1:${redis}`] }];
      await balancing({ log: "off", ...http, tcp }, async () => {
        const cli = (...args: string[]) => run("redis-cli", ["-h", "127.0.0.1", "-p", `${front}`, ...args]);
        assert.equal((await cli("set", "a", "b")).trim(), "OK");
        assert.equal((await cli("get", "a")).trim(), "b");
        assert.equal(
          (await cli("eval", "redis.call('set', 'large', string.rep('x', 1048576)) return 1", "0")).trim(),
          "1",
        );
        assert.equal((await cli("get", "large")).trim(), "x".repeat(1_048_576));
        const listener = spawnGuarded("redis-cli", ["-h", "127.0.0.1", "-p", `${front}`, "subscribe", "news"]);
        let heard = "";
        listener.stdout.on("data", (bytes) => heard += bytes);
        await until("it listens", () => heard.includes("subscribe"));
        await cli("publish", "news", "something new");
        await until("it hears", () => heard.includes("something new"));
        listener.kill();
      });
    } finally {
      server.kill("SIGKILL");
    }
  }));

/** The browser, which is started with the first page. */
let browser: Promise<Browser> | undefined;
const openPage = async () => {
  const args = ["--headless", "--no-sandbox", "--ignore-certificate-errors"];
  return await (await (browser ??= chromium.launch({ executablePath: "/usr/bin/chromium", args }))).newPage();
};
after(async () => await (await browser)?.close());

/** What a page does: a WebSocket says something and hears it again, events of the server come one by one. */
const PAGE = `<!doctype html><title>-</title><script>
  const socket = new WebSocket("ws://" + location.host + "/ws"), events = new EventSource("/events"), seen = [];
  const tell = (text) => { seen.push(text); if (seen.length === 4) document.title = seen.sort().join(" "); };
  socket.onopen = () => socket.send("hello");
  socket.onmessage = ({ data }) => { tell("socket:" + data); socket.close(1000); };
  socket.onclose = ({ code }) => tell("closed:" + code);
  events.onmessage = ({ data }) => { tell("event:" + data); if (data === "2") events.close(); };
</script>`;

test("a page in a browser has a WebSocket and server-sent events", { needs: ["chromium"] }, async () => {
  const echoing = await webSocketServer((peer) => {
    peer.onFrame = ({ opcode, payload }) => {
      if (opcode === TEXT || opcode === BINARY) peer.send(opcode, payload);
      else peer.close(1000);
    };
  });
  try {
    await serving((request, answer) => {
      if (request.url !== "/events") return void answer.setHeader("content-type", "text/html").end(PAGE);
      answer.writeHead(200, { "content-type": "text/event-stream" }).write("data: 1\n\n");
      setTimeout(() => answer.write("data: 2\n\n"), 300); // and the connection stays
    }, (server) =>
      balancing({
        log: "off",
        paths: [{ path: "/ws", servers: [echoing.address] }],
        default: { servers: [server] },
      }, async ({ port }) => {
        const page = await openPage();
        await page.goto(`http://127.0.0.1:${port}/`);
        await page.waitForFunction("document.title !== '-'", undefined, { timeout: 30_000 });
        assert.equal(await page.title(), "closed:1000 event:1 event:2 socket:hello");
        await page.close();
      }));
  } finally {
    await echoing.close();
  }
});

/** A page with 100 images, and a WebSocket that says something and hears it again. */
const IMAGES = `<!doctype html><title>-</title><script>
  const seen = { images: 0, versions: new Set(), socket: "" };
  const tell = () => { if (seen.images === 100 && seen.socket) document.title = seen.images + " " + [...seen.versions] + " " + seen.socket; };
  for (let i = 0; i < 100; i++) {
    const image = new Image();
    image.onload = () => {
      seen.images++;
      for (const { nextHopProtocol } of performance.getEntriesByType("resource")) seen.versions.add(nextHopProtocol);
      if (seen.images < 100) return tell();
      const socket = new WebSocket("wss://" + location.host + "/ws");
      socket.onopen = () => socket.send("hello");
      socket.onmessage = ({ data }) => { seen.socket = data; tell(); };
    };
    image.src = "/images/" + i + ".svg";
  }
</script>`;

test("a browser loads a page with 100 images over HTTP/2, and a WebSocket on the same connection", {
  needs: ["chromium"],
}, async () => {
  const echoing = await webSocketServer(echoStrictly);
  try {
    await serving(({ url = "" }, answer) => {
      if (!url.startsWith("/images/")) return void answer.setHeader("content-type", "text/html").end(IMAGES);
      const size = 5 + Number(/\d+/.exec(url));
      answer.setHeader("content-type", "image/svg+xml");
      answer.end(
        `<svg xmlns="http://www.w3.org/2000/svg" width="${size}" height="5"><!-- ${"x".repeat(20_000)} --></svg>`,
      );
    }, (server) =>
      balancing({
        listen: { address: "127.0.0.1:0", tls: { cert: "a.pem", key: "a.key" } },
        paths: [{ path: "/ws", servers: [echoing.address] }],
        default: { servers: [server] },
      }, async (lb) => {
        const page = await openPage();
        await page.goto(`https://127.0.0.1:${lb.port}/`);
        await page.waitForFunction("document.title !== '-'", undefined, { timeout: 30_000 });
        assert.equal(await page.title(), "100 h2 hello");
        await page.close();
        await until("the WebSocket is in the log", () => /"GET \/ws HTTP\/2\.0" 101 /.test(lb.output()));
        assert.equal(lb.output().match(/"GET \/images\/\d+\.svg HTTP\/2\.0" 200 /g)?.length, 100);
      }, { "a.pem": A, "a.key": KEY }));
  } finally {
    await echoing.close();
  }
});

test("h2load, nghttp and curl speak HTTP/2 without TLS: 2,000 requests of 4 connections, and large bodies both ways", {
  needs: ["curl", "h2load", "nghttp"],
}, () =>
  serving(
    async (request, answer) => {
      let length = 0;
      for await (const piece of request) length += piece.length;
      answer.end(request.url === "/large" ? LARGE : `${request.method} ${length}`);
    },
    (server) =>
      balancing(
        { log: "off", listen: { address: "127.0.0.1:0", h2c: true }, default: { servers: [server] } },
        ({ port }) =>
          inFolder(async (folder) => {
            const url = `http://127.0.0.1:${port}`;
            writeFileSync(join(folder, "large"), LARGE);
            assert.match(
              await run("h2load", ["-n", "2000", "-c", "4", "-m", "25", url]),
              /2000 succeeded, 0 failed, 0 errored/,
            );
            assert.match(
              await run("nghttp", ["-v", "-d", "large", url], folder),
              new RegExp(`:status: 200[^]*POST ${LARGE.length}`),
            );
            await run("curl", ["-sS", "--http2-prior-knowledge", "-o", "got", `${url}/large`], folder);
            assert.equal(sha(readFileSync(join(folder, "got"))), sha(LARGE));
            const upload = ["-sS", "--http2-prior-knowledge", "-T", "large", "-w", " %{http_version}", `${url}/up`];
            assert.equal(await run("curl", upload, folder), `PUT ${LARGE.length} 2`);
          }),
      ),
  ));

// ─── What reads its log ───

test("goaccess reads every line of the combined log", { needs: ["goaccess"] }, async () => {
  const echoing = await webSocketServer(echoStrictly);
  await serving((request, answer) => {
    if (request.url === "/cut") answer.writeHead(200, { "content-length": 9 }).write("12345", () => answer.destroy());
    else answer.writeHead(request.url === "/bad" ? 500 : 200).end("hello");
  }, (server) =>
    inFolder(async (folder) => {
      const front = await freePort();
      const shop = { servers: [server], health: "off", eject: "off", retries: 0 };
      const config = {
        listen: "127.0.0.1:0",
        trust: ["127.0.0.0/8"],
        services: { 'my "own" shop': shop, closed: { ...shop, servers: [{ url: server, state: "drain" }] } },
        routes: [
          { host: "a.test", path: "/ws", servers: [echoing.address], health: "off" },
          { host: "a.test", path: "/closed", service: "closed" },
          { host: "a.test", service: 'my "own" shop' },
        ],
        tcp: [{ listen: `127.0.0.1:${front}`, servers: [server] }],
      };
      const sent = [
        get("/"),
        get("/bad"),
        get("/cut"),
        get("/closed"),
        get("/", "", "b.test"),
        get(`/${"long/".repeat(600)}?q="a%0d%0a`, 'User-Agent: "x" \\ [\xe9\x9b] 200 5\r\nReferer: " 404 "-\r\n'),
        get("/", "User-Agent: \r\nReferer: \r\nX-Forwarded-For: 2001:db8::1\r\n"),
        get("/").replace("GET", "HEAD"),
        get("/").replace("GET", "PROPFIND"),
        get("/").replace("GET", "TRACE"),
        get("/", "Content-Length: 3\r\n").replace("GET", "POST") + "abc",
      ];
      let lines: string[] = [];
      await balancing(config, async (lb) => {
        for (const request of sent) await rawRequest(lb.port, request);
        await rawRequest(front, get("/"));
        const peer = await openWebSocket(lb.port, "/ws");
        peer.close(1000);
        await peer.closed();
        peer.socket.destroy();
        const own = () => lines = lb.output().split("\n").filter((line) => / - - \[/.test(line));
        await until("all are written", () => own().length >= sent.length + 2);
      });
      writeFileSync(join(folder, "access.log"), lines.join("\n") + "\n");
      const args = ["--no-global-config", "--log-format=COMBINED", "-o", "got.json", "access.log"];
      await run("goaccess", args, folder);
      const { general, hosts, not_found: lost } = JSON.parse(readFileSync(join(folder, "got.json"), "utf8"));
      assert.equal(lines.length, sent.length + 2);
      assert.deepEqual([general.valid_requests, general.failed_requests], [lines.length, 0]);
      const from = (data: { data: string; hits: { count: number } }[]) =>
        data.map(({ data, hits }) => `${data} ${hits.count}`).sort();
      assert.deepEqual(from(hosts.data), [`127.0.0.1 ${lines.length - 1}`, "2001:db8::1 1"]);
      assert.deepEqual(from(lost.data), ["/ 1"]);
    })).finally(echoing.close);
});

/** slowhttptest's three modes: heads, bodies and reading that never come to an end. */
const SLOW = Object.entries({
  "slow headers": ["-H", "-i", "1"],
  "slow body": ["-B", "-i", "1", "-s", "100000"],
  "slow read": ["-X", "-n", "1", "-w", "10", "-y", "20", "-z", "5", "-k", "3"],
});

test(
  "slowhttptest's three modes at once keep nobody else from being served",
  { needs: ["slowhttptest"] },
  () =>
    serving(
      (request, answer) =>
        request.resume().on("end", () => answer.end(LARGE.subarray(0, request.url === "/" ? 5 : 1 << 20))),
      (server) =>
        balancing({ log: "off", default: { servers: [server] } }, async (lb) => {
          const all = ["-c", "200", "-r", "100", "-l", "6", "-p", "3", "-u", `http://127.0.0.1:${lb.port}/large`];
          const attacks = SLOW.map(async ([mode, args]) =>
            [mode, await run("slowhttptest", [...args, ...all])] as const
          );
          let going = true;
          const over = Promise.all(attacks).finally(() => going = false);
          let served = 0;
          for (; going; served++) {
            const answer = await fetch(`http://127.0.0.1:${lb.port}/`, { signal: AbortSignal.timeout(5_000) });
            assert.deepEqual([answer.status, (await answer.arrayBuffer()).byteLength], [200, 5]);
            await sleep(50);
          }
          for (const [mode, said] of await over) {
            const available = [...said.matchAll(/service available:[^A-Z]*(YES|NO)/g)].map(([, word]) => word);
            assert.ok(available.length && !available.includes("NO"), `${mode}: ${available}\n${said}`);
          }
          assert.ok(served > 5, `${served} requests`);
          const inFlight = async () => {
            const text = await (await fetch(`http://127.0.0.1:${lb.admin}/metrics`)).text();
            return [...text.matchAll(/^lb_open_connections\{.* (\d+)$/gm)].map(([, count]) => Number(count));
          };
          let open = await inFlight(); // what was still on its way may come for a moment
          for (let i = 0; i < 500 && open[0] !== 0; i++) {
            await new Promise((go) => setTimeout(go, 20));
            open = await inFlight();
          }
          assert.deepEqual(open, [0]);
        }),
    ),
);
