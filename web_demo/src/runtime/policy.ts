/** A policy: what the device feels like -> how much work a picture gets. Mirrors edgesd/runtime/policy.py (docs/policies.md). */

import { DataError, RequestError, describeError, shown } from "./errors.js";
import { UNKNOWN, type DeviceState } from "./device.js";
import type { Policy, Row, Outcome, When } from "./generated/policy.js";
import schema from "./generated/policy.schema.json" with { type: "json" };
import { checkPolicy } from "./policycheck.js";
import { readStrict, type Schema } from "./strict.js";

export type { Policy, Row, Outcome, When } from "./generated/policy.js";

const MAX_BYTES = 1 << 18;
export const UNBOUNDED = Number.MAX_SAFE_INTEGER;
const INNER_SHARE = 0.86;

export type Axis =
  | "thermal" | "charging" | "saver" | "headroom" | "battery" | "free_memory_bytes" | "deadline_s" | "seconds_per_call"
  | "affordable_calls";
export type Point = Record<Axis, string | boolean | number>;

/** What an axis counts as where the device does not tell, in the order of the axes. */
export const NOMINAL: Point = {
  thermal: "nominal", charging: true, saver: false, headroom: 0, battery: 1, free_memory_bytes: UNBOUNDED,
  deadline_s: UNBOUNDED, seconds_per_call: 0, affordable_calls: UNBOUNDED,
};
export const AXES = Object.keys(NOMINAL) as Axis[];
export const SETS: readonly Axis[] = ["thermal", "charging", "saver"];

/** What the user allows and the bundle offers; steps and widths ascending. */
export interface Limits {
  readonly steps: readonly number[];
  readonly widths: readonly number[];
  readonly min_steps: number;
  readonly max_steps: number;
  readonly min_width: number;
  readonly max_width: number;
  readonly min_guidance_until: number;
  readonly max_guidance_until: number;
  readonly tile: boolean;
  readonly upscaler: boolean;
  readonly refiner: boolean;
}

const OPEN: Limits = {
  steps: Array.from({ length: 1000 }, (_, i) => i + 1), widths: [1], min_steps: 1, max_steps: 1000, min_width: 0, max_width: 1,
  min_guidance_until: 0, max_guidance_until: 1, tile: false, upscaler: false, refiner: false,
};

/** Limits with what is said. Throws RequestError where nothing is left to choose. */
export function limits(said: Partial<Limits>): Limits {
  const made = { ...OPEN, ...said };
  const ranges: [string, number, number, readonly number[] | null][] = [
    ["steps", made.min_steps, made.max_steps, made.steps], ["width", made.min_width, made.max_width, made.widths],
    ["guidance until", made.min_guidance_until, made.max_guidance_until, null],
  ];
  for (const [name, low, high, offered] of ranges) {
    if (low > high || (offered !== null && !offered.some((x) => low <= x && x <= high))) {
      const allowed = `a range that holds one of ${(offered ?? [0, 1]).slice(0, 20).join(", ") || "none"}`;
      throw new RequestError(`${name} from ${low} to ${high}`, allowed, "Widen the floor or the ceiling");
    }
  }
  return made;
}

/** What a picture gets and why. capped: what limits did not give. assumed: axes that the device did not tell. */
export interface Decision extends Required<Outcome> {
  readonly reason: string;
  readonly row: string;
  readonly level: number;
  readonly time_s: number;
  readonly capped: string[];
  readonly assumed: string[];
  readonly better_since_s: number | null;
}

/** The conditions of a row, in the order of the axes. */
export function conditions(when: When): [Axis, unknown[]][] {
  return AXES.flatMap((axis) => (when[axis] == null ? [] : [[axis, when[axis] as unknown[]] as [Axis, unknown[]]]));
}

export function holds(when: When, values: Point): boolean {
  return conditions(when).every(([axis, allowed]) => {
    const value = values[axis];
    if (SETS.includes(axis)) return allowed.includes(value);
    const [low, high] = allowed as [number, number | null];
    return (value as number) >= low && (high === null || (value as number) <= high);
  });
}

/** The axes that any row looks at. */
export function axesOf(policy: Policy): Axis[] {
  const used = new Set(policy.rows.flatMap((row) => conditions(row.when).map(([axis]) => axis)));
  return AXES.filter((axis) => used.has(axis));
}

export function match(policy: Policy, values: Point): Row | undefined {
  return policy.rows.find((row) => holds(row.when, values));
}

function point(state: DeviceState): { values: Point; unknown: Axis[] } {
  const seconds = state.seconds_per_call["1"] ?? state.seconds_per_call["1.0"] ?? null;
  const known: Record<Axis, string | boolean | number | null> = {
    thermal: state.thermal === "unknown" ? null : state.thermal, charging: state.charging, saver: state.saver,
    headroom: state.headroom, battery: state.battery, free_memory_bytes: state.free_memory_bytes,
    deadline_s: state.deadline_s, seconds_per_call: seconds,
    affordable_calls: state.deadline_s === null || seconds === null ? null : Math.min(state.deadline_s / seconds, UNBOUNDED),
  };
  // A battery that is known but not said to be charging is taken to run down; no battery at all means the mains.
  const nominal: Point = { ...NOMINAL, charging: state.battery === null };
  const values = Object.fromEntries(AXES.map((axis) => [axis, known[axis] ?? nominal[axis]])) as Point;
  return { values, unknown: AXES.filter((axis) => known[axis] === null) };
}

/** The row in force, capped by the limits. Worse counts at once, better only after `dwell_s` without a break. Pure. */
export function decide(
  policy: Policy, state: DeviceState = UNKNOWN,
  previous: Pick<Decision, "row" | "time_s" | "better_since_s"> | null = null, bounds: Limits = OPEN,
): Decision {
  const { values, unknown } = point(state);
  let row = match(policy, values);
  if (row === undefined) throw new DataError(`policy ${policy.name} says nothing here`, "a table without gaps", "Check it at load");
  const kept = previous === null ? undefined : policy.rows.find((one) => one.name === previous.row);
  let since: number | null = null;
  if (kept !== undefined && previous !== null && row.level < kept.level) {
    const now = state.time_s;
    since = previous.better_since_s === null ? now : Math.min(previous.better_since_s, now);
    if (now < previous.time_s) since = now; // the clock began anew
    if (now - since >= policy.dwell_s) since = null;
    else row = kept;
  }
  const { given, capped } = cap(row.then, bounds);
  return {
    ...given, reason: row.reason, row: row.name, level: row.level, time_s: state.time_s, capped,
    assumed: axesOf(policy).filter((axis) => unknown.includes(axis)), better_since_s: since,
  };
}

function cap(then: Outcome, bounds: Limits): { given: Required<Outcome>; capped: string[] } {
  const wanted = then as Required<Outcome>;
  const given: Required<Outcome> = {
    steps: nearest(wanted.steps, bounds.steps.filter((n) => bounds.min_steps <= n && n <= bounds.max_steps)),
    width: nearest(wanted.width, bounds.widths.filter((w) => bounds.min_width <= w && w <= bounds.max_width)),
    guidance_until: Math.max(bounds.min_guidance_until, Math.min(bounds.max_guidance_until, wanted.guidance_until)),
    tile: wanted.tile && bounds.tile,
    upscaler: wanted.upscaler && bounds.upscaler,
    refiner: wanted.refiner && bounds.refiner,
    cool_down_s: wanted.cool_down_s,
  };
  return { given, capped: (Object.keys(given) as (keyof Outcome)[]).filter((name) => given[name] !== wanted[name]) };
}

/** The largest that is not above what is wanted, else the smallest there is. */
function nearest(wanted: number, allowed: readonly number[]): number {
  const below = allowed.filter((x) => x <= wanted);
  return below.length > 0 ? Math.max(...below) : Math.min(...allowed);
}

/** UNet work of a picture in calls at full width. */
export function cost(then: Outcome): number {
  const { steps, guidance_until, width } = then as Required<Outcome>;
  return steps * (1 + guidance_until) * (1 - INNER_SHARE * (1 - width));
}

/** A checked policy from the bytes of its JSON. DataError for what does not parse, has gaps, or gets dearer. */
export function parsePolicy(data: Uint8Array): Policy {
  const fix = "Correct the table as docs/policies.md describes";
  if (data.length > MAX_BYTES) throw new DataError(`a policy of more than ${MAX_BYTES} bytes`, `up to ${MAX_BYTES}`, fix);
  let policy: Policy;
  try {
    policy = readStrict<Policy>(data, schema as Schema);
    for (const row of policy.rows) {
      for (const [axis, allowed] of conditions(row.when)) {
        const [low, high] = allowed as [number, number | null];
        if (!SETS.includes(axis) && high !== null && low > high) throw new Error(`${axis} from ${low} to ${high} is empty`);
      }
    }
  } catch (error) {
    throw new DataError(`policy: ${shown(describeError(error))}`, "a table of format edgesd-policy-1", fix);
  }
  checkPolicy(policy);
  return policy;
}
