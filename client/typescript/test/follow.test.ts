import { create } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { describe, expect, it } from "vitest";
import { RETRIES } from "../src/constants.js";
import { ErrorSchema, Phase, type Progress as WireProgress } from "../src/gen/calotype/v1/calotype_pb.js";
import { CalotypeError, type Phase as PhaseName, type Progress } from "../src/index.js";
import { type FollowPlan, follow } from "../src/resume/follow.js";
import { collect } from "./helpers.js";
import { final, preview, progress } from "./stub_server.js";
import {
  FakeClock,
  lost,
  neverAborted,
  notFound,
  outcome,
  SEED,
  scripted,
  seededRandom,
  UnreliableService,
} from "./unreliable_service.js";

const PHASES: readonly PhaseName[] = ["queued", "encoding_prompt", "denoising", "decoding", "succeeded"];

function drainingEnd(generationId: string): WireProgress {
  const error = create(ErrorSchema, { code: Code.Unavailable, reason: "DRAINING", message: "Stopping." });
  return { ...progress({ phase: Phase.FAILED, sequence: 3n, error }), generationId };
}

function abandonedEnd(generationId: string): WireProgress {
  const error = create(ErrorSchema, { code: Code.Canceled, reason: "ABANDONED", message: "The caller disconnected." });
  return { ...progress({ phase: Phase.CANCELLED, sequence: 3n, error }), generationId };
}
describe("a generation over unreliable connections", () => {
  it.each(Array.from({ length: 300 }, (_, seed) => seed))("is one continuous stream (seed %i)", async (seed) => {
    const random = seededRandom(seed);
    const service = new UnreliableService(random, Math.floor(random() * 9));
    const clock = new FakeClock();
    let reconnects = 0;
    let seen: Progress[] = [];
    const plan: FollowPlan = { clock, retries: RETRIES, onReconnect: () => (reconnects += 1) };
    try {
      seen = await collect(follow(service, plan, neverAborted()));
    } catch (error) {
      // Without an id there is nothing to resume.
      expect(reconnects).toBe(0);
      expect(error).toBeInstanceOf(CalotypeError);
      return;
    }
    const sequences = seen.map(({ sequence }) => sequence);
    expect(sequences).toEqual([...new Set(sequences)].sort((a, b) => a - b));
    const steps = seen.map(({ step }) => step);
    expect(steps.slice(0, -1)).toEqual(steps.slice(0, -1).sort((a, b) => a - b));
    const phases = seen.map(({ phase }) => PHASES.indexOf(phase));
    expect(phases).toEqual([...phases].sort((a, b) => a - b));
    const previews = seen.flatMap(({ picture }) => (picture?.kind === "predicted" ? [picture.step] : []));
    expect(previews).toEqual([...new Set(previews)].sort((a, b) => a - b));
    expect(seen.filter(({ phase }) => phase === "succeeded")).toHaveLength(1);
    expect(seen.at(-1)?.picture).toMatchObject({ kind: "final", data: new Uint8Array([0, 1]) });
    expect(new Set(service.seeds.slice(1))).toEqual(new Set(service.seeds.length > 1 ? [Number(SEED)] : []));
  });

  it("is watched after the last message, and repeated messages are skipped", async () => {
    const { calls, requested } = scripted(
      async function* () {
        yield preview(1);
        yield preview(2);
        throw lost();
      },
      async function* () {
        yield preview(2);
        yield preview(3);
        yield final();
      },
    );
    const { seen } = await outcome(calls);
    expect(requested).toEqual(["generate undefined", "watch g 3"]);
    expect(seen.map(({ picture }) => picture?.step)).toEqual([1, 2, 3, 3]);
  });

  it("is started again with the same seed if the server lost it, without visible setbacks", async () => {
    const { calls, requested } = scripted(
      async function* () {
        yield preview(2);
        throw lost();
      },
      // biome-ignore lint/correctness/useYield: it fails before the first message.
      async function* () {
        throw notFound();
      },
      async function* () {
        yield { ...progress({ sequence: 1n, phase: Phase.QUEUED, queuePosition: 4 }), generationId: "h" };
        for (const step of [1, 2, 3]) yield { ...preview(step), generationId: "h" };
        throw lost();
      },
      async function* () {
        yield { ...final(), generationId: "h" };
      },
    );
    const { seen } = await outcome(calls);
    expect(requested).toEqual(["generate undefined", "watch g 3", "generate 42", "watch h 4"]);
    expect(seen.map(({ phase, step }) => `${phase} ${step}`)).toEqual([
      ...Array(4).fill("denoising 2"),
      "denoising 3",
      "succeeded 3",
    ]);
    expect(seen.map(({ picture }) => picture?.step)).toEqual([2, undefined, undefined, undefined, 3, 3]);
    expect(seen[1]?.queuePosition).toBe(0);
  });

  it.each([
    ["shut down", drainingEnd],
    ["found no reader", abandonedEnd],
  ])("is started again if the server %s, also if the stopping server repeats the end", async (_, ended) => {
    const stopped = async function* () {
      yield preview(1);
      yield ended("g");
    };
    const { calls, requested } = scripted(stopped, stopped, async function* () {
      yield { ...final(), generationId: "h" };
    });
    expect((await outcome(calls)).seen.map(({ phase }) => phase)).toEqual(["denoising", "succeeded"]);
    expect(requested).toEqual(["generate undefined", "generate 42", "generate 42"]);
  });

  it("ends if no server finds a reader", async () => {
    const { calls, requested } = scripted(async function* () {
      yield preview(1);
      yield abandonedEnd("g");
    });
    expect((await outcome(calls, { retries: 3 })).error).toMatchObject({ reason: "ABANDONED" });
    expect(requested).toHaveLength(4);
  });

  it("waits until a server that shut down is back", async () => {
    const { calls, requested } = scripted(
      async function* () {
        yield preview(1);
        yield drainingEnd("g");
      },
      // biome-ignore lint/correctness/useYield: it fails before the first message.
      async function* () {
        throw new ConnectError("draining", Code.Unavailable);
      },
      async function* () {
        yield { ...final(), generationId: "h" };
      },
    );
    expect((await outcome(calls)).error).toBeUndefined();
    expect(requested).toEqual(["generate undefined", "generate 42", "generate 42"]);
  });

  it("the chunks of a final picture count only once all have arrived", async () => {
    const { calls, requested } = scripted(
      async function* () {
        yield preview(3);
        yield final(new Uint8Array([1]), 0, 2);
        throw lost();
      },
      async function* () {
        yield final(new Uint8Array([1]), 0, 2);
        yield final(new Uint8Array([2]), 1, 2);
      },
    );
    const { seen } = await outcome(calls);
    expect(requested[1]).toBe("watch g 4");
    expect(seen.at(-1)?.picture?.data).toEqual(new Uint8Array([1, 2]));
  });
});
