// How fast lb.ts is beside its peers, in one run on one machine: deno task bench --help
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { parseArgs } from "node:util";
import { type Case, CASE_NAMES, CASES, type Figures, type Pace, type Variant } from "./cases.ts";
import { type Contestant, CONTESTANTS } from "./contestants.ts";
import { cleanUpAtExit, PROJECT, Skip } from "./processes.ts";
import { hasBlock, median, replaceBlock, report, type Row } from "./report.ts";

const NAMES = CONTESTANTS.map(({ name }) => name);
const QUICK = { cases: ["small", "one", "big"], only: ["deno", "bun", "node", "haproxy", "caddy", "fast-proxy"] };
const README = join(PROJECT, "README.md");

const USAGE = `Usage: deno task bench [options]

  --quick          about a minute: ${QUICK.cases.join(", ")}; ${QUICK.only.join(", ")}
  --case LIST      of ${CASE_NAMES.join(", ")}
  --only LIST      of ${NAMES.join(", ")}
                   (deno, bun and node stand for lb.ts there)
  --seconds N      per measurement, after 2 s of warm-up; default 8
  --rounds N       everything that often, in turn; figures are medians; default 1
  --readme         also replaces the block between <!-- bench --> and <!-- /bench --> in README.md
  --help`;

type Options = { cases: Case[]; contestants: Contestant[]; pace: Pace; rounds: number; readme: boolean };

/** A sentence that ends the program with status 2. */
class UsageError extends Error {}

function readOptions(args: string[]): Options | undefined {
  const text = { type: "string" } as const, flag = { type: "boolean", default: false } as const;
  const options = { quick: flag, case: text, only: text, seconds: text, rounds: text, readme: flag, help: flag };
  let values;
  try {
    values = parseArgs({ args: args.filter((arg) => arg !== "--"), options, strict: true }).values;
  } catch (error) {
    throw new UsageError((error as Error).message);
  }
  if (values.help) return undefined;
  const { quick, readme = false } = values;
  const cases = namesIn("case", values.case, CASE_NAMES) ?? (quick ? QUICK.cases : CASE_NAMES);
  const only = namesIn("only", values.only, NAMES) ?? (quick ? QUICK.only : NAMES);
  return {
    cases: CASES.filter(({ name }) => cases.includes(name)),
    contestants: CONTESTANTS.filter(({ name }) => only.includes(name)),
    pace: { warmUp: quick ? 1 : 2, seconds: wholeNumber("seconds", values.seconds) ?? (quick ? 2 : 8) },
    rounds: wholeNumber("rounds", values.rounds) ?? 1,
    readme,
  };
}

function namesIn(option: string, list: string | undefined, known: string[]): string[] | undefined {
  const names = list?.split(",").map((name) => name.trim());
  const wrong = names?.find((name) => !known.includes(name));
  if (wrong !== undefined) throw new UsageError(`--${option}: "${wrong}" is not one of ${known.join(", ")}`);
  return names;
}

function wholeNumber(option: string, value: string | undefined): number | undefined {
  if (value !== undefined && !/^[1-9]\d{0,3}$/.test(value)) {
    throw new UsageError(`--${option}: "${value}" is not a whole number from 1 to 9999`);
  }
  return value === undefined ? undefined : Number(value);
}

type Job = { one: Case; variant: Variant; contestant: Contestant; measured: Figures[]; note?: string };

/** Contestants stand side by side within a variant, so that a slow minute of the machine meets all of them. */
function plan({ cases, contestants }: Options): Job[] {
  return cases.flatMap((one) =>
    one.variants.flatMap((variant) =>
      contestants.filter((contestant) => one.takes(contestant, variant))
        .map((contestant) => ({ one, variant, contestant, measured: [] }))
    )
  );
}

async function measure(job: Job, pace: Pace): Promise<string> {
  try {
    const figures = await job.one.measure(job.contestant, job.variant, pace);
    job.measured.push(figures);
    return `${Math.round(figures.rps)}/s, p99 ${figures.p99.toFixed(2)} ms, ${figures.errors} errors`;
  } catch (error) {
    // One broken contestant must not cost the figures of all the others.
    job.note = error instanceof Skip ? error.message : String(error);
    return `skipped, ${job.note}`;
  }
}

function rowOf({ variant, contestant, measured, note = "not measured" }: Job): Row {
  const [first] = measured;
  if (first === undefined) return { variant, contestant, note };
  const names = Object.keys(first) as (keyof Figures)[];
  const figures = Object.fromEntries(names.map((name) => [name, median(measured.map((one) => one[name] ?? 0))]));
  return { variant, contestant, figures: figures as Figures };
}

function readReadme(): string {
  const text = existsSync(README) ? readFileSync(README, "utf8") : "";
  if (!hasBlock(text)) throw new UsageError("--readme: README.md has no block from <!-- bench --> to <!-- /bench -->");
  return text;
}

async function main(options: Options): Promise<void> {
  const { pace, rounds, readme } = options;
  if (readme) readReadme(); // a README without the block is told before the long run
  const jobs = plan(options);
  const seconds = rounds * jobs.reduce((sum, { one }) => sum + one.lasts(pace) + 0.5, 0);
  console.error(`${jobs.length * rounds} measurements, about ${Math.max(1, Math.round(seconds / 60))} min`);
  for (let round = 1; round <= rounds; round++) {
    for (const job of jobs) {
      const title = [job.one.name, job.variant.title, job.contestant.name].filter((part) => part !== "").join(", ");
      console.error(`${rounds > 1 ? `round ${round}: ` : ""}${title}: ${await measure(job, pace)}`);
    }
  }
  const results = new Map(options.cases.map((one) => [one, jobs.filter((job) => job.one === one).map(rowOf)]));
  const how = `${pace.seconds} s each after ${pace.warmUp} s of warm-up, ${
    rounds === 1 ? "1 round" : `median of ${rounds} rounds`
  }`;
  const text = report(results, how);
  console.log(text);
  if (readme) writeFileSync(README, replaceBlock(readReadme(), text));
}

cleanUpAtExit();
try {
  const options = readOptions(process.argv.slice(2));
  if (options === undefined) console.log(USAGE);
  else await main(options);
  process.exit(0); // ends the servers too
} catch (error) {
  if (!(error instanceof UsageError)) throw error;
  console.error(`${error.message}\n\n${USAGE}`);
  process.exit(2);
}
