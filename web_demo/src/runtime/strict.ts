/**
 * Strict JSON, and values checked against a JSON Schema: what pydantic does for the Python reader.
 *
 * Text: UTF-8 without a byte order mark, no key twice, no integer beyond 2^53 - 1, no number beyond float64, no half of a
 * surrogate pair. Values: `16.0` is no integer, fields the schema does not name are dropped (or refused, where it says
 * so), defaults are filled in. The schemas are pydantic's own export (`src/runtime/generated`).
 */

const MAX_INT = 2 ** 53 - 1;
const MAX_DEPTH = 400;

/** A number written with a point or exponent: never an integer, whatever its value. */
class Float {
  constructor(readonly value: number) {}
}

export type Json = null | boolean | number | string | Json[] | { [key: string]: Json };
type Raw = null | boolean | number | Float | string | Raw[] | Map<string, Raw>;

/** A schema as pydantic exports it (the part of 2020-12 that it uses). */
export interface Schema {
  $ref?: string;
  $defs?: Record<string, Schema>;
  anyOf?: Schema[];
  type?: string;
  const?: Json;
  enum?: Json[];
  default?: Json;
  properties?: Record<string, Schema>;
  required?: string[];
  additionalProperties?: boolean | Schema;
  patternProperties?: Record<string, Schema>;
  items?: Schema;
  prefixItems?: Schema[];
  minItems?: number;
  maxItems?: number;
  minLength?: number;
  maxLength?: number;
  pattern?: string;
  minimum?: number;
  maximum?: number;
  exclusiveMinimum?: number;
}

/** Parses and checks bytes. Throws Error (a plain one: the caller says what the text was) with the place of the fault. */
export function readStrict<T>(data: Uint8Array, schema: Schema): T {
  return fill(schema, schema, parse(data), "") as T;
}

/** The same for a value that is no field of a schema: strict text, any content. */
export function parseStrict(data: Uint8Array): Json {
  return plain(parse(data));
}

// ---- text -------------------------------------------------------------------------------------------------------

function parse(data: Uint8Array): Raw {
  const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(data);
  const parser = new Parser(text);
  return parser.whole();
}

const NUMBER = /-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/y;
const WORDS: [string, boolean | null][] = [["true", true], ["false", false], ["null", null]];

class Parser {
  private at = 0;
  constructor(private readonly text: string) {}

  whole(): Raw {
    const value = this.value(0);
    this.space();
    if (this.at !== this.text.length) throw this.fault("text after the end");
    return value;
  }

  private value(depth: number): Raw {
    if (depth > MAX_DEPTH) throw this.fault("nested too deep");
    this.space();
    const next = this.text[this.at];
    if (next === "{") return this.object(depth);
    if (next === "[") return this.array(depth);
    if (next === '"') return this.string();
    for (const [word, meant] of WORDS) {
      if (this.text.startsWith(word, this.at)) {
        this.at += word.length;
        return meant;
      }
    }
    return this.number();
  }

  private object(depth: number): Map<string, Raw> {
    const found = new Map<string, Raw>();
    this.list("}", () => {
      this.space();
      if (this.text[this.at] !== '"') throw this.fault("a key is missing");
      const key = this.string();
      if (found.has(key)) throw this.fault(`key ${JSON.stringify(key.slice(0, 40))} appears twice`);
      this.space();
      if (this.text[this.at++] !== ":") throw this.fault("a colon is missing");
      found.set(key, this.value(depth + 1));
    });
    return found;
  }

  private array(depth: number): Raw[] {
    const found: Raw[] = [];
    this.list("]", () => found.push(this.value(depth + 1)));
    return found;
  }

  private list(end: string, one: () => void): void {
    this.at++;
    this.space();
    if (this.text[this.at] === end) {
      this.at++;
      return;
    }
    for (;;) {
      one();
      this.space();
      const next = this.text[this.at++];
      if (next === end) return;
      if (next !== ",") throw this.fault("a comma is missing");
    }
  }

  private string(): string {
    let end = this.at;
    let slashes: number;
    do {
      end = this.text.indexOf('"', end + 1);
      if (end < 0) throw this.fault("a text without an end");
      slashes = 0;
      while (this.text[end - 1 - slashes] === "\\") slashes++;
    } while (slashes % 2 === 1);
    const value = JSON.parse(this.text.slice(this.at, end + 1)) as string;
    if (!value.isWellFormed()) throw this.fault("half of a surrogate pair");
    this.at = end + 1;
    return value;
  }

  private number(): number | Float {
    NUMBER.lastIndex = this.at;
    const match = NUMBER.exec(this.text);
    if (match === null) throw this.fault("no value");
    this.at = NUMBER.lastIndex;
    const value = Number(match[0]);
    if (!Number.isFinite(value)) throw this.fault("a number beyond float64");
    if (match[1] !== undefined || match[2] !== undefined) return new Float(value);
    if (match[0].length > 17 || Math.abs(value) > MAX_INT) throw this.fault("an integer beyond 2^53");
    return value === 0 ? 0 : value;
  }

  private space(): void {
    while (" \t\n\r".includes(this.text[this.at] ?? "x")) this.at++;
  }

  private fault(what: string): Error {
    return new Error(`${what} (character ${this.at})`);
  }
}

function plain(raw: Raw): Json {
  if (raw instanceof Float) return raw.value;
  if (Array.isArray(raw)) return raw.map(plain);
  if (raw instanceof Map) return Object.fromEntries([...raw].map(([key, value]) => [key, plain(value)]));
  return raw;
}

// ---- values -----------------------------------------------------------------------------------------------------

function fill(root: Schema, schema: Schema, raw: Raw, where: string): Json {
  if (schema.$ref !== undefined) {
    const name = schema.$ref.split("/").pop() ?? "";
    return fill(root, root.$defs?.[name] as Schema, raw, where);
  }
  if (schema.anyOf !== undefined) {
    const inner = schema.anyOf.find((option) => (raw === null) === (option.type === "null"));
    if (inner === undefined) throw wrong(where, "null where a value must stand");
    return fill(root, inner, raw, where);
  }
  const allowed = schema.enum ?? (schema.const === undefined ? undefined : [schema.const]);
  if (allowed !== undefined && !(allowed as Raw[]).includes(raw)) throw wrong(where, `not one of ${allowed.join(", ")}`);
  switch (schema.type) {
    case "object":
      return object(root, schema, raw, where);
    case "array":
      return array(root, schema, raw, where);
    case "string":
      return text(schema, raw, where);
    case "integer":
      if (typeof raw !== "number") throw wrong(where, "no integer");
      return bounded(schema, raw, where);
    case "number":
      if (raw instanceof Float) return bounded(schema, raw.value, where);
      if (typeof raw !== "number") throw wrong(where, "no number");
      return bounded(schema, raw, where);
    case "boolean":
      if (typeof raw !== "boolean") throw wrong(where, "neither true nor false");
      return raw;
    case "null":
      if (raw !== null) throw wrong(where, "not null");
      return null;
    default:
      return plain(raw);
  }
}

function object(root: Schema, schema: Schema, raw: Raw, where: string): Json {
  if (!(raw instanceof Map)) throw wrong(where, "no object");
  const properties = schema.properties ?? {};
  const made: Record<string, Json> = {};
  for (const name of schema.required ?? []) if (!raw.has(name)) throw wrong(`${where}.${name}`, "missing");
  for (const [name, inner] of Object.entries(properties)) {
    const value = raw.get(name);
    if (value !== undefined) made[name] = fill(root, inner, value, `${where}.${name}`);
    else if (inner.default !== undefined) made[name] = structuredClone(inner.default);
    else if (inner.$ref !== undefined) made[name] = fill(root, inner, new Map(), `${where}.${name}`);
    else if (inner.type === "object") made[name] = {};
    else if (inner.type === "array") made[name] = [];
  }
  for (const [name, value] of raw) {
    if (Object.hasOwn(properties, name)) continue;
    // Defined, not assigned: a key may be `__proto__`.
    const put = (inside: Json): unknown =>
      Object.defineProperty(made, name, { value: inside, enumerable: true, writable: true, configurable: true });
    const [pattern, inner] = Object.entries(schema.patternProperties ?? {})[0] ?? [];
    if (inner !== undefined && new RegExp(pattern as string, "u").test(name)) {
      put(fill(root, inner, value, `${where}.${shortly(name)}`));
    } else if (schema.patternProperties !== undefined || schema.additionalProperties === false) throw wrong(`${where}.${shortly(name)}`, "not known");
    else if (schema.additionalProperties === true) put(plain(value));
    else if (schema.additionalProperties !== undefined) {
      put(fill(root, schema.additionalProperties, value, `${where}.${shortly(name)}`));
    }
  }
  return made;
}

function array(root: Schema, schema: Schema, raw: Raw, where: string): Json {
  if (!Array.isArray(raw)) throw wrong(where, "no list");
  if (raw.length < (schema.minItems ?? 0)) throw wrong(where, `fewer than ${schema.minItems} entries`);
  if (raw.length > (schema.maxItems ?? Infinity)) throw wrong(where, `more than ${schema.maxItems} entries`);
  return raw.map((value, i) => fill(root, schema.prefixItems?.[i] ?? schema.items ?? {}, value, `${where}.${i}`));
}

function text(schema: Schema, raw: Raw, where: string): string {
  if (typeof raw !== "string") throw wrong(where, "no text");
  const length = raw.length > (schema.maxLength ?? Infinity) ? [...raw].length : raw.length;
  if (length < (schema.minLength ?? 0) || length > (schema.maxLength ?? Infinity)) throw wrong(where, "too short or too long");
  if (schema.pattern !== undefined && !new RegExp(schema.pattern, "u").test(raw)) throw wrong(where, "not of the right form");
  return raw;
}

function bounded(schema: Schema, value: number, where: string): number {
  const good =
    value >= (schema.minimum ?? -Infinity) &&
    value <= (schema.maximum ?? Infinity) &&
    value > (schema.exclusiveMinimum ?? -Infinity);
  if (!good) throw wrong(where, "out of range");
  return value;
}

function shortly(name: string): string {
  return name.slice(0, 40);
}

function wrong(where: string, what: string): Error {
  return new Error(`${where.replace(/^\./, "") || "the whole"}: ${what}`);
}
