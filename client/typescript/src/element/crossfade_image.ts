/** Where the picture develops: each new one fades in over the one before. Nothing but opacity is animated. */

import type { Picture } from "../types.js";
import { h } from "./dom.js";
import type { ObjectUrls } from "./object_urls.js";

const SHORTEST_FADE_MS = 60;
const LONGEST_FADE_MS = 450;

export class Plate {
  readonly element: HTMLElement;
  readonly #urls: ObjectUrls;
  readonly #still = matchMedia("(prefers-reduced-motion: reduce)");
  #asked = 0;
  #shown = 0;

  constructor(urls: ObjectUrls) {
    this.#urls = urls;
    this.element = h("div", { part: "plate", className: "plate", role: "img" });
  }

  /**
   * Shows a picture as soon as it is decoded, unless a later one was quicker.
   *
   * @param fade - Milliseconds that the change may take; 0 for at once.
   * @returns Whether it was shown.
   */
  async show(picture: Picture, fade: number): Promise<boolean> {
    this.#asked += 1;
    const order = this.#asked;
    const image = h("img", { alt: "", src: this.#urls.of(picture), className: "layer" });
    try {
      await image.decode();
    } catch {
      // Released meanwhile, or not a picture: what is there stays.
      return false;
    }
    if (order < this.#shown) return false;
    this.#shown = order;
    this.element.append(image);
    if (fade === 0 || this.#still.matches || document.hidden) this.#removeBelow(image);
    else {
      const duration = Math.min(Math.max(fade, SHORTEST_FADE_MS), LONGEST_FADE_MS);
      const fading = image.animate({ opacity: [0, 1] }, { duration, easing: "ease-out" });
      fading.onfinish = () => this.#removeBelow(image);
    }
    return true;
  }

  /** Takes every picture away, and those that are still being decoded. */
  clear(): void {
    this.#asked += 1;
    this.#shown = this.#asked;
    this.element.replaceChildren();
  }

  #removeBelow(image: HTMLImageElement): void {
    while (image.previousElementSibling) image.previousElementSibling.remove();
  }
}
