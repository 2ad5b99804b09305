/** The start image of a run: image-to-image begins from it, inpainting keeps the part outside the mask. Mirrors edgesd/runtime/canvas.py. */

import { RequestError } from "./errors.js";
import { latentMask, toFloat, type Image } from "./image.js";
import { Purpose, makeSource } from "./noise.js";
import type { Pipeline } from "./pipeline.js";
import type { ModelSpec, Settings } from "./settings.js";
import { addNoise, initLatents } from "./state.js";
import type { SamplerTable } from "./table.js";
import { size, type Tensor } from "./tensor.js";

const f32 = Math.fround;

/** mask [H,W]: 1 where the picture is redrawn. */
export interface Start {
  readonly image: Image;
  readonly mask: Float32Array | null;
}

/** [C,h,w] of the latents; throws RequestError for a picture whose size does not fit. */
export function latentShape(spec: ModelSpec, start: Start | null): [number, number, number] {
  const [height, width] = start === null ? spec.defaults.size_px : [start.image.height, start.image.width];
  const { downscale, channels } = spec.latent;
  if (height % downscale !== 0 || width % downscale !== 0) {
    throw new RequestError(`a picture of ${width}x${height} px`, `multiples of ${downscale}`, "Resize it");
  }
  return [channels, height / downscale, width / downscale];
}

/** (row, purpose) -> normals of one picture. */
export type PictureNoise = (row: number, purpose: Purpose) => Float32Array;

export function pictureNoise(settings: Settings, shape: readonly number[]): PictureNoise {
  const source = makeSource(settings.rng, settings.seed);
  return (row, purpose) => source.normal(size(shape), settings.index, row, purpose);
}

/** Whether the UNet takes a mask and a masked image beside its latents. */
export function concatenates(spec: ModelSpec): boolean {
  return spec.unet_in_channels === 2 * spec.latent.channels + 1;
}

/** What such a UNet starts from without a picture: all of it is to be drawn. */
export function blank(spec: ModelSpec): Start {
  const [height, width] = spec.defaults.size_px;
  const data = new Uint8Array(height * width * 3).fill(128);
  return { image: { width, height, data }, mask: new Float32Array(height * width).fill(1) };
}

/** The start image in latents: x0 (null where nothing needs it), noise, mask [h*w] or null, latents of the kept part. */
export class Canvas {
  private constructor(
    private readonly x0: Float32Array | null,
    private readonly noise: Float32Array,
    private readonly mask: Float32Array | null,
    private readonly masked: Float32Array | null,
  ) {}

  /** row: where the run starts. Normals are drawn in diffusers' order: image, noise, masked image. */
  static async make(pipeline: Pipeline, start: Start, noise: PictureNoise, row: number): Promise<Canvas> {
    const { spec } = pipeline;
    const nine = concatenates(spec);
    const { image } = start;
    let { mask } = start;
    if (mask !== null && spec.unet_in_channels !== spec.latent.channels && !nine) {
      throw new RequestError(`a mask with a UNet of ${spec.unet_in_channels} channels`, "4 or 9", "Leave it out");
    }
    if (mask === null && nine) mask = new Float32Array(image.width * image.height).fill(1);
    const pure = nine && row === 0;
    const x0 = pure ? null : await encodeImage(pipeline, toFloat(image), noise);
    const drawn = noise(0, pure ? Purpose.START : Purpose.RENOISE);
    if (mask === null) return new Canvas(x0, drawn, null, null);
    const [, h, w] = latentShape(spec, start);
    const small = latentMask(mask, [image.height, image.width], [h, w]);
    if (!nine) return new Canvas(x0, drawn, small, null);
    const whole = toFloat(image);
    const plane = image.width * image.height;
    const kept = whole.data.map((x, i) => ((mask[i % plane] as number) < 0.5 ? x : 0));
    return new Canvas(x0, drawn, small, await encodeImage(pipeline, { data: kept, shape: whole.shape }, noise));
  }

  /** The UNet's input at the start row. Inpainting from row 0 begins with noise alone, as diffusers does. */
  begin(table: SamplerTable, row: number): Float32Array {
    if (this.x0 === null || (this.mask !== null && row === 0)) return initLatents(table, this.noise);
    return addNoise(table, row, this.x0, this.noise);
  }

  /** Outside the mask, the start image at the noise of the coming row (Avrahami et al. 2023, blended latents). */
  adjust(table: SamplerTable, latents: Float32Array, row: number): Float32Array {
    const { mask, x0 } = this;
    if (mask === null || this.masked !== null || x0 === null) return latents;
    const kept = addNoise(table, row, x0, this.noise);
    return latents.map((u, i) => {
      const m = mask[i % mask.length] as number;
      return f32(m * u) + f32((1 - m) * (kept[i] as number));
    });
  }

  /** What a 9-channel inpainting UNet takes behind the latents: mask, latents of the masked image. */
  channels(): Float32Array | null {
    if (this.mask === null || this.masked === null) return null;
    const both = new Float32Array(this.mask.length + this.masked.length);
    both.set(this.mask);
    both.set(this.masked, this.mask.length);
    return both;
  }
}

/** Picture [1,3,H,W] -> latents in the UNet's scale; a full VAE's posterior is sampled. */
async function encodeImage(pipeline: Pipeline, image: Tensor, noise: PictureNoise): Promise<Float32Array> {
  if (!pipeline.session.has("vae_encoder")) {
    throw new RequestError("a start image", "prompts alone: this bundle has no VAE encoder", "Package it with one");
  }
  const encoded = await pipeline.session.run("vae_encoder", { image });
  const { shift_factor, scaling_factor } = pipeline.spec.latent;
  const [shift, scale] = [f32(shift_factor), f32(scaling_factor)];
  const normals = encoded.std === undefined ? null : noise(0, Purpose.POSTERIOR);
  return (encoded.mean as Tensor).data.map((mean, i) => {
    const spread = normals === null ? 0 : f32((encoded.std?.data[i] as number) * (normals[i] as number));
    return f32(f32(mean + spread) - shift) * scale;
  });
}
