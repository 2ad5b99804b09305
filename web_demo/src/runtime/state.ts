/** Where a run begins: noise, a picture, another table's run (the bridge), or a saved state. Mirrors edgesd/runtime/state.py. */

import { DataError, RequestError, describeError, shown } from "./errors.js";
import type { SamplerTable } from "./table.js";
import { allFinite, dumpTensors, loadTensors, type Data, type Tensor } from "./tensor.js";

const FORMAT = "edgesd-state-1";
const f32 = Math.fround;

/** All that a run needs to go on at `row`: inputs (u_row first) and outputs (e_{row-1} first). start: where it began. */
export interface State {
  readonly row: number;
  readonly start: number;
  readonly inputs: readonly Float32Array[];
  readonly outputs: readonly Float32Array[];
}

/** The UNet's input at row 0 from standard normals. */
export function initLatents(table: SamplerTable, noise: Float32Array): Float32Array {
  return noise.map((z) => table.initScale * z);
}

/** x0 at the noise of a row, as the UNet's input there; at row == table.rows, after the last, x0 itself. */
export function addNoise(table: SamplerTable, row: number, x0: Float32Array, noise: Float32Array): Float32Array {
  if (row === table.rows) return x0;
  const [alpha, sigma] = [table.alpha[row] as number, table.sigma[row] as number];
  return x0.map((x, i) => f32(alpha * x) + f32(sigma * (noise[i] as number)));
}

/**
 * Leaves `table` after the UNet's call at `row` and enters `other` at its nearest lower noise level (a DDIM step).
 * Where no row of `other` lies lower, the state is its end and holds x0.
 */
export function bridge(
  table: SamplerTable, row: number, sample: Float32Array, modelOutput: Float32Array, other: SamplerTable,
): State {
  const x0 = predictX0(table, row, sample, modelOutput);
  const [alpha, sigma] = [table.alpha[row] as number, table.sigma[row] as number];
  const level = sigma / Math.max(alpha, 1e-30);
  for (const entry of [0, ...[...other.starts.keys()].sort((a, b) => a - b)]) {
    if ((other.sigma[entry] as number) < level * (1 - 1e-6) * (other.alpha[entry] as number)) {
      const eps = sample.map((u, i) => f32(u - f32(alpha * (x0[i] as number))) / sigma);
      return { row: entry, start: entry, inputs: [addNoise(other, entry, x0, eps)], outputs: [] };
    }
  }
  return { row: other.rows, start: 0, inputs: [x0], outputs: [] };
}

/** x0 as a row predicts it. */
export function predictX0(table: SamplerTable, row: number, sample: Float32Array, modelOutput: Float32Array): Float32Array {
  const [skip, out] = table.x0Coefficients(row);
  return sample.map((u, i) => f32(skip * u) + f32(out * (modelOutput[i] as number)));
}

/** A run's state as the bytes of a file that edgesd reads in every language. shape: of its arrays, [B,C,h,w]. */
export function dumpState(table: SamplerTable, state: State, shape: readonly number[], owner = ""): Uint8Array {
  const arrays = new Map<string, Tensor<Data>>();
  state.inputs.forEach((data, i) => arrays.set(`input_${i}`, { data, shape }));
  state.outputs.forEach((data, i) => arrays.set(`output_${i}`, { data, shape }));
  arrays.set("row", { data: new Int32Array([state.row, state.start]), shape: [2] });
  return dumpTensors(arrays, { format: FORMAT, sampler: table.name, steps: String(table.steps), owner });
}

/** Reads a state for `table`. RequestError when it is another table's or owner's; DataError when it is broken. */
export function loadState(file: Uint8Array, table: SamplerTable, owner = ""): State {
  let found: State;
  let head: Record<string, string>;
  try {
    const { tensors, metadata } = loadTensors(file);
    head = metadata;
    const at = tensors.get("row")?.data;
    if (head.format !== FORMAT || !(at instanceof Int32Array) || at.length !== 2) throw new Error("no state file");
    const inputs = numbered(tensors, "input");
    const outputs = numbered(tensors, "output");
    const lengths = new Set([...inputs, ...outputs].map((array) => array.length));
    if (tensors.size !== 1 + inputs.length + outputs.length || lengths.size !== 1) throw new Error("arrays that do not belong together");
    found = { row: at[0] as number, start: at[1] as number, inputs, outputs };
  } catch (error) {
    const came = `the saved run does not read (${shown(describeError(error), 120)})`;
    throw new DataError(came, "a file that edgesd saved on pause", "Draw the picture anew");
  }
  if (head.sampler !== table.name || head.steps !== String(table.steps)) {
    const came = `a run of ${shown(head.steps, 8)} steps of ${shown(head.sampler, 64)}`;
    throw new RequestError(came, `${table.steps} steps of ${table.name}`, "Resume with the same settings");
  }
  if (head.owner !== owner) {
    throw new RequestError("the saved run of another picture", "the same prompt, seed, settings and model", "Draw it anew");
  }
  checkFits(found, table);
  return found;
}

/** A run that began at `start` has seen so many inputs and outputs by now; with fewer it would go on wrongly. */
function checkFits({ row, start, inputs, outputs }: State, table: SamplerTable): void {
  const seen = row - start;
  const allowed = start >= 0 && start <= row && row <= table.rows && (start === 0 || table.starts.has(start));
  const counts = inputs.length === Math.min(seen + 1, table.band.inputs) && outputs.length === Math.min(seen, table.band.outputs - 1);
  if (!allowed || !counts) {
    throw new DataError("the saved run does not fit its table", `rows 0 to ${table.rows}`, "Draw the picture anew");
  }
}

function numbered(tensors: Map<string, Tensor<Data>>, kind: string): Float32Array[] {
  const found: Float32Array[] = [];
  for (let one; (one = tensors.get(`${kind}_${found.length}`)) !== undefined; ) {
    if (!(one.data instanceof Float32Array) || one.shape.length !== 4 || one.data.length === 0 || !allFinite(one.data)) {
      throw new Error(`${kind} ${found.length} is no finite float32 [B,C,h,w]`);
    }
    found.push(one.data);
  }
  return found;
}
