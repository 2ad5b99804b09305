/** Prompt embeddings kept for the next picture, in memory up to a byte limit. Mirrors edgesd/runtime/cache.py (no disk). */

import type { Tensor } from "./tensor.js";

/** Least recently used entries go first. */
export class PromptCache {
  private readonly entries = new Map<string, Tensor>();
  private held = 0;

  constructor(private readonly maxBytes = 64 << 20) {}

  async get(key: string, compute: () => Promise<Tensor>): Promise<Tensor> {
    const found = this.entries.get(key) ?? (await compute());
    this.drop(key);
    this.entries.set(key, found);
    this.held += found.data.byteLength;
    for (const oldest of [...this.entries.keys()]) {
      if (this.held <= this.maxBytes) break;
      this.drop(oldest);
    }
    return found;
  }

  private drop(key: string): void {
    this.held -= this.entries.get(key)?.data.byteLength ?? 0;
    this.entries.delete(key);
  }
}
