// The peer "hono/proxy": what a Hono user writes to balance over some servers, on Deno, Bun and Node.
// Arguments: port, then the servers.
import process from "node:process";
import { Hono } from "hono";
import { proxy } from "hono/proxy";

const port = Number(process.argv[2]);
const servers = process.argv.slice(3);
const hostname = "127.0.0.1";
let turn = 0;

const app = new Hono();
app.all("*", (c) => {
  const { pathname, search } = new URL(c.req.url);
  return proxy(`${servers[turn++ % servers.length]}${pathname}${search}`, c.req.raw);
});

const { fetch } = app;
if ("Deno" in globalThis) Deno.serve({ port, hostname, onListen: () => {} }, fetch);
else if (!("Bun" in globalThis)) (await import("@hono/node-server")).serve({ fetch, port, hostname });

export default "Bun" in globalThis ? { port, hostname, idleTimeout: 0, fetch } : undefined;
