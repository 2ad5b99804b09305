/** A bundle's components in ONNX Runtime Web. Mirrors edgesd/targets/_session.py and onnx_web.py. */

import type * as Ort from "onnxruntime-web";
import { choose, widthsOf, type Chosen, type Variant, type Wanted } from "./choose.js";
import { DataError, EdgesdError, RequestError, SetupError, describeError, shown } from "./errors.js";
import type { Manifest, Role } from "./manifest.js";
import type { Inputs, Session } from "./session.js";
import type { Data, Tensor, Tensors } from "./tensor.js";

export interface OnnxOptions extends Wanted {
  /** `import * as ort from "onnxruntime-web/wasm"` (or "/webgpu"), with its `env.wasm` set by the caller. */
  readonly ort: typeof Ort;
  /** The adapter's shader-f16; without it float16 variants are left out. */
  readonly f16?: boolean;
  /** Opening a component lets go of the others: for devices with little memory. */
  readonly oneAtATime?: boolean;
  /** Told when a component has been opened. */
  readonly opened?: (role: Role, seconds: number) => void;
}

type Reader = (path: string) => Promise<Uint8Array>;
type Call = { session: Ort.InferenceSession; variant: Variant };

/** A session over the variants of a bundle; `read` gives the verified bytes of a listed file. */
export class OnnxSession implements Session {
  private readonly chosen = new Map<Role, Chosen>();
  private readonly calls = new Map<string, Promise<Call[]>>();

  constructor(
    private readonly manifest: Manifest,
    private readonly read: Reader,
    private readonly options: OnnxOptions,
  ) {
    const wide = { ...options, width: options.width ?? widthsOf(manifest, "unet")[0] ?? 1 };
    for (const { name } of manifest.components) this.chosen.set(name, choose(manifest, name, wide, options.f16 ?? false));
  }

  /** The files that this choice of variants opens, the UNet at every width: a policy may narrow it at any time. */
  files(): string[] {
    const narrow = this.widths("unet").map((width) => choose(this.manifest, "unet", { ...this.options, width }, this.options.f16 ?? false));
    const opened = [...this.chosen.values(), ...narrow].flatMap((chosen) => [...chosen.values()].flat());
    return [...new Set(opened.flatMap((variant) => variant.files))];
  }

  has(role: Role): boolean {
    return this.chosen.has(role);
  }

  batches(role: Role): number[] {
    return [...this.of(role).keys()];
  }

  widths(role: Role): number[] {
    return widthsOf(this.manifest, role);
  }

  /** The variant in use, of the smallest batch. */
  variant(role: Role): Variant {
    return ([...this.of(role).values()][0] as readonly Variant[])[0] as Variant;
  }

  async useWidth(role: Role, width: number): Promise<void> {
    if (this.variant(role).axes.width === width) return;
    const next = choose(this.manifest, role, { ...this.options, width }, this.options.f16 ?? false);
    await this.unload(role);
    this.chosen.set(role, next);
  }

  async load(role: Role): Promise<void> {
    await this.opened(role, Math.max(...this.batches(role)));
  }

  async unload(role: Role): Promise<void> {
    for (const batch of this.batches(role)) {
      const key = `${role}/${batch}`;
      const open = this.calls.get(key);
      this.calls.delete(key);
      for (const { session } of (await open?.catch(() => [])) ?? []) await session.release();
    }
  }

  /** Gives all memory back. */
  async close(): Promise<void> {
    for (const role of this.chosen.keys()) await this.unload(role);
  }

  async run(role: Role, inputs: Inputs): Promise<Tensors> {
    const chosen = this.of(role);
    const rows = Object.values(inputs).map(({ shape }) => shape[0] ?? 0).filter((n) => chosen.has(n));
    const batch = rows.length > 0 ? Math.max(...rows) : (this.batches(role)[0] as number);
    const chunks = chosen.get(batch) as readonly Variant[];
    checkInputs(role, chunks, inputs);
    const known: Inputs = { ...inputs };
    for (const { session, variant } of await this.opened(role, batch)) {
      Object.assign(known, await this.call(role, session, variant, known));
    }
    return Object.fromEntries((chunks.at(-1) as Variant).outputs.map(({ name }) => [name, known[name] as Tensor]));
  }

  private async call(role: Role, session: Ort.InferenceSession, variant: Variant, known: Inputs): Promise<Tensors> {
    const { ort } = this.options;
    const feeds = Object.fromEntries(variant.inputs.map((spec) => {
      const { data } = known[spec.name] as Tensor<Data>;
      return [spec.name, new ort.Tensor(spec.dtype as "float32", typed(data, spec.dtype) as Float32Array, spec.shape)];
    }));
    try {
      const made = await session.run(feeds);
      return Object.fromEntries(variant.outputs.map(({ name, shape }) => {
        const value = made[name] as Ort.Tensor;
        return [name, { data: Float32Array.from(value.data as Float32Array), shape }];
      }));
    } catch (error) {
      throw memoryOr(error, () => {
        const fix = "Check the inputs, try the other backend, or package the model again";
        return new DataError(`${role} stopped while running: ${reason(error)}`, "a run to the end", fix);
      });
    }
  }

  private of(role: Role): Chosen {
    const chosen = this.chosen.get(role);
    if (chosen === undefined) {
      throw new RequestError(`the bundle has no component ${JSON.stringify(role)}`, [...this.chosen.keys()].join(", "), "Package the model with it");
    }
    return chosen;
  }

  private async opened(role: Role, batch: number): Promise<Call[]> {
    const key = `${role}/${batch}`;
    let open = this.calls.get(key);
    if (open === undefined) {
      if (this.options.oneAtATime === true) for (const other of this.chosen.keys()) if (other !== role) await this.unload(other);
      open = this.open(role, this.of(role).get(batch) as readonly Variant[]);
      this.calls.set(key, open);
      open.catch(() => this.calls.delete(key));
    }
    return open;
  }

  private async open(role: Role, chunks: readonly Variant[]): Promise<Call[]> {
    const began = performance.now();
    const calls: Call[] = [];
    for (const variant of chunks) calls.push({ variant, session: await this.openVariant(variant) });
    this.options.opened?.(role, (performance.now() - began) / 1000);
    return calls;
  }

  private async openVariant(variant: Variant): Promise<Ort.InferenceSession> {
    const [graph, ...weights] = variant.files as [string, ...string[]];
    try {
      // A graph names its weights by the file alone, beside it.
      const externalData = [];
      for (const path of weights) externalData.push({ path: path.split("/").pop() as string, data: await this.read(path) });
      return await this.options.ort.InferenceSession.create(await this.read(graph), {
        executionProviders: [this.options.form], externalData, graphOptimizationLevel: "all", logSeverityLevel: 3,
        enableMemPattern: true, extra: { session: { use_ort_model_bytes_directly: "1" } },
      });
    } catch (error) {
      throw memoryOr(error, () => {
        const fix = "Get the bundle again, try the other backend, or package the model again";
        return new DataError(`${graph} does not load: ${reason(error)}`, "a whole file that this backend can run", fix);
      });
    }
  }
}

function checkInputs(role: Role, chunks: readonly Variant[], inputs: Inputs): void {
  const made = new Set<string>();
  const needed = new Map<string, readonly number[]>();
  for (const variant of chunks) {
    for (const { name, shape } of variant.inputs) if (!made.has(name)) needed.set(name, shape);
    for (const { name } of variant.outputs) made.add(name);
  }
  const wrong = [...Object.keys(inputs).filter((name) => !needed.has(name)), ...[...needed.keys()].filter((name) => !(name in inputs))];
  if (wrong.length > 0) {
    throw new RequestError(`inputs of ${role} differ in ${wrong.join(", ")}`, [...needed.keys()].join(", "), "Pass exactly these");
  }
  for (const [name, shape] of needed) {
    const got = (inputs[name] as Tensor<Data>).shape;
    if (got.join() !== shape.join()) {
      const fix = "Pass that shape, or package the model for this one";
      throw new RequestError(`${role} got ${name} of shape [${got.join(", ")}]`, `[${shape.join(", ")}]`, fix);
    }
  }
}

function typed(data: Data, dtype: string): Data {
  if (dtype === "int64") return data instanceof BigInt64Array ? data : BigInt64Array.from(data as Float32Array, BigInt);
  if (dtype === "int32") return data instanceof Int32Array ? data : Int32Array.from(data as Float32Array, Number);
  return data instanceof Float32Array ? data : Float32Array.from(data as Float64Array);
}

/** Out of memory has words of its own: WebAssembly and WebGPU report it in many ways. */
function memoryOr(error: unknown, otherwise: () => EdgesdError): EdgesdError {
  if (error instanceof EdgesdError) return error;
  const text = describeError(error);
  if (error instanceof RangeError || /out of memory|bad_alloc|allocation failed|failed to allocate|memory access|OOM|device lost|\b\d{6,}\b$/i.test(text)) {
    const fix = "Close other tabs, choose a smaller width or bundle, or tick “one component at a time”";
    return new SetupError(`this browser ran out of memory (${reason(error)})`, "room for the model", fix);
  }
  return otherwise();
}

function reason(error: unknown): string {
  return shown(describeError(error).split("\n")[0], 300);
}
