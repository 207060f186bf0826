/** The prints, newest first. Those of this tab come back after a reload. */

import { type Client, isOver, newRequestId, type ViewState } from "calotype";
import type { Album, Entry } from "./saved_prints";
import { Print } from "./print";
import type { Wish } from "./generation_request";

/** Finished prints beyond this many make room: each keeps its pictures in memory. */
const MOST_PRINTS = 60;

export class Gallery {
  /** Called when somebody wants a print again, with its seed. */
  onAgain: (wish: Wish) => void = () => {};
  /** Called when the service asks for a key, or for another one. */
  onLockedOut: () => void = () => {};
  readonly #place: HTMLElement;
  readonly #template: HTMLTemplateElement;
  readonly #blank: HTMLElement;
  readonly #client: Client;
  readonly #album: Album;
  readonly #prints = new Map<string, Print>();
  #isAway = false;

  constructor(place: HTMLElement, template: HTMLTemplateElement, blank: HTMLElement, client: Client, album: Album) {
    this.#place = place;
    this.#template = template;
    this.#blank = blank;
    this.#client = client;
    this.#album = album;
  }

  /** Hangs up a print and begins to develop it. */
  develop(wish: Wish): void {
    const entry: Entry = { requestId: newRequestId(), wish };
    this.#album.keep(entry);
    this.#hang(entry);
  }

  /** Hangs up a print that is developed elsewhere, unless it hangs here already. */
  watch(generationId: string): void {
    if (this.#album.entries.some((entry) => entry.generationId === generationId)) return;
    const entry: Entry = { requestId: newRequestId(), generationId };
    this.#album.keep(entry);
    this.#hang(entry);
  }

  /** Hangs up what this tab has shown before, without what the service has forgotten. */
  restore(): void {
    for (const requestId of this.#prints.keys()) this.#takeDown(requestId);
    this.#isAway = false;
    // The oldest first: they run, while the newest may still wait for a connection.
    for (const entry of this.#album.entries) this.#hang(entry, true);
  }

  /** Stops following what is under way. It waits for a while for the page to come back. */
  leave(): void {
    this.#isAway = true;
    for (const { view } of this.#prints.values()) view.leave();
  }

  #hang({ requestId, generationId, wish }: Entry, isRestored = false): void {
    const print = new Print(this.#template, wish, {
      known: (id) => {
        if (this.#album.get(requestId)?.generationId !== id) this.#album.keep({ requestId, generationId: id, wish });
      },
      ended: (state) => this.#ended(requestId, state, isRestored),
      again: (again) => this.onAgain(again),
      remove: () => {
        this.#album.forget(requestId);
        this.#takeDown(requestId);
      },
    });
    this.#prints.set(requestId, print);
    // Cloned from a template, its view is upgraded when it enters the document.
    this.#place.prepend(print.element);
    print.begin(this.#client, requestId, generationId);
    if (!wish && generationId) void this.#entitle(print, generationId);
    this.#blank.hidden = true;
    this.#makeRoom();
  }

  /** Keeps what has come to something; what has not is there until the page is reloaded. */
  #ended(requestId: string, { status, phase, error }: ViewState, isRestored: boolean): void {
    if (this.#isAway || status === "succeeded") return;
    const entry = this.#album.get(requestId);
    this.#album.forget(requestId);
    if (error?.code === "UNAUTHENTICATED") this.onLockedOut();
    if (!isRestored || error?.code !== "NOT_FOUND") return;
    if (phase === undefined) this.#takeDown(requestId);
    // The service has lost it under our eyes, by a restart: it is begun again, as where there was no reload.
    else if (entry?.wish) this.#prints.get(requestId)?.view.retry();
  }

  /** Looks up what somebody else's print shows. */
  async #entitle(print: Print, generationId: string): Promise<void> {
    try {
      for await (const summary of this.#client.generations()) {
        if (summary.generationId === generationId) print.entitle(summary.prompt);
      }
    } catch {
      // The picture is what counts.
    }
  }

  #takeDown(requestId: string): void {
    const element = this.#prints.get(requestId)?.element;
    this.#prints.delete(requestId);
    if (!element) return;
    const neighbour = element.nextElementSibling ?? element.previousElementSibling;
    const hadFocus = element.contains(document.activeElement);
    element.remove();
    if (hadFocus) (neighbour?.querySelector<HTMLElement>(".remove") ?? document.getElementById("prompt"))?.focus();
    this.#blank.hidden = this.#prints.size > 0;
  }

  #makeRoom(): void {
    for (const [requestId, { view }] of [...this.#prints].slice(0, -MOST_PRINTS)) {
      if (!isOver(view.state)) continue;
      this.#album.forget(requestId);
      this.#takeDown(requestId);
    }
  }
}
