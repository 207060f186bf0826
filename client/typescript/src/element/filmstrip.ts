/** The steps that were received, side by side; a native slider over them, so that keys and screen readers just work. */

import type { Picture } from "../types.js";
import { h, setShown } from "./dom.js";
import type { ObjectUrls } from "./object_urls.js";

/** More would be slivers. */
const MOST_THUMBNAILS = 9;

export class Filmstrip {
  readonly element: HTMLElement;
  readonly #urls: ObjectUrls;
  readonly #frames = h("div", { className: "frames", part: "frames", "aria-hidden": "true" });
  readonly #slider: HTMLInputElement;
  readonly #strip: HTMLElement;
  #drawn: readonly Picture[] = [];

  /** @param onScrub - Called with the index of the picture that is looked at. */
  constructor(urls: ObjectUrls, onScrub: (index: number) => void) {
    this.#urls = urls;
    this.#slider = h("input", { type: "range", min: "0", part: "slider", "aria-label": "Look back through the steps" });
    this.#slider.addEventListener("input", () => onScrub(this.#slider.valueAsNumber));
    this.#strip = h("div", { className: "strip" }, this.#frames, this.#slider);
    this.element = h("div", { className: "filmstrip", part: "filmstrip", hidden: true }, this.#strip);
  }

  /**
   * Draws the strip.
   *
   * @param stages - Everything there is to look at, oldest first.
   * @param index - Which one is looked at.
   * @param totalSteps - Steps of the generation, for those who cannot see the strip.
   * @param enabled - Whether one may scrub.
   */
  update(stages: readonly Picture[], index: number, totalSteps: number, enabled: boolean): void {
    // Its place is kept from the start, so that nothing jumps when the first picture comes.
    setShown(this.element, stages.length > 1 || !enabled);
    this.#draw(stages);
    this.#slider.max = String(Math.max(stages.length - 1, 0));
    setShown(this.#slider, enabled && stages.length > 1);
    if (this.#slider.valueAsNumber !== index) this.#slider.valueAsNumber = index;
    const text = stageLabel(stages[index], totalSteps);
    if (this.#slider.getAttribute("aria-valuetext") !== text) this.#slider.setAttribute("aria-valuetext", text);
  }

  /** Takes every thumbnail away. */
  clear(): void {
    this.#draw([]);
  }

  #draw(stages: readonly Picture[]): void {
    const wanted = pick(stages, MOST_THUMBNAILS);
    if (wanted.length === this.#drawn.length && wanted.every((picture, at) => picture === this.#drawn[at])) return;
    const old = new Map(this.#drawn.map((picture, at) => [picture, this.#frames.children[at]]));
    const images = wanted.map((picture) => old.get(picture) ?? h("img", { alt: "", src: this.#urls.of(picture) }));
    this.#frames.replaceChildren(...images);
    this.#strip.style.setProperty("--_frames", String(images.length));
    this.#drawn = wanted;
  }
}

/** Names a picture of a generation for people. */
export function stageLabel(picture: Picture | undefined, totalSteps: number): string {
  if (picture === undefined) return "";
  if (picture.kind === "final") return "The finished picture";
  return `Estimate at step ${picture.step} of ${totalSteps}`;
}

/** Returns `count` of `items` at even distances, the first and the last among them; all, if there are not more. */
export function pick<T>(items: readonly T[], count: number): readonly T[] {
  if (items.length <= count) return items;
  const stride = (items.length - 1) / (count - 1);
  return Array.from({ length: count }, (_, at) => items[Math.round(at * stride)] as T);
}
