/** A browser's own EventSource, while the service cannot start a generation, and while it is replaced. */

import { createClient } from "calotype";
import type { Page } from "playwright-core";
import { afterAll, beforeAll, expect, it, onTestFinished } from "vitest";
import { allowConsole, openPage } from "./support/browser.js";
import { list, Service } from "./support/service_process.js";
import { TcpProxy } from "./support/tcp_proxy.js";

/** One generation at a time, and no queue. */
const FLAGS = ["--max-active", "1", "--max-queue", "0"];

let service: Service;
/** Takes over from `service`, without its generations. */
let successor: Service;

beforeAll(async () => {
  [service, successor] = await Promise.all([Service.start(FLAGS), Service.start(FLAGS)]);
}, 240_000);

afterAll(async () => {
  await Promise.all([service, successor].map((each) => each?.kill()));
});

interface Received {
  readonly events: { readonly name: string; readonly id: string; readonly data: string }[];
  /** `EventSource.readyState` at the last error; 2 is CLOSED. */
  readonly state: number;
}

/** Opens an EventSource in a page, which records its events. */
async function listen(page: Page, query: string): Promise<() => Promise<Received>> {
  await page.evaluate((query) => {
    const received = { events: [] as { name: string; id: string; data: string }[], state: -1 };
    Object.assign(window, { received });
    const source = new EventSource(`/v1/generate?${query}`);
    for (const name of ["progress", "waiting", "end"])
      source.addEventListener(name, ({ data, lastEventId }) => received.events.push({ name, id: lastEventId, data }));
    source.onerror = () => {
      received.state = source.readyState;
    };
  }, query);
  return () => page.evaluate(() => (window as unknown as { received: Received }).received);
}

const QUERY = "prompt=a+red+apple&seed=7&images=url";

it("an EventSource waits for a full queue, and then shows the whole generation", async () => {
  const running = createClient(service.url).generate("an octopus", { steps: 150 });
  await running[Symbol.asyncIterator]().next();
  const page = await openPage(service.url);
  const received = await listen(page, QUERY);
  await expect.poll(async () => (await received()).events[0]?.name).toBe("waiting");
  expect(JSON.parse((await received()).events[0]?.data ?? "").error.code).toBe("QUEUE_FULL");
  await service.cancelAll();
  await expect.poll(async () => (await received()).events.at(-1)?.name).toBe("end");
  // After the end it reconnected once, and the service answered 204.
  await expect.poll(async () => (await received()).state).toBe(2);
  const { events } = await received();
  const progress = events.filter(({ name }) => name !== "waiting");
  expect(JSON.parse(progress.at(-1)?.data ?? "").phase).toBe("PHASE_SUCCEEDED");
  expect(new Set(progress.map(({ id }) => id.split(":")[0])).size).toBe(1);
  expect((await list(service)).length).toBe(2);
}, 240_000);

it("an EventSource continues with the next server after the service is killed", async () => {
  allowConsole(/ERR_|net::/);
  const proxy = await new TcpProxy(service.url).listen();
  onTestFinished(() => proxy.close());
  const page = await openPage(proxy.url);
  const received = await listen(page, `${QUERY}&step_count=60`);
  await expect.poll(async () => (await received()).events.length).toBeGreaterThan(1);
  await service.kill();
  proxy.switchTo(successor.url);
  await expect.poll(async () => (await received()).events.at(-1)?.name).toBe("end");
  await expect.poll(async () => (await received()).state).toBe(2);
  const last = JSON.parse((await received()).events.at(-1)?.data ?? "");
  expect([last.phase, last.seed]).toEqual(["PHASE_SUCCEEDED", "7"]);
  expect((await list(successor)).length).toBe(1);
}, 240_000);
