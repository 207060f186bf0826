/** One connection: reads it message by message, and leaves it so that the server knows, and nothing is orphaned. */

import type * as wire from "../gen/calotype/v1/calotype_pb.js";

/** How long the status may come after the last message, which is what counts. Milliseconds. */
const STATUS_GRACE_MS = 1000;

/** How long a call that was left before its first message may take to say what it began. Milliseconds. */
const ORPHAN_GRACE_MS = 10_000;

/** Starts a call, which must end when `signal` is aborted. */
export type Open = (signal: AbortSignal) => AsyncIterable<wire.Progress>;

export class Connection {
  readonly #controller = new AbortController();
  readonly #messages: AsyncIterator<wire.Progress>;
  readonly #left: AbortSignal;
  readonly #onOrphan: ((generationId: string) => void) | undefined;
  #pending: Promise<IteratorResult<wire.Progress>> | undefined;
  #begun = false;

  /**
   * @param left - Aborted when the caller leaves, which rejects `next` at once.
   * @param onOrphan - Told of a generation whose caller left before its id was known: it may go on for nobody.
   */
  constructor(open: Open, left: AbortSignal, onOrphan?: (generationId: string) => void) {
    this.#messages = open(this.#controller.signal)[Symbol.asyncIterator]();
    this.#left = left;
    this.#onOrphan = onOrphan;
  }

  /** Whether anything has arrived. */
  get begun(): boolean {
    return this.#begun;
  }

  /** Returns the next message; undefined at the end. */
  async next(): Promise<wire.Progress | undefined> {
    this.#pending = this.#messages.next();
    const { done, value } = await unlessAborted(this.#pending, this.#left);
    this.#pending = undefined;
    if (done) return undefined;
    this.#begun = true;
    return value;
  }

  /** Waits a moment for the status that follows the last message, so that the call ends in order. */
  async drain(): Promise<void> {
    const timer = setTimeout(() => this.#controller.abort(), STATUS_GRACE_MS);
    await this.#messages.next().catch(() => undefined);
    clearTimeout(timer);
  }

  /** Leaves the call. Does nothing after its end. */
  close(): void {
    if (this.#pending && this.#left.aborted && !this.#begun && this.#onOrphan) {
      void this.#adopt(this.#pending, this.#onOrphan);
    } else this.#abort();
  }

  async #adopt(first: Promise<IteratorResult<wire.Progress>>, onOrphan: (generationId: string) => void): Promise<void> {
    const timer = setTimeout(() => this.#controller.abort(), ORPHAN_GRACE_MS);
    const { done, value } = await first.catch(() => ({ done: true, value: undefined }) as const);
    clearTimeout(timer);
    if (!done) onOrphan(value.generationId);
    this.#abort();
  }

  #abort(): void {
    // Leaving the iterator of connect does not abort its request: without this the server would go on.
    this.#controller.abort();
    this.#pending?.catch(() => undefined);
    this.#messages.return?.().catch(() => undefined);
  }
}

/** Returns what `promise` gives, unless `signal` is aborted first, which rejects with its reason. */
function unlessAborted<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  return new Promise((resolve, reject) => {
    const leave = () => reject(signal.reason);
    if (signal.aborted) leave();
    signal.addEventListener("abort", leave, { once: true });
    promise.then(resolve, reject).finally(() => signal.removeEventListener("abort", leave));
  });
}
