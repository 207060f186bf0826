/** All prints of the page, newest first. The prints of this tab return after a reload. */

import { type Client, isOver, newRequestId, type ViewState } from "calotype";
import type { GenerationRequest } from "./generation_request";
import { Print } from "./print";
import type { SavedPrint, SavedPrints } from "./saved_prints";

/** Every print keeps its pictures in memory. Above this number, the oldest finished prints are removed. */
const MAX_PRINTS = 60;

export class Gallery {
  /** Called to generate a picture again; the request has the seed in use. */
  onRepeat: (request: GenerationRequest) => void = () => {};
  /** Called when the service requires a key, or rejects the current one. */
  onUnauthenticated: () => void = () => {};
  readonly #container: HTMLElement;
  readonly #template: HTMLTemplateElement;
  readonly #introduction: HTMLElement;
  readonly #client: Client;
  readonly #saved: SavedPrints;
  readonly #prints = new Map<string, Print>();
  #hasLeft = false;

  /** @param introduction - Shown while there are no prints. */
  constructor(
    container: HTMLElement,
    template: HTMLTemplateElement,
    introduction: HTMLElement,
    client: Client,
    saved: SavedPrints,
  ) {
    this.#container = container;
    this.#template = template;
    this.#introduction = introduction;
    this.#client = client;
    this.#saved = saved;
  }

  /** Adds a print and starts its generation. */
  develop(request: GenerationRequest): void {
    const saved: SavedPrint = { requestId: newRequestId(), request };
    this.#saved.save(saved);
    this.#add(saved);
  }

  /** Adds a print of a generation started elsewhere, unless there is one already. */
  watch(generationId: string): void {
    if (this.#saved.all.some((saved) => saved.generationId === generationId)) return;
    const saved: SavedPrint = { requestId: newRequestId(), generationId };
    this.#saved.save(saved);
    this.#add(saved);
  }

  /** Adds the saved prints of this tab. Prints whose generation the service no longer has are removed again. */
  restore(): void {
    for (const requestId of this.#prints.keys()) this.#remove(requestId);
    this.#hasLeft = false;
    // Oldest first: those are running, while the newest may still wait for a connection.
    for (const saved of this.#saved.all) this.#add(saved, true);
  }

  /** Stops following all generations. The server waits for a while for the page to reconnect. */
  leave(): void {
    this.#hasLeft = true;
    for (const { view } of this.#prints.values()) view.leave();
  }

  #add({ requestId, generationId, request }: SavedPrint, isRestored = false): void {
    const print = new Print(this.#template, request, {
      identified: (id) => {
        if (this.#saved.get(requestId)?.generationId !== id) {
          this.#saved.save({ requestId, generationId: id, request });
        }
      },
      ended: (state) => this.#ended(requestId, state, isRestored),
      repeat: (repeated) => this.onRepeat(repeated),
      remove: () => {
        this.#saved.remove(requestId);
        this.#remove(requestId);
      },
    });
    this.#prints.set(requestId, print);
    // The browser upgrades the custom element in a cloned template only when it enters the document.
    this.#container.prepend(print.element);
    print.start(this.#client, requestId, generationId);
    if (!request && generationId) void this.#loadTitle(print, generationId);
    this.#introduction.hidden = true;
    this.#removeOldest();
  }

  /** Saves only prints that succeeded. Others stay visible until the page is reloaded. */
  #ended(requestId: string, { status, phase, error }: ViewState, isRestored: boolean): void {
    if (this.#hasLeft || status === "succeeded") return;
    const saved = this.#saved.get(requestId);
    this.#saved.remove(requestId);
    if (error?.code === "UNAUTHENTICATED") this.onUnauthenticated();
    if (!isRestored || error?.code !== "NOT_FOUND") return;
    if (phase === undefined) this.#remove(requestId);
    // The service restarted and lost the generation while it was shown: start it again, as without a reload.
    else if (saved?.request) this.#prints.get(requestId)?.view.retry();
  }

  /** Looks up the prompt of a generation started elsewhere. */
  async #loadTitle(print: Print, generationId: string): Promise<void> {
    try {
      for await (const summary of this.#client.generations()) {
        if (summary.generationId === generationId) print.setTitle(summary.prompt);
      }
    } catch {
      // The print works without a title.
    }
  }

  #remove(requestId: string): void {
    const element = this.#prints.get(requestId)?.element;
    this.#prints.delete(requestId);
    if (!element) return;
    const neighbour = element.nextElementSibling ?? element.previousElementSibling;
    const hadFocus = element.contains(document.activeElement);
    element.remove();
    if (hadFocus) (neighbour?.querySelector<HTMLElement>(".remove") ?? document.getElementById("prompt"))?.focus();
    this.#introduction.hidden = this.#prints.size > 0;
  }

  #removeOldest(): void {
    for (const [requestId, { view }] of [...this.#prints].slice(0, -MAX_PRINTS)) {
      if (!isOver(view.state)) continue;
      this.#saved.remove(requestId);
      this.#remove(requestId);
    }
  }
}
