// Made by `npm run generate` from golden.schema.json; not edited by hand.

/**
 * What golden.json holds. rows: of the sampler's table. tokenizers: how many `ids/<i>/…` pairs there are.
 */
export interface Facts {
  format: "edgesd-golden-1";
  prompt: string;
  negative_prompt: string;
  seed: number;
  sampler: string;
  steps: number;
  guidance: number;
  /**
   * @minItems 2
   * @maxItems 2
   */
  size_px: [number, number];
  tokenizers: number;
  picture_stride: number;
  calls: CallFacts[];
  narrow_calls: CallFacts[];
  gates: {
    [k: string]: Gate;
  };
}
/**
 * One recorded call. inputs and outputs: the component's tensor names -> keys of golden.safetensors.
 *
 * width: of the UNet that answered.
 */
export interface CallFacts {
  component: "text_encoder" | "text_encoder_2" | "unet" | "vae_decoder" | "vae_encoder";
  row: number;
  width: number;
  inputs: {
    /**
     * This interface was referenced by `undefined`'s JSON-Schema definition
     * via the `patternProperty` "^[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}$".
     */
    [k: string]: string;
  };
  outputs: {
    /**
     * This interface was referenced by `undefined`'s JSON-Schema definition
     * via the `patternProperty` "^[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}$".
     */
    [k: string]: string;
  };
}
/**
 * What an artefact must reach against the float32 truth: dB of SNR by component, dB of PSNR and mean absolute
 * difference (0..1) of the finished picture, dB of SNR of the latents after every row. None: no gate.
 */
export interface Gate {
  snr_db: number;
  latents_snr_db: number | null;
  picture_psnr_db: number | null;
  picture_mean_abs: number | null;
}
