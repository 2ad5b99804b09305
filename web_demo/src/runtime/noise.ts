/**
 * Normals that are the same on every device: Philox keyed by what the noise is for, or torch's CPU stream re-made.
 * Mirrors edgesd/runtime/noise.py, whose docstring defines the generator to the bit.
 */

import { RequestError } from "./errors.js";

export const MAX_SEED = Number.MAX_SAFE_INTEGER;

/** What noise is for: a part of its key. Numbers are frozen. */
export enum Purpose {
  START = 0,
  STEP = 1,
  RENOISE = 2,
  POSTERIOR = 3,
}

/** `count` standard normals, float32. image: index in the request; row: of the table. */
export interface NoiseSource {
  normal(count: number, image: number, row: number, purpose: Purpose): Float32Array;
}

export function checkSeed(seed: number): number {
  if (!Number.isSafeInteger(seed) || seed < 0) {
    throw new RequestError(`seed ${seed}`, `an integer from 0 to ${MAX_SEED}`, "Choose a seed in that range");
  }
  return seed;
}

function mulHigh(a: number, b: number): number {
  const [al, ah, bl, bh] = [a & 0xffff, a >>> 16, b & 0xffff, b >>> 16];
  const low = al * bl;
  const mid = al * bh;
  const cross = ah * bl + (mid % 65536) + Math.floor(low / 65536);
  return (ah * bh + Math.floor(mid / 65536) + Math.floor(cross / 65536)) >>> 0;
}

/** Ten rounds of Philox4x32; words and key are unsigned 32-bit. */
export function philox4x32(counter: readonly number[], key: readonly [number, number]): [number, number, number, number] {
  let [c0, c1, c2, c3] = counter as [number, number, number, number];
  let [k0, k1] = key;
  for (let round = 0; round < 10; round++) {
    const [high0, low0] = [mulHigh(c0, 0xd2511f53), Math.imul(c0, 0xd2511f53)];
    const [high1, low1] = [mulHigh(c2, 0xcd9e8d57), Math.imul(c2, 0xcd9e8d57)];
    [c0, c1, c2, c3] = [(high1 ^ c1 ^ k0) >>> 0, low1 >>> 0, (high0 ^ c3 ^ k1) >>> 0, low0 >>> 0];
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
  return [c0, c1, c2, c3];
}

/** Noise keyed by (seed, image, row, purpose), never by draw order. */
export class Philox implements NoiseSource {
  constructor(private readonly seed: number) {
    checkSeed(seed);
  }

  normal(count: number, image: number, row: number, purpose: Purpose): Float32Array {
    const out = new Float32Array(count);
    const key: [number, number] = [this.seed % 2 ** 32, Math.floor(this.seed / 2 ** 32)];
    for (let at = 0; at < count; at += 4) {
      const words = philox4x32([at / 4, image, row, purpose], key);
      for (const pair of [0, 2]) {
        const radius = Math.sqrt(-2 * Math.log(((words[pair] as number) + 1) * 2 ** -32));
        const angle = 2 * Math.PI * 2 ** -32 * (words[pair + 1] as number);
        // What lies beyond the end is dropped: a typed array ignores it.
        out[at + pair] = radius * Math.cos(angle);
        out[at + pair + 1] = radius * Math.sin(angle);
      }
    }
    return out;
  }
}

/** What torch.randn draws on a CPU, to 2e-6: a stream per image, seeded seed + image; row and purpose are ignored. */
export class TorchNoise implements NoiseSource {
  private readonly streams = new Map<number, TorchStream>();

  constructor(private readonly seed: number) {
    checkSeed(seed);
  }

  normal(count: number, image: number, _row: number, _purpose: Purpose): Float32Array {
    let stream = this.streams.get(image);
    if (stream === undefined) this.streams.set(image, (stream = new TorchStream((this.seed + image) % 2 ** 32)));
    return stream.randn(count);
  }
}

/** One torch CPU generator: MT19937 words, float32 block transform from 16 elements on, float64 pairs below. */
class TorchStream {
  private readonly words: () => number;
  private spare: number | undefined;

  constructor(seed: number) {
    this.words = mersenneTwister(seed);
  }

  randn(count: number): Float32Array {
    if (count < 16) return Float32Array.from({ length: count }, () => this.scalar());
    const uniform = this.uniform(count);
    const whole = count - (count % 16);
    const out = new Float32Array(count);
    out.set(boxMuller(uniform.subarray(0, whole)));
    // Torch draws the last 16 anew and overwrites what they cover.
    if (whole !== count) out.set(boxMuller(this.uniform(16)), count - 16);
    return out;
  }

  private uniform(count: number): Float32Array {
    return Float32Array.from({ length: count }, () => (this.words() & 0xffffff) * 2 ** -24);
  }

  private scalar(): number {
    if (this.spare !== undefined) {
      const value = this.spare;
      this.spare = undefined;
      return value;
    }
    const [first, second] = [this.double(), this.double()];
    const [radius, angle] = [Math.sqrt(-2 * Math.log1p(-second)), 2 * Math.PI * first];
    this.spare = radius * Math.sin(angle);
    return radius * Math.cos(angle);
  }

  private double(): number {
    const [high, low] = [this.words(), this.words()];
    return ((high & 0x1fffff) * 2 ** 32 + low) * 2 ** -53;
  }
}

/** As torch lays it out: in each 16 uniforms, 8 radii then 8 angles become 8 cosines then 8 sines. */
function boxMuller(uniform: Float32Array): Float32Array {
  const out = new Float32Array(uniform.length);
  for (let block = 0; block < uniform.length; block += 16) {
    for (let i = block; i < block + 8; i++) {
      const radius = Math.sqrt(-2 * Math.log(1 - (uniform[i] as number)));
      const angle = 2 * Math.PI * (uniform[i + 8] as number);
      out[i] = radius * Math.cos(angle);
      out[i + 8] = radius * Math.sin(angle);
    }
  }
  return out;
}

/** MT19937 (Matsumoto and Nishimura 1998) seeded by init_genrand; gives unsigned 32-bit words. */
function mersenneTwister(seed: number): () => number {
  const state = new Uint32Array(624);
  state[0] = seed;
  for (let i = 1; i < 624; i++) {
    const before = state[i - 1] as number;
    state[i] = Math.imul(1812433253, before ^ (before >>> 30)) + i;
  }
  let at = 624;
  return () => {
    if (at === 624) {
      for (let i = 0; i < 624; i++) {
        const y = ((state[i] as number) & 0x80000000) | ((state[(i + 1) % 624] as number) & 0x7fffffff);
        state[i] = (state[(i + 397) % 624] as number) ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      at = 0;
    }
    let y = state[at++] as number;
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}

export const SOURCES: Record<string, new (seed: number) => NoiseSource> = { philox: Philox, torch: TorchNoise };

/** The source called `rng`; throws RequestError for an unknown name or a seed out of range. */
export function makeSource(rng: string, seed: number): NoiseSource {
  const kind = Object.hasOwn(SOURCES, rng) ? SOURCES[rng] : undefined;
  if (kind === undefined) {
    throw new RequestError(`random generator ${JSON.stringify(rng)}`, Object.keys(SOURCES).join(", "), "Choose one of these");
  }
  return new kind(seed);
}
