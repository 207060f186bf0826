/** Finds out what the service offers, however long that takes, and says so in plain words meanwhile. */

import { CalotypeError, type Client, explain, type Model } from "calotype";
import type { Keyhole } from "./key_prompt";

const FIRST_WAIT_MS = 1_000;
const LONGEST_WAIT_MS = 10_000;

export interface Places {
  /** Tells what is loaded. */
  readonly model: HTMLElement;
  /** Tells what is wrong. */
  readonly trouble: HTMLElement;
}

/**
 * Asks for the model until there is an answer.
 *
 * @param onAdmitted - Called once, when calls need not fail for want of a key.
 */
export async function connect(
  client: Client,
  places: Places,
  keyhole: Keyhole,
  onAdmitted: () => void = () => {},
): Promise<Model> {
  let isAdmitted = false;
  const admit = () => {
    if (!isAdmitted) onAdmitted();
    isAdmitted = true;
  };
  for (let wait = FIRST_WAIT_MS; ; wait = Math.min(wait * 1.5, LONGEST_WAIT_MS)) {
    try {
      const model = await client.getModel();
      places.trouble.hidden = true;
      keyhole.close();
      admit();
      describe(model, places.model);
      return model;
    } catch (thrown) {
      if (!(thrown instanceof CalotypeError)) throw thrown;
      const { title, advice } = explain(thrown);
      const isLockedOut = thrown.code === "UNAUTHENTICATED";
      const text = isLockedOut ? `${title} ${advice}` : `${title} ${advice} This page keeps trying.`;
      if (places.trouble.textContent !== text) places.trouble.textContent = text;
      places.trouble.hidden = false;
      places.model.textContent = "No model yet";
      if (isLockedOut) {
        await keyhole.ask();
        wait = FIRST_WAIT_MS;
        continue;
      }
      admit();
      await pause(Math.max(wait, (thrown.retryAfter ?? 0) * 1000));
    }
  }
}

function describe(model: Model, place: HTMLElement): void {
  const name = model.name.split("/").at(-1) || model.name;
  place.textContent = `${name} on ${model.device}, ${model.width} × ${model.height}, ${model.steps} steps`;
  place.title = `${model.pipeline}, ${model.dtype}, Calotype ${model.serverVersion}`;
}

/** Waits, and no longer once the page is looked at again or the network is back. */
function pause(milliseconds: number): Promise<void> {
  return new Promise((resolve) => {
    const controller = new AbortController();
    const done = () => {
      if (document.hidden) return;
      clearTimeout(timer);
      controller.abort();
      resolve();
    };
    const timer = setTimeout(done, milliseconds);
    document.addEventListener("visibilitychange", done, { signal: controller.signal });
    addEventListener("online", done, { signal: controller.signal });
  });
}
