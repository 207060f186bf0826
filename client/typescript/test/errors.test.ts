import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { Code, ConnectError } from "@connectrpc/connect";
import { describe, expect, it } from "vitest";
import { STATUS_CODES } from "../src/errors.js";
import { Phase } from "../src/gen/calotype/v1/calotype_pb.js";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "../src/gen/google/rpc/error_details_pb.js";
import { createClient, type GenerateOptions } from "../src/index.js";
import { errorOf, serve } from "./helpers.js";
import { disconnected, preview, progress } from "./stub_server.js";

describe("an error", () => {
  it.each(STATUS_CODES.map((code, index) => [code, index + 1] as const))(
    "with status %s has that code",
    async (code, number) => {
      const { client } = await serve({
        // biome-ignore lint/correctness/useYield: it fails before the first message.
        async *generate() {
          throw new ConnectError("no", number);
        },
      });
      expect(await errorOf(client.generate("x").result())).toMatchObject({ code, message: "no" });
    },
  );

  it("carries violations, the retry delay and the reason of its details", async () => {
    const { client } = await serve({
      // biome-ignore lint/correctness/useYield: it fails before the first message.
      async *generate() {
        const violations = [
          { field: "prompt", description: "must not be empty" },
          { field: "seed", description: "is -1" },
        ];
        throw new ConnectError("bad", Code.InvalidArgument, undefined, [
          { desc: ErrorInfoSchema, value: { reason: "INVALID_REQUEST", metadata: { limit: "4" } } },
          { desc: RetryInfoSchema, value: { retryDelay: { seconds: 1n, nanos: 500_000_000 } } },
          { desc: BadRequestSchema, value: { fieldViolations: violations } },
        ]);
      },
    });
    expect(await errorOf(client.generate("").result())).toMatchObject({
      reason: "INVALID_REQUEST",
      retryAfter: 1.5,
      metadata: { limit: "4" },
      violations: [
        { field: "prompt", description: "must not be empty" },
        { field: "seed", description: "is -1" },
      ],
    });
  });

  it("in the last message takes precedence over the status that follows", async () => {
    const { client } = await serve({
      async *generate() {
        yield preview(1);
        yield progress({ phase: Phase.FAILED, error: { code: 13, reason: "NUMERICAL_FAILURE", message: "NaN." } });
        throw new ConnectError("other", Code.Unknown);
      },
    });
    expect(await errorOf(client.generate("x").result())).toMatchObject({
      code: "INTERNAL",
      reason: "NUMERICAL_FAILURE",
    });
  });

  it("is UNREACHABLE if there is no server", async () => {
    const { client, stub } = await serve({});
    await stub.stop();
    expect(await errorOf(client.getModel())).toMatchObject({ code: "UNAVAILABLE", reason: "UNREACHABLE" });
    expect(await errorOf(client.generate("x").result())).toMatchObject({ code: "UNAVAILABLE", reason: "UNREACHABLE" });
  });

  it("is CONNECTION_LOST if the connection breaks during a stream", async () => {
    const { client, stub } = await serve({
      async *generate(_request, context) {
        yield preview(1);
        await disconnected(context);
      },
    });
    const messages = client.generate("x", { retries: 0 })[Symbol.asyncIterator]();
    await messages.next();
    stub.dropConnections();
    expect(await errorOf(messages.next())).toMatchObject({ code: "UNAVAILABLE", reason: "CONNECTION_LOST" });
  });

  it("is STREAM_INCOMPLETE if the stream ends without a typed end", async () => {
    const { client } = await serve({
      async *generate() {
        yield preview(1);
      },
    });
    expect(await errorOf(client.generate("x", { retries: 0 }).result())).toMatchObject({
      code: "UNKNOWN",
      reason: "STREAM_INCOMPLETE",
    });
  });

  it("is STREAM_INCOMPLETE if a proxy truncated the response between two messages", async () => {
    const server = createServer((_request, response) => {
      response.setHeader("content-type", "application/grpc-web+proto");
      response.end(new Uint8Array([0, 0, 0, 0, 0]));
    });
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    const client = createClient(`http://127.0.0.1:${(server.address() as AddressInfo).port}`);
    expect(await errorOf(client.generate("x", { retries: 0 }).result())).toMatchObject({
      reason: "STREAM_INCOMPLETE",
    });
    server.close();
  });

  it("is DEADLINE_EXCEEDED after a timeout", async () => {
    const { client } = await serve({
      async *generate(_request, context) {
        yield preview(1);
        await disconnected(context);
      },
    });
    expect(await errorOf(client.generate("x", { timeout: 0.0501 }).result())).toMatchObject({
      code: "DEADLINE_EXCEEDED",
    });
  });

  it("lists every number that cannot be sent, without a call", async () => {
    const { client } = await serve({});
    const wrong: GenerateOptions = {
      width: 1.5,
      steps: Number.NaN,
      seed: 2 ** 53,
      guidanceScale: Number.POSITIVE_INFINITY,
    };
    const error = await errorOf((async () => client.generate("x", wrong).result())());
    expect(error.code).toBe("INVALID_ARGUMENT");
    expect(error.violations.map(({ field }) => field).sort()).toEqual([
      "guidance_scale",
      "seed",
      "step_count",
      "width_px",
    ]);
  });
});
