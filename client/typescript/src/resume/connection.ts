/** One streaming call: reads its messages, and closes it so that the server stops working on it. */

import { CONTROL_TIMEOUT_SECONDS } from "../constants.js";
import type * as wire from "../gen/calotype/v1/calotype_pb.js";

/** How long to wait for the status after the last message. The message alone decides how the generation ended. */
const STATUS_GRACE_MS = 1000;

/** Starts a call, which must end when `signal` is aborted. */
export type OpenStream = (signal: AbortSignal) => AsyncIterable<wire.Progress>;

export class Connection {
  readonly #controller = new AbortController();
  readonly #messages: AsyncIterator<wire.Progress>;
  readonly #leaveSignal: AbortSignal;
  readonly #onOrphan: ((generationId: string) => void) | undefined;
  #pending: Promise<IteratorResult<wire.Progress>> | undefined;
  #received = false;

  /**
   * @param leaveSignal - Aborted when the caller leaves, which rejects `next` at once.
   * @param onOrphan - Called with the id of a generation whose caller left before its first message. Without a reader,
   *   such a generation may keep running.
   */
  constructor(open: OpenStream, leaveSignal: AbortSignal, onOrphan?: (generationId: string) => void) {
    this.#messages = open(this.#controller.signal)[Symbol.asyncIterator]();
    this.#leaveSignal = leaveSignal;
    this.#onOrphan = onOrphan;
  }

  /** Whether any message was received. */
  get received(): boolean {
    return this.#received;
  }

  /** Returns the next message; undefined at the end. */
  async next(): Promise<wire.Progress | undefined> {
    this.#pending = this.#messages.next();
    const { done, value } = await unlessAborted(this.#pending, this.#leaveSignal);
    this.#pending = undefined;
    if (done) return undefined;
    this.#received = true;
    return value;
  }

  /** Waits a moment for the status that follows the last message, so that the call ends normally. */
  async drain(): Promise<void> {
    const timer = setTimeout(() => this.#controller.abort(), STATUS_GRACE_MS);
    await this.#messages.next().catch(() => undefined);
    clearTimeout(timer);
  }

  /** Closes the call. Does nothing after its end. */
  close(): void {
    if (this.#pending && this.#leaveSignal.aborted && !this.#received && this.#onOrphan) {
      void this.#reportOrphan(this.#pending, this.#onOrphan);
    } else this.#abort();
  }

  /** Waits for the first message, which has the id, before it closes the call. */
  async #reportOrphan(
    first: Promise<IteratorResult<wire.Progress>>,
    onOrphan: (generationId: string) => void,
  ): Promise<void> {
    const timer = setTimeout(() => this.#controller.abort(), CONTROL_TIMEOUT_SECONDS * 1000);
    const { done, value } = await first.catch(() => ({ done: true, value: undefined }) as const);
    clearTimeout(timer);
    if (!done) onOrphan(value.generationId);
    this.#abort();
  }

  #abort(): void {
    // Returning from connect's iterator does not abort its request; without this the server would keep working.
    this.#controller.abort();
    this.#pending?.catch(() => undefined);
    this.#messages.return?.().catch(() => undefined);
  }
}

/** Returns the result of `promise`. Rejects with the reason of `signal` if that is aborted first. */
function unlessAborted<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  return new Promise((resolve, reject) => {
    const onAbort = () => reject(signal.reason);
    if (signal.aborted) onAbort();
    signal.addEventListener("abort", onAbort, { once: true });
    promise.then(resolve, reject).finally(() => signal.removeEventListener("abort", onAbort));
  });
}
