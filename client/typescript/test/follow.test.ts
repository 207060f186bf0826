import { create } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { describe, expect, it } from "vitest";
import { backoff, type Clock } from "../src/resume/clock.js";
import { type Calls, follow, type Plan } from "../src/resume/follow.js";
import { ErrorSchema, Phase, type Progress as WireProgress } from "../src/gen/calotype/v1/calotype_pb.js";
import { RetryInfoSchema } from "../src/gen/google/rpc/error_details_pb.js";
import { CalotypeError, type Phase as PhaseName, type Progress, type Reconnect } from "../src/index.js";
import { final, preview, progress } from "./stub_server.js";

/** Repeatable chance. */
function chance(seed: number): () => number {
  let state = seed * 2_654_435_761 + 1;
  return () => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return state / 2 ** 32;
  };
}

/** A clock that has slept before one looks, and remembers for how long. */
class QuickClock implements Clock {
  readonly slept: number[] = [];
  random = () => 1;
  #now = 0;

  now(): number {
    return this.#now;
  }

  async sleep(milliseconds: number): Promise<void> {
    this.slept.push(milliseconds);
    this.#now += milliseconds;
  }
}

const STEPS = 12;
const SEED = 42n;
const lost = () => new ConnectError("lost", Code.Unavailable, undefined, undefined, new TypeError("network error"));
const notFound = () => new ConnectError("no such generation", Code.NotFound);
const PHASES: readonly PhaseName[] = ["queued", "encoding_prompt", "denoising", "decoding", "succeeded"];

/** A service with one generation, whose connections break and which itself breaks as a random number says. */
class Shaky implements Calls {
  readonly seeds: (number | undefined)[] = [];
  readonly #random: () => number;
  #breakages: number;
  #born = 0;
  /** What the generation has told, in order; undefined when the service knows none. */
  #log: WireProgress[] | undefined;

  constructor(random: () => number, breakages: number) {
    this.#random = random;
    this.#breakages = breakages;
  }

  readonly generate = (seed: number | undefined) => {
    this.seeds.push(seed);
    return () => this.#serve(undefined, 0);
  };

  readonly watch = (id: string, afterSequence: number) => () => this.#serve(id, afterSequence);

  async *#serve(id: string | undefined, afterSequence: number): AsyncGenerator<WireProgress, void, undefined> {
    if (id === undefined && this.#log === undefined) this.#begin();
    const log = this.#log;
    if (!log || (id !== undefined && log[0]?.generationId !== id)) throw notFound();
    let sequence = BigInt(afterSequence);
    for (;;) {
      this.#goOn(log);
      const news = log.filter((message) => message.sequence > sequence);
      // Of the previews that a slow reader has not fetched, only the newest is kept.
      for (const message of this.#random() < 0.5 ? news : news.filter((each) => isOver(each) || each === news.at(-1))) {
        const fate = this.#breakages > 0 ? this.#random() : 1;
        if (fate < 0.3) this.#breakages -= 1;
        if (fate < 0.1) throw lost();
        if (fate < 0.15) return;
        if (fate < 0.2) throw new ConnectError("loading", Code.Unavailable);
        if (fate < 0.3) {
          this.#log = undefined;
          throw lost();
        }
        yield message;
        sequence = message.sequence;
      }
      if (news.some(isOver) && news.at(-1)?.chunkCount === (news.at(-1)?.chunkIndex ?? 0) + 1) return;
    }
  }

  #begin(): void {
    this.#born += 1;
    this.#log = [this.#message({ phase: Phase.QUEUED, totalSteps: 0, queuePosition: 1 }, 1)];
  }

  /** Adds a few messages: the generation does not wait for its readers. */
  #goOn(log: WireProgress[]): void {
    for (let more = 1 + Math.floor(this.#random() * 3); more > 0; more -= 1) {
      const last = log.at(-1) as WireProgress;
      if (isOver(last)) return;
      const sequence = log.length + 1;
      if (last.phase === Phase.QUEUED) log.push(this.#message({ phase: Phase.ENCODING_PROMPT }, sequence));
      else if (last.step < STEPS) log.push(this.#message(preview(last.step + 1), sequence));
      else for (const part of [0, 1]) log.push(this.#message(final(new Uint8Array([part]), part, 2), sequence));
    }
  }

  #message(message: object, sequence: number): WireProgress {
    return { ...progress(message), generationId: `g${this.#born}`, sequence: BigInt(sequence), totalSteps: STEPS };
  }
}

function isOver({ phase }: WireProgress): boolean {
  return phase === Phase.SUCCEEDED;
}

async function all(stream: AsyncIterable<Progress>): Promise<Progress[]> {
  const seen: Progress[] = [];
  for await (const each of stream) seen.push(each);
  return seen;
}

/** Follows to the end, and returns what was told and how it ended. */
async function outcome(calls: Calls, plan: Partial<Plan> = {}) {
  const clock = new QuickClock();
  const seen: Progress[] = [];
  try {
    for await (const each of follow(calls, { clock, retries: 12, timeout: undefined, ...plan }, neverLeft())) {
      seen.push(each);
    }
    return { seen, error: undefined, clock };
  } catch (error) {
    expect(error).toBeInstanceOf(CalotypeError);
    return { seen, error: error as CalotypeError, clock };
  }
}

function neverLeft(): AbortSignal {
  return new AbortController().signal;
}

/** Plays one script per call, in turn; the last one again and again. */
function scripted(...scripts: (() => AsyncGenerator<WireProgress, void, undefined>)[]) {
  const asked: string[] = [];
  const next = () => scripts[Math.min(asked.length, scripts.length) - 1] as (typeof scripts)[number];
  const calls: Calls = {
    generate: (seed) => {
      asked.push(`generate ${seed}`);
      return next();
    },
    watch: (id, afterSequence) => {
      asked.push(`watch ${id} ${afterSequence}`);
      return next();
    },
  };
  return { calls, asked };
}

function interrupted(generationId: string): WireProgress {
  const error = create(ErrorSchema, { code: Code.Unavailable, reason: "DRAINING", message: "Stopping." });
  return { ...progress({ phase: Phase.FAILED, sequence: 3n, error }), generationId };
}

function abandoned(generationId: string): WireProgress {
  const error = create(ErrorSchema, { code: Code.Canceled, reason: "ABANDONED", message: "The caller left." });
  return { ...progress({ phase: Phase.CANCELLED, sequence: 3n, error }), generationId };
}

describe("following a generation over broken connections", () => {
  it.each(Array.from({ length: 300 }, (_, seed) => seed))("gives one uninterrupted stream (%i)", async (seed) => {
    const random = chance(seed);
    const service = new Shaky(random, Math.floor(random() * 9));
    const clock = new QuickClock();
    let reconnects = 0;
    let seen: Progress[] = [];
    const plan: Plan = { clock, retries: 12, timeout: undefined, onReconnect: () => (reconnects += 1) };
    try {
      seen = await all(follow(service, plan, neverLeft()));
    } catch (error) {
      // Before its id is known there is nothing to take up.
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

  it("watches from the last message on, and does not tell again what the server repeats", async () => {
    const { calls, asked } = scripted(
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
    expect(asked).toEqual(["generate undefined", "watch g 3"]);
    expect(seen.map(({ picture }) => picture?.step)).toEqual([1, 2, 3, 3]);
  });

  it("generates again with the same seed where the server has forgotten it, and hides that it began anew", async () => {
    const { calls, asked } = scripted(
      async function* () {
        yield preview(2);
        throw lost();
      },
      // biome-ignore lint/correctness/useYield: it refuses.
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
    expect(asked).toEqual(["generate undefined", "watch g 3", "generate 42", "watch h 4"]);
    expect(seen.map(({ phase, step }) => `${phase} ${step}`)).toEqual([
      ...Array(4).fill("denoising 2"),
      "denoising 3",
      "succeeded 3",
    ]);
    expect(seen.map(({ picture }) => picture?.step)).toEqual([2, undefined, undefined, undefined, 3, 3]);
    expect(seen[1]?.queuePosition).toBe(0);
  });

  it.each([
    ["stopped in the midst", "DRAINING", interrupted],
    ["waited for it in vain", "ABANDONED", abandoned],
  ])("begins another where the server %s, but only once for the same end", async (_, reason, ended) => {
    const stopped = async function* () {
      yield preview(1);
      yield ended("g");
    };
    const { calls, asked } = scripted(stopped, async function* () {
      yield { ...final(), generationId: "h" };
    });
    expect((await outcome(calls)).seen.map(({ phase }) => phase)).toEqual(["denoising", "succeeded"]);
    expect(asked).toEqual(["generate undefined", "generate 42"]);
    const again = scripted(stopped);
    expect((await outcome(again.calls)).error).toMatchObject({ reason });
    expect(again.asked).toHaveLength(2);
  });

  it("waits for the server to be back where it stopped in the midst", async () => {
    const { calls, asked } = scripted(
      async function* () {
        yield preview(1);
        yield interrupted("g");
      },
      // biome-ignore lint/correctness/useYield: it refuses.
      async function* () {
        throw new ConnectError("draining", Code.Unavailable);
      },
      async function* () {
        yield { ...final(), generationId: "h" };
      },
    );
    expect((await outcome(calls)).error).toBeUndefined();
    expect(asked).toEqual(["generate undefined", "generate 42", "generate 42"]);
  });

  it("counts the chunks of a final picture only when all are there", async () => {
    const { calls, asked } = scripted(
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
    expect(asked[1]).toBe("watch g 4");
    expect(seen.at(-1)?.picture?.data).toEqual(new Uint8Array([1, 2]));
  });
});

describe("reconnecting", () => {
  const begunThenLost = async function* () {
    yield preview(1);
    throw lost();
  };
  // biome-ignore lint/correctness/useYield: nobody is there.
  const unreachable = async function* () {
    throw lost();
  };

  it("waits longer each time, tells so, and gives up after as many retries as allowed", async () => {
    const told: Reconnect[] = [];
    const { calls, asked } = scripted(begunThenLost, unreachable);
    const { error, clock } = await outcome(calls, { retries: 8, onReconnect: (reconnect) => told.push(reconnect) });
    expect(error).toMatchObject({ code: "UNAVAILABLE", reason: "CONNECTION_LOST" });
    expect(asked).toHaveLength(9);
    expect(clock.slept).toEqual([250, 500, 1000, 2000, 4000, 8000, 10_000, 10_000]);
    expect(told.map(({ attempt }) => attempt)).toEqual([1, 2, 3, 4, 5, 6, 7, 8]);
  });

  it("counts from the start once there is something new", async () => {
    let step = 0;
    const { calls, asked } = scripted(async function* () {
      step += 1;
      if (step === 20) yield final();
      else yield preview(step);
      throw lost();
    });
    expect((await outcome(calls, { retries: 2 })).error).toBeUndefined();
    expect(asked).toHaveLength(20);
  });

  it("gives up on a server that breaks at the same step each time", async () => {
    const { calls, asked } = scripted(begunThenLost);
    expect((await outcome(calls, { retries: 5 })).error).toMatchObject({ code: "UNAVAILABLE" });
    expect(asked).toHaveLength(6);
  });

  it("waits at least as long as the server asks for", async () => {
    const details = [{ desc: RetryInfoSchema, value: { retryDelay: { seconds: 30n } } }];
    const { calls } = scripted(
      begunThenLost,
      // biome-ignore lint/correctness/useYield: it refuses.
      async function* () {
        throw new ConnectError("", Code.Unavailable, undefined, details);
      },
      async function* () {
        yield final();
      },
    );
    expect((await outcome(calls)).clock.slept).toEqual([250, 30_000]);
  });

  it("ends with DEADLINE_EXCEEDED within the timeout", async () => {
    const { calls } = scripted(begunThenLost, unreachable);
    const { error, clock } = await outcome(calls, { timeout: 3, retries: 1e6 });
    expect(error).toMatchObject({ code: "DEADLINE_EXCEEDED" });
    expect(clock.now()).toBeLessThanOrEqual(3000);
  });

  it.each([
    ["is switched off", begunThenLost, 0, "UNAVAILABLE"],
    ["has no id yet", unreachable, 12, "UNAVAILABLE"],
  ])("does not happen where it %s", async (_, script, retries, code) => {
    const { calls, asked } = scripted(script);
    expect((await outcome(calls, { retries })).error).toMatchObject({ code });
    expect(asked).toHaveLength(1);
  });

  it("does not happen for an error of another kind", async () => {
    const { calls, asked } = scripted(async function* () {
      yield preview(1);
      throw new ConnectError("", Code.Internal);
    });
    expect((await outcome(calls)).error).toMatchObject({ code: "INTERNAL" });
    expect(asked).toHaveLength(1);
  });

  it("tells NOT_FOUND where there is only something to watch", async () => {
    const { calls } = scripted(
      // biome-ignore lint/correctness/useYield: it refuses.
      async function* () {
        throw notFound();
      },
    );
    const { error } = await outcome({ ...calls, generate: undefined }, { generationId: "g" });
    expect(error).toMatchObject({ code: "NOT_FOUND" });
  });

  it("ends at once when the caller leaves in the midst of a wait", async () => {
    const leaving = new AbortController();
    const { calls, asked } = scripted(begunThenLost);
    const clock = new QuickClock();
    const plan: Plan = { clock, retries: 12, timeout: undefined, onReconnect: () => leaving.abort("bored") };
    await expect(all(follow(calls, plan, leaving.signal))).rejects.toMatchObject({
      code: "CANCELLED",
      cause: "bored",
    });
    expect(asked).toHaveLength(1);
  });

  it("tells of a generation whose caller left before its id was known", async () => {
    const leaving = new AbortController();
    let answer = () => {};
    const { calls } = scripted(async function* () {
      await new Promise<void>((resolve) => {
        answer = resolve;
      });
      yield preview(1);
    });
    const orphan = new Promise<string>((resolve) => {
      const plan: Plan = { clock: new QuickClock(), retries: 12, timeout: undefined };
      const first = follow(calls, plan, leaving.signal, resolve).next();
      first.catch(() => answer());
      leaving.abort();
    });
    expect(await orphan).toBe("g");
  });
});

describe("the backoff", () => {
  it("has full jitter within a bound that doubles up to ten seconds", () => {
    expect([1, 2, 3].map((attempt) => backoff(attempt, 0))).toEqual([0, 0, 0]);
    expect([1, 2, 3, 6, 7, 50].map((attempt) => backoff(attempt, 1))).toEqual([250, 500, 1000, 8000, 10_000, 10_000]);
    expect(backoff(3, 0.5)).toBe(500);
  });
});
