/** Detects a stalled service. The service sends a message at least every 10 s, also while a generation is queued. */

import { CalotypeError } from "../errors.js";

/**
 * Yields the messages of a stream.
 *
 * @param seconds - Longest wait for each message. `Infinity` means no limit.
 * @throws CalotypeError - UNAVAILABLE with the reason STALLED: no message arrived in time. The call itself stays open.
 */
export async function* withStallTimeout<T>(
  messages: AsyncIterable<T>,
  seconds: number,
): AsyncGenerator<T, void, undefined> {
  const iterator = messages[Symbol.asyncIterator]();
  for (;;) {
    const { done, value } = await within(iterator.next(), seconds);
    if (done) return;
    yield value;
  }
}

async function within<T>(promise: Promise<T>, seconds: number): Promise<T> {
  if (seconds === Number.POSITIVE_INFINITY) return promise;
  let timer: ReturnType<typeof setTimeout> | undefined;
  const stall = new Promise<never>((_, reject) => {
    const error = new CalotypeError("UNAVAILABLE", "The service has stalled.", { reason: "STALLED" });
    timer = setTimeout(() => reject(error), seconds * 1000);
  });
  try {
    return await Promise.race([promise, stall]);
  } finally {
    clearTimeout(timer);
  }
}
