// Who takes part: lb.ts on its runtimes and its peers, each with the settings its own manual gives for this work
// (connections to the servers kept open, one worker, no access log).
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { findProgram, needProgram, outputOf, PROJECT, Skip, temporaryFolder } from "./processes.ts";

export const STRATEGIES = [
  "round-robin",
  "first",
  "random",
  "two-choices",
  "least-connections",
  "least-response-time",
  "peak-ewma",
  "ip-hash",
] as const;
export type Strategy = typeof STRATEGIES[number];

/**
 * What a contestant is to do. `servers` are host:port; `routes` hosts h0.test... and paths /p0..., 0: everything; `keys`
 * are more keys of lb.ts's service.
 */
export type Setup = { port: number; servers: string[]; strategy: Strategy; routes: number; keys?: object };

export type Contestant = {
  name: string;
  kind: "lb" | "server" | "npm" | "hono";
  runtime?: Runtime;
  /** What each strategy is called there; one that is absent does not exist there. */
  strategies: Partial<Record<Strategy, string>>;
  /** Whether it chooses by host and path. */
  routes: boolean;
  version: () => string;
  /** Writes its config and returns the command; throws Skip when it cannot run here. */
  command: (setup: Setup) => string[];
};

export const RUNTIMES = ["deno", "bun", "node"] as const;
export type Runtime = typeof RUNTIMES[number];

const upTo = (count: number) => Array.from({ length: count }, (_, index) => index);

function write(name: string, text: string): string {
  const file = join(temporaryFolder(), name);
  writeFileSync(file, text);
  return file;
}

function runScript(runtime: Runtime, script: string, ...args: string[]): string[] {
  const program = needProgram(runtime);
  if (runtime === "node" && outputOf(program, "-p", "!!process.features.typescript") !== "true") {
    throw new Skip("this node does not run TypeScript: 22.18 or newer is needed");
  }
  return [program, ...(runtime === "deno" ? ["run", "-A"] : []), script, ...args];
}

function versionOf(program: string, ...args: string[]): string {
  const file = findProgram(program);
  return file === undefined ? "not installed" : outputOf(file, ...args).match(/\d+\.\d+[\w.+~-]*/)?.[0] ?? "unknown";
}

const packageVersion = (folder: string) =>
  (JSON.parse(readFileSync(join(folder, "package.json"), "utf8")) as { version: string }).version;

// ---- lb.ts

function lb(runtime: Runtime): Contestant {
  const script = join(PROJECT, "lb.ts");
  return {
    name: runtime,
    kind: "lb",
    runtime,
    strategies: Object.fromEntries(STRATEGIES.map((name) => [name, name])),
    routes: true,
    version: () => `${packageVersion(PROJECT)} on ${runtime} ${versionOf(runtime, "--version")}`,
    command(setup) {
      if (!existsSync(script)) throw new Skip("there is no lb.ts");
      const config = write(`lb-${setup.port}.yml`, JSON.stringify(lbConfig(setup)));
      return runScript(runtime, script, "-c", config, "--listen", `127.0.0.1:${setup.port}`, "--log", "off");
    },
  };
}

/** JSON is YAML. */
const lbConfig = ({ servers, strategy, routes, keys }: Setup) => ({
  services: { bench: { servers, strategy, ...keys } },
  ...(routes === 0 ? { default: { service: "bench" } } : {
    hosts: upTo(routes).map((index) => ({ host: `h${index}.test`, service: "bench" })),
    paths: upTo(routes).map((index) => ({ path: `/p${index}`, service: "bench" })),
  }),
});

// ---- nginx, haproxy, caddy

export const NGINX_COMMON = (folder: string) => `
daemon off; worker_processes 1; worker_rlimit_nofile 20000; pid ${folder}/pid; error_log stderr crit;
events { worker_connections 16000; multi_accept on; }
`;
export const NGINX_HTTP = (folder: string) => `
  access_log off; sendfile on; tcp_nodelay on; keepalive_requests 1000000000; client_max_body_size 0;
  client_body_temp_path ${folder}/body; proxy_temp_path ${folder}/proxy; fastcgi_temp_path ${folder}/fastcgi;
  uwsgi_temp_path ${folder}/uwsgi; scgi_temp_path ${folder}/scgi;
`;

export function nginxFolder(port: number): string {
  const folder = join(temporaryFolder(), `nginx-${port}`);
  mkdirSync(folder, { recursive: true });
  return folder;
}

const nginx: Contestant = {
  name: "nginx",
  kind: "server",
  strategies: {
    "round-robin": "",
    random: "random;",
    "two-choices": "random two least_conn;",
    "least-connections": "least_conn;",
    "ip-hash": "ip_hash;",
  },
  routes: true,
  version: () => versionOf("nginx", "-v"),
  command({ port, servers, strategy, routes }) {
    const folder = nginxFolder(port);
    const listen = `listen 127.0.0.1:${port} backlog=4096`;
    const hosts = upTo(routes).map((index) => `h${index}.test`).join(" ");
    const paths = upTo(routes).map((index) => `location /p${index}/ { proxy_pass http://bench; }`).join("\n");
    const all = "location / { proxy_pass http://bench; }";
    const text = `${NGINX_COMMON(folder)}
http { ${NGINX_HTTP(folder)}
  server_names_hash_max_size 8192; proxy_request_buffering off;
  proxy_max_temp_file_size 0; proxy_buffers 16 64k; proxy_buffer_size 16k; proxy_busy_buffers_size 256k;
  proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $http_host;
  upstream bench {
    ${this.strategies[strategy]}
    ${servers.map((server) => `server ${server};`).join("\n    ")}
    keepalive ${Math.max(64, 2 * servers.length)}; keepalive_requests 1000000000;
  }
  server { ${listen}; ${routes === 0 ? all : paths} }
  ${routes === 0 ? "" : `server { listen 127.0.0.1:${port}; server_name ${hosts}; ${all} }`}
}`;
    return [needProgram("nginx"), "-p", folder, "-e", "stderr", "-c", write(`nginx-${port}.conf`, text)];
  },
};

const haproxy: Contestant = {
  name: "haproxy",
  kind: "server",
  strategies: {
    "round-robin": "roundrobin",
    first: "first",
    random: "random(1)",
    "two-choices": "random(2)",
    "least-connections": "leastconn",
    "ip-hash": "source",
  },
  routes: true,
  version: () => versionOf("haproxy", "-v"),
  command({ port, servers, strategy, routes }) {
    const list = (name: string, of: (index: number) => string) =>
      write(`${name}-${port}.lst`, upTo(routes).map(of).join("\n") + "\n");
    const rules = routes === 0 ? "default_backend bench" : `
  use_backend bench if { req.hdr(host) -f ${list("hosts", (index) => `h${index}.test`)} }
  use_backend bench if { path_beg -f ${list("paths", (index) => `/p${index}/`)} }`;
    const text = `global
  nbthread 1
  maxconn 8000
defaults
  mode http
  timeout connect 3s
  timeout client 60s
  timeout server 60s
  http-reuse always
frontend front
  bind 127.0.0.1:${port} backlog 4096
  ${rules}
backend bench
  balance ${this.strategies[strategy]}
${
      servers.map((server, index) => `  server s${index} ${server}${strategy === "first" ? " maxconn 8000" : ""}`).join(
        "\n",
      )
    }
`;
    return [needProgram("haproxy"), "-db", "-f", write(`haproxy-${port}.cfg`, text)];
  },
};

const caddy: Contestant = {
  name: "caddy",
  kind: "server",
  strategies: {
    "round-robin": "round_robin",
    first: "first",
    random: "random",
    "two-choices": "random_choose 2",
    "least-connections": "least_conn",
    "ip-hash": "ip_hash",
  },
  routes: true,
  version: () => versionOf("caddy", "version"),
  command({ port, servers, strategy, routes }) {
    const list = (of: (index: number) => string) => upTo(routes).map(of).join(" ");
    const matchers = routes === 0 ? "" : `@hosts host ${list((index) => `h${index}.test`)}
  @paths path ${list((index) => `/p${index}/*`)}`;
    const text = `{
  admin off
  auto_https off
  storage file_system ${join(temporaryFolder(), "caddy")}
}
(bench) {
  reverse_proxy ${servers.join(" ")} {
    lb_policy ${this.strategies[strategy]}
    transport http {
      keepalive_idle_conns_per_host 128
    }
  }
}
http://:${port} {
  bind 127.0.0.1
  ${matchers}
  ${routes === 0 ? "import bench" : "handle @hosts {\nimport bench\n}\nhandle @paths {\nimport bench\n}\nrespond 404"}
}`;
    const home = `HOME=${temporaryFolder()}`; // it saves its config there
    const config = write(`Caddyfile-${port}`, text);
    return ["env", home, needProgram("caddy"), "run", "--adapter", "caddyfile", "--config", config];
  },
};

// ---- npm peers

const NPM_FOLDER = join(tmpdir(), "lb-bench-peers");
const NPM_PEERS = { "http-proxy-3": "2.0.1", "fast-proxy": "2.2.0", httpxy: "0.5.6" };

function isInstalled(name: string, version: string): boolean {
  const folder = join(NPM_FOLDER, "node_modules", name);
  return existsSync(join(folder, "package.json")) && packageVersion(folder) === version;
}

/** Installs those that are missing, once, into a folder of their own that stays for the next run. */
function needPackage(name: string, version: string): void {
  if (isInstalled(name, version)) return;
  mkdirSync(NPM_FOLDER, { recursive: true });
  const wanted = Object.entries(NPM_PEERS).map(([name, version]) => `${name}@${version}`);
  const flags = ["--no-save", "--no-audit", "--no-fund", "--prefix", NPM_FOLDER];
  const { stderr } = spawnSync(needProgram("npm"), ["install", ...flags, ...wanted], { encoding: "utf8" });
  if (!isInstalled(name, version)) throw new Skip(`npm install failed: ${stderr.trim().split("\n").at(-1)}`);
}

const npmPeers = Object.entries(NPM_PEERS).map(([name, version]): Contestant => ({
  name,
  kind: "npm",
  runtime: "node",
  strategies: { "round-robin": "" },
  routes: false,
  version: () => `${version} on node ${versionOf("node", "--version")}`,
  command({ port, servers }) {
    needPackage(name, version);
    const script = join(import.meta.dirname ?? ".", "npm-proxy.ts");
    const urls = servers.map((server) => `http://${server}`);
    return runScript("node", script, name, NPM_FOLDER, String(port), ...urls);
  },
}));

const hono = (runtime: Runtime): Contestant => ({
  name: `hono-${runtime}`,
  kind: "hono",
  runtime,
  strategies: { "round-robin": "" },
  routes: false,
  version() {
    const folder = join(PROJECT, "node_modules", "hono");
    const version = existsSync(folder) ? packageVersion(folder) : "of deno.json";
    return `hono ${version} on ${runtime} ${versionOf(runtime, "--version")}`;
  },
  command({ port, servers }) {
    const script = join(import.meta.dirname ?? ".", "hono-proxy.ts");
    return runScript(runtime, script, String(port), ...servers.map((server) => `http://${server}`));
  },
});

export const CONTESTANTS: Contestant[] = [
  ...RUNTIMES.map(lb),
  nginx,
  haproxy,
  caddy,
  ...npmPeers,
  ...RUNTIMES.map(hono),
];

export const otherVersions = () => ({ wrk: versionOf("wrk", "-v") });
