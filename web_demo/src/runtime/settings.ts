/** What decides a picture: one record, checked, that travels in the PNG and can be drawn again. Mirrors edgesd/runtime/settings.py. */

import { DataError, RequestError } from "./errors.js";
import { changeFromJson, type Change } from "./governed.js";
import type { Manifest } from "./manifest.js";
import { checkSeed } from "./noise.js";
import { SCHEDULES } from "./plan.js";

const MAX_IMAGES = 1000;
const MAX_GUIDANCE = 100;
const MAX_SIZE = 1 << 16;
const MAX_CHANGES = 4096;
export type ModelSpec = Manifest["model"];
export type Pair = [number, number];

/** The names are those of the PNG's record, which `edgesd generate --from` reads. */
export interface Settings {
  readonly prompt: string;
  readonly negative_prompt: string;
  readonly seed: number;
  readonly index: number;
  readonly num_inference_steps: number;
  readonly sampler: string;
  readonly guidance_scale: number;
  readonly guidance_schedule: string;
  readonly guidance_until: number;
  readonly guidance_rescale: number;
  readonly early_stop: number | null;
  readonly strength: number;
  readonly rng: string;
  readonly original_size: Pair | null;
  readonly crops_coords_top_left: Pair;
  readonly target_size: Pair | null;
  readonly aesthetic_score: number;
  readonly negative_aesthetic_score: number;
  readonly refiner_start: number | null;
  /** Of the UNet, 1 = the widest. */
  readonly width: number;
  /** [share of the rows, width]: from there on that width. */
  readonly switch: [number, number] | null;
  readonly changes: readonly Change[];
}

export const DEFAULTS: Settings = {
  prompt: "", negative_prompt: "", seed: 0, index: 0, num_inference_steps: 20, sampler: "dpmpp_2m_karras",
  guidance_scale: 7.5, guidance_schedule: "constant", guidance_until: 1, guidance_rescale: 0, early_stop: null, strength: 1,
  rng: "philox", original_size: null, crops_coords_top_left: [0, 0], target_size: null, aesthetic_score: 6,
  negative_aesthetic_score: 2.5, refiner_start: null, width: 1, switch: null, changes: [],
};

/** Settings with the model's defaults where nothing is said. Throws RequestError for what cannot be drawn. */
export function resolve(spec: ModelSpec, prompt: string, said: Partial<Settings> = {}): Settings {
  const { steps, sampler, guidance } = spec.defaults;
  const given = Object.fromEntries(Object.entries(said).filter(([, value]) => value !== undefined && value !== null));
  return check({ ...DEFAULTS, num_inference_steps: steps, sampler, guidance_scale: guidance, ...given, prompt });
}

/** The settings, or a RequestError that names the one that cannot be. */
export function check(s: Settings): Settings {
  const inside = (x: number, low: number, high: number): boolean => x >= low && x <= high;
  const open = (x: number | null): boolean => x === null || (x > 0 && x < 1);
  const rules: [boolean, string, string, string][] = [
    [s.prompt.trim() !== "", "an empty prompt", "at least one word", "Say what to draw"],
    [Number.isInteger(s.num_inference_steps) && inside(s.num_inference_steps, 1, 1000), `${s.num_inference_steps} steps`, "1 to 1000", "Change the steps"],
    [inside(s.guidance_scale, 0, MAX_GUIDANCE), `guidance ${s.guidance_scale}`, `0 to ${MAX_GUIDANCE}`, "Change it"],
    [s.strength > 0 && s.strength <= 1, `strength ${s.strength}`, "above 0, at most 1", "Change the strength"],
    [inside(s.guidance_until, 0, 1), `guidance until ${s.guidance_until}`, "0 to 1", "Change it"],
    [inside(s.guidance_rescale, 0, 1), `guidance rescale ${s.guidance_rescale}`, "0 to 1", "Change it"],
    [Object.hasOwn(SCHEDULES, s.guidance_schedule), `schedule ${JSON.stringify(s.guidance_schedule)}`, Object.keys(SCHEDULES).join(", "), "Choose one"],
    [open(s.early_stop), `early stop ${s.early_stop}`, "above 0, below 1", "Change it"],
    [Number.isInteger(s.index) && inside(s.index, 0, MAX_IMAGES - 1), `picture ${s.index}`, `0 to ${MAX_IMAGES - 1}`, "Change the count"],
    ...([["original_size", s.original_size], ["crops_coords_top_left", s.crops_coords_top_left], ["target_size", s.target_size]] as const).map(
      ([name, pair]): [boolean, string, string, string] => [pair === null || isPair(pair), `${name} ${String(pair)}`, `two whole numbers of px from 0 to ${MAX_SIZE}`, "Change it"],
    ),
    [[s.aesthetic_score, s.negative_aesthetic_score].every((x) => inside(x, 0, 10)), "an aesthetic score", "0 to 10", "Change it"],
    [s.width > 0 && s.width <= 1, `width ${s.width}`, "above 0, at most 1", "Change it"],
    [s.switch === null || isSwitch(s.switch), `switch ${String(s.switch)}`, "a share of the run and a width, each 0 to 1", "Change it"],
    [open(s.refiner_start), `refiner from ${s.refiner_start}`, "above 0, below 1", "Change it"],
  ];
  for (const [good, came, allowed, fix] of rules) if (!good) throw new RequestError(came, allowed, fix);
  checkSeed(s.seed);
  return s;
}

const OPEN_NUMBERS = ["early_stop", "refiner_start"];
const PAIRS = ["original_size", "crops_coords_top_left", "target_size"];

/** Settings as a PNG carries them; unknown keys (a newer edgesd) and wrong types are a DataError. */
export function settingsFromJson(data: unknown): Settings {
  const bad = new DataError("the picture's settings do not parse", "what edgesd writes", "Give the settings by hand");
  if (data === null || typeof data !== "object" || Array.isArray(data)) throw bad;
  const given = data as Record<string, unknown>;
  if (typeof given.prompt !== "string") throw bad;
  for (const [key, value] of Object.entries(given)) {
    if (!Object.hasOwn(DEFAULTS, key)) throw bad;
    if (key === "changes") {
      if (!Array.isArray(value) || value.length > MAX_CHANGES) throw bad;
      continue;
    }
    const normal = DEFAULTS[key as keyof Settings];
    const optional = value === null && normal === null;
    const kind = OPEN_NUMBERS.includes(key) ? "number" : typeof normal;
    const good = PAIRS.includes(key) ? isPair(value) : key === "switch" ? isSwitch(value) : typeof value === kind;
    if (!good && !optional) throw bad;
    if (["seed", "index", "num_inference_steps"].includes(key) && !Number.isSafeInteger(value)) throw bad;
  }
  const changes = ((given.changes ?? []) as unknown[]).map(changeFromJson);
  return { ...DEFAULTS, ...given, changes } as Settings;
}

function isPair(value: unknown): value is Pair {
  const good = (n: unknown): boolean => Number.isInteger(n) && (n as number) >= 0 && (n as number) <= MAX_SIZE;
  return Array.isArray(value) && value.length === 2 && value.every(good);
}

function isSwitch(value: unknown): boolean {
  const good = (x: unknown): boolean => typeof x === "number" && x >= 0 && x <= 1;
  return Array.isArray(value) && value.length === 2 && value.every(good) && value[1] > 0;
}
