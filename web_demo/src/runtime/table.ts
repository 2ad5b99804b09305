/** Sampler tables: a scheduler as rows of coefficients (docs/sampling.md). Mirrors edgesd/runtime/table.py. */

import { DataError, RequestError, describeError, shown } from "./errors.js";
import { allFinite, loadTensors, type Data, type Tensor } from "./tensor.js";

const MAX_INPUTS = 4;
const MAX_OUTPUTS = 5;
const MAX_STEPS = 1000;
const MAX_BYTES = 64 << 20;
const PREDICTION_TYPES = ["epsilon", "v_prediction", "sample", "flow", "edm"] as const;
const FORMAT = "edgesd-tables-1";
const f32 = Math.fround;

export type PredictionType = (typeof PREDICTION_TYPES)[number];

/** Consecutive rows: per row P input coefficients, Q output coefficients (newest first) and one of noise. */
export interface Rows {
  readonly inputCoef: readonly Float32Array[];
  readonly outputCoef: readonly Float32Array[];
  readonly noiseCoef: Float32Array;
}

/** One sampler at one step count. draws: a normal is drawn there, even where its coefficient is 0. */
export class SamplerTable implements Rows {
  constructor(
    readonly name: string,
    readonly steps: number,
    readonly predictionType: PredictionType,
    readonly timestep: Float32Array,
    readonly alpha: Float32Array,
    readonly sigma: Float32Array,
    readonly inputCoef: readonly Float32Array[],
    readonly outputCoef: readonly Float32Array[],
    readonly noiseCoef: Float32Array,
    readonly draws: readonly boolean[],
    readonly initScale: number,
    readonly order: number,
    readonly starts: ReadonlyMap<number, Rows>,
  ) {}

  get rows(): number {
    return this.timestep.length;
  }

  /** Past inputs and outputs that the widest row looks at. */
  get band(): { inputs: number; outputs: number } {
    return { inputs: this.inputCoef[0]?.length ?? 1, outputs: this.outputCoef[0]?.length ?? 1 };
  }

  /** Coefficients of a row in a run that began at row `start`. */
  coefficients(row: number, start = 0): { input: Float32Array; output: Float32Array; noise: number } {
    const warm = start > 0 ? (this.starts.get(start) as Rows) : this;
    const inside = row - start < warm.noiseCoef.length;
    const [rows, at] = inside ? [warm, row - start] : [this, row];
    return {
      input: rows.inputCoef[at] as Float32Array,
      output: rows.outputCoef[at] as Float32Array,
      noise: rows.noiseCoef[at] as number,
    };
  }

  /** [skip, out] with x0 = skip * u + out * e, the prediction of the clean latents. */
  x0Coefficients(row: number): [number, number] {
    const a = this.alpha[row] as number;
    const s = this.sigma[row] as number;
    switch (this.predictionType) {
      case "epsilon":
        return [f32(1 / a), f32(-s / a)];
      case "v_prediction":
        return [f32(a), f32(-s)];
      case "sample":
        return [0, 1];
      case "flow":
        return [f32(1 / (a + s)), f32(-s / (a + s))];
      case "edm":
        return [f32((1 - s * s) / a), f32((s * Math.sqrt(1 - s * s)) / a)];
    }
  }

  /** The row image-to-image starts at; strength above 0 to 1. Throws RequestError where no step is left. */
  startRow(strength: number): number {
    if (!(strength > 0 && strength <= 1)) {
      throw new RequestError(`strength ${strength}`, "above 0, at most 1", "Choose a strength in that range");
    }
    const done = this.steps - Math.min(Math.trunc(this.steps * strength), this.steps);
    if (done >= this.steps) {
      const least = `at least ${(1 / this.steps).toPrecision(3)}`;
      throw new RequestError(`strength ${strength} with ${this.steps} steps leaves no step`, least, "Raise the strength or the steps");
    }
    return done * this.order;
  }
}

/** The rows a run may start at besides 0. */
export function possibleStarts(rows: number, steps: number, order: number): number[] {
  const starts = [];
  for (let row = order; row < Math.min(rows, steps * order); row += order) starts.push(row);
  return starts;
}

/** Reads a table file. Throws DataError for anything malformed. */
export function parseTables(data: Uint8Array): TableFile {
  try {
    if (data.length > MAX_BYTES) throw new Error(`more than ${MAX_BYTES} bytes`);
    const { tensors, metadata } = loadTensors(data);
    const heads = JSON.parse(metadata[FORMAT] as string) as Record<string, Record<string, unknown>>;
    const groups = new Map(Object.entries(heads).map(([name, head]) => [name, new Group(name, head, tensors)]));
    if (groups.size === 0) throw new Error(`no tables of format ${FORMAT}`);
    return new TableFile(groups);
  } catch (error) {
    const came = `the sampler tables do not parse (${shown(describeError(error), 160)})`;
    throw new DataError(came, "what docs/sampling.md describes", "Get the bundle again, or package the model again");
  }
}

export class TableFile {
  constructor(private readonly groups: ReadonlyMap<string, Group>) {}

  /** The table, made when asked for; undefined where the file has none. */
  get(name: string, steps: number): SamplerTable | undefined {
    return this.groups.get(name)?.table(steps);
  }

  names(): string[] {
    return [...this.groups.keys()];
  }
}

const PER_ROW = ["timestep", "alpha", "sigma", "noise_coef"] as const;
const FLOATS = [...PER_ROW, "init_scale", "input_coef", "output_coef", "warm_coef"] as const;

/** One sampler's arrays, checked whole on construction (Error says what is wrong). */
class Group {
  private readonly predictionType: PredictionType;
  private readonly order: number;
  private readonly p: number;
  private readonly q: number;
  private readonly steps: Int32Array;
  private readonly rowCounts: Int32Array;
  private readonly draws: Uint8Array;
  private readonly warmRows: Uint8Array;
  private readonly floats: Record<(typeof FLOATS)[number], Float32Array>;
  private readonly rowAt: number[] = [0];
  private readonly startAt: number[] = [0];
  private readonly coefAt: number[] = [0];

  constructor(
    private readonly name: string,
    head: Record<string, unknown>,
    private readonly arrays: ReadonlyMap<string, Tensor<Data>>,
  ) {
    const [order, p, q] = [head.order, head.inputs, head.outputs] as number[];
    this.require(PREDICTION_TYPES.includes(head.prediction_type as PredictionType), "prediction type");
    this.require(within(order, 1, 4), "order");
    this.require(within(p, 1, MAX_INPUTS) && within(q, 1, MAX_OUTPUTS), "more past inputs or outputs than allowed");
    this.predictionType = head.prediction_type as PredictionType;
    [this.order, this.p, this.q] = [order as number, p as number, q as number];
    this.steps = this.part("steps", Int32Array);
    this.rowCounts = this.part("rows", Int32Array);
    this.draws = this.part("draws", Uint8Array);
    this.warmRows = this.part("warm_rows", Uint8Array);
    this.floats = Object.fromEntries(FLOATS.map((key) => [key, this.part(key, Float32Array)])) as Group["floats"];
    this.checkSteps();
    this.checkRows();
    this.checkStarts();
  }

  table(steps: number): SamplerTable | undefined {
    const at = this.steps.indexOf(steps);
    if (at < 0) return undefined;
    const [from, to] = [this.rowAt[at] as number, this.rowAt[at + 1] as number];
    // A short run has a shorter memory than its sampler's widest band: columns it never uses are left off again.
    const p = usedColumns(this.floats.input_coef, from, to, this.p);
    const q = usedColumns(this.floats.output_coef, from, to, this.q);
    const starts = new Map<number, Rows>();
    possibleStarts(to - from, steps, this.order).forEach((start, i) => {
      starts.set(start, this.warmUp((this.startAt[at] as number) + i, p, q));
    });
    const rowsOf = (coef: Float32Array, wide: number, used: number): Float32Array[] =>
      Array.from({ length: to - from }, (_, i) => coef.subarray((from + i) * wide, (from + i) * wide + used));
    const row = (key: (typeof PER_ROW)[number]): Float32Array => this.floats[key].subarray(from, to);
    return new SamplerTable(
      this.name, steps, this.predictionType, row("timestep"), row("alpha"), row("sigma"),
      rowsOf(this.floats.input_coef, this.p, p), rowsOf(this.floats.output_coef, this.q, q), row("noise_coef"),
      Array.from(this.draws.subarray(from, to), Boolean), this.floats.init_scale[at] as number, this.order, starts,
    );
  }

  /** Warm-up row k has seen k+1 inputs and outputs, so only that triangle is stored: inputs, outputs, noise. */
  private warmUp(number: number, p: number, q: number): Rows {
    const count = this.warmRows[number] as number;
    const flat = this.floats.warm_coef;
    let at = this.coefAt[number] as number;
    const input = [];
    const output = [];
    const noise = new Float32Array(count);
    for (let k = 0; k < count; k++) {
      const i = Math.min(k + 1, this.p);
      const o = Math.min(k + 1, this.q);
      const wide = [new Float32Array(this.p), new Float32Array(this.q)] as const;
      wide[0].set(flat.subarray(at, at + i));
      wide[1].set(flat.subarray(at + i, at + i + o));
      noise[k] = flat[at + i + o] as number;
      input.push(wide[0].subarray(0, p));
      output.push(wide[1].subarray(0, q));
      at += i + o + 1;
    }
    return { inputCoef: input, outputCoef: output, noiseCoef: noise };
  }

  private checkSteps(): void {
    const { steps, rowCounts } = this;
    this.require(steps.length >= 1 && steps.length <= MAX_STEPS && rowCounts.length === steps.length, "steps and rows");
    const rising = steps.every((n, i) => n > (i === 0 ? 0 : (steps[i - 1] as number)) && n <= MAX_STEPS);
    this.require(rising, "step counts must rise");
    this.require(rowCounts.every((n) => within(n, 1, 8 * MAX_STEPS)), "row counts");
    this.require(this.floats.init_scale.length === steps.length, "init_scale");
  }

  private checkRows(): void {
    for (const count of this.rowCounts) this.rowAt.push((this.rowAt.at(-1) as number) + count);
    const total = this.rowAt.at(-1) as number;
    const { alpha, sigma } = this.floats;
    this.require([...PER_ROW.map((key) => this.floats[key]), this.draws].every((a) => a.length === total), "an array's length");
    this.requireShape("input_coef", [total, this.p]);
    this.requireShape("output_coef", [total, this.q]);
    this.require(this.draws.every((d) => d <= 1) && alpha.every((a) => a >= 0) && sigma.every((s) => s >= 0), "a sign");
    this.require(alpha.every((a, i) => a + (sigma[i] as number) > 0), "a row without signal and noise");
    this.require(this.predictionType !== "epsilon" || alpha.every((a) => a > 0), "alpha 0 with epsilon prediction");
  }

  private checkStarts(): void {
    const packed = (count: number): number => {
      let floats = 0;
      for (let k = 0; k < count; k++) floats += Math.min(k + 1, this.p) + Math.min(k + 1, this.q) + 1;
      return floats;
    };
    const room: number[] = [];
    this.steps.forEach((steps, i) => {
      const rows = this.rowCounts[i] as number;
      const starts = possibleStarts(rows, steps, this.order);
      room.push(...starts.map((start) => rows - start));
      this.startAt.push((this.startAt.at(-1) as number) + starts.length);
    });
    this.require(this.warmRows.length === room.length, "the number of starts");
    for (const count of this.warmRows) this.coefAt.push((this.coefAt.at(-1) as number) + packed(count));
    this.require(this.floats.warm_coef.length === this.coefAt.at(-1), "the number of warm-up coefficients");
    this.require(this.warmRows.every((count, i) => count <= (room[i] as number)), "a warm-up longer than its run");
  }

  private part<D extends Data>(key: string, kind: new (n: number) => D): D {
    const found = this.arrays.get(`${this.name}/${key}`);
    this.require(found !== undefined && found.data instanceof kind, `array ${key} is missing or of another type`);
    const { data, shape } = found as Tensor<Data>;
    this.require(shape.length === (key === "input_coef" || key === "output_coef" ? 2 : 1), `array ${key}`);
    this.require(allFinite(data), "numbers that are not finite");
    return data as D;
  }

  private requireShape(key: string, shape: number[]): void {
    this.require(this.arrays.get(`${this.name}/${key}`)?.shape.join() === shape.join(), "a band's shape");
  }

  private require(good: boolean, what: string): void {
    if (!good) throw new Error(`${this.name.slice(0, 64)}: ${what}`);
  }
}

function within(value: unknown, low: number, high: number): boolean {
  return Number.isInteger(value) && (value as number) >= low && (value as number) <= high;
}

function usedColumns(coef: Float32Array, from: number, to: number, columns: number): number {
  let used = 1;
  for (let row = from; row < to; row++) {
    for (let c = used; c < columns; c++) if (coef[row * columns + c] !== 0) used = c + 1;
  }
  return used;
}
