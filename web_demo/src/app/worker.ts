/** All work: download, models, the loop. The page only shows what comes of it. */

import {
  Bundle, DataError, EdgesdError, PolicyRun, PromptCache, RequestError, decide, decode, describeError, deviceState, digest,
  dumpState, encodePng, goldenFiles, limits, loadState, neededFiles, openPipeline, openShelf, preview, resolve, sample, selftest,
  settingsFromJson, widthsOf,
  type DeviceState, type Limits, type OpenPipeline, type Picture, type Settings, type Shelf, type Start, type State, type Step,
} from "../runtime/index.js";
import { opens } from "../runtime/choose.js";
import { OnnxSession } from "../runtime/onnx.js";
import { runtime } from "./ort.js";
import type { Job, Opened, Reply, Request, Wish } from "./messages.js";

declare const __VERSION__: string;
const MEMORY_IS_SHORT_GB = 4;
const PAUSED = "paused run";

interface Open {
  bundle: Bundle;
  pipeline: OpenPipeline;
  shelf: Shelf;
}
let open: Open | null = null;
let device: Partial<DeviceState> = {};
const runs = new Map<string, PolicyRun>();
const cache = new PromptCache();
/** The run under way: what stops it, and what it waits for while paused. */
let stop: AbortController | null = null;
let gate: { wait: Promise<void>; go: () => void } | null = null;

function say(reply: Reply, transfer: Transferable[] = []): void {
  postMessage(reply, { transfer });
}

onmessage = ({ data }: MessageEvent<Request>) => {
  if (data.type === "pause" && stop !== null && gate === null) {
    let go: () => void = () => undefined;
    gate = { wait: new Promise((done) => (go = done)), go: () => go() };
  } else if (data.type === "resume") release();
  else if (data.type === "cancel") {
    stop?.abort(new DOMException("cancelled", "AbortError"));
    release();
  } else if (data.type === "device") decideOnly(data.device, data.policy, data.settings);
  else void work(data);
};

function release(): void {
  gate?.go();
  gate = null;
}

/** Jobs one after another; whatever is thrown becomes words for the page. */
let queue: Promise<void> = Promise.resolve();
function work(request: Request): Promise<void> {
  queue = queue.then(async () => {
    stop = new AbortController();
    try {
      if (request.type === "open") await openBundle(request.wish, stop.signal);
      if (request.type === "draw") await draw(request.job, stop.signal);
      if (request.type === "resume-saved") await resumeSaved(stop.signal);
      if (request.type === "discard-saved") await open?.shelf.delete(PAUSED);
      if (request.type === "selftest") await test(stop.signal);
      if (request.type === "clear") await clear();
    } catch (error) {
      if (stop.signal.aborted) say({ type: "idle", why: "cancelled" });
      else say({ type: "problem", problem: problemOf(error), during: request.type });
    } finally {
      [stop, gate] = [null, null];
    }
  });
  return queue;
}

function problemOf(error: unknown): { came: string; allowed: string; fix: string } {
  if (error instanceof EdgesdError) return { came: error.came, allowed: error.allowed, fix: error.fix };
  return { came: describeError(error), allowed: "", fix: "Reload the page; if it happens again, report it with this text" };
}

// ---- opening ------------------------------------------------------------------------------------------------------

async function openBundle(wish: Wish, signal: AbortSignal): Promise<void> {
  await open?.pipeline.session.close();
  open = null;
  runs.clear();
  const warnings: string[] = [];
  const shelf = await openShelf();
  const bundle = await Bundle.open(wish.address, shelf, signal);
  const adapter = wish.form === "wasm" ? null : await adapterOf();
  if (wish.form === "webgpu" && adapter === null) {
    const fix = "Choose WASM, or a browser with WebGPU (Chrome, Edge, Safari 26, Firefox 141 and later)";
    throw new RequestError("WebGPU, and this browser offers no adapter", "WASM", fix);
  }
  const f16 = adapter?.features.has("shader-f16") ?? false;
  const fitting = bundle.manifest.components.every(({ variants }) => variants.some(({ axes }) => axes.form === "webgpu" && (axes.precision !== "fp16" || f16)));
  const form = wish.form === "auto" ? (adapter !== null && fitting && !adapter.info.isFallbackAdapter ? "webgpu" : "wasm") : wish.form;
  const memory = (navigator as { deviceMemory?: number }).deviceMemory ?? Infinity;
  const frugal = wish.frugal || memory <= MEMORY_IS_SHORT_GB;
  const { ort, threads } = await runtime(form, wish.threads, warnings);
  const options = {
    ort, form, f16, oneAtATime: frugal, ...(wish.precision !== "" && { precision: wish.precision }),
    opened: (role: string) => say({ type: "loading", role }),
  };
  const probe = new OnnxSession(bundle.manifest, (path) => bundle.read(path), options);
  const files = neededFiles(bundle, probe);
  const progress = (at: { path: string; done: number; total: number }): void => say({ type: "download", ...at });
  await bundle.fetch(files, { progress, signal });
  await bundle.prune();
  const pipeline = await openPipeline(bundle, options);
  open = { bundle, pipeline, shelf };
  if (!shelf.lasting) warnings.push("This address is not secure (https or localhost): the model is fetched anew at each visit.");
  say({ type: "opened", opened: await describeOpen(open, files, { form, threads, frugal, warnings }, f16) });
}

async function describeOpen(
  { bundle, pipeline, shelf }: Open, files: string[], more: Pick<Opened, "form" | "threads" | "frugal" | "warnings">, f16: boolean,
): Promise<Opened> {
  const { manifest } = bundle;
  const sizes = new Map(manifest.files.map(({ path, bytes }) => [path, bytes]));
  const unet = manifest.components.find(({ name }) => name === "unet");
  const { precision } = pipeline.session.variant("unet").axes;
  const saved = await shelf.get(PAUSED);
  return {
    ...more, name: manifest.model.name, sizePx: manifest.model.defaults.size_px, defaults: manifest.model.defaults,
    samplers: Object.fromEntries([...pipeline.samplers].map(([name, steps]) => [name, [...steps]])),
    widths: widthsOf(manifest, "unet"), precisions: [...new Set(unet?.variants.filter((v) => v.axes.precision === precision || opens(v, more.form, f16)).map(({ axes }) => axes.precision))],
    policies: [...pipeline.policies.keys()], canStart: pipeline.session.has("vae_encoder"),
    prompts: pipeline.bank === null ? [] : pipeline.bank.prompts.filter((prompt) => prompt !== ""),
    precision, offline: bundle.offline,
    storedBytes: files.reduce((sum, path) => sum + (sizes.get(path) ?? 0), 0),
    saved: saved === null ? null : (readPaused(saved).settings.prompt ?? ""),
  };
}

async function adapterOf(): Promise<GPUAdapter | null> {
  try {
    return (await navigator.gpu?.requestAdapter()) ?? null;
  } catch {
    return null;
  }
}

// ---- drawing ------------------------------------------------------------------------------------------------------

function isOpen(): Open {
  if (open === null) throw new RequestError("no model", "one that is open", "Wait until it is, or reload the page");
  return open;
}

function sense(): DeviceState {
  return deviceState({ ...device, time_s: performance.now() / 1000 });
}

/** The user's settings are the ceiling, the bundle's tables and widths the offer. */
function boundsOf({ pipeline }: Open, settings: Settings): Limits {
  return limits({
    steps: pipeline.samplers.get(settings.sampler) ?? [], widths: [...pipeline.session.widths("unet")].sort((a, b) => a - b),
    max_steps: settings.num_inference_steps, max_width: settings.width, max_guidance_until: settings.guidance_until,
  });
}

function decideOnly(state: Partial<DeviceState>, name: string | null, said: Partial<Settings>): void {
  device = state;
  const policy = name === null ? undefined : open?.pipeline.policies.get(name);
  if (open === null || policy === undefined || stop !== null) return;
  try {
    const bounds = boundsOf(open, resolve(open.pipeline.spec, "a check", said));
    say({ type: "decision", policy: policy.name, decision: decide(policy, sense(), null, bounds) });
  } catch (error) {
    say({ type: "problem", problem: problemOf(error), during: "device" });
  }
}

async function draw(job: Job, signal: AbortSignal): Promise<void> {
  const now = isOpen();
  device = job.device;
  let settings = resolve(now.pipeline.spec, job.settings.prompt, job.settings);
  const policy = job.policy === null ? undefined : now.pipeline.policies.get(job.policy);
  if (policy === undefined) return finish(now, settings, job.start, null, null, signal);
  const bounds = boundsOf(now, settings);
  let run = runs.get(policy.name);
  if (run === undefined) runs.set(policy.name, (run = new PolicyRun(policy, sense, bounds, { sleep: (s) => sleep(s, signal) })));
  run.limits = bounds;
  const decision = await run.begin();
  say({ type: "decision", policy: policy.name, decision });
  const { steps, guidance_until, width } = decision;
  settings = { ...settings, num_inference_steps: steps, guidance_until, width };
  return finish(now, settings, job.start, null, run, signal);
}

function sleep(seconds: number, signal: AbortSignal): Promise<void> {
  return new Promise((done, failed) => {
    const timer = setTimeout(done, seconds * 1000);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      failed(signal.reason as Error);
    });
  });
}

async function finish(
  now: Open, settings: Settings, start: Start | null, resume: State | null, governor: PolicyRun | null, signal: AbortSignal,
): Promise<void> {
  const { pipeline } = now;
  const began = performance.now();
  let last = began;
  const times: number[] = [];
  for await (const event of sample(pipeline, settings, { start, cache, resume, governor, signal })) {
    if ("image" in event) {
      await show(now, event, start, times, began);
      await now.shelf.delete(PAUSED);
      return;
    }
    const seconds = (performance.now() - last) / 1000;
    times.push(seconds);
    const image = await previewOf(pipeline, event);
    say({ type: "step", row: event.row, rows: event.table.rows, preview: image, seconds });
    // Messages are taken only between turns of the event loop: a pause must be heard before the next step.
    await new Promise((done) => setTimeout(done));
    if (gate !== null) {
      const lasting = governor === null && settings.changes.length === 0 && settings.early_stop === null && now.shelf.lasting;
      if (lasting) await now.shelf.put(PAUSED, await writePaused(now, settings, start, event));
      say({ type: "paused", lasting });
      await gate.wait;
      signal.throwIfAborted();
    }
    last = performance.now();
  }
}

async function previewOf(pipeline: OpenPipeline, step: Step): Promise<Picture["image"]> {
  const { latent, defaults } = pipeline.spec;
  const [height, width] = defaults.size_px;
  const shape = [1, latent.channels, height / latent.downscale, width / latent.downscale];
  return latent.rgb_factors === null ? decode(pipeline, step.denoised, shape) : preview(step.denoised, shape, latent);
}

async function show(now: Open, picture: Picture, start: Start | null, times: number[], began: number): Promise<void> {
  const { image, settings, calls, stepsRun, truncated, notes } = picture;
  const { width, switch: switched, ...older } = settings;
  const record = {
    // What an edgesd before widths would not know is left out where it says nothing.
    settings: { ...older, ...(width !== 1 && { width }), ...(switched !== null && { switch: switched }) },
    start: start === null ? null : start.mask === null ? "image" : "image and mask", model: now.pipeline.spec.name,
    identity: now.pipeline.identity, size_px: [image.height, image.width], calls, steps_run: stepsRun, truncated,
    notes: [...notes], edgesd: __VERSION__,
  };
  const png = new Blob([await encodePng(image, record)], { type: "image/png" });
  const later = times.length > 1 ? times.slice(1) : times; // the first step opens the model
  const secondsPerStep = later.reduce((sum, t) => sum + t, 0) / Math.max(later.length, 1);
  const seconds = (performance.now() - began) / 1000;
  say({ type: "drawn", drawn: { image, png, settings, notes: [...notes], truncated, calls, secondsPerStep, seconds } });
}

// ---- a pause that outlives the page -------------------------------------------------------------------------------

interface Paused {
  settings: Settings;
  start: { width: number; height: number; masked: boolean } | null;
  stateBytes: number;
}

/** One line of JSON, the state's file, then the start image and mask as they are. */
async function writePaused(now: Open, settings: Settings, start: Start | null, step: Step): Promise<Uint8Array> {
  const { latent, defaults } = now.pipeline.spec;
  const shape = [1, latent.channels, defaults.size_px[0] / latent.downscale, defaults.size_px[1] / latent.downscale];
  const state = dumpState(step.table, step.state, shape, await ownerOf(now, settings));
  const facts = start === null ? null : { width: start.image.width, height: start.image.height, masked: start.mask !== null };
  const head = JSON.stringify({ settings, start: facts, stateBytes: state.length } satisfies Paused);
  const mask = start?.mask == null ? new Uint8Array() : Uint8Array.from(start.mask);
  const parts = [`${head}\n`, state, start?.image.data ?? new Uint8Array(), mask] as BlobPart[];
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

function ownerOf(now: Open, settings: Settings): Promise<string> {
  return digest(JSON.stringify([now.pipeline.identity, settings]));
}

function readPaused(file: Uint8Array): { settings: Partial<Settings>; start: Paused["start"]; state: Uint8Array; rest: Uint8Array } {
  try {
    const end = file.indexOf(10);
    const head = JSON.parse(new TextDecoder().decode(file.subarray(0, end))) as Paused;
    const at = end + 1 + head.stateBytes;
    return { settings: head.settings, start: head.start, state: file.slice(end + 1, at), rest: file.slice(at) };
  } catch {
    return { settings: {}, start: null, state: new Uint8Array(), rest: new Uint8Array() };
  }
}

async function resumeSaved(signal: AbortSignal): Promise<void> {
  const now = isOpen();
  const file = await now.shelf.get(PAUSED);
  if (file === null) throw new DataError("no paused picture is here", "one that was paused", "Draw it anew");
  const { settings: said, start: facts, state, rest } = readPaused(file);
  const settings = settingsFromJson(said);
  const table = now.pipeline.table(settings.sampler, settings.num_inference_steps);
  const pixels = facts === null ? 0 : facts.width * facts.height;
  const start = facts === null ? null : {
    image: { width: facts.width, height: facts.height, data: rest.subarray(0, pixels * 3) },
    mask: facts.masked ? Float32Array.from(rest.subarray(pixels * 3)) : null,
  };
  await finish(now, settings, start, loadState(state, table, await ownerOf(now, settings)), null, signal);
}

// ---- self-test, storage -------------------------------------------------------------------------------------------

async function test(signal: AbortSignal): Promise<void> {
  const { bundle, pipeline } = isOpen();
  const began = performance.now();
  await bundle.fetch(goldenFiles(bundle), { signal });
  const checks = await selftest(bundle, pipeline, (check) => say({ type: "check", check }), signal);
  say({ type: "tested", passed: checks.every((check) => check.passed), seconds: (performance.now() - began) / 1000 });
}

async function clear(): Promise<void> {
  const { shelf, pipeline } = isOpen();
  await pipeline.session.close();
  open = null;
  for (const key of await shelf.keys()) await shelf.delete(key);
  say({ type: "idle", why: "cleared" });
}
