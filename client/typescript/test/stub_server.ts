/** A service on a real socket that does what a test says, and tells what became of its calls. */

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

// For the tests of the page, which have no protobuf and no connect of their own.
export { create } from "@bufbuild/protobuf";
export { Code, ConnectError, type HandlerContext } from "@connectrpc/connect";

export type Handlers = Partial<ServiceImpl<typeof GenerationService>>;

export class Stub {
  readonly #server;
  readonly #sockets = new Set<Socket>();

  /** @param fallback - Answers what is not a call. */
  constructor(handlers: Handlers, fallback?: RequestListener) {
    const routes = (router: ConnectRouter) => router.service(GenerationService, handlers);
    this.#server = createServer(connectNodeAdapter({ routes, ...(fallback && { fallback: fallback as never }) }));
    this.#server.on("connection", (socket) => this.#sockets.add(socket));
  }

  async start(): Promise<string> {
    await new Promise<void>((resolve) => this.#server.listen(0, "127.0.0.1", resolve));
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  /** Cuts every connection, as a killed process does. */
  cut(): void {
    for (const socket of this.#sockets) socket.destroy();
  }

  async stop(): Promise<void> {
    this.cut();
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

/** Waits until the caller has gone. */
export function gone(context: HandlerContext): Promise<void> {
  return new Promise((resolve) => {
    if (context.signal.aborted) resolve();
    context.signal.addEventListener("abort", () => resolve());
  });
}
