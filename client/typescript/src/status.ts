/** Converts errors of calls to `CalotypeError`. */

import { durationMs } from "@bufbuild/protobuf/wkt";
import { ConnectError } from "@connectrpc/connect";
import { CalotypeError, type StatusCode, statusCode } from "./errors.js";
import type * as wire from "./gen/calotype/v1/calotype_pb.js";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.js";

/**
 * Converts an error that a call threw.
 *
 * @param thrown - A `ConnectError`, or the error that `fetch` rejected with.
 * @param received - Whether any message of the answer was received.
 */
export function fromCall(thrown: unknown, received: boolean): CalotypeError {
  if (thrown instanceof CalotypeError) return thrown;
  const error = ConnectError.from(thrown);
  if (isNetworkFailure(thrown)) {
    return received
      ? new CalotypeError("UNAVAILABLE", "The connection was lost.", { reason: "CONNECTION_LOST", cause: thrown })
      : new CalotypeError("UNAVAILABLE", "The service does not respond.", { reason: "UNREACHABLE", cause: thrown });
  }
  if (TRUNCATED.test(error.rawMessage)) {
    return new CalotypeError("UNKNOWN", "The response is incomplete.", { reason: "STREAM_INCOMPLETE", cause: thrown });
  }
  const [info] = error.findDetails(ErrorInfoSchema);
  const [retry] = error.findDetails(RetryInfoSchema);
  const [bad] = error.findDetails(BadRequestSchema);
  return new CalotypeError(statusCode(error.code), error.rawMessage, {
    reason: info?.reason ?? "",
    metadata: info?.metadata ?? {},
    retryAfter: retry?.retryDelay && durationMs(retry.retryDelay) / 1000,
    violations: bad?.fieldViolations.map(({ field, description }) => ({ field, description })) ?? [],
    cause: thrown,
  });
}

/** Connect's messages for a body that a proxy truncated: it ended without a status, or within a message. */
const TRUNCATED = /^(missing trailer|protocol error: incomplete envelope)$/;

/** Converts the error in the last message of a stream. `fallback` is the code if that message has no error. */
export function fromMessage(error: wire.Error | undefined, fallback: StatusCode): CalotypeError {
  if (!error) return new CalotypeError(fallback, "The generation ended without an image.");
  return new CalotypeError(statusCode(error.code), error.message, {
    reason: error.reason,
    retryAfter: error.retryDelay && durationMs(error.retryDelay) / 1000,
  });
}

/**
 * Whether the network failed. In that case `fetch` and its body reject with a `TypeError`, in every browser and in Node,
 * and connect keeps it as the cause of its own error.
 */
function isNetworkFailure(thrown: unknown): boolean {
  for (let error: unknown = thrown; error instanceof Error; error = error.cause) {
    if (error instanceof TypeError) return true;
  }
  return false;
}
