/** One print: a `<calotype-view>` with its caption, its seed and what one can do with it. */

import type { Client, ViewState } from "calotype";
import type { CalotypeView } from "calotype/element";
import { attributes, type Wish } from "./generation_request";

/** How long a generation waits for this page to come back: enough for a reload, and a closed tab frees its slot soon. */
const GRACE_SECONDS = 30;

export interface PrintActions {
  /** It shows this generation, which runs or has succeeded. */
  known(generationId: string): void;
  /** It ended. */
  ended(state: ViewState): void;
  /** Somebody wants it again, with its seed. */
  again(wish: Wish): void;
  remove(): void;
}

export class Print {
  readonly element: HTMLElement;
  readonly view: CalotypeView;
  readonly #wish: Wish | undefined;
  readonly #actions: PrintActions;

  /** @param wish - What it was asked to be; undefined for one that was begun elsewhere. */
  constructor(template: HTMLTemplateElement, wish: Wish | undefined, actions: PrintActions) {
    this.element = template.content.firstElementChild?.cloneNode(true) as HTMLElement;
    this.view = this.#part("calotype-view") as CalotypeView;
    this.#wish = wish;
    this.#actions = actions;
    this.entitle(wish?.prompt ?? "A picture from elsewhere");
    for (const [name, value] of wish ? attributes(wish) : []) this.view.setAttribute(name, value);
    this.view.setAttribute("disconnect-grace", String(GRACE_SECONDS));
    this.view.addEventListener("calotype-state", ({ detail }) => this.#update(detail));
    this.view.addEventListener("calotype-end", ({ detail }) => actions.ended(detail));
    this.#part(".again").addEventListener("click", () => {
      if (wish) actions.again({ ...wish, options: { ...wish.options, seed: this.view.state.seed } });
    });
    this.#part(".remove").addEventListener("click", () => {
      // What others have begun is theirs.
      if (wish) this.view.cancel();
      actions.remove();
    });
  }

  entitle(prompt: string): void {
    this.#part(".caption").textContent = prompt;
    this.#part(".remove").ariaLabel = `Remove: ${prompt}`;
    this.#part(".link").ariaLabel = `Open on its own: ${prompt}`;
  }

  /** Shows a generation that there is, or else begins one. It must be in a document by then. */
  begin(client: Client, requestId: string, generationId: string | undefined): void {
    this.view.client = client;
    if (generationId === undefined) this.view.start({ requestId });
    else this.view.watch(generationId);
  }

  #update({ seed, status, generationId }: ViewState): void {
    if (seed !== undefined) this.#part(".seed").textContent = `Seed ${seed}`;
    this.#part(".again").hidden = status !== "succeeded" || !this.#wish;
    const link = this.#part(".link") as HTMLAnchorElement;
    link.hidden = generationId === undefined;
    if (generationId === undefined) return;
    link.hash = `watch=${generationId}`;
    if (status === "running" || status === "succeeded") this.#actions.known(generationId);
  }

  #part(selector: string): HTMLElement {
    const part = this.element.querySelector<HTMLElement>(selector);
    if (!part) throw new Error(`index.html has no ${selector} in #print`);
    return part;
  }
}
