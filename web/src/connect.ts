/**
 * Connects to the service: reads the model, retries until that succeeds, and shows problems in plain language. The client
 * waits by itself while the service loads its model.
 */

import { CalotypeError, type Client, explain, isLoading, type Model } from "calotype";
import type { KeyPrompt } from "./key_prompt";

const FIRST_WAIT_MS = 1_000;
const MAX_WAIT_MS = 10_000;

export interface StatusElements {
  /** Shows the loaded model. */
  readonly model: HTMLElement;
  /** Shows why the service is not available. */
  readonly problem: HTMLElement;
}

/**
 * Asks the service for its model until it answers.
 *
 * @param onAuthenticated - Called once, as soon as no key is missing.
 */
export async function connect(
  client: Client,
  elements: StatusElements,
  keyPrompt: KeyPrompt,
  onAuthenticated: () => void = () => {},
): Promise<Model> {
  let isAuthenticated = false;
  const authenticated = () => {
    if (!isAuthenticated) onAuthenticated();
    isAuthenticated = true;
  };
  for (let wait = FIRST_WAIT_MS; ; wait = Math.min(wait * 1.5, MAX_WAIT_MS)) {
    try {
      const model = await client.getModel({
        onReconnect: ({ error }) => {
          showProblem(error, false, elements);
          authenticated();
        },
      });
      elements.problem.hidden = true;
      keyPrompt.close();
      authenticated();
      showModel(model, elements.model);
      return model;
    } catch (thrown) {
      if (!(thrown instanceof CalotypeError)) throw thrown;
      const needsKey = thrown.code === "UNAUTHENTICATED";
      showProblem(thrown, needsKey, elements);
      if (needsKey) {
        await keyPrompt.ask();
        wait = FIRST_WAIT_MS;
        continue;
      }
      authenticated();
      await pause(Math.max(wait, (thrown.retryAfter ?? 0) * 1000));
    }
  }
}

function showProblem(error: CalotypeError, needsKey: boolean, { model, problem }: StatusElements): void {
  const { title, advice } = explain(error);
  const next = isLoading(error) ? "This page continues by itself." : "This page retries automatically.";
  const text = needsKey ? `${title} ${advice}` : `${title} ${advice} ${next}`;
  if (problem.textContent !== text) problem.textContent = text;
  problem.hidden = false;
  model.textContent = "No model yet";
}

function showModel(model: Model, element: HTMLElement): void {
  const name = model.name.split("/").at(-1) || model.name;
  element.textContent = `${name} on ${model.device}, ${model.width} × ${model.height}, ${model.steps} steps`;
  element.title = `${model.pipeline}, ${model.dtype}, Calotype ${model.serverVersion}`;
}

/** Waits. Returns early if the page becomes visible or the browser comes online. */
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
