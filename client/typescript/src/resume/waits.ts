/**
 * Decides whether to call again after a failed call, and how long to wait first. Does no I/O and does not wait.
 *
 * Each failure is one of these:
 * - Loading: the service answers that it is not ready, because it loads its model or shuts down. It exists and will be
 *   ready, or will be replaced, so the answer is not a failed attempt: it starts the count of failed attempts again. Only
 *   the caller's timeout ends the wait; without a timeout, `LOADING_TIMEOUT_SECONDS` does.
 * - Unreached: no service received the call. Before the first contact, the caller gets this error at once, unless it asked
 *   to wait for a service.
 * - Lost: the service may have received the call. Like an unreached service after the first contact, it counts as a failed
 *   attempt.
 * - Everything else is final.
 */

import { LOADING_TIMEOUT_SECONDS, RETRY_BASE_SECONDS, RETRY_MAX_SECONDS } from "../constants.js";
import { CalotypeError } from "../errors.js";
import type { Clock } from "./clock.js";

export interface WaitLimits {
  /** Failed attempts in a row. 0 disables all waits. */
  readonly retries: number;
  /** Seconds until the caller's deadline. Default: no deadline. */
  readonly timeout?: number | undefined;
  /** Seconds to wait for a loading service. Default: until the deadline, or 600 without a deadline. */
  readonly loadingTimeout?: number | undefined;
  /** Seconds to wait before the first contact for a service that does not answer. Default: 0. */
  readonly waitForServer?: number | undefined;
}

/** A wait before the next call. */
export interface Wait {
  /** Number of this wait among those for the same reason since the last news, from 1. */
  readonly attempt: number;
  /** In seconds. */
  readonly delay: number;
}

/** Whether a service answered that it is not ready: it loads its model, or it shuts down. */
export function isLoading({ code, reason }: CalotypeError): boolean {
  return code === "UNAVAILABLE" && (reason === "NOT_READY" || reason === "DRAINING");
}

/** Whether the call reached no service, or a bridge without a service behind it. */
export function isUnreached({ reason }: CalotypeError): boolean {
  return reason === "UNREACHABLE" || reason === "UPSTREAM_UNAVAILABLE";
}

/** Counts the failures of one call or generation since the last news. */
export class Waits {
  readonly #limits: WaitLimits;
  readonly #clock: Clock;
  readonly #deadline: number;
  #reached: boolean;
  #failures = 0;
  #loadingAnswers = 0;
  #loadingSince = Number.POSITIVE_INFINITY;
  #unreachedCalls = 0;
  #unreachedSince = Number.POSITIVE_INFINITY;

  /** @param reached - Whether the service is known to have the generation. */
  constructor(limits: WaitLimits, clock: Clock, reached = false) {
    this.#limits = limits;
    this.#clock = clock;
    this.#deadline = this.#now() + (limits.timeout ?? Number.POSITIVE_INFINITY);
    this.#reached = reached;
  }

  /** Seconds until the deadline; `Infinity` without a deadline. */
  get timeLeft(): number {
    return this.#deadline - this.#now();
  }

  /** Whether one more failed attempt is one too many. */
  get exhausted(): boolean {
    return this.#failures >= this.#limits.retries;
  }

  /** Records that a service has received the call. */
  hear(): void {
    this.#reached = true;
  }

  /** Records news for the caller: all counts and limits start again. */
  reset(): void {
    this.#failures = 0;
    this.#loadingAnswers = 0;
    this.#loadingSince = Number.POSITIVE_INFINITY;
  }

  /**
   * Takes the error of a call.
   *
   * @throws CalotypeError - The error to report to the caller: calling again does not help.
   */
  after(error: CalotypeError): Wait {
    const now = this.#now();
    if (this.#limits.retries === 0) throw error;
    if (isLoading(error)) {
      this.#reached = true;
      this.#failures = 0;
      this.#loadingAnswers += 1;
      this.#loadingSince = Math.min(this.#loadingSince, now);
      const limit = this.#loadingLimit();
      const left = this.#loadingSince + limit - now;
      if (left <= 0) throw notReady(error, limit);
      return this.#wait(this.#loadingAnswers, error, left);
    }
    if (!this.#reached && isUnreached(error)) {
      this.#unreachedSince = Math.min(this.#unreachedSince, now);
      const left = this.#unreachedSince + (this.#limits.waitForServer ?? 0) - now;
      if (left <= 0) throw error;
      this.#unreachedCalls += 1;
      return this.#wait(this.#unreachedCalls, error, left);
    }
    if (!this.#mayHelp(error) || this.exhausted) throw error;
    this.#failures += 1;
    return this.#wait(this.#failures, error);
  }

  #now(): number {
    return this.#clock.now() / 1000;
  }

  #loadingLimit(): number {
    const { loadingTimeout, timeout } = this.#limits;
    return loadingTimeout ?? (timeout === undefined ? LOADING_TIMEOUT_SECONDS : Number.POSITIVE_INFINITY);
  }

  #mayHelp({ code, reason, retryAfter }: CalotypeError): boolean {
    // The same request id would get the same end again.
    if (code === "DATA_LOSS" || reason === "ENGINE_CRASHED") return false;
    if (this.#reached) {
      const isLost = code === "UNAVAILABLE" || reason === "STREAM_INCOMPLETE" || reason === "ABANDONED";
      return isLost || retryAfter !== undefined;
    }
    // A service that stalled before its first message may have accepted the request; calling again is safe because the
    // request id is idempotent.
    this.#reached = reason === "STALLED";
    return this.#reached;
  }

  #wait(attempt: number, error: CalotypeError, most = Number.POSITIVE_INFINITY): Wait {
    const left = this.timeLeft;
    if (left <= 0) throw tooLate(error);
    const delay = backoff(attempt, this.#clock.random()) + (error.retryAfter ?? 0);
    // The delay of the service is an estimate: at least one more attempt comes before the deadline.
    return { attempt, delay: Math.min(delay, most, Math.max(left / 2, Math.min(left, RETRY_BASE_SECONDS))) };
  }
}

/**
 * Returns a random wait in seconds: exponential backoff with full jitter, so that the clients of a restarted service do not
 * all return at the same moment.
 *
 * @param attempt - From 1.
 * @param random - From 0 to 1.
 * @see https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
 */
export function backoff(attempt: number, random: number): number {
  return random * Math.min(RETRY_BASE_SECONDS * 2 ** (attempt - 1), RETRY_MAX_SECONDS);
}

/** Creates the error of a call whose timeout passed during a wait. */
export function tooLate(cause: CalotypeError | undefined): CalotypeError {
  const doing = cause && isLoading(cause) ? "waiting for the service" : "reconnecting";
  return new CalotypeError("DEADLINE_EXCEEDED", `The timeout passed while ${doing}.`, { cause });
}

function notReady(error: CalotypeError, seconds: number): CalotypeError {
  if (seconds === 0) return error;
  const { reason, retryAfter, metadata } = error;
  const details = { reason, metadata, cause: error, ...(retryAfter !== undefined && { retryAfter }) };
  return new CalotypeError("UNAVAILABLE", `The service was not ready within ${seconds} s: ${error.message}`, details);
}
