/** Explains errors in plain language, with advice, to people who do not know status codes. */

import type { CalotypeError } from "./errors.js";

export interface Explanation {
  /** One short sentence: what happened. */
  readonly title: string;
  /** Advice: what to do about it, or why nothing needs to be done. */
  readonly advice: string;
  /** Label of a button that retries; undefined if repeating the same request cannot help. */
  readonly retry: string | undefined;
}

const RETRY = "Try again";
const RESUME = "Continue";

const BY_REASON: Readonly<Record<string, Explanation>> = {
  UNREACHABLE: {
    title: "The service does not respond.",
    advice: "It may be starting, or it may have been stopped. Check that it is running, then try again.",
    retry: RETRY,
  },
  CONNECTION_LOST: {
    title: "The connection was lost during the generation.",
    advice:
      "Reconnecting failed: the network is down, or the service was stopped. Continuing starts again with the same seed, which gives the same picture.",
    retry: RESUME,
  },
  STREAM_INCOMPLETE: {
    title: "The stream ended before the picture was finished.",
    advice: "A proxy between you and the service may have cut it off. Continuing starts again with the same seed.",
    retry: RESUME,
  },
  KEY_REQUIRED: {
    title: "This service requires an API key.",
    advice: "Ask the operator of the service for one.",
    retry: RETRY,
  },
  KEY_INVALID: {
    title: "The service does not accept this API key.",
    advice: "Check that you copied all of it. It may also have been revoked.",
    retry: RETRY,
  },
  KEY_EXPIRED: {
    title: "This API key has expired.",
    advice: "Ask the operator of the service for a new one.",
    retry: RETRY,
  },
  REQUESTS_PER_MINUTE: {
    title: "Your key has reached its limit of pictures per minute.",
    advice: "Your request is valid; try again later.",
    retry: RETRY,
  },
  PIXEL_STEPS_PER_MINUTE: {
    title: "Your key has reached its limit of work per minute.",
    advice: "Smaller pictures and fewer steps need less work.",
    retry: RETRY,
  },
  CONCURRENT_GENERATIONS: {
    title: "Your key has reached its limit of pictures at the same time.",
    advice: "Wait until one of your pictures is finished, or cancel one.",
    retry: RETRY,
  },
  QUEUE_FULL: {
    title: "The service is busy: its queue is full.",
    advice: "Your request is valid; try again later.",
    retry: RETRY,
  },
  OUT_OF_MEMORY: {
    title: "There is not enough free memory for a picture of this size.",
    advice: "Choose a smaller size, or wait until other pictures are finished.",
    retry: RETRY,
  },
  DRAINING: {
    title: "The service is shutting down.",
    advice: "It stopped before this picture was finished. Once it is back, continue with the same seed.",
    retry: RESUME,
  },
  NOT_READY: { title: "The model is still loading.", advice: "This takes a moment after a start.", retry: RETRY },
  UPSTREAM_UNAVAILABLE: {
    title: "The bridge does not reach a service.",
    advice: "The service behind it may be starting, or it may have been stopped. Try again in a moment.",
    retry: RETRY,
  },
  STATE_UNAVAILABLE: {
    title: "The service cannot use its storage.",
    advice: "Its disk may be full; the log of the service has the cause. Try again later.",
    retry: RETRY,
  },
  CONTENT_WITHHELD: {
    title: "This picture is withheld.",
    advice: "The model's safety checker rejected it. Try another prompt or seed.",
    retry: undefined,
  },
  NUMERICAL_FAILURE: {
    title: "The calculation failed: the model produced invalid numbers.",
    advice: "Another seed, another scheduler or lower guidance usually helps.",
    retry: undefined,
  },
  ENGINE_DEAD: {
    title: "The model has crashed.",
    advice: "The operator must restart the service.",
    retry: RETRY,
  },
  ENGINE_STALLED: {
    title: "The model has stopped responding.",
    advice: "The service is restarting; try again in a minute.",
    retry: RETRY,
  },
  ENGINE_CRASHED: {
    title: "This picture crashed the service more than once.",
    advice: "The service does not try it again. Choose a smaller size, or other settings.",
    retry: undefined,
  },
  DATA_LOSS: {
    title: "The stored picture is damaged.",
    advice: "You can generate it again: the same seed gives the same picture.",
    retry: RETRY,
  },
};

const BY_CODE: Partial<Record<CalotypeError["code"], Explanation>> = {
  CANCELLED: { title: "Cancelled.", advice: "The service has stopped working on this picture.", retry: RETRY },
  INVALID_ARGUMENT: {
    title: "The request is invalid.",
    advice: "Change the values listed here and try again.",
    retry: undefined,
  },
  DEADLINE_EXCEEDED: {
    title: "The request took too long.",
    advice: "Fewer steps or a smaller picture are faster.",
    retry: RETRY,
  },
  FAILED_PRECONDITION: {
    title: "This service does not support the request.",
    advice: "Choose another preview method and try again.",
    retry: undefined,
  },
  NOT_FOUND: {
    title: "The service no longer has this picture.",
    advice: "You can generate it again.",
    retry: RETRY,
  },
  PERMISSION_DENIED: {
    title: "The service does not accept requests from this page.",
    advice: "The operator must add the address of this page to the allowed origins and hosts.",
    retry: undefined,
  },
  UNAUTHENTICATED: {
    title: "The service requires authentication.",
    advice: "Sign in, or enter an API key.",
    retry: undefined,
  },
  RESOURCE_EXHAUSTED: {
    title: "The service is busy.",
    advice: "Your request is valid; try again later.",
    retry: RETRY,
  },
  UNIMPLEMENTED: {
    title: "The service does not support this call.",
    advice: "It is older than this page, or it is a different service. Reload the page.",
    retry: undefined,
  },
  UNAVAILABLE: { title: "The service is not available.", advice: "Try again in a moment.", retry: RETRY },
};

const UNEXPECTED: Explanation = {
  title: "The service failed.",
  advice: "Your request is valid; the log of the service has the cause. Trying again may help.",
  retry: RETRY,
};

/** Explains an error to people who do not know status codes. */
export function explain(error: CalotypeError): Explanation {
  return BY_REASON[error.reason] ?? BY_CODE[error.code] ?? UNEXPECTED;
}

const FIELDS: Readonly<Record<string, string>> = {
  prompt: "Prompt",
  negative_prompt: "Negative prompt",
  width_px: "Width",
  height_px: "Height",
  step_count: "Steps",
  guidance_scale: "Guidance",
  seed: "Seed",
  scheduler: "Scheduler",
  speed: "Speed",
  loras: "LoRA",
  prompt_syntax: "Weights",
  sigmas: "Sigmas",
  spacing: "Timestep spacing",
  "preview.every_steps": "Preview every … steps",
  "preview.max_edge_px": "Preview size",
  "preview.quality": "Preview quality",
  "preview.method": "Preview method",
  "output.format": "File format",
  "output.quality": "File quality",
};

/** Returns the label of a request field, as in the form of the page. */
export function fieldLabel(field: string): string {
  // Of a list, all entries have the same label, such as loras[0].scale.
  return FIELDS[field] ?? FIELDS[field.replace(/[.[].*/, "")] ?? field;
}
