/** From a bundle to a pipeline. Mirrors edgesd/sources.py. */

import { parseBank } from "./bank.js";
import type { Bundle } from "./bundle.js";
import { DataError, RequestError, shown } from "./errors.js";
import { OnnxSession, type OnnxOptions } from "./onnx.js";
import type { Pipeline } from "./pipeline.js";
import { parsePolicy, type Policy } from "./policy.js";
import { parseTables, type TableFile } from "./table.js";
import { PromptTokenizer } from "./tokenizer.js";

export interface OpenPipeline extends Pipeline {
  readonly session: OnnxSession;
  /** The bundle's own policies, by name. */
  readonly policies: ReadonlyMap<string, Policy>;
}

/** The files of a bundle that a session and its pipeline need: the chosen variants', tokenizers, tables, policies. */
export function neededFiles(bundle: Bundle, session: OnnxSession): string[] {
  const { manifest } = bundle;
  return [
    ...session.files(), ...manifest.model.tokenizers.map(({ file }) => file), ...manifest.samplers.map(({ file }) => file),
    ...manifest.policies.map(({ file }) => file), ...(manifest.prompts === null ? [] : [manifest.prompts]),
  ];
}

/** A pipeline on a bundle whose needed files have been fetched; models open at their first call. */
export async function openPipeline(bundle: Bundle, options: OnnxOptions): Promise<OpenPipeline> {
  const { manifest } = bundle;
  const session = new OnnxSession(manifest, (path) => bundle.read(path), options);
  const files = new Map<string, TableFile>();
  for (const { file } of manifest.samplers) if (!files.has(file)) files.set(file, parseTables(await bundle.read(file)));
  const tokenizers = [];
  for (const spec of manifest.model.tokenizers) tokenizers.push(new PromptTokenizer(await bundle.read(spec.file), spec));
  const policies = new Map<string, Policy>();
  for (const { name, file } of manifest.policies) {
    const policy = parsePolicy(await bundle.read(file));
    if (policy.name !== name) throw new DataError(`${file} holds the policy ${policy.name}`, `${name}, as its manifest says`, "Package the model again");
    policies.set(name, policy);
  }
  const samplers = new Map(manifest.samplers.map(({ name, steps }) => [name, [...steps].sort((a, b) => a - b)]));
  return {
    spec: manifest.model, session, tokenizers, samplers, policies, identity: bundle.identity,
    bank: manifest.prompts === null ? null : parseBank(await bundle.read(manifest.prompts)),
    table: (name, steps) => {
      const entry = manifest.samplers.find((one) => one.name === name);
      if (entry === undefined) {
        throw new RequestError(`sampler ${shown(JSON.stringify(name), 60)}`, `this bundle holds ${[...samplers.keys()].join(", ")}`, "Choose one of these");
      }
      if (!entry.steps.includes(steps)) {
        const held = `this bundle holds ${Math.min(...entry.steps)} to ${Math.max(...entry.steps)}`;
        throw new RequestError(`${steps} steps of ${name}`, held, "Choose one of these, or package with --steps");
      }
      const table = files.get(entry.file)?.get(name, steps);
      if (table === undefined) {
        throw new DataError(`${entry.file} lacks ${name} with ${steps} steps`, "what the manifest lists", "Package the model again");
      }
      return table;
    },
  };
}
