/**
 * A picture under a policy: asked before every step, it may shorten the run, end guidance, narrow once, or wait.
 * Mirrors edgesd/runtime/governed.py: each change is kept with the picture, and Replay of them repeats it.
 */

import { DataError } from "./errors.js";
import { UNKNOWN, merge, type DeviceState } from "./device.js";
import { decide, type Decision, type Limits, type Policy } from "./policy.js";

const KINDS = ["shorten", "unguide", "narrow", "pause"] as const;
const MAX_REASON = 400;
const LEARNING = 0.3;

/** What changed before the step that follows `rows_run` finished rows. The names are those of the PNG's record. */
export interface Change {
  readonly rows_run: number;
  readonly kind: (typeof KINDS)[number];
  readonly steps: number;
  readonly width: number;
  readonly guidance_until: number;
  readonly seconds: number;
  readonly reason: string;
}

/** A change as a picture carries it; DataError for anything else. */
export function changeFromJson(data: unknown): Change {
  const given = (data ?? {}) as Partial<Change>;
  const names = ["rows_run", "kind", "steps", "width", "guidance_until", "seconds", "reason"];
  const number = (x: unknown, low: number, high: number): boolean =>
    typeof x === "number" && Number.isFinite(x) && x >= low && x <= high;
  const good =
    typeof data === "object" && Object.keys(given).sort().join() === [...names].sort().join() &&
    Number.isInteger(given.rows_run) && number(given.rows_run, 0, 1 << 16) &&
    Number.isInteger(given.steps) && number(given.steps, 1, 1000) &&
    number(given.width, Number.MIN_VALUE, 1) && number(given.guidance_until, 0, 1) && number(given.seconds, 0, Infinity) &&
    (KINDS as readonly unknown[]).includes(given.kind) &&
    typeof given.reason === "string" && [...given.reason].length <= MAX_REASON;
  if (!good) throw new DataError("the picture's log of changes does not parse", "what edgesd writes", "Draw it anew");
  return given as Change;
}

/** One line for people. */
export function describeChange(change: Change): string {
  const what = {
    shorten: `shortened to ${change.steps} steps`,
    narrow: `narrowed to width ${change.width}`,
    unguide: `guidance ends at ${Math.round(change.guidance_until * 100)}% of the run`,
    pause: `waited ${change.seconds} s`,
  }[change.kind];
  return `${what} after row ${change.rows_run}: ${change.reason}`;
}

/** ask: what changes before the step that follows `rowsRun` rows and `calls` UNet rows; a pause is already over. */
export interface Governor {
  ask(rowsRun: number, calls: number): Promise<readonly Change[]> | readonly Change[];
}

/** The recorded changes again, each at its row. Pauses are told and not waited. */
export class Replay implements Governor {
  constructor(private readonly changes: readonly Change[]) {}

  ask(rowsRun: number): readonly Change[] {
    return this.changes.filter((change) => change.rows_run === rowsRun);
  }
}

export interface PolicyRunOptions {
  deadlineS?: number | null;
  /** Seconds, from outside for tests and replays. */
  clock?: () => number;
  sleep?: (seconds: number) => Promise<void>;
}

/** A policy in charge of pictures drawn one after another, on sensors that `sense` reads. */
export class PolicyRun implements Governor {
  private known: DeviceState;
  private now: Decision | null = null;
  private given: Decision | null = null;
  private waited: Change[] = [];
  private mark: [number, number] | null = null;
  private narrowed = false;
  private readonly clock: () => number;
  private readonly sleep: (seconds: number) => Promise<void>;

  constructor(
    readonly policy: Policy,
    private readonly sense: () => DeviceState,
    public limits: Limits,
    { deadlineS = null, clock, sleep }: PolicyRunOptions = {},
  ) {
    this.known = { ...UNKNOWN, deadline_s: deadlineS };
    this.clock = clock ?? (() => performance.now() / 1000);
    this.sleep = sleep ?? ((seconds) => new Promise((done) => setTimeout(done, seconds * 1000)));
  }

  /** What the next picture gets, after the rest that the table asks for. */
  async begin(): Promise<Decision> {
    let given = this.decide();
    [this.waited, this.mark, this.narrowed] = [[], null, false];
    if (given.cool_down_s > 0) {
      this.waited.push(await this.pause(0, given, given));
      given = this.decide();
    }
    this.given = given;
    return given;
  }

  /** The first row's time is not learned: it holds the loading of the model. */
  async ask(rowsRun: number, calls: number): Promise<readonly Change[]> {
    if (rowsRun === 0 || this.given === null) return this.waited;
    this.learn(calls);
    const before = this.given;
    const wanted = this.decide();
    const made: Change[] = [];
    this.given = this.fall(before, wanted, rowsRun, made);
    if (wanted.level > before.level && wanted.cool_down_s > 0) made.push(await this.pause(rowsRun, before, wanted));
    this.mark = [this.clock(), calls];
    return made;
  }

  /** The decision now in force: each part the lower of both; what fell goes into `made`. */
  private fall(before: Decision, wanted: Decision, rowsRun: number, made: Change[]): Decision {
    const now = {
      ...before, steps: Math.min(before.steps, wanted.steps),
      width: this.narrowed ? before.width : Math.min(before.width, wanted.width),
      guidance_until: Math.min(before.guidance_until, wanted.guidance_until), level: Math.max(before.level, wanted.level),
    };
    const parts: [Change["kind"], boolean][] = [
      ["narrow", now.width < before.width], ["shorten", now.steps < before.steps],
      ["unguide", now.guidance_until < before.guidance_until && now.steps === before.steps],
    ];
    this.narrowed ||= now.width < before.width;
    for (const [kind, fell] of parts) {
      if (!fell) continue;
      const { steps, width, guidance_until } = now;
      made.push({ rows_run: rowsRun, kind, steps, width, guidance_until, seconds: 0, reason: wanted.reason });
    }
    return now;
  }

  private decide(): Decision {
    this.now = decide(this.policy, merge(this.known, this.sense()), this.now, this.limits);
    return this.now;
  }

  private async pause(rowsRun: number, given: Decision, why: Decision): Promise<Change> {
    await this.sleep(why.cool_down_s);
    const { steps, width, guidance_until } = given;
    return { rows_run: rowsRun, kind: "pause", steps, width, guidance_until, seconds: why.cool_down_s, reason: why.reason };
  }

  /** Running mean of seconds per call, from the time and calls since the last question. */
  private learn(calls: number): void {
    if (this.mark === null || calls <= this.mark[1]) return;
    const seconds = (this.clock() - this.mark[0]) / (calls - this.mark[1]);
    if (seconds <= 0) return;
    const mean = this.known.seconds_per_call["1"] ?? seconds;
    this.known = { ...this.known, seconds_per_call: { "1": mean + LEARNING * (seconds - mean) } };
  }
}
