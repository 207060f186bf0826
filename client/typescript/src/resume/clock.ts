/** Time and chance, as far as reconnecting needs them: tests bring their own. */

export interface Clock {
  /** Milliseconds that never fall. */
  now(): number;
  /** A number from 0 to 1. */
  random(): number;
  /** Waits so many milliseconds, or until there is reason to hope; no longer than until `signal` is aborted. */
  sleep(milliseconds: number, signal: AbortSignal): Promise<void>;
}

/** The real one. It wakes early when the browser finds its network again. */
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

const FIRST_BOUND_MS = 250;
const LAST_BOUND_MS = 10_000;

/**
 * Returns how long to wait before an attempt, in milliseconds: exponential backoff with full jitter, so that the many
 * callers of a service that was restarted do not come back at the same moment.
 *
 * @param attempt - Attempts in a row, from 1.
 * @see https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
 */
export function backoff(attempt: number, random: number): number {
  return random * Math.min(FIRST_BOUND_MS * 2 ** (attempt - 1), LAST_BOUND_MS);
}
