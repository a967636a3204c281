// A client of the running program stays on its server, and moves once where it has to.

import assert from "node:assert/strict";
import type { TestContext } from "node:test";
import {
  answer,
  get,
  type Message,
  rawRequest,
  scriptedServer,
  sharedProgram,
  status,
  test,
  value,
  values,
} from "../rig/rig.ts";

// ─── The running program ───

const shared = sharedProgram();

/** Three servers that say their name, the program over them, and a client. */
async function program(t: TestContext, config: (addresses: string[]) => unknown) {
  const servers = await Promise.all(["a", "b", "c"].map((name) => scriptedServer((visit) => visit.send(answer(name)))));
  for (const server of servers) t.after(() => server.close());
  const addresses = servers.map(({ address }) => address);
  const lb = await shared.begin(config(addresses));
  const ask = async (cookie = "") => {
    const { answers } = await rawRequest(lb.port, get("/", cookie && `Cookie: ${cookie}\r\n`));
    assert.equal(status(answers[0]!), 200);
    return answers[0]!;
  };
  return { lb, servers, addresses, ask };
}
const cookieIn = (message: Message) => value(message, "set-cookie").split(";")[0]!;
const sticky = (addresses: unknown[], more = {}) => ({
  log: "off",
  default: { servers: addresses, sticky: { cookie: "lb" }, health: "off", ...more },
});

test("running: a client stays on its server, over a reload too, and a forged cookie names nobody", async (t) => {
  const { lb, servers, addresses, ask } = await program(t, (addresses) => sticky(addresses));
  const first = await ask();
  assert.match(value(first, "set-cookie"), /^lb=[\w-]{22}; Path=\/; HttpOnly; SameSite=Lax$/);
  const name = first.body.toString(), cookie = cookieIn(first);
  const stays = async () => {
    for (let i = 0; i < 4; i++) {
      const again = await ask(`mine=1; ${cookie}`);
      assert.deepEqual([again.body.toString(), values(again, "set-cookie")], [name, []]);
    }
  };
  await stays();
  await lb.reload(sticky(addresses.toReversed(), { retries: 2 }));
  await stays();
  const got = servers.flatMap(({ requests }) => requests.flatMap((request) => values(request, "cookie")));
  assert.deepEqual(new Set(got), new Set(["mine=1"]));
  const forged = new Set<string>();
  for (let i = 0; i < 6; i++) forged.add((await ask(`${cookie}x`)).body.toString());
  assert.equal(forged.size, 3, "a forged cookie is no reason to ask one server and not another");
});

test("running: the clients of a server that drains move once, and are not moved back", async (t) => {
  const { lb, addresses, ask } = await program(t, (addresses) => sticky(addresses));
  const first = await ask();
  const at = "abc".indexOf(first.body.toString());
  await lb.reload(sticky(addresses.map((url, i) => i === at ? { url, state: "drain" } : url)));
  const moved = await ask(cookieIn(first));
  assert.notEqual(moved.body.toString(), first.body.toString());
  const stays = async () => {
    const again = await ask(cookieIn(moved));
    assert.deepEqual([again.body.toString(), values(again, "set-cookie")], [moved.body.toString(), []]);
  };
  for (let i = 0; i < 3; i++) await stays();
  await lb.reload(sticky(addresses));
  for (let i = 0; i < 3; i++) await stays();
});

test("running: the clients of a server that dies move once", async (t) => {
  const { servers, ask } = await program(t, (addresses) => sticky(addresses));
  const first = await ask();
  await servers["abc".indexOf(first.body.toString())]!.close();
  const moved = await ask(cookieIn(first));
  assert.notEqual(moved.body.toString(), first.body.toString());
  for (let i = 0; i < 4; i++) {
    const again = await ask(cookieIn(moved));
    assert.deepEqual([again.body.toString(), values(again, "set-cookie")], [moved.body.toString(), []]);
  }
});

test("running: a server that sets a cookie of that name keeps it, and the log says so once", async (t) => {
  const set = "Set-Cookie: PHPSESSID=of-the-application; path=/\r\n";
  const server = await scriptedServer((visit) => visit.send(answer("", set)));
  t.after(() => server.close());
  const own = (cookie: string) => ({
    log: "off",
    default: { servers: [server.address], sticky: cookie, health: "off" },
  });
  const lb = await shared.begin(own("PHPSESSID"));
  const ask = async (cookie: string) => {
    const { answers: [one] } = await rawRequest(lb.port, get("/", `Cookie: ${cookie}\r\n`));
    return [values(one!, "set-cookie"), value(server.requests.at(-1)!, "cookie")] as const;
  };
  const theirs = "PHPSESSID=of-the-application; path=/";
  assert.deepEqual(await ask("a=1"), [[theirs], "a=1"]);
  for (let i = 0; i < 2; i++) {
    assert.deepEqual(await ask("PHPSESSID=of-the-application"), [[theirs], "PHPSESSID=of-the-application"]);
  }
  const warning =
    /warn: default: its servers set the cookie PHPSESSID themselves, and so sticky does not: it needs another name, such as lb\n/g;
  assert.equal(lb.output().match(warning)?.length, 1, lb.output());
  await lb.reload(own("lb"));
  const [cookies] = await ask("PHPSESSID=of-the-application");
  assert.equal(cookies!.length, 2);
});
