// Servers that DNS has under a name: the running program over a DNS server of ours.

import assert from "node:assert/strict";
import type { Socket } from "node:net";
import { createServer as createTlsServer, type TLSSocket } from "node:tls";
import { dnsServer } from "../rig/dns.ts";
import { eventually, type Instance, startEtcd, startInstance } from "../rig/engines.ts";
import {
  alongside,
  answer,
  endServer,
  get,
  listenLocally,
  rawRequest,
  scriptedServerAt,
  startProgram,
  status,
  until,
  value,
} from "../rig/rig.ts";
import { A, CA, KEY } from "../rig/certificates.ts";

const ask = async (port: number) => (await rawRequest(port, get("/"), { quiet: 30 })).answers[0]!;

/** Two servers at one port of 127.0.0.2 and 127.0.0.3, which say where they are. */
const at = (address: string, port: number) =>
  scriptedServerAt(address, port, (visit, request) => visit.send(answer(`${address} ${value(request, "host")}`)));

alongside(
  ["the program finds servers by DNS, follows what comes and goes, and drains one in memory", {}, async () => {
    const dns = await dnsServer(), one = await at("127.0.0.2", 0), two = await at("127.0.0.3", one.port);
    dns.set("A", "app.test", ["127.0.0.2"]);
    const service = {
      servers: [{ dns: `app.test:${one.port}` }],
      health: { path: "/", interval: "100ms" },
      host_header: "server",
    };
    const lb = await startProgram({ resolvers: [dns.address], services: { app: service }, default: "app" }, [
      "--admin",
      "127.0.0.1:0",
    ]);
    const api = async (path: string, method = "GET", body?: unknown) =>
      (await fetch(`http://127.0.0.1:${lb.admin}${path}`, {
        method,
        ...body ? { body: JSON.stringify(body), headers: { "content-type": "application/json" } } : {},
      })).json();
    try {
      assert.equal((await ask(lb.port)).body.toString(), `127.0.0.2 app.test:${one.port}`);
      dns.set("A", "app.test", ["127.0.0.2", "127.0.0.3"]);
      await until("the second server is found", () => lb.output().includes(`found 127.0.0.3:${one.port}`), 15_000);
      const drained = await api(`/services/app/servers/127.0.0.2:${one.port}/state`, "PUT", { state: "drain" });
      assert.deepEqual([drained.state, drained.saved, drained.found_by], ["drain", false, `app.test:${one.port}`]);
      for (let i = 0; i < 4; i++) assert.match((await ask(lb.port)).body.toString(), /^127\.0\.0\.3 /);
      const refused = await api(`/services/app/servers/127.0.0.2:${one.port}`, "DELETE");
      assert.deepEqual([refused.status, refused.detail], [
        409,
        `127.0.0.2:${one.port} was found by app.test:${one.port}: set its state, or take that name out`,
      ]);
      const max = await api(`/services/app/servers/127.0.0.2:${one.port}`, "PATCH", { max: 3 });
      assert.deepEqual([max.status, /only weight and state/.test(max.detail)], [400, true]);
      const weight = await api(`/services/app/servers/127.0.0.2:${one.port}`, "PATCH", { weight: "x" });
      assert.deepEqual([weight.status, weight.detail], [400, 'weight: "x" is not a whole number from 0 to 256']);
      dns.set("A", "app.test", "SERVFAIL");
      await until("the failure is said", () => lb.output().includes("DNS has no good answer"), 15_000);
      const { services } = await api("/services");
      assert.ok(services[0].names[0].stale_for >= 0);
      assert.equal(services[0].servers.length, 2);
    } finally {
      await lb.stop();
      await Promise.all([dns.close(), one.close(), two.close()]);
    }
  }],
  [
    "a name that is unknown at the start stops nothing, also where no resolver answers; workers hear what is found",
    {},
    async () => {
      const dns = await dnsServer(), one = await at("127.0.0.1", 0);
      dns.set("A", "app.test", "silence");
      const config = {
        resolvers: [dns.address],
        services: { app: { servers: [{ dns: `app.test:${one.port}` }], health: "off" } },
        default: "app",
      };
      const lb = await startProgram(config, ["--admin", "127.0.0.1:0", "--workers", "2"]);
      try {
        assert.equal(status(await ask(lb.port)), 503);
        assert.match(lb.output(), /app\.test:\d+: DNS has no good answer: no answer; it has no server yet/);
        dns.set("A", "app.test", ["127.0.0.1"]);
        await until("it is found", () => lb.output().includes("found 127.0.0.1"), 15_000);
        for (let row = 0, asked = 0; row < 20; asked++) {
          row = status(await ask(lb.port)) === 200 ? row + 1 : 0;
          assert.ok(asked < 500, "both workers have it");
        }
        const url = `http://127.0.0.1:${lb.admin}/services/app/servers/127.0.0.1:${one.port}/state`;
        const headers = { "content-type": "application/json" };
        await fetch(url, { method: "PUT", body: '{"state":"maint"}', headers });
        for (let row = 0, asked = 0; row < 20; asked++) {
          row = status(await ask(lb.port)) === 503 ? row + 1 : 0;
          assert.ok(asked < 500, "both workers have drained it");
        }
      } finally {
        await lb.stop();
        await Promise.all([dns.close(), one.close()]);
      }
    },
  ],
  [
    "over TLS a server that was found is asked for the DNS name, and its certificate has to be for that",
    {},
    async () => {
      const dns = await dnsServer(), open = new Set<Socket>();
      const server = createTlsServer({ cert: A, key: KEY, ALPNProtocols: ["http/1.1"] }, (socket) => { // for a.test and 127.0.0.1
        const body = String((socket as TLSSocket & { servername?: string | false }).servername || "none");
        open.add(socket.on("error", () => {}));
        socket.on("data", () => socket.write(`HTTP/1.1 200 OK\r\nContent-Length: ${body.length}\r\n\r\n${body}`));
      });
      server.on("tlsClientError", () => {});
      const port = await listenLocally(server),
        routes = ["a.test", "b.test"].map((name) => {
          dns.set("A", name, ["127.0.0.1"]);
          return {
            path: `/${name}`,
            servers: [{ dns: `https://${name}:${port}` }],
            tls: { ca: "ca.pem" },
            health: "off",
          };
        });
      dns.set("SRV", "_https._tcp.test", [`1 1 ${port} a.test`]);
      routes.push({ ...routes[0]!, path: "/srv", servers: [{ srv: "_https._tcp.test" } as never] });
      const lb = await startProgram({ resolvers: [dns.address], routes }, [], { "ca.pem": CA });
      try {
        const ask = async (path: string) => (await rawRequest(lb.port, get(path), { quiet: 30 })).answers[0]!;
        assert.equal((await ask("/a.test")).body.toString(), "a.test");
        assert.equal((await ask("/srv")).body.toString(), "a.test");
        const refused = await ask("/b.test");
        assert.deepEqual([status(refused), value(refused, "x-lb-failure")], [502, "connect"]);
      } finally {
        await lb.stop();
        await Promise.all([dns.close(), endServer(server, open)]);
      }
    },
  ],
  ["a fleet drains a server that was found on all instances, also on one that starts later, until it is gone", {
    needs: ["etcd"],
  }, async () => {
    const ends: (() => unknown)[] = [], t = { after: (end: () => unknown) => void ends.unshift(end) };
    try {
      const dns = await dnsServer();
      t.after(() => dns.close());
      dns.set("A", "app.test", ["127.0.0.2", "127.0.0.3"]);
      const etcd = await startEtcd(t), fleet = { etcd: etcd.urls };
      const rest = `resolvers: ["${dns.address}"]
services: { app: { servers: [{ dns: "app.test:9" }], health: off } }
default: app
`;
      const a = await startInstance(t, "a", fleet, { rest });
      const stateAt = async (one: Instance) => {
        const { json } = await one.ask("GET /services/app/servers/127.0.0.2:9");
        return json.state;
      };
      const drained = await a.ask("PUT /services/app/servers/127.0.0.2:9/state", { state: "drain" });
      assert.deepEqual([drained.json.state, drained.json.saved], ["drain", false]);
      const b = await startInstance(t, "b", fleet);
      await eventually("an instance that starts later has it drained", async () => await stateAt(b) === "drain");
      await b.ask("PUT /services/app/servers/127.0.0.2:9/state", { state: "ready" });
      await eventually("what the other says counts here", async () => await stateAt(a) === "ready");
      await a.ask("PUT /services/app/servers/127.0.0.2:9/state", { state: "maint" });
      dns.set("A", "app.test", ["127.0.0.3"]);
      const key = "lb/told/app http://127.0.0.2:9#change";
      await eventually("the word is over with the server", async () => await etcd.get(key) === "{}", 40_000);
    } finally {
      for (const end of ends) await end();
    }
  }],
);
