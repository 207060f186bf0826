/** The fields for the size of the picture: a menu of the model's sizes, and numbers for any other size. */

import type { GenerateOptions, Model, Size } from "calotype";

const OTHER = "other";

export class SizeFields {
  readonly #menu: HTMLSelectElement;
  readonly #width: HTMLInputElement;
  readonly #height: HTMLInputElement;
  #model: Model | undefined;

  constructor(form: HTMLFormElement) {
    const field = (name: string) => form.elements.namedItem(name);
    this.#menu = field("size") as HTMLSelectElement;
    this.#width = field("width") as HTMLInputElement;
    this.#height = field("height") as HTMLInputElement;
    this.#menu.addEventListener("change", () => {
      const [width, height] = this.#menu.value.split("x");
      if (width && height) this.#setNumbers({ width: Number(width), height: Number(height) });
      else this.#width.focus();
    });
    for (const input of [this.#width, this.#height]) input.addEventListener("input", () => this.#check());
  }

  /** Offers the sizes of the model. */
  enable(model: Model): void {
    this.#model = model;
    const { sizes, sizeMultiple, scalesOtherSizes } = model;
    // A menu of one size helps only if it replaces the numbers.
    setShown(this.#menu, sizes.length > 1 || (sizes.length === 1 && !this.#allowsOthers));
    this.#menu.replaceChildren(
      ...sizes.map(({ width, height }) => new Option(`${width} × ${height}`, `${width}x${height}`)),
      ...(this.#allowsOthers ? [new Option("other", OTHER)] : []),
    );
    // The service scales pictures to sizes that the model does not draw.
    const multiple = String(scalesOtherSizes ? 1 : sizeMultiple);
    for (const input of [this.#width, this.#height]) {
      input.min = multiple;
      input.step = multiple;
      setShown(input, this.#allowsOthers);
    }
    this.#setNumbers(model);
  }

  /** Sets the fields to the size of a request. */
  choose({ width, height }: GenerateOptions): void {
    if (width !== undefined && height !== undefined) this.#setNumbers({ width, height });
  }

  /** The chosen size. */
  get chosen(): Pick<GenerateOptions, "width" | "height"> {
    return { width: this.#width.valueAsNumber, height: this.#height.valueAsNumber };
  }

  get #allowsOthers(): boolean {
    const model = this.#model;
    return !model || model.minPixels > 0 || model.scalesOtherSizes || model.sizes.length === 0;
  }

  #setNumbers({ width, height }: Size): void {
    this.#width.value = String(width);
    this.#height.value = String(height);
    this.#check();
  }

  /** Selects the entry of the menu for the numbers, and reports a size that the service would reject. */
  #check(): void {
    const { valueAsNumber: width } = this.#width;
    const { valueAsNumber: height } = this.#height;
    const model = this.#model;
    const isOffered = model?.sizes.some((size) => size.width === width && size.height === height) ?? false;
    this.#menu.value = isOffered ? `${width}x${height}` : OTHER;
    const isChecked = model && !isOffered && !model.scalesOtherSizes;
    this.#height.setCustomValidity(isChecked ? problemOf({ width, height }, model) : "");
  }
}

/** Returns why a size is outside of the model's range, in one sentence; empty if it is not. */
function problemOf(
  { width, height }: Size,
  { minPixels, maxPixels, maxAspectRatio = Number.POSITIVE_INFINITY }: Model,
): string {
  const pixels = width * height;
  if (pixels > maxPixels) return `Width × height must be at most ${maxPixels.toLocaleString("en")} pixels.`;
  if (pixels < minPixels) return `Width × height must be at least ${minPixels.toLocaleString("en")} pixels.`;
  // The service sends the ratio with 24 bits.
  if (Math.max(width, height) > maxAspectRatio * Math.min(width, height) * (1 + 1e-6))
    return `The longer edge must be at most ${Number(maxAspectRatio.toFixed(2))} times the shorter one.`;
  return "";
}

/** Shows a field with its label. A hidden field is not validated. */
function setShown(field: HTMLInputElement | HTMLSelectElement, shown: boolean): void {
  const label = field.closest<HTMLElement>("label");
  if (label) label.hidden = !shown;
  field.disabled = !shown;
}
