/**
 * Lines to a service: how many streams may be open at once.
 *
 * A browser opens at most six connections to a host over HTTP/1.1, and every stream holds one. A seventh call, be it
 * the cancel of the first, would wait in the browser without a word. So streams queue here, first come first served,
 * and calls that are not streams always find a connection.
 */
export interface Lines {
  /**
   * Waits for a line.
   *
   * @returns Gives it back; further calls do nothing.
   * @throws The reason of `signal`, when it is aborted first.
   */
  take(signal: AbortSignal): Promise<() => void>;
}

/** Lines of one client. */
export class OwnLines implements Lines {
  #free: number;
  readonly #waiting: (() => void)[] = [];

  /** @param count - Streams that may be open at once, from 1; `Infinity` for no limit. */
  constructor(count: number) {
    if (!(count >= 1)) throw new RangeError(`There must be at least one line, not ${count}.`);
    this.#free = count;
  }

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

/**
 * Lines of all tabs of a browser, which share its connections: six streams over two tabs, and a third could not even be
 * loaded. Each line is a lock, which the browser gives back for a tab that closes or crashes.
 */
class SharedLines implements Lines {
  readonly #name: string;
  readonly #count: number;

  constructor(name: string, count: number) {
    this.#name = name;
    this.#count = count;
  }

  async take(signal: AbortSignal): Promise<() => void> {
    // Whoever is first in the queue may try them all.
    const leaveQueue = await hold(`${this.#name} queue`, signal);
    const found = new AbortController();
    const names = Array.from({ length: this.#count }, (_, at) => `${this.#name} ${at}`);
    try {
      const tries = names.map((name) => hold(name, AbortSignal.any([signal, found.signal])));
      const first = await Promise.any(tries);
      found.abort();
      // One that was granted at the same moment.
      for (const each of tries) each.then((release) => release !== first && release()).catch(() => undefined);
      return first;
    } catch (thrown) {
      signal.throwIfAborted();
      throw thrown;
    } finally {
      leaveQueue();
    }
  }
}

/** Waits for a lock, and returns what gives it back. */
function hold(name: string, signal: AbortSignal): Promise<() => void> {
  return new Promise((resolve, reject) => {
    const held = () => new Promise<void>((release) => resolve(release));
    navigator.locks.request(name, { signal }, held).catch(reject);
  });
}

const HTTP1_LINES = 4;

/**
 * Returns the lines that are wise to one host: four over HTTP/1.1 in a browser, which leaves two connections for other
 * calls; no limit over HTTP/2 and HTTP/3, and outside browsers.
 */
export function defaultLines(baseUrl: string): Lines {
  const page = globalThis.location as Location | undefined;
  const origin = page && new URL(baseUrl, page.href).origin;
  if (page === undefined || (origin === page.origin && isMultiplexed())) return new OwnLines(Number.POSITIVE_INFINITY);
  // Locks are only there in pages that came over TLS or from localhost.
  if (!("locks" in navigator)) return new OwnLines(HTTP1_LINES);
  return new SharedLines(`calotype ${origin}`, HTTP1_LINES);
}

/** Whether this page came over HTTP/2 or HTTP/3. */
function isMultiplexed(): boolean {
  const [navigation] = performance.getEntriesByType("navigation") as PerformanceNavigationTiming[];
  return /^h[23]/.test(navigation?.nextHopProtocol ?? "");
}
