import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { jsonSchema, parseConfig } from "../lb.ts";

const readme = readFileSync(new URL("../README.md", import.meta.url), "utf8");
const blocks = [...readme.matchAll(/```yaml\n(.*?)```/gs)].map(([, text]) => text!);

test("every routes.yml in README can be used as it stands", () => {
  assert.ok(blocks.length >= 3);
  for (const text of blocks) {
    parseConfig(text, { env: { LB_ADMIN_TOKEN: "a-token-of-operators", LB_READ_TOKEN: "another-token" } });
  }
});

test("the whole file in README shows every key there is", () => {
  const whole = blocks.at(-1)!;
  const keys = new Set<string>();
  JSON.stringify(jsonSchema(), (key, value) => {
    if (key === "properties") Object.keys(value).forEach((name) => keys.add(name));
    return value;
  });
  assert.ok(keys.size > 60);
  const shown = (key: string) => new RegExp(`\\b${key}\\b`).test(whole);
  assert.deepEqual([...keys].filter((key) => !shown(key)), []);
});
