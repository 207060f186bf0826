/** OpenAI's SDK in a page of another origin, which the operator allows. */

import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { expect, it, onTestFinished } from "vitest";
import { allowConsole, openPage } from "./support/browser.js";
import { Service } from "./support/service_process.js";

const PACKAGE = new URL("../node_modules/openai/", import.meta.url);

const PAGE = `<!doctype html><link rel=icon href=data:,>
<script type=module>import OpenAI from "/index.mjs"; window.OpenAI = OpenAI;</script>`;

/** Serves a page with the SDK. Returns the origin. */
async function serveSdk(): Promise<string> {
  const server = createServer(async ({ url = "/" }, response) => {
    if (url === "/") {
      response.setHeader("content-type", "text/html").end(PAGE);
      return;
    }
    response.setHeader("content-type", "text/javascript").end(await readFile(new URL(`.${url}`, PACKAGE)));
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  onTestFinished(() => void server.close());
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
}

/** Runs in the page: generates an image, streams another one, and fetches a third by its address. */
async function useSdk(baseURL: string): Promise<string[]> {
  const { OpenAI } = window as unknown as { OpenAI: typeof import("openai").default };
  const defaultHeaders = { baggage: "team=blue", "x-my-metadata": "1" };
  const sdk = new OpenAI({ baseURL, apiKey: "any", maxRetries: 0, dangerouslyAllowBrowser: true, defaultHeaders });
  const request = { prompt: "a red apple", quality: "low" } as const;
  const found: string[] = [];
  const answer = await sdk.images.generate(request).withResponse();
  found.push(answer.data.data?.[0]?.b64_json?.slice(0, 11) ?? "");
  found.push(answer.response.headers.get("x-request-id") ? "request id" : "");
  for await (const event of await sdk.images.generate({ ...request, stream: true })) found.push(event.type);
  const linked = await sdk.images.generate({ ...request, response_format: "url" });
  found.push((await (await fetch(linked.data?.[0]?.url ?? "")).blob()).type);
  await sdk.images.generate({ prompt: "" }).catch((error: { code: string }) => found.push(error.code));
  return found;
}

it("OpenAI's SDK works in a page of an allowed origin, and not in others", async () => {
  allowConsole(/Failed to load resource|CORS policy/);
  const [allowed, other] = await Promise.all([serveSdk(), serveSdk()]);
  const service = await Service.start(["--allowed-origins", allowed]);
  onTestFinished(() => service.kill());
  const page = await openPage(allowed);
  expect(await page.evaluate(useSdk, `${service.url}/v1`)).toEqual([
    "iVBORw0KGgo",
    "request id",
    "image_generation.completed",
    "image/png",
    "INVALID_REQUEST",
  ]);
  const foreign = await openPage(other);
  await expect(foreign.evaluate(useSdk, `${service.url}/v1`)).rejects.toThrow("Connection error");
}, 240_000);
