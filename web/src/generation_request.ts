/** What one print is asked to be, and the attributes of `<calotype-view>` that say so. */

import type { GenerateOptions } from "calotype";

export interface Wish {
  readonly prompt: string;
  readonly options: GenerateOptions;
}

/** Returns `count` wishes: with a seed each its own, counted up from it; without, the service draws them. */
export function copies(wish: Wish, count: number): readonly Wish[] {
  const { seed } = wish.options;
  return Array.from({ length: count }, (_, at) =>
    seed === undefined
      ? wish
      : { ...wish, options: { ...wish.options, seed: Math.min(seed + at, Number.MAX_SAFE_INTEGER) } },
  );
}

/** The attributes for a wish; undefined ones are absent. */
export function attributes({ prompt, options }: Wish): ReadonlyMap<string, string> {
  const { preview, output } = options;
  const values: Record<string, string | number | undefined> = {
    prompt,
    "negative-prompt": options.negativePrompt,
    width: options.width,
    height: options.height,
    steps: options.steps,
    "guidance-scale": options.guidanceScale,
    seed: options.seed,
    scheduler: options.scheduler,
    "preview-every-steps": preview?.everySteps,
    "preview-max-edge": preview?.maxEdge,
    "preview-quality": preview?.quality,
    "preview-method": preview?.method,
    "output-format": output?.format,
  };
  return new Map(
    Object.entries(values).flatMap(([name, value]) => (value === undefined ? [] : [[name, String(value)]])),
  );
}
