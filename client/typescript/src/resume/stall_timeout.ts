/** Notices services that fall silent. They promise a message every 10 s, also while a generation waits in the queue. */

import { CalotypeError } from "../errors.js";

/** Seconds without a message after which a service counts as lost: twice what it promises. */
export const STALL_TIMEOUT = 20;

/**
 * Passes messages on.
 *
 * @param seconds - How long to wait for each. `Infinity` means without limit.
 * @throws CalotypeError - UNAVAILABLE with the reason STALLED: the next one did not come in time. Its call goes on.
 */
export async function* unlessSilent<T>(
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
  const silence = new Promise<never>((_, reject) => {
    const error = new CalotypeError("UNAVAILABLE", "The service has fallen silent.", { reason: "STALLED" });
    timer = setTimeout(() => reject(error), seconds * 1000);
  });
  try {
    return await Promise.race([promise, silence]);
  } finally {
    clearTimeout(timer);
  }
}
