/** Several generations of one prompt: iterate over all of them, await their pictures, or cancel them together. */

import { MAX_MEMBERS } from "./constants.js";
import { CalotypeError, cancelledHere } from "./errors.js";
import type { Generation } from "./generation.js";
import { newRequestId } from "./request_id.js";
import type { FollowOptions, GenerateOptions, MemberProgress, Picture, Progress } from "./types.js";

/** The calls that a group makes. */
export interface GroupCalls {
  /** Creates a member. `cancel` is called to cancel it on the server. */
  generate(options: GenerateOptions & FollowOptions, cancel: (generationId: string) => Promise<unknown>): Generation;
  /** Cancels one generation on the server. */
  cancel(generationId: string): Promise<unknown>;
  /** Cancels all members on the server, also those that arrive later. */
  cancelGroup(group: string): Promise<unknown>;
}

/**
 * Several generations, which start when the group is iterated or when `pictures` or `outcomes` is called.
 *
 * Iterate over the group once to receive the progress of all members as it arrives, or over its `generations`. When a
 * member fails, the others continue: the loop ends when all have ended, and `pictures` or `outcomes` report errors.
 * Leaving the loop early cancels all members with one call, unless the options say otherwise.
 */
export class GenerationGroup implements AsyncIterable<MemberProgress> {
  /** For `cancel` of the client. */
  readonly id: string;
  /** The members, in the order of their seeds. */
  readonly generations: readonly Generation[];
  readonly #cancelGroup: () => Promise<unknown>;
  readonly #outcomes: (Picture | CalotypeError)[] = [];
  #iterated = false;
  #isLeaving = false;
  #cancelled: Promise<unknown> | undefined;
  #settled: Promise<void>;
  #settle: () => void = () => {};

  /** @throws CalotypeError - INVALID_ARGUMENT if a number cannot be sent. */
  constructor(count: number, options: Omit<GenerateOptions, "group"> & FollowOptions, calls: GroupCalls) {
    if (!(Number.isInteger(count) && count >= 1 && count <= MAX_MEMBERS)) {
      const description = `is ${count}, must be 1 to ${MAX_MEMBERS}`;
      const violations = [{ field: "count", description }];
      throw new CalotypeError("INVALID_ARGUMENT", `count ${description}`, { reason: "INVALID_REQUEST", violations });
    }
    const { seed, requestId, signal } = options;
    this.id = requestId || newRequestId();
    this.#cancelGroup = () => calls.cancelGroup(this.id);
    this.#settled = new Promise((resolve) => {
      this.#settle = resolve;
    });
    const cancel = (id: string) => (this.#isLeaving || signal?.aborted ? this.#cancelOnce() : calls.cancel(id));
    this.generations = Array.from({ length: count }, (_, index) =>
      calls.generate(
        {
          ...options,
          group: this.id,
          ...(seed !== undefined && seed >= 0 && { seed: seed + index }),
          ...(requestId ? { requestId: `${requestId}/${index}` } : {}),
        },
        cancel,
      ),
    );
  }

  /** Whether all members have ended, or the caller has left them. */
  get done(): boolean {
    return this.generations.every(({ done }) => done);
  }

  /** Cancels all members on the server with one call, and leaves them. Does nothing after their end. */
  cancel(): void {
    this.#isLeaving = true;
    for (const generation of this.generations) generation.cancel();
  }

  /**
   * Waits for the end of all members and returns their pictures, in the order of `generations`. Can be called again.
   *
   * @throws CalotypeError - The error of the first member without a picture. `outcomes` returns the other pictures.
   */
  async pictures(): Promise<Picture[]> {
    return (await this.outcomes()).map((outcome) => {
      if (outcome instanceof CalotypeError) throw outcome;
      return outcome;
    });
  }

  /**
   * Waits for the end of all members and returns the picture or the error of each, in the order of `generations`. Can be
   * called again.
   */
  async outcomes(): Promise<(Picture | CalotypeError)[]> {
    if (!this.#iterated) {
      for await (const _ of this) {
        // Only the ends matter.
      }
    }
    await this.#settled;
    return [...this.#outcomes];
  }

  [Symbol.asyncIterator](): AsyncGenerator<MemberProgress, void, undefined> {
    if (this.#iterated) throw new TypeError("A group can be iterated only once. Call `generateMany` for another.");
    this.#iterated = true;
    const members = this.generations.map((generation) => generation[Symbol.asyncIterator]());
    const steps = this.#merge(members);
    const end = steps.return.bind(steps);
    // As for a generation: leave the calls before the pending step ends.
    steps.return = (value) => {
      this.#leave(members);
      return end(value);
    };
    return steps;
  }

  async *#merge(
    members: readonly AsyncGenerator<Progress, void, undefined>[],
  ): AsyncGenerator<MemberProgress, void, undefined> {
    const pending = new Map<number, Promise<{ index: number; progress: Progress | undefined }>>();
    const read = (index: number, member: AsyncGenerator<Progress, void, undefined>) => {
      pending.set(index, this.#next(index, member));
    };
    try {
      members.forEach((member, index) => {
        read(index, member);
      });
      while (pending.size > 0) {
        const { index, progress } = await Promise.race(pending.values());
        pending.delete(index);
        if (!progress) continue;
        yield { index, progress };
        // The member moves to the end of the map, so that all members have their turn.
        const member = members[index];
        if (member) read(index, member);
      }
    } finally {
      this.#leave(members);
      this.generations.forEach((_, index) => {
        this.#outcomes[index] ??= cancelledHere();
      });
      this.#settle();
    }
  }

  /** Reads a member. No progress means that it has ended. */
  async #next(
    index: number,
    member: AsyncGenerator<Progress, void, undefined>,
  ): Promise<{ index: number; progress: Progress | undefined }> {
    try {
      const result = await member.next();
      if (result.done) return { index, progress: undefined };
      const progress = result.value;
      if (progress.picture?.kind === "final") this.#outcomes[index] = progress.picture;
      return { index, progress };
    } catch (thrown) {
      if (!(thrown instanceof CalotypeError)) throw thrown;
      this.#outcomes[index] = thrown;
      return { index, progress: undefined };
    }
  }

  #leave(members: readonly AsyncGenerator<Progress, void, undefined>[]): void {
    this.#isLeaving = true;
    for (const member of members) void member.return().catch(() => undefined);
  }

  #cancelOnce(): Promise<unknown> {
    this.#cancelled ??= this.#cancelGroup();
    return this.#cancelled;
  }
}
