/** The page in a real browser, on a real bundle, held against the Python reference. */

import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Page } from "playwright-core";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { BUNDLE, INT8_BUNDLE, PYTHON, WHY_NOT, ask, browse, pixels, problem, savePng, serve, until, type Browser, type Wish } from "./world.js";

const WORDS = "a small yellow star on a blue background";
const RUN = { prompt: WORDS, seed: 7, steps: 6 };
const scratch = mkdtempSync(join(tmpdir(), "edgesd-e2e-"));
if (WHY_NOT !== "") console.warn(`end-to-end tests skipped: ${WHY_NOT}`);

function reference(...pictures: object[]): number[][] {
  const given = JSON.stringify({ bundle: BUNDLE, pictures });
  const out = execFileSync(PYTHON, [join(import.meta.dirname, "reference.py")], { input: given, maxBuffer: 1 << 26, stdio: ["pipe", "pipe", "ignore"] });
  return JSON.parse(out.toString()) as number[][];
}

function meanDifference(a: readonly number[], b: readonly number[]): number {
  expect(a.length).toBe(b.length);
  return a.reduce((sum, x, i) => sum + Math.abs(x - (b[i] as number)), 0) / a.length;
}

async function drawn(page: Page, wish: Wish, timeout?: number): Promise<number[]> {
  await ask(page, wish);
  await page.click("#draw");
  await until(page, /^Done/, timeout);
  return pixels(page);
}

describe.skipIf(WHY_NOT !== "")("the page", () => {
  let site: Awaited<ReturnType<typeof serve>>;
  let browser: Browser;
  let page: Page;

  beforeAll(async () => {
    site = await serve();
    browser = await browse({ viewport: { width: 1180, height: 1000 } });
    page = await browser.page();
    await page.goto(site.url);
    await until(page, /^Ready/);
  });
  afterAll(async () => {
    await browser?.close();
    site?.stop();
  });

  it("is cross-origin isolated and runs on threads", async () => {
    expect(await page.evaluate(() => crossOriginIsolated)).toBe(true);
    expect(await page.textContent("#facts")).toMatch(/^WASM, \d+ threads?fp32/);
  });

  it("draws the reference's picture on WASM, and its PNG repeats in Python", async () => {
    const wanted = reference({ prompt: WORDS, seed: 7, num_inference_steps: 6 })[0] as number[];
    const got = await drawn(page, RUN);
    expect(meanDifference(got, wanted)).toBeLessThan(2);
    const saved = join(scratch, "web.png");
    await savePng(page, saved);
    const again = join(scratch, "again.png");
    execFileSync(PYTHON, ["-m", "edgesd.cli", "generate", "--from", saved, "-m", BUNDLE, "-o", again], { stdio: "ignore" });
    const code = "import sys;from PIL import Image;print(list(Image.open(sys.argv[1]).tobytes()))";
    const repeated = JSON.parse(execFileSync(PYTHON, ["-c", code, again]).toString()) as number[];
    expect(meanDifference(got, repeated)).toBeLessThan(2);
  });

  it("draws with a stochastic sampler, a negative prompt and weights as the reference", async () => {
    const wanted = reference({ prompt: "a (green:1.2) ring on a white background", negative_prompt: "red", seed: 11, sampler: "euler_a", num_inference_steps: 5, guidance_scale: 3 });
    await page.fill("#negative", "red");
    const got = await drawn(page, { prompt: "a (green:1.2) ring on a white background", seed: 11, sampler: "euler_a", steps: 5, guidance: 3 });
    await page.fill("#negative", "");
    await ask(page, { sampler: "dpmpp_2m_karras", guidance: 4 });
    expect(meanDifference(got, wanted[0] as number[])).toBeLessThan(2);
  });

  it("cancels, and draws again afterwards", async () => {
    await ask(page, { ...RUN, steps: 40 });
    await page.click("#draw");
    await until(page, /^Step ([2-9]|[1-3]\d) /);
    await page.keyboard.press("Escape");
    await until(page, /^Cancelled/, 5000);
    expect(await page.isEnabled("#draw")).toBe(true);
  });

  it("goes on after a pause, and after closing the page, to the same pixels", async () => {
    const long = { ...RUN, steps: 20 }; // long enough for a slow machine to press pause in time
    const whole = await drawn(page, long);
    await ask(page, long);
    await page.click("#draw");
    await until(page, /^Step ([2-9]|1\d) /);
    await page.click("#pause");
    await until(page, /^Paused. It stays/);
    await page.reload();
    await page.waitForSelector("#resume-saved", { timeout: 60_000 });
    await page.click("#resume-saved");
    await until(page, /^Done/);
    expect(await pixels(page)).toEqual(whole);
    await ask(page, long);
    await page.click("#draw");
    await until(page, /^Step ([2-9]|1\d) /);
    await page.click("#pause");
    await until(page, /^Paused/);
    await page.click("#pause");
    await until(page, /^Done/);
    expect(await pixels(page)).toEqual(whole);
  });

  it("redraws a dropped picture where the brush was, as the reference does", async () => {
    const source = join(scratch, "web.png");
    await page.setInputFiles("#file", source);
    await page.waitForSelector("#editor:not([hidden])");
    await page.$eval("#size", (element) => ((element as HTMLInputElement).value = "64"));
    const box = (await (await page.waitForSelector("#brush")).boundingBox()) as { x: number; y: number; width: number; height: number };
    await page.mouse.move(box.x + box.width * 0.2, box.y + box.height * 0.5);
    await page.mouse.down();
    await page.mouse.move(box.x + box.width * 0.45, box.y + box.height * 0.5, { steps: 8 });
    await page.mouse.up();
    const mask = join(scratch, "mask.png");
    const lit = await page.$eval("#brush", (canvas) => {
      const { width, height } = canvas as HTMLCanvasElement;
      const data = (canvas as HTMLCanvasElement).getContext("2d")?.getImageData(0, 0, width, height).data as Uint8ClampedArray;
      return { width, height, alpha: Array.from(data).filter((_, i) => i % 4 === 3).map((a) => (a >= 128 ? 255 : 0)) };
    });
    const code = "import sys,json;from PIL import Image;d=json.load(sys.stdin);Image.frombytes('L',(d['width'],d['height']),bytes(d['alpha'])).save(sys.argv[1])";
    execFileSync(PYTHON, ["-c", code, mask], { input: JSON.stringify(lit) });
    const got = await drawn(page, { prompt: "a red square on a blue background", seed: 5, steps: 8 });
    await page.click("#unstart");
    const wanted = reference({ prompt: "a red square on a blue background", seed: 5, num_inference_steps: 8, strength: 0.6, image: source, mask });
    expect(meanDifference(got, wanted[0] as number[])).toBeLessThan(2);
  });

  it("takes a picture's own settings back", async () => {
    await ask(page, { prompt: "something else", seed: 1, steps: 20 });
    await page.setInputFiles("#file", join(scratch, "web.png"));
    await page.click("#reuse");
    expect([await page.inputValue("#prompt"), await page.inputValue("#seed"), await page.textContent("#steps-shown")]).toEqual([WORDS, "7", "6"]);
  });

  it("obeys a policy and says why", async () => {
    await page.selectOption("#policy", "balanced");
    if (await page.isVisible("#measured")) await page.uncheck("#measured");
    await page.selectOption("#thermal", "serious");
    await page.waitForFunction(() => /throttling/.test(document.querySelector("#decision")?.textContent ?? ""));
    await drawn(page, { prompt: WORDS, seed: 7, steps: 20 });
    expect(await page.textContent("#decision")).toMatch(/balanced: The device is throttling from heat. So 15 steps/);
    expect(await page.textContent("#figures")).toContain("15 steps");
    await page.selectOption("#policy", "");
  });

  it("passes its self-test", async () => {
    await page.click("summary");
    await page.click("#selftest");
    await until(page, /^Self-test passed/);
    expect(await page.$$eval("#checks tbody tr", (rows) => rows.length)).toBe(9);
  });

  it("works without a server after the first visit", async () => {
    await page.waitForFunction(async () => (await navigator.serviceWorker.ready).active?.state === "activated");
    site.stop();
    await page.reload();
    await until(page, /^Ready/);
    expect(await page.textContent("#facts")).toContain("offline");
    expect(meanDifference(await drawn(page, RUN), reference({ prompt: WORDS, seed: 7, num_inference_steps: 6 })[0] as number[])).toBeLessThan(2);
  });

  it("has a name for every field", async () => {
    const nameless = await page.$$eval("input, select, textarea, button, canvas, progress", (all) =>
      all.filter((e) => !(e.getAttribute("aria-label") || e.getAttribute("aria-hidden") || e.textContent?.trim() && e.tagName === "BUTTON" || (e as HTMLInputElement).labels?.length)).map((e) => e.id),
    );
    expect(nameless).toEqual([]);
    await page.setViewportSize({ width: 360, height: 740 });
    expect(await page.evaluate(() => document.documentElement.scrollWidth)).toBeLessThanOrEqual(360);
  });
});

describe.skipIf(WHY_NOT !== "")("a bundle that is not right", () => {
  it("is refused when a file was spoiled, and that file alone is fetched again", async () => {
    const site = await serve();
    const browser = await browse();
    const page = await browser.page();
    let spoil = true;
    const asked: string[] = [];
    await browser.context.route(/\/bundle\//, async (route) => {
      const path = new URL(route.request().url()).pathname;
      asked.push(path);
      if (!spoil || !path.endsWith("vae_decoder.data")) return route.continue();
      const data = readFileSync(join(BUNDLE, path.replace("/bundle/", "")));
      data[100] = (data[100] as number) ^ 1;
      return route.fulfill({ body: data, headers: { "Content-Type": "application/octet-stream", "Cross-Origin-Resource-Policy": "same-origin" } });
    });
    await page.goto(site.url);
    expect(await problem(page)).toMatch(/vae_decoder.data does not have the sha256 of its manifest.*Try again/);
    [spoil, asked.length] = [false, 0];
    await page.click("#again");
    await until(page, /^Ready/);
    expect(asked.filter((path) => path.includes("unet"))).toEqual([]);
    expect(asked.filter((path) => path.endsWith("vae_decoder.data")).length).toBe(1);
    await browser.close();
    site.stop();
  });

  it("is refused when its manifest is hostile or too new", async () => {
    const site = await serve();
    const browser = await browse();
    const whole = readFileSync(join(BUNDLE, "manifest.json"), "utf8");
    for (const [text, words] of [
      [whole.replace(/"format": "1\.\d+"/, '"format": "2.0"'), /Bundle format "2.0".*Update this page/],
      [whole.replace(/"critical": \[\]/, '"critical": ["teleport"]'), /features this page lacks: teleport/],
      [whole.replace(/"path": "unet[^"]*"/, '"path": "../../secret"'), /stay inside the bundle/],
      ["<!doctype html>", /does not parse/],
    ] as const) {
      const page = await browser.page();
      await page.route(/manifest\.json/, (route) => route.fulfill({ body: text, contentType: "application/json", headers: { "Cross-Origin-Resource-Policy": "same-origin" } }));
      await page.goto(site.url);
      expect(await problem(page)).toMatch(words);
      expect(await page.isDisabled("#draw")).toBe(true);
      await page.close();
    }
    await browser.close();
    site.stop();
  });

  it("says so when the quota is too small, and when there is no isolation", async () => {
    const site = await serve();
    const browser = await browse();
    const page = await browser.page();
    await browser.context.route(/assets\/worker/, async (route) => {
      const response = await route.fetch();
      const body = `navigator.storage.estimate = async () => ({ quota: 1e6, usage: 5e5 });\n${await response.text()}`;
      await route.fulfill({ response, body });
    });
    await page.goto(site.url);
    expect(await problem(page)).toMatch(/55\.\d MB to store, and this browser gives the page 0.5 MB more.*Free some disk space/s);
    await browser.close();
    // The page's service worker would add the headers.
    const bare = await browse({ serviceWorkers: "block" });
    await bare.context.route(/\/$/, async (route) => {
      const response = await route.fetch();
      const { "cross-origin-opener-policy": _, ...headers } = response.headers();
      await route.fulfill({ response, headers });
    });
    const other = await bare.page();
    await other.goto(site.url);
    await until(other, /^Ready/);
    expect(await other.textContent("#notes")).toMatch(/One thread only.*Cross-Origin-Opener-Policy/);
    await bare.close();
    site.stop();
  });
});

describe.skipIf(WHY_NOT !== "")("int8", () => {
  it("has the quality that its bundle promises, and draws what the float model draws", async () => {
    const site = await serve(INT8_BUNDLE);
    const browser = await browse();
    const page = await browser.page();
    await page.goto(site.url);
    await until(page, /^Ready/);
    await page.click("summary");
    expect(await page.textContent("#facts")).toContain("int8");
    await page.click("#selftest");
    await until(page, /^Self-test passed/);
    // At 20 steps, since 6 leave half a picture, whose other half is rounding: 3 to 30 levels there, 1.2 to 3.3 here.
    const wanted = reference({ prompt: WORDS, seed: 7, num_inference_steps: 20 })[0] as number[];
    expect(meanDifference(await drawn(page, { ...RUN, steps: 20 }), wanted)).toBeLessThan(6);
    await browser.close();
    site.stop();
  });
});

describe.skipIf(WHY_NOT !== "")("WebGPU by a software adapter", () => {
  it("draws the reference's picture from an fp32 variant", async () => {
    const site = await serve();
    const browser = await browse({ gpu: true });
    const page = await browser.page();
    await page.goto(site.url);
    await until(page, /^Ready/);
    await page.click("summary");
    await page.selectOption("#form", "webgpu");
    await until(page, /^Opening/, 5000).catch(() => "");
    await until(page, /^Ready/);
    expect(await page.textContent("#facts")).toMatch(/^WebGPUfp32/);
    const short = { prompt: WORDS, seed: 7, num_inference_steps: 2, guidance_scale: 1 };
    expect(meanDifference(await drawn(page, { ...RUN, steps: 2, guidance: 1 }, 160_000), reference(short)[0] as number[])).toBeLessThan(2);
    await browser.close();
    site.stop();
  }, 200_000);
});

afterAll(() => rmSync(scratch, { recursive: true, force: true }));
