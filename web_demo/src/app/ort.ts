/** Loads ONNX Runtime Web in a worker, with as many threads as the page may have. */

import type * as Ort from "onnxruntime-web";

/** ONNX Runtime with the WebAssembly that fits the backend; its files lie beside the page. */
export async function runtime(form: "wasm" | "webgpu", wanted: number, warnings: string[]): Promise<{ ort: typeof Ort; threads: number }> {
  const most = Math.min(navigator.hardwareConcurrency || 1, 8);
  const threads = crossOriginIsolated ? Math.min(wanted > 0 ? wanted : most, most) : 1;
  if (!crossOriginIsolated) {
    warnings.push("One thread only: this page is not cross-origin isolated. Serve it with edgesd serve, or send the headers Cross-Origin-Opener-Policy: same-origin and Cross-Origin-Embedder-Policy: require-corp; a reload may be enough.");
  }
  const [ort, mjs, wasm] = form === "webgpu"
    ? await Promise.all([import("onnxruntime-web/webgpu"), import("onnxruntime-web/ort-wasm-simd-threaded.asyncify.mjs?url"), import("onnxruntime-web/ort-wasm-simd-threaded.asyncify.wasm?url")])
    : await Promise.all([import("onnxruntime-web/wasm"), import("onnxruntime-web/ort-wasm-simd-threaded.mjs?url"), import("onnxruntime-web/ort-wasm-simd-threaded.wasm?url")]);
  ort.env.wasm.wasmPaths = { mjs: new URL(mjs.default, location.href).href, wasm: new URL(wasm.default, location.href).href };
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  return { ort: ort as typeof Ort, threads };
}
