/** The state of a view of one generation, as a pure function of its events: `(state, event) => state`. */

import type { CalotypeError } from "./errors.js";
import { isEnd, type Notice, type Phase, type Picture, type Progress, type Timings } from "./types.js";

export type ViewEvent =
  | { readonly type: "start" }
  | { readonly type: "progress"; readonly progress: Progress }
  | { readonly type: "error"; readonly error: CalotypeError }
  /** The connection was lost, and the client is reconnecting. `loading`: the service is loading its model. */
  | { readonly type: "reconnect"; readonly loading?: boolean }
  /** The user asked to finish early; `requested` is false if that call failed. */
  | { readonly type: "finish"; readonly requested: boolean }
  /** Selects the picture at this index of `stages`; undefined for the newest. */
  | { readonly type: "scrub"; readonly index: number | undefined };

export interface ViewState {
  /** `waiting`: requested, and no message received yet. */
  readonly status: "idle" | "waiting" | "running" | "succeeded" | "failed" | "cancelled";
  /** The connection is lost, and the client is reconnecting. */
  readonly reconnecting: boolean;
  /** The client is waiting for the service, which is loading its model. */
  readonly loading: boolean;
  /** The client asked the service to finish early. */
  readonly finishing: boolean;
  /** The generation was finished early: the final picture is the estimate of `step`. */
  readonly finishedEarly: boolean;
  readonly phase: Phase | undefined;
  readonly generationId: string | undefined;
  readonly seed: number | undefined;
  readonly step: number;
  readonly totalSteps: number;
  readonly queuePosition: number;
  /** Seconds until the final picture, from the last estimate. */
  readonly remaining: number | undefined;
  /** Previews, oldest first, at most one per step. */
  readonly previews: readonly Picture[];
  readonly previewsDropped: number;
  /** The safety checker rejected the previews: there are none, and no more will follow. */
  readonly withdrawn: boolean;
  readonly final: Picture | undefined;
  readonly warnings: readonly Notice[];
  readonly error: CalotypeError | undefined;
  readonly timings: Timings | undefined;
  /** Selected index of `stages`; undefined for the newest. */
  readonly scrubbed: number | undefined;
}

export const initialState: ViewState = {
  status: "idle",
  reconnecting: false,
  loading: false,
  finishing: false,
  finishedEarly: false,
  phase: undefined,
  generationId: undefined,
  seed: undefined,
  step: 0,
  totalSteps: 0,
  queuePosition: 0,
  remaining: undefined,
  previews: [],
  previewsDropped: 0,
  withdrawn: false,
  final: undefined,
  warnings: [],
  error: undefined,
  timings: undefined,
  scrubbed: undefined,
};

export function reduce(state: ViewState, event: ViewEvent): ViewState {
  switch (event.type) {
    case "start":
      return { ...initialState, status: "waiting" };
    case "progress":
      return isOver(state) ? state : withProgress(state, event.progress);
    case "error":
      return isOver(state) ? state : withError(state, event.error);
    case "reconnect":
      return isOver(state) ? state : { ...state, reconnecting: true, loading: event.loading ?? false };
    case "finish":
      return isOver(state) ? state : { ...state, finishing: event.requested };
    case "scrub":
      return withScrub(state, event.index);
  }
}

/** Returns all pictures, oldest first, the final one last. */
export function stages(state: ViewState): readonly Picture[] {
  return state.final ? [...state.previews, state.final] : state.previews;
}

/** Returns the picture to show: the selected one, else the newest. */
export function frameAt(state: ViewState): Picture | undefined {
  return stages(state).at(state.scrubbed ?? -1);
}

/** Returns the completed fraction, 0 to 1. Decoding counts as one more step, so that the bar is not full too early. */
export function fraction(state: ViewState): number {
  if (state.status === "succeeded") return 1;
  return state.totalSteps > 0 ? Math.min(state.step / (state.totalSteps + 1), 1) : 0;
}

/** Whether the generation has ended. */
export function isOver({ status }: ViewState): boolean {
  return status === "succeeded" || status === "failed" || status === "cancelled";
}

function withProgress(state: ViewState, progress: Progress): ViewState {
  const { picture, phase } = progress;
  const withdrawn = state.withdrawn || progress.previewsWithdrawn;
  const isNew = picture?.kind === "predicted" && picture.step > (state.previews.at(-1)?.step ?? 0);
  return {
    ...state,
    // A failure is reported by the error event that follows, not by the phase of its last message.
    status: phase === "succeeded" ? "succeeded" : "running",
    reconnecting: false,
    loading: false,
    finishing: state.finishing && !isEnd(phase),
    finishedEarly: progress.finishedEarly,
    phase,
    generationId: progress.generationId,
    seed: progress.seed,
    step: Math.max(state.step, progress.step),
    totalSteps: progress.totalSteps || state.totalSteps,
    queuePosition: progress.queuePosition,
    remaining: progress.remaining,
    previews: withdrawn ? [] : isNew ? [...state.previews, picture] : state.previews,
    previewsDropped: Math.max(state.previewsDropped, progress.previewsDropped),
    withdrawn,
    final: picture?.kind === "final" ? picture : undefined,
    warnings: merge(state.warnings, progress.warnings),
    timings: progress.timings ?? state.timings,
  };
}

function withError(state: ViewState, error: CalotypeError): ViewState {
  const status = error.code === "CANCELLED" ? "cancelled" : "failed";
  const previews = error.reason === "CONTENT_WITHHELD" ? [] : state.previews;
  return {
    ...state,
    status,
    error,
    previews,
    reconnecting: false,
    loading: false,
    finishing: false,
    queuePosition: 0,
    remaining: undefined,
  };
}

function withScrub(state: ViewState, index: number | undefined): ViewState {
  const last = stages(state).length - 1;
  if (!isOver(state) || index === undefined || index >= last) return { ...state, scrubbed: undefined };
  return { ...state, scrubbed: Math.max(index, 0) };
}

function merge(old: readonly Notice[], added: readonly Notice[]): readonly Notice[] {
  const fresh = added.filter(({ reason }) => !old.some((notice) => notice.reason === reason));
  return fresh.length > 0 ? [...old, ...fresh] : old;
}
