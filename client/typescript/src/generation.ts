/** A generation: iterate over its progress, await its result, or cancel it. */

import { CalotypeError, cancelledHere } from "./errors.js";
import { isEnd, type Picture, type Progress } from "./types.js";

/** The calls that a generation makes. */
export interface GenerationCalls {
  /**
   * Follows the generation until `leaveSignal` is aborted. Calls `onOrphan` with its id if the caller left before the
   * first message arrived.
   */
  follow(leaveSignal: AbortSignal, onOrphan: (generationId: string) => void): AsyncIterable<Progress>;
  /** Cancels the generation on the server. */
  cancel(generationId: string): Promise<unknown>;
  /** Whether leaving cancels at once, rather than after the grace period that exists for lost connections. */
  readonly cancelsOnLeave: boolean;
}

/**
 * A generation, which starts when it is iterated or when `result` is called.
 *
 * Iterate over it once: the loop ends after success, and throws a `CalotypeError` otherwise. The request's
 * `onDisconnect` decides what leaving the loop early does, by `break`, `return` or an exception: by default, it cancels
 * the generation.
 */
export class Generation implements AsyncIterable<Progress> {
  readonly #calls: GenerationCalls;
  readonly #leave = new AbortController();
  readonly #signal: AbortSignal | undefined;
  #id: string | undefined;
  #cancelsOnLeave: boolean;
  #iterated = false;
  #done = false;
  #picture: Picture | undefined;
  #result: Promise<Picture> | undefined;

  /**
   * @param signal - Leaves the generation when it is aborted.
   * @param id - Set if the id is known from the start.
   */
  constructor(calls: GenerationCalls, signal?: AbortSignal, id?: string) {
    this.#calls = calls;
    this.#signal = signal;
    this.#id = id;
    this.#cancelsOnLeave = calls.cancelsOnLeave;
  }

  /** For `watch`, `finish` and `cancel` of the client; undefined before the first progress. */
  get id(): string | undefined {
    return this.#id;
  }

  /** Whether the generation has ended, or the caller has left it. */
  get done(): boolean {
    return this.#done;
  }

  /** Cancels the generation on the server and leaves it. Does nothing after the end. */
  cancel(): void {
    this.#cancelsOnLeave = true;
    this.#leaveWith(cancelledHere());
  }

  /**
   * Waits for the end and returns the final picture. Can be called again.
   *
   * @throws CalotypeError - The generation ended without a picture.
   */
  result(): Promise<Picture> {
    this.#result ??= (async () => {
      for await (const _ of this) {
        // Only the final picture matters.
      }
      return this.#picture as Picture;
    })();
    return this.#result;
  }

  [Symbol.asyncIterator](): AsyncGenerator<Progress, void, undefined> {
    if (this.#iterated) throw new TypeError("A generation can be iterated only once. Call `generate` for another.");
    this.#iterated = true;
    const steps = this.#follow();
    const end = steps.return.bind(steps);
    // A generator handles `return` only after its pending step, which may take minutes. So leave the call first.
    steps.return = (value) => {
      this.#leaveWith(cancelledHere());
      return end(value);
    };
    return steps;
  }

  async *#follow(): AsyncGenerator<Progress, void, undefined> {
    const onAbort = () => this.#leaveWith(this.#signal?.reason);
    if (this.#signal?.aborted) onAbort();
    this.#signal?.addEventListener("abort", onAbort, { once: true });
    try {
      for await (const progress of this.#calls.follow(this.#leave.signal, (id) => this.#cancelIfLeft(id))) {
        this.#id = progress.generationId;
        if (progress.picture?.kind === "final") this.#picture = progress.picture;
        this.#done ||= isEnd(progress.phase);
        yield progress;
      }
    } catch (thrown) {
      // After the caller's timeout the generation may still run, so `finally` has to leave it. After any other error
      // there is nothing left to cancel.
      if (!(thrown instanceof CalotypeError && thrown.code === "DEADLINE_EXCEEDED")) this.#done = true;
      throw thrown;
    } finally {
      this.#signal?.removeEventListener("abort", onAbort);
      this.#leaveWith(cancelledHere());
    }
  }

  #leaveWith(reason: unknown): void {
    if (this.#done) return;
    this.#done = true;
    this.#leave.abort(reason);
    if (this.#id !== undefined) this.#cancelIfLeft(this.#id);
  }

  #cancelIfLeft(id: string): void {
    // If this call fails, the server still ends the generation after its grace period.
    if (this.#cancelsOnLeave) this.#calls.cancel(id).catch(() => undefined);
  }
}
