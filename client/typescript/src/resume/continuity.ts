/** Makes one stream of the several that a generation came over: what was told is not told again, nothing goes back. */

import { isEnd, type Phase, type Progress } from "../types.js";

const ORDER: readonly Phase[] = ["queued", "encoding_prompt", "denoising", "decoding"];

export class Continuity {
  /** Of the generation that is followed; another one, when it had to be begun again. */
  generationId: string | undefined;
  /** Seed in use, once it is known. */
  seed: number | undefined;
  /** The last sequence number of this generation that was told, as the server counts. */
  position: number;
  /** How often the caller was told something that it had not known: more steps, a later phase, a new picture. */
  news = 0;
  #last: Progress | undefined;
  #pictureStep = 0;

  constructor(generationId?: string, afterSequence = 0) {
    this.generationId = generationId;
    this.position = afterSequence;
  }

  /** Returns what to tell the caller for what came; undefined for what it knows. */
  accept(progress: Progress): Progress | undefined {
    const last = this.#last;
    if (this.generationId !== undefined && progress.generationId !== this.generationId) this.position = 0;
    const end = isEnd(progress.phase);
    if (progress.sequence <= this.position && !end) return undefined;
    this.generationId = progress.generationId;
    this.seed = progress.seed;
    this.position = progress.sequence;

    const picture = this.#isRepeated(progress) ? undefined : progress.picture;
    const isBehind = !end && last !== undefined && rank(progress.phase, last) < rank(last.phase, last);
    const told: Progress = {
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
    if (!last || end || picture || told.step > last.step || told.phase !== last.phase) this.news += 1;
    if (picture?.kind === "predicted") this.#pictureStep = picture.step;
    this.#last = told;
    return told;
  }

  #isRepeated({ picture }: Progress): boolean {
    return picture?.kind === "predicted" && picture.step <= this.#pictureStep;
  }
}

/** A phase that this client does not know counts as no step back. */
function rank(phase: Phase, last: Progress): number {
  const known = ORDER.indexOf(phase);
  return known < 0 ? ORDER.indexOf(last.phase) : known;
}
