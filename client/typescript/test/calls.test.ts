import { create } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { describe, expect, it } from "vitest";
import { ModelSchema, Phase, PreviewMethod, PreviewOptionsSchema } from "../src/gen/calotype/v1/calotype_pb.js";
import { createClient } from "../src/index.js";
import { errorOf, serve, stopAfterTest } from "./helpers.js";
import { StubServer } from "./stub_server.js";

describe("the unary calls", () => {
  it("getModel describes the model", async () => {
    const { client } = await serve({
      getModel: () =>
        create(ModelSchema, {
          name: "bundled",
          widthPx: 128,
          guidanceScale: 3,
          schedulers: ["DDIMScheduler", "LCMScheduler"],
          fastSchedulers: ["DDIMScheduler"],
          accelerator: "none",
          acceleratorFallback: "The accelerator graphs failed.",
          previewMethods: [PreviewMethod.HEAD, 99 as PreviewMethod],
          preview: create(PreviewOptionsSchema, { everySteps: 2, method: PreviewMethod.AUTO }),
        }),
    });
    const model = await client.getModel();
    expect(model).toMatchObject({ name: "bundled", width: 128, guidanceScale: 3, previewMethods: ["head"] });
    expect(model.preview).toMatchObject({ everySteps: 2, method: "auto" });
    expect(model).toMatchObject({
      schedulers: ["DDIMScheduler", "LCMScheduler"],
      fastSchedulers: ["DDIMScheduler"],
      accelerator: "none",
      acceleratorFallback: "The accelerator graphs failed.",
    });
  });

  it("cancel takes an id, and converts errors", async () => {
    const { client } = await serve({
      cancel({ generationId }) {
        if (generationId === "g") return { phase: Phase.DENOISING };
        throw new ConnectError("gone", Code.NotFound);
      },
    });
    expect(await client.cancel("g")).toBe("denoising");
    expect(await errorOf(client.cancel("h"))).toMatchObject({ code: "NOT_FOUND" });
  });

  it("finish takes an id", async () => {
    const { client } = await serve({
      finish: ({ generationId }) => ({ phase: generationId === "g" ? Phase.QUEUED : 0 }),
    });
    expect(await client.finish("g")).toBe("queued");
  });

  it("generations reads all pages", async () => {
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

  it("have a deadline of 10 s unless the caller sets one", async () => {
    const timeouts: (number | undefined)[] = [];
    const { client } = await serve({
      getModel(_request, context) {
        timeouts.push(context.timeoutMs());
        return {};
      },
    });
    await client.getModel();
    await client.getModel({ timeout: 60 });
    await client.getModel({ timeout: Number.POSITIVE_INFINITY });
    expect(timeouts[0]).toBeGreaterThan(5_000);
    expect(timeouts[0]).toBeLessThanOrEqual(10_000);
    expect(timeouts[1]).toBeGreaterThan(50_000);
    expect(timeouts[2]).toBeUndefined();
  });

  it("merge headers of the client and of the call", async () => {
    const seen: (string | null)[] = [];
    const stub = new StubServer({
      getModel(_request, context) {
        seen.push(context.requestHeader.get("authorization"), context.requestHeader.get("x-request-id"));
        return {};
      },
    });
    stopAfterTest(stub);
    const client = createClient(await stub.start(), { headers: { authorization: "Bearer t", "x-request-id": "a" } });
    await client.getModel({ headers: { "x-request-id": "b" } });
    expect(seen).toEqual(["Bearer t", "b"]);
  });

  it("send the current API key", async () => {
    const seen: (string | null)[] = [];
    const stub = new StubServer({
      getModel(_request, context) {
        seen.push(context.requestHeader.get("authorization"));
        return {};
      },
    });
    stopAfterTest(stub);
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
