import type { HandlerContext } from "@connectrpc/connect";
import { describe, expect, it } from "vitest";
import { DisconnectPolicy, type GenerateRequest } from "../src/gen/calotype/v1/calotype_pb.js";
import type { Client, Progress } from "../src/index.js";
import { errorOf, serve } from "./helpers.js";
import { disconnected, final, type Handlers, preview } from "./stub_server.js";

describe("leaving a generation", () => {
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
          await disconnected(context);
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

  it("by cancel() aborts a quiet call and throws CANCELLED", async () => {
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

  it("by the iterator's return() aborts a quiet call", async () => {
    const { handlers, left } = endless();
    const { client } = await serve(handlers);
    const messages = client.generate("x")[Symbol.asyncIterator]();
    await messages.next();
    const next = errorOf(messages.next());
    expect(await messages.return()).toEqual({ done: true, value: undefined });
    expect(await next).toMatchObject({ code: "CANCELLED", reason: "CANCELLED_HERE" });
    await left;
  });

  it("by a signal aborts the call and reports the signal's reason", async () => {
    const { handlers, left } = endless();
    const { client } = await serve(handlers);
    const controller = new AbortController();
    const messages = client.generate("x", { signal: controller.signal })[Symbol.asyncIterator]();
    await messages.next();
    controller.abort("bored");
    expect(await errorOf(messages.next())).toMatchObject({ code: "CANCELLED", cause: "bored" });
    await left;
  });

  it("before its start sends nothing", async () => {
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

  it("after its end does nothing", async () => {
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

describe("the effect of leaving", () => {
  /** A service with one endless generation, which records its requests and cancellations. */
  async function endless(): Promise<{
    client: Client;
    requests: GenerateRequest[];
    cancelled: string[];
    disconnect: Promise<void>;
  }> {
    const requests: GenerateRequest[] = [];
    const cancelled: string[] = [];
    let resolve = () => {};
    const left = new Promise<void>((resolved) => {
      resolve = resolved;
    });
    const follow = async function* (context: HandlerContext) {
      yield preview(1);
      await disconnected(context);
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
    return { client, requests, cancelled, disconnect: left };
  }

  async function leave(generation: AsyncIterable<Progress>): Promise<void> {
    for await (const _ of generation) break;
  }

  it("the request has 10 s of grace, and leaving the loop cancels by id", async () => {
    const { client, requests, cancelled, disconnect } = await endless();
    await leave(client.generate("x"));
    await disconnect;
    await expect.poll(() => cancelled).toEqual(["g"]);
    expect(requests[0]).toMatchObject({ onDisconnect: DisconnectPolicy.CANCEL, disconnectGrace: { seconds: 10n } });
    expect(requests[0]?.requestId).toMatch(/^[0-9a-f]{32}$/);
  });

  it.each([
    ["keep", { onDisconnect: "keep" }],
    ["the caller's own grace", { disconnectGrace: 30 }],
    ["no retries", { retries: 0 }],
  ] as const)("the server alone decides with %s", async (_, options) => {
    const { client, requests, cancelled, disconnect } = await endless();
    await leave(client.generate("x", options));
    await disconnect;
    // This call follows any call that leaving sends.
    await client.cancel("last");
    expect(cancelled).toEqual(["last"]);
    if ("retries" in options) expect(requests[0]).toMatchObject({ requestId: "", onDisconnect: 0 });
  });

  it("a watched generation keeps running for other readers unless cancel() is called", async () => {
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

  it("cancel() also cancels a generation with `keep`", async () => {
    const { client, cancelled } = await endless();
    const generation = client.generate("x", { onDisconnect: "keep" });
    const messages = generation[Symbol.asyncIterator]();
    await messages.next();
    expect(generation.id).toBe("g");
    generation.cancel();
    await expect.poll(() => cancelled).toEqual(["g"]);
  });

  it("a generation left before its first message is cancelled once its id is known", async () => {
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
        await disconnected(context);
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
