/** The HTTP API from JavaScript: OpenAI's SDK in Node, and a browser's own EventSource and WebSocket. */

import OpenAI from "openai";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { allowConsole, openPage } from "./support/browser.js";
import { Service } from "./support/service_process.js";
import { TcpProxy } from "./support/tcp_proxy.js";

const PNG = "iVBORw0KGgo";
const JPEG = "/9j/";

describe("over HTTP", () => {
  let service: Service;
  let proxy: TcpProxy;
  let sdk: OpenAI;

  beforeAll(async () => {
    service = await Service.start();
    proxy = await new TcpProxy(service.url).listen();
    sdk = new OpenAI({ baseURL: `${service.url}/v1`, apiKey: "any", maxRetries: 0 });
  });

  afterAll(async () => {
    proxy?.close();
    await service?.kill();
  });

  it("OpenAI's SDK generates an image", async () => {
    const answer = await sdk.images.generate({ prompt: "a red apple", size: "128x128", quality: "low" });
    expect(answer.data?.[0]?.b64_json).toMatch(PNG);
    expect([answer.size, answer.output_format, answer.quality]).toEqual(["128x128", "png", "low"]);
  });

  it("OpenAI's SDK streams partial images", async () => {
    const stream = await sdk.images.generate({ prompt: "a red apple", stream: true, partial_images: 2 });
    const types: string[] = [];
    for await (const event of stream) {
      types.push(event.type);
      expect(event.b64_json).toMatch(event.type === "image_generation.completed" ? PNG : JPEG);
    }
    expect(types.at(-1)).toBe("image_generation.completed");
    expect(types.length).toBeGreaterThan(1);
    expect(types.length).toBeLessThanOrEqual(3);
  });

  it("OpenAI's SDK raises its own errors, and leaving its stream cancels", async () => {
    const invalid = sdk.images.generate({ prompt: "", n: 99 });
    await expect(invalid).rejects.toBeInstanceOf(OpenAI.BadRequestError);
    await expect(invalid).rejects.toMatchObject({ code: "INVALID_REQUEST", param: "n" });
    await expect(sdk.models.retrieve("gpt-image-1")).rejects.toBeInstanceOf(OpenAI.NotFoundError);
    expect((await sdk.models.list()).data.map(({ id }) => id)).toEqual(["bundled"]);

    const count = service.ended.length + 1;
    const stream = await sdk.images.generate({
      prompt: "an octopus",
      stream: true,
      partial_images: 3,
      quality: "high",
    });
    for await (const _ of stream) break;
    expect(await service.outcome(count)).toBe("ABANDONED");
  });

  it("an EventSource resumes after a lost connection, and does not reconnect after the end", async () => {
    allowConsole(/ERR_|net::/);
    const page = await openPage(proxy.url);
    await page.evaluate(() => {
      const received = { ids: [] as string[], phases: [] as string[], opened: 0, state: -1, picture: 0 };
      Object.assign(window, { received });
      const query = new URLSearchParams({ prompt: "a red apple", step_count: "60", images: "url" });
      const source = new EventSource(`/v1/generate?${query}`);
      source.onopen = () => {
        received.opened += 1;
      };
      const record = (event: MessageEvent<string>) => {
        received.ids.push(event.lastEventId);
        received.phases.push(JSON.parse(event.data).phase);
      };
      source.addEventListener("progress", record);
      source.addEventListener("end", async (event) => {
        record(event);
        received.picture = (await (await fetch(JSON.parse(event.data).image_url)).blob()).size;
      });
      source.onerror = () => {
        received.state = source.readyState;
      };
    });
    const received = () => page.evaluate(() => (window as unknown as { received: Received }).received);
    await expect.poll(async () => (await received()).phases.at(-1)).toBe("PHASE_DENOISING");
    proxy.dropConnections();
    await expect.poll(async () => (await received()).phases.at(-1)).toBe("PHASE_SUCCEEDED");
    // 2 is CLOSED: after the end it reconnected once, and the service answered 204.
    await expect.poll(async () => (await received()).state).toBe(2);
    const { ids, opened, picture } = await received();
    expect(opened).toBe(2);
    expect(picture).toBeGreaterThan(1000);
    expect(new Set(ids.map((id) => id.split(":")[0])).size).toBe(1);
    expect(ids.at(-1)).toMatch(/:end$/);
    const sequences = ids.slice(0, -1).map((id) => Number(id.split(":")[1]));
    expect(sequences).toEqual([...new Set(sequences)].sort((a, b) => a - b));
  });

  it("a WebSocket transfers pictures as binary messages", async () => {
    const page = await openPage(service.url);
    const kinds = await page.evaluate(
      () =>
        new Promise<string[]>((resolve) => {
          const socket = new WebSocket(`ws://${location.host}/v1/ws`);
          const pictures: Blob[] = [];
          let last = false;
          socket.onopen = () =>
            socket.send(
              JSON.stringify({ type: "generate", id: "a", request: { prompt: "a red apple", step_count: 10 } }),
            );
          socket.onmessage = async ({ data }) => {
            if (typeof data === "string") {
              last = JSON.parse(data).type === "end";
              return;
            }
            pictures.push(data);
            if (!last) return;
            const heads = pictures.map(async (blob) => new Uint8Array(await blob.slice(0, 2).arrayBuffer()).join(" "));
            resolve(await Promise.all(heads));
          };
        }),
    );
    expect(kinds.at(-1)).toBe("137 80");
    expect(new Set(kinds.slice(0, -1))).toEqual(new Set(["255 216"]));
  });
});

interface Received {
  readonly ids: string[];
  readonly phases: string[];
  readonly opened: number;
  readonly state: number;
  readonly picture: number;
}
