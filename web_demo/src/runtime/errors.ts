/** The errors edgesd raises on purpose: each says what came, what is allowed and what to do. */

export class EdgesdError extends Error {
  constructor(
    readonly came: string,
    readonly allowed: string,
    readonly fix: string,
  ) {
    super(`${came}. Allowed: ${allowed}. ${fix}.`);
    this.name = new.target.name;
  }
}

/** The request cannot be met as written: a bad name, number or combination. */
export class RequestError extends EdgesdError {}

/** A file or bundle is broken, truncated, hostile or too new. */
export class DataError extends EdgesdError {}

/** This browser lacks something: memory, storage, a feature. */
export class SetupError extends EdgesdError {}

/** Foreign text as it may stand in a message: short, without control characters. */
export function shown(text: unknown, limit = 200): string {
  // eslint-disable-next-line no-control-regex
  return String(text).slice(0, limit).replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2066-\u2069]/g, "?");
}

/** What happened, for people, whatever was thrown. */
export function describeError(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
