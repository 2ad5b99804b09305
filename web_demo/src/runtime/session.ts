/** The protocol every runtime behind a model follows; the names its components speak are in edgesd/runtime/session.py. */

import type { Role } from "./manifest.js";
import type { Data, Tensor, Tensors } from "./tensor.js";

export type Inputs = Record<string, Tensor<Data>>;

/** Runs components by name. They load on first use; `load` and `unload` only move that moment. */
export interface Session {
  /** A wrong name or shape throws RequestError; outputs are arrays that the caller owns. */
  run(component: Role, inputs: Inputs): Promise<Tensors>;
  load(component: Role): Promise<void>;
  unload(component: Role): Promise<void>;
  has(component: Role): boolean;
  /** Rows a call may have, ascending. */
  batches(component: Role): readonly number[];
  /** Widths the component comes in, the widest first. */
  widths(component: Role): readonly number[];
  /** What later runs compute with; the old one is let go, the new one loads at the next run. */
  useWidth(component: Role, width: number): Promise<void>;
}
