/** The request behind a print, and the attributes of `<calotype-view>` for it. */

import type { GenerateOptions } from "calotype";

export interface GenerationRequest {
  readonly prompt: string;
  readonly options: GenerateOptions;
}

/** Returns `count` copies. If the request has a seed, the seeds count up from it; else the service chooses each. */
export function copies(request: GenerationRequest, count: number): readonly GenerationRequest[] {
  const { seed } = request.options;
  return Array.from({ length: count }, (_, index) =>
    seed === undefined
      ? request
      : { ...request, options: { ...request.options, seed: Math.min(seed + index, Number.MAX_SAFE_INTEGER) } },
  );
}

/** Returns the attributes for a request, without undefined ones. LoRAs are passed to `start`: their names are free. */
export function attributes({ prompt, options }: GenerationRequest): ReadonlyMap<string, string> {
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
    "prompt-syntax": options.promptSyntax,
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
