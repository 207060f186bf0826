/** Calotype streams an image while a diffusion model denoises it. This is its client for browsers and Node. */

export { type Client, type ClientOptions, createClient } from "./client.js";
export type { Clock } from "./resume/clock.js";
export { CalotypeError, type StatusCode, type Violation } from "./errors.js";
export type { Generation } from "./generation.js";
export { newRequestId } from "./request_id.js";
export { Pacer } from "./pacer.js";
export { fraction, frameAt, initialState, isOver, reduce, stages, type ViewEvent, type ViewState } from "./reducer.js";
export {
  type CallOptions,
  type FollowOptions,
  type GenerateOptions,
  type GenerationSummary,
  isEnd,
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
  type Reconnect,
  type Timings,
  type WatchOptions,
} from "./types.js";
export { type Explanation, explain } from "./explanations.js";
