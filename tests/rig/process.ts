// Processes of this runtime: scripts, and lb.ts from its arguments to its exit status.

import type { Buffer } from "node:buffer";
import { rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { spawnGuarded } from "./guard.ts";
import { makeFolder, runtime, until } from "./rig.ts";

export const ENTRY = fileURLToPath(new URL("../../lb.ts", import.meta.url));
/** What comes before a script's name. */
export const RUN = runtime() === "deno" ? ["run", "-A"] : [];

export interface Process {
  pid: number;
  out(): string;
  err(): string;
  /** Its exit status; null where a signal ended it. */
  ended: Promise<number | null>;
  over(): boolean;
  signal(name: "SIGTERM" | "SIGINT" | "SIGHUP" | "SIGKILL"): void;
}

/** Starts a script on this runtime. No variable of ours is inherited but those given. */
export function startScript(
  script: string,
  args: string[],
  { cwd = tmpdir(), env = {} as Record<string, string> } = {},
): Process {
  const inherited = Object.entries(process.env).filter(([name]) => !name.startsWith("LB_"));
  const child = spawnGuarded(process.execPath, [...RUN, script, ...args], {
    cwd,
    env: { ...Object.fromEntries(inherited), ...env },
  });
  let out = "", err = "", over = false;
  child.stdout.on("data", (bytes: Buffer) => out += bytes.toString());
  child.stderr.on("data", (bytes: Buffer) => err += bytes.toString());
  const ended = new Promise<number | null>((resolve) =>
    child.once("close", (code) => {
      over = true;
      resolve(code);
    })
  );
  return {
    pid: child.pid ?? 0,
    out: () => out,
    err: () => err,
    ended,
    over: () => over,
    signal: (name) => void child.kill(name),
  };
}

/** Runs lb.ts to its end. */
export async function callProgram(args: string[], options: Parameters<typeof startScript>[2] = {}) {
  const program = startScript(ENTRY, args, options);
  try {
    await until(`lb.ts ${args.join(" ")} ends`, program.over, 30_000);
    return { code: await program.ended, out: program.out(), err: program.err() };
  } finally {
    if (!program.over()) program.signal("SIGKILL");
  }
}

/** A folder of its own, with these files in it. */
export async function inFolder<T>(files: Record<string, string>, use: (folder: string) => Promise<T>): Promise<T> {
  const folder = makeFolder();
  try {
    for (const [name, text] of Object.entries(files)) {
      writeFileSync(join(folder, name), text);
    }
    return await use(folder);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}
