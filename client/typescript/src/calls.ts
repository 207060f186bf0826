/** The calls to one service: adds headers, timeouts and stream slots, and translates errors. */

import type { Client as ConnectClient } from "@connectrpc/connect";
import { CONTROL_TIMEOUT_SECONDS, RETRIES, STALL_TIMEOUT_SECONDS } from "./constants.js";
import { CalotypeError, cancelledHere } from "./errors.js";
import type * as wire from "./gen/calotype/v1/calotype_pb.js";
import type { Clock } from "./resume/clock.js";
import type { OpenStream } from "./resume/connection.js";
import { withStallTimeout } from "./resume/stall_timeout.js";
import { isLoading, isUnreached, tooLate, Waits } from "./resume/waits.js";
import { fromCall } from "./status.js";
import type { StreamSlots } from "./stream_slots.js";
import type { CallOptions, FollowOptions } from "./types.js";

export interface CallHeaders {
  /**
   * API key, for a service that requires one. A function is called before each call, for a key that is entered later
   * or changes. Users of a page can read its key, so give each person their own, or call through your own server.
   */
  readonly apiKey?: string | (() => string | undefined);
  /** Sent with every call. */
  readonly headers?: HeadersInit;
}

interface ConnectCallOptions {
  readonly headers: Headers;
  readonly signal?: AbortSignal;
  readonly timeoutMs?: number;
}

type Stub = ConnectClient<typeof wire.GenerationService>;

export class ServiceCalls {
  readonly #stub: Stub;
  readonly #slots: StreamSlots;
  readonly #headers: CallHeaders;
  readonly #clock: Clock;

  constructor(stub: Stub, slots: StreamSlots, headers: CallHeaders, clock: Clock) {
    this.#stub = stub;
    this.#slots = slots;
    this.#headers = headers;
    this.#clock = clock;
  }

  generate(request: wire.GenerateRequest, options: FollowOptions, leaveSignal: AbortSignal): OpenStream {
    return this.#stream((callOptions) => this.#stub.generate(request, callOptions), options, leaveSignal);
  }

  watch(request: wire.WatchRequest, options: FollowOptions, leaveSignal: AbortSignal): OpenStream {
    return this.#stream((callOptions) => this.#stub.watch(request, callOptions), options, leaveSignal);
  }

  cancel(
    target: Partial<Pick<wire.CancelRequest, "generationId" | "group">>,
    options: CallOptions,
  ): Promise<wire.CancelResponse> {
    return this.#unary((callOptions) => this.#stub.cancel(target, callOptions), options);
  }

  finish(generationId: string, options: CallOptions): Promise<wire.FinishResponse> {
    return this.#unary((callOptions) => this.#stub.finish({ generationId }, callOptions), options);
  }

  listGenerations(
    request: Partial<Pick<wire.ListGenerationsRequest, "pageSize" | "pageToken">>,
    options: CallOptions,
  ): Promise<wire.ListGenerationsResponse> {
    return this.#unary((callOptions) => this.#stub.listGenerations(request, callOptions), options);
  }

  getModel(options: CallOptions): Promise<wire.Model> {
    return this.#unary((callOptions) => this.#stub.getModel({}, callOptions), options);
  }

  /** Makes a call that is not a stream. Waits while the service loads its model. */
  async #unary<T>(call: (options: ConnectCallOptions) => Promise<T>, options: CallOptions): Promise<T> {
    const { signal = new AbortController().signal, onReconnect } = options;
    const waits = new Waits({ retries: RETRIES, ...options }, this.#clock);
    let lastError: CalotypeError | undefined;
    for (;;) {
      const { timeLeft } = waits;
      if (timeLeft <= 0) throw tooLate(lastError);
      const timeout = options.timeout === undefined ? CONTROL_TIMEOUT_SECONDS : timeLeft;
      try {
        return await call(this.#callOptions({ ...options, timeout }));
      } catch (thrown) {
        if (signal.aborted) throw cancelledHere(signal.reason);
        const error = fromCall(thrown, false);
        if (!isLoading(error) && !isUnreached(error)) throw error;
        const wait = waits.after(error);
        lastError = error;
        onReconnect?.({ ...wait, error });
        await this.#clock.sleep(wait.delay * 1000, signal);
      }
      if (signal.aborted) throw cancelledHere(signal.reason);
    }
  }

  /** Prepares a stream. It waits for a slot before its call starts; the wait counts towards the timeout. */
  #stream<T>(
    call: (options: ConnectCallOptions) => AsyncIterable<T>,
    options: FollowOptions,
    leaveSignal: AbortSignal,
  ): (signal: AbortSignal) => AsyncIterable<T> {
    const { timeout, stallTimeout = STALL_TIMEOUT_SECONDS } = options;
    const open = async function* (this: ServiceCalls, signal: AbortSignal): AsyncGenerator<T, void, undefined> {
      const start = performance.now();
      const release = await acquireSlot(this.#slots, AbortSignal.any([signal, leaveSignal]), timeout);
      const remaining = timeout === undefined ? {} : { timeout: timeout - (performance.now() - start) / 1000 };
      try {
        yield* withStallTimeout(call(this.#callOptions({ ...options, ...remaining, signal })), stallTimeout);
      } finally {
        release();
      }
    };
    return open.bind(this);
  }

  #callOptions({ headers, timeout, signal }: CallOptions): ConnectCallOptions {
    const merged = new Headers(this.#headers.headers);
    const { apiKey } = this.#headers;
    const key = typeof apiKey === "function" ? apiKey() : apiKey;
    if (key) merged.set("authorization", `Bearer ${key}`);
    for (const [name, value] of new Headers(headers)) merged.set(name, value);
    return {
      headers: merged,
      ...(signal && { signal }),
      ...(timeout !== undefined && Number.isFinite(timeout) && { timeoutMs: Math.ceil(timeout * 1000) }),
    };
  }
}

/** Acquires a slot within `timeout` seconds. Returns a function that releases it. */
async function acquireSlot(slots: StreamSlots, signal: AbortSignal, timeout: number | undefined): Promise<() => void> {
  if (timeout === undefined) return slots.acquire(signal);
  try {
    return await slots.acquire(AbortSignal.any([signal, AbortSignal.timeout(timeout * 1000)]));
  } catch (reason) {
    if (signal.aborted) throw reason;
    throw new CalotypeError("DEADLINE_EXCEEDED", "No connection became free before the timeout.");
  }
}
