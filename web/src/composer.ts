/** The form: turns user input into requests, within the limits of the model. */

import type { Model, PictureFormat, PreviewMethod } from "calotype";
import { copies, type GenerationRequest } from "./generation_request";
import { LoraFields } from "./lora_fields";
import { SizeFields } from "./size_fields";

/** Prompts that the bundled model was trained on. */
const EXAMPLES = ["red apple", "fox", "hot air balloon", "octopus", "sailboat", "rose", "owl"];

const METHODS: Readonly<Record<PreviewMethod, string>> = {
  auto: "automatic",
  head: "fast sketch",
  tiny_vae: "small decoder",
  full_vae: "full decoder",
  none: "no previews",
};

export class Composer {
  readonly #form: HTMLFormElement;
  readonly #develop: (request: GenerationRequest) => void;
  readonly #size: SizeFields;
  readonly #loras: LoraFields;
  #model: Model | undefined;

  constructor(form: HTMLFormElement, develop: (request: GenerationRequest) => void) {
    this.#form = form;
    this.#develop = develop;
    this.#size = new SizeFields(form);
    this.#loras = new LoraFields(form);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    const prompt = this.#field("prompt") as HTMLTextAreaElement;
    prompt.addEventListener("input", () => this.#fitHeight());
    prompt.addEventListener("keydown", (event) => {
      // Enter submits, Shift+Enter inserts a line break. An input method that is composing handles Enter itself.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      form.requestSubmit();
    });
    // An invalid field must be visible, so unfold the section that contains it.
    form.addEventListener(
      "invalid",
      ({ target }) => (target as Element).closest("details")?.setAttribute("open", ""),
      true,
    );
  }

  /** Fills the form with the model's defaults and limits, and enables it. */
  enable(model: Model): void {
    this.#model = model;
    const prompt = this.#field("prompt") as HTMLTextAreaElement;
    prompt.maxLength = model.maxPromptChars;
    this.#size.enable(model);
    this.#loras.enable(model.loras);
    this.#setAvailable("weighted", model.promptSyntaxes.includes("weighted"));
    this.#limit("steps", model.steps, 1, model.maxSteps);
    this.#setAvailable("guidance", model.guidanceScale !== undefined);
    if (model.guidanceScale !== undefined) this.#set("guidanceScale", String(Number(model.guidanceScale.toFixed(4))));
    this.#setAvailable("negative-prompt", model.takesNegativePrompt);
    this.#fillSchedulers(model);
    this.#fillPreviewOptions(model);
    for (const control of this.#form.querySelectorAll<HTMLFieldSetElement | HTMLButtonElement>("#settings, #develop")) {
      control.disabled = false;
    }
    if (model.name === "bundled") this.#showExamples();
  }

  /** Copies a request into the form and develops it again. */
  repeat(request: GenerationRequest): void {
    const { options } = request;
    this.#set("prompt", request.prompt);
    this.#fitHeight();
    const values = { ...options, ...options.preview, format: options.output?.format };
    for (const name of ["seed", "steps", "guidanceScale", "negativePrompt", "scheduler", "format"] as const) {
      if (values[name] !== undefined) this.#set(name, String(values[name]));
    }
    this.#size.choose(options);
    this.#loras.choose(options.loras ?? {});
    (this.#field("weighted") as HTMLInputElement).checked = options.promptSyntax === "weighted";
    this.#develop(request);
  }

  /** Lists the schedulers, and below them their familiar names with fixed options. */
  #fillSchedulers({ scheduler, schedulers, schedulerDetails }: Model): void {
    this.#choose(
      "scheduler",
      schedulers.map((name) => [name, name.replace(/Scheduler$/, "")]),
      scheduler,
    );
    // Some names are those of the classes.
    const aliases = schedulerDetails.flatMap((each) =>
      each.aliases.filter((alias) => `${alias}Scheduler` !== each.name),
    );
    if (aliases.length === 0) return;
    const group = document.createElement("optgroup");
    group.label = "Familiar names";
    group.append(...aliases.map((alias) => new Option(alias)));
    this.#field("scheduler").append(group);
  }

  /** Without `Model.preview` the server does not offer preview options. */
  #fillPreviewOptions({ preview, previewMethods, maxPreviewEdge, maxPreviewQuality }: Model): void {
    for (const label of this.#form.querySelectorAll(".preview")) this.#setAvailable(label.id, preview !== undefined);
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
    const request: GenerationRequest = {
      prompt: text("prompt"),
      options: {
        negativePrompt,
        ...this.#size.chosen,
        steps: number("steps"),
        guidanceScale: number("guidanceScale"),
        seed: number("seed"),
        scheduler: text("scheduler") || undefined,
        loras: this.#loras.chosen,
        promptSyntax: (this.#field("weighted") as HTMLInputElement).checked ? "weighted" : undefined,
        preview: model.preview && {
          everySteps: number("everySteps"),
          maxEdge: number("maxEdge"),
          quality: number("quality"),
          method: text("method") as PreviewMethod,
        },
        output: { format: text("format") as PictureFormat },
      },
    };
    for (const copy of copies(request, number("count") ?? 1)) this.#develop(copy);
  }

  #showExamples(): void {
    const container = this.#form.querySelector<HTMLElement>("#examples");
    if (!container) return;
    for (const example of EXAMPLES) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = example;
      button.addEventListener("click", () => {
        this.#set("prompt", example);
        this.#fitHeight();
        this.#form.requestSubmit();
      });
      container.append(button);
    }
    container.hidden = false;
  }

  /** Fits the height of the prompt field to its text. */
  #fitHeight(): void {
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

  /** Shows a field that the model supports. Other fields are hidden and not validated. */
  #setAvailable(id: string, available: boolean): void {
    const label = this.#form.querySelector<HTMLElement>(`#${id}`);
    if (!label) return;
    label.hidden = !available;
    for (const input of label.querySelectorAll<HTMLInputElement | HTMLSelectElement>("input, select"))
      input.disabled = !available;
  }

  #set(name: string, value: string): void {
    this.#field(name).value = value;
  }

  #field(name: string): HTMLInputElement | HTMLTextAreaElement | HTMLSelectElement {
    return this.#form.elements.namedItem(name) as HTMLInputElement | HTMLTextAreaElement | HTMLSelectElement;
  }
}
