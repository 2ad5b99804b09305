/** A model that is ready to draw, whatever runs it: what `generate` takes. Mirrors edgesd/runtime/pipeline.py. */

import type { PromptBank } from "./bank.js";
import type { Session } from "./session.js";
import type { ModelSpec } from "./settings.js";
import type { SamplerTable } from "./table.js";
import type { PromptTokenizer } from "./tokenizer.js";

export interface Pipeline {
  readonly spec: ModelSpec;
  readonly session: Session;
  /** In the order of spec.tokenizers. */
  readonly tokenizers: readonly PromptTokenizer[];
  /** Throws RequestError for a sampler or step count it lacks. */
  readonly table: (sampler: string, steps: number) => SamplerTable;
  /** Sampler name -> the step counts it has tables for, ascending. */
  readonly samplers: ReadonlyMap<string, readonly number[]>;
  /** A hash of the weights and the target: pictures repeat to the pixel where it is equal. */
  readonly identity: string;
  /** The prompts that were prepared, of a model without text encoders. */
  readonly bank: PromptBank | null;
}
