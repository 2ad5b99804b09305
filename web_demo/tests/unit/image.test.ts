import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { BILINEAR, encodePng, latentMask, maskOf, psnrDb, readSettings, resize, toFloat, toUint8, type Image } from "../../src/runtime/image.js";
import { golden } from "./golden.js";

interface Golden {
  picture: { width: number; height: number; data: number[] };
  resized: { width: number; height: number; filter: "lanczos" | "bilinear"; data: number[] }[];
  mask: number[];
  floats: number[];
  rounded: number[];
}
const wanted = golden<Golden>("images");
const picture: Image = { ...wanted.picture, data: Uint8Array.from(wanted.picture.data) };

describe("pictures", () => {
  it.each(wanted.resized)("resizes to $width x $height as Pillow ($filter)", ({ width, height, filter, data }) => {
    const made = filter === "bilinear" ? resize(picture, width, height, BILINEAR) : resize(picture, width, height);
    expect([...made.data]).toEqual(data);
  });

  it("turns pictures to numbers and back as Python does", () => {
    const floats = toFloat(picture);
    expect([...floats.data]).toEqual(wanted.floats.map(Math.fround));
    expect(toUint8(floats).data).toEqual(picture.data);
    const wide = { ...floats, data: floats.data.map((x) => 1.3 * x + 0.01) };
    expect([...toUint8(wide).data]).toEqual(wanted.rounded);
    expect(() => toUint8({ ...floats, data: floats.data.map(() => NaN) })).toThrow("not finite");
  });

  it("reads masks and shrinks them to latents", () => {
    expect([...maskOf(picture)]).toEqual(wanted.mask);
    expect([...latentMask(Float32Array.from([1, 0, 0, 1, 0, 0, 1, 1]), [2, 4], [1, 2])]).toEqual([1, 0]);
  });

  it("writes a PNG that carries its settings", async () => {
    const record = { settings: { prompt: "naïve “画”", seed: 2 ** 53 - 1 } };
    const file = await encodePng(picture, record);
    expect(readSettings(file)).toEqual(record);
    const spoiled = file.slice();
    spoiled[60] = (spoiled[60] as number) ^ 1;
    expect(() => readSettings(spoiled)).toThrow("broken checksum");
    expect(() => readSettings(new Uint8Array(30))).toThrow("no PNG");
    expect(() => readSettings(file.subarray(0, 40))).toThrow("does not read");
  });

  it.skipIf(process.env.EDGESD_PYTHON === undefined)("writes a PNG that Python reads", async () => {
    const path = join(mkdtempSync(join(tmpdir(), "edgesd-")), "a.png");
    writeFileSync(path, await encodePng(picture, { settings: { prompt: "画" } }));
    const code = "import sys,json;from pathlib import Path;from PIL import Image;from edgesd.runtime.image import read_settings as r;p=Path(sys.argv[1]);print(json.dumps([list(Image.open(p).tobytes()), r(p)]))";
    const [pixels, record] = JSON.parse(execFileSync(process.env.EDGESD_PYTHON as string, ["-c", code, path]).toString()) as unknown[];
    expect(pixels).toEqual([...picture.data]);
    expect(record).toEqual({ settings: { prompt: "画" } });
    expect(readFileSync(path).length).toBeGreaterThan(0);
  });

  it("measures differences in dB", () => {
    expect(psnrDb(picture.data, picture.data)).toBe(100);
    expect(psnrDb(new Uint8Array(100), new Uint8Array(100).fill(255))).toBe(0);
  });
});
