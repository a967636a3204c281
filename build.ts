// `npm run build`, or `deno task build`: makes dist/lb.js, which is lb.ts and all that it imports in one file of
// JavaScript, and dist/lb.d.ts, the types of the names that are for library users. A folder may be named in place of dist.

import { execFileSync } from "node:child_process";
import { chmodSync, existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { stripTypeScriptTypes } from "node:module";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import * as esbuild from "esbuild";
import ts from "typescript";

const ROOT = fileURLToPath(new URL(".", import.meta.url));
const SOURCE = readFileSync(join(ROOT, "lb.ts"), "utf8");

// deno-fmt-ignore
/** The names for library users. Records that their types lead to are declared beside them, and not exported. */
const PUBLIC = [
  "createLoadBalancer", "parseConfig", "serve", "createAdmin", "accessLine", "samplesOf", "renderMetrics", "jsonSchema",
  "printConfig", "strategies", "ConfigError", "WireError", "Effects", "Failure", "FetchAttempt", "LoadBalancer",
  "Server", "Strategy",
];

/** An older Node knows no `import.meta.main`, and the program would end without a word. */
const HEAD = `#!/usr/bin/env node
/* @ts-self-types="./lb.d.ts" */
{
  const [major, minor] = (globalThis.process?.versions.node ?? "99.0").split(".").map(Number);
  if (major < 22 || major === 22 && minor < 18) {
    console.error(
      \`lb.ts needs Node 22.18 or later, and this is Node \${process.versions.node}: update Node, or run it by deno or bun\`,
    );
    process.exit(1);
  }
}
`;

// --- lb.js ---

/** lb.ts without its types. What stood in their place comes as blanks, character for character. */
function withoutTypes(source: string): string {
  const before = source.split("\n"), lines: string[] = [];
  for (const [i, line] of stripTypeScriptTypes(source).split("\n").entries()) {
    const was = before[i]!, begin = was.search(/\S/);
    if (line.trim() || !was.trim()) lines.push(line.length === was.length ? closeGaps(line, was, begin) : line);
    else if (begin === 0 && !/^[)}\]]/.test(was)) dropComment(lines); // that of a declaration which is gone
  }
  return lines.join("\n").replace(/\n{3,}/g, "\n\n");
}

/** Closes the gaps that types have left in a line. */
function closeGaps(line: string, was: string, begin: number): string {
  const closed = line.replace(/ +/g, (gap, at: number) => {
    const start = Math.max(at, begin), text = was.slice(start, at + gap.length);
    if (at + gap.length <= begin || !text.trim()) return gap;
    const next = line[at + gap.length] ?? "", isCall = next === "(" && text[0] !== " ";
    const isTight = start === begin || isCall || /^[),;\]}]?$/.test(next);
    return gap.slice(0, start - at) + (isTight ? "" : " ");
  });
  return closed.trimEnd();
}

/** Drops the comment that the lines end with, if they do. */
function dropComment(lines: string[]): void {
  if (!lines.at(-1)?.endsWith("*/")) return;
  while (!lines.pop()?.trim().startsWith("/*"));
}

/** What a file imports from packages: the line, the names as `{ a, b as c }`, `* as v` or `ipaddr`, and the package. */
function importsOf(source: string): { line: string; names: string; from: string }[] {
  return [...source.matchAll(/^import ([^;]+?) from "((?!node:)[^"]+)";\n/gm)]
    .map(([line, names = "", from = ""]) => ({ line, names, from }));
}

/** A package's name and licence, as a comment. */
function licenceOf(name: string): string {
  const folder = join(ROOT, "node_modules", name);
  const file = readdirSync(folder).find((one) => /^licen[cs]e/i.test(one));
  if (!file) throw new Error(`${name} has no licence beside it`);
  const text = readFileSync(join(folder, file), "utf8").trim();
  return `${name}\n\n${text}`.replace(/^/gm, "// ").replace(/ +$/gm, "");
}

/** The packages as one constant, `packages`, behind their licences. */
async function bundle(imports: ReturnType<typeof importsOf>): Promise<string> {
  const lines = imports.map(({ names, from }) => {
    return `export ${/^[{*]/.test(names) ? names : `{ default as ${names} }`} from "${from}";`;
  });
  const { outputFiles, metafile } = await esbuild.build({
    stdin: { contents: lines.join("\n"), resolveDir: ROOT, sourcefile: "imports" },
    ...{ bundle: true, write: false, metafile: true, charset: "utf8", platform: "neutral", target: "es2023" },
    ...{ format: "iife", globalName: "packages", mainFields: ["module", "main"], logLevel: "error" },
  });
  const paths = Object.keys(metafile.inputs);
  const names = new Set(paths.flatMap((path) => /.*node_modules\/((?:@[^/]+\/)?[^/]+)/.exec(path)?.[1] ?? []));
  return `${[...names].map(licenceOf).join("\n\n")}\n\n${outputFiles[0]!.text}`;
}

async function makeJavaScript(): Promise<string> {
  const code = withoutTypes(SOURCE), imports = importsOf(code);
  const names = imports.flatMap(({ names }) => names.match(/\w+(?=\s*(?:[,}]|$))/g) ?? []);
  const own = imports.reduce((text, { line }) => text.replace(line, ""), code);
  const chapter1 = own.lastIndexOf("\n", own.indexOf("\n// 1. ") - 1); // its banner
  return [
    ...[HEAD, own.slice(0, chapter1).trim(), "", "// What lb.ts imports, with its licences.", ""],
    ...[await bundle(imports), `const { ${names.join(", ")} } = packages;`, own.slice(chapter1)],
  ].join("\n");
}

// --- lb.d.ts ---

/** The names that a statement declares. */
function declared(statement: ts.Statement): string[] {
  if (ts.isVariableStatement(statement)) return statement.declarationList.declarations.map((one) => one.name.getText());
  const { name } = statement as ts.InterfaceDeclaration;
  return name ? [name.text] : [];
}

/** The names of the types and values that a part of a file refers to. */
function used(node: ts.Node, names: Set<string> = new Set()): Set<string> {
  if (ts.isTypeReferenceNode(node)) names.add(node.typeName.getText());
  else if (ts.isTypeQueryNode(node)) names.add(node.exprName.getText());
  else if (ts.isExpressionWithTypeArguments(node)) names.add(node.expression.getText());
  ts.forEachChild(node, (child) => void used(child, names));
  return names;
}

/** lb.ts, with the comments behind fields of public records in front of them, where editors look for them. */
function documented(): string {
  const parts = ts.createSourceFile("lb.ts", SOURCE, ts.ScriptTarget.ESNext, true).statements.map((one) => {
    const isShown = declared(one).some((name) => PUBLIC.includes(name) || /Config$|^Policy$/.test(name));
    const text = one.getFullText();
    return isShown ? text.replace(/^( +)((?:readonly )?\w+(?:\(\))?\??: .+;) \/\/ (.+)$/gm, "$1/** $3 */\n$1$2") : text;
  });
  return parts.join("");
}
const DOCUMENTED = documented();

/** The declarations of the public names and of all that they use, in the order of lb.ts. */
function makeTypes(): string {
  const compilerOptions: ts.CompilerOptions = {
    isolatedDeclarations: true,
    strict: true,
    target: ts.ScriptTarget.ESNext,
  };
  const { outputText, diagnostics = [] } = ts.transpileDeclaration(DOCUMENTED, {
    compilerOptions,
    reportDiagnostics: true,
  });
  const file = ts.createSourceFile("lb.d.ts", outputText, ts.ScriptTarget.ESNext, true);
  const statements = file.statements.filter((one) => declared(one).length > 0), wanted = new Set(PUBLIC);
  for (const name of wanted) { // it grows meanwhile
    for (const one of statements) if (declared(one).includes(name)) used(one).forEach((more) => wanted.add(more));
  }
  const kept = statements.filter((one) => declared(one).some((name) => wanted.has(name)));
  checkTypes(kept, diagnostics);
  const texts = kept.map((one) => {
    const text = one.getFullText().trim(), isPublic = declared(one).some((name) => PUBLIC.includes(name));
    return isPublic ? text : text.replace(/^export /m, "");
  });
  return [...importedTypes(file, kept), "", ...texts, "export {};", ""].join("\n");
}

/** @throws {Error} where a public name is missing, or has no explicit type */
function checkTypes(kept: ts.Statement[], diagnostics: ts.Diagnostic[]): void {
  const exported = new Set(kept.filter((one) => one.getText().startsWith("export ")).flatMap(declared));
  const missing = PUBLIC.filter((name) => !exported.has(name));
  if (missing.length) throw new Error(`lb.ts does not export ${missing.join(", ")}`);
  const source = ts.createSourceFile("lb.ts", DOCUMENTED, ts.ScriptTarget.ESNext, true);
  for (const { start = 0, messageText } of diagnostics) {
    const around = source.statements.find((one) => one.pos <= start && start < one.end)!;
    if (!declared(around).some((name) => PUBLIC.includes(name))) continue;
    throw new Error(`lb.ts: ${declared(around)}: ${ts.flattenDiagnosticMessageText(messageText, " ")}`);
  }
}

/** The imports of a file, as far as some of its statements use them. */
function importedTypes(file: ts.SourceFile, statements: ts.Statement[]): string[] {
  const names = new Set(statements.flatMap((one) => [...used(one)]));
  return file.statements.filter(ts.isImportDeclaration).flatMap(({ importClause, moduleSpecifier }) => {
    const bindings = importClause?.namedBindings;
    if (!bindings || !ts.isNamedImports(bindings)) return []; // `import ipaddr`, `import * as v`: no public type uses them
    const kept = bindings.elements.filter((one) => names.has(one.name.text));
    const list = kept.map((one) => one.getText().replace(/^type /, "")).join(", ");
    return list ? [`import type { ${list} } from ${moduleSpecifier.getText()};`] : [];
  });
}

// Deno has what this file imports in its cache. What lb.ts imports is looked for in node_modules.
if (!existsSync(join(ROOT, "node_modules"))) {
  execFileSync(process.execPath, ["install", "--quiet", "--node-modules-dir=auto"], { cwd: ROOT, stdio: "inherit" });
}
const folder = process.argv[2] ?? join(ROOT, "dist");
mkdirSync(folder, { recursive: true });
writeFileSync(join(folder, "lb.js"), await makeJavaScript());
chmodSync(join(folder, "lb.js"), 0o755);
writeFileSync(join(folder, "lb.d.ts"), makeTypes());
await esbuild.stop();
