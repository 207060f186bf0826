/**
 * Limits the number of streams that are open to a service at once.
 *
 * Over HTTP/1.1 a browser opens at most 6 connections to a host, and every stream occupies one. A seventh call, even the
 * one that cancels the first, would wait in the browser without notice. So streams queue here in order, and calls that
 * are not streams always find a free connection.
 */
export interface StreamSlots {
  /**
   * Waits for a free slot.
   *
   * @returns A function that releases the slot; further calls do nothing.
   * @throws The reason of `signal` if it is aborted first.
   */
  acquire(signal: AbortSignal): Promise<() => void>;
}

/** Slots of one client. */
export class LocalStreamSlots implements StreamSlots {
  #free: number;
  readonly #waiting: (() => void)[] = [];

  /** @param count - Streams that may be open at once, from 1; `Infinity` for no limit. */
  constructor(count: number) {
    if (!(count >= 1)) throw new RangeError(`maxStreams must be at least 1, not ${count}.`);
    this.#free = count;
  }

  async acquire(signal: AbortSignal): Promise<() => void> {
    signal.throwIfAborted();
    if (this.#free > 0) this.#free -= 1;
    else await this.#wait(signal);
    let isHeld = true;
    return () => {
      if (!isHeld) return;
      isHeld = false;
      const next = this.#waiting.shift();
      if (next) next();
      else this.#free += 1;
    };
  }

  #wait(signal: AbortSignal): Promise<void> {
    return new Promise((resolve, reject) => {
      const grant = () => {
        signal.removeEventListener("abort", leave);
        resolve();
      };
      const leave = () => {
        this.#waiting.splice(this.#waiting.indexOf(grant), 1);
        reject(signal.reason);
      };
      signal.addEventListener("abort", leave, { once: true });
      this.#waiting.push(grant);
    });
  }
}

/**
 * Slots shared by all tabs of a browser. Tabs share the browser's connections: with 6 streams in two tabs, a third tab
 * could not even load. Each slot is a Web Lock, which the browser releases when its tab closes or crashes.
 */
class SharedStreamSlots implements StreamSlots {
  readonly #name: string;
  readonly #count: number;

  constructor(name: string, count: number) {
    this.#name = name;
    this.#count = count;
  }

  async acquire(signal: AbortSignal): Promise<() => void> {
    // Only the first in the queue tries the slots, which keeps the order.
    const leaveQueue = await holdLock(`${this.#name} queue`, signal);
    const found = new AbortController();
    const names = Array.from({ length: this.#count }, (_, index) => `${this.#name} ${index}`);
    try {
      const attempts = names.map((name) => holdLock(name, AbortSignal.any([signal, found.signal])));
      const first = await Promise.any(attempts);
      found.abort();
      // Release another slot that was granted at the same moment.
      for (const attempt of attempts) attempt.then((release) => release !== first && release()).catch(() => undefined);
      return first;
    } catch (thrown) {
      signal.throwIfAborted();
      throw thrown;
    } finally {
      leaveQueue();
    }
  }
}

/** Waits for a lock. Returns a function that releases it. */
function holdLock(name: string, signal: AbortSignal): Promise<() => void> {
  return new Promise((resolve, reject) => {
    const onGranted = () => new Promise<void>((release) => resolve(release));
    navigator.locks.request(name, { signal }, onGranted).catch(reject);
  });
}

const HTTP1_STREAMS = 4;

/**
 * Returns the default slots for a service: four over HTTP/1.1 in a browser, which leaves two connections for other
 * calls; no limit over HTTP/2, over HTTP/3, and outside browsers.
 */
export function defaultStreamSlots(baseUrl: string): StreamSlots {
  const page = globalThis.location as Location | undefined;
  const origin = page && new URL(baseUrl, page.href).origin;
  if (page === undefined || (origin === page.origin && isMultiplexed())) {
    return new LocalStreamSlots(Number.POSITIVE_INFINITY);
  }
  // Web Locks exist only in pages served over TLS or from localhost.
  if (!("locks" in navigator)) return new LocalStreamSlots(HTTP1_STREAMS);
  return new SharedStreamSlots(`calotype ${origin}`, HTTP1_STREAMS);
}

/** Whether this page was loaded over HTTP/2 or HTTP/3. */
function isMultiplexed(): boolean {
  const [navigation] = performance.getEntriesByType("navigation") as PerformanceNavigationTiming[];
  return /^h[23]/.test(navigation?.nextHopProtocol ?? "");
}
