/** The client of one service. */

import { createClient as createConnectClient, type Transport } from "@connectrpc/connect";
import { createGrpcWebTransport } from "@connectrpc/connect-web";
import { type CallHeaders, ServiceCalls } from "./calls.js";
import { DISCONNECT_GRACE_SECONDS, RETRIES } from "./constants.js";
import { modelFromWire, phaseFromWire, requestToWire, summaryFromWire, watchToWire } from "./convert.js";
import { GenerationService } from "./gen/calotype/v1/calotype_pb.js";
import { Generation } from "./generation.js";
import { GenerationGroup } from "./group.js";
import { newRequestId } from "./request_id.js";
import { type Clock, realClock } from "./resume/clock.js";
import { type FollowPlan, follow, type StreamCalls } from "./resume/follow.js";
import { defaultStreamSlots, LocalStreamSlots } from "./stream_slots.js";
import type {
  CallOptions,
  FollowOptions,
  GenerateOptions,
  GenerationSummary,
  Model,
  Phase,
  WatchOptions,
} from "./types.js";

export interface ClientOptions extends CallHeaders {
  /** Used instead of the global `fetch`. */
  readonly fetch?: typeof globalThis.fetch;
  /**
   * Streams open at once; further streams wait. Default: 4 over HTTP/1.1 in a browser, else no limit. All tabs share
   * the four where they can coordinate, which requires TLS or localhost.
   */
  readonly maxStreams?: number;
  /** Used instead of grpc-web over `fetch`: connect's router transport in tests, or native gRPC in Node. */
  readonly transport?: Transport;
  /** Used for waits between retries instead of real time and randomness, in tests. */
  readonly clock?: Clock;
}

export interface Client {
  /**
   * Creates a generation. Nothing is sent before it is iterated or `result` is called.
   *
   * @param prompt - Describes the picture; 1 to `Model.maxPromptChars` characters.
   * @throws CalotypeError - INVALID_ARGUMENT if a number cannot be sent. Errors of the server are thrown by the loop.
   */
  generate(prompt: string, options?: GenerateOptions & FollowOptions): Generation;
  /**
   * Creates several generations of the same prompt, as a group that can be cancelled as a whole. The service draws them
   * together if it can. Nothing is sent before the group is iterated or `pictures` is called.
   *
   * @param count - Number of pictures, 1 to 64. The service rejects those that its queue cannot hold.
   * @param options - The seed is that of the first picture; each further one adds 1. `requestId` is also the id of the
   *   group.
   * @throws CalotypeError - INVALID_ARGUMENT if a number cannot be sent.
   */
  generateMany(
    prompt: string,
    count: number,
    options?: Omit<GenerateOptions, "group"> & FollowOptions,
  ): GenerationGroup;
  /**
   * Follows a generation that already exists. It yields the newest preview, or the end, and then all further progress.
   * Leaving the loop does not affect other readers.
   *
   * @throws CalotypeError - INVALID_ARGUMENT if a number cannot be sent. The loop throws NOT_FOUND if there is no such
   *   generation, or if it ended too long ago.
   */
  watch(generationId: string, options?: WatchOptions & FollowOptions): Generation;
  /**
   * Cancels a queued or running generation by its id. It is not an error if the generation has ended.
   *
   * @returns The phase of the generation before the call.
   */
  cancel(generationId: string, options?: CallOptions): Promise<Phase>;
  /**
   * Cancels all of the caller's generations of a group; with an operator's key, those of all callers. For about a
   * minute, the service rejects new members with the code CANCELLED.
   *
   * @returns The number of generations that this call cancels.
   */
  cancel(target: { readonly group: string }, options?: CallOptions): Promise<number>;
  /**
   * Ends a generation early: its current picture becomes the final one. It is not an error if the generation has ended.
   *
   * @returns The phase of the generation before the call.
   */
  finish(generationId: string, options?: CallOptions): Promise<Phase>;
  /**
   * Lists the caller's own generations that are running or still kept by the server, newest first.
   *
   * @param options - `pageSize`: generations per call, 1 to 100.
   */
  generations(
    options?: CallOptions & { readonly pageSize?: number },
  ): AsyncGenerator<GenerationSummary, void, undefined>;
  /** Describes the loaded model: sizes, limits, defaults, schedulers. Waits while the model loads. */
  getModel(options?: CallOptions): Promise<Model>;
}

/**
 * Creates a client for a Calotype service.
 *
 * @param baseUrl - Address of its grpc-web port, such as `http://localhost:8080`. Empty or `/` in a page that the
 *   service serves itself.
 */
export function createClient(baseUrl: string, options: ClientOptions = {}): Client {
  const root = baseUrl.replace(/\/+$/, "");
  const transport =
    options.transport ?? createGrpcWebTransport({ baseUrl: root, ...(options.fetch && { fetch: options.fetch }) });
  const slots = options.maxStreams === undefined ? defaultStreamSlots(root) : new LocalStreamSlots(options.maxStreams);
  const clock = options.clock ?? realClock;
  const calls = new ServiceCalls(createConnectClient(GenerationService, transport), slots, options, clock);
  return new ServiceClient(calls, clock);
}

class ServiceClient implements Client {
  readonly #calls: ServiceCalls;
  readonly #clock: Clock;

  constructor(calls: ServiceCalls, clock: Clock) {
    this.#calls = calls;
    this.#clock = clock;
  }

  generate(prompt: string, options: GenerateOptions & FollowOptions = {}): Generation {
    return this.#generate(prompt, options, (id) => this.cancel(id, inBackground(options)));
  }

  generateMany(
    prompt: string,
    count: number,
    options: Omit<GenerateOptions, "group"> & FollowOptions = {},
  ): GenerationGroup {
    return new GenerationGroup(count, options, {
      generate: (member, cancel) => this.#generate(prompt, member, cancel),
      cancel: (id) => this.cancel(id, inBackground(options)),
      cancelGroup: (group) => this.cancel({ group }, inBackground(options)),
    });
  }

  #generate(
    prompt: string,
    options: GenerateOptions & FollowOptions,
    cancel: (generationId: string) => Promise<unknown>,
  ): Generation {
    const { retries = RETRIES } = options;
    const isDefaultGrace = retries > 0 && options.onDisconnect === undefined && options.disconnectGrace === undefined;
    const request = requestToWire(prompt, {
      ...options,
      ...(isDefaultGrace && { onDisconnect: "cancel", disconnectGrace: DISCONNECT_GRACE_SECONDS }),
      ...(retries > 0 && { requestId: options.requestId || newRequestId() }),
    });
    const streamCalls = (leaveSignal: AbortSignal): StreamCalls => ({
      generate: (seed, timeout) => {
        const seeded = seed === undefined ? request : { ...request, seed: BigInt(seed) };
        return this.#calls.generate(seeded, streamOptions(options, timeout), leaveSignal);
      },
      watch: (generationId, afterSequence, timeout) => {
        const watch = watchToWire(generationId, { ...options, afterSequence });
        return this.#calls.watch(watch, streamOptions(options, timeout), leaveSignal);
      },
    });
    const plan = { ...followPlan(options), retries, clock: this.#clock };
    return new Generation(
      {
        follow: (leaveSignal, onOrphan) => follow(streamCalls(leaveSignal), plan, leaveSignal, onOrphan),
        cancel,
        cancelsOnLeave: isDefaultGrace,
      },
      options.signal,
    );
  }

  watch(generationId: string, options: WatchOptions & FollowOptions = {}): Generation {
    const { retries = RETRIES, afterSequence = 0 } = options;
    const request = watchToWire(generationId, options);
    const streamCalls = (leaveSignal: AbortSignal): StreamCalls => ({
      generate: undefined,
      watch: (_, sequence, timeout) => {
        const watch = { ...request, afterSequence: BigInt(sequence) };
        return this.#calls.watch(watch, streamOptions(options, timeout), leaveSignal);
      },
    });
    const plan = { ...followPlan(options), generationId, afterSequence, retries, clock: this.#clock };
    return new Generation(
      {
        follow: (leaveSignal) => follow(streamCalls(leaveSignal), plan, leaveSignal),
        cancel: (id) => this.cancel(id, inBackground(options)),
        cancelsOnLeave: false,
      },
      options.signal,
      generationId,
    );
  }

  cancel(generationId: string, options?: CallOptions): Promise<Phase>;
  cancel(target: { readonly group: string }, options?: CallOptions): Promise<number>;
  async cancel(target: string | { readonly group: string }, options: CallOptions = {}): Promise<Phase | number> {
    if (typeof target !== "string") return (await this.#calls.cancel(target, options)).cancelledCount;
    return phaseFromWire((await this.#calls.cancel({ generationId: target }, options)).phase);
  }

  async finish(generationId: string, options: CallOptions = {}): Promise<Phase> {
    return phaseFromWire((await this.#calls.finish(generationId, options)).phase);
  }

  async *generations(
    options: CallOptions & { readonly pageSize?: number } = {},
  ): AsyncGenerator<GenerationSummary, void, undefined> {
    const { pageSize } = options;
    let pageToken = "";
    do {
      const request = { pageToken, ...(pageSize !== undefined && { pageSize }) };
      const page = await this.#calls.listGenerations(request, options);
      for (const summary of page.generations) yield summaryFromWire(summary);
      pageToken = page.nextPageToken;
    } while (pageToken !== "");
  }

  async getModel(options: CallOptions = {}): Promise<Model> {
    return modelFromWire(await this.#calls.getModel(options));
  }
}

function followPlan(options: FollowOptions): Omit<FollowPlan, "retries" | "clock"> {
  const { timeout, loadingTimeout, waitForServer, onReconnect } = options;
  return { timeout, loadingTimeout, waitForServer, ...(onReconnect && { onReconnect }) };
}

/** The options of a single stream. It gets no `signal`: the generation decides when to leave it. */
function streamOptions(options: FollowOptions, timeout: number | undefined): FollowOptions {
  const { stallTimeout } = options;
  return {
    ...headersOf(options),
    ...(timeout !== undefined && { timeout }),
    ...(stallTimeout !== undefined && { stallTimeout }),
  };
}

/** The options of a cancel whose caller has left. It waits for nothing, which would keep a process alive. */
function inBackground(options: CallOptions): CallOptions {
  return { ...headersOf(options), loadingTimeout: 0 };
}

function headersOf({ headers }: CallOptions): CallOptions {
  return headers === undefined ? {} : { headers };
}
