// The peers from npm, each as its README shows it, with connections to the servers kept open.
// Arguments: the package, the folder it is installed in, port, then the servers.
import { Agent, createServer, type RequestListener } from "node:http";
import { createRequire } from "node:module";
import process from "node:process";

const [name = "", folder = "", port = "", ...servers] = process.argv.slice(2);
const load = createRequire(`${folder}/`);
let turn = 0;
const next = <T>(list: T[]): T => list[turn++ % list.length]!;

const peers: Record<string, () => RequestListener> = {
  "http-proxy-3"() {
    const proxy = load("http-proxy-3").createProxyServer({ agent: new Agent({ keepAlive: true }) });
    proxy.on("error", () => {}); // wrk leaves in the middle of its last requests
    return (req, res) => proxy.web(req, res, { target: next(servers) });
  },
  "fast-proxy"() {
    const undici = { connections: 128, pipelining: 1 };
    const proxies = servers.map((base) => load("fast-proxy")({ base, undici }));
    return (req, res) => next(proxies).proxy(req, res, req.url, {});
  },
  "httpxy"() {
    const proxy = load("httpxy").createProxyServer({});
    return (req, res) => proxy.web(req, res, { target: next(servers) }).catch(() => res.destroy());
  },
};

const server = createServer(peers[name]!());
server.keepAliveTimeout = 75_000; // nginx's default; Node's own 5 s would close the idle connections of "many"
server.listen(Number(port), "127.0.0.1", 4096);
