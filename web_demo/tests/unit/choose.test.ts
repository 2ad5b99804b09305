import { describe, expect, it } from "vitest";
import { choose, widthsOf, type Variant } from "../../src/runtime/choose.js";
import type { Manifest } from "../../src/runtime/manifest.js";

const axes = { width: 1, size_px: [16, 16], batch: 1, precision: "fp32", chunk: [0, 1], form: "wasm" };
const variant = (more: object): Variant => ({ axes: { ...axes, ...more }, files: [JSON.stringify(more)] }) as unknown as Variant;
const manifest = (...variants: Variant[]): Manifest =>
  ({ model: { defaults: { size_px: [16, 16] } }, components: [{ name: "unet", variants }] }) as unknown as Manifest;
const picked = (bundle: Manifest, wanted: Parameters<typeof choose>[2], f16 = false): object =>
  [...choose(bundle, "unet", wanted, f16).values()].flat().map(({ axes: { width, precision, form, batch } }) => ({ width, precision, form, batch }))[0] as object;

const both = manifest(variant({}), variant({ precision: "fp16", form: "webgpu" }), variant({ precision: "int8" }));

describe("variants", () => {
  it("fit the backend: float16 for adapters that have it, float32 for all others", () => {
    expect(picked(both, { form: "wasm" })).toMatchObject({ precision: "fp32", form: "wasm" });
    expect(picked(both, { form: "webgpu" }, true)).toMatchObject({ precision: "fp16", form: "webgpu" });
    expect(picked(both, { form: "webgpu" }, false)).toMatchObject({ precision: "fp32" });
    expect(picked(both, { form: "wasm", precision: "int8" })).toMatchObject({ precision: "int8" });
    expect(() => choose(manifest(variant({ precision: "fp16", form: "webgpu" })), "unet", { form: "wasm" }, false)).toThrow("no variant for wasm");
  });

  it("come by width, and a width that is not there is refused by name", () => {
    const bundle = manifest(variant({}), variant({ width: 0.5 }), variant({ width: 0.75 }));
    expect(widthsOf(bundle, "unet")).toEqual([1, 0.75, 0.5]);
    expect(picked(bundle, { form: "wasm", width: 0.5 })).toMatchObject({ width: 0.5 });
    expect(() => choose(bundle, "unet", { form: "wasm", width: 0.6 }, false)).toThrow("this model has 1, 0.75, 0.5");
  });

  it("keep all batches and the order of chunks, and refuse a gap", () => {
    const parts = [variant({ batch: 2 }), variant({ chunk: [1, 2] }), variant({ chunk: [0, 2] })];
    const chosen = choose(manifest(...parts), "unet", { form: "wasm" }, false);
    expect([...chosen.keys()]).toEqual([1, 2]);
    expect(chosen.get(1)?.map((one) => one.axes.chunk)).toEqual([[0, 2], [1, 2]]);
    expect(() => choose(manifest(variant({ chunk: [1, 2] })), "unet", { form: "wasm" }, false)).toThrow("each chunk once");
  });
});
