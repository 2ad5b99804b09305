/**
 * Bundles over the network: nothing is taken on trust (docs/bundle.md), nothing is fetched twice.
 *
 * A file is fetched in pieces, which are kept as they come, so a broken download goes on where it stopped. A file counts
 * once its SHA-256 was right; a mark beside its pieces says so afterwards. Pieces are kept by hash: bundles that share
 * a file share it here, and what no bundle names any more is dropped.
 */

import { createSHA256, sha256 } from "hash-wasm";
import { DataError, EdgesdError, SetupError, describeError, shown } from "./errors.js";
import { MAX_MANIFEST_BYTES, parseManifest, type Manifest } from "./manifest.js";
import type { Shelf } from "./shelf.js";

const PIECE_BYTES = 4 << 20;
const TRIES = 4;
const AGAIN = "Check the connection and try again: the download goes on where it stopped";
export type FileEntry = Manifest["files"][number];

/** Bytes of the wanted files that are here, and in all. */
export interface Progress {
  readonly path: string;
  readonly done: number;
  readonly total: number;
}

export interface FetchOptions {
  progress?: (progress: Progress) => void;
  signal?: AbortSignal | undefined;
  /** Seconds to wait before the n-th new try. */
  wait?: (attempt: number) => number;
}

/** A bundle whose manifest has been checked. `fetch` brings files here, `read` gives verified bytes. */
export class Bundle {
  private readonly entries: Map<string, FileEntry>;

  private constructor(
    readonly address: string,
    readonly manifest: Manifest,
    private readonly shelf: Shelf,
    /** Whether the manifest came from the shelf because the server was not reached. */
    readonly offline: boolean,
  ) {
    this.entries = new Map(manifest.files.map((entry) => [entry.path, entry]));
  }

  /** address: of the bundle's folder. Without a network, the manifest that was there last is taken. */
  static async open(address: string, shelf: Shelf, signal?: AbortSignal): Promise<Bundle> {
    const base = address.endsWith("/") ? address : `${address}/`;
    const key = `manifest ${base}`;
    let data: Uint8Array<ArrayBuffer>;
    let offline = false;
    try {
      data = await fetchManifest(`${base}manifest.json`, signal);
    } catch (error) {
      if (error instanceof EdgesdError || signal?.aborted === true) throw error;
      const kept = await shelf.get(key);
      if (kept === null) throw new DataError(`${base} is not reached (${shown(describeError(error), 80)})`, "a server that answers", AGAIN);
      [data, offline] = [kept, true];
    }
    const manifest = parseManifest(data);
    if (manifest.target !== "onnx-web") {
      throw new DataError(`a bundle for ${shown(manifest.target, 40)}`, "onnx-web in a browser", "Package it with --target onnx-web");
    }
    await shelf.put(key, data);
    return new Bundle(base, manifest, shelf, offline);
  }

  /** Pictures repeat to the pixel where this is equal. */
  get identity(): string {
    return `${this.manifest.provenance.sha256}-${this.manifest.target}`;
  }

  /** How many bytes of these files are not here yet. */
  async missing(paths: readonly string[]): Promise<number> {
    let bytes = 0;
    for (const entry of this.wanted(paths)) bytes += entry.bytes - (await this.held(entry));
    return bytes;
  }

  /** Brings files here and verifies them. Throws SetupError when the quota is too small, DataError for a broken one. */
  async fetch(paths: readonly string[], options: FetchOptions = {}): Promise<void> {
    const wanted = this.wanted(paths);
    const total = wanted.reduce((sum, entry) => sum + entry.bytes, 0);
    await this.checkQuota(paths);
    let before = 0;
    for (const entry of wanted) {
      const told = (done: number): void => options.progress?.({ path: entry.path, done: before + done, total });
      if (!(await this.shelf.has(mark(entry)))) await this.fetchOne(entry, told, options);
      before += entry.bytes;
      told(0);
    }
  }

  /** The verified bytes of a listed file, fetched first where they are not here. */
  async read(path: string): Promise<Uint8Array<ArrayBuffer>> {
    const [entry] = this.wanted([path]) as [FileEntry];
    if (!(await this.shelf.has(mark(entry)))) await this.fetch([path]);
    const whole = new Uint8Array(entry.bytes);
    let at = 0;
    for (let piece = 0; at < entry.bytes; piece++) {
      const bytes = await this.shelf.get(part(entry, piece));
      if (bytes === null || at + bytes.length > entry.bytes) {
        await this.forget(entry); // the browser made room: fetch it anew
        throw new DataError(`${path} was dropped by the browser`, "storage that is kept", "Try again to download it");
      }
      whole.set(bytes, at);
      at += bytes.length;
    }
    return whole;
  }

  /** Drops what no manifest on the shelf names; gives the number of entries dropped. */
  async prune(): Promise<number> {
    const keys = await this.shelf.keys();
    const named = new Set<string>();
    for (const key of keys.filter((one) => one.startsWith("manifest "))) {
      try {
        const manifest = parseManifest((await this.shelf.get(key)) as Uint8Array);
        manifest.files.forEach((entry) => named.add(entry.sha256));
      } catch {
        await this.shelf.delete(key); // of another format by now: nobody here reads it
      }
    }
    const stale = keys.filter((key) => /^[0-9a-f]{64} /.test(key) && !named.has(key.slice(0, 64)));
    for (const key of stale) await this.shelf.delete(key);
    return stale.length;
  }

  private wanted(paths: readonly string[]): FileEntry[] {
    return [...new Set(paths)].map((path) => {
      const entry = this.entries.get(path);
      if (entry === undefined) throw new DataError(`${shown(path)} is no file of this bundle`, "files its manifest lists", "Name one");
      return entry;
    });
  }

  private async held(entry: FileEntry): Promise<number> {
    if (await this.shelf.has(mark(entry))) return entry.bytes;
    let pieces = 0;
    while (await this.shelf.has(part(entry, pieces))) pieces++;
    return Math.min(pieces * PIECE_BYTES, entry.bytes);
  }

  private async checkQuota(paths: readonly string[]): Promise<void> {
    const storage = (globalThis.navigator as Navigator | undefined)?.storage;
    if (!this.shelf.lasting || storage === undefined) return;
    const needed = await this.missing(paths);
    const { quota, usage } = await storage.estimate();
    const free = (quota ?? Infinity) - (usage ?? 0);
    if (needed > free) {
      const came = `${megabytes(needed)} to store, and this browser gives the page ${megabytes(free)} more`;
      throw new SetupError(came, "room for the model", "Free some disk space, or clear this browser's stored data for other sites");
    }
    if (needed > 0) await storage.persist?.().catch(() => false);
  }

  /** Pieces that are here are hashed, the rest is fetched, hashed and kept as it comes. */
  private async fetchOne(entry: FileEntry, told: (done: number) => void, options: FetchOptions): Promise<void> {
    const hash = await createSHA256();
    hash.init();
    let at = 0;
    let piece = 0;
    for (let bytes; (bytes = await this.shelf.get(part(entry, piece))) !== null; piece++) {
      hash.update(bytes);
      at += bytes.length;
      told(at);
    }
    for (let attempt = 0; at < entry.bytes; ) {
      const before = at;
      try {
        for await (const bytes of this.pieces(entry, at, options.signal)) {
          await this.keep(part(entry, piece++), bytes);
          hash.update(bytes);
          at += bytes.length;
          told(at);
        }
      } catch (error) {
        if (error instanceof EdgesdError || options.signal?.aborted === true) throw error;
        attempt = at > before ? 0 : attempt + 1;
        if (attempt >= TRIES) {
          throw new DataError(`the download of ${entry.path} broke off at ${megabytes(at)} of ${megabytes(entry.bytes)}`, "the whole file", AGAIN);
        }
        const seconds = options.wait?.(attempt) ?? 2 ** attempt / 2;
        await new Promise((done) => setTimeout(done, seconds * 1000));
      }
    }
    if (at !== entry.bytes || hash.digest("hex") !== entry.sha256) {
      await this.forget(entry);
      const fix = "Try again: this file alone is fetched anew. If it stays wrong, the server has another file than its manifest says";
      throw new DataError(`${entry.path} does not have the sha256 of its manifest`, "the bytes that were packaged", fix);
    }
    await this.keep(mark(entry), new Uint8Array());
  }

  private async keep(key: string, bytes: Uint8Array): Promise<void> {
    try {
      await this.shelf.put(key, bytes);
    } catch (error) {
      const fix = "Free some disk space, or clear this browser's stored data for other sites, and try again";
      throw new SetupError(`this browser stores no more (${shown(describeError(error), 80)})`, "room for the model", fix);
    }
  }

  /** The file's bytes from `from` on, in pieces that begin at multiples of PIECE_BYTES. */
  private async *pieces(entry: FileEntry, from: number, signal?: AbortSignal): AsyncGenerator<Uint8Array, void> {
    if (entry.bytes === 0) return;
    const address = new URL(entry.path.split("/").map(encodeURIComponent).join("/"), this.address);
    const headers: Record<string, string> = from > 0 ? { Range: `bytes=${from}-` } : {};
    const response = await fetch(address, { headers, cache: "no-store", ...(signal && { signal }) });
    if (!response.ok || response.body === null) {
      throw new DataError(`${entry.path}: the server answers ${response.status}`, "every file the manifest lists", "Copy the whole bundle to the server");
    }
    // A server without ranges begins anew: what is here already is passed over.
    let skip = response.status === 206 ? 0 : from;
    let at = from;
    let open = new Uint8Array(Math.min(PIECE_BYTES, entry.bytes - at));
    let filled = 0;
    for await (let bytes of response.body as unknown as AsyncIterable<Uint8Array>) {
      const passed = Math.min(skip, bytes.length);
      skip -= passed;
      bytes = bytes.subarray(passed);
      while (bytes.length > 0) {
        if (at + filled >= entry.bytes) {
          throw new DataError(`${entry.path} is longer than its manifest says`, `${entry.bytes} bytes`, "Get the bundle again from where it came");
        }
        const taken = bytes.subarray(0, open.length - filled);
        open.set(taken, filled);
        filled += taken.length;
        bytes = bytes.subarray(taken.length);
        if (filled === open.length) {
          yield open;
          at += filled;
          [open, filled] = [new Uint8Array(Math.min(PIECE_BYTES, entry.bytes - at)), 0];
        }
      }
    }
    if (at < entry.bytes) throw new Error("the connection ended early");
  }

  private async forget(entry: FileEntry): Promise<void> {
    await this.shelf.delete(mark(entry));
    for (let piece = 0; await this.shelf.has(part(entry, piece)); piece++) await this.shelf.delete(part(entry, piece));
  }
}

async function fetchManifest(address: string, signal?: AbortSignal): Promise<Uint8Array<ArrayBuffer>> {
  const response = await fetch(address, { cache: "no-store", ...(signal && { signal }) });
  if (!response.ok) {
    // A server in trouble is as good as none: what was here last may still do.
    if (response.status >= 500) throw new Error(`the server answers ${response.status}`);
    const came = `${address}: the server answers ${response.status}`;
    throw new DataError(came, "a folder with manifest.json", "Check the address; an unfinished bundle has no manifest");
  }
  const length = Number(response.headers.get("Content-Length") ?? 0);
  if (length > MAX_MANIFEST_BYTES) {
    throw new DataError(`manifest.json has ${length} bytes`, `up to ${MAX_MANIFEST_BYTES}`, "Get the bundle again from where it came");
  }
  return new Uint8Array(await response.arrayBuffer());
}

/** SHA-256 as 64 hex digits. */
export async function digest(data: Uint8Array | string): Promise<string> {
  return sha256(data);
}

export function megabytes(bytes: number): string {
  return bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

function mark({ sha256: hash }: FileEntry): string {
  return `${hash} ok`;
}

function part({ sha256: hash }: FileEntry, piece: number): string {
  return `${hash} ${piece}`;
}
