import { describe, expect, it } from "vitest";
import { Phase, Speed, TimingsSchema } from "../src/gen/calotype/v1/calotype_pb.js";
import { createClient } from "../src/index.js";
import { collect, errorOf, serve, stopAfterTest } from "./helpers.js";
import { create, disconnected, final, preview, progress, StubServer } from "./stub_server.js";

describe("a generation", () => {
  it("yields progress in order and ends after the final picture", async () => {
    const { client } = await serve({
      async *generate() {
        yield progress({ sequence: 1n, phase: Phase.QUEUED, queuePosition: 2, totalSteps: 0 });
        yield preview(1);
        yield preview(2);
        yield final();
      },
    });
    const messages = await collect(client.generate("a red apple"));
    expect(messages.map(({ phase }) => phase)).toEqual(["queued", "denoising", "denoising", "succeeded"]);
    expect(messages[0]).toMatchObject({ queuePosition: 2, picture: undefined, seed: 42 });
    expect(messages[1]?.picture).toMatchObject({ kind: "predicted", step: 1, format: "jpeg", width: 8 });
    expect(messages[3]?.picture).toMatchObject({ kind: "final", format: "png", data: new Uint8Array([9]) });
  });

  it("sends the given options, and omits all others", async () => {
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
        speed: "fast",
        preview: { minInterval: 0.25, method: "head" },
        output: { format: "webp", quality: 80 },
      })
      .result();
    expect(seen[0]).toMatchObject({ prompt: "x" });
    for (const name of ["stepCount", "seed", "widthPx", "preview", "output"]) expect(seen[0]).not.toHaveProperty(name);
    expect(seen[1]).toMatchObject({
      stepCount: 0,
      seed: 2n ** 53n - 1n,
      speed: Speed.FAST,
      preview: { minInterval: { nanos: 250_000_000 }, method: 2 },
    });
    expect(seen[1]).toMatchObject({ output: { format: 3, quality: 80 } });
  });

  it("ends with the durations in seconds and the number of computed steps", async () => {
    const { client } = await serve({
      async *generate() {
        yield preview(1);
        yield { ...final(), timings: create(TimingsSchema, { denoising: { nanos: 500_000_000 }, computedSteps: 14 }) };
      },
    });
    const [first, last] = await collect(client.generate("x", { speed: "fast" }));
    expect(first?.timings).toBeUndefined();
    expect(last?.timings).toMatchObject({ denoising: 0.5, total: undefined, computedSteps: 14 });
  });

  it("joins the chunks of a large final picture into one progress", async () => {
    const parts = [1, 2, 3].map((value) => new Uint8Array(3_000_000).fill(value));
    const { client } = await serve({
      async *generate() {
        for (const [index, part] of parts.entries()) yield final(part, index, parts.length);
      },
    });
    const messages = await collect(client.generate("x"));
    expect(messages).toHaveLength(1);
    const data = messages[0]?.picture?.data;
    expect([data?.length, data?.[0], data?.[4_000_000], data?.at(-1)]).toEqual([9_000_000, 1, 2, 3]);
  });

  it("fails if a chunk is missing", async () => {
    const { client } = await serve({
      async *generate() {
        yield final(new Uint8Array([1]), 0, 3);
        yield final(new Uint8Array([3]), 2, 3);
      },
    });
    expect(await errorOf(client.generate("x", { retries: 0 }).result())).toMatchObject({
      reason: "STREAM_INCOMPLETE",
    });
  });

  it("can be awaited more than once, but iterated only once", async () => {
    const { client } = await serve({
      async *generate() {
        yield final();
      },
    });
    const generation = client.generate("x");
    expect(await generation.result()).toBe(await generation.result());
    await expect(collect(generation)).rejects.toThrow(TypeError);
    expect(generation.done).toBe(true);
  });
});

describe("the limit on streams", () => {
  it("is never exceeded; streams wait in order, and those that were cancelled are skipped", async () => {
    const started: string[] = [];
    const running = new Map<string, () => void>();
    const starts = new EventTarget();
    const stub = new StubServer({
      async *generate({ prompt }) {
        started.push(prompt);
        starts.dispatchEvent(new Event(prompt));
        yield preview(1);
        await new Promise<void>((resolve) => running.set(prompt, resolve));
        yield final();
      },
    });
    stopAfterTest(stub);
    const client = createClient(await stub.start(), { maxStreams: 1 });
    const [first, second, third] = ["a", "b", "c"].map((prompt) => client.generate(prompt));
    const messages = first?.[Symbol.asyncIterator]();
    await messages?.next();
    const waiting = second?.result();
    const last = third?.[Symbol.asyncIterator]();
    const lastStarts = last?.next();
    second?.cancel();
    expect(await errorOf(waiting as Promise<unknown>)).toMatchObject({ code: "CANCELLED" });
    expect(started).toEqual(["a"]);
    await messages?.return(undefined);
    await lastStarts;
    expect(started).toEqual(["a", "c"]);
    await last?.return(undefined);
  });

  it("counts the wait towards the timeout", async () => {
    const { client } = await serve(
      {
        async *generate(_request, context) {
          yield preview(1);
          await disconnected(context);
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
