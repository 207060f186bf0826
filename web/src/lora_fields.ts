/** The fields for LoRAs: one number for each, its strength. */

import type { GenerateOptions } from "calotype";

export class LoraFields {
  readonly #section: HTMLFieldSetElement;
  readonly #fields = new Map<string, HTMLInputElement>();

  constructor(form: HTMLFormElement) {
    this.#section = form.querySelector("#loras") as HTMLFieldSetElement;
  }

  /** Offers these LoRAs. */
  enable(names: readonly string[]): void {
    this.#fields.clear();
    for (const name of names) {
      const input = document.createElement("input");
      Object.assign(input, { type: "number", min: "-10", max: "10", step: "any", placeholder: "off" });
      this.#fields.set(name, input);
    }
    const labels = [...this.#fields].map(([name, input]) => {
      const label = document.createElement("label");
      label.append(name, input);
      return label;
    });
    this.#section.querySelector("div")?.replaceChildren(...labels);
    this.#section.hidden = names.length === 0;
  }

  /** Sets the fields to the LoRAs of a request. */
  choose(loras: NonNullable<GenerateOptions["loras"]>): void {
    const scales = new Map<string, number>(
      Array.isArray(loras) ? loras.map(({ name, scale }) => [name, scale ?? 1]) : Object.entries(loras),
    );
    for (const [name, input] of this.#fields) input.value = String(scales.get(name) ?? "");
  }

  /** The LoRAs with a strength; undefined if there are none. */
  get chosen(): GenerateOptions["loras"] {
    const set = [...this.#fields].filter(([, input]) => input.value.trim() !== "");
    return set.length === 0 ? undefined : set.map(([name, input]) => ({ name, scale: input.valueAsNumber }));
  }
}
