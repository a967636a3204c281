import { Hono } from "hono";
import { basicAuth } from "hono/basic-auth";
import { createLoadBalancer, parseConfig, serve, type Strategy } from "lb-ts";

const text = `
services: { shop: { servers: [localhost:8081, localhost:8082], strategy: longest-name } }
default: { service: shop }
`;

/** A strategy is a function of those who may be asked; the second parameter has the client, the request and a random. */
const longestName: Strategy = (candidates) => candidates.reduce((a, b) => (b.name.length > a.name.length ? b : a));

const own = { strategies: { "longest-name": longestName } };
const lb = createLoadBalancer(parseConfig(text, own), own); // parseConfig also takes env and file

const app = new Hono();
app.use("/admin/*", basicAuth({ username: "me", password: "secret" }));
app.route("/", lb);
await serve(app, { port: 0, hostname: "127.0.0.1" }); // on Deno, Bun and Node; also hostname, tls: { cert, key } as PEM, or a list, and signal
lb.start(); // only if servers shall be probed; lb.stop() ends it

lb.stop();
console.log("it serves");
process.exit(0);
