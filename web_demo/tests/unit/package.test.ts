import { execFileSync } from "node:child_process";
import { describe, expect, it } from "vitest";

describe("the package edgesd-web", () => {
  it("builds, and its example's names are there", async () => {
    const cwd = new URL("../..", import.meta.url);
    execFileSync("npx", ["vite", "build", "--mode", "lib", "--logLevel", "error"], { cwd, stdio: "pipe" });
    const built = (await import(new URL("../../lib/index.js", import.meta.url).href)) as typeof import("../../src/runtime/index.js");
    for (const name of ["Bundle", "generate", "openPipeline", "openShelf"] as const) expect(typeof built[name]).toBe("function");
    expect(new built.Philox(1).normal(1, 0, 0, built.Purpose.START)[0]).toBeCloseTo(0.38040075, 6);
  });
});
