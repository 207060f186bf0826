/** Time and randomness for reconnecting. Tests pass their own. */

export interface Clock {
  /** Monotonic time in milliseconds. */
  now(): number;
  /** A random number from 0 to 1. */
  random(): number;
  /** Waits this many milliseconds. May return early, and returns at once when `signal` is aborted. */
  sleep(milliseconds: number, signal: AbortSignal): Promise<void>;
}

/** The system clock. Its `sleep` returns early when the browser is back online. */
export const realClock: Clock = {
  now: () => performance.now(),
  random: Math.random,
  sleep: (milliseconds, signal) =>
    new Promise((resolve) => {
      const wake = () => {
        clearTimeout(timer);
        signal.removeEventListener("abort", wake);
        globalThis.removeEventListener?.("online", wake);
        resolve();
      };
      const timer = setTimeout(wake, milliseconds);
      signal.addEventListener("abort", wake);
      globalThis.addEventListener?.("online", wake);
      if (signal.aborted) wake();
    }),
};
