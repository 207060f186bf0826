/** Thumbnails of the received steps, with a native slider on top that supports the keyboard and screen readers. */

import type { Picture } from "../types.js";
import { h, setShown } from "./dom.js";
import type { ObjectUrls } from "./object_urls.js";

/** More thumbnails would be too narrow. */
const MAX_THUMBNAILS = 9;

export class Filmstrip {
  readonly element: HTMLElement;
  readonly #urls: ObjectUrls;
  readonly #frames = h("div", { className: "frames", part: "frames", "aria-hidden": "true" });
  readonly #slider: HTMLInputElement;
  readonly #strip: HTMLElement;
  #shown: readonly Picture[] = [];

  /** @param onScrub - Called with the index of the picture that the user selects. */
  constructor(urls: ObjectUrls, onScrub: (index: number) => void) {
    this.#urls = urls;
    this.#slider = h("input", { type: "range", min: "0", part: "slider", "aria-label": "Browse the steps" });
    this.#slider.addEventListener("input", () => onScrub(this.#slider.valueAsNumber));
    this.#strip = h("div", { className: "strip" }, this.#frames, this.#slider);
    this.element = h("div", { className: "filmstrip", part: "filmstrip", hidden: true }, this.#strip);
  }

  /**
   * Draws the strip.
   *
   * @param stages - All pictures, oldest first.
   * @param index - The selected picture.
   * @param totalSteps - Steps of the generation, for the text that screen readers announce.
   * @param enabled - Whether the user can select a picture.
   */
  update(stages: readonly Picture[], index: number, totalSteps: number, enabled: boolean): void {
    // The space is reserved from the start, so that the layout does not shift at the first picture.
    setShown(this.element, stages.length > 1 || !enabled);
    this.#draw(stages);
    this.#slider.max = String(Math.max(stages.length - 1, 0));
    setShown(this.#slider, enabled && stages.length > 1);
    if (this.#slider.valueAsNumber !== index) this.#slider.valueAsNumber = index;
    const text = stageLabel(stages[index], totalSteps);
    if (this.#slider.getAttribute("aria-valuetext") !== text) this.#slider.setAttribute("aria-valuetext", text);
  }

  /** Removes all thumbnails. */
  clear(): void {
    this.#draw([]);
  }

  #draw(stages: readonly Picture[]): void {
    const wanted = sample(stages, MAX_THUMBNAILS);
    if (wanted.length === this.#shown.length && wanted.every((picture, index) => picture === this.#shown[index]))
      return;
    const old = new Map(this.#shown.map((picture, index) => [picture, this.#frames.children[index]]));
    const images = wanted.map((picture) => old.get(picture) ?? h("img", { alt: "", src: this.#urls.of(picture) }));
    this.#frames.replaceChildren(...images);
    this.#strip.style.setProperty("--_frames", String(images.length));
    this.#shown = wanted;
  }
}

/** Returns the name of a picture of a generation, to display. */
export function stageLabel(picture: Picture | undefined, totalSteps: number): string {
  if (picture === undefined) return "";
  if (picture.kind === "final") return "The finished picture";
  return `Estimate at step ${picture.step} of ${totalSteps}`;
}

/** Returns at most `count` of `items` at even distances, including the first and the last. */
export function sample<T>(items: readonly T[], count: number): readonly T[] {
  if (items.length <= count) return items;
  const stride = (items.length - 1) / (count - 1);
  return Array.from({ length: count }, (_, index) => items[Math.round(index * stride)] as T);
}
