/**
 * Lines to a service: how many streams may be open at once.
 *
 * A browser opens at most six connections to a host over HTTP/1.1, and every stream holds one. A seventh call, be it
 * the cancel of the first, would wait in the browser without a word. So streams queue here, first come first served,
 * and calls that are not streams always find a connection.
 */
export class Lines {
  #free: number;
  readonly #waiting: (() => void)[] = [];

  /** @param count - Streams that may be open at once, from 1; `Infinity` for no limit. */
  constructor(count: number) {
    if (!(count >= 1)) throw new RangeError(`There must be at least one line, not ${count}.`);
    this.#free = count;
  }

  /**
   * Waits for a line.
   *
   * @returns Gives it back; further calls do nothing.
   * @throws The reason of `signal`, when it is aborted first.
   */
  async take(signal: AbortSignal): Promise<() => void> {
    signal.throwIfAborted();
    if (this.#free > 0) this.#free -= 1;
    else await this.#wait(signal);
    let held = true;
    return () => {
      if (!held) return;
      held = false;
      const next = this.#waiting.shift();
      if (next) next();
      else this.#free += 1;
    };
  }

  #wait(signal: AbortSignal): Promise<void> {
    return new Promise((resolve, reject) => {
      const begin = () => {
        signal.removeEventListener("abort", leave);
        resolve();
      };
      const leave = () => {
        this.#waiting.splice(this.#waiting.indexOf(begin), 1);
        reject(signal.reason);
      };
      signal.addEventListener("abort", leave, { once: true });
      this.#waiting.push(begin);
    });
  }
}

const HTTP1_LINES = 4;

/**
 * Returns how many streams are wise to one host: four over HTTP/1.1 in a browser, which leaves two connections for other
 * calls and for another tab; no limit over HTTP/2 and HTTP/3, and outside browsers.
 */
export function defaultLines(baseUrl: string): number {
  const page = globalThis.location as Location | undefined;
  if (page === undefined) return Number.POSITIVE_INFINITY;
  if (new URL(baseUrl, page.href).origin !== page.origin) return HTTP1_LINES;
  const [navigation] = performance.getEntriesByType("navigation") as PerformanceNavigationTiming[];
  return /^h[23]/.test(navigation?.nextHopProtocol ?? "") ? Number.POSITIVE_INFINITY : HTTP1_LINES;
}
