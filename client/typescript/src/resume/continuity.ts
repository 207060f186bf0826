/** Joins the streams of several connections into one: nothing is repeated, and nothing goes back. */

import { isEnd, type Phase, type Progress } from "../types.js";

const ORDER: readonly Phase[] = ["queued", "encoding_prompt", "denoising", "decoding"];

export class Continuity {
  #generationId: string | undefined;
  #seed: number | undefined;
  #sequence: number;
  #newsCount = 0;
  #last: Progress | undefined;
  #pictureStep = 0;

  constructor(generationId?: string, afterSequence = 0) {
    this.#generationId = generationId;
    this.#sequence = afterSequence;
  }

  /** Id of the current generation. It changes if the client has to start the generation again. */
  get generationId(): string | undefined {
    return this.#generationId;
  }

  /** Seed in use, once it is known. */
  get seed(): number | undefined {
    return this.#seed;
  }

  /** Last sequence number received from the current generation, for `WatchRequest.after_sequence`. */
  get sequence(): number {
    return this.#sequence;
  }

  /** Number of messages that were new to the caller: another step, a later phase, a new picture, or the end. */
  get newsCount(): number {
    return this.#newsCount;
  }

  /** Returns the progress to show for a message; undefined if the caller has seen it. */
  accept(progress: Progress): Progress | undefined {
    const last = this.#last;
    if (this.#generationId !== undefined && progress.generationId !== this.#generationId) this.#sequence = 0;
    const end = isEnd(progress.phase);
    if (progress.sequence <= this.#sequence && !end) return undefined;
    this.#generationId = progress.generationId;
    this.#seed = progress.seed;
    this.#sequence = progress.sequence;

    const picture = this.#isRepeated(progress) ? undefined : progress.picture;
    const isBehind = !end && last !== undefined && rank(progress.phase, last) < rank(last.phase, last);
    const shown: Progress = {
      ...progress,
      picture,
      sequence: Math.max(progress.sequence, (last?.sequence ?? 0) + 1),
      phase: isBehind ? last.phase : progress.phase,
      step: Math.max(progress.step, last?.step ?? 0),
      totalSteps: progress.totalSteps || (last?.totalSteps ?? 0),
      queuePosition: isBehind ? 0 : progress.queuePosition,
      previewsDropped: Math.max(progress.previewsDropped, last?.previewsDropped ?? 0),
      previewsWithdrawn: progress.previewsWithdrawn || (last?.previewsWithdrawn ?? false),
    };
    if (!last || end || picture || shown.step > last.step || shown.phase !== last.phase) this.#newsCount += 1;
    if (picture?.kind === "predicted") this.#pictureStep = picture.step;
    this.#last = shown;
    return shown;
  }

  #isRepeated({ picture }: Progress): boolean {
    return picture?.kind === "predicted" && picture.step <= this.#pictureStep;
  }
}

/** Position of a phase in the order of phases. A phase that this client does not know ranks as the last one shown. */
function rank(phase: Phase, last: Progress): number {
  const known = ORDER.indexOf(phase);
  return known < 0 ? ORDER.indexOf(last.phase) : known;
}
