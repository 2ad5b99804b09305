// Made by `npm run generate` from manifest.schema.json; not edited by hand.

/**
 * A bundle. prompts: the file of prepared prompts of a bundle without text encoders (critical: prompt-bank).
 *
 * policies: what the device's state gets, by name; a runtime takes these before any it has itself.
 */
export interface Manifest {
  format: string;
  critical: string[];
  target: string;
  model: ModelSpec;
  components: Component[];
  samplers: SamplerFile[];
  policies: PolicyFile[];
  noise: NoiseSpec;
  golden: string | null;
  prompts: string | null;
  quality: {
    [k: string]: unknown;
  };
  provenance: Provenance;
  downgrades: Downgrade[];
  files: FileEntry[];
}
/**
 * All that a runtime must know of a model besides its files; the torch reference carries the same object.
 *
 * family: sd1, sd2, sdxl, sdxl_refiner. unet_in_channels 9 = inpainting by concatenation.
 * scheduler: the checkpoint's own diffusers config, for provenance and for compiling further tables.
 * clip_skip: text layers left out at the end, already left out of the components. zero_empty_negative: an empty
 * negative prompt is zeros in place of an encoding (SDXL).
 */
export interface ModelSpec {
  name: string;
  family: string;
  prediction_type: "epsilon" | "v_prediction" | "sample" | "flow" | "edm";
  unet_in_channels: number;
  latent: LatentSpec;
  tokenizers: TokenizerSpec[];
  defaults: Defaults;
  zero_empty_negative: boolean;
  guidance_embedding_dim: number;
  time_ids: boolean;
  clip_skip: number;
  scheduler: {
    [k: string]: unknown;
  };
}
/**
 * Latents `[1, channels, H/downscale, W/downscale]`: decoder input = latents / scaling_factor + shift_factor.
 *
 * rgb_factors: least-squares map latent channels -> RGB in 0..1, rows R,G,B; rgb_bias added: cheap previews.
 */
export interface LatentSpec {
  channels: number;
  downscale: number;
  scaling_factor: number;
  shift_factor: number;
  rgb_factors: number[][] | null;
  rgb_bias: [number, number, number] | null;
}
/**
 * One tokenizer.json and how a prompt is laid out for its text encoder.
 *
 * max_length: tokens per call, start and end token included. pad_id fills the rest (SD 1.x: the end token;
 * the second SDXL encoder: 0). component: the text encoder that takes its ids. chunks: calls of a prompt, each of
 * max_length; the UNet attends to their states end to end. expand: (id, count) of tokens that stand for several
 * vectors: such an id is read as the ids id .. id+count-1.
 */
export interface TokenizerSpec {
  file: string;
  component: "text_encoder" | "text_encoder_2" | "unet" | "vae_decoder" | "vae_encoder";
  max_length: number;
  chunks: number;
  expand: [number, number][];
  bos_id: number;
  eos_id: number;
  pad_id: number;
}
/**
 * What a runtime uses where the user says nothing.
 */
export interface Defaults {
  sampler: string;
  steps: number;
  guidance: number;
  /**
   * @minItems 2
   * @maxItems 2
   */
  size_px: [number, number];
}
export interface Component {
  name: "text_encoder" | "text_encoder_2" | "unet" | "vae_decoder" | "vae_encoder";
  variants: Variant[];
}
/**
 * One artefact of a component. files[0] is what a runtime opens; the rest lie beside it (weights).
 *
 * status says how it was checked: executed in its own runtime, interpreted (Core ML off a Mac), unverified.
 * snr_db is the error against the float32 truth on recorded calls, per output the worst. plan: the quantization as the
 * artefact has it (JSON, see docs/quantization.md). gate_db: what snr_db must reach where its own simulation says so.
 */
export interface Variant {
  axes: Axes;
  files: string[];
  inputs: TensorSpec[];
  outputs: TensorSpec[];
  params: number;
  macs: number;
  status: "executed" | "interpreted" | "unverified";
  runtime: string;
  snr_db: number | null;
  gate_db: number | null;
  plan: string | null;
  seconds: number | null;
  compute_units: string;
}
/**
 * What one variant of a component is made for. A reader picks by these, never by a file name.
 *
 * width: fraction of the inner channels that stay (0..1]. size_px: picture height, width in pixels.
 * batch: rows per call (2 = guidance in one call). precision: of weights (and activations for int8).
 * chunk: (index, count) for a component split into pieces that run one after the other.
 * form: a target's own flavour, "" for its default (e.g. "wasm", "webgpu", "gpu", "split_einsum").
 */
export interface Axes {
  width: number;
  /**
   * @minItems 2
   * @maxItems 2
   */
  size_px: [number, number];
  batch: number;
  precision: "fp32" | "fp16" | "int8" | "hybrid" | "w8";
  /**
   * @minItems 2
   * @maxItems 2
   */
  chunk: [number, number];
  form: string;
}
/**
 * One input or output of a component. shape is static; meaning is a sentence for people.
 */
export interface TensorSpec {
  name: string;
  dtype: "float32" | "float16" | "int64" | "int32";
  shape: number[];
  meaning: string;
}
/**
 * Tables of one sampler inside a safetensors file: `steps` lists the step counts it holds.
 */
export interface SamplerFile {
  name: string;
  file: string;
  steps: number[];
}
/**
 * A policy that travels with the bundle; the table's own schema is docs/policies.md (edgesd/runtime/policy.py).
 */
export interface PolicyFile {
  name: string;
  file: string;
}
export interface NoiseSpec {
  generator: "philox4x32-10";
  transform: "box-muller-f64";
  version: 1;
}
/**
 * Where the weights came from; never a local path. revision: hub commit or "". sha256: over the source files.
 *
 * ingredients: what was added to or swapped in the source, in order.
 */
export interface Provenance {
  source: string;
  revision: string;
  sha256: string;
  licence: string;
  edgesd: string;
  libraries: {
    [k: string]: string;
  };
  recipe: {
    [k: string]: unknown;
  };
  ingredients: Ingredient[];
  made: string;
}
/**
 * One file that went in: its kind (checkpoint, lora, embedding, unet, ...), name without path, hash and scale.
 */
export interface Ingredient {
  kind: string;
  name: string;
  sha256: string;
  scale: number | null;
}
/**
 * A deliberate step down from what was asked: where, what and why. Printed when it is made.
 */
export interface Downgrade {
  component: string;
  what: string;
  why: string;
}
export interface FileEntry {
  path: string;
  bytes: number;
  sha256: string;
}
