/** A service on a real socket whose handlers are defined by the test. */

import { createServer, type RequestListener } from "node:http";
import type { AddressInfo, Socket } from "node:net";
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import type { ConnectRouter, HandlerContext, ServiceImpl } from "@connectrpc/connect";
import { connectNodeAdapter } from "@connectrpc/connect-node";
import {
  GenerationService,
  ImageFormat,
  ImageKind,
  Phase,
  ProgressSchema,
} from "../src/gen/calotype/v1/calotype_pb.js";

// For the tests of the page, which do not depend on protobuf and connect themselves.
export { create } from "@bufbuild/protobuf";
export { Code, ConnectError, type HandlerContext } from "@connectrpc/connect";

export type Handlers = Partial<ServiceImpl<typeof GenerationService>>;

export class StubServer {
  readonly #server;
  readonly #sockets = new Set<Socket>();

  /** @param fallback - Handles requests that are not calls. */
  constructor(handlers: Handlers, fallback?: RequestListener) {
    const routes = (router: ConnectRouter) => router.service(GenerationService, handlers);
    this.#server = createServer(connectNodeAdapter({ routes, ...(fallback && { fallback: fallback as never }) }));
    this.#server.on("connection", (socket) => this.#sockets.add(socket));
  }

  async start(): Promise<string> {
    await new Promise<void>((resolve) => this.#server.listen(0, "127.0.0.1", resolve));
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  /** Closes every connection abruptly, like a killed process. */
  dropConnections(): void {
    for (const socket of this.#sockets) socket.destroy();
  }

  async stop(): Promise<void> {
    this.dropConnections();
    await new Promise((resolve) => this.#server.close(resolve));
  }
}

export type Message = MessageInitShape<typeof ProgressSchema>;

export function progress(message: Message) {
  return create(ProgressSchema, { generationId: "g", seed: 42n, totalSteps: 3, ...message });
}

export function preview(step: number, bytes: Uint8Array = new Uint8Array([step])) {
  const picture = { image: bytes, imageFormat: ImageFormat.JPEG, imageKind: ImageKind.PREDICTED, imageStep: step };
  return progress({ sequence: BigInt(step) + 1n, phase: Phase.DENOISING, step, widthPx: 8, heightPx: 8, ...picture });
}

export function final(bytes: Uint8Array = new Uint8Array([9]), chunkIndex = 0, chunkCount = 1) {
  const picture = { image: bytes, imageFormat: ImageFormat.PNG, imageKind: ImageKind.FINAL, imageStep: 3 };
  return progress({
    sequence: 99n,
    phase: Phase.SUCCEEDED,
    step: 3,
    widthPx: 8,
    heightPx: 8,
    chunkIndex,
    chunkCount,
    ...picture,
  });
}

/** Waits until the caller has disconnected. */
export function disconnected(context: HandlerContext): Promise<void> {
  return new Promise((resolve) => {
    if (context.signal.aborted) resolve();
    context.signal.addEventListener("abort", () => resolve());
  });
}
