import { describe, expect, it } from "vitest";
import { sample } from "../src/element/filmstrip.js";
import { fileName } from "../src/element/options.js";
import { announcement, duration, statusLine } from "../src/element/status_text.js";
import { STATUS_CODES } from "../src/errors.js";
import { CalotypeError, explain, initialState, type ViewState } from "../src/index.js";

describe("explanations of errors", () => {
  it.each(STATUS_CODES)("have a title and advice for %s", (code) => {
    const { title, advice } = explain(new CalotypeError(code, "internal text"));
    for (const sentence of [title, advice]) expect(sentence).toMatch(/^[A-Z].*\.$/);
    expect(title + advice).not.toMatch(/internal text|gRPC|[A-Z]{2}_/);
  });

  it("offer to continue after a lost connection, but not to repeat an invalid request", () => {
    const explainReason = (reason: string) => explain(new CalotypeError("UNAVAILABLE", "", { reason }));
    expect(explainReason("CONNECTION_LOST").retry).toBe("Continue");
    expect(explainReason("DRAINING").retry).toBe("Continue");
    expect(explain(new CalotypeError("INVALID_ARGUMENT", "")).retry).toBeUndefined();
  });
});

describe("the explanation of an end that a retry repeats", () => {
  it("has no button for a generation that crashes the service, and one to generate a damaged picture again", () => {
    expect(explain(new CalotypeError("INTERNAL", "", { reason: "ENGINE_CRASHED" }))).toMatchObject({
      title: "This picture crashed the service more than once.",
      retry: undefined,
    });
    expect(explain(new CalotypeError("DATA_LOSS", "", { reason: "DATA_LOSS" }))).toMatchObject({
      title: "The stored picture is damaged.",
      retry: "Try again",
    });
  });
});

describe("the status line", () => {
  const running: ViewState = { ...initialState, status: "running", phase: "denoising", step: 7, totalSteps: 20 };

  it("has the position in the queue, the step, and the remaining time", () => {
    expect(statusLine({ ...running, phase: "queued", queuePosition: 3, remaining: 12.2 })).toBe(
      "Position 3 in the queue · about 13 s left",
    );
    expect(statusLine({ ...running, remaining: 3 })).toBe("Step 7 of 20 · about 3 s left");
    expect(statusLine({ ...running, remaining: 0.2 })).toBe("Step 7 of 20 · almost done");
    expect(statusLine(running)).toBe("Step 7 of 20");
  });

  it("is neutral during a reconnect, and shows an early finish", () => {
    expect(statusLine({ ...running, reconnecting: true })).toBe("Reconnecting; the picture will continue");
    const loading = { ...running, reconnecting: true, loading: true };
    expect(statusLine(loading)).toBe("The service is loading its model; the picture will follow");
    expect(announcement(loading)).toBe("The service is loading its model; the picture will follow");
    expect(statusLine({ ...loading, status: "waiting" })).toBe(statusLine(loading));
    expect(statusLine({ ...running, finishing: true, remaining: 11 })).toBe("Finishing the picture as it is");
    const picture = { data: new Uint8Array(), format: "png", width: 8, height: 8, kind: "final", step: 7 } as const;
    const early: ViewState = {
      ...running,
      status: "succeeded",
      finishedEarly: true,
      final: { ...picture, method: undefined },
    };
    expect(statusLine(early)).toBe("Finished early, at step 7 of 20 · 8\u00a0×\u00a08\u00a0PNG");
  });

  it("is announced once per quarter", () => {
    const announced = new Set(Array.from({ length: 21 }, (_, step) => announcement({ ...running, step })));
    expect([...announced]).toEqual([0, 25, 50, 75].map((percent) => `Developing, ${percent} percent`));
  });

  it.each([
    [0.34, "0.3 s"],
    [9.96, "10 s"],
    [75, "75 s"],
    [150, "3 min"],
    [9000, "3 h"],
  ])("formats %d seconds as %s", (seconds, text) => {
    expect(duration(seconds)).toBe(text);
  });
});

describe("a file name", () => {
  it.each([
    ["A red apple!", 42, "png", "a-red-apple-42.png"],
    ["../../etc/passwd", 1, "jpeg", "etc-passwd-1.jpg"],
    ["リンゴ", undefined, "webp", "リンゴ.webp"],
    ["?!", 0, "png", "calotype-0.png"],
  ] as const)("is derived from %s", (prompt, seed, format, name) => {
    expect(fileName(prompt, seed, format)).toBe(name);
  });
});

describe("the thumbnails", () => {
  it("are sampled at even distances, including both ends", () => {
    expect(sample([1, 2, 3], 5)).toEqual([1, 2, 3]);
    const sampled = sample([...Array(100).keys()], 10);
    expect(sampled).toHaveLength(10);
    expect([sampled[0], sampled.at(-1)]).toEqual([0, 99]);
  });
});
