/** What a policy's table must fulfil, cell by cell. Mirrors edgesd/runtime/policycheck.py. */

import { DataError } from "./errors.js";
import { SETS, UNBOUNDED, axesOf, cost, match, type Axis, type Outcome, type Point, type Policy, type Row } from "./policy.js";

const MAX_CELLS = 200_000;
/** Values of the sets, best first, and the numeric axes where more is worse. */
const ORDER: Partial<Record<Axis, (string | boolean)[]>> = {
  thermal: ["nominal", "fair", "serious", "critical"], charging: [true, false], saver: [false, true],
};
const MORE_IS_WORSE: readonly Axis[] = ["headroom", "seconds_per_call"];

/** Throws DataError that names the rows and the place, or returns. */
export function checkPolicy(policy: Policy): void {
  if (new Set(policy.rows.map((row) => row.name)).size < policy.rows.length) {
    throw refused(policy, "two rows of one name", "names that tell rows apart");
  }
  checkLevels(policy);
  const axes = axesOf(policy);
  const values = axes.map((axis) => cuts(policy, axis));
  const total = values.reduce((product, list) => product * list.length, 1);
  if (total > MAX_CELLS) throw refused(policy, `more than ${MAX_CELLS} cells`, "fewer bounds or axes");
  const strides = values.map((_, i) => values.slice(i + 1).reduce((product, list) => product * list.length, 1));
  const found: Row[] = [];
  for (let cell = 0; cell < total; cell++) {
    const at = Object.fromEntries(axes.map((axis, i) => {
      const list = values[i] as (string | boolean | number)[];
      return [axis, list[Math.floor(cell / (strides[i] as number)) % list.length]];
    })) as Point;
    const row = match(policy, at);
    if (row === undefined) throw refused(policy, `a gap: no row holds at ${JSON.stringify(at)}`, "a row for every state");
    found.push(row);
  }
  const unreached = policy.rows.find((row) => !found.includes(row));
  if (unreached !== undefined) throw refused(policy, `row ${unreached.name} is never reached`, "rows in use");
  found.forEach((row, cell) => {
    axes.forEach((axis, i) => {
      const stride = strides[i] as number;
      const length = (values[i] as unknown[]).length;
      if (Math.floor(cell / stride) % length === length - 1) return;
      const worse = found[cell + stride] as Row;
      if (worse.level < row.level) {
        const came = `row ${worse.name} (level ${worse.level}) follows row ${row.name} (level ${row.level}) as ${axis} gets worse`;
        throw refused(policy, came, "a level that never falls as it gets hotter or emptier");
      }
    });
  });
}

/** Rows of one level give the same; a higher level costs no more, as a whole and in each part. */
function checkLevels(policy: Policy): void {
  const ranked = [...policy.rows].sort((a, b) => a.level - b.level);
  ranked.slice(1).forEach((worse, i) => {
    const row = ranked[i] as Row;
    const [less, more] = [worse.then as Required<Outcome>, row.then as Required<Outcome>];
    const keys = Object.keys(more) as (keyof Outcome)[];
    if (row.level === worse.level && keys.some((key) => less[key] !== more[key])) {
      throw refused(policy, `rows ${row.name} and ${worse.name} of level ${row.level} give different things`, "one outcome a level");
    }
    if (cost(less) > cost(more)) {
      throw refused(policy, `row ${worse.name} costs more than row ${row.name} of a lower level`, "a cost that never rises with the level");
    }
    for (const part of ["steps", "width", "guidance_until", "upscaler", "refiner"] as const) {
      if (Number(less[part]) > Number(more[part])) {
        throw refused(policy, `row ${worse.name} raises ${part} over row ${row.name} of a lower level`, `${part} ${more[part]} or less`);
      }
    }
  });
}

/** Values to test on an axis, best first. */
function cuts(policy: Policy, axis: Axis): (string | boolean | number)[] {
  const set = ORDER[axis];
  if (SETS.includes(axis) && set !== undefined) return set;
  const end = axis === "battery" ? 1 : UNBOUNDED;
  const used = policy.rows.flatMap((row) => (row.when[axis] == null ? [] : [row.when[axis] as [number, number | null]]));
  const bounds = new Set(used.flat().filter((x) => x !== null).map((x) => Math.min(x, end)));
  const sorted = [...new Set([0, end, ...bounds])].sort((a, b) => a - b);
  const between = sorted.slice(1).map((b, i) => ((sorted[i] as number) + b) / 2);
  // An end of the axis answers like the stretch beside it, unless a condition holds there alone.
  const alone = used.filter(([low, high]) => low >= end || high === 0).map(([low]) => Math.min(low, end));
  const inner = [...bounds].filter((x) => x !== 0 && x !== end);
  const all = [...new Set([...between, ...inner, ...alone])].sort((a, b) => a - b);
  return MORE_IS_WORSE.includes(axis) ? all : all.reverse();
}

function refused(policy: Policy, came: string, allowed: string): DataError {
  return new DataError(`policy ${policy.name}: ${came}`, allowed, "Correct the table as docs/policies.md describes");
}
