/** The prints, newest first, each a `<calotype-view>`. */

import { type Client, isOver } from "calotype";
import type { CalotypeView } from "calotype/element";
import { attributes, type Wish } from "./wish";

/** Finished prints beyond this many make room: each keeps its pictures in memory. */
const MOST_PRINTS = 60;

export class Gallery {
  /** Called when somebody wants a print again, with its seed. */
  onAgain: (wish: Wish) => void = () => {};
  readonly #place: HTMLElement;
  readonly #template: HTMLTemplateElement;
  readonly #blank: HTMLElement;
  readonly #client: Client;

  constructor(place: HTMLElement, template: HTMLTemplateElement, blank: HTMLElement, client: Client) {
    this.#place = place;
    this.#template = template;
    this.#blank = blank;
    this.#client = client;
  }

  /** Hangs up a print and begins to develop it. */
  develop(wish: Wish): void {
    const print = this.#template.content.firstElementChild?.cloneNode(true) as HTMLElement;
    const [caption, view, seed, again, remove] = ["h2", "calotype-view", ".seed", ".again", ".remove"].map((selector) =>
      print.querySelector<HTMLElement>(selector),
    ) as [HTMLElement, CalotypeView, HTMLElement, HTMLElement, HTMLElement];
    caption.textContent = wish.prompt;
    remove.ariaLabel = `Remove: ${wish.prompt}`;
    for (const [name, value] of attributes(wish)) view.setAttribute(name, value);
    view.addEventListener("calotype-state", ({ detail }) => {
      if (detail.seed !== undefined && seed.textContent === "") seed.textContent = `Seed ${detail.seed}`;
      again.hidden = detail.status !== "succeeded";
    });
    again.addEventListener("click", () => {
      this.onAgain({ ...wish, options: { ...wish.options, seed: view.state.seed } });
    });
    remove.addEventListener("click", () => this.#remove(print));

    // Cloned from a template, it is upgraded when it enters the document: only then does it take a client.
    this.#place.prepend(print);
    view.client = this.#client;
    view.start();
    this.#blank.hidden = true;
    this.#makeRoom();
  }

  /** Leaves every generation that is under way. */
  cancelAll(): void {
    for (const view of this.#place.querySelectorAll("calotype-view")) view.cancel();
  }

  #remove(print: HTMLElement): void {
    const neighbour = print.nextElementSibling ?? print.previousElementSibling;
    print.remove();
    (neighbour?.querySelector<HTMLElement>(".remove") ?? document.querySelector<HTMLElement>("#prompt"))?.focus();
    this.#blank.hidden = this.#place.childElementCount > 0;
  }

  #makeRoom(): void {
    for (const print of [...this.#place.children].slice(MOST_PRINTS)) {
      const view = print.querySelector("calotype-view");
      if (view && isOver(view.state)) print.remove();
    }
  }
}
