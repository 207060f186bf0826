/** The client: one service, and what one may ask of it. */

import { createClient as createConnectClient, type Transport } from "@connectrpc/connect";
import { createGrpcWebTransport } from "@connectrpc/connect-web";
import { type Clock, realClock } from "./resume/clock.js";
import { modelFromWire, phaseFromWire, requestToWire, summaryFromWire, watchToWire } from "./convert.js";
import { CalotypeError, cancelledHere } from "./errors.js";
import { type Calls, follow } from "./resume/follow.js";
import { GenerationService } from "./gen/calotype/v1/calotype_pb.js";
import { Generation } from "./generation.js";
import { newRequestId } from "./request_id.js";
import { defaultLines, type Lines, OwnLines } from "./stream_slots.js";
import { STALL_TIMEOUT, unlessSilent } from "./resume/stall_timeout.js";
import { fromCall } from "./status.js";
import type {
  CallOptions,
  FollowOptions,
  GenerateOptions,
  GenerationSummary,
  Model,
  Phase,
  WatchOptions,
} from "./types.js";

export interface ClientOptions {
  /** Used instead of the global `fetch`. */
  readonly fetch?: typeof globalThis.fetch;
  /**
   * For a service that asks for one; a function is asked before each call, where the key comes later or changes. A page
   * shows it to whoever uses the page: give each person their own, or call through a server of yours.
   */
  readonly apiKey?: string | (() => string | undefined);
  /** Sent with every call. */
  readonly headers?: HeadersInit;
  /**
   * Streams open at once; more wait for their turn. Default: over HTTP/1.1 in a browser four, over all tabs where they
   * can agree, which takes TLS or localhost; else no limit.
   */
  readonly maxStreams?: number;
  /** Used instead of grpc-web over `fetch`: connect's router transport in tests, or native gRPC in Node. */
  readonly transport?: Transport;
  /** Used instead of the real time and chance between reconnects, in tests. */
  readonly clock?: Clock;
}

export interface Client {
  /**
   * Makes a generation. Nothing is sent before it is iterated, or its `result` asked for.
   *
   * @param prompt - Describes the picture; 1 to `Model.maxPromptChars` characters.
   * @throws CalotypeError - INVALID_ARGUMENT, when a number cannot be sent; what the server refuses, the loop throws.
   */
  generate(prompt: string, options?: GenerateOptions & FollowOptions): Generation;
  /**
   * Follows a generation that somebody has started: the newest preview again, or the end, and then whatever comes.
   * Leaving it leaves it to the others.
   *
   * @throws CalotypeError - INVALID_ARGUMENT, when a number cannot be sent. The loop throws NOT_FOUND when there is no
   *   such generation, or it ended too long ago.
   */
  watch(generationId: string, options?: WatchOptions & FollowOptions): Generation;
  /**
   * Cancels a queued or running generation by its id. One that has ended is not an error.
   *
   * @returns The phase in which it was found.
   */
  cancel(generationId: string, options?: CallOptions): Promise<Phase>;
  /**
   * Ends a generation early with the picture as it is, which becomes the final one. One that has ended is not an error.
   *
   * @returns The phase in which it was found.
   */
  finish(generationId: string, options?: CallOptions): Promise<Phase>;
  /**
   * Lists the caller's own generations that run or have not been forgotten yet, the newest first.
   *
   * @param options - `pageSize`: how many to ask for at a time, 1 to 100.
   */
  generations(
    options?: CallOptions & { readonly pageSize?: number },
  ): AsyncGenerator<GenerationSummary, void, undefined>;
  /** Describes the loaded model: sizes, limits, defaults, schedulers. */
  getModel(options?: CallOptions): Promise<Model>;
}

/** How often a lost connection is taken up again, when the caller does not say. Some 40 seconds in the mean. */
const RETRIES = 12;

/** How long a server waits for us after a lost connection, when the caller does not say. Seconds. */
const GRACE = 10;

/**
 * Makes a client for a Calotype service.
 *
 * @param baseUrl - Where it serves grpc-web, such as `http://localhost:8080`; empty or `/` in a page that it served.
 */
export function createClient(baseUrl: string, options: ClientOptions = {}): Client {
  const root = baseUrl.replace(/\/+$/, "");
  const transport =
    options.transport ?? createGrpcWebTransport({ baseUrl: root, ...(options.fetch && { fetch: options.fetch }) });
  const calls = createConnectClient(GenerationService, transport);
  const lines = options.maxStreams === undefined ? defaultLines(root) : new OwnLines(options.maxStreams);
  const clock = options.clock ?? realClock;
  const callOptions = ({ headers, timeout, signal }: CallOptions) => {
    const merged = new Headers(options.headers);
    const key = typeof options.apiKey === "function" ? options.apiKey() : options.apiKey;
    if (key) merged.set("authorization", `Bearer ${key}`);
    for (const [name, value] of new Headers(headers)) merged.set(name, value);
    return {
      headers: merged,
      ...(signal && { signal }),
      ...(timeout !== undefined && { timeoutMs: Math.ceil(timeout * 1000) }),
    };
  };
  const unary = async <T>(call: () => Promise<T>, signal: AbortSignal | undefined): Promise<T> => {
    try {
      return await call();
    } catch (thrown) {
      throw signal?.aborted ? cancelledHere(signal.reason) : fromCall(thrown, false);
    }
  };
  const cancel = (generationId: string, given: CallOptions = {}) =>
    unary(async () => phaseFromWire((await calls.cancel({ generationId }, callOptions(given))).phase), given.signal);

  /** Makes a stream that waits for a line of its own, unless the caller leaves before. */
  const onLine = <T>(
    call: (options: ReturnType<typeof callOptions>) => AsyncIterable<T>,
    given: FollowOptions,
    leaving: AbortSignal,
  ) =>
    async function* (signal: AbortSignal): AsyncGenerator<T, void, undefined> {
      const { timeout, stallTimeout = STALL_TIMEOUT } = given;
      const asked = performance.now();
      const release = await waitForLine(lines, AbortSignal.any([signal, leaving]), timeout);
      const left = timeout === undefined ? {} : { timeout: timeout - (performance.now() - asked) / 1000 };
      try {
        yield* unlessSilent(call(callOptions({ ...given, ...left, signal })), stallTimeout);
      } finally {
        release();
      }
    };

  return {
    generate(prompt, given = {}) {
      const { retries = RETRIES } = given;
      const isOurChoice = retries > 0 && given.onDisconnect === undefined && given.disconnectGrace === undefined;
      const request = requestToWire(prompt, {
        ...given,
        ...(isOurChoice && { onDisconnect: "cancel", disconnectGrace: GRACE }),
        ...(retries > 0 && { requestId: given.requestId || newRequestId() }),
      });
      const reach = (leaving: AbortSignal): Calls => ({
        generate: (seed, timeout) => {
          const seeded = seed === undefined ? request : { ...request, seed: BigInt(seed) };
          return onLine((how) => calls.generate(seeded, how), withTimeout(given, timeout), leaving);
        },
        watch: (generationId, afterSequence, timeout) => {
          const watch = watchToWire(generationId, { ...given, afterSequence });
          return onLine((how) => calls.watch(watch, how), withTimeout(given, timeout), leaving);
        },
      });
      return new Generation(
        {
          follow: (leaving, onOrphan) => follow(reach(leaving), { ...given, retries, clock }, leaving, onOrphan),
          cancel: (id) => cancel(id, headersOf(given)),
          cancelsWhenLeft: isOurChoice,
        },
        given.signal,
      );
    },

    watch(generationId, given = {}) {
      const { retries = RETRIES } = given;
      const request = watchToWire(generationId, given);
      const reach = (leaving: AbortSignal): Calls => ({
        generate: undefined,
        watch: (_, afterSequence, timeout) => {
          const watch = { ...request, afterSequence: BigInt(afterSequence) };
          return onLine((how) => calls.watch(watch, how), withTimeout(given, timeout), leaving);
        },
      });
      return new Generation(
        {
          follow: (leaving) => follow(reach(leaving), { ...given, generationId, retries, clock }, leaving),
          cancel: (id) => cancel(id, headersOf(given)),
          cancelsWhenLeft: false,
        },
        given.signal,
        generationId,
      );
    },

    cancel,
    finish: (generationId, given = {}) =>
      unary(async () => phaseFromWire((await calls.finish({ generationId }, callOptions(given))).phase), given.signal),

    async *generations(given = {}) {
      const { pageSize } = given;
      let pageToken = "";
      do {
        const request = { pageToken, ...(pageSize !== undefined && { pageSize }) };
        const page = await unary(() => calls.listGenerations(request, callOptions(given)), given.signal);
        for (const summary of page.generations) yield summaryFromWire(summary);
        pageToken = page.nextPageToken;
      } while (pageToken !== "");
    },

    getModel: (given = {}) =>
      unary(async () => modelFromWire(await calls.getModel({}, callOptions(given))), given.signal),
  };
}

/** Takes a line within `timeout` seconds. */
async function waitForLine(lines: Lines, signal: AbortSignal, timeout: number | undefined): Promise<() => void> {
  if (timeout === undefined) return lines.take(signal);
  try {
    return await lines.take(AbortSignal.any([signal, AbortSignal.timeout(timeout * 1000)]));
  } catch (reason) {
    if (signal.aborted) throw reason;
    throw new CalotypeError("DEADLINE_EXCEEDED", "No connection became free in time.");
  }
}

/** How a stream is called; leaving it is not the call's affair. */
function withTimeout(given: FollowOptions, timeout: number | undefined): FollowOptions {
  const { stallTimeout } = given;
  return {
    ...headersOf(given),
    ...(timeout !== undefined && { timeout }),
    ...(stallTimeout !== undefined && { stallTimeout }),
  };
}

function headersOf({ headers }: CallOptions): CallOptions {
  return headers === undefined ? {} : { headers };
}
