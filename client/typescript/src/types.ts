/** What callers hold: plain, readonly objects. Times are in seconds, sizes in pixels. */

import type { CalotypeError } from "./errors.js";

/** What a generation is doing, or how it ended. It only moves forward. */
export type Phase =
  | "queued"
  | "encoding_prompt"
  | "denoising"
  | "decoding"
  | "succeeded"
  | "failed"
  | "cancelled"
  /** One that this client is too old to know. */
  | "unknown";

export type PreviewMethod = "auto" | "head" | "tiny_vae" | "full_vae" | "none";

export type PictureFormat = "jpeg" | "png" | "webp";

/** A complete image file. */
export interface Picture {
  readonly data: Uint8Array<ArrayBuffer>;
  readonly format: PictureFormat;
  readonly width: number;
  readonly height: number;
  /** `predicted`: the model's estimate of the finished picture while it is denoised. */
  readonly kind: "predicted" | "final";
  /** Denoising step that it shows, from 1. */
  readonly step: number;
  /** What drew a preview; undefined for the final picture. */
  readonly method: PreviewMethod | undefined;
}

/** What the caller should know although the generation goes on, such as PROMPT_TRUNCATED. */
export interface Notice {
  readonly reason: string;
  readonly message: string;
}

/** Seconds spent in each phase; undefined for one that was not reached. */
export interface Timings {
  readonly queued: number | undefined;
  readonly encodingPrompt: number | undefined;
  readonly denoising: number | undefined;
  readonly decoding: number | undefined;
  readonly firstPreview: number | undefined;
  readonly total: number | undefined;
}

/** Where a generation stands and, where there is a new one, a picture. */
export interface Progress {
  readonly generationId: string;
  /** Rises strictly; a gap means that messages were merged because the reader was slow. */
  readonly sequence: number;
  readonly phase: Phase;
  /** Steps done, 0 to `totalSteps`. Never falls. */
  readonly step: number;
  /** 0 until it is known. */
  readonly totalSteps: number;
  readonly picture: Picture | undefined;
  /** 1 is the next to start; 0 when not queued. */
  readonly queuePosition: number;
  /** Estimated seconds until the final picture, the queue included; undefined when nothing was measured yet. */
  readonly remaining: number | undefined;
  readonly previewsDropped: number;
  /** Take every preview of this generation from the screen: the safety checker objects. Once true it stays true. */
  readonly previewsWithdrawn: boolean;
  /** Seed in use: the one asked for, or the one drawn. */
  readonly seed: number;
  readonly warnings: readonly Notice[];
  /** The final picture is the estimate of `step`, because somebody found it good enough and called `finish`. */
  readonly finishedEarly: boolean;
  /** In the last progress only. */
  readonly timings: Timings | undefined;
}

/** Where one of the caller's generations stands. */
export interface GenerationSummary {
  readonly generationId: string;
  /** As asked for; empty when there was none. */
  readonly requestId: string;
  readonly prompt: string;
  readonly phase: Phase;
  readonly step: number;
  /** 0 until it is known. */
  readonly totalSteps: number;
  readonly seed: number;
  /** When it was accepted. */
  readonly created: Date | undefined;
}

/** How previews look and how often they come. What is left out is as in `Model.preview`. */
export interface PreviewOptions {
  /** Every nth step at most, 1 to 1000. */
  readonly everySteps?: number;
  /** Least seconds between two, 0 to 60. */
  readonly minInterval?: number;
  /** Longer edge at most, 16 to `Model.maxPreviewEdge`. */
  readonly maxEdge?: number;
  /** JPEG quality, 1 to `Model.maxPreviewQuality`. */
  readonly quality?: number;
  /** One of `Model.previewMethods`, `auto` or `none`. */
  readonly method?: PreviewMethod;
}

/** How the final picture is written. */
export interface OutputOptions {
  /** Default: png. */
  readonly format?: PictureFormat;
  /** Of JPEG, 1 to 95, or of WebP, 1 to 100. Default: 90. Refused for PNG. */
  readonly quality?: number;
  /** Whether prompt, seed and so on are written into the file. Default: true. */
  readonly metadata?: boolean;
}

/** What to generate besides the prompt. What is left out, the server chooses; see `Model`. */
export interface GenerateOptions {
  readonly negativePrompt?: string;
  /** A multiple of `Model.sizeMultiple`. */
  readonly width?: number;
  /** A multiple of `Model.sizeMultiple`. */
  readonly height?: number;
  /** 1 to `Model.maxSteps`. */
  readonly steps?: number;
  /** 0 to 100; 1 or less switches guidance off in most models. */
  readonly guidanceScale?: number;
  /** 0 to 2^53 - 1. The same request with the same seed gives the same picture. */
  readonly seed?: number;
  /** One of `Model.schedulers`. */
  readonly scheduler?: string;
  readonly preview?: PreviewOptions;
  readonly output?: OutputOptions;
  /**
   * What happens when the last reader has left: `cancel`, after `disconnectGrace`, or `keep`: it goes on to its end and
   * can be watched for a while. Default: leaving cancels at once, and a lost connection after ten seconds.
   */
  readonly onDisconnect?: "cancel" | "keep";
  /** With `cancel`: seconds in which a reader may come back, 0 to 3600. */
  readonly disconnectGrace?: number;
  /**
   * Makes the call idempotent: the same id never starts twice, but follows the first. Up to 128 characters of printable
   * ASCII. Default: drawn at random, unless `retries` is 0.
   */
  readonly requestId?: string;
}

/** How to watch a generation. */
export interface WatchOptions {
  /** The last `Progress.sequence` that is known already. Default: 0, tell all. */
  readonly afterSequence?: number;
  /** Previews for this reader; their rate is at most that of the generation. Default: as it was asked for. */
  readonly preview?: PreviewOptions;
}

/** How a call is made. */
export interface CallOptions {
  /** Leaves the call. What becomes of a generation then, says its `onDisconnect`. */
  readonly signal?: AbortSignal;
  /** Seconds until the call must have ended, waiting included. Default: no limit. */
  readonly timeout?: number;
  /** Further HTTP headers, such as `authorization`. */
  readonly headers?: HeadersInit;
}

/** How a stream is followed. */
export interface FollowOptions extends CallOptions {
  /**
   * How many times in a row, with nothing new between them, a lost connection is taken up again, by watching or, when
   * the server has forgotten everything, by generating with the same seed. 0 switches this off. Default: 12.
   */
  readonly retries?: number;
  /**
   * Seconds without a message after which the service counts as lost, which sends one every 10 s at least. Default: 20;
   * `Infinity` means without limit.
   */
  readonly stallTimeout?: number;
  /** Told before each wait for another connection. The next progress says that there is one. */
  readonly onReconnect?: (reconnect: Reconnect) => void;
}

/** A connection was lost and will be taken up again. */
export interface Reconnect {
  /** Attempts in a row, from 1. */
  readonly attempt: number;
  /** Seconds until it is made. */
  readonly delay: number;
  /** Why the last connection failed. */
  readonly error: CalotypeError;
}

/** The loaded model: what it can do and what it does by default. */
export interface Model {
  readonly name: string;
  /** Class of the diffusers pipeline. */
  readonly pipeline: string;
  readonly width: number;
  readonly height: number;
  /** Both sides are multiples of this. */
  readonly sizeMultiple: number;
  /** Largest width times height. */
  readonly maxPixels: number;
  readonly steps: number;
  readonly maxSteps: number;
  /** Undefined when the model takes none. */
  readonly guidanceScale: number | undefined;
  readonly takesNegativePrompt: boolean;
  readonly scheduler: string;
  readonly schedulers: readonly string[];
  readonly maxPromptChars: number;
  /** 0 when unknown. */
  readonly maxPromptTokens: number;
  readonly device: string;
  readonly dtype: string;
  readonly serverVersion: string;
  /** Methods that a request may name besides `auto` and `none`. */
  readonly previewMethods: readonly PreviewMethod[];
  readonly preview: Required<PreviewOptions> | undefined;
  readonly maxPreviewEdge: number;
  readonly maxPreviewQuality: number;
}

/** Media type of a picture's file. */
export function mediaType(picture: Picture): string {
  return `image/${picture.format}`;
}

/** Whether nothing more comes after this phase. */
export function isEnd(phase: Phase): phase is "succeeded" | "failed" | "cancelled" {
  return phase === "succeeded" || phase === "failed" || phase === "cancelled";
}
