import { describe, expect, it } from "vitest";
import {
  CalotypeError,
  fraction,
  frameAt,
  initialState,
  type Picture,
  type Progress,
  reduce,
  stages,
  type ViewEvent,
} from "../src/index.js";

function picture(step: number, kind: Picture["kind"] = "predicted"): Picture {
  return { data: new Uint8Array([step]), format: "jpeg", width: 8, height: 8, kind, step, method: "head" };
}

function progress(values: Partial<Progress>): ViewEvent {
  const empty: Progress = {
    generationId: "g",
    sequence: 1,
    phase: "denoising",
    step: 0,
    totalSteps: 4,
    picture: undefined,
    queuePosition: 0,
    remaining: undefined,
    previewsDropped: 0,
    previewsWithdrawn: false,
    seed: 7,
    warnings: [],
    finishedEarly: false,
    notPersisted: false,
    timings: undefined,
  };
  return { type: "progress", progress: { ...empty, ...values } };
}

const start: ViewEvent = { type: "start" };
const preview = (step: number) => progress({ step, picture: picture(step) });
const succeeded = progress({ phase: "succeeded", step: 4, picture: picture(4, "final") });
const failed: ViewEvent = { type: "error", error: new CalotypeError("INTERNAL", "failed") };

function play(...events: ViewEvent[]) {
  return events.reduce(reduce, initialState);
}

describe("the reducer", () => {
  it("goes from waiting through the queue and the steps to the final picture", () => {
    expect(play(start).status).toBe("waiting");
    expect(play(start, progress({ phase: "queued", queuePosition: 3 }))).toMatchObject({
      status: "running",
      queuePosition: 3,
    });
    const state = play(start, preview(1), preview(2), succeeded);
    expect(state).toMatchObject({ status: "succeeded", seed: 7, step: 4 });
    expect(stages(state).map(({ step, kind }) => [step, kind])).toEqual([
      [1, "predicted"],
      [2, "predicted"],
      [4, "final"],
    ]);
  });

  it("shows the newest picture, and keeps one per step", () => {
    expect(frameAt(play(start))).toBeUndefined();
    const state = play(start, preview(1), preview(3), preview(3), preview(2));
    expect(state.previews.map(({ step }) => step)).toEqual([1, 3]);
    expect(frameAt(state)?.step).toBe(3);
  });

  it("never decreases the fraction, which is 1 only with the final picture", () => {
    const events = [start, preview(1), preview(2), progress({ phase: "decoding", step: 4 }), succeeded];
    const fractions = events.map((_, index) => fraction(play(...events.slice(0, index + 1))));
    expect(fractions).toEqual([0, 0.2, 0.4, 0.8, 1]);
    expect(play(start, preview(3), progress({ step: 2 })).step).toBe(3);
  });

  it("keeps the pictures of a failed generation, and distinguishes a cancellation from a failure", () => {
    const state = play(start, preview(1), failed);
    expect(state).toMatchObject({ status: "failed", remaining: undefined });
    expect(stages(state)).toHaveLength(1);
    expect(play(start, { type: "error", error: new CalotypeError("CANCELLED", "") }).status).toBe("cancelled");
  });

  it("ignores events after the end", () => {
    const ended = play(start, preview(1), succeeded);
    expect(reduce(reduce(ended, preview(3)), failed)).toBe(ended);
  });

  it("removes withdrawn previews, and accepts no more", () => {
    const state = play(
      start,
      preview(1),
      progress({ step: 2, picture: picture(2), previewsWithdrawn: true }),
      preview(3),
    );
    expect(state).toMatchObject({ withdrawn: true, previews: [] });
    expect(frameAt(state)).toBeUndefined();
    const withheld = new CalotypeError("FAILED_PRECONDITION", "", { reason: "CONTENT_WITHHELD" });
    expect(play(start, preview(1), { type: "error", error: withheld }).previews).toEqual([]);
  });

  it("selects other pictures only after the end, and returns to the newest", () => {
    const scrub = (index: number | undefined): ViewEvent => ({ type: "scrub", index });
    expect(frameAt(play(start, preview(1), preview(2), scrub(0)))?.step).toBe(2);
    const ended = [start, preview(1), preview(2), succeeded];
    expect(frameAt(play(...ended, scrub(0)))?.step).toBe(1);
    expect(frameAt(play(...ended, scrub(-5)))?.step).toBe(1);
    expect(frameAt(play(...ended, scrub(99)))?.kind).toBe("final");
    expect(play(...ended, scrub(0), scrub(2)).scrubbed).toBeUndefined();
  });

  it("is reconnecting until the next progress or the end", () => {
    const reconnect: ViewEvent = { type: "reconnect" };
    expect(play(start, preview(1), reconnect)).toMatchObject({ status: "running", reconnecting: true });
    expect(play(start, preview(1), reconnect, preview(2)).reconnecting).toBe(false);
    expect(play(start, preview(1), reconnect, failed).reconnecting).toBe(false);
    expect(play(start, succeeded, reconnect).reconnecting).toBe(false);
  });

  it("is finishing after a request to finish, and finishedEarly at the end", () => {
    const finish = (requested: boolean): ViewEvent => ({ type: "finish", requested });
    expect(play(start, preview(1), finish(true), preview(2)).finishing).toBe(true);
    expect(play(start, preview(1), finish(true), finish(false)).finishing).toBe(false);
    const early = progress({ phase: "succeeded", step: 2, picture: picture(2, "final"), finishedEarly: true });
    expect(play(start, preview(1), finish(true), early)).toMatchObject({
      finishing: false,
      finishedEarly: true,
      step: 2,
    });
  });

  it("collects one warning per reason", () => {
    const cut = { reason: "PROMPT_TRUNCATED", message: "truncated" };
    expect(play(start, progress({ warnings: [cut] }), progress({ warnings: [{ ...cut }] })).warnings).toEqual([cut]);
  });

  it("resets everything at the next start", () => {
    expect(play(start, preview(1), succeeded, start)).toEqual({ ...initialState, status: "waiting" });
  });

  it("never modifies its input state", () => {
    const freeze = (state: ReturnType<typeof play>) =>
      Object.freeze({ ...state, previews: Object.freeze([...state.previews]) });
    const events = [start, preview(1), succeeded, { type: "scrub", index: 0 } satisfies ViewEvent];
    expect(() => events.reduce((state, event) => freeze(reduce(state, event)), freeze(initialState))).not.toThrow();
  });
});
