/** Converts between protobuf messages and the objects of the API. */

import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { type Duration, durationFromMs, durationMs, timestampDate } from "@bufbuild/protobuf/wkt";
import { CalotypeError, type Violation } from "./errors.js";
import * as wire from "./gen/calotype/v1/calotype_pb.js";
import type * as types from "./types.js";

const PHASES: Partial<Record<wire.Phase, types.Phase>> = {
  [wire.Phase.QUEUED]: "queued",
  [wire.Phase.ENCODING_PROMPT]: "encoding_prompt",
  [wire.Phase.DENOISING]: "denoising",
  [wire.Phase.DECODING]: "decoding",
  [wire.Phase.SUCCEEDED]: "succeeded",
  [wire.Phase.FAILED]: "failed",
  [wire.Phase.CANCELLED]: "cancelled",
};

const FORMATS: Record<types.PictureFormat, wire.ImageFormat> = {
  jpeg: wire.ImageFormat.JPEG,
  png: wire.ImageFormat.PNG,
  webp: wire.ImageFormat.WEBP,
};

const METHODS: Record<types.PreviewMethod, wire.PreviewMethod> = {
  auto: wire.PreviewMethod.AUTO,
  head: wire.PreviewMethod.HEAD,
  tiny_vae: wire.PreviewMethod.TINY_VAE,
  full_vae: wire.PreviewMethod.FULL_VAE,
  none: wire.PreviewMethod.NONE,
};

const POLICIES: Record<NonNullable<types.GenerateOptions["onDisconnect"]>, wire.DisconnectPolicy> = {
  cancel: wire.DisconnectPolicy.CANCEL,
  keep: wire.DisconnectPolicy.KEEP,
};

const SPEEDS: Record<NonNullable<types.GenerateOptions["speed"]>, wire.Speed> = {
  exact: wire.Speed.EXACT,
  fast: wire.Speed.FAST,
};

const SYNTAXES: Record<types.PromptSyntax, wire.PromptSyntax> = {
  plain: wire.PromptSyntax.PLAIN,
  weighted: wire.PromptSyntax.WEIGHTED,
};

const SIGMAS: Record<types.Sigmas, wire.Sigmas> = {
  karras: wire.Sigmas.KARRAS,
  exponential: wire.Sigmas.EXPONENTIAL,
  beta: wire.Sigmas.BETA,
};

const SPACINGS: Record<types.TimestepSpacing, wire.TimestepSpacing> = {
  leading: wire.TimestepSpacing.LEADING,
  trailing: wire.TimestepSpacing.TRAILING,
  linspace: wire.TimestepSpacing.LINSPACE,
};

/** Validates that numbers can be sent, and collects the violations. */
class NumberValidator {
  readonly #violations: Violation[] = [];

  whole(field: string, value: number | undefined, limit = 2 ** 31 - 1): number | undefined {
    return this.#check(field, value, Number.isInteger(value) && Math.abs(value ?? 0) <= limit, "a whole number");
  }

  finite(field: string, value: number | undefined): number | undefined {
    return this.#check(field, value, Number.isFinite(value), "a number");
  }

  duration(field: string, value: number | undefined): Duration | undefined {
    const seconds = this.finite(field, value);
    return seconds === undefined ? undefined : durationFromMs(seconds * 1000);
  }

  throwIfInvalid(): void {
    if (this.#violations.length === 0) return;
    const text = this.#violations.map(({ field, description }) => `${field} ${description}`).join("; ");
    throw new CalotypeError("INVALID_ARGUMENT", text, { reason: "INVALID_REQUEST", violations: this.#violations });
  }

  #check(field: string, value: number | undefined, isValid: boolean, expected: string): number | undefined {
    if (value === undefined || isValid) return value;
    this.#violations.push({ field, description: `is ${value}, must be ${expected}` });
    return undefined;
  }
}

/**
 * Builds a request to generate.
 *
 * @throws CalotypeError - INVALID_ARGUMENT with every number that cannot be sent. The server checks all other limits.
 */
export function requestToWire(prompt: string, options: types.GenerateOptions): wire.GenerateRequest {
  const { preview, output, onDisconnect } = options;
  const numbers = new NumberValidator();
  const seed = numbers.whole("seed", options.seed, Number.MAX_SAFE_INTEGER);
  const request: MessageInitShape<typeof wire.GenerateRequestSchema> = {
    prompt,
    negativePrompt: options.negativePrompt,
    widthPx: numbers.whole("width_px", options.width),
    heightPx: numbers.whole("height_px", options.height),
    stepCount: numbers.whole("step_count", options.steps),
    guidanceScale: numbers.finite("guidance_scale", options.guidanceScale),
    seed: seed === undefined ? undefined : BigInt(seed),
    scheduler: options.scheduler,
    sigmas: options.sigmas && SIGMAS[options.sigmas],
    spacing: options.spacing && SPACINGS[options.spacing],
    loras: lorasToWire(options.loras ?? [], numbers),
    promptSyntax: options.promptSyntax && SYNTAXES[options.promptSyntax],
    speed: options.speed && SPEEDS[options.speed],
    preview: preview && previewToWire(preview, numbers),
    output: output && {
      format: output.format && FORMATS[output.format],
      quality: numbers.whole("output.quality", output.quality),
      metadata: output.metadata,
    },
    onDisconnect: onDisconnect && POLICIES[onDisconnect],
    disconnectGrace: numbers.duration("disconnect_grace", options.disconnectGrace),
    requestId: options.requestId,
    group: options.group,
  };
  numbers.throwIfInvalid();
  return create(wire.GenerateRequestSchema, request);
}

function lorasToWire(
  loras: NonNullable<types.GenerateOptions["loras"]>,
  numbers: NumberValidator,
): MessageInitShape<typeof wire.LoraSchema>[] {
  const isList = (value: typeof loras): value is readonly types.Lora[] => Array.isArray(value);
  const list = isList(loras) ? loras : Object.entries(loras).map(([name, scale]) => ({ name, scale }));
  return list.map(({ name, scale }, index) => ({ name, scale: numbers.finite(`loras[${index}].scale`, scale) }));
}

/**
 * Builds a request to watch.
 *
 * @throws CalotypeError - INVALID_ARGUMENT with every number that cannot be sent.
 */
export function watchToWire(generationId: string, options: types.WatchOptions): wire.WatchRequest {
  const numbers = new NumberValidator();
  const afterSequence = numbers.whole("after_sequence", options.afterSequence, Number.MAX_SAFE_INTEGER) ?? 0;
  const preview = options.preview && previewToWire(options.preview, numbers);
  numbers.throwIfInvalid();
  return create(wire.WatchRequestSchema, { generationId, afterSequence: BigInt(afterSequence), preview });
}

function previewToWire(
  preview: types.PreviewOptions,
  numbers: NumberValidator,
): MessageInitShape<typeof wire.PreviewOptionsSchema> {
  return {
    everySteps: numbers.whole("preview.every_steps", preview.everySteps),
    minInterval: numbers.duration("preview.min_interval", preview.minInterval),
    maxEdgePx: numbers.whole("preview.max_edge_px", preview.maxEdge),
    quality: numbers.whole("preview.quality", preview.quality),
    method: preview.method && METHODS[preview.method],
  };
}

/** Converts a message. Its image, if any, must be complete: the assembler joins chunks. */
export function progressFromWire(message: wire.Progress): types.Progress {
  return {
    generationId: message.generationId,
    sequence: Number(message.sequence),
    phase: phaseFromWire(message.phase),
    step: message.step,
    totalSteps: message.totalSteps,
    picture: pictureFromWire(message, message.image),
    queuePosition: message.queuePosition,
    remaining: seconds(message.estimatedRemaining),
    previewsDropped: message.previewsDropped,
    previewsWithdrawn: message.previewsWithdrawn,
    seed: Number(message.seed),
    warnings: message.warnings.map(({ reason, message: text }) => ({ reason, message: text })),
    finishedEarly: message.finishedEarly,
    notPersisted: message.notPersisted,
    timings: message.timings && {
      queued: seconds(message.timings.queued),
      encodingPrompt: seconds(message.timings.encodingPrompt),
      denoising: seconds(message.timings.denoising),
      decoding: seconds(message.timings.decoding),
      firstPreview: seconds(message.timings.firstPreview),
      total: seconds(message.timings.total),
      computedSteps: message.timings.computedSteps,
    },
  };
}

export function phaseFromWire(phase: wire.Phase): types.Phase {
  return PHASES[phase] ?? "unknown";
}

/** Returns the picture of a message with the file `data`; undefined if there is no file, or its format is unknown. */
export function pictureFromWire(message: wire.Progress, data: Uint8Array): types.Picture | undefined {
  const format = keyOf(FORMATS, message.imageFormat);
  if (data.length === 0 || format === undefined) return undefined;
  return {
    // Copied, so that a small preview does not keep the whole network buffer in memory.
    data: new Uint8Array(data),
    format,
    width: message.widthPx,
    height: message.heightPx,
    kind: message.imageKind === wire.ImageKind.FINAL ? "final" : "predicted",
    step: message.imageStep,
    method: keyOf(METHODS, message.previewMethod),
  };
}

export function summaryFromWire(summary: wire.GenerationSummary): types.GenerationSummary {
  return {
    generationId: summary.generationId,
    requestId: summary.requestId,
    prompt: summary.prompt,
    phase: phaseFromWire(summary.phase),
    step: summary.step,
    totalSteps: summary.totalSteps,
    seed: Number(summary.seed),
    created: summary.createTime && timestampDate(summary.createTime),
    group: summary.group,
  };
}

export function modelFromWire(model: wire.Model): types.Model {
  return {
    name: model.name,
    pipeline: model.pipeline,
    width: model.widthPx,
    height: model.heightPx,
    sizeMultiple: model.sizeMultiplePx,
    maxPixels: model.maxPixels,
    sizes: model.sizes.map(({ widthPx, heightPx }) => ({ width: widthPx, height: heightPx })),
    minPixels: model.minPixels,
    maxAspectRatio: model.maxAspectRatio || undefined,
    scalesOtherSizes: model.scalesOtherSizes,
    steps: model.stepCount,
    maxSteps: model.maxStepCount,
    guidanceScale: model.guidanceScale,
    takesNegativePrompt: model.takesNegativePrompt,
    scheduler: model.scheduler,
    schedulers: model.schedulers,
    schedulerDetails: model.schedulerDetails.map(({ name, aliases, sigmas, spacings }) => ({
      name,
      aliases,
      sigmas: keysOf(SIGMAS, sigmas),
      spacings: keysOf(SPACINGS, spacings),
    })),
    loras: model.loras.map(({ name }) => name),
    promptSyntaxes: keysOf(SYNTAXES, model.promptSyntaxes),
    fastSchedulers: model.fastSchedulers,
    maxPromptChars: model.maxPromptChars,
    maxPromptTokens: model.maxPromptTokens,
    device: model.device,
    dtype: model.dtype,
    quantization: model.quantization,
    offload: model.offload,
    accelerator: model.accelerator,
    acceleratorFallback: model.acceleratorFallback,
    serverVersion: model.serverVersion,
    previewMethods: keysOf(METHODS, model.previewMethods),
    preview: model.preview && {
      everySteps: model.preview.everySteps ?? 1,
      minInterval: seconds(model.preview.minInterval) ?? 0,
      maxEdge: model.preview.maxEdgePx ?? model.maxPreviewEdgePx,
      quality: model.preview.quality ?? model.maxPreviewQuality,
      method: keyOf(METHODS, model.preview.method) ?? "auto",
    },
    maxPreviewEdge: model.maxPreviewEdgePx,
    maxPreviewQuality: model.maxPreviewQuality,
  };
}

function seconds(duration: Duration | undefined): number | undefined {
  return duration && durationMs(duration) / 1000;
}

function keyOf<K extends string, V>(table: Record<K, V>, value: V): K | undefined {
  return (Object.keys(table) as K[]).find((key) => table[key] === value);
}

/** Returns the keys of values. Leaves out values that this client does not know, because it cannot send them. */
function keysOf<K extends string, V>(table: Record<K, V>, values: readonly V[]): K[] {
  return values.map((value) => keyOf(table, value)).filter((key) => key !== undefined);
}
