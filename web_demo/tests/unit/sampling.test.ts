import { describe, expect, it } from "vitest";
import { run, type Step } from "../../src/runtime/loop.js";
import { Philox, Purpose } from "../../src/runtime/noise.js";
import { addNoise, bridge, dumpState, initLatents, loadState, type State } from "../../src/runtime/state.js";
import { parseTables, type SamplerTable } from "../../src/runtime/table.js";
import { expectClose, golden } from "./golden.js";

interface Rows { input_coef: number[][]; output_coef: number[][]; noise_coef: number[] }
interface TableJson extends Rows {
  name: string; steps: number; prediction_type: string; timestep: number[]; alpha: number[]; sigma: number[]; draws: boolean[];
  init_scale: number; order: number; starts: Record<string, Rows>;
}
interface RunJson {
  table: number; start: number; begin: number[]; first_x0: number[]; final: number[];
  resume?: { row: number; start: number; inputs: number[][]; outputs: number[][] };
}
interface BridgeJson {
  from: number; row: number; to: number; sample: number[]; model_output: number[]; entry_row: number; entry: number[]; final: number[];
}
interface Golden {
  seed: number; shape: number[]; x0: number[]; file_base64: string; tables: TableJson[]; runs: RunJson[]; bridges: BridgeJson[];
}

const wanted = golden<Golden>("sampling");
const bytes = Uint8Array.from(Buffer.from(wanted.file_base64, "base64"));
const file = parseTables(bytes);
const tables = wanted.tables.map(({ name, steps }) => file.get(name, steps) as SamplerTable);
const source = new Philox(wanted.seed);
const count = wanted.x0.length;
const z = source.normal(count, 0, 0, Purpose.START);
const lists = (rows: readonly Float32Array[]): number[][] => rows.map((row) => [...row]);
const f32 = (values: number[]): number[] => values.map(Math.fround);

async function steps(table: SamplerTable, latents: Float32Array, start = 0, state?: State): Promise<Step[]> {
  const denoise = (u: Float32Array, row: number): Float32Array => u.map((x) => (1.2 * x + 0.0001 * (table.timestep[row] as number)) / (1 + 0.5 * x * x));
  const noise = (row: number): Float32Array => source.normal(count, 0, row, Purpose.STEP);
  const made = [];
  for await (const step of run({ table, denoise, latents, noise, start, ...(state && { state }) })) made.push(step);
  return made;
}

describe("sampler tables", () => {
  it.each(wanted.tables.map((table, i) => ({ table, i })))("reads $table.name with $table.steps steps", ({ table, i }) => {
    const read = tables[i] as SamplerTable;
    expect(lists(read.inputCoef)).toEqual(table.input_coef.map(f32));
    expect(lists(read.outputCoef)).toEqual(table.output_coef.map(f32));
    for (const key of ["timestep", "alpha", "sigma"] as const) expect([...read[key]]).toEqual(f32(table[key]));
    expect([...read.noiseCoef]).toEqual(f32(table.noise_coef));
    expect(read.draws).toEqual(table.draws);
    expect([read.predictionType, read.order, read.initScale]).toEqual([table.prediction_type, table.order, Math.fround(table.init_scale)]);
    expect([...read.starts.keys()].map(String)).toEqual(Object.keys(table.starts));
    for (const [start, rows] of read.starts) {
      expect(lists(rows.inputCoef)).toEqual(table.starts[start]?.input_coef.map(f32));
      expect(lists(rows.outputCoef)).toEqual(table.starts[start]?.output_coef.map(f32));
    }
  });

  it.each(wanted.runs)("runs table $table from row $start", async ({ table: number, start, begin, first_x0, final, resume }) => {
    const table = tables[number] as SamplerTable;
    const first = start === 0 ? initLatents(table, z) : addNoise(table, start, Float32Array.from(wanted.x0), z);
    expectClose(first, begin, 1e-6);
    const made = await steps(table, first, start);
    expectClose(made[0]?.denoised as Float32Array, first_x0, 1e-5);
    expectClose(made.at(-1)?.latents as Float32Array, final, 1e-5);
    if (resume === undefined) return;
    const state = { ...resume, inputs: resume.inputs.map((a) => Float32Array.from(a)), outputs: resume.outputs.map((a) => Float32Array.from(a)) };
    const rest = await steps(table, first, 0, state);
    expectClose(rest.at(-1)?.latents as Float32Array, final, 1e-5);
  });

  it.each(wanted.bridges)("bridges from table $from at row $row to table $to", async (one) => {
    const [leave, enter] = [tables[one.from] as SamplerTable, tables[one.to] as SamplerTable];
    const state = bridge(leave, one.row, Float32Array.from(one.sample), Float32Array.from(one.model_output), enter);
    expect(state.row).toBe(one.entry_row);
    expectClose(state.inputs[0] as Float32Array, one.entry, 1e-5);
    const rest = await steps(enter, state.inputs[0] as Float32Array, 0, state);
    expectClose(rest.at(-1)?.latents ?? (state.inputs[0] as Float32Array), one.final, 1e-5);
  });

  it("goes on to the same bits from a saved state", async () => {
    for (const table of tables.filter((one) => one.rows > 2)) {
      const whole = await steps(table, initLatents(table, z));
      const middle = whole[Math.floor(whole.length / 2)] as Step;
      const saved = dumpState(table, middle.state, [1, ...wanted.shape.slice(1)], "me");
      const rest = await steps(table, new Float32Array(), 0, loadState(saved, table, "me"));
      expect(rest.at(-1)?.latents).toEqual(whole.at(-1)?.latents);
      expect(() => loadState(saved, table, "you")).toThrow("another picture");
      const other = tables.find((one) => one.steps !== table.steps) as SamplerTable;
      expect(() => loadState(saved, other, "me")).toThrow("Resume with the same settings");
    }
  });

  it("runs 12 samplers at 4 step counts, and from their starts, as Python does", async () => {
    const grid = golden<{ file_base64: string; runs: (RunJson & { sampler: string; steps: number })[] }>("grid");
    const made = parseTables(Uint8Array.from(Buffer.from(grid.file_base64, "base64")));
    expect(grid.runs.length).toBeGreaterThan(100);
    for (const { sampler, steps: count, start, begin, first_x0, final } of grid.runs) {
      const table = made.get(sampler, count) as SamplerTable;
      const first = start === 0 ? initLatents(table, z) : addNoise(table, start, Float32Array.from(wanted.x0), z);
      expectClose(first, begin, 1e-6);
      const run = await steps(table, first, start);
      expectClose(run[0]?.denoised as Float32Array, first_x0, 1e-5);
      expectClose(run.at(-1)?.latents as Float32Array, final, 1e-5);
    }
  });

  it("refuses broken files", () => {
    for (const cut of [0, 7, 100, bytes.length - 1]) expect(() => parseTables(bytes.subarray(0, cut))).toThrow("do not parse");
    const spoiled = bytes.slice();
    spoiled.fill(255, spoiled.length - 400); // NaN in float32
    expect(() => parseTables(spoiled)).toThrow("do not parse");
  });
});
