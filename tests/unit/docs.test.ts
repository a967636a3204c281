// README and docs/: every example can be used as it stands, every link leads somewhere, and the reference is the schema's.

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import process from "node:process";
import { after } from "node:test";
import { fileURLToPath } from "node:url";
import { jsonSchema, parseConfig } from "../../lb.ts";
import { A, KEY } from "../rig/certificates.ts";
import { makeReference } from "../rig/reference.ts";
import { test } from "../rig/rig.ts";

const ROOT = fileURLToPath(new URL("../..", import.meta.url));
const read = (name: string): string => readFileSync(join(ROOT, name), "utf8");
const PAGES = [
  "README.md",
  ...readdirSync(join(ROOT, "docs")).filter((name) => /\.md$/.test(name)).map((name) => `docs/${name}`),
];
const env = new Proxy<Record<string, string>>({}, {
  get: (_, name) => `value-of-${String(name)}`,
  getOwnPropertyDescriptor: () => ({ enumerable: true, configurable: true, value: "" }),
});

test("every routes.yml in README and docs can be used as it stands", () => {
  let count = 0;
  for (const page of PAGES) {
    for (const [, text] of read(page).matchAll(/^ *```yaml\n(.*?)^ *```/gms)) {
      count++;
      assert.deepEqual(parseConfig(text!, { env, file: page }).warnings, [], `${page}:\n${text}`);
    }
  }
  assert.ok(count >= 10, `${count} examples`);
});

test("README's ten lines with two mistakes give the two messages that README shows", () => {
  const readme = read("README.md").split("\n## Ten lines\n")[1]!.split("\n## ")[0]!;
  const [, text = ""] = /```yaml\n(.*?)```/s.exec(readme) ?? [],
    [, shown = ""] = /\n\n```\n(.*?)\n```/s.exec(readme) ?? [];
  const broken = text.replace("interval: 10s", "interval: 10 sec").replace("service: blog }", "service: blgo }");
  assert.throws(() => parseConfig(broken), { message: shown });
});

test("docs/config.md is what the schema is made into", () => {
  assert.equal(
    read("docs/config.md"),
    makeReference(),
    "write it anew: deno run -A tests/rig/reference.ts > docs/config.md",
  );
});

test("the whole file shows every key there is", () => {
  const whole = read("docs/routes.yml"), keys = new Set<string>();
  JSON.stringify(jsonSchema(), (key, value) => {
    if (key === "properties") Object.keys(value).forEach((name) => keys.add(name));
    return value;
  });
  assert.ok(keys.size > 60);
  assert.deepEqual([...keys].filter((key) => !new RegExp(`\\b${key}\\b`).test(whole)), []);
});

test("README's figures are those of tests/load/bench/RESULTS.md", () => {
  const results = read("tests/load/bench/RESULTS.md");
  const rows = [...read("README.md").matchAll(/^\| (\w+): .*? \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$/gm)];
  assert.equal(rows.length, 6);
  for (const [, name, ...figures] of rows) {
    const [, section] = results.split(`\n## ${name}: `),
      ratio = (runtime: string) => new RegExp(`lb.ts on ${runtime} +\\| +([\\d.]+)`).exec(section!)?.[1];
    assert.deepEqual(figures, ["node", "bun", "deno"].map(ratio), name);
  }
});

/** The first block of a page in a language. */
const blockOf = (page: string, language: string): string =>
  new RegExp(`^\`\`\`${language}\\n(.*?)^\`\`\``, "ms").exec(read(page))![1]!;

const folder = mkdtempSync(join(tmpdir(), "lb-docs-"));
after(() => rmSync(folder, { recursive: true }));
writeFileSync(join(folder, "www.pem"), A);
writeFileSync(join(folder, "www.key"), KEY);

/** The files of other programs, each with what it takes them for right by, and what belongs around it. */
const OTHERS: [language: string, page: string, command: string[], around?: (text: string) => string][] = [
  ["nginx", "migrate", ["nginx", "-t", "-c"], (text) => {
    const there = text.replace(/listen (\d+)/g, `listen unix:${folder}/$1.sock`); // it listens even here
    return `pid ${folder}/pid;\nevents {}\nhttp {\n${there}}\n`;
  }],
  ["haproxy", "migrate", ["haproxy", "-c", "-f"]],
  ["caddy", "migrate", ["caddy", "validate", "--adapter", "caddyfile", "--config"]],
  ["ini", "deploy", ["systemd-analyze", "verify"], (text) => text.replace(/(?<==)\S+node \S+/, process.execPath)],
];
for (const [language, page, [command, ...args], around = (text: string) => text] of OTHERS) {
  test(`docs/${page}.md: ${command} takes its file`, { needs: [command!] }, () => {
    const file = join(folder, language === "ini" ? "lb.service" : language);
    writeFileSync(file, around(blockOf(`docs/${page}.md`, language)).replaceAll(/www\.(?=pem|key)/g, `${folder}/www.`));
    const { status, stderr } = spawnSync(command!, [...args, file], {
      encoding: "utf8",
      env: { ...process.env, HOME: folder },
    });
    assert.equal(status, 0, stderr);
  });
}

/** A heading's name in links, as GitHub makes it. */
const anchorOf = (heading: string): string =>
  heading.toLowerCase().replace(/[^\p{L}\p{N}\s_-]/gu, "").trim().replaceAll(" ", "-");

test("README is short, and leads to every page of docs", () => {
  const readme = read("README.md");
  assert.ok(readme.split("\n").length <= 350, "what is longer belongs into docs");
  assert.deepEqual(PAGES.filter((page) => page !== "README.md" && !readme.includes(`](${page}`)), []);
});

test("every link within README and docs leads to a file and a heading that are there", () => {
  for (const page of PAGES) {
    for (const [, link] of read(page).matchAll(/\]\(([^)\s]+)\)/g)) {
      if (/^https?:/.test(link!)) continue;
      const [path, anchor] = link!.split("#"), target = path ? join(dirname(page), path) : page;
      assert.ok(existsSync(join(ROOT, target)), `${page}: ${link}`);
      if (anchor === undefined) continue;
      const anchors = [...read(target).matchAll(/^#+ (.*)$/gm)].map(([, heading]) => anchorOf(heading!));
      assert.ok(anchors.includes(anchor), `${page}: ${link}; there is ${anchors.join(", ")}`);
    }
  }
});
