/** Arrays with a shape, and safetensors files of them. */

export type Data = Float32Array | Float64Array | Int32Array | Uint8Array | BigInt64Array;

export interface Tensor<D extends Data = Float32Array> {
  readonly data: D;
  readonly shape: readonly number[];
}

export type Tensors = Record<string, Tensor>;

export function tensor<D extends Data>(data: D, shape: readonly number[]): Tensor<D> {
  if (data.length !== size(shape)) throw new Error(`${data.length} values for shape ${shape.join("x")}`);
  return { data, shape };
}

export function size(shape: readonly number[]): number {
  return shape.reduce((product, dim) => product * dim, 1);
}

/** Tensors of one inner shape end to end along the first axis. */
export function stack(parts: readonly Tensor[]): Tensor {
  const first = parts[0] as Tensor;
  if (parts.length === 1) return first;
  const data = new Float32Array(parts.reduce((sum, part) => sum + part.data.length, 0));
  let at = 0;
  for (const part of parts) {
    data.set(part.data, at);
    at += part.data.length;
  }
  return { data, shape: [parts.reduce((sum, part) => sum + (part.shape[0] ?? 1), 0), ...first.shape.slice(1)] };
}

/** Tensors side by side along an axis; all other axes are equal. */
export function concat(parts: readonly Tensor[], axis: number): Tensor {
  if (axis === 0 || parts.length === 1) return stack(parts);
  const first = parts[0] as Tensor;
  const outer = size(first.shape.slice(0, axis));
  const blocks = parts.map((part) => size(part.shape.slice(axis)));
  const data = new Float32Array(outer * blocks.reduce((a, b) => a + b, 0));
  let at = 0;
  for (let row = 0; row < outer; row++) {
    parts.forEach((part, i) => {
      const block = blocks[i] as number;
      data.set(part.data.subarray(row * block, (row + 1) * block), at);
      at += block;
    });
  }
  const along = parts.reduce((sum, part) => sum + (part.shape[axis] as number), 0);
  return { data, shape: first.shape.map((dim, i) => (i === axis ? along : dim)) };
}

/** Rows `from` to `to` along the first axis; a view. */
export function rows(whole: Tensor, from: number, to: number): Tensor {
  const row = size(whole.shape.slice(1));
  return { data: whole.data.subarray(from * row, to * row), shape: [to - from, ...whole.shape.slice(1)] };
}

// ---- safetensors --------------------------------------------------------------------------------------------------

export interface TensorFile {
  tensors: Map<string, Tensor<Data>>;
  metadata: Record<string, string>;
}

const KINDS: Record<string, { bytes: number; make: (buffer: ArrayBuffer) => Data }> = {
  F32: { bytes: 4, make: (buffer) => new Float32Array(buffer) },
  F64: { bytes: 8, make: (buffer) => new Float64Array(buffer) },
  I32: { bytes: 4, make: (buffer) => new Int32Array(buffer) },
  I64: { bytes: 8, make: (buffer) => new BigInt64Array(buffer) },
  U8: { bytes: 1, make: (buffer) => new Uint8Array(buffer) },
};
const MAX_HEADER = 100_000_000;

/**
 * Reads a safetensors file; the arrays are copies. Throws Error for anything malformed: sizes that do not add up,
 * overlaps, gaps, unknown types.
 */
export function loadTensors(file: Uint8Array): TensorFile {
  if (file.length < 8) throw new Error("a tensor file shorter than its header");
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  const length = Number(view.getBigUint64(0, true));
  if (length > MAX_HEADER || length > file.length - 8) throw new Error("a tensor file's header is longer than the file");
  const head: unknown = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(file.subarray(8, 8 + length)));
  if (head === null || typeof head !== "object" || Array.isArray(head)) throw new Error("a tensor file's header is no object");
  const entries = Object.entries(head as Record<string, unknown>);
  const metadata = Object.fromEntries(entries).__metadata__ ?? {};
  if (typeof metadata !== "object" || Object.values(metadata as object).some((text) => typeof text !== "string")) {
    throw new Error("a tensor file's metadata is no text");
  }
  const body = file.subarray(8 + length);
  const tensors = new Map<string, Tensor<Data>>();
  const spans: [number, number][] = [];
  for (const [name, entry] of entries) {
    if (name === "__metadata__") continue;
    const { dtype, shape, data_offsets: span } = (entry ?? {}) as Record<string, unknown>;
    const kind = KINDS[String(dtype)];
    const whole = (list: unknown): list is number[] =>
      Array.isArray(list) && list.every((n) => Number.isSafeInteger(n) && (n as number) >= 0);
    if (kind === undefined || !whole(shape) || !whole(span) || span.length !== 2) throw new Error(`tensor ${name.slice(0, 80)} has a broken header`);
    const [from, to] = span as [number, number];
    if (from > to || to > body.length || to - from !== size(shape) * kind.bytes) throw new Error(`tensor ${name.slice(0, 80)} has the wrong size`);
    const bytes = body.slice(from, to);
    tensors.set(name, { data: kind.make(bytes.buffer), shape });
    spans.push([from, to]);
  }
  let end = 0;
  for (const [from, to] of spans.sort((a, b) => a[0] - b[0] || a[1] - b[1])) {
    if (from !== end) throw new Error("a tensor file with gaps or overlaps");
    end = to;
  }
  if (end !== body.length) throw new Error("a tensor file with bytes that belong to nothing");
  return { tensors, metadata: metadata as Record<string, string> };
}

/** The bytes of a safetensors file; read by every safetensors library. */
export function dumpTensors(tensors: Map<string, Tensor<Data>>, metadata: Record<string, string>): Uint8Array {
  const head: Record<string, unknown> = { __metadata__: metadata };
  // Widest items first, as the format's own writer has it: every array is then aligned.
  const order = [...tensors].sort((a, b) => b[1].data.BYTES_PER_ELEMENT - a[1].data.BYTES_PER_ELEMENT || (a[0] < b[0] ? -1 : 1));
  let at = 0;
  for (const [name, { data, shape }] of order) {
    head[name] = { dtype: dtypeOf(data), shape, data_offsets: [at, at + data.byteLength] };
    at += data.byteLength;
  }
  let text = JSON.stringify(head);
  const raw = new TextEncoder().encode(text);
  text += " ".repeat((8 - (raw.length % 8)) % 8);
  const header = new TextEncoder().encode(text);
  const file = new Uint8Array(8 + header.length + at);
  new DataView(file.buffer).setBigUint64(0, BigInt(header.length), true);
  file.set(header, 8);
  at = 8 + header.length;
  for (const [, { data }] of order) {
    file.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), at);
    at += data.byteLength;
  }
  return file;
}

function dtypeOf(data: Data): string {
  if (data instanceof Float32Array) return "F32";
  if (data instanceof Float64Array) return "F64";
  if (data instanceof Int32Array) return "I32";
  return data instanceof Uint8Array ? "U8" : "I64";
}

export function allFinite(data: Data): boolean {
  return data instanceof BigInt64Array || (data as Float32Array).every(Number.isFinite);
}
