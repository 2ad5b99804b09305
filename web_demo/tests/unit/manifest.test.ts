import { execFileSync } from "node:child_process";
import { describe, expect, it } from "vitest";
import { parseManifest } from "../../src/runtime/manifest.js";
import { golden } from "./golden.js";

const axes = { size_px: [16, 16] };
const tensor = (name: string, ...shape: number[]): object => ({ name, dtype: "float32", shape });
const unet = { axes, files: ["unet/unet.onnx"], inputs: [tensor("sample", 1, 4, 2, 2)], outputs: [tensor("model_output", 1, 4, 2, 2)] };
const whole = {
  format: "1.0",
  target: "onnx-web",
  model: {
    name: "small", family: "sd1", prediction_type: "epsilon", unet_in_channels: 4,
    latent: { channels: 4, downscale: 8, scaling_factor: 0.18215 },
    tokenizers: [{ file: "tokenizer.json", component: "text_encoder", max_length: 77, bos_id: 0, eos_id: 1, pad_id: 1 }],
    defaults: { sampler: "ddim", steps: 4, size_px: [16, 16] },
  },
  components: [{ name: "unet", variants: [unet] }],
  samplers: [{ name: "ddim", file: "samplers.safetensors", steps: [1, 4] }],
  provenance: { source: "tests", sha256: "0".repeat(64) },
  files: ["unet/unet.onnx", "tokenizer.json", "samplers.safetensors"].map((path) => ({ path, bytes: 9, sha256: "a".repeat(64) })),
};
type Edit = (raw: typeof whole & Record<string, any>) => void; // eslint-disable-line @typescript-eslint/no-explicit-any

function edited(edit: Edit): Uint8Array {
  const raw = structuredClone(whole) as Parameters<Edit>[0];
  edit(raw);
  return new TextEncoder().encode(JSON.stringify(raw));
}
const text = (from: string | RegExp, to: string): Uint8Array => new TextEncoder().encode(JSON.stringify(whole).replace(from, to));

const HOSTILE: [string, Uint8Array, string | RegExp][] = [
  ["a newer major", edited((raw) => (raw.format = "2.0")), "bundle format"],
  ["a format of another kind", edited((raw) => (raw.format = "1")), "bundle format"],
  ["no format", text('"format":"1.0",', ""), "no format"],
  ["an unknown critical feature", edited((raw) => (raw.critical = ["prompt-bank", "teleport"])), "features this page lacks: teleport"],
  ["a critical feature that is no name", edited((raw) => (raw.critical = [{}])), "(not a name)"],
  ["a path that climbs out", edited((raw) => (raw.files[0]!.path = "../unet.onnx")), "stay inside the bundle"],
  ["an absolute path", edited((raw) => (raw.files[0]!.path = "/etc/passwd")), "stay inside the bundle"],
  ["an address", edited((raw) => (raw.files[0]!.path = "https://example.com/x")), "stay inside the bundle"],
  ["a backslash", edited((raw) => (raw.files[0]!.path = "unet\\unet.onnx")), "stay inside the bundle"],
  ["a device's name", edited((raw) => (raw.files[0]!.path = "unet/CON.txt")), "Windows keeps"],
  ["a hidden file", edited((raw) => (raw.files[0]!.path = ".htaccess")), "stay inside the bundle"],
  ["a trailing dot", edited((raw) => (raw.files[0]!.path = "unet/x.")), "stay inside the bundle"],
  ["two paths that differ in case", edited((raw) => raw.files.push({ ...raw.files[0]!, path: "UNET/unet.onnx" })), "listed twice"],
  ["itself in its files", edited((raw) => raw.files.push({ ...raw.files[0]!, path: "Manifest.json" })), "lists itself"],
  ["a used file that is not listed", edited((raw) => raw.files.shift()), "used but not listed"],
  ["a plan that is not listed", edited((raw) => Object.assign(raw.components[0]!.variants[0]!, { plan: "plan.json" })), "used but not listed"],
  ["more bytes than a bundle has", edited((raw) => raw.files.forEach((file: { bytes: number }) => (file.bytes = 2 ** 36))), "bytes together"],
  ["a huge tensor", edited((raw) => (raw.components[0]!.variants[0]!.inputs = [tensor("sample", 2 ** 20, 2 ** 20)])), "elements"],
  ["too many dimensions", edited((raw) => (raw.components[0]!.variants[0]!.inputs = [tensor("sample", ...Array(9).fill(1) as number[])])), "more than 8"],
  ["a component twice", edited((raw) => raw.components.push(raw.components[0]!)), "listed twice"],
  ["a component of no role", edited((raw) => (raw.components[0]!.name = "shell")), "not one of"],
  ["other noise", edited((raw) => (raw.noise = { version: 2 })), "not one of 1"],
  ["a boolean for a number", edited((raw) => (raw.model.defaults.steps = true as never)), "no integer"],
  ["a text for a number", edited((raw) => (raw.files[0]!.bytes = "9" as never)), "no integer"],
  ["a float for an integer", text('"bytes":9', '"bytes":9.0'), "no integer"],
  ["an exponent for an integer", text('"bytes":9', '"bytes":9e0'), "no integer"],
  ["an integer beyond 2^53", text('"bytes":9', '"bytes":9007199254740993'), "beyond 2^53"],
  ["a number beyond float64", text("0.18215", "1e999"), "beyond float64"],
  ["NaN", text("0.18215", "NaN"), "does not parse"],
  ["a key twice", text('"format":"1.0"', '"format":"1.0","format":"1.0"'), "appears twice"],
  ["half a surrogate pair", text('"small"', '"\\ud800"'), "surrogate"],
  ["a byte order mark", new Uint8Array([0xef, 0xbb, 0xbf, ...edited(() => undefined)]), "does not parse"],
  ["bytes that are no UTF-8", new Uint8Array([0xff, 0xfe, 0x00]), "does not parse"],
  ["depth without end", new TextEncoder().encode("[".repeat(100_000)), "nested too deep"],
  ["a missing field", text('"prediction_type":"epsilon",', ""), "prediction_type: missing"],
  ["an upper-case hash", text(/a{64}/, "A".repeat(64)), "right form"],
  ["a prototype as a key", text('"format"', '"__proto__":{"format":"1.0"},"fromat"'), "no format"],
  ["text after the end", new TextEncoder().encode(`${JSON.stringify(whole)}{}`), "after the end"],
  ["too many values", new TextEncoder().encode(`[${"0,".repeat(300_000)}0]`), "values"],
];

type Part = string | [string, number] | { base64: string };
interface Golden {
  refused: { name: string; kind: string; parts: Part[] }[];
  taken: { name: string; parts: Part[] }[];
}
const shared = golden<Golden>("manifests");

function assembled(parts: Part[]): Uint8Array {
  return Buffer.concat(parts.map((part) => {
    if (typeof part === "string") return Buffer.from(part);
    return Array.isArray(part) ? Buffer.from(part[0].repeat(part[1])) : Buffer.from(part.base64, "base64");
  }));
}

describe("manifest", () => {
  it.each(shared.refused)("refuses $name as every reader does ($kind)", ({ parts }) => {
    expect(() => parseManifest(assembled(parts))).toThrow(/Allowed: /);
  });

  it.each(shared.taken)("takes $name as every reader does", ({ parts }) => {
    expect(parseManifest(assembled(parts)).model.name).not.toBe("");
  });

  it("fills in what is not said and drops what it does not know", () => {
    const made = parseManifest(edited((raw) => Object.assign(raw, { later: 1, critical: ["chunked-prompts"] })));
    expect(made.components[0]?.variants[0]?.axes).toEqual({ width: 1, size_px: [16, 16], batch: 1, precision: "fp32", chunk: [0, 1], form: "" });
    expect(made.model.tokenizers[0]).toMatchObject({ chunks: 1, expand: [] });
    expect(made.noise.generator).toBe("philox4x32-10");
    expect([made.policies, made.golden, "later" in made]).toEqual([[], null, false]);
  });

  it.each(HOSTILE)("refuses %s", (_what, data, phrase) => {
    const began = performance.now();
    expect(() => parseManifest(data)).toThrow(phrase);
    expect(() => parseManifest(data)).toThrow(/Allowed: /);
    expect(performance.now() - began).toBeLessThan(5000);
  });

  it("refuses 17 MB", () => {
    expect(() => parseManifest(new Uint8Array((16 << 20) + 1))).toThrow("up to 16777216");
  });

  it("has types that are current", () => {
    execFileSync("node", ["scripts/generate.mjs", "--check"], { cwd: new URL("../..", import.meta.url) });
  });
});
