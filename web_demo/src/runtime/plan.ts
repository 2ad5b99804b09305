/** What varies by row besides the sampler: guidance, the unconditional call, when a run may end. Mirrors edgesd/runtime/plan.py. */

import { RequestError } from "./errors.js";

const MAX_GUIDANCE = 1000;
const f32 = Math.fround;

/** Per row of a table: guidance (1 = none), uncond (is it called). rescale: 0..1. earlyStop: see Settings. */
export interface RunPlan {
  readonly guidance: readonly number[];
  readonly uncond: readonly boolean[];
  readonly rescale: number;
  readonly earlyStop: number | null;
}

/** Guidance over x = row / (rows - 1): 0 at pure noise, 1 at the last row. */
export const SCHEDULES: Record<string, (x: number, guidance: number) => number> = {
  constant: (_x, guidance) => guidance,
  linear: (x, guidance) => 1 + 2 * x * (guidance - 1),
  cosine: (x, guidance) => 1 + (1 - Math.cos(Math.PI * x)) * (guidance - 1),
  interval: (x, guidance) => (x >= 0.2 && x <= 0.8 ? guidance : 1),
  three_stage: (x, guidance) => 1 + (guidance - 1) * Math.min(Math.max(1 / 3 + (((x - 0.2) / 0.4) * 2) / 3, 1 / 3), 1),
};

export interface PlanOptions {
  /** After this fraction of the rows guidance is 1 and the unconditional call is not made. */
  until?: number;
  rescale?: number;
  earlyStop?: number | null;
}

/** A plan whose guidance follows SCHEDULES[kind]. Throws RequestError for values out of range. */
export function makePlan(kind: string, rows: number, guidance: number, options: PlanOptions = {}): RunPlan {
  const { until = 1, rescale = 0, earlyStop = null } = options;
  const schedule = Object.hasOwn(SCHEDULES, kind) ? SCHEDULES[kind] : undefined;
  if (schedule === undefined) {
    throw new RequestError(`guidance schedule ${JSON.stringify(kind)}`, Object.keys(SCHEDULES).join(", "), "Choose one of these");
  }
  const fix = "Change the guidance settings";
  if (rows < 1 || !(until >= 0 && until <= 1)) throw new RequestError(`guidance until ${until}`, "0 to 1, of at least one row", fix);
  if (!(guidance >= 0 && guidance <= MAX_GUIDANCE)) throw new RequestError(`guidance ${guidance}`, `0 to ${MAX_GUIDANCE}`, fix);
  if (!(rescale >= 0 && rescale <= 1)) throw new RequestError(`guidance_rescale ${rescale}`, "0 to 1", fix);
  const scale = Array.from({ length: rows }, (_, row) => {
    const wanted = row < until * rows ? schedule(row / Math.max(rows - 1, 1), guidance) : 1;
    return Math.min(Math.max(f32(wanted), 0), MAX_GUIDANCE);
  });
  return { guidance: scale, uncond: scale.map((g) => g !== 1), rescale, earlyStop };
}

/** UNet calls of the rows from `start` on: one each, two where the unconditional call is made. */
export function callsOf(plan: RunPlan, start = 0): number {
  return plan.uncond.slice(start).reduce((sum, both) => sum + (both ? 2 : 1), 0);
}

/** Whether earlyStop is set and x0 moved less than that (rms, of its own size) since the row before. */
export function settled(plan: RunPlan, before: Float32Array, x0: Float32Array): boolean {
  if (plan.earlyStop === null) return false;
  let moved = 0;
  let whole = 0;
  x0.forEach((x, i) => {
    moved += f32(x - (before[i] as number)) ** 2;
    whole += x ** 2;
  });
  return Math.sqrt(moved) < plan.earlyStop * Math.sqrt(whole);
}

/** Classifier-free guidance; rescale: Lin et al. 2023, eqs. 15-16. */
export function combine(uncond: Float32Array, cond: Float32Array, guidance: number, rescale = 0): Float32Array {
  const scale = f32(guidance);
  const guided = uncond.map((u, i) => u + f32(scale * f32((cond[i] as number) - u)));
  if (rescale === 0) return guided;
  const ratio = f32(deviation(cond) / deviation(guided));
  const [keep, own] = [f32(rescale), f32(1 - rescale)];
  return guided.map((g) => f32(keep * f32(g * ratio)) + f32(own * g));
}

function deviation(values: Float32Array): number {
  const mean = values.reduce((sum, x) => sum + x, 0) / values.length;
  return Math.sqrt(values.reduce((sum, x) => sum + (x - mean) ** 2, 0) / (values.length - 1));
}
