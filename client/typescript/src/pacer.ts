/**
 * A small jitter buffer, so that previews which arrive in bursts appear evenly.
 *
 * It learns the usual time between arrivals, hands out one item per such interval, and hurries when items pile up. No
 * item waits longer than `maxDelay`. It has no clock of its own: times are the caller's, in milliseconds, never falling.
 */
export class Pacer<T> {
  readonly #maxDelay: number;
  readonly #items: { readonly value: T; readonly arrived: number }[] = [];
  #interval = 0;
  #lastArrival: number | undefined;
  #lastShown = Number.NEGATIVE_INFINITY;

  /** @param maxDelay - Longest wait of an item, in milliseconds. */
  constructor(maxDelay = 300) {
    this.#maxDelay = maxDelay;
  }

  /** The usual time between arrivals, in milliseconds; 0 before the second one. */
  get interval(): number {
    return this.#interval;
  }

  /** Takes an item that arrived. */
  push(value: T, now: number): void {
    if (this.#lastArrival !== undefined) {
      const gap = now - this.#lastArrival;
      this.#interval += (gap - this.#interval) * (this.#interval === 0 ? 1 : SMOOTHING);
    }
    this.#lastArrival = now;
    this.#items.push({ value, arrived: now });
  }

  /** When to call `take` next; undefined while there is nothing. */
  due(): number | undefined {
    const [first] = this.#items;
    if (first === undefined) return undefined;
    const hurry = 1 + (this.#items.length - 1) / 2;
    const gap = Math.max(this.#interval / hurry, SHORTEST_GAP_MS);
    return Math.min(Math.max(this.#lastShown + gap, first.arrived), first.arrived + this.#maxDelay);
  }

  /** Returns the newest item that is due, leaving out those before it; undefined when none is. */
  take(now: number): T | undefined {
    let taken: T | undefined;
    for (let due = this.due(); due !== undefined && due <= now; due = this.due()) {
      taken = this.#items.shift()?.value;
      // Counted from when it was due, not from when the caller came, or late timers would add up.
      this.#lastShown = Math.max(due, now - this.#interval);
    }
    return taken;
  }

  /** Forgets what has not been handed out. */
  clear(): void {
    this.#items.length = 0;
  }
}

/** Nobody sees more than this; and of a burst at the start, before there is a usual interval, nothing is left out. */
const SHORTEST_GAP_MS = 20;

/** Weight of the newest gap in the usual one. */
const SMOOTHING = 0.25;
