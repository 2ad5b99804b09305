import { describe, expect, it } from "vitest";
import { PromptTokenizer, parseWeights, type TokenizerSpec } from "../../src/runtime/tokenizer.js";
import { golden } from "./golden.js";

interface Case {
  spec: number;
  prompt: string;
  weighted: boolean;
  ids: number[][];
  weights?: number[][];
  truncated?: string;
}
interface Golden {
  tokenizers: object[];
  specs: (TokenizerSpec & { tokenizer: number })[];
  cases: Case[];
  refused: { text: string; times: number }[];
  accepted: { text: string; times: number }[];
}
const wanted = golden<Golden>("tokens");
const bytes = (value: unknown): Uint8Array => new TextEncoder().encode(JSON.stringify(value));
const tokenizers = wanted.specs.map((spec) => new PromptTokenizer(bytes(wanted.tokenizers[spec.tokenizer]), spec));

/** Where @huggingface/tokenizers differs from its Rust twin: special tokens in capitals, U+FEFF at an end (docs/web.md). */
function isCorner(prompt: string): boolean {
  return /<\|(start|end)oftext\|>/.test(prompt.toLowerCase().replaceAll(/<\|(start|end)oftext\|>/g, (found) => (prompt.includes(found) ? "" : found))) || /^\ufeff|\ufeff$/.test(prompt);
}

describe("tokenizer", () => {
  it.each(["tokens", "words"])("gives the ids and weights that Python gives (%s)", (name) => {
    const { cases, specs, tokenizers: files } = golden<Golden>(name);
    const readers = specs.map((spec) => new PromptTokenizer(bytes(files[spec.tokenizer]), spec));
    const wrong: string[] = [];
    for (const { spec, prompt, weighted, ids, weights } of cases.filter(({ prompt }) => !isCorner(prompt))) {
      const made = (readers[spec] as PromptTokenizer).encode(prompt, weighted);
      const { max_length, pad_id } = specs[spec] as TokenizerSpec;
      const padded = ids.map((call) => [...call, ...Array<number>(max_length - call.length).fill(pad_id)]);
      const whole = (weights ?? ids.map(() => [])).map((call) => [...call.map(Math.fround), ...Array<number>(max_length - call.length).fill(1)]);
      const same = JSON.stringify(made.ids.map((call) => Array.from(call, Number))) === JSON.stringify(padded);
      const equal = JSON.stringify(made.weights.map((call) => [...call])) === JSON.stringify(whole);
      if (!same || !equal) wrong.push(prompt);
    }
    expect(wrong).toEqual([]);
  });

  it("says what did not fit", () => {
    const cut = wanted.cases.filter(({ truncated, prompt }) => truncated !== undefined && truncated !== "" && prompt.normalize("NFC") === prompt);
    expect(cut.length).toBeGreaterThan(20);
    const corners = new Set(wanted.cases.map(({ prompt }) => prompt).filter(isCorner));
    expect(corners.size).toBeLessThan(20);
    for (const { spec, prompt, weighted, truncated } of cut) {
      expect((tokenizers[spec] as PromptTokenizer).encode(prompt, weighted).truncated).toBe(truncated);
    }
  });

  it("refuses and accepts what Python does", () => {
    for (const { text, times } of wanted.refused) expect(() => tokenizers[0]?.encode(text.repeat(times))).toThrow("Allowed");
    for (const { text, times } of wanted.accepted) tokenizers[0]?.encode(text.repeat(times));
  });

  it("nests and escapes weights as AUTOMATIC1111's web UI", () => {
    expect(parseWeights("a (big:1.5) cat")).toEqual([["a ", 1], ["big", 1.5], [" cat", 1]]);
    expect(parseWeights("((a))")).toEqual([["a", 1.1 * 1.1]]);
    expect(parseWeights("\\(a\\)")).toEqual([["(a)", 1]]);
    expect(parseWeights("[a")).toEqual([["a", 1 / 1.1]]);
  });

  it("refuses a file that is none, and ids beyond its words", () => {
    const spec = wanted.specs[0] as TokenizerSpec;
    expect(() => new PromptTokenizer(bytes({}), spec)).toThrow("does not load");
    expect(() => new PromptTokenizer(bytes(wanted.tokenizers[0]), { ...spec, pad_id: 999_999 })).toThrow("token id 999999");
  });
});
