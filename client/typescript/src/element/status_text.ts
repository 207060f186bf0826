/** The line under the picture, and what a screen reader is told. Pure. */

import { fraction, frameAt, type ViewState } from "../reducer.js";
import { stageLabel } from "./filmstrip.js";

/** Says where a generation stands. */
export function statusLine(state: ViewState): string {
  switch (state.status) {
    case "idle":
      return "";
    case "waiting":
      return state.reconnecting ? RECONNECTING : "Waiting for a free connection";
    case "running":
      if (state.reconnecting) return RECONNECTING;
      // The estimate is that of the whole way.
      return [running(state), state.finishing ? "" : remaining(state.remaining)].filter(Boolean).join(" · ");
    case "succeeded":
      return state.scrubbed === undefined ? finished(state) : stageLabel(frameAt(state), state.totalSteps);
    case "failed":
    case "cancelled":
      return state.previews.length > 0 ? `${stageLabel(frameAt(state), state.totalSteps)}; not finished` : "";
  }
}

/** Says what is worth interrupting somebody for: phases, and every quarter of the way. */
export function announcement(state: ViewState): string {
  if (state.status === "succeeded") return "The picture is finished.";
  if (state.reconnecting) return RECONNECTING;
  if (state.status !== "running") return "";
  if (state.finishing || state.phase !== "denoising") return running(state);
  return `Developing, ${Math.floor(fraction(state) * 4) * 25} percent`;
}

/** No alarm: it mends itself. */
const RECONNECTING = "Reconnecting; the picture goes on";

function running({ phase, queuePosition, step, totalSteps, finishing }: ViewState): string {
  if (finishing) return "Finishing the picture as it is";
  switch (phase) {
    case "queued":
      return queuePosition > 1 ? `Place ${queuePosition} in the queue` : "Next in the queue";
    case "encoding_prompt":
      return "Reading the prompt";
    case "denoising":
      return totalSteps > 0 ? `Step ${step} of ${totalSteps}` : "Developing";
    case "decoding":
      return "Finishing the picture";
    default:
      return "Working";
  }
}

/** Says how long something takes, as roughly as it is known. */
export function duration(seconds: number): string {
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  if (seconds < 99.5) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 100 ? `${minutes} min` : `${Math.round(minutes / 60)} h`;
}

function remaining(seconds: number | undefined): string {
  if (seconds === undefined) return "";
  return seconds < 1 ? "almost there" : `about ${duration(Math.ceil(seconds)).replace(".0", "")} left`;
}

function finished({ final, timings, finishedEarly, step, totalSteps }: ViewState): string {
  const early = finishedEarly ? ` early, at step ${step} of ${totalSteps},` : "";
  const time = timings?.total === undefined ? "" : ` in ${duration(timings.total)}`;
  // Not broken over two lines.
  const size = final ? `${final.width} × ${final.height} ${final.format.toUpperCase()}`.replaceAll(" ", "\u00a0") : "";
  return [`Finished${early}${time}`.replace(/,$/, ""), size].join(" · ");
}
