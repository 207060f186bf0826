/** Reads the options of a generation from the attributes of the element. */

import type { GenerateOptions, Lora, PictureFormat, PreviewMethod, PreviewOptions } from "../types.js";

type Mutable<T> = { -readonly [K in keyof T]: T[K] };

/** Reads the attributes. An invalid number becomes NaN, which the client rejects with the name of the field. */
export function optionsOf(element: Element): GenerateOptions {
  const text = (name: string) => element.getAttribute(name) || undefined;
  const number = (name: string) => {
    const value = text(name);
    return value === undefined ? undefined : Number(value);
  };
  const options = defined<GenerateOptions>({
    negativePrompt: text("negative-prompt"),
    width: number("width"),
    height: number("height"),
    steps: number("steps"),
    guidanceScale: number("guidance-scale"),
    seed: number("seed"),
    scheduler: text("scheduler"),
    sigmas: text("sigmas") as GenerateOptions["sigmas"],
    spacing: text("spacing") as GenerateOptions["spacing"],
    loras: lorasOf(text("loras")),
    promptSyntax: text("prompt-syntax") as GenerateOptions["promptSyntax"],
    group: text("group"),
    speed: text("speed") as GenerateOptions["speed"],
    onDisconnect: text("on-disconnect") as GenerateOptions["onDisconnect"],
    disconnectGrace: number("disconnect-grace"),
  });
  const preview = defined<PreviewOptions>({
    everySteps: number("preview-every-steps"),
    minInterval: number("preview-min-interval"),
    maxEdge: number("preview-max-edge"),
    quality: number("preview-quality"),
    method: text("preview-method") as PreviewMethod | undefined,
  });
  if (Object.keys(preview).length > 0) options.preview = preview;
  const format = text("output-format") as PictureFormat | undefined;
  const quality = number("output-quality");
  if (format || quality !== undefined) options.output = defined({ format, quality });
  return options;
}

/** Reads LoRAs such as "pixel-art:0.8, sharp". Everything up to the last colon is the name, if a number follows it. */
function lorasOf(text: string | undefined): Lora[] | undefined {
  return text?.split(",").map((part) => {
    const [, name = "", scale] = /^(.*?)(?::\s*([-+.\d]+))?$/s.exec(part.trim()) ?? [];
    return scale === undefined ? { name } : { name, scale: Number(scale) };
  });
}

function defined<T>(values: { [K in keyof T]: T[K] | undefined }): Mutable<T> {
  return Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined)) as Mutable<T>;
}

/** Returns a file name for a finished picture, such as `a-red-apple-42.png`. */
export function fileName(prompt: string, seed: number | undefined, format: PictureFormat): string {
  const words = prompt
    .normalize("NFKC")
    .toLowerCase()
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .slice(0, 60)
    .replace(/^-+|-+$/g, "");
  return `${[words || "calotype", seed].filter((part) => part !== undefined).join("-")}.${format === "jpeg" ? "jpg" : format}`;
}
