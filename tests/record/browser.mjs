// Opens pages in headless Chromium and says what a tool can see: console errors, requests, accessibility faults (axe-core), whether
// the page is wider than the window. Prints one line of JSON. usage: node browser.mjs CHROMIUM NODE_MODULES OUT_FOLDER URL...
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import path from "node:path";

const [chromium, modules, out, ...urls] = process.argv.slice(2);
const require = createRequire(path.join(modules, "anchor.js"));
const puppeteer = require("puppeteer-core");
const axe = readFileSync(path.join(modules, "axe-core", "axe.min.js"), "utf8");
const sizes = { desktop: [1280, 900, 1], phone: [390, 844, 2] };

const browser = await puppeteer.launch({ executablePath: chromium, args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"] });
const found = [];
for (const url of urls) {
  for (const scheme of ["light", "dark"]) {
    for (const [name, [width, height, scale]] of Object.entries(sizes)) {
      const page = await browser.newPage();
      const errors = [];
      const requests = [];
      page.on("console", (m) => ["error", "warn"].includes(m.type()) && errors.push(m.text()));
      page.on("pageerror", (e) => errors.push(String(e)));
      page.on("request", (r) => requests.push(r.url().slice(0, 200)));
      await page.setBypassCSP(true); // so that axe itself may be put in; a second visit below runs under the page's own policy
      await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
      await page.setViewport({ width, height, deviceScaleFactor: scale });
      await page.goto(url, { waitUntil: "load" });
      await page.evaluate(axe);
      const result = await page.evaluate(() => axe.run(document, { runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"] }));
      const overflow = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
      const small = await page.evaluate(() => [...document.querySelectorAll("main p, td, li")].filter((e) => parseFloat(getComputedStyle(e).fontSize) < 12).length);
      const outputs = await page.evaluate(() => [...document.querySelectorAll("output")].map((o) => o.textContent));
      if (scheme === "light" || name === "desktop") await page.screenshot({ path: path.join(out, `${found.length}-${scheme}-${name}.png`), fullPage: true });
      await page.close();
      const strict = await browser.newPage();
      strict.on("console", (m) => ["error", "warn"].includes(m.type()) && errors.push("under its policy: " + m.text()));
      strict.on("request", (r) => requests.push(r.url().slice(0, 200)));
      await strict.goto(url, { waitUntil: "load" });
      await strict.close();
      found.push({
        url, scheme, size: name, errors, overflow, small, outputs: outputs.length, filled: outputs.filter(Boolean).length,
        requests: [...new Set(requests)].filter((r) => r !== url && !r.startsWith("data:")),
        passes: result.passes.length,
        violations: result.violations.map((v) => ({ id: v.id, impact: v.impact, help: v.help, nodes: v.nodes.map((n) => n.target.join(" ") + ": " + (n.failureSummary || "").slice(0, 200)).slice(0, 5) })),
      });
    }
  }
}
await browser.close();
console.log(JSON.stringify(found));
