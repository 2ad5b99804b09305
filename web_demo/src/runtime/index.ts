/**
 * edgesd-web: opens edgesd bundles in a browser and draws. UI-free; a mirror of edgesd/runtime.
 *
 *     import * as ort from "onnxruntime-web/wasm";
 *     import { Bundle, generate, openPipeline, openShelf } from "edgesd-web";
 *     const bundle = await Bundle.open("/shapes-onnx-web.edgesd", await openShelf());
 *     const pipeline = await openPipeline(bundle, { ort, form: "wasm" });
 *     const picture = await generate(pipeline, "a red circle on a white background", { seed: 3 });
 */

export * from "./errors.js";
export { parseManifest, type Manifest, type Role } from "./manifest.js";
export { openShelf, MemoryShelf, type Shelf } from "./shelf.js";
export { Bundle, digest, megabytes, type FetchOptions, type FileEntry, type Progress } from "./bundle.js";
export { neededFiles, openPipeline, type OpenPipeline } from "./open.js";
export { choose, widthsOf, type Form, type Variant } from "./choose.js";
export { OnnxSession, type OnnxOptions } from "./onnx.js";
export type { Session } from "./session.js";
export type { Pipeline } from "./pipeline.js";
export { generate, sample, decode, type GenerateOptions, type Picture, type SampleOptions } from "./generate.js";
export { run, Step } from "./loop.js";
export { DEFAULTS, check, resolve, settingsFromJson, type Settings } from "./settings.js";
export { dumpState, loadState, type State } from "./state.js";
export { parseTables, SamplerTable, type TableFile } from "./table.js";
export { tensor, type Tensor, type Tensors } from "./tensor.js";
export { PromptCache } from "./cache.js";
export { PromptTokenizer, parseWeights } from "./tokenizer.js";
export type { Start } from "./canvas.js";
export * from "./image.js";
export { MAX_SEED, Philox, Purpose, TorchNoise, makeSource } from "./noise.js";
export { browserSensors, deviceState, merge, UNKNOWN, type DeviceState, type Sensors, type Thermal } from "./device.js";
export { decide, limits, parsePolicy, type Decision, type Limits, type Policy } from "./policy.js";
export { PolicyRun, Replay, describeChange, type Change, type Governor } from "./governed.js";
export { goldenFiles, selftest, snrDb, type Check } from "./golden.js";
