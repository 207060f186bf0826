/** From what a call failed with to a `CalotypeError`. */

import { durationMs } from "@bufbuild/protobuf/wkt";
import { ConnectError } from "@connectrpc/connect";
import { CalotypeError, type StatusCode, statusCode } from "./errors.js";
import type * as wire from "./gen/calotype/v1/calotype_pb.js";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.js";

/**
 * Translates whatever a call threw.
 *
 * @param thrown - A `ConnectError`, or what `fetch` rejected with.
 * @param begun - Whether anything of the answer had arrived.
 */
export function fromCall(thrown: unknown, begun: boolean): CalotypeError {
  if (thrown instanceof CalotypeError) return thrown;
  const error = ConnectError.from(thrown);
  if (isNetworkFailure(thrown)) {
    return begun
      ? new CalotypeError("UNAVAILABLE", "The connection was lost.", { reason: "CONNECTION_LOST", cause: thrown })
      : new CalotypeError("UNAVAILABLE", "The service does not answer.", { reason: "UNREACHABLE", cause: thrown });
  }
  if (CUT.test(error.rawMessage)) {
    return new CalotypeError("UNKNOWN", "The answer is incomplete.", { reason: "STREAM_INCOMPLETE", cause: thrown });
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

/** What connect says of a body that ended in order, but with no status, or within a message: a proxy has cut it. */
const CUT = /^(missing trailer|protocol error: incomplete envelope)$/;

/** Translates the error in the last message of a stream; `fallback` stands in for a missing one. */
export function fromMessage(error: wire.Error | undefined, fallback: StatusCode): CalotypeError {
  if (!error) return new CalotypeError(fallback, "The generation ended without an image.");
  return new CalotypeError(statusCode(error.code), error.message, {
    reason: error.reason,
    retryAfter: error.retryDelay && durationMs(error.retryDelay) / 1000,
  });
}

/**
 * Whether the network failed. `fetch` and its body reject with a `TypeError` then, in every browser and in Node, which
 * connect passes on as the cause of an error of its own.
 */
function isNetworkFailure(thrown: unknown): boolean {
  for (let error: unknown = thrown; error instanceof Error; error = error.cause) {
    if (error instanceof TypeError) return true;
  }
  return false;
}
