// A changed routes.yml: what did not change stays as it is written.

import assert from "node:assert/strict";
import fc from "fast-check";
import { parse, stringify } from "yaml";
import { rewrite } from "../../lb.ts";
import { test } from "../rig/rig.ts";

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
