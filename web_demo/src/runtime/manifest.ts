/** The bundle's manifest: parsed and checked as `edgesd/manifest.py` does, by the same schema. */

import { DataError, describeError, shown } from "./errors.js";
import type { Manifest } from "./generated/manifest.js";
import schema from "./generated/manifest.schema.json" with { type: "json" };
import { parseStrict, readStrict, type Schema } from "./strict.js";

export type * from "./generated/manifest.js";
export type Component = Manifest["components"][number];
export type Role = Component["name"];

export const FORMAT_MAJOR = 1;
export const KNOWN_CRITICAL: readonly string[] = ["chunked-prompts", "expanded-tokens", "prompt-bank"];
export const MAX_MANIFEST_BYTES = 16 << 20;
const MAX_VALUES = 1 << 18;
const MAX_BUNDLE_BYTES = 2 ** 36;
const MAX_ELEMENTS = 2 ** 31;
const FIX = "Get the bundle again from where it came, or package the model again";
const DEVICE = /^(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?$/i;
const PART = /^[A-Za-z0-9_][A-Za-z0-9._ -]{0,127}$/;

/** Parses and checks manifest bytes. Throws DataError for anything malformed, hostile or too new. */
export function parseManifest(data: Uint8Array): Manifest {
  if (data.length > MAX_MANIFEST_BYTES) {
    throw new DataError(`manifest.json has ${data.length} bytes`, `up to ${MAX_MANIFEST_BYTES}`, FIX);
  }
  let commas = 0;
  for (const byte of data) if (byte === 44) commas++;
  if (commas > MAX_VALUES) throw new DataError(`manifest.json has more than ${commas} values`, `up to ${MAX_VALUES}`, FIX);
  let raw;
  try {
    raw = parseStrict(data);
  } catch (error) {
    throw new DataError(`manifest.json does not parse (${shown(describeError(error))})`, "strict UTF-8 JSON", FIX);
  }
  if (raw === null || typeof raw !== "object" || Array.isArray(raw) || typeof raw.format !== "string") {
    throw new DataError("manifest.json has no format", `an object with format ${FORMAT_MAJOR}.x`, FIX);
  }
  checkFormat(raw.format, raw.critical ?? []);
  try {
    const manifest = readStrict<Manifest>(data, schema as Schema);
    checkClosed(manifest);
    return manifest;
  } catch (error) {
    throw new DataError(`manifest.json: ${shown(describeError(error))}`, "what docs/bundle.md describes", FIX);
  }
}

/** Refuses another major version and critical features this reader does not know. */
function checkFormat(version: string, critical: unknown): void {
  const matched = /^([0-9]{1,4})\.([0-9]{1,4})$/.exec(version);
  if (matched === null || Number(matched[1]) !== FORMAT_MAJOR) {
    const fix = "Update this page (the bundle is of another format), or package the model again";
    throw new DataError(`bundle format ${shown(JSON.stringify(version), 40)}`, `${FORMAT_MAJOR}.x`, fix);
  }
  const listed: unknown[] = Array.isArray(critical) ? critical : [critical];
  const unknown = listed.filter((name) => typeof name !== "string" || !KNOWN_CRITICAL.includes(name));
  if (unknown.length > 0) {
    const names = unknown.slice(0, 8).map((name) => (typeof name === "string" ? name : "(not a name)"));
    const came = `the bundle needs features this page lacks: ${shown(names.join(", "))}`;
    throw new DataError(came, KNOWN_CRITICAL.join(", "), "Update this page");
  }
}

/** What no schema says: paths stay inside, all that is used is listed, nothing is listed twice. */
function checkClosed(manifest: Manifest): void {
  const known = new Set<string>();
  const folded = new Set<string>();
  let total = 0;
  for (const { path, bytes } of manifest.files) {
    checkPath(path);
    known.add(path);
    folded.add(path.toLowerCase());
    total += bytes;
  }
  if (folded.size !== manifest.files.length) throw new Error("a file is listed twice (upper and lower case count as the same)");
  if (folded.has("manifest.json")) throw new Error("manifest.json lists itself");
  if (total > MAX_BUNDLE_BYTES) throw new Error(`the files have ${total} bytes together, more than ${MAX_BUNDLE_BYTES}`);
  const variants = manifest.components.flatMap((component) => component.variants);
  const used = [
    ...variants.flatMap((variant) => [...variant.files, ...(variant.plan === null ? [] : [variant.plan])]),
    ...manifest.model.tokenizers.map((tokenizer) => tokenizer.file),
    ...manifest.samplers.map((sampler) => sampler.file),
    ...manifest.policies.map((policy) => policy.file),
    ...[manifest.golden, manifest.prompts].filter((path) => path !== null),
  ];
  for (const path of used) if (!known.has(path)) throw new Error(`${shown(path)} is used but not listed in files`);
  for (const spec of variants.flatMap((variant) => [...variant.inputs, ...variant.outputs])) {
    if (spec.shape.reduce((product, dim) => product * dim, 1) > MAX_ELEMENTS) {
      throw new Error(`tensor ${spec.name} has more than ${MAX_ELEMENTS} elements`);
    }
  }
  once(manifest.components.map((component) => component.name), "a component");
  once(manifest.policies.map((policy) => policy.name), "a policy");
}

function once(names: string[], what: string): void {
  if (new Set(names).size !== names.length) throw new Error(`${what} is listed twice`);
}

/** A plain relative POSIX path: no `..`, no drive or device, no backslash, no control character, no hidden part. */
function checkPath(path: string): void {
  for (const part of path.split("/")) {
    if (DEVICE.test(part)) throw new Error("a path must not hold a name that Windows keeps for a device");
    if (!PART.test(part) || /[. ]$/.test(part)) {
      throw new Error("a path must be relative, of letters, digits, '.', '_', '-', and stay inside the bundle");
    }
  }
}
