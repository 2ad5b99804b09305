/** Prepared prompts: what the text encoder made of an app's fixed prompts. Mirrors edgesd/runtime/bank.py. */

import { DataError, RequestError, describeError, shown } from "./errors.js";
import { allFinite, loadTensors, rows, type Tensor } from "./tensor.js";

const FORMAT = "edgesd-prompts-1";
const MAX_PROMPTS = 4096;
const SHOWN = 6;

/** Prompts and their states, in order. states [N,L,D]; pooled [N,P] or none. */
export class PromptBank {
  private readonly at: Map<string, number>;

  constructor(
    readonly prompts: readonly string[],
    private readonly states: Tensor,
    private readonly pooled: Tensor | null,
  ) {
    this.at = new Map(prompts.map((prompt, i) => [prompt, i]));
  }

  /** The prepared states of a prompt. Throws RequestError, naming what there is, for one that was not prepared. */
  find(prompt: string): { states: Tensor; pooled: Tensor | null } {
    const row = this.at.get(prompt.trim());
    if (row === undefined) {
      const known = this.prompts.filter((one) => one !== "").map((one) => JSON.stringify(one));
      const more = known.length > SHOWN ? ` and ${known.length - SHOWN} more` : "";
      const came = `the prompt ${JSON.stringify(prompt.trim().slice(0, 80))} was not prepared in this bundle`;
      throw new RequestError(came, known.slice(0, SHOWN).join(", ") + more, "Choose one of these, or package without --prompt-bank");
    }
    return { states: rows(this.states, row, row + 1), pooled: this.pooled === null ? null : rows(this.pooled, row, row + 1) };
  }
}

/** Reads a bank. Throws DataError for a broken one. */
export function parseBank(file: Uint8Array): PromptBank {
  try {
    const { tensors, metadata } = loadTensors(file);
    const prompts: unknown = JSON.parse(metadata[FORMAT] as string);
    const texts = Array.isArray(prompts) && prompts.length > 0 && prompts.length <= MAX_PROMPTS && prompts.every((one) => typeof one === "string");
    if (!texts) throw new Error("prompts that are none");
    const array = (name: string, axes: number): Tensor | null => {
      const found = tensors.get(name);
      if (found === undefined) return null;
      const fits = found.data instanceof Float32Array && found.shape.length === axes && found.shape[0] === prompts.length;
      if (!fits) throw new Error("states that do not fit the prompts");
      if (!allFinite(found.data)) throw new Error("numbers that are not finite");
      return found as Tensor;
    };
    const states = array("states", 3);
    if (states === null) throw new Error("no states");
    return new PromptBank(prompts as string[], states, array("pooled", 2));
  } catch (error) {
    const came = `the prepared prompts do not read (${shown(describeError(error), 120)})`;
    throw new DataError(came, "what edgesd wrote", "Package the model again");
  }
}
