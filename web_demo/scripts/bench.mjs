// Runs jobs (JSON on stdin: {page, jobs}) one after another in headless Chromium; results as JSON on stdout.
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { chromium } from "playwright-core";

const { page: address, jobs } = JSON.parse(await new Response(process.stdin).text());
const executablePath = [process.env.CHROMIUM, "/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"].find((path) => path && existsSync(path));
if (executablePath === undefined) throw new Error("no Chromium: apt-get install chromium, or set CHROMIUM");
const profile = mkdtempSync(join(tmpdir(), "edgesd-bench-"));
const args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"];
const context = await chromium.launchPersistentContext(profile, { executablePath, headless: true, args });
const results = [];
for (const job of jobs) {
  const page = await context.newPage();
  await page.goto(`${address}bench.html`);
  await page.waitForFunction(() => "bench" in globalThis);
  results.push(await page.evaluate((wanted) => globalThis.bench(wanted), job));
  await page.close();
}
const version = context.browser()?.version() ?? "";
await context.close();
rmSync(profile, { recursive: true, force: true });
console.log(JSON.stringify({ browser: `Chromium ${version}`, results }));
