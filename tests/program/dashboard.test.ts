// The pages for people, in a real browser that looks at the running program.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { after } from "node:test";
import { chromium, type Page } from "playwright-core";
import { A, EXPIRED, KEY } from "../rig/certificates.ts";
import {
  answer,
  get,
  type Program,
  rawRequest,
  type Script,
  type ScriptedServer,
  scriptedServer,
  sharedProgram,
  sleep,
  startProgram,
  status,
  test,
} from "../rig/rig.ts";

const FLAGS =
  "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync";
const ADMIN = ["--admin", "127.0.0.1:0", "--log", "off"];
const TOKEN = "the-operators-token", READ_TOKEN = "the-readers-token";

/** A page that has been opened, and everything that must not happen in it. */
interface Opened {
  page: Page;
  lb: Program;
  wrong: string[];
}

/** The page that all tests look at: a page of its own for each costs a process of the browser. */
let tab: Promise<Page> | undefined;
const openTab = async () => {
  const browser = await chromium.launch({ executablePath: "/usr/bin/chromium", args: FLAGS.split(" ") });
  return browser.newPage();
};
after(async () => await (await tab)?.context().browser()?.close());

/** Where there has been a token, there is one ever after: pages with and without one are those of two programs. */
const open = sharedProgram(ADMIN), guarded = sharedProgram(ADMIN);

/** The shared program with this config, or one of its own with these arguments. */
async function begin(config: object, { args, files = {} }: Options): Promise<Program> {
  if (args) return await startProgram(config, [...ADMIN, ...args], files);
  return await ("admin" in config ? guarded : open).begin(config, files);
}

interface Options {
  dark?: boolean;
  path?: string;
  args?: string[]; // of a program of its own
  files?: Record<string, string>; // beside its config
}

/** The program with this config and the page open, while `use` lasts. Nothing may be wrong in it at the end. */
async function looking(config: object, use: (opened: Opened) => Promise<void>, options: Options = {}) {
  const { dark = false, path = "/" } = options, page = await (tab ??= openTab());
  const lb = await begin(config, options), wrong: string[] = [], origin = `http://127.0.0.1:${lb.admin}`;
  try {
    await page.setViewportSize({ width: 1400, height: 900 });
    await page.emulateMedia({ colorScheme: dark ? "dark" : "light" });
    page.on("console", (message) => void wrong.push(`${message.type()}: ${message.text()}`));
    page.on("pageerror", (error) => void wrong.push(`${error}`));
    page.on("dialog", (dialog) => void wrong.push(`a dialog: ${dialog.message()}`));
    page.on("request", (request) => {
      if (![origin, "data:"].some((known) => request.url().startsWith(known))) wrong.push(`asks ${request.url()}`);
    });
    await page.goto(origin + path);
    await use({ page, lb, wrong });
    assert.deepEqual(wrong, []);
  } finally {
    page.removeAllListeners();
    await page.evaluate("sessionStorage.clear()");
    await page.goto("about:blank");
    await lb.stop();
  }
}

const hello: Script = (visit) => visit.send(answer("hello"));
async function withServers(count: number, use: (servers: ScriptedServer[]) => Promise<void>) {
  const servers = await Promise.all(Array.from({ length: count }, () => scriptedServer(hello)));
  try {
    await use(servers);
  } finally {
    await Promise.all(servers.map((server) => server.close()));
  }
}
const send = async (lb: Program, count: number) => {
  for (let i = 0; i < count; i++) assert.equal(status((await rawRequest(lb.port, get("/"))).answers[0]!), 200);
};

const row = (page: Page, server: string) => page.locator("tr", { has: page.getByRole("rowheader", { name: server }) });
const cell = (page: Page, server: string, title: string) => row(page, server).locator(`[data-title="${title}"]`);
/** Waits until a server has this figure. */
const figure = (page: Page, server: string, title: string, text: RegExp) =>
  cell(page, server, title).locator("span").filter({ hasText: text }).waitFor();
/** Waits until something in the page has this text. */
const reads = (page: Page, selector: string, text: string | RegExp) =>
  page.locator(selector).filter({ hasText: text }).first().waitFor();
/** Waits until there are so many of something. */
async function counted(page: Page, selector: string, count: number) {
  const all = page.locator(selector);
  for (let i = 0; i < 400 && await all.count() !== count; i++) await sleep(25);
  assert.equal(await all.count(), count, selector);
}
const REFUSED = "127.0.0.1:1";

test(
  "it shows the routes, the services, their servers, and what is wrong, in words",
  { needs: ["chromium"] },
  () =>
    withServers(2, async ([one, two]) => {
      const config = {
        services: {
          shop: {
            servers: [{ url: one!.address, weight: 3 }, two!.address, { url: REFUSED, backup: true }],
            health: { interval: "1s", fall: 1 },
          },
        },
        routes: [
          { path: "/old", redirect: { to: "https://example.com/" } },
          { host: "a.test", methods: ["GET"], service: "shop" },
        ],
      };
      await looking(config, async ({ page }) => {
        await reads(page, "#verdict", "2 of 3 servers are up");
        await reads(page, "#troubles", `shop: ${REFUSED} is down: `);
        assert.match(await page.title(), /^▲ 2 of 3 servers are up/);
        assert.match(await row(page, REFUSED).innerText(), /backup[^]*✕ down[^]*for \d+ s/);
        assert.match(await cell(page, one!.address, "State").innerText(), /● up/);
        await figure(page, one!.address, "Last check", /passed/);
        assert.match(await cell(page, one!.address, "Weight").innerText(), /^3\s+75 %$/);
        assert.match(await page.locator("section h2").innerText(), /shop.*round-robin · 2 of 3 up/s);
        assert.deepEqual(
          (await page.locator("#routes tr").allInnerTexts()).map((text) => text.split(/\s*\t\s*/)),
          [["/old", "/old", "redirect 302"], ["a.test", "GET a.test", "shop"]],
        );
        assert.deepEqual(await page.locator("figcaption span").allInnerTexts(), [
          "Requests",
          "Requests that failed",
          "Latency: p50, p99",
        ]);
      });
    }),
);

test("a server that is ejected, and then tried out, or that wants to be left alone, is said to be so", {
  needs: ["chromium"],
}, () =>
  withServers(3, async (servers) => {
    const [ill, , calm] = servers, [one, , three] = servers.map(({ address }) => address) as [string, string, string];
    const eject = { failures: 1, for: "2s" };
    const config = {
      services: { shop: { servers: servers.map(({ address }) => address), health: "off", eject, retries: 2 } },
      default: { service: "shop" },
    };
    await looking(config, async ({ page, lb }) => {
      ill!.reset((visit) => visit.send(answer("no", "", "503 No")));
      await send(lb, 3);
      await figure(page, one, "State", /▲ ejected/);
      await reads(page, "#troubles", `shop: ${one} is ejected`);
      await figure(page, one, "State", /△ trial/);
      ill!.reset(hello);
      await send(lb, 3);
      await figure(page, one, "State", /● up/);
      calm!.reset((visit) => visit.send(answer("no", "Retry-After: 60\r\n", "429 No")));
      await Promise.all(Array.from({ length: 3 }, () => rawRequest(lb.port, get("/"))));
      await figure(page, three, "State", /○ paused/);
    });
  }));

test("what it shows changes by itself", { needs: ["chromium"] }, () =>
  withServers(2, async ([one, two]) => {
    await looking({ default: { servers: [one!.address, two!.address] } }, async ({ page, lb }) => {
      await reads(page, "#verdict", "● All servers are up: 2");
      await send(lb, 10);
      await figure(page, one!.address, "Requests", /^5$/);
      await figure(page, one!.address, "p50", /\d m?s/);
      await figure(page, two!.address, "Bytes out", /^25 B$/);
      one!.reset((visit) => visit.send(answer("no", "", "500 Sorry")));
      await rawRequest(lb.port, Array.from({ length: 4 }, () => get("/").replace("close", "keep-alive")).join(""));
      await figure(page, one!.address, "Errors", /^[1-9]/);
      await reads(page, "#troubles", "more than 5 % of the requests fail");
      assert.match(await page.locator("#charts path").first().getAttribute("d") ?? "", /^M\d/);
      await lb.reload({ services: { another: { servers: [two!.address] } }, default: { service: "another" } });
      await reads(page, "section h2", "another");
      assert.equal(await page.locator("section").count(), 1);
    });
  }));

test("a name is text, whatever is in it", { needs: ["chromium"] }, () =>
  withServers(1, async ([one]) => {
    const name = "<img src=x onerror=alert(1)>", closing = "</script><script>alert(2)</script>";
    const config = {
      services: { [name]: { servers: [one!.address, REFUSED], health: { interval: "1s", fall: 1 } } },
      routes: [{ name: closing, path: "/", service: name }],
    };
    await looking(config, async ({ page }) => {
      await reads(page, "section h2", name);
      await reads(page, "#routes tr", closing);
      await reads(page, "#troubles", name);
      assert.equal(await page.locator("img").count(), 0);
      assert.equal(await page.locator("script").count(), 1);
    });
  }));

test(
  "nothing but its own script and style may run in it, and it may ask nobody else",
  { needs: ["chromium"] },
  () =>
    looking({ default: { servers: [REFUSED] } }, async ({ page, lb, wrong }) => {
      const { headers } = await fetch(`http://127.0.0.1:${lb.admin}/`);
      const policy = headers.get("content-security-policy") ?? "";
      const nonce = /script-src 'nonce-([^']+)'/.exec(policy)?.[1] ?? "";
      assert.match(nonce, /^[\w+/=]{20,}$/);
      assert.equal(
        policy.replaceAll(nonce, "N"),
        "default-src 'none'; script-src 'nonce-N'; style-src 'nonce-N'; connect-src 'self'; img-src data:; " +
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
      );
      const again = (await fetch(`http://127.0.0.1:${lb.admin}/`)).headers.get("content-security-policy") ?? "";
      assert.ok(!again.includes(nonce), "each page has its own nonce");
      await assert.rejects(page.evaluate("document.body.innerHTML = '<img src=x onerror=alert(1)>'"), /TrustedHTML/);
      await assert.rejects(page.evaluate("document.body.setAttribute('onclick', 'alert(1)')"), /TrustedScript/);
      await assert.rejects(page.evaluate("fetch('http://127.0.0.1:1/')"), /Failed to fetch/);
      assert.ok(wrong.every((one) => /Content Security Policy|requires 'Trusted/.test(one)), wrong.join("\n"));
      wrong.length = 0;
    }),
);

/** Presses a button of a server's row, and says yes to what the dialog asks. */
async function press(page: Page, server: string, deed: string, confirm = deed) {
  await row(page, server).getByRole("button", { name: `${deed} ${server}` }).click();
  const dialog = page.getByRole("dialog");
  await dialog.getByRole("heading", { name: `${deed} ${server}` }).waitFor();
  await dialog.getByRole("button", { name: confirm, exact: true }).click();
}
const closed = (page: Page) => page.getByRole("dialog").waitFor({ state: "hidden" });

test("a drain that is confirmed there drains the server, and it gets no more requests until it is ready again", {
  needs: ["chromium"],
}, () =>
  withServers(2, async (servers) => {
    const [one, two] = servers.map(({ address }) => address) as [string, string];
    const counts = () => servers.map(({ requests }) => requests.length);
    await looking({ services: { shop: { servers: [one, two], health: "off" } }, default: { service: "shop" } }, async (
      { page, lb },
    ) => {
      await send(lb, 4);
      await press(page, one, "drain", "Cancel");
      await closed(page);
      await send(lb, 4);
      assert.deepEqual(counts(), [4, 4]);
      await press(page, one, "drain");
      await closed(page);
      await figure(page, one, "State", /◐ drained/);
      await reads(page, "#verdict", "1 of 2 servers are up, 1 set aside");
      await send(lb, 6);
      assert.deepEqual(counts(), [4, 10]);
      assert.match(readFileSync(lb.file, "utf8"), /drain/);
      await press(page, one, "ready");
      await figure(page, one, "State", /● up/);
      await send(lb, 4);
      assert.deepEqual(counts(), [6, 12]);
    });
  }));

test(
  "maint and weight are changed there, and what is refused says why",
  { needs: ["chromium"] },
  () =>
    withServers(2, async ([first, second]) => {
      const [one, two] = [first!.address, second!.address];
      await looking({ services: { "a/b c?": { servers: [one, two] } }, default: { service: "a/b c?" } }, async (
        { page, lb, wrong },
      ) => {
        await press(page, two, "maint");
        await figure(page, two, "State", /◇ maint/);
        await row(page, one).getByRole("button", { name: `drain ${one}` }).click();
        await reads(page, "#why", "No other server of a/b c? is up!");
        await page.keyboard.press("Escape");
        await closed(page);
        await row(page, one).getByRole("button", { name: `weight ${one}` }).click();
        await page.getByLabel("Weight", { exact: true }).fill("3");
        await page.keyboard.press("Enter");
        await figure(page, one, "Weight", /^3$/);
        await closed(page);
        await lb.reload({ services: { "a/b c?": { servers: [one] } }, default: { service: "a/b c?" } });
        await row(page, one).getByRole("button", { name: `weight ${one}` }).click();
        await page.getByLabel("Weight", { exact: true }).fill("0");
        await page.keyboard.press("Enter");
        await reads(page, "#problem", /weight above 0/);
        assert.ok(wrong.every((text) => /status of 4/.test(text)), wrong.join("\n"));
        wrong.length = 0;
      });
    }),
);

test(
  "it works by keyboard: what has the focus is seen, a dialog gives it back",
  { needs: ["chromium"] },
  () =>
    looking({ default: { servers: [REFUSED] } }, async ({ page }) => {
      await reads(page, "th", REFUSED);
      const focused = () =>
        page.evaluate<string>(
          "[document.activeElement.ariaLabel || document.activeElement.textContent, getComputedStyle(document.activeElement).outlineStyle].join()",
        );
      const seen: string[] = [];
      for (let i = 0; i < 9 && !seen.includes(`maint ${REFUSED},solid`); i++) {
        await page.keyboard.press("Tab");
        seen.push(await focused());
      }
      assert.ok(seen.includes(`maint ${REFUSED},solid`), seen.join(" "));
      assert.ok(seen.every((one) => one.endsWith(",solid")), seen.join(" "));
      await page.keyboard.press("Enter");
      await page.getByRole("dialog", { name: `maint ${REFUSED}` }).waitFor();
      await page.keyboard.press("Escape");
      await closed(page);
      assert.equal(await focused(), `maint ${REFUSED},solid`);
      await page.keyboard.press("Enter");
      await page.keyboard.press("Tab");
      await page.keyboard.press("Enter");
      await figure(page, REFUSED, "State", /◇ maint/);
    }),
);

test("with many workers it shows what they do together, and what is changed there holds for all", {
  needs: ["chromium"],
}, () =>
  withServers(2, async (servers) => {
    const [one, two] = servers.map(({ address }) => address) as [string, string];
    const config = { default: { servers: [one, two], health: "off", eject: { failures: 1 } } };
    await looking(config, async ({ page, lb }) => {
      await reads(page, "#verdict", "0 of 2 servers are up, 2 unchecked");
      await press(page, one, "drain");
      await figure(page, one, "State", /◐ drain/);
      await sleep(500); // until the workers have heard it
      await send(lb, 12);
      await figure(page, two, "Requests", /^12$/);
      assert.equal(servers[0]!.requests.length, 0);
      await press(page, one, "ready");
      servers[1]!.reset((visit) => visit.send(answer("no", "", "503 No")));
      await figure(page, one, "State", /○ unchecked/);
      await sleep(500);
      await Promise.all(Array.from({ length: 6 }, () => rawRequest(lb.port, get("/"))));
      await figure(page, two, "State", /▲ ejected/);
      assert.match(await cell(page, two, "State").innerText(), /for \d s/);
    }, { args: ["--workers", "2"] });
  }));

for (const dark of [false, true]) {
  test(
    `it fits a phone and a wide window, ${dark ? "dark" : "light"}`,
    { needs: ["chromium"] },
    () =>
      looking({ default: { servers: [REFUSED, "127.0.0.1:2"] } }, async ({ page }) => {
        for (const width of [390, 820, 1400, 2000]) {
          await page.setViewportSize({ width, height: 800 });
          await reads(page, "th", REFUSED);
          const wide = await page.evaluate<number>("document.documentElement.scrollWidth");
          assert.ok(wide <= width, `${wide} pixels in a window of ${width}`);
          const [above, below] = await Promise.all([REFUSED, "127.0.0.1:2"].map((one) => row(page, one).boundingBox()));
          const buttons = await row(page, REFUSED).getByRole("button").last().boundingBox();
          assert.ok(buttons!.y + buttons!.height <= above!.y + above!.height, "the buttons are inside their row");
          assert.ok(
            below!.y >= above!.y + above!.height || below!.x >= above!.x + above!.width,
            "no row covers another",
          );
        }
        const color = await page.evaluate<string>("getComputedStyle(document.body).backgroundColor");
        const [red = NaN] = /\d+/.exec(color)!.map(Number);
        assert.ok(dark ? red < 64 : red > 192, color);
      }, { dark }),
  );
}

/** What does not fit its cell. */
const CUT_OFF = `[...document.querySelectorAll("th, td, summary, p, li, button")]
  .filter((one) => one.checkVisibility() && one.scrollWidth > one.clientWidth + 1)
  .map((one) => one.textContent.trim() + " " + one.scrollWidth + " in " + one.clientWidth)`;

/** The least contrast of a text with what is behind it (WCAG 2.2, 1.4.3), and that text. */
const CONTRAST = `(() => {
  const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = rgb(color).map((c) => c <= 10.3 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (one) => one && rgb(getComputedStyle(one).backgroundColor)[3] === 0 ? behind(one.parentElement) : one;
  const texts = [...document.body.querySelectorAll("*")].filter((one) =>
    one.checkVisibility() && [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
  return texts.map((one) => {
    const [more, less] = [light(getComputedStyle(one).color), light(getComputedStyle(behind(one)).backgroundColor)]
      .sort((a, b) => b - a);
    return [(more + 0.05) / (less + 0.05), one.textContent];
  }).sort(([a], [b]) => a - b)[0];
})()`;

for (const dark of [false, true]) {
  test(
    `every text can be read, and nothing is wider than a phone, ${dark ? "dark" : "light"}`,
    { needs: ["chromium"] },
    () =>
      withServers(1, async ([one]) => {
        const long = "a-server-with-a-very-long-name.eu-central-1.compute.internal.example.com:8443";
        const shop = {
          servers: [one!.address, REFUSED, { url: long, state: "drain" }],
          health: { interval: "1s", fall: 1 },
        };
        const config = {
          services: { shop, spare: { servers: [{ url: one!.address, state: "maint" }, "127.0.0.1:2"], health: "off" } },
          routes: [{
            host: "a-very-long-host-name.of-a-department.example.com",
            path: `/${"x".repeat(90)}`,
            service: "spare",
          }],
          default: { service: "shop" },
        };
        await looking(config, async ({ page, lb }) => {
          await send(lb, 4);
          await figure(page, REFUSED, "State", /✕ down/);
          for (const width of [400, 1280, 1281, 1400]) {
            await page.setViewportSize({ width, height: 800 });
            const wide = await page.evaluate<number>("document.documentElement.scrollWidth");
            assert.ok(wide <= width, `${wide} pixels in a window of ${width}`);
            const cut = await page.evaluate<string[]>(CUT_OFF);
            assert.deepEqual(cut, [], `at ${width} pixels`);
          }
          const [least, text] = await page.evaluate<[number, string]>(CONTRAST);
          assert.ok(least >= 4.5, `${least}: ${text}`);
        }, { dark });
      }),
  );
}

test(
  "where there is no service yet it says how to begin",
  { needs: ["chromium"] },
  () =>
    looking({ name_routes: true }, async ({ page, lb }) => {
      await reads(page, "#verdict", "○ No servers yet");
      await reads(page, "#none", "There is no service yet");
      assert.equal(await page.locator("section").count(), 0);
      await lb.reload({ services: { shop: { servers: [REFUSED], health: "off" } }, name_routes: true });
      await reads(page, "th", REFUSED);
      await page.locator("#none").waitFor({ state: "hidden" });
    }),
);

test("a lost connection is said, and made again", { needs: ["chromium"] }, () =>
  withServers(1, async ([one]) => {
    const config = { default: { servers: [one!.address] } };
    await looking(config, async ({ page, lb, wrong }) => {
      await reads(page, "#verdict", "● All servers are up: 1");
      await lb.stop();
      await reads(page, "#verdict", "✕ The connection is lost");
      const next = await startProgram({ default: { servers: [one!.address, REFUSED] } }, [
        "--admin",
        `127.0.0.1:${lb.admin}`,
      ]);
      await reads(page, "th", REFUSED).finally(() => next.stop());
      assert.ok(wrong.every((text) => /ERR_|Failed to load/.test(text)), wrong.join("\n"));
      wrong.length = 0;
    }, { args: [] });
  }));

test(
  "where the listener wants a token, the page asks for it, and shows nothing without it",
  { needs: ["chromium"] },
  () => {
    const config = { admin: { token: TOKEN, read_token: READ_TOKEN }, default: { servers: [REFUSED] } };
    return looking(config, async ({ page, wrong }) => {
      const box = page.getByLabel("Token", { exact: true });
      await page.getByRole("heading", { name: "Sign in" }).waitFor();
      await page.getByRole("button", { name: "Sign in" }).waitFor();
      await box.fill("not-the-token");
      await box.press("Enter");
      await reads(page, "#why", "This token is not right");
      assert.equal(await page.getByText(REFUSED).count(), 0);
      await box.fill(READ_TOKEN);
      await box.press("Enter");
      await reads(page, "th", REFUSED);
      await page.reload();
      await reads(page, "th", REFUSED); // it is remembered as long as the tab is open
      assert.equal(await page.getByRole("dialog").count(), 0);
      assert.equal(await row(page, REFUSED).getByRole("button").count(), 0, "no buttons that would be refused");
      assert.equal(await page.getByRole("columnheader", { name: "Change" }).count(), 0);
      await reads(page, "small", "read token: nothing can be changed here");
      assert.equal(await page.getByRole("link", { name: /Metrics|Config/ }).count(), 0, "links, which send no token");
      assert.ok(wrong.every((text) => /status of 401/.test(text)), wrong.join("\n"));
      wrong.length = 0;
      await page.evaluate(`sessionStorage.token = ${JSON.stringify(TOKEN)}`);
      await press(page, REFUSED, "drain");
      await figure(page, REFUSED, "State", /◐ drained/);
    });
  },
);

test("a thousand servers are shown, and found", { needs: ["chromium"] }, () => {
  const servers = Array.from({ length: 1000 }, (_, i) => `10.0.${i >> 8}.${i & 255}:80`);
  return looking({ default: { servers, health: "off" } }, async ({ page }) => {
    await reads(page, "#verdict", "0 of 1,000 servers are up, 1,000 unchecked");
    assert.equal(await page.locator("section tbody tr").count(), 1000);
    await reads(page, "section p", "The figures of the first 100 are shown");
    assert.equal(await row(page, "10.0.3.231:80").getByRole("button").count(), 0);
    await page.getByRole("searchbox").fill("10.0.3.231");
    await counted(page, "section tbody tr", 1);
    assert.match(await cell(page, "10.0.3.231:80", "State").innerText(), /○ unchecked/);
    await row(page, "10.0.3.231:80").getByRole("button", { name: "drain" }).waitFor();
    await page.getByRole("searchbox").fill("no such server");
    await reads(page, "#none", 'No server matches "no such server".');
    assert.equal(await page.locator("section").count(), 0);
  });
});

test("a server that fails its requests is not up, and neither is one that nobody has asked yet", {
  needs: ["chromium"],
}, () =>
  withServers(3, async (servers) => {
    const [ill, well, idle] = servers.map(({ address }) => address) as [string, string, string];
    servers[0]!.reset((visit) => visit.send(answer("no", "", "500 No")));
    const services = {
      shop: { servers: [ill, well], health: "off", eject: "off", retries: 0 },
      spare: { servers: [idle], health: "off" },
    };
    await looking({ services, default: { service: "shop" } }, async ({ page, lb }) => {
      await reads(page, "#verdict", "○ 0 of 3 servers are up, 3 unchecked");
      for (let i = 0; i < 6; i++) await rawRequest(lb.port, get("/"));
      await figure(page, ill, "State", /▲ failing/);
      await figure(page, well, "State", /● up/);
      await figure(page, idle, "State", /○ unchecked/);
      await reads(page, "#verdict", "✕ 1 of 3 servers are up, 1 unchecked");
      await reads(page, "#troubles", `shop: ${ill} is failing`);
    });
  }));

test(
  "many services are folded but for those with problems, can be opened, and be left out",
  { needs: ["chromium"] },
  () =>
    withServers(1, async ([one]) => {
      const shop = { servers: [one!.address], health: { interval: "1s", fall: 1 } };
      const services = Object.fromEntries(Array.from({ length: 12 }, (_, i) => [`shop-${i}`, shop]));
      const broken = { ...shop, servers: [one!.address, REFUSED] };
      const config = { services: { ...services, broken }, default: { service: "shop-0" } };
      await looking(config, async ({ page, lb }) => {
        await reads(page, "#verdict", "▲ 13 of 14 servers are up");
        assert.equal(await page.locator("section").count(), 13);
        assert.equal(await page.locator("section tbody tr").count(), 2, "of the service with a problem");
        const third = page.locator("section", { hasText: "shop-3" });
        await third.locator("summary").click();
        await third.locator("tbody tr").waitFor();
        await page.locator("section", { hasText: "broken" }).locator("summary").click();
        await counted(page, "section tbody tr", 1);
        await page.locator("section", { hasText: "broken" }).locator("summary").press("Enter");
        await page.getByLabel("Problems only").check();
        await counted(page, "section", 1);
        assert.equal(await page.locator("section tbody tr").count(), 1);
        await row(page, REFUSED).waitFor();
        await lb.reload({ services, default: { service: "shop-0" } });
        await reads(page, "#none", "No problem.");
        await page.getByLabel("Problems only").uncheck();
        await page.getByRole("searchbox").fill("shop-11");
        await counted(page, "section tbody tr", 1);
        await page.keyboard.press("End"); // the page goes on changing, and what is typed and has the focus stays
        await sleep(1_500);
        assert.equal(await page.evaluate("document.activeElement.id + document.activeElement.value"), "findshop-11");
      });
    }),
);

test("it says which route a request would take", { needs: ["chromium"] }, () =>
  looking(
    {
      services: { shop: { servers: [REFUSED], health: "off" } },
      routes: [{ path: "/cart", methods: ["GET"], service: "shop" }],
    },
    async ({ page }) => {
      const ask = async (request: string, ...said: string[]) => {
        await page.getByLabel("Request", { exact: true }).fill(request);
        await page.getByRole("button", { name: "Explain" }).click();
        for (const text of said) await reads(page, "#answer", text);
      };
      await ask("/cart/1", "route    /cart", "service  shop: round-robin", "takes    127.0.0.1:1");
      await ask("GET http://a.test/", "no route: 404");
      await ask("POST http://a.test/cart", "no route: 405", "allowed: GET");
      await ask("cart", '"cart" is not a request such as GET http://host/path');
      await ask("TRACE /", '"TRACE" is not a method that can be forwarded');
      await ask("");
      await page.locator("#answer").waitFor({ state: "hidden" });
    },
  ));

test("it says since when it runs, where it listens, until when certificates are good, and what links there are", {
  needs: ["chromium"],
}, () => {
  const tls = [{ cert: "a.pem", key: "a.key" }, { cert: "old.pem", key: "a.key" }];
  const config = { listen: [{ address: "127.0.0.1:0", tls }], default: { servers: [REFUSED] } };
  const files = { "a.pem": A, "a.key": KEY, "old.pem": EXPIRED };
  return looking(config, async ({ page, lb, wrong }) => {
    await reads(page, "small", /^up \d+ s$/);
    await reads(page, "small", "workers: 2");
    await reads(page, "small", "no reload yet");
    await reads(
      page,
      "small",
      "https://127.0.0.1:0 (certificate a.test, localhost until 2120-01-01; a.test until 2021-01-01)",
    );
    await reads(page, "#troubles", "the certificate for a.test has ended on 2021-01-01");
    await lb.reload({ ...config, default: { servers: ["127.0.0.1:2"] } });
    await reads(page, "small", /^last reload \d+ s ago$/);
    for (const [name, text] of [["Metrics", "lb_"], ["Config", '"default":'], ["API", "GET /services"]] as const) {
      await page.getByRole("link", { name }).click();
      await reads(page, "body", text);
      await page.goBack();
    }
    await page.getByRole("link", { name: "API" }).click();
    await page.getByRole("link", { name: "Dashboard" }).click();
    await reads(page, "th", "127.0.0.1:2");
    assert.ok(wrong.every((text) => /status of 404/.test(text)), wrong.join("\n")); // the icon that texts have not
    wrong.length = 0;
  }, { args: ["--workers", "2"], files });
});

// ─── What the API says of itself ───

for (const dark of [false, true]) {
  test(
    `/docs shows every operation and what it takes, ${dark ? "dark" : "light"}`,
    { needs: ["chromium"] },
    () =>
      looking({ admin: { token: TOKEN }, default: { servers: [REFUSED] } }, async ({ page, lb }) => {
        const { paths } = await (await fetch(`http://127.0.0.1:${lb.admin}/openapi.json`)).json();
        const told = Object.entries(paths as Record<string, Record<string, { summary: string }>>).flatMap((
          [at, methods],
        ) => Object.entries(methods).map(([method, { summary }]) => `${method.toUpperCase()} ${at} ${summary}`));
        assert.ok(told.length > 20, `${told.length}`);
        const shown = page.locator("summary").filter({ visible: true });
        assert.deepEqual((await shown.allInnerTexts()).map((text) => text.replaceAll(/\s+/g, " ").trim()), told);
        const change = page.locator("details", {
          has: page.getByText("PUT /services/{service}/servers/{server}/state"),
        });
        assert.equal(await change.getByRole("cell", { name: "state" }).first().isVisible(), false);
        await change.locator("summary").press("Enter");
        await change.getByRole("cell", { name: "wait" }).first().waitFor();
        for (const width of [390, 1400]) {
          await page.setViewportSize({ width, height: 800 });
          const wide = await page.evaluate<number>("document.documentElement.scrollWidth");
          assert.ok(wide <= width, `${wide} pixels in a window of ${width}`);
        }
        const color = await page.evaluate<string>("getComputedStyle(document.body).color");
        const [red = NaN] = /\d+/.exec(color)!.map(Number);
        assert.ok(dark ? red > 192 : red < 64, color);
        const link = page.getByRole("link", { name: "openapi.json" });
        assert.equal(
          await link.evaluate<string, { href: string }>(({ href }) => href),
          `http://127.0.0.1:${lb.admin}/openapi.json`,
        );
        const refused = await page.getByRole("link", { name: /Metrics|Config/ }).count();
        assert.equal(refused, 0, "links, which send no token, lead nowhere where there is one");
      }, { dark, path: "/docs" }),
  );
}
