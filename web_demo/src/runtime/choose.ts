/** Which variant of each component a page opens. Mirrors edgesd/targets/_session.py. */

import { DataError, RequestError } from "./errors.js";
import type { Component, Manifest, Role } from "./manifest.js";

export type Variant = Component["variants"][number];
export type Form = "wasm" | "webgpu";

/** What is wanted of each component that comes in several; what is left out does not matter. */
export interface Wanted {
  readonly form: Form;
  readonly precision?: string;
  readonly width?: number;
}

const SHAPED: readonly Role[] = ["unet", "vae_decoder", "vae_encoder"];

/** Batch -> the variant's chunks in the order they run, ascending by batch. */
export type Chosen = ReadonlyMap<number, readonly Variant[]>;

/** Whether a backend can open a variant: float16 needs WebGPU, a variant's own form must fit. */
export function opens(variant: Variant, form: Form, f16: boolean): boolean {
  const { form: own, precision } = variant.axes;
  if (own !== "" && own !== form) return false;
  return precision !== "fp16" || (form === "webgpu" && f16);
}

/**
 * The variants of a component that fit `wanted`: they differ in batch and chunk alone. The manifest's order decides
 * among the rest. Throws RequestError for a width that the UNet has not, DataError where no variant can be opened.
 */
export function choose(manifest: Manifest, role: Role, wanted: Wanted, f16: boolean): Chosen {
  const component = manifest.components.find((one) => one.name === role);
  if (component === undefined) {
    const have = manifest.components.map((one) => one.name).join(", ");
    throw new RequestError(`the bundle has no component ${JSON.stringify(role)}`, have, "Package the model with it");
  }
  // A WASM artefact of the same precision runs on WebGPU too, and the other way round: form is a preference.
  const openable = component.variants.filter((v) => opens(v, wanted.form, f16) || runsAnyway(v, component.variants, wanted.form, f16));
  if (openable.length === 0) {
    const have = [...new Set(component.variants.map((v) => `${v.axes.precision} ${v.axes.form}`.trim()))].join(", ");
    throw new DataError(`${role} has no variant for ${wanted.form} here`, have, "Choose the other backend, or package with --form");
  }
  let left = openable;
  if (SHAPED.includes(role)) {
    const own = manifest.model.defaults.size_px.join();
    left = preferred(left, (v) => v.axes.size_px.join() === own);
  }
  if (role === "unet" && wanted.width !== undefined) {
    left = left.filter((v) => v.axes.width === wanted.width);
    if (left.length === 0) {
      const have = widthsOf(manifest, role).join(", ");
      throw new RequestError(`width ${wanted.width} of ${role}`, `this model has ${have}`, "Choose one of these, or package with --widths");
    }
  }
  left = preferred(left, (v) => wanted.precision === undefined || v.axes.precision === wanted.precision);
  left = preferred(left, (v) => v.axes.form === wanted.form);
  const like = flavour(left[0] as Variant);
  return byBatch(role, left.filter((v) => flavour(v) === like));
}

/** Where nothing was made for a form, what was made for the other one runs there: ONNX is ONNX. */
function runsAnyway(variant: Variant, all: readonly Variant[], form: Form, f16: boolean): boolean {
  return !all.some((v) => opens(v, form, f16)) && variant.axes.precision !== "fp16";
}

/** Widths that a component comes in, the widest first. */
export function widthsOf(manifest: Manifest, role: Role): number[] {
  const component = manifest.components.find((one) => one.name === role);
  return [...new Set(component?.variants.map((v) => v.axes.width))].sort((a, b) => b - a);
}

function preferred(variants: readonly Variant[], good: (v: Variant) => boolean): Variant[] {
  const found = variants.filter(good);
  return found.length > 0 ? found : [...variants];
}

function flavour({ axes }: Variant): string {
  return JSON.stringify([axes.width, axes.size_px, axes.precision, axes.form]);
}

function byBatch(role: Role, variants: readonly Variant[]): Chosen {
  const batches = new Map<number, Variant[]>();
  for (const variant of variants) batches.set(variant.axes.batch, [...(batches.get(variant.axes.batch) ?? []), variant]);
  for (const [batch, chunks] of batches) {
    chunks.sort((a, b) => a.axes.chunk[0] - b.axes.chunk[0]);
    if (chunks.some((v, i) => v.axes.chunk[0] !== i || v.axes.chunk[1] !== chunks.length)) {
      const found = chunks.map((v) => `${v.axes.chunk[0] + 1} of ${v.axes.chunk[1]}`).join(", ");
      throw new DataError(`${role} for batch ${batch} has the chunks ${found}`, "each chunk once", "Package the model again");
    }
  }
  return new Map([...batches].sort(([a], [b]) => a - b));
}
