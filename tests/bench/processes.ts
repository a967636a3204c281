// The programs a benchmark starts: found, pinned to a core, waited for, measured through /proc, and ended by pid.
import { type ChildProcess, spawn, spawnSync } from "node:child_process";
import { accessSync, constants, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { connect, createServer } from "node:net";
import { availableParallelism, tmpdir } from "node:os";
import { delimiter, join } from "node:path";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import { stripVTControlCharacters } from "node:util";

export const PROJECT = join(import.meta.dirname ?? ".", "..", "..");
export const BALANCER_CORE = 0;
export const LOAD_CORE = 1;
export const ALL_CORES = `0-${availableParallelism() - 1}`;
export type Cores = number | string; // as taskset takes them

/** A row that cannot be measured here; its message is the reason shown in the table. */
export class Skip extends Error {}

/** The file a command's name stands for: the project's own runtimes first, then PATH, then where daemons are kept. */
export function findProgram(name: string): string | undefined {
  const folders = [join(PROJECT, "node_modules", ".bin"), ...(process.env.PATH ?? "").split(delimiter)];
  for (const folder of [...folders, "/usr/local/sbin", "/usr/sbin", "/sbin"]) {
    try {
      accessSync(join(folder, name), constants.X_OK);
      return join(folder, name);
    } catch { /* not in this folder */ }
  }
  return undefined;
}

export function needProgram(name: string): string {
  const file = findProgram(name);
  if (file === undefined) throw new Skip(`${name} is not installed`);
  return file;
}

/** What a program says of itself, whichever of its two outputs it uses. */
export function outputOf(program: string, ...args: string[]): string {
  const { stdout, stderr } = spawnSync(program, args, { encoding: "utf8" });
  return `${stdout ?? ""}${stderr ?? ""}`.trim();
}

export const pinned = availableParallelism() > 1 && findProgram("taskset") !== undefined;

// ---- Children and the temporary folder: both are gone when the benchmark is, however it ends.

const children = new Set<ChildProcess>();
let folder: string | undefined;

export function temporaryFolder(): string {
  return folder ??= mkdtempSync(join(tmpdir(), "lb-bench-"));
}

function cleanUp(): void {
  for (const child of children) for (const pid of treeOf(child.pid ?? 0)) kill(pid, "SIGKILL");
  children.clear();
  if (folder !== undefined) rmSync(folder, { recursive: true, force: true });
  folder = undefined;
}

export function cleanUpAtExit(): void {
  process.on("exit", cleanUp);
  for (const [signal, status] of [["SIGINT", 130], ["SIGTERM", 143], ["SIGHUP", 129]] as const) {
    process.on(signal, () => {
      cleanUp();
      process.exit(status);
    });
  }
}

function kill(pid: number, signal: NodeJS.Signals): void {
  try {
    process.kill(pid, signal);
  } catch { /* it has ended */ }
}

export type Child = { process: ChildProcess; pid: number; ended: Promise<void>; complaint: () => string };

/** Starts a command on some cores. `taskset` becomes the command, so the pid is the command's own. */
export function start(cores: Cores, command: string[]): Child {
  const [program = "", ...args] = pinned ? ["taskset", "-c", String(cores), ...command] : command;
  const child = spawn(program, args, { cwd: PROJECT, stdio: "pipe" });
  children.add(child);
  let errors = "";
  child.stderr.on("data", (bytes) => errors = (errors + bytes).slice(-4000));
  const ended = new Promise<void>((resolve) => {
    child.on("error", (error) => {
      errors += error.message;
      resolve();
    });
    child.on("exit", () => resolve());
  }).then(() => void children.delete(child));
  const complaint = () => {
    const lines = stripVTControlCharacters(errors).trim().split("\n");
    const line = lines.find((line) => /error/i.test(line)) ?? lines.at(-1) ?? "";
    return line.replaceAll("|", "/").slice(0, 160); // it stands in a table
  };
  return { process: child, pid: child.pid ?? 0, ended, complaint };
}

export async function stop(child: Child): Promise<void> {
  const tree = treeOf(child.pid);
  if (tree.length > 0) kill(child.pid, "SIGTERM"); // a child that never began has no pid, and 0 would mean us
  // A balancer that drains waits for idle clients; its figures are taken already, so it gets a second and no more.
  const inTime = await Promise.race([child.ended.then(() => true), sleep(1000, false, { ref: false })]);
  if (!inTime) { for (const pid of tree) kill(pid, "SIGKILL"); }
  await child.ended;
}

/** Runs a command to its end and returns what it printed. */
export async function run(cores: Cores, command: string[]): Promise<string> {
  const child = start(cores, command);
  let printed = "";
  child.process.stdout?.on("data", (bytes) => printed += bytes);
  const closed = new Promise((resolve) => child.process.on("close", resolve));
  await child.ended;
  await closed;
  return printed;
}

/** Waits until a child accepts connections; its own last words are the reason when it does not. */
export async function listening(child: Child, port: number, patience = 30_000): Promise<void> {
  for (let ended = false, until = Date.now() + patience; Date.now() < until && !ended;) {
    if (await accepts(port)) return;
    ended = await Promise.race([child.ended.then(() => true), sleep(20, false)]);
  }
  const reason = child.complaint();
  await stop(child);
  throw new Skip(`did not start: ${reason || "no message"}`);
}

function accepts(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect(port, "127.0.0.1", () => resolve(true));
    socket.on("connect", () => socket.destroy()).on("error", () => resolve(false));
  });
}

// ---- Ports: below those the kernel gives to outgoing connections, so that no connection of the load can take one.

const FIRST_PORT = 10_000;
const ports = { next: 0, end: 32_768 };

export async function freePorts(count: number): Promise<number[]> {
  if (ports.next === 0) {
    ports.end = Number(readFileSync("/proc/sys/net/ipv4/ip_local_port_range", "utf8").split(/\s/)[0]);
    ports.next = FIRST_PORT + Math.floor(Math.random() * (ports.end - FIRST_PORT) / 2);
  }
  const found: number[] = [];
  for (let tried = 0; found.length < count; ports.next++) {
    if (++tried > ports.end - FIRST_PORT) throw new Error(`there are no ${count} free ports`);
    if (ports.next >= ports.end) ports.next = FIRST_PORT;
    if (await isFree(ports.next)) found.push(ports.next);
  }
  return found;
}

function isFree(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const server = createServer();
    server.on("error", () => resolve(false));
    server.listen(port, "127.0.0.1", () => server.close(() => resolve(true)));
  });
}

// ---- What the kernel has counted for a process and all its descendants.

/** Fields of /proc/PID/stat from the third (state) on; the second, the name, may itself hold spaces. */
function statOf(pid: number | string): string[] {
  const text = readFileSync(`/proc/${pid}/stat`, "utf8");
  return text.slice(text.lastIndexOf(")") + 2).split(" ");
}

function treeOf(root: number): number[] {
  const parents = new Map<number, number>();
  for (const name of readdirSync("/proc")) {
    try {
      if (/^\d+$/.test(name)) parents.set(Number(name), Number(statOf(name)[1]));
    } catch { /* ended while we looked */ }
  }
  const tree = [root];
  for (const pid of tree) for (const [child, parent] of parents) if (parent === pid) tree.push(child);
  return parents.has(root) ? tree : [];
}

const TICKS_PER_SECOND = Number(outputOf("getconf", "CLK_TCK")) || 100;

/** The sum over a process and its descendants; one that ends while we look counts nothing. */
function sumOver(root: number, of: (pid: number) => number): number {
  return treeOf(root).reduce((sum, pid) => {
    try {
      return sum + of(pid);
    } catch {
      return sum;
    }
  }, 0);
}

/** User and system time so far, in microseconds. */
export function cpuOf(root: number): number {
  const ticks = sumOver(root, (pid) => {
    const stat = statOf(pid);
    return Number(stat[11]) + Number(stat[12]);
  });
  return ticks / TICKS_PER_SECOND * 1e6;
}

/** Bytes of memory: in use now (VmRSS), or at the most so far (VmHWM). */
export function memoryOf(root: number, what: "VmRSS" | "VmHWM"): number {
  const kilobytes = sumOver(root, (pid) => {
    const line = readFileSync(`/proc/${pid}/status`, "utf8").split("\n").find((line) => line.startsWith(what));
    return Number(line?.match(/\d+/)?.[0] ?? 0);
  });
  return kilobytes * 1024;
}
