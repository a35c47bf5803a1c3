// The whole path in headless Chromium, from a file to an export, under the pages' own policy. Prints one line of JSON: what was asked of
// other machines, console errors, accessibility faults (axe-core) of each page, and what the path came to.
// usage: node browser.mjs CHROMIUM NODE_MODULES ADDRESS ROWS MODEL OUT_FOLDER
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import path from "node:path";

const [chromium, modules, address, rows, model, out] = process.argv.slice(2);
const require = createRequire(path.join(modules, "anchor.js"));
const puppeteer = require("puppeteer-core");
const axe = readFileSync(path.join(modules, "axe-core", "axe.min.js"), "utf8");
const own = new URL(address).origin;

const browser = await puppeteer.launch({ executablePath: chromium, args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"] });
const found = { foreign: [], errors: [], violations: [], overflow: [], visited: [], times: {} };
const watch = (page) => {
  page.on("console", (m) => ["error", "warn"].includes(m.type()) && found.errors.push(`${page.url()}: ${m.text()}`));
  page.on("pageerror", (e) => found.errors.push(`${page.url()}: ${e}`));
  page.on("request", (r) => r.url().startsWith(own + "/") || r.url().startsWith("data:") || found.foreign.push(r.url().slice(0, 200)));
};
const page = await browser.newPage();
page.setDefaultTimeout(240000);
watch(page);
await page.setViewport({ width: 1280, height: 900 });
const began = Date.now();
const done = (name) => (found.times[name] = Math.round((Date.now() - began) / 100) / 10);

// A page as it is now: axe wants a page without policy, so it gets its HTML in a tab of its own where it can be had by an address.
const look = async (name, url) => {
  for (const [scheme, width] of [["light", 1280], ["dark", 390]]) {
    const other = await browser.newPage();
    watch(other);
    await other.setBypassCSP(true);
    await other.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
    await other.setViewport({ width, height: 850 });
    await other.goto(url, { waitUntil: "load" });
    await other.evaluate(axe);
    const tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"];
    const result = await other.evaluate((runOnly) => axe.run(document, { runOnly }), tags);
    for (const v of result.violations)
      found.violations.push(`${name} ${scheme} ${v.id}: ${v.nodes.map((n) => n.target.join(" ") + " " + (n.failureSummary || "")).slice(0, 2).join(" | ").slice(0, 400)}`);
    const wider = await other.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
    if (wider > 0) found.overflow.push(`${name} ${width}: ${wider}`);
    if (result.passes.length < 15) found.errors.push(`${name}: axe looked at little`);
    await other.screenshot({ path: path.join(out, `${name}-${scheme}.png`), fullPage: true });
    await other.close();
  }
  found.visited.push(name);
};
const fill = (name, value) => page.$eval(`[name="${name}"]`, (e, text) => (e.value = text), value);
const press = async (text, form = "form") => {
  const [handle] = (await Promise.all((await page.$$(`${form} button`)).map(async (b) => ((await b.evaluate((e) => e.textContent)).includes(text) ? b : null)))).filter(Boolean);
  if (!handle) throw new Error(`no button '${text}' at ${page.url()}`);
  await handle.focus();
  await Promise.all([page.waitForNavigation({ waitUntil: "load" }), page.keyboard.press("Enter")]);
  const refused = await page.$eval(".refused pre", (e) => e.textContent).catch(() => "");
  if (refused) throw new Error(`${page.url()}: ${refused}`);
};

await page.goto(address, { waitUntil: "load" });
found.address = page.url().replace(own, "");
found.cookie = await page.evaluate(() => document.cookie);
await page.keyboard.press("Tab");
found.first = await page.evaluate(() => document.activeElement.className);

// Data: a file of this computer, then a recipe of it
const upload = await page.$("[data-upload]");
await Promise.all([page.waitForNavigation({ waitUntil: "load" }), upload.uploadFile(rows)]);
await fill("id", "acme/tickets");
await fill("licence", "own");
await fill("base", model);
await press("make a recipe");
done("recipe made");
const recipe = "acme/tickets.yaml";
await press("token by token");
found.learnt = await page.$$eval(".tokens ins", (all) => all.map((e) => e.textContent).join(" "));
done("prepared");
await look("data", `${own}/data?recipe=${recipe}`);

// Recipe: the form writes the YAML
await page.goto(`${own}/recipe?recipe=${recipe}`, { waitUntil: "load" });
for (const [key, value] of Object.entries({ "train.max_steps": "4", "train.batch_rows": "8", "data.sequence_length": "128", "eval.max_new_tokens": "4", "eval.generate_rows": "2", "model.licence": "Apache-2.0" })) await fill(key, value);
await press("Write these");
found.yaml = await page.$eval("#f-yaml", (e) => e.value);
await look("recipe", page.url());

// Where and Plan
await page.goto(`${own}/where?recipe=${recipe}&tokens=1e6`, { waitUntil: "load" });
found.members = await page.$$eval("[data-member]", (all) => all.length);
await look("where", `${own}/where?recipe=health/phenotype-terms&tokens=1e6`);
await page.goto(`${own}/plan?recipe=health/phenotype-terms&site=lumi-g&gpus_per_node=1&tokens=1e6`, { waitUntil: "load" });
found.parts = await page.$$eval(".drawn rect", (all) => all.length);
await look("plan", page.url());
done("planned");

// Run: live, to its end
await page.goto(`${own}/run?recipe=${recipe}`, { waitUntil: "load" });
await fill("name", "first");
await press("Train", "form[action='/run/start']");
await page.waitForFunction(() => document.querySelector("[data-over]"));
found.state = await page.$eval("[data-state]", (e) => e.textContent);
found.charts = await page.$$eval("[data-charts] svg[role=img]", (all) => all.length);
found.outputs = await page.$$eval("[data-charts] output", (all) => all.map((o) => o.textContent));
found.updateMs = await page.$eval("[data-update-ms]", (e) => Number(e.dataset.updateMs));
done("trained");
await look("run", page.url());

// Results
await page.goto(`${own}/results?run=first`, { waitUntil: "load" });
found.verdict = await page.$eval(".verdict", (e) => e.textContent);
await press("Export");
found.exported = await page.$$eval("section[aria-labelledby=h-export] li code", (all) => all.map((e) => e.textContent));
done("exported");
await look("results", `${own}/results?run=first`);
for (const other of [`${own}/report?run=first`, `${own}/compare?run=first`]) {
  await page.goto(other, { waitUntil: "load" });
  found.visited.push(new URL(other).pathname);
  found.outputs.push(...(await page.$$eval("output", (all) => all.map((o) => o.textContent))));
}
await browser.close();
console.log(JSON.stringify(found));
