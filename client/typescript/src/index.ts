/** The client of Calotype for browsers and Node. Calotype streams an image while a diffusion model denoises it. */

export { type Client, type ClientOptions, createClient } from "./client.js";
export { CalotypeError, type StatusCode, type Violation } from "./errors.js";
export { type Explanation, explain } from "./explanations.js";
export type { Generation } from "./generation.js";
export type { GenerationGroup } from "./group.js";
export { Pacer } from "./pacer.js";
export { fraction, frameAt, initialState, isOver, reduce, stages, type ViewEvent, type ViewState } from "./reducer.js";
export { newRequestId } from "./request_id.js";
export type { Clock } from "./resume/clock.js";
export { isLoading } from "./resume/waits.js";
export {
  type CallOptions,
  type FollowOptions,
  type GenerateOptions,
  type GenerationSummary,
  isEnd,
  type Lora,
  type MemberProgress,
  type Model,
  mediaType,
  type Notice,
  type OutputOptions,
  type Phase,
  type Picture,
  type PictureFormat,
  type PreviewMethod,
  type PreviewOptions,
  type Progress,
  type PromptSyntax,
  type Reconnect,
  type Scheduler,
  type Sigmas,
  type Size,
  type TimestepSpacing,
  type Timings,
  type WatchOptions,
} from "./types.js";
