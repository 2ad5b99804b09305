/** Prompts to token ids and weights, as CLIP text encoders take them. Mirrors edgesd/runtime/tokenizer.py. */

import { Tokenizer } from "@huggingface/tokenizers";
import { DataError, RequestError, describeError, shown } from "./errors.js";
import type { ModelSpec } from "./settings.js";
import type { Tensor } from "./tensor.js";

export type TokenizerSpec = ModelSpec["tokenizers"][number];

const MAX_PROMPT_CHARS = 20_000;
const MAX_NESTING = 32;
const MAX_WEIGHT = 10;
const MAX_TOKENIZER_BYTES = 64 << 20;
const OPEN_FACTOR: Record<string, number> = { "(": 1.1, "[": 1 / 1.1 };
const SPACE = /\p{White_Space}/u;
const CLOSES: Record<string, string> = { ")": "(", "]": "[" };
// An escape, a bracket, `:number)`, or text that holds none of these.
const MARKUP = /\\[()[\]\\]?|[([\])]|:\s*(?<weight>[+-]?[\d.]+)\s*\)|:|[^\\()[\]:]+/gu;

/** One prompt laid out for its text encoder, a row a call. truncated: the text that did not fit, "" when all did. */
export interface Tokens {
  readonly ids: readonly BigInt64Array[];
  readonly weights: readonly Float32Array[];
  readonly truncated: string;
}

type Fragment = readonly [text: string, weight: number];
interface Piece {
  id: number;
  weight: number;
  fragment: number;
  /** Which token of its fragment it came from. */
  token: number;
}

/** A tokenizer.json with the layout its text encoder wants. Throws DataError if it does not load or lacks the spec's ids. */
export class PromptTokenizer {
  private readonly tokenizer: Tokenizer;
  private readonly expand: Map<number, number>;
  private readonly lowers: boolean;
  private readonly words: Words | null;

  constructor(
    data: Uint8Array,
    readonly spec: TokenizerSpec,
  ) {
    const fix = "Get the bundle again from where it came, or package the model again";
    if (data.length > MAX_TOKENIZER_BYTES) throw new DataError(`a tokenizer of ${data.length} bytes`, `up to ${MAX_TOKENIZER_BYTES}`, fix);
    let words;
    try {
      const text = new TextDecoder("utf-8", { fatal: true }).decode(data);
      const json = JSON.parse(text, unicodeSpaces) as { added_tokens?: AddedWord[] };
      const alone = (json.added_tokens ?? []).filter((word) => word.single_word && word.content !== "");
      this.words = wordsAlone(alone);
      json.added_tokens = (json.added_tokens ?? []).filter((word) => !alone.includes(word));
      this.tokenizer = new Tokenizer(json, {});
      this.lowers = text.includes('"Lowercase"');
      words = this.tokenizer.get_vocab().size + alone.length;
    } catch (error) {
      throw new DataError(`${spec.file} does not load (${shown(describeError(error))})`, "a tokenizer.json", fix);
    }
    this.expand = new Map(spec.expand);
    const special = Math.max(spec.bos_id, spec.eos_id, spec.pad_id, ...spec.expand.map(([first, count]) => first + count - 1));
    if (special >= words) throw new DataError(`token id ${special}`, `below ${words} in ${spec.file}`, fix);
  }

  /**
   * The prompt's ids and weights in `chunks` calls of max_length; what does not fit is cut off and reported.
   * weighted false: brackets and backslashes are plain text, as diffusers has it.
   */
  encode(prompt: string, weighted = true): Tokens {
    checkPrompt(prompt);
    const fragments: Fragment[] = weighted ? parseWeights(prompt) : [[prompt, 1]];
    const pieces = fragments.flatMap(([text, weight], fragment) => this.pieces(text, weight, fragment));
    const room = this.spec.max_length - 2;
    const calls = Array.from({ length: this.spec.chunks }, (_, i) => this.layOut(pieces.slice(i * room, (i + 1) * room)));
    const cut = pieces[room * this.spec.chunks];
    return {
      ids: calls.map((call) => call.ids),
      weights: calls.map((call) => call.weights),
      truncated: cut === undefined ? "" : this.textFrom(fragments, cut),
    };
  }

  /** What the library makes of the text between words that stand alone, which it would find inside others too. */
  private tokens(prompt: string): { ids: number[]; tokens: string[] } {
    const text = this.words === null ? prompt : prompt.normalize();
    const made: { ids: number[]; tokens: string[] } = { ids: [], tokens: [] };
    let from = 0;
    const add = (part: string): void => {
      // JavaScript's lower case of a last capital sigma depends on its neighbours, the Rust library's does not.
      const { ids, tokens } = this.tokenizer.encode(this.lowers ? part.replaceAll("Σ", "σ") : part, { add_special_tokens: false });
      made.ids.push(...ids);
      made.tokens.push(...tokens);
    };
    for (const match of this.words === null ? [] : text.matchAll(this.words.pattern)) {
      add(text.slice(from, match.index));
      made.ids.push(this.words?.ids.get(match[0].normalize().toLowerCase()) as number);
      made.tokens.push("x".repeat(new TextEncoder().encode(match[0]).length)); // a name has as many characters as bytes
      from = match.index + match[0].length;
    }
    add(text.slice(from));
    return made;
  }

  private pieces(text: string, weight: number, fragment: number): Piece[] {
    const { ids } = this.tokens(text);
    return ids.flatMap((first, token) =>
      Array.from({ length: this.expand.get(first) ?? 1 }, (_, i) => ({ id: first + i, weight, fragment, token })),
    );
  }

  /** At most max_length - 2 tokens as one call: start, tokens, end, padding. */
  private layOut(pieces: readonly Piece[]): { ids: BigInt64Array; weights: Float32Array } {
    const { max_length, bos_id, eos_id, pad_id } = this.spec;
    const ids = new BigInt64Array(max_length).fill(BigInt(pad_id));
    const weights = new Float32Array(max_length).fill(1);
    ids[0] = BigInt(bos_id);
    ids[pieces.length + 1] = BigInt(eos_id);
    pieces.forEach((piece, i) => {
      ids[i + 1] = BigInt(piece.id);
      weights[i + 1] = piece.weight;
    });
    return { ids, weights };
  }

  /**
   * The text from a token on. The library gives no offsets, so tokens are counted off along the text: each stands for
   * as many bytes of it as its own name has (byte-level BPE), spaces apart.
   */
  private textFrom(fragments: readonly Fragment[], cut: Piece): string {
    const [text] = fragments[cut.fragment] as Fragment;
    const tokens = this.tokens(text).tokens.slice(0, cut.token);
    let bytes = tokens.reduce((sum, name) => sum + name.replace(/<\/w>$/, "").length, 0);
    const characters = [...text];
    let at = 0;
    const encoder = new TextEncoder();
    while (at < characters.length && (bytes > 0 || (bytes === 0 && SPACE.test(characters[at] as string)))) {
      const character = characters[at++] as string;
      if (!SPACE.test(character)) bytes -= encoder.encode(character.toLowerCase()).length;
    }
    if (bytes < 0) at--; // the cut lies within a character
    const rest = fragments.slice(cut.fragment + 1).map(([later]) => later);
    return [characters.slice(at).join(""), ...rest].join("").replace(/^[\p{White_Space}\x1c-\x1f]+|[\p{White_Space}\x1c-\x1f]+$/gu, "");
  }
}

interface AddedWord {
  id: number;
  content: string;
  single_word: boolean;
}
interface Words {
  pattern: RegExp;
  ids: Map<string, number>;
}

/** Added words that count only where no letter, mark, digit or underscore touches them (textual inversion's). */
function wordsAlone(words: readonly AddedWord[]): Words | null {
  if (words.length === 0) return null;
  const longest = [...words].sort((a, b) => b.content.length - a.content.length);
  const texts = longest.map(({ content }) => content.normalize().replace(/[\\^$.*+?()[\]{}|/-]/g, "\\$&")).join("|");
  const touching = "[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}]";
  const ids = new Map(words.map(({ content, id }) => [content.normalize().toLowerCase(), id]));
  return { pattern: new RegExp(`(?<!${touching})(?:${texts})(?!${touching})`, "giu"), ids };
}

/** A pattern's `\\s` as the tokenizers library reads it: Unicode's white space, to which JavaScript adds U+FEFF. */
function unicodeSpaces(key: string, value: unknown): unknown {
  return key === "Regex" && typeof value === "string" ? value.replaceAll("\\s", "\\p{White_Space}") : value;
}

/** Throws RequestError for a prompt that no tokenizer should be given: too long, or not valid text. */
export function checkPrompt(prompt: string): void {
  const length = prompt.length > MAX_PROMPT_CHARS ? [...prompt].length : prompt.length;
  if (length > MAX_PROMPT_CHARS) throw new RequestError(`a prompt of ${length} characters`, `up to ${MAX_PROMPT_CHARS}`, "Shorten it");
  if (!prompt.isWellFormed()) throw new RequestError("a prompt with broken characters", "valid Unicode text", "Type it anew");
}

/** The prompt as fragments (text, weight), neighbours of equal weight joined. */
export function parseWeights(prompt: string): Fragment[] {
  let parts: Fragment[] = [];
  const opened: { bracket: string; first: number }[] = [];
  const close = (bracket: string, factor: number): boolean => {
    const at = opened.findLastIndex((open) => open.bracket === bracket);
    if (at < 0) return false;
    const first = opened.splice(at, 1)[0]?.first ?? 0;
    parts = parts.map(([text, weight], i) => [text, i >= first ? weight * factor : weight]);
    return true;
  };
  for (const match of prompt.matchAll(MARKUP)) {
    const mark = match[0];
    const weight = match.groups?.weight;
    if (mark in OPEN_FACTOR) {
      opened.push({ bracket: mark, first: parts.length });
      if (opened.length > MAX_NESTING) {
        const allowed = `${MAX_NESTING} open at a time; \\( and \\[ for the characters`;
        throw new RequestError("a prompt with brackets nested too deep", allowed, "Close them or escape them");
      }
    } else if (mark in CLOSES && close(CLOSES[mark] as string, OPEN_FACTOR[CLOSES[mark] as string] as number)) {
      continue;
    } else if (weight !== undefined && opened.some((open) => open.bracket === "(")) {
      close("(", numberOf(weight));
    } else {
      parts.push([mark.replace(/^\\/, ""), 1]);
    }
  }
  for (const { bracket } of [...opened]) close(bracket, OPEN_FACTOR[bracket] as number);
  return joined(parts);
}

function numberOf(text: string): number {
  const value = Number(text);
  if (Number.isNaN(value)) {
    const fix = "Write it like (word:1.3), or escape the brackets with a backslash";
    throw new RequestError(`prompt weight ${shown(text, 40)}`, `a number within +-${MAX_WEIGHT}`, fix);
  }
  return value;
}

function joined(parts: readonly Fragment[]): Fragment[] {
  const made: [string, number][] = [];
  for (const [text, weight] of parts) {
    if (!(Math.abs(weight) <= MAX_WEIGHT)) {
      const came = `a prompt weight of ${Number(weight.toPrecision(6))}`;
      throw new RequestError(came, `-${MAX_WEIGHT} to ${MAX_WEIGHT}`, "Use a smaller weight or fewer brackets");
    }
    const last = made.at(-1);
    if (last !== undefined && last[1] === weight) last[0] += text;
    else made.push([text, weight]);
  }
  return made;
}

/** Text states multiplied by the tokens' weights, then scaled back to their former mean (AUTOMATIC1111's convention). */
export function applyWeights({ data, shape }: Tensor, weights: Float32Array): Tensor {
  const width = shape[2] as number;
  const weighted = Float64Array.from(data, (x, i) => x * (weights[Math.floor(i / width)] as number));
  const before = data.reduce((sum, x) => sum + x, 0);
  const after = weighted.reduce((sum, x) => sum + x, 0);
  const scale = before * after > 0 ? before / after : 1;
  return { data: Float32Array.from(weighted, (x) => x * scale), shape };
}
