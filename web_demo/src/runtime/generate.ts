/**
 * A prompt becomes pictures: text once, then the table's rows through the UNet, then the VAE. Mirrors
 * edgesd/runtime/generate.py and stage.py, for one picture at a time and without a refiner (a second bundle).
 */

import { PromptCache } from "./cache.js";
import { Canvas, blank, concatenates, latentShape, pictureNoise, type PictureNoise, type Start } from "./canvas.js";
import { RequestError } from "./errors.js";
import { Replay, describeChange, type Change, type Governor } from "./governed.js";
import { toUint8, type Image } from "./image.js";
import { run, type Step } from "./loop.js";
import { Purpose } from "./noise.js";
import type { Pipeline } from "./pipeline.js";
import { callsOf, combine, makePlan, settled, type RunPlan } from "./plan.js";
import { check, resolve, type Settings } from "./settings.js";
import { bridge, initLatents, type State } from "./state.js";
import type { SamplerTable } from "./table.js";
import { rows, stack, type Tensor, type Tensors } from "./tensor.js";
import { conditions } from "./text.js";

const f32 = Math.fround;

/** A finished picture. latents: as the sampler left them; calls: UNet rows computed, guidance counted twice. */
export interface Picture {
  readonly image: Image;
  readonly latents: Float32Array;
  readonly settings: Settings;
  readonly calls: number;
  readonly stepsRun: number;
  readonly truncated: string;
  readonly notes: readonly string[];
}

export interface SampleOptions {
  start?: Start | null;
  cache?: PromptCache;
  /** A `step.state` of an earlier run with the same arguments; the picture equals the uninterrupted one's bits. */
  resume?: State | null;
  /** A policy, asked before every step; what it changed is in the picture's settings. */
  governor?: Governor | null;
  signal?: AbortSignal;
}

export interface GenerateOptions extends SampleOptions, Partial<Settings> {
  onStep?: (step: Step) => void;
}

/** Draws one picture. What is left out comes from the model. Throws the signal's reason when aborted. */
export async function generate(pipeline: Pipeline, prompt: string, options: GenerateOptions = {}): Promise<Picture> {
  const { onStep, start, cache, resume, governor, signal, ...said } = options;
  const given = { start: start ?? null, resume: resume ?? null, governor: governor ?? null, ...(cache && { cache }), ...(signal && { signal }) };
  for await (const event of sample(pipeline, resolve(pipeline.spec, prompt, said), given)) {
    if ("image" in event) return event;
    onStep?.(event);
  }
  throw new Error("the run ended without a picture");
}

/** Yields a Step per row, then the Picture. Leaving the loop, or the signal, cancels. */
export async function* sample(pipeline: Pipeline, settings: Settings, options: SampleOptions = {}): AsyncGenerator<Step | Picture, void> {
  const { cache = new PromptCache(), resume = null, signal } = options;
  check(settings);
  if (settings.refiner_start !== null) throw new RequestError("a refiner", "one bundle here", "Leave refiner_start out");
  if (resume !== null && settings.early_stop !== null) {
    throw new RequestError("a run to resume with early stop", "one without", "Draw the picture anew");
  }
  const governor = options.governor ?? (settings.changes.length > 0 ? new Replay(settings.changes) : null);
  if (governor !== null && resume !== null) throw new RequestError("a policy's run to resume", "one without", "Draw the picture anew");
  const { spec } = pipeline;
  const start = options.start ?? (concatenates(spec) ? blank(spec) : null);
  const table = pipeline.table(settings.sampler, settings.num_inference_steps);
  const at = options.start ? table.startRow(settings.strength) : 0;
  const shape = latentShape(spec, start);
  const noise = pictureNoise(settings, shape);
  const canvas = start === null ? null : await Canvas.make(pipeline, start, noise, at);
  const stage = await Stage.make(pipeline, table, settings, [1, ...shape], noise, cache, canvas);
  const latents = canvas === null ? initLatents(table, noise(0, Purpose.START)) : canvas.begin(table, at);
  for await (const step of stage.run(latents, at, resume, governor)) {
    signal?.throwIfAborted();
    yield step;
    signal?.throwIfAborted();
  }
  const step = stage.step;
  if (step === null) throw new RequestError("a run without steps", "at least one", "Raise the steps or the strength");
  const final = step.last ? step.latents : step.denoised;
  const notes = [...stage.changes.map(describeChange), ...(step.last ? [] : [stage.early(step)])];
  yield {
    image: await decode(pipeline, final, stage.shape), latents: final, settings: { ...settings, changes: stage.changes },
    calls: stage.calls, stepsRun: stage.rowsRun, truncated: stage.truncated, notes,
  };
}

/** Finished latents [1,C,h,w] -> picture. */
export async function decode(pipeline: Pipeline, latents: Float32Array, shape: readonly number[]): Promise<Image> {
  const { scaling_factor, shift_factor } = pipeline.spec.latent;
  const [scale, shift] = [f32(scaling_factor), f32(shift_factor)];
  const data = latents.map((x) => f32(x / scale) + shift);
  const made = await pipeline.session.run("vae_decoder", { latents: { data, shape } });
  return toUint8(made.image as Tensor);
}

/** A model's run: its table, its plan, and its UNet with all that it is told. */
class Stage {
  calls = 0;
  rowsRun = 0;
  step: Step | null = null;
  changes: Change[] = [];
  private bridges = 0;
  private plan: RunPlan;
  private until: number;
  private width: number;
  /** A switch of width by plan: from this share of the run on, that width; given up once a policy narrowed. */
  private switched: readonly [number, number] | null;

  private constructor(
    private readonly pipeline: Pipeline,
    private table: SamplerTable,
    private readonly settings: Settings,
    readonly shape: readonly number[],
    private readonly noise: PictureNoise,
    private readonly canvas: Canvas | null,
    private readonly cond: Tensors,
    private readonly uncond: Tensors | null,
    readonly truncated: string,
  ) {
    this.until = settings.guidance_until;
    this.width = settings.width;
    this.switched = settings.switch;
    this.plan = this.makePlan();
  }

  static async make(
    pipeline: Pipeline, table: SamplerTable, settings: Settings, shape: readonly number[], noise: PictureNoise,
    cache: PromptCache, canvas: Canvas | null,
  ): Promise<Stage> {
    const scale = pipeline.spec.latent.downscale;
    const sizePx: [number, number] = [(shape[2] as number) * scale, (shape[3] as number) * scale];
    const { told, truncated } = await conditions(pipeline, settings, sizePx, cache, false);
    const both = new Stage(pipeline, table, settings, shape, noise, canvas, told, null, truncated).plan.uncond.some(Boolean);
    const uncond = both ? (await conditions(pipeline, settings, sizePx, cache, true)).told : null;
    return new Stage(pipeline, table, settings, shape, noise, canvas, told, uncond, truncated);
  }

  private makePlan(): RunPlan {
    const { guidance_schedule, guidance_scale, guidance_rescale, early_stop } = this.settings;
    const embeds = this.pipeline.spec.guidance_embedding_dim > 0;
    const guidance = guidance_scale > 1 && !embeds ? guidance_scale : 1;
    return makePlan(guidance_schedule, this.table.rows, guidance, { until: this.until, rescale: guidance_rescale, earlyStop: early_stop });
  }

  /** Rows from `at` on, or from `resume`. A governor may send the rest of the run through another table. */
  async *run(latents: Float32Array, at: number, resume: State | null, governor: Governor | null): AsyncGenerator<Step, void> {
    if (governor !== null && this.rowsRun === 0) this.changes.push(...(await governor.ask(0, 0)));
    // A stream of noise, as torch's, must have drawn what the first part drew.
    for (let row = at; row < (resume?.row ?? at); row++) if (this.table.draws[row] === true) this.stepNoise(row);
    const adjust = this.canvas === null ? undefined : (u: Float32Array, row: number) => this.canvas?.adjust(this.table, u, row) ?? u;
    const steps = run({
      table: this.table, latents, start: at, state: resume ?? undefined, adjust,
      denoise: (sample, row) => this.denoise(sample, row), noise: (row) => this.stepNoise(row),
    });
    let before: Float32Array | null = null;
    for await (const step of steps) {
      this.step = step;
      this.rowsRun++;
      yield step;
      if (step.last) return;
      if (this.plan.earlyStop !== null) {
        const x0 = step.denoised;
        if (before !== null && settled(this.plan, before, x0)) return;
        before = x0;
      }
      const entered = governor === null ? null : await this.change(step, governor);
      if (entered !== null) {
        yield* this.run(entered.inputs[0] as Float32Array, entered.row, null, governor);
        return;
      }
    }
  }

  early(step: Step): string {
    return `stopped early after row ${step.row + 1} of ${step.table.rows}: ${callsOf(this.plan, step.row + 1)} UNet calls saved`;
  }

  /** A row's normals; after a bridge no row draws what a row before it drew. */
  private stepNoise(row: number): Float32Array {
    return this.noise(row + this.bridges * 65536, Purpose.STEP);
  }

  /** Lets the governor have its way after `step`; where that is another table, the state to enter it with. */
  private async change(step: Step, governor: Governor): Promise<State | null> {
    let entered: State | null = null;
    for (const change of await governor.ask(this.rowsRun, this.calls)) {
      const bridged = change.kind === "pause" ? null : this.bridge(step, change.steps);
      if (change.kind === "shorten" && bridged === null && change.steps !== this.table.steps) continue; // it would save nothing
      entered = bridged ?? entered;
      this.until = change.guidance_until;
      if (change.kind === "narrow" || change.kind === "shorten") [this.width, this.switched] = [change.width, null];
      this.plan = this.makePlan();
      this.changes.push(change);
    }
    return entered;
  }

  /** Enters the table of so many steps; null where it is the one in force, or has no fewer rows left. */
  private bridge(step: Step, steps: number): State | null {
    if (steps === this.table.steps) return null;
    const other = this.pipeline.table(this.settings.sampler, steps);
    const state = bridge(step.table, step.row, step.sample, step.modelOutput, other);
    const left = other.rows - state.row;
    if (left <= 0 || left >= step.table.rows - step.row - 1) return null;
    [this.table, this.bridges] = [other, this.bridges + 1];
    const latents = state.inputs[0] as Float32Array;
    const inputs = [this.canvas === null ? latents : this.canvas.adjust(other, latents, state.row)];
    return { row: state.row, start: state.row, inputs, outputs: [] };
  }

  /** The width of a row: the settings', a planned switch's, or what a policy narrowed it to. */
  private widthAt(row: number): number {
    if (this.switched === null) return this.width;
    const [share, second] = this.switched;
    const first = Math.min(this.table.rows, Math.max(0, Math.floor(share * this.table.rows + 0.5)));
    return row < first ? this.width : second;
  }

  /** Guidance over one or two halves, at the row's width. */
  private async denoise(sample: Float32Array, row: number): Promise<Float32Array> {
    await this.pipeline.session.useWidth("unet", this.widthAt(row));
    const whole: Tensor = { data: sample, shape: this.shape };
    if (this.plan.uncond[row] !== true || this.uncond === null) return this.predict(whole, row, this.cond);
    const { uncond } = this;
    const told = Object.fromEntries(Object.entries(this.cond).map(([name, value]) => [name, stack([uncond[name] as Tensor, value])]));
    const both = await this.predict(stack([whole, whole]), row, told);
    const half = sample.length;
    return combine(both.subarray(0, half), both.subarray(half), this.plan.guidance[row] as number, this.plan.rescale);
  }

  /** The UNet on one or two rows, in calls of the size that the session takes. */
  private async predict(sample: Tensor, row: number, told: Tensors): Promise<Float32Array> {
    const count = sample.shape[0] as number;
    const input = this.withExtra(sample);
    this.calls += count;
    const sizes = this.pipeline.session.batches("unet");
    const timestep: Tensor = { data: this.table.timestep.slice(row, row + 1), shape: [1] };
    const outputs: Tensor[] = [];
    for (let done = 0; done < count; ) {
      const next = done + Math.max(...sizes.filter((n) => n <= count - done));
      const part = Object.fromEntries(Object.entries(told).map(([name, value]) => [name, rows(value, done, next)]));
      const made = await this.pipeline.session.run("unet", { ...part, sample: rows(input, done, next), timestep });
      outputs.push(made.model_output as Tensor);
      done = next;
    }
    return stack(outputs).data;
  }

  /** The latents with what an inpainting UNet takes behind them, row by row. */
  private withExtra(sample: Tensor): Tensor {
    const extra = this.canvas?.channels() ?? null;
    if (extra === null) return sample;
    const [count, , height, width] = sample.shape as [number, number, number, number];
    const each = sample.data.length / count;
    const data = new Float32Array(count * (each + extra.length));
    for (let i = 0; i < count; i++) {
      data.set(sample.data.subarray(i * each, (i + 1) * each), i * (each + extra.length));
      data.set(extra, i * (each + extra.length) + each);
    }
    return { data, shape: [count, (each + extra.length) / (height * width), height, width] };
  }
}
