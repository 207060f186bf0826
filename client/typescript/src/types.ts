/** The objects of the API: plain and readonly. Times are in seconds, sizes in pixels. */

import type { CalotypeError } from "./errors.js";

/** The stage of a generation, or how it ended. Phases never go back. */
export type Phase =
  | "queued"
  | "encoding_prompt"
  | "denoising"
  | "decoding"
  | "succeeded"
  | "failed"
  | "cancelled"
  /** A phase that this version of the client does not know. */
  | "unknown";

export type PreviewMethod = "auto" | "head" | "tiny_vae" | "full_vae" | "none";

/** How the service reads a prompt. `weighted`: parts can have weights, such as `(red:1.4)`. */
export type PromptSyntax = "plain" | "weighted";

/** Noise levels of the denoising steps. */
export type Sigmas = "karras" | "exponential" | "beta";

/** Spacing of the timesteps. */
export type TimestepSpacing = "leading" | "trailing" | "linspace";

export type PictureFormat = "jpeg" | "png" | "webp";

/** A complete image file. */
export interface Picture {
  readonly data: Uint8Array<ArrayBuffer>;
  readonly format: PictureFormat;
  readonly width: number;
  readonly height: number;
  /** `predicted`: the model's estimate of the finished picture, during denoising. */
  readonly kind: "predicted" | "final";
  /** Denoising step that the picture shows, from 1. */
  readonly step: number;
  /** How the preview was rendered; undefined for the final picture. */
  readonly method: PreviewMethod | undefined;
}

/** A warning that does not end the generation, such as PROMPT_TRUNCATED. */
export interface Notice {
  readonly reason: string;
  readonly message: string;
}

/** Seconds spent in each phase; undefined for a phase that was not reached. */
export interface Timings {
  readonly queued: number | undefined;
  readonly encodingPrompt: number | undefined;
  readonly denoising: number | undefined;
  readonly decoding: number | undefined;
  readonly firstPreview: number | undefined;
  readonly total: number | undefined;
  /** Denoising steps that the service computed: `step`, or fewer with the speed `fast`. 0 until they are complete. */
  readonly computedSteps: number;
}

/** The state of a generation and, if there is a new one, a picture. */
export interface Progress {
  readonly generationId: string;
  /** Strictly increasing. A gap means that messages were merged because the reader was slow. */
  readonly sequence: number;
  readonly phase: Phase;
  /** Completed steps, 0 to `totalSteps`. Never decreases. */
  readonly step: number;
  /** 0 until the number is known. */
  readonly totalSteps: number;
  readonly picture: Picture | undefined;
  /** 1 is the next to start; 0 if not queued. */
  readonly queuePosition: number;
  /** Estimated seconds until the final picture, including the queue; undefined before the first measurement. */
  readonly remaining: number | undefined;
  /** Previews that were due but not sent, because the reader or the encoder was slow. */
  readonly previewsDropped: number;
  /** Remove all previews of this generation from the screen: the safety checker rejects them. Never reset to false. */
  readonly previewsWithdrawn: boolean;
  /** Seed in use: from the request, or chosen at random by the server. */
  readonly seed: number;
  readonly warnings: readonly Notice[];
  /** The final picture is the estimate of `step`, because a caller ended the generation with `finish`. */
  readonly finishedEarly: boolean;
  /** A server that stores generations on disk could not store this end: after a crash, the generation may run again. */
  readonly notPersisted: boolean;
  /** Only in the last progress. */
  readonly timings: Timings | undefined;
}

/** The state of one of the caller's generations. */
export interface GenerationSummary {
  readonly generationId: string;
  /** From the request; empty if it had none. */
  readonly requestId: string;
  readonly prompt: string;
  readonly phase: Phase;
  readonly step: number;
  /** 0 until the number is known. */
  readonly totalSteps: number;
  readonly seed: number;
  /** When the server accepted the generation. */
  readonly created: Date | undefined;
  /** From the request; empty if it had none. */
  readonly group: string;
}

/** The progress of one member of a group. */
export interface MemberProgress {
  /** Index of the member, from 0. */
  readonly index: number;
  readonly progress: Progress;
}

/** A LoRA and its strength. */
export interface Lora {
  /** One of `Model.loras`. */
  readonly name: string;
  /** Factor of its weights, -10 to 10. Default: 1, the strength that it was trained with. */
  readonly scale?: number;
}

/** Appearance and frequency of previews. Defaults are in `Model.preview`. */
export interface PreviewOptions {
  /** At most one preview in this many steps, 1 to 1000. */
  readonly everySteps?: number;
  /** Minimum seconds between two previews, 0 to 60. */
  readonly minInterval?: number;
  /** Maximum length of the longer edge, 16 to `Model.maxPreviewEdge`. */
  readonly maxEdge?: number;
  /** JPEG quality, 1 to `Model.maxPreviewQuality`. */
  readonly quality?: number;
  /** One of `Model.previewMethods`, `auto` or `none`. */
  readonly method?: PreviewMethod;
}

/** The file of the final picture. */
export interface OutputOptions {
  /** Default: png. */
  readonly format?: PictureFormat;
  /** 1 to 95 for JPEG, 1 to 100 for WebP. Default: 90. The server rejects it for PNG. */
  readonly quality?: number;
  /** Whether the file contains metadata such as prompt and seed. Default: true. */
  readonly metadata?: boolean;
}

/** Options of a generation. Omitted options use the server's defaults, see `Model`. */
export interface GenerateOptions {
  readonly negativePrompt?: string;
  /** A multiple of `Model.sizeMultiple`. */
  readonly width?: number;
  /** A multiple of `Model.sizeMultiple`. */
  readonly height?: number;
  /** 1 to `Model.maxSteps`. */
  readonly steps?: number;
  /** 0 to 100. In most models, 1 or less disables guidance. */
  readonly guidanceScale?: number;
  /** 0 to 2^53 - 1. The same request with the same seed gives the same picture. Default, also for -1: random. */
  readonly seed?: number;
  /** One of `Model.schedulers`, or one of their aliases, such as "DPM++ 2M Karras". */
  readonly scheduler?: string;
  /** Noise levels of the steps, one of `Scheduler.sigmas`. Default: those of the scheduler. */
  readonly sigmas?: Sigmas;
  /** Timesteps of the steps, one of `Scheduler.spacings`. Default: that of the scheduler. */
  readonly spacing?: TimestepSpacing;
  /** LoRAs to apply, at most 8: a list, or the scale of each name. Default: none. */
  readonly loras?: readonly Lora[] | Readonly<Record<string, number>>;
  /** One of `Model.promptSyntaxes`. Default: `plain`. */
  readonly promptSyntax?: PromptSyntax;
  /**
   * `fast` computes only about half of the steps; the picture is close to that of `exact`. It needs at least 16 steps
   * and one of `Model.fastSchedulers`. Default: `exact`.
   */
  readonly speed?: "exact" | "fast";
  readonly preview?: PreviewOptions;
  readonly output?: OutputOptions;
  /**
   * Effect of the last reader's disconnect. `cancel`: it cancels the generation after
   * `disconnectGrace`. `keep`: it finishes the generation, which can be watched for a while after its end. Default:
   * leaving cancels at once, and a lost connection cancels after 10 seconds.
   */
  readonly onDisconnect?: "cancel" | "keep";
  /** With `cancel`: seconds for a reader to reconnect, 0 to 3600. */
  readonly disconnectGrace?: number;
  /**
   * Makes the call idempotent: a second call with the same id follows the first generation instead of starting another.
   * At most 128 characters of printable ASCII. Default: a random id, unless `retries` is 0.
   */
  readonly requestId?: string;
  /**
   * Makes the generation a member of this group, which `cancel` can end as a whole. At most 128 characters of printable
   * ASCII. Default: no group.
   */
  readonly group?: string;
}

/** Options of `watch`. */
export interface WatchOptions {
  /** The last `Progress.sequence` that the caller has seen. Default: 0, for all progress. */
  readonly afterSequence?: number;
  /** Previews for this reader, at most as many as the generation has. Default: the options of the generation. */
  readonly preview?: PreviewOptions;
}

/** Options of every call. */
export interface CallOptions {
  /** Leaves the call when it is aborted. `onDisconnect` decides what happens to the generation. */
  readonly signal?: AbortSignal;
  /**
   * Seconds until the call must have ended, including all waits. Default: no limit for streams; other calls wait 10
   * seconds for their answer, not counting the time in which the service loads its model.
   */
  readonly timeout?: number;
  /**
   * Seconds to wait for a service that is loading its model, or shutting down and about to be replaced. 0 fails at once.
   * Default: until `timeout`; without a timeout, 600.
   */
  readonly loadingTimeout?: number;
  /** Seconds to wait for a service that does not answer at first, for example because it was just started. Default: 0. */
  readonly waitForServer?: number;
  /** Called before each wait for another attempt. The next progress or answer means that the wait is over. */
  readonly onReconnect?: (reconnect: Reconnect) => void;
  /** Additional HTTP headers, such as `authorization`. */
  readonly headers?: HeadersInit;
}

/** Options of streams. */
export interface FollowOptions extends CallOptions {
  /**
   * Failed retries in a row after a lost connection. The client resumes the stream or, if the server no longer knows the
   * generation, starts it again with the same seed. The answers of a service that loads its model do not count. 0 disables
   * retries and all waits. Default: 10.
   */
  readonly retries?: number;
  /**
   * Seconds without a message after which the client treats the connection as lost. The service sends a message at
   * least every 10 seconds. Default: 20; `Infinity` means no limit.
   */
  readonly stallTimeout?: number;
}

/** A connection was lost, or the service is loading its model. The client will try again. */
export interface Reconnect {
  /** Number of this wait among those for the same reason since the last progress, from 1. */
  readonly attempt: number;
  /** Seconds until the next attempt. */
  readonly delay: number;
  /** Why the last attempt failed. `isLoading(error)` is true while the service loads its model. */
  readonly error: CalotypeError;
}

/** Width and height of a picture. */
export interface Size {
  readonly width: number;
  readonly height: number;
}

/** A scheduler (sampler) that the model supports. */
export interface Scheduler {
  /** One of `Model.schedulers`. */
  readonly name: string;
  /** Familiar names of this scheduler with fixed options, such as "DPM++ 2M Karras". Requests may use them. */
  readonly aliases: readonly string[];
  readonly sigmas: readonly Sigmas[];
  readonly spacings: readonly TimestepSpacing[];
}

/** The loaded model: its capabilities and defaults. */
export interface Model {
  readonly name: string;
  /** Class name of the diffusers pipeline. */
  readonly pipeline: string;
  readonly width: number;
  readonly height: number;
  /** Width and height must be multiples of this. */
  readonly sizeMultiple: number;
  /** Largest width times height. */
  readonly maxPixels: number;
  /** Sizes that the model draws well, the default size first. If `minPixels` is 0, these are all supported sizes. */
  readonly sizes: readonly Size[];
  /** Smallest width times height of sizes that are not in `sizes`. 0 if only `sizes` are supported. */
  readonly minPixels: number;
  /** Largest ratio of the longer edge to the shorter one, for sizes that are not in `sizes`. Undefined: no limit. */
  readonly maxAspectRatio: number | undefined;
  /** Whether the service draws unsupported sizes at the nearest supported size, and scales the picture. */
  readonly scalesOtherSizes: boolean;
  readonly steps: number;
  readonly maxSteps: number;
  /** Undefined if the model does not support guidance. */
  readonly guidanceScale: number | undefined;
  readonly takesNegativePrompt: boolean;
  readonly scheduler: string;
  readonly schedulers: readonly string[];
  /** Aliases and options of each scheduler, in the order of `schedulers`. */
  readonly schedulerDetails: readonly Scheduler[];
  /** Names of the LoRAs that requests can apply, sorted. */
  readonly loras: readonly string[];
  readonly promptSyntaxes: readonly PromptSyntax[];
  /** Schedulers and aliases that support the speed `fast`, sorted; empty if the server does not offer it. */
  readonly fastSchedulers: readonly string[];
  readonly maxPromptChars: number;
  /** 0 if unknown. */
  readonly maxPromptTokens: number;
  readonly device: string;
  readonly dtype: string;
  /** Number format to which the weights are quantized, such as `int8`. Empty if they are not. */
  readonly quantization: string;
  /** How weights move between the device and the host: `model` or `group`. Empty if they stay on the device. */
  readonly offload: string;
  /** How the denoiser is computed: `none` for plain calls, or `graphs`, `compile` or `openvino`. */
  readonly accelerator: string;
  /** Why it is not the accelerator that the operator chose. Empty if it is. */
  readonly acceleratorFallback: string;
  readonly serverVersion: string;
  /** Methods that a request may choose in addition to `auto` and `none`. */
  readonly previewMethods: readonly PreviewMethod[];
  readonly preview: Required<PreviewOptions> | undefined;
  readonly maxPreviewEdge: number;
  readonly maxPreviewQuality: number;
}

/** Returns the media type of a picture's file. */
export function mediaType(picture: Picture): string {
  return `image/${picture.format}`;
}

/** Whether this phase is the last one of a generation. */
export function isEnd(phase: Phase): phase is "succeeded" | "failed" | "cancelled" {
  return phase === "succeeded" || phase === "failed" || phase === "cancelled";
}
