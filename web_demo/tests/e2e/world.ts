/** A server of edgesd's own, a bundle and a headless Chromium: what every end-to-end test starts from. */

import { spawn, type ChildProcess } from "node:child_process";
import { existsSync, mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { chromium, type BrowserContext, type Page } from "playwright-core";

const ROOT = resolve(import.meta.dirname, "../../..");
export const PYTHON = process.env.EDGESD_PYTHON ?? "python3";
/** Bundles made by `make test-web`: the embedded model in fp32 and fp16, and as `package` makes it by default. */
export const BUNDLE = process.env.EDGESD_WEB_BUNDLE ?? join(ROOT, "out", "quality", "shapes-onnx-web.edgesd");
export const INT8_BUNDLE = join(ROOT, "out", "shapes-onnx-web.edgesd");
const CANDIDATES = [process.env.CHROMIUM, "/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];
export const CHROMIUM = CANDIDATES.find((path) => path !== undefined && existsSync(path));
export const WHY_NOT = CHROMIUM === undefined ? "no Chromium (apt-get install chromium, or set CHROMIUM)" : [BUNDLE, INT8_BUNDLE].filter((path) => !existsSync(path)).map((path) => `no bundle at ${path}`).join(", ");
const QUIET = [
  "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
  "--js-flags=--expose-gc",
];
const SOFTWARE_GPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"];

/** `edgesd serve` on a free port. */
export async function serve(bundle = BUNDLE): Promise<{ url: string; stop: () => void }> {
  const child: ChildProcess = spawn(PYTHON, ["-m", "edgesd.cli", "serve", bundle, "--port", "0", "--page", join(ROOT, "web_demo", "dist")], { cwd: ROOT });
  let wrong = "";
  child.stderr?.on("data", (text: Buffer) => (wrong += text.toString()));
  const url = await new Promise<string>((done, failed) => {
    child.stdout?.on("data", (text: Buffer) => done(text.toString().trim()));
    child.on("exit", () => failed(new Error(`edgesd serve ended: ${wrong}`)));
  });
  return { url, stop: () => void child.kill("SIGINT") };
}

export interface Browser {
  context: BrowserContext;
  page: () => Promise<Page>;
  close: () => Promise<void>;
}

/** A browser with a profile of its own, so that what it stores is seen by no other test. gpu: WebGPU in software. */
export async function browse({ gpu = false, ...options }: { gpu?: boolean } & Parameters<typeof chromium.launchPersistentContext>[1] = {}): Promise<Browser> {
  const profile = mkdtempSync(join(tmpdir(), "edgesd-web-"));
  const args = [...QUIET, ...(gpu ? SOFTWARE_GPU : ["--disable-gpu"])];
  const context = await chromium.launchPersistentContext(profile, { executablePath: CHROMIUM as string, headless: true, args, acceptDownloads: true, ...options });
  const page = async (): Promise<Page> => {
    const made = await context.newPage();
    made.on("pageerror", (error) => console.error("page:", error.message));
    return made;
  };
  return { context, page, close: () => context.close() };
}

/** Waits until the page says one of these; throws what it says went wrong. */
export async function until(page: Page, words: RegExp, timeout = 60_000): Promise<string> {
  const found = await page.waitForFunction(
    ([source, flags]) => {
      const problem = document.querySelector<HTMLElement>("#problem");
      if (problem !== null && !problem.hidden) return `problem: ${problem.textContent}`;
      const status = document.querySelector("#status")?.textContent ?? "";
      return new RegExp(source as string, flags).test(status) ? status : false;
    },
    [words.source, words.flags] as const,
    { timeout, polling: 20 },
  );
  return (await found.jsonValue()) as string;
}

export async function problem(page: Page, timeout = 60_000): Promise<string> {
  await page.waitForSelector("#problem:not([hidden])", { timeout });
  return (await page.textContent("#problem")) ?? "";
}

export interface Wish {
  prompt?: string;
  seed?: number;
  steps?: number;
  sampler?: string;
  guidance?: number;
}

/** Fills the form in as a person would. */
export async function ask(page: Page, { prompt, seed, steps, sampler, guidance }: Wish): Promise<void> {
  if (prompt !== undefined) await page.fill("#prompt", prompt);
  if (seed !== undefined) await page.fill("#seed", String(seed));
  if (sampler !== undefined) await page.selectOption("#sampler", sampler);
  const slide = (id: string, value: number): Promise<void> =>
    page.$eval(id, (element, to) => {
      (element as HTMLInputElement).value = String(to);
      element.dispatchEvent(new Event("input", { bubbles: true }));
    }, value);
  if (steps !== undefined) await slide("#steps", steps - 1);
  if (guidance !== undefined) await slide("#guidance", guidance);
}

/** The stage's pixels, RGB. */
export async function pixels(page: Page): Promise<number[]> {
  return page.$eval("#picture", (canvas) => {
    const { width, height } = canvas as HTMLCanvasElement;
    const data = (canvas as HTMLCanvasElement).getContext("2d")?.getImageData(0, 0, width, height).data as Uint8ClampedArray;
    return Array.from(data).filter((_, i) => i % 4 !== 3);
  });
}

export async function savePng(page: Page, path: string): Promise<void> {
  const [download] = await Promise.all([page.waitForEvent("download"), page.click("#save")]);
  await download.saveAs(path);
}
