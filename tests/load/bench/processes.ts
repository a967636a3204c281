// The programs that a benchmark starts: pinned to cores, measured through /proc, ended by id.
import { type ChildProcess, spawn, spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { connect } from "node:net";
import { availableParallelism, tmpdir } from "node:os";
import { delimiter, join } from "node:path";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import { stripVTControlCharacters } from "node:util";

export const BALANCER_CORE = "0";
export const LOAD_CORE = "1";
export const ALL_CORES = `0-${availableParallelism() - 1}`;
const START_TIMEOUT = 30_000; // milliseconds
const MICROSECONDS_PER_TICK = 10_000; // of /proc; USER_HZ is 100 on x86 and ARM

// The project's own runtimes come first; daemons are in folders that a user's PATH may lack.
const PROJECT = join(import.meta.dirname!, "..", "..", "..");
const folders = [join(PROJECT, "node_modules", ".bin"), process.env.PATH, "/usr/local/sbin", "/usr/sbin"];
process.env.PATH = folders.join(delimiter);

export function versionOf(program: string): string {
  const { stdout, stderr } = spawnSync(program, [program === "caddy" ? "version" : "-v"], { encoding: "utf8" });
  return /\d+\.\d+[\w.+~-]*/.exec(`${stdout}${stderr}`)?.[0] ?? "(not installed)";
}

// --- Files and programs: both are gone when the benchmark is ---

export const FOLDER = mkdtempSync(join(tmpdir(), "lb-bench-"));
const children = new Set<ChildProcess>();

/** Writes a temporary file and returns its path. */
export function writeTemporary(name: string, content: string | Uint8Array): string {
  writeFileSync(join(FOLDER, name), content);
  return join(FOLDER, name);
}

export function cleanUp(): void {
  for (const child of children) child.kill("SIGKILL");
  rmSync(FOLDER, { recursive: true, force: true });
}

export interface Program {
  pid: number;
  output: Promise<string>; // all of it, when the program has ended
  complaint(): string; // the line of stderr that says best what went wrong
  stop(): Promise<unknown>;
}

/** Starts a command on some cores. `taskset` replaces itself with the command: the id is the command's own. */
export function start(cores: string, command: string[], stdout: "ignore" | "pipe" = "ignore"): Program {
  const child = spawn("taskset", ["-c", cores, ...command], { cwd: PROJECT, stdio: ["ignore", stdout, "pipe"] });
  children.add(child);
  let printed = "", errors = "";
  child.stdout?.on("data", (bytes) => printed += bytes);
  child.stderr?.on("data", (bytes) => errors = (errors + bytes).slice(-4000));
  child.on("exit", () => children.delete(child));
  const output = new Promise<string>((resolve) => {
    child.on("close", () => resolve(printed));
    child.on("error", (error) => resolve(errors = error.message));
  });
  const complaint = () => {
    const lines = stripVTControlCharacters(errors).trim().split("\n");
    return lines.find((line) => /error|alert|emerg/i.test(line)) ?? lines.at(-1)!;
  };
  const stop = () => {
    child.kill("SIGKILL"); // its figures are taken: there is nothing to drain
    return output;
  };
  return { pid: child.pid ?? 0, output, complaint, stop };
}

/** Waits until a program accepts connections. */
export async function listening(program: Program, port: number): Promise<void> {
  const ended = program.output.then(() => true);
  for (const until = Date.now() + START_TIMEOUT; Date.now() < until;) {
    if (await accepts(port)) return;
    if (await Promise.race([ended, sleep(20, false)])) break;
  }
  await program.stop();
  throw new Error(`did not start: ${program.complaint()}`);
}

function accepts(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect(port, "127.0.0.1", () => resolve(true));
    socket.on("connect", () => socket.destroy()).on("error", () => resolve(false));
  });
}

/** The kernel gives ports from here on to outgoing connections, which must not take one of ours. */
const PORTS_END = Number(readFileSync("/proc/sys/net/ipv4/ip_local_port_range", "utf8").split(/\s/)[0]);
let nextPort = 10_000 + Math.floor(Math.random() * (PORTS_END - 10_000) / 2);

export async function freePorts(count: number): Promise<number[]> {
  const found: number[] = [];
  for (; found.length < count; nextPort++) {
    if (nextPort >= PORTS_END) throw new Error(`there are no ${count} free ports below ${PORTS_END}`);
    if (!await accepts(nextPort)) found.push(nextPort);
  }
  return found;
}

// --- What the kernel counts for a process, its threads included ---

/** User and system time so far, in microseconds. */
export function cpuOf({ pid }: Program): number {
  const text = readFileSync(`/proc/${pid}/stat`, "utf8");
  const fields = text.slice(text.lastIndexOf(")") + 2).split(" "); // the name before it may hold spaces
  return (Number(fields[11]) + Number(fields[12])) * MICROSECONDS_PER_TICK;
}

/** Memory in KiB: in use now (VmRSS), or at most so far (VmHWM). */
export function memoryOf({ pid }: Program, what: "VmRSS" | "VmHWM"): number {
  return Number(new RegExp(`${what}:\\s+(\\d+)`).exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1]);
}
