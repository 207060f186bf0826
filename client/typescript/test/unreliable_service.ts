/** Calls that fail as a test requires, and a clock that does not wait. */

import { Code, ConnectError } from "@connectrpc/connect";
import { expect } from "vitest";
import { RETRIES } from "../src/constants.js";
import { Phase, type Progress as WireProgress } from "../src/gen/calotype/v1/calotype_pb.js";
import { CalotypeError, type Progress } from "../src/index.js";
import type { Clock } from "../src/resume/clock.js";
import { type FollowPlan, follow, type StreamCalls } from "../src/resume/follow.js";
import { final, preview, progress } from "./stub_server.js";

/** Returns a generator of reproducible random numbers from 0 to 1. */
export function seededRandom(seed: number): () => number {
  let state = seed * 2_654_435_761 + 1;
  return () => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return state / 2 ** 32;
  };
}

/** A clock whose `sleep` returns at once, and which records the durations. */
export class FakeClock implements Clock {
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
export const SEED = 42n;
export const lost = () =>
  new ConnectError("lost", Code.Unavailable, undefined, undefined, new TypeError("network error"));
export const notFound = () => new ConnectError("no such generation", Code.NotFound);

/** A service with one generation. Its connections break, and it restarts, at random. */
export class UnreliableService implements StreamCalls {
  readonly seeds: (number | undefined)[] = [];
  readonly #random: () => number;
  #faultsLeft: number;
  #generationCount = 0;
  /** Events of the generation, in order; undefined if the service has no generation. */
  #events: WireProgress[] | undefined;

  constructor(random: () => number, faults: number) {
    this.#random = random;
    this.#faultsLeft = faults;
  }

  readonly generate = (seed: number | undefined) => {
    this.seeds.push(seed);
    return () => this.#serve(undefined, 0);
  };

  readonly watch = (id: string, afterSequence: number) => () => this.#serve(id, afterSequence);

  async *#serve(id: string | undefined, afterSequence: number): AsyncGenerator<WireProgress, void, undefined> {
    if (id === undefined && this.#events === undefined) this.#start();
    const events = this.#events;
    if (!events || (id !== undefined && events[0]?.generationId !== id)) throw notFound();
    let sequence = BigInt(afterSequence);
    for (;;) {
      this.#advance(events);
      const news = events.filter((message) => message.sequence > sequence);
      // For a slow reader, only the newest of the pending previews is kept.
      for (const message of this.#random() < 0.5 ? news : news.filter((each) => isOver(each) || each === news.at(-1))) {
        const chance = this.#faultsLeft > 0 ? this.#random() : 1;
        if (chance < 0.3) this.#faultsLeft -= 1;
        if (chance < 0.1) throw lost();
        if (chance < 0.15) return;
        if (chance < 0.2) throw new ConnectError("loading", Code.Unavailable);
        if (chance < 0.3) {
          this.#events = undefined;
          throw lost();
        }
        yield message;
        sequence = message.sequence;
      }
      if (news.some(isOver) && news.at(-1)?.chunkCount === (news.at(-1)?.chunkIndex ?? 0) + 1) return;
    }
  }

  #start(): void {
    this.#generationCount += 1;
    this.#events = [this.#message({ phase: Phase.QUEUED, totalSteps: 0, queuePosition: 1 }, 1)];
  }

  /** Adds a few events: the generation does not wait for its readers. */
  #advance(events: WireProgress[]): void {
    for (let more = 1 + Math.floor(this.#random() * 3); more > 0; more -= 1) {
      const last = events.at(-1) as WireProgress;
      if (isOver(last)) return;
      const sequence = events.length + 1;
      if (last.phase === Phase.QUEUED) events.push(this.#message({ phase: Phase.ENCODING_PROMPT }, sequence));
      else if (last.step < STEPS) events.push(this.#message(preview(last.step + 1), sequence));
      else for (const part of [0, 1]) events.push(this.#message(final(new Uint8Array([part]), part, 2), sequence));
    }
  }

  #message(message: object, sequence: number): WireProgress {
    return {
      ...progress(message),
      generationId: `g${this.#generationCount}`,
      sequence: BigInt(sequence),
      totalSteps: STEPS,
    };
  }
}

function isOver({ phase }: WireProgress): boolean {
  return phase === Phase.SUCCEEDED;
}

/** Follows a generation to its end. Returns the progress and the error, if any. */
export async function outcome(calls: StreamCalls, plan: Partial<FollowPlan> = {}) {
  const clock = new FakeClock();
  const seen: Progress[] = [];
  try {
    for await (const each of follow(calls, { clock, retries: RETRIES, ...plan }, neverAborted())) {
      seen.push(each);
    }
    return { seen, error: undefined, clock };
  } catch (error) {
    expect(error).toBeInstanceOf(CalotypeError);
    return { seen, error: error as CalotypeError, clock };
  }
}

export function neverAborted(): AbortSignal {
  return new AbortController().signal;
}

/** Plays one script per call, in order, and then repeats the last one. Records the calls. */
export function scripted(...scripts: (() => AsyncGenerator<WireProgress, void, undefined>)[]) {
  const requested: string[] = [];
  const next = () => scripts[Math.min(requested.length, scripts.length) - 1] as (typeof scripts)[number];
  const calls: StreamCalls = {
    generate: (seed) => {
      requested.push(`generate ${seed}`);
      return next();
    },
    watch: (id, afterSequence) => {
      requested.push(`watch ${id} ${afterSequence}`);
      return next();
    },
  };
  return { calls, requested };
}
