// Figures as Markdown: the machine, a table per case, and what was aimed at.
import { cpus, loadavg, release, type } from "node:os";
import type { Case, Figures, Variant } from "./cases.ts";
import { type Contestant, otherVersions, type Runtime, RUNTIMES } from "./contestants.ts";
import { pinned } from "./processes.ts";

/** What one contestant did in one variant of a case; without figures, `note` says why. */
export type Row = { variant: Variant; contestant: Contestant; figures?: Figures; note?: string };

type Reference = "haproxy" | "caddy" | "best npm peer" | "hono/proxy";
const REFERENCES: Reference[] = ["haproxy", "caddy", "best npm peer", "hono/proxy"];

/** Requests per second, lb.ts to each reference, to be reached at least. */
const TARGETS: Record<string, Partial<Record<Reference, Record<Runtime, number>>>> = {
  small: {
    haproxy: { bun: 0.60, deno: 0.42, node: 0.28 },
    caddy: { bun: 3.4, deno: 2.3, node: 1.6 },
    "best npm peer": { bun: 2.3, deno: 1.6, node: 1.15 },
    "hono/proxy": { bun: 1.3, deno: 2.3, node: 5 },
  },
  big: { haproxy: { bun: 0.75, deno: 0.50, node: 0.38 } },
};
const MOST_LOST_TO_ROUTES = 0.1;

const NOTHING = "–";

/** The first `texts` columns stand left, the figures after them right. */
export function table(texts: number, head: string[], rows: string[][]): string {
  const line = (cells: string[]) => `| ${cells.join(" | ")} |`;
  const ruler = head.map((_, index) => index < texts ? "---" : "---:");
  return [line(head), line(ruler), ...rows.map(line)].join("\n");
}

export function median(values: number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  const half = sorted.length / 2;
  return (sorted[Math.floor(half)]! + sorted[Math.ceil(half) - 1]!) / 2;
}

export const digits = (value: number) => value >= 100 ? Math.round(value).toLocaleString("en") : value.toPrecision(3);
export const times = (value: number | undefined) => value === undefined ? NOTHING : `${value.toFixed(2)}`;

export const label = ({ kind, name }: Contestant) => kind === "lb" ? `**lb.ts on ${name}**` : name;

/** Requests per second of a row's reference in the same variant. */
function referenceOf(row: Row, reference: Reference, rows: Row[]): number | undefined {
  const is: Record<Reference, (other: Contestant) => boolean> = {
    haproxy: ({ name }) => name === "haproxy",
    caddy: ({ name }) => name === "caddy",
    "best npm peer": ({ kind }) => kind === "npm",
    "hono/proxy": ({ kind, runtime }) => kind === "hono" && runtime === row.contestant.runtime,
  };
  const speeds = rows.filter(({ variant, contestant }) => variant === row.variant && is[reference](contestant))
    .flatMap(({ figures }) => figures === undefined ? [] : [figures.rps]);
  return speeds.length === 0 ? undefined : Math.max(...speeds);
}

function ratio(row: Row, reference: Reference, rows: Row[]): number | undefined {
  const other = referenceOf(row, reference, rows);
  return other === undefined || row.figures === undefined ? undefined : row.figures.rps / other;
}

// ---- One case

type Column = { title: string; of: (figures: Figures) => string | undefined };

const COLUMNS: Column[] = [
  { title: "within 1 s", of: ({ success }) => success === undefined ? undefined : `${(success * 100).toFixed(2)} %` },
  { title: "requests/s", of: ({ rps }) => digits(rps) },
  { title: "p50 ms", of: ({ p50 }) => digits(p50) },
  { title: "p99 ms", of: ({ p99 }) => digits(p99) },
  { title: "p99.9 ms", of: ({ p999 }) => p999 === undefined ? undefined : digits(p999) },
  { title: "errors", of: ({ errors }) => String(errors) },
  { title: "CPU µs/request", of: ({ cpu }) => digits(cpu) },
  { title: "peak MiB", of: ({ peak }) => digits(peak / 2 ** 20) },
  { title: "KiB/idle connection", of: ({ idle }) => idle === undefined ? undefined : (idle / 1024).toFixed(1) },
];

function caseTable({ name, variants }: Case, rows: Row[]): string {
  const measured = rows.flatMap(({ figures }) => figures ?? []);
  const columns = COLUMNS.filter(({ of }) => measured.some((figures) => of(figures) !== undefined));
  // An open loop sets the requests per second itself: nothing to compare there.
  const references = name === "tail"
    ? []
    : REFERENCES.filter((reference) => rows.some((row) => ratio(row, reference, rows) !== undefined));
  const named = variants.length > 1;
  const body = rows.map((row) => {
    const { figures, note } = row;
    return [
      ...named ? [row.variant.title] : [],
      figures === undefined ? `${label(row.contestant)}: skipped, ${note}` : label(row.contestant),
      ...columns.map(({ of }) => figures === undefined ? NOTHING : of(figures) ?? NOTHING),
      ...references.map((reference) => times(ratio(row, reference, rows))),
    ];
  });
  const head = [...columns.map(({ title }) => title), ...references.map((reference) => `× ${reference}`)];
  return table(named ? 2 : 1, [...named ? [name] : [], "balancer", ...head], body);
}

// ---- What was aimed at

const verdict = (value: number | undefined, target: number) =>
  value === undefined ? "not measured" : value >= target ? "met" : "**missed**";

function targetTable({ name }: Case, rows: Row[]): string | undefined {
  const body = Object.entries(TARGETS[name] ?? {}).flatMap(([reference, targets]) =>
    RUNTIMES.map((runtime) => {
      const row = rows.find(({ contestant }) => contestant.kind === "lb" && contestant.runtime === runtime);
      const value = row && ratio(row, reference as Reference, rows);
      return [
        `${runtime} to ${reference}`,
        targets[runtime].toFixed(2),
        times(value),
        verdict(value, targets[runtime]),
      ];
    })
  );
  return body.length === 0 ? undefined : table(1, [`${name}, requests/s`, "at least", "measured", "result"], body);
}

/** More of something (routes, servers) against the fewest of it, for each contestant and strategy. */
function growthTable(one: Case, rows: Row[]): string | undefined {
  const amount = ({ variant }: Row) => one.name === "routes" ? variant.routes : variant.servers;
  if (one.name !== "routes" && one.name !== "servers") return undefined;
  const body = rows.flatMap((few) => {
    const many = rows.find((row) =>
      row.contestant === few.contestant && row.variant.strategy === few.variant.strategy && amount(row) > amount(few)
    );
    if (many === undefined) return [];
    const value = many.figures && few.figures && many.figures.rps / few.figures.rps;
    const cells = [
      `${label(few.contestant)}, ${few.variant.strategy}, ${amount(many)} to ${amount(few)}`,
      times(value),
    ];
    const target = one.name === "routes" && few.contestant.kind === "lb" ? verdict(value, 1 - MOST_LOST_TO_ROUTES) : "";
    return [[...cells, target]];
  });
  return table(1, [one.name, "requests/s", `at least ${1 - MOST_LOST_TO_ROUTES} asked of lb.ts for routes`], body);
}

// ---- The whole

export function report(results: Map<Case, Row[]>, how: string): string {
  const contestants = new Set([...results.values()].flat().map(({ contestant }) => contestant));
  const versions = [
    ...[...contestants].map((contestant) =>
      `${contestant.kind === "lb" ? "lb.ts" : contestant.name} ${contestant.version()}`
    ),
    ...Object.entries(otherVersions()).map((entry) => entry.join(" ")),
  ];
  const where = pinned
    ? "balancer on one core, servers and load on another"
    : "**not pinned to cores**: ratios mean little";
  const parts = [
    `${
      cpus()[0]?.model.trim() ?? "unknown processor"
    }, ${cpus().length} cores, ${type()} ${release()}; ${where}; ${how}. ` +
    `Load of the machine at the beginning: ${LOAD_AT_START}.`,
    `Versions: ${versions.join(", ")}.`,
    "Figures differ between machines; the ratios (×, requests/s to the other's) are what to compare.",
  ];
  for (const [one, rows] of results) {
    parts.push(`### ${one.name}: ${one.about}`, caseTable(one, rows));
    const growth = growthTable(one, rows);
    if (growth !== undefined) parts.push(growth);
  }
  const targets = [...results].flatMap(([one, rows]) => targetTable(one, rows) ?? []);
  if (targets.length > 0) parts.push("### Targets", ...targets);
  return parts.join("\n\n") + "\n";
}

const LOAD_AT_START = loadavg()[0]?.toFixed(2);

const BLOCK = /(<!-- bench -->)[^]*?(<!-- \/bench -->)/;

export const hasBlock = (readme: string) => BLOCK.test(readme);

export const replaceBlock = (readme: string, text: string) =>
  readme.replace(BLOCK, (_block, open, close) => `${open}\n\n${text}\n${close}`);
