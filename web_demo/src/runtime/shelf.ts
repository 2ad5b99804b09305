/** Where downloaded pieces are kept: the browser's Cache Storage, or memory where there is none. */

export interface Shelf {
  get(key: string): Promise<Uint8Array<ArrayBuffer> | null>;
  put(key: string, bytes: Uint8Array): Promise<void>;
  has(key: string): Promise<boolean>;
  delete(key: string): Promise<void>;
  keys(): Promise<string[]>;
  /** Whether what is put here is still there after the page is closed. */
  readonly lasting: boolean;
}

/** A shelf that lasts where the browser allows it (https or localhost), in memory otherwise. */
export async function openShelf(name = "edgesd"): Promise<Shelf> {
  return "caches" in globalThis ? new CacheShelf(await caches.open(name)) : new MemoryShelf();
}

class CacheShelf implements Shelf {
  readonly lasting = true;
  constructor(private readonly cache: Cache) {}

  async get(key: string): Promise<Uint8Array<ArrayBuffer> | null> {
    const found = await this.cache.match(url(key));
    return found === undefined ? null : new Uint8Array(await found.arrayBuffer());
  }

  async put(key: string, bytes: Uint8Array): Promise<void> {
    await this.cache.put(url(key), new Response(bytes as Uint8Array<ArrayBuffer>));
  }

  async has(key: string): Promise<boolean> {
    return (await this.cache.match(url(key))) !== undefined;
  }

  async delete(key: string): Promise<void> {
    await this.cache.delete(url(key));
  }

  async keys(): Promise<string[]> {
    return (await this.cache.keys()).map((request) => decodeURIComponent(new URL(request.url).pathname.slice(1)));
  }
}

/** Keys are no addresses; Cache Storage wants some. `.invalid` is nobody's (RFC 2606). */
function url(key: string): string {
  return `https://shelf.invalid/${encodeURIComponent(key)}`;
}

export class MemoryShelf implements Shelf {
  readonly lasting = false;
  private readonly entries = new Map<string, Uint8Array>();

  async get(key: string): Promise<Uint8Array<ArrayBuffer> | null> {
    const found = this.entries.get(key);
    return found === undefined ? null : found.slice();
  }

  async put(key: string, bytes: Uint8Array): Promise<void> {
    this.entries.set(key, bytes.slice());
  }

  async has(key: string): Promise<boolean> {
    return this.entries.has(key);
  }

  async delete(key: string): Promise<void> {
    this.entries.delete(key);
  }

  async keys(): Promise<string[]> {
    return [...this.entries.keys()];
  }
}
