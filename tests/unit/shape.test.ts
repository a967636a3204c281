// lb.ts can be read from top to bottom: its head lists its chapters and sections, each section uses only the sections
// above it, runtimes differ in one section, and no function is longer than a screen.
// No parser runs on all three runtimes, so a small tokenizer does: it knows comments, strings, templates and regular
// expressions, and relies on deno fmt for the rest (what begins in the first column is a top-level statement).

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

const MOST_LINES = { function: 60, section: 600, file: 6000 };
/** Names of runtimes, and of the places where features are looked for: `value` is where they may stand. */
const RUNTIME_NAMES: Record<string, "in Runtimes" | "from Runtimes on"> = {
  Deno: "in Runtimes",
  Bun: "in Runtimes",
  navigator: "in Runtimes",
  globalThis: "in Runtimes",
  process: "from Runtimes on",
};
const RUNTIMES = "Program: Runtimes"; // chapter and section
/** The sections that use node: modules. */
const NODE_SECTIONS = new Set([
  "Sockets",
  "Server",
  "Client",
  "HTTP/2",
  "Versions",
  "Tunnels",
  "TCP proxy",
  "Views",
  "Config edits",
  "TLS",
  "Runtimes",
  "Command line",
  "Listeners",
  "Workers",
  "Main",
  "Edge",
]);
/**
 * Functions above Runtimes that reach into one, as there is no other way. The comment of each has the version that it was
 * tried with, and what happens without it.
 */
const REACHING = new Set(["socketBelow", "connectPlain", "withSharedReads", "acceptAgain"]);
/** The chapter whose types refer to each other: an exchange has a route, a route has conditions on exchanges. */
const MUTUAL = "Records";

// Tokens.

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

/** The tokens of a source without its comments. Of templates only the code in ${} is read. */
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

// Banners and contents.

interface Section {
  number: string; // "3.2", or a chapter's own: "9"
  title: string;
  chapter: Chapter;
  line: number; // of its banner
}
interface Chapter {
  number: number;
  title: string;
  idea: string[];
  line: number;
  sections: Section[]; // itself, where it has none
}

const CHAPTER = /^\/\/ -{20,}\n\/\/ (\d+)\. (.+)\n((?:\/\/ (?!-{20,}).*\n)*)\/\/ -{20,}$/gm;
const SECTION = /^\/\/ --- (\d+\.\d+) ([^:\n]+): (\S.*) ---$/gm;

function chaptersOf(source: string): Chapter[] {
  const lineOf = (at: number) => source.slice(0, at).split("\n").length;
  const chapters = [...source.matchAll(CHAPTER)].map((found): Chapter => ({
    number: Number(found[1]),
    title: found[2]!,
    idea: found[3]!.trimEnd().split("\n").map((line) => line.slice(3)),
    line: lineOf(found.index),
    sections: [],
  }));
  for (const found of source.matchAll(SECTION)) {
    const line = lineOf(found.index), chapter = chapters.findLast((one) => one.line < line);
    assert.ok(chapter, `line ${line}: a section before the first chapter`);
    chapter.sections.push({ number: found[1]!, title: found[2]!, chapter, line });
  }
  for (const chapter of chapters) {
    const { number, title, line, sections } = chapter;
    if (!sections.length) sections.push({ number: `${number}`, title, chapter, line });
  }
  return chapters;
}

const sectionsOf = (source: string): Section[] => chaptersOf(source).flatMap(({ sections }) => sections);

/** A line a chapter: `3 HTTP   parser, server, client`; long ones go on below. */
function contentsOf(source: string): { number: number; title: string; says: string }[] {
  const contents: { number: number; title: string; says: string }[] = [];
  for (const line of source.slice(0, source.indexOf("*/")).split("\n")) {
    const [, number, title, says] = /^ \* +(\d+) (\S.*?) {2,}(.+)$/.exec(line) ?? [];
    if (number) contents.push({ number: Number(number), title: title!, says: says! });
    else if (/^ \* {12,}\S/.test(line) && contents.length) contents.at(-1)!.says += ` ${line.slice(2).trim()}`;
  }
  return contents;
}

/** The index of the section of a line; -1: the head. */
const sectionAt = (sections: Section[], line: number) => sections.findLastIndex((one) => one.line <= line);

// Statements, and the names that they declare, bind and use.

/** The top-level statements. */
function statementsOf(tokens: Token[]): Token[][] {
  const statements: Token[][] = [];
  for (const token of tokens) {
    if (token.first && token.kind === "name") statements.push([token]);
    else statements.at(-1)?.push(token);
  }
  return statements;
}

const CLOSING: Record<string, string> = { "(": ")", "{": "}", "[": "]" };
const opens = (token: Token | undefined) => token?.kind === "mark" && token.text in CLOSING;

/** The index of the bracket that closes the one at `open`. */
function closing(tokens: Token[], open: number): number {
  const [begin, end] = [tokens[open]!.text, CLOSING[tokens[open]!.text]!];
  let depth = 0;
  for (let i = open; i < tokens.length; i++) {
    if (tokens[i]!.kind !== "mark") continue;
    if (tokens[i]!.text === begin) depth++;
    else if (tokens[i]!.text === end && --depth === 0) return i;
  }
  return tokens.length;
}

/** The index of the first of these marks from `at` on that stands in no brackets; in types `<` is one, too. */
function find(tokens: Token[], at: number, marks: RegExp, isType = false): number {
  let angles = 0;
  for (let i = at; i < tokens.length; i++) {
    const { text, kind } = tokens[i]!;
    if (kind === "mark" && angles === 0 && marks.test(text)) return i;
    if (isType && text === "<") angles++;
    if (isType && text === ">") angles--;
    if (opens(tokens[i])) i = closing(tokens, i);
    else if (kind === "mark" && /^[)\]}]$/.test(text)) return i;
  }
  return tokens.length;
}

/** Adds the names of a binding at `at`, a name or a pattern. Gives the index behind it. */
function bind(tokens: Token[], at: number, names: Set<string>): number {
  const token = tokens[at];
  if (token?.kind === "name") return names.add(token.text), at + 1;
  if (!token || token.kind !== "mark" || !/^[{[]$/.test(token.text)) return at;
  const end = closing(tokens, at);
  for (let i = at + 1; i < end;) {
    if (tokens[i]!.text === "...") i++;
    if (token.text === "{") {
      const key = opens(tokens[i]) ? closing(tokens, i) : i; // [computed]
      i = bind(tokens, tokens[key + 1]?.text === ":" ? key + 2 : i, names);
    } else i = bind(tokens, i, names);
    i = find(tokens, i, /^,$/) + 1; // over its default
  }
  return end + 1;
}

/** Adds the parameters in the brackets at `open`. */
function bindParameters(tokens: Token[], open: number, names: Set<string>): void {
  const end = closing(tokens, open);
  for (let i = open + 1; i < end;) {
    while (/^(?:\.\.\.|readonly|private|public)$/.test(tokens[i]!.text)) i++;
    i = bind(tokens, i, names);
    i = find(tokens, i, /^[,=]$/, true);
    if (tokens[i]?.text === "=") i = find(tokens, i, /^,$/);
    i++;
  }
}

/** Adds what `const` or `let` at `at` declares: `const a = f(x, y), { b } = c`. */
function bindDeclared(tokens: Token[], at: number, names: Set<string>): void {
  for (let i = at + 1; i < tokens.length;) {
    const own = new Set<string>(), behind = bind(tokens, i, own);
    const isFirst = i === at + 1;
    if (isFirst || /^[=:]$/.test(tokens[behind]?.text ?? "")) { for (const name of own) names.add(name); }
    const value = tokens[behind]?.text === ":" ? find(tokens, behind, /^[=;]$/, true) : behind;
    const next = find(tokens, value, /^[,;]$/);
    if (tokens[next]?.text !== ",") return;
    i = next + 1;
  }
}

/** Whether the brackets at `open` are a function's parameters, with or without the type of its result. */
function areParameters(tokens: Token[], open: number): boolean {
  if (/^(?:if|for|while|switch|with)$/.test(tokens[open - 1]?.text ?? "")) return false;
  const behind = closing(tokens, open) + 1, mark = tokens[behind]?.text;
  if (mark === "=>" || mark === "{") return true;
  if (mark !== ":") return false;
  const from = tokens[behind + 1]?.text === "{" ? closing(tokens, behind + 1) + 1 : behind + 1;
  return /^(?:=>|\{)$/.test(tokens[find(tokens, from, /^(?:=>|[{;,?:])$/, true)]?.text ?? "");
}

const MODIFIERS = new Set(["export", "default", "async", "declare", "abstract"]);
const KINDS = /^(?:function|const|let|class|type|interface)$/;

/** What a statement declares. */
function declared(statement: Token[]): { keyword: string; names: string[] } {
  const at = statement.findIndex(({ text }) => !MODIFIERS.has(text)), keyword = statement[at]?.text ?? "";
  const names = new Set<string>();
  if (/^(?:const|let)$/.test(keyword)) bindDeclared(statement, at, names);
  else if (KINDS.test(keyword)) names.add(statement.slice(at + 1).find(({ kind }) => kind === "name")!.text);
  return { keyword, names: [...names] };
}

/** The names that a statement binds for itself: variables, parameters, caught errors. They hide those of the file. */
function bound(tokens: Token[]): Set<string> {
  const names = new Set<string>();
  tokens.forEach(({ text, kind, first }, i) => {
    const next = tokens[i + 1], isOwn = first || tokens[i - 1]?.first === true; // the file's, not the statement's
    if (/^(?:const|let|var)$/.test(text) && kind === "name" && !isOwn) bindDeclared(tokens, i, names);
    if (/^(?:function|class)$/.test(text) && kind === "name" && next?.kind === "name" && i > 2) names.add(next.text);
    if (text === "(" && kind === "mark" && areParameters(tokens, i)) bindParameters(tokens, i, names);
  });
  return names;
}

/** Whether the name at `i` is one of the file's: no property, key, parameter of a type, member or label. */
function isUse(tokens: Token[], i: number): boolean {
  const [before, after] = [tokens[i - 1]?.text ?? ";", tokens[i + 1]?.text ?? ""];
  if (before === "." || before === "?.") return false;
  if (/^(?:abstract|readonly|private|static|override|get|set)$/.test(before)) return false;
  const begins = /^(?:[{},;([]|async)$/.test(before);
  if (begins && before !== "}" && (after === ":" || after === "?" && tokens[i + 2]?.text === ":")) return false;
  if (begins && after === "?" && tokens[i + 2]?.text === "(" && /^[{;]$/.test(before)) return false; // optional method
  if (!begins || after !== "(" || before === "(" || before === "[") return true;
  const behind = tokens[closing(tokens, i + 1) + 1]?.text ?? "";
  return !(behind === "{" || behind === ":"); // a method
}

interface Use {
  line: number;
  user: string;
  name: string;
  from: number; // index of the section
  to: number;
}

/** Every use of a top-level name in another statement, with the sections of both. */
function usesOf(source: string): Use[] {
  const sections = sectionsOf(source), statements = statementsOf(tokenize(source));
  const homes = new Map<string, number>(); // a name that is declared twice has the first
  for (const statement of statements) {
    const section = sectionAt(sections, statement[0]!.line);
    for (const name of declared(statement).names) homes.set(name, Math.min(section, homes.get(name) ?? Infinity));
  }
  return statements.flatMap((statement) => {
    const { keyword, names } = declared(statement), hidden = bound(statement);
    if (keyword === "import") return [];
    const from = sectionAt(sections, statement[0]!.line);
    return statement.flatMap(({ text: name, kind, line }, i) => {
      const to = kind === "name" && !hidden.has(name) && !names.includes(name) ? homes.get(name) : undefined;
      return to === undefined || !isUse(statement, i) ? [] : [{ line, user: names[0] ?? keyword, name, from, to }];
    });
  });
}

/** Uses of values and types that are declared further down. */
function downward(source: string): string[] {
  const sections = sectionsOf(source), statements = statementsOf(tokenize(source));
  const types = new Set(statements.flatMap((one) => {
    const { keyword, names } = declared(one);
    return /^(?:type|interface)$/.test(keyword) ? names : [];
  }));
  const mayBe = ({ user, name, from, to }: Use) =>
    // a type may name a class, too
    (types.has(name) || types.has(user)) && sections[from]?.chapter === sections[to]!.chapter &&
    sections[to]!.chapter.title === MUTUAL;
  return usesOf(source).filter((use) => use.to > use.from && !mayBe(use)).map(({ line, user, name, to }) =>
    `${line}: ${user} uses ${name} of section ${sections[to]!.number} ${sections[to]!.title}`
  );
}

/** Names that stand for two things: of the file, or of the file and a local; and declarations that stand in no section. */
function misnamed(source: string): string[] {
  const chapters = chaptersOf(source), sections = chapters.flatMap((one) => one.sections);
  const statements = statementsOf(tokenize(source)).filter(([first]) => first!.text !== "import");
  const seen = new Set<string>(), own = new Set(statements.flatMap((statement) => declared(statement).names));
  return statements.flatMap((statement) => {
    const { line } = statement[0]!, { names } = declared(statement);
    const hidden = [...bound(statement)].filter((name) => own.has(name));
    const twice = names.filter((name) => seen.has(name));
    for (const name of names) seen.add(name);
    const chapter = chapters.findLast((one) => one.line < line);
    const outside = chapter && sections[sectionAt(sections, line)]?.chapter === chapter ? [] : names;
    return [
      ...twice.map((name) => `${line}: ${name} is declared twice`),
      ...hidden.map((name) => `${line}: ${name} is also a local of ${names[0]}`),
      ...outside.map((name) => `${line}: ${name} stands in no section`),
    ];
  });
}

/** Names of runtimes outside of their section, and uses of node: modules in other sections than those listed. */
function misplaced(source: string): string[] {
  const sections = sectionsOf(source), found: string[] = [];
  const runtimes = sections.findIndex(({ title, chapter }) => `${chapter.title}: ${title}` === RUNTIMES);
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
    const hidden = bound(statement), at = sectionAt(sections, statement[0]!.line), { names } = declared(statement);
    const reaches = names.some((name) => REACHING.has(name));
    if (reaches && !explains(source, statement[0]!.line)) {
      found.push(`${names[0]} does not say with which version, or what without it`);
    }
    statement.forEach(({ text, line, kind }, i) => {
      if (text === "globalThis" && reaches) return;
      if (kind !== "name" || hidden.has(text) || !isUse(statement, i)) return;
      const may = Object.hasOwn(RUNTIME_NAMES, text) ? RUNTIME_NAMES[text] : undefined;
      if (may && (at < runtimes || may === "in Runtimes" && at > runtimes)) {
        found.push(`${line}: ${text} ${at < runtimes ? "above" : "below"} Runtimes`);
      }
      if (fromNode.has(text) && text !== "process" && !NODE_SECTIONS.has(sections[at]?.title ?? "")) {
        found.push(`${line}: ${text} of a node: module in ${sections[at]?.title}`);
      }
    });
  }
  return found;
}

/** Whether the comment in front of a line has a version, and what happens without what it stands for. */
function explains(source: string, line: number): boolean {
  const before = source.split("\n").slice(0, line - 1), begin = before.findLastIndex((one) => one.startsWith("/**"));
  const comment = before.slice(begin).join(" ");
  return /\d+\.\d+\.\d+/.test(comment) && /\bwithout|where it is not there\b/.test(comment);
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

/** What is wrong with the banners, and with the contents that the head gives of them. */
function misled(source: string): string[] {
  const chapters = chaptersOf(source), contents = contentsOf(source);
  const found = chapters.flatMap(({ number, title, idea, sections, line }, i) => {
    const own = sections[0]!.number === `${number}`; // without sections
    const says = own ? idea[0]!.replace(/\.$/, "") : sections.map((one) => one.title).join(", ");
    const head = contents[i];
    const order = sections.map((one) => one.number).join() === sections.map((_, j) => `${number}.${j + 1}`).join();
    return [
      ...number === i + 1 ? [] : [`${line}: chapter ${number} is the ${i + 1}th`],
      ...own || order ? [] : [`${line}: the sections of chapter ${number} are not numbered in their order`],
      ...idea.length >= 2 && idea.length <= 4
        ? []
        : [`${line}: the idea of chapter ${number} has ${idea.length} lines`],
      ...head && `${head.number} ${head.title}` === `${number} ${title}` && lower(head.says) === lower(says)
        ? []
        : [`${line}: the head says ${JSON.stringify(head)}, the file ${JSON.stringify({ number, title, says })}`],
    ];
  });
  const rest = contents.slice(chapters.length).map(({ number, title }) => `the head lists ${number} ${title}`);
  return [...found, ...rest];
}
const lower = (text: string) => text.toLowerCase();

const SOURCE = readFileSync(new URL("../../lb.ts", import.meta.url), "utf8");

test("the head lists the chapters and sections that the file has, in their order and words", () => {
  assert.ok(chaptersOf(SOURCE).length > 5);
  assert.deepEqual(misled(SOURCE), []);
});

test("each section uses only itself and the sections above it", () => {
  assert.ok(usesOf(SOURCE).length > 1_000);
  assert.deepEqual(downward(SOURCE), []);
});

test("every declaration stands in a section, and no name stands for two things", () => {
  assert.deepEqual(misnamed(SOURCE), []);
});

test("runtimes are named in one section, and node: modules are used only where the program meets the machine", () => {
  assert.ok(SOURCE.includes(" Runtimes: "));
  assert.deepEqual(misplaced(SOURCE), []);
});

test("no function is longer than a screen", () => {
  assert.deepEqual(tooLong(SOURCE), []);
  const sections = sectionsOf(SOURCE), lines = SOURCE.split("\n").length;
  if (lines > MOST_LINES.file) console.warn(`lb.ts has ${lines} lines`);
  for (const [i, { title, line }] of sections.entries()) {
    const length = (sections[i + 1]?.line ?? lines) - line;
    if (length > MOST_LINES.section) console.warn(`${title} has ${length} lines`);
  }
});

// The checks themselves, on a source of their own with the same banners.

const RULE = `// ${"-".repeat(40)}`;
const GOOD = `/**
 * A file: what it is.
 *
 *     1 Above     words, TLS
 *     2 Records   boxes,
 *                 lids
 *     3 Program   runtimes, main
 *     4 End       it ends here
 */

import { connect, type Socket } from "node:net";
import process from "node:process";

${RULE}
// 1. Above
// What everything uses.
// It has two sections.
${RULE}

// --- 1.1 Words: what is said ---

const pattern = /[/]below("/;
const label = \`below \${"below"} \${\`\${1 + 1} below\`}\`;
const key = { below: 1, get: (box: Box2) => box.below, main() {}, async Later(): Promise<void> {} };
type Box2 = { below: number };
function above(socket: Socket, chosen = key ? (key) : pattern): number {
  // below(0)
  return key.below ? Number(chosen) : label.length + Number(socket);
}

// --- 1.2 TLS: who is trusted ---

const dial = (socket: Socket) => connect(socket, above(socket));

${RULE}
// 2. Records
// What it is about.
// Their types refer to each other.
${RULE}

// --- 2.1 Boxes: what holds ---

interface Box {
  readonly lid: Lid;
  below(main: number): void;
  Later?: number;
  main?(): void;
}

// --- 2.2 Lids: what closes ---

type Lid = { on: Box | undefined; size(below: Box): [below: number, main: string] };

${RULE}
// 3. Program
// Where it runs.
// It has two sections.
${RULE}

// --- 3.1 Runtimes: where it runs ---

const [here, there] = "Deno" in globalThis ? [Deno.pid, 1] : [0, process.pid];
function below(count: number): number {
  return count / 2 / Number(here);
}
class Later {}

// --- 3.2 Main: the program ---

function main(): void {
${"  below(1);\n".repeat(58)}}
const status = process.argv.length;

${RULE}
// 4. End
// It ends here.
// There are no sections.
${RULE}

type End = typeof main;
`;

/** The source with something else in a place. */
function changed(before: string, after: string): string {
  assert.equal(GOOD.split(before).length, 2, before);
  return GOOD.replace(before, () => after);
}

const all = (source: string) =>
  [misled, downward, misnamed, misplaced, tooLong].flatMap((check) =>
    check(source).map((one) => `${check.name} ${one.replace(/^\d+: /, "")}`)
  );

test("what is right is let through", () => {
  assert.deepEqual(all(GOOD), []);
});

test("a use of what stands below is found at the begin and at the end of each section", () => {
  const lines = GOOD.split("\n"), sections = sectionsOf(GOOD);
  for (const [i, { title, chapter, line }] of sections.slice(0, -1).entries()) {
    const next = sections[i + 1]!, end = (next.chapter === chapter ? next.line : next.chapter.line) - 2;
    for (const at of [line + 1, end]) {
      const bad = [...lines.slice(0, at), "const planted = (): End => 1;", ...lines.slice(at)].join("\n");
      assert.deepEqual(all(bad), ["downward planted uses End of section 4 End"], `${title}, line ${at}`);
    }
  }
});

test("what is wrong is found", () => {
  const here = "const dial = (socket: Socket) => connect(socket, above(socket));";
  const plants: [before: string, after: string, ...found: string[]][] = [
    // uses of what stands below
    [here, "const dial = below(key.below);", "downward dial uses below of section 3.1 Runtimes"],
    [here, "const dial = `${below(1)}`;", "downward dial uses below of section 3.1 Runtimes"],
    [here, "const dial = { below };", "downward dial uses below of section 3.1 Runtimes"],
    [here, "const dial = key ? below : 1;", "downward dial uses below of section 3.1 Runtimes"],
    [here, "const dial = () => new Later();", "downward dial uses Later of section 3.1 Runtimes"],
    [here, "const dial = (one: Later) => one;", "downward dial uses Later of section 3.1 Runtimes"],
    [here, "const dial = there;", "downward dial uses there of section 3.1 Runtimes"],
    [here, "function dial(one = here) {\n  return one;\n}", "downward dial uses here of section 3.1 Runtimes"],
    [here, "type Dial = Box[];", "downward Dial uses Box of section 2.1 Boxes"],
    [
      here,
      "interface Dial extends Box {\n  one: Map<string, Lid>;\n}",
      ...["Box of section 2.1 Boxes", "Lid of section 2.2 Lids"]
        .map((one) => `downward Dial uses ${one}`),
    ],
    [here, "interface Dial {\n  one(two: Lid): void;\n}", "downward Dial uses Lid of section 2.2 Lids"],
    [here, "type Dial = ReturnType<typeof below>;", "downward Dial uses below of section 3.1 Runtimes"],
    ["readonly lid: Lid;", "readonly lid: Later;", "downward Box uses Later of section 3.1 Runtimes"],
    // runtimes and node: modules
    [here, "const dial = process.cwd();", "misplaced process above Runtimes"],
    [here, "const dial = 'Bun' in globalThis;", "misplaced globalThis above Runtimes"],
    ["process.argv.length", "Deno.args.length", "misplaced Deno below Runtimes"],
    ["return key.below", "connect(1);\n  return key.below", "misplaced connect of a node: module in Words"],
    // banners and the head
    [
      "// --- 1.2 TLS: who is trusted ---\n",
      "",
      "misled the head says",
      "misplaced connect of a node: module in Words",
    ],
    ["words, TLS", "TLS, words", "misled the head says"],
    ["boxes,\n *                 lids", "boxes", "misled the head says"],
    ["it ends here", "it goes on", "misled the head says"],
    [" *     4 End       it ends here\n", "", "misled the head says undefined"],
    [" */", " *     5 More      what is not there\n */", "misled the head lists 5 More"],
    ["--- 1.2 TLS", "--- 1.3 TLS", "misled the sections of chapter 1 are not numbered in their order"],
    ["// There are no sections.\n", "", "misled the idea of chapter 4 has 1 lines"],
    [
      "// --- 3.1 Runtimes: where it runs ---\n\n",
      "const early = 1;\n\n// --- 3.1 Runtimes: where it runs ---\n\n",
      "misnamed early stands in no section",
    ],
    // names and functions
    [here, "const dial = (above: number) => above;", "misnamed above is also a local of dial"],
    ["return key.below", "const label = 1;\n  return label + key.below", "misnamed label is also a local of above"],
    ["class Later {}", "class Later {}\nconst Box = 1;", "misnamed Box is declared twice"],
    [
      "function main(): void {\n",
      "function main(): void {\n  below(1);\n",
      "tooLong 61 lines: function main(): void {",
    ],
  ];
  for (const [before, after, ...expected] of plants) {
    const found = all(changed(before, after));
    assert.equal(found.length, expected.length, `${after}: ${found.join("; ")}`);
    for (const [i, one] of expected.entries()) assert.ok(found[i]!.startsWith(one), `${after}: ${found[i]}`);
  }
});
