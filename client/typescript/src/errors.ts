/** What can go wrong, as one class with a closed set of codes: `switch (error.code)`. */

/** The sixteen status codes of gRPC besides OK, in the order of their numbers. */
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

/** One thing that is wrong with a request. `field` is its name in the proto, such as `width_px`. */
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

/** Every error that this package throws for a call. */
export class CalotypeError extends Error {
  override readonly name = "CalotypeError";
  readonly code: StatusCode;
  /**
   * Machine-readable, in UPPER_SNAKE_CASE: the server's, such as QUEUE_FULL, or one of this client's own: UNREACHABLE
   * (no answer at all), CONNECTION_LOST (in mid-stream), STALLED (nothing for too long), STREAM_INCOMPLETE (no typed
   * end), CANCELLED_HERE. Else empty.
   */
  readonly reason: string;
  /** Everything that is wrong with the request, for INVALID_ARGUMENT. */
  readonly violations: readonly Violation[];
  /** Seconds after which trying again may help; undefined when the server did not say. */
  readonly retryAfter: number | undefined;
  /** What the server tells besides, by name. */
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

/** Returns the name of a numeric status code; UNKNOWN for one that gRPC does not define. */
export function statusCode(number: number): StatusCode {
  return STATUS_CODES[number - 1] ?? "UNKNOWN";
}

/** An error for what was cancelled on this side. */
export function cancelledHere(cause?: unknown): CalotypeError {
  return new CalotypeError("CANCELLED", "Cancelled.", { reason: "CANCELLED_HERE", cause });
}
