/** What `benchmarks/web.py` drives: `await bench(job)` in a page of its own. */

import type { BenchJob, BenchResult } from "./bench-worker.js";

function bench(job: BenchJob): Promise<BenchResult> {
  const worker = new Worker(new URL("./bench-worker.ts", import.meta.url), { type: "module" });
  return new Promise((done, failed) => {
    worker.onmessage = ({ data }: MessageEvent<BenchResult | string>) => {
      worker.terminate();
      if (typeof data === "string") failed(new Error(data));
      else done(data);
    };
    worker.onerror = (event) => failed(new Error(event.message));
    worker.postMessage(job);
  });
}
Object.assign(globalThis, { bench });
