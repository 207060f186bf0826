/** Google's grpc-web client in text mode, which streams over XMLHttpRequest. Runs in the browser. */

import { create, fromBinary, type MessageShape, toBinary } from "@bufbuild/protobuf";
import { GenerateRequestSchema, Phase, ProgressSchema } from "calotype/wire";
import { GrpcWebClientBase, MethodDescriptor, MethodType, type RpcError, type Status } from "grpc-web";

type Request = MessageShape<typeof GenerateRequestSchema>;
type Reply = MessageShape<typeof ProgressSchema>;

const PATH = "/calotype.v1.GenerationService/Generate";

class Unused {}

const METHOD = new MethodDescriptor<Request, Reply>(
  PATH,
  MethodType.SERVER_STREAMING,
  Unused as never,
  Unused as never,
  (request: Request) => toBinary(GenerateRequestSchema, request),
  (bytes: Uint8Array) => fromBinary(ProgressSchema, bytes),
);

export interface Outcome {
  /** Phase and picture size of every message. */
  readonly messages: { readonly phase: string; readonly bytes: number }[];
  readonly status: Status | undefined;
  readonly error: { readonly code: number; readonly message: string } | undefined;
}

/** Generates a picture. Cancels the call after `leaveAfter` messages. */
export function generate(prompt: string, stepCount: number, leaveAfter = Number.POSITIVE_INFINITY): Promise<Outcome> {
  const client = new GrpcWebClientBase({ format: "text" });
  const request = create(GenerateRequestSchema, { prompt, stepCount, seed: 1n });
  return new Promise((resolve) => {
    const messages: Outcome["messages"] = [];
    let status: Status | undefined;
    const done = (error?: RpcError) =>
      resolve({ messages, status, error: error && { code: error.code, message: error.message } });
    const stream = client.serverStreaming(location.origin + PATH, request, {}, METHOD);
    stream.on("data", ({ phase, image }) => {
      messages.push({ phase: Phase[phase], bytes: image.length });
      if (messages.length < leaveAfter) return;
      stream.cancel();
      done();
    });
    stream.on("status", (received) => {
      status = received;
    });
    stream.on("error", done);
    stream.on("end", () => done());
  });
}
