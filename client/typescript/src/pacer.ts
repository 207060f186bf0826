/**
 * A small jitter buffer: previews that arrive in bursts appear evenly.
 *
 * It estimates the usual interval between arrivals, releases one item per interval, and releases faster when items
 * accumulate. No item waits longer than `maxDelay`. The caller passes the time, in monotonic milliseconds.
 */
export class Pacer<T> {
  readonly #maxDelay: number;
  readonly #items: { readonly value: T; readonly arrived: number }[] = [];
  #interval = 0;
  #lastArrival: number | undefined;
  #lastShown = Number.NEGATIVE_INFINITY;

  /** @param maxDelay - Longest delay of an item, in milliseconds. */
  constructor(maxDelay = 300) {
    this.#maxDelay = maxDelay;
  }

  /** The usual time between arrivals, in milliseconds; 0 before the second one. */
  get interval(): number {
    return this.#interval;
  }

  /** Adds an item that arrived at the time `now`. */
  push(value: T, now: number): void {
    if (this.#lastArrival !== undefined) {
      const gap = now - this.#lastArrival;
      this.#interval += (gap - this.#interval) * (this.#interval === 0 ? 1 : SMOOTHING);
    }
    this.#lastArrival = now;
    this.#items.push({ value, arrived: now });
  }

  /** Returns when to call `take` next; undefined if the buffer is empty. */
  due(): number | undefined {
    const [first] = this.#items;
    if (first === undefined) return undefined;
    const speedup = 1 + (this.#items.length - 1) / 2;
    const gap = Math.max(this.#interval / speedup, SHORTEST_GAP_MS);
    return Math.min(Math.max(this.#lastShown + gap, first.arrived), first.arrived + this.#maxDelay);
  }

  /** Returns the newest item that is due, and drops older ones; undefined if none is due. */
  take(now: number): T | undefined {
    let taken: T | undefined;
    for (let due = this.due(); due !== undefined && due <= now; due = this.due()) {
      taken = this.#items.shift()?.value;
      // Counted from the due time rather than from `now`. Otherwise the delays of timers would add up.
      this.#lastShown = Math.max(due, now - this.#interval);
    }
    return taken;
  }

  /** Drops all items. */
  clear(): void {
    this.#items.length = 0;
  }
}

/** Faster changes are not visible. Also spaces a burst at the start, before the usual interval is known. */
const SHORTEST_GAP_MS = 20;

/** Weight of the newest gap in the usual interval. */
const SMOOTHING = 0.25;
