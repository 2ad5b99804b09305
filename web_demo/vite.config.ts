import { createHash } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { defineConfig, type ViteUserConfig } from "vitest/config";

type Plugin = Exclude<NonNullable<ViteUserConfig["plugins"]>[number], false | null | undefined | unknown[] | Promise<unknown>>;

/** Headers that WebAssembly threads need: the page shares memory with its workers. */
const isolated = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };

/** Writes the built files' names into the service worker, so that the page works offline after its first visit. */
function offline(): Plugin {
  return {
    name: "offline",
    apply: "build",
    writeBundle(options, files) {
      const folder = options.dir as string;
      // WebGPU's runtime is large and not everybody's: it is kept when it is first used.
      const names = ["./", ...Object.keys(files).filter((name) => !name.includes("asyncify") && !name.endsWith(".map") && name !== "index.html" && !name.includes("bench"))];
      const worker = join(folder, "sw.js");
      const digest = createHash("sha256").update(names.join() + readFileSync(join(folder, "index.html"))).digest("hex").slice(0, 12);
      const text = readFileSync(worker, "utf8").replace('"__VERSION__"', JSON.stringify(digest)).replace('"__FILES__"', JSON.stringify(names));
      this.info(`offline: ${names.length} files, ${readdirSync(folder).length} at the top`);
      void import("node:fs").then((fs) => fs.writeFileSync(worker, text));
    },
  };
}

const { version } = JSON.parse(readFileSync(new URL("package.json", import.meta.url), "utf8")) as { version: string };
// ONNX Runtime's own modules stay as they are, beside the page: its threads start from them.
const resolve = { conditions: ["onnxruntime-web-use-extern-wasm", "module", "browser", "development|production"] };

export default defineConfig(({ mode }) =>
  mode === "lib"
    ? {
        build: {
          outDir: "lib", emptyOutDir: true, minify: false, target: "es2023",
          lib: { entry: "src/runtime/index.ts", formats: ["es"], fileName: "index" },
          rollupOptions: { external: [/^onnxruntime-web/, "@huggingface/tokenizers", "hash-wasm"] },
        },
        publicDir: false,
      }
    : {
        base: "./",
        define: { __VERSION__: JSON.stringify(version) },
        resolve,
        build: { rollupOptions: { input: ["index.html", "bench.html"] }, target: "es2023", assetsInlineLimit: 0, chunkSizeWarningLimit: 1024 },
        worker: { format: "es" },
        server: { headers: isolated },
        preview: { headers: isolated },
        plugins: [offline()],
        // End to end on a slow machine: a model opens, several pictures are drawn.
        test: { testTimeout: 120_000, hookTimeout: 120_000 },
      },
);
