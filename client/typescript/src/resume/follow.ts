/**
 * Follows a generation over as many connections as it takes.
 *
 * Once its id is known, a lost connection is taken up by `Watch`, from the last message on. A server that has forgotten
 * the generation is asked to generate again with the same seed and the same request id, which gives the same picture.
 */

import { Assembler } from "../assembler.js";
import { backoff, type Clock } from "./clock.js";
import { Connection, type Open } from "./connection.js";
import { Continuity } from "./continuity.js";
import { CalotypeError, cancelledHere } from "../errors.js";
import { fromCall } from "../status.js";
import type { FollowOptions, Progress } from "../types.js";

/** The calls of one generation. `timeout` is what is left of the caller's, in seconds. */
export interface Calls {
  /** Begins it, with the seed in use where it is known. Undefined where there is only something to watch. */
  readonly generate: ((seed: number | undefined, timeout: number | undefined) => Open) | undefined;
  /** Takes it up. */
  readonly watch: (generationId: string, afterSequence: number, timeout: number | undefined) => Open;
}

export interface Plan extends Pick<FollowOptions, "timeout" | "onReconnect"> {
  readonly clock: Clock;
  readonly retries: number;
  /** What to watch from the start. */
  readonly generationId?: string;
  readonly afterSequence?: number;
}

/**
 * Yields the progress of a generation to its end.
 *
 * @param leaving - Aborted when the caller leaves, at any time.
 * @param onOrphan - Told of a generation whose caller left before its id was known.
 * @throws CalotypeError - It ended without a picture, was left, or its connection is lost for good.
 */
export async function* follow(
  calls: Calls,
  plan: Plan,
  leaving: AbortSignal,
  onOrphan?: (generationId: string) => void,
): AsyncGenerator<Progress, void, undefined> {
  const { clock, timeout } = plan;
  const continuity = new Continuity(plan.generationId, plan.afterSequence);
  const deadline = timeout === undefined ? Number.POSITIVE_INFINITY : clock.now() + timeout * 1000;
  let begins = plan.generationId === undefined;
  let failures = 0;
  /** The generation that ended for the server's own reasons: for another one only, another one is begun. */
  let interrupted: string | undefined;
  const beginsAnother = ({ code, reason }: CalotypeError, generationId: string) =>
    (code === "UNAVAILABLE" || reason === "ABANDONED") &&
    calls.generate &&
    plan.retries > 0 &&
    generationId !== interrupted;

  for (;;) {
    if (leaving.aborted) throw cancelledHere(leaving.reason);
    const remaining = timeout === undefined ? undefined : (deadline - clock.now()) / 1000;
    if (remaining !== undefined && remaining <= 0) throw new CalotypeError("DEADLINE_EXCEEDED", TOO_LATE);
    const open =
      begins && calls.generate
        ? calls.generate(continuity.seed, remaining)
        : calls.watch(continuity.generationId ?? "", continuity.position, remaining);
    const connection = new Connection(open, leaving, begins ? onOrphan : undefined);
    const assembler = new Assembler();
    const known = continuity.news;
    let another: string | undefined;
    try {
      for (let message = await connection.next(); message; message = await connection.next()) {
        const whole = assembler.feed(message);
        if (assembler.told && assembler.error && beginsAnother(assembler.error, message.generationId)) {
          another = message.generationId;
          break;
        }
        const told = whole && continuity.accept(whole);
        if (told) yield told;
        if (assembler.ended) await connection.drain();
      }
      assembler.close();
    } catch (thrown) {
      if (!assembler.ended && leaving.aborted) throw cancelledHere(leaving.reason);
      assembler.close(fromCall(thrown, connection.begun));
    } finally {
      connection.close();
    }

    const { error } = assembler;
    if (error === undefined) return;
    if (continuity.news > known) failures = 0;
    failures += 1;
    // Whoever falls silent before the first message may have heard the request, which the same id does not begin twice.
    const isHeard = continuity.generationId !== undefined || error.reason === "STALLED";
    if (!isHeard || failures > plan.retries) throw asLoss(error, continuity);
    if (another !== undefined) {
      interrupted = another;
      begins = true;
    } else if (assembler.told) throw error;
    else if (error.code === "NOT_FOUND" && !begins && calls.generate) {
      begins = true;
      continue;
    } else if (isLost(error)) begins = begins && !connection.begun;
    else throw error;

    const left = deadline - clock.now();
    const wait = Math.max(Math.min(backoff(failures, clock.random()), left / 2), (error.retryAfter ?? 0) * 1000);
    if (wait >= left) throw new CalotypeError("DEADLINE_EXCEEDED", TOO_LATE, { cause: error });
    plan.onReconnect?.({ attempt: failures, delay: wait / 1000, error });
    await clock.sleep(wait, leaving);
  }
}

const TOO_LATE = "The connection was lost, and there was no time left to take it up again.";

/** Nobody answers at the last attempt, but what has happened to the caller is that a connection was lost. */
function asLoss(error: CalotypeError, { news }: Continuity): CalotypeError {
  if (error.reason !== "UNREACHABLE" || news === 0) return error;
  return new CalotypeError("UNAVAILABLE", "The connection was lost.", { reason: "CONNECTION_LOST", cause: error });
}

/** What passes by itself. After a restart everybody comes back at once, and begins again what was lost. */
const PASSING = [
  "STREAM_INCOMPLETE",
  "QUEUE_FULL",
  "REQUESTS_PER_MINUTE",
  "PIXEL_STEPS_PER_MINUTE",
  "CONCURRENT_GENERATIONS",
];

/** Whether another connection may help. */
function isLost({ code, reason }: CalotypeError): boolean {
  return code === "UNAVAILABLE" || PASSING.includes(reason);
}
