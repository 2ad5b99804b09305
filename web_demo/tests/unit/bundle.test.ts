import { createHash } from "node:crypto";
import { createServer, type Server } from "node:http";
import { afterAll, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { Bundle } from "../../src/runtime/bundle.js";
import { MemoryShelf } from "../../src/runtime/shelf.js";

const PIECE = 4 << 20;
const weights = new Uint8Array(2 * PIECE + 1000).map((_, i) => (i * 7) % 251);
const files: Record<string, Uint8Array> = { "unet/unet.onnx": weights, "tokenizer.json": new TextEncoder().encode("{}"), "samplers.safetensors": new Uint8Array(5) };
const sha = (data: Uint8Array): string => createHash("sha256").update(data).digest("hex");
const tensor = { name: "sample", dtype: "float32", shape: [1] };
const manifest = {
  format: "1.0", target: "onnx-web",
  model: {
    name: "small", family: "sd1", prediction_type: "epsilon", unet_in_channels: 4, latent: { channels: 4, downscale: 8, scaling_factor: 1 },
    tokenizers: [{ file: "tokenizer.json", component: "text_encoder", max_length: 77, bos_id: 0, eos_id: 1, pad_id: 1 }],
    defaults: { sampler: "ddim", steps: 4, size_px: [16, 16] },
  },
  components: [{ name: "unet", variants: [{ axes: { size_px: [16, 16] }, files: ["unet/unet.onnx"], inputs: [tensor], outputs: [tensor] }] }],
  samplers: [{ name: "ddim", file: "samplers.safetensors", steps: [4] }],
  provenance: { source: "tests", sha256: "0".repeat(64) },
  files: Object.entries(files).map(([path, data]) => ({ path, bytes: data.length, sha256: sha(data) })),
};

/** What the server does wrong, and what it was asked. */
const trouble = { breakAt: 0, spoil: false, longer: false, ranges: true, missing: false };
let asked: { path: string; range: string | undefined }[] = [];
let server: Server;
let address: string;

beforeAll(async () => {
  server = createServer((request, response) => {
    const path = (request.url ?? "").replace("/b.edgesd/", "");
    const range = /bytes=(\d+)-/.exec(request.headers.range ?? "")?.[1];
    asked.push({ path, range });
    response.setHeader("Connection", "close");
    if (path === "manifest.json") return void response.end(JSON.stringify(manifest));
    let data = files[path] as Uint8Array;
    if (trouble.missing) return void response.writeHead(404).end();
    if (trouble.spoil) data = data.map((byte, i) => (i === data.length - 1 ? byte ^ 1 : byte));
    if (trouble.longer) data = new Uint8Array([...data.subarray(-3), ...data]);
    const from = trouble.ranges ? Number(range ?? 0) : 0;
    response.writeHead(from > 0 ? 206 : 200, { "Content-Length": data.length - from });
    if (trouble.breakAt > from && path === "unet/unet.onnx") {
      response.write(data.subarray(from, trouble.breakAt), () => setTimeout(() => response.destroy(), 50));
    } else response.end(data.subarray(from));
  });
  await new Promise<void>((done) => server.listen(0, "127.0.0.1", done));
  address = `http://127.0.0.1:${(server.address() as { port: number }).port}/b.edgesd`;
});
afterAll(() => void server.close());
beforeEach(() => {
  asked = [];
  Object.assign(trouble, { breakAt: 0, spoil: false, longer: false, ranges: true, missing: false });
});

const paths = ["unet/unet.onnx", "tokenizer.json"];
const quick = { wait: () => 0.01 };

describe("bundles over the network", () => {
  it("fetches, verifies, tells progress, and fetches nothing twice", async () => {
    const shelf = new MemoryShelf();
    const bundle = await Bundle.open(address, shelf);
    const told: number[] = [];
    expect(await bundle.missing(paths)).toBe(weights.length + 2);
    await bundle.fetch(paths, { progress: ({ done }) => told.push(done) });
    expect(told.at(-1)).toBe(weights.length + 2);
    expect(Buffer.compare(await bundle.read("unet/unet.onnx"), weights)).toBe(0);
    asked = [];
    const again = await Bundle.open(address, shelf);
    await again.fetch(paths);
    expect(asked.map(({ path }) => path)).toEqual(["manifest.json"]);
  });

  it("goes on where a broken download stopped", async () => {
    const bundle = await Bundle.open(address, new MemoryShelf());
    trouble.breakAt = PIECE + 500;
    await expect(bundle.fetch(paths, quick)).rejects.toThrow(/broke off at 4.2 MB of 8.4 MB.*try again/s);
    trouble.breakAt = 0;
    asked = [];
    expect(await bundle.missing(paths)).toBe(weights.length + 2 - PIECE);
    await bundle.fetch(paths, quick);
    expect(asked[0]).toEqual({ path: "unet/unet.onnx", range: String(PIECE) });
    expect(Buffer.compare(await bundle.read("unet/unet.onnx"), weights)).toBe(0);
  });

  it("goes on even where the server has no ranges", async () => {
    const bundle = await Bundle.open(address, new MemoryShelf());
    Object.assign(trouble, { breakAt: 2 * PIECE + 1, ranges: false });
    await expect(bundle.fetch(paths, quick)).rejects.toThrow("broke off");
    trouble.breakAt = 0;
    await bundle.fetch(paths, quick);
    expect(Buffer.compare(await bundle.read("unet/unet.onnx"), weights)).toBe(0);
  });

  it("refuses a spoiled file, and takes the right one afterwards", async () => {
    const bundle = await Bundle.open(address, new MemoryShelf());
    trouble.spoil = true;
    await expect(bundle.fetch(["unet/unet.onnx"])).rejects.toThrow("does not have the sha256");
    trouble.spoil = false;
    await bundle.fetch(["unet/unet.onnx"]);
    expect(Buffer.compare(await bundle.read("unet/unet.onnx"), weights)).toBe(0);
  });

  it("refuses a file that is longer than its manifest says, and one that is not there", async () => {
    const bundle = await Bundle.open(address, new MemoryShelf());
    trouble.longer = true;
    await expect(bundle.fetch(["unet/unet.onnx"], quick)).rejects.toThrow("longer than its manifest says");
    Object.assign(trouble, { longer: false, missing: true });
    await expect(bundle.fetch(["tokenizer.json"], quick)).rejects.toThrow("the server answers 404");
  });

  it("stops when told to, keeping what is here", async () => {
    const bundle = await Bundle.open(address, new MemoryShelf());
    const stop = new AbortController();
    const progress = ({ done }: { done: number }): void => (done > 0 ? stop.abort() : undefined);
    await expect(bundle.fetch(paths, { signal: stop.signal, progress })).rejects.toThrow();
    expect(await bundle.missing(paths)).toBeLessThan(weights.length);
  });

  it("opens without a network what was here before, and drops what nothing names", async () => {
    const shelf = new MemoryShelf();
    const bundle = await Bundle.open(address, shelf);
    await bundle.fetch(paths);
    await shelf.put(`manifest http://127.0.0.1:1/gone/`, new TextEncoder().encode(JSON.stringify(manifest)));
    const offline = await Bundle.open("http://127.0.0.1:1/gone", shelf);
    expect(offline.offline).toBe(true);
    expect(Buffer.compare(await offline.read("unet/unet.onnx"), weights)).toBe(0);
    await shelf.put(`${"f".repeat(64)} 0`, new Uint8Array(3));
    expect(await offline.prune()).toBe(1);
    await expect(Bundle.open("http://127.0.0.1:1/never", shelf)).rejects.toThrow("is not reached");
  });
});
