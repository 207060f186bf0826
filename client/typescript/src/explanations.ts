/** Errors in plain words, with what to do. For people who never heard of a status code. */

import type { CalotypeError } from "./errors.js";

export interface Explanation {
  /** What happened, one short sentence. */
  readonly title: string;
  /** What to do about it, or why there is nothing to do. */
  readonly advice: string;
  /** What a button that tries again should say; undefined when trying again as it is cannot help. */
  readonly retry: string | undefined;
}

const AGAIN = "Try again";

const BY_REASON: Readonly<Record<string, Explanation>> = {
  UNREACHABLE: {
    title: "The service does not answer.",
    advice: "It may be starting, or it may have been stopped. Check that it runs, then try again.",
    retry: AGAIN,
  },
  CONNECTION_LOST: {
    title: "The connection was lost while the picture was forming.",
    advice:
      "Reconnecting did not help: the network is down, or the service was stopped. Going on begins again with the same seed, so you get the same picture.",
    retry: "Go on",
  },
  STREAM_INCOMPLETE: {
    title: "The stream broke off before the picture was finished.",
    advice: "Something between you and the service cut it short. Going on begins again with the same seed.",
    retry: "Go on",
  },
  KEY_REQUIRED: {
    title: "This service asks for a key.",
    advice: "Whoever runs it has one for you.",
    retry: AGAIN,
  },
  KEY_INVALID: {
    title: "The service does not know this key.",
    advice: "Check that all of it was copied; it may also have been withdrawn.",
    retry: AGAIN,
  },
  KEY_EXPIRED: {
    title: "This key has expired.",
    advice: "Whoever runs the service can give you another.",
    retry: AGAIN,
  },
  REQUESTS_PER_MINUTE: {
    title: "Your key allows no more pictures in this minute.",
    advice: "Nothing is wrong with your request.",
    retry: AGAIN,
  },
  PIXEL_STEPS_PER_MINUTE: {
    title: "Your key allows no more work in this minute.",
    advice: "Smaller pictures or fewer steps use up less of it.",
    retry: AGAIN,
  },
  CONCURRENT_GENERATIONS: {
    title: "Your key allows no more pictures at once.",
    advice: "Wait until one of yours is done, or cancel one.",
    retry: AGAIN,
  },
  QUEUE_FULL: {
    title: "The service is busy: its queue is full.",
    advice: "Nothing is wrong with your request.",
    retry: AGAIN,
  },
  OUT_OF_MEMORY: {
    title: "The picture is too large for the memory that is free.",
    advice: "Choose a smaller size, or wait until other pictures are done.",
    retry: AGAIN,
  },
  DRAINING: {
    title: "The service is shutting down.",
    advice: "It stopped before this picture was finished. When it is back, going on begins again with the same seed.",
    retry: "Go on",
  },
  NOT_READY: { title: "The model is still loading.", advice: "This takes a moment after a start.", retry: AGAIN },
  CONTENT_WITHHELD: {
    title: "This picture is withheld.",
    advice: "The model's safety checker objects to it. Another prompt or seed may give one that can be shown.",
    retry: undefined,
  },
  NUMERICAL_FAILURE: {
    title: "The model lost its way: the numbers became meaningless.",
    advice: "Another seed, scheduler or lower guidance usually helps.",
    retry: undefined,
  },
  ENGINE_DEAD: {
    title: "The model has crashed.",
    advice: "The service must be restarted by whoever runs it.",
    retry: AGAIN,
  },
  ENGINE_STALLED: {
    title: "The model has stopped answering.",
    advice: "The service is being started anew; try again in a minute.",
    retry: AGAIN,
  },
};

const BY_CODE: Partial<Record<CalotypeError["code"], Explanation>> = {
  CANCELLED: { title: "Cancelled.", advice: "Nobody works on this picture any more.", retry: AGAIN },
  INVALID_ARGUMENT: {
    title: "The service cannot make this picture as asked.",
    advice: "Change what is named here and try again.",
    retry: undefined,
  },
  DEADLINE_EXCEEDED: {
    title: "It took too long.",
    advice: "Fewer steps or a smaller picture are quicker.",
    retry: AGAIN,
  },
  FAILED_PRECONDITION: {
    title: "This service is not set up for that.",
    advice: "Choose another kind of preview and try again.",
    retry: undefined,
  },
  NOT_FOUND: { title: "The service no longer knows this picture.", advice: "Begin it anew.", retry: AGAIN },
  PERMISSION_DENIED: {
    title: "The service does not accept calls from this page.",
    advice: "Whoever runs it must add this page's address to its list of allowed origins and hosts.",
    retry: undefined,
  },
  UNAUTHENTICATED: { title: "The service asks who you are.", advice: "Sign in, or add a key.", retry: undefined },
  RESOURCE_EXHAUSTED: { title: "The service is busy.", advice: "Nothing is wrong with your request.", retry: AGAIN },
  UNIMPLEMENTED: {
    title: "The service does not know this call.",
    advice: "It is older than this page, or it is another service. Reload the page.",
    retry: undefined,
  },
  UNAVAILABLE: { title: "The service is not available.", advice: "Try again in a moment.", retry: AGAIN },
};

const UNEXPECTED: Explanation = {
  title: "The service failed.",
  advice: "It is not your fault; its log says why. Trying again may help.",
  retry: AGAIN,
};

/** Says what an error means for people. */
export function explain(error: CalotypeError): Explanation {
  return BY_REASON[error.reason] ?? BY_CODE[error.code] ?? UNEXPECTED;
}

const FIELDS: Readonly<Record<string, string>> = {
  prompt: "Prompt",
  negative_prompt: "What to avoid",
  width_px: "Width",
  height_px: "Height",
  step_count: "Steps",
  guidance_scale: "Guidance",
  seed: "Seed",
  scheduler: "Scheduler",
  "preview.every_steps": "Preview every … steps",
  "preview.max_edge_px": "Preview size",
  "preview.quality": "Preview quality",
  "preview.method": "Preview drawn by",
  "output.format": "File format",
  "output.quality": "File quality",
};

/** Names a field of the request as people see it. */
export function fieldLabel(field: string): string {
  return FIELDS[field] ?? field;
}
