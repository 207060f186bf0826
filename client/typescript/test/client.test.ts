import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { create, toBinary } from "@bufbuild/protobuf";
import { Code, ConnectError, type HandlerContext } from "@connectrpc/connect";
import { afterEach, describe, expect, it } from "vitest";
import { STATUS_CODES } from "../src/errors.js";
import {
  DisconnectPolicy,
  type GenerateRequest,
  ModelSchema,
  Phase,
  PreviewMethod,
  PreviewOptionsSchema,
  ProgressSchema,
} from "../src/gen/calotype/v1/calotype_pb.js";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "../src/gen/google/rpc/error_details_pb.js";
import {
  CalotypeError,
  type Client,
  type ClientOptions,
  createClient,
  type GenerateOptions,
  type Progress,
  type Reconnect,
} from "../src/index.js";
import { final, gone, type Handlers, preview, progress, Stub } from "./stub_server.js";

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

  it("by the iterator's return() aborts the call while nothing arrives", async () => {
    const { handlers, left } = endless();
    const { client } = await serve(handlers);
    const messages = client.generate("x")[Symbol.asyncIterator]();
    await messages.next();
    const next = errorOf(messages.next());
    expect(await messages.return()).toEqual({ done: true, value: undefined });
    expect(await next).toMatchObject({ code: "CANCELLED", reason: "CANCELLED_HERE" });
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

describe("what leaving does", () => {
  /** A service with one endless generation, which notes its request and what is cancelled. */
  async function endless(): Promise<{
    client: Client;
    requests: GenerateRequest[];
    cancelled: string[];
    gone: Promise<void>;
  }> {
    const requests: GenerateRequest[] = [];
    const cancelled: string[] = [];
    let resolve = () => {};
    const left = new Promise<void>((resolved) => {
      resolve = resolved;
    });
    const follow = async function* (context: HandlerContext) {
      yield preview(1);
      await gone(context);
      resolve();
    };
    const { client } = await serve({
      generate(request, context) {
        requests.push(request);
        return follow(context);
      },
      watch: (_, context) => follow(context),
      cancel({ generationId }) {
        cancelled.push(generationId);
        return {};
      },
    });
    return { client, requests, cancelled, gone: left };
  }

  async function leave(generation: AsyncIterable<Progress>): Promise<void> {
    for await (const _ of generation) break;
  }

  it("asks for ten seconds of grace, and cancels by id when the loop is left on purpose", async () => {
    const { client, requests, cancelled, gone } = await endless();
    await leave(client.generate("x"));
    await gone;
    await expect.poll(() => cancelled).toEqual(["g"]);
    expect(requests[0]).toMatchObject({ onDisconnect: DisconnectPolicy.CANCEL, disconnectGrace: { seconds: 10n } });
    expect(requests[0]?.requestId).toMatch(/^[0-9a-f]{32}$/);
  });

  it.each([
    ["keep", { onDisconnect: "keep" }],
    ["a grace of the caller's", { disconnectGrace: 30 }],
    ["no retries", { retries: 0 }],
  ] as const)("is left to the server with %s", async (_, options) => {
    const { client, requests, cancelled, gone } = await endless();
    await leave(client.generate("x", options));
    await gone;
    // Sent after whatever leaving sends.
    await client.cancel("last");
    expect(cancelled).toEqual(["last"]);
    if ("retries" in options) expect(requests[0]).toMatchObject({ requestId: "", onDisconnect: 0 });
  });

  it("leaves what is watched to the others, but cancels it when asked to", async () => {
    const { client, cancelled } = await endless();
    await leave(client.watch("g"));
    await client.cancel("last");
    expect(cancelled).toEqual(["last"]);
    const generation = client.watch("g");
    const messages = generation[Symbol.asyncIterator]();
    await messages.next();
    generation.cancel();
    await expect.poll(() => cancelled).toEqual(["last", "g"]);
  });

  it("cancels with `cancel()` also what is to be kept", async () => {
    const { client, cancelled } = await endless();
    const generation = client.generate("x", { onDisconnect: "keep" });
    const messages = generation[Symbol.asyncIterator]();
    await messages.next();
    expect(generation.id).toBe("g");
    generation.cancel();
    await expect.poll(() => cancelled).toEqual(["g"]);
  });

  it("cancels what was left before its id was known, as soon as it is", async () => {
    const cancelled: string[] = [];
    const asked = new EventTarget();
    let answer = () => {};
    const { client } = await serve({
      async *generate(_request, context) {
        asked.dispatchEvent(new Event("asked"));
        await new Promise<void>((resolve) => {
          answer = resolve;
        });
        yield preview(1);
        await gone(context);
      },
      cancel({ generationId }) {
        cancelled.push(generationId);
        return {};
      },
    });
    const arrived = new Promise((resolve) => asked.addEventListener("asked", resolve));
    const generation = client.generate("x");
    const result = errorOf(generation.result());
    await arrived;
    generation.cancel();
    expect(await result).toMatchObject({ code: "CANCELLED" });
    answer();
    await expect.poll(() => cancelled).toEqual(["g"]);
  });
});

describe("a connection that is lost", () => {
  it("is taken up again from the last message, with the same request id when all is forgotten", async () => {
    const requests: GenerateRequest[] = [];
    const watched: object[] = [];
    const { client, stub } = await serve({
      async *generate(request, context) {
        requests.push(request);
        yield preview(requests.length);
        if (requests.length === 1) await gone(context);
        yield final();
      },
      // biome-ignore lint/correctness/useYield: it has forgotten.
      async *watch(request) {
        watched.push(request);
        throw new ConnectError("", Code.NotFound);
      },
    });
    const reconnects: Reconnect[] = [];
    const steps: number[] = [];
    const options = { preview: { maxEdge: 64 }, onReconnect: (reconnect: Reconnect) => reconnects.push(reconnect) };
    for await (const { picture } of client.generate("x", options)) {
      if (picture) steps.push(picture.step);
      if (requests.length === 1) stub.cut();
    }
    expect(steps).toEqual([1, 2, 3]);
    expect(watched).toMatchObject([{ generationId: "g", afterSequence: 2n, preview: { maxEdgePx: 64 } }]);
    expect(requests[1]).toMatchObject({ prompt: "x", seed: 42n, requestId: requests[0]?.requestId });
    expect(reconnects[0]).toMatchObject({ attempt: 1, error: { reason: "CONNECTION_LOST" } });
  });

  it("is taken up again when a proxy has cut it within a message", async () => {
    let calls = 0;
    const whole = Buffer.from(toBinary(ProgressSchema, preview(1)));
    const server = createServer((_request, response) => {
      calls += 1;
      response.setHeader("content-type", "application/grpc-web+proto");
      response.write(Buffer.concat([Buffer.from([0, 0, 0, 0, whole.length]), whole]));
      if (calls === 1) return void response.end(new Uint8Array([0, 0, 0, 0, 9, 1]));
      const last = Buffer.from(toBinary(ProgressSchema, final()));
      const status = Buffer.from("grpc-status:0\r\n");
      response.write(Buffer.concat([Buffer.from([0, 0, 0, 0, last.length]), last]));
      response.end(Buffer.concat([Buffer.from([0x80, 0, 0, 0, status.length]), status]));
    });
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    const client = createClient(`http://127.0.0.1:${(server.address() as AddressInfo).port}`);
    expect((await client.generate("x").result()).kind).toBe("final");
    expect(calls).toBe(2);
    server.close();
  });

  it("is taken up again when the service falls silent, also before the first message, and the silent call is left", async () => {
    const requests: GenerateRequest[] = [];
    const left: string[] = [];
    const { client } = await serve({
      async *generate(request, context) {
        requests.push(request);
        if (requests.length === 2) yield preview(1);
        await gone(context);
        left.push(`generate ${requests.length}`);
      },
      async *watch() {
        yield final();
      },
    });
    const reconnects: Reconnect[] = [];
    const onReconnect = (reconnect: Reconnect) => reconnects.push(reconnect);
    const picture = await client.generate("x", { stallTimeout: 0.5, onReconnect }).result();
    expect(picture.kind).toBe("final");
    expect(reconnects.map(({ error }) => error.reason)).toEqual(["STALLED", "STALLED"]);
    expect(new Set(requests.map(({ requestId }) => requestId)).size).toBe(1);
    await expect.poll(() => left.length).toBe(2);
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
    const messages = client.generate("x", { retries: 0 })[Symbol.asyncIterator]();
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
    expect(await errorOf(client.generate("x", { retries: 0 }).result())).toMatchObject({
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

  it("finish by id", async () => {
    const { client } = await serve({
      finish: ({ generationId }) => ({ phase: generationId === "g" ? Phase.QUEUED : 0 }),
    });
    expect(await client.finish("g")).toBe("queued");
  });

  it("list generations over all pages", async () => {
    const asked: object[] = [];
    const { client } = await serve({
      listGenerations(request) {
        asked.push(request);
        const createTime = { seconds: 1_700_000_000n };
        const generations = [
          { generationId: `g${asked.length}`, prompt: "x", phase: Phase.DENOISING, seed: 7n, createTime },
        ];
        return { generations, nextPageToken: asked.length < 3 ? `page ${asked.length + 1}` : "" };
      },
    });
    const listed = [];
    for await (const summary of client.generations({ pageSize: 1 })) listed.push(summary);
    expect(listed.map(({ generationId }) => generationId)).toEqual(["g1", "g2", "g3"]);
    expect(listed[0]).toMatchObject({ phase: "denoising", seed: 7, created: new Date(1_700_000_000_000) });
    expect(asked).toMatchObject([{ pageSize: 1, pageToken: "" }, { pageToken: "page 2" }, { pageToken: "page 3" }]);
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

  it("send the key that there is at the time", async () => {
    const seen: (string | null)[] = [];
    const stub = new Stub({
      getModel(_request, context) {
        seen.push(context.requestHeader.get("authorization"));
        return {};
      },
    });
    stubs.push(stub);
    const url = await stub.start();
    let later: string | undefined;
    const client = createClient(url, { apiKey: () => later });
    await client.getModel();
    later = "k2";
    await client.getModel();
    await createClient(url, { apiKey: "k1" }).getModel();
    expect(seen).toEqual([null, "Bearer k2", "Bearer k1"]);
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
