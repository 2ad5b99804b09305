/** Times UNets against each other: each opened once, then called in turn, so that all see the same machine. */

import { OnnxSession, describeError, parseManifest, tensor, type Variant } from "../runtime/index.js";
import { runtime } from "./ort.js";

export interface BenchJob {
  /** Names and addresses of folders with a manifest; precision picks the variant. */
  models: { name: string; address: string; precision: string }[];
  form: "wasm" | "webgpu";
  threads: number;
  /** Time to spend on calls, after one that is not counted. */
  seconds: number;
}

export interface BenchResult {
  threads: number;
  /** Seconds, by name. open: bytes at hand to a session that is ready; first: its first call. */
  open: Record<string, number>;
  first: Record<string, number>;
  calls: Record<string, number[]>;
}

onmessage = ({ data }: MessageEvent<BenchJob>) => {
  measure(data).then((result) => postMessage(result), (error: unknown) => postMessage(describeError(error)));
};

async function measure({ models, form, threads: wanted, seconds }: BenchJob): Promise<BenchResult> {
  const { ort, threads } = await runtime(form, wanted, []);
  const result: BenchResult = { threads, open: {}, first: {}, calls: {} };
  const turns: [string, () => Promise<number>][] = [];
  for (const { name, address, precision } of models) {
    const manifest = parseManifest(new Uint8Array(await (await fetch(`${address}manifest.json`)).arrayBuffer()));
    const only = { ...manifest, components: manifest.components.filter((component) => component.name === "unet") };
    const files = new Map<string, Uint8Array>();
    const read = async (path: string): Promise<Uint8Array> => files.get(path) as Uint8Array;
    const session = new OnnxSession(only, read, { ort, form, precision });
    if (session.variant("unet").axes.precision !== precision) throw new Error(`${name} has no ${precision}`);
    for (const path of session.files()) files.set(path, new Uint8Array(await (await fetch(address + path)).arrayBuffer()));
    const inputs = inputsOf(session.variant("unet"));
    const call = (): Promise<number> => timed(() => session.run("unet", inputs));
    result.open[name] = await timed(() => session.load("unet"));
    files.clear();
    result.first[name] = await call();
    result.calls[name] = [];
    turns.push([name, call]);
  }
  const until = performance.now() + seconds * 1000;
  for (let round = 0; round < 3 || performance.now() < until; round++) {
    for (const [name, call] of turns) result.calls[name]?.push(await call());
  }
  return result;
}

async function timed(work: () => Promise<unknown>): Promise<number> {
  const began = performance.now();
  await work();
  return (performance.now() - began) / 1000;
}

/** Inputs of ordinary size: what they hold does not change the time. */
function inputsOf(variant: Variant): Record<string, ReturnType<typeof tensor<Float32Array>>> {
  return Object.fromEntries(variant.inputs.map(({ name, shape }) => {
    const count = shape.reduce((product, dim) => product * dim, 1);
    return [name, tensor(Float32Array.from({ length: count }, (_, i) => (name === "timestep" ? 500 : Math.sin(i))), shape)];
  }));
}
