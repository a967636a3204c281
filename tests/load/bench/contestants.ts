// Who takes part: lb.ts on its runtimes, and its peers with the settings that their manuals give for this work
// (connections to the servers kept open, one worker, no access log). And the servers behind them.
import { A, KEY } from "../../rig/certificates.ts";
import { FOLDER, freePorts, listening, LOAD_CORE, start, writeTemporary } from "./processes.ts";

export interface Setup {
  title: string; // in a case with several setups
  servers: number;
  strategy: string; // of lb.ts; its peers take least connections where it is not round-robin
  routes: number; // so many hosts h0.test ... and paths /p0/ ...; 0: one route for everything
  tls: boolean;
  h2?: boolean; // clients speak HTTP/2 without TLS
  service?: object; // more keys of lb.ts's service; peers take no part
  args?: string[]; // more of lb.ts's command line; peers take no part
}

/** Writes the config and returns the command. `servers` are host:port. */
type Command = (port: number, servers: string[], setup: Setup) => string[];

export interface Contestant {
  name: string;
  lb: boolean;
  command: Command;
}

const each = (count: number, of: (index: number) => string) => Array.from({ length: count }, (_, index) => of(index));
const host = (index: number) => `h${index}.test`;
const cert = writeTemporary("cert.pem", A), key = writeTemporary("key.pem", KEY);
const certAndKey = writeTemporary("both.pem", A + KEY);

const lb = (run: string[]): Command => (port, servers, { strategy, service, routes, tls, h2, args = [] }) => {
  const config = {
    listen: [{ address: `127.0.0.1:${port}`, ...tls && { tls: { cert, key } }, ...h2 && { h2c: true } }],
    log: "off",
    services: { bench: { servers, strategy, ...service } },
    hosts: each(routes, host).map((host) => ({ host, service: "bench" })),
    paths: each(routes, (index) => `/p${index}`).map((path) => ({ path, service: "bench" })),
    ...routes === 0 && { default: { service: "bench" } },
  };
  return [...run, "lb.ts", "-c", writeTemporary(`lb-${port}.yml`, JSON.stringify(config)), ...args]; // JSON is YAML
};

const haproxy: Command = (port, servers, { strategy, routes, tls, h2 }) => {
  const list = (name: string, lines: string[]) => writeTemporary(`${name}-${port}`, lines.join("\n") + "\n");
  const rules = `
  use_backend bench if { req.hdr(host) -f ${list("hosts", each(routes, host))} }
  use_backend bench if { path_beg -f ${list("paths", each(routes, (index) => `/p${index}/`))} }`;
  const config = `
global
  nbthread 1
  maxconn 12000
  no strict-limits
defaults
  mode http
  timeout connect 3s
  timeout client 60s
  timeout server 60s
  http-reuse always
frontend front
  bind 127.0.0.1:${port} backlog 4096 ${tls ? `ssl crt ${certAndKey} alpn http/1.1` : h2 ? "proto h2" : ""}
  ${routes === 0 ? "default_backend bench" : rules}
backend bench
  balance ${strategy === "round-robin" ? "roundrobin" : "leastconn"}
  default-server pool-purge-delay 1m
${servers.map((server, index) => `  server s${index} ${server}\n`).join("")}`;
  return ["haproxy", "-db", "-f", writeTemporary(`haproxy-${port}.cfg`, config)];
};

/** Makes the command of an nginx, which may be a contestant or the servers. */
function nginxCommand(name: string | number, http: string): string[] {
  const config = `
daemon off; master_process off; worker_rlimit_nofile 20000; pid nginx-${name}.pid; error_log stderr crit;
events { worker_connections 16000; multi_accept on; }
http {
  access_log off; sendfile on; tcp_nodelay on; keepalive_requests 1000000000; client_max_body_size 0;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi;
  scgi_temp_path scgi; ${http}
}`;
  return ["nginx", "-p", FOLDER, "-e", "stderr", "-c", writeTemporary(`nginx-${name}.conf`, config)];
}

const nginx: Command = (port, servers, { strategy, routes, tls, h2 }) => {
  const pass = (path: string) => `location ${path} { proxy_pass http://bench; }`;
  const byPath = each(routes, (index) => pass(`/p${index}/`)).join("\n");
  const http = `
  server_names_hash_max_size 8192; proxy_request_buffering off;
  proxy_max_temp_file_size 0; proxy_buffers 16 64k; proxy_buffer_size 16k; proxy_busy_buffers_size 256k;
  proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $http_host;
  ${tls ? `ssl_certificate ${cert}; ssl_certificate_key ${key}; ssl_protocols TLSv1.2 TLSv1.3;` : ""}
  upstream bench {
    ${strategy === "round-robin" ? "" : "least_conn;"}
    ${servers.map((server) => `server ${server};`).join("\n")}
    keepalive ${Math.max(64, 2 * servers.length)}; keepalive_requests 1000000000;
  }
  server { listen 127.0.0.1:${port} backlog=4096 ${tls ? "ssl" : h2 ? "http2" : ""}; ${
    routes === 0 ? pass("/") : byPath
  } }
  ${
    routes === 0
      ? ""
      : `server { listen 127.0.0.1:${port}; server_name ${each(routes, host).join(" ")}; ${pass("/")} }`
  }`;
  return nginxCommand(port, http);
};

const caddy: Command = (port, servers, { strategy, routes, tls, h2 }) => {
  const proxy = (matcher: string) => `
  reverse_proxy ${matcher} ${servers.join(" ")} {
    lb_policy ${strategy === "round-robin" ? "round_robin" : "least_conn"}
    transport http {
      keepalive_idle_conns_per_host 128
    }
  }`;
  const byRoute = `
  @hosts host ${each(routes, host).join(" ")}
  @paths path ${each(routes, (index) => `/p${index}/*`).join(" ")} ${proxy("@hosts")} ${proxy("@paths")}`;
  const config = `
{
  admin off
  auto_https off
  ${h2 ? "servers {\n protocols h1 h2c\n }" : ""}
}
${tls ? "https" : "http"}://:${port} {
  bind 127.0.0.1
  ${tls ? `tls ${cert} ${key}` : ""}
  ${routes === 0 ? proxy("") : byRoute}
}`;
  const file = writeTemporary(`Caddyfile-${port}`, config);
  return ["env", `HOME=${FOLDER}`, "caddy", "run", "--adapter", "caddyfile", "--config", file]; // it writes to HOME
};

export const CONTESTANTS: Contestant[] = [
  { name: "node", lb: true, command: lb(["node"]) },
  { name: "bun", lb: true, command: lb(["bun"]) },
  { name: "deno", lb: true, command: lb(["deno", "run", "-A"]) },
  { name: "haproxy", lb: false, command: haproxy },
  { name: "nginx", lb: false, command: nginx },
  { name: "caddy", lb: false, command: caddy },
];

export const SMALL_ANSWER = "twenty bytes of text";
export const MEBIBYTE = 1 << 20;

/** Starts one nginx that listens on as many ports as there are servers, and returns their host:port. */
export async function startServers(count: number): Promise<string[]> {
  const servers = (await freePorts(count)).map((port) => `127.0.0.1:${port}`);
  writeTemporary("big", Buffer.alloc(MEBIBYTE, "x"));
  // `return` answers before the body has come. /upload mirrors the request, and so reads all of the body first.
  const http = `
  keepalive_timeout 1h; open_file_cache max=10; default_type text/plain; client_body_buffer_size 2m; root ${FOLDER};
  server {
    ${servers.map((server) => `listen ${server} backlog=4096;`).join("\n")}
    location / { return 200 "${SMALL_ANSWER}"; }
    location = /big { }
    location = /upload { mirror /sink; error_page 405 404 =200 /; }
    location = /sink { internal; return 204; }
  }`;
  await listening(start(LOAD_CORE, nginxCommand("servers", http)), Number(servers.at(-1)!.split(":")[1]));
  return servers;
}
