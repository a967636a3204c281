// One version of everything: what Deno reads in deno.json and what Bun and Node read in package.json are the same.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

const read = (name: string) => readFileSync(new URL(`../../${name}`, import.meta.url), "utf8");
const json = (name: string) => JSON.parse(read(name));

const { imports } = json("deno.json") as { imports: Record<string, string> };
interface Package {
  dependencies: Record<string, string>;
  devDependencies: Record<string, string>;
  version: string;
}
const { dependencies, devDependencies, version } = json("package.json") as Package;
/** What the build and the tests run on; Deno finds those that they import in deno.json too. */
const tools = { ...devDependencies, ...(json(".ci/package.json") as Package).devDependencies };

/** `npm:/hono@4.1.0/` is hono in 4.1.0. */
const target = (address: string) => /^npm:\/?((?:@[\w.-]+\/)?[\w.-]+)@([\w.-]+)\/?$/.exec(address)?.slice(1);

test("deno.json and package.json name the same packages in the same versions", () => {
  const fromDeno = Object.entries(imports).map(([name, address]) => {
    const [found = "", version = ""] = target(address) ?? [];
    assert.equal(name.replace(/\/$/, ""), found, address);
    return [found, version] as const;
  });
  const named = new Set(fromDeno.map(([name]) => name));
  const ours = Object.entries({ ...tools, ...dependencies }).filter(([name]) =>
    named.has(name) || name in dependencies
  );
  assert.deepEqual(Object.fromEntries(fromDeno), Object.fromEntries(ours));
});

test("every version is exact", () => {
  for (const [name, version] of [...Object.entries(dependencies), ...Object.entries(tools)]) {
    assert.match(version, /^\d+\.\d+\.\d+(-[\w.]+)?$/, name);
  }
});

test("every package that lb.ts imports is named, and every one named is imported", () => {
  const imported = [...read("lb.ts").matchAll(/ from "([^"\s]+)";$/gm)].map((found) => found[1]!)
    .filter((name) => !name.startsWith("node:"))
    .map((name) => /^(?:@[^/]+\/)?[^/]+/.exec(name)![0]);
  assert.deepEqual([...new Set(imported)].sort(), Object.keys(dependencies).sort());
});

test("the program's version is that of package.json and deno.json", () => {
  assert.equal(/^const VERSION = "([^"]+)";$/m.exec(read("lb.ts"))?.[1], version);
  assert.equal(json("deno.json").version, version);
});
