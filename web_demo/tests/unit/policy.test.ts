import { describe, expect, it } from "vitest";
import { deviceState, type DeviceState } from "../../src/runtime/device.js";
import { PolicyRun } from "../../src/runtime/governed.js";
import { decide, limits, parsePolicy, type Decision, type Limits, type Policy } from "../../src/runtime/policy.js";
import { golden } from "./golden.js";

interface Golden {
  policies: Policy[];
  limits: Limits[];
  cases: { policy: number; limits: number; state: Partial<DeviceState>; previous: Decision | null; decision: Decision }[];
}
const wanted = golden<Golden>("policy");
const bytes = (value: unknown): Uint8Array => new TextEncoder().encode(JSON.stringify(value));
const policies = wanted.policies.map((policy) => parsePolicy(bytes(policy)));

describe("policies", () => {
  it("decides as every runtime does", () => {
    expect(wanted.cases.length).toBeGreaterThan(600);
    for (const { policy, limits: bounds, state, previous, decision } of wanted.cases) {
      const made = decide(policies[policy] as Policy, deviceState(state), previous, limits(wanted.limits[bounds] as Limits));
      expect(made).toEqual(decision);
    }
  });

  it("refuses tables with gaps, unreached rows, dearer worse rows, unknown fields", () => {
    const policy = wanted.policies[0] as Policy;
    const spoil = (rows: unknown[]): (() => Policy) => () => parsePolicy(bytes({ ...policy, rows }));
    const [first, ...rest] = policy.rows as [Policy["rows"][number], ...Policy["rows"]];
    expect(spoil(policy.rows.slice(0, -1))).toThrow("a gap");
    expect(spoil([...policy.rows, first])).toThrow("two rows of one name");
    expect(spoil([...policy.rows, { ...policy.rows.at(-1), name: "again" }])).toThrow("never reached");
    expect(spoil([{ ...first, then: { ...first.then, steps: 1000 } }, ...rest])).toThrow(/costs more|raises steps/);
    expect(spoil([{ ...first, when: { ...first.when, moon: [1, 2] } }, ...rest])).toThrow("not known");
    expect(spoil([{ ...first, level: 1.5 }, ...rest])).toThrow("no integer");
  });

  it("shortens within a picture when it gets hot, and never takes that back", async () => {
    let now = 0;
    let thermal: DeviceState["thermal"] = "nominal";
    const sense = (): DeviceState => deviceState({ thermal, battery: 1, charging: true, time_s: now });
    const run = new PolicyRun(policies[0] as Policy, sense, limits({}), { clock: () => now, sleep: async () => undefined });
    const given = await run.begin();
    expect(await run.ask(1, 2)).toEqual([]);
    [now, thermal] = [1, "serious"];
    const changes = await run.ask(2, 4);
    expect(changes.map(({ kind }) => kind)).toContain("shorten");
    expect(changes[0]?.steps).toBeLessThan(given.steps);
    [now, thermal] = [1000, "nominal"];
    expect(await run.ask(3, 6)).toEqual([]);
  });
});
