// A changed routes.yml: what did not change stays as it is written, and what is on disk is always whole.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { spawnSync } from "node:child_process";
import {
  chmodSync,
  chownSync,
  existsSync,
  linkSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import fc from "fast-check";
import { parse, stringify } from "yaml";
import { createAdmin, createLoadBalancer, parseConfig, rewrite } from "../../lb.ts";
import { type Program, sleep, startProgram, test, until } from "../rig/rig.ts";

const FILE = `# head
services: # pools
  shop:
    # the first
    servers:
      - localhost:8081 # main
      # second
      - { url: localhost:8082, weight: 3 } # x
      - url: localhost:8083
        weight: 2 # w

    retries: 1   # aligned
  # between
  blog: { servers: [ a:1, b:2 ], health: { path: /h } }

# routes below
routes:
  - path: /x   # hm
    service: shop
  - { path: /y, service: blog, headers: { x-a: "\${A}", x-b: \${B} } }
# end
default: { service: shop }
# last
`;

// deno-lint-ignore no-explicit-any
type Loose = any;
/** Spaces before a comment become one as soon as anything changes. */
const spaced = (text: string): string => text.replaceAll(/(\S) +#/g, "$1 #");
/** Lines that were taken out (-) and lines that came in (+), in the order of the file. */
function changed(text: string, edit: (raw: Loose) => void): string[] {
  const raw = parse(text.replaceAll(/\$\{(\w+)\}/g, "$<$1>"), { uniqueKeys: false });
  edit(raw);
  const shall = JSON.parse(JSON.stringify(raw).replaceAll(/\$<(\w+)>/g, "${$1}"));
  const written = rewrite(text, shall);
  if (written === text) return [];
  const [before, after] = [spaced(text).split("\n"), written.split("\n")];
  return [
    ...before.filter((line) => !after.includes(line)).map((line) => `-${line}`),
    ...after.filter((line) => !before.includes(line)).map((line) => `+${line}`),
  ];
}

const CHANGES: [what: string, edit: (raw: Loose) => void, ...lines: string[]][] = [
  [
    "a server that is a word becomes a map",
    (raw) => raw.services.shop.servers[0] = { url: "localhost:8081", state: "drain" },
    "-      - localhost:8081 # main",
    "+      - { url: localhost:8081, state: drain } # main",
  ],
  ["the first item goes", (raw) => raw.services.shop.servers.shift(), "-      - localhost:8081 # main"],
  [
    "an item goes with the comment above it",
    (raw) => raw.services.shop.servers.splice(1, 1),
    "-      # second",
    "-      - { url: localhost:8082, weight: 3 } # x",
  ],
  [
    "the last item goes",
    (raw) => raw.services.shop.servers.pop(),
    "-      - url: localhost:8083",
    "-        weight: 2 # w",
  ],
  ["an item comes", (raw) => raw.services.shop.servers.push("c:1"), "+      - c:1"],
  [
    "a value of an item",
    (raw) => raw.services.shop.servers[2].weight = 5,
    "-        weight: 2 # w",
    "+        weight: 5 # w",
  ],
  ["a key of an item", (raw) => raw.services.shop.servers[2].state = "maint", "+        state: maint"],
  [
    "a value keeps the comment behind it",
    (raw) => raw.services.shop.retries = 3,
    "-    retries: 1 # aligned",
    "+    retries: 3 # aligned",
  ],
  [
    "a key with a map in it",
    (raw) => raw.services.shop.health = { path: "/h", headers: { a: "b: c", d: "${X}", e: "1.10", f: "a, b" } },
    '+    health: { path: /h, headers: { a: "b: c", d: ${X}, e: "1.10", f: "a, b" } }',
  ],
  ["a service comes", (raw) => raw.services.more = { servers: ["a:1"] }, "+  more: { servers: [ a:1 ] }"],
  [
    "a service on one line goes",
    (raw) => delete raw.services.blog,
    "-  # between",
    "-  blog: { servers: [ a:1, b:2 ], health: { path: /h } }",
  ],
  [
    "a list on one line",
    (raw) => raw.services.blog.servers = ["b:2", "c:3"],
    "-  blog: { servers: [ a:1, b:2 ], health: { path: /h } }",
    "+  blog: { servers: [ b:2, c:3 ], health: { path: /h } }",
  ],
  [
    "a map on one line",
    (raw) => raw.services.blog = { servers: ["a:1", "b:2"], health: "off", retries: 0 },
    "-  blog: { servers: [ a:1, b:2 ], health: { path: /h } }",
    "+  blog: { servers: [ a:1, b:2 ], health: off, retries: 0 }",
  ],
  ["a route goes", (raw) => raw.routes.shift(), "-  - path: /x # hm", "-    service: shop"],
  ["a route gets a key", (raw) => raw.routes[0].strip = true, "+    strip: true"],
  [
    "a value between variables",
    (raw) => raw.routes[1].path = "/z",
    '-  - { path: /y, service: blog, headers: { x-a: "${A}", x-b: ${B} } }',
    '+  - { path: /z, service: blog, headers: { x-a: "${A}", x-b: ${B} } }',
  ],
  ["the top gets a key", (raw) => raw.log = "json", "+log: json"],
  ["nothing", () => {}],
];
for (const [what, edit, ...lines] of CHANGES) {
  test(`only what changes is written anew: ${what}`, () => assert.deepEqual(changed(FILE, edit), lines));
}

test("keys without a value, JSON, Windows' line ends and files without a last line end are changed in their own way", () => {
  const after = (text: string, edit: (raw: Loose) => void) => {
    const raw = parse(text);
    edit(raw);
    return rewrite(text, raw);
  };
  const shop = (raw: Loose) => raw.services = { shop: { servers: ["a:1"] } };
  assert.equal(after("services:\nlog: off\n", shop), "services: { shop: { servers: [ a:1 ] } }\nlog: off\n");
  assert.equal(after("services: # none\n", shop), "services: { shop: { servers: [ a:1 ] } } # none\n");
  assert.equal(after("a: 1 # one", (raw) => raw.b = 2), "a: 1 # one\nb: 2\n");
  assert.equal(after("a:\r\n  - 1 # x\r\nb: 1\r\n", (raw) => raw.b = 2), "a:\r\n  - 1 # x\r\nb: 2\r\n");
  const json = '{\n "a": [1, 2],\n "b": {}\n}\n';
  assert.equal(after(json, (raw) => raw.a.push("x y")), '{\n "a": [\n  1,\n  2,\n  "x y"\n ],\n "b": {}\n}\n');
  assert.deepEqual(JSON.parse(after(json, (raw) => raw.b = { "c d": ["e"] })), { a: [1, 2], b: { "c d": ["e"] } });
  const flow = "a: {\n  b: 1, # one\n  c: 2 # two\n}\n";
  assert.equal(after(flow, (raw) => delete raw.a.b), "a:\n  {\n    c: 2 # two\n  }\n");
  assert.equal(after("{ a: 1, # one\n b: 2 } # two\n", (raw) => raw.b = 3), "{\n a: 1, # one\n b: 3\n} # two\n");
});

test("indentation, quotes, numbers, blank lines and comments beside a key stay as they are written", () => {
  const text = `# head
services: # pools

  # first
  shop: # s
    servers: # list
    - a:1 # one

    - 'b:2'
    - "c:3"
    health: { headers: { x-a: 007, x-b: 1e3, x-c: 1.10, x-d: "1.10", x-e: ~, x-f: yes, x-g: "\${A}" } }
    text: |
      one
        two

    none:
  retries: 1
`;
  const raw = parse(text);
  Object.assign(raw.services.shop.health.headers, { "x-a": "007", "x-b": "1e3", "x-c": "1.10" }); // text, as it is read
  assert.equal(rewrite(text, { ...raw, log: "off" }), `${text}log: off\n`);
});

test("an item that comes first or changes its place brings no comment of another one with it", () => {
  const text = "a:\n  - { x: 1 } # one\n  # second\n  - { x: 2 } # two\n";
  const written = rewrite(text, { a: [{ x: 3 }, { x: 2 }, { x: 1 }] });
  assert.equal(written, "a:\n  - { x: 3 }\n  # second\n  - { x: 2 } # two\n  - { x: 1 } # one\n");
});

test("what an anchor shares is not changed in one place only: an alias is written out, an anchor is refused", () => {
  const text = "a: &x { b: 1 }\nc: *x\n";
  assert.equal(rewrite(text, { a: { b: 1 }, c: { b: 2 } }), "a: &x { b: 1 }\nc: { b: 2 }\n");
  assert.throws(() => rewrite(text, { a: { b: 2 }, c: { b: 1 } }), /anchors/);
});

test("any file becomes any other one, and comments on lines that stay the same survive", () => {
  const word = fc.oneof(
    fc.stringMatching(/^[a-z0-9:./ ,#\-*&!"'{}[\]|>%@`~?]{1,8}$/),
    fc.constantFrom("${A}", "true", "1.10", "a\nb"),
  );
  const { tree } = fc.letrec((tie) => ({
    tree: fc.oneof({ maxDepth: 3, depthSize: "small" }, fc.integer(), fc.boolean(), word, tie("map"), tie("list")),
    map: fc.dictionary(word, tie("tree"), { maxKeys: 4 }),
    list: fc.array(tie("tree"), { maxLength: 4 }),
  }));
  const file = fc.dictionary(word, tree, { minKeys: 1, maxKeys: 5 });
  const styles = [{}, { collectionStyle: "flow" }, { indent: 4, indentSeq: false }] as const;
  const asText = (raw: unknown, style: (typeof styles)[number]) =>
    stringify(raw, { ...style, lineWidth: 0, aliasDuplicateObjects: false });
  const bare = (raw: unknown) => JSON.parse(JSON.stringify(raw).replaceAll("${A}", "A"));
  fc.assert(
    fc.property(file, file, fc.constantFrom(...styles), (before, after, style) => {
      const text = asText(bare(before), style);
      const written = rewrite(text, bare(after));
      assert.deepEqual(parse(written), bare(after));
      assert.equal(rewrite(text, bare(before)), text, "what stays the same stays as it is");
    }),
    { numRuns: 300 },
  );
});

// ─── On disk ───

async function inFolder(use: (folder: string, file: string) => unknown): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), "lb-"));
  try {
    await use(folder, join(folder, "routes.yml"));
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}
const read = (file: string) => readFileSync(file, "utf8");

const over = (port: number): string => `default: { servers: [127.0.0.1:${port}] }\n`;
const ONE = over(1), TWO = over(2), THEIRS = over(3);
/** Has the API of a balancer with the config ONE put TWO into its place. */
async function save(file: string): Promise<void> {
  const admin = createAdmin(createLoadBalancer(parseConfig(ONE), { report: () => {} }), { file });
  const headers = { "host": "127.0.0.1", "content-type": "text/yaml", "if-match": "*" };
  const answer = await admin.request("http://127.0.0.1/config", { method: "PUT", headers, body: TWO });
  if (!answer.ok) throw new Error(await answer.text());
}

test("a saved file keeps its mode and leaves the one before as .bak; a link stays a link", () =>
  inFolder(async (folder, file) => {
    writeFileSync(file, ONE);
    chmodSync(file, 0o640);
    symlinkSync(file, join(folder, "link.yml"));
    await save(join(folder, "link.yml"));
    assert.deepEqual([read(file), read(`${file}.bak`)], [TWO, ONE]);
    assert.deepEqual([statSync(file).mode & 0o777, statSync(`${file}.bak`).mode & 0o777], [0o640, 0o640]);
    assert.ok(lstatSync(join(folder, "link.yml")).isSymbolicLink());
    assert.ok(!existsSync(`${file}.new`));
  }));

test("the .bak is a file of its own, so that file systems without hard links do", () =>
  inFolder(async (_, file) => {
    writeFileSync(file, ONE);
    linkSync(file, `${file}.too`);
    await save(file);
    assert.deepEqual([read(`${file}.bak`), statSync(`${file}.bak`).nlink], [ONE, 1]);
    assert.ok(!existsSync(`${file}.bak.new`));
  }));

test(
  "a saved file keeps its group",
  { skip: process.getuid?.() !== 0 && "only root gives files away" },
  () =>
    inFolder(async (_, file) => {
      writeFileSync(file, ONE);
      chownSync(file, 0, 12_345);
      await save(file);
      assert.deepEqual([statSync(file).gid, statSync(`${file}.bak`).gid], [12_345, 12_345]);
    }),
);

test("a file that somebody else has changed is not overwritten; one that is gone is written anew, for us alone", () =>
  inFolder(async (_, file) => {
    writeFileSync(file, THEIRS);
    await assert.rejects(save(file), /changed by somebody else/);
    assert.equal(read(file), THEIRS);
    rmSync(file);
    await save(file);
    assert.deepEqual([read(file), statSync(file).mode & 0o777], [TWO, 0o600]);
  }));

test("a file that cannot be written stays as it is, and the reason is told", () =>
  inFolder(async (folder, file) => {
    writeFileSync(file, ONE);
    mkdirSync(`${file}.new`); // in the way of what is written first
    await assert.rejects(save(file), /routes\.yml\S* cannot be written: /);
    assert.equal(read(file), ONE);
    rmSync(`${file}.new`, { recursive: true });
    const long = join(folder, `${"x".repeat(250)}.yml`); // no name is left for the new one
    writeFileSync(long, ONE);
    await assert.rejects(save(long), /cannot be written: /);
    assert.equal(read(long), ONE);
  }));

test("kill -9 in the middle of saving leaves a whole file, the old one or the new one", () =>
  inFolder(async (_, file) => {
    const text = (weight: number) =>
      `# ${
        "long ".repeat(5_000)
      }\nservices: { shop: { servers: [ { url: 127.0.0.1:1, weight: ${weight} } ] } }\ndefault: { service: shop }\n\n# end\n`;
    writeFileSync(file, text(1));
    const saved = new Set<number>();
    for (let round = 0; round < 8; round++) {
      const lb = await startProgram("", ["-c", file, "--admin", "127.0.0.1:0"]);
      let sent = 1, over = false;
      const changes = (async () => {
        while (!over) {
          const body = JSON.stringify({ weight: sent++ % 200 + 1 });
          const init = { method: "PATCH", body, headers: { "content-type": "application/json" } };
          await fetch(`http://127.0.0.1:${lb.admin}/services/shop/servers/127.0.0.1:1`, init)
            .then((answer) => answer.text()).catch(() => over = true); // killed, maybe in the middle of an answer
        }
      })();
      await until("some changes are sent", () => sent > 3);
      await sleep(round * 3);
      process.kill(lb.pid, "SIGKILL");
      await lb.stop();
      over = true;
      await changes;
      const weight = Number(/weight: (\d+)/.exec(read(file))?.[1]);
      assert.equal(read(file), text(weight), "the file is not whole");
      saved.add(weight);
    }
    assert.ok(Math.max(...saved) > 1, "no change was ever saved");
  }));

// ─── Through the running program ───

const WRITTEN = `\
# Grüße: the shop's file
services: # pools
  # the first one
  shop:
    retries: 1   # aligned
    servers:
      - 127.0.0.1:1 # main
      - { url: 127.0.0.1:2, weight: 3 }\x20\x20
    health: off # nobody listens
  blog: { servers: [ 127.0.0.1:3 ], health: off }

# below all others
default: { service: shop }
log:   combined # Apache's
# end
`;
/** What the first patch makes of it, and what the second one makes of that. */
const ONCE = WRITTEN.replace("log:   combined", "log: json").replace("# end", "trust: [ 10.0.0.0/8 ]\n\n# end")
  .replace("retries: 1   #", "retries: 1 #").replace("}  \n", "}\n");
const TWICE = ONCE.replace("retries: 1 ", "retries: 2 ").replace("    health: off # nobody listens\n", "");

const SPELT: [how: string, spell: (text: string) => string][] = [
  ["as editors write it", (text) => text],
  ["with Windows' line ends", (text) => text.replaceAll("\n", "\r\n")],
  ["with a byte order mark", (text) => `\ufeff${text}`],
];
for (const [how, spell] of SPELT) {
  test(`patches of the config and of a service change nothing else but spaces, and the .bak is the file before: ${how}`, async () => {
    const lb = await startProgram(spell(WRITTEN), ["--admin", "127.0.0.1:0"]);
    try {
      const patch = async (path: string, body: string, expected: string) => {
        const before = readFileSync(lb.file);
        const headers = { "content-type": "application/yaml" };
        const said = await fetch(`http://127.0.0.1:${lb.admin}${path}`, { method: "PATCH", body, headers });
        assert.equal(said.status, 200, await said.text());
        assert.equal(read(lb.file), expected);
        assert.deepEqual(readFileSync(`${lb.file}.bak`), before);
      };
      await patch("/config", "# not kept\nlog: json\ntrust: [10.0.0.0/8]\n", spell(ONCE));
      await patch("/services/shop", "retries: 2\nhealth: null # out\n", spell(TWICE));
    } finally {
      await lb.stop();
    }
  });
}

/** One change of what runs, by the API. */
async function change(lb: Program, retries: number): Promise<{ status: number; detail: string }> {
  const init = { method: "PATCH", body: JSON.stringify({ retries }), headers: { "content-type": "application/json" } };
  const said = await fetch(`http://127.0.0.1:${lb.admin}/services/shop`, init);
  const { detail = "" } = await said.json();
  return { status: said.status, detail };
}
const running = async (lb: Program): Promise<unknown> =>
  (await (await fetch(`http://127.0.0.1:${lb.admin}/services/shop`)).json()).config;
const SHOP = "services: { shop: { servers: [127.0.0.1:1], health: off } }\ndefault: { service: shop }\n";

test("a file that is not UTF-8 is not read, so that no change loses its bytes", async () => {
  const lb = await startProgram(SHOP, ["--admin", "127.0.0.1:0"]);
  try {
    const latin = Buffer.from(`# Gr\xfc\xdfe\n${SHOP}`, "latin1");
    writeFileSync(lb.file, latin);
    await until(
      "it is reported",
      () => /stays in force:\n[^]*routes\.yml\S* cannot be read: /.test(lb.output()),
      20_000,
    );
    assert.equal((await change(lb, 2)).status, 409);
    assert.deepEqual(readFileSync(lb.file), latin);
  } finally {
    await lb.stop();
  }
});

const mount = (...args: string[]) => spawnSync("mount", args).status === 0;
const mayMount = process.getuid?.() === 0 && (() => {
  const folder = mkdtempSync(join(tmpdir(), "lb-"));
  const done = mount("-t", "tmpfs", "lb", folder);
  if (done) spawnSync("umount", [folder]);
  rmSync(folder, { recursive: true });
  return done;
})();

test(
  "a disk that is full, or read-only, is told as the reason; what runs and what is on disk stay the same",
  { skip: !mayMount && "this user may not mount" },
  () =>
    inFolder(async (folder, file) => {
      assert.ok(mount("-t", "tmpfs", "-o", "size=64k", "lb", folder));
      let lb: Program | undefined;
      try {
        writeFileSync(file, SHOP);
        lb = await startProgram("", ["-c", file, "--admin", "127.0.0.1:0"]);
        const refused = async (why: RegExp) => {
          const [text, config] = [read(file), await running(lb!)];
          const { status, detail } = await change(lb!, 5);
          assert.equal(status, 500, detail);
          assert.match(detail, why);
          assert.deepEqual([read(file), await running(lb!)], [text, config]);
          assert.deepEqual(readdirSync(folder).filter((name) => name.endsWith(".new")), []);
        };
        assert.throws(() => writeFileSync(join(folder, "full"), Buffer.alloc(1 << 20)), /ENOSPC/);
        await refused(/routes\.yml\S* cannot be written: .*(ENOSPC|[Nn]o space)/);
        rmSync(join(folder, "full"));
        assert.equal((await change(lb, 2)).status, 200);
        assert.ok(mount("-o", "remount,ro", folder));
        await refused(/routes\.yml\S* cannot be written: .*(EROFS|[Rr]ead-only)/);
        assert.ok(mount("-o", "remount,rw", folder));
        assert.equal((await change(lb, 3)).status, 200);
        assert.match(read(file), /retries: 3/);
      } finally {
        await lb?.stop();
        spawnSync("umount", [folder]);
      }
    }),
);
