// Ends what a process has started when that process ends in whatever way, SIGKILL included: beside each child a shell
// holds the other end of a pipe, and kills the child when the pipe closes.

import { type ChildProcess, spawn, type SpawnOptions } from "node:child_process";
import process from "node:process";
import type { Readable } from "node:stream";

/** The child keeps the shell's process id, `$$`; the shell that waits is a second one. */
const guarded = (target: string) =>
  `exec 3<&0; (trap '' INT TERM HUP; read -r line; kill -9 ${target}) <&3 >/dev/null 2>&1 & exec "$@" 3<&- </dev/null`;

export const hasEnded = ({ exitCode, signalCode }: ChildProcess): boolean => exitCode !== null || signalCode !== null;

/** A child with its output piped. */
export type Guarded = ChildProcess & { pid: number; stdout: Readable; stderr: Readable };

/**
 * Starts a command, without standard input, that ends with this process at the latest. `detached`: in a process group of
 * its own, all of which ends with the command.
 */
export function spawnGuarded(
  command: string,
  args: string[],
  options: Pick<SpawnOptions, "cwd" | "env" | "detached"> & { stdout?: "ignore" } = {},
): Guarded {
  const { stdout = "pipe", ...others } = options, target = options.detached ? "-$$" : "$$";
  const words = ["-c", guarded(target), "sh", command, ...args];
  const child = spawn("sh", words, { ...others, stdio: ["pipe", stdout, "pipe"] });
  child.stdin!.on("error", () => {});
  child.once("exit", () => child.stdin!.end("\n"));
  // Deno's own reports the end at once, whatever the process makes of the signal (2.9.6)
  child.kill = (signal = "SIGTERM") => {
    try {
      return !hasEnded(child) && process.kill(child.pid!, signal);
    } catch { // ESRCH: it has ended, and the event that says so is on its way
      return false;
    }
  };
  return child as Guarded;
}

/** Runs a command in a process group of its own, and ends all of it when `use` has seen enough of what it says. */
export async function whileRunning<T>(
  [command = "", ...args]: string[],
  options: Pick<SpawnOptions, "cwd" | "env">,
  use: (said: () => string, over: () => boolean) => Promise<T>,
): Promise<T> {
  const child = spawnGuarded(command, args, { ...options, detached: true });
  let said = "", isOver = false;
  for (const stream of [child.stdout, child.stderr]) stream.on("data", (bytes) => said += bytes);
  const exit = new Promise((resolve) => child.on("exit", resolve)).then(() => isOver = true);
  try {
    return await use(() => said, () => isOver);
  } finally {
    if (!isOver) process.kill(-child.pid, "SIGKILL");
    await exit;
  }
}
