/**
 * Follows a generation over as many connections as necessary.
 *
 * Once the generation's id is known, the client resumes after a lost connection with `Watch`, after the last message.
 * If the server no longer knows the generation, the client sends `Generate` again with the same seed and the same
 * request id, which gives the same picture.
 */

import { Assembler } from "../assembler.js";
import { type CalotypeError, cancelledHere } from "../errors.js";
import { fromCall } from "../status.js";
import type { FollowOptions, Progress } from "../types.js";
import type { Clock } from "./clock.js";
import { Connection, type OpenStream } from "./connection.js";
import { type CallFailure, type ResumeOptions, Resumption } from "./policy.js";
import { tooLate } from "./waits.js";

/** The streaming calls of one generation. `timeout` is the rest of the caller's timeout, in seconds. */
export interface StreamCalls {
  /** Starts the generation, with the seed in use once it is known. Undefined for a generation that is only watched. */
  readonly generate: ((seed: number | undefined, timeout: number | undefined) => OpenStream) | undefined;
  readonly watch: (generationId: string, afterSequence: number, timeout: number | undefined) => OpenStream;
}

export interface FollowPlan extends Omit<ResumeOptions, "canGenerate">, Pick<FollowOptions, "onReconnect"> {
  readonly clock: Clock;
}

/**
 * Yields the progress of a generation until its end.
 *
 * @param leaveSignal - Aborted when the caller leaves, at any time.
 * @param onOrphan - Called with the id of a generation whose caller left before the id was known.
 * @throws CalotypeError - The generation ended without a picture, the caller left, or reconnecting failed.
 */
export async function* follow(
  calls: StreamCalls,
  plan: FollowPlan,
  leaveSignal: AbortSignal,
  onOrphan?: (generationId: string) => void,
): AsyncGenerator<Progress, void, undefined> {
  const { clock } = plan;
  const resumption = new Resumption({ ...plan, canGenerate: calls.generate !== undefined }, clock);
  let lastError: CalotypeError | undefined;
  for (;;) {
    if (leaveSignal.aborted) throw cancelledHere(leaveSignal.reason);
    const { timeLeft } = resumption.waits;
    if (timeLeft <= 0) throw tooLate(lastError);
    const remaining = Number.isFinite(timeLeft) ? timeLeft : undefined;
    const orphanHandler = resumption.generates ? onOrphan : undefined;
    const connection = new Connection(openNext(calls, resumption, remaining), leaveSignal, orphanHandler);
    const failure = yield* readCall(connection, resumption, leaveSignal);
    if (failure === undefined) return;

    const wait = resumption.next(failure);
    if (wait === undefined) continue;
    lastError = failure.error;
    plan.onReconnect?.({ ...wait, error: failure.error });
    await clock.sleep(wait.delay * 1000, leaveSignal);
  }
}

function openNext(calls: StreamCalls, resumption: Resumption, timeout: number | undefined): OpenStream {
  const { seed, generationId = "", sequence } = resumption.continuity;
  resumption.start();
  return resumption.generates && calls.generate
    ? calls.generate(seed, timeout)
    : calls.watch(generationId, sequence, timeout);
}

/** Yields the new progress of one call. Returns why the call brought no final picture; undefined after success. */
async function* readCall(
  connection: Connection,
  resumption: Resumption,
  leaveSignal: AbortSignal,
): AsyncGenerator<Progress, CallFailure | undefined, undefined> {
  const assembler = new Assembler();
  let isReplaced = false;
  try {
    for (let message = await connection.next(); message; message = await connection.next()) {
      const progress = assembler.feed(message);
      const { error, endedByServer } = assembler;
      isReplaced = endedByServer && error !== undefined && resumption.shouldReplace(error);
      if (isReplaced) break;
      const news = progress && resumption.continuity.accept(progress);
      if (news) yield news;
      if (assembler.ended) await connection.drain();
    }
    assembler.close();
  } catch (thrown) {
    if (!assembler.ended && leaveSignal.aborted) throw cancelledHere(leaveSignal.reason);
    assembler.close(fromCall(thrown, connection.received));
  } finally {
    connection.close();
  }
  const { error, endedByServer } = assembler;
  return error && { error, endedByServer, received: connection.received, isReplaced };
}
