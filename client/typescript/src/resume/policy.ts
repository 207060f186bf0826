/** Decides how a generation outlives its connection. Does no I/O and does not wait. */

import { CalotypeError } from "../errors.js";
import type { Clock } from "./clock.js";
import { Continuity } from "./continuity.js";
import { isLoading, type Wait, type WaitLimits, Waits } from "./waits.js";

/** A call that ended without a final picture. */
export interface CallFailure {
  readonly error: CalotypeError;
  /** Whether the server ended the generation, rather than only the call. */
  readonly endedByServer: boolean;
  /** Whether any message was received. */
  readonly received: boolean;
  /** Whether to start the generation again, see `shouldReplace`. */
  readonly isReplaced: boolean;
}

export interface ResumeOptions extends WaitLimits {
  /** Whether the client may start a generation; false if it only watches one. */
  readonly canGenerate: boolean;
  /** The generation to watch from the start. */
  readonly generationId?: string;
  readonly afterSequence?: number;
}

/** The state of one generation across its calls: which call comes next, and when to give up. */
export class Resumption {
  readonly continuity: Continuity;
  readonly waits: Waits;
  readonly #retries: number;
  readonly #canGenerate: boolean;
  #generates: boolean;
  #newsBeforeCall = 0;

  constructor(options: ResumeOptions, clock: Clock) {
    const { retries, canGenerate, generationId, afterSequence } = options;
    this.continuity = new Continuity(generationId, afterSequence);
    this.waits = new Waits(options, clock, generationId !== undefined);
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
  shouldReplace(error: CalotypeError): boolean {
    if (!this.#canGenerate || this.#retries === 0) return false;
    if (isLoading(error)) return true;
    return (error.code === "UNAVAILABLE" || error.reason === "ABANDONED") && !this.#isExhausted();
  }

  /**
   * Chooses the next call after a failed one.
   *
   * @returns The wait before it; undefined to call at once.
   * @throws CalotypeError - The error to report to the caller: calling again does not help.
   */
  next({ error, endedByServer, received, isReplaced }: CallFailure): Wait | undefined {
    if (this.#hasNews()) this.waits.reset();
    if (received || this.continuity.generationId !== undefined) this.waits.hear();
    if (isReplaced) this.#generates = true;
    else if (endedByServer) throw error;
    else if (error.code === "NOT_FOUND" && !this.#generates && this.#canGenerate && this.#retries > 0) {
      this.#generates = true;
      return undefined;
    } else this.#generates = this.#generates && !received;
    try {
      return this.waits.after(error);
    } catch (thrown) {
      throw thrown === error ? this.#asLostConnection(error) : thrown;
    }
  }

  #hasNews(): boolean {
    return this.continuity.newsCount > this.#newsBeforeCall;
  }

  #isExhausted(): boolean {
    return !this.#hasNews() && this.waits.exhausted;
  }

  /** If the server cannot be reached at the last retry, the caller still sees a lost connection. */
  #asLostConnection(error: CalotypeError): CalotypeError {
    if (error.reason !== "UNREACHABLE" || this.continuity.newsCount === 0) return error;
    return new CalotypeError("UNAVAILABLE", "The connection was lost.", { reason: "CONNECTION_LOST", cause: error });
  }
}
