import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { create } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { afterEach, describe, expect, it } from "vitest";
import { STATUS_CODES } from "../src/errors.js";
import { ModelSchema, Phase, PreviewMethod, PreviewOptionsSchema } from "../src/gen/calotype/v1/calotype_pb.js";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "../src/gen/google/rpc/error_details_pb.js";
import { CalotypeError, type ClientOptions, createClient, type GenerateOptions, type Progress } from "../src/index.js";
import { final, gone, type Handlers, preview, progress, Stub } from "./stub.js";

let stubs: Stub[] = [];

async function serve(handlers: Handlers, options: ClientOptions = {}) {
  const stub = new Stub(handlers);
  stubs.push(stub);
  return { client: createClient(await stub.start(), options), stub };
}

afterEach(async () => {
  await Promise.all(stubs.map((stub) => stub.stop()));
  stubs = [];
});

async function errorOf(promise: Promise<unknown>): Promise<CalotypeError> {
  const thrown = await promise.then(
    () => undefined,
    (error: unknown) => error,
  );
  expect(thrown).toBeInstanceOf(CalotypeError);
  return thrown as CalotypeError;
}

async function all(stream: AsyncIterable<Progress>): Promise<Progress[]> {
  const messages: Progress[] = [];
  for await (const message of stream) messages.push(message);
  return messages;
}

describe("a generation", () => {
  it("gives its progress in order and ends after the final picture", async () => {
    const { client } = await serve({
      async *generate() {
        yield progress({ sequence: 1n, phase: Phase.QUEUED, queuePosition: 2, totalSteps: 0 });
        yield preview(1);
        yield preview(2);
        yield final();
      },
    });
    const messages = await all(client.generate("a red apple"));
    expect(messages.map(({ phase }) => phase)).toEqual(["queued", "denoising", "denoising", "succeeded"]);
    expect(messages[0]).toMatchObject({ queuePosition: 2, picture: undefined, seed: 42 });
    expect(messages[1]?.picture).toMatchObject({ kind: "predicted", step: 1, format: "jpeg", width: 8 });
    expect(messages[3]?.picture).toMatchObject({ kind: "final", format: "png", data: new Uint8Array([9]) });
  });

  it("sends what was asked for, and leaves out what was not", async () => {
    const seen: object[] = [];
    const { client } = await serve({
      async *generate(request) {
        seen.push(request);
        yield final();
      },
    });
    await client.generate("x").result();
    await client
      .generate("y", {
        steps: 0,
        seed: 2 ** 53 - 1,
        preview: { minInterval: 0.25, method: "head" },
        output: { format: "webp", quality: 80 },
      })
      .result();
    expect(seen[0]).toMatchObject({ prompt: "x" });
    for (const name of ["stepCount", "seed", "widthPx", "preview", "output"]) expect(seen[0]).not.toHaveProperty(name);
    expect(seen[1]).toMatchObject({
      stepCount: 0,
      seed: 2n ** 53n - 1n,
      preview: { minInterval: { nanos: 250_000_000 }, method: 2 },
    });
    expect(seen[1]).toMatchObject({ output: { format: 3, quality: 80 } });
  });

  it("joins the chunks of a large final picture into one progress", async () => {
    const parts = [1, 2, 3].map((value) => new Uint8Array(3_000_000).fill(value));
    const { client } = await serve({
      async *generate() {
        for (const [index, part] of parts.entries()) yield final(part, index, parts.length);
      },
    });
    const messages = await all(client.generate("x"));
    expect(messages).toHaveLength(1);
    const data = messages[0]?.picture?.data;
    expect([data?.length, data?.[0], data?.[4_000_000], data?.at(-1)]).toEqual([9_000_000, 1, 2, 3]);
  });

  it("fails when a chunk is missing", async () => {
    const { client } = await serve({
      async *generate() {
        yield final(new Uint8Array([1]), 0, 3);
        yield final(new Uint8Array([3]), 2, 3);
      },
    });
    expect(await errorOf(client.generate("x").result())).toMatchObject({ reason: "STREAM_INCOMPLETE" });
  });

  it("can be waited for more than once, but iterated only once", async () => {
    const { client } = await serve({
      async *generate() {
        yield final();
      },
    });
    const generation = client.generate("x");
    expect(await generation.result()).toBe(await generation.result());
    await expect(all(generation)).rejects.toThrow(TypeError);
    expect(generation.done).toBe(true);
  });
});

describe("leaving", () => {
  function endless() {
    let resolve = () => {};
    const left = new Promise<void>((resolved) => {
      resolve = resolved;
    });
    return {
      left,
      handlers: {
        async *generate(_request, context) {
          yield preview(1);
          await gone(context);
          resolve();
        },
      } satisfies Handlers,
    };
  }

  it.each([
    [
      "break",
      async (stream: AsyncIterable<Progress>) => {
        for await (const _ of stream) break;
      },
    ],
    [
      "an exception",
      async (stream: AsyncIterable<Progress>) => {
        await expect(async () => {
          for await (const _ of stream) throw new Error("mine");
        }).rejects.toThrow("mine");
      },
    ],
  ])("by %s aborts the call", async (_, leave) => {
    const { handlers, left } = endless();
    const { client } = await serve(handlers);
    await leave(client.generate("x"));
    await left;
  });

  it("by cancel() aborts the call while nothing arrives, and throws CANCELLED", async () => {
    const { handlers, left } = endless();
    const { client } = await serve(handlers);
    const generation = client.generate("x");
    const messages = generation[Symbol.asyncIterator]();
    await messages.next();
    const next = messages.next();
    generation.cancel();
    expect(await errorOf(next)).toMatchObject({ code: "CANCELLED", reason: "CANCELLED_HERE" });
    await left;
  });

  it("by a signal aborts the call and tells the signal's reason", async () => {
    const { handlers, left } = endless();
    const { client } = await serve(handlers);
    const controller = new AbortController();
    const messages = client.generate("x", { signal: controller.signal })[Symbol.asyncIterator]();
    await messages.next();
    controller.abort("bored");
    expect(await errorOf(messages.next())).toMatchObject({ code: "CANCELLED", cause: "bored" });
    await left;
  });

  it("before the start sends nothing", async () => {
    let calls = 0;
    const { client } = await serve({
      async *generate() {
        calls += 1;
        yield final();
      },
    });
    expect(await errorOf(client.generate("x", { signal: AbortSignal.abort() }).result())).toMatchObject({
      code: "CANCELLED",
    });
    expect(calls).toBe(0);
  });

  it("after the end does nothing", async () => {
    const { client } = await serve({
      async *generate() {
        yield final();
      },
    });
    const generation = client.generate("x");
    await generation.result();
    generation.cancel();
    expect((await generation.result()).kind).toBe("final");
  });
});

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

  it("in the last message counts more than the status that follows", async () => {
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

  it("tells a server that is not there", async () => {
    const { client, stub } = await serve({});
    await stub.stop();
    expect(await errorOf(client.getModel())).toMatchObject({ code: "UNAVAILABLE", reason: "UNREACHABLE" });
    expect(await errorOf(client.generate("x").result())).toMatchObject({ code: "UNAVAILABLE", reason: "UNREACHABLE" });
  });

  it("tells a connection that is lost in mid-stream", async () => {
    const { client, stub } = await serve({
      async *generate(_request, context) {
        yield preview(1);
        await gone(context);
      },
    });
    const messages = client.generate("x")[Symbol.asyncIterator]();
    await messages.next();
    stub.cut();
    expect(await errorOf(messages.next())).toMatchObject({ code: "UNAVAILABLE", reason: "CONNECTION_LOST" });
  });

  it("tells a stream that ends in order, but without a typed end", async () => {
    const { client } = await serve({
      async *generate() {
        yield preview(1);
      },
    });
    expect(await errorOf(client.generate("x").result())).toMatchObject({
      code: "UNKNOWN",
      reason: "STREAM_INCOMPLETE",
    });
  });

  it("tells an answer that a proxy has cut between two messages", async () => {
    const server = createServer((_request, response) => {
      response.setHeader("content-type", "application/grpc-web+proto");
      response.end(new Uint8Array([0, 0, 0, 0, 0]));
    });
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    const client = createClient(`http://127.0.0.1:${(server.address() as AddressInfo).port}`);
    expect(await errorOf(client.generate("x").result())).toMatchObject({ reason: "STREAM_INCOMPLETE" });
    server.close();
  });

  it("tells a timeout", async () => {
    const { client } = await serve({
      async *generate(_request, context) {
        yield preview(1);
        await gone(context);
      },
    });
    expect(await errorOf(client.generate("x", { timeout: 0.0501 }).result())).toMatchObject({
      code: "DEADLINE_EXCEEDED",
    });
  });

  it("names every number that cannot be sent, without a call", async () => {
    const { client } = await serve({});
    const wrong: GenerateOptions = {
      width: 1.5,
      steps: Number.NaN,
      seed: 2 ** 53,
      guidanceScale: Number.POSITIVE_INFINITY,
    };
    const refused = await errorOf((async () => client.generate("x", wrong).result())());
    expect(refused.code).toBe("INVALID_ARGUMENT");
    expect(refused.violations.map(({ field }) => field).sort()).toEqual([
      "guidance_scale",
      "seed",
      "step_count",
      "width_px",
    ]);
  });
});

describe("the unary calls", () => {
  it("describe the model", async () => {
    const { client } = await serve({
      getModel: () =>
        create(ModelSchema, {
          name: "bundled",
          widthPx: 128,
          guidanceScale: 3,
          previewMethods: [PreviewMethod.HEAD, 99 as PreviewMethod],
          preview: create(PreviewOptionsSchema, { everySteps: 2, method: PreviewMethod.AUTO }),
        }),
    });
    const model = await client.getModel();
    expect(model).toMatchObject({ name: "bundled", width: 128, guidanceScale: 3, previewMethods: ["head"] });
    expect(model.preview).toMatchObject({ everySteps: 2, method: "auto" });
  });

  it("cancel by id, and translate errors", async () => {
    const { client } = await serve({
      cancel({ generationId }) {
        if (generationId === "g") return { phase: Phase.DENOISING };
        throw new ConnectError("gone", Code.NotFound);
      },
    });
    expect(await client.cancel("g")).toBe("denoising");
    expect(await errorOf(client.cancel("h"))).toMatchObject({ code: "NOT_FOUND" });
  });

  it("send headers of the client and of the call", async () => {
    const seen: (string | null)[] = [];
    const stub = new Stub({
      getModel(_request, context) {
        seen.push(context.requestHeader.get("authorization"), context.requestHeader.get("x-request-id"));
        return {};
      },
    });
    stubs.push(stub);
    const client = createClient(await stub.start(), { headers: { authorization: "Bearer t", "x-request-id": "a" } });
    await client.getModel({ headers: { "x-request-id": "b" } });
    expect(seen).toEqual(["Bearer t", "b"]);
  });
});

describe("the limit on streams", () => {
  it("lets no more run than allowed, first come first served, and skips who has left", async () => {
    const begun: string[] = [];
    const running = new Map<string, () => void>();
    const begins = new EventTarget();
    const stub = new Stub({
      async *generate({ prompt }) {
        begun.push(prompt);
        begins.dispatchEvent(new Event(prompt));
        yield preview(1);
        await new Promise<void>((resolve) => running.set(prompt, resolve));
        yield final();
      },
    });
    stubs.push(stub);
    const client = createClient(await stub.start(), { maxStreams: 1 });
    const [first, second, third] = ["a", "b", "c"].map((prompt) => client.generate(prompt));
    const messages = first?.[Symbol.asyncIterator]();
    await messages?.next();
    const waiting = second?.result();
    const last = third?.[Symbol.asyncIterator]();
    const lastBegins = last?.next();
    second?.cancel();
    expect(await errorOf(waiting as Promise<unknown>)).toMatchObject({ code: "CANCELLED" });
    expect(begun).toEqual(["a"]);
    await messages?.return(undefined);
    await lastBegins;
    expect(begun).toEqual(["a", "c"]);
    await last?.return(undefined);
  });

  it("counts the waiting into the timeout", async () => {
    const { client } = await serve(
      {
        async *generate(_request, context) {
          yield preview(1);
          await gone(context);
        },
      },
      { maxStreams: 1 },
    );
    const first = client.generate("a")[Symbol.asyncIterator]();
    await first.next();
    expect(await errorOf(client.generate("b", { timeout: 0.0501 }).result())).toMatchObject({
      code: "DEADLINE_EXCEEDED",
    });
    await first.return(undefined);
  });
});
