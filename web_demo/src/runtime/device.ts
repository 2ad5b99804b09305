/** What the device feels like right now. Mirrors edgesd/runtime/device.py with the sensors that browsers have. */

import { RequestError } from "./errors.js";

export type Thermal = "nominal" | "fair" | "serious" | "critical" | "unknown";

/** One reading; null = not known. seconds_per_call: of the UNet by width, learned here. time_s: a monotonic clock. */
export interface DeviceState {
  readonly battery: number | null;
  readonly charging: boolean | null;
  readonly saver: boolean | null;
  readonly thermal: Thermal;
  readonly headroom: number | null;
  readonly free_memory_bytes: number | null;
  readonly deadline_s: number | null;
  readonly seconds_per_call: Readonly<Record<string, number>>;
  readonly time_s: number;
}

export const UNKNOWN: DeviceState = {
  battery: null, charging: null, saver: null, thermal: "unknown", headroom: null, free_memory_bytes: null,
  deadline_s: null, seconds_per_call: {}, time_s: 0,
};

const NUMBERS = ["headroom", "free_memory_bytes", "deadline_s", "time_s"] as const;

/** A reading with what is said; throws RequestError for one that cannot be. */
export function deviceState(said: Partial<DeviceState>): DeviceState {
  const state = { ...UNKNOWN, ...said };
  const number = (x: unknown): boolean => typeof x === "number" && Number.isFinite(x) && x >= 0;
  const rules: [boolean, string][] = [
    [state.battery === null || (number(state.battery) && state.battery <= 1), "battery"],
    [[state.charging, state.saver].every((x) => x === null || typeof x === "boolean"), "charging or saver"],
    [["nominal", "fair", "serious", "critical", "unknown"].includes(state.thermal), "thermal"],
    ...NUMBERS.map((name): [boolean, string] => [state[name] === null || number(state[name]), name]),
    [Object.values(state.seconds_per_call).every((s) => number(s) && s > 0), "seconds_per_call"],
  ];
  for (const [good, name] of rules) {
    if (!good) throw new RequestError(`device state with ${name}`, "what docs/policies.md lists", "Correct the reading");
  }
  return state;
}

/** Each figure from the first state that knows it; time_s: the latest. */
export function merge(...states: DeviceState[]): DeviceState {
  const first = <K extends keyof DeviceState>(name: K): DeviceState[K] =>
    (states.find((state) => state[name] !== null) ?? UNKNOWN)[name];
  return {
    battery: first("battery"), charging: first("charging"), saver: first("saver"), headroom: first("headroom"),
    free_memory_bytes: first("free_memory_bytes"), deadline_s: first("deadline_s"),
    thermal: states.find((state) => state.thermal !== "unknown")?.thermal ?? "unknown",
    seconds_per_call: Object.assign({}, ...[...states].reverse().map((state) => state.seconds_per_call)) as Record<string, number>,
    time_s: Math.max(0, ...states.map((state) => state.time_s)),
  };
}

interface BatteryManager extends EventTarget {
  readonly level: number;
  readonly charging: boolean;
}

/** Which figures this browser tells by itself; the page offers sliders for the others. */
export interface Sensors {
  read: () => Partial<DeviceState>;
  has: { battery: boolean; thermal: boolean };
}

/** Battery Status API and Compute Pressure API, where they are. `changed` is called after each new reading. */
export async function browserSensors(changed: () => void): Promise<Sensors> {
  let thermal: Thermal = "unknown";
  const scope = globalThis as unknown as {
    PressureObserver?: new (told: (records: { state: Thermal }[]) => void) => { observe: (source: string, options: object) => Promise<void> };
    navigator: { getBattery?: () => Promise<BatteryManager> };
  };
  let battery: BatteryManager | null = null;
  try {
    battery = (await scope.navigator.getBattery?.()) ?? null;
    for (const event of ["levelchange", "chargingchange"]) battery?.addEventListener(event, changed);
  } catch {
    battery = null; // the page may not ask: as good as not there
  }
  try {
    const observer = scope.PressureObserver && new scope.PressureObserver((records) => {
      thermal = records.at(-1)?.state ?? thermal;
      changed();
    });
    await observer?.observe("cpu", { sampleInterval: 2000 });
    if (observer !== undefined) thermal = "nominal";
  } catch {
    thermal = "unknown";
  }
  const known = thermal !== "unknown";
  return {
    has: { battery: battery !== null, thermal: known },
    read: () => ({ battery: battery?.level ?? null, charging: battery?.charging ?? null, thermal }),
  };
}
