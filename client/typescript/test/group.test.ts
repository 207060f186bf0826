import { create } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { describe, expect, it } from "vitest";
import {
  type GenerateRequest,
  ModelSchema,
  Phase,
  PromptSyntax,
  Sigmas,
  TimestepSpacing,
} from "../src/gen/calotype/v1/calotype_pb.js";
import { errorOf, serve } from "./helpers.js";
import { disconnected, final, preview } from "./stub_server.js";

/** A service whose members end after two previews; those with one of `failing` as their seed are rejected. */
function members(failing: readonly bigint[] = []) {
  const requests: GenerateRequest[] = [];
  return {
    requests,
    handlers: {
      async *generate(request: GenerateRequest) {
        requests.push(request);
        if (failing.includes(request.seed ?? 0n)) throw new ConnectError("full", Code.ResourceExhausted);
        yield { ...preview(1), generationId: request.requestId };
        yield { ...preview(2), generationId: request.requestId };
        yield { ...final(), generationId: request.requestId };
      },
    },
  };
}

/** A service whose members never end. It counts the calls that are open, and the cancels. */
function endless() {
  const cancels: object[] = [];
  const resolvers: (() => void)[] = [];
  const left = Array.from({ length: 2 }, () => new Promise<void>((resolve) => resolvers.push(resolve)));
  return {
    cancels,
    allLeft: Promise.all(left),
    handlers: {
      async *generate(request: GenerateRequest, context: never) {
        yield { ...preview(1), generationId: request.requestId };
        await disconnected(context);
        resolvers.pop()?.();
      },
      cancel({ generationId, group }: { generationId: string; group: string }) {
        cancels.push({ generationId, group });
        return { phase: Phase.DENOISING, cancelledCount: 2 };
      },
    },
  };
}

describe("a group", () => {
  it("yields the progress of all members and returns their pictures", async () => {
    const { handlers, requests } = members();
    const { client } = await serve(handlers);
    const group = client.generateMany("a cat", 3, { seed: 7, requestId: "mine" });
    const seen: string[] = [];
    for await (const { index, progress } of group) seen.push(`${index}:${progress.picture?.step}`);
    expect(seen.sort()).toEqual(["0:1", "0:2", "0:3", "1:1", "1:2", "1:3", "2:1", "2:2", "2:3"]);
    expect(await group.pictures()).toHaveLength(3);
    const sent = requests.map(({ seed, requestId, group: name }) => [seed, requestId, name]);
    expect(sent.sort()).toEqual([
      [7n, "mine/0", "mine"],
      [8n, "mine/1", "mine"],
      [9n, "mine/2", "mine"],
    ]);
    expect([group.id, group.done]).toEqual(["mine", true]);
  });

  it("starts with pictures() too, and draws no seeds itself", async () => {
    const { handlers, requests } = members();
    const { client } = await serve(handlers);
    const group = client.generateMany("a cat", 2);
    expect(requests).toEqual([]);
    expect((await group.pictures()).map(({ kind }) => kind)).toEqual(["final", "final"]);
    expect(requests.map(({ seed }) => seed)).toEqual([undefined, undefined]);
    expect(new Set(requests.map(({ requestId }) => requestId)).size).toBe(2);
    expect(requests.every(({ group: name }) => name === group.id)).toBe(true);
  });

  it("loses no picture when one member fails", async () => {
    const { handlers } = members([8n]);
    const { client } = await serve(handlers);
    const group = client.generateMany("a cat", 3, { seed: 7 });
    for await (const _ of group);
    const outcomes = await group.outcomes();
    expect(outcomes.map((outcome) => ("kind" in outcome ? outcome.kind : outcome.code))).toEqual([
      "final",
      "RESOURCE_EXHAUSTED",
      "final",
    ]);
    expect(await errorOf(group.pictures())).toMatchObject({ code: "RESOURCE_EXHAUSTED" });
  });

  it.each(["break", "cancel()", "a signal"])("is cancelled with one call by %s", async (way) => {
    const { handlers, allLeft, cancels } = endless();
    const { client } = await serve(handlers as never);
    const controller = new AbortController();
    const group = client.generateMany("a cat", 2, { signal: controller.signal });
    let started = 0;
    for await (const _ of group) {
      started += 1;
      if (started < 2) continue;
      if (way === "break") break;
      if (way === "cancel()") group.cancel();
      else controller.abort();
    }
    await allLeft;
    await expect.poll(() => cancels).toEqual([{ generationId: "", group: group.id }]);
    expect(await errorOf(group.pictures())).toMatchObject({ code: "CANCELLED" });
  });

  it("cancels a single member by its id", async () => {
    const { handlers, cancels } = endless();
    const { client } = await serve(handlers as never);
    const group = client.generateMany("a cat", 2, { requestId: "mine" });
    let started = 0;
    for await (const { index } of group) {
      started += 1;
      if (started === 2) {
        group.generations[index]?.cancel();
        await expect.poll(() => cancels).toEqual([{ generationId: `mine/${index}`, group: "" }]);
        break;
      }
    }
  });

  it("has 1 to 64 members", async () => {
    const { client } = await serve({});
    for (const count of [0, 65, 1.5, Number.NaN]) {
      expect(() => client.generateMany("a cat", count)).toThrow(/count is .*, must be 1 to 64/);
    }
  });

  it("can be cancelled by its id from anywhere", async () => {
    const { handlers, cancels } = endless();
    const { client } = await serve(handlers as never);
    expect(await client.cancel({ group: "cats" })).toBe(2);
    expect(cancels).toEqual([{ generationId: "", group: "cats" }]);
  });
});

describe("options of the sampler", () => {
  it("reach the service", async () => {
    const { handlers, requests } = members();
    const { client } = await serve(handlers);
    const options = { sigmas: "karras", spacing: "trailing", promptSyntax: "weighted", group: "cats" } as const;
    await client.generate("a cat", { ...options, loras: [{ name: "pixel", scale: 0.5 }, { name: "sharp" }] }).result();
    await client.generate("a cat", { loras: { pixel: 0.5 } }).result();
    expect(requests[0]).toMatchObject({
      sigmas: Sigmas.KARRAS,
      spacing: TimestepSpacing.TRAILING,
      promptSyntax: PromptSyntax.WEIGHTED,
      group: "cats",
      loras: [{ name: "pixel", scale: 0.5 }, { name: "sharp" }],
    });
    expect(requests[0]?.loras[1]?.scale).toBeUndefined();
    expect(requests[1]).toMatchObject({ loras: [{ name: "pixel", scale: 0.5 }] });
    expect(() => client.generate("a cat", { loras: { pixel: Number.NaN } })).toThrow(/loras\[0\]\.scale is NaN/);
  });

  it("are described by the model", async () => {
    const { client } = await serve({
      getModel: () =>
        create(ModelSchema, {
          loras: [{ name: "pixel" }],
          sizes: [{ widthPx: 64, heightPx: 96 }],
          minPixels: 4096,
          maxAspectRatio: 2.5,
          scalesOtherSizes: true,
          promptSyntaxes: [PromptSyntax.PLAIN, PromptSyntax.WEIGHTED, 99 as PromptSyntax],
          schedulerDetails: [
            { name: "Euler", aliases: ["Euler Karras"], sigmas: [Sigmas.BETA], spacings: [TimestepSpacing.LINSPACE] },
          ],
          quantization: "int8",
          offload: "group",
        }),
    });
    expect(await client.getModel()).toMatchObject({
      loras: ["pixel"],
      sizes: [{ width: 64, height: 96 }],
      minPixels: 4096,
      maxAspectRatio: 2.5,
      scalesOtherSizes: true,
      promptSyntaxes: ["plain", "weighted"],
      schedulerDetails: [{ name: "Euler", aliases: ["Euler Karras"], sigmas: ["beta"], spacings: ["linspace"] }],
      quantization: "int8",
      offload: "group",
    });
  });
});
