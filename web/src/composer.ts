/** The form: from what people type to wishes, within what the model can do. */

import type { Model, PictureFormat, PreviewMethod } from "calotype";
import { copies, type Wish } from "./generation_request";

/** Names that the bundled model knows by heart. */
const EXAMPLES = ["red apple", "fox", "hot air balloon", "octopus", "sailboat", "rose", "owl"];

const METHODS: Readonly<Record<PreviewMethod, string>> = {
  auto: "whatever is best",
  head: "a quick sketch",
  tiny_vae: "a small decoder",
  full_vae: "the model itself",
  none: "no previews",
};

export class Composer {
  readonly #form: HTMLFormElement;
  readonly #develop: (wish: Wish) => void;
  #model: Model | undefined;

  constructor(form: HTMLFormElement, develop: (wish: Wish) => void) {
    this.#form = form;
    this.#develop = develop;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    const prompt = this.#field("prompt") as HTMLTextAreaElement;
    prompt.addEventListener("input", () => this.#fit());
    prompt.addEventListener("keydown", (event) => {
      // Enter develops, Shift+Enter makes a new line; while an input method composes, Enter is its own.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      form.requestSubmit();
    });
    // What is wrong must be seen, also where it is folded away.
    form.addEventListener(
      "invalid",
      ({ target }) => (target as Element).closest("details")?.setAttribute("open", ""),
      true,
    );
    for (const name of ["width", "height"]) this.#field(name).addEventListener("input", () => this.#checkSize());
  }

  /** Fills the form with the model's defaults and limits, and takes wishes from now on. */
  open(model: Model): void {
    this.#model = model;
    const prompt = this.#field("prompt") as HTMLTextAreaElement;
    prompt.maxLength = model.maxPromptChars;
    this.#limit("width", model.width, model.sizeMultiple, undefined, model.sizeMultiple);
    this.#limit("height", model.height, model.sizeMultiple, undefined, model.sizeMultiple);
    this.#limit("steps", model.steps, 1, model.maxSteps);
    this.#offer("guidance", model.guidanceScale !== undefined);
    if (model.guidanceScale !== undefined) this.#set("guidanceScale", String(Number(model.guidanceScale.toFixed(4))));
    this.#offer("avoid", model.takesNegativePrompt);
    this.#choose(
      "scheduler",
      model.schedulers.map((name) => [name, name.replace(/Scheduler$/, "")]),
      model.scheduler,
    );
    this.#openPreviews(model);
    for (const control of this.#form.querySelectorAll<HTMLFieldSetElement | HTMLButtonElement>("#settings, #develop")) {
      control.disabled = false;
    }
    if (model.name === "bundled") this.#showExamples();
  }

  /** Takes a wish over into the form and develops it again. */
  again(wish: Wish): void {
    const { options } = wish;
    this.#set("prompt", wish.prompt);
    this.#fit();
    const values = { ...options, ...options.preview, format: options.output?.format };
    for (const name of [
      "seed",
      "width",
      "height",
      "steps",
      "guidanceScale",
      "negativePrompt",
      "scheduler",
      "format",
    ] as const) {
      if (values[name] !== undefined) this.#set(name, String(values[name]));
    }
    this.#develop(wish);
  }

  /** A server that tells nothing of its previews decides alone. */
  #openPreviews({ preview, previewMethods, maxPreviewEdge, maxPreviewQuality }: Model): void {
    for (const label of this.#form.querySelectorAll(".preview")) this.#offer(label.id, preview !== undefined);
    if (!preview) return;
    this.#limit("everySteps", preview.everySteps, 1, 1000);
    this.#limit("maxEdge", preview.maxEdge, 16, maxPreviewEdge);
    this.#limit("quality", preview.quality, 1, maxPreviewQuality);
    const methods: PreviewMethod[] = ["auto", ...previewMethods, "none"];
    this.#choose(
      "method",
      methods.map((method) => [method, METHODS[method]]),
      preview.method,
    );
  }

  #submit(): void {
    const text = (name: string) => this.#field(name).value.trim();
    const number = (name: string) =>
      text(name) === "" || this.#field(name).closest("[hidden]") ? undefined : Number(text(name));
    const model = this.#model;
    if (!model || text("prompt") === "") return;
    const negativePrompt = model.takesNegativePrompt && text("negativePrompt") ? text("negativePrompt") : undefined;
    const wish: Wish = {
      prompt: text("prompt"),
      options: {
        negativePrompt,
        width: number("width"),
        height: number("height"),
        steps: number("steps"),
        guidanceScale: number("guidanceScale"),
        seed: number("seed"),
        scheduler: text("scheduler") || undefined,
        preview: model.preview && {
          everySteps: number("everySteps"),
          maxEdge: number("maxEdge"),
          quality: number("quality"),
          method: text("method") as PreviewMethod,
        },
        output: { format: text("format") as PictureFormat },
      },
    };
    for (const copy of copies(wish, number("count") ?? 1)) this.#develop(copy);
  }

  #checkSize(): void {
    const width = this.#field("width") as HTMLInputElement;
    const height = this.#field("height") as HTMLInputElement;
    const most = this.#model?.maxPixels ?? Number.POSITIVE_INFINITY;
    const tooLarge = width.valueAsNumber * height.valueAsNumber > most;
    height.setCustomValidity(tooLarge ? `Width times height may be at most ${most.toLocaleString("en")} pixels.` : "");
  }

  #showExamples(): void {
    const place = this.#form.querySelector<HTMLElement>("#examples");
    if (!place) return;
    for (const example of EXAMPLES) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = example;
      button.addEventListener("click", () => {
        this.#set("prompt", example);
        this.#fit();
        this.#form.requestSubmit();
      });
      place.append(button);
    }
    place.hidden = false;
  }

  /** Makes the prompt's field as high as its text. */
  #fit(): void {
    const field = this.#field("prompt");
    field.style.height = "auto";
    field.style.height = `${field.scrollHeight}px`;
  }

  #limit(name: string, value: number, min: number, max?: number, step = 1): void {
    const input = this.#field(name) as HTMLInputElement;
    input.min = String(min);
    if (max) input.max = String(max);
    input.step = String(step);
    input.value = String(value);
  }

  #choose(name: string, options: readonly (readonly [string, string])[], value: string): void {
    const select = this.#field(name) as HTMLSelectElement;
    select.replaceChildren(...options.map(([key, label]) => new Option(label, key)));
    select.value = value;
  }

  /** Shows a field that the model has a use for; one that it has none for is neither shown nor checked. */
  #offer(id: string, offered: boolean): void {
    const label = this.#form.querySelector<HTMLElement>(`#${id}`);
    if (!label) return;
    label.hidden = !offered;
    for (const input of label.querySelectorAll<HTMLInputElement | HTMLSelectElement>("input, select"))
      input.disabled = !offered;
  }

  #set(name: string, value: string): void {
    this.#field(name).value = value;
  }

  #field(name: string): HTMLInputElement | HTMLTextAreaElement | HTMLSelectElement {
    return this.#form.elements.namedItem(name) as HTMLInputElement | HTMLTextAreaElement | HTMLSelectElement;
  }
}
