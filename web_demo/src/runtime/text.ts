/** What the UNet is told besides the latents, by its own input names. Mirrors edgesd/runtime/text.py. */

import type { PromptCache } from "./cache.js";
import type { Pipeline } from "./pipeline.js";
import type { ModelSpec, Settings } from "./settings.js";
import { concat, type Tensor, type Tensors } from "./tensor.js";
import { applyWeights, type PromptTokenizer, type Tokens } from "./tokenizer.js";

const POOLED = "text_encoder_2"; // the component that also gives the whole prompt as one vector

/** One prompt: states [1,L,D], its weights applied; pooled [1,P] (SDXL); truncated: what did not fit. */
export interface Encoded {
  readonly states: Tensor;
  readonly pooled: Tensor | null;
  readonly truncated: string;
}

/** The prompt through every text encoder of the model, their states side by side (SDXL's order), or as prepared. */
export async function encodePrompt(pipeline: Pipeline, prompt: string, cache: PromptCache): Promise<Encoded> {
  if (pipeline.bank !== null) return { ...pipeline.bank.find(prompt), truncated: "" };
  const towers: Encoded[] = [];
  for (const tokenizer of pipeline.tokenizers) towers.push(await tower(pipeline, tokenizer, prompt, cache));
  return {
    states: concat(towers.map((one) => one.states), 2),
    pooled: towers.find((one) => one.pooled !== null)?.pooled ?? null,
    truncated: towers.find((one) => one.truncated !== "")?.truncated ?? "",
  };
}

async function tower(pipeline: Pipeline, tokenizer: PromptTokenizer, prompt: string, cache: PromptCache): Promise<Encoded> {
  const tokens = tokenizer.encode(prompt);
  const { component, max_length } = tokenizer.spec;
  let made: Tensors[] | null = null;
  const outputs = async (): Promise<Tensors[]> => {
    if (made === null) {
      made = [];
      for (const ids of tokens.ids) {
        made.push(await pipeline.session.run(component, { input_ids: { data: ids, shape: [1, max_length] } }));
      }
    }
    return made;
  };
  const key = `${pipeline.identity}/${component}/${prompt}`;
  const hidden = await cache.get(key, async () => concat((await outputs()).map((one) => one.encoder_hidden_states as Tensor), 1));
  const pooled = component === POOLED ? await cache.get(`pooled/${key}`, async () => (await outputs())[0]?.text_embeds as Tensor) : null;
  return { states: weighted(hidden, tokens), pooled, truncated: tokens.truncated };
}

/** The weights of each call's tokens on its own states. */
function weighted(hidden: Tensor, tokens: Tokens): Tensor {
  if (tokens.weights.every((row) => row.every((w) => w === 1))) return hidden;
  const [, length, width] = hidden.shape as [number, number, number];
  const each = length / tokens.weights.length;
  const parts = tokens.weights.map((weights, i) =>
    applyWeights({ data: hidden.data.subarray(i * each * width, (i + 1) * each * width), shape: [1, each, width] }, weights),
  );
  return concat(parts, 1);
}

/** What the UNet is told of the prompt (or the negative prompt), and what of it did not fit. */
export async function conditions(
  pipeline: Pipeline, settings: Settings, sizePx: [number, number], cache: PromptCache, negative: boolean,
): Promise<{ told: Tensors; truncated: string }> {
  const { spec } = pipeline;
  const encoded = await side(pipeline, settings, cache, negative);
  const told: Tensors = { encoder_hidden_states: encoded.states };
  if (encoded.pooled !== null) told.text_embeds = encoded.pooled;
  if (spec.time_ids) {
    const ids = timeIds(spec, settings, sizePx, negative);
    told.time_ids = { data: Float32Array.from(ids), shape: [1, ids.length] };
  }
  if (spec.guidance_embedding_dim > 0) {
    told.timestep_cond = { data: guidanceEmbedding(settings.guidance_scale, spec.guidance_embedding_dim), shape: [1, spec.guidance_embedding_dim] };
  }
  return { told, truncated: encoded.truncated };
}

async function side(pipeline: Pipeline, settings: Settings, cache: PromptCache, negative: boolean): Promise<Encoded> {
  if (!negative) return encodePrompt(pipeline, settings.prompt, cache);
  if (!pipeline.spec.zero_empty_negative || settings.negative_prompt.trim() !== "") {
    return encodePrompt(pipeline, settings.negative_prompt, cache);
  }
  const like = await encodePrompt(pipeline, settings.prompt, cache);
  const zeros = ({ data, shape }: Tensor): Tensor => ({ data: new Float32Array(data.length), shape });
  return { states: zeros(like.states), pooled: like.pooled === null ? null : zeros(like.pooled), truncated: "" };
}

/** SDXL's size conditioning: original size, crop, then target size, or the refiner's aesthetic score. */
function timeIds(spec: ModelSpec, s: Settings, sizePx: [number, number], negative: boolean): number[] {
  const head = [...(s.original_size ?? sizePx), ...s.crops_coords_top_left];
  if (spec.family === "sdxl_refiner") return [...head, negative ? s.negative_aesthetic_score : s.aesthetic_score];
  return [...head, ...(s.target_size ?? sizePx)];
}

/** Sinusoids of guidance - 1 for consistency models (diffusers' get_guidance_scale_embedding). */
function guidanceEmbedding(guidance: number, dim: number): Float32Array {
  const half = Math.floor(dim / 2);
  const out = new Float32Array(dim);
  const f32 = Math.fround;
  for (let i = 0; i < half; i++) {
    const frequency = f32(Math.exp(f32(i * f32(-Math.log(10000) / (half - 1)))));
    const angle = f32(f32((guidance - 1) * 1000) * frequency);
    out[i] = Math.sin(angle);
    out[half + i] = Math.cos(angle);
  }
  return out;
}
