/**
 * A bundle's golden vectors, run here: token ids, noise, every component's recorded calls, the latents after each row,
 * the picture. Mirrors `edgesd selftest` (edgesd/validate.py, parity.py, golden.py).
 */

import type { Bundle } from "./bundle.js";
import { DataError, describeError, shown } from "./errors.js";
import type { CallFacts, Facts, Gate } from "./generated/golden.js";
import schema from "./generated/golden.schema.json" with { type: "json" };
import { sample } from "./generate.js";
import { psnrDb } from "./image.js";
import type { Role } from "./manifest.js";
import { Philox, Purpose } from "./noise.js";
import type { OpenPipeline } from "./open.js";
import { DEFAULTS } from "./settings.js";
import { readStrict, type Schema } from "./strict.js";
import { allFinite, loadTensors, rows, type Data, type Tensor, type TensorFile } from "./tensor.js";

/** What an artefact of a precision must reach against the float32 truth, as edgesd/golden.py has it. */
const GATES: Record<string, Gate> = {
  fp32: { snr_db: 90, latents_snr_db: 50, picture_psnr_db: null, picture_mean_abs: 1 / 255 },
  fp16: { snr_db: 45, latents_snr_db: 20, picture_psnr_db: 35, picture_mean_abs: null },
  w8: { snr_db: 30, latents_snr_db: null, picture_psnr_db: null, picture_mean_abs: null },
  hybrid: { snr_db: 20, latents_snr_db: null, picture_psnr_db: null, picture_mean_abs: null },
  int8: { snr_db: 20, latents_snr_db: null, picture_psnr_db: null, picture_mean_abs: null },
};
// SNR of equal arrays is infinite, and JSON has no such number.
const CEILING_DB = 200;

/** One comparison. ceiling: the figure must not be above `wanted`, else not below it; wanted null: for information. */
export interface Check {
  readonly what: string;
  readonly value: number;
  readonly wanted: number | null;
  readonly unit: string;
  readonly ceiling: boolean;
  readonly passed: boolean;
}

/** The files that a self-test reads besides those that drawing needs. */
export function goldenFiles(bundle: Bundle): string[] {
  const facts = bundle.manifest.golden;
  return facts === null ? [] : [facts, facts.replace(/\.[^./]*$/, ".safetensors")];
}

/** Runs the golden vectors; `told` gets each check as it is done. Throws DataError where they are missing or broken. */
export async function selftest(bundle: Bundle, pipeline: OpenPipeline, told: (check: Check) => void, signal?: AbortSignal): Promise<Check[]> {
  const { facts, tensors } = await readGolden(bundle);
  const checks: Check[] = [];
  const add = (what: string, value: number, wanted: number | null, unit: string, ceiling = false): void => {
    const passed = wanted === null || (ceiling ? value <= wanted : value >= wanted);
    checks.push({ what, value, wanted, unit, ceiling, passed });
    told(checks.at(-1) as Check);
    signal?.throwIfAborted();
  };
  const get = (key: string): Tensor => tensors.get(key) as Tensor;
  pipeline.tokenizers.forEach((tokenizer, i) => {
    let wrong = 0;
    for (const [side, text] of [["prompt", facts.prompt], ["negative", facts.negative_prompt]] as const) {
      const expected = tensors.get(`ids/${i}/${side}`)?.data as BigInt64Array;
      const ids = tokenizer.encode(text).ids.flatMap((call) => [...call]);
      wrong += ids.length === expected.length ? ids.filter((id, at) => id !== expected[at]).length : expected.length;
    }
    add(`token ids of ${tokenizer.spec.component}`, wrong, 0, "wrong", true);
  });
  const noise = get("noise").data;
  const made = new Philox(facts.seed).normal(noise.length, 0, 0, Purpose.START);
  add("start noise", noise.reduce((worst, z, i) => Math.max(worst, Math.abs((made[i] as number) - z) / ulp(z)), 0), 1, "ulp", true);

  const gates: Gate[] = [];
  for (const role of new Set(facts.calls.map((call) => call.component))) {
    if (!pipeline.session.has(role)) continue;
    const { axes, gate_db } = pipeline.session.variant(role);
    const { precision, width, size_px } = axes;
    const gate = { ...GATES, ...facts.gates }[precision] as Gate;
    gates.push(gate);
    // The truth of a narrow UNet is that width's own.
    const calls = facts.calls.filter((call) => call.component === role && (role !== "unet" || call.width === width));
    if (calls.length === 0 || size_px.join() !== facts.size_px.join()) continue;
    add(role, await worstCall(pipeline, role, calls, get), gate_db ?? gate.snr_db, "dB SNR");
  }
  const gate = gates.reduce((a, b) => (b.snr_db < a.snr_db ? b : a));
  await checkPicture(pipeline, facts, get, gate, add, signal);
  return checks;
}

async function worstCall(pipeline: OpenPipeline, role: Role, calls: readonly CallFacts[], get: (key: string) => Tensor): Promise<number> {
  const batch = pipeline.session.batches(role)[0] as number;
  let worst = CEILING_DB;
  for (const call of calls) {
    // A variant that takes several rows a call gets the one row as often.
    const inputs = Object.fromEntries(Object.entries(call.inputs).map(([name, key]) => [name, name === "timestep" ? get(key) : repeated(get(key), batch)]));
    const got = await pipeline.session.run(role, inputs);
    for (const [name, key] of Object.entries(call.outputs)) worst = Math.min(worst, snrDb(get(key).data, rows(got[name] as Tensor, 0, 1).data));
  }
  return worst;
}

async function checkPicture(
  pipeline: OpenPipeline, facts: Facts, get: (key: string) => Tensor, gate: Gate,
  add: (what: string, value: number, wanted: number | null, unit: string, ceiling?: boolean) => void, signal?: AbortSignal,
): Promise<void> {
  const settings = {
    ...DEFAULTS, prompt: facts.prompt, negative_prompt: facts.negative_prompt, seed: facts.seed, sampler: facts.sampler,
    num_inference_steps: facts.steps, guidance_scale: facts.guidance, width: pipeline.session.widths("unet")[0] ?? 1,
  };
  const expected = get("latents");
  let worst = CEILING_DB;
  let row = 0;
  for await (const event of sample(pipeline, settings, signal ? { signal } : {})) {
    if (!("image" in event)) {
      worst = Math.min(worst, snrDb(rows(expected, row, row + 1).data, event.latents));
      row++;
      continue;
    }
    const truth = get("picture") as unknown as Tensor<Uint8Array>;
    const drawn = strided(event.image.data, event.image.width, event.image.height, facts.picture_stride);
    if (drawn.length !== truth.data.length || row !== expected.shape[0]) {
      throw new DataError("golden vectors of another picture", "the model's own size and steps", "Package the model again");
    }
    add("latents of every row", worst, gate.latents_snr_db ?? null, "dB SNR");
    add("picture", psnrDb(truth.data, drawn), gate.picture_psnr_db ?? null, "dB PSNR");
    const mean = truth.data.reduce((sum, x, i) => sum + Math.abs(x - (drawn[i] as number)), 0) / truth.data.length;
    add("picture, mean difference", mean / 255, gate.picture_mean_abs ?? null, "of 1", true);
  }
}

async function readGolden(bundle: Bundle): Promise<{ facts: Facts; tensors: TensorFile["tensors"] }> {
  const [factsPath, tensorsPath] = goldenFiles(bundle);
  if (factsPath === undefined || tensorsPath === undefined) {
    throw new DataError("the bundle has no golden vectors", "a bundle with them", "Package the model again");
  }
  try {
    const facts = readStrict<Facts>(await bundle.read(factsPath), schema as Schema);
    const { tensors } = loadTensors(await bundle.read(tensorsPath));
    const named = facts.calls.flatMap((call) => [...Object.values(call.inputs), ...Object.values(call.outputs)]);
    for (let i = 0; i < facts.tokenizers; i++) named.push(`ids/${i}/prompt`, `ids/${i}/negative`);
    for (const key of [...named, "noise", "latents", "picture"]) {
      const found = tensors.get(key);
      if (found === undefined || !allFinite(found.data)) throw new Error(`tensor ${key} is missing or not finite`);
    }
    return { facts, tensors };
  } catch (error) {
    if (error instanceof DataError) throw error;
    throw new DataError(`the golden vectors do not read (${shown(describeError(error), 160)})`, "what edgesd wrote", "Package the model again");
  }
}

/** Signal-to-noise ratio of an array against the truth, in dB. */
export function snrDb(truth: Float32Array, got: Float32Array): number {
  let [signal, error] = [0, 0];
  truth.forEach((x, i) => {
    signal += x ** 2;
    error += (x - (got[i] as number)) ** 2;
  });
  return error === 0 ? CEILING_DB : Math.min(CEILING_DB, 10 * Math.log10(signal / error));
}

function repeated({ data, shape }: Tensor<Data>, count: number): Tensor<Data> {
  if (count === 1) return { data, shape };
  const whole = new (data.constructor as Float32ArrayConstructor)(data.length * count);
  for (let i = 0; i < count; i++) whole.set(data as Float32Array, i * data.length);
  return { data: whole, shape: [count * (shape[0] as number), ...shape.slice(1)] };
}

function strided(data: Uint8Array, width: number, height: number, stride: number): Uint8Array {
  const out = [];
  for (let y = 0; y < height; y += stride) for (let x = 0; x < width; x += stride) out.push(...data.subarray((y * width + x) * 3, (y * width + x) * 3 + 3));
  return Uint8Array.from(out);
}

/** The distance of a float32 to its neighbour. */
function ulp(x: number): number {
  return 2 ** (Math.max(Math.floor(Math.log2(Math.abs(x) || Number.MIN_VALUE)), -126) - 23);
}
