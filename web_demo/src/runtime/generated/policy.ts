// Made by `npm run generate` from policy.schema.json; not edited by hand.

/**
 * The first row whose conditions hold is the answer. dwell_s: how long it must be better before it counts.
 */
export interface Policy {
  format: "edgesd-policy-1";
  name: string;
  about: string;
  dwell_s: number;
  rows: Row[];
}
/**
 * level: 0 where all is well, higher = worse; rows of one level give the same. reason: a sentence for the user.
 */
export interface Row {
  name: string;
  level: number;
  when: When;
  then: Outcome;
  reason: string;
}
/**
 * Conditions that must all hold; what is left out does not matter. Intervals are closed; null = no upper end.
 *
 * affordable_calls: deadline_s divided by the seconds a UNet call takes at width 1.
 */
export interface When {
  thermal: ("nominal" | "fair" | "serious" | "critical")[] | null;
  charging: boolean[] | null;
  saver: boolean[] | null;
  headroom: [number, number | null] | null;
  battery: [number, number | null] | null;
  free_memory_bytes: [number, number | null] | null;
  deadline_s: [number, number | null] | null;
  seconds_per_call: [number, number | null] | null;
  affordable_calls: [number, number | null] | null;
}
/**
 * What a picture gets. guidance_until: share of the steps with guidance. cool_down_s: rest before going on.
 */
export interface Outcome {
  steps: number;
  width: number;
  guidance_until: number;
  tile: boolean;
  upscaler: boolean;
  refiner: boolean;
  cool_down_s: number;
}
