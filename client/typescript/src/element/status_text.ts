/** The status line below the picture, and the announcements for screen readers. Pure functions. */

import { fraction, frameAt, type ViewState } from "../reducer.js";
import { stageLabel } from "./filmstrip.js";

/** Returns the status line of a generation. */
export function statusLine(state: ViewState): string {
  switch (state.status) {
    case "idle":
      return "";
    case "waiting":
      return state.reconnecting ? reconnecting(state) : "Waiting for a free connection";
    case "running":
      if (state.reconnecting) return reconnecting(state);
      // The estimate is for all steps, so it does not apply once the picture is finished early.
      return [running(state), state.finishing ? "" : remaining(state.remaining)].filter(Boolean).join(" · ");
    case "succeeded":
      return state.scrubbed === undefined ? finished(state) : stageLabel(frameAt(state), state.totalSteps);
    case "failed":
    case "cancelled":
      return state.previews.length > 0 ? `${stageLabel(frameAt(state), state.totalSteps)}; not finished` : "";
  }
}

/** Returns the text to announce. It changes only with the phase and with every quarter of the steps. */
export function announcement(state: ViewState): string {
  if (state.status === "succeeded") return "The picture is finished.";
  if (state.reconnecting) return reconnecting(state);
  if (state.status !== "running") return "";
  if (state.finishing || state.phase !== "denoising") return running(state);
  return `Developing, ${Math.floor(fraction(state) * 4) * 25} percent`;
}

function reconnecting({ loading, previews }: ViewState): string {
  if (!loading) return "Reconnecting; the picture will continue";
  return `The service is loading its model; the picture will ${previews.length > 0 ? "continue" : "follow"}`;
}

function running({ phase, queuePosition, step, totalSteps, finishing }: ViewState): string {
  if (finishing) return "Finishing the picture as it is";
  switch (phase) {
    case "queued":
      return queuePosition > 1 ? `Position ${queuePosition} in the queue` : "Next in the queue";
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

/** Formats a duration with about two digits. */
export function duration(seconds: number): string {
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  if (seconds < 99.5) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 100 ? `${minutes} min` : `${Math.round(minutes / 60)} h`;
}

function remaining(seconds: number | undefined): string {
  if (seconds === undefined) return "";
  return seconds < 1 ? "almost done" : `about ${duration(Math.ceil(seconds)).replace(".0", "")} left`;
}

function finished({ final, timings, finishedEarly, step, totalSteps }: ViewState): string {
  const early = finishedEarly ? ` early, at step ${step} of ${totalSteps},` : "";
  const time = timings?.total === undefined ? "" : ` in ${duration(timings.total)}`;
  // With no-break spaces, so that the size stays on one line.
  const size = final ? `${final.width} × ${final.height} ${final.format.toUpperCase()}`.replaceAll(" ", "\u00a0") : "";
  return [`Finished${early}${time}`.replace(/,$/, ""), size].join(" · ");
}
