// lb.ts can be read from top to bottom: its head lists its sections, each section uses only those above it, what the
// runtimes differ in stands in one place, and no function is longer than a screen.
// There is no parser in reach of all three runtimes, so a small tokenizer does: it knows comments, strings, templates and
// regular expressions, and leans on deno fmt for the rest (what begins in the first column is a top-level statement).

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

const MOST_LINES = { function: 60, section: 600, file: 6000 };
const RUNTIME_NAMES = new Set(["Deno", "Bun", "process", "navigator"]);
const NODE_SECTIONS = new Set([
  "Wire",
  "Pool",
  "Upgrade",
  "Listeners",
  "Tls",
  "Tcp",
  "Doors",
  "Node",
  "Runtimes",
  "Save",
  "Call",
  "Workers",
  "Main",
]);

interface Token {
  text: string;
  kind: "name" | "string" | "mark";
  line: number; // from 1
  first: boolean; // stands in the first column
}

/** What may stand before a regular expression and never before a division. */
const BEFORE_PATTERN = /^(?:[(,=:[!&|?{};+*%<>~^-]|=>|return|typeof|case|in|of|await|throw|else|do)$/;
const TOKEN =
  /(\s+|\/\/.*|\/\*[^]*?\*\/)|([A-Za-z_$][\w$]*)|("(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|\d[\w.]*)|(=>|\?\.|\.\.\.|[^])/y;
const PATTERN = /\/(?:[^/\\[\n]|\\.|\[(?:[^\]\\\n]|\\.)*\])+\/[a-z]*/y;

/** The tokens of a source without its comments. In templates only what stands in ${} is looked at. */
function tokenize(source: string): Token[] {
  const tokens: Token[] = [];
  const templates: number[] = []; // how deep in braces each template's ${ is
  let depth = 0, at = 0, line = 1;
  const skip = (text: string) => {
    line += text.split("\n").length - 1;
    at += text.length;
  };
  const template = () => {
    const rest = /(?:[^`\\$]|\\[^]|\$(?!\{))*(`|\$\{)/y;
    rest.lastIndex = at;
    const found = rest.exec(source);
    assert.ok(found, `line ${line}: a template without an end`);
    skip(found[0]);
    if (found[1] === "${") templates.push(depth);
  };
  while (at < source.length) {
    const before = tokens.at(-1)?.text ?? ";";
    const pattern = source[at] === "/" && BEFORE_PATTERN.test(before) && !/^\/[/*]/.test(source.slice(at, at + 2));
    const matcher = pattern ? PATTERN : TOKEN;
    matcher.lastIndex = at;
    const found = matcher.exec(source);
    assert.ok(found, `line ${line}: cannot be read`);
    const [text, space, name] = found;
    const first = at === 0 || source[at - 1] === "\n";
    if (!pattern && space !== undefined) {
      skip(text);
      continue;
    }
    const kind = pattern || found[3] !== undefined || text === "`" ? "string" : name !== undefined ? "name" : "mark";
    const closes = text === "}" && kind === "mark" && templates.at(-1) === depth;
    if (!closes) tokens.push({ text: kind === "string" ? '""' : text, kind, line, first });
    skip(text);
    if (kind === "mark" && !closes) depth += text === "{" ? 1 : text === "}" ? -1 : 0;
    if (closes) templates.pop();
    if (closes || text === "`") template();
  }
  return tokens;
}

interface Section {
  number: number;
  name: string;
  idea: string;
  line: number;
}

const sectionsOf = (source: string): Section[] =>
  [...source.matchAll(/^\/\/ (\d+)\. (\w[\w ]*): (.+)$/gm)].map((found) => ({
    number: Number(found[1]),
    name: found[2]!,
    idea: found[3]!,
    line: source.slice(0, found.index).split("\n").length,
  }));

const contentsOf = (source: string) =>
  [...source.slice(0, source.indexOf("*/")).matchAll(/^ \*\s+(\d+)\. (\w[\w ]*?)(?:\s{2,}|: )(.+)$/gm)].map((
    found,
  ) => ({
    number: Number(found[1]),
    name: found[2]!,
    idea: found[3]!,
  }));

/** Which section a line is in; 0: the head. */
const sectionAt = (sections: Section[], line: number) => sections.findLast((one) => one.line <= line)?.number ?? 0;

/** The top-level statements. */
function statementsOf(tokens: Token[]): Token[][] {
  const statements: Token[][] = [];
  for (const token of tokens) {
    if (token.first && token.kind === "name") statements.push([token]);
    else statements.at(-1)?.push(token);
  }
  return statements;
}

const MODIFIERS = new Set(["export", "default", "async", "declare", "abstract"]);

/** What a statement declares: its keyword and name. */
function declared(statement: Token[]): { keyword: string; name: string } {
  const [keyword, name] = statement.filter(({ text }) => !MODIFIERS.has(text) && text !== "*");
  return { keyword: keyword?.text ?? "", name: name?.kind === "name" ? name.text : "" };
}

const CLOSING: Record<string, string> = { "(": ")", "{": "}", "[": "]" };

/** The index of the bracket that closes the one at `open`. */
function closing(tokens: Token[], open: number): number {
  const [opens, closes] = [tokens[open]!.text, CLOSING[tokens[open]!.text]!];
  let depth = 0;
  for (let i = open; i < tokens.length; i++) {
    if (tokens[i]!.kind !== "mark") continue;
    if (tokens[i]!.text === opens) depth++;
    else if (tokens[i]!.text === closes && --depth === 0) return i;
  }
  return tokens.length;
}

/** The names that a statement binds for itself: variables, parameters, what is caught. They hide those of the file. */
function bound(tokens: Token[]): Set<string> {
  const names = new Set<string>();
  const add = (from: number, to: number) => {
    for (let i = from; i < to; i++) {
      const [before, after] = [tokens[i - 1]?.text ?? "", tokens[i + 1]?.text ?? ""];
      if (tokens[i]!.kind === "name" && /^[(,{[:]$|^\.\.\.$/.test(before) && /^[,)}\]:=?]$/.test(after)) {
        names.add(tokens[i]!.text);
      }
    }
  };
  tokens.forEach(({ text, kind }, i) => {
    const next = tokens[i + 1];
    if (/^(const|let|var|function|class)$/.test(text) && next) {
      if (next.kind === "name" && i > 2) names.add(next.text); // the statement's own name is the file's
      else if (next.text === "{" || next.text === "[") add(i + 1, closing(tokens, i + 1));
    }
    if (/^(let|const)$/.test(text)) { // const a = f(x, y), b = 1
      for (let at = i + 1; at < tokens.length && tokens[at]!.text !== ";"; at++) {
        if (tokens[at]!.kind === "mark" && tokens[at]!.text in CLOSING) at = closing(tokens, at);
        else if (tokens[at]!.text === "," && tokens[at + 2]?.text === "=") names.add(tokens[at + 1]!.text);
      }
    }
    if (kind === "name" && next?.text === "=>") names.add(text);
    if (text === "(" && kind === "mark" && !/^(if|for|while|switch)$/.test(tokens[i - 1]?.text ?? "")) {
      const end = closing(tokens, i);
      if (/^(=>|\{|:)$/.test(tokens[end + 1]?.text ?? "")) add(i, end + 1);
    }
  });
  return names;
}

/** Whether the name at `i` is the file's own, in a value's place: no property, key, type or label. */
function isUse(tokens: Token[], i: number, kinds: ReadonlySet<string>): boolean {
  const [before, after] = [tokens[i - 1]?.text ?? "", tokens[i + 1]?.text ?? ""];
  if (before === "." || before === "?." || before === "typeof") return false;
  if (after === ":" && /^[{,;(]$/.test(before)) return false;
  if (kinds.has("class")) return /^(new|instanceof|extends)$/.test(before) || after === ".";
  return !(kinds.has("type") && /^[:|&<]$/.test(before) && after !== "(");
}

/** Uses of what is declared further down. */
function downward(source: string): string[] {
  const sections = sectionsOf(source);
  const statements = statementsOf(tokenize(source));
  const home = new Map<string, number>();
  const kinds = new Map<string, Set<string>>();
  for (const statement of statements) {
    const { keyword, name } = declared(statement);
    if (!/^(function|const|let|class|type|interface)$/.test(keyword) || !name) continue;
    kinds.set(name, (kinds.get(name) ?? new Set()).add(keyword === "interface" ? "type" : keyword));
    if (!/^(type|interface)$/.test(keyword)) home.set(name, sectionAt(sections, statement[0]!.line));
  }
  const found: string[] = [];
  for (const statement of statements) {
    const { keyword, name } = declared(statement);
    if (/^(import|type|interface)$/.test(keyword)) continue;
    const own = bound(statement);
    const section = sectionAt(sections, statement[0]!.line);
    statement.forEach((token, i) => {
      const target = token.kind === "name" && !own.has(token.text) ? home.get(token.text) : undefined;
      if (target === undefined || target <= section || !isUse(statement, i, kinds.get(token.text)!)) return;
      found.push(`${token.line}: ${name || keyword} uses ${token.text} of section ${target}`);
    });
  }
  return found;
}

/** Names of the runtimes before the sections where they belong, and uses of node: modules in other sections. */
function misplaced(source: string): string[] {
  const sections = sectionsOf(source);
  const name = (line: number) => sections.findLast((one) => one.line <= line)?.name ?? "";
  const runtimes = sections.find((one) => one.name === "Doors")?.line ?? 0;
  const found: string[] = [];
  const fromNode = new Set<string>();
  for (const statement of statementsOf(tokenize(source))) {
    if (statement[0]!.text === "import") {
      const text = source.split("\n").slice(statement[0]!.line - 1, statement.at(-1)!.line).join(" ");
      if (!/from "node:/.test(text) || /^import type/.test(text)) continue;
      for (const one of text.slice(6, text.indexOf(" from ")).split(/[{},]/)) {
        if (one.trim() && !one.trim().startsWith("type ")) fromNode.add(one.trim().split(" as ").at(-1)!);
      }
      continue;
    }
    const own = bound(statement);
    statement.forEach(({ text, line, kind }, i) => {
      if (kind !== "name" || statement[i - 1]?.text === "." || own.has(text)) return;
      if (line < runtimes && RUNTIME_NAMES.has(text)) found.push(`${line}: ${text} above Doors`);
      if (fromNode.has(text) && !NODE_SECTIONS.has(name(line)) && statement[i + 1]?.text !== ":") {
        found.push(`${line}: ${text} of a node: module in ${name(line)}`);
      }
    });
  }
  return found;
}

/** Functions with more lines than a screen has: from the line that opens the body to the one that closes it. */
function tooLong(source: string): string[] {
  const lines = source.split("\n");
  const found: string[] = [];
  lines.forEach((line, at) => {
    const indent = /^ */.exec(line)![0];
    const rest = line.slice(indent.length);
    if (!/(\)|=>|\): .*) \{$/.test(rest) || /^(?:\} )?(?:if|for|while|switch|else|catch)\b/.test(rest)) return;
    const length = lines.slice(at).findIndex((one) => one.startsWith(`${indent}}`)) + 1;
    if (length > MOST_LINES.function) found.push(`${at + 1}: ${length} lines: ${rest}`);
  });
  return found;
}

const SOURCE = readFileSync(new URL("../lb.ts", import.meta.url), "utf8");
const words = (idea: string) => idea.replaceAll("`", "").split(":")[0]!;

test("the head lists the sections that the file has, in their order and words", () => {
  const sections = sectionsOf(SOURCE);
  const contents = contentsOf(SOURCE);
  assert.ok(sections.length > 5);
  assert.deepEqual(
    contents.map(({ number, name }) => `${number}. ${name}`),
    sections.map(({ number, name }) => `${number}. ${name}`),
  );
  assert.deepEqual(sections.map(({ number }) => number), sections.map((_, i) => i + 1));
  for (const [i, { idea }] of contents.entries()) {
    const begins = words(sections[i]!.idea);
    assert.ok(begins.startsWith(words(idea)), `the head says "${idea}", section ${i + 1} says "${sections[i]!.idea}"`);
  }
});

test("each section uses only itself and the sections above it", () => {
  assert.deepEqual(downward(SOURCE), []);
});

test("no runtime is named above Doors, and node: modules are used only where the program meets the machine", () => {
  assert.deepEqual(misplaced(SOURCE), []);
});

test("no function is longer than a screen", () => {
  assert.deepEqual(tooLong(SOURCE), []);
  const sections = [...sectionsOf(SOURCE), { name: "", line: SOURCE.split("\n").length }];
  if (sections.at(-1)!.line > MOST_LINES.file) console.warn(`lb.ts has ${sections.at(-1)!.line} lines`);
  for (const [i, { name, line }] of sections.slice(0, -1).entries()) {
    const length = sections[i + 1]!.line - line;
    if (length > MOST_LINES.section) console.warn(`${name} has ${length} lines`);
  }
});

test("a use of what stands below is found in every section of the file", { timeout: 60_000 }, () => {
  const lines = SOURCE.split("\n");
  const sections = sectionsOf(SOURCE).slice(0, -1);
  for (const { name, line } of sections) {
    for (const at of [line + 1, sectionsOf(SOURCE).find((one) => one.line > line)!.line - 2]) { // its begin and its end
      const bad = [...lines.slice(0, at), "const planted = () => main([], {});", ...lines.slice(at)].join("\n");
      const added = downward(bad).filter((one) => one.includes("planted uses main"));
      assert.equal(added.length, 1, `${name}, line ${at}`);
    }
  }
});

test("what is wrong is found: a use of what stands below, a runtime's name, a node: module, a long function", () => {
  const bad = `import { connect, type Socket } from "node:net";
// 1. Above: what is above. It tries.
interface Box { run: typeof below }
const pattern = /[/]below("/;
const label = \`below \${"below"} \${\`\${1 + 1} below\`}\`;
function hides(below: number) {
  const one = [1, 2], Later = 3;
  return below + one + Later;
}
const key = { below: 1, get: (box: Box) => box.below };
function above(socket: Socket): number {
  // below(0)
  return below(key.below);
}
const text = \`\${below(1)}\`;
const boxed = () => new Later();
const type = (one: Later) => one;
const where = process.cwd() + connect;
// 2. Doors: where it runs
function below(count: number): number {
  return count / 2 / Number(Deno.pid);
}
class Later {}
function long(): void {
${"  below(1);\n".repeat(60)}}
`;
  assert.deepEqual(downward(bad), [
    "13: above uses below of section 2",
    "15: text uses below of section 2",
    "16: boxed uses Later of section 2",
  ]);
  assert.deepEqual(misplaced(bad), ["18: process above Doors", "18: connect of a node: module in Above"]);
  assert.deepEqual(tooLong(bad), ["24: 62 lines: function long(): void {"]);
});
