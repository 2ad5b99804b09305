/**
 * The loop: a table's rows through a model. Mirrors edgesd/runtime/loop.py; nothing else of a sampler is ported.
 *
 * Sums are float32, input columns first, then output columns, then noise, newest first, zero coefficients skipped.
 */

import { RequestError } from "./errors.js";
import { predictX0, type State } from "./state.js";
import type { SamplerTable } from "./table.js";

const f32 = Math.fround;

/** One finished row. sample: the UNet's input; latents: its next one, or the finished latents; state: to resume. */
export class Step {
  constructor(
    readonly table: SamplerTable,
    readonly row: number,
    readonly sample: Float32Array,
    readonly modelOutput: Float32Array,
    readonly latents: Float32Array,
    readonly state: State,
  ) {}

  get timestep(): number {
    return this.table.timestep[this.row] as number;
  }

  /** x0 as this row predicts it: the preview, and the picture when a run stops early. */
  get denoised(): Float32Array {
    return predictX0(this.table, this.row, this.sample, this.modelOutput);
  }

  get last(): boolean {
    return this.row === this.table.rows - 1;
  }
}

export interface Run {
  table: SamplerTable;
  /** (sample, row) -> model output of the same length. */
  denoise: (sample: Float32Array, row: number) => Promise<Float32Array> | Float32Array;
  /** The UNet's input at `start`; not looked at with `state`. */
  latents: Float32Array;
  /** A row's normals. */
  noise: (row: number) => Float32Array;
  start?: number;
  state?: State | undefined;
  /** May replace what the coming row gets (inpainting; row == table.rows: the result). */
  adjust?: ((latents: Float32Array, row: number) => Float32Array) | undefined;
}

/** Yields a Step per row. Throws RequestError for a start that the table has no warm-up for. */
export async function* run({ table, denoise, latents, noise, start = 0, state, adjust }: Run): AsyncGenerator<Step, void> {
  const from = state ?? { row: start, start, inputs: [latents], outputs: [] };
  if (from.start > 0 && !table.starts.has(from.start)) {
    throw new RequestError(`a start at row ${from.start}`, `0 or one of ${[...table.starts.keys()].join(", ")}`, "Choose one of these");
  }
  let inputs = [...from.inputs];
  let outputs = [...from.outputs];
  for (let row = from.row; row < table.rows; row++) {
    const sample = inputs[0] as Float32Array;
    const modelOutput = await denoise(sample, row);
    outputs = [modelOutput, ...outputs];
    const { input, output, noise: noiseCoef } = table.coefficients(row, from.start);
    const terms: [number, Float32Array][] = [];
    input.forEach((coef, i) => inputs[i] !== undefined && terms.push([coef, inputs[i]]));
    output.forEach((coef, i) => outputs[i] !== undefined && terms.push([coef, outputs[i]]));
    // Drawn even where it is not used: the order of draws is part of the result.
    if (table.draws[row] === true) terms.push([noiseCoef, noise(row)]);
    const total = sumOf(terms);
    inputs = [adjust === undefined ? total : adjust(total, row + 1), ...inputs].slice(0, table.band.inputs);
    outputs = outputs.slice(0, table.band.outputs - 1);
    const after = { row: row + 1, start: from.start, inputs, outputs };
    yield new Step(table, row, sample, modelOutput, inputs[0] as Float32Array, after);
  }
}

function sumOf(terms: readonly [number, Float32Array][]): Float32Array {
  const [[first, newest], ...rest] = terms as [[number, Float32Array], ...[number, Float32Array][]];
  const total = newest.map((x) => first * x);
  for (const [coef, array] of rest) {
    if (coef === 0) continue;
    for (let i = 0; i < total.length; i++) total[i] = (total[i] as number) + f32(coef * (array[i] as number));
  }
  return total;
}
