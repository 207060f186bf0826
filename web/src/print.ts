/** One print: a `<calotype-view>` with its caption, seed, link and buttons. */

import type { Client, ViewState } from "calotype";
import type { CalotypeView } from "calotype/element";
import { attributes, type GenerationRequest } from "./generation_request";

/** How long a generation waits for this page to reconnect. Enough for a reload, and a closed tab frees its slot soon. */
const RELOAD_GRACE_SECONDS = 30;

export interface PrintActions {
  /** Called with the id of a generation that is running or has succeeded. */
  identified(generationId: string): void;
  /** Called when the generation has ended. */
  ended(state: ViewState): void;
  /** Called to generate the same picture again; the request has the seed in use. */
  repeat(request: GenerationRequest): void;
  /** Called to remove the print. */
  remove(): void;
}

export class Print {
  readonly element: HTMLElement;
  readonly view: CalotypeView;
  readonly #request: GenerationRequest | undefined;
  readonly #actions: PrintActions;

  /** @param request - Undefined for a generation started elsewhere. */
  constructor(template: HTMLTemplateElement, request: GenerationRequest | undefined, actions: PrintActions) {
    this.element = template.content.firstElementChild?.cloneNode(true) as HTMLElement;
    this.view = this.#find("calotype-view") as CalotypeView;
    this.#request = request;
    this.#actions = actions;
    this.setTitle(request?.prompt ?? "A picture started elsewhere");
    for (const [name, value] of request ? attributes(request) : []) this.view.setAttribute(name, value);
    this.view.setAttribute("disconnect-grace", String(RELOAD_GRACE_SECONDS));
    this.view.addEventListener("calotype-state", ({ detail }) => this.#update(detail));
    this.view.addEventListener("calotype-end", ({ detail }) => actions.ended(detail));
    this.#find(".repeat").addEventListener("click", () => {
      if (request) actions.repeat({ ...request, options: { ...request.options, seed: this.view.state.seed } });
    });
    this.#find(".remove").addEventListener("click", () => {
      // A generation started elsewhere keeps running.
      if (request) this.view.cancel();
      actions.remove();
    });
  }

  setTitle(prompt: string): void {
    this.#find(".caption").textContent = prompt;
    this.#find(".remove").ariaLabel = `Remove: ${prompt}`;
    this.#find(".link").ariaLabel = `Open in a new tab: ${prompt}`;
  }

  /** Watches the generation, or starts one if there is no id. The print must be in the document. */
  start(client: Client, requestId: string, generationId: string | undefined): void {
    this.view.client = client;
    const { loras } = this.#request?.options ?? {};
    if (generationId === undefined) this.view.start({ requestId, ...(loras && { loras }) });
    else this.view.watch(generationId);
  }

  #update({ seed, status, generationId }: ViewState): void {
    if (seed !== undefined) this.#find(".seed").textContent = `Seed ${seed}`;
    this.#find(".repeat").hidden = status !== "succeeded" || !this.#request;
    const link = this.#find(".link") as HTMLAnchorElement;
    link.hidden = generationId === undefined;
    if (generationId === undefined) return;
    link.hash = `watch=${generationId}`;
    if (status === "running" || status === "succeeded") this.#actions.identified(generationId);
  }

  #find(selector: string): HTMLElement {
    const element = this.element.querySelector<HTMLElement>(selector);
    if (!element) throw new Error(`index.html has no ${selector} in #print`);
    return element;
  }
}
