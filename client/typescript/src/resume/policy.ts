/** Decides how a generation outlives its connection. Does no I/O and does not wait. */

import { RETRY_BASE_SECONDS, RETRY_MAX_SECONDS } from "../constants.js";
import { CalotypeError } from "../errors.js";
import { Continuity } from "./continuity.js";

/**
 * Returns how long to wait before a retry, in milliseconds: exponential backoff with full jitter, so that the clients
 * of a restarted server do not all reconnect at the same moment.
 *
 * @param attempt - Retries in a row, from 1.
 * @param random - From 0 to 1.
 * @see https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
 */
export function backoff(attempt: number, random: number): number {
  return random * Math.min(RETRY_BASE_SECONDS * 2 ** (attempt - 1), RETRY_MAX_SECONDS) * 1000;
}

/** A call that ended without a final picture. */
export interface CallFailure {
  readonly error: CalotypeError;
  /** Whether the server ended the generation, rather than only the call. */
  readonly endedByServer: boolean;
  /** Whether any message was received. */
  readonly received: boolean;
  /** The generation to replace, see `shouldReplace`. */
  readonly replaces: string | undefined;
}

export interface ResumeOptions {
  /** Retries in a row without anything new between them. */
  readonly retries: number;
  /** Whether the client may start a generation; false if it only watches one. */
  readonly canGenerate: boolean;
  /** The generation to watch from the start. */
  readonly generationId?: string;
  readonly afterSequence?: number;
}

/** The state of one generation across its calls: which call comes next, and when to give up. */
export class Resumption {
  readonly continuity: Continuity;
  readonly #retries: number;
  readonly #canGenerate: boolean;
  #generates: boolean;
  #attempts = 0;
  #newsBeforeCall = 0;
  /** The generation that was already replaced. If it ends the same way again, it is not replaced again. */
  #replaced: string | undefined;

  constructor({ retries, canGenerate, generationId, afterSequence }: ResumeOptions) {
    this.continuity = new Continuity(generationId, afterSequence);
    this.#retries = retries;
    this.#canGenerate = canGenerate;
    this.#generates = canGenerate && generationId === undefined;
  }

  /** Whether the next call is `Generate`, rather than `Watch`. */
  get generates(): boolean {
    return this.#generates;
  }

  /** Records that a call starts. */
  start(): void {
    this.#newsBeforeCall = this.continuity.newsCount;
  }

  /** Whether to start a generation again because the server ended it on its own, for example by restarting. */
  shouldReplace({ code, reason }: CalotypeError, generationId: string): boolean {
    const isServersReason = code === "UNAVAILABLE" || reason === "ABANDONED";
    return isServersReason && this.#canGenerate && this.#retries > 0 && generationId !== this.#replaced;
  }

  /**
   * Chooses the next call after a failed one.
   *
   * @returns The number of retries in a row, from 1, which determines the wait; 0 to call at once.
   * @throws CalotypeError - The error to report to the caller: retrying does not help.
   */
  next({ error, endedByServer, received, replaces }: CallFailure): number {
    if (this.continuity.newsCount > this.#newsBeforeCall) this.#attempts = 0;
    this.#attempts += 1;
    // A server that stalled before its first message may have accepted the request; retrying is safe because the
    // request id is idempotent.
    const mayBeAccepted = this.continuity.generationId !== undefined || error.reason === "STALLED";
    if (!mayBeAccepted || this.#attempts > this.#retries) throw this.#asLostConnection(error);
    if (replaces !== undefined) {
      this.#replaced = replaces;
      this.#generates = true;
    } else if (endedByServer) throw error;
    else if (error.code === "NOT_FOUND" && !this.#generates && this.#canGenerate) {
      this.#generates = true;
      return 0;
    } else if (isTransient(error)) this.#generates = this.#generates && !received;
    else throw error;
    return this.#attempts;
  }

  /** If the server cannot be reached at the last retry, the caller still sees a lost connection. */
  #asLostConnection(error: CalotypeError): CalotypeError {
    if (error.reason !== "UNREACHABLE" || this.continuity.newsCount === 0) return error;
    return new CalotypeError("UNAVAILABLE", "The connection was lost.", { reason: "CONNECTION_LOST", cause: error });
  }
}

/** After a restart, all clients return at once, so quotas and the queue are exceeded for a short time. */
const TRANSIENT_REASONS = [
  "STREAM_INCOMPLETE",
  "QUEUE_FULL",
  "REQUESTS_PER_MINUTE",
  "PIXEL_STEPS_PER_MINUTE",
  "CONCURRENT_GENERATIONS",
];

/** Whether a retry may help. */
function isTransient({ code, reason }: CalotypeError): boolean {
  return code === "UNAVAILABLE" || TRANSIENT_REASONS.includes(reason);
}
