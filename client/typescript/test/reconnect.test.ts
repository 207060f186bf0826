import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { toBinary } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { describe, expect, it } from "vitest";
import { type GenerateRequest, ProgressSchema } from "../src/gen/calotype/v1/calotype_pb.js";
import { createClient, type Reconnect } from "../src/index.js";
import { serve } from "./helpers.js";
import { disconnected, final, preview } from "./stub_server.js";

describe("a lost connection", () => {
  it("is resumed after the last message, with the same request id if the server lost the generation", async () => {
    const requests: GenerateRequest[] = [];
    const watched: object[] = [];
    const { client, stub } = await serve({
      async *generate(request, context) {
        requests.push(request);
        yield preview(requests.length);
        if (requests.length === 1) await disconnected(context);
        yield final();
      },
      // biome-ignore lint/correctness/useYield: it fails before the first message.
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
      if (requests.length === 1) stub.dropConnections();
    }
    expect(steps).toEqual([1, 2, 3]);
    expect(watched).toMatchObject([{ generationId: "g", afterSequence: 2n, preview: { maxEdgePx: 64 } }]);
    expect(requests[1]).toMatchObject({ prompt: "x", seed: 42n, requestId: requests[0]?.requestId });
    expect(reconnects[0]).toMatchObject({ attempt: 1, error: { reason: "CONNECTION_LOST" } });
  });

  it("is resumed if a proxy truncated it within a message", async () => {
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

  it("is resumed if the service stalls, also before the first message, and the stalled call is closed", async () => {
    const requests: GenerateRequest[] = [];
    const left: string[] = [];
    const { client } = await serve({
      async *generate(request, context) {
        requests.push(request);
        if (requests.length === 2) yield preview(1);
        await disconnected(context);
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
