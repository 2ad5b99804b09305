/** What the page and its worker say to each other. */

import type { Check, Decision, DeviceState, Image, Settings, Start } from "../runtime/index.js";

export interface Wish {
  address: string;
  form: "auto" | "wasm" | "webgpu";
  /** 0: as many as the device has. */
  threads: number;
  frugal: boolean;
  precision: string;
}

export interface Job {
  settings: Partial<Settings> & { prompt: string };
  start: Start | null;
  policy: string | null;
  device: Partial<DeviceState>;
}

export type Request =
  | { type: "open"; wish: Wish }
  | { type: "draw"; job: Job }
  | { type: "resume-saved" }
  | { type: "discard-saved" }
  | { type: "pause" | "resume" | "cancel" | "clear" | "selftest" }
  | { type: "device"; device: Partial<DeviceState>; policy: string | null; settings: Partial<Settings> };

export interface Opened {
  name: string;
  sizePx: [number, number];
  defaults: { sampler: string; steps: number; guidance: number };
  samplers: Record<string, number[]>;
  widths: number[];
  precisions: string[];
  policies: string[];
  canStart: boolean;
  prompts: string[];
  form: "wasm" | "webgpu";
  precision: string;
  threads: number;
  frugal: boolean;
  offline: boolean;
  storedBytes: number;
  warnings: string[];
  /** The prompt of a picture that was paused before the page was closed. */
  saved: string | null;
}

export interface Drawn {
  image: Image;
  png: Blob;
  settings: Settings;
  notes: string[];
  truncated: string;
  calls: number;
  secondsPerStep: number;
  seconds: number;
}

export interface Problem {
  came: string;
  allowed: string;
  fix: string;
}

export type Reply =
  | { type: "download"; path: string; done: number; total: number }
  | { type: "opened"; opened: Opened }
  | { type: "loading"; role: string }
  | { type: "step"; row: number; rows: number; preview: Image; seconds: number }
  | { type: "paused"; lasting: boolean }
  | { type: "drawn"; drawn: Drawn }
  | { type: "decision"; policy: string; decision: Decision }
  | { type: "check"; check: Check }
  | { type: "tested"; passed: boolean; seconds: number }
  | { type: "idle"; why: "cancelled" | "cleared" }
  | { type: "problem"; problem: Problem; during: Request["type"] };
