/** The golden files that every runtime reads: tests/golden of the repository. */

import { existsSync, readFileSync } from "node:fs";
import { expect } from "vitest";

export function golden<T>(name: string): T {
  return JSON.parse(readFileSync(new URL(`../../../tests/golden/${name}.json`, import.meta.url), "utf8")) as T;
}

/** Whether a file of golden values is there. */
export function hasGolden(name: string): boolean {
  return existsSync(new URL(`../../../tests/golden/${name}.json`, import.meta.url));
}

/** Equal within a tolerance relative to the largest value. */
export function expectClose(got: ArrayLike<number>, wanted: readonly number[], tolerance: number): void {
  expect(got.length).toBe(wanted.length);
  const scale = Math.max(...wanted.map(Math.abs), 1e-30);
  const worst = wanted.reduce((most, x, i) => Math.max(most, Math.abs((got[i] as number) - x)), 0);
  expect(worst / scale).toBeLessThanOrEqual(tolerance);
}
