/** Shows the newest picture; each one fades in over the one before. Only the opacity is animated. */

import type { Picture } from "../types.js";
import { h } from "./dom.js";
import type { ObjectUrls } from "./object_urls.js";

const MIN_FADE_MS = 60;
const MAX_FADE_MS = 450;

export class CrossfadeImage {
  readonly element: HTMLElement;
  readonly #urls: ObjectUrls;
  readonly #reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");
  #lastRequest = 0;
  #lastShown = 0;

  constructor(urls: ObjectUrls) {
    this.#urls = urls;
    this.element = h("div", { part: "picture", className: "picture", role: "img" });
  }

  /**
   * Shows a picture as soon as it is decoded, unless a later picture was decoded first.
   *
   * @param fade - Duration of the fade in milliseconds; 0 for none.
   * @returns Whether the picture was shown.
   */
  async show(picture: Picture, fade: number): Promise<boolean> {
    this.#lastRequest += 1;
    const request = this.#lastRequest;
    const image = h("img", { alt: "", src: this.#urls.of(picture), className: "layer" });
    try {
      await image.decode();
    } catch {
      // The URL was released in the meantime, or the file is not a picture: keep the current picture.
      return false;
    }
    if (request < this.#lastShown) return false;
    this.#lastShown = request;
    this.element.append(image);
    if (fade === 0 || this.#reducedMotion.matches || document.hidden) this.#removeBelow(image);
    else {
      const duration = Math.min(Math.max(fade, MIN_FADE_MS), MAX_FADE_MS);
      const animation = image.animate({ opacity: [0, 1] }, { duration, easing: "ease-out" });
      animation.onfinish = () => this.#removeBelow(image);
    }
    return true;
  }

  /** Removes all pictures, including those that are still being decoded. */
  clear(): void {
    this.#lastRequest += 1;
    this.#lastShown = this.#lastRequest;
    this.element.replaceChildren();
  }

  #removeBelow(image: HTMLImageElement): void {
    while (image.previousElementSibling) image.previousElementSibling.remove();
  }
}
