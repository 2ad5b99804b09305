/** Pictures at the border: arrays, start images and masks, previews, PNG with settings. Mirrors edgesd/runtime/image.py. */

import { DataError, RequestError, describeError, shown } from "./errors.js";
import type { ModelSpec } from "./settings.js";
import { allFinite, type Tensor } from "./tensor.js";

const SETTINGS_KEY = "edgesd";
const MAX_PIXELS = 1 << 26;
const MAX_SETTINGS_CHARS = 1 << 20;
const PSNR_CEILING_DB = 100;
const f32 = Math.fround;

/** A picture: data [height, width, 3], 0..255. */
export interface Image {
  readonly width: number;
  readonly height: number;
  readonly data: Uint8Array;
}

// ---- arrays -------------------------------------------------------------------------------------------------------

/** Model output [1,3,H,W], about -1..1 -> picture. Throws DataError if a value is not finite. */
export function toUint8({ data, shape }: Tensor): Image {
  if (!allFinite(data)) {
    const fix = "Use a bundle of higher precision, another backend, or check the weights";
    throw new DataError("the model drew numbers that are not finite", "finite values", fix);
  }
  const [height, width] = shape.slice(-2) as [number, number];
  const plane = height * width;
  const out = new Uint8Array(plane * 3);
  for (let at = 0; at < plane; at++) {
    for (let c = 0; c < 3; c++) {
      const unit = Math.min(Math.max(f32(f32((data[c * plane + at] as number) * 0.5) + 0.5), 0), 1);
      out[at * 3 + c] = halfEven(f32(unit * 255));
    }
  }
  return { width, height, data: out };
}

/** Picture -> model input [1,3,H,W] in -1..1. */
export function toFloat({ width, height, data }: Image): Tensor {
  const plane = width * height;
  const out = new Float32Array(plane * 3);
  for (let at = 0; at < plane; at++) {
    for (let c = 0; c < 3; c++) out[c * plane + at] = f32(2 * f32((data[at * 3 + c] as number) / 255)) - 1;
  }
  return { data: out, shape: [1, 3, height, width] };
}

/** Mask [H,W] -> [h,w]: nearest, as torch.nn.functional.interpolate does. */
export function latentMask(mask: Float32Array, from: [number, number], to: [number, number]): Float32Array {
  const [h, w] = to;
  const out = new Float32Array(h * w);
  for (let y = 0; y < h; y++) {
    for (let x = 0; x < w; x++) {
      out[y * w + x] = mask[Math.floor((y * from[0]) / h) * from[1] + Math.floor((x * from[1]) / w)] as number;
    }
  }
  return out;
}

/** Predicted latents [1,C,h,w] -> rough picture, linear per pixel, bilinear upscale. RequestError without rgb_factors. */
export function preview(x0: Float32Array, shape: readonly number[], latent: ModelSpec["latent"]): Image {
  if (latent.rgb_factors === null) {
    throw new RequestError("a cheap preview", "models with rgb_factors", "Decode the latents instead");
  }
  const [height, width] = shape.slice(-2) as [number, number];
  const small = new Uint8Array(height * width * 3);
  latent.rgb_factors.forEach((factors, c) => {
    for (let at = 0; at < height * width; at++) {
      let value = latent.rgb_bias?.[c] ?? 0;
      factors.forEach((factor, channel) => (value += factor * (x0[channel * height * width + at] as number)));
      small[at * 3 + c] = halfEven(Math.min(Math.max(Number.isNaN(value) ? 0 : value, 0), 1) * 255);
    }
  });
  return resize({ width, height, data: small }, width * latent.downscale, height * latent.downscale, BILINEAR);
}

/** Half grey and lighter is drawn anew (1), the rest is kept (0). */
export function maskOf({ data, width, height }: Image): Float32Array {
  return Float32Array.from({ length: width * height }, (_, i) => {
    const [r, g, b] = [data[i * 3], data[i * 3 + 1], data[i * 3 + 2]] as [number, number, number];
    return (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16 >= 128 ? 1 : 0;
  });
}

/** Round half to even, as numpy and torch do. */
function halfEven(x: number): number {
  const floor = Math.floor(x);
  const rest = x - floor;
  return rest > 0.5 || (rest === 0.5 && floor % 2 === 1) ? floor + 1 : floor;
}

// ---- resizing: Pillow's, in its fixed-point arithmetic, so that a start image is the same in every runtime --------

interface Filter {
  support: number;
  weight: (x: number) => number;
}

const sinc = (x: number): number => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));
export const LANCZOS: Filter = { support: 3, weight: (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0) };
export const BILINEAR: Filter = { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) };
const PRECISION = 22;

export function resize(image: Image, width: number, height: number, filter: Filter = LANCZOS): Image {
  const wide = width === image.width ? image : { ...image, width, data: along(image, width, filter) };
  if (height === wide.height) return wide;
  const turned = { width: wide.height, height: wide.width, data: transpose(wide) };
  const tall = { width: height, height: wide.width, data: along(turned, height, filter) };
  return { width, height, data: transpose(tall) };
}

/** Every row of `image` resampled to `width` pixels. */
function along(image: Image, width: number, filter: Filter): Uint8Array {
  const out = new Uint8Array(width * image.height * 3);
  const scale = image.width / width;
  const stretch = Math.max(scale, 1);
  const support = filter.support * stretch;
  for (let x = 0; x < width; x++) {
    const centre = (x + 0.5) * scale;
    const from = Math.max(0, Math.trunc(centre - support + 0.5));
    const to = Math.min(image.width, Math.trunc(centre + support + 0.5));
    const weights = Array.from({ length: to - from }, (_, i) => filter.weight((i + from - centre + 0.5) / stretch));
    const total = weights.reduce((sum, w) => sum + w, 0);
    const fixed = weights.map((w) => Math.trunc((w / total) * 2 ** PRECISION + (w / total < 0 ? -0.5 : 0.5)));
    for (let y = 0; y < image.height; y++) {
      for (let c = 0; c < 3; c++) {
        let sum = 1 << (PRECISION - 1);
        fixed.forEach((w, i) => (sum += w * (image.data[(y * image.width + from + i) * 3 + c] as number)));
        out[(y * width + x) * 3 + c] = Math.min(Math.max(sum >> PRECISION, 0), 255);
      }
    }
  }
  return out;
}

function transpose({ width, height, data }: Image): Uint8Array {
  const out = new Uint8Array(data.length);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      for (let c = 0; c < 3; c++) out[(x * height + y) * 3 + c] = data[(y * width + x) * 3 + c] as number;
    }
  }
  return out;
}

// ---- PNG ----------------------------------------------------------------------------------------------------------

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  let c = n;
  for (let k = 0; k < 8; k++) c = c & 1 ? 0xedb88320 ^ (c >>> 1) : c >>> 1;
  return c;
});

function crc32(data: Uint8Array): number {
  let c = 0xffffffff;
  for (const byte of data) c = (CRC[(c ^ byte) & 255] as number) ^ (c >>> 8);
  return (c ^ 0xffffffff) >>> 0;
}

/** The bytes of a PNG, its settings in a text chunk that `edgesd generate --from` reads. */
export async function encodePng({ width, height, data }: Image, settings: unknown): Promise<Uint8Array<ArrayBuffer>> {
  const lines = new Uint8Array((width * 3 + 1) * height);
  for (let y = 0; y < height; y++) {
    const [from, to] = [y * width * 3, y * (width * 3 + 1)];
    lines[to] = 1; // filter "sub": the difference to the pixel on the left
    for (let i = 0; i < width * 3; i++) lines[to + 1 + i] = (data[from + i] as number) - (i < 3 ? 0 : (data[from + i - 3] as number));
  }
  const head = new Uint8Array(13);
  const view = new DataView(head.buffer);
  view.setUint32(0, width);
  view.setUint32(4, height);
  head.set([8, 2], 8);
  const ascii = JSON.stringify(settings).replace(/[\u0080-\uffff]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
  const bytes = new TextEncoder();
  const packed = new Uint8Array(await new Response(new Blob([lines]).stream().pipeThrough(new CompressionStream("deflate"))).arrayBuffer());
  const chunks = [
    chunk("IHDR", head), chunk("tEXt", bytes.encode(`${SETTINGS_KEY}\0${ascii}`)), chunk("IDAT", packed), chunk("IEND", new Uint8Array()),
  ];
  return new Uint8Array(await new Blob([new Uint8Array(SIGNATURE), ...chunks]).arrayBuffer());
}

function chunk(kind: string, body: Uint8Array): Uint8Array<ArrayBuffer> {
  const whole = new Uint8Array(12 + body.length);
  const view = new DataView(whole.buffer);
  view.setUint32(0, body.length);
  whole.set(new TextEncoder().encode(kind), 4);
  whole.set(body, 8);
  view.setUint32(8 + body.length, crc32(whole.subarray(4, 8 + body.length)));
  return whole;
}

/** The record in a PNG that edgesd made, not yet checked. DataError for a broken file or one without. */
export function readSettings(file: Uint8Array): Record<string, unknown> {
  const fix = "Give a PNG that edgesd made, as it was written: many programs drop a picture's settings when they save it";
  try {
    if (SIGNATURE.some((byte, i) => file[i] !== byte)) throw new Error("no PNG");
    const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
    for (let at = 8; at < file.length; ) {
      const length = view.getUint32(at);
      const body = file.subarray(at + 4, at + 8 + length);
      if (view.getUint32(at + 8 + length) !== crc32(body)) throw new Error("a broken checksum");
      const text = new TextDecoder("latin1").decode(body);
      const prefix = `tEXt${SETTINGS_KEY}\0`;
      if (text.startsWith(prefix)) {
        if (length > MAX_SETTINGS_CHARS) throw new Error("settings too large");
        const record: unknown = JSON.parse(text.slice(prefix.length));
        if (record !== null && typeof record === "object" && !Array.isArray(record)) return record as Record<string, unknown>;
      }
      at += 12 + length;
    }
  } catch (error) {
    throw new DataError(`the picture does not read (${shown(describeError(error), 100)})`, "a whole PNG", fix);
  }
  throw new DataError("the picture carries no settings of edgesd", "a PNG with them", fix);
}

/** A picture file of any kind the browser reads, turned as its EXIF says, alpha over white dropped, fitted to the size. */
export async function decodeImage(file: Blob, width: number, height: number): Promise<Image> {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image", premultiplyAlpha: "none", colorSpaceConversion: "none" });
  } catch {
    throw new DataError("the file is not readable as a picture", "PNG, JPEG, WEBP and what else this browser shows", "Give another file");
  }
  if (bitmap.width * bitmap.height > MAX_PIXELS) {
    throw new DataError(`a picture of ${bitmap.width}x${bitmap.height} px`, `up to ${MAX_PIXELS} pixels`, "Make it smaller");
  }
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d") as OffscreenCanvasRenderingContext2D;
  context.drawImage(bitmap, 0, 0);
  return resize(fromRgba(context.getImageData(0, 0, bitmap.width, bitmap.height)), width, height);
}

export function fromRgba({ width, height, data }: ImageData): Image {
  const out = new Uint8Array(width * height * 3);
  for (let i = 0; i < width * height; i++) for (let c = 0; c < 3; c++) out[i * 3 + c] = data[i * 4 + c] as number;
  return { width, height, data: out };
}

export function toRgba({ width, height, data }: Image): ImageData {
  const out = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) out.data[i * 4 + c] = data[i * 3 + c] as number;
    out.data[i * 4 + 3] = 255;
  }
  return out;
}

// ---- comparison ---------------------------------------------------------------------------------------------------

/** Peak signal-to-noise ratio of two pictures of one size, in dB; 100 for equal ones. */
export function psnrDb(a: Uint8Array, b: Uint8Array): number {
  const error = a.reduce((sum, x, i) => sum + (x - (b[i] as number)) ** 2, 0) / a.length;
  return error === 0 ? PSNR_CEILING_DB : Math.min(PSNR_CEILING_DB, 10 * Math.log10(255 ** 2 / error));
}
