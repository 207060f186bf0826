/** The client: one service, three calls. */

import { createClient as createConnectClient, type Transport } from "@connectrpc/connect";
import { createGrpcWebTransport } from "@connectrpc/connect-web";
import { modelFromWire, phaseFromWire, requestToWire } from "./convert.js";
import { CalotypeError, cancelledHere } from "./errors.js";
import { GenerationService } from "./gen/calotype/v1/calotype_pb.js";
import { Generation } from "./generation.js";
import { defaultLines, Lines } from "./lines.js";
import { fromCall } from "./status.js";
import type { CallOptions, GenerateOptions, Model, Phase } from "./types.js";

export interface ClientOptions {
  /** Used instead of the global `fetch`. */
  readonly fetch?: typeof globalThis.fetch;
  /** Sent with every call. */
  readonly headers?: HeadersInit;
  /** Streams open at once; more wait for their turn. Default: four in a browser over HTTP/1.1, else no limit. */
  readonly maxStreams?: number;
  /** Used instead of grpc-web over `fetch`: connect's router transport in tests, or native gRPC in Node. */
  readonly transport?: Transport;
}

export interface Client {
  /**
   * Makes a generation. Nothing is sent before it is iterated, or its `result` asked for.
   *
   * @param prompt - Describes the picture; 1 to `Model.maxPromptChars` characters.
   * @throws CalotypeError - INVALID_ARGUMENT, when a number cannot be sent; what the server refuses, the loop throws.
   */
  generate(prompt: string, options?: GenerateOptions & CallOptions): Generation;
  /**
   * Cancels a queued or running generation by its id. One that has ended is not an error.
   *
   * @returns The phase in which it was found.
   */
  cancel(generationId: string, options?: CallOptions): Promise<Phase>;
  /** Describes the loaded model: sizes, limits, defaults, schedulers. */
  getModel(options?: CallOptions): Promise<Model>;
}

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
  const lines = new Lines(options.maxStreams ?? defaultLines(root));
  const callOptions = ({ headers, timeout, signal }: CallOptions) => {
    const merged = new Headers(options.headers);
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

  return {
    generate(prompt, given = {}) {
      const request = requestToWire(prompt, given);
      async function* call(signal: AbortSignal) {
        const { timeout } = given;
        const asked = performance.now();
        const release = await waitForLine(lines, signal, timeout);
        const left = timeout === undefined ? {} : { timeout: timeout - (performance.now() - asked) / 1000 };
        try {
          yield* calls.generate(request, callOptions({ ...given, ...left, signal }));
        } finally {
          release();
        }
      }
      return new Generation(call, given.signal);
    },
    cancel: (generationId, given = {}) =>
      unary(async () => phaseFromWire((await calls.cancel({ generationId }, callOptions(given))).phase), given.signal),
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
