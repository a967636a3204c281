// A changed routes.yml on disk: it is always whole, and what nobody changed stays as it is written.

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
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { createAdmin, createLoadBalancer, parseConfig } from "../../lb.ts";
import { makeFolder, type Program, sharedProgram, sleep, startProgram, test, until } from "../rig/rig.ts";

// ─── On disk ───

async function inFolder(use: (folder: string, file: string) => unknown): Promise<void> {
  const folder = makeFolder();
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
    for (let round = 0; round < 5; round++) {
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
      await sleep(round * 5);
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

const shared = sharedProgram(["--admin", "127.0.0.1:0"]);

const SPELT: [how: string, spell: (text: string) => string][] = [
  ["as editors write it", (text) => text],
  ["with Windows' line ends", (text) => text.replaceAll("\n", "\r\n")],
  ["with a byte order mark", (text) => `\ufeff${text}`],
];
for (const [how, spell] of SPELT) {
  test(`patches of the config and of a service change nothing else but spaces, and the .bak is the file before: ${how}`, async () => {
    const lb = await shared.begin(spell(WRITTEN));
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
  const lb = await shared.begin(SHOP);
  const latin = Buffer.from(`# Gr\xfc\xdfe\n${SHOP}`, "latin1");
  writeFileSync(lb.file, latin);
  await until(
    "it is reported",
    () => /stays in force:\n[^]*routes\.yml\S* cannot be read: /.test(lb.output()),
    20_000,
  );
  assert.equal((await change(lb, 2)).status, 409);
  assert.deepEqual(readFileSync(lb.file), latin);
});

const mount = (...args: string[]) => spawnSync("mount", args).status === 0;
const mayMount = process.getuid?.() === 0 && (() => {
  const folder = makeFolder();
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
