import { describe, expect, it } from "vitest";
import { MAX_SEED, Philox, TorchNoise, makeSource, philox4x32 } from "../../src/runtime/noise.js";
import { golden } from "./golden.js";

interface Golden {
  philox: { seed: number; image: number; row: number; purpose: number; shape: number[]; normal: number[] }[];
  torch: { seed: number; shapes: number[][]; normal: number[][] }[];
}
const { philox, torch } = golden<Golden>("noise");

function ulp(x: number): number {
  return 2 ** (Math.floor(Math.log2(Math.abs(x))) - 23);
}

describe("noise", () => {
  it.each(philox)("philox of seed $seed, image $image, row $row, purpose $purpose", ({ seed, image, row, purpose, normal }) => {
    const made = new Philox(seed).normal(normal.length, image, row, purpose);
    normal.forEach((z, i) => expect(Math.abs((made[i] as number) - z)).toBeLessThanOrEqual(ulp(z)));
  });

  it.each(torch)("torch's stream of seed $seed", ({ seed, normal }) => {
    const source = new TorchNoise(seed);
    for (const wanted of normal) {
      const made = source.normal(wanted.length, 0, 0, 0);
      wanted.forEach((z, i) => expect(Math.abs((made[i] as number) - z)).toBeLessThanOrEqual(2e-6));
    }
  });

  it("repeats the published vectors of Philox4x32-10", () => {
    // Salmon et al. 2011, the Random123 distribution's known answers.
    expect(philox4x32([0, 0, 0, 0], [0, 0])).toEqual([0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
    const f = 0xffffffff;
    expect(philox4x32([f, f, f, f], [f, f])).toEqual([0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
    expect(philox4x32([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0])).toEqual([
      0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1,
    ]);
  });

  it("refuses seeds that no runtime holds, and unknown generators", () => {
    for (const seed of [-1, 1.5, MAX_SEED + 1, NaN]) expect(() => new Philox(seed)).toThrow("seed");
    expect(() => makeSource("toString", 0)).toThrow("philox, torch");
  });
});
