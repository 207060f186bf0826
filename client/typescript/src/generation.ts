/** A generation: iterate over its progress, wait for its result, or cancel it. */

import { CalotypeError, cancelledHere } from "./errors.js";
import { isEnd, type Picture, type Progress } from "./types.js";

/** How a generation is reached. */
export interface Reach {
  /** Follows it, until `leaving` is aborted; tells `onOrphan` of one that was left before its id was known. */
  follow(leaving: AbortSignal, onOrphan: (generationId: string) => void): AsyncIterable<Progress>;
  /** Cancels it on the server. */
  cancel(generationId: string): Promise<unknown>;
  /** Whether leaving is to cancel it at once: what the server does by itself is meant for lost connections. */
  readonly cancelsWhenLeft: boolean;
}

/**
 * A generation that starts with the first step of its iteration, or with `result`.
 *
 * Iterate over it once: the loop ends after success and throws a `CalotypeError` otherwise. What leaving the loop early
 * does, by `break`, `return` or an exception, says the request's `onDisconnect`: by default it cancels the generation.
 */
export class Generation implements AsyncIterable<Progress> {
  readonly #reach: Reach;
  readonly #leaving = new AbortController();
  readonly #signal: AbortSignal | undefined;
  #id: string | undefined;
  #cancels: boolean;
  #iterated = false;
  #done = false;
  #picture: Picture | undefined;
  #result: Promise<Picture> | undefined;

  constructor(reach: Reach, signal?: AbortSignal, id?: string) {
    this.#reach = reach;
    this.#signal = signal;
    this.#id = id;
    this.#cancels = reach.cancelsWhenLeft;
  }

  /** For `watch`, `finish` and `cancel` of the client; undefined before the first progress. */
  get id(): string | undefined {
    return this.#id;
  }

  /** Whether the generation has ended, in whatever way, or was left. */
  get done(): boolean {
    return this.#done;
  }

  /** Cancels the generation on the server and leaves it. Does nothing after the end. */
  cancel(): void {
    this.#cancels = true;
    this.#leave(cancelledHere());
  }

  /**
   * Waits for the end and returns the final picture. Can be called again.
   *
   * @throws CalotypeError - The generation ended without a picture.
   */
  result(): Promise<Picture> {
    this.#result ??= (async () => {
      for await (const _ of this) {
        // Only the end is of interest.
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
    // A generator hears of it only when the step is there that was asked for, which may take minutes.
    steps.return = (value) => {
      this.#leave(cancelledHere());
      return end(value);
    };
    return steps;
  }

  async *#follow(): AsyncGenerator<Progress, void, undefined> {
    const followSignal = () => this.#leave(this.#signal?.reason);
    if (this.#signal?.aborted) followSignal();
    this.#signal?.addEventListener("abort", followSignal, { once: true });
    try {
      for await (const progress of this.#reach.follow(this.#leaving.signal, (id) => this.#orphaned(id))) {
        this.#id = progress.generationId;
        if (progress.picture?.kind === "final") this.#picture = progress.picture;
        this.#done ||= isEnd(progress.phase);
        yield progress;
      }
    } catch (thrown) {
      // One that is late is of no use any more; in all other cases there is nothing left to leave.
      if (!(thrown instanceof CalotypeError && thrown.code === "DEADLINE_EXCEEDED")) this.#done = true;
      throw thrown;
    } finally {
      this.#signal?.removeEventListener("abort", followSignal);
      this.#leave(cancelledHere());
    }
  }

  #leave(reason: unknown): void {
    if (this.#done) return;
    this.#done = true;
    this.#leaving.abort(reason);
    if (this.#id !== undefined) this.#orphaned(this.#id);
  }

  #orphaned(id: string): void {
    // Whoever cannot be reached finds out by itself, when the connection is gone.
    if (this.#cancels) this.#reach.cancel(id).catch(() => undefined);
  }
}
