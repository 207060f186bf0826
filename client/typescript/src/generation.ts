/** A generation: iterate over its progress, wait for its result, or cancel it. */

import { Assembler } from "./assembler.js";
import { type CalotypeError, cancelledHere } from "./errors.js";
import type * as wire from "./gen/calotype/v1/calotype_pb.js";
import { fromCall } from "./status.js";
import type { Picture, Progress } from "./types.js";

/** How long the status may come after the last message, which is what counts. Milliseconds. */
const STATUS_GRACE_MS = 1000;

/** Starts the call. It must end when `signal` is aborted. */
export type Call = (signal: AbortSignal) => AsyncIterable<wire.Progress>;

/**
 * A generation that starts with the first step of its iteration, or with `result`.
 *
 * Iterate over it once: the loop ends after success and throws a `CalotypeError` otherwise. Leaving the loop early, by
 * `break`, `return` or an exception, aborts the call, which cancels the generation on the server.
 */
export class Generation implements AsyncIterable<Progress> {
  readonly #call: Call;
  readonly #controller = new AbortController();
  readonly #assembler = new Assembler();
  readonly #signal: AbortSignal | undefined;
  #iterated = false;
  #result: Promise<Picture> | undefined;

  constructor(call: Call, signal?: AbortSignal) {
    this.#call = call;
    this.#signal = signal;
  }

  /** Whether the generation has ended, in whatever way. */
  get done(): boolean {
    return this.#assembler.ended;
  }

  /** Leaves the stream, which cancels the generation on the server. Does nothing after the end. */
  cancel(): void {
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
      return this.#assembler.outcome();
    })();
    return this.#result;
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Progress, void, undefined> {
    if (this.#iterated) throw new TypeError("A generation can be iterated only once. Call `generate` for another.");
    this.#iterated = true;
    const assembler = this.#assembler;
    const followSignal = () => this.#leave(cancelledHere(this.#signal?.reason));
    if (this.#signal?.aborted) followSignal();
    this.#signal?.addEventListener("abort", followSignal, { once: true });
    let begun = false;
    let grace: ReturnType<typeof setTimeout> | undefined;
    try {
      if (!assembler.ended) {
        for await (const message of this.#call(this.#controller.signal)) {
          begun = true;
          const progress = assembler.feed(message);
          if (assembler.ended) grace ??= setTimeout(() => this.#controller.abort(), STATUS_GRACE_MS);
          if (progress) yield progress;
        }
      }
      assembler.close();
    } catch (thrown) {
      assembler.close(fromCall(thrown, begun));
    } finally {
      clearTimeout(grace);
      this.#signal?.removeEventListener("abort", followSignal);
      // Leaving the iterator of connect does not abort its request: without this the server would go on.
      this.#leave(cancelledHere());
      this.#controller.abort();
    }
    assembler.outcome();
  }

  #leave(error: CalotypeError): void {
    if (this.#assembler.ended) return;
    this.#assembler.close(error);
    this.#controller.abort();
  }
}
