import { Code, ConnectError } from "@connectrpc/connect";
import { describe, expect, it } from "vitest";
import { RETRIES } from "../src/constants.js";
import { RetryInfoSchema } from "../src/gen/google/rpc/error_details_pb.js";
import type { Reconnect } from "../src/index.js";
import { type FollowPlan, follow } from "../src/resume/follow.js";
import { backoff } from "../src/resume/waits.js";
import { collect } from "./helpers.js";
import { final, preview } from "./stub_server.js";
import { FakeClock, lost, notFound, outcome, scripted } from "./unreliable_service.js";

describe("retrying", () => {
  const previewThenLost = async function* () {
    yield preview(1);
    throw lost();
  };
  // biome-ignore lint/correctness/useYield: there is no server.
  const unreachable = async function* () {
    throw lost();
  };

  it("waits longer each time, reports each wait, and stops after the allowed number of retries", async () => {
    const reconnects: Reconnect[] = [];
    const { calls, requested } = scripted(previewThenLost, unreachable);
    const { error, clock } = await outcome(calls, {
      retries: 8,
      onReconnect: (reconnect) => reconnects.push(reconnect),
    });
    expect(error).toMatchObject({ code: "UNAVAILABLE", reason: "CONNECTION_LOST" });
    expect(requested).toHaveLength(9);
    expect(clock.slept).toEqual([250, 500, 1000, 2000, 4000, 8000, 8000, 8000]);
    expect(reconnects.map(({ attempt }) => attempt)).toEqual([1, 2, 3, 4, 5, 6, 7, 8]);
  });

  it("starts counting again after anything new", async () => {
    let step = 0;
    const { calls, requested } = scripted(async function* () {
      step += 1;
      if (step === 20) yield final();
      else yield preview(step);
      throw lost();
    });
    expect((await outcome(calls, { retries: 2 })).error).toBeUndefined();
    expect(requested).toHaveLength(20);
  });

  it("stops if the server fails at the same step each time", async () => {
    const { calls, requested } = scripted(previewThenLost);
    expect((await outcome(calls, { retries: 5 })).error).toMatchObject({ code: "UNAVAILABLE" });
    expect(requested).toHaveLength(6);
  });

  it("waits at least as long as the server's retry delay", async () => {
    const details = [{ desc: RetryInfoSchema, value: { retryDelay: { seconds: 30n } } }];
    const { calls } = scripted(
      previewThenLost,
      // biome-ignore lint/correctness/useYield: it fails before the first message.
      async function* () {
        throw new ConnectError("", Code.Unavailable, undefined, details);
      },
      async function* () {
        yield final();
      },
    );
    expect((await outcome(calls)).clock.slept).toEqual([250, 30_500]);
  });

  it("ends with DEADLINE_EXCEEDED within the timeout", async () => {
    const { calls } = scripted(previewThenLost, unreachable);
    const { error, clock } = await outcome(calls, { timeout: 3, retries: 1e6 });
    expect(error).toMatchObject({ code: "DEADLINE_EXCEEDED" });
    expect(clock.now()).toBeLessThanOrEqual(3000);
  });

  it.each([
    ["it is disabled", previewThenLost, 0, "UNAVAILABLE"],
    ["the generation has no id yet", unreachable, RETRIES, "UNAVAILABLE"],
  ])("does not happen if %s", async (_, script, retries, code) => {
    const { calls, requested } = scripted(script);
    expect((await outcome(calls, { retries })).error).toMatchObject({ code });
    expect(requested).toHaveLength(1);
  });

  it("does not happen for other errors", async () => {
    const { calls, requested } = scripted(async function* () {
      yield preview(1);
      throw new ConnectError("", Code.Internal);
    });
    expect((await outcome(calls)).error).toMatchObject({ code: "INTERNAL" });
    expect(requested).toHaveLength(1);
  });

  it("reports NOT_FOUND if the caller only watches", async () => {
    const { calls } = scripted(
      // biome-ignore lint/correctness/useYield: it fails before the first message.
      async function* () {
        throw notFound();
      },
    );
    const { error } = await outcome({ ...calls, generate: undefined }, { generationId: "g" });
    expect(error).toMatchObject({ code: "NOT_FOUND" });
  });

  it("ends at once if the caller leaves during a wait", async () => {
    const leave = new AbortController();
    const { calls, requested } = scripted(previewThenLost);
    const clock = new FakeClock();
    const plan: FollowPlan = { clock, retries: RETRIES, onReconnect: () => leave.abort("user left") };
    await expect(collect(follow(calls, plan, leave.signal))).rejects.toMatchObject({
      code: "CANCELLED",
      cause: "user left",
    });
    expect(requested).toHaveLength(1);
  });

  it("reports the id of a generation whose caller left before its first message", async () => {
    const leave = new AbortController();
    let answer = () => {};
    const { calls } = scripted(async function* () {
      await new Promise<void>((resolve) => {
        answer = resolve;
      });
      yield preview(1);
    });
    const orphan = new Promise<string>((resolve) => {
      const plan: FollowPlan = { clock: new FakeClock(), retries: RETRIES };
      const first = follow(calls, plan, leave.signal, resolve).next();
      first.catch(() => answer());
      leave.abort();
    });
    expect(await orphan).toBe("g");
  });
});

describe("the backoff", () => {
  it("has full jitter within a bound that doubles up to 8 seconds", () => {
    expect([1, 2, 3].map((attempt) => backoff(attempt, 0))).toEqual([0, 0, 0]);
    expect([1, 2, 3, 6, 7, 50].map((attempt) => backoff(attempt, 1))).toEqual([0.25, 0.5, 1, 8, 8, 8]);
    expect(backoff(3, 0.5)).toBe(0.5);
  });
});
