/** The errors of this package: one class with a closed set of codes, for `switch (error.code)`. */

/** The 16 status codes of gRPC except OK, in the order of their numbers. */
export const STATUS_CODES = [
  "CANCELLED",
  "UNKNOWN",
  "INVALID_ARGUMENT",
  "DEADLINE_EXCEEDED",
  "NOT_FOUND",
  "ALREADY_EXISTS",
  "PERMISSION_DENIED",
  "RESOURCE_EXHAUSTED",
  "FAILED_PRECONDITION",
  "ABORTED",
  "OUT_OF_RANGE",
  "UNIMPLEMENTED",
  "INTERNAL",
  "UNAVAILABLE",
  "DATA_LOSS",
  "UNAUTHENTICATED",
] as const;

export type StatusCode = (typeof STATUS_CODES)[number];

/** An invalid field of a request. `field` is its name in the proto, such as `width_px`. */
export interface Violation {
  readonly field: string;
  readonly description: string;
}

export interface ErrorDetails {
  readonly reason?: string;
  readonly violations?: readonly Violation[];
  readonly retryAfter?: number;
  readonly metadata?: Readonly<Record<string, string>>;
  readonly cause?: unknown;
}

/** The error that this package throws for every failed call. */
export class CalotypeError extends Error {
  override readonly name = "CalotypeError";
  readonly code: StatusCode;
  /**
   * Machine-readable reason in UPPER_SNAKE_CASE. Either the server's, such as QUEUE_FULL, or the client's: UNREACHABLE
   * (no answer), CONNECTION_LOST (during a stream), STALLED (no message for too long), STREAM_INCOMPLETE (no typed end),
   * CANCELLED_HERE (by this client). Otherwise empty.
   */
  readonly reason: string;
  /** All invalid fields of the request, for INVALID_ARGUMENT. */
  readonly violations: readonly Violation[];
  /** Seconds after which a retry may succeed; undefined if the server did not say. */
  readonly retryAfter: number | undefined;
  /** Further details from the server, by name. */
  readonly metadata: Readonly<Record<string, string>>;

  constructor(code: StatusCode, message: string, details: ErrorDetails = {}) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause });
    this.code = code;
    this.reason = details.reason ?? "";
    this.violations = details.violations ?? [];
    this.retryAfter = details.retryAfter;
    this.metadata = details.metadata ?? {};
  }
}

/** Returns the name of a numeric status code; UNKNOWN for a number that gRPC does not define. */
export function statusCode(number: number): StatusCode {
  return STATUS_CODES[number - 1] ?? "UNKNOWN";
}

/** Creates the error of a call that this client cancelled. */
export function cancelledHere(cause?: unknown): CalotypeError {
  return new CalotypeError("CANCELLED", "Cancelled.", { reason: "CANCELLED_HERE", cause });
}
